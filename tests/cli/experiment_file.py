"""An experiment in somebody's own project, and what may be wrong with it."""

from pathlib import Path

SIBLING = """
import research

def batches(config):
    import numpy as np

    x = np.random.default_rng(config.seed).normal(size=(32, 4)).astype(np.float32)
    return research.from_arrays(x, x[:, :1], batch_size=config.batch_size, seed=config.seed)
"""

EXPERIMENT = '''"""Fits a line."""

from dataclasses import dataclass

import research
import keras
import sibling


@dataclass(frozen=True)
class Config:
    epochs: int = 2
    steps: int | None = None
    batch_size: int = 8
    seed: int = 0
    units: tuple[int, ...] = (1,)


def network(config):
    return keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(units) for units in config.units)])


def build(config):
    keras.utils.set_random_seed(config.seed)
    assert isinstance(config.units, tuple)
    return research.supervised(network(config), loss="mse", optimizer="sgd", example=data(config)["train"].shapes)


def data(config):
    return {"train": sibling.batches(config)}


def models(config, state):
    model = network(config)
    research.write_back(state, model)
    return {"line": model}
'''


def write_experiment(folder: Path, *changes: tuple[str, str], append: str = "") -> Path:
    """Writes mine.py and the module that it imports. Each change replaces a text that must be there by another."""
    folder.mkdir(parents=True, exist_ok=True)
    text = EXPERIMENT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "sibling.py").write_text(SIBLING)
    (folder / "mine.py").write_text(text + append)
    return folder / "mine.py"
