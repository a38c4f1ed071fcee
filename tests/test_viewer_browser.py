"""The page in a real browser: hostile text stays text, keys work, much is quick, a live run is shown."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odd_runs import odd_runs
from plait import viewer
from plait.events import (
    Event,
    RunEnded,
    RunStarted,
    SegmentEnded,
    SegmentStarted,
    ThreadForked,
    TokensSampled,
    encode,
)
from plait.testing.strategies import Program, formats, programs
from plait.types import StopReason, context_cells
from plait.viewer import describe_run, document
from wide_runs import HOSTILE, wide_run

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

PAINTED = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
KEYS = ("ArrowDown", "ArrowDown", "ArrowRight", "w", "w", "d", "2", "1", "0", "h", "s", "a", "Escape")
# Presses each key and lets the page draw before the next.
INTERACTIONS = """
const [keys, done] = arguments;
const next = () => {
  if (!keys.length) return done();
  document.body.dispatchEvent(new KeyboardEvent('keydown', { key: keys.shift(), bubbles: true }));
  requestAnimationFrame(() => setTimeout(next, 20));
};
next();
"""

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)

pytestmark = [
    pytest.mark.browser,
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


def wait(browser: Any, script: str, *, seconds: float = 60) -> Any:
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


# What would run, load, or break out of the place it stands in, if any of it were read as more than text.
CORPUS = (
    *HOSTILE,
    "<svg/onload=window.hit=1>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=1>",
    "<a href=javascript:window.hit=1>open</a>",
    "<details open ontoggle=window.hit=1>",
    "<style>*{display:none}</style>",
    "<base href=https://plait.invalid/>",
    "<link rel=stylesheet href=https://plait.invalid/x.css>",
    "<meta http-equiv=refresh content='0;url=https://plait.invalid/'>",
    "<form action=https://plait.invalid/><input autofocus onfocus=window.hit=1>",
    '"; window.hit = 1; //',
    "'-window.hit=1-'",
    "${window.hit=1}",
    "]]><script>window.hit=1</script>",
    "--><script>window.hit=1</script>",
    "\\u003cscript>window.hit=1\\u003c/script>",
    "%3Cscript%3Ewindow.hit=1%3C/script%3E",
    "__proto__",
    "constructor",
    "{{data}}",
    "\u2028window.hit=1\u2029",
    "\x1b[31m\x07",
    "a" * 5000,
)
ASKED_OF = """
const kinds = 'script, img, iframe, style, link, base, meta, object, embed, form[action]';
const found = document.querySelectorAll(`:is(${kinds}):is(#app *)`);
return [window.hit ?? null, found.length, getComputedStyle(document.body).display, document.baseURI === location.href,
  [...document.querySelectorAll('#app *')].some((n) => [...n.attributes].some((a) => /^on/i.test(a.name)))];
"""


def hostile_run(text: str) -> list[Event]:
    """A run that says this in all that the page shows: prompt, names, tokens, headers, notes of every ending."""
    tokenizer = {"tokens": [text, f" {text}", "<t>"], "control": ["<t>"], "bos": "<t>", "eos": "<t>"}
    names = dict.fromkeys(("question", "family", "model", "format", "engine", "prompt"), text)
    events: list[Event] = [RunStarted(meta={**names, "tokenizer": tokenizer})]
    ends = {"0:0": StopReason.STOP, "0/0.0:0": StopReason.CANCELLED, "0/0.1:0": StopReason.MALFORMED}
    for id, stop in ends.items():
        parent = None if id == "0:0" else "0:0"
        events.append(SegmentStarted(id=id, parent=parent, forced_ids=(0, 2)))
        events.append(TokensSampled(id=id, token_ids=(1, 0, 2), logprobs=(-0.5, -0.1, 0.0), t=0.1))
        events.append(SegmentEnded(id=id, stop=stop, note=text, t=0.2))
        if id == "0:0":
            events.append(ThreadForked(segment=id, threads=("0/0.0", "0/0.1"), labels=(text, text)))
    return [*events, RunEnded(stop=StopReason.MALFORMED, note=text, t=0.3)]


EVERY_TRACE = (
    f"""
