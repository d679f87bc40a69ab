"""LPIPS against stored outputs of the lpips package, and its files."""

import functools
import importlib.util
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.errors import UserError
from dcae_jax.nets import lpips, weights

PARITY = Path(__file__).parents[1] / "parity"


@pytest.fixture(scope="module")
def maker() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("maker", PARITY / "make_lpips_fixtures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def net(maker: types.ModuleType) -> lpips.Net:
    return lpips.vgg16(maker.WIDTHS)


@pytest.fixture(scope="module")
def params(maker: types.ModuleType, net: lpips.Net) -> lpips.Params:
    return lpips.from_torch(maker.vgg_state(0), maker.head_state(1), net)


@pytest.fixture(scope="module")
def pair(maker: types.ModuleType) -> tuple[np.ndarray, np.ndarray]:
    x, y = (a.astype(np.float32) / 127.5 - 1 for a in maker.images(2, (2, 48, 64, 3)))
    ripple = 0.02 * np.sin(37 * np.arange(y.size, dtype=np.float32))
    return x, y + ripple.reshape(2, 3, 48, 64).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def value_and_gradient(net: lpips.Net):
    def loss(x, params, y):
        distance = lpips.lpips(params, x, y, net=net)
        return distance.sum(), distance

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_agrees_with_the_lpips_package(params, pair, value_and_gradient) -> None:
    x, y = pair
    stored = np.load(PARITY / "lpips.npz")
    (_, distance), gradient = value_and_gradient(x, params, y)
    # float32 through 13 layers: seen 3e-7 (distance) and 4e-6 of the largest gradient.
    np.testing.assert_allclose(distance, stored["total"], rtol=1e-5)
    scale = np.abs(stored["gradient"]).max()
    np.testing.assert_allclose(gradient / scale, stored["gradient"] / scale, atol=2e-5)


def test_each_layer_agrees(params, pair, net) -> None:
    x, y = pair
    stored = np.load(PARITY / "lpips.npz")["layers"]
    run = jax.jit(functools.partial(lpips.lpips, net=net))
    for j in range(5):
        only = {
            name: {"kernel": leaf["kernel"] * (name == f"head_{j}")} if "head" in name else leaf
            for name, leaf in params.items()
        }
        distance = run(only, x, y)
        # Differences of unit vectors carry 1e-7 each: 2 sqrt(5e-5) 1e-7 = 1e-9 on the smallest.
        np.testing.assert_allclose(distance, stored[j], rtol=1e-5, atol=1e-8)


def test_equal_images_are_at_zero_with_a_finite_gradient(params, pair, value_and_gradient) -> None:
    x = pair[0].copy()
    x[0] = 0.3  # a constant image too
    (_, distance), gradient = value_and_gradient(x, params, x)
    # The two passes may be fused differently: seen 3e-15, squared rounding of unit vectors.
    np.testing.assert_allclose(distance, 0, atol=1e-12)
    assert np.isfinite(gradient).all()


def test_dead_features_have_a_finite_gradient(params, pair, net) -> None:
    """All channels zero at every pixel: the norm's square root sits at 0."""
    dead = jax.tree.map(jnp.asarray, params)
    dead["conv_3"] = {**dead["conv_3"], "bias": jnp.full_like(dead["conv_3"]["bias"], -1e4)}
    gradient = jax.jit(jax.grad(lambda x, p, y: lpips.lpips(p, x, y, net=net).sum()))
    assert np.isfinite(gradient(pair[0], dead, pair[1])).all()


def test_no_gradient_reaches_the_target(params, pair, net) -> None:
    x, y = (jnp.asarray(a) for a in pair)
    run = jax.jit(jax.grad(lambda y, p, x: lpips.lpips(p, x, y, net=net).sum()))
    gradient = run(y, params, x)
    assert not np.asarray(gradient).any()


def test_bfloat16_convolutions_stay_close(params, pair, net) -> None:
    x, y = (jnp.asarray(a) for a in pair)
    exact, rounded = (
        jax.jit(functools.partial(lpips.lpips, dtype=dtype, net=net))(params, x, y)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.float32
    # 8 bits a layer: 1 % of a distance, and where images are close, the noise of both (seen 8e-5).
    np.testing.assert_allclose(rounded, exact, rtol=0.01, atol=3e-4)
    assert not np.array_equal(rounded, exact)


def test_compiles_once_and_never_touches_the_host(params, pair, net) -> None:
    step = jax.jit(functools.partial(lpips.lpips, net=net))
    params = jax.device_put(params)
    batches = [jax.device_put((pair[0] * s, pair[1])) for s in (1.0, 0.5, 0.2)]
    with jax.transfer_guard("disallow"):
        for x, y in batches:
            step(params, x, y)
    assert step._cache_size() == 1


def test_params_are_arguments_not_constants(params, pair, net) -> None:
    closed = jax.make_jaxpr(functools.partial(lpips.lpips, net=net))(params, *pair)
    assert sum(np.size(c) for c in closed.consts) <= 12  # shift and scale, twice


def test_full_vgg16_is_the_published_network() -> None:
    leaves = jax.tree.leaves(lpips.abstract_params())
    assert sum(leaf.size for leaf in leaves) == 14_714_688 + 64 + 128 + 256 + 512 + 512
    indices = [index for index, _, _ in lpips.VGG16.convs()]
    assert indices == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    taps = [index + 1 for index, _, conv in lpips.VGG16.convs() if conv.tap]
    assert taps == [3, 8, 15, 22, 29]  # relu1_2, 2_2, 3_3, 4_3, 5_3 in torchvision's numbering


def test_full_alexnet_is_the_published_network() -> None:
    leaves = jax.tree.leaves(lpips.abstract_params(lpips.ALEXNET))
    assert sum(leaf.size for leaf in leaves) == 2_469_696 + 64 + 192 + 384 + 256 + 256
    assert [index for index, _, _ in lpips.ALEXNET.convs()] == [0, 3, 6, 8, 10]
    assert all(conv.tap for _, _, conv in lpips.ALEXNET.convs())


def test_alexnet_agrees_with_the_lpips_package(maker, pair) -> None:
    alexnet = lpips.alexnet(maker.WIDTHS)
    params = lpips.from_torch(maker.alex_state(0), maker.head_state(1), alexnet)
    distance = jax.jit(functools.partial(lpips.lpips, net=alexnet))(params, *pair)
    stored = np.load(PARITY / "lpips_alex.npz")["total"]
    np.testing.assert_allclose(distance, stored, rtol=1e-5)


@pytest.mark.parametrize(("net", "side"), [(lpips.VGG16, 16), (lpips.ALEXNET, 31)])
def test_too_small_images_are_named(net, side) -> None:
    def run(side: int) -> jax.ShapeDtypeStruct:
        x = jax.ShapeDtypeStruct((1, side, 64, 3), jnp.float32)
        run = functools.partial(lpips.lpips, net=net)
        return jax.eval_shape(run, lpips.abstract_params(net), x, x)

    assert run(side).shape == (1,)
    with pytest.raises(UserError, match=f"{net.name} needs images of {side} px"):
        run(side - 1)


# --- files


def test_files_of_both_networks(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DCAE_JAX_NETS", str(tmp_path))
    for name, make in (("alex", lpips.alexnet), ("vgg", lpips.vgg16)):
        net = make((4, 4, 6, 6, 8))
        params = lpips.random(3, net)
        place = lpips.default_path(net)
        assert str(place) == str(tmp_path / f"lpips_{name}.safetensors")
        with pytest.raises(UserError, match=rf"import-net lpips-{name}"):
            lpips.load(net=net)
        written = weights.save(place, net.name, params, {"published": "no"})
        jax.tree.map(np.testing.assert_array_equal, lpips.load(net=net), params)
        assert lpips.info(net=net) == written
    with pytest.raises(UserError, match=r"conv_0/bias has shape \(4,\), expected \(64,\)"):
        lpips.load()
    with pytest.raises(UserError, match="holds lpips-alex, expected lpips-vgg"):
        lpips.load(lpips.default_path(lpips.ALEXNET))


def test_wrong_tensors_are_named(maker, net) -> None:
    state = maker.vgg_state(0)
    del state["features.12.bias"]
    with pytest.raises(UserError, match=r"features\.12\.bias is missing"):
        lpips.from_torch(state, maker.head_state(1), net)
    heads = maker.head_state(1)
    heads["lin2.model.1.weight"] *= -1
    with pytest.raises(UserError, match="negative"):
        lpips.from_torch(maker.vgg_state(0), heads, net)
    state = maker.vgg_state(0)
    state["features.0.bias"] = state["features.0.bias"] * np.nan
    with pytest.raises(UserError, match="NaN"):
        lpips.from_torch(state, maker.head_state(1), net)
