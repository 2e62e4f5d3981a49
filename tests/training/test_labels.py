"""Labels that a model has no class for are an error of one line; labels that do not count may have any value."""

from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers

import research
from research import distributed
from research.data import Batches, from_arrays, from_batches, from_iterable
from research.training import labels as label_module

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.arange(8) % 3
SPARSE = keras.losses.SparseCategoricalCrossentropy


def with_label(value: Any, dtype: str = "int32") -> np.ndarray:
    y = Y.astype(dtype)
    y[5] = value
    return y


def classifier(loss: Any = "sparse_categorical_crossentropy", **options: Any) -> research.Learner:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "softmax")])
    return research.supervised(model, loss=loss, optimizer="sgd", **{"example": research.Batch(X, Y), **options})


def compiled(loss: Any = "sparse_categorical_crossentropy", base: type[keras.Sequential] = keras.Sequential) -> research.Learner:
    model = base([keras.Input((4,)), layers.Dense(3, "softmax")])
    model.compile("sgd", loss)
    return research.from_keras(model)


def two_heads(form: str) -> research.Learner:
    x = keras.Input((4,))
    score, label = layers.Dense(1, name="score")(x), layers.Dense(3, "softmax", name="label")(x)
    outputs: Any = {"score": score, "label": label} if form == "dict" else [score, label]
    losses: Any = ["mse", SPARSE()] if form == "list" else {"label": "sparse_categorical_crossentropy", "score": "mse"}
    example = research.Batch(X, jax.tree.map(lambda output: Y if output.shape[-1] == 3 else X[:, :1], outputs))
    return research.supervised(keras.Model(x, outputs), loss=losses, optimizer="sgd", example=example)


def data(y: Any, weight: Any = None, kind: str = "resident", x: Any = X) -> Batches:
    if kind == "resident":
        return from_arrays(x, y, weight, batch_size=4, shuffle=False)
    batches = [
        jax.tree.map(lambda leaf, s=start: leaf[s : s + 4], research.Batch(x, y, weight))  # type: ignore[misc]
        for start in (0, 4)
    ]
    return from_batches(batches) if kind == "batches" else from_iterable(batches)


BAD = {
    "negative": (with_label(-1), "y has label -1 in row {row}, expected 0 to 2, the classes of the model: number labels from 0"),
    "too large": (with_label(3), "y has label 3 in row {row}, expected 0 to 2, the classes of the model: number labels from 0"),
    "much too large": (with_label(2**31 - 1, "int64"), "y has label 2147483647 in row {row}, expected 0 to 2, the classes of"),
    "inexact": (with_label(0.5, "float32"), "y has label 0.5 in row {row}, expected 0 to 2, the classes of the model: number"),
    "unsigned": (with_label(255, "uint8"), "y has label 255 in row {row}, expected 0 to 2, the classes of the model: number"),
    "a column": (with_label(3)[:, None], "y has label 3 in row {row}, expected 0 to 2, the classes of the model: number labels"),
}


def check(learner: research.Learner, batches: Batches) -> None:
    """Checks the labels of all batches as a training does, without training."""
    checked = label_module.checked_labels(learner, batches, "train", lambda source: source())
    for step in range(checked.steps_per_epoch):
        checked.batch(step)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resident", "batches", "iterable"])
@pytest.mark.parametrize("name", BAD)
def test_a_label_without_a_class_is_an_error_in_training_and_evaluation(name: str, kind: str) -> None:
    y, message = BAD[name]
    learner, bad, good = classifier(), data(y, kind=kind), data(Y)
    state = learner.init()
    where = "" if kind == "resident" else ", step 1"
    runs: dict[str, Callable[[], Any]] = {
        "train": lambda: research.train(learner, bad, epochs=1),
        "val": lambda: research.train(learner, good, epochs=1, evaluations={"val": bad}),
        "evaluate": lambda: research.evaluate(learner, bad, state),
    }
    for split, run in runs.items():
        with pytest.raises(research.InvalidArgument) as error:
            run()
        assert str(error.value).startswith(f"{split}{where}: {message.format(row=5 if kind == 'resident' else 1)}")
        assert "\n" not in str(error.value)


