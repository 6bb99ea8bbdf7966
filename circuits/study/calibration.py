"""The verdict against the truth: every built model, in three sizes, under every nuisance."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from circuits import mechanisms, reference
from circuits._io import atomic_write, make_directory, read_json, write_json
from circuits.errors import BadInput, CorruptRun, UnknownName
from circuits.mechanisms import DESCRIBING, MODULAR, TESTS, VERSION
from circuits.mechanisms.evidence import finite_or_null
from circuits.reference.trained import stored_sizes
from circuits.study import executor
from circuits.study.tables import verdict_columns
from circuits.training import accuracies

FORMAT = 4
SEEDS = 5
KEPT = 0.95
"""Share of its training accuracy that a model has to keep under a nuisance to count as what it was built as."""
UNTRAINED = "random-init"
"""The family that has learned nothing: every test is put to it all the same, as what each is to be told from."""
STORED = ("interchange-trained", "banded", "banded-twin")
"""Families of trained networks, of which there is one for each size that is stored."""
SIZES: dict[str, tuple[dict[str, Any], ...]] = {
    "fourier-clock": ({"p": 31, "frequencies": 4}, {"p": 53}, {"p": 97}),
    "fourier-pizza": ({"p": 31, "frequencies": 4}, {"p": 53}, {"p": 97}),
    "fourier-plain": ({"n": 40}, {"n": 60}, {"n": 80}),
    "number-line": ({"n": 20}, {"n": 40}, {"n": 60}),
    "columns": ({"n": 30}, {"n": 50}, {"n": 80}, {"n": 60, "cascade": False}, {"n": 80, "cascade": False}),
    "digit-columns": (
        {"digits": 2},
        {"digits": 3},
        {"digits": 4},
        {"digits": 2, "reverse": False},
        {"digits": 3, "reverse": False},
        {"digits": 4, "reverse": False},
        {"digits": 2, "cascade": False},
        {"digits": 3, "reverse": False, "cascade": False},
        {"digits": 4, "cascade": False},
    ),
    "digit-memoriser": ({"train_fraction": 0.05}, {"train_fraction": 0.1}, {"train_fraction": 0.1, "reverse": False}),
    "range-lookup": (
        {"n": 30, "grids": 3},
        {"n": 50},
        {"n": 60, "width": 12},
        {"n": 40, "grids": 2},
        {"n": 50, "grids": 1},
    ),
    "result-range-bag": ({"n": 20}, {"n": 40}, {"n": 60}),
    "pair-memoriser": ({"p": 23}, {"p": 53}, {"p": 67}),
    "compiled-addition": tuple({"n": n} for n in reference.compiled_sizes()),
    "hybrid": ({"p": 23, "frequencies": 4}, {"p": 31}, {"p": 43}),
    "random-init": ({"p": 31}, {"p": 53}, {"p": 97}),
    **{family: stored_sizes(family) for family in STORED},
}
"""Every family of built models, and the sizes it is built in: three or more, but for networks that are stored."""
FEATURES: dict[str, tuple[str, ...]] = {
    "accuracy-gate": ("train", "unmirrored"),
    "spectral": ("explained", "restricted", "excluded"),
    "functional-form": ("frequency_least", "hinge_least", "indicator", "none"),
    "interchange": ("frequencies", "frequencies_complement", "line", "low_digit_of_a", "high_digit_of_a"),
    "region-interchange": ("inside", "outside"),
    "rectangles": ("idealised", "ablated"),
    "result-heuristics": ("idealised", "ablated"),
}
"""What likelihood ratios see beside the tests' values: the numbers that the rule looks at."""
NUISANCES: dict[str, tuple[str, dict[str, float]]] = {
    "none": ("none", {}),
    "rotation": ("rotation", {}),
    "renamed tokens": ("renamed-tokens", {}),
    "noise 0.1 %": ("weight-noise", {"level": 0.001}),
    "noise 0.3 %": ("weight-noise", {"level": 0.003}),
    "noise 1 %": ("weight-noise", {"level": 0.01}),
    "dead neurons": ("dead-neurons", {}),
    "duplicate neurons": ("duplicate-neurons", {}),
}
"""What is done to a built model before it is judged."""


