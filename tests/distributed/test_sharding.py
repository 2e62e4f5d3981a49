"""On any mesh a learner computes what it does on one device, its state lies as the layout says, and nothing compiles twice."""

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
from cases import first_quick
from jax.sharding import PartitionSpec as P
from keras import layers

import research
from research import Refused, compiled, parallel
from research.gathering import gathering
from research.transforms import accumulate, equations

ROOT = Path(__file__).parent.parent
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
    x = given = keras.Input((16,), dtype="int32")
    x = layers.Embedding(40, 32)(x)
    x = x + layers.MultiHeadAttention(8, 4, dropout=0.1)(layers.LayerNormalization()(x), layers.LayerNormalization()(x))
    x = x + layers.Dense(32)(layers.Dense(128, "gelu")(x))
    return keras.Model(given, layers.Dense(8)(layers.GlobalAveragePooling1D()(x)))


MODELS = {"mlp": mlp, "norms": norms, "convolutions": convolutions, "attention": attention}


def examples(model: str, n: int = 160) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 40, (n, 16)).astype("int32") if model == "attention" else rng.normal(size=(n, 16)).astype("float32")
    return x, rng.integers(0, 8, n).astype("int32")


def build(model: str, optimizer: Any = None) -> research.Learner:
    keras.utils.set_random_seed(0)
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    return research.supervised(MODELS[model](), loss=CLASSES, optimizer=optimizer, metrics=["accuracy"])


def trained(learner: research.Learner, data: research.Batches, state: Any, steps: int, start: int = 0) -> tuple[Any, list[float]]:
    losses: list[float] = []
    told = {"log_every": 1, "log": lambda entry: losses.append(entry.values["loss"])}
    state, _ = research.train(learner, data, steps=steps, start=start, state=state, **told)
    return state, losses


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_any_mesh_trains_like_one_device(model: str, axes: str) -> None:
    x, y = examples(model)
    alone = build(model)
    state, losses = trained(alone, research.arrays(x, y, batch_size=16), alone.init(), 20)
    mesh = parallel.mesh(**MESHES[axes])
    learner, start = parallel.born(lambda: build(model), mesh)
    before = jax.tree.map(lambda leaf: leaf.sharding, start)
    data = parallel.spread(research.arrays(x, y, batch_size=16), mesh)
    sharded, found = trained(learner, data, start, 20)
    np.testing.assert_allclose(found, losses, rtol=2e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(sharded.trainable), state.trainable, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(path))
    after = jax.tree.map(lambda leaf: leaf.sharding, sharded)
    assert jax.tree.all(jax.tree.map(lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), before, after, sharded))


@pytest.mark.parametrize("axes", first_quick(["all", "data"]))
def test_one_program_serves_all_steps_and_batches_from_the_host(axes: str, caplog: pytest.LogCaptureFixture) -> None:
    x, y = examples("mlp", 72)
    mesh = parallel.mesh(**MESHES[axes])
    alone = build("mlp")
    _, losses = trained(alone, research.arrays(x, y, batch_size=16), alone.init(), 15)
    learner = parallel.shard(build("mlp"), mesh)
    data = parallel.spread(research.arrays(x, y, batch_size=16, resident_bytes=0), mesh)
    assert data.batch(0).x.sharding.spec[0] is not None
    assert data.batch(4).x.shape == (8, 16)  # an epoch's last
    assert compiled.training(learner, data, learner.init()).capacity == 1  # side by side they would come back to the host
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        _, found = trained(learner, data, None, 15)
    np.testing.assert_allclose(found, losses, rtol=2e-6)
    programs = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage() and "train_steps" in r.getMessage()]
    assert len(programs) <= 2  # one for whole batches, one for the last


@pytest.mark.parametrize("axes", first_quick(["data x fsdp", "fsdp"]))
def test_weights_are_split_and_gathered_where_they_are_used(axes: str) -> None:
    mesh = parallel.mesh(**MESHES[axes])
    learner = parallel.shard(build("mlp", keras.optimizers.Adam()), mesh)
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
    assert products <= activations | gradients  # two examples on each device, whole features, and whole kernels
    assert products & activations
    assert products & gradients


