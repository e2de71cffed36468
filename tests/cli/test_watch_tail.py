"""Reading a log as it grows: whole lines only, each once, whatever the writer does to the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from step35.cli.watch_tail import Tail, line_at
from step35.runtime.metrics import MetricsLog


def texts(tail: Tail, **limit: int) -> list[str]:
    return [line.decode() for _, line in tail.read(**limit).lines]


def test_each_line_comes_once_and_only_when_it_is_whole(tmp_path):
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.read() == (False, [], 0)  # not there yet
    path.write_text("one\ntw")
    assert tail.read() == (False, [(0, b"one")], 2)
    assert texts(tail) == []
    with open(path, "a") as file:
        file.write("o\nthree\n")
    assert tail.read() == (False, [(4, b"two"), (8, b"three")], 0)
    assert texts(tail) == []
    assert line_at(path, 4) == b"two\n"


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    """A page that is open for days must not read the file again and again."""
    path = tmp_path / "log"
    path.write_text(("x" * 999 + "\n") * 2000)
    tail = Tail(path)
    tail.read()
    total = 0

    class Counting:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size):
            nonlocal total
            content = self.file.read(size)
            total += len(content)
            return content

    read = tail._read
    monkeypatch.setattr(tail, "_read", lambda file, limit: read(Counting(file), limit))
    with open(path, "a") as file:
        file.write("new\n")
    assert texts(tail) == ["new"]
    assert total < 200


def test_a_long_log_comes_in_parts_and_a_long_line_whole(tmp_path):
    path = tmp_path / "log"
    path.write_text("aa\nbb\n" + "c" * 100 + "\ndd\n")
    tail = Tail(path)
    first = tail.read(limit=4)
    assert ([line for _, line in first.lines], first.behind_bytes) == ([b"aa", b"bb"], 104)
    assert texts(tail, limit=4) == ["c" * 100]
    assert texts(tail, limit=4) == ["dd"]


def test_a_resume_that_drops_steps_is_noticed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.log(step, loss=1.0)
    tail = Tail(log.path)
    assert len(tail.read().lines) == 5
    log.truncate_after(3)
    for step in range(4, 9):
        log.log(step, loss=2.0)  # longer than before: size alone would not show it
    found = tail.read()
    assert found.restarted
    assert [json.loads(line)["step"] for _, line in found.lines] == list(range(1, 9))


def test_another_file_that_ends_alike_is_noticed(tmp_path):
    path, other, ending = tmp_path / "log", tmp_path / "other", "same\n" * 100
    path.write_text("one\n" + ending)
    tail = Tail(path)
    tail.read()
    other.write_text("two\n" + ending)
    other.replace(path)
    found = tail.read()
    assert (found.restarted, found.lines[0]) == (True, (0, b"two"))


def test_other_content_under_the_same_inode_and_a_deleted_file_are_noticed(tmp_path):
    path = tmp_path / "log"
    path.write_text("one\ntwo\n")
    tail = Tail(path)
    tail.read()
    with open(path, "r+") as file:  # in place
        file.truncate(0)
        file.write("uno\ndos\ntres\n")
    assert tail.read() == (True, [(0, b"uno"), (4, b"dos"), (8, b"tres")], 0)
    os.truncate(path, 4)
    assert tail.read() == (True, [(0, b"uno")], 0)
    path.unlink()
    assert tail.read() == (True, [], 0)
    assert tail.read() == (False, [], 0)


@given(
    lines=st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=20),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    limit=st.integers(1, 50),
)
def test_any_way_of_writing_gives_the_same_lines(tmp_path_factory, lines, cuts, limit):
    path: Path = tmp_path_factory.mktemp("tail") / "log"
    content = b"".join(line + b"\n" for line in lines)
    tail, found = Tail(path), []
    for size in [*sorted(cuts), len(content)]:
        path.open("ab").write(content[path.stat().st_size if path.exists() else 0 : size])
        found += [line for _, line in tail.read(limit).lines]
    while more := tail.read(limit).lines:
        found += [line for _, line in more]
    assert found == lines
