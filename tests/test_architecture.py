"""The rules of the house, held by reading the source: layers, sizes, docstrings, honest tests, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "circuits"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))

# What docs/architecture.md says in words below and beside its table.
SIBLINGS_ALLOWED = {("model", part) for part in ("_layers", "_convert", "_io")} | {
    ("reference", "tasks"),
    ("reference", "model"),
    ("_decoding", "tasks"),
    ("runs", "objectives"),
    ("cli", "_commands"),
    ("cli", "_arguments"),
    ("_commands", "_printing"),
}
NEVER = {"objectives", "runs", "training"}
STANDS_ALONE = {"discovery", "mechanisms", "worldmodels"}
# The report of a study is written on first use: the one call upwards, and only from inside a function.
LATE_BOUND = ("study", "report")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """Return the name under ``circuits/`` that stands in the layer table: a folder, or a file without ``.py``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_table(text: str) -> dict[str, int]:
    """Return the row of each part, from the table's backticked names that end in ``/`` or ``.py``."""
    rows: dict[str, int] = {}
    for number, cell in re.findall(r"^\| (\d) \| (.+?) \|$", text, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)(?:/|\.py)`", cell):
            assert name not in rows, f"{name} stands twice in the table"
            rows[name] = int(number)
    return rows


LAYERS = layer_table((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))


def imported_parts(tree: ast.AST, package: str) -> Iterator[tuple[str, ast.stmt | ast.expr]]:
    """Yield each part of ``circuits`` that a module imports, anywhere in it, with the node that does."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"circuits.{alias.name}" for alias in node.names] if base == "circuits" else [base]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        for name in names:
            if name.startswith("circuits."):
                yield name.split(".")[1], node


def broken_imports(path: Path) -> list[str]:
    """Return one line per import of a file that the layer table forbids."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    in_functions = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    own = part_of(path)
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = []
    for part, node in imported_parts(tree, package):
        where = f"{relative(path)}:{node.lineno}"
        if part in (own, "errors", "__version__"):
            continue
        if part not in LAYERS:
            found.append(f"{where}: {part} is not in the layer table")
        elif own in STANDS_ALONE and part in NEVER:
            found.append(f"{where}: {own} must work without {part}")
        elif (own, part) == LATE_BOUND and id(node) in in_functions:
            continue
        elif LAYERS[part] >= LAYERS[own] and (own, part) not in SIBLINGS_ALLOWED:
            found.append(f"{where}: {own} (row {LAYERS[own]}) imports {part} (row {LAYERS[part]})")
    return found


def test_every_part_of_the_package_stands_in_the_layer_table() -> None:
    parts = {part_of(path) for path in SOURCES} - {"__init__"}
    assert parts == set(LAYERS)


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) != "__init__"], ids=relative)
def test_imports_follow_the_layers(path: Path) -> None:
    assert broken_imports(path) == []


def test_the_layer_check_sees_a_wrong_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = {
        "tasks/bad.py": "from circuits.model import Transformer",
        "discovery/bad.py": "def f():\n    from circuits import runs",
        "mechanisms/bad.py": "from ..training.loop import steps",
        "study/bad.py": "from circuits import report",
        "study/good.py": "def f():\n    from circuits import report",
        "reference/good.py": "from circuits.model import Transformer\nfrom . import other",
        "plots/bad.py": "import importlib\nimportlib.import_module('circuits.study')",
    }
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "circuits")
    for name, text in source.items():
        path = tmp_path / "circuits" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        assert len(broken_imports(path)) == (1 if "bad" in name else 0), name


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450, "split the file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            text_lines = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            lines = (node.end_lineno or 0) - node.lineno + 1 - text_lines
            assert lines <= 55, f"{node.name} at line {node.lineno} has {lines} lines beside its docstring: split it"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_public_name_is_documented(path: Path) -> None:
    def missing(node: ast.AST, prefix: str = "") -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if child.name.startswith("_"):
                continue
            if ast.get_docstring(child) is None:
                yield prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from missing(child, f"{prefix}{child.name}.")

    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(missing(tree)) == []
    assert ast.get_docstring(tree) is not None, "the module says nothing of what it is for"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_error_is_swallowed_and_nothing_is_left_unwritten(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert not all(isinstance(line, ast.Pass) for line in node.body), f"line {node.lineno} swallows an error"
            assert node.type is not None, f"line {node.lineno}: a bare except catches Ctrl-C too"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "NotImplementedError" not in ast.dump(node.exc), f"line {node.lineno} is a stub"


@pytest.mark.parametrize("path", TEST_FILES, ids=relative)
def test_every_test_can_fail(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            body = ast.get_source_segment(text, node) or ""
            assert re.search(r"assert|raises|warns|check|approx|expect", body), f"{node.name} asserts nothing"


def test_tracked_files_name_no_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of tracked files")
    # Written so that the pattern does not find itself.
    pattern = re.compile(r"(?<![\w.~-])/(?:w[o]rk|f[a]rm|r[o]ot|h[o]me|U[s]ers)/[A-Za-z.]")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}:{n}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    assert found == []
