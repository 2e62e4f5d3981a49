"""Compiles an experiment's training step for TPUs that are not attached: `just plan NAME --topology v5e:16x16 --mesh fsdp=256`.

just plan NAME --topology v5e:16x16 --mesh fsdp=256 [options of NAME]     memory, collectives, step time at best; plan.json
just plan NAME --topology v5e:16x16 --search --minutes 30                 the fastest mesh that fits, of all meshes
just plan NAME --topology v5e:16x16 --mesh fsdp=256 --max-batch           the largest batch that fits
just plan path/to/mine.py --topology v5e:16x16 --mesh fsdp=256            an experiment in any file
just plan --builder module:function --topology v5e:16x16 --mesh fsdp=256  any function that returns a Keras model
just plan --budget                                                        updates tests/budgets.json

The batch size is that of all chips together. Nothing runs: times are lower bounds.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from research import distributed
from research.cli.arguments import UsageError, fail, parse, parse_mesh
from research.cli.contract import check_config, check_learner, check_module, check_splits
from research.cli.errors import errors_as_one_line
from research.cli.experiment import CHECKOUT, UnknownExperiment, list_experiments, load_experiment
from research.cli.fields import Interval
from research.core.state import InvalidArgument
from research.planning import chips, compiler, search
from research.planning import plan as planning
from research.planning.subject import BuilderConfig, Built, Subject, build_experiment, build_keras_model
from research.planning.table import plan_table, ranking_table
from research.reporting import record

BUDGETS = Path("tests") / "budgets.json"
BUDGET_TOPOLOGY, BUDGET_CHIPS, BUDGET_MESHES = "v5e:2x4", 8, ("data=2,fsdp=4",)  # small, with every kind of collective


@dataclasses.dataclass(frozen=True)
class Options:
    """The chips, and what to compute."""

    topology: str = ""
    """The chip and how many are wired together: v5e:16x16."""
    mesh: str = "fsdp=-1"
    """Device mesh: data=8, or data=2,fsdp=-1. data splits batches, fsdp weights too, tensor layers; -1 takes the remaining."""
    layout: Literal["data", "fsdp", "tensor"] | None = None
    """How weights are sharded on the mesh; by default according to its axes."""
    run_dir: Path | None = None
    """Directory of plan.json; by default a new one in runs/plan-NAME/."""
    search: bool = False
    """Try every mesh, 1, 2 and 4 times the batch, and remat on and off where the experiment has it."""
    max_batch: bool = False
    """Search for the largest batch that fits."""
    minutes: Annotated[float, Interval("[0, 1000000]")] = 30.0
    """Time limit of a search."""


def main(arguments: list[str]) -> int:
    """Runs the command line, and returns the exit code.

    >>> main(["--help"])  # doctest: +ELLIPSIS
    Compiles an experiment's training step ...
    0
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nTopologies: {', '.join(chips.CHIPS)}, as in v5e:16x16; NAME is one of:\n")
        print("\n".join(f"  {name:14}  {line}" for name, line in list_experiments().items()))
        return 0
    compiler.configure_libtpu(option_value(arguments, "--topology") or BUDGET_TOPOLOGY)
    sys.path.append(str(Path.cwd()))  # where --builder looks for modules
    try:
        if "--budget" in arguments:
            write_budgets(option_value(arguments, "--run-dir"))
        else:
            run(arguments)
    except (UsageError, UnknownExperiment) as error:
        return fail(str(error), 2)
    except InvalidArgument as error:
        return fail(str(error), 1)
    return 0


def run(arguments: list[str]) -> None:
    """Computes what the command line asks for. Raises `UsageError` or `InvalidArgument` with one line."""
    subject, options = parse_command(arguments)
    if (options.search or options.max_batch) and all(field.name != "batch_size" for field in dataclasses.fields(subject.config)):
        raise InvalidArgument(
            f"{subject.name}: Config has no field 'batch_size', which a search sets; add `batch_size: int = 32`."
        )
    directory = options.run_dir or record.new_directory(f"plan-{subject.name}", Path("runs"))
    make_writable(directory)
    with errors_as_one_line(directory):
        if options.search:
            run_search(subject, options, arguments, directory)
        elif options.max_batch:
            run_max_batch(subject, options, arguments, directory)
        else:
            with report_phases() as on_phase:
                plan = compute_plan(subject, options, on_phase)
            record.write_json(directory / "plan.json", plan)
            print_table(plan_table(plan), directory / "plan.json")


