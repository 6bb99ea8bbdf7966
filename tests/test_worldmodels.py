"""World-model probes on networks that know exactly the state, or exactly what is legal, and on small cases by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_repeats
from game_oracles import Oracle, knows_legality, knows_state, knows_state_by_neurons

from circuits import worldmodels
from circuits.errors import BadInput, CorruptRun, UnknownName, UnsupportedModel
from circuits.model import ModelConfig, Transformer
from circuits.tasks import ModularAddition, games
from circuits.tasks.games.automaton import NOWHERE, automaton
from circuits.worldmodels import PROBES, SCORES, Acceptance, Assessment, Reading, Thresholds, judge
from circuits.worldmodels.activations import exact_sets, set_errors, top_sets
from circuits.worldmodels.inductive_bias import balanced_labellings, examples, labels_differ, pair_scores
from circuits.worldmodels.intervention import edits
from circuits.worldmodels.prefixes import distinct, follow, sample_prefixes
from circuits.worldmodels.state_probe import changed_features
from circuits.worldmodels.transpositions import transpositions
from circuits.worldmodels.verdict import informative_scores

LATTICE = games.Lattice(5)
NIM = games.Nim((2, 3))
CONNECT = games.Connect3(3, 3)


def untrained(game: games.Game, **changes: Any) -> Transformer:
    sizes = {"d_vocab": game.d_vocab, "n_ctx": game.n_ctx, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_mlp": 32}
    return Transformer(ModelConfig(**{**sizes, "normalization": "LN", **changes}), seed=0).eval()


@pytest.mark.parametrize("game", with_repeats([LATTICE, games.Nim(), CONNECT], {LATTICE}), ids=lambda g: g.name)
def test_who_knows_the_state_has_the_highest_value_of_every_statistic(game: games.Game) -> None:
    found = worldmodels.measure(knows_state(game), game, probes=[name for name in PROBES if name != "adaptation"])
    for name in ("inductive-bias", "myhill-nerode", "legal-actions", "detours"):
        assert found[name].value == pytest.approx(1, abs=0.02), name
    assert found["next-state"].value > 0.94
    # tables of one entry for each state, and no prefix is fitted on and tested on: a state that was not met is not read
    assert found["state-probe"].value > {"lattice": 0.99, "nim": 0.8, "connect3": 0.5}[game.name]
    for name in ("fan-out", "adversarial"):
        assert found[name].value == 1
    assert found["counterfactual"].value > 0.95
    # tables of one entry for each state: a state that was not met has no direction, and a move no map for it
    assert found["intervention"].value > 0.6
    assert found["latent-rollout"].value > (0.95 if game == LATTICE else 0.6)
    assert found["myhill-nerode"].details["distinction_recall"] == 1
    assert found["myhill-nerode"].details["distinction_precision"] == 1
    assert found["legal-actions"].details["illegal_mass"] < 1e-3
    bias = found["inductive-bias"]
    assert bias.details["r_ib"] == 1 and bias.details["accuracy"] == 1
    assert bias.value == pytest.approx(1)
    assert bias.details["d_ib_same_legal"] == pytest.approx(bias.controls["ceiling of these labels"])
    assert math.isnan(found["heuristic-rules"].value), "a network without neurons has no rules"


def test_who_knows_what_is_legal_plays_and_tells_apart_nothing_else() -> None:
    found = worldmodels.measure(knows_legality(LATTICE), LATTICE, probes=["inductive-bias", "legal-actions"])
    assert found["legal-actions"].value == 1
    bias = found["inductive-bias"].details
    assert bias["d_ib_same_legal"] == 0 and bias["r_ib"] == 1
    assert found["inductive-bias"].value == pytest.approx(0)
    assert bias["d_ib_other_legal"] > 0.8
    state = worldmodels.state_probe(knows_legality(LATTICE), LATTICE)
    # two walls of five, and the middle as the best guess in between
    assert 0.5 < state.value < 0.75


def test_where_legality_is_the_state_but_for_the_player_only_he_is_missed() -> None:
    state, legality = (worldmodels.state_probe(model, NIM) for model in (knows_state(NIM), knows_legality(NIM)))
    assert state.details["whole_state"] > 0.5
    assert legality.details["changed player"] < 0.75


@pytest.mark.parametrize("game", [LATTICE, NIM, CONNECT, games.Gridworld(5, length=10)], ids=lambda g: g.name)
def test_classes_are_those_of_equal_futures(game: games.Game) -> None:
    table, classes = automaton(game), worldmodels.minimal_classes(game)

    def future(row: int, depth: int) -> Any:
        ways = table.successors[row].tolist()
        return tuple(NOWHERE if way == NOWHERE else (future(way, depth - 1) if depth else 0) for way in ways)

    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(table), generator=generator)[:14].tolist()
    for one, other in itertools.combinations(rows, 2):
        alike = future(one, 4) == future(other, 4)
        assert alike or classes[one] != classes[other]
        if classes[one] == classes[other]:
            assert alike


def test_in_nim_the_player_is_no_matter_of_legality() -> None:
    classes = worldmodels.minimal_classes(NIM)
    heaps = automaton(NIM).states[:, :-1]
    same = (heaps[:, None] == heaps).all(2)
    assert torch.equal(torch.as_tensor(classes[:, None] == classes), same)


@pytest.mark.parametrize("game", [LATTICE, NIM], ids=lambda g: g.name)
def test_a_boundary_is_what_a_search_of_all_strings_finds(game: games.Game) -> None:
    successors = automaton(game).successors.tolist()

    def legal(row: int, string: tuple[int, ...]) -> bool:
        for token in string:
            row = successors[row][token]
            if row == NOWHERE:
                return False
        return True

    pairs = [(0, 1), (1, 2), (2, 3), (3, 1)]
    for first, second in pairs:
        expected = {
            string
            for length in (1, 2, 3)
            for string in itertools.product(range(game.d_vocab), repeat=length)
            if legal(first, string) and not legal(second, string) and legal(second, string[:-1])
        }
        strings, lengths = worldmodels.boundary(game, first, second, 3)
        found = [tuple(string[:length]) for string, length in zip(strings.tolist(), lengths.tolist(), strict=True)]
        assert len(found) == len(set(found)) and set(found) == expected


def test_biases_are_shares_of_pairs() -> None:
    chosen = examples(LATTICE, labellings=4, seed=0)[0]
    n = len(chosen.test)
    answers = torch.rand(4, n, generator=torch.Generator().manual_seed(1)) < 0.5
    scores = pair_scores(answers, chosen)
    states, legal = chosen.test_state.tolist(), chosen.test.legal_class.tolist()
    for k in range(4):
        differ: dict[str, list[bool]] = {"same": [], "q": [], "other": []}
        for i, j in itertools.combinations(range(n), 2):
            kind = "same" if states[i] == states[j] else "q" if legal[i] == legal[j] else "other"
            differ[kind].append(bool(answers[k, i] != answers[k, j]))
        mean = {kind: sum(values) / len(values) for kind, values in differ.items()}
        assert scores.r[k].item() == pytest.approx(1 - 2 * mean["same"], abs=1e-5)
        assert scores.d_same_legal[k].item() == pytest.approx(2 * mean["q"], abs=1e-5)
        assert scores.d_other_legal[k].item() == pytest.approx(2 * mean["other"], abs=1e-5)
    constant = pair_scores(torch.zeros(4, n, dtype=torch.bool), chosen)
    assert (constant.r == 1).all() and (constant.d == 0).all()
    # labels of a set are balanced, and prefixes to learn from and to extrapolate to are of different sequences
    assert (chosen.labels.sum(1) == chosen.labels.shape[1] // 2).all()
    assert not set(chosen.fit.row.tolist()) & set(chosen.test.row.tolist())


def test_ways_to_one_state_are_all_that_a_search_of_all_games_finds() -> None:
    found = transpositions(CONNECT, 6, generator=torch.Generator().manual_seed(0))
    assert found is not None
    length = found.games.tokens.shape[1]
    every = torch.tensor(list(itertools.product(range(CONNECT.n_actions), repeat=length)))
    states, alive = follow(CONNECT, CONNECT.initial(len(every)), every)
    goes_on = alive[:, -1] & ~CONNECT.terminal(states[:, -1])
    ways: dict[Any, set[Any]] = {}
    for state, way in zip(states[goes_on, -1].tolist(), every[goes_on].tolist(), strict=True):
        ways.setdefault(tuple(state), set()).add(tuple(way))
    expected = {state: own for state, own in ways.items() if len(own) >= 6}
    listed: dict[Any, list[Any]] = {}
    for state, way in zip(found.states.tolist(), found.games.tokens.tolist(), strict=True):
        listed.setdefault(tuple(state), []).append(tuple(way))
    assert {state: set(own) for state, own in listed.items()} == expected
    assert sum(map(len, listed.values())) == len(found) == sum(map(len, expected.values()))


@pytest.mark.parametrize("game", with_repeats([games.Othello(6), games.Othello(8)], {games.Othello(6)}), ids=str)
def test_where_no_two_games_meet_a_search_finds_states_to_label(game: games.Game) -> None:
    reading = worldmodels.inductive_bias(untrained(game), game)
    assert reading.details["states"] == 8 and math.isfinite(reading.value)
    assert reading.details["d_ib_same_legal"] > 0 and reading.details["d_ib_other_legal"] > 0
    for part in examples(game, labellings=10, seed=0):
        assert min(torch.bincount(part.fit_state).min(), torch.bincount(part.test_state).min()) >= 3


def test_games_are_added_until_states_of_other_legal_moves_are_met() -> None:
    for part in examples(games.Connect3(), labellings=40, seed=0):
        assert len(part.test.legal_class.unique()) > 1


def test_fine_tuning_all_weights_leaves_the_model_alone() -> None:
    model = untrained(LATTICE)
    before = [weight.clone() for weight in model.parameters()]
    found = worldmodels.fine_tuned_inductive_bias(
        model, LATTICE, steps=(1, 3), learning_rates=(1e-3,), labellings=2, seed=0
    )
    assert found.keys() == {(1, 1e-3), (3, 1e-3)}
    assert all(0 <= reading.details["accuracy"] <= 1 for reading in found.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_adaptation_learns_the_new_wall_and_leaves_the_model_alone() -> None:
    model = untrained(LATTICE)
    before = [weight.clone() for weight in model.parameters()]
    found = worldmodels.adaptation(model, LATTICE, examples=(4, 64), steps=150)
    curve = found.curves["exact sets"]
    assert curve.x == (0, 4, 64) and curve.y[2] > 0.9 > curve.y[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert math.isnan(worldmodels.adaptation(untrained(games.GroupWord()), games.GroupWord()).value)


@pytest.mark.parametrize(("n", "most"), [(5, 40), (8, 40), (8, 70), (2, 1), (3, 40)])
def test_labellings_are_balanced_and_none_comes_twice(n: int, most: int) -> None:
    found = balanced_labellings(n, most, torch.Generator().manual_seed(0))
    assert len(found) == min(most, math.comb(n, n // 2)) == len(found.unique(dim=0))
    assert (found.sum(1) == n // 2).all()
    if len(found) == math.comb(n, n // 2):
        first, second = torch.triu_indices(n, n, offset=1)
        differ = 2 * (found[:, first] != found[:, second]).double().mean()
        assert labels_differ(n) == pytest.approx(float(differ))


NONSENSE: list[tuple[Any, dict[str, Any], str]] = [
    (worldmodels.inductive_bias, {"labellings": -1}, "labellings = -1"),
    (worldmodels.inductive_bias, {"layer": -2}, "layer = -2"),
    (worldmodels.fine_tuned_inductive_bias, {"steps": ()}, "steps"),
    (worldmodels.fine_tuned_inductive_bias, {"steps": (0,)}, "steps = 0"),
    (worldmodels.detours, {"rates": ()}, "rates is empty"),
    (worldmodels.detours, {"n": 0}, "n = 0"),
    (worldmodels.adaptation, {"examples": ()}, "examples is empty"),
    (worldmodels.heuristic_rules, {"depth": 0}, "depth = 0"),
    (worldmodels.myhill_nerode, {"pairs": 0}, "pairs = 0"),
    (worldmodels.counterfactual, {"n": 0}, "n = 0"),
    (worldmodels.intervention, {"cases": 0}, "cases = 0"),
    (worldmodels.state_probe, {"n": 0}, "n = 0"),
]


@pytest.mark.parametrize(("probe", "arguments", "message"), NONSENSE)
def test_arguments_without_a_sense_are_named(probe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        probe(untrained(LATTICE), LATTICE, **arguments)


@pytest.mark.untyped
def test_a_task_that_is_no_game_is_refused() -> None:
    with pytest.raises(BadInput, match="'modular-addition' is no game"):
        worldmodels.assess(untrained(LATTICE), ModularAddition(p=5))


def test_selectivity_over_an_untrained_network_is_told_where_one_is_given() -> None:
    found = worldmodels.state_probe(knows_state(LATTICE), LATTICE, untrained=untrained(LATTICE))
    twin = worldmodels.state_probe(untrained(LATTICE), LATTICE)
    assert found.details["selectivity over an untrained network"] == pytest.approx(found.value - twin.value)


def test_edits_change_one_feature_and_what_is_legal() -> None:
    for legality in (True, False):
        found = edits(CONNECT, 60, seed=0, legality=legality)
        own = found.prefixes.features
        assert len(found) > 10 and ((own != found.features).sum(1) == 1).all()
        states = CONNECT.state_of(found.features)
        assert torch.equal(found.legal, CONNECT.legal(states))
        assert ((found.legal != found.prefixes.legal).any(1) == legality).all()
        known = {tuple(state) for state in CONNECT.enumerate_states().tolist()}
        assert found.reachable.tolist() == [tuple(state) in known for state in states.tolist()]
    moved = edits(NIM, 40, seed=0)
    # the exclusive or follows from the heaps
    assert torch.equal(NIM.state_features(NIM.state_of(moved.features)), moved.features)


def test_an_edit_along_no_direction_of_the_state_undoes_little() -> None:
    found = worldmodels.intervention(knows_state(LATTICE), LATTICE)
    assert found.value > 0.95 and found.details["interchange"] > 0.95
    assert found.controls["random direction"] < 0.6 and found.controls["random labels"] < 0.6
    board = found.board
    assert board is not None and board.picture != board.edited_picture and board.legal != board.edited_legal
    assert sum(board.after) == pytest.approx(1) and len(board.tokens) == 3
    assert math.isnan(found.details["unreachable"]), "every position of a lattice can be reached"


def test_sets_of_likely_tokens() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    legal = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert top_sets(p, torch.tensor([1, 3])).tolist() == [[True, False, False, False], [True, True, True, False]]
    assert set_errors(p, legal).tolist() == [0, 0]
    assert set_errors(p, ~legal)[0] == 4
    assert exact_sets(p, legal).tolist() == [True, True]
    sizes = legal.sum(1)
    assert Acceptance("epsilon", 0.2)(p, sizes).sum(1).tolist() == [2, 4]
    assert Acceptance("share", 0.5)(p, sizes).sum(1).tolist() == [2, 4]
    assert Acceptance("top")(p, sizes).sum(1).tolist() == [2, 4]


def test_prefixes_are_what_they_say() -> None:
    prefixes = sample_prefixes(NIM, 50, seed=0)
    assert not NIM.terminal(prefixes.states).any()
    for i in range(0, len(prefixes), 17):
        tokens = prefixes.tokens[i : i + 1, : int(prefixes.lengths[i])]
        assert torch.equal(NIM.play(tokens).final_states[0], prefixes.states[i])
    once = distinct(prefixes)
    strings = [tuple(once.tokens[i, : int(once.lengths[i])].tolist()) for i in range(len(once))]
    every = {tuple(prefixes.tokens[i, : int(prefixes.lengths[i])].tolist()) for i in range(len(prefixes))}
    assert len(strings) == len(set(strings)) and set(strings) == every
    # a stone in connect three is one cell, though to the other player all stones are the other's
    assert (changed_features(sample_prefixes(CONNECT, 50, seed=0, over=True)).sum(1) == 1).all()
    moved = changed_features(prefixes)
    assert (moved[:, -2]).all() and (moved[:, :2].sum(1) == 1).all(), "the player, and one heap"


def test_following_goes_on_after_an_illegal_move() -> None:
    tokens = torch.tensor([[2, 0, 0, 1], [2, 2, 2, 2]])
    states, alive = follow(LATTICE, LATTICE.initial(2), tokens)
    assert alive.tolist() == [[True, True, False, False], [True, True, True, True]]
    assert states[1, :, 0].tolist() == [0, 1, 2, 3, 4] and states[0, :3, 0].tolist() == [0, 1, 0]


def test_detours_replace_moves_by_legal_ones() -> None:
    # a network that always steps to the right runs into the wall unless it is kept from it
    model = Oracle(LATTICE, torch.zeros(5, dtype=torch.int64))
    with torch.no_grad():
        model.W_U.copy_(torch.tensor([[0.0, 0.0, 5.0]]))
    found = worldmodels.detours(model, LATTICE, rates=(0.0, 1.0))
    assert found.details["at 0"] == 0 and found.details["at 1"] == 1
    assert worldmodels.detours(knows_state(LATTICE), LATTICE, kind="least-likely").value == 1
    with pytest.raises(BadInput, match="kind = 'x'"):
        worldmodels.detours(model, LATTICE, kind="x")
    with pytest.raises(BadInput, match="rate 2"):
        worldmodels.detours(model, LATTICE, rates=(2,))


def test_an_opponent_finds_the_blind_spot() -> None:
    model = knows_state(LATTICE)
    with torch.no_grad():
        model.W_U[0] = torch.tensor([12.0, 0.0, 0.0])  # at the left wall it steps into it
    found = worldmodels.adversarial(model, LATTICE)
    assert found.details["illegal, most-illegal"] > 0.4 > found.details["illegal, random"] > 0


def test_who_counts_columns_does_not_notice_that_somebody_won() -> None:
    table = automaton(CONNECT)
    heights = (CONNECT.state_features(table.states) != 0).view(-1, 3, 3).sum(1)
    counter = Oracle(CONNECT, heights.unique(dim=0, return_inverse=True)[1])
    found = worldmodels.measure(counter, CONNECT, probes=["legal-actions", "detours", "adversarial"])
    assert found["legal-actions"].value < 0.95 and found["legal-actions"].details["illegal_mass at the end"] > 0.5
    assert found["detours"].value < 0.5
    details = found["adversarial"].details
    assert details["illegal, most-illegal"] >= details["illegal, random"] > 0


def test_a_network_that_saw_one_way_is_lost_off_it() -> None:
    # it knows the way back and forth between the first two positions, and nothing beyond
    model = knows_state(LATTICE)
    with torch.no_grad():
        model.W_U[:2] = torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0]])
        model.W_U[2:] = torch.tensor([0.0, 0.0, 9.0])
    found = worldmodels.fan_out(model, LATTICE)
    assert 0 <= found.details["off_policy_gap"] <= 1
    grid = games.Gridworld(5, length=10)
    details = worldmodels.fan_out(knows_state(grid), grid, policy="shortest-path").details
    assert details["off_policy_gap"] == pytest.approx(0, abs=1e-9) and details["on_policy"] == 1


def test_moves_that_commute_change_nothing() -> None:
    for game in (LATTICE, games.Nim(), CONNECT):
        found = worldmodels.counterfactual(knows_state(game), game)
        assert found.details["commuting_edits"] > 10
        assert found.details["commuting_change"] == pytest.approx(0, abs=1e-5) and found.details["edit_change"] > 0.1


@pytest.mark.parametrize("game", [games.Nim((2, 3)), games.Lattice(2), games.Gridworld(5, length=5)], ids=str)
def test_short_contexts_are_measured_as_far_as_they_go(game: games.Game) -> None:
    found = worldmodels.measure(untrained(game), game, probes=["myhill-nerode", "counterfactual", "fan-out"])
    assert set(found) == {"myhill-nerode", "counterfactual", "fan-out"}


def test_symmetry_sees_what_is_learned_on_one_side_alone() -> None:
    fair = worldmodels.symmetry(knows_state(CONNECT), CONNECT)
    assert fair.value == pytest.approx(1, abs=1e-4)
    model = knows_state(CONNECT)
    with torch.no_grad():
        model.W_U[:, 0] -= 20
    assert worldmodels.symmetry(model, CONNECT).value < 0.8
    assert math.isnan(worldmodels.symmetry(knows_state(LATTICE), LATTICE).value)


def test_rules_explain_neurons_that_are_rules() -> None:
    found = worldmodels.heuristic_rules(untrained(LATTICE), LATTICE, neurons=8)
    assert found.value == 0 and found.details["median_explained"] < 0.5
    # a state that neurons have one by one is a rule each
    model = knows_state_by_neurons(LATTICE)
    explained = worldmodels.heuristic_rules(model, LATTICE, neurons=5)
    assert explained.value == 1 and explained.details["replaced"] == pytest.approx(1, abs=0.01)
    assert explained.details["pattern_effect"] >= explained.controls["another pattern"]
    with pytest.raises(UnsupportedModel, match="no MLPs"):
        worldmodels.heuristic_rules(knows_state(LATTICE), LATTICE)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: untrained(games.Lattice(5, 4)), BadInput, "n_ctx = 4: sequences of 'lattice' have 24 tokens"),
        (lambda: untrained(LATTICE, d_vocab=2), BadInput, "d_vocab = 2: 'lattice' has 3 tokens"),
        (lambda: untrained(LATTICE, causal=False), UnsupportedModel, "sees later tokens"),
    ],
)
@pytest.mark.parametrize("probe", ["state-probe", "inductive-bias", "detours"])
def test_a_model_that_does_not_fit_is_refused(probe: str, model: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PROBES[probe](model(), LATTICE)


def test_other_errors_are_named() -> None:
    with pytest.raises(UnknownName, match="state-probe"):
        worldmodels.measure(untrained(LATTICE), LATTICE, probes=["state-prob"])
    with pytest.raises(BadInput, match="too many states"):
        worldmodels.minimal_classes(games.Othello(8))
    othello = games.Othello(6)
    other = worldmodels.measure(untrained(othello), othello, probes=["myhill-nerode"])
    assert "too many states" in other["myhill-nerode"].note
    short = games.Lattice(5, 1)
    with pytest.raises(BadInput, match="fewer than two states"):
        worldmodels.inductive_bias(untrained(short), short)
    with pytest.raises(BadInput, match="rule = 'x'"):
        Acceptance("x")


def readings(**values: float) -> dict[str, Reading]:
    found = {probe: Reading(probe, 0.0, (0.0, 0.0)) for probe, _ in SCORES.values()}
    names = {name.replace(" ", "_").replace("-", "_"): probe for name, (probe, _) in SCORES.items()}
    for name, value in values.items():
        if name in names:
            found[names[name]] = Reading(names[name], value, (value - 0.1, value + 0.1))
    mass, gap = values.get("illegal_mass", 0.0), values.get("gap", 0.0)
    found["legal-actions"] = Reading("legal-actions", 1.0, details={"illegal_mass": mass})
    found["fan-out"] = Reading("fan-out", 1 - gap, details={"off_policy_gap": gap})
    return found


ALL = [name.replace(" ", "_").replace("-", "_") for name in SCORES]
GOOD = {
    "distinguishes": 0.9,
    "compresses": 0.9,
    "uses_it": 0.9,
    "follows_counterfactuals": 0.9,
    "holds_off_policy": 0.9,
}


@pytest.mark.parametrize(
    ("values", "label"),
    [
        (GOOD, "world-model"),
        (GOOD | {"illegal_mass": 0.1}, "not-learned"),
        (GOOD | {"gap": 0.2}, "mixed"),
        (GOOD | {"uses_it": 0.6}, "mixed"),
        (GOOD | {"uses_it": 0.05}, "mixed"),
        (GOOD | {"distinguishes": 0.4}, "mixed"),
        (GOOD | {"follows_counterfactuals": 0.1}, "mixed"),
        (GOOD | {"follows_counterfactuals": 0.1, "holds_off_policy": 0.1}, "heuristic"),
        (GOOD | {"distinguishes": 0.4, "compresses": 0.5}, "heuristic"),
        ({}, "heuristic"),
    ],
)
def test_labels_follow_from_scores(values: dict[str, float], label: str) -> None:
    nothing, everything = readings(), readings(**dict.fromkeys(ALL, 1.0))
    found = judge(readings(**values), nothing, everything)
    assert found.label == label and found.why
    assert {name for name, score in found.scores.items() if score.known} == set(SCORES)
    # how high a score can be is not known without a network that was told the state
    assert judge(readings(**values), nothing).label == ("not-learned" if label == "not-learned" else "undetermined")


@pytest.mark.parametrize("probe", ["legal-actions", "fan-out", "intervention", "inductive-bias"])
def test_what_was_not_measured_is_not_taken_for_granted(probe: str) -> None:
    found = {name: reading for name, reading in readings(**GOOD).items() if name != probe}
    verdict = judge(found, readings(), readings(**dict.fromkeys(ALL, 1.0)))
    assert verdict.label == "undetermined" and probe in verdict.why


def test_two_controls_that_hardly_do_it_are_no_scale() -> None:
    weak = readings(**{**dict.fromkeys(ALL, 1.0), "compresses": 0.3})
    found = judge(readings(**GOOD), readings(), weak)
    assert not found.scores["compresses"].known and "compresses: the probe says nothing" in found.why
    assert found.label == "world-model"


def test_a_probe_says_the_same_of_every_run_of_a_game() -> None:
    noisy = [readings(compresses=x) for x in (0.5, 0.9, 0.7)]
    said = informative_scores(readings(), noisy)
    assert "compresses" in said
    for one in noisy:
        others = [reading for reading in noisy if reading is not one]
        assert judge(one, readings(), others, informative=said).scores["compresses"].known


def test_scores_stand_between_the_controls_and_say_nothing_where_these_are_alike() -> None:
    low, high = readings(compresses=0.2, uses_it=0.5), readings(compresses=0.6, uses_it=0.55, distinguishes=1.0)
    found = judge(readings(compresses=0.4, uses_it=0.9, distinguishes=0.7), low, high)
    score = found.scores["compresses"]
    assert score.value == pytest.approx(0.5) and (score.raw, score.untrained, score.told) == (0.4, 0.2, 0.6)
    assert (score.low, score.high) == (pytest.approx(0.25), pytest.approx(0.75))
    assert not found.scores["uses it"].known and "uses it" in found.uninformative
    assert found.scores["distinguishes"].value == pytest.approx(0.7)
    # a probe by which the planted heuristic does as well as who was told the state says nothing either
    planted = readings(compresses=0.55, distinguishes=0.3)
    found = judge(readings(compresses=0.4, distinguishes=0.7), [low, low], [high, high], [planted, planted])
    assert not found.scores["compresses"].known and found.scores["distinguishes"].known
    # and where nothing is left, nothing is claimed
    assert judge(high, high, high).label == "undetermined"
    assert judge(high, low, high, thresholds=Thresholds(informative=0.5)).scores["compresses"].known is False


def test_an_assessment_is_stored_whole(tmp_path: Path) -> None:
    found = worldmodels.assess(knows_state(LATTICE), LATTICE, probes=["inductive-bias", "myhill-nerode"])
    assert found.label == "undetermined" and "not measured: legal-actions" in found.why
    found.save(tmp_path)
    loaded = Assessment.load(tmp_path)
    assert loaded.label == found.label and loaded.to_frame().equals(found.to_frame())
    assert loaded.readings["myhill-nerode"].curves == found.readings["myhill-nerode"].curves
    assert found.figure().data[0].x == pytest.approx((1.0, 1.0)) and "distinguishes" in found._repr_html_()
    assert "1: a statistic of 1" in found.controls
    for reading in found.readings.values():
        assert reading.figure().layout.xaxis.title.text and reading.probe in reading._repr_html_()
    (tmp_path / "assessment.json").write_text("{}")
    with pytest.raises(CorruptRun, match="is no assessment"):
        Assessment.load(tmp_path)
    with pytest.raises(CorruptRun, match=r"holds no assessment\.json"):
        Assessment.load(tmp_path / "x")


def test_our_own_untrained_twin_is_the_control_where_none_is_given() -> None:
    found = worldmodels.assess(untrained(NIM), NIM, probes=["legal-actions", "inductive-bias"])
    assert "random weights" in found.controls and found.label == "not-learned"


def test_a_bridge_is_read_alike() -> None:
    pytest.importorskip("transformer_lens.model_bridge")
    model = untrained(LATTICE)
    bridge = model.to_bridge()
    for probe in ("inductive-bias", "legal-actions", "intervention"):
        ours, theirs = PROBES[probe](model, LATTICE), PROBES[probe](bridge, LATTICE)
        assert theirs.value == pytest.approx(ours.value, abs=0.02)


def test_a_prefix_is_never_fitted_on_and_tested_on() -> None:
    from circuits.worldmodels.prefixes import half, sample_prefixes

    pool = [half(sample_prefixes(NIM, 300, seed=seed), seed) for seed in (0, 1)]
    seen = [
        {tuple(row[:n]) for row, n in zip(part.tokens.tolist(), part.lengths.tolist(), strict=True)} for part in pool
    ]
    assert all(seen) and not seen[0] & seen[1]


def test_probability_of_tokens_that_the_game_has_not_is_illegal() -> None:
    model = untrained(LATTICE, d_vocab=10)
    with torch.no_grad():
        model.unembed.b_U = torch.nn.Parameter(torch.zeros(10))
        model.unembed.b_U[9] = 100
    found = worldmodels.legal_actions(model, LATTICE)
    assert found.details["illegal_mass"] > 0.999 and found.details["top_legal"] == 0
    assert worldmodels.measure(model, LATTICE, probes=["adversarial"])["adversarial"].value == 0


@pytest.mark.parametrize("game", [games.Lattice(5, 1), games.Nim((1,)), games.Lattice(2), games.Lattice(5, 2)], ids=str)
def test_small_games_leave_a_probe_nothing_to_measure_and_say_so(game: games.Game) -> None:
    found = worldmodels.measure(untrained(game), game)
    for name, reading in found.items():
        assert reading.value == reading.value or reading.note, name


def test_controls_may_be_several_models_and_other_lengths_have_the_stored_players() -> None:
    game = games.Lattice(5, 12, held_out=0.2)
    probes = ("legal-actions", "fan-out", "inductive-bias", "intervention")
    found = worldmodels.assess(untrained(game), game, untrained=[untrained(game), untrained(game)], probes=probes)
    assert "the stored network that was told the state" in found.controls
    other = worldmodels.assess(untrained(games.Lattice(7)), games.Lattice(7), probes=probes)
    assert "stored" not in other.controls


@pytest.mark.untyped
def test_what_is_no_model_or_no_number_of_games_is_refused() -> None:
    with pytest.raises(BadInput, match="NoneType has no TransformerLens hooks"):
        worldmodels.assess(None, LATTICE)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="n = 0"):
        worldmodels.adversarial(untrained(LATTICE), LATTICE, n=0)
    with pytest.raises(BadInput, match="n = 2"):
        worldmodels.latent_rollout(untrained(LATTICE), LATTICE, n=2)
    with pytest.raises(BadInput, match="learning_rates has -1"):
        worldmodels.fine_tuned_inductive_bias(untrained(LATTICE), LATTICE, learning_rates=(-1.0,))
