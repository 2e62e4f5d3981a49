"""The first law: weights and logs equal Keras' own to the last bit, wherever Keras is right."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import CASES, Case

import research

STEPS = 7
# Keras' EMA and optax' bias correction multiply floats by integers.
MIXED = {"norm-ema"}
QUICK = {"norm-adam"}


def marks(name: str) -> list[Any]:
    return [pytest.mark.promotes] * (name in MIXED) + [pytest.mark.slow] * (name not in QUICK)


NAMES = [pytest.param(name, marks=marks(name)) for name in CASES]
THROUGH = ["supervised", pytest.param("from_keras", marks=pytest.mark.slow)]


def batches(case: Case) -> list[research.Batch]:
    rng = np.random.default_rng(0)
    return [research.Batch(*case.batch(rng)) for _ in range(STEPS)]


def keras_run(case: Case) -> tuple[keras.Model, list[dict[str, float]]]:
    """Weights from `train_on_batch`; logs from Keras' jitted `train_step`, whose metrics run on."""
    keras.utils.set_random_seed(1)
    model = case.model()
    model.compile(**case.compiled())
    for batch in batches(case):
        model.train_on_batch(batch.x, batch.y, sample_weight=batch.sample_weight)
    keras.utils.set_random_seed(1)
    other = case.model()
    other.compile(**case.compiled())
    first = batches(case)[0]
    other.test_on_batch(first.x, first.y, sample_weight=first.sample_weight)
    other.optimizer.build(other.trainable_variables)
    other.reset_metrics()
    keras.utils.set_random_seed(1)
    for fresh, seeded in zip(other.variables, case.model().variables, strict=True):
        fresh.assign(seeded.value)
    parts = [
        other.trainable_variables,
        other.non_trainable_variables,
        other.optimizer.variables,
        other.metrics_variables,
    ]
    state = tuple([v.value for v in part] for part in parts)
    step, logs = jax.jit(other.train_step), []
    for batch in batches(case):
        found, state = step(state, (batch.x, batch.y, batch.sample_weight))
        logs.append({name: float(value) for name, value in found.items()})
    return model, logs


def learner(case: Case, through: str) -> tuple[research.Learner, keras.Model, keras.Optimizer]:
    keras.utils.set_random_seed(1)
    model, compiled, example = case.model(), case.compiled(), batches(case)[0]
    if through == "from_keras":
        model.compile(**compiled)
        return research.from_keras(model, example), model, model.optimizer
    compiled["optimizer"] = keras.optimizers.get(compiled["optimizer"])
    return research.supervised(model, example=example, **compiled), model, compiled["optimizer"]


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_logs_equal_keras_bit_for_bit(name: str, through: str) -> None:
    case = CASES[name]
    expected, expected_logs = keras_run(case)
    mine, model, optimizer = learner(case, through)
    state, step = mine.init(), jax.jit(mine.train, donate_argnums=0)
    for batch, wanted in zip(batches(case), expected_logs, strict=True):
        state, logs = step(state, batch)
        assert {name: float(value) for name, value in logs.items()} == wanted
    research.write_back(state, model, optimizer)
    for variable, wanted in zip(model.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(variable.value, wanted.value, err_msg=variable.path)
    for variable, wanted in zip(optimizer.variables, expected.optimizer.variables, strict=True):
        np.testing.assert_array_equal(variable.value, wanted.value, err_msg=variable.path)


@pytest.mark.slow
@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_equals_keras_test_on_batch_bit_for_bit(name: str, through: str) -> None:
    case = CASES[name]
    mine, model, _ = learner(case, through)
    batch = batches(case)[0]
    state, logs = jax.jit(mine.evaluate)(mine.init(), batch)
    if through == "supervised":
        model.compile(**case.compiled())
    wanted = model.test_on_batch(batch.x, batch.y, sample_weight=batch.sample_weight, return_dict=True)
    assert {name: float(value) for name, value in logs.items()} == {name: float(value) for name, value in wanted.items()}
    np.testing.assert_array_equal(
        jax.tree.leaves(jax.jit(mine.predict)(state, batch))[0],
        jax.tree.leaves(model.predict_on_batch(batch.x))[0],
    )


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize(
    "transformation",
    [
        optax.adam(1e-2),
        optax.sgd(1e-2, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(1e-2, 5), weight_decay=1e-2)),
        optax.inject_hyperparams(optax.lion)(learning_rate=1e-3),
    ],
    ids=["adam", "momentum", "adamw-schedule", "lion"],
)
@pytest.mark.parametrize("name", ["norm-adam", "two-outputs-weighted", "subclassed-add-loss"])
def test_optax_equals_a_hand_written_step_over_keras_own_loss(name: str, transformation: optax.GradientTransformation) -> None:
    """Keras' `compute_loss_and_updates`, `jax.value_and_grad` and the transformation, as its users write it."""
    case = CASES[name]
    keras.utils.set_random_seed(1)
    model, first = case.model(), batches(case)[0]
    model.compile(**case.compiled())
    model.test_on_batch(first.x, first.y, sample_weight=first.sample_weight)
    keras.utils.set_random_seed(1)
    for variable, fresh in zip(model.variables, case.model().variables, strict=True):
        variable.assign(fresh.value)

    @jax.jit
    def step(trainable: Any, rest: Any, slots: Any, batch: research.Batch) -> Any:
        metrics = [v.value for v in model.metrics_variables]
        compute = jax.value_and_grad(model.compute_loss_and_updates, has_aux=True)
        (loss, aux), grads = compute(
            trainable,
            rest,
            metrics,
            batch.x,
            batch.y,
            batch.sample_weight,
            training=True,
            optimizer_variables=[v.value for v in model.optimizer.variables],
        )
        updates, slots = transformation.update(grads, slots, trainable)
        return optax.apply_updates(trainable, updates), aux[2], slots, loss

    trainable, rest = ([jnp.array(v.value) for v in part] for part in (model.trainable_variables, model.non_trainable_variables))
    slots = transformation.init(trainable)
    keras.utils.set_random_seed(1)
    mine = research.supervised(case.model(), example=first, **{**case.compiled(), "optimizer": transformation})
    state, train = mine.init(), jax.jit(mine.train)
    for batch in batches(case):
        trainable, rest, slots, loss = step(trainable, rest, slots, batch)
        state, logs = train(mine.reset(state), batch)
        assert float(logs["loss"]) == float(loss)
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.non_trainable), (trainable, rest))
    jax.tree.map(np.testing.assert_array_equal, state.optimizer["transform"], slots)
    assert int(state.optimizer["iterations"]) == STEPS


