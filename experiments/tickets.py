"""Sort support tickets: three inputs, two outputs, and a third output put on the trained network afterwards.

    just run tickets                                                       # 4,000 docstrings; half a minute on two cores
    just run tickets --head difficulty --trained runs/tickets/RUN          # a third output on what that run learned
    just run tickets --head difficulty --trained runs/tickets/RUN --no-frozen

A ticket is the docstring of a function from one of six packages that are installed anyway. The network reads its first line
(`title`), the prose after it (`body`) and which sections follow (`tags`), and says which package it came from (`department`)
and whether the function takes three arguments or more (`priority`). `difficulty` is a third of the functions by the length of
their code: quick, medium or difficult. The packages' own names are taken out of the text: they would give the answer away.

Expect test_department_accuracy >= 0.74 (majority 0.32) and test_priority_accuracy >= 0.73 (majority 0.55); of the third output,
test_difficulty_accuracy >= 0.42 frozen and >= 0.51 with --no-frozen (majority 0.35). What the two outputs asked for is of little
use to the third: on a frozen network that was never trained it gets 0.41 to 0.47.
"""

import ast
import functools
import gc
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

import research
from research.data import Batches, arrays, deferred

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPARTMENTS = ("jax", "keras", "numpy", "optax", "scipy", "sklearn")
DIFFICULTIES = ("quick", "medium", "difficult")
# Headings differ between packages and would tell them apart: what says the same is the same tag.
TAGS = {
    "parameters": ("Parameters", "Args", "Arguments"),
    "returns": ("Returns", "Yields"),
    "raises": ("Raises", "Warns"),
    "examples": ("Examples", "Example"),
    "notes": ("Notes", "Note"),
    "see also": ("See Also", "See also"),
    "references": ("References", "Reference"),
}
HEADING = re.compile(rf"^({'|'.join(h for same in TAGS.values() for h in same)})(?::|\s*\n-{{3,}})\s*$", re.MULTILINE)
# Tests, what others wrote, and code that is private to a package or costs much to read for few docstrings.
SKIPPED = re.compile(
    r"(^|/)(_?tests?|testing|internal_test_util|externals|_lib|backend|distutils|f2py|legacy|interpreters|cudnn|export|pallas|"
    r"mosaic|experimental|example_libraries)/|_test(_util)?\.py$"
)
NAMES = frozenset((*DEPARTMENTS, "np", "jnp", "lax", "scikit", "learn"))  # a package's own name is no word of its tickets
SIZES = {"train": 3000, "val": 400, "test": 600}
VOCABULARY = 4000
LENGTHS = {"title": 16, "body": 60}  # words
HEADS = {"tickets": ("priority", "department"), "difficulty": ("priority", "department", "difficulty")}


@dataclass(frozen=True)
class Config:
    """Everything that changes the numbers."""

    head: Literal["tickets", "difficulty"] = "tickets"
    """What is trained: the two outputs from nothing, or a third one on a network that was trained on the two."""
    trained: Path | None = None
    """For the third output: the directory of a finished run of the first two, made with the same versions of the six packages."""
    frozen: bool = True
    """For the third output: the trained network stays as it is."""
    units: int = 64
    """Of each LSTM, and numbers in a word's vector."""
    balanced: bool = True
    """Every department weighs the same in its loss, however many tickets it has. (Measured: no difference to speak of here.)"""
    learning_rate: float = 1e-3
    """Of Adam."""
    epochs: int = 6
    """Passes over the training tickets."""
    steps: int | None = None
    """Training steps, where they are to be fewer than the epochs' own."""
    batch_size: int = 32
    """Examples in a step."""
    seed: int = 0
    """Of weights and shuffling. The split is always the same: nothing may be tested on what an earlier run was trained on."""


