"""Sort support tickets: three inputs, two outputs, and a third output added to the trained network afterwards.

    just run tickets                                                       # 4,000 docstrings; half a minute on two cores
    just run tickets --head difficulty --trained runs/tickets/RUN          # a third output on the network of that run
    just run tickets --head difficulty --trained runs/tickets/RUN --no-frozen

A ticket is the docstring of a function from one of six packages that are installed anyway. The inputs are its first line
(`title`), the prose after it (`body`) and which sections follow (`tags`); the outputs are the package that it comes from
(`department`) and whether the function takes three arguments or more (`priority`). `difficulty` is the third of the functions
by the length of their code: quick, medium or difficult. Package names are removed from the text: they would reveal the
department.

Expect test_department_accuracy >= 0.74 (majority 0.32) and test_priority_accuracy >= 0.73 (majority 0.55); of the third output,
test_difficulty_accuracy >= 0.42 frozen and >= 0.51 with --no-frozen (majority 0.35). Features learned for the two outputs are of
little use to the third: on a frozen network with random weights it gets 0.41 to 0.47.
"""

import ast
import functools
import gc
import importlib.util
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

import research
from experiments import _data, _plots
from experiments._config import Count, CountOrZero, Positive, Seed, TrainingOptions
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEPARTMENTS = ("jax", "keras", "numpy", "optax", "scipy", "sklearn")
DIFFICULTIES = ("quick", "medium", "difficult")
# Packages use different headings, which would reveal the department: equivalent headings are the same tag.
TAGS = {
    "parameters": ("Parameters", "Args", "Arguments"),
    "returns": ("Returns", "Yields"),
    "raises": ("Raises", "Warns"),
    "examples": ("Examples", "Example"),
    "notes": ("Notes", "Note"),
    "see also": ("See Also", "See also"),
    "references": ("References", "Reference"),
}
HEADING = re.compile(rf"^({'|'.join(h for headings in TAGS.values() for h in headings)})(?::|\s*\n-{{3,}})\s*$", re.MULTILINE)
# Tests, vendored code, and private code that takes long to parse and has few docstrings.
SKIPPED = re.compile(
    r"(^|/)(_?tests?|testing|internal_test_util|externals|_lib|backend|distutils|f2py|legacy|interpreters|cudnn|export|pallas|"
    r"mosaic|experimental|example_libraries)/|_test(_util)?\.py$"
)
NAMES = frozenset((*DEPARTMENTS, "np", "jnp", "lax", "scikit", "learn"))  # removed from the text
SIZES = {"train": 3000, "val": 400, "test": 600}
VOCABULARY = 4000
LENGTHS = {"title": 16, "body": 60}  # words
HEADS = {"tickets": ("priority", "department"), "difficulty": ("priority", "department", "difficulty")}


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """All options that change the numbers."""

    head: Literal["tickets", "difficulty"] = "tickets"
    """What is trained: a new network with two outputs, or a third output on a network trained on the two."""
    trained: Path | None = None
    """For the third output: the directory of a finished run of the first two, made with the same versions of the six packages."""
    frozen: bool = True
    """For the third output: whether the weights of the trained network stay as they are."""
    units: Count = 64
    """Units of each LSTM, and the size of word embeddings."""
    balanced: bool = True
    """Whether all departments have the same weight in the loss, however many tickets they have. (Measured: little difference.)"""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam."""
    remat: bool = False
    """Whether the backward pass computes the gates of the LSTMs again: a sixth of the memory traffic on a TPU."""
    epochs: CountOrZero = 6
    seed: Seed = 0
    """Seed of initial weights and the order of training. The split is always the same: a run never tests on tickets that the run
    in `trained` was trained on."""


def network(config: Config) -> keras.Model:
    """Returns the network: word ids and tags to a logit of the priority and one of each department."""
    if config.head == "difficulty":
        return with_difficulty(load_trained(config), config.frozen)
    layers = keras.layers
    inputs = {name: keras.Input((length,), dtype="int32", name=name) for name, length in LENGTHS.items()}
    inputs["tags"] = keras.Input((len(TAGS),), name="tags")
    texts = []
    for name in LENGTHS:
        embedded = layers.Embedding(VOCABULARY, config.units, mask_zero=True, name=f"{name}_words")(inputs[name])
        texts.append(ending_masks(layers.LSTM(config.units, name=f"{name}_features"))(embedded))
    features = layers.concatenate([*texts, inputs["tags"]], name="features")
    outputs = {
        "priority": layers.Dense(1, name="priority")(features),
        "department": layers.Dense(len(DEPARTMENTS), name="department")(features),
    }
    return keras.Model(inputs, outputs)


def ending_masks(layer: keras.layers.LSTM) -> keras.layers.LSTM:
    """Returns the layer, which uses the mask of the padding and has none to pass on, as it returns one vector per text.

    Keras 3.16 warns where a layer that does not support masks gets one, and counts each LSTM among them, though it uses the mask.
    """
    layer.supports_masking = True
    return layer


def with_difficulty(model: keras.Model, frozen: bool) -> keras.Model:
    """Returns a trained network with a logit of each difficulty as a third output, computed from the same features."""
    model.trainable = not frozen  # before the optimizer is built, which has slots for trainable weights
    difficulty = keras.layers.Dense(len(DIFFICULTIES), name="difficulty")(model.get_layer("features").output)
    return keras.Model(model.input, {**model.output, "difficulty": difficulty})


def load_trained(config: Config) -> keras.Model:
    """Returns the network of the run in `config.trained`. Raises `InvalidArgument` if there is none."""
    expected = "expected the directory of a finished run of `just run tickets`"
    if config.trained is None:
        raise research.InvalidArgument(
            f"--head difficulty: --trained is missing, {expected}: train one first and pass its directory."
        )
    run = Path(config.trained)  # a string if the config was read from JSON
    try:
        record = json.loads((run / "config.json").read_text())
        trained = record["experiment"], record["config"].get("head")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise research.InvalidArgument(f"--trained {run}: not the directory of a run, {expected}: see runs/tickets/.") from error
    if trained != ("tickets", "tickets"):
        name = " --head ".join(str(part) for part in trained if part)
        raise research.InvalidArgument(f"--trained {run}: a run of {name}, {expected}: pass another directory.")
    if not (run / "model.keras").is_file():
        raise research.InvalidArgument(f"--trained {run}: it has no model.keras, {expected}: finish it with `just resume {run}`.")
    try:
        with warnings.catch_warnings():  # loading calls the layers
            warnings.filterwarnings("ignore", ".*does not support masking", UserWarning)
            model = keras.saving.load_model(run / "model.keras", compile=False)
        for name in LENGTHS:
            ending_masks(model.get_layer(f"{name}_features"))
        return model
    except Exception as error:  # Keras passes on the exceptions of zip, JSON and HDF5
        raise research.InvalidArgument(
            f"--trained {run}: its model.keras can't be read: write it again with `just export {run}`."
        ) from error


def build(config: Config) -> research.Learner:
    """A loss, a weight and a metric for each output by its name; Adam."""
    if config.head == "tickets" and config.trained is not None:
        raise research.InvalidArgument(
            f"--trained {config.trained}: only --head difficulty starts from a run: add it, or leave --trained out."
        )
    keras.utils.set_random_seed(config.seed)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses = {
        "priority": keras.losses.BinaryCrossentropy(from_logits=True),
        "department": crossentropy,
        "difficulty": crossentropy,
    }
    # "accuracy" would compare the logit with 0.5, the threshold of a probability.
    binary_accuracy = keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)
    metrics = {"priority": [binary_accuracy], "department": ["accuracy"], "difficulty": ["accuracy"]}
    weights = {"priority": 0.5, "department": 1.0, "difficulty": 1.0}
    heads = HEADS[config.head]
    return research.supervised(
        network(config),
        loss={head: losses[head] for head in heads},
        loss_weights={head: weights[head] for head in heads},
        metrics={head: metrics[head] for head in heads},
        optimizer=keras.optimizers.Adam(config.learning_rate),
        objective_transform=research.transforms.remat_loops if config.remat else lambda objective: objective,
    )


def data(config: Config) -> dict[str, Batches]:
    """Batches of `train`, `val` and `test`; if departments are balanced, training has sample weights for each output."""

    def example(split: str) -> research.Batch:
        x = {part: jax.ShapeDtypeStruct((length,), np.int32) for part, length in LENGTHS.items()}
        x["tags"] = jax.ShapeDtypeStruct((len(TAGS),), np.float32)
        y = {head: jax.ShapeDtypeStruct((1,) if head == "priority" else (), np.int32) for head in HEADS[config.head]}
        weighted = config.balanced and split == "train"
        return research.Batch(x, y, {head: jax.ShapeDtypeStruct((), np.float32) for head in y} if weighted else None)

    return _data.lazy_splits(
        lambda: load_examples(config),
        SIZES,
        example,
        batch_size=config.batch_size,
        eval_batch_size=max(SIZES["val"], SIZES["test"]),
        seed=config.seed,
        name="tickets",
    )


class Ticket(NamedTuple):
    """The parts of a function's docstring, and two measures of its code."""

    department: str
    title: str
    body: str
    tags: frozenset[str]
    arguments: int
    lines: int


