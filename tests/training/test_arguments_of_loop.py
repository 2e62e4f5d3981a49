"""What `train`, `evaluate` and `predict` are handed is checked before anything is compiled: one line says what to pass."""

import re
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
import pytest
from small_training import X, Y, data, learner

import research


def donated() -> Any:
    classifier = learner()
    state = classifier.init()
    research.train(classifier, data(), steps=1, state=state)
    return classifier, state


def hooks(*given: Any) -> Callable[[], Any]:
    return lambda: research.train(learner(), data(), steps=2, hooks=given)


def train(**arguments: Any) -> Callable[[], Any]:
    return lambda: research.train(learner(), data(), **arguments)


def model() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "a model as learner": (
        lambda: research.train(model(), data(), steps=1),
        "train: the learner is a Sequential, expected a research.Learner: make one of a model with "
        "research.supervised(model, loss=...), or call research.fit(model, x, y).",
    ),
    "data and learner swapped": (
        lambda: research.train(data(), learner(), steps=1),
        "train: the learner is a Batches, expected a research.Learner: pass a learner first, then the data.",
    ),
    "arrays as data": (
        lambda: research.train(learner(), X, steps=1),
        "train: the data is an array, expected research.Batches: pass research.from_arrays(x, y).",
    ),
    "a tuple of arrays as data": (
        lambda: research.train(learner(), (X, Y), steps=1),
        "train: the data is a tuple, expected research.Batches: pass research.from_arrays(x, y).",
    ),
    "a generator as data": (
        lambda: research.train(learner(), iter([X]), steps=1),
        "train: the data is a list_iterator, expected research.Batches: make some with research.from_arrays or research.data.",
    ),
    "no data": (
        lambda: research.train(learner(), None, steps=1),
        "train: the data is None, expected research.Batches: make some with research.from_arrays or research.data.",
    ),
    "evaluate with state and data swapped": (
        lambda: research.evaluate(learner(), learner().init(), data()),
        "evaluate: the data is a State, expected research.Batches: the order is learner, data, state.",
    ),
    "predict with state and data swapped": (
        lambda: research.predict(learner(), learner().init(), data()),
        "predict: the data is a State, expected research.Batches: the order is learner, data, state.",
    ),
    "neither steps nor epochs": (
        train(),
        "train: steps and epochs are both None, expected at least one: pass steps=1000 or epochs=5.",
    ),
    "half an epoch": (train(epochs=1.5), "train: epochs is 1.5, expected an integer of at least 0."),
    "steps as text": (train(steps="10"), "train: steps is '10', expected an integer of at least 0."),
    "negative steps": (train(steps=-1), "train: steps is -1, expected an integer of at least 0."),
    "negative start": (train(steps=1, start=-1), "train: start is -1, expected an integer of at least 0."),
    "a start that is None": (train(steps=1, start=None), "train: start is None, expected an integer of at least 0."),
    "log_every=0": (train(steps=1, log_every=0), "train: log_every is 0, expected an integer of at least 1."),
    "log_every=True": (train(steps=1, log_every=True), "train: log_every is True, expected an integer of at least 1."),
    "observe every 0 steps": (
        train(steps=1, observe=(0, research.norms)),
        "train: the period of observe is 0, expected an integer of at least 1.",
    ),
    "observe without period": (
        train(steps=1, observe=research.norms),
        "train: observe is a function, expected a pair of a period in steps and a function: observe=(100, research.norms).",
    ),
    "a hook every -2 steps": (hooks((-2, print)), "train: the period of hook 0 is -2, expected an integer of at least 1."),
    "a hook every 0 steps": (
        hooks((0, print)),
        "train: the period of hook 0 is 0, expected an integer of at least 1.",
    ),
    "a hook without period": (
        hooks(print),
        "train: hook 0 is a builtin_function_or_method, expected a pair of a period in steps and a function: (100, hook).",
    ),
    "a hook that can't be called": (
        hooks((1, None)),
        "train: hook 0 is a tuple, expected a pair of a period in steps and a function: (100, hook).",
    ),
    "one hook instead of a list": (
        train(steps=1, hooks=print),
        "train: hooks is a builtin_function_or_method, expected a list of pairs: hooks=[(100, hook)].",
    ),
    "one pair instead of a list": (
        train(steps=1, hooks=(1, print)),
        "train: hook 0 is an int, expected a pair of a period in steps and a function: (100, hook).",
    ),
    "evaluations called train": (
        lambda: research.train(learner(), data(), steps=1, evaluations={"train": data()}),
        "train: evaluations has a split named 'train', whose logs would be those of the training itself: "
        "choose another name, such as 'train_eval'.",
    ),
    "evaluations that are data": (
        lambda: research.train(learner(), data(), steps=1, evaluations=data()),
        "train: evaluations is a Batches, expected a dict from names to data: {'val': data}.",
    ),
    "evaluations of arrays": (
        train(steps=1, evaluations={"val": (X, Y)}),
        "train: evaluations['val'] is a tuple, expected research.Batches: pass research.from_arrays(x, y).",
    ),
    "evaluations without a name": (
        train(steps=1, evaluations={0: None}),
        "train: evaluations has the key 0, expected the name of a split, such as 'val'.",
    ),
    "log that can't be called": (train(steps=1, log=[]), "train: log is a list, expected a function."),
    "stop that can't be called": (train(steps=1, stop=False), "train: stop is a bool, expected a function."),
    "a donated state": (
        lambda: (lambda classifier, state: research.train(classifier, data(), steps=1, state=state))(*donated()),
        "train: the state was donated to a training step, which deleted it: use the state that train, or the step, returned, "
        "or copy this one before, with jax.tree.map(jax.numpy.copy, state).",
    ),
    "a donated state evaluated": (
        lambda: (lambda classifier, state: research.evaluate(classifier, data(), state))(*donated()),
        "evaluate: the state was donated to a training step, which deleted it: use the state that train, or the step, returned, "
        "or copy this one before, with jax.tree.map(jax.numpy.copy, state).",
    ),
    "a donated state predicted with": (
        lambda: (lambda classifier, state: research.predict(classifier, data(), state))(*donated()),
        "predict: the state was donated to a training step, which deleted it: use the state that train, or the step, returned, "
        "or copy this one before, with jax.tree.map(jax.numpy.copy, state).",
    ),
    "the state of another learner": (
        lambda: research.train(learner(), data(), steps=1, state=learner(optimizer="sgd").init()),
        "train: the state is a State with 11 arrays, expected one of this learner, with 19: pass what learner.init() or train "
        "returned.",
    ),
    "a list as state": (
        lambda: research.evaluate(learner(), data(), [X]),
        "evaluate: the state is a list with 1 arrays, expected one of this learner, with 19: pass what learner.init() or train "
        "returned.",
    ),
    "no state to predict with": (
        lambda: research.predict(learner(), data(), None),
        "predict: the state is None with 0 arrays, expected one of this learner, with 19: pass what learner.init() or train "
        "returned.",
    ),
    "fit of a learner": (
        lambda: research.fit(learner(), X, Y),
        "fit: the model is a Learner, expected a compiled keras.Model: call research.train(learner, data, epochs=...).",
    ),
    "fit of a layer": (
        lambda: research.fit(keras.layers.Dense(1), X, Y),
        "fit: the model is a Dense, expected a compiled keras.Model.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_to_pass(case: str, as_users_run_it: None) -> None:
    call, message = CASES[case]
    with pytest.raises(research.InvalidArgument, match=f"^{re.escape(message)}$"):
        call()


def test_what_is_right_passes(as_users_run_it: None) -> None:
    classifier = learner()
    seen: list[int] = []
    state, _ = research.train(
        classifier,
        data(),
        steps=np.int64(2),
        hooks=[(np.int64(1), lambda step, state, logs: seen.append(step))],
        evaluations={"train_eval": data()},
    )
    assert seen == [1, 2]
    copy = jax.tree.map(jax.numpy.copy, state)
    research.train(classifier, data(), steps=3, start=2, state=state)
    assert research.evaluate(classifier, data(), copy)["loss"] > 0
