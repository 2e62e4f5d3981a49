"""Searches for good values of an experiment's options: `sweep NAME --trials 40 --vary learning_rate=log:1e-4:1e-1,units=64:128`.

just sweep digits --trials 40 --vary learning_rate=log:1e-4:1e-1,dropout=0:0.25:0.5 --jobs 2
just sweep digits --sampler grid --vary units=32:64:128,dropout=0:0.5 --metric val_accuracy:max --epochs 5

--vary FIELD=log:LOW:HIGH, FIELD=linear:LOW:HIGH or FIELD=A:B:C (or 'A|B|C'); other options are those of `just run NAME`. Each
trial is a run in the sweep's directory, and its value the best of its epochs. Optuna chooses trials, and stops those that fall
behind. What it knows is in sweep.db there: the same command with --sweep-dir goes on with an interrupted sweep.
"""

import argparse
import collections
import contextlib
import re
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from research.cli import contract
from research.cli.arguments import Parser, UsageError, fail, parse, print_error
from research.cli.checkpoints import Best, parse_best
from research.cli.experiment import Experiment, UnknownExperiment, load_experiment
from research.cli.fields import annotations
from research.cli.options import Options
from research.cli.study import STATES, best_trial, check_optuna, finished, grid, importances, latest, open_study, started
from research.cli.trials import Outcome, TrialRun, describe, option_list, population_options, search_space
from research.core.state import InvalidArgument
from research.reporting import record, sweep_page
from research.training.signals import RESUMABLE

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

