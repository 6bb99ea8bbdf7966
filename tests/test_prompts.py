"""Prompts for pretrained models, on tokenizers that split years as those of GPT-2 and of SmolLM2 do."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import torch

from circuits.errors import BadInput
from circuits.tasks.prompts import greater_than_pairs, indirect_object_pairs, later_year_probability, sum_prompts


@dataclass
class WordTokenizer:
    """One token per word with its space; digits apart, in pairs, or as whole numbers."""

    digits: str
    words: list[str] = field(default_factory=list)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        pieces = re.findall(rf"{self.digits}| ?[A-Za-z]+|\s|[^A-Za-z\d\s]", text)
        assert "".join(pieces) == text
        for piece in pieces:
            if piece not in self.words:
                self.words.append(piece)
        return [self.words.index(piece) for piece in pieces]

    def decode(self, tokens: torch.Tensor) -> str:
        return "".join(self.words[token] for token in tokens.tolist())


def test_indirect_objects_flip_the_second_subject() -> None:
    tokenizer = WordTokenizer(r"\d")
    pairs = indirect_object_pairs(tokenizer, 60, seed=3)
    assert len(pairs) == 60 and pairs.changed == "subject"
    assert len(torch.unique(pairs.clean, dim=0)) == 60
    assert ((pairs.clean != pairs.corrupt).sum(1) == 1).all()
    orders = set()
    for i in range(60):
        clean, corrupt = tokenizer.decode(pairs.clean[i]), tokenizer.decode(pairs.corrupt[i])
        names = re.match(r"When (\w+) and (\w+) went to the \w+, (\w+) gave a \w+ to$", clean)
        assert names is not None
        one, two, subject = names.groups()
        assert one != two and subject in (one, two)
        orders.add(subject == one)
        other = two if subject == one else one
        assert corrupt == clean.replace(f", {subject} gave", f", {other} gave")
        assert tokenizer.words[int(pairs.correct[i])] == f" {other}"
        assert tokenizer.words[int(pairs.wrong[i])] == f" {subject}"
    assert orders == {True, False}
    assert (pairs.position == pairs.clean.shape[1] - 1).all()


def test_the_same_seed_draws_the_same_prompts_after_a_start_token() -> None:
    tokenizer = WordTokenizer(r"\d")
    first, again = (indirect_object_pairs(tokenizer, 5, seed=1) for _ in range(2))
    started = indirect_object_pairs(tokenizer, 5, seed=1, start=(0,))
    assert torch.equal(first.clean, again.clean)
    assert torch.equal(started.clean[:, 1:], first.clean) and (started.clean[:, 0] == 0).all()
    assert not torch.equal(first.clean, indirect_object_pairs(tokenizer, 5, seed=2).clean)


@pytest.mark.parametrize("digits", [r"\d", r"\d\d"], ids=["digit per token", "two digits per token"])
def test_years_start_later_than_the_corrupt_one(digits: str) -> None:
    tokenizer = WordTokenizer(digits)
    pairs = greater_than_pairs(tokenizer, 40, seed=2)
    unit = 10 if digits == r"\d" else 1
    assert len(torch.unique(pairs.clean, dim=0)) == 40
    for i in range(40):
        text = tokenizer.decode(pairs.clean[i])
        clean = re.match(r"The \w+ lasted from the year (\d\d)(\d\d) to the year (\d\d)$", text)
        assert clean is not None and clean[1] == clean[3]
        assert tokenizer.decode(pairs.corrupt[i]) == text.replace(f"{clean[1]}{clean[2]} to", f"{clean[1]}01 to")
        width = 1 if unit == 10 else 2
        assert tokenizer.words[int(pairs.correct[i])] == f"{int(clean[2]) // unit + 1:0{width}}"
        assert tokenizer.words[int(pairs.wrong[i])] == ("0" if unit == 10 else "02")


@pytest.mark.parametrize("digits", [r"\d", r"\d\d"], ids=["digit per token", "two digits per token"])
def test_the_metric_sums_the_probability_of_later_years(digits: str) -> None:
    tokenizer = WordTokenizer(digits)
    pairs = greater_than_pairs(tokenizer, 6, seed=0)
    metric = later_year_probability(tokenizer)
    logits = torch.randn(6, len(tokenizer.words), generator=torch.Generator().manual_seed(0))
    unit = 10 if digits == r"\d" else 1
    for i, value in enumerate(metric(logits, pairs).tolist()):
        probability = logits[i].softmax(0)
        start = int(re.findall(r"\d\d", tokenizer.decode(pairs.clean[i]))[1]) // unit
        expected = 0.0
        for number in range(100 // unit):
            (token,) = tokenizer.encode(f"{number:0{1 if unit == 10 else 2}}", add_special_tokens=False)
            if number > start:
                expected += float(probability[token])
            elif number < start or unit == 1:
                expected -= float(probability[token])
        assert value == pytest.approx(expected, abs=1e-6)


def test_a_model_that_is_certain_scores_one() -> None:
    tokenizer = WordTokenizer(r"\d")
    pairs = greater_than_pairs(tokenizer, 4)
    logits = torch.full((4, len(tokenizer.words)), -50.0)
    logits[torch.arange(4), pairs.correct] = 50.0
    assert later_year_probability(tokenizer)(logits, pairs).tolist() == pytest.approx([1.0] * 4)


def test_bad_input_is_named() -> None:
    tokenizer = WordTokenizer(r"\d")
    with pytest.raises(BadInput, match=r"n = 0 .* allow 1 to"):
        indirect_object_pairs(tokenizer, 0)
    with pytest.raises(BadInput, match=r"n = 5 .* allow 1 to 4"):
        indirect_object_pairs(tokenizer, 5, names=("Mary", "John"), places=("park",), objects=("ring",))
    with pytest.raises(BadInput, match=r"n = 81 .* allow 1 to 80"):
        greater_than_pairs(tokenizer, 81, events=("war",), centuries=(17,))
    with pytest.raises(BadInput, match=r"n = 0 .* allow 1 to 80"):
        greater_than_pairs(tokenizer, 0, events=("war",), centuries=(17,))
    with pytest.raises(BadInput, match="one token for each"):
        later_year_probability(Uneven())


class Uneven:
    """Years below fifty are one token, others two."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [int(text)] if int(text) < 50 else [int(text[0]), int(text[1])]


