"""CLAVER on Kinetics-400, or on any labelled videos. Without a command: demo."""

from __future__ import annotations

import sys

from claver.command_line import run_command
from claver.commands import COMMANDS


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors that the user can mend are printed without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return run_command(COMMANDS, arguments, description=__doc__ or "", default="demo")


if __name__ == "__main__":
    sys.exit(main())
