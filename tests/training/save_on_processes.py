"""Saves and restores a state of all kinds of leaves as one of two processes: save_on_processes.py ADDRESS PROCESS DIRECTORY."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import research
from research.distributed import processes
from research.training import checkpoint
from research.training.manifest import Origin


def main(address: str, process: str, directory: str) -> None:
    processes.join(address, 2, int(process), 120)
    sharding = NamedSharding(jax.make_mesh((len(jax.devices()),), ("data",)), P("data"))

    def placed(value: Any) -> jax.Array:
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    values = np.arange(16)
    state = {name: placed(values.astype(jnp.dtype(name))) for name in ("float8_e4m3fn", "float8_e4m3", "uint4", "bfloat16")}
    state |= {"int4": placed((values - 8).astype(jnp.int4)), "numpy": np.linspace(0, 1, 5), "rate": 0.1, "count": 3}
    names = {name: name for name in state}
    path = checkpoint.save(Path(directory), 1, state, names, {"loss": 1.0}, origin=Origin(run="mine"))
    restored = checkpoint.restore_latest(Path(directory), state, names, print, Origin(run="mine"))
    assert restored is not None
    for name, leaf in state.items():
        result = restored.state[name]
        assert type(result) is type(leaf), name
        if isinstance(leaf, jax.Array):
            shards = zip(leaf.addressable_shards, result.addressable_shards, strict=True)
            assert all(np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes() for a, b in shards), name
        else:
            np.testing.assert_array_equal(result, leaf)
    try:
        checkpoint.restore(path, state, names, Origin(run="another"))
    except research.InvalidArgument as error:
        sys.stdout.write(str(error))
    with checkpoint.async_saver(Path(directory), names, keep=2, origin=Origin(run="mine")) as save_later:
        for step in (2, 3):
            save_later(step, {**state, "count": step}, {"loss": 0.5})
    later = checkpoint.restore_latest(Path(directory), state, names, print, Origin(run="mine"))
    assert later is not None
    assert (later.step, later.state["count"]) == (3, 3)
    assert checkpoint.steps(Path(directory)) == [2, 3]
    shards = later.state["bfloat16"].addressable_shards
    assert all((np.asarray(shard.data) == values[shard.index]).all() for shard in shards)


if __name__ == "__main__":
    main(*sys.argv[1:])
