"""Some seventy ways to compile and feed a model, every two choices together at least once, against Keras' own `fit`."""

import itertools
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers

import research
from research.sources import indexed

ROWS, SIZE, EPOCHS = 24, 8, 2
WAYS, DRAWN = 64, 4000
AXES: dict[str, tuple[str, ...]] = {
    "kind": ("sequential", "functional", "subclassed", "nested"),
    "outputs": ("one", "list", "dict", "steps"),
    "mask": ("none", "embedding", "masking"),
    "weights": ("none", "sample", "class", "temporal"),
    "optimizer": (
        *("sgd", "nesterov", "adam", "adamw-cosine-clipped", "rmsprop", "adagrad", "nadam", "lion", "adam-ema"),
        *("adafactor", "loss-scaled"),
    ),
    "metrics": ("none", "plain", "weighted", "both"),
    "regularizer": ("none", "kernel", "activity", "add_loss", "constraint"),
    "noise": ("none", "dropout", "norm", "both"),
}
Way = dict[str, str]


def possible(way: Way) -> bool:
    """What Keras can do at all, and gets right."""
    several, steps = way["outputs"] in ("list", "dict"), way["outputs"] == "steps"
    if (several and way["kind"] == "sequential") or (several and way["weights"] == "class"):
        return False
    if way["weights"] == "temporal" and not steps:
        return False
    if steps and (way["mask"] == "none" or way["weights"] in ("class", "sample")):
        return False
    # Keras gives its training metrics no mask of the outputs: DEVIATIONS.md.
    return not (steps and way["metrics"] != "none")


def drawn(number: int) -> list[Way]:
    """Ways drawn at random, those that are possible: the same each time."""
    rng = np.random.default_rng(0)
    found = [{name: str(rng.choice(choices)) for name, choices in AXES.items()} for _ in range(number)]
    return [way for way in found if possible(way)]


def ways() -> list[Way]:
    """Of the ways drawn so many that every pair of choices is among them, then more."""
    pool = drawn(DRAWN)
    missing = {pair for way in pool for pair in pairs(way)}
    chosen: list[Way] = []
    while missing or len(chosen) < WAYS:
        chosen.append(max((way for way in pool if way not in chosen), key=lambda way: len(missing & pairs(way))))
        missing -= pairs(chosen[-1])
    return chosen


def pairs(way: Way) -> set[Any]:
    return set(itertools.combinations(sorted(way.items()), 2))


class Penalty(layers.Layer):
    """Adds a loss."""

    supports_masking = True

    def call(self, x: Any) -> Any:
        self.add_loss(0.01 * keras.ops.mean(keras.ops.square(x)))
        return x


class Own(keras.Model):
    """Heads on a body, called by a `call` of its own."""

    def __init__(self, body: keras.Model, heads: Any) -> None:
        super().__init__()
        self.body, self.heads = body, heads

    def call(self, x: Any, training: bool = False) -> Any:
        h = self.body(x, training=training)
        if isinstance(self.heads, dict):
            return {name: head(h) for name, head in self.heads.items()}
        return [head(h) for head in self.heads] if isinstance(self.heads, list) else self.heads(h)


def body(way: Way) -> list[Any]:
    regularizer: dict[str, Any] = {
        "kernel": {"kernel_regularizer": "l2"},
        "activity": {"activity_regularizer": keras.regularizers.L2(1e-3)},
        "constraint": {"kernel_constraint": keras.constraints.MaxNorm(0.8)},
    }.get(way["regularizer"], {})
    stack: list[Any] = []
    if way["mask"] == "embedding":
        stack += [keras.Input((5,), dtype="int32"), layers.Embedding(12, 4, mask_zero=True)]
    elif way["mask"] == "masking":
        stack += [keras.Input((5, 3)), layers.Masking()]
    else:
        stack += [keras.Input((6,))]
    if way["mask"] != "none":
        stack += [layers.SimpleRNN(6, return_sequences=way["outputs"] == "steps")]
    stack += [layers.Dense(7, activation="tanh", **regularizer)]
    stack += [Penalty()] if way["regularizer"] == "add_loss" else []
    stack += [layers.BatchNormalization()] if way["noise"] in ("norm", "both") and way["outputs"] != "steps" else []
    stack += [layers.Dropout(0.3)] if way["noise"] in ("dropout", "both") else []
    return stack


def heads(way: Way) -> Any:
    score, kind = layers.Dense(1, name="score"), layers.Dense(3, name="kind")
    return {"list": [score, kind], "dict": {"score": score, "kind": kind}, "one": kind}.get(way["outputs"], score)


def network(way: Way) -> keras.Model:
    stack, ends = body(way), heads(way)
    if way["kind"] == "sequential":
        return keras.Sequential([*stack, ends])
    if way["kind"] == "functional":
        x = h = stack[0]
        for layer in stack[1:]:
            h = layer(h)
    else:
        inner = keras.Sequential(stack)
        if way["kind"] == "subclassed":
            model = Own(inner, ends)
            model(data(way)[0][:2])
            return model
        x = keras.Input(stack[0].shape[1:], dtype=stack[0].dtype)
        h = inner(x)
    return keras.Model(x, keras.tree.map_structure(lambda head: head(h), ends))


