"""What a checkpoint claims: its step, its leaves, the run it belongs to, its files and their checksums. And whether it holds."""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import stat
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

MANIFEST = "manifest.json"
FORMAT = 2
MAX_BYTES = 100_000_000  # of a manifest: far more than any state has leaves
MAX_STEP, MAX_LENGTH = 2**53, 2**48  # of a count of steps, and of an axis of an array
MAX_AXES = 32
FORMAT_1 = {"step", "leaves", "logs", "files"}  # what a manifest of version 0.1 holds


class Origin(NamedTuple):
    """What a checkpoint is of: the id of its run, and the `config_digest` of its config. None matches any.

    >>> Origin(run="3f2a", config=config_digest({"epochs": 3})).run
    '3f2a'
    """

    run: str | None = None
    config: str | None = None


ANY = Origin()


class Manifest(NamedTuple):
    """The contents of a manifest. `leaves` holds name, shape and dtype of each, `weak_types` the positions of weak-typed ones.

    >>> Manifest(1, 3, Origin(), [["w", [2], "float32"]], [], {"loss": None}, {}).step
    3
    """

    format: int
    step: int
    origin: Origin
    leaves: list[list[Any]]
    weak_types: list[int]
    logs: dict[str, Any]
    files: dict[str, list[int]]


class InvalidCheckpoint(Exception):
    """A checkpoint that must not be restored, and why."""


class Damaged(InvalidCheckpoint):
    """A checkpoint whose files are not those that were written."""


class Foreign(InvalidCheckpoint):
    """A checkpoint that is intact, but of another step, run, config or version."""


def config_digest(config: Any) -> str:
    """Returns a digest of a config: a JSON value, in which the order of names does not matter, nor whether a 3 is a 3.0.

    >>> config_digest({"epochs": 3, "rate": 0.1}) == config_digest({"rate": 0.1, "epochs": 3.0})
    True
    >>> config_digest({"epochs": 3}) == config_digest({"epochs": 4})
    False
    """
    return hashlib.sha256(json.dumps(_without_whole_floats(config), sort_keys=True, default=str).encode()).hexdigest()


def write(
    directory: Path, step: int, leaves: list[list[Any]], weak_types: list[int], logs: Mapping[str, Any], origin: Origin
) -> None:
    """Writes the manifest of a checkpoint, whose other files are in `directory` already.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "000000003"
    >>> path.mkdir()
    >>> write(path, 3, [["w", [2], "float32"]], [], {"loss": np.float32(0.5)}, Origin(run="3f2a"))
    >>> read(path).logs, verify(path), verify(path, Origin(run="77b0"))
    ({'loss': 0.5}, None, "its run is '3f2a', expected '77b0'")
    """
    contents = {
        "format": FORMAT,
        "step": step,
        "run": origin.run,
        "config": origin.config,
        "leaves": leaves,
        "weak_types": weak_types,
        "logs": {name: _strict_json(np.asarray(value, np.float64).tolist()) for name, value in logs.items()},
        "files": {name: _fingerprint(directory / name) for name in _file_names(directory)},
    }
    (directory / MANIFEST).write_text(json.dumps({**contents, "checksum": _checksum(contents)}))


