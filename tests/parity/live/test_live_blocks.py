"""Each block of DC-AE against the block of diffusers: values and gradients by input and weights."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import original
import pytest
import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from diffusers.models.autoencoders import autoencoder_dc as theirs
from diffusers.models.transformers.sana_transformer import GLUMBConv

from dcae_jax.models import layers
from dcae_jax.models.layers import Act, BlockOptions, Depthwise, Downsample, Norm, Upsample

WIDTH = 96  # three heads: to_q, to_k and to_v of the original then cut heads apart
# Relative to the largest value.  float32 sums in another order; a block is a few products deep.
VALUES, GRADIENTS = 5e-6, 1e-4
NORMS = {"rms_norm": Norm.rms, "batch_norm": Norm.batch}
PATHS = {
    "attn": "attn", "conv_out": "glumb", "conv1": "conv1", "conv2": "conv2", "norm": "norm",
    "norm_out": "norm", "to_out": "proj", "proj_in": "depthwise", "proj_out": "pointwise",
    "conv_inverted": "inverted", "conv_depth": "depth", "conv_point": "point",
    "to_qkv_multiscale": "multiscale_5", "0": None, "conv": None,
}  # fmt: skip
LEAVES = {"running_mean": "mean", "running_var": "var", "bias": "bias"}


def _kernel(value: np.ndarray) -> np.ndarray:
    if value.ndim == 2 or value.shape[2:] == (1, 1):
        return value.reshape(value.shape[:2]).T
    return value.transpose(2, 3, 1, 0)


def ours_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The original's tensors under our paths, in our layout: params/attn/qkv/kernel and so on."""
    found, thirds = {}, {}
    for key, value in tensors.items():
        *modules, leaf = key.split(".")
        if leaf == "num_batches_tracked":
            continue
        if modules and modules[-1] in ("to_q", "to_k", "to_v"):
            thirds.setdefault("/".join(PATHS[m] for m in modules[:-1]), []).append(value)
            continue
        names = [PATHS[m] for m in modules if PATHS[m]]
        names.append(LEAVES.get(leaf, "scale" if value.ndim == 1 else "kernel"))
        collection = "batch_stats" if leaf.startswith("running_") else "params"
        found["/".join([collection, *names])] = _kernel(value) if value.ndim > 1 else value
    for prefix, parts in thirds.items():
        path = "/".join(filter(None, ("params", prefix, "qkv", "kernel")))
        found[path] = np.concatenate(parts).T
    return found


