"""The commands of the command line, a function each: their arguments are read off the signatures by tyro."""

from __future__ import annotations

import importlib
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from circuits._printing import print_assessment, print_json, records, text
from circuits.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from circuits.study.study import Failure

_Pairs = UseAppendAction[tuple[tuple[str, ...], ...]]
_TaskParameters = Annotated[_Pairs, arg(name="parameters", aliases=["-p"], metavar="KEY=VALUE ...")]
_ObjectiveParameters = Annotated[_Pairs, arg(name="objective-parameters", aliases=["-o"], metavar="KEY=VALUE ...")]
_StageFields = Annotated[_Pairs, arg(name="stage", aliases=["-s"], metavar="KEY=VALUE ...")]
_ModelFields = Annotated[_Pairs, arg(name="model", aliases=["-m"], metavar="KEY=VALUE ...")]
_Json = Annotated[bool, arg(name="json")]
_Number = Annotated[int | None, arg(metavar="N")]


def study(
    preset: Annotated[Positional[str], arg(metavar="PRESET|FILE.toml")],
    /,
    *,
    out: Path,
    workers: _Number = None,
    shard: Annotated[str | None, arg(metavar="I/N")] = None,
    as_json: _Json = False,
) -> int:
    """Train and analyse a grid of tasks, recipes and seeds, and write its table and report.

    Running it again goes on where it stopped: finished runs are skipped, an unfinished one resumes.

    Args:
        preset: a preset (`circuits list presets`) or a TOML file of your own.
        out: directory for the runs, results.parquet and report.html.
        workers: processes at a time (default: the number of cores).
        shard: do only part I of N (from 1), for job arrays on one shared directory.
        as_json: print the table as JSON on standard output.
    """
    from circuits.study import executor, read_toml

    read_toml(preset)  # a wrong name fails before anything is loaded
    executor.prepare()  # the workers' torch loads while this process loads its own
    from circuits.study import run

    result = run(preset, out=out, workers=workers, shard=shard)
    report = result.report
    table = result.table
    if as_json:
        print_json({"report": str(report), "runs": records(table)})
    else:
        from circuits.study.tables import summary

        frame = summary(table)
        print(text(frame[["cell", "recipe", "verdict", "seeds", "accuracy", "accuracy_block"]]))
        print(f"\nreport: {report}\ntable:  {result.path / 'results.parquet'}")
    return _say_failures(result.failures, len(table), result.path / "logs")


def _say_failures(failures: Mapping[str, Failure], runs: int, logs: Path) -> int:
    """Say on standard error which runs failed, and return the exit code that a study then ends with."""
    if not failures:
        return 0
    text = f"circuits: {len(failures)} of {runs} runs failed"
    if all(failure.refused for failure in failures.values()):
        # no run is wrong, but what the study was given: as for any other command that it was given to
        (name, first), *_ = failures.items()
        print(f"{text}, {name} because {' '.join(first.message.split())}", file=sys.stderr)
        return 2
    print(f"{text} ({', '.join(failures)}): see {logs}; the same command tries them again", file=sys.stderr)
    return 1


