#!/usr/bin/env bash
# The three phases of a DC-AE one after the other; run it again and it continues where it stopped.
#
#   launch/three_phases.sh CONFIG WORKDIR [--config.x.y=V ...]
#   launch/three_phases.sh configs/demo.py runs/demo
#
# Each phase starts from the one before it (--config.init_from).  A phase that fails stops the chain
# with its exit code; 42 means preempted and saved.  PYTHON chooses the interpreter.
set -euo pipefail

if [[ $# -lt 2 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  [[ $# -lt 2 && "${1:-}" != -h && "${1:-}" != --help ]] && exit 2
  exit 0
fi
config=$1 workdir=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}

before=()
for phase in phase1 phase2 phase3; do
  echo "== $phase"
  code=0
  "$python" "$here/main.py" --config="$config:$phase" --workdir="$workdir/$phase" \
    ${before[@]+"${before[@]}"} "$@" || code=$?
  if [[ $code -ne 0 ]]; then
    hint="the same command continues from here"
    [[ $code -eq 2 ]] && hint="mend what the message says; then the same command continues from here"
    echo "$phase ended with exit code $code; $hint" >&2
    exit "$code"
  fi
  before=("--config.init_from=$workdir/$phase")
done
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$python" -m dcae_jax report --workdir "$workdir"
