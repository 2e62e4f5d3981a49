"""Finding what is wrong with a learner.

- `against_keras`: Keras' own `fit` and a learner side by side, tensor by tensor
- `blame`: the first layer of a step that is not finite, and the rows of the batch that cause it
- `check`: whether training equals Keras' `fit` and is free of traps
- `contexts`: contexts in which layers add other losses, or what JAX compiles is recorded
- `contract`: whether a learner written by hand keeps the contract of `Learner`
- `failures`: a failing step on disk and as a table
- `history`: the state of a run after any of its steps, computed again; what the run did about bad steps
- `instrument`: a training step with the outputs and gradients of all layer calls
- `probe`, `traps`: what a step's results depend on; the traps that hand-written steps fall into
- `replay`, `replay_page`: a step of a run once more, bit for bit, with what happens inside it; as a page
"""

from research.debugging.blame import blame
from research.debugging.check import check
from research.debugging.contract import check_learner
from research.debugging.replay import replay

__all__ = ["blame", "check", "check_learner", "replay"]