def optimizer(name: str) -> Any:
    of = keras.optimizers
    return {
        "nesterov": lambda: of.SGD(1e-2, momentum=0.9, nesterov=True),
        "adamw-cosine-clipped": lambda: of.AdamW(of.schedules.CosineDecay(1e-2, 8), weight_decay=1e-2, global_clipnorm=0.5),
        "adam-ema": lambda: of.Adam(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3),
        "loss-scaled": lambda: of.LossScaleOptimizer(of.Adam()),
    }.get(name, lambda: of.get(name))()


def compiled(way: Way) -> dict[str, Any]:
    classes = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses: Any = {"list": ["mse", classes], "dict": {"score": "mse", "kind": classes}, "one": classes}.get(way["outputs"], "mse")
    measured: Any = {"list": [["mae"], ["accuracy"]], "dict": {"score": ["mae"], "kind": ["accuracy"]}, "one": ["accuracy"]}
    found: dict[str, Any] = {"loss": losses, "optimizer": optimizer(way["optimizer"])}
    if way["outputs"] in ("list", "dict"):
        found["loss_weights"] = [0.5, 2.0] if way["outputs"] == "list" else {"score": 0.5, "kind": 2.0}
    for name, when in (("metrics", ("plain", "both")), ("weighted_metrics", ("weighted", "both"))):
        if way["metrics"] in when:
            found[name] = measured[way["outputs"]]
    return found


def data(way: Way) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x: Any = rng.normal(size=(ROWS, 6)).astype("float32")
    if way["mask"] == "embedding":
        x = rng.integers(0, 12, (ROWS, 5)).astype("int32")
        x[:, 0] = 1  # something is left of each row
    elif way["mask"] == "masking":
        x = rng.normal(size=(ROWS, 5, 3)).astype("float32") * (rng.uniform(size=(ROWS, 5, 1)) < 0.7)
        x[:, 0] = 1.0
        x = x.astype("float32")
    score, kind = rng.normal(size=(ROWS, 1)).astype("float32"), rng.integers(0, 3, ROWS).astype("int32")
    steps = rng.normal(size=(ROWS, 5, 1)).astype("float32")
    y: Any = {"list": [score, kind], "dict": {"score": score, "kind": kind}, "one": kind}.get(way["outputs"], steps)
    weight: Any = None
    if way["weights"] == "sample":
        weight = jax.tree.map(lambda leaf: rng.uniform(size=ROWS).astype("float32"), y)
    elif way["weights"] == "temporal":
        weight = rng.uniform(size=(ROWS, 5)).astype("float32")
    return x, y, weight


def held(model: keras.Model) -> list[list[Any]]:
    return [np.asarray(v.value).tolist() for v in [*model.variables, *model.optimizer.variables]]


def trained(way: Way, fit: Any, **options: Any) -> tuple[Any, Any]:
    keras.utils.set_random_seed(0)
    model = network(way)
    model.compile(**compiled(way))
    x, y, weight = data(way)
    keras.utils.set_random_seed(1)
    options["class_weight"] = {0: 0.2, 2: 3.0} if way["weights"] == "class" else None
    history = fit(model, x, y, sample_weight=weight, batch_size=SIZE, epochs=EPOCHS, verbose=0, **options).history
    return history, held(model)


GRID = ways()


def test_the_grid_has_every_possible_pair_of_choices() -> None:
    assert len(GRID) >= 60
    assert {pair for way in drawn(3 * DRAWN) for pair in pairs(way)} == {pair for way in GRID for pair in pairs(way)}


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("way", GRID, ids=lambda way: " ".join(way.values()))
def test_fit_and_our_loop_equal_keras_shuffled_bit_for_bit(way: Way) -> None:
    history, weights = trained(way, keras.Model.fit)
    assert trained(way, research.fit) == (history, weights)

    keras.utils.set_random_seed(0)
    model = network(way)
    x, y, weight = data(way)
    np.random.seed(1)
    orders = [np.random.permutation(ROWS) for _ in range(1 + EPOCHS)][1:]  # Keras draws one to look at a batch
    rows = [order[i : i + SIZE] for order in orders for i in range(0, ROWS, SIZE)]
    classes = {0: 0.2, 2: 3.0} if way["weights"] == "class" else None
    whole = research.arrays(x, y, weight, batch_size=ROWS, shuffle=False, class_weight=classes).batch(0)
    batches = indexed([jax.tree.map(lambda leaf, r=r: leaf[r], whole) for r in rows], steps_per_epoch=ROWS // SIZE)
    given = {**compiled(way), "optimizer": keras.optimizers.get(compiled(way)["optimizer"])}
    learner = research.supervised(model, **given, example=batches.batch(0))
    state, logs = research.train(learner, batches, epochs=EPOCHS)
    research.write_back(state, model, given["optimizer"])
    given["optimizer"].finalize_variable_values(model.trainable_variables)  # as Keras does at the end of fit
    assert [np.asarray(v.value).tolist() for v in model.variables] == weights[: len(model.variables)]
    assert logs == {name: values[-1] for name, values in history.items()}
