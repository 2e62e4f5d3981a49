"""Searches over plans: the fastest mesh that fits, and the largest batch that fits.

Every plan is compiled by a process of its own, one after the other, so that their memory does not add up.
"""

import dataclasses
import json
import math
import subprocess
import tempfile
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from research import distributed
from research.core.state import InvalidArgument
from research.planning import chips, compiler
from research.planning.flops import model_flops
from research.planning.subject import Subject

MAX_EXAMPLES = 1 << 20  # per part of the mesh, in a search for the largest batch
TENSOR_SIZES = (1, 2, 4, 8, 16)  # with more, the collectives of every layer dominate
BATCH_FACTORS = (1, 2, 4)

Result = dict[str, Any]  # what search.json holds for each trial
OnResult = Callable[[Result, list[Result]], None]  # called after each trial, with its result and all results so far


class Trial(NamedTuple):
    """A configuration to compile. `remat` is None where the config has no such field.

    >>> Trial({"data": 2, "fsdp": 4}, 256, None).settings
    {'mesh': 'data=2,fsdp=4', 'batch': 256}
    """

    axes: dict[str, int]
    batch: int
    remat: bool | None

    @property
    def settings(self) -> Result:
        """The trial as JSON."""
        mesh = ",".join(f"{axis}={size}" for axis, size in self.axes.items())
        return {"mesh": mesh, "batch": self.batch, **({} if self.remat is None else {"remat": self.remat})}


class MaxBatch(NamedTuple):
    """The result of `max_batch`: the largest batch that fits and the smallest that does not, None where there is none.

    >>> MaxBatch({"data": 8}, 296, 304).fits
    296
    """

    mesh: dict[str, int]
    fits: int | None
    too_large: int | None


class Deadline(NamedTuple):
    """A moment of the monotonic clock, in seconds.

    >>> Deadline.in_minutes(0.0).seconds_left <= 0.0
    True
    """

    at: float

    @classmethod
    def in_minutes(cls, minutes: float) -> "Deadline":
        """Returns the moment so many minutes from now."""
        return cls(time.monotonic() + 60 * minutes)

    @property
    def seconds_left(self) -> float:
        """The seconds until then, negative afterwards."""
        return self.at - time.monotonic()


def search(
    subject: Subject,
    topology: str,
    command: Sequence[str],
    minutes: float,
    on_result: OnResult = lambda latest, results: None,
) -> list[Result]:
    """Compiles the trials that may be fastest first, and skips those that can't fit or can't be faster than the best so far.

    `command` is a command line that plans `subject` on `topology`; `--mesh`, `--batch-size`, `--remat` and `--run-dir` are
    appended to it. Returns a result for every candidate, ranked; those that were not compiled give the reason as `skipped`.
    Raises `InvalidArgument` where libtpu is missing.

    >>> from research.planning.subject import BuilderConfig
    >>> subject = Subject("mlp", BuilderConfig("models:mlp"), print)
    >>> search(subject, "v5e:2x5", ["research", "plan", "--builder", "models:mlp", "--topology", "v5e:2x5"], 30.0)
    Traceback (most recent call last):
    research.core.state.InvalidArgument: topology 'v5e:2x5': unknown, did you mean 'v5e:2x4'? There are ...
    """
    deadline = Deadline.in_minutes(minutes)
    trials, results = candidates(subject, topology)
    for bound, trial in trials:
        reason = skip_reason(trial, bound, results)
        if reason is None and deadline.seconds_left <= 0:
            reason = "no time left"
        result = run_trial(subject, command, trial, deadline.seconds_left) if reason is None else {"skipped": reason}
        results.append({**trial.settings, **result})
        on_result(results[-1], rank(results))
    return rank(results)


def max_batch(
    subject: Subject,
    topology: str,
    axes: Mapping[str, int],
    command: Sequence[str],
    minutes: float,
    on_result: OnResult = lambda latest, results: None,
) -> MaxBatch:
    """Finds the largest batch that fits: doubles it until it does not fit, then bisects.

    All batches are multiples of the number of parts that the mesh splits them into. The arguments are those of `search`, `axes`
    those of `distributed.mesh`. Raises `InvalidArgument` where a batch can't be compiled.

    >>> from research.planning.subject import BuilderConfig
    >>> subject = Subject("mlp", BuilderConfig("models:mlp"), print)
    >>> max_batch(subject, "v5e:2x5", {"fsdp": 8}, ["research", "plan", "--builder", "models:mlp"], 30.0)
    Traceback (most recent call last):
    research.core.state.InvalidArgument: topology 'v5e:2x5': unknown, did you mean 'v5e:2x4'? There are ...
    """
    deadline = Deadline.in_minutes(minutes)
    mesh = compiler.topology_mesh(compiler.topology_devices(topology), topology, axes)
    parts = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    results: list[Result] = []

    def fits(size: int) -> bool:
        left, trial = deadline.seconds_left, Trial(dict(mesh.shape), size * parts, None)
        result = run_trial(subject, command, trial, left) if left > 0 else {"skipped": "no time left"}
        results.append({"batch": trial.batch, **result})
        on_result(results[-1], results)
        if "skipped" in result:
            largest = max((earlier["batch"] for earlier in results if earlier.get("fits")), default=None)
            fitting = "" if largest is None else f"; {largest:,} fit"
            raise InvalidArgument(
                f"--max-batch: {trial.batch:,} examples: {result['skipped']}{fitting}; give more --minutes, or correct that."
            )
        return bool(result["fits"])

    low, high = 0, 1
    while high <= MAX_EXAMPLES and fits(high):
        low, high = high, 2 * high
    while high <= MAX_EXAMPLES and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return MaxBatch(dict(mesh.shape), low * parts or None, high * parts if high <= MAX_EXAMPLES else None)


