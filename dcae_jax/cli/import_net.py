"""Fetch or convert the weights of a frozen network: inception (FID), lpips-alex, lpips-vgg.

The public files are downloaded, or given with --from in any order: each is known by the names of
its tensors.  They are read without PyTorch, their SHA256 is compared with the published one, and
what is written records where they came from.  inception needs one file (96 MB); LPIPS two: the
backbone of torchvision (AlexNet 244 MB, VGG16 528 MB; only its convolutions are kept) and the
linear heads, version 0.1 (a few kB; also in the PyPI package lpips, in lpips/weights/v0.1).
The LPIPS of `evaluate` is that of lpips-alex, as DC-AE's scores are; lpips-vgg serves training
alone, its loss and its evaluators (lpips=vgg).
"""

import argparse
import hashlib
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from dcae_jax.errors import UserError
from dcae_jax.nets import inception, lpips, weights
from dcae_jax.nets.torch_file import open_tensors


class Published(NamedTuple):
    """A public file: how it is known, where it lies, and its SHA256 or the start of it."""

    role: str
    mark: str  # a tensor that tells it from the others
    needed: str  # how the names of the tensors start that are read
    url: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's own name, the end of its address."""
        return self.url.rsplit("/", 1)[1]


class Net(NamedTuple):
    """What can be imported: its files, from their tensors to parameters, and random ones."""

    files: tuple[Published, ...]
    convert: Callable[..., weights.Params]  # of the tensors of each file, in the order of `files`
    random: Callable[[int, int], weights.Params]  # of seed and divisor


def _backbone(url: str, sha256: str) -> Published:
    return Published("backbone", "features.0.weight", "features.", url, sha256)


def _heads(name: str, sha256: str) -> Published:
    return Published(
        "heads",
        "lin0.model.1.weight",
        "lin",
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
        f"v0.1/{name}.pth",
        sha256,
    )


