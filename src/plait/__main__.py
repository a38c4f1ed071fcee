"""`python -m plait` is `plait`."""

from plait.cli import main

main(prog_name="plait")
