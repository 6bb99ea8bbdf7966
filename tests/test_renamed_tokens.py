"""A task told in a shuffled vocabulary: the same world, and the same verdict on a model that is renamed with it."""

from __future__ import annotations

import pytest
import torch

from circuits import mechanisms, reference, tasks
from circuits.errors import BadInput
from circuits.tasks.base import Task
from circuits.tasks.renamed import RenamedTokens


@pytest.fixture
def renamed() -> RenamedTokens:
    task = tasks.get("addition", n=12, block=3)
    return RenamedTokens(task, tuple(torch.randperm(task.d_vocab, generator=torch.Generator().manual_seed(3)).tolist()))


def test_it_is_a_task_whose_tokens_read_back(renamed: RenamedTokens) -> None:
    assert isinstance(renamed, Task)
    batch, plain = renamed.examples("train"), renamed.task.examples("train")
    assert torch.equal(batch.operands, plain.operands) and not torch.equal(batch.tokens, plain.tokens)
    words, names = renamed.vocabulary, renamed.task.vocabulary
    assert [words[t] for t in batch.tokens.flatten().tolist()] == [names[t] for t in plain.tokens.flatten().tolist()]
    assert renamed.verify(batch.tokens).all() and torch.equal(renamed.read_answer(batch.tokens), plain.operands.sum(1))
    assert [words[t] for t in renamed.answer_tokens.tolist()] == [str(v) for v in renamed.answer_values.tolist()]


def test_pairs_and_samples_are_renamed_alike(renamed: RenamedTokens) -> None:
    for change in renamed.pair_changes:
        pairs, plain = renamed.pairs(9, seed=1, change=change), renamed.task.pairs(9, seed=1, change=change)
        order = torch.tensor(renamed.order)
        for name in ("clean", "corrupt", "correct", "wrong"):
            assert torch.equal(getattr(pairs, name), order[getattr(plain, name)])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(
        renamed.sample("train", 5, generator=generators[0]).operands,
        renamed.task.sample("train", 5, generator=generators[1]).operands,
    )


def test_a_model_renamed_with_its_task_answers_alike_and_gets_the_same_verdict() -> None:
    model, task, truth = reference.build("fourier-pizza", p=31, frequencies=4, seed=1)
    other, told = reference.renamed_tokens(model, task, seed=2)
    batch, plain = told.examples("train"), task.examples("train")
    with torch.no_grad():
        got, expected = other(batch.inputs)[:, -1], model(plain.inputs)[:, -1]
    assert torch.allclose(got[:, torch.tensor(told.order)], expected, atol=1e-4)
    verdict = mechanisms.explain(other, told, budget="quick")
    assert f"{verdict.label}/{verdict.mechanism}" == truth


def test_bad_orders_and_models_are_named(renamed: RenamedTokens) -> None:
    with pytest.raises(BadInput, match="each of 0 to 23 once"):
        RenamedTokens(renamed.task, (0, 1))
    model = reference.build("fourier-pizza", p=31).model
    with pytest.raises(BadInput, match="24 tokens, the model 32"):
        reference.renamed_tokens(model, renamed.task)
