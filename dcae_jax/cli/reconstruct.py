"""Reconstruct images of any size: PNGs, a grid with the errors, PSNR and SSIM.

Images are turned upright (EXIF), transparent ones laid on white, grey and CMYK ones made RGB; their
last row and column are repeated up to a multiple of the autoencoder's factor, and cropped again.
Folders are read with their subfolders. A bad image is named and left out; the exit code is then 1.
Examples:

  python -m dcae_jax reconstruct --from runs/demo/phase3 --images photo.jpg holidays/ --out seen
  python -m dcae_jax reconstruct --from runs/demo/phase3 --images huge.tif --out seen \\
      --tile 1024 --overlap 256 --compare-untiled

OUT/NAME.png is the reconstruction of each image, OUT/grid.png shows the first ones as
original | reconstruction | error, OUT/scores.json holds the scores. What fits is best done whole
(tiles change the result a little: --compare-untiled measures it), or with --spatial N on N devices.
Each size compiles once; among many sizes, --tile gives those above it one size.
"""

import dataclasses
import json
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dcae_jax.cli import _options

if TYPE_CHECKING:
    import numpy as np
    from etils import epath

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.codec import Codec, CodecConfig
    from dcae_jax.data.files import ImageFile
    from dcae_jax.data.transforms import Pixels

