"""The variations against Keras' own trainer, NumPy and optax called directly."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import research
from experiments import losses

pytestmark = pytest.mark.slow

STEPS = 3
EQUAL_TO_KERAS = {
    **{name: losses.Config(variation=name, units=16) for name in losses.VARIATIONS if name not in ("inside", "plateau")},
    "piecewise": losses.Config(variation="schedule", decay="piecewise", units=16, steps=3),
}
FAST = {"plain", "metrics"}


def batches(config: losses.Config) -> list[research.Batch]:
    train = losses.data(config)["train"]
    return [train.batch(step) for step in range(STEPS)]


def trained(config: losses.Config) -> tuple[research.State, list[dict[str, float]]]:
    """Returns the state after three steps, and the logs of each step alone, as `train_on_batch` returns them."""
    learner = losses.build(config)
    state, train, logs = learner.init(), jax.jit(learner.train), []
    for batch in batches(config):
        state, values = train(learner.reset(state), batch)
        logs.append({name: float(value) for name, value in values.items()})
    return state, logs


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "config",
    [pytest.param(config, id=name, marks=[pytest.mark.slow] * (name not in FAST)) for name, config in EQUAL_TO_KERAS.items()],
)
def test_weights_and_logs_equal_keras_train_on_batch_bit_for_bit(config: losses.Config) -> None:
    state, logs = trained(config)
    keras.utils.set_random_seed(config.seed)
    model, compiled = losses.VARIATIONS[config.variation](config)
    model.compile(**compiled)
    for batch, values in zip(batches(config), logs, strict=True):
        expected = model.train_on_batch(batch.x, batch.y, return_dict=True)
        assert {name: value for name, value in values.items() if name != "learning_rate"} == expected
        if config.variation == "schedule":
            assert values["learning_rate"] == float(model.optimizer.learning_rate)
    jax.tree.map(np.testing.assert_array_equal, state.trainable, [v.numpy() for v in model.trainable_variables])
    jax.tree.map(np.testing.assert_array_equal, state.non_trainable, [v.numpy() for v in model.non_trainable_variables])
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, [v.numpy() for v in model.optimizer.variables])


def test_custom_losses_and_metrics_equal_their_formulas() -> None:
    """In NumPy; metrics over two batches, with sample weights and without."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(losses.CLASSES), 32).astype("float32")
    y = rng.integers(0, losses.CLASSES, 32).astype("int32")
    t = np.eye(losses.CLASSES)[y]
    config = losses.Config()
    squares = losses.function(config)[1]["loss"](y, p)
    np.testing.assert_allclose(squares, ((t - p) ** 2).mean(-1), rtol=1e-5)
    weighted = losses.WeightedBinaryCrossentropy(pos_weight=9.0, weight=2.0)(y, p)
    np.testing.assert_allclose(weighted, 2 * np.mean(-9 * t * np.log(p) - (1 - t) * np.log(1 - p)), rtol=1e-5)
    weights = rng.uniform(size=32).astype("float32")
    correct, squares = p.argmax(-1) == y, ((t - p) ** 2).mean(-1)
    for w, sample_weight in ((np.ones(32), None), (weights, weights)):
        count, rmse = losses.CategoricalTruePositives(), losses.RMSE()
        for half in (slice(0, 20), slice(20, 32)):
            for metric in (count, rmse):
                metric.update_state(y[half], p[half], sample_weight=None if sample_weight is None else sample_weight[half])
        np.testing.assert_allclose(count.result(), (correct * w).sum(), rtol=1e-5)
        np.testing.assert_allclose(rmse.result(), np.sqrt((squares * w).sum() / w.sum()), rtol=1e-5)