def network(config: Config) -> keras.Model:
    """The network: numbered words and tags in, a logit for the priority and one for each department out."""
    if config.head == "difficulty":
        return with_difficulty(trained(config), config.frozen)
    layers = keras.layers
    inputs = {name: keras.Input((length,), dtype="int32", name=name) for name, length in LENGTHS.items()}
    inputs["tags"] = keras.Input((len(TAGS),), name="tags")
    read = []
    for name in LENGTHS:
        embedded = layers.Embedding(VOCABULARY, config.units, mask_zero=True, name=f"{name}_words")(inputs[name])
        read.append(layers.LSTM(config.units, name=f"{name}_features")(embedded))
    features = layers.concatenate([*read, inputs["tags"]], name="features")
    outputs = {
        "priority": layers.Dense(1, name="priority")(features),
        "department": layers.Dense(len(DEPARTMENTS), name="department")(features),
    }
    return keras.Model(inputs, outputs)


def with_difficulty(model: keras.Model, frozen: bool) -> keras.Model:
    """A trained network with a logit for each difficulty as a third output, from what its outputs have in common."""
    model.trainable = not frozen  # before an optimizer is built for what is trainable
    difficulty = keras.layers.Dense(len(DIFFICULTIES), name="difficulty")(model.get_layer("features").output)
    return keras.Model(model.input, {**model.output, "difficulty": difficulty})


def trained(config: Config) -> keras.Model:
    """The network that the run in `config.trained` left. Raises `Refused` where there is none."""
    wanted = "expected the directory of a finished run of `just run tickets`"
    if config.trained is None:
        raise research.Refused(f"--head difficulty: --trained is missing, {wanted}: train one first and name its directory.")
    run = Path(config.trained)  # text where the config was read back from a record
    try:
        record = json.loads((run / "config.json").read_text())
        found = record["experiment"], record["config"].get("head")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise research.Refused(f"--trained {run}: it is no run's directory, {wanted}: see what is in runs/tickets/.") from error
    if found != ("tickets", "tickets"):
        told = " --head ".join(str(part) for part in found if part)
        raise research.Refused(f"--trained {run}: it is a run of {told}, {wanted}: name another directory.")
    if not (run / "model.keras").is_file():
        raise research.Refused(f"--trained {run}: it holds no model.keras, {wanted}: finish it with `just resume {run}`.")
    try:
        return keras.saving.load_model(run / "model.keras", compile=False)
    except Exception as error:  # Keras lets through whatever zip, JSON and HDF5 raise
        raise research.Refused(
            f"--trained {run}: its model.keras can't be read: write it anew with `just export {run}`."
        ) from error


def build(config: Config) -> research.Learner:
    """A loss, a weight and a metric for each output by its name; Adam."""
    if config.head == "tickets" and config.trained is not None:
        raise research.Refused(
            f"--trained {config.trained}: only --head difficulty goes on from a run: add it, or leave this out."
        )
    keras.utils.set_random_seed(config.seed)
    one_of_several = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses = {
        "priority": keras.losses.BinaryCrossentropy(from_logits=True),
        "department": one_of_several,
        "difficulty": one_of_several,
    }
    # "accuracy" would ask whether a logit, not a probability, is above a half.
    yes_or_no = keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)
    metrics = {"priority": [yes_or_no], "department": ["accuracy"], "difficulty": ["accuracy"]}
    weights = {"priority": 0.5, "department": 1.0, "difficulty": 1.0}
    heads = HEADS[config.head]
    return research.supervised(
        network(config),
        loss={head: losses[head] for head in heads},
        loss_weights={head: weights[head] for head in heads},
        metrics={head: metrics[head] for head in heads},
        optimizer=keras.optimizers.Adam(config.learning_rate),
        example=data(config)["train"].shapes,
    )


