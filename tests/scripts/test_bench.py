"""The benchmark: its statistics are correct, its systems train the same thing, and it resumes."""

import doctest
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import slow_after_first

ROOT = Path(__file__).parents[2]
SYSTEMS = (
    "research research-fit research-unfused research-reordered jax-scan jax-loop "
    "keras-jax keras-jax-32 keras-tensorflow keras-torch torch flax-nnx"
)
WORKLOADS = "digits-mlp-32 mlp-32 mlp-256 convnet-64 gan-64 tickets-128 gpt-16 stream"


def load(name: str) -> Any:
    if str(ROOT / "scripts" / "benchmarks") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def results() -> Any:
    return load("results")


@pytest.fixture(scope="module")
def workloads() -> Any:
    return load("workloads")


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    script = [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_all_systems_and_workloads_of_the_contract_exist(results: Any, workloads: Any) -> None:
    assert set(load("systems").SYSTEMS) == set(SYSTEMS.split())
    assert set(workloads.WORKLOADS) == set(WORKLOADS.split())
    for system in load("systems").SYSTEMS.values():
        assert (ROOT / "scripts" / "benchmarks" / f"{system.module}.py").exists()
    for work in workloads.WORKLOADS.values():
        assert work.examples % work.batch_size == 0
    for module in (results, workloads):
        tests = doctest.testmod(module)
        assert (tests.failed, tests.attempted > 0) == (0, True)


@pytest.mark.parametrize("name", slow_after_first(WORKLOADS.split()))
def test_the_data_is_deterministic_and_read_as_it_was_written(workloads: Any, name: str, tmp_path: Path) -> None:
    workloads.write(name, tmp_path)
    arrays, read = workloads.arrays(name), workloads.read(name, tmp_path)
    assert set(arrays) == set(read)
    for key, array in arrays.items():
        assert len(array) == workloads.WORKLOADS[name].examples
        assert (read[key] == array).all()


def test_the_interval_contains_the_median_with_95_percent_confidence_for_any_noise(results: Any) -> None:
    for n in range(6, 31):
        low, middle, high = results.interval([float(i) for i in range(1, n + 1)])
        below = int(low) - 1  # the number of values below the interval, and of those above it
        assert high == n - below
        assert middle == (n + 1) / 2

        def outside(ranks: int, n: int = n) -> float:
            """Returns the probability that the median lies outside the interval that leaves out `ranks` values on each side."""
            return 2 * sum(math.comb(n, k) for k in range(ranks + 1)) / 2**n

        assert outside(below) <= 0.05 < outside(below + 1)
    assert results.interval([3.0]) == [3.0, 3.0, 3.0]


def test_ratios_are_computed_within_each_round(results: Any) -> None:
    times = {"research": [1.0, 2.0, 4.0], "jax-scan": [1.0, 1.0, 4.0], "keras-jax": [3.0, 4.0, 20.0], "torch": [2.0, 5.0, 8.0]}
    ratios = results.ratios([{"system": system, "us_per_step": {"rounds": rounds}} for system, rounds in times.items()])
    assert ratios["ours_over_floor"] == [1.0, 1.0, 2.0]
    assert ratios["keras_over_ours"] == [2.0, 3.0, 5.0]
    assert (ratios["fastest_peer"], ratios["fastest_peer_over_ours"]) == ("keras-jax", [2.0, 3.0, 5.0])
    assert "keras32_over_ours" not in ratios


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_figure_has_a_panel_for_each_workload_and_a_point_for_each_system(results: Any, count: int) -> None:
    names, systems = WORKLOADS.split()[:count], ["research", "jax-scan"]
    rows = [
        {"workload": name, "system": system, "us_per_step": {"rounds": [1.0, 2.0]}, "peak_mb_over_imports": 1.0}
        for name in names
        for system in systems
    ]
    figure = results.figure({"config": {"systems": systems}, "ratios": {name: {} for name in names}, "rows": rows})
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == names
    for axes in panels:
        assert sum(line.get_marker() == "o" for line in axes.lines) == len(systems)


@pytest.mark.complete
@pytest.mark.slow
def test_it_measures_writes_and_resumes(tmp_path: Path) -> None:
    options = ["--systems", "research", "jax-scan", "keras-jax", "--rounds", "2", "--seconds", "0.05", "--sessions", "1"]
    arguments = ["digits-mlp-32", *options, "--run-dir", "run"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bench = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert {(row["workload"], row["system"]) for row in bench["rows"]} == {
        ("digits-mlp-32", system) for system in ("research", "jax-scan", "keras-jax")
    }
    losses = []
    for row in bench["rows"]:
        times = row["us_per_step"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
        assert row["seconds_to_first_step"] > 0
        assert row["peak_mb_over_imports"] > 0
        losses.append(row["logs"]["loss"])
    assert max(losses) < math.log(10)  # of one epoch at least; before training it is ln 10
    assert bench["machine"]["cpus"] == os.cpu_count()
    assert set(bench["ratios"]["digits-mlp-32"]) >= {"ours_over_floor", "keras_over_ours", "fastest_peer"}
    assert "digits-mlp-32" in (tmp_path / "run" / "bench.md").read_text()
    assert (tmp_path / "run" / "bench.png").stat().st_size > 10_000
    assert not list((tmp_path / "run").glob("*.log"))
    again = command(*arguments, cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "bench.json").read_text()) == bench
    assert "first epoch" not in again.stdout
    other = command("digits-mlp-32", "--rounds", "3", *options[:4], "--run-dir", "run", cwd=tmp_path)
    assert (other.returncode, "other options" in other.stderr) == (1, True)


@pytest.mark.parametrize(("arguments", "error"), [(["nothing"], "no workload 'nothing'"), (["--systems", "x"], "no system 'x'")])
def test_an_unknown_workload_or_system_is_wrong_usage(arguments: list[str], error: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == 1
