"""Budgets: the compiled step of no experiment becomes more expensive unnoticed."""

import json
from pathlib import Path
from typing import Any

import pytest
from plan_cases import ROOT, needs_libtpu, run_process

ACCEPT = "if that is intended: just plan --budget"


@needs_libtpu
@pytest.mark.slow
def test_no_experiment_exceeds_its_budget(tmp_path: Path) -> None:
    done = run_process("--budget", "--run-dir", "now", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    now = json.loads((tmp_path / "now" / "budgets.json").read_text())["experiments"]
    budgets = json.loads((ROOT / "tests" / "budgets.json").read_text())["experiments"]
    increases = list_increases(budgets, now)
    assert not increases, "\n".join(increases)


def list_increases(budgets: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a line for each cost that grew by more than 2%."""
    lines = [f"{name} has no budget; {ACCEPT}" for name in now if name not in budgets]
    known = [(name, mesh) for name, meshes in now.items() if name in budgets for mesh in meshes]
    for name, mesh in known:
        before, after = flatten(budgets[name].get(mesh, {})), flatten(now[name][mesh])
        for cost, number in after.items():
            if number > 1.02 * before.get(cost, 0):
                lines.append(f"{name} on {mesh}: {cost} grew from {before.get(cost, 0):,} to {number:,}; {ACCEPT}")
    return lines


def flatten(costs: dict[str, Any]) -> dict[str, int]:
    traffic = {f"{name} ({part})": n for name, parts in costs.get("collectives", {}).items() for part, n in parts.items()}
    return {**traffic, **{name: costs[name] for name in ("temporaries", "flops") if name in costs}}


def test_an_increase_is_reported_by_name_with_how_to_accept_it() -> None:
    budgets = {
        "digits": {"data=8": {"collectives": {"all-reduce": {"count": 2, "bytes": 1000}}, "temporaries": 100, "flops": 10}}
    }
    now = {
        "digits": {"data=8": {"collectives": {"all-reduce": {"count": 2, "bytes": 1021}}, "temporaries": 102, "flops": 9}},
        "new": {},
    }
    assert list_increases(budgets, now) == [
        "new has no budget; if that is intended: just plan --budget",
        "digits on data=8: all-reduce (bytes) grew from 1,000 to 1,021; if that is intended: just plan --budget",
    ]
    assert list_increases(budgets, budgets) == []
