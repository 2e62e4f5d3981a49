"""The traps that hand-written training steps of Keras models fall into, each found by an experiment on the step."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from research.core.state import Batch, InvalidArgument, copy_leaves
from research.debugging.contexts import compilations, layer_losses
from research.debugging.contract import check_learner
from research.debugging.probe import Probe, donates, same_bits, to_host, variables_of
from research.training.bad_steps import is_loss
from research.training.errors import shared_leaves

ITERATIONS = (1, 10, 1000, 100_000)  # at which a schedule's learning rate is compared with that of the start
# Primitives that JAX compiles anew for each call outside of a compiled function.
CONTROL_FLOW = {"jit(scan)", "jit(while)", "jit(cond)"}


class Trap(NamedTuple):
    """A trap, and whether a step falls into it: "ok", "wrong" or "not checked", with what was seen, or why it was not checked.

    >>> Trap("masks ignored", "not checked", "no output has a mask").verdict
    'not checked'
    """

    name: str
    verdict: str
    detail: str


class Subject(NamedTuple):
    """A probe, with what is known of it: whether it has functions to evaluate and to reset, and whether its state is donated."""

    probe: Probe
    has_evaluate: bool
    has_reset: bool
    step: Callable[..., Any]
    is_learner: bool


Verdict = tuple[str, str]


def find_traps(subject: Subject) -> list[Trap]:
    """Returns the verdict on every trap, in the order of `TRAPS`."""
    return [Trap(name, *experiment(subject)) for name, experiment in TRAPS.items()]


def broken_contract(learner: Any, state: Any, example: Any) -> Trap | None:
    """Returns the trap of a learner or step that does not keep the contract of `Learner`; None if it does.

    >>> import research
    >>> step = lambda state, batch: (state.astype(jnp.float16), {})
    >>> learner = research.Learner(None, lambda state: state, step, step, None, "total")
    >>> broken_contract(learner, jnp.zeros(2), jnp.zeros(2)).detail
    'train returns the state as float16[2], the state has float32[2]; expected the same shape and dtype: cast or reshape it.'
    """
    try:
        check_learner(learner, state, example)
    except InvalidArgument as error:
        name = "shared buffers" if shared_leaves(state) is not None else "state signature"
        if "evaluate changes" in str(error):
            name = "evaluation changes the state"
        return Trap(name, "wrong", str(error).removeprefix("learner: "))
    return None


def _signature(subject: Subject) -> Verdict:
    probe = subject.probe
    for path, before, after in zip(probe.paths, probe.before, jax.tree.leaves(probe.states[0]), strict=True):
        types = [jax.typeof(leaf) for leaf in (before, after)]
        if any(getattr(types[0], field) != getattr(types[1], field) for field in ("shape", "dtype", "weak_type")):
            weak = [f"{t.dtype}{list(t.shape)}{' (weak type)' if t.weak_type else ''}" for t in types]
            return "wrong", f"{path} is {weak[0]} at first and {weak[1]} after a step: give it a dtype, jnp.asarray(value, dtype)"
    return "ok", "structure, shapes and dtypes stay the same"


def _buffers(subject: Subject) -> Verdict:
    probe = subject.probe
    for state in (probe.state, probe.states[0]):
        shared = shared_leaves(state)
        if shared is not None:
            return "wrong", f"{probe.paths[shared[0]]} and {probe.paths[shared[1]]} share one buffer: copy one, jnp.copy(...)"
    variables = [v for each in probe.objects if hasattr(each, "variables") for v in each.variables]
    held = {v.value.unsafe_buffer_pointer(): v.path for v in variables if v.value.size}
    for path, leaf in zip(probe.paths, probe.before, strict=True):
        owner = None
        if isinstance(leaf, jax.Array) and leaf.size and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            owner = held.get(leaf.unsafe_buffer_pointer())
        if owner is not None and (subject.is_learner or donates(subject.step, probe.state, probe.batches[0])):
            return "wrong", f"{path} is the array that {owner!r} holds, which donation deletes: copy it, jnp.copy(variable.value)"
    return "ok", "each array has a buffer of its own"


def _recompilation(subject: Subject) -> Verdict:
    probe = subject.probe
    if probe.traces > 1:
        return "wrong", f"{probe.traces} programs were traced for {len(probe.batches)} steps on batches of the same shapes"
    if subject.is_learner:  # which others compile
        return "ok", "one program for all steps"
    state = copy_leaves(probe.state)
    for batch in [probe.batches[0]] * 2:
        state, _ = subject.step(state, batch)
    with compilations() as names:
        subject.step(state, probe.batches[0])
    again = [name for name in names if name not in CONTROL_FLOW]
    if again:
        return "wrong", f"the third step compiled {again[0]} again: call jax.jit once, outside of the step"
    return "ok", "one program for all steps"


def _constant_weights(subject: Subject) -> Verdict:
    probe, weights = subject.probe, subject.probe.groups["weights"]
    outside = probe.outside["weights"]
    if outside and probe.depends_outside(outside):
        return "wrong", f"{outside[0].path!r} is in no leaf of the state: its value is a constant of the program"
    if not weights:
        return "not checked", "no leaf of the state holds weights"
    if not probe.depends_on(weights):
        return "wrong", "neither logs nor anything else depends on the weights in the state: the step uses other values"
    if probe.unchanged(weights):
        return "wrong", f"{len(probe.outcomes)} steps leave all weights as they were"
    other = next((b for b in probe.batches[1:] if not _equal(b, probe.batches[0])), None)
    if other is not None:
        updated, otherwise = probe.first().leaves, probe.run(batch=other).leaves
        if all(same_bits(updated[i], otherwise[i]) for i in weights):
            return "wrong", "the update does not depend on the batch: the gradient is zero, or does not reach the weights"
    return "ok", "logs depend on the weights, and steps change them"


def _equal(a: Any, b: Any) -> bool:
    return all(same_bits(to_host(x), to_host(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _inference(subject: Subject) -> Verdict:
    probe, seen = subject.probe, []
    if not probe.facts:
        return "not checked", NO_MODEL
    if any(fact.random for fact in probe.facts):
        if not _random(probe):
            return "wrong", "the step does not depend on the seeds of dropout and the like: call the model with training=True"
        seen.append("dropout and the like are on")
    positions = [probe.position[id(v)] for fact in probe.facts for v in fact.statistics if id(v) in probe.position]
    if positions:
        if probe.depends_on(positions):
            return "wrong", "the step normalizes with moving averages, not with those of the batch: call with training=True"
        seen.append("the batch's own statistics are used")
    return ("ok", "; ".join(seen)) if seen else ("not checked", "the models do the same in training and in inference")


def _random(probe: Probe, function: str = "train") -> bool:
    seeds = probe.outside["seeds"] if function == "evaluate" else _seed_variables(probe)
    return probe.depends_on(probe.groups["seeds"], function) or probe.depends_outside(seeds, function)


def _seed_variables(probe: Probe) -> list[keras.Variable]:
    return [v for group, variables in variables_of(probe.objects) if group == "seeds" for v in variables]


def _seeds(subject: Subject) -> Verdict:
    probe = subject.probe
    if not probe.groups["seeds"] and not probe.outside["seeds"]:
        return "not checked", "there are no seeds"
    if probe.outside["seeds"] and probe.depends_outside(probe.outside["seeds"]):
        return "wrong", f"{probe.outside['seeds'][0].path!r} is in no leaf of the state: each step draws the same numbers"
    used = [i for i in probe.groups["seeds"] if probe.depends_on([i])]
    if not used and probe.depends_outside(_seed_variables(probe)):
        return "wrong", "the step does not use the seeds in the state, but constants: each step draws the same numbers"
    if not used:
        return "not checked", "the step draws no random numbers"
    constant = next((i for i in used if probe.unchanged([i])), None)
    if constant is not None:
        return "wrong", f"steps leave {probe.paths[constant]} as it was: each draws the same numbers; return the updated seeds"
    return "ok", "each step draws other numbers"


def _statistics(subject: Subject) -> Verdict:
    probe = subject.probe
    variables = [v for fact in probe.facts for v in fact.statistics]
    if not variables:
        return "not checked", "no layer has moving statistics" if probe.facts else NO_MODEL
    outside = next((v for v in variables if id(v) not in probe.position), None)
    if outside is not None:
        return "wrong", f"{outside.path!r} is in no leaf of the state: evaluation uses its first value"
    constant = next((v for v in variables if probe.unchanged([probe.position[id(v)]])), None)
    if constant is not None and probe.depends_on([probe.position[id(v)] for v in variables]):
        return "not checked", "the step runs in inference mode"
    if constant is not None:
        return "wrong", f"steps leave {constant.path!r} as it was: return the updated non-trainable variables"
    return "ok", f"steps change all {len(variables)}"


def _layer_losses(subject: Subject) -> Verdict:
    probe, contexts = subject.probe, layer_losses(subject.probe.models)
    present = [any(fact.regularized for fact in probe.facts), any(fact.adds for fact in probe.facts)]
    if not any(present):
        return "not checked", "the layers have no losses" if probe.facts else NO_MODEL
    for (kind, context), is_present in zip(contexts.items(), present, strict=True):
        if is_present and not probe.depends_in(context):
            return "wrong", f"{kind} are not part of the loss: add sum(model.losses), or take return_losses=True"
    return "ok", "all are part of the loss"


def _optimizer(subject: Subject) -> Verdict:
    probe, slots = subject.probe, subject.probe.groups["slots"]
    outside = probe.outside["slots"]
    needed = [v for v in outside if v.shape or "iteration" in v.name]
    if needed:
        return "wrong", f"{needed[0].path!r} is in no leaf of the state: each step starts from its first value"
    if not slots:
        return "not checked", "no leaf of the state belongs to an optimizer"
    if probe.unchanged(slots):
        return "wrong", f"steps leave all {len(slots)} leaves as they were: return the updated optimizer variables"
    arrays = [i for i in slots if np.ndim(probe.before[i])]
    if arrays and probe.unchanged(arrays):
        return "wrong", f"steps leave all slots as they were, such as {probe.paths[arrays[0]]}: return the updated ones"
    counts = [i for i in slots if not np.ndim(probe.before[i]) and jnp.issubdtype(jnp.result_type(probe.before[i]), jnp.integer)]
    if counts and probe.unchanged(counts):
        return "wrong", f"steps leave {probe.paths[counts[0]]} as it was: return the updated number of iterations"
    return "ok", "steps change the optimizer's state"


def _schedule(subject: Subject) -> Verdict:
    probe = subject.probe
    for optimizer in (each for each in probe.objects if isinstance(each, keras.Optimizer)):
        other = next((n for n in ITERATIONS if _rate(optimizer, n) != _rate(optimizer, 0)), None)
        if other is None:
            continue
        i = probe.position.get(id(optimizer.iterations))
        if i is None:
            return "wrong", "the number of iterations is in no leaf of the state: the rate stays the first one"
        if probe.unchanged(probe.groups["slots"]):
            return "not checked", "the optimizer's state is not threaded"
        if probe.unchanged([i]):
            return "wrong", f"steps leave {probe.paths[i]} as it was: the rate stays {_rate(optimizer, 0):g}"
        later = jnp.asarray(other, jnp.result_type(probe.before[i]))
        expected, actual = probe.first(), probe.run({i: later})
        if all(same_bits(expected.leaves[j], actual.leaves[j]) for j in probe.groups["weights"]):
            return "wrong", f"the update after {other} iterations is the first one: the rate is a constant of the program"
        return "ok", "the update follows it"
    return "not checked", "no optimizer with a schedule is known"


def _rate(optimizer: keras.Optimizer, iterations: int) -> float:
    with keras.StatelessScope([(optimizer.iterations, jnp.asarray(iterations, optimizer.iterations.dtype))]):
        return float(jnp.asarray(optimizer.learning_rate))


def _metrics_updated(subject: Subject) -> Verdict:
    probe, found = subject.probe, subject.probe.groups["metrics"]
    if probe.outside["metrics"]:
        return "wrong", f"{probe.outside['metrics'][0].path!r} is in no leaf of the state"
    if not found:
        return "not checked", "the state has no metrics"
    constant = next((group for group in _metric_groups(probe) if probe.unchanged(group)), None)
    if constant is not None:
        return "wrong", f"steps leave {probe.paths[constant[0]]} as it was: return the updated variables of the metrics"
    return "ok", "steps update them"


def _metric_groups(probe: Probe) -> list[list[int]]:
    """Returns the positions of the metrics' variables, by metric where their paths tell."""
    groups: dict[str, list[int]] = {}
    for i in probe.groups["metrics"]:
        name = re.match(r".*\.metrics\['[^']*'\]", probe.paths[i])
        groups.setdefault(name[0] if name else "", []).append(i)
    return list(groups.values())


