"""Several steps per dispatch: bitwise equal results, the logs of each step, one program, and no avoidable waiting."""

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
from instrumentation import count_compilations
from keras import layers
from small_training import assert_same_weights, data, learner

import research
from research.data import prefetch
from research.data.prefetch import DispatchPacer, Prefetcher, chunk_bounds
from research.training.logs import LogEntry
from research.training.programs import compile_ahead, train_program


def fix_steps_per_dispatch(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Makes the pacer choose this number of steps for every dispatch after the first."""
    monkeypatch.setattr(DispatchPacer, "dispatched", lambda self, results, done: setattr(self, "steps", steps))


@pytest.mark.slow
@pytest.mark.parametrize("resident", [1 << 20, 0], ids=["resident", "host"])
def test_weights_and_logs_are_bitwise_independent_of_the_steps_per_dispatch(
    resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = learner()
    state, step, expected_logs = classifier.init(), jax.jit(classifier.train), []
    for i in range(12):  # batches of 12 and a shorter last one of 4
        state = classifier.reset(state) if i % 4 == 0 else state
        state, logs = step(state, data(batch_size=12).batch(i))
        expected_logs.append({name: float(value) for name, value in logs.items()})
    for steps_per_dispatch in (1, 2, 3, 100):
        fix_steps_per_dispatch(monkeypatch, steps_per_dispatch)
        entries: list[LogEntry] = []
        batches = data(batch_size=12, resident_bytes=resident)
        fused, _ = research.train(classifier, batches, epochs=3, log_every=1, log=entries.append)
        assert_same_weights(fused, state)
        assert [entry.step for entry in entries] == list(range(1, 13))
        assert [entry.values for entry in entries] == expected_logs


@pytest.mark.slow
def test_hooks_get_the_state_of_their_step_and_the_steps_between_hooks_are_one_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_steps_per_dispatch(monkeypatch, 100)
    classifier, seen, dispatches = learner(), {}, []
    research.train(
        classifier,
        data(),
        epochs=2,
        hooks=[(3, lambda step, state, logs: seen.update({step: [np.array(w) for w in state.trainable]}))],
        progress=lambda step, waited: dispatches.append(step),
    )
    assert list(seen) == [3, 6, 9, 10]
    assert dispatches == [1, 3, 5, 6, 9, 10]  # a single step, then up to the next hook or the end of an epoch
    for step, weights in seen.items():
        state, _ = research.train(classifier, data(), steps=step)
        for a, b in zip(weights, state.trainable, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_training_and_evaluating_again_neither_compiles_nor_traces(caplog: pytest.LogCaptureFixture) -> None:
    classifier, batches = learner(), data()
    state, _ = research.train(classifier, batches, epochs=1, evaluations={"val": batches})
    with count_compilations(caplog) as programs:
        for _ in range(2):
            state, _ = research.train(classifier, batches, epochs=1, state=state, evaluations={"val": data(seed=5)})
            research.evaluate(classifier, batches, state)
        assert not [record for record in caplog.records if "step" in record.getMessage()]
        assert programs("train_steps") == 0


@pytest.mark.slow
@pytest.mark.parametrize("resident", [1 << 20, 0], ids=["resident", "host"])
def test_training_reuses_a_program_compiled_ahead(resident: int, caplog: pytest.LogCaptureFixture) -> None:
    classifier, batches = learner(), data(resident_bytes=resident)
    state = classifier.init()
    with count_compilations(caplog) as programs:
        compile_ahead(classifier, batches, state)
        assert programs("train_steps") == 1
        research.train(classifier, batches, epochs=2, state=state)
        assert programs("train_steps") == 1


def test_cached_programs_do_not_keep_a_learner_alive() -> None:
    classifier = learner()
    state, _ = research.train(classifier, data(), epochs=1, evaluations={"val": data()})
    research.predict(classifier, data(), state)
    functions = [weakref.ref(f) for f in (classifier.train, classifier.evaluate, classifier.predict, classifier.reset)]
    del classifier
    gc.collect()
    assert [function() for function in functions] == [None] * 4


def test_a_learner_that_takes_no_batch_is_fused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_steps_per_dispatch(monkeypatch, 100)
    dispatches: list[int] = []
    random_walk = research.Learner(
        init=lambda: jax.random.key(0),
        reset=lambda state: state,
        train=lambda state, batch: (jax.random.split(state)[0], {"draw": jax.random.uniform(state)}),
        evaluate=lambda state, batch: (state, {}),
        predict=lambda state, batch: None,
        names="key",
    )
    no_data = research.Batches(batch=lambda step: None, shapes=None, steps_per_epoch=8, examples=8)
    state, logs = research.train(random_walk, no_data, epochs=1, progress=lambda step, waited: dispatches.append(step))
    key = jax.random.key(0)
    for _ in range(7):
        key = jax.random.split(key)[0]
    assert logs["draw"] == float(jax.random.uniform(key))
    assert dispatches == [1, 2, 3, 8]  # two dispatches are prefetched before the pacer has measured any
    np.testing.assert_array_equal(jax.random.key_data(state), jax.random.key_data(jax.random.split(key)[0]))


def capacity(x: np.ndarray, model: keras.Model, **options: Any) -> int:
    regressor = research.supervised(model, loss="mse", optimizer="sgd", metrics=options.pop("metrics", None))
    y = np.zeros((len(x), 1), "float32")
    return train_program(regressor, research.from_arrays(x, y, batch_size=4, **options), regressor.init()).capacity


def dense(*shape: int) -> keras.Model:
    return keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(1)])


@pytest.mark.slow
def test_steps_are_fused_only_where_that_is_faster() -> None:
    x = np.ones((40, 6, 6, 1), "float32")
    conv = keras.Sequential([keras.Input((6, 6, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(1)])
    assert capacity(x, conv) == 1  # convolutions are slow inside loops on the CPU
    assert capacity(x, dense(6, 6, 1)) == 10  # at most an epoch
    large = np.ones((400, 100, 100), "float32")
    assert capacity(large, dense(100, 100)) == 100
    assert capacity(large, dense(100, 100), resident_bytes=0) == 1  # stacking the batches would cost more
    assert capacity(large[:, :20], dense(20, 100), resident_bytes=0) == 32


def test_large_logs_limit_the_number_of_fused_steps() -> None:
    class Wide(keras.metrics.Metric):
        def __init__(self) -> None:
            super().__init__(name="wide")
            self.total = self.add_weight(shape=(1 << 16,), initializer="zeros", name="total")

        def update_state(self, y: Any, outputs: Any, sample_weight: Any = None) -> None:
            self.total.assign_add(jnp.ones(1 << 16))

        def result(self) -> Any:
            return self.total

    assert capacity(np.ones((400, 3), "float32"), dense(3), metrics=[Wide()]) == 3


def test_dispatches_grow_to_about_a_tenth_of_a_second_and_shrink_when_steps_get_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, busy_until, pacer, sizes = 0.0, 0.0, DispatchPacer(), []

    def wait(until: float) -> None:
        nonlocal clock
        clock = max(clock, until)

    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(prefetch.jax, "block_until_ready", wait)
    for seconds in [1e-3] * 12 + [1e-2] * 8:
        busy_until += seconds * pacer.steps  # the device runs one dispatch after the other
        sizes.append(pacer.steps)
        pacer.dispatched(busy_until, pacer.steps)
    assert sizes[:8] == [1, 1, 1, 1, 2, 4, 8, 16]
    assert {98, 99, 100}.issuperset(sizes[10:14])
    assert {9, 10}.issuperset(sizes[-3:])


def test_a_pause_does_not_reduce_the_steps_per_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pacer = 0.0, DispatchPacer()
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(prefetch.jax, "block_until_ready", lambda results: None)
    for _ in range(12):
        clock += 1e-3 * pacer.steps
        pacer.dispatched(None, pacer.steps)
    assert pacer.steps > 50
    before = pacer.steps
    pacer.pause()
    clock += 100.0
    for _ in range(3):
        clock += 1e-3 * pacer.steps
        pacer.dispatched(None, pacer.steps)
    assert pacer.steps >= before


def test_dispatches_end_at_every_stop() -> None:
    pacer = DispatchPacer()
    pacer.steps = 50
    bounds = list(chunk_bounds(7, 100, [45, 10], pacer, 20))
    assert bounds[0] == (7, 1)
    assert [start for start, _ in bounds[1:]] == [start + steps for start, steps in bounds[:-1]]
    ends = {start + steps for start, steps in bounds}
    assert {10, 20, 30, 40, 45, 50, 60, 70, 80, 90, 100} == ends - {8}


def test_a_thread_produces_batches_in_order_at_most_two_ahead() -> None:
    produced: list[int] = []

    def items() -> Iterator[int]:
        for i in range(10):
            produced.append(i)
            assert threading.current_thread() is not threading.main_thread()
            yield i

    with Prefetcher(items()) as prefetcher:
        for i in range(10):
            assert next(prefetcher) == i
            time.sleep(0.01)
            assert len(produced) <= i + 3
        assert list(prefetcher) == []


def test_an_error_in_the_thread_is_raised_when_its_batch_is_requested() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise research.InvalidArgument("the file ends")

    with Prefetcher(broken()) as prefetcher:
        assert next(prefetcher) == 1
        with pytest.raises(research.InvalidArgument, match="the file ends"):
            next(prefetcher)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.slow
def test_progress_reports_the_time_spent_waiting_for_batches() -> None:
    x = np.ones((64, 3), "float32")

    def slow(step: int) -> research.Batch:
        time.sleep(0.02)
        return research.Batch(x[:8], x[:8, :1])

    regressor = research.supervised(dense(3), loss="mse", optimizer="sgd")
    resident = research.from_arrays(x, x[:, :1], batch_size=8)
    waits: list[float] = []
    research.train(regressor, resident, epochs=1, progress=lambda step, waited: waits.append(waited))
    assert max(waits) == 0.0
    from_host = resident._replace(batch=slow, resident=None)
    research.train(regressor, from_host, epochs=2, progress=lambda step, waited: waits.append(waited))
    assert waits[-1] > 0.1


def test_a_generator_may_reuse_its_buffers() -> None:
    def batches(reuse: bool) -> Iterator[Any]:
        x, y = np.zeros((8, 4), "float32"), np.zeros((8, 1), "float32")
        for i in range(12):
            x, y = (x, y) if reuse else (x.copy(), y.copy())
            x[:], y[:] = i, i * i
            yield x, y

    regressor = research.supervised(dense(4), loss="mse", optimizer="adam")
    new_buffers, reused_buffers = (
        research.train(regressor, research.from_iterable(lambda reuse=reuse: batches(reuse), steps_per_epoch=12), epochs=2)[0]
        for reuse in (False, True)
    )
    assert_same_weights(new_buffers, reused_buffers)
