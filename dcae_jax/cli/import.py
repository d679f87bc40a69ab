"""Import an autoencoder, diffusion model or masked autoencoder from PyTorch.

The source is a folder, a file, or a name on the hub.  The result is a workdir: --config.init_from,
export and --mode=eval take it, reconstruct those of autoencoders, sample those of diffusion models.
Tensors do not tell whose they are: of a bare file only --variant says it, and with it the scaling
factor.

Diffusion models are UViT and USiT (efficientvit, DC-Gen, baofff), DiT and SiT (facebook, willisma,
efficientvit, diffusers).  Tensors tell neither the process nor the latents they were trained on:
--variant names a release, or a family ("usit") or size of one ("usit-h"); of weights that are no
release's, --autoencoder names the autoencoder.  An autoencoder in the same file is left out;
--part autoencoder imports it instead.

Masked autoencoders are transformers' ViTMAE (ViTMAEForPreTraining, ViTMAEModel: facebook/vit-mae-*)
and the files of MAE's own code.  Of one without a decoder the decoder is drawn anew.  Positions
must be the fixed sines and cosines: fine-tuned networks are refused.
"""

import argparse
from typing import TYPE_CHECKING

from dcae_jax.cli import _options

if TYPE_CHECKING:
    from etils import epath

    from dcae_jax.convert.from_torch import Imported


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax import`."""
    args = _parser().parse_args(argv)
    from dcae_jax import backend, checkpoint
    from dcae_jax.cli import _diffusion, _mae
    from dcae_jax.convert import diffusion_from_torch, folder, mae_from_torch
    from dcae_jax.errors import UserError

    _refuse_workdir(args.source)
    out = checkpoint.home(args.out)
    with folder.filling(out, ours=("checkpoints",)):
        backend.compile_cache("auto")
        if mae_from_torch.recognises(args.source, args.part):
            _mae.import_model(args, out)
        elif args.decoder_heads is not None:
            raise UserError(
                f"--decoder-heads is for masked autoencoders, and {args.source} is none"
            )
        elif diffusion_from_torch.recognises(args.source, args.part):
            _diffusion.import_model(args, out)
        else:
            _import_autoencoder(args, out)
    print(f"wrote {out}")
    return 0


def _import_autoencoder(args: argparse.Namespace, out: "epath.Path") -> None:
    from dcae_jax.convert import from_torch
    from dcae_jax.errors import UserError

    given = {"--autoencoder": args.autoencoder, "--scaling-factor": args.scaling_factor,
             "--heads": args.heads}  # fmt: skip
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{', '.join(wrong)} is for diffusion models, and {args.source} is none")
    found = from_torch.load(args.source, args.variant, args.part)
    for line in _summary(found):
        print(line, flush=True)
    write(found, out)


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
        help="a folder with config.json and weights (diffusers, transformers or official), a "
        ".safetensors, .pt or .pth file, or owner/name on the Hugging Face hub",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--variant", metavar="NAME", help="the release, where the source leaves it open"
    )
    parser.add_argument(
        "--part", metavar="NAME",
        help="which weights of a training checkpoint that holds several, such as ema/0.9999 or "
        "ema; autoencoder: that of an official diffusion model's file",
    )  # fmt: skip
    add = parser.add_argument
    add("--autoencoder", metavar="AE", help="whose latents a diffusion model was trained on")
    add("--scaling-factor", type=float, metavar="X",
        help="that they were multiplied by, if it is not the autoencoder's own")  # fmt: skip
    add(
        "--heads",
        type=int,
        metavar="N",
        help="of a model of no published size, where no config.json says it",
    )
    add("--decoder-heads", type=int, metavar="N", help="likewise of a masked autoencoder's decoder")
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
    """Fills the workdir: see `_imported.write`."""
    from dcae_jax import autoencoder, recipes
    from dcae_jax.cli import _imported

    run = recipes.released(found.cfg, name=found.release or found.source)
    origin = autoencoder.imported(found).origin.to_json()
    _imported.write(run, "ae", found.variables, {"autoencoder": origin}, out)
