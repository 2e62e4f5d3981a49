"""An exported step's predictions as a SavedModel, loaded by TensorFlow alone."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import research  # noqa: I001  (before keras: it chooses the backend)

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.training.portable import export_step, write_saved_model

pytestmark = [pytest.mark.promotes, pytest.mark.filterwarnings("default")]


def test_a_saved_model_predicts_what_the_learner_does(tmp_path: Path) -> None:
    inputs = keras.Input((4,))
    outputs = {"class": keras.layers.Dense(3, "softmax")(inputs), "size": keras.layers.Dense(1)(inputs)}
    learner = research.supervised(keras.Model(inputs, outputs), loss={"class": "categorical_crossentropy", "size": "mse"})
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4)).astype("float32")
    batch = research.Batch(x, {"class": np.eye(3, dtype="float32")[rng.integers(0, 3, 8)], "size": x[:, :1]})
    state = learner.init()
    folder = export_step(learner, state, [batch], tmp_path / "step")
    signature = tf.saved_model.load(str(write_saved_model(folder))).signatures["serving_default"]
    predicted = signature(x=tf.constant(x), y_class=tf.constant(batch.y["class"]), y_size=tf.constant(batch.y["size"]))
    expected = learner.predict(state, batch)
    assert predicted.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(predicted[name], expected[name], rtol=1e-6)
