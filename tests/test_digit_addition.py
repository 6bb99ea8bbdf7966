"""Digit-wise addition against column addition in pure Python, its hash splits, and the published cascade counts."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.errors import BadInput
from circuits.tasks import DigitAddition
from circuits.tasks.arithmetic.digit_splits import splitmix64

# Tasks are built in the tests, as run-time type checks draw random numbers, which a strategy must not.
digit_parameters = st.fixed_dictionaries(
    {
        "digits": st.integers(1, 8),
        "reverse": st.booleans(),
        "scratchpad": st.booleans(),
        "train_fraction": st.floats(0.2, 0.8),
        "block": st.sampled_from((0.0, 0.1, 0.3)),
        "nine_share": st.floats(0, 1),
        "split_seed": st.integers(0, 2**63 - 1),
    }
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(task: DigitAddition, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(task.n_operand_values, (n, 2), generator=generator(seed))


def digit(number: int, column: int) -> int:
    return number // 10**column % 10


def add_columns(
    a: int, b: int, digits: int, *, carry: dict[int, int] | None = None, base_sum: dict[int, int] | None = None
) -> tuple[int, list[int]]:
    """School addition, with a carry into or a base sum of some columns overruled; the sum and all carries."""
    into, answer = [0], 0
    for i in range(digits):
        into[i] = (carry or {}).get(i, into[i])
        total = digit(a, i) + digit(b, i)
        answer += ((base_sum or {}).get(i, total % 10) + into[i]) % 10 * 10**i
        into.append((total + into[i]) // 10)
    into[digits] = (carry or {}).get(digits, into[digits])
    return answer + into[digits] * 10**digits, into


@given(digit_parameters, st.integers(0, 2**32))
def test_sequences_spell_out_column_addition(parameters: dict, seed: int) -> None:
    task = DigitAddition(**parameters)
    d, operands = task.digits, uniform(task, 20, seed)
    for (a, b), row in zip(operands.tolist(), task.encode(operands).tokens.tolist(), strict=True):
        total, into = add_columns(a, b, d)
        assert total == a + b
        written = f"{total:0{d + 1}d}"
        pad = "".join(map(str, into[1:])) + ";" if task.scratchpad else ""
        text = f"{a:0{d}d}+{b:0{d}d}={pad}{written[::-1] if task.reverse else written}"
        assert "".join(task.vocabulary[token] for token in row) == text


@given(digit_parameters, st.integers(0, 2**32))
def test_swapped_variables_equal_column_addition_with_that_value_overruled(parameters: dict, seed: int) -> None:
    task = DigitAddition(**parameters)
    d = task.digits
    base, source = uniform(task, 30, seed), uniform(task, 30, seed + 1)
    names = [f"carry into column {i}" for i in range(1, d + 1)] + [f"base sum of column {i}" for i in range(d)]
    assert [variable.name for variable in task.variables()] == names
    for variable in task.variables():
        i = int(variable.name.split()[-1])
        for (a, b), (c, e), value, answer in zip(
            base.tolist(),
            source.tolist(),
            variable.value(source).tolist(),
            variable.swapped_answer(base, source).tolist(),
            strict=True,
        ):
            if variable.name.startswith("carry"):
                assert value == add_columns(c, e, d)[1][i]
                assert answer == add_columns(a, b, d, carry={i: value})[0]
            else:
                assert value == (digit(c, i) + digit(e, i)) % 10
                assert answer == add_columns(a, b, d, base_sum={i: value})[0]


def test_swapped_base_sum_gives_the_example_of_the_paper() -> None:
    """quanta_maths, maths_search_add.py: the base add of 222222 + 111111 into 555555 + 444444 gives 999399."""
    task = DigitAddition(digits=6)
    (variable,) = (v for v in task.variables() if v.name == "base sum of column 2")
    answer = variable.swapped_answer(torch.tensor([[555555, 444444]]), torch.tensor([[222222, 111111]]))
    assert answer.tolist() == [999399]


@settings(max_examples=25)
@given(digit_parameters, st.integers(0, 2**32), st.data())
def test_pairs_change_one_column_and_one_digit_of_the_sum(parameters: dict, seed: int, data: st.DataObject) -> None:
    task = DigitAddition(**parameters)
    d = task.digits
    change = data.draw(st.sampled_from(task.pair_changes))
    pairs = task.pairs(25, seed=seed, change=change)
    column = int(change.split()[-1])
    carries = change.startswith("carry")
    touched = column - 1 if carries else column
    clean, corrupt = operands_of(task, pairs.clean), operands_of(task, pairs.corrupt)
    assert bool(task.in_split(clean, "train").all())
    for (a, b), (c, e) in zip(clean.tolist(), corrupt.tolist(), strict=True):
        same = [i for i in range(d) if (digit(a, i), digit(b, i)) == (digit(c, i), digit(e, i))]
        assert same == [i for i in range(d) if i != touched]
        (before, into), (after, into_corrupt) = add_columns(a, b, d), add_columns(c, e, d)
        assert [i for i in range(d + 1) if digit(before, i) != digit(after, i)] == [column]
        assert [i for i in range(d + 1) if into[i] != into_corrupt[i]] == ([column] if carries else [])
    for side, operands, token in ((pairs.clean, clean, pairs.correct), (pairs.corrupt, corrupt, pairs.wrong)):
        tokens = task.encode(operands).tokens
        assert torch.equal(tokens[:, :-1], side)
        assert torch.equal(tokens.gather(1, pairs.position[:, None] + 1)[:, 0], token)
    # What the model has read at the position differs in the touched operand digits alone.
    differs = pairs.clean != pairs.corrupt
    prompt = {d - 1 - touched, 2 * d - touched}
    for row, position in zip(differs.tolist(), pairs.position.tolist(), strict=True):
        assert {i for i in range(position + 1) if row[i]} <= prompt
    assert (pairs.correct != pairs.wrong).all()


def operands_of(task: DigitAddition, inputs: torch.Tensor) -> torch.Tensor:
    d = task.digits
    rows = [["".join(map(str, row[:d])), "".join(map(str, row[d + 1 : 2 * d + 1]))] for row in inputs.tolist()]
    return torch.tensor([[int(a), int(b)] for a, b in rows])


def test_digit_pairs_reach_every_sum_that_keeps_the_carry() -> None:
    task = DigitAddition(digits=2, block=0.0)
    pairs = task.pairs(8000, change="digits of column 1")
    reached: dict[tuple[int, int], list[int]] = defaultdict(list)
    for (a, b), (c, e) in zip(
        operands_of(task, pairs.clean).tolist(), operands_of(task, pairs.corrupt).tolist(), strict=True
    ):
        into = add_columns(a, b, 2)[1]
        reached[into[1], into[2]].append(digit(c, 1) + digit(e, 1))
    ranges = {(0, 0): range(10), (0, 1): range(10, 19), (1, 0): range(9), (1, 1): range(9, 19)}
    assert {key: sorted(set(sums)) for key, sums in reached.items()} == {k: list(r) for k, r in ranges.items()}


def test_pairs_flip_each_carry_both_ways() -> None:
    task = DigitAddition()
    for change in task.pair_changes[: task.digits]:
        share = task.pairs(400, change=change)
        up = float((share.wrong > share.correct).float().mean())
        assert 0.3 < up < 0.7


@pytest.mark.parametrize("scratchpad", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_state_by_position_names_the_column_its_digit_and_its_carries(reverse: bool, scratchpad: bool) -> None:
    task = DigitAddition(digits=3, reverse=reverse, scratchpad=scratchpad)
    operands = uniform(task, 50)
    state = {name: values.tolist() for name, values in task.state(operands).items()}
    for row, ((a, b), tokens) in enumerate(zip(operands.tolist(), task.encode(operands).tokens.tolist(), strict=True)):
        total, into = add_columns(a, b, 3)
        out = [*into[1:], 0]
        answer = range(4) if reverse else range(3, -1, -1)
        expected = [(2, digit(a, 2)), (1, digit(a, 1)), (0, digit(a, 0)), (-1, -1)]
        expected += [(2, digit(b, 2)), (1, digit(b, 1)), (0, digit(b, 0)), (-1, -1)]
        if scratchpad:
            expected += [*((i, out[i]) for i in range(3)), (-1, -1)]
        expected += [(i, digit(total, i)) for i in answer]
        assert list(zip(state["column"][row], state["digit"][row], strict=True)) == expected
        for position, (column, _) in enumerate(expected):
            known = position >= 8 and column >= 0
            assert state["carry in"][row][position] == (into[column] if known else -1)
            assert state["carry out"][row][position] == (out[column] if known else -1)
        assert tokens[-1] == expected[-1][1]


def test_a_nine_leaves_the_carry_open_until_a_lower_column_settles_it() -> None:
    state = DigitAddition(digits=3).state(torch.tensor([[445, 558], [445, 154]]))
    # 445 + 558: columns 9, 9 and 13; tokens of b at positions 4, 5, 6.
    assert state["carry into column 3"][0].tolist() == [-1] * 6 + [1] * 6
    # 445 + 154: the hundreds column sums to five, so nothing below can make it carry.
    assert state["carry into column 3"][1].tolist() == [-1] * 4 + [0] * 8
    assert state["sum of column 1"][1].tolist() == [-1] * 5 + [9] * 7


@given(st.integers(1, 5), st.integers(0, 2**32))
def test_cascade_length_equals_following_the_carry_by_hand(digits: int, seed: int) -> None:
    task = DigitAddition(digits=digits, nine_share=1.0, block=0.0)
    operands = task.sample("train", 60, generator=generator(seed)).operands
    for (a, b), length in zip(operands.tolist(), task.cascade_length(operands).tolist(), strict=True):
        into, longest = add_columns(a, b, digits)[1], 0
        for start in range(digits):
            i = start
            while i < digits and into[i] and digit(a, i) + digit(b, i) == 9:
                i += 1
            longest = max(longest, i - start)
        assert length == longest


def test_cascade_lengths_are_distributed_as_in_the_published_evaluation(reference_data: Path) -> None:
    published = json.loads((reference_data / "progress-measures" / "reference.json").read_text())
    by_cascade = published["5_digit_addition_infinite"]["by_cascade"]
    task = DigitAddition(digits=5)
    share = torch.bincount(task.cascade_length(uniform(task, 300_000)), minlength=5) / 300_000
    for length in range(4):
        expected = 3000 * float(share[length])
        # Three thousand uniform pairs: counts within four standard deviations.
        assert abs(by_cascade[str(length)][1] - expected) < 4 * expected**0.5


def test_the_share_of_nines_makes_cascades_frequent_in_training_only() -> None:
    plain, rich = (DigitAddition(digits=5, nine_share=share) for share in (0.0, 0.4))
    cascades = [
        float((task.cascade_length(task.sample(split, 4000, generator=generator()).operands) >= 2).float().mean())
        for task, split in ((plain, "train"), (rich, "train"), (rich, "random"))
    ]
    assert cascades[1] > 4 * cascades[0] and abs(cascades[2] - cascades[0]) < 0.01
    sums = DigitAddition(digits=4, nine_share=1.0).sample("train", 4000, generator=generator()).operands
    nines = [float((sums // 10**i % 10).sum(dim=1).eq(9).float().mean()) for i in range(4)]
    # Half of the columns by choice, and a tenth of the others by chance.
    assert all(abs(share - 0.55) < 0.05 for share in nines)


# --- splits by hash ---


def splitmix64_by_hand(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_splitmix64_equals_arithmetic_on_unbounded_integers(words: list[int]) -> None:
    mixed = [word % 2**64 for word in splitmix64(torch.tensor(words)).tolist()]
    assert mixed == [splitmix64_by_hand(word % 2**64) for word in words]


def test_splitmix64_gives_the_reference_implementations_first_outputs() -> None:
    # splitmix64.c seeded with 1234567; each call adds the constant to the state before mixing.
    state = [(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(3)]
    words = torch.tensor([word - 2**64 if word >= 2**63 else word for word in state])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [word % 2**64 for word in splitmix64(words).tolist()] == expected


@given(digit_parameters, st.integers(0, 2**32))
def test_every_pair_is_in_exactly_one_split(parameters: dict, seed: int) -> None:
    task = DigitAddition(**parameters)
    operands = uniform(task, 400, seed)
    members = torch.stack([task.in_split(operands, split) for split in ("train", "random", "block")])
    assert (members.sum(dim=0) == 1).all()
    block = task.block_range
    by_hand = [a in block and b in block for a, b in operands.tolist()]
    assert members[2].tolist() == by_hand
    assert len(block) == round(task.block * 10**task.digits)
    assert 0 <= 10**task.digits - block.stop - block.start <= 1


def test_large_splits_have_the_shares_asked_for_and_another_seed_gives_another() -> None:
    task, other = DigitAddition(digits=6, train_fraction=0.7), DigitAddition(digits=6, train_fraction=0.7, split_seed=1)
    operands = uniform(task, 100_000)
    train, elsewhere = task.in_split(operands, "train"), other.in_split(operands, "train")
    for split in ("train", "random", "block"):
        share = float(task.in_split(operands, split).float().mean())
        assert abs(share - task.split_size(split) / 10**12) < 0.006
    # Independent splits agree on 0.7 ** 2 of the pairs outside the block.
    assert abs(float((train & elsewhere).float().mean()) - 0.99 * 0.49) < 0.006


@pytest.mark.parametrize("split", ["train", "random", "block"])
def test_examples_of_a_split_too_large_to_enumerate_are_distinct_members(split: str) -> None:
    task = DigitAddition(digits=4, block=0.3)
    batch, again = (task.examples(split, limit=20_000, seed=1) for _ in range(2))
    assert torch.equal(batch.tokens, again.tokens)
    assert len(batch.operands.unique(dim=0)) == len(batch) == 20_000
    assert task.in_split(batch.operands, split).all() and task.verify(batch.tokens).all()


def test_a_split_too_large_to_enumerate_asks_for_a_limit() -> None:
    task = DigitAddition(digits=4)
    for limit in (None, 10**7):
        with pytest.raises(BadInput, match="expected a limit of at most 1,000,000"):
            task.examples("train", limit=limit)
    assert len(task.examples("block")) == 10**6


def test_a_split_without_a_suitable_pair_says_so_instead_of_searching_for_ever() -> None:
    with pytest.raises(BadInput, match="block > 0"):
        DigitAddition(block=0.0).sample("block", 1, generator=generator())
    for seed in range(400):
        task = DigitAddition(digits=1, train_fraction=0.02, block=0.0, split_seed=seed) if _one_nine(seed) else None
        if task is not None:
            with pytest.raises(BadInput, match="has no suitable pair"):
                task.pairs(1)
            return
    raise AssertionError("no split seed below 400 trains on nines alone")


def _one_nine(seed: int) -> bool:
    """Whether the split seed gives a one-digit training split in which every pair sums to nine."""
    try:
        operands = DigitAddition(digits=1, train_fraction=0.02, block=0.0, split_seed=seed).examples("train").operands
    except BadInput:
        return False
    return bool((operands.sum(dim=1) == 9).all())
