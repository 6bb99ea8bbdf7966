"""Reads a study's TOML: which recipes train which tasks, with which seeds.

name = "my-study"
title = "What the objective does to modular addition"
seeds = [0, 1]

[[recipe]]                                   # what makes the recipe what it is
name = "answer, weight decay"
stages = [{ objective = "answer", weight_decay = 1.0 }]

[[cell]]                                     # one column of the result matrix
task = { name = "modular-addition", p = 53 }
recipes = ["answer, weight decay"]
stage = { steps = 500, learning_rate = 1e-2 }   # what the recipes' stages leave open
model = { n_layers = 2 }                        # optional: differences from the task's default model
why = "Weight decay makes the general solution the cheaper one."
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from circuits import objectives, tasks, training
from circuits._io import from_json, to_json
from circuits.errors import BadInput, CircuitsError, UnknownName
from circuits.model import ModelConfig
from circuits.objectives.recipe import Recipe, Stage
from circuits.tasks.base import Task
from circuits.tasks.games import Game

_Table = Mapping[str, Any]
_STAGE_FIELDS = {f.name for f in dataclasses.fields(Stage)}
_MODEL_FIELDS = {f.name for f in dataclasses.fields(ModelConfig)}


@dataclass(frozen=True)
class Cell:
    """A task, the model that learns it, and the recipes that train it, with the reason to expect what they give."""

    name: str
    task: Task | Game
    model: ModelConfig
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Spec:
    """What a study is: its cells in order, and the TOML that says so."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    text: str


def parse(text: str, *, origin: str = "study") -> Spec:
    """The study that a TOML text describes; ``origin`` is what errors call it.

    Raises:
        BadInput: not TOML, a key or name that does not exist, a missing key, a value that cannot be used. The
            message names the section and its line.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{origin}: not valid TOML: {error}") from error
    places = _Places(origin, text)
    top = places.top
    _check_keys(data, {"name", "title", "seeds", "recipe", "cell"}, required={"name", "recipe", "cell"}, where=top)
    name = _typed(data, "name", str, top)
    recipes: dict[str, _Table] = {}
    for index, table in enumerate(_tables(data, "recipe", top)):
        where = places.section("recipe", index)
        _check_keys(table, {"name", "stages"}, required={"name", "stages"}, where=where)
        if _typed(table, "name", str, where) in recipes:
            raise BadInput(f"{where}: a second recipe named {table['name']!r}; names must differ")
        recipes[table["name"]] = table
    seeds = _seeds(data, top, default=(0,))
    cells = [
        _cell(table, recipes, seeds, places.section("cell", index))
        for index, table in enumerate(_tables(data, "cell", top))
    ]
    _check_columns(cells, top)
    return Spec(name, _typed(data, "title", str, top, default=name), tuple(cells), text)


def _cell(table: _Table, recipes: Mapping[str, _Table], seeds: tuple[int, ...], where: str) -> Cell:
    known = {"name", "task", "recipes", "model", "stage", "seeds", "why"}
    _check_keys(table, known, required={"task", "recipes"}, where=where)
    task = _named(table["task"], "task", tasks.get, where)
    overrides = _typed(table, "model", dict, where, default={})
    _check_keys(overrides, _MODEL_FIELDS, where=f"{where}, model")
    defaults = _typed(table, "stage", dict, where, default={})
    chosen = _typed(table, "recipes", list, where)
    if not chosen:
        raise BadInput(f"{where}: recipes = []: expected at least one of {', '.join(sorted(recipes))}")
    for recipe in chosen:
        if not isinstance(recipe, str) or recipe not in recipes:
            raise BadInput(f"{where}: {UnknownName('recipe', str(recipe), recipes)}")
    built = tuple(_recipe(recipes[name], defaults, task, where) for name in chosen)
    return Cell(
        _typed(table, "name", str, where, default=heading(task)),
        task,
        _model(task, overrides, where),
        built,
        _seeds(table, where, default=seeds),
        _typed(table, "why", str, where, default=""),
    )


def _recipe(table: _Table, defaults: _Table, task: Task | Game, where: str) -> Recipe:
    stages = table["stages"]
    where = f"{where}, recipe {table['name']!r}"
    if not isinstance(stages, list) or not stages:
        raise BadInput(f"{where}: stages: expected a list of tables such as {{ objective = 'answer', steps = 500 }}")
    built = []
    for number, stage in enumerate(stages, start=1):
        here = f"{where}, stage {number}"
        if not isinstance(stage, dict):
            raise BadInput(f"{here}: {stage!r}: expected a table such as {{ objective = 'answer', steps = 500 }}")
        fields = {**defaults, **stage}
        _check_keys(fields, _STAGE_FIELDS, required={"objective"}, where=here)
        objective = _named(fields.pop("objective"), "objective", objectives.get, here)
        try:
            objective.check(task)
            stage = from_json(Stage, {"objective": to_json(objective), **fields})
            stage.check(task)
            built.append(stage)
        except CircuitsError as error:
            raise BadInput(f"{here}: {error}") from error
    return Recipe(table["name"], tuple(built))


def _model(task: Task | Game, overrides: _Table, where: str) -> ModelConfig:
    """The task's default model with some fields changed; sizes that follow from d_model follow it."""
    data = to_json(training.default_model(task))
    if "d_model" in overrides:
        data.update(d_head=None, d_mlp=None, init_std=None)
    try:
        model = from_json(ModelConfig, {**data, **overrides})
        training.check_fits(task, model)
        return model
    except CircuitsError as error:
        raise BadInput(f"{where}, model: {error}") from error


