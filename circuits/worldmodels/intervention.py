"""Is the state that can be read also the state that is used?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.tasks.games.automaton import NOWHERE, automaton
from circuits.worldmodels.activations import (
    check_fits,
    device_of,
    game_probabilities,
    mean_interval,
    n_layers,
    resid_post,
    residuals,
    set_errors,
)
from circuits.worldmodels.linear_probe import LinearProbe, fit_probe, shuffled_labels
from circuits.worldmodels.prefixes import Prefixes, sample_prefixes
from circuits.worldmodels.reading import NAN, Curve, EditedBoard, Reading
from circuits.worldmodels.state_probe import probe_data

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Lengths of the edit, in mean distances of the residual stream from its mean."""
WIDEST = 4
"""Of so many dimensions of the stream an exchanged subspace has one, at most: of half a stream any half will do."""
FEW_DIMENSIONS = 4
"""So many may be exchanged of any stream."""
POOL = 8
"""Prefixes of which one feature is changed at random, for each edit that is wanted: most changes are of no use."""
FEWEST = 20
CASES = 200
"""Edits on which scale and layer are chosen; as many others are reported."""


@dataclass(frozen=True, eq=False)
class Edits:
    """Prefixes, and for each a state that it is to be taken for."""

    prefixes: Prefixes
    features: Int[Tensor, "m n_features"]
    legal: Bool[Tensor, "m d_vocab"]
    reachable: Bool[Tensor, " m"]

    def __len__(self) -> int:
        return len(self.prefixes)

    def take(self, which: Tensor) -> Edits:
        """Return some of the edits, by index or mask."""
        return Edits(self.prefixes.take(which), self.features[which], self.legal[which], self.reachable[which])


def intervention(model: HookedModel, game: Game, *, cases: int = CASES, seed: int = 0) -> Reading:
    """Return how far editing the state along a probe's directions brings the moves to those of the edited state.

    One feature of the state is changed so that other moves are legal and play reaches the new state; the residual
    stream at the end of the prefix is moved along the probe's direction from the old value to the new one. ``value`` is
    1 - errors / errors without the edit, where errors are false positives and negatives of the top-N prediction against
    the edited state's legal moves. Layer and scale are chosen on other cases. ``controls`` are the same edit along a
    random direction of equal norm, by a probe of random labels, and before the first block; ``details`` has the same
    for states that play cannot reach (``unreachable``), what an edit breaks that changes no legal move (``off_target``,
    errors per case over those without the edit), errors per case with and without the edit (the null intervention), and
    the exchange of the probe's subspace (its strongest directions, a quarter of the stream at most) with that of a
    prefix of another state, whose legal moves are then wanted (``interchange``), beside a random subspace of its rank.
    Where the states of a game cannot be listed, whether play reaches an edited one is not known: all are taken for
    reachable.

    Formula: success = 1 - sum_cases errors(edited, A(s')) / sum_cases errors(unedited, A(s')).

    Args:
        model: any hooked model that reads the game's tokens.
        game: whose states.
        cases: edits to choose layer and scale on, and as many others to report.
        seed: of prefixes, edits and random directions.

    Raises:
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.

    Source: Li et al. 2023 (arXiv 2210.13382), section 4; the linear addition of Nanda, Lee and Wattenberg 2023 (arXiv
        2309.00941), section 4; interchange of a subspace, Geiger et al. 2024 (arXiv 2303.02536). That scale and layer
        are chosen on other cases, and the controls, are ours.
    Fails when: the state is not linear in the residual stream, or is made after the last token has been read and used
        elsewhere; where the last block's stream is edited the probe need only agree with the unembedding. NaN where no
        change of one feature changes what is legal.
    """
    check_fits(model, game)
    check_integer("cases", cases, 10, 10**5)
    found = edits(game, 2 * cases, seed=seed)
    reachable, beyond = found.take(found.reachable), found.take(~found.reachable)
    if len(reachable) < FEWEST:
        note = f"{len(reachable)} changes of one feature lead to a state that play reaches, of {FEWEST}"
        return Reading("intervention", NAN, details={"cases": float(len(reachable))}, note=note)
    half = torch.arange(len(reachable)) % 2 == 0
    dev, test = reachable.take(half), reachable.take(~half)
    layers = range(n_layers(model))
    fit = probe_data(game, 400, seed + 7)
    streams = {k: fit.at(s) for k, s in residuals(model, fit.games.tokens, [-1, *layers]).items()}
    editor = Editor(model, {k: float((s - s.mean(0)).norm(dim=1).mean()) for k, s in streams.items()})
    probes = {k: fit_probe(streams[k], fit.features, game.feature_sizes) for k in layers}
    unedited, null = (errors(model, part, 0, torch.zeros(len(part), 1)) for part in (dev, test))
    tried = {(k, c): editor.success(dev, unedited, directions(probes[k], dev), k, c) for k in layers for c in SCALES}
    layer, scale = max(tried, key=lambda setting: tried[setting])
    along = directions(probes[layer], test)
    by_case = editor.errors(test, along, layer, scale)
    nonsense = fit_probe(streams[layer], shuffled_labels(fit.features, fit.state, seed), game.feature_sizes)
    random = torch.randn(along.shape, generator=torch.Generator().manual_seed(seed))
    controls = {
        "random direction": editor.success(test, null, random, layer, scale),
        "random labels": editor.success(test, null, directions(nonsense, test), layer, scale),
        "before the first block": editor.success(test, null, along, -1, scale),
    }
    own_space, other_space = _interchange(model, game, probes[layer], layer, cases, seed)
    doses = tuple(editor.success(test, null, along, layer, c) for c in SCALES)
    return Reading(
        "intervention",
        float(1 - by_case.sum() / null.sum()),
        _ratio_interval(by_case, null),
        details={
            "layer": float(layer),
            "scale": float(scale),
            "cases": float(len(test)),
            "unreachable": _beyond(editor, beyond, probes[layer], layer, scale),
            "off_target": _off_target(editor, edits(game, cases, seed=seed + 3, legality=False), probes, layer, scale),
            "errors without the edit": float(null.mean()),
            "errors with the edit": float(by_case.mean()),
            "interchange": own_space,
            "interchange, random subspace": other_space,
        },
        controls=controls,
        curves={"dose": Curve("edit (mean distances of the stream)", "errors undone (share)", SCALES, doses)},
        board=_board(model, test, layer, editor.moved(along, layer, scale)),
        note="" if game.n_states is not None else "not known of these states: whether play reaches them",
        source="arXiv 2210.13382, section 4; arXiv 2309.00941, section 4",
    )