const asked = () => {{ {ASKED_OF} }};
"""
    + """
const [count, done] = arguments, said = [], next = (i) => {
  if (i === count) return done(said);
  window.addEventListener('hashchange', () => setTimeout(() => {
    const keys = ['ArrowDown', 'ArrowDown', 'ArrowRight', '3', 'h'];
    for (const key of keys) document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
    const texts = ['h1', '.stats', '.reading'].map((place) => document.querySelector(place).textContent.toWellFormed());
    said.push([texts, asked()]);
    next(i + 1);
  }), { once: true });
  location.hash = `trace=${i}`;
};
next(0);
"""
)


def test_hostile_text_stays_text_wherever_it_is_shown(browser: Any, tmp_path: Path) -> None:
    runs = [describe_run(hostile_run(text), name=text, answer=text, right=False) for text in CORPUS]
    rows = [{"model": run["meta"]["model"], "family": text, "n": 1} for run, text in zip(runs, CORPUS, strict=True)]
    numbers = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "critical_path_tokens", "total_tokens"), 0.5)
    data = {"runs": runs, "records": [], "groups": [row | numbers for row in rows]}
    path = tmp_path / "page.html"
    path.write_text(document(data, title=CORPUS[2]).html, encoding="utf-8")
    browser.get_log("browser")
    browser.get(path.as_uri())
    wait(browser, "return document.documentElement.dataset.ready !== undefined")
    inert = [None, 0, "block", True, False]
    assert browser.execute_script(ASKED_OF) == inert
    browser.execute_script("document.querySelectorAll('.mark').forEach((m) => m.dispatchEvent(new Event('focus')))")
    assert browser.execute_script(ASKED_OF) == inert
    browser.set_script_timeout(60)
    for hostile, (said, found) in zip(CORPUS, browser.execute_async_script(EVERY_TRACE, len(CORPUS)), strict=True):
        expected = hostile.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert said[0] == expected
        assert all(expected in place for place in said)
        assert found == inert, hostile[:80]
    browser.execute_script(f"location.hash = 'race=0,{len(CORPUS) - 1}'")
    wait(browser, "return document.querySelectorAll('.runner').length === 2")
    assert browser.execute_script(ASKED_OF) == inert
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    with pytest.raises(Exception, match="TrustedHTML"):
        browser.execute_script("document.body.innerHTML = '<b>x</b>'")
    browser.get_log("browser")


def test_every_kind_of_run_is_drawn(shown: Callable[..., Any]) -> None:
    runs, said = odd_runs(), dict[str, str]()
    browser = shown(*runs.values())
    for i, kind in enumerate(runs):
        browser.execute_script("location.hash = arguments[0]", f"trace={i}")
        wait(browser, f"return location.hash === '#trace={i}' && document.querySelector('.reading .said') !== null")
        said[kind] = text(browser, ".legend") + text(browser, ".reading") + text(browser, ".sentence")
        press(browser, "1", "2", "3", " ", " ", "f")
        # The second row of the canvas holds a bar: what is drawn is not only a ruler.
        drawn = """
        const lanes = document.querySelector('.lanes'), ratio = window.devicePixelRatio || 1;
        const row = lanes.getContext('2d').getImageData(0, 40 * ratio, lanes.width, 1).data;
        return row.some((value) => value > 0);
        """
        wait(browser, drawn)
        said[kind] = text(browser, ".legend") + text(browser, ".reading") + text(browser, ".sentence")
    assert "cancelled" in said["race"]
    assert "ended the race" in said["race"]
    assert "closed by the runtime" in said["budget"]
    assert "max_thread_tokens=180 is used up" in said["budget"]
    assert "wait for each other" in said["malformed"]
    assert "without waiting for it" in said["messages"]
    assert "The run was left before its end" in said["left"]
    assert "One line of" in said["one line"]


def test_a_fork_is_seen_to_split(browser: Any) -> None:
    """A thread's lane comes out of its parent's: at first between the two, in the end on its own."""
    static = files("plait.viewer") / "static"
    names = ("model.js", "dom.js", "plane.js", "lanes.js", "hands.js")
    script = "".join((static / name).read_text(encoding="utf-8") for name in names)
    watched = """
    const box = document.createElement('div'), done = arguments[arguments.length - 1];
    document.body.append(box);
    palette.read();
    const lanes = new Lanes(new Run(arguments[0]));
    const heights = () => [...lanes.run.threads.values()].map((thread) => lanes._middle(thread));
    lanes.attach(box);
    const seen = [heights()];
    const frame = () => {
      seen.push(heights());
      if (lanes.born.size) requestAnimationFrame(frame); else { lanes.close(); done(seen); }
    };
    requestAnimationFrame(frame);
    """
    browser.get("about:blank")
    browser.set_script_timeout(60)
    run = describe_run(odd_runs()["nested"])
    seen = browser.execute_async_script(script + watched, run)
    first, last = seen[0], seen[-1]
    assert len(set(last)) == len(last) == 5
    assert max(first) - min(first) < 0.5 * (max(last) - min(last))
    assert first[0] == last[0]


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
    tags = "return [...document.querySelectorAll('.control')].filter((tag) => tag.offsetWidth > 0).length"
    assert browser.execute_script(tags) > 0
    press(browser, "g")
    assert browser.execute_script(tags) == 0


def test_a_name_says_what_it_means(shown: Callable[..., Any]) -> None:
    browser = shown(wide_run(20))
    point = "document.querySelectorAll('.hint')[1].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    browser.execute_script(point)
    assert "longest chain of tokens" in text(browser, "[role=tooltip]:not([hidden])")
    browser.execute_script("document.body.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
    assert browser.execute_script("return document.querySelector('[role=tooltip]').hidden")


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


def test_a_run_that_says_its_texts_is_read_live_as_its_log_is(browser: Any) -> None:
    """Also where an id has several texts, one for each place it stands in, and where text looks like a tag."""
    model = (files("plait.viewer") / "static" / "model.js").read_text()
    read = """
    const live = new Run();
    for (const event of arguments[0]) live.apply(JSON.parse(event));
    return [live, new Run(arguments[1])].map((run) => [...run.segments.values()].map((s) =>
      Array.from({ length: s.length }, (_, i) => s.token(i)).map((n) => [run.idOf(n), run.text(n), run.control(n)])));
    """
    events: list[Event] = [
        RunStarted(meta={"format": "sequential", "tokenizer": {"control": {"<e>": 2}, "bos": [], "eos": [2]}}),
        SegmentStarted(id="0:0", parent=None, forced_ids=(2, 5, 7), texts=("<e>", "Hi ", None)),
        TokensSampled(id="0:0", token_ids=(8, 7), logprobs=(0.0,) * 2, texts=("\U0001f600", None)),
        TokensSampled(id="0:0", token_ids=(7, 8, 6, 2), logprobs=(0.0,) * 4, texts=(None, "\U0001f602", "<e>", "<e>")),
        SegmentEnded(id="0:0", stop=StopReason.EOS),
        RunEnded(stop=StopReason.EOS),
    ]
    browser.get("about:blank")
    live, log = browser.execute_script(model + read, list(map(encode, events)), describe_run(events))
    assert live == log
    texts = ["<e>", "Hi ", "", "\U0001f600", "", "", "\U0001f602", "<e>", "<e>"]
    ids, control = [2, 5, 7, 8, 7, 7, 8, 6, 2], [True, *[False] * 7, True]
    assert log == [[list(token) for token in zip(ids, texts, control, strict=True)]]


def busy_ms(browser: Any) -> float:
    """CPU time of the page's main thread so far, which does not depend on what else the machine does."""
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return 1000 * next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def test_ten_thousand_segments_are_quick(shown: Callable[..., Any], browser: Any) -> None:
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.get("about:blank")
    before = busy_ms(browser)
    shown(wide_run(10_000))
    painted = wait(browser, PAINTED)
    paint_ms = busy_ms(browser) - before
    before = busy_ms(browser)
    browser.execute_async_script(INTERACTIONS, list(KEYS))
    key_ms = (busy_ms(browser) - before) / len(KEYS)
    print(f"painted after {paint_ms:.0f} ms of CPU time ({painted:.0f} ms), a key takes {key_ms:.0f} ms of CPU time")
    assert 10 < paint_ms < 1000
    assert 1 < key_ms < 50
    assert browser.execute_script("return document.querySelectorAll('*').length") < 20_000


