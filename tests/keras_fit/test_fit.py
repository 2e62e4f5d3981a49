"""`research.fit` and its kin against Keras' own methods: the same numbers, callbacks and messages; a model that stays whole."""

import inspect
import itertools
import os
import pickle
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
from cases import CASES, SIZE, Case
from keras import layers
from watching import reads

import research
from research.callbacks import Logs
from research.fit import evaluate as fit_evaluate
from research.fit import predict as fit_predict
from research.transforms import fuse, loops_well

METHODS: dict[str, Any] = {
    "fit": research.fit,
    "evaluate": fit_evaluate,
    "predict": fit_predict,
    "train_on_batch": research.train_on_batch,
    "test_on_batch": research.test_on_batch,
    "predict_on_batch": research.predict_on_batch,
}
pytestmark = [pytest.mark.promotes, pytest.mark.slow]


def built(case: Case, **compiled: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = case.model()
    model.compile(**{**case.compiled(), **compiled})
    return model


def examples(case: Case, batches: int) -> tuple[Any, Any, Any]:
    """So many batches' worth of examples, less three: the last batch is a shorter one."""
    rng = np.random.default_rng(0)
    drawn = [case.batch(rng) for _ in range(batches)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: batches * SIZE - 3], *drawn)


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b))


def held(model: keras.Model) -> list[np.ndarray]:
    return [np.array(v) for v in [*model.variables, *model.optimizer.variables]]


def tiny(**compiled: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.2), layers.Dense(1)])
    model.compile(**{"optimizer": keras.optimizers.Adam(1e-2), "loss": "mse", "metrics": ["mae"], **compiled})
    return model


def line(n: int = 70) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).normal(size=(n, 4)).astype("float32")
    return x, x.sum(-1, keepdims=True)


