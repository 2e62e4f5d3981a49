"""What a step computes on the way is observed without a change of any bit, and is what NumPy and `jax.grad` say."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import slow_after_first
from keras import layers, ops

import research
from research import distributed, transforms

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 8)).astype("float32")
Y = RNG.integers(0, 3, 40).astype("int32")
EXAMPLE = research.Batch(X[:8], Y[:8])
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
GLOBAL = ["gradient_norm", "update_norm", "weight_norm"]


def network(name: str, units: int = 3, dtype: Any = None) -> keras.Model:
    stack = [layers.Dense(16, "relu", dtype=dtype), layers.BatchNormalization(dtype=dtype), layers.Dropout(0.5, dtype=dtype)]
    return keras.Sequential([keras.Input((8,)), *stack, layers.Dense(units, dtype=dtype)], name=name)


def classifier(optimizer: Any = "adam", dtype: Any = None, **options: Any) -> research.Learner:
    return research.supervised(network("net", dtype=dtype), loss=LOSS, optimizer=optimizer, metrics=["accuracy"], **options)


def scheduled(optimizer: Callable[..., Any], **options: Any) -> Any:
    return optimizer(keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=100), **options)


def convolutional() -> research.Learner:
    stack = [layers.Reshape((8, 1)), layers.Conv1D(4, 3), layers.MaxPooling1D(2), layers.Flatten(), layers.Dense(3)]
    return research.supervised(keras.Sequential([keras.Input((8,)), *stack]), loss=LOSS, optimizer="adam")


def autoencoder() -> research.Learner:
    encoder, noise = network("encoder", 8), keras.random.SeedGenerator(0)

    def loss(batch: research.Batch, training: bool) -> Any:
        noisy = batch.x + 0.1 * keras.random.normal(ops.shape(batch.x), seed=noise)
        error = ops.mean((encoder(noisy, training=training) - batch.x) ** 2)
        return error, {"error": error}

    return research.learner(loss, [encoder, noise], "rmsprop", example=EXAMPLE)


def adversaries(**options: Any) -> research.Learner:
    critic, actor = network("critic", 1), network("actor", 8)

    def critic_loss(batch: research.Batch, training: bool) -> Any:
        return ops.mean(critic(actor(batch.x))) - ops.mean(critic(batch.x, training=training)), {}

    def actor_loss(batch: research.Batch, training: bool) -> Any:
        return -ops.mean(critic(actor(batch.x, training=training))), {}

    both = {
        "critic": research.learner(critic_loss, critic, keras.optimizers.SGD(0.1), example=EXAMPLE),
        "actor": research.learner(actor_loss, actor, keras.optimizers.Adam(0.01), example=EXAMPLE),
    }
    return research.joint(both, **options)


def from_keras() -> research.Learner:
    model = network("net")
    model.compile(loss=LOSS, optimizer="adam")
    return research.from_keras(model)


ALL = [*GLOBAL, "learning_rate"]
JOINT = [f"{name}_{value}" for name in ("actor", "critic") for value in ALL]
LEARNERS: dict[str, tuple[Callable[[], research.Learner], list[str]]] = {
    "supervised": (classifier, ALL),
    "schedule and clipping": (lambda: classifier(scheduled(keras.optimizers.AdamW, weight_decay=0.1, clipnorm=0.1)), ALL),
    "optax": (lambda: classifier(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))), GLOBAL),
    "optax with a rate": (lambda: classifier(optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(0.1, 100))), ALL),
    "accumulate": (lambda: classifier(gradient_transform=lambda gradient: research.accumulate(gradient, 4)), ALL),
    "mixed float16": (lambda: classifier(scheduled(keras.optimizers.SGD, momentum=0.9), dtype="mixed_float16"), ALL),
    "convolution": (convolutional, ALL),
    "from a loss": (autoencoder, ALL),
    "skip_nonfinite": (lambda: transforms.skip_nonfinite(classifier(), EXAMPLE), ALL),
    "ema of joint": (lambda: transforms.ema(adversaries(), 0.9), JOINT),
    "Keras' own step": (from_keras, GLOBAL[1:]),
}


def trained(build: Callable[[], research.Learner], resident: bool, observe: Any = None) -> tuple[Any, list[research.LogEntry]]:
    keras.utils.set_random_seed(0)
    learner = build()
    data = research.from_arrays(X, Y, batch_size=8, seed=1)
    data = data if resident else data._replace(resident=None)
    entries: list[research.LogEntry] = []
    state, _ = research.train(learner, data, epochs=5, log_every=3, log=entries.append, observe=observe and (2, observe))
    return state, entries


@pytest.mark.sample(3)
@pytest.mark.promotes
@pytest.mark.parametrize("name", slow_after_first(["supervised", "host", *list(LEARNERS)[1:]]))
def test_state_and_logs_are_bit_for_bit_those_without_observe(name: str) -> None:
    build, expected = LEARNERS.get(name, LEARNERS["supervised"])
    resident = name != "host"
    state, entries = trained(build, resident)
    observed_state, observed = trained(build, resident, transforms.layer_norms)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(observed_state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert [entry.step for entry in entries] == [1, 3, 5, 6, 9, 10, 12, 15, 18, 20, 21, 24, 25]
    with_observation = [entry for entry in observed if entry.step % 2 == 0]
    added = set(with_observation[0].values) - set(entries[0].values)
    assert {value for value in added if "/" not in value} == set(expected)
    assert [entry._replace(values={k: v for k, v in entry.values.items() if k not in added}) for entry in observed] == entries
    assert all(entry.values[value] > 0 for entry in with_observation for value in expected)
    assert not any(added & set(entry.values) for entry in observed if entry.step % 2)


def test_norms_are_those_of_numpy_and_jax_grad() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16, "tanh", name="a"), layers.Dense(3, name="b")])
    learner = research.supervised(model, loss=LOSS, optimizer=keras.optimizers.SGD(0.5, momentum=0.9, clipnorm=0.01))
    state = learner.init()

    def loss(weights: Any) -> Any:
        logits = jnp.tanh(X[:8] @ weights[0] + weights[1]) @ weights[2] + weights[3]
        return -jax.nn.log_softmax(logits)[jnp.arange(8), Y[:8]].mean()

    gradients = jax.grad(loss)(state.trainable)
    after, _ = jax.jit(learner.train)(state, EXAMPLE)
    logs = jax.jit(transforms.observe(learner, research.layer_norms))(state, EXAMPLE)
    updates = [new - old for new, old in zip(after.trainable, state.trainable, strict=True)]
    for name, leaves in {"gradient": gradients, "update": updates, "weight": after.trainable}.items():
        flat = [np.asarray(leaf, np.float64).ravel() for leaf in leaves]
        for label, part in {"": flat, "/a": flat[:2], "/b": flat[2:]}.items():
            np.testing.assert_allclose(logs[f"{name}_norm{label}"], np.linalg.norm(np.concatenate(part)), rtol=1e-5)
    assert float(logs["learning_rate"]) == 0.5
    assert set(logs) == {
        "learning_rate",
        *(f"{n}_norm{part}" for n in ("gradient", "update", "weight") for part in ("", "/a", "/b")),
    }


@pytest.mark.promotes
@pytest.mark.parametrize("library", ["keras", "optax"])
def test_the_learning_rate_is_that_of_the_update(library: str) -> None:
    keras.utils.set_random_seed(0)
    if library == "keras":
        schedule: Any = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
        learner = classifier(keras.optimizers.SGD(schedule))
    else:
        schedule = optax.exponential_decay(0.1, 1, 0.5)
        learner = classifier(optax.inject_hyperparams(optax.sgd)(schedule))
    state, rates = learner.init(), []
    for _ in range(3):
        rates.append(float(jax.jit(transforms.observe(learner, research.norms))(state, EXAMPLE)["learning_rate"]))
        state, _ = jax.jit(learner.train)(state, EXAMPLE)
    np.testing.assert_allclose(rates, [0.1, 0.05, 0.025], rtol=1e-6)


def test_gradients_are_unscaled_and_accumulated() -> None:
    def gradient_norm(**options: Any) -> float:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((8,)), layers.Dense(3)])
        learner = research.supervised(model, loss=LOSS, **options)
        return float(jax.jit(transforms.observe(learner, research.norms))(learner.init(), EXAMPLE)["gradient_norm"])

    expected = gradient_norm(optimizer="sgd")
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    np.testing.assert_allclose(gradient_norm(optimizer=scaled), expected, rtol=1e-6)
    parts = gradient_norm(optimizer="sgd", gradient_transform=lambda gradient: research.accumulate(gradient, 4))
    np.testing.assert_allclose(parts, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_learner_on_a_mesh_observes_what_it_does_on_one_device() -> None:
    keras.utils.set_random_seed(0)
    learner = classifier(keras.optimizers.SGD(0.1))
    logs = jax.jit(transforms.observe(learner, research.layer_norms))(learner.init(), EXAMPLE)
    mesh = distributed.mesh(jax.devices()[:4], data=2, fsdp=2)
    sharded = distributed.shard(learner, mesh)
    data = distributed.shard_batches(research.from_arrays(X[:8], Y[:8], batch_size=8, shuffle=False), mesh)
    _, last = research.train(sharded, data, steps=1, observe=(1, research.layer_norms))
    assert set(last) == {"loss", "accuracy", *logs}
    for name, value in logs.items():
        np.testing.assert_allclose(last[name], value, rtol=1e-5, err_msg=name)


def test_each_learner_of_a_joint_one_has_its_own_also_where_a_step_trains_only_one_of_them() -> None:
    keras.utils.set_random_seed(0)
    alternating = adversaries(train=lambda steps, state, batch: steps["critic"](state, batch))
    scalars = transforms.observe(
        alternating, lambda o: {"rate": 0.0 if o.learning_rate is None else o.learning_rate, "size": len(o.names)}
    )
    logs = jax.jit(scalars)(alternating.init(), EXAMPLE)
    observed = {name: round(float(value), 6) for name, value in logs.items() if name.endswith(("rate", "size"))}
    assert observed == {"critic_rate": 0.1, "critic_size": 6, "actor_rate": 0.0, "actor_size": 6}
    names: list[Any] = []
    jax.eval_shape(transforms.observe(alternating, lambda o: names.append(o.names) or {}), alternating.init(), EXAMPLE)
    assert names[0][0] == "dense/kernel"  # without the learner's name, which the logs have


def test_a_branch_that_is_not_taken_observes_zeros() -> None:
    keras.utils.set_random_seed(0)

    def in_turn(steps: Any, state: Any, batch: Any) -> Any:
        def branch(name: str) -> Any:
            return lambda state, batch: (steps[name](state, batch)[0], {})

        return jax.lax.cond(state["turn"] == 0, branch("critic"), branch("actor"), state, batch)

    learner = adversaries(train=in_turn, extra={"turn": lambda: jnp.zeros((), int)})
    scalars, state = jax.jit(transforms.observe(learner, research.norms)), learner.init()
    critic, actor = scalars(state, EXAMPLE), scalars({**state, "turn": jnp.ones((), int)}, EXAMPLE)
    for logs, trained, other in ((critic, "critic", "actor"), (actor, "actor", "critic")):
        assert logs[f"{trained}_gradient_norm"] > 0
        assert logs[f"{other}_gradient_norm"] == logs[f"{other}_update_norm"] == 0


def test_hooks_see_observations_only_where_logs_are_due_and_a_resumed_run_logs_them_again() -> None:
    seen: dict[int, dict[str, float]] = {}
    keras.utils.set_random_seed(0)
    learner, data = classifier(), research.from_arrays(X, Y, batch_size=8, seed=1)
    entries: list[research.LogEntry] = []

    def hook(step: int, state: Any, logs: Any) -> None:
        seen[step] = {name: float(value) for name, value in logs.items()}

    options: dict[str, Any] = {"log_every": 2, "log": entries.append, "observe": (2, research.norms)}
    state, _ = research.train(learner, data, steps=4, hooks=[(1, hook)], **options)
    assert [step for step in seen if "gradient_norm" in seen[step]] == [2, 4]
    again: list[research.LogEntry] = []
    research.train(learner, data, steps=5, start=4, state=state, logs=seen[4], **{**options, "log": again.append})
    assert again[0] == entries[-1]
    assert list(entries[-1].values) == sorted(entries[-1].values)  # the lines of a log file are the same bytes, too


def test_what_a_function_returns_is_checked_before_training() -> None:
    keras.utils.set_random_seed(0)
    learner, data = classifier(), research.from_arrays(X, Y, batch_size=8)
    for function, message in (
        (lambda o: o.weights, "observe: the function returned list; expected a dict of scalars by name."),
        (lambda o: {"first": o.weights[0]}, "observe: 'first' has the shape (8, 16); expected a scalar, such as a norm."),
    ):
        with pytest.raises(research.InvalidArgument) as error:
            research.train(learner, data, epochs=1, observe=(1, function))
        assert str(error.value) == message


def test_a_log_of_the_learner_wins_over_an_observation_of_that_name() -> None:
    keras.utils.set_random_seed(0)
    learner, data = classifier(), research.from_arrays(X, Y, batch_size=8)
    _, plain = research.train(learner, data, epochs=1, state=learner.init())
    _, logs = research.train(
        learner, data, epochs=1, state=learner.init(), observe=(5, lambda o: {"loss": jnp.zeros(()), "two": 2.0})
    )
    assert logs == {**plain, "two": 2.0}
