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

# As a command (`research`, `python -m research`) the process exits with 75 on SIGTERM during the slow imports below too, and with
# one line if Keras can't be imported because of its settings.
if os.path.basename("".join(sys.argv[:1])) == "research" or (
    sys.argv[:1] == ["-m"] and sys.orig_argv[sys.orig_argv.index("-m") :][1:2] == ["research"]
):
    from research.cli.lazy_keras import import_lazily
    from research.cli.signals import exit_on_signal

    exit_on_signal()
    import_lazily()
    try:
        import keras
    except Exception as error:
        sys.exit(
            f"error: Keras can't be imported ({type(error).__name__}: {' '.join(str(error).split())}); its settings are in "
            f"{os.environ.get('KERAS_HOME') or os.path.expanduser('~/.keras')}/keras.json: correct it, or remove it."
        )

import keras

from research.core.learner import Learner, from_objective, supervised
from research.core.metrics import Metrics
from research.core.objective import Aux, Objective, keras_objective
from research.core.state import Batch, InvalidArgument, State, count_parameters
from research.core.step import Gradient, Step, gradient, num_examples, step
from research.core.update import Gradients, Update, keras_update, optax_update, set_learning_rate
from research.data.batches import Batches, from_arrays
from research.data.sources import from_batches, from_examples, from_iterable
from research.debugging.contract import check_learner
from research.keras_fit import fit as _fit
from research.keras_fit.fit import fit, predict_on_batch, test_on_batch, train_on_batch
from research.keras_fit.from_keras import from_keras
from research.keras_fit.write_back import part, write_back
from research.training import loop as _loop
from research.training.logs import LogEntry
from research.training.loop import train
from research.training.portable import export_step
from research.training.warm_start import RestoreReport, restore
from research.transforms.accumulate import accumulate
from research.transforms.from_loss import learner
from research.transforms.init import init_abstract, init_sharded
from research.transforms.joint import joint
from research.transforms.observe import Observation, layer_norms, norms

# Dispatched on the first argument: a learner with its data, or a Keras model with the arguments of its own methods.
evaluate = functools.singledispatch(_loop.evaluate)
evaluate.register(keras.Model, _fit.evaluate)
predict = functools.singledispatch(_loop.predict)
predict.register(keras.Model, _fit.predict)

__all__ = [
    "Aux",
    "Batch",
    "Batches",
    "Gradient",
    "Gradients",
    "InvalidArgument",
    "Learner",
    "LogEntry",
    "Metrics",
    "Objective",
    "Observation",
    "RestoreReport",
    "State",
    "Step",
    "Update",
    "accumulate",
    "check_learner",
    "count_parameters",
    "evaluate",
    "export_step",
    "fit",
    "from_arrays",
    "from_batches",
    "from_examples",
    "from_iterable",
    "from_keras",
    "from_objective",
    "gradient",
    "init_abstract",
    "init_sharded",
    "joint",
    "keras_objective",
    "keras_update",
    "layer_norms",
    "learner",
    "norms",
    "num_examples",
    "optax_update",
    "part",
    "predict",
    "predict_on_batch",
    "restore",
    "set_learning_rate",
    "step",
    "supervised",
    "test_on_batch",
    "train",
    "train_on_batch",
    "write_back",
]
