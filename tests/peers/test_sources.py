"""Whatever data Keras users bring, through `research.fit` as through Keras, and through our own loop."""

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

from research.sources import indexed, iterated

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


class Pages(keras.utils.PyDataset):
    def __len__(self) -> int:
        return -(-N // SIZE)

    def __getitem__(self, page: int) -> Any:
        rows = slice(page * SIZE, (page + 1) * SIZE)
        return X[rows], Y[rows]


def tf_data() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(SIZE)


def torch_loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Examples(), batch_size=SIZE)


def grain_map() -> Any:
    return grain.MapDataset.source(Examples()).batch(SIZE)


def pages() -> Any:
    return (Pages()[page] for page in range(len(Pages())))


def endless() -> Any:
    return (Pages()[page % len(Pages())] for page in itertools.count())


SOURCES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "numpy": (lambda: {"x": X, "y": Y, "batch_size": SIZE}, {}),
    "jax": (lambda: {"x": jnp.asarray(X), "y": jnp.asarray(Y), "batch_size": SIZE}, {}),
    "pandas": (lambda: {"x": pandas.DataFrame(X), "y": pandas.DataFrame(Y), "batch_size": SIZE}, {}),
    "PyDataset": (lambda: {"x": Pages()}, {"shuffle": False}),
    "tf.data": (lambda: {"x": tf_data()}, {}),
    "tf.data, length unknown": (lambda: {"x": tf_data().filter(lambda x, y: True)}, {}),
    "tf.data, endless": (lambda: {"x": tf_data().repeat()}, {"steps_per_epoch": 5}),
    "torch DataLoader": (lambda: {"x": torch_loader()}, {}),
    "generator": (lambda: {"x": pages()}, {"epochs": 1}),
    "generator, endless": (lambda: {"x": endless()}, {"steps_per_epoch": 7}),
    "generator, too short": (lambda: {"x": pages()}, {"steps_per_epoch": 4, "epochs": 3}),
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
def test_two_epochs_of_it_equal_keras_bit_for_bit(name: str) -> None:
    source, options = SOURCES[name]

    def trained(fit: Callable[..., Any]) -> Any:
        net = model()
        keras.utils.set_random_seed(1)
        history = fit(net, **source(), **{"epochs": 2, "verbose": 0, **options}).history
        return history, int(net.optimizer.iterations), [w.tolist() for w in net.get_weights()]

    got, wanted = trained(research.fit), trained(lambda net, **given: net.fit(**given))
    assert got[1] >= 6
    assert got == wanted


@pytest.mark.parametrize("name", [n for n in SOURCES if "generator" not in n])
def test_validated_and_predicted_on_it_equals_keras(name: str) -> None:
    source, options = SOURCES[name]
    given = source()
    steps = {"steps": options["steps_per_epoch"]} if "steps_per_epoch" in options else {}
    net = model()
    got = research.evaluate(net, **source(), **steps, verbose=0)
    assert got == net.evaluate(**source(), **steps, verbose=0)
    x = {"x": given["x"], **({"batch_size": SIZE} if "batch_size" in given else {})}
    np.testing.assert_array_equal(research.predict(net, **x, **steps, verbose=0), net.predict(**x, **steps, verbose=0))


BATCHES: dict[str, Callable[[], research.Batches]] = {
    "PyDataset": lambda: indexed(Pages()),
    "Grain MapDataset": lambda: indexed(grain_map()),
    "Grain IterDataset": lambda: iterated(grain_map().to_iter_dataset(), steps_per_epoch=6),
    "tf.data": lambda: iterated(tf_data()),
    "torch DataLoader": lambda: iterated(torch_loader()),
    "generator function": lambda: iterated(pages, steps_per_epoch=6),
    "endless generator": lambda: iterated(endless(), steps_per_epoch=6),
}


@pytest.mark.parametrize("name", BATCHES)
def test_our_loop_over_it_gives_the_weights_of_arrays_bit_for_bit(name: str) -> None:
    def trained(data: research.Batches) -> Any:
        state, logs = research.train(research.from_keras(model()), data, epochs=2)
        return [np.asarray(w).tolist() for w in state.trainable], logs

    assert trained(BATCHES[name]()) == trained(research.arrays(X, Y, batch_size=SIZE, shuffle=False))


@pytest.mark.parametrize("name", [n for n in BATCHES if n != "endless generator"])
def test_going_on_in_the_middle_of_an_epoch_is_exact(name: str) -> None:
    learner = research.from_keras(model())
    whole, _ = research.train(learner, BATCHES[name](), steps=10)
    part, _ = research.train(learner, BATCHES[name](), steps=4)
    rest, _ = research.train(learner, BATCHES[name](), steps=10, start=4, state=part)
    assert [np.asarray(w).tolist() for w in rest.trainable] == [np.asarray(w).tolist() for w in whole.trainable]


def test_what_cannot_be_is_refused_in_a_line() -> None:
    with pytest.raises(research.Refused, match=r"length is not known.*pass steps_per_epoch"):
        iterated(endless())
    with pytest.raises(research.Refused, match="it has no batch"):
        indexed([])
    with pytest.raises(research.Refused, match="it has no batch"):
        iterated(lambda: iter(()), steps_per_epoch=1)
    with pytest.raises(research.Refused, match="4 parts"):
        indexed([(X, X, X, X)])
    short = iterated(pages(), steps_per_epoch=6)
    with pytest.raises(research.Refused, match="ended after batch 5"):
        research.train(research.from_keras(model()), short, epochs=2)
    with pytest.raises(research.Refused, match="has gone by"):
        short.batch(0)
