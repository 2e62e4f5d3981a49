"""Event files for TensorBoard: scalars, histograms, images, the graph. To view them: `tensorboard --logdir runs`."""

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

from research.core.state import State
from research.distributed.processes import to_host
from research.reporting.graph import model_graph
from research.reporting.record import png_bytes, write_bytes
from research.reporting.run_files import Report, ignore, set_aside
from research.training.logs import LogEntry
from research.training.loop import Hook

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENT_FILE = "events.out.tfevents.0"  # one file per directory, appended to: TensorBoard would show two files as two runs
FILE_VERSION = "brain.Event:2"  # TensorBoard expects it in the first event
HISTOGRAM_BINS = 60


class Writer(NamedTuple):
    """A directory and a function that appends a `tensorboardX.proto.event_pb2.Event` to its file before it returns.

    >>> Writer(Path("tensorboard/train"), write=print).directory.name
    'train'
    """

    directory: Path
    write: Callable[[Any], None]


@contextmanager
def open_writer(directory: Path) -> Iterator[Writer]:
    """Yields a writer that appends to a directory's event file. What was written survives if the process is killed.

    TensorBoard shows each directory as a separate run, and a tag that several runs share in one chart.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> with open_writer(directory / "train") as writer:
    ...     write_scalars(writer, 10, {"loss": 0.5})
    >>> [(event.step, event.summary.value[0].tag) for event in read_events(directory / "train")]
    [(10, 'loss')]
    """
    from tensorboardX.proto.event_pb2 import Event

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / EVENT_FILE).open("ab") as file:

        def write(event: Any) -> None:
            event.wall_time = event.wall_time or time.time()
            file.write(_frame(event.SerializeToString()))
            file.flush()

        if not file.tell():
            write(Event(file_version=FILE_VERSION))
        yield Writer(directory, write)


def read_events(directory: Path, report: Report = ignore) -> list[Any]:
    """Returns a directory's events as `tensorboardX.proto.event_pb2.Event`s.

    An incomplete last one is what a killed process leaves, and is ignored. Those from a damaged one on can't be read: `report` is
    called with a line about them.

    >>> read_events(Path("no/events"))
    []
    """
    from tensorboardX.proto.event_pb2 import Event

    path = directory / EVENT_FILE
    data = path.read_bytes() if path.is_file() else b""
    events, start = [], 0
    while start + 12 <= len(data):
        (size,) = struct.unpack_from("<Q", data, start)
        record = data[start + 12 : start + 12 + size]
        intact = _frame(record) == data[start : start + 16 + size]
        try:
            events.append(Event.FromString(record if intact else b"\xff"))
        except Exception:  # protobuf's implementations have no common error
            if start + 16 + size <= len(data) or _frame(b"", size)[:12] != data[start : start + 12]:
                report(f"{path}: its events are damaged from byte {start} of {len(data)} on; they are left out")
            break
        start += 16 + size
    return [event for event in events if not event.file_version]


def truncate(directory: Path, step: int, report: Report = ignore) -> None:
    """Removes the events of `step` and later, the graph, and damaged events, from a directory and its subdirectories.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> with open_writer(directory) as writer:
    ...     for step in (1, 2, 3):
    ...         write_scalars(writer, step, {"loss": 0.5})
    >>> truncate(directory, 3)
    >>> [event.step for event in read_events(directory)]
    [1, 2]
    """
    from tensorboardX.proto.event_pb2 import Event

    for path in directory.rglob(EVENT_FILE):
        if path.is_dir():
            report(f"{path}: expected a file; what is there is kept as {set_aside(path).name}")
        events = read_events(path.parent, report)
        earlier = [event for event in events if event.step < step and event.HasField("summary")]
        frames = [_frame(event.SerializeToString()) for event in [Event(file_version=FILE_VERSION), *earlier]]
        write_bytes(path, b"".join(frames))


