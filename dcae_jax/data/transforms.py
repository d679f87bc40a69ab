"""From an encoded image to a uint8 crop: numpy and PIL only, no jax.

Every function that draws takes an explicit `numpy.random.Generator`; nothing here has a state. What
is wrong with a record is said by one exception, `BadRecord`, whose reason is one of `Reason`.
"""

import enum
import io
import math
import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# Exif tag 0x0112: what has to be done to the stored pixels to see the picture upright.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Photographs with an alpha channel come from the web, where the page behind them is white.
_BACKGROUND = (255, 255, 255, 255)
# What Pillow's decoders raise for damaged pixels; a MemoryError or a KeyboardInterrupt is not among
# them.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)

Pixels = UInt8[np.ndarray, "h w 3"]
# The result of a crop; "size" is the argument of that name.
Square = UInt8[np.ndarray, "{size} {size} 3"]


class Reason(enum.Enum):
    """Why a record cannot be used."""

    empty = "empty"
    not_an_image = "not an image"
    damaged = "damaged or truncated"
    too_large = "too many pixels"
    no_range = "pixel values without a defined range"
    too_small = "smaller than the crop"
    unreadable = "cannot be read from storage"


class BadRecord(Exception):
    """One record that cannot be used: its name, a `Reason`, and a detail for the report."""

    def __init__(self, name: str, reason: Reason, detail: str = "") -> None:
        super().__init__(name, reason, detail)  # these three make it picklable
        self.name = name
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.name}: {self.reason.value}" + (f" ({self.detail})" if self.detail else "")


def image_size(data: bytes | io.IOBase) -> tuple[int, int]:
    """(height, width) after decoding, read from the header alone; (0, 0) if there is none."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            width, height = image.size
            turned = _orientation(image) >= 5
    except (Image.DecompressionBombError, *_DECODER_ERRORS):
        return 0, 0
    return (width, height) if turned else (height, width)


def decode(data: bytes, name: str) -> Pixels:
    """Decodes any image that Pillow reads to upright RGB.

    Outcomes: Exif rotation is applied, malformed Exif is taken as upright; alpha (also of palettes)
    is composited over white; grey, palette and CMYK become RGB; 16-bit keeps its high byte; of an
    animation the first frame is taken. Raises `BadRecord` for everything that is not an intact
    image.
    """
    if not data:
        raise BadRecord(name, Reason.empty)
    image = _open(data, name)
    orientation = _orientation(image)
    try:
        if image.format == "PNG":  # Pillow's decoder skips the checksums of the pixel data
            Image.open(io.BytesIO(data)).verify()
        image.load()
    except _DECODER_ERRORS as error:
        raise BadRecord(name, Reason.damaged, str(error)) from error
    image = _to_rgb(image, name)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return np.asarray(image, np.uint8)


def needs_reencoding(data: bytes) -> bool:
    """Whether other readers would see other pixels than `decode`: no plain upright RGB or grey."""
    with Image.open(io.BytesIO(data)) as image:
        plain = image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L")
        return not plain or "transparency" in image.info or _orientation(image) in _UPRIGHT


def center_crop(image: Pixels, size: int) -> Square:
    """The centre crop of ADM, which DC-AE trains and evaluates with (`size` x `size`).

    Halved with a box filter while the shorter side is at least twice `size`, then bicubic to a
    shorter side of `size` (up as well as down), then cropped at floor((side - size) / 2).
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scaled = np.asarray(resize_shorter(Image.fromarray(image), size))
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    return scaled[top : top + size, left : left + size]


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Resizes as ADM does: box halvings, then bicubic (antialiased) to a shorter side of `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    return image.resize(target, Image.Resampling.BICUBIC)


def random_crop(image: Pixels, size: int, rng: np.random.Generator, name: str = "") -> Square:
    """A `size` x `size` window, every position equally likely; never resizes.

    Raises `BadRecord(too_small)` when the image does not contain such a window.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        detail = (
            f"{width}x{height} for a crop of {size}; data.min_size={size} leaves such images out"
        )
        raise BadRecord(name, Reason.too_small, detail)
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    return image[top : top + size, left : left + size]


def random_resized_crop(
    image: Pixels,
    size: int,
    rng: np.random.Generator,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Square:
    """A window of a random share of the area and a random aspect ratio, resized to `size` x `size`.

    `area` is a range of fractions of the image, `aspect` a range of width / height drawn uniformly
    in the logarithm. Ten draws; if none fits inside, the largest centred window of an allowed
    aspect. Only the window is resized (bicubic, antialiased, box-reduced before by whole factors),
    so that the cost does not grow with the image.
    """
    left, top, width, height = _draw_box(image.shape[:2], rng, area, aspect)
    window = Image.fromarray(image[top : top + height, left : left + width])
    return np.asarray(window.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))


def hflip(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Mirrors left and right with probability one half."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise BadRecord(name, Reason.not_an_image, f"{len(data)} bytes") from error
    except Image.DecompressionBombError as error:
        raise BadRecord(name, Reason.too_large, str(error)) from error
    except _DECODER_ERRORS as error:
        raise BadRecord(name, Reason.damaged, str(error)) from error


def _orientation(image: Image.Image) -> int:
    """The Exif orientation, 1 (upright) when the Exif block is absent or malformed."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow's Exif parser raises whatever the broken bytes lead it to
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Converts a loaded image of any mode to RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise BadRecord(name, Reason.no_range, "floating-point pixels")
    if image.mode.startswith("I"):
        return _high_byte(image, name).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        with_alpha = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, _BACKGROUND)
        return Image.alpha_composite(backdrop, with_alpha).convert("RGB")
    return image.convert("RGB")


def _high_byte(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey to 8 bits by its high byte, as Pillow itself does for 16-bit colour."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadRecord(name, Reason.no_range, f"integers {values.min()} to {values.max()}")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _draw_box(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random window inside an image of `shape` (height, width)."""
    full_height, full_width = shape
    for _ in range(10):
        pixels = full_height * full_width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        width, height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < width <= full_width and 0 < height <= full_height:
            left = int(rng.integers(full_width - width + 1))
            top = int(rng.integers(full_height - height + 1))
            return left, top, width, height
    ratio = min(max(full_width / full_height, aspect[0]), aspect[1])
    width = min(full_width, max(1, round(full_height * ratio)))
    height = min(full_height, max(1, round(full_width / ratio)))
    return (full_width - width) // 2, (full_height - height) // 2, width, height
