"""Discovery methods against models whose circuit is known: how well each finds the true edges, and at what cost."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from circuits import discovery
from circuits._io import atomic_write, make_directory, read_json, write_json
from circuits._stats import bootstrap_interval
from circuits.discovery import Circuit
from circuits.errors import BadInput, CircuitsError, CorruptRun, UnknownName
from circuits.reference import known_circuits
from circuits.reference.known_circuits import KNOWN_CIRCUITS, KnownCircuit

FORMAT = 5
N_PAIRS = 64
SEEDS = (0, 1, 2)
HELD_OUT = 1000
"""Added to the seed of the pairs that measure how faithful a circuit is."""
SPARE = 4
"""Times as many of those are drawn as wanted: small models have few inputs, and pairs that were seen do not count."""
TRUTHS = ("program", "active")
RULED = ("eap+gim", "eap+relp")
"""Methods that are run under gradient rules too, as METHOD+RULES."""
ABLATED = {"uniform-gradient-sampling": "corrupt", "uniform-gradient-sampling+optimal": "optimal"}
"""What ablated edges carry where that is not the method's default: all are compared under the same ablation."""
MAIN = "active_precision"
SHOWN = {
    "active_auroc": "AUROC, active",
    "active_precision": "AP, active",
    "program_auroc": "AUROC, program",
    "program_precision": "AP, program",
    "cpr": "CPR",
    "cmd": "CMD",
    "stability": "stability",
    "seed_stability": "stability over seeds",
    "forwards": "cost (forwards)",
    "seconds": "cost (CPU s)",
}
"""Columns of the summary, with their headings."""
COSTS = ("forwards", "seconds")
AHEAD = 0.01
"""A difference in average precision that counts as being ahead or behind."""


@dataclass(frozen=True, eq=False)
class DiscoveryBench:
    """One row per known circuit, method and seed: see ``docs/discovery-bench.md`` for the columns."""

    table: pd.DataFrame
    path: Path

    def summary(self) -> pd.DataFrame:
        """Return each method's means over the circuits of each kind, best by active average precision first.

        Columns that end in ``low`` and ``high`` bound the 95 % bootstrap interval over circuits, where there are
        several, of the mean that they are named after.
        """
        by_circuit = self._by_circuit()
        rows = []
        for (kind, method), group in by_circuit.groupby(["kind", "method"], sort=False):
            row: dict[str, Any] = {"kind": kind, "method": method, "circuits": len(group)}
            for column, heading in SHOWN.items():
                known = group[column].dropna()
                row[heading] = known.mean()
                if column not in COSTS:
                    span = bootstrap_interval(known, seed=0) if len(known) > 1 else (float("nan"),) * 2
                    row[f"{heading} low"], row[f"{heading} high"] = span
            rows.append(row)
        columns = ["kind", "method", "circuits"]
        shown = pd.DataFrame(rows, columns=None if rows else columns)
        return shown.sort_values(["kind", SHOWN[MAIN]], ascending=[True, False], kind="stable") if rows else shown

    def shown(self) -> pd.DataFrame:
        """Return the summary as a person reads it: every mean with its interval in one cell."""
        summary = self.summary()
        table = summary[["kind", "method", "circuits"]].copy()
        for column, heading in SHOWN.items() if len(summary) else ():
            if column in COSTS:
                table[heading] = [f"{value:.3g}" for value in summary[heading]]
                continue
            rows = summary[[heading, f"{heading} low", f"{heading} high"]].to_numpy()
            table[heading] = [_shown(*row) for row in rows]
        return table

    def differences(self, reference: str = "exact") -> pd.DataFrame:
        """Return by how much the reference's active average precision exceeds each other method's, circuit by circuit.

        ``low`` and ``high`` bound the 95 % bootstrap interval over circuits of the mean difference; ``better`` and
        ``worse`` count circuits on which the reference is ahead or behind by more than 0.01, and ``better on`` names
        the former with the difference there.

        Args:
            reference: A method that was run.

        Source: percentile bootstrap of paired differences, Efron and Tibshirani 1993, chapter 13.

        Raises:
            UnknownName: the reference was not run.
        """
        if reference not in set(self.table["method"]):
            raise UnknownName("method of this bench", reference, sorted(set(self.table["method"])))
        wide = self._by_circuit().pivot(index=["kind", "circuit"], columns="method", values=MAIN)
        rows = []
        for kind, group in wide.groupby(level="kind"):
            for method in group.columns.drop(reference):
                by = (group[reference] - group[method]).dropna()
                if len(by) == 0:
                    continue
                low, high = bootstrap_interval(by, seed=0) if len(by) > 1 else (float("nan"),) * 2
                counts = {"better": int((by > AHEAD).sum()), "worse": int((by < -AHEAD).sum())}
                ahead = by[by > AHEAD].sort_values(ascending=False, kind="stable")
                named = ", ".join(
                    f"{str(circuit).removeprefix(f'{kind}-')} {value:.2f}"
                    for circuit, value in zip(ahead.index.get_level_values(1), ahead, strict=True)
                )
                rows.append({"kind": kind, "method": method, "circuits": len(by), f"{reference} ahead by": by.mean()})
                rows[-1] |= {"low": low, "high": high, **counts, "better on": named}
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """Return the table."""
        return self.table

    def _by_circuit(self) -> pd.DataFrame:
        """Means over seeds: seeds of one circuit are no independent circuits."""
        done = self.table[self.table["status"] == "done"]
        return done.groupby(["kind", "circuit", "method"], sort=False)[list(SHOWN)].mean().reset_index()

    def _repr_html_(self) -> str:
        return self.shown().to_html(index=False)


