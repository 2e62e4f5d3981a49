"""What TensorBoard shows is what the run was: each point once, however often it was stopped; and it is seen in a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers
from test_picture import GRAPHS
from test_run import ROOT, command, strict

import research
from research import projector, tensorboard
from research.graph import graph
from research.loop import Entry
from research.state import State

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype("float32")


def learner() -> research.Learner:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(1)])
    return research.supervised(model, loss="mse", optimizer="adam", metrics=["mae"])


def data() -> research.Batches:
    return research.arrays(X, X[:, :1], batch_size=8)


def points(directory: Path) -> Counter[tuple[str, int, str, float]]:
    """Every point of every curve: split, step, name, value."""
    return Counter(
        (path.name, event.step, value.tag, value.simple_value)
        for path in directory.iterdir()
        for event in tensorboard.events(path)
        for value in event.summary.value
        if value.HasField("simple_value")
    )


def logged(entries: list[Entry]) -> Counter[tuple[str, int, str, float]]:
    return Counter((e.split, e.step, name, float(np.float32(value))) for e in entries for name, value in e.values.items())


def distributions(directory: Path) -> Counter[tuple[int, str]]:
    """Every histogram: step and name."""
    return Counter(
        (event.step, value.tag)
        for event in tensorboard.events(directory)
        for value in event.summary.value
        if value.HasField("histo")
    )


@pytest.mark.parametrize("several", [False, True], ids=["one process", "several"])
def test_the_curves_are_the_logs_and_the_histograms_the_weights_of_their_step(
    several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, entries, sums = learner(), [], {}
    histograms, put = tensorboard.histograms, jax.device_put
    if several:  # what is gathered from all of them has no room on one device

        def refusing(leaf: Any, *args: Any, **options: Any) -> Any:
            assert options.get("may_alias") is None
            return put(leaf, *args, **options)

        monkeypatch.setattr(tensorboard, "whole", lambda tree: jax.tree.map(np.asarray, tree))
        monkeypatch.setattr(jax, "device_put", refusing)

    def late(*args: Any) -> None:
        time.sleep(0.1)  # long enough for training to have donated the state
        histograms(*args)

    monkeypatch.setattr(tensorboard, "histograms", late)

    def look(step: int, state: State, logs: Any) -> None:
        for name, leaf in zip(trained.names.trainable, state.trainable, strict=True):
            leaf = np.asarray(leaf, np.float64)
            sums[step, f"weights/{name}"] = (leaf.size, leaf.min(), leaf.max(), leaf.sum(), np.square(leaf).sum())

    with tensorboard.recording(tmp_path, trained.names) as (point, weights, _):
        research.train(
            trained,
            data(),
            epochs=3,
            log_every=2,
            evaluations={"val": data()},
            log=lambda entry: (entries.append(entry), point(entry))[1],
            hooks=[(5, look), (5, weights)],
        )
    assert points(tmp_path) == logged(entries)
    assert distributions(tmp_path / "train") == Counter(dict.fromkeys(sums, 1))
    for event in tensorboard.events(tmp_path / "train"):
        for value in event.summary.value:
            if value.HasField("histo"):
                told = value.histo
                wanted = sums[event.step, value.tag]
                np.testing.assert_allclose([told.num, told.min, told.max, told.sum, told.sum_squares], wanted, rtol=1e-6)
                assert sum(told.bucket) == told.num
                assert len(told.bucket) == len(told.bucket_limit)


@pytest.mark.parametrize("lost", [0, 1, 7, 500])
def test_a_run_that_goes_on_shows_each_point_once_whatever_a_kill_cut_off(lost: int, tmp_path: Path) -> None:
    trained = learner()
    state = trained.init()
    entries = [Entry(step, step // 5, split, {"loss": step / 3}) for step in range(1, 21) for split in ("train", "val")]

    def record(directory: Path, first: int, last: int) -> None:
        known = [entry for entry in entries if entry.step < first]
        with tensorboard.recording(directory, trained.names, known, first) as (point, weights, _):
            for entry in entries:
                if first <= entry.step <= last:
                    point(entry)
                    if entry.step % 5 == 0 and entry.split == "train":
                        weights(entry.step, state, {})

    record(tmp_path / "left alone", 0, 20)
    record(tmp_path / "killed", 0, 17)
    with tensorboard.writing(tmp_path / "killed" / "train") as writer:  # as at the end of a run
        tensorboard.structure(writer, {"model": keras.Sequential([keras.Input((1,)), layers.Dense(1)])})
    for path in (tmp_path / "killed").rglob(tensorboard.FILE):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - lost])
    times = {event.step: event.wall_time for event in tensorboard.events(tmp_path / "killed" / "val")}
    record(tmp_path / "killed", 15, 20)
    assert points(tmp_path / "killed") == points(tmp_path / "left alone") == logged(entries)
    whole, again = (distributions(tmp_path / name / "train") for name in ("left alone", "killed"))
    assert again == whole if lost < 500 else not again - whole
    assert not [event for event in tensorboard.events(tmp_path / "killed" / "train") if event.graph_def]
    after = {event.step: event.wall_time for event in tensorboard.events(tmp_path / "killed" / "val")}
    assert all(after[step] == at for step, at in times.items() if step < 15)  # a point keeps its time


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(5),
        np.full(3, 1e20),
        np.float32([-3e38, 3e38]),
        np.float32([1, np.nextafter(np.float32(1), np.float32(2))]),
        np.array([np.nan, 1, np.inf, 2]),
        np.arange(6, dtype="int8"),
        jax.numpy.ones((2, 3), "bfloat16"),
    ],
)
def test_every_finite_number_is_in_its_histogram(values: Any, tmp_path: Path) -> None:
    with tensorboard.writing(tmp_path) as writer:
        tensorboard.histograms(writer, 1, {"a": values, "nothing": np.array([np.nan])})
    (event,) = tensorboard.events(tmp_path)
    (value,) = event.summary.value
    assert sum(value.histo.bucket) == value.histo.num == np.isfinite(np.asarray(values, np.float64)).sum()


def test_the_weights_of_several_networks_keep_apart(tmp_path: Path) -> None:
    one = learner()
    names, state = {"a": one.names, "b": (one.names,)}, {"a": one.init(), "b": (one.init(),)}
    found = tensorboard.weights(names, state)
    assert set(found) == {f"weights/{of}/{name}" for of in ("a", "b/0") for name in one.names.trainable}


@pytest.mark.parametrize("build", GRAPHS, ids=lambda build: build.__name__)
def test_the_graph_has_every_layer_and_every_edge(build: Callable[[], keras.Model]) -> None:
    model = build()
    found, drawn = graph(model), tensorboard.graph_def({"model": model})
    assert [(node.name, node.op) for node in drawn.node] == [(node.name, node.kind) for node in found.nodes]
    assert {(giver, node.name) for node in drawn.node for giver in node.input} == set(found.edges)
    both = tensorboard.graph_def({"one": model, "other": model})
    names = {node.name for node in both.node}
    assert len(names) == 2 * len(found.nodes)
    assert {giver for node in both.node for giver in node.input} <= names


def test_an_embedding_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for size in (3, 5):
        projector.embedding(tmp_path, "a", np.eye(size), range(size), np.ones((size, 4, 6)))
        projector.embedding(tmp_path, "b", np.eye(2), ["tab\there", "line\nbreak"])
    lines = (tmp_path / "projector_config.pbtxt").read_text().splitlines()
    assert sorted(re.findall('tensor_name: "(.)"', "".join(lines))) == ["a", "b"]
    assert (tmp_path / "b" / "labels.tsv").read_text() == "tab here\nline break\n"
    assert np.loadtxt(tmp_path / "a" / "vectors.tsv").shape == (5, 5)
    with pytest.raises(research.Refused, match="expected"):
        projector.embedding(tmp_path, "c", np.eye(3), ["one"])
    with pytest.raises(research.Refused, match="too many"):
        projector.embedding(tmp_path, "c", np.eye(5), range(5), np.ones((5, 4000, 1)))


def test_what_writes_events_is_loaded_when_one_is_written() -> None:
    modules = "research.tensorboard, research.projector, research.picture, research.report"
    asked = f"import {modules}, sys; print(*(m for m in ('tensorboardX', 'tensorboard') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


SETTINGS = ("digits", "--epochs", "40", "--checkpoint-every", "180", "--log-every", "30")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_shows_in_the_end_what_one_left_alone_does(number: signal.Signals, tmp_path: Path) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "run.py"), *SETTINGS, "--run-dir", str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[2:4] == ["step", "360"]:
            break
    process.send_signal(number)
    process.communicate()
    assert process.returncode in (75, -9)  # it was not done yet
    for directory in (run, alone):
        done = command(*SETTINGS, "--run-dir", str(directory), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    lines = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert points(run / "tensorboard") == points(alone / "tensorboard") == logged([Entry(**line) for line in lines])
    assert distributions(run / "tensorboard" / "train") == distributions(alone / "tensorboard" / "train")
    assert {step for step, _ in distributions(run / "tensorboard" / "train")} == set(range(180, 1801, 180))


@contextmanager
def served(logdir: Path) -> Iterator[str]:
    """TensorBoard on a port of its own; gives its address."""
    arguments = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield found[0]
                break
        else:
            raise AssertionError(said)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def test_a_run_is_shown_whole_in_the_browser(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("digits", "--epochs", "4", "--run-dir", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with served(run / "tensorboard") as address:

        def asked(path: str) -> Any:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address + path) as answer:
                return answer.read()

        def shown(plugin: str) -> dict[str, set[str]]:
            return {split: set(tags) for split, tags in json.loads(asked(f"data/plugin/{plugin}/tags")).items()}

        until = time.monotonic() + 120  # it reads the files in a thread
        while not shown("images").get("train") and time.monotonic() < until:
            time.sleep(0.2)
        assert shown("scalars") == {split: {"loss", "accuracy"} for split in ("train", "val", "test")}
        assert shown("images") == {"train": {"pictures/curves", "pictures/mistakes", "pictures/model"}}
        named = [f"sequential/{layer}/{part}" for layer in ("dense", "dense_1") for part in ("kernel", "bias")]
        outputs = ["rescaling", "flatten", "dense", "dropout", "dense_1"]
        assert shown("histograms")["train"] == {
            *(f"{what}/{name}" for what in ("weights", "gradients") for name in named),
            *(f"activations/{name}" for name in outputs),
        }
        steps = [point[1] for point in json.loads(asked("data/plugin/histograms/histograms?run=train&tag=weights/" + named[0]))]
        assert steps == [45, 90, 135, 180]
        drawn = asked("data/plugin/graphs/graph?run=train").decode()
        assert re.findall(r'name: "(\w+)"', drawn) == ["input_layer", *outputs]
        (features,) = json.loads(asked("data/plugin/projector/info?run=train"))["embeddings"]
        assert (features["tensorName"], features["tensorShape"]) == ("features", [180, 512])
        assert asked("data/plugin/projector/sprite_image?run=train&name=features").startswith(b"\x89PNG")
        if (browser := shutil.which("chromium")) is None:
            pytest.skip("no Chromium to look with")
        picture = tmp_path / "seen.png"
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        flags += " disable-component-update disable-sync no-proxy-server virtual-time-budget=30000 window-size=1400,1000"
        subprocess.run(
            [browser, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={tmp_path / 'browser'}"]
            + [f"--screenshot={picture}", f"{address}#scalars"],
            capture_output=True,
            check=True,
            timeout=300,
        )
    from matplotlib.image import imread

    pixels = imread(picture)[:, 350:, :3]  # right of the list of runs
    for colour in ((255, 112, 67), (0, 119, 187)):  # TensorBoard's first two: the curves of train and val
        assert (np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02).sum() > 200
