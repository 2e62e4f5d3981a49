"""Vectors for TensorBoard's projector, which turns them about in three dimensions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.state import Refused

SPRITE = 8192  # pixels: TensorBoard takes no wider image


def embedding(directory: Path, name: str, vectors: Any, labels: Sequence[Any], images: Any = None) -> None:
    """Writes vectors, [examples, size], for TensorBoard's projector, in place of those of the same name.

    `labels` are shown beside the points; so are `images`, [examples, height, width] or [..., channels], scaled from their least
    to their largest value. Raises `Refused` where these are not of one length, or too many.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> embedding(directory, "words", np.eye(3), ["one", "two", "three"])
    >>> print((directory / "projector_config.pbtxt").read_text())
    embeddings { tensor_name: "words" tensor_path: "words/vectors.tsv" metadata_path: "words/labels.tsv" }
    """
    vectors = np.asarray(vectors, np.float32)
    lengths = {"vectors": len(vectors), "labels": len(labels), **({} if images is None else {"images": len(images)})}
    if vectors.ndim != 2 or len(set(lengths.values())) > 1:
        raise Refused(
            f"embedding {name!r}: vectors {list(vectors.shape)}, {lengths}; expected [examples, size] and as many of all."
        )
    (directory / name).mkdir(parents=True, exist_ok=True)
    np.savetxt(directory / name / "vectors.tsv", vectors, "%.6g", "\t")
    told = "".join(f"{' '.join(str(label).split())}\n" for label in labels)
    (directory / name / "labels.tsv").write_text(told)
    line = f'tensor_name: "{name}" tensor_path: "{name}/vectors.tsv" metadata_path: "{name}/labels.tsv"'
    if images is not None:
        height, width = _sprite(directory / name / "images.png", name, np.asarray(images, np.float32))
        line += f' sprite {{ image_path: "{name}/images.png" single_image_dim: {width} single_image_dim: {height} }}'
    config = directory / "projector_config.pbtxt"
    before = config.read_text().splitlines() if config.exists() else []
    others = [each for each in before if f'tensor_name: "{name}"' not in each]
    config.write_text("\n".join([*others, f"embeddings {{ {line} }}"]))


def _sprite(path: Path, name: str, images: np.ndarray) -> tuple[int, int]:
    """Writes images side by side, as many in a row as there are rows; returns the height and width of one."""
    from matplotlib.image import imsave

    n, height, width = images.shape[:3]
    across = math.ceil(math.sqrt(n))
    if across * max(height, width) > SPRITE:
        raise Refused(
            f"embedding {name!r}: {n} images of {height} x {width} are too many; choose {(SPRITE // max(height, width)) ** 2}."
        )
    sheet = np.zeros((across * height, across * width, *images.shape[3:]), np.float32)
    for i, image in enumerate(images):
        row, column = divmod(i, across)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    sheet = (sheet - images.min()) / max(float(np.ptp(images)), 1e-12)
    imsave(path, np.clip(sheet.squeeze(), 0, 1), cmap="gray", vmin=0, vmax=1)
    return height, width
