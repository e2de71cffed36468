"""The chat page as it is served, and the usage that it shows."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from typing import Any

import httpx

from step35.api.sampler import Completion, Update
from step35.api.sampling import SamplingParams
from step35.serve.page import PAGE
from step35.serve.reading import Reading, usage
from step35.serve.turn import Generation


def test_the_page_needs_no_key_but_its_requests_do(serve: Any) -> None:
    server = serve(api_key="right")
    page = httpx.get(server.url)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == PAGE.read_text(encoding="utf-8")
    assert httpx.get(f"{server.url}/v1/models").status_code == 401


def test_the_policy_allows_the_pages_own_script_and_style_and_this_server(serve: Any) -> None:
    page = httpx.get(serve().url)
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (source,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = b64encode(sha256(source.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_the_page_loads_nothing_and_writes_no_html() -> None:
    html = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.\w|\bimport\b|@import|url\(", html)
    assert not re.search(r"<[^>]*\s(?:src|style|on\w+)=", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", html)


def test_usage_tells_accepted_and_rejected_drafts(tokenizer: Any) -> None:
    reading = Reading(Generation(prompt=(1,), params=SamplingParams(), chat=True), tokenizer)
    done = Completion((5, 6), (-0.5, -0.5), "stop", drafted=(4, 3), accepted=(3, 1))
    reading.take(Update((5, 6), (-0.5,) * 2, (-0.5,) * 2, (), "", "stop", done))
    details = usage([reading, reading])["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (8, 6)
