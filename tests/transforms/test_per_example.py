"""Gradients of single examples equal a loop over the examples; private training adds known noise to a sum of bounded ones."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import slow_after_first
from keras import layers

import research
from research.core.state import seed_of_part
from research.data import from_arrays, poisson
from research.transforms import accumulate, clip, clip_per_example, epsilon, gradient_noise_scale, noise_for, per_example, private

RNG = np.random.default_rng(0)
ROWS = 6


def dropped_out() -> keras.Model:
    stack = [keras.Input((5,)), layers.Dense(7, "tanh", kernel_regularizer="l2"), layers.Dropout(0.4)]
    return keras.Sequential([*stack, layers.LayerNormalization(), layers.Dense(3)])


def convolutional() -> keras.Model:
    stack = [keras.Input((6, 6, 2)), layers.Conv2D(4, 3, activation="relu"), layers.GroupNormalization(2)]
    return keras.Sequential([*stack, layers.GlobalAveragePooling2D(), layers.Dense(3)])


def recurrent() -> keras.Model:
    return keras.Sequential(
        [keras.Input((5,), dtype="int32"), layers.Embedding(9, 4, mask_zero=True), layers.GRU(5), layers.Dense(3)]
    )


MODELS = {
    "dropout": (dropped_out, RNG.normal(size=(ROWS, 5)).astype("float32")),
    "convolution": (convolutional, RNG.normal(size=(ROWS, 6, 6, 2)).astype("float32")),
    "masked recurrence": (recurrent, RNG.integers(1, 9, (ROWS, 5)).astype("int32") * np.tri(ROWS, 5, 2, dtype="int32")),
}
LABELS = np.arange(ROWS) % 3
WEIGHTS = np.linspace(0.5, 2, ROWS).astype("float32")


def build(name: str) -> tuple[Any, research.State, research.Batch]:
    """Returns a gradient, a state and a batch."""
    make, x = MODELS[name]
    model, batch = make(), research.Batch(jnp.asarray(x), jnp.asarray(LABELS), jnp.asarray(WEIGHTS))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    objective, metrics = research.keras_objective(model, loss=loss, metrics=["accuracy"])
    values = ([v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables))
    return research.gradient(objective), research.State(*values, [], metrics.init()), batch


def loop(gradient: Any, state: research.State, batch: research.Batch) -> tuple[list[Any], list[float]]:
    """Returns each example's gradients and loss, from a batch of it alone."""
    values, losses = [], []
    for i in range(ROWS):
        seeds = [seed_of_part(v, i) if v.dtype == jnp.uint32 else v for v in state.non_trainable]
        alone = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        _, gradients = jax.jit(gradient)(state._replace(non_trainable=seeds), alone)
        values.append(gradients.values)
        losses.append(float(gradients.loss))
    return values, losses


@pytest.mark.sample(2)
@pytest.mark.promotes
@pytest.mark.parametrize("name", slow_after_first(MODELS))
def test_gradients_of_examples_equal_a_loop_over_them(name: str) -> None:
    gradient, state, batch = build(name)
    after, gradients = jax.jit(per_example(gradient))(state, batch)
    expected, losses = loop(gradient, state, batch)
    np.testing.assert_allclose(gradients.loss, losses, rtol=1e-6)
    for i in range(ROWS):
        for a, b in zip(gradients.values, expected[i], strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)
    complete, _ = jax.jit(gradient)(state, batch)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(complete), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.promotes
def test_clipped_gradients_are_the_mean_of_bounded_ones_without_padding() -> None:
    gradient, state, batch = build("dropout")
    values, losses = loop(gradient, state, batch)
    valid = np.arange(ROWS) < 4
    _, gradients = jax.jit(clip_per_example(gradient, 0.7))(state, batch._replace(valid=jnp.asarray(valid)))
    norms = [float(optax.tree.norm(each)) for each in values]
    assert min(norms[:4]) < max(norms[:4])
    assert max(norms[:4]) > 0.7
    for k, mean in enumerate(gradients.values):
        each = [np.asarray(values[i][k]) * min(1, 0.7 / norms[i]) for i in range(4)]
        np.testing.assert_allclose(mean, np.mean(each, 0), rtol=1e-5, atol=1e-6)
    assert float(gradients.weight) == 4
    np.testing.assert_allclose(gradients.loss, np.mean(losses[:4]), rtol=1e-6)


