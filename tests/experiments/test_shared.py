"""What experiments share: the digits, their judge, and the training options."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from experiments import _data, _judge
from experiments._config import TrainingOptions

ROOT = Path(__file__).parents[2]


def test_digits_are_split_by_seed_and_no_split_loses_or_repeats_an_image() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    expected = sorted(zip(map(bytes, images.astype(np.uint8)), labels, strict=True))
    tests = []
    for seed in (0, 1):
        splits = _data.load_digits(seed)
        digits = [(image.tobytes(), label) for x, y in splits.values() for image, label in zip(x, y, strict=True)]
        assert sorted(digits) == expected
        tests.append(splits["test"][0])
    assert (tests[0] != tests[1]).any()


def test_signed_batches_are_the_scaled_images_of_unsigned_ones() -> None:
    unsigned, signed = (_data.digit_batches(batch_size=100, seed=3, signed=signed) for signed in (False, True))
    for split in _data.NUM_DIGITS:
        a, b = unsigned[split].batch(1), signed[split].batch(1)
        np.testing.assert_array_equal(b.x, a.x.astype(np.float32) / 8 - 1)
        np.testing.assert_array_equal(b.y, a.y)


def test_held_out_splits_are_read_in_order_and_training_is_shuffled() -> None:
    splits, arrays = _data.digit_batches(batch_size=32, seed=0), _data.load_digits(0)
    for split in ("val", "test"):
        np.testing.assert_array_equal(_data.all_examples(splits[split]).x, arrays[split][0])
    train = _data.all_examples(splits["train"])
    assert (train.x != arrays["train"][0]).any()
    assert sorted(train.y) == sorted(arrays["train"][1])


@pytest.mark.slow
def test_the_judge_is_confident_about_real_digits_and_finds_copies_and_missing_classes() -> None:
    splits = _data.digit_batches(batch_size=32, seed=0, signed=True)
    train, test = _data.all_examples(splits["train"]), _data.all_examples(splits["test"])
    classifier = _judge.digit_classifier()
    real = _judge.judge_samples(test.x, train.x, test.x, classifier)
    assert real["confidence"] == real["confidence_on_test"] > 0.9
    assert (real["classes"], real["novelty"]) == (10, 1.0)
    copies = _judge.judge_samples(train.x[train.y < 9], train.x, test.x, classifier)
    assert copies["novelty"] < 1e-3
    assert copies["smallest_share"] < 0.01
    noise = np.random.default_rng(0).uniform(-1, 1, (180, 8, 8)).astype(np.float32)
    assert _judge.judge_samples(noise, train.x, test.x, classifier)["confidence"] < real["confidence"] - 0.1


@pytest.mark.slow
def test_a_changed_default_keeps_the_help_text_of_the_option(tmp_path: Path) -> None:
    (tmp_path / "options.py").write_text(
        "import dataclasses, tyro\n"
        "from experiments._config import TrainingOptions\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Config(TrainingOptions):\n"
        "    epochs: int = 7\n"
        "tyro.cli(Config)\n"
    )
    command = [sys.executable, str(tmp_path / "options.py"), "--help"]
    completed = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    )
    (line,) = (line for line in completed.stdout.splitlines() if "--epochs" in line and "│" in line)
    assert "Passes over the training data. (default: 7)" in line


def test_steps_limit_the_epochs_and_never_extend_them() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingOptions):
        epochs: int = 3

    assert [Config(steps=steps).num_steps(10) for steps in (None, 7, 50, 0)] == [30, 7, 30, 0]
