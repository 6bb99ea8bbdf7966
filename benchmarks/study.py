"""Sixteen small runs through the study's executor, as a ratio to the sum of their own training times.

Both sides use the same cores: the ideal is the sum divided by the number of workers. Start-up of the fork server
(once per study) is reported apart. Run it on an idle machine: python benchmarks/study.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from circuits import study
from circuits._io import read_json
from circuits.study import executor

RUNS = """
name = "sixteen"
seeds = [0, 1, 2, 3, 4, 5, 6, 7]

[[recipe]]
name = "weight decay"
stages = [{ objective = "answer", weight_decay = 1.0 }]

[[recipe]]
name = "no weight decay"
stages = [{ objective = "answer" }]

[[cell]]
task = { name = "modular-addition", p = 31, block = 4 }
recipes = ["weight decay", "no weight decay"]
stage = { steps = 200, learning_rate = 1e-2 }
why = "Small runs: what is measured is the executor."
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=executor.cores())
    workers = parser.parse_args().workers
    with tempfile.TemporaryDirectory() as folder:
        toml = Path(folder, "sixteen.toml")
        toml.write_text(RUNS)
        started = time.perf_counter()
        # one run of one step: what it takes is the fork server's start, which the study below finds running
        one = RUNS.replace("0, 1, 2, 3, 4, 5, 6, 7", "0").replace("200", "1").replace(', "no weight decay"]', "]")
        (first := Path(folder, "one.toml")).write_text(one)
        study.run(first, out=Path(folder, "one"), workers=1, progress=False)
        start_up = time.perf_counter() - started
        started = time.perf_counter()
        result = study.run(toml, out=Path(folder, "out"), workers=workers, progress=False)
        wall = time.perf_counter() - started
        manifests = [read_json(run.analysis / "manifest.json") for run in result.plan]
        started = time.perf_counter()
        study.run(toml, out=Path(folder, "out"), workers=workers, progress=False)
        again = time.perf_counter() - started
    training = sum(manifest["seconds"] for manifest in manifests)
    analysing = sum(manifest["analysis_seconds"] for manifest in manifests)
    work = (training + analysing) / workers
    figures = {
        "runs": len(manifests),
        "workers": workers,
        "start_up_seconds": start_up,
        "wall_seconds": wall,
        "training_seconds": training,
        "analysis_seconds": analysing,
        "wall / (training / workers)": wall / (training / workers),
        "wall / ((training + analysis) / workers)": wall / work,
        "finished_study_again_seconds": again,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
