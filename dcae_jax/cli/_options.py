"""Options that the commands for images share, and what is made of them."""

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.codec import Codec, CodecConfig
    from dcae_jax.config import InitWeights, RunConfig
    from dcae_jax.data.files import ImageFile
    from dcae_jax.data.pipeline import DataConfig
    from dcae_jax.data.transforms import Pixels

FROM = (
    "workdir of a run or an import, or one step directory of it; folder or file of PyTorch "
    "weights; or a name on the Hugging Face hub"
)


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser whose description is the module's docstring as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m dcae_jax {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_source(to: argparse.ArgumentParser, activations: str = "--dtype") -> None:
    """Which weights, and by the option `activations` the type to compute in."""
    to.add_argument("--from", dest="source", required=True, metavar="DIR_OR_HUB_NAME", help=FROM)
    to.add_argument(
        "--variant", metavar="NAME", help="the release, where a bare file leaves it open"
    )
    add_weights(to)
    to.add_argument(
        activations, choices=("float32", "bfloat16"), default="float32",
        help="of activations; float32 (default) gives the same numbers on every device, bfloat16 "
        "is faster on accelerators and needs half the memory",
    )  # fmt: skip


def add_weights(to: argparse.ArgumentParser) -> None:
    """Which of several weights of one source."""
    to.add_argument(
        "--part", metavar="NAME", help="which weights of a training checkpoint that holds several"
    )
    to.add_argument(
        "--params", choices=("ema", "raw"), default="ema",
        help="which weights of a run: the average (default) or the raw ones",
    )  # fmt: skip


def weights(args: argparse.Namespace) -> "InitWeights":
    """What --params asks for."""
    from dcae_jax.config import InitWeights

    return InitWeights.ema if args.params == "ema" else InitWeights.params


def add_images(to: argparse.ArgumentParser) -> None:
    """Which images."""
    to.add_argument(
        "--images", nargs="+", required=True, metavar="PATH",
        help="image files, and folders, which are read with their subfolders",
    )  # fmt: skip


def add_filters(to: argparse.ArgumentParser) -> None:
    """Which images of a data set are left out, and how many bad ones are too many."""
    to.add_argument(
        "--min-size", type=int, metavar="PX",
        help="leave images out whose shorter side is below; default: that of the data",
    )  # fmt: skip
    to.add_argument(
        "--max-bad-fraction", type=float, metavar="X",
        help="of images that cannot be used, above which it stops; default: that of the data",
    )  # fmt: skip


def filter_problems(args: argparse.Namespace) -> list[str]:
    """What of `add_filters` cannot be."""
    found = []
    if args.min_size is not None and args.min_size < 0:
        found.append(f"--min-size {args.min_size} must be at least 0")
    if args.max_bad_fraction is not None and not 0 <= args.max_bad_fraction <= 1:
        found.append(f"--max-bad-fraction {args.max_bad_fraction} must lie in 0..1")
    return found


def filter_images(data: "DataConfig", args: argparse.Namespace) -> None:
    """Takes over what `add_filters` was given."""
    if args.min_size is not None:
        data.min_size = args.min_size
    if args.max_bad_fraction is not None:
        data.max_bad_fraction = args.max_bad_fraction


def refuse_unknown(overrides: list[str]) -> None:
    """UserError for what neither the command nor --config takes."""
    from dcae_jax.errors import UserError

    named = [
        a for a in overrides if a.startswith("-") and not a.startswith(("--config", "-config"))
    ]
    if named or (overrides and not overrides[0].startswith("-")):
        raise UserError(f"unknown argument(s) {named or overrides}; see --help")


def configured(command: str, overrides: list[str]) -> "RunConfig":
    """The config of --config=FILE and its overrides."""
    from absl import flags

    from dcae_jax import flags as config_flag

    if "config" not in flags.FLAGS:
        config_flag.define_config()
    config_flag.parse([f"python -m dcae_jax {command}", *overrides])
    return flags.FLAGS["config"].value


