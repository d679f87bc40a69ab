#!/usr/bin/env bash
# The published evaluation of an autoencoder, run here: imports its weights, fetches the networks
# that the scores need, evaluates by the protocol of DC-AE's authors, and prints the scores beside
# the published ones.  Run it again and it goes on.
#
#   launch/reproduce_dcae.sh IMAGENET AUTOENCODER OUT [options of evaluate]
#   launch/reproduce_dcae.sh imagenet dc-ae-f64c128-in-1.0 runs/reproduced --resolution 512
#
# IMAGENET holds val/ with the 50,000 images, in class folders or not.  AUTOENCODER is a release, a
# name on the hub, a folder of PyTorch weights, or a workdir.  The networks are looked for in
# $DCAE_JAX_NETS, and downloaded where they are not there.  RELEASE=NAME sets the scores beside those
# published for NAME, whatever they are of.  PYTHON chooses the interpreter.
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,13s/^# \{0,1\}//p' "$0"
  exit 0
fi
if [[ $# -lt 3 || -z "$1" || -z "$2" || -z "$3" ]]; then
  echo "error: give IMAGENET, the folder that holds val/ with ImageNet's validation images:" \
    "make reproduce-dcae IMAGENET=FOLDER AE=dc-ae-f64c128-in-1.0 [RESOLUTION=512] [N=50000]" \
    "[NETS=FOLDER]" >&2
  exit 2
fi
imagenet=${1%/} autoencoder=${2%/} out=${3%/}
shift 3
if [[ "$imagenet" != *://* && ! -d "$imagenet/val" ]]; then
  echo "error: there is no folder $imagenet/val; it must hold ImageNet's validation images" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
nets=${DCAE_JAX_NETS:-$HOME/.cache/dcae_jax/nets}
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

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

for net in inception lpips-alex; do
  [[ -e "$nets/${net//-/_}.safetensors" ]] ||
    part "weights of $net" "$python" -m dcae_jax import-net "$net"
done
if [[ ! -e "$autoencoder/checkpoints" ]]; then  # no workdir yet
  imported=$out/${autoencoder##*/}
  [[ -e "$imported/config.json" ]] ||
    part "autoencoder" "$python" -m dcae_jax import --from "$autoencoder" --out "$imported"
  autoencoder=$imported
fi
part "evaluation" "$python" -m dcae_jax evaluate --from "$autoencoder" --images "$imagenet" \
  --split validation --data-name imagenet-val --protocol dcae \
  --metrics psnr,ssim,ssim-border,lpips,rfid,latent-rms \
  --out "$out/eval" "$@"
part "results" "$python" -m dcae_jax results "$out/eval" --out "$out/results.html" \
  ${RELEASE:+--published "$RELEASE"}
