"""Writes the LPIPS, SSIM and state-dict fixtures from the PyTorch originals.

Needs a virtual environment of its own, apart from the one of the tests:
    pip install torch==2.13.0 numpy scipy scikit-image tqdm
    pip install --no-deps lpips==0.1.4 torchmetrics==1.9.0 lightning-utilities
    python tests/parity/make_lpips_fixtures.py

torchvision is not needed: `lpips` takes from it only a VGG16 or an AlexNet, which are built here
(narrow, so that the test is quick).  Weights and images come from a numpy seed on both sides: only
results are stored.  A name as argument writes one of lpips, lpips_alex, ssim, state_dicts anew.
"""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
WIDTHS = (8, 16, 24, 32, 32)
DEPTHS = (2, 2, 3, 3, 3)
ALEX_KERNELS = (11, 5, 3, 3, 3)
ALEX_INDICES = (0, 3, 6, 8, 10)  # of the convolutions in torchvision's `features`


def vgg_state(seed: int, widths: tuple[int, ...] = WIDTHS) -> dict[str, np.ndarray]:
    """Random VGG16 features under torchvision's names."""
    rng = np.random.default_rng(seed)
    state, index, channels = {}, 0, 3
    for width, depth in zip(widths, DEPTHS, strict=True):
        for _ in range(depth):
            state |= _conv_state(rng, index, width, channels, 3)
            index, channels = index + 2, width
        index += 1
    return state


def alex_state(seed: int, widths: tuple[int, ...] = WIDTHS) -> dict[str, np.ndarray]:
    """Random AlexNet features under torchvision's names."""
    rng = np.random.default_rng(seed)
    state, channels = {}, 3
    for index, width, kernel in zip(ALEX_INDICES, widths, ALEX_KERNELS, strict=True):
        state |= _conv_state(rng, index, width, channels, kernel)
        channels = width
    return state


def _conv_state(
    rng: np.random.Generator, index: int, width: int, channels: int, side: int
) -> dict[str, np.ndarray]:
    """One convolution; He scale keeps activations of order 1."""
    kernel = rng.normal(size=(width, channels, side, side)) * np.sqrt(2 / (side * side * channels))
    return {
        f"features.{index}.weight": kernel.astype(np.float32),
        f"features.{index}.bias": rng.normal(0, 0.1, width).astype(np.float32),
    }


def head_state(seed: int, widths: tuple[int, ...] = WIDTHS) -> dict[str, np.ndarray]:
    """Random non-negative linear heads under the names of the lpips package."""
    rng = np.random.default_rng(seed)
    return {
        f"lin{j}.model.1.weight": rng.uniform(0, 1, (1, width, 1, 1)).astype(np.float32)
        for j, width in enumerate(widths)
    }


def images(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 stacks: smooth random images, and the same with noise (one of them unchanged)."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (shape[0], shape[1] // 8, shape[2] // 8, 3))
    x = np.repeat(np.repeat(coarse, 8, axis=1), 8, axis=2) + rng.normal(0, 12, shape)
    y = x + rng.normal(0, 20, shape) * (np.arange(shape[0]) != 1)[:, None, None, None]
    return tuple(np.clip(a, 0, 255).astype(np.uint8) for a in (x, y))


def _fake_torchvision() -> types.ModuleType:
    from torch import nn

    def vgg16(**_: object) -> types.SimpleNamespace:
        layers, channels = [], 3
        for width, depth in zip(WIDTHS, DEPTHS, strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2, 2))
        return types.SimpleNamespace(features=nn.Sequential(*layers))

    def alexnet(**_: object) -> types.SimpleNamespace:
        a, b, c, d, e = WIDTHS
        relu, pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)
        layers = [nn.Conv2d(3, a, 11, 4, 2), relu, pool, nn.Conv2d(a, b, 5, 1, 2), relu, pool]
        for inputs, width in ((b, c), (c, d), (d, e)):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), relu]
        return types.SimpleNamespace(features=nn.Sequential(*layers))

    module = types.ModuleType("torchvision")
    module.models = types.SimpleNamespace(vgg16=vgg16, alexnet=alexnet)
    return module


def make_lpips() -> None:
    net = _lpips("vgg", vgg_state(0))
    x, y = _pair()
    x = x.clone().requires_grad_()
    total, layers = net(x, y, retPerLayer=True)
    total.sum().backward()
    np.savez_compressed(
        HERE / "lpips.npz",
        total=total.detach().reshape(-1).numpy(),
        layers=np.stack([a.detach().reshape(-1).numpy() for a in layers]),
        gradient=x.grad.permute(0, 2, 3, 1).numpy(),
    )


def make_lpips_alex() -> None:
    total = _lpips("alex", alex_state(0))(*_pair())
    np.savez_compressed(HERE / "lpips_alex.npz", total=total.detach().reshape(-1).numpy())


def _lpips(name: str, state: dict[str, np.ndarray]) -> Any:
    import torch

    sys.modules["torchvision"] = _fake_torchvision()
    import lpips

    del sys.modules["torchvision"]  # torchmetrics asks whether it is installed
    net = lpips.LPIPS(pretrained=False, net=name, pnet_rand=True, verbose=False)
    for j, width in enumerate(WIDTHS):
        layer = lpips.NetLinLayer(width, use_dropout=True)
        setattr(net, f"lin{j}", layer)
        net.lins[j] = layer
    net.eval()
    own = net.net.state_dict()  # "sliceK.N.weight": N is torchvision's index
    names = {f"features.{k.split('.', 1)[1]}": k for k in own}
    net.net.load_state_dict({names[k]: torch.from_numpy(v) for k, v in state.items()})
    net.load_state_dict({k: torch.from_numpy(v) for k, v in head_state(1).items()}, strict=False)
    return net


def _pair() -> tuple[Any, Any]:
    import torch

    x, y = (
        torch.from_numpy(a.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        for a in images(2, (2, 48, 64, 3))
    )
    return x, y + 0.02 * torch.sin(37 * torch.arange(y.numel()).float()).reshape(y.shape)


def make_ssim() -> None:
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    x, y = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in images(3, (3, 40, 56, 3)))
    # As in the released evaluation code: uint8 in, the range as a tuple (clamping makes floats).
    # Since 1.5 the mean is over all pixels; before, the 5 px touched by the padding were left out.
    value, full = ssim(
        x.float(), y.float(), data_range=(0.0, 255.0), reduction="none", return_full_image=True
    )
    cropped = full[:, :, 5:-5, 5:-5].mean((1, 2, 3))
    np.savez_compressed(HERE / "ssim.npz", full=value.numpy(), cropped=cropped.numpy())


def make_state_dicts() -> None:
    import torch

    rng = np.random.default_rng(4)
    base = torch.from_numpy(rng.normal(size=(4, 6)).astype(np.float32))
    state = {
        "plain": base,
        "transposed": base.t(),
        "slice": base[1:3, ::2],
        "half": base.half(),
        "bf16": base.bfloat16(),
        "count": torch.tensor(7),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    for name, modern in (("zip", True), ("legacy", False)):
        path = HERE / f"state_dict_{name}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=modern)
    np.savez_compressed(HERE / "state_dict.npz", base=base.numpy())


MAKERS = {
    "lpips": make_lpips,
    "lpips_alex": make_lpips_alex,
    "ssim": make_ssim,
    "state_dicts": make_state_dicts,
}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or MAKERS:
        MAKERS[chosen]()
    print(*(f"{p.name} {p.stat().st_size} bytes" for p in sorted(HERE.glob("*.[np][pt][zh]"))))
