from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step35.cli.shipped import SHIPPED
from step35.data import chat
from step35.data.lines import zstd
from step35.data.tokenizer import Tokenizer
from step35.errors import DataError
from step35.post.sft import Conversation, packed_rows, read_conversations, write_conversations
from step35.runtime.console import Console


def zstd_compress(content: bytes) -> bytes:
    return bytes(zstd().compress(content))


GOOD = Conversation(
    [{"role": "user", "content": "où?"}, {"role": "assistant", "content": "ici", "reasoning_content": "a\nb"}],
    [{"type": "function", "function": {"name": "f", "parameters": {}}}],
)


def test_conversations_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write_conversations(path, [GOOD, Conversation([], [])])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert read_conversations(path, warn=pytest.fail) == [GOOD, Conversation([], [])]


def test_tools_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"messages": []}\n{"messages": [], "tools": null}\n')
    assert [c.tools for c in read_conversations(path, warn=pytest.fail)] == [[], []]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("not json", "not JSON"),
        ('{"prompt": "hi"}', "messages"),
        ("[1, 2]", "no list of messages"),
        ("7", "no list of messages"),
        ('{"messages": [', "not JSON"),
        ('{"messages": [{"role": "developer", "content": "hi"}]}', "developer"),
        ('{"messages": [{"role": "user", "content": 5}]}', "5"),
        ('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": ["f"]}]}', "Error"),
        ('{"messages": [{"role": "user", "content": "hi"}], "tools": 5}', "TypeError"),
    ],
)
def test_a_bad_line_is_named_and_skipped(tmp_path: Path, bad: str, why: str) -> None:
    good = json.dumps({"messages": GOOD.messages, "tools": GOOD.tools})
    path = tmp_path / "c.jsonl"
    path.write_text(f"{good}\n{bad}\n{good}\n", encoding="utf-8")
    warnings: list[str] = []
    assert read_conversations(path, warnings.append) == [GOOD, GOOD]
    [warning] = warnings
    assert warning.startswith(f"skipped: {path}:2: ")
    assert why in warning
    assert bad[:10] in warning


@pytest.mark.parametrize("bad", ['{"messages": 5}', '{"messages": "hi"}', '{"messages": ["hi"]}'])
def test_messages_that_are_no_list_of_messages_are_bad_too(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f'{bad}\n{{"messages": []}}\n')
    warnings: list[str] = []
    assert len(read_conversations(path, warnings.append)) == 1
    assert warnings[0].startswith(f"skipped: {path}:1: ")


def test_bytes_that_are_no_text_spoil_only_their_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"messages": [{"role": "user", "content": "\xff"}]}\n{"messages": []}\n')
    warnings: list[str] = []
    assert read_conversations(path, warnings.append) == [Conversation([], [])]
    assert warnings[0].startswith(f"skipped: {path}:1: not UTF-8")


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd_compress)])
def test_compressed_files_are_read(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"c.jsonl.{suffix}"
    path.write_bytes(pack(b'{"messages": []}\n'))
    assert read_conversations(path, warn=pytest.fail) == [Conversation([], [])]
    path.write_bytes(pack(b'{"messages": []}\n')[:-5])
    with pytest.raises(DataError, match="can be read up to line"):
        read_conversations(path, warn=pytest.fail)


def test_many_bad_lines_are_ten_warnings_and_their_number(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"messages": []}\n' + b"{broken\n" * 5_000 + b"[" * 100_000)
    warnings: list[str] = []
    assert len(read_conversations(path, warnings.append)) == 1
    assert len(warnings) == 11
    assert warnings[-1] == f"{path}: 5,001 lines skipped in all"


def test_no_depth_of_nesting_is_a_traceback(tmp_path: Path) -> None:
    def line(depth: int) -> str:
        call = {"function": {"name": "f", "arguments": {"x": 0}}}
        text = json.dumps(
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]}
        )
        return text.replace('"x": 0', '"x": ' + "[" * depth + "]" * depth)

    path = tmp_path / "c.jsonl"
    path.write_text("".join(line(depth) + "\n" for depth in range(600, 1200)))
    found = read_conversations(path, lambda text: None)
    assert 0 < len(found) < 600


def test_a_file_without_any_conversation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("{}\n[]\n")
    with pytest.raises(DataError, match=r"holds no conversation \(bad lines: 2\).*'messages'"):
        read_conversations(path, lambda text: None)


def test_conversations_of_which_nothing_is_learned_or_that_are_too_long_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = Tokenizer.load(SHIPPED)
    unanswered = Conversation([{"role": "user", "content": "hi"}], [])
    long = Conversation([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ha" * 500}], [])
    rows = packed_rows([GOOD, unanswered, long], tokenizer, 256, Console())
    assert len(rows) == 1
    assert rows[0].segments.max() == 0
    assert rows[0].targets.any()
    printed = capsys.readouterr().out
    assert "1 of 3 conversations have no assistant turn behind their last query: left out" in printed
    assert "1 of 2 conversations are longer than context=256: left out" in printed
    assert packed_rows([unanswered], tokenizer, 256, Console()) == []


def test_the_released_data_are_read_as_they_are(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    shared = {"name": "", "meta": {}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "first", "loss_mask": 1, "tools": [tool], **shared},
        {"role": "assistant", "content": "earlier", "loss_mask": 1, **shared},
        {"role": "user", "content": [{"type": "text", "value": "second"}], "loss_mask": 1, **shared},
        {"role": "assistant", "content": "wrong", "loss_mask": 0, "reasoning_content": "hm", **shared},
        {"role": "tool", "content": "no", "loss_mask": 1, **shared},
        {"role": "assistant", "content": "right", "loss_mask": 1, "reasoning_content": "ah", **shared},
    ]
    path = tmp_path / "chunk_0.json"
    path.write_text(json.dumps([{"conversations": turns}, {"images": []}, 7], indent=1))
    warnings: list[str] = []
    [found] = read_conversations(path, warnings.append)
    assert found == Conversation(turns, [tool])  # type: ignore[arg-type]
    assert warnings == [
        f"skipped: {path}:2: no list of messages under 'messages' or 'conversations': {{\"images\": []}}",
        f"skipped: {path}:3: no list of messages under 'messages' or 'conversations': 7",
    ]
    learned = [text for text, generated in chat.segments(found.messages, found.tools) if generated]
    assert learned == ["ah\n</think>\nright<|im_end|>"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": []}', "is one JSON dict; give a list"),
        ("[1]\n[2]\n", "need the suffix .jsonl"),
        ("[" * 99_999, "JSON"),
    ],
)
def test_a_json_file_that_is_no_list_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_conversations(path, warn=pytest.fail)


def test_a_compressed_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json.gz"
    path.write_bytes(gzip.compress(b'[{"messages": []}]'))
    assert read_conversations(path, warn=pytest.fail) == [Conversation([], [])]
