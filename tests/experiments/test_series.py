"""Time series: the archive's files and their splits, the fully convolutional network, what speaks for a class."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import jax
import numpy as np
import pytest

import research
from experiments import _data, _plots, _ucr, series

NAMES = list(_ucr.DATA_SETS)
needs_aeon = pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="no aeon: pip install --no-deps aeon")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package aeon that can't be imported, with files of the sizes in the table: noise, and a bump where its class has it."""
    rng = np.random.default_rng(0)
    for name, data_set in _ucr.DATA_SETS.items():
        folder = tmp_path / "aeon" / "datasets" / "data" / name
        folder.mkdir(parents=True)
        labels = list(data_set.train)
        trained = [label for label, count in data_set.train.items() for _ in range(count)]
        tested = [labels[i % len(labels)] for i in range(data_set.test)]
        for split, column in (("TRAIN", trained), ("TEST", tested)):
            lines = []
            for label in rng.permutation(column):
                values = rng.normal(0, 0.3, data_set.length)
                bump = labels.index(label) * data_set.length // len(labels)
                values[bump : bump + 6] += 2
                lines.append(",".join(f"{value:.4g}" for value in values) + f":{label}\n")
            (folder / f"{name}_{split}.ts").write_text(f"#made up\n@problemName {name}\n@data\n{''.join(lines)}")
    (tmp_path / "aeon" / "__init__.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_labels_of_a_file_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    path.write_bytes(b"#of three labels\r\n@classLabel true b a -1\r\n@data\r\n1,2:b\r\n-3.5E-2,4:-1\r\n5,6:a\r\n7,8:b\r\n")
    x, y = _ucr.parse_ts(path.read_text())
    np.testing.assert_array_equal(x, np.array([[1, 2], [-3.5e-2, 4], [5, 6], [7, 8]], np.float32))
    assert (x.dtype, y.dtype, y.tolist()) == (np.float32, np.int32, [2, 0, 1, 2])


@pytest.mark.usefixtures("archive")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("held_out", [0, 5])
def test_val_has_as_many_training_series_of_each_class_and_train_the_others(name: str, held_out: int) -> None:
    files, splits = _ucr.read_series(name), series.data(series.Config(data=name, held_out=held_out))
    loaded = {split: _data.all_examples(data) for split, data in splits.items()}  # raises an error if sizes are not as promised
    np.testing.assert_array_equal(loaded["test"].x, files["test"][0])
    np.testing.assert_array_equal(loaded["test"].y, files["test"][1])

    def rows(*parts: np.ndarray) -> list[list[float]]:
        return sorted(np.concatenate(parts).tolist())

    if held_out:
        assert np.bincount(loaded["val"].y).tolist() == [held_out] * len(_ucr.DATA_SETS[name].train)
        assert rows(loaded["train"].x, loaded["val"].x) == rows(files["train"][0])
        other_seed = series.data(series.Config(data=name, held_out=held_out, seed=1))["val"]
        assert rows(loaded["val"].x) != rows(_data.all_examples(other_seed).x)
    else:
        assert rows(loaded["train"].x) == rows(loaded["val"].x) == rows(files["train"][0])


def test_as_many_series_as_a_class_has_cannot_be_held_out() -> None:
    series.Config(data="ArrowHead", held_out=11)
    with pytest.raises(ValueError, match="ArrowHead has a class of 12"):
        series.Config(data="ArrowHead", held_out=12)


@pytest.mark.parametrize("installed", [False, True])
def test_without_the_files_one_line_says_what_to_install(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleSpec("aeon", None, is_package=True)
    package.submodule_search_locations = ["/nowhere/aeon"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: package if installed else None)
    splits = series.data(series.Config())  # shapes and sizes need no files
    with pytest.raises(ModuleNotFoundError, match=r"^no aeon, .* series GunPoint: pip install --no-deps aeon$"):
        splits["train"].batch(0)


@needs_aeon
@pytest.mark.parametrize(
    ("name", "published"), list(zip(NAMES, (0.913, 0.955, 0.800), strict=True))
)  # timeseriesclassification.com
def test_files_are_as_in_the_table_standardised_and_as_hard_as_published(name: str, published: float) -> None:
    files, data_set = _ucr.read_series(name), _ucr.DATA_SETS[name]
    assert np.bincount(files["train"][1]).tolist() == list(data_set.train.values())
    assert files["test"][0].shape == (data_set.test, data_set.length)
    for x, _ in files.values():
        np.testing.assert_allclose(x.mean(1), 0, atol=1e-6)
        np.testing.assert_allclose(x.std(1, ddof=1), 1, rtol=1e-5)
    assert round(series.nearest_neighbour(files["train"], files["test"]), 3) == published


@pytest.fixture(scope="module")
def noisy() -> tuple[series.Config, research.Learner, research.State]:
    """A small network whose weights and averages are random, biases too."""
    config, rng = series.Config(data="ArrowHead", channels=6), np.random.default_rng(1)
    learner = series.build(config)
    state = learner.init()
    noise = [np.abs(rng.normal(1, 0.5, leaf.shape)).astype(np.float32) for leaf in state.non_trainable]
    weights = [leaf + rng.normal(0, 0.5, leaf.shape).astype(np.float32) for leaf in state.trainable]
    return config, learner, state._replace(trainable=weights, non_trainable=noise)


def test_maps_averaged_over_time_and_the_bias_are_the_logits(
    noisy: tuple[series.Config, research.Learner, research.State],
) -> None:
    config, learner, state = noisy
    x = np.random.default_rng(0).normal(size=(5, 251)).astype(np.float32)
    model = series.models(config, state)["model"]
    maps, bias = series.activation_maps(model, x), np.asarray(model.layers[-1].bias)
    assert maps.shape == (5, 251, 3)
    assert np.abs(bias).max() > 0.1
    logits = jax.jit(learner.predict)(state, research.Batch(x))
    np.testing.assert_allclose(maps.mean(1) + bias, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("archive")
def test_the_picture_counts_what_is_right_and_colours_by_the_margin(
    noisy: tuple[series.Config, research.Learner, research.State],
) -> None:
    config, learner, state = noisy
    splits = series.data(config)
    figure = series.pictures(config, learner, state, splits)["evidence"]
    logits, y = research.predict(learner, splits["test"], state), _data.all_examples(splits["test"]).y
    panels = [axes for axes in figure.axes if axes.get_title()]
    for label, axes in enumerate(axes for axes in panels if "wrong" in axes.get_title()):
        right = int(np.sum(logits[y == label].argmax(-1) == label))
        wrong = int(np.sum(y == label)) - right
        assert axes.get_title() == f"class {label}: {right} right (blue), {wrong} wrong (red)"
        colours = [line.get_color() for line in axes.lines]
        assert (colours.count(_plots.BLUE), colours.count(_plots.RED)) == (right, wrong)
    # The most certain series: its evidence, averaged over time, is its margin over the mean of the others, but for the bias.
    own = np.flatnonzero(y == 0)
    best = logits[own[np.argmax(logits[own, 0] - logits[own, 1:].max(-1))]]
    bias = np.asarray(series.models(config, state)["model"].layers[-1].bias)
    place = int(np.argmax(best))
    difference = (best - bias)[place] - np.delete(best - bias, place).mean()
    drawn = panels[0].collections[0].get_array()
    assert drawn.shape == (250,)  # the mean of two neighbours for the line between them: the ends count half
    np.testing.assert_allclose(drawn.mean(), difference, rtol=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("archive")
def test_training_raises_the_accuracy_on_test_series() -> None:
    config = series.Config(data="ItalyPowerDemand", channels=8, learning_rate=1e-2, steps=60)
    learner, splits = series.build(config), series.data(config)
    before = research.evaluate(learner, splits["test"], learner.init())["accuracy"]
    state, _ = research.train(learner, splits["train"], steps=config.steps)
    assert before < 0.7
    assert research.evaluate(learner, splits["test"], state)["accuracy"] > 0.95