class Looker(keras.callbacks.Callback):
    """Has a batch hook, and does not look at what it gets."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


@pytest.mark.parametrize("name", METHODS)
def test_the_signature_is_that_of_keras_method(name: str) -> None:
    def told(function: Any) -> list[Any]:
        return [(p.name, p.kind, p.default) for p in list(inspect.signature(function).parameters.values())[1:]]

    assert told(METHODS[name]) == told(getattr(keras.Model, name))


FEW = ("norm-adamw-schedule", "norm-ema", "two-outputs-weighted")
WAYS = [*((name, "fused") for name in CASES), *itertools.product(FEW, ("one by one", "three in an execution"))]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_fit_equals_keras_bit_for_bit_shuffled_and_validated(name: str, way: str) -> None:
    case = CASES[name]
    x, y, weight = examples(case, 12)
    validation = examples(case, 2)
    compiled = {"steps_per_execution": 3} if way == "three in an execution" else {}
    options: dict[str, Any] = {"batch_size": SIZE, "epochs": 3, "verbose": 0, "sample_weight": weight}
    options["validation_data"] = validation if validation[2] is not None else validation[:2]

    def trained(fit: Callable[..., Any], model: keras.Model) -> tuple[Any, Any, Any]:
        keras.utils.set_random_seed(1)
        history = fit(x, y, callbacks=[Looker()] if way == "one by one" else None, **options).history
        return history, held(model), float(np.random.random())  # the generator that Keras shuffles by, too

    ours, theirs = built(case, **compiled), built(case, **compiled)
    got = trained(lambda *a, **k: research.fit(ours, *a, **k), ours)
    wanted = trained(theirs.fit, theirs)
    assert same(got, wanted)


@pytest.mark.parametrize("name", ["norm-adam", "two-outputs-weighted", "sequence-masked"])
def test_evaluate_predict_and_the_single_batches_equal_keras_bit_for_bit(name: str) -> None:
    case = CASES[name]
    ours, theirs = built(case), built(case)
    x, y, weight = examples(case, 5)
    for _ in range(3):
        assert same(research.train_on_batch(ours, x, y, sample_weight=weight), theirs.train_on_batch(x, y, sample_weight=weight))
    assert same(
        research.test_on_batch(ours, x, y, weight, return_dict=True), theirs.test_on_batch(x, y, weight, return_dict=True)
    )
    assert same(research.predict_on_batch(ours, x), theirs.predict_on_batch(x))
    options: dict[str, Any] = {"batch_size": SIZE, "verbose": 0}
    assert same(
        research.evaluate(ours, x, y, sample_weight=weight, **options), theirs.evaluate(x, y, sample_weight=weight, **options)
    )
    assert same(research.predict(ours, x, **options), theirs.predict(x, **options))
    assert same(held(ours), held(theirs))


def test_own_steps_run_as_they_are() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = layers.Dense(1)
            self.seen = keras.metrics.Mean(name="seen")

        def call(self, x: Any, training: bool = False) -> Any:
            return self.dense(x)

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
        ) -> Any:
            return 2 * keras.ops.mean((y - y_pred) ** 2)

        @property
        def metrics(self) -> list[Any]:
            return [self.seen]

        def train_step(self, state: Any, data: Any) -> Any:
            trainable, other, slots, metrics = state
            x, y = data

            def loss(trainable: Any) -> Any:
                outputs, _ = self.stateless_call(trainable, other, x, training=True)
                return self.compute_loss(x, y, outputs)

            value, grads = jax.value_and_grad(loss)(trainable)
            trainable, slots = self.optimizer.stateless_apply(slots, grads, trainable)
            metrics = self.seen.stateless_update_state(metrics, value)
            return {"twice": value, "seen": self.seen.stateless_result(metrics)}, (trainable, other, slots, metrics)

    def trained(fit: Callable[..., Any]) -> Any:
        keras.utils.set_random_seed(0)
        model = Own()
        model.compile(keras.optimizers.SGD(0.1))
        history = fit(model, *line(), epochs=2, verbose=0).history
        return history, held(model)

    got, wanted = trained(research.fit), trained(lambda model, *a, **k: model.fit(*a, **k))
    assert set(got[0]) == {"twice", "seen"}
    assert same(got, wanted)


@pytest.mark.parametrize("eager", [{"run_eagerly": True}, {"jit_compile": False}])
def test_eager_gives_the_numbers_of_compiled_to_1e6(eager: dict[str, bool]) -> None:
    compiled = {"optimizer": keras.optimizers.SGD(0.01)}
    model, slow = tiny(**compiled), tiny(**{**compiled, "optimizer": keras.optimizers.SGD(0.01)}, **eager)
    research.fit(model, *line(), verbose=0, shuffle=False)
    research.fit(slow, *line(), verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), slow.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_our_step_inside_keras_fit_and_keras_step_inside_our_loop_give_the_same_numbers() -> None:
    ours, theirs, looped = tiny(), tiny(), tiny()
    x, y = line(64)
    learner = research.from_keras(ours)

    class Inside(keras.Sequential):
        def train_step(self, state: Any, data: Any) -> Any:
            names = list(learner.init().metrics)
            metrics, parts = {}, iter(state[3])
            metrics = {name: [next(parts) for _ in learner.init().metrics[name]] for name in names}
            after, logs = learner.train(research.State(*state[:3], metrics), research.Batch(*data))
            return logs, (*after[:3], [v for name in names for v in after.metrics[name]])

    keras.utils.set_random_seed(0)
    inside = Inside([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.2), layers.Dense(1)])
    inside.compile(keras.optimizers.Adam(1e-2), "mse", metrics=["mae"])
    first = inside.fit(x, y, shuffle=False, epochs=2, verbose=0).history
    second = theirs.fit(x, y, shuffle=False, epochs=2, verbose=0).history
    state, logs = research.train(research.from_keras(looped), research.arrays(x, y, shuffle=False), epochs=2)
    research.write_back(state, looped, looped.optimizer)
    assert same(first, second)
    assert same(inside.get_weights(), theirs.get_weights())
    assert same(looped.get_weights(), theirs.get_weights())
    assert logs["loss"] == second["loss"][-1]


class Recorder(keras.callbacks.Callback):
    """Writes down every hook that is called, with the names in its logs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []


def _recording(hook: str) -> Callable[..., None]:
    def record(self: Recorder, number: Any = None, logs: Any = None) -> None:
        assert isinstance(self.model, keras.Model)
        self.calls.append((hook, *(dict(each) if isinstance(each, dict) else each for each in (number, logs or {}))))

    return record


for _hook in dir(keras.callbacks.Callback):
    if _hook.startswith(("on_train", "on_test", "on_epoch")):
        setattr(Recorder, _hook, _recording(_hook))


