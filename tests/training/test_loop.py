"""The fold: what is compiled, what crosses from the device, when logs and hooks come, and that all ways give the same."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers
from watching import compiled, reads

import research
from research.loop import Entry

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype("float32")
Y = RNG.integers(0, 3, 40).astype("int32")

PLACES = [pytest.param(1 << 20, id="resident"), pytest.param(0, id="host", marks=pytest.mark.slow)]


def learner(**options: Any) -> research.Learner:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.5), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return research.supervised(model, **{"loss": loss, "optimizer": "adam", "metrics": ["accuracy"], **options})


def data(**options: Any) -> research.Batches:
    return research.arrays(X, Y, **{"batch_size": 8, "seed": 1, **options})


@pytest.mark.parametrize("resident", PLACES)
def test_one_program_for_training_and_one_for_evaluation_however_many_epochs(
    resident: int, caplog: pytest.LogCaptureFixture
) -> None:
    with compiled(caplog) as programs:
        held = data(resident_bytes=resident)
        research.train(learner(), held, epochs=4, evaluations={"val": held}, log_every=2, log=lambda entry: None)
        assert (programs("train_steps"), programs("train_step")) == (1, 0)
        assert programs("evaluate_step") == 1
        assert programs("reset") <= 2  # before training, and before evaluation
    with compiled(caplog) as programs:
        research.train(learner(), data(batch_size=12), epochs=3)
        assert programs("train_steps") == 2  # a shorter last batch costs one more


def test_reading_a_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (float, jax.device_get, lambda a: np.asarray(a), lambda a: np.array(a), lambda a: a.item()):
        array = jnp.ones(()) + 1
        with reads(monkeypatch) as seen:
            read(array)
        assert len(seen) == 1, read


@pytest.mark.parametrize("resident", PLACES)
def test_nothing_is_read_off_the_device_between_due_logs(resident: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, held = learner(), data(resident_bytes=resident)
    state = made.init()
    at: list[tuple[int, int]] = []
    with reads(monkeypatch) as seen:
        research.train(
            made,
            held,
            epochs=4,
            state=state,
            log_every=3,
            log=lambda entry: None,
            evaluations={"val": held},
            hooks=[(1, lambda step, state, logs: at.append((step, len(seen))))],
        )
    counts = dict(at)
    due = {1, 3, 5, 6, 9, 10, 12, 15, 18, 20}
    moved = {step for step in range(2, 21) if counts[step] > counts[step - 1]}
    assert moved == {step + 1 for step in due if step < 20}  # each read once the next step was dispatched
    assert len(seen) == 2 * (len(due) + 4)  # loss and accuracy; four evaluations


def test_logs_arrive_after_the_next_step_was_dispatched() -> None:
    order: list[Any] = []
    held = data()
    assert held.resident is not None
    rows = held.resident.rows

    def noticed(step: int, steps: int) -> Any:  # a step's rows are asked for when it is dispatched
        order.extend(("step", step + i + 1) for i in range(steps))
        return rows(step, steps)

    held = held._replace(resident=held.resident._replace(rows=noticed))
    hook = (1, lambda step, state, logs: order.append(("hook", step)))
    research.train(learner(), held, steps=3, log_every=1, log=lambda entry: order.append(("log", entry.step)), hooks=[hook])
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


def test_logs_hold_the_running_metrics_of_the_epoch_and_evaluations_their_own() -> None:
    entries: list[Entry] = []
    made, held = learner(), data()
    state, last = research.train(made, held, epochs=2, log=entries.append, log_every=4, evaluations={"val": held, "other": held})
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
    assert entries[-1].values == entries[-2].values == research.evaluate(made, held, state)


def weights(state: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves((state.trainable, state.non_trainable, state.optimizer))]


def same(one: Any, other: Any) -> None:
    for a, b in zip(weights(one), weights(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_resident_data_data_from_the_host_and_bare_steps_train_the_same() -> None:
    resident, logs = research.train(learner(), data(), epochs=2)
    host, other_logs = research.train(learner(), data(resident_bytes=0), epochs=2)
    made = learner()
    state, step = made.init(), jax.jit(made.train)
    for i in range(10):
        state = made.reset(state) if i % 5 == 0 else state
        state, bare = step(state, data().batch(i))
    same(resident, host)
    same(resident, state)
    assert logs == other_logs == {name: float(value) for name, value in bare.items()}


def test_stopping_and_going_on_changes_nothing() -> None:
    whole, logs = research.train(learner(), data(), epochs=3)
    made = learner()
    state, _ = research.train(made, data(), steps=7)
    resumed, resumed_logs = research.train(made, data(), steps=15, start=7, state=state)
    same(whole, resumed)
    assert logs == resumed_logs


@pytest.mark.slow
def test_training_equals_keras_fit_without_shuffling() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.5), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, optimizer="adam", metrics=["accuracy"])
    history = model.fit(X, Y, batch_size=12, epochs=3, shuffle=False, verbose=0, validation_data=(X, Y)).history
    held = data(batch_size=12, shuffle=False)
    state, logs = research.train(learner(), held, epochs=3, evaluations={"val": data(batch_size=12, shuffle=False)})
    for a, b in zip(state.trainable, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b.value)
    assert logs == {name: values[-1] for name, values in history.items()}


def test_a_hook_may_change_the_state_and_is_called_when_due() -> None:
    seen: list[int] = []

    def stop(step: int, state: Any, logs: Any) -> Any:
        seen.append(step)
        return state._replace(trainable=[jnp.zeros_like(w) for w in state.trainable])

    optimizer = keras.optimizers.SGD(0.0)
    state, _ = research.train(learner(optimizer=optimizer), data(), steps=7, hooks=[(3, stop)])
    assert seen == [3, 6, 7]
    assert all(not w.any() for w in state.trainable)


def test_predictions_come_in_the_order_of_the_data() -> None:
    made = learner()
    state = made.init()
    held = data(shuffle=False, batch_size=12)
    np.testing.assert_allclose(research.predict(made, held, state), made.predict(state, research.Batch(X)), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_eager_equals_compiled() -> None:
    made = learner(optimizer=keras.optimizers.SGD(0.1))
    batch = data().batch(0)
    jitted, logs = jax.jit(made.train)(made.init(), batch)
    with jax.disable_jit():
        eager, eager_logs = made.train(made.init(), batch)
    for a, b in zip(weights(jitted), weights(eager), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(float(logs["loss"]), float(eager_logs["loss"]), rtol=1e-6)


def test_any_learner_folds() -> None:
    """A learner whose state and batches are its own: a count of what it was shown."""
    counter = research.Learner(
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
    state, logs = research.train(counter, numbers, epochs=1)
    assert (float(state), logs) == (12.0, {"seen": 6.0})


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (X[:, :3], Y, "x float32.8, 3."),
        (X[:, None], Y, "x float32.8, 1, 4."),
        (X, np.eye(3)[Y], "y float32.8, 3."),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_anything_runs(x: Any, y: Any, said: str) -> None:
    steps: list[int] = []
    with pytest.raises(research.Refused, match=f"does not fit the learner.*{said}") as refused:
        research.train(learner(), research.arrays(x, y, batch_size=8), epochs=1, hooks=[(1, lambda *a: steps.append(a[0]))])
    assert "\n" not in str(refused.value)
    assert steps == []


def test_an_evaluation_that_does_not_fit_is_refused_before_training() -> None:
    steps: list[int] = []
    with pytest.raises(research.Refused, match="does not fit the learner"):
        research.train(
            learner(),
            data(),
            epochs=1,
            evaluations={"val": research.arrays(X[:, :2], Y, batch_size=8)},
            hooks=[(1, lambda *a: steps.append(a[0]))],
        )
    assert steps == []


def test_training_needs_an_end() -> None:
    with pytest.raises(research.Refused, match="steps is None and epochs is None"):
        research.train(learner(), data())


def test_resident_data_is_brought_to_the_device_once() -> None:
    made, held, asked = (
        learner_of_one(),
        research.arrays(np.ones((12, 1), "float32"), np.ones((12, 1), "float32"), batch_size=4),
        [],
    )
    assert held.resident is not None
    host = held.resident.source()

    def source() -> Any:
        asked.append(True)
        return host

    data = held._replace(resident=held.resident._replace(source=source))
    state, _ = research.train(made, data, epochs=1)
    state, _ = research.train(made, data, epochs=1, state=state)
    research.evaluate(made, data, state)
    assert len(asked) == 1


def learner_of_one() -> research.Learner:
    return research.supervised(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), loss="mse", optimizer="sgd")
