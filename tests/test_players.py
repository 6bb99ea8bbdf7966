"""Probes on players known to have been told the state or not: which tell the two kinds apart, on which game."""

from __future__ import annotations

import functools

import pytest
import torch

from circuits import worldmodels
from circuits.errors import BadInput, UnknownName
from circuits.reference.players import KINDS, PLAYERS, SEEDS, player
from circuits.worldmodels import PROBES, SCORES, Reading

TOLD, PLANTED = KINDS
APART = {
    "lattice": ("state-probe", "inductive-bias", "myhill-nerode", "counterfactual", "latent-rollout"),
    "gridworld": ("state-probe", "inductive-bias", "myhill-nerode", "counterfactual", "latent-rollout"),
    "connect3": ("inductive-bias", "myhill-nerode", "latent-rollout"),
    "nim": ("state-probe", "inductive-bias"),
}
"""Probes whose value is higher, for every seed, of whoever was told the state: docs/world-models.md has all figures."""
ALIKE = {"connect3": ("state-probe",), "nim": ("myhill-nerode", "counterfactual")}
"""Probes that say nothing on a game: the placed stone, and legality in nim, a rule without the state knows as well."""
MARGIN = 0.04


@functools.cache
def reading(game: str, probe: str, kind: str, seed: int) -> Reading:
    return PROBES[probe](*player(game, kind, seed=seed))


@pytest.mark.parametrize(("game", "probe"), [(game, probe) for game, probes in APART.items() for probe in probes])
def test_every_player_who_was_told_the_state_is_told_from_every_one_who_plays_by_a_rule(game: str, probe: str) -> None:
    told, planted = ([reading(game, probe, kind, seed).value for seed in SEEDS] for kind in (TOLD, PLANTED))
    assert min(told) > max(planted) + MARGIN


@pytest.mark.parametrize(("game", "probe"), [(game, probe) for game, probes in ALIKE.items() for probe in probes])
def test_where_a_probe_says_nothing_it_is_left_out_of_the_verdict(game: str, probe: str) -> None:
    told, planted = ([{probe: reading(game, probe, kind, seed)} for seed in SEEDS] for kind in (TOLD, PLANTED))
    name = next(name for name, (own, _) in SCORES.items() if own == probe)
    for subject in (*told, *planted):
        assert name in worldmodels.judge(subject, None, told, planted).uninformative


@pytest.mark.parametrize("game", PLAYERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_players_play_what_they_were_trained_to_play(game: str, seed: int) -> None:
    for kind in KINDS:
        model, rules = player(game, kind, seed=seed)
        # other sequences than those of training
        games = rules.sample(300, generator=torch.Generator().manual_seed(12345))
        sets = games.legal if kind == TOLD else rules.planted_heuristic()(games.tokens)
        counts = games.counted[:, 1:]
        with torch.no_grad():
            likely = model(games.tokens).softmax(-1) > 0.5 / sets[:, 1:].sum(-1, keepdim=True)
        agreement = (likely == sets[:, 1:]).all(-1)[counts].float().mean()
        assert agreement > (0.95 if kind == TOLD else 0.999)


def test_what_is_not_stored_is_named() -> None:
    with pytest.raises(UnknownName, match="lattice"):
        player("latice", TOLD)
    with pytest.raises(UnknownName, match="told-state"):
        player("nim", "told")
    with pytest.raises(BadInput, match="seed = 3"):
        player("nim", TOLD, seed=3)
