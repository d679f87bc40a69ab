#!/usr/bin/env bash
# launch/reproduce_dcae.sh from end to end without any data: squares of the built-in photographs in
# place of ImageNet, networks with random weights, a small autoencoder trained for a few steps.  All
# scores say that they compare with nothing.  Run it again and it goes on.
#
#   launch/reproduce_demo.sh OUT
#
# PYTHON chooses the interpreter.
set -euo pipefail

if [[ $# -ne 1 || -z "$1" || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  [[ "${1:-}" != -h && "${1:-}" != --help ]] && exit 2
  exit 0
fi
out=${1%/}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export DCAE_JAX_NETS="$out/nets"

if [[ ! -e "$out/photos/val/credits.txt" ]]; then
  echo "== photographs"
  rm -rf "$out/photos/val"  # ours, and begun only
  "$python" -m dcae_jax photos --split test --tile 128 --out "$out/photos/val"
fi
for net in inception lpips-alex; do
  [[ -e "$out/nets/${net//-/_}.safetensors" ]] && continue
  echo "== random weights of $net"
  "$python" -m dcae_jax import-net "$net" --random 0
done
if [[ ! -e "$out/exported/config.json" ]]; then
  echo "== a small autoencoder"
  "$python" "$here/main.py" --config="$here/configs/demo.py:phase1" --workdir="$out/trained" \
    --config.steps=30 "--config.evals[0].every=0" "--config.evals[0].n=8" "--config.evals[1].n=8" \
    "--config.evals[0].baselines=False" "--config.evals[1].baselines=False"
  "$python" -m dcae_jax export --workdir "$out/trained" --to diffusers --out "$out/exported" \
    --scaling-factor 1
fi
RELEASE=dc-ae-f64c128-in-1.0 PYTHON="$python" "$here/launch/reproduce_dcae.sh" "$out/photos" \
  "$out/exported" "$out/reproduced" --resolution 128 --n 64 --data-name photographs --batch 16