MAX_FAILURES = 3  # in a row
POLL_SECONDS = 0.2
PAGE_SECONDS = 30.0  # between two pages while trials go on
OF_THE_SWEEP = ("run_dir", "from_", "coordinator", "processes", "process", "population", "vary")


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code.

    >>> main(["digits", "--trials", "4"])
    2
    """
    parser = _parser()
    if not arguments or "--help" in arguments or "-h" in arguments:
        parser.print_help()
        return 0 if arguments else 2
    try:
        check_optuna()
        own, others = parser.parse_known_args(arguments)
        experiment = load_experiment(own.name)
        contract.check_module(experiment)
        config_class = experiment.module.Config
        config, options = parse(config_class, Options, others, f"just sweep {own.name}", experiment.module.__doc__)
        contract.check_config(experiment, config)
        _check_options(own, options)
        space = _search_space(own, annotations(config_class))
        _check_given(space, others)
        best = parse_best(own.metric)
        assert best is not None
        directory = own.sweep_dir or record.new_directory(f"{experiment.name}/sweep", Path("runs"))
        with open_study(own, directory, experiment.name, others) as study:
            return Sweep(experiment, own, others, directory, study, space, best).run()
    except (UnknownExperiment, UsageError) as error:
        return fail(str(error), 2)
    except InvalidArgument as error:
        return fail(str(error), 1)


def _parser() -> Parser:
    parser = Parser("just sweep", __doc__)
    parser.allow_abbrev = False
    parser.add_argument("name", metavar="NAME", help="an experiment, or the path of its file")
    parser.add_argument("--vary", required=True, help="fields of its config, and their values")
    parser.add_argument("--trials", type=int, help="trials in all; a grid's by default all of its points")
    parser.add_argument("--metric", default="val_loss:min", help="what to optimise: val_loss:min (the default), val_accuracy:max")
    parser.add_argument("--sampler", choices=("tpe", "random", "grid"), default="tpe", help="how trials are chosen (tpe)")
    parser.add_argument("--pruner", choices=("median", "halving", "none"), default="median", help="which are stopped (median)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (1)")
    parser.add_argument("--population", type=int, default=1, help="trials in one run, as members of a population (1)")
    parser.add_argument("--sampler-seed", type=int, default=0, help="seed of the sampler (0)")
    parser.add_argument("--sweep-dir", type=Path, help="directory of the sweep; by default a new one in runs/NAME/")
    parser.add_argument("--storage", help="URL of Optuna's storage, to search from several machines; by default sweep.db")
    parser.add_argument("--study", help="name of the study in the storage; by default that of the experiment")
    return parser


def _check_options(own: argparse.Namespace, options: Options) -> None:
    """Raises `UsageError` for options that a sweep can't have."""
    for name in ("jobs", "population", "trials"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise UsageError(f"--{name} {getattr(own, name)}: expected at least 1.")
    if own.trials is None and own.sampler != "grid":
        raise UsageError("--trials is missing: how many? `just sweep --help` lists the options.")
    given = [name for name in OF_THE_SWEEP if getattr(options, name) is not None]
    if given:
        raise UsageError(f"--{given[0].strip('_').replace('_', '-')} with a sweep: each trial is a run of its own; leave it out.")
    if own.metric.startswith("test_"):
        raise UsageError(f"--metric {own.metric}: what is chosen by test data says nothing about others; expected val_ ...")
    try:
        parse_best(own.metric)
    except InvalidArgument:
        raise UsageError(f"--metric {own.metric}: expected a metric and min or max, such as val_loss:min.") from None


def _search_space(own: argparse.Namespace, types_of: dict[str, Any]) -> "dict[str, BaseDistribution]":
    """Returns the distributions of the fields that vary. Raises `UsageError` for those that can't be."""
    try:
        space = search_space(own.vary, types_of)
        if own.sampler == "grid":
            grid(space)
        return space
    except InvalidArgument as error:
        raise UsageError(str(error)) from error


def _check_given(space: "dict[str, BaseDistribution]", others: list[str]) -> None:
    """Raises `UsageError` for an option of a field that varies."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in others}
    for name in space:
        option = name.replace("_", "-")
        if given & {f"--{option}", f"--no-{option}"}:
            raise UsageError(f"--{option} with --vary {name}=...: expected one of them.")


class Sweep:
    """A sweep: its study, and the runs that are going on."""

    def __init__(
        self,
        experiment: Experiment,
        own: argparse.Namespace,
        others: list[str],
        directory: Path,
        study: "Study",
        space: "dict[str, BaseDistribution]",
        best: Best,
    ) -> None:
        self.own, self.others, self.directory, self.study, self.space, self.best = own, others, directory, study, space, best
        self.name = own.name if own.name.endswith(".py") else experiment.name
        self.running: list[TrialRun] = []
        self.stop: int | None = None
        self.failures = 0
        self.page_written = time.monotonic()

    def run(self) -> int:
        """Runs trials until there are enough; returns the exit code."""
        with record.lock(record.Run(self.directory, self.name, {}), "--sweep-dir"):
            return self._run(self._enqueue())

    def _run(self, total: int) -> int:
        with self._signals(), _progress(total) as show:
            try:
                while self.stop is None:
                    self._start_runs(total)
                    if not self.running:
                        break
                    self._poll()
                    show(len(finished(self.study)))
                    time.sleep(POLL_SECONDS)
            finally:
                self._end_runs()
                page = self._write_page()
        if self.stop is not None:
            print_error(f"stopped by {signal.Signals(self.stop).name}; to go on: {self._command()}")
            return RESUMABLE
        return self._print_best(page)

    def _enqueue(self) -> int:
        """Enqueues what an interrupted sweep was at, and the points of a grid. Returns the number of trials in all."""
        from optuna.trial import TrialState

        for trial in latest(self.study):
            if trial.state == TrialState.RUNNING and self._is_here(trial):
                self.study.tell(trial.number, state=TrialState.FAIL)
                self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
        if self.own.sampler != "grid":
            return int(self.own.trials)
        points = grid(self.space)
        for point in points:
            self.study.enqueue_trial(point, skip_if_exists=True)
        return min(self.own.trials or len(points), len(points))

    def _start_runs(self, total: int) -> None:
        """Starts runs until as many are going on as there may be, or there are enough trials."""
        while len(self.running) < self.own.jobs and self.stop is None:
            missing = total - len(started(self.study))
            if missing < 1:
                return
            first = self.study.ask(self.space)
            size = first.user_attrs.get("members", min(self.own.population, missing))
            trials = [first, *(self.study.ask(self.space) for _ in range(size - 1))]
            values = [trial.params for trial in trials]
            options = option_list(values[0]) if size == self.own.population == 1 else population_options(values)
            directory = self._directory(trials)
            for i, trial in enumerate(trials):
                for name, value in {**self._place(), "run": directory.name, "member": i, "members": size}.items():
                    trial.set_user_attr(name, value)
            self.running.append(TrialRun(trials, directory, [self.name, *self.others, *options], self.best))

    def _place(self) -> dict[str, str]:
        """Returns where the runs of this sweep are: trials of a shared storage may have been run elsewhere."""
        return {"sweep": str(self.directory.resolve()), "host": socket.gethostname()}

    def _is_here(self, trial: "Trial | FrozenTrial") -> bool:
        return all(trial.user_attrs.get(name) == value for name, value in self._place().items())

    def _directory(self, trials: "list[Trial]") -> Path:
        """Returns the directory of a run: a new one, or that of an interrupted run of the same trials here."""
        names = {str(each.user_attrs.get("run")) for each in trials}
        name = names.pop()
        if not names and re.fullmatch("trial-[0-9]+", name) and all(map(self._is_here, trials)):
            return self.directory / name
        return self.directory / f"trial-{trials[0].number:04d}"

    def _poll(self) -> None:
        """Reports what the runs have logged, stops those that fall behind, and takes the values of those that have ended."""
        for run in list(self.running):
            run.report()
            if run.process.poll() is None:
                run.prune()
                continue
            self.running.remove(run)
            run.report()
            self._tell(run, run.outcome())
        if time.monotonic() - self.page_written > PAGE_SECONDS:
            self._write_page()

    def _tell(self, run: TrialRun, outcome: Outcome) -> None:
        """Tells Optuna how the trials of a run ended, and prints it. Raises `InvalidArgument` after too many failures."""
        from optuna.trial import TrialState

        if outcome.state == "stopped":
            for trial in run.trials:
                self.study.tell(trial, state=TrialState.FAIL)
                self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
            self.stop = self.stop or signal.SIGTERM  # by another than this process: the machine may be going down
            return
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        for trial, value in zip(run.trials, outcome.values, strict=True):
            state = TrialState.FAIL if outcome.state == "complete" and value is None else states[outcome.state]
            why = outcome.why or (f"no finite {self.best.metric}" if outcome.state == "complete" and value is None else "")
            if why:
                trial.set_user_attr("why", why)
            self.study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)
            shown = f"{self.best.metric} {value:.4g}" if state == TrialState.COMPLETE else STATES[state.name]
            print(f"trial {trial.number}: {shown}  {describe(trial.params)}{why and f'  ({why})'}", flush=True)
        self.failures = self.failures + 1 if outcome.state == "failed" else 0
        if self.failures == MAX_FAILURES:
            raise InvalidArgument(f"{MAX_FAILURES} runs in a row failed, the last one: {outcome.why} (see {run.log}).")

    def _end_runs(self) -> None:
        """Stops the runs that are still going on, at a checkpoint, and leaves their trials to the next start."""
        for run in self.running:
            run.process.terminate()
        for run in self.running:
            run.process.wait()
            run.report()
            outcome = run.outcome() if run.process.returncode == 0 else Outcome("stopped", [None] * len(run.trials))
            self._tell(run, outcome)
        self.running = []

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, _: Any) -> None:
            if self.stop is not None:  # a second signal does not wait for the runs' checkpoints
                for run in self.running:
                    run.process.kill()
            self.stop = number

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _command(self) -> str:
        """Returns the command that goes on with this sweep."""
        given = {"sweep_dir": str(self.directory)}
        for name, default in vars(_parser().parse_args(["NAME", "--vary", ""])).items():
            value = getattr(self.own, name)
            if name not in ("name", "sweep_dir") and value != default:
                given[name] = value
        return shlex.join(["just", "sweep", self.name, *option_list(given), *self.others])

    def _write_page(self) -> Path:
        """Writes the page of the sweep, and returns its path."""
        trials = [_as_row(trial) for trial in latest(self.study) if trial.state.name != "WAITING"]
        best = best_trial(self.study)
        command = "" if best is None else shlex.join(["just", "run", self.name, *self.others, *option_list(best.params)])
        page = sweep_page.Sweep(
            title=f"sweep of {Path(self.name).stem}",
            metric=self.best.metric,
            highest=self.best.highest,
            trials=trials,
            log_scaled=frozenset(name for name, each in self.space.items() if getattr(each, "log", False)),
            importances=importances(self.study),
            command=command,
        )
        self.page_written = time.monotonic()
        return sweep_page.write_sweep(self.directory / "sweep.html", page)

    def _print_best(self, page: Path) -> int:
        """Prints the number of trials by state, and the command of the best. Returns the exit code."""
        states = collections.Counter(STATES[trial.state.name] for trial in finished(self.study))
        print(f"{sum(states.values())} trials: {', '.join(f'{count} {state}' for state, count in states.items())}")
        best = best_trial(self.study)
        if best is None:
            return fail(f"no trial has a {self.best.metric}; see {page}", 1)
        print(f"best: trial {best.number}, {self.best.metric} {best.value:.4g}")
        print(f"{shlex.join(['just', 'run', self.name, *self.others, *option_list(best.params)])}\n{page}")
        return 0


def _as_row(trial: "FrozenTrial") -> sweep_page.Trial:
    attributes = trial.user_attrs
    return sweep_page.Trial(
        number=trial.number,
        state=STATES[trial.state.name],
        value=trial.value if trial.state.name == "COMPLETE" else None,
        values=trial.params,
        run=Path(attributes["sweep"], attributes["run"]) if "run" in attributes else None,
        why=attributes.get("why", ""),
        curve=list(trial.intermediate_values.items()),
    )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how many trials are done, on a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.completed:.0f}/{task.total:.0f} trials"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.update(task, completed=done)
