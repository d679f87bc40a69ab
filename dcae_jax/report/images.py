"""Picture grids for people: original | reconstruction | error, with captions drawn in.  No jax.

Callers give the same images at each step, so that one run's grids compare.
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

Picture = UInt8[np.ndarray, "_ _ 3"]  # of any size: pictures of one call may differ

_INK, _FAINT, _PAPER = (32, 33, 36), (110, 114, 120), (255, 255, 255)
_TAGS = {"held-out": (21, 101, 192), "training": (191, 97, 6)}  # first words of labels, coloured
_GAP = 4  # pixels between images


def to_png(array: UInt8[np.ndarray, "h w c"]) -> bytes:
    """PNG bytes of a grey (c = 1), RGB or RGBA picture."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    # Of photographs level 1 is 2 to 20 times as fast as the default and 7 to 23 % larger.
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def error_map(
    x: UInt8[np.ndarray, "h w 3"], y: UInt8[np.ndarray, "h w 3"], gain: float
) -> UInt8[np.ndarray, "h w 3"]:
    """gain * |x - y| per channel, clipped to 255."""
    error = np.abs(x.astype(np.float32) - y.astype(np.float32))
    return np.clip(np.round(gain * error), 0, 255).astype(np.uint8)


def reconstruction_grid(
    originals: UInt8[np.ndarray, "n h w 3"],
    reconstructions: UInt8[np.ndarray, "n h w 3"],
    labels: Sequence[str],
    *,
    caption: str = "",
    gain: float = 4.0,
    upscale: int = 1,
    groups: int = 1,
) -> UInt8[np.ndarray, "height width 3"]:
    """One row per image: original, reconstruction, amplified error; PSNR is added to its label.

    Labels begin with "held-out" or "training" (coloured), further lines after a newline.  `groups`
    puts the rows into that many columns of triples, for many small images.
    """
    rows, texts = [], []
    for x, y, label in zip(originals, reconstructions, labels, strict=True):
        rows.append([x, y, error_map(x, y, gain)])
        texts.append(f"{label}\n{psnr(x, y)}")
    columns = ["original", "reconstruction", f"error x{gain:g}"]
    per_group = -(-len(rows) // groups)
    parts = [
        _grid(rows[i : i + per_group], columns, texts[i : i + per_group], upscale)
        for i in range(0, len(rows), per_group)
    ]
    return _under_caption(_side_by_side(parts), caption)


def psnr(x: Picture, y: Picture) -> str:
    """PSNR of one pair of uint8 images, peak 255."""
    mse = float(np.mean((x.astype(np.float64) - y.astype(np.float64)) ** 2))
    return "identical" if mse == 0 else f"{10 * np.log10(255**2 / mse):.1f} dB"


def grid(
    rows: Sequence[Sequence[Picture]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    caption: str = "",
    upscale: int = 1,
) -> UInt8[np.ndarray, "height width 3"]:
    """Rows of images on white, column captions above, row labels to the left, a caption on top.

    Cells are as large as the largest image; smaller ones stand centred.  `upscale` repeats pixels.
    Captions that are wider than their column wrap at spaces; newlines in labels are kept.
    """
    return _under_caption(_grid(rows, columns, labels, upscale), caption)


def _grid(
    rows: Sequence[Sequence[Picture]],
    columns: Sequence[str],
    labels: Sequence[str],
    upscale: int,
) -> UInt8[np.ndarray, "height width 3"]:
    """The grid without margin and caption."""
    rows = [[_repeat(image, upscale) for image in row] for row in rows]
    layout = _layout(rows, labels)
    headings = [_Text(text, layout.font_size, wrap=layout.cell_w) for text in columns]
    head = max((text.height for text in headings), default=0) + (6 if headings else 0)
    height = head + len(rows) * (layout.cell_h + _GAP) - _GAP
    width = layout.left + layout.n_columns * (layout.cell_w + _GAP) - _GAP
    canvas = np.full((height, width, 3), _PAPER, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            _paste(canvas, image, layout.corner(i, j, head), (layout.cell_h, layout.cell_w))
    drawing = _Drawing(canvas)
    for j, text in enumerate(headings):
        center = layout.left + j * (layout.cell_w + _GAP) + layout.cell_w // 2
        drawing.centered(text, center, head - 6 - text.height)
    for i, text in enumerate(layout.labels):
        drawing.label(text, layout.corner(i, 0, head)[0] + (layout.cell_h - text.height) // 2)
    return drawing.array()


def _repeat(image: Picture, factor: int) -> Picture:
    return image if factor == 1 else image.repeat(factor, axis=0).repeat(factor, axis=1)


@dataclass(slots=True)
class _Layout:
    cell_h: int
    cell_w: int
    n_columns: int
    left: int  # width of the label margin
    font_size: int
    labels: "list[_Text]"

    def corner(self, i: int, j: int, head: int) -> tuple[int, int]:
        return head + i * (self.cell_h + _GAP), self.left + j * (self.cell_w + _GAP)


def _layout(rows: Sequence[Sequence[Picture]], labels: Sequence[str]) -> _Layout:
    cell_h = max(image.shape[0] for row in rows for image in row)
    cell_w = max(image.shape[1] for row in rows for image in row)
    size = int(np.clip(cell_w / 11, 11, 18))
    texts = [_Text(label, size) for label in labels]
    left = max((text.width for text in texts), default=0) + (12 if texts else 0)
    return _Layout(cell_h, cell_w, max(len(row) for row in rows), left, size, texts)


def _paste(canvas: Picture, image: Picture, corner: tuple[int, int], cell: tuple[int, int]) -> None:
    """Puts an image into the middle of its cell."""
    top = corner[0] + (cell[0] - image.shape[0]) // 2
    left = corner[1] + (cell[1] - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image


@functools.cache
def _font(size: int) -> Any:
    """DejaVu Sans, which matplotlib brings: Pillow's own has little more than ASCII."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


class _Text:
    """Lines of text with their measured size."""

    def __init__(self, text: str, size: int, wrap: int | None = None) -> None:
        self.font: Any = _font(size)
        self.lines = [line for given in text.split("\n") for line in self._wrapped(given, wrap)]
        self.line_height = round(1.3 * size)
        self.width = max((self._width(line) for line in self.lines), default=0)
        self.height = self.line_height * len(self.lines)

    def _width(self, line: str) -> int:
        return int(np.ceil(self.font.getlength(line)))

    def _wrapped(self, line: str, wrap: int | None) -> list[str]:
        if wrap is None or self._width(line) <= wrap:
            return [line]
        lines, current = [], ""
        for word in line.split():
            longer = f"{current} {word}".strip()
            if current and self._width(longer) > wrap:
                lines.append(current)
                longer = word
            current = longer
        return [*lines, current]


class _Drawing:
    """Text drawn onto an array."""

    def __init__(self, canvas: Picture) -> None:
        from PIL import Image, ImageDraw

        self._image = Image.fromarray(canvas)
        self._draw = ImageDraw.Draw(self._image)

    def centered(self, text: _Text, x: int, top: int) -> None:
        for number, line in enumerate(text.lines):
            self._line(text, number, line, x, top, _INK, "ma")

    def label(self, text: _Text, top: int) -> None:
        """Left-aligned; a first line that is a known tag has its colour, later lines are faint."""
        for number, line in enumerate(text.lines):
            color = _FAINT if number else _TAGS.get(line.split(" ")[0], _INK)
            self._line(text, number, line, 2, top, color, "la")

    def _line(
        self, text: _Text, number: int, line: str, x: int, top: int, color: Any, anchor: str
    ) -> None:
        position = (x, top + number * text.line_height)
        self._draw.text(position, line, fill=color, font=text.font, anchor=anchor)

    def array(self) -> Picture:
        return np.asarray(self._image).copy()


def _side_by_side(parts: Sequence[Picture], gap: int = 24) -> Picture:
    """Grids next to each other, aligned at the top."""
    height = max(part.shape[0] for part in parts)
    columns = []
    for part in parts:
        padded = np.full((height, part.shape[1], 3), _PAPER, np.uint8)
        padded[: part.shape[0]] = part
        columns += [padded, np.full((height, gap, 3), _PAPER, np.uint8)]
    return np.concatenate(columns[:-1], axis=1)


def _under_caption(picture: Picture, caption: str, margin: int = 8) -> Picture:
    """The picture with a white margin, and its caption on top where there is one."""
    text = _Text(caption, 13, wrap=picture.shape[1]) if caption else None
    head = text.height + 8 if text else 0
    height, width = picture.shape[:2]
    canvas = np.full((height + head + 2 * margin, width + 2 * margin, 3), _PAPER, np.uint8)
    canvas[margin + head : margin + head + height, margin : margin + width] = picture
    if text is None:
        return canvas
    drawing = _Drawing(canvas)
    drawing.centered(text, canvas.shape[1] // 2, margin)
    return drawing.array()
