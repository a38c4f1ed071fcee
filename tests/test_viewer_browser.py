"""The page in a real browser: hostile text stays text, keys work, much is quick, a live run is shown."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait import viewer
from plait.events import Event, encode
from plait.testing.strategies import Program, formats, programs
from plait.types import context_cells
from plait.viewer import describe_run, document
from wide_runs import HOSTILE, wide_run

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="chromium or chromedriver is not installed"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page with these runs; no page may have said an error at the end."""

    def show(*runs: list[Event]) -> Any:
        path = tmp_path / "page.html"
        data = {"runs": [describe_run(events) for events in runs], "records": [], "groups": []}
        path.write_text(document(data).html, encoding="utf-8")
        browser.get("about:blank")
        browser.get(path.as_uri())
        wait(browser, "return document.documentElement.dataset.ready !== undefined")
        return browser

    browser.get_log("browser")
    yield show
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def wait(browser: Any, script: str, *, seconds: float = 20) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = browser.execute_script(script)
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {script}")


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def text(browser: Any, selector: str) -> str:
    return browser.execute_script(
        "return document.querySelector(arguments[0])?.textContent.toWellFormed() ?? ''", selector
    )


def test_hostile_text_stays_text(shown: Callable[..., Any]) -> None:
    browser = shown(wide_run(120, question=HOSTILE[1]))
    assert text(browser, "h1") == HOSTILE[1]
    said = text(browser, ".reading")
    assert all(hostile in said for hostile in HOSTILE[:5])
    assert browser.execute_script("return window.hit") is None
    assert browser.execute_script("return document.querySelectorAll('#app script, #app img, #app iframe').length") == 0
    with pytest.raises(Exception, match="TrustedHTML"):
        browser.execute_script("document.body.innerHTML = '<b>x</b>'")
    browser.get_log("browser")


