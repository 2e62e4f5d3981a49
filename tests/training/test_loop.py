"""The training loop: what is compiled, what is read off the device, when logs and hooks are called, and equal results."""

import traceback
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from instrumentation import count_compilations, device_reads
from keras import layers
from small_training import X, Y, assert_same_weights, data, learner, weights

import research
from research.data import prefetch
from research.training.logs import LogEntry

PLACES = [pytest.param(1 << 20, id="resident"), pytest.param(0, id="host", marks=pytest.mark.slow)]


def test_evaluations_every_few_steps_are_due_once_also_when_training_resumes_at_one() -> None:
    classifier, batches = learner(), data()
    options: dict[str, Any] = {"evaluations": {"val": batches}, "evaluate_every": 2}
    saved: list[tuple[int, Any, Any]] = []

    def save(step: int, state: Any, logs: Any) -> None:
        saved.append((step, jax.tree.map(np.array, state), logs))

    entries: list[LogEntry] = []
    research.train(classifier, batches, epochs=2, log=entries.append, hooks=[(4, save)], **options)
    evaluated = [entry for entry in entries if entry.split == "val"]
    assert [entry.step for entry in evaluated] == [2, 4, 5, 6, 8, 10]
    unbroken: list[LogEntry] = []
    research.train(classifier, batches, epochs=2, log=unbroken.append, **options)
    assert unbroken == entries
    step, state, logs = saved[0]
    resumed: list[LogEntry] = []
    research.train(classifier, batches, epochs=2, log=resumed.append, start=step, state=state, logs=logs, **options)
    assert resumed == [entry for entry in entries if entry.step >= 4]


@pytest.mark.slow
@pytest.mark.parametrize("resident", PLACES)
def test_one_program_for_training_and_one_for_evaluation_however_many_epochs(
    resident: int, caplog: pytest.LogCaptureFixture
) -> None:
    batches = data(resident_bytes=resident)
    with count_compilations(caplog) as programs:
        research.train(learner(), batches, epochs=4, evaluations={"val": batches}, log_every=2, log=lambda entry: None)
        assert (programs("train_steps"), programs("train_step")) == (1, 0)
        assert programs("evaluate_step") == 1
        assert programs("reset") <= 2  # before training, and before evaluation
    with count_compilations(caplog) as programs:
        research.train(learner(), data(batch_size=12), epochs=3)
        assert programs("train_steps") == 2  # a shorter last batch costs one more


def test_device_reads_counts_every_way_to_read_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (float, jax.device_get, lambda a: np.asarray(a), lambda a: np.array(a), lambda a: a.item()):
        array = jnp.ones(()) + 1
        with device_reads(monkeypatch) as seen:
            read(array)
        assert len(seen) == 1, read


@pytest.mark.slow
@pytest.mark.parametrize("resident", PLACES)
def test_nothing_is_read_off_the_device_between_due_logs(resident: int, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, batches = learner(), data(resident_bytes=resident)
    state = classifier.init()
    reads_at_step: list[tuple[int, int]] = []
    with device_reads(monkeypatch) as seen:
        research.train(
            classifier,
            batches,
            epochs=4,
            state=state,
            log_every=3,
            log=lambda entry: None,
            evaluations={"val": batches},
            hooks=[(1, lambda step, state, logs: reads_at_step.append((step, len(seen))))],
        )
    counts = dict(reads_at_step)
    due = {1, 3, 5, 6, 9, 10, 12, 15, 18, 20}
    steps_with_reads = {step for step in range(2, 21) if counts[step] > counts[step - 1]}
    assert steps_with_reads == {step + 1 for step in due if step < 20}  # read after the next step was dispatched
    assert len(seen) == 2 * (len(due) + 4)  # loss and accuracy; four evaluations


def test_logs_are_reported_after_the_next_step_was_dispatched() -> None:
    order: list[Any] = []
    batches = data()
    assert batches.resident is not None
    rows = batches.resident.rows

    def recorded_rows(step: int, steps: int) -> Any:  # a step's rows are requested when it is dispatched
        order.extend(("step", step + i + 1) for i in range(steps))
        return rows(step, steps)

    batches = batches._replace(resident=batches.resident._replace(rows=recorded_rows))
    hook = (1, lambda step, state, logs: order.append(("hook", step)))
    log = lambda entry: order.append(("log", entry.step))  # noqa: E731
    research.train(learner(), batches, steps=3, log_every=1, log=log, hooks=[hook])
    assert order == [
        ("step", 1),
        ("hook", 1),
        ("step", 2),
        ("log", 1),
        ("hook", 2),
        ("step", 3),
        ("log", 2),
        ("hook", 3),
        ("log", 3),
    ]


def test_a_hook_is_called_after_the_logs_of_all_earlier_steps_however_many_steps_one_dispatch_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefetch, "DISPATCH_SECONDS", 1000)  # as many steps as are allowed
    order: list[Any] = []
    hooks = [(10, lambda step, state, logs: order.append(("hook", step)))]
    entries: list[LogEntry] = []

    def log(entry: LogEntry) -> None:
        entries.append(entry)
        order.append(("log", entry.step))

    research.train(learner(), data(), steps=32, log_every=2, log=log, hooks=hooks)
    for step in (10, 20, 30, 32):
        before = order[: order.index(("hook", step))]
        assert [s for event, s in before if event == "log"] == [1, *sorted({*range(2, step, 2), *range(5, step, 5)})]
    unhooked: list[LogEntry] = []
    research.train(learner(), data(), steps=32, log_every=2, log=unhooked.append)
    assert entries == unhooked


