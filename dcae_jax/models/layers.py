"""Blocks shared by the convolutional networks: DC-AE's layers, norms, shortcuts and attention.

NHWC.  Parameters are fp32; a block computes in `BlockOptions.dtype` and leaves it only for the
named f32 islands: norm statistics, and all of the attention between `qkv` and `proj`.

Initialisation is PyTorch's default, which the released autoencoders keep: weights and biases of
every convolution from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), norm scales 1 and biases 0.  The one
exception is `BlockOptions.last_norm_scale_init`, the scale of the norm that ends a residual branch.
"""

import enum
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15
BATCH_NORM_MOMENTUM = 0.1  # torch's sense: the weight of the new batch
GLU_EXPAND = 4
FEW_CHANNELS = 4  # so few input channels leave a CPU's vector units idle


class Dtype(enum.Enum):
    """Compute dtype of activations; parameters are always float32."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Depthwise(enum.Enum):
    """How depthwise convolutions are computed; the numbers agree to 4e-5."""

    auto = "auto"  # shift on CPU, lax elsewhere
    lax = "lax"  # one grouped convolution
    shift = "shift"  # multiply-adds of shifted copies with a hand-written gradient


class Norm(enum.Enum):
    """Normalisation at the end of a residual branch."""

    rms = "rms"  # over channels, per pixel, with bias
    batch = "batch"  # running statistics in the collection `batch_stats`


class Act(enum.Enum):
    """Pointwise nonlinearity."""

    relu = "relu"
    silu = "silu"


class BatchNormMode(enum.Enum):
    """What a BatchNorm does in training."""

    frozen_stats = "frozen_stats"  # always the stored statistics; they never change
    update = "update"  # batch statistics where `batch_stats` is mutable, stored ones elsewhere


class BlockOptions(NamedTuple):
    """What all blocks of a network share."""

    dtype: Dtype = Dtype.float32
    conv_dtype: Dtype = Dtype.float32  # of k x k convolutions, whose results return to `dtype`
    depthwise: Depthwise = Depthwise.auto
    head_dim: int = 32
    residual: bool = True  # the averaging and duplicating shortcuts
    batch_norm: BatchNormMode = BatchNormMode.frozen_stats
    last_norm_scale_init: float = 1.0


ACTIVATIONS: dict[Act, Callable[[Array], Array]] = {Act.relu: jax.nn.relu, Act.silu: jax.nn.silu}


def torch_uniform(fan_in: int) -> Callable[..., Array]:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch's kaiming_uniform(a=sqrt(5)) comes to."""
    return functools.partial(_uniform, 1.0 / float(np.sqrt(fan_in)))


