"""A training step in files that need JAX and NumPy alone: programs for CPU, GPU and TPU, the state, and a script that trains on.

The programs are `jax.export` artifacts of a learner's functions over lists of arrays: no class of Keras or of this package is
needed to call them. Nothing in the folder is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner, prediction_shapes
from research.core.state import InvalidArgument

PLATFORMS = ("cpu", "cuda", "tpu")
PACKAGES = ("jax", "jaxlib", "keras", "numpy")
SCRIPT = '''"""Trains on from the state in this folder. Needs JAX, with flatbuffers, and NumPy alone: `python train.py`."""

import json
from pathlib import Path

import jax
import numpy as np
from jax import export

HERE = Path(__file__).parent
PLATFORM = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
info = json.loads((HERE / "step.json").read_text())


def program(file):
    return jax.jit(export.deserialize(bytearray((HERE / PLATFORM / file).read_bytes())).call)


def arrays(file, leaves):
    with np.load(HERE / file) as stored:  # NumPy's files have no name for bfloat16 and the like
        return [stored[f"arr_{i}"].view(jax.numpy.dtype(leaf["dtype"])) for i, leaf in enumerate(leaves)]


reset, train = program("reset.jax"), {each["rows"]: program(each["file"]) for each in info["train"]}
state = arrays("state.npz", info["state"])
for step, file in enumerate(info["batches"], info["step"]):
    batch = arrays(file, info["batch"])
    if info["steps_per_epoch"] and step % info["steps_per_epoch"] == 0:
        state = reset(state)  # the metrics
    state, logs = train[len(batch[0])](state, batch)
    print(step + 1, {name: np.asarray(log).tolist() for name, log in logs.items()})
np.savez(HERE / "trained.npz", *map(np.asarray, state))
'''


def export_step(
    learner: Learner,
    state: Any,
    batches: Sequence[PyTree],
    directory: Path,
    *,
    step: int = 0,
    steps_per_epoch: int | None = None,
) -> Path:
    """Writes a learner's functions, a state and some batches into a new folder, with a script that trains on. Returns its path.

    - `cpu/`, `cuda/` and `tpu/`: the programs for each. `train.jax` is (state, batch) -> (state, logs), with `state` and `batch`
      lists of arrays and `logs` a dict of arrays. `evaluate.jax` has the same form, `reset.jax` is state -> state, `predict.jax`
      returns a list; it is left out if `predict` does not take these batches. Batches of other sizes have programs of their own,
      `train-1.jax` and so on. The `.mlir` files are their text.
    - `predict.jax`: one program for all three, which may round otherwise; `write_saved_model` takes it.
    - `state.npz`, `batches/0.npz`, ...: the arrays.
    - `step.json`: name, shape and dtype of each array, the number of steps done, versions, and SHA-256 digests of the files.
    - `train.py`: trains on with the batches, without this package and Keras, and writes `trained.npz`.

    On the CPU the numbers are those of `research.train`, bit for bit. It is slower there, without what `research.cpu` rewrites.
    `batches` are consecutive, the first one comes after `step` steps; the first axis of each array counts rows. With
    `steps_per_epoch` the script empties the metrics where an epoch begins. Raises `InvalidArgument` if the folder exists, if
    there are no batches, or if their structures differ.

    >>> import keras, tempfile, research
    >>> learner = research.supervised(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), loss="mse", optimizer="sgd")
    >>> batch = research.Batch(np.ones((2, 1), "float32"), np.zeros((2, 1), "float32"))
    >>> folder = export_step(learner, learner.init(), [batch], Path(tempfile.mkdtemp()) / "step")
    >>> sorted(path.name for path in folder.iterdir()), sorted(path.name for path in (folder / "tpu").glob("*.jax"))
    (['batches', 'cpu', 'cuda', 'predict.jax', 'state.npz', 'step.json', 'tpu', 'train.py'],
     ['evaluate.jax', 'predict.jax', 'reset.jax', 'train.jax'])
    """
    if directory.exists():
        raise InvalidArgument(f"{directory}: it exists already; choose another folder, or remove it.")
    if not batches:
        raise InvalidArgument("export_step: there are no batches; expected at least one, for the shapes.")
    structures = {jax.tree.structure(batch) for batch in batches}
    if len(structures) > 1:
        raise InvalidArgument(f"export_step: the batches have {len(structures)} different structures, expected one.")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "batches").mkdir(parents=True)
        _write(learner, state, batches, partial, {"step": step, "steps_per_epoch": steps_per_epoch})
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _write(learner: Learner, state: Any, batches: Sequence[PyTree], partial: Path, facts: dict[str, Any]) -> None:
    leaves = _state_leaves(state)
    shapes: dict[int, list[Any]] = {}  # of batches, by their rows
    for batch in batches:
        arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
        shapes.setdefault(len(arrays[0]), arrays)
    functions = _functions(learner, state, jax.tree.structure(batches[0]))
    predictions = _predictions(learner, state, batches[0])
    programs: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("train", "evaluate", "predict") if predictions or name != "predict"
    }
    outputs: dict[str, Any] = {}
    for name, written in programs.items():
        for i, (rows, arrays) in enumerate(shapes.items()):
            file = f"{name}-{i}.jax" if i else f"{name}.jax"
            outputs[name] = _export(functions[name], (leaves, arrays), partial, file)
            written.append({"file": file, "rows": rows})
    _export(functions["reset"], (leaves,), partial, "reset.jax")
    np.savez(partial / "state.npz", *map(np.asarray, leaves))
    files = [f"batches/{i}.npz" for i in range(len(batches))]
    for file, batch in zip(files, batches, strict=True):
        np.savez(partial / file, *map(np.asarray, jax.tree.leaves(batch)))
    (partial / "train.py").write_text(SCRIPT)
    contents = {
        "format": 1,
        **facts,
        "platforms": PLATFORMS,
        "state": _describe(jax.tree.leaves(learner.names), leaves),
        "batch": _describe(_paths(batches[0]), next(iter(shapes.values()))),
        "logs": _describe(sorted(outputs["train"][1]), [outputs["train"][1][name] for name in sorted(outputs["train"][1])]),
        "predictions": predictions,
        **programs,
        "batches": files,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "sha256": {name: _digest(partial / name) for name in _file_names(partial)},
    }
    (partial / "step.json").write_text(json.dumps(contents, indent=1))


def _predictions(learner: Learner, state: Any, batch: PyTree) -> list[dict[str, Any]]:
    """Returns names, shapes and dtypes of a batch's predictions; none if `predict` takes other batches."""
    outputs = prediction_shapes(learner, state, batch)
    return [] if outputs is None else _describe(_paths(outputs), jax.tree.leaves(outputs))


