"""Keras networks trained as pure JAX programs.

>>> import research
>>> research.State._fields
('trainable', 'non_trainable', 'optimizer', 'metrics')
"""

import os
import sys

# Keras reads its backend once, when it is first imported, and defaults to TensorFlow.
if "keras" in sys.modules and sys.modules["keras"].backend.backend() != "jax":
    raise ImportError(
        f"research: Keras is already loaded with the {sys.modules['keras'].backend.backend()!r} backend, expected 'jax': "
        "import research before keras, or set KERAS_BACKEND=jax in the environment."
    )
os.environ["KERAS_BACKEND"] = "jax"

from research.data import Batches, arrays
from research.loop import Entry, evaluate, predict, train
from research.measures import Measures
from research.objective import Aux, Objective, keras_objective
from research.state import Batch, Refused, State, abstract, born, parameters, write_back
from research.step import Gradient, Learner, Step, from_keras, gradient, step, supervised
from research.update import Gradients, Update, keras_update, optax_update, set_learning_rate

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
    "arrays",
    "born",
    "evaluate",
    "from_keras",
    "gradient",
    "keras_objective",
    "keras_update",
    "optax_update",
    "parameters",
    "predict",
    "set_learning_rate",
    "step",
    "supervised",
    "train",
    "write_back",
]
