#!/usr/bin/env bash
# A run on a Cloud TPU slice: asks for the slice, brings this commit to its workers, runs, and goes on when it is taken away.
# shellcheck disable=SC2016 # the workers' shells expand what is in single quotes
set -euo pipefail

usage() {
  cat <<'TEXT'
tpu_vm.sh COMMAND --name NAME --zone ZONE [option ...] [-- EXPERIMENT --option value ...]

commands
  create   ask for the slice, and wait until it is ready
  setup    on all workers: this commit, the packages that constraints.txt pins, the shared storage
  run      start an experiment on all workers; returns when it is started
  follow   show the output of worker 0 until the run ends; the exit code is the run's
  keep     all of these, repeated until the run is done (0) or fails (1, 2): creates a missing slice, replaces a preempted
           one, and resumes the run from its last checkpoint
  stop     SIGTERM to the run on all workers: it saves its state and exits with 75
  status   the state of the slice
  fetch    copy the run directory to this machine
  delete   delete the slice; what is on the shared storage stays

options
  --name NAME          the slice
  --zone ZONE          where it is
  --project PROJECT    by default gcloud's own
  --type TYPE          accelerator type, such as v5litepod-16 (create, keep)
  --version VERSION    runtime version, such as v2-alpha-tpuv5-lite (create, keep)
  --spot               cheaper, and taken away at any time
  --queued             as a queued resource: waits in line until there is room
  --nfs HOST:/SHARE    storage that all workers share, such as Filestore (setup, keep)
  --bucket BUCKET      or a Cloud Storage bucket; one with a hierarchical namespace, where renaming a directory is atomic
  --run NAME           the run's directory on the shared storage; by default the slice's name
  --to DIRECTORY       where `fetch` puts it; by default runs/
  --dirty              include uncommitted changes; without it they are an error
  --internal-ip        connect by internal addresses
  --tries N            attempts of `keep` before it gives up; by default 100
  --pause SECONDS      between two checks of the slice's state; by default 30
  --dry-run            print every command instead of running it

exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped, and safe to run again
TEXT
}

refuse() { # exit code, one line
  echo "error: $2" >&2
  exit "$1"
}

say() { echo "tpu_vm.sh: $*" >&2; }

quoted() { # its arguments as words that a POSIX shell reads back as they are
  local word single="'" escaped="'\\''"
  for word in "$@"; do printf "'%s' " "${word//$single/$escaped}"; done
}

act() { # runs a command, or prints it
  if [ -n "$dry" ]; then
    printf '%q ' "$@" >&3
    echo >&3
  else
    "$@" 3>&-
  fi
}

tpu() { # gcloud compute tpus ..., in our project and zone
  act gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}
}

on() { # workers, a script for their shell
  # A host that was taken away says nothing more: after a minute of silence the connection ends.
  tpu tpu-vm ssh "$name" --worker="$1" --command="$2" ${internal:+--internal-ip} \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4
}

described() { # the state that a `describe` gives; NONE where there is no such thing
  local state
  if [ -n "$dry" ]; then
    tpu "$@"
    cat "$scratch/pretended"
  elif state=$(tpu "$@" 2>"$scratch/error"); then
    echo "${state:-UNKNOWN}"
  elif grep -q 'NOT_FOUND\|was not found' "$scratch/error"; then
    echo NONE
  else
    cat "$scratch/error" >&2
    refuse 1 "gcloud can't describe $name; see its output above."
  fi
}

slice_state() { described tpu-vm describe "$name" --format='value(state)'; }

queue_state() { described queued-resources describe "$name" --format='value(state.state)'; }

standing() { # the slice: ready, coming, gone (there, and of no more use) or none; and the state that says so
  local state
  state=$(slice_state) || exit
  case $state in
    READY) echo "ready $state" ;;
    NONE)
      if [ -n "$queued" ]; then
        state=$(queue_state) || exit
        case $state in
          NONE) echo "none $state" ;;
          FAILED | SUSPENDING | SUSPENDED | DELETING) echo "gone $state" ;;
          *) echo "coming $state" ;;
        esac
      else
        echo "none $state"
      fi
      ;;
    # PREEMPTED is a spot slice's, TERMINATED one's that maintenance ended; a stopped TPU VM keeps no place in a slice.
    PREEMPTED | TERMINATED | FAILED | STOPPED | STOPPING | DELETING | HIDING | HIDDEN | UNKNOWN) echo "gone $state" ;;
    *) echo "coming $state" ;;
  esac
}

create() {
  if [ -n "$queued" ]; then
    tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
  else
    tpu tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
  fi
  if [ -n "$dry" ]; then echo READY >"$scratch/pretended"; fi
}

await() { # until the slice is ready; fails where it won't be
  local found
  while :; do
    found=$(standing) || exit
    case $found in
      ready*) return 0 ;;
      coming*) sleep "$pause" ;;
      *)
        say "the slice $name is not there: its state is ${found#* }"
        return 1
        ;;
    esac
  done
}

