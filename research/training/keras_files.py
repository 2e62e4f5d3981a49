"""Keras' files of weights, read by slices: `.keras` archives and `.weights.h5`, without making any layer from them.

Keras stores a layer's variables by their position (`layers/dense_1/vars/0`) and with the layer's name. `match` finds a layer by
its name and those of the layers around it.
"""

import io
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.core.names import renumbered_paths
from research.errors import one_line

WEIGHTS = "model.weights.h5"


class FileError(Exception):
    """A file of weights that can't be used, and why; `path` if it is not the one that was opened."""

    def __init__(self, reason: str, path: Path | None = None) -> None:
        super().__init__(reason)
        self.path = path


class StoredArray(NamedTuple):
    """Shape and dtype (NumPy's name) of an array in a file, and `read`: from one slice per axis to that part of it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[slice, ...]], np.ndarray]


class StoredLayer(NamedTuple):
    """Names of a layer and of the layers around it, outermost first, and shape by name of each of its arrays, in Keras' order."""

    path: tuple[str, ...]
    arrays: dict[str, tuple[int, ...]]


class _Window(io.RawIOBase):
    """A part of a file, as a file: what an archive stores without compression."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.size - self.position)]
        self.file.seek(self.start + self.position)
        count = self.file.readinto(view)
        self.position += count
        return count


def read(path: Path, stack: ExitStack) -> tuple[dict[str, StoredArray], list[StoredLayer]]:
    """Returns the arrays of a Keras file by their path in it, and its layers. `stack` closes the file.

    An array is read from where it lies in the file, also inside an archive. Raises `FileError`.
    """
    import h5py

    try:
        source = _weights_in_archive(path, stack) if path.suffix == ".keras" else path
        file = stack.enter_context(h5py.File(source, "r"))
        layers: list[StoredLayer] = []
        arrays: dict[str, StoredArray] = {}
        _read_group(file, "", (), arrays, layers, set())
    except FileError:
        raise
    except Exception as error:  # h5py raises what it likes for a damaged file
        raise FileError(f"it is no intact file of weights ({one_line(error, 200)})") from None
    if not arrays:
        raise FileError("it holds no layers with weights, as Keras 3 writes them")
    renamed = renumbered_paths(["/".join(layer.path) for layer in layers])
    return arrays, [layer._replace(path=tuple(name.split("/"))) for layer, name in zip(layers, renamed, strict=True)]


def _weights_in_archive(path: Path, stack: ExitStack) -> Any:
    """Returns the weights inside a `.keras` archive as a file. Nothing is unpacked."""
    file = stack.enter_context(path.open("rb"))
    try:
        with zipfile.ZipFile(file) as archive:
            entry = archive.getinfo(WEIGHTS)
    except KeyError:
        raise FileError(f"there is no {WEIGHTS} in it") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise FileError(f"it is no intact .keras file ({one_line(error, 200)})") from None
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise FileError(f"{WEIGHTS} is compressed or encrypted in it, as Keras does not write it; give the weights alone")
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise FileError("it is no intact .keras file (an entry has no header)")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > path.stat().st_size:
        raise FileError(f"{WEIGHTS} in it is longer than the file")
    return _Window(file, start, entry.file_size)


def _read_group(
    group: Any, prefix: str, path: tuple[str, ...], arrays: dict[str, StoredArray], layers: list[StoredLayer], seen: set[Any]
) -> None:
    """Adds the arrays and layers below a group of an HDF5 file. Links to elsewhere are not followed."""
    import h5py

    seen.add(group.id)  # a group may hold itself, or another one many times
    members = {}
    for key in group:
        if isinstance(group.get(key, getlink=True), h5py.HardLink):
            members[key] = group[key]
    variables = members.pop("vars", None)
    if isinstance(variables, h5py.Group):
        path = (*path, _layer_name(variables, prefix))
        own = {f"{prefix}vars/{key}": variables[key] for key in sorted(variables, key=_natural)}
        own = {key: array for key, array in own.items() if isinstance(array, h5py.Dataset)}
        stored = {key: _stored_array(key, array) for key, array in own.items()}
        if stored:
            arrays.update(stored)
            layers.append(StoredLayer(path, {key: array.shape for key, array in stored.items()}))
    children = [(key, child) for key, child in members.items() if isinstance(child, h5py.Group) and child.id not in seen]
    names = {key: _layer_name(child.get("vars"), key) for key, child in children}
    # A container's members are in order by their keys, a layer's attributes by the numbers in their names.
    for key, child in sorted(children, key=lambda member: _natural(member[0] if variables is None else names[member[0]])):
        if child.id not in seen:
            _read_group(child, f"{prefix}{key}/", path, arrays, layers, seen)


def _natural(key: str) -> list[Any]:
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", key)]


def _layer_name(variables: Any, default: str) -> str:
    name = default.rstrip("/").rpartition("/")[2] if variables is None else variables.attrs.get("name", default.rstrip("/"))
    return str(name).rpartition("/")[2]


def _stored_array(key: str, array: Any) -> StoredArray:
    dtype = np.dtype(array.dtype)
    marked = array.attrs.get("dtype")
    if marked == "bfloat16" and dtype.itemsize == 2:
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    if array.external or array.is_virtual:
        raise FileError(f"{key} lies in another file, which is not read")
    if dtype.kind not in "biufc" and marked != "bfloat16":
        raise FileError(f"{key} is of {array.dtype}, expected numbers")
    if (
        array.id.get_storage_size() < array.size * dtype.itemsize
    ):  # compressed, too: Keras does not, and it may stand for any size
        raise FileError(f"{key} of shape {list(array.shape)} has fewer bytes in it than it should")

    def read_slices(index: tuple[slice, ...]) -> np.ndarray:
        try:
            return np.asarray(array[index]).view(dtype) if marked == "bfloat16" else np.asarray(array[index])
        except OSError as error:
            raise FileError(f"{key} can't be read ({one_line(error, 200)})") from None

    return StoredArray(tuple(array.shape), dtype.name, read_slices)


def match(names: Sequence[str], shapes: Sequence[tuple[int, ...]], layers: Sequence[StoredLayer]) -> list[str | None]:
    """Returns for each name of a state's leaf its array in a file, None if there is none or several fit.

    A layer fits if its path in the state ends in its path in the file, or the other way round; the file's outermost name, that of
    the complete model, may be missing. Arrays of a layer fit in their order; where shapes do not, in the only order in which they
    do: a frozen kernel comes behind its bias in a state. Keras merges LoRA's weights when it saves, so they are in no file.

    >>> layer = StoredLayer(("sequential", "dense"), {"layers/dense/vars/0": (4, 3), "layers/dense/vars/1": (3,)})
    >>> match(["dense/kernel", "dense/bias", "head/kernel"], [(4, 3), (3,), (3, 2)], [layer])
    ['layers/dense/vars/0', 'layers/dense/vars/1', None]
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, name in enumerate(names):
        *parents, own = name.split("/")
        if not own.startswith("lora_"):
            groups.setdefault(tuple(parents), []).append(i)
    by_name: dict[str, list[StoredLayer]] = {}
    for layer in layers:
        by_name.setdefault(layer.path[-1], []).append(layer)
    proposals: dict[int, list[tuple[int, tuple[str, ...]]]] = {}
    stored: dict[int, StoredLayer] = {}
    for path in groups:
        best = _best([(_common(path, layer.path), layer) for layer in by_name.get(path[-1] if path else "", [])])
        if best is not None:
            stored[id(best[1])] = best[1]
            proposals.setdefault(id(best[1]), []).append((best[0], path))
    result: list[str | None] = [None] * len(names)
    for key, paths in proposals.items():
        chosen = _best(paths)
        if chosen is not None:
            positions = groups[chosen[1]]
            for i, array in _in_order(positions, shapes, stored[key].arrays):
                result[i] = array
    return result


def _common(path: tuple[str, ...], stored: tuple[str, ...]) -> int:
    """Returns how many names at the end of two paths agree, 0 if the shorter one is not part of the longer one."""
    count = 0
    while count < min(len(path), len(stored)) and path[-1 - count] == stored[-1 - count]:
        count += 1
    return count if count and count >= min(len(path), len(stored) - 1) else 0


def _best(scored: Sequence[tuple[int, Any]]) -> tuple[int, Any] | None:
    """Returns the pair with the highest positive score, None if there is none or several have it."""
    highest = max((score for score, _ in scored), default=0)
    best = [pair for pair in scored if pair[0] == highest]
    return best[0] if highest and len(best) == 1 else None


def _in_order(
    positions: Sequence[int], shapes: Sequence[tuple[int, ...]], arrays: dict[str, tuple[int, ...]]
) -> list[tuple[int, str]]:
    if len(positions) != len(arrays):
        return []
    expected = [shapes[i] for i in positions]
    orders = [list(arrays)]
    if list(arrays.values()) != expected and len(arrays) <= 6:
        fitting = [list(order) for order in permutations(arrays) if [arrays[key] for key in order] == expected]
        orders = fitting if len(fitting) == 1 else orders
    return list(zip(positions, orders[0], strict=True))
