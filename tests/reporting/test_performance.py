"""performance.jsonl goes on through kills and resumes: lost steps are no training, and time without a process is elapsed."""

from pathlib import Path

import pytest

from research.reporting import record, report, run_files
from research.reporting.performance import PerformanceRecorder


def test_goodput_is_that_of_the_complete_run_through_kills_and_resumes(tmp_path: Path) -> None:
    run = record.Run(tmp_path, "digits", {})
    first = PerformanceRecorder(run, batch_size=10, step=0, started=0.0)
    for step, now in ((1, 10.0), (101, 20.0), (201, 40.0), (201, 40.01), (301, 50.0)):
        first.log(step, waited=1.0, now=now)
    assert [line["step"] for line in first.lines] == [101, 201, 301]
    with first.path.open("a") as file:
        file.write('{"step": 401, "sta')  # killed; the last checkpoint is of step 201
    again = PerformanceRecorder(run, batch_size=10, step=201, started=90.0, best_step_seconds=0.05)
    again.log(202, waited=0.0, now=95.0)
    again.log(302, waited=0.5, now=105.0)
    lines = run_files.read_performance(tmp_path, pytest.fail)
    assert lines == again.lines
    assert [line["step"] for line in lines] == [101, 201, 302]
    assert [line["training_seconds"] for line in lines] == [10.0, 30.0, 40.0]
    assert [line["elapsed_seconds"] for line in lines] == [20.0, 40.0, 105.0]
    assert lines[-1]["goodput"] == 40 / 105
    assert lines[-1]["examples_per_second"] == 100.0
    assert lines[-1]["step_seconds"] == 0.1
    assert lines[-1]["seconds_waiting_for_data"] == 0.5
    assert lines[-1]["model_flops_utilization"] == 0.5


def test_lines_that_cannot_be_read_are_left_out_and_a_directory_in_the_way_is_set_aside(tmp_path: Path) -> None:
    run = record.Run(tmp_path, "digits", {})
    path = tmp_path / run_files.PERFORMANCE
    path.write_text('{"step": 1}\nnot JSON\n{"step": 9, "started": 1.0, "training_seconds": NaN}\n[]\n\n')
    assert run_files.read_performance(tmp_path, pytest.fail) == []
    assert PerformanceRecorder(run, 10, step=5, started=0.0).lines == []
    path.unlink()
    path.mkdir()
    record.start(run, {})
    assert not path.exists()


def test_the_report_shows_the_speed(tmp_path: Path) -> None:
    run = record.Run(tmp_path, "digits", {})
    record.start(run, {})
    assert "Speed" not in report.write_report(run).read_text()
    recorder = PerformanceRecorder(run, 10, step=0, started=0.0, device=lambda: {"device_bytes": 1e9})
    for step in range(1, 300, 50):
        recorder.log(step, waited=0.0, now=10.0 + step)
    assert 'alt="speed"' in report.write_report(run).read_text()
