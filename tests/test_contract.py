"""What holds for every entry of the dicts: a new line in one of them is tested by these."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

import pytest
import torch

from circuits import cli, discovery, mechanisms, objectives, reference, tasks, training, worldmodels
from circuits._io import canonical_json, config_id, from_json, to_json
from circuits.errors import BadInput, UnknownName
from circuits.model import Transformer

TABLES: dict[str, dict[str, Any]] = {
    "task": tasks.TASKS,
    "objective": objectives.OBJECTIVES,
    "method": discovery.METHODS,
    "analysis": discovery.ANALYSES,
    "test": mechanisms.TESTS,
    "reference": reference.REFERENCES,
    "game": tasks.games.GAMES,
    "probe": worldmodels.PROBES,
}
ENTRIES = [pytest.param(kind, name, id=f"{kind}-{name}") for kind, table in TABLES.items() for name in table]
CONFIGURED = [p for p in ENTRIES if p.values[0] in ("task", "objective")]


def entry(kind: str, name: str) -> Any:
    return TABLES[kind][name]


def get(kind: str, name: str, **parameters: Any) -> Any:
    module = {"task": tasks, "objective": objectives}[kind]
    return module.get(name, **parameters)


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_names_are_kebab_case_and_come_from_the_code(kind: str, name: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    own = entry(kind, name)
    named = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", own.__name__).lower()
    assert name == (own.name if inspect.isclass(own) and kind != "analysis" else named.replace("_", "-"))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_says_what_it_is_and_where_it_is_from(kind: str, name: str) -> None:
    text = inspect.getdoc(entry(kind, name)) or ""
    assert re.search(r"\.$|\.\s|:$", text.splitlines()[0]), "the first line is a sentence"
    assert "Source:" in text
    if kind in ("method", "analysis", "test", "probe"):
        assert "Fails when:" in text


FORMULA = re.compile(r"[-+*/|=] ?(m\(|dm/d|abs\(|P\(|E\[|\(|[a-z]_|\||mean|the sum)|\bm\(|P\(|E\[|max\(|dm/d|abs\(")
PAGED = [p for p in ENTRIES if p.values[0] in ("method", "analysis")]


@pytest.mark.parametrize(("kind", "name"), PAGED)
def test_its_page_has_formula_cost_conventions_source_and_failures(kind: str, name: str) -> None:
    text = inspect.getdoc(entry(kind, name)) or ""
    about, *labelled = re.split(r"^(Args|Cost|Conventions|Source|Fails when|Raises): ?", text, flags=re.M)
    parts = dict(zip(labelled[::2], labelled[1::2], strict=True))
    assert FORMULA.search(about), "no formula before the arguments"
    assert "forward" in parts["Cost"] and "backward" in parts["Cost"], "cost in both passes"
    assert len(parts["Conventions"].split()) >= 8
    if re.search(r"\bsteps: Points", parts.get("Args", "")):
        assert re.search(r"\bends?\b", parts["Conventions"]), "which end of the integral is included"
    assert re.search(r"arXiv|(19|20)\d\d|our own", parts["Source"])
    assert len(parts["Fails when"].split()) >= 5


@pytest.mark.parametrize(("kind", "name"), CONFIGURED)
def test_is_a_frozen_dataclass_that_survives_json(kind: str, name: str) -> None:
    one = get(kind, name)
    data = json.loads(json.dumps(to_json(one)))
    again = from_json(type(one), data)
    assert again == one
    assert canonical_json(again) == canonical_json(one)
    assert config_id(again) == config_id(one)
    field = dataclasses.fields(one)[0].name if dataclasses.fields(one) else "name"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, field, None)


@pytest.mark.parametrize(("kind", "name"), CONFIGURED)
def test_json_is_strict(kind: str, name: str) -> None:
    data = to_json(get(kind, name))
    with pytest.raises(BadInput, match="surprise"):
        from_json(entry(kind, name), data | {"surprise": 1})


@pytest.mark.parametrize(("kind", "name"), CONFIGURED)
def test_get_accepts_underscores_and_names_the_nearest(kind: str, name: str) -> None:
    assert get(kind, name.replace("-", "_")) == get(kind, name)
    with pytest.raises(UnknownName, match=re.escape(repr(name))):
        get(kind, name[:-1] + "x")
    with pytest.raises(UnknownName, match="no_such_parameter"):
        get(kind, name, no_such_parameter=1)


@pytest.mark.parametrize(("kind", "leading"), [("method", ["model", "pairs", "metric"]), ("test", ["model", "task"])])
def test_options_are_keywords(kind: str, leading: list[str]) -> None:
    for name, function in TABLES[kind].items():
        parameters = list(inspect.signature(function).parameters.values())
        assert [p.name for p in parameters[: len(leading)]] == leading, name
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[len(leading) :]), name


@pytest.mark.parametrize("name", tasks.TASKS)
def test_task_splits_are_disjoint_and_right(name: str) -> None:
    task = tasks.get(name)
    seen: set[tuple[int, ...]] = set()
    for split in tasks.SPLITS:
        if not task.split_size(split):
            continue
        batch = task.examples(split, limit=2000)
        pairs = {tuple(row) for row in batch.operands.tolist()}
        assert bool(task.verify(batch.tokens).all()), split
        assert not pairs & seen, split
        seen |= pairs


@pytest.mark.parametrize("name", tasks.TASKS)
def test_task_samples_follow_the_generator_alone(name: str) -> None:
    task = tasks.get(name)
    torch.manual_seed(1)
    one = task.sample("train", 32, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    two = task.sample("train", 32, generator=torch.Generator().manual_seed(7))
    other = task.sample("train", 32, generator=torch.Generator().manual_seed(8))
    assert torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_task_refuses_wrong_answers(name: str) -> None:
    task = tasks.get(name)
    batch = task.examples("train", limit=200)
    last = batch.tokens[:, -1].contiguous()
    wrong = batch.tokens.clone()
    wrong[:, -1] = task.answer_tokens[(torch.searchsorted(task.answer_tokens, last) + 1) % len(task.answer_tokens)]
    assert bool((wrong[:, -1] != last).all())
    assert not bool(task.verify(wrong).any())


@pytest.mark.parametrize("name", tasks.TASKS)
def test_pairs_differ_only_in_the_prompt_and_change_the_answer(name: str) -> None:
    task = tasks.get(name)
    pairs = task.pairs(64, seed=3)
    assert len(pairs) == 64
    assert bool((pairs.clean != pairs.corrupt).any(1).all())
    assert bool((pairs.correct != pairs.wrong).all())


@pytest.mark.parametrize("task_name", tasks.TASKS)
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_objective_reaches_every_matrix_or_says_why_not(name: str, task_name: str) -> None:
    task, objective = tasks.get(task_name), objectives.get(name)
    model = Transformer(training.default_model(task), seed=0)
    batch = task.sample("train", 64, generator=torch.Generator().manual_seed(0))
    try:
        objective.check(task)
    except BadInput as error:
        assert task_name in str(error)
        return
    one, two = (objective.loss(model, task, batch, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.value, two.value)
    assert bool(one.value.isfinite())
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gradients = torch.autograd.grad(one.value, matrices)
    assert all(bool(g.isfinite().all()) for g in gradients)
    # Where no sample earns a reward there is nothing to learn from.
    signal = float(one.metrics.get("reward", 1.0)) != 0
    assert {bool((g != 0).any()) for g in gradients} == {signal}


def test_the_command_line_lists_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    for kind, table in TABLES.items():
        plural = "analyses" if kind == "analysis" else f"{kind}s"
        assert set(listed[plural]) == set(table)
        assert all(listed[plural].values()), "an entry has no first line"