def unflatten(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """Nested dictionaries from paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Paths from nested dictionaries."""
    found = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= flatten(value, path + "/") if isinstance(value, dict) else {path: value}
    return found


def check(
    compare: Any, name: str, block: torch.nn.Module, module: nn.Module, shape: tuple[int, ...]
) -> None:
    """Values and all gradients of one block at one shape."""
    original.fill(block)
    x, _ = original.off_kinks(block, (original.normal(f"{name} {i}", *shape) for i in range(20)))
    y = original.run(block, x)
    dy = original.normal(f"{name} dy", *y.shape)
    dx, grads = original.gradients(block, lambda t: (block(t) * original.nchw(dy)).sum(), x)
    variables = unflatten(ours_of({k: v.numpy() for k, v in block.state_dict().items()}))

    def weighted(params: Any, x: Any) -> Any:
        out = module.apply({**variables, "params": params}, x)
        return (out * dy).sum(), out

    run = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    (our_grads, our_dx), our_y = run(variables["params"], x)
    size = f"{shape[1]}x{shape[2]}"
    compare(name, size, VALUES, value=(our_y, y))
    compare(name, size, GRADIENTS, **{"input gradient": (our_dx, dx)})
    compare.tree(
        name, size, GRADIENTS, "parameter gradients",
        {f"params/{k}": np.asarray(v) for k, v in flatten(our_grads).items()}, ours_of(grads),
    )  # fmt: skip


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("norm", ["rms_norm", "batch_norm"])
def test_res_block(compare: Any, norm: str, act: str) -> None:
    block = theirs.ResBlock(WIDTH, WIDTH, norm, act)
    module = layers.ResBlock(NORMS[norm], Act(act))
    check(compare, f"ResBlock {norm} {act}", block, module, (2, 12, 20, WIDTH))


# 4 x 8 = 32 pixels is the last quadratic size, 3 x 11 = 33 the first linear one.
@pytest.mark.parametrize(
    "size", [(4, 4), (4, 8), (3, 11), (16, 16)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("scales", [(), (5,)], ids=["plain", "5x5"])
def test_evit_block(compare: Any, scales: tuple[int, ...], size: tuple[int, int]) -> None:
    block = theirs.EfficientViTBlock(WIDTH, 1.0, 32, scales, "rms_norm")
    module = layers.EViTBlock(Norm.rms, scales)
    path = "quadratic" if size[0] * size[1] <= 32 else "linear"
    name = f"EViT {'5x5' if scales else 'plain'} {path}"
    check(compare, name, block, module, (2, *size, WIDTH))


@pytest.mark.parametrize("size", [(4, 4), (8, 8)], ids=["quadratic", "linear"])
@pytest.mark.parametrize("norm", ["rms_norm", "batch_norm"])
def test_attention(compare: Any, norm: str, size: tuple[int, int]) -> None:
    block = SanaMultiscaleLinearAttention(
        WIDTH, WIDTH, attention_head_dim=32, norm_type=norm, kernel_sizes=(5,)
    )
    module = layers.LiteMLA(NORMS[norm], (5,))
    check(compare, f"LiteMLA 5x5 {norm}", block, module, (2, *size, WIDTH))


@pytest.mark.parametrize("depthwise", ["shift", "lax"])
def test_glumbconv(compare: Any, depthwise: str) -> None:
    block = GLUMBConv(WIDTH, WIDTH, norm_type="rms_norm", residual_connection=False)
    module = layers.GLUMBConv(BlockOptions(depthwise=Depthwise(depthwise)))
    check(compare, f"GLUMBConv {depthwise}", block, module, (2, 6, 10, WIDTH))


DOWNS = {"ConvPixelUnshuffle": Downsample.conv_unshuffle, "Conv": Downsample.conv}
UPS = {"ConvPixelShuffle": Upsample.conv_shuffle, "InterpolateConv": Upsample.interpolate_conv}


# Doubled and equal widths as in the releases, one other ratio, and the stem.
@pytest.mark.parametrize("widths", [(32, 64), (64, 64), (48, 64), (3, 64)], ids=str)
@pytest.mark.parametrize("kind", DOWNS)
def test_down(compare: Any, kind: str, widths: tuple[int, int]) -> None:
    inputs, outputs = widths
    shortcut = inputs != 3
    block = theirs.DCDownBlock2d(inputs, outputs, kind == "ConvPixelUnshuffle", shortcut)
    module = layers.Down(outputs, DOWNS[kind], shortcut)
    check(compare, f"Down {kind} {inputs}->{outputs}", block, module, (2, 8, 12, inputs))


@pytest.mark.parametrize("widths", [(64, 32), (64, 64), (64, 48), (64, 3)], ids=str)
@pytest.mark.parametrize("kind", UPS)
def test_up(compare: Any, kind: str, widths: tuple[int, int]) -> None:
    inputs, outputs = widths
    shortcut = outputs != 3
    block = theirs.DCUpBlock2d(inputs, outputs, kind == "InterpolateConv", shortcut)
    module = layers.Up(outputs, UPS[kind], shortcut)
    check(compare, f"Up {kind} {inputs}->{outputs}", block, module, (2, 4, 6, inputs))


@pytest.mark.parametrize("widths", [(1024, 32), (256, 64), (512, 512)], ids=str)
def test_latent_shortcuts(compare: Any, widths: tuple[int, int]) -> None:
    """Averaging at the encoder's output and duplicating at the decoder's input."""
    width, latent = widths
    x = original.normal(f"shortcut {widths}", 2, 3, 5, width)
    groups = width // latent
    mean = original.run(lambda t: t.unflatten(1, (-1, groups)).mean(2), x)
    z = original.normal(f"latent {widths}", 2, 3, 5, latent)
    repeated = original.run(lambda t: t.repeat_interleave(groups, 1), z)
    compare(
        f"latent shortcuts {width}, {latent}", "3x5", VALUES,
        averaging=(layers.average_channels(jnp.asarray(x), latent), mean),
        duplicating=(layers.duplicate_channels(jnp.asarray(z), width), repeated),
    )  # fmt: skip
