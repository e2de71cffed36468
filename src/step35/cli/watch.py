"""Serve one local page that shows a run live: curves, expert heat maps, alarms, facts. Reads the run's files only.

The page (`assets/watch/`) polls. Every answer carries an ETag, and one that has not changed is answered with 304 and no
body. Nothing can be written, and a run is found by its name among those below the root, never by a path.
"""

from __future__ import annotations

import errno
import hashlib
import json
import socket
import sys
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import step35
from step35.cli.runs import find_runs
from step35.cli.watch_facts import facts, modified
from step35.cli.watch_feed import Feed
from step35.errors import ConfigError
from step35.runtime.console import Console

ASSETS = Path(step35.__file__).parent / "assets" / "watch"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
POINTS = 400
"""Buckets of a curve when the page does not say."""
MOST_POINTS = 5000
LAST_STEP = 2**32 - 2


class NotFound(Exception):
    """There is nothing of this name."""


class Answer(NamedTuple):
    """The body of a response and its type."""

    body: bytes
    kind: str


class Site:
    """What the server knows: the runs below `root`, of which those at or below `focus` were asked for."""

    def __init__(self, root: Path, focus: Path) -> None:
        self.root, self.focus = root, focus
        self.folders: dict[str, Path] = {}
        self.feeds: dict[str, Feed] = {}
        self.files = {f"/{file.name}": file for file in ASSETS.iterdir() if file.suffix in TYPES}
        self.files["/"] = ASSETS / "index.html"

    def answer(self, path: str, query: dict[str, str]) -> Answer:
        """Return what `path` shows. Raises `NotFound`, and `ValueError` for a bad number in the query."""
        if path in self.files:
            file = self.files[path]
            return Answer(file.read_bytes(), TYPES[file.suffix])
        if path == "/api/runs":
            return _json(self.runs())
        views: dict[str, Callable[[Feed, dict[str, str]], Any]] = {
            "/api/facts": lambda feed, query: facts(feed),
            "/api/curves": curves,
            "/api/panels": lambda feed, query: feed.panels(int(query.get("place", 0))),
        }
        if path not in views:
            raise NotFound(f"there is no {path}")
        feed = self.feed(query.get("run", ""))
        with feed.lock:
            if path != "/api/panels":
                feed.poll()
            return _json(views[path](feed, query))

    def runs(self) -> dict[str, Any]:
        """List the runs below the root; `newest` is the one asked for, or the latest written of those inside it."""
        self.folders = {self._name(folder): folder for folder in find_runs(self.root)}
        found = {name: modified(folder / "metrics.jsonl") for name, folder in self.folders.items()}
        inside = [name for name, folder in self.folders.items() if folder.is_relative_to(self.focus)]
        listed = [{"name": name, "has_metrics": updated > 0} for name, updated in found.items()]
        newest = self._name(self.focus)
        if not found.get(newest) and inside:
            newest = max(inside, key=lambda name: found[name])
        return {"root": str(self.root), "runs": listed, "asked": self._name(self.focus), "newest": newest}

    def feed(self, name: str) -> Feed:
        """Return the feed of a run; raise `NotFound` unless it is one of those below the root."""
        if name not in self.folders:
            self.runs()
        folder = self.folders.get(name)
        if folder is None or not folder.is_dir():
            raise NotFound(f"there is no run '{name}' in {self.root}")
        return self.feeds.setdefault(name, Feed(folder))

    def _name(self, folder: Path) -> str:
        return folder.name if folder == self.root else folder.relative_to(self.root).as_posix()


def curves(feed: Feed, query: dict[str, str]) -> dict[str, Any]:
    """Return the curves whose names contain `filter`, from step `first` to `last`, in at most `points` buckets."""
    points = max(1, min(int(query.get("points", POINTS)), MOST_POINTS))
    first = max(0, min(int(query.get("first", 0)), LAST_STEP))
    last = max(0, min(int(query.get("last", LAST_STEP)), LAST_STEP))
    # A part of the names and not a list of them: a run can have more curves than an address has room for.
    wanted = query.get("filter", "").lower()
    return {key: curve.window(first, last, points) for key, curve in feed.curves.items() if wanted in key.lower()}


def _json(content: Any) -> Answer:
    return Answer(json.dumps(content, allow_nan=False).encode(), "application/json")


class Server(ThreadingHTTPServer):
    """Serves a site; a closed browser tab is no error."""

    daemon_threads = True

    def __init__(self, host: str, port: int, site: Site) -> None:
        self.site, self.loopback = site, is_loopback(host)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Turns requests into answers."""

    protocol_version = "HTTP/1.1"
    timeout = 300
    server: Server

    def do_GET(self) -> None:
        """Answer, with 304 when the browser has it already."""
        try:
            if self.server.loopback and not is_loopback(urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""):
                # A foreign name that resolves to this machine: some other page's script trying to read along.
                return self._send(403, _json({"error": "this server answers to localhost only"}))
            url = urlsplit(self.path)
            return self._send(200, self.server.site.answer(url.path, dict(parse_qsl(url.query))))
        except NotFound as error:
            return self._send(404, _json({"error": str(error)}))
        except ValueError as error:  # an address or a number that is none
            return self._send(400, _json({"error": str(error)}))

    def _send(self, code: int, answer: Answer) -> None:
        tag = f'"{hashlib.blake2b(answer.body, digest_size=12).hexdigest()}"'
        if code == 200 and self.headers.get("If-None-Match") == tag:
            code, answer = 304, Answer(b"", answer.kind)
        self.send_response(code)
        for name, value in {**HEADERS, "ETag": tag, "Content-Type": f"{answer.kind}; charset=utf-8"}.items():
            self.send_header(name, value)
        if code != 304:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: a poll every two seconds is no news."""


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_server(host: str, port: int, site: Site) -> Server:
    """Return a server bound to `host` and `port`, 0 for any free one. Raises `ConfigError`."""
    try:
        return Server(host, port, site)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is taken; choose another --port, or 0 for one that is free."
            ) from None
        raise ConfigError(f"cannot serve on {host}, port {port} ({error.strerror}); see --host and --port.") from None


def watch(run: Path, root: Path, *, host: str, port: int, browser: bool, console: Console) -> int:
    """Serve the page for `run` until Ctrl-C; return 0. Other runs below `root` can be compared."""
    run, root = run.resolve(), root.resolve()
    site = Site(root if run.is_relative_to(root) else run, run)
    with open_server(host, port, site) as server:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{server.server_address[1]}/"
        if not server.loopback:
            console.warn(f"whoever reaches {host} can read the runs in {site.root}: there is no password.")
        console.print(f"watching {run} at {address} (Ctrl-C ends)")
        if browser:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("stopped watching; the run goes on")
    return 0
