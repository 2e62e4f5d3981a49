"""The training loop of the Keras guides on PyTorch: `backward` stores gradients in the weights, Keras' optimizer applies them.

    python experiments/backends/with_torch.py FOLDER    # `just backends` writes FOLDER/start.npz and runs this

Writes to FOLDER/torch.npz the arrays that `with_jax.py` writes of the same training.
"""

import argparse
import os
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset


def main(folder: Path) -> None:
    """Trains with the initial weights and the data of FOLDER/start.npz."""
    start = np.load(folder / "start.npz")
    tensors = {name: torch.from_numpy(start[name]) for name in ("x", "y", "x_val", "y_val")}
    train = DataLoader(TensorDataset(tensors["x"], tensors["y"]), batch_size=64)
    val = DataLoader(TensorDataset(tensors["x_val"], tensors["y_val"]), batch_size=64)

    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((64,)), dense(64, "relu"), dense(64, "relu"), dense(10)])
    model.set_weights([start[f"weight_{i}"] for i in range(6)])
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizers = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}
    optimizer = optimizers[str(start["optimizer"])](learning_rate=float(start["learning_rate"]))
    train_metric = keras.metrics.SparseCategoricalAccuracy()
    val_metric = keras.metrics.SparseCategoricalAccuracy()

    def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = model(x, training=True)
        loss = loss_fn(y, logits)
        model.zero_grad()
        loss.backward()
        gradients = [weight.value.grad for weight in model.trainable_weights]
        with torch.no_grad():  # the update is not differentiated
            optimizer.apply(gradients, model.trainable_weights)
            train_metric.update_state(y, logits)
        return loss

    losses, seconds, accuracy, val_accuracy = [], [], [], []
    for epoch in range(int(start["epochs"])):
        train_metric.reset_state()
        for x, y in train:
            started = time.perf_counter()
            losses.append(train_step(x, y).item())
            seconds.append(time.perf_counter() - started)
        accuracy.append(float(train_metric.result()))

        val_metric.reset_state()
        with torch.no_grad():
            for x, y in val:
                val_metric.update_state(y, model(x, training=False))
        val_accuracy.append(float(val_metric.result()))
        print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}  val_accuracy {val_accuracy[-1]:.4f}")  # noqa: T201

    weights = {f"weight_{i}": weight.value.detach().numpy() for i, weight in enumerate(model.trainable_weights)}
    microseconds = 1e6 * np.median(seconds[-len(train) :])
    np.savez(
        folder / "torch.npz", loss=losses, accuracy=accuracy, val_accuracy=val_accuracy, microseconds=microseconds, **weights
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of start.npz")
    main(parser.parse_args().folder)
