"""The text of language models: windows depend on seed and step, whole files are held out, and every read gives the same."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import _text
from research import InvalidArgument

pytestmark = pytest.mark.slow


def test_batches_are_windows_of_the_text_and_depend_on_seed_and_step() -> None:
    train, text = _text.window_batches(16, 64, 8, seed=3)["train"], _text.load_texts()["train"].tobytes()
    batch = train.batch(5)
    assert jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch) == train.shapes
    np.testing.assert_array_equal(batch.x[:, 1:], batch.y[:, :-1])
    windows = np.concatenate([batch.x, batch.y[:, -1:]], axis=1).astype(np.uint8)
    assert all(window.tobytes() in text for window in windows)
    np.testing.assert_array_equal(_text.window_batches(16, 64, 8, seed=3)["train"].batch(5).x, batch.x)
    for other in (train.batch(4), _text.window_batches(16, 64, 8, seed=4)["train"].batch(5)):
        assert (other.x != batch.x).any()


def test_an_epoch_has_the_given_number_of_windows_and_only_full_batches() -> None:
    train = _text.window_batches(16, 20, 8, seed=3)["train"]
    assert (train.steps_per_epoch, train.examples, len(train.batch(2).x)) == (3, 24, 8)


def test_evaluation_windows_do_not_depend_on_the_seed_and_cover_the_held_out_text() -> None:
    val, other_seed = (_text.window_batches(1000, 64, 50, seed)["val"] for seed in (3, 9))
    batches = [val.batch(step) for step in range(val.steps_per_epoch)]
    assert [len(batch.x) for batch in batches] == [50, 50, 31]  # 131 windows of 1,000 bytes
    text = _text.load_texts()["val"].tobytes()
    assert all(row.astype(np.uint8).tobytes() in text for batch in batches for row in batch.y)
    assert text.startswith(batches[0].x[0].astype(np.uint8).tobytes())
    assert text.endswith(batches[-1].y[-1].astype(np.uint8).tobytes())
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(other_seed.batch(step).x, batch.x)
        np.testing.assert_array_equal(val.batch(step + 3).x, batch.x)


def test_held_out_files_are_not_in_the_training_text() -> None:
    train, val = _text.load_files()["train"], _text.load_files()["val"]
    assert not set(train) & set(val)
    assert not set(train.values()) & set(val.values())
    assert 0.02 < sum(map(len, val.values())) / sum(map(len, (train | val).values())) < 0.10
    text = _text.load_texts()["train"].tobytes()
    assert not any(content in text for content in val.values() if len(content) > 200)
    held_out = {name for name in train | val if int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 16 == 0}
    assert held_out == set(val)
    assert not [name for name in train | val if "/test/" in f"/{name}" or "site-packages/" in name]


def test_copies_are_read_once_and_tests_and_packages_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [b"%03d\n" % i * 5000 for i in range(200)]
    for folder in ("", "copies", "test", "json/tests", "site-packages/jax"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for i, source in enumerate(sources):
            (tmp_path / folder / f"m{i}.py").write_bytes(source if folder in ("", "copies") else b"#" + source)
    monkeypatch.setattr(_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    _text.load_files.cache_clear()
    files = _text.load_files()
    _text.load_files.cache_clear()
    assert sorted([*files["train"].values(), *files["val"].values()]) == sources
    assert files["val"]


def test_reading_again_gives_the_same_text() -> None:
    first = {name: text.tobytes() for name, text in _text.load_texts().items()}
    _text.load_texts.cache_clear()
    _text.load_files.cache_clear()
    assert {name: text.tobytes() for name, text in _text.load_texts().items()} == first
    assert list(_text.load_files()["train"]) == sorted(_text.load_files()["train"])


def test_a_python_without_source_files_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    _text.load_files.cache_clear()
    with pytest.raises(InvalidArgument, match="has 0 files of Python's own source"):
        _text.load_files()
