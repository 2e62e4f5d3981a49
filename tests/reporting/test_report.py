"""Reports are self-contained pages with a run's metrics and figures, including those of an experiment's optional functions."""

import base64
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from command_line import strict

import research
from research.cli import run
from research.cli.experiment import Experiment
from research.cli.options import Options
from research.reporting import comparison, record, report
from research.training import checkpoint
from research.training.logs import LogEntry

pytestmark = pytest.mark.slow


def write_run(directory: Path, config: dict[str, Any], metrics: dict[str, float], experiment: str = "toy") -> record.Run:
    """Writes the files of a finished run."""
    run, _ = record.open_run(directory, experiment, config)
    directory.mkdir(parents=True)
    record.start(run, {})
    for step in (1, 2, 3):
        for split in ("train", "val"):
            prefix = "" if split == "train" else "val_"
            names = [name for name in metrics if not name.startswith("val_") and prefix + name in metrics]
            record.append_entry(run, LogEntry(step, 0, split, {name: metrics[prefix + name] for name in names}))
    record.write_summary(run, {"status": "finished", "steps": 3, "metrics": metrics})
    return run


class Page(HTMLParser):
    """Parses a page: its tables as rows of cells, bold text, links and sources, and tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.bold: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if "b" in self.open:
            self.bold.append(data)


def report_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "research", "report", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, check=False)


def test_a_comparison_shows_the_options_that_differ_and_the_best_values_in_bold(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / "toy" / "a", {"rate": 0.1, "size": 3}, {"loss": 0.5, "val_loss": 0.7, "val_accuracy": 0.8, "odd": 1.0}
        ),
        write_run(
            tmp_path / "toy" / "b", {"rate": 0.2, "size": 3}, {"loss": 0.5, "val_loss": 0.6, "val_accuracy": 0.7, "odd": 2.0}
        ),
        write_run(tmp_path / "toy" / "c", {"rate": 0.2, "size": 3, "new": None}, {"loss": 0.9, "val_loss": float("nan")}),
    ]
    page = Page(comparison.write_comparison(runs, tmp_path / "all.html"))
    results, options, facts = page.tables
    assert results == [
        ["", "loss ↓", "odd", "val_loss ↓", "val_accuracy ↑"],
        ["a", "0.5", "1", "0.7", "0.8"],
        ["b", "0.5", "2", "0.6", "0.7"],
        ["c", "0.9", "", "", ""],
    ]
    assert page.bold == ["0.5", "0.8", "0.5", "0.6"]
    assert options == [["", "rate"], ["a", "0.1"], ["b", "0.2"], ["c", "0.2"]]
    assert [row[1] for row in facts] == ["status", *["finished"] * 3]


def test_runs_in_directories_of_the_same_name_get_distinct_labels(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / part, {}, {"loss": 1.0}, experiment) for part, experiment in (("x/1", "gan"), ("y/1", "vae"))]
    report.write_report(runs[0])
    page = Page(comparison.write_comparison(runs, tmp_path / "pages" / "all.html"))
    assert page.tables[1] == [["", "experiment"], ["x/1", "gan"], ["y/1", "vae"]]
    assert "../x/1/report.html" in page.sources  # the one that has a report


def test_pages_need_no_other_files_and_escape_html(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"note": "<script>alert(1)</script> & more"}, {"loss": 0.5, "<b>": 1.0})
    other = write_run(tmp_path / "<i>other", {"note": ""}, {"loss": 0.5})
    for path in (report.write_report(run), comparison.write_comparison([run, other], tmp_path / "all.html")):
        page = Page(path)
        assert "script" not in page.tags
        assert any("<script>alert(1)</script> & more" in cell for table in page.tables for row in table for cell in row)
        assert all(source.startswith("data:image/png;base64,") or (path.parent / source).exists() for source in page.sources)
        assert not re.search(r"https?:|url\(|@import", path.read_text())


def test_a_comparison_keeps_the_metrics_of_each_split_together(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, {}, {"loss": 0.5, "odd": 1.0, "val_loss": 0.25}) for name in ("a", "b")]
    for each in runs:
        record.append_entry(each, LogEntry(3, 0, "val_long", {"accuracy": 0.5, "loss": 0.75}))
        metrics = {"val_long_accuracy": 0.5, "val_loss": 0.25, "val_long_loss": 0.75, "odd": 1.0, "loss": 0.5}
        record.write_summary(each, {"status": "finished", "steps": 3, "metrics": metrics})
    titles = Page(comparison.write_comparison(runs, tmp_path / "all.html")).tables[0][0]
    assert titles == ["", "loss ↓", "odd", "val_loss ↓", "val_long_loss ↓", "val_long_accuracy ↑"]


def test_the_report_lists_the_checkpoints_that_are_left(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, {"loss": 0.25, "accuracy": 0.75, "val_loss": 0.5})
    assert "Checkpoints" not in report.write_report(run).read_text()
    for step in (2, 3, 1234):
        checkpoint.save(run.checkpoints, step, {"w": np.ones(1000, np.float32)}, {"w": "weight"}, keep=3)
    (run.checkpoints / "000001234" / "manifest.json").write_text("{}")
    (table,) = [table for table in Page(report.write_report(run)).tables if table and "written" in table[0]]
    assert table[0] == ["", "written", "size", "loss", "val_loss"]
    assert [[row[0], *row[3:]] for row in table[1:]] == [["2", "0.25", "0.5"], ["3", "0.25", "0.5"], ["1,234", "", ""]]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", table[1][1])
    assert re.fullmatch(r"0\.0\d MB", table[1][2])
    assert table[3][1:3] == ["", "damaged: its manifest.json has the wrong checksum"]


@pytest.mark.parametrize("status", [None, "stopped", "failed"])
def test_the_report_of_an_unfinished_run_shows_the_command_to_resume_it(status: str | None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, {"loss": 0.25, "val_loss": 0.5})
    if status is None:
        (run.directory / "summary.json").unlink()
    else:
        record.write_summary(run, {"status": status, "steps": 3, "metrics": {"loss": 0.25, "val_loss": 0.5}})
    path = report.write_report(run)
    assert Page(path).tables[0] == [["", "train", "val", "test"], ["loss", "0.25", "0.5", ""]]
    assert f"just resume {run.directory}" in path.read_text()
    assert (status or "not finished") in path.read_text()


def test_a_report_shows_the_figures_of_the_last_epochs_in_order(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    run = write_run(tmp_path / "run", {}, {"loss": 0.5})
    for epoch in range(1, 13):
        record.save_figures(run, {"faces": Figure((1, 1)), "faces-2": Figure((2, 1))}, epoch=epoch)
    record.save_figures(run, {"curves": Figure((1, 1)), "mistakes": Figure((1, 1))})
    images = dict(re.findall('img alt="(.*?)" src="data:image/png;base64,(.*?)"', report.write_report(run).read_text()))
    expected = {f"{name}, epoch {epoch}": f"{name}-{epoch:04d}" for name in ("faces", "faces-2") for epoch in range(5, 13)}
    assert list(images) == ["curves", "mistakes", *expected]
    for name, file in expected.items():
        assert base64.b64decode(images[name]) == (run.directory / "plots" / "epochs" / f"{file}.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "direction"),
    [("loss", -1), ("val_mse", -1), ("test_accuracy", 1), ("top_k_categorical_accuracy", 1), ("binary_crossentropy", -1)]
    + [("auc", 1), ("episode_return", 1), ("fid", -1), ("bits_per_character", -1), ("gradient_norm", 0), ("learning_rate", 0)],
)
def test_the_direction_of_a_metric_follows_from_its_name_or_is_unknown(name: str, direction: int) -> None:
    assert report.metric_direction(name) == direction


def test_the_command_writes_a_report_of_one_run_or_a_comparison_of_several(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "toy" / "1", {"rate": 1}, {"loss": 0.5})
    write_run(tmp_path / "runs" / "toy" / "2", {"rate": 2}, {"loss": 0.4})
    for arguments, path in (
        (["toy"], "runs/toy/2/report.html"),  # the latest
        (["runs/toy/1"], "runs/toy/1/report.html"),
        (["runs/toy/1", "runs/toy/2"], "runs/report.html"),
        (["runs/toy/1", "toy", "--output", "pages/all.html"], "pages/all.html"),
    ):
        done = report_command(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
        assert Page(tmp_path / path).tables


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "error: just report RUN [RUN ...]"),
        (["--out", "x.html"], 2, "error: just report RUN [RUN ...]"),
        (["toy", "--output"], 2, "error: just report RUN [RUN ...]"),
        (["nothing"], 1, "error: no run 'nothing': expected a run directory"),
        (["toy", "nothing"], 1, "error: no run 'nothing': expected a run directory"),
        (["broken", "toy"], 1, "error: broken/config.json: it is not JSON (Expecting "),
        (["toy", "runs/toy/1", "--output", "runs"], 1, "error: "),
        (["toy", "runs/toy/1", "--output", "/proc/none/all.html"], 1, "error: /proc/none: it can't be written"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "toy" / "1", {}, {"loss": 0.5})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"experiment": "toy"')
    done = report_command(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "runs" / "report.html").exists()


@dataclass(frozen=True)
class Config:
    """The config of the experiment below."""

    epochs: int = 3
    steps: int | None = None


def experiment(epoch_states: list[tuple[int, float]]) -> Any:
    """Returns an experiment with every optional function. `each_epoch` appends (step, validation loss) to `epoch_states`."""
    x = np.random.default_rng(0).normal(size=(12, 2)).astype("float32")

    def linear_model() -> keras.Model:
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    def build(config: Config) -> research.Learner:
        keras.utils.set_random_seed(0)
        return research.supervised(linear_model(), loss="mse", optimizer="sgd")

    def figure(*_: Any) -> dict[str, Any]:
        from matplotlib.figure import Figure

        return {"line": Figure((1, 1))}

    def each_epoch(config: Config, learner: research.Learner, state: research.State, splits: Any) -> dict[str, Any]:
        epoch_states.append((int(state.optimizer[0]), research.evaluate(learner, splits["val"], state)["loss"]))
        return figure()

    def summaries(config: Config, learner: Any, state: Any, splits: Any, writer: Any, step: int) -> None:
        from research.reporting import tensorboard

        tensorboard.write_scalars(writer, step, {"final": 1.0})

    def models(config: Config, state: research.State) -> dict[str, keras.Model]:
        copies = {"first": linear_model(), "second": linear_model()}
        for model in copies.values():
            research.write_back(state, model)
        return copies

    batches = research.from_arrays(x, x[:, :1], batch_size=4)
    return SimpleNamespace(
        Config=Config,
        build=build,
        data=lambda config: {"train": batches, "val": batches},
        models=models,
        pictures=figure,
        each_epoch=each_epoch,
        results=lambda config, learner, state, splits: {"weight_sum": float(state.trainable[0].sum())},
        summaries=summaries,
    )


@pytest.fixture
def run_toy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs an experiment in this process: (module, config, options) -> exit code."""
    monkeypatch.setattr(run, "enable_compilation_cache", lambda: None)  # other tests count the programs in the process' own
    return lambda module, config, options: run.run_experiment(Experiment("toy", module, Path(__file__)), config, options)


