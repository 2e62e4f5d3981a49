"""Traces hold the steps that were asked for, and compilers are told what is advised unless a user says otherwise."""

import gzip
import json
from pathlib import Path

import pytest
from test_loop import data, learner, same

import research
from research.flags import ADVISED, advise
from research.loop import Stopped
from research.profiling import tracing


def steps(directory: Path) -> list[int]:
    """The first step of each dispatch in a trace."""
    (path,) = directory.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train" and "args" in event)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [(1, 2), (4, 4), (3, 7)])
def test_a_trace_holds_just_its_steps_and_changes_nothing(first: int, last: int, tmp_path: Path) -> None:
    made = learner()
    with tracing(tmp_path, first, last) as hooks:
        traced, _ = research.train(made, data(), epochs=2, hooks=hooks)
    found = steps(tmp_path)
    assert found[0] == first - 1
    assert found[-1] < last
    same(traced, research.train(made, data(), epochs=2)[0])


def test_a_trace_that_training_does_not_finish_is_kept(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    with tracing(tmp_path, 2, 9) as hooks, pytest.raises(Stopped):
        research.train(learner(), data(), epochs=2, hooks=hooks, stop=lambda: next(asked))
    assert steps(tmp_path)[0] == 1


@pytest.mark.parametrize(("first", "last"), [(0, 3), (5, 4)])
def test_a_trace_of_nothing_is_refused(first: int, last: int) -> None:
    with pytest.raises(research.Refused, match=f"steps {first} to {last}"), tracing(Path("there"), first, last):
        pass


def test_what_a_user_tells_a_compiler_comes_last_and_counts() -> None:
    own = ["--xla_dump_to=there", "--xla_gpu_enable_latency_hiding_scheduler=false"]
    environment = {"XLA_FLAGS": " ".join(own)}
    advise(environment)
    assert environment["XLA_FLAGS"].split() == [*ADVISED["XLA_FLAGS"], *own]
