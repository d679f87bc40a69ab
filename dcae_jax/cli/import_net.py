"""Fetch or convert the weights of a frozen network (LPIPS) for losses and metrics.

LPIPS needs two public files: the VGG16 of torchvision (528 MB, only its convolutions are kept) and
the linear heads of richzhang/PerceptualSimilarity, version 0.1 (7 kB).  Both are read without
PyTorch.  What is written (59 MB) records where they came from and their SHA256.
"""

import argparse
import hashlib
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from etils import epath

from dcae_jax.errors import UserError


class Published(NamedTuple):
    """A public file: its option, where it lies, and the start of its SHA256 where published."""

    option: str
    url: str
    sha256: str | None

    @property
    def name(self) -> str:
        """The file's own name, the end of its address."""
        return self.url.rsplit("/", 1)[1]


# torchvision puts the first 8 hex digits of the SHA256 in the name.  No SHA256 of the heads is
# published: theirs is printed and recorded, and `from_torch` checks their shapes and signs.
VGG = Published("--vgg", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
HEADS = Published(
    "--heads",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
    None,
)


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax import-net`."""
    args = _parser().parse_args(argv)
    out = import_lpips(args.vgg, args.heads, args.out, args.accept_unknown_digest)
    print(f"wrote {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    from dcae_jax.nets import lpips

    parser = argparse.ArgumentParser(
        prog="python -m dcae_jax import-net",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("net", choices=["lpips"], help="the network")
    for file in (VGG, HEADS):
        parser.add_argument(
            file.option,
            metavar="FILE",
            help=f"{file.name} (.pth, or .safetensors with the same names); default: {file.url}",
        )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"default: {lpips.default_path()} (its folder: $DCAE_JAX_NETS)",
    )
    parser.add_argument(
        "--accept-unknown-digest",
        action="store_true",
        help="take a VGG16 file whose SHA256 is not the published one",
    )
    return parser


def import_lpips(
    vgg: epath.PathLike | None,
    heads: epath.PathLike | None,
    out: epath.PathLike | None,
    accept_unknown_digest: bool,
) -> epath.Path:
    """Reads or downloads both files, checks, converts, writes; returns the path written."""
    from dcae_jax.nets import lpips
    from dcae_jax.nets.torch_file import read_state_dict

    info, states = {"net": "vgg16", "version": "0.1"}, {}
    with tempfile.TemporaryDirectory(prefix="dcae_jax_import_") as folder:
        paths = [_locate(VGG, vgg, Path(folder)), _locate(HEADS, heads, Path(folder) / "heads")]
        for file, path, given in zip((VGG, HEADS), paths, (vgg, heads), strict=True):
            key = file.option.removeprefix("--")
            info[f"{key}_sha256"] = _check_digest(file, path, accept_unknown_digest)
            info[f"{key}_source"] = path.name if given else file.url
            states[key] = read_state_dict(path)
    params = lpips.from_torch(states["vgg"], states["heads"])
    out = lpips.default_path() if out is None else epath.Path(out).expanduser()
    for key, value in sorted(lpips.save(out, params, info).items()):
        print(f"  {key}: {value}")
    return out


def _locate(file: Published, given: epath.PathLike | None, folder: Path) -> epath.Path:
    """The file that was given, or a fresh download of the public one."""
    if given is not None:
        path = epath.Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"{file.option}: no file {path}. Expected {file.name} from {file.url}")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    return epath.Path(_download(file, folder / file.name))


def _download(file: Published, path: Path) -> Path:
    """Streams the public file to `path`, with progress on stderr."""
    try:
        with urllib.request.urlopen(file.url, timeout=60) as source, path.open("wb") as target:
            size, done = int(source.headers.get("Content-Length") or 0), 0
            while chunk := source.read(1 << 20):
                target.write(chunk)
                done += len(chunk)
                _progress(file.name, done, size)
    except OSError as e:  # URLError and timeouts are OSErrors
        raise UserError(_offline(file, e)) from e
    finally:
        print(file=sys.stderr)
    if size and done != size:
        raise UserError(_offline(file, f"{done} of {size} bytes arrived"))
    return path


def _progress(name: str, done: int, size: int) -> None:
    share = f" of {size / 1e6:.1f} MB, {done / size:.0%}" if size else " MB"
    print(f"\r{name}: {done / 1e6:.1f}{share}", end="", file=sys.stderr, flush=True)


def _offline(file: Published, reason: object) -> str:
    return (
        f"could not download {file.url} ({reason}).\n"
        "On a machine with a network, fetch the two files\n"
        f"  {VGG.url}\n  {HEADS.url}\n"
        "copy them here, and run\n"
        "  python -m dcae_jax import-net lpips --vgg vgg16-397923af.pth --heads vgg.pth"
    )


def _check_digest(file: Published, path: epath.Path, accept_unknown: bool) -> str:
    """SHA256 of the file; UserError when it is not the published one and that is not accepted."""
    sha = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(1 << 20):
            sha.update(chunk)
    found = sha.hexdigest()
    if file.sha256 is None:
        print(f"{path.name}: sha256 {found} (none is published to compare with)")
    elif found.startswith(file.sha256):
        print(f"{path.name}: sha256 {found} (as published)")
    elif accept_unknown:
        print(f"{path.name}: sha256 {found} (NOT the published {file.sha256}..., accepted)")
    else:
        raise UserError(
            f"{path.name} has SHA256 {found}, but {file.name} has {file.sha256}...: the file is "
            "damaged or another one. Fetch it again, or add --accept-unknown-digest if you know "
            "that it holds the same weights."
        )
    return found
