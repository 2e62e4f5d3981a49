"""`research.fit` and the other methods equal Keras' own: the same numbers, callbacks and messages."""

import inspect
import itertools
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
from cases import CASES, SIZE
from fit_models import FITS, BatchCallback, all_values, compiled_model, examples, keras_fit, linear_data, small_model, trees_equal
from instrumentation import device_reads
from keras import layers

import research
from research.cpu.loops import runs_well_in_loop
from research.keras_fit.callbacks import LazyLogs
from research.keras_fit.fit import evaluate as fit_evaluate
from research.keras_fit.fit import predict as fit_predict
from research.transforms.fuse import fuse

METHODS: dict[str, Any] = {
    "fit": research.fit,
    "evaluate": fit_evaluate,
    "predict": fit_predict,
    "train_on_batch": research.train_on_batch,
    "test_on_batch": research.test_on_batch,
    "predict_on_batch": research.predict_on_batch,
}
pytestmark = [pytest.mark.promotes, pytest.mark.slow]


@pytest.mark.parametrize("name", METHODS)
def test_each_function_has_the_signature_of_the_keras_method(name: str) -> None:
    def parameters(function: Any) -> list[Any]:
        return [(p.name, p.kind, p.default) for p in list(inspect.signature(function).parameters.values())[1:]]

    assert parameters(METHODS[name]) == parameters(getattr(keras.Model, name))


MODES = ("one step per dispatch", "steps_per_execution=3")
CASES_IN_ALL_MODES = ("norm-adamw-schedule", "norm-ema", "two-outputs-weighted")


@pytest.mark.sample(6)
@pytest.mark.parametrize(("name", "mode"), [*((name, "fused") for name in CASES), *itertools.product(CASES_IN_ALL_MODES, MODES)])
def test_fit_equals_keras_bit_for_bit_with_shuffling_and_validation(name: str, mode: str) -> None:
    case = CASES[name]
    x, y, weight = examples(case, 12)
    validation = examples(case, 2)
    compile_options = {"steps_per_execution": 3} if mode == "steps_per_execution=3" else {}
    options: dict[str, Any] = {"batch_size": SIZE, "epochs": 3, "verbose": 0, "sample_weight": weight}
    options["validation_data"] = validation if validation[2] is not None else validation[:2]

    def train(fit: Callable[..., Any]) -> tuple[Any, Any, Any]:
        model = compiled_model(case, **compile_options)
        keras.utils.set_random_seed(1)
        callbacks = [BatchCallback()] if mode == "one step per dispatch" else None
        history = fit(model, x, y, callbacks=callbacks, **options).history
        return history, all_values(model), float(np.random.random())  # the generator that Keras shuffles with, too

    result, expected = (train(fit) for fit in FITS)
    assert trees_equal(result, expected)


@pytest.mark.parametrize("name", ["norm-adam", "two-outputs-weighted", "sequence-masked"])
def test_evaluate_predict_and_the_on_batch_methods_equal_keras_bit_for_bit(name: str) -> None:
    case = CASES[name]
    model, reference = compiled_model(case), compiled_model(case)
    x, y, weight = examples(case, 5)
    for _ in range(3):
        logs = research.train_on_batch(model, x, y, sample_weight=weight)
        assert trees_equal(logs, reference.train_on_batch(x, y, sample_weight=weight))
    logs = research.test_on_batch(model, x, y, weight, return_dict=True)
    assert trees_equal(logs, reference.test_on_batch(x, y, weight, return_dict=True))
    assert trees_equal(research.predict_on_batch(model, x), reference.predict_on_batch(x))
    options: dict[str, Any] = {"batch_size": SIZE, "verbose": 0}
    logs = research.evaluate(model, x, y, sample_weight=weight, **options)
    assert trees_equal(logs, reference.evaluate(x, y, sample_weight=weight, **options))
    assert trees_equal(research.predict(model, x, **options), reference.predict(x, **options))
    assert trees_equal(all_values(model), all_values(reference))