def data(config: Config) -> dict[str, Batches]:
    """Batches of `train`, `val` and `test`; training has weights for each output where departments are to be balanced."""
    load = functools.cache(lambda: examples(config))

    def split(name: str, count: int) -> Batches:
        size = config.batch_size if name == "train" else count

        def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *shape), dtype)

        x = {**{part: rows(np.int32, length) for part, length in LENGTHS.items()}, "tags": rows(np.float32, len(TAGS))}
        y = {head: rows(np.int32, *[1] * (head == "priority")) for head in HEADS[config.head]}
        weights = {head: rows(np.float32) for head in y} if config.balanced and name == "train" else None
        return deferred(
            lambda: arrays(*load()[name], batch_size=size, seed=config.seed, shuffle=name == "train", name=f"tickets ({name})"),
            research.Batch(x, y, weights),
            count,
        )

    return {name: split(name, count) for name, count in SIZES.items()}


class Ticket(NamedTuple):
    """A function's docstring in parts, and what its code tells of it."""

    department: str
    title: str
    body: str
    tags: frozenset[str]
    arguments: int
    lines: int


@functools.cache
def tickets() -> dict[str, list[Ticket]]:
    """The tickets of each split, always the same ones where the same packages are installed."""
    found: dict[tuple[str, str], Ticket] = {}
    collecting = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles, and the search for some would take longer than parsing
    try:
        for department in DEPARTMENTS:
            for function in _functions(Path(importlib.util.find_spec(department).origin).parent):
                ticket = _ticket(department, function)
                if len(words(ticket.title)) >= 3:
                    found.setdefault((ticket.title, ticket.body), ticket)  # a copy might be trained on and tested
    finally:
        if collecting:
            gc.enable()
    drawn = np.random.default_rng(0).permutation(len(found))
    if len(drawn) < sum(SIZES.values()):
        raise research.Refused(
            f"tickets: the installed {', '.join(DEPARTMENTS)} have {len(drawn)} docstrings, expected {sum(SIZES.values())} "
            "at least: install the pinned versions."
        )
    shuffled = iter([list(found.values())[i] for i in drawn])
    return {name: [next(shuffled) for _ in range(count)] for name, count in SIZES.items()}


def _functions(root: Path) -> Iterator[ast.FunctionDef]:
    """The public functions of a package. Its files are parsed, not imported, which is quicker and starts nothing."""
    for path in sorted(root.rglob("*.py")):
        text = "" if SKIPPED.search(path.relative_to(root).as_posix()) else path.read_text("utf-8")
        if re.search(r"^def (?!_)", text, re.MULTILINE):
            nodes = ast.parse(text).body
            yield from (node for node in nodes if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"))


def _ticket(department: str, node: ast.FunctionDef) -> Ticket:
    text = ast.get_docstring(node) or ""
    headings = list(HEADING.finditer(text))
    prose = text[: headings[0].start()] if headings else text
    title, _, body = prose.partition("\n\n")
    said = {heading[1] for heading in headings}
    takes = node.args
    arguments = len([*takes.posonlyargs, *takes.args, *takes.kwonlyargs])
    # The docstring's own length would be told by the text.
    lines = node.end_lineno - node.body[0].end_lineno
    tags = frozenset(tag for tag, same in TAGS.items() if said & set(same))
    return Ticket(department, " ".join(title.split()), " ".join(body.split()), tags, arguments, lines)


def words(text: str) -> list[str]:
    """The words of a text in small letters, without the packages' names."""
    return [word for word in re.findall("[a-z]+", text.lower()) if word not in NAMES]


def vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """The most frequent words, numbered from 2 on: 0 is padding, 1 a word that is not among them."""
    counts = Counter(word for text in texts for word in words(text))
    return {word: i for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 2), start=2)}


def numbered(texts: Iterable[str], numbers: Mapping[str, int], length: int) -> np.ndarray:
    """The first words of every text by their numbers: int32 [texts, length]."""
    cut = [[numbers.get(word, 1) for word in words(text)[:length]] for text in texts]
    return np.array([row + [0] * (length - len(row)) for row in cut], np.int32)


