"""The networks of all workloads in Keras, on whichever backend Keras has."""

import keras
from keras import layers, ops
from workloads import WIDTHS


def network(workload: str) -> keras.Model:
    """A workload's network with new weights; the GAN has two, and a function of its own."""
    if workload in WIDTHS:
        return mlp(*WIDTHS[workload])
    return {"convnet-64": convnet, "tickets-128": tickets, "gpt-16": gpt}[workload]()


def mlp(inputs: int, hidden: int, classes: int) -> keras.Model:
    """One hidden layer; logits."""
    return keras.Sequential([keras.Input((inputs,)), layers.Dense(hidden, activation="relu"), layers.Dense(classes)])


def convnet() -> keras.Model:
    """Two convolutions; logits."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10),
        ]
    )


def gan() -> tuple[keras.Model, keras.Model]:
    """The discriminator, from 64 numbers to a logit of being generated, and the generator, from 16 numbers to 64 in -1..1."""
    judging: list[keras.Layer] = [keras.Input((64,))]
    for units in (512, 256):
        judging += [layers.Dense(units), layers.LeakyReLU(0.2), layers.Dropout(0.3)]
    drawing: list[keras.Layer] = [keras.Input((16,))]
    for units in (512, 512):
        drawing += [layers.Dense(units), layers.LeakyReLU(0.2)]
    return keras.Sequential([*judging, layers.Dense(1)]), keras.Sequential([*drawing, layers.Dense(64, activation="tanh")])


def tickets() -> keras.Model:
    """Two sequences of words and 7 numbers in; a logit of the priority and one for each of 6 departments."""
    title, body = keras.Input((16,), dtype="int32", name="title"), keras.Input((60,), dtype="int32", name="body")
    tags = keras.Input((7,), name="tags")
    read = [layers.LSTM(64)(layers.Embedding(4000, 64, mask_zero=True)(words)) for words in (title, body)]
    features = layers.concatenate([*read, tags])
    priority, department = layers.Dense(1, name="priority"), layers.Dense(6, name="department")
    return keras.Model(
        {"title": title, "body": body, "tags": tags}, {"priority": priority(features), "department": department(features)}
    )


def gpt() -> keras.Model:
    """A causal transformer over 128 bytes; logits of each one's next."""
    tokens = keras.Input((128,), dtype="int32")
    x = Positions()(layers.Embedding(256, 128, embeddings_initializer=normal())(tokens))
    for _ in range(4):
        h = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.MultiHeadAttention(4, 32, kernel_initializer=glorot(128, 128))(h, h, use_causal_mask=True)
        h = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.Dense(128)(layers.Dense(512, activation=ops.gelu)(h))
    return keras.Model(tokens, layers.Dense(256)(layers.LayerNormalization(epsilon=1e-5)(x)))


class Positions(keras.Layer):
    """Adds to each position a vector of its own."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Makes the vectors."""
        self.vectors = self.add_weight(shape=shape[1:], initializer=normal())

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Adds them."""
        return x + self.vectors


def normal() -> keras.Initializer:
    """Of embeddings."""
    return keras.initializers.RandomNormal(stddev=0.02)


def glorot(inputs: int, outputs: int) -> keras.Initializer:
    """Glorot uniform of a matrix, whatever axes its kernel has: of three, Keras would take the first ones for a filter's."""
    limit = (6 / (inputs + outputs)) ** 0.5
    return keras.initializers.RandomUniform(-limit, limit)
