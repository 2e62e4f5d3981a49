"""Text that every machine has, Python's own standard library: how language models here read it and generate more of it.

There are two domains, `source` and `encodings`, the tables of characters that the source leaves out. Whole files are held out.
Which ones depends only on their paths, so it is the same for every model and seed.
"""

import functools
import hashlib
import math
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import research
from research.data import Batches, num_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Tests, tables and documentation differ from the other files; installed packages differ between machines.
SKIPPED = re.compile(
    r"(^|/)(tests?|idlelib|turtledemo|tkinter|encodings|pydoc_data|site-packages|dist-packages)/|^(lib2to3|sitecustomize|config-)"
)
FILES_PER_HELD_OUT = 16
Domain = Literal["source", "encodings"]
HELD_OUT_BYTES: dict[Domain, int] = {"source": 1 << 17, "encodings": 1 << 15}  # of the held-out files that are evaluated on
PASSAGES: dict[Domain, bytes] = {"source": b"\n    def ", "encodings": b"\ndecoding_table"}  # how a passage to continue begins
END_OF_FILE = b"\0"
TEMPERATURE = 0.8  # of the text in figures
Continuation = Callable[[Array, Array, int], Array]  # (prompt [batch, tokens], key, length) -> tokens [batch, length]


@functools.cache
def load_files(domain: Domain = "source") -> dict[str, dict[str, bytes]]:
    """Returns the files of a domain in `train` and `val` by path, in the order of their paths.

    Raises `InvalidArgument` if Python's standard library is not installed as source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, dict[str, bytes]] = {"train": {}, "val": {}}
    contents = set()
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if name.startswith("encodings/") if domain == "encodings" else SKIPPED.search(name) is None:
            content = (root / name).read_bytes()
            path_hash = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
            if content and content not in contents:  # no copy is in both splits
                files["train" if path_hash % FILES_PER_HELD_OUT else "val"][name] = content
                contents.add(content)
    size = sum(map(len, files["val"].values()))
    if size < HELD_OUT_BYTES[domain]:
        raise research.InvalidArgument(
            f"text: {root} has {len(contents)} files of Python's own {domain}, of which {size:,} bytes would be held out; "
            f"expected at least {HELD_OUT_BYTES[domain]:,}: use a Python whose standard library is installed as .py files."
        )
    return files


@functools.cache
def load_texts(domain: Domain = "source") -> dict[str, Int[np.ndarray, " bytes"]]:
    """Returns the concatenated files of each split: uint8 [bytes]."""
    texts = {split: b"".join(content + END_OF_FILE for content in files.values()) for split, files in load_files(domain).items()}
    return {split: np.frombuffer(text, np.uint8) for split, text in texts.items()}


def window_batches(context: int, count: int, batch_size: int, seed: int, domain: Domain = "source") -> dict[str, Batches]:
    """Returns batches of windows of `context` bytes, `count` in an epoch: `train` and `val`.

    `x` and `y` are int32 [batch, context]; `y`, the next byte of each, is `x` shifted by one. Windows of `train` start at random
    positions that depend on seed and step, those of `val` at fixed positions, evenly spaced over its text.
    """

    def split(name: str, count: int, size: int) -> Batches:
        steps_per_epoch = num_batches(count, size)

        def part(step: int, start: int, stop: int) -> research.Batch:
            text = load_texts(domain)[name]
            last = len(text) - context - 1
            if name == "train":
                starts = np.random.Generator(np.random.Philox(key=[seed, step])).integers(0, last + 1, size)
            else:
                first = step % steps_per_epoch * size
                starts = np.linspace(0, last, count).astype(np.int64)[first : first + size]
            windows = text[starts[start:stop, None] + np.arange(context + 1)].astype(np.int32)
            return research.Batch(windows[:, :-1], windows[:, 1:])

        tokens = jax.ShapeDtypeStruct((size, context), np.int32)
        return Batches(lambda step: part(step, 0, size), research.Batch(tokens, tokens), steps_per_epoch, count, part=part)

    val_count = max(1, HELD_OUT_BYTES[domain] // context)
    train_count = num_batches(count, batch_size) * batch_size  # every batch is full
    return {
        "train": split("train", train_count, batch_size),
        "val": split("val", val_count, min(batch_size, val_count)),
    }


def bits_per_byte(learner: research.Learner, state: research.State, val: Batches) -> float:
    """Returns the loss on held-out windows in bits: the size of each byte when compressed with the network's predictions."""
    return research.evaluate(learner, val, state)["loss"] / math.log(2)