def test_the_loss_includes_regularizers_and_add_loss() -> None:
    config = losses.Config(variation="activity", units=16, dropout=0.0)
    state, batch = losses.build(config).init(), batches(config)[0]
    _, logs = trained(config)
    kernel, bias, out, out_bias = (np.asarray(w, np.float64) for w in state.trainable)
    hidden = np.maximum(batch.x.reshape(-1, 64) / 16 @ kernel + bias, 0)
    logits = hidden @ out + out_bias
    crossentropy = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(batch.y)), batch.y]
    # Keras divides the value of an activity regularizer by the number of examples.
    added = 1e-4 * (kernel**2).sum() + 5e-3 * np.abs(hidden).sum() / len(hidden) + 0.1 * np.abs(hidden).mean()
    np.testing.assert_allclose(logs[0]["loss"], crossentropy.mean() + added, rtol=1e-5)


def test_a_metric_inside_a_layer_is_logged_and_changes_nothing_else() -> None:
    config = losses.Config(variation="inside", units=16)
    learner = losses.build(config)
    state, train, means = learner.init(), jax.jit(learner.train), []
    for batch in batches(config):
        kernel, bias = (np.asarray(w, np.float64) for w in state.trainable[:2])
        means.append(np.maximum(batch.x.reshape(-1, 64) / 16 @ kernel + bias, 0).mean())
        state, logs = train(state, batch)
        np.testing.assert_allclose(logs["activation"], np.mean(means), rtol=1e-5)
    _, logs = train(learner.reset(state), batches(config)[0])
    assert abs(float(logs["activation"]) - means[0]) > 1e-6  # the weights have changed, and the mean was reset
    plain, _ = trained(losses.Config(variation="plain", units=16))
    jax.tree.map(np.testing.assert_array_equal, state.trainable, plain.trainable)


@pytest.mark.promotes
def test_the_plateau_equals_optax_called_directly() -> None:
    config = losses.Config(variation="plateau", units=16)
    state, logs = trained(config)
    keras.utils.set_random_seed(config.seed)
    model, compiled = losses.plateau(config)
    transformation = compiled["optimizer"]

    def loss_fn(trainable: Any, non_trainable: Any, batch: research.Batch) -> Any:
        probabilities, non_trainable = model.stateless_call(trainable, non_trainable, batch.x, training=True)
        return keras.losses.SparseCategoricalCrossentropy()(batch.y, probabilities), non_trainable

    @jax.jit
    def step(trainable: Any, non_trainable: Any, slots: Any, batch: research.Batch) -> Any:
        (loss, non_trainable), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable, non_trainable, batch)
        updates, slots = transformation.update(grads, slots, trainable, value=loss)
        return optax.apply_updates(trainable, updates), non_trainable, slots

    trainable, non_trainable = (
        [jnp.array(v.value) for v in part] for part in (model.trainable_variables, model.non_trainable_variables)
    )
    slots = transformation.init(trainable)
    for batch in batches(config):
        trainable, non_trainable, slots = step(trainable, non_trainable, slots, batch)
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.optimizer["transform"]), (trainable, slots))
    assert [values["learning_rate"] for values in logs] == pytest.approx([config.learning_rate] * STEPS)


@pytest.mark.promotes
def test_the_plateau_halves_the_rate_after_patience_epochs_without_a_lower_loss() -> None:
    """The rate is too small to change the loss: after the first epoch, every `patience` epochs halve the rate."""
    config = losses.Config(variation="plateau", units=16, dropout=0.0, learning_rate=1e-12, patience=2, batch_size=479)
    splits, learner, rates = losses.data(config), losses.build(config), []
    research.train(
        learner,
        splits["train"],
        epochs=7,
        log=lambda entry: entry.step % 3 or rates.append(entry.values["learning_rate"]),
        log_every=3,
    )
    per_epoch = dict(enumerate(rates))
    assert splits["train"].steps_per_epoch == 3
    np.testing.assert_allclose([per_epoch[i] / 1e-12 for i in range(7)], [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125], rtol=1e-5)


def test_a_schedule_logs_the_learning_rate_of_the_next_step() -> None:
    config = losses.Config(variation="schedule", units=16, steps=10)
    _, logs = trained(config)
    expected = [config.learning_rate * (1 / 20) ** (step / 10) for step in range(1, STEPS + 1)]
    np.testing.assert_allclose([values["learning_rate"] for values in logs], expected, rtol=1e-5)