@dataclass(frozen=True)
class Case:
    """One model to judge: a job for a worker process."""

    family: str
    size: tuple[tuple[str, Any], ...]
    nuisance: str
    seed: int
    folder: Path

    @property
    def id(self) -> str:
        """Unique name."""
        size = "-".join(f"{name}{value}" for name, value in self.size)
        return f"{self.family}--{size}--{self.nuisance.replace(' ', '-').replace('%', 'percent')}--{self.seed}"

    @property
    def budget(self) -> str:
        """Every test on one untouched model of each family and size; elsewhere those that the rule reads."""
        return "full" if self.nuisance == "none" and self.seed == 0 else "quick"

    @property
    def log(self) -> Path:
        """File for what the job prints."""
        return self.folder / "logs" / f"{self.id}.log"

    @property
    def cell(self) -> Path:
        """File with the row."""
        return self.folder / "cells" / f"{self.id}.json"

    def row(self) -> dict[str, Any] | None:
        """Return what was found; None where nothing was found yet, by this rule."""
        try:
            stored = read_json(self.cell)
        except CorruptRun:
            return None
        if not isinstance(stored, dict) or any(stored.get(key) != value for key, value in _made_by().items()):
            return None
        row: dict[str, Any] = stored["row"]
        return row

    def __call__(self) -> None:
        """Build the model, judge it, and write the row."""
        if self.row() is None:
            write_json(self.cell, {**_made_by(), "row": judged(self)})


def _made_by() -> dict[str, Any]:
    """What a row has to agree with to be kept: the format, the rule and its thresholds, the tests and the models."""
    return {"format": FORMAT, "rule": VERSION, "thresholds": mechanisms.rule_table(), "code": _code()}


@functools.cache
def _code() -> str:
    """Hash of the code that builds the models and that judges them."""
    digest = hashlib.sha256()
    for package in (mechanisms, reference):
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def judged(case: Case) -> dict[str, Any]:
    """Return the row of one case: what is true, what the verdict says, and every test's value.

    A model that noise has made forget its training pairs is not learned, whatever it was built as: its training
    accuracy, measured as training does and not by a test, is less than ``KEPT`` of what it was.
    """
    import torch

    torch.set_num_threads(1)
    model, task, truth = reference.build(case.family, seed=case.seed, **dict(case.size))
    kind, options = NUISANCES[case.nuisance]
    built_accuracy = accuracies(model, task)["accuracy_train"]
    if kind == "renamed-tokens":
        model, task = reference.renamed_tokens(model, task, seed=case.seed)
    elif kind != "none":
        model = reference.transform(model, kind, seed=case.seed, **options)
    verdict = mechanisms.explain(model, task, budget=case.budget)
    if case.family == UNTRAINED:  # where there is nothing to explain: what tests say of nothing
        names = mechanisms.applicable(task, budget=case.budget)[len(verdict.items) :]
        verdict = replace(verdict, items=(*verdict.items, *mechanisms.measure(model, task, names)[0]))
    quick = mechanisms.explain(model, task, budget="quick") if case.budget == "full" else verdict
    kept = accuracies(model, task)["accuracy_train"] >= KEPT * built_accuracy
    return {
        "family": case.family,
        "nuisance": case.nuisance,
        "size": ", ".join(f"{name} {value}" for name, value in case.size),
        "seed": case.seed,
        "truth": truth if kept else "not-learned",
        "built": truth,
        **verdict_columns(verdict),
        **{
            f"{test}.{key}": finite_or_null(verdict[test].number(key))
            for test, keys in FEATURES.items()
            if test in verdict
            for key in keys
        },
        **{f"{item.test}.passed": item.passed for item in verdict.items},
        "quick_agrees": (quick.label, quick.mechanism) == (verdict.label, verdict.mechanism),
        "why": verdict.why,
        "seconds": sum(item.seconds for item in verdict.items),
    }


