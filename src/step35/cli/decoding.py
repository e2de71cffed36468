"""What `generate` and `chat` have in common: which model to load, and how it chooses its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from step35.cli.shipped import SHIPPED
from step35.config.base import Config

if TYPE_CHECKING:
    from step35.api.sampling import SamplingParams
    from step35.engine.llm import LLM


class Decoding(Config):
    """A model, and how to sample from it."""

    path: tyro.conf.Positional[Path] = SHIPPED
    """Checkpoint folder in the released layout, .gguf file, training run (its newest checkpoint), or hf://ORG/NAME
    on the hub; by default, the small model that comes with the package."""
    max_tokens: int = Field(default=256, ge=1)
    """Most tokens to generate at a time."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy, 1 samples from the model's own distribution."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k likeliest tokens; 0 for all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from the tokens with at least this share of the likeliest token's probability; 0 for all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, makes tokens of the prompt and the answer less likely, by division of their logits; 1 is none."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the answer already holds."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that the answer already holds it."""
    stop: tyro.conf.UseAppendAction[tuple[Annotated[str, Field(min_length=1)], ...]] = ()
    """Text that ends the answer and is not shown; repeat the flag for several."""
    seed: int | None = None
    """Seed of the sampling; without one, each call differs above temperature 0."""
    speculate: int | None = Field(default=None, ge=0)
    """MTP drafts a step; by default as many as the model has modules. The text is the same with any number."""
    mtp: int | None = Field(default=None, ge=0)
    """Load only the first so many MTP modules; 0 for a checkpoint without their tensors. All, if not given."""
    draft_vocabulary: int | None = Field(default=None, ge=1)
    """Choose drafts among the first so many token ids, the commonest of a byte-pair vocabulary; by default among all.
    Drafting reads less then, and the text stays the same."""
    max_context: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and answer together, which the cache is made for: by default 4096, or the model's limit."""
    dtype: str = "float32"
    """Dtype of weights and computation: float32, bfloat16 or float16."""
    quantization: Literal["none", "int8"] = "none"
    """int8 rounds the matrices to 8 bits once they are loaded: a quarter of the memory of float32, and a text that may
    differ a little."""

    def load(self) -> LLM:
        """Return the model, ready to generate."""
        from step35.engine.llm import LLM

        return LLM(
            self.path,
            dtype=self.dtype,
            quantization=self.quantization,
            mtp=self.mtp,
            max_batch=1,
            max_context=self.max_context,
            draft_vocabulary=self.draft_vocabulary,
        )

    def params(self, llm: LLM, **more: Any) -> SamplingParams:
        """Return the sampling parameters among the settings, and `more`."""
        from step35.api.sampling import SamplingParams

        shared = SamplingParams.__dataclass_fields__.keys() & type(self).model_fields.keys()
        chosen = {name: getattr(self, name) for name in shared}
        if self.speculate is None:
            chosen["speculate"] = len(llm.model.mtp)
        return SamplingParams(**chosen, **more)