@dataclass(frozen=True)
class Editor:
    """A model whose residual stream is moved by multiples of its mean distance from its mean, which ``lengths`` has."""

    model: HookedModel
    lengths: dict[int, float]

    def moved(self, along: Float[Tensor, "m d"], layer: int, scale: float) -> Float[Tensor, "m d"]:
        """Return what is added to the stream."""
        return scale * self.lengths[layer] * F.normalize(along, dim=1)

    def errors(self, cases: Edits, along: Float[Tensor, "m d"], layer: int, scale: float) -> Float[Tensor, " m"]:
        """Return the errors of the top-N prediction against the edited states' legal moves."""
        return errors(self.model, cases, layer, self.moved(along, layer, scale))

    def success(
        self, cases: Edits, null: Float[Tensor, " m"], along: Float[Tensor, "m d"], layer: int, scale: float
    ) -> float:
        """Return the share of the errors without an edit, ``null``, that it undoes; negative where it makes more."""
        return float(1 - self.errors(cases, along, layer, scale).sum() / null.sum().clamp_min(1))


def edits(game: Game, n: int, *, seed: int, legality: bool = True) -> Edits:
    """Return prefixes with a state that differs in one feature and, if and only if ``legality``, in what is legal."""
    pool = sample_prefixes(game, 600, seed=seed + 11).draw(POOL * n, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    features = pool.features
    which = torch.randint(features.shape[1], (len(pool),), generator=generator)
    sizes = torch.tensor(game.feature_sizes)[which]
    rows = torch.arange(len(pool))
    shift = 1 + (torch.rand(len(pool), generator=generator) * (sizes - 1)).long()
    target = features.clone()
    target[rows, which] = (features[rows, which] + shift) % sizes
    states = game.state_of(target)
    # A feature that follows from others, as nim's exclusive or does, changes with them and cannot be changed alone.
    wanted, target = target[rows, which], game.state_features(states)
    sound = target[rows, which] == wanted
    legal = game.legal(states)
    differ = (legal != pool.legal).any(1)
    reachable = torch.ones(len(pool), dtype=torch.bool)
    if game.n_states is not None:
        reachable = automaton(game).rows(game.state_id(states)) != NOWHERE
    fits = sound & (differ if legality else ~differ)
    chosen = torch.cat([(fits & reachable).nonzero()[:n, 0], (fits & ~reachable).nonzero()[:n, 0]])
    return Edits(pool.take(chosen), target[chosen], legal[chosen], reachable[chosen])


def directions(probe: LinearProbe, cases: Edits) -> Float[Tensor, "m d_model"]:
    """Return the directions from each case's own values to the new ones, added up over the features that change."""
    starts = torch.tensor([0, *probe.sizes[:-1]]).cumsum(0)
    own, new = cases.prefixes.features + starts, cases.features + starts
    return (probe.directions[new] - probe.directions[own]).sum(1)  # nothing of a feature that stays


def edited_probabilities(
    model: HookedModel, cases: Edits, layer: int, moved: Float[Tensor, "m d"]
) -> Float[Tensor, "m d_vocab"]:
    """Return the next-token probabilities after ``moved`` was added to the stream at each prefix's end."""
    device = device_of(model)
    rows, at = torch.arange(len(cases), device=device), cases.prefixes.position.to(device)

    def move(resid: Tensor, hook: object) -> Tensor:
        resid = resid.clone()
        resid[rows, at] += moved.to(resid)
        return resid

    with torch.no_grad(), model.hooks(fwd_hooks=[(resid_post(layer), move)]):
        logits = model(cases.prefixes.tokens.to(device))[rows, at]
    return game_probabilities(logits, cases.legal.shape[1])


def errors(model: HookedModel, cases: Edits, layer: int, moved: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """Return the errors of the top-N prediction against the edited states' legal moves."""
    return set_errors(edited_probabilities(model, cases, layer, moved), cases.legal)


def _beyond(editor: Editor, cases: Edits, probe: LinearProbe, layer: int, scale: float) -> float:
    """The share of errors undone for states that no play reaches; NaN where there are too few."""
    if len(cases) < FEWEST:
        return NAN
    null = errors(editor.model, cases, 0, torch.zeros(len(cases), 1))
    return editor.success(cases, null, directions(probe, cases), layer, scale)


def _ratio_interval(by_case: Float[Tensor, " m"], null: Float[Tensor, " m"]) -> tuple[float, float]:
    """The bootstrap interval of 1 - sum / sum over cases, by the linearised ratio."""
    ratio = by_case.sum() / null.sum()
    influence = 1 - ratio - (by_case - ratio * null) / null.mean()
    return mean_interval(influence.tolist())


def _off_target(editor: Editor, neutral: Edits, probes: dict[int, LinearProbe], layer: int, scale: float) -> float:
    """Errors that edits make which change no legal move, per case; NaN where every change of a feature does."""
    if len(neutral) < 10:
        return NAN
    along = directions(probes[layer], neutral)
    return float((editor.errors(neutral, along, layer, scale) - editor.errors(neutral, along, layer, 0.0)).mean())


def _interchange(
    model: HookedModel, game: Game, probe: LinearProbe, layer: int, n: int, seed: int
) -> tuple[float, float]:
    """Share of errors undone by taking a subspace from a prefix with other legal moves: the probe's, and a random one.

    Source: Geiger et al. 2024 (arXiv 2303.02536), distributed interchange interventions.
    """
    draw = torch.Generator().manual_seed(seed + 13)
    pool = [sample_prefixes(game, 400, seed=seed + s).draw(4 * n, draw) for s in (13, 17)]
    size = min(len(part) for part in pool)
    base, donors = (part.take(torch.arange(size)) for part in pool)
    other = (base.legal != donors.legal).any(1).nonzero()[:n, 0]
    if len(other) < FEWEST:
        return NAN, NAN
    base, donors = base.take(other), donors.take(other)
    cases = Edits(base, donors.features, donors.legal, torch.ones(len(other), dtype=torch.bool))
    rank = min(sum(probe.sizes) - len(probe.sizes), max(FEW_DIMENSIONS, probe.directions.shape[1] // WIDEST))
    basis = torch.linalg.svd(probe.directions, full_matrices=False).Vh[:rank]
    generator = torch.Generator().manual_seed(seed)
    other = torch.linalg.qr(torch.randn(basis.shape[1], rank, generator=generator)).Q.T
    own, theirs = (part.at(residuals(model, part.games.tokens, [layer])[layer]) for part in (cases.prefixes, donors))
    null = errors(model, cases, layer, torch.zeros(len(cases), 1)).sum().clamp_min(1)
    shares = [
        float(1 - errors(model, cases, layer, (theirs - own) @ space.T @ space).sum() / null)
        for space in (basis, other)
    ]
    return shares[0], shares[1]


def _board(model: HookedModel, cases: Edits, layer: int, moved: Float[Tensor, "m d"]) -> EditedBoard:
    """The case whose moves the edit brings nearest to those of the edited state."""
    game = cases.prefixes.game
    before = edited_probabilities(model, cases, layer, torch.zeros(len(cases), 1))
    after = edited_probabilities(model, cases, layer, moved)
    best = int((set_errors(before, cases.legal) - set_errors(after, cases.legal)).argmax())
    prefix = cases.prefixes.take(torch.tensor([best]))
    edited = game.state_of(cases.features[best : best + 1])[0]
    return EditedBoard(
        moves=" ".join(game.vocabulary[t] for t in prefix.tokens[0, : int(prefix.lengths[0])].tolist()),
        state=game.describe(prefix.states[0]),
        edited_state=game.describe(edited),
        picture=game.picture(prefix.states[0]),
        edited_picture=game.picture(edited),
        tokens=game.vocabulary,
        legal=tuple(prefix.legal[0].tolist()),
        edited_legal=tuple(cases.legal[best].tolist()),
        before=tuple(before[best].tolist()),
        after=tuple(after[best].tolist()),
    )
