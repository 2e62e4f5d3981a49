"""Models whose graphs differ: several inputs, nested models, long edges, shared layers, and a `call` of its own."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers


def tickets() -> keras.Model:
    """Three inputs, two outputs."""
    title, body, tags = keras.Input((None,), name="title"), keras.Input((None,), name="body"), keras.Input((12,), name="tags")
    encoded = [layers.LSTM(8)(layers.Embedding(50, 4)(text)) for text in (title, body)]
    features = layers.Concatenate()([*encoded, tags])
    return keras.Model(
        [title, body, tags], [layers.Dense(1, name="priority")(features), layers.Dense(4, name="department")(features)]
    )


def autoencoder() -> keras.Model:
    """Two nested models."""
    image = keras.Input((8, 8, 1), name="image")
    encoder = keras.Model(image, layers.Flatten()(layers.Conv2D(4, 3)(image)), name="encoder")
    decoder = keras.Sequential([keras.Input((144,)), layers.Dense(64), layers.Reshape((8, 8, 1))], name="decoder")
    x = keras.Input((8, 8, 1))
    return keras.Model(x, decoder(encoder(x)), name="autoencoder")


def residual() -> keras.Model:
    """Edges that span several rows."""
    x = start = keras.Input((6,))
    for _ in range(2):
        x = layers.Add()([layers.Dense(6)(layers.Dense(6)(x)), x])
    return keras.Model(start, [x, x + start])


def shared() -> keras.Model:
    """A layer and a model that are called twice, the model on its own output."""
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    tower = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(4)], name="tower")
    twice = layers.Dense(4, name="twice")
    return keras.Model({"a": a, "b": b}, {"sum": tower(tower(twice(a))) + twice(b), "loop": twice(twice(a))})


def two_heads() -> keras.Model:
    """A nested model with two outputs, in a nested model."""
    x = keras.Input((5,), name="x")
    twins = keras.Model(x, [layers.Dense(1, name="left")(x), layers.Dense(2, name="right")(x)], name="twins")
    y = keras.Input((5,), name="y")
    middle = keras.Model(y, layers.Concatenate()(twins(layers.Dense(5)(y))), name="middle")
    z = keras.Input((5,), name="z")
    return keras.Model(z, middle(z))


class CustomCall(keras.Model):
    """A model with its own `call`: its graph is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = keras.Sequential([keras.Input((4,)), layers.Dense(3)], name="encoder")
        self.blocks = [layers.Dense(3), layers.Dense(3)]
        self.head = layers.Dense(2)

    def call(self, x: Any) -> Any:
        x = self.encoder(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def custom_call() -> keras.Model:
    model = CustomCall()
    model(np.ones((1, 4), np.float32))
    return model


MODELS = [tickets, autoencoder, residual, shared, two_heads, custom_call]
MODELS_WITH_GRAPH = MODELS[:-1]


def model_name(build: Callable[[], keras.Model]) -> str:
    return build.__name__


each_model = pytest.mark.parametrize("build", MODELS, ids=model_name)
each_model_with_graph = pytest.mark.parametrize("build", MODELS_WITH_GRAPH, ids=model_name)