def run_bench(
    out: Path | str,
    *,
    circuits: Collection[str] | None = None,
    methods: Collection[str] | None = None,
    n_pairs: int = N_PAIRS,
    seeds: Sequence[int] = SEEDS,
    progress: bool = True,
) -> DiscoveryBench:
    """Return how every discovery method does on every known circuit, and write the table into a directory.

    What is there already, of these circuits, methods, pairs and seeds, is not computed again. Known circuits of which
    no edge is active under their pairs have nothing that patching could find and are left out.

    Args:
        out: Directory for ``discovery.parquet``, ``discovery.csv`` and a file per circuit, method and seed.
        circuits: Names of ``KNOWN_CIRCUITS``; None: all.
        methods: Names of ``METHODS``, with ``+gim`` or ``+relp`` under those gradient rules; None: all, ``eap`` under
            either rules, and ``uniform-gradient-sampling+optimal``, which ablates as its paper does: without the suffix
            it is compared under ``corrupt`` ablation, as all the others.
        n_pairs: Pairs that a method sees; as many others are kept for CPR and CMD.
        seeds: Of the pairs, and of the methods that draw; each is a row.
        progress: Whether to show a bar.

    Source: Gupta et al. 2024, InterpBench, arXiv 2407.14494 (accuracy on known circuits); Mueller et al. 2025, MIB,
        arXiv 2504.13151 (CPR and CMD).

    Raises:
        UnknownName: no such circuit or method.
        BadInput: fewer than two pairs, or no seeds.
        StorageError: the directory cannot be written.
    """
    known = _chosen("known circuit", circuits, KNOWN_CIRCUITS)
    ruled = [f"{name}+{rules}" for name in discovery.METHODS if "rules" in _options(name) for rules in discovery.RULES]
    chosen = _chosen(
        "discovery method", methods, [*discovery.METHODS, *ruled, *(set(ABLATED) - set(discovery.METHODS))]
    )
    if methods is None:
        chosen = list(dict.fromkeys([*discovery.METHODS, *RULED, *ABLATED]))
    if n_pairs < 2:
        raise BadInput(f"n_pairs = {n_pairs}: expected at least 2")
    if not seeds or len(set(seeds)) < len(seeds):
        raise BadInput(f"seeds = {list(seeds)}: expected at least one, each once")
    folder = make_directory(out)
    cells = make_directory(folder / "cells")
    found: list[dict[str, Any]] = []
    with tqdm(total=len(known) * len(seeds) * len(chosen), desc="bench", unit="cell", disable=not progress) as bar:
        for name, seed in itertools.product(known, seeds):
            truth: KnownCircuit | None = None
            for method in chosen:
                bar.set_postfix_str(f"{name}, {method}, seed {seed}")
                request = {"format": FORMAT, "circuit": name, "method": method, "n_pairs": n_pairs, "seed": seed}
                path = cells / f"{name}--{method}--{seed}.json"
                cell = _stored(path, request)
                if cell is None:
                    truth = truth or known_circuits.build(name, n_pairs=n_pairs, seed=seed)
                    row, top = _row(truth, method, seed)
                    cell = {"request": request, "row": row, "top": top}
                    write_json(path, cell)
                found.append(cell)
                bar.update()
    return DiscoveryBench(_written(_with_seed_stability(found), folder), folder)


def _chosen(kind: str, names: Collection[str] | None, table: Collection[str]) -> list[str]:
    wanted = list(table) if names is None else [name.replace("_", "-") for name in names]
    for name in wanted:
        if name not in table:
            raise UnknownName(kind, name, table)
    return wanted


def _shown(value: float, low: float, high: float) -> str:
    if value != value:
        return "-"
    return f"{value:.2f}" if low != low else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _options(method: str) -> Collection[str]:
    """The arguments that a method takes."""
    return inspect.signature(discovery.METHODS[method]).parameters


