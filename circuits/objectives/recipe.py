"""A recipe: stages of training, each an objective with a budget and an optimiser's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from circuits.errors import BadInput, UnknownName
from circuits.objectives.base import Objective, check_number
from circuits.tasks.base import Task
from circuits.tasks.games import Game, is_game

BEST = "best"
TRAINED = ("all", "unembedding")
"""Which weights of the model a stage can train."""


def _table() -> Mapping[str, type]:
    """The objectives by name; imported late because the module that holds them imports this one."""
    from circuits import objectives

    return objectives.OBJECTIVES


@dataclass(frozen=True)
class Stage:
    """Training on one objective, with AdamW from fresh moments.

    Attributes:
        objective: what is minimised.
        steps: updates at most.
        batch_size: examples per step, drawn with replacement; None: the whole training split at every step.
        learning_rate: the peak of the schedule.
        weight_decay: decoupled (AdamW), on every weight; it decides between an algorithm and a memoriser.
        betas: decay rates of AdamW's moments.
        warmup: steps over which the learning rate rises linearly from 0.
        cooldown: last share of the steps, at 0.3 times the learning rate.
        gradient_clip: largest norm of the gradient; None: any.
        stop_accuracy: end the stage once the accuracy on pairs held out at random reached this at two
            evaluations in a row.
        policy: who plays the games that are trained on: one of the game's ``policies``, or ``best`` for the one that
            makes its best moves; None: the first, uniform play. No other task has one.
        trained: ``all``, or ``unembedding``: the rest of the model stays as it is, so that the stage only gives words
            to what the trunk holds.

    Raises:
        BadInput: a field is out of range.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2, for the decoupled weight decay.
    """

    objective: Annotated[Objective, _table]
    steps: int = 1000
    batch_size: int | None = None
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 10
    cooldown: float = 0.0
    gradient_clip: float | None = None
    stop_accuracy: float | None = None
    policy: str | None = None
    trained: str = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise BadInput(f"objective = {self.objective!r}: expected an objective such as objectives.get('answer')")
        for name, low in (("steps", 1), ("warmup", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if name == "batch_size" and value is None:
                continue
            if type(value) is not int or not low <= value < 2**53:
                raise BadInput(f"{name} = {value!r}: expected a whole number >= {low}")
        check_number("learning_rate", self.learning_rate, 0, 1e37, above=True)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("cooldown", self.cooldown, 0, 1)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise BadInput(f"betas = {self.betas!r}: expected two numbers")
        for beta in self.betas:
            check_number("betas", beta, 0, 1)
        if 1 in self.betas:
            raise BadInput(f"betas = {self.betas}: expected numbers below 1")
        if self.gradient_clip is not None:
            check_number("gradient_clip", self.gradient_clip, 0, above=True)
        if self.stop_accuracy is not None:
            check_number("stop_accuracy", self.stop_accuracy, 0, 1)
        if self.trained not in TRAINED:
            raise BadInput(f"trained = {self.trained!r}: expected one of {', '.join(TRAINED)}")

    def check(self, task: Task | Game) -> None:
        """Return nothing.

        Raises:
            BadInput: the objective is undefined for the task, or the policy is.
        """
        self.objective.check(task)
        if not is_game(task):
            if self.policy is not None:
                raise BadInput(f"policy = {self.policy!r}: {task.name!r} is no game; leave policy out")
            return
        if self.batch_size is None:
            raise BadInput(f"batch_size = None: {task.name!r} is a game, whose sequences have no end; give a number")
        known = (*task.policies, *([BEST] if len(task.policies) > 1 else []))
        if self.policy is not None and self.policy not in known:
            raise UnknownName(f"policy of {task.name}", self.policy, known)


def policy_of(stage: Stage, game: Game) -> str:
    """Return the name, among the game's policies, of who plays the games that a stage trains on."""
    return game.policies[1] if stage.policy == BEST else stage.policy or game.policies[0]


@dataclass(frozen=True)
class Recipe:
    """A named sequence of stages; the weights pass from one to the next.

    Raises:
        BadInput: it has no stage, or something that is none.
    """

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise BadInput(f"name = {self.name!r}: expected a text")
        if not isinstance(self.stages, tuple) or not self.stages:
            raise BadInput(f"stages = {self.stages!r}: expected a tuple of at least one Stage")
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise BadInput(f"{stage!r} in recipe {self.name!r}: expected a Stage")

    @property
    def steps(self) -> int:
        """Updates at most, over all stages."""
        return sum(stage.steps for stage in self.stages)

    def check(self, task: Task | Game) -> None:
        """Return nothing.

        Raises:
            BadInput: an objective or a policy is undefined for the task.
        """
        for stage in self.stages:
            stage.check(task)