class CustomSteps(keras.Model):
    """A model with its own `train_step`, `compute_loss` and metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(1)
        self.mean = keras.metrics.Mean(name="mean")

    def call(self, x: Any, training: bool = False) -> Any:
        return self.dense(x)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        return 2 * keras.ops.mean((y - y_pred) ** 2)

    @property
    def metrics(self) -> list[Any]:
        return [self.mean]

    def train_step(self, state: Any, data: Any) -> Any:
        trainable, non_trainable, slots, metrics = state
        x, y = data

        def loss(trainable: Any) -> Any:
            outputs, _ = self.stateless_call(trainable, non_trainable, x, training=True)
            return self.compute_loss(x, y, outputs)

        value, gradients = jax.value_and_grad(loss)(trainable)
        trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
        metrics = self.mean.stateless_update_state(metrics, value)
        return {"doubled": value, "mean": self.mean.stateless_result(metrics)}, (trainable, non_trainable, slots, metrics)


def test_a_models_own_train_step_runs_unchanged() -> None:
    def train(fit: Callable[..., Any]) -> Any:
        keras.utils.set_random_seed(0)
        model = CustomSteps()
        model.compile(keras.optimizers.SGD(0.1))
        history = fit(model, *linear_data(), epochs=2, verbose=0).history
        return history, all_values(model)

    result, expected = (train(fit) for fit in FITS)
    assert set(result[0]) == {"doubled", "mean"}
    assert trees_equal(result, expected)


@pytest.mark.parametrize("eager", [{"run_eagerly": True}, {"jit_compile": False}])
def test_eager_equals_compiled_to_1e6(eager: dict[str, bool]) -> None:
    model = small_model(optimizer=keras.optimizers.SGD(0.01))
    eager_model = small_model(optimizer=keras.optimizers.SGD(0.01), **eager)
    research.fit(model, *linear_data(), verbose=0, shuffle=False)
    research.fit(eager_model, *linear_data(), verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), eager_model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_learners_step_in_keras_fit_and_keras_step_in_research_train_give_the_same_numbers() -> None:
    learner_model, fit_model, loop_model = small_model(), small_model(), small_model()
    x, y = linear_data(64)
    learner = research.from_keras(learner_model)

    class StepOfLearner(keras.Sequential):
        def train_step(self, state: Any, data: Any) -> Any:
            names = list(learner.init().metrics)
            metrics, parts = {}, iter(state[3])
            metrics = {name: [next(parts) for _ in learner.init().metrics[name]] for name in names}
            after, logs = learner.train(research.State(*state[:3], metrics), research.Batch(*data))
            return logs, (*after[:3], [v for name in names for v in after.metrics[name]])

    keras.utils.set_random_seed(0)
    model = StepOfLearner([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.2), layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2), "mse", metrics=["mae"])
    first = model.fit(x, y, shuffle=False, epochs=2, verbose=0).history
    second = fit_model.fit(x, y, shuffle=False, epochs=2, verbose=0).history
    state, logs = research.train(research.from_keras(loop_model), research.from_arrays(x, y, shuffle=False), epochs=2)
    research.write_back(state, loop_model, loop_model.optimizer)
    assert trees_equal(first, second)
    assert trees_equal(model.get_weights(), fit_model.get_weights())
    assert trees_equal(loop_model.get_weights(), fit_model.get_weights())
    assert logs["loss"] == second["loss"][-1]


class HookRecorder(keras.callbacks.Callback):
    """Records every hook that is called, with its logs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []


def _recording_hook(hook: str) -> Callable[..., None]:
    def record(self: HookRecorder, number: Any = None, logs: Any = None) -> None:
        assert isinstance(self.model, keras.Model)
        self.calls.append((hook, *(dict(arg) if isinstance(arg, dict) else arg for arg in (number, logs or {}))))

    return record


