"""Supervised fine-tuning: conversations, packed without crossing borders, loss on assistant tokens only (section 6)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from step35.api.messages import Message, ToolSchema
from step35.config.train import TrainConfig
from step35.data import chat
from step35.data.lines import BadLines, kind_of, read_list, read_records
from step35.data.loader import PackedLoader
from step35.data.packing import Row, Sample, pack_conversations
from step35.data.tokenizer import Tokenizer
from step35.errors import DataError
from step35.model.step35 import Step35
from step35.runtime.console import Console
from step35.runtime.disk import write_text
from step35.runtime.rundir import RunDir
from step35.train.trainer import train


@dataclass(frozen=True)
class Conversation:
    """One training sample."""

    messages: list[Message]
    tools: list[ToolSchema]


def write_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """Write JSON lines {"messages": [...], "tools": [...]}, whole or not at all."""
    lines = [json.dumps({"messages": c.messages, "tools": c.tools}, ensure_ascii=False) for c in conversations]
    write_text(path, "".join(line + "\n" for line in lines))


def read_conversations(path: Path, warn: Callable[[str], None]) -> list[Conversation]:
    """Read conversations: JSON lines, or a .json file with a list of them, as the released SFT data are stored.

    Either may be .gz or .zst. Bad lines are skipped, counted, and the first ten named. Raises `DataError` when the file
    is not there, is damaged, or holds no conversation.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there; give a file of JSON lines with a 'messages' list each.")
    found, bad = [], BadLines()
    read = read_list if kind_of(path) == ".json" else read_records
    for number, record, line in read(path, bad):
        try:
            found.append(_conversation(record))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DataError) as error:
            name = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            bad.add(path, number, f"{name}{error}", line or json.dumps(record))
    for quote in bad.quotes:
        warn(f"skipped: {quote}")
    if bad.count > len(bad.quotes):
        warn(f"{path}: {bad.count:,} lines skipped in all")
    if not found:
        raise DataError(f"{path} holds no conversation (bad lines: {bad.count}); each line needs a 'messages' list.")
    return found


def _conversation(record: Any) -> Conversation:
    """Return the conversation of a record; raises what comes of a record that is none, or cannot be rendered."""
    record = record if isinstance(record, dict) else {}
    messages = record.get("messages", record.get("conversations"))
    if not isinstance(messages, list):
        raise DataError("no list of messages under 'messages' or 'conversations'")
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    tools = record.get("tools") or first.get("tools") or first.get("tool_schemas") or []
    conversation = Conversation(messages, tools)
    chat.segments(conversation.messages, conversation.tools)
    return conversation


def fine_tune(
    model: Step35,
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    config: TrainConfig,
    run: RunDir,
    console: Console,
    *,
    name: str = "sft",
) -> Step35:
    """Train `model` in place on `conversations`."""
    loader = PackedLoader(packed_rows(conversations, tokenizer, config.context, console), config.seed)
    train(model, loader, config, run, console, name=name)
    return model


def packed_rows(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, context: int, console: Console
) -> list[Row]:
    """Pack conversations into rows of `context` tokens.

    Those without an assistant's turn behind the last query, of which nothing is learned, and those that are longer
    are left out and counted.
    """
    samples: list[Sample] = []
    with console.stage("sft: encode", len(conversations), "conversation") as shown:
        for conversation in conversations:
            ids, targets = chat.encode(tokenizer, conversation.messages, conversation.tools)
            if any(targets):
                samples.append((np.array(ids, dtype=np.int32), np.array(targets)))  # a tenth of the lists' memory
            shown.advance()
    count = len(conversations)
    if len(samples) < count:
        why = "have no assistant turn behind their last query"
        console.warn(f"{count - len(samples)} of {count} conversations {why}: left out")
    rows, left_out = pack_conversations(samples, context, tokenizer.pad_id)
    if left_out:
        console.warn(f"{left_out} of {len(samples)} conversations are longer than context={context}: left out")
    return rows
