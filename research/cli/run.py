"""Runs an experiment: `run NAME --option value ...`, `run path/to/mine.py ...`; without a name, lists the experiments.

What an experiment must define, and what it may, is in experiments/README.md.
"""

import contextlib
import dataclasses
import gc
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from research.cli import contract, members, trust
from research.cli.arguments import UsageError, fail, parse, print_error
from research.cli.changes import changed_config, check_unchanged, record_code
from research.cli.errors import errors_as_one_line
from research.cli.experiment import Experiment, UnknownExperiment, list_experiments, load_experiment
from research.cli.options import Options
from research.cli.outputs import build_models
from research.cli.placement import Placed, place
from research.cli.runs import checkpoint_origin, recorded_file
from research.cli.signals import exit_on_signal
from research.cli.startup import check_devices, enable_compilation_cache, only_first_prints
from research.cli.training import Session, complete_report, run_session
from research.cli.warm_start import check_source, first_state, record_start, recorded_source, resolve_source
from research.core.state import InvalidArgument
from research.distributed import processes, rendezvous
from research.reporting import environment, record, run_files
from research.training import checkpoint, compiler_flags, programs, signals

USAGE = """just run NAME [--option value ...]; `just run NAME --help` lists the options; NAME may be the path of a file:
just run path/to/mine.py
"""


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code.

    >>> main(["digit"])
    2
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_usage()
        return 0
    name, *rest = arguments
    try:
        experiment = load_experiment(name)
        trust.remember(experiment)
        contract.check_module(experiment)
        module = experiment.module
        config, options = parse(module.Config, Options, rest, f"just run {name}", module.__doc__)
        contract.check_config(experiment, config)
        if options.population is not None or options.vary is not None:
            experiment, config = _population(experiment, config, options)
        return run_experiment(experiment, config, resolve_source(options))
    except (UnknownExperiment, UsageError) as error:
        return fail(str(error), 2)
    except InvalidArgument as error:
        return fail_or_exit(error)


def _population(experiment: Experiment, config: Any, options: Options) -> tuple[Experiment, Any]:
    """Returns the experiment and the config of a population. Raises `UsageError` for members that can't be."""
    many = members.as_population(experiment)
    try:
        if options.from_ is not None:
            raise InvalidArgument("--from with --population or --vary: expected one of them; run the members apart.")
        return many, members.population_config(many, config, options.population, options.vary)
    except InvalidArgument as error:
        raise UsageError(str(error)) from error


def _print_usage() -> None:
    experiments = list_experiments()
    print(USAGE)
    if not experiments:
        print("There are no experiments here: give the path of an experiment's file.")
        return
    width = max(map(len, experiments))
    print("\n".join(f"  {name:{width}}  {line}" for name, line in experiments.items()))


def fail_or_exit(error: InvalidArgument) -> int:
    """Prints why a run failed, and returns the exit code: 75, to be run again, if the failure is another process' own.

    One of several processes exits at once: the usual way waits for the other processes, which wait for this one.
    """
    code = fail(str(error), signals.RESUMABLE if isinstance(error, rendezvous.PeerLost) else 1)
    if jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)
    return code


def run_experiment(experiment: Experiment, config: Any, options: Options) -> int:
    """Trains an experiment in its run directory, from where it stopped, and writes the outputs. Returns the exit code."""
    gc.freeze()  # imported modules stay: each collection would spend a tenth of a second on them
    if options.compiler_flags:
        compiler_flags.add_recommended_flags(os.environ)
    enable_compilation_cache()
    processes.join(options.coordinator, options.processes, options.process, options.join_timeout)
    check_devices()
    with contextlib.ExitStack() as stack:
        if jax.process_count() > 1:
            exit_on_signal()  # joining has installed handlers of its own
            stack.enter_context(only_first_prints(processes.is_first()))
            source = hashlib.sha256(experiment.file.read_bytes()).hexdigest()[:12]
            facts = {**options.recorded(), **environment.code_identity(), f"{experiment.file.name}": source}
            processes.check_same({**dataclasses.asdict(config), **facts})
        directory = stack.enter_context(_run_directory(experiment, options))
        stack.enter_context(errors_as_one_line(directory))
        if processes.broadcast_from_first(lambda: _is_finished(directory, experiment, config, options.allow_changed)):
            print(f"{directory}: this run is finished; open {directory / 'report.html'}")
            return 0
        check_source(directory, options)
        for line in processes.broadcast_from_first(lambda: _changes(directory, experiment, config, options.allow_changed)):
            print_error(line)
        placed = prepare(experiment, config, options)
        return run_session(stack.enter_context(open_session(directory, experiment, config, options, placed)))


