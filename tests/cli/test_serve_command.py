"""`step35 serve` as a process: it says where it listens, shows the model's context, and ends on SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from step35.cli import main as cli
from step35.cli import serve
from step35.engine import async_llm

COMMAND = [sys.executable, "-m", "step35.cli.main", "serve", "--port", "0", "--max-concurrent", "2"]


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the server; give its process and its address."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables, text=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().split()[-1].removesuffix("/v1")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(("arguments", "expected"), [((), 4096), (("--max-context", "300"), 300)])
def test_the_models_context_is_shown_and_sigterm_ends(arguments: tuple[str, ...], expected: int) -> None:
    with running(*arguments) as (process, url), httpx.Client() as client:
        [card] = client.get(f"{url}/v1/models", timeout=30).json()["data"]
        assert (card["id"], card["max_model_len"]) == ("tiny", expected)
        assert client.post(f"{url}/tokenize", json={"text": "a"}).json()["max_model_len"] == expected
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - started < 15  # the connection is still open


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ("none", True, None)),
        (("--quantization", "int8", "--no-adaptive-depth", "--draft-vocabulary", "9"), ("int8", False, 9)),
    ],
)
def test_settings_reach_the_engine(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], expected: Any) -> None:
    given: dict[str, Any] = {}

    def load(path: Any, **options: Any) -> Any:
        given.update(options)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(async_llm, "AsyncLLM", load)
    monkeypatch.setattr(serve, "serve", lambda args, llm: 0)
    assert cli.main(["serve", *flags]) == 0
    assert (given["quantization"], given["adaptive_depth"], given["draft_vocabulary"]) == expected


@pytest.mark.parametrize(("flags", "expected"), [((), "from outside"), (("--api-key", "given"), "given")])
def test_the_key_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], expected: str
) -> None:
    keys = list[str]()
    monkeypatch.setenv("STEP35_API_KEY", "from outside")
    monkeypatch.setattr(serve, "serve_here", lambda args: keys.append(serve.settings(args).api_key) or 0)
    assert cli.main(["serve", *flags]) == 0
    assert keys == [expected]


def test_our_quantization_is_not_vllms(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--backend", "vllm", "--quantization", "int8"]) == 2
    assert "--vllm.args" in capsys.readouterr().err


def test_the_chat_page_is_named() -> None:
    assert "\nchat page: http://127.0.0.1:8123/\n" in serve.welcome(serve.Args(), "tiny", 8123)
