"""LPIPS: the distance between two images in the features of a frozen network, AlexNet or VGG16.

Source: Zhang et al. 2018 (arXiv 1801.03924), version 0.1 of the published linear heads.
Published scores use AlexNet, training losses VGG16.
The weights are a pytree that is always an argument (closed over, XLA would embed 59 MB in every
program); they come from the files that `python -m dcae_jax import-net lpips-alex` and `lpips-vgg`
write.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dcae_jax.errors import UserError
from dcae_jax.nets import weights

Params = weights.Params

# What the published heads were trained with: RGB in [-1, 1] to the statistics of ImageNet.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
# Under the square root of the feature norm: keeps the gradient finite where all channels are zero,
# and is 1e-10 of the squared norm of ordinary features.
_NORM_EPS = 1e-10


class Conv(NamedTuple):
    """A convolution with bias and ReLU; `tap` marks an output that LPIPS compares."""

    features: int
    kernel: int = 3
    stride: int = 1
    pad: int = 1
    tap: bool = False


class Pool(NamedTuple):
    """A max pooling without padding."""

    window: int = 2
    stride: int = 2


class Net(NamedTuple):
    """A feature network as a table of layers, in the order of torchvision's `features`."""

    name: str  # of its file, and for `import-net`
    layers: tuple[Conv | Pool, ...]

    def convs(self) -> list[tuple[int, int, Conv]]:
        """(index in torchvision's `features`, input channels, layer) of each convolution."""
        found, index, channels = [], 0, 3
        for layer in self.layers:
            if isinstance(layer, Conv):
                found.append((index, channels, layer))
                channels = layer.features
            index += 2 if isinstance(layer, Conv) else 1  # torchvision lists the ReLU apart
        return found

    def taps(self) -> list[int]:
        """Channels of the compared outputs."""
        return [conv.features for _, _, conv in self.convs() if conv.tap]

    def smallest(self) -> int:
        """The side of the smallest image that reaches the last layer."""
        side = 1
        for layer in reversed(self.layers):
            window, pad = (
                (layer.kernel, layer.pad) if isinstance(layer, Conv) else (layer.window, 0)
            )
            side = (side - 1) * layer.stride + window - 2 * pad
        return side


def vgg16(widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512)) -> Net:
    """VGG16 (Simonyan & Zisserman 2015, configuration D) up to relu5_3, or a narrower one."""
    layers: list[Conv | Pool] = []
    for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=True):
        layers += [Pool()] if layers else []
        layers += [Conv(width)] * (depth - 1) + [Conv(width, tap=True)]
    return Net("lpips-vgg", tuple(layers))


def alexnet(widths: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256)) -> Net:
    """AlexNet (Krizhevsky 2014, arXiv 1404.5997, one tower) up to relu5, or a narrower one."""
    a, b, c, d, e = widths
    layers = (
        Conv(a, 11, 4, 2, tap=True),
        Pool(3, 2),
        Conv(b, 5, 1, 2, tap=True),
        Pool(3, 2),
        Conv(c, tap=True),
        Conv(d, tap=True),
        Conv(e, tap=True),
    )
    return Net("lpips-alex", layers)


VGG16, ALEXNET = vgg16(), alexnet()
NETS = {"alex": ALEXNET, "vgg": VGG16}


def abstract_params(net: Net = VGG16) -> Params:
    """Shapes and dtypes of the parameters: `conv_i/{kernel (HWIO), bias}`, `head_j/kernel (C)`."""
    params: Params = {}
    for i, (_, channels, conv) in enumerate(net.convs()):
        shape = (conv.kernel, conv.kernel, channels, conv.features)
        params[f"conv_{i}"] = {
            "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
            "bias": jax.ShapeDtypeStruct((conv.features,), jnp.float32),
        }
    for j, channels in enumerate(net.taps()):
        params[f"head_{j}"] = {"kernel": jax.ShapeDtypeStruct((channels,), jnp.float32)}
    return params


# --- files


def from_torch(
    features: Mapping[str, np.ndarray], heads: Mapping[str, np.ndarray], net: Net = VGG16
) -> Params:
    """Parameters from torchvision's `features.N.*` and LPIPS' `linJ.model.1.weight` tensors.

    Names a missing tensor, a wrong shape, and negative head weights (LPIPS' heads have none).
    """
    params: Params = {}
    for i, (index, channels, conv) in enumerate(net.convs()):
        shape = (conv.features, channels, conv.kernel, conv.kernel)
        kernel = weights.take(features, f"features.{index}.weight", shape)
        bias = weights.take(features, f"features.{index}.bias", (conv.features,))
        params[f"conv_{i}"] = {"kernel": kernel.transpose(2, 3, 1, 0).copy(), "bias": bias}
    for j, channels in enumerate(net.taps()):
        name = f"lin{j}.model.1.weight"
        head = weights.take(heads, name, (1, channels, 1, 1)).reshape(-1)
        if (head < 0).any():
            raise UserError(
                f"{name} has negative weights; the published LPIPS heads have none, so this is "
                "another file. Give the one in weights/v0.1 of richzhang/PerceptualSimilarity."
            )
        params[f"head_{j}"] = {"kernel": head}
    return params


