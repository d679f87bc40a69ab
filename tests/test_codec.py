"""Any image through an autoencoder: padding, tiles, devices, number formats."""

import dataclasses

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import tiny

from dcae_jax import codec
from dcae_jax.codec import Codec, CodecConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import metrics
from dcae_jax.models.layers import Dtype
from dcae_jax.tasks import autoencode


def quiet(net, cfg=None):
    return Codec(net, cfg or CodecConfig(), lambda line: None)


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1), (3, 70)])
def test_any_size_is_padded_and_cropped_back(size) -> None:
    net = networks.in_memory()
    image = networks.picture(*size)
    one = quiet(net)
    latent = one.encode(image)
    assert latent.shape == (-(-size[0] // 4), -(-size[1] // 4), 4) and latent.dtype == np.float32
    pixels = codec.to_pixels(one.decode(latent), *size)
    assert pixels.shape == image.shape and pixels.dtype == np.uint8
    # The same by hand: numpy's own padding, the task's conversion, the evaluator's rounding.
    margin = ((0, -size[0] % 4), (0, -size[1] % 4), (0, 0))
    padded = np.pad(image, margin, mode="edge")
    x = autoencode.to_float(jnp.asarray(padded)[None])
    by_hand = metrics.to_uint8(jax.jit(net.decode)(jax.jit(net.encode)(x)))[0]
    # Rounding of one program against another: at most one level, on next to no pixel.
    difference = np.abs(pixels.astype(int) - np.asarray(by_hand)[: size[0], : size[1]])
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_pixels_are_rounded_as_in_evaluation() -> None:
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (700, 600, 3)).astype(np.float32)
    x[0, 0] = np.nan
    assert x.size > codec._CHUNK, "the last part is filled up"
    found = codec.to_pixels(x, 699, 599)
    np.testing.assert_array_equal(found, metrics.to_uint8(jnp.asarray(x))[:699, :599])


def test_tiles_by_the_codec_and_images_that_need_none() -> None:
    net = networks.in_memory()
    said = []
    tiled = Codec(net, CodecConfig(tile=32, overlap=8), said.append)
    small = networks.picture(30, 32)
    np.testing.assert_array_equal(tiled.encode(small), quiet(net).encode(small))
    large = networks.picture(70, 90)
    latent = tiled.encode(large)
    assert tiled.decode(latent).shape == (72, 92, 3)
    assert np.abs(latent - quiet(net).encode(large)).max() > 1e-4, "not tiled at all"
    np.testing.assert_array_equal(tiled.untiled().encode(large), quiet(net).encode(large))
    compiled = [line for line in said if "compiling" in line]
    assert [line for line in compiled if "32 x 32" in line] == [
        "compiling encode for 32 x 32 px", "compiling decode for 32 x 32 px",
    ]  # fmt: skip
    assert len(compiled) == 3, compiled  # and 92 x 72 px once, of the untiled one


def test_default_overlap_is_a_quarter_of_the_tile() -> None:
    assert CodecConfig(tile=512).tiling(32).overlap == 128
    assert CodecConfig(tile=192).tiling(32).overlap == 32  # down to the factor's multiple
    assert CodecConfig(tile=64).tiling(32).overlap == 32
    assert CodecConfig().tiling(32) is None


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("model", [tiny.model, pytest.param(tiny.kl_model, marks=pytest.mark.slow)])
def test_spatial_equals_one_device(devices, model) -> None:
    """70 rows: padded to 72, which 2, 4 and 8 devices divide at full size, but not below."""
    net, image = networks.in_memory(model()), networks.picture(70, 50)
    one = quiet(net)
    many = quiet(net, CodecConfig(spatial=devices))
    expected, found = one.encode(image), many.encode(image)
    # f32: sums over the image are taken in parts; 1e-5 of the largest is some ten roundings.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    expected, found = one.decode(expected), many.decode(expected)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_spatial_splits_the_activations_and_names_what_it_cannot() -> None:
    net, said = networks.in_memory(), []
    shared = Codec(net, CodecConfig(spatial=8), said.append)
    shared.encode(networks.picture(128, 32))
    assert len(said) == 1, said  # 128, 64 and 32 rows: all are shared
    lowered = _lowered(shared, (1, 128, 32, 3))
    assert "f32[1,16,32,8]" in lowered or "f32[1,16,32,3]" in lowered, "an eighth of the rows"
    assert "f32[1,128,32" not in lowered, "a device holds all rows"
    said.clear()
    shared.encode(networks.picture(72, 32))
    assert any("not shared by 8 devices" in line and "18 px" in line for line in said), said


def _lowered(shared, shape):
    """The program of one device, as XLA partitioned it."""
    with jax.set_mesh(shared._mesh):
        from dcae_jax import sharding

        x = sharding.put_batch({"x": np.zeros(shape, np.float32)}, shared._mesh)["x"]
        model = shared._net.cfg.build()
        encode = jax.jit(lambda v, x: model.apply(v, x, method="encode"))
        return encode.lower(shared._net.variables, x).compile().as_text()


def test_float32_by_default_whatever_the_config_says() -> None:
    model = tiny.model()
    exact = networks.in_memory(model)
    half = dataclasses.replace(model, dtype=Dtype.bfloat16, conv_dtype=Dtype.bfloat16)
    net = dataclasses.replace(exact, cfg=half)
    image = networks.picture(32, 32)
    np.testing.assert_array_equal(quiet(net).encode(image), quiet(exact).encode(image))
    found = quiet(net, CodecConfig(dtype=Dtype.bfloat16)).encode(image)
    error = np.abs(found - quiet(exact).encode(image)).max() / np.abs(found).max()
    assert 1e-4 < error < 0.1  # bfloat16 has 8 bits
    assert net.cfg.dtype is Dtype.bfloat16, "the caller's config was changed"


def test_old_programs_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(codec, "_KEPT", 2)
    one = quiet(networks.in_memory())
    sizes = [(4 * k, 8) for k in range(1, 5)]
    found = [one.encode(networks.picture(*size)) for size in sizes]
    assert len(one._compiled) <= 2
    again = [one.encode(networks.picture(*size)) for size in sizes]
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_numbers_that_are_not_finite_are_not_made_into_pictures() -> None:
    net = networks.in_memory()
    latent = quiet(net).encode(networks.picture(8, 8)).copy()
    latent[0, 0, 0] = np.nan
    with pytest.raises(UserError, match="decode gave numbers that are not finite"):
        quiet(net).decode(latent)


def test_mistakes_are_refused_all_at_once() -> None:
    with pytest.raises(UserError) as error:
        codec.check(CodecConfig(tile=-32, overlap=-1, spatial=9), 8)
    assert "two ways" in str(error.value) and "not negative" in str(error.value)
    assert "there are 8 device(s)" in str(error.value)
    with pytest.raises(UserError, match="--overlap 40 is more than half"):
        codec.check(CodecConfig(tile=64, overlap=40), 1)  # whatever the autoencoder's factor
    with pytest.raises(UserError, match="--overlap is for --tile"):
        codec.check(CodecConfig(overlap=32), 1)
    with pytest.raises(UserError, match="--spatial 0"):
        codec.check(CodecConfig(spatial=0), 1)
    with pytest.raises(UserError) as error:
        quiet(networks.in_memory(), CodecConfig(tile=30, overlap=18))
    assert len(str(error.value).splitlines()) == 3
    grey = dataclasses.replace(networks.in_memory(), cfg=tiny.model())
    grey.cfg.in_channels = 1
    with pytest.raises(UserError, match="pictures have 3"):
        quiet(grey)
