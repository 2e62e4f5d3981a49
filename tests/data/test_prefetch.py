"""Steps go to the device many at a time: the same bits, logs of each, one program, and nobody waits who need not."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers
from test_loop import data, learner, same
from watching import compiled

import research
from research import feed
from research.compiled import ahead, training
from research.feed import Ahead, Pace, stretches
from research.loop import Entry


def paced(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Every dispatch after the first is meant to be so many steps."""
    monkeypatch.setattr(Pace, "dispatched", lambda self, results, done: setattr(self, "steps", steps))


@pytest.mark.slow
@pytest.mark.parametrize("resident", [1 << 20, 0], ids=["resident", "host"])
def test_weights_and_every_log_are_the_same_bits_however_many_steps_are_dispatched_at_once(
    resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = learner()
    state, step, bare = made.init(), jax.jit(made.train), []
    for i in range(12):  # batches of 12 and a shorter last one of 4
        state = made.reset(state) if i % 4 == 0 else state
        state, logs = step(state, data(batch_size=12).batch(i))
        bare.append({name: float(value) for name, value in logs.items()})
    for at_once in (1, 2, 3, 100):
        paced(monkeypatch, at_once)
        entries: list[Entry] = []
        held = data(batch_size=12, resident_bytes=resident)
        fused, _ = research.train(made, held, epochs=3, log_every=1, log=entries.append)
        same(fused, state)
        assert [entry.step for entry in entries] == list(range(1, 13))
        assert [entry.values for entry in entries] == bare


def test_hooks_see_the_state_of_their_step_and_what_lies_between_is_dispatched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, 100)
    made, seen, told = learner(), {}, []
    research.train(
        made,
        data(),
        epochs=2,
        hooks=[(3, lambda step, state, logs: seen.update({step: [np.array(w) for w in state.trainable]}))],
        progress=lambda step, waited: told.append(step),
    )
    assert list(seen) == [3, 6, 9, 10]
    assert told == [1, 3, 5, 6, 9, 10]  # the first alone, then to the next hook or the end of an epoch
    for step, weights in seen.items():
        state, _ = research.train(made, data(), steps=step)
        for a, b in zip(weights, state.trainable, strict=True):
            np.testing.assert_array_equal(a, b)


def test_training_and_evaluating_again_compiles_and_traces_nothing(caplog: pytest.LogCaptureFixture) -> None:
    made, held = learner(), data()
    state, _ = research.train(made, held, epochs=1, evaluations={"val": held})
    with compiled(caplog) as programs:
        for _ in range(2):
            state, _ = research.train(made, held, epochs=1, state=state, evaluations={"val": data(seed=5)})
            research.evaluate(made, held, state)
        assert not [record for record in caplog.records if "step" in record.getMessage()]
        assert programs("train_steps") == 0


@pytest.mark.parametrize("resident", [1 << 20, 0], ids=["resident", "host"])
def test_a_program_compiled_ahead_is_the_one_that_trains(resident: int, caplog: pytest.LogCaptureFixture) -> None:
    made, held = learner(), data(resident_bytes=resident)
    state = made.init()
    with compiled(caplog) as programs:
        ahead(made, held, state)
        assert programs("train_steps") == 1
        research.train(made, held, epochs=2, state=state)
        assert programs("train_steps") == 1


def test_programs_go_with_their_learner() -> None:
    made = learner()
    state, _ = research.train(made, data(), epochs=1, evaluations={"val": data()})
    research.predict(made, data(), state)
    functions = [weakref.ref(made.train), weakref.ref(made.evaluate), weakref.ref(made.predict), weakref.ref(made.reset)]
    del made
    gc.collect()
    assert [function() for function in functions] == [None] * 4


def test_a_learner_that_takes_no_batch_is_fused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, 100)
    told: list[int] = []
    walker = research.Learner(
        init=lambda: jax.random.key(0),
        reset=lambda state: state,
        train=lambda state, batch: (jax.random.split(state)[0], {"draw": jax.random.uniform(state)}),
        evaluate=lambda state, batch: (state, {}),
        predict=lambda state, batch: None,
        names="key",
    )
    nothing = research.Batches(batch=lambda step: None, shapes=None, steps_per_epoch=8, examples=8)
    state, logs = research.train(walker, nothing, epochs=1, progress=lambda step, waited: told.append(step))
    key = jax.random.key(0)
    for _ in range(7):
        key = jax.random.split(key)[0]
    assert logs["draw"] == float(jax.random.uniform(key))
    assert told == [1, 2, 3, 8]  # two dispatches are planned ahead, before the pace is known
    np.testing.assert_array_equal(jax.random.key_data(state), jax.random.key_data(jax.random.split(key)[0]))


def capacity(x: np.ndarray, model: keras.Model, **options: Any) -> int:
    made = research.supervised(model, loss="mse", optimizer="sgd", metrics=options.pop("metrics", None))
    y = np.zeros((len(x), 1), "float32")
    return training(made, research.arrays(x, y, batch_size=4, **options), made.init()).capacity


