"""`step35 serve` as a process: it says where it listens, shows the model's context, and ends on SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

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
