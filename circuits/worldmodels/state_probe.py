"""Is the state in the residual stream, more than in that of an untrained network?"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.worldmodels.activations import check_fits, interval_by_sequence, n_layers, residuals
from circuits.worldmodels.linear_probe import LinearProbe, fit_probe, shuffled_labels
from circuits.worldmodels.prefixes import Prefixes, halves, sample_prefixes
from circuits.worldmodels.reading import Curve, Reading

SEQUENCES = 400
"""Sequences that the probe is fitted on; as many others test it."""
PREFIXES = 4000
"""Prefixes of them at most."""
FEWEST = 10
"""Prefixes to fit on, and others to test on, at least."""
NO_TRAINING = "selectivity over an untrained network"
RECENT = 3
"""Tokens that decide the labels of the control task. States are no such kind: of few states those that the network
holds are read as well under other names."""


def state_probe(
    model: HookedModel, game: Game, *, untrained: HookedModel | None = None, n: int = SEQUENCES, seed: int = 0
) -> Reading:
    """Return how well a linear probe reads the state's features from the residual stream, at its best layer.

    ``value`` is the accuracy over features that the last move changed, whoever looks at them: the others are right by
    remembering what they were. ``details`` has the accuracy over all features, over whole states (every feature right),
    balanced over the values of a feature, and of each feature where it changed; ``controls`` the same probe's on random
    labels by the last tokens, and the most frequent value. Fitted and tested on different sequences, and never on the
    same prefix.

    Formula: accuracy = mean over prefixes h and features f with f(s) != f(s before the last move) of
        1[argmax probe_f(resid(h)) = f(s)].

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose states.
        untrained: a model of the same shape with random weights: ``selectivity over an untrained network`` is what the
            statistic has beyond that network's.
        n: sequences to fit on, and as many to test on.
        seed: of the sequences.

    Raises:
        BadInput: the model's vocabulary or context does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: Nanda, Lee and Wattenberg 2023 (arXiv 2309.00941), section 3; the control task of Hewitt and Liang 2019
        (arXiv 1909.03368); changed cells as their "flipped" probe.
    Fails when: the feature is nearly a function of the last tokens: then an untrained network is read as well, which
        its column shows. An encoding that is not linear is not found. That a state can be read is no sign that it is
        used.
    """
    check_fits(model, game)
    check_integer("n", n, 2, 10**6)
    layers = range(n_layers(model))
    fit, test = halves(probe_data(game, n, seed), probe_data(game, n, seed + 1), FEWEST)
    streams = [residuals(model, part.games.tokens, layers) for part in (fit, test)]
    probes = {k: fit_probe(fit.at(streams[0][k]), fit.features, game.feature_sizes) for k in layers}
    changed = changed_features(test)
    right = {k: probe.predict(test.at(streams[1][k])) == test.features for k, probe in probes.items()}
    # The layer is chosen on other sequences than those that are reported.
    choosing = test.row % 2 == 0
    scores = {k: _mean(right[k][choosing], changed[choosing]) for k in layers}
    best = max(layers, key=lambda k: scores[k])
    recent = torch.cat([last_tokens(part, RECENT) for part in (fit, test)])
    labels = shuffled_labels(torch.cat((fit.features, test.features)), recent, seed)
    control = fit_probe(fit.at(streams[0][best]), labels[: len(fit)], game.feature_sizes)
    by_heart = control.predict(test.at(streams[1][best])) == labels[len(fit) :]
    report = ~choosing
    per_prefix = ((right[best] & changed).sum(1) / changed.sum(1))[report]
    value = float(per_prefix.mean())
    over = {} if untrained is None else {NO_TRAINING: value - state_probe(untrained, game, n=n, seed=seed).value}
    return Reading(
        "state-probe",
        value,
        interval_by_sequence(per_prefix, test.row[report]),
        details={
            "accuracy": float(right[best][report].float().mean()),
            "whole_state": float(right[best][report].all(1).float().mean()),
            "balanced": balanced_accuracy(right[best][report], test.features[report]),
            "selectivity over random labels": value - _mean(by_heart[report], changed[report]),
            **over,
            "layer": float(best),
            **{
                f"changed {name}": _mean(right[best][report][:, i : i + 1], changed[report][:, i : i + 1])
                for i, name in enumerate(game.feature_names)
            },
        },
        controls={
            "random labels": _mean(by_heart[report], changed[report]),
            "most frequent value": _majority(fit, test, changed),
        },
        curves={"by layer": Curve("layer", "accuracy (share)", tuple(layers), tuple(scores[k] for k in layers))},
        source="arXiv 2309.00941, section 3; arXiv 1909.03368",
    )


def probe_data(game: Game, n: int, seed: int) -> Prefixes:
    """Return prefixes of uniform play to fit or test a probe on."""
    prefixes = sample_prefixes(game, n, seed=seed, over=True)
    return prefixes.draw(PREFIXES, torch.Generator().manual_seed(seed))


def probe_at(model: HookedModel, game: Game, layer: int, *, n: int = SEQUENCES, seed: int = 0) -> LinearProbe:
    """Return the probe of one layer, fitted as in ``state_probe``."""
    fit = probe_data(game, n, seed)
    return fit_probe(fit.at(residuals(model, fit.games.tokens, [layer])[layer]), fit.features, game.feature_sizes)


def last_tokens(prefixes: Prefixes, n: int) -> Int[Tensor, " m"]:
    """Return a number for the last ``n`` tokens of each prefix."""
    tokens = torch.nn.functional.pad(prefixes.games.tokens + 1, (n - 1, 0))
    columns = prefixes.position[:, None] + torch.arange(n)
    powers = (prefixes.game.d_vocab + 1) ** torch.arange(n)
    return (tokens[prefixes.row[:, None], columns] * powers).sum(1)


def changed_features(prefixes: Prefixes) -> Bool[Tensor, "m n_features"]:
    """Return which features the last move of each prefix changed, or all where none did (a move that is no move)."""
    before = prefixes.games.states[prefixes.row, prefixes.position]
    changed = prefixes.game.changed_features(before, prefixes.states)
    return changed | ~changed.any(1, keepdim=True)


def balanced_accuracy(right: Bool[Tensor, "m n_features"], features: Int[Tensor, "m n_features"]) -> float:
    """Return the mean over features of the mean over a feature's values of the share that is right."""
    scores = []
    for hits, values in zip(right.unbind(1), features.unbind(1), strict=True):
        scores.append(torch.stack([hits[values == value].float().mean() for value in values.unique()]).mean())
    return float(torch.stack(scores).mean())


def _mean(right: Bool[Tensor, "m n_features"], where: Bool[Tensor, "m n_features"]) -> float:
    return float(right[where].float().mean())


def _majority(fit: Prefixes, test: Prefixes, where: Bool[Tensor, "m n_features"]) -> float:
    most = fit.features.mode(0).values.expand_as(test.features)
    return _mean(most == test.features, where)
