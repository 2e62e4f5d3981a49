"""scripts/pods/slurm.sh, on a simulated SLURM cluster."""

import re
from typing import Any

import pytest
from cluster import ODD, PODS, World, one_line


def requeued(world: World) -> bool:
    path = world.fake / "scontrol"
    assert not path.exists() or path.read_text() == "requeue 42\n"
    return path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codes", "code", "again"),
    [
        ((0, 0), 0, False),
        ((75, 75), 0, True),
        ((75, 0), 0, True),
        ((1, "waits"), 1, False),  # srun says 137 of it
        (("waits", 2), 2, False),
        ((75, 1), 1, False),
        (("killed", "waits"), 0, True),
        ((0, 139), 0, True),
        (("killed", 1), 0, True),  # the second because of the first
        ((134, 1), 1, False),  # the first because of the second
    ],
)
def test_a_job_is_requeued_when_it_stopped_or_died_and_not_when_it_failed(
    world: World, codes: tuple[Any, Any], code: int, again: bool
) -> None:
    world.codes(codes)
    done = world.slurm("digits")
    assert (done.returncode, requeued(world)) == (code, again), done.stderr
    assert not list(world.checkout.glob("runs/.slurm/*"))


@pytest.mark.slow
def test_a_task_that_stops_first_does_not_kill_the_others(world: World) -> None:
    world.codes((75, "saves"))
    assert world.slurm("digits").returncode == 0
    assert (world.workers[1] / "saved").exists()
    assert requeued(world)


def test_slurms_signal_reaches_the_process_of_a_task_which_waits_for_its_end(world: World) -> None:
    (world.fake / "signal").touch()
    world.codes(("waits", "waits"))
    done = world.slurm("digits")
    assert done.returncode == 0, done.stderr
    assert all((worker / "saved").exists() for worker in world.workers)
    assert requeued(world)
    assert "because of" not in done.stderr  # none of them died


def test_deaths_are_restarted_so_many_times_and_stops_always(world: World) -> None:
    world.codes(("killed", "waits"))
    done = world.slurm("digits", SLURM_RESTART_COUNT="10")
    assert (done.returncode, requeued(world)) == (1, False)
    assert done.stderr.splitlines()[-1].startswith("error: task 0 (137), task 1 (lost) died")
    world.codes((75, 75))
    assert world.slurm("digits", SLURM_RESTART_COUNT="10").returncode == 0
    assert requeued(world)


def test_a_job_that_can_not_be_requeued_reports_how_to_continue(world: World) -> None:
    (world.fake / "refused").touch()
    world.codes((75, 75))
    done = world.slurm("digits")
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1].endswith("submit it again with --run-dir runs/slurm/research-42.")


def test_a_requeued_job_continues_the_same_run_with_the_same_arguments(world: World) -> None:
    world.codes((75, 75), (0, 0))
    expected = [["-m", "research", "run", "digits", *ODD, "--run-dir", "runs/slurm/research-42"]] * 2
    assert world.slurm("digits", *ODD).returncode == 0
    assert world.arguments() == expected
    assert world.slurm("digits", *ODD, SLURM_RESTART_COUNT="1").returncode == 0
    assert world.arguments() == expected


@pytest.mark.parametrize("given", [["--run-dir", "mine"], ["--run-dir=mine"]])
def test_an_explicit_run_directory_is_used(world: World, given: list[str]) -> None:
    assert world.slurm("digits", *given).returncode == 0
    assert world.arguments() == [["-m", "research", "run", "digits", *given]] * 2


def test_srun_ends_a_step_when_a_task_dies(world: World) -> None:
    assert world.slurm("digits").returncode == 0
    assert "--kill-on-bad-exit=1" in (world.fake / "srun").read_text().split("\0")


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "reason"),
    [
        ([], {}, 2, "the experiment is missing"),
        (["digits"], {"SLURM_JOB_ID": ""}, 2, "no SLURM job"),
        (["digits"], {"SLURM_SUBMIT_DIR": "/"}, 1, "no checkout with its .venv"),
        (["digits"], {"SLURM_GPUS_PER_TASK": "1"}, 2, "--gpus-per-task hides"),
    ],
)
def test_an_impossible_job_is_rejected_in_one_line(
    world: World, arguments: list[str], environment: dict[str, str], code: int, reason: str
) -> None:
    done = world.slurm(*arguments, **environment)
    assert done.returncode == code
    assert one_line(done.stderr)
    assert reason in done.stderr
    assert not (world.fake / "srun").exists()


def test_sbatch_signals_the_tasks_in_time_and_appends_to_one_log() -> None:
    directives = re.findall(r"^#SBATCH (\S+)", (PODS / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--output=%x-%j.out"} <= set(directives)
    (at,) = [re.fullmatch(r"--signal=TERM@(\d+)", option) for option in directives if option.startswith("--signal")]
    assert at is not None  # B: would tell the script alone
    assert int(at[1]) >= 60
    head = (PODS / "slurm.sh").read_text().partition("set -euo")[0]
    assert not [line for line in head.splitlines() if line and not line.startswith("#")]  # sbatch reads up to the first command
