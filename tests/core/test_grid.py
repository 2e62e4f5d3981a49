"""Some seventy configurations of a model, its targets and its training, with every pair of options, against Keras' own `fit`."""

import itertools
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers

import research
from research.data.sources import from_batches

ROWS, SIZE, EPOCHS = 24, 8, 2
CONFIGURATIONS, CANDIDATES = 64, 4000
OPTIONS: dict[str, tuple[str, ...]] = {
    "model": ("sequential", "functional", "subclassed", "nested"),
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
Configuration = dict[str, str]


def supported(configuration: Configuration) -> bool:
    """Returns whether Keras supports a configuration and handles it correctly."""
    several, steps = configuration["outputs"] in ("list", "dict"), configuration["outputs"] == "steps"
    if (several and configuration["model"] == "sequential") or (several and configuration["weights"] == "class"):
        return False
    if configuration["weights"] == "temporal" and not steps:
        return False
    if steps and (configuration["mask"] == "none" or configuration["weights"] in ("class", "sample")):
        return False
    # Keras does not pass the mask of the outputs to training metrics: DEVIATIONS.md.
    return not (steps and configuration["metrics"] != "none")


def candidates(number: int) -> list[Configuration]:
    """Returns those of so many random configurations that are supported; the same each time."""
    rng = np.random.default_rng(0)
    drawn = [{name: str(rng.choice(choices)) for name, choices in OPTIONS.items()} for _ in range(number)]
    return [configuration for configuration in drawn if supported(configuration)]


def covering_configurations() -> list[Configuration]:
    """Returns at least `CONFIGURATIONS` of the candidates, with every pair of options that occurs in them."""
    pool = candidates(CANDIDATES)
    missing = {pair for configuration in pool for pair in pairs(configuration)}
    chosen: list[Configuration] = []
    while missing or len(chosen) < CONFIGURATIONS:
        remaining = (configuration for configuration in pool if configuration not in chosen)
        chosen.append(max(remaining, key=lambda configuration: len(missing & pairs(configuration))))
        missing -= pairs(chosen[-1])
    return chosen


def pairs(configuration: Configuration) -> set[Any]:
    return set(itertools.combinations(sorted(configuration.items()), 2))


class Penalty(layers.Layer):
    """Adds a loss."""

    supports_masking = True

    def call(self, x: Any) -> Any:
        self.add_loss(0.01 * keras.ops.mean(keras.ops.square(x)))
        return x


class Subclassed(keras.Model):
    """A model with a `call` of its own that applies heads to the output of a body."""

    def __init__(self, body: keras.Model, heads: Any) -> None:
        super().__init__()
        self.body, self.heads = body, heads

    def call(self, x: Any, training: bool = False) -> Any:
        h = self.body(x, training=training)
        if isinstance(self.heads, dict):
            return {name: head(h) for name, head in self.heads.items()}
        return [head(h) for head in self.heads] if isinstance(self.heads, list) else self.heads(h)


def body(configuration: Configuration) -> list[Any]:
    regularizer: dict[str, Any] = {
        "kernel": {"kernel_regularizer": "l2"},
        "activity": {"activity_regularizer": keras.regularizers.L2(1e-3)},
        "constraint": {"kernel_constraint": keras.constraints.MaxNorm(0.8)},
    }.get(configuration["regularizer"], {})
    stack: list[Any] = []
    if configuration["mask"] == "embedding":
        stack += [keras.Input((5,), dtype="int32"), layers.Embedding(12, 4, mask_zero=True)]
    elif configuration["mask"] == "masking":
        stack += [keras.Input((5, 3)), layers.Masking()]
    else:
        stack += [keras.Input((6,))]
    if configuration["mask"] != "none":
        stack += [layers.SimpleRNN(6, return_sequences=configuration["outputs"] == "steps")]
    stack += [layers.Dense(7, activation="tanh", **regularizer)]
    stack += [Penalty()] if configuration["regularizer"] == "add_loss" else []
    stack += (
        [layers.BatchNormalization()]
        if configuration["noise"] in ("norm", "both") and configuration["outputs"] != "steps"
        else []
    )
    stack += [layers.Dropout(0.3)] if configuration["noise"] in ("dropout", "both") else []
    return stack


def heads(configuration: Configuration) -> Any:
    score, label = layers.Dense(1, name="score"), layers.Dense(3, name="class")
    return {"list": [score, label], "dict": {"score": score, "class": label}, "one": label}.get(configuration["outputs"], score)


def build_model(configuration: Configuration) -> keras.Model:
    stack, outputs = body(configuration), heads(configuration)
    if configuration["model"] == "sequential":
        return keras.Sequential([*stack, outputs])
    if configuration["model"] == "functional":
        x = h = stack[0]
        for layer in stack[1:]:
            h = layer(h)
    else:
        inner = keras.Sequential(stack)
        if configuration["model"] == "subclassed":
            model = Subclassed(inner, outputs)
            model(data(configuration)[0][:2])
            return model
        x = keras.Input(stack[0].shape[1:], dtype=stack[0].dtype)
        h = inner(x)
    return keras.Model(x, keras.tree.map_structure(lambda head: head(h), outputs))


def optimizer(name: str) -> Any:
    optimizers = keras.optimizers
    return {
        "nesterov": lambda: optimizers.SGD(1e-2, momentum=0.9, nesterov=True),
        "adamw-cosine-clipped": lambda: optimizers.AdamW(
            optimizers.schedules.CosineDecay(1e-2, 8), weight_decay=1e-2, global_clipnorm=0.5
        ),
        "adam-ema": lambda: optimizers.Adam(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3),
        "loss-scaled": lambda: optimizers.LossScaleOptimizer(optimizers.Adam()),
    }.get(name, lambda: optimizers.get(name))()


def compile_args(configuration: Configuration) -> dict[str, Any]:
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses: Any = {"list": ["mse", crossentropy], "dict": {"score": "mse", "class": crossentropy}, "one": crossentropy}.get(
        configuration["outputs"], "mse"
    )
    metrics: Any = {"list": [["mae"], ["accuracy"]], "dict": {"score": ["mae"], "class": ["accuracy"]}, "one": ["accuracy"]}
    args: dict[str, Any] = {"loss": losses, "optimizer": optimizer(configuration["optimizer"])}
    if configuration["outputs"] in ("list", "dict"):
        args["loss_weights"] = [0.5, 2.0] if configuration["outputs"] == "list" else {"score": 0.5, "class": 2.0}
    for name, choices in (("metrics", ("plain", "both")), ("weighted_metrics", ("weighted", "both"))):
        if configuration["metrics"] in choices:
            args[name] = metrics[configuration["outputs"]]
    return args


def data(configuration: Configuration) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x: Any = rng.normal(size=(ROWS, 6)).astype("float32")
    if configuration["mask"] == "embedding":
        x = rng.integers(0, 12, (ROWS, 5)).astype("int32")
        x[:, 0] = 1  # no row is masked completely
    elif configuration["mask"] == "masking":
        x = rng.normal(size=(ROWS, 5, 3)).astype("float32") * (rng.uniform(size=(ROWS, 5, 1)) < 0.7)
        x[:, 0] = 1.0
        x = x.astype("float32")
    score, label = rng.normal(size=(ROWS, 1)).astype("float32"), rng.integers(0, 3, ROWS).astype("int32")
    steps = rng.normal(size=(ROWS, 5, 1)).astype("float32")
    y: Any = {"list": [score, label], "dict": {"score": score, "class": label}, "one": label}.get(configuration["outputs"], steps)
    weight: Any = None
    if configuration["weights"] == "sample":
        weight = jax.tree.map(lambda leaf: rng.uniform(size=ROWS).astype("float32"), y)
    elif configuration["weights"] == "temporal":
        weight = rng.uniform(size=(ROWS, 5)).astype("float32")
    return x, y, weight


def variable_values(model: keras.Model) -> list[list[Any]]:
    return [np.asarray(v.value).tolist() for v in [*model.variables, *model.optimizer.variables]]


def fit_model(configuration: Configuration, fit: Any, **options: Any) -> tuple[Any, Any]:
    keras.utils.set_random_seed(0)
    model = build_model(configuration)
    model.compile(**compile_args(configuration))
    x, y, weight = data(configuration)
    keras.utils.set_random_seed(1)
    options["class_weight"] = {0: 0.2, 2: 3.0} if configuration["weights"] == "class" else None
    history = fit(model, x, y, sample_weight=weight, batch_size=SIZE, epochs=EPOCHS, verbose=0, **options).history
    return history, variable_values(model)


GRID = covering_configurations()


def test_the_grid_has_every_supported_pair_of_options() -> None:
    assert len(GRID) >= 60
    covered = {pair for configuration in GRID for pair in pairs(configuration)}
    assert covered == {pair for configuration in candidates(3 * CANDIDATES) for pair in pairs(configuration)}


@pytest.mark.sample(8)
@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("configuration", GRID, ids=lambda configuration: " ".join(configuration.values()))
def test_research_fit_and_research_train_equal_keras_fit_bit_for_bit(configuration: Configuration) -> None:
    history, weights = fit_model(configuration, keras.Model.fit)
    assert fit_model(configuration, research.fit) == (history, weights)

    keras.utils.set_random_seed(0)
    model = build_model(configuration)
    x, y, weight = data(configuration)
    np.random.seed(1)
    orders = [np.random.permutation(ROWS) for _ in range(1 + EPOCHS)][1:]  # fit draws the first one for a batch to build with
    rows = [order[i : i + SIZE] for order in orders for i in range(0, ROWS, SIZE)]
    class_weight = {0: 0.2, 2: 3.0} if configuration["weights"] == "class" else None
    full_batch = research.from_arrays(x, y, weight, batch_size=ROWS, shuffle=False, class_weight=class_weight).batch(0)
    batches = from_batches([jax.tree.map(lambda leaf, r=r: leaf[r], full_batch) for r in rows], steps_per_epoch=ROWS // SIZE)
    args = compile_args(configuration)
    learner = research.supervised(model, **args, example=batches.batch(0))
    state, logs = research.train(learner, batches, epochs=EPOCHS)
    research.write_back(state, model, args["optimizer"])
    args["optimizer"].finalize_variable_values(model.trainable_variables)  # as Keras does at the end of fit
    assert [np.asarray(v.value).tolist() for v in model.variables] == weights[: len(model.variables)]
    assert logs == {name: values[-1] for name, values in history.items()}