def test_two_runs_of_a_question_race(shown: Callable[..., Any]) -> None:
    browser = shown(wide_run(30, seed=1), wide_run(60, seed=2))
    browser.execute_script("location.hash = 'race=0,1'")
    wait(browser, "return document.querySelectorAll('.runner').length === 2")
    press(browser, " ")
    wait(browser, "return parseFloat(document.querySelectorAll('.runner .clock')[0].textContent) > 0")
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


class _Hostile(_Live):
    """Names of models, questions of recent runs and errors that would do harm if they were more than text."""

    def do_GET(self) -> None:
        if self.path == "/plait/runs":
            runs = [{"id": text, "question": text, "model": text, "done": True, "usage": None} for text in CORPUS]
            return self._json({"data": runs})
        if self.path == "/v1/models":
            return self._json({"data": [{"id": text, "plait": {"twin": text}} for text in CORPUS]})
        super().do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._json({"error": {"message": "\n".join(CORPUS)}}, 400)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Address of a server that is there as long as the block."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_hostile_text_of_a_server_stays_text(browser: Any) -> None:
    with served(_Hostile) as address:
        browser.get(address)
        wait(browser, "return document.querySelectorAll('.recent button').length > 0")
        wait(browser, f"return document.querySelectorAll('option').length === {len(CORPUS)}")
        ask = "document.querySelector('.question').value = 'x'; document.querySelector('form').requestSubmit()"
        browser.execute_script(ask)
        wait(browser, "return document.querySelector('.error').textContent.includes('javascript:window.hit=1')")
        assert browser.execute_script(ASKED_OF) == [None, 0, "block", True, False]
    wait(browser, f"{ask}; return document.querySelector('.error').textContent.includes('does not answer')")
    browser.get("about:blank")
    browser.get_log("browser")


