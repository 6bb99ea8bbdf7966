"""A study's grid, plan, table and directory; training itself is tested where it lives."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuits import cli, study, tasks
from circuits.errors import BadInput, CorruptRun, IncompatibleRun, StorageError, UnknownName
from circuits.mechanisms import TESTS
from circuits.model import Transformer
from circuits.study import PRESETS, Study, figure_data, grid, plan, read_toml, tables

MINIMAL = """
name = "minimal"
seeds = [3]

[[recipe]]
name = "r"
stages = [{ objective = "answer" }]

[[cell]]
task = { name = "modular-addition", p = 7 }
recipes = ["r"]
stage = { steps = 5 }
"""


def test_every_preset_parses_and_plans_distinct_runs() -> None:
    for name in PRESETS:
        spec = grid.parse(read_toml(name), origin=name)
        runs = plan.plan(spec, Path("x"))
        assert spec.name == name
        assert len({run.id for run in runs}) == len(runs)
        assert all(run.why for run in runs), "a preset says why to expect what"


def test_the_quick_preset_covers_what_it_promises() -> None:
    spec = grid.parse(read_toml("arithmetic-quick"))
    by_task: dict[str, set[str]] = {}
    for cell in spec.cells:
        assert len(cell.seeds) >= 2
        by_task.setdefault(cell.task.name, set()).update(r.name for r in cell.recipes)
    assert len(by_task["modular-addition"]) >= 5
    assert len(by_task["addition"]) >= 5
    assert {cell.task.reverse for cell in spec.cells if cell.task.name == "digit-addition"} == {False, True}  # type: ignore[attr-defined]


def test_a_banded_run_differs_from_its_twin_in_the_labels_alone() -> None:
    cells = [cell for cell in grid.parse(read_toml("arithmetic-quick")).cells if "Banded" in str(cell.recipes)]
    first, second = cells
    assert (first.task, first.model, first.seeds) == (second.task, second.model, second.seeds)
    ((banded,), (twin,)) = first.recipes, second.recipes
    (a,), (b,) = banded.stages, twin.stages
    assert a.objective != b.objective
    assert type(a.objective) is type(b.objective)
    assert {f for f in vars(a.objective) if vars(a.objective)[f] != vars(b.objective)[f]} == {"share"}
    assert {f for f in vars(a) if vars(a)[f] != vars(b)[f]} == {"objective"}


def test_a_cell_fills_what_its_recipes_leave_open() -> None:
    (cell,) = grid.parse(MINIMAL).cells
    (recipe,) = cell.recipes
    assert (recipe.name, recipe.steps, cell.seeds, cell.name) == ("r", 5, (3,), "modular addition, p = 7")
    assert cell.task == tasks.get("modular-addition", p=7)


def test_model_overrides_keep_sizes_in_step() -> None:
    text = MINIMAL + "model = { d_model = 32, n_heads = 2 }\n"
    (cell,) = grid.parse(text).cells
    assert (cell.model.d_model, cell.model.d_head, cell.model.d_mlp) == (32, 16, 128)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"answer" }', '"anser" }', r"unknown objective 'anser': did you mean 'answer'"),
        ('"modular-addition"', '"modular-adition"', r"\[\[cell\]\] 1 \(line 9\).*did you mean 'modular-addition'"),
        ("p = 7", "p = 8", r"\[\[cell\]\] 1 \(line 9\): p = 8"),
        ("p = 7", "q = 7", "unknown parameter of modular-addition 'q'"),
        ("p = 7", "p = 7, block = 7", "block = 7"),
        ('recipes = ["r"]', 'recipes = ["rr"]', "unknown recipe 'rr': did you mean 'r'"),
        ('recipes = ["r"]', "recipes = []", "expected at least one of r"),
        ('recipes = ["r"]', 'recipes = [["r"]]', "unknown recipe"),
        ('recipes = ["r"]', 'recipes = [{ name = "r" }]', "unknown recipe"),
        ('recipes = ["r"]', 'recipes = ["r", "r"]', "stands twice"),
        ("recipes =", "recipies =", "unknown key 'recipies': did you mean 'recipes'"),
        ("steps = 5", "step = 5", "unknown key 'step': did you mean 'steps'"),
        ("steps = 5", 'steps = "5"', "'5' at steps: expected int"),
        ("steps = 5", "steps = -5", "steps = -5"),
        ("steps = 5 }", "steps = 5 }\nmodel = { d_mdel = 8 }", "unknown key 'd_mdel': did you mean 'd_model'"),
        ("steps = 5 }", "steps = 5 }\nmodel = { d_model = 0 }", r"\[\[cell\]\] 1 \(line 9\), model: d_model 0"),
        ("steps = 5 }", "steps = 5 }\nmodel = { n_ctx = 1 }", r"\[\[cell\]\] 1 \(line 9\), model: n_ctx = 1, but"),
        ("steps = 5 }", "steps = 5 }\nmodel = { d_vocab = 3 }", r"model: d_vocab = 3, but"),
        ("steps = 5 }", "steps = 5 }\nmodel = { d_vocab_out = 2 }", r"model: d_vocab_out = 2, but .* token 6"),
        (
            "steps = 5 }",
            "steps = 5 }\nmodel = { d_model = 8589934592 }",
            r"model: d_model 8589934592: expected at most",
        ),
        ("seeds = [3]", "seeds = [3, 3]", r"seeds = \[3, 3\]"),
        ("seeds = [3]", "seeds = [4294967296]", r"seeds = \[4294967296\]: .* from 0 to 4294967295"),
        ("seeds = [3]", "seeds = [-1]", r"seeds = \[-1\]"),
        ("seeds = [3]", "seed = [3]", "unknown key 'seed': did you mean 'seeds'"),
        ("seeds = [3]", "seeds = true", "seeds = True"),
        ("[[recipe]]", "[recipe]", r"at least one \[\[recipe\]\]"),
        ('name = "minimal"', "", "missing name"),
        ('name = "minimal"', "name = 3", "name = 3: expected a str"),
        ("stages = [{", "stages = [3, {", "stage 1: 3: expected a table"),
        ("stages = [{", "stages = [{", None),
        ("[[cell]]", "[[cell]", "not valid TOML"),
    ],
)
def test_a_wrong_study_file_is_refused_with_place_and_remedy(old: str, new: str, message: str | None) -> None:
    text = MINIMAL.replace(old, new, 1)
    if message is None:
        assert grid.parse(text).name == "minimal"
        return
    with pytest.raises(BadInput, match=message) as caught:
        grid.parse(text, origin="my.toml")
    assert str(caught.value).startswith("my.toml")


def test_objectives_that_a_task_does_not_allow_are_refused_before_anything_runs() -> None:
    text = MINIMAL.replace('"modular-addition", p = 7', '"digit-addition", digits = 1').replace('"answer"', '"value"')
    with pytest.raises(BadInput, match=r"recipe 'r', stage 1: .*one token"):
        grid.parse(text)


def test_one_heading_stands_for_one_task() -> None:
    text = MINIMAL.replace("[[cell]]", '[[cell]]\nname = "x"')
    text += text[text.index("[[cell]]") :].replace("p = 7", "p = 11")
    with pytest.raises(BadInput, match="two cells are called 'x'"):
        grid.parse(text)


def test_unknown_presets_and_unreadable_files() -> None:
    with pytest.raises(UnknownName, match="did you mean 'arithmetic-quick'"):
        read_toml("arithmetic-quik")
    with pytest.raises(BadInput, match=r"nowhere\.toml"):
        read_toml("nowhere.toml")


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_is_one_of_n(shard: str) -> None:
    with pytest.raises(BadInput, match="expected I/N"):
        plan.shard_of([], shard)


@functools.cache
def quick_runs() -> list[plan.Planned]:
    return list(plan.plan(grid.parse(read_toml("arithmetic-quick")), Path("x")))


@given(n=st.integers(1, 40))
def test_shards_cover_the_runs_without_overlap(n: int) -> None:
    runs = quick_runs()
    shards = [plan.shard_of(runs, f"{i}/{n}") for i in range(1, n + 1)]
    assert sorted(run.id for shard in shards for run in shard) == sorted(run.id for run in runs)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for shard in shards:
        assert [run.cost for run in shard] == sorted((run.cost for run in shard), reverse=True)


def example_table() -> pd.DataFrame:
    common = {"cell": "a_b 100%", "task": "addition", "recipe": "r & s", "status": "done", "accuracy_block": 0.5}
    return tables.results(
        [
            {**common, "seed": 0, "label": "algorithm", "mechanism": "fourier", "accuracy": 1.0, "run_id": "a"},
            {**common, "seed": 1, "label": "mixed", "mechanism": None, "accuracy": 0.5, "run_id": "b"},
            {**common, "seed": 2, "status": "diverged", "run_id": "c"},
            {**common, "recipe": "t", "seed": 0, "label": "mixed", "accuracy": 0.25, "run_id": "d"},
        ]
    )


def test_the_table_has_the_promised_columns_and_survives_parquet(tmp_path: Path) -> None:
    table = example_table()
    promised = {"task", "recipe", "objective", "seed", "label", "mechanism", "accuracy", "accuracy_block", "run_id"}
    assert promised | set(TESTS) <= set(table.columns)
    tables.write(table, tmp_path / "results.parquet")
    pd.testing.assert_frame_equal(tables.read(tmp_path / "results.parquet"), table)
    assert [p.name for p in tmp_path.iterdir()] == ["results.parquet"]
    (tmp_path / "results.parquet").write_bytes(b"PAR1" + b"0" * 100)
    with pytest.raises(CorruptRun, match="run the study again"):
        tables.read(tmp_path / "results.parquet")


def test_the_summary_is_over_finished_seeds() -> None:
    summary = tables.summary(example_table())
    assert summary["recipe"].tolist() == ["r & s", "t"]
    assert summary["seeds"].tolist() == [2, 1]
    assert summary["verdict"].tolist() == ["algorithm (fourier) x1, mixed x1", "mixed"]
    assert summary.loc[0, ["accuracy", "accuracy_low", "accuracy_high"]].tolist() == [0.75, 0.5, 1.0]


def test_latex_escapes_what_latex_reads() -> None:
    latex = tables.to_latex(example_table())
    assert r"a\_b 100\% & r \& s & algorithm (fourier) x1, mixed x1 & 2 & 75.0 [50.0, 100.0]" in latex
    assert latex.count(r"\\") == 3


def test_the_spectrum_of_a_wave_is_its_frequency() -> None:
    n = torch.arange(12)
    for k in range(1, 7):
        power = figure_data.power(torch.cos(2 * torch.pi * k * n / 12)[:, None])[:, 0]
        assert power.argmax() == k - 1
        # Parseval: with the mean taken out, the powers are n / 2 times the sum of squares
        assert torch.allclose(power.sum(), torch.tensor(12 / 2 * 12 / (2 if k < 6 else 1)), rtol=1e-4)


def test_neuron_maps_are_the_activations_over_the_operand_square() -> None:
    (cell,) = grid.parse(MINIMAL).cells
    model = Transformer(cell.model, seed=0)
    maps = figure_data.neuron_maps(model, cell.task, torch.tensor([2, 5]))
    assert maps.shape == (2, 7, 7)
    tokens = cell.task.encode(torch.tensor([[3, 4]])).inputs
    _, cache = model.run_with_cache(tokens, names_filter="blocks.0.mlp.hook_post")
    assert torch.allclose(maps[:, 3, 4], cache["blocks.0.mlp.hook_post"][0, -1, [2, 5]], atol=1e-6)


def test_training_curves_keep_both_ends_and_stay_small() -> None:
    metrics = pd.DataFrame({"step": range(1000), "loss": [float("nan")] + [1.0] * 999})
    curves = figure_data.training_curves(metrics)
    assert (curves["step"][0], curves["step"][-1]) == (0, 999)
    assert len(curves["step"]) <= figure_data.CURVE_POINTS + 1
    assert curves["loss"][0] is None
    assert json.loads(json.dumps(curves, allow_nan=False)) == curves


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study.run("smoke", out=tmp_path_factory.mktemp("smoke"), progress=False)


def test_a_study_trains_analyses_and_tabulates_every_run(smoke: Study) -> None:
    table = smoke.table
    assert table["status"].tolist() == ["done"] * len(smoke.plan) == ["done"] * 5
    assert table["run_id"].tolist() == [run.id for run in smoke.plan]
    assert table["label"].notna().all()
    assert table["accuracy"].between(0, 1).all()
    assert (table["steps"] == 60).all()
    for run in smoke.plan:
        assert smoke.runs[run.id].id == run.id
        analysis = smoke.analysis(run.id)
        assert analysis.verdict.label == table.set_index("run_id").loc[run.id, "label"]
        assert analysis.figures["training"]["step"][-1] == 60
        assert (
            (analysis.circuit is None) == (analysis.verdict.label == "not-learned") == (analysis.faithfulness is None)
        )
    assert smoke.analysis(smoke.plan[0].id).figures["neurons"]["maps"][0].__len__() == 7
    with pytest.raises(BadInput, match="no run 'nope'"):
        smoke.analysis("nope")


def test_running_again_does_nothing_and_gives_the_same_table(smoke: Study) -> None:
    before = {path: path.stat().st_mtime_ns for path in (smoke.path / "runs").rglob("*") if path.is_file()}
    again = study.run("smoke", out=smoke.path, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (smoke.path / "runs").rglob("*") if path.is_file()} == before
    pd.testing.assert_frame_equal(again.table, smoke.table)


def test_a_study_can_be_loaded_and_exported(smoke: Study, tmp_path: Path) -> None:
    loaded = Study.load(smoke.path)
    assert loaded.plan == smoke.plan
    exported = pd.read_csv(loaded.to_csv(tmp_path / "table.csv"))
    assert exported["run_id"].tolist() == smoke.table["run_id"].tolist()
    assert loaded.to_latex(tmp_path / "table.tex") == (tmp_path / "table.tex").read_text()
    assert "a + b mod 7" in loaded._repr_html_()
    with pytest.raises(BadInput, match=r"no study\.toml"):
        Study.load(tmp_path)


def test_shards_on_one_directory_add_up_to_the_study(smoke: Study, tmp_path: Path) -> None:
    first = study.run("smoke", out=tmp_path, shard="1/2", progress=False)
    assert first.table["status"].tolist().count("pending") == 2
    second = study.run("smoke", out=tmp_path, shard="2/2", progress=False)
    columns = [c for c in smoke.table.columns if c != "seconds"]
    pd.testing.assert_frame_equal(second.table[columns], smoke.table[columns])


def test_an_altered_analysis_is_refused_and_redone(smoke: Study, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(smoke.path, tmp_path / "copy")
    copy = Study.load(tmp_path / "copy")
    verdict = copy.plan[0].analysis / "verdict.json"
    verdict.write_text(verdict.read_text().replace("not-learned", "algorithm").replace("memorisation", "algorithm"))
    with pytest.raises(CorruptRun, match="was altered"):
        copy.analysis(copy.plan[0].id)
    with pytest.raises(CorruptRun, match="was altered"):
        copy.rebuild()
    shutil.rmtree(copy.plan[0].analysis)
    again = study.run("smoke", out=copy.path, progress=False)
    columns = [c for c in smoke.table.columns if c != "seconds"]
    pd.testing.assert_frame_equal(again.table[columns], smoke.table[columns])


def test_a_report_is_not_made_of_another_versions_analyses(smoke: Study, tmp_path: Path, capsys: Any) -> None:
    import shutil

    shutil.copytree(smoke.path, tmp_path / "copy")
    copy = Study.load(tmp_path / "copy")
    copy.check_version()
    file = copy.plan[0].analysis / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["versions"]["torch"] == torch.__version__ and "transformer-lens" in manifest["versions"]
    file.write_text(json.dumps(manifest | {"rule": "arithmetic-1"}))
    table = (copy.path / "results.parquet").read_bytes()
    assert cli.main(["report", str(copy.path)]) == 2
    assert "was written by rule 'arithmetic-1'" in capsys.readouterr().err
    assert (copy.path / "results.parquet").read_bytes() == table


def test_a_study_needs_a_directory_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another output directory"):
        study.run("smoke", out=tmp_path / "file" / "below", progress=False)


@pytest.mark.untyped
@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_workers_are_counted(workers: int, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="workers"):
        study.run("smoke", out=tmp_path, workers=workers)


def test_a_run_that_diverges_is_recorded_and_not_tried_again(tmp_path: Path) -> None:
    text = MINIMAL.replace("steps = 5", "steps = 300, learning_rate = 1e30")
    (tmp_path / "wild.toml").write_text(text)
    wild = study.run(tmp_path / "wild.toml", out=tmp_path / "out", progress=False)
    assert wild.table["status"].tolist() == ["diverged"]
    assert wild.table["label"].isna().all()
    manifest = wild.plan[0].analysis / "manifest.json"
    before = manifest.stat().st_mtime_ns
    study.run(tmp_path / "wild.toml", out=tmp_path / "out", progress=False)
    assert manifest.stat().st_mtime_ns == before


def test_another_study_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(MINIMAL)
    (tmp_path / "b.toml").write_text(MINIMAL.replace("p = 7", "p = 11"))
    (tmp_path / "more.toml").write_text(MINIMAL.replace("seeds = [3]", "seeds = [3, 4]"))
    study.run(tmp_path / "a.toml", out=tmp_path / "out", progress=False)
    with pytest.raises(IncompatibleRun, match="holds another study"):
        study.run(tmp_path / "b.toml", out=tmp_path / "out", progress=False)
    assert len(study.run(tmp_path / "more.toml", out=tmp_path / "out", progress=False).table) == 2


def test_a_damaged_run_is_made_again_and_is_the_same(smoke: Study, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(smoke.path, tmp_path / "copy")
    damaged = Study.load(tmp_path / "copy").plan[0]
    shutil.rmtree(damaged.analysis)
    checkpoint = max((damaged.path / "checkpoints").iterdir())
    checkpoint.write_bytes(checkpoint.read_bytes()[:-8])
    again = study.run("smoke", out=tmp_path / "copy", progress=False)
    columns = [c for c in smoke.table.columns if c != "seconds"]
    pd.testing.assert_frame_equal(again.table[columns], smoke.table[columns])
    assert "is deleted and made again" in damaged.log.read_text()
