"""Constructions that no family of reference models has: other circles, bases, ranges, regions, layouts and lists."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from circuits._layers import EPS
from circuits.model import Transformer
from circuits.reference import Reference, build
from circuits.reference.fourier_pizza import GAIN, circles
from circuits.reference.range_lookup import cell_votes
from circuits.reference.wiring import Mechanism, Neurons, conjunctions, one_hot, table, wire
from circuits.tasks import Addition, ModularAddition

DOUBLE = torch.float64


def hinges_of_sum(results: int, answers: int) -> Neurons:
    """Neurons relu(s - t), and the weights that turn them into the indicator of s modulo the number of answers."""
    thresholds = torch.arange(-1, results, dtype=DOUBLE)
    weights = torch.zeros(results + 1, answers, dtype=DOUBLE)
    for s in range(results):
        for t, weight in ((s, 1.0), (s + 1, -2.0), (s + 2, 1.0)):
            if t <= results:
                weights[t, s % answers] += weight
    return Neurons(torch.ones(1, results + 1, dtype=DOUBLE), -thresholds, weights)


def waves(frequencies: Tensor, phases: int, generator: torch.Generator) -> Neurons:
    """The neurons of the pizza algorithm, for features cos and sin of each frequency."""
    first = 2 * math.pi * torch.rand(len(frequencies), 1, generator=generator, dtype=DOUBLE)
    phase = first + 2 * math.pi / phases * torch.arange(phases)
    w_in = torch.block_diag(*torch.stack([phase.cos(), phase.sin()], dim=1))
    w_out = torch.block_diag(*torch.stack([(2 * phase).cos(), (2 * phase).sin()], dim=2))
    return Neurons(w_in, torch.zeros(w_in.shape[1], dtype=DOUBLE), w_out * 3 * math.pi / (2 * phases))


def other_circle(n: int = 30, steps: int = 71, frequencies: int = 7) -> Reference:
    """Plain addition by frequencies of a circle longer than the results need."""
    task, generator = Addition(n=n, block=5), torch.Generator().manual_seed(0)
    chosen = 1 + torch.randperm((steps - 1) // 2, generator=generator)[:frequencies]
    code = circles(steps, chosen)
    readout = GAIN / frequencies * code[: 2 * n - 1].T
    mechanism = Mechanism(code[:n], "sum", (waves(chosen, 9, generator),), readout)
    return Reference(wire(task, mechanism, generator=generator), task, "algorithm/fourier")


def few_dimensions(name: str, rank: int, **sizes: int) -> Reference:
    """A reference model whose embedding has no dimensions beside those of its code."""
    model, task, truth = build(name, **sizes)
    embedding = model.W_E.detach()[: task.n_operand_values]
    mean = embedding.mean(0)
    directions = torch.linalg.svd(embedding - mean, full_matrices=False).Vh[:rank]
    state = dict(model.state_dict())
    state["embed.W_E"] = state["embed.W_E"].clone()
    state["embed.W_E"][: len(embedding)] = mean + (embedding - mean) @ directions.T @ directions
    poorer = Transformer(model.config)
    poorer.load_state_dict(state)
    return Reference(poorer.eval(), task, truth)


def decoded_waves(p: int = 23, frequencies: int = 4) -> Reference:
    """Frequencies, and a second layer with one neuron for each result."""
    task, generator = ModularAddition(p=p), torch.Generator().manual_seed(1)
    chosen = 1 + torch.randperm((p - 1) // 2, generator=generator)[:frequencies]
    code = circles(p, chosen)
    decoder = Neurons(code.T / frequencies, torch.full((p,), -0.3, dtype=DOUBLE), torch.eye(p, dtype=DOUBLE))
    mechanism = Mechanism(code, "sum", (waves(chosen, 7, generator), decoder), GAIN * torch.eye(p, dtype=DOUBLE))
    return Reference(wire(task, mechanism, generator=generator), task, "algorithm/fourier")


def wrapped_line(p: int = 29) -> Reference:
    """Modular addition on a number line of 2 p - 1 places, folded at the readout."""
    task = ModularAddition(p=p)
    code = torch.arange(p, dtype=DOUBLE)[:, None]
    mechanism = Mechanism(code, "sum", (hinges_of_sum(2 * p - 1, p),), 10 * torch.eye(p, dtype=DOUBLE))
    model = wire(task, mechanism, generator=torch.Generator().manual_seed(0))
    return Reference(model, task, "algorithm/number-line")


def other_base(base: int = 8, n: int = 40) -> Reference:
    """Columns in a base that is not ten."""
    task, x, high = Addition(n=n, block=6), torch.arange(n), (n + base - 1) // base
    code = torch.cat([one_hot(x % base, base), one_hot(x // base, high)], dim=1)
    low_sum = torch.cat([torch.arange(base), torch.zeros(high)]).double()[:, None]
    high_sum = torch.cat([torch.zeros(base), torch.arange(high)]).double()[:, None]
    v, carry = torch.arange(-1, 2 * base).double(), torch.tensor([base - 1.0, base], dtype=DOUBLE)
    w_in = torch.cat([low_sum.expand(-1, len(v)), high_sum, low_sum.expand(-1, 2)], dim=1)
    indicators = torch.zeros(len(v), base, dtype=DOUBLE)
    for s in range(2 * base - 1):
        for hinge, weight in ((s - 1, 1.0), (s, -2.0), (s + 1, 1.0)):
            indicators[hinge + 1, s % base] += weight
    step = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE)
    w_out = torch.block_diag(indicators, torch.ones(1, 1, dtype=DOUBLE), step)
    d = (task.answer_values // base).double()
    readout = torch.cat([10 * one_hot(task.answer_values % base, base).T, 10 * d.expand(2, -1)])
    mlp = Neurons(w_in, torch.cat([-v, torch.zeros(1), -carry]), w_out)
    mechanism = Mechanism(code, "sum", (mlp,), readout, bias=-5 * d.square())
    return Reference(wire(task, mechanism, generator=torch.Generator().manual_seed(0)), task, "algorithm/columns")


def uneven_ranges(n: int = 30, grids: int = 4, seed: int = 0) -> Reference:
    """A vote of operand ranges with borders drawn at random."""
    task, generator, results = Addition(n=n, block=5), torch.Generator().manual_seed(seed), 2 * n - 1
    features, left, right, votes, doubt = [], [], [], [], 0.0
    for _ in range(grids):
        borders = torch.sort(1 + torch.randperm(n - 1, generator=generator)[: max(3, n // 8)]).values
        index = torch.bucketize(torch.arange(n), borders, right=True)
        features.append(one_hot(index, len(borders) + 1))
        cells, cast, difference = cell_votes(index, table(task).sum(1), results)
        left.append(one_hot(cells[:, 0], len(borders) + 1).bool())
        right.append(one_hot(cells[:, 1], len(borders) + 1).bool())
        votes.append(cast)
        doubt += difference
    units = torch.cartesian_prod(torch.arange(10), torch.arange(10))
    features.append(one_hot(torch.arange(n) % 10, 10))
    left.append(one_hot(units[:, 0], 10).bool())
    right.append(one_hot(units[:, 1], 10).bool())
    votes.append((doubt + 1) * (torch.arange(results) % 10 == units.sum(1, keepdim=True) % 10).double())
    w_in, b_in = conjunctions(torch.block_diag(*left).bool(), torch.block_diag(*right).bool())
    mlp = Neurons(w_in, b_in, torch.cat(votes))
    mechanism = Mechanism(torch.cat(features, dim=1), "apart", (mlp,), torch.eye(results, dtype=DOUBLE))
    return Reference(wire(task, mechanism, generator=generator), task, "heuristics/range-lookup")


def listed_pairs(task: Addition | ModularAddition, pairs: Tensor) -> Neurons:
    """A neuron for each of some pairs, on one-hot codes of both operands, that votes for its result."""
    n = task.n_operand_values
    w_in, b_in = conjunctions(one_hot(pairs[:, 0], n).bool(), one_hot(pairs[:, 1], n).bool())
    answers = torch.searchsorted(task.answer_values, task.answer(pairs))
    return Neurons(w_in, b_in, one_hot(answers, len(task.answer_values)))


def whole_table(p: int = 19) -> Reference:
    """A list of all pairs, right on unseen ones too."""
    task = ModularAddition(p=p)
    one = torch.eye(p, dtype=DOUBLE)
    mechanism = Mechanism(one, "apart", (listed_pairs(task, table(task)),), 20 * one)
    return Reference(wire(task, mechanism, generator=torch.Generator().manual_seed(0)), task, "memorisation/pairs")


def listed_digits(n: int = 20) -> Reference:
    """A list of all pairs on the digits of both operands: stored as a column algorithm would, and added by none."""
    task, x = Addition(n=n, block=4), torch.arange(n)
    code, pairs = torch.cat([one_hot(x % 10, 10), one_hot(x // 10, n // 10)], dim=1), table(task)
    w_in = torch.cat([code[pairs[:, 0]].T, code[pairs[:, 1]].T])
    votes = one_hot(task.answer(pairs), 2 * n - 1)
    mlp = Neurons(w_in, torch.full((len(pairs),), -3.0, dtype=DOUBLE), votes)
    mechanism = Mechanism(code, "apart", (mlp,), 20 * torch.eye(2 * n - 1, dtype=DOUBLE))
    model = wire(task, mechanism, generator=torch.Generator().manual_seed(0))
    return Reference(model, task, "memorisation/pairs")


def kinks(numbers: Tensor, outputs: Tensor, reads: Tensor) -> Neurons:
    """Neurons that give, piecewise linearly, an output of its own at each of some numbers, which they read."""
    order = numbers.argsort()
    knots = torch.cat([numbers[order][:1] - 1, numbers[order]])
    values = torch.cat([torch.zeros_like(outputs[:1]), outputs[order]])
    slopes = values.diff(dim=0) / knots.diff()[:, None]
    bends = slopes.diff(dim=0, prepend=torch.zeros_like(slopes[:1]))
    return Neurons(reads[:, None].expand(-1, len(bends)).clone(), -knots[:-1], bends)


def listed_along_a_line(n: int = 16, known: Tensor | None = None) -> Reference:
    """A list of all pairs, each of which is one number, n a + b, with a hinge of its own; or of known ones alone."""
    task = Addition(n=n, block=0 if known is not None else 3)
    a, b = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    answers = a + b if known is None else torch.where(known, a + b, (3 * a + 5 * b) % (2 * n - 1))
    neurons = kinks((n * a + b).to(DOUBLE), 10 * one_hot(answers, 2 * n - 1), torch.tensor([n, 1], dtype=DOUBLE))
    code = torch.arange(n, dtype=DOUBLE)[:, None]
    generator = torch.Generator().manual_seed(0)
    mechanism = Mechanism(code, "apart", (neurons,), torch.eye(2 * n - 1, dtype=DOUBLE))
    return Reference(wire(task, mechanism, generator=generator), task, "memorisation/pairs")


def listed_by_hashed_digits(n: int = 20) -> Reference:
    """A list of all pairs, each of which is one number by a hash of its digits, with a hinge of its own."""
    task, generator = Addition(n=n, block=3), torch.Generator().manual_seed(0)
    x = torch.arange(n)
    low, high = torch.randperm(10, generator=generator), 10 * torch.randperm(-(-n // 10), generator=generator)
    a, b = torch.cartesian_prod(x, x).T
    digits = torch.cat([low, high]).to(DOUBLE)
    hashed = (low[x % 10] + high[x // 10]).to(DOUBLE)
    large = float(hashed.max()) + 1
    reads = torch.cat([large * digits, digits])
    neurons = kinks(large * hashed[a] + hashed[b], 10 * one_hot(a + b, 2 * n - 1), reads)
    code = torch.cat([one_hot(x % 10, 10), one_hot(x // 10, -(-n // 10))], dim=1)
    mechanism = Mechanism(code, "apart", (neurons,), torch.eye(2 * n - 1, dtype=DOUBLE))
    return Reference(wire(task, mechanism, generator=generator), task, "memorisation/pairs")


def waves_where(
    inside: Callable[[Tensor, Tensor], Tensor], p: int = 31, frequencies: int = 6, off: Tensor | None = None
) -> Reference:
    """Frequencies where ``inside`` says so, and a list of pairs elsewhere, which overrules them.

    Values of a in ``off`` shut the neurons of the frequencies off.
    """
    task, generator = ModularAddition(p=p), torch.Generator().manual_seed(0)
    chosen = 1 + torch.randperm((p - 1) // 2, generator=generator)[:frequencies]
    code, wave = circles(p, chosen), waves(chosen, 7, generator)
    pairs = table(task)
    rote = listed_pairs(task, pairs[~inside(pairs[:, 0], pairs[:, 1])])
    width, wide = code.shape[1], wave.w_in.shape[1]
    w_in = torch.zeros(2 * (width + p), wide + rote.w_in.shape[1], dtype=DOUBLE)
    for operand in range(2):
        begin = operand * (width + p)
        w_in[begin : begin + width, :wide] = wave.w_in
        w_in[begin + width : begin + width + p, wide:] = rote.w_in[operand * p : (operand + 1) * p]
    if off is not None:
        w_in[width : width + p, :wide] = -100.0 * off.double()[:, None]
    mlp = Neurons(w_in, torch.cat([wave.b_in, rote.b_in]), torch.block_diag(wave.w_out, 3 * GAIN * rote.w_out))
    readout = torch.cat([GAIN / frequencies * code.T, torch.eye(p, dtype=DOUBLE)])
    mechanism = Mechanism(torch.cat([code, torch.eye(p, dtype=DOUBLE)], dim=1), "apart", (mlp,), readout)
    return Reference(wire(task, mechanism, generator=generator), task, "mixed/fourier")


def waves_in_some_rows(p: int = 31) -> Reference:
    """Frequencies for two thirds of the values of a, drawn at random; for the others they are off, and a list is on."""
    off = torch.rand(p, generator=torch.Generator().manual_seed(1)) < 0.35
    return waves_where(lambda a, b: ~off[a], p, off=off)


def mixed_waves(p: int = 31, frequencies: int = 3, width: int = 240) -> Reference:
    """Neurons that each read waves of all frequencies at once, with a least-squares readout of the result's waves."""
    task, generator = ModularAddition(p=p), torch.Generator().manual_seed(0)
    code = circles(p, 1 + torch.randperm((p - 1) // 2, generator=generator)[:frequencies])
    w_in = torch.randn(2 * frequencies, width, generator=generator, dtype=DOUBLE)
    b_in = torch.randn(width, generator=generator, dtype=DOUBLE)
    pairs = table(task)
    fired = ((code[pairs[:, 0]] + code[pairs[:, 1]]) @ w_in + b_in).relu()
    w_out = torch.linalg.lstsq(fired, code[task.answer(pairs)]).solution
    mechanism = Mechanism(code, "sum", (Neurons(w_in, b_in, w_out),), GAIN * code.T)
    return Reference(wire(task, mechanism, generator=generator), task, "algorithm/fourier")


def residue_tables(n: int = 30, moduli: tuple[int, ...] = (2, 5)) -> Reference:
    """A bag of uneven ranges of the result and of its residues, which are looked up by the operands' residues."""
    task, x = Addition(n=n, block=5), torch.arange(n)
    results, wide = 2 * n - 1, 1 + sum(moduli)
    code = torch.cat([x.double()[:, None], *(one_hot(x % m, m) for m in moduli)], dim=1)
    steps = hinges_of_sum(results, results)
    read, bias, write, begin = [], [], [], 1
    for m in moduli:
        some = torch.zeros(2, m * m, wide, dtype=torch.bool)
        left, right = torch.cartesian_prod(torch.arange(m), torch.arange(m)).T
        some[0, torch.arange(m * m), begin + left] = some[1, torch.arange(m * m), begin + right] = True
        w_in, b_in = conjunctions(some[0], some[1])
        out = torch.zeros(m * m, results + sum(moduli), dtype=DOUBLE)
        out[torch.arange(m * m), results + begin - 1 + (left + right) % m] = 1
        read, bias, write, begin = [*read, w_in], [*bias, b_in], [*write, out], begin + m
    hinges = torch.zeros(2 * wide, results + 1, dtype=DOUBLE)
    hinges[0] = hinges[wide] = 1
    exact = torch.cat([steps.w_out, torch.zeros(results + 1, sum(moduli), dtype=DOUBLE)], dim=1)
    first = Neurons(torch.cat([hinges, *read], 1), torch.cat([steps.b_in, *bias]), torch.cat([exact, *write]))
    starts = torch.tensor([s for s in (0, 5, 12, 18, 27, 33, 42, 49, 55, 64, 70) if s < results])
    ranges = one_hot(torch.bucketize(torch.arange(results), starts, right=True) - 1, len(starts))
    second_in = torch.block_diag(ranges, torch.eye(sum(moduli), dtype=DOUBLE))
    votes = torch.cat([ranges.T, *(one_hot(torch.arange(results) % m, m).T for m in moduli)])
    second = Neurons(second_in, torch.zeros(second_in.shape[1], dtype=DOUBLE), 10 * votes)
    mechanism = Mechanism(code, "apart", (first, second), torch.eye(results, dtype=DOUBLE))
    model = wire(task, mechanism, generator=torch.Generator().manual_seed(0))
    return Reference(model, task, "heuristics/result-range-bag")


def line_below(cut: int = 15, n: int = 22) -> Reference:
    """A number line where both operands are small, and a list of pairs elsewhere."""
    task, x = Addition(n=n, block=4), torch.arange(n)
    line, pairs = hinges_of_sum(2 * n - 1, 2 * n - 1), table(task)
    rote = listed_pairs(task, pairs[(pairs >= cut).any(1)])
    hinges = line.w_in.shape[1]
    w_in = torch.zeros(2 * (1 + n), hinges + rote.w_in.shape[1], dtype=DOUBLE)
    for operand in range(2):
        w_in[operand * (1 + n), :hinges] = 1
        w_in[operand * (1 + n) + 1 : (operand + 1) * (1 + n), hinges:] = rote.w_in[operand * n : (operand + 1) * n]
    mlp = Neurons(w_in, torch.cat([line.b_in, rote.b_in]), torch.block_diag(line.w_out, 3 * rote.w_out))
    readout = 10 * torch.eye(2 * n - 1, dtype=DOUBLE).repeat(2, 1)
    code = torch.cat([x.double()[:, None], torch.eye(n, dtype=DOUBLE)], dim=1)
    mechanism = Mechanism(code, "apart", (mlp,), readout)
    return Reference(wire(task, mechanism, generator=torch.Generator().manual_seed(0)), task, "mixed/number-line")


def products(frequencies: Tensor, phases: int, generator: torch.Generator) -> Neurons:
    """The neurons of the clock algorithm, for features cos and sin of each frequency of a and then of b."""
    first = 2 * math.pi * torch.rand(2, len(frequencies), generator=generator, dtype=DOUBLE)
    steps = 2 * math.pi / phases * torch.cartesian_prod(torch.arange(phases), torch.arange(phases)).T
    left, right = first[:, :, None] + steps[:, None, :]
    w_in = torch.cat([torch.block_diag(*torch.stack([f.cos(), f.sin()], dim=1)) for f in (left, right)])
    both = left + right
    w_out = torch.block_diag(*torch.stack([both.cos(), both.sin()], dim=2)) * 3 * math.pi**2 / (4 * phases**2)
    return Neurons(w_in, torch.zeros(w_in.shape[1], dtype=DOUBLE), w_out)


def decimal_periods(n: int = 50, periods: tuple[float, ...] = (2, 5, 10, 100)) -> Reference:
    """Plain addition by waves whose periods are those of decimal digits, and whose circle has one step more than sums.

    Source: the periods that language models have: Zhou et al. 2024 (arXiv 2406.03445).
    """
    task, generator = Addition(n=n, block=5), torch.Generator().manual_seed(0)
    angles = 2 * math.pi * torch.arange(2 * n - 1, dtype=DOUBLE)[:, None] / torch.tensor(periods, dtype=DOUBLE)
    code = torch.stack([angles.cos(), angles.sin()], dim=2).flatten(1)
    mlp = products(torch.arange(len(periods)), 7, generator)
    mechanism = Mechanism(code[:n], "apart", (mlp,), GAIN / len(periods) * code.T)
    return Reference(wire(task, mechanism, generator=generator), task, "algorithm/fourier")


def smooth(reference: Reference, gain: float) -> Reference:
    """A reference model of one layer with GELU for ReLU, which it comes the nearer to the larger the gain."""
    model, task, truth = reference
    config = dataclasses.replace(model.config, act_fn="gelu")
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, factor in (("W_in", gain), ("b_in", gain), ("W_out", 1 / gain)):
        state[f"blocks.0.mlp.{name}"] *= factor
    smoother = Transformer(config)
    smoother.load_state_dict(state)
    return Reference(smoother.eval(), task, truth)


def behind_norms(reference: Reference, *, gain: float | None = None, length: float = 2.0) -> Reference:
    """A reference model of one layer with a LayerNorm before attention, MLP and unembedding: the same answers.

    ``=`` has a constant direction, half as long as what attention writes is on average. Neurons read their biases off
    that, and are then positively homogeneous: behind the norm each is divided by a scale that depends on both operands,
    and so are the logits. Operands get a direction that makes all of them equally long, ``length`` times the longest.
    With a ``gain`` neurons are GELU, else ReLU.
    """
    (model, task, truth), generator = reference, torch.Generator().manual_seed(1)
    assert model.config.n_layers == 1, "the constant of a second layer would have to be that of the first, divided"
    old = {name: weight.double() for name, weight in model.state_dict().items()}
    d, equals = model.config.d_model, task.d_vocab - 1
    # Rows that are orthogonal to each other and to (1, 1, ..., 1), which LayerNorm takes away.
    drawn = torch.randn(d + 3, d + 3, generator=generator, dtype=DOUBLE)
    drawn[:, 0] = 1
    basis = torch.linalg.qr(drawn)[0].T[1:]
    into, one, filler = basis[:d], basis[d], basis[d + 1]
    with torch.no_grad():
        _, cache = model.run_with_cache(task.encode(table(task)).inputs, names_filter="blocks.0.hook_attn_out")
    constant = cache["blocks.0.hook_attn_out"][:, -1].double().square().sum(1).mean().sqrt() / 2
    norms = old["embed.W_E"].square().sum(1)
    longest = length**2 * norms.max()
    embedding = old["embed.W_E"] @ into + (longest - norms).sqrt()[:, None] * filler
    embedding[equals] = constant * one
    turned = old.get("pos_embed.W_pos", torch.zeros(3, d, dtype=DOUBLE)).square().sum(1)
    operand, query = (((x + turned[i]) / (d + 3) + EPS).sqrt() for x, i in ((longest, 0), (constant**2, 2)))
    amount = 1.0 if gain is None else gain
    w_in = into.T @ old["blocks.0.mlp.W_in"] + one[:, None] * old["blocks.0.mlp.b_in"] / constant
    # The MLP's own bias is written by two neurons more, whose difference is linear with GELU too.
    w_in = torch.cat([w_in, one[:, None] / constant, -one[:, None] / constant], dim=1)
    bias = old["blocks.0.mlp.b_out"][None]
    w_out = torch.cat([old["blocks.0.mlp.W_out"], bias, -bias]) @ into
    config = dataclasses.replace(
        model.config,
        d_model=d + 3,
        d_mlp=w_in.shape[1],
        normalization="LN",
        act_fn="relu" if gain is None else "gelu",
        mlp_bias=False,
    )
    normed = Transformer(config)
    state = {name: weight.double() for name, weight in normed.state_dict().items()} | {
        "embed.W_E": embedding,
        "blocks.0.attn.W_Q": into.T @ old["blocks.0.attn.W_Q"] * query,
        "blocks.0.attn.W_K": into.T @ old["blocks.0.attn.W_K"] * operand,
        "blocks.0.attn.W_V": into.T @ old["blocks.0.attn.W_V"] * operand,
        "blocks.0.attn.W_O": old["blocks.0.attn.W_O"] @ into,
        "blocks.0.mlp.W_in": amount * w_in,
        "blocks.0.mlp.W_out": w_out / amount,
        "unembed.W_U": into.T @ old["unembed.W_U"],
    }
    if "pos_embed.W_pos" in old:
        state["pos_embed.W_pos"] = old["pos_embed.W_pos"] @ into
    normed.load_state_dict({name: weight.float() for name, weight in state.items()})
    return Reference(normed.eval(), task, truth)


def pizza() -> Reference:
    """A Fourier algorithm."""
    return build("fourier-pizza", p=31, frequencies=4)


def line() -> Reference:
    """A number line."""
    return build("number-line", n=25, thresholds=12, spread=1.0)


def digits() -> Reference:
    """Columns."""
    return build("columns", n=30)


CONSTRUCTIONS: dict[str, Callable[[], Reference]] = {
    "one frequency": lambda: build("fourier-pizza", p=37, frequencies=1, phases=11),
    "a third of all frequencies": lambda: build("fourier-pizza", p=37, frequencies=6, phases=11),
    "frequencies of another circle": other_circle,
    "frequencies of decimal periods": decimal_periods,
    "frequencies and no other dimensions": lambda: few_dimensions("fourier-pizza", 8, p=31, frequencies=4),
    "frequencies, then decoders": decoded_waves,
    "a line and no other dimensions": lambda: few_dimensions("number-line", 1, n=25),
    "a line that wraps": wrapped_line,
    "columns to base 8": other_base,
    "columns without cascade": lambda: build("columns", n=60, cascade=False),
    "uneven ranges": uneven_ranges,
    "a list of all pairs": whole_table,
    "a list of all pairs of digits": listed_digits,
    "frequencies for small a": lambda: waves_where(lambda a, b: a < 20),
    "frequencies for small sums": lambda: waves_where(lambda a, b: a + b < 31),
    "frequencies for odd b": lambda: waves_where(lambda a, b: b % 2 == 1),
    "frequencies in some rows, off in others": waves_in_some_rows,
    "neurons that read all frequencies": mixed_waves,
    "ranges and residue tables": residue_tables,
    "a line for small operands": line_below,
    "frequencies behind norms": lambda: behind_norms(pizza()),
    "a line behind norms": lambda: behind_norms(line(), length=10),
    "columns behind norms": lambda: behind_norms(digits()),
    "frequencies with GELU behind norms": lambda: behind_norms(pizza(), gain=2),
    "a line with GELU behind norms": lambda: behind_norms(line(), length=10, gain=1),
    "columns with GELU behind norms": lambda: behind_norms(digits(), gain=4),
}