def parse_command(arguments: list[str]) -> tuple[Subject, Options]:
    """Returns what to plan, and the options. Raises `UsageError` for a command that can't be understood.

    >>> subject, options = parse_command(["--builder", "models:gpt", "--topology", "v5e:2x4"])
    >>> subject.name, options.topology
    ('models.gpt', 'v5e:2x4')
    """
    if option_value(arguments, "--builder") is not None:
        config, options = parse(BuilderConfig, Options, arguments, "just plan --builder", __doc__)
        subject = Subject(config.builder.replace(":", "."), config, lambda: build_keras_model(config))
    else:
        subject, options = _parse_experiment(*arguments)
    if not options.topology:
        raise UsageError("--topology is missing; expected the chip and how many are wired together, as in --topology v5e:16x16.")
    try:
        chips.parse_topology(options.topology)
    except InvalidArgument as error:
        raise UsageError(str(error)) from error
    return subject, options


def _parse_experiment(name: str, *arguments: str) -> tuple[Subject, Options]:
    experiment = load_experiment(name)
    check_module(experiment)
    module = experiment.module
    config, options = parse(module.Config, Options, [*arguments], f"just plan {name}", module.__doc__)
    check_config(experiment, config)

    def build() -> Built:
        return build_experiment(
            lambda: check_learner(experiment, module.build(config)),
            lambda: check_splits(experiment, module.data(config)),
        )

    return Subject(experiment.name, config, build), options


def compute_plan(subject: Subject, options: Options, on_phase: Callable[[str], None] = lambda phase: None) -> dict[str, Any]:
    """Returns the plan as plan.json holds it."""
    on_phase(f"building {subject.name} from shapes")
    built = subject.build()
    layout = None if options.layout is None else getattr(distributed, options.layout)
    axes = parse_mesh(options.mesh)
    plan = planning.plan(built.learner, built.shapes, built.batch, options.topology, axes, layout, on_phase)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "keras", "libtpu")}
    origin = {"experiment": subject.name, "config": dataclasses.asdict(subject.config), "remark": built.remark}
    return {**origin, **plan._asdict(), "versions": versions}