@pytest.mark.parametrize("steps", [None, 7])
def test_the_outputs_of_an_experiments_optional_functions_are_written_and_reported(
    steps: int | None, run_toy: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch_states: list[tuple[int, float]] = []
    directory = tmp_path / "run"
    code = run_toy(experiment(epoch_states), Config(steps=steps), Options(run_dir=directory, checkpoint_every=2))
    assert code == 0
    lines = [strict(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    evaluated = [(line["step"], line["values"]["loss"]) for line in lines if line["split"] == "val"]
    assert epoch_states == evaluated  # `each_epoch` gets the state at the end of the epoch
    assert [step for step, _ in epoch_states] == ([3, 6, 9] if steps is None else [3, 6, 7])
    assert sorted(path.name for path in (directory / "plots" / "epochs").iterdir()) == [f"line-000{i}.png" for i in (1, 2, 3)]
    assert sorted(path.stem for path in (directory / "plots").glob("*.png")) == ["curves", "first", "line", "second"]
    summary = strict((directory / "summary.json").read_text())
    (kernel, _) = keras.saving.load_model(directory / "first.keras").get_weights()
    assert summary["metrics"]["weight_sum"] == pytest.approx(float(kernel.sum()))
    assert all("weight_sum" not in line["values"] for line in lines)
    lines_printed = capsys.readouterr().out.splitlines()
    assert lines_printed[-2] == f"weight_sum {summary['metrics']['weight_sum']:.4g}"
    page = (directory / "report.html").read_text()
    names = [name for name in re.findall('img alt="(.*?)"', page) if name != "speed"]  # there if it took half a second
    assert names == ["curves", "line", *(f"line, epoch {i}" for i in (1, 2, 3)), "first", "second"]
    assert Page(directory / "report.html").tables[1] == [["weight_sum", f"{summary['metrics']['weight_sum']:.4g}"]]
    from research.reporting import tensorboard

    last = tensorboard.read_events(directory / "tensorboard" / "train")[-1]
    assert (last.step, last.summary.value[0].tag) == (steps or 9, "final")


def test_an_epochs_figures_are_written_before_the_checkpoint_that_follows_the_epoch(
    run_toy: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from research.training import checkpoint

    order: list[tuple[str, int]] = []
    save_figures, save = record.save_figures, checkpoint._save

    def record_figures(run: Any, figures: Any, epoch: int | None = None) -> Any:
        order.append(("figures", 3 * (epoch or 100)))
        return save_figures(run, figures, epoch)

    def record_checkpoint(directory: Path, step: int, *rest: Any) -> Path:
        order.append(("checkpoint", step))
        return save(directory, step, *rest)

    monkeypatch.setattr(record, "save_figures", record_figures)
    monkeypatch.setattr(checkpoint, "_save", record_checkpoint)
    run_toy(experiment([]), Config(), Options(run_dir=tmp_path / "run", checkpoint_every=3))
    # A thread writes the checkpoints, so only the order of an epoch's figures and its own checkpoint is fixed.
    assert sorted(order) == [*(("checkpoint", step) for step in (3, 6, 9)), *(("figures", step) for step in (3, 6, 9, 300))]
    assert all(order.index(("figures", step)) < order.index(("checkpoint", step)) for step in (3, 6, 9))
