"""Weights and logs equal Keras' own bit for bit, wherever Keras is right."""

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
PROMOTES = {"norm-ema"}  # Keras' moving average multiplies floats by integers
FAST = {"norm-adam"}


def marks(name: str) -> list[Any]:
    return [pytest.mark.promotes] * (name in PROMOTES) + [pytest.mark.slow] * (name not in FAST)


NAMES = [pytest.param(name, marks=marks(name)) for name in CASES]
CONSTRUCTORS = ["supervised", pytest.param("from_keras", marks=pytest.mark.slow)]


def batches(case: Case) -> list[research.Batch]:
    rng = np.random.default_rng(0)
    return [research.Batch(*case.batch(rng)) for _ in range(STEPS)]


def keras_run(case: Case) -> tuple[keras.Model, list[dict[str, float]]]:
    """Returns a model trained by `train_on_batch`, and the logs of Keras' jitted `train_step`, which accumulate over steps."""
    keras.utils.set_random_seed(1)
    model = case.model()
    model.compile(**case.compile_args())
    for batch in batches(case):
        model.train_on_batch(batch.x, batch.y, sample_weight=batch.sample_weight)
    keras.utils.set_random_seed(1)
    stepped = case.model()
    stepped.compile(**case.compile_args())
    first = batches(case)[0]
    stepped.test_on_batch(first.x, first.y, sample_weight=first.sample_weight)
    stepped.optimizer.build(stepped.trainable_variables)
    stepped.reset_metrics()
    keras.utils.set_random_seed(1)
    for variable, initial in zip(stepped.variables, case.model().variables, strict=True):
        variable.assign(initial.value)
    parts = [
        stepped.trainable_variables,
        stepped.non_trainable_variables,
        stepped.optimizer.variables,
        stepped.metrics_variables,
    ]
    state = tuple([v.value for v in part] for part in parts)
    step, logs = jax.jit(stepped.train_step), []
    for batch in batches(case):
        step_logs, state = step(state, (batch.x, batch.y, batch.sample_weight))
        logs.append({name: float(value) for name, value in step_logs.items()})
    return model, logs


def build_learner(case: Case, constructor: str) -> tuple[research.Learner, keras.Model, keras.Optimizer]:
    keras.utils.set_random_seed(1)
    model, compile_args, example = case.model(), case.compile_args(), batches(case)[0]
    if constructor == "from_keras":
        model.compile(**compile_args)
        return research.from_keras(model, example), model, model.optimizer
    optimizer = keras.optimizers.get(compile_args.pop("optimizer"))
    return research.supervised(model, example=example, optimizer=optimizer, **compile_args), model, optimizer


