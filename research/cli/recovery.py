"""What a run does about a bad step: stop, skip it, or go on from an earlier checkpoint."""

import sys
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console

from research.cli.checkpoints import due_checkpoints, kept_checkpoints, recorded_scores
from research.cli.errors import describe_error
from research.cli.options import OnBadStep
from research.cli.placement import place
from research.cli.runs import checkpoint_origin
from research.core.state import InvalidArgument
from research.debugging import failures, history
from research.debugging.blame import blame
from research.debugging.history import Decision, History
from research.debugging.replay import on_one_device
from research.distributed import processes
from research.training import checkpoint
from research.training.bad_steps import NONFINITE, BadStep

if TYPE_CHECKING:
    from research.cli.training import Session


def run_history(session: "Session") -> History:
    """Returns what the earlier states of a run are computed from."""
    run, directory = session.run, session.run.checkpoints.parent
    decisions = processes.broadcast_from_first(lambda: history.read_decisions(directory))
    return History(
        session.learner,
        session.splits["train"],
        run.checkpoints,
        lambda: place(session.experiment, session.config, session.options, session.placed.local_splits).state,
        session.placed.state,
        checkpoint_origin(run),
        tuple(Decision(*each) for each in decisions),
    )


def recover(session: "Session", bad: BadStep, recent: dict[str, Any]) -> checkpoint.Checkpoint:
    """Returns the checkpoint that a run goes on from after a bad step, as its options say, once it is written.

    `recent` are logs to add to it. Raises `InvalidArgument` if the run is to stop. All processes must call it.
    """
    past = run_history(session)
    if bad.reason == NONFINITE:
        step, before = history.first_bad_step(past, bad.step)
    else:
        step, before = bad.step, history.state_after(past, bad.step - 1)
    action = session.options.on_nonfinite if bad.reason == NONFINITE else session.options.on_spike
    message = f"step {step}: {bad}" + (f" after step {bad.step}" if step != bad.step else "")
    message += _analyse(session, step, before.state)
    recorded = next((each for each in past.decisions if each.step == step), None)
    decision = recorded or _decide(session, past, step, bad.reason, action, message)
    if decision.restored != before.step:
        before = history.state_after(past, decision.restored)
    start = history.resumed_after(past, decision, before)
    start = start._replace(logs={**start.logs, **recent})
    if processes.is_first():
        if recorded is None:
            history.record_decision(session.run.directory, decision)
        done = "skipped" if decision.restored == step - 1 else f"went back to the state of step {decision.restored}"
        print(f"{message}; {done}, and goes on with step {step + 1}", file=sys.stderr, flush=True)
    run = session.run
    kept = kept_checkpoints(session, recorded_scores(session.options.keep_best, run))
    checkpoint.save(run.checkpoints, step, start.state, session.learner.names, start.logs, kept, checkpoint_origin(run))
    return start


def _analyse(session: "Session", step: int, before: Any) -> str:
    """Writes what is to blame for a bad step into failures/STEP/. Returns that as the end of a message."""
    state = processes.to_host(before)
    if not processes.is_first():
        return ""
    directory = session.run.directory / "failures" / f"{step:09d}"
    try:
        learner, batch = session.learner, jax.device_get(session.placed.local_splits["train"].batch(step - 1))
        if session.options.mesh is not None or jax.process_count() > 1:
            learner, state = session.experiment.module.build(session.config), on_one_device(state)
        found = blame(learner, state, batch)
        failures.write_failure(directory, found, batch, failures.seeds_of(state, learner.names))
    except Exception as error:  # what can't be analysed must not hide what happened
        return f"; it can't be analysed ({describe_error(error)})"
    Console(stderr=True, highlight=False, soft_wrap=True).print(failures.norm_table(found))
    return f"; {found.describe()}; written to {directory}"


def _rolled_back_to(session: "Session", past: History, step: int) -> int:
    """Returns the step that a run is rolled back to: a stop, which leaves a checkpoint at any step, must not change that."""
    return history.last_checkpoint(past, step - 1, due_checkpoints(session))


def _decide(session: "Session", past: History, step: int, reason: str, action: OnBadStep | None, message: str) -> Decision:
    directory = session.run.checkpoints.parent
    made, limit = len(past.decisions), session.options.max_skips
    if action in ("skip", "rollback") and made < limit:
        return Decision(step, step - 1 if action == "skip" else _rolled_back_to(session, past, step), reason)
    option = "--on-nonfinite" if reason == NONFINITE else "--on-spike"
    why = f"{made} bad steps were skipped before (--max-skips {limit})" if made and action != "stop" else f"{option} {action}"
    raise InvalidArgument(
        f"{message}; stopped ({why}); look at it with: just replay {directory} --step {step}; to go on past it, run the same "
        f"command again with {option} skip."
    )
