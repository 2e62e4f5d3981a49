"""`unroll`: the learner's own steps bit for bit, and derivatives that equal central differences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from keras import layers

import research
from research.distributed import average_gradients, pmap
from research.transforms import finite_derivatives, unroll

STEPS = 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(STEPS, 8, 4)).astype("float32")
BATCHES = research.Batch(X, np.tanh(X[..., :1]), np.ones((STEPS, 8), "float32"))
HELD_OUT = research.Batch(RNG.normal(size=(32, 4)).astype("float32"), np.ones((32, 1), "float32"))
# With a learning rate each. Adam's step is about the sign of a gradient: only a large epsilon makes that smooth enough for finite
# differences. (Keras' is added before the correction of the bias.)
OPTIMIZERS: dict[str, tuple[float, Callable[[float], Any]]] = {
    "SGD": (0.1, keras.optimizers.SGD),
    "Adam": (0.02, lambda rate: keras.optimizers.Adam(rate, epsilon=0.01)),
    "optax.adamw": (0.02, lambda rate: optax.inject_hyperparams(optax.adamw)(learning_rate=rate, eps=0.3)),
}


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    # Without a bias before the normalization: its gradient would be rounding errors, which Adam divides by their own size.
    hidden = [layers.Dense(6, "tanh", use_bias=False), layers.BatchNormalization(), layers.Dropout(0.5)]
    return keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(1)])


def one_weight(update: Callable[[Any, Any], Any]) -> research.Learner:
    """Returns a learner written by hand: `update(weight, batch)` is the next weight."""

    def train(weight: Any, batch: Any) -> Any:
        after = update(weight.trainable[0], batch)
        return weight._replace(trainable=[after]), {"weight": after}

    def init() -> research.State:
        return research.State([jnp.full((), 0.5)], [], [], {})

    names = research.State(["weight"], [], [], {})
    return research.Learner(init, lambda state: state, train, train, lambda state, batch: batch, names)


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_are_those_of_single_steps_and_derivatives_those_of_central_differences(name: str) -> None:
    rate, make = OPTIMIZERS[name]
    optimizer = make(rate)
    learner = research.supervised(network(), loss="mse", optimizer=optimizer)
    initial, step, unrolled = learner.init(), jax.jit(learner.train), unroll(learner, STEPS)
    expected, all_logs = initial, []
    for i in range(STEPS):
        expected, logs = step(expected, jax.tree.map(lambda leaf, i=i: leaf[i], BATCHES))
        all_logs.append(logs)
    assert_equal(jax.jit(unrolled)(initial, BATCHES), (expected, jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_logs)))

    def loss(rate: Any, example_weight: Any, shift: Any) -> Any:
        state = research.set_learning_rate(initial, rate, optimizer if isinstance(optimizer, keras.Optimizer) else None)
        state = state._replace(trainable=[weight + shift for weight in state.trainable])
        weights = jnp.asarray(BATCHES.sample_weight).at[1, 3].set(example_weight)
        state, _ = unrolled(state, BATCHES._replace(sample_weight=weights))
        return learner.evaluate(learner.reset(state), HELD_OUT)[1]["loss"]

    point, value = (rate, 1.0, 0.0), jax.jit(loss)
    derivatives = jax.jit(jax.grad(loss, (0, 1, 2)))(*point)
    for i, width in enumerate((rate / 20, 0.1, 0.001)):
        ahead = {k: float(value(*(p + k * width * (i == j) for j, p in enumerate(point)))) for k in (-2, -1, 1, 2)}
        difference = (8 * (ahead[1] - ahead[-1]) - (ahead[2] - ahead[-2])) / (12 * width)
        np.testing.assert_allclose(derivatives[i], difference, rtol=1e-3)


@pytest.mark.slow
def test_a_coefficient_of_a_loss_is_a_hyper_parameter_too() -> None:
    model, decay = keras.Sequential([keras.Input((4,)), layers.Dense(1)]), keras.Variable(0.5, trainable=False)

    def loss(batch: Any, training: bool) -> Any:
        penalty = keras.ops.sum(model.trainable_variables[0] ** 2)
        return keras.ops.mean((model(batch.x) - batch.y) ** 2) + decay * penalty, {}

    learner = research.learner(loss, [model, decay], keras.optimizers.SGD(0.05), example=HELD_OUT)
    state, unrolled = learner.init(), unroll(learner, STEPS)

    def size(coefficient: Any) -> Any:
        after, _ = unrolled(state._replace(non_trainable=[coefficient]), BATCHES._replace(sample_weight=None))
        return jnp.sum(after.trainable[0] ** 2)

    value, derivative = jax.jit(size), jax.jit(jax.grad(size))(0.5)
    np.testing.assert_allclose(derivative, (value(0.51) - value(0.49)) / 0.02, rtol=1e-3)
    assert derivative < 0


@pytest.mark.parametrize("steps", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 12, 17))])
def test_any_number_of_steps_equals_their_fold_with_its_derivatives_in_both_modes(steps: int) -> None:
    learner = one_weight(lambda weight, batch: weight - 0.1 * jnp.sin(weight * batch))
    batches = jnp.linspace(0.5, 2.0, steps)

    def by_hand(weight: Any, batches: Any) -> Any:
        for batch in batches:
            weight = weight - 0.1 * jnp.sin(weight * batch)
        return weight

    def unrolled(weight: Any, batches: Any) -> Any:
        state, logs = unroll(learner, steps)(learner.init()._replace(trainable=[weight]), batches)
        assert logs["weight"].shape == (steps,)
        return logs["weight"][-1] + 0 * state.trainable[0]

    weight = jnp.asarray(0.7)
    expected = jax.jit(jax.value_and_grad(by_hand, (0, 1)))(weight, batches)
    result = jax.jit(jax.value_and_grad(unrolled, (0, 1)))(weight, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), result, expected)
    forwards = jax.jit(jax.jacfwd(unrolled, (0, 1)))(weight, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), forwards, expected[1])


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.Adam,
        lambda rate: keras.optimizers.Adam(rate, global_clipnorm=1.0),
        keras.optimizers.Lamb,
        optax.adam,
        optax.lamb,
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
    ],
    ids=["Adam", "global norm", "Lamb", "optax.adam", "optax.lamb", "optax global norm"],
)
@pytest.mark.parametrize("zeros", ["of one weight", "of all"])
def test_derivatives_are_finite_where_gradients_are_zero(optimizer: Any, zeros: str) -> None:
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, kernel_initializer="ones")])
    learner = research.supervised(model, loss="mse", optimizer=optimizer(0.1))
    x = jnp.zeros((STEPS, 2, 1))  # the kernel has no gradient, the bias has one unless the targets are zeros too
    y = jnp.zeros((STEPS, 2, 1)) + (zeros == "of one weight")

    def loss(function: Any) -> Callable[..., Any]:
        def final(state: Any, x: Any, y: Any) -> Any:
            after, _ = function(state, research.Batch(x, y))
            return sum(jnp.sum(weight**2) for weight in after.trainable)

        return final

    state = learner.init()
    gradients = jax.jit(jax.grad(loss(unroll(learner, STEPS)), argnums=(0, 1, 2), allow_int=True))(state, x, y)
    values = [leaf for leaf in jax.tree.leaves(gradients) if leaf.dtype == jnp.float32]
    assert all(np.isfinite(leaf).all() for leaf in values)
    plain = jax.jit(jax.grad(loss(lambda state, batches: jax.lax.scan(learner.train, state, batches)), argnums=(1, 2)))
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(plain(state, x, y)))


@pytest.mark.slow
def test_values_keep_their_bits_and_derivatives_elsewhere_are_the_same() -> None:
    def powers(x: Any, y: Any) -> Any:
        return jnp.stack([jnp.sqrt(x), jax.lax.rsqrt(x), jnp.cbrt(x), x**0.5, x**-1, y / x, x**y, jax.lax.pow(x, 2.5)])

    def everywhere(x: Any, y: Any) -> Any:  # in a loop, a branch and a part that is computed again
        looped = jax.lax.scan(lambda carry, _: (carry, powers(x, y)), 0.0, length=2)[1][1]
        branch = jax.lax.cond(y > 0, powers, lambda x, y: powers(y, x), x, y)
        return jnp.stack([powers(x, y), looped, branch, jax.checkpoint(powers)(x, y), jax.jit(powers)(x, y)])

    safe = finite_derivatives(everywhere)
    for x in (0.0, 0.3, 7.0):
        np.testing.assert_array_equal(jax.jit(safe)(x, 0.5), jax.jit(everywhere)(x, 0.5))
        derivatives = [jax.jit(jax.jacfwd(f, (0, 1)))(x, 0.5) for f in (safe, everywhere)]
        backwards = jax.jit(jax.jacrev(safe, (0, 1)))(x, 0.5)
        np.testing.assert_allclose(backwards, derivatives[0], rtol=1e-6)
        if x:
            np.testing.assert_allclose(*derivatives, rtol=1e-6)
        else:
            np.testing.assert_array_equal(derivatives[0][0], 0)


@pytest.mark.slow
def test_the_memory_of_the_compiled_program_grows_with_the_square_root_of_the_steps() -> None:
    model = keras.Sequential([keras.Input((128,)), layers.Dense(128, "tanh"), layers.Dense(1)])
    optimizer = keras.optimizers.Adam()
    learner = research.supervised(model, loss="mse", optimizer=optimizer)
    state = learner.init()

    def temporaries(steps: int) -> int:
        def loss(rate: Any, batches: Any) -> Any:
            after, logs = unroll(learner, steps)(research.set_learning_rate(state, rate, optimizer), batches)
            return logs["loss"][-1] + jnp.sum(after.trainable[0])

        batches = research.Batch(jnp.ones((steps, 2, 128)), jnp.ones((steps, 2, 1)))
        return int(jax.jit(jax.grad(loss)).lower(0.1, batches).compile().memory_analysis().temp_size_in_bytes)

    few, many = temporaries(16), temporaries(256)
    assert many / few < 5  # 16 times the steps


@pytest.mark.slow
def test_it_maps_over_tasks_and_its_derivatives_can_be_differentiated() -> None:
    learner = one_weight(lambda weight, batch: weight - 0.1 * jnp.sin(weight * batch))

    def final(weight: Any, batches: Any) -> Any:
        return unroll(learner, 6)(learner.init()._replace(trainable=[weight]), batches)[0].trainable[0]

    weights, batches = jnp.array([0.3, 0.7]), jnp.ones((2, 6))
    mapped = jax.vmap(jax.hessian(final))(weights, batches)
    single = [jax.hessian(final)(*pair) for pair in zip(weights, batches, strict=True)]
    np.testing.assert_allclose(mapped, jnp.stack(single), rtol=1e-6)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_number_of_steps_that_is_not_positive_raises(steps: int) -> None:
    with pytest.raises(research.InvalidArgument) as error:
        unroll(one_weight(lambda weight, batch: weight), steps)
    assert str(error.value) == f"unroll: steps is {steps}, expected a positive integer."


def test_batches_of_another_length_raise() -> None:
    unrolled = unroll(one_weight(lambda weight, batch: weight * batch["x"]), 3)
    state = one_weight(lambda weight, batch: weight).init()
    for x, found in ((jnp.ones(2), "has 2 batches"), (jnp.ones(()), "is a scalar")):
        with pytest.raises(research.InvalidArgument) as error:
            unrolled(state, {"x": x})
        message = str(error.value)
        assert message.startswith(f"unroll: batches['x'] {found}, expected 3, one for each step: stack them with ")
        assert "\n" not in message


def by_optax(transform: Callable[[Any], Any]) -> research.Learner:
    optimizer = optax.chain(optax.stateless(lambda updates, _: jax.tree.map(transform, updates)), optax.sgd(0.1))
    return research.supervised(network(), loss="mse", optimizer=optimizer)


@pytest.mark.parametrize(
    ("build", "weight", "of"),
    [
        (lambda: by_optax(lambda g: jnp.round(g * 8) / 8), "sequential/dense/kernel", "its gradient"),
        (lambda: by_optax(lambda g: (g * 8).astype(jnp.int32).astype(g.dtype)), "sequential/dense/kernel", "its gradient"),
        (
            lambda: by_optax(lambda g: jax.nn.one_hot(jnp.argmax(g), g.size).reshape(g.shape)),
            "sequential/dense/kernel",
            "its gradient",
        ),
        (lambda: research.supervised(network(), loss="mse", optimizer="lion"), "sequential/dense/kernel", "its gradient"),
        (lambda: one_weight(lambda weight, batch: jnp.round(weight - batch)), "weight", "the weights"),
    ],
    ids=["rounded", "integers", "argmax", "lion", "by hand"],
)
def test_an_update_without_a_derivative_raises_and_names_the_weight(build: Any, weight: str, of: str) -> None:
    learner = build()
    batches = jnp.ones(STEPS) if weight == "weight" else BATCHES
    with pytest.raises(research.InvalidArgument) as error:
        unroll(learner, STEPS)(learner.init(), batches)
    assert str(error.value) == (
        f"unroll: the derivative of the update of {weight!r} is cut: it depends on {of} only through operations without a "
        "derivative (rounding, sign, argmax, comparisons, integers); expected an update such as that of SGD or Adam."
    )


@pytest.mark.promotes
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: optax.multi_transform({"a": optax.adam(0.1), "b": optax.set_to_zero()}, ["a", "b", "a", "b", "a"]),
        lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        lambda: optax.apply_if_finite(optax.adam(0.1), 3),
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
        lambda: keras.optimizers.Adam(0.1, clipnorm=1.0),
    ],
    ids=["a frozen weight", "MultiSteps", "apply_if_finite", "accumulation", "clipped"],
)
def test_updates_that_have_derivatives_are_not_mistaken(optimizer: Any) -> None:
    learner = research.supervised(network(), loss="mse", optimizer=optimizer())
    jax.eval_shape(unroll(learner, STEPS), learner.init(), BATCHES)


def test_a_pmap_raises() -> None:
    learner = pmap(research.supervised(network(), loss="mse", optimizer="sgd", gradient_transform=average_gradients))
    with pytest.raises(
        research.InvalidArgument, match=r"^unroll: the training step is a jax\.pmap, .*research\.distributed\.shard\.$"
    ):
        unroll(learner, STEPS)(learner.init(), BATCHES)
