"""Launchers do what they say, seen from outside: their commands are stood in for, and what these are called with is recorded."""

import dataclasses
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from research import signals

ROOT = Path(__file__).parent.parent
PODS = ROOT / "scripts" / "pods"
SCRIPTS = ("tpu_vm.sh", "slurm.sh")
ODD = ("--note=two words, 'single' and \"double\"", "$HOME `date` \\ *", "two\nlines", "", "--mesh=data=-1")

# Records how it was called. `describe` tells one line of states after the other, the last for ever. What is run by ssh runs here,
# in a home for each worker, of which there are two; deleting the slice empties them.
GCLOUD = r"""#!/usr/bin/env bash
{ printf '%s\0' "$@"; printf '\036\0'; } >>"$FAKE/calls"
case "$3 $4" in
*describe)
  state=$(head -n 1 "$FAKE/$3")
  [ "$(wc -l <"$FAKE/$3")" = 1 ] || sed -i 1d "$FAKE/$3"
  [ "$state" != NONE ] || { echo 'ERROR: (gcloud) NOT_FOUND: Resource was not found' >&2; exit 1; }
  [ "$state" != DENIED ] || { echo 'ERROR: (gcloud) PERMISSION_DENIED' >&2; exit 1; }
  echo "$state" ;;
*delete) rm -rf "$FAKE"/worker-*/r* ;;
*scp)
  for word in "$@"; do [ ! -f "$word" ] || for home in "$FAKE"/worker-*; do cp "$word" "$home"; done; done ;;
*ssh)
  for word in "$@"; do case $word in --command=*) command=${word#*=} ;; --worker=*) worker=${word#*=} ;; esac; done
  [ "$worker" != all ] || worker='[01]'
  pids=()
  for home in "$FAKE"/worker-$worker; do
    [ ! -e "$home/unreachable" ] || { echo 'ssh: connect: timed out' >&2; exit 255; }
    (cd "$home" && HOME=$home exec bash -c "$command") &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  exit "${code:-0}" ;;
esac
"""

# The program that is started: records its arguments, then ends as the next line of `codes` says.
PYTHON = r"""#!/usr/bin/env bash
home=${FAKE_HOME:-$HOME}
printf '%s\0' "$@" >"$home/arguments"
echo "worker says hello"
code=$(head -n 1 "$home/codes")
sed -i 1d "$home/codes"
case $code in
waits) # until SIGTERM; then it saves, which takes a while
  trap 'sleep 0.5; touch "$home/saved"; exit 75' TERM
  touch "$home/up"
  while :; do sleep 0.05; done ;;
saves) sleep 1; touch "$home/saved"; exit 75 ;;
killed) kill -KILL $$ ;;
*) exit "$code" ;;
esac
"""

UV = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$HOME/uv"
if [ "$1" = venv ]; then mkdir -p .venv/bin && cp "$FAKE/python" .venv/bin/python; fi
"""

RECORDED = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >>"$HOME/others"
"""

# As many tasks as SLURM_NTASKS, each with a home. Of `srun --kill-on-bad-exit=1`: the first task that ends badly has the others
# killed, and the highest code counts. Where there is a file `signal`, TERM is sent to what was started and to no child of it,
# as SLURM does.
SRUN = r"""#!/usr/bin/env bash
{ printf '%s\0' "$@"; } >"$FAKE/srun"
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i FAKE_HOME=$FAKE/worker-$i setsid "$@" &
  pids+=($!)
done
if [ -e "$FAKE/signal" ]; then
  for ((i = 0; i < SLURM_NTASKS; i++)); do until [ -e "$FAKE/worker-$i/up" ]; do sleep 0.05; done; done
  kill -TERM "${pids[@]}"
fi
worst=0
for _ in "${pids[@]}"; do
  wait -n && code=0 || code=$?
  if [ "$code" -gt "$worst" ]; then worst=$code; fi
  if [ "$code" != 0 ]; then
    sleep 0.3 # it takes its time, as it does
    for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null; done
    worst=137
    break
  fi
done
exit "$worst"
"""

SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE/scontrol"
[ ! -e "$FAKE/refused" ]
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def git(directory: Path, *arguments: str) -> str:
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", directory, *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@dataclasses.dataclass
class World:
    """A checkout, two workers, and commands that stand in for those of a cluster."""

    fake: Path
    checkout: Path
    environment: dict[str, str]

    @property
    def workers(self) -> list[Path]:
        return [self.fake / f"worker-{i}" for i in range(2)]

    def codes(self, *attempts: tuple[Any, Any]) -> None:
        """How the program ends on both workers, at each attempt."""
        for worker, codes in zip(self.workers, zip(*attempts, strict=True), strict=True):
            (worker / "codes").write_text("".join(f"{code}\n" for code in codes))

    def states(self, *states: str, of: str = "tpu-vm") -> None:
        """What `describe` tells of the slice, or of the queued resource, one look after the other."""
        (self.fake / of).write_text("".join(f"{state}\n" for state in states))

    def arguments(self) -> list[list[str]]:
        return [(worker / "arguments").read_text().split("\0")[:-1] for worker in self.workers]

    def calls(self) -> list[list[str]]:
        """What gcloud was called with."""
        path = self.fake / "calls"
        return [call.split("\0")[:-1] for call in path.read_text().split("\x1e\0")[:-1]] if path.exists() else []

    def verbs(self) -> list[str]:
        return [call[3] for call in self.calls() if call[3] != "describe"]

    def slurm(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "research", "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(self.checkout)}
        # SLURM runs a copy of the script, from a directory of its own.
        shutil.copy(PODS / "slurm.sh", self.fake / "slurm_script")
        command = ["bash", str(self.fake / "slurm_script"), *arguments]
        return said(command, {**self.environment, **job, **environment}, self.checkout)

    def tpu(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        given = {"setup": NFS, "create": KIND, "keep": [*KIND, *NFS]}.get(command, [])
        script = self.checkout / "scripts" / "pods" / "tpu_vm.sh"
        line = [str(script), command, "--name", "slice", "--zone", "here-a", "--pause", "0", *given, *arguments]
        return said(line, self.environment, self.fake)


KIND = ["--type", "v5litepod-8", "--version", "v2-alpha-tpuv5-lite"]
NFS = ["--nfs", "10.0.0.2:/share"]


def said(command: list[str], environment: dict[str, str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    fake, checkout = tmp_path / "fake", tmp_path / "a checkout"
    for name, text in {"gcloud": GCLOUD, "uv": UV, "srun": SRUN, "scontrol": SCONTROL}.items():
        executable(fake / "bin" / name, text)
    for name in ("sudo", "mount.nfs", "gcsfuse"):
        executable(fake / "bin" / name, RECORDED)
    executable(fake / "bin" / "mountpoint", "#!/bin/sh\nexit 1\n")
    executable(fake / "python", PYTHON)
    executable(checkout / ".venv" / "bin" / "python", PYTHON)
    for name in SCRIPTS:
        executable(checkout / "scripts" / "pods" / name, (PODS / name).read_text())
    (checkout / "scripts" / "run.py").write_text("print('first')\n")
    (checkout / ".gitignore").write_text(".venv/\nruns/\n")
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "first")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_", "GIT_"))}
    made = World(fake, checkout, {**kept, "PATH": f"{fake / 'bin'}:{os.environ['PATH']}", "FAKE": str(fake), "HOME": str(fake)})
    for worker in made.workers:
        worker.mkdir()
    made.states("READY")
    made.codes((0, 0))
    yield made
    for pid in fake.glob("worker-*/run/pid"):
        subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], check=False, capture_output=True)


@pytest.fixture
def ready(world: World) -> World:
    """Workers that were set up."""
    done = world.tpu("setup")
    assert done.returncode == 0, done.stderr
    return world


def one_line(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")


def eventually(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_each_script(name: str) -> None:
    subprocess.run(["bash", "-n", PODS / name], check=True)
    assert os.access(PODS / name, os.X_OK)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("there is no shellcheck here")
    done = subprocess.run([shellcheck, PODS / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Cloud TPU VMs


@pytest.mark.parametrize("arguments", [[], ["--help"], ["keep", "--help"], ["create", "--name", "a", "-h"]])
def test_help_is_given_wherever_it_is_asked_for(world: World, arguments: list[str]) -> None:
    done = said([str(PODS / "tpu_vm.sh"), *arguments], world.environment, world.fake)
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
    ("arguments", "said_of_it"),
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
def test_wrong_usage_is_one_line_and_exit_code_2(world: World, arguments: list[str], said_of_it: str) -> None:
    done = said([str(PODS / "tpu_vm.sh"), *arguments], world.environment, world.fake)
    assert done.returncode == 2
    assert one_line(done.stderr)
    assert said_of_it in done.stderr
    assert world.calls() == []


def test_create_asks_for_what_was_said_and_waits_until_it_is_ready(world: World) -> None:
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


def test_a_slice_that_is_not_given_is_told_in_one_line(world: World) -> None:
    world.states("NONE")
    world.states("WAITING_FOR_RESOURCES", "FAILED", of="queued-resources")
    done = world.tpu("create", "--queued")
    assert done.returncode == 1
    assert "its state is FAILED" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the slice slice was not given")


def test_a_state_that_can_not_be_told_is_no_missing_slice(world: World) -> None:
    world.states("DENIED")
    done = world.tpu("keep", "--", "digits")
    assert done.returncode == 1
    assert "PERMISSION_DENIED" in done.stderr
    assert world.verbs() == []


def test_setup_brings_the_commit_the_pinned_packages_and_the_storage_to_every_worker(ready: World) -> None:
    for worker in ready.workers:
        assert git(worker / "research", "rev-parse", "HEAD") == git(ready.checkout, "rev-parse", "HEAD")
        assert (worker / "research" / "scripts" / "run.py").read_text() == "print('first')\n"
        assert "pip install --quiet --python .venv/bin/python -c constraints.txt -e .[tpu]" in (worker / "uv").read_text()
        assert "sudo mount -t nfs 10.0.0.2:/share /mnt/runs" in (worker / "others").read_text()


def test_setup_with_a_bucket_mounts_it_without_caches_of_names(world: World) -> None:
    script = world.checkout / "scripts" / "pods" / "tpu_vm.sh"
    given = ["--name", "slice", "--zone", "here-a", "--bucket", "my bucket"]
    done = said([str(script), "setup", *given], world.environment, world.fake)
    assert done.returncode == 0, done.stderr
    for worker in world.workers:
        *_, mounted = (worker / "others").read_text().splitlines()
        flags = "--implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0"
        assert mounted == f"gcsfuse {flags} my bucket /mnt/runs"


def test_setup_anew_brings_the_new_commit_and_nothing_of_the_old(ready: World) -> None:
    (ready.checkout / "scripts" / "run.py").write_text("print('second')\n")
    (ready.checkout / "new.py").touch()
    done = ready.tpu("setup", "--dirty")
    assert done.returncode == 0, done.stderr
    git(ready.checkout, "commit", "--quiet", "--all", "--message", "second")
    (ready.checkout / "new.py").unlink()
    done = ready.tpu("setup")
    assert done.returncode == 0, done.stderr
    for worker in ready.workers:
        assert (worker / "research" / "scripts" / "run.py").read_text() == "print('second')\n"
        assert not (worker / "research" / "new.py").exists()
        assert git(worker / "research", "status", "--porcelain") == ""
        assert (worker / "uv").read_text().count("venv --quiet") == 1


def test_what_is_not_committed_is_refused(world: World) -> None:
    (world.checkout / "new.py").write_text("x = 1\n")
    done = world.tpu("setup")
    assert done.returncode == 1
    assert one_line(done.stderr)
    assert "--dirty" in done.stderr
    assert world.calls() == []


def test_dirty_takes_changes_and_new_files_along_and_leaves_the_index_alone(world: World) -> None:
    (world.checkout / "scripts" / "run.py").write_text("print('changed')\n")
    (world.checkout / "new file.py").write_text("x = 1\n")
    before = git(world.checkout, "status", "--porcelain")
    done = world.tpu("setup", "--dirty")
    assert done.returncode == 0, done.stderr
    assert git(world.checkout, "status", "--porcelain") == before
    for worker in world.workers:
        assert (worker / "research" / "scripts" / "run.py").read_text() == "print('changed')\n"
        assert (worker / "research" / "new file.py").read_text() == "x = 1\n"
        assert "new file.py" in git(worker / "research", "diff", "HEAD", "--name-only")  # so it is in the run's source.diff
        assert git(worker / "research", "rev-parse", "HEAD") == git(world.checkout, "rev-parse", "HEAD")


@pytest.mark.slow
def test_every_worker_gets_the_arguments_as_they_were_given(ready: World) -> None:
    assert ready.tpu("run", "--run=its name", "--", "digits", *ODD).returncode == 0
    assert ready.tpu("follow").returncode == 0
    assert ready.arguments() == [["scripts/run.py", "digits", *ODD, "--run-dir", "/mnt/runs/its name"]] * 2


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
def test_the_code_of_a_run_is_that_of_all_workers(ready: World, codes: tuple[Any, Any], code: int) -> None:
    ready.codes(codes)
    assert ready.tpu("run", "--", "digits").returncode == 0
    done = ready.tpu("follow")
    assert done.returncode == code
    assert "worker says hello" in done.stdout


@pytest.mark.slow
def test_a_worker_that_can_not_be_asked_has_not_finished(ready: World) -> None:
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


def test_a_run_is_started_once_and_no_other_beside_it(ready: World) -> None:
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
def test_keep_goes_through_a_preemption_to_the_end(world: World) -> None:
    world.states("NONE", "CREATING", "READY", "PREEMPTED", "READY")
    world.codes((75, "killed"), (0, 0))
    done = world.tpu("keep", "--spot", "--", "digits", *ODD)
    assert done.returncode == 0, done.stderr
    attempt = ["create", "scp", "ssh", "ssh", "ssh", "ssh"]  # set up, start, follow, how it ended
    assert world.verbs() == [*attempt, "delete", *attempt]
    assert "is PREEMPTED: it is deleted and asked for again" in done.stderr
    assert world.arguments() == [["scripts/run.py", "digits", *ODD, "--run-dir", "/mnt/runs/slice"]] * 2


@pytest.mark.slow
def test_keep_asks_the_queue_again_when_the_slice_was_taken_back(world: World) -> None:
    world.states("NONE", "NONE", "READY")
    world.states("SUSPENDED", "PROVISIONING", of="queued-resources")
    done = world.tpu("keep", "--queued", "--", "digits")
    assert done.returncode == 0, done.stderr
    assert world.verbs() == ["delete", "create", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert [call[2] for call in world.calls() if call[3] in ("delete", "create")] == ["queued-resources"] * 2


@pytest.mark.slow
def test_keep_goes_on_where_only_the_run_was_stopped(world: World) -> None:
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
def test_keep_goes_on_with_the_commit_that_it_began_with(world: World) -> None:
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


def test_keep_does_not_pay_for_workers_that_can_not_be_made_ready(world: World) -> None:
    executable(world.fake / "bin" / "uv", "#!/bin/sh\necho 'uv: no such version' >&2\nexit 1\n")
    done = world.tpu("keep", "--", "digits")
    assert done.returncode == 1
    assert world.verbs() == ["scp", "ssh"] * 3
    assert "uv: no such version" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the workers of slice can't be made ready")


def test_without_gcloud_nothing_is_begun(world: World) -> None:
    for name in ("bash", "cat"):
        (world.fake / "few" / name).parent.mkdir(exist_ok=True)
        (world.fake / "few" / name).symlink_to(shutil.which(name) or "")
    few = {**world.environment, "PATH": str(world.fake / "few")}
    done = said([str(PODS / "tpu_vm.sh"), "delete", "--name", "slice", "--zone", "here-a"], few, world.fake)
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


# SLURM


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


def test_the_first_task_that_stops_does_not_have_the_others_killed(world: World) -> None:
    world.codes((75, "saves"))
    assert world.slurm("digits").returncode == 0
    assert (world.workers[1] / "saved").exists()
    assert requeued(world)


def test_slurms_signal_to_a_task_reaches_its_process_and_its_end_is_waited_for(world: World) -> None:
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


def test_a_job_that_can_not_be_requeued_says_how_to_go_on(world: World) -> None:
    (world.fake / "refused").touch()
    world.codes((75, 75))
    done = world.slurm("digits")
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1].endswith("submit it again with --run-dir runs/slurm/research-42.")


def test_a_requeued_job_has_the_same_run_and_every_task_the_arguments_as_they_were_given(world: World) -> None:
    world.codes((75, 75), (0, 0))
    expected = [["scripts/run.py", "digits", *ODD, "--run-dir", "runs/slurm/research-42"]] * 2
    assert world.slurm("digits", *ODD).returncode == 0
    assert world.arguments() == expected
    assert world.slurm("digits", *ODD, SLURM_RESTART_COUNT="1").returncode == 0
    assert world.arguments() == expected


@pytest.mark.parametrize("given", [["--run-dir", "mine"], ["--run-dir=mine"]])
def test_a_run_directory_that_is_given_is_kept(world: World, given: list[str]) -> None:
    assert world.slurm("digits", *given).returncode == 0
    assert world.arguments() == [["scripts/run.py", "digits", *given]] * 2


def test_srun_ends_a_step_when_a_task_dies(world: World) -> None:
    assert world.slurm("digits").returncode == 0
    assert "--kill-on-bad-exit=1" in (world.fake / "srun").read_text().split("\0")


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "said_of_it"),
    [
        ([], {}, 2, "the experiment is missing"),
        (["digits"], {"SLURM_JOB_ID": ""}, 2, "no SLURM job"),
        (["digits"], {"SLURM_SUBMIT_DIR": "/"}, 1, "no checkout with its .venv"),
        (["digits"], {"SLURM_GPUS_PER_TASK": "1"}, 2, "--gpus-per-task hides"),
    ],
)
def test_a_job_that_can_not_be_is_refused_in_one_line(
    world: World, arguments: list[str], environment: dict[str, str], code: int, said_of_it: str
) -> None:
    done = world.slurm(*arguments, **environment)
    assert done.returncode == code
    assert one_line(done.stderr)
    assert said_of_it in done.stderr
    assert not (world.fake / "srun").exists()


def test_sbatch_is_told_to_signal_the_tasks_in_time_and_to_keep_one_log() -> None:
    directives = re.findall(r"^#SBATCH (\S+)", (PODS / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--output=%x-%j.out"} <= set(directives)
    (at,) = [re.fullmatch(r"--signal=TERM@(\d+)", option) for option in directives if option.startswith("--signal")]
    assert at is not None  # B: would tell the script alone
    assert int(at[1]) >= 60
    head = (PODS / "slurm.sh").read_text().partition("set -euo")[0]
    assert not [line for line in head.splitlines() if line and not line.startswith("#")]  # sbatch reads up to the first command


# Kubernetes

# What the fields are called, of JobSet v1alpha2 (api/jobset/v1alpha2/jobset_types.go) and of Kubernetes 1.34; None: anything.
POD = {
    "activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy hostNetwork hostname imagePullSecrets "
    "initContainers nodeName nodeSelector priorityClassName restartPolicy runtimeClassName schedulerName securityContext "
    "serviceAccountName subdomain terminationGracePeriodSeconds tolerations": None,
    "containers": {
        "args command env envFrom image imagePullPolicy lifecycle livenessProbe name readinessProbe securityContext startupProbe "
        "workingDir": None,
        "ports": {"containerPort hostIP hostPort name protocol": None},
        "resources": {"claims limits requests": None},
        "volumeMounts": {"mountPath mountPropagation name readOnly recursiveReadOnly subPath subPathExpr": None},
    },
    "volumes": {
        "name configMap csi emptyDir ephemeral hostPath nfs projected secret": None,
        "persistentVolumeClaim": {"claimName readOnly": None},
    },
}
JOB = {
    "activeDeadlineSeconds backoffLimit backoffLimitPerIndex completionMode completions managedBy manualSelector "
    "maxFailedIndexes parallelism podReplacementPolicy selector successPolicy suspend ttlSecondsAfterFinished": None,
    "podFailurePolicy": {
        "rules": {
            "action": None,
            "onExitCodes": {"containerName operator values": None},
            "onPodConditions": {"status type": None},
        }
    },
    "template": {"metadata": {"annotations labels": None}, "spec": POD},
}
JOBSET = {
    "apiVersion kind": None,
    "metadata": {"annotations labels name namespace": None},
    "spec": {
        "coordinator dependsOn managedBy startupPolicy successPolicy suspend ttlSecondsAfterFinished": None,
        "network": {"enableDNSHostnames publishNotReadyAddresses subdomain": None},
        "failurePolicy": {
            "maxRestarts restartStrategy": None,
            "rules": {"action name onJobFailureMessagePatterns onJobFailureReasons targetReplicatedJobs": None},
        },
        "replicatedJobs": {
            "name groupName replicas dependsOn": None,
            "template": {"metadata": {"annotations labels": None}, "spec": JOB},
        },
    },
}


def unknown(found: Any, schema: dict[str, Any] | None, where: str = "") -> list[str]:
    """The fields that there are none of."""
    if schema is None:
        return []
    if isinstance(found, list):
        return [name for i, item in enumerate(found) for name in unknown(item, schema, f"{where}[{i}]")]
    fields = {name: below for names, below in schema.items() for name in names.split()}
    wrong = [f"{where}.{name}" for name in found if name not in fields]
    return wrong + [name for key, item in found.items() if key in fields for name in unknown(item, fields[key], f"{where}.{key}")]


@pytest.fixture(scope="module")
def jobset() -> dict[str, Any]:
    return yaml.safe_load((PODS / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def job(jobset: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.fixture(scope="module")
def container(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = job["template"]["spec"]["containers"]
    return found


def test_the_jobset_has_only_fields_that_there_are(jobset: dict[str, Any]) -> None:
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert unknown(jobset, JOBSET) == []


def test_hosts_and_chips_are_those_of_the_topology(job: dict[str, Any], container: dict[str, Any]) -> None:
    pod = job["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert job["completions"] == job["parallelism"]
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["completionMode"] == "Indexed"


def test_the_other_slices_in_its_table_add_up() -> None:
    rows = re.findall(r"^# .*? (tpu-\S+) +(\d+(?:x\d+)+) +(\d+) +(\d+)$", (PODS / "jobset.yaml").read_text(), re.MULTILINE)
    assert len(rows) == 5
    for _, topology, chips, hosts in rows:
        assert math.prod(map(int, topology.split("x"))) == int(chips) * int(hosts)


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (signals.RESUMABLE, False, "Ignore"),
        (signals.RESUMABLE, True, "Ignore"),
        (137, True, "Ignore"),
        (1, True, "Ignore"),
        (1, False, "FailJob"),
        (2, False, "FailJob"),
        (137, False, None),
        (134, False, None),
    ],
)
def test_what_a_pods_end_comes_to(
    job: dict[str, Any], container: dict[str, Any], code: int, disrupted: bool, action: str | None
) -> None:
    def matches(rule: dict[str, Any]) -> bool:
        if "onPodConditions" in rule:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            return disrupted
        assert rule["onExitCodes"]["operator"] == "In"
        assert rule["onExitCodes"]["containerName"] == container["name"]
        return code in rule["onExitCodes"]["values"]

    assert next((rule["action"] for rule in job["podFailurePolicy"]["rules"] if matches(rule)), None) == action


def test_a_death_restarts_all_hosts_and_a_failure_none(jobset: dict[str, Any], job: dict[str, Any]) -> None:
    policy = jobset["spec"]["failurePolicy"]
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    assert policy["maxRestarts"] > 0
    assert job["backoffLimit"] == 0  # a pod's death fails its job, and so restarts the set
    assert job["podReplacementPolicy"] == "Failed"  # the only one that goes with a podFailurePolicy
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # the same


def test_a_pod_has_time_to_save_and_sees_the_signal(job: dict[str, Any], container: dict[str, Any]) -> None:
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
    assert container["command"] == ["python", "scripts/run.py"]  # no shell between SIGTERM and Python
    assert 'ENTRYPOINT ["python", "scripts/run.py"]' in (PODS / "Dockerfile").read_text()


def test_pods_find_each_other_before_they_are_ready(jobset: dict[str, Any]) -> None:
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"] is True
    assert network["publishNotReadyAddresses"] is True
    assert network["subdomain"] == jobset["metadata"]["name"]


def test_the_run_is_kept_on_the_storage_that_all_hosts_share(job: dict[str, Any], container: dict[str, Any]) -> None:
    claim = yaml.safe_load((PODS / "storage.yaml").read_text())
    (mount,), (volume,) = container["volumeMounts"], job["template"]["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (run,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--run-dir=")]
    assert Path(run).parent == Path(mount["mountPath"])


def test_the_jobset_runs_an_experiment_that_there_is_with_options_that_it_has(
    container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.syspath_prepend(ROOT)
    import run as runner

    name, *options = container["args"]
    assert name in runner.experiments()
    module = importlib.import_module(f"experiments.{name}")
    fields = [*dataclasses.fields(module.Config), *dataclasses.fields(runner.Options)]
    assert runner.misspelt(options, fields) is None


def test_every_file_that_the_image_copies_is_there() -> None:
    copied = re.findall(r"^COPY (?!\. )(.*) \S+$", (PODS / "Dockerfile").read_text(), re.MULTILINE)
    assert len(copied) == 2
    assert not [name for line in copied for name in line.split() if not (ROOT / name).exists()]


# The page


def test_the_page_names_files_and_recipes_that_there_are() -> None:
    page = (ROOT / "PODS.md").read_text()
    files = re.findall(r"(?:scripts|tests)/[\w/]+\.\w+", page)
    assert len(set(files)) >= 5
    assert not [name for name in files if not (ROOT / name).exists()]
    recipes = set(re.findall(r"^(\w+) \*args:", (ROOT / "Justfile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ +|`|=8 )just (\w+)", page, re.MULTILINE))
    assert len(named) >= 4
    assert named <= recipes


def test_the_pages_commands_are_ones_that_the_launchers_take(world: World) -> None:
    page = (ROOT / "PODS.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(scripts/pods/tpu_vm\.sh .*?)(?: # .*)?$", page, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        command, dashes, experiment = line.partition(" -- ")
        done = said(["bash", "-c", f"{command} --dry-run{dashes}{experiment}"], world.environment, world.checkout)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("gcloud compute tpus ") >= 2
    (sbatch,) = re.findall(r"^ {4}sbatch (.*)$", page, re.MULTILINE)
    options, _, rest = sbatch.partition(" scripts/pods/slurm.sh ")
    assert all(option.startswith("--") for option in options.split())
    assert (ROOT / "experiments" / f"{rest.split()[0]}.py").exists()
    assert world.slurm(*rest.split()).returncode == 0
