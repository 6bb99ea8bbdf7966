"""What is left when a study is killed: at most the run in progress is lost, and running again completes it."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from circuits.errors import Diverged
from circuits.study import Study, executor

KILLS = 10
RUNS = 3
TINY = """
name = "tiny"
title = "Three runs of a second"
seeds = [0, 1]

[[recipe]]
name = "answer"
stages = [{ objective = "answer", weight_decay = 1.0 }]

[[cell]]
name = "a + b mod 7"
task = { name = "modular-addition", p = 7, block = 2, train_fraction = 0.7 }
model = { d_model = 16, n_heads = 2 }
recipes = ["answer"]
stage = { steps = 40, learning_rate = 1e-2 }
why = "Too few steps to learn anything, enough to be killed at."

[[cell]]
name = "1-digit addition"
task = { name = "digit-addition", digits = 1, block = 0.2 }
model = { d_model = 16, n_heads = 2 }
recipes = ["answer"]
stage = { steps = 25, learning_rate = 1e-2, batch_size = 64 }
seeds = [0]
why = "The same for a task whose answer has several tokens."
"""


@dataclass(frozen=True)
class Job:
    """A job that dies in a chosen way until it was tried often enough."""

    id: str
    folder: Path
    how: str
    succeeds_at: int = 99

    @property
    def log(self) -> Path:
        return self.folder / f"{self.id}.log"

    def __call__(self) -> None:
        tried = self.folder / f"{self.id}.tries"
        count = len(tried.read_text()) + 1 if tried.exists() else 1
        tried.write_text("x" * count)
        if count >= self.succeeds_at:
            (self.folder / f"{self.id}.done").write_text("done")
        elif self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "raise":
            raise MemoryError("out of memory")
        elif self.how == "diverge":
            raise Diverged("loss is nan at step 7")


def tries(folder: Path) -> dict[str, int]:
    return {path.stem: len(path.read_text()) for path in folder.glob("*.tries")}


def test_killed_and_failing_workers_are_tried_again(tmp_path: Path) -> None:
    jobs = [
        Job("fine", tmp_path, "", 1),
        Job("killed-once", tmp_path, "kill", 2),
        Job("killed-twice", tmp_path, "kill", 3),
        Job("raises-once", tmp_path, "raise", 2),
        Job("always-killed", tmp_path, "kill"),
        Job("always-raises", tmp_path, "raise"),
        Job("diverges", tmp_path, "diverge"),
    ]
    seen = []
    outcomes = executor.execute(jobs, workers=2, watch=lambda active, outcome: seen.append((len(active), outcome)))
    errors = {outcome.job.id: outcome.error for outcome in outcomes}
    assert tries(tmp_path) == {
        "fine": 1,
        "killed-once": 2,
        "killed-twice": 3,
        "raises-once": 2,
        "always-killed": 3,
        "always-raises": 3,
        "diverges": 1,
    }
    assert {name for name, error in errors.items() if error is None} == {
        "fine",
        "killed-once",
        "killed-twice",
        "raises-once",
    }
    assert "exit code -9" in (errors["always-killed"] or "")
    assert "MemoryError: out of memory" in (errors["always-raises"] or "")
    assert errors["diverges"] == "loss is nan at step 7"
    assert "MemoryError" in (tmp_path / "always-raises.log").read_text()
    assert max(active for active, _ in seen) <= 2
    assert [outcome for _, outcome in seen if outcome] == outcomes


def test_workers_keep_the_memory_that_they_freed(tmp_path: Path) -> None:
    before = dict(os.environ)
    assert executor.execute([Environment("environment", tmp_path)], workers=1)[0].error is None
    assert (tmp_path / "environment.txt").read_text() == "268435456 1 None"
    assert os.environ == before


@dataclass(frozen=True)
class Environment:
    """A job that writes down what its process was given."""

    id: str
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / f"{self.id}.log"

    def __call__(self) -> None:
        main = getattr(sys.modules["__main__"], "__file__", None)
        values = os.environ.get("MALLOC_TOP_PAD_"), os.environ.get("OMP_NUM_THREADS"), main
        (self.folder / "environment.txt").write_text(" ".join(map(str, values)))


DRIVER = """
import importlib, multiprocessing, os, sys
from circuits.study import executor, study
# What is tested is what is on disk. Forking from this process saves every trial the seconds of a server's start.
for name in executor.PRELOAD:
    importlib.import_module(name)
