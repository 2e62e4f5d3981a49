"""Balance a pole by deep Q-learning: environments, a replay memory and both networks in one state, one program.

    just run dqn                      # half a minute on two idle cores

Mnih et al., Nature 518 (2015), on CartPole-v1, with the targets of double Q-learning (van Hasselt et al., arXiv:1509.06461). A
training step is `--updates` times: an action in each environment, greedy or random, whose outcomes go to the memory, and an
update on a minibatch drawn from it. Then the target network gets the weights. The memory is a value in the learner's state,
arrays of a fixed size and a count. The data are random keys, one per environment and step.

Expect a test_return, the mean of 128 greedy episodes, of 500, the largest there is (500.0 with each of the seeds 0 to 4); 475 is
Gymnasium's threshold, and random actions reach 22. One core makes 30,000 actions a second with all updates. The loss is the
squared error: with the paper's clipped one the values of states before a fall stay too high, and returns below 100.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

import research
from experiments import _cartpole
from experiments._cartpole import CartPole
from experiments._config import Count, CountOrZero, Fraction, Positive, TrainingOptions
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """Everything that changes the numbers."""

    updates: Count = 128
    """Actions in each environment, and updates, per training step; then the target network gets the weights."""
    minibatch: Count = 64
    """Transitions per update."""
    capacity: Count = 50_000
    """Transitions in the memory; later ones replace the oldest."""
    exploration: Count = 50_000
    """Transitions over which the share of random actions falls from 1."""
    epsilon: Fraction = 0.05
    """Share of random actions after that."""
    units: Count = 128
    """Width of the two hidden layers."""
    learning_rate: Positive = 1e-3
    """Initial learning rate of Adam; it decays to 0 linearly."""
    discount: Fraction = 0.99
    """Discount of a reward per step."""
    epochs: CountOrZero = 40
    """An epoch is 10 training steps."""
    batch_size: Count = 8
    """Environments."""


class Transitions(NamedTuple):
    """Actions in environments, and their outcomes."""

    observation: Any
    action: Any
    reward: Any
    next_observation: Any
    terminated: Any


class Memory(NamedTuple):
    """The latest transitions, in arrays of a fixed size, and how many were ever written."""

    transitions: Transitions
    written: Any


class State(NamedTuple):
    """The state of the learner."""

    agent: research.State  # the network and its optimizer
    target: list[Any]  # weights of the target network
    memory: Memory
    environments: CartPole
    returns: Any  # the sum and the number of those since the last reset


def empty_memory(config: Config) -> Memory:
    """Returns a memory without transitions."""
    row = Transitions(jnp.zeros(4), jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(4), jnp.zeros((), bool))
    rows = jax.tree.map(lambda leaf: jnp.zeros((config.capacity, *leaf.shape), leaf.dtype), row)
    return Memory(rows, jnp.zeros((), jnp.int32))


def write(memory: Memory, new: Transitions) -> Memory:
    """Returns the memory with further transitions, in place of the oldest ones once it is full."""
    count, capacity = len(new.action), len(memory.transitions.action)
    rows = (memory.written + jnp.arange(count, dtype=jnp.int32)) % capacity
    return Memory(jax.tree.map(lambda old, added: old.at[rows].set(added), memory.transitions, new), memory.written + count)


def draw(memory: Memory, key: jax.Array, count: int) -> Transitions:
    """Returns `count` transitions, each uniformly from all that the memory holds."""
    held = jnp.minimum(memory.written, len(memory.transitions.action))
    rows = jax.random.randint(key, (count,), 0, held)
    return jax.tree.map(lambda leaf: leaf[rows], memory.transitions)


def targets(config: Config, batch: Transitions, online: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the targets of double Q-learning; `online` and `target` are both networks' values of the next observations."""
    later = jnp.take_along_axis(target, jnp.argmax(online, -1, keepdims=True), 1)[:, 0]
    return batch.reward + config.discount * jnp.where(batch.terminated, 0.0, later)