def write_scalars(writer: Writer, step: int, values: Mapping[str, float]) -> None:
    """Appends a scalar per name.

    >>> import tempfile
    >>> with open_writer(Path(tempfile.mkdtemp())) as writer:
    ...     write_scalars(writer, 1, {"loss": 0.5})
    >>> [event.summary.value[0].simple_value for event in read_events(writer.directory)]
    [0.5]
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    writer.write(Event(step=step, summary=Summary(value=points)))


def write_histograms(writer: Writer, step: int, arrays: Mapping[str, Any]) -> None:
    """Appends a histogram of each array's finite values. TensorBoard groups names by their part before the first `/`.

    >>> import tempfile
    >>> with open_writer(Path(tempfile.mkdtemp())) as writer:
    ...     write_histograms(writer, 1, {"weights/kernel": np.ones((3, 4))})
    >>> [event.summary.value[0].histo.num for event in read_events(writer.directory)]
    [12.0]
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

    histograms = []
    for name, array in arrays.items():
        values = np.asarray(array, np.float32).ravel()
        values = values[np.isfinite(values)]
        if not values.size:
            continue
        low, high = np.float64(values.min()), np.float64(values.max())  # in float32 the edges of the bins may coincide
        counts, edges = np.histogram(values, HISTOGRAM_BINS, (low, high)) if low < high else ([values.size], [low, high])
        bounds = {"min": low, "max": high, "num": values.size}
        sums = {"sum": values.sum(dtype=np.float64), "sum_squares": np.square(values, dtype=np.float64).sum()}
        histogram = HistogramProto(**bounds, **sums, bucket_limit=edges[1:], bucket=counts)
        histograms.append(Summary.Value(tag=name, histo=histogram))
    writer.write(Event(step=step, summary=Summary(value=histograms)))


def write_images(writer: Writer, step: int, images: Mapping[str, "Path | Figure"]) -> None:
    """Appends images: PNG files, or figures.

    >>> import tempfile
    >>> from matplotlib.figure import Figure
    >>> with open_writer(Path(tempfile.mkdtemp())) as writer:
    ...     write_images(writer, 1, {"samples": Figure((1, 2))})
    >>> [(event.summary.value[0].image.width, event.summary.value[0].image.height) for event in read_events(writer.directory)]
    [(110, 220)]
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = []
    for name, source in images.items():
        png = source.read_bytes() if isinstance(source, Path) else png_bytes(source)
        width, height = struct.unpack_from(">II", png, 16)
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        values.append(Summary.Value(tag=name, image=image))
    writer.write(Event(step=step, summary=Summary(value=values)))


def write_graph(writer: Writer, models: Mapping[str, keras.Model]) -> None:
    """Appends the graph of a model's layers, or of several models side by side.

    >>> import tempfile
    >>> with open_writer(Path(tempfile.mkdtemp())) as writer:
    ...     write_graph(writer, {"model": keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])})
    >>> [bool(event.graph_def) for event in read_events(writer.directory)]
    [True]
    """
    from tensorboardX.proto.event_pb2 import Event

    if models:
        writer.write(Event(graph_def=graph_def(models).SerializeToString()))


def graph_def(models: Mapping[str, keras.Model]) -> Any:
    """Returns models as a TensorFlow `GraphDef`: layers are nodes, classes are ops, models are name scopes.

    A single model gets no scope.

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
        graph, scope = model_graph(model), f"{name}/" if len(models) > 1 else ""
        for node in graph.nodes:
            shapes = [
                TensorShapeProto(dim=[TensorShapeProto.Dim(size=-1 if size is None else size) for size in shape])
                for shape in node.shapes
            ]
            attributes = {
                "_output_shapes": AttrValue(list=AttrValue.ListValue(shape=shapes)),
                "parameters": AttrValue(i=node.parameters),
            }
            inputs = [scope + source for source, target in graph.edges if target == node.name]
            nodes.append(NodeDef(name=scope + node.name, op=node.class_name, input=inputs, attr=attributes))
    return GraphDef(node=nodes, versions=VersionDef(producer=22))


