"""FID's InceptionV3: the TensorFlow graph of 2015-12-05, whose features FID, IS, KID and sFID use.

It is not torchvision's network: 1008 logits, average pools that do not count their padding, and a
max pool in the last block where Szegedy et al. 2015 (arXiv 1512.00567) average.
Sources: pytorch_fid/inception.py and torch_fidelity/feature_extractor_inceptionv3.py for the
network and both ways of resizing; evaluations/evaluator.py of openai/guided-diffusion for the
spatial features (its `mixed_6/conv`, first 7 channels).

BatchNorm (eps 1e-3, stored statistics) is folded into the convolutions when the published file is
read, in float64.  The weights are a pytree that is always an argument; they come from the file
that `python -m dcae_jax import-net inception` writes.  Everything runs in float32 at the highest
precision (no TF32, no bf16 passes): FID would move.
"""

import enum
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8

from dcae_jax import tree
from dcae_jax.nets import weights

NAME = "inception"
SIDE = 299
LOGITS = 1008
MAX_DIVISOR = 16  # of all channels, which are multiples of it

Params = weights.Params

_BN_EPS = 1e-3
_SPATIAL_CHANNELS = 7
_HIGHEST = jax.lax.Precision.HIGHEST


class Resize(enum.Enum):
    """How images become 299 px and what range they get; both bilinear and without antialias."""

    half_pixel = "half_pixel"  # pytorch-fid, DC-AE: centres of pixels agree; x / 127.5 - 1
    tf1 = "tf1"  # the graph's own (ADM, torch-fidelity): corners agree; (x - 128) / 128


class Features(NamedTuple):
    """What the metrics use of each image."""

    pool: Float[Array, "b pool"]  # 2048: FID, KID, precision and recall
    spatial: Float[Array, "b spatial"]  # 2023 = 17 x 17 x 7, rows of pixels: sFID
    logits: Float[Array, "b logits"]  # 1008, without their bias: Inception Score


# --- the table of layers


