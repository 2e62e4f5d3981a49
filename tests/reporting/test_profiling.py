"""Profiler traces hold exactly the requested steps; recommended compiler flags come before the user's own."""

import gzip
import json
from pathlib import Path

import pytest
from small_training import assert_same_weights, data, learner

import research
from research.reporting.profiling import trace_steps
from research.training.compiler_flags import RECOMMENDED_FLAGS, add_recommended_flags
from research.training.loop import Stopped


def traced_steps(directory: Path) -> list[int]:
    """Returns the first step of each dispatch in a trace."""
    (path,) = directory.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train" and "args" in event)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [(1, 2), (4, 4), (3, 7)])
def test_a_trace_holds_exactly_the_requested_steps_and_does_not_change_training(first: int, last: int, tmp_path: Path) -> None:
    trained = learner()
    with trace_steps(tmp_path, first, last) as hooks:
        state, _ = research.train(trained, data(), epochs=2, hooks=hooks)
    steps = traced_steps(tmp_path)
    assert steps[0] == first - 1
    assert steps[-1] < last
    assert_same_weights(state, research.train(trained, data(), epochs=2)[0])


def test_a_trace_is_written_even_if_training_stops_before_its_last_step(tmp_path: Path) -> None:
    stops = iter([False, False, True])
    with trace_steps(tmp_path, 2, 9) as hooks, pytest.raises(Stopped):
        research.train(learner(), data(), epochs=2, hooks=hooks, stop=lambda: next(stops))
    assert traced_steps(tmp_path)[0] == 1


@pytest.mark.parametrize(("first", "last"), [(0, 3), (5, 4)])
def test_an_empty_range_of_steps_is_rejected(first: int, last: int) -> None:
    with pytest.raises(research.InvalidArgument, match=f"steps {first} to {last}"), trace_steps(Path("profile"), first, last):
        pass


def test_the_users_compiler_flags_follow_the_recommended_ones_and_override_them() -> None:
    user_flags = ["--xla_dump_to=dump", "--xla_gpu_enable_latency_hiding_scheduler=false"]
    environment = {"XLA_FLAGS": " ".join(user_flags)}
    add_recommended_flags(environment)
    assert environment["XLA_FLAGS"].split() == [*RECOMMENDED_FLAGS["XLA_FLAGS"], *user_flags]