def named_weights(names: PyTree, state: PyTree) -> dict[str, Array]:
    """Returns the trainable arrays of every `State` in a tree of states, by name with the prefix `weights/`.

    >>> import jax.numpy as jnp
    >>> names = State(["dense/kernel"], [], [], {})
    >>> list(named_weights({"generator": names}, {"generator": State([jnp.ones(2)], [], [], {})}))
    ['weights/generator/dense/kernel']
    """
    paths = jax.tree_util.tree_leaves_with_path(names, is_leaf=_is_state)
    arrays = {}
    for (path, node_names), node in zip(paths, jax.tree.leaves(state, is_leaf=_is_state), strict=True):
        if isinstance(node_names, State):
            prefix = "/".join(["weights", *([jax.tree_util.keystr(path, simple=True, separator="/")] if path else [])])
            leaves = zip(jax.tree.leaves(node_names.trainable), jax.tree.leaves(node.trainable), strict=True)
            arrays.update({f"{prefix}/{name}": leaf for name, leaf in leaves})
    return arrays


@contextmanager
def recorder(
    directory: Path, names: PyTree, entries: Sequence[LogEntry] = (), step: int = 0, report: Report = ignore
) -> Iterator[tuple[Callable[[LogEntry], None], Hook, Hook]]:
    """Yields `(log, histogram_hook, flush_hook)` for `loop.train`, which write in a background thread.

    `log` writes scalars, `histogram_hook` histograms of the weights, `flush_hook` waits until everything is written. If a run
    resumes at `step`, events of `step` and later are removed, and scalars missing from those of `entries`, the earlier logs, are
    added: TensorBoard shows each point once. `report` is called with a line about damaged events.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> with recorder(directory, names=()) as (log, histogram_hook, flush_hook):
    ...     log(LogEntry(1, 0, "train", {"loss": 0.5}))
    >>> [event.step for event in read_events(directory / "train")]
    [1]
    """
    truncate(directory, step, report)
    pending: list[Future[None]] = []
    pending_weights: list[Future[None]] = []

    def flush_hook(step: int = 0, state: Any = None, logs: Any = None) -> None:
        while pending:
            pending.pop(0).result()

    with ExitStack() as files, ThreadPoolExecutor(1, "tensorboard") as pool:
        writers: dict[str, Writer] = {}

        def writer(split: str) -> Writer:
            if split not in writers:
                writers[split] = files.enter_context(open_writer(directory / split))
            return writers[split]

        def submit(write: Callable[..., None], split: str, *args: Any) -> Future[None]:
            while pending and pending[0].done():
                pending.pop(0).result()
            pending.append(pool.submit(lambda: write(writer(split), *args)))
            return pending[-1]

        def log(entry: LogEntry) -> None:
            submit(write_scalars, entry.split, entry.step, entry.values)

        def histogram_hook(step: int, state: Any, logs: Any) -> None:
            if pending_weights:
                pending_weights.pop().result()  # one copy of the weights at a time
            # Copies, because the state is donated next. Weights gathered from several processes may not fit on one device.
            copies = {
                name: np.array(leaf) if isinstance(leaf, np.ndarray) else jax.device_put(leaf, may_alias=False)
                for name, leaf in to_host(named_weights(names, state)).items()
            }
            pending_weights.append(submit(write_histograms, "train", step, copies))

        known = {
            (path.parent.name, event.step)
            for path in directory.glob(f"*/{EVENT_FILE}")
            for event in read_events(path.parent)
            if _has_scalars(event)
        }
        for entry in entries:
            if (entry.split, entry.step) not in known:
                log(entry)
        try:
            yield log, histogram_hook, flush_hook
        finally:
            flush_hook()


def _has_scalars(event: Any) -> bool:
    return any(value.HasField("simple_value") for value in event.summary.value)


def _is_state(node: Any) -> bool:
    return isinstance(node, State)


def _frame(data: bytes, size: int | None = None) -> bytes:
    """Returns data as a record of an event file: with its length, or another one, and checksums."""
    from tensorboardX.record_writer import masked_crc32c

    header = struct.pack("<Q", len(data) if size is None else size)
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))
