"""The chat page in headless Chromium, in front of a sampler that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from browser import CHROMIUM, MISSING, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

ENTER = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
CALL = "<tool_call>\n<function=calculator>\n<parameter=expression>\n6 * 7\n</parameter>\n</function>\n</tool_call>"
IDLE = "document.querySelector('.turn') && !document.querySelector('.busy') && !document.querySelector('#send').hidden"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def look(browser: Browser) -> Iterator[Callable[[Any], Browser]]:
    """Return a function that opens the page of a server; at the end, the page must have had no error."""

    def look(server: Any) -> Browser:
        browser.errors.clear()
        browser.call("Page.navigate", url=server.url)
        browser.wait("document.getElementById('model')?.textContent")
        return browser

    yield look
    assert browser.errors == []
    browser.call("Page.navigate", url="about:blank")


def enter(page: Browser, selector: str, text: str, *, modifiers: int = 0) -> None:
    """Type a text into a field and press Enter."""
    page.change(selector, text)
    page.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, modifiers=modifiers, **ENTER)


def text(page: Browser, selector: str) -> str:
    """Return what the last element of a kind shows."""
    found = page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText ?? ''")
    return str(found).replace("\u00a0", " ")


def count(page: Browser, selector: str) -> int:
    """Return how many elements there are of a kind."""
    return int(page.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length"))


def slow_with_drafts(sampler: Any) -> None:
    """Let the sampler take its time and say that 3 of 4 drafts were accepted."""
    plain = sampler.stream

    async def stream(*arguments: Any) -> AsyncIterator[Any]:
        async for update in plain(*arguments):
            whole = update.completion and replace(update.completion, drafted=(3, 1), accepted=(2, 1))
            yield replace(update, completion=whole)
            await asyncio.sleep(0.01)

    sampler.stream = stream


def test_an_answer_streams_in_with_its_reasoning_folded(look: Any, serve: Any, tokenizer: Any) -> None:
    server = serve("Let me see.\n</think>\nThe answer is **42**:\n```python\n6 * 7\n```")
    slow_with_drafts(server.sampler)
    page = look(server)
    assert page.text("#model") == "tiny"
    enter(page, "#question", "What is 6 * 7?")
    page.wait(IDLE)
    assert text(page, ".user") == "What is 6 * 7?"
    assert text(page, ".content p") == "The answer is 42:"
    assert (text(page, ".content b"), text(page, ".content pre")) == ("42", "6 * 7")
    thought = len(tokenizer.encode("Let me see.\n</think>"))
    assert text(page, ".reasoning") == f"Thought for {thought} tokens"
    page.evaluate("document.querySelector('.reasoning summary').click()")
    assert text(page, ".reasoning p") == "Let me see."
    for part in ("tokens · ", " tokens/s · ", "first token after ", "MTP acceptance 75% (3 of 4)"):
        assert part in text(page, ".stats")

    enter(page, "#question", "one", modifiers=8)  # Shift+Enter is a new line
    assert page.evaluate("document.getElementById('question').value") == "one\n"
    enter(page, "#question", "And 6 * 8?")
    page.wait("document.querySelectorAll('.turn').length === 2")
    page.wait(IDLE)
    assert "user\nWhat is 6 * 7?" in server.sampler.prompts[1]
    assert "The answer is **42**" in server.sampler.prompts[1]


def test_a_tool_call_is_shown_and_its_result_goes_back(look: Any, serve: Any) -> None:
    server = serve(f"Compute.\n</think>\n{CALL}{CALL}", "So.\n</think>\nIt is 42.")
    page = look(server)
    page.evaluate("document.getElementById('open-settings').click()")
    page.evaluate("document.getElementById('example').click()")
    enter(page, "#question", "What is 6 * 7?")
    page.wait("document.querySelectorAll('.call textarea').length === 2")
    assert text(page, ".call h2") == "calls calculator"
    assert text(page, ".call pre") == "expression: 6 * 7"
    assert '"name": "calculator"' in server.sampler.prompts[0]
    page.change(".call textarea", "forty-two")
    enter(page, ".call:last-of-type textarea", "42")
    page.wait("document.querySelectorAll('.turn').length === 2")
    page.wait(IDLE)
    assert text(page, ".content") == "It is 42."
    assert text(page, ".call .result") == "42"
    assert count(page, ".call textarea") == 0
    assert "<tool_response>forty-two</tool_response>" in server.sampler.prompts[1].replace("\n", "")
    assert server.sampler.prompts[1].count("<function=calculator>") == 2


def test_settings_go_with_the_request(look: Any, serve: Any) -> None:
    server = serve("Hello")
    page = look(server)
    fields = {"system": "Be brief.", "temperature": "0.25", "top_p": "0.5", "max_tokens": "77", "thinking": "off"}
    for name, value in fields.items():
        page.change(f"#{name}", value)
    enter(page, "#question", "Hi")
    page.wait(IDLE)
    params = server.sampler.params[0]
    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.5, 77)
    assert not params.in_thinking
    assert "<|im_start|>system\nBe brief." in server.sampler.prompts[0]
    assert page.evaluate("getComputedStyle(document.querySelector('.reasoning')).display") == "none"
    page.change("#thinking", "budget")
    page.change("#budget", "9")
    page.call("Page.reload")  # the settings stay, the conversation does not
    page.wait("document.getElementById('model')?.textContent === 'tiny'")
    assert count(page, ".user") == 0
    enter(page, "#question", "Hi")
    page.wait(IDLE)
    assert server.sampler.params[1].thinking_budget == 9


def test_stop_ends_the_generation_and_keeps_what_was_said(look: Any, serve: Any) -> None:
    server = serve("Let me think", stay=True)
    page = look(server)
    enter(page, "#question", "Hi")
    page.wait("document.querySelector('.reasoning summary')?.innerText.startsWith('Thinking…')")
    assert text(page, ".reasoning") != "Thinking… 0 tokens"
    page.wait("document.querySelector('.reasoning p').textContent === 'Let me think'")
    assert not server.sampler.closed.is_set()
    page.evaluate("document.getElementById('stop').click()")
    assert server.sampler.closed.wait(5)
    page.wait(IDLE)
    assert text(page, ".stats").endswith("stopped")
    assert text(page, ".reasoning").startswith("Thought for")
    assert count(page, ".problem") == 0

    server.sampler.closed.clear()
    enter(page, "#question", "Go on")
    page.wait("[...document.querySelectorAll('.reasoning p')].at(1)?.textContent === 'Let me think'")
    page.evaluate("document.getElementById('new').click()")
    assert server.sampler.closed.wait(5)
    page.wait("document.getElementById('stop').hidden")
    assert count(page, ".turn") == 0
    assert "user\nHi" in server.sampler.prompts[1]


def test_a_wrong_key_is_told_and_a_right_one_goes_on(look: Any, serve: Any) -> None:
    server = serve(api_key="right")
    page = look(server)
    assert "wants an API key" in page.text("#model")
    assert page.evaluate("document.activeElement.id") == "key"
    page.change("#key", "wrong")
    enter(page, "#question", "Hi")
    page.wait("!!document.querySelector('.problem')")
    assert text(page, ".problem span") == "The API key is wrong. Correct it in the settings."
    page.change("#key", "right")
    page.wait("document.getElementById('model').textContent === 'tiny'")
    page.evaluate("document.querySelector('.problem button').click()")
    page.wait("document.querySelector('.content')?.innerText === 'Hello'")
    assert count(page, ".turn") == 1
    assert page.evaluate("sessionStorage.getItem('step35.key')") == "right"
    assert all("401" in error for error in page.errors)
    page.errors.clear()


def test_a_busy_server_and_one_that_is_gone_are_told(look: Any, serve: Any) -> None:
    server = serve(max_concurrent=1)
    page = look(server)
    server.app.state.service.gate.active = 1
    enter(page, "#question", "Hi")
    page.wait("!!document.querySelector('.problem')")
    assert text(page, ".problem span") == "The server is busy. Try again in 1 second."
    assert page.evaluate("document.querySelector('.problem button').disabled")
    server.app.state.service.gate.active = 0
    page.wait("!document.querySelector('.problem button').disabled")
    server.stop()
    page.evaluate("document.querySelector('.problem button').click()")
    page.wait("document.querySelector('.problem')?.innerText.includes('does not answer')")
    assert all("429" in error or "ERR_CONNECTION" in error for error in page.errors)
    page.errors.clear()


def test_a_failure_in_the_middle_of_an_answer_is_told(look: Any, serve: Any) -> None:
    server = serve("Let me think", stay=True, request_timeout_s=0.5)
    page = look(server)
    enter(page, "#question", "Hi")
    page.wait("!!document.querySelector('.problem')")
    assert text(page, ".problem span").startswith("The server failed: the answer took longer than 0.5 s")
    assert text(page, ".reasoning").startswith("Thought for")


def test_html_in_the_models_text_stays_text(look: Any, serve: Any) -> None:
    evil = "<img src=x onerror='window.hurt = 1'>"
    call = CALL.replace("6 * 7", evil)
    page = look(serve(f"{evil}\n</think>\n{evil} `{evil}` **{evil}**\n```\n{evil}\n```\n{call}"))
    page.change("#tools", '{"name": "calculator", "parameters": {"type": "object", "properties": {}}}')
    enter(page, "#question", evil)
    page.wait(IDLE)
    page.evaluate("document.querySelector('.reasoning').open = true")
    for place in (".user", ".reasoning p", ".content p", ".content code", ".content b", ".content pre", ".call pre"):
        assert evil in text(page, place)
    assert count(page, "#conversation img") == 0
    assert page.evaluate("window.hurt") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_and_both_colour_schemes(look: Any, serve: Any, scheme: str) -> None:
    page = look(serve(f"So.\n</think>\n{'word ' * 300}{'x' * 400}\n```\n{'y' * 400}\n```"))
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.change("#question", "z" * 400)
    page.evaluate("document.getElementById('send').click()")
    page.wait(IDLE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = "document.getElementById('conversation')"
    assert page.evaluate(f"{box}.scrollWidth <= {box}.clientWidth")
    assert page.evaluate(f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight") < 2  # it followed the answer
    page.evaluate("document.getElementById('open-settings').click()")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    red = page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert red > 200 if scheme == "light" else red < 60
    page.call("Emulation.clearDeviceMetricsOverride")
    page.call("Emulation.setEmulatedMedia", features=[])
