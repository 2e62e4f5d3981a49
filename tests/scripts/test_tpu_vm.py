"""scripts/pods/tpu_vm.sh, on a simulated Cloud TPU slice."""

import re
import shutil
import subprocess
from typing import Any

import pytest
from cluster import GCLOUD, ODD, PODS, World, eventually, executable, git, one_line, run_line


@pytest.mark.parametrize("arguments", [[], ["--help"], ["keep", "--help"], ["create", "--name", "a", "-h"]])
def test_help_is_printed_wherever_the_option_stands(world: World, arguments: list[str]) -> None:
    done = run_line([str(PODS / "tpu_vm.sh"), *arguments], world.environment, world.fake)
    assert done.returncode == 0
    assert "commands\n  create " in done.stdout


def test_every_option_and_command_is_in_the_help() -> None:
    text = (PODS / "tpu_vm.sh").read_text()
    help_text, _, code = text.partition("\nTEXT\n")
    (commands,) = re.findall(r"^  (create \| .*)\) shift", code, re.MULTILINE)
    options = re.findall(r"(?<=[ |(])--[a-z-]+(?= \||\) )", code.partition("while [")[2])
    assert len(options) > 12
    assert not [option for option in options if f"\n  {option}" not in help_text and option != "--help"]
    assert not [command for command in commands.split(" | ") if f"\n  {command} " not in help_text]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["crate"], "no command 'crate'"),
        (["create", "--zone", "z"], "--name is missing"),
        (["create", "--name", "n"], "--zone is missing"),
        (["create", "--name", "n", "--zone", "z", "--version", "v"], "--type is missing"),
        (["create", "--name", "n", "--zone", "z", "--type", "t"], "--version is missing"),
        (["create", "--name"], "--name: a value is missing"),
        (["create", "--nmae", "n"], "no option '--nmae'"),
        (["setup", "--name", "n", "--zone", "z"], "--nfs or --bucket is missing"),
        (["setup", "--name", "n", "--zone", "z", "--nfs", "a:/b", "--bucket", "c"], "expected one of them"),
        (["run", "--name", "n", "--zone", "z"], "the experiment is missing"),
        (["run", "--name", "n", "--zone", "z", "--", "digits", "--run-dir", "x"], "--run-dir is given by --run"),
        (["delete", "--name", "n", "--zone", "z", "--", "digits"], "delete takes nothing after --"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(world: World, arguments: list[str], reason: str) -> None:
    done = run_line([str(PODS / "tpu_vm.sh"), *arguments], world.environment, world.fake)
    assert done.returncode == 2
    assert one_line(done.stderr)
    assert reason in done.stderr
    assert world.calls() == []


def test_create_passes_the_options_on_and_waits_until_the_slice_is_ready(world: World) -> None:
    world.states("CREATING", "READY")
    done = world.tpu("create", "--spot", "--project=mine")
    assert done.returncode == 0, done.stderr
    create, *looks = world.calls()
    words = ["slice", "--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite", "--spot"]
    assert create == ["compute", "tpus", "tpu-vm", "create", *words, "--zone=here-a", "--project=mine"]
    assert [call[3] for call in looks] == ["describe", "describe"]


def test_a_queued_slice_is_waited_for_in_the_queue(world: World) -> None:
    world.states("NONE", "NONE", "CREATING", "READY")
    world.states("WAITING_FOR_RESOURCES", "PROVISIONING", of="queued-resources")
    done = world.tpu("create", "--queued", "--spot")
    assert done.returncode == 0, done.stderr
    words = ["slice", "--node-id=slice", "--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert world.calls()[0] == ["compute", "tpus", "queued-resources", "create", *words, "--zone=here-a"]
    assert [call[2] for call in world.calls()[1:]] == ["tpu-vm", "queued-resources"] * 2 + ["tpu-vm"] * 2


def test_a_failed_request_for_a_slice_is_reported_in_one_line(world: World) -> None:
    world.states("NONE")
    world.states("WAITING_FOR_RESOURCES", "FAILED", of="queued-resources")
    done = world.tpu("create", "--queued")
    assert done.returncode == 1
    assert "its state is FAILED" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the slice slice was not given")


def test_a_slice_whose_state_is_unknown_is_not_created_again(world: World) -> None:
    world.states("DENIED")
    done = world.tpu("keep", "--", "digits")
    assert done.returncode == 1
    assert "PERMISSION_DENIED" in done.stderr
    assert world.verbs() == []


def test_setup_installs_the_commit_the_pinned_packages_and_the_storage_on_every_worker(ready: World) -> None:
    for worker in ready.workers:
        assert git(worker / "research", "rev-parse", "HEAD") == git(ready.checkout, "rev-parse", "HEAD")
        assert (worker / "research" / "research" / "__main__.py").read_text() == "print('first')\n"
        assert "pip install --quiet --python .venv/bin/python -c constraints.txt -e .[tpu]" in (worker / "uv").read_text()
        assert "sudo mount -t nfs 10.0.0.2:/share /mnt/runs" in (worker / "others").read_text()


def test_setup_with_a_bucket_mounts_it_without_caches_of_names(world: World) -> None:
    script = world.checkout / "scripts" / "pods" / "tpu_vm.sh"
    given = ["--name", "slice", "--zone", "here-a", "--bucket", "my bucket"]
    done = run_line([str(script), "setup", *given], world.environment, world.fake)
    assert done.returncode == 0, done.stderr
    for worker in world.workers:
        *_, mounted = (worker / "others").read_text().splitlines()
        flags = "--implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0"
        assert mounted == f"gcsfuse {flags} my bucket /mnt/runs"


def test_a_second_setup_installs_the_new_commit_and_removes_the_old_files(ready: World) -> None:
    (ready.checkout / "research" / "__main__.py").write_text("print('second')\n")
    (ready.checkout / "new.py").touch()
    done = ready.tpu("setup", "--dirty")
    assert done.returncode == 0, done.stderr
    git(ready.checkout, "commit", "--quiet", "--all", "--message", "second")
    (ready.checkout / "new.py").unlink()
    done = ready.tpu("setup")
    assert done.returncode == 0, done.stderr
    for worker in ready.workers:
        assert (worker / "research" / "research" / "__main__.py").read_text() == "print('second')\n"
        assert not (worker / "research" / "new.py").exists()
        assert git(worker / "research", "status", "--porcelain") == ""
        assert (worker / "uv").read_text().count("venv --quiet") == 1


def test_uncommitted_changes_are_rejected(world: World) -> None:
    (world.checkout / "new.py").write_text("x = 1\n")
    done = world.tpu("setup")
    assert done.returncode == 1
    assert one_line(done.stderr)
    assert "--dirty" in done.stderr
    assert world.calls() == []


def test_dirty_includes_changes_and_new_files_and_leaves_the_index_alone(world: World) -> None:
    (world.checkout / "research" / "__main__.py").write_text("print('changed')\n")
    (world.checkout / "new file.py").write_text("x = 1\n")
    before = git(world.checkout, "status", "--porcelain")
    done = world.tpu("setup", "--dirty")
    assert done.returncode == 0, done.stderr
    assert git(world.checkout, "status", "--porcelain") == before
    for worker in world.workers:
        assert (worker / "research" / "research" / "__main__.py").read_text() == "print('changed')\n"
        assert (worker / "research" / "new file.py").read_text() == "x = 1\n"
        assert "new file.py" in git(worker / "research", "diff", "HEAD", "--name-only")  # so it is in the run's source.diff
        assert git(worker / "research", "rev-parse", "HEAD") == git(world.checkout, "rev-parse", "HEAD")


@pytest.mark.slow
def test_every_worker_gets_the_arguments_unchanged(ready: World) -> None:
    assert ready.tpu("run", "--run=its name", "--", "digits", *ODD).returncode == 0
    assert ready.tpu("follow").returncode == 0
    assert ready.arguments() == [["-m", "research", "run", "digits", *ODD, "--run-dir", "/mnt/runs/its name"]] * 2


@pytest.mark.sample(4)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((1, 75), 1),
        ((75, 1), 1),
        ((2, 2), 2),
        ((0, "killed"), 75),
        ((0, 75), 75),
        (("killed", 1), 75),
        ((134, 1), 1),
    ],
)
def test_the_exit_code_of_a_run_combines_those_of_all_workers(ready: World, codes: tuple[Any, Any], code: int) -> None:
    ready.codes(codes)
    assert ready.tpu("run", "--", "digits").returncode == 0
    done = ready.tpu("follow")
    assert done.returncode == code
    assert "worker says hello" in done.stdout


