"""Settings of the server: where they come from, what they refuse; keys; the process as a user starts and ends it."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from plait.cli import main
from plait.errors import RequestError
from plait.server import ServeConfig, as_toml, new_key, resolve
from plait.server.keys import Keyring
from plait.server.logs import LEVELS, NAME, configure
from plait.server.refusal import Refusal

SERVE = [sys.executable, "-m", "plait", "serve", "--engine", "scripted"]
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}


def test_flags_come_before_variables_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax_threads = 2\nmax_tokens = 3\nmodels = ["a", "b"]\n')
    environ = {"PLAIT_PORT": "10", "PLAIT_MAX_THREADS": "20", "PLAIT_MODELS": "c, d", "PLAIT_ALLOW_ANONYMOUS": "true"}
    config = resolve({"port": 100, "host": None, "models": ()}, environ, str(file))
    assert (config.port, config.max_threads, config.max_tokens) == (100, 20, 3)
    assert (config.models, config.allow_anonymous, config.host) == (("c", "d"), True, "127.0.0.1")


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "says"),
    [
        ({}, {}, "prot = 1", "did you mean 'port'"),
        ({}, {}, 'port = "x"', "must be of type int"),
        ({}, {}, "port = ", "cannot read the config"),
        ({}, {"PLAIT_PORT": "x"}, "", "PLAIT_PORT is 'x'"),
        ({}, {"PLAIT_ALLOW_ANONYMOUS": "maybe"}, "", "true or false"),
        ({"max_threads": 0}, {}, "", "max_threads is 0"),
        ({"engine_options": ("cells 8",)}, {}, "", "of the form NAME=VALUE"),
        ({"port": 70_000}, {}, "", "from 0 to 65535"),
        ({"log": "jsn"}, {}, "", "did you mean 'json'"),
        ({"drain_s": float("nan")}, {}, "", "drain_s is nan"),
    ],
)
def test_a_setting_that_is_not_one_is_refused(
    tmp_path: Path, flags: dict[str, Any], environ: dict[str, str], toml: str, says: str
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(toml)
    with pytest.raises(RequestError, match=says):
        resolve(flags, environ, str(file))


def test_the_printed_config_is_a_config_and_hides_keys() -> None:
    _, entry = new_key("alice")
    config = ServeConfig(port=1234, models=("a",), api_keys=(entry,))
    text = as_toml(config)
    again = {name: tuple(v) if isinstance(v, list) else v for name, v in tomllib.loads(text).items()}
    assert resolve({**again, "api_keys": (entry,)}, {}) == config
    assert "# api_keys: alice" in text
    assert entry.split(":")[2] not in text


def test_an_address_that_others_reach_needs_keys() -> None:
    with pytest.raises(RequestError, match="--new-key"):
        ServeConfig(host="0.0.0.0").keyring()
    assert ServeConfig(host="0.0.0.0", allow_anonymous=True).keyring().open
    assert not ServeConfig(host="0.0.0.0", api_keys=(new_key("a")[1],)).keyring().open


def test_keys_are_known_by_their_hashes(tmp_path: Path) -> None:
    key, entry = new_key("alice")
    assert key not in entry
    file = tmp_path / "keys"
    file.write_text(f"# people\n\n{entry}:2.5\n")
    ring = ServeConfig(api_key_file=str(file)).keyring()
    assert (ring.client(f"Bearer {key}").name, ring.client(None, key).weight) == ("alice", 2.5)
    for wrong in (None, "", "Bearer", f"Bearer {key}x", f"Bearer {entry}", "Basic ???", "Digest x", "Bearer \udcff"):
        with pytest.raises(Refusal) as caught:
            ring.client(wrong)
        assert caught.value.status == 401


@pytest.mark.parametrize("entry", ["secret", "a:sha256:123", f"a b:sha256:{'0' * 64}", f"a:sha256:{'0' * 64}:0"])
def test_a_bad_entry_is_refused_and_not_shown(entry: str) -> None:
    with pytest.raises(RequestError) as caught:
        Keyring((entry,))
    assert entry not in str(caught.value)
    assert "NAME:sha256:HEX" in str(caught.value)


def test_new_key_prints_a_key_and_its_entry() -> None:
    result = CliRunner().invoke(main, ["serve", "--new-key", "alice"])
    assert result.exit_code == 0
    key, entry = (line.split()[-1] for line in result.stdout.splitlines())
    assert Keyring((entry,)).client(f"Bearer {key}").name == "alice"


def test_a_port_that_is_taken_is_a_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = subprocess.run([*SERVE, "--port", port], capture_output=True, text=True, env=ENV, timeout=50)
    assert result.returncode == 1
    assert "address already in use" in result.stderr
    assert "--port" in json.loads(result.stderr.splitlines()[-1])["event"]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_is_for_people_on_a_terminal_and_json_elsewhere(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    with configured("auto"):
        logging.getLogger(NAME).info("listening")
    assert shown.getvalue().startswith("{") != terminal
    assert "listening" in shown.getvalue()


@contextmanager
def configured(kind: str) -> Iterator[None]:
    """The server's log, as long as the block lasts."""
    loggers = [logging.getLogger(name) for name in LEVELS]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    try:
        configure(kind)
        yield
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


def test_what_engines_warn_of_is_part_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("json", "off"):
        with configured(kind):
            logging.getLogger("plait.engines.http").warning("%s is left out", "http://a:1")
            logging.getLogger("plait").error("an engine failed")
            logging.getLogger("plait.engines.http").info("not said")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["event"]) for line in lines] == [
        ("warning", "http://a:1 is left out"),
        ("error", "an engine failed"),
    ]


def test_a_server_starts_answers_and_ends_on_sigterm() -> None:
    command = [*SERVE, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        try:
            assert process.stderr is not None
            started = json.loads(process.stderr.readline())
            assert (started["event"], started["models"]) == ("listening", ["gold-multiverse", "gold-sequential"])
            body = {"messages": [{"role": "user", "content": "What is 347 * 526?"}]}
            reply = httpx2.post(f"{started['address']}/v1/chat/completions", json=body, timeout=40, trust_env=False)
            assert reply.json()["choices"][0]["message"]["content"] == "182522"
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0
            logged = [json.loads(line) for line in process.stderr]
        finally:
            process.kill()
    # A reply may be read before its line is written, and the signal comes at once: their order is not promised.
    assert sorted(line["event"] for line in logged) == ["draining", "request"]
    (request,) = [line for line in logged if line["event"] == "request"]
    assert (request["route"], request["status"], request["client"]) == ("/v1/chat/completions", 200, "anonymous")
    assert request["request_id"] == reply.headers["x-request-id"]
    assert not any("347" in str(value) for line in logged for value in line.values() if not isinstance(value, float))
