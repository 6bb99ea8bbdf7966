"""Training on games: which positions have labels, what each objective asks, and heads that stay outside the trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from circuits import objectives, tasks, training
from circuits.errors import BadInput, UnknownName
from circuits.model import ModelConfig, Transformer
from circuits.objectives import Recipe, Simulate, Stage
from circuits.objectives.heads import ActionHead, LinearHead
from circuits.objectives.simulate import next_features
from circuits.runs import Run
from circuits.tasks import games
from circuits.tasks.games.batches import to_learn, to_test
from circuits.training.loop import Position, make_head, make_optimizer, steps
from circuits.training.run_directory import load_state, save_state

LATTICE = games.Lattice(4, 10)
NIM = games.Nim((2, 3), held_out=0.2)
OBJECTIVES = ("next-token", "legal-set", "state", "simulate", "value")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(game: games.Game, seed: int = 0, **changes: Any) -> Transformer:
    sizes = {"d_vocab": game.d_vocab, "n_ctx": game.n_ctx, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_mlp": 32}
    return Transformer(ModelConfig(**{**sizes, "normalization": "LN", "unembed_bias": True, **changes}), seed=seed)


def batch_of(game: games.Game, n: int = 40) -> games.GameBatch:
    return games.training_batch(game, "uniform", n, seed=0, step=3)


def stage(name: str, **settings: Any) -> Stage:
    return Stage(objectives.get(name), **{"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "warmup": 0, **settings})


def test_a_batch_depends_on_nothing_but_its_arguments() -> None:
    one, other = (games.training_batch(NIM, "uniform", 8, seed=1, step=70) for _ in range(2))
    assert torch.equal(one.inputs, other.inputs) and torch.equal(one.scored, other.scored)
    before = games.training_batch(NIM, "uniform", 8, seed=1, step=69)
    assert not torch.equal(one.inputs, before.inputs)
    assert not torch.equal(one.inputs, games.training_batch(NIM, "uniform", 8, seed=2, step=70).inputs)


def test_nothing_behind_a_held_out_state_is_trained_on_and_all_of_it_is_tested() -> None:
    played = NIM.sample(300, generator=generator())
    learn, test = to_learn(NIM, played), to_test(NIM, played)
    kept = NIM.held()
    assert kept is not None
    held = kept.contains(learn.states.flatten(0, 1)).view(learn.scored.shape)
    assert not (held & learn.scored).any()
    assert not (learn.scored & test.scored).any()
    assert torch.equal(learn.scored | test.scored, played.counted[:, 1:])
    # a prefix through a held-out state is behind it, wherever it leads
    behind = held.long().cummax(1).values.bool() & played.counted[:, 1:]
    assert torch.equal(test.scored, behind) and 0 < int(behind.sum()) < behind.numel()
    everything = to_test(LATTICE, LATTICE.sample(20, generator=generator()))
    assert everything.scored.all(), "where none is held out fresh sequences test all"


def test_the_overlap_of_states_is_that_of_the_positions_that_count() -> None:
    seen, unseen = (games.evaluation_batch(NIM, "uniform", unseen=unseen) for unseen in (False, True))
    found = games.overlap(seen, unseen)
    own, other = ({tuple(s) for s in b.states[b.scored].tolist()} for b in (seen, unseen))
    assert (found.train, found.test, found.shared) == (len(own), len(other), len(own & other))
    assert not ({tuple(s) for s in NIM.held().states.tolist()} & own)
    # training goes on: what it can reach around the held-out states is more than these sequences show
    overlap = training.accuracies(small(NIM), NIM)["state_overlap"]
    assert found.share - 1e-6 <= overlap < 1
    assert training.accuracies(small(LATTICE), LATTICE)["state_overlap"] == 1


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    "game", [LATTICE, NIM, games.Gridworld(5, length=8), games.Connect3(3, 3)], ids=lambda g: g.name
)
def test_every_objective_trains_the_trunk_of_every_game(name: str, game: games.Game) -> None:
    model = small(game)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    taken = list(steps(model, game, Recipe("x", (stage(name),)), seed=0))
    assert [step.step for step in taken] == [1, 2, 3] and taken[-1].metrics["labels"] > 0
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"embed.W_E", "blocks.0.attn.W_V", "blocks.1.mlp.W_in"} <= changed
    # nothing of a head is in the model
    assert model.state_dict().keys() == before.keys()
    assert ("unembed.W_U" in changed) == (name != "value")


def test_the_next_token_loss_is_that_of_the_moves_before_a_held_out_state() -> None:
    model, batch = small(NIM), batch_of(NIM)
    logits = model(batch.inputs).log_softmax(-1)
    terms = [
        -logits[n, t, batch.inputs[n, t + 1]]
        for n in range(len(batch))
        for t in range(batch.inputs.shape[1] - 1)
        if batch.scored[n, t]
    ]
    loss = objectives.get("next-token").loss(model, NIM, batch, generator=generator())
    assert loss.value.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert loss.metrics["labels"] == len(terms)


def test_legal_sets_are_even_over_what_is_legal() -> None:
    model, batch = small(LATTICE), batch_of(LATTICE)
    logits = model(batch.inputs).log_softmax(-1)
    even = batch.legal / batch.legal.sum(-1, keepdim=True)
    expected = -(even * logits).sum(-1)[batch.scored].mean()
    loss = objectives.get("legal-set").loss(model, LATTICE, batch, generator=generator())
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-5)
    planted = objectives.get("legal-set", labels="planted-heuristic").loss(model, LATTICE, batch, generator=generator())
    taken = LATTICE.planted_heuristic()(batch.inputs)[:, 1:]
    assert (taken != batch.legal).any()
    even = taken / taken.sum(-1, keepdim=True)
    assert planted.value.item() == pytest.approx(-(even * logits).sum(-1)[batch.scored].mean().item(), rel=1e-5)
    assert 0 <= planted.metrics["agreement"] <= 1


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_state_loss_is_the_features_and_the_next_tokens(weight: float) -> None:
    objective = objectives.get("state", next_token=weight)
    model, batch = small(NIM), batch_of(NIM)
    head = objective.head(NIM, 16, generator=generator())
    loss = objective.loss(model, NIM, batch, generator=generator(), head=head)
    _, cache = model.run_with_cache(batch.inputs, names_filter=["blocks.1.hook_resid_post"])
    parts = head(cache["blocks.1.hook_resid_post"][batch.scored]).split(list(NIM.feature_sizes), 1)
    features = NIM.state_features(batch.states[batch.scored])
    expected = sum(F.cross_entropy(part, features[:, i]) for i, part in enumerate(parts)) / len(parts)
    plain = objectives.get("next-token").loss(model, NIM, batch, generator=generator()).value
    assert loss.value.item() == pytest.approx((expected + weight * plain).item(), rel=1e-5)
    assert loss.metrics["labels"] == features.numel()


def test_simulating_the_move_taken_is_simulating_all_moves_at_it() -> None:
    batch = batch_of(NIM)
    counts = batch.scored[:, :-1]
    states, tokens = batch.states[:, :-1][counts], batch.targets[counts][:, None]
    rows, columns, taken = next_features(NIM, states, tokens, torch.ones_like(tokens, dtype=torch.bool))
    every = torch.arange(NIM.d_vocab).expand(len(states), -1)
    all_rows, all_columns, features = next_features(NIM, states, every, batch.legal[:, :-1][counts])
    where = tokens[all_rows, 0] == all_columns
    assert torch.equal(all_rows[where], rows) and torch.equal(features[where], taken) and not columns.any()
    # a state that is held out is no label, of any move
    reached = NIM.state_of(features)
    assert not NIM.held().contains(reached).any()
    # each label is the state that the engine steps to
    assert torch.equal(features, NIM.state_features(NIM.step(states[all_rows], all_columns)))


def test_all_moves_have_more_labels_than_the_one_taken() -> None:
    model, batch = small(NIM), batch_of(NIM)
    labels = []
    for actions in ("taken", "all"):
        objective = Simulate(actions)
        head = objective.head(NIM, 16, generator=generator())
        assert isinstance(head, ActionHead)
        labels.append(objective.loss(model, NIM, batch, generator=generator(), head=head).metrics["labels"])
    assert labels[1] > 2 * labels[0]
    some = Simulate("all", share=0.25)
    head = some.head(NIM, 16, generator=generator())
    loss = some.loss(model, NIM, batch, generator=generator(), head=head)
    assert 0.1 < loss.metrics["labels"] / labels[1] < 0.4


def test_the_value_is_who_wins_in_the_end() -> None:
    objective = objectives.get("value")
    model, batch = small(NIM), batch_of(NIM)
    head = objective.head(NIM, 16, generator=generator())
    assert isinstance(head, LinearHead) and head.weight.shape[0] == 3
    _, cache = model.run_with_cache(batch.inputs, names_filter=["blocks.1.hook_resid_post"])
    logits = head(cache["blocks.1.hook_resid_post"])
    wins = NIM.winner(batch.games.final_states)
    around = ~NIM.held().visits(batch.games).any(1)
    terms = [F.cross_entropy(logits[n, t], wins[n]) for n, t in batch.scored.nonzero().tolist() if around[n]]
    assert 0 < len(terms) < int(batch.scored.sum())
    loss = objective.loss(model, NIM, batch, generator=generator(), head=head).value
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert objective.head(tasks.get("modular-addition", p=7), 16, generator=generator()) is None


def test_a_stage_can_train_the_unembedding_alone() -> None:
    model = small(LATTICE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in steps(model, LATTICE, Recipe("x", (stage("next-token", trained="unembedding"),)), seed=0):
        assert all(weight.requires_grad for weight in model.parameters()), "frozen only while an update is on"
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"unembed.W_U", "unembed.b_U"}


def test_a_run_with_a_head_resumes_bit_for_bit(tmp_path: Path) -> None:
    recipe = Recipe("x", (stage("state", steps=6), stage("next-token", steps=3, trained="unembedding")))
    whole = small(NIM)
    for _ in steps(whole, NIM, recipe, seed=3):
        pass
    half = small(NIM)
    for update in steps(half, NIM, recipe, seed=3):
        if update.step == 4:
            save_state(tmp_path, half, update.optimizer, Position(4, 0, 4), update.head)
            break
    model, position, moments = load_state(tmp_path)
    assert moments["head"].keys() == {"weight", "bias"}
    for _ in steps(model, NIM, recipe, seed=3, start=(position, moments)):
        pass
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))


def test_initial_heads_are_a_function_of_the_seed() -> None:
    one, same, other = (make_head(small(NIM), NIM, stage("state"), seed) for seed in (0, 0, 1))
    assert one is not None and same is not None and other is not None
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert make_head(small(NIM), NIM, stage("legal-set"), 0) is None
    optimizer = make_optimizer(small(NIM), stage("state"), one)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(small(NIM).parameters())) + 2


def test_a_run_on_a_game_is_a_run(tmp_path: Path) -> None:
    run = training.train(LATTICE, Recipe("x", (stage("state"),)), out=tmp_path / "run", seed=1, progress=False)
    loaded = Run.load(tmp_path / "run")
    assert loaded.task == LATTICE and loaded.recipe == run.recipe
    assert {"accuracy_random", "exact_legal_set", "state_overlap", "head_accuracy", "labels"} <= set(loaded.metrics)
    again = training.train(LATTICE, Recipe("x", (stage("state"),)), out=tmp_path / "run", seed=1, progress=False)
    assert again.manifest == loaded.manifest


def test_default_recipes_speak() -> None:
    for name in OBJECTIVES:
        recipe = training.default_recipe(NIM, objectives.get(name))
        assert [s.trained for s in recipe.stages] == (["all", "unembedding"] if name == "value" else ["all"])
        recipe.check(NIM)


def policy_of_another(game: games.Game) -> None:
    stage("next-token", policy="shortest-path").check(game)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stage("answer").check(NIM), "needs a task with answers, and 'nim' is a game"),
        (lambda: stage("reinforce").check(NIM), "needs a task with answers"),
        (lambda: stage("state").check(tasks.get("modular-addition")), "needs a game, and 'modular-addition' is none"),
        (lambda: stage("next-token", policy="best").check(LATTICE), "'best'"),
        (lambda: stage("next-token", policy="uniform").check(tasks.get("addition")), "is no game; leave policy out"),
        (lambda: stage("next-token", batch_size=None).check(NIM), "batch_size = None"),
        (lambda: stage("next-token", trained="embedding"), "trained = 'embedding'"),
        (lambda: objectives.get("simulate", actions="some"), "actions = 'some'"),
        (lambda: objectives.get("legal-set", labels="x"), "labels = 'x'"),
        (lambda: games.Nim(held_out=1.5), "held_out = 1.5"),
        (lambda: games.Nim(most=0), "most"),
        (lambda: games.Connect3(in_a_row=5), "in_a_row"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call()


def test_an_unknown_policy_is_named_with_what_there_is() -> None:
    with pytest.raises(UnknownName, match="shortest-path"):
        policy_of_another(NIM)


def test_a_model_that_does_not_fit_a_game_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(d_vocab=2, n_ctx=10)
    with pytest.raises(BadInput, match=r"d_vocab = 2, but 'lattice' has 3 tokens"):
        training.train(LATTICE, "next-token", out=tmp_path / "x", model=config, progress=False)
    with pytest.raises(BadInput, match=r"n_ctx = 4, but 'lattice' needs 10"):
        training.train(LATTICE, "next-token", out=tmp_path / "x", model=ModelConfig(d_vocab=3, n_ctx=4), progress=False)
    tied = small(LATTICE, tied=True, unembed_bias=False)
    with pytest.raises(BadInput, match="tied"):
        next(steps(tied, LATTICE, Recipe("x", (stage("next-token", trained="unembedding"),))))


@pytest.mark.parametrize(
    "game", [LATTICE, NIM, games.Gridworld(), games.Connect3(3, 4), games.GroupWord()], ids=lambda g: g.name
)
def test_states_are_found_again_by_their_features(game: games.Game) -> None:
    states = game.enumerate_states()
    assert torch.equal(game.state_of(game.state_features(states)), states)
    outcomes = game.outcome(states)
    assert int(outcomes.min()) >= 0 and int(outcomes.max()) < len(game.outcome_names)
    changed = game.changed_rules()
    if changed is not None:
        assert changed.vocabulary == game.vocabulary
        length = max(game.n_ctx, changed.n_ctx)
        both = [g.sample(50, generator=generator(1), length=length) for g in (game, changed)]
        assert not torch.equal(both[0].legal, both[1].legal)


def test_a_limit_in_nim_has_the_values_of_a_search() -> None:
    game = games.Nim((3, 4), most=2)
    known: dict[tuple[int, ...], int] = {}

    def value(heaps: tuple[int, ...]) -> int:
        if heaps not in known:
            after = [
                (*heaps[:i], heap - k, *heaps[i + 1 :]) for i, heap in enumerate(heaps) for k in (1, 2) if k <= heap
            ]
            known[heaps] = max((-value(other) for other in after), default=-1)
        return known[heaps]

    states = game.enumerate_states()
    assert game.value(states).tolist() == [value(tuple(state[:-1])) for state in states.tolist()]
