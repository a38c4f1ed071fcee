"""What a server can be told, and from where: flags, then `PLAIT_*` variables, then a TOML file, then the defaults.

Knows nothing of HTTP. Every source has the same names; one that is not known is refused, with the nearest that is.
"""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from plait.errors import RequestError
from plait.server.keys import Keyring, read_entries
from plait.settings import assignment, fitted, kind_of, one_of, read_toml
from plait.types import Budget

PREFIX = "PLAIT_"
LOGS = ("auto", "json", "plain", "off")
DEFAULT_TOKENS = 4096
REASONING = ("both", "reasoning", "reasoning_content")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of `plait serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    models: tuple[str, ...] = ()
    """Names or paths; the first is the default. Empty: the embedded model and its sequential twin."""
    formats: tuple[str, ...] = ()
    """Trajectory formats of weights that do not say theirs: one for all models, or one for each of them."""
    engine: str | None = None
    """Name of the engine for all models; None: each model's own."""
    engine_options: tuple[str, ...] = ()
    """`NAME=VALUE` each: of that engine, such as `cells=16384` and `max_seqs=128`."""
    api_keys: tuple[str, ...] = ()
    """Entries `NAME:sha256:HEX[:WEIGHT]`, as `plait serve --new-key NAME` prints them."""
    api_key_file: str | None = None
    """A file of such entries, one a line."""
    cache_secret: str | None = None
    """What cache salts are made with. None: drawn at every start; set it where several servers share engines."""
    allow_anonymous: bool = False
    """Serve without keys on an address that others reach."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may have, beside `host` and those of loopback; `*` is any."""
    max_threads: int | None = None
    """Threads that sample at once, all requests together. None: as many as the engines say they hold."""
    max_threads_per_key: int | None = None
    max_requests: int = 256
    """Requests at once, waiting ones included."""
    max_requests_per_key: int | None = None
    max_threads_per_request: int = 64
    """Most forked threads that a request may ask for, also of a single fork."""
    max_tokens: int | None = None
    """Most sampled tokens that a request may ask for, all its threads together. None: 4096 for models that Plait
    trained; for others as many as their context leaves."""
    request_timeout_s: float = 120.0
    """A run ends with what it has after so long."""
    max_body_bytes: int = 1 << 20
    max_header_bytes: int = 16 << 10
    max_headers: int = 100
    header_timeout_s: float = 10.0
    """For a request's headers to arrive."""
    body_timeout_s: float = 15.0
    """For a request's body to arrive."""
    max_connections: int = 1024
    max_stream_bytes: int = 16 << 20
    send_timeout_s: float = 30.0
    """A client that reads nothing of its response for so long is left."""
    engine_timeout_s: float = 60.0
    """An engine that says nothing for so long has failed."""
    keep_alive_s: float = 15.0
    """A stream that says nothing for so long says a comment."""
    keep_runs: int = 64
    """Runs that were asked to be traced and can still be looked at."""
    otlp_endpoint: str | None = None
    """Where runs are sent as spans: `http://localhost:4318/v1/traces`."""
    drain_s: float = 30.0
    """After SIGTERM, for requests that run."""
    temperature: float = 0.0
    """Where a request does not say; 0 is greedy."""
    reasoning: str = "both"
    """Which fields carry the reasoning: `reasoning`, `reasoning_content` or both."""
    log: str = "auto"
    """json, plain or off; auto: plain on a terminal, else json. On standard error, without prompts."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise RequestError(f"{name} is {value}; it must be above 0")
        for name in ("keep_runs", "drain_s", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.port <= 65535:
            raise RequestError(f"port is {self.port}; it must be from 0 to 65535")
        if len(self.formats) > 1 and len(self.formats) != len(self.models):
            raise RequestError(
                f"there are {len(self.formats)} formats and {len(self.models)} models; name one for all or one for each"
            )
        for name, allowed in (("log", LOGS), ("reasoning", REASONING)):
            one_of(getattr(self, name), allowed, name)
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise RequestError(f"otlp_endpoint is {self.otlp_endpoint!r}; it must begin with http:// or https://")
        self.options()

    def keyring(self) -> Keyring:
        """The clients that may ask.

        Raises:
            RequestError: An entry is not one; or there is none, and the address is one that others reach.
        """
        entries = (*self.api_keys, *(read_entries(self.api_key_file) if self.api_key_file else ()))
        if not entries and not self.allow_anonymous and not is_loopback(self.host):
            raise RequestError(
                f"{self.host} is reached by others and there is no API key: `plait serve --new-key NAME` makes one for"
                " --api-key-file; or say --allow-anonymous"
            )
        return Keyring(entries)

    def options(self) -> dict[str, Any]:
        """The engine's options, as values.

        Raises:
            RequestError: One is not of the form `NAME=VALUE`.
        """
        values: dict[str, Any] = {}
        for option in self.engine_options:
            assigned = assignment(option)
            if assigned is None or not assigned[0].isidentifier():
                raise RequestError(f"engine_options has {option!r}; each must be of the form NAME=VALUE")
            values.update([assigned])
        return values

    @property
    def hosts(self) -> frozenset[str]:
        """Names that the Host header may have."""
        return frozenset({"localhost", "127.0.0.1", "::1", self.host.lower(), *(h.lower() for h in self.allowed_hosts)})

    def budget(self, *, plain: bool) -> Budget:
        """The most that a request may use.

        Args:
            plain: Of a model that Plait did not train.
        """
        usual = None if plain else DEFAULT_TOKENS
        return Budget(
            max_threads=self.max_threads_per_request,
            max_threads_per_fork=self.max_threads_per_request,
            max_tokens=usual if self.max_tokens is None else self.max_tokens,
            deadline_s=self.request_timeout_s,
        )


_POSITIVE = (
    *("max_threads", "max_threads_per_key", "max_requests", "max_requests_per_key", "max_threads_per_request"),
    *("max_tokens", "request_timeout_s", "max_body_bytes", "max_header_bytes", "max_headers", "header_timeout_s"),
    *("body_timeout_s", "max_connections", "max_stream_bytes", "send_timeout_s", "engine_timeout_s", "keep_alive_s"),
)
_HINTS = get_type_hints(ServeConfig)
NAMES = tuple(f.name for f in fields(ServeConfig))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str], path: str | None = None) -> ServeConfig:
    """One config from all sources.

    Args:
        flags: What was said on the command line; None was not said.
        environ: Of its names, those that begin with `PLAIT_` and name a setting count.
        path: A TOML file.

    Raises:
        RequestError: A value is not of its setting's kind, a setting is not known, or the file cannot be read.
    """
    values = _read(path) if path else {}
    for name in NAMES:
        text = environ.get(f"{PREFIX}{name.upper()}")
        if text is not None:
            values[name] = _parse(name, text, f"{PREFIX}{name.upper()}")
    values |= {name: value for name, value in flags.items() if value is not None and value != ()}
    return ServeConfig(**values)


def _read(path: str) -> dict[str, Any]:
    data = read_toml(path)
    for name in data:
        one_of(name, NAMES, f"setting in {path}")
    return {name: fitted(_HINTS[name], value, name=name, where=path) for name, value in data.items()}


def _parse(name: str, text: str, where: str) -> Any:
    kind = kind_of(_HINTS[name])
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("1", "0", "true", "false"):
            raise RequestError(f"{where} is {text!r}; it must be true or false")
        return text.lower() in ("1", "true")
    try:
        return kind(text)
    except ValueError as exc:
        raise RequestError(f"{where} is {text!r}; it must be of type {kind.__name__}") from exc


def as_toml(config: ServeConfig) -> str:
    """A config as the file that would give it, without secrets: of key entries it shows whose they are."""
    lines: list[str] = []
    for name in NAMES:
        value = getattr(config, name)
        if value is None:
            lines.append(f"# {name} is not set")
        elif name == "api_keys":
            lines.append(f"# {name}: {', '.join(entry.partition(':')[0] for entry in value) or 'none'}")
        elif name == "cache_secret":
            lines.append(f"# {name} is set")
        else:
            lines.append(f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return "\n".join(lines)
