#!/usr/bin/env bash
# A run on a SLURM cluster, requeued until it is done. From the checkout's root, with its .venv there:
#
#   GPUs   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=12:00:00 scripts/pods/slurm.sh digits --mesh data=-1
#   CPUs   sbatch --nodes=4 --ntasks-per-node=1 --cpus-per-task=32 --time=12:00:00 scripts/pods/slurm.sh digits --mesh data=-1
#
# The checkout, and with it runs/, must be on storage that all nodes share. Unless --run-dir is given, the run is kept in
# runs/slurm/NAME-ID, by the job's name and id: a requeued job has the same id, and so goes on with its run.
#
# One task a GPU: under SLURM, JAX gives each process the one GPU whose number is its SLURM_LOCALID. For the same reason every
# task must see all GPUs of its node: no --gpus-per-task and no --gpu-bind, which show each task one GPU, always as number 0.
# On CPUs one task a node, which uses all the cores it is given.
#
#SBATCH --job-name=research
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Two minutes before the time is up, to all tasks. Not with B:, which tells this script alone; and not to this script, which
# must live to requeue the job. `scancel` does end it at once, and so nothing is requeued that was cancelled. Where preempted
# jobs are to get this signal too, the cluster must have `preempt_send_user_signal`.
#SBATCH --signal=TERM@120
set -euo pipefail

refuse() { # exit code, one line
  echo "error: $2" >&2
  exit "$1"
}

root=${SLURM_SUBMIT_DIR:-}
[ -n "${SLURM_JOB_ID:-}" ] && [ -n "$root" ] || refuse 2 "no SLURM job; start it with: sbatch [option ...] $0 EXPERIMENT ..."
[ "$#" -gt 0 ] || refuse 2 "the experiment is missing; expected: sbatch [option ...] slurm.sh EXPERIMENT --option value ..."
[ -x "$root/.venv/bin/python" ] && [ -f "$root/research/__main__.py" ] ||
  refuse 1 "$root: no checkout with its .venv; go to the checkout's root, install, and call sbatch there."
[ -z "${SLURM_GPUS_PER_TASK:-}" ] ||
  refuse 2 "--gpus-per-task hides a node's other GPUs; use --gpus-per-node and --ntasks-per-node."
cd "$root"
export PYTHONUNBUFFERED=1  # no delay before output is in the job's file

run_dir=(--run-dir "runs/slurm/${SLURM_JOB_NAME:-research}-$SLURM_JOB_ID")
for word in "$@"; do
  case $word in --run-dir | --run-dir=* | --run_dir | --run_dir=*) run_dir=() ;; esac
done

# srun does not take this over from sbatch by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# What each task does. srun's own exit code is the highest of all tasks, so that one that failed (1) would be hidden behind those
# that are killed for it (137): each task leaves its code in a file. A task that stopped (75) ends well for srun, because with
# --kill-on-bad-exit it would otherwise kill those that are still saving. SLURM signals only what it started itself, which is
# this shell: it forwards SIGTERM, and waits again if a signal, and not the end of the process, ended the waiting.
# shellcheck disable=SC2016 # it is for the shell of each task to expand
task='
stop= child=
trap '\''stop=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :'\'' TERM
"${@:2}" &
child=$!
[ -z "$stop" ] || kill -TERM "$child" 2>/dev/null || :
while :; do
  stop= code=0
  wait "$child" || code=$?
  [ -n "$stop" ] || break
done
echo "$code" >"$1/$SLURM_PROCID"
[ "$code" != 75 ] || exit 0
exit "$code"'

codes=$root/runs/.slurm/$SLURM_JOB_ID
rm -rf "$codes"
mkdir -p "$codes"
srun --kill-on-bad-exit=1 --label bash -c "$task" task "$codes" .venv/bin/python -m research run "$@" "${run_dir[@]}" || true

# Files are opened by name, because shared storage may list new ones late.
failed='' stopped='' died='' killed=''
for ((i = 0; i < ${SLURM_NTASKS:-${SLURM_JOB_NUM_NODES:-1}}; i++)); do
  code=$(cat "$codes/$i" 2>/dev/null) || code=lost
  case $code in
    0) ;;
    1 | 2) failed=${failed:-$code} ;;
    75) stopped=yes ;;
    *) died="${died:+$died, }task $i ($code)" ;;
  esac
  # A killed process makes its peers fail too: their codes are not the cause. 134 is such a peer, which aborted because another
  # process was gone.
  case $code in 134 | lost) ;; 129 | 13? | 14?) killed=yes ;; esac
done
rm -rf "$codes"

if [ -n "$failed" ] && [ -z "$killed" ]; then exit "$failed"; fi
if [ -z "$stopped$died" ]; then exit 0; fi
if [ -n "$killed" ] || [ -z "$stopped" ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-10}" ]; then
  refuse 1 "$died died, and the job was restarted $SLURM_RESTART_COUNT times already; see their output above, and MAX_RESTARTS."
fi
echo "stopped before its end${died:+, because of $died}: the job is requeued and goes on from its last checkpoint" >&2
scontrol requeue "$SLURM_JOB_ID" ||
  refuse 75 "the job can't be requeued here; submit it again with --run-dir ${run_dir[1]:-as before}."
