"""Compares the training step of Keras' guides on JAX, TensorFlow and PyTorch, from the same weights and over the same batches.

    just backends                                         # Adam, 1e-3
    just backends --optimizer sgd --learning-rate 0.1

Each of experiments/backends/with_jax.py (this library), with_tensorflow.py (eagerly and again under tf.function) and
with_torch.py trains the same small classifier on scikit-learn's digits, in a process of its own. The run directory gets
curves.png (the losses and their differences), backends.json, and the arrays of each backend as NAME.npz.

The time of a step is the median over the last epoch, from a batch to its loss as a Python float. Each round runs all backends
once. The batch is a NumPy array for JAX and a tensor for the others.

Expect losses that differ by less than 1e-5, relative, at every step, and equal accuracies. With the default options expect a
final val accuracy >= 0.94.
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.progress import Progress
    from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
# Which program and flags write NAME.npz; the others are compared with the first.
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
# Color, marker and line style of each compared backend.
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
    "OMP_NUM_THREADS": "1",  # on shared cores PyTorch waits for its second thread, much longer than such a step takes
}
CONFIG = ("optimizer", "learning_rate", "epochs", "seed", "rounds")


class ComparisonError(Exception):
    """The comparison cannot continue; the message is one line with the reason and what to do."""


def main(arguments: list[str]) -> int:
    """Runs the command line and returns the exit code."""
    options = parser().parse_args(arguments)
    missing = [package for package in ("tensorflow", "torch") if importlib.util.find_spec(package) is None]
    if missing:
        return fail(f"this environment lacks {' and '.join(missing)}: `just backends` installs what it needs.", 1)
    from rich.console import Console

    from research.reporting import record

    directory = options.run_dir or record.new_directory("backends", Path("runs"))
    config = {name: getattr(options, name) for name in CONFIG}
    console = Console(highlight=False, soft_wrap=True)
    try:
        comparison = load(directory, config)
        if comparison is None:
            directory.mkdir(parents=True, exist_ok=True)
            write_start(directory, options.optimizer, options.learning_rate, options.epochs, options.seed)
            rounds = run_rounds(directory, options.rounds, options.epochs, console)
            comparison = {"config": config, **compare(rounds)}
            figure = plot_curves({name: results[0] for name, results in rounds.items()}, OPTIMIZERS[options.optimizer])
            figure.savefig(directory / "curves.png", dpi=110)
            record.write_text(directory / "backends.json", json.dumps(comparison, indent=2, allow_nan=False) + "\n")
    except ComparisonError as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"--run-dir {directory}: cannot be written ({error.strerror}); choose another directory.", 1)
    console.print(table(comparison))
    print(directory / "curves.png")
    return 0


def fail(message: str, code: int) -> int:
    """Prints one line on standard error and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="just backends", description=__doc__, formatter_class=formatter)
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adam", help="default: adam")
    parser.add_argument("--learning-rate", type=positive_float, default=1e-3, help="default: 1e-3, as in Keras' guides")
    parser.add_argument("--epochs", type=positive, default=10, help="passes over the training data (default: 10)")
    parser.add_argument("--seed", type=non_negative, default=0, help="of weights, split and order (default: 0)")
    parser.add_argument("--rounds", type=positive, default=3, help="measurements of each backend (default: 3)")
    parser.add_argument("--run-dir", type=Path, help="default: a new directory under runs/backends/")
    return parser


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def positive_float(text: str) -> float:
    """Parses a finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)


def non_negative(text: str) -> int:
    """Parses an integer of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return int(text)


