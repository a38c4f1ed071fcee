"""The `plait` command: parses and calls one function of `plait.commands`; turns errors into messages and exit codes.

Exit codes: 0 done; 1 it failed (no answer, broken weights, a full disk); 2 what was asked is not possible; 130 stopped
by Ctrl-C; 141 whoever read the output closed it. Everything heavier than click is imported when a command runs.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from plait import __version__

if TYPE_CHECKING:
    from plait.types import Budget

FAILED, REFUSED, STOPPED, CLOSED = 1, 2, 130, 141


class Plait(click.Group):
    """The group of all commands; the one place that turns exceptions into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
            sys.stdout.flush()
        except (click.Abort, KeyboardInterrupt):
            code = _say("stopped", STOPPED)
        except click.exceptions.NoArgsIsHelpError as exc:
            exc.show()
            code = REFUSED
        except click.ClickException as exc:
            exc.show()
            code = exc.exit_code
        except OSError as exc:
            code = _os_error(exc)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        from plait.errors import PlaitError, RequestError

        try:
            return super().invoke(ctx)
        except RequestError as exc:
            return _say(str(exc), REFUSED)
        except PlaitError as exc:
            return _say("\n".join([str(exc), *getattr(exc, "__notes__", [])]), FAILED)
        except OSError as exc:
            # Not left to click, which ends a closed pipe with its own exit code.
            return _os_error(exc)


def _os_error(exc: OSError) -> int:
    if exc.errno == errno.EPIPE:
        # The interpreter flushes standard output once more as it ends; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    code = _say(f"{exc.filename or 'standard output'}: {exc.strerror or exc}", FAILED)
    if exc.errno == errno.ENOSPC and exc.filename is None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _say(message: str, code: int) -> int:
    click.echo(f"plait: {message}", err=True)
    return code


def _lines(text: str) -> str:
    r"""Help that keeps its line breaks: click's mark before every paragraph."""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in text.strip().split("\n\n"))


@click.group(
    cls=Plait,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=_lines("""
Adaptive parallel reasoning: a model splits a problem into threads and joins them again.

plait solve "What is 347 * 526?"            watch it split, think side by side, and answer
plait solve "What is 347 * 526?" --compare  against its twin, trained to think in one line
plait solve "What is 347 * 526?" --trace run.jsonl && plait view run.jsonl
plait tasks                                 what the embedded model knows
plait eval --family long_multiplication -n 100 --compare
plait serve                                 OpenAI's API and a page, on http://127.0.0.1:8000

`plait COMMAND --help` has examples of each.
"""),
    epilog="Exit codes: 0 done, 1 failed, 2 not possible as asked, 130 Ctrl-C, 141 closed pipe. Extras: "
    "pip install '.[NAME]' in a clone of Plait.",
)
@click.version_option(__version__, "--version", message="plait %(version)s")
def main() -> None:
    pass