context = multiprocessing.get_context("fork")
executor.start_context, executor.prepare = lambda: context, lambda: None
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.setsid()
        study.run(sys.argv[1], out=line.strip(), workers=2, progress=False)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Driver:
    """A process that has everything loaded, and runs studies in process groups of their own."""

    def __init__(self, preset: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", DRIVER, str(preset)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | executor.ENVIRONMENT,
        )
        assert self.process.stdout
        # what is timed next is a study, not the loading of torch
        assert self.process.stdout.readline() == "ready\n"

    def start(self, folder: Path) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def driver(preset: Path) -> Iterator[Driver]:
    driver = Driver(preset)
    yield driver
    assert driver.process.stdin and driver.process.stdout
    driver.process.stdin.close()
    driver.process.wait()
    driver.process.stdout.close()


@dataclass(frozen=True)
class Undisturbed:
    """A study that nothing happened to."""

    table: pd.DataFrame
    weights: dict[str, str]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    driver.start(folder)
    assert driver.wait() == 0
    return Undisturbed(numbers(folder), weights(folder), time.monotonic() - started)


def numbers(folder: Path) -> pd.DataFrame:
    """The table without what a clock decides."""
    return Study.load(folder).table.drop(columns="seconds")


def weights(folder: Path) -> dict[str, str]:
    """Hash of every checkpoint of every run."""
    files = sorted(folder.glob("runs/*/checkpoints/*.safetensors"))
    assert files
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finished(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Manifest and time of writing of each finished run."""
    manifests = folder.glob("runs/*/analysis/manifest.json")
    return {path.parent.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in manifests}


def test_a_study_killed_ten_times_ends_as_an_undisturbed_one(
    driver: Driver, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    generator = random.Random(20261123)
    number, kept, kills, in_the_middle = 0, {}, 0, 0
    # until enough of them hit a study at work, which a busy machine makes rarer
    while kills < KILLS or (in_the_middle < 3 and kills < 4 * KILLS):
        kills += 1
        folder = tmp_path / str(number)
        group = driver.start(folder)
        time.sleep(generator.uniform(0.02, 0.6 * undisturbed.seconds))
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            assert (folder / "results.parquet").exists(), "only a finished study may have ended by itself"
        killed = driver.wait() == signal.SIGKILL
        now = finished(folder)
        assert now.items() >= kept.items(), "a finished run was lost or done again"
        assert not (folder / "results.parquet").exists() or len(Study.load(folder).table) == RUNS
        in_the_middle += killed and any(folder.glob("runs/*")) and len(now) < RUNS
        kept = now
        if not killed or len(now) == RUNS:
            pd.testing.assert_frame_equal(complete(driver, folder), undisturbed.table)
            number, kept = number + 1, {}
    assert in_the_middle >= 3, "too few kills hit a study at work"
    for folder in sorted(tmp_path.iterdir()):
        pd.testing.assert_frame_equal(complete(driver, folder), undisturbed.table)
        assert weights(folder) == undisturbed.weights


def complete(driver: Driver, folder: Path) -> pd.DataFrame:
    driver.start(folder)
    assert driver.wait() == 0
    return numbers(folder)


def test_workers_end_with_the_study_that_started_them(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from circuits.study import executor\n"
        "from executor_jobs import Sleeper\n"
        "executor.PRELOAD = ()\n"
        "executor.execute([Sleeper('sleeper', Path(sys.argv[2]))], workers=1)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)])
    written = tmp_path / "sleeper.pid"
    deadline = time.monotonic() + 60
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    worker = int(written.read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(worker)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
