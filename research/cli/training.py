"""Training of a run from a checkpoint to its end, with everything that is recorded on the way."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from research.cli import members
from research.cli.arguments import print_error
from research.cli.checkpoints import (
    check_best,
    checkpoint_hooks,
    kept_checkpoints,
    once_a_step,
    parse_best,
    parse_cadence,
    recorded_scores,
)
from research.cli.errors import remove_tracebacks
from research.cli.experiment import Experiment
from research.cli.options import Options
from research.cli.outputs import write_outputs
from research.cli.placement import Placed
from research.cli.recovery import recover
from research.cli.runs import checkpoint_origin, recorded_file
from research.cli.speed import best_step_seconds, device_memory
from research.cli.startup import process_start_time
from research.core.learner import Learner
from research.core.state import InvalidArgument, count_parameters
from research.data.batches import Batches
from research.distributed import processes
from research.reporting import progress, record, run_files
from research.reporting.performance import PerformanceRecorder
from research.training import checkpoint, loop, signals
from research.training.bad_steps import BadStep, LossWatch, state_check, without_recent
from research.training.logs import LogEntry, log_entry
from research.transforms.observe import Observe, layer_norms, norms

NORMS_EVERY = 100  # steps at least: norms cost about one step more


class Session(NamedTuple):
    """A run that is ready to train: its directory, what is trained on what, and the checkpoint to start from."""

    run: record.Run
    experiment: Experiment
    config: Any
    options: Options
    placed: Placed
    start: checkpoint.Checkpoint

    @property
    def learner(self) -> Learner:
        """What is trained."""
        return self.placed.learner

    @property
    def splits(self) -> dict[str, Batches]:
        """The data, on the devices that it is trained on."""
        return self.placed.splits

    def outputs_arguments(self, state: Any) -> tuple[Any, Learner, Any, dict[str, Batches]]:
        """Returns what the experiment's functions take: config, learner, state and splits. All processes must call it.

        Those of a population are the ones of its best member so far.
        """
        state = processes.to_host(state)
        if self.experiment.member is None:
            return self.config, self.placed.local_learner, state, self.placed.local_splits
        index = processes.broadcast_from_first(lambda: members.best(self.run, self.options.keep_best, self.config.population))
        experiment, config, state = members.take(self.experiment, self.config, state, index)
        return config, experiment.module.build(config), state, experiment.module.data(config)

    @property
    def steps(self) -> int:
        """The number of training steps of the complete run."""
        epochs: int = self.config.epochs * self.splits["train"].steps_per_epoch
        return epochs if self.config.steps is None else min(self.config.steps, epochs)

    @property
    def histogram_every(self) -> int:
        """Steps between histograms of the weights: an epoch, or a tenth of all epochs, since more would slow down the run."""
        steps_per_epoch = self.splits["train"].steps_per_epoch
        return steps_per_epoch * max(1, -(-self.steps // steps_per_epoch) // 10)


class Recorder:
    """Records a run's logs: in metrics.jsonl, and as the current state of its summary."""

    def __init__(self, session: Session) -> None:
        step = session.start.step
        self.run = session.run
        self.steps_per_epoch = session.splits["train"].steps_per_epoch
        self.summary: dict[str, Any] = {
            "status": "failed",
            "steps": step,
            "epochs": 0,
            # Of earlier starts too: not every log has every metric.
            "metrics": record.latest_metrics(record.read_entries(session.run)),
            "resumed_from": step or None,
        }
        self.summary["parameters"] = count_parameters(session.start.state)
        self.session = session
        self.results: dict[str, float] = {}
        self.first: tuple[int, float] | None = None  # step and time of the first log

    def log(self, entry: LogEntry) -> None:
        """Records the metrics of a step."""
        now = time.time()
        if self.first is None:
            self.first = (entry.step, now)
            self.summary["seconds_to_first_step"] = now - process_start_time()
        steps, seconds = entry.step - self.first[0], now - self.first[1]
        self.summary["metrics"].update(record.latest_metrics([entry]))
        self.summary.update(steps=entry.step, epochs=entry.step / self.steps_per_epoch)
        self.summary["steps_per_second"] = steps / seconds if steps and seconds else None
        record.append_entry(self.run, entry)

    def log_speed(self, entry: LogEntry, speed: PerformanceRecorder) -> None:
        """Records the speed up to the log of a training step."""
        if entry.split == "train":
            speed.log(entry.step, self.summary.get("seconds_waiting_for_data", 0.0))
            if speed.lines:
                self.summary["goodput"] = speed.lines[-1]["goodput"]

    def write_summary(self, status: str) -> None:
        """Writes summary.json."""
        self.summary["status"] = status
        of_members: dict[str, Any] = {}
        if self.session.experiment.member is not None:
            session = self.session
            of_members = members.summary(session.experiment, session.config, self.run, session.options.keep_best, self.results)
        record.write_summary(self.run, {**self.summary, **of_members})


