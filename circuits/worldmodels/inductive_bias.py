"""Does a network extrapolate by the state, or by what is legal next?"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.worldmodels.activations import check_fits, device_of, n_layers, resid_post, residuals
from circuits.worldmodels.prefixes import Prefixes, distinct, not_empty, sample_prefixes
from circuits.worldmodels.reading import NAN, NothingToMeasure, Reading
from circuits.worldmodels.transpositions import transpositions

GAMES = (4000, 8000, 16000, 32000)
"""Games of random play: as many as it takes to meet states of the same and of other legal moves often enough."""
STATES = 8
"""States that a labelling labels, at most: no more than a linear head of a small model can tell apart."""
SETS = 5
"""Sets of states, each with its own prefixes and labellings; a game of few states has one."""
EXAMPLES = 100
"""Labelled prefixes of a labelling, where there are as many."""
FEWEST = 3
"""Labelled prefixes of a state, and as many to extrapolate to, at least."""
LABELLINGS = 40
"""Labellings over all sets."""
L2 = 1e-3
NEWTON_STEPS = 15


@dataclass(frozen=True, eq=False)
class Examples:
    """Prefixes of few states, some to learn labels from and others to extrapolate to, from different sequences.

    ``labels`` has a labelling in each row: half of the states are 1. ``fit_state`` and ``test_state`` say which state
    each prefix is of.
    """

    fit: Prefixes
    test: Prefixes
    fit_state: Int[Tensor, " n_fit"]
    test_state: Int[Tensor, " n_test"]
    labels: Bool[Tensor, "labellings n_states"]


@dataclass(frozen=True, eq=False)
class Scores:
    """R-IB and D-IB of each labelling; the latter also on pairs of states with the same legal tokens and others."""

    r: Float[Tensor, " labellings"]
    d: Float[Tensor, " labellings"]
    d_same_legal: Float[Tensor, " labellings"]
    d_other_legal: Float[Tensor, " labellings"]


def inductive_bias(
    model: HookedModel, game: Game, *, layer: int | None = None, labellings: int = LABELLINGS, seed: int = 0
) -> Reading:
    """Return how far a linear head on the frozen model extrapolates labels by the state and not by what is legal.

    Each labelling gives half of the states a 1; a head is fitted to labelled prefixes and extrapolates to others. A
    network that holds the state gives prefixes of one state the same answer (R-IB) and tells states apart (D-IB); one
    that holds what is legal next does not tell those apart that share it. ``value`` is R-IB + D-IB - 1, with D-IB on
    these pairs over what the labels themselves have there: 1 is the most that there is, and 0 what a coin for each
    prefix (R 0, D 1) and one answer for all (R 1, D 0) come to alike: a D-IB of 1 says something only beside its R-IB.
    ``details`` has ``r_ib``, ``d_ib``, ``d_ib_same_legal`` and ``d_ib_other_legal`` as defined; ``ceiling`` is D-IB of
    the labels themselves in the mean over all pairs of states and all balanced labellings, and what a perfect network
    has in that mean; on some of the pairs alone, as on those of other legal moves, the labels may have more. All
    labellings are taken, each once, where they are no more than ``labellings``; the interval is over labellings. NaN
    where no two states share their legal tokens.

    Formula: R-IB = 1 - 2 mean over pairs of prefixes of one state of 1[y_i != y_j]; D-IB = 2 mean over pairs of
        different states of 1[y_i != y_j]; value = (R-IB + D-IB(same legal) - 1) / D-IB(same legal) of the labels, each
        in the mean over labellings; ceiling = 4 k (n - k) / (n (n - 1)), k = floor(n / 2) of n states labelled 1.

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose states.
        layer: whose residual stream the head reads; None: the last.
        labellings: number of them, at most.
        seed: of states, prefixes and labellings.

    Raises:
        BadInput: the model's vocabulary or context does not fit the game, no state has prefixes enough, or an argument
            is out of its range.
        UnsupportedModel: the model is not causal.

    Source: Vafa et al. 2025 (arXiv 2507.06952), equations 1 to 3 and appendix H; that the head alone be fitted is
        ours: their fine-tuning of all weights did not tell a network that was told the state from one trained on next
            tokens.
    Fails when: states differ in more ways than a linear head of the model's width can tell apart; there are few pairs
        of states with the same legal tokens; the labellings are few and states are few (see ``ceiling``).
    """
    check_fits(model, game)
    where = n_layers(model) - 1 if layer is None else layer
    check_integer("layer", where, 0, n_layers(model) - 1, "the blocks of the model")
    measured = []
    for chosen in examples(game, labellings=labellings, seed=seed):
        fit, test = (
            _at_ends(residuals(model, part.tokens, [where])[where], part) for part in (chosen.fit, chosen.test)
        )
        measured.append((_extrapolate(fit, chosen.labels[:, chosen.fit_state], test), chosen))
    return _reading(measured)


def fine_tuned_inductive_bias(
    model: HookedModel,
    game: Game,
    *,
    steps: tuple[int, ...] = (20, 100),
    learning_rates: tuple[float, ...] = (1e-4, 6e-4),
    labellings: int = 8,
    seed: int = 0,
) -> dict[tuple[int, float], Reading]:
    """Return the same statistics with all weights fine-tuned, as published, for each number of steps and learning rate.

    The published setting is 100 steps at 6e-4. Each reading is as of ``inductive_bias``, with the same states, prefixes
    and labellings. It is no entry of ``PROBES``: it is a table over settings, and trains a copy of the model for each
    learning rate and labelling.

    Formula: as of ``inductive_bias``, for the answers y_i of a copy of the model with a new linear head on its last
        residual stream, both trained for so many steps on the cross-entropy of the labels.

    Args:
        model: a hooked model of one's own, which stays as it is: a copy is trained.
        game: whose states.
        steps: numbers of steps.
        learning_rates: of AdamW.
        labellings: number of them, each of which trains a copy.
        seed: of states, prefixes, labellings and heads.

    Raises:
        BadInput: as for ``inductive_bias``.

    Source: Vafa et al. 2025 (arXiv 2507.06952), section 2.3 and appendix B; constants from their repository: AdamW with
        betas 0.9 and 0.95, weight decay 0.1, gradient norm clipped at 1, full batch.
    Fails when: steps are many or the rate is high, since then a network learns the labels whatever it held before: at
        the published setting one that was told the state is hardly told from one that was not (docs/world-models.md).
        Read how the figures move over the settings, not those of one. Labellings are few, as each is a training.
    """
    check_fits(model, game)
    if not steps or not learning_rates:
        raise BadInput("steps and learning_rates need one value each at least, as steps=(100,)")
    for n in steps:
        check_integer("steps", n, 1, 10**6)
    for rate in learning_rates:
        if not 0 < rate < math.inf:
            raise BadInput(f"learning_rates has {rate}: expected numbers above 0, as learning_rates=(6e-4,)")
    found: dict[tuple[int, float], Reading] = {}
    for rate in learning_rates:
        measured: dict[int, list[tuple[Tensor, Examples]]] = {n: [] for n in steps}
        for chosen in examples(game, labellings=labellings, seed=seed):
            runs = [
                _fine_tune(model, chosen, labels, steps, rate, seed + k)
                for k, labels in enumerate(chosen.labels[:, chosen.fit_state])
            ]
            for n in steps:
                measured[n].append((torch.stack([answers[n] for answers in runs]), chosen))
        found |= {(n, rate): _reading(parts, f"inductive-bias, {n} steps at {rate:g}") for n, parts in measured.items()}
    return found


def examples(game: Game, *, labellings: int, seed: int) -> list[Examples]:
    """Return the sets of states with their prefixes and labellings of one measurement.

    Raises:
        BadInput: fewer than two states have prefixes enough, or ``labellings`` is no positive number.
    """
    check_integer("labellings", labellings, 1, 10**6)
    generator = torch.Generator().manual_seed(seed)
    found = _enough_prefixes(game, seed)
    n_states = int(found.enough.sum())
    if n_states < 2:
        raise NothingToMeasure(
            f"{game}: fewer than two states are reached by enough different prefixes; take a longer length"
        )
    n_sets = 1 if n_states <= STATES else min(SETS, labellings)
    sizes = [labellings // n_sets + (i < labellings % n_sets) for i in range(n_sets)]
    return [_examples(found, size, generator) for size in sizes]


@dataclass(frozen=True, eq=False)
class _Found:
    """Different prefixes, which half each is in, and which of the states, by number, have prefixes enough in both."""

    pool: Prefixes
    state: Int[Tensor, " m"]
    halves: Int[Tensor, " m"]
    enough: Bool[Tensor, " n_states"]

    @property
    def legal_of(self) -> Int[Tensor, " n_states"]:
        """The number of each state's set of legal tokens."""
        return torch.zeros(len(self.enough), dtype=torch.int64).index_copy_(0, self.state, self.pool.legal_class)

    @property
    def of_two_classes(self) -> bool:
        """Whether two sets of legal tokens have two states each with prefixes enough, as far as there are any."""
        legal = self.legal_of
        had, wanted = (int((torch.bincount(of) > 1).sum()) for of in (legal[self.enough], legal))
        return had >= min(2, wanted)


