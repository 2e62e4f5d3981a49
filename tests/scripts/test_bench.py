"""The benchmark: its figures are what it says they are, its systems train the same thing, and it goes on where it stopped."""

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
from cases import first_quick

ROOT = Path(__file__).parent.parent
SYSTEMS = (
    "research research-fit research-unfused research-reordered jax-scan jax-loop "
    "keras-jax keras-jax-32 keras-tensorflow keras-torch torch flax-nnx"
)
WORKLOADS = "digits-mlp-32 mlp-32 mlp-256 convnet-64 gan-64 tickets-128 gpt-16 stream"


@pytest.fixture(scope="module")
def bench() -> Any:
    for folder in ("scripts", "scripts/benchmarks"):
        sys.path.insert(0, str(ROOT / folder))
    return importlib.import_module("bench")


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    script = [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_there_are_all_the_systems_and_workloads_that_others_rely_on(bench: Any) -> None:
    assert set(bench.TITLES) == set(bench.worker.SYSTEMS) == set(bench.NEEDS) == set(SYSTEMS.split())
    assert set(bench.workloads.WORKLOADS) == set(WORKLOADS.split())
    for work in bench.workloads.WORKLOADS.values():
        assert work.examples % work.batch_size == 0
    for module in (bench, bench.workloads):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", first_quick(WORKLOADS.split()))
def test_data_is_the_same_each_time_and_read_as_written(bench: Any, name: str, tmp_path: Path) -> None:
    bench.workloads.write(name, tmp_path)
    made, read = bench.workloads.arrays(name), bench.workloads.read(name, tmp_path)
    assert set(made) == set(read)
    for part, array in made.items():
        assert len(array) == bench.workloads.WORKLOADS[name].examples
        assert (read[part] == array).all()


def test_the_interval_holds_the_median_with_95_percent_whatever_the_noise(bench: Any) -> None:
    for n in range(6, 31):
        low, middle, high = bench.interval([float(i) for i in range(1, n + 1)])
        below = int(low) - 1  # values under the interval, as many as over it
        assert high == n - below
        assert middle == (n + 1) / 2

        def outside(ranks: int, n: int = n) -> float:
            """The probability that the median lies below the smallest or above the largest but so many values."""
            return 2 * sum(math.comb(n, k) for k in range(ranks + 1)) / 2**n

        assert outside(below) <= 0.05 < outside(below + 1)
    assert bench.interval([3.0]) == [3.0, 3.0, 3.0]


def test_ratios_are_taken_round_by_round(bench: Any) -> None:
    times = {"research": [1.0, 2.0, 4.0], "jax-scan": [1.0, 1.0, 4.0], "keras-jax": [3.0, 4.0, 20.0], "torch": [2.0, 5.0, 8.0]}
    found = bench.ratios([{"system": system, "us_per_step": {"rounds": rounds}} for system, rounds in times.items()])
    assert found["ours_over_floor"] == [1.0, 1.0, 2.0]
    assert found["keras_over_ours"] == [2.0, 3.0, 5.0]
    assert (found["fastest_peer"], found["fastest_peer_over_ours"]) == ("keras-jax", [2.0, 3.0, 5.0])
    assert "keras32_over_ours" not in found


@pytest.mark.parametrize("count", [1, 3, 8])
def test_each_workload_has_its_panel_and_each_system_its_point(bench: Any, count: int) -> None:
    names, systems = WORKLOADS.split()[:count], ["research", "jax-scan"]
    rows = [
        {"workload": name, "system": system, "us_per_step": {"rounds": [1.0, 2.0]}, "peak_mb_over_imports": 1.0}
        for name in names
        for system in systems
    ]
    drawn = bench.picture({"config": {"systems": systems}, "ratios": {name: {} for name in names}, "rows": rows})
    panels = [axes for axes in drawn.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == names
    for axes in panels:
        assert sum(line.get_marker() == "o" for line in axes.lines) == len(systems)


@pytest.mark.slow
def test_it_measures_writes_and_goes_on(tmp_path: Path) -> None:
    options = ["--systems", "research", "jax-scan", "keras-jax", "--rounds", "2", "--seconds", "0.05", "--sittings", "1"]
    arguments = ["digits-mlp-32", *options, "--run-dir", "run"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert {(row["workload"], row["system"]) for row in found["rows"]} == {
        ("digits-mlp-32", system) for system in ("research", "jax-scan", "keras-jax")
    }
    losses = []
    for row in found["rows"]:
        times = row["us_per_step"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
        assert row["seconds_to_first_step"] > 0
        assert row["peak_mb_over_imports"] > 0
        losses.append(row["logs"]["loss"])
    assert max(losses) < 2.0  # ln 10 is what it starts from
    assert found["machine"]["cpus"] == os.cpu_count()
    assert set(found["ratios"]["digits-mlp-32"]) >= {"ours_over_floor", "keras_over_ours", "fastest_peer"}
    assert "digits-mlp-32" in (tmp_path / "run" / "bench.md").read_text()
    assert (tmp_path / "run" / "bench.png").stat().st_size > 10_000
    assert not list((tmp_path / "run").glob("*.log"))
    again = command(*arguments, cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "bench.json").read_text()) == found
    assert "first epoch" not in again.stdout
    other = command("digits-mlp-32", "--rounds", "3", *options[:4], "--run-dir", "run", cwd=tmp_path)
    assert (other.returncode, "other options" in other.stderr) == (1, True)


@pytest.mark.parametrize(("arguments", "said"), [(["nothing"], "no workload 'nothing'"), (["--systems", "x"], "no system 'x'")])
def test_what_there_is_not_is_wrong_usage(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