def held_out_passage(length: int, domain: Domain = "source") -> Int[np.ndarray, " {length}"]:
    """Returns so many tokens of held-out text, from the start of a method or of a table on."""
    text = load_texts(domain)["val"].tobytes()
    start = text.find(PASSAGES[domain], len(text) // 2) + 1
    return np.frombuffer(text[start : start + length], np.uint8).astype(np.int32)


def sample_tokens(
    decode: Callable[[Any, Array, Array], tuple[Any, Array]],
    cache: Any,
    prompt: Int[Array, "batch prompt"],
    key: Array,
    length: int,
    temperature: float | Float[Array, ""],
) -> Int[Array, "batch {length}"]:
    """Returns `length` tokens after a prompt, sampled one by one from any network with a cache.

    `decode(cache, tokens, position)` takes tokens [batch, new], the first of them at `position`. It returns the cache with these
    tokens added, and the logits of the token after the last, [batch, vocabulary]. Temperature 0 takes the most likely token.
    """

    def step(carry: tuple[Any, Array, Array], key: Array) -> tuple[tuple[Any, Array, Array], Array]:
        cache, logits, position = carry
        sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, sampled, jnp.argmax(logits, -1)).astype(jnp.int32)
        cache, logits = decode(cache, token[:, None], position)
        return (cache, logits, position + 1), token

    cache, logits = decode(cache, prompt, jnp.int32(0))
    _, tokens = jax.lax.scan(step, (cache, logits, jnp.int32(prompt.shape[1])), jax.random.split(key, length))
    return tokens.T


def continue_texts(continuation: Continuation, prompts: np.ndarray, context: int, length: int) -> np.ndarray:
    """Returns prompts [texts, tokens] with `length` generated tokens behind each; the result is always the same.

    Prompts are shorter than a context. When the context is full, the last tokens, as many as in a prompt, become the next prompt.
    """
    prompt_length, texts = prompts.shape[1], prompts
    for key in jax.random.split(jax.random.key(0), -(-length // (context - prompt_length))):
        tokens = continuation(jnp.asarray(texts[:, -prompt_length:], jnp.int32), key, context - prompt_length)
        texts = np.concatenate([texts, np.asarray(tokens)], axis=1)
    return texts[:, : prompt_length + length]


def continuation_figure(continuation: Continuation, context: int, length: int = 800) -> "Figure":
    """Returns a figure of a held-out passage beside two generated texts with the same beginning, half a context long."""
    prompt_length = context // 2
    passage = held_out_passage(prompt_length + length)
    first, second = continue_texts(continuation, np.stack([passage[:prompt_length]] * 2), context, length)
    return text_figure({"held out": passage, "generated": first, "generated again": second}, prompt_length)


def wrap_bytes(tokens: np.ndarray, columns: int = 80) -> str:
    r"""Returns bytes as lines of at most `columns` characters; unprintable bytes become dots.

    >>> wrap_bytes(np.frombuffer(b"def f(x):\n\treturn x", np.uint8), columns=8)
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


def text_figure(texts: dict[str, np.ndarray], prompt_length: int) -> "Figure":
    """Returns a figure of texts side by side, the prompt of each in grey."""
    from matplotlib.figure import Figure

    wrapped = {title: (wrap_bytes(tokens[:prompt_length]), wrap_bytes(tokens)) for title, tokens in texts.items()}
    height = 0.7 + 0.15 * max(text.count("\n") + 1 for _, text in wrapped.values())
    figure = Figure(figsize=(6.2 * len(wrapped), height))
    for i, (title, (prompt, text)) in enumerate(wrapped.items()):
        left = (i + 0.03) / len(wrapped)
        figure.text(left, 1 - 0.15 / height, title, fontsize=11, va="top")
        # Two texts in one place: the second is blank where the first is grey.
        generated = re.sub(r"[^\n]", " ", prompt) + text[len(prompt) :]
        for layer, colour in ((prompt, "0.55"), (generated, "k")):
            style = {"family": "monospace", "fontsize": 8.5, "va": "top", "color": colour, "parse_math": False}
            figure.text(left, 1 - 0.5 / height, layer, **style)
    return figure
