"""The training step of Keras' documents on JAX, TensorFlow and PyTorch, from the same weights over the same batches.

    just backends                                         # Adam, 1e-3
    just backends --optimizer sgd --learning-rate 0.1

Each of experiments/backends/with_jax.py (this library), with_tensorflow.py (once as it is, once under tf.function) and
with_torch.py trains the same small classifier on scikit-learn's digits, in a process of its own. The run directory gets
curves.png (the losses on each other and how far they are apart), backends.json, and the arrays of each backend as NAME.npz.

Times are of one sitting on this machine: the median step of the last epoch, from a batch to its loss as a number, in rounds that
go through all the backends. The batch is a NumPy array for JAX and a tensor for the others.

Expect losses within 1e-5, relative, of each other at every step and the same accuracies; by default a final val accuracy >= 0.94.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import run as runner

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.progress import Progress
    from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
# What FOLDER/NAME.npz is left by; the first is what the others are compared with.
PROGRAMS = {
    "jax": ["with_jax.py"],
    "tensorflow": ["with_tensorflow.py"],
    "tensorflow-function": ["with_tensorflow.py", "--function"],
    "torch": ["with_torch.py"],
}
TITLES = {
    "jax": "research, JAX",
    "tensorflow": "TensorFlow",
    "tensorflow-function": "TensorFlow, tf.function",
    "torch": "PyTorch",
}
# Colour, marker and line of those that are compared with ours.
STYLES = {
    "tensorflow": ("#ee6677", "o", "-"),
    "tensorflow-function": ("#228833", "s", (0, (4, 3))),
    "torch": ("#4477aa", "^", "-"),
}
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam"}
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",  # PyTorch waits for its second thread: on shared cores many times longer than such a step takes
}
CONFIG = ("optimizer", "learning_rate", "epochs", "seed", "rounds")


class Failed(Exception):
    """Nothing goes on: one line says why and what to do."""


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="just backends", description=__doc__, formatter_class=formatter)
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adam", help="default: adam")
    parser.add_argument("--learning-rate", type=rate, default=1e-3, help="default: 1e-3, as in the documents")
    parser.add_argument("--epochs", type=positive, default=10, help="passes over the training data (default: 10)")
    parser.add_argument("--seed", type=whole, default=0, help="of weights, split and order (default: 0)")
    parser.add_argument("--rounds", type=positive, default=3, help="times that each backend is run, for the clock (default: 3)")
    parser.add_argument("--run-dir", type=Path, help="default: a new directory under runs/backends/")
    options = parser.parse_args(arguments)
    missing = [package for package in ("tensorflow", "torch") if importlib.util.find_spec(package) is None]
    if missing:
        return runner.refuse(
            f"no {' and no '.join(missing)} in this environment: `just backends` installs them into one of its own.", 1
        )
    from rich.console import Console

    from research import record

    directory = options.run_dir or record.new_directory("backends", Path("runs"))
    config = {name: getattr(options, name) for name in CONFIG}
    console = Console(highlight=False, soft_wrap=True)
    try:
        found = finished(directory, config)
        if found is None:
            directory.mkdir(parents=True, exist_ok=True)
            start(directory, options.optimizer, options.learning_rate, options.epochs, options.seed)
            rounds = run(directory, options.rounds, options.epochs, console)
            found = {"config": config, **compared(rounds)}
            figure = curves({name: results[0] for name, results in rounds.items()}, OPTIMIZERS[options.optimizer])
            figure.savefig(directory / "curves.png", dpi=110)
            record.write(directory / "backends.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    except Failed as failure:
        return runner.refuse(str(failure), 1)
    except OSError as error:
        return runner.refuse(f"--run-dir {directory}: it can't be written ({error.strerror}); choose a directory of yours.", 1)
    console.print(table(found))
    print(directory / "curves.png")
    return 0


def positive(text: str) -> int:
    """An option's number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def rate(text: str) -> float:
    """An option's number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def whole(text: str) -> int:
    """An option's number from 0 on."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return int(text)


