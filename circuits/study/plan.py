"""The runs that a study consists of, and which of them a shard does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from circuits.errors import BadInput
from circuits.model import ModelConfig
from circuits.objectives.recipe import Recipe, Stage, policy_of
from circuits.runs import run_id
from circuits.study.grid import Spec
from circuits.tasks.base import Task
from circuits.tasks.games import Game, is_game


@dataclass(frozen=True)
class Planned:
    """One run of a study: what is trained, and where it is kept. Calling it trains and analyses what is missing."""

    id: str
    folder: Path
    cell: str
    task: Task | Game
    model: ModelConfig
    recipe: Recipe
    seed: int
    why: str

    @property
    def path(self) -> Path:
        """Directory of the run."""
        return self.folder / "runs" / self.id

    @property
    def analysis(self) -> Path:
        """Directory of the run's analysis."""
        return self.path / "analysis"

    @property
    def log(self) -> Path:
        """File for what the worker prints."""
        return self.folder / "logs" / f"{self.id}.log"

    @property
    def objective(self) -> str:
        """Names of the objectives, stage by stage; on a game, of what trains the trunk, with what is not its default.

        A stage that trains the unembedding alone only lets a trunk speak; where there is no other, the trunk is the
        untrained control, ``random-init``.
        """
        task, stages = self.task, self.recipe.stages
        if not is_game(task):
            return " + ".join(stage.objective.name for stage in stages)
        trunk = [stage for stage in stages if stage.trained == "all"]
        return " + ".join(_described(stage, task) for stage in trunk) or "random-init"

    @property
    def steps(self) -> int:
        """Updates at most, over all stages."""
        return self.recipe.steps

    @property
    def cost(self) -> float:
        """Estimated multiplications of the training, for the order of runs and the time left."""
        m = self.model
        per_token = m.n_layers * (4 * m.d_model * m.n_heads * (m.d_head or 0) + 2 * m.d_model * (m.d_mlp or 0))
        per_token += m.d_model * (m.d_vocab_out or m.d_vocab)
        size = 0 if is_game(self.task) else self.task.split_size("train")
        tokens = sum(stage.steps * (stage.batch_size or size) for stage in self.recipe.stages) * self.task.n_ctx
        return float(tokens * per_token)

    def __str__(self) -> str:
        return f"{self.cell} / {self.recipe.name} / seed {self.seed}"

    def __call__(self) -> None:
        """Train and analyse what is missing."""
        from circuits.study.analyse import complete

        complete(self)


def _described(stage: Stage, game: Game) -> str:
    """An objective's name with those of its settings that are words and not the default, and who plays if not usual."""
    fields = dataclasses.fields(stage.objective)  # type: ignore[arg-type]
    values = [getattr(stage.objective, f.name) for f in fields if getattr(stage.objective, f.name) != f.default]
    words = [value for value in values if isinstance(value, str)]
    if policy_of(stage, game) != game.policies[0]:
        words.append(policy_of(stage, game))
    return f"{stage.objective.name} ({', '.join(words)})" if words else str(stage.objective.name)


def plan(spec: Spec, folder: Path) -> tuple[Planned, ...]:
    """Every run of a study, in the order of its cells, recipes and seeds."""
    return tuple(
        Planned(
            run_id(cell.task, recipe, seed, cell.model),
            folder,
            cell.name,
            cell.task,
            cell.model,
            recipe,
            seed,
            cell.why,
        )
        for cell in spec.cells
        for recipe in cell.recipes
        for seed in cell.seeds
    )


def shard_of(runs: Sequence[Planned], shard: str | None) -> list[Planned]:
    """The runs that shard ``"i/n"`` does (i from 1 to n; None: all of them), the longest first.

    Shards are disjoint, cover all runs and cost about the same.

    Raises:
        BadInput: not of the form i/n.
    """
    ordered = sorted(runs, key=lambda run: (-run.cost, run.id))
    if shard is None:
        return ordered
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise BadInput(f"shard = {shard!r}: expected I/N with 1 <= I <= N, such as 1/4")
    return ordered[int(match[1]) - 1 :: int(match[2])]
