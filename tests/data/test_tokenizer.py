from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.data.chat import chat_template
from step35.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, train_tokenizer
from step35.errors import CheckpointError, ConfigError

TEXTS = ["def add(a, b):\n    return a + b\n", "naïve — 城市 🙂 1234 and 12345", "the cat and the hat"] * 20
RELEASED_ORDER = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<im_patch>",
)


TOKENIZER = train_tokenizer(TEXTS, 300)


def test_special_tokens_have_the_released_ids() -> None:
    assert [TOKENIZER.id_of(token) for token in RELEASED_ORDER] == list(range(11))
    assert (TOKENIZER.bos_id, TOKENIZER.pad_id, TOKENIZER.eos_ids) == (0, 1, (1, 3))
    assert TOKENIZER.bos_token == RELEASED_ORDER[0]
    assert TOKENIZER.vocab_size == 300
    assert TOKENIZER.encode("a<think>b") == [*TOKENIZER.encode("a"), 4, *TOKENIZER.encode("b")]


def test_digits_stand_alone_and_merges_happen() -> None:
    digits = [TOKENIZER.id_of(digit) for digit in "1234"]
    assert TOKENIZER.encode("1234") == digits
    assert TOKENIZER.encode("x 1234")[-4:] == digits
    assert len(TOKENIZER.encode("return")) < 6


def test_training_is_deterministic() -> None:
    assert train_tokenizer(TEXTS, 300).backend.to_str() == TOKENIZER.backend.to_str()


def test_vocabulary_must_hold_the_bytes() -> None:
    assert train_tokenizer([], 267).encode("é")
    with pytest.raises(ConfigError, match=r"266.*267"):
        train_tokenizer(TEXTS, 266)


@given(st.text())
def test_every_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_skip_special_keeps_thinking_and_tool_tokens() -> None:
    ids = [0, *TOKENIZER.encode("<think>a</think><tool_call>b</tool_call><|im_end|>")]
    assert TOKENIZER.decode(ids, skip_special=True) == "<think>a</think><tool_call>b</tool_call>"
    assert TOKENIZER.decode(ids).startswith(TOKENIZER.bos_token)


def test_save_and_load_give_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert again.backend.to_str() == TOKENIZER.backend.to_str()
    assert (again.bos_id, again.pad_id, again.eos_ids) == (0, 1, (1, 3))
    config = json.loads((tmp_path / "new/folder/tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"]) == RELEASED_ORDER[:2]
    assert config["chat_template"] == chat_template()
    assert (tmp_path / "new/folder/chat_template.jinja").read_text(encoding="utf-8") == chat_template()


def test_end_tokens_come_from_the_checkpoint(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert load_tokenizer(tmp_path).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2, 128007]}')
    assert load_tokenizer(tmp_path).eos_ids == (1, 2, 128007)


def test_settings_of_a_loaded_folder_are_kept(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    settings = {"model_max_length": 99, "bos_token": {"content": "<|im_start|>"}, "pad_token": "<im_patch>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.pad_id) == (2, 10)
    loaded.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").config["model_max_length"] == 99


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*give a checkpoint folder"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="<nothing>"):
        TOKENIZER.id_of("<nothing>")


@given(st.text(st.sampled_from("aé城🙂�\n ")))
def test_stream_never_emits_half_a_character(text: str) -> None:
    text = f"<think>{text}</think>{TOKENIZER.bos_token}"
    stream = StreamDecoder(TOKENIZER)
    emitted = ""
    for token_id in TOKENIZER.encode(text):
        emitted += stream.push(token_id)
        assert text.startswith(emitted)
    assert emitted == text
    assert stream.flush() == ""


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_stream_equals_decode_on_any_ids(ids: list[int]) -> None:
    stream = StreamDecoder(TOKENIZER)
    assert "".join(map(stream.push, ids)) + stream.flush() == TOKENIZER.decode(ids)
    visible = StreamDecoder(TOKENIZER, skip_special=True)
    assert "".join(map(visible.push, ids)) + visible.flush() == TOKENIZER.decode(ids, skip_special=True)


def test_stream_ends_a_broken_character_once() -> None:
    stream = StreamDecoder(TOKENIZER)
    ids = train_tokenizer([], 267).encode("🙂")
    broken = [TOKENIZER.id_of(train_tokenizer([], 267).backend.id_to_token(token_id)) for token_id in ids[:3]]
    assert [stream.push(token_id) for token_id in broken] == ["", "", ""]
    assert stream.flush() == "�"
    assert stream.push(TOKENIZER.encode("a")[0]) == "a"


def test_a_turn_has_no_end_token_of_any_kind() -> None:
    tokenizer = TOKENIZER
    ids = tokenizer.encode("Done.\n</think>\n42")
    for end in tokenizer.eos_ids:
        assert tokenizer.turn_text([*ids, end]) == "Done.\n</think>\n42"
    assert tokenizer.turn_text(ids) == "Done.\n</think>\n42"
    assert tokenizer.turn_text([]) == ""