_MODEL = click.option("--model", metavar="NAME|PATH", help="Embedded model, a GGUF file, or a folder of transformers.")
_ENGINE = click.option(
    "--engine",
    metavar="NAME|URL",
    help="llamacpp; torch; NAME:PATH with its weights; http://HOST:PORT; or scripted: gold traces, no model. "
    "See `plait engines`.",
)
_ENGINE_OPTION = click.option(
    "--engine-option",
    "engine_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of that engine: cells=16384, speculate=4; see `plait engines NAME`. May be repeated.",
)
_TWIN = click.option("--twin", metavar="NAME|PATH", help="The twin, where it is not the model's own.")
_KNOBS = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="FAMILY.KNOB=VALUE",
    help="Draw other problems; see `plait tasks NAME`. May be repeated.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@main.command(
    help=_lines("""
Answer one question, and show how.

plait solve "What is 347 * 526?"
plait solve "What is 347 * 52, 88 + 977 and 612 * 34?" --compare
echo "What is 34 * 27 + 58 * 16?" | plait solve -
plait solve "What is 4631 * 8274?" --json --trace run.jsonl

Threads are shown side by side on a terminal, as plain lines elsewhere.
`plait tasks` lists what can be asked.
""")
)
@click.argument("question")
@click.option("--compare", is_flag=True, help="Run the sequential twin too; show the ratio.")
@_JSON
@click.option("--trace", type=click.Path(dir_okay=False), metavar="FILE", help="Log the run for `plait view`.")
@_MODEL
@_ENGINE
@_ENGINE_OPTION
@_TWIN
@click.option("--format", metavar="NAME", help="Refuse weights trained in another format.")
@click.option("--max-threads", type=int, metavar="N", help="Forked threads at most; 0: no fork.")
@click.option("--max-tokens", type=int, metavar="N", help="Tokens at most, all threads together.")
@click.option("--deadline", type=float, metavar="S", help="Seconds at most.")
@click.option(
    "--conditioned/--unconditioned", default=None, help="Say the budget in the prompt; default: as it was trained."
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), metavar="T", default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Same seed, same run.")
@click.option(
    "--pace",
    type=click.Choice(["auto", "real", "slow"]),
    default="auto",
    show_default=True,
    help="auto replays what was too fast to watch.",
)
@click.option("--lanes/--plain", default=None, help="Panes, or lines; default: as output is.")
@click.option("--check", is_flag=True, help="Grade the answer; exit code 1 if wrong.")
def solve(
    question: str, max_threads: int | None, max_tokens: int | None, deadline: float | None, **options: Any
) -> int:
    from plait.commands.solve import Options
    from plait.commands.solve import solve as run

    if question == "-":
        question = sys.stdin.read().strip()
    return run(question, Options(budget=_budget(max_threads, max_tokens, deadline), **options))


@main.command(
    "eval",
    help=_lines("""
Run held-out problems and print what came of them.

plait eval -n 100                   every family the model was trained on
plait eval --family product,bundle -n 500 --out results.jsonl
plait eval --compare -n 200         against the twin, in turn, one at a time
plait eval -n 200 --against sequential,forced-sequential,majority@8,pass@8

Accuracy with its interval, fork decisions, tokens, critical path, wall time.
With --out each result is written at once, and the same command goes on later.
"""),
)
@click.option(
    "--family", "families", default="all", show_default=True, metavar="NAME[,NAME]", help="See `plait tasks`."
)
@click.option(
    "-n", "n", type=click.IntRange(min=1), metavar="N", default=500, show_default=True, help="Problems of each family."
)
@click.option("--compare", is_flag=True, help="Run the sequential twin too, in turn; batch 1.")
@click.option(
    "--against",
    default="",
    metavar="METHOD[,..]",
    help="sequential, forced-sequential, always-fork, majority@N, best@N, pass@N.",
)
@click.option("--temperature", type=float, metavar="T", help="Of methods of --against that sample; default 0.7.")
@_JSON
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE", help="Results as JSONL; resumed if it exists.")
@click.option("--trace", type=click.Path(dir_okay=False), metavar="FILE", help="Log every run, for `plait view`.")
@_MODEL
@_ENGINE
@_ENGINE_OPTION
@_TWIN
@click.option("--concurrency", type=click.IntRange(min=1), metavar="N", help="At once; default 16, with --compare 1.")
@click.option("--max-threads", type=int, metavar="N", help="Forked threads of a run at most.")
@click.option("--max-tokens", type=int, metavar="N", help="Tokens of a run at most.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Which problems are drawn.")
@click.option(
    "--split",
    type=click.Choice(["held_out", "train"]),
    default="held_out",
    show_default=True,
    help="Problems that training never draws, or those it does.",
)
@_KNOBS
def evaluate(
    families: str,
    against: str,
    max_threads: int | None,
    max_tokens: int | None,
    **options: Any,
) -> int:
    from plait.commands.evaluate import Options, evaluation

    names, methods = _names(families), _names(against)
    budget = _budget(max_threads, max_tokens)
    return evaluation(Options(families=names, against=methods, budget=budget, **options))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _budget(max_threads: int | None, max_tokens: int | None, deadline_s: float | None = None) -> Budget:
    """The default limits, where nothing else was said."""
    from plait.types import Budget

    limits = {"max_threads": max_threads, "max_tokens": max_tokens, "deadline_s": deadline_s}
    return Budget(**{name: value for name, value in limits.items() if value is not None})


