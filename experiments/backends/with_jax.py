"""The training loop of the Keras guides with this library on JAX: a pure step from a state and a batch to the next state.

    python experiments/backends/with_jax.py FOLDER    # `just backends` writes FOLDER/start.npz and runs this

Writes to FOLDER/jax.npz the arrays that `with_tensorflow.py` and `with_torch.py` write of the same training.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import research

import keras  # isort: skip  (research first: it chooses Keras' backend)


def main(folder: Path) -> None:
    """Trains with the initial weights and the data of FOLDER/start.npz."""
    start = np.load(folder / "start.npz")
    train = research.from_arrays(start["x"], start["y"], batch_size=64, shuffle=False)
    val = research.from_arrays(start["x_val"], start["y_val"], batch_size=64, shuffle=False)

    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((64,)), dense(64, "relu"), dense(64, "relu"), dense(10)])
    model.set_weights([start[f"weight_{i}"] for i in range(6)])
    optimizers = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}
    learner = research.supervised(
        model,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizers[str(start["optimizer"])](learning_rate=float(start["learning_rate"])),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: research.State, batch: research.Batch) -> tuple[research.State, dict[str, Any]]:
        # Logs are means since the last reset. The loss, unlike the accuracy, is reset here: it is the loss of this batch.
        initial_metrics = learner.reset(state).metrics
        return learner.train(state._replace(metrics={**state.metrics, "loss": initial_metrics["loss"]}), batch)

    eval_step = jax.jit(learner.evaluate)

    losses, seconds, accuracy, val_accuracy = [], [], [], []
    state = learner.init()
    for epoch in range(int(start["epochs"])):
        state = learner.reset(state)
        for step in range(epoch * train.steps_per_epoch, (epoch + 1) * train.steps_per_epoch):
            batch = train.batch(step)
            started = time.perf_counter()
            state, logs = train_step(state, batch)
            losses.append(float(logs["loss"]))  # waits for the device: the whole step is timed
            seconds.append(time.perf_counter() - started)
        accuracy.append(float(logs["accuracy"]))

        eval_state = learner.reset(state)
        for step in range(val.steps_per_epoch):
            eval_state, logs = eval_step(eval_state, val.batch(step))
        val_accuracy.append(float(logs["accuracy"]))
        print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}  val_accuracy {val_accuracy[-1]:.4f}")  # noqa: T201

    weights = {f"weight_{i}": np.asarray(weight) for i, weight in enumerate(state.trainable)}
    microseconds = 1e6 * np.median(seconds[-train.steps_per_epoch :])
    np.savez(folder / "jax.npz", loss=losses, accuracy=accuracy, val_accuracy=val_accuracy, microseconds=microseconds, **weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of start.npz")
    main(parser.parse_args().folder)
