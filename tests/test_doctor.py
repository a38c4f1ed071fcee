"""`plait doctor` and `--engine URL`: against small true servers, each in a thread of its own."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anyio
import anyio.from_thread
import pytest

pytest.importorskip("httpx2", reason="needs the http extra")

from fake_servers import FakeCompletions, FakeLlamaServer, FakeServer, FakeSglang, FakeVllm
from plait.cli import main
from plait.commands.doctor import doctor
from plait.commands.evaluate import evaluation
from plait.engines.scripted import ScriptedEngine
from plait.errors import RequestError
from plait.models import gold_model
from plait.tasks.vocabulary import TOKENIZER
from plait.types import Chunk, Context, SamplingParams
from tiny_gguf import write_model


@contextmanager
def running(server: FakeServer) -> Iterator[str]:
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(server.serve()) as url,
    ):
        yield url


def examined(server: FakeServer, capsys: pytest.CaptureFixture[str], **options: str) -> dict:
    with running(server) as url:
        code = doctor(url, as_json=True, **options)
    (report,) = json.loads(capsys.readouterr().out)["engines"]
    assert "error" not in report, report
    assert code == (0 if report["ok"] else 1)
    return report


def held(report: dict) -> dict[str, bool | None]:
    return {check["name"]: check["holds"] for check in report["checks"]}


def test_a_good_vllm_needs_no_change(capsys: pytest.CaptureFixture[str]) -> None:
    # Long enough that the call which is left still runs when its server is asked, however busy the machine.
    report = examined(FakeVllm(max_context=4000), capsys)
    assert report["advice"] == []
    checks = held(report)
    assert checks.pop("logprobs") is None, "a model that finds all tokens alike does so at any temperature"
    assert set(checks.values()) == {True}
    assert report["server"]["route"] == "/inference/v1/generate"
    fork = report["fork"]
    assert (fork["prefix_tokens"], fork["branches"], fork["first_reused_tokens"]) == (528, 4, 528)


def test_a_prefix_cache_that_is_off_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    class Uncached(FakeVllm):
        def keep(self, ids: object) -> None:
            pass

    report = examined(Uncached(max_context=2000, native=False), capsys)
    assert report["fork"]["first_reused_tokens"] == 0
    assert "--enable-prefix-caching" in report["advice"][0]
    assert "--enable-scale-out" in report["advice"][1]


def test_large_blocks_and_answers_that_hide_what_was_cached_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    class Coarse(FakeVllm):
        def cached(self, ids: object) -> int:
            return super().cached(ids) // 384 * 384

    assert "--block-size" in examined(Coarse(max_context=2000), capsys)["advice"][0]
    report = examined(FakeVllm(max_context=2000, tells_cached=False), capsys)
    assert "--enable-prompt-tokens-details" in report["advice"][0]


def test_a_llama_server_prefills_the_first_fork_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Crowded(FakeLlamaServer):
        async def sample(self, ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[Chunk, None]:
            # No branch is over before the last has come, and leaves it its slot.
            while len(ids) > 528 and self.most < 4:  # noqa: ASYNC110 - it has no event to wait for
                await anyio.sleep(0.001)
            async with aclosing(FakeLlamaServer.sample(self, ids, params)) as chunks:
                async for chunk in chunks:
                    yield chunk

    report = examined(Crowded(max_context=2000), capsys)
    assert report["fork"]["first_reused_tokens"] < 400
    assert report["fork"]["again_reused_tokens"] == pytest.approx(528, abs=2)
    assert "caches by slot" in report["advice"][0]
    assert "--parallel" in examined(FakeLlamaServer(max_context=2000, slots=[[]]), capsys)["advice"][0]


def test_rounding_is_not_taken_for_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    class Rounding(FakeVllm):
        """Says something else to a prompt that it has never seen than to the same prompt again."""

        def model(self) -> ScriptedEngine:
            prompts = [seen.body.get("token_ids") for seen in self.seen]
            # Prompts are drawn anew each time: by no chance may the two begin alike.
            unsaid = range(20) if prompts.count(prompts[-1]) > 1 else range(20, self.vocab_size)
            weights = dict.fromkeys(unsaid, 0.0)
            return ScriptedEngine(vocab_size=self.vocab_size, weights=weights, max_context=self.max_context)

    checks = held(examined(Rounding(max_context=2000), capsys))
    assert (checks["stop ids"], checks["greedy repeats"], checks["seeds"]) == (None, None, True)


def test_what_cannot_be_seen_is_not_called_good(capsys: pytest.CaptureFixture[str]) -> None:
    report = examined(FakeSglang(max_context=2000), capsys)
    assert held(report)["cancelling"] is None
    assert report["advice"] == ["Start with --enable-metrics, so that load and cancelling can be seen."]
    report = examined(FakeCompletions(max_context=40_000), capsys, kind="completions")
    assert "pass max_context" in report["advice"][0]
    assert report["fork"]["first_reused_tokens"] is None


@pytest.mark.parametrize(("hot", "holds"), [(-0.9, True), (-0.4, False)])
def test_logprobs_after_temperature_and_seeds_that_do_not_count_are_seen(
    hot: float, holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(event: dict[str, Any]) -> None:
        sampling = server.seen[-1].body["sampling_params"]
        if "logit_bias" not in sampling:
            event["meta_info"]["output_token_logprobs"][0][:] = [hot if sampling["temperature"] else -0.9, 7, None]

    server = FakeSglang(max_context=2000, deterministic=holds, spoil=spoil)
    report = examined(server, capsys)
    assert (held(report)["logprobs"], held(report)["seeds"], report["ok"]) == (holds, holds, holds)
    said = " ".join(report["advice"])
    assert ("SGLANG_RETURN_ORIGINAL_LOGPROB" in said, "--enable-deterministic" in said) == (not holds, not holds)


def test_a_count_of_calls_that_never_moves_says_nothing_of_cancelling(capsys: pytest.CaptureFixture[str]) -> None:
    class Idle(FakeVllm):
        def pages(self) -> dict:
            return super().pages() | {"/metrics": "vllm:num_requests_running 0\n"}

    with patch("plait.engines.http.diagnosis._CANCEL_S", 0.1):
        assert held(examined(Idle(max_context=2000), capsys))["cancelling"] is None


def test_a_broken_engine_fails(capsys: pytest.CaptureFixture[str]) -> None:
    class Deaf(FakeVllm):
        def pages(self) -> dict:
            # Calls never end: the gauge only rises.
            return super().pages() | {"/metrics": f"vllm:num_requests_running {len(self.seen)}\n"}

    report = examined(FakeVllm(max_context=2000, heeds_bans=False), capsys)
    assert held(report)["banned ids"] is False
    with patch("plait.engines.http.diagnosis._CANCEL_S", 0.2):
        report = examined(Deaf(max_context=2000), capsys)
    assert held(report)["cancelling"] is False
    assert "closed connections" in report["advice"][-1]


@pytest.mark.parametrize("given", ["many", math.nan, -5, 4096.5, [1], True])
@pytest.mark.parametrize("field", ["max_model_len", "n_ctx", "total_slots", "n_vocab"])
def test_numbers_that_are_none_are_named(field: str, given: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeVllm() if field == "max_model_len" else FakeLlamaServer()
    pages = server.pages()
    (model,), props = pages["/v1/models"]["data"], pages.get("/props", {})
    where = {"max_model_len": model, "n_vocab": model.get("meta"), "total_slots": props}
    where.get(field, props.get("default_generation_settings"))[field] = given
    with patch.object(type(server), "pages", lambda self: pages), running(server) as url:
        assert doctor(url) == 1
    said = capsys.readouterr().out
    assert "not usable" in said
    assert f"is {given!r}; it must be a whole number" in said


def test_pages_that_are_nested_too_deeply_are_no_pages(capsys: pytest.CaptureFixture[str]) -> None:
    class Deep(FakeVllm):
        def pages(self) -> dict:
            return {"/v1/models": "[" * 200_000}

    with running(Deep()) as url:
        assert doctor(url) == 1
    assert "no language model server that is known" in capsys.readouterr().out


def test_doctor_does_not_print_a_password(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["doctor", "--engine", "http://user:s3cret@127.0.0.1:9"])
    printed = capsys.readouterr()
    assert info.value.code == 2
    assert "PLAIT_ENGINE_KEY" in printed.err
    assert "s3cret" not in printed.out + printed.err


def test_the_page_says_it_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with running(FakeVllm(max_context=2000)) as url, pytest.raises(SystemExit) as info:
        main(["doctor", "--engine", f"{url},http://127.0.0.1:9"])
    assert info.value.code == 1
    out = capsys.readouterr().out
    for line in ("vllm 0.33.0, model tiny", "2,000 tokens", "528 of 528 tokens", "not usable", "cannot be reached"):
        assert line in out
    with pytest.raises(RequestError, match="no address"):
        doctor("llamacpp")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The header of a model that joins by reading again; the server says the gold traces in its place."""
    return write_model(tmp_path / "tw.gguf", format="threadweaver", join="concat", train={})


