"""A batch of an iterable depends on its step alone: for two readers, in any order, from several threads. Else it is an error."""

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import keras
import numpy as np
import pytest

import research
from research.data import from_batches, from_examples, from_iterable
from research.data.streams import MAX_ITERATORS

STEPS = 7  # in an epoch


def items() -> Iterator[Any]:
    for i in range(STEPS):
        time.sleep(1e-4)  # lets another thread in
        yield np.full((2, 3), i, "float32"), np.array([i, -i], "int32")


class Loader:
    """Gives an iterator of its own to each reader, as a `DataLoader` that does not shuffle."""

    def __init__(self) -> None:
        self.opened = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Any]:
        self.opened += 1
        return items()


class ReusesOneBuffer(Loader):
    """Yields the same arrays, filled anew, from all of its iterators."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = np.zeros((2, 3), "float32"), np.zeros(2, "int32")

    def __iter__(self) -> Iterator[Any]:
        for x, y in items():
            self.x[...], self.y[...] = x, y
            yield self.x, self.y


class RewindsOneIterator(Loader):
    """Gives all readers one object and rewinds it for each, as a `DataLoader` with persistent workers does."""

    class Shared:
        source: Iterator[Any]

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            return next(self.source)

    def __init__(self) -> None:
        super().__init__()
        self.shared = self.Shared()

    def __iter__(self) -> Iterator[Any]:
        self.shared.source = items()
        return self.shared


def label(batch: research.Batch) -> int:
    assert batch.y.tolist() == [batch.y[0], -batch.y[0]]
    assert (batch.x == batch.y[0]).all()
    return int(batch.y[0])


REPEATABLE: dict[str, Callable[[], research.Batches]] = {
    "generator function": lambda: from_iterable(items, steps_per_epoch=STEPS),
    "list": lambda: from_iterable(list(items())),
    "loader": lambda: from_iterable(Loader()),
    "loader that reuses its buffer": lambda: from_iterable(ReusesOneBuffer()),
    "loader that rewinds its iterator": lambda: from_iterable(RewindsOneIterator()),
    "random access": lambda: from_batches(list(items())),
}


@pytest.mark.parametrize("name", REPEATABLE)
def test_a_batch_depends_on_its_step_alone_in_any_order(name: str) -> None:
    batches, rng = REPEATABLE[name](), np.random.default_rng(0)
    for step in [0, 0, 3, 3, 1, 20, 2, 8, 6, 7, *rng.integers(0, 4 * STEPS, 60).tolist()]:
        assert label(batches.batch(step)) == step % STEPS


@pytest.mark.parametrize("name", REPEATABLE)
def test_readers_in_several_threads_get_exactly_their_batches(name: str) -> None:
    batches, errors = REPEATABLE[name](), []

    def read(first: int, stride: int) -> None:
        try:
            for step in range(first, 4 * STEPS, stride):
                assert label(batches.batch(step)) == step % STEPS
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(first, 1 + first % 3)) for first in range(MAX_ITERATORS + 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_readers_that_go_forward_share_no_iterator_and_restart_none() -> None:
    loader = Loader()
    batches = from_iterable(loader)
    assert loader.opened == 1  # the first batch was read for its shapes, and is not read again
    for step in range(5):
        batches.batch(step)
    assert loader.opened == 1
    for step in range(5):  # another reader, in turn with the first one
        batches.batch(step)
        batches.batch(5 + step)
    assert loader.opened == 3  # the first one, which began its second epoch, and another


def test_iterators_are_closed_when_their_readers_are_done() -> None:
    open_iterators: set[int] = set()
    numbers = itertools.count()

    def source() -> Iterator[Any]:
        number = next(numbers)
        open_iterators.add(number)
        try:
            yield from items()
        finally:
            open_iterators.discard(number)

    batches = from_iterable(source, steps_per_epoch=STEPS)
    for _ in range(20):  # evaluations
        for step in range(STEPS):
            batches.batch(step)
    assert len(open_iterators) <= 2
    for step in range(1, 20):  # readers that stop anywhere
        batches.batch(0)
        batches.batch(step)
    assert len(open_iterators) <= MAX_ITERATORS
    del batches
    assert open_iterators == set()


def learner() -> research.Learner:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    return research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(1e-3), metrics=["mae"])


def regression(count: int) -> list[Any]:
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(4, 3)).astype("float32"), rng.normal(size=(4, 1)).astype("float32")) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["function", "loader"])
def test_training_evaluations_and_hooks_read_one_iterable_at_the_same_time(form: str) -> None:
    batches = regression(6)
    algorithm = learner()

    def train(data: research.Batches) -> Any:
        seen: list[Any] = []

        def hook(step: int, state: Any, logs: dict[str, Any]) -> None:
            seen.append(research.evaluate(algorithm, data, state))
            seen.append(data.batch(step).y.tolist())

        state, logs = research.train(algorithm, data, steps=15, evaluations={"val": data}, hooks=[(2, hook)])
        return [np.asarray(w).tolist() for w in state.trainable], logs, seen

    def slowly() -> Iterator[Any]:
        for item in batches:
            time.sleep(1e-3)  # lets another thread in
            yield item

    class Slow:
        def __iter__(self) -> Iterator[Any]:
            return slowly()

    source = slowly if form == "function" else Slow()
    assert train(from_iterable(source, steps_per_epoch=6)) == train(from_batches(batches))


def test_an_iterator_has_one_reader() -> None:
    batches = from_iterable(items(), steps_per_epoch=STEPS, name="toys")
    with pytest.raises(
        research.InvalidArgument, match=r"toys: batch 0 was requested but the iterator is already at .*a function"
    ):
        research.train(
            learner(),
            batches._replace(batch=lambda step: batches.batch(step)._replace(y=np.zeros((2, 1), "float32"))),
            steps=5,
            hooks=[(3, lambda step, state, logs: batches.batch(0) and None)],
        )


def test_two_data_sets_do_not_share_an_iterator() -> None:
    iterator = items()
    first = from_iterable(iterator, steps_per_epoch=2, name="train")
    with pytest.raises(research.InvalidArgument, match="val: the generator is already read by the data set 'train'"):
        from_iterable(iterator, steps_per_epoch=2, name="val")
    assert label(first.batch(1)) == 1
    del first
    gc.collect()
    assert label(from_iterable(iterator, steps_per_epoch=2).batch(0)) == 2  # who reads on by themselves, may


class Shuffles(Loader):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def __iter__(self) -> Iterator[Any]:
        order = list(items())
        self.rng.shuffle(order)  # type: ignore[arg-type]
        return iter(order)


class SharesPosition(Loader):
    def __init__(self) -> None:
        super().__init__()
        self.source = itertools.chain.from_iterable(items() for _ in range(9))

    def __iter__(self) -> Iterator[Any]:
        yield from self.source


class ReturnsOneIterator(SharesPosition):
    def __iter__(self) -> Iterator[Any]:
        return self.source


class Augments(Loader):
    def __iter__(self) -> Iterator[Any]:
        self.opened += 1
        return ((x + self.opened, y) for x, y in items())


UNREPEATABLE: dict[str, Callable[[], Any]] = {
    "shuffles": Shuffles,
    "shares its position": SharesPosition,
    "returns one iterator": ReturnsOneIterator,
    "augments": Augments,
    "function with a state": lambda: (lambda rng: lambda: ((rng.normal(size=(2, 3)), y) for _, y in items()))(
        np.random.default_rng(0)
    ),
}


@pytest.mark.parametrize("name", UNREPEATABLE)
def test_a_source_that_differs_when_it_is_read_again_has_no_second_reader(name: str) -> None:
    batches = from_iterable(UNREPEATABLE[name](), steps_per_epoch=STEPS, name="toys")
    for step in range(3):
        batches.batch(step)
    for step in (0, 3, 4):  # nor does the first reader go on: its iterator may have lost batches to the other
        with pytest.raises(research.InvalidArgument, match=r"toys: batch \d was read again and differs.*from a seed"):
            batches.batch(step)


def test_one_reader_of_a_shuffling_source_gets_another_order_in_each_epoch() -> None:
    batches = from_iterable(Shuffles())
    epochs = [[label(batches.batch(epoch * STEPS + i)) for i in range(STEPS)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(STEPS)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_order_from_a_seed_is_repeatable() -> None:
    def source() -> Iterator[Any]:
        order = list(items())
        np.random.default_rng(5).shuffle(order)  # type: ignore[arg-type]
        return iter(order)

    batches = from_iterable(source, steps_per_epoch=STEPS)
    first = [label(batches.batch(step)) for step in range(STEPS)]
    assert [label(batches.batch(step)) for step in range(STEPS)] == first != list(range(STEPS))


def test_a_large_batch_is_compared_in_all_of_its_images() -> None:
    images = np.zeros((64, 28, 28), "float32")
    orders = iter([np.arange(64), np.roll(np.arange(64), 1)])

    def source() -> Iterator[Any]:
        shown = images.copy()
        shown[next(orders)[0], 10:18, 10:18] = 1.0  # all borders are black
        yield shown
        yield images

    batches = from_iterable(source, steps_per_epoch=2)
    batches.batch(1)
    with pytest.raises(research.InvalidArgument, match="batch 0 was read again and differs"):
        batches.batch(0)


def test_changing_a_batch_changes_it_for_no_other_reader() -> None:
    for batches in (
        from_iterable(items, steps_per_epoch=STEPS),
        from_batches(list(items())),
        from_examples(np.eye(4), batch_size=2),
    ):
        batch = batches.batch(1)
        expected = jax.tree.map(np.copy, batch)
        jax.tree.map(lambda leaf: leaf.fill(9), batch)
        jax.tree.map(np.testing.assert_array_equal, batches.batch(1)._replace(sample_weight=None), expected)


def test_a_source_that_fails_can_be_read_again() -> None:
    failures = iter([True, False])

    def source() -> Iterator[Any]:
        for i, item in enumerate(items()):
            if i == 2 and next(failures, False):
                raise OSError("the disk is busy")
            yield item

    batches = from_iterable(source, steps_per_epoch=STEPS)
    with pytest.raises(OSError, match="busy"):
        batches.batch(4)
    assert [label(batches.batch(step)) for step in (4, 5, 1)] == [4, 5, 1]


def test_examples_of_a_source_that_reuses_its_buffer_are_read_by_one_thread_at_a_time() -> None:
    class Source:
        buffer = np.zeros(50, "int32")

        def __len__(self) -> int:
            return 64

        def __getitem__(self, row: int) -> Any:
            self.buffer[...] = row
            time.sleep(1e-4)  # lets another thread in
            return self.buffer

    batches, wrong = from_examples(Source(), batch_size=4, shuffle=False), []

    def read() -> None:
        for step in range(32):
            if batches.batch(step).x.tolist() != [[row] * 50 for row in range(step % 16 * 4, step % 16 * 4 + 4)]:
                wrong.append(step)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