def _metrics_reset(subject: Subject) -> Verdict:
    probe, found = subject.probe, subject.probe.groups["metrics"]
    if not subject.has_reset or not found:
        return "not checked", "the state has no metrics" if subject.has_reset else "there is no function that resets: pass reset="
    after = [to_host(leaf) for leaf in jax.tree.leaves(probe.learner.reset(probe.states[-1]))]
    for i in found:
        if not same_bits(after[i], to_host(probe.before[i])):
            return (
                "wrong",
                f"reset leaves {probe.paths[i]} at {np.ravel(after[i])[:1]}: the next epoch starts from this one's values",
            )
    return "ok", "reset gives the first values back"


def _sample_weights(subject: Subject) -> Verdict:
    probe, batch = subject.probe, subject.probe.batches[0]
    if _weights_of(batch) is None:
        return "not checked", "the batches have none"
    other = jax.tree.map(lambda w: w * np.linspace(0.25, 2, w.size, dtype=w.dtype).reshape(w.shape), _weights_of(batch))
    replaced = batch._replace(sample_weight=other) if isinstance(batch, Batch) else type(batch)([*batch[:2], other])
    if all(same_bits(a, b) for a, b in _training(probe, probe.first(), probe.run(batch=replaced))):
        return "wrong", "other weights of the examples give the same loss and the same update"
    return "ok", "loss and update depend on them"


