"""Probes on players known to have been told the state or not: which tell the two kinds apart, on which game."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import with_repeats

from circuits import worldmodels
from circuits.errors import BadInput, UnknownName
from circuits.reference.players import KINDS, PLAYERS, SEEDS, player
from circuits.worldmodels import PROBES, Reading
from circuits.worldmodels.verdict import informative_scores

TOLD, PLANTED = KINDS
APART = {
    "lattice": (
        "state-probe",
        "inductive-bias",
        "myhill-nerode",
        "intervention",
        "legal-actions",
        "counterfactual",
        "next-state",
        "latent-rollout",
        "heuristic-rules",
    ),
    "gridworld": (
        "state-probe",
        "inductive-bias",
        "myhill-nerode",
        "intervention",
        "legal-actions",
        "counterfactual",
        "next-state",
        "latent-rollout",
        "adaptation",
    ),
    "connect3": (
        "state-probe",
        "inductive-bias",
        "myhill-nerode",
        "legal-actions",
        "counterfactual",
        "latent-rollout",
        "detours",
    ),
    "nim": ("state-probe", "inductive-bias", "next-state"),
}
"""Probes whose value is higher, for every seed, of whoever was told the state; the others say nothing on the game."""
LABELS = {
    "lattice": ("world-model", "heuristic"),
    "gridworld": ("world-model", "heuristic"),
    "connect3": ("world-model", "heuristic"),
    "nim": ("undetermined", "undetermined"),  # legality lacks nothing but whose turn it is
}
"""The verdict on each kind, for every seed."""
MARGIN = 0.04


@functools.cache
def readings(game: str, kind: str, seed: int) -> dict[str, Reading]:
    return worldmodels.measure(*player(game, kind, seed=seed))


@pytest.mark.parametrize("game", with_repeats(PLAYERS, {"lattice"}))
def test_probes_that_claim_to_tell_every_player_who_was_told_the_state_and_no_others(game: str) -> None:
    for probe in PROBES:
        told, planted = ([readings(game, kind, seed)[probe].value for seed in SEEDS] for kind in (TOLD, PLANTED))
        assert (min(told) > max(planted) + MARGIN) == (probe in APART[game]), probe


@pytest.mark.parametrize("game", with_repeats(PLAYERS, {"lattice"}))
def test_every_player_is_called_what_it_is_known_to_be(game: str) -> None:
    told, planted = ([readings(game, kind, seed) for seed in SEEDS] for kind in (TOLD, PLANTED))
    said = informative_scores(None, told, planted)
    for kind, label in zip((told, planted), LABELS[game], strict=True):
        for seed, subject in enumerate(kind):
            # a control is held to the others of its kind
            rest = [[one for one in controls if one is not subject] for controls in (told, planted)]
            verdict = worldmodels.judge(subject, None, *rest, informative=said)
            assert verdict.label == label, (seed, verdict.why)


def test_the_stored_players_stand_in_where_no_control_is_given() -> None:
    model, game = player("lattice", PLANTED, seed=1)
    read = ("inductive-bias", "myhill-nerode", "intervention", "legal-actions", "fan-out", "counterfactual")
    verdict = worldmodels.assess(model, game, probes=read)
    assert verdict.label == "heuristic", verdict.why
    assert "the stored network that was told the state" in verdict.controls


@pytest.mark.parametrize("game", PLAYERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_players_play_what_they_were_trained_to_play(game: str, seed: int) -> None:
    for kind in KINDS:
        model, rules = player(game, kind, seed=seed)
        # other sequences than those of training, of 10,318 (nim) to 32,000 (lattice) positions
        games = rules.sample(2000, generator=torch.Generator().manual_seed(12345))
        sets = games.legal if kind == TOLD else rules.planted_heuristic()(games.tokens)
        counts = games.counted[:, 1:]
        with torch.no_grad():
            likely = model(games.tokens).softmax(-1) > 0.5 / sets[:, 1:].sum(-1, keepdim=True)
        agreement = (likely == sets[:, 1:]).all(-1)[counts].double().mean()
        assert agreement > 0.95 if kind == TOLD else agreement == 1


def test_what_is_not_stored_is_named() -> None:
    with pytest.raises(UnknownName, match="lattice"):
        player("latice", TOLD)
    with pytest.raises(UnknownName, match="told-state"):
        player("nim", "told")
    with pytest.raises(BadInput, match="seed = 3"):
        player("nim", TOLD, seed=3)