LEARNERS: dict[str, Callable[[], research.Learner]] = {
    "class name": lambda: classifier("SparseCategoricalCrossentropy"),
    "object": lambda: classifier(SPARSE(name="anything")),
    "function": lambda: classifier(keras.losses.sparse_categorical_crossentropy),
    "ce": lambda: classifier("ce"),
    "in a list": lambda: classifier(["sparse_categorical_crossentropy"]),
    "from_keras": compiled,
    "ema": lambda: research.transforms.ema(classifier(), 0.9),
    "accumulated": lambda: classifier(gradient_transform=lambda gradient: research.accumulate(gradient, 2)),
    "sharded": lambda: distributed.shard(classifier(), distributed.mesh(data=2, devices=jax.devices()[:2])),
    "joint": lambda: research.joint({"one": classifier(), "other": classifier("ce")}),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_form_of_the_loss_and_every_transform_keeps_the_check(name: str) -> None:
    with pytest.raises(research.InvalidArgument, match="train: y has label 3 in row 5, expected 0 to 2"):
        research.train(LEARNERS[name](), data(with_label(3)), epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resident", "batches"])
def test_batches_on_a_mesh_are_checked(kind: str) -> None:
    mesh = distributed.mesh(data=2, devices=jax.devices()[:2])
    learner = distributed.shard(classifier(), mesh)
    with pytest.raises(research.InvalidArgument, match=r"y has label 3 in row .* expected 0 to 2"):
        research.train(learner, distributed.shard_batches(data(with_label(3), kind=kind), mesh), epochs=1)


@pytest.mark.parametrize(("form", "targets"), [("list", "list"), ("names", "list"), ("dict", "dict")])
def test_labels_of_one_of_several_outputs_are_found_in_any_form(form: str, targets: str) -> None:
    def y(labels: np.ndarray) -> Any:
        scores = np.full((8, 1), 7.5, "float32")  # would be no label
        return {"score": scores, "label": labels} if targets == "dict" else [scores, labels]

    path = r"\['label'\]" if targets == "dict" else r"\[1\]"
    learner = two_heads(form)
    check(learner, data(y(Y)))
    with pytest.raises(research.InvalidArgument, match=f"train: y{path} has label 3 in row 5, expected 0 to 2"):
        check(learner, data(y(with_label(3))))


PIXELS = np.tile(Y[:, None, None], (1, 4, 4)).astype("int32")


def segmenter(loss: Any = "sparse_categorical_crossentropy") -> research.Learner:
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Dense(3, "softmax")])
    example = research.Batch(np.zeros((8, 4, 4, 1), "float32"), PIXELS)
    return research.supervised(model, loss=loss, optimizer="sgd", example=example)


def test_labels_of_pixels_are_checked() -> None:
    x, y = np.zeros((8, 4, 4, 1), "float32"), PIXELS.copy()
    check(segmenter(), data(y, x=x))
    y[6, 1, 2] = 255
    with pytest.raises(research.InvalidArgument, match=r"y has label 255 in row 6 at \(1, 2\), expected 0 to 2, the classes"):
        check(segmenter(), data(y, x=x))
    check(segmenter(SPARSE(ignore_class=255)), data(y, x=x))
    with pytest.raises(
        research.InvalidArgument, match=r"y has label 255 in row 6 at \(1, 2\), expected 0 to 2 or -1, the classes"
    ):
        check(segmenter(SPARSE(ignore_class=-1)), data(y, x=x))
    check(segmenter(), data(y, (y != 255).astype("float32"), x=x))


ONE_HOT = research.Batch(X, np.eye(3, dtype="float32")[Y])
WEIGHTS = np.where(np.arange(8) == 5, 0.0, 1.0).astype("float32")


def padded(y: np.ndarray) -> Batches:
    batch = research.Batch(X, y, None, np.arange(8) != 5)
    return from_batches([batch])


