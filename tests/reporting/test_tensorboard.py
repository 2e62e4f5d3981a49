"""TensorBoard shows a run's logs and weights, each point once however often the run was stopped, and in a browser."""

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
from command_line import command, strict
from graph_models import each_model_with_graph
from keras import layers

import research
from research.core.state import State
from research.reporting import embeddings, tensorboard
from research.reporting.graph import model_graph
from research.training.logs import LogEntry

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype("float32")


def learner() -> research.Learner:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(1)])
    return research.supervised(model, loss="mse", optimizer="adam", metrics=["mae"])


def data() -> research.Batches:
    return research.from_arrays(X, X[:, :1], batch_size=8)


def scalars_in(directory: Path) -> Counter[tuple[str, int, str, float]]:
    """Counts the scalars of each (split, step, name, value)."""
    return Counter(
        (path.name, event.step, value.tag, value.simple_value)
        for path in directory.iterdir()
        for event in tensorboard.read_events(path)
        for value in event.summary.value
        if value.HasField("simple_value")
    )


def scalars_of(entries: list[LogEntry]) -> Counter[tuple[str, int, str, float]]:
    return Counter((e.split, e.step, name, float(np.float32(value))) for e in entries for name, value in e.values.items())


def histograms_in(directory: Path) -> Counter[tuple[int, str]]:
    """Counts the histograms of each (step, name)."""
    return Counter(
        (event.step, value.tag)
        for event in tensorboard.read_events(directory)
        for value in event.summary.value
        if value.HasField("histo")
    )


