"""Import an autoencoder from PyTorch's layouts: a folder, a file, or a name on the hub.

The result is a workdir: --config.init_from, reconstruct, export and --mode=eval take it.  Tensors
do not tell whose they are: of a bare file only --variant says it, and with it the scaling factor.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from dcae_jax.cli import _options

if TYPE_CHECKING:
    from etils import epath

    from dcae_jax.convert.from_torch import Imported


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax import`."""
    args = _parser().parse_args(argv)
    from dcae_jax import backend, checkpoint
    from dcae_jax.convert import folder, from_torch

    _refuse_workdir(args.source)
    out = checkpoint.absolute(args.out)
    with folder.filling(out, ours=("checkpoints",)):
        backend.compile_cache("auto")
        found = from_torch.load(args.source, args.variant, args.part)
        for line in _summary(found):
            print(line, flush=True)
        write(found, out)
    print(f"wrote {out}")
    return 0


def _refuse_workdir(source: str) -> None:
    from dcae_jax import checkpoint
    from dcae_jax.errors import UserError

    if checkpoint.newest_meta(checkpoint.workdir_of(source)) is not None:
        raise UserError(
            f"{source} is a workdir already: use it as it is (--config.init_from, reconstruct, "
            "export, ...); import takes weights in PyTorch's layouts"
        )


def _parser() -> argparse.ArgumentParser:
    parser = _options.parser("import", __doc__)
    parser.add_argument(
        "--from", dest="source", required=True, metavar="PATH_OR_HUB_NAME",
        help="a folder with config.json and weights (diffusers or official), a .safetensors, .pt "
        "or .pth file, or owner/name on the Hugging Face hub",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--variant", metavar="NAME", help="the release, where the source leaves it open"
    )
    parser.add_argument(
        "--part", metavar="NAME",
        help="which weights of a training checkpoint that holds several, such as ema/0.9999",
    )  # fmt: skip
    return parser


def _summary(found: "Imported") -> list[str]:
    from dcae_jax import tree

    cfg, factor = found.cfg, found.scaling_factor
    what = found.release or "no known release"
    size = tree.size(found.variables["params"])
    known = f"{factor:g}" if factor is not None else "unknown: measure it with latent-stats"
    return [
        f"{found.source}: {what}, f{cfg.factor}c{cfg.latent_channels}, {size:,} parameters",
        f"  scaling factor {known}",
        *(f"  {note}" for note in found.notes),
    ]


def write(found: "Imported", out: "epath.Path") -> None:
    """Fills the workdir: a checkpoint of step 0, then config.json; without that it is incomplete.

    Its config is a whole run that would continue these weights.
    """
    from dcae_jax import autoencoder, checkpoint, config, provenance, recipes, tree
    from dcae_jax.convert import folder
    from dcae_jax.step import TrainState

    run = recipes.released(found.cfg, name=found.release or found.source)
    config.validate(config.resolve(run))
    origin = autoencoder.imported(found).origin.to_json()
    meta = provenance.meta(run, data="") | {"autoencoder": origin}
    stats = {"ae": found.variables["batch_stats"]} if "batch_stats" in found.variables else {}
    state = TrainState(0, {"ae": found.variables["params"]}, stats, ema={}, opt={})
    folder.require_room(out, 4 * tree.size(found.variables))  # all f32
    with folder.writing(out):
        checkpoints = checkpoint.Checkpoints(out, run.checkpoint)
        checkpoints.save(state, meta)
        checkpoints.close()
        record = meta | {"command": sys.argv}
        (out / folder.CONFIG).write_text(json.dumps(record, indent=2))
