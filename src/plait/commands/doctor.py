"""`plait doctor`: what answers at the address of an engine, whether it can be one, and what would make forks cheap."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import anyio

from plait.engines import engine_class, is_address
from plait.errors import PlaitError, RequestError, without_password


def doctor(engine: str, *, kind: str | None = None, model: str | None = None, as_json: bool = False) -> int:
    """Examine servers and print what was found; with `as_json` one object.

    Args:
        engine: Addresses, separated by commas.
        kind: What is there, where a router hides it.
        model: Where a server has several.

    Returns:
        The exit code: 0, or 1 where a server cannot be reached or breaks the engine contract.

    Raises:
        RequestError: An address is none.
        EngineUnavailable: The http extra is not installed.
    """
    if not is_address(engine):
        raise RequestError(
            f"{without_password(engine)!r} is no address; doctor examines servers: --engine http://HOST:PORT"
        )
    urls = engine_class("http")(engine).urls
    reports = [anyio.run(_examine, url, kind, model) for url in urls]
    if as_json:
        print(json.dumps({"ok": all(r["ok"] for r in reports), "engines": reports}))
    else:
        print("\n\n".join("\n".join(_lines(report)) for report in reports))
    return 0 if all(r["ok"] for r in reports) else 1


async def _examine(url: str, kind: str | None, model: str | None) -> dict[str, Any]:
    from plait.engines.http import HttpEngine
    from plait.engines.http.diagnosis import diagnose

    try:
        async with HttpEngine(url, kind=kind, model=model) as engine:
            found = await diagnose(engine)
    except PlaitError as exc:
        return {"url": url, "ok": False, "error": str(exc)}
    return {"url": url, "ok": found.usable, **asdict(found)}


def _lines(report: dict[str, Any]) -> list[str]:
    if "error" in report:
        return [report["url"], f"  not usable       {report['error']}"]
    server, fork = report["server"], report["fork"]
    lines = [report["url"]]
    version = f" {server['version']}" if server["version"] else ""
    lines.append(f"  server           {server['kind']}{version}, model {server['model'] or 'unnamed'}")
    lines.append(f"  route            {server['route']}")
    assumed = "" if server["max_context"] else " (assumed: it does not say)"
    lines.append(f"  context          {report['max_context']:,} tokens{assumed}")
    if server["num_slots"]:
        lines.append(f"  at once          {server['num_slots']} sequences")
    for check in report["checks"]:
        word = {True: "yes", False: "NO", None: "not seen"}[check["holds"]]
        lines.append(f"  {check['name']:<16} {word}{': ' if check['note'] else ''}{check['note']}")
    if fork is not None:
        lines += _fork_lines(fork)
    return [*lines, *(f"  change           {line}" for line in report["advice"])]


def _fork_lines(fork: dict[str, Any]) -> list[str]:
    return [
        f"  fork             {fork['prefix_tokens']} tokens into {fork['branches']}: first token after "
        f"{_ms(fork['first_s'])}, {_ms(fork['again_s'])} in a second fork; cold {_ms(fork['cold_s'])}",
        f"  prefix cache     {_share(fork['first_reused_tokens'], fork)} of a branch's prompt found, "
        f"{_share(fork['again_reused_tokens'], fork)} in a second fork",
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _share(tokens: float | None, fork: dict[str, Any]) -> str:
    return "an unknown part" if tokens is None else f"{tokens:.0f} of {fork['prefix_tokens']} tokens"
