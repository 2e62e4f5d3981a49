"""A simulated cluster for tests of the launchers: stand-ins for its commands, which record their arguments."""

import dataclasses
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PODS = ROOT / "scripts" / "pods"
SCRIPTS = ("tpu_vm.sh", "slurm.sh")
ODD = ("--note=two words, 'single' and \"double\"", "$HOME `date` \\ *", "two\nlines", "", "--mesh=data=-1")

# Records its arguments. `describe` prints one line of the file of states after the other, and the last one again and again.
# ssh runs the command here, in a home directory for each of the two workers; deleting the slice empties them.
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

# The program that is launched: records its arguments, then exits with the code in the next line of `codes`.
PYTHON = r"""#!/usr/bin/env bash
home=${FAKE_HOME:-$HOME}
printf '%s\0' "$@" >"$home/arguments"
echo "worker says hello"
code=$(head -n 1 "$home/codes")
sed -i 1d "$home/codes"
case $code in
waits) # until SIGTERM, then takes a while to save
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
    """A checkout, two workers, and stand-ins for the commands of a cluster."""

    fake: Path
    checkout: Path
    environment: dict[str, str]

    @property
    def workers(self) -> list[Path]:
        return [self.fake / f"worker-{i}" for i in range(2)]

    def codes(self, *attempts: tuple[Any, Any]) -> None:
        """Sets the exit codes of the program on both workers, for each attempt."""
        for worker, codes in zip(self.workers, zip(*attempts, strict=True), strict=True):
            (worker / "codes").write_text("".join(f"{code}\n" for code in codes))

    def states(self, *states: str, of: str = "tpu-vm") -> None:
        """Sets the states that `describe` prints for the slice, or for the queued resource, one call after the other."""
        (self.fake / of).write_text("".join(f"{state}\n" for state in states))

    def arguments(self) -> list[list[str]]:
        return [(worker / "arguments").read_text().split("\0")[:-1] for worker in self.workers]

    def calls(self) -> list[list[str]]:
        """Returns the arguments of each call of gcloud."""
        path = self.fake / "calls"
        return [call.split("\0")[:-1] for call in path.read_text().split("\x1e\0")[:-1]] if path.exists() else []

    def verbs(self) -> list[str]:
        return [call[3] for call in self.calls() if call[3] != "describe"]

    def slurm(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "research", "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(self.checkout)}
        # SLURM runs a copy of the script, from a directory of its own.
        shutil.copy(PODS / "slurm.sh", self.fake / "slurm_script")
        command = ["bash", str(self.fake / "slurm_script"), *arguments]
        return run_line(command, {**self.environment, **job, **environment}, self.checkout)

    def tpu(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        given = {"setup": NFS, "create": KIND, "keep": [*KIND, *NFS]}.get(command, [])
        script = self.checkout / "scripts" / "pods" / "tpu_vm.sh"
        line = [str(script), command, "--name", "slice", "--zone", "here-a", "--pause", "0", *given, *arguments]
        return run_line(line, self.environment, self.fake)


KIND = ["--type", "v5litepod-8", "--version", "v2-alpha-tpuv5-lite"]
NFS = ["--nfs", "10.0.0.2:/share"]


def run_line(command: list[str], environment: dict[str, str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=False, timeout=60)


def one_line(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")


def eventually(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