def test_logs_are_the_running_metrics_of_the_epoch_and_evaluations_have_their_own() -> None:
    entries: list[LogEntry] = []
    classifier, batches = learner(), data()
    evaluations = {"val": batches, "other": batches}
    state, last = research.train(classifier, batches, epochs=2, log=entries.append, log_every=4, evaluations=evaluations)
    assert [(e.step, e.epoch, e.split) for e in entries] == [
        (1, 0, "train"),
        (4, 0, "train"),
        (5, 0, "train"),
        (5, 0, "val"),
        (5, 0, "other"),
        (8, 1, "train"),
        (10, 1, "train"),
        (10, 1, "val"),
        (10, 1, "other"),
    ]
    assert last == {
        **entries[-3].values,
        **{f"val_{name}": value for name, value in entries[-2].values.items()},
        **{f"other_{name}": value for name, value in entries[-1].values.items()},
    }
    assert entries[-1].values == entries[-2].values == research.evaluate(classifier, batches, state)


@pytest.mark.slow
def test_resident_data_host_data_and_a_hand_written_loop_train_the_same() -> None:
    resident, logs = research.train(learner(), data(), epochs=2)
    host, host_logs = research.train(learner(), data(resident_bytes=0), epochs=2)
    classifier = learner()
    state, step = classifier.init(), jax.jit(classifier.train)
    for i in range(10):
        state = classifier.reset(state) if i % 5 == 0 else state
        state, last_logs = step(state, data().batch(i))
    assert_same_weights(resident, host)
    assert_same_weights(resident, state)
    assert logs == host_logs == {name: float(value) for name, value in last_logs.items()}


def test_stopping_and_resuming_changes_nothing() -> None:
    uninterrupted, logs = research.train(learner(), data(), epochs=3)
    classifier = learner()
    state, _ = research.train(classifier, data(), steps=7)
    resumed, resumed_logs = research.train(classifier, data(), steps=15, start=7, state=state)
    assert_same_weights(uninterrupted, resumed)
    assert logs == resumed_logs


@pytest.mark.slow
def test_training_equals_keras_fit_without_shuffling() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.5), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, optimizer="adam", metrics=["accuracy"])
    history = model.fit(X, Y, batch_size=12, epochs=3, shuffle=False, verbose=0, validation_data=(X, Y)).history
    batches = data(batch_size=12, shuffle=False)
    state, logs = research.train(learner(), batches, epochs=3, evaluations={"val": data(batch_size=12, shuffle=False)})
    for a, b in zip(state.trainable, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b.value)
    assert logs == {name: values[-1] for name, values in history.items()}


@pytest.mark.slow
def test_a_hook_is_called_when_due_and_may_replace_the_state() -> None:
    calls: list[int] = []

    def zero_weights(step: int, state: Any, logs: Any) -> Any:
        calls.append(step)
        return state._replace(trainable=[jnp.zeros_like(w) for w in state.trainable])

    optimizer = keras.optimizers.SGD(0.0)
    state, _ = research.train(learner(optimizer=optimizer), data(), steps=7, hooks=[(3, zero_weights)])
    assert calls == [3, 6, 7]
    assert all(not w.any() for w in state.trainable)


