#!/usr/bin/env bash
# Latent diffusion on a trained autoencoder's latents of the built-in photographs: caches them,
# trains configs/demo_diffusion.py, draws samples, writes the report.  Run it again and it goes on.
#
#   launch/demo_diffusion.sh AUTOENCODER LATENTS WORKDIR [--config.x.y=V ...]
#   launch/demo_diffusion.sh runs/demo/phase3 runs/demo_latents runs/demo_diffusion
#
# A part that fails stops the chain with its exit code; 42 means preempted and saved.  PYTHON chooses
# the interpreter.
set -euo pipefail

if [[ $# -lt 3 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  [[ $# -lt 3 && "${1:-}" != -h && "${1:-}" != --help ]] && exit 2
  exit 0
fi
autoencoder=$1 latents=$2 workdir=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

if [[ "$autoencoder" != *://* && ! -e "$autoencoder/summary.json" ]]; then
  echo "error: $autoencoder holds no finished run of an autoencoder (summary.json is missing);" \
    "train the demo's first: make train" >&2
  exit 2
fi

part() {  # NAME COMMAND...
  local name=$1 code=0
  shift
  echo "== $name"
  "$@" || code=$?
  if [[ $code -ne 0 ]]; then
    hint="the same command continues from here"
    [[ $code -eq 2 ]] && hint="mend what the message says; then the same command continues from here"
    echo "$name ended with exit code $code; $hint" >&2
    exit "$code"
  fi
}

part "latents to train on" "$python" -m dcae_jax cache-latents --from "$autoencoder" \
  --n 4096 --out "$latents"
part "held-out latents" "$python" -m dcae_jax cache-latents --from "$autoencoder" \
  --split test --n 256 --out "$latents"
part "diffusion" "$python" "$here/main.py" --config="$here/configs/demo_diffusion.py" \
  --workdir="$workdir" --config.data.path="$latents" "$@"
# The folder is named after the step: trained further, the run gets new samples beside the old ones.
steps=$(sed -n 's/^  "steps": \([0-9]*\).*/\1/p' "$workdir/summary.json")
part "samples" "$python" -m dcae_jax sample --from "$workdir" --n 64 \
  --out "$workdir/samples-$steps"
part "report" "$python" -m dcae_jax report --workdir "$workdir"
