"""`just scaling`: costs that grow with the number of chips show in its table and plot."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import scaling


def plan(topology: str, chips: int, **changes: Any) -> dict[str, Any]:
    return {
        "topology": topology,
        "mesh": {"data": chips // 8, "fsdp": 8},
        "chips": chips,
        "batch": 8 * chips,
        "fits": True,
        "hbm_gib": {"total": 2.0},
        "flops": 10**12,
        "collectives": {"all-gather": {"count": 3, "bytes": 4 * 10**8}, "all-reduce": {"count": 1, "bytes": 6 * 10**8}},
        "roofline": {"step": 0.5, "utilisation": 0.6},
        **changes,
    }


def test_costs_are_shown_relative_to_the_smallest_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, small = plan("v5p:4x8x8", 256, hbm_gib={"total": 3.0}, flops=2 * 10**12), plan("v5p:2x2x2", 8)
    for item in (large, small):
        directory = tmp_path / str(item["chips"])
        directory.mkdir()
        (directory / "plan.json").write_text(json.dumps(item))
    picture = tmp_path / "picture.png"
    assert scaling.main([str(tmp_path / "256"), str(tmp_path / "8"), "--picture", str(picture)]) == 0
    head, _, first, second, path = capsys.readouterr().out.splitlines()
    assert head.startswith("| topology | mesh | examples a chip | GiB | GB received |")
    assert first == "| v5p:2x2x2 | data=1,fsdp=8 | 8 | 2.00 (1.00) | 1.00 (1.00) | 1.00 (1.00) | 500.00 (1.00) | 60.0% |"
    assert second.startswith("| v5p:4x8x8 | data=32,fsdp=8 | 8 | 3.00 (1.50) | 1.00 (1.00) | 2.00 (2.00) |")
    assert path == str(picture)
    assert picture.stat().st_size > 10_000
    lines = scaling.plot([small, large]).axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[1, 1.5], [1, 1], [1, 2], [1, 1]]


def test_a_missing_plan_and_one_that_does_not_fit_are_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scaling.main([str(tmp_path)]) == 1
    (tmp_path / "plan.json").write_text(json.dumps(plan("v5e:2x4", 8, fits=False)))
    assert scaling.main([str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "expected a directory that `just plan` wrote" in first
    assert "does not fit" in second
