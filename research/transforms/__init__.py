"""Functions from one pure function to another.

- `accumulate`: the gradient of a large batch from several micro-batches
- `ema`: evaluation and prediction with an exponential moving average of the weights
- `from_loss`: a learner from a loss written as plain Keras code
- `fuse`: several training steps as one compiled program
- `init`: a learner's initial state as shapes only, or created directly on the devices that keep it
- `joint`: several learners as one
- `jaxpr`: reading traced programs and evaluating their equations
- `observe`: gradients, updates and weights of a step, and their norms as logs
- `skip_nonfinite`: training without the steps that would write a NaN or an infinity
"""

from research.transforms.accumulate import accumulate
from research.transforms.ema import AveragedState, ema, with_averages, with_optimizer_averages
from research.transforms.fuse import fuse
from research.transforms.init import init_abstract, init_sharded
from research.transforms.joint import joint
from research.transforms.observe import Observation, layer_norms, norms, observe
from research.transforms.skip_nonfinite import SkippingState, skip_nonfinite

__all__ = [
    "AveragedState",
    "Observation",
    "SkippingState",
    "accumulate",
    "ema",
    "fuse",
    "init_abstract",
    "init_sharded",
    "joint",
    "layer_norms",
    "norms",
    "observe",
    "skip_nonfinite",
    "with_averages",
    "with_optimizer_averages",
]