# The names of the files of torchvision and of pytorch-fid hold the first 8 hex digits of their
# SHA256.  Those of the heads are the files' in the PyPI package lpips 0.1.4, which are the same as
# in torchmetrics 1.9.0 and in the repository that the address names.
INCEPTION = Published(
    "weights",
    "Mixed_5b.branch1x1.conv.weight",
    "",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
)
ALEXNET = _backbone("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79")
VGG16 = _backbone("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
ALEX_HEADS = _heads("alex", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0")
VGG_HEADS = _heads("vgg", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")


def nets() -> dict[str, Net]:
    """The networks by the name that the command takes."""

    def of_lpips(net: lpips.Net, *files: Published) -> Net:
        return Net(
            files,
            lambda backbone, heads: lpips.from_torch(backbone, heads, net),
            lambda seed, divisor: lpips.random(seed, net),
        )

    return {
        inception.NAME: Net((INCEPTION,), inception.from_torch, inception.random),
        lpips.ALEXNET.name: of_lpips(lpips.ALEXNET, ALEXNET, ALEX_HEADS),
        lpips.VGG16.name: of_lpips(lpips.VGG16, VGG16, VGG_HEADS),
    }


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax import-net`."""
    args = _parser().parse_args(argv)
    out = weights.default_path(args.net) if args.out is None else epath.Path(args.out).expanduser()
    if args.random is not None:
        params, info = _random(args, out)
    else:
        params, info = _imported(args)
    for key, value in sorted(weights.save(out, args.net, params, info).items()):
        print(f"  {key}: {value}")
    print(f"wrote {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dcae_jax import-net",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="public files:\n" + "\n".join(_listed(name) for name in nets()),
    )
    parser.add_argument("net", choices=list(nets()), help="the network")
    add = parser.add_argument
    add(
        "--from",
        dest="files",
        metavar="FILE",
        nargs="+",
        default=[],
        help="public files that you have (.pth, or .safetensors with the same names)",
    )
    add("--out", metavar="FILE", help="default: NET.safetensors in $DCAE_JAX_NETS or the cache")
    add(
        "--accept-unknown-digest",
        action="store_true",
        help="take files whose SHA256 is not the published one; they are recorded as such",
    )
    add(
        "--random",
        metavar="SEED",
        type=int,
        help="random weights, to try an evaluation without a network: its scores mean nothing",
    )
    add("--divisor", metavar="N", type=int, help="--random inception with 1/N of the channels")
    return parser


def _listed(name: str) -> str:
    return "\n".join(f"  {name}: {file.url}" for file in nets()[name].files)


# --- random weights


def _random(args: argparse.Namespace, out: epath.Path) -> tuple[weights.Params, dict[str, str]]:
    """Random weights and what the file says of them; never in the place of others."""
    divisor = 1 if args.divisor is None else args.divisor
    if args.files:
        raise UserError("--random makes weights and --from reads them; leave out one of the two")
    if args.divisor is not None and args.net != inception.NAME:
        raise UserError(f"--divisor is for inception alone; leave it out for {args.net}")
    if not 1 <= divisor <= inception.MAX_DIVISOR or args.random < 0:
        raise UserError(
            f"--random {args.random} --divisor {divisor}: expected a seed from 0 on and a divisor "
            f"from 1 to {inception.MAX_DIVISOR}"
        )
    source = f"random weights, seed {args.random}"
    if out.exists() and not weights.info(args.net, out).get("source", "").startswith("random"):
        raise UserError(f"{out} holds weights that are not random; give another --out")
    print(f"{source}: scores with them compare with nothing")
    shrunk = {"divisor": str(divisor)} if divisor > 1 else {}
    return nets()[args.net].random(args.random, divisor), {
        "source": source + (f", 1/{divisor} of the channels" if divisor > 1 else ""),
        "published": "no",
        **shrunk,
    }


# --- public files


def _imported(args: argparse.Namespace) -> tuple[weights.Params, dict[str, str]]:
    """Reads or downloads the files, checks and converts them; what the file says of them."""
    if args.divisor is not None:
        raise UserError("--divisor makes narrow random weights; add --random SEED, or leave it out")
    net, info, states = nets()[args.net], {"published": "yes"}, []
    given = _recognised(args.net, args.files)
    with tempfile.TemporaryDirectory(prefix="dcae_jax_import_") as folder:
        for file in net.files:
            path = given.get(file) or _download(args.net, file, Path(folder) / file.name)
            sha, published = _check_digest(file, path, args.accept_unknown_digest)
            info |= {
                f"{file.role}_sha256": sha,
                f"{file.role}_source": path.name if file in given else file.url,
                **({} if published else {"published": "no"}),
            }
            states.append(_tensors(file, path))
    return net.convert(*states), info


def _recognised(name: str, paths: Sequence[str]) -> dict[Published, epath.Path]:
    """Which public file each of the given ones is, by the names of its tensors."""
    files, found = nets()[name].files, {}
    for path in (epath.Path(p).expanduser() for p in paths):
        with open_tensors(path) as tensors:
            fits = [file for file in files if file.mark in tensors.infos]
        if not fits:
            expected = "; or ".join(f"{file.name}, with {file.mark}" for file in files)
            raise UserError(f"--from {path} is no file of {name}: expected {expected}")
        if fits[0] in found:
            raise UserError(f"--from: {found[fits[0]]} and {path} are both the {fits[0].role}")
        found[fits[0]] = path
    return found


def _tensors(file: Published, path: epath.Path) -> dict[str, np.ndarray]:
    with open_tensors(path) as tensors:
        names = [name for name in tensors.infos if name.startswith(file.needed)]
        return {name: tensors.read(name) for name in names}


def _download(net: str, file: Published, path: Path) -> epath.Path:
    """Streams the public file to `path`, with progress on stderr."""
    try:
        with urllib.request.urlopen(file.url, timeout=60) as source, path.open("wb") as target:
            size, done = int(source.headers.get("Content-Length") or 0), 0
            while chunk := source.read(1 << 20):
                target.write(chunk)
                done += len(chunk)
                _progress(file.name, done, size)
    except OSError as e:  # URLError and timeouts are OSErrors
        raise UserError(_offline(net, file, e)) from e
    print(file=sys.stderr)
    if size and done != size:
        raise UserError(_offline(net, file, f"{done} of {size} bytes arrived"))
    return epath.Path(path)


def _progress(name: str, done: int, size: int) -> None:
    share = f" of {size / 1e6:.1f} MB, {done / size:.0%}" if size else " MB"
    print(f"\r{name}: {done / 1e6:.1f}{share}", end="", file=sys.stderr, flush=True)


def _offline(net: str, file: Published, reason: object) -> str:
    files = nets()[net].files
    return (
        f"could not download {file.url} ({reason}).\n"
        "On a machine with a network, fetch\n"
        + "".join(f"  {f.url}\n" for f in files)
        + "copy here what you fetched, and run\n"
        f"  {weights.command(net)} --from {' '.join(f.name for f in files)}"
    )


def _check_digest(file: Published, path: epath.Path, accept_unknown: bool) -> tuple[str, bool]:
    """SHA256 of the file, and whether it is the published one; UserError if that is needed."""
    sha = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(1 << 20):
            sha.update(chunk)
    found = sha.hexdigest()
    published = found.startswith(file.sha256)
    if not published and not accept_unknown:
        raise UserError(
            f"{path.name} has SHA256 {found}, but {file.name} has {file.sha256}...: the file is "
            "damaged or another one. Fetch it again, or add --accept-unknown-digest if you know "
            "that it holds the same weights."
        )
    note = "as published" if published else f"NOT the published {file.sha256}..., accepted"
    print(f"{path.name}: sha256 {found} ({note})")
    return found, published