def random(seed: int, net: Net = VGG16) -> Params:
    """Random weights: He's scale keeps activations of order 1, heads are non-negative."""
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, leaves in abstract_params(net).items():
        shape = leaves["kernel"].shape
        if name.startswith("head"):
            params[name] = {"kernel": rng.uniform(0, 1 / shape[0], shape).astype(np.float32)}
            continue
        kernel = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
        bias = rng.normal(0, 0.1, shape[-1])
        params[name] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    return params


def default_path(net: Net = VGG16) -> epath.Path:
    """Where `import-net` writes and a config looks: $DCAE_JAX_NETS or the user's cache folder."""
    return weights.default_path(net.name)


def load(path: epath.PathLike | None = None, net: Net = VGG16) -> Params:
    """Parameters (float32 numpy; put them on the device once) from `path` or the default path."""
    return weights.load(net.name, path, abstract_params(net))


def info(path: epath.PathLike | None = None, net: Net = VGG16) -> dict[str, str]:
    """What the file says of itself: sources, their SHA256, `params_sha256`. Record it in a run."""
    return weights.info(net.name, path)


# --- the distance


def lpips(
    params: Params,
    x: Float[Array, "b h w 3"],
    y: Float[Array, "b h w 3"],
    *,
    dtype: DTypeLike = jnp.float32,
    net: Net = VGG16,
) -> Float[Array, " b"]:
    """Distance of each image `x` to its target `y`, both RGB in [-1, 1].

    Equal images are at 0 (1e-15 where XLA fuses the two passes differently).  No gradient reaches
    `y`.  The two run as two passes: in one joined pass the backward convolutions would also run
    over the targets.
    `dtype` is that of the convolutions; f32 islands: input scaling, feature norms, differences,
    heads and means.  In float32 the convolutions run at the highest precision (no TF32).
    """
    if min(x.shape[1:3]) < net.smallest():
        raise UserError(
            f"{net.name} needs images of {net.smallest()} px and more, got {x.shape[1:3]}"
        )
    targets = jax.lax.stop_gradient(features(params, jax.lax.stop_gradient(y), dtype, net))
    total = jnp.zeros(x.shape[0], jnp.float32)
    for j, (a, b) in enumerate(zip(features(params, x, dtype, net), targets, strict=True)):
        weight = jnp.asarray(params[f"head_{j}"]["kernel"], jnp.float32)
        difference = jnp.square(_unit(a) - _unit(b))
        total += jnp.mean(jnp.sum(difference * weight, axis=-1), axis=(1, 2))
    return total


def features(
    params: Params, x: Float[Array, "b h w 3"], dtype: DTypeLike, net: Net = VGG16
) -> list[Float[Array, "b _ _ _"]]:
    """The tapped activations of `x` (RGB in [-1, 1]), in `dtype`."""
    x = (x.astype(jnp.float32) - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    x = x.astype(dtype)
    taps, i = [], 0
    for layer in net.layers:
        if isinstance(layer, Pool):
            x = _max_pool(x, layer)
            continue
        x = _conv_relu(params[f"conv_{i}"], x, layer)
        i += 1
        taps += [x] if layer.tap else []
    return taps


def _conv_relu(
    params: dict[str, Any], x: Float[Array, "b h w c"], layer: Conv
) -> Float[Array, "b _ _ d"]:
    exact = x.dtype == jnp.float32
    out = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(params["kernel"], x.dtype),
        window_strides=(layer.stride, layer.stride),
        padding=[(layer.pad, layer.pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )
    return jax.nn.relu(out + jnp.asarray(params["bias"], x.dtype))


def _max_pool(x: Float[Array, "b h w c"], layer: Pool) -> Float[Array, "b _ _ c"]:
    window, stride = (1, layer.window, layer.window, 1), (1, layer.stride, layer.stride, 1)
    lowest = np.array(-np.inf, x.dtype)
    return jax.lax.reduce_window(x, lowest, jax.lax.max, window, stride, "VALID")


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each pixel's feature vector divided by its norm, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _NORM_EPS)
