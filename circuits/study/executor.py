"""Runs jobs in fresh processes of a fork server that has torch loaded, and tries again those that die.

One process per job keeps a crash, a leak or a killed worker to the job that it hit. Forking from a server that
has torch loaded makes such a process cost milliseconds, where a new interpreter costs seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from circuits.errors import CircuitsError, StorageError

PRELOAD = ("circuits.study.analyse", "pandas", "pyarrow.parquet", "scipy.stats", "sklearn.tree", "torch._dynamo")
"""What the fork server imports once for all workers: what a run needs, also that which is imported late elsewhere, as
tests of mechanisms do with scipy, rules of neurons with scikit-learn and every optimiser of torch with its compiler (a
second each, in every run)."""

HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
"""What keeps glibc from giving freed memory back, and then paying page faults for it at every training step."""

ENVIRONMENT = HEAP | {
    # every core has a process of its own
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

RETRIES = 2
_POLL_SECONDS = 0.5


@runtime_checkable
class Job(Protocol):
    """One piece of work: a unique name, a log file and a function that does it."""

    @property
    def id(self) -> str:
        """Unique name."""
        ...

    @property
    def log(self) -> Path:
        """File for what the job prints; also the lock that lets only one process do the job."""
        ...

    def __call__(self) -> None:
        """Do the job (it finds by itself what was done before)."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a job ended: ``error`` is None where it did what it should."""

    job: Job
    error: str | None
    attempts: int
    seconds: float


@dataclass
class Active:
    """A job that a process works on."""

    job: Job
    attempt: int
    process: BaseProcess
    messages: connection.Connection
    started: float = field(default_factory=time.monotonic)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_context() -> BaseContext:
    """What starts processes: a fork server that runs already, or plain new interpreters where there is no fork."""
    prepare()
    return multiprocessing.get_context(_method())


def _method() -> str:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def prepare() -> None:
    """Start the fork server, which loads torch while the caller goes on; nothing where one runs already."""
    if _method() != "forkserver":
        return
    from multiprocessing import forkserver, resource_tracker

    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD))
    resource_tracker.ensure_running()
    with _environment(ENVIRONMENT), _interrupts_blocked(), _no_main_module():
        forkserver.ensure_running()


def execute(
    jobs: Sequence[Job], *, workers: int, watch: Callable[[Sequence[Active], Outcome | None], None] | None = None
) -> list[Outcome]:
    """How each job ended, after all have; at most ``workers`` run at a time, in the order given.

    ``watch`` is called with the active jobs twice a second, and with each outcome as it comes.
    A job whose process dies or raises is tried again ``RETRIES`` times; one that raises a ``CircuitsError``
    is not, because it would raise it again.
    """
    context = start_context()
    waiting = deque((job, 1) for job in jobs)
    active: list[Active] = []
    outcomes: list[Outcome] = []
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                active.append(_start(context, *waiting.popleft()))
            ended = connection.wait([a.process.sentinel for a in active], timeout=_POLL_SECONDS)
            for one in [a for a in active if a.process.sentinel in ended]:
                active.remove(one)
                error, final = _collect(one)
                if error is not None and not final and one.attempt <= RETRIES:
                    waiting.appendleft((one.job, one.attempt + 1))
                    continue
                outcomes.append(Outcome(one.job, error, one.attempt, time.monotonic() - one.started))
                if watch:
                    watch(active, outcomes[-1])
            if watch:
                watch(active, None)
    finally:
        for one in active:
            one.process.kill()
            one.process.join()
    return outcomes


def _start(context: BaseContext, job: Job, attempt: int) -> Active:
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, send), daemon=True)  # type: ignore[attr-defined]
    with _no_main_module():
        process.start()
    send.close()
    return Active(job, attempt, process, receive)


def _collect(one: Active) -> tuple[str | None, bool]:
    """(error or None, whether it is final) of a process that ended."""
    one.process.join()
    with one.messages:
        if one.process.exitcode == 0:
            return None, True
        try:
            error, final = one.messages.recv()
        except (EOFError, OSError):
            return f"its process died (exit code {one.process.exitcode}; see {one.job.log})", False
    return error, final


def _work(job: Job, messages: connection.Connection) -> None:
    """Do the job in this process and say how it failed, if it did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        with _log(job.log) as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            try:
                job()
            except BaseException:
                traceback.print_exc()
                raise
    except CircuitsError as error:
        messages.send((str(error), True))
        sys.exit(1)
    except Exception as error:
        messages.send((f"{type(error).__name__}: {error} (see {job.log})", False))
        sys.exit(1)


def _die_with_parent() -> None:
    """End this process when the one that runs the study does, however that one ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _log(path: Path) -> Iterator[IO[str]]:
    """The log file, open for appending and locked against a second process on the same job."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a", buffering=1)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}: choose another output directory") from error
    with stream:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set the variables that the user has not set, for the processes started meanwhile."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes that a Ctrl-C does not reach: the study stops them itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep workers from importing the user's script again, which then needs no ``__name__`` guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