class Custom(keras.Model):
    """A step of one's own, in Keras' JAX signature, with a metric of one's own: as Keras' guide writes it, but right."""

    def __init__(self) -> None:
        super().__init__()
        self.head = keras.layers.Dense(1)
        self.drop = keras.layers.Dropout(0.5)
        self.error = keras.metrics.MeanAbsoluteError(name="error")

    def build(self, shape: Any) -> None:
        self.head.build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.head(self.drop(x, training=training))

    @property
    def metrics(self) -> list[keras.Metric]:
        return [self.error]

    def penalised(self, trainable: Any, rest: Any, x: Any, y: Any, training: bool) -> Any:
        outputs, rest = self.stateless_call(trainable, rest, x, training=training)
        return keras.ops.mean((outputs - y) ** 4), (outputs, rest)

    def train_step(self, state: Any, data: Any) -> Any:
        (trainable, rest, slots, metrics), (x, y) = state, data
        (_, (outputs, rest)), grads = jax.value_and_grad(self.penalised, has_aux=True)(trainable, rest, x, y, True)
        trainable, slots = self.optimizer.stateless_apply(slots, grads, trainable)
        metrics = self.error.stateless_update_state(metrics, y, outputs)
        return {"error": self.error.stateless_result(metrics)}, (trainable, rest, slots, metrics)

    def test_step(self, state: Any, data: Any) -> Any:
        (trainable, rest, metrics), (x, y) = state, data
        _, (outputs, rest) = self.penalised(trainable, rest, x, y, False)
        metrics = self.error.stateless_update_state(metrics, y, outputs)
        return {"error": self.error.stateless_result(metrics)}, (trainable, rest, metrics)


@pytest.mark.slow
def test_a_train_step_of_ones_own_runs_in_our_loop_as_in_keras_fit() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)).astype("float32"), rng.normal(size=(20, 1)).astype("float32")

    def model() -> keras.Model:
        keras.utils.set_random_seed(1)
        made = Custom()
        made.build((None, 4))
        made.compile(optimizer=keras.optimizers.Adam(1e-2))
        return made

    fitted, mine = model(), model()
    history = fitted.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, validation_data=(x, y)).history
    data = research.arrays(x, y, batch_size=8, shuffle=False)
    state, logs = research.train(research.from_keras(mine), data, epochs=3, evaluations={"val": data})
    research.write_back(state, mine, mine.optimizer)
    for variable, wanted in zip(mine.variables, fitted.variables, strict=True):
        np.testing.assert_array_equal(variable.value, wanted.value)
    assert logs == {name: values[-1] for name, values in history.items()}
