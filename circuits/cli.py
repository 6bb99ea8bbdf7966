"""The command line: `circuits study`, `train`, `discover`, `explain`, `report`, `bench`, `calibrate` and `list`.

Nothing here imports torch before a command runs, and `circuits --help` not even the parser of arguments, so that it
answers at once. The commands are functions in `_commands.py`.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence

from circuits.errors import CircuitsError, UnknownName

COMMANDS = {
    "study": "Train and analyse a grid of tasks, recipes and seeds, and write its table and report.",
    "train": "Train one network on one task with one objective.",
    "discover": "Find which edges of a trained network matter, and how faithful the top of them is.",
    "explain": "Say which mechanism a trained network learned, with the evidence.",
    "report": "Write a study's table and report again from what is on disk.",
    "bench": "Hold discovery methods to models whose circuit is known: accuracy, faithfulness, stability, cost.",
    "calibrate": "Judge models that were built to have a known mechanism, and say how often the verdict is right.",
    "list": "Show what there is, a line each: tasks, games, objectives, methods, tests, probes, presets, models.",
}
"""Each command, with the first line of its function's docstring."""
_FUNCTIONS = {"list": "list_names"}
DESCRIPTION = (
    "Find out by experiment which training objective makes a transformer learn an algorithm, a lookup table or a bag "
    "of heuristics."
)
INTERRUPTED = 130
_GO_ON = {
    "bench": ": the same command goes on where it stopped",
    "calibrate": ": the same command goes on where it stopped",
    "study": ": the same command goes on where it stopped",
    "train": ": the same command with --resume goes on where it stopped",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of a command: 0, 1 where runs of a study failed, 2 for bad input, 130 after Ctrl-C.

    Runs of a study that failed by bad input alone are bad input.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
            raise UnknownName("command", arguments[0], COMMANDS)
        if arguments in (["--help"], ["-h"]):
            print(_help())
            return 0
        from circuits import _commands
        from circuits._arguments import parse

        functions = {name: getattr(_commands, _FUNCTIONS.get(name, name)) for name in COMMANDS}
        return parse(functions, arguments, description=DESCRIPTION)()
    except CircuitsError as error:
        print(f"circuits: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ncircuits: interrupted{_GO_ON.get(arguments[0], '')}", file=sys.stderr)
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        print("circuits: there is not enough memory for this: choose smaller sizes", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # a reader such as `head` has gone; python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # most become a StorageError where they arise; what is left is still the system's, not ours
        about = f"{error.filename}: " if error.filename else ""
        print(f"circuits: {about}{' '.join((error.strerror or str(error)).split())}", file=sys.stderr)
        return 2


def _help() -> str:
    """What `circuits --help` prints."""
    wrap = textwrap.TextWrapper(width=100, initial_indent="  ", subsequent_indent=" " * 14)
    lines = [wrap.fill(f"{name:<12}{summary}") for name, summary in COMMANDS.items()]
    usage = f"usage: circuits [-h] {{{','.join(COMMANDS)}}} ..."
    return "\n".join(
        [usage, "", textwrap.fill(DESCRIPTION, 100), "", *lines, "", "circuits COMMAND --help has the rest."]
    )


if __name__ == "__main__":
    sys.exit(main())