def test_a_question_is_asked_and_its_run_shown(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get_log("browser")
    with served(_Live) as address:
        browser.get(address)
        wait(browser, "return document.querySelectorAll('select option').length === 2")
        press(browser, "/", "What is it?", Keys.ENTER)
        wait(browser, "return document.querySelector('.trace .stats')?.textContent.includes('42')")
        assert _Live.asked[-1] == {"question": "What is it?", "model": "tiny"}
        wait(browser, "return !document.querySelector('[data-axis=steps]').disabled")
        press(browser, "2")
        wait(browser, "return document.querySelector('[data-axis=steps]').ariaChecked === 'true'")
        assert browser.execute_script("return document.querySelector('.question').value") == "What is it?"
        browser.execute_script(
            "document.getElementById('race').click(); document.querySelector('form').requestSubmit()"
        )
        wait(browser, "return document.querySelectorAll('.runner').length === 2")
        wait(browser, "return document.querySelector('.race .sentence').textContent.includes('in steps')")
        assert {asked["model"] for asked in _Live.asked[-2:]} == {"tiny", "twin"}
        assert [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
        browser.execute_script(
            "document.querySelector('.question').value = 'unknown'; document.querySelector('form').requestSubmit()"
        )
        wait(browser, "return document.querySelector('.error').textContent.includes('<b>1 + 1</b>')")
        assert browser.execute_script("return document.querySelector('.waiting')") is None
        browser.get("about:blank")
        browser.get_log("browser")
