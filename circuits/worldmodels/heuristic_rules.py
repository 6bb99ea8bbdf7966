"""Neurons as shallow rules over the state: how many are, whether they matter, and whether rules can replace them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from circuits.errors import UnsupportedModel
from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.worldmodels.activations import (
    check_fits,
    device_of,
    game_probabilities,
    mean_interval,
    n_layers,
    set_errors,
)
from circuits.worldmodels.prefixes import Prefixes, halves, sample_prefixes
from circuits.worldmodels.reading import NAN, Curve, Reading

DEPTH = 3
EXPLAINED = 0.7
"""Share of a neuron's variance, on unseen prefixes, above which a rule is said to explain it."""
NEURONS = 32
"""Neurons that rules are fitted to: those that vary most, over all layers."""
PREFIXES = 2000
LEAF = 20
"""Prefixes in a leaf, at least."""


@dataclass(frozen=True, eq=False)
class Rules:
    """Trees over the state's features, one for each of some neurons, and how much they explain on unseen prefixes."""

    layer: Int[Tensor, " k"]
    neuron: Int[Tensor, " k"]
    trees: tuple[Any, ...]
    explained: Float[Tensor, " k"]
    mean: Float[Tensor, " k"]


def heuristic_rules(
    model: HookedModel, game: Game, *, neurons: int = NEURONS, depth: int = DEPTH, seed: int = 0
) -> Reading:
    """Return the share of neurons that a shallow decision tree over the state's features explains.

    A tree of a few levels is fitted to each neuron's activation at the end of a prefix; ``value`` is the share whose
    explained variance on other sequences is above 0.7. ``details`` has the causal check (``pattern_effect``: errors per
    position that ablating the neurons of one pattern makes where the pattern holds; the control ``another pattern`` is
    what the same makes where a matched one holds in its place), ``replaced``: the share of the ablation's divergence
    that is undone where the explained neurons are replaced by their rules (1: as good as the neurons), and the number
    of leaves in all.

    Formula: R2 = 1 - sum (a - tree(s))^2 / sum (a - mean a)^2; replaced = 1 - KL(p || p with rules) / KL(p || p with
        means).

    Args:
        model: a hooked model with MLPs that reads the game's tokens.
        game: whose states.
        neurons: how many are looked at: those that vary most.
        depth: levels of a tree.
        seed: of the sequences.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal, or has no MLPs.

    Source: Singh et al. 2025 (arXiv 2511.00059): trees on board features, 0.7 of the variance, ablation by pattern and
        replacement; the matched control pattern is ours.
    Fails when: it is taken to tell heuristics from a world model by itself: a linear code of the state is explained by
        trees of one level. Neurons that read the past and not the state are not explained.
    """
    check_fits(model, game)
    check_integer("neurons", neurons, 1, 10**6)
    check_integer("depth", depth, 1, 20)
    if getattr(model.cfg, "attn_only", False):
        raise UnsupportedModel("the model has no MLPs: there are no neurons to find rules for")
    fit, test = (
        sample_prefixes(game, 300, seed=seed + s).draw(PREFIXES, torch.Generator().manual_seed(seed)) for s in (91, 93)
    )
    fit, test = halves(fit, test, 2 * LEAF)
    rules = fit_rules(model, fit, test, neurons, depth)
    good = (rules.explained > EXPLAINED).nonzero()[:, 0]
    leaves = sum(int(rules.trees[i].get_n_leaves()) for i in good.tolist())
    effect, control = _pattern_effect(model, rules, good, test)
    return Reading(
        "heuristic-rules",
        float((rules.explained > EXPLAINED).float().mean()),
        mean_interval((rules.explained > EXPLAINED).float().tolist()),
        details={
            "median_explained": float(rules.explained.median()),
            "leaves": float(leaves),
            "replaced": _replaced(model, rules, good, test),
            "pattern_effect": effect,
        },
        controls={"another pattern": control},
        curves={
            "explained": Curve(
                "neuron, best first",
                "explained variance (share)",
                tuple(range(1, len(rules.explained) + 1)),
                tuple(rules.explained.clamp_min(-1).sort(descending=True).values.tolist()),
            )
        },
        source="arXiv 2511.00059",
    )


def fit_rules(model: HookedModel, fit: Prefixes, test: Prefixes, neurons: int, depth: int) -> Rules:
    """Return a tree for each of the neurons that vary most."""
    from sklearn.tree import DecisionTreeRegressor

    seen, unseen = (_neurons(model, part) for part in (fit, test))
    flat, other = (torch.cat([a[k] for k in sorted(a)], 1) for a in (seen, unseen))
    widths = [seen[k].shape[1] for k in sorted(seen)]
    chosen = flat.var(0).argsort(descending=True)[:neurons].sort().values
    layer = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))[chosen]
    first = torch.tensor([0, *widths[:-1]]).cumsum(0)[layer]
    x, y = one_hot(fit), one_hot(test)
    trees, explained = [], []
    for column in chosen.tolist():
        tree = DecisionTreeRegressor(max_depth=depth, min_samples_leaf=LEAF, random_state=0)
        tree.fit(x, flat[:, column].numpy())
        truth = other[:, column].double()
        missed = (truth - torch.from_numpy(tree.predict(y))).square().sum()
        explained.append(float(1 - missed / (truth - truth.mean()).square().sum().clamp_min(1e-12)))
        trees.append(tree)
    return Rules(layer, chosen - first, tuple(trees), torch.tensor(explained), flat.mean(0)[chosen])