def _uniform(
    bound: float, key: PRNGKeyArray, shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Array:  # fmt: skip
    return jax.random.uniform(key, shape, dtype, -bound, bound)


# ----------------------------------------------------------------- pixel shuffles and shortcuts


def pixel_unshuffle(x: Float[Array, "b H W c"], r: int = 2) -> Float[Array, "b h w C"]:
    """Space to depth in torch's order: channel-major, then row, then column."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // r, r, width // r, r, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, height // r, width // r, c * r * r)


def pixel_shuffle(x: Float[Array, "b h w C"], r: int = 2) -> Float[Array, "b H W c"]:
    """Depth to space, the inverse of `pixel_unshuffle`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // (r * r), r, r)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * r, w * r, c // (r * r))


def nearest_upsample(x: Float[Array, "b h w c"], r: int = 2) -> Float[Array, "b H W c"]:
    """Repeats every pixel r x r times."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, r, w, r, c))
    return x.reshape(b, h * r, w * r, c)


def average_channels(x: Float[Array, "b h w c"], features: int) -> Float[Array, "b h w f"]:
    """Means of c / features *consecutive* channels: the shortcut of the encoder's output."""
    return x.reshape(*x.shape[:-1], features, -1).mean(-1)


def duplicate_channels(x: Float[Array, "b h w c"], features: int) -> Float[Array, "b h w f"]:
    """Every channel features / c times in a row: the shortcut of the decoder's input."""
    return jnp.repeat(x, features // x.shape[-1], axis=-1)


def downsample_shortcut(x: Float[Array, "b H W c"], features: int) -> Float[Array, "b h w f"]:
    """`average_channels(pixel_unshuffle(x), features)`, without the shuffle where there is none.

    Source: DC-AE (arXiv 2410.10733), section 3.2.  The usual widths need a 2x2 mean (features = c)
    or the mean of horizontal pairs, the row offset becoming a channel (features = 2c).
    """
    b, height, width, c = x.shape
    windows = x.reshape(b, height // 2, 2, width // 2, 2, c)
    if features == c:
        return windows.mean((2, 4))
    if features == 2 * c:
        pairs = windows.mean(4).transpose(0, 1, 3, 4, 2)
        return pairs.reshape(b, height // 2, width // 2, features)
    return average_channels(pixel_unshuffle(x), features)


def upsample_shortcut(x: Float[Array, "b h w c"], features: int) -> Float[Array, "b H W f"]:
    """`pixel_shuffle(duplicate_channels(x, 4 * features))`, in closed form for the usual widths.

    Source: DC-AE (arXiv 2410.10733), section 3.2.
    """
    b, h, w, c = x.shape
    if features == c:
        return nearest_upsample(x)
    if c == 2 * features:
        rows = x.reshape(b, h, w, features, 2).transpose(0, 1, 4, 2, 3)
        rows = jnp.broadcast_to(rows[:, :, :, :, None], (b, h, 2, w, 2, features))
        return rows.reshape(b, 2 * h, 2 * w, features)
    return pixel_shuffle(duplicate_channels(x, 4 * features))


# -------------------------------------------------------------------------------- convolutions


def conv2d(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c f"], stride: int = 1,
    padding: tuple[int, int] = (1, 1),
) -> Float[Array, "b H W f"]:  # fmt: skip
    """A dense convolution with zero padding (before, after) in both directions, by default torch's.

    XLA's "SAME" would pad (0, 1) under an even size and stride 2, and shift the grid.
    """
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [padding] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def conv_unshuffle(
    x: Float[Array, "b H W c"], kernel: Float[Array, "3 3 c f"]
) -> Float[Array, "b h w F"]:
    """`pixel_unshuffle(conv2d(x, kernel))`.

    With few input channels on CPU (the stem: 3) the image is unshuffled first: a convolution with
    4 times the products that XLA runs 16 times as fast per product.
    """
    if x.shape[-1] <= FEW_CHANNELS and jax.default_backend() == "cpu":
        return conv2d(pixel_unshuffle(x), _unshuffled_kernel(kernel))
    return pixel_unshuffle(conv2d(x, kernel))


def _unshuffled_kernel(kernel: Float[Array, "3 3 c f"]) -> Float[Array, "3 3 C F"]:
    """The kernel that does to an unshuffled image what `kernel` does to the image itself.

    Coarse tap I and input offset a are the fine tap d seen from output offset i where
    2 (I - 1) + a = i + d - 1; the same for columns.
    """
    coarse, a, i, d = np.ogrid[:3, :2, :2, :3]
    same = (2 * (coarse - 1) + a == i + d - 1).astype(kernel.dtype)
    big = jnp.einsum("Iaid,Jbje,decf->IJcabfij", same, same, kernel)
    return big.reshape(3, 3, 4 * kernel.shape[2], 4 * kernel.shape[3])


def linear(x: Float[Array, "*n c"], kernel: Float[Array, "c f"]) -> Float[Array, "*n f"]:
    """A 1x1 convolution.

    On CPU the rows are flattened first: XLA runs the gradients of a 2-D product 1.5 to 2 times as
    fast.  Elsewhere the axes stay apart, so that a sharded height needs no resharding.
    """
    if jax.default_backend() == "cpu":
        rows = x.reshape(-1, x.shape[-1]) @ kernel
        return rows.reshape(*x.shape[:-1], kernel.shape[-1])
    return x @ kernel


def grouped_linear(x: Float[Array, "*n c"], kernel: Float[Array, "i c"]) -> Float[Array, "*n c"]:
    """A grouped 1x1 convolution of equal width: one i x i matrix for each i channels.

    Column o of the kernel makes output channel o from the input channels of its own group.
    """
    size = kernel.shape[0]
    blocks = x.reshape(*x.shape[:-1], -1, size)
    out = jnp.einsum("...gi,igo->...go", blocks, kernel.reshape(size, -1, size))
    return out.reshape(x.shape)


def _shifts(x: Float[Array, "b h w c"], size: int) -> list[Float[Array, "b h w c"]]:
    """The size x size shifted copies of the zero-padded x, in the order of the kernel's taps."""
    h, w = x.shape[1:3]
    p = size // 2
    padded = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    return [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]


def _weighted_shifts(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
    taps = kernel.reshape(-1, kernel.shape[-1])
    return sum(s * t for s, t in zip(_shifts(x, kernel.shape[0]), taps, strict=True))


def _channel_sums(x: Float[Array, "b h w c"]) -> Float[Array, "c"]:
    """Sums over all but the channels by halving adds, which XLA vectorises on CPU.

    A plain `sum((0, 1, 2))` of a product is 3 to 30 times slower there.
    """
    rows = x.reshape(-1, x.shape[-1])
    while rows.shape[0] > 1 and rows.shape[0] % 2 == 0:
        half = rows.shape[0] // 2
        rows = rows[:half] + rows[half:]
    return rows.sum(0)


@jax.custom_vjp
def shift_depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
    """A depthwise convolution (stride 1, odd size) as multiply-adds of shifted copies.

    XLA's CPU backend has no fast grouped convolution: there this form is 20 to 60 times faster.
    """
    return _weighted_shifts(x, kernel)


def _shift_forward(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> tuple[Float[Array, "b h w c"], tuple[Array, Array]]:
    return _weighted_shifts(x, kernel), (x, kernel)


def _shift_backward(
    saved: tuple[Array, Array], grad: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "k k 1 c"]]:
    x, kernel = saved
    taps = [_channel_sums(s * grad) for s in _shifts(x, kernel.shape[0])]
    return _weighted_shifts(grad, kernel[::-1, ::-1]), jnp.stack(taps).reshape(kernel.shape)


shift_depthwise.defvjp(_shift_forward, _shift_backward)


def lax_depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
    """A depthwise convolution (stride 1, odd size) as one grouped convolution."""
    p = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(p, p)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    )  # fmt: skip


def depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], how: Depthwise
) -> Float[Array, "b h w c"]:
    """A depthwise convolution in the asked form; `auto` goes by the default backend."""
    shift = how is Depthwise.shift or (how is Depthwise.auto and jax.default_backend() == "cpu")
    return shift_depthwise(x, kernel) if shift else lax_depthwise(x, kernel)


def _add_bias(module: nn.Module, x: Array, fan_in: int, repeats: int = 1) -> Array:
    features = x.shape[-1] // repeats
    bias = module.param("bias", torch_uniform(fan_in), (features,), jnp.float32)
    return x + jnp.repeat(bias, repeats).astype(x.dtype)


class Conv(nn.Module):
    """3x3 convolution with torch's padding of 1 and initialisation; kernel [3, 3, in, out]."""

    features: int
    stride: int = 1
    use_bias: bool = True
    unshuffle: bool = False  # the result is also unshuffled, space to depth
    options: BlockOptions = BlockOptions()
    padding: tuple[int, int] = (1, 1)  # rows before and after, likewise columns

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        """Computes in `conv_dtype`, returns `dtype`."""
        shape = (3, 3, x.shape[-1], self.features)
        fan_in = 9 * x.shape[-1]
        kernel = self.param("kernel", torch_uniform(fan_in), shape, jnp.float32)
        dtype = self.options.conv_dtype.value
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        if self.unshuffle:
            y = conv_unshuffle(x, kernel)
        else:
            y = conv2d(x, kernel, self.stride, self.padding)
        y = y.astype(self.options.dtype.value)
        return _add_bias(self, y, fan_in, 4 if self.unshuffle else 1) if self.use_bias else y


class PrefixConv(nn.Module):
    """A 3x3 convolution that can work on the first channels only (DC-AE 1.5, arXiv 2508.00413).

    With all channels it is `Conv`.  An input of fewer than `inputs` channels meets the kernel's
    first rows; `outputs` below `features` uses the first filters.
    """

    inputs: int
    features: int
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], outputs: int | None = None
    ) -> Float[Array, "b h w f"]:
        """The convolution with `outputs` (default: all) filters."""
        fan_in = 9 * self.inputs
        shape = (3, 3, self.inputs, self.features)
        kernel = self.param("kernel", torch_uniform(fan_in), shape, jnp.float32)
        bias = self.param("bias", torch_uniform(fan_in), (self.features,), jnp.float32)
        kernel = kernel[:, :, : x.shape[-1], :outputs]
        dtype = self.options.conv_dtype.value
        y = conv2d(x.astype(dtype), kernel.astype(dtype)).astype(self.options.dtype.value)
        return y + bias[:outputs].astype(y.dtype)


