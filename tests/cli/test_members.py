"""`just run NAME --population 16 --vary ...`: members of one run have the numbers of runs alone."""

import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import keras
import numpy as np
import pytest
from command_line import strict
from experiment_file import write_experiment

import research
from research.cli import export, members, resume, run
from research.cli import report as report_command
from research.cli.experiment import load_experiment
from research.cli.runs import load_run
from research.data import from_arrays, side_by_side
from research.reporting import picture, report, run_files
from research.reporting.members import rank_members
from research.training import checkpoint
from research.training.bad_steps import BadStep, LossWatch
from research.training.logs import LogEntry

CHANGES = (
    ("seed: int = 0", "seed: int = 0\n    learning_rate: Annotated[float, Interval('(0, 1e38]')] = 0.05\n    name: str = 'a'"),
    ("from dataclasses import dataclass", "from dataclasses import dataclass\nfrom typing import Annotated"),
    ("import sibling", "import sibling\nfrom research.cli.fields import Interval"),
    ('optimizer="sgd"', 'metrics=["mae"], optimizer=keras.optimizers.SGD(config.learning_rate)'),
    ('{"train": sibling.batches(config)}', '{name: sibling.batches(config) for name in ("train", "val", "test")}'),
)
RESULTS = """

def results(config, learner, state, splits):
    return {"rate_of_best": config.learning_rate, "loss_of_best": research.evaluate(learner, splits["val"], state)["loss"]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment, mine.py, and a finished run of a population of two in `many`."""
    folder = tmp_path_factory.mktemp("members")
    file = write_experiment(folder, *CHANGES, append=RESULTS)
    arguments = ["--population", "2", "--vary", "seed,learning-rate=log:0.01:0.1", "--checkpoint-every", "3"]
    assert run.main([str(file), *arguments, "--seed", "5", "--run-dir", str(folder / "many")]) == 0
    return folder


def summary(directory: Path) -> Any:
    return strict((directory / "summary.json").read_text())


@pytest.mark.slow
def test_a_population_of_two_has_the_final_metrics_and_weights_of_two_runs_alone(
    folder: Path, tmp_path: Path, capfd: Any
) -> None:
    many = summary(folder / "many")
    alone = []
    for i, rate in enumerate(("0.01", "0.1")):
        directory = tmp_path / str(i)
        arguments = ["--seed", str(5 + i), "--learning-rate", rate, "--run-dir", str(directory)]
        assert run.main([str(folder / "mine.py"), *arguments]) == 0
        alone.append(summary(directory)["metrics"])
        member = many["members"][i]
        assert (member["member"], member["values"]) == (i, {"seed": 5 + i, "learning_rate": float(rate)})
        for name in ("loss", "mae", "val_loss", "val_mae", "test_loss", "test_mae"):
            assert member["metrics"][name] == pytest.approx(alone[i][name], rel=1e-5)
        assert export.main([str(folder / "many"), "--member", str(i)]) == 0
        assert f"member {i} of 2, step 8: " in capfd.readouterr().out
        x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
        models = [keras.saving.load_model(path / "line.keras") for path in (directory, folder / "many" / "members" / str(i))]
        np.testing.assert_allclose(models[0](x), models[1](x), rtol=1e-5, atol=1e-6)
    means = {name: np.mean([each[name] for each in alone]) for name in ("loss", "val_mae", "test_loss")}
    assert {name: many["metrics"][name] for name in means} == pytest.approx(means, rel=1e-5)
    assert (many["ranked_by"], sorted(each["rank"] for each in many["members"])) == ("val_loss:min", [1, 2])
    best = min(range(2), key=lambda i: alone[i]["val_loss"])
    assert many["members"][best]["rank"] == 1
    assert many["members"][best]["metrics"]["rate_of_best"] == (0.01, 0.1)[best]
    assert many["members"][best]["metrics"]["loss_of_best"] == pytest.approx(alone[best]["val_loss"], rel=1e-5)
    lines = [strict(line) for line in (folder / "many" / "metrics.jsonl").read_text().splitlines()]
    assert all(len(line["values"]["loss_of_members"]) == 2 and isinstance(line["values"]["loss"], float) for line in lines)
    page = (folder / "many" / "report.html").read_text()
    assert f"1. member {best}</th><td>{5 + best}</td>" in page
    assert "Ranked by val_loss ↓" in page
    assert strict((folder / "many" / "config.json").read_text())["config"]["vary"] == "seed,learning-rate=log:0.01:0.1"


