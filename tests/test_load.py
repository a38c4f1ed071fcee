"""Load on a server: what is offered, answered, refused and failed is counted as it was."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace

import anyio
import pytest
from click.testing import CliRunner

from plait.bench.load import Target, offer, table
from plait.cli import main
from plait.errors import RequestError
from test_server import QUESTION, Running, gold, serving, slow

QUESTIONS = (QUESTION, "What is 12 + 5?")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(gold()) as running:
        yield running


def test_every_offered_request_is_answered_and_forks_are_counted(server: Running) -> None:
    target = Target(url=server.url, questions=QUESTIONS)
    point = anyio.run(lambda: offer(target, 40.0, seconds=0.5))
    assert point.sent > 10
    assert (point.refused, point.failed) == (0, 0)
    assert 0 < point.fork_rate < 1
    assert 0 < point.first_p50_s <= point.total_p50_s <= point.total_p95_s
    one = anyio.run(lambda: offer(replace(target, questions=[QUESTION]), 20.0, seconds=0.2))
    assert one.fork_rate == 1.0


def test_what_a_full_server_refuses_is_told_from_what_fails() -> None:
    with serving(slow(0.005), max_threads=1, max_requests=2) as server:
        target = Target(url=server.url, questions=[QUESTION])
        point = anyio.run(lambda: offer(target, 50.0, seconds=0.4))
        assert point.refused > 0
        assert point.failed == 0
        unknown = anyio.run(lambda: offer(replace(target, model="no-such-model"), 50.0, seconds=0.1))
        assert (unknown.failed, unknown.done_rps) == (unknown.sent, 0.0)
        ((why, count),) = unknown.failures.items()
        assert (why.startswith("unknown model 'no-such-model'"), count) == (True, unknown.failed)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        gone = anyio.run(lambda: offer(replace(target, url=url), 50.0, seconds=0.1))
    assert gone.failed == gone.sent == sum(gone.failures.values()) > 0
    assert table([gone]).splitlines()[-1] == f"{gone.failed} failed: {next(iter(gone.failures))}"


def test_the_command_prints_a_row_for_each_rate(server: Running) -> None:
    args = ["bench", "load", "--url", server.url, "--rates", "20,40", "--seconds", "0.2", "--family", "control"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines()[2:]] == ["20", "40"]
    (first, _) = json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)
    assert (first["fork_rate"], first["failed"]) == (0.0, 0)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8000", "must look like http://host:port"),
        ("http://user:secret@localhost", "holds a user or a password"),
        ("http://a:1,http://b:2", "several servers"),
    ],
)
def test_an_address_that_is_none_is_refused_at_once(url: str, says: str) -> None:
    result = CliRunner().invoke(main, ["bench", "load", "--url", url])
    assert result.exit_code == 2
    assert says in result.output
    assert "secret" not in result.output


def test_a_rate_that_is_none_is_refused() -> None:
    assert CliRunner().invoke(main, ["bench", "load", "--rates", "fast"]).exit_code == 2
    with pytest.raises(RequestError, match="above 0"):
        anyio.run(lambda: offer(Target(url="http://127.0.0.1:1", questions=QUESTIONS), 0.0, seconds=1))