def _weights_of(batch: Any) -> Any:
    if isinstance(batch, Batch):
        return batch.sample_weight
    return batch[2] if isinstance(batch, tuple | list) and len(batch) == 3 else None


def _masks(subject: Subject) -> Verdict:
    probe, batch = subject.probe, subject.probe.batches[0]
    masks = [mask for fact in probe.facts for mask in fact.masks]
    if not any(mask is not None and not mask.all() for mask in masks):
        return "not checked", "no output has a mask with masked positions" if probe.facts else NO_MODEL
    y = batch.y if isinstance(batch, Batch) else batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    leaves, structure = jax.tree.flatten(y)
    if len(leaves) != len(masks) or any(
        m is not None and np.shape(v)[: m.ndim] != m.shape for m, v in zip(masks, leaves, strict=True)
    ):
        return "not checked", "the batches have no targets that are shaped like the masks"
    other = jax.tree.unflatten(structure, [_other_targets(v, m) for v, m in zip(leaves, masks, strict=True)])
    replaced = batch._replace(y=other) if isinstance(batch, Batch) else type(batch)([batch[0], other, *batch[2:]])
    if not all(same_bits(a, b) for a, b in _training(probe, probe.first(), probe.run(batch=replaced))):
        return "wrong", "targets of masked positions change the loss or the update"
    return "ok", "targets of masked positions do not matter"


