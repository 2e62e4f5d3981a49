"""Whether training is right: equal to Keras' `fit`, and free of the traps that hand-written steps fall into."""

import io
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from rich.markup import escape

from research.core.learner import Learner, as_optimizer, supervised
from research.core.state import Batch, InvalidArgument, State, check_type, layer_metrics, states_in, type_name
from research.data.batches import Batches
from research.debugging.against_keras import Tensor, compare
from research.debugging.probe import Probe
from research.debugging.traps import Subject, Trap, broken_contract, find_traps
from research.keras_fit.from_keras import from_keras

SHOWN = 12  # tensors of a kind that are shown


class Check(NamedTuple):
    """What `check` found. `print` shows it as a table.

    `tensors` has the difference to Keras' `fit` for each tensor of the training, empty if it was not compared; `traps` the
    verdict on each trap, empty if they were not looked for. `ok` says whether nothing is wrong, `problem` what is wrong first, in
    one line, None if nothing.

    >>> found = Check([Tensor("weights", "dense/kernel", 3.0, 2e-7, None)])
    >>> found.ok, found.problem
    (False, "weights dense/kernel differs from Keras' fit by 3 ulps (2e-07)")
    """

    tensors: list[Tensor]
    traps: list[Trap] = []  # noqa: RUF012  (never changed)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """What is wrong first, in one line, or None."""
        wrong = (row for row in self.tensors if not row.is_right)
        lines = (f"{r.group} {r.name} differs from Keras' fit by {r.ulps:.6g} ulps ({r.absolute:.3g})" for r in wrong)
        return next(itertools.chain(lines, (f"{t.name}: {t.detail}" for t in self.traps if t.verdict == "wrong")), None)

    def __rich__(self) -> Any:
        """Returns a table of rich."""
        return _table(self)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, highlight=False, width=130).print(self)
        return text.getvalue().rstrip("\n")


def check(
    subject: Any,
    data: Any,
    models: Any = (),
    *,
    state: Any = None,
    reset: Callable[[Any], Any] | None = None,
    steps: int = 3,
    loss: Any = None,
    optimizer: Any = "rmsprop",
    metrics: Any = None,
    weighted_metrics: Any = None,
    loss_weights: Any = None,
) -> Check:
    """Returns whether training is right: equal to Keras' own `fit`, and free of the traps of hand-written steps.

    `subject` is one of

    - a Keras model, with what `model.compile` takes, as for `research.supervised`: Keras' `fit` and the step of that learner run
      side by side from the same weights on the same batches. The model is compiled with these arguments;
    - a compiled Keras model alone: the same with `research.from_keras`;
    - a learner: looked through for traps; one of `research.supervised` is compared with Keras' `fit` as well;
    - a training step written by hand, `(state, batch) -> (state, logs)`, where `logs` may be the loss alone, with its first
      `state`, and with `reset(state)` if there is a function that empties the metrics: looked through for traps.

    `data` is `Batches`, of which the first `steps` are taken, or a list of batches. Those of a hand-written step may have any
    structure; the models' inputs are known in a `Batch` and in `(x, y)` or `(x, y, sample_weight)`. `models` are the Keras
    objects that a hand-written learner or step works with: models, and its own optimizers, metrics and seed generators.

    Compared are weights, statistics, seeds, optimizer slots, metrics and logs, after each step: on one CPU the differences are 0
    ulps, or those that DEVIATIONS.md names. Each trap is looked for by an experiment on the step, such as other seeds, other
    weights or stronger regularizers: `traps.TRAPS` lists them. Keras objects have the same values afterwards as before.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    >>> found = check(model, research.from_arrays(np.ones((8, 2)), np.ones((8, 1)), batch_size=4), loss="mse", optimizer="adam")
    >>> found.ok, max(row.ulps for row in found.tensors)
    (True, 0.0)
    >>> weights, batches = [np.array(v.value) for v in model.trainable_variables], [research.Batch(np.ones((4, 2)))]
    >>> check(lambda state, batch: (state, model(batch.x)[0, 0]), batches, model, state=weights).problem
    'constant weights: neither logs nor anything else depends on the weights in the state: the step uses other values'
    """
    batches = _first_batches(data, steps)
    objects = list(models) if isinstance(models, list | tuple) else [models]
    for each in objects:
        check_type(each, _KERAS, "check: one of the models", "a model, layer, optimizer, metric or seed generator of Keras")
    if isinstance(subject, keras.Model):
        given = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics, "loss_weights": loss_weights}
        return Check(_compare_model(subject, batches, optimizer, given))
    if isinstance(subject, Learner):
        state = subject.init() if state is None else state
        tensors = _compare(subject, batches) if _is_comparable(subject) else []
        return Check(tensors, _traps(subject, None, state, batches, objects, has_reset=True))
    check_type(
        subject, Callable, "check: the step", "a keras.Model, a research.Learner, or a step (state, batch) -> (state, logs)"
    )
    if state is None:
        raise InvalidArgument("check: a step needs its first state: check(step, data, models, state=...).")
    return Check([], _traps(_as_learner(subject, state, reset), subject, state, batches, objects, has_reset=reset is not None))


