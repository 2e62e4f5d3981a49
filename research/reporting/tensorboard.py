"""What TensorBoard shows: curves, histograms, pictures, the graph, embeddings. To look: `tensorboard --logdir runs`."""

import io
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import keras
import numpy as np
from jaxtyping import Array, PyTree

from research.graph import graph
from research.loop import Entry, Hook
from research.processes import whole
from research.state import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "events.out.tfevents.0"  # one file for each curve's directory, appended to: two would be two runs' worth of points
VERSION = "brain.Event:2"  # what TensorBoard expects a file to begin with
BINS = 60


class Writer(NamedTuple):
    """What writes into a directory: `write` takes a `tensorboardX.proto.event_pb2.Event` and is done when it is in the file."""

    directory: Path
    write: Callable[[Any], None]


@contextmanager
def writing(directory: Path) -> Iterator[Writer]:
    """Appends to what a directory shows. A process that is killed leaves all that it wrote.

    TensorBoard shows each directory as a run of its own, and the same tag of several runs in one chart.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> with writing(directory / "train") as writer:
    ...     scalars(writer, 10, {"loss": 0.5})
    >>> [(event.step, event.summary.value[0].tag) for event in events(directory / "train")]
    [(10, 'loss')]
    """
    from tensorboardX.proto.event_pb2 import Event

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / FILE).open("ab") as file:

        def write(event: Any) -> None:
            event.wall_time = event.wall_time or time.time()
            file.write(_record(event.SerializeToString()))
            file.flush()

        if not file.tell():
            write(Event(file_version=VERSION))
        yield Writer(directory, write)


def events(directory: Path) -> list[Any]:
    """What a directory holds, as `tensorboardX.proto.event_pb2.Event`s; a last one that was cut off does not count."""
    from tensorboardX.proto.event_pb2 import Event

    data = (directory / FILE).read_bytes() if (directory / FILE).exists() else b""
    found, start = [], 0
    while start + 12 <= len(data):
        (size,) = struct.unpack_from("<Q", data, start)
        record = data[start + 12 : start + 12 + size]
        if _record(record) != data[start : start + 16 + size]:
            break
        found.append(Event.FromString(record))
        start += 16 + size
    return [event for event in found if not event.file_version]


def cut(directory: Path, step: int) -> None:
    """Removes from a directory, and those below it, everything of `step` and later, and the graph.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> with writing(directory) as writer:
    ...     for step in (1, 2, 3):
    ...         scalars(writer, step, {"loss": 0.5})
    >>> cut(directory, 3)
    >>> [event.step for event in events(directory)]
    [1, 2]
    """
    from tensorboardX.proto.event_pb2 import Event

    for path in directory.rglob(FILE):
        kept = [event for event in events(path.parent) if event.step < step and event.HasField("summary")]
        partial = path.with_name(".partial")
        partial.write_bytes(b"".join(_record(event.SerializeToString()) for event in [Event(file_version=VERSION), *kept]))
        partial.replace(path)


def scalars(writer: Writer, step: int, values: Mapping[str, float]) -> None:
    """Adds a point to the curve of each name."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    writer.write(Event(step=step, summary=Summary(value=points)))


def histograms(writer: Writer, step: int, arrays: Mapping[str, Any]) -> None:
    """Adds the distribution of each array's finite numbers. TensorBoard groups names by what stands before the first `/`.

    >>> import tempfile
    >>> with writing(Path(tempfile.mkdtemp())) as writer:
    ...     histograms(writer, 1, {"weights/kernel": np.ones((3, 4))})
    >>> [event.summary.value[0].histo.num for event in events(writer.directory)]
    [12.0]
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

    shown = []
    for name, array in arrays.items():
        values = np.asarray(array, np.float32).ravel()
        values = values[np.isfinite(values)]
        if not values.size:
            continue
        low, high = np.float64(values.min()), np.float64(values.max())  # in float32 the edges of 60 bins may coincide
        counts, edges = np.histogram(values, BINS, (low, high)) if low < high else ([values.size], [low, high])
        bounds = {"min": low, "max": high, "num": values.size}
        sums = {"sum": values.sum(dtype=np.float64), "sum_squares": np.square(values, dtype=np.float64).sum()}
        histogram = HistogramProto(**bounds, **sums, bucket_limit=edges[1:], bucket=counts)
        shown.append(Summary.Value(tag=name, histo=histogram))
    writer.write(Event(step=step, summary=Summary(value=shown)))


def images(writer: Writer, step: int, pictures: Mapping[str, "Path | Figure"]) -> None:
    """Adds pictures: PNG files, or figures."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    shown = []
    for name, picture in pictures.items():
        png = picture.read_bytes() if isinstance(picture, Path) else _png(picture)
        width, height = struct.unpack_from(">II", png, 16)
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        shown.append(Summary.Value(tag=name, image=image))
    writer.write(Event(step=step, summary=Summary(value=shown)))


def structure(writer: Writer, models: Mapping[str, keras.Model]) -> None:
    """Adds the graph of a model's layers, or of several models side by side."""
    from tensorboardX.proto.event_pb2 import Event

    if models:
        writer.write(Event(graph_def=graph_def(models).SerializeToString()))