def _other_targets(y: Any, mask: np.ndarray | None) -> Any:
    """Returns targets whose masked positions have other values, of those that occur."""
    y = np.asarray(y)
    if mask is None:
        return y
    return np.where(mask.reshape(*mask.shape, *[1] * (y.ndim - mask.ndim)), y, y.max() + y.min() - y).astype(y.dtype)


def _training(probe: Probe, a: Any, b: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields what training consists of, in two outcomes: weights, slots and losses."""
    yield from ((a.leaves[i], b.leaves[i]) for i in [*probe.groups["weights"], *probe.groups["slots"]])
    yield from ((value, b.logs[name]) for name, value in a.logs.items() if is_loss(name))


def _evaluation_changes(subject: Subject) -> Verdict:
    probe = subject.probe
    if not subject.has_evaluate:
        return "not checked", "a step has no evaluation: pass a Learner"
    outcome = probe.first("evaluate")
    for group in ("weights", "statistics", "slots"):
        for i in probe.groups[group]:
            if not same_bits(outcome.leaves[i], to_host(probe.before[i])):
                return "wrong", f"evaluation changes {probe.paths[i]}, one of the {group}"
    return "ok", "weights, statistics and slots stay as they were"


def _evaluation_mode(subject: Subject) -> Verdict:
    probe, seen = subject.probe, []
    if not subject.has_evaluate or not probe.facts:
        return "not checked", NO_MODEL if subject.has_evaluate else "a step has no evaluation: pass a Learner"
    if any(fact.random for fact in probe.facts) and not any(fact.random_in_inference for fact in probe.facts):
        if _random(probe, "evaluate"):
            return "wrong", "its results depend on the seeds of dropout and the like: call the model with training=False"
        seen.append("dropout and the like are off")
    positions = [probe.position[id(v)] for fact in probe.facts for v in fact.statistics if id(v) in probe.position]
    if positions:
        if not probe.depends_on(positions, "evaluate"):
            return "wrong", "it normalizes with the batch's own statistics: call the model with training=False"
        seen.append("the moving statistics are used")
    return ("ok", "; ".join(seen)) if seen else ("not checked", "the models do the same in training and in inference")


NO_MODEL = "no model is known that takes the batch's inputs: pass models=[...]"

TRAPS: dict[str, Callable[[Subject], Verdict]] = {
    "state signature": _signature,
    "shared buffers": _buffers,
    "recompilation": _recompilation,
    "constant weights": _constant_weights,
    "inference mode in training": _inference,
    "seeds not threaded": _seeds,
    "statistics not threaded": _statistics,
    "losses of layers missing": _layer_losses,
    "optimizer state not threaded": _optimizer,
    "schedule not advancing": _schedule,
    "metrics not updated": _metrics_updated,
    "metrics not reset": _metrics_reset,
    "sample weights ignored": _sample_weights,
    "masks ignored": _masks,
    "evaluation changes the state": _evaluation_changes,
    "evaluation in training mode": _evaluation_mode,
}
