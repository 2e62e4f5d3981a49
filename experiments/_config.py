"""The options that every experiment has; an experiment's `Config` inherits them and adds its own."""

from dataclasses import dataclass
from typing import Annotated

from research.cli.fields import Interval

Count = Annotated[int, Interval("[1, 2147483647]")]
CountOrZero = Annotated[int, Interval("[0, 2147483647]")]
Positive = Annotated[float, Interval("(0, 1e38]")]
NonNegative = Annotated[float, Interval("[0, 1e38]")]
Seed = Annotated[int, Interval("[0, 4294967295]")]  # NumPy takes no larger one
Fraction = Annotated[float, Interval("[0, 1)")]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long, in what batches and from which seed an experiment trains.

    A subclass may change a default. The docstring of the option stays, unless the subclass writes another. A value outside of the
    interval in an option's annotation is wrong usage: the command exits with code 2.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Config(TrainingOptions):
    ...     units: int = 64
    ...     epochs: int = 5
    >>> Config(batch_size=16)
    Config(epochs=5, steps=None, batch_size=16, seed=0, units=64)
    """

    epochs: CountOrZero = 20
    """Passes over the training data."""
    steps: CountOrZero | None = None
    """Training steps, to stop before the last epoch ends."""
    batch_size: Count = 32
    """Examples per step."""
    seed: Seed = 0
    """Seed of initial weights, dropout and other noise, the split of the data and its order."""

    def num_steps(self, steps_per_epoch: int) -> int:
        """Returns the number of training steps.

        >>> TrainingOptions(epochs=3).num_steps(10), TrainingOptions(epochs=3, steps=7).num_steps(10)
        (30, 7)
        """
        total = self.epochs * steps_per_epoch
        return total if self.steps is None else min(total, self.steps)
