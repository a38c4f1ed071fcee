"""The README keeps its word: its code runs on the model that ships, and the files it names are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_and_answers() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{4631 * 8274}")


def test_every_file_that_the_pages_name_is_there() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_every_command_that_the_readme_shows_is_one() -> None:
    from plait.cli import main

    shown = set(re.findall(r"^ {4}plait (\w+)", README, re.MULTILINE))
    assert shown
    assert shown <= set(main.commands)


def test_ci_runs_the_readme_s_test_command() -> None:
    assert "bash scripts/test" in README
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()
