"""Decoding of every odd kind of image, and crops against closed forms."""

import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from dcae_jax.data import transforms
from dcae_jax.data.transforms import BadRecord, Reason


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    """Pixel (y, x) holds (y, x, 7): a crop tells where it was taken."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.full_like(x, 7)], -1).astype(np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


PNG = encoded(Image.fromarray(gradient()))


def test_plain_png_is_read_exactly() -> None:
    np.testing.assert_array_equal(transforms.decode(PNG, "x"), gradient())


@pytest.mark.parametrize(
    ("tag", "stored"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, 1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, -1)),
    ],
)
def test_exif_orientation_is_undone(tag: int, stored) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    data = encoded(Image.fromarray(np.ascontiguousarray(stored(gradient()))), exif=exif)
    np.testing.assert_array_equal(transforms.decode(data, "x"), gradient())
    assert transforms.image_size(data) == (40, 60)
    assert transforms.needs_reencoding(data) == (tag != 1)


@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\0\0\0\xff", b"Exif\0\0"])
def test_malformed_exif_counts_as_upright(exif: bytes) -> None:
    data = encoded(Image.fromarray(gradient()), "JPEG", exif=exif, quality=100, subsampling=0)
    assert transforms.decode(data, "x").shape == (40, 60, 3)


def test_exif_orientation_of_another_type_counts_as_upright() -> None:
    # One entry: tag 0x0112 as ASCII, which makes Pillow return a str where others store a number.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI4sI", 0x0112, 2, 2, b"6\0\0\0", 0)
    data = encoded(Image.fromarray(gradient()), "JPEG", exif=exif)
    assert transforms.decode(data, "x").shape == (40, 60, 3)


def test_alpha_is_composited_over_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 100, 51  # alpha 0.2: 0.2 * 100 + 0.8 * 255 = 224, 0.8 * 255 = 204
    out = transforms.decode(encoded(Image.fromarray(rgba)), "x")
    np.testing.assert_array_equal(out[0, 0], [224, 204, 204])


def test_transparent_palette_and_grey_alpha_are_composited() -> None:
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    opaque = transforms.decode(encoded(palette), "x")
    clear = transforms.decode(encoded(palette, transparency=1), "x")
    np.testing.assert_array_equal(opaque[0, 0], [40, 50, 60])
    np.testing.assert_array_equal(clear[0, 0], [255, 255, 255])
    grey = transforms.decode(encoded(Image.new("LA", (3, 3), (9, 0))), "x")
    np.testing.assert_array_equal(grey[0, 0], [255, 255, 255])


def test_transparent_colour_of_an_rgb_png_is_composited() -> None:
    data = encoded(Image.new("RGB", (3, 3), (1, 2, 3)), transparency=(1, 2, 3))
    np.testing.assert_array_equal(transforms.decode(data, "x")[0, 0], [255, 255, 255])


def test_grey_and_bilevel_become_rgb() -> None:
    np.testing.assert_array_equal(
        transforms.decode(encoded(Image.new("L", (2, 2), 77)), "x")[0, 0], [77] * 3
    )
    np.testing.assert_array_equal(
        transforms.decode(encoded(Image.new("1", (2, 2), 1)), "x")[0, 0], [255] * 3
    )


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    values = np.array([[0, 255, 256, 65535, 0x1234]], np.uint16)
    out = transforms.decode(encoded(Image.fromarray(values)), "x")
    np.testing.assert_array_equal(out[0, :, 0], [0, 0, 1, 255, 0x12])


def test_cmyk_jpeg_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    red = transforms.decode(data, "x")[8, 8].astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 3  # JPEG at quality 100 rounds a constant by 1-2


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(transforms.decode(data, "x")[0, 0], [10] * 3)


JPEG = encoded(
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG"
)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.empty),
        (b"hello world", Reason.not_an_image),
        (b"<html>not found</html>" * 50, Reason.not_an_image),
        (JPEG[: len(JPEG) // 2], Reason.damaged),
        (PNG[: len(PNG) // 2], Reason.damaged),
        (PNG[:60] + b"\xff" * 20 + PNG[80:], Reason.damaged),
        (encoded(Image.new("F", (4, 4)), "TIFF"), Reason.no_range),
        (encoded(Image.fromarray(np.full((2, 2), 1 << 20, np.int32)), "TIFF"), Reason.no_range),
    ],
)
def test_bad_records_have_a_reason(data: bytes, reason: Reason) -> None:
    with pytest.raises(BadRecord) as caught:
        transforms.decode(data, "folder/name.jpg")
    assert caught.value.reason is reason
    assert "folder/name.jpg" in str(caught.value) and reason.value in str(caught.value)


def test_too_many_pixels_is_a_bad_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadRecord) as caught:
        transforms.decode(PNG, "x")
    assert caught.value.reason is Reason.too_large
    assert transforms.image_size(PNG) == (0, 0)


def test_bad_record_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadRecord("a", Reason.damaged, "why")))
    assert (error.name, error.reason, error.detail) == ("a", Reason.damaged, "why")


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The specification in its own words, on PIL images."""
    if image.size == (size, size):
        return np.asarray(image)
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), Image.BOX)
    s = size / min(*image.size)
    array = np.asarray(image.resize(tuple(round(x * s) for x in image.size), Image.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize(
    "shape", [(64, 64), (128, 200), (500, 375), (333, 1000), (63, 65), (40, 90), (130, 131)]
)
def test_center_crop_is_adm(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    out = transforms.center_crop(pixels, 64)
    np.testing.assert_array_equal(out, adm_crop(Image.fromarray(pixels), 64))


def test_center_crop_offset_is_floor() -> None:
    # No resize (shorter side is the size); 47 columns of which 40: offset floor(7 / 2) = 3.
    out = transforms.center_crop(gradient(40, 47), 40)
    np.testing.assert_array_equal(out, gradient(40, 47)[:, 3:43])


def test_random_crop_reaches_every_position_and_no_other() -> None:
    rng = np.random.default_rng(0)
    corners = {
        tuple(transforms.random_crop(gradient(10, 11), 8, rng)[0, 0, :2].tolist())
        for _ in range(500)
    }
    # 3 x 4 positions; the chance that 500 draws miss one is 12 * (11/12)^500 < 1e-17
    assert corners == {(y, x) for y in range(3) for x in range(4)}


def test_random_crop_of_a_small_image_says_so() -> None:
    with pytest.raises(BadRecord, match=r"smaller than the crop.*60x40.*min_size=64"):
        transforms.random_crop(gradient(), 64, np.random.default_rng(0), "x")


def test_random_resized_crop_of_everything_is_a_plain_resize() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    out = transforms.random_resized_crop(
        pixels, 32, np.random.default_rng(0), area=(1.0, 1.0), aspect=(1.0, 1.0)
    )
    want = Image.fromarray(pixels).resize((32, 32), Image.BICUBIC)
    np.testing.assert_array_equal(out, want)


def test_random_resized_crop_windows_have_the_asked_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, width, height = transforms._draw_box((200, 300), rng, (0.2, 0.5), (0.5, 2.0))
        assert 0 <= left <= 300 - width and 0 <= top <= 200 - height
        # Sides are rounded to whole pixels: half a pixel of at least 77 changes ratios by < 1.5 %.
        assert 0.2 * 0.985 <= width * height / 60_000 <= 0.5 * 1.015
        assert 0.5 * 0.985 <= width / height <= 2.0 * 1.015


def test_random_resized_crop_falls_back_to_the_largest_window() -> None:
    # 10 x 1000 cannot hold a square of all its area: the largest centred square is taken.
    box = transforms._draw_box((10, 1000), np.random.default_rng(0), (1.0, 1.0), (1.0, 1.0))
    assert box == (495, 0, 10, 10)


def test_flip_mirrors_half_of_the_time() -> None:
    rng = np.random.default_rng(0)
    image = gradient()
    flips = [transforms.hflip(image, rng)[0, 0, 1] == 59 for _ in range(1000)]
    assert 420 < sum(flips) < 580  # 5 standard deviations of a fair coin (15.8)