def train(
    task: Annotated[Positional[str], arg(metavar="TASK")],
    objective: Annotated[Positional[str], arg(metavar="OBJECTIVE")],
    /,
    *,
    out: Path,
    seed: int = 0,
    parameters: _TaskParameters = (),
    objective_parameters: _ObjectiveParameters = (),
    stage: _StageFields = (),
    model: _ModelFields = (),
    checkpoints: Annotated[tuple[int, ...], arg(metavar="STEP ...")] = (),
    resume: Annotated[FlagCreatePairsOff[bool], arg()] = False,
    as_json: _Json = False,
) -> int:
    """Train one network on one task with one objective.

    Args:
        task: a task's name (`circuits list tasks`).
        objective: an objective's name (`circuits list objectives`).
        out: directory of the run.
        seed: seed of initial weights and batches.
        parameters: the task's parameters, such as p=53 block=8.
        objective_parameters: the objective's parameters, such as reward=random.
        stage: the budget, such as steps=500 weight_decay=1.0 learning_rate=0.01.
        model: differences from the task's default model, such as n_layers=2.
        checkpoints: steps after which to keep the network, besides the last one and the first ones that are right about
            50, 90 and 99 % of the pairs held out at random.
        resume: go on with an unfinished run in the same directory.
        as_json: print the last metrics as JSON on standard output.
    """
    import circuits

    toml = {
        "task": {"name": task, **_pairs(parameters, name=f"TASK, {task}")},
        "objective": {"name": objective, **_pairs(objective_parameters, name=f"OBJECTIVE, {objective}")},
        "stage": _pairs(stage, objective=f"OBJECTIVE, {objective}"),
        "model": _pairs(model),
    }
    from circuits.study.grid import single

    _one_thread()
    built, recipe, config = single(toml, where="circuits train")
    run = circuits.train(built, recipe, seed=seed, out=out, model=config, checkpoints=checkpoints, resume=resume)
    last = {key: value for key, value in records(run.metrics.tail(1))[0].items() if value is not None}
    if as_json:
        print_json({"run": str(out), "id": run.id, "metrics": last})
    else:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in last.items()
            )
        )
        print(f"run: {out}")
    return 0


def discover(
    run: Annotated[Positional[Path], arg(metavar="RUN_DIR")],
    /,
    *,
    method: str | None = None,
    pairs: Annotated[int, arg(metavar="N")] = 256,
    change: str | None = None,
    seed: int = 0,
    top: Annotated[int, arg(metavar="N")] = 15,
    out: Path | None = None,
    as_json: _Json = False,
) -> int:
    """Find which edges of a trained network matter, and how faithful the top of them is.

    Args:
        run: directory of a finished run.
        method: a discovery method (`circuits list methods`); by default every edge is patched exactly, beyond 2,000
            edges eap-ig-inputs estimates.
        pairs: number of clean and corrupt input pairs.
        change: the variable that the pairs change (default: the task's).
        seed: seed of the pairs; those that measure how faithful the circuit is have the next one, without pairs
            that are among the first.
        top: number of edges to print.
        out: directory to save the circuit in.
        as_json: print edges and faithfulness as JSON on standard output.
    """
    from circuits import discovery
    from circuits.runs import Run
    from circuits.tasks.arithmetic.operand_square import check_integer
    from circuits.tasks.games import is_game

    _one_thread()
    check_integer("top", top, 0, 2**31 - 1)
    loaded = Run.load(run)
    task = loaded.task
    if is_game(task):
        raise BadInput(
            f"{run} is a run on the game {task.name!r}, which has no clean and corrupt pairs: circuits explain"
        )
    examples = task.pairs(pairs, seed=seed, change=change)
    circuit = discovery.attribute(loaded.model, examples, method=method)
    others = task.pairs(pairs, seed=seed + 1, change=change)
    unseen = others.without(examples)
    others = unseen if len(unseen) else others
    faithful = discovery.faithfulness(loaded.model, circuit, others, progress=sys.stderr.isatty())
    if out is not None:
        circuit.save(out)
    edges = circuit.to_frame().head(top)
    if as_json:
        print_json({"cpr": faithful.cpr, "cmd": faithful.cmd, "edges": records(edges)})
    else:
        print(text(edges))
        which = "other pairs" if len(unseen) else "of the same pairs"
        about = f"{circuit.method}, on {len(others)} {which}, {faithful.sizes}"
        print(f"\nCPR {faithful.cpr:.3f}   CMD {faithful.cmd:.3f}   ({about})")
    return 0