def run_session(session: Session) -> int:
    """Trains to the end, writes the outputs and the report, and returns the exit code.

    A signal stops training after a checkpoint; the exit code is then 75. Exceptions leave the status "failed" in the summary.
    """
    recorder = Recorder(session)
    directory = session.run.shared_directory or session.run.directory

    def write_stopped(number: int) -> None:
        recorder.write_summary("stopped" if number == signal.SIGINT else "preempted")
        if processes.is_first():
            steps = f"after step {recorder.summary['steps']}"
            print(
                f"stopped by {signal.Signals(number).name} {steps}; to go on: just resume {directory}",
                file=sys.stderr,
                flush=True,
            )

    with signals.graceful_shutdown(write_stopped) as stop:
        try:
            session, state = train_past_bad_steps(session, recorder, processes.any_process(stop))
            parts = session.outputs_arguments(state)
            results = write_outputs(session.run, session.experiment.module, parts, recorder.summary["steps"])
            recorder.results = results
            if session.experiment.member is None:
                recorder.summary["metrics"].update(results)
        except loop.Stopped as stopped:
            recorder.summary["steps"] = stopped.step or recorder.summary["steps"]
            write_stopped(stop.signal or signal.SIGTERM)  # the signal may have been another process' own
            return signals.RESUMABLE
        except Exception:
            with contextlib.suppress(OSError):  # the disk may be what failed
                recorder.write_summary("failed")
            raise
        recorder.write_summary("finished")
        if processes.is_first():
            remove_tracebacks(session.run.directory)
        page = write_report(session.run)
    metrics = recorder.summary["metrics"]
    if session.experiment.member is not None and processes.is_first():
        print(members.describe_best(session.run, session.options.keep_best, session.config.population))
    values = {name: value for name, value in metrics.items() if name.endswith("accuracy") or name in results}
    values = progress.shown(values or metrics)
    print(f"{_speed(session, recorder.summary)}{'  '.join(f'{name} {value:.4g}' for name, value in values.items())}\n{page}")
    return 0


def _speed(session: Session, summary: dict[str, Any]) -> str:
    """Returns a line about the speed of a run; none for one that was too short."""
    if "goodput" not in summary or summary["steps_per_second"] is None:
        return ""
    examples = summary["steps_per_second"] * jax.tree.leaves(session.splits["train"].shapes)[0].shape[0]
    return f"{examples:,.0f} examples/s  goodput {summary['goodput']:.0%}\n"


def write_report(run: record.Run) -> Path:
    """Writes the report of a finished run; returns its path. Raises `InvalidArgument` if it can't be written."""
    from research.reporting import report

    try:
        return report.write_report(run, print_error)
    except OSError as error:
        raise InvalidArgument(
            f"{run.directory / 'report.html'}: it can't be written ({error.strerror}), but the run is finished; free space or "
            f"fix permissions, then: just report {run.directory}"
        ) from error


def complete_report(run: record.Run) -> None:
    """Writes the report of a finished run if the process that finished it was killed before it had done so."""
    page, summary = run.directory / "report.html", run.directory / "summary.json"
    complete = page.is_file() and page.stat().st_mtime_ns >= summary.stat().st_mtime_ns
    if not complete or any(run.directory.glob(".*.partial")):
        with contextlib.suppress(record.Locked), record.lock(run):  # if locked, that process writes it
            run_files.tidy(run.directory, print_error)
            write_report(run)


def train_past_bad_steps(session: Session, recorder: Recorder, stop: Callable[[], bool]) -> tuple[Session, Any]:
    """Trains to the last step, past bad steps if the options say so. Returns the session that ended, and the trained state."""
    while True:
        options = session.options
        watch = LossWatch(
            session.splits["train"].steps_per_epoch,
            threshold=None if options.on_spike is None else options.spike_threshold,
            window=options.spike_window,
            logs=session.start.logs,
        )
        try:
            return session, train(session, recorder, stop, watch)
        except BadStep as bad:
            session = session._replace(start=recover(session, bad, watch.recent()))
            record.start(session.run, session.options.recorded(), session.start.step, recorded_file(session.experiment))