@pytest.mark.slow
def test_a_population_resumes_within_an_epoch_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(folder / "many", stopped)
    (stopped / "summary.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "000000008")
    assert resume.main([str(stopped)]) == 0
    assert summary(stopped)["resumed_from"] == 6
    assert summary(stopped)["members"] == summary(folder / "many")["members"]
    assert (stopped / "metrics.jsonl").read_text() == (folder / "many" / "metrics.jsonl").read_text()
    states = []
    for directory in (stopped, folder / "many"):
        recorded = load_run(str(directory))
        learner = recorded.experiment.module.build(recorded.config)
        saved = checkpoint.restore_latest(directory / "checkpoints", learner.init(), learner.names, print, recorded.origin)
        assert saved is not None
        states.append(saved.state)
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_other_members_are_another_run(folder: Path, capfd: Any) -> None:
    arguments = [str(folder / "mine.py"), "--seed", "5", "--run-dir", str(folder / "many"), "--population", "2"]
    assert run.main([*arguments, "--vary", "seed"]) == 1
    assert "its run had another config (vary was " in capfd.readouterr().err
    assert run.main(arguments[:5]) == 1
    assert "its run had another config (population was 2, now None, vary was " in capfd.readouterr().err


@pytest.mark.slow
def test_a_member_that_diverges_ranks_last_and_the_others_go_on(folder: Path, tmp_path: Path, capfd: Any) -> None:
    arguments = ["--vary", "learning_rate=1e20:0.01", "--run-dir", str(tmp_path / "run")]
    assert run.main([str(folder / "mine.py"), *arguments]) == 0
    many = summary(tmp_path / "run")
    assert (many["metrics"]["val_loss"], many["members"][0]["metrics"]["val_loss"]) == (None, None)
    assert [each["rank"] for each in many["members"]] == [2, 1]
    assert "those of member 1, the best by val_loss:min" in capfd.readouterr().out
    watch = members.watch_finite(LossWatch(steps_per_epoch=4))
    watch(1, 1, {"loss": np.float32(np.nan), "loss_of_members": np.float32([1, np.nan])}, None)
    with pytest.raises(BadStep, match="loss is nan"):
        watch(2, 2, {}, {"loss": np.float32([1, np.nan]), "loss_of_members": np.float32([[1, 1], [np.inf, np.nan]])})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--population", "0"], 2, "--population 0: expected a value in [1, "),
        (["--vary", "seed"], 2, "--vary seed: the number of members is missing; add it: --population 16."),
        (["--population", "2", "--vary", "sed"], 2, "--vary sed: there is no field 'sed': did you mean 'seed'?"),
        (["--population", "2", "--vary", "steps=1:2"], 2, "--vary steps=1:2: all members train for as many steps; "),
        (["--population", "2", "--vary", "seed,seed"], 2, "--vary seed,seed: seed is there twice; expected each field once."),
        (["--population", "2", "--vary", "learning_rate"], 2, "--vary learning_rate: it does not count up from 0.05; expected "),
        (["--population", "2", "--vary", "name=log:1:2"], 2, "--vary name=log:1:2: it is not a number; expected name=A:B:C."),
        (["--population", "2", "--vary", "seed=1:2:3"], 2, "--vary seed=1:2:3: 3 values for 2 members; expected as many"),
        (["--population", "2", "--vary", "seed=1:x"], 2, "--vary seed=1:x: expected a whole number, got 'x'."),
        (
            ["--population", "2", "--vary", "learning_rate=log:0:1"],
            2,
            "--vary learning_rate=log:0:1: expected bounds above 0, or ",
        ),
        (["--vary", "learning_rate=0.1:-1"], 2, "--vary learning_rate=0.1:-1: -1.0 is outside of (0, 1e38]."),
        (
            ["--population", "3", "--vary", "learning_rate=linear:-1:1"],
            2,
            "member 0: --learning-rate -1.0: expected a value in (0",
        ),
        (["--population", "2", "--from", "many"], 2, "--from with --population or --vary: expected one of them; "),
        (["--vary", "batch_size=4:8"], 1, "side_by_side: data set 1 has 32 examples in 4 batches of "),
        (
            ["--population", "2", "--mesh", "tensor=8"],
            1,
            "--mesh tensor=8: a population is spread by its members ",
        ),
    ],
)
def test_members_that_can_not_be_are_one_line_before_training(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    file = write_experiment(tmp_path, *CHANGES)
    monkeypatch.chdir(tmp_path)
    assert run.main([str(file), *arguments]) == code
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_members_with_other_programs_are_named_before_training(tmp_path: Path, capfd: Any) -> None:
    file = write_experiment(tmp_path, *CHANGES, ("layers.Dense(units)", "layers.Dense(units, use_bias=config.name == 'a')"))
    assert run.main([str(file), "--vary", "name=a:b", "--run-dir", str(tmp_path / "run")]) == 1
    assert "states of members 0 and 1 differ in more than numbers" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ranges_are_spaced_evenly_and_end_at_their_bounds() -> None:
    config = SimpleNamespace(population=5, vary="a=log:1e-4:0.1,b=linear:0:10,c=linear:0:3,d=1:None:2:3:4,e", e=7)
    types_of: Any = {"a": float, "b": float | None, "c": int, "d": int | None, "e": int}
    columns = {name: [each[name] for each in members.member_values(config, types_of)] for name in types_of}
    assert columns["a"] == pytest.approx([1e-4 * 1000 ** (i / 4) for i in range(5)], rel=1e-12)
    assert (columns["a"][0], columns["a"][-1], columns["b"]) == (1e-4, 0.1, [0.0, 2.5, 5.0, 7.5, 10.0])
    assert (columns["c"], columns["d"], columns["e"]) == ([0, 1, 2, 2, 3], [1, None, 2, 3, 4], [7, 8, 9, 10, 11])
    config.population, config.vary = 1, "a=log:1e-4:0.1"
    assert members.member_values(config, types_of) == [{"a": 1e-4}]


@pytest.mark.parametrize("values", ["[]", "[0.0, 1.0, -9.0]", "[1e999]"])
def test_lists_of_another_number_of_members_are_left_out(folder: Path, tmp_path: Path, values: str, capfd: Any) -> None:
    directory = shutil.copytree(folder / "many", tmp_path / "many")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    lines[1:] = [re.sub(r'_of_members": \[[^]]*\]', f'_of_members": {values}', line) for line in lines[1:]]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert report_command.main([str(directory)]) == 0
    assert export.main([str(directory)]) == 0
    assert re.search("member [01] of 2, ", capfd.readouterr().out)


def test_the_file_of_logs_holds_those_of_members_as_strict_json(tmp_path: Path) -> None:
    entry = LogEntry(3, 0, "val", {"loss": math.nan}, {"loss": [0.5, math.nan, math.inf]})
    experiment_run = report.record.Run(tmp_path, "mine", {})
    report.record.append_entry(experiment_run, entry)
    values = strict((tmp_path / "metrics.jsonl").read_text())["values"]
    assert values == {"loss": None, "loss_of_members": [0.5, None, None]}
    (read,) = run_files.read_metrics(tmp_path, print)
    assert (read.values.keys(), read.members["loss"][0]) == ({"loss"}, 0.5)
    assert np.isnan(read.members["loss"][1:]).all()
    (figure,) = [picture.plot_curves([entry, entry._replace(step=6)])]
    (axes,) = figure.axes
    assert axes.lines[-1].get_ydata().tolist() == [0.5, 0.5]  # the mean of the finite ones
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["val"]


def test_members_are_ranked_by_the_metric_of_the_validation_data() -> None:
    logs = {"loss": [0.1, 0.2, 0.3], "accuracy": [0.5, 0.9, 0.9]}
    entries = [LogEntry(1, 0, split, {}, logs) for split in ("train", "test", "long_words")]
    ranking = rank_members(entries)
    assert ranking is not None
    assert (ranking.describe(), ranking.order) == ("long_words_accuracy:max", [1, 2, 0])
    assert rank_members([]) is None


def test_data_sets_of_members_lie_on_the_device_side_by_side() -> None:
    x = np.arange(10.0, dtype=np.float32)
    one, two = from_arrays(x, batch_size=4, seed=1), from_arrays(-x, batch_size=4, seed=2)
    both = side_by_side([one, two, one])
    assert both.resident is not None
    source = both.resident.source().x
    assert len(source) == 20
    for step in (0, 2, 5):  # the third batch of an epoch is shorter
        np.testing.assert_array_equal(source[both.resident.rows(step, 1)], both.batch(step).x)
    for start, steps in ((0, 3), (3, 2)):
        rows = [both.resident.rows(start + i, 1) for i in range(steps)]
        np.testing.assert_array_equal(both.resident.rows(start, steps), np.concatenate(rows))


def test_norms_of_a_population_are_those_of_its_members() -> None:
    def build(seed: int) -> research.Learner:
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        return research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(0.1))

    def norms_of(learner: research.Learner) -> dict[str, jax.Array]:
        return jax.jit(research.transforms.observe(learner, research.norms))(learner.init(), batch)

    batch = research.Batch(np.ones((8, 4), np.float32), np.ones((8, 1), np.float32))
    logs = norms_of(research.transforms.population(build, 2, example=batch))
    for i in range(2):
        for name, value in norms_of(build(i)).items():
            np.testing.assert_allclose(logs[f"{name}_of_members"][i], value, rtol=1e-5)
    np.testing.assert_allclose(logs["gradient_norm"], logs["gradient_norm_of_members"].mean(), rtol=1e-6)


def test_an_experiment_is_loaded_as_it_is_without_members(tmp_path: Path) -> None:
    experiment = load_experiment(str(write_experiment(tmp_path, *CHANGES)))
    many = members.as_population(experiment)
    config = members.population_config(many, experiment.module.Config(seed=3), 2, None)
    assert (config.population, config.vary, config.seed) == (2, "seed", 3)
    assert [each.seed for each in members.member_configs(experiment, config)] == [3, 4]
