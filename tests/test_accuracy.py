"""The accuracy gate: mirror images of training pairs, in tables of any size, and the interval of the other pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuits import mechanisms, tasks
from circuits._stats import wilson_interval
from circuits.mechanisms.accuracy import mirror_trained
from circuits.model import ModelConfig, Transformer
from circuits.reference import build


class Remembers(torch.nn.Module):
    """Knows every pair whose mirror image, or which itself, is a training pair; says 0 to all others."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        n = task.n_operand_values
        self.answers = torch.zeros(n, n, dtype=torch.long)
        for operands in (task.examples("train").operands, task.examples("train").operands.flip(1)):
            self.answers[operands[:, 0], operands[:, 1]] = task.answer(operands)
        self.vocabulary = task.d_vocab

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        said = self.answers[tokens[:, 0], tokens[:, 1]]
        return torch.nn.functional.one_hot(said, self.vocabulary).float()[:, None].expand(-1, tokens.shape[1], -1)


@pytest.mark.parametrize("n", [20, 150])
def test_mirror_images_are_set_aside_in_tables_of_any_size(n: int) -> None:
    task = tasks.get("addition", n=n, block=0, train_fraction=0.6)
    details = mechanisms.accuracy_gate(Remembers(task), task).details
    assert details["train"] == 1.0 and 0.5 < details["random"] < 0.7
    assert details["unmirrored"] < 0.02 and 0 < details["n_unmirrored"] < details["n_random"] / 2


def test_the_share_of_few_unmirrored_pairs_has_a_wide_interval() -> None:
    task = tasks.get("modular-addition", p=7, train_fraction=0.8)
    details = mechanisms.accuracy_gate(Remembers(task), task).details
    hits = round(details["unmirrored"] * details["n_unmirrored"])
    assert (details["unmirrored_low"], details["unmirrored_high"]) == wilson_interval(hits, details["n_unmirrored"])
    assert details["unmirrored_high"] - details["unmirrored_low"] > 0.3
    answers = task.answer(task.examples("random").operands)
    assert details["chance"] == pytest.approx(float(torch.bincount(answers).max()) / len(answers))


def test_no_pair_is_left_where_all_mirror_images_were_trained() -> None:
    task = tasks.get("modular-addition", p=7, train_fraction=0.97)
    mirrored = mirror_trained(task, task.examples("random").operands)
    assert mirrored is not None and mirrored.all()  # this split has one pair, off the diagonal
    details = mechanisms.accuracy_gate(Remembers(task), task).details
    assert details["n_unmirrored"] == 0 and details["unmirrored"] == details["random"] == 1.0


def test_digit_tasks_say_themselves_which_pairs_are_trained() -> None:
    task = tasks.get("digit-addition", digits=2)
    held = task.examples("random").operands
    trained = {tuple(pair) for pair in task.examples("train").operands.tolist()}
    mirrored = mirror_trained(task, held)
    assert mirrored is not None and mirrored.tolist() == [(b, a) in trained for a, b in held.tolist()]
    large = tasks.get("digit-addition", digits=5)
    held = large.examples("random", limit=400).operands
    mirrored = mirror_trained(large, held)
    assert mirrored is not None and 0.7 < mirrored.float().mean() < 0.9
    model = Transformer(ModelConfig(d_vocab=large.d_vocab, n_ctx=large.n_ctx, d_model=8, n_layers=1), seed=0)
    details = mechanisms.accuracy_gate(model, large, limit=64).details
    assert 0 < details["n_unmirrored"] < 40


def test_subtraction_has_no_mirror_images() -> None:
    task = tasks.get("modular-addition", p=11, operation="-")
    model = Transformer(ModelConfig(d_vocab=12, n_ctx=3, d_model=8, d_mlp=8), seed=0)
    details = mechanisms.accuracy_gate(model, task).details
    assert details["n_unmirrored"] == details["n_random"]


def test_an_algorithm_is_right_on_unmirrored_pairs() -> None:
    model, task, _ = build("number-line", n=140)
    details = mechanisms.accuracy_gate(model, task, limit=500).details
    assert details["unmirrored"] == 1.0 and details["n_unmirrored"] < 200