def read(path: Path, origin: Origin = ANY) -> Manifest:
    """Returns the manifest of a checkpoint.

    Raises `Damaged` if it is not as it was written. Raises `Foreign` if it is not of the step that names its directory, or of
    another run or config than `origin`, where both give one. Format 1 gives none.

    >>> read(Path("no/such/checkpoint"))
    Traceback (most recent call last):
    research.training.manifest.Damaged: its manifest.json is missing
    """
    try:
        contents = json.loads(_read_text(path / MANIFEST))
        claimed = contents.pop("checksum", None)
        intact = contents.keys() == FORMAT_1 if claimed is None else claimed == _checksum(contents)
    except FileNotFoundError:
        raise Damaged(f"its {MANIFEST} is missing") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"its {MANIFEST} can't be read") from None
    number = contents.get("format", 1)
    if intact and isinstance(number, int) and number > FORMAT:
        raise Foreign(f"it has format {number}, expected at most {FORMAT}: a later version of research wrote it")
    if not intact:
        raise Damaged(f"its {MANIFEST} has the wrong checksum")
    try:
        recorded = Origin(contents.get("run"), contents.get("config"))
        manifest = Manifest(
            number, contents["step"], recorded, contents["leaves"], contents.get("weak_types", []), contents["logs"],
            contents["files"],
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        raise Damaged(f"its {MANIFEST} can't be read") from None
    _check_types(manifest)
    _check_belongs(path, manifest, origin)
    return manifest


def _read_text(path: Path) -> str:
    """Returns the text of a manifest. Raises `Damaged` for a pipe or a device, whose end might never come."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"its {MANIFEST} is not a regular file")
    if status.st_size > MAX_BYTES:
        raise Damaged(f"its {MANIFEST} has {status.st_size:,} bytes, more than one may have")
    return path.read_text()


def _check_types(manifest: Manifest) -> None:
    """Raises `Damaged` if a field has another type than it is written with: anyone can compute a checksum."""
    fields = zip(manifest, (int, int, Origin, list, list, dict, dict), strict=True)
    if (
        not all(type(value) is expected for value, expected in fields)
        or not (manifest.format >= 1 and 0 <= manifest.step <= MAX_STEP)
        or not all(part is None or isinstance(part, str) for part in manifest.origin)
        or not all(map(_is_leaf, manifest.leaves))
        or not all(type(position) is int for position in manifest.weak_types)
        or not all(map(_is_log, manifest.logs.values()))
        or not all(type(each) is list and [type(number) for number in each] == [int, int] for each in manifest.files.values())
    ):
        raise Damaged(f"its {MANIFEST} can't be read")


def _is_leaf(leaf: Any) -> bool:
    """Returns whether a value is the name, the shape and the dtype of an array."""
    if type(leaf) is not list or [type(part) for part in leaf] != [str, list, str]:
        return False
    _, shape, dtype = leaf
    if len(shape) > MAX_AXES or not all(type(length) is int and 0 <= length <= MAX_LENGTH for length in shape):
        return False
    if dtype.startswith("key<"):
        return True
    try:
        return bool(jnp.issubdtype(np.dtype(dtype), np.number) or np.dtype(dtype) == np.bool_)
    except TypeError:
        return False


def _is_log(value: Any) -> bool:
    """Returns whether a value is a number, None, or an array of them as lists."""
    elements = [value]
    while any(isinstance(element, list) for element in elements):
        elements = [inner for element in elements for inner in (element if isinstance(element, list) else [element])]
    try:
        np.array(value, np.float64)
    except (ValueError, TypeError, OverflowError):  # lists of different lengths, or a number that no float can hold
        return False
    return all(element is None or type(element) in (int, float) for element in elements)


def _check_belongs(path: Path, manifest: Manifest, origin: Origin) -> None:
    if path.name.isascii() and path.name.isdigit() and int(path.name) != manifest.step:  # copies may have any other name
        raise Foreign(f"it is of step {manifest.step}, expected {int(path.name)} as its directory is named")
    if manifest.format == 1:
        return
    for field, recorded, expected in zip(("run", "config"), manifest.origin, origin, strict=True):
        if expected is not None and recorded != expected:
            shown = "unknown" if recorded is None else repr(str(recorded)[:12])
            raise Foreign(f"its {field} is {shown}, expected {str(expected)[:12]!r}")


def verify(path: Path, origin: Origin = ANY) -> str | None:
    """Returns why a checkpoint must not be restored, or None if it is intact and of the step that names its directory.

    Also checks that it is of the run and the config of `origin`, where that gives any.

    >>> verify(Path("no/such/checkpoint"))
    'its manifest.json is missing'
    """
    try:
        check(path, origin)
    except InvalidCheckpoint as error:
        return str(error)
    return None


def check(path: Path, origin: Origin = ANY) -> Manifest:
    """Returns the manifest of a checkpoint, and compares every file with it.

    Raises `Damaged` or `Foreign`, as `read` does; `Damaged` too for a file that differs, is missing, or is not listed.

    >>> check(Path("no/such/checkpoint"))
    Traceback (most recent call last):
    research.training.manifest.Damaged: its manifest.json is missing
    """
    manifest = read(path, origin)
    names = dict.fromkeys(_file_names(path))
    for name in names:
        if name not in manifest.files:
            raise Damaged(f"{name} is not listed in its {MANIFEST}")
        if not stat.S_ISREG((path / name).lstat().st_mode):
            raise Damaged(f"{name} is not a regular file")
    for name, fingerprint in manifest.files.items():
        try:
            if name not in names:  # a name like ../step is of no file in it
                raise FileNotFoundError
            if _fingerprint(path / name) != fingerprint:
                raise Damaged(f"{name[:200]} has the wrong checksum")
        except (OSError, ValueError):
            raise Damaged(f"{name[:200]} is missing or can't be read") from None
    return manifest


def sync(paths: Sequence[Path]) -> None:
    """Flushes files and directories that exist to the disk: the contents of files, the entries of directories.

    All at once, because a file system writes its journal for several at the cost of one.

    >>> sync([Path("."), Path("no/such/file")])
    """
    with ThreadPoolExecutor(8, thread_name_prefix="checkpoint-sync") as pool:
        list(pool.map(_sync, paths))


def _sync(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every network file system syncs directories
                raise
        finally:
            os.close(descriptor)


def _checksum(contents: Any) -> str:
    """Returns a digest of a manifest without its checksum, whatever the spaces and the order in the file."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _file_names(directory: Path) -> list[str]:
    """Returns the relative paths of all files of a checkpoint except its manifest."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def _fingerprint(path: Path) -> list[int]:
    """Returns size and CRC-32 of a file: Orbax does not detect a flipped bit."""
    size = path.stat().st_size
    if not size:  # an empty file can't be mapped
        return [0, 0]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [size, zlib.crc32(content)]


def _strict_json(value: Any) -> Any:
    """Returns a log with non-finite numbers replaced by None: strict JSON has no NaN."""
    if isinstance(value, list):
        return [_strict_json(element) for element in value]
    return value if np.isfinite(value) else None


def _without_whole_floats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_whole_floats(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [_without_whole_floats(element) for element in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