def _stored(path: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The cell of an earlier run with the same request; None where there is none."""
    try:
        stored = read_json(path)
    except CorruptRun:
        return None
    if not isinstance(stored, dict) or stored.get("request") != request:
        return None
    return stored


def _with_seed_stability(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with how much the best edges of its circuit and method share between seeds."""
    tops: dict[tuple[str, str], list[list[str]]] = {}
    for cell in cells:
        if cell["top"]:
            tops.setdefault((cell["row"]["circuit"], cell["row"]["method"]), []).append(cell["top"])
    shared = {key: _mean_jaccard(lists) for key, lists in tops.items()}
    return [
        cell["row"] | {"seed_stability": shared.get((cell["row"]["circuit"], cell["row"]["method"]), math.nan)}
        for cell in cells
    ]


def _mean_jaccard(tops: Sequence[Sequence[str]]) -> float:
    """The mean Jaccard similarity of any two sets of best edges, all of the smallest's size; not a number for one."""
    n = min(map(len, tops))
    sets = [set(top[:n]) for top in tops]
    values = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    return sum(values) / len(values) if values else math.nan


def _written(rows: Sequence[dict[str, Any]], folder: Path) -> pd.DataFrame:
    import io

    table = pd.DataFrame(rows)
    data = io.BytesIO()
    table.to_parquet(data, index=False)
    atomic_write(folder / "discovery.parquet", data.getvalue())
    atomic_write(folder / "discovery.csv", table.to_csv(index=False).encode())
    return table


def _row(truth: KnownCircuit, method: str, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Everything that is measured of one method on one known circuit, and its best edges, as many as are active."""
    n = len(truth.pairs)
    row: dict[str, Any] = {
        "circuit": truth.name,
        "kind": truth.name.split("-")[0],
        "method": method,
        "seed": seed,
        "status": "done",
        "n_pairs": n,
        "n_edges": discovery.Graph.from_model(truth.model).n_edges,
        "n_program": len(truth.program),
        "n_active": len(truth.active),
    }
    if not truth.active:
        return row | {"status": "no edge is active under these pairs"}, []
    others = known_circuits.build(truth.name, n_pairs=SPARE * n, seed=seed + HELD_OUT).pairs.without(truth.pairs)
    others = others.take(torch.arange(min(n, len(others))))
    seen = {tuple(tokens) for tokens in truth.pairs.clean.tolist()}
    row["n_held_out"] = len(others)
    row["seen_inputs"] = sum(tuple(tokens) in seen for tokens in others.clean.tolist()) / max(1, len(others))
    if not len(others):
        return row | {"status": "no pair is left that the methods did not see: lower n_pairs"}, []
    try:
        start = time.process_time()
        circuit = _attributed(truth, method, seed)
        row["seconds"] = time.process_time() - start
        row["forwards"] = row["seconds"] / _forward_seconds(truth)
        row |= _against_truth(circuit, truth, seed)
        curve = discovery.faithfulness(truth.model, circuit, others, seed=seed)
    except CircuitsError as error:
        return row | {"status": str(error)}, []
    for area in ("cpr", "cmd"):
        row[area] = getattr(curve, area)
        row[f"{area}_low"], row[f"{area}_high"] = getattr(curve, f"{area}_interval")
        row[f"{area}_random"] = getattr(curve, f"{area}_random")
        row[f"{area}_at_control"] = getattr(curve, f"{area}_at_control")
    judged = circuit.merged() if truth.components else circuit
    if judged.per_example is not None:
        found = discovery.stability(judged, row["n_judged"], seed=seed)
        row["stability"] = found.jaccard
        row["stability_low"], row["stability_high"] = found.interval
        row["stability_random"] = found.jaccard_random
    best = judged.ranking().tolist()[: row["n_judged"]]
    return row, [" -> ".join(judged.graph.edges[i]) for i in best]


def _attributed(truth: KnownCircuit, method: str, seed: int) -> Circuit:
    name, _, suffix = method.partition("+")
    options: dict[str, Any] = {"seed": seed} if "seed" in _options(name) else {}
    if method in ABLATED:
        options["ablation"] = ABLATED[method]
    elif suffix:
        options["rules"] = suffix
    return discovery.attribute(truth.model, truth.pairs, method=name, **options)


def _against_truth(circuit: Circuit, truth: KnownCircuit, seed: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in TRUTHS:
        found = discovery.edge_accuracy(circuit, getattr(truth, name), components=truth.components, seed=seed)
        out[f"{name}_auroc"], out[f"{name}_precision"] = found.auroc, found.average_precision
        out[f"{name}_chance"] = found.n_true / found.n_edges
        for key, span in (("auroc", found.auroc_interval), ("precision", found.average_precision_interval)):
            if span is not None:
                out[f"{name}_{key}_low"], out[f"{name}_{key}_high"] = span
        if name == "active":
            out["n_judged"] = found.n_true
    return out


def _forward_seconds(truth: KnownCircuit) -> float:
    """CPU seconds of one plain forward on the pairs' clean inputs: the best of a few."""
    times = []
    with torch.no_grad():
        for _ in range(7):
            start = time.process_time()
            truth.model(truth.pairs.clean)
            times.append(time.process_time() - start)
    return max(min(times), 1e-6)
