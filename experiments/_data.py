"""Data sets: lazily loaded splits, scikit-learn's handwritten digits, and MNIST-1D, which is generated."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

import research
from research.data import Batches, from_arrays, lazy

NUM_DIGITS = {"train": 1437, "val": 180, "test": 180}  # images per split
SIDE = 8  # height and width of an image
CLASSES = 10
MAX_PIXEL = 16


def lazy_splits(
    load: Callable[[], Mapping[str, tuple[Any, ...]]],
    sizes: Mapping[str, int],
    example: Callable[[str], research.Batch],
    *,
    batch_size: int,
    eval_batch_size: int = 500,
    seed: int = 0,
    classes: int | None = None,
    name: str = "data",
) -> dict[str, Batches]:
    """Returns the batches of each split, whose shapes and lengths are known before `load` is called.

    `load()` returns the arguments of `from_arrays` for each split: `(x, y)` or `(x, y, sample_weight)`. It is called once, when
    the first batch of any split is needed. `sizes` are the numbers of examples, `example(split)` is one example of a split as
    `jax.ShapeDtypeStruct`s. Only `train` is shuffled, by `seed`, and cut into `batch_size`; other splits are read in order,
    `eval_batch_size` examples at a time. Error messages call a split `"NAME (SPLIT)"`.

    >>> one = research.Batch(jax.ShapeDtypeStruct((3,), np.float32))
    >>> splits = lazy_splits(lambda: {"val": (np.ones((7, 3), np.float32),)}, {"val": 7}, lambda split: one, batch_size=2)
    >>> splits["val"].shapes.x.shape, splits["val"].batch(0).x.shape
    ((7, 3), (7, 3))
    """
    load_once = functools.cache(load)

    def batches(split: str, examples: int) -> Batches:
        size = batch_size if split == "train" else min(examples, eval_batch_size)

        def from_loaded() -> Batches:
            return from_arrays(
                *load_once()[split],
                batch_size=size,
                seed=seed,
                shuffle=split == "train",
                classes=classes,
                name=f"{name} ({split})",
            )

        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), example(split))
        return lazy(from_loaded, shapes, examples)

    return {split: batches(split, examples) for split, examples in sizes.items()}


def read_digits() -> tuple[UInt8[np.ndarray, "1797 8 8"], Int[np.ndarray, " 1797"]]:
    """Returns scikit-learn's handwritten digits: images with pixels of 0 to 16, and their int32 labels.

    Reads the file of `sklearn.datasets.load_digits`: that module is slow to import, and a run needs nothing else of it.

    >>> images, labels = read_digits()
    >>> images.max(), labels[:5].tolist()
    (np.uint8(16), [0, 1, 2, 3, 4])
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("no scikit-learn, which has the digits: pip install scikit-learn")
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.uint8)
    return rows[:, :-1].reshape(-1, SIDE, SIDE), rows[:, -1].astype(np.int32)


def load_digits(seed: int) -> dict[str, tuple[UInt8[np.ndarray, "examples 8 8"], Int[np.ndarray, " examples"]]]:
    """Returns images and labels of each split of scikit-learn's 1,797 handwritten digits.

    Pixels are 0 to 16, labels int32. `seed` decides which images are held out.

    >>> {split: images.shape for split, (images, _) in load_digits(seed=0).items()}
    {'train': (1437, 8, 8), 'val': (180, 8, 8), 'test': (180, 8, 8)}
    """
    all_images, all_labels = read_digits()
    order = np.random.default_rng(seed).permutation(len(all_images))
    images, labels = all_images[order], all_labels[order]
    starts = np.cumsum(list(NUM_DIGITS.values()))[:-1]
    return dict(zip(NUM_DIGITS, zip(np.split(images, starts), np.split(labels, starts), strict=True), strict=True))


def digit_batches(*, batch_size: int, seed: int, signed: bool = False) -> dict[str, Batches]:
    """Returns batches of the handwritten digits: `x` [batch, 8, 8] and labels `y` int32 [batch], for `train`, `val` and `test`.

    Pixels are uint8 from 0 to 16, or with `signed` float32 from -1 to 1. `seed` decides the split and the order of `train`.

    >>> digits = digit_batches(batch_size=32, seed=0, signed=True)
    >>> digits["train"].steps_per_epoch, digits["test"].shapes.x
    (45, ShapeDtypeStruct(shape=(180, 8, 8), dtype=float32))
    """

    def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
        splits = load_digits(seed)
        return {split: (to_signed(x), y) for split, (x, y) in splits.items()} if signed else splits

    image = jax.ShapeDtypeStruct((SIDE, SIDE), np.float32 if signed else np.uint8)
    example = research.Batch(image, jax.ShapeDtypeStruct((), np.int32))
    return lazy_splits(load, NUM_DIGITS, lambda _: example, batch_size=batch_size, seed=seed, classes=CLASSES, name="digits")


def load_mnist1d(examples: int = 5000, seed: int = 42) -> tuple[Float[np.ndarray, "examples 40"], Int[np.ndarray, " examples"]]:
    """Returns MNIST-1D (Greydanus and Kobak, arXiv:2011.14439), signals float32 and their digits int32, in random order.

    A template of each digit is padded, scaled, translated, sheared and blurred with noise, by the recipe of the authors' package
    `mnist1d`, whose data these are: its default is 5,000 examples of seed 42, of which the first 4,000 are for training.

    >>> x, y = load_mnist1d(100)
    >>> x.shape, x.dtype, np.bincount(y).tolist()
    ((100, 40), dtype('float32'), [10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    """
    from scipy.ndimage import gaussian_filter  # slow to import

    rng = np.random.RandomState(seed)  # the generator behind `np.random.seed`, which the package uses
    templates = np.asarray(MNIST1D_TEMPLATES, float)
    templates = (templates - templates.mean(1, keepdims=True)) / templates.std(1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6

    def resample(signal: np.ndarray, length: int) -> np.ndarray:
        return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(signal)), signal)

    def example(template: np.ndarray) -> np.ndarray:
        padded = np.concatenate([template + 1e-8, np.zeros(36 + int(rng.rand() * 25))])
        scaled = resample(padded, 72) * (1 + 0.4 * (rng.rand() - 0.5))
        signal = np.roll(scaled, rng.choice(48))
        background = gaussian_filter(0.25 * rng.randn(72), 2)
        noisy = np.where(signal != 0, signal, background) + 0.02 * rng.randn(72)
        return resample(noisy - 0.75 * (rng.rand() - 0.5) * np.linspace(-0.5, 0.5, 72), 40)

    y = np.repeat(np.arange(10, dtype=np.int32), examples // 10)
    x = np.stack([example(templates[label]) for label in y])
    order = rng.permutation(len(y))
    return ((x - x.mean()) / x.std()).astype(np.float32)[order], y[order]


MNIST1D_TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)  # of the ten digits, from top to bottom


def to_signed(images: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Returns pixels from 0 to 16 as float32 from -1 to 1.

    >>> to_signed(np.array([0, 8, 16], np.uint8)).tolist()
    [-1.0, 0.0, 1.0]
    """
    return (images / (MAX_PIXEL / 2) - 1).astype(np.float32)


def all_examples(split: Batches) -> Any:
    """Returns every example of a split as one batch, in the order of its first epoch.

    >>> all_examples(digit_batches(batch_size=32, seed=0)["train"]).x.shape
    (1437, 8, 8)
    """
    batches = [split.batch(step) for step in range(split.steps_per_epoch)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
