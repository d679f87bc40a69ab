"""The PyTorch side of the live comparison: build, fill, run and differentiate the originals."""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

# Weights in front of an RMS norm do nothing but change its input's scale, which the norm removes.
# This small they bring the mean square near the norm's eps (1e-5), so that a wrong eps or a wrong
# scale is seen.
BEFORE_RMS = 0.001
GAP = 1e-6  # relative distance of ReLU inputs from 0 that rounding does not bridge


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _follows_rms(key: str, keys: set[str]) -> bool:
    """Whether the result of this weight goes straight into an RMS norm."""
    block, _, name = key.removesuffix(".weight").rpartition(".")
    norm = {"conv2": "norm", "conv_point": "norm", "to_out": "norm_out"}
    if not key.endswith(".weight") or name not in norm:
        return False
    prefix = f"{block}.{norm[name]}" if block else norm[name]
    return f"{prefix}.weight" in keys and f"{prefix}.running_mean" not in keys


def _value(key: str, like: torch.Tensor, scale: float) -> torch.Tensor:
    g, leaf = _generator(f"{key} {tuple(like.shape)}"), key.rsplit(".", 1)[-1]
    if like.ndim > 1:
        fan_in = like[0].numel()
        return torch.randn(like.shape, generator=g) * (scale / fan_in**0.5)
    uniform = torch.rand(like.shape, generator=g)
    if leaf == "running_var":
        return 0.25 + 2.0 * uniform
    if leaf == "running_mean":
        return 2.0 * uniform - 1.0
    if leaf == "weight":  # of a norm
        return 0.4 + 0.5 * uniform
    return 0.2 * torch.randn(like.shape, generator=g)


def fill(model: nn.Module, before_rms: float = BEFORE_RMS) -> nn.Module:
    """Every float tensor random; activations stay near 1, statistics are far from 0 and 1.

    A value depends on its key and shape alone.  Returns the model, in eval mode, without gradients.
    """
    state = model.state_dict()
    keys = set(state)
    with torch.no_grad():
        for key, tensor in state.items():
            if tensor.is_floating_point():
                scale = before_rms if _follows_rms(key, keys) else 1.0
                tensor.copy_(_value(key, tensor, scale))
            else:  # BatchNorm's counters
                tensor.fill_(zlib.crc32(key.encode()) % 1000)
    return model.eval().requires_grad_(False)


def normal(name: str, *shape: int) -> np.ndarray:
    """Standard normal numbers in our order of axes (NHWC), by name."""
    return torch.randn(shape, generator=_generator(name)).numpy()


def nchw(x: np.ndarray) -> torch.Tensor:
    """Our order of axes to PyTorch's."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    """PyTorch's order of axes to ours."""
    return np.ascontiguousarray(x.detach().numpy().transpose(0, 2, 3, 1))


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |difference| / max |PyTorch|; infinite where shapes differ or values are no numbers."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    difference = np.abs(ours.astype(np.float64) - theirs).max()
    return float(difference / np.abs(theirs).max()) if difference else 0.0


def run(function: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray) -> np.ndarray:
    """A function of PyTorch on one of our arrays."""
    with torch.no_grad():
        return nhwc(function(nchw(x)))


def off_kinks(
    function: Callable[[torch.Tensor], torch.Tensor], inputs: Iterable[np.ndarray]
) -> tuple[np.ndarray, float]:
    """The first input that keeps all ReLUs off 0, else the best of them; and how far it keeps them.

    The gradient jumps where a ReLU's input changes sign.  Inputs nearer to 0 than rounding have
    another sign on each side, and then the gradients differ although both are right.
    """
    best, widest = None, -1.0
    for x in inputs:
        gap = _gap(function, x)
        if gap > widest:
            best, widest = x, gap
        if gap >= GAP:
            break
    assert best is not None
    return best, widest


def _gap(function: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray) -> float:
    """The smallest |input| of any ReLU, relative to the largest of the same call."""
    gaps = [1.0]

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.ReLU):
            size = inputs[0].abs()
            gaps.append(float(size.min() / size.max()))

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        run(function, x)
    finally:
        handle.remove()
    return min(gaps)


def gradients(
    model: nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The gradients of a loss by x and by every parameter of the model, by key."""
    parameters = dict(model.named_parameters())
    model.requires_grad_(True)
    image = nchw(x).requires_grad_()
    found = torch.autograd.grad(loss(image), [image, *parameters.values()])
    model.requires_grad_(False)
    return nhwc(found[0]), {k: g.numpy() for k, g in zip(parameters, found[1:], strict=True)}


def encode(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Image to latent; of an AutoencoderKL its mean, then its (clipped) log variance."""

    def latent(x: torch.Tensor) -> torch.Tensor:
        found = model.encode(x)
        if "latent" in found:
            return found.latent
        return torch.cat([found.latent_dist.mean, found.latent_dist.logvar], 1)

    return latent


def decode(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Latent (of which an AutoencoderKL takes the mean) to image."""
    return lambda z: model.decode(z[:, : model.config.latent_channels]).sample


def both(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Image to reconstruction."""
    return lambda x: decode(model)(encode(model)(x))


def whole_loss(
    model: Any, dz: np.ndarray, dy: np.ndarray
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Image to sum(latent * dz) + sum(reconstruction * dy)."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        z = encode(model)(x)
        return (z * nchw(dz)).sum() + (decode(model)(z) * nchw(dy)).sum()

    return loss