@pytest.mark.parametrize(("said", "rest"), [(0, ""), (1, "4")], ids=["first digit", "second digit"])
def test_sums_stop_before_the_digit_that_is_asked_for(said: int, rest: str) -> None:
    tokenizer = WordTokenizer(r"\d")
    operands = torch.tensor([[12, 34], [20, 25], [30, 11]])
    prompts = sum_prompts(tokenizer, operands, shots=[(11, 22)], said=said)
    assert [tokenizer.decode(row) for row in prompts.tokens] == [
        f"11+22=33\n{a}+{b}={rest}" for a, b in operands.tolist()
    ]
    assert [tokenizer.words[t] for t in prompts.answer] == [str(a + b)[said] for a, b in operands.tolist()]
    half = prompts.take(torch.tensor([True, False, True]))
    assert len(half) == 2 and half.operands.tolist() == [[12, 34], [30, 11]]
    assert torch.equal(half.answer, prompts.answer[[0, 2]])


def test_sums_of_a_tokenizer_with_whole_numbers_are_one_token() -> None:
    tokenizer = WordTokenizer(r"\d+")
    prompts = sum_prompts(tokenizer, torch.tensor([[7, 5], [70, 50]]), start=(0,))
    assert [tokenizer.words[t] for t in prompts.answer] == ["12", "120"]
    assert (prompts.tokens[:, 0] == 0).all() and prompts.tokens.shape == (2, 5)


def test_sums_that_cannot_be_asked_for_are_named() -> None:
    digits, numbers = WordTokenizer(r"\d"), WordTokenizer(r"\d+")
    with pytest.raises(BadInput, match="differ in length"):
        sum_prompts(digits, torch.tensor([[1, 2], [10, 2]]))
    with pytest.raises(BadInput, match="none is left after 1"):
        sum_prompts(digits, torch.tensor([[1, 2]]), said=1)
    with pytest.raises(BadInput, match="joins the sum"):
        sum_prompts(numbers, torch.tensor([[1, 2]]), text="{a}+{b}=0{sum}")
    with pytest.raises(BadInput, match="before"):
        sum_prompts(digits, torch.tensor([[1, 2]]), text="{a}+{sum}={b}")