def explain(
    run: Annotated[Positional[Path], arg(metavar="RUN_DIR")],
    /,
    *,
    seed: int = 0,
    budget: str = "full",
    out: Path | None = None,
    as_json: _Json = False,
) -> int:
    """Say which mechanism a trained network learned, with the evidence.

    Of a run on a game: whether it is a world model, between a network with random weights and the most that there is.

    Args:
        run: directory of a finished run.
        seed: seed of the tests' random draws.
        budget: full: every test that the task allows; quick: only those that the verdict is made from.
        out: directory to save verdict.json (of a game assessment.json) in.
        as_json: print the verdict as JSON on standard output.
    """
    from circuits import mechanisms, worldmodels
    from circuits.runs import Run
    from circuits.tasks.games import is_game

    _one_thread()
    loaded = Run.load(run)
    if is_game(loaded.task):
        probes = None if budget == "quick" else worldmodels.PROBES
        found = worldmodels.assess(loaded.model, loaded.task, probes=probes, seed=seed, progress=sys.stderr.isatty())
        print_assessment(found, out=out, as_json=as_json)
        return 0
    verdict = mechanisms.explain(loaded.model, loaded.task, seed=seed, budget=budget, progress=sys.stderr.isatty())
    if out is not None:
        verdict.save(out)
    if as_json:
        print_json(verdict.to_json())
    else:
        print(f"{verdict.label}" + (f" ({verdict.mechanism})" if verdict.mechanism else ""))
        print(f"{verdict.why}\n")
        for side, sentences in (("for", verdict.evidence_for), ("against", verdict.evidence_against)):
            print(*(f"{side}: {sentence}" for sentence in sentences or ("nothing",)), sep="\n")
        columns = ["value", "low", "high", "control", "threshold", "passed", "seconds"]
        print(text(verdict.to_frame()[columns].reset_index()))
        print(f"\n{budget} budget: {sum(e.seconds for e in verdict.items):.1f} s")
        thresholds = " ".join(f"{name}={value:g}" for name, value in verdict.thresholds.items())
        print(textwrap.fill(f"rule {verdict.rule}: {thresholds}", 100, subsequent_indent="  "))
    return 0


def report(
    study_dir: Annotated[Positional[Path], arg(metavar="STUDY_DIR")],
    /,
    *,
    csv: Path | None = None,
    latex: Path | None = None,
    as_json: _Json = False,
) -> int:
    """Write a study's table and report again from what is on disk.

    Args:
        study_dir: directory of a study.
        csv: also write the table of all runs to this file.
        latex: also write the summary over seeds to this file.
        as_json: print the summary over seeds as JSON on standard output.
    """
    from circuits.study import Study

    loaded = Study.load(study_dir)
    loaded.check_version()
    loaded.rebuild()
    if csv is not None:
        loaded.to_csv(csv)
    if latex is not None:
        loaded.to_latex(latex)
    if as_json:
        print_json({"report": str(loaded.report), "summary": records(loaded.summary())})
    else:
        print(loaded.report)
    return 0


def list_names(
    kind: Annotated[Positional[str | None], arg(metavar="KIND")] = None,
    /,
    *,
    as_json: _Json = False,
) -> int:
    """Show what there is, a line each: tasks, games, objectives, methods, tests, probes, presets, models.

    Args:
        kind: one of tasks, games, objectives, methods, analyses, tests, probes, presets, references, trained,
            known-circuits (default: all).
        as_json: print them as JSON on standard output.
    """
    kinds = (*_TABLES, "presets", "known-circuits")
    if kind is not None and kind not in kinds:
        raise UnknownName("kind", kind, kinds)
    listed = {name: _entries(name) for name in ([kind] if kind else kinds)}
    if as_json:
        print_json(listed)
        return 0
    for name, entries in listed.items():
        print(name)
        width = max(map(len, entries), default=0)
        for entry, line in entries.items():
            print(f"  {entry:<{width}}  {line}")
    return 0


