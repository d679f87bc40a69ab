"""Frozen networks at full width, read by `import-net` from files that PyTorch wrote.

Inception against pytorch-fid and torch-fidelity, LPIPS against the lpips package and torchmetrics,
with random backbones and the published linear heads, which lie in the lpips package.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lpips as lpips_package
import make_inception_fixtures as inception_maker
import make_lpips_fixtures as lpips_maker
import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as torchmetrics_functional
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from dcae_jax.cli import import_net
from dcae_jax.nets import inception, lpips
from dcae_jax.nets.inception import Resize

# float32 through 47 layers of random weights: both sides are 2e-5 away from a run in float64.
FEATURES = 1e-4
DISTANCE = 1e-5
PIXELS = 1e-6
ORIGINALS = {
    Resize.half_pixel: ("pytorch-fid", inception_maker.pytorch_fid),
    Resize.tf1: ("torch-fidelity", inception_maker.torch_fidelity),
}


def _torch_file(path: Path, state: dict[str, np.ndarray]) -> str:
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
    return str(path)


def _nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# --- Inception


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> inception.Params:
    folder = tmp_path_factory.mktemp("inception")
    out = folder / "ours.safetensors"
    file = _torch_file(folder / "theirs.pth", inception.random_state(1))
    options = ["--from", file, "--out", str(out), "--accept-unknown-digest"]
    assert import_net.main(["inception", *options]) == 0
    return jax.device_put(inception.load(out))


@pytest.fixture(scope="module")
def network() -> Callable[..., inception.Features]:
    return jax.jit(inception.network)


@pytest.fixture(scope="module", params=list(Resize), ids=lambda resize: resize.value)
def original(request: pytest.FixtureRequest) -> tuple[Resize, str, Callable[[Any], Any]]:
    name, build = ORIGINALS[request.param]
    return request.param, name, build(inception.random_state(1), 1)


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (299, 299), (512, 512), (192, 320)])
def test_inception(compare, params, network, original, size) -> None:
    resize, name, run = original
    images = inception_maker.images(*size)
    ours = network(params, inception.resized(jnp.asarray(images), resize))._asdict()
    theirs = run(_nchw(images))
    assert set(theirs) >= {"pool", "spatial"}
    pairs = {key: (ours[key], value) for key, value in theirs.items()}
    compare(f"Inception, {name}", "x".join(map(str, size)), FEATURES, **pairs)


@pytest.mark.parametrize("size", [(64, 64), (320, 320), (1024, 192)])
def test_resizing(compare, size) -> None:
    """Noise shows an error of position by as much as it is."""
    from torch_fidelity import interpolate_compat_tensorflow as tf1

    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    x, side = _nchw(images).float(), (inception.SIDE,) * 2
    theirs = {
        Resize.half_pixel: 2 * torch.nn.functional.interpolate(x / 255, side, mode="bilinear") - 1,
        Resize.tf1: (
            tf1.interpolate_bilinear_2d_like_tensorflow1x(x, side, align_corners=False) - 128
        )
        / 128,
    }
    pairs = {
        resize.value: (inception.resized(jnp.asarray(images), resize), y.permute(0, 2, 3, 1))
        for resize, y in theirs.items()
    }
    compare("resize to 299", "x".join(map(str, size)), PIXELS, **pairs)


# --- LPIPS


@pytest.fixture(scope="module", params=list(lpips.NETS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name, our parameters, and the state of the backbone that they were read from."""
    name, net = request.param, lpips.NETS[request.param]
    make = {"alex": lpips_maker.alex_state, "vgg": lpips_maker.vgg_state}[name]
    state = make(2, tuple(net.taps()))
    folder = tmp_path_factory.mktemp(net.name)
    heads = Path(lpips_package.__file__).parent / "weights" / "v0.1" / f"{name}.pth"
    files = [_torch_file(folder / "backbone.pth", state), str(heads)]
    out = folder / "ours.safetensors"
    options = ["--out", str(out), "--accept-unknown-digest"]
    assert import_net.main([net.name, "--from", *files, *options]) == 0
    published = {"alex": import_net.ALEX_HEADS, "vgg": import_net.VGG_HEADS}[name]
    assert lpips.info(out, net)["heads_sha256"] == published.sha256
    return name, jax.device_put(lpips.load(out, net)), state


def _fill(backbone: torch.nn.Module, state: dict[str, np.ndarray]) -> None:
    """Both packages call layer N of torchvision's `features` sliceK.N or slices.K.N."""
    own = backbone.state_dict()
    found = {key: torch.from_numpy(state[f"features.{_layer(key)}"]) for key in own}
    backbone.load_state_dict(found)


def _layer(key: str) -> str:
    return ".".join(key.split(".")[-2:])


def test_lpips(compare, monkeypatch, pair) -> None:
    name, params, state = pair
    x, y = lpips_maker.images(4, (3, 96, 64, 3))
    run = jax.jit(lambda p, x, y: lpips.lpips(p, x, y, net=lpips.NETS[name]))
    ours = run(params, *(a.astype(np.float32) / 127.5 - 1 for a in (x, y)))

    package = lpips_package.LPIPS(net=name, pnet_rand=True, verbose=False)
    features = torchmetrics_functional._get_tv_model_features
    monkeypatch.setattr(
        torchmetrics_functional, "_get_tv_model_features", lambda net, pretrained: features(net)
    )
    metric = LearnedPerceptualImagePatchSimilarity(name, normalize=True)
    _fill(package.net, state)
    _fill(metric.net.net, state)
    tensors = [_nchw(a).float() / 255 for a in (x, y)]
    with torch.no_grad():
        theirs = package(*tensors, normalize=True).flatten()
        pairs = {
            "lpips": (ours, theirs),
            "torchmetrics": (ours, metric.net(*tensors, normalize=True).flatten()),
            "torchmetrics' mean": (ours.mean(), metric(*tensors)),
        }
    assert ours[1] < 1e-9 < 1e-3 < ours[0]  # the second pair is of equal images
    compare(f"LPIPS {name}", "96x64", DISTANCE, **pairs)
