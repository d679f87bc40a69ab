"""Grids: pixels stay pixels, captions have room, errors are amplified as the caption says."""

import io

import numpy as np
import pytest
from PIL import Image

from dcae_jax.report import images


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def contains(canvas, image):
    """Whether the image stands unchanged somewhere in the canvas."""
    h, w = image.shape[:2]
    corners = np.argwhere((canvas[: -h + 1, : -w + 1] == image[0, 0]).all(-1))
    return any(np.array_equal(canvas[i : i + h, j : j + w], image) for i, j in corners)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_lossless(channels):
    x = noise(7, 9, channels)
    back = np.asarray(Image.open(io.BytesIO(images.to_png(x))))
    np.testing.assert_array_equal(back.reshape(x.shape), x)


def test_png_is_compressed_by_the_fastest_level():
    data = images.to_png(noise(7, 9, 3))
    # zlib's header (RFC 1950) holds the level in two bits: 0 is the fastest, 2 the default.
    assert data[data.index(b"IDAT") + 5] >> 6 == 0


def test_letters_of_many_languages_are_drawn():
    def drawn(letter):
        return bytes(images._font(14).getmask(letter))

    absent = drawn("\U0010ffff")  # no letter: what a font draws in place of one it lacks
    shapes = {drawn(letter) for letter in "aäßøłžЖπ"}
    assert len(shapes) == 8 and absent not in shapes


def test_error_map_is_amplified_and_clipped():
    x = np.full((2, 2, 3), 100, np.uint8)
    y = np.full((2, 2, 3), 110, np.uint8)
    assert (images.error_map(x, y, 4.0) == 40).all()  # no wrap-around of uint8 either way
    assert (images.error_map(y, x, 4.0) == 40).all()
    assert (images.error_map(x, y, 40.0) == 255).all()


def test_grid_holds_each_image_unchanged():
    rows = [[noise(16, 16, 3), noise(16, 16, 3)[::-1].copy()], [noise(16, 16, 3).T.copy().T]]
    canvas = images.grid(rows, columns=("a", "b"), labels=("held-out\none", "training"))
    for image in (image for row in rows for image in row):
        assert contains(canvas, image)


def test_grid_upscales_by_repetition():
    image = noise(8, 8, 3)
    assert contains(images.grid([[image]], upscale=3), image.repeat(3, 0).repeat(3, 1))


def test_smaller_images_stand_in_the_middle():
    small, large = noise(8, 8, 3), noise(16, 16, 3)
    canvas = images.grid([[large, small]])
    left = 8 + 16 + 4  # margin, first cell, gap
    np.testing.assert_array_equal(canvas[8 + 4 : 8 + 12, left + 4 : left + 12], small)


def test_text_is_drawn_beside_the_images_only():
    image = np.zeros((32, 32, 3), np.uint8)
    plain = images.grid([[image]])
    named = images.grid([[image]], columns=("original",), labels=("held-out",), caption="step 5")
    assert contains(named, image)
    assert named.shape[0] > plain.shape[0] and named.shape[1] > plain.shape[1]
    blue = (named[..., 2].astype(int) - named[..., 0]) > 80  # the colour of "held-out"
    assert blue.any() and not blue[:, -48:].any()


def test_long_captions_wrap_inside_the_picture():
    image = np.zeros((40, 40, 3), np.uint8)
    caption = "a caption that is much longer than its picture is wide " * 2
    canvas = images.grid([[image, image]], columns=("a long heading here", "b"), caption=caption)
    assert canvas.shape[1] == 2 * 40 + 4 + 16
    assert (canvas[:, :2] == 255).all() and (canvas[:, -2:] == 255).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_reconstruction_grid(groups):
    x, y = noise(3, 24, 24, 3), noise(3, 24, 24, 3) // 2
    canvas = images.reconstruction_grid(x, y, ["held-out\na", "held-out\nb", "training"],
                                        caption="step 7", gain=2.0, groups=groups)  # fmt: skip
    for a, b in zip(x, y, strict=True):
        assert contains(canvas, a) and contains(canvas, b)
        assert contains(canvas, images.error_map(a, b, 2.0))
    again = images.reconstruction_grid(x, y, ["held-out\na", "held-out\nb", "training"],
                                       caption="step 7", gain=2.0, groups=groups)  # fmt: skip
    np.testing.assert_array_equal(canvas, again)


def test_label_psnr():
    x = np.full((4, 4, 3), 100, np.uint8)
    assert images.psnr(x, x + np.uint8(10)) == "28.1 dB"  # 10 log10(255^2 / 100) = 28.13
    assert images.psnr(x, x) == "identical"
