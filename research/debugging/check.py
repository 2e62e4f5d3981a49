"""Whether training is right: equal to Keras' `fit`, and free of the traps that hand-written steps fall into."""

import io
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from research.core.learner import Learner, as_optimizer, supervised
from research.core.state import Batch, InvalidArgument, State, type_name
from research.data.batches import Batches
from research.debugging.against_keras import Tensor, compare
from research.keras_fit.from_keras import from_keras

SHOWN = 12  # tensors of a kind that are shown


class Check(NamedTuple):
    """What `check` found. `print` shows it as a table.

    `tensors` has the difference to Keras' `fit` for each tensor of the training, empty if it was not compared. `ok` says whether
    nothing is wrong, `problem` what is, in one line, None if nothing.

    >>> found = Check([Tensor("weights", "dense/kernel", 3.0, 2e-7, None)])
    >>> found.ok, found.problem
    (False, "weights dense/kernel differs from Keras' fit by 3 ulps (2e-07)")
    """

    tensors: list[Tensor]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """What is wrong first, in one line, or None."""
        wrong = (row for row in self.tensors if not row.is_right)
        lines = (f"{r.group} {r.name} differs from Keras' fit by {r.ulps:.6g} ulps ({r.absolute:.3g})" for r in wrong)
        return next(lines, None)

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
    *,
    steps: int = 3,
    loss: Any = None,
    optimizer: Any = "rmsprop",
    metrics: Any = None,
    weighted_metrics: Any = None,
    loss_weights: Any = None,
) -> Check:
    """Returns whether training equals that of Keras' own `fit`: the largest difference for each tensor, over `steps` steps.

    `subject` is

    - a Keras model, with what `model.compile` takes, as for `research.supervised`: Keras' `fit` and the step of that learner run
      side by side from the same weights on the same batches. The model is compiled with these arguments;
    - a compiled Keras model alone: the same with `research.from_keras`;
    - a learner that `research.supervised` made.

    `data` is `Batches`, of which the first are taken, or a list of batches. Weights, statistics, seeds, optimizer slots, metrics
    and logs are compared after each step. Models, optimizers and metrics have the same values afterwards as before. On one CPU,
    differences are 0 ulps, or those that DEVIATIONS.md names. Raises `InvalidArgument` for a learner that Keras has no `fit` for.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    >>> found = check(model, research.from_arrays(np.ones((8, 2)), np.ones((8, 1)), batch_size=4), loss="mse", optimizer="adam")
    >>> found.ok, max(row.ulps for row in found.tensors)
    (True, 0.0)
    """
    batches = _first_batches(data, steps)
    if isinstance(subject, keras.Model):
        given = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics, "loss_weights": loss_weights}
        if all(value is None for value in given.values()) and subject.compiled:
            return Check(compare(subject, from_keras(subject, batches[0]), batches))
        optimizer = as_optimizer(optimizer, [subject])
        if not isinstance(optimizer, keras.Optimizer):
            raise InvalidArgument("check: the optimizer is one of optax, expected one of Keras, whose fit takes no other.")
        subject = supervised(subject, **given, optimizer=optimizer, example=batches[0])
    if not isinstance(subject, Learner):
        raise InvalidArgument(f"check: {type_name(subject)} can't be checked, expected a keras.Model or a research.Learner.")
    if not comparable(subject):
        raise InvalidArgument("check: Keras has no fit that this learner could be compared with.")
    return Check(compare_learner(subject, batches))


def comparable(learner: Learner) -> bool:
    """Returns whether Keras' `fit` does what a learner does: `supervised` made it, with an optimizer of Keras.

    >>> import optax, research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> [comparable(research.supervised(model, loss="mse", optimizer=each)) for each in ("adam", optax.adam(1e-3))]
    [True, False]
    """
    return learner.compile_args is not None and isinstance(learner.names, State)


def compare_learner(learner: Learner, batches: list[Batch]) -> list[Tensor]:
    """Returns the differences between a learner that is `comparable` and Keras' `fit`. Its model is compiled for that."""
    ((model, _),) = learner.targets
    assert learner.compile_args is not None
    model.compile(**learner.compile_args)
    return compare(model, learner, batches)


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
    from rich.table import Table

    table = Table(box=None, pad_edge=False, caption_justify="left", title_justify="left")
    table.add_column("")
    table.add_column("tensor", overflow="fold")
    table.add_column("ulps", justify="right", no_wrap=True)
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("")
    for group, rows in itertools.groupby(found.tensors, lambda row: row.group):
        ordered = sorted(rows, key=lambda row: (row.is_right, -row.ulps))
        different = [row for row in ordered if row.ulps]
        for row in different[:SHOWN]:
            note = row.deviation or "[bold red]not equal[/]"
            table.add_row(group, row.name, f"{row.ulps:,.0f}", f"{row.absolute:.3g}", note)
        if len(different) > SHOWN:
            table.add_row(group, f"and {len(different) - SHOWN} more")
        if len(different) < len(ordered):
            table.add_row(group, f"{len(ordered) - len(different)} of {len(ordered)}", "0", "0", "equal")
    table.caption = "nothing is wrong" if found.problem is None else f"wrong: {found.problem}"
    return table
