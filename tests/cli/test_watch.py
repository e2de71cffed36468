"""The server of the live page: what it answers, and what it must not."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from step35.cli.watch import ASSETS, NotFound, Server, Site, is_loopback, open_server
from step35.errors import ConfigError
from step35.runtime.rundir import RunDir


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two runs, one of them with stages, and a secret beside them."""
    root = tmp_path / "runs"
    for name, steps in (("demo/train", 5), ("demo/rl", 3), ("alone", 2)):
        run = RunDir(root / name)
        for step in range(1, steps + 1):
            run.metrics.log(step, loss=float(step))
    RunDir(root / "demo").write_env()
    os.utime(root / "demo" / "rl" / "metrics.jsonl", (9, 9))
    RunDir(tmp_path / "secret").metrics.log(1, loss=42.0)
    return root


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    with open_server("127.0.0.1", 0, Site(root, root / "demo")) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


Get = Callable[..., tuple[int, Any, http.client.HTTPMessage]]


@pytest.fixture
def get(server: Server) -> Get:
    def get(path: str, **headers: str) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        kind = response.headers["Content-Type"]
        return response.status, json.loads(body) if body and "json" in kind else body.decode(), response.headers

    return get


def test_runs_and_the_newest_stage(get):
    status, body, _ = get("/api/runs")
    assert status == 200
    assert [run["name"] for run in body["runs"]] == ["alone", "demo", "demo/rl", "demo/train"]
    assert (body["asked"], body["newest"]) == ("demo", "demo/train")


def test_curves_and_facts(get):
    for filter in ("loss", "LOS", ""):
        _, body, _ = get(f"/api/curves?run=demo/train&filter={filter}&first=2&last=3")
        assert body == {"loss": {"first": [2, 3], "mean": [2.0, 3.0], "bad": []}}
    assert get("/api/curves?run=demo/train&filter=nothing")[1] == {}
    _, body, _ = get("/api/facts?run=alone")
    assert (body["step"], body["last"]) == (2, {"loss": 2.0})
    assert get("/api/panels?run=alone")[1] is None


def test_an_answer_that_has_not_changed_is_not_sent_again(get, root):
    _, _, headers = get("/api/facts?run=alone")
    status, body, _ = get("/api/facts?run=alone", **{"If-None-Match": headers["ETag"]})
    assert (status, body) == (304, "")
    RunDir(root / "alone").metrics.log(3, loss=3.0)
    status, body, _ = get("/api/facts?run=alone", **{"If-None-Match": headers["ETag"]})
    assert (status, body["step"]) == (200, 3)


@pytest.mark.parametrize(
    "path",
    [
        "/api/facts?run=../secret", "/api/facts?run=demo/../../secret", "/api/facts?run=%2e%2e%2fsecret", "/api/facts",
        "/api/curves?run=/etc&filter=loss", "/api/panels?run=..", "/../secret/metrics.jsonl", "/..%2f..%2fetc/passwd",
        "/watch/../index.html", "//etc/passwd", "/metrics.jsonl", "/demo/train/metrics.jsonl", "/api/nothing",
    ],
)  # fmt: skip
def test_nothing_but_the_runs_below_the_root_can_be_had(get, path):
    status, body, _ = get(path)
    assert status == 404
    assert "42" not in json.dumps(body)


def test_a_secret_is_out_of_reach_for_lack_of_a_name_and_not_of_a_file(root):
    assert (root / "../secret/metrics.jsonl").is_file()
    with pytest.raises(NotFound, match=r"no run '\.\./secret'"):
        Site(root, root).feed("../secret")


def test_a_symbolic_link_is_not_followed_out_of_the_root(get, root):
    (root / "link").symlink_to(root.parent / "secret")
    assert get("/api/facts?run=link")[0] == 404


def test_bad_numbers_and_other_methods_are_refused(get, server):
    status, body, _ = get("/api/curves?run=alone&first=x")
    assert (status, "'x'" in body["error"]) == (400, True)
    assert get("/", Host="[")[0] == 400
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_address[1]}/", method="POST", data=b"x")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(request, timeout=10)


def test_a_foreign_host_name_is_refused(get):
    """Another page's script, whose name was made to resolve to this machine, must not read along."""
    assert get("/api/runs", Host="evil.example")[0] == 403
    assert get("/api/runs", Host="localhost:1234")[0] == 200
    assert get("/api/runs", Host="[::1]:1234")[0] == 200


def test_the_page_loads_nothing_from_elsewhere(get):
    _, page, headers = get("/")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "<title>step35</title>" in page
    for file in ASSETS.iterdir():
        assert get(f"/{file.name}")[0] == 200
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML" not in text


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127\.0\.0\.1 is taken; choose another --port"):
            open_server("127.0.0.1", port, Site(Path(), Path()))
    with pytest.raises(ConfigError, match=r"cannot serve on 203\.0\.113\.1"):
        open_server("203.0.113.1", 0, Site(Path(), Path()))


def test_what_counts_as_this_machine():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")] == [False] * 5


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_serves_until_ctrl_c(root, host):
    command = [sys.executable, "-m", "step35.cli.main", "runs", "watch", "demo", "--root", str(root), "--no-browser"]
    process = subprocess.Popen([*command, "--host", host], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        lines = [process.stdout.readline()]
        if host == "0.0.0.0":
            assert "there is no password" in lines[0]
            lines.append(process.stdout.readline())
        address = lines[-1].split(" at ")[1].split()[0].replace("0.0.0.0", "127.0.0.1")
        with urllib.request.urlopen(f"{address}api/runs", timeout=30) as response:
            assert json.load(response)["asked"] == "demo"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert "stopped watching" in out


def test_the_command_needs_no_torch():
    check = "import sys, step35.cli.watch; sys.exit('torch is loaded' if 'torch' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
