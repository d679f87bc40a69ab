"""LPIPS: the distance between two images in the features of a frozen network (VGG16).

Source: Zhang et al. 2018 (arXiv 1801.03924), version 0.1 of the published linear heads.
The weights are a pytree that is always an argument (closed over, XLA would embed 59 MB in every
program); they come from a safetensors file that `python -m dcae_jax import-net lpips` writes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dcae_jax.errors import UserError

IMPORT_COMMAND = "python -m dcae_jax import-net lpips"
FORMAT = "dcae_jax.lpips"

Params = dict[str, dict[str, Any]]

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

    name: str
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


def vgg16(widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512)) -> Net:
    """VGG16 (Simonyan & Zisserman 2015, configuration D) up to relu5_3, or a narrower one."""
    layers: list[Conv | Pool] = []
    for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=True):
        layers += [Pool()] if layers else []
        layers += [Conv(width)] * (depth - 1) + [Conv(width, tap=True)]
    return Net("vgg16", tuple(layers))


VGG16 = vgg16()


def default_path() -> epath.Path:
    """Where `import-net` writes and a config looks: $DCAE_JAX_NETS or the user's cache folder."""
    root = os.environ.get("DCAE_JAX_NETS") or "~/.cache/dcae_jax/nets"
    return epath.Path(root).expanduser() / "lpips_vgg.safetensors"


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
        kernel = _take(features, f"features.{index}.weight", shape)
        bias = _take(features, f"features.{index}.bias", (conv.features,))
        params[f"conv_{i}"] = {"kernel": kernel.transpose(2, 3, 1, 0).copy(), "bias": bias}
    for j, channels in enumerate(net.taps()):
        name = f"lin{j}.model.1.weight"
        head = _take(heads, name, (1, channels, 1, 1)).reshape(-1)
        if (head < 0).any():
            raise UserError(
                f"{name} has negative weights; the published LPIPS heads have none, so this is "
                "another file. Give weights/v0.1/vgg.pth of richzhang/PerceptualSimilarity."
            )
        params[f"head_{j}"] = {"kernel": head}
    return params


def _take(state: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in state:
        some = ", ".join(sorted(state)[:4])
        raise UserError(f"tensor {name} is missing; the file holds {len(state)}: {some}, ...")
    value = np.asarray(state[name], np.float32)
    if value.shape != shape:
        raise UserError(f"tensor {name} has shape {value.shape}, expected {shape}")
    if not np.isfinite(value).all():
        raise UserError(f"tensor {name} holds NaN or infinity; fetch the file again")
    return value


def save(path: epath.PathLike, params: Params, info: Mapping[str, str]) -> dict[str, str]:
    """Writes the safetensors file; returns its metadata: `info` plus format and digest."""
    flat = {f"{m}/{n}": np.asarray(v) for m, leaf in params.items() for n, v in leaf.items()}
    metadata = {**info, "format": FORMAT, "params_sha256": _digest(flat)}
    path = epath.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors.numpy.save(flat, metadata))
    return metadata


def load(path: epath.PathLike | None = None, net: Net = VGG16) -> Params:
    """Parameters (float32 numpy; put them on the device once) from `path` or the default path.

    UserError when the file is missing, is of another kind, or does not match its own digest.
    """
    flat, metadata = _read(path)
    if metadata.get("params_sha256") != _digest(flat):
        raise UserError(f"{_resolved(path)} is damaged (its digest differs). Run: {IMPORT_COMMAND}")
    params: Params = {}
    for module, leaves in abstract_params(net).items():
        for name, leaf in leaves.items():
            value = _take(flat, f"{module}/{name}", leaf.shape)
            params.setdefault(module, {})[name] = value
    return params


def info(path: epath.PathLike | None = None) -> dict[str, str]:
    """What the file says of itself: sources, their SHA256, `params_sha256`. Record it in a run."""
    return _read(path)[1]


def _resolved(path: epath.PathLike | None) -> epath.Path:
    return default_path() if path is None else epath.Path(path).expanduser()


def _read(path: epath.PathLike | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    path = _resolved(path)
    if not path.exists():
        raise UserError(f"no LPIPS weights at {path}. Make the file with: {IMPORT_COMMAND}")
    data = path.read_bytes()
    try:
        flat = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"{path} is no safetensors file ({e}). Run: {IMPORT_COMMAND}") from e
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by `{IMPORT_COMMAND}`: run it on the files.")
    return flat, metadata


def _digest(flat: Mapping[str, np.ndarray]) -> str:
    """SHA256 over names, shapes and bytes, independent of the order in the file."""
    sha = hashlib.sha256()
    for name in sorted(flat):
        sha.update(f"{name} {flat[name].shape} {flat[name].dtype}".encode())
        sha.update(np.ascontiguousarray(flat[name]).tobytes())
    return sha.hexdigest()


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
    smallest = 2 ** sum(isinstance(layer, Pool) for layer in net.layers)
    if min(x.shape[1:3]) < smallest:
        raise UserError(f"LPIPS needs images of {smallest} px and more, got {x.shape[1:3]}")
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
