"""Replicas under `jax.pmap` do what one device does with the whole batch, where a network lets its batch be split."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers, ops

import research
from research import Refused, checkpoint, parallel
from research.replicas import averaged, pmap
from research.transforms import accumulate

RNG = np.random.default_rng(0)
X = RNG.normal(size=(160, 12, 4)).astype("float32")
Y = RNG.integers(0, 5, 160).astype("int32")
WEIGHT = RNG.uniform(0.1, 2.0, 160).astype("float32")


def masked() -> keras.Model:
    """With masks, weights and regularizers: every mean has another number of things behind it in each replica."""
    given = keras.Input((12, 4))
    x = layers.Masking()(given)
    x = layers.GRU(8, return_sequences=True)(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(given, layers.Dense(5, kernel_regularizer="l2")(x))


def build(model: keras.Model, **options: Any) -> research.Learner:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=options.pop("reduction", "sum_over_batch_size"))
    metrics = ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]
    return research.supervised(
        model, loss=loss, optimizer=keras.optimizers.SGD(0.1), metrics=metrics, weighted_metrics=["accuracy"], **options
    )


def batches(size: int = 32) -> research.Batches:
    x = X.copy()
    x[:, 8:] = 0  # masked, and more in some than in others
    x[::3, 3:] = 0
    return research.arrays(x, Y, WEIGHT, batch_size=size)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_replicas_train_and_evaluate_like_one_device(reduction: str) -> None:
    keras.utils.set_random_seed(1)
    model = masked()
    alone, replicated = build(model, reduction=reduction), pmap(build(model, reduction=reduction, gradient_transform=averaged))
    data = batches(24)  # the last of 160 is 16: it divides too
    wanted, wanted_logs = research.train(alone, data, epochs=3, evaluations={"val": data})
    found, logs = research.train(replicated, data, epochs=3, evaluations={"val": data})
    for a, b in zip(found.trainable, wanted.trainable, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert logs == pytest.approx(wanted_logs, rel=2e-6)
    np.testing.assert_allclose(
        research.predict(replicated, data, found), research.predict(alone, data, wanted), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_computed_whole_by_each() -> None:
    keras.utils.set_random_seed(1)
    model = masked()
    alone, replicated = build(model), pmap(build(model, gradient_transform=averaged))
    data = batches(28)
    wanted, wanted_logs = research.train(alone, data, epochs=2)
    found, logs = research.train(replicated, data, epochs=2)
    assert logs == pytest.approx(wanted_logs, rel=2e-6)
    np.testing.assert_allclose(found.trainable[-1], wanted.trainable[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_padding_counts_for_nothing_wherever_it_lies() -> None:
    keras.utils.set_random_seed(1)
    model = masked()
    alone, replicated = build(model), pmap(build(model, gradient_transform=averaged))
    valid = np.arange(32) % 5 != 0
    valid[:4] = False  # a whole replica's
    batch = research.Batch(X[:32], Y[:32], WEIGHT[:32], valid)
    wanted, wanted_logs = jax.jit(alone.train)(alone.init(), batch)
    found, logs = jax.jit(replicated.train)(replicated.init(), batch)
    assert {k: float(v) for k, v in logs.items()} == pytest.approx({k: float(v) for k, v in wanted_logs.items()}, rel=2e-6)
    np.testing.assert_allclose(found.trainable[0], wanted.trainable[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_parts_of_parts() -> None:
    keras.utils.set_random_seed(1)
    model = masked()
    alone = build(model)
    replicated = pmap(build(model, gradient_transform=lambda gradient: averaged(accumulate(gradient, 2))))
    batch = batches(32).batch(0)
    wanted, wanted_logs = jax.jit(alone.train)(alone.init(), batch)
    found, logs = jax.jit(replicated.train)(replicated.init(), batch)
    assert float(logs["accuracy"]) == pytest.approx(float(wanted_logs["accuracy"]))
    np.testing.assert_allclose(found.trainable[0], wanted.trainable[0], rtol=1e-5, atol=1e-6)


class Drawn(layers.Layer):
    """Gives noise alone: what is drawn shows."""

    def __init__(self) -> None:
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(7)
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x: Any) -> Any:
        return self.scale * keras.random.normal(ops.shape(x), seed=self.seed_generator)


def test_each_replica_draws_its_own_and_the_seed_moves_on_as_on_one_device() -> None:
    drawn: list[np.ndarray] = []

    class Look(layers.Layer):
        def call(self, x: Any) -> Any:
            jax.debug.callback(lambda values: drawn.append(np.asarray(values)), x)
            return x

    model = keras.Sequential([keras.Input((3,)), Drawn(), Look()])
    batch = research.Batch(np.zeros((16, 3), "float32"), np.zeros((16, 3), "float32"))
    replicated = pmap(research.supervised(model, loss="mse", gradient_transform=averaged))
    state, _ = jax.jit(replicated.train)(replicated.init(), batch)
    jax.effects_barrier()
    assert len({values.tobytes() for values in drawn}) == 8
    alone = research.supervised(model, loss="mse")
    seed, _ = jax.jit(alone.train)(alone.init(), batch)
    np.testing.assert_array_equal(state.non_trainable[0], seed.non_trainable[0])
    copies = [np.asarray(shard.data) for shard in state.non_trainable[0].addressable_shards]
    assert all((copy == copies[0]).all() for copy in copies)


def test_running_averages_are_the_mean_of_the_replicas() -> None:
    model = keras.Sequential([keras.Input((48,)), layers.BatchNormalization(momentum=0.0), layers.Dense(5)])
    x = X.reshape(160, 48)[:32]
    replicated = pmap(build(model, gradient_transform=averaged))
    state, _ = jax.jit(replicated.train)(replicated.init(), research.Batch(x, Y[:32], WEIGHT[:32]))
    parts = x.reshape(8, 4, 48)
    np.testing.assert_allclose(state.non_trainable[0], parts.mean(1).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.non_trainable[1], parts.var(1).mean(0), rtol=1e-5, atol=1e-6)
    for leaf in jax.tree.leaves(state):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all((copy == copies[0]).all() for copy in copies)


class Largest(keras.metrics.Metric):
    """The largest loss so far: no sum."""

    def __init__(self) -> None:
        super().__init__(name="largest")
        self.held = self.add_variable(shape=(), initializer="zeros", name="held")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.held.assign(ops.maximum(self.held, ops.max(y_pred)))

    def result(self) -> Any:
        return ops.convert_to_tensor(self.held)


def test_what_would_be_wrong_without_a_word_is_refused() -> None:
    model = keras.Sequential([keras.Input((48,)), layers.Dense(5)])
    batch = research.Batch(X.reshape(160, 48)[:32], Y[:32], WEIGHT[:32])
    forgotten = pmap(build(model))
    with pytest.raises(Refused, match="not averaged"):
        jax.jit(forgotten.train)(forgotten.init(), batch)
    learner = research.supervised(model, loss="mse", metrics=[Largest()], gradient_transform=averaged)
    with pytest.raises(Refused, match=r"metrics.*largest.*no sum"):
        pmap(learner).train(learner.init(), research.Batch(batch.x, np.zeros((32, 5), "float32")))
    whole = research.supervised(model, loss="mse", metrics=[Largest()])
    sharded = parallel.shard(whole, parallel.mesh(data=8))
    _, wanted = jax.jit(whole.train)(whole.init(), research.Batch(batch.x, np.zeros((32, 5), "float32")))
    _, logs = jax.jit(sharded.train)(sharded.init(), research.Batch(batch.x, np.zeros((32, 5), "float32")))
    assert float(logs["largest"]) == pytest.approx(float(wanted["largest"]))


@pytest.mark.slow
def test_its_checkpoints_are_those_of_one_device(tmp_path: Any) -> None:
    model = masked()
    alone, replicated = build(model), pmap(build(model, gradient_transform=averaged))
    data = batches()
    state, _ = research.train(replicated, data, steps=3)
    path = checkpoint.save(tmp_path / "checkpoints", 3, state, replicated.names)
    restored = checkpoint.restore(path, alone.init(), alone.names).state
    again, _ = research.train(alone, data, steps=6, start=3, state=restored)
    wanted, _ = research.train(replicated, data, steps=6)
    np.testing.assert_allclose(again.trainable[0], wanted.trainable[0], rtol=1e-5, atol=1e-6)


def test_a_metric_that_adds_is_told_from_one_that_does_not() -> None:
    from research.replicas import _adds

    def adds(function: Any) -> bool:
        jaxpr = jax.make_jaxpr(function)(jnp.ones(3), jnp.ones(3)).jaxpr
        return _adds(jaxpr, jaxpr.outvars[0], jaxpr.invars[0])

    assert adds(lambda held, x: held + x)
    assert adds(lambda held, x: jax.jit(lambda a, b: b + jnp.sin(a))(x, held) - x)
    assert adds(lambda held, x: jax.lax.scan(lambda c, v: (c + v, None), held, jnp.stack([x, x]))[0])
    assert not adds(lambda held, x: jnp.maximum(held, x))
    assert not adds(lambda held, x: 0.9 * held + x)
    assert not adds(lambda held, x: held + held * x)
    assert not adds(lambda held, x: x - held)
    assert not adds(lambda held, x: x + 1)
    assert not adds(lambda held, x: jax.lax.scan(lambda c, v: (c * v, None), held, jnp.stack([x, x]))[0])