class Linear(nn.Module):
    """1x1 convolution; kernel [in, out]."""

    features: int
    use_bias: bool = False
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        """Computes in `dtype`."""
        fan_in = x.shape[-1]
        shape = (fan_in, self.features)
        kernel = self.param("kernel", torch_uniform(fan_in), shape, jnp.float32)
        dtype = self.options.dtype.value
        y = linear(x.astype(dtype), kernel.astype(dtype))
        return _add_bias(self, y, fan_in) if self.use_bias else y


class DepthwiseConv(nn.Module):
    """k x k depthwise convolution; kernel [k, k, 1, channels]."""

    size: int = 3
    use_bias: bool = True
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Computes in `conv_dtype`, returns `dtype`."""
        fan_in = self.size**2
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", torch_uniform(fan_in), shape, jnp.float32)
        dtype = self.options.conv_dtype.value
        y = depthwise(x.astype(dtype), kernel.astype(dtype), self.options.depthwise)
        y = y.astype(self.options.dtype.value)
        return _add_bias(self, y, fan_in) if self.use_bias else y


class GroupedLinear(nn.Module):
    """Grouped 1x1 convolution without bias; kernel [channels of a group, channels]."""

    group: int
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Computes in `dtype`."""
        shape = (self.group, x.shape[-1])
        kernel = self.param("kernel", torch_uniform(self.group), shape, jnp.float32)
        dtype = self.options.dtype.value
        return grouped_linear(x.astype(dtype), kernel.astype(dtype))


