"""Searches: the ranking, the trials that are skipped, and the largest batch."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from plan_cases import MODELS, needs_libtpu, run_main

from research.planning import search

pytestmark = [needs_libtpu, pytest.mark.slow]


def test_a_search_ranks_what_fits_and_gives_the_reason_for_every_skipped_trial(
    libtpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first two trials are compiled in processes of their own, then the time is over."""
    run_trial, compiled = search.run_trial, []

    def run_two_trials(subject: Any, command: Any, trial: Any, seconds_left: float) -> dict[str, Any]:
        if len(compiled) == 2:
            return {"skipped": "no time left"}
        compiled.append(trial)
        return run_trial(subject, command, trial, seconds_left)

    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    monkeypatch.setattr(search, "run_trial", run_two_trials)
    arguments = "--builder models:compiled --topology v5e:2x2 --batch-size 6 --search --run-dir here"
    assert run_main(monkeypatch, *arguments.split()) == 0
    results = json.loads((tmp_path / "here" / "search.json").read_text())["tried"]
    assert len(results) == 6 * 3
    assert [result.get("fits") for result in results] == [True, True] + [None] * 16
    assert results[0]["examples_per_second"] >= results[1]["examples_per_second"] > 0
    unsplit = [result for result in results if result["batch"] == 6 and "tensor" not in result["mesh"]]
    assert {result["skipped"] for result in unsplit} == {"6 examples do not divide into 4 parts"}


def test_a_search_without_time_skips_every_trial(
    libtpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    assert run_main(monkeypatch, *f"digits --topology v5e:2x4 --search --minutes 0 --run-dir {tmp_path}".split()) == 1
    assert "error: --search: none of the trials fits" in capsys.readouterr().err
    reasons = {result["skipped"] for result in json.loads((tmp_path / "search.json").read_text())["tried"]}
    assert "no time left" in reasons


@pytest.mark.parametrize(("largest", "expected"), [(37, "296 examples fit; 304 do not"), (1 << 21, "more were not tried")])
def test_the_largest_batch_is_found_by_bisection(
    largest: int, expected: str, libtpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    batches = []

    def run_trial(subject: Any, command: Any, trial: Any, seconds_left: float) -> dict[str, Any]:
        batches.append(trial.batch)
        return {"fits": trial.batch <= 8 * largest, "gib": 1.0, "limit": 2.0}

    monkeypatch.setattr(search, "run_trial", run_trial)
    arguments = f"digits --topology v5e:2x4 --mesh data=2,fsdp=4 --max-batch --run-dir {tmp_path}"
    assert run_main(monkeypatch, *arguments.split()) == 0
    assert expected in capsys.readouterr().out
    assert len(batches) < 25
    assert len(json.loads((tmp_path / "search.json").read_text())["tried"]) == len(batches)


def test_a_batch_that_can_not_be_compiled_ends_the_search_with_the_largest_that_fits(
    libtpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def run_trial(subject: Any, command: Any, trial: Any, seconds_left: float) -> dict[str, Any]:
        return {"fits": True, "gib": 1.0, "limit": 2.0} if trial.batch <= 16 else {"skipped": "the compiler fails"}

    monkeypatch.setattr(search, "run_trial", run_trial)
    arguments = f"digits --topology v5e:2x4 --mesh data=2,fsdp=4 --max-batch --run-dir {tmp_path}"
    assert run_main(monkeypatch, *arguments.split()) == 1
    assert "error: --max-batch: 32 examples: the compiler fails; 16 fit;" in capsys.readouterr().err
    assert [result["batch"] for result in json.loads((tmp_path / "search.json").read_text())["tried"]] == [8, 16, 32]


@pytest.mark.complete
def test_a_search_skips_trials_that_can_not_be_faster_or_fit(
    libtpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """Only two trials fit. One of them is as fast as the chips can be, so nothing after it is compiled."""
    trials = []

    def run_trial(subject: Any, command: Any, trial: Any, seconds_left: float) -> dict[str, Any]:
        trials.append(trial)
        slow = trial.axes == {"data": 2, "fsdp": 4}
        fits = slow or (trial.axes == {"data": 8} and trial.batch == 32 and trial.remat)
        refused = not fits and trial.axes != {"fsdp": 8}
        result = {"fits": fits, "gib": 1.0, "limit": 2.0, "compile_seconds": 0.0, "refused": refused}
        speed = {"examples_per_second": 1.0 if slow else 1e15, "step": 1.0, "utilisation": 1.0, "bound_by": "compute"}
        return {**result, **speed} if fits else result

    monkeypatch.setattr(search, "run_trial", run_trial)
    assert run_main(monkeypatch, *f"gpt --topology v5e:2x4 --batch-size 32 --search --run-dir {tmp_path}".split()) == 0
    results = json.loads((tmp_path / "search.json").read_text())["tried"]
    assert (results[0]["mesh"], results[0]["batch"], results[0]["remat"]) == ("data=8", 32, True)
    reasons = [result.get("skipped", "") for result in results]
    assert any(reason.startswith("at most ") for reason in reasons)
    assert "less did not fit" in reasons
    assert "fits without remat" in reasons
    refused = [trial for trial in trials if trial.axes not in ({"fsdp": 8}, {"data": 2, "fsdp": 4})]
    assert {(trial.batch, trial.remat) for trial in refused} == {(32, False), (32, True)}  # larger batches need more memory
    assert {trial.batch for trial in trials if trial.axes == {"fsdp": 8}} == {32, 64, 128}  # larger batches may fit
    assert {trial.remat for trial in trials if trial.axes == {"data": 2, "fsdp": 4}} == {False}
    assert len(trials) + sum(map(bool, reasons)) == len(results) == len(search.mesh_shapes(8)) * 3 * 2
    assert "a step at best, by mesh" in capsys.readouterr().out


@pytest.mark.parametrize(("annotation", "flag"), [("bool", ["--no-remat"]), ("bool | None", ["--remat", "False"])])
def test_a_trial_sets_the_mesh_the_batch_and_remat(annotation: str, flag: list[str]) -> None:
    config = dataclasses.make_dataclass("Config", [("remat", annotation, False)])()
    subject = search.Subject("mine", config, lambda: None)
    arguments = search._trial_arguments(subject, search.Trial({"data": 2, "fsdp": 4}, 64, False))
    assert arguments == ["--mesh", "data=2,fsdp=4", "--batch-size", "64", *flag]
