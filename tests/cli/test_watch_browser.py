"""The live page in headless Chromium: a finished run, one that is being written, and how the page can be used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest

from browser import CHROMIUM, MISSING, Browser
from step35.cli.watch import Site, open_server
from step35.runtime.rundir import RunDir

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def look(browser: Browser) -> Iterator[Callable[[Path], Browser]]:
    """Return a function that serves a run and opens the page on it; at the end, the page must have had no error."""
    servers = []

    def look(run: Path) -> Browser:
        server = open_server("127.0.0.1", 0, Site(run.parent, run))
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        browser.errors.clear()
        browser.call("Page.navigate", url=f"http://127.0.0.1:{server.server_address[1]}/")
        browser.wait("document.getElementById('status')?.textContent")
        return browser

    yield look
    assert browser.errors == []
    browser.call("Page.navigate", url="about:blank")
    for server in servers:
        server.shutdown()
        server.server_close()


def write(run: RunDir, first: int, last: int) -> None:
    """Log steps with a panel every second one; expert 3 of the second layer grows."""
    for step in range(first, last + 1):
        panel = {
            "expert_rms": [[1.0] * 8, [1, 1, 1, step, 1, 1, 1, 0.5]],
            "group_load": [[0.5, 0.5], [0.25, 0.75]],
            "moe_layers": [3, 4],
        }
        extra = panel if step % 2 == 0 else {}
        run.metrics.log(
            step, loss=8.0 / step, mtp_loss=[2.0, 3.0], tokens_per_s=1234.5, tokens=2_415_919_000 + step, **extra
        )


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run = RunDir(tmp_path / "runs" / "done")
    run.write_config({"steps": 40, "note": "<script>throw 1</script>"})
    run.write_env()
    run.events.event("started")
    write(run, 1, 40)
    (run.checkpoints / "step_40").mkdir(parents=True)
    run.write_json("done.json", {"seconds": 3})
    return run.path


def test_a_finished_run(look, finished):
    page = look(finished)
    page.wait("document.querySelectorAll('#charts figure').length === 6")
    assert page.text("#status").startswith("finished")
    assert page.text("[data-fact=step] b") == "40 of 40"
    assert page.text("[data-fact=loss] b") == "0.2"
    assert page.text("[data-fact=tokens] b") == "2,415,919,040"
    assert page.text("[data-fact=checkpoints] b") == "40"
    assert page.text("#alarms") == "none"
    families = page.evaluate("[...document.querySelectorAll('#charts figure')].map((f) => f.dataset.family)")
    assert families == ["loss", "mtp_loss", "tokens_per_s", "expert_rms", "group_load", "tokens"]
    assert page.evaluate("document.querySelectorAll('[data-family=mtp_loss] .line').length") == 2
    assert "0.2 at 40" in page.text("[data-family=loss] figcaption")
    assert "<script>throw 1</script>" in page.evaluate("document.getElementById('settings').textContent")


def test_a_run_that_is_being_written(look, tmp_path):
    run = RunDir(tmp_path / "runs" / "live")
    run.write_config({"steps": 1000})
    write(run, 1, 3)
    page = look(run.path)
    page.wait("document.querySelector('[data-fact=step] b')?.textContent === '3 of 1,000'")
    assert page.text("#status") == "running"

    write(run, 4, 12)
    run.events.event(
        "alarm", alarm="expert_blow_up", step=10, value=10.0, limit=4.0, where="layer 4, expert 3", cause="a bi-gram",
        remedy="clip activations", action="rollback",
    )  # fmt: skip
    page.wait("document.querySelector('[data-fact=step] b').textContent === '12 of 1,000'")
    page.wait("document.getElementById('alarms').innerText.includes('layer 4, expert 3')")
    page.wait("document.querySelector('[data-family=loss] figcaption').innerText.includes('at 12')")
    page.wait("document.getElementById('place-step').textContent === '12'")
    assert page.evaluate("document.querySelectorAll('[data-family=loss] .alarm').length") == 1

    run.metrics.truncate_after(4)  # as a rollback does
    write(run, 5, 5)
    page.wait("document.querySelector('[data-fact=step] b').textContent === '5 of 1,000'")
    page.wait("document.querySelector('[data-family=loss] figcaption').innerText.includes('at 5')")


def test_curves_can_be_read_zoomed_smoothed_and_compared(look, finished):
    other = RunDir(finished.parent / "other")
    write(other, 1, 20)
    page = look(finished)
    chart = "[data-family=loss] svg"
    page.wait("document.querySelectorAll('#charts figure').length === 6")
    page.press(chart, "Home")
    assert "8 at 1" in page.text("[data-family=loss] figcaption")
    page.press(chart, "ArrowRight")
    assert "4 at 2" in page.text("[data-family=loss] figcaption")
    assert (
        page.evaluate("document.querySelector('[data-family=mtp_loss] .cursor').getAttribute('visibility')")
        == "visible"
    )

    line = "document.querySelector('[data-family=loss] .line').getAttribute('d')"
    whole = page.evaluate(line)
    page.evaluate("document.getElementById('log').click()")
    logarithmic = page.evaluate(line)
    assert logarithmic != whole
    page.evaluate("document.getElementById('log').click()")
    page.change("#smooth", "0.9")
    assert page.evaluate(line) not in (whole, logarithmic)
    assert page.evaluate("document.querySelectorAll('[data-family=loss] .raw').length") == 1
    page.change("#smooth", "0")

    page.press(chart, "+")
    page.wait(f"{line}.split('L').length < {whole.count('L')}")
    page.press(chart, "0")
    page.wait(f"{line} === {json.dumps(whole)}")

    page.drag(chart, 0.5, 0.8)
    page.wait(f"{line}.split('L').length < {whole.count('L')}")
    assert page.evaluate("document.getElementById('whole').disabled") is False
    page.evaluate("document.getElementById('whole').click()")
    page.wait(f"{line} === {json.dumps(whole)}")
    page.press(chart, "0")

    page.evaluate("document.querySelector('#others input').click()")
    page.wait("document.querySelectorAll('[data-family=loss] .line').length === 2")
    assert "other: 0.4 at 20" in page.text("[data-family=loss] figcaption")
    page.change("#filter", "MTP")
    page.wait("document.querySelectorAll('#charts figure').length === 1")
    page.change("#filter", "")


def test_thousands_of_curves(look, tmp_path):
    run = RunDir(tmp_path / "runs" / "many")
    for step in (1, 2, 3):
        run.metrics.log(step, loss=1.0, micro_loss=[2.0] * 3000, micro_norm=[3.0] * 3000)
    page = look(run.path)
    page.wait("document.querySelectorAll('#charts figure').length === 3")
    assert page.evaluate("document.querySelectorAll('[data-family=micro_norm] .line').length") == 3000
    page.change("#filter", "Norm")
    page.wait("document.querySelectorAll('#charts figure').length === 1")
    page.change("#filter", "")


def test_heat_maps_have_a_slider_and_a_read_out(look, finished):
    page = look(finished)
    page.wait("document.querySelector('[data-panel=expert_rms] canvas')?.width === 8")
    assert page.text("#place-step") == "40"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.press("[data-panel=expert_rms] canvas", key)
    assert page.text("[data-panel=expert_rms] figcaption") == "layer 4, expert 3: 40"
    assert page.text("[data-panel=group_load] figcaption") == "2 layers × 2 EP groups"
    page.press("[data-panel=group_load] canvas", "ArrowDown")
    page.press("[data-panel=group_load] canvas", "ArrowRight")
    assert page.text("[data-panel=group_load] figcaption") == "layer 3, EP group 1: 0.5"
    page.change("#place", "0")
    page.wait("document.getElementById('place-step').textContent === '2'")
    page.wait("document.querySelector('[data-panel=expert_rms] figcaption').innerText === 'layer 4, expert 3: 2'")
    page.change("#shade", "ratio")
    page.wait("document.querySelector('[data-panel=expert_rms] figcaption').innerText.includes('×2 of the median')")


def test_a_demo_shows_its_newest_stage_and_the_others_on_request(look, finished):
    demo = finished.parent
    RunDir(demo).write_env()
    os.utime(finished / "metrics.jsonl", (1, 1))
    write(RunDir(demo / "later"), 1, 7)
    page = look(demo)
    page.wait("document.querySelector('[data-fact=step] b')?.textContent === '7'")
    page.change("#run", "runs/done")
    page.wait("document.querySelector('[data-fact=step] b')?.textContent === '40 of 40'")
    assert page.evaluate("document.title").startswith("runs/done")


def test_the_page_says_when_the_server_is_gone_and_recovers(look, finished):
    page = look(finished)
    page.wait("document.querySelectorAll('#charts figure').length === 6")
    page.evaluate("window.realFetch = fetch; window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.wait("document.getElementById('notice').textContent.startsWith('no answer')")
    page.evaluate("window.fetch = window.realFetch")
    page.wait("document.getElementById('notice').textContent === ''")
    assert all("no answer" in error for error in page.errors)
    page.errors.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_and_both_colour_schemes(look, finished, scheme):
    page = look(finished)
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.wait("document.querySelectorAll('#charts figure').length === 6")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    red = page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert red > 200 if scheme == "light" else red < 60
    page.call("Emulation.clearDeviceMetricsOverride")
    page.call("Emulation.setEmulatedMedia", features=[])