@pytest.mark.promotes
def test_micro_batches_of_clipped_gradients_equal_the_batch() -> None:
    gradient, state, batch = build("convolution")
    clipped = clip_per_example(gradient, 0.5)
    _, once = jax.jit(clipped)(state, batch)
    _, parts = jax.jit(accumulate(clipped, 3))(state, batch)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_layer_with_statistics_of_the_batch_is_named() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.BatchNormalization(name="bn7")], name="net")
    learner = research.supervised(model, loss="mse", **private("sgd", max_norm=1.0, noise=1.0, batch_size=4))
    with pytest.raises(research.InvalidArgument) as error:
        jax.eval_shape(learner.train, learner.init(), research.Batch(jnp.ones((4, 3)), jnp.ones((4, 2))))
    assert str(error.value) == (
        "per_example: the layer 'net/bn7' keeps statistics of the batch, as BatchNormalization does, so that examples' gradients "
        "depend on each other; expected layers without: GroupNormalization or LayerNormalization."
    )


@pytest.mark.promotes
@pytest.mark.parametrize("optimizer", ["keras", "optax"])
def test_the_noise_of_private_training_has_its_deviation_and_is_drawn_anew(optimizer: str) -> None:
    model = keras.Sequential([keras.Input((1,)), layers.Dense(20_000, use_bias=False, kernel_initializer="zeros")])
    inner = keras.optimizers.SGD(1.0) if optimizer == "keras" else optax.sgd(1.0)
    learner = research.supervised(model, loss="mse", **private(inner, max_norm=0.5, noise=3.0, batch_size=10))
    empty = research.Batch(jnp.zeros((4, 1)), jnp.zeros((4, 20_000)), valid=jnp.zeros(4, bool))
    state = learner.init()
    steps = []
    for _ in range(2):
        before = np.asarray(state.trainable[0])
        state, _ = jax.jit(learner.train)(state, empty)
        steps.append(np.asarray(state.trainable[0]) - before)
    for moved in steps:  # an empty batch: nothing but noise of 0.5 * 3 / 10
        assert abs(np.std(moved) / 0.15 - 1) < 0.02
        assert abs(np.mean(moved)) < 0.005
    assert abs(np.corrcoef(steps[0].ravel(), steps[1].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("noise", "epochs", "published", "now"), [(1.3, 15, 1.19, 0.95), (1.1, 60, 3.01, 2.60), (0.7, 45, 7.10, 6.32)]
)
def test_the_accountant_gives_known_values(noise: float, epochs: int, published: float, now: float) -> None:
    """The published ones are of the conversion of Mironov (2017): the accountant's own Renyi divergences give them."""
    dp_accounting = pytest.importorskip("dp_accounting")
    steps, delta, values = round(epochs * 60_000 / 256), 1e-5, []
    event = dp_accounting.PoissonSampledDpEvent(256 / 60_000, dp_accounting.GaussianDpEvent(noise))
    for order in [*np.arange(1.1, 11, 0.1), *range(11, 64)]:
        converted = dp_accounting.rdp.RdpAccountant([order]).compose(event, steps).get_epsilon(delta)
        divergence = converted - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)
        values.append(divergence - math.log(delta) / (order - 1))
    assert round(min(values), 2) == published
    found = epsilon(noise=noise, batch_size=256, examples=60_000, steps=steps, delta=delta)
    assert round(found, 2) == now


def test_the_noise_scale_is_estimated_without_bias() -> None:
    mean, deviation, examples = np.array([0.3, -0.2, 0.1, 0.0]), 0.5, 16
    draws = RNG.normal(mean, deviation, (4000, examples, 4)).astype("float32")
    gradients = research.Gradients([jnp.asarray(draws)], jnp.zeros((4000, examples)), jnp.ones((4000, examples)))
    values = jax.vmap(lambda g: g.values[0].mean(0))(gradients)
    scales = jax.vmap(gradient_noise_scale)(gradients)
    squares = np.sum(np.square(values), -1)
    variances = np.asarray(scales) * squares / (1 + np.asarray(scales) / examples)  # of the ratio its parts
    assert abs(np.mean(variances) / (4 * deviation**2) - 1) < 0.02


@pytest.mark.promotes
def test_clip_is_the_clipping_of_keras_and_of_optax() -> None:
    results = []
    for options in (
        {"gradient_transform": lambda gradient: clip(gradient, 0.1), "optimizer": optax.sgd(1.0)},
        {"optimizer": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))},
        {"optimizer": keras.optimizers.SGD(1.0, global_clipnorm=0.1)},
    ):
        keras.utils.set_random_seed(1)
        learner = research.supervised(dropped_out(), loss="mse", **options)
        batch = research.Batch(jnp.asarray(MODELS["dropout"][1]), jnp.ones((ROWS, 3)))
        results.append(jax.jit(learner.train)(learner.init(), batch)[0].trainable)
    for a, b, c in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(a, c, rtol=1e-6, atol=1e-7)


