"""On any mesh a learner computes what one device computes, its state keeps its shardings, and each program compiles once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import slow_after_first
from jax.sharding import PartitionSpec as P
from keras import layers

import research
from research import InvalidArgument, distributed
from research.distributed.gather import gather_at_use
from research.training import programs
from research.transforms.accumulate import accumulate
from research.transforms.jaxpr import equations, own_equations, scan

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "data x tensor": {"data": 4, "tensor": 2},
    "fsdp x tensor": {"fsdp": 4, "tensor": -1},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
CLASSES = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp() -> keras.Model:
    return keras.Sequential([keras.Input((16,)), layers.Dense(64, "relu"), layers.Dropout(0.3), layers.Dense(8)])


def norms() -> keras.Model:
    stack = [layers.Dense(64), layers.BatchNormalization(), layers.GaussianNoise(0.1), layers.Dense(8, kernel_regularizer="l2")]
    return keras.Sequential([keras.Input((16,)), *stack])


def convolutions() -> keras.Model:
    stack = [layers.Reshape((4, 4, 1)), layers.Conv2D(16, 3, padding="same"), layers.SpatialDropout2D(0.2), layers.Flatten()]
    return keras.Sequential([keras.Input((16,)), *stack, layers.Dense(8)])


def attention() -> keras.Model:
    x = inputs = keras.Input((16,), dtype="int32")
    x = layers.Embedding(40, 32)(x)
    x = x + layers.MultiHeadAttention(8, 4, dropout=0.1)(layers.LayerNormalization()(x), layers.LayerNormalization()(x))
    x = x + layers.Dense(32)(layers.Dense(128, "gelu")(x))
    return keras.Model(inputs, layers.Dense(8)(layers.GlobalAveragePooling1D()(x)))


MODELS = {"mlp": mlp, "norms": norms, "convolutions": convolutions, "attention": attention}


def examples(model: str, n: int = 160) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 40, (n, 16)).astype("int32") if model == "attention" else rng.normal(size=(n, 16)).astype("float32")
    return x, rng.integers(0, 8, n).astype("int32")


def build(model: str, optimizer: Any = None) -> research.Learner:
    keras.utils.set_random_seed(0)
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    return research.supervised(MODELS[model](), loss=CLASSES, optimizer=optimizer, metrics=["accuracy"])


def train(learner: research.Learner, data: research.Batches, state: Any, steps: int, start: int = 0) -> tuple[Any, list[float]]:
    losses: list[float] = []
    logging = {"log_every": 1, "log": lambda entry: losses.append(entry.values["loss"])}
    state, _ = research.train(learner, data, steps=steps, start=start, state=state, **logging)
    return state, losses


@pytest.mark.sample(6)
@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_every_mesh_trains_like_one_device(model: str, axes: str) -> None:
    x, y = examples(model)
    single = build(model)
    state, losses = train(single, research.from_arrays(x, y, batch_size=16), single.init(), 20)
    mesh = distributed.mesh(**MESHES[axes])
    learner, start = distributed.build_sharded(lambda: build(model), mesh)
    shardings_before = jax.tree.map(lambda leaf: leaf.sharding, start)
    data = distributed.shard_batches(research.from_arrays(x, y, batch_size=16), mesh)
    sharded, sharded_losses = train(learner, data, start, 20)
    np.testing.assert_allclose(sharded_losses, losses, rtol=2e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(sharded.trainable), state.trainable, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(path))
    unchanged = jax.tree.map(lambda a, leaf: a.is_equivalent_to(leaf.sharding, leaf.ndim), shardings_before, sharded)
    assert jax.tree.all(unchanged)


@pytest.mark.slow
@pytest.mark.parametrize("axes", slow_after_first(["all", "data"]))
def test_one_program_runs_all_steps_with_batches_from_the_host(axes: str, caplog: pytest.LogCaptureFixture) -> None:
    x, y = examples("mlp", 72)
    mesh = distributed.mesh(**MESHES[axes])
    single = build("mlp")
    _, losses = train(single, research.from_arrays(x, y, batch_size=16), single.init(), 15)
    learner = distributed.shard(build("mlp"), mesh)
    data = distributed.shard_batches(research.from_arrays(x, y, batch_size=16, resident_bytes=0), mesh)
    assert data.batch(0).x.sharding.spec[0] is not None
    assert data.batch(4).x.shape == (8, 16)  # the last of an epoch
    assert (
        programs.train_program(learner, data, learner.init()).capacity == 1
    )  # stacked, batches would be copied back to the host
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        _, sharded_losses = train(learner, data, None, 15)
    np.testing.assert_allclose(sharded_losses, losses, rtol=2e-6)
    messages = [record.getMessage() for record in caplog.records]
    compilations = [message for message in messages if "Compiling" in message and "train_steps" in message]
    assert len(compilations) <= 2  # one for full batches, one for the last


@pytest.mark.slow
@pytest.mark.parametrize("axes", slow_after_first(["data x fsdp", "fsdp"]))
def test_weights_are_split_and_gathered_where_they_are_used(axes: str) -> None:
    mesh = distributed.mesh(**MESHES[axes])
    learner = distributed.shard(build("mlp", keras.optimizers.Adam()), mesh)
    state = learner.init()
    kernel, slots = state.trainable[0], [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (16, 64)]
    assert kernel.sharding.spec == P(None, "fsdp")
    assert len(slots) == 2
    for leaf in (kernel, *slots):
        assert leaf.addressable_shards[0].data.size * mesh.shape["fsdp"] == leaf.size
    x, y = examples("mlp")
    program = jax.jit(learner.train).lower(state, research.Batch(x[:16], y[:16])).compile().as_text()
    assert "all-gather" in program
    products = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]\S* dot\(", program)}
    activations, gradients = {(2, 64), (2, 8)}, {(16, 64), (64, 16), (64, 8), (8, 64)}
    assert products <= activations | gradients  # two examples per device, all features, complete kernels
    assert products & activations
    assert products & gradients


@pytest.mark.slow
def test_accumulated_gradients_gather_inside_their_loop() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16,)), layers.Dense(64, "relu"), layers.Dense(64, "relu"), layers.Dense(8)])
    options = {"loss": CLASSES, "optimizer": keras.optimizers.SGD(0.1)}
    learner = research.supervised(model, **options, gradient_transform=lambda gradient: accumulate(gradient, 2))
    single = research.supervised(model, **options)
    x, y = examples("mlp")
    batch = research.Batch(x[:16], y[:16])
    expected, _ = jax.jit(single.train)(single.init(), batch)
    sharded = distributed.shard(learner, distributed.mesh(fsdp=8))
    state, _ = jax.jit(sharded.train)(sharded.init(), batch)
    np.testing.assert_allclose(state.trainable[0], expected.trainable[0], rtol=1e-5, atol=1e-6)
    loops = filter(None, map(scan, equations(jax.make_jaxpr(sharded.train)(sharded.init(), batch))))
    inside = [e.primitive.name for loop in loops for e in equations(loop.body)]
    assert inside.count("sharding_constraint") >= 3  # two kernels in the forward pass, one in the backward pass
    assert "optimization_barrier" in inside  # the backward pass gathers again


@pytest.mark.usefixtures("primitives")
def test_recomputation_gathers_again() -> None:
    mesh = distributed.mesh(fsdp=8)
    replicated, split = jax.NamedSharding(mesh, P()), jax.NamedSharding(mesh, P("fsdp"))
    weight, x = jnp.asarray(RNG.normal(size=(64, 64)), jnp.float32), jnp.asarray(RNG.normal(size=(8, 64)), jnp.float32)

    def gradient(weight: Any, x: Any) -> Any:
        block = jax.checkpoint(lambda weight, x: jnp.tanh(x @ weight) @ weight)
        return jax.grad(lambda weight: jnp.sum(block(weight, x)))(weight)

    program = gather_at_use(gradient, replicated)
    result = jax.jit(program)(jax.device_put(weight, split), x)
    np.testing.assert_allclose(result, jax.jit(gradient)(weight, x), rtol=1e-5, atol=1e-5)
    traced = jax.make_jaxpr(program)(weight, x)
    assert [e.primitive.name for e in equations(traced)].count("sharding_constraint") == 4  # two in each pass
    gathered = [e.invars[0] for e in own_equations(traced) if e.primitive.name == "sharding_constraint"]
    assert len(set(gathered)) == len(gathered)  # merged, a complete weight would be kept for the backward pass


def test_a_loop_gathers_the_weights_that_its_body_uses() -> None:
    mesh = distributed.mesh(fsdp=8)
    replicated, split = jax.NamedSharding(mesh, P()), jax.NamedSharding(mesh, P("fsdp"))
    weight, xs = jnp.asarray(RNG.normal(size=(16, 16)) / 4, jnp.float32), jnp.asarray(RNG.normal(size=(5, 8, 16)), jnp.float32)

    def loss(weight: Any, xs: Any) -> Any:
        return jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ weight), h.sum()), xs[0], xs)[0].sum()

    gradient = jax.grad(loss)
    program = gather_at_use(gradient, replicated)
    result = jax.jit(program)(jax.device_put(weight, split), xs)
    np.testing.assert_allclose(result, jax.jit(gradient)(weight, xs), rtol=1e-5, atol=1e-6)
    loops = list(filter(None, map(scan, equations(jax.make_jaxpr(program)(weight, xs)))))
    gathers = [[e.primitive.name for e in equations(loop.body)].count("sharding_constraint") for loop in loops]
    assert gathers == [1, 1]  # forwards and backwards


@pytest.mark.slow
def test_a_recurrent_network_on_a_mesh_learns_as_on_one_device() -> None:
    def build() -> research.Learner:
        keras.utils.set_random_seed(0)
        stack = [layers.Embedding(40, 16, mask_zero=True), layers.LSTM(16), layers.Dense(8)]
        model = keras.Sequential([keras.Input((16,), dtype="int32"), *stack])
        return research.supervised(model, loss=CLASSES, optimizer=keras.optimizers.SGD(0.1))

    batch = research.Batch(*(array[:16] for array in examples("attention")))
    single = build()
    expected, _ = jax.jit(single.train)(single.init(), batch)
    learner = distributed.shard(build(), distributed.mesh(jax.devices()[:2], fsdp=2))
    state, _ = jax.jit(learner.train)(learner.init(), batch)
    for leaf, reference in zip(state.trainable, expected.trainable, strict=True):
        np.testing.assert_allclose(leaf, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_each_accumulated_part_is_spread_over_all_devices() -> None:
    model = keras.Sequential([keras.Input((16,)), layers.Dense(64, "relu"), layers.Dense(8)])
    learner = research.supervised(model, loss="mse", optimizer="sgd", gradient_transform=lambda g: accumulate(g, 4))
    sharded = distributed.shard(learner, distributed.mesh(data=8))
    batch = research.Batch(np.ones((64, 16), "float32"), np.ones((64, 8), "float32"))
    program = jax.jit(sharded.train).lower(sharded.init(), batch).compile().as_text()
    assert "f32[2,64]" in program  # 64 examples in four parts over eight devices
    assert not re.search(r" (all-gather|all-to-all|collective-permute)", program)


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data", "all"])
def test_adam_magnifies_rounding_little(axes: str) -> None:
    x, y = examples("attention")
    single = build("attention", keras.optimizers.AdamW(1e-3))
    _, losses = train(single, research.from_arrays(x, y, batch_size=16), single.init(), 20)
    mesh = distributed.mesh(**MESHES[axes])
    learner, start = distributed.build_sharded(lambda: build("attention", keras.optimizers.AdamW(1e-3)), mesh)
    _, sharded_losses = train(learner, distributed.shard_batches(research.from_arrays(x, y, batch_size=16), mesh), start, 20)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-4)


@pytest.mark.complete
@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_resumes_on_any_other(tmp_path: Any) -> None:
    from research.training import checkpoint

    x, y = examples("mlp")
    data = research.from_arrays(x, y, batch_size=16)
    single = build("mlp")
    _, losses = train(single, data, single.init(), 10)
    first = distributed.mesh(**MESHES["fsdp x tensor"])
    learner = distributed.shard(build("mlp"), first)
    state, first_losses = train(learner, distributed.shard_batches(data, first), learner.init(), 5)
    with checkpoint.async_saver(tmp_path, learner.names) as save:
        save(5, state, {"loss": first_losses[-1]})
    for axes in ({"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2}):
        devices = jax.devices()[: int(np.prod(list(axes.values())))]
        mesh = distributed.mesh(devices, **axes)
        resumed = distributed.shard(build("mlp"), mesh)
        restored = checkpoint.restore(checkpoint.latest(tmp_path, print), resumed.init(), resumed.names)
        _, last_losses = train(resumed, distributed.shard_batches(data, mesh), restored.state, 10, start=5)
        np.testing.assert_allclose(last_losses, losses[5:], rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 30])
def test_evaluation_and_prediction_are_exact_for_batches_that_do_not_divide(size: int) -> None:
    x, y = examples("norms", 75)
    mesh = distributed.mesh(data=2, fsdp=4)
    single, learner = build("norms"), distributed.shard(build("norms"), mesh)
    data = research.from_arrays(x, y, batch_size=size, shuffle=False)
    sharded = distributed.shard_batches(data, mesh, divides=False)
    expected = research.evaluate(single, data, single.init())
    assert research.evaluate(learner, sharded, learner.init()) == pytest.approx(expected, rel=1e-6)
    outputs = research.predict(learner, sharded, learner.init())
    np.testing.assert_allclose(outputs, research.predict(single, data, single.init()), rtol=1e-5, atol=1e-6)


@pytest.mark.complete
@pytest.mark.slow
def test_a_long_evaluation_does_not_deadlock() -> None:
    """A thread per device runs programs that wait for each other: with too many dispatched at once, all wait for ever."""
    devices = 8
    code = (
        "import numpy as np, research, keras\n"
        "from research import distributed\n"
        "stack = [keras.layers.Dense(64, activation='tanh') for _ in range(8)]\n"
        "model = keras.Sequential([keras.Input((64,)), *stack])\n"
        f"mesh = distributed.mesh(fsdp={devices})\n"
        "learner = distributed.shard(research.supervised(model, loss='mse'), mesh)\n"
        f"x = np.ones(({devices} * 1000, 64), 'float32')\n"
        f"data = distributed.shard_batches(research.from_arrays(x, x, batch_size={devices}), mesh)\n"
        "print(len(research.evaluate(learner, data, learner.init())), research.predict(learner, data, learner.init()).shape)\n"
    )
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert result.stdout == f"1 ({1000 * devices}, 64)\n", result.stderr


@pytest.mark.slow
def test_tensor_splits_attention_by_heads_and_embeddings_by_vocabulary() -> None:
    learner = build("attention", keras.optimizers.AdamW(1e-3))
    mesh = distributed.mesh(fsdp=4, tensor=2)
    placed = distributed.state_shardings(learner.names, jax.eval_shape(learner.init), mesh, distributed.tensor)
    specs = dict(zip(learner.names.trainable, (each.spec for each in placed.trainable), strict=True))
    for name, slot in zip(learner.names.optimizer, placed.optimizer, strict=True):
        weight = name.partition("/")[2]
        assert slot.spec == specs.get(weight, P()), name
    query = next(name for name in specs if name.endswith("query/kernel"))
    output = next(name for name in specs if name.endswith("attention_output/kernel"))
    assert (specs[query], specs[output]) == (P("fsdp", "tensor", None), P("tensor", None, "fsdp"))
    assert next(spec for name, spec in specs.items() if name.endswith("embeddings"))[0] == "tensor"


def test_the_first_rule_that_matches_decides_and_keras_layouts_are_layouts() -> None:
    mesh = distributed.mesh(data=4, tensor=2)
    weights = {"sequential/dense/kernel": (16, 64), "sequential/dense_1/kernel": (64, 8), "sequential/dense/bias": (64,)}
    layout = distributed.rules((r"dense/kernel", P(None, "tensor")), (r"kernel", P("tensor", None)))
    assert list(layout(weights, mesh).values()) == [P(None, "tensor"), P("tensor", None), P()]
    devices = keras.distribution.DeviceMesh((4, 2), ["data", "tensor"], [f"cpu:{i}" for i in range(8)])
    layouts = keras.distribution.LayoutMap(devices)
    layouts[".*dense/kernel"] = (None, "tensor")
    assert list(distributed.keras_layout(layouts)(weights, mesh).values()) == [P(None, "tensor"), P(), P()]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: distributed.mesh(data=3), "data=3 on 8 devices; expected sizes that multiply to 8"),
        (lambda: distributed.mesh(data=-1, fsdp=-1), "data=-1, fsdp=-1 on 8 devices"),
        (lambda: distributed.mesh(model=8), "unknown axis 'model'; expected some of data, fsdp, tensor"),
        (lambda: distributed.mesh(), "no axis; expected some of"),
        (lambda: shardings(distributed.rules(("denze", P("fsdp")))), "the rule 'denze' decides for no weight"),
        (lambda: shardings(distributed.rules(("bias", P(None, "fsdp")))), "no more entries than the weight has axes"),
        (lambda: shardings(distributed.rules(("kernel", P("tensor")))), "'tensor', which the mesh lacks"),
        (lambda: shardings(distributed.rules(("dense_1/bias", P("fsdp")))), "(10,) can't be split into 8 parts along axis 0"),
        (
            lambda: distributed.shard_batches(research.from_arrays(np.ones((40, 1)), batch_size=12), distributed.mesh(data=8)),
            "choose 8 or 16",
        ),
    ],
)
def test_a_mesh_layout_or_batch_that_does_not_fit_raises_one_line(action: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        action()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def shardings(layout: Any) -> Any:
    model = keras.Sequential([keras.Input((16,)), layers.Dense(64), layers.Dense(10)])
    learner = research.supervised(model, loss="mse")
    return distributed.state_shardings(learner.names, jax.eval_shape(learner.init), distributed.mesh(fsdp=8), layout)


@pytest.mark.slow
def test_dropout_draws_the_same_on_any_number_of_devices() -> None:
    weights = RNG.integers(0, 1000, (16, 16)).astype("float32")  # sums of them are exact and identify the dropped ones

    def draw(mesh: Any) -> np.ndarray:
        keras.utils.set_random_seed(0)
        scale = layers.EinsumDense("bi,i->bi", (16,), kernel_initializer="ones")  # a weight to train
        model = keras.Sequential([keras.Input((16,)), scale, layers.Dropout(0.5)])
        learner = research.supervised(model, loss=lambda y, outputs: keras.ops.sum(y * outputs, -1), optimizer="sgd")
        learner = learner if mesh is None else distributed.shard(learner, mesh)
        _, logs = jax.jit(learner.train)(learner.init(), research.Batch(jnp.ones((16, 16)), jnp.asarray(weights)))
        return np.asarray(logs["loss"])

    expected = draw(None)
    for devices in (2, 4, 8):
        assert draw(distributed.mesh(jax.devices()[:devices], data=devices)) == expected


@pytest.mark.slow
def test_an_experiment_runs_on_a_mesh_and_reports_what_does_not_fit(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "research", "run", "digits", "--steps", "60", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    metrics = []
    for name, options in (("single", []), ("mesh", ["--mesh", "data=2,fsdp=-1"])):
        result = run("--run-dir", name, *options)
        assert result.returncode == 0, result.stderr
        metrics.append(json.loads((tmp_path / name / "summary.json").read_text())["metrics"])
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    for options, message in (
        (["--mesh", "data"], "--mesh data: expected axes and sizes"),
        (["--layout", "fsdp"], "--layout fsdp without --mesh"),
        (["--mesh", "data=8", "--batch-size", "30"], "choose 24 or 32"),
    ):
        result = run(*options)
        assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
        assert message in result.stderr
