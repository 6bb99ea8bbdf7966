"""Live progress of a study: a bar with time left, and the last line of every run that is on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.study.executor import Active, Outcome

if TYPE_CHECKING:
    from circuits.study.plan import Planned

_TRAINING_SHARE = 0.8
"""Share of a run's time that training takes, for the time left; analysis is the rest."""


class Progress:
    """Shows how far a study is; call it as ``executor.execute`` calls its ``watch``.

    On a terminal or in a notebook: a bar over all runs, weighted by their estimated cost, with a line per worker.
    Elsewhere (a log file): one line per finished run.
    """

    def __init__(self, runs: Sequence[Planned], *, workers: int, show: bool) -> None:
        self._costs = {run.id: run.cost for run in runs}
        self._finished = 0.0
        self._count = 0
        self._show = show
        self._bars: list[Any] = []
        if show and runs and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm

            layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"
            total = sum(self._costs.values())
            self._bars = [tqdm(total=total, bar_format=layout, smoothing=0, desc=f"0/{len(runs)} runs")]
            self._bars += [
                tqdm(bar_format="{desc}", position=i + 1, leave=False) for i in range(min(workers, len(runs)))
            ]

    def __call__(self, active: Sequence[Active], outcome: Outcome | None) -> None:
        """Show the active jobs, or one that ended."""
        if outcome is not None:
            self._finished += self._costs[outcome.job.id]
            self._count += 1
            line = f"{self._count}/{len(self._costs)} {outcome.job} {_how(outcome)}"
            if self._bars:
                self._bars[0].write(line, file=sys.stderr)
            elif self._show:
                print(line, file=sys.stderr, flush=True)
        if self._bars:
            self._refresh(active)

    def _refresh(self, active: Sequence[Active]) -> None:
        states = [_state(one.job) for one in active]  # type: ignore[arg-type]
        partly = sum(share * self._costs[one.job.id] for one, (share, _) in zip(active, states, strict=True))
        overall, *lines = self._bars
        overall.n = self._finished + partly
        overall.set_description_str(f"{self._count}/{len(self._costs)} runs")
        texts = [f"  {one.job}: {text}" for one, (_, text) in zip(active, states, strict=True)]
        for index, bar in enumerate(lines):
            bar.set_description_str(texts[index] if index < len(texts) else "")

    def close(self) -> None:
        """Take the bars away."""
        for bar in reversed(self._bars):
            bar.close()


def _how(outcome: Outcome) -> str:
    again = f", attempt {outcome.attempts}" if outcome.attempts > 1 else ""
    how = "done" if outcome.error is None else f"failed: {outcome.error}"
    return f"{how} ({outcome.seconds:.0f} s{again})"


def _state(run: Planned) -> tuple[float, str]:
    """(share done, what to show) of a run that a worker is on."""
    if (run.path / "manifest.json").exists():
        return _TRAINING_SHARE, "analysing"
    last = last_metrics(run.path / "metrics.jsonl")
    if last is None:
        return 0.0, "starting"
    steps = run.steps
    step = int(last.get("step", 0))
    numbers = [f"{key.replace('_', ' ')} {value:.3g}" for key, value in last.items() if _shown(key, value)]
    return _TRAINING_SHARE * min(step / steps, 1.0), ", ".join([f"step {step}/{steps}", *numbers])


def _shown(key: str, value: object) -> bool:
    return isinstance(value, float) and (key == "loss" or key.startswith("accuracy"))


def last_metrics(path: Path) -> Mapping[str, Any] | None:
    """The last whole record of a metrics file that is being written, None where there is none yet."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - 8192))
            lines = stream.read().split(b"\n")[:-1]
        record = json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
