"""Many members of an experiment, other seeds and other numbers, trained as one program."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the example in a docstring)
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner, prediction_shapes
from research.core.metrics import Logs
from research.core.state import InvalidArgument, as_shapes, check_type, num_rows
from research.transforms.merge import Different, Merged, merge

MEMBERS_SUFFIX = "_of_members"  # follows the name of a log: the values of all members, where the name alone has their mean


class PopulationState(NamedTuple):
    """The states of all members, stacked along a first axis, and the numbers in which their programs differ, by function.

    >>> PopulationState(jnp.zeros((16, 2)), {"train": [jnp.ones(16)]}).members.shape
    (16, 2)
    """

    members: PyTree
    numbers: dict[str, list[Any]]


def population(
    build: Callable[..., Learner],
    members: int | Sequence[Mapping[str, Any]],
    *,
    example: Any,
    mapped: bool = False,
    own_batches: bool = False,
) -> Learner:
    """Returns one learner of many members, each of which is trained as alone.

    `members` lists the keyword arguments of `build` for each of them; a number n stands for the seeds 0 to n - 1, as in
    `build(seed=3)`. Members may differ in everything that leaves the training step the same but for numbers: seeds, learning
    rates, also of schedules, weight decay, moments, dropout rates, loss weights. Each is built and traced once, then there is one
    program. `example` is a batch of a member or its `jax.ShapeDtypeStruct`s, for example `data.shapes`.

    All members see the same batches; with `own_batches` a batch holds one part for each member, one after another, see
    `research.data.side_by_side`. Steps are vectorised over members, which computes what a member does alone, to rounding; with
    `mapped` they run one after another within the program, as alone. Logs have the mean over members under their name, and the
    values of all under the name with `_of_members` appended. `predict` returns one output for each example and member: their
    axis is the second. Where it takes other batches than the example, it must not depend on numbers that vary.

    `take_members` returns the states of some members, which the same learner goes on with; `member` that of one, for the learner
    that `build` returns for it. On two CPU cores vectorising gains little; what is gained is one start and one program.

    Raises `InvalidArgument` if the programs of two members differ in more than numbers, with the arguments that differ.

    >>> import research
    >>> def build(seed, rate):
    ...     keras.utils.set_random_seed(seed)
    ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(rate), keras.layers.Dense(1)])
    ...     return research.supervised(model, loss="mse", optimizer="sgd")
    >>> batch = research.Batch(jnp.ones((4, 2)), jnp.ones((4, 1)))
    >>> many = population(build, [{"seed": 0, "rate": 0.1}, {"seed": 1, "rate": 0.5}], example=batch)
    >>> state, logs = jax.jit(many.train)(many.init(), batch)
    >>> logs["loss"].shape, logs["loss_of_members"].shape, many.predict(state, batch).shape
    ((), (2,), (4, 2, 1))
    """
    if isinstance(members, int | np.integer):
        members = [{"seed": seed} for seed in range(members)]
    if not members:
        raise InvalidArgument("population: there are no members, expected their number, or the arguments of each.")
    learners = [build(**arguments) for arguments in members]
    for each in learners:
        check_type(each, Learner, "population: what build returned", "a research.Learner")
    programs = _Programs(learners, members, as_shapes(example))
    first = learners[0]

    def init() -> PopulationState:
        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[each.init() for each in learners])
        return PopulationState(states, jax.tree.map(jnp.asarray, programs.numbers))

    def call(name: str, state: PopulationState, batch: Any) -> Any:
        part = batch
        if own_batches:
            batch = jax.tree.map(functools.partial(_deal, population_size(state)), batch)
            part = jax.tree.map(lambda leaf: leaf[0], batch)
        function = programs.merged(name, as_shapes(part))
        if not mapped:
            return jax.vmap(function, (0, 0, 0 if own_batches else None))(state.numbers[name], state.members, batch)

        # The barriers keep XLA from fusing a member's selection with its step, and from moving what depends on a shared batch
        # alone out of the loop, where it may be rounded otherwise.
        def one(args: tuple[Any, ...]) -> Any:
            own, shared = jax.lax.optimization_barrier((args, () if own_batches else (batch,)))
            return jax.lax.optimization_barrier(function(*own, *shared))

        return jax.lax.map(one, (state.numbers[name], state.members, *((batch,) if own_batches else ())))

    def step(name: str, state: PopulationState, batch: Any) -> tuple[PopulationState, Logs]:
        after, logs = call(name, state, batch)
        means = {key: jnp.mean(value.astype(jnp.float32), 0) for key, value in logs.items()}
        return state._replace(members=after), means | {f"{key}{MEMBERS_SUFFIX}": value for key, value in logs.items()}

    def predict(state: PopulationState, batch: Any) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), call("predict", state, batch))

    return Learner(
        init=init,
        reset=lambda state: state._replace(members=jax.vmap(first.reset)(state.members)),
        train=functools.partial(step, "train"),
        evaluate=functools.partial(step, "evaluate"),
        predict=predict,
        names=PopulationState(
            first.names,
            {name: [f"numbers/{name}/{i}" for i in range(len(values))] for name, values in programs.numbers.items()},
        ),
        targets=first.targets,
    )


def population_size(state: PopulationState) -> int:
    """Returns the number of members in a state.

    >>> population_size(PopulationState([jnp.zeros((16, 2))], {}))
    16
    """
    return num_rows(state.members)


def take_members(state: PopulationState, indices: Any) -> PopulationState:
    """Returns the state of some members, in this order; one may be there several times. The learner goes on with it.

    >>> state = PopulationState([jnp.array([5.0, 6.0, 7.0])], {"train": [jnp.array([0.5, 0.6, 0.7])]})
    >>> take_members(state, jnp.array([2, 0])).members
    [Array([7., 5.], dtype=float32)]

    Successive halving: train, rank, and go on with the better half.

    >>> import research
    >>> def build(rate):
    ...     keras.utils.set_random_seed(0)
    ...     model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    ...     return research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(rate))
    >>> x = np.linspace(-1, 1, 32, dtype="float32")[:, None]
    >>> data, rates = research.from_arrays(x, 2 * x), np.array([0.01, 0.1, 1.0, 100.0])
    >>> many = population(build, [{"rate": rate} for rate in rates], example=data.shapes)
    >>> state = many.init()
    >>> while len(rates) > 1:
    ...     state, logs = research.train(many, data, epochs=5, state=state)
    ...     best = np.argsort(logs["loss_of_members"])[: len(rates) // 2]
    ...     state, rates = take_members(state, best), rates[best]
    >>> rates.tolist()
    [1.0]
    """
    return jax.tree.map(lambda leaf: leaf[indices], state)


def member(state: PopulationState, index: int) -> Any:
    """Returns the state of one member, for the learner that `build` returns for it alone.

    >>> member(PopulationState([jnp.array([5.0, 6.0])], {}), 1)
    [Array(6., dtype=float32)]
    """
    return jax.tree.map(lambda leaf: leaf[index], state.members)


class _Programs:
    """What the members' functions have in common, for the example's shapes and for others when they come."""

    def __init__(self, learners: Sequence[Learner], members: Sequence[Mapping[str, Any]], example: Any) -> None:
        self.learners, self.members = learners, members
        self.state = jax.eval_shape(learners[0].init)
        for index, each in enumerate(learners):
            if jax.tree.flatten(jax.eval_shape(each.init)) != jax.tree.flatten(self.state):
                raise self.different("states", index, "their structure or shapes")
        self.known: dict[Any, Merged] = {}
        predicts = prediction_shapes(learners[0], self.state, example) is not None
        names = ("train", "evaluate", "predict") if predicts else ("train", "evaluate")
        self.numbers = {"predict": [], **{name: self.merge(name, example).numbers for name in names}}

    def merge(self, name: str, batch: Any) -> Merged:
        key = (name, jax.tree.structure(batch), *jax.tree.leaves(batch))
        if key not in self.known:
            try:
                self.known[key] = merge([getattr(each, name) for each in self.learners], self.state, batch)
            except Different as error:
                raise self.different(f"{name} steps", error.index, str(error)) from error
        return self.known[key]

    def merged(self, name: str, batch: Any) -> Callable[..., Any]:
        """Returns (numbers, state, batch) -> what a member's function returns for a batch of these shapes."""
        found, expected = self.merge(name, batch), self.numbers[name]
        if len(found.numbers) != len(expected) or not all(map(np.array_equal, found.numbers, expected)):
            raise InvalidArgument(
                f"population: the numbers in which the members' {name} steps differ depend on the batch's shape; expected all "
                "batches to have the example's: use drop_last=True."
            )
        return found.call

    def different(self, what: str, index: int, difference: str) -> InvalidArgument:
        fields = [key for key, value in self.members[0].items() if not _equal(self.members[index].get(key), value)]
        return InvalidArgument(
            f"population: the {what} of members 0 and {index} differ in more than numbers: {difference}. They have other values "
            f"of {', '.join(fields) or 'nothing that build gets'}; vary what leaves the program the same, and run the rest apart."
        )


def _equal(first: Any, other: Any) -> bool:
    return bool(np.all(first == other))


def _deal(members: int, leaf: Any) -> Any:
    """Returns the rows of a batch in one part for each member."""
    if leaf.shape[0] % members:
        raise InvalidArgument(
            f"population: a batch of {leaf.shape[0]} rows for {members} members, expected as many rows for each; pass batches of "
            "research.data.side_by_side, or own_batches=False."
        )
    return leaf.reshape(members, -1, *leaf.shape[1:])
