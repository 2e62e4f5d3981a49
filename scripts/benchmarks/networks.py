"""The networks of all workloads in Keras, for any Keras backend."""

import keras
from keras import layers, ops
from workloads import WIDTHS


def network(workload: str) -> keras.Model:
    """Returns a workload's newly initialised network; for the GAN see `gan`."""
    if workload in WIDTHS:
        return mlp(*WIDTHS[workload])
    return {"convnet-64": convnet, "tickets-128": tickets, "gpt-16": gpt}[workload]()


def mlp(inputs: int, hidden: int, classes: int) -> keras.Model:
    """Returns a network with one hidden layer that computes logits."""
    return keras.Sequential([keras.Input((inputs,)), layers.Dense(hidden, activation="relu"), layers.Dense(classes)])


def convnet() -> keras.Model:
    """Returns a network with two convolutions that computes logits."""
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
    """Returns the discriminator (64 numbers to a logit, high for generated) and the generator (16 numbers to 64 in -1..1)."""
    discriminator: list[keras.Layer] = [keras.Input((64,))]
    for units in (512, 256):
        discriminator += [layers.Dense(units), layers.LeakyReLU(0.2), layers.Dropout(0.3)]
    generator: list[keras.Layer] = [keras.Input((16,))]
    for units in (512, 512):
        generator += [layers.Dense(units), layers.LeakyReLU(0.2)]
    return keras.Sequential([*discriminator, layers.Dense(1)]), keras.Sequential(
        [*generator, layers.Dense(64, activation="tanh")]
    )


def tickets() -> keras.Model:
    """Returns a network from two sequences of words and 7 numbers to a priority logit and 6 department logits."""
    title, body = keras.Input((16,), dtype="int32", name="title"), keras.Input((60,), dtype="int32", name="body")
    tags = keras.Input((7,), name="tags")
    encoded = [layers.LSTM(64)(layers.Embedding(4000, 64, mask_zero=True)(words)) for words in (title, body)]
    features = layers.concatenate([*encoded, tags])
    priority, department = layers.Dense(1, name="priority"), layers.Dense(6, name="department")
    return keras.Model(
        {"title": title, "body": body, "tags": tags}, {"priority": priority(features), "department": department(features)}
    )


def gpt() -> keras.Model:
    """Returns a causal transformer over 128 bytes that computes the logits of each next byte."""
    tokens = keras.Input((128,), dtype="int32")
    x = PositionEmbedding()(layers.Embedding(256, 128, embeddings_initializer=normal())(tokens))
    for _ in range(4):
        h = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.MultiHeadAttention(4, 32, kernel_initializer=glorot(128, 128))(h, h, use_causal_mask=True)
        h = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.Dense(128)(layers.Dense(512, activation=ops.gelu)(h))
    return keras.Model(tokens, layers.Dense(256)(layers.LayerNormalization(epsilon=1e-5)(x)))


class PositionEmbedding(keras.Layer):
    """Adds a learned vector to each position."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Creates the vectors."""
        self.vectors = self.add_weight(shape=shape[1:], initializer=normal())

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Returns the input plus the vectors."""
        return x + self.vectors


def normal() -> keras.Initializer:
    """Returns the initializer of embeddings."""
    return keras.initializers.RandomNormal(stddev=0.02)


def glorot(inputs: int, outputs: int) -> keras.Initializer:
    """Returns Glorot uniform for a matrix. Keras would treat the first axes of a three-axis kernel as those of a filter."""
    limit = (6 / (inputs + outputs)) ** 0.5
    return keras.initializers.RandomUniform(-limit, limit)