def test_predictions_are_in_the_order_of_the_data() -> None:
    classifier = learner()
    state = classifier.init()
    outputs = research.predict(classifier, data(shuffle=False, batch_size=12), state)
    np.testing.assert_allclose(outputs, classifier.predict(state, research.Batch(X)), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_eager_equals_compiled() -> None:
    classifier = learner(optimizer=keras.optimizers.SGD(0.1))
    batch = data().batch(0)
    jitted, logs = jax.jit(classifier.train)(classifier.init(), batch)
    with jax.disable_jit():
        eager, eager_logs = classifier.train(classifier.init(), batch)
    for a, b in zip(weights(jitted), weights(eager), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(float(logs["loss"]), float(eager_logs["loss"]), rtol=1e-6)


def test_a_learner_may_define_its_own_state_and_batches() -> None:
    summation = research.Learner(
        init=lambda: jnp.zeros(()),
        reset=lambda state: state,
        train=lambda state, batch: (state + batch.sum(), {"seen": state}),
        evaluate=lambda state, batch: (state, {"seen": state}),
        predict=lambda state, batch: batch,
        names="seen",
    )
    numbers = research.Batches(
        batch=lambda step: np.full((2,), step, "float32"),
        shapes=jax.ShapeDtypeStruct((2,), np.float32),
        steps_per_epoch=4,
        examples=8,
    )
    state, logs = research.train(summation, numbers, epochs=1)
    assert (float(state), logs) == (12.0, {"seen": 6.0})


@pytest.mark.parametrize(
    ("x", "y", "shapes"),
    [
        (X[:, :3], Y, "x float32.8, 3."),
        (X[:, None], Y, "x float32.8, 1, 4."),
        (X, np.eye(3)[Y], "y float32.8, 3."),
    ],
)
def test_a_batch_that_does_not_fit_raises_an_error_before_the_first_step(x: Any, y: Any, shapes: str) -> None:
    steps: list[int] = []
    with pytest.raises(research.InvalidArgument, match=f"does not fit the learner.*{shapes}") as error:
        research.train(learner(), research.from_arrays(x, y, batch_size=8), epochs=1, hooks=[(1, lambda *a: steps.append(a[0]))])
    assert "\n" not in str(error.value)
    assert steps == []


def test_an_evaluation_that_does_not_fit_raises_an_error_before_the_first_step() -> None:
    steps: list[int] = []
    with pytest.raises(research.InvalidArgument, match="does not fit the learner"):
        research.train(
            learner(),
            data(),
            epochs=1,
            evaluations={"val": research.from_arrays(X[:, :2], Y, batch_size=8)},
            hooks=[(1, lambda *a: steps.append(a[0]))],
        )
    assert steps == []


def loss_with_a_type_error(y: Any, outputs: Any) -> Any:
    return outputs[:, 0] + np.zeros(2, "float32")  # fits the two examples that losses are resolved with


def loss_with_a_value_error(y: Any, outputs: Any) -> Any:
    first, second = outputs
    return first - second


class FailsInTraining(layers.Layer):
    """A layer whose `call` fails with training=True, inside a library."""

    def call(self, x: Any, training: bool = False) -> Any:
        return keras.ops.matmul(x, keras.ops.ones((5, 5))) if training else x


def learner_that_fails_in_training() -> research.Learner:
    model = keras.Sequential([keras.Input((4,)), FailsInTraining(), layers.Dense(3)])
    return research.supervised(model, loss="mse", optimizer="sgd")


@pytest.mark.parametrize(
    ("build", "function", "error_type"),
    [
        (lambda: learner(loss=loss_with_a_type_error), loss_with_a_type_error, TypeError),
        (lambda: learner(loss=loss_with_a_value_error), loss_with_a_value_error, ValueError),
        (learner_that_fails_in_training, FailsInTraining.call, TypeError),
    ],
)
def test_an_error_in_user_code_is_reported_with_its_file_and_line(build: Any, function: Any, error_type: type[Exception]) -> None:
    line = function.__code__.co_firstlineno + 1
    with pytest.raises(research.InvalidArgument) as error:
        research.train(build(), data(), epochs=1)
    message, cause = str(error.value), error.value.__cause__
    assert message.startswith(f"{__file__}:{line}: {error_type.__name__}: ")
    assert message.endswith("(while tracing a batch of x float32[8, 4], y int32[8])")
    assert "\n" not in message
    assert isinstance(cause, error_type)
    assert any(frame.lineno == line for frame in traceback.extract_tb(cause.__traceback__))


def test_other_errors_in_a_loss_propagate_unchanged() -> None:
    def loss(y: Any, outputs: Any) -> Any:
        return outputs if len(outputs) == 2 else outputs.no_such_attribute

    with pytest.raises(AttributeError, match="no_such_attribute"):
        research.train(learner(loss=loss), data(), epochs=1)


def test_training_needs_a_number_of_steps_or_epochs() -> None:
    with pytest.raises(research.InvalidArgument, match="steps and epochs are both None"):
        research.train(learner(), data())


def test_resident_data_is_copied_to_the_device_once() -> None:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    regressor = research.supervised(model, loss="mse", optimizer="sgd")
    batches = research.from_arrays(np.ones((12, 1), "float32"), np.ones((12, 1), "float32"), batch_size=4)
    assert batches.resident is not None
    arrays, calls = batches.resident.source(), []

    def source() -> Any:
        calls.append(True)
        return arrays

    batches = batches._replace(resident=batches.resident._replace(source=source))
    state, _ = research.train(regressor, batches, epochs=1)
    state, _ = research.train(regressor, batches, epochs=1, state=state)
    research.evaluate(regressor, batches, state)
    assert len(calls) == 1