@dataclass(frozen=True, eq=False)
class Calibration:
    """One row per model: ``family``, ``nuisance``, ``size``, ``seed``, ``built``, ``truth``, verdict, tests' values."""

    table: pd.DataFrame
    path: Path

    def confusion(self) -> pd.DataFrame:
        """Return how many models of each truth got each verdict."""
        return pd.crosstab(self.table["truth"], self._said(), rownames=["truth"], colnames=["verdict"])

    def summary(self) -> pd.DataFrame:
        """Return what the verdicts amount to, over all models that have learned their task."""
        learned = self.table["truth"] != "not-learned"
        truth, label = self.table["truth"].str.split("/").str[0], self.table["label"]
        named = learned & (truth != "undetermined")
        full = (self.table["nuisance"] == "none") & (self.table["seed"] == 0)
        rows = {
            "models": len(self.table),
            "models that have learned": int(learned.sum()),
            "of these, with a mechanism that has a name": int(named.sum()),
            "share called by label and mechanism": float((self._said() == self.table["truth"])[named].mean()),
            "share called by label": float((label == truth)[named].mean()),
            "algorithms called heuristics": int(((truth == "algorithm") & (label == "heuristics")).sum()),
            "heuristics called algorithms": int(((truth == "heuristics") & (label == "algorithm")).sum()),
            "share undetermined": float((label == "undetermined")[named].mean()),
            "models given every test": int(full.sum()),
            "share of these on which the quick budget agrees": float(self.table["quick_agrees"][full].mean()),
        }
        return pd.DataFrame({"value": pd.Series(rows)}).rename_axis("figure").reset_index()

    def separation(self) -> pd.DataFrame:
        """Return, for each test and pair of families, the area under the ROC curve of telling them apart by its value.

        0.5 is chance; 0 and 1 tell apart equally well. Of each family the models that have learned count, and of
        ``UNTRAINED`` all; ``n_family`` and ``n_other`` say how many have the test.

        Source: scikit-learn's ``roc_auc_score``.
        """
        from sklearn.metrics import roc_auc_score

        learned = self.table[(self.table["truth"] != "not-learned") | (self.table["family"] == UNTRAINED)]
        rows = []
        for test, (one, other) in itertools.product(self._tests(), itertools.combinations(SIZES, 2)):
            first, second = (learned.loc[learned["family"] == f, test].dropna() for f in (one, other))
            if len(first) and len(second):
                labels = np.r_[np.ones(len(first)), np.zeros(len(second))]
                area = float(roc_auc_score(labels, np.r_[first, second]))
                many = {"n_family": len(first), "n_other": len(second)}
                rows.append({"test": test, "family": one, "other": other, "auroc": area, **many})
        return pd.DataFrame(rows, columns=["test", "family", "other", "auroc", "n_family", "n_other"])

    def likelihood(self) -> pd.DataFrame:
        """Return each model's label by likelihood ratio: fitted to all other families, and to all other models.

        The likelihood is that of independent normal distributions of the tests' values and ``FEATURES`` given the
        label; absent values count as -1. Only tests that every model was given count. Without its family a label that
        no other family has cannot be given; with it, models are left out by fifths, a model and what nuisances make of
        it always together.

        Source: naive Bayes, scikit-learn's ``GaussianNB``; ``LeaveOneGroupOut`` and ``GroupKFold``.
        """
        from sklearn.model_selection import GroupKFold, LeaveOneGroupOut

        seen = [f"{test}.{key}" for test, keys in FEATURES.items() for key in keys]
        given = [test for test in self._tests() if test not in (*DESCRIBING, *MODULAR)]
        columns = [*given, *(name for name in seen if name in self.table.columns)]
        values = self.table[columns].astype(float).fillna(-1.0).to_numpy()
        truth = self.table["truth"].str.split("/").str[0].to_numpy()
        family = self.table["family"].to_numpy()
        splits: dict[str, list[Any]] = {"family left out": [], "family known": []}
        if len(np.unique(family)) > 1:
            splits["family left out"] = list(LeaveOneGroupOut().split(values, truth, family))
        built = self.table[["family", "size", "seed"]].astype(str).agg("/".join, axis=1).to_numpy()
        if len(np.unique(built)) >= 5:
            folds = GroupKFold(5, shuffle=True, random_state=0)
            splits["family known"] = list(folds.split(values, truth, built))
        out = self.table[["family"]].copy()
        for name, folds in splits.items():
            out[name] = pd.Series(pd.NA, index=out.index, dtype="object")
            for fit, judge in folds:
                out.loc[out.index[judge], name] = _most_likely(values[fit], truth[fit], values[judge])
        return out

    def left_out(self) -> pd.DataFrame:
        """Return, for each family, how often the label is right: by the rule, and by likelihood ratios.

        The rule's thresholds were set by hand; see ``likelihood`` for the ratios.
        """
        truth = self.table["truth"].str.split("/").str[0]
        said = self.likelihood()
        rows = []
        for name in SIZES:
            out = self.table["family"] == name
            if not out.any() or out.all():
                continue
            row = {"family": name, "models": int(out.sum()), "rule": float((self.table["label"] == truth)[out].mean())}
            for kind in ("family left out", "family known"):
                row[f"likelihood ratio, {kind}"] = float((said[kind] == truth)[out].mean())
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def report(self) -> Path:
        """Write ``report.html`` beside the table and return its path."""
        from circuits.report import write_calibration

        return write_calibration(self)

    def to_frame(self) -> pd.DataFrame:
        """Return the table."""
        return self.table

    def _tests(self) -> list[str]:
        return [test for test in TESTS if test in self.table.columns]

    def _said(self) -> pd.Series:
        mechanism = self.table["mechanism"].fillna("")
        return self.table["label"].where(mechanism == "", self.table["label"] + "/" + mechanism).rename("verdict")

    def _repr_html_(self) -> str:
        return self.summary().to_html(index=False, float_format="{:.3f}".format) + self.confusion().to_html()