def of_another_class(y_true: Any, y_pred: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(keras.ops.abs(y_true), y_pred)


class OwnStep(keras.Sequential):
    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        return super().compute_loss(x, keras.ops.abs(y), y_pred, sample_weight)


ACCEPTED: dict[str, Callable[[], tuple[research.Learner, Batches]]] = {
    "labels": lambda: (classifier(), data(Y)),
    "labels as floats": lambda: (classifier(), data(Y.astype("float32"))),
    "labels as bytes": lambda: (classifier(), data(Y.astype("uint8"))),
    "two classes as booleans": lambda: (classifier(), data(Y > 1)),
    "a column": lambda: (classifier(), data(Y[:, None])),
    "ignored -1": lambda: (classifier(SPARSE(ignore_class=-1)), data(with_label(-1))),
    "ignored -1 as a float": lambda: (classifier(SPARSE(ignore_class=-1)), data(with_label(-1, "float32"))),
    "ignored 255": lambda: (classifier(SPARSE(ignore_class=255)), data(with_label(255))),
    "without weight": lambda: (classifier(), data(with_label(-1), WEIGHTS)),
    "in batches, without weight": lambda: (classifier(), data(with_label(-1), WEIGHTS, kind="batches")),
    "a class without weight": lambda: (
        classifier(),
        from_arrays(X, with_label(-1), batch_size=4, class_weight={-1: 0.0}),
    ),
    "padding": lambda: (classifier(), padded(with_label(-1))),
    "one-hot": lambda: (classifier("categorical_crossentropy", example=ONE_HOT), data(ONE_HOT.y)),
    "one-hot, ce": lambda: (classifier("ce", example=ONE_HOT), data(ONE_HOT.y)),
    "a loss of one's own": lambda: (classifier(of_another_class), data(with_label(-1))),
    "a step of one's own": lambda: (compiled(base=OwnStep), data(with_label(-1))),
    "a loss function": lambda: (own_loss(), data(with_label(-1))),
    "free composition": lambda: (
        research.joint({"one": classifier()}, train=of_positive_labels, evaluate=of_positive_labels),
        data(with_label(-1)),
    ),
}


def own_loss() -> research.Learner:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "softmax")])

    def loss(batch: Any, training: bool) -> Any:
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(keras.ops.abs(batch.y), model(batch.x))), {}

    return research.learner(loss, model, "sgd", example=data(Y).shapes)


def of_positive_labels(steps: Any, state: Any, batch: Any) -> Any:
    return steps["one"](state, batch._replace(y=abs(batch.y)))


@pytest.mark.parametrize("name", ACCEPTED)
def test_labels_that_a_loss_takes_or_that_do_not_count_are_accepted(name: str) -> None:
    check(*ACCEPTED[name]())


@pytest.mark.slow
def test_labels_under_a_keras_mask_are_not_checked() -> None:
    x, y = np.array([[1, 2, 0, 0]] * 8), np.array([[0, 2, -1, -1]] * 8)
    stack = [keras.Input((4,), dtype="int32"), layers.Embedding(5, 3, mask_zero=True)]
    steps = research.supervised(keras.Sequential([*stack, layers.Dense(3, "softmax")]), loss=SPARSE(), optimizer="sgd")
    check(steps, data(y, x=x))
    # The mask ends in the recurrent layer: its labels are checked.
    last = research.supervised(keras.Sequential([*stack, layers.SimpleRNN(3), layers.Dense(3)]), loss=SPARSE(), optimizer="sgd")
    with pytest.raises(research.InvalidArgument, match="y has label -1 in row 5"):
        check(last, data(with_label(-1), x=x))


@pytest.mark.slow
def test_data_on_the_device_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[str] = []
    original = label_module._check
    monkeypatch.setattr(label_module, "_check", lambda *args: (checks.append(args[-1]), original(*args))[1])
    learner, resident, streamed = classifier(), data(Y), data(Y, kind="batches")
    state, _ = research.train(learner, resident, epochs=3, evaluations={"val": resident})
    for _ in range(3):
        research.evaluate(learner, resident, state)
    assert checks == ["train"]
    research.evaluate(learner, streamed, state)
    assert checks == ["train", "evaluate, step 0", "evaluate, step 0", "evaluate, step 1"]


def test_a_learner_by_hand_needs_no_targets() -> None:
    learner = research.Learner(*classifier()[:6])
    assert learner.targets == ()
    check(learner, data(with_label(3)))
