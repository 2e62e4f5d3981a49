"""States on disk: written atomically while training continues, verified by checksums, restored onto any devices.

`leaves` has the layout of the arrays, `manifest` what a checkpoint claims to be.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp  # noqa: F401  (for the examples in docstrings)
import numpy as np
from jaxtyping import PyTree

from research.core.state import InvalidArgument
from research.distributed.processes import broadcast_from_first, is_first
from research.errors import one_line
from research.training import leaves, manifest
from research.training.checkpoint_policy import Keep
from research.training.loop import Hook
from research.training.manifest import ANY, Origin, verify


class Checkpoint(NamedTuple):
    """The state after `step` steps, and the logs of that step.

    >>> Checkpoint(step=3, state={"w": 1.0}, logs={"loss": 0.5}).step
    3
    """

    step: int
    state: Any
    logs: dict[str, Any]


class _Snapshot(NamedTuple):
    """A state that can be written: its leaves as arrays, their `leaf_specs` and their `weak_types`."""

    arrays: list[Any]
    specs: list[list[Any]]
    weak: list[int]


def _snapshot(state: PyTree, names: PyTree) -> _Snapshot:
    specs = leaves.leaf_specs(state, names)
    return _Snapshot(leaves.storable(state), specs, leaves.weak_types(state))


def save(
    directory: Path, step: int, state: PyTree, names: PyTree, logs: PyTree = None, keep: int | Keep = 2, origin: Origin = ANY
) -> Path:
    """Writes a state to `directory/STEP` atomically, and removes all but the `keep` latest of its origin. Returns the path.

    `keep` may also be a function from the steps of all checkpoints to those to keep, see `checkpoint_policy.keep`. The one that
    is written stays in any case.

    The leaves are arrays of JAX or NumPy, or Python numbers; `state/` holds them in Orbax' layout. `manifest.json` holds the name
    (from `Learner.names`), shape and dtype of each leaf, the logs of the step, the `origin` of the checkpoint, size and checksum
    of every file, and a checksum of itself: `verify` detects what was changed, lost, added, or put in another's place. When
    `save` returns, everything is flushed to the disk, before earlier checkpoints are removed: a power cut loses no more than
    the death of the process.

    With several processes all have to call it. Raises `OSError` if it can't be written; earlier checkpoints stay intact. Raises
    `InvalidArgument` for a leaf that is not a number or an array of numbers.

    >>> import tempfile
    >>> path = save(Path(tempfile.mkdtemp()) / "checkpoints", 3, {"w": jnp.ones(2)}, {"w": "weight"}, {"loss": 0.5})
    >>> restored = restore(path, {"w": jnp.zeros(2)}, {"w": "weight"})
    >>> restored.step, restored.state, restored.logs
    (3, {'w': Array([1., 1.], dtype=float32)}, {'loss': array(0.5)})
    """
    if _is_saved(directory, step, origin):
        return _path(directory, step)
    return _save(directory, step, _snapshot(state, names), logs, keep, origin)


def _path(directory: Path, step: int) -> Path:
    return directory.absolute() / f"{step:09d}"


def _is_saved(directory: Path, step: int, origin: Origin) -> bool:
    """Returns whether this step was saved before, as seen by the first process: shared storage may lag for others."""
    path = _path(directory, step)
    return bool(broadcast_from_first(lambda: path.exists() and verify(path, origin) is None))


def _save(
    directory: Path, step: int, snapshot: _Snapshot, logs: PyTree, keep: int | Keep, origin: Origin, flush: Sequence[Path] = ()
) -> Path:
    """Writes a snapshot. With several processes each writes the shards of its devices, and the first one the manifest."""
    directory, final = directory.absolute(), _path(directory, step)
    partial = directory.with_name(f".{directory.name}.partial")
    writing = partial / final.name
    several, first = jax.process_count() > 1, is_first()
    try:
        if first:
            _remove(partial)
        (leaves.write_distributed if several else leaves.write)(writing / "state", snapshot.arrays)
        if first:
            manifest.write(writing, step, snapshot.specs, snapshot.weak, jax.device_get(logs or {}), origin)
            manifest.sync([*flush, partial, *partial.rglob("*")])
            _publish(partial, final)
        if several:
            _barrier(f"checkpoint {step}")
    except Exception as error:  # TensorStore wraps errors of the operating system in its own
        reason = " ".join(str(error).split())[:300]
        raise OSError(f"checkpoint of step {step} can't be written to {directory}: {reason}") from error
    finally:
        if first:
            _remove(partial)
    if first:
        _remove_others(directory, step, keep, origin)
    return final


def remove_others(directory: Path, keep: Keep, origin: Origin = ANY) -> None:
    """Removes the checkpoints of an origin that are not to be kept; the latest stays. With several processes, the first does it.

    For the end of training: what the last step scored may become known only after its checkpoint was written.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> for step in range(3):
    ...     path = save(directory, step, [1.0], ["rate"], keep=3)
    >>> remove_others(directory, lambda steps: steps[:1])
    >>> steps(directory)
    [0, 2]
    """
    saved = steps(directory)
    if is_first() and saved:
        _remove_others(directory, saved[-1], keep, origin)


def _remove_others(directory: Path, step: int, keep: int | Keep, origin: Origin) -> None:
    """Removes the checkpoints of an origin up to a step, but for that one and those to be kept."""
    own = [saved for saved in steps(directory) if saved <= step and _is_own(_path(directory, saved), origin)]
    kept = {step, *(keep(own) if callable(keep) else own[-keep:])}
    for old in own:
        if old not in kept:
            _remove(_path(directory, old))


def _is_own(path: Path, origin: Origin) -> bool:
    """Returns whether a checkpoint is of this run, intact or damaged: somebody may miss another one."""
    try:
        manifest.read(path, origin)
    except manifest.Foreign:
        return False
    except manifest.Damaged:
        pass
    return True


def _remove(path: Path) -> None:
    """Removes what there is: a directory, or a link or a file in its place, but nothing that a link leads to."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _publish(partial: Path, final: Path) -> None:
    """Moves `partial/STEP`, which is on the disk, to `final`, and flushes the entries that lead to it."""
    directory = final.parent
    if directory.exists():
        _remove(final)  # one that is damaged or does not belong here
        (partial / final.name).rename(final)
        manifest.sync([directory])
    else:
        partial.rename(directory)  # so that the directory never exists without a checkpoint
        manifest.sync([directory.parent])
        with contextlib.suppress(OSError):  # some of its parents may be as new, and others belong to somebody else
            manifest.sync(directory.parent.parents)