def calibrate(
    out: Path | str,
    *,
    families: Collection[str] | None = None,
    seeds: int = SEEDS,
    workers: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Judge built models whose mechanism is known, and write the table into a directory; a second start goes on.

    Every family, size and seed is judged untouched; every nuisance is put on one seed of every family and size, the
    seeds in turn. The first seed of each, untouched, is given every test, all others those that the rule reads. Of
    trained families one network is stored for each size, and stands for all seeds.

    Args:
        out: Directory for ``calibration.parquet``, ``calibration.csv``, ``separation.csv`` and a file per model.
        families: Names of ``SIZES``; None: all.
        seeds: How many.
        workers: Processes at a time; None: the number of cores.
        progress: Whether to show a bar.

    Raises:
        UnknownName: no such family.
        BadInput: ``seeds`` or ``workers`` is less than 1, or a model could not be judged.
        StorageError: the directory cannot be written.

    Source: a confusion matrix against constructions: ours; the thresholds and what they rest on: docs/log.md.
    """
    chosen = list(SIZES) if families is None else [name.replace("_", "-") for name in families]
    for name in chosen:
        if name not in SIZES:
            raise UnknownName("family", name, SIZES)
        if families is not None and not SIZES[name]:
            raise BadInput(f"no network of the family {name!r} is stored: expected one of those that are built")
    if seeds < 1 or (workers is not None and workers < 1):
        raise BadInput(f"seeds = {seeds}, workers = {workers}: expected at least 1")
    executor.prepare()
    folder = make_directory(out)
    for name in ("cells", "logs"):
        make_directory(folder / name)
    cases = [case for family in chosen for case in _cases(family, seeds, folder)]
    missing = [case for case in cases if case.row() is None]
    with tqdm(total=len(missing), desc="calibrate", unit="model", disable=not progress) as bar:

        def watch(active: Sequence[executor.Active], ended: executor.Outcome | None) -> None:
            bar.update(ended is not None)

        outcomes = executor.execute(missing, workers=workers or executor.cores(), watch=watch)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    rows = [row for case in cases if (row := case.row()) is not None]
    written = Calibration(_written(rows, folder), folder) if rows else None
    if failed or written is None:
        raise BadInput(
            f"{len(failed)} of {len(cases)} models could not be judged, the first, {failed[0].job.id}: "
            f"{failed[0].error}; the table in {folder} has the others, and a second start tries these again"
        )
    return written


def _most_likely(values: Any, truth: Any, judged: Any) -> Any:
    from sklearn.naive_bayes import GaussianNB

    known = np.unique(truth)
    if len(known) == 1:
        return np.full(len(judged), known[0])
    return GaussianNB(var_smoothing=1e-3).fit(values, truth).predict(judged)


def _cases(family: str, seeds: int, folder: Path) -> list[Case]:
    cases = []
    seeds = 1 if family in STORED else seeds
    for size in SIZES[family]:
        fixed = tuple(sorted(size.items()))
        cases += [Case(family, fixed, "none", seed, folder) for seed in range(seeds)]
        put = [nuisance for nuisance in NUISANCES if nuisance != "none"]
        cases += [Case(family, fixed, nuisance, i % seeds, folder) for i, nuisance in enumerate(put)]
    return cases


def _written(rows: Sequence[Mapping[str, Any]], folder: Path) -> pd.DataFrame:
    import io

    table = pd.DataFrame(rows)
    calibration = Calibration(table, folder)
    said = calibration.likelihood()
    for kind in ("family left out", "family known"):
        table[f"likelihood, {kind}"] = said[kind].astype("string")
    data = io.BytesIO()
    table.to_parquet(data, index=False)
    atomic_write(folder / "calibration.parquet", data.getvalue())
    atomic_write(folder / "calibration.csv", table.to_csv(index=False).encode())
    areas = calibration.separation().to_csv(index=False, float_format="%.3f", lineterminator="\n")
    atomic_write(folder / "separation.csv", areas.encode())
    return table
