"""What is trained in the benchmark: data, sizes and, in words, the network and the step, the same for every system.

All are float32. Weights are Glorot uniform, biases zero, unless said otherwise. Every optimizer is Adam with a rate of 1e-3,
beta_1 0.9, beta_2 0.999 and epsilon 1e-7, unless said otherwise. An epoch goes over all examples once, in a new random order.
Logs are means over the epoch, kept on the device and read at its end.

digits-mlp-32   64 - 32 relu - 10. Softmax cross-entropy of the logits. Logs: loss, accuracy.
mlp-32, -256    784 - 512 relu - 10, otherwise the same.
convnet-64      28x28x1: convolution 3x3 to 32 relu (no padding), max-pooling 2x2, convolution 3x3 to 64 relu, max-pooling 2x2,
                dropout 0.5 on the flat features, 10. Loss and logs as before.
gan-64          A generator 16 - 512 - 512 - 64 (leaky relu 0.2 within, tanh at the end) and a discriminator 64 - 512 - 256 - 1
                (leaky relu 0.2, then dropout 0.3, after both hidden layers; a logit). A step: normal latents, 64 generated images
                before 64 real ones with targets 1 and 0, to which uniform noise from 0 to 0.05 is added; binary cross-entropy, an
                Adam step (beta_1 0.5) of the discriminator; then new latents, targets 0, binary cross-entropy through the new
                discriminator (dropout on), an Adam step (beta_1 0.5) of the generator; then average += 0.005 * (weight - average)
                for each of its weights. Logs: d_loss, g_loss.
tickets-128     Two sequences of word numbers below 4000, 16 and 60 long, and 7 numbers. Each sequence goes through an embedding
                of width 64 and an LSTM of 64 units; 0 is padding, always at the end, and the LSTM's features are those after the
                last word. Features and the 7 numbers together: a logit (priority) and 6 logits (department). The loss is half the
                binary cross-entropy plus the softmax cross-entropy. Logs: loss, priority_accuracy, department_accuracy. (The
                LSTM's kernel is Glorot uniform, its recurrent kernel orthogonal, its forget bias 1; embeddings are uniform from
                -0.05 to 0.05.)
gpt-16          Bytes, 128 long, and the next byte of each. Embeddings of bytes and positions (normal, 0.02), added; 4 blocks of
                x + attention(norm(x)), x + 128(gelu(512(norm(x)))); a norm; 256 logits with a matrix of its own. Width 128, 4
                heads of 32, causal, layer norms with epsilon 1e-5, gelu by its tanh approximation, biases everywhere, no dropout.
                Adam 3e-4. Softmax cross-entropy over all positions. Logs: loss.
stream          32x32x3 bytes in a file that is mapped, never held as a whole. Each example of each epoch anew: padded by 4 zeros
                on all sides and cut to 32x32 at a random place, mirrored left to right half the time, divided by 255, all on the
                host; then 3072 - 512 relu - 10. Loss and logs as for digits.
"""

import functools
import inspect
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RATE = 1e-3  # of Adam
GPT_RATE = 3e-4
GAN_RATE = 1e-3


class Workload(NamedTuple):
    """How much of it there is."""

    batch_size: int
    examples: int

    @property
    def steps(self) -> int:
        """Steps in an epoch: batches are always whole."""
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
    """A workload's data by name: `x` and `y` for most; the network can learn something from all of them.

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
        made = _classes(rng, n, (32, 32, 3))
        return {"x": (255 * made["x"]).astype(np.uint8), "y": made["y"]}
    if name == "gpt-16":
        text = np.frombuffer(inspect.getsource(os).encode(), np.uint8)[: n * 128 + 1].astype(np.int32)
        return {"x": text[:-1].reshape(n, 128), "y": text[1:].reshape(n, 128)}
    words = {part: _sentences(rng, n, length) for part, length in (("title", 16), ("body", 60))}
    tags = rng.integers(0, 2, (n, 7)).astype(np.float32)
    priority = (tags.sum(1, keepdims=True) > 3).astype(np.int32)
    return {**words, "tags": tags, "priority": priority, "department": (words["title"][:, 0] % 6).astype(np.int32)}


def write(name: str, directory: Path) -> None:
    """Writes a workload's arrays into a directory, as NAME.npy each."""
    for part, array in arrays(name).items():
        np.save(directory / f"{part}.npy", array)


def read(name: str, directory: Path) -> dict[str, Any]:
    """What `write` wrote; the file of a stream is mapped."""
    mapped = "r" if name == "stream" else None
    return {path.stem: np.load(path, mmap_mode=mapped if path.stem == "x" else None) for path in sorted(directory.glob("*.npy"))}


@functools.lru_cache(maxsize=2)
def order(examples: int, epoch: int) -> np.ndarray:
    """An epoch's own order of so many examples."""
    return np.random.default_rng(epoch).permutation(examples)


def augmented(images: np.ndarray, seed: int) -> np.ndarray:
    """Images of a stream as rows of numbers from 0 to 1, each cut from within a margin of zeros and maybe mirrored."""
    rng, count = np.random.default_rng(seed), len(images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    (top, left), mirrored = rng.integers(0, 9, (2, count)), rng.integers(0, 2, count)
    rows = np.empty((count, 32, 32, 3), np.float32)
    for i in range(count):
        cut = padded[i, top[i] : top[i] + 32, left[i] : left[i] + 32]
        np.divide(cut[:, ::-1] if mirrored[i] else cut, 255, out=rows[i], dtype=np.float32)
    return rows.reshape(count, -1)


def _classes(rng: np.random.Generator, n: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Noisy pictures of ten patterns, from 0 to 1, and which pattern it is."""
    patterns = rng.uniform(size=(10, *shape)).astype(np.float32)
    y = rng.integers(0, 10, n).astype(np.int32)
    return {"x": 0.3 * patterns[y] + 0.7 * rng.uniform(size=(n, *shape)).astype(np.float32), "y": y}


def _sentences(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Word numbers from 1 on, at least one in a row, then zeros."""
    words = rng.integers(1, 4000, (n, length)).astype(np.int32)
    return words * (np.arange(length) < rng.integers(1, length + 1, (n, 1)))
