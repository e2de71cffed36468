"""Keys, limits, disconnects, draining and errors."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from step35.errors import ConfigError
from step35.serve.server import KEEP_ALIVE_S, listen

CHAT = {"messages": [{"role": "user", "content": "secret words"}]}


def post(server: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    """Return what the server answers."""
    return httpx.post(server.url + path, timeout=10, **({"json": CHAT} | options))


def test_the_key_is_asked_for_except_on_health(serve: Any) -> None:
    server = serve(api_key="right")
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client("wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert server.client("right").models.list().data[0].id == "tiny"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 0}
    assert httpx.get(f"{server.url}/metrics").status_code == 401


def test_long_bodies_are_refused_announced_or_not(serve: Any) -> None:
    server = serve(max_body_bytes=100)
    headers = {"Content-Type": "application/json"}
    assert post(server, json={"messages": [{"role": "user", "content": "x" * 200}]}).status_code == 413
    chunks = iter([b'{"messages": [{"role": "user", "content": "', b"x" * 200, b'"}]}'])
    answer = post(server, json=None, content=chunks, headers=headers)
    assert answer.status_code == 413
    assert "100 bytes" in answer.json()["error"]["message"]


def test_a_body_that_never_ends_is_refused(serve: Any) -> None:
    server = serve(request_timeout_s=0.2)
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=5) as client:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n"
        )
        client.sendall(head.encode() + b'\r\n{"messages": [')
        answer = client.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 408")
    assert post(server).status_code == 200


def test_more_generations_than_allowed_get_a_429(serve: Any) -> None:
    server = serve(stay=True, max_concurrent=1)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}, timeout=10):
        assert server.sampler.started.wait(2)
        refused = post(server)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
    assert post(server, json=CHAT | {"n": 2}).status_code == 400


def soon(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, for two seconds at most."""
    end = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_ends_the_generation(serve: Any, stream: bool) -> None:
    server = serve(stay=True)
    with httpx.Client() as client:
        try:
            with client.stream(
                "POST", f"{server.url}/v1/chat/completions", json=CHAT | {"stream": stream}, timeout=0.1
            ) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
        except httpx.ReadTimeout:
            assert not stream
    assert server.sampler.closed.wait(2)
    soon(lambda: server.app.state.service.gate.active == 0)


def test_a_request_that_takes_too_long_ends(serve: Any) -> None:
    server = serve(stay=True, request_timeout_s=0.05)
    assert post(server).status_code == 504
    assert server.sampler.closed.wait(1)
    last = post(server, json=CHAT | {"stream": True}).text.strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_draining_refuses_new_work_and_waits_for_the_old(serve: Any) -> None:
    server = serve(stay=True)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}, timeout=10):
        assert server.sampler.started.wait(2)
        server.server.handle_exit(signal.SIGTERM, None)
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        assert post(server).status_code == 503
        assert server.thread.is_alive()
    server.thread.join(2)
    assert not server.thread.is_alive()


def test_idle_and_half_sent_requests_do_not_hold_the_drain(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    address = server.listener.getsockname()
    with httpx.Client() as idle, socket.create_connection(address) as silent, socket.create_connection(address) as slow:
        assert idle.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 200
        slow.sendall(half)
        soon(lambda: len(server.server.server_state.connections) == 3 and bool(server.server.server_state.tasks))
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(5)
        assert not server.thread.is_alive()
        assert silent.recv(1) == b""
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_small_answers_are_sent_at_once(host: str) -> None:
    """Nagle's algorithm is off on every connection: it would keep the end of an answer back for 40 ms."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            writer.close()
            return await found

    try:
        listener = listen(host, 0)
    except OSError:
        pytest.skip(f"no {host} here")
    assert asyncio.run(accepted())


def test_idle_connections_outlive_the_clients_own_patience() -> None:
    """Where both close after the same 5 seconds, a request now and then meets a closed connection."""
    patience = httpx.Limits().keepalive_expiry
    assert patience is not None
    assert patience * 2 < KEEP_ALIVE_S


def test_the_drain_ends_at_its_time_limit(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(stay=True, drain_timeout_s=0.1)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}, timeout=10):
        assert server.sampler.started.wait(2)
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(5)
        assert not server.thread.is_alive()
    assert server.sampler.closed.is_set()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "messages"),
        ({"functions": [{"name": "f"}]}, "functions is not served; give tools"),
        ({"temperature": -1}, "temperature"),
        ({"messages": [{"role": "narrator", "content": ""}]}, "messages.0.role='narrator'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text only"),
        ({"messages": [{"role": {}, "content": ""}]}, "messages.0.role={}"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": []}]}]}, "without text"),
        ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "reasoning_content": 1}]}, "reasoning_content must be a string"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools.0"),
        ({"reasoning_effort": "huge"}, "low, medium, high"),
        ({"tool_choice": "required"}, "give tools"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ({"top_logprobs": 99}, "top_logprobs"),
    ],
)
def test_mistakes_are_named(serve: Any, fields: dict[str, Any], said: str) -> None:
    answer = post(serve(), json=CHAT | fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_what_the_sampler_refuses_is_a_400_also_when_streaming(serve: Any) -> None:
    server = serve(error=ConfigError("the prompt is too long; shorten it."))
    for stream in (False, True):
        answer = post(server, json=CHAT | {"stream": stream})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the prompt is too long; shorten it.")


def test_a_bug_is_a_bare_500(serve: Any) -> None:
    answer = post(serve(error=RuntimeError("a secret path")))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text


def test_other_failures(serve: Any) -> None:
    server = serve(max_context=5)
    too_long = post(server)
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert post(server, json=CHAT | {"model": "other"}).json()["error"]["code"] == "model_not_found"
    assert post(server, "/v1/nothing").json()["error"]["type"] == "not_found_error"
    not_json = post(server, json=None, content=b"{", headers={"Content-Type": "application/json"})
    assert not_json.json()["error"]["code"] == "invalid_json"


def test_metrics_count_requests_tokens_and_show_the_sampler(serve: Any) -> None:
    server = serve()
    post(server)
    counted = 'step35_requests_total{route="/v1/chat/completions",status="200"} 1.0'
    soon(lambda: counted in httpx.get(f"{server.url}/metrics").text)  # counted once the client has its answer
    text = httpx.get(f"{server.url}/metrics").text
    assert "step35_engine_cache_tokens 7.0" in text
    assert "step35_time_to_first_token_seconds_count 1.0" in text
    assert 'step35_tokens_total{kind="generated"}' in text


def test_the_access_log_is_json_without_the_prompt(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "step35.serve.access"):
        answer = post(serve())
        soon(lambda: any(record.name == "step35.serve.access" for record in caplog.records))
    [line] = [record.getMessage() for record in caplog.records if record.name == "step35.serve.access"]
    entry = json.loads(line)
    assert (entry["path"], entry["status"], entry["method"]) == ("/v1/chat/completions", 200, "POST")
    assert entry["id"] == answer.headers["x-request-id"]
    assert "secret" not in line