def _compare_model(model: keras.Model, batches: list[Batch], optimizer: Any, given: dict[str, Any]) -> list[Tensor]:
    if all(value is None for value in given.values()) and model.compiled:
        return compare(model, from_keras(model, batches[0]), batches)
    optimizer = as_optimizer(optimizer, [model])
    if not isinstance(optimizer, keras.Optimizer):
        raise InvalidArgument("check: the optimizer is not one of Keras, whose fit takes no other: pass a learner instead.")
    return _compare(supervised(model, **given, optimizer=optimizer, example=batches[0]), batches)


def _as_learner(step: Callable[..., Any], state: Any, reset: Callable[[Any], Any] | None) -> Learner:
    """Returns a step as a learner whose evaluation does nothing."""

    def evaluate(state: Any, batch: Any) -> Any:
        return state, {}

    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), state)
    return Learner(lambda: state, reset or (lambda state: state), _with_logs(step), evaluate, evaluate, names)


_KERAS = (keras.Layer, keras.Optimizer, keras.Metric, keras.random.SeedGenerator)


def _is_comparable(learner: Learner) -> bool:
    """Returns whether Keras' `fit` does what a learner does: `supervised` made it, with an optimizer of Keras."""
    model = next((model for model, _ in learner.targets), None)
    return learner.compile_args is not None and isinstance(learner.names, State) and not layer_metrics(model)


def _compare(learner: Learner, batches: list[Batch]) -> list[Tensor]:
    ((model, _),) = learner.targets
    assert learner.compile_args is not None
    model.compile(**learner.compile_args)
    return compare(model, learner, batches)


def _with_logs(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a step so that its logs are a dict."""

    def train(state: Any, batch: Any) -> Any:
        result = step(state, batch)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise InvalidArgument(f"check: the step returned {type_name(result)}, expected (state, logs).")
        return result if isinstance(result[1], Mapping) else (result[0], {"loss": result[1]})

    return train


def _traps(learner: Learner, step: Any, state: Any, batches: list[Any], objects: list[Any], *, has_reset: bool) -> list[Trap]:
    if not objects:
        objects = [model for model, _ in learner.targets]
        objects += [] if learner.compile_args is None else [learner.compile_args["optimizer"]]
    if not objects and not states_in(state) and not learner.state_mapping(learner.names):
        raise InvalidArgument("check: nothing tells which leaves of the state are weights: pass models=[...] that the step uses.")
    broken = broken_contract(learner, state, batches[0])
    if broken is not None:
        return [broken]
    shapes = [jax.tree.map(np.shape, batch) for batch in batches]
    probe = Probe(learner, state, [b for b, shape in zip(batches, shapes, strict=True) if shape == shapes[0]], objects)
    compiled = step or jax.jit(learner.train, donate_argnums=0)
    return find_traps(Subject(probe, has_evaluate=step is None, has_reset=has_reset, step=compiled, is_learner=step is None))


def _first_batches(data: Any, steps: int) -> list[Any]:
    """Returns the first batches of the data."""
    if isinstance(data, Batches):
        return [data.batch(step) for step in range(steps)]
    if not isinstance(data, Iterable) or isinstance(data, Batch | dict | np.ndarray | jax.Array):
        raise InvalidArgument(f"check: the data is {type_name(data)}, expected research.Batches or a list of batches.")
    batches = list(itertools.islice(data, steps))
    if not batches:
        raise InvalidArgument("check: the data has no batches, expected at least one.")
    return batches


def _table(found: Check) -> Any:
    from rich.console import Group

    end = "[green]nothing is wrong[/]" if found.problem is None else f"[bold red]wrong:[/] {escape(found.problem)}"
    parts = [*([_tensor_table(found.tensors)] if found.tensors else []), *([_trap_table(found.traps)] if found.traps else [])]
    return Group(*(item for part in parts for item in (part, "")), end)


def _tensor_table(tensors: list[Tensor]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("Keras' fit and here")
    table.add_column("tensor", overflow="fold")
    table.add_column("ulps", justify="right", no_wrap=True)
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("")
    for group, rows in itertools.groupby(tensors, lambda row: row.group):
        ordered = sorted(rows, key=lambda row: (row.is_right, -row.ulps))
        different = [row for row in ordered if row.ulps]
        for row in different[:SHOWN]:
            note = row.deviation or "[bold red]not equal[/]"
            table.add_row(group, row.name, f"{row.ulps:,.0f}", f"{row.absolute:.3g}", note)
        if len(different) > SHOWN:
            table.add_row(group, f"and {len(different) - SHOWN} more")
        if len(different) < len(ordered):
            table.add_row(group, f"{len(ordered) - len(different)} of {len(ordered)}", "0", "0", "[green]equal[/]")
    return table


def _trap_table(traps: list[Trap]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("trap", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for trap in traps:
        style = {"ok": "green", "wrong": "bold red"}.get(trap.verdict, "dim")
        table.add_row(trap.name, f"[{style}]{trap.verdict}[/]", escape(trap.detail))
    return table
