"""Text that every machine has, Python's own standard library, and the writing of more of it: what language models here share.

Whole files are held out. Their paths alone decide which: they are the same for every model and seed.
"""

import functools
import hashlib
import math
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import research
from research.data import Batches, steps_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Tests, tables and documentation are little like the rest, what others wrote is another thing on every machine.
SKIPPED = re.compile(
    r"(^|/)(tests?|idlelib|turtledemo|tkinter|encodings|pydoc_data|site-packages|dist-packages)/|^(lib2to3|sitecustomize|config-)"
)
ONE_HELD_OUT_IN = 16  # files
HELD_OUT_BYTES = 1 << 17  # of them are evaluated on
END = b"\0"  # of a file
TEMPERATURE = 0.8  # of the text in pictures


@functools.cache
def files() -> dict[str, dict[str, bytes]]:
    """The sources of each split by their paths, in order; which one is held out, its path alone decides."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, dict[str, bytes]] = {"train": {}, "val": {}}
    seen = set()
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if SKIPPED.search(name) is None:
            content = (root / name).read_bytes()
            drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
            if content and content not in seen:  # a copy might be trained on and held out
                found["train" if drawn % ONE_HELD_OUT_IN else "val"][name] = content
                seen.add(content)
    size = sum(map(len, found["val"].values()))
    if size < HELD_OUT_BYTES:
        raise research.Refused(
            f"text: {root} holds {len(seen)} files of Python's own source, of which {size:,} bytes would be held out; expected "
            f"{HELD_OUT_BYTES:,} at least: use a Python whose standard library lies there as .py files."
        )
    return found


@functools.cache
def texts() -> dict[str, Int[np.ndarray, " bytes"]]:
    """The bytes of each split, the files one after the other: uint8."""
    return {name: np.frombuffer(b"".join(each + END for each in held.values()), np.uint8) for name, held in files().items()}


def windows(context: int, count: int, batch_size: int, seed: int) -> dict[str, Batches]:
    """Windows of `context` bytes, `count` in an epoch: `train` and `val`.

    Those of `train` lie at random places, drawn by seed and step, those of `val` at places that stay, evenly over its text. Each
    byte is to be told from those before it in its window: `y` is `x` one further.
    """

    def split(name: str, count: int, size: int) -> Batches:
        epoch = steps_in(count, size)

        def part(step: int, start: int, stop: int) -> research.Batch:
            text = texts()[name]
            last = len(text) - context - 1
            if name == "train":
                starts = np.random.Generator(np.random.Philox(key=[seed, step])).integers(0, last + 1, size)
            else:
                first = step % epoch * size
                starts = np.linspace(0, last, count).astype(np.int64)[first : first + size]
            cut = text[starts[start:stop, None] + np.arange(context + 1)].astype(np.int32)
            return research.Batch(cut[:, :-1], cut[:, 1:])

        rows = jax.ShapeDtypeStruct((size, context), np.int32)
        return Batches(lambda step: part(step, 0, size), research.Batch(rows, rows), epoch, count, part=part)

    held_out = max(1, HELD_OUT_BYTES // context)
    drawn = steps_in(count, batch_size) * batch_size  # every batch is whole
    return {
        "train": split("train", drawn, batch_size),
        "val": split("val", held_out, min(batch_size, held_out)),
    }


def bits_per_byte(learner: research.Learner, state: research.State, held_out: Batches) -> float:
    """The loss on held-out windows in bits: what a byte of them would take, compressed by what the network knows."""
    return research.evaluate(learner, held_out, state)["loss"] / math.log(2)


def passage(given: int, length: int) -> np.ndarray:
    """Held-out text from the beginning of a method on: so many bytes, and `length` after them, as tokens."""
    text = texts()["val"].tobytes()
    begin = text.find(b"\n    def ", len(text) // 2) + 1
    return np.frombuffer(text[begin : begin + given + length], np.uint8).astype(np.int32)


def one_by_one(
    extend: Callable[[Any, Array, Array], tuple[Any, Array]],
    cache: Any,
    prompt: Int[Array, "batch given"],
    key: Array,
    length: int,
    temperature: float | Float[Array, ""],
) -> Int[Array, "batch {length}"]:
    """So many tokens after a prompt, drawn one after the other from any network.

    `extend` takes a cache, tokens and where the first of them stands; it gives the cache with these in it, and the logits of what
    follows the last, [batch, vocabulary].
    """

    def one(carry: tuple[Any, Array, Array], key: Array) -> tuple[tuple[Any, Array, Array], Array]:
        cache, logits, position = carry
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)
        cache, logits = extend(cache, token[:, None], position)
        return (cache, logits, position + 1), token

    cache, logits = extend(cache, prompt, jnp.int32(0))
    _, tokens = jax.lax.scan(one, (cache, logits, jnp.int32(prompt.shape[1])), jax.random.split(key, length))
    return tokens.T


def written(go_on: Callable[[Array, Array, int], Array], prompt: np.ndarray, context: int, length: int) -> np.ndarray:
    """Texts, [texts, tokens], and `length` tokens after each, the same every time: `go_on(prompt, key, length)` writes some.

    When a context is full, which the prompt has to leave room in, it goes on from as much of its end as the prompt was.
    """
    given, text = prompt.shape[1], prompt
    for key in jax.random.split(jax.random.key(0), -(-length // (context - given))):
        new = go_on(jnp.asarray(text[:, -given:], jnp.int32), key, context - given)
        text = np.concatenate([text, np.asarray(new)], axis=1)
    return text[:, : given + length]


def compared(go_on: Callable[[Array, Array, int], Array], context: int, length: int = 800) -> "Figure":
    """A held-out passage beside two texts that are written after its beginning, which is half a context."""
    given = context // 2
    real = passage(given, length)
    first, second = written(go_on, np.stack([real[:given]] * 2), context, length)
    return pages({"held out": real, "written": first, "written again": second}, given)


def shown(tokens: np.ndarray, columns: int = 80) -> str:
    r"""Bytes as text of lines no longer than that; what can't be shown is a dot.

    >>> shown(np.frombuffer(b"def f(x):\n\treturn x", np.uint8), columns=8)
    'def f(x)\n:\n    retu\nrn x'
    """
    lines = [""]
    for token in tokens:
        if token == ord("\n"):
            lines.append("")
            continue
        text = "    " if token == ord("\t") else chr(token) if 32 <= token < 127 else "·"
        if len(lines[-1]) + len(text) > columns:
            lines.append("")
        lines[-1] += text
    return "\n".join(lines)


def pages(texts: dict[str, np.ndarray], given: int) -> "Figure":
    """Texts side by side, the given beginning of each in grey."""
    from matplotlib.figure import Figure

    told = {title: (shown(text[:given]), shown(text)) for title, text in texts.items()}
    height = 0.7 + 0.15 * max(page.count("\n") + 1 for _, page in told.values())
    figure = Figure(figsize=(6.2 * len(told), height))
    for i, (title, (beginning, page)) in enumerate(told.items()):
        left = (i + 0.03) / len(told)
        figure.text(left, 1 - 0.15 / height, title, fontsize=11, va="top")
        # Drawn over one another: what is grey in the one is blank in the other.
        rest = re.sub(r"[^\n]", " ", beginning) + page[len(beginning) :]
        for text, colour in ((beginning, "0.55"), (rest, "k")):
            style = {"family": "monospace", "fontsize": 8.5, "va": "top", "color": colour, "parse_math": False}
            figure.text(left, 1 - 0.5 / height, text, **style)
    return figure
