"""Several learners as one: what each sees of the others, what it changes, and how their steps are composed."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers, ops

import research
from research.distributed import fsdp, mesh, shard

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
BATCH = research.Batch(X, X[:, :1])


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def network(name: str, units: int = 1) -> keras.Model:
    stack = [layers.Dense(6), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(units)]
    return keras.Sequential([keras.Input((4,)), *stack], name=name)


def pair(**options: Any) -> tuple[research.Learner, keras.Model, keras.Model]:
    """A critic that scores, and an actor that raises the critic's score; each loss calls both networks."""
    keras.utils.set_random_seed(0)
    critic, actor = network("critic"), network("actor", 4)

    def critic_loss(batch: research.Batch, training: bool) -> Any:
        fake = critic(actor(batch.x, training=training), training=training)
        return ops.mean(fake) + ops.mean((critic(batch.x, training=training) - batch.y) ** 2), {"fake": ops.mean(fake)}

    def actor_loss(batch: research.Batch, training: bool) -> Any:
        return -ops.mean(critic(actor(batch.x, training=training), training=training)), {}

    critic_learner = research.learner(critic_loss, critic, keras.optimizers.SGD(0.1), example=BATCH)
    actor_learner = research.learner(actor_loss, actor, keras.optimizers.SGD(0.1, momentum=0.9), example=BATCH)
    return research.joint({"critic": critic_learner, "actor": actor_learner}, **options), critic, actor


@pytest.mark.slow
def test_a_learner_changes_its_own_state_only_and_sees_the_updates_before_it() -> None:
    learner, _, _ = pair()
    critic_only, _, _ = pair(train=lambda steps, state, batch: steps["critic"](state, batch))
    actor_only, _, _ = pair(train=lambda steps, state, batch: steps["actor"](state, batch))
    state = learner.init()
    both, logs = jax.jit(learner.train)(state, BATCH)
    after_critic, _ = jax.jit(critic_only.train)(state, BATCH)
    after_actor, _ = jax.jit(actor_only.train)(state, BATCH)
    assert sorted(logs) == ["actor_loss", "critic_fake", "critic_loss"]
    assert equal(after_critic["actor"], state["actor"])  # no weight, no statistic, no seed
    assert equal(after_actor["critic"], state["critic"])
    assert equal(both["critic"], after_critic["critic"])
    assert not equal(both["actor"].trainable, after_actor["actor"].trainable)  # the critic had moved
    in_turn, _ = jax.jit(actor_only.train)(after_critic, BATCH)
    assert equal(both["actor"], in_turn["actor"])


@pytest.mark.slow
def test_independent_learners_train_as_they_do_alone_bit_for_bit() -> None:
    def one(name: str, seed: int) -> research.Learner:
        keras.utils.set_random_seed(seed)
        return research.supervised(network(name), loss="mse", optimizer="adam")

    alone = {"a": one("a", 0), "b": one("b", 1)}
    together = research.joint({"a": one("a", 0), "b": one("b", 1)})
    state = together.init()
    states = {name: learner.init() for name, learner in alone.items()}
    for _ in range(3):
        state, logs = jax.jit(together.train)(state, BATCH)
        results = {name: jax.jit(learner.train)(states[name], BATCH) for name, learner in alone.items()}
        states = {name: after for name, (after, _) in results.items()}
        assert equal(state, states)
        assert equal(logs, {f"{name}_loss": values["loss"] for name, (_, values) in results.items()})
    evaluated, _ = jax.jit(together.evaluate)(together.reset(state), BATCH)
    assert equal(evaluated["a"].trainable, state["a"].trainable)


@pytest.mark.slow
def test_steps_are_composed_freely_over_extra_state() -> None:
    def five_to_one(steps: Any, state: Any, batch: Any) -> Any:
        for _ in range(5):
            state, critic_logs = steps["critic"](state, batch)
        state, logs = steps["actor"](state, batch)
        count = state["counter"]["steps"] + 1
        return {**state, "counter": {"steps": count}}, {**critic_logs, **logs, "steps": count}

    learner, _, _ = pair(train=five_to_one, extra={"counter": lambda: {"steps": jnp.zeros((), jnp.int32)}})
    state, logs = jax.jit(learner.train)(learner.init(), BATCH)
    iterations = [int(state[name].optimizer[0]) for name in ("critic", "actor")]
    assert (iterations, int(logs["steps"])) == ([5, 1], 1)
    assert learner.names["counter"] == {"steps": "counter/steps"}
    assert jax.tree.structure(learner.names) == jax.tree.structure(state)


@pytest.mark.slow
def test_names_are_unique_and_each_model_has_its_part() -> None:
    learner, critic, actor = pair()
    state, _ = learner.train(learner.init(), BATCH)
    names = jax.tree.leaves(learner.names)
    assert len(names) == len(set(names))
    assert equal(research.part(learner, state, actor).trainable, state["actor"].trainable)
    research.write_back(state, learner)
    assert equal([v.value for v in critic.trainable_variables], state["critic"].trainable)
    assert set(learner.predict(state, BATCH)) == {"critic", "actor"}


@pytest.mark.slow
def test_on_eight_devices_with_split_weights_it_trains_the_same() -> None:
    single, sharded = pair()[0], shard(pair()[0], mesh(fsdp=-1), fsdp)
    a, b = single.init(), sharded.init()
    for _ in range(2):
        (a, logs), (b, sharded_logs) = jax.jit(single.train)(a, BATCH), jax.jit(sharded.train)(b, BATCH)
    for x, y in zip(jax.tree.leaves((a, logs)), jax.tree.leaves((b, sharded_logs)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_it_is_built_from_shapes_alone_and_trained_by_the_loop() -> None:
    learner, shapes = research.init_abstract(lambda: pair()[0])
    after, _ = jax.eval_shape(learner.train, shapes, BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(shapes)
    data = research.from_arrays(X, X[:, :1], batch_size=4)
    _, logs = research.train(pair()[0], data, epochs=2, evaluations={"val": data})
    assert {"critic_loss", "val_actor_loss"} <= set(logs)


def test_a_model_in_two_learners_and_a_name_used_twice_are_refused() -> None:
    model = network("shared")
    learners = {name: research.supervised(model, loss="mse", optimizer="sgd") for name in ("first", "second")}
    with pytest.raises(
        research.InvalidArgument, match=r"'shared/.*' belongs to 'first' and to 'second'; expected each model in one"
    ):
        research.joint(learners)
    with pytest.raises(research.InvalidArgument, match="'first' names a learner and an entry of extra"):
        research.joint({"first": learners["first"]}, extra={"first": lambda: jnp.zeros(())})


@pytest.mark.slow
def test_outside_of_a_joint_the_other_networks_weights_would_be_constants() -> None:
    actor, critic = network("actor", 4), network("critic")
    lonely = research.learner(lambda batch, training: (ops.mean(critic(actor(batch.x))), {}), actor, "sgd", example=BATCH)
    with pytest.raises(research.InvalidArgument, match=r"uses 'critic/.*', .* or join its learner with research\.joint"):
        lonely.train(lonely.init(), BATCH)
