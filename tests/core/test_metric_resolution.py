"""Losses and metrics are resolved from the shapes of the batch, as Keras does, with no example and whatever a loss is called."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import research

ROWS, CLASSES = 12, 3
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
NUMBERS = np.random.default_rng(1).integers(0, CLASSES, ROWS).astype("int32")
COLUMN = NUMBERS[:, None]
ONE_HOT = np.eye(CLASSES, dtype="float32")[NUMBERS]
SCORE = np.random.default_rng(2).normal(size=(ROWS, 1)).astype("float32")
BINARY = (SCORE > 0).astype("float32")


def focal(y_true: Any, y_pred: Any) -> Any:
    """A focal loss on class numbers."""
    labels = ops.one_hot(ops.cast(ops.reshape(y_true, (-1,)), "int32"), CLASSES)
    p = ops.sum(labels * ops.softmax(y_pred), axis=-1)
    return -((1 - p) ** 2) * ops.log(p)


def gathered(y_true: Any, y_pred: Any) -> Any:
    """A loss that accepts class numbers only."""
    log_p = ops.log_softmax(y_pred)
    return -ops.take_along_axis(log_p, ops.cast(y_true, "int32")[:, None], axis=-1)[:, 0]


def sparse_looking(y_true: Any, y_pred: Any) -> Any:
    """A loss on one-hot targets."""
    return -ops.sum(y_true * ops.log_softmax(y_pred), axis=-1)


def at_least_two_axes(y_true: Any, y_pred: Any) -> Any:
    """A metric that rejects class numbers."""
    assert len(y_true.shape) == 2
    return ops.mean(ops.abs(y_true - y_pred), axis=-1)


def class_numbers(y_true: Any, y_pred: Any) -> Any:
    """A metric that accepts class numbers only."""
    return ops.take_along_axis(y_pred, ops.cast(y_true, "int32")[:, None], axis=-1)[:, 0]


class Wrapped(keras.losses.Loss):
    """Another loss under a name of its own."""

    def __init__(self, loss: Any) -> None:
        super().__init__(name="objective")
        self.loss = loss

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.loss(y_true, y_pred)


def sparse(**options: Any) -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def head(units: int = CLASSES, **options: Any) -> keras.Model:
    return keras.Sequential([keras.Input((4,)), layers.Dense(units, **options)])


def two(outputs: Any) -> keras.Model:
    """Two outputs whose names are not in sorted order: a class, called `z`, then a score, called `a`."""
    x = keras.Input((4,))
    heads = [layers.Dense(CLASSES, name="z")(x), layers.Dense(1, name="a")(x)]
    return keras.Model(x, outputs(*heads))


def in_list() -> keras.Model:
    return two(lambda z, a: [z, a])


def in_dict() -> keras.Model:
    return two(lambda z, a: {"z": z, "a": a})


def own_keys() -> keras.Model:
    return two(lambda z, a: {"label": z, "distance": a})


SINGLE: dict[str, tuple[Any, Any, Any, Any]] = {  # model, targets, loss, metrics
    "focal on class numbers": (head, NUMBERS, lambda: focal, ["accuracy"]),
    "focal on a column of class numbers": (head, COLUMN, lambda: focal, ["accuracy", "acc"]),
    "focal, wrapped": (head, NUMBERS, lambda: Wrapped(focal), ["acc"]),
    "class numbers only": (head, NUMBERS, lambda: gathered, ["accuracy", class_numbers]),
    "a lambda": (head, NUMBERS, lambda: lambda y, p: gathered(y, p), ["accuracy"]),
    "sparse under another name": (head, NUMBERS, lambda: sparse(name="cost"), ["accuracy"]),
    "sparse, wrapped": (head, NUMBERS, lambda: Wrapped(sparse(reduction=None)), ["accuracy"]),
    "sparse by name": (
        lambda: head(activation="softmax"),
        COLUMN,
        lambda: "sparse_categorical_crossentropy",
        ["accuracy", "sparse_categorical_accuracy"],
    ),
    "sparse by class name": (
        lambda: head(activation="softmax"),
        NUMBERS,
        lambda: "SparseCategoricalCrossentropy",
        ["accuracy"],
    ),
    "one-hot under a sparse name": (head, ONE_HOT, lambda: sparse_looking, ["accuracy", at_least_two_axes]),
    "crossentropy of class numbers": (lambda: head(activation="softmax"), NUMBERS, lambda: "crossentropy", ["accuracy"]),
    "crossentropy of one-hot": (lambda: head(activation="softmax"), ONE_HOT, lambda: "ce", ["accuracy"]),
    "crossentropy of one unit": (lambda: head(1, activation="sigmoid"), BINARY, lambda: "ce", ["accuracy"]),
    "one unit, flat targets": (lambda: head(1, activation="sigmoid"), BINARY[:, 0], lambda: "bce", ["accuracy", "mse"]),
    "metrics by string with variables from the first batch": (head, ONE_HOT, lambda: sparse_looking, ["R2Score", "accuracy"]),
    "several losses of one output": (head, ONE_HOT, lambda: ["mse", "mae"], ["accuracy"]),
}
TWO: dict[str, tuple[Any, Any, Any, Any]] = {
    "list, losses by name": (in_list, [NUMBERS, SCORE], lambda: {"z": sparse(), "a": "mse"}, {"z": ["accuracy"], "a": ["mae"]}),
    "list, losses by sorted name": (in_list, [NUMBERS, SCORE], lambda: {"a": "mse", "z": focal}, {"a": "mae", "z": "acc"}),
    "list, losses in a list": (in_list, [COLUMN, SCORE], lambda: [Wrapped(focal), "mse"], [["accuracy", "acc"], ["mae"]]),
    "list, targets by name": (in_list, {"a": SCORE, "z": NUMBERS}, lambda: {"z": sparse(name="cost"), "a": "mse"}, [["acc"], []]),
    "list, one loss of two": (in_list, [NUMBERS, SCORE], lambda: [focal, None], {"z": ["accuracy"]}),
    "dict": (in_dict, {"a": SCORE, "z": NUMBERS}, lambda: {"z": focal, "a": "mse"}, {"z": ["accuracy"], "a": ["mae"]}),
    "dict, one-hot": (in_dict, {"z": ONE_HOT, "a": SCORE}, lambda: {"a": "mse", "z": sparse_looking}, {"z": ["accuracy"]}),
    "dict, keys of its own": (
        own_keys,
        {"label": NUMBERS, "distance": SCORE},
        lambda: {"label": gathered, "distance": Wrapped(keras.losses.MeanSquaredError())},
        {"label": ["accuracy"], "distance": ["mae"]},
    ),
    "one loss for all": (in_list, [ONE_HOT, SCORE], lambda: "mse", [["accuracy"], ["accuracy", "mae"]]),
}
CASES = {**SINGLE, **TWO}
QUICK = {"focal on class numbers", "list, losses by sorted name"}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES]


def keras_logs(build: Any, y: Any, options: dict[str, Any]) -> dict[str, Any]:
    keras.utils.set_random_seed(0)
    model = build()
    model.compile(optimizer=keras.optimizers.SGD(0.1), **options)
    history = model.fit(X, y, validation_data=(X, y), batch_size=ROWS // 2, epochs=2, shuffle=False, verbose=0).history
    return {name: values[-1] for name, values in history.items()}


@pytest.mark.sample(6)
@pytest.mark.promotes
@pytest.mark.parametrize("group", ["metrics", pytest.param("weighted_metrics", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_supervised_without_an_example_logs_what_keras_logs(name: str, group: str) -> None:
    build, y, loss, metrics = CASES[name]
    expected = keras_logs(build, y, {"loss": loss(), group: metrics})
    keras.utils.set_random_seed(0)
    learner = research.supervised(build(), optimizer=keras.optimizers.SGD(0.1), loss=loss(), **{group: metrics})
    data = research.from_arrays(X, y, batch_size=ROWS // 2, shuffle=False)
    _, logs = research.train(learner, data, epochs=2, evaluations={"val": data})
    assert logs == expected


@pytest.mark.sample(6)
@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("name", NAMES)
def test_from_keras_without_an_example_logs_what_keras_logs(name: str) -> None:
    build, y, loss, metrics = CASES[name]
    expected = keras_logs(build, y, {"loss": loss(), "metrics": metrics})
    keras.utils.set_random_seed(0)
    model = build()
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss(), metrics=metrics)
    data = research.from_arrays(X, y, batch_size=ROWS // 2, shuffle=False)
    _, logs = research.train(research.from_keras(model), data, epochs=2, evaluations={"val": data})
    assert logs == expected


class Report(keras.metrics.Metric):
    """A metric whose result is a dict, with a dict in it, a list or a vector."""

    def __init__(self, form: str, name: str = "report") -> None:
        super().__init__(name=name)
        self.form, self.total = form, self.add_variable((2,), "zeros", name="total")

    def update_state(self, y_true: Any, y_pred: Any = 0.0, sample_weight: Any = None) -> None:
        error = ops.mean(ops.abs(ops.cast(y_true, "float32") - y_pred))
        self.total.assign(self.total + ops.stack([error, 2 * error]))

    def result(self) -> Any:
        low, high = self.total[0], self.total[1]
        forms = {"dict": {"low": low, "high": high}, "nested": {"outer": {"low": low}, "high": high}, "list": [low, high]}
        return forms.get(self.form, ops.stack([low, high]))


class Reporting(layers.Layer):
    """A layer with such a metric."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.report = Report(form)

    def call(self, x: Any) -> Any:
        self.report.update_state(x)
        return x