def candidates(subject: Subject, topology: str) -> tuple[list[tuple[float, Trial]], list[Result]]:
    """Returns the trials to compile, each with an upper bound of its examples per second, and results for impossible ones.

    The trials with the highest bound come first; of equal ones, those with more fsdp, which need less memory, and less tensor.

    >>> from research.planning.subject import BuilderConfig
    >>> subject = Subject("mlp", BuilderConfig("models:mlp"), print)
    >>> candidates(subject, "v5e:2x5")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: topology 'v5e:2x5': unknown, did you mean 'v5e:2x4'? There are ...
    """
    chip, num_chips = chips.parse_topology(topology)
    devices = compiler.topology_devices(topology)
    built = subject.build()
    batch = jax.tree.leaves(built.batch)[0].shape[0]
    flops_per_example = model_flops(built.learner.train, built.shapes, built.batch) / batch
    remats = (None,) if remat_type(subject.config) is None else (False, True)
    trials: list[tuple[float, Trial]] = []
    impossible: list[Result] = []
    for axes in mesh_shapes(num_chips):
        settings = Trial(axes, batch, None).settings
        try:
            mesh = compiler.topology_mesh(devices, topology, axes)
            shardings = distributed.state_shardings(built.learner.names, built.shapes, mesh, distributed.default_layout(mesh))
        except InvalidArgument as error:
            message = " ".join(str(error).split()).partition(";")[0]
            impossible.append({**settings, "skipped": message.removeprefix(f"mesh: {settings['mesh']} ")})
            continue
        state_bytes = _bytes_per_chip(built.shapes, shardings)
        for trial in (Trial(axes, factor * batch, remat) for factor in BATCH_FACTORS for remat in remats):
            reason = _impossible(trial, chip, state_bytes, shardings)
            if reason is None:
                trials.append((max_speed(chip, num_chips, flops_per_example, state_bytes, trial.batch), trial))
            else:
                impossible.append({**trial.settings, "skipped": reason})
    trials.sort(key=lambda item: (-item[0], item[1].axes.get("tensor", 1), -item[1].axes.get("fsdp", 1), item[1].remat is True))
    return trials, impossible


def skip_reason(trial: Trial, bound: float, results: list[Result]) -> str | None:
    """Returns why a trial of at most `bound` examples per second need not be compiled, given the results so far; None if it must.

    >>> results = [{"mesh": "data=2", "batch": 8, "remat": False, "fits": True, "examples_per_second": 100.0}]
    >>> skip_reason(Trial({"data": 2}, 8, True), 200.0, results), skip_reason(Trial({"data": 2}, 16, False), 90.0, results)
    ('fits without remat', 'at most 90 examples/s')
    """
    if bound <= best_speed(results):
        return f"at most {bound:,.0f} examples/s"
    same_mesh = [result for result in results if result["mesh"] == trial.settings["mesh"]]
    failures = [result for result in same_mesh if result.get("refused")]
    if any(result["batch"] <= trial.batch and (result.get("remat") or not trial.remat) for result in failures):
        return "less did not fit"
    fitting = [result for result in same_mesh if result.get("fits")]
    if trial.remat and any(result["batch"] == trial.batch and not result["remat"] for result in fitting):
        return "fits without remat"
    return None


def best_speed(results: list[Result]) -> float:
    """Returns the most examples per second among the results that fit.

    >>> best_speed([{"fits": False}])
    0.0
    """
    return max((result["examples_per_second"] for result in results if result.get("fits")), default=0.0)


def rank(results: list[Result]) -> list[Result]:
    """Returns the results that fit, the fastest first, then those that do not fit, then those that were skipped.

    >>> rank([{"skipped": "no time left"}, {"fits": False}, {"fits": True, "examples_per_second": 9.0}])
    [{'fits': True, 'examples_per_second': 9.0}, {'fits': False}, {'skipped': 'no time left'}]
    """
    return sorted(
        results, key=lambda result: ("skipped" in result, not result.get("fits"), -result.get("examples_per_second", 0.0))
    )


