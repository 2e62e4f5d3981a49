"""Keras networks trained as pure JAX programs.

>>> import research
>>> research.State._fields
('trainable', 'non_trainable', 'optimizer', 'metrics')
"""

import functools
import os
import sys

# Keras reads its backend once, when it is first imported, and defaults to TensorFlow.
if "keras" in sys.modules and sys.modules["keras"].backend.backend() != "jax":
    raise ImportError(
        f"research: Keras is already loaded with the {sys.modules['keras'].backend.backend()!r} backend, expected 'jax': "
        "import research before keras, or set KERAS_BACKEND=jax in the environment."
    )
os.environ["KERAS_BACKEND"] = "jax"

import keras

from research import fit as _fit
from research import loop as _loop
from research.data import Batches, arrays
from research.fit import fit, predict_on_batch, test_on_batch, train_on_batch
from research.loop import Entry, train
from research.measures import Measures
from research.objective import Aux, Objective, keras_objective
from research.sources import indexed, iterated, picked
from research.state import Batch, Refused, State, abstract, born, parameters, write_back
from research.step import Gradient, Learner, Step, examples, from_keras, gradient, step, supervised
from research.transforms import accumulate
from research.update import Gradients, Update, keras_update, optax_update, set_learning_rate

# One name for both: of a learner and its data, and of a Keras model with the arguments of its own methods.
evaluate = functools.singledispatch(_loop.evaluate)
evaluate.register(keras.Model, _fit.evaluate)
predict = functools.singledispatch(_loop.predict)
predict.register(keras.Model, _fit.predict)

__all__ = [
    "Aux",
    "Batch",
    "Batches",
    "Entry",
    "Gradient",
    "Gradients",
    "Learner",
    "Measures",
    "Objective",
    "Refused",
    "State",
    "Step",
    "Update",
    "abstract",
    "accumulate",
    "arrays",
    "born",
    "evaluate",
    "examples",
    "fit",
    "from_keras",
    "gradient",
    "indexed",
    "iterated",
    "keras_objective",
    "keras_update",
    "optax_update",
    "parameters",
    "picked",
    "predict",
    "predict_on_batch",
    "set_learning_rate",
    "step",
    "supervised",
    "test_on_batch",
    "train",
    "train_on_batch",
    "write_back",
]
