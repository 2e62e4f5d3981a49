"""Vectors for TensorBoard's Embedding Projector, which shows them in three dimensions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.core.state import InvalidArgument

MAX_SPRITE_SIZE = 8192  # pixels: TensorBoard accepts no larger image


def write_embedding(directory: Path, name: str, vectors: Any, labels: Sequence[Any], images: Any = None) -> None:
    """Writes vectors, [examples, size], for TensorBoard's Embedding Projector. Replaces those of the same name.

    `labels` are the text of each point, `images`, [examples, height, width] or [..., channels], its picture, scaled from their
    minimum to their maximum. Raises `InvalidArgument` if the lengths differ, or the images do not fit into one sprite of 8192 x
    8192 pixels.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> write_embedding(directory, "words", np.eye(3), ["one", "two", "three"])
    >>> print((directory / "projector_config.pbtxt").read_text())
    embeddings { tensor_name: "words" tensor_path: "words/vectors.tsv" metadata_path: "words/labels.tsv" }
    """
    vectors = np.asarray(vectors, np.float32)
    lengths = {"vectors": len(vectors), "labels": len(labels), **({} if images is None else {"images": len(images)})}
    if vectors.ndim != 2 or len(set(lengths.values())) > 1:
        raise InvalidArgument(
            f"embedding {name!r}: vectors {list(vectors.shape)}, {lengths}; expected vectors [examples, size] and equal lengths."
        )
    (directory / name).mkdir(parents=True, exist_ok=True)
    np.savetxt(directory / name / "vectors.tsv", vectors, "%.6g", "\t")
    lines = "".join(f"{' '.join(str(label).split())}\n" for label in labels)
    (directory / name / "labels.tsv").write_text(lines)
    entry = f'tensor_name: "{name}" tensor_path: "{name}/vectors.tsv" metadata_path: "{name}/labels.tsv"'
    if images is not None:
        height, width = _write_sprite(directory / name / "images.png", name, np.asarray(images, np.float32))
        entry += f' sprite {{ image_path: "{name}/images.png" single_image_dim: {width} single_image_dim: {height} }}'
    config = directory / "projector_config.pbtxt"
    previous = config.read_text().splitlines() if config.exists() else []
    others = [line for line in previous if f'tensor_name: "{name}"' not in line]
    config.write_text("\n".join([*others, f"embeddings {{ {entry} }}"]))


def _write_sprite(path: Path, name: str, images: np.ndarray) -> tuple[int, int]:
    """Writes images as a square grid; returns the height and width of one image."""
    from matplotlib.image import imsave

    n, height, width = images.shape[:3]
    columns = math.ceil(math.sqrt(n))
    if columns * max(height, width) > MAX_SPRITE_SIZE:
        most = (MAX_SPRITE_SIZE // max(height, width)) ** 2
        raise InvalidArgument(f"embedding {name!r}: {n} images of {height} x {width} are too many; pass at most {most}.")
    sprite = np.zeros((columns * height, columns * width, *images.shape[3:]), np.float32)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sprite[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    sprite = (sprite - images.min()) / max(float(np.ptp(images)), 1e-12)
    imsave(path, np.clip(sprite.squeeze(), 0, 1), cmap="gray", vmin=0, vmax=1)
    return height, width