@contextlib.contextmanager
def own_options() -> "Iterator[None]":
    """Messages of the data pipeline name fields of a config; the command has options for them."""
    from dcae_jax.errors import UserError

    try:
        yield
    except UserError as e:
        text = str(e)
        for name in ("max_bad_fraction", "min_size"):
            text = text.replace(f"data.{name}", f"--{name.replace('_', '-')}")
        raise UserError(text) from e


def in_all_processes(work: "Callable[[], None]") -> int:
    """The exit code of work that several processes share; one that fails does not wait for them."""
    import jax

    from dcae_jax import distributed
    from dcae_jax.errors import UserError

    try:
        work()
    except Exception as error:
        if jax.process_count() == 1:
            raise
        told = isinstance(error, UserError)  # the other processes wait for this one: leave at once
        if not told:
            distributed.settle()
        print(f"error: {error}" if told else traceback.format_exc(), file=sys.stderr)
        return distributed.leave(2 if told else 1, str(error) or type(error).__name__)
    return 0


def add_codec(to: argparse.ArgumentParser) -> None:
    """How large images are computed."""
    to.add_argument(
        "--tile", type=int, default=0, metavar="N",
        help="cut larger images into tiles of N x N pixels: the device holds one tile, whatever "
        "the size of the image; a multiple of the autoencoder's factor",
    )  # fmt: skip
    to.add_argument(
        "--overlap", type=int, default=0, metavar="M",
        help="pixels that tiles share at least, blended; a multiple of the factor up to half a "
        "tile (default: a quarter)",
    )  # fmt: skip
    to.add_argument(
        "--spatial", type=int, default=1, metavar="N",
        help="share the height of each image among N devices: each holds an N-th of the "
        "activations, and the result is that of one device, to rounding; not with --tile",
    )  # fmt: skip


def codec_config(args: argparse.Namespace) -> "CodecConfig":
    """The values of `add_codec`; UserError if they cannot be, whatever the autoencoder."""
    import jax

    from dcae_jax import codec
    from dcae_jax.models.layers import Dtype

    cfg = codec.CodecConfig(Dtype(args.dtype), args.tile, args.overlap, args.spatial)
    codec.check(cfg, jax.device_count())
    return cfg


def load(args: argparse.Namespace) -> "Autoencoder":
    """The autoencoder of `add_source`; says which weights it found."""
    from dcae_jax import autoencoder, backend

    backend.compile_cache("auto")
    net = autoencoder.load(args.source, weights(args), args.variant, args.part)
    factor = "unknown" if net.scaling_factor is None else f"{net.scaling_factor:.5g}"
    print(
        f"{net.source}: f{net.cfg.factor}c{net.cfg.latent_channels}, scaling factor {factor} "
        f"({net.factor_origin})",
        flush=True,
    )
    return net


def open_codec(net: "Autoencoder", cfg: "CodecConfig") -> "Codec":
    """The autoencoder ready for images, with its progress on stdout."""
    from dcae_jax import codec

    return codec.Codec(net, cfg, lambda line: print(line, flush=True))


def each_image(
    found: "list[ImageFile]", bad: list[dict[str, str]]
) -> "Iterator[tuple[str, ImageFile, Pixels]]":
    """("[3/12]", file, pixels) of the intact images, equal sizes behind each other.

    A bad one is named on stderr and added to `bad`.
    """
    from dcae_jax.data.transforms import BadRecord

    for i, file in enumerate(sorted(found, key=lambda file: (file.size(), file.name)), 1):
        progress = f"[{i}/{len(found)}]"
        try:
            pixels = file.read()
        except BadRecord as e:
            bad.append({"file": str(file.path), "reason": str(e)})
            print(f"{progress} left out: {e}", file=sys.stderr, flush=True)
            continue
        yield progress, file, pixels
