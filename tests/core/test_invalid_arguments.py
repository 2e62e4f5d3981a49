"""Building a learner raises `InvalidArgument` for arguments that cannot work, with one line that says what to do."""

from types import SimpleNamespace
from typing import Any

import jax
import keras
import numpy as np
import optax
import pytest
from keras import layers

import research

X, Y = np.ones((4, 2), "float32"), np.ones((4, 3), "float32")


def model() -> keras.Model:
    return keras.Sequential([keras.Input((2,)), layers.Dense(3)])


def frozen() -> keras.Model:
    frozen_model = model()
    frozen_model.trainable = False
    return frozen_model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: research.supervised(model(), loss="mse", metrics=["acuracy"]),
            "metrics: Keras knows no 'acuracy'; did you mean 'accuracy'?",
        ),
        (
            lambda: research.supervised(model(), loss="mse", weighted_metrics=["mea"]),
            "weighted_metrics: Keras knows no 'mea'; did you mean ",
        ),
        (lambda: research.supervised(model(), loss="msse"), "loss: Keras knows no 'msse'; did you mean 'mse'?"),
        (lambda: research.supervised(model(), loss="mse", optimizer="adm"), "optimizer: Keras knows no 'adm'; did you mean"),
        (lambda: research.supervised(model(), loss={"other": "mse"}), "losses and metrics do not fit the model's outputs: "),
        (
            lambda: research.supervised(model(), loss="mse", metrics="mae"),
            "losses and metrics do not fit the model's outputs: Expected `metrics`",
        ),
        (lambda: research.supervised(frozen(), loss="mse"), "has no trainable weights"),
        (
            lambda: research.supervised(keras.Sequential([keras.Input((2,)), layers.ReLU()]), loss="mse"),
            "has no trainable weights",
        ),
        (lambda: research.supervised(keras.Sequential([layers.Dense(3)]), loss="mse"), "has no weights yet"),
        (lambda: research.from_keras(model()), "is not compiled"),
    ],
)
def test_a_learner_that_cannot_train_is_refused_in_one_line(build: Any, message: str) -> None:
    with pytest.raises(research.InvalidArgument) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_subclassed_model_needs_an_example() -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = layers.Dense(3)

        def call(self, x: Any) -> Any:
            return self.head(x)

    with pytest.raises(research.InvalidArgument, match=r"pass example=Batch\(x, y\)"):
        research.supervised(Net(), loss="mse")
    called = Net()
    called(np.ones((1, 2), "float32"))
    with pytest.raises(research.InvalidArgument, match=r"pass example=Batch\(x, y\)"):
        research.supervised(called, loss="mse")


class RunningScale(keras.losses.Loss):
    """A loss that divides by a running mean of itself, in a variable that no model tracks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = keras.Variable(1.0, name="scale")

    def call(self, y_true: Any, y_pred: Any) -> Any:
        error = keras.ops.mean((y_true - y_pred) ** 2, axis=-1)
        self.scale.assign(0.9 * self.scale + 0.1 * keras.ops.mean(error))
        return error / self.scale


class Hidden(layers.Layer):
    """A layer whose Dropout is in a container that Keras does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.box = SimpleNamespace(dropout=layers.Dropout(0.5))

    def call(self, x: Any, training: bool = False) -> Any:
        return self.box.dropout(x, training=training)


@pytest.mark.parametrize(
    ("network", "loss", "path"),
    [(lambda: model(), RunningScale, "scale"), (lambda: keras.Sequential([model(), Hidden()]), lambda: "mse", "seed_generator")],
)
def test_an_assignment_that_would_be_lost_is_refused(network: Any, loss: Any, path: str) -> None:
    learner = research.supervised(network(), loss=loss(), optimizer="sgd", example=research.Batch(X, Y))
    with pytest.raises(research.InvalidArgument, match=rf"assigns to '.*{path}.*', which the model does not track"):
        jax.eval_shape(learner.train, learner.init(), research.Batch(X, Y))


OPTIMIZERS = "expected a name, a Keras optimizer such as keras.optimizers.Adam(), or one of optax such as optax.adam(1e-3)."
BATCH = research.Batch(X, Y)


def mse_learner() -> research.Learner:
    return research.supervised(model(), loss="mse")


def zero_loss(batch: Any, training: bool) -> Any:
    return keras.ops.zeros(()), {}


class Returns(keras.Model):
    """A model that returns something that is no array."""

    def __init__(self, value: Any) -> None:
        super().__init__(name="returns")
        self.value, self.dense = value, layers.Dense(3)

    def call(self, x: Any) -> Any:
        self.dense(x)
        return self.value


def returning(value: Any) -> Any:
    return lambda: research.supervised(Returns(value), loss="mse", example=BATCH)