for _hook in dir(keras.callbacks.Callback):
    if _hook.startswith(("on_train", "on_test", "on_epoch")):
        setattr(HookRecorder, _hook, _recording_hook(_hook))


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_callbacks_are_called_in_the_order_of_keras_with_the_same_logs(steps_per_execution: int) -> None:
    def calls(fit: Callable[..., Any]) -> list[Any]:
        recorder = HookRecorder()
        model = small_model(steps_per_execution=steps_per_execution)
        keras.utils.set_random_seed(1)
        fit(model, *linear_data(), epochs=2, validation_split=0.3, verbose=0, callbacks=[recorder])
        return recorder.calls

    result, expected = (calls(fit) for fit in FITS)
    assert len(result) > 15
    assert result == expected


@pytest.mark.parametrize("log_name", [None, "loss"])
def test_a_batch_hook_reads_from_the_device_only_if_it_accesses_a_log(
    log_name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads_at_hook: list[int] = []

    class ReadingCallback(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            assert "loss" in logs
            assert log_name is None or logs[log_name] > 0
            reads_at_hook.append(len(reads))

    with device_reads(monkeypatch) as reads:
        research.fit(small_model(), *linear_data(320), verbose=0, callbacks=[ReadingCallback()])
    per_hook = [after - before for before, after in itertools.pairwise(reads_at_hook)]
    assert per_hook == [0 if log_name is None else 2] * 9  # the loss and the metric together


def test_a_callbacks_changes_apply_from_the_next_step_on() -> None:
    class ChangingCallback(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                self.model.layers[0].kernel.assign(keras.ops.zeros((4, 8)))
                self.model.optimizer.learning_rate = 0.0
            if batch == 3:
                self.model.stop_training = True

    def train(fit: Callable[..., Any]) -> Any:
        model = small_model()
        keras.utils.set_random_seed(1)
        history = fit(model, *linear_data(320), epochs=3, verbose=0, callbacks=[ChangingCallback()])
        return history.history, all_values(model), history.epoch

    result, expected = (train(fit) for fit in FITS)
    assert trees_equal(result, expected)
    assert (result[1][0] == 0).all()


def test_a_callback_between_epochs_reads_and_changes_the_model() -> None:
    def train(fit: Callable[..., Any]) -> Any:
        model = small_model()
        values: list[Any] = []

        def read_and_change(epoch: int, logs: Any) -> None:
            values.append((int(model.optimizer.iterations), float(np.sum(model.get_weights()[0]))))
            model.optimizer.learning_rate = 1e-3 * (epoch + 1)

        keras.utils.set_random_seed(1)
        callback = keras.callbacks.LambdaCallback(on_epoch_end=read_and_change)
        fit(model, *linear_data(), epochs=3, verbose=0, callbacks=[callback])
        return values, all_values(model)

    result, expected = (train(fit) for fit in FITS)
    assert trees_equal(result, expected)


@pytest.mark.parametrize("verbose", [0, 1, 2, "auto"])
def test_the_final_console_lines_equal_those_of_keras(verbose: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def epoch_lines(fit: Callable[..., Any]) -> list[str]:
        keras.utils.set_random_seed(1)
        fit(small_model(), *linear_data(), epochs=2, validation_split=0.5, verbose=verbose)
        lines = capsys.readouterr().out.replace("\b", "").split("\n")
        final = [line.rpartition("\r")[2] for line in lines]  # a terminal shows what follows the last carriage return
        without_times = [re.sub(r"\d+u?m?s(/step)?", "TIME", line) for line in final]
        return [line for line in without_times if "Epoch" in line or "val_loss" in line]

    result, expected = (epoch_lines(fit) for fit in FITS)
    assert result == expected
    assert len(result) == (4 if verbose else 0)


def test_steps_are_fused_only_if_no_callback_has_a_batch_hook(tmp_path: Path) -> None:
    x, y = linear_data(640)

    def count_dispatches(**options: Any) -> int:
        model = small_model()
        research.fit(model, x, y, batch_size=8, epochs=6, verbose=0, **options)
        function = model.train_function
        dispatches: list[str] = []
        original = function._dispatch
        function._dispatch = lambda name, arguments: (dispatches.append(name), original(name, arguments))[1]
        research.fit(model, x, y, batch_size=8, epochs=6, verbose=0, **options)
        return len(dispatches)

    assert count_dispatches() < 240
    assert count_dispatches(callbacks=[BatchCallback()]) == 480
    checkpoint_per_epoch = keras.callbacks.ModelCheckpoint(tmp_path / "last.weights.h5", save_weights_only=True)
    assert count_dispatches(callbacks=[checkpoint_per_epoch]) < 240


def test_only_two_programs_are_compiled_one_for_full_batches_and_one_for_the_last() -> None:
    model = small_model()
    keras.utils.set_random_seed(0)
    for epochs in (5, 1, 3):
        research.fit(model, *linear_data(70), batch_size=8, epochs=epochs, verbose=0)
    assert len(model.train_function.compiled_signatures) == 2


def test_recompiling_the_model_applies_the_new_loss_and_metrics() -> None:
    model = small_model()
    research.fit(model, *linear_data(), verbose=0)
    model.compile("sgd", "mae", metrics=["mse"])
    assert set(research.fit(model, *linear_data(), verbose=0).history) == {"loss", "mse"}
    model.compile("sgd", "mae", run_eagerly=True)
    research.fit(model, *linear_data(), verbose=0)
    assert not model.train_function.compiled


def test_keras_own_methods_and_saving_still_work_on_the_model(tmp_path: Any) -> None:
    model, reference = small_model(), small_model()
    for fitted, fit in ((model, research.fit), (reference, keras_fit)):
        keras.utils.set_random_seed(1)
        fit(fitted, *linear_data(), verbose=0)
    keras.utils.set_random_seed(2)
    history = model.fit(*linear_data(), verbose=0, epochs=2).history
    keras.utils.set_random_seed(2)
    assert trees_equal(history, reference.fit(*linear_data(), verbose=0, epochs=2).history)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert trees_equal(loaded.get_weights(), model.get_weights())
    assert trees_equal(keras.models.clone_model(model).predict(linear_data()[0], verbose=0).shape, (70, 1))


def test_lazy_logs_behave_as_a_dictionary_of_floats() -> None:
    values = {"b": jax.numpy.ones(()), "a": {"c": jax.numpy.zeros(())}, "v": jax.numpy.arange(2)}
    for copy in (
        dict,
        lambda logs: {**logs},
        lambda logs: logs | {},
        lambda logs: pickle.loads(pickle.dumps(logs)),
        LazyLogs.copy,
    ):
        logs = copy(LazyLogs(values))
        assert sorted(logs) == ["b", "c", "v"]
        assert logs["b"] == 1.0
        assert type(logs["b"]) is float
    logs = LazyLogs(values)
    logs["loss"] = 3.0
    assert (logs["loss"], logs.get("c"), logs.get("none"), len(logs), bool(logs)) == (3.0, 0.0, None, 4, True)
    assert not LazyLogs({})


def test_a_fused_program_equals_its_single_steps_for_every_count() -> None:
    learner = research.from_keras(small_model())
    x, y = linear_data(64)
    batches = research.Batch(x.reshape(8, 8, 4), y.reshape(8, 8, 1))
    single, fused = jax.jit(learner.train), jax.jit(fuse(learner.train))
    state, logs_of_steps = learner.init(), []
    for count in range(1, 9):
        state, logs = single(state, research.Batch(batches.x[count - 1], batches.y[count - 1]))
        logs_of_steps.append(logs)
        fused_state, stacked_logs = fused(learner.init(), batches, count)
        assert trees_equal(fused_state, state)
        for i, logs in enumerate(logs_of_steps):
            assert trees_equal({name: values[i] for name, values in stacked_logs.items()}, logs)


def test_convolutions_are_not_compiled_into_loops_on_the_cpu() -> None:
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=4)
    x, y = np.ones((64, 8, 8, 1), "float32"), np.ones((64, 1), "float32")
    research.fit(model, x, y, batch_size=8, verbose=0)
    assert {name for name, _ in model.train_function.compiled_signatures} == {"single"}
    learner = research.from_keras(model)
    assert not runs_well_in_loop(jax.jit(learner.train).trace(learner.init(), research.Batch(x[:8], y[:8])))
