"""Pages about runs: whole in themselves, true to the files, best in bold; and what an experiment's optional functions leave."""

import base64
import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from test_run import ROOT, strict

import research
from research import record, report
from research.loop import Entry

pytestmark = pytest.mark.slow


def written(directory: Path, config: dict[str, Any], metrics: dict[str, float], experiment: str = "toy") -> record.Run:
    """A run as a finished one leaves it."""
    run, _ = record.open_run(directory, experiment, config)
    directory.mkdir(parents=True)
    record.begin(run, {})
    for step in (1, 2, 3):
        for split in ("train", "val"):
            prefix = "" if split == "train" else "val_"
            names = [name for name in metrics if not name.startswith("val_") and prefix + name in metrics]
            record.append(run, Entry(step, 0, split, {name: metrics[prefix + name] for name in names}))
    record.summarise(run, {"status": "finished", "steps": 3, "metrics": metrics})
    return run


class Page(HTMLParser):
    """A page's tables, as rows of cells, and what it refers to."""

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


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / "report.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


def test_runs_side_by_side_show_the_options_that_differ_and_the_best_in_bold(tmp_path: Path) -> None:
    runs = [
        written(
            tmp_path / "toy" / "a", {"rate": 0.1, "size": 3}, {"loss": 0.5, "val_loss": 0.7, "val_accuracy": 0.8, "odd": 1.0}
        ),
        written(
            tmp_path / "toy" / "b", {"rate": 0.2, "size": 3}, {"loss": 0.5, "val_loss": 0.6, "val_accuracy": 0.7, "odd": 2.0}
        ),
        written(tmp_path / "toy" / "c", {"rate": 0.2, "size": 3, "new": None}, {"loss": 0.9, "val_loss": float("nan")}),
    ]
    page = Page(report.comparison(runs, tmp_path / "all.html"))
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


def test_runs_of_the_same_name_get_labels_that_tell_them_apart(tmp_path: Path) -> None:
    runs = [written(tmp_path / part, {}, {"loss": 1.0}, experiment) for part, experiment in (("x/1", "gan"), ("y/1", "vae"))]
    report.page(runs[0])
    page = Page(report.comparison(runs, tmp_path / "pages" / "all.html"))
    assert page.tables[1] == [["", "experiment"], ["x/1", "gan"], ["y/1", "vae"]]
    assert "../x/1/report.html" in page.sources  # a link to the page of the one that has one


def test_every_page_opens_offline_and_shows_text_as_text(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {"note": "<script>alert(1)</script> & more"}, {"loss": 0.5, "<b>": 1.0})
    other = written(tmp_path / "<i>other", {"note": ""}, {"loss": 0.5})
    for path in (report.page(run), report.comparison([run, other], tmp_path / "all.html")):
        page = Page(path)
        assert "script" not in page.tags
        assert any("<script>alert(1)</script> & more" in cell for table in page.tables for row in table for cell in row)
        assert all(source.startswith("data:image/png;base64,") or (path.parent / source).exists() for source in page.sources)
        assert not re.search(r"https?:|url\(|@import", path.read_text())


@pytest.mark.parametrize("status", [None, "stopped", "failed"])
def test_a_run_that_is_not_finished_has_a_page_that_tells_how_to_go_on(status: str | None, tmp_path: Path) -> None:
    run = written(tmp_path / "run", {}, {"loss": 0.25, "val_loss": 0.5})
    if status is None:
        (run.directory / "summary.json").unlink()
    else:
        record.summarise(run, {"status": status, "steps": 3, "metrics": {"loss": 0.25, "val_loss": 0.5}})
    path = report.page(run)
    assert Page(path).tables[0] == [["", "train", "val", "test"], ["loss", "0.25", "0.5", ""]]
    assert f"just resume {run.directory}" in path.read_text()
    assert (status or "not finished") in path.read_text()


