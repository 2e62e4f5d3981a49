"""A state starts from the weights of a run or a file, bit for bit, each device from its own slices; damage is one line."""

import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from keras import layers

import research
from research import distributed
from research.training import checkpoint, warm_start

SOURCES = ("run", "model.keras", "model.weights.h5", "model.safetensors", "folder")
RUN_ONLY = "seed_generator/seed_generator_state"


def network(units: int = 16) -> keras.Model:
    stack = [layers.Dense(units, "relu"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(8, name="head")]
    return keras.Sequential([keras.Input((8,)), *stack])


def build(seed: int = 1, **options: Any) -> research.Learner:
    keras.utils.set_random_seed(seed)
    return research.supervised(network(**options), loss="mse", optimizer="adam")


def weights(learner: research.Learner, state: Any) -> dict[str, np.ndarray]:
    names = (learner.names.trainable, learner.names.non_trainable)
    pairs = zip(jax.tree.leaves(names), jax.tree.leaves((state.trainable, state.non_trainable)), strict=True)
    return {name: np.asarray(leaf) for name, leaf in pairs}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A directory with the same weights in every format, and the weights."""
    directory = tmp_path_factory.mktemp("source")
    keras.utils.set_random_seed(0)
    model = network()
    learner = research.supervised(model, loss="mse", optimizer="adam")
    state = learner.init()
    checkpoint.save(directory / "run" / "checkpoints", 3, state, learner.names)
    model.save(directory / "model.keras")
    model.save_weights(directory / "model.weights.h5")
    stored = weights(learner, state)
    floating = {name: value for name, value in stored.items() if name != RUN_ONLY}
    safetensors.numpy.save_file(floating, directory / "model.safetensors")
    folder = directory / "folder"
    folder.mkdir()
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(floating)}
    for file in set(files.values()):
        safetensors.numpy.save_file({name: value for name, value in floating.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory, stored


def split_everything(shapes: Any, mesh: Any) -> dict[str, P]:
    return {name: P(*[None] * (len(shape) - 1), "fsdp") if shape[-1] % 8 == 0 else P() for name, shape in shapes.items()}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_its_weights_bit_for_bit_and_each_device_reads_its_own_slices(
    name: str, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, expected = source
    learner, state = distributed.build_sharded(build, distributed.mesh(fsdp=8), split_everything)
    sizes: list[int] = []
    opened = warm_start.open_weights

    @contextmanager
    def recording(*arguments: Any) -> Iterator[Any]:
        with opened(*arguments) as stored:
            arrays = {key: array._replace(read=recorded(array.read)) for key, array in stored.arrays.items()}
            yield stored._replace(arrays=arrays)

    def recorded(read: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def call(index: Any) -> np.ndarray:
            array = read(index)
            sizes.append(array.size)
            return array

        return call

    monkeypatch.setattr(warm_start, "open_weights", recording)
    restored, report = research.restore(learner, directory / name, state)
    assert (report.missing, report.left, report.cast) == ([], [], {})
    assert set(report.taken) == set(expected) - (set() if name == "run" else {RUN_ONLY})
    for leaf, value in weights(learner, restored).items():
        if leaf in report.taken:
            np.testing.assert_array_equal(value, expected[leaf])
    before, after = (jax.tree.map(lambda leaf: leaf.sharding, each) for each in (state, restored))
    assert before == after
    assert max(sizes) == 8 * 16 // 8  # the largest shard
    jax.tree.map(np.testing.assert_array_equal, restored.optimizer, state.optimizer)


def test_training_from_restored_weights_equals_training_from_the_source(source: Any) -> None:
    learner = build(0)
    batch = research.Batch(np.ones((8, 8), np.float32), np.ones((8, 8), np.float32))
    step = jax.jit(learner.train, donate_argnums=0)
    expected, _ = step(learner.init(), batch)
    restored, _ = research.restore(learner, source[0] / "run", build(5).init())
    actual, _ = step(restored, batch)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_state_of_shapes_is_filled_and_its_other_leaves_stay_shapes(source: Any) -> None:
    learner, shapes = research.init_abstract(build)
    restored, report = research.restore(learner, source[0] / "model.safetensors", shapes, partial=True, only="dense|head")
    assert len(report.taken) == 4
    np.testing.assert_array_equal(restored.trainable[0], source[1]["sequential/dense/kernel"])
    assert isinstance(restored.optimizer[0], jax.ShapeDtypeStruct)


def test_everything_takes_the_optimizer_too(tmp_path: Path) -> None:
    learner = build(0)
    batch = research.Batch(np.ones((8, 8), np.float32), np.ones((8, 8), np.float32))
    state, _ = jax.jit(learner.train)(learner.init(), batch)
    checkpoint.save(tmp_path / "checkpoints", 1, state, learner.names)
    restored, report = research.restore(learner, tmp_path, build(5).init(), everything=True)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert len(report.taken) == len(jax.tree.leaves(state))


def test_weights_are_cast_to_the_dtypes_of_the_state(source: Any) -> None:
    keras.utils.set_random_seed(1)
    stack = [layers.Dense(16, dtype="bfloat16"), layers.Dense(8, name="head", dtype="bfloat16")]
    learner = research.supervised(keras.Sequential([keras.Input((8,)), *stack]), loss="mse")
    restored, report = research.restore(learner, source[0] / "model.keras")
    assert report.cast["sequential/dense/kernel"] == "float32 to bfloat16"
    np.testing.assert_array_equal(restored.trainable[0], source[1]["sequential/dense/kernel"].astype(jnp.bfloat16))
    assert len(report.left) == 4  # BatchNormalization's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'new/kernel' is not in it, nor are 1 more"),
        ({"partial": True, "only": "sequenzial"}, "only 'sequenzial' matches none of the 11 names; near it: 'sequential/"),
        ({"only": "("}, "only '(' is no regular expression"),
        ({"only": "new/", "partial": True}, "none of the state's 2 weights is in it: it holds 'sequential/"),
        ({"mapping": {"new/kernel": 3}}, "mapping: 'new/kernel' is mapped to 3, expected a name"),
        ({"mapping": {"new/kernel": ("sequential/head/kernel", (0, 0))}, "partial": True}, "the axes (0, 0) are no order of"),
    ],
    ids=["missing", "only", "regex", "nothing", "target", "axes"],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_can_not_be_taken_is_one_line(options: Any, message: str, source: Any) -> None:
    learner = build()
    extended = learner._replace(
        init=lambda: learner.init()._replace(trainable=[*learner.init().trainable, jnp.zeros((16, 8)), jnp.zeros(8)]),
        names=learner.names._replace(trainable=[*learner.names.trainable, "new/kernel", "new/bias"]),
    )
    with pytest.raises(research.InvalidArgument) as error:
        research.restore(extended, source[0] / "model.safetensors", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SOURCES)
def test_another_shape_is_an_error_with_both_shapes(name: str, source: Any) -> None:
    with pytest.raises(
        research.InvalidArgument, match=r"'sequential/dense/kernel'.* is float32\[8, 16\] in it, expected float32\[8"
    ):
        research.restore(build(units=24), source[0] / name, partial=True)
    _, report = research.restore(build(units=24), source[0] / name, partial=True, only="head/bias")
    assert report.taken == ["sequential/head/bias"]


def test_a_mapping_gives_names_transposes_and_functions_and_still_reads_slices_of_a_transpose(tmp_path: Path) -> None:
    expected = weights(build(0), build(0).init())
    kernel, head = expected["sequential/dense/kernel"], expected["sequential/head/kernel"]
    theirs = {"fc.weight": kernel.T.copy(), "heads": np.stack([head, head + 1]), "sequential/head/bias": np.ones(8, np.float32)}
    safetensors.numpy.save_file(theirs, tmp_path / "a.safetensors")
    mapping = {
        "sequential/dense/kernel": ("fc.weight", (1, 0)),
        "sequential/head/kernel": ("heads", lambda array: array[1]),
        "sequential/batch_normalization/gamma": None,
    }
    learner, state = distributed.build_sharded(build, distributed.mesh(fsdp=8), split_everything)
    for given in (mapping, mapping.get):
        restored, report = research.restore(learner, tmp_path / "a.safetensors", state, partial=True, mapping=given)
        np.testing.assert_array_equal(restored.trainable[0], kernel)
        np.testing.assert_array_equal(restored.trainable[4], head + 1)
        assert (len(report.taken), report.left) == ((3, []) if given is mapping else (2, ["sequential/head/bias"]))
        assert restored.trainable[0].sharding == state.trainable[0].sharding


def test_learners_of_several_models_and_averages_start_from_files_of_one_model(tmp_path: Path) -> None:
    def joint(seed: int) -> tuple[research.Learner, list[keras.Model]]:
        keras.utils.set_random_seed(seed)
        example = research.Batch(np.ones((2, 4), np.float32))
        critic, actor = (keras.Sequential([keras.Input((4,)), layers.Dense(4)], name=name) for name in ("critic", "actor"))
        loss = lambda batch, training: (keras.ops.mean(critic(actor(batch.x)) ** 2), {})  # noqa: E731
        learners = {
            "critic": research.transforms.ema(research.learner(loss, critic, "sgd", example=example), 0.9),
            "actor": research.learner(loss, actor, "sgd", example=example),
        }
        return research.joint(learners), [critic, actor]

    learner, _ = joint(0)
    _, (critic, _) = joint(1)
    critic.save(tmp_path / "critic.keras")
    state, report = research.restore(learner, tmp_path / "critic.keras", partial=True)
    assert [name for name in report.taken if "ema" not in name] == ["critic/dense/kernel", "critic/dense/bias"]
    for values in (state["critic"].state.trainable, state["critic"].average[0]):
        np.testing.assert_array_equal(values[0], critic.weights[0])
    assert report.missing == ["actor/dense/kernel", "actor/dense/bias"]


def test_layers_in_keras_files_are_found_by_name_where_the_models_around_them_differ(tmp_path: Path) -> None:
    def backbone() -> keras.Model:
        inputs = keras.Input((4,))
        hidden = layers.Dense(4, name="block")(inputs)
        return keras.Model(inputs, layers.Dense(4)(layers.Dense(4)(hidden)), name="backbone")

    inner = backbone()
    inputs = keras.Input((4,))
    keras.Model(inputs, layers.Dense(2)(inner(inputs))).save(tmp_path / "outer.keras")
    inputs, other = keras.Input((4,)), backbone()
    learner = research.supervised(keras.Model(inputs, layers.Dense(3, name="classes")(other(inputs))), loss="mse")
    state, report = research.restore(learner, tmp_path / "outer.keras", partial=True)
    np.testing.assert_array_equal(state.trainable[0], inner.get_layer("block").kernel)
    # "dense" is the name of a layer inside the backbone and of one outside of it: neither is taken for the other.
    assert report.missing == ["dense/kernel", "dense/bias", "classes/kernel", "classes/bias"]


def test_a_frozen_kernel_behind_lora_starts_from_a_file_without_lora(tmp_path: Path) -> None:
    model = network()
    model.save_weights(tmp_path / "base.weights.h5")
    adapted = network()
    adapted.layers[0].enable_lora(2)
    learner = research.supervised(adapted, loss="mse")
    state, report = research.restore(learner, tmp_path / "base.weights.h5", partial=True)
    values = weights(learner, state)
    np.testing.assert_array_equal(values["sequential/dense/kernel"], model.layers[0].kernel)
    assert report.missing == ["sequential/dense/lora_kernel_a", "sequential/dense/lora_kernel_b"]


def test_names_that_frozen_and_trainable_layers_share_are_not_guessed(tmp_path: Path) -> None:
    def partly_frozen(*frozen: int) -> research.Learner:
        model = keras.Sequential([keras.Input((4,)), *(layers.Dense(4) for _ in range(3))])
        for i in frozen:
            model.layers[i].trainable = False
        return research.supervised(model, loss="mse")

    saved = partly_frozen(0)
    state = saved.init()
    checkpoint.save(tmp_path / "checkpoints", 1, state, saved.names)
    restored, _ = research.restore(saved, tmp_path, partly_frozen(0).init())
    np.testing.assert_array_equal(restored.non_trainable[0], state.non_trainable[0])
    with pytest.raises(research.InvalidArgument, match="names several weights, of a frozen and of a trainable layer"):
        research.restore(partly_frozen(), tmp_path)


def header(entries: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


def hdf5(path: Path, fill: Callable[[Any], Any]) -> bytes:
    with h5py.File(path, "w") as file:
        fill(file)
    data = path.read_bytes()
    path.unlink()
    return data


DAMAGED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "empty": ("a.safetensors", lambda path: b"", "it is empty"),
    "wrong magic": ("a.safetensors", lambda path: b"GGUF" * 8, "header too large"),
    "header longer than the file": ("a.safetensors", lambda path: header({}, length=500), "invalid header length"),
    "header of an exabyte": ("a.safetensors", lambda path: header({}, length=1 << 60), "header too large"),
    "truncated safetensors": ("a.safetensors", lambda path: header({"a": entry(0, 8)}, b"1234"), "not fully covered"),
    "offsets out of range": ("a.safetensors", lambda path: header({"a": entry(0, 1 << 50, (1 << 48,))}), "not fully covered"),
    "offsets overlap": ("a.safetensors", lambda p: header({"a": entry(0, 8), "b": entry(4, 12)}, b"1" * 12), "invalid offset"),
    "a directory": ("a.safetensors", lambda path: path.mkdir(), "it has no checkpoint and no model.safetensors"),
    "missing": ("a.safetensors", lambda path: None, "it is missing"),
    "unknown suffix": ("a.ckpt", lambda path: b"data", "its name ends in '.ckpt'"),
    "no zip": ("a.keras", lambda path: b"data", "it is no intact .keras file"),
    "truncated h5": ("a.h5", lambda path: hdf5(path, lambda f: f.create_dataset("x", data=np.ones(99)))[:500], "no intact file"),
    "h5 without layers": ("a.h5", lambda path: hdf5(path, lambda file: file.create_group("layers/dense")), "it holds no layers"),
    "h5 of objects": ("a.h5", lambda path: hdf5(path, lambda f: f.create_dataset("vars/0", data="text")), "expected numbers"),
    "h5 that claims more than it has": (
        "a.h5", lambda path: hdf5(path, lambda file: file.create_dataset("vars/0", (1 << 40,), "float32")), "has fewer bytes",
    ),
    "h5 with data in another file": (
        "a.h5",
        lambda path: hdf5(path, lambda f: f.create_dataset("vars/0", (2,), "u1", external=[("/etc/passwd", 0, 2)])),
        "lies in another file",
    ),
    "h5 with a link to another file": (
        "a.h5", lambda path: hdf5(path, lambda f: f.__setitem__("layers", h5py.ExternalLink("x.h5", "/"))), "it holds no layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line(name: str, content: Any, message: str, tmp_path: Path) -> None:
    data = content(tmp_path / name)
    if isinstance(data, bytes):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(research.InvalidArgument) as error:
        research.restore(build(), tmp_path / name)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.safetensors"}, "it names '../x.safetensors', which is outside of its folder"),
        ({"a": "/etc/passwd"}, "which is outside of its folder"),
        ({"a": ".."}, "which is no file in its folder"),
        ({"a": "gone.safetensors"}, "which is no file in its folder"),
        ({"a": "x.safetensors"}, "it names 'a' in x.safetensors, which does not hold it"),
        ([], "it holds no weight_map"),
    ],
    ids=["parent", "absolute", "dots", "gone", "name", "list"],
)
def test_an_index_leads_nowhere_else(weight_map: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path, folder):
        safetensors.numpy.save_file({"b": np.ones(2, np.float32)}, place / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(research.InvalidArgument) as error:
        research.restore(build(), folder)
    assert message in str(error.value)


def test_an_archive_is_read_in_place_or_not_at_all(source: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(source[0] / "model.keras") as archive:
        data = archive.read("model.weights.h5")
    for name, compression in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / f"{name}.keras", "w", compression) as archive:
            archive.writestr("model.weights.h5", data)
    _, report = research.restore(build(), tmp_path / "stored.keras")
    assert not report.missing
    with pytest.raises(research.InvalidArgument, match=r"model\.weights\.h5 is compressed or encrypted in it"):
        research.restore(build(), tmp_path / "deflated.keras")
    content = (tmp_path / "stored.keras").read_bytes()
    for size in (100, len(content) // 2, len(content) - 10):
        (tmp_path / "cut.keras").write_bytes(content[:size])
        with pytest.raises(research.InvalidArgument, match="it is no intact"):
            research.restore(build(), tmp_path / "cut.keras")


def test_a_damaged_checkpoint_is_not_read(source: Any, tmp_path: Path) -> None:
    learner = build()
    path = checkpoint.save(tmp_path / "checkpoints", 1, learner.init(), learner.names)
    file = max(path.rglob("*"), key=lambda each: each.stat().st_size if each.is_file() else 0)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(research.InvalidArgument, match="has the wrong checksum"):
        research.restore(learner, path)
    with (
        pytest.raises(research.InvalidArgument, match="no intact checkpoint is left"),
        pytest.warns(UserWarning, match="damaged"),
    ):
        research.restore(learner, tmp_path)


def test_leaves_without_a_sharding_of_their_own_stay_where_they_were(source: Any) -> None:
    learner = build()
    restored, _ = research.restore(learner, source[0] / "run")
    assert not restored.trainable[0].committed  # as learner.init() makes them: a step is compiled once
    one = jax.device_put(learner.init(), NamedSharding(distributed.mesh(jax.devices()[:1], data=1), P()))
    assert research.restore(learner, source[0] / "run", one)[0].trainable[0].sharding == one.trainable[0].sharding