@main.group(
    help=_lines("""
Read logs of runs.

plait solve "What is 347 * 526?" --trace run.jsonl
plait trace show run.jsonl
""")
)
def trace() -> None:
    pass


@trace.command(
    help=_lines("""
Print the tree of a run that `plait solve --trace FILE` logged.

plait trace show run.jsonl
plait trace show run.jsonl --wire      to the token: what each engine call was given and sampled

A log that was cut off is read up to its last whole line.
""")
)
@click.argument("file", type=click.Path(dir_okay=False))
@_JSON
@click.option("--wire", is_flag=True, help="Control tokens, and what the runtime wrote.")
@click.option("--lanes/--plain", default=None, help="With or without the timeline.")
def show(file: str, as_json: bool, wire: bool, lanes: bool | None) -> int:
    from plait.commands.trace import show as run

    return run(file, as_json=as_json, wire=wire, lanes=lanes)


@main.command(
    short_help="Look at runs in the browser.",
    help=_lines("""
Look at runs in the browser: lanes, text, tokens; many runs as a table, two as a race.

plait view run.jsonl                    what `plait solve --trace` logged
plait view results.jsonl                what `plait eval --out` wrote
plait view run.jsonl --html run.html    one file to share, nothing is loaded from elsewhere
plait view run.jsonl --export chrome-trace --out run.json    opens in Perfetto
"""),
)
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Write the page to a file.")
@click.option("--export", type=click.Choice(["chrome-trace", "otlp", "inspect"]), help="Write runs for another tool.")
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE", help="Of --export; default: standard output.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="N", help="On 127.0.0.1; default: any.")
@click.option("--browser/--no-browser", default=True, help="Open a browser.")
def view(files: tuple[str, ...], **options: Any) -> int:
    from plait.commands.view import view as run

    return run(files, **options)


@main.group(
    short_help="Train models, by gold traces or by reward.",
    help=_lines("""
Train models (needs the extra `train`).

plait train sft configs/sft_multiverse.toml --out runs/adaptive
plait train rl configs/rl_pgrpo.toml --set init=runs/adaptive/checkpoint.pt --out runs/pgrpo

The configs are in a checkout; docs/training.md says what is in them.
"""),
)
def train() -> None:
    pass


_CONFIG = click.argument("config", type=click.Path(dir_okay=False))
_OUT = click.option(
    "--out", type=click.Path(file_okay=False), metavar="FOLDER", help="Run folder; default runs/CONFIG."
)
_RESUME = click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Go on with what the folder holds."
)
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Print the resolved config and stop.")
_SET = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the config: optimiser.lr=1e-4. May be repeated.",
)


@train.command(
    short_help="Train a model on gold traces.",
    help=_lines("""
Train a model on gold traces; the same command goes on with a run that was stopped.

plait train sft configs/sft_multiverse.toml --out runs/adaptive
plait train sft configs/sft_multiverse.toml --set schedule.tokens=2000000 --dry-run

The run folder holds the resolved config, the checkpoint, metrics.jsonl, and
model.gguf, which `--model` takes.
"""),
)
@_CONFIG
@_OUT
@_RESUME
@_DRY_RUN
@_SET
@click.option(
    "--decode",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    metavar="N",
    help="Problems of each family that an evaluation solves; 0: it scores traces only.",
)
def sft(config: str, **options: Any) -> int:
    from plait.commands.train import train_sft

    return train_sft(config, **options)