def test_keys_choose_fold_and_switch(shown: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = shown(wide_run(20))
    press(browser, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert "0/0.0:0" in text(browser, ".inspector")
    press(browser, Keys.ARROW_RIGHT)
    assert "sampled by the model" in text(browser, ".inspector")
    assert "cannot see" in text(browser, ".inspector")
    before = text(browser, ".reading")
    press(browser, Keys.ENTER)
    assert len(text(browser, ".reading")) < len(before)
    checked = "return document.querySelector('[aria-checked=true]').textContent"
    press(browser, "1")
    assert browser.execute_script(checked) == "Time"
    press(browser, "3")
    assert browser.execute_script(checked) == "Positions"
    press(browser, "t")
    assert browser.execute_script("return document.documentElement.dataset.theme") in ("dark", "light")
    press(browser, Keys.ESCAPE)
    assert "Choose a token" in text(browser, ".inspector")


def test_what_a_token_attends_to_is_what_its_context_holds(browser: Any) -> None:
    model = (files("plait.viewer") / "static" / "model.js").read_text()
    seen = """
    return arguments[0].map((about) => {
      const run = new Run(about);
      return [...run.segments.values()].map((s) => {
        const counts = [...run.sees(s, s.forced.length - 1).values()];
        return [s.id, counts.reduce((a, b) => a + b, 0)];
      });
    });
    """

    @settings(max_examples=1, database=None)
    @given(st.lists(programs(format=formats()) | programs(), min_size=20, max_size=20))
    def check(drawn: list[Program]) -> None:
        runs = [program.run()[:2] for program in drawn]
        found = browser.execute_script(model + seen, [describe_run(events) for _, events in runs])
        for (tree, _), counts in zip(runs, found, strict=True):
            assert counts == [[s.id, context_cells(tree.context(s.id))] for s in tree.segments.values()]

    check()


def test_ten_thousand_segments_are_quick(shown: Callable[..., Any]) -> None:
    browser = shown(wide_run(10_000))
    ready = float(browser.execute_script("return document.documentElement.dataset.ready"))
    interact = """
    const key = (key) => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
    const took = [];
    for (const k of ['ArrowDown', 'ArrowDown', 'ArrowRight', 'w', 'w', 'd', '2', '1', '0', 'h']) {
      const started = performance.now();
      key(k);
      took.push(performance.now() - started);
    }
    return took.sort((a, b) => a - b);
    """
    took = browser.execute_script(interact)
    paint = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN"
    painted = float(browser.execute_script(paint))
    print(
        f"ready after {ready:.0f} ms, painted after {painted:.0f} ms; a key {took[5]:.0f} ms, at most {took[-1]:.0f} ms"
    )
    # Goals are 1000 and 50 ms on a free machine; the bounds leave room for a busy one.
    assert ready < 8000
    assert took[5] < 400
    assert browser.execute_script("return document.querySelectorAll('*').length") < 20_000


def test_two_runs_of_a_question_race(shown: Callable[..., Any]) -> None:
    browser = shown(wide_run(30, seed=1), wide_run(60, seed=2))
    browser.execute_script("location.hash = 'race=0,1'")
    wait(browser, "return document.querySelectorAll('.side').length === 2")
    press(browser, " ")
    wait(browser, "return parseFloat(document.querySelectorAll('.side .clock')[0].textContent) > 0")
    press(browser, " ")
    # The clock of a run that has ended stands still, so both are compared before either end.
    browser.execute_script("""
    const slide = document.querySelector('input[type=range]');
    slide.value = 200;
    slide.dispatchEvent(new Event('input', { bubbles: true }));
    """)
    clocks = browser.execute_script("return [...document.querySelectorAll('.clock')].map((c) => c.textContent)")
    assert clocks[0] == clocks[1]
    assert browser.execute_script("return document.querySelectorAll('.said span[hidden]').length") > 0


def test_it_fits_a_phone(shown: Callable[..., Any]) -> None:
    browser = shown(wide_run(20), wide_run(20, seed=3))
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for view in ("runs", "trace=0", "race=0,1"):
            browser.execute_script("location.hash = arguments[0]", view)
            time.sleep(0.2)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


class _Live(BaseHTTPRequestHandler):
    """A server as `plait serve` is to the page: models, and runs as server-sent events."""

    events: tuple[Event, ...] = tuple(wide_run(30))
    asked: list[Any] = []  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path == "/":
            return self._send(viewer.page(), viewer.HEADERS)
        models = [{"id": "tiny", "plait": {"twin": "twin", "default": True}}, {"id": "twin", "plait": {"twin": None}}]
        self._send(json.dumps({"data": models}).encode(), {"Content-Type": "application/json"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if "unknown" in body["question"]:
            error = {"error": {"message": "I know sums:\n  <b>1 + 1</b>", "code": "unknown_question"}}
            return self._send(json.dumps(error).encode(), {"Content-Type": "application/json"}, 400)
        frames = [f"id: {i}\ndata: {encode(event)}\n\n" for i, event in enumerate(self.events)]
        frames.append(f"event: run\ndata: {json.dumps(describe_run(self.events))}\n\n")
        frames.append('event: usage\ndata: {"answer": "42"}\n\nevent: end\ndata: {}\n\n')
        stream = "".join(frames).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b": keep-alive\n\n")
        for at in range(0, len(stream), 4093):
            self.wfile.write(stream[at : at + 4093])

    def _send(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_question_is_asked_and_its_run_shown(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get_log("browser")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Live) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            browser.get(f"http://127.0.0.1:{server.server_port}/")
            wait(browser, "return document.querySelectorAll('select option').length === 2")
            press(browser, "/", "What is it?", Keys.ENTER)
            wait(browser, "return document.querySelector('.trace .stats')?.textContent.includes('42')")
            assert _Live.asked[-1] == {"question": "What is it?", "model": "tiny"}
            wait(browser, "return !document.querySelector('[data-axis=steps]').disabled")
            browser.execute_script(
                "document.getElementById('race').click(); document.querySelector('form').requestSubmit()"
            )
            wait(browser, "return document.querySelectorAll('.side').length === 2")
            wait(browser, "return document.querySelector('.race .sentence').textContent.includes('in steps')")
            assert {asked["model"] for asked in _Live.asked[-2:]} == {"tiny", "twin"}
            assert [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
            browser.execute_script(
                "document.querySelector('.question').value = 'unknown'; document.querySelector('form').requestSubmit()"
            )
            wait(browser, "return document.querySelector('.error').textContent.includes('<b>1 + 1</b>')")
            browser.get_log("browser")
        finally:
            browser.get("about:blank")
            server.shutdown()
            thread.join()
