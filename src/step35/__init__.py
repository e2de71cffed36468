"""step35: the open, end-to-end Step 3.5 Flash stack.

The names below are the stable Python surface. They load on first use, so that `import step35` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from step35.api.sampling import SamplingParams
    from step35.data import chat
    from step35.data.tokenizer import load_tokenizer
    from step35.engine.async_llm import AsyncLLM
    from step35.engine.llm import LLM
    from step35.model.weights import load_model, save_model

__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__", "chat", "load_model", "load_tokenizer", "save_model"]

_HOMES = {
    "AsyncLLM": "step35.engine.async_llm",
    "LLM": "step35.engine.llm",
    "SamplingParams": "step35.api.sampling",
    "load_model": "step35.model.weights",
    "load_tokenizer": "step35.data.tokenizer",
    "save_model": "step35.model.weights",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "chat":
        return importlib.import_module("step35.data.chat")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'step35' has no attribute '{name}'; it has {', '.join(__all__)}")