def dense(*shape: int) -> keras.Model:
    return keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(1)])


def test_steps_are_fused_where_it_pays_and_only_there() -> None:
    x = np.ones((40, 6, 6, 1), "float32")
    conv = keras.Sequential([keras.Input((6, 6, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(1)])
    assert capacity(x, conv) == 1  # on the CPU convolutions are slow in loops
    assert capacity(x, dense(6, 6, 1)) == 10  # never more than an epoch
    large = np.ones((400, 100, 100), "float32")
    assert capacity(large, dense(100, 100)) == 100
    assert capacity(large, dense(100, 100), resident_bytes=0) == 1  # copying batches side by side would cost more
    assert capacity(large[:, :20], dense(20, 100), resident_bytes=0) == 32


def test_logs_of_all_steps_take_little_memory_however_large_one_is() -> None:
    class Wide(keras.metrics.Metric):
        def __init__(self) -> None:
            super().__init__(name="wide")
            self.total = self.add_weight(shape=(1 << 16,), initializer="zeros", name="total")

        def update_state(self, y: Any, outputs: Any, sample_weight: Any = None) -> None:
            self.total.assign_add(jnp.ones(1 << 16))

        def result(self) -> Any:
            return self.total

    assert capacity(np.ones((400, 3), "float32"), dense(3), metrics=[Wide()]) == 3


def test_dispatches_grow_to_about_a_tenth_of_a_second_and_shrink_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, busy, pace, sizes = 0.0, 0.0, Pace(), []

    def wait(until: float) -> None:
        nonlocal clock
        clock = max(clock, until)

    monkeypatch.setattr(feed.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(feed.jax, "block_until_ready", wait)
    for seconds in [1e-3] * 12 + [1e-2] * 8:
        busy += seconds * pace.steps  # the device does one after the other
        sizes.append(pace.steps)
        pace.dispatched(busy, pace.steps)
    assert sizes[:8] == [1, 1, 1, 1, 2, 4, 8, 16]
    assert {98, 99, 100}.issuperset(sizes[10:14])
    assert {9, 10}.issuperset(sizes[-3:])


def test_time_in_which_nothing_runs_does_not_slow_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = 0.0, Pace()
    monkeypatch.setattr(feed.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(feed.jax, "block_until_ready", lambda results: None)
    for _ in range(12):
        clock += 1e-3 * pace.steps
        pace.dispatched(None, pace.steps)
    assert pace.steps > 50
    before = pace.steps
    pace.rest()
    clock += 100.0
    for _ in range(3):
        clock += 1e-3 * pace.steps
        pace.dispatched(None, pace.steps)
    assert pace.steps >= before


def test_stretches_end_where_somebody_looks() -> None:
    pace = Pace()
    pace.steps = 50
    found = list(stretches(7, 100, [45, 10], pace, 20))
    assert found[0] == (7, 1)
    assert [start for start, _ in found[1:]] == [start + steps for start, steps in found[:-1]]
    ends = {start + steps for start, steps in found}
    assert {10, 20, 30, 40, 45, 50, 60, 70, 80, 90, 100} == ends - {8}


def test_batches_are_made_by_a_thread_in_order_and_no_further_ahead_than_two() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            assert threading.current_thread() is not threading.main_thread()
            yield i

    with Ahead(items()) as coming:
        for wanted in range(10):
            assert next(coming) == wanted
            time.sleep(0.01)
            assert len(made) <= wanted + 3
        assert list(coming) == []


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_asked_for() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise research.Refused("the file ends")

    with Ahead(broken()) as coming:
        assert next(coming) == 1
        with pytest.raises(research.Refused, match="the file ends"):
            next(coming)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_time_spent_waiting_for_batches_is_told() -> None:
    x = np.ones((64, 3), "float32")

    def slow(step: int) -> research.Batch:
        time.sleep(0.02)
        return research.Batch(x[:8], x[:8, :1])

    made = research.supervised(dense(3), loss="mse", optimizer="sgd")
    plain = research.arrays(x, x[:, :1], batch_size=8)
    waits: list[float] = []
    research.train(made, plain, epochs=1, progress=lambda step, waited: waits.append(waited))
    assert max(waits) == 0.0  # it is on the device
    data = plain._replace(batch=slow, resident=None)
    research.train(made, data, epochs=2, progress=lambda step, waited: waits.append(waited))
    assert waits[-1] > 0.1


def test_a_generator_may_fill_the_same_array_again() -> None:
    def batches(reuse: bool) -> Iterator[Any]:
        x, y = np.zeros((8, 4), "float32"), np.zeros((8, 1), "float32")
        for i in range(12):
            x, y = (x, y) if reuse else (x.copy(), y.copy())
            x[:], y[:] = i, i * i
            yield x, y

    made = research.supervised(dense(4), loss="mse", optimizer="adam")
    once, again = (
        research.train(made, research.iterated(lambda reuse=reuse: batches(reuse), steps_per_epoch=12), epochs=2)[0]
        for reuse in (False, True)
    )
    same(once, again)
