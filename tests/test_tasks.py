"""Contract of every task in TASKS, and the one-token tasks against pure-Python references."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from circuits import tasks
from circuits.errors import BadInput, UnknownName
from circuits.tasks import SPLITS, TASKS, Addition, DigitAddition, ModularAddition, Role, Task
from circuits.tasks.base import Pairs

PRIMES = (2, 3, 5, 7, 11, 13, 23)
SMALL = [
    *(ModularAddition(p=11, operation=operation, block=3) for operation in "+-*"),
    *(Addition(n=13, operation=operation, block=4) for operation in "+-"),
    *(
        DigitAddition(digits=2, reverse=reverse, scratchpad=scratchpad)
        for reverse in (False, True)
        for scratchpad in (False, True)
    ),
]
small_tasks = pytest.mark.parametrize("task", SMALL, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square(task: Task) -> torch.Tensor:
    values = torch.arange(task.n_operand_values)
    return torch.cartesian_prod(values, values)


def one_token_answer(task: ModularAddition | Addition, a: int, b: int) -> int:
    raw = {"+": a + b, "-": a - b, "*": a * b}[task.operation]
    return raw % task.p if isinstance(task, ModularAddition) else raw


def right_by_hand(task: Task, row: list[int]) -> bool:
    """Strict verification of a sequence as text, from the documented format alone."""
    if any(not 0 <= token < len(task.vocabulary) for token in row):
        return False
    words = [task.vocabulary[token] for token in row]
    if isinstance(task, DigitAddition):
        return right_digits(task, "".join(words))
    values = [str(value) for value in range(task.n_operand_values)]
    if len(words) != 4 or words[0] not in values or words[1] not in values or words[2] != "=":
        return False
    return words[3] == str(one_token_answer(task, int(words[0]), int(words[1])))


def right_digits(task: DigitAddition, text: str) -> bool:
    d = task.digits
    a, b = text[:d], text[d + 1 : 2 * d + 1]
    if not (a.isdigit() and b.isdigit() and text[d : d + 1] == "+" and text[2 * d + 1 : 2 * d + 2] == "="):
        return False
    carry, written = 0, ""
    for x, y in zip(reversed(a), reversed(b), strict=True):
        carry = (int(x) + int(y) + carry) // 10
        written += str(carry)
    total = f"{int(a) + int(b):0{d + 1}d}"
    expected = (written + ";" if task.scratchpad else "") + (total[::-1] if task.reverse else total)
    return text[2 * d + 2 :] == expected


@st.composite
def one_token_parameters(draw: st.DrawFn) -> dict[str, object]:
    """Parameters for ``tasks.get``: the tasks are built in the tests, as run-time type checks draw random numbers."""
    modular = draw(st.booleans())
    n = draw(st.sampled_from(PRIMES) if modular else st.integers(2, 34))
    shared = {
        "operation": draw(st.sampled_from("+-*" if modular else "+-")),
        "train_fraction": draw(st.floats(0.1, 0.95)),
        "block": draw(st.integers(0, n - 1)),
        "split_seed": draw(st.integers(0, 2**40)),
    }
    outside = n * n - shared["block"] ** 2
    assume(0 < round(shared["train_fraction"] * outside) < outside)
    return {"name": "modular-addition", "p": n, **shared} if modular else {"name": "addition", "n": n, **shared}


# --- every task ---


def test_the_table_names_each_task_by_its_own_name() -> None:
    assert set(TASKS) == {"modular-addition", "addition", "digit-addition"}
    for name, cls in TASKS.items():
        assert cls.name == name
        assert tasks.get(name) == tasks.get(name.replace("-", "_")) == cls()
        assert isinstance(tasks.get(name), Task)


@small_tasks
def test_parameters_are_plain_json_and_make_the_same_task_again(task: Task) -> None:
    parameters = dataclasses.asdict(task)
    assert all(type(value) in (int, float, str, bool) for value in parameters.values())
    again = tasks.get(task.name, **json.loads(json.dumps(parameters)))
    assert again == task and hash(again) == hash(task) and again is not task
    assert torch.equal(again.examples("random").tokens, task.examples("random").tokens)


@small_tasks
def test_sizes_masks_and_answers_fit_together(task: Task) -> None:
    batch = task.examples("train", limit=7)
    assert task.d_vocab == len(task.vocabulary) == len(set(task.vocabulary))
    assert task.n_ctx == batch.inputs.shape[1] == batch.targets.shape[1] == len(task.roles) - 1
    assert int(batch.tokens.max()) < task.d_vocab
    assert torch.equal(batch.answer_mask, task.roles[1:] == Role.ANSWER)
    assert bool((batch.completion_mask >= batch.answer_mask).all()) and bool(batch.completion_mask[-1])
    words = [int(task.vocabulary[token]) for token in task.answer_tokens.tolist()]
    assert words == task.answer_values.tolist() == sorted(words)
    assert torch.isin(batch.targets[:, batch.answer_mask], task.answer_tokens).all()
    if not isinstance(task, DigitAddition):
        assert batch.answer_mask.tolist() == [False, False, True]


@small_tasks
def test_distance_is_a_metric_and_goes_around_the_circle(task: Task) -> None:
    distance, values = task.distance(), task.answer_values.tolist()
    assert distance.shape == (len(values), len(values))
    for i, v in enumerate(values):
        for j, w in enumerate(values):
            around = [abs(v - w + turn * (task.period or 0)) for turn in (-1, 0, 1)]
            assert float(distance[i, j]) == min(around)


@small_tasks
def test_splits_are_disjoint_cover_the_square_and_are_right(task: Task) -> None:
    n, seen = task.n_operand_values, []
    for split in SPLITS:
        batch = task.examples(split)
        cells = (batch.operands[:, 0] * n + batch.operands[:, 1]).tolist()
        assert cells == sorted(cells) and len(cells) == task.split_size(split) > 0
        assert task.verify(batch.tokens).all()
        assert torch.equal(task.read_answer(batch.tokens), task.answer(batch.operands))
        seen += cells
    assert sorted(seen) == list(range(n * n))


@small_tasks
def test_the_block_is_contiguous_and_its_tokens_appear_elsewhere(task: Task) -> None:
    block = task.examples("block").operands
    for operand in (0, 1):
        values = sorted(set(block[:, operand].tolist()))
        assert values == list(range(values[0], values[-1] + 1))
        assert set(values) <= set(task.examples("train").operands[:, operand].tolist())
    assert len(block) == len(values) ** 2


@small_tasks
@pytest.mark.parametrize("split", SPLITS)
def test_the_same_generator_draws_the_same_batch_from_the_split(task: Task, split: str) -> None:
    first, again = (task.sample(split, 40, generator=generator(3)) for _ in range(2))
    other = task.sample(split, 40, generator=generator(4))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    members = set(map(tuple, task.examples(split).operands.tolist()))
    assert set(map(tuple, first.operands.tolist())) <= members
    assert len(first) == 40 and task.verify(first.tokens).all()


@small_tasks
def test_limited_examples_are_distinct_members_chosen_by_the_seed(task: Task) -> None:
    state = torch.get_rng_state()
    first, again = (task.examples("train", limit=20, seed=1) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, task.examples("train", limit=20, seed=2).tokens)
    rows = set(map(tuple, first.operands.tolist()))
    assert len(rows) == 20 and rows <= set(map(tuple, task.examples("train").operands.tolist()))
    assert len(task.examples("train", limit=10**6)) == task.split_size("train")
    assert len(task.examples("train", limit=0)) == 0
    assert torch.equal(torch.get_rng_state(), state)


@small_tasks
def test_the_verifier_agrees_with_a_reference_on_every_single_token_corruption(task: Task) -> None:
    batch = task.examples("random", limit=6)
    length = batch.tokens.shape[1]
    corrupted = []
    for row in batch.tokens.tolist():
        for position in range(length):
            for token in (-1, *range(task.d_vocab + 1)):
                if token != row[position]:
                    corrupted.append([*row[:position], token, *row[position + 1 :]])
    expected = [right_by_hand(task, row) for row in corrupted]
    assert task.verify(torch.tensor(corrupted)).tolist() == expected
    if getattr(task, "operation", "+") != "*":
        assert not any(expected)
    for row in batch.tokens.tolist():
        assert right_by_hand(task, row)


@small_tasks
def test_sequences_of_another_length_are_wrong_and_have_no_answer(task: Task) -> None:
    tokens = task.examples("train", limit=3).tokens
    for other in (tokens[:, :-1], torch.cat((tokens, tokens[:, -1:]), dim=1)):
        assert not task.verify(other).any()
        assert (task.read_answer(other) == task.undefined).all()


@small_tasks
def test_an_answer_that_is_no_number_reads_as_undefined(task: Task) -> None:
    tokens = task.examples("train", limit=3).tokens.clone()
    no_answers = [t for t in range(-1, task.d_vocab + 2) if t not in task.answer_tokens.tolist()]
    for token in no_answers:
        tokens[:, -1] = token
        assert (task.read_answer(tokens) == task.undefined).all()
    assert task.undefined not in task.answer(square(task)).tolist()


@small_tasks
def test_the_state_is_exactly_what_the_tokens_so_far_determine(task: Task) -> None:
    """A state is -1 at a position iff two sequences with the same tokens so far disagree on it later."""
    batch = task.encode(square(task))
    of_the_token = ("column", "digit", "carry in", "carry out")
    n_positions = batch.tokens.shape[1]
    prefixes = [batch.tokens[:, : end + 1].unique(dim=0, return_inverse=True)[1] for end in range(n_positions)]
    for name, states in task.state(batch.operands).items():
        if isinstance(task, DigitAddition) and name in of_the_token:
            continue
        final = states[:, -1]
        assert int(final.min()) >= 0
        for position, prefix in enumerate(prefixes):
            least, most = (
                final.new_zeros(int(prefix.max()) + 1).scatter_reduce(0, prefix, final, how, include_self=False)[prefix]
                for how in ("amin", "amax")
            )
            now, expected = states[:, position], torch.where(least == most, final, -1)
            if position > 0 or isinstance(task, DigitAddition):
                assert torch.equal(now, expected), (name, position)
            else:
                # Some first operands settle a quantity by themselves (0 * b); one-token tasks wait for the second.
                assert ((now == -1) | (now == expected)).all()


@small_tasks
def test_batches_and_pairs_move_between_devices(task: Task) -> None:
    batch = task.examples("train", limit=2).to("meta")
    assert {tensor.device.type for tensor in (batch.tokens, batch.operands, batch.roles)} == {"meta"}
    pairs = task.pairs(2).to("meta")
    assert {getattr(pairs, f.name).device.type for f in dataclasses.fields(pairs) if f.name != "changed"} == {"meta"}


@small_tasks
def test_pairs_are_seeded_and_start_from_training_examples(task: Task) -> None:
    train = {tuple(row) for row in task.examples("train").inputs.tolist()}
    for change in task.pair_changes:
        first, again = (task.pairs(30, seed=5, change=change) for _ in range(2))
        assert torch.equal(first.clean, again.clean) and torch.equal(first.corrupt, again.corrupt)
        assert not torch.equal(first.clean, task.pairs(30, seed=6, change=change).clean)
        assert set(map(tuple, first.clean.tolist())) <= train
        assert first.changed == change and len(first) == 30
        assert (first.correct != first.wrong).all()
        assert torch.isin(torch.cat((first.correct, first.wrong)), task.answer_tokens).all()
    assert task.pairs(3).changed == task.pair_changes[0]


@small_tasks
def test_swapping_a_variable_with_its_own_value_changes_nothing(task: Task) -> None:
    operands = square(task)
    names = [variable.name for variable in task.variables()]
    assert len(names) == len(set(names)) > 0
    for variable in task.variables():
        assert torch.equal(variable.swapped_answer(operands, operands), task.answer(operands))
        assert len(set(variable.value(operands).tolist())) > 1
        if variable.operand is not None:
            changed = operands.clone()
            changed[:, 1 - variable.operand] = 0
            assert torch.equal(variable.value(changed), variable.value(operands))


@small_tasks
@pytest.mark.untyped
def test_bad_requests_are_typed_errors(task: Task) -> None:
    with pytest.raises(UnknownName, match="did you mean 'train'"):
        task.examples("trian")
    with pytest.raises(UnknownName, match="split"):
        task.sample("test", 1, generator=generator())
    with pytest.raises(UnknownName, match="split"):
        task.split_size("test")
    with pytest.raises(UnknownName, match="change"):
        task.pairs(1, change="nothing")
    with pytest.raises(BadInput, match="limit = -1"):
        task.examples("train", limit=-1)
    with pytest.raises(BadInput, match=f"expected 0 to {task.n_operand_values - 1}"):
        task.encode(torch.tensor([[0, task.n_operand_values]]))
    with pytest.raises(BadInput, match="shape"):
        task.encode(torch.tensor([[0, 1, 1]]))


BAD_PARAMETERS = [
    ("modular-addition", {"p": 54}, "p = 54 is not prime.*53 and 59"),
    ("modular-addition", {"p": 1}, "p = 1: expected 2 to 997"),
    ("modular-addition", {"p": 998}, "p = 998: expected 2 to 997"),
    ("modular-addition", {"p": "53"}, "p = '53': expected a whole number"),
    ("modular-addition", {"p": 53.0}, "expected a whole number"),
    ("modular-addition", {"operation": "/"}, "unknown operation '/'"),
    ("modular-addition", {"block": 53}, "block = 53: expected 0 to 52"),
    ("modular-addition", {"block": -1}, "block = -1"),
    ("modular-addition", {"split_seed": -1}, "split_seed"),
    ("addition", {"n": 301}, "n = 301: .*too large for the vocabulary.*300"),
    ("addition", {"n": 1}, "n = 1"),
    ("addition", {"n": True}, "n = True"),
    ("addition", {"operation": "*"}, "unknown operation"),
    ("addition", {"n": 10, "block": 10}, "block = 10: .*table has 10 rows"),
    ("addition", {"n": 2, "block": 1, "train_fraction": 0.01}, "gives 0 of 3 pairs to training"),
    ("addition", {"n": 2, "block": 1, "train_fraction": 0.99}, "at least one in training and one held out"),
    ("digit-addition", {"digits": 9}, "digits = 9: expected 1 to 8"),
    ("digit-addition", {"digits": 0}, "digits = 0"),
    ("digit-addition", {"reverse": 1}, "reverse = 1: expected true or false"),
    ("digit-addition", {"block": 1.0}, "block = 1.0"),
    ("digit-addition", {"block": 1e-4}, "less than one of 1000 operand values"),
    ("digit-addition", {"nine_share": 1.5}, "nine_share = 1.5: expected a number >= 0 and <= 1"),
    ("digit-addition", {"digits": 5, "train_fraction": 1e-5}, "train_fraction = 1e-05 with block = 0.1: leaves"),
    ("digit-addition", {"digits": 5, "block": 0.9999}, "block = 0.9999: leaves"),
    ("digit-addition", {"digits": 1, "train_fraction": 0.002}, "leaves train or random without a pair"),
    *((name, {"train_fraction": bad}, "train_fraction") for name in TASKS for bad in (0, 1.0, -0.5, math.nan, "0.5")),
    *((name, {"blok": 3}, "unknown parameter of .* did you mean 'block'") for name in TASKS),
    ("modular-adition", {}, "unknown task 'modular-adition': did you mean 'modular-addition'"),
]


@pytest.mark.untyped
@pytest.mark.parametrize(("name", "parameters", "message"), BAD_PARAMETERS)
def test_bad_parameters_name_the_value_and_what_was_expected(name: str, parameters: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tasks.get(name, **parameters)


# --- one token per number ---


@given(one_token_parameters())
def test_one_token_answers_equal_brute_force(parameters: dict) -> None:
    task = tasks.get(**parameters)
    operands, words = square(task), task.vocabulary
    tokens = task.encode(operands).tokens.tolist()
    for (a, b), answer, row in zip(operands.tolist(), task.answer(operands).tolist(), tokens, strict=True):
        assert answer == one_token_answer(task, a, b)
        assert [words[token] for token in row] == [str(a), str(b), "=", str(answer)]
        assert row[:2] == [a, b] and row[2] == task.d_vocab - 1
        assert answer < 0 or row[3] == answer


@given(one_token_parameters())
def test_one_token_splits_cover_the_square_in_the_shares_asked_for(parameters: dict) -> None:
    task = tasks.get(**parameters)
    n, rows = task.n_operand_values, {}
    for split in SPLITS:
        rows[split] = set(map(tuple, task.examples(split).operands.tolist()))
        assert len(rows[split]) == task.split_size(split)
    assert rows["train"] | rows["random"] | rows["block"] == {(a, b) for a in range(n) for b in range(n)}
    assert sum(map(len, rows.values())) == n * n
    assert len(rows["train"]) == round(task.train_fraction * (n * n - task.block**2))
    start = min((a for a, _ in rows["block"]), default=0)
    assert rows["block"] == {(start + i, start + j) for i in range(task.block) for j in range(task.block)}


def test_the_split_seed_moves_the_random_split_and_not_the_block() -> None:
    one, two = Addition(split_seed=1), Addition(split_seed=2)
    assert not torch.equal(one.examples("random").tokens, two.examples("random").tokens)
    assert torch.equal(one.examples("block").tokens, two.examples("block").tokens)


def test_every_answer_of_the_default_block_has_pairs_outside_it() -> None:
    task = Addition()
    assert set(task.answer(task.examples("block").operands).tolist()) <= set(
        task.answer(task.examples("train").operands).tolist()
    )


def test_sampling_from_a_task_without_a_block_says_what_to_do() -> None:
    task = ModularAddition(block=0)
    assert task.split_size("block") == len(task.examples("block")) == 0
    with pytest.raises(BadInput, match="block >= 1"):
        task.sample("block", 1, generator=generator())


def test_samples_are_uniform_over_the_split() -> None:
    task = ModularAddition(p=5)
    batch = task.sample("train", 12_000, generator=generator())
    counts = torch.bincount(batch.operands[:, 0] * 5 + batch.operands[:, 1], minlength=25)
    counts = counts[counts > 0]
    assert len(counts) == task.split_size("train") == 12
    # Chi-squared with 11 degrees of freedom exceeds 31 with probability 0.001.
    assert float((counts - 1000).square().sum()) / 1000 < 31


@given(one_token_parameters(), st.sampled_from("ab"), st.integers(0, 2**32))
@example({"name": "modular-addition", "p": 2, "operation": "*", "train_fraction": 0.75}, "a", 0)
def test_one_token_pairs_change_one_operand_and_the_answer(parameters: dict, change: str, seed: int) -> None:
    task = tasks.get(**parameters)
    operand = "ab".index(change)
    depends = task.examples("train").operands[:, 1 - operand] != 0
    if task.operation == "*" and not depends.any():
        with pytest.raises(BadInput, match="no training example whose answer depends"):
            task.pairs(5, seed=seed, change=change)
        return
    pairs = task.pairs(20, seed=seed, change=change)
    differs = pairs.clean != pairs.corrupt
    assert differs[:, operand].all() and int(differs.sum()) == 20
    assert (pairs.position == 2).all() and pairs.clean.shape == (20, 3)
    for side, token in ((pairs.clean, pairs.correct), (pairs.corrupt, pairs.wrong)):
        assert torch.equal(task.encode(side[:, :2]).tokens[:, 3], token)


def test_pairs_repeat_a_clean_input_only_when_the_training_split_is_used_up() -> None:
    task = Addition(n=10, block=2)
    available = task.split_size("train")
    assert len(task.pairs(available).clean.unique(dim=0)) == available
    assert len(task.pairs(available + 1)) == available + 1


def with_digit(number: int, place: int, digit: int) -> int:
    text = list(f"{number:03d}")
    text[2 - place] = str(digit)
    return int("".join(text))


@given(one_token_parameters(), st.integers(0, 2**32))
def test_swapped_answers_of_one_operand_equal_brute_force(parameters: dict, seed: int) -> None:
    task = tasks.get(**parameters)
    n = task.n_operand_values
    base, source = torch.randint(n, (2, 50, 2), generator=generator(seed))
    for variable in task.variables():
        if variable.operand is None:
            continue
        kind = variable.name.split()[0]
        swapped = variable.swapped_answer(base, source).tolist()
        for left, right, answer in zip(base.tolist(), source.tolist(), swapped, strict=True):
            mixed = list(left)
            if kind == "value":
                mixed[variable.operand] = right[variable.operand]
            else:
                place = ("units", "tens", "hundreds").index(kind)
                digit = int(f"{right[variable.operand]:03d}"[2 - place])
                mixed[variable.operand] = with_digit(left[variable.operand], place, digit)
            legal = mixed[variable.operand] < n
            assert answer == (one_token_answer(task, *mixed) if legal else task.undefined)


@settings(max_examples=30)
@given(st.integers(11, 300), st.sampled_from("+-"), st.integers(0, 2**32))
def test_swapped_carry_moves_the_tens_column_by_one(n: int, operation: str, seed: int) -> None:
    task = Addition(n=n, operation=operation, block=0)
    base, source = torch.randint(n, (2, 200, 2), generator=generator(seed))
    (carry,) = (variable for variable in task.variables() if variable.operand is None)
    legal = set(task.answer_values.tolist())
    for (a, b), (c, d), answer in zip(
        base.tolist(), source.tolist(), carry.swapped_answer(base, source).tolist(), strict=True
    ):
        if operation == "+":
            assert carry.name == "carry of the units column"
            units, taken = (a % 10 + b % 10) % 10, int(c % 10 + d % 10 > 9)
            expected = 10 * (a // 10 + b // 10 + taken) + units
        else:
            assert carry.name == "borrow of the units column"
            units, taken = (a % 10 - b % 10) % 10, int(c % 10 < d % 10)
            expected = 10 * (a // 10 - b // 10 - taken) + units
        assert answer == (expected if expected in legal else task.undefined)


def test_one_token_state_holds_the_carry_the_digits_and_the_reductions() -> None:
    state = {k: v[0].tolist() for k, v in Addition(n=100).state(torch.tensor([[58, 67]])).items()}
    assert state["a"] == [58] * 4 and state["b"] == [-1, 67, 67, 67]
    assert state["carry"] == [-1, 1, 1, 1] and state["magnitude"] == [-1, 125, 125, 125]
    assert [state[f"{place} digit"][-1] for place in ("hundreds", "tens", "units")] == [1, 2, 5]
    state = {k: v[0].tolist() for k, v in Addition(n=100, operation="-").state(torch.tensor([[31, 58]])).items()}
    assert (state["negative"][-1], state["magnitude"][-1], state["borrow"][-1]) == (1, 27, 1)
    for operation, reductions in (("+", 1), ("-", 0), ("*", 36)):
        state = ModularAddition(operation=operation).state(torch.tensor([[48, 40]]))
        assert int(state["reductions"][0, -1]) == reductions


def test_pairs_that_were_seen_are_left_out_and_no_others() -> None:
    task = tasks.get("modular-addition", p=7, block=2)
    first, second = task.pairs(20, seed=0), task.pairs(40, seed=1)

    def rows(pairs: Pairs) -> list[tuple[int, ...]]:
        return [(*a, *b) for a, b in zip(pairs.clean.tolist(), pairs.corrupt.tolist(), strict=True)]

    left = second.without(first)
    assert rows(left) == [row for row in rows(second) if row not in rows(first)] and 0 < len(left) < 40
    assert len(first.without(first)) == 0 and rows(left.without(first)) == rows(left)


def test_pairs_change_one_digit_alone() -> None:
    task = tasks.get("addition", n=60, block=10)
    assert {"units digit of a", "tens digit of b"} <= set(task.pair_changes)
    for change in task.pair_changes[2:]:
        pairs = task.pairs(60, seed=1, change=change)
        operand, unit = "ab".index(change[-1]), {"units": 1, "tens": 10}[change.split()[0]]
        moved = pairs.corrupt[:, operand] - pairs.clean[:, operand]
        assert (moved != 0).all() and (moved % unit == 0).all() and (moved.abs() < 10 * unit).all()
        assert torch.equal(pairs.clean[:, 1 - operand], pairs.corrupt[:, 1 - operand])
        assert (pairs.corrupt[:, operand] < 60).all()
    with pytest.raises(BadInput, match="n = -3: expected 1"):
        task.pairs(-3)
