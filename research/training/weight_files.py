"""Arrays in files, by name, of which any slice can be read alone: checkpoints, safetensors, Keras' weights.

Nothing in a file is executed: no pickle, no layer or function is made from it. What a file claims about its arrays is checked
against its size before anything is allocated.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.core.state import InvalidArgument
from research.distributed.processes import broadcast_from_first
from research.errors import one_line
from research.training import checkpoint, keras_files, leaves, manifest
from research.training.keras_files import FileError, StoredArray

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 100_000_000  # as safetensors' own limit for a header
EXPECTED = "a run, a checkpoint, a .safetensors file or a folder of them, a .keras file or a .weights.h5 file"

Read = Callable[[tuple[slice, ...]], np.ndarray]
Match = Callable[[Sequence[str], Sequence[tuple[int, ...]]], list[str | None]]


class StoredWeights(NamedTuple):
    """Arrays by their names in a file, and `match`: from names and shapes of a state's weights to names in the file, or None.

    >>> StoredWeights("a.safetensors", {}, same_names({})).match(["kernel"], [(2,)])
    [None]
    """

    source: str
    arrays: dict[str, StoredArray]
    match: Match


def same_names(arrays: dict[str, StoredArray]) -> Match:
    """Returns the `match` of a file that names its arrays as the state does.

    >>> same_names({"kernel": StoredArray((2,), "float32", np.zeros)})(["kernel", "bias"], [(2,), (1,)])
    ['kernel', None]
    """
    return lambda names, shapes: [name if name in arrays else None for name in names]


@contextmanager
def open_weights(source: str | Path, report: Callable[[str], None]) -> Iterator[StoredWeights]:
    """Opens a source of weights: a run's directory, a checkpoint, or a file of safetensors or Keras.

    Of a run or a directory of checkpoints it is the latest intact one; `report` is called with a line about each that is skipped.
    With several processes all have to call it. Raises `InvalidArgument` if the source is missing, damaged, or of another format.

    >>> with open_weights("no/such/file.safetensors", print) as weights:
    ...     pass
    Traceback (most recent call last):
    research.core.state.InvalidArgument: no/such/file.safetensors: it is missing; expected a run, a checkpoint, ...
    """
    path = Path(source)
    with ExitStack() as stack:
        try:
            opened = _open(path, stack, report)
        except FileError as error:
            raise InvalidArgument(f"{error.path or path}: {error}; expected {EXPECTED}.") from error
        except OSError as error:
            reason = error.strerror or one_line(error, 200)
            raise InvalidArgument(f"{path}: it can't be read ({reason}); expected {EXPECTED}.") from error
        yield opened


def _open(path: Path, stack: ExitStack, report: Callable[[str], None]) -> StoredWeights:
    try:
        exists, is_directory = path.exists(), path.is_dir()
    except ValueError:  # a character that no name may have
        exists = is_directory = False
    if not exists:
        raise FileError("it is missing")
    if is_directory:
        return _open_directory(path, stack, report)
    if not path.is_file():
        raise FileError("it is not a regular file")
    if not path.stat().st_size:
        raise FileError("it is empty")
    if path.suffix == ".safetensors":
        arrays = _read_safetensors(path, stack)
        return StoredWeights(str(path), arrays, same_names(arrays))
    if path.suffix in (".keras", ".h5"):
        stored, layers = keras_files.read(path, stack)
        return StoredWeights(str(path), stored, lambda names, shapes: keras_files.match(names, shapes, layers))
    raise FileError(f"its name ends in {path.suffix or 'no suffix'!r}")


def _open_directory(path: Path, stack: ExitStack, report: Callable[[str], None]) -> StoredWeights:
    if (path / INDEX).exists():
        return _open_index(path, stack)
    if (path / SINGLE).exists():
        return _open(path / SINGLE, stack, report)
    if (path / manifest.MANIFEST).exists():
        return _open_checkpoint(path)
    saved = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not checkpoint.steps(saved):
        raise FileError(f"it has no checkpoint and no {SINGLE}")
    return _open_checkpoint(Path(broadcast_from_first(lambda: str(checkpoint.latest(saved, report)))), verified=True)


def _open_checkpoint(path: Path, verified: bool = False) -> StoredWeights:
    difference = None if verified else broadcast_from_first(lambda: manifest.verify(path))
    if difference is not None:
        raise FileError(difference, path)
    contents = manifest.read(path)
    names = [name for name, _, _ in contents.leaves]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    keys = [f"{name}#{i}" if name in repeated else name for i, name in enumerate(names)]
    arrays = {
        key: StoredArray(tuple(shape), dtype, _checkpoint_reader(path, key, leaves.reader(path / "state", i, dtype, shape)))
        for i, (key, (_, shape, dtype)) in enumerate(zip(keys, contents.leaves, strict=True))
    }

    def match(requested: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[str | None]:
        ambiguous = next((name for name, count in Counter(requested).items() if count > 1 or name in repeated), None)
        if ambiguous is None:
            return same_names(arrays)(requested, shapes)
        # Keras' numbers of unnamed layers are counted apart for trainable and frozen weights. Order tells equal names apart.
        same = [i for i, name in enumerate(names) if name in set(requested)]
        if [names[i] for i in same] != list(requested):
            raise InvalidArgument(
                f"{path}: {ambiguous!r} names several weights, of a frozen and of a trainable layer, and other layers are frozen "
                "in it than in the state; name the layers, or leave it out with only."
            )
        return [keys[i] for i in same]

    return StoredWeights(str(path), arrays, match)


def _checkpoint_reader(path: Path, key: str, read: Read) -> Read:
    def read_slices(index: tuple[slice, ...]) -> np.ndarray:
        try:
            return read(index)
        except Exception as error:  # files that someone wrote a manifest for raise what they like in TensorStore
            raise FileError(f"{key!r} can't be read ({one_line(error, 200)})", path) from None

    return read_slices


def _open_index(folder: Path, stack: ExitStack) -> StoredWeights:
    """Opens a folder of safetensors files with an index, as Hugging Face writes it."""
    path = folder / INDEX
    if not path.is_file():
        raise FileError("it is not a regular file", path)
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise FileError(f"it has {path.stat().st_size:,} bytes, more than an index may have", path)
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        entries = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FileError("it holds no weight_map from names to files", path) from None
    files: dict[str, dict[str, StoredArray]] = {}
    for _, file in entries:
        if file not in files:
            if Path(file).name != file or "\\" in file or "\0" in file:
                raise FileError(f"it names {file[:100]!r}, which is outside of its folder", path)
            if not (folder / file).is_file():
                raise FileError(f"it names {file[:100]!r}, which is no file in its folder", path)
            files[file] = _read_safetensors(folder / file, stack)
    lost = next(((name, file) for name, file in entries if name not in files[file]), None)
    if lost is not None:
        raise FileError(f"it names {lost[0]!r} in {lost[1]}, which does not hold it", path)
    arrays = {name: files[file][name] for name, file in entries}
    return StoredWeights(str(folder), arrays, same_names(arrays))


def _read_safetensors(path: Path, stack: ExitStack) -> dict[str, StoredArray]:
    import safetensors

    try:
        file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except (safetensors.SafetensorError, OSError) as error:
        raise FileError(f"it is no intact safetensors file ({one_line(error, 200)})", path) from None
    return {name: _safetensors_array(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118


DTYPES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "I8": "int8", "I16": "int16",
    "I32": "int32", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip


def _safetensors_array(path: Path, name: str, array: Any) -> StoredArray:
    dtype = DTYPES.get(array.get_dtype(), array.get_dtype())

    def read(index: tuple[slice, ...]) -> np.ndarray:
        try:
            return np.asarray(array[index] if index else array[...])
        except Exception as error:  # a dtype that safetensors can't give NumPy
            raise FileError(f"{name!r} can't be read as {dtype} ({one_line(error, 200)})", path) from None

    return StoredArray(tuple(array.get_shape()), dtype, read)