# --------------------------------------------------------------------------------------- norms


class RMSNorm(nn.Module):
    """Root-mean-square norm over channels, per pixel, with scale *and* bias.

    Source: `trms2d` of the official code: eps 1e-5 inside the root, f32 throughout (an island),
    one rounding at the end.
    """

    scale_init: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns the dtype of x."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.constant(self.scale_init), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + NORM_EPS)
        return (y * scale + bias).astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch norm with torch's semantics: eps 1e-5, momentum 0.1, *unbiased* running variance.

    Statistics live in the collection `batch_stats` as `mean` and `var`, and are an f32 island.
    With `update`, a call that may change the collection (`mutable=["batch_stats"]`) normalises by
    the statistics of the whole batch (under jit: of all its shards) and moves the running ones.
    """

    scale_init: float = 1.0
    mode: BatchNormMode = BatchNormMode.frozen_stats

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns the dtype of x."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.constant(self.scale_init), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        y = x.astype(jnp.float32)
        if self._uses_batch():
            used_mean, used_var = y.mean((0, 1, 2)), y.var((0, 1, 2))
            n = y.size // y.shape[-1]
            _move(mean, used_mean)
            _move(var, used_var * (n / max(n - 1, 1)))
        else:
            used_mean, used_var = mean.value, var.value
        y = (y - used_mean) * (scale * jax.lax.rsqrt(used_var + NORM_EPS)) + bias
        return y.astype(x.dtype)

    def _uses_batch(self) -> bool:
        training = self.is_mutable_collection("batch_stats") and not self.is_initializing()
        return self.mode is BatchNormMode.update and training


def _move(running: nn.Variable, new: Float[Array, "c"]) -> None:
    keep = 1.0 - BATCH_NORM_MOMENTUM
    running.value = keep * running.value + BATCH_NORM_MOMENTUM * jax.lax.stop_gradient(new)


def last_norm(norm: Norm, options: BlockOptions) -> nn.Module:
    """The norm that ends a residual branch; call inside a compact method (it is named `norm`)."""
    init = options.last_norm_scale_init
    if norm is Norm.batch:
        return BatchNorm(init, options.batch_norm, name="norm")
    return RMSNorm(init, name="norm")


# -------------------------------------------------------------------------------------- blocks


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))); the second convolution has no bias."""

    norm: Norm
    act: Act
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Source: DC-AE (arXiv 2410.10733), `ResBlock` of the official code."""
        width = x.shape[-1]
        y = Conv(width, options=self.options, name="conv1")(x)
        y = ACTIVATIONS[self.act](y)
        y = Conv(width, use_bias=False, options=self.options, name="conv2")(y)
        return x + last_norm(self.norm, self.options)(y)


# An f32 island: without it TPUs multiply in one bf16 pass and GPUs in TF32.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def relu_attention(qkv: Float[Array, "b h w C"], head_dim: int) -> Float[Array, "b h w c"]:
    """Attention with relu(q) . relu(k) as the kernel, in f32 (products, sums and division).

    Channels are [q | k | v] of `head_dim` each, head after head.  Above `head_dim` pixels it is
    linear in their number, below it forms the matrix of weights; the two agree but for rounding.
    Numerator and denominator are separate products: appending ones to v, as the official code
    does, makes products of width 33, which are slow on matrix units.
    """
    b, h, w, c = qkv.shape
    heads = qkv.astype(jnp.float32).reshape(b, h * w, -1, 3, head_dim)
    q, k, v = jax.nn.relu(heads[..., 0, :]), jax.nn.relu(heads[..., 1, :]), heads[..., 2, :]
    if h * w > head_dim:
        total = _einsum("bmgd,bmge->bgde", k, v)
        numerator = _einsum("bngd,bgde->bnge", q, total)
        denominator = _einsum("bngd,bgd->bng", q, k.sum(1))[..., None]
        out = numerator / (denominator + ATTENTION_EPS)
    else:
        weights = _einsum("bngd,bmgd->bgnm", q, k)
        weights = weights / (weights.sum(-1, keepdims=True) + ATTENTION_EPS)
        out = _einsum("bgnm,bmge->bnge", weights, v)
    return out.reshape(b, h, w, c // 3).astype(qkv.dtype)


class MultiScale(nn.Module):
    """One more scale of q, k, v: a depthwise convolution, then one matrix per head and role."""

    size: int
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, qkv: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Source: EfficientViT (arXiv 2205.14756), section 3.1."""
        y = DepthwiseConv(self.size, use_bias=False, options=self.options, name="depthwise")(qkv)
        return GroupedLinear(self.options.head_dim, self.options, name="pointwise")(y)


