"""Pages for people keep their word: links lead somewhere, commands are those that CI runs, versions agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import plait

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for folder in (".", "docs", "examples") for p in (ROOT / folder).glob("*.md"))
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
    lanes = re.findall(r"(?:pytest|-m pytest) -m (\"[^\"]+\"|\w+)$", script, re.MULTILINE)
    assert len(lanes) == 4
    for lane in lanes:
        assert f"pytest -m {lane}" in page
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
