"""Square grey images with labels: scikit-learn's digits, and what Keras provides, MNIST and Fashion-MNIST."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import keras
import numpy as np

import research
from experiments import _data
from research.data import Batches

CLASSES = 10

Name = Literal["sklearn", "mnist", "fashion_mnist"]


class DataSet(NamedTuple):
    """Square grey images, with the numbers of examples in each split."""

    sizes: dict[str, int]
    side: int
    max_pixel: int


LARGE = DataSet({"train": 55000, "val": 5000, "test": 10000}, 28, 255)
DATA_SETS: dict[str, DataSet] = {
    "sklearn": DataSet(_data.NUM_DIGITS, _data.SIDE, _data.MAX_PIXEL),
    "mnist": LARGE,
    "fashion_mnist": LARGE,
}


def image_batches(name: Name, *, batch_size: int, seed: int) -> dict[str, Batches]:
    """Returns batches of `train`, `val` and `test`: `x` uint8 [batch, side, side], labels `y` int32 [batch].

    `seed` decides the order of `train` and which images are held out, unless the data has a test set. What Keras provides is read
    from its cache, or downloaded, when the first batch is needed.

    >>> {split: len(data.shapes.x.shape) for split, data in image_batches("sklearn", batch_size=32, seed=0).items()}
    {'train': 3, 'val': 3, 'test': 3}
    """
    data_set = DATA_SETS[name]
    image = jax.ShapeDtypeStruct((data_set.side, data_set.side), np.uint8)
    example = research.Batch(image, jax.ShapeDtypeStruct((), np.int32))
    load: dict[str, Callable[[], Any]] = {"sklearn": lambda: _data.load_digits(seed)}
    return _data.lazy_splits(
        load.get(name, lambda: load_from_keras(name, seed)),
        data_set.sizes,
        lambda _: example,
        batch_size=batch_size,
        seed=seed,
        classes=CLASSES,
        name=name,
    )


def load_from_keras(name: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns images and labels of each split of a data set that Keras provides, from its cache or the network."""
    try:
        train_and_val, test = getattr(keras.datasets, name).load_data()
    except Exception as error:  # Keras raises a bare Exception if a download fails
        cache = Path(os.environ.get("KERAS_HOME", "~/.keras"), "datasets")
        fashion = f"the four idx3/idx1-ubyte.gz files into {cache}/fashion-mnist/"
        files = f"{cache}/mnist.npz" if name == "mnist" else fashion
        raise research.InvalidArgument(
            f"--data {name}: not in Keras' cache, and the download failed; put {files}, set KERAS_HOME to a folder whose "
            "datasets/ has it, or use --data sklearn, which needs no download."
        ) from error
    x, y = train_and_val
    order = np.random.default_rng(seed).permutation(len(x))
    train, val = np.split(order, [DATA_SETS[name].sizes["train"]])
    splits = {"train": (x[train], y[train]), "val": (x[val], y[val]), "test": test}
    return {split: (images.astype(np.uint8), labels.astype(np.int32)) for split, (images, labels) in splits.items()}