def gold_server() -> FakeVllm:
    gold = gold_model("threadweaver").script

    def script(context: Context) -> Sequence[int]:
        assert gold is not None
        try:
            return gold(context)
        except RequestError:
            # The token that is sampled to see that ids come back.
            return [*TOKENIZER.eos_ids]

    return FakeVllm(vocab_size=len(TOKENIZER.tokens), max_context=2000, script=script)


def test_solve_forks_and_joins_over_http(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = gold_server()
    with running(server) as url:
        args = ["solve", "What is 347 * 526?", "--engine", url, "--model", str(weights), "--json", "--check"]
        with pytest.raises(SystemExit) as info:
            main(args)
    data = json.loads(capsys.readouterr().out)
    assert (info.value.code, data["answer"], data["right"]) == (0, "182522", True)
    assert data["threads"] > 1
    assert data["engine"] == url
    assert data["usage"]["reread_tokens"] > 0, "a concat join is read again"


def test_eval_runs_over_http(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from plait.commands.evaluate import Options

    with running(gold_server()) as url:
        options = Options(families=["long_multiplication"], n=3, model=str(weights), engine=url, as_json=True)
        assert evaluation(options) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert data["engine"] == url


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--engine", "http://127.0.0.1:9"], "cannot be reached"),
        (["--engine", "http"], "http://HOST:PORT"),
        (["--engine", "http://127.0.0.1:9", "--compare"], "one model"),
        (["--engine", "ftp://x"], "http://host:port"),
    ],
)
def test_solve_says_what_is_wrong_with_an_address(
    args: list[str], says: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as info:
        main(["solve", "What is 3 * 5?", "--model", str(weights), *args])
    assert info.value.code in (1, 2)
    assert says in capsys.readouterr().err