class Conv(NamedTuple):
    """Convolution, BatchNorm, ReLU."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True  # by half a kernel; False: not at all
    average: bool = False  # of the 3x3 means of its input


class MaxPool(NamedTuple):
    """3x3; with stride 1 it is padded, with stride 2 not."""

    stride: int = 2


class Mixed(NamedTuple):
    """Chains of layers side by side on one input, their outputs concatenated."""

    name: str  # "": its parameters lie among those around it
    branches: tuple[tuple["Layer", ...], ...]


Layer: TypeAlias = Conv | MaxPool | Mixed


def _chain(name: str, *steps: tuple[int, int, int], first: int = 1) -> tuple[Conv, ...]:
    """Convolutions NAME_1, NAME_2, ... of (features, kernel height, width)."""
    return tuple(Conv(f"{name}_{i}", n, (h, w)) for i, (n, h, w) in enumerate(steps, first))


def _block_a(name: str, pooled: int) -> Mixed:
    return Mixed(
        name,
        (
            (Conv("branch1x1", 64),),
            _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
            _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            (Conv("branch_pool", pooled, average=True),),
        ),
    )


def _block_b(name: str) -> Mixed:
    halved = Conv("branch3x3dbl_3", 96, (3, 3), stride=2, padded=False)
    return Mixed(
        name,
        (
            (Conv("branch3x3", 384, (3, 3), stride=2, padded=False),),
            (*_chain("branch3x3dbl", (64, 1, 1), (96, 3, 3)), halved),
            (MaxPool(),),
        ),
    )


def _block_c(name: str, n: int) -> Mixed:
    return Mixed(
        name,
        (
            (Conv("branch1x1", 192),),
            _chain("branch7x7", (n, 1, 1), (n, 1, 7), (192, 7, 1)),
            _chain("branch7x7dbl", (n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)),
            (Conv("branch_pool", 192, average=True),),
        ),
    )


def _block_d(name: str) -> Mixed:
    long = _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1))
    return Mixed(
        name,
        (
            (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), stride=2, padded=False)),
            (*long, Conv("branch7x7x3_4", 192, (3, 3), stride=2, padded=False)),
            (MaxPool(),),
        ),
    )


def _block_e(name: str, pooled: tuple[Layer, ...]) -> Mixed:
    def split(prefix: str) -> Mixed:
        across, down = (Conv(f"{prefix}{c}", 384, k) for c, k in (("a", (1, 3)), ("b", (3, 1))))
        return Mixed("", ((across,), (down,)))

    return Mixed(
        name,
        (
            (Conv("branch1x1", 320),),
            (Conv("branch3x3_1", 384), split("branch3x3_2")),
            (*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), split("branch3x3dbl_3")),
            pooled,
        ),
    )


# Up to the input of the block whose 1x1 branch gives the spatial features, and from there on.
_BELOW: tuple[Layer, ...] = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), stride=2, padded=False),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    MaxPool(),
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padded=False),
    MaxPool(),
    _block_a("Mixed_5b", 32),
    _block_a("Mixed_5c", 64),
    _block_a("Mixed_5d", 64),
    _block_b("Mixed_6a"),
    _block_c("Mixed_6b", 128),
    _block_c("Mixed_6c", 160),
)
_ABOVE: tuple[Layer, ...] = (
    _block_c("Mixed_6d", 160),
    _block_c("Mixed_6e", 192),
    _block_d("Mixed_7a"),
    _block_e("Mixed_7b", (Conv("branch_pool", 192, average=True),)),
    _block_e("Mixed_7c", (MaxPool(stride=1), Conv("branch_pool", 192))),
)
_SPATIAL = Conv("branch1x1", 192)  # of Mixed_6d


# --- parameters


def abstract_params(divisor: int = 1) -> Params:
    """Shapes: `Mixed_5b/branch1x1/{kernel (HWIO), bias}`, ..., `fc/kernel`; names as published.

    `divisor`: all channels but the logits are divided by it, for quick trials.
    """
    params, channels = _shapes((*_BELOW, *_ABOVE), 3, divisor)
    return {**params, "fc": {"kernel": _shape(channels, LOGITS)}}


def _shapes(layers: tuple[Layer, ...], channels: int, divisor: int) -> tuple[Params, int]:
    """Parameters of a chain of layers, and the channels that come out of it."""
    params: Params = {}
    for layer in layers:
        if isinstance(layer, Conv):
            out = layer.features // divisor
            kernel = _shape(*layer.kernel, channels, out)
            params[layer.name] = {"kernel": kernel, "bias": _shape(out)}
            channels = out
        elif isinstance(layer, Mixed):
            chains = [_shapes(branch, channels, divisor) for branch in layer.branches]
            inner = {name: leaf for chain, _ in chains for name, leaf in chain.items()}
            params |= {layer.name: inner} if layer.name else inner
            channels = sum(out for _, out in chains)
    return params, channels


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def from_torch(state: Mapping[str, np.ndarray], divisor: int = 1) -> Params:
    """Parameters from the tensors of the published PyTorch file, BatchNorm folded in."""
    flat = {}
    for path, leaf in tree.flatten(abstract_params(divisor)).items():
        name, kind = path.rsplit("/", 1)
        if name == "fc":
            flat[path] = weights.take(state, "fc.weight", leaf.shape[::-1]).T.copy()
        elif kind == "kernel":
            flat |= _folded(state, name, leaf.shape)
    return tree.unflatten(flat)


def _folded(
    state: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """relu(bn(conv(x))) as relu(x * kernel + bias), computed in float64."""
    torch_name, (*window, inputs, out) = name.replace("/", "."), shape
    kernel = weights.take(state, f"{torch_name}.conv.weight", (out, inputs, *window))
    gamma, beta, mean, var = (
        weights.take(state, f"{torch_name}.bn.{part}", (out,)).astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(var + _BN_EPS)
    return {
        f"{name}/kernel": (kernel.transpose(2, 3, 1, 0) * scale).astype(np.float32),
        f"{name}/bias": (beta - mean * scale).astype(np.float32),
    }


def random(seed: int, divisor: int = 1) -> Params:
    """Random weights with which features have the size of trained ones and tell images apart."""
    return from_torch(random_state(seed, divisor), divisor)


def random_state(seed: int, divisor: int = 1) -> dict[str, np.ndarray]:
    """The same under the names of the published file, with random statistics of BatchNorm.

    Kernels sum to zero and have the gain of Brock et al. 2021 (arXiv 2101.08692) for ReLU, so that
    features keep their size through all layers and differ from image to image: PyTorch's default
    ones shrink to 5e-7.
    """
    rng = np.random.default_rng(seed)
    state, shapes = {}, tree.flatten(abstract_params(divisor))
    for path in sorted(p for p in shapes if p.endswith("kernel")):
        name, (*window, inputs, out) = path.removesuffix("/kernel"), shapes[path].shape
        kernel = rng.normal(size=(out, inputs, *window))
        if name == "fc":
            state |= {"fc.weight": kernel / np.sqrt(inputs), "fc.bias": rng.normal(size=out)}
            continue
        axes = (1, 2, 3)
        kernel = (kernel - kernel.mean(axes, keepdims=True)) / kernel[0].size ** 0.5
        var = rng.uniform(0.5, 2, out)
        normal = {
            "conv.weight": kernel * np.sqrt(2 / (1 - 1 / np.pi)),
            "bn.weight": np.sqrt(var) * rng.uniform(0.8, 1.2, out),
            "bn.bias": rng.normal(0, 0.1, out),
            "bn.running_mean": rng.normal(0, 0.1, out),
            "bn.running_var": var,
        }
        state |= {f"{name.replace('/', '.')}.{part}": value for part, value in normal.items()}
    return {name: value.astype(np.float32) for name, value in state.items()}


# --- files


def default_path() -> epath.Path:
    """Where `import-net` writes and everything looks."""
    return weights.default_path(NAME)


def load(path: epath.PathLike | None = None) -> Params:
    """Parameters (float32 numpy) from `path` or the default path; a narrow file says that it is."""
    divisor = int(info(path).get("divisor", "1"))
    return weights.load(NAME, path, abstract_params(divisor))


def info(path: epath.PathLike | None = None) -> dict[str, str]:
    """What the file says of itself: sources, their SHA256, `params_sha256`."""
    return weights.info(NAME, path)


# --- the network


def features(params: Params, images: UInt8[Array, "b h w 3"], resize: Resize) -> Features:
    """Features of RGB images of any size; under jit, what the caller drops is not computed."""
    return network(params, resized(images, resize))


def resized(images: UInt8[Array, "b h w 3"], resize: Resize) -> Float[Array, "b 299 299 3"]:
    """The input of the first layer, about [-1, 1]."""
    x = _interpolated(_interpolated(images, 1, resize), 2, resize)
    return x / 127.5 - 1 if resize is Resize.half_pixel else (x - 128) / 128


def network(params: Params, x: Float[Array, "b 299 299 3"]) -> Features:
    """Features of what `resized` gives."""
    x = _chained(params, x, _BELOW)
    spatial = _conv(params["Mixed_6d"][_SPATIAL.name], x, _SPATIAL)[..., :_SPATIAL_CHANNELS]
    pool = jnp.mean(_chained(params, x, _ABOVE), axis=(1, 2))
    logits = jnp.matmul(pool, params["fc"]["kernel"], precision=_HIGHEST)
    return Features(pool, spatial.reshape(len(x), -1), logits)


def _interpolated(x: Array, axis: int, resize: Resize) -> Array:
    """Linear interpolation along one axis to 299."""
    low, high, share = _positions(x.shape[axis], resize)
    a, b = (jnp.take(x, i, axis=axis).astype(jnp.float32) for i in (low, high))
    return a + (b - a) * np.expand_dims(share, [i for i in range(x.ndim) if i != axis])


@functools.cache
def _positions(size: int, resize: Resize) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both source pixels of each target pixel, and the share of the second.

    With the rounding of the originals: all in float32, PyTorch by a fused multiply-add.
    """
    scale, at = np.float32(size / SIDE), np.arange(SIDE, dtype=np.float32)
    if resize is Resize.half_pixel:
        at = np.maximum((at + 0.5) * np.float64(scale) - 0.5, 0).astype(np.float32)
    else:
        at = at * scale
    low = np.minimum(at.astype(np.int32), size - 1)
    return low, np.minimum(low + 1, size - 1), at - low.astype(np.float32)