def single(toml: _Table, *, where: str) -> tuple[Task | Game, Recipe, ModelConfig]:
    """One run's task, recipe and model from tables ``task``, ``objective``, ``stage`` and ``model``.

    What ``stage`` leaves open is as in ``training.default_recipe``, so that a name alone means the same here and there.

    Raises:
        BadInput: a name or key that does not exist, or a value that cannot be used.
    """
    task = _named(toml["task"], "task", tasks.get, where)
    objective = _named(toml["objective"], "objective", objectives.get, where)
    first, *others = (to_json(stage) for stage in training.default_recipe(task, objective).stages)
    recipe = {"name": toml["objective"]["name"], "stages": [{**first, **toml["stage"]}, *others]}
    _check_keys(toml["model"], _MODEL_FIELDS, where=f"{where}, model")
    return task, _recipe(recipe, {}, task, where), _model(task, toml["model"], where)


def heading(task: Task | Game) -> str:
    """A task's name, its size and those of its other parameters that are not the default."""
    fields = sorted(dataclasses.fields(task), key=lambda f: bool(f.kw_only))  # type: ignore[arg-type]
    shown = [
        f"{f.name} = {str(value).lower() if isinstance(value, bool) else value}"
        for index, f in enumerate(fields)
        if (value := getattr(task, f.name)) != f.default or index == 0
    ]
    return ", ".join([task.name.replace("-", " "), *shown])


def _named(value: object, kind: str, get: Any, where: str) -> Any:
    """An entry of a name table: ``"answer"`` or ``{ name = "banded", share = 0.5 }``."""
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise BadInput(f"{where}: {kind} = {value!r}: expected a name or a table with a name and parameters")
    try:
        return get(table["name"], **{key: item for key, item in table.items() if key != "name"})
    except CircuitsError as error:
        raise BadInput(f"{where}: {error}") from error


def _seeds(table: _Table, where: str, *, default: tuple[int, ...]) -> tuple[int, ...]:
    seeds = table.get("seeds", list(default))
    valid = isinstance(seeds, list) and seeds and all(type(s) is int and 0 <= s <= training.LAST_SEED for s in seeds)
    if not valid or len(set(seeds)) < len(seeds):
        raise BadInput(
            f"{where}: seeds = {seeds!r}: expected a list of different whole numbers from 0 to {training.LAST_SEED}"
        )
    return tuple(seeds)


def _typed(table: _Table, key: str, kind: type, where: str, *, default: Any = None) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind):
        raise BadInput(f"{where}: {key} = {value!r}: expected a {kind.__name__}")
    return value


def _tables(data: _Table, key: str, where: str) -> Sequence[_Table]:
    value = data[key]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise BadInput(f"{where}: {key}: expected at least one [[{key}]] section")
    return value


def _check_keys(table: _Table, known: set[str], *, where: str, required: set[str] | None = None) -> None:
    for key in table:
        if key not in known:
            raise BadInput(f"{where}: {UnknownName('key', key, known)}")
    if missing := sorted((required or set()) - table.keys()):
        raise BadInput(f"{where}: missing {', '.join(missing)}")


def _check_columns(cells: Sequence[Cell], where: str) -> None:
    """One column heading must mean one task and model, with each recipe in it once."""
    columns: dict[str, Cell] = {}
    seen: set[tuple[str, str, int]] = set()
    for cell in cells:
        first = columns.setdefault(cell.name, cell)
        if (first.task, first.model) != (cell.task, cell.model):
            raise BadInput(f"{where}: two cells are called {cell.name!r} but differ in task or model: give them names")
        for recipe in cell.recipes:
            for seed in cell.seeds:
                if (key := (cell.name, recipe.name, seed)) in seen:
                    raise BadInput(f"{where}: recipe {recipe.name!r} stands twice in cell {cell.name!r} (seed {seed})")
                seen.add(key)


class _Places:
    """Where in the TOML text each section begins, for error messages."""

    def __init__(self, origin: str, text: str) -> None:
        self.top = origin
        self._lines: dict[str, list[int]] = {"recipe": [], "cell": []}
        for number, line in enumerate(text.splitlines(), start=1):
            if match := re.match(r"\s*\[\[\s*(recipe|cell)\s*\]\]", line):
                self._lines[match[1]].append(number)

    def section(self, kind: str, index: int) -> str:
        """Such as ``study.toml, [[cell]] 2 (line 31)``."""
        lines = self._lines[kind]
        line = f" (line {lines[index]})" if index < len(lines) else ""
        return f"{self.top}, [[{kind}]] {index + 1}{line}"