remove() {
  if [ -n "$queued" ]; then
    tpu queued-resources delete "$name" --force --quiet
  else
    tpu tpu-vm delete "$name" --quiet
  fi
}

pack() { # this commit, and with --dirty what is not in it, as two files
  local root changed index="$scratch/index"
  root=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
  changed=$(git -C "$root" status --porcelain)
  if [ -n "$changed" ] && [ -z "$dirty" ]; then
    refuse 1 "$root: not all of it is committed (git status tells what); commit it, or give --dirty to take it along."
  fi
  act git -C "$root" bundle create --quiet "$scratch/research.bundle" HEAD
  : >"$scratch/research.patch"
  if [ -n "$changed" ] && [ -z "$dry" ]; then
    # A temporary index: the staged changes of this checkout stay as they are.
    GIT_INDEX_FILE=$index git -C "$root" read-tree HEAD
    GIT_INDEX_FILE=$index git -C "$root" add --all
    GIT_INDEX_FILE=$index git -C "$root" diff --cached --binary HEAD >"$scratch/research.patch"
  fi
}

storage() { # the script that mounts the shared storage
  local install='sudo apt-get -o DPkg::Lock::Timeout=600 -qq'
  echo 'if ! mountpoint -q /mnt/runs; then'
  echo '  sudo mkdir -p /mnt/runs'
  if [ -n "$nfs" ]; then
    echo "  command -v mount.nfs >/dev/null || { $install update && $install install -y nfs-common; }"
    echo "  sudo mount -t nfs $(quoted "$nfs") /mnt/runs"
    echo '  [ -w /mnt/runs ] || sudo chmod 1777 /mnt/runs'
  else
    cat <<TEXT
  if ! command -v gcsfuse >/dev/null; then
    echo 'error: gcsfuse is not on this image; install it as the Cloud Storage FUSE documentation says, or give --nfs.' >&2
    exit 1
  fi
  sudo chown "\$(id -u)" /mnt/runs
  # No metadata caches: a host has to see at once what another host wrote.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $(quoted "$bucket") /mnt/runs
TEXT
  fi
  echo 'fi'
}

installation() { # the script that makes a worker ready
  # uv, because requires-python asks for 3.11 and the runtime images come with 3.10.
  cat <<'TEXT'
set -eu
if kill -0 "$(cat ~/run/pid 2>/dev/null)" 2>/dev/null; then echo 'a run is going on: left as it is'; exit 0; fi
mkdir -p ~/research && cd ~/research
git init -q && git fetch -q ~/research.bundle HEAD && git reset -q --hard FETCH_HEAD && git clean -qfd
if [ -s ~/research.patch ]; then git apply --index --whitespace=nowarn ~/research.patch; fi
PATH=$HOME/.local/bin:$PATH
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu]'
TEXT
  storage
}

setup() {
  tpu tpu-vm scp "$scratch/research.bundle" "$scratch/research.patch" "$name:" --worker=all ${internal:+--internal-ip}
  on all "$(installation)"
}

start() { # EXPERIMENT --option value ...
  local command wrapped
  command="$(quoted env PYTHONUNBUFFERED=1 .venv/bin/python -m research run "$@" --run-dir "/mnt/runs/$run")"
  # Outlives the connection, and the shutdown's SIGTERM to all processes until the state is saved and the exit code written.
  wrapped="trap : TERM; $command; echo \$? >~/run/exit.partial; mv ~/run/exit.partial ~/run/exit"
  on all "set -eu
mkdir -p ~/run && cd ~/research
if kill -0 \"\$(cat ~/run/pid 2>/dev/null)\" 2>/dev/null; then
  if [ \"\$(cat ~/run/command)\" = $(quoted "$command")]; then echo 'already running'; exit 0; fi
  echo 'error: another run is going on here; stop it first.' >&2; exit 1
fi
rm -f ~/run/exit
printf '%s\n' $(quoted "$command")>~/run/command
setsid bash -c $(quoted "$wrapped")>~/run/log 2>&1 </dev/null &
echo \$! >~/run/pid"
}

follow() { # returns the run's exit code
  local codes
  # A lost connection may end this early: the end of the run is determined below.
  on 0 'tail -s 0.3 -n +1 -f --pid="$(cat ~/run/pid)" ~/run/log' || true
  if [ -n "$dry" ]; then
    on all "$ended"
    return 0
  fi
  # The exit code of an unreachable worker is unknown.
  codes=$(on all "$ended" | sed -n 's/^exit code //p') || codes="$codes lost"
  # A killed process (137, 139, ...) makes its peers fail too: their codes are not the cause. 134 is such a peer, which aborted
  # because another process was gone.
  case " $(tr '\n' ' ' <<<"$codes") " in
    *' 2 '*) return 2 ;;
    *' 13'[0-35-9]' '* | *' 129 '* | *' 14'[0-9]' '*) return 75 ;;
    *' 1 '*) return 1 ;;
    *[1-9a-z]*) return 75 ;;
    *0*) return 0 ;;
    *) return 75 ;;
  esac
}

