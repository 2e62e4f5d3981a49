"""Trains an experiment for some steps on a mesh, alone or as one of several processes, and writes every step's logs.

joined.py OUTPUT EXPERIMENT MESH OPTIMIZER STEPS [--coordinator ... --processes ... --process ...]; MESH: axes as `just run` takes
them, or "one". The experiment's optimizers are replaced: SGD with momentum shows what differs between devices, Adam magnifies it.
"""

import argparse
import importlib
import json
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import research  # noqa: E402, I001
import jax  # noqa: E402
import keras  # noqa: E402

import run  # noqa: E402
from research import checkpoint, parallel, processes  # noqa: E402

SMALL = {
    "digits": {},
    "gan": {"units": 64},
    "tickets": {"units": 16},
    "gpt": {"context": 32},
}
OPTIMIZERS = {
    "sgd": lambda *args, **options: keras.optimizers.SGD(0.02, momentum=0.9),
    "adamw": lambda *args, **options: keras.optimizers.AdamW(1e-3),
}


def main() -> None:
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
    asked = parser.parse_args()
    processes.join(asked.coordinator, asked.processes, asked.process, 60)
    for name in ("Adam", "AdamW", "RMSprop", "SGD"):
        kind = OPTIMIZERS[asked.optimizer]
        if name != kind().__class__.__name__:
            setattr(keras.optimizers, name, kind)
    module = importlib.import_module(f"experiments.{asked.experiment}")
    config = module.Config(**SMALL[asked.experiment], batch_size=asked.batch_size)
    splits = module.data(config)
    mesh = None if asked.mesh == "one" else asked.mesh
    if mesh is None:
        learner = module.build(config)
        state = learner.init()
    else:
        grid = parallel.mesh(**run.axes(mesh))
        learner, state = parallel.born(lambda: module.build(config), grid)
        splits = {name: parallel.spread(held, grid, divides=name == "train") for name, held in splits.items()}
    start = 0
    if asked.restore is not None:
        newest = checkpoint.newest(asked.restore, print)
        assert newest is not None
        found = checkpoint.restore(newest, state, learner.names)
        start, state = found.step, found.state
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    compiled: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("jax").addHandler(handler)
    logging.getLogger("jax").propagate = False
    losses: list[dict[str, float]] = []
    with jax.log_compiles(True):
        state, _ = research.train(
            learner, splits["train"], steps=start + asked.steps, start=start, state=state, log_every=1,
            log=lambda entry: losses.append(entry.values),
        )  # fmt: skip
    kept = jax.tree.map(lambda a, leaf: a.is_equivalent_to(leaf.sharding, leaf.ndim), before, state)
    evaluated = research.evaluate(learner, splits["val"], state)
    if asked.save is not None:
        with checkpoint.saving(asked.save, learner.names) as save:
            save(start + asked.steps, state, {})
    if processes.is_first():
        programs = len([each for each in compiled if "Compiling" in each and "train_steps" in each])
        told = {"losses": losses, "kept": jax.tree.all(kept), "programs": programs, "val": evaluated}
        Path(asked.output).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