def act(config: Config, state: State, values: Callable[..., jax.Array], keys: jax.Array) -> State:
    """Returns the state after an action in each environment: random with a probability that falls to `epsilon`, else the best."""
    epsilon = 1 - (1 - config.epsilon) * jnp.minimum(state.memory.written / config.exploration, 1.0)

    def policy(observations: jax.Array) -> jax.Array:
        best = jax.nn.one_hot(jnp.argmax(values(state.agent.trainable, observations), -1), _cartpole.ACTIONS)
        return jnp.log((1 - epsilon) * best + epsilon / _cartpole.ACTIONS)

    environments, steps = _cartpole.rollout(policy, state.environments, keys, 1)
    before, action, _, outcome = jax.tree.map(lambda leaf: leaf[0], steps)
    new = Transitions(before.physics, action, outcome.reward, outcome.observation, outcome.terminated)
    returns = _cartpole.add_finished(state.returns, before, outcome)
    return state._replace(memory=write(state.memory, new), environments=environments, returns=returns)


def build(config: Config) -> research.Learner:
    """Returns the learner; it predicts episodes of the actions with the highest value from random keys."""
    return algorithm(config)[0]


def algorithm(config: Config) -> tuple[research.Learner, keras.Model]:
    """Returns the learner and its network, observations -> the expected return of each action."""
    keras.utils.set_random_seed(config.seed)
    hidden, ops = [keras.layers.Dense(config.units, "relu") for _ in range(2)], keras.ops
    network = keras.Sequential([keras.Input((4,)), *hidden, keras.layers.Dense(_cartpole.ACTIONS)], name="network")

    def loss(batch: research.Batch, training: bool) -> tuple[Any, dict[str, Any]]:
        observations, actions = batch.x
        value = ops.take_along_axis(network(observations), actions[:, None], 1)[:, 0]
        return ops.mean((value - batch.y) ** 2) / 2, {"value": ops.mean(value)}

    updates = config.num_steps(data(config)["train"].steps_per_epoch) * config.updates
    adam = keras.optimizers.Adam(keras.optimizers.schedules.PolynomialDecay(config.learning_rate, max(1, updates), 0.0))
    rows = jax.eval_shape(lambda: draw(empty_memory(config), jax.random.key(0), config.minibatch))
    example = research.Batch((rows.observation, rows.action), rows.reward)
    agent = research.learner(loss, [network], adam, example=example)

    def values(weights: list[jax.Array], observations: jax.Array) -> jax.Array:
        return network.stateless_call(weights, [], observations)[0]

    def update(state: State, keys: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        state = act(config, state, values, keys[:2])
        batch = draw(state.memory, keys[2, 0], config.minibatch)
        online, target = (values(weights, batch.next_observation) for weights in (state.agent.trainable, state.target))
        samples = research.Batch((batch.observation, batch.action), targets(config, batch, online, target))
        agent_state, logs = agent.train(state.agent, samples)
        return state._replace(agent=agent_state), logs

    def train(state: State, batch: research.Batch) -> tuple[State, dict[str, jax.Array]]:
        keys = _cartpole.keys(batch, 3 * config.updates).reshape(config.updates, 3, -1)
        state, logs = jax.lax.scan(update, state, keys)
        last = jax.tree.map(lambda log: log[-1], logs)  # means since the last reset
        target = jax.tree.map(jnp.copy, state.agent.trainable)  # no two leaves may share a buffer
        return state._replace(target=target), last | _cartpole.return_log(state.returns)

    evaluate, predict = _cartpole.greedy(lambda state, observations: values(state.agent.trainable, observations))
    memory = Memory(Transitions(*(f"memory/{field}" for field in Transitions._fields)), "memory/written")
    environments = functools.partial(_cartpole.first, config.seed, config.batch_size)
    learner = research.Learner(
        init=lambda: State(agent.init(), agent.init().trainable, empty_memory(config), environments(), jnp.zeros(2)),
        reset=lambda state: state._replace(agent=agent.reset(state.agent), returns=jnp.zeros(2)),
        train=train,
        evaluate=evaluate,
        predict=predict,
        names=State(agent.names, [f"target/{name}" for name in agent.names.trainable], memory, _cartpole.NAMES, "returns"),
        state_mapping=lambda state: agent.state_mapping(state.agent),
    )
    return learner, network


def data(config: Config) -> dict[str, Batches]:
    """Returns random keys: of an environment in a training step, of an episode of evaluation."""
    return _cartpole.key_batches(seed=config.seed, environments=config.batch_size, steps_per_epoch=10)


def models(config: Config, state: State) -> dict[str, keras.Model]:
    """Returns the network with the weights of a state."""
    learner, network = algorithm(config)
    research.write_back(state, learner)
    return {"network": network}


def pictures(config: Config, learner: research.Learner, state: State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws the shortest test episode, before and after training."""
    return _cartpole.episode_figures(learner, state, splits["test"])
