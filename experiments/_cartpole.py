"""CartPole-v1 as pure functions of one environment, the random keys that its episodes are made from, and drawings of an episode.

The dynamics of Barto, Sutton and Anderson (1983) with the constants, the Euler steps and the limits of Gymnasium's `CartPole-v1`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

import research
from experiments import _plots
from research import Batch, Learner
from research.data import Batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH, FORCE, TAU = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02  # SI units
MAX_POSITION, MAX_ANGLE, MAX_STEPS = 2.4, 12 * 2 * np.pi / 360, 500
ACTIONS = 2  # push to the left, push to the right
FIRST_KEY = {"train": 0, "val": 1 << 31, "test": 3 << 30}  # of a split: no two splits have a key in common


class CartPole(NamedTuple):
    """One environment. `physics` is what an agent observes: position, velocity, angle and angular velocity.

    >>> CartPole(jnp.zeros(4), jnp.zeros((), jnp.int32)).physics.tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    physics: Float[Array, "*batch 4"]
    steps: Int[Array, "*batch"]  # since the episode began


NAMES = CartPole("environments/physics", "environments/steps")  # of the leaves, in a learner's state


class Outcome(NamedTuple):
    """What an action led to. `observation` is the last one of the episode if that ended, not the first one of the next.

    >>> Outcome._fields
    ('observation', 'reward', 'terminated', 'truncated')
    """

    observation: Float[Array, "*batch 4"]
    reward: Float[Array, "*batch"]
    terminated: Bool[Array, "*batch"]  # beyond a limit: no reward follows
    truncated: Bool[Array, "*batch"]  # by the limit of steps: rewards would have followed


def move(physics: Float[Array, "4"], action: Int[Array, ""]) -> Float[Array, "4"]:
    """Returns the physics 0.02 seconds later, after a push to the left (0) or to the right (1).

    >>> [round(float(value), 4) for value in move(jnp.zeros(4), jnp.array(1))]
    [0.0, 0.1951, 0.0, -0.2927]
    """
    _, velocity, angle, angular_velocity = physics
    force, mass = jnp.where(action == 1, FORCE, -FORCE), CART_MASS + POLE_MASS
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (force + POLE_MASS * HALF_LENGTH * angular_velocity**2 * sin) / mass
    angular = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - POLE_MASS * cos**2 / mass))
    linear = push - POLE_MASS * HALF_LENGTH * angular * cos / mass
    return physics + TAU * jnp.stack([velocity, linear, angular_velocity, angular])


def step(state: CartPole, action: Int[Array, ""], start: Float[Array, "4"]) -> tuple[CartPole, Outcome]:
    """Returns the environment after an action, and the outcome. If the episode ended, the next one begins at `start`.

    >>> fallen, start = CartPole(jnp.array([0.0, 0.0, 0.2, 1.0]), jnp.array(7)), jnp.full(4, 0.01)
    >>> state, outcome = step(fallen, jnp.array(0), start)
    >>> bool(outcome.terminated), bool(outcome.truncated), float(outcome.reward), int(state.steps)
    (True, False, 1.0, 0)
    """
    physics, steps = move(state.physics, action), state.steps + 1
    terminated = (jnp.abs(physics[0]) > MAX_POSITION) | (jnp.abs(physics[2]) > MAX_ANGLE)
    truncated = (steps >= MAX_STEPS) & ~terminated
    done = terminated | truncated
    after = CartPole(jnp.where(done, start, physics), jnp.where(done, jnp.zeros_like(steps), steps))
    return after, Outcome(physics, jnp.ones(()), terminated, truncated)


def starts(key: Key[Array, ""], *shape: int) -> Float[Array, "*shape 4"]:
    """Returns physics that episodes begin with, uniform from -0.05 to 0.05.

    >>> starts(jax.random.key(0), 3).shape
    (3, 4)
    """
    return jax.random.uniform(key, (*shape, 4), minval=-0.05, maxval=0.05)


def first(seed: int, environments: int) -> CartPole:
    """Returns the initial environments of a training run.

    >>> first(0, environments=8).steps.tolist()
    [0, 0, 0, 0, 0, 0, 0, 0]
    """
    return CartPole(starts(jax.random.key(seed), environments), jnp.zeros(environments, jnp.int32))


def keys(batch: Batch, count: int) -> Key[Array, "count environments"]:
    """Returns `count` random keys for each key of a batch, for different uses.

    >>> keys(key_batches(seed=0, environments=8, steps_per_epoch=10)["train"].batch(0), 3).shape
    (3, 8)
    """
    split = jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)
    return split(jax.random.wrap_key_data(jnp.asarray(batch.x), impl="threefry2x32"))