def train(session: Session, recorder: Recorder, stop: Callable[[], bool], watch: LossWatch) -> Any:
    """Trains from the checkpoint to the last step and evaluates "test", if there is one. Returns the trained state.

    Raises `loop.Stopped`, after a checkpoint, if `stop` returns True, and `BadStep`.
    """
    from research.reporting import tensorboard

    run, learner, total = session.run, session.learner, session.steps
    data, step, options = session.splits["train"], session.start.step, session.options
    print(_describe(session, recorder.summary["parameters"]), flush=True)
    best = parse_best(options.keep_best)
    check_best(best, learner, session.start.state, session.splits)
    scores = recorded_scores(options.keep_best, run)
    kept = kept_checkpoints(session, scores)
    logged = [run.directory / name for name in ("config.json", "metrics.jsonl")]  # a checkpoint is of no use without them

    with (
        progress.show_progress(total, data.steps_per_epoch, step) as (show, show_step),
        tensorboard.recorder(
            run.directory / "tensorboard", learner.names, record.read_entries(run), step, print_error
        ) as tensorboard_hooks,
        checkpoint.async_saver(run.checkpoints, learner.names, kept, checkpoint_origin(run), flush=logged) as save,
        _profile_hooks(session) as profile_hooks,
    ):
        log_scalars, write_weights, wait_for_tensorboard = tensorboard_hooks
        speed = _performance_recorder(session)

        def log(entry: LogEntry) -> None:
            recorder.log(entry)
            recorder.log_speed(entry, speed)
            scores.add(entry)
            log_scalars(entry)
            show(entry)

        def on_progress(step: int, waited: float) -> None:
            recorder.summary["seconds_waiting_for_data"] = waited
            show_step(step, waited)

        def save_with_losses(step: int, state: Any, logs: Any) -> None:
            save(step, state, {**logs, **watch.recent()})

        checks = [state_check(session.start.state)] if session.experiment.member is None else []
        save_checkpoint = once_a_step(*checks, wait_for_tensorboard, save_with_losses)

        if step and (step % session.histogram_every == 0 or step == total):
            write_weights(step, session.start.state, {})
        cadence = parse_cadence(options.checkpoint_every)
        hooks = [
            *profile_hooks,
            *_epoch_hooks(session),
            (session.histogram_every, write_weights),
            # The checkpoint comes last: what belongs to the steps before it is then on disk.
            *checkpoint_hooks(cadence, best, data.steps_per_epoch, total, save_checkpoint),
        ]
        trained = _train_loop(session, hooks, save_checkpoint, log, on_progress, stop, watch)
        if "test" in session.splits:
            values = loop.evaluate(learner, session.splits["test"], trained, stop)
            log(log_entry(total, max(0, total - 1) // data.steps_per_epoch, "test", values))
    checkpoint.remove_others(run.checkpoints, kept, checkpoint_origin(run))
    return trained


def _train_loop(
    session: Session,
    hooks: list[tuple[loop.Every, loop.Hook]],
    save_checkpoint: loop.Hook,
    log: Callable[[LogEntry], None],
    on_progress: Callable[[int, float], None],
    stop: Callable[[], bool],
    watch: LossWatch,
) -> Any:
    """Trains to the last step and returns the state; if training is stopped, after a checkpoint."""
    start, options = session.start, session.options
    try:
        trained, _ = loop.train(
            session.learner,
            session.splits["train"],
            steps=session.steps,
            start=start.step,
            state=start.state,
            logs=without_recent(start.logs),
            log_every=options.log_every,
            log=log,
            evaluations={name: split for name, split in session.splits.items() if name not in ("train", "test")},
            evaluate_every=options.evaluate_every,
            observe=_observe(options),
            hooks=hooks,
            stop=stop,
            progress=on_progress,
            watch=watch if session.experiment.member is None else members.watch_finite(watch),
        )
    except loop.Stopped as stopped:
        save_checkpoint(stopped.step, stopped.state, stopped.logs or {})
        raise
    return trained


def _describe(session: Session, parameters: int) -> str:
    """Returns one line about the training that is to come."""
    data = session.splits["train"]
    steps = f"{session.steps - session.start.step:,} steps to go, {data.steps_per_epoch:,} in an epoch"
    members = "" if session.experiment.member is None else f"{session.config.population:,} members; "
    return f"{members}{parameters:,} trainable parameters; {steps} of {data.examples:,} examples"


def _performance_recorder(session: Session) -> PerformanceRecorder:
    data, start = session.splits["train"], session.start
    batch_size = jax.tree.leaves(data.shapes)[0].shape[0]
    best = best_step_seconds(session.learner, start.state, data)
    return PerformanceRecorder(session.run, batch_size, start.step, process_start_time(), device_memory, best)


def _observe(options: Options) -> tuple[int, Observe] | None:
    """Returns when which norms are logged: at every log, but not more often than that costs a hundredth of the time."""
    functions = {"none": None, "global": norms, "layers": layer_norms}
    function = functions[options.norms]
    return None if function is None else (options.log_every * -(-NORMS_EVERY // options.log_every), function)


def _profile_hooks(session: Session) -> Any:
    """A context manager that gives the hooks that trace the steps of `--profile`."""
    from research.reporting import profiling

    steps = session.options.profile
    return contextlib.nullcontext([]) if steps is None else profiling.trace_steps(session.run.directory / "profile", *steps)


def _epoch_hooks(session: Session) -> list[tuple[int, loop.Hook]]:
    """Returns the hook that saves the experiment's figures of each epoch, if it defines `each_epoch`."""
    module, steps_per_epoch = session.experiment.module, session.splits["train"].steps_per_epoch
    if not hasattr(module, "each_epoch"):
        return []

    def save_epoch_figures(step: int, state: Any, logs: Any) -> None:
        epoch = -(-step // steps_per_epoch)
        try:
            figures = module.each_epoch(*session.outputs_arguments(state))
            record.save_figures(session.run, figures, epoch=epoch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"no pictures of epoch {epoch}: a device has no room for them beside the training", file=sys.stderr)

    return [(steps_per_epoch, save_epoch_figures)]