@pytest.mark.slow
def test_an_unreachable_worker_has_not_finished(ready: World) -> None:
    assert ready.tpu("run", "--", "digits").returncode == 0
    eventually((ready.workers[1] / "run" / "exit").exists)
    (ready.workers[1] / "unreachable").touch()
    assert ready.tpu("follow").returncode == 75


@pytest.mark.slow
def test_stop_lets_every_worker_save(ready: World) -> None:
    ready.codes(("waits", "waits"))
    assert ready.tpu("run", "--", "digits").returncode == 0
    eventually(lambda: all((worker / "up").exists() for worker in ready.workers))
    assert ready.tpu("stop").returncode == 0
    assert ready.tpu("follow").returncode == 75
    assert all((worker / "saved").exists() for worker in ready.workers)
    assert [(worker / "run" / "exit").read_text() for worker in ready.workers] == ["75\n", "75\n"]


def test_a_run_is_started_once_and_no_other_run_at_the_same_time(ready: World) -> None:
    ready.codes(("waits", "waits"))
    assert ready.tpu("run", "--", "digits").returncode == 0
    eventually(lambda: all((worker / "up").exists() for worker in ready.workers))
    again, other, anew = ready.tpu("run", "--", "digits"), ready.tpu("run", "--", "gan"), ready.tpu("setup")
    assert (again.returncode, again.stdout) == (0, "already running\n" * 2)
    assert other.returncode == 1
    assert "another run is going on" in other.stderr
    assert anew.stdout == "a run is going on: left as it is\n" * 2
    assert ready.tpu("stop").returncode == 0


