"""The examples that people copy do run, and the pages say what is there."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import circuits as cx
from circuits.model import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent


def python_blocks(name: str) -> list[str]:
    """Return the Python examples of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def contributed() -> dict[str, Any]:
    """What CONTRIBUTING.md's examples define."""
    names: dict[str, Any] = {"__name__": "contributed"}
    for block in python_blocks("CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    return names


@pytest.fixture(scope="module")
def task() -> Any:
    return cx.tasks.get("modular-addition", p=11)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(ModelConfig(d_vocab=12, n_ctx=3, d_model=16, n_heads=2), seed=0)


def test_the_example_objective_reaches_every_part_of_the_model(contributed, task, model) -> None:
    objective = contributed["Smoothed"](0.2)
    objective.check(task)
    loss = objective.loss(model, task, task.examples("train"), generator=torch.Generator().manual_seed(0))
    plain = contributed["Smoothed"](0.0).loss(model, task, task.examples("train"), generator=torch.Generator())
    gradients = torch.autograd.grad(loss.value, list(model.parameters()))
    assert sum(bool(gradient.abs().sum() > 0) for gradient in gradients) == len(gradients)
    assert not torch.equal(loss.value, plain.value)
    with pytest.raises(cx.errors.BadInput):
        contributed["Smoothed"](1.0)


def test_the_example_method_scores_every_edge(contributed, task, model) -> None:
    circuit = contributed["random_order"](model, task.pairs(8, seed=0), seed=1)
    assert len(circuit.edges) == circuit.graph.n_edges == len(circuit.scores.unique())


def test_the_example_test_returns_evidence(contributed, task, model) -> None:
    evidence = contributed["exchange"](model, task)
    low, high = evidence.interval
    assert low <= evidence.value <= high
    assert evidence.control is not None and 0 <= evidence.control <= 1


def test_a_test_that_is_in_the_table_is_run(contributed, monkeypatch) -> None:
    monkeypatch.setitem(cx.mechanisms.TESTS, "exchange", contributed["exchange"])
    for name in (*cx.mechanisms.DESCRIBING, *cx.mechanisms.MODULAR):
        monkeypatch.delitem(cx.mechanisms.TESTS, name)
    for some in ("DESCRIBING", "MODULAR"):
        monkeypatch.setattr(cx.mechanisms, some, ())
    built, task, _ = cx.reference.build("fourier-pizza", p=13, frequencies=3)
    verdict = cx.mechanisms.explain(built, task)
    assert verdict["exchange"].value == 1.0 and verdict.items[-1].test == "exchange"
    assert "exchange" not in [e.test for e in cx.mechanisms.explain(built, task, budget="quick").items]


@pytest.mark.untyped
@pytest.mark.parametrize("page", ["README.md"])
def test_the_five_lines_of_the_readme_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in python_blocks(page):
        # what the quickstart runs at this size, which is run too
        smaller = block.replace("p=53, block=5", "p=11, block=2")
        assert ("cx.train" in block) == (smaller != block)
        exec(compile(smaller, page, "exec", dont_inherit=True), names)
    assert names["verdict"].label in cx.mechanisms.LABELS
    assert names["run"].path.is_relative_to(tmp_path) or (tmp_path / names["run"].path).is_dir()
    assert math.isfinite(names["curve"].cpr)


@pytest.mark.parametrize("name", [*cx.mechanisms.TESTS])
def test_every_test_has_its_formula_its_source_and_where_it_fails(name: str) -> None:
    text = cx.mechanisms.TESTS[name].__doc__ or ""
    assert all(f"\n    {part}:" in text for part in ("Formula", "Source", "Fails when"))


def test_concepts_explains_every_label() -> None:
    text = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", text, flags=re.M)) == set(cx.mechanisms.LABELS)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_small_and_kept_with_their_outputs(path: Path) -> None:
    assert path.stat().st_size < 500 * 1024
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in outputs) >= 3
    assert not [o for o in outputs if o["output_type"] == "error"]


def test_the_changelog_and_citation_name_the_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    assert version is not None
    assert f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert cx.__version__ == version[1]
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert newest is not None and newest[1].split()[0].strip("[]") in ("Unreleased", version[1])


def test_constraints_fit_the_ranges() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name] = version
    extras = [r for name, rs in project["optional-dependencies"].items() if name != "export" for r in rs]
    wanted = [Requirement(r) for r in [*project["dependencies"], *extras] if not r.startswith(project["name"])]
    assert {r.name for r in wanted} <= set(pins)
    assert [str(r) for r in wanted if not r.specifier.contains(pins[r.name])] == []