def test_a_page_shows_the_last_pictures_of_the_epochs_in_their_order(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    run = written(tmp_path / "run", {}, {"loss": 0.5})
    for epoch in range(1, 13):
        record.draw(run, {"faces": Figure((1, 1)), "faces-2": Figure((2, 1))}, epoch=epoch)
    record.draw(run, {"curves": Figure((1, 1)), "mistakes": Figure((1, 1))})
    shown = dict(re.findall('img alt="(.*?)" src="data:image/png;base64,(.*?)"', report.page(run).read_text()))
    wanted = {f"{name}, epoch {epoch}": f"{name}-{epoch:04d}" for name in ("faces", "faces-2") for epoch in range(5, 13)}
    assert list(shown) == ["curves", "mistakes", *wanted]
    for name, file in wanted.items():
        assert base64.b64decode(shown[name]) == (run.directory / "plots" / "epochs" / f"{file}.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "direction"),
    [("loss", -1), ("val_mse", -1), ("test_accuracy", 1), ("top_k_categorical_accuracy", 1), ("binary_crossentropy", -1)]
    + [("auc", 1), ("episode_return", 1), ("fid", -1), ("bits_per_character", -1), ("gradient_norm", 0), ("learning_rate", 0)],
)
def test_which_way_is_better_is_told_by_the_name_or_not_at_all(name: str, direction: int) -> None:
    assert report.better(name) == direction


def test_the_command_writes_one_page_or_one_for_all(tmp_path: Path) -> None:
    written(tmp_path / "runs" / "toy" / "1", {"rate": 1}, {"loss": 0.5})
    written(tmp_path / "runs" / "toy" / "2", {"rate": 2}, {"loss": 0.4})
    for arguments, path in (
        (["toy"], "runs/toy/2/report.html"),  # the latest
        (["runs/toy/1"], "runs/toy/1/report.html"),
        (["runs/toy/1", "runs/toy/2"], "runs/report.html"),
        (["runs/toy/1", "toy", "--output", "here/all.html"], "here/all.html"),
    ):
        done = command(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
        assert Page(tmp_path / path).tables


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "error: just report RUN [RUN ...]"),
        (["--out", "x.html"], 2, "error: just report RUN [RUN ...]"),
        (["toy", "--output"], 2, "error: just report RUN [RUN ...]"),
        (["nothing"], 1, "error: no run 'nothing': expected a run directory"),
        (["toy", "nothing"], 1, "error: no run 'nothing': expected a run directory"),
        (["broken", "toy"], 1, "error: broken: its files are damaged"),
        (["toy", "runs/toy/1", "--output", "runs"], 1, "error: "),
        (["toy", "runs/toy/1", "--output", "/proc/none/all.html"], 1, "error: /proc/none: it can't be written"),
    ],
)
def test_bad_input_gets_one_line(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    written(tmp_path / "runs" / "toy" / "1", {}, {"loss": 0.5})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"experiment": "toy"')
    done = command(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(said)
    assert not (tmp_path / "runs" / "report.html").exists()


@dataclass(frozen=True)
class Config:
    """Of the experiment below."""

    epochs: int = 3
    steps: int | None = None


def experiment(seen: list[tuple[int, float]]) -> Any:
    """An experiment with every optional function; `seen` gets what `each_epoch` sees."""
    x = np.random.default_rng(0).normal(size=(12, 2)).astype("float32")

    def network() -> keras.Model:
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    def build(config: Config) -> research.Learner:
        keras.utils.set_random_seed(0)
        return research.supervised(network(), loss="mse", optimizer="sgd")

    def figure(*_: Any) -> dict[str, Any]:
        from matplotlib.figure import Figure

        return {"line": Figure((1, 1))}

    def each_epoch(config: Config, learner: research.Learner, state: research.State, splits: Any) -> dict[str, Any]:
        seen.append((int(state.optimizer[0]), research.evaluate(learner, splits["val"], state)["loss"]))
        return figure()

    def summaries(config: Config, learner: Any, state: Any, splits: Any, writer: Any, step: int) -> None:
        from research import tensorboard

        tensorboard.scalars(writer, step, {"at the end": 1.0})

    def models(config: Config, state: research.State) -> dict[str, keras.Model]:
        made = {"one": network(), "other": network()}
        for model in made.values():
            research.write_back(state, model)
        return made

    held = research.arrays(x, x[:, :1], batch_size=4)
    return SimpleNamespace(
        Config=Config,
        build=build,
        data=lambda config: {"train": held, "val": held},
        models=models,
        pictures=figure,
        each_epoch=each_epoch,
        results=lambda config, learner, state, splits: {"height": float(state.trainable[0].sum())},
        summaries=summaries,
    )


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("runner", ROOT / "scripts" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "runner", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "compilation_cache", lambda: None)  # the process' own, which other tests count programs in
    return module


@pytest.mark.parametrize("steps", [None, 7])
def test_what_an_experiment_adds_is_drawn_each_epoch_and_told_at_the_end(
    steps: int | None, runner: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, float]] = []
    directory = tmp_path / "run"
    code = runner.run("toy", experiment(seen), Config(steps=steps), runner.Options(run_dir=directory, checkpoint_every=2))
    assert code == 0
    lines = [strict(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    evaluated = [(line["step"], line["values"]["loss"]) for line in lines if line["split"] == "val"]
    assert seen == evaluated  # the state of the epoch's end, as it is
    assert [step for step, _ in seen] == ([3, 6, 9] if steps is None else [3, 6, 7])
    assert sorted(path.name for path in (directory / "plots" / "epochs").iterdir()) == [f"line-000{i}.png" for i in (1, 2, 3)]
    assert sorted(path.stem for path in (directory / "plots").glob("*.png")) == ["curves", "line", "one", "other"]
    summary = strict((directory / "summary.json").read_text())
    (kernel, _) = keras.saving.load_model(directory / "one.keras").get_weights()
    assert summary["metrics"]["height"] == pytest.approx(float(kernel.sum()))
    assert all("height" not in line["values"] for line in lines)
    told = capsys.readouterr().out.splitlines()
    assert told[-2] == f"height {summary['metrics']['height']:.4g}"
    page = (directory / "report.html").read_text()
    names = re.findall('img alt="(.*?)"', page)
    assert names == ["curves", "line", *(f"line, epoch {i}" for i in (1, 2, 3)), "one", "other"]
    assert Page(directory / "report.html").tables[1] == [["height", f"{summary['metrics']['height']:.4g}"]]
    from research import tensorboard

    last = tensorboard.events(directory / "tensorboard" / "train")[-1]
    assert (last.step, last.summary.value[0].tag) == (steps or 9, "at the end")


def test_an_epochs_picture_is_on_the_disk_before_a_checkpoint_has_the_epoch_behind_it(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from research import checkpoint

    order: list[tuple[str, int]] = []
    draw, save = record.draw, checkpoint._save

    def drawing(run: Any, pictures: Any, epoch: int | None = None) -> Any:
        order.append(("draw", 3 * (epoch or 100)))
        return draw(run, pictures, epoch)

    def saving(directory: Path, step: int, *rest: Any) -> Path:
        order.append(("save", step))
        return save(directory, step, *rest)

    monkeypatch.setattr(record, "draw", drawing)
    monkeypatch.setattr(checkpoint, "_save", saving)
    runner.run("toy", experiment([]), Config(), runner.Options(run_dir=tmp_path / "run", checkpoint_every=3))
    # Checkpoints are written from a thread: what comes between a picture and its own checkpoint is of no matter.
    assert sorted(order) == [("draw", 3), ("draw", 6), ("draw", 9), ("draw", 300), ("save", 3), ("save", 6), ("save", 9)]
    assert all(order.index(("draw", step)) < order.index(("save", step)) for step in (3, 6, 9))
