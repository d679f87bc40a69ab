"""Encode images of any size into one safetensors file of latents.

The latents are f32 and not scaled, [h, w, channels] under the name of each image; multiply them by
the scaling factor in the metadata for a diffusion model. `decode` gives the images back. Images are
read as by `reconstruct`. Example:

  python -m dcae_jax encode --from runs/demo/phase3 --images holidays/ --out latents.safetensors

A bad image is named and left out; the exit code is then 1.
"""

from typing import TYPE_CHECKING

from dcae_jax.cli import _options

if TYPE_CHECKING:
    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.codec import Codec, CodecConfig
    from dcae_jax.data.files import ImageFile
    from dcae_jax.latent_file import Description, Writer


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax encode`; 1 if an image could not be used."""
    parser = _options.parser("encode", __doc__)
    _options.add_source(parser)
    _options.add_images(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="a new .safetensors file")
    _options.add_codec(parser)
    args = parser.parse_args(argv)
    from dcae_jax import latent_file, outputs
    from dcae_jax.data import files

    cfg = _options.codec_config(args)
    found = files.find(args.images, reserved=("__metadata__",))
    out = outputs.new_file(args.out, ".safetensors", "--out")
    net = _options.load(args)
    codec = _options.open_codec(net, cfg)
    with latent_file.writer(_describe(net, cfg, codec)) as writer:
        bad = _all(codec, found, writer)
        if len(writer):
            writer.finish(out)
            print(f"{len(writer)} latents in {out}" + (f", {bad} bad image(s)" if bad else ""))
    return 1 if bad else 0


def _describe(net: "Autoencoder", cfg: "CodecConfig", codec: "Codec") -> "Description":
    from dcae_jax.codec import PADDING
    from dcae_jax.latent_file import Description

    return Description(
        source=net.source, encoder=net.encoder, factor=codec.factor,
        channels=net.cfg.latent_channels, scaling_factor=net.scaling_factor, padding=PADDING,
        dtype=cfg.dtype.value, tile=codec.tiling.tile if codec.tiling else 0,
        overlap=codec.tiling.overlap if codec.tiling else 0,
    )  # fmt: skip


def _all(codec: "Codec", found: "list[ImageFile]", writer: "Writer") -> int:
    """Encodes all; the number of bad images."""
    bad: list[dict[str, str]] = []
    for progress, file, image in _options.each_image(found, bad):
        height, width = image.shape[:2]
        latent = codec.encode(image)
        writer.add(file.name, latent, (height, width))
        shape = " x ".join(map(str, latent.shape))
        print(f"{progress} {file.name}  {width} x {height} px -> {shape}", flush=True)
    return len(bad)
