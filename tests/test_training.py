"""Training: deterministic, resumable bit for bit, honest about damage and divergence."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import circuits
from circuits import objectives, tasks, training
from circuits.errors import BadInput, CorruptRun, Diverged, IncompatibleRun, StorageError, UnknownName
from circuits.model import ModelConfig, Transformer, load
from circuits.objectives import Recipe, Stage
from circuits.runs import Run, list_runs, run_id
from circuits.training.loop import learning_rate, steps
from circuits.training.run_directory import STATE

inner = sys.modules["circuits.training.run_directory"]

TASK = tasks.get("modular-addition", p=7, block=2, train_fraction=0.7)
MODEL = ModelConfig(d_vocab=TASK.d_vocab, n_ctx=3, d_model=16, n_heads=2, d_mlp=24)
STAGE = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "warmup": 3, "cooldown": 0.3}


PARAMETERS = {"banded": {"width": 3}}


def recipe(name="answer", **fields):
    return recipe_of(objectives.get(name, **PARAMETERS.get(name, {})), **fields)


def recipe_of(objective, **fields):
    return Recipe("tiny", (Stage(objective, **{**STAGE, **fields}),))


def train(out, plan=None, **options):
    return training.train(TASK, plan or recipe(), out=out, model=MODEL, progress=False, **options)


def stopped(out, plan=None, *, after, **options):
    """A training that is interrupted after an update."""

    def interrupted(*args, **kwargs):
        for update in steps(*args, **kwargs):
            yield update
            if update.step == after:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "steps", interrupted)
        train(out, plan, **options)


def refuse(*arguments, **options):
    raise MemoryError


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_same_config_gives_the_same_run(tmp_path):
    first, second = train(tmp_path / "a"), train(tmp_path / "b")
    assert equal(weights(first), weights(second))
    assert first.id == second.id == run_id(TASK, recipe(), 0, MODEL)
    assert first.metrics.equals(second.metrics)
    other = train(tmp_path / "c", seed=1)
    assert not equal(weights(first), weights(other))
    assert len(list_runs(tmp_path)) == 3


ON_ARITHMETIC = sorted(objectives.OBJECTIVES.keys() - {"legal-set", "simulate", "state"})


@pytest.mark.parametrize(("name", "stop"), [*((name, 7) for name in ON_ARITHMETIC), ("answer", 1), ("answer", 11)])
def test_resume_is_bit_exact(tmp_path, name, stop):
    plan = Recipe("two", (*recipe(name).stages, *recipe("answer", steps=5).stages))
    whole = train(tmp_path / "whole", plan)
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "cut", plan, after=stop, save_every=-1.0)
    with pytest.raises(CorruptRun, match="unfinished"):
        Run.load(tmp_path / "cut")
    resumed = train(tmp_path / "cut", plan, resume=True)
    assert equal(weights(whole), weights(resumed))
    assert whole.metrics.equals(resumed.metrics)
    assert sorted(whole.checkpoints) == sorted(resumed.checkpoints)


def test_a_stage_that_had_reached_its_goal_is_not_gone_on_with(tmp_path):
    plan = Recipe("two", (*recipe(steps=100, stop_accuracy=0.0).stages, *recipe("answer", steps=5).stages))
    whole = train(tmp_path / "whole", plan, evaluate_every=5)
    assert max(whole.checkpoints) == 15
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "cut", plan, after=10, save_every=-1.0, evaluate_every=5)
    resumed = train(tmp_path / "cut", plan, resume=True, evaluate_every=5)
    assert equal(weights(whole), weights(resumed)) and whole.metrics.equals(resumed.metrics)


def test_a_checkpoint_that_was_passed_is_not_left_out_in_silence(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path, after=9, save_every=-1.0)
    with pytest.raises(IncompatibleRun, match="stopped after step 9 and kept no checkpoint of step 3"):
        train(tmp_path, checkpoints=(3,), resume=True)
    shutil.rmtree(tmp_path)
    assert 3 in train(tmp_path, checkpoints=(3,)).checkpoints


@pytest.mark.untyped
@pytest.mark.parametrize("every", [0, -5, 2.5, True])
def test_evaluations_are_counted(tmp_path, every):
    with pytest.raises(BadInput, match="evaluate_every"):
        train(tmp_path, evaluate_every=every)
    assert not (tmp_path / "config.json").exists()


def test_initial_weights_and_data_do_not_depend_on_the_objective():
    assert equal(Transformer(MODEL, seed=3).state_dict(), Transformer(MODEL, seed=3).state_dict())
    assert torch.equal(operands_seen("answer"), operands_seen("reinforce"))


def operands_seen(name):
    """The operands of every batch that an objective is given."""
    batches = []

    class Spy(type(objectives.get(name))):
        def loss(self, model, task, batch, *, generator):
            batches.append(batch.operands)
            return super().loss(model, task, batch, generator=generator)

    list(training.steps(Transformer(MODEL), TASK, Recipe("spy", (Stage(Spy(), **STAGE),)), seed=5))
    return torch.cat(batches)


def test_learning_rate_schedule():
    stage = Stage(objectives.get("answer"), steps=10, learning_rate=1.0, warmup=4, cooldown=0.3)
    assert [learning_rate(stage, n) for n in range(10)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.3, 0.3, 0.3])


def test_training_learns_a_small_table(tmp_path):
    plan = recipe(steps=150, batch_size=None, learning_rate=1e-2)
    run = train(tmp_path, plan, first_reaching=(0.01,), checkpoints=(50,))
    assert run.metrics["accuracy_train"].iloc[-1] == 1.0
    assert run.metrics["loss"].iloc[-1] < run.metrics["loss"].iloc[0] / 3
    assert {50, 150} <= set(run.checkpoints)
    assert training.accuracy(run.model, TASK, "train") == 1.0
    assert "accuracy" in run._repr_html_()
    assert run.figure().layout.title.text


def test_stop_accuracy_ends_the_stage_early(tmp_path):
    run = train(tmp_path, recipe(steps=100, stop_accuracy=0.0), evaluate_every=5)
    assert run.metrics["step"].max() == 10


def test_a_finished_run_is_returned_and_another_config_refused(tmp_path):
    first = train(tmp_path)
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert train(tmp_path).id == first.id
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(IncompatibleRun, match="another configuration"):
        train(tmp_path, seed=1)


def diverging():
    """A recipe whose loss is not finite from the second update on."""
    start = float(Transformer(MODEL).W_E.detach().abs().sum())

    @dataclasses.dataclass(frozen=True)
    class Bad(type(objectives.get("answer"))):
        def loss(self, model, task, batch, *, generator):
            found = super().loss(model, task, batch, generator=generator)
            bad = float(model.W_E.detach().abs().sum()) != start
            return objectives.Loss(found.value * (float("nan") if bad else 1.0))

    return recipe_of(Bad())


def test_divergence_names_step_and_checkpoint(tmp_path):
    with pytest.raises(Diverged, match=r"step 2: .*last good checkpoint: .*step-000001\.safetensors"):
        train(tmp_path, diverging(), checkpoints=(1,))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "diverged"


@pytest.mark.parametrize("damage", ["truncate", "flip", "append", "remove"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    run = train(tmp_path)
    file = run.checkpoints[max(run.checkpoints)]
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[-9] ^= 1 if damage == "flip" else 0
        file.write_bytes({"truncate": data[:-5], "flip": data, "append": data + b"x"}[damage])
    with pytest.raises(CorruptRun, match="step-"):
        _ = Run.load(tmp_path).model


def test_other_versions_and_unknown_folders_are_refused(tmp_path):
    train(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(IncompatibleRun, match="format 99"):
        Run.load(tmp_path)
    with pytest.raises(BadInput, match="not a run"):
        Run.load(tmp_path / "nothing")


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another"):
        train(tmp_path / "file" / "run")


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="free some space"):
        train(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_bad_input(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'answer'"):
        training.train(TASK, "anwser", out=tmp_path, progress=False)
    digits = tasks.get("digit-addition", digits=1, block=0.2)
    with pytest.raises(BadInput, match="one token"):
        training.train(digits, "value", out=tmp_path, progress=False)
    with pytest.raises(BadInput, match="d_vocab"):
        training.train(TASK, "answer", out=tmp_path, model=ModelConfig(d_vocab=3, n_ctx=3), progress=False)
    with pytest.raises(BadInput, match="n_ctx"):
        training.train(TASK, "answer", out=tmp_path, model=ModelConfig(d_vocab=8, n_ctx=2), progress=False)
    few = ModelConfig(d_vocab=8, n_ctx=3, d_vocab_out=6)
    with pytest.raises(BadInput, match="d_vocab_out = 6, but completions of 'modular-addition' go up to token 6"):
        training.train(TASK, "answer", out=tmp_path, model=few, progress=False)
    training.check_fits(TASK, dataclasses.replace(few, d_vocab_out=7))


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_defaults_fit_every_task(name):
    task = tasks.get(name)
    config = training.default_model(task)
    assert (config.d_vocab, config.n_ctx) == (task.d_vocab, task.n_ctx)
    training.default_recipe(task, objectives.get("answer")).check(task)


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_are_not_finite_are_no_end_and_no_checkpoint(tmp_path, steps):
    plan = recipe(steps=steps, learning_rate=1e37, warmup=0, weight_decay=1e10, cooldown=0.0)
    with pytest.raises(
        Diverged, match=r"diverged at step 1: .* is not finite after the update.*no checkpoint was kept"
    ):
        train(tmp_path, plan, checkpoints=(1,))
    assert not list((tmp_path / "checkpoints").iterdir())
    assert "diverged at step 1" in Run.load(tmp_path)._repr_html_()
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "diverged"


def test_a_state_that_was_altered_is_not_gone_on_from(tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inner, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, save_every=0.0)
    monkeypatch.undo()
    state = tmp_path / STATE
    data = bytearray(state.read_bytes())
    data[-100] ^= 1
    state.write_bytes(bytes(data))
    with pytest.raises(CorruptRun, match="was altered: delete it and train again"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize("line", [b"{\n", b"[1]\n", b'{"step": 3}\n'])
def test_a_damaged_log_is_not_gone_on_from(tmp_path, line):
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path, after=9, save_every=-1.0)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(line + log.read_bytes())
    with pytest.raises(CorruptRun, match=r"is damaged|is not valid JSON"):
        train(tmp_path, resume=True)


def test_checkpoints_that_a_finished_run_lacks_are_not_passed_over(tmp_path):
    run = train(tmp_path, checkpoints=(5,))
    assert 5 in run.checkpoints
    assert train(tmp_path, checkpoints=(5,)).id == run.id
    with pytest.raises(IncompatibleRun, match="kept no checkpoint of step 7"):
        train(tmp_path, checkpoints=(7,))
    with pytest.raises(BadInput, match="checkpoints = 999: expected 1 to 12"):
        train(tmp_path / "other", checkpoints=(999,))


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_seeds_have_a_range(tmp_path, seed):
    with pytest.raises(BadInput, match="seed = "):
        train(tmp_path, seed=seed)


@pytest.mark.parametrize("files", ["{}", "[]", '{"config.json": {}}', '{"config.json": 3}'])
def test_a_manifest_without_its_files_is_named(tmp_path, files):
    train(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"files": json.loads(files)}))
    with pytest.raises(CorruptRun, match="does not list the run's files"):
        Run.load(tmp_path)


@pytest.mark.parametrize("facts", [{"size": 3}, {"sha256": "0" * 64}, {"size": "3", "sha256": "0" * 64}, {}])
def test_a_manifest_has_size_and_hash_of_every_file(tmp_path, facts):
    train(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (checkpoint,) = [name for name in manifest["files"] if name.startswith("checkpoints/")]
    manifest["files"][checkpoint] = facts
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptRun, match=r"with size and sha256 \(checkpoints/step-000012.safetensors\)"):
        Run.load(tmp_path)


def test_a_finished_run_has_a_checkpoint_and_a_known_end(tmp_path):
    train(tmp_path)
    whole = json.loads((tmp_path / "manifest.json").read_text())
    files = {name: entry for name, entry in whole["files"].items() if not name.startswith("checkpoints/")}
    (tmp_path / "manifest.json").write_text(json.dumps(whole | {"files": files}))
    with pytest.raises(CorruptRun, match="lists no checkpoint"):
        Run.load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(whole | {"status": "dnoe"}))
    with pytest.raises(CorruptRun, match="status 'dnoe': expected 'done' or 'diverged'"):
        Run.load(tmp_path)
    wrong = whole["files"] | {"checkpoints/last.safetensors": whole["files"]["config.json"]}
    (tmp_path / "manifest.json").write_text(json.dumps(whole | {"files": wrong}))
    with pytest.raises(CorruptRun, match="does not list the run's files"):
        Run.load(tmp_path)


@pytest.mark.parametrize(
    ("kept", "left"), [((1,), "its last good checkpoint is of step 1"), ((), "it kept none")], ids=["one", "none"]
)
def test_a_run_that_diverged_has_no_model_but_its_checkpoints(tmp_path, kept, left):
    with pytest.raises(Diverged):
        train(tmp_path, diverging(), checkpoints=kept)
    run = Run.load(tmp_path)
    with pytest.raises(Diverged, match=rf"diverged at step 2 \({left}\): change its recipe or seed"):
        _ = run.model
    with pytest.raises(Diverged, match=rf"diverged at step 2 \({left}\)"):
        train(tmp_path, diverging(), checkpoints=kept)
    assert sorted(run.checkpoints) == list(kept)
    for step in kept:
        assert equal(run.checkpoint(step).state_dict(), load(run.checkpoints[step]).state_dict())
    assert "diverged" in run._repr_html_()


@dataclasses.dataclass(frozen=True)
class Doubled:
    """An objective that stands in no table."""

    name: ClassVar[str] = "doubled"
    factor: float = 2.0

    def check(self, task):
        pass

    def loss(self, model, task, batch, *, generator):
        found = objectives.get("answer").loss(model, task, batch, generator=generator)
        return objectives.Loss(self.factor * found.value)


@dataclasses.dataclass(frozen=True)
class OwnTask(type(TASK)):
    """A task that stands in no table."""

    name: ClassVar[str] = "own-task"


def test_what_stands_in_no_table_is_trained_all_the_same(tmp_path, monkeypatch):
    own = OwnTask(p=7, block=2, train_fraction=0.7)

    def begin():
        return training.train(own, recipe_of(Doubled(3)), out=tmp_path, model=MODEL, progress=False)

    first = begin()
    assert (first.task, first.recipe.stages[0].objective) == (own, Doubled(3.0))
    assert first.metrics["step"].max() == 12
    assert equal(weights(begin()), weights(first))
    with pytest.raises(IncompatibleRun, match=r"config\.json: unknown name .* must stand in TASKS or OBJECTIVES"):
        Run.load(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "own-task", OwnTask)
    monkeypatch.setitem(objectives.OBJECTIVES, "doubled", Doubled)
    loaded = Run.load(tmp_path)
    assert (loaded.config, loaded.manifest) == (first.config, first.manifest)


def test_the_contributed_objective_trains_without_a_line_in_the_table(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Smoothed" in code]
    names = {"__name__": "contributed", "cx": circuits, "task": TASK}
    exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    (call,) = re.findall(r"`(cx\.train\(task, Smoothed\(.*?)` without", text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inner, "default_recipe", lambda task, objective: recipe_of(objective))  # 12 steps, not 500
    run = eval(call, names)
    assert run.recipe.stages[0].objective == names["Smoothed"](0.05)
    assert run.path == Path("runs/smoothed")
    assert run.metrics["loss"].iloc[-1] < run.metrics["loss"].iloc[0]


def test_a_start_without_resume_does_not_throw_a_stopped_run_away(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path, after=9, save_every=-1.0)
    kept = (tmp_path / STATE).read_bytes()
    with pytest.raises(BadInput, match="go on with resume"):
        train(tmp_path)
    assert (tmp_path / STATE).read_bytes() == kept
    # where no state was kept yet nothing is lost
    (tmp_path / STATE).unlink()
    assert train(tmp_path).metrics["step"].iloc[-1] == 12


def test_a_state_without_its_config_is_not_gone_on_from(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "cut", after=9, save_every=-1.0)
    (tmp_path / "cut" / "config.json").unlink()
    other = train(tmp_path / "cut", seed=1, resume=True)
    assert equal(weights(other), weights(train(tmp_path / "whole", seed=1)))


def test_a_start_that_is_refused_leaves_the_folder_free(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # as where memory is short
        patch.setattr(inner, "Transformer", refuse)
        with pytest.raises(MemoryError):
            train(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert train(tmp_path / "model", seed=1).seed == 1
    narrow = dataclasses.replace(MODEL, d_vocab_out=TASK.d_vocab - 1)
    with pytest.raises(BadInput, match="leave d_vocab_out at d_vocab"):
        training.train(TASK, recipe("next-token"), out=tmp_path / "update", model=narrow, progress=False)
    assert train(tmp_path / "update", recipe("next-token")).task == TASK


def test_a_refusal_after_the_first_update_keeps_what_was_done(tmp_path, monkeypatch):
    def full(network, path):
        raise StorageError("full")

    with monkeypatch.context() as patch:
        patch.setattr(inner, "save", full)
        with pytest.raises(StorageError):
            train(tmp_path, checkpoints=(3,))
    with pytest.raises(IncompatibleRun, match="another configuration"):
        train(tmp_path, seed=1)


def test_a_name_that_is_too_long_is_one_typed_error(tmp_path):
    for use in (train, Run.load):
        with pytest.raises(StorageError, match="File name too long: choose another directory"):
            use(tmp_path / ("x" * 300))


def test_with_a_stop_accuracy_the_evaluations_decide_the_end(tmp_path):
    plan = recipe(steps=30, stop_accuracy=0.0)
    often = train(tmp_path / "often", plan, evaluate_every=2)
    seldom = train(tmp_path / "seldom", plan, evaluate_every=9)
    assert often.id == seldom.id
    assert [max(run.checkpoints) for run in (often, seldom)] == [4, 18]
    plain = [train(tmp_path / str(every), evaluate_every=every) for every in (2, 9)]
    assert equal(weights(plain[0]), weights(plain[1]))
