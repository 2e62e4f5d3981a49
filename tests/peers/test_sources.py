"""All sources of data that Keras accepts give the same in `research.fit` as in Keras, and work in `research.train`."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import research  # noqa: I001  (before keras: it chooses the backend)

import itertools
from collections.abc import Callable
from typing import Any

import grain.python as grain
import jax.numpy as jnp
import keras
import numpy as np
import pandas
import pytest
import tensorflow as tf
import torch

from research.data import from_batches, from_iterable

N, SIZE = 44, 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 4)).astype("float32")
Y = (X.sum(-1, keepdims=True) > 0).astype("float32")
pytestmark = [pytest.mark.promotes, pytest.mark.filterwarnings("default")]


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        return X[row], Y[row]


class KerasBatches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return -(-N // SIZE)

    def __getitem__(self, index: int) -> Any:
        rows = slice(index * SIZE, (index + 1) * SIZE)
        return X[rows], Y[rows]


def tf_data() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(SIZE)


def torch_loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Examples(), batch_size=SIZE)


def grain_map() -> Any:
    return grain.MapDataset.source(Examples()).batch(SIZE)


def generator() -> Any:
    return (KerasBatches()[index] for index in range(len(KerasBatches())))


def endless_generator() -> Any:
    return (KerasBatches()[index % len(KerasBatches())] for index in itertools.count())


SOURCES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "numpy": (lambda: {"x": X, "y": Y, "batch_size": SIZE}, {}),
    "jax": (lambda: {"x": jnp.asarray(X), "y": jnp.asarray(Y), "batch_size": SIZE}, {}),
    "pandas": (lambda: {"x": pandas.DataFrame(X), "y": pandas.DataFrame(Y), "batch_size": SIZE}, {}),
    "PyDataset": (lambda: {"x": KerasBatches()}, {"shuffle": False}),
    "tf.data": (lambda: {"x": tf_data()}, {}),
    "tf.data, unknown length": (lambda: {"x": tf_data().filter(lambda x, y: True)}, {}),
    "tf.data, endless": (lambda: {"x": tf_data().repeat()}, {"steps_per_epoch": 5}),
    "torch DataLoader": (lambda: {"x": torch_loader()}, {}),
    "generator": (lambda: {"x": generator()}, {"epochs": 1}),
    "generator, endless": (lambda: {"x": endless_generator()}, {"steps_per_epoch": 7}),
    "generator, too short": (lambda: {"x": generator()}, {"steps_per_epoch": 4, "epochs": 3}),
    "Grain MapDataset": (lambda: {"x": grain_map()}, {}),
    "Grain IterDataset": (lambda: {"x": grain_map().to_iter_dataset()}, {}),
    "Grain DataLoader": (
        lambda: {
            "x": grain.DataLoader(
                data_source=Examples(),
                sampler=grain.SequentialSampler(N, grain.NoSharding()),
                operations=[grain.Batch(SIZE)],
            )
        },
        {},
    ),
}


def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dropout(0.2), keras.layers.Dense(1)])
    net.compile("adam", "mse", metrics=["mae"])
    return net


@pytest.mark.parametrize("name", SOURCES)
def test_two_epochs_of_fit_equal_keras_bit_for_bit(name: str) -> None:
    source, options = SOURCES[name]

    def train(fit: Callable[..., Any]) -> Any:
        net = model()
        keras.utils.set_random_seed(1)
        history = fit(net, **source(), **{"epochs": 2, "verbose": 0, **options}).history
        return history, int(net.optimizer.iterations), [w.tolist() for w in net.get_weights()]

    result, expected = train(research.fit), train(lambda net, **arguments: net.fit(**arguments))
    assert result[1] >= 6
    assert result == expected


@pytest.mark.parametrize("name", [n for n in SOURCES if "generator" not in n])
def test_evaluate_and_predict_equal_keras(name: str) -> None:
    source, options = SOURCES[name]
    arguments = source()
    steps = {"steps": options["steps_per_epoch"]} if "steps_per_epoch" in options else {}
    net = model()
    logs = research.evaluate(net, **source(), **steps, verbose=0)
    assert logs == net.evaluate(**source(), **steps, verbose=0)
    x = {"x": arguments["x"], **({"batch_size": SIZE} if "batch_size" in arguments else {})}
    np.testing.assert_array_equal(research.predict(net, **x, **steps, verbose=0), net.predict(**x, **steps, verbose=0))


BATCHES: dict[str, Callable[[], research.Batches]] = {
    "PyDataset": lambda: from_batches(KerasBatches()),
    "Grain MapDataset": lambda: from_batches(grain_map()),
    "Grain IterDataset": lambda: from_iterable(grain_map().to_iter_dataset(), steps_per_epoch=6),
    "tf.data": lambda: from_iterable(tf_data()),
    "torch DataLoader": lambda: from_iterable(torch_loader()),
    "generator function": lambda: from_iterable(generator, steps_per_epoch=6),
    "endless generator": lambda: from_iterable(endless_generator(), steps_per_epoch=6),
}


@pytest.mark.parametrize("name", BATCHES)
def test_train_gives_the_weights_of_training_on_arrays_bit_for_bit(name: str) -> None:
    def train(data: research.Batches) -> Any:
        state, logs = research.train(research.from_keras(model()), data, epochs=2)
        return [np.asarray(w).tolist() for w in state.trainable], logs

    assert train(BATCHES[name]()) == train(research.from_arrays(X, Y, batch_size=SIZE, shuffle=False))


@pytest.mark.parametrize("name", [n for n in BATCHES if n != "endless generator"])
def test_resuming_in_the_middle_of_an_epoch_is_exact(name: str) -> None:
    learner = research.from_keras(model())
    uninterrupted, _ = research.train(learner, BATCHES[name](), steps=10)
    interrupted, _ = research.train(learner, BATCHES[name](), steps=4)
    resumed, _ = research.train(learner, BATCHES[name](), steps=10, start=4, state=interrupted)
    weights, expected = ([np.asarray(w).tolist() for w in state.trainable] for state in (resumed, uninterrupted))
    assert weights == expected


def test_unusable_sources_raise_an_error_that_says_what_to_do() -> None:
    with pytest.raises(research.InvalidArgument, match=r"length of the data set is unknown.*pass steps_per_epoch"):
        from_iterable(endless_generator())
    with pytest.raises(research.InvalidArgument, match="the data set has no batches"):
        from_batches([])
    with pytest.raises(research.InvalidArgument, match="the data set has no batches"):
        from_iterable(lambda: iter(()), steps_per_epoch=1)
    with pytest.raises(research.InvalidArgument, match="4 parts"):
        from_batches([(X, X, X, X)])
    short = from_iterable(generator(), steps_per_epoch=6)
    with pytest.raises(research.InvalidArgument, match="ended after batch 5"):
        research.train(research.from_keras(model()), short, epochs=2)
    with pytest.raises(research.InvalidArgument, match="was requested but the iterator is already at"):
        short.batch(0)


REPEATABLE: dict[str, Callable[[], research.Batches]] = {
    "tf.data": lambda: from_iterable(tf_data()),
    "tf.data, shuffled once": lambda: from_iterable(
        tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(N, seed=1, reshuffle_each_iteration=False).batch(SIZE)
    ),
    "torch DataLoader": lambda: from_iterable(torch_loader()),
    "torch DataLoader, shuffled by a seed": lambda: from_iterable(
        lambda: torch.utils.data.DataLoader(
            Examples(), batch_size=SIZE, shuffle=True, generator=torch.Generator().manual_seed(1)
        ),
        steps_per_epoch=6,
    ),
    "Grain IterDataset": lambda: from_iterable(grain_map().shuffle(seed=1).to_iter_dataset(), steps_per_epoch=6),
}


@pytest.mark.parametrize("name", REPEATABLE)
def test_an_evaluation_during_training_reads_the_same_source_and_changes_nothing(name: str) -> None:
    def train(evaluate: bool) -> Any:
        data, learner, seen = REPEATABLE[name](), research.from_keras(model()), []

        def hook(step: int, state: Any, logs: dict[str, Any]) -> None:
            if evaluate:
                seen.append(research.evaluate(learner, data, state))

        state, _ = research.train(learner, data, steps=9, hooks=[(2, hook)])
        return [np.asarray(w).tolist() for w in state.trainable], seen

    weights, seen = train(True)
    assert weights == train(False)[0]
    assert len(seen) == 5


SHUFFLING: dict[str, Callable[[], research.Batches]] = {
    "tf.data": lambda: from_iterable(tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(N, seed=1).batch(SIZE)),
    "torch DataLoader": lambda: from_iterable(torch.utils.data.DataLoader(Examples(), batch_size=SIZE, shuffle=True)),
}


@pytest.mark.parametrize("name", SHUFFLING)
def test_a_source_that_shuffles_anew_for_each_reader_has_one(name: str) -> None:
    data, learner = SHUFFLING[name](), research.from_keras(model())
    with pytest.raises(research.InvalidArgument, match="was read again and differs"):
        research.train(learner, data, epochs=2, evaluations={"val": data})


def test_an_iterator_of_a_tf_data_set_has_one_reader() -> None:
    data, learner = from_iterable(iter(tf_data().repeat()), steps_per_epoch=6), research.from_keras(model())
    with pytest.raises(research.InvalidArgument, match="the iterator is already at"):
        research.train(learner, data, epochs=2, evaluations={"val": data})
