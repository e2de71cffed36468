from __future__ import annotations

import json
from pathlib import Path

import pytest

from step35.errors import DataError
from step35.post.sft import Conversation, read_conversations, write_conversations

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
        ("not json", "JSONDecodeError"),
        ('{"prompt": "hi"}', "messages"),
        ("[1, 2]", "TypeError"),
        ("7", "TypeError"),
        ('{"messages": [', "JSONDecodeError"),
        ('{"messages": [{"role": "developer", "content": "hi"}]}', "DataError"),
        ('{"messages": [{"role": "user", "content": 5}]}', "DataError"),
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
    assert "line 2: skipped" in warning
    assert str(path) in warning
    assert why in warning
    assert bad[:10] in warning


@pytest.mark.parametrize("bad", ['{"messages": 5}', '{"messages": "hi"}', '{"messages": ["hi"]}'])
def test_messages_that_are_no_list_of_messages_are_bad_too(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f'{bad}\n{{"messages": []}}\n')
    warnings: list[str] = []
    assert len(read_conversations(path, warnings.append)) == 1
    assert "line 1: skipped" in warnings[0]


def test_bytes_that_are_no_text_spoil_only_their_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xff\xfe\n{"messages": []}\n')
    warnings: list[str] = []
    assert len(read_conversations(path, warnings.append)) == 1
    assert "line 1" in warnings[0]


def test_a_file_without_any_conversation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("{}\n[]\n")
    with pytest.raises(DataError, match=r"holds no conversation \(2 bad lines\).*'messages'"):
        read_conversations(path, lambda text: None)
