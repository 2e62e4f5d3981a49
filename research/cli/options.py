"""The options that every run has.

None of them changes the numbers: those that do are in the experiment's `Config`. What is done about bad steps changes them too;
the run's decisions.jsonl holds it. `--population` and `--vary` become a part of the config, see `cli.members`.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from research.cli import checkpoints
from research.cli.fields import Interval
from research.core.state import InvalidArgument

OnBadStep = Literal["stop", "skip", "rollback"]
COUNT = Interval("[1, 2147483647]")

# Options of one start. config.json does not record them, and `resume` does not repeat them; but those of a population are part of
# its config.
OF_ONE_START = (
    "population",
    "vary",
    "run_dir",
    "allow_changed",
    "profile",
    "coordinator",
    "processes",
    "process",
    "join_timeout",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is executed and recorded.

    >>> Options(log_every=10).recorded()["log_every"]
    10
    """

    population: Annotated[int, Interval("[1, 10000]")] | None = None
    """Train so many members as one program, each with another seed, or as --vary says."""
    vary: str | None = None
    """What differs between members: seed,learning_rate=log:1e-4:1e-1,dropout=0.1:0.5 (or linear:LOW:HIGH)."""
    run_dir: Path | None = None
    """Directory of the run; by default a new one in runs/NAME/."""
    from_: Annotated[str | None, arg(name="from")] = None
    """Start from the weights of another run (directory or name), a checkpoint, or a safetensors, .keras or .weights.h5 file."""
    only: str | None = None
    """Of these, take the weights whose names this regular expression matches."""
    everything: bool = False
    """Take the optimizer's state and all else too, not only weights; from a run or a checkpoint."""
    allow_changed: bool = False
    """Go on with a run although its code, its config or versions of packages changed since its checkpoints were written."""
    log_every: Annotated[int, COUNT] = 50
    """Steps between two logs within an epoch."""
    evaluate_every: Annotated[int, COUNT] | None = None
    """Steps between two evaluations within an epoch; by default one at its end only."""
    norms: Literal["none", "global", "layers"] = "global"
    """Log the norms of gradients, updates and weights, and the learning rate: none, of all weights, or of each layer too."""
    checkpoint_every: Annotated[int, Interval("[0, 2147483647]")] | str = "auto"
    """How often to write a checkpoint: 500 (steps), 2epochs, 30s, 5min, 1h, 0 (at the end only), or auto: each minute, or as
    often as takes 1% of the time."""
    keep: Annotated[int, COUNT] = 2
    """Number of latest checkpoints to keep."""
    keep_every: Annotated[int, COUNT] | None = None
    """Keep one checkpoint of each so many steps too."""
    keep_best: str | None = None
    """Keep the checkpoint with the best metric too, of those at the end of an epoch: val_loss:min, or val_accuracy:max."""
    on_nonfinite: OnBadStep = "stop"
    """When a step makes the loss or the state NaN or infinite: stop, skip it, or roll back to the checkpoint before it."""
    on_spike: OnBadStep | None = None
    """The same when the loss jumps up."""
    spike_threshold: Annotated[float, Interval("(0, 1e6]")] = 10.0
    """A jump: so many robust standard deviations above the median of the steps before."""
    spike_window: Annotated[int, Interval("[2, 100000]")] = 128
    """Number of steps before."""
    max_skips: Annotated[int, COUNT] = 10
    """Stop at the next bad step after so many that were skipped or rolled back."""
    profile: tuple[Annotated[int, COUNT], Annotated[int, COUNT]] | None = None
    """First and last step of a trace by JAX's profiler, written to the run's profile/."""
    mesh: str | None = None
    """Device mesh: data=8, or data=2,fsdp=-1. data splits batches, fsdp weights too, tensor layers; -1 takes the rest."""
    layout: Literal["data", "fsdp", "tensor"] | None = None
    """How weights are sharded on the mesh; by default according to its axes."""
    compiler_flags: bool = True
    """Pass the flags that are recommended for the chips to their compilers."""
    coordinator: str | None = None
    """host:port where the first of several processes listens; found automatically on TPU pods, SLURM, Open MPI and GKE."""
    processes: Annotated[int, COUNT] | None = None
    """Number of processes."""
    process: Annotated[int, Interval("[0, 2147483647]")] | None = None
    """Index of this process, from 0."""
    join_timeout: Annotated[int, Interval("[1, 1000000]")] = 300
    """Seconds to wait for the other processes."""

    def __post_init__(self) -> None:
        if self.from_ is None and (self.only is not None or self.everything):
            raise InvalidArgument(f"--{'everything' if self.only is None else 'only'} without --from; expected both.")
        try:
            re.compile(self.only or "")
        except re.error as error:
            raise InvalidArgument(f"--only {self.only}: expected a regular expression ({error}).") from error
        checkpoints.parse_cadence(self.checkpoint_every)
        checkpoints.parse_best(self.keep_best)
        host, _, port = (self.coordinator or "localhost:1").rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
            raise InvalidArgument(f"--coordinator {self.coordinator}: expected host:port, with a port from 1 to 65535.")
        if self.profile is not None and self.profile[0] > self.profile[1]:
            first, last = self.profile
            raise InvalidArgument(
                f"--profile {first} {last}: expected the first and last step, with the last not before the first."
            )

    def recorded(self) -> dict[str, Any]:
        """Returns the options that config.json records and `resume` repeats."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in OF_ONE_START}