@pytest.mark.promotes
def test_influence_of_training_examples_is_a_short_use() -> None:
    """TracIn (Pruthi et al., 2020): the example whose step lowers the loss of another the most is the one most like it."""
    gradient, state, batch = build("convolution")

    def influence(state: research.State, train: research.Batch, test: research.Batch) -> jax.Array:
        flat = [
            jax.vmap(lambda each: jnp.concatenate([leaf.ravel() for leaf in each]))(per_example(gradient)(state, data)[1].values)
            for data in (train, test)
        ]
        return flat[0] @ flat[1].T

    scores = jax.jit(influence)(state, batch, batch)
    np.testing.assert_allclose(scores, scores.T, rtol=1e-5, atol=1e-6)
    assert (np.diag(scores) > 0).all()


def test_poisson_batches_hold_each_example_with_the_same_probability() -> None:
    x = np.arange(400.0)
    data = poisson(from_arrays(x, np.arange(400), batch_size=40), seed=3)
    assert (data.steps_per_epoch, data.shapes.x.shape) == (10, (78,))
    batches = [data.batch(step) for step in range(500)]
    sizes = [int(batch.valid.sum()) for batch in batches]
    assert abs(np.mean(sizes) - 40) < 1
    assert abs(np.std(sizes) - 6) < 0.6  # of a binomial distribution, not 0
    drawn = np.concatenate([batch.x[batch.valid] for batch in batches])
    assert abs(np.corrcoef(np.bincount(drawn.astype(int), minlength=400), x)[0, 1]) < 0.15
    assert all(len(np.unique(batch.x[batch.valid])) == size for batch, size in zip(batches, sizes, strict=True))
    assert all((batch.x[~batch.valid] == 0).all() and (batch.y[batch.valid] == batch.x[batch.valid]).all() for batch in batches)
    rows = data.resident.rows(2, 2)
    np.testing.assert_array_equal(data.resident.source().x[rows], np.concatenate([batches[2].x, batches[3].x]))
    small = poisson(from_arrays(x, batch_size=40), capacity=40, seed=3)
    assert max(int(small.batch(step).valid.sum()) for step in range(50)) == 40


@pytest.mark.promotes
def test_the_search_for_a_noise_says_nothing_about_what_it_tried(caplog: pytest.LogCaptureFixture) -> None:
    assert noise_for(epsilon=3.0, batch_size=256, examples=1437, steps=180, delta=1e-5) == pytest.approx(3.745, abs=1e-3)
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("target", [0.5, 3.0, 20.0])
def test_the_noise_for_an_epsilon_is_the_inverse(target: float) -> None:
    sampling = {"batch_size": 256, "examples": 10_000, "steps": 500, "delta": 1e-5}
    noise = noise_for(epsilon=target, **sampling)
    assert epsilon(noise=noise, **sampling) == pytest.approx(target, rel=1e-3)


def test_private_training_learns_and_its_batches_go_through_the_loop() -> None:
    x = RNG.normal(size=(512, 4)).astype("float32")
    y = (x[:, :1] > 0).astype("float32")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(1, "sigmoid")])
    settings = private(keras.optimizers.Adam(0.01), max_norm=1.0, noise=0.8, batch_size=64)
    learner = research.supervised(model, loss="binary_crossentropy", metrics=["accuracy"], **settings)
    data = poisson(from_arrays(x, y, batch_size=64))
    state, logs = research.train(learner, data, epochs=40)
    assert research.evaluate(learner, from_arrays(x, y, batch_size=64), state)["accuracy"] > 0.9
    assert logs["accuracy"] > 0.85


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip(lambda s, b: (s, None), -1), "clip: max_norm is -1, expected a positive number."),
        (lambda: clip_per_example(lambda s, b: (s, None), 0), "clip_per_example: max_norm is 0, expected a positive number."),
        (lambda: private("sgd", max_norm=1, noise=0, batch_size=4), "private: noise is 0, expected a positive number."),
        (
            lambda: noise_for(epsilon=0, batch_size=2, examples=4, steps=1, delta=1e-5),
            "noise_for: epsilon is 0, expected a positive number.",
        ),
        (
            lambda: epsilon(noise=1, batch_size=9, examples=4, steps=1, delta=1e-5),
            "epsilon: batch_size is 9 of 4 examples, delta 1e-05; expected a batch_size of at most the number of examples, and a "
            "delta below 1, such as 1 over the number of examples.",
        ),
        (
            lambda: poisson(from_arrays(np.zeros(4), batch_size=2, resident_bytes=0)),
            "poisson: the data stays on the host, but its examples are drawn one by one: raise resident_bytes.",
        ),
        (
            lambda: poisson(from_arrays(np.zeros(4), batch_size=2), capacity=1),
            "poisson: capacity is 1, expected an integer of at least 2.",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_arguments_that_cannot_work_raise_one_line(call: Any, message: str) -> None:
    with pytest.raises(research.InvalidArgument) as error:
        call()
    assert str(error.value) == message
