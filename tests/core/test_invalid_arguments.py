"""What can't work is refused while a learner is made, in one line that says what to do."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import research


def model() -> keras.Model:
    return keras.Sequential([keras.Input((2,)), layers.Dense(3)])


def frozen() -> keras.Model:
    made = model()
    made.trainable = False
    return made


@pytest.mark.parametrize(
    ("make", "said"),
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
def test_a_learner_that_can_not_train_is_refused_in_one_line(make: Any, said: str) -> None:
    with pytest.raises(research.Refused) as refused:
        make()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_subclassed_model_is_asked_for_an_example() -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = layers.Dense(3)

        def call(self, x: Any) -> Any:
            return self.head(x)

    with pytest.raises(research.Refused, match=r"pass example=Batch\(x, y\)"):
        research.supervised(Net(), loss="mse")
    built = Net()
    built(np.ones((1, 2), "float32"))
    with pytest.raises(research.Refused, match=r"pass example=Batch\(x, y\)"):
        research.supervised(built, loss="mse")
