"""What is made of a trained state: results, Keras files, pictures, TensorBoard's summaries."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import keras

from research.reporting import record


def build_models(module: Any, config: Any, state: Any) -> dict[str, keras.Model]:
    """Returns an experiment's Keras models with the weights of a state; none if it does not define `models`.

    They are built in host memory: an accelerator may not have room for them.
    """
    host = None
    if jax.default_backend() != "cpu":
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave out the host
            host = jax.local_devices(backend="cpu")[0]
    with jax.default_device(host):
        return dict(module.models(config, state)) if hasattr(module, "models") else {}


def save_models(directory: Path, models: dict[str, keras.Model]) -> list[Path]:
    """Writes each model as `NAME.keras` and `NAME.weights.h5`, and returns the paths."""
    paths: list[Path] = []
    for name, model in models.items():
        paths += [directory / f"{name}.keras", directory / f"{name}.weights.h5"]
        model.save(paths[-2])
        model.save_weights(paths[-1])
    return paths


def write_outputs(run: record.Run, module: Any, parts: tuple[Any, Any, Any, Any], step: int) -> dict[str, float]:
    """Writes the models and pictures of the state trained for `step` steps, and returns the experiment's results.

    `parts` are config, learner, state and splits, as the experiment's functions take them.
    """
    from research.reporting import picture, tensorboard  # matplotlib is slow to import

    results = {name: float(value) for name, value in module.results(*parts).items()} if hasattr(module, "results") else {}
    config, _, state, _ = parts
    models = build_models(module, config, state)
    save_models(run.directory, models)
    figures = {name: picture.plot_model(model) for name, model in models.items()}
    figures |= module.pictures(*parts) if hasattr(module, "pictures") else {}
    figures["curves"] = picture.plot_curves(record.read_entries(run))
    files = record.save_figures(run, figures)
    with tensorboard.open_writer(run.directory / "tensorboard" / "train") as writer:
        tensorboard.write_graph(writer, models)
        tensorboard.write_images(writer, step, {f"pictures/{name}": path for name, path in files.items()})
        if hasattr(module, "summaries"):
            module.summaries(*parts, writer, step)
    return results
