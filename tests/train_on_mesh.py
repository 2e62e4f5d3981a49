"""Trains an experiment for some steps on a mesh, as one process or one of several, and writes every step's logs.

train_on_mesh.py OUTPUT EXPERIMENT MESH OPTIMIZER STEPS [--coordinator ... --processes ... --process ...]

MESH: axes as for `just run`, or "none" for one device. The experiment's optimizers are replaced: SGD with momentum shows
differences between meshes as they are, Adam magnifies them.
"""

import argparse
import importlib
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import research  # noqa: I001
import jax
import keras

from research.cli.arguments import parse_mesh
from research import distributed
from research.distributed import processes
from research.training import checkpoint

SMALL_CONFIGS = {
    "digits": {},
    "gan": {"units": 64},
    "tickets": {"units": 16},
    "gpt": {"context": 32},
}
OPTIMIZERS = {
    "sgd": lambda *args, **options: keras.optimizers.SGD(0.02, momentum=0.9),
    "adamw": lambda *args, **options: keras.optimizers.AdamW(1e-3),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("output", "experiment", "mesh", "optimizer"):
        parser.add_argument(name)
    parser.add_argument("steps", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--restore", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    return parser.parse_args()


def replace_optimizers(name: str) -> None:
    optimizer = OPTIMIZERS[name]
    for replaced in {"Adam", "AdamW", "RMSprop", "SGD"} - {optimizer().__class__.__name__}:
        setattr(keras.optimizers, replaced, optimizer)


def main() -> None:
    options = parse()
    processes.join(options.coordinator, options.processes, options.process, 60)
    replace_optimizers(options.optimizer)
    module = importlib.import_module(f"experiments.{options.experiment}")
    config = module.Config(**SMALL_CONFIGS[options.experiment], batch_size=options.batch_size)
    splits = module.data(config)
    if options.mesh == "none":
        learner = module.build(config)
        state = learner.init()
    else:
        mesh = distributed.mesh(**parse_mesh(options.mesh))
        learner, state = distributed.build_sharded(lambda: module.build(config), mesh)
        splits = {name: distributed.shard_batches(split, mesh, divides=name == "train") for name, split in splits.items()}
    start = 0
    if options.restore is not None:
        latest = checkpoint.latest(options.restore, print)
        assert latest is not None
        restored = checkpoint.restore(latest, state, learner.names)
        start, state = restored.step, restored.state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    compilations: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: compilations.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("jax").addHandler(handler)
    logging.getLogger("jax").propagate = False
    losses: list[dict[str, float]] = []
    with jax.log_compiles(True):
        state, _ = research.train(
            learner, splits["train"], steps=start + options.steps, start=start, state=state, log_every=1,
            log=lambda entry: losses.append(entry.values),
        )  # fmt: skip
    unchanged = jax.tree.map(lambda before, leaf: before.is_equivalent_to(leaf.sharding, leaf.ndim), shardings, state)
    evaluation = research.evaluate(learner, splits["val"], state)
    if options.save is not None:
        with checkpoint.async_saver(options.save, learner.names) as save:
            save(start + options.steps, state, {})
    if processes.is_first():
        programs = sum("Compiling" in message and "train_steps" in message for message in compilations)
        output = {"losses": losses, "same_shardings": jax.tree.all(unchanged), "programs": programs, "val": evaluation}
        Path(options.output).write_text(json.dumps(output))


if __name__ == "__main__":
    main()