@pytest.mark.sample(6)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_logs_equal_keras_bit_for_bit(name: str, constructor: str) -> None:
    case = CASES[name]
    expected, expected_logs = keras_run(case)
    learner, model, optimizer = build_learner(case, constructor)
    state, step = learner.init(), jax.jit(learner.train, donate_argnums=0)
    for batch, keras_logs in zip(batches(case), expected_logs, strict=True):
        state, logs = step(state, batch)
        assert {name: float(value) for name, value in logs.items()} == keras_logs
    research.write_back(state, model, optimizer)
    for a, b in zip(model.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(a.value, b.value, err_msg=a.path)
    for a, b in zip(optimizer.variables, expected.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.value, b.value, err_msg=a.path)


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_equals_keras_test_on_batch_bit_for_bit(name: str, constructor: str) -> None:
    case = CASES[name]
    learner, model, _ = build_learner(case, constructor)
    batch = batches(case)[0]
    state, logs = jax.jit(learner.evaluate)(learner.init(), batch)
    if constructor == "supervised":
        model.compile(**case.compile_args())
    keras_logs = model.test_on_batch(batch.x, batch.y, sample_weight=batch.sample_weight, return_dict=True)
    assert {name: float(value) for name, value in logs.items()} == {name: float(value) for name, value in keras_logs.items()}
    np.testing.assert_array_equal(
        jax.tree.leaves(jax.jit(learner.predict)(state, batch))[0],
        jax.tree.leaves(model.predict_on_batch(batch.x))[0],
    )


@pytest.mark.sample(3)
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
def test_optax_equals_a_hand_written_step_with_keras_own_loss(name: str, transformation: optax.GradientTransformation) -> None:
    """The hand-written step is Keras' `compute_loss_and_updates` under `jax.value_and_grad`, then the transformation."""
    case = CASES[name]
    keras.utils.set_random_seed(1)
    model, first = case.model(), batches(case)[0]
    model.compile(**case.compile_args())
    model.test_on_batch(first.x, first.y, sample_weight=first.sample_weight)
    keras.utils.set_random_seed(1)
    for variable, initial in zip(model.variables, case.model().variables, strict=True):
        variable.assign(initial.value)

    @jax.jit
    def step(trainable: Any, non_trainable: Any, slots: Any, batch: research.Batch) -> Any:
        metrics = [v.value for v in model.metrics_variables]
        compute = jax.value_and_grad(model.compute_loss_and_updates, has_aux=True)
        (loss, aux), grads = compute(
            trainable,
            non_trainable,
            metrics,
            batch.x,
            batch.y,
            batch.sample_weight,
            training=True,
            optimizer_variables=[v.value for v in model.optimizer.variables],
        )
        updates, slots = transformation.update(grads, slots, trainable)
        return optax.apply_updates(trainable, updates), aux[2], slots, loss

    trainable = [jnp.array(v.value) for v in model.trainable_variables]
    non_trainable = [jnp.array(v.value) for v in model.non_trainable_variables]
    slots = transformation.init(trainable)
    keras.utils.set_random_seed(1)
    learner = research.supervised(case.model(), example=first, **{**case.compile_args(), "optimizer": transformation})
    state, train = learner.init(), jax.jit(learner.train)
    for batch in batches(case):
        trainable, non_trainable, slots, loss = step(trainable, non_trainable, slots, batch)
        state, logs = train(learner.reset(state), batch)
        assert float(logs["loss"]) == float(loss)
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.non_trainable), (trainable, non_trainable))
    jax.tree.map(np.testing.assert_array_equal, state.optimizer["transform"], slots)
    assert int(state.optimizer["iterations"]) == STEPS


class CustomTraining(keras.Model):
    """A model with its own metric and its own `train_step` and `test_step`, in the signature of Keras' JAX backend."""

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

    def loss_and_outputs(self, trainable: Any, non_trainable: Any, x: Any, y: Any, training: bool) -> Any:
        outputs, non_trainable = self.stateless_call(trainable, non_trainable, x, training=training)
        return keras.ops.mean((outputs - y) ** 4), (outputs, non_trainable)

    def train_step(self, state: Any, data: Any) -> Any:
        (trainable, non_trainable, slots, metrics), (x, y) = state, data
        compute = jax.value_and_grad(self.loss_and_outputs, has_aux=True)
        (_, (outputs, non_trainable)), grads = compute(trainable, non_trainable, x, y, True)
        trainable, slots = self.optimizer.stateless_apply(slots, grads, trainable)
        metrics = self.error.stateless_update_state(metrics, y, outputs)
        return {"error": self.error.stateless_result(metrics)}, (trainable, non_trainable, slots, metrics)

    def test_step(self, state: Any, data: Any) -> Any:
        (trainable, non_trainable, metrics), (x, y) = state, data
        _, (outputs, non_trainable) = self.loss_and_outputs(trainable, non_trainable, x, y, False)
        metrics = self.error.stateless_update_state(metrics, y, outputs)
        return {"error": self.error.stateless_result(metrics)}, (trainable, non_trainable, metrics)


@pytest.mark.slow
def test_a_custom_train_step_runs_in_research_train_as_in_keras_fit() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)).astype("float32"), rng.normal(size=(20, 1)).astype("float32")

    def build() -> keras.Model:
        keras.utils.set_random_seed(1)
        model = CustomTraining()
        model.build((None, 4))
        model.compile(optimizer=keras.optimizers.Adam(1e-2))
        return model

    expected, model = build(), build()
    history = expected.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, validation_data=(x, y)).history
    data = research.from_arrays(x, y, batch_size=8, shuffle=False)
    state, logs = research.train(research.from_keras(model), data, epochs=3, evaluations={"val": data})
    research.write_back(state, model, model.optimizer)
    for a, b in zip(model.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(a.value, b.value)
    assert logs == {name: values[-1] for name, values in history.items()}
