"""Every knob of the server, and of vLLM in its place; the command line shows the field texts as its help."""

from __future__ import annotations

from pydantic import Field

from step35.config.base import Config


class ServeSettings(Config):
    """Limits, defaults and thinking budgets of one server."""

    api_key: str = ""
    """Bearer token that every request but / and /health must carry; empty asks for none. `step35 serve` also takes it
    from the environment variable STEP35_API_KEY, where other users of the machine cannot see it."""
    max_concurrent: int = Field(default=64, ge=1)
    """Most generations at a time, over all requests; each of a request's `n` choices counts. More get a 429."""
    max_body_bytes: int = Field(default=16 << 20, ge=1)
    """Longest request body; longer ones get a 413."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time from a request to the end of its answer, and for its body to arrive."""
    drain_timeout_s: float = Field(default=30.0, ge=0)
    """How long SIGTERM waits for running answers; meanwhile /health and new requests get a 503."""
    default_max_tokens: int = Field(default=4096, ge=1)
    """Most new tokens of a chat turn whose request sets no limit, as far as the context has room."""
    max_context: int | None = Field(default=None, ge=1)
    """Tokens of prompt and answer together; None leaves it to the sampler."""
    thinking_budget: int | None = Field(default=None, ge=0)
    """Most thinking tokens for each user query when a request does not say; None sets no limit."""
    effort_low_tokens: int = Field(default=512, ge=0)
    """Thinking budget of `reasoning_effort: low`."""
    effort_medium_tokens: int = Field(default=4096, ge=0)
    """Thinking budget of `reasoning_effort: medium`."""
    effort_high_tokens: int = Field(default=32768, ge=0)
    """Thinking budget of `reasoning_effort: high`."""
    speculate: int | None = Field(default=None, ge=0)
    """MTP drafts a step, by default as many as the model has modules; the answers are distributed the same."""
    adaptive_depth: bool = True
    """Draft less where acceptance and the times of passes say that it is faster: for a loaded server, or on text that
    the modules guess badly. vLLM always drafts as many as `speculate` says."""
    draft_vocabulary: int | None = Field(default=None, ge=1)
    """Choose drafts among the first so many token ids, the commonest of a byte-pair vocabulary; by default among all.
    Drafting reads less then, and the answers stay the same."""


class VllmSettings(Config):
    """How vLLM spreads the model, for `--backend vllm`. Whatever has no name here goes into `args`."""

    executable: str = "vllm"
    """vLLM's program: a name on PATH, or a path."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share each layer."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Groups of layers, one after the other."""
    data_parallel: int = Field(default=1, ge=1)
    """Replicas of attention, over all nodes; each takes `tensor_parallel` times `pipeline_parallel` GPUs."""
    expert_parallel: bool = False
    """Give each GPU whole experts, instead of a slice of every expert."""
    args: str = ""
    """More arguments for vLLM, as on a command line; write --vllm.args="--enforce-eager"."""