@pytest.mark.parametrize("unit", [1, 4])
def test_callbacks_are_called_as_keras_calls_them_with_the_same_logs(unit: int) -> None:
    def calls(fit: Callable[..., Any]) -> list[Any]:
        recorder = Recorder()
        keras.utils.set_random_seed(1)
        fit(tiny(steps_per_execution=unit), *line(), epochs=2, validation_split=0.3, verbose=0, callbacks=[recorder])
        return recorder.calls

    got, wanted = calls(research.fit), calls(lambda model, *a, **k: model.fit(*a, **k))
    assert len(got) > 15
    assert got == wanted


@pytest.mark.parametrize("looking", [None, "loss"])
def test_nothing_is_read_off_the_device_at_a_batch_hook_unless_it_looks(
    looking: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: list[int] = []

    class Hooked(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            assert "loss" in logs
            assert looking is None or logs[looking] > 0
            at.append(len(seen))

    with reads(monkeypatch) as seen:
        research.fit(tiny(), *line(320), verbose=0, callbacks=[Hooked()])
    read = [after - before for before, after in itertools.pairwise(at)]
    assert read == [0 if looking is None else 2] * 9  # the loss and the metric together


def test_what_a_callback_changes_holds_from_the_next_step_on() -> None:
    class Meddling(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                self.model.layers[0].kernel.assign(keras.ops.zeros((4, 8)))
                self.model.optimizer.learning_rate = 0.0
            if batch == 3:
                self.model.stop_training = True

    def trained(fit: Callable[..., Any]) -> Any:
        model = tiny()
        keras.utils.set_random_seed(1)
        history = fit(model, *line(320), epochs=3, verbose=0, callbacks=[Meddling()])
        return history.history, held(model), history.epoch

    got, wanted = trained(research.fit), trained(lambda model, *a, **k: model.fit(*a, **k))
    assert same(got, wanted)
    assert (got[1][0] == 0).all()


def test_a_callback_between_epochs_sees_the_model_and_changes_it() -> None:
    seen: list[Any] = []

    def look(epoch: int, logs: Any, model: keras.Model) -> None:
        seen.append((int(model.optimizer.iterations), float(np.sum(model.get_weights()[0]))))
        model.optimizer.learning_rate = 1e-3 * (epoch + 1)

    def trained(fit: Callable[..., Any]) -> Any:
        seen.clear()
        model = tiny()
        keras.utils.set_random_seed(1)
        fit(
            model,
            *line(),
            epochs=3,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: look(epoch, logs, model))],
        )
        return list(seen), held(model)

    assert same(trained(research.fit), trained(lambda model, *a, **k: model.fit(*a, **k)))


@pytest.mark.parametrize("verbose", [0, 1, 2, "auto"])
def test_the_console_ends_up_as_under_keras(verbose: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(fit: Callable[..., Any]) -> list[str]:
        keras.utils.set_random_seed(1)
        fit(tiny(), *line(), epochs=2, validation_split=0.5, verbose=verbose)
        shown = capsys.readouterr().out.replace("\b", "").split("\n")
        last = [part.rpartition("\r")[2] for part in shown]  # what stands there in the end
        return [re.sub(r"\d+u?m?s(/step)?", "TIME", part) for part in last]

    def final(lines: list[str]) -> list[str]:
        return [each for each in lines if "Epoch" in each or "val_loss" in each]

    got, wanted = lines(research.fit), lines(lambda model, *a, **k: model.fit(*a, **k))
    assert final(got) == final(wanted)
    assert len(final(got)) == (4 if verbose else 0)


@pytest.mark.parametrize(
    "moment", ["on_epoch_end", "on_train_batch_begin", "on_train_batch_end", "on_test_batch_end", "on_epoch_begin"]
)
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_the_model_is_whole_after_a_callback_raised(moment: str, error: type[BaseException]) -> None:
    class Raising(keras.callbacks.Callback):
        pass

    def fail(self: Any, number: int, logs: Any = None) -> None:
        if number == (0 if "epoch" in moment else 1):
            raise error("enough")

    setattr(Raising, moment, fail)
    model = tiny()
    before = model.get_weights()
    with pytest.raises(error, match="enough"):
        research.fit(model, *line(), epochs=2, batch_size=8, validation_split=0.5, verbose=0, callbacks=[Raising()])
    after = held(model)
    assert all(np.isfinite(v.astype("float64")).all() for v in after)
    steps = {"on_epoch_begin": 0, "on_train_batch_begin": 1, "on_train_batch_end": 2}.get(moment, 5)
    assert int(model.optimizer.iterations) == steps
    assert same(before, model.get_weights()) == (steps == 0)
    research.fit(model, *line(), verbose=0)


@pytest.mark.parametrize("good", [0, 2, 5])
@pytest.mark.parametrize("fused", [True, False])
def test_the_model_is_whole_after_its_data_raised_and_has_what_came_before(good: int, fused: bool) -> None:
    def broken() -> Iterator[Any]:
        for _ in range(good):
            yield line(8)
        raise OSError("no more")

    model = tiny()
    with pytest.raises(OSError, match="no more"):
        research.fit(model, broken(), steps_per_epoch=40, shuffle=False, verbose=0, callbacks=[] if fused else [Looker()])
    assert int(model.optimizer.iterations) == good
    assert np.isfinite(model.predict(line()[0], verbose=0)).all()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal, whatever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("callbacks", [[], [Looker()]])
def test_the_model_is_whole_after_ctrl_c_at_any_moment(callbacks: list[Any], ctrl_c: None) -> None:
    x, y = line(3000)
    model = tiny()
    research.fit(model, x, y, epochs=1, verbose=0, batch_size=8, validation_split=0.2, callbacks=callbacks)
    rng = np.random.default_rng(0)
    for _ in range(25):
        before = int(model.optimizer.iterations)
        timer = threading.Timer(rng.uniform(0.0, 0.15), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            research.fit(model, x, y, epochs=1000, verbose=0, batch_size=8, validation_split=0.2, callbacks=callbacks)
        timer.join()
        assert all(np.isfinite(v.astype("float64")).all() for v in held(model))
        assert int(model.optimizer.iterations) >= before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_steps_are_fused_only_where_nobody_looks_at_single_ones(tmp_path: Path) -> None:
    x, y = line(640)

    def dispatches(**options: Any) -> int:
        model = tiny()
        research.fit(model, x, y, batch_size=8, epochs=6, verbose=0, **options)
        program = model.train_function
        calls: list[Any] = []
        original = program._call
        program._call = lambda name, arguments: (calls.append(name), original(name, arguments))[1]
        research.fit(model, x, y, batch_size=8, epochs=6, verbose=0, **options)
        return len(calls)

    assert dispatches() < 240
    assert dispatches(callbacks=[Looker()]) == 480
    by_epoch = keras.callbacks.ModelCheckpoint(tmp_path / "last.weights.h5", save_weights_only=True)
    assert dispatches(callbacks=[by_epoch]) < 240


def test_no_more_is_compiled_than_a_program_for_whole_batches_and_one_for_the_shorter_last() -> None:
    model = tiny()
    keras.utils.set_random_seed(0)
    research.fit(model, *line(70), batch_size=8, epochs=5, verbose=0)
    for epochs in (1, 3):
        research.fit(model, *line(70), batch_size=8, epochs=epochs, verbose=0)
    assert len(model.train_function.known) == 2


def test_recompiling_takes_the_new_loss_and_metrics() -> None:
    model = tiny()
    research.fit(model, *line(), verbose=0)
    model.compile("sgd", "mae", metrics=["mse"])
    assert set(research.fit(model, *line(), verbose=0).history) == {"loss", "mse"}
    model.compile("sgd", "mae", run_eagerly=True)
    research.fit(model, *line(), verbose=0)
    assert not model.train_function.compiled


def test_keras_own_methods_still_work_on_the_model_and_it_can_be_saved(tmp_path: Any) -> None:
    ours, theirs = tiny(), tiny()
    for model, fit in ((ours, research.fit), (theirs, lambda m, *a, **k: m.fit(*a, **k))):
        keras.utils.set_random_seed(1)
        fit(model, *line(), verbose=0)
    keras.utils.set_random_seed(2)
    first = ours.fit(*line(), verbose=0, epochs=2).history
    keras.utils.set_random_seed(2)
    assert same(first, theirs.fit(*line(), verbose=0, epochs=2).history)
    ours.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert same(again.get_weights(), ours.get_weights())
    assert same(keras.models.clone_model(ours).predict(line()[0], verbose=0).shape, (70, 1))


REFUSED: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "uncompiled": lambda fit: fit(keras.Sequential([keras.Input((4,)), layers.Dense(1)]), *line()),
    "no optimizer for the shape": lambda fit: fit(tiny(), line()[0][:, :2], line()[1]),
    "lengths": lambda fit: fit(tiny(), line()[0], line()[1][:-1]),
    "weights of the wrong shape": lambda fit: fit(tiny(), *line(), sample_weight=np.ones((70, 3, 2))),
    "validation_split of a generator": lambda fit: fit(tiny(), (line(8) for _ in range(3)), validation_split=0.5),
    "both kinds of weights": lambda fit: fit(tiny(), *line(), sample_weight=np.ones(70), class_weight={0: 1.0}),
    "class weights with two outputs": lambda fit: fit(
        built(CASES["two-outputs"]), *examples(CASES["two-outputs"], 2)[:2], class_weight={0: 1.0}
    ),
    "y beside a generator": lambda fit: fit(tiny(), (line(8) for _ in range(3)), line()[1]),
    "no batch": lambda fit: fit(tiny(), iter(())),
    "validation_freq": lambda fit: fit(tiny(), *line(), validation_split=0.5, validation_freq="often"),
    "a wrong structure": lambda fit: fit(
        built(CASES["two-outputs"]), examples(CASES["two-outputs"], 2)[0], {"score": np.ones((13, 1))}
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_keras_refuses_is_refused_with_its_message(what: str) -> None:
    def told(fit: Callable[..., Any]) -> tuple[str, str]:
        keras.utils.set_random_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                REFUSED[what](fit)
            except Exception as error:
                return type(error).__name__, str(error).replace("_1", "")
        return "", ""

    got, wanted = told(research.fit), told(lambda model, *a, **k: model.fit(*a, **k))
    assert wanted[1]
    assert got[0] == wanted[0]
    assert got[1].split()[:6] == wanted[1].split()[:6]


def test_logs_are_a_dictionary_of_numbers_that_is_read_when_looked_at() -> None:
    values = {"b": jax.numpy.ones(()), "a": {"c": jax.numpy.zeros(())}, "v": jax.numpy.arange(2)}
    for look in (dict, lambda logs: {**logs}, lambda logs: logs | {}, lambda logs: pickle.loads(pickle.dumps(logs)), Logs.copy):
        found = look(Logs(values))
        assert list(found) == ["b", "c", "v"] or sorted(found) == ["b", "c", "v"]
        assert found["b"] == 1.0
        assert type(found["b"]) is float
    logs = Logs(values)
    logs["loss"] = 3.0
    assert (logs["loss"], logs.get("c"), logs.get("none"), len(logs), bool(logs)) == (3.0, 0.0, None, 4, True)
    assert not Logs({})


def test_a_fused_program_equals_its_steps_for_every_count() -> None:
    learner = research.from_keras(tiny())
    x, y = line(64)
    batches = research.Batch(x.reshape(8, 8, 4), y.reshape(8, 8, 1))
    single, fused = jax.jit(learner.train), jax.jit(fuse(learner.train))
    state, seen = learner.init(), []
    for count in range(1, 9):
        state, logs = single(state, research.Batch(batches.x[count - 1], batches.y[count - 1]))
        seen.append(logs)
        after, each = fused(learner.init(), batches, count)
        assert same(after, state)
        for i, logs in enumerate(seen):
            assert same({name: values[i] for name, values in each.items()}, logs)


def test_convolutions_are_not_put_into_loops_on_the_cpu() -> None:
    conv = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(1)])
    conv.compile("sgd", "mse", steps_per_execution=4)
    x, y = np.ones((64, 8, 8, 1), "float32"), np.ones((64, 1), "float32")
    research.fit(conv, x, y, batch_size=8, verbose=0)
    assert {name for name, _ in conv.train_function.known} == {"single"}
    learner = research.from_keras(conv)
    assert not loops_well(jax.jit(learner.train).trace(learner.init(), research.Batch(x[:8], y[:8])))
