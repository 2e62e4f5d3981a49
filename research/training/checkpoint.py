"""States on disk: written atomically beside training, checked when read, restored onto whatever devices there are."""

import json
import mmap
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from research.loop import Hook
from research.processes import is_first, shared
from research.state import Refused

MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    """What `restore` gives: the state after `step` steps, and that step's logs."""

    step: int
    state: Any
    logs: dict[str, Any]


def save(directory: Path, step: int, state: PyTree, names: PyTree, logs: PyTree = None, keep: int = 2) -> Path:
    """Writes a state as `directory/STEP`, whole or not at all, and removes all but the `keep` newest.

    The leaves lie in `state/` as Orbax lays them out. `manifest.json` holds for each its name (from `Learner.names`), shape and
    dtype, the logs of the step, and size and checksum of every file: storage that flips a bit or loses a file's end shows when
    it is read. Raises `OSError` where it can't be written; what was there before stays.

    >>> import tempfile
    >>> path = save(Path(tempfile.mkdtemp()) / "checkpoints", 3, {"w": jnp.ones(2)}, {"w": "weight"}, {"loss": 0.5})
    >>> restored = restore(path, {"w": jnp.zeros(2)}, {"w": "weight"})
    >>> restored.step, restored.state, restored.logs
    (3, {'w': Array([1., 1.], dtype=float32)}, {'loss': array(0.5)})
    """
    if _is_there(directory, step):
        return directory.absolute() / f"{step:09d}"
    return _save(directory, step, _stored(state), _described(state, names), logs, keep)


def _is_there(directory: Path, step: int) -> bool:
    """Whether the same step of the same run was saved before, as the first process sees it: shared storage may lag for others."""
    path = directory / f"{step:09d}"
    return bool(shared(lambda: path.exists() and damage(path) is None))


def _save(directory: Path, step: int, leaves: list[Array], described: list[list[Any]], logs: PyTree, keep: int) -> Path:
    """The same of leaves as they are stored. Of several processes each writes what its devices hold, the first one the rest."""
    directory = directory.absolute()
    final = directory / f"{step:09d}"
    partial = directory.with_name(f".{directory.name}.partial")
    written = partial / final.name
    several, first = jax.process_count() > 1, is_first()
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        if several:
            _write_together(written / "state", leaves)
        else:
            _write(written / "state", leaves)
        if first:
            manifest = {
                "step": step,
                "leaves": described,
                "logs": {name: _numbers(np.asarray(v, np.float64).tolist()) for name, v in jax.device_get(logs or {}).items()},
                "files": {str(path.relative_to(written)): _fingerprint(path) for path in _files(written)},
            }
            (written / MANIFEST).write_text(json.dumps(manifest))
            if directory.exists():
                shutil.rmtree(final, ignore_errors=True)  # a damaged one
                written.rename(final)
            else:
                partial.rename(directory)  # so that the directory is never there without a checkpoint
        if several:
            _together(f"checkpoint {step}")
    except Exception as error:  # TensorStore wraps what the system says into errors of its own
        told = " ".join(str(error).split())[:300]
        raise OSError(f"checkpoint of step {step} can't be written to {directory}: {told}") from error
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
    if first:
        for old in [found for found in steps(directory) if found <= step][:-keep]:  # a later one may be damaged
            shutil.rmtree(directory / f"{old:09d}", ignore_errors=True)
    return final


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory, whole or not, in order.

    >>> steps(Path("there/is/none"))
    []
    """
    return sorted(int(path.name) for path in directory.glob("[0-9]*") if path.name.isdigit()) if directory.is_dir() else []


def newest(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a directory; None where none was ever made.

    Damaged ones are told with `say` and passed over. Raises `Refused` where none of those that were made is whole, and where they
    can't be read.

    >>> newest(Path("there/is/none"), print) is None
    True
    """
    if not directory.exists():
        return None
    try:
        found = steps(directory)
        os.listdir(directory)
    except OSError as error:
        raise Refused(f"{directory}: it can't be read ({error.strerror}); give yourself the rights, then go on.") from error
    for step in reversed(found):
        path = directory / f"{step:09d}"
        wrong = damage(path)
        if wrong is None:
            return path
        say(f"checkpoint {path} is damaged ({wrong}) and passed over")
    raise Refused(
        f"{directory}: no whole checkpoint is left in it ({len(found)} damaged); "
        "put one back, or remove the directory to start over."
    )


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where it is whole.

    >>> damage(Path("there/is/none"))
    'its manifest.json is missing'
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"].items()
    except FileNotFoundError:
        return f"its {MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} can't be read"
    for name, fingerprint in files:
        try:
            if _fingerprint(path / name) != fingerprint:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} is missing or can't be read"
    return None


def restore(path: Path, like: PyTree, names: PyTree) -> Checkpoint:
    """Reads a checkpoint into a state shaped like `like`, arrays or `jax.ShapeDtypeStruct`s, onto their shardings.

    Each device reads its own part only, on however many devices the checkpoint was written. Raises `Refused` where the
    checkpoint is of another learner: the first leaf that differs is named.
    """
    import orbax.checkpoint as ocp  # slow to import: only where a checkpoint is read

    manifest = json.loads((path / MANIFEST).read_text())
    _check_same(path, manifest["leaves"], _described(like, names))
    leaves, structure = jax.tree.flatten(like)
    targets = {f"{i:05d}": _target(leaf) for i, leaf in enumerate(leaves)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(
            path.absolute() / "state",
            args=ocp.args.PyTreeRestore(item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets)),
        )
    restored = [_as_key(found[f"{i:05d}"], leaf) for i, leaf in enumerate(leaves)]
    logs = {name: np.array(value, np.float64) for name, value in manifest["logs"].items()}  # null becomes NaN
    return Checkpoint(manifest["step"], jax.tree.unflatten(structure, restored), logs)