_SHOWN = 8  # images in the grid
_CELL = 384  # pixels of the longer side of a picture in the grid
_GAIN = 4.0  # of the errors there
COLUMNS = ("original", "reconstruction", f"error x{_GAIN:g}")
_LABEL = 28  # letters of a name in the grid
_SEAM = 2.0  # ratio of what tiles change in the overlaps to elsewhere, above which it is told


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax reconstruct`; 1 if an image could not be used."""
    parser = _options.parser("reconstruct", __doc__)
    _options.add_source(parser)
    _options.add_images(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    _options.add_codec(parser)
    parser.add_argument(
        "--compare-untiled", action="store_true",
        help="also do each image whole and print how much the tiles changed it",
    )  # fmt: skip
    args = parser.parse_args(argv)
    from dcae_jax import outputs
    from dcae_jax.data import files
    from dcae_jax.errors import UserError

    if args.compare_untiled and not args.tile:
        raise UserError("--compare-untiled compares tiles with the whole image: give --tile")
    cfg = _options.codec_config(args)
    found = files.find(args.images, reserved=("grid",))
    out = outputs.new_folder(args.out, "--out")
    net = _options.load(args)
    codec = _options.open_codec(net, cfg)
    work = _Work(codec, codec.untiled() if args.compare_untiled else None, out)
    with outputs.claimed(out, "--out"):
        rows, bad, shown = _all(work, found)
        _write_scores(out, net, cfg, rows, bad)
        if rows:
            _write_grid(out, rows, shown, net.source)
    if rows:
        print(table(rows))
    _warn_of_seams(rows)
    print(f"\n{len(rows)} reconstructions in {out}" + (f", {len(bad)} bad image(s)" if bad else ""))
    return 1 if bad else 0


class _Work(NamedTuple):
    codec: "Codec"
    untiled: "Codec | None"
    out: "epath.Path"


def _all(
    work: _Work, found: "list[ImageFile]"
) -> "tuple[list[dict[str, Any]], list[dict[str, str]], dict[str, list[np.ndarray]]]":
    """(scores, bad files, pictures for the grid)."""
    rows, bad, shown = [], [], {}
    for progress, file, original in _options.each_image(found, bad):
        begin = time.perf_counter()
        row, reconstruction = _one(work, file, original)
        rows.append(row)
        if len(shown) < _SHOWN or file.name < max(shown):
            shown[file.name] = cells(original, reconstruction)
            shown = dict(sorted(shown.items())[:_SHOWN])
        seconds = time.perf_counter() - begin
        size = f"{row['width']} x {row['height']}"
        print(f"{progress} {file.name}  {size} px, {seconds:.1f} s", flush=True)
    return sorted(rows, key=lambda row: row["name"]), bad, shown


def _one(work: _Work, file: "ImageFile", original: "Pixels") -> "tuple[dict[str, Any], Pixels]":
    """Reconstructs, writes, scores."""
    from dcae_jax import codec as codec_lib
    from dcae_jax import outputs
    from dcae_jax.report import images as pictures

    height, width = original.shape[:2]
    latent = work.codec.encode(original)
    whole = work.codec.decode(latent)
    pixels = codec_lib.to_pixels(whole, height, width)
    outputs.write(work.out / f"{file.name}.png", pictures.to_png(pixels))
    row = {
        "name": file.name, "file": str(file.path), "height": height, "width": width,
        "latent": list(latent.shape), **_scores(original, pixels),
    }  # fmt: skip
    if work.untiled is not None:
        row["tiled_against_untiled"] = _compare(work, original, whole, row)
    return row, pixels


def _scores(original: "Pixels", pixels: "Pixels") -> dict[str, float | None]:
    """PSNR and SSIM; the PSNR of equal images, which is infinite, is None (null in JSON)."""
    from dcae_jax.evals import image_scores

    found = image_scores.scores(original, pixels)
    return {"psnr": found.psnr if math.isfinite(found.psnr) else None, "ssim": found.ssim}


def _compare(
    work: _Work, original: "Pixels", tiled: "np.ndarray", row: dict[str, Any]
) -> dict[str, float] | None:
    """The difference to the untiled reconstruction in grey levels; None where nothing is cut."""
    from dcae_jax import codec as codec_lib
    from dcae_jax import tiling

    size = tiled.shape[:2]
    if not work.codec.tiling.splits(*size):
        print(f"  {row['name']}: not larger than a tile, done whole")
        return None
    whole = work.untiled.decode(work.untiled.encode(original))
    seams = tiling.blended(*size, work.codec.tiling, work.codec.factor)
    scale = 127.5  # grey levels of 0..255
    found = tiling.difference(scale * tiled, scale * whole, seams)
    scores = _scores(original, codec_lib.to_pixels(whole, row["height"], row["width"]))
    tiles, untiled = (_number(each["psnr"], 2).strip() for each in (row, scores))
    print(
        f"  {row['name']}: |tiled - untiled| in grey levels: largest {found.largest:.2f}; mean in "
        f"the overlaps {found.seam:.4f}, elsewhere {found.interior:.4f} ({found.ratio:.2f} x); "
        f"PSNR {tiles} in tiles, {untiled} whole"
    )
    return {**found._asdict(), "untiled_psnr": scores["psnr"], "untiled_ssim": scores["ssim"]}


def _warn_of_seams(rows: list[dict[str, Any]]) -> None:
    """Says where the tiles can be seen by the measure, and what helps."""
    key = "tiled_against_untiled"
    compared = [row for row in rows if row.get(key)]
    above = [row["name"] for row in compared if row[key]["seam"] > _SEAM * row[key]["interior"]]
    if above:
        print(
            f"warning: in {len(above)} of {len(compared)} images the tiles change the overlaps "
            f"more than {_SEAM:g} times as much as the rest ({', '.join(above[:_SHOWN])}): a "
            "larger --tile makes both smaller, a larger --overlap the overlaps' largest error"
        )


def table(rows: list[dict[str, Any]]) -> str:
    """PSNR and SSIM of each image, and their means."""
    width = max(len("mean"), *(len(row["name"]) for row in rows))
    lines = [f"\n{'image':{width}}  {'size':>13}  PSNR dB    SSIM"]
    for row in rows:
        size = f"{row['width']} x {row['height']}"
        psnr, ssim = row["psnr"], row["ssim"]
        lines.append(f"{row['name']:{width}}  {size:>13}  {_number(psnr, 2)}  {_number(ssim, 4)}")
    means = mean(rows)
    lines.append(
        f"{'mean':{width}}  {'':>13}  {_number(means['psnr'], 2)}  {_number(means['ssim'], 4)}"
    )
    if any(row["psnr"] is None or row["ssim"] is None for row in rows):
        lines.append("-: equal images (PSNR), or below 11 px (SSIM); not in the means")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{digits + 5}}"


def mean(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Means over the images that have the score."""
    found = {}
    for name in ("psnr", "ssim"):
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = sum(values) / len(values) if values else None
    return found


def _write_scores(
    out: "epath.Path", net: "Autoencoder", cfg: "CodecConfig", rows: list[dict[str, Any]],
    bad: list[dict[str, str]],
) -> None:  # fmt: skip
    from dcae_jax import outputs
    from dcae_jax.codec import PADDING

    record = {
        "source": net.source, "encoder": net.encoder,
        **dataclasses.asdict(cfg), "dtype": cfg.dtype.value, "padding": PADDING,
        "images": rows, "mean": mean(rows), "bad": bad,
    }  # fmt: skip
    outputs.write(out / "scores.json", json.dumps(record, indent=1).encode())


def cells(original: "Pixels", reconstruction: "Pixels") -> "list[np.ndarray]":
    """Original, reconstruction and error for the grid, scaled to it after the error was taken."""
    from dcae_jax.report import images as pictures

    error = pictures.error_map(original, reconstruction, _GAIN)
    return [fitted(picture, _CELL) for picture in (original, reconstruction, error)]


def fitted(picture: "Pixels", side: int) -> "Pixels":
    """Large ones as means over pixels; small ones with each pixel repeated."""
    import numpy as np
    from PIL import Image

    if (times := side // max(picture.shape[:2])) > 1:
        return picture.repeat(times, axis=0).repeat(times, axis=1)
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.BOX)
    return np.asarray(image)


def _write_grid(
    out: "epath.Path", rows: list[dict[str, Any]], shown: "dict[str, list[np.ndarray]]", source: str
) -> None:
    from dcae_jax import outputs
    from dcae_jax.report import images as pictures

    labels = [_label(row) for row in rows if row["name"] in shown]
    some = f"{len(shown)} of {len(rows)} images, " if len(shown) < len(rows) else ""
    picture = pictures.grid(
        [shown[row["name"]] for row in rows if row["name"] in shown],
        columns=COLUMNS,
        labels=labels, caption=f"{some}{source}",
    )  # fmt: skip
    outputs.write(out / "grid.png", pictures.to_png(picture))


def _label(row: dict[str, Any]) -> str:
    """Name, size and PSNR."""
    psnr = "identical" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
    return f"{short_name(row['name'])}\n{row['width']} x {row['height']}\n{psnr}"


def short_name(name: str) -> str:
    """Of a long name the end, which tells files of a folder apart."""
    return name if len(name) <= _LABEL else f"...{name[3 - _LABEL :]}"
