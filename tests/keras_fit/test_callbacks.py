"""Keras' own callbacks, unchanged, under `research.fit`: they do to a model, and leave on disk, what they do under Keras."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import callbacks as of
from keras import layers

import research

pytestmark = [pytest.mark.promotes, pytest.mark.slow]
X = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
Y = X.sum(-1, keepdims=True)


def model(**compiled: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.2), layers.Dense(1)])
    net.compile(**{"optimizer": keras.optimizers.Adam(0.05), "loss": "mse", "metrics": ["mae"], **compiled})
    return net


def averaged() -> Any:
    return keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.9)


CALLBACKS: dict[str, tuple[Callable[[Path], list[Any]], dict[str, Any]]] = {
    "EarlyStopping": (lambda path: [of.EarlyStopping("val_loss", patience=1, min_delta=0.5, restore_best_weights=True)], {}),
    "ModelCheckpoint, best": (
        lambda path: [of.ModelCheckpoint(str(path / "best.weights.h5"), save_best_only=True, save_weights_only=True)],
        {},
    ),
    "ModelCheckpoint, by epoch": (lambda path: [of.ModelCheckpoint(str(path / "{epoch}-{val_loss:.3f}.keras"))], {}),
    "ModelCheckpoint, by step": (
        lambda path: [
            of.ModelCheckpoint(str(path / "{epoch}-{batch}-{loss:.4f}.weights.h5"), save_weights_only=True, save_freq=4)
        ],
        {},
    ),
    "LearningRateScheduler": (lambda path: [of.LearningRateScheduler(lambda epoch, rate: rate * 0.5)], {}),
    "ReduceLROnPlateau": (lambda path: [of.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=1.0)], {}),
    "CSVLogger": (lambda path: [of.CSVLogger(str(path / "log.csv"))], {}),
    "TerminateOnNaN": (lambda path: [of.TerminateOnNaN()], {"optimizer": keras.optimizers.SGD(1e30)}),
    "BackupAndRestore": (lambda path: [of.BackupAndRestore(str(path / "backup"), delete_checkpoint=False)], {}),
    "BackupAndRestore, by step": (
        lambda path: [of.BackupAndRestore(str(path / "backup"), save_freq=3, delete_checkpoint=False)],
        {},
    ),
    "SwapEMAWeights": (lambda path: [of.SwapEMAWeights(swap_on_epoch=True)], {"optimizer": averaged}),
    "LambdaCallback": (
        lambda path: [
            of.LambdaCallback(
                on_epoch_end=lambda epoch, logs: (path / f"{epoch}.txt").write_text(repr(sorted(logs.items()))),
                on_train_batch_end=lambda batch, logs: (path / f"batch {batch}.txt").write_text(repr(sorted(logs.items()))),
            )
        ],
        {},
    ),
    "all at once": (
        lambda path: [
            of.CSVLogger(str(path / "log.csv")),
            of.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.5),
            of.EarlyStopping("loss", patience=3),
            of.TerminateOnNaN(),
            of.History(),
        ],
        {},
    ),
}


def weights_in(path: Path) -> list[Any]:
    if path.suffix == ".keras":
        return [w.tolist() for w in keras.saving.load_model(path).get_weights()]
    if path.name.endswith(".weights.h5"):
        net = model()
        net.optimizer.build(net.trainable_variables)
        net.load_weights(path)
        return [w.tolist() for w in net.get_weights()]
    return [path.read_text()]


@pytest.mark.parametrize("name", CALLBACKS)
def test_it_does_what_it_does_under_keras(name: str, tmp_path: Path) -> None:
    made, compiled = CALLBACKS[name]

    def trained(fit: Callable[..., Any], path: Path) -> Any:
        path.mkdir()
        net = model(**{key: value() if callable(value) else value for key, value in compiled.items()})
        keras.utils.set_random_seed(1)
        fitted = fit(net, X, Y, batch_size=16, epochs=4, validation_split=0.25, verbose=0, callbacks=made(path))
        rate = float(net.optimizer.learning_rate)
        files = {str(file.relative_to(path)): weights_in(file) for file in sorted(path.rglob("*.*")) if file.is_file()}
        return repr(fitted.history), fitted.epoch, rate, [w.tolist() for w in net.get_weights()], files

    got = trained(research.fit, tmp_path / "ours")
    wanted = trained(keras.Model.fit, tmp_path / "theirs")
    assert repr(got) == repr(wanted)  # as text: NaN is NaN
    assert got[4] or "logs" not in name


@pytest.mark.parametrize("every", [3, "epoch"])
def test_a_backup_goes_on_where_it_was_when_the_process_had_died(every: Any, tmp_path: Path) -> None:
    class Dying(of.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if int(self.model.optimizer.iterations) == 10:
                raise SystemExit("killed")

    def trained(fit: Callable[..., Any], path: Path) -> Any:
        backup = {"backup_dir": str(path), "save_freq": every}
        for last in ([Dying()], []):
            net = model()
            keras.utils.set_random_seed(1)
            try:
                history = fit(net, X, Y, batch_size=16, epochs=3, verbose=0, callbacks=[of.BackupAndRestore(**backup), *last])
            except SystemExit:
                continue
        return history.epoch, history.history, [w.tolist() for w in net.get_weights()]

    got = trained(research.fit, tmp_path / "ours")
    assert got[0][0] == 1
    assert got == trained(keras.Model.fit, tmp_path / "theirs")