def graph_def(models: Mapping[str, keras.Model]) -> Any:
    """Models as a TensorFlow `GraphDef` of their layers: classes are ops, shapes stand on the edges, models are scopes.

    Where there is but one model, its layers stand outside.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> [(node.name, node.op, *node.input) for node in graph_def({"model": model}).node]
    [('input_layer', 'InputLayer'), ('dense', 'Dense', 'input_layer')]
    """
    from tensorboardX.proto.attr_value_pb2 import AttrValue
    from tensorboardX.proto.graph_pb2 import GraphDef
    from tensorboardX.proto.node_def_pb2 import NodeDef
    from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboardX.proto.versions_pb2 import VersionDef

    nodes = []
    for name, model in models.items():
        found, scope = graph(model), f"{name}/" if len(models) > 1 else ""
        for node in found.nodes:
            shapes = [
                TensorShapeProto(dim=[TensorShapeProto.Dim(size=-1 if size is None else size) for size in shape])
                for shape in node.shapes
            ]
            attributes = {
                "_output_shapes": AttrValue(list=AttrValue.ListValue(shape=shapes)),
                "parameters": AttrValue(i=node.parameters),
            }
            givers = [scope + giver for giver, taker in found.edges if taker == node.name]
            nodes.append(NodeDef(name=scope + node.name, op=node.kind, input=givers, attr=attributes))
    return GraphDef(node=nodes, versions=VersionDef(producer=22))


def weights(names: PyTree, state: PyTree) -> dict[str, Array]:
    """The trainable arrays of a state, or of all the `State`s that a larger one holds, by `weights/` and their names.

    >>> import jax.numpy as jnp
    >>> names = State(["dense/kernel"], [], [], {})
    >>> list(weights({"generator": names}, {"generator": State([jnp.ones(2)], [], [], {})}))
    ['weights/generator/dense/kernel']
    """
    paths = jax.tree_util.tree_leaves_with_path(names, is_leaf=_is_state)
    found = {}
    for (path, named), held in zip(paths, jax.tree.leaves(state, is_leaf=_is_state), strict=True):
        if isinstance(named, State):
            where = "/".join(["weights", *([jax.tree_util.keystr(path, simple=True, separator="/")] if path else [])])
            leaves = zip(jax.tree.leaves(named.trainable), jax.tree.leaves(held.trainable), strict=True)
            found.update({f"{where}/{name}": leaf for name, leaf in leaves})
    return found


@contextmanager
def recording(
    directory: Path, names: PyTree, entries: Sequence[Entry] = (), step: int = 0
) -> Iterator[tuple[Callable[[Entry], None], Hook, Hook]]:
    """A `log` and two hooks for `loop.train`: one draws curves, one adds the weights, one waits for what is not written yet.

    All is written from a thread. What the directory holds of `step` and later is removed, and what it lacks of `entries`,
    those logged before, is added: a run that goes on shows each point once.
    """
    cut(directory, step)
    written: list[Future[None]] = []
    copied: list[Future[None]] = []

    def finish(step: int = 0, state: Any = None, logs: Any = None) -> None:
        while written:
            written.pop(0).result()

    with ExitStack() as files, ThreadPoolExecutor(1, "tensorboard") as pool:
        writers: dict[str, Writer] = {}

        def writer(split: str) -> Writer:
            if split not in writers:
                writers[split] = files.enter_context(writing(directory / split))
            return writers[split]

        def add(what: Callable[..., None], split: str, *args: Any) -> Future[None]:
            while written and written[0].done():
                written.pop(0).result()
            written.append(pool.submit(lambda: what(writer(split), *args)))
            return written[-1]

        def log(entry: Entry) -> None:
            add(scalars, entry.split, entry.step, entry.values)

        def hook(step: int, state: Any, logs: Any) -> None:
            if copied:
                copied.pop().result()  # one copy of the weights at a time
            # The state itself is about to be donated. What several processes gathered may have no room on one device.
            copies = {
                name: np.array(leaf) if isinstance(leaf, np.ndarray) else jax.device_put(leaf, may_alias=False)
                for name, leaf in whole(weights(names, state)).items()
            }
            copied.append(add(histograms, "train", step, copies))

        known = {
            (path.parent.name, event.step)
            for path in directory.glob(f"*/{FILE}")
            for event in events(path.parent)
            if _curves(event)
        }
        for entry in entries:
            if (entry.split, entry.step) not in known:
                log(entry)
        try:
            yield log, hook, finish
        finally:
            finish()


def _png(figure: "Figure") -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _curves(event: Any) -> bool:
    return any(value.HasField("simple_value") for value in event.summary.value)


def _is_state(node: Any) -> bool:
    return isinstance(node, State)


def _record(data: bytes) -> bytes:
    """Data as event files hold it: between its length and checksums."""
    from tensorboardX.record_writer import masked_crc32c

    header = struct.pack("<Q", len(data))
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))