def _of(pool: Prefixes) -> _Found:
    state, halves = pool.state, pool.row % 2
    counts = torch.stack([torch.bincount(state[halves == half], minlength=int(state.max()) + 1) for half in (0, 1)])
    return _Found(pool, state, halves, (counts >= FEWEST).all(0))


def _enough_prefixes(game: Game, seed: int) -> _Found:
    """Prefixes of random play, of as many games as it takes, or else those that a search finds.

    Where every column is open for long, as in connect three, few games show no two states of other legal moves; where
    hardly any two games meet, as in othello, no number of games does.
    """
    first = found = _of(distinct(not_empty(sample_prefixes(game, GAMES[0], seed=seed))))
    if int(first.enough.sum()) > 1:
        for n in GAMES[1:]:
            if found.of_two_classes:
                return found
            found = _of(distinct(not_empty(sample_prefixes(game, n, seed=seed))))
        return found if found.of_two_classes else first
    searched = transpositions(game, 2 * FEWEST, generator=torch.Generator().manual_seed(seed))
    return first if searched is None else _of(searched)


def _examples(found: _Found, labellings: int, generator: torch.Generator) -> Examples:
    picked = _choose_states(found.legal_of, found.enough, generator)
    most = -(-EXAMPLES // len(picked))
    parts, numbers = [], []
    for half in (0, 1):
        rows = [
            own[torch.randperm(len(own), generator=generator)[:most]]
            for own in (((found.state == s) & (found.halves == half)).nonzero()[:, 0] for s in picked)
        ]
        numbers.append(torch.cat([torch.full((len(own),), i) for i, own in enumerate(rows)]))
        parts.append(found.pool.take(torch.cat(rows)))
    labels = balanced_labellings(len(picked), labellings, generator)
    return Examples(parts[0], parts[1], numbers[0], numbers[1], labels)


def balanced_labellings(n: int, most: int, generator: torch.Generator) -> Bool[Tensor, "labellings n"]:
    """Return all labellings of n states that give half of them a 1, each once; at random so many, where there are more.

    A labelling that is drawn twice says the same twice.
    """
    if math.comb(n, n // 2) <= most:
        chosen = torch.tensor(list(itertools.combinations(range(n), n // 2)))
        return torch.zeros(len(chosen), n, dtype=torch.bool).scatter_(1, chosen, True)
    drawn = (torch.rand(64 * most, n, generator=generator).argsort(dim=1) < n // 2).unique(dim=0)
    return drawn[torch.randperm(len(drawn), generator=generator)[:most]]


def labels_differ(n: int) -> float:
    """Return D-IB of labellings that give half of n states a 1, in the mean over all of them: its ceiling.

    Formula: 2 P(y_i != y_j) = 4 k (n - k) / (n (n - 1)) for two of n states, k of which have a 1.
    """
    k = n // 2
    return 4 * k * (n - k) / (n * (n - 1))


def _choose_states(
    legal_of: Int[Tensor, " n_states"], enough: Bool[Tensor, " n_states"], generator: torch.Generator
) -> list[int]:
    """At most ``STATES`` states, in sets of up to four that share their legal tokens as far as there are any."""
    order = torch.randperm(len(enough), generator=generator)
    order = order[enough[order]]
    classes = legal_of[order]
    taken: list[int] = []
    for first in classes.tolist():
        own = order[classes == first].tolist()
        if len(own) > 1 and own[0] not in taken and len(taken) + 2 <= STATES:
            taken += own[: min(4, STATES - len(taken))]
    return (taken + [s for s in order.tolist() if s not in taken])[:STATES]


def _at_ends(stream: Float[Tensor, "m length d_model"], prefixes: Prefixes) -> Float[Tensor, "m d_model"]:
    return stream[torch.arange(len(prefixes)), prefixes.position]


def _extrapolate(
    fit: Float[Tensor, "n_fit d_model"],
    labels: Bool[Tensor, "labellings n_fit"],
    test: Float[Tensor, "n_test d_model"],
) -> Bool[Tensor, "labellings n_test"]:
    """The answers of a logistic regression for each labelling, by Newton's method on all of them together."""
    mean, scale = fit.mean(0), fit.std(0, correction=0).clamp_min(1e-6)
    x, unseen = (F.pad((part - mean) / scale, (0, 1), value=1.0).double() for part in (fit, test))
    penalty = torch.full((x.shape[1],), L2 * len(x), dtype=torch.float64)
    penalty[-1] = 1e-9
    weight = torch.zeros(len(labels), x.shape[1], dtype=torch.float64)
    wanted = labels.double()
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(weight @ x.T)
        gradient = (p - wanted) @ x + weight * penalty
        hessian = torch.einsum("kn,nd,ne->kde", p * (1 - p), x, x) + penalty.diag()
        weight = weight - torch.linalg.solve(hessian, gradient)
    return weight @ unseen.T > 0


def _fine_tune(
    model: HookedModel, chosen: Examples, labels: Bool[Tensor, " n_fit"], steps: tuple[int, ...], rate: float, seed: int
) -> dict[int, Bool[Tensor, " n_test"]]:
    """The answers after each number of steps of training a copy of the model with a new head."""
    trained = copy.deepcopy(model)
    device, d_model = device_of(model), int(model.cfg.d_model)
    head = torch.nn.Linear(d_model, 1)
    with torch.no_grad():
        draw = torch.randn(1, d_model, generator=torch.Generator().manual_seed(seed))
        head.weight.copy_(draw / math.sqrt(d_model))
        head.bias.zero_()
    head = head.to(device)
    weights = [*trained.parameters(), *head.parameters()]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    answers = {}
    for step in range(max(steps)):
        logits = head(_last(trained, chosen.fit))[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, labels.float().to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step + 1 in steps:
            with torch.no_grad():
                answers[step + 1] = (head(_last(trained, chosen.test))[:, 0] > 0).cpu()
    return answers


def _last(model: HookedModel, prefixes: Prefixes) -> Float[Tensor, "m d_model"]:
    """The last residual stream at the end of each prefix, with its gradient."""
    kept: list[Tensor] = []
    hook = (resid_post(n_layers(model) - 1), lambda resid, hook: kept.append(resid))
    with model.hooks(fwd_hooks=[hook]):
        model(prefixes.tokens.to(device_of(model)))
    return kept[0][torch.arange(len(prefixes)), prefixes.position]


def pair_scores(answers: Bool[Tensor, "labellings n_test"], chosen: Examples) -> Scores:
    """Return the statistics of the answers of each labelling."""
    first, second = torch.triu_indices(len(chosen.test), len(chosen.test), offset=1)
    differ = (answers[:, first] != answers[:, second]).float()
    same_state = chosen.test_state[first] == chosen.test_state[second]
    legal = chosen.test.legal_class
    same_legal = ~same_state & (legal[first] == legal[second])
    other_legal = ~same_state & ~same_legal

    def mean(where: Tensor) -> Tensor:
        return differ[:, where].mean(1)  # NaN where there is no such pair

    return Scores(1 - 2 * mean(same_state), 2 * mean(~same_state), 2 * mean(same_legal), 2 * mean(other_legal))


def _reading(measured: list[tuple[Tensor, Examples]], name: str = "inductive-bias") -> Reading:
    found = [(pair_scores(answers, c), pair_scores(c.labels[:, c.test_state], c)) for answers, c in measured]
    r, d, same, other = (
        torch.cat([getattr(own, name) for own, _ in found]) for name in ("r", "d", "d_same_legal", "d_other_legal")
    )
    known = same.isfinite()
    pairs = torch.stack([r + same - 1, torch.cat([best.d_same_legal for _, best in found])], 1)[known].double()
    accuracy = torch.cat([(a == c.labels[:, c.test_state]).float().mean(1) for a, c in measured])
    details: dict[str, float] = {"accuracy": float(accuracy.mean()), "states": float(measured[0][1].labels.shape[1])}
    details["labellings"] = float(len(r))
    for key, scores in {"r_ib": r, "d_ib": d, "d_ib_same_legal": same, "d_ib_other_legal": other}.items():
        finite = scores[scores.isfinite()]
        details[key] = float(finite.mean())
        details[f"{key}_error"] = float(finite.std() / math.sqrt(len(finite))) if len(finite) > 1 else NAN
    return Reading(
        name,
        float(pairs[:, 0].mean() / pairs[:, 1].mean()) if len(pairs) else NAN,
        bootstrap_interval(pairs.numpy(), lambda rows: rows[:, 0].sum() / max(rows[:, 1].sum(), 1e-12), seed=0)
        if len(pairs) > 1
        else (NAN, NAN),
        details=details,
        controls={
            "ceiling": labels_differ(measured[0][1].labels.shape[1]),
            "ceiling of these labels": float(pairs[:, 1].mean()) if len(pairs) else NAN,
        },
        source="arXiv 2507.06952, equations 1 to 3 and appendix H",
    )
