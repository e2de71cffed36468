"""Checkpoints on the hub: downloaded from one that runs here, and read from the cache once it is gone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from step35.cli.shipped import SHIPPED
from step35.errors import HubError
from step35.runtime.hub import fetched

COMMIT = "a" * 40
Run = Callable[..., subprocess.CompletedProcess[str]]


class Hub(BaseHTTPRequestHandler):
    """The little of the hub's interface that a download needs, for one repository with the package's model."""

    asked: list[str]

    def do_GET(self) -> None:
        files = {path.name: path for path in SHIPPED.iterdir() if path.is_file()}
        headers, body = {}, b""
        if "/resolve/" in self.path:
            body = files[self.path.rpartition("/")[2]].read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.asked.append(self.path.rpartition("/")[2])
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": n} for n, p in files.items()]
            body = json.dumps(tree).encode()
        elif self.path.startswith("/api/models/org/tiny"):
            body = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}).encode()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
        if body:
            self.send_response(200)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def step35(hub: ThreadingHTTPServer, tmp_path: Path) -> Run:
    """The command line, in front of that hub and with a cache of its own."""

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache"), **more}
        command = [sys.executable, "-m", "step35.cli.main", *arguments]
        return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)

    return run


def test_a_checkpoint_is_downloaded_once(hub: ThreadingHTTPServer, step35: Run) -> None:
    shown = step35("inspect", "hf://org/tiny", "--json")
    assert json.loads(shown.stdout)["trunk"] > 1e6, shown.stderr
    assert set(Hub.asked) == {"config.json"}
    greedy = ("--prompt", "def add(a, b):", "--max-tokens", "5", "--temperature", "0")
    expected = step35("generate", str(SHIPPED), *greedy).stdout.partition("\n[")[0]
    found = step35("generate", "hf://org/tiny@main", *greedy)
    assert found.stdout.partition("\n[")[0] == expected, found.stderr
    assert {"tokenizer.json", "model-00001-of-00001.safetensors"} <= set(Hub.asked)
    asked = len(Hub.asked)
    offline = step35("generate", "hf://org/tiny", *greedy, HF_HUB_OFFLINE="1")
    assert offline.stdout.partition("\n[")[0] == expected, offline.stderr
    assert len(Hub.asked) == asked


def test_what_the_hub_does_not_have_is_named(step35: Run) -> None:
    for address, reason in (
        ("hf://org/none", r"hf://org/none cannot be fetched (404"),
        ("hf://org/tiny/model.gguf", "the repository org/tiny has no 'model.gguf'"),
    ):
        done = step35("generate", address)
        assert done.returncode == 2
        assert reason in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["hf://", "hf://org", "hf:org", "hf://org/na@me@me/x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    for path in (address, Path(address)):
        with pytest.raises(HubError, match="is no address; give hf://ORG/NAME"):
            fetched(path)


def test_any_other_path_stays_what_it_is() -> None:
    assert fetched("runs/demo") == Path("runs/demo")
    assert fetched(Path("/a/hf:b")) == Path("/a/hf:b")
