"""Time series of the UCR archive with its own training and test data, from the files that the package aeon contains."""

import importlib.util
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

import research
from experiments import _data
from research.data import Batches

Name = Literal["GunPoint", "ItalyPowerDemand", "ArrowHead"]
Labelled = tuple[Float[np.ndarray, "series length"], Int[np.ndarray, " series"]]


class DataSet(NamedTuple):
    """What the files of a data set hold: training series of each label, test series, and values in a series."""

    train: dict[str, int]
    test: int
    length: int


DATA_SETS: dict[str, DataSet] = {
    "GunPoint": DataSet({"1": 24, "2": 26}, 150, 150),
    "ItalyPowerDemand": DataSet({"1": 34, "2": 33}, 1029, 24),
    "ArrowHead": DataSet({"0": 12, "1": 12, "2": 12}, 175, 251),
}


def parse_ts(text: str) -> Labelled:
    r"""Returns the series in the text of a .ts file, float32, and their classes, int32: places of the labels in sorted order.

    Each line after `@data` is a series: its values, separated by commas, and after a colon its label.

    >>> x, y = parse_ts("# two series\n@classLabel true a b\n@data\n1.5,2,-5E-1:b\n0,0,1:a\n")
    >>> x.tolist(), y.tolist()
    ([[1.5, 2.0, -0.5], [0.0, 0.0, 1.0]], [1, 0])
    """
    values, labels = zip(*(line.split(":") for line in text.partition("@data")[2].split()), strict=True)
    return np.array([row.split(",") for row in values], np.float32), np.unique(labels, return_inverse=True)[1].astype(np.int32)


def read_series(name: str) -> dict[str, Labelled]:
    """Returns the series and the classes of both files of a data set, `train` and `test`.

    Each series has mean 0 and, with one degree of freedom less than values, standard deviation 1: the files are so.
    Reads the files where the package aeon is installed: importing it takes seconds, and packages that are not needed here.
    """
    package = importlib.util.find_spec("aeon")
    roots = [] if package is None else list(package.submodule_search_locations or ())
    for folder in (Path(root, "datasets", "data", name) for root in roots):
        if folder.is_dir():
            return {split: parse_ts((folder / f"{name}_{split.upper()}.ts").read_text()) for split in ("train", "test")}
    raise ModuleNotFoundError(f"no aeon, whose files have the series {name}: pip install --no-deps aeon")


def hold_out(labels: Int[np.ndarray, " series"], held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to train on, and `held_out` random rows of each class, both in ascending order.

    >>> train, val = hold_out(np.array([0, 0, 0, 1, 1, 1]), 1, seed=0)
    >>> sorted([*train.tolist(), *val.tolist()]), (val // 3).tolist()
    ([0, 1, 2, 3, 4, 5], [0, 1])
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    val = np.sort(np.concatenate([order[labels[order] == label][:held_out] for label in np.unique(labels)]))
    return np.setdiff1d(np.arange(len(labels)), val), val


def series_batches(name: Name, *, held_out: int, batch_size: int, seed: int) -> dict[str, Batches]:
    """Returns batches of `train`, `val` and `test`: series `x` float32 [batch, length], classes `y` int32 [batch].

    `test` is the archive's. `val` has `held_out` training series of each class, selected by `seed`, and `train` the others;
    with `held_out` 0 both are all training series. The files are read when the first batch is needed.

    >>> splits = series_batches("GunPoint", held_out=5, batch_size=4, seed=0)
    >>> {split: (data.examples, data.shapes.x.shape) for split, data in splits.items()}
    {'train': (40, (4, 150)), 'val': (10, (10, 150)), 'test': (150, (150, 150))}
    """
    data_set = DATA_SETS[name]

    def load() -> dict[str, Labelled]:
        files = read_series(name)
        x, y = files["train"]
        train, val = hold_out(y, held_out, seed)
        return {"train": (x[train], y[train]), "val": (x[val], y[val]) if held_out else (x, y), "test": files["test"]}

    total, held = sum(data_set.train.values()), held_out * len(data_set.train)
    example = research.Batch(jax.ShapeDtypeStruct((data_set.length,), np.float32), jax.ShapeDtypeStruct((), np.int32))
    return _data.lazy_splits(
        load,
        {"train": total - held, "val": held or total, "test": data_set.test},
        lambda _: example,
        batch_size=batch_size,
        seed=seed,
        classes=len(data_set.train),
        name=name,
    )
