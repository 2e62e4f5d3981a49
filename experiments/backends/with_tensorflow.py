"""The training loop of the Keras guides on TensorFlow: a tape records the forward pass, the step updates Keras' variables.

    python experiments/backends/with_tensorflow.py FOLDER               # `just backends` writes FOLDER/start.npz and runs this
    python experiments/backends/with_tensorflow.py FOLDER --function    # the step compiled by tf.function

Writes to FOLDER/tensorflow.npz, or tensorflow-function.npz, the arrays that `with_jax.py` writes of the same training.
"""

import argparse
import os
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf


def main(folder: Path, function: bool) -> None:
    """Trains with the initial weights and the data of FOLDER/start.npz."""
    start = np.load(folder / "start.npz")
    train = tf.data.Dataset.from_tensor_slices((start["x"], start["y"])).batch(64)
    val = tf.data.Dataset.from_tensor_slices((start["x_val"], start["y_val"])).batch(64)

    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((64,)), dense(64, "relu"), dense(64, "relu"), dense(10)])
    model.set_weights([start[f"weight_{i}"] for i in range(6)])
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizers = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}
    optimizer = optimizers[str(start["optimizer"])](learning_rate=float(start["learning_rate"]))
    train_metric = keras.metrics.SparseCategoricalAccuracy()
    val_metric = keras.metrics.SparseCategoricalAccuracy()

    def train_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = loss_fn(y, logits)
        gradients = tape.gradient(loss, model.trainable_weights)
        optimizer.apply(gradients, model.trainable_weights)
        train_metric.update_state(y, logits)
        return loss

    def eval_step(x: tf.Tensor, y: tf.Tensor) -> None:
        val_metric.update_state(y, model(x, training=False))

    if function:
        optimizer.build(model.trainable_weights)  # a compiled function can't create variables
        train_step, eval_step = tf.function(train_step), tf.function(eval_step)

    losses, seconds, accuracy, val_accuracy = [], [], [], []
    for epoch in range(int(start["epochs"])):
        train_metric.reset_state()
        for x, y in train:
            started = time.perf_counter()
            losses.append(float(train_step(x, y)))
            seconds.append(time.perf_counter() - started)
        accuracy.append(float(train_metric.result()))

        val_metric.reset_state()
        for x, y in val:
            eval_step(x, y)
        val_accuracy.append(float(val_metric.result()))
        print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}  val_accuracy {val_accuracy[-1]:.4f}")  # noqa: T201

    weights = {f"weight_{i}": weight.numpy() for i, weight in enumerate(model.trainable_weights)}
    microseconds = 1e6 * np.median(seconds[-len(train) :])
    file = folder / ("tensorflow-function.npz" if function else "tensorflow.npz")
    np.savez(file, loss=losses, accuracy=accuracy, val_accuracy=val_accuracy, microseconds=microseconds, **weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of start.npz")
    parser.add_argument("--function", action="store_true", help="compile the steps by tf.function")
    options = parser.parse_args()
    main(options.folder, options.function)