@pytest.mark.slow
def test_a_gradient_in_parts_gathers_inside_its_loop() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16,)), layers.Dense(64, "relu"), layers.Dense(64, "relu"), layers.Dense(8)])
    options = {"loss": CLASSES, "optimizer": keras.optimizers.SGD(0.1)}
    learner = research.supervised(model, **options, gradient_transform=lambda gradient: accumulate(gradient, 2))
    whole = research.supervised(model, **options)
    x, y = examples("mlp")
    batch = research.Batch(x[:16], y[:16])
    alone, _ = jax.jit(whole.train)(whole.init(), batch)
    sharded = parallel.shard(learner, parallel.mesh(fsdp=8))
    state, _ = jax.jit(sharded.train)(sharded.init(), batch)
    np.testing.assert_allclose(state.trainable[0], alone.trainable[0], rtol=1e-5, atol=1e-6)
    loops = [e for e in equations(jax.make_jaxpr(sharded.train)(sharded.init(), batch).jaxpr) if e.primitive.name == "scan"]
    inside = [e.primitive.name for loop in loops for e in equations(loop.params["jaxpr"].jaxpr)]
    assert inside.count("sharding_constraint") >= 3  # two kernels on the way forth, one on the way back
    assert "optimization_barrier" in inside  # which is gathered anew there


def test_what_is_computed_again_is_gathered_again() -> None:
    mesh = parallel.mesh(fsdp=8)
    whole, split = jax.NamedSharding(mesh, P()), jax.NamedSharding(mesh, P("fsdp"))
    weight, x = jnp.asarray(RNG.normal(size=(64, 64)), jnp.float32), jnp.asarray(RNG.normal(size=(8, 64)), jnp.float32)

    def gradient(weight: Any, x: Any) -> Any:
        block = jax.checkpoint(lambda weight, x: jnp.tanh(x @ weight) @ weight)
        return jax.grad(lambda weight: jnp.sum(block(weight, x)))(weight)

    program = gathering(gradient, whole)
    found = jax.jit(program)(jax.device_put(weight, split), x)
    np.testing.assert_allclose(found, jax.jit(gradient)(weight, x), rtol=1e-5, atol=1e-5)
    again = [e for e in equations(jax.make_jaxpr(program)(weight, x).jaxpr) if e.primitive.name in ("checkpoint", "remat2")]
    inside = [e.primitive.name for block in again for e in equations(block.params["jaxpr"])]
    assert inside.count("sharding_constraint") == 2  # for what is computed again, and on the way back


def test_every_device_has_its_share_of_each_part_of_a_batch() -> None:
    model = keras.Sequential([keras.Input((16,)), layers.Dense(64, "relu"), layers.Dense(8)])
    learner = research.supervised(model, loss="mse", optimizer="sgd", gradient_transform=lambda g: accumulate(g, 4))
    sharded = parallel.shard(learner, parallel.mesh(data=8))
    batch = research.Batch(np.ones((64, 16), "float32"), np.ones((64, 8), "float32"))
    program = jax.jit(sharded.train).lower(sharded.init(), batch).compile().as_text()
    assert "f32[2,64]" in program  # 64 examples, four parts, eight devices
    assert not re.search(r" (all-gather|all-to-all|collective-permute)", program)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data", "all"])
