"""After an exception or Ctrl-C in `research.fit` a model keeps its weights; wrong arguments raise Keras' own messages."""

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
from cases import CASES
from fit_models import FITS, BatchCallback, all_values, compiled_model, examples, linear_data, small_model, trees_equal
from keras import layers

import research

pytestmark = [pytest.mark.promotes, pytest.mark.slow]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "hook", ["on_epoch_end", "on_train_batch_begin", "on_train_batch_end", "on_test_batch_end", "on_epoch_begin"]
)
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_the_model_keeps_its_weights_if_a_callback_raises(hook: str, error: type[BaseException]) -> None:
    class RaisingCallback(keras.callbacks.Callback):
        pass

    def raise_error(self: Any, number: int, logs: Any = None) -> None:
        if number == (0 if "epoch" in hook else 1):
            raise error("from the callback")

    setattr(RaisingCallback, hook, raise_error)
    model = small_model()
    before = model.get_weights()
    with pytest.raises(error, match="from the callback"):
        research.fit(
            model, *linear_data(), epochs=2, batch_size=8, validation_split=0.5, verbose=0, callbacks=[RaisingCallback()]
        )
    assert all(np.isfinite(value.astype("float64")).all() for value in all_values(model))
    steps = {"on_epoch_begin": 0, "on_train_batch_begin": 1, "on_train_batch_end": 2}.get(hook, 5)
    assert int(model.optimizer.iterations) == steps
    assert trees_equal(before, model.get_weights()) == (steps == 0)
    research.fit(model, *linear_data(), verbose=0)


@pytest.mark.parametrize("good_batches", [0, 2, 5])
@pytest.mark.parametrize("fused", [True, False])
def test_the_model_is_trained_on_the_batches_before_the_data_raised(good_batches: int, fused: bool) -> None:
    def failing_data() -> Iterator[Any]:
        for _ in range(good_batches):
            yield linear_data(8)
        raise OSError("no more data")

    model = small_model()
    callbacks = [] if fused else [BatchCallback()]
    with pytest.raises(OSError, match="no more data"):
        research.fit(model, failing_data(), steps_per_epoch=40, shuffle=False, verbose=0, callbacks=callbacks)
    assert int(model.optimizer.iterations) == good_batches
    assert np.isfinite(model.predict(linear_data()[0], verbose=0)).all()


@pytest.fixture
def default_sigint_handler() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a terminal, whatever runs the tests."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("callbacks", [[], [BatchCallback()]])
def test_the_model_keeps_its_weights_after_ctrl_c_at_any_moment(callbacks: list[Any], default_sigint_handler: None) -> None:
    x, y = linear_data(3000)
    model = small_model()
    options: dict[str, Any] = {"verbose": 0, "batch_size": 8, "validation_split": 0.2, "callbacks": callbacks}
    research.fit(model, x, y, epochs=1, **options)
    rng = np.random.default_rng(0)
    for _ in range(25):
        before = int(model.optimizer.iterations)
        timer = threading.Timer(rng.uniform(0.0, 0.15), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            research.fit(model, x, y, epochs=1000, **options)
        timer.join()
        assert all(np.isfinite(value.astype("float64")).all() for value in all_values(model))
        assert int(model.optimizer.iterations) >= before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def two_output_examples() -> tuple[Any, Any]:
    return examples(CASES["two-outputs"], 2)[:2]


INVALID_CALLS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "uncompiled model": lambda fit: fit(keras.Sequential([keras.Input((4,)), layers.Dense(1)]), *linear_data()),
    "wrong input shape": lambda fit: fit(small_model(), linear_data()[0][:, :2], linear_data()[1]),
    "different lengths": lambda fit: fit(small_model(), linear_data()[0], linear_data()[1][:-1]),
    "wrong sample_weight shape": lambda fit: fit(small_model(), *linear_data(), sample_weight=np.ones((70, 3, 2))),
    "validation_split of a generator": lambda fit: fit(small_model(), (linear_data(8) for _ in range(3)), validation_split=0.5),
    "sample_weight and class_weight": lambda fit: fit(
        small_model(), *linear_data(), sample_weight=np.ones(70), class_weight={0: 1.0}
    ),
    "class_weight with two outputs": lambda fit: fit(
        compiled_model(CASES["two-outputs"]), *two_output_examples(), class_weight={0: 1.0}
    ),
    "y with a generator": lambda fit: fit(small_model(), (linear_data(8) for _ in range(3)), linear_data()[1]),
    "no batch": lambda fit: fit(small_model(), iter(())),
    "validation_freq": lambda fit: fit(small_model(), *linear_data(), validation_split=0.5, validation_freq="often"),
    "wrong target structure": lambda fit: fit(
        compiled_model(CASES["two-outputs"]), two_output_examples()[0], {"score": np.ones((13, 1))}
    ),
}


@pytest.mark.parametrize("name", INVALID_CALLS)
def test_an_invalid_call_raises_the_error_of_keras(name: str) -> None:
    def error(fit: Callable[..., Any]) -> tuple[str, str]:
        keras.utils.set_random_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                INVALID_CALLS[name](fit)
            except Exception as error:
                return type(error).__name__, str(error).replace("_1", "")
        return "", ""

    result, expected = (error(fit) for fit in FITS)
    assert expected[1]
    assert result[0] == expected[0]
    assert result[1].split()[:6] == expected[1].split()[:6]
