"""One learner on many devices and in many processes.

- `layouts`: the mesh, and layouts that split weights over it: `data`, `fsdp`, `tensor`, `rules`, `keras_layout`.
- `slots`: which weight each optimizer slot and each copy of a weight belongs to.
- `placement`: the sharding of every leaf of a state: `state_shardings`, `replicated_leaves`.
- `sharding`: learners and batches on a mesh: `shard`, `build_sharded`, `shard_batch`, `shard_batches`.
- `gather`: weights split over `fsdp`, gathered where they are used.
- `replicas`: data parallelism by `jax.pmap`: `pmap`, `average_gradients`.
- `processes`: several processes that train as one, by `jax.distributed`.
- `rendezvous`: waits for all of them at the start, and names those that are missing.
"""

from research.distributed.layouts import Layout, Weights, data, default_layout, fsdp, keras_layout, mesh, rules, tensor
from research.distributed.placement import replicated_leaves, state_shardings
from research.distributed.replicas import average_gradients, pmap
from research.distributed.sharding import build_sharded, shard, shard_batch, shard_batches

__all__ = [
    "Layout",
    "Weights",
    "average_gradients",
    "build_sharded",
    "data",
    "default_layout",
    "fsdp",
    "keras_layout",
    "mesh",
    "pmap",
    "replicated_leaves",
    "rules",
    "shard",
    "shard_batch",
    "shard_batches",
    "state_shardings",
    "tensor",
]
