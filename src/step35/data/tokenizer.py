"""Text to token ids and back: a thin class around `tokenizers`, and training of a byte-level BPE.

Folders are what transformers, vLLM and others read: `tokenizer.json`, `tokenizer_config.json` and
`chat_template.jinja`. Nothing is ever added to a text: the chat format places BOS and turn tokens itself.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from step35.config.model import refuse_run
from step35.data.chat import chat_template
from step35.errors import CheckpointError, ConfigError
from step35.runtime.disk import disk_errors, write_text
from step35.runtime.hub import fetched

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"

SPECIAL_TOKENS = {
    BOS_TOKEN: True,
    EOS_TOKEN: True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<think>": False,
    "</think>": False,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<im_patch>": True,
}
"""Token to its "special" flag; ids follow this order. What `skip_special` must not hide is not special."""


class Tokenizer:
    """A trained tokenizer with the ids that the rest of the package needs."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: dict[str, Any] | None = None,
        eos_ids: Sequence[int] | None = None,
    ) -> None:
        self.backend = backend
        self.config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS_TOKEN,
            "eos_token": EOS_TOKEN,
            "pad_token": EOS_TOKEN,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        } | (config or {})
        """Content of `tokenizer_config.json`."""
        self.bos_token = _token_text(self.config["bos_token"])
        self.bos_id = self.id_of(self.bos_token)
        self.pad_id = self.id_of(_token_text(self.config["pad_token"]))
        self.eos_ids = tuple(eos_ids or (self.id_of(_token_text(self.config["eos_token"])), self.id_of("<|im_end|>")))
        """Ids that end a generation."""

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """The tokens that are no part of the byte-level vocabulary, by id."""
        return dict(self.backend.get_added_tokens_decoder())

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; a model's vocabulary may be padded beyond it."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special token strings in it become their ids, nothing is added.

        Lone surrogates, which stand for input bytes that were no UTF-8, count as "?".
        """
        if not text.isascii():
            text = text.encode(errors="replace").decode()
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special))

    def turn_text(self, ids: Sequence[int]) -> str:
        """Return the text of a generated turn without the end token that closed it, whichever it was."""
        ended = bool(ids) and ids[-1] in self.eos_ids
        return self.decode(ids[:-1] if ended else ids)

    def id_of(self, token: str) -> int:
        """Return the id of one token; raise `CheckpointError` when the vocabulary lacks it."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(
                f"the tokenizer has no token '{token}'; use the tokenizer.json of a Step 3.5 checkpoint, "
                "or train one with train_tokenizer."
            )
        return int(token_id)

    def save(self, folder: str | Path) -> None:
        """Write the three files of a released tokenizer into `folder`."""
        folder = Path(folder)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config | {"chat_template": chat_template()}, ensure_ascii=False, indent=2)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", config + "\n")
        write_text(folder / "chat_template.jinja", chat_template())

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a checkpoint folder; raise `CheckpointError` when it holds no usable tokenizer.json."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            refuse_run(path.parent)
            raise CheckpointError(
                f"no tokenizer.json in '{folder}'; give a checkpoint folder (config.json, tokenizer.json, "
                "*.safetensors), or make a tokenizer with train_tokenizer and save it there."
            )
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"'{path}' cannot be read ({error}); copy it again from its source.") from None
        return cls(backend, config=_read_json(path.with_name("tokenizer_config.json")), eos_ids=_eos_ids(folder))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of what `load_model` loads; see `Tokenizer.load`.

    That is a checkpoint folder, a .gguf file, a training run or one checkpoint of it, or an address on the hub.
    """
    path = fetched(path)
    if path.suffix == ".gguf":
        from step35.data.gguf_vocabulary import gguf_tokenizer
        from step35.model.gguf import GGUFTensors

        return gguf_tokenizer(GGUFTensors(path))
    if not (path / "tokenizer.json").is_file():
        from step35.model.weights import architecture, training_checkpoint

        if step := training_checkpoint(path):
            return Tokenizer.load(architecture(step))
    return Tokenizer.load(path)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on `texts`; the same texts give the same tokenizer.

    Digits stay single tokens, so that a number is spelled the same way wherever it stands. The result has
    fewer than `vocab_size` tokens when the texts hold too few pairs. Raises `ConfigError` for a `vocab_size`
    that cannot hold the bytes and the special tokens.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ConfigError(f"vocab_size={vocab_size} is too small; the bytes and special tokens alone need {least}.")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(_with_special_flags(backend))


class StreamDecoder:
    """Decodes ids one at a time and never emits half a character.

    Needs a byte-level vocabulary, as the released one is. Joined output equals `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._bytes = _byte_alphabet()
        self._added = tokenizer.added

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes: often its own, empty inside a character."""
        added = self._added.get(token_id)
        if added is not None:
            return "" if added.special and self._skip_special else self._decoder.decode(added.content.encode())
        token = self._tokenizer.backend.id_to_token(token_id) or ""
        return self._decoder.decode(bytes(self._bytes[character] for character in token))

    def flush(self) -> str:
        """Return U+FFFD for a character that never ended, and start afresh."""
        return self._decoder.decode(b"", final=True)


def _with_special_flags(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Training marks every added token special; the thinking and tool tokens must survive `skip_special`."""
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = SPECIAL_TOKENS[token["content"]]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte behind each character of a byte-level vocabulary (the GPT-2 alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _token_text(token: Any) -> str:
    """Some tokenizer_config.json files hold the token's whole record instead of its text."""
    return str(token["content"] if isinstance(token, dict) else token)


def _eos_ids(folder: str | Path) -> tuple[int, ...]:
    """Return the end tokens that the checkpoint declares; empty when it declares none."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(Path(folder) / name).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not a JSON object ({error}); copy it again from its source.") from None
