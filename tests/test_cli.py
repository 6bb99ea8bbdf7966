"""The command line: what it prints, and one line with exit code 2 for everything that a user can get wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits import _commands, cli, discovery, mechanisms, objectives, tasks, worldmodels
from circuits.model import load, save
from circuits.runs import Run
from circuits.study import PRESETS, Study
from circuits.study.grid import single
from circuits.study.study import Failure
from circuits.training import default_model, default_recipe

LONG = "x" * 300
TINY = ["-p", "p=7", "block=2", "-s", "steps=20", "-m", "d_model=16", "n_heads=2"]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What the command says on standard error, which must be one line with exit code 2."""
    assert cli.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("circuits: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert cli.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", "modular-addition", "answer", "--out", str(out), "--seed", "1", *TINY]) == 0
    return out


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_train_makes_the_run_that_it_was_asked_for(trained: Path) -> None:
    run = Run.load(trained)
    assert run.task == tasks.get("modular-addition", p=7, block=2)
    assert run.config.seed == 1
    assert run.config.recipe.steps == 20
    assert run.config.model.d_model == 16


@pytest.mark.parametrize("name", tasks.TASKS)
def test_train_takes_what_the_library_takes_for_an_objective_alone(name: str) -> None:
    empty: dict[str, Any] = {"stage": {}, "model": {}}
    task, recipe, model = single({"task": {"name": name}, "objective": {"name": "answer"}, **empty}, where="here")
    assert recipe == default_recipe(task, objectives.get("answer"))
    assert model == default_model(task)


def test_explain_and_discover_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = json.loads(output_of(capsys, "explain", trained, "--json", "--out", tmp_path))
    assert verdict["label"] in mechanisms.LABELS
    assert mechanisms.Verdict.load(tmp_path).label == verdict["label"]
    quick = output_of(capsys, "explain", trained, "--budget", "quick")
    assert quick.startswith(verdict["label"]) and "seconds" in quick and "quick budget: " in quick
    assert f"rule {mechanisms.VERSION}: learned_train=0.95 generalises=0.95" in quick
    found = json.loads(output_of(capsys, "discover", trained, "--pairs", "8", "--top", "3", "--json"))
    assert len(found["edges"]) == 3
    assert {"cpr", "cmd"} <= found.keys()
    assert "CPR" in output_of(capsys, "discover", trained, "--pairs", "8", "--method", "eap", "--out", tmp_path / "c")
    assert discovery.Circuit.load(tmp_path / "c").method == "eap"