def key_batches(*, seed: int, environments: int, steps_per_epoch: int, episodes: int = 128) -> dict[str, Batches]:
    """Returns the data of a learner that makes its own: random keys, one for each environment and step, never the same again.

    `x` is uint32 [environments, 2]. A key of `val` or `test` is one episode of evaluation, in a single batch of `episodes`.

    >>> data = key_batches(seed=5, environments=2, steps_per_epoch=10)
    >>> data["train"].batch(3).x.tolist(), data["val"].shapes.x.shape
    ([[5, 6], [5, 7]], (128, 2))
    """

    def numbered(start: int, count: int) -> Batch:
        return Batch(np.stack([np.full(count, seed), np.arange(start, start + count)], -1).astype(np.uint32))

    def batches(split: str, size: int, steps: int) -> Batches:
        def batch(step: int) -> Batch:
            return numbered(FIRST_KEY[split] + (step if split == "train" else step % steps) * size, size)

        shapes = Batch(jax.ShapeDtypeStruct((size, 2), np.uint32))
        return Batches(batch, shapes, steps, steps * size)

    return {
        split: batches(split, environments, steps_per_epoch) if split == "train" else batches(split, episodes, 1)
        for split in FIRST_KEY
    }


def rollout(
    policy: Callable[[Array], Array], environments: CartPole, keys: Key[Array, "2 environments"], steps: int
) -> tuple[CartPole, tuple[CartPole, Int[Array, "steps environments"], Float[Array, "steps environments 2"], Outcome]]:
    """Returns the environments after `steps` random actions in each; and before each action, the actions, logits and outcomes.

    `policy` maps observations [environments, 4] to a logit of each action [environments, 2].

    >>> def run(keys):
    ...     return rollout(lambda observations: jnp.zeros((8, 2)), first(0, 8), keys, steps=3)
    >>> after, (before, actions, logits, outcomes) = jax.eval_shape(run, jax.random.split(jax.random.key(0), (2, 8)))
    >>> after.physics.shape, actions.shape, outcomes.observation.shape
    ((8, 4), (3, 8), (3, 8, 4))
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (steps, ACTIONS)), out_axes=1)(keys[0])
    first_physics = jax.vmap(lambda key: starts(key, steps), out_axes=1)(keys[1])

    def act(before: CartPole, drawn: tuple[Array, Array]) -> tuple[CartPole, tuple[CartPole, Array, Array, Outcome]]:
        logits = policy(before.physics)
        action = jnp.argmax(logits + drawn[0], -1).astype(jnp.int32)  # a sample, by the Gumbel-max trick
        after, outcome = jax.vmap(step)(before, action, drawn[1])
        return after, (before, action, logits, outcome)

    return jax.lax.scan(act, environments, (noise, first_physics))


def episodes(
    policy: Callable[[Any], Any], keys: Key[Array, " episodes"]
) -> tuple[Float[Array, "episodes 500 4"], Bool[Array, "episodes 500"]]:
    """Returns one episode for each key: the physics before each action, and which of these steps are part of the episode.

    `policy` maps observations [episodes, 4] to actions [episodes]. The number of steps is the episode's return.

    >>> physics, mask = episodes(lambda observations: jnp.zeros(len(observations), int), jax.random.split(jax.random.key(0), 3))
    >>> physics.shape, bool(jnp.all((mask.sum(1) >= 8) & (mask.sum(1) <= 10)))
    ((3, 500, 4), True)
    """

    def act(carry: tuple[CartPole, Array], _: None) -> tuple[tuple[CartPole, Array], tuple[Array, Array]]:
        state, running = carry
        after, outcome = jax.vmap(step)(state, policy(state.physics), state.physics)
        return (after, running & ~(outcome.terminated | outcome.truncated)), (state.physics, running)

    state = CartPole(jax.vmap(starts)(keys), jnp.zeros(len(keys), jnp.int32))
    _, (physics, mask) = jax.lax.scan(act, (state, jnp.ones(len(keys), bool)), None, MAX_STEPS)
    return jnp.swapaxes(physics, 0, 1), jnp.swapaxes(mask, 0, 1)


def add_returns(totals: Float[Array, "2"], returns: Float[Array, " episodes"]) -> Float[Array, "2"]:
    """Returns the sum of returns and the number of episodes, `totals`, with those of further episodes.

    >>> add_returns(jnp.array([10.0, 1.0]), jnp.array([9.0, 20.0])).tolist()
    [39.0, 3.0]
    """
    return totals + jnp.stack([jnp.sum(returns), jnp.float32(returns.size)])


def add_finished(totals: Float[Array, "2"], before: CartPole, outcome: Outcome) -> Float[Array, "2"]:
    """Returns the sum of returns and the number of episodes, `totals`, with those of episodes that an action ended.

    >>> first, no, yes = jnp.zeros((2, 4)), jnp.array([False, False]), jnp.array([False, True])
    >>> add_finished(jnp.array([10.0, 1.0]), CartPole(first, jnp.array([3, 19])), Outcome(first, jnp.ones(2), yes, no)).tolist()
    [30.0, 2.0]
    """
    finished = (outcome.terminated | outcome.truncated).astype(jnp.float32)
    returns = (before.steps + 1).astype(jnp.float32)  # each action has the reward 1
    return totals + jnp.stack([jnp.sum(finished * returns), jnp.sum(finished)])


def return_log(totals: Float[Array, "2"]) -> dict[str, Float[Array, ""]]:
    """Returns the mean return to log; 0 before the first episode is finished.

    >>> return_log(jnp.array([30.0, 2.0]))["return"].item(), return_log(jnp.zeros(2))["return"].item()
    (15.0, 0.0)
    """
    return {"return": totals[0] / jnp.maximum(totals[1], 1.0)}


def greedy(scores: Callable[[Any, Array], Array]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns `evaluate` and `predict` of a learner that takes the action with the highest of its `scores(state, observations)`.

    An example is the key of an episode. `predict` returns the episodes, see `episodes`, `evaluate` logs their mean return since
    the last reset; the learner's state has the sum and the number of returns as `returns`.
    """

    def predict(state: Any, batch: Batch) -> tuple[Array, Array]:
        return episodes(lambda observations: jnp.argmax(scores(state, observations), -1), keys(batch, 1)[0])

    def evaluate(state: Any, batch: Batch) -> tuple[Any, dict[str, Array]]:
        totals = add_returns(state.returns, jnp.sum(predict(state, batch)[1], 1, dtype=jnp.float32))
        return state._replace(returns=totals), return_log(totals)

    return evaluate, predict


