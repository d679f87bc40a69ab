"""Export an autoencoder, diffusion model or masked autoencoder to PyTorch, checked if it can be.

OUT holds config.json, the weights, parity.npz (an input with what the network makes of it) and a
README.md with the PyTorch lines that check them.  Where torch and diffusers (masked autoencoders:
torch and transformers) are installed, the folder is loaded and run at once; --verify makes that
mandatory.

Layouts: official (efficientvit, DC-Gen), diffusers (AutoencoderDC, AutoencoderKL, DiT), and of
diffusion models u_vit (baofff) and dit (DiT and SiT as their authors name them).  Of masked
autoencoders, on pixels or latents, vit_mae (transformers' ViTMAEForPreTraining) and vit_mae_encoder
(ViTMAEModel, without the decoder).
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from dcae_jax.cli import _options

if TYPE_CHECKING:
    from etils import epath

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.convert.to_torch import Export


DIFFUSION_ONLY = ("u_vit", "dit")
MASKED_ONLY = ("vit_mae", "vit_mae_encoder")


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax export`."""
    args = _parser().parse_args(argv)
    from dcae_jax import backend, checkpoint
    from dcae_jax.cli import _diffusion, _mae
    from dcae_jax.convert import folder, to_torch

    out = checkpoint.absolute(args.out)
    with folder.filling(out, to_torch.FILES):
        backend.compile_cache("auto")
        write = _export
        if _mae.is_run(args.workdir, args.part):
            write = _mae.export_model
        elif _diffusion.is_run(args.workdir, args.part):
            write = _diffusion.export_model
        finish = write(args, out)
    finish()
    return 0


def _export(args: argparse.Namespace, out: "epath.Path") -> Callable[[], None]:
    """Writes an autoencoder; returns what to do with the whole folder."""
    from dcae_jax import autoencoder
    from dcae_jax.convert import to_torch
    from dcae_jax.errors import UserError

    if args.to in DIFFUSION_ONLY or args.diffusers_times:
        what = "--diffusers-times" if args.diffusers_times else f"--to {args.to}"
        raise UserError(f"{what} is for diffusion models; {args.workdir} is an autoencoder")
    if args.to in MASKED_ONLY:
        raise UserError(f"--to {args.to} is for masked autoencoders; {args.workdir} is none")
    weights = _options.weights(args)
    export = _plan(autoencoder.load(args.workdir, weights, part=args.part), args)
    _check_verifiable(export, out, args.verify)
    to_torch.fill(export, out)
    return lambda: _finish(export, out)


def _finish(export: "Export", out: "epath.Path") -> None:
    """Says what was written, and checks it."""
    print(f"wrote {out}: {export.source}, scaling factor {export.scaling_factor:g}", flush=True)
    for note in _notes(export):
        print(f"  {note}", flush=True)
    _verify(export, out)


def _notes(export: "Export") -> list[str]:
    """What a reader of the folder should know before using it."""
    from dcae_jax import tree
    from dcae_jax.convert import names, to_torch

    entries = names.table(export.cfg, export.layout)
    bad = names.not_finite(entries, tree.flatten(export.variables))
    return [note for note in (bad, to_torch.unknown_to_official(export)) if note]


def _parser() -> argparse.ArgumentParser:
    parser = _options.parser("export", __doc__)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR",
        help="of a run or an import, or one step of it; of autoencoders also what import takes",
    )  # fmt: skip
    layouts = ("diffusers", "official", *DIFFUSION_ONLY, *MASKED_ONLY)
    parser.add_argument("--to", required=True, choices=layouts, help="the layout")
    _options.add_weights(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--scaling-factor", type=float, metavar="X",
        help="1 / RMS of the latents, instead of what is recorded with the weights",
    )  # fmt: skip
    parser.add_argument(
        "--variant", metavar="NAME",
        help="a release with this network: the official code builds networks by such names",
    )  # fmt: skip
    parser.add_argument(
        "--diffusers-times", action="store_true",
        help="write a DiT --to diffusers although that gives it other time frequencies",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="fail unless PyTorch has agreed")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the tensors (default: as imported, float32 for trained weights)",
    )  # fmt: skip
    return parser


def _plan(ae: "Autoencoder", args: argparse.Namespace) -> "Export":
    """What will be written; UserError if the scaling factor is unknown."""
    from dcae_jax.autoencoder import Origin
    from dcae_jax.convert import names
    from dcae_jax.convert.to_torch import Export

    layout, origin = names.Layout(args.to), ae.origin or Origin()
    return Export(
        ae.cfg, ae.variables, layout, _factor(ae, args), ae.source, origin.release,
        unchanged=ae.origin is not None,
        variant=_variant(ae, args.variant),
        dtypes=names.translated(ae.cfg, origin.dtypes, layout),
        counters=names.translated(ae.cfg, origin.counters, layout),
        dtype=args.dtype,
        extra=origin.extra,
    )  # fmt: skip


def _factor(ae: "Autoencoder", args: argparse.Namespace) -> float:
    from dcae_jax.errors import UserError

    given, known = args.scaling_factor, ae.scaling_factor
    if given is None and known is None:
        raise UserError(
            f"the scaling factor of {ae.source} is unknown: measure it with\n"
            f"  python -m dcae_jax latent-stats --from {args.workdir} ...\n"
            "or give it with --scaling-factor (1 / RMS of the latents).\n"
            f"Looked for: {ae.factor_origin}"
        )
    if given is not None and not 0 < given < float("inf"):
        raise UserError(f"--scaling-factor {given} is not positive; it is 1 / RMS of the latents")
    if None not in (given, known) and given != known:
        print(f"scaling factor {given:g} as given, instead of {known:g} as recorded", flush=True)
    elif given is None:
        print(f"scaling factor {known:g}, {ae.factor_origin}", flush=True)
    return known if given is None else given


def _variant(ae: "Autoencoder", variant: str | None) -> str | None:
    """The release whose network this is, as the user says; UserError if it is not."""
    from dcae_jax.convert import layouts, releases
    from dcae_jax.errors import UserError

    if variant is None:
        return None
    release = releases.require(variant)
    found = layouts.network_differences(ae.cfg, releases.RELEASES[release].config())
    if found:
        lines = "\n".join(f"  - {line}" for line in found)
        raise UserError(f"{ae.source} is not the network of {release} (here, there):\n{lines}")
    return release


def _check_verifiable(export: "Export", out: "epath.Path", must: bool) -> None:
    """UserError, before anything is written, if --verify cannot be kept."""
    from dcae_jax.convert import verify
    from dcae_jax.errors import UserError

    if must and (why := verify.problem(export.cfg, out)):
        raise UserError(f"--verify: {why}")


def _verify(export: "Export", out: "epath.Path") -> None:
    from dcae_jax.convert import to_torch, verify

    if why := verify.problem(export.cfg, out):
        lines = "; README.md there has the lines that check it"
        print(f"not verified: {why}{'' if to_torch.unknown_to_official(export) else lines}")
        return
    errors = verify.verify(out, export.cfg, export.layout)
    verify.check(out, errors)
    print(
        f"verified in PyTorch: largest relative error {errors.latent:.1e} of the latent, "
        f"{errors.reconstruction:.1e} of the reconstruction"
    )