def test_adam_magnifies_little(axes: str) -> None:
    x, y = examples("attention")
    alone = build("attention", keras.optimizers.AdamW(1e-3))
    _, losses = trained(alone, research.arrays(x, y, batch_size=16), alone.init(), 20)
    mesh = parallel.mesh(**MESHES[axes])
    learner, start = parallel.born(lambda: build("attention", keras.optimizers.AdamW(1e-3)), mesh)
    _, found = trained(learner, parallel.spread(research.arrays(x, y, batch_size=16), mesh), start, 20)
    np.testing.assert_allclose(found, losses, rtol=1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_goes_on_on_any_other(tmp_path: Any) -> None:
    from research import checkpoint

    x, y = examples("mlp")
    data = research.arrays(x, y, batch_size=16)
    alone = build("mlp")
    _, losses = trained(alone, data, alone.init(), 10)
    first = parallel.mesh(**MESHES["fsdp x tensor"])
    learner = parallel.shard(build("mlp"), first)
    state, found = trained(learner, parallel.spread(data, first), learner.init(), 5)
    with checkpoint.saving(tmp_path, learner.names) as save:
        save(5, state, {"loss": found[-1]})
    for axes in ({"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2}):
        devices = jax.devices()[: int(np.prod(list(axes.values())))]
        mesh = parallel.mesh(devices, **axes)
        other = parallel.shard(build("mlp"), mesh)
        at = checkpoint.restore(checkpoint.newest(tmp_path, print), other.init(), other.names)
        _, rest = trained(other, parallel.spread(data, mesh), at.state, 10, start=5)
        np.testing.assert_allclose(rest, losses[5:], rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 30])
def test_evaluation_and_prediction_are_exact_where_batches_do_not_divide(size: int) -> None:
    x, y = examples("norms", 75)
    mesh = parallel.mesh(data=2, fsdp=4)
    alone, learner = build("norms"), parallel.shard(build("norms"), mesh)
    held = research.arrays(x, y, batch_size=size, shuffle=False)
    spread = parallel.spread(held, mesh, divides=False)
    wanted, found = research.evaluate(alone, held, alone.init()), research.evaluate(learner, spread, learner.init())
    assert found == pytest.approx(wanted, rel=1e-6)
    outputs = research.predict(learner, spread, learner.init())
    np.testing.assert_allclose(outputs, research.predict(alone, held, alone.init()), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_long_evaluation_comes_to_its_end() -> None:
    """Programs that wait for each other are run by a thread for each device: with too many ahead, all wait for ever."""
    devices = 8
    code = (
        "import numpy as np, research, keras\n"
        "from research import parallel\n"
        "stack = [keras.layers.Dense(64, activation='tanh') for _ in range(8)]\n"
        "model = keras.Sequential([keras.Input((64,)), *stack])\n"
        f"mesh = parallel.mesh(fsdp={devices})\n"
        "learner = parallel.shard(research.supervised(model, loss='mse'), mesh)\n"
        f"x = np.ones(({devices} * 1000, 64), 'float32')\n"
        f"data = parallel.spread(research.arrays(x, x, batch_size={devices}), mesh)\n"
        "print(len(research.evaluate(learner, data, learner.init())), research.predict(learner, data, learner.init()).shape)\n"
    )
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.stdout == f"1 ({1000 * devices}, 64)\n", done.stderr


@pytest.mark.slow
def test_slots_and_averages_lie_as_their_weights_do() -> None:
    learner = build("attention", keras.optimizers.AdamW(1e-3))
    mesh = parallel.mesh(fsdp=4, tensor=2)
    placed = parallel.shardings(learner.names, jax.eval_shape(learner.init), mesh, parallel.tensor)
    specs = dict(zip(learner.names.trainable, (each.spec for each in placed.trainable), strict=True))
    for name, each in zip(learner.names.optimizer, placed.optimizer, strict=True):
        owner = name.partition("/")[2]
        assert each.spec == specs.get(owner, P()), name
    query = next(name for name in specs if name.endswith("query/kernel"))
    output = next(name for name in specs if name.endswith("attention_output/kernel"))
    assert (specs[query], specs[output]) == (P("fsdp", "tensor", None), P("tensor", None, "fsdp"))
    assert next(spec for name, spec in specs.items() if name.endswith("embeddings"))[0] == "tensor"


def test_rules_take_the_first_that_matches_and_keras_layouts_are_layouts() -> None:
    mesh = parallel.mesh(data=4, tensor=2)
    weights = {"sequential/dense/kernel": (16, 64), "sequential/dense_1/kernel": (64, 8), "sequential/dense/bias": (64,)}
    layout = parallel.rules((r"dense/kernel", P(None, "tensor")), (r"kernel", P("tensor", None)))
    assert list(layout(weights, mesh).values()) == [P(None, "tensor"), P("tensor", None), P()]
    devices = keras.distribution.DeviceMesh((4, 2), ["data", "tensor"], [f"cpu:{i}" for i in range(8)])
    layouts = keras.distribution.LayoutMap(devices)
    layouts[".*dense/kernel"] = (None, "tensor")
    assert list(parallel.keras_layout(layouts)(weights, mesh).values()) == [P(None, "tensor"), P(), P()]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: parallel.mesh(data=3), "data=3 on 8 devices; expected sizes that multiply to 8"),
        (lambda: parallel.mesh(data=-1, fsdp=-1), "data=-1, fsdp=-1 on 8 devices"),
        (lambda: parallel.mesh(model=8), "model is given; expected some of data, fsdp, tensor"),
        (lambda: parallel.mesh(), "no axis is given"),
        (lambda: shardings(parallel.rules(("denze", P("fsdp")))), "'denze' is taken by no weight"),
        (lambda: shardings(parallel.rules(("bias", P(None, "fsdp")))), "no more entries than the weight has axes"),
        (lambda: shardings(parallel.rules(("kernel", P("tensor")))), "'tensor', which the mesh lacks"),
        (lambda: shardings(parallel.rules(("dense_1/bias", P("fsdp")))), "(10,) can't be split into 8 parts along axis 0"),
        (lambda: parallel.spread(research.arrays(np.ones((40, 1)), batch_size=12), parallel.mesh(data=8)), "choose 8 or 16"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(wrong: Any, said: str) -> None:
    with pytest.raises(Refused) as refusal:
        wrong()
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def shardings(layout: Any) -> Any:
    model = keras.Sequential([keras.Input((16,)), layers.Dense(64), layers.Dense(10)])
    learner = research.supervised(model, loss="mse")
    return parallel.shardings(learner.names, jax.eval_shape(learner.init), parallel.mesh(fsdp=8), layout)


def test_dropout_draws_the_same_whatever_the_number_of_devices() -> None:
    weights = RNG.integers(0, 1000, (16, 16)).astype("float32")  # a sum of some of them is exact, and tells which

    def drawn(mesh: Any) -> np.ndarray:
        keras.utils.set_random_seed(0)
        still = layers.EinsumDense("bi,i->bi", (16,), kernel_initializer="ones")  # there has to be something to train
        model = keras.Sequential([keras.Input((16,)), still, layers.Dropout(0.5)])
        learner = research.supervised(model, loss=lambda y, outputs: keras.ops.sum(y * outputs, -1), optimizer="sgd")
        learner = learner if mesh is None else parallel.shard(learner, mesh)
        _, logs = jax.jit(learner.train)(learner.init(), research.Batch(jnp.ones((16, 16)), jnp.asarray(weights)))
        return np.asarray(logs["loss"])

    wanted = drawn(None)
    for devices in (2, 4, 8):
        assert drawn(parallel.mesh(jax.devices()[:devices], data=devices)) == wanted


@pytest.mark.slow
def test_an_experiment_runs_on_a_mesh_and_says_what_does_not_fit(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "run.py"), "digits", "--steps", "60", *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    found = []
    for name, options in (("one", []), ("many", ["--mesh", "data=2,fsdp=-1"])):
        done = run("--run-dir", name, *options)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / name / "summary.json").read_text())["metrics"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    for options, said in (
        (["--mesh", "data"], "--mesh data: expected axes and sizes"),
        (["--layout", "fsdp"], "--layout fsdp without --mesh"),
        (["--mesh", "data=8", "--batch-size", "30"], "choose 24 or 32"),
    ):
        done = run(*options)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert said in done.stderr