class LiteMLA(nn.Module):
    """norm(proj(attention)): ReLU linear attention over one or more scales of q, k, v."""

    norm: Norm
    scales: tuple[int, ...] = ()
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Source: EfficientViT (arXiv 2205.14756), section 3.1; no scaling, no positions."""
        width = x.shape[-1]
        qkv = Linear(3 * width, options=self.options, name="qkv")(x)
        extra = [MultiScale(s, self.options, name=f"multiscale_{s}")(qkv) for s in self.scales]
        y = relu_attention(jnp.concatenate([qkv, *extra], -1), self.options.head_dim)
        y = Linear(width, options=self.options, name="proj")(y)
        return last_norm(self.norm, self.options)(y)


class GLUMBConv(nn.Module):
    """norm(point(a * silu(g))) with [a | g] = depth(silu(inverted(x))), 4 + 4 times as wide."""

    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Source: `GLUMBConv` of the official code; its norm is RMS in every stage."""
        width = x.shape[-1]
        inverted = Linear(2 * GLU_EXPAND * width, True, self.options, name="inverted")
        y = jax.nn.silu(inverted(x))
        y = DepthwiseConv(3, options=self.options, name="depth")(y)
        value, gate = jnp.split(y, 2, -1)
        y = Linear(width, options=self.options, name="point")(value * jax.nn.silu(gate))
        return last_norm(Norm.rms, self.options)(y)


class EViTBlock(nn.Module):
    """x + LiteMLA(x), then + GLUMBConv of that."""

    norm: Norm
    scales: tuple[int, ...] = ()
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Source: EfficientViT (arXiv 2205.14756), figure 2."""
        x = x + LiteMLA(self.norm, self.scales, self.options, name="attn")(x)
        return x + GLUMBConv(self.options, name="glumb")(x)


class Downsample(enum.Enum):
    """The convolution that halves the resolution."""

    conv_unshuffle = "conv_unshuffle"  # 3x3 to a quarter of the channels, then space to depth
    conv = "conv"  # 3x3 with stride 2


class Upsample(enum.Enum):
    """The convolution that doubles the resolution."""

    conv_shuffle = "conv_shuffle"  # 3x3 to four times the channels, then depth to space
    interpolate_conv = "interpolate_conv"  # nearest neighbour, then 3x3


class Down(nn.Module):
    """Halves the resolution: kind(x) + averaging shortcut.  Parameters: kernel, bias."""

    features: int
    kind: Downsample
    shortcut: bool = True
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """The shortcut also needs `options.residual`."""
        shuffle = self.kind is Downsample.conv_unshuffle
        if shuffle:
            conv = Conv(self.features // 4, unshuffle=True, options=self.options)
        else:
            conv = Conv(self.features, stride=2, options=self.options)
        nn.share_scope(self, conv)
        y = conv(x)
        if self.shortcut and self.options.residual:
            y = y + downsample_shortcut(x, self.features)
        return y


class Up(nn.Module):
    """Doubles the resolution: kind(x) + duplicating shortcut.  Parameters: kernel, bias."""

    features: int
    kind: Upsample
    shortcut: bool = True
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        """The shortcut also needs `options.residual`."""
        shuffle = self.kind is Upsample.conv_shuffle
        conv = Conv(4 * self.features if shuffle else self.features, options=self.options)
        nn.share_scope(self, conv)
        y = pixel_shuffle(conv(x)) if shuffle else conv(nearest_upsample(x))
        if self.shortcut and self.options.residual:
            y = y + upsample_shortcut(x, self.features)
        return y
