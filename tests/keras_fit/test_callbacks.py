"""Keras' own callbacks have the same effect on a model, and leave the same files, under `research.fit` as under Keras."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from fit_models import keras_fit
from keras import callbacks as kc
from keras import layers

import research

pytestmark = [pytest.mark.promotes, pytest.mark.slow]
X = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
Y = X.sum(-1, keepdims=True)


def adam_model(**options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.2), layers.Dense(1)])
    model.compile(**{"optimizer": keras.optimizers.Adam(0.05), "loss": "mse", "metrics": ["mae"], **options})
    return model


def adam_with_ema() -> Any:
    return keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.9)


CALLBACKS: dict[str, tuple[Callable[[Path], list[Any]], dict[str, Any]]] = {
    "EarlyStopping": (lambda path: [kc.EarlyStopping("val_loss", patience=1, min_delta=0.5, restore_best_weights=True)], {}),
    "ModelCheckpoint, best": (
        lambda path: [kc.ModelCheckpoint(str(path / "best.weights.h5"), save_best_only=True, save_weights_only=True)],
        {},
    ),
    "ModelCheckpoint, per epoch": (lambda path: [kc.ModelCheckpoint(str(path / "{epoch}-{val_loss:.3f}.keras"))], {}),
    "ModelCheckpoint, per step": (
        lambda path: [
            kc.ModelCheckpoint(str(path / "{epoch}-{batch}-{loss:.4f}.weights.h5"), save_weights_only=True, save_freq=4)
        ],
        {},
    ),
    "LearningRateScheduler": (lambda path: [kc.LearningRateScheduler(lambda epoch, rate: rate * 0.5)], {}),
    "ReduceLROnPlateau": (lambda path: [kc.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=1.0)], {}),
    "CSVLogger": (lambda path: [kc.CSVLogger(str(path / "log.csv"))], {}),
    "TerminateOnNaN": (lambda path: [kc.TerminateOnNaN()], {"optimizer": keras.optimizers.SGD(1e30)}),
    "BackupAndRestore": (lambda path: [kc.BackupAndRestore(str(path / "backup"), delete_checkpoint=False)], {}),
    "BackupAndRestore, per step": (
        lambda path: [kc.BackupAndRestore(str(path / "backup"), save_freq=3, delete_checkpoint=False)],
        {},
    ),
    "SwapEMAWeights": (lambda path: [kc.SwapEMAWeights(swap_on_epoch=True)], {"optimizer": adam_with_ema}),
    "LambdaCallback": (
        lambda path: [
            kc.LambdaCallback(
                on_epoch_end=lambda epoch, logs: (path / f"{epoch}.txt").write_text(repr(sorted(logs.items()))),
                on_train_batch_end=lambda batch, logs: (path / f"batch {batch}.txt").write_text(repr(sorted(logs.items()))),
            )
        ],
        {},
    ),
    "several callbacks": (
        lambda path: [
            kc.CSVLogger(str(path / "log.csv")),
            kc.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.5),
            kc.EarlyStopping("loss", patience=3),
            kc.TerminateOnNaN(),
            kc.History(),
        ],
        {},
    ),
}


def file_contents(path: Path) -> list[Any]:
    """Returns the weights in a file of Keras', or the text of any other."""
    if path.suffix == ".keras":
        return [w.tolist() for w in keras.saving.load_model(path).get_weights()]
    if path.name.endswith(".weights.h5"):
        model = adam_model()
        model.optimizer.build(model.trainable_variables)
        model.load_weights(path)
        return [w.tolist() for w in model.get_weights()]
    return [path.read_text()]


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_has_the_same_effect_as_under_keras(name: str, tmp_path: Path) -> None:
    make_callbacks, options = CALLBACKS[name]

    def train(fit: Callable[..., Any], path: Path) -> Any:
        path.mkdir()
        model = adam_model(**{key: value() if callable(value) else value for key, value in options.items()})
        keras.utils.set_random_seed(1)
        callbacks = make_callbacks(path)
        history = fit(model, X, Y, batch_size=16, epochs=4, validation_split=0.25, verbose=0, callbacks=callbacks)
        learning_rate = float(model.optimizer.learning_rate)
        files = {str(file.relative_to(path)): file_contents(file) for file in sorted(path.rglob("*.*")) if file.is_file()}
        return repr(history.history), history.epoch, learning_rate, [w.tolist() for w in model.get_weights()], files

    result = train(research.fit, tmp_path / "research")
    expected = train(keras_fit, tmp_path / "keras")
    assert repr(result) == repr(expected)  # as text, where NaN equals NaN
    assert result[4] or "logs" not in name


@pytest.mark.parametrize("save_freq", [3, "epoch"])
def test_backup_and_restore_resumes_after_the_process_was_killed(save_freq: Any, tmp_path: Path) -> None:
    class ExitAtStep10(kc.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if int(self.model.optimizer.iterations) == 10:
                raise SystemExit("killed")

    def train(fit: Callable[..., Any], path: Path) -> Any:
        for extra in ([ExitAtStep10()], []):
            model = adam_model()
            keras.utils.set_random_seed(1)
            callbacks = [kc.BackupAndRestore(str(path), save_freq=save_freq), *extra]
            try:
                history = fit(model, X, Y, batch_size=16, epochs=3, verbose=0, callbacks=callbacks)
            except SystemExit:
                continue
        return history.epoch, history.history, [w.tolist() for w in model.get_weights()]

    result = train(research.fit, tmp_path / "research")
    assert result[0][0] == 1
    assert result == train(keras_fit, tmp_path / "keras")