FORMS = [pytest.param(form, marks=[pytest.mark.slow] * (form == "nested")) for form in ("dict", "nested", "list", "vector")]


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("constructor", ["supervised", "from_keras"])
@pytest.mark.parametrize("form", FORMS)
def test_a_metric_with_several_results_is_logged_as_keras_does(form: str, constructor: str) -> None:
    expected = keras_logs(head, ONE_HOT, {"loss": "mse", "metrics": [Report(form), "mae"]})
    keras.utils.set_random_seed(0)
    model = head()
    if constructor == "supervised":
        learner = research.supervised(model, loss="mse", metrics=[Report(form), "mae"], optimizer=keras.optimizers.SGD(0.1))
    else:
        model.compile(loss="mse", metrics=[Report(form), "mae"], optimizer=keras.optimizers.SGD(0.1))
        learner = research.from_keras(model)
    data = research.from_arrays(X, ONE_HOT, batch_size=ROWS // 2, shuffle=False)
    entries: list[research.LogEntry] = []
    _, logs = research.train(learner, data, epochs=2, evaluations={"val": data}, log=entries.append)
    assert logs == {name: np.asarray(value).tolist() for name, value in expected.items()}
    assert all(isinstance(value, float) for entry in entries for value in entry.values.values())


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_s_metric_with_several_results_is_logged_as_one_of_the_model_is(form: str) -> None:
    model = keras.Sequential([keras.Input((4,)), Reporting(form), layers.Dense(CLASSES)])
    learner = research.supervised(model, loss="mse", optimizer="sgd")
    _, logs = learner.evaluate(learner.init(), research.Batch(X, ONE_HOT))
    names = {"dict": {"low", "high"}, "nested": {"low", "high"}}.get(form, {"report"})
    assert set(logs) == {"loss"} | names
    error = np.abs(X).mean()
    np.testing.assert_allclose(
        np.ravel(logs.get("report", logs.get("low"))), [error, 2 * error][: len(np.ravel(logs.get("report", 0)))], rtol=1e-6
    )


@pytest.mark.slow
def test_averages_over_no_axis_are_logged_as_a_list_as_keras_logs_them() -> None:
    options = {"loss": "mse", "metrics": [keras.metrics.F1Score(average=None, name="f1")]}
    expected = keras_logs(head, ONE_HOT, options)
    keras.utils.set_random_seed(0)
    options = {"loss": "mse", "metrics": [keras.metrics.F1Score(average=None, name="f1")]}
    learner = research.supervised(head(), **options, optimizer=keras.optimizers.SGD(0.1))
    data = research.from_arrays(X, ONE_HOT, batch_size=ROWS // 2, shuffle=False)
    state, logs = research.train(learner, data, epochs=2)
    assert logs["f1"] == expected["f1"].tolist()
    assert len(research.evaluate(learner, data, state)["f1"]) == CLASSES


class PerColumn(keras.metrics.Metric):
    """A metric that makes a variable of the shape of the targets in its first update."""

    def __init__(self) -> None:
        super().__init__(name="per_column")
        self.made: Any = None

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        if self.made is None:
            self.made = self.add_variable(y_true.shape[1:], "zeros", name="made")
        self.made.assign(self.made + ops.sum(ops.cast(y_true, "float32"), axis=0))

    def result(self) -> Any:
        return ops.sum(self.made)


class ClassNumbersOnly(PerColumn):
    """One that rejects other targets."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        assert len(y_true.shape) == 1
        super().update_state(y_true, y_pred)


@pytest.mark.slow
@pytest.mark.parametrize("constructor", ["supervised", "from_keras"])
def test_a_metric_whose_variables_depend_on_unknown_targets_asks_for_an_example(constructor: str) -> None:
    def build(metric: keras.Metric, example: research.Batch | None = None) -> research.Learner:
        if constructor == "supervised":
            return research.supervised(head(), loss=gathered, metrics=[metric], optimizer="sgd", example=example)
        model = head()
        model.compile(loss=gathered, metrics=[metric], optimizer="sgd")
        return research.from_keras(model, example)

    with pytest.raises(research.InvalidArgument, match=r"'per_column' depend on the targets.*pass example=Batch\(x, y\)"):
        build(ClassNumbersOnly())
    batch = research.Batch(X, NUMBERS)
    learner = build(PerColumn())  # made for targets like the outputs
    with pytest.raises(research.InvalidArgument, match=r"on the targets.*pass example=Batch\(x, y\)"):
        learner.train(learner.init(), batch)
    learner = build(ClassNumbersOnly(), batch)
    assert float(learner.train(learner.init(), batch)[1]["per_column"]) == NUMBERS.sum()


def test_training_and_evaluation_may_have_targets_of_other_shapes() -> None:
    learner = research.supervised(head(), loss=lambda y, p: ops.mean(p, axis=-1), metrics=["accuracy"])
    state = learner.init()
    logs = [learner.evaluate(state, research.Batch(X, y))[1] for y in (NUMBERS, ONE_HOT, COLUMN)]
    assert len({float(each["accuracy"]) for each in logs}) == 1


def broken(y_true: Any, y_pred: Any) -> Any:
    return ops.mean(y_true - y_pred[:, :2], axis=-1)


@pytest.mark.parametrize("group", ["loss", "metrics", "weighted_metrics"])
def test_an_error_in_ones_own_loss_or_metric_names_its_file_and_line(group: str) -> None:
    line = broken.__code__.co_firstlineno + 1
    options = {"loss": "mse", group: broken if group == "loss" else [broken]}
    with pytest.raises(research.InvalidArgument, match=rf"test_metric_resolution\.py:{line}: .*shape") as caught:
        research.supervised(head(), **options, example=research.Batch(X, ONE_HOT))
    assert "\n" not in str(caught.value)
    learner = research.supervised(head(), **options)
    data = research.from_arrays(X, ONE_HOT, batch_size=4)
    with pytest.raises(research.InvalidArgument, match=rf"test_metric_resolution\.py:{line}: .*shape"):
        research.train(learner, data, steps=1)