def episode_figures(learner: Learner, state: Any, test: Batches) -> dict[str, "Figure"]:
    """Draws the shortest of the episodes that a learner predicts, with its initial weights and with those of a state."""
    figures = {}
    for name, each in {"untrained": learner.init(), "trained": state}.items():
        physics, mask = research.predict(learner, test, each)
        shortest = np.argmin(mask.sum(1))
        figures[name] = episode_figure(physics[shortest], mask[shortest])
    return figures


def episode_figure(physics: Float[np.ndarray, "500 4"], mask: Bool[np.ndarray, " 500"], frames: int = 10) -> "Figure":
    """Draws frames of an episode, evenly spaced in time, above the position of the cart and the angle of the pole.

    An episode with fewer steps than `frames` has one of each.

    >>> figure = episode_figure(np.zeros((500, 4)), np.arange(500) < 200)
    >>> [figure.axes[i].get_title() for i in (0, 9)]
    ['step 1', 'step 200']
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    physics = physics[mask]
    frames = min(frames, len(physics))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    for axes, t in zip(above.subplots(1, frames), np.linspace(0, len(physics) - 1, frames).astype(int), strict=True):
        position, _, angle, _ = physics[t]
        axes.axhline(0, color="0.7", linewidth=1)
        axes.add_patch(Rectangle((position - 0.3, 0), 0.6, 0.3, color=_plots.BLUE))
        tip = position + 2 * HALF_LENGTH * np.sin(angle), 0.3 + 2 * HALF_LENGTH * np.cos(angle)
        axes.plot([position, tip[0]], [0.3, tip[1]], color=_plots.RED, linewidth=4, solid_capstyle="round")
        axes.set(xlim=(-MAX_POSITION, MAX_POSITION), ylim=(-0.1, 1.4), aspect="equal", xticks=[], yticks=[])
        axes.set_title(f"step {t + 1}", fontsize=9)
        axes.spines[:].set_visible(False)
    curves = {
        "position of the cart (m)": (physics[:, 0], MAX_POSITION),
        "angle of the pole (degrees)": (physics[:, 2], MAX_ANGLE),
    }
    for axes, (label, (values, limit)) in zip(below.subplots(1, 2), curves.items(), strict=True):
        scale = 180 / np.pi if "degrees" in label else 1.0
        axes.plot(np.arange(1, len(values) + 1), scale * values, color=_plots.BLUE)
        for side in (-limit, limit):
            axes.axhline(scale * side, color=_plots.RED, linestyle="--", linewidth=1)
        axes.set(xlabel="step", ylabel=label)
        _plots.hide_frame(axes)
    return figure