@train.command(
    short_help="Train a model by reward.",
    help=_lines("""
Train a model by reward, from the checkpoint that its config names.

plait train rl configs/rl_pgrpo.toml --out runs/pgrpo
plait train rl configs/rl_pgrpo.toml --set init=runs/mine/checkpoint.pt --set rollout.engine=torch

The run folder holds what that of `train sft` does, and samples/: logs of rollouts
for `plait trace show`. The same command goes on with a run that was stopped.
"""),
)
@_CONFIG
@_OUT
@_RESUME
@_DRY_RUN
@_SET
def rl(config: str, **options: Any) -> int:
    from plait.commands.train import train_rl

    return train_rl(config, **options)


@main.command(
    short_help="Serve models over HTTP, as OpenAI does.",
    help=_lines("""
Serve models over HTTP, as OpenAI's clients speak it (needs the extra `serve`).

plait serve                                  the embedded model, on http://127.0.0.1:8000
plait serve --new-key alice                  print a key, and the entry for --api-key-file
plait serve --config serve.toml --print-config
plait serve --engine llamacpp:FILE.gguf --format sequential
plait serve --model FOLDER --format threadweaver --engine http://localhost:8001

The last two serve a model of your own: a GGUF file, or a transformers folder, here on vLLM.
Settings come from flags, then PLAIT_* variables, then the file: docs/serving.md lists them.
SIGTERM lets running requests end; a second one does not.
"""),
)
@click.option("--host", metavar="ADDRESS", help="Default 127.0.0.1.")
@click.option("--port", type=int, metavar="N", help="Default 8000; 0: any free one.")
@click.option(
    "--model", "models", multiple=True, metavar="NAME|PATH", help="May be repeated; the first is the default."
)
@click.option(
    "--format", "formats", multiple=True, metavar="NAME", help="Of weights that do not say theirs; one, or one each."
)
@_ENGINE
@_ENGINE_OPTION
@click.option("--api-key-file", metavar="FILE", help="Entries of --new-key, one a line.")
@click.option("--allow-anonymous", is_flag=True, default=None, help="No keys on an address that others reach.")
@click.option("--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="A name of this server; *: any.")
@click.option("--max-threads", type=int, metavar="N", help="Threads that sample at once; default: what fits.")
@click.option("--max-requests", type=int, metavar="N", help="Requests at once, waiting ones too; default 256.")
@click.option("--drain-s", type=float, metavar="S", help="For what runs, after SIGTERM; default 30.")
@click.option("--log", metavar="KIND", help="json, plain or off; default: plain on a terminal.")
@click.option("--config", type=click.Path(dir_okay=False), metavar="FILE", help="Settings as TOML.")
@click.option("--print-config", is_flag=True, help="Print what all settings come to, and stop.")
@click.option("--new-key", metavar="NAME", help="Print a fresh API key and its entry, and stop.")
def serve(new_key: str | None, config: str | None, print_config: bool, **flags: Any) -> int:
    from plait.commands.serve import key
    from plait.commands.serve import serve as run

    if new_key is not None:
        return key(new_key)
    return run(flags, config=config, print_config=print_config)


@main.command(
    short_help="Examine an inference server.",
    help=_lines("""
Examine servers: what they are, whether forks are cheap there, what to change.

plait doctor --engine http://localhost:8000              (needs the extra `http`)
plait doctor --engine http://a:8000,http://b:8000 --json

Sends twenty to thirty calls. An API key is read from PLAIT_ENGINE_KEY.
"""),
)
@click.option("--engine", metavar="URL[,URL]", required=True, help="vLLM, SGLang, llama-server, or the like.")
@click.option("--kind", metavar="KIND", help="vllm, sglang, llama-server, completions: what a router hides.")
@click.option("--model", metavar="NAME", help="Where a server has several.")
@_JSON
def doctor(engine: str, **options: Any) -> int:
    from plait.commands.doctor import doctor as run

    return run(engine, **options)


@main.group(
    short_help="Measure a server under load.",
    help=_lines("""
Measure servers (needs the extra `http`).

plait bench load --url http://127.0.0.1:8000 --rates 1,4,16
"""),
)
def bench() -> None:
    pass


@bench.command(
    short_help="Offer requests at fixed rates.",
    help=_lines("""
Offer requests at fixed rates; print throughput, latency and fork rate for each.

plait bench load                                   the server on http://127.0.0.1:8000
plait bench load --url http://host:8000 --rates 1,4,16,64 --seconds 20
plait bench load --family long_multiplication --json

Arrivals do not wait for answers, so a server that cannot keep up shows its queue.
An API key is read from PLAIT_API_KEY.
"""),
)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, metavar="URL", help="Without /v1.")
@click.option("--rates", default="1,2,4,8", show_default=True, metavar="N[,N]", help="Requests a second.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True, metavar="S", help="For each rate."
)
@click.option("--model", metavar="NAME", help="Default: the server's.")
@click.option("--family", "families", multiple=True, metavar="NAME", help="What is asked; default: all families.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of arrivals and questions.")
@_JSON
def load(**options: Any) -> int:
    from plait.commands.load import load as run

    return run(**options)