def finished(directory: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What a directory holds of this comparison; None where it has to be made. Raises `Failed` where something else is there."""
    if not directory.exists() or not any(directory.iterdir()) or (directory / "start.npz").exists():
        if not (directory / "backends.json").exists():
            return None
        found = json.loads((directory / "backends.json").read_text())
        if found.get("config") != config:
            raise Failed(f"--run-dir {directory}: it holds a comparison with other options; choose another directory.")
        return found
    raise Failed(f"--run-dir {directory}: it is not empty and holds no comparison; choose a new directory.")


def start(directory: Path, optimizer: str, learning_rate: float, epochs: int, seed: int) -> None:
    """Writes what all the backends start from: the weights, and the digits in their order, as start.npz."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int64)  # int64: the one type of class numbers for PyTorch
    weights = []
    for inputs, units in ((64, 64), (64, 64), (64, 10)):
        limit = np.sqrt(6 / (inputs + units))  # Glorot and Bengio 2010, uniform
        weights += [rng.uniform(-limit, limit, (inputs, units)).astype(np.float32), np.zeros(units, np.float32)]
    held = {f"weight_{i}": weight for i, weight in enumerate(weights)}
    split = {"x": x[:1437], "y": y[:1437], "x_val": x[1437:], "y_val": y[1437:]}
    np.savez(directory / "start.npz", optimizer=optimizer, learning_rate=learning_rate, epochs=epochs, **split, **held)


def run(directory: Path, rounds: int, epochs: int, console: Any) -> dict[str, list[dict[str, np.ndarray]]]:
    """What every backend leaves, round after round. Raises `Failed` where one fails."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    results: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in PROGRAMS}
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}")]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for number in range(rounds):
            for name in PROGRAMS:
                found = program(directory, name, epochs, progress)
                results[name].append(found)
                told = f"loss {found['loss'][-1]:.4f}  val_accuracy {found['val_accuracy'][-1]:.4f}"
                console.print(f"round {number + 1}/{rounds}  {TITLES[name]:24} {told}  {found['microseconds']:5.0f} us a step")
    return results


def program(directory: Path, name: str, epochs: int, progress: "Progress") -> dict[str, np.ndarray]:
    """Runs one backend's page to its end."""
    page, *flags = PROGRAMS[name]
    command = [sys.executable, "-u", str(ROOT / "experiments" / "backends" / page), str(directory), *flags]
    task = progress.add_task(TITLES[name], total=epochs, said="starting")
    said = []
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        for line in process.stdout or ():
            said.append(line)
            if line.startswith("epoch "):
                progress.update(task, advance=1, said=line.strip())
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
    progress.remove_task(task)
    if process.returncode != 0:
        (directory / f"{name}.log").write_text("".join(said))
        reason = said[-1].strip() if said else f"exit code {process.returncode}"
        raise Failed(f"{TITLES[name]} failed: {reason}; all that it said is in {directory / f'{name}.log'}")
    found = dict(np.load(directory / f"{name}.npz"))
    if not np.isfinite(found["loss"]).all():
        raise Failed(f"{TITLES[name]}: the loss is not finite; choose a smaller --learning-rate.")
    return found


def compared(rounds: dict[str, list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """How far each backend is from ours, at most over the rounds, and how its step's time compares, round by round."""
    ours = rounds["jax"]
    backends = {}
    for name, results in rounds.items():
        ratios = [float(theirs["microseconds"] / our["microseconds"]) for theirs, our in zip(results, ours, strict=True)]
        weights = [np.abs(found[key] - ours[0][key]).max() for found in results for key in found if key.startswith("weight_")]
        backends[name] = {
            "loss_relative_difference": max(float(apart(found, ours[0]).max()) for found in results),
            "weights_difference": float(max(weights)),
            "accuracy": results[0]["accuracy"].tolist(),
            "val_accuracy": results[0]["val_accuracy"].tolist(),
            "us_per_step": spread([float(found["microseconds"]) for found in results]),
            "time_over_ours": spread(ratios),
        }
    packages = ("jax", "keras", "tensorflow", "torch", "numpy")
    machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
    return {"machine": machine, "versions": {p: metadata.version(p) for p in packages}, "backends": backends}


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> np.ndarray:
    """The relative difference of two losses at each step."""
    return np.abs(one["loss"] - other["loss"]) / np.abs(other["loss"])


def table(found: dict[str, Any]) -> "Table":
    """What was found, a row for each backend."""
    from rich import box
    from rich.table import Table

    config, backends = found["config"], found["backends"]
    rounds = "one run" if config["rounds"] == 1 else f"median (least to most) of {config['rounds']} interleaved rounds"
    shown = Table(
        title=f"{OPTIMIZERS[config['optimizer']]}, {config['learning_rate']:g}, {config['epochs']} epochs",
        caption=f"Largest differences to ours, of a step's loss and a final weight.\nTimes: {rounds}, in one sitting.",
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    shown.add_column("backend", no_wrap=True)
    for heading in ("loss,\nrelative", "weights,\nabsolute", "final val\naccuracy", "time per step\nover ours"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, row in backends.items():
        ratio, ours = row["time_over_ours"], name == "jax"
        between = f" ({times(ratio['min'])} to {times(ratio['max'])})" if config["rounds"] > 1 else ""
        shown.add_row(
            TITLES[name],
            "" if ours else f"{row['loss_relative_difference']:.1e}",
            "" if ours else f"{row['weights_difference']:.1e}",
            f"{row['val_accuracy'][-1]:.4f}",
            f"1 ({row['us_per_step']['median']:.0f} us)" if ours else f"{times(ratio['median'])}{between}",
        )
    return shown


def times(ratio: float) -> str:
    """A ratio to two or three digits."""
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def curves(results: dict[str, dict[str, np.ndarray]], optimizer: str) -> "Figure":
    """The losses on each other, and below how far the others have been from ours until each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, 1))
    ours = results["jax"]
    steps = np.arange(1, len(ours["loss"]) + 1)
    upper.plot(steps, ours["loss"], linewidth=1.2, color="#999999", label=TITLES["jax"])
    every, top = max(1, len(steps) // 40), 1e-5
    for i, (name, (colour, marker, style)) in enumerate(STYLES.items()):
        at = slice(i * every // len(STYLES), None, every)  # the others' points take turns, so that none hides another
        points = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "none", "fillstyle": "none"}
        upper.plot(steps[at], results[name]["loss"][at], label=TITLES[name], **points)
        largest = np.maximum.accumulate(apart(results[name], ours))
        top = max(top, 2 * largest[-1])
        shown = np.where(largest > 0, largest, np.nan)  # a logarithm has no place for what is equal
        lower.plot(steps, shown, color=colour, linestyle=style, linewidth=1.6, label=TITLES[name])
    epsilon = float(np.finfo(np.float32).eps)
    lower.axhline(epsilon, color="#999999", linewidth=0.8)
    where = {"transform": lower.get_yaxis_transform(), "ha": "right", "va": "top", "fontsize": 8, "color": "#777777"}
    lower.text(1, epsilon * 0.92, "float32 epsilon", **where)
    upper.set(ylabel="loss of the batch")
    upper.set_title(f"the same steps of {optimizer} on three backends", fontsize=11)
    lower.set(xlabel="step", ylabel="loss: largest relative difference\nto ours, so far", yscale="log", ylim=(1e-8, top))
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("stopped; the same command begins anew", file=sys.stderr)
        code = 75
    sys.exit(code)