@pytest.mark.parametrize("several_processes", [False, True])
def test_scalars_equal_the_logs_and_histograms_the_weights_of_their_step(
    several_processes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, entries, statistics = learner(), [], {}
    write_histograms, device_put = tensorboard.write_histograms, jax.device_put
    if several_processes:  # gathered weights are NumPy arrays, which may not fit on one device

        def put_without_copies(leaf: Any, *args: Any, **options: Any) -> Any:
            assert options.get("may_alias") is None
            return device_put(leaf, *args, **options)

        monkeypatch.setattr(tensorboard, "to_host", lambda tree: jax.tree.map(np.asarray, tree))
        monkeypatch.setattr(jax, "device_put", put_without_copies)

    def write_late(*args: Any) -> None:
        time.sleep(0.1)  # by then training has donated the state
        write_histograms(*args)

    monkeypatch.setattr(tensorboard, "write_histograms", write_late)

    def record_statistics(step: int, state: State, logs: Any) -> None:
        for name, leaf in zip(trained.names.trainable, state.trainable, strict=True):
            leaf = np.asarray(leaf, np.float64)
            statistics[step, f"weights/{name}"] = (leaf.size, leaf.min(), leaf.max(), leaf.sum(), np.square(leaf).sum())

    with tensorboard.recorder(tmp_path, trained.names) as (log, histogram_hook, _):
        research.train(
            trained,
            data(),
            epochs=3,
            log_every=2,
            evaluations={"val": data()},
            log=lambda entry: (entries.append(entry), log(entry))[1],
            hooks=[(5, record_statistics), (5, histogram_hook)],
        )
    assert scalars_in(tmp_path) == scalars_of(entries)
    assert histograms_in(tmp_path / "train") == Counter(dict.fromkeys(statistics, 1))
    for event in tensorboard.read_events(tmp_path / "train"):
        for value in event.summary.value:
            if value.HasField("histo"):
                histogram = value.histo
                actual = [histogram.num, histogram.min, histogram.max, histogram.sum, histogram.sum_squares]
                np.testing.assert_allclose(actual, statistics[event.step, value.tag], rtol=1e-6)
                assert sum(histogram.bucket) == histogram.num
                assert len(histogram.bucket) == len(histogram.bucket_limit)


@pytest.mark.parametrize("lost_bytes", [0, 1, 7, 500])
def test_a_resumed_run_shows_each_point_once_whatever_a_kill_truncated(lost_bytes: int, tmp_path: Path) -> None:
    trained = learner()
    state = trained.init()
    entries = [LogEntry(step, step // 5, split, {"loss": step / 3}) for step in range(1, 21) for split in ("train", "val")]

    def record(directory: Path, first: int, last: int) -> None:
        earlier = [entry for entry in entries if entry.step < first]
        with tensorboard.recorder(directory, trained.names, earlier, first) as (log, histogram_hook, _):
            for entry in entries:
                if first <= entry.step <= last:
                    log(entry)
                    if entry.step % 5 == 0 and entry.split == "train":
                        histogram_hook(entry.step, state, {})

    record(tmp_path / "uninterrupted", 0, 20)
    record(tmp_path / "killed", 0, 17)
    with tensorboard.open_writer(tmp_path / "killed" / "train") as writer:  # as at the end of a run
        tensorboard.write_graph(writer, {"model": keras.Sequential([keras.Input((1,)), layers.Dense(1)])})
    for path in (tmp_path / "killed").rglob(tensorboard.EVENT_FILE):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - lost_bytes])
    times = {event.step: event.wall_time for event in tensorboard.read_events(tmp_path / "killed" / "val")}
    record(tmp_path / "killed", 15, 20)
    assert scalars_in(tmp_path / "killed") == scalars_in(tmp_path / "uninterrupted") == scalars_of(entries)
    expected, resumed = (histograms_in(tmp_path / name / "train") for name in ("uninterrupted", "killed"))
    assert resumed == expected if lost_bytes < 500 else not resumed - expected
    assert not [event for event in tensorboard.read_events(tmp_path / "killed" / "train") if event.graph_def]
    after = {event.step: event.wall_time for event in tensorboard.read_events(tmp_path / "killed" / "val")}
    assert all(after[step] == time for step, time in times.items() if step < 15)  # existing points keep their time


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
def test_a_histogram_counts_every_finite_value(values: Any, tmp_path: Path) -> None:
    with tensorboard.open_writer(tmp_path) as writer:
        tensorboard.write_histograms(writer, 1, {"a": values, "not finite": np.array([np.nan])})
    (event,) = tensorboard.read_events(tmp_path)
    (value,) = event.summary.value
    assert sum(value.histo.bucket) == value.histo.num == np.isfinite(np.asarray(values, np.float64)).sum()


def test_weights_of_several_models_have_different_names() -> None:
    single = learner()
    names, state = {"a": single.names, "b": (single.names,)}, {"a": single.init(), "b": (single.init(),)}
    weights = tensorboard.named_weights(names, state)
    assert set(weights) == {f"weights/{path}/{name}" for path in ("a", "b/0") for name in single.names.trainable}


@each_model_with_graph
def test_the_graph_def_has_every_layer_and_every_edge(build: Callable[[], keras.Model]) -> None:
    model = build()
    graph, graph_def = model_graph(model), tensorboard.graph_def({"model": model})
    assert [(node.name, node.op) for node in graph_def.node] == [(node.name, node.class_name) for node in graph.nodes]
    assert {(source, node.name) for node in graph_def.node for source in node.input} == set(graph.edges)
    two_models = tensorboard.graph_def({"first": model, "second": model})
    names = {node.name for node in two_models.node}
    assert len(names) == 2 * len(graph.nodes)
    assert {source for node in two_models.node for source in node.input} <= names


def test_an_embedding_replaces_one_of_the_same_name(tmp_path: Path) -> None:
    for size in (3, 5):
        embeddings.write_embedding(tmp_path, "a", np.eye(size), range(size), np.ones((size, 4, 6)))
        embeddings.write_embedding(tmp_path, "b", np.eye(2), ["tab\there", "line\nbreak"])
    lines = (tmp_path / "projector_config.pbtxt").read_text().splitlines()
    assert sorted(re.findall('tensor_name: "(.)"', "".join(lines))) == ["a", "b"]
    assert (tmp_path / "b" / "labels.tsv").read_text() == "tab here\nline break\n"
    assert np.loadtxt(tmp_path / "a" / "vectors.tsv").shape == (5, 5)
    with pytest.raises(research.InvalidArgument, match="expected"):
        embeddings.write_embedding(tmp_path, "c", np.eye(3), ["one"])
    with pytest.raises(research.InvalidArgument, match="too many"):
        embeddings.write_embedding(tmp_path, "c", np.eye(5), range(5), np.ones((5, 4000, 1)))


def test_importing_reporting_does_not_import_tensorboard() -> None:
    modules = (
        "research.reporting.tensorboard, research.reporting.embeddings, research.reporting.picture, research.reporting.report"
    )
    packages = ("tensorboardX", "tensorboard")
    program = f"import {modules}, sys; print(*(m for m in {packages} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


SETTINGS = ("digits", "--epochs", "40", "--checkpoint-every", "180", "--log-every", "30")


@pytest.mark.complete
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_and_resumed_run_shows_what_an_uninterrupted_one_does(number: signal.Signals, tmp_path: Path) -> None:
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    process = subprocess.Popen(
        [sys.executable, "-m", "research", "run", *SETTINGS, "--run-dir", str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[2:4] == ["step", "360"]:
            break
    process.send_signal(number)
    process.communicate()
    assert process.returncode in (75, -9)  # it was not finished
    for directory in (run, uninterrupted):
        done = command(*SETTINGS, "--run-dir", str(directory), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    lines = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (
        scalars_in(run / "tensorboard")
        == scalars_in(uninterrupted / "tensorboard")
        == scalars_of([LogEntry(**line) for line in lines])
    )
    assert histograms_in(run / "tensorboard" / "train") == histograms_in(uninterrupted / "tensorboard" / "train")
    assert {step for step, _ in histograms_in(run / "tensorboard" / "train")} == set(range(180, 1801, 180))


@contextmanager
def serve_tensorboard(logdir: Path) -> Iterator[str]:
    """Runs TensorBoard on a free port; yields its address."""
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
        output = ""
        for line in process.stdout:
            output += line
            if match := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield match[0]
                break
        else:
            raise AssertionError(output)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def test_the_browser_shows_scalars_images_histograms_graph_and_embeddings_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("digits", "--epochs", "4", "--run-dir", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with serve_tensorboard(run / "tensorboard") as address:

        def request(path: str) -> Any:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address + path) as response:
                return response.read()

        def tags_of(plugin: str) -> dict[str, set[str]]:
            return {split: set(tags) for split, tags in json.loads(request(f"data/plugin/{plugin}/tags")).items()}

        deadline = time.monotonic() + 120  # TensorBoard reads the files in a thread
        while not tags_of("images").get("train") and time.monotonic() < deadline:
            time.sleep(0.2)
        observed = {"gradient_norm", "update_norm", "weight_norm", "learning_rate"}
        logs = {"loss", "accuracy"}
        assert tags_of("scalars") == {"train": logs | observed, "val": logs, "test": logs}
        assert tags_of("images") == {"train": {"pictures/curves", "pictures/mistakes", "pictures/model"}}
        weights = [f"sequential/{layer}/{part}" for layer in ("dense", "dense_1") for part in ("kernel", "bias")]
        outputs = ["rescaling", "flatten", "dense", "dropout", "dense_1"]
        assert tags_of("histograms")["train"] == {
            *(f"{group}/{name}" for group in ("weights", "gradients") for name in weights),
            *(f"activations/{name}" for name in outputs),
        }
        steps = [
            point[1] for point in json.loads(request("data/plugin/histograms/histograms?run=train&tag=weights/" + weights[0]))
        ]
        assert steps == [45, 90, 135, 180]
        graph = request("data/plugin/graphs/graph?run=train").decode()
        assert re.findall(r'name: "(\w+)"', graph) == ["input_layer", *outputs]
        (features,) = json.loads(request("data/plugin/projector/info?run=train"))["embeddings"]
        assert (features["tensorName"], features["tensorShape"]) == ("features", [180, 512])
        assert request("data/plugin/projector/sprite_image?run=train&name=features").startswith(b"\x89PNG")
        if (browser := shutil.which("chromium")) is None:
            pytest.skip("Chromium is not installed")
        screenshot = tmp_path / "screenshot.png"
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        flags += " disable-component-update disable-sync no-proxy-server virtual-time-budget=30000 window-size=1400,1000"
        subprocess.run(
            [browser, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={tmp_path / 'browser'}"]
            + [f"--screenshot={screenshot}", f"{address}#scalars"],
            capture_output=True,
            check=True,
            timeout=300,
        )
    from matplotlib.image import imread

    pixels = imread(screenshot)[:, 350:, :3]  # right of the list of runs
    for colour in ((255, 112, 67), (0, 119, 187)):  # TensorBoard's first two: the curves of train and val
        assert (np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02).sum() > 200


def _frames(path: Path) -> list[bytes]:
    """Returns the records of an event file."""
    data, frames, start = path.read_bytes(), [], 0
    while start < len(data):
        size = 16 + int.from_bytes(data[start : start + 8], "little")
        frames.append(data[start : start + size])
        start += size
    return frames


EVENTS: dict[str, tuple[Callable[[list[bytes]], bytes], list[int], bool]] = {
    "a killed process": (lambda frames: b"".join(frames)[:-7], [1, 2, 3], False),
    "half a header": (lambda frames: b"".join(frames)[: -len(frames[-1]) + 6], [1, 2, 3], False),
    "a flipped bit": (lambda frames: b"".join([*frames[:2], frames[2][:-5] + b"!" + frames[2][-4:], *frames[3:]]), [1], True),
    "a flipped length": (lambda frames: b"".join([*frames[:2], b"!" + frames[2][1:], *frames[3:]]), [1], True),
    "zeros at the end": (lambda frames: b"".join(frames) + bytes(100), [1, 2, 3, 4], True),
    "zeros": (lambda frames: bytes(500), [], True),
    "text": (lambda frames: b"not an event at all", [], True),
    "no event": (lambda frames: b"".join([*frames[:3], tensorboard._frame(b"\xff\xff"), *frames[3:]]), [1, 2], True),
    "nothing": (lambda frames: b"", [], False),
}


@pytest.mark.parametrize(("damage", "left", "reported"), EVENTS.values(), ids=list(EVENTS))
def test_events_are_used_up_to_the_first_damaged_one_which_is_reported(
    damage: Callable[[list[bytes]], bytes], left: list[int], reported: bool, tmp_path: Path
) -> None:
    path = tmp_path / "train" / tensorboard.EVENT_FILE
    with tensorboard.open_writer(path.parent) as writer:
        for step in (1, 2, 3, 4):
            tensorboard.write_scalars(writer, step, {"loss": 0.5})
    path.write_bytes(damage(_frames(path)))
    size, lines = path.stat().st_size, list[str]()
    entries = [LogEntry(step, 0, "train", {"loss": 0.5}) for step in (1, 2, 3, 4)]
    with tensorboard.recorder(tmp_path, (), entries, 5, lines.append):
        pass
    assert len(lines) == reported
    for line in lines:
        assert re.fullmatch(
            rf"{re.escape(str(path))}: its events are damaged from byte \d+ of {size} on; they are left out", line
        )
    assert [event.step for event in tensorboard.read_events(path.parent)][: len(left)] == left
    assert sorted(event.step for event in tensorboard.read_events(path.parent)) == [1, 2, 3, 4]  # those lost come from the logs


def test_a_directory_in_the_place_of_the_events_is_kept_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "train" / tensorboard.EVENT_FILE).mkdir(parents=True)
    lines: list[str] = []
    with tensorboard.recorder(tmp_path, (), [LogEntry(1, 0, "train", {"loss": 0.5})], 2, lines.append):
        pass
    path = tmp_path / "train" / tensorboard.EVENT_FILE
    assert lines == [f"{path}: expected a file; what is there is kept as {path.name}.damaged"]
    assert [event.step for event in tensorboard.read_events(tmp_path / "train")] == [1]
