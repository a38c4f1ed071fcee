"""Pages for people keep their word: links lead somewhere, commands are those that CI runs, versions agree."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

import plait
from plait.cli import main

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "docs", "examples", "benchmarks/results", "src/plait/models/weights")
PAGES = sorted(p for folder in FOLDERS for p in (ROOT / folder).glob("*.md"))
NAMES_OF_OTHERS = {
    *("TreeRow", "enable_tree_training", "hogwild_llm"),  # other projects
    *("PrefixCacheAffinityRouter", "request_router", "request_router_class"),
    *("cache_aware", "consistent_hash", "consistent_hashing"),
    *("VLLM_CPU_NUM_OF_RESERVED_CPU", "create_task", "seq_cp"),
    *("MyFormat", "name_or_address", "ten_thousand", "step000020_320_0"),  # a reader's own, part of a name, an example
}
TEXTS = ("", ".js", ".py", ".sh", ".toml", ".yaml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def anchors(page: Path) -> set[str]:
    """What links may name: the headings, as GitHub spells them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name} names {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} names #{anchor} of {there.name}"


def test_contributing_has_the_commands_of_the_test_script() -> None:
    script = (ROOT / "scripts" / "test").read_text(encoding="utf-8")
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lanes = re.findall(r"-m pytest ((?:-n 2 )?-m (?:\"[^\"]+\"|\w+))$", script, re.MULTILINE)
    assert len(lanes) == 4
    for lane in lanes:
        assert f"pytest {lane}" in page
    for command in ("ruff format --check .", "ruff check .", "pyright"):
        assert command in script
        assert command in page
    assert "bash scripts/test" in page


def test_citation_changelog_and_package_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    said = dict(re.findall(r"^([\w-]+): (.+)$", citation, re.MULTILINE))
    assert (said["version"], said["license"]) == (PROJECT["version"], PROJECT["license"])
    assert PROJECT["version"] == plait.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]


def test_what_a_checkout_has_is_in_the_source_archive() -> None:
    archive = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    for name in ("examples", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "README.md", "LICENSE"):
        assert name in archive["sdist"]["include"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_on_pages_have_the_options_they_are_shown_with(page: Path) -> None:
    check_commands(page.read_text(encoding="utf-8"))


def test_every_command_s_help_shows_how_it_is_called() -> None:
    def walk(group: click.Group, called: str) -> None:
        for name, command in group.commands.items():
            text = (command.help or "").replace("\b\n", "")
            assert f"\nplait {called}{name} " in text or f"\nplait {called}{name}\n" in text, name
            check_commands(text)
            if isinstance(command, click.Group):
                walk(command, f"{called}{name} ")

    walk(main, "")


def check_commands(text: str) -> None:
    for shown in commands(text):
        words, command = shlex.split(shown, comments=True), main
        while words and isinstance(command, click.Group):
            assert words[0] in command.commands, f"`plait {shown}`: there is no command {words[0]}"
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            option = word.partition("=")[0]
            assert not re.match(r"--?[a-z]", option) or option in known | {"--help"}, f"`plait {shown}`: {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_in_code_are_in_the_repository(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        if re.fullmatch(r"(?:src|tests|docs|benchmarks|configs|deploy|scripts|examples)/[\w./*-]+", code):
            assert list(ROOT.glob(code.rstrip("/"))), f"there is no {code}"
            continue
        for name in re.findall(r"[A-Za-z_]\w*", code):
            if re.search(r"[a-z]_\w|[a-z][A-Z]", name):
                # Prometheus' client puts `_total` behind the names of counters.
                known = {name, name.removesuffix("_total")} & (source_names() | NAMES_OF_OTHERS)
                assert known, f"`{code}`: nothing is called {name}"


def commands(text: str) -> Iterator[str]:
    """What follows `plait` in code, up to the words that explain it."""
    lines = re.findall(r"^(?: {4}|\$ )?((?:\S*/)?plait [a-z].*)$", text, re.MULTILINE)
    spans = re.findall(r"`(plait [a-z][^`\n]*)`", text)
    for code in (*lines, *spans):
        shown = re.split(r" {2,}| [|>] ", code)[0].partition("plait ")[2]
        if shown.split()[0] in main.commands and shown.count('"') % 2 == 0:
            yield shown


@cache
def source_names() -> set[str]:
    """Every word of what is no page: code, configs, scripts; and the names of files."""
    folders = ("src", "tests", "benchmarks", "configs", "deploy", "scripts", "examples")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and p != Path(__file__)]
    texts = [p.read_text(encoding="utf-8") for p in files if p.suffix in TEXTS]
    return set(re.findall(r"[A-Za-z_]\w*", "\n".join((*map(str, files), *texts))))