@contextlib.contextmanager
def _run_directory(experiment: Experiment, options: Options) -> Iterator[Path]:
    """Yields `--run-dir`, or a new directory in runs/NAME/, which is removed if nothing was written to it."""
    directory = Path(
        processes.broadcast_from_first(lambda: str(options.run_dir or record.new_directory(experiment.name, Path("runs"))))
    )
    try:
        yield directory
    finally:
        if options.run_dir is None and processes.is_first():
            with contextlib.suppress(OSError):  # the first that is not empty ends it
                if os.listdir(directory) == [".lock"]:
                    (directory / ".lock").unlink()
                for path in (directory, *directory.parents[:2]):
                    path.rmdir()


def _is_finished(directory: Path, experiment: Experiment, config: Any, allow_changed: bool) -> bool:
    """Returns whether a run is finished, and if so, writes its report if that is missing."""
    run, summary = record.open_run(directory, experiment.name, dataclasses.asdict(config), print_error, allow_changed)
    if summary is None or (allow_changed and changed_config(run) is not None):
        return False
    complete_report(run)
    return True


def _changes(directory: Path, experiment: Experiment, config: Any, allow_changed: bool) -> list[str]:
    run, _ = record.open_run(directory, experiment.name, dataclasses.asdict(config), allow_changed=allow_changed)
    return check_unchanged(run, experiment, allow_changed)


def prepare(experiment: Experiment, config: Any, options: Options) -> Placed:
    """Builds what is trained, compiles the training program, and loads the data meanwhile. Writes nothing."""
    splits = contract.check_splits(experiment, experiment.module.data(config))
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(splits["train"].batch, 0)
        placed = place(experiment, config, options, splits)
        programs.compile_ahead(placed.learner, placed.splits["train"], placed.state)
        one, own, state = experiment, config, processes.to_host(placed.state)
        if experiment.member is not None:
            one, own, state = members.take(experiment, config, state, 0)
        contract.check_models(experiment, state, lambda: build_models(one.module, own, state))
        loading.result()
    return placed


@contextlib.contextmanager
def open_session(directory: Path, experiment: Experiment, config: Any, options: Options, placed: Placed) -> Iterator[Session]:
    """Opens and locks a run's directory, and restores its latest checkpoint, if there is one."""
    with processes.process_directory(directory) as own_directory:
        values, changed = dataclasses.asdict(config), options.allow_changed
        run, _ = record.open_run(own_directory, experiment.name, values, allow_changed=changed)
        with record.lock(run):
            run, _ = record.open_run(
                own_directory, experiment.name, values, allow_changed=changed
            )  # another may have had the lock
            run = run._replace(shared_directory=directory)
            saved = _restore(run, placed, changed)
            state, warm = (placed.state, None) if saved else first_state(run, experiment, config, options, placed)
            start = saved or checkpoint.Checkpoint(0, state, {})
            if saved or (warm is None and options.from_ is not None):
                options = recorded_source(run, options)
            _start_record(run, options, start.step, recorded_file(experiment), placed.splits["train"].steps_per_epoch)
            record_code(run, experiment)
            if warm is not None:
                record_start(run, warm, state, placed.learner.names)
            yield Session(run, experiment, config, options, placed, start)


def _restore(run: record.Run, placed: Placed, allow_changed: bool) -> checkpoint.Checkpoint | None:
    """Returns the latest checkpoint of a run, if there is one. One of another config, if that is allowed, becomes one of this."""
    origin, names = checkpoint_origin(run), placed.learner.names
    accepted = origin._replace(config=None) if allow_changed else origin
    saved = checkpoint.restore_latest(run.checkpoints, placed.state, names, print_error, accepted)
    if saved is not None and allow_changed:
        checkpoint.save(run.checkpoints, saved.step, saved.state, names, saved.logs, origin=origin)
    return saved


def _start_record(run: record.Run, options: Options, step: int, file: str | None, steps_per_epoch: int) -> None:
    """Starts the record of a run at a step, and prints what is damaged in that of earlier starts, and which logs are lost."""
    log_every = run_files.read_config(run.directory).options.get("log_every") if step and processes.is_first() else None
    damage: list[str] = []
    record.start(run, options.recorded(), step, file, damage.append)
    for line in damage:
        print_error(line)
    if type(log_every) is not int or log_every < 1 or any("metrics.jsonl" in line for line in damage):
        return
    last = max((entry.step for entry in record.read_entries(run)), default=0)
    next_log = min((last // every + 1) * every for every in (log_every, steps_per_epoch)) if last else 1
    if next_log < step:
        path = run.directory / "metrics.jsonl"
        print_error(f"{path}: the logs of steps {last + 1} to {step - 1} are missing; the run goes on without them")
