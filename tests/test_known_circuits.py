"""Models whose circuit is known: programs equal to their definition, trained models to their causal model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from discovery_models import at_answers, close

from circuits import discovery
from circuits.discovery import Graph
from circuits.errors import BadInput, UnknownName
from circuits.reference.causal_models import CAUSAL_MODELS, INNER
from circuits.reference.compiled_programs import PROGRAMS, load_program
from circuits.reference.interchange_models import interchange_accuracy, train_interchange_model
from circuits.reference.known_circuits import KNOWN_CIRCUITS, build, describe
from circuits.reference.weight_edges import source_changes

EASY = [name for name in CAUSAL_MODELS if not name.startswith("hard-")]


def balance(row: Sequence[str]) -> list[float]:
    return [(row[: i + 1].count("(") - row[: i + 1].count(")")) / (i + 1) for i in range(len(row))]


def balanced(row: Sequence[str]) -> bool:
    depths = list(itertools.accumulate(1 if token == "(" else -1 for token in row))
    return min(depths) >= 0 and depths[-1] == 0


DEFINITIONS: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
    "count": lambda row: [row.count("a")] * len(row),
    "frac-prevs": lambda row: [row[: i + 1].count("x") / (i + 1) for i in range(len(row))],
    "hist": lambda row: [row.count(token) for token in row],
    "length": lambda row: [len(row)] * len(row),
    "pair-balance": balance,
    "reverse": lambda row: list(reversed(row)),
    "shuffle-dyck": lambda row: [balanced(row)] * len(row),
    "sort": sorted,
    "sort-unique": sorted,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_compiled_program_equals_its_definition(name: str) -> None:
    program = load_program(name)
    for length in range(1, program.length + 1):
        rows: list[tuple[Any, ...]] = list(itertools.product(program.tokens, repeat=length))
        if name == "sort-unique":
            rows = [row for row in rows if len(set(row)) == length]
        if len(rows) > 400:
            rows = random.Random(length).sample(rows, 400)
        got = program(rows)
        for row, values in zip(rows, got, strict=True):
            assert values == pytest.approx(DEFINITIONS[name](list(row)), abs=1e-3), row


@pytest.mark.parametrize("name", KNOWN_CIRCUITS)
def test_edges_and_pairs_are_of_the_model(name: str) -> None:
    known = build(name, n_pairs=40)
    graph = Graph.from_model(known.model)
    assert known.active <= known.program <= set(graph.edges) and len(known.pairs) == 40
    for truth in (known.program, known.active):
        assert torch.equal(graph.connected(graph.mask(truth)), graph.mask(truth))
    with torch.no_grad():
        clean, corrupt = (at_answers(known.model(t), known.pairs) for t in (known.pairs.clean, known.pairs.corrupt))
    if name == "program-length":
        assert not known.active and close(clean, corrupt, 1e-5)
        return
    assert known.active and float((clean - corrupt).min()) > 1e-3
    assert describe(name)
    again = build(name.replace("-", "_"), n_pairs=40)
    assert torch.equal(again.pairs.clean, known.pairs.clean)
    assert not torch.equal(build(name, n_pairs=40, seed=1).pairs.clean, known.pairs.clean)


@pytest.mark.parametrize("name", [n for n in KNOWN_CIRCUITS if n.startswith("program") and n != "program-length"])
def test_edges_that_are_not_active_have_no_effect_in_a_program(name: str) -> None:
    known = build(name, n_pairs=16)
    circuit = discovery.exact(known.model, known.pairs)
    active = circuit.graph.mask(known.active)
    assert circuit.per_example is not None
    assert float(circuit.per_example[:, ~active].abs().max()) < 1e-3
    kept = discovery.ablated_metric(known.model, known.pairs, active[None])[0]
    with torch.no_grad():
        assert close(kept, at_answers(known.model(known.pairs.clean), known.pairs), 1e-3)


def test_a_linear_networks_effects_add_up_and_gradients_are_exact() -> None:
    known = build("linear", seed=3)
    circuit, first_order = discovery.exact(known.model, known.pairs), discovery.eap(known.model, known.pairs)
    assert close(circuit.scores, first_order.scores, 1e-4) and set(circuit.threshold(1e-4).edges) == known.program
    with torch.no_grad():
        total = at_answers(known.model(known.pairs.corrupt), known.pairs) - at_answers(
            known.model(known.pairs.clean), known.pairs
        )
    _, reader = circuit.graph.ends()
    assert circuit.per_example is not None
    for name in ("logits", "a1.h1.v", "a0.h0.v"):
        assert close(circuit.per_example[:, reader == circuit.graph.readers.index(name)].sum(1), total, 1e-4), name


@pytest.mark.parametrize("name", EASY)
def test_a_trained_model_follows_its_causal_model(name: str) -> None:
    known = build(f"interchange-{name}")
    accuracy = interchange_accuracy(known.model, name, n=512)
    assert set(accuracy) == {"task", "others", "all others", *CAUSAL_MODELS[name].places}
    assert min(accuracy.values()) >= 0.95, accuracy
    assert known.components
    graph = Graph.from_model(known.model)
    keep = torch.stack([graph.mask([]), graph.mask(known.active), graph.mask(graph.edges)])
    empty, alone, full = discovery.ablated_metric(known.model, known.pairs, keep).mean(1).tolist()
    assert (alone - empty) / (full - empty) > 0.7


@pytest.mark.parametrize("name", EASY)
def test_heads_that_carry_nothing_write_something_that_depends_on_the_input(name: str) -> None:
    known = build(f"interchange-{name}")
    changes = source_changes(known.model, known.pairs)
    sizes = {head: float(change.norm(dim=-1).mean()) for head, change in changes.items() if head.startswith("a")}
    carriers = {component for component, _ in (*CAUSAL_MODELS[name].places.values(), *INNER.get(name, ()))}
    idle = [size for head, size in sizes.items() if head not in carriers]
    assert len(idle) >= 4 and min(idle) > 0.01 * max(sizes.values()) and max(idle) > 0.05 * max(sizes.values())


def test_training_makes_the_swap_work() -> None:
    before = train_interchange_model("sum", steps=1, progress=False)
    after = train_interchange_model("sum", steps=120, progress=False)
    first, last = interchange_accuracy(before, "sum", n=256), interchange_accuracy(after, "sum", n=256)
    assert first["task"] < 0.4 < 0.5 < last["task"] and last["total"] > first["total"]


def test_a_compiled_program_is_compiled_to_the_weights_that_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tracr", reason="the extra tracr is not installed: programs are not compiled again")
    import importlib.util
    import sys
    from pathlib import Path

    path = Path(__file__).parent.parent / "tools" / "compile_programs.py"
    spec = importlib.util.spec_from_file_location("compile_programs", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    # a dataclass looks its module up there
    monkeypatch.setitem(sys.modules, "compile_programs", tool)
    spec.loader.exec_module(tool)
    tensors = tool.tensors_of(*tool.compile_program(tool.PROGRAMS["hist"]))
    state = load_program("hist").model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(UnknownName, match="did you mean 'program-sort'"):
        build("program-srt")
    with pytest.raises(UnknownName, match="unknown compiled program 'srt'"):
        load_program("srt")
    for name in ("program-sort", "linear", "interchange-sum"):
        with pytest.raises(BadInput, match="n_pairs = 0"):
            build(name, n_pairs=0)


@pytest.mark.parametrize("name", sorted(n for n in KNOWN_CIRCUITS if not n.startswith("hard")))
def test_exact_nodes_of_every_known_circuit(name: str) -> None:
    known = build(name, n_pairs=8)
    if not known.active:
        with pytest.raises(BadInput, match="no ablation changes metric"):
            discovery.exact_nodes(known.model, known.pairs)
        return
    frame = discovery.exact_nodes(known.model, known.pairs).source_frame()
    assert len(frame) == len(Graph.from_model(known.model).sources)
