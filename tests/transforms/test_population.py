"""Members of a population are trained as alone: bit for bit one after another, to rounding side by side."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers

import research
from research.data import from_arrays, side_by_side
from research.distributed import layouts, mesh, shard
from research.transforms import ema, evolve, member, population, population_size, skip_nonfinite, take_members
from research.transforms.merge import merge

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 6)).astype("float32"), RNG.integers(0, 3, 60)
BATCH = research.Batch(jnp.asarray(X[:32]), jnp.asarray(Y[:32]))
SCHEDULE = keras.optimizers.schedules.CosineDecay


def build(
    seed: int = 0, rate: float = 0.3, decay: float = 0.01, learning_rate: float = 0.05, weight: float = 1.0, momentum: float = 0.8
) -> research.Learner:
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((6,)), layers.Dense(8, "relu", kernel_regularizer=keras.regularizers.L2(decay))]
    model = keras.Sequential([*stack, layers.BatchNormalization(), layers.Dropout(rate), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(SCHEDULE(learning_rate, 100), momentum=momentum)
    return research.supervised(model, loss=loss, loss_weights=[weight], metrics=["accuracy"], optimizer=optimizer)


def build_adamw(seed: int, beta: float, decay: float) -> research.Learner:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "gelu"), layers.Dense(3)])
    optimizer = keras.optimizers.AdamW(0.01, beta_1=beta, weight_decay=decay)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return research.supervised(model, loss=loss, metrics=["accuracy"], optimizer=optimizer)


def alone(learner: research.Learner, steps: int = 20) -> tuple[Any, Any]:
    state, train = learner.init(), jax.jit(learner.train)
    for _ in range(steps):
        state, logs = train(state, BATCH)
    return state, logs


def assert_close(a: Any, b: Any, tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.promotes
def test_members_that_run_one_after_another_have_the_bits_of_runs_alone() -> None:
    many = population(build, 3, example=BATCH, mapped=True)
    state, logs = alone(many)
    assert state.numbers == {"train": [], "evaluate": [], "predict": []}
    _, evaluated = jax.jit(many.evaluate)(many.reset(state), BATCH)
    for i in range(3):
        solo = build(i)
        expected, expected_logs = alone(solo)
        for a, b in zip(jax.tree.leaves(member(state, i)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
        assert all(logs[f"{name}_of_members"][i] == value for name, value in expected_logs.items())
        _, expected_logs = jax.jit(solo.evaluate)(solo.reset(expected), BATCH)
        assert_close({name: evaluated[f"{name}_of_members"][i] for name in expected_logs}, expected_logs, 1e-6)
    np.testing.assert_allclose(logs["loss"], logs["loss_of_members"].mean(), rtol=1e-6)


MEMBERS = [
    {
        "seed": i,
        "rate": 0.1 + 0.1 * i,
        "decay": 0.01 * i,
        "learning_rate": 0.02 * (i + 1),
        "weight": 1 + i / 4,
        "momentum": 0.9 - i / 9,
    }
    for i in range(4)
]


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("mapped", [False, True])
def test_numbers_that_keras_holds_in_python_vary(mapped: bool) -> None:
    many = population(build, MEMBERS, example=BATCH, mapped=mapped)
    state, _ = alone(many)
    for i, arguments in enumerate(MEMBERS):
        expected, _ = alone(build(**arguments))
        assert_close(member(state, i), expected, 1e-5)
    assert len({tuple(column.tolist()) for column in state.numbers["train"]}) == len(state.numbers["train"]) > 4


@pytest.mark.slow
@pytest.mark.promotes
def test_adam_with_its_own_moments_and_decay_in_each_member() -> None:
    arguments = [
        {"seed": 0, "beta": 0.9, "decay": 0.01},
        {"seed": 1, "beta": 0.8, "decay": 0.1},
        {"seed": 0, "beta": 0.5, "decay": 0.0},
    ]
    state, _ = alone(population(build_adamw, arguments, example=BATCH))
    for i, each in enumerate(arguments):
        assert_close(member(state, i), alone(build_adamw(**each))[0], 1e-4)


@pytest.mark.slow
@pytest.mark.promotes
def test_members_with_batches_of_their_own_train_in_the_loop_as_alone() -> None:
    orders = [from_arrays(X, Y, batch_size=16, seed=seed) for seed in range(3)]  # the last batch of an epoch is shorter
    many = population(build, 3, example=orders[0].shapes, mapped=True, own_batches=True)
    both = side_by_side(orders)
    assert both.resident is not None
    np.testing.assert_array_equal(both.batch(3).x, both.resident.source().x[both.resident.rows(3, 1)])
    state, logs = research.train(many, both, epochs=3)
    for i, order in enumerate(orders):
        expected, expected_logs = research.train(build(i), order, epochs=3)
        assert_close(member(state, i), expected, 1e-6)
        np.testing.assert_allclose(logs["loss_of_members"][i], expected_logs["loss"], rtol=1e-6)


@pytest.mark.promotes
def test_a_population_composes_with_other_transforms_and_some_members_go_on() -> None:
    many = skip_nonfinite(population(lambda seed: ema(build(seed), 0.9), 4, example=BATCH), BATCH)
    state, _ = alone(many, steps=2)
    inner = take_members(state.state, jnp.array([2, 0]))
    assert population_size(inner) == 2
    state, logs = jax.jit(many.train)(
        state._replace(state=inner, logs=jax.tree.map(lambda x: x[:2] if x.ndim else x, state.logs)), BATCH
    )
    expected, _ = alone(ema(build(2), 0.9), steps=3)
    assert_close(member(state.state, 0), expected, 1e-5)
    assert logs["loss_of_members"].shape == (2,)


@pytest.mark.slow
@pytest.mark.promotes
def test_members_spread_over_devices_are_those_of_one_device() -> None:
    many = population(build, 8, example=BATCH)
    sharded = shard(many, mesh(jax.devices()[:8], data=2, tensor=4), layouts.members)
    start = sharded.init()
    kernel = start.members.trainable[0]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 6, 8)
    assert_close(alone(sharded, steps=5)[0], alone(many, steps=5)[0], 1e-5)


@pytest.mark.promotes
def test_bad_members_go_on_from_good_ones_with_another_learning_rate() -> None:
    def make(seed: int, learning_rate: float) -> research.Learner:
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
        return research.supervised(model, loss="mse", optimizer=optimizer_of(learning_rate))

    def optimizer_of(learning_rate: float) -> keras.Optimizer:
        return keras.optimizers.SGD(learning_rate)

    shared = keras.optimizers.SGD(0.0)
    shared.build([])

    def explore(state: research.State, key: jax.Array) -> research.State:
        rate = state.optimizer[1] * jnp.where(jax.random.bernoulli(key), 1.25, 0.8)
        return state._replace(optimizer=[state.optimizer[0], rate, *state.optimizer[2:]])

    arguments = [{"seed": i, "learning_rate": rate} for i, rate in enumerate([1e-4, 0.1, 1e30, 0.05])]  # the third becomes NaN
    batch = research.Batch(BATCH.x, BATCH.x[:, :1])
    many = evolve(population(make, arguments, example=batch), every=5, metric="loss", mode="min", explore=explore)
    state, train = many.init(), jax.jit(many.train)
    for _ in range(4):
        state, _ = train(state, batch)
    before = state.population
    state, logs = train(state, batch)
    rates = np.asarray(state.population.members.optimizer[1])
    best = int(np.nanargmin(np.asarray(logs["loss_of_members"])))
    assert not np.isfinite(np.asarray(before.members.trainable[0][2])).all()
    np.testing.assert_array_equal(state.population.members.trainable[0][2], state.population.members.trainable[0][best])
    assert round(float(rates[2] / rates[best]), 4) in (1.25, 0.8)
    np.testing.assert_array_equal(np.delete(rates, 2), np.delete(np.float32([1e-4, 0.1, 0, 0.05]), 2))


def test_programs_with_loops_and_branches_take_their_numbers() -> None:
    def make(a: float, b: float, c: Any) -> Any:
        def function(x: jax.Array) -> jax.Array:
            def body(carry: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
                return jax.jit(lambda y: y * a)(carry) + c.sum(), carry

            x, history = jax.lax.scan(body, x, None, length=3)
            return jax.lax.cond(x > 0, lambda y: y + b, lambda y: y - 2 * b, x) + history.sum()

        return function

    functions = [make(0.5, 1.0, np.ones(3, "float32")), make(0.25, 3.0, np.arange(3, dtype="float32"))]
    merged = merge(functions, jnp.ones(()))
    for i, function in enumerate(functions):
        for x in (-20.0, 1.5):
            assert merged.call([column[i] for column in merged.numbers], jnp.float32(x)) == jax.jit(function)(jnp.float32(x))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "population: there are no members, expected their number, or the arguments of each."),
        (
            [{"seed": 0, "rate": 0.5}, {"seed": 1, "rate": 0.5}, {"seed": 2, "rate": 0.0}],
            "population: the states of members 0 and 2 differ in more than numbers: ",
        ),
    ],
    ids=["none", "no dropout"],
)
def test_members_that_cannot_share_a_program_are_named(members: Any, message: str) -> None:
    with pytest.raises(research.InvalidArgument) as error:
        population(build, members, example=BATCH)
    assert str(error.value).startswith(message)
    if members:
        assert str(error.value).endswith(
            "They have other values of seed, rate; vary what leaves the program the same, and run the rest apart."
        )


def test_other_shapes_of_states_and_data_are_named() -> None:
    def wide(units: int) -> research.Learner:
        model = keras.Sequential([keras.Input((6,)), layers.Dense(units), layers.Dense(3)])
        return research.supervised(model, loss="mse")

    with pytest.raises(research.InvalidArgument, match=r"the states of members 0 and 1 .* They have other values of units"):
        population(wide, [{"units": 4}, {"units": 5}], example=research.Batch(BATCH.x, BATCH.x[:, :3]))
    with pytest.raises(research.InvalidArgument, match="population: a batch of 32 rows for 3 members, expected as many rows"):
        many = population(build, 3, example=from_arrays(X, Y, batch_size=32).shapes, own_batches=True)
        jax.eval_shape(many.train, many.init(), BATCH)
    with pytest.raises(research.InvalidArgument, match="side_by_side: data set 1 has 60 examples in 2 batches"):
        side_by_side([from_arrays(X, Y, batch_size=size) for size in (60, 30)])
    with pytest.raises(research.InvalidArgument, match="evolve: there is no metric 'acc', expected one of accuracy, loss"):
        many = evolve(population(build, 2, example=BATCH), every=1, metric="acc", mode="max")
        jax.eval_shape(many.train, many.init(), BATCH)
