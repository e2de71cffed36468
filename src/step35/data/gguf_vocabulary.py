"""A tokenizer as GGUF keys, and back.

GGUF names the rule that cuts text into words instead of holding it, so a tokenizer must use one of the rules below:
the release's, or those of tokenizers trained here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from step35.config.model import ModelConfig
from step35.data.chat import chat_template
from step35.data.tokenizer import Tokenizer
from step35.errors import CheckpointError, ConfigError
from step35.model.gguf import GGUFTensors

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's token types: control tokens are special, user-defined ones are matched in text but shown."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_RELEASE = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
RULES: dict[str, Any] = {
    "gpt-2": _BYTE_LEVEL | {"use_regex": True},
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTE_LEVEL | {"use_regex": True}]},
    "deepseek-v3": {
        "type": "Sequence",
        "pretokenizers": [
            *({"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in _RELEASE),
            _BYTE_LEVEL | {"use_regex": False},
        ],
    },
}
"""GGUF's name of each rule, and the `pre_tokenizer` of tokenizer.json that it stands for."""


def vocabulary_keys(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Return the `tokenizer.*` keys; ids beyond the tokenizer's become unused tokens, so that all rows have a name.

    Raises `ConfigError` for a tokenizer that GGUF has no name for.
    """
    content = json.loads(tokenizer.backend.to_str())
    if content["model"]["type"] != "BPE":
        raise ConfigError(f"GGUF files of this model hold a BPE tokenizer, not '{content['model']['type']}'.")
    if content["normalizer"] is not None:
        raise ConfigError(f"GGUF cannot hold this tokenizer's normalizer: {json.dumps(content['normalizer'])[:200]}.")
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but config.json says vocab_size={config.vocab_size}; "
            "put the model's own tokenizer.json beside it."
        )
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id = {i: token for token, i in content["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    tokens, types = [], []
    for i in range(config.vocab_size):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        added_type = CONTROL if i in added and added[i]["special"] else USER_DEFINED
        types.append(added_type if i in added else NORMAL if i in by_id else UNUSED)
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id[-1], "padding": config.pad_token_id}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _rule(content["pre_tokenizer"]),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]],
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i >= 0},
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": chat_template(),
    }


def gguf_tokenizer(file: GGUFTensors) -> Tokenizer:
    """Return the tokenizer inside a .gguf file, or beside it if its rule is not known."""
    folder = Path(file.place).parent
    if file.metadata.get("tokenizer.ggml.pre") not in RULES and (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    return tokenizer_from_keys(file.metadata, file.config())


def tokenizer_from_keys(keys: dict[str, Any], config: ModelConfig) -> Tokenizer:
    """Return the tokenizer that a GGUF file describes; raise `CheckpointError` for a rule that is not known here."""
    rule = keys.get("tokenizer.ggml.pre")
    if keys.get("tokenizer.ggml.model") != "gpt2" or rule not in RULES:
        raise CheckpointError(
            f"the GGUF file's tokenizer (model {keys.get('tokenizer.ggml.model')!r}, rule {rule!r}) is not known; "
            f"known are byte-level BPEs with the rules {', '.join(RULES)}. Put the model's tokenizer.json beside it."
        )
    missing = [
        f"tokenizer.ggml.{name}"
        for name in ("tokens", "token_type", "merges")
        if not keys.get(f"tokenizer.ggml.{name}")
    ]
    if missing:
        raise CheckpointError(f"the GGUF file lacks the keys {', '.join(missing)}; copy or convert it again.")
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    content = json.loads(backend.to_str())
    content["model"]["vocab"] = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    content["model"]["merges"] = [merge.split(" ") for merge in keys["tokenizer.ggml.merges"]]
    content["pre_tokenizer"] = RULES[rule]
    content["decoder"] = _BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the GGUF file's tokenizer cannot be rebuilt ({error}); copy it again.") from None
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    names = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id[0], "pad_token": config.pad_token_id}
    return Tokenizer(backend, config={name: tokens[i] for name, i in names.items()}, eos_ids=config.eos_token_id)


def _rule(pre_tokenizer: Any) -> str:
    written = json.loads(json.dumps(pre_tokenizer).replace(r"\r", r"\\r").replace(r"\n", r"\\n"))
    for name, known in RULES.items():
        if known in (pre_tokenizer, written):  # line ends inside an expression: as characters, or written out
            return name
    raise ConfigError(
        f"GGUF has no name for this tokenizer's pre_tokenizer: {json.dumps(pre_tokenizer)[:200]}. Known are the "
        f"release's ('deepseek-v3') and those of tokenizers trained here ({', '.join(RULES)})."
    )
