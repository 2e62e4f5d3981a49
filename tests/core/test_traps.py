"""One test for each silent mistake that hand-written training of Keras models in JAX makes, and that this package avoids."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from keras import layers

import research
from research import Batch, State


def dense(units: int = 1, **options: Any) -> keras.Model:
    return keras.Sequential([keras.Input((2,)), layers.Dense(units, **options)])


def batch(rows: int = 4, features: int = 2, targets: int = 1) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(rng.normal(size=(rows, features)).astype("float32"), rng.normal(size=(rows, targets)).astype("float32"))


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_an_objective_requires_the_training_argument() -> None:
    objective, metrics = research.keras_objective(dense(), loss="mse")
    state = State(*[[v.value for v in dense().trainable_variables], [], [], metrics.init()])
    with pytest.raises(TypeError, match="training"):
        objective(state, batch())  # type: ignore[call-arg]


@pytest.mark.slow
def test_training_drops_units_and_evaluation_does_not() -> None:
    model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.5), layers.Dense(1, kernel_initializer="ones")])
    objective, metrics = research.keras_objective(model, loss="mse")
    state = research.supervised(model, loss="mse").init()._replace(metrics=metrics.init())
    ones = Batch(jnp.ones((8, 64)), jnp.zeros((8, 1)))
    _, trained = objective(state, ones, training=True)
    _, evaluated = objective(state, ones, training=False)
    assert len(set(np.ravel(trained.outputs).tolist())) > 1
    np.testing.assert_allclose(evaluated.outputs, 64.0)


def test_batch_statistics_and_dropout_seeds_move_from_step_to_step() -> None:
    model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)])
    learner = research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(0.0))
    state, losses = learner.init(), []
    before = leaves(state.non_trainable)
    for _ in range(3):
        state = learner.reset(state)
        state, logs = jax.jit(learner.train)(state, batch(64))
        losses.append(float(logs["loss"]))
    assert len(set(losses)) == 3  # same weights, same batch: only the masks differ
    assert all((a != b).any() for a, b in zip(before, leaves(state.non_trainable), strict=True))


def test_regularization_losses_use_the_weights_in_the_state() -> None:
    objective, metrics = research.keras_objective(dense(kernel_regularizer=keras.regularizers.L2(0.5)), loss="mse")
    bias, metric_state = jnp.zeros(1), metrics.init()
    zero = Batch(jnp.zeros((4, 2)), jnp.zeros((4, 1)))
    for size in (1.0, 3.0):
        loss, _ = objective(State([jnp.full((2, 1), size), bias], [], [], metric_state), zero, training=True)
        assert float(loss) == 0.5 * 2 * size**2


def bfloat16_model() -> keras.Model:
    class Linear(keras.Model):
        def __init__(self) -> None:
            super().__init__(dtype="mixed_bfloat16", activity_regularizer=keras.regularizers.L2(1.0))
            self.kernel = self.add_weight(shape=(2, 1), initializer="glorot_uniform")

        def build(self, shape: Any) -> None:
            self.built = True

        def call(self, x: Any) -> Any:
            return keras.ops.matmul(x, self.kernel)

    model = Linear()
    model.build((None, 2))
    return model


def test_the_outermost_model_computes_in_its_own_precision() -> None:
    model, x = bfloat16_model(), batch().x
    learner = research.supervised(model, loss="mse", example=batch())
    expected = model(x)
    outputs = learner.predict(learner.init(), batch())
    assert outputs.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(outputs, expected)
    raw, _ = model.stateless_call(model.trainable_variables, model.non_trainable_variables, x)
    assert raw.dtype == jnp.float32  # stateless_call skips the dtype policy of the outermost model


def test_the_outermost_models_activity_regularizer_counts() -> None:
    model = bfloat16_model()
    objective, _ = research.keras_objective(model, loss=None, example=batch())
    learner = research.supervised(model, example=batch())
    loss, _ = objective(learner.init(), batch(), training=True)
    outputs = np.asarray(model(batch().x), np.float32)
    np.testing.assert_allclose(float(loss), np.sum(outputs**2) / len(outputs), rtol=1e-2)


def masked_model() -> keras.Model:
    return keras.Sequential([keras.Input((3, 1)), layers.Masking(), layers.Dense(1, kernel_initializer="ones")])


def masked_batch() -> Batch:
    x = np.array([[[1.0], [0.0], [0.0]], [[1.0], [1.0], [0.0]]], "float32")
    return Batch(x, np.full((2, 3, 1), 10.0, "float32") * (x == 0) + 2.0 * (x != 0))


def test_masks_reach_training_metrics() -> None:
    learner = research.supervised(masked_model(), loss="mae", metrics=["mae"], optimizer=keras.optimizers.SGD(0.0))
    _, trained = learner.train(learner.init(), masked_batch())
    _, evaluated = learner.evaluate(learner.init(), masked_batch())
    assert float(trained["mae"]) == float(evaluated["mae"]) == float(trained["loss"]) == 1.0
    model = masked_model()
    model.compile(loss="mae", metrics=["mae"], optimizer=keras.optimizers.SGD(0.0))
    logs = model.train_on_batch(*masked_batch()[:2], return_dict=True)
    assert float(logs["mae"]) > 4  # Keras loses the mask


@pytest.mark.slow
def test_a_gradient_returns_the_denominator_of_its_mean_loss() -> None:
    weighted = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    for model, loss, examples, expected in [
        (dense(), "mse", batch(), 4.0),
        (masked_model(), "mse", masked_batch(), 3.0),
        (dense(), weighted, batch()._replace(sample_weight=np.array([1.0, 2.0, 3.0, 4.0], "float32")), 10.0),
        (dense(), "mse", batch()._replace(valid=np.array([True, True, False, False])), 2.0),
    ]:
        objective, _ = research.keras_objective(model, loss=loss)
        state = research.supervised(model, loss=loss).init()
        _, gradients = research.gradient(objective)(state, examples)
        assert float(gradients.weight) == expected


def test_sample_weights_reach_only_weighted_metrics_and_the_loss_divides_by_the_number_of_examples() -> None:
    model = dense(kernel_initializer="zeros")
    learner = research.supervised(model, loss="mae", metrics=["mae"], weighted_metrics=["mse"])
    weighted = Batch(np.zeros((2, 2), "float32"), np.array([[1.0], [3.0]], "float32"), np.array([3.0, 1.0], "float32"))
    _, logs = learner.evaluate(learner.init(), weighted)
    assert {name: float(value) for name, value in logs.items()} == {"loss": 3.0, "mae": 2.0, "mse": 3.0}


def test_the_running_loss_weights_batches_by_their_size() -> None:
    learner = research.supervised(dense(kernel_initializer="zeros"), loss="mae")
    state, _ = learner.evaluate(learner.init(), Batch(jnp.zeros((3, 2)), jnp.ones((3, 1))))
    _, logs = learner.evaluate(state, Batch(jnp.zeros((1, 2)), jnp.full((1, 1), 5.0)))
    assert float(logs["loss"]) == 2.0


@pytest.mark.slow
def test_evaluation_starts_from_empty_metrics_and_reset_returns_arrays_only() -> None:
    learner = research.supervised(dense(), loss="mse", metrics=["mae", keras.metrics.AUC()])
    state, _ = learner.train(learner.init(), Batch(batch().x, np.ones((4, 1), "float32") * 100))
    data = research.from_arrays(batch().x, np.ones((4, 1), "float32"), batch_size=4, shuffle=False)
    fresh = research.evaluate(learner, data, state._replace(metrics=learner.init().metrics))
    assert research.evaluate(learner, data, state) == fresh
    cleared = learner.reset(state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cleared))
    assert all(not leaf.any() for leaf in leaves(cleared.metrics))


def test_setting_the_learning_rate_in_the_state_does_not_recompile() -> None:
    optimizer = keras.optimizers.SGD(0.0)
    learner = research.supervised(dense(), loss="mse", optimizer=optimizer)
    step, state = jax.jit(learner.train), learner.init()
    unchanged, _ = step(state, batch())
    np.testing.assert_array_equal(unchanged.trainable[0], state.trainable[0])
    optimizer.learning_rate = 0.5
    ignored, _ = step(unchanged, batch())
    np.testing.assert_array_equal(ignored.trainable[0], state.trainable[0])  # a compiled step does not see the assignment
    moved, _ = step(research.set_learning_rate(unchanged, 0.5, optimizer), batch())
    assert (np.asarray(moved.trainable[0]) != np.asarray(state.trainable[0])).any()
    assert step._cache_size() == 1


def test_the_learning_rate_of_a_schedule_cannot_be_set() -> None:
    optimizer = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10))
    learner = research.supervised(dense(), loss="mse", optimizer=optimizer)
    with pytest.raises(research.InvalidArgument, match="schedule"):
        research.set_learning_rate(learner.init(), 0.5, optimizer)


def test_the_loss_scale_is_read_from_the_state() -> None:
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0))
    learner = research.supervised(dense(), loss="mse", optimizer=optimizer)
    step, state = jax.jit(learner.train), learner.init()
    names = learner.names.optimizer
    position = names.index("dynamic_scale")
    finite, _ = step(state, batch())
    assert (leaves(finite.trainable)[0] != leaves(state.trainable)[0]).any()
    slots = list(state.optimizer)
    slots[position] = jnp.asarray(8.0, jnp.float32)
    rescaled, _ = step(state._replace(optimizer=slots), batch())
    np.testing.assert_array_equal(rescaled.trainable[0], finite.trainable[0])
    slots[position] = jnp.asarray(1e38, jnp.float32) * 3  # overflows in the backward pass
    overflowed, _ = step(state._replace(optimizer=slots), batch()._replace(y=batch().y * 1e3))
    np.testing.assert_array_equal(overflowed.trainable[0], state.trainable[0])
    assert float(overflowed.optimizer[position]) == float(slots[position]) / 2
    assert step._cache_size() == 1


def two_layers() -> keras.Model:
    return keras.Sequential([keras.Input((2,)), layers.Dense(2, name="one"), layers.Dense(2, name="two")])


@pytest.mark.parametrize("change", ["freeze", "swap"])
@pytest.mark.parametrize("build_optimizer", [lambda: keras.optimizers.Adam(), lambda: keras.optimizers.SGD(momentum=0.9)])
def test_an_optimizer_built_for_other_variables_is_refused(change: str, build_optimizer: Any) -> None:
    model, optimizer = two_layers(), build_optimizer()
    if change == "swap":
        model.layers[1].trainable = False
    optimizer.build(model.trainable_variables)
    model.layers[0].trainable, model.layers[1].trainable = False, True
    with pytest.raises(research.InvalidArgument, match="new optimizer"):
        learner = research.supervised(model, loss="mse", optimizer=optimizer)
        jax.eval_shape(learner.train, learner.init(), batch(targets=2))


@pytest.mark.slow
def test_layers_frozen_before_training_keep_their_weights() -> None:
    model = two_layers()
    model.layers[0].trainable = False
    learner = research.supervised(model, loss="mse", optimizer="adam")
    state, _ = learner.train(learner.init(), batch(targets=2))
    research.write_back(state, model)
    np.testing.assert_array_equal(model.layers[0].kernel, learner.init().non_trainable[0])
    assert len(state.trainable) == 2


@pytest.mark.parametrize("build", [research.from_keras, lambda m: research.supervised(m, loss="mse", optimizer=m.optimizer)])
def test_donation_never_deletes_what_the_keras_model_holds(build: Any) -> None:
    model = dense()
    model.compile(loss="mse", optimizer="adam")
    before = [np.array(v.value) for v in model.variables]
    learner = build(model)
    state, step = learner.init(), jax.jit(learner.train, donate_argnums=0)
    for _ in range(2):
        state, _ = step(state, batch())
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.value, value)
    research.write_back(state, model, model.optimizer)
    written = [np.array(v.value) for v in model.variables]
    step(state, batch())
    for variable, value in zip([*model.variables, *model.optimizer.variables], written, strict=False):
        np.testing.assert_array_equal(variable.value, value)
    model.summary(print_fn=lambda *_: None)


def test_evaluation_neither_changes_nor_donates_nor_copies_the_weights() -> None:
    learner = research.supervised(dense(), loss="mse", metrics=["mae"])
    state = learner.init()
    before = leaves(state)
    data = research.from_arrays(np.ones((5, 2)), np.ones((5, 1)), batch_size=2)
    first, second = (research.evaluate(learner, data, state) for _ in range(2))
    assert first == second
    for leaf, value in zip(jax.tree.leaves(state), before, strict=True):
        np.testing.assert_array_equal(leaf, value)
    program = research.training.programs.jit_without_copies(learner.evaluate, state, batch())
    after, _ = program(state, batch())
    assert all(a is b for a, b in zip(after.trainable, state.trainable, strict=True))
    assert all(a is b for a, b in zip(after.optimizer, state.optimizer, strict=True))


def test_sample_weights_with_another_structure_than_the_targets_raise_keras_own_error() -> None:
    x = keras.Input((2,))
    model = keras.Model(x, {"a": layers.Dense(1, name="a")(x), "b": layers.Dense(1, name="b")(x)})
    learner = research.supervised(model, loss="mse")
    y = {"a": np.ones((4, 1), "float32"), "b": np.ones((4, 1), "float32")}
    mismatched = Batch(batch().x, y, {"a": np.ones(4, "float32")})
    model.compile(loss="mse")
    with pytest.raises(KeyError) as expected:
        model.train_on_batch(mismatched.x, mismatched.y, sample_weight=mismatched.sample_weight)
    with pytest.raises(KeyError) as actual:
        learner.train(learner.init(), mismatched)
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]


def test_class_weights_become_sample_weights_and_cannot_be_combined_with_them() -> None:
    y = np.array([0, 1, 2, 1])
    for labels in (y, y[:, None], np.eye(3)[y]):
        data = research.from_arrays(np.zeros((4, 2)), labels, batch_size=4, shuffle=False, class_weight={1: 3.0, 2: 0.5})
        assert data.batch(0).sample_weight.tolist() == [1.0, 3.0, 0.5, 3.0]
    with pytest.raises(research.InvalidArgument, match="class_weight and sample_weight"):
        research.from_arrays(np.zeros((4, 2)), y, np.ones(4), batch_size=4, class_weight={1: 3.0})


def test_dropout_is_active_in_training_when_call_has_no_training_argument() -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.head = layers.Dropout(0.5), layers.Dense(1, kernel_initializer="ones")

        def call(self, x: Any) -> Any:
            return self.head(self.drop(x))

    ones = Batch(np.ones((8, 64), "float32"), np.zeros((8, 1), "float32"))
    model = Net()
    objective, _ = research.keras_objective(model, loss="mse", example=ones)
    _, aux = objective(research.supervised(model, loss="mse", example=ones).init(), ones, training=True)
    assert len(set(np.ravel(aux.outputs).tolist())) > 1


def test_a_metric_updated_inside_a_layer_is_logged() -> None:
    class Monitored(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.mean = keras.metrics.Mean(name="activation")

        def call(self, x: Any) -> Any:
            self.mean.update_state(x)
            return x

    model = keras.Sequential([keras.Input((2,)), Monitored(), layers.Dense(1)])
    learner = research.supervised(model, loss="mse", metrics=["mae"])
    state, step = learner.init(), jax.jit(learner.train)
    inputs = [np.full((4, 2), value, "float32") for value in (1.0, 4.0)]
    for x in inputs:
        state, logs = step(state, Batch(x, np.ones((4, 1), "float32")))
    assert float(logs["activation"]) == 2.5
    assert float(learner.evaluate(learner.reset(state), Batch(inputs[1], np.ones((4, 1))))[1]["activation"]) == 4.0


def test_updates_are_counted_for_optax_transformations_without_a_count() -> None:
    update = research.optax_update(optax.sgd(0.1))
    learner = research.supervised(dense(), loss="mse", optimizer=optax.sgd(0.1))
    state = learner.init()
    for _ in range(3):
        state, _ = learner.train(state, batch())
    assert int(update.iterations(state)) == 3


def test_keras_constraints_apply_after_optax_updates() -> None:
    model = dense(kernel_constraint=keras.constraints.NonNeg())
    learner = research.supervised(model, loss="mse", optimizer=optax.sgd(10.0))
    state, _ = learner.train(learner.init(), batch()._replace(y=np.full((4, 1), -5.0, "float32")))
    assert (np.asarray(state.trainable[0]) >= 0).all()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)


@pytest.mark.slow
def test_importing_research_selects_the_jax_backend(tmp_path: Any) -> None:
    code = "import research, keras; print(keras.backend.backend())"
    process = run_python(code, HOME=str(tmp_path), KERAS_BACKEND="tensorflow")
    assert (process.returncode, process.stdout) == (0, "jax\n"), process.stderr


@pytest.mark.slow
def test_importing_research_after_another_backend_raises_an_error_in_one_line(tmp_path: Any) -> None:
    process = run_python("import keras, research", HOME=str(tmp_path), KERAS_BACKEND="numpy")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("ImportError: research: Keras is already loaded with the 'numpy' backend")


@pytest.mark.slow
def test_data_on_the_device_is_an_argument_of_the_program_and_not_a_constant(tmp_path: Any) -> None:
    learner = research.supervised(dense(), loss="mse")
    data = research.from_arrays(np.ones((100_000, 2)), np.ones((100_000, 1)), batch_size=50_000)
    jax.config.update("jax_dump_ir_to", str(tmp_path))
    try:
        research.train(learner, data, steps=1, evaluations={"val": data})
    finally:
        jax.config.update("jax_dump_ir_to", None)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sizes
    assert max(sizes) < 200_000