@functools.cache
def load_tickets() -> dict[str, list[Ticket]]:
    """Returns the tickets of each split, which depend only on the versions of the six packages."""
    tickets: dict[tuple[str, str], Ticket] = {}
    gc_was_enabled = gc.isenabled()
    gc.disable()  # syntax trees have no cycles, and searching them for some would take longer than parsing
    try:
        for department in DEPARTMENTS:
            for function in _public_functions(Path(importlib.util.find_spec(department).origin).parent):
                ticket = _ticket(department, function)
                if len(words(ticket.title)) >= 3:
                    tickets.setdefault((ticket.title, ticket.body), ticket)  # no copy is in both training and test data
    finally:
        if gc_was_enabled:
            gc.enable()
    order = np.random.default_rng(0).permutation(len(tickets))
    if len(order) < sum(SIZES.values()):
        raise research.InvalidArgument(
            f"tickets: the installed {', '.join(DEPARTMENTS)} have {len(order)} docstrings, expected at least "
            f"{sum(SIZES.values())}: install the pinned versions."
        )
    unshuffled = list(tickets.values())
    shuffled = iter([unshuffled[i] for i in order])
    return {split: [next(shuffled) for _ in range(size)] for split, size in SIZES.items()}


def _public_functions(root: Path) -> Iterator[ast.FunctionDef]:
    """Yields the public functions of a package. Files are parsed, not imported: it is faster and has no side effects."""
    for path in sorted(root.rglob("*.py")):
        text = "" if SKIPPED.search(path.relative_to(root).as_posix()) else path.read_text("utf-8")
        if re.search(r"^def (?!_)", text, re.MULTILINE):
            nodes = ast.parse(text).body
            yield from (node for node in nodes if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"))


def _ticket(department: str, function: ast.FunctionDef) -> Ticket:
    text = ast.get_docstring(function) or ""
    matches = list(HEADING.finditer(text))
    prose = text[: matches[0].start()] if matches else text
    title, _, body = prose.partition("\n\n")
    headings = {match[1] for match in matches}
    signature = function.args
    arguments = len([*signature.posonlyargs, *signature.args, *signature.kwonlyargs])
    # Without the docstring, whose length is visible in the text.
    lines = function.end_lineno - function.body[0].end_lineno
    tags = frozenset(tag for tag, equivalent in TAGS.items() if headings & set(equivalent))
    return Ticket(department, " ".join(title.split()), " ".join(body.split()), tags, arguments, lines)


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without the packages' names."""
    return [word for word in re.findall("[a-z]+", text.lower()) if word not in NAMES]


def vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """Returns ids of the most frequent words, from 2 on: 0 is padding, 1 any other word."""
    counts = Counter(word for text in texts for word in words(text))
    return {word: i for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 2), start=2)}


