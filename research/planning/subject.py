"""What can be planned: an experiment, or a function that returns a Keras model. Both are built from shapes, without arrays."""

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import keras
from jaxtyping import PyTree

from research.core.learner import Learner, supervised
from research.core.metrics import compile_metrics, output_shapes
from research.core.state import Batch, InvalidArgument
from research.data.batches import Batches
from research.keras_fit.from_keras import from_keras
from research.transforms.init import init_abstract


class Built(NamedTuple):
    """An abstract learner with the shapes of its state and of a full batch. `remark` says how the learner was made.

    >>> Built._fields
    ('learner', 'shapes', 'batch', 'remark')
    """

    learner: Learner
    shapes: PyTree
    batch: PyTree
    remark: str


class Subject(NamedTuple):
    """What is planned: a name, a config (a dataclass), and a function that builds the learner.

    >>> Subject._fields
    ('name', 'config', 'build')
    """

    name: str
    config: Any
    build: Callable[[], Built]


@dataclasses.dataclass(frozen=True)
class BuilderConfig:
    """How a Keras model is built and trained."""

    builder: str = ""
    """module:function that returns a Keras model, compiled or not; modules are looked up in the current directory too."""
    batch_size: int = 256
    """Examples in a step, on all chips together."""
    length: int | None = None
    """The size of the input axes that the model leaves open."""
    loss: str | None = None
    """The loss of a model that is not compiled, by its Keras name."""
    optimizer: str = "adamw"
    """The optimizer of a model that is not compiled, by its Keras name."""


def build_experiment(build: Callable[[], Learner], data: Callable[[], Mapping[str, Batches]]) -> Built:
    """Builds an experiment for the batches of its `train` split. Only the shapes of the data are read.

    >>> import numpy as np
    >>> from research.data.batches import from_arrays
    >>> def build():
    ...     return supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
    >>> def data():
    ...     return {"train": from_arrays(np.ones((8, 4)), np.ones((8, 2)), batch_size=8)}
    >>> build_experiment(build, data).batch.x
    ShapeDtypeStruct(shape=(8, 4), dtype=float32)
    """
    learner, shapes = init_abstract(build)
    return Built(learner, shapes, data()["train"].shapes, "")


def build_keras_model(config: BuilderConfig) -> Built:
    """Builds the learner of the Keras model that `config.builder` returns.

    Raises `InvalidArgument` where the function can't be imported or called, or the model's inputs or loss are unknown.

    >>> build_keras_model(BuilderConfig(builder="models"))
    Traceback (most recent call last):
    research.core.state.InvalidArgument: --builder models: expected a module and a function in it, as in --builder models:gpt.
    """
    where = f"--builder {config.builder}"
    function = _import_builder(config.builder, where)
    batches: list[Batch] = []
    remarks: list[str] = []

    def build() -> Learner:
        model = _call_builder(function, config, where)
        inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        x = keras.tree.map_structure(lambda tensor: _input_shape(tensor, config, where), inputs)
        loss = model.loss if model.compiled else config.loss
        example = Batch(x, _target_shapes(model, x, loss))
        batches.append(example)
        if model.compiled:
            remarks.append(f"as compiled: {model.optimizer.name}")
            return from_keras(model, example=example)
        remarks.append(f"not compiled: --loss {config.loss}, --optimizer {config.optimizer}")
        return supervised(model, loss=config.loss, optimizer=config.optimizer, example=example)

    learner, shapes = init_abstract(build)
    return Built(learner, shapes, batches[0], remarks[0])


def _target_shapes(model: keras.Model, x: PyTree, loss: Any) -> PyTree:
    """Returns shapes of targets that a loss accepts: for each output those of the output, or else those of class numbers."""
    outputs, structure = jax.tree.flatten(output_shapes(model, x))
    choices = [(output, jax.ShapeDtypeStruct(output.shape[:-1], "int32")) for output in outputs]
    problems = []
    for choice in itertools.product(*choices):
        y = jax.tree.unflatten(structure, choice)
        try:
            compile_metrics(model, Batch(x, y), loss=loss)
        except InvalidArgument as error:
            problems.append(error)
        else:
            return y
    raise problems[0]


def _import_builder(builder: str, where: str) -> Callable[[], Any]:
    module, _, name = builder.partition(":")
    if not module or not name:
        raise InvalidArgument(f"{where}: expected a module and a function in it, as in --builder models:gpt.")
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidArgument(
            f"{where}: {error}; expected a module that can be imported from here, and a function in it."
        ) from error
    return function


def _call_builder(function: Callable[[], Any], config: BuilderConfig, where: str) -> Any:
    try:
        model = function()
    except Exception as error:
        line = " ".join(str(error).split())
        raise InvalidArgument(
            f"{where}: it fails ({type(error).__name__}: {line}); expected a function without arguments."
        ) from error
    if not isinstance(model, keras.Model):
        raise InvalidArgument(f"{where}: it returned {type(model).__name__}; expected a keras.Model.")
    if not getattr(model, "inputs", None):
        raise InvalidArgument(f"{where}: the input shapes of model {model.name!r} are unknown; expected a keras.Input in it.")
    if not model.compiled and config.loss is None:
        raise InvalidArgument(
            f"{where}: model {model.name!r} is not compiled; give --loss, or call model.compile(...) in the function."
        )
    return model


def _input_shape(tensor: Any, config: BuilderConfig, where: str) -> jax.ShapeDtypeStruct:
    if None in tensor.shape[1:] and config.length is None:
        raise InvalidArgument(
            f"{where}: the input {tensor.name!r} is {tensor.shape}; expected all sizes but the first: give --length."
        )
    return jax.ShapeDtypeStruct((config.batch_size, *(size or config.length for size in tensor.shape[1:])), tensor.dtype)