def test_list_names_everything_with_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(output_of(capsys, "list", "--json"))
    assert {"tasks", "games", "objectives", "methods", "tests", "probes", "presets", "trained"} <= listed.keys()
    assert listed["probes"].keys() == worldmodels.PROBES.keys()
    assert listed["tasks"].keys() == tasks.TASKS.keys()
    assert listed["objectives"].keys() == objectives.OBJECTIVES.keys()
    assert listed["methods"].keys() == discovery.METHODS.keys()
    assert listed["tests"].keys() == mechanisms.TESTS.keys()
    assert listed["presets"].keys() == PRESETS.keys()
    assert all(line for entries in listed.values() for line in entries.values())
    assert "arithmetic-quick" in output_of(capsys, "list", "presets")


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stdy"], "unknown command 'stdy': did you mean 'study'"),
        (["list", "taks"], "unknown kind 'taks': did you mean 'tasks'"),
        (["study", "arithmetic-quik", "--out", "x"], "did you mean 'arithmetic-quick'"),
        (["study", "nowhere.toml", "--out", "x"], "nowhere.toml"),
        (["study", "smoke", "--out", "x", "--shard", "3/2"], "shard = '3/2'"),
        (["study", "smoke", "--out", "x", "--workers", "0"], "workers = 0"),
        (["train", "modular-adition", "answer", "--out", "x"], "did you mean 'modular-addition'"),
        (["train", "addition", "anwser", "--out", "x"], "unknown objective 'anwser': did you mean 'answer'"),
        (["train", "addition", "answer", "--out", "x", "-p", "m=3"], "unknown parameter of addition 'm'"),
        (["train", "addition", "reinforce", "--out", "x", "-o", "rewrd=exact"], "did you mean 'reward'"),
        (["train", "addition", "reinforce", "--out", "x", "-o", "reward=exakt"], "did you mean 'exact'"),
        (["train", "addition", "answer", "--out", "x", "-s", "stps=3"], "unknown key 'stps': did you mean 'steps'"),
        (["train", "addition", "answer", "--out", "x", "-m", "d_modl=3"], "unknown key 'd_modl'"),
        (["train", "addition", "answer", "--out", "x", "-p", "n"], "expected KEY=VALUE"),
        (["train", "addition", "answer", "--out", "x", "-p", "n=3", "n=4"], "n is given twice"),
        (["train", "addition", "answer", "--out", "x", "-p", "operation=3"], "unknown operation 3: known: +, -"),
        (["train", "addition", "answer", "--out", "x", "-p", "name=digit-addition"], "given by TASK, addition"),
        (["train", "addition", "answer", "--out", "x", "-o", "name=value"], "given by OBJECTIVE, answer: leave name"),
        (
            ["train", "addition", "answer", "--out", "x", "-s", "objective=value"],
            "'objective=value': objective is given",
        ),
        (["train", "addition", "answer", "--out", "x", "--checkpoints", "9999"], "checkpoints = 9999: expected 1 to"),
        (["train", "addition", "answer", "--out", "x", "--seed", "-1"], "seed = -1"),
        (["train", "addition", "answer", "--out", "x", "-m", "n_ctx=1"], "n_ctx = 1"),
        (["train", "addition", "answer", "--out", "x", "-m", "d_model=100000000000000000000"], "expected at most"),
        (
            ["train", "addition", "answer", "--out", "x", "-m", "n_layers=1000", "d_model=100000"],
            "choose smaller sizes",
        ),
        (["train", "modular-addition", "answer", "--out", "x", "-p", "p=54"], "p = 54"),
        (["train", "modular-addition", "answer", "--out", "x", "-p", "p=seven"], "p = 'seven'"),
        (["train", "addition", "answer", "--out", "x", "-p", "n=301"], "n = 301"),
        (["train", "modular-addition", "answer", "--out", "x", "-p", "p=7", "block=8"], "block = 8"),
        (["train", "digit-addition", "value", "--out", "x"], "one token"),
        (["explain", "nowhere"], "nowhere"),
        (["discover", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["train", "addition", "answer", "--out", LONG], "File name too long: choose another directory"),
        (["study", "smoke", "--out", LONG], "File name too long: choose another output directory"),
        (["explain", LONG], "File name too long: choose another directory"),
        (["discover", LONG], "File name too long: choose another directory"),
        (["report", LONG], "File name too long: choose another directory"),
        (["bench", "discovery", "--out", "x", "--seeds", "-1"], "seed = -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_names_and_values_give_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *arguments)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.untyped
def test_a_budget_that_does_not_exist(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown budget 'quik': did you mean 'quick'" in error_of(capsys, "explain", trained, "--budget", "quik")


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("explain --seed", "-1", "seed = -1: expected 0 to 4294967295"),
        ("explain --seed", str(10**23), f"seed = {10**23}: expected 0 to 4294967295"),
        ("discover --seed", "-1", "seed = -1"),
        ("discover --seed", str(10**23), f"seed = {10**23}"),
        ("discover --top", "-3", "top = -3: expected 0 to"),
        ("discover --pairs", "0", "n = 0"),
    ],
)
def test_numbers_have_their_range(
    option: str, value: str, message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, name = option.split()
    assert message in error_of(capsys, command, trained, name, value)


def test_train_keeps_the_checkpoints_that_it_was_asked_for(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), *TINY]
    assert cli.main(["train", "modular-addition", "answer", "--checkpoints", "3", "11", *out]) == 0
    assert {3, 11, 20} <= set(Run.load(tmp_path).checkpoints)


def test_a_run_that_diverged_has_nothing_to_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = ["-s", "learning_rate=1e37", "warmup=0", "weight_decay=1e10", "-m", "d_model=16"]
    train = ["train", "modular-addition", "answer", "--out", tmp_path, "-p", "p=7", *wild]
    for arguments in (train, train, ["explain", tmp_path], ["discover", tmp_path]):
        assert cli.main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("circuits: ") and "diverged at step 2" in error


def test_what_the_system_refuses_is_one_line(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Path) -> Run:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run))

    monkeypatch.setattr(Run, "load", refuse)
    assert error_of(capsys, "explain", trained) == f"circuits: {trained}: Permission denied\n"


