"""Replicas under `jax.pmap` compute what one device does with the complete batch, if no layer mixes examples."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers, ops

import research
from research import InvalidArgument, distributed
from research.distributed.replicas import average_gradients, pmap
from research.training import checkpoint
from research.transforms.accumulate import accumulate
from research.transforms.jaxpr import inputs, outputs

RNG = np.random.default_rng(0)
X = RNG.normal(size=(160, 12, 4)).astype("float32")
Y = RNG.integers(0, 5, 160).astype("int32")
WEIGHT = RNG.uniform(0.1, 2.0, 160).astype("float32")


def masked() -> keras.Model:
    """With masks, sample weights and regularizers: each mean is over another number of terms in each replica."""
    inputs = keras.Input((12, 4))
    x = layers.Masking()(inputs)
    x = layers.GRU(8, return_sequences=True)(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(5, kernel_regularizer="l2")(x))


def build(model: keras.Model, **options: Any) -> research.Learner:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=options.pop("reduction", "sum_over_batch_size"))
    metrics = ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]
    return research.supervised(
        model, loss=loss, optimizer=keras.optimizers.SGD(0.1), metrics=metrics, weighted_metrics=["accuracy"], **options
    )


def batches(size: int = 32) -> research.Batches:
    x = X.copy()
    x[:, 8:] = 0  # masked, in some sequences more than in others
    x[::3, 3:] = 0
    return research.from_arrays(x, Y, WEIGHT, batch_size=size)


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_replicas_train_and_evaluate_like_one_device(reduction: str) -> None:
    keras.utils.set_random_seed(1)
    model = masked()
    single = build(model, reduction=reduction)
    replicated = pmap(build(model, reduction=reduction, gradient_transform=average_gradients))
    data = batches(24)  # the last of 160 examples are 16, which divides too
    expected, expected_logs = research.train(single, data, epochs=3, evaluations={"val": data})
    result, logs = research.train(replicated, data, epochs=3, evaluations={"val": data})
    for a, b in zip(result.trainable, expected.trainable, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert logs == pytest.approx(expected_logs, rel=2e-6)
    np.testing.assert_allclose(
        research.predict(replicated, data, result), research.predict(single, data, expected), rtol=1e-4, atol=1e-5
    )


@pytest.mark.complete
@pytest.mark.slow
def test_each_replica_computes_all_of_a_batch_that_does_not_divide() -> None:
    keras.utils.set_random_seed(1)
    model = masked()
    single, replicated = build(model), pmap(build(model, gradient_transform=average_gradients))
    data = batches(28)
    expected, expected_logs = research.train(single, data, epochs=2)
    result, logs = research.train(replicated, data, epochs=2)
    assert logs == pytest.approx(expected_logs, rel=2e-6)
    np.testing.assert_allclose(result.trainable[-1], expected.trainable[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_padding_has_no_weight_in_any_replica() -> None:
    keras.utils.set_random_seed(1)
    model = masked()
    single, replicated = build(model), pmap(build(model, gradient_transform=average_gradients))
    valid = np.arange(32) % 5 != 0
    valid[:4] = False  # all examples of one replica
    batch = research.Batch(X[:32], Y[:32], WEIGHT[:32], valid)
    expected, expected_logs = jax.jit(single.train)(single.init(), batch)
    result, logs = jax.jit(replicated.train)(replicated.init(), batch)
    assert {k: float(v) for k, v in logs.items()} == pytest.approx({k: float(v) for k, v in expected_logs.items()}, rel=2e-6)
    np.testing.assert_allclose(result.trainable[0], expected.trainable[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_accumulated_gradients_are_averaged_over_replicas() -> None:
    keras.utils.set_random_seed(1)
    model = masked()
    single = build(model)
    replicated = pmap(build(model, gradient_transform=lambda gradient: average_gradients(accumulate(gradient, 2))))
    batch = batches(32).batch(0)
    expected, expected_logs = jax.jit(single.train)(single.init(), batch)
    result, logs = jax.jit(replicated.train)(replicated.init(), batch)
    assert float(logs["accuracy"]) == pytest.approx(float(expected_logs["accuracy"]))
    np.testing.assert_allclose(result.trainable[0], expected.trainable[0], rtol=1e-5, atol=1e-6)


class Noise(layers.Layer):
    """Returns noise alone, whatever its input."""

    def __init__(self) -> None:
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(7)
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x: Any) -> Any:
        return self.scale * keras.random.normal(ops.shape(x), seed=self.seed_generator)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_each_replica_draws_other_noise_and_the_seed_advances_as_on_one_device(named: bool) -> None:
    noise: list[np.ndarray] = []

    class Record(layers.Layer):
        def call(self, x: Any) -> Any:
            jax.debug.callback(lambda values: noise.append(np.asarray(values)), x)
            return x

    model = keras.Sequential([keras.Input((3,)), Noise(), Record()])
    batch = research.Batch(np.zeros((16, 3), "float32"), np.zeros((16, 3), "float32"))
    learner = research.supervised(model, loss="mse", gradient_transform=average_gradients)
    if not named:
        learner = learner._replace(names=jax.tree.map(lambda name: "leaf", learner.names))
    replicated = pmap(learner)
    state, _ = jax.jit(replicated.train)(replicated.init(), batch)
    jax.effects_barrier()
    assert len({values.tobytes() for values in noise}) == 8
    single = research.supervised(model, loss="mse")
    seed, _ = jax.jit(single.train)(single.init(), batch)
    np.testing.assert_array_equal(state.non_trainable[0], seed.non_trainable[0])
    copies = [np.asarray(shard.data) for shard in state.non_trainable[0].addressable_shards]
    assert all((copy == copies[0]).all() for copy in copies)


@pytest.mark.slow
def test_moving_averages_are_the_mean_over_replicas() -> None:
    model = keras.Sequential([keras.Input((48,)), layers.BatchNormalization(momentum=0.0), layers.Dense(5)])
    x = X.reshape(160, 48)[:32]
    replicated = pmap(build(model, gradient_transform=average_gradients))
    state, _ = jax.jit(replicated.train)(replicated.init(), research.Batch(x, Y[:32], WEIGHT[:32]))
    parts = x.reshape(8, 4, 48)
    np.testing.assert_allclose(state.non_trainable[0], parts.mean(1).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.non_trainable[1], parts.var(1).mean(0), rtol=1e-5, atol=1e-6)
    for leaf in jax.tree.leaves(state):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all((copy == copies[0]).all() for copy in copies)


class Largest(keras.metrics.Metric):
    """The largest output so far, which is not a sum over examples."""

    def __init__(self) -> None:
        super().__init__(name="largest")
        self.maximum = self.add_variable(shape=(), initializer="zeros", name="maximum")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.maximum.assign(ops.maximum(self.maximum, ops.max(y_pred)))

    def result(self) -> Any:
        return ops.convert_to_tensor(self.maximum)


@pytest.mark.slow
def test_gradients_that_are_not_averaged_and_metrics_that_are_no_sums_raise() -> None:
    model = keras.Sequential([keras.Input((48,)), layers.Dense(5)])
    batch = research.Batch(X.reshape(160, 48)[:32], Y[:32], WEIGHT[:32])
    not_averaged = pmap(build(model))
    with pytest.raises(InvalidArgument, match="is not averaged"):
        jax.jit(not_averaged.train)(not_averaged.init(), batch)
    learner = research.supervised(model, loss="mse", metrics=[Largest()], gradient_transform=average_gradients)
    with pytest.raises(InvalidArgument, match=r"metrics.*largest.*not a sum"):
        pmap(learner).train(learner.init(), research.Batch(batch.x, np.zeros((32, 5), "float32")))
    single = research.supervised(model, loss="mse", metrics=[Largest()])
    sharded = distributed.shard(single, distributed.mesh(data=8))
    _, expected = jax.jit(single.train)(single.init(), research.Batch(batch.x, np.zeros((32, 5), "float32")))
    _, logs = jax.jit(sharded.train)(sharded.init(), research.Batch(batch.x, np.zeros((32, 5), "float32")))
    assert float(logs["largest"]) == pytest.approx(float(expected["largest"]))


@pytest.mark.slow
def test_checkpoints_of_replicas_are_those_of_one_device(tmp_path: Any) -> None:
    model = masked()
    single, replicated = build(model), pmap(build(model, gradient_transform=average_gradients))
    data = batches()
    state, _ = research.train(replicated, data, steps=3)
    path = checkpoint.save(tmp_path / "checkpoints", 3, state, replicated.names)
    restored = checkpoint.restore(path, single.init(), single.names).state
    resumed, _ = research.train(single, data, steps=6, start=3, state=restored)
    expected, _ = research.train(replicated, data, steps=6)
    np.testing.assert_allclose(resumed.trainable[0], expected.trainable[0], rtol=1e-5, atol=1e-6)


def test_sums_are_distinguished_from_other_metrics() -> None:
    from research.distributed.replicas import _adds

    def adds(function: Any) -> bool:
        program = jax.make_jaxpr(function)(jnp.ones(3), jnp.ones(3))
        return _adds(program, outputs(program)[0], inputs(program)[0])

    assert adds(lambda total, x: total + x)
    assert adds(lambda total, x: jax.jit(lambda a, b: b + jnp.sin(a))(x, total) - x)
    assert adds(lambda total, x: jax.lax.scan(lambda c, v: (c + v, None), total, jnp.stack([x, x]))[0])
    assert not adds(lambda total, x: jnp.maximum(total, x))
    assert not adds(lambda total, x: 0.9 * total + x)
    assert not adds(lambda total, x: total + total * x)
    assert not adds(lambda total, x: x - total)
    assert not adds(lambda total, x: x + 1)
    assert not adds(lambda total, x: jax.lax.scan(lambda c, v: (c * v, None), total, jnp.stack([x, x]))[0])