@contextmanager
def saving(directory: Path, names: PyTree, keep: int = 2) -> Iterator[Hook]:
    """A hook for `loop.train` that saves the state it sees, from a thread, while training goes on.

    Training waits only for a copy of the state on the device, and for the save before where that is not done yet. Leaving the
    context waits for the last one. Raises `Refused` where one can't be written, at the next call or on leaving.

    >>> import tempfile
    >>> with saving(Path(tempfile.mkdtemp()) / "checkpoints", {"w": "weight"}) as hook:
    ...     hook(5, {"w": jnp.ones(2)}, {})
    """
    copied = jax.jit(lambda leaves: [jnp.copy(leaf) for leaf in leaves])
    pending: list[Future[Path]] = []

    def finish() -> None:
        while pending:
            try:
                pending.pop().result()
            except OSError as error:
                raise Refused(
                    f"{error}; make room or rights, then the same command goes on from the checkpoint before."
                ) from error

    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_yielding) as pool:

        def hook(step: int, state: Any, logs: Any) -> None:
            finish()
            if _is_there(directory, step):
                return
            leaves, described = copied(_stored(state)), _described(state, names)  # here: a thread must not start programs
            pending.append(pool.submit(_save, directory, step, leaves, described, logs, keep))

        try:
            yield hook
        finally:
            finish()


def _yielding() -> None:
    """Lets the thread that calls it stand back behind the computation."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, 0, 19)


def _write(directory: Path, leaves: list[Array]) -> None:
    """Writes arrays in Orbax' own layout, by the library that Orbax writes with.

    Orbax' `save` takes some 50 ms of processor time for the 5 MB of a small network, this takes 6: at a checkpoint each
    hundred steps the difference is what training would wait for. Reading is left to Orbax. Nothing waits for the disk: what a
    dead process wrote is there, and what a dead machine lost the checksums tell.
    """
    import tensorstore as ts

    directory.mkdir(parents=True)
    store = {"driver": "ocdbt", "base": f"file://{directory}/"}
    transaction, opened = ts.Transaction(), []
    context = ts.Context({"file_io_sync": False})
    for i, leaf in enumerate(leaves):
        chunks = [max(1, n) for n in leaf.sharding.shard_shape(leaf.shape)]
        dtype = "bfloat16" if leaf.dtype == jnp.bfloat16 else leaf.dtype.str
        spec = {
            "driver": "zarr",
            "kvstore": {**store, "path": f"{i:05d}/"},
            "metadata": {"shape": list(leaf.shape), "chunks": chunks, "dtype": dtype, "compressor": None},
        }
        opened.append((ts.open(spec, create=True, open=False, context=context, transaction=transaction), leaf))
    writes = []
    for array, leaf in opened:
        target = array.result()
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                writes.append(target[shard.index].write(np.asarray(shard.data), can_reference_source_data_indefinitely=True))
    for write in writes:
        write.result()
    transaction.commit_sync()
    described = {
        f"('{i:05d}',)": {
            "key_metadata": [{"key": f"{i:05d}", "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(leaf.shape)},
        }
        for i, leaf in enumerate(leaves)
    }
    metadata = {"tree_metadata": described, "use_ocdbt": True, "use_zarr3": False}
    (directory / "_METADATA").write_text(
        json.dumps({**metadata, "store_array_data_equal_to_fill_value": True, "custom_metadata": None})
    )


def _write_together(directory: Path, leaves: list[Array]) -> None:
    """Writes arrays that lie on the devices of several processes: Orbax knows how."""
    import orbax.checkpoint as ocp

    # With the processes listed Orbax waits by messages between hosts: by a program of the devices, as it would without, it would
    # get in the way of training.
    options = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        tree = {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}
        checkpointer.save(directory, args=ocp.args.PyTreeSave(item=tree))


def _together(name: str) -> None:
    """Waits until all processes are here."""
    from orbax.checkpoint import multihost

    multihost.sync_global_processes(name, processes=set(range(jax.process_count())))


def _described(state: PyTree, names: PyTree) -> list[list[Any]]:
    """Of each leaf its name, shape and dtype."""
    leaves = jax.tree.leaves(state)
    return [[name, list(leaf.shape), str(leaf.dtype)] for name, leaf in zip(jax.tree.leaves(names), leaves, strict=True)]


def _check_same(path: Path, held: list[list[Any]], wanted: list[list[Any]]) -> None:
    if held == wanted:
        return
    ours, theirs = {w[0]: w[1:] for w in wanted}, {h[0]: h[1:] for h in held}
    for name, (shape, dtype) in ours.items():
        if name not in theirs:
            told = f"it has no {name!r}"
        elif theirs[name] != [shape, dtype]:
            told = f"{name!r} is {theirs[name][1]}{theirs[name][0]} in it, here {dtype}{shape}"
        else:
            continue
        break
    else:
        told = f"it has {next((n for n in theirs if n not in ours), 'the same leaves in another order')!r} besides"
    raise Refused(
        f"checkpoint {path} is of another model or optimizer: {told}; restore what it was made with, or use a new directory."
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(state: PyTree) -> list[Array]:
    """A state's leaves as arrays of numbers."""
    return [
        jax.random.key_data(leaf) if _is_key(leaf) else leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        for leaf in jax.tree.leaves(state)
    ]


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _as_key(data: Any, like: Any) -> Any:
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like)) if _is_key(like) else data


def _numbers(value: Any) -> Any:
    """A log as strict JSON: what is not finite as null."""
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return value if np.isfinite(value) else None


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32: Orbax restores a flipped bit without a word."""
    size = path.stat().st_size
    if not size:  # nothing can't be mapped
        return [0, 0]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [size, zlib.crc32(content)]
