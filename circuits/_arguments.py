"""Command-line arguments by tyro, with what is wrong with them in one line."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from circuits.errors import BadInput

_ASIDES = ("For full helptext", "Argument helptext", "circuits ")
"""How the lines of tyro's box begin that say where to read more; the last one stands alone under the first."""


def parse(
    commands: Mapping[str, Callable[..., int]], arguments: Sequence[str], *, description: str
) -> Callable[[], int]:
    """The command that the arguments ask for, ready to run.

    Raises:
        BadInput: they ask for none; tyro's box of lines, as one.
        SystemExit: they ask for help, which has been printed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            ready: Callable[[], int] = tyro.extras.subcommand_cli_from_dict(
                {name: _ready(command) for name, command in commands.items()},
                prog="circuits",
                description=description,
                args=list(arguments),
            )
        return ready
    except SystemExit as end:
        if not end.code:
            raise
    raise BadInput(_one_line(said.getvalue(), arguments[0] if arguments and arguments[0] in commands else ""))


def _ready(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """A command's twin that only notes its arguments: what it prints and raises is no matter of parsing."""

    @functools.wraps(command)
    def noted(*args: Any, **options: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **options)

    return noted


def _one_line(box: str, command: str) -> str:
    """What stands in tyro's box, without its frame, title and asides, and where to read more."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("╭╮╰╯│|+ ─") for line in plain.splitlines()]
    _title, *words = [line for line in lines if line.strip("- ") and not line.startswith(_ASIDES)] or [""]
    return f"{' '.join(words)}: see circuits {command + ' ' if command else ''}--help"
