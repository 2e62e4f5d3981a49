"""Two inputs and two outputs, by name and by position, equal Keras; one input alone is not enough."""

from typing import Any

import jax
import keras
import numpy as np
import pytest

import research
from experiments import image_series
from experiments.image_series import Config

pytestmark = pytest.mark.slow

SMALL = {"batch_size": 16, "units": 16}


def train(config: Config, steps: int = 3) -> tuple[research.Learner, research.State, dict[str, Any]]:
    learner, batches = image_series.build(config), image_series.data(config)["train"]
    state, step = learner.init(), jax.jit(learner.train)
    for i in range(steps):
        state, logs = step(state, batches.batch(i))
    return learner, state, {name: float(value) for name, value in logs.items()}


def weights_by_name(learner: research.Learner, state: research.State) -> dict[str, Any]:
    """Independent of the order of the outputs, which decides the order of the weights."""
    return dict(zip(learner.names.trainable, state.trainable, strict=True))


def network(config: Config) -> keras.Model:
    keras.utils.set_random_seed(config.seed)
    return image_series.network(config)


@pytest.mark.sample(2)
@pytest.mark.parametrize("score_loss", ["mse", "none"])
@pytest.mark.parametrize("by", ["name", "position"])
def test_three_steps_equal_keras_train_on_batch_bit_for_bit(by: str, score_loss: str) -> None:
    config = Config(by=by, score_loss=score_loss, score_weight=0.25, **SMALL)
    model, score = network(config), None if score_loss == "none" else "mse"
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    compile_options = {
        "name": {
            "loss": {"score": score, "class": crossentropy},
            "loss_weights": {"score": 0.25, "class": 1.0},
            "metrics": {"score": ["mae"], "class": ["accuracy"]},
        },
        "position": {"loss": [score, crossentropy], "loss_weights": [0.25, 1.0], "metrics": [["mae"], ["accuracy"]]},
    }
    model.compile(optimizer=keras.optimizers.Adam(1e-3), **compile_options[by])
    batches = image_series.data(config)["train"]
    for step in range(3):
        model.train_on_batch(*batches.batch(step)[:2])
    _, state, logs = train(config)
    for value, variable in zip(state.trainable, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(value, variable.value, err_msg=variable.path)
    for value, variable in zip(state.optimizer, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(value, variable.value, err_msg=variable.path)
    assert ("score_loss" in logs) == (score is not None)


@pytest.mark.parametrize("score_loss", ["mse", "none"])
def test_lists_and_dictionaries_give_the_same_numbers(score_loss: str) -> None:
    name, position = (Config(by=by, score_loss=score_loss, score_weight=0.25, **SMALL) for by in ("name", "position"))
    name_learner, name_state, name_logs = train(name)
    position_learner, position_state, position_logs = train(position)
    assert name_logs == position_logs
    name_weights, position_weights = weights_by_name(name_learner, name_state), weights_by_name(position_learner, position_state)
    assert sorted(name_weights) == sorted(position_weights)
    for path, value in name_weights.items():
        np.testing.assert_array_equal(value, position_weights[path], err_msg=path)
    x = image_series.data(name)["test"].batch(0).x
    outputs = image_series.models(name, name_state)["model"].predict_on_batch(x)
    output_list = image_series.models(position, position_state)["model"].predict_on_batch(list(x.values()))
    jax.tree.map(np.testing.assert_array_equal, [outputs["score"], outputs["class"]], output_list)


@pytest.mark.parametrize(("score_loss", "all_change"), [("none", False), ("mse", True)])
def test_an_output_without_a_loss_keeps_its_weights_bit_for_bit(score_loss: str, all_change: bool) -> None:
    config = Config(score_loss=score_loss, **SMALL)
    learner, state, _ = train(config)
    after, before = weights_by_name(learner, state), weights_by_name(learner, learner.init())
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if all_change or "score/" not in path}


@pytest.mark.parametrize("inputs", ["image", "series"])
def test_with_one_input_network_and_data_have_only_that_one(inputs: str) -> None:
    config = Config(inputs=inputs, **SMALL)
    assert list(image_series.data(config)["train"].batch(0).x) == [inputs]
    assert list(network(config).input) == [inputs]


def test_targets_are_independent_of_each_input_alone_and_determined_by_both() -> None:
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    digit_by_image = {image.astype(np.uint8).tobytes(): digit for image, digit in zip(images, digits, strict=True)}
    x, y = image_series.make_pairs(seed=0)["train"]
    digit = np.array([digit_by_image[image.tobytes()] for image in x["image"]])
    # A wave's frequency is the maximum of its spectrum; all sensors measure the same wave.
    spectrum = np.abs(np.fft.rfft(x["series"], axis=1)).sum(2)[:, 1 : image_series.CLASSES + 1]
    frequency = spectrum.argmax(1)
    np.testing.assert_array_equal((digit + frequency) % image_series.CLASSES, y["class"])
    for feature, values in ((digit, 10), (frequency, image_series.CLASSES)):
        counts = np.zeros((values, image_series.CLASSES))
        np.add.at(counts, (feature, y["class"]), 1)
        expected = counts.sum(1, keepdims=True) / image_series.CLASSES
        chi_squared = ((counts - expected) ** 2 / expected).sum(1)
        assert (chi_squared < 25).all()  # 4 degrees of freedom: probability of more is one in 20,000

    ink, loudness, score = x["image"].mean((1, 2, 3)), x["series"].std((1, 2)), y["score"][:, 0]
    product = (ink - ink.mean()) * (loudness - loudness.mean())
    correlations = [abs(np.corrcoef(score, feature)[0, 1]) for feature in (ink, loudness, product)]
    assert correlations[0] < 0.05
    assert correlations[1] < 0.05
    assert correlations[2] > 0.95


def test_no_image_is_in_two_splits() -> None:
    splits = image_series.make_pairs(seed=3)
    assert {name: len(x["image"]) for name, (x, _) in splits.items()} == {"train": 5748, "val": 720, "test": 720}
    images = [{image.tobytes() for image in x["image"]} for x, _ in splits.values()]
    assert len(set.union(*images)) == sum(map(len, images))


@pytest.mark.complete
def test_both_inputs_together_are_learned_and_one_alone_stays_at_chance() -> None:
    logs = {}
    for inputs in ("both", "image", "series"):
        config = Config(inputs=inputs, epochs=6)
        splits, learner = image_series.data(config), image_series.build(config)
        state, _ = research.train(learner, splits["train"], epochs=config.epochs)
        logs[inputs] = research.evaluate(learner, splits["test"], state)
    assert logs["both"]["class_accuracy"] > 0.6
    assert logs["both"]["score_loss"] < 0.4
    for alone in ("image", "series"):
        assert logs[alone]["class_accuracy"] < 0.3
        assert logs[alone]["score_loss"] > 0.8
