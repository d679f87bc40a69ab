"""FID's Inception against stored outputs of pytorch-fid and torch-fidelity, and its file."""

import functools
import importlib.util
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import tree
from dcae_jax.errors import UserError
from dcae_jax.nets import inception, weights
from dcae_jax.nets.inception import Resize

PARITY = Path(__file__).parents[1] / "parity"


@pytest.fixture(scope="module")
def maker() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("maker", PARITY / "make_inception_fixtures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def params(maker: types.ModuleType) -> inception.Params:
    return inception.random(0, maker.DIVISOR)


@pytest.fixture(scope="module")
def network():
    """All that follows the resizing, compiled once for all sizes."""
    return jax.jit(inception.network)


_RESIZED = jax.jit(inception.resized, static_argnums=1)


def resized(images: np.ndarray, resize: Resize) -> np.ndarray:
    return np.asarray(_RESIZED(images, resize))


@pytest.mark.parametrize("size", ["64x64", "96x40", "320x320"])
@pytest.mark.parametrize("resize", list(Resize))
def test_agrees_with_pytorch_fid_and_torch_fidelity(maker, params, network, resize, size) -> None:
    images = maker.images(*map(int, size.split("x")))
    found = network(params, resized(images, resize))
    stored = np.load(PARITY / "inception.npz")
    names = [k for k in stored.files if k.startswith(f"{resize.value}/{size}/")]
    assert len(names) == 2 + (resize is Resize.tf1)  # pytorch-fid has no logits
    for name in names:
        ours, theirs = getattr(found, name.rsplit("/", 1)[1]), stored[name]
        assert ours.shape == theirs.shape
        # float32 through 47 layers: seen 4e-6 of the largest.
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("side", [64, 250])
def test_a_ramp_shows_the_positions_of_both_rules(side: int) -> None:
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint8)[:, None], (1, side, side, 3))
    i, scale = np.arange(299), side / 299
    at = {
        Resize.half_pixel: np.clip((i + 0.5) * scale - 0.5, 0, side - 1) / 127.5 - 1,
        Resize.tf1: (np.clip(i * scale, 0, side - 1) - 128) / 128,
    }
    for resize, expected in at.items():
        for image in (ramp, ramp.transpose(0, 2, 1, 3)):  # columns, rows
            found = resized(image, resize)[0]
            line = found[0] if image is ramp else found[:, 0]
            # Positions are float32, as in the originals: 1e-5 of a pixel.
            np.testing.assert_allclose(line, np.stack([expected] * 3, -1), atol=1e-6)


def test_an_image_of_299_px_is_left_as_it_is(maker) -> None:
    images = maker.images(299, 299)
    for resize, shift, scale in ((Resize.half_pixel, 127.5, 127.5), (Resize.tf1, 128, 128)):
        expected = (images.astype(np.float64) - shift) / scale
        np.testing.assert_allclose(resized(images, resize), expected, atol=1e-6)


def test_the_full_network_is_the_published_one() -> None:
    shapes = inception.abstract_params()
    flat = tree.flatten(shapes)
    assert len(flat) == 94 * 2 + 1
    kernels = sum(leaf.size for path, leaf in flat.items() if path.endswith("kernel"))
    # torch: sum(p.numel() for p in fid_inception_v3().parameters() if p.ndim > 1)
    assert kernels == 23_815_520
    images = jax.ShapeDtypeStruct((2, 64, 48, 3), jnp.uint8)
    run = functools.partial(inception.features, resize=Resize.tf1)
    found = jax.eval_shape(run, shapes, images)
    assert [f.shape for f in found] == [(2, 2048), (2, 17 * 17 * 7), (2, 1008)]
    assert {f.dtype for f in found} == {jnp.dtype(jnp.float32)}


def test_random_features_do_not_collapse(maker, params, network) -> None:
    found = network(params, resized(maker.images(64, 64), Resize.tf1))
    for name, value in found._asdict().items():
        spread = np.std(value, axis=0).mean() / np.sqrt(np.mean(np.square(value)))
        assert spread > 0.02, f"{name}: two images differ by {spread:.1%} of the features' size"


def test_features_do_not_depend_on_the_batch(maker, params, network) -> None:
    x = resized(maker.images(64, 64), Resize.half_pixel)
    for one, both in zip(network(params, x[1:]), network(params, x), strict=True):
        # Sums are split differently: seen 1e-6 of the largest.
        scale = np.abs(both).max()
        np.testing.assert_allclose(one[0] / scale, both[1] / scale, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [8, 9])
def test_unpadded_convolutions_are_the_same_on_all_devices(monkeypatch, stride, side) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, side, side + 2, 3)), jnp.float32)
    params = {"kernel": rng.normal(size=(3, 3, 3, 4)).astype(np.float32), "bias": np.ones(4)}
    layer = inception.Conv("it", 4, (3, 3), stride=stride, padded=False)
    on_cpu = inception._conv(params, x, layer)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(inception._conv(params, x, layer), on_cpu, atol=1e-5)


def test_params_are_arguments_not_constants(params) -> None:
    images = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    run = functools.partial(inception.features, resize=Resize.tf1)
    closed = jax.make_jaxpr(run)(params, images)
    largest = max(np.size(c) for c in closed.consts)
    assert largest <= 35 * 35  # positions of the resizing, counts of the average pools


# --- files


def test_a_narrow_file_says_that_it_is(tmp_path, maker, params) -> None:
    path = tmp_path / "a.safetensors"
    weights.save(path, "inception", params, {"published": "no", "divisor": str(maker.DIVISOR)})
    jax.tree.map(np.testing.assert_array_equal, inception.load(path), params)
    weights.save(path, "inception", params, {"published": "no"})
    with pytest.raises(UserError, match=r"Conv2d_1a_3x3/bias has shape \(2,\), expected \(32,\)"):
        inception.load(path)


def test_default_path_is_in_the_folder_of_nets(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DCAE_JAX_NETS", str(tmp_path))
    assert str(inception.default_path()) == str(tmp_path / "inception.safetensors")
    with pytest.raises(UserError, match=r"python -m dcae_jax import-net inception"):
        inception.load()


def test_missing_and_wrong_tensors_are_named(maker) -> None:
    state = inception.random_state(0, maker.DIVISOR)
    with pytest.raises(UserError, match=r"expected \(32, 3, 3, 3\)"):
        inception.from_torch(state)
    for name, value in (("Mixed_7c.branch_pool.bn.running_var", None), ("fc.weight", np.nan)):
        broken = {**state, name: state[name] * (value or 1)}
        if value is None:
            del broken[name]
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            inception.from_torch(broken, maker.DIVISOR)
