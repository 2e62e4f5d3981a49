"""No run is lost, and stopping does not change the result."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import slow_after_first
from command_line import strict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from keras import layers

import research
from research.training import checkpoint
from research.training.logs import LogEntry
from research.training.loop import Stopped

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 8)).astype("float32")
Y = RNG.integers(0, 3, 40).astype("int32")


def learner(units: int = 16, optimizer: Any = "adam") -> research.Learner:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(units, "relu"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(3)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return research.supervised(model, loss=loss, optimizer=optimizer, metrics=["accuracy"])


def data() -> research.Batches:
    return research.from_arrays(X, Y, batch_size=8, seed=1)


def assert_equal(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class AgentState(NamedTuple):
    """A state with other leaves than a `State`: a random key and an array of bfloat16."""

    agent: research.State
    key: Any
    seen: Any


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("optimizer", slow_after_first(["adam", "sgd", optax.adam(1e-3)]))
def test_saving_and_restoring_is_bitwise_exact(optimizer: Any, tmp_path: Path) -> None:
    classifier = learner(optimizer=optimizer)
    state, logs = research.train(classifier, data(), steps=7)
    path = checkpoint.save(tmp_path / "checkpoints", 7, state, classifier.names, logs)
    restored = checkpoint.restore(path, classifier.init(), classifier.names)
    assert_equal(restored.state, state)
    assert (restored.step, {name: float(value) for name, value in restored.logs.items()}) == (7, logs)


def test_the_state_of_any_learner_is_saved_under_its_names(tmp_path: Path) -> None:
    classifier = learner()
    state = AgentState(classifier.init(), jax.random.key(3), jnp.arange(4, dtype=jnp.bfloat16))
    names = AgentState(classifier.names, "key", "seen")
    path = checkpoint.save(tmp_path / "checkpoints", 1, state, names, {"loss": jnp.nan, "each": jnp.arange(2.0)})
    restored = checkpoint.restore(path, state._replace(key=jax.random.key(0)), names)
    assert_equal(restored.state._replace(key=jnp.zeros(1)), state._replace(key=jnp.zeros(1)))
    assert jax.random.key_data(restored.state.key).tolist() == jax.random.key_data(state.key).tolist()
    assert np.isnan(restored.logs["loss"])
    assert restored.logs["each"].tolist() == [0.0, 1.0]
    leaves = {name: (shape, dtype) for name, shape, dtype in strict((path / "manifest.json").read_text())["leaves"]}
    assert leaves["sequential/dense/kernel"] == ([8, 16], "float32")


@pytest.mark.slow
def test_only_the_latest_checkpoints_remain_and_nothing_partial(tmp_path: Path) -> None:
    classifier = learner()
    with checkpoint.async_saver(tmp_path / "checkpoints", classifier.names, keep=2) as save:
        research.train(classifier, data(), steps=9, hooks=[(2, save)])
    assert checkpoint.steps(tmp_path / "checkpoints") == [8, 9]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_failed_save_is_reported_even_if_training_was_stopped(tmp_path: Path) -> None:
    classifier = learner()
    (tmp_path / "checkpoints").write_text("a file where the directory should be")

    def stopped() -> None:
        with checkpoint.async_saver(tmp_path / "checkpoints", classifier.names) as save:
            save(1, classifier.init(), {})
            raise Stopped

    with pytest.raises(research.InvalidArgument, match="checkpoint of step 1 can't be written"):
        stopped()


@pytest.mark.slow
def test_a_checkpoint_has_the_state_of_its_step_although_training_continues(tmp_path: Path) -> None:
    classifier = learner()
    with checkpoint.async_saver(tmp_path / "checkpoints", classifier.names, keep=100) as save:
        research.train(classifier, data(), steps=20, hooks=[(1, save)])
    for step in (1, 7, 20):
        shorter = learner()
        state, _ = research.train(shorter, data(), steps=step)
        restored = checkpoint.restore(tmp_path / "checkpoints" / f"{step:09d}", shorter.init(), shorter.names)
        assert_equal(restored.state, state)


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file() and file.stat().st_size]


def flip_bit(path: Path) -> None:
    file = max(files(path / "state"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(path: Path) -> None:
    file = max(files(path / "state"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "flipped bit": flip_bit,
    "truncated": truncate,
    "file removed": lambda path: files(path / "state")[0].unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"step": 6, "fil'),
    "all files removed": lambda path: [file.unlink() for file in files(path)],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("damage", slow_after_first(DAMAGES))
def test_a_damaged_checkpoint_is_reported_and_skipped(damage: str, tmp_path: Path) -> None:
    classifier, directory = learner(), tmp_path / "checkpoints"
    with checkpoint.async_saver(directory, classifier.names) as save:
        research.train(classifier, data(), steps=6, hooks=[(3, save)])
    DAMAGES[damage](directory / "000000006")
    reports: list[str] = []
    assert checkpoint.latest(directory, reports.append) == directory / "000000003"
    (line,) = reports
    assert line.startswith(f"checkpoint {directory / '000000006'} is damaged (")
    checkpoint.save(directory, 4, classifier.init(), classifier.names, keep=1)
    assert checkpoint.latest(directory, reports.append) == directory / "000000004"
    DAMAGES[damage](directory / "000000004")
    with pytest.raises(research.InvalidArgument, match=r"no intact checkpoint is left \(2 damaged\)"):
        checkpoint.latest(directory, reports.append)


def test_an_empty_or_unreadable_directory_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(research.InvalidArgument, match="no intact checkpoint is left"):
        checkpoint.latest(tmp_path / "checkpoints", print)
    (tmp_path / "file").write_text("")
    with pytest.raises(research.InvalidArgument, match="can't be read"):
        checkpoint.latest(tmp_path / "file", print)


@pytest.mark.parametrize(
    ("build", "difference"),
    [
        (lambda: learner(units=8), r"'sequential/dense/kernel' is float32\[8, 16\] in it, expected float32\[8, 8\]"),
        (lambda: learner(optimizer="sgd"), "'momentum/sequential/dense/kernel' in it is not part of the learner"),
        (
            lambda: learner(optimizer=keras.optimizers.Adam(amsgrad=True)),
            "'velocity_hat/sequential/dense/kernel' is missing in it",
        ),
    ],
)
def test_a_checkpoint_of_another_learner_raises_an_error_that_names_a_differing_leaf(
    build: Any, difference: str, tmp_path: Path
) -> None:
    classifier = learner()
    path = checkpoint.save(tmp_path / "checkpoints", 1, classifier.init(), classifier.names)
    with pytest.raises(research.InvalidArgument, match=difference) as error:
        checkpoint.restore(path, build().init(), build().names)
    assert "\n" not in str(error.value)


def sharded(shapes: Any, devices: int) -> Any:
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = P("data") if leaf.ndim and leaf.shape[0] % 8 == 0 else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, 1])
def test_a_checkpoint_from_eight_devices_is_restored_on_fewer_each_reading_its_shards(devices: int, tmp_path: Path) -> None:
    def build() -> research.Learner:
        return learner(optimizer=keras.optimizers.SGD(0.05))

    classifier, shapes = research.init_abstract(build)
    _, state = research.init_sharded(build, jax.tree.map(lambda leaf: leaf.sharding, sharded(shapes, 8)))
    state, logs = research.train(classifier, data(), steps=7, state=state)
    path = checkpoint.save(tmp_path / "checkpoints", 7, state, classifier.names, logs)
    values = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    restored = checkpoint.restore(path, sharded(shapes, devices), classifier.names)
    for leaf, value in zip(jax.tree.leaves(restored.state), values, strict=True):
        np.testing.assert_array_equal(leaf, value)
    kernel = restored.state.trainable[0]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8 // devices, 16)}
    _, on_fewer = research.train(classifier, data(), steps=15, start=7, state=restored.state)
    _, on_eight = research.train(classifier, data(), steps=15, start=7, state=state)
    for name, value in on_eight.items():
        np.testing.assert_allclose(on_fewer[name], value, rtol=1e-6)


@pytest.mark.slow
def test_stopping_at_any_moment_and_resuming_gives_the_same_state_and_logs(tmp_path: Path) -> None:
    classifier = learner()
    beginning = checkpoint.Checkpoint(0, classifier.init(), None)

    def run(start: checkpoint.Checkpoint, entries: list[LogEntry], stop: Any) -> Any:
        return research.train(
            classifier,
            data(),
            steps=12,
            start=start.step,
            state=start.state,
            logs=start.logs,
            log_every=3,
            log=entries.append,
            evaluations={"val": data()},
            stop=stop,
        )

    expected: list[LogEntry] = []
    state, last = run(beginning, expected, lambda: False)
    stops = 0
    for moment in range(30):  # `stop` is called after each dispatch, and between the batches of each evaluation
        entries: list[LogEntry] = []
        calls = iter(range(1000))
        beginning = beginning._replace(state=classifier.init())
        try:
            run(beginning, entries, lambda calls=calls, moment=moment: next(calls) >= moment)
        except Stopped as stopped:
            stops += 1
            path = checkpoint.save(tmp_path / f"{moment}", stopped.step, stopped.state, classifier.names, stopped.logs)
            restored = checkpoint.restore(path, classifier.init(), classifier.names)
            entries = [entry for entry in entries if entry.step < restored.step]
            resumed, resumed_last = run(restored, entries, lambda: False)
            assert_equal(resumed, state)
            assert resumed_last == last
        assert entries == expected
    assert stops >= 10


def test_the_manifest_is_strict_json(tmp_path: Path) -> None:
    classifier = learner()
    path = checkpoint.save(tmp_path / "checkpoints", 1, classifier.init(), classifier.names, {"loss": jnp.inf})
    assert strict((path / "manifest.json").read_text())["logs"] == {"loss": None}
    assert json.loads((path / "manifest.json").read_text())["step"] == 1