def _functions(learner: Learner, state: Any, batch: Any) -> dict[str, Callable[..., Any]]:
    """Returns the learner's functions over lists of arrays, for a state like this one and batches of this structure."""
    like, structure = jax.tree.leaves(state), jax.tree.structure(state)

    def wrap(leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(structure, [_as_leaf(array, leaf) for array, leaf in zip(leaves, like, strict=True)])

    def stepping(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        def call(leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
            after, logs = function(wrap(leaves), jax.tree.unflatten(batch, arrays))
            return _state_leaves(after), logs

        return call

    return {
        "train": stepping(learner.train),
        "evaluate": stepping(learner.evaluate),
        "predict": lambda leaves, arrays: jax.tree.leaves(learner.predict(wrap(leaves), jax.tree.unflatten(batch, arrays))),
        "reset": lambda leaves: _state_leaves(learner.reset(wrap(leaves))),
    }


def _state_leaves(state: Any) -> list[Any]:
    """Returns the leaves of a state as arrays of numbers: typed random keys become their data."""
    leaves = jax.tree.leaves(state)
    return [jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf) for leaf in leaves]


def _as_leaf(array: Any, like: Any) -> Any:
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like)) if _is_key(like) else array


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _export(function: Callable[..., Any], arguments: tuple[Any, ...], directory: Path, file: str) -> Any:
    """Writes a program for these arguments, for each platform, and its text. Returns the shapes of its results."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    for platform in PLATFORMS:  # one program for all may be compiled to other bits
        exported = jax.export.export(jax.jit(function), platforms=[platform])(*shapes)
        path = directory / platform / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(exported.serialize())
        path.with_suffix(".mlir").write_text(exported.mlir_module())
    if file == "predict.jax":
        (directory / file).write_bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes).serialize())
    return jax.tree.unflatten(exported.out_tree, exported.out_avals)


def _describe(names: Iterable[str], arrays: Iterable[Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(array.shape), "dtype": np.dtype(array.dtype).name}
        for name, array in zip(names, arrays, strict=True)
    ]


def _paths(tree: PyTree) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _file_names(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_saved_model(directory: Path) -> Path:
    """Writes the predictions of an exported step as a SavedModel of TensorFlow: `saved_model/` in the folder. Returns its path.

    `predict(x=..., ...)`, the default signature, takes the arrays of a batch by name, and returns the predictions by name. The
    weights are constants in it. It runs on the platforms of the programs. Raises `InvalidArgument` if the folder has no
    predictions, and `ModuleNotFoundError` without TensorFlow, which this package does not install.
    """
    import tensorflow as tf
    from jax.experimental import jax2tf

    info = json.loads((directory / "step.json").read_text())
    if not info["predictions"]:
        raise InvalidArgument(f"{directory}: it has no predict.jax; a SavedModel needs a learner that predicts from its batches.")
    exported = jax.export.deserialize(bytearray((directory / "predict.jax").read_bytes()))
    with np.load(directory / "state.npz") as stored:
        state = [stored[f"arr_{i}"].view(jnp.dtype(leaf["dtype"])) for i, leaf in enumerate(info["state"])]
    inputs = {leaf["name"].replace("/", "_"): tf.TensorSpec(leaf["shape"], leaf["dtype"]) for leaf in info["batch"]}
    outputs = [leaf["name"].replace("/", "_") or "outputs" for leaf in info["predictions"]]

    def predict(batch: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(outputs, exported.call(state, [batch[name] for name in inputs]), strict=True))

    converted = jax2tf.convert(predict, with_gradient=False, native_serialization_platforms=PLATFORMS)
    module = tf.Module()
    module.predict = tf.function(lambda **batch: converted(batch), autograph=False).get_concrete_function(**inputs)
    tf.saved_model.save(module, str(directory / "saved_model"), signatures=module.predict)
    return directory / "saved_model"
