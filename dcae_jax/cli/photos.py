"""Write the built-in photographs as PNG files: images to try the commands with.

  python -m dcae_jax photos --out photographs
  python -m dcae_jax photos --out squares --split test --tile 128

A split is the region of each photograph that `make train` trains on, or holds out.  credits.txt,
written last, says whose photographs they are and under which licence.
"""

from typing import TYPE_CHECKING, Any

from dcae_jax.cli import _options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcae_jax.data.transforms import Pixels

CREDITS = "credits.txt"


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax photos`."""
    args = _parser().parse_args(argv)
    from dcae_jax import outputs
    from dcae_jax.data import photos
    from dcae_jax.errors import UserError
    from dcae_jax.report import images

    if args.tile < 0:
        raise UserError(f"--tile {args.tile} must be a number of pixels, or 0 for no tiles")
    out, count = outputs.new_folder(args.out, "--out"), 0
    with outputs.claimed(out, "--out"):
        for name, pixels in _pictures(args.split, args.tile):
            outputs.write(out / f"{name}.png", images.to_png(pixels))
            count += 1
        if not count:
            raise UserError(f"--tile {args.tile} is more than any photograph has")
        outputs.write(out / CREDITS, f"{photos.attribution()}\n".encode())
    print(f"wrote {count} images to {out}")
    return 0


def _parser() -> Any:
    parser = _options.parser("photos", __doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="a new or empty folder")
    add("--split", choices=("all", "train", "test"), default="all", help="default: whole pictures")
    add("--tile", type=int, default=0, metavar="PX",
        help="cut them into squares; what is left at the edges is dropped")  # fmt: skip
    return parser


def _pictures(split: str, tile: int) -> "Iterator[tuple[str, Pixels]]":
    """(name, pixels) of the photographs, or of their tiles from left to right and down."""
    from dcae_jax.data import photos, transforms

    for name, data in photos.available().items():
        pixels = transforms.decode(data, name)
        if split != "all":
            pixels = photos.regions(*pixels.shape[:2])[split].cut(pixels)
        if not tile:
            yield name, pixels
            continue
        for top in range(0, pixels.shape[0] - tile + 1, tile):
            for left in range(0, pixels.shape[1] - tile + 1, tile):
                yield f"{name}-{top}-{left}", photos.Box(top, left, tile, tile).cut(pixels)