def word_ids(texts: Iterable[str], ids: Mapping[str, int], length: int) -> np.ndarray:
    """Returns the ids of the first words of every text, padded with 0: int32 [texts, length]."""
    rows = [[ids.get(word, 1) for word in words(text)[:length]] for text in texts]
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


def load_examples(config: Config) -> dict[str, tuple[Any, ...]]:
    """Returns inputs, targets and, if training is balanced, weights of each split.

    Vocabulary, thirds and weights are computed from the training split alone.
    """
    train = load_tickets()["train"]
    ids = vocabulary(text for ticket in train for text in (ticket.title, ticket.body))
    thirds = np.quantile([ticket.lines for ticket in train], [1 / 3, 2 / 3])
    counts = Counter(ticket.department for ticket in train)

    def arrays(split: str) -> tuple[Any, ...]:
        tickets = load_tickets()[split]
        x = {part: word_ids([getattr(t, part) for t in tickets], ids, length) for part, length in LENGTHS.items()}
        x["tags"] = np.array([[tag in t.tags for tag in TAGS] for t in tickets], np.float32)
        y = {
            "priority": np.array([[t.arguments >= 3] for t in tickets], np.int32),
            "department": np.array([DEPARTMENTS.index(t.department) for t in tickets], np.int32),
            "difficulty": np.digitize([t.lines for t in tickets], thirds).astype(np.int32),
        }
        y = {head: y[head] for head in HEADS[config.head]}
        if split != "train" or not config.balanced:
            return x, y
        # Keras accepts class weights for a single output only: with several, they are sample weights.
        weights = {head: np.ones(len(tickets), np.float32) for head in y}
        weights["department"] = np.array([len(train) / len(counts) / counts[t.department] for t in tickets], np.float32)
        return x, y, weights

    return {split: arrays(split) for split in SIZES}


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns the network with the weights of a state."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws predictions for the test tickets: the confusion matrix, and the most confident ones, correct and wrong."""
    from matplotlib.figure import Figure

    head, names = ("department", DEPARTMENTS) if config.head == "tickets" else ("difficulty", DIFFICULTIES)
    outputs = research.predict(learner, splits["test"], state)
    logits = {name: np.asarray(output, np.float32) for name, output in outputs.items()}
    labels = _data.all_examples(splits["test"]).y[head]
    probabilities = np.asarray(jax.nn.softmax(logits[head]))
    predictions = probabilities.argmax(-1)

    figure = Figure(figsize=(15, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    _plots.confusion_matrix(left, labels, predictions, names, fontsize=10)
    left.set(xlabel=f"predicted {head}", ylabel=head)
    majority = np.bincount(labels).max() / len(labels)
    left.set_title(f"{np.mean(predictions == labels):.3f} of {len(labels)} correct, majority {majority:.3f}")

    most_confident: list[int] = []
    for label in range(len(names)):
        for correct in (True, False):
            rows = np.flatnonzero((labels == label) & ((predictions == labels) == correct))
            order = np.argsort(-probabilities[rows, predictions[rows]], kind="stable")
            most_confident += list(rows[order][: 6 // len(names)])
    high_priority = np.asarray(jax.nn.sigmoid(logits["priority"][:, 0]))
    table = [("most confident predictions, correct and wrong", head, "predicted", "arguments", "P(3+)")]
    for row in most_confident:
        ticket, prediction = load_tickets()["test"][row], predictions[row]
        title = ticket.title if len(ticket.title) <= 60 else f"{ticket.title[:57]}..."
        predicted = f"{names[prediction]}  {probabilities[row, prediction]:.3f}"
        name, arguments = names[labels[row]], str(ticket.arguments)
        table.append((title.replace("$", r"\$"), name, predicted, arguments, f"{high_priority[row]:.2f}"))
    _draw_table(right, table, [bool(predictions[row] == labels[row]) for row in most_confident])
    return {head: figure}


def _draw_table(axes: "Axes", table: list[tuple[str, ...]], correct: list[bool]) -> None:
    """Draws a heading and rows of text; the third column is green if the row is correct, and red if not."""
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(len(correct), -1.5))
    columns = (0, 0.54, 0.66, 0.81, 0.94)
    heading, *rows = table
    for x, text in zip(columns, heading, strict=True):
        axes.text(x, -1, text, weight="bold")
    for y, row in enumerate(rows):
        for x, text in zip(columns, row, strict=True):
            colour = "k" if x != columns[2] else _plots.GREEN if correct[y] else "#cc3311"
            axes.text(x, y, text, color=colour, fontsize=9.5)
