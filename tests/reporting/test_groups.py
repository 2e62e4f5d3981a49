"""Runs of one config with several seeds: what a comparison of them says is what SciPy computes from their metrics."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from research.reporting import comparison, groups, picture, record
from research.training.logs import LogEntry

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(0.5, 0.1, 6).tolist(), RNG.normal(0.8, 0.3, 4).tolist()


def write_run(directory: Path, config: dict[str, Any], losses: list[float], of_members: bool = False) -> record.Run:
    """A finished run with one loss, or one of a population."""
    directory.mkdir(parents=True)
    run, _ = record.open_run(directory, "toy", config)
    record.start(run, {})
    mean = sum(losses) / len(losses)
    record.append_entry(run, LogEntry(10, 0, "val", {"loss": mean}, {"loss": losses} if of_members else {}))
    members = {"members": [{"member": i, "rank": 1, "values": {}, "metrics": {"val_loss": x}} for i, x in enumerate(losses)]}
    record.write_summary(
        run, {"status": "finished", "steps": 10, "metrics": {"val_loss": mean}, **(members if of_members else {})}
    )
    return run


def solo_runs(root: Path) -> list[record.Run]:
    pairs = [(0.1, i, loss) for i, loss in enumerate(FIRST)] + [(0.2, i, loss) for i, loss in enumerate(SECOND)]
    return [write_run(root / f"{rate}-{seed}", {"rate": rate, "seed": seed}, [loss]) for rate, seed, loss in pairs]


def population_runs(root: Path) -> list[record.Run]:
    return [
        write_run(root / str(rate), {"rate": rate, "seed": 0, "population": len(losses), "vary": "seed"}, losses, True)
        for rate, losses in ((0.1, FIRST), (0.2, SECOND))
    ]


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of the table under a title."""
    table = text.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in table.split("<tr>")[1:]]


@pytest.mark.parametrize("write", [solo_runs, population_runs])
def test_a_comparison_has_the_means_intervals_and_welch_test_of_scipy(tmp_path: Path, write: Any) -> None:
    text = comparison.write_comparison(write(tmp_path), tmp_path / "all.html").read_text()
    means = cells(text, "Means")
    assert means[0] == ["", "val_loss ↓"]
    for row, rate, values in zip(means[1:], (0.1, 0.2), (FIRST, SECOND), strict=True):
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert row == [f"rate={rate}, {len(values)} seeds", f"{np.mean(values):.4g} ± {(high - low) / 2:.2g}"]
    test = stats.ttest_ind(SECOND, FIRST, equal_var=False)
    low, high = test.confidence_interval()
    expected = ["val_loss ↓", f"{np.mean(SECOND) - np.mean(FIRST):+.3g}", f"[{low:+.3g}, {high:+.3g}]", f"{test.pvalue:.2g}"]
    assert cells(text, "Difference")[1] == expected


def test_groups_are_drawn_by_their_mean_in_a_band_and_each_seed_as_a_thin_line(tmp_path: Path) -> None:
    runs = solo_runs(tmp_path)[: len(FIRST)]
    merged = groups.merge_entries([record.read_entries(run) for run in runs])
    assert merged == [LogEntry(10, 0, "val", {"loss": pytest.approx(np.mean(FIRST))}, {"loss": FIRST})]
    axes = picture.plot_comparison({"rate=0.1": merged}).axes[0]
    assert len(axes.collections) == 1
    assert len(axes.lines) == len(FIRST) + 1


def test_steps_that_not_all_runs_have_logged_are_left_out_of_the_mean() -> None:
    long, short = ([LogEntry(step, 0, "val", {"loss": 1.0}) for step in range(1, last)] for last in (4, 3))
    assert [entry.step for entry in groups.merge_entries([long, short])] == [1, 2]


def test_a_run_that_repeats_a_seed_is_not_another_seed(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, {"seed": 0}, [loss]) for name, loss in (("a", 0.5), ("b", 0.5))]
    text = comparison.write_comparison(runs, tmp_path / "all.html").read_text()
    assert "<h2>Means</h2>" not in text
    assert cells(text, "Results")[1:] == [["a", "0.5"], ["b", "0.5"]]


def test_a_repeated_seed_beside_others_is_in_the_table_and_in_the_curves(tmp_path: Path) -> None:
    losses = {"a": (0, 0.5), "b": (0, 0.5), "c": (1, 0.75)}
    runs = [write_run(tmp_path / name, {"seed": seed}, [loss]) for name, (seed, loss) in losses.items()]
    text = comparison.write_comparison(runs, tmp_path / "all.html").read_text()
    assert [row[0] for row in cells(text, "Means")[1:]] == ["toy (a, c), 2 seeds", "toy (b), 1 seed"]
    by_label = {run.directory.name: run for run in runs}
    found = groups.group_runs(by_label, {name: record.read_run(run.directory)[1] for name, run in by_label.items()})
    assert len(set(groups.names_of(found))) == len(found) == 2


def test_of_three_groups_there_are_means_but_no_test(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{rate}{seed}", {"rate": rate, "seed": seed}, [rate]) for rate in (1, 2, 3) for seed in (0, 1)]
    text = comparison.write_comparison(runs, tmp_path / "all.html").read_text()
    assert len(cells(text, "Means")) == 4
    assert "<h2>Difference</h2>" not in text


def test_seeds_without_a_finite_value_are_left_out(tmp_path: Path) -> None:
    losses = [0.5, float("nan"), 0.7]
    runs = [write_run(tmp_path / str(seed), {"seed": seed}, [loss]) for seed, loss in enumerate(losses)]
    runs[0].directory.joinpath("summary.json").write_text('{"status": "finished", "members": [3], "metrics": {"val_loss": 0.5}}')
    text = comparison.write_comparison(runs, tmp_path / "all.html").read_text()
    assert cells(text, "Means")[1][1].startswith("0.6 ±")
