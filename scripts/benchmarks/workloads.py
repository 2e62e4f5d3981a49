"""The workloads of the benchmark: their data, sizes and, in words, the network and the step, the same for every system.

Everything is float32. Unless stated otherwise, kernels are Glorot uniform, biases are zero, and the optimizer is Adam with a
learning rate of 1e-3, beta_1 0.9, beta_2 0.999 and epsilon 1e-7. An epoch visits all examples once, in a new random order. Logs
are means over the epoch; they stay on the device and are read at the epoch's end.

digits-mlp-32   64 - 32 relu - 10. Softmax cross-entropy of the logits. Logs: loss, accuracy.
mlp-32, -256    784 - 512 relu - 10, otherwise the same.
convnet-64      28x28x1: convolution 3x3 to 32 relu (no padding), max-pooling 2x2, convolution 3x3 to 64 relu, max-pooling 2x2,
                dropout 0.5 on the flattened features, 10. Loss and logs as before.
gan-64          A generator 16 - 512 - 512 - 64 (leaky relu 0.2 between layers, tanh at the end) and a discriminator
                64 - 512 - 256 - 1 (leaky relu 0.2, then dropout 0.3, after both hidden layers; a logit). One step: draw normal
                latents; concatenate 64 generated images (target 1) and 64 real ones (target 0); add uniform noise from 0 to 0.05
                to the targets; update the discriminator by binary cross-entropy and Adam (beta_1 0.5). Then draw new latents and
                update the generator by the binary cross-entropy of the updated discriminator (dropout on) with targets 0 and
                Adam (beta_1 0.5). Then average += 0.005 * (weight - average) for each of the generator's weights. Logs: both
                losses.
tickets-128     Two sequences of word ids below 4000, of length 16 and 60, and 7 numbers. Each sequence goes through an
                embedding of width 64 and an LSTM of 64 units; 0 is padding, always at the end, and the features are the LSTM's
                output at the last word. Both features and the 7 numbers are concatenated: a logit (priority) and 6 logits
                (department). The loss is half the binary cross-entropy plus the softmax cross-entropy. Logs: loss,
                priority_accuracy, department_accuracy. The LSTM's kernel is Glorot uniform, its recurrent kernel orthogonal,
                its forget bias 1; embeddings are uniform from -0.05 to 0.05.
gpt-16          Sequences of 128 bytes, and the next byte of each position. Embeddings of bytes and positions (normal, 0.02) are
                added; 4 blocks of x + attention(norm(x)), x + 128(gelu(512(norm(x)))); a norm; 256 logits with a matrix that is
                not shared with the embedding. Width 128, 4 heads of 32, causal, layer norms with epsilon 1e-5, gelu by its tanh
                approximation, biases everywhere, no dropout. Adam 3e-4. Softmax cross-entropy over all positions. Logs: loss.
stream          Images of 32x32x3 bytes in a memory-mapped file, which is never read as a whole. Each example of each epoch is
                padded by 4 zeros on all sides, cropped to 32x32 at a random position, mirrored left to right with probability 0.5
                and divided by 255, all on the host; then 3072 - 512 relu - 10. Loss and logs as for digits.
"""

import functools
import inspect
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE = 1e-3
GPT_LEARNING_RATE = 3e-4
GAN_LEARNING_RATE = 1e-3


class Workload(NamedTuple):
    """The size of a workload."""

    batch_size: int
    examples: int

    @property
    def steps(self) -> int:
        """Returns the steps in an epoch; the batch size divides the number of examples."""
        return self.examples // self.batch_size


WORKLOADS = {
    "digits-mlp-32": Workload(32, 1408),
    "mlp-32": Workload(32, 16384),
    "mlp-256": Workload(256, 16384),
    "convnet-64": Workload(64, 1024),
    "gan-64": Workload(64, 1408),
    "tickets-128": Workload(128, 2048),
    "gpt-16": Workload(16, 64),
    "stream": Workload(128, 25600),
}
WIDTHS = {"digits-mlp-32": (64, 32, 10), "mlp-32": (784, 512, 10), "mlp-256": (784, 512, 10), "stream": (3072, 512, 10)}


