"""Training: a generator of steps, and a function that drains it into a run directory."""

from __future__ import annotations

from circuits.training.defaults import LAST_SEED, check_fits, default_model, default_recipe
from circuits.training.evaluate import accuracies, accuracy
from circuits.training.loop import Step, steps
from circuits.training.run_directory import train

__all__ = [
    "LAST_SEED",
    "Step",
    "accuracies",
    "accuracy",
    "check_fits",
    "default_model",
    "default_recipe",
    "steps",
    "train",
]