def steps(directory: Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, intact or damaged, in ascending order.

    >>> steps(Path("no/such/directory"))
    []
    """
    names = (path.name for path in directory.glob("[0-9]*")) if directory.is_dir() else ()
    return sorted(int(name) for name in names if re.fullmatch("[0-9]{9}|[1-9][0-9]{9,}", name))


def latest(directory: Path, report: Callable[[str], None], origin: Origin = ANY) -> Path | None:
    """Returns the path of the latest checkpoint in a directory that may be restored, or None if the directory does not exist.

    One that is damaged is skipped, and so is one that does not belong there: its manifest has another step than its directory,
    another run or config than `origin`, or a later format. `report` is called with a line about each, and with one about a
    checkpoint of version 0.1, whose manifest has no checksum. Raises `InvalidArgument` if none is left or the directory can't
    be read.

    >>> latest(Path("no/such/directory"), print) is None
    True
    """
    if not directory.exists():
        return None
    try:
        saved = steps(directory)
        os.listdir(directory)
    except OSError as error:
        raise InvalidArgument(
            f"{directory}: can't be read ({error.strerror}), expected a readable directory of checkpoints: fix its permissions."
        ) from error
    foreign = 0
    for step in reversed(saved):
        path = directory / f"{step:09d}"
        try:
            if manifest.check(path, origin).format == 1:
                report(f"checkpoint {path} was written by version 0.1: its step, logs and run can't be verified")
            return path
        except manifest.Damaged as damage:
            report(f"checkpoint {path} is damaged ({damage}) and skipped")
        except manifest.Foreign as difference:
            foreign += 1
            report(f"checkpoint {path} does not belong here ({difference}) and is skipped")
    counts = f"{len(saved) - foreign} damaged" + (f", {foreign} that do not belong here" if foreign else "")
    raise InvalidArgument(
        f"{directory}: no intact checkpoint is left ({counts}); restore one from a backup, or remove the directory to start over."
    )


def restore(path: Path, like: PyTree, names: PyTree, origin: Origin = ANY) -> Checkpoint:
    """Reads a checkpoint into a state shaped and sharded like `like`, a tree of arrays, numbers or `jax.ShapeDtypeStruct`s.

    Each device reads only its own shards, no matter how many devices wrote the checkpoint. An array of NumPy in `like` is
    restored as one, a Python number too. With several processes all have to call it.

    Raises `InvalidArgument` if the checkpoint is damaged, is not of the step that names its directory, or is of another run or
    config than `origin`. Raises it too if it is of another learner, and names the first leaf that differs.

    >>> import tempfile
    >>> path = save(Path(tempfile.mkdtemp()) / "checkpoints", 1, [jnp.arange(2)], ["count"])
    >>> restore(path, [jnp.zeros(2, jnp.int32)], ["count"]).state
    [Array([0, 1], dtype=int32)]
    """
    difference = broadcast_from_first(lambda: verify(path, origin))
    if difference is not None:
        raise InvalidArgument(f"checkpoint {path} can't be restored: {difference}; choose another one, or one from a backup.")
    return _restore(path, like, names)


def restore_latest(
    directory: Path, like: PyTree, names: PyTree, report: Callable[[str], None], origin: Origin = ANY
) -> Checkpoint | None:
    """Reads the `latest` checkpoint in a directory as `restore` does, its files only once. None if the directory does not exist.

    >>> restore_latest(Path("no/such/directory"), [1.0], ["rate"], print) is None
    True
    """

    def find() -> str | None:
        path = latest(directory, report, origin)
        return None if path is None else str(path)

    path = broadcast_from_first(find)
    return None if path is None else _restore(Path(path), like, names)


def _restore(path: Path, like: PyTree, names: PyTree) -> Checkpoint:
    contents = manifest.read(path)
    leaves.check_same(path, contents.leaves, like, names)
    try:
        state = leaves.read(path / "state", like, contents.leaves, contents.weak_types)
    except Exception as error:  # files that someone wrote a manifest for raise what they like in TensorStore
        reason = f"its state can't be read ({one_line(error, 200)})"
        raise InvalidArgument(
            f"checkpoint {path} can't be restored: {reason}; choose another one, or one from a backup."
        ) from error
    logs = {name: np.array(value, np.float64) for name, value in contents.logs.items()}  # null becomes NaN
    return Checkpoint(contents.step, state, logs)


@contextmanager
def async_saver(
    directory: Path, names: PyTree, keep: int | Keep = 2, origin: Origin = ANY, flush: Sequence[Path] = ()
) -> Iterator[Hook]:
    """Yields a hook for `loop.train` that saves the state in a thread while training continues.

    Training waits only for a copy of the state on the device, and for the previous save if it is still running. The thread also
    flushes the checkpoint to the disk, and before that the files `flush`, such as logs of the steps before it: 4 ms of CPU time,
    and 8 to 85 ms of waiting for the disk (medians over three sessions, 4 MB, a virtual disk and two busy cores, 2026-11-26, in
    turns with saves that do not flush). Leaving the `with` block waits for the last save. If one fails, `InvalidArgument` is
    raised at the next call or on leaving.

    >>> import tempfile
    >>> with async_saver(Path(tempfile.mkdtemp()) / "checkpoints", {"w": "weight"}) as hook:
    ...     hook(5, {"w": jnp.ones(2)}, {})
    """
    copy = leaves.copier()
    pending: list[Future[Path]] = []

    def finish() -> None:
        while pending:
            try:
                pending.pop().result()
            except OSError as error:
                raise InvalidArgument(
                    f"{error}; free space or fix permissions, then run the same command again to resume from the previous one."
                ) from error

    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_lower_priority) as pool:

        def hook(step: int, state: Any, logs: Any) -> None:
            finish()
            if _is_saved(directory, step, origin):
                return
            snapshot = _snapshot(state, names)
            snapshot = snapshot._replace(arrays=copy(snapshot.arrays))  # here: the thread must not run programs
            pending.append(pool.submit(_save, directory, step, snapshot, logs, keep, origin, flush))

        try:
            yield hook
        finally:
            finish()


def _lower_priority() -> None:
    """Gives the calling thread the lowest priority, so that it does not slow the computation down."""
    if sys.platform == "linux":  # where threads have their own priority
        os.setpriority(os.PRIO_PROCESS, 0, 19)


def _barrier(name: str) -> None:
    """Waits until all processes have reached this point."""
    from orbax.checkpoint import multihost

    multihost.sync_global_processes(name, processes=set(range(jax.process_count())))
