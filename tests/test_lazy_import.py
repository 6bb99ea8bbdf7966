"""What must not be loaded: the package's import and the command line's help stay light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformer_lens", "pandas", "scipy", "sklearn", "plotly", "networkx"}

RUN = """
import json, sys
{code}
print("LOADED " + json.dumps(sorted(m for m in sys.modules if "." not in m)))
"""


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after some code."""
    done = subprocess.run([sys.executable, "-c", RUN.format(code=code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rsplit("LOADED ", 1)[1]))


def command(*arguments: str) -> str:
    """Return code that runs the command line in-process and goes on."""
    return f"""
sys.argv = ["circuits", *{list(arguments)!r}]
import circuits.cli
try:
    circuits.cli.main()
except SystemExit as end:
    assert not end.code, end.code
"""


def test_import_loads_no_tensor_library() -> None:
    loaded = loaded_after("import circuits; dir(circuits)")
    assert "circuits" in loaded
    assert not loaded & (HEAVY | {"numpy", "tyro"})


@pytest.mark.parametrize("arguments", [["--help"], ["study", "--help"], ["train", "--help"]], ids=" ".join)
def test_help_loads_no_tensor_library(arguments: list[str]) -> None:
    loaded = loaded_after(command(*arguments))
    assert "circuits" in loaded
    assert not loaded & HEAVY


def test_tasks_and_training_leave_plotting_alone() -> None:
    assert not loaded_after("import circuits; circuits.tasks") & {"transformer_lens", "plotly", "pandas"}


def test_public_names_exist() -> None:
    code = "import circuits\nfor name in circuits.__all__: getattr(circuits, name)\nassert circuits.__version__"
    assert {"circuits", "torch"} <= loaded_after(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import circuits

    with pytest.raises(AttributeError, match="no_such_thing"):
        circuits.no_such_thing  # noqa: B018