@main.command(
    help=_lines("""
List the embedded models, or describe one.

plait models plait-tiny                  what it was trained on, and its scores
plait models runs/adaptive/model.gguf    the same of one that `plait train` wrote
""")
)
@click.argument("name", required=False)
@_JSON
def models(name: str | None, as_json: bool) -> int:
    from plait.commands.lists import models as run

    return run(name, as_json=as_json)


@main.command(
    short_help="List the trajectory formats.",
    help=_lines("""
List the trajectory formats: how each joins threads, and its paper.

plait formats --json     with the tags that a vocabulary must have
"""),
)
@_JSON
def formats(as_json: bool) -> int:
    from plait.commands.lists import formats as run

    return run(as_json=as_json)


@main.command(
    help=_lines("""
List the engines, or what `--engine-option` sets of one.

plait engines llamacpp
""")
)
@click.argument("name", required=False)
@_JSON
def engines(name: str | None, as_json: bool) -> int:
    from plait.commands.lists import engines as run

    return run(name, as_json=as_json)


_FORMAT = click.option("--format", metavar="NAME", help="Of lines that do not name one.")
_CONCLUSION = click.option("--conclusion", is_flag=True, help="ThreadWeaver's older form, with a conclusion.")


@main.command(
    short_help="Check a data set of trajectories.",
    help=_lines("""
Check a data set of trajectories: JSON lines with `text`, and perhaps `format`.

plait validate traces.jsonl --format threadweaver

Says line and column of what is wrong; exit code 1 if anything is.
"""),
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@_FORMAT
@_CONCLUSION
@_JSON
def validate(file: str, format: str | None, conclusion: bool, as_json: bool) -> int:
    from plait.commands.traces import validate as run

    return run(file, format=format, conclusion=conclusion, as_json=as_json)


@main.command(
    short_help="Write trajectories in another format.",
    help=_lines("""
Write a data set of trajectories in another format, where the meaning allows.

plait convert traces.jsonl --format threadweaver --to plait --out plait.jsonl
plait convert plait.jsonl --to sequential

Lines without a form in it are named and left out; the exit code is then 1.
"""),
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--to", required=True, metavar="NAME", help="See `plait formats`.")
@_FORMAT
@_CONCLUSION
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE", help="Default: standard output.")
def convert(file: str, to: str, format: str | None, conclusion: bool, out: str | None) -> int:
    from plait.commands.traces import convert as run

    return run(file, to=to, format=format, conclusion=conclusion, out=out)


@main.command(
    help=_lines("""
List the problem families: what can be asked.

plait tasks countdown --sample 2       its knobs, and examples with their gold traces
plait tasks product --set product.factors=[5,8] --sample 1
""")
)
@click.argument("family", required=False)
@click.option("--sample", type=click.IntRange(min=0), default=0, metavar="N", help="Examples with gold traces.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Which examples.")
@_KNOBS
@_JSON
def tasks(family: str | None, **options: Any) -> int:
    from plait.commands.lists import families

    return families(family=family, **options)


if __name__ == "__main__":
    main()
