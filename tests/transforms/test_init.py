"""Builders that run twice: for shapes, then for arrays."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers, ops

import research
from research import distributed

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
X, Y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
DATA = research.from_arrays(X, Y, batch_size=4)


def model() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])


def unnamed() -> list[keras.metrics.Metric]:
    return [keras.metrics.AUC(), keras.metrics.Precision(), keras.metrics.AUC(curve="PR")]


def supervised_with_unnamed_metrics() -> research.Learner:
    keras.utils.set_random_seed(0)
    return research.supervised(model(), loss="bce", metrics=unnamed())


def two_outputs_with_unnamed_metrics() -> research.Learner:
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    outputs = {name: layers.Dense(1, activation="sigmoid", name=name)(x) for name in ("b", "a")}
    return research.supervised(keras.Model(x, outputs), loss="bce", metrics={name: unnamed() for name in outputs})


def compiled_with_unnamed_metrics() -> research.Learner:
    keras.utils.set_random_seed(0)
    compiled = model()
    compiled.auc = keras.metrics.AUC()
    compiled.compile("adam", "bce", metrics=unnamed())
    return research.from_keras(compiled)


def learner_with_unnamed_metrics() -> research.Learner:
    keras.utils.set_random_seed(0)
    network, auc = model(), keras.metrics.AUC()

    def loss(batch: research.Batch, training: bool) -> Any:
        auc.update_state(batch.y, network(batch.x))
        return ops.mean((network(batch.x) - batch.y) ** 2), {}

    return research.learner(loss, [network, auc], "sgd", example=research.Batch(X, Y))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "names"),
    [
        (supervised_with_unnamed_metrics, ["auc", "auc_1", "loss", "precision"]),
        (
            two_outputs_with_unnamed_metrics,
            ["a_auc", "a_auc_1", "a_loss", "a_precision", "b_auc", "b_auc_1", "b_loss", "b_precision", "loss"],
        ),
        (compiled_with_unnamed_metrics, ["auc", "compile_metrics", "loss"]),
        (learner_with_unnamed_metrics, ["auc", "loss"]),
    ],
)
def test_metrics_that_keras_numbers_per_process_have_one_name_in_every_state(build: Any, names: list[str]) -> None:
    _, state = research.init_sharded(build, DEVICE)
    assert sorted(state.metrics) == names == sorted(build().init().metrics)
    _, state = distributed.build_sharded(build, distributed.mesh(jax.devices()[:1], data=-1))
    jax.tree.map(np.testing.assert_array_equal, state, build().init())


def teacher() -> keras.Model:
    trained = model()
    learner = research.supervised(trained, loss="mse", optimizer=keras.optimizers.SGD(0.5))
    state, _ = research.train(learner, DATA, epochs=2)
    research.write_back(state, trained)
    return trained


def distilled(make_teacher: Callable[[], keras.Model]) -> research.Learner:
    keras.utils.set_random_seed(0)
    large, small = make_teacher(), model()

    def loss(batch: research.Batch, training: bool) -> Any:
        return ops.mean((small(batch.x) - ops.stop_gradient(large(batch.x))) ** 2), {}

    return research.learner(loss, [small, large], "sgd", example=research.Batch(X, Y))


def concrete(make: Callable[[], Any]) -> Any:
    with jax.ensure_compile_time_eval():
        return make()


@pytest.mark.slow
def test_work_with_values_in_a_builder_gives_what_it_gives_outside() -> None:
    learner, state = research.init_sharded(lambda: distilled(lambda: concrete(teacher)), DEVICE)
    jax.tree.map(np.testing.assert_array_equal, state, distilled(teacher).init())
    logs = jax.jit(learner.train)(state, research.Batch(X, Y))[1]
    np.testing.assert_array_equal(logs["loss"], jax.jit(distilled(teacher).train)(state, research.Batch(X, Y))[1]["loss"])


def reads_a_float() -> research.Learner:
    assert float(keras.Variable(np.ones(3)).value.sum()) == 3.0
    return supervised_with_unnamed_metrics()


def predicts() -> research.Learner:
    model().predict(X, verbose=0)
    return supervised_with_unnamed_metrics()


@pytest.mark.slow
@pytest.mark.parametrize("build", [lambda: distilled(teacher), reads_a_float, predicts])
@pytest.mark.parametrize("run", [research.init_abstract, lambda build: research.init_sharded(build, DEVICE)])
def test_work_with_values_elsewhere_in_a_builder_is_an_error_that_names_the_line_and_the_remedy(build: Any, run: Any) -> None:
    with pytest.raises(
        research.InvalidArgument, match=r"test_init\.py:\d+, .* `with jax\.ensure_compile_time_eval\(\):`"
    ) as error:
        run(build)
    assert "\n" not in str(error.value)
    concrete(build)


def test_a_builder_that_makes_another_state_in_its_second_run_is_an_error_that_names_the_leaf() -> None:
    sizes = itertools.count(1)

    def build() -> research.Learner:
        return research.supervised(keras.Sequential([keras.Input((4,)), layers.Dense(next(sizes))]), loss="mse")

    with pytest.raises(research.InvalidArgument, match=r"runs twice, and \.trainable\[0\] is float32\[4, 2\] in its second run"):
        research.init_sharded(build, DEVICE)


def test_other_errors_in_a_builder_are_raised_as_they_are() -> None:
    def build() -> research.Learner:
        raise KeyError("preset")

    with pytest.raises(KeyError, match="preset"):
        research.init_abstract(build)