def bench(
    subject: Annotated[Positional[str], arg(metavar="discovery")],
    /,
    *,
    out: Path,
    circuits: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = (),
    methods: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = (),
    pairs: Annotated[int, arg(metavar="N")] = 64,
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = (0, 1, 2),
    as_json: _Json = False,
) -> int:
    """Hold discovery methods to models whose circuit is known: accuracy, faithfulness, stability, cost.

    Running it again goes on where it stopped.

    Args:
        subject: what to compare: discovery.
        out: directory for discovery.parquet and discovery.csv.
        circuits: known circuits (default: all; `circuits list known-circuits`).
        methods: discovery methods (`circuits list methods`; eap+gim is eap under GIM rules; default: all).
        pairs: number of clean and corrupt input pairs.
        seeds: seeds of the pairs and of the methods that draw, a row each.
        as_json: print the table, one row per circuit, method and seed, as JSON on standard output.
    """
    if subject != "discovery":
        raise UnknownName("subject of a bench", subject, ("discovery",))
    from circuits.study.discovery_bench import run_bench
    from circuits.tasks.arithmetic.operand_square import check_integer

    _one_thread()
    for seed in seeds:
        check_integer("seed", seed, 0, 2**32 - 1)
    found = run_bench(out, circuits=circuits or None, methods=methods or None, n_pairs=pairs, seeds=seeds)
    if as_json:
        print_json(records(found.table))
    else:
        print(found.shown().to_string(index=False))
        print("\nmeans over circuits, with 95 % bootstrap intervals over circuits")
        if "exact" in set(found.table["method"]):
            ahead = found.differences().to_string(index=False, float_format="{:.2f}".format)
            print(f"\naverage precision, exact patching less each other method:\n{ahead}")
        print(f"\ntable: {found.path / 'discovery.parquet'}")
    return 0


def calibrate(
    *,
    out: Path,
    families: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = (),
    seeds: int = 5,
    workers: int | None = None,
    as_json: _Json = False,
) -> int:
    """Judge models that were built to have a known mechanism, and say how often the verdict is right.

    Running it again goes on where it stopped.

    Args:
        out: directory for calibration.parquet, calibration.csv and report.html.
        families: families of built models (default: all; `circuits list references`).
        seeds: how many seeds of every family and size.
        workers: processes at a time (default: the number of cores).
        as_json: print the table, one row per model, as JSON on standard output.
    """
    from circuits.study.calibration import calibrate as judge

    found = judge(out, families=families or None, seeds=seeds, workers=workers)
    page = found.report
    if as_json:
        print_json(records(found.table))
    else:
        print(text(found.summary()), found.confusion().to_string(), text(found.left_out()), sep="\n\n")
        print(f"\ntable:  {found.path / 'calibration.parquet'}\nreport: {page}")
    return 0


_TABLES = {
    "tasks": ("tasks", "TASKS"),
    "games": ("tasks.games", "GAMES"),
    "objectives": ("objectives", "OBJECTIVES"),
    "methods": ("discovery", "METHODS"),
    "analyses": ("discovery", "ANALYSES"),
    "tests": ("mechanisms", "TESTS"),
    "probes": ("worldmodels", "PROBES"),
    "references": ("reference", "REFERENCES"),
    "trained": ("reference", "TRAINED"),
}


def _one_thread() -> None:
    """Keep torch to one thread: on networks this small more of them wait for each other."""
    import torch

    torch.set_num_threads(1)


def _entries(kind: str) -> Mapping[str, str]:
    if kind == "known-circuits":
        from circuits.reference.known_circuits import KNOWN_CIRCUITS, describe

        return {name: describe(name) for name in KNOWN_CIRCUITS}
    if kind == "presets":
        from circuits.study import PRESETS

        return {name: tomllib.loads(path.read_text(encoding="utf-8"))["title"] for name, path in PRESETS.items()}
    module, table = _TABLES[kind]
    found: Mapping[str, object] = getattr(importlib.import_module(f"circuits.{module}"), table)
    return {name: _first_line(thing) for name, thing in found.items()}


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]


def _pairs(groups: Iterable[Iterable[str]], **taken: str) -> dict[str, Any]:
    """``p=53 operation=-`` as a mapping, values read as TOML and else as text.

    ``taken`` says by what a key is given already.
    """
    values: dict[str, Any] = {}
    for pair in (pair for group in groups for pair in group):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise BadInput(f"{pair!r}: expected KEY=VALUE, such as p=53")
        if key in taken:
            raise BadInput(f"{pair!r}: {key} is given by {taken[key]}: leave {key} out")
        if key in values:
            raise BadInput(f"{key} is given twice: {values[key]!r} and {value!r}")
        try:
            values[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = value
    return values