@pytest.mark.slow
def test_keep_survives_a_preemption(world: World) -> None:
    world.states("NONE", "CREATING", "READY", "PREEMPTED", "READY")
    world.codes((75, "killed"), (0, 0))
    done = world.tpu("keep", "--spot", "--", "digits", *ODD)
    assert done.returncode == 0, done.stderr
    attempt = ["create", "scp", "ssh", "ssh", "ssh", "ssh"]  # set up, start, follow, how it ended
    assert world.verbs() == [*attempt, "delete", *attempt]
    assert "is PREEMPTED: it is deleted and requested again" in done.stderr
    assert world.arguments() == [["-m", "research", "run", "digits", *ODD, "--run-dir", "/mnt/runs/slice"]] * 2


@pytest.mark.slow
def test_keep_queues_a_new_request_when_the_slice_was_suspended(world: World) -> None:
    world.states("NONE", "NONE", "READY")
    world.states("SUSPENDED", "PROVISIONING", of="queued-resources")
    done = world.tpu("keep", "--queued", "--", "digits")
    assert done.returncode == 0, done.stderr
    assert world.verbs() == ["delete", "create", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert [call[2] for call in world.calls() if call[3] in ("delete", "create")] == ["queued-resources"] * 2


@pytest.mark.slow
def test_keep_starts_a_stopped_run_again_on_the_same_slice(world: World) -> None:
    world.codes((75, 75), (75, "killed"), (0, 0))
    assert world.tpu("keep", "--", "digits").returncode == 0
    assert world.verbs() == ["scp", "ssh", "ssh", "ssh", "ssh"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("codes", "code"), [((1, 75), 1), ((2, 2), 2)])
def test_keep_ends_with_a_run_that_fails(world: World, codes: tuple[int, int], code: int) -> None:
    world.codes(codes, (0, 0))
    assert world.tpu("keep", "--", "digits").returncode == code
    assert world.verbs() == ["scp", "ssh", "ssh", "ssh", "ssh"]


@pytest.mark.slow
def test_keep_continues_with_the_commit_that_it_started_with(world: World) -> None:
    first = git(world.checkout, "rev-parse", "HEAD")
    world.states("READY", "READY", "PREEMPTED", "READY")
    world.codes((75, 75), (0, 0))
    gcloud = world.fake / "bin" / "gcloud"
    # While the run goes on, its owner does: changes, and commits.
    commit = (
        f"[ \"$4\" != delete ] || (cd '{world.checkout}' && echo 'x = 1' >later.py && git add . && git {NOBODY} commit -qm later)"
    )
    executable(gcloud, GCLOUD.replace("\n", f"\n{commit}\n", 1))
    done = world.tpu("keep", "--", "digits")
    assert done.returncode == 0, done.stderr
    assert git(world.checkout, "rev-parse", "HEAD") != first
    assert [git(worker / "research", "rev-parse", "HEAD") for worker in world.workers] == [first, first]


NOBODY = "-c user.name=nobody -c user.email=nobody@localhost -c commit.gpgsign=false"


def test_keep_gives_up_after_so_many_tries(world: World) -> None:
    world.states("NONE")
    done = world.tpu("keep", "--tries=3", "--", "digits")
    assert done.returncode == 75
    assert world.verbs() == ["create"] * 3
    assert done.stderr.splitlines()[-1].startswith("error: the run is not done after 3 tries")


def test_keep_gives_up_when_workers_can_not_be_set_up(world: World) -> None:
    executable(world.fake / "bin" / "uv", "#!/bin/sh\necho 'uv: no such version' >&2\nexit 1\n")
    done = world.tpu("keep", "--", "digits")
    assert done.returncode == 1
    assert world.verbs() == ["scp", "ssh"] * 3
    assert "uv: no such version" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the workers of slice can't be set up")


def test_without_gcloud_nothing_is_started(world: World) -> None:
    for name in ("bash", "cat"):
        (world.fake / "few" / name).parent.mkdir(exist_ok=True)
        (world.fake / "few" / name).symlink_to(shutil.which(name) or "")
    few = {**world.environment, "PATH": str(world.fake / "few")}
    done = run_line([str(PODS / "tpu_vm.sh"), "delete", "--name", "slice", "--zone", "here-a"], few, world.fake)
    assert done.returncode == 1
    assert one_line(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["create", "setup", "run", "follow", "keep", "stop", "status", "fetch", "delete"])
def test_a_dry_run_prints_gcloud_commands_and_calls_none(world: World, command: str) -> None:
    experiment = ["--", "digits", *ODD] if command in ("run", "keep") else []
    done = world.tpu(command, "--dry-run", *experiment)
    assert done.returncode == 0, done.stderr
    assert world.calls() == []
    printed = [line for line in done.stdout.splitlines() if line.startswith("gcloud compute tpus ")]
    assert printed
    # What is printed is what would be run: a shell reads it back as the same words.
    subprocess.run(["bash", "-c", "\n".join(printed)], env=world.environment, cwd=world.fake, check=False, capture_output=True)
    verbs = {
        "create": ["create"],
        "setup": ["scp", "ssh"],
        "run": ["ssh"],
        "follow": ["ssh", "ssh"],
        "keep": ["create", "scp", "ssh", "ssh", "ssh", "ssh"],
        "stop": ["ssh"],
        "status": [],
        "fetch": ["scp"],
        "delete": ["delete"],
    }[command]
    assert world.verbs() == verbs
    assert all("--zone=here-a" in call for call in world.calls())


def test_fetch_copies_the_run_and_delete_deletes_the_slice(world: World) -> None:
    assert world.tpu("fetch", "--run", "its", "--to", "there", "--internal-ip").returncode == 0
    assert world.tpu("delete").returncode == 0
    assert world.tpu("delete", "--queued").returncode == 0
    assert [call[2:-1] for call in world.calls()] == [
        ["tpu-vm", "scp", "--recurse", "slice:/mnt/runs/its", "there", "--worker=0", "--internal-ip"],
        ["tpu-vm", "delete", "slice", "--quiet"],
        ["queued-resources", "delete", "slice", "--force", "--quiet"],
    ]
    assert (world.fake / "there").is_dir()
