"""Two inputs and two outputs, by name and by position: Keras' numbers, and nothing learned where there is nothing to learn."""

from typing import Any

import jax
import keras
import numpy as np
import pytest

import research
from experiments import image_series
from experiments.image_series import Config

pytestmark = pytest.mark.slow

SLOW = pytest.mark.slow
SMALL = {"batch_size": 16, "units": 16}


def trained(config: Config, steps: int = 3) -> tuple[research.Learner, research.State, dict[str, Any]]:
    learner, batches = image_series.build(config), image_series.data(config)["train"]
    state, step = learner.init(), jax.jit(learner.train)
    for i in range(steps):
        state, logs = step(state, batches.batch(i))
    return learner, state, {name: float(value) for name, value in logs.items()}


def weights(learner: research.Learner, state: research.State) -> dict[str, Any]:
    """By name: with outputs in another order, weights come in another order."""
    return dict(zip(learner.names.trainable, state.trainable, strict=True))


def fresh(config: Config) -> keras.Model:
    keras.utils.set_random_seed(config.seed)
    return image_series.network(config)


@pytest.mark.parametrize("score_loss", ["mse", pytest.param("none", marks=SLOW)])
@pytest.mark.parametrize("by", ["name", pytest.param("position", marks=SLOW)])
def test_three_steps_equal_keras_train_on_batch_bit_for_bit(by: str, score_loss: str) -> None:
    config = Config(by=by, score_loss=score_loss, score_weight=0.25, **SMALL)
    model, score = fresh(config), None if score_loss == "none" else "mse"
    one_of_five = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    asked = {
        "name": {
            "loss": {"score": score, "class": one_of_five},
            "loss_weights": {"score": 0.25, "class": 1.0},
            "metrics": {"score": ["mae"], "class": ["accuracy"]},
        },
        "position": {"loss": [score, one_of_five], "loss_weights": [0.25, 1.0], "metrics": [["mae"], ["accuracy"]]},
    }
    model.compile(optimizer=keras.optimizers.Adam(1e-3), **asked[by])
    batches = image_series.data(config)["train"]
    for step in range(3):
        model.train_on_batch(*batches.batch(step)[:2])
    _, state, logs = trained(config)
    for got, wanted in zip(state.trainable, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(got, wanted.value, err_msg=wanted.path)
    for got, wanted in zip(state.optimizer, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(got, wanted.value, err_msg=wanted.path)
    assert ("score_loss" in logs) == (score is not None)


@pytest.mark.parametrize("score_loss", ["mse", pytest.param("none", marks=SLOW)])
def test_lists_give_the_numbers_that_dictionaries_give(score_loss: str) -> None:
    name, position = (Config(by=by, score_loss=score_loss, score_weight=0.25, **SMALL) for by in ("name", "position"))
    (learner, by_name, logs), (other, by_position, others) = trained(name), trained(position)
    assert logs == others
    found, listed = weights(learner, by_name), weights(other, by_position)
    assert sorted(found) == sorted(listed)
    for where, value in found.items():
        np.testing.assert_array_equal(value, listed[where], err_msg=where)
    x = image_series.data(name)["test"].batch(0).x
    outputs = image_series.models(name, by_name)["model"].predict_on_batch(x)
    in_order = image_series.models(position, by_position)["model"].predict_on_batch(list(x.values()))
    jax.tree.map(np.testing.assert_array_equal, [outputs["score"], outputs["class"]], in_order)


@pytest.mark.parametrize(("score_loss", "moves"), [("none", False), pytest.param("mse", True, marks=SLOW)])
def test_an_output_without_a_loss_keeps_its_weights_to_the_bit(score_loss: str, moves: bool) -> None:
    config = Config(score_loss=score_loss, **SMALL)
    learner, state, _ = trained(config)
    after, before = weights(learner, state), weights(learner, learner.init())
    changed = {where for where in before if not np.array_equal(before[where], after[where])}
    assert changed == {where for where in before if moves or "score/" not in where}


@pytest.mark.parametrize("inputs", ["image", "series"])
def test_with_one_input_the_network_and_the_data_have_no_other(inputs: str) -> None:
    config = Config(inputs=inputs, **SMALL)
    assert list(image_series.data(config)["train"].batch(0).x) == [inputs]
    assert list(fresh(config).input) == [inputs]


def test_what_is_asked_needs_both_inputs_and_both_are_enough() -> None:
    from sklearn.datasets import load_digits

    images, numbers = load_digits(return_X_y=True)
    digit_of = {image.astype(np.uint8).tobytes(): number for image, number in zip(images, numbers, strict=True)}
    x, y = image_series.pairs(seed=0)["train"]
    digit = np.array([digit_of[image.tobytes()] for image in x["image"]])
    # A wave's frequency is where its spectrum is highest; the sensors hold the same wave.
    spectrum = np.abs(np.fft.rfft(x["series"], axis=1)).sum(2)[:, 1 : image_series.CLASSES + 1]
    frequency = spectrum.argmax(1)
    np.testing.assert_array_equal((digit + frequency) % image_series.CLASSES, y["class"])
    for alone, kinds in ((digit, 10), (frequency, image_series.CLASSES)):
        table = np.zeros((kinds, image_series.CLASSES))
        np.add.at(table, (alone, y["class"]), 1)
        expected = table.sum(1, keepdims=True) / image_series.CLASSES
        assert (((table - expected) ** 2 / expected).sum(1) < 25).all()  # chi-squared of 4 degrees of freedom: one in 20,000

    ink, loudness, score = x["image"].mean((1, 2, 3)), x["series"].std((1, 2)), y["score"][:, 0]
    product = (ink - ink.mean()) * (loudness - loudness.mean())
    correlations = [abs(np.corrcoef(score, each)[0, 1]) for each in (ink, loudness, product)]
    assert correlations[0] < 0.05
    assert correlations[1] < 0.05
    assert correlations[2] > 0.95


def test_no_image_is_in_two_splits() -> None:
    splits = image_series.pairs(seed=3)
    assert {name: len(x["image"]) for name, (x, _) in splits.items()} == {"train": 5748, "val": 720, "test": 720}
    held = [{image.tobytes() for image in x["image"]} for x, _ in splits.values()]
    assert len(set.union(*held)) == sum(map(len, held))


@SLOW
def test_both_inputs_are_learned_from_and_one_alone_stays_at_chance() -> None:
    found = {}
    for inputs in ("both", "image", "series"):
        config = Config(inputs=inputs, epochs=6)
        splits, learner = image_series.data(config), image_series.build(config)
        state, _ = research.train(learner, splits["train"], epochs=config.epochs)
        found[inputs] = research.evaluate(learner, splits["test"], state)
    assert found["both"]["class_accuracy"] > 0.6
    assert found["both"]["score_loss"] < 0.4
    for alone in ("image", "series"):
        assert found[alone]["class_accuracy"] < 0.3
        assert found[alone]["score_loss"] > 0.8