WRONG_TYPES: dict[str, tuple[Any, str]] = {
    "no model": (lambda: research.supervised(None, loss="mse"), "the model is None, expected a keras.Model."),
    "a function for a model": (
        lambda: research.supervised(zero_loss, loss="mse"),
        "the model is a function, expected a keras.Model.",
    ),
    "a learner for a model": (
        lambda: research.supervised(mse_learner(), loss="mse"),
        "the model is a Learner, expected a keras.Model.",
    ),
    "from_keras of a number": (
        lambda: research.from_keras(3),
        "from_keras: the model is an int, expected a compiled keras.Model.",
    ),
    "an array as example": (
        lambda: research.supervised(model(), loss="mse", example=X),
        "example is an array, expected a batch of your data, as arrays or shapes: research.Batch(x, y).",
    ),
    "a tuple as example": (
        lambda: research.supervised(model(), loss="mse", example=(X, Y)),
        "example is a tuple, expected a batch of your data, as arrays or shapes: research.Batch(x, y).",
    ),
    "a model that returns None": (returning(None), "model 'returns' returns None, expected arrays: see its `call`."),
    "a model that returns text": (returning("logits"), "model 'returns' returns a str, expected arrays: see its `call`."),
    "a model that returns a number": (returning(3.0), "model 'returns' returns a float, expected arrays: see its `call`."),
    "nothing to minimise": (
        lambda: research.train(research.supervised(model()), research.from_arrays(X, Y, batch_size=2), steps=1),
        "model 'sequential' has nothing to minimise: pass loss=, or call add_loss in a layer.",
    ),
    "no optimizer": (lambda: research.supervised(model(), loss="mse", optimizer=None), f"optimizer is None, {OPTIMIZERS}"),
    "a rate": (lambda: research.supervised(model(), loss="mse", optimizer=0.1), f"optimizer is a float, {OPTIMIZERS}"),
    "a class": (
        lambda: research.supervised(model(), loss="mse", optimizer=keras.optimizers.Adam),
        f"optimizer is a type, {OPTIMIZERS}",
    ),
    "optax without a rate": (
        lambda: research.supervised(model(), loss="mse", optimizer=optax.adam),
        "optimizer: the function was called with the variables and returned an optimizer, expected a research.Update. "
        "Give the optimizer itself, such as keras.optimizers.Adam() or optax.adam(1e-3).",
    ),
    "no optimizer for a loss": (
        lambda: research.learner(zero_loss, model(), None, example=BATCH),
        f"optimizer is None, {OPTIMIZERS}",
    ),
    "no gradient transform": (
        lambda: research.supervised(model(), loss="mse", gradient_transform=None),
        "supervised: gradient_transform is None, expected a function from a gradient to a gradient.",
    ),
    "no loss": (
        lambda: research.learner(None, model(), example=BATCH),
        "learner: the loss is None, expected a function loss(batch, training) that returns (loss, scalars).",
    ),
    "a loss by name": (
        lambda: research.learner("mse", model(), example=BATCH),
        "learner: the loss is a str, expected a function loss(batch, training) that returns (loss, scalars).",
    ),
    "a model as loss": (
        lambda: research.learner(model(), model(), example=BATCH),
        "learner: the loss is a model; pass a function that calls it, or use research.supervised(model).",
    ),
    "a function as model": (
        lambda: research.learner(zero_loss, zero_loss, example=BATCH),
        "learner: models holds a function; expected models, layers, seed generators, variables or metrics.",
    ),
    "no models": (
        lambda: research.learner(zero_loss, [], example=BATCH),
        "learner: nothing in `models` has trainable weights; expected a layer or model with weights and trainable=True.",
    ),
    "joint of a list": (
        lambda: research.joint([mse_learner()]),
        "joint: the first argument is a list, expected a dict from names to learners.",
    ),
    "joint of models": (
        lambda: research.joint({"a": model()}),
        "joint: 'a' is a Sequential, expected a research.Learner: other state belongs in `extra`.",
    ),
    "joint of nothing": (
        lambda: research.joint({}),
        "joint: there is no learner; expected learners and extra entries by names of their own.",
    ),
    "ema of a model": (
        lambda: research.transforms.ema(model(), 0.9),
        "ema: the learner is a Sequential, expected a research.Learner: research.supervised(model, loss=...).",
    ),
    "a decay as text": (
        lambda: research.transforms.ema(mse_learner(), "0.9"),
        "ema: the decay is a str, expected a number from 0 to less than 1, such as 0.999.",
    ),
    "a decay of 1": (
        lambda: research.transforms.ema(mse_learner(), 1.0),
        "ema: the decay is 1.0; expected a number from 0 to less than 1, such as 0.999.",
    ),
    "no parts": (
        lambda: research.transforms.accumulate(lambda state, batch: None, 0),
        "accumulate: parts is 0, expected a positive integer.",
    ),
    "half a part": (
        lambda: research.transforms.accumulate(lambda state, batch: None, 1.5),
        "accumulate: parts is a float, expected a positive integer.",
    ),
    "write_back, swapped": (
        lambda: research.write_back(model(), mse_learner().init()),
        "write_back: the target is a State, expected a learner or a model: write_back(state, target).",
    ),
    "write_back of a list": (
        lambda: research.write_back([X], model()),
        "write_back: the state is a list, expected a research.State of that model: research.part(learner, state, model).",
    ),
    "a part of a state": (
        lambda: research.part(mse_learner().init(), mse_learner(), model()),
        "part: the learner is a State, expected a research.Learner: part(learner, state, model).",
    ),
    "a part by name": (
        lambda: research.part(mse_learner(), mse_learner().init(), "encoder"),
        "part: the model is a str, expected a keras.Model: part(learner, state, model).",
    ),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_one_line_says_what_was_expected(case: str, as_users_run_it: None) -> None:
    keras.utils.clear_session()  # numbers automatic names anew
    call, message = WRONG_TYPES[case]
    with pytest.raises(research.InvalidArgument) as error:
        call()
    assert str(error.value) == message
