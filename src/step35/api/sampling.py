"""How to sample: the parameters that a caller may set for one generation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Decoding parameters. The defaults are the report's: temperature 1, top-p 1."""

    max_tokens: int = 256
    """Most new tokens to generate."""
    temperature: float = 1.0
    """0 is greedy decoding; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    seed: int | None = None
    """Seed of this request's own random stream; None draws one."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the generation, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Go on past the end tokens (for benchmarks)."""
    speculate: int = 0
    """Draft this many tokens with the MTP modules in each step (0 to the model's number of modules)."""

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("max_tokens", self.max_tokens >= 1, "an integer of at least 1"),
            ("temperature", self.temperature >= 0, "a number of at least 0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("top_k", self.top_k >= 0, "an integer of at least 0 (0 keeps all)"),
            ("speculate", self.speculate >= 0, "an integer of at least 0 (0 is plain decoding)"),
        ):
            if not ok:
                raise ValueError(f"SamplingParams.{name}={getattr(self, name)} is not allowed; give {allowed}.")