def examples(config: Config) -> dict[str, tuple[Any, ...]]:
    """Inputs, targets and, where training is to be balanced, weights of each split; all that is learned, of training alone."""
    train = tickets()["train"]
    numbers = vocabulary(text for ticket in train for text in (ticket.title, ticket.body))
    thirds = np.quantile([ticket.lines for ticket in train], [1 / 3, 2 / 3])
    shares = Counter(ticket.department for ticket in train)

    def split(name: str) -> tuple[Any, ...]:
        held = tickets()[name]
        x = {part: numbered([getattr(t, part) for t in held], numbers, length) for part, length in LENGTHS.items()}
        x["tags"] = np.array([[tag in t.tags for tag in TAGS] for t in held], np.float32)
        y = {
            "priority": np.array([[t.arguments >= 3] for t in held], np.int32),
            "department": np.array([DEPARTMENTS.index(t.department) for t in held], np.int32),
            "difficulty": np.digitize([t.lines for t in held], thirds).astype(np.int32),
        }
        y = {head: y[head] for head in HEADS[config.head]}
        if name != "train" or not config.balanced:
            return x, y
        # Keras takes class weights for a single output only: with several, they are weights of examples.
        weights = {head: np.ones(len(held), np.float32) for head in y}
        weights["department"] = np.array([len(train) / len(shares) / shares[t.department] for t in held], np.float32)
        return x, y, weights

    return {name: split(name) for name in SIZES}


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """The network with the weights that a state holds."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """What the network makes of the test tickets: each class against each, and what it is surest of, right and wrong."""
    from matplotlib.figure import Figure

    head, names = ("department", DEPARTMENTS) if config.head == "tickets" else ("difficulty", DIFFICULTIES)
    logits = {name: np.asarray(each, np.float32) for name, each in research.predict(learner, splits["test"], state).items()}
    labels = splits["test"].batch(0).y[head]  # all of them in one batch, in order
    chances = np.asarray(jax.nn.softmax(logits[head]))
    answers = chances.argmax(-1)
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, answers), 1)

    figure = Figure(figsize=(15, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    shares = counts / counts.sum(1, keepdims=True)
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        left.text(column, row, counts[row, column], ha="center", va="center", color="w" if shares[row, column] > 0.5 else "k")
    left.set(xticks=range(len(names)), xticklabels=names, yticks=range(len(names)), yticklabels=names)
    left.set(xlabel=f"{head} it says", ylabel=head)
    left.set_title(f"{np.mean(answers == labels):.3f} of {len(labels)} right, majority {counts.sum(1).max() / len(labels):.3f}")

    right.axis("off")
    surest = []
    for label in range(len(names)):
        for hit in (True, False):
            found = np.flatnonzero((labels == label) & ((answers == labels) == hit))
            surest += list(found[np.argsort(-chances[found, answers[found]], kind="stable")][: 6 // len(names)])
    high = np.asarray(jax.nn.sigmoid(logits["priority"][:, 0]))
    right.set(xlim=(0, 1), ylim=(len(surest), -1.5))
    columns = (0, 0.54, 0.66, 0.81, 0.94)
    heading = ("what it is surest of, right and wrong", head, "it says", "arguments", "P(3+)")
    for x, text in zip(columns, heading, strict=True):
        right.text(x, -1, text, weight="bold")
    for y, row in enumerate(surest):
        ticket, answer = tickets()["test"][row], answers[row]
        title = ticket.title if len(ticket.title) <= 60 else f"{ticket.title[:57]}..."
        said = f"{names[answer]}  {chances[row, answer]:.3f}"
        told = (title.replace("$", r"\$"), names[labels[row]], said, ticket.arguments, f"{high[row]:.2f}")
        for x, text in zip(columns, told, strict=True):
            colour = "k" if x != columns[2] else "#228833" if answer == labels[row] else "#cc3311"
            right.text(x, y, text, color=colour, fontsize=9.5)
    return {head: figure}
