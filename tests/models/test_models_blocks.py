"""Every block against an independent float64 version in numpy, written from the definitions.

Tolerance 1e-5 of the largest value: float32 against float64 over a few hundred products.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.models import layers as L
from dcae_jax.models.layers import Act, BlockOptions, Norm

EPS = 1e-5
_generators: dict[str, np.random.Generator] = {}


@pytest.fixture(autouse=True)
def _same_numbers_whatever_ran_before() -> None:
    _generators["test"] = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return _generators["test"].standard_normal(shape)


def variables(module: nn.Module, x: np.ndarray) -> Any:
    """Random float64 weights in the module's tree; BatchNorm statistics far from 0 and 1."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), f32(x))

    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
        value = 0.3 * draw(*like.shape)
        return np.abs(value) + 0.5 if path[-1].key in ("var", "scale") else value

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def f32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def assert_same(module: nn.Module, v: Any, x: np.ndarray, expected: np.ndarray) -> None:
    found = np.asarray(jax.jit(module.apply)(jax.tree.map(f32, v), f32(x)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# ----------------------------------------------------------------------- numpy, from definitions


def np_conv(x: np.ndarray, p: dict[str, Any], stride: int = 1) -> np.ndarray:
    """Loops over the taps; a depthwise kernel [k, k, 1, c] multiplies, a dense one mixes."""
    k, b = p["kernel"], p.get("bias", 0.0)
    size, pad = k.shape[0], k.shape[0] // 2
    xp = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    h, w = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    total = 0.0
    for i in range(size):
        for j in range(size):
            part = xp[:, i : i + stride * h : stride, j : j + stride * w : stride]
            total = total + (part * k[i, j, 0] if k.shape[2] == 1 else part @ k[i, j])
    return total + b


def np_rms(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * p["scale"] + p["bias"]


def np_silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def np_unshuffle(x: np.ndarray) -> np.ndarray:
    """U[c * 4 + i * 2 + j, y, x] = X[c, 2y + i, 2x + j], channel by channel."""
    b, h, w, c = x.shape
    out = np.zeros((b, h // 2, w // 2, 4 * c))
    for k in range(4 * c):
        out[..., k] = x[:, (k % 4) // 2 :: 2, k % 2 :: 2, k // 4]
    return out


def np_shuffle(u: np.ndarray) -> np.ndarray:
    b, h, w, c = u.shape
    out = np.zeros((b, 2 * h, 2 * w, c // 4))
    for k in range(c):
        out[:, (k % 4) // 2 :: 2, k % 2 :: 2, k // 4] = u[..., k]
    return out


def np_average(x: np.ndarray, features: int) -> np.ndarray:
    g = x.shape[-1] // features
    return np.stack([x[..., k * g : (k + 1) * g].mean(-1) for k in range(features)], -1)


def np_duplicate(x: np.ndarray, features: int) -> np.ndarray:
    n = features // x.shape[-1]
    return np.stack([x[..., m // n] for m in range(features)], -1)


def np_attention(qkv: np.ndarray, d: int) -> np.ndarray:
    """Head by head and image by image, with the row of ones under v."""
    b, h, w, c = qkv.shape
    out = np.zeros((b, h, w, c // 3))
    for n in range(b):
        for head in range(c // (3 * d)):
            part = qkv[n, ..., head * 3 * d : (head + 1) * 3 * d].reshape(h * w, 3 * d).T
            q, k, v = np.maximum(part[:d], 0), np.maximum(part[d : 2 * d], 0), part[2 * d :]
            o = np.concatenate([v, np.ones((1, h * w))]) @ k.T @ q
            out[n, ..., head * d : (head + 1) * d] = (o[:d] / (o[d] + 1e-15)).T.reshape(h, w, d)
    return out


def np_mla(x: np.ndarray, p: dict[str, Any], scales: tuple[int, ...], d: int) -> np.ndarray:
    qkv = x @ p["qkv"]["kernel"]
    multi = [qkv]
    for s in scales:
        kernels = p[f"multiscale_{s}"]
        y, m = np_conv(qkv, kernels["depthwise"]), kernels["pointwise"]["kernel"]
        groups = range(0, y.shape[-1], d)
        multi.append(np.concatenate([y[..., g : g + d] @ m[:, g : g + d] for g in groups], -1))
    return np_rms(np_attention(np.concatenate(multi, -1), d) @ p["proj"]["kernel"], p["norm"])


def np_glumb(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    y = np_silu(x @ p["inverted"]["kernel"] + p["inverted"]["bias"])
    y = np_conv(y, p["depth"])
    half = y.shape[-1] // 2
    return np_rms(y[..., :half] * np_silu(y[..., half:]) @ p["point"]["kernel"], p["norm"])


# ----------------------------------------------------------------------------------------- tests


def test_pixel_unshuffle_and_shuffle_keep_torchs_order() -> None:
    x = draw(2, 4, 6, 3)
    u = L.pixel_unshuffle(f32(x))
    np.testing.assert_array_equal(u, f32(np_unshuffle(x)))
    np.testing.assert_array_equal(L.pixel_shuffle(u), f32(x))


@pytest.mark.parametrize("features", [8, 16, 4, 32])
def test_averaging_shortcut_is_the_group_mean_of_the_unshuffled(features: int) -> None:
    x = draw(2, 4, 6, 8)
    expected = np_average(np_unshuffle(x), features)
    np.testing.assert_allclose(L.downsample_shortcut(f32(x), features), expected, atol=1e-6)


@pytest.mark.parametrize("features", [8, 4, 16, 2])
def test_duplicating_shortcut_is_the_shuffle_of_the_repeated(features: int) -> None:
    z = draw(2, 3, 2, 8)
    found = L.upsample_shortcut(f32(z), features)
    np.testing.assert_array_equal(found, f32(np_shuffle(np_duplicate(z, 4 * features))))


def test_averaging_undoes_duplicating() -> None:
    z = f32(draw(2, 3, 2, 8))
    back = L.downsample_shortcut(L.upsample_shortcut(z, 4), 8)
    np.testing.assert_array_equal(back, z)
    np.testing.assert_array_equal(L.average_channels(L.duplicate_channels(z, 32), 8), z)


def test_rms_norm() -> None:
    x, norm = draw(2, 3, 4, 8), L.RMSNorm()
    v = variables(norm, x)
    assert_same(norm, v, x, np_rms(x, v["params"]))


def test_rms_norm_computes_in_f32_and_rounds_once() -> None:
    x, norm = jnp.asarray(draw(1, 2, 2, 64), jnp.bfloat16), L.RMSNorm()
    v = variables(norm, np.asarray(x, np.float64))
    expected = jnp.asarray(np_rms(np.asarray(x, np.float64), v["params"]), jnp.bfloat16)
    found = norm.apply(jax.tree.map(f32, v), x)
    assert found.dtype == jnp.bfloat16
    # One rounding: equal but where float32 and float64 fall on two sides of a bf16 midpoint.
    assert (found != expected).mean() < 0.01


def test_batch_norm_runs_on_stored_statistics() -> None:
    x, norm = draw(3, 4, 4, 8), L.BatchNorm()
    v = variables(norm, x)
    p, s = v["params"], v["batch_stats"]
    expected = (x - s["mean"]) / np.sqrt(s["var"] + EPS) * p["scale"] + p["bias"]
    assert_same(norm, v, x, expected)
    frozen = jax.tree.map(f32, v)
    y, new = norm.apply(frozen, f32(x), mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], frozen["batch_stats"])


def test_batch_norm_update_has_torchs_semantics() -> None:
    x, norm = draw(3, 4, 4, 8), L.BatchNorm(mode=L.BatchNormMode.update)
    v = variables(norm, x)
    p, s = v["params"], v["batch_stats"]
    y, new = norm.apply(jax.tree.map(f32, v), f32(x), mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(var + EPS) * p["scale"] + p["bias"]
    np.testing.assert_allclose(y, expected, atol=2e-5)
    unbiased = x.var((0, 1, 2), ddof=1)
    moved = new["batch_stats"]
    np.testing.assert_allclose(moved["mean"], 0.9 * s["mean"] + 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(moved["var"], 0.9 * s["var"] + 0.1 * unbiased, atol=1e-6)
    stored = (x - s["mean"]) / np.sqrt(s["var"] + EPS) * p["scale"] + p["bias"]
    assert_same(norm, v, x, stored)  # not mutable: an evaluation


def test_batch_norm_update_uses_the_whole_sharded_batch() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    norm = L.BatchNorm(mode=L.BatchNormMode.update)
    x = draw(8, 2, 2, 4) + 3.0 * np.arange(8)[:, None, None, None]  # devices far apart
    v = jax.tree.map(f32, variables(norm, x))
    apply = jax.jit(lambda v, x: norm.apply(v, x, mutable=["batch_stats"]))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded, single = apply(v, jax.device_put(f32(x), rows)), apply(v, f32(x))
    # Values of order 1, their sums in another order: some float32 roundings.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), sharded, single)


@pytest.mark.parametrize("act", list(Act))
def test_res_block(act: Act) -> None:
    x, block = draw(2, 5, 4, 8), L.ResBlock(Norm.rms, act)
    v = variables(block, x)
    p = v["params"]
    assert "bias" in p["conv1"] and "bias" not in p["conv2"]
    f = np_silu if act is Act.silu else (lambda a: np.maximum(a, 0))
    y = np_rms(np_conv(f(np_conv(x, p["conv1"])), p["conv2"]), p["norm"])
    assert_same(block, v, x, x + y)


@pytest.mark.parametrize("scales", [(), (5,)])
@pytest.mark.parametrize("size", [(4, 8), (4, 9)], ids=["quadratic", "linear"])
def test_lite_mla(scales: tuple[int, ...], size: tuple[int, int]) -> None:
    x, block = draw(2, *size, 64), L.LiteMLA(Norm.rms, scales)
    v = variables(block, x)
    assert_same(block, v, x, np_mla(x, v["params"], scales, 32))


def test_both_attention_paths_agree_and_switch_above_head_dim_pixels() -> None:
    qkv = f32(draw(2, 4, 8, 2 * 96))

    def products(pixels: int) -> int:
        x = jnp.ones((1, 1, pixels, 96))
        return str(jax.make_jaxpr(lambda x: L.relu_attention(x, 32))(x)).count("dot_general")

    assert products(32) == 2  # k.q, v.weights
    assert products(33) == 3  # k.v, q.(k.v), q.sum(k)
    wide = jnp.concatenate([qkv] * 2, 2)  # each pixel twice: the same answer, by the other path
    found = L.relu_attention(wide, 32)[:, :, :8]
    np.testing.assert_allclose(found, L.relu_attention(qkv, 32), atol=2e-6)


def test_attention_is_an_f32_island() -> None:
    qkv = draw(1, 8, 8, 96)
    half = jnp.asarray(qkv, jnp.bfloat16)
    expected = np_attention(np.asarray(half, np.float64), 32)
    found = L.relu_attention(half, 32)
    assert found.dtype == jnp.bfloat16
    # Nothing is rounded to bf16 (8 bits) but the result.
    assert np.abs(np.asarray(found, np.float64) - expected).max() < 2**-8 * np.abs(expected).max()


def test_attention_products_are_f32_on_every_device() -> None:
    """By default a TPU multiplies float32 in bf16 passes and a GPU in TF32."""
    for side in (4, 8):  # quadratic, linear
        qkv = jnp.zeros((1, side, side, 96))
        jaxpr = jax.make_jaxpr(lambda x: L.relu_attention(x, 32))(qkv)
        products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        highest = (jax.lax.Precision.HIGHEST,) * 2
        assert products and all(e.params["precision"] == highest for e in products)


def test_glumb_conv() -> None:
    x, block = draw(2, 4, 3, 8), L.GLUMBConv()
    v = variables(block, x)
    p = v["params"]
    assert p["inverted"]["kernel"].shape == (8, 64) and "bias" not in p["point"]
    assert_same(block, v, x, np_glumb(x, p))


def test_evit_block_adds_attention_then_glumb() -> None:
    x, block = draw(1, 6, 6, 32), L.EViTBlock(Norm.rms, (5,))
    v = variables(block, x)
    y = x + np_mla(x, v["params"]["attn"], (5,), 32)
    assert_same(block, v, x, y + np_glumb(y, v["params"]["glumb"]))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("features", [8, 16])
@pytest.mark.parametrize("kind", list(L.Downsample))
def test_down(kind: L.Downsample, features: int, residual: bool) -> None:
    x, block = draw(2, 6, 4, 8), L.Down(features, kind, options=BlockOptions(residual=residual))
    v = variables(block, x)
    assert set(v["params"]) == {"kernel", "bias"}
    if kind is L.Downsample.conv:
        main = np_conv(x, v["params"], stride=2)
    else:
        main = np_unshuffle(np_conv(x, v["params"]))
    shortcut = np_average(np_unshuffle(x), features) if residual else 0.0
    assert_same(block, v, x, main + shortcut)


@pytest.mark.parametrize("channels", [3, 4, 5], ids=["few", "few too", "many"])
def test_stem_convolves_the_unshuffled_image_where_that_is_faster(channels: int) -> None:
    x, block = draw(2, 6, 4, channels), L.Down(8, L.Downsample.conv_unshuffle, shortcut=False)
    v = variables(block, x)
    assert v["params"]["kernel"].shape == (3, 3, channels, 2)
    assert_same(block, v, x, np_unshuffle(np_conv(x, v["params"])))
    jaxpr = str(jax.make_jaxpr(block.apply)(v, f32(x)))
    assert (f"f32[3,3,{4 * channels},8]" in jaxpr) == (channels <= 4)  # these tests run on CPU


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("features", [8, 4])
@pytest.mark.parametrize("kind", list(L.Upsample))
def test_up(kind: L.Upsample, features: int, residual: bool) -> None:
    x, block = draw(2, 3, 4, 8), L.Up(features, kind, options=BlockOptions(residual=residual))
    v = variables(block, x)
    assert set(v["params"]) == {"kernel", "bias"}
    if kind is L.Upsample.interpolate_conv:
        main = np_conv(x.repeat(2, 1).repeat(2, 2), v["params"])
    else:
        main = np_shuffle(np_conv(x, v["params"]))
    shortcut = np_shuffle(np_duplicate(x, 4 * features)) if residual else 0.0
    assert_same(block, v, x, main + shortcut)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 2, 3, 4), (4, 8, 8, 8)], ids=str)
def test_shift_depthwise_equals_lax(size: int, shape: tuple[int, ...]) -> None:
    """Forward, input gradient and weight gradient to 4e-5 of the largest value: other order."""
    x, g = f32(draw(*shape)), f32(draw(*shape))
    kernel = f32(draw(size, size, 1, shape[-1]))

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(how: L.Depthwise) -> list[jax.Array]:
        y, pullback = jax.vjp(lambda x, k: L.depthwise(x, k, how), x, kernel)
        return [y, *pullback(g)]

    for a, b in zip(all_of(L.Depthwise.shift), all_of(L.Depthwise.lax), strict=True):
        assert np.abs(a - b).max() <= 4e-5 * np.abs(b).max()
    for a, b in zip(all_of(L.Depthwise.auto), all_of(L.Depthwise.shift), strict=True):
        np.testing.assert_array_equal(a, b)  # these tests run on CPU


def test_grouped_linear_equals_a_grouped_convolution() -> None:
    x, kernel = f32(draw(2, 3, 4, 96)), f32(draw(32, 96))
    expected = jax.lax.conv_general_dilated(
        x, kernel[None, None], (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3,
    )  # fmt: skip
    np.testing.assert_allclose(L.grouped_linear(x, kernel), expected, atol=2e-5)


def test_prefix_conv_uses_the_first_filters_and_rows() -> None:
    x, conv = draw(1, 4, 4, 6), L.PrefixConv(6, 8)
    v = variables(conv, x)
    p = jax.tree.map(f32, v)
    whole = np.asarray(conv.apply(p, f32(x)))
    np.testing.assert_allclose(conv.apply(p, f32(x), 3), whole[..., :3], atol=1e-5)
    zeroed = x * (np.arange(6) < 4)
    found = conv.apply(p, f32(x[..., :4]))
    np.testing.assert_allclose(found, np_conv(zeroed, v["params"]), atol=1e-5)


def test_initialisation_is_torchs_default() -> None:
    """Uniform within 1 / sqrt(fan_in), for kernels and biases; norms 1 (or the asked) and 0."""
    block = L.EViTBlock(Norm.rms, (5,), BlockOptions(last_norm_scale_init=0.1))
    p = jax.jit(block.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 2, 2, 64)))["params"]
    bounds = {
        "qkv": (p["attn"]["qkv"]["kernel"], 64), "proj": (p["attn"]["proj"]["kernel"], 128),
        "depthwise": (p["attn"]["multiscale_5"]["depthwise"]["kernel"], 25),
        "pointwise": (p["attn"]["multiscale_5"]["pointwise"]["kernel"], 32),
        "inverted": (p["glumb"]["inverted"]["bias"], 64), "depth": (p["glumb"]["depth"]["bias"], 9),
    }  # fmt: skip
    for name, (value, fan_in) in bounds.items():
        largest = float(jnp.abs(value).max()) * np.sqrt(fan_in)
        assert 0.97 < largest <= 1.0, name
        assert abs(float(value.std()) * np.sqrt(3 * fan_in) - 1) < 0.1, name
    for norm in (p["attn"]["norm"], p["glumb"]["norm"]):
        assert (norm["scale"] == 0.1).all() and (norm["bias"] == 0).all()
