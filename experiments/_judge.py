"""How good generated digits are: what a classifier of real digits makes of them, and how far they are from copies."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float, Int

import research
from experiments import _data, _plots

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images = Float[np.ndarray, "images 8 8"]  # from -1 to 1
Classifier = Callable[[Images], Float[np.ndarray, "images classes"]]


@functools.cache
def digit_classifier(seed: int = 0, batch_size: int = 32) -> Classifier:
    """Returns a classifier of real digits, trained on the training split of `seed`: images -> a probability of each class."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    hidden = [layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dropout(0.5)]
    learner = research.supervised(
        keras.Sequential([keras.Input((_data.SIDE, _data.SIDE)), *hidden, layers.Dense(_data.CLASSES)]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer="adam",
    )
    train = _data.digit_batches(batch_size=batch_size, seed=seed, signed=True)["train"]
    state, _ = research.train(learner, train, epochs=20)
    return lambda images: np.asarray(jax.nn.softmax(learner.predict(state, research.Batch(images))))


def judge_samples(samples: Images, train_images: Images, test_images: Images, classifier: Classifier) -> dict[str, float]:
    """Returns scores of generated digits.

    `confidence`: the classifier's mean probability of the class that it predicts; `confidence_on_test`: the same for the test
    images. `classes` and `smallest_share`: how many classes are predicted, and the share of the rarest. `novelty`: the median
    distance of a sample to its nearest training image, divided by that of the test images; copies of training images have 0.

    >>> digits = np.stack([np.full((8, 8), value) for value in np.linspace(-1, 1, 10)])
    >>> scores = judge_samples(digits, digits, digits[::-1] * 0.9, lambda images: np.eye(10)[np.arange(len(images))])
    >>> scores["confidence"], scores["classes"], scores["smallest_share"], scores["novelty"]
    (1.0, 10.0, 0.1, 0.0)
    """
    probabilities = classifier(samples)
    shares = np.bincount(probabilities.argmax(-1), minlength=_data.CLASSES) / len(samples)
    distances, test_distances = (nearest_images(images, train_images)[0] for images in (samples, test_images))
    return {
        "confidence": float(probabilities.max(-1).mean()),
        "confidence_on_test": float(classifier(test_images).max(-1).mean()),
        "classes": float(np.count_nonzero(shares)),
        "smallest_share": float(shares.min()),
        "novelty": float(np.median(distances) / np.median(test_distances)),
    }


def nearest_images(
    images: Float[np.ndarray, "images 8 8"], candidates: Float[np.ndarray, "candidates 8 8"]
) -> tuple[Float[np.ndarray, " images"], Int[np.ndarray, " images"]]:
    """Returns the Euclidean distance of each image to its nearest candidate, and the index of that candidate.

    >>> distances, indices = nearest_images(np.zeros((1, 8, 8)), np.stack([np.ones((8, 8)), np.full((8, 8), 0.5)]))
    >>> distances.tolist(), indices.tolist()
    ([4.0], [1])
    """
    a, b = images.reshape(len(images), -1), candidates.reshape(len(candidates), -1)
    distances = np.sqrt(np.maximum((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1), 0))
    return distances.min(1), distances.argmin(1)


def samples_figure(samples: Images, train_images: Images, test_images: Images, classifier: Classifier) -> "Figure":
    """Returns a figure of samples and test images with their predicted classes, and samples above their nearest training images.

    >>> blank = np.zeros((48, 8, 8))
    >>> figure = samples_figure(blank, blank, blank, lambda images: np.full((len(images), 10), 0.1))
    >>> len(figure.axes)
    128
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    for panel, images, name in zip(above.subfigures(1, 2), (samples, test_images), ("generated", "real (test)"), strict=True):
        predictions = classifier(images).argmax(-1)
        _plots.image_panel(panel.subplots(6, 8).flat, images, [str(digit) for digit in predictions])
        panel.suptitle(f"{name}, with the predicted class", fontsize=11)
    distances, nearest = nearest_images(samples, train_images)
    top, bottom = below.subplots(2, 16)
    _plots.image_panel(top, samples, [""] * len(samples))
    _plots.image_panel(bottom, train_images[nearest], [f"{distance:.1f}" for distance in distances])
    median = np.median(nearest_images(test_images, train_images)[0])
    below.suptitle(
        f"generated, above the nearest training image and its distance (median of test images: {median:.1f})", fontsize=11
    )
    return figure
