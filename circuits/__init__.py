"""Which mechanism did a network learn, and which training objective made it learn that?

Everything loads on first use, so that ``import circuits`` and ``circuits --help`` stay fast::

    import circuits as cx

    task = cx.tasks.get("modular-addition", p=53)
    run = cx.train(task, "answer", seed=0, out="runs/x")
    verdict = cx.mechanisms.explain(run.model, task)
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import discovery as discovery
    from circuits import errors as errors
    from circuits import mechanisms as mechanisms
    from circuits import model as model
    from circuits import objectives as objectives
    from circuits import plots as plots
    from circuits import reference as reference
    from circuits import report as report
    from circuits import runs as runs
    from circuits import study as study
    from circuits import tasks as tasks
    from circuits import training as training
    from circuits import worldmodels as worldmodels
    from circuits.training import train as train

    __version__: str

DISTRIBUTION = "objective-circuits"

_MODULES = (
    "discovery",
    "errors",
    "mechanisms",
    "model",
    "objectives",
    "plots",
    "reference",
    "report",
    "runs",
    "study",
    "tasks",
    "training",
    "worldmodels",
)

__all__ = ["__version__", "train", *_MODULES]


def _refuse_the_other_circuits() -> None:
    """Fail where the event framework that is also called ``circuits`` shares this environment.

    Its wheel writes a top-level ``circuits`` package too, so the two overwrite each other's files. A look for
    its metadata beside each import path costs a millisecond; ``importlib.metadata`` would cost twenty.
    """
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if name.startswith("circuits-") and name.endswith((".dist-info", ".egg-info")):
                raise ImportError(
                    f"the distribution {name.rsplit('.', 1)[0]!r} (an event framework) in {folder or '.'} installs a "
                    f"package named 'circuits' too and cannot share an environment with {DISTRIBUTION}: run "
                    f"'pip uninstall circuits', then 'pip install --force-reinstall {DISTRIBUTION}'"
                )


_refuse_the_other_circuits()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"circuits.{name}")
    if name == "train":
        return importlib.import_module("circuits.training").train
    if name == "__version__":
        from importlib.metadata import version

        return version(DISTRIBUTION)
    raise AttributeError(f"module 'circuits' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