@pytest.fixture
def small_study(tmp_path: Path) -> list[str]:
    """A command that trains two networks for five steps."""
    (tmp_path / "small.toml").write_text(
        'name = "small"\nseeds = [0, 1]\n[[recipe]]\nname = "r"\nstages = [{ objective = "answer", steps = 5 }]\n'
        '[[cell]]\ntask = { name = "modular-addition", p = 7 }\nrecipes = ["r"]\nmodel = { d_model = 8 }\n'
    )
    return ["study", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out")]


def test_a_study_whose_runs_are_all_refused_is_bad_input(
    small_study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(output_of(capsys, *small_study, "--json"))["runs"][0]["status"] == "done"
    told = json.loads(output_of(capsys, "report", tmp_path / "out", "--json"))
    assert Path(told["report"]).read_text()
    assert [(row["recipe"], row["seeds"]) for row in told["summary"]] == [("r", 2)]
    manifests = sorted((tmp_path / "out").glob("runs/*/manifest.json"))
    for manifest in manifests:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
        (manifest.parent / "analysis" / "manifest.json").unlink()
    assert cli.main(small_study) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("circuits: 2 of 2 runs failed, ")
    assert "was written in run format 99" in last
    assert {failure.refused for failure in Study.load(tmp_path / "out").failures.values()} == {True}


def test_a_study_with_a_run_that_broke_says_where_to_look(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    failures = {"a": Failure("first line\nsecond", True), "b": Failure("its process died", False)}
    assert _commands._say_failures({}, 3, tmp_path) == 0
    assert _commands._say_failures({"a": failures["a"]}, 3, tmp_path) == 2
    assert capsys.readouterr().err == "circuits: 1 of 3 runs failed, a because first line second\n"
    assert _commands._say_failures(failures, 3, tmp_path) == 1
    assert capsys.readouterr().err.startswith(f"circuits: 2 of 3 runs failed (a, b): see {tmp_path}; ")


def test_a_method_that_does_not_exist(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'eap'" in error_of(capsys, "discover", trained, "--method", "eapp")


def checkpoint(run: Path) -> Path:
    return sorted(run.glob("checkpoints/*.safetensors"))[-1]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "nan"])
def test_a_damaged_checkpoint_is_refused(damage: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(copy)
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-5] ^= 4
        path.write_bytes(data)
    elif damage == "remove":
        path.unlink()
    else:
        # the hashes of a NaN model that somebody saved are right: its values give it away
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
        tensors = load_file(path)
        tensors["embed.W_E"][0, 0] = torch.nan
        save_file(tensors, path, metadata)
    for command in ("explain", "discover"):
        assert str(path.name) in error_of(capsys, command, copy)


def test_a_nan_in_a_model_with_right_hashes_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(copy)
    before = path.read_bytes()
    model = load(path)
    with torch.no_grad():
        model.embed.W_E[0, 0] = torch.nan
    after = save(model, path)
    manifest = copy / "manifest.json"
    text = manifest.read_text().replace(hashlib.sha256(before).hexdigest(), after)
    manifest.write_text(text.replace(str(len(before)), str(path.stat().st_size)))
    assert "NaN" in error_of(capsys, "explain", copy)


def test_a_run_of_another_version_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = copy / "manifest.json"
    data = json.loads(manifest.read_text())
    (key,) = [name for name in data if name in ("format", "schema", "version")]
    manifest.write_text(json.dumps({**data, key: 99}))
    assert "99" in error_of(capsys, "explain", copy)


def test_an_unfinished_run_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "manifest.json").unlink()
    assert "resume" in error_of(capsys, "explain", copy)


@pytest.mark.parametrize("command", [["study", "smoke"], ["train", "modular-addition", "answer", *TINY]], ids=str)
def test_an_output_directory_that_cannot_be_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "choose another output directory" in error_of(capsys, *command, "--out", tmp_path / "file" / "x")


def test_a_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, flags: int = 0) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "run"
    message = error_of(capsys, "train", "modular-addition", "answer", "--out", out, *TINY)
    assert "No space left" in message
    assert "free some space" in message


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, summary in cli.COMMANDS.items():
        assert f"{name} {summary}" in text
        function = getattr(_commands, "list_names" if name == "list" else name)
        assert function.__doc__.splitlines()[0] == summary


@pytest.mark.parametrize("arguments", [["study", "--help"], ["train", "--help"]], ids=" ".join)
def test_help_says_what_there_is(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert not end.value.code
    assert "usage: circuits" in capsys.readouterr().out


def test_help_answers_in_half_a_second() -> None:
    # of processor time: the clock on the wall says what else the machine is doing
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "circuits.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["study", "smoke"], "--out"),
        (["study", "smoke", "--outt", "x"], "--outt"),
        (["train", "modular-addition", "answer", "--out", "x", "--seed", "many"], "'many'"),
        (["list", "tasks", "too-much"], "too-much"),
        ([], "study"),
    ],
    ids=["missing", "unknown", "no number", "one too many", "none"],
)
def test_wrong_arguments_are_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("circuits: ") and message.count("\n") == 1
    assert named in message and "--help" in message


def test_ctrl_c_stops_a_study_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "circuits.cli", "study", "smoke", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # where the tests run in the background, SIGINT is ignored, and processes inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/config.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the study, its server and its workers alike
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "circuits: interrupted: the same command goes on where it stopped" in err


def test_the_other_distribution_of_this_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "circuits-3.2.5.dist-info").mkdir()
    process = subprocess.run(
        [sys.executable, "-c", "import circuits"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert "circuits-3.2.5" in process.stderr
    assert "pip uninstall circuits" in process.stderr
