"""Decode a file of latents that `encode` wrote into PNGs of the original sizes.

With the options that `encode` had, the pictures are those of `reconstruct`, bit for bit. Latents of
another encoder are refused (a decoder makes noise of them) unless --force; phase 3 of the training
does not change the encoder, so its decoder takes the latents of phase 2. Example:

  python -m dcae_jax decode --from runs/demo/phase3 --latents latents.safetensors --out pictures

"""

from typing import TYPE_CHECKING

from dcae_jax.cli import _options

if TYPE_CHECKING:
    from etils import epath

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.codec import Codec
    from dcae_jax.latent_file import Description, Reader


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax decode`."""
    parser = _options.parser("decode", __doc__)
    _options.add_source(parser)
    parser.add_argument("--latents", required=True, metavar="FILE", help="what `encode` wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--force", action="store_true", help="decode latents of another encoder all the same"
    )
    _options.add_codec(parser)
    args = parser.parse_args(argv)
    from etils import epath

    from dcae_jax import latent_file, outputs

    cfg = _options.codec_config(args)
    out = outputs.new_folder(args.out, "--out")
    with latent_file.reader(epath.Path(args.latents).expanduser()) as reader:
        total = len(reader.description.sizes)
        net = _options.load(args)
        _check(reader.description, net, args.force)
        codec = _options.open_codec(net, cfg)
        with outputs.claimed(out, "--out"):
            _all(codec, reader, out)
    print(f"{total} pictures in {out}")
    return 0


def _all(codec: "Codec", reader: "Reader", out: "epath.Path") -> None:
    from dcae_jax import codec as codec_lib
    from dcae_jax import outputs
    from dcae_jax.report import images as pictures

    total = len(reader.description.sizes)
    for i, (name, latent, (height, width)) in enumerate(reader, 1):
        pixels = codec_lib.to_pixels(codec.decode(latent), height, width)
        outputs.write(out / f"{name}.png", pictures.to_png(pixels))
        print(f"[{i}/{total}] {name}  {width} x {height} px", flush=True)


def _check(about: "Description", net: "Autoencoder", force: bool) -> None:
    """UserError unless these latents mean something to this decoder."""
    from dcae_jax.errors import UserError

    wanted, found = (net.cfg.factor, net.cfg.latent_channels), (about.factor, about.channels)
    if wanted != found:
        raise UserError(
            f"--latents hold f{found[0]}c{found[1]} latents (factor, channels), --from is an "
            f"f{wanted[0]}c{wanted[1]} autoencoder; they were encoded by: {about.source}"
        )
    if about.encoder != net.encoder and not force:
        raise UserError(
            f"--latents were made by another encoder ({about.source}) than that of --from "
            f"({net.source}); give the autoencoder they come from, or --force if you know that its "
            "encoder means the same"
        )