def load(directory: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the directory's backends.json, or None if the comparison is new or unfinished.

    Raises `ComparisonError` if the directory contains a comparison with other options, or something else.
    """
    if not directory.exists() or not any(directory.iterdir()) or (directory / "start.npz").exists():
        if not (directory / "backends.json").exists():
            return None
        comparison = json.loads((directory / "backends.json").read_text())
        if comparison.get("config") != config:
            raise ComparisonError(f"--run-dir {directory}: contains a comparison with other options; choose another directory.")
        return comparison
    raise ComparisonError(f"--run-dir {directory}: is not empty and contains no comparison; choose a new directory.")


def write_start(directory: Path, optimizer: str, learning_rate: float, epochs: int, seed: int) -> None:
    """Writes start.npz, which all backends read: the initial weights and the digits in their order."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int64)  # int64: PyTorch takes no other type of labels
    weights = []
    for inputs, units in ((64, 64), (64, 64), (64, 10)):
        limit = np.sqrt(6 / (inputs + units))  # Glorot and Bengio 2010, uniform
        weights += [rng.uniform(-limit, limit, (inputs, units)).astype(np.float32), np.zeros(units, np.float32)]
    arrays = {f"weight_{i}": weight for i, weight in enumerate(weights)}
    split = {"x": x[:1437], "y": y[:1437], "x_val": x[1437:], "y_val": y[1437:]}
    np.savez(directory / "start.npz", optimizer=optimizer, learning_rate=learning_rate, epochs=epochs, **split, **arrays)


def run_rounds(directory: Path, rounds: int, epochs: int, console: Any) -> dict[str, list[dict[str, np.ndarray]]]:
    """Returns each backend's arrays, one dictionary per round. Raises `ComparisonError` if one fails."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    results: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in PROGRAMS}
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for number in range(rounds):
            for name in PROGRAMS:
                arrays = run_backend(directory, name, epochs, progress)
                results[name].append(arrays)
                logs = f"loss {arrays['loss'][-1]:.4f}  val_accuracy {arrays['val_accuracy'][-1]:.4f}"
                console.print(f"round {number + 1}/{rounds}  {TITLES[name]:24} {logs}  {arrays['microseconds']:5.0f} us a step")
    return results


def run_backend(directory: Path, name: str, epochs: int, progress: "Progress") -> dict[str, np.ndarray]:
    """Runs one backend's program and returns the arrays that it wrote. Raises `ComparisonError` if it fails."""
    program, *flags = PROGRAMS[name]
    command = [sys.executable, "-u", str(ROOT / "experiments" / "backends" / program), str(directory), *flags]
    task = progress.add_task(TITLES[name], total=epochs, status="starting")
    lines: list[str] = []
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("epoch "):
                progress.update(task, advance=1, status=line.strip())
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
    progress.remove_task(task)
    if process.returncode != 0:
        (directory / f"{name}.log").write_text("".join(lines))
        reason = lines[-1].strip() if lines else f"exit code {process.returncode}"
        raise ComparisonError(f"{TITLES[name]} failed: {reason}; its complete output is in {directory / f'{name}.log'}")
    arrays = dict(np.load(directory / f"{name}.npz"))
    if not np.isfinite(arrays["loss"]).all():
        raise ComparisonError(f"{TITLES[name]}: the loss is not finite; choose a smaller --learning-rate.")
    return arrays


def compare(rounds: dict[str, list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Returns backends.json without the config: each backend's largest differences to JAX and its times over those of JAX."""
    reference = rounds["jax"]
    backends = {}
    for name, results in rounds.items():
        ratios = [float(a["microseconds"] / b["microseconds"]) for a, b in zip(results, reference, strict=True)]
        keys = [key for key in reference[0] if key.startswith("weight_")]
        weights = [np.abs(arrays[key] - reference[0][key]).max() for arrays in results for key in keys]
        losses = [float(relative_difference(arrays, reference[0]).max()) for arrays in results]
        backends[name] = {
            "loss_relative_difference": max(losses),
            "weights_difference": float(max(weights)),
            "accuracy": results[0]["accuracy"].tolist(),
            "val_accuracy": results[0]["val_accuracy"].tolist(),
            "us_per_step": summarize([float(arrays["microseconds"]) for arrays in results]),
            "time_over_ours": summarize(ratios),
        }
    packages = ("jax", "keras", "tensorflow", "torch", "numpy")
    machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
    return {"machine": machine, "versions": {p: metadata.version(p) for p in packages}, "backends": backends}


def summarize(values: list[float]) -> dict[str, float]:
    """Returns the median, minimum and maximum."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def relative_difference(arrays: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the relative difference of two backends' losses at each step."""
    return np.abs(arrays["loss"] - reference["loss"]) / np.abs(reference["loss"])


def table(comparison: dict[str, Any]) -> "Table":
    """Returns the comparison as a table with a row for each backend."""
    from rich import box
    from rich.table import Table

    config, backends = comparison["config"], comparison["backends"]
    rounds = "one run" if config["rounds"] == 1 else f"median (minimum to maximum) of {config['rounds']} interleaved rounds"
    table = Table(
        title=f"{OPTIMIZERS[config['optimizer']]}, {config['learning_rate']:g}, {config['epochs']} epochs",
        caption=f"Largest differences to research, of a step's loss and of a final weight.\nTimes: {rounds}.",
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("backend", no_wrap=True)
    for heading in ("loss,\nrelative", "weights,\nabsolute", "final val\naccuracy", "time per step\nover research"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in backends.items():
        ratio, is_reference = row["time_over_ours"], name == "jax"
        limits = f" ({format_ratio(ratio['min'])} to {format_ratio(ratio['max'])})" if config["rounds"] > 1 else ""
        table.add_row(
            TITLES[name],
            "" if is_reference else f"{row['loss_relative_difference']:.1e}",
            "" if is_reference else f"{row['weights_difference']:.1e}",
            f"{row['val_accuracy'][-1]:.4f}",
            f"1 ({row['us_per_step']['median']:.0f} us)" if is_reference else f"{format_ratio(ratio['median'])}{limits}",
        )
    return table


def format_ratio(ratio: float) -> str:
    """Returns a ratio with one decimal, without decimals from 10 on."""
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def plot_curves(results: dict[str, dict[str, np.ndarray]], optimizer: str) -> "Figure":
    """Plots all losses in one panel, and below it each backend's largest difference to JAX up to each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, 1))
    reference = results["jax"]
    steps = np.arange(1, len(reference["loss"]) + 1)
    upper.plot(steps, reference["loss"], linewidth=1.2, color="#999999", label=TITLES["jax"])
    every, top = max(1, len(steps) // 40), 1e-5
    for i, (name, (color, marker, style)) in enumerate(STYLES.items()):
        points = slice(i * every // len(STYLES), None, every)  # at other steps for each backend, so that no marker hides another
        markers = {"color": color, "marker": marker, "markersize": 5, "linestyle": "none", "fillstyle": "none"}
        upper.plot(steps[points], results[name]["loss"][points], label=TITLES[name], **markers)
        largest = np.maximum.accumulate(relative_difference(results[name], reference))
        top = max(top, 2 * largest[-1])
        positive = np.where(largest > 0, largest, np.nan)  # a logarithmic axis cannot show 0
        lower.plot(steps, positive, color=color, linestyle=style, linewidth=1.6, label=TITLES[name])
    epsilon = float(np.finfo(np.float32).eps)
    lower.axhline(epsilon, color="#999999", linewidth=0.8)
    text_options = {"transform": lower.get_yaxis_transform(), "ha": "right", "va": "top", "fontsize": 8, "color": "#777777"}
    lower.text(1, epsilon * 0.92, "float32 epsilon", **text_options)
    upper.set(ylabel="loss of the batch")
    upper.set_title(f"the same steps of {optimizer} on three backends", fontsize=11)
    lower.set(xlabel="step", ylabel="loss: largest relative\ndifference to research so far", yscale="log", ylim=(1e-8, top))
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
        print("stopped; the same command starts again from the beginning", file=sys.stderr)
        code = 75
    sys.exit(code)