def run_search(subject: Subject, options: Options, arguments: list[str], directory: Path) -> None:
    """Searches for the fastest mesh, writes search.json after each trial, and prints the ranking."""
    console, path = Console(highlight=False), directory / "search.json"
    about = {"topology": options.topology, "experiment": subject.name}
    command = trial_command(
        arguments, () if search.remat_type(subject.config) is bool else ("--remat",), ("--remat", "--no-remat")
    )
    with (
        Live(ranking_table([]), console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live
    ):

        def on_result(latest: dict[str, Any], results: list[dict[str, Any]]) -> None:
            record.write_json(path, {**about, "tried": results})
            if live is not None:
                live.update(ranking_table(results), refresh=True)
            elif "skipped" not in latest:
                print(json.dumps(latest), flush=True)

        results = search.search(subject, options.topology, command, options.minutes, on_result)
    if live is None:
        console.print(ranking_table(results))
    if not search.best_speed(results):
        raise InvalidArgument(f"--search: none of the trials fits; the reasons are in {path}: use larger chips, or more of them.")
    console.print(str(path), soft_wrap=True)


def run_max_batch(subject: Subject, options: Options, arguments: list[str], directory: Path) -> None:
    """Searches for the largest batch, writes search.json after each trial, and prints a line for each."""
    path, about = directory / "search.json", {"topology": options.topology, "experiment": subject.name}
    tried: list[dict[str, Any]] = []

    def on_result(latest: dict[str, Any], results: list[dict[str, Any]]) -> None:
        tried[:] = results
        record.write_json(path, {**about, "tried": results})
        outcome = latest.get("skipped") or f"{latest['gib']:.2f} of {latest['limit']:.2f} GiB"
        print(f"{latest['batch']:12,} examples  {outcome}", flush=True)

    axes = parse_mesh(options.mesh)
    largest = search.max_batch(subject, options.topology, axes, trial_command(arguments), options.minutes, on_result)
    record.write_json(path, {**about, "mesh": largest.mesh, "max_batch": largest.fits, "tried": tried})
    if largest.fits is None:
        raise InvalidArgument(
            f"--max-batch: {largest.too_large} examples, one per part of the mesh, do not fit: split weights over more chips."
        )
    end = "more were not tried" if largest.too_large is None else f"{largest.too_large:,} do not"
    print(f"{largest.fits:,} examples fit; {end}\n{path}")


def write_budgets(run_dir: str | None) -> None:
    """Writes the costs of every experiment's step on a small mesh, so that a test notices when they grow."""
    names = list_experiments()
    budgets: dict[str, Any] = {}
    for name in names:
        for mesh in BUDGET_MESHES:
            print(f"{name} on {BUDGET_TOPOLOGY}, {mesh}", file=sys.stderr, flush=True)
            try:
                batch_size = load_experiment(name).module.Config().batch_size
                divisible = str(math.ceil(batch_size / BUDGET_CHIPS) * BUDGET_CHIPS)
                about = ["--topology", BUDGET_TOPOLOGY, "--mesh", mesh, "--batch-size", divisible]
                subject, options = parse_command([name, *about])
                plan = compute_plan(subject, options)
            except InvalidArgument as error:
                raise InvalidArgument(f"{name}: {error}") from error
            budgets.setdefault(name, {})[mesh] = {
                "collectives": plan["collectives"],
                "temporaries": round(plan["hbm_gib"]["temporaries"] * (1 << 30)),
                "flops": plan["flops"],
            }
    path = CHECKOUT / BUDGETS if run_dir is None else Path(run_dir) / BUDGETS.name
    make_writable(path.parent)
    record.write_json(path, {"topology": BUDGET_TOPOLOGY, "experiments": budgets})


@contextlib.contextmanager
def report_phases() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows on stderr what is being done, and since when."""
    console, started = Console(stderr=True), time.monotonic()
    if not console.is_terminal:
        yield lambda phase: print(f"{time.monotonic() - started:7.1f} s  {phase}", file=sys.stderr, flush=True)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda phase: progress.update(task, description=phase)


def print_table(table: Any, path: Path) -> None:
    """Prints a table, and the path of the file that holds it."""
    console = Console(highlight=False)
    console.print(table)
    console.print(str(path), soft_wrap=True)


def option_value(arguments: list[str], name: str) -> str | None:
    """Returns the value of an option on a command line that is not parsed yet; None where it is absent.

    >>> option_value(["digits", "--topology=v5e:2x4"], "--topology"), option_value(["--run-dir", "here"], "--run-dir")
    ('v5e:2x4', 'here')
    """
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.replace("_", "-") == name:
            return value if equals else next(iter(arguments[i + 1 : i + 2]), "")
    return None


def trial_command(arguments: list[str], valued: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> list[str]:
    """Returns the command that plans a single trial of a search. Options that a trial sets, `valued` and `flags` are left out.

    >>> trial_command(["digits", "--mesh", "data=8", "--search", "--units=3", "--remat"], flags=("--remat",))[1:]
    ['-P', '-m', 'research', 'plan', 'digits', '--units=3']
    """
    valued = ("--mesh", "--batch-size", "--run-dir", "--minutes", *valued)
    flags = ("--search", "--max-batch", *flags)
    command, remaining = [sys.executable, "-P", "-m", "research", "plan"], iter(arguments)
    for argument in remaining:
        option, equals, _ = argument.partition("=")
        option = option.replace("_", "-") if option.startswith("--") else option
        if option in valued and not equals:
            next(remaining, None)
        elif option not in (*valued, *flags):
            command.append(argument)
    return command


def make_writable(directory: Path) -> None:
    """Creates a directory where it is missing. Raises `InvalidArgument` where nothing can be written to it.

    >>> make_writable(Path("/dev/null/here"))
    Traceback (most recent call last):
    research.core.state.InvalidArgument: --run-dir /dev/null/here: it can't be written (Not a directory); choose another.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return
    except OSError as error:
        raise InvalidArgument(f"--run-dir {directory}: it can't be written ({error.strerror}); choose another.") from error
