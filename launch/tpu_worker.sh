#!/usr/bin/env bash
# What launch/tpu_vm.py runs on each worker of a TPU VM.
#
#   tpu_worker.sh install          an environment with jax for TPUs, made anew if requirements changed
#   tpu_worker.sh run JOB FLAGS    main.py FLAGS as this worker's process; its exit code
#   tpu_worker.sh stop JOB         SIGTERM to it: it saves
#
# The process does not depend on the connection: `run` starts it apart, or finds it running and shows
# its output.  Worker 0 prints from the first line on, the others behind their number.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$HOME/dcae_jax_venv
jobs=$HOME/dcae_jax_jobs

say() { echo "launch: worker $worker: $*"; }

metadata() {
  curl --silent --show-error --fail --retry 5 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" || {
    say "the metadata server does not tell $1: this is no TPU VM" >&2
    exit 2
  }
}

install() {
  local wanted
  wanted=$(cat "$here"/requirements.txt "$here"/constraints-3.11.txt | sha256sum)
  [[ -e "$venv/.ready" && "$(cat "$venv/.ready")" == "$wanted" ]] && return 0
  # The images bring an older Python than this code needs; uv brings one.
  python3 -m pip install --quiet --user uv &&
    python3 -m uv venv --quiet --clear --python 3.11 "$venv" &&
    python3 -m uv pip install --quiet --python "$venv/bin/python" -r "$here/requirements.txt" \
      -c "$here/constraints-3.11.txt" 'jax[tpu]' || {
    say "installing failed (see above)"
    exit 2
  }
  echo "$wanted" > "$venv/.ready"
}

running() {  # whether the job's process is there
  [[ -e "$job.pid" ]] && kill -0 "$(cat "$job.pid")" 2> /dev/null
}

holder() {  # the number of a process that has the TPU open
  sudo -n find /proc/[0-9]*/fd \( -lname '/dev/accel*' -o -lname '/dev/vfio/[0-9]*' \) \
    2> /dev/null | cut -d/ -f3 | head -n 1
}

start() {
  local pid endpoints
  pid=$(holder)
  if [[ -n "$pid" ]]; then
    say "the TPU is in use by process $pid ($(tr '\0' ' ' < "/proc/$pid/cmdline" | cut -c1-100));" \
      "end it there, or take another TPU"
    exit 3  # as below
  fi
  endpoints=$(metadata worker-network-endpoints) || exit 2
  export JAX_NUM_PROCESSES JAX_PROCESS_ID=$worker JAX_COORDINATOR_ADDRESS PYTHONUNBUFFERED=1
  JAX_NUM_PROCESSES=$(tr ',' '\n' <<< "$endpoints" | wc -l)
  endpoints=${endpoints%%,*}  # of worker 0: NAME, or ID:NUMBER:ADDRESS
  JAX_COORDINATOR_ADDRESS=${endpoints##*:}:8482
  if [[ "$JAX_NUM_PROCESSES" == 1 ]]; then
    unset JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_COORDINATOR_ADDRESS
  fi
  rm -f "$job.exit"
  printf '%q ' "$@" > "$job.command"
  cd "$here" || exit 2
  # Apart from this session: a lost connection must not end it.
  setsid nohup bash -c 'log=$1 job=$2; shift 2
    "$@" > "$log" 2>&1 < /dev/null & echo $! > "$job.pid"; wait $!; echo $? > "$job.exit"' \
    - "$job.log" "$job" "$@" > /dev/null 2>&1 < /dev/null &
  until [[ -s "$job.pid" && -e "$job.log" ]]; do sleep 0.2; done
}

show() {  # the output until the process has ended
  local from=1
  [[ "$1" == again ]] && from=0
  if [[ "$worker" == 0 ]]; then
    tail --pid="$(cat "$job.pid")" -s 0.5 -n +$from -f "$job.log"
  else
    tail --pid="$(cat "$job.pid")" -s 0.5 -n +$from -f "$job.log" | sed -u "s/^/[$worker] /"
  fi
}

run() {
  if running; then
    if [[ "$(cat "$job.command")" != "$(printf '%q ' "$@")" ]]; then
      say "a run with other flags is going on here; \`python launch/tpu_vm.py --stop\` ends it, saved"
      exit 3  # launch/tpu_vm.py then leaves the TPU to that run
    fi
    say "the process still runs; its output goes on"
    show again
  else
    rm -f "$job.pid" "$job.log"
    start "$@"
    show first
  fi
  until [[ -s "$job.exit" ]]; do sleep 0.2; done
  return "$(cat "$job.exit")"
}

worker=?
worker=$(metadata agent-worker-number) || exit 2
what=$1
shift
case "$what" in
  install) install ;;
  run)
    mkdir -p "$jobs"
    job=$jobs/$1
    shift
    run "$venv/bin/python" main.py "$@"
    ;;
  stop)
    job=$jobs/$1
    if running; then kill -TERM "$(cat "$job.pid")"; else say "there is no run to stop"; fi
    ;;
  *)
    say "$what? there are install, run, stop"
    exit 2
    ;;
esac