def arrays(name: str) -> dict[str, np.ndarray]:
    """Returns a workload's arrays by name: `x` and `y` for most. All of them can be learned.

    >>> {name: (array.shape, str(array.dtype)) for name, array in arrays("digits-mlp-32").items()}
    {'x': ((1408, 64), 'float32'), 'y': ((1408,), 'int32')}
    """
    rng = np.random.default_rng(0)
    n = WORKLOADS[name].examples
    if name in ("digits-mlp-32", "mlp-32", "mlp-256"):
        return _classes(rng, n, WIDTHS[name][:1])
    if name == "convnet-64":
        return _classes(rng, n, (28, 28, 1))
    if name == "gan-64":
        return {"x": 2 * _classes(rng, n, (64,))["x"] - 1}
    if name == "stream":
        images = _classes(rng, n, (32, 32, 3))
        return {"x": (255 * images["x"]).astype(np.uint8), "y": images["y"]}
    if name == "gpt-16":
        text = np.frombuffer(inspect.getsource(os).encode(), np.uint8)[: n * 128 + 1].astype(np.int32)
        return {"x": text[:-1].reshape(n, 128), "y": text[1:].reshape(n, 128)}
    words = {part: _sentences(rng, n, length) for part, length in (("title", 16), ("body", 60))}
    tags = rng.integers(0, 2, (n, 7)).astype(np.float32)
    priority = (tags.sum(1, keepdims=True) > 3).astype(np.int32)
    return {**words, "tags": tags, "priority": priority, "department": (words["title"][:, 0] % 6).astype(np.int32)}


def write(name: str, directory: Path) -> None:
    """Writes each of a workload's arrays into a directory as NAME.npy."""
    for part, array in arrays(name).items():
        np.save(directory / f"{part}.npy", array)


def read(name: str, directory: Path) -> dict[str, Any]:
    """Returns the arrays that `write` wrote; `x` of `stream` is memory-mapped."""
    mode = "r" if name == "stream" else None
    return {path.stem: np.load(path, mmap_mode=mode if path.stem == "x" else None) for path in sorted(directory.glob("*.npy"))}


@functools.lru_cache(maxsize=2)
def order(examples: int, epoch: int) -> np.ndarray:
    """Returns the permutation of the examples that is used in an epoch."""
    return np.random.default_rng(epoch).permutation(examples)


def augment(images: np.ndarray, seed: int) -> np.ndarray:
    """Returns images as float32 rows from 0 to 1, each padded, cropped at random and mirrored with probability 0.5."""
    rng, count = np.random.default_rng(seed), len(images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    (top, left), mirror = rng.integers(0, 9, (2, count)), rng.integers(0, 2, count)
    rows = np.empty((count, 32, 32, 3), np.float32)
    for i in range(count):
        crop = padded[i, top[i] : top[i] + 32, left[i] : left[i] + 32]
        np.divide(crop[:, ::-1] if mirror[i] else crop, 255, out=rows[i], dtype=np.float32)
    return rows.reshape(count, -1)


def _classes(rng: np.random.Generator, n: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns noisy images of ten patterns, from 0 to 1, and the number of the pattern."""
    patterns = rng.uniform(size=(10, *shape)).astype(np.float32)
    y = rng.integers(0, 10, n).astype(np.int32)
    return {"x": 0.3 * patterns[y] + 0.7 * rng.uniform(size=(n, *shape)).astype(np.float32), "y": y}


def _sentences(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Returns rows of word ids: at least one id above 0, then zeros as padding."""
    words = rng.integers(1, 4000, (n, length)).astype(np.int32)
    return words * (np.arange(length) < rng.integers(1, length + 1, (n, 1)))
