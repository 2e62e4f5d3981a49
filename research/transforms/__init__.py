"""Functions from one pure function to another.

- `accumulate`: the gradient of a large batch from several micro-batches
- `augment`: augmentation of batches inside of the compiled step
- `by_path`: rules for weights by their names: frozen ones, an optimizer for each group of others
- `clip`: gradients of bounded norm
- `ema`: evaluation and prediction with an exponential moving average of the weights
- `evolve`: population-based training
- `finite_derivatives`: derivatives that are 0 where those of a square root or a quotient are infinite
- `from_loss`: a learner from a loss written as plain Keras code
- `fuse`: several training steps as one compiled program
- `init`: a learner's initial state as shapes only, or created directly on the devices that keep it
- `joint`: several learners as one
- `jaxpr`: reading traced programs and evaluating their equations
- `observe`: gradients, updates and weights of a step, and their norms as logs
- `per_example`: the gradient of each example, clipped ones, the gradient noise scale
- `population`: many members, other seeds and other numbers, as one program; `merge`: what their programs have in common
- `private`: differentially private training, its epsilon, and the noise for one
- `remat`: parts of the forward pass, and of the steps of its loops, computed again in place of being stored
- `skip_nonfinite`: training without the steps that would write a NaN or an infinity
- `unroll`: several training steps as one function with derivatives of the weights, the data and the hyper-parameters
"""

from research.transforms.accumulate import accumulate
from research.transforms.augment import AugmentedState, augment
from research.transforms.by_path import by_path
from research.transforms.clip import clip
from research.transforms.ema import AveragedState, ema, with_averages, with_optimizer_averages
from research.transforms.evolve import EvolvingState, evolve
from research.transforms.finite_derivatives import finite_derivatives
from research.transforms.fuse import fuse
from research.transforms.init import init_abstract, init_sharded
from research.transforms.joint import joint
from research.transforms.observe import Observation, layer_norms, norms, observe
from research.transforms.per_example import clip_per_example, gradient_noise_scale, per_example
from research.transforms.population import PopulationState, member, population, population_size, take_members
from research.transforms.private import epsilon, noise_for, private
from research.transforms.remat import remat, remat_loops
from research.transforms.skip_nonfinite import SkippingState, skip_nonfinite
from research.transforms.unroll import unroll

__all__ = [
    "AugmentedState",
    "AveragedState",
    "EvolvingState",
    "Observation",
    "PopulationState",
    "SkippingState",
    "accumulate",
    "augment",
    "by_path",
    "clip",
    "clip_per_example",
    "ema",
    "epsilon",
    "evolve",
    "finite_derivatives",
    "fuse",
    "gradient_noise_scale",
    "init_abstract",
    "init_sharded",
    "joint",
    "layer_norms",
    "member",
    "noise_for",
    "norms",
    "observe",
    "per_example",
    "population",
    "population_size",
    "private",
    "remat",
    "remat_loops",
    "skip_nonfinite",
    "take_members",
    "unroll",
    "with_averages",
    "with_optimizer_averages",
]
