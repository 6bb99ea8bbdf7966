"""All probes on one model, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from circuits.errors import UnknownName, UnsupportedModel
from circuits.model import HookedModel, Transformer
from circuits.reference.players import KINDS, PLAYERS, player
from circuits.tasks.games import Game
from circuits.worldmodels.activations import check_fits
from circuits.worldmodels.adaptation import adaptation
from circuits.worldmodels.adversarial import adversarial
from circuits.worldmodels.counterfactual import counterfactual
from circuits.worldmodels.detours import detours
from circuits.worldmodels.heuristic_rules import heuristic_rules
from circuits.worldmodels.inductive_bias import inductive_bias
from circuits.worldmodels.intervention import intervention
from circuits.worldmodels.legal_actions import fan_out, legal_actions
from circuits.worldmodels.myhill_nerode import myhill_nerode
from circuits.worldmodels.next_state import latent_rollout, next_state
from circuits.worldmodels.reading import NAN, NothingToMeasure, Reading
from circuits.worldmodels.state_probe import state_probe
from circuits.worldmodels.symmetry import symmetry
from circuits.worldmodels.verdict import SCORES, Assessment, Thresholds, judge

PROBES: dict[str, Callable[..., Reading]] = {
    "state-probe": state_probe,
    "inductive-bias": inductive_bias,
    "myhill-nerode": myhill_nerode,
    "intervention": intervention,
    "legal-actions": legal_actions,
    "fan-out": fan_out,
    "counterfactual": counterfactual,
    "next-state": next_state,
    "latent-rollout": latent_rollout,
    "detours": detours,
    "adversarial": adversarial,
    "adaptation": adaptation,
    "heuristic-rules": heuristic_rules,
    "symmetry": symmetry,
}
"""Every probe by its name."""

OF_POLICY = ("legal-actions", "fan-out")
"""Probes that ask who plays in training."""
NEEDS_STATES = ("myhill-nerode",)
"""Probes of games whose states can be listed."""
Control = HookedModel | Mapping[str, Reading]
"""A network to compare with, or what ``measure`` found of it."""
NO_RULES = ("held_out", "split_seed", "length")
"""What two forms of a game may differ in and be played alike."""
ENOUGH = (*dict.fromkeys(probe for probe, _ in SCORES.values()), "legal-actions", "fan-out")
"""What the verdict reads."""


def measure(
    model: HookedModel,
    game: Game,
    *,
    probes: Iterable[str] | None = None,
    policy: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Reading]:
    """Return what each of some probes finds; NaN with a note where one cannot be applied.

    Args:
        model: any hooked model that reads the game's tokens.
        game: what it plays.
        probes: names of ``PROBES``; None: all.
        policy: who plays in training; None: uniform play.
        seed: of all draws.
        progress: show a progress bar.

    Raises:
        UnknownName: there is no such probe.
        BadInput: the model does not fit the game.
        UnsupportedModel: the model is not causal.
    """
    from tqdm.auto import tqdm

    check_fits(model, game)
    chosen = list(PROBES) if probes is None else list(probes)
    for name in chosen:
        if name not in PROBES:
            raise UnknownName("probe", name, PROBES)
    found = {}
    for name in tqdm(chosen, desc="probes", disable=not progress):
        if name in NEEDS_STATES and game.n_states is None:
            found[name] = Reading(name, NAN, note=f"{game} has too many states to list")
            continue
        options = {"policy": policy} if name in OF_POLICY else {}
        try:
            found[name] = PROBES[name](model, game, seed=seed, **options)
        except (NothingToMeasure, UnsupportedModel) as error:  # such as rules of neurons in a model that has none
            found[name] = Reading(name, NAN, note=str(error))
        if found[name].value != found[name].value and not found[name].note:
            found[name] = replace(found[name], note=f"{game} has nothing of what this probe looks at")
    return found


def assess(
    model: HookedModel,
    game: Game,
    *,
    untrained: Control | Sequence[Control] | None = None,
    told: Control | Sequence[Control] | None = None,
    planted: Control | Sequence[Control] | None = None,
    probes: Iterable[str] | None = None,
    policy: str | None = None,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Assessment:
    """Return the vector of scores of a model on a game, between two controls, and the label that follows from it.

    Args:
        model: any hooked model that reads the game's tokens.
        game: what it plays.
        untrained: the control at 0: a model of the same shape with random weights, or what ``measure`` found of it, or
            a list of either, one for each seed. None: for our own models such a one is made (its unembedding is random
            too, so it plays at random); for others 0 stands in.
        told: the control at 1: a model of the same shape trained by the objective ``state``, or what ``measure`` found
            of it. None: on a game with the rules of one that ``circuits.reference.PLAYERS`` has, whose sequences are no
            longer than those that it was trained on, the stored network that was told its state,
            and the stored one that plays by a rule as ``planted``; elsewhere 1 stands in, the most that each statistic
            can be, and no label but ``undetermined`` and ``not-learned`` is given.
        planted: a model that plays by the game's planted heuristic, or what ``measure`` found of it: a probe by which
            it does as well as ``told`` is left out. None: none is, but where ``told`` is None too.
        probes: names of ``PROBES``; None: those that the verdict reads.
        policy: who plays in training; None: uniform play.
        thresholds: what the label asks for; None: the defaults.
        seed: of all draws.
        progress: show a progress bar.

    Raises:
        UnknownName: there is no such probe.
        BadInput: a model does not fit the game.
        UnsupportedModel: a model is not causal.

    Source: ours: docs/world-models.md.
    Fails when: the control that was told the state has not learned it: its own readings are in ``to_frame``.
    """
    names = list(ENOUGH if probes is None else probes)
    check_fits(model, game)
    how = []
    if untrained is None and isinstance(model, Transformer):
        untrained = Transformer(model.config, seed=seed + 1).eval()
        how.append("0: a network of the same shape with random weights")
    elif untrained is None:
        how.append("0: a statistic of 0, for want of an untrained network")
    else:
        how.append("0: the untrained network that was given")
    stored = next((name for name, known in PLAYERS.items() if _same_rules(known, game)), None)
    if told is None and stored is not None:
        told, theirs = (player(stored, kind)[0] for kind in KINDS)
        planted = theirs if planted is None else planted
        how.append("1: the stored network that was told the state")
    else:
        how.append("1: a statistic of 1" if told is None else "1: the network that was told the state")

    def found(subject: Any) -> Any:
        if subject is None or isinstance(subject, Mapping):
            return subject
        if isinstance(subject, Sequence):
            return [found(one) for one in subject]
        return measure(subject, game, probes=names, policy=policy, seed=seed, progress=progress)

    readings = found(model)
    return judge(
        readings, found(untrained), found(told), found(planted), thresholds=thresholds, controls="; ".join(how)
    )


def _same_rules(known: Game, game: Game) -> bool:
    """Whether a stored player's game is this one, but for what it was trained on and how long its sequences are."""
    if type(known) is not type(game) or game.n_ctx > known.n_ctx:
        return False
    return all(getattr(known, f.name) == getattr(game, f.name) for f in fields(known) if f.name not in NO_RULES)  # type: ignore[arg-type]