def max_speed(chip: chips.Chip, num_chips: int, flops_per_example: float, state_bytes: int, batch: int) -> float:
    """Returns an upper bound of the examples per second: all chips at their peak, each reading its part of the state once a step.

    Where compute is the bound, the result is the same float for every batch, so that sorting by it is stable.

    >>> from research.planning.chips import parse_topology
    >>> v5e, num_chips = parse_topology("v5e:2x4")
    >>> max_speed(v5e, num_chips, 1e12, 10**6, 64), max_speed(v5e, num_chips, 0.0, 819 * 10**6, 64)
    (1576.0, 64000.0)
    """
    by_memory = batch * chip.bandwidth / state_bytes
    return min(num_chips * chip.flops / flops_per_example, by_memory) if flops_per_example else by_memory


def mesh_shapes(num_chips: int) -> list[dict[str, int]]:
    """Returns every way to factor a number of chips into data, fsdp and tensor.

    >>> mesh_shapes(2)
    [{'fsdp': 2}, {'data': 2}, {'tensor': 2}]
    """
    shapes = []
    for tensor in TENSOR_SIZES:
        rest = num_chips // tensor if num_chips % tensor == 0 else 0
        for data in (size for size in range(1, rest + 1) if rest % size == 0):
            axes = {"data": data, "fsdp": rest // data, "tensor": tensor}
            shapes.append({axis: size for axis, size in axes.items() if size > 1} or {"data": 1})
    return shapes


def run_trial(subject: Subject, command: Sequence[str], trial: Trial, seconds_left: float) -> Result:
    """Compiles a trial in another process. Returns its memory and speed, or why there is no plan, as `skipped`.

    >>> import sys
    >>> from research.planning.subject import BuilderConfig
    >>> failing = [sys.executable, "-c", "import sys; sys.exit('error: no such chips')"]
    >>> run_trial(Subject("mlp", BuilderConfig(), print), failing, Trial({"data": 8}, 64, None), 60.0)
    {'skipped': 'no such chips'}
    """
    with tempfile.TemporaryDirectory() as directory:
        line = [*command, *_trial_arguments(subject, trial), "--run-dir", directory]
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=max(seconds_left, 1.0))
        except subprocess.TimeoutExpired:
            return {"skipped": f"not compiled in the {seconds_left:.0f} s that were left"}
        if done.returncode:
            return {"skipped": (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("error: ")}
        plan = json.loads((Path(directory) / "plan.json").read_text())
    memory, roofline = plan["hbm_gib"], plan["roofline"]
    result = {"fits": plan["fits"], "gib": memory["total"], "limit": memory["limit"], "compile_seconds": plan["compile_seconds"]}
    if not plan["fits"]:
        # When it is short of memory, the compiler recomputes more. So a larger batch may fit, unless the compiler gave up.
        return {**result, "refused": roofline is None}
    speed = {"examples_per_second": plan["batch"] / roofline["step"], "step": roofline["step"]}
    return {**result, **speed, "utilisation": roofline["utilisation"], "bound_by": plan["bound_by"]}


def remat_type(config: Any) -> Any:
    """Returns the type of the field `remat` of a config, a dataclass; None where there is no such field.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     remat: bool = False
    >>> remat_type(Config())
    <class 'bool'>
    """
    if all(field.name != "remat" for field in dataclasses.fields(config)):
        return None
    return typing.get_type_hints(type(config))["remat"]


def _trial_arguments(subject: Subject, trial: Trial) -> list[str]:
    arguments = ["--mesh", trial.settings["mesh"], "--batch-size", str(trial.batch)]
    if trial.remat is None:
        return arguments
    if remat_type(subject.config) is bool:
        return [*arguments, "--remat" if trial.remat else "--no-remat"]
    return [*arguments, "--remat", str(trial.remat)]  # `bool | None` takes a value


def _impossible(trial: Trial, chip: chips.Chip, state_bytes: int, shardings: Any) -> str | None:
    parts = trial.axes.get("data", 1) * trial.axes.get("fsdp", 1)
    if trial.batch % parts:
        return f"{trial.batch} examples do not divide into {parts} parts"
    specs = [tuple(leaf.spec) for leaf in jax.tree.leaves(shardings)]
    if trial.axes.get("tensor", 1) > 1 and not any("tensor" in jax.tree.leaves(spec) for spec in specs):
        return "no layer can be split over tensor"
    if state_bytes > chip.memory:
        return f"the state alone takes {state_bytes / chips.GIB:.2f} GiB a chip"
    return None


def _bytes_per_chip(shapes: Any, shardings: Any) -> int:
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, where in leaves)