def _chained(params: Params, x: Array, layers: tuple[Layer, ...]) -> Array:
    for layer in layers:
        if isinstance(layer, Conv):
            x = _conv(params[layer.name], x, layer)
        elif isinstance(layer, MaxPool):
            x = _max_pool(x, layer.stride)
        else:
            inner = params[layer.name] if layer.name else params
            x = jnp.concatenate([_chained(inner, x, b) for b in layer.branches], axis=-1)
    return x


def _conv(params: dict[str, Any], x: Array, layer: Conv) -> Float[Array, "b _ _ c"]:
    out = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(params["kernel"]),
        window_strides=(layer.stride, layer.stride),
        padding=_padding(layer),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,
    )
    if not layer.padded:
        rows, columns = (
            (n - k) // layer.stride + 1 for n, k in zip(x.shape[1:3], layer.kernel, strict=True)
        )
        out = out[:, :rows, :columns]
    # The mean of the input would be over more channels; both are linear.
    out = _average(out) if layer.average else out
    return jax.nn.relu(out + jnp.asarray(params["bias"]))


def _padding(layer: Conv) -> list[tuple[int, int]]:
    """What is added above and below, left and right.

    XLA on CPU is 1.2 to 2.9 times as fast with a padding as without: one row and column are added
    there and what comes of them is cut off.
    """
    if layer.padded:
        return [(k // 2, k // 2) for k in layer.kernel]
    return [(0, int(jax.default_backend() == "cpu"))] * 2


def _average(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mean of the 3x3 neighbours that lie inside the image."""
    inside = [3 - (np.arange(n) == 0) - (np.arange(n) == n - 1) for n in x.shape[1:3]]
    count = np.multiply.outer(*inside).astype(np.float32)[..., None]
    return _window(x, np.float32(0), jax.lax.add, 1) / count


def _max_pool(x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b _ _ c"]:
    return _window(x, np.float32(-np.inf), jax.lax.max, stride)


def _window(x: Array, start: np.float32, function: Any, stride: int) -> Array:
    padding = "SAME" if stride == 1 else "VALID"
    return jax.lax.reduce_window(x, start, function, (1, 3, 3, 1), (1, stride, stride, 1), padding)
