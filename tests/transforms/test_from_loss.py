"""From a loss written as plain Keras code to a learner: its numbers, its state, and what it refuses."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from keras import layers, ops

import research
from research.distributed import fsdp, mesh, shard
from research.training import checkpoint

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 4)).astype("float32")
Y = RNG.normal(size=(8, 2)).astype("float32")
BATCH = research.Batch(X, Y)
MSE = keras.losses.MeanSquaredError()
MIXED = pytest.mark.promotes  # optax mixes dtypes


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(8), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(2)]
    return keras.Sequential([keras.Input((4,)), *stack])


def regression(model: keras.Model) -> Callable[..., Any]:
    def loss(batch: research.Batch, training: bool) -> Any:
        error = model(batch.x, training=training) - batch.y
        return MSE(batch.y, batch.y + error), {"size": ops.mean(ops.abs(error))}

    return loss


def learner_of(model: keras.Model, optimizer: Any = "adam", **options: Any) -> research.Learner:
    return research.learner(regression(model), model, optimizer, example=BATCH, **options)


def assert_equal(a: Any, b: Any, **tolerance: float) -> None:
    check = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda x, y: check(np.asarray(x), np.asarray(y), **tolerance), a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [lambda: keras.optimizers.Adam(), pytest.param(lambda: optax.adam(1e-3), marks=MIXED)],
    ids=["keras", "optax"],
)
def test_it_trains_and_evaluates_like_supervised_bit_for_bit(optimizer: Callable[[], Any]) -> None:
    def mse(batch: research.Batch, training: bool) -> Any:
        return MSE(batch.y, model(batch.x, training=training)), {}

    model, reference_model = network(), network()
    ours = research.learner(mse, model, optimizer(), example=BATCH)
    reference = research.supervised(reference_model, loss="mse", optimizer=optimizer())
    assert ours.names == reference.names
    a, b = ours.init(), reference.init()
    for _ in range(3):
        (a, ours_logs), (b, logs) = jax.jit(ours.train)(a, BATCH), jax.jit(reference.train)(b, BATCH)
        assert_equal(a, b)
        assert_equal(ours_logs, logs)
    assert_equal(jax.jit(ours.evaluate)(a, BATCH), jax.jit(reference.evaluate)(b, BATCH))
    assert_equal(ours.predict(a, BATCH), reference.predict(b, BATCH))


@pytest.mark.slow
@pytest.mark.parametrize("declared", [True, False])
def test_regularizers_and_add_loss_are_added_by_the_loss_itself(declared: bool) -> None:
    class Penalty(keras.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(ops.mean(x**2))
            return x

    keras.utils.set_random_seed(0)
    stack = [layers.Dense(2, kernel_regularizer="l2", kernel_initializer="ones"), Penalty()]
    model = keras.Sequential([keras.Input((4,)), *stack] if declared else stack)

    def loss(batch: research.Batch, training: bool) -> Any:
        outputs = model(batch.x, training=training)
        return MSE(batch.y, outputs) + sum(model.losses), {}

    state, logs = (learner := research.learner(loss, model, "sgd", example=BATCH)).train(learner.init(), BATCH)
    outputs = X @ np.ones((4, 2), "float32")
    expected = np.mean((outputs - Y) ** 2) + 0.01 * 8 + np.mean(outputs**2)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-6)
    assert not np.array_equal(state.trainable[0], np.ones((4, 2)))


def test_scalars_are_means_over_examples_since_the_last_reset() -> None:
    def loss(batch: research.Batch, training: bool) -> Any:
        return ops.mean(weight * batch.x), {"mean": ops.mean(batch.x)}

    weight = keras.Variable(0.0, name="weight")
    learner = research.learner(loss, [weight], "sgd", example=research.Batch(X[:, 0]))
    parts = [research.Batch(np.full(6, 1.0, "float32")), research.Batch(np.full(2, 5.0, "float32"))]
    for function in (learner.train, learner.evaluate):
        state = learner.init()
        for batch in parts:
            state, logs = jax.jit(function)(state, batch)
        assert float(logs["mean"]) == (6 * 1.0 + 2 * 5.0) / 8
        _, logs = function(learner.reset(state), parts[1])
        assert float(logs["mean"]) == 5.0


def test_padding_does_not_count_in_running_means() -> None:
    def loss(batch: research.Batch, training: bool) -> Any:
        valid = ops.cast(batch.valid, "float32")
        mean = ops.sum(batch.x * valid) / ops.sum(valid)
        return weight * mean, {"mean": mean}

    weight = keras.Variable(0.0, name="weight")
    full, padded = np.array([True] * 4), np.array([True, False, False, False])
    batches = [research.Batch(np.full(4, value, "float32"), valid=valid) for value, valid in ((1.0, full), (6.0, padded))]
    learner = research.learner(loss, weight, "sgd", example=batches[0])
    state = learner.init()
    for batch in batches:
        state, logs = learner.train(state, batch)
    assert float(logs["mean"]) == (4 * 1.0 + 1 * 6.0) / 5


@pytest.mark.slow
def test_evaluation_changes_no_weights_and_keras_objects_keep_theirs() -> None:
    model = network()
    before = [np.array(v.value) for v in model.variables]
    learner = learner_of(model)
    state = learner.init()
    after, _ = jax.jit(learner.evaluate)(state, BATCH)
    assert_equal((after.trainable, after.optimizer), (state.trainable, state.optimizer))
    jax.jit(learner.train, donate_argnums=0)(state, BATCH)
    assert_equal([v.value for v in model.variables], before)


def test_metrics_of_layers_and_metrics_that_the_loss_updates_are_logged() -> None:
    class Watched(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.seen = keras.metrics.Mean(name="seen")

        def call(self, x: Any) -> Any:
            self.seen.update_state(x)
            return x

    def loss(batch: research.Batch, training: bool) -> Any:
        outputs = model(batch.x, training=training)
        error.update_state(batch.y, outputs)
        return MSE(batch.y, outputs), {}

    error = keras.metrics.MeanAbsoluteError(name="error")
    model = keras.Sequential([keras.Input((4,)), Watched(), layers.Dense(2)])
    learner = research.learner(loss, [model, error], "sgd", example=BATCH)
    state, logs = jax.jit(learner.train)(learner.init(), BATCH)
    expected = np.mean(np.abs(Y - np.asarray(model(X))))
    np.testing.assert_allclose([float(logs["seen"]), float(logs["error"])], [X.mean(), expected], rtol=1e-5)
    assert all(not np.asarray(value).any() for name in ("seen", "error") for value in learner.reset(state).metrics[name])


@pytest.mark.slow
def test_a_frozen_teacher_is_part_of_the_state_and_stays_as_it_is() -> None:
    def loss(batch: research.Batch, training: bool) -> Any:
        return MSE(teacher(batch.x, training=False), student(batch.x, training=training)), {}

    teacher, student = network(), network()
    teacher.trainable = False
    learner = research.learner(loss, [student, teacher], "sgd", example=BATCH)
    state = learner.init()
    trained, _ = jax.jit(learner.train)(state, BATCH)
    assert len(state.trainable) == len(student.trainable_variables)
    assert_equal(research.part(learner, trained, teacher), research.part(learner, state, teacher))


@pytest.mark.slow
def test_part_and_write_back_give_each_model_its_own_weights() -> None:
    def loss(batch: research.Batch, training: bool) -> Any:
        return ops.mean(decoder(encoder(batch.x) + keras.random.normal((8, 2), seed=noise)) ** 2), {}

    encoder, decoder = (keras.Sequential([layers.Dense(units)]) for units in (2, 4))
    noise = keras.random.SeedGenerator(3)
    learner = research.learner(loss, [encoder, decoder, noise], "sgd", example=BATCH)
    state, _ = learner.train(learner.init(), BATCH)
    inputs = np.asarray(research.part(learner, state, decoder).trainable[0])
    assert inputs.shape == (2, 4)
    assert not np.array_equal(inputs, decoder.variables[0].numpy())
    research.write_back(state, learner)
    np.testing.assert_array_equal(inputs, decoder.variables[0].numpy())
    assert noise.state.numpy().tolist() == [3, 1]
    with pytest.raises(research.InvalidArgument, match="does not hold 'sequential"):
        research.part(learner, state, network())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", pytest.param(optax.adam(1e-3), marks=MIXED)], ids=["keras", "optax"])
def test_names_are_unique_and_shaped_like_the_state_and_checkpoints_restore_it(optimizer: Any) -> None:
    learner = learner_of(network(), optimizer)
    names = jax.tree.leaves(learner.names)
    assert jax.tree.structure(learner.names) == jax.tree.structure(learner.init())
    assert len(names) == len(set(names))
    state, logs = learner.train(learner.init(), BATCH)
    path = checkpoint.save(Path(tempfile.mkdtemp()) / "checkpoints", 1, state, learner.names, logs)
    assert_equal(checkpoint.restore(path, learner.init(), learner.names).state, state)


@pytest.mark.slow
def test_on_eight_devices_with_split_weights_it_trains_the_same() -> None:
    def wide() -> keras.Model:
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((4,)), layers.Dense(512, "relu"), layers.Dropout(0.5), layers.Dense(2)])

    single, sharded = (learner_of(wide(), keras.optimizers.SGD(0.1, momentum=0.9)) for _ in range(2))
    sharded = shard(sharded, mesh(fsdp=-1), fsdp)
    a, b = single.init(), sharded.init()
    assert b.trainable[0].sharding.spec == P(None, "fsdp")
    assert b.optimizer[2].sharding.spec == P(None, "fsdp")
    for _ in range(3):
        (a, logs), (b, sharded_logs) = jax.jit(single.train)(a, BATCH), jax.jit(sharded.train)(b, BATCH)
    assert_equal(a.trainable, b.trainable, rtol=1e-5, atol=1e-6)
    assert_equal(logs, sharded_logs, rtol=1e-5)


@pytest.mark.slow
def test_gradients_accumulated_in_parts_equal_those_of_the_batch() -> None:
    def linear() -> keras.Model:
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((4,)), layers.Dense(2)])

    together = learner_of(linear(), "sgd")
    in_parts = learner_of(linear(), "sgd", gradient_transform=lambda gradient: research.accumulate(gradient, 4))
    (a, logs), (b, parts_logs) = (learner.train(learner.init(), BATCH) for learner in (together, in_parts))
    assert_equal(a.trainable, b.trainable, rtol=1e-6, atol=1e-7)
    assert_equal(logs, parts_logs, rtol=1e-6)


@pytest.mark.slow
def test_it_is_built_from_shapes_alone_and_trained_by_the_loop() -> None:
    learner, shapes = research.init_abstract(lambda: learner_of(network()))
    assert research.count_parameters(shapes) == 4 * 8 + 8 + 16 + 8 * 2 + 2
    after, _ = jax.eval_shape(learner.train, shapes, BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(shapes)
    data = research.from_arrays(X, Y, batch_size=4)
    learner = learner_of(network(), keras.optimizers.Adam(0.05))
    _, values = research.train(learner, data, epochs=40, evaluations={"val": data})
    assert set(values) == {"loss", "size", "val_loss", "val_size"}
    assert values["val_loss"] < 0.5 * float(np.mean(Y**2))


def bad(loss: Callable[..., Any], models: Any = None, batch: Any = BATCH, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        model = network()
        listed = [model] if models is None else models(model)
        learner = research.learner(lambda batch, training: loss(model, batch, training), listed, "sgd", example=batch, **options)
        return jax.eval_shape(learner.train, jax.eval_shape(learner.init), batch)

    return build


OTHER = keras.Sequential([keras.Input((4,)), layers.Dense(2)], name="other")
SCALE = keras.Variable(1.0, name="scale")


def mse(model: keras.Model, batch: research.Batch, training: bool) -> Any:
    return MSE(batch.y, model(batch.x, training=training))


def assigning(model: keras.Model, batch: research.Batch, training: bool) -> Any:
    SCALE.assign(0.9 * SCALE + 0.1)
    return mse(model, batch, training), {}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (bad(lambda m, b, t: mse(m, b, t)), "the loss returned .*; expected a scalar and a dict of scalars"),
        (bad(lambda m, b, t: ((m(b.x) - b.y) ** 2, {})), r"'loss' has the shape \(8, 2\); expected a scalar"),
        (bad(lambda m, b, t: (mse(m, b, t), {"error": m(b.x) - b.y})), r"'error' has the shape \(8, 2\); expected a scalar"),
        (bad(lambda m, b, t: (mse(m, b, t), {"loss": 0.0})), "a scalar called 'loss'"),
        (bad(lambda m, b, t: (ops.cast(mse(m, b, t), "int32"), {})), "the loss is int32; expected a floating-point scalar"),
        (bad(lambda m, b, t: (mse(m, b, t), {"a": 0.0} if t else {"b": 0.0})), r"the scalars \['b'\], in another call \['a'\]"),
        (
            bad(lambda m, b, t: (mse(m, b, t) + mse(OTHER, b, t), {})),
            "the loss uses 'other/.*/kernel', .* would be a constant",
        ),
        (bad(assigning), "the loss assigns to 'scale', .* the assignment would be lost"),
        (bad(lambda m, b, t: (mse(m, b, t), {}), lambda m: [m, "adam"]), "models holds a str; expected models, layers"),
        (bad(lambda m, b, t: (ops.mean(b.x), {}), lambda m: []), "nothing in `models` has trainable weights"),
    ],
)
def test_a_loss_that_cannot_train_is_refused_in_one_line(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(research.InvalidArgument, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_a_model_that_the_loss_never_uses_is_reported() -> None:
    with pytest.warns(UserWarning, match="Sequential 'other' is in `models`, but the loss never uses it"):
        bad(lambda m, b, t: (mse(m, b, t), {}), lambda m: [m, OTHER])()


def test_without_predict_several_models_give_one_clear_line() -> None:
    def loss(batch: research.Batch, training: bool) -> Any:
        return mse(one, batch, training) + mse(two, batch, training), {}

    one, two = network(), network()
    learner = research.learner(loss, [one, two], "sgd", example=BATCH)
    with pytest.raises(research.InvalidArgument, match=r"2 models .* pass predict="):
        learner.predict(learner.init(), BATCH)


@pytest.mark.slow
def test_flow_matching_is_one_short_loss() -> None:
    """Lipman et al., Flow Matching for Generative Modeling, arXiv:2210.02747: from noise to points on a circle."""

    def flow_matching(batch: research.Batch, training: bool) -> Any:
        noise = keras.random.normal(batch.x.shape, seed=seed)
        time = keras.random.uniform((len(batch.x), 1), seed=seed)
        velocity = field(ops.concatenate([(1 - time) * noise + time * batch.x, time], -1), training=training)
        return ops.mean((velocity - (batch.x - noise)) ** 2), {}

    def sample(batch: research.Batch) -> Any:
        def euler(i: int, x: jax.Array) -> jax.Array:
            return x + field(ops.concatenate([x, jnp.full((len(x), 1), i / 50)], -1)) / 50

        return jax.lax.fori_loop(0, 50, euler, keras.random.normal(batch.x.shape, seed=seed))

    keras.utils.set_random_seed(0)
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 2048)
    data = research.from_arrays(np.stack([np.cos(angles), np.sin(angles)], -1).astype("float32"), batch_size=256)
    seed = keras.random.SeedGenerator(0)
    field = keras.Sequential([keras.Input((3,)), *(layers.Dense(64, "swish") for _ in range(2)), layers.Dense(2)])
    adam = keras.optimizers.Adam(5e-3)
    learner = research.learner(flow_matching, [field, seed], adam, example=data.shapes, predict=sample)
    learner = research.transforms.ema(learner, 0.99)
    state, _ = research.train(learner, data, epochs=60)
    radii = np.linalg.norm(research.predict(learner, data, state), axis=-1)
    assert abs(radii.mean() - 1) < 0.1
    assert radii.std() < 0.25  # the noise that it starts from has 0.66