def one_hot(prefixes: Prefixes) -> NDArray[np.float32]:
    """Return the state's features, one column for each value."""
    sizes = prefixes.game.feature_sizes
    columns = [torch.nn.functional.one_hot(f, size) for f, size in zip(prefixes.features.unbind(1), sizes, strict=True)]
    return torch.cat(columns, 1).float().numpy()


def _name(layer: int) -> str:
    return f"blocks.{layer}.mlp.hook_post"


def _neurons(model: HookedModel, prefixes: Prefixes) -> dict[int, Float[Tensor, "m d_mlp"]]:
    """Activations at the ends of the prefixes."""
    layers = range(n_layers(model))
    with torch.no_grad():
        _, cache = model.run_with_cache(
            prefixes.games.tokens.to(device_of(model)), names_filter=[_name(k) for k in layers]
        )
    return {k: prefixes.at(cache[_name(k)].float().cpu()) for k in layers}


def _with(
    model: HookedModel, prefixes: Prefixes, rules: Rules, which: Int[Tensor, " k"], values: Float[Tensor, "m k"]
) -> Float[Tensor, "m d_vocab"]:
    """Next-token probabilities at the prefixes' ends, some neurons set there to given values."""
    device = device_of(model)
    at = (torch.arange(len(prefixes), device=device), prefixes.position.to(device))

    def setter(layer: int) -> Any:
        own = (rules.layer[which] == layer).nonzero()[:, 0]
        columns = rules.neuron[which[own]].to(device)
        new = values[:, own].to(device)

        def put(post: Tensor, hook: object) -> Tensor:
            post = post.clone()
            rows = post[at]
            rows[:, columns] = new.to(rows.dtype)
            post[at] = rows
            return post

        return put

    hooks: list[Any] = [(_name(k), setter(k)) for k in range(n_layers(model))]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(prefixes.tokens.to(device))[at]
    return game_probabilities(logits, prefixes.game.d_vocab)


def _replaced(model: HookedModel, rules: Rules, good: Int[Tensor, " k"], test: Prefixes) -> float:
    """Share of the divergence of mean-ablating the explained neurons that their rules undo."""
    if not len(good):
        return NAN
    test = test.take(torch.arange(min(len(test), 800)))
    x = one_hot(test)
    ruled = torch.stack([torch.from_numpy(rules.trees[i].predict(x)).float() for i in good.tolist()], 1)
    means = rules.mean[good].expand_as(ruled)
    plain = _with(model, test, rules, good[:0], ruled[:, :0])
    divergence = [_kl(plain, _with(model, test, rules, good, values)) for values in (ruled, means)]
    return 1 - divergence[0] / divergence[1] if divergence[1] > 1e-9 else NAN


def _kl(p: Float[Tensor, "m d"], q: Float[Tensor, "m d"]) -> float:
    return float((p * (p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log())).sum(1).mean())


def _pattern_effect(model: HookedModel, rules: Rules, good: Int[Tensor, " k"], test: Prefixes) -> tuple[float, float]:
    """Errors per position that ablating the neurons of one pattern makes where it holds, and where another does.

    A pattern is what a neuron's tree asks first; the other is that of the patterns of explained neurons which holds
    about as often and least often together with it.
    """
    x = torch.from_numpy(one_hot(test) > 0.5)
    roots = torch.tensor([int(rules.trees[i].tree_.feature[0]) for i in good.tolist()])
    patterns = [feature for feature in roots.unique().tolist() if feature >= 0]
    often = x.float().mean(0)
    here: list[float] = []
    elsewhere: list[float] = []
    for feature in patterns:
        holds = x[:, feature]
        unlike = (x & holds[:, None]).float().mean(0) + (often - often[feature]).abs()
        rest = [other for other in patterns if other != feature]
        if not rest:
            continue
        others = x[:, min(rest, key=unlike.tolist().__getitem__)] & ~holds
        own = good[roots == feature]
        if min(int(holds.sum()), int(others.sum())) < LEAF:
            continue
        for where, into in ((holds, here), (others, elsewhere)):
            cases = test.take(where.nonzero()[:100, 0])
            null = set_errors(_with(model, cases, rules, own[:0], torch.zeros(len(cases), 0)), cases.legal).mean()
            ablated = _with(model, cases, rules, own, rules.mean[own].expand(len(cases), -1))
            into.append(float(set_errors(ablated, cases.legal).mean() - null))
    if not here:
        return NAN, NAN
    return sum(here) / len(here), sum(elsewhere) / len(elsewhere)
