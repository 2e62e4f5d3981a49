"""A learner, its initial state and its data, on one device or on a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from research import debugging, distributed
from research.cli.arguments import parse_mesh
from research.cli.contract import check_learner
from research.cli.experiment import Experiment
from research.cli.options import Options
from research.core.learner import Learner
from research.core.state import InvalidArgument
from research.data.batches import Batches
from research.distributed import layouts
from research.transforms.init import init_abstract


class Placed(NamedTuple):
    """What an experiment trains, on its devices.

    `local_learner` and `local_splits` are what the experiment's own functions get, beside the state as `processes.to_host`
    returns it: one of several processes cannot read arrays that are spread over all of them, so these stay within the process.
    In a single process they are the learner and the splits that are trained.
    """

    learner: Learner
    state: Any
    splits: dict[str, Batches]
    local_learner: Learner
    local_splits: dict[str, Batches]


def place(experiment: Experiment, config: Any, options: Options, splits: dict[str, Batches]) -> Placed:
    """Builds an experiment's learner and initial state, on one device or sharded over the mesh of the options.

    With several processes and no mesh, batches are split over all devices. Raises `InvalidArgument` for a mesh that the devices
    do not make up, and for a layout without a mesh.
    """

    def build() -> Learner:
        return check_learner(experiment, experiment.module.build(config))

    if options.mesh is None and jax.process_count() == 1:
        if options.layout is not None:
            raise InvalidArgument(f"--layout {options.layout} without --mesh; expected both, as in --mesh fsdp=-1.")
        learner = build()
        state = learner.init()
        debugging.check_learner(learner, state)
        return Placed(learner, state, splits, learner, splits)
    learner, state, mesh = _build_on_mesh(experiment, build, options)
    debugging.check_learner(learner, state)
    replicated = distributed.replicated_leaves(learner.names, state)
    if replicated:
        print(describe_replicated(replicated))
    sharded = {name: distributed.shard_batches(split, mesh, divides=name == "train") for name, split in splits.items()}
    if jax.process_count() == 1:
        return Placed(learner, state, sharded, learner, sharded)
    local_learner, _ = init_abstract(build)
    return Placed(learner, state, sharded, local_learner, splits)


def _build_on_mesh(experiment: Experiment, build: Callable[[], Learner], options: Options) -> tuple[Learner, Any, Mesh]:
    """Returns a learner and its state on the mesh of the options. A population's members may be spread over an axis `members`."""
    axes = parse_mesh(options.mesh or "data=-1")
    layout = None if options.layout is None else getattr(distributed, options.layout)
    if experiment.member is None:
        mesh = distributed.mesh(None, **axes)
        return *distributed.build_sharded(build, mesh, layout), mesh
    if layout is not None or axes.keys() - {"members", "data"}:
        raise InvalidArgument(
            f"--mesh {options.mesh}{'' if layout is None else f' --layout {options.layout}'}: a population is spread by "
            "its members and its batches; expected --mesh members=4 or --mesh data=2,members=-1, and no --layout."
        )
    mesh = distributed.mesh(None, **{"tensor" if axis == "members" else axis: size for axis, size in axes.items()})
    learner = distributed.shard(build(), mesh, layouts.members if "members" in axes else distributed.data)
    return learner, learner.init(), mesh


def describe_replicated(leaves: list[tuple[str, int]]) -> str:
    """Returns one line about leaves, given by name and bytes, that are large and on every device all the same.

    >>> describe_replicated([("embedding", 3 << 20), ("head", 2 << 20)])
    'replicated on every device, though large: embedding (3.0 MiB), head (2.0 MiB), 5.0 MiB in all; a layout can split them'
    """
    shown = ", ".join(f"{name} ({size / (1 << 20):.1f} MiB)" for name, size in leaves[:3])
    rest = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
    total = sum(size for _, size in leaves) / (1 << 20)
    return f"replicated on every device, though large: {shown}{rest}, {total:.1f} MiB in all; a layout can split them"