# Where the host was lost, or all that ran on it, there is no exit code.
ended='while kill -0 "$(cat ~/run/pid)" 2>/dev/null; do sleep 1; done;
echo "exit code $(cat ~/run/exit 2>/dev/null || echo lost)"'

keep() {
  local left="$tries" broken=0 found code
  pack # once: the run goes on with the commit that it began with, whatever becomes of this checkout
  while [ "$((left--))" -gt 0 ]; do
    found=$(standing) || exit
    case $found in
      gone*)
        say "the slice $name is ${found#* }: it is deleted and requested again"
        remove || true
        create || true
        ;;
      none*) create || true ;;
    esac
    if await; then
      if setup && start "$@"; then
        broken=0 code=0
        follow || code=$?
        if [ "$code" != 75 ]; then return "$code"; fi
        say "the run stopped before its end and goes on"
      elif [ "$((++broken))" = 3 ]; then
        refuse 1 "the workers of $name can't be set up, three times in a row; see their output above."
      fi
    fi
    sleep "$pause"
  done
  refuse 75 "the run is not done after $tries tries; the same command goes on with it."
}

command=${1:-}
case $command in
  create | setup | run | follow | keep | stop | status | fetch | delete) shift ;;
  '' | -h | --help | help)
    usage
    exit 0
    ;;
  *) refuse 2 "no command '$command': expected create, setup, run, follow, keep, stop, status, fetch or delete; see --help." ;;
esac

name='' zone='' project='' type='' version='' spot='' queued='' nfs='' bucket='' run='' to=runs dirty='' internal='' dry=''
tries=100 pause=30
while [ "$#" -gt 0 ]; do
  option=$1
  case $option in
    --*=*) set -- "${option%%=*}" "${option#*=}" "${@:2}" ;;
    --name | --zone | --project | --type | --version | --nfs | --bucket | --run | --to | --tries | --pause)
      [ "$#" -gt 1 ] || refuse 2 "$option: a value is missing; see --help."
      printf -v "${option#--}" %s "$2"
      shift 2
      ;;
    --spot | --queued | --dirty)
      printf -v "${option#--}" yes
      shift
      ;;
    --internal-ip) internal=yes && shift ;;
    --dry-run) dry=yes && shift ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) refuse 2 "no option '$option'; the experiment and its options come after --; see --help." ;;
  esac
done

[ -n "$name" ] || refuse 2 "--name is missing; expected the slice's name."
[ -n "$zone" ] || refuse 2 "--zone is missing; expected a zone, such as us-west4-a."
run=${run:-$name}
case $command in
  create | keep)
    [ -n "$type" ] || refuse 2 "--type is missing; expected an accelerator type, such as v5litepod-16."
    [ -n "$version" ] || refuse 2 "--version is missing; expected a runtime version, such as v2-alpha-tpuv5-lite."
    ;;
esac
case $command in
  run | keep)
    [ "$#" -gt 0 ] || refuse 2 "$command: the experiment is missing; expected -- EXPERIMENT --option value ..."
    case " $* " in *' --run-dir'* | *' --run_dir'*) refuse 2 "--run-dir is given by --run NAME here; see --help." ;; esac
    ;;
  *) [ "$#" = 0 ] || refuse 2 "$command takes nothing after --; run and keep do." ;;
esac
case $command in
  setup | keep)
    if [ -n "$nfs" ] && [ -n "$bucket" ]; then refuse 2 "--nfs and --bucket: expected one of them."; fi
    [ -n "$nfs$bucket" ] ||
      refuse 2 "--nfs or --bucket is missing; expected storage that all workers share and that outlives them."
    ;;
esac

command -v gcloud >/dev/null || [ -n "$dry" ] || refuse 1 "there is no gcloud here; install the Google Cloud CLI."
exec 3>&1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo NONE >"$scratch/pretended" # the slice's state in a dry run

case $command in
  create)
    create
    await || refuse 1 "the slice $name was not given; see its state with: tpu_vm.sh status."
    ;;
  setup)
    pack
    setup
    ;;
  run) start "$@" ;;
  follow) follow ;;
  keep) keep "$@" ;;
  stop) on all 'kill -TERM -- "-$(cat ~/run/pid)"' ;;
  status) standing ;;
  fetch)
    act mkdir -p "$to"
    tpu tpu-vm scp --recurse "$name:/mnt/runs/$run" "$to" --worker=0 ${internal:+--internal-ip}
    ;;
  delete) remove ;;
esac
