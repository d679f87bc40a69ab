"""Parts of the denoising transformers: attention, MLPs, norms, embeddings, stacks of equal layers.

Parameters are fp32; activations are `Options.dtype` but for the f32 islands: norm statistics and
adaptive modulation, rotary positions, the softmax, the time embedding, and the output.

Layers of a stack are always *stored* stacked, each leaf with a leading layer axis; whether they
are scanned or unrolled, and what is recomputed in the backward pass, changes no path and no number.
"""

import copy
import enum
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

from dcae_jax.errors import UserError
from dcae_jax.models.layers import Dtype, linear, torch_uniform
from dcae_jax.tree import Tree

MAX_PERIOD = 10_000
RMS_EPS = 1e-6
ATTENTION_OUT = "attention"  # the checkpoint name of attention's result
SWIGLU_UNIT = 64  # its hidden width is rounded up to a multiple
CUDNN_HEAD_DIM = 128  # the largest on every GPU since Ampere; Hopper takes 256

Initializer = Callable[..., Array]


class AttentionKernel(enum.Enum):
    """Who computes the attention; the numbers agree to rounding."""

    auto = "auto"  # cudnn on GPUs where its limits allow, xla elsewhere
    xla = "xla"
    cudnn = "cudnn"  # flash attention: bfloat16, head dimensions 8, 16, ... 128


class Remat(enum.Enum):
    """What the backward pass of each layer recomputes."""

    none = "none"
    dots = "dots"  # all but the results of weight matrices and attention
    full = "full"  # all but the layer's input


class MLPKind(enum.Enum):
    """The hidden layer of an MLP."""

    gelu = "gelu"  # the published one: erf-GELU in UViT, tanh-GELU in DiT
    swiglu = "swiglu"  # silu(a) * b, 2/3 as wide, so that the parameters are about as many


class Options(NamedTuple):
    """What all layers of a transformer share."""

    width: int
    heads: int
    mlp_hidden: int
    kernel_init: Initializer
    mlp: MLPKind = MLPKind.gelu
    tanh_gelu: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    attention: AttentionKernel = AttentionKernel.auto
    dtype: Dtype = Dtype.float32


# ---------------------------------------------------------------------------------------- config


@dataclass(slots=True, unsafe_hash=True)
class BackboneConfig:
    """What the configs of UViT and DiT have in common."""

    in_channels: int = 32  # of the latent
    input_size: tuple[int, int] = (16, 16)  # height and width of the latent
    patch: int = 1  # latent pixels a side of one token
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    mlp: MLPKind = MLPKind.gelu
    num_classes: int = 1000  # class `num_classes` means: no class
    qkv_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key
    adaptive_channels: bool = False  # also takes latents cut to their first channels (DC-AE 1.5)
    dtype: Dtype = Dtype.bfloat16  # of activations
    attention: AttentionKernel = AttentionKernel.auto
    scan: bool = True  # one compiled layer in a loop; False: unrolled, slower to compile
    remat: Remat = Remat.none

    @property
    def out_factor(self) -> int:
        """Output channels for each input channel: 2 with a learned variance."""
        return 1

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        hidden = self.width * self.mlp_ratio
        if MLPKind(self.mlp) is MLPKind.gelu:
            return round(hidden)
        return math.ceil(round(hidden * 2 / 3, 6) / SWIGLU_UNIT) * SWIGLU_UNIT

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches; UserError if the latent does not fit."""
        for name, size in (("height", height), ("width", width)):
            if size < self.patch or size % self.patch:
                raise UserError(
                    f"the latent's {name} {size} is not a multiple of the patch size {self.patch}; "
                    "choose another patch or resolution"
                )
        return height // self.patch, width // self.patch

    def check_channels(self, channels: int) -> None:
        """UserError unless the network takes latents of so many channels."""
        if channels == self.in_channels:
            return
        if not (self.adaptive_channels and 0 < channels < self.in_channels):
            only = f"1 to {self.in_channels}" if self.adaptive_channels else f"{self.in_channels}"
            raise UserError(
                f"the latent has {channels} channels and this network takes {only}; use the latents"
                " it was made for" + ("" if self.adaptive_channels else ", or adaptive_channels")
            )


def check_build(cfg: Any, kind: str) -> Any:
    """A copy of the config for the network's own; UserError lists all its problems."""
    if found := cfg.problems():
        lines = "\n".join(f"  - {p}" for p in found)
        raise UserError(f"this {kind} cannot be built:\n{lines}")
    return copy.deepcopy(cfg)


def _enum_problems(cfg: BackboneConfig) -> list[str]:
    kinds = {"mlp": MLPKind, "dtype": Dtype, "attention": AttentionKernel, "remat": Remat}
    values = {"mlp": cfg.mlp, "dtype": cfg.dtype, "attention": cfg.attention, "remat": cfg.remat}
    return [
        f"{name} = {values[name]!r} is unknown; choose one of {', '.join(m.value for m in kind)}"
        for name, kind in kinds.items()
        if values[name] not in list(kind) and values[name] not in [m.value for m in kind]
    ]


def _size_problems(cfg: BackboneConfig) -> list[str]:
    sizes = {
        "in_channels": cfg.in_channels, "patch": cfg.patch, "width": cfg.width,
        "depth": cfg.depth, "heads": cfg.heads, "num_classes": cfg.num_classes,
    }  # fmt: skip
    found = [f"{k} = {v}; the smallest is 1" for k, v in sizes.items() if v < 1]
    if not (math.isfinite(cfg.mlp_ratio) and cfg.mlp_ratio > 0):
        found.append(f"mlp_ratio = {cfg.mlp_ratio}; published networks have 4")
    if len(cfg.input_size) != 2 or min(cfg.input_size) < 1:
        found.append(
            f"input_size = {cfg.input_size}; give height and width of the latent, e.g. (16, 16)"
        )
    return found


def _nearest(value: int, unit: int) -> str:
    low = value // unit * unit
    return f"{low} or {low + unit}" if low else f"{unit}"


def backbone_problems(cfg: BackboneConfig) -> list[str]:
    """All problems of the common fields, each with its mend."""
    found = _enum_problems(cfg) + _size_problems(cfg)
    if found:  # the checks below need well-formed values
        return found
    found += [
        f"the latent's {name} {size} (input_size) is not a multiple of patch = {cfg.patch}; "
        f"nearest: {_nearest(size, cfg.patch)}"
        for name, size in zip(("height", "width"), cfg.input_size, strict=True)
        if size % cfg.patch
    ]
    if cfg.width % 2:
        found.append(f"width = {cfg.width} is odd; the time embedding is half sines, half cosines")
    if cfg.width % cfg.heads:
        near = [h for h in range(1, cfg.width + 1) if cfg.width % h == 0]
        best = min(near, key=lambda h: abs(h - cfg.heads))
        found.append(
            f"width = {cfg.width} is not divisible by heads = {cfg.heads}; nearest: {best} heads"
        )
    elif AttentionKernel(cfg.attention) is AttentionKernel.cudnn:
        if why := cudnn_limit(Dtype(cfg.dtype), cfg.head_dim):
            found.append(f"attention = cudnn, but {why}; use attention = auto or xla")
    return found


def options_of(cfg: BackboneConfig, kernel_init: Initializer, *, tanh_gelu: bool) -> Options:
    """What the layers need of a config, with its enums made sure of."""
    return Options(
        width=cfg.width, heads=cfg.heads, mlp_hidden=cfg.mlp_hidden, kernel_init=kernel_init,
        mlp=MLPKind(cfg.mlp), tanh_gelu=tanh_gelu, qkv_bias=cfg.qkv_bias, qk_norm=cfg.qk_norm,
        attention=AttentionKernel(cfg.attention), dtype=Dtype(cfg.dtype),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- variables


def init_variables(cfg: Any, key: PRNGKeyArray) -> Tree:
    """{"params": fp32} of a UViTConfig or DiTConfig; traceable.  Equal for scan and unrolled."""
    latent = jnp.zeros((1, *cfg.input_size, cfg.in_channels))
    return cfg.build().init(key, latent, jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)})


def abstract_variables(cfg: Any) -> Tree:
    """The shapes of `init_variables`, without memory or time."""
    return jax.eval_shape(lambda: init_variables(cfg, jax.random.key(0)))


def count(tree: Tree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def describe_backbone(cfg: Any, kind: str, extra_tokens: int) -> list[str]:
    """One line for the whole and one for each part: tokens, widths, parameters."""
    params = abstract_variables(cfg)["params"]
    rows, columns = cfg.grid(*cfg.input_size)
    height, width = cfg.input_size
    extra = f" + {extra_tokens}" if extra_tokens else ""
    how = "scanned" if cfg.scan else "unrolled"
    return [
        f"{kind}: {height} x {width} x {cfg.in_channels} -> {rows * columns}{extra} tokens of width"
        f" {cfg.width}, {cfg.heads} heads of {cfg.head_dim}, MLP {cfg.mlp_hidden}, layers {how}, "
        f"remat {Remat(cfg.remat).value}, {count(params):,} parameters",
        *[f"  {name}: {count(part):,} parameters" for name, part in params.items()],
    ]


# ---------------------------------------------------------------------------------------- stacks

Layer = Callable[[Tree, Array, Array | None], Array]  # (its params, x, its skip) -> x


def block_params(module: nn.Module, name: str, block: nn.Module, *example: Array) -> Tree:
    """Declares the parameters of one layer as `name/...`.

    `block` is unbound (parent=None); `example` are arguments it can be initialised with.
    """
    if module.has_variable("params", name):  # the block checks shapes; saves tracing its init
        return module.get_variable("params", name)
    return module.param(name, lambda key: block.init(key, *example)["params"])


def stacked_params(module: nn.Module, name: str, block: nn.Module, n: int, *example: Array) -> Tree:
    """`block_params` of `n` equal layers, with a leading layer axis."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)

    def init(key: PRNGKeyArray) -> Tree:
        keys = jax.random.split(key, n)
        return jax.vmap(lambda k: block.init(k, *example)["params"])(keys)

    return module.param(name, init)


def cast_kernels(params: Tree, dtype: Dtype) -> Tree:
    """The kernels of a stack in the compute dtype, before its scan instead of inside.

    Inside, the scan would store each layer's rounded copy for the backward pass, gathered from all
    devices; here it is made once, sharded as the parameters are, and half as much is gathered.
    """

    def leaf(path: tuple[Any, ...], x: Array) -> Array:
        return x.astype(dtype.value) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(leaf, params)


def _policy(remat: Remat) -> Callable[..., bool] | None:
    if remat is Remat.full:
        return None
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(
        policies.checkpoint_dots_with_no_batch_dims,
        policies.save_only_these_names(ATTENTION_OUT),
    )


def with_remat(layer: Layer, remat: Remat, scan: bool) -> Layer:
    """The layer with its recomputation; inside a scan nothing could be merged back anyway."""
    if remat is Remat.none:
        return layer
    return jax.checkpoint(layer, prevent_cse=not scan, policy=_policy(remat))


def run_layers(
    layer: Layer, params: Tree, x: Float[Array, "b n d"], skips: Any = None, *,
    scan: bool, keep: bool = False,
) -> tuple[Float[Array, "b n d"], Any]:  # fmt: skip
    """The layers one after the other -> (result, with `keep` the result of every layer).

    The kept ones are one array under scan and a list otherwise; both can be `skips` (one each
    layer), reversed by `[::-1]`.
    """
    if scan:

        def step(x: Array, each: tuple[Tree, Array | None]) -> tuple[Array, Array | None]:
            y = layer(each[0], x, each[1])
            return y, (y if keep else None)

        return jax.lax.scan(step, x, (params, skips))
    kept = []
    for i in range(len(jax.tree.leaves(params)[0])):
        one = jax.tree.map(lambda p, i=i: p[i], params)
        x = layer(one, x, None if skips is None else skips[i])
        kept.append(x)
    return x, (kept if keep else None)


def layers_between(params: Tree, start: int, stop: int) -> Tree:
    """The parameters of layers start..stop-1 of a stack."""
    return jax.tree.map(lambda p: p[start:stop], params)


def check_hidden(k: int | None, layers: int) -> None:
    """UserError unless `return_hidden` is None or the number of a layer, from 1."""
    if k is not None and not 1 <= k <= layers:
        raise UserError(
            f"return_hidden = {k}: this network has layers 1 to {layers}; choose one of them"
        )


# -------------------------------------------------------------------------- linear layers, norms


class Dense(nn.Module):
    """x @ kernel + bias; kernel [in, out], biases start at 0.

    `outputs` below `features` uses the first columns only (adaptive channels).
    """

    features: int
    kernel_init: Initializer
    use_bias: bool = True
    dtype: Dtype = Dtype.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"], outputs: int | None = None) -> Float[Array, "*n f"]:
        """Computes in `dtype`."""
        dtype = self.dtype.value
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = linear(x.astype(dtype), kernel[:, :outputs].astype(dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + bias[:outputs].astype(dtype)


# Norms and activations keep their inputs for the backward pass and nothing they compute on the way:
# a scan stores every value that it is not told to compute again, here f32 ones of full width, and
# the memory of a training step would double.  No matrix product is repeated.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def normalise(x: Float[Array, "*n c"], eps: float) -> Float[Array, "*n c"]:
    """Layer norm without parameters, in and to f32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)


def modulate(
    x: Float[Array, "b n c"], shift: Float[Array, "b 1 c"], scale: Float[Array, "b 1 c"],
    eps: float,
) -> Float[Array, "b n c"]:  # fmt: skip
    """Adaptive layer norm: normalised x times (1 + scale) plus shift, in f32, rounded once."""

    def norm(x: Array, shift: Array, scale: Array) -> Array:
        y = normalise(x, eps) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
        return y.astype(x.dtype)

    return recomputed(norm)(x, shift, scale)


class LayerNorm(nn.Module):
    """Layer norm with scale and bias; statistics in f32, one rounding at the end."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Returns the dtype of x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)

        def norm(x: Array, scale: Array, bias: Array) -> Array:
            return (normalise(x, self.eps) * scale + bias).astype(x.dtype)

        return recomputed(norm)(x, scale, bias)


class HeadNorm(nn.Module):
    """RMS norm of each head's query or key (arXiv 2302.05442 with RMS), with a scale, in f32."""

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Returns the dtype of x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)

        def norm(x: Array, scale: Array) -> Array:
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + RMS_EPS)
            return (y * scale).astype(x.dtype)

        return recomputed(norm)(x, scale)


# ------------------------------------------------------------------------------------- attention


def cudnn_limit(dtype: Dtype, head_dim: int) -> str:
    """Why cuDNN's flash attention cannot compute this; "" if it can."""
    if dtype is not Dtype.bfloat16:
        return f"cuDNN's attention needs dtype bfloat16 (now {dtype.value})"
    if head_dim > CUDNN_HEAD_DIM or head_dim % 8:
        return f"cuDNN's head dimensions are multiples of 8 up to {CUDNN_HEAD_DIM} (now {head_dim})"
    return ""


@functools.cache
def _has_cudnn() -> bool:
    """Whether the default backend is CUDA with bfloat16 flash attention (Ampere or later)."""
    backend = jax.extend.backend.get_backend()
    if backend.platform != "gpu" or "cuda" not in backend.platform_version.lower():
        return False
    return all(float(d.compute_capability) >= 8.0 for d in jax.local_devices())


def choose_kernel(asked: AttentionKernel, dtype: Dtype, head_dim: int) -> AttentionKernel:
    """xla or cudnn: what `auto` comes to on this machine."""
    if asked is not AttentionKernel.auto:
        return asked
    fits = not cudnn_limit(dtype, head_dim) and _has_cudnn()
    return AttentionKernel.cudnn if fits else AttentionKernel.xla


class Attention(nn.Module):
    """Softmax attention between all tokens; `qkv` holds [q | k | v], each head after head."""

    options: Options

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], rope: Float[Array, "n e"] | None = None
    ) -> Float[Array, "b n d"]:
        """Activations in `dtype`, the softmax in f32; `rope`: angles for queries and keys."""
        o = self.options
        b, n, width = x.shape
        qkv = Dense(3 * width, o.kernel_init, o.qkv_bias, o.dtype, name="qkv")(x)
        qkv = qkv.reshape(b, n, 3, o.heads, width // o.heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        if o.qk_norm:
            q, k = HeadNorm(name="q_norm")(q), HeadNorm(name="k_norm")(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        kernel = choose_kernel(o.attention, o.dtype, width // o.heads)
        y = jax.nn.dot_product_attention(q, k, v, implementation=kernel.value)
        y = checkpoint_name(y.reshape(b, n, width), ATTENTION_OUT)
        return Dense(width, o.kernel_init, dtype=o.dtype, name="proj")(y)


class MLP(nn.Module):
    """fc2(act(fc1(x))); with swiglu fc1 makes [gate | value]."""

    options: Options

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Computes in `dtype`."""
        o = self.options
        swiglu = o.mlp is MLPKind.swiglu
        width = (2 if swiglu else 1) * o.mlp_hidden
        y = Dense(width, o.kernel_init, dtype=o.dtype, name="fc1")(x)
        y = recomputed(_swiglu if swiglu else _GELU[o.tanh_gelu])(y)
        return Dense(x.shape[-1], o.kernel_init, dtype=o.dtype, name="fc2")(y)


def _swiglu(x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


# tanh form or not -> the activation
_GELU = {tanh: functools.partial(jax.nn.gelu, approximate=tanh) for tanh in (True, False)}


# ----------------------------------------------------------------------------------- embeddings


def sinusoid(t: Real[Array, "b"], size: int, shift: int = 0) -> Float[Array, "b d"]:
    """[cos | sin] of t at size / 2 frequencies from 1 down to about 1 / 10000, in f32.

    shift: 1 lets the last frequency be 1 / 10000 exactly, as in diffusers' DiT.
    Exponents and frequencies are rounded to f32 as the originals round them: at t = 1000 the last
    bit counts.
    """
    half = size // 2
    steps = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp((steps / np.float32(half - shift)).astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def grid_sincos(rows: int, columns: int, width: int) -> Float[np.ndarray, "n d"]:
    """Fixed positions of a grid of patches, row after row: [sin | cos] of the column, then the row.

    Source: MAE (arXiv 2111.06377) and DiT (arXiv 2212.09748), whose grids have w first.
    """
    omega = 1.0 / MAX_PERIOD ** (np.arange(width // 4) / (width / 4.0))
    row, column = (g.reshape(-1, 1) * omega for g in np.mgrid[:rows, :columns])
    parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def grid_angles(rows: int, columns: int, head_dim: int) -> Float[np.ndarray, "n e"]:
    """Rotary angles of a grid of patches: half of the pairs turn by the row, half by the column.

    Source: RoFormer (arXiv 2104.09864), axially in 2-D as in EVA-02 (arXiv 2303.11331).
    """
    omega = 1.0 / MAX_PERIOD ** (np.arange(head_dim // 4) / (head_dim / 4.0))
    parts = [g.reshape(-1, 1) * omega for g in np.mgrid[:rows, :columns]]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rotate(x: Float[Array, "b n m d"], angles: Float[Array, "n e"]) -> Float[Array, "b n m d"]:
    """Turns the pairs (channel i, channel i + d / 2) of each head by the token's angles, in f32."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class LabelEmbed(nn.Module):
    """One vector for each class and one for "no class", the last."""

    classes: int
    width: int
    stddev: float

    @nn.compact
    def __call__(self, label: Int[Array, "b"]) -> Float[Array, "b d"]:
        """f32; a label that does not exist gives NaN instead of some other class."""
        init = nn.initializers.normal(self.stddev)
        shape = (self.classes + 1, self.width)
        table = self.param("embedding", init, shape, jnp.float32)
        return table.at[label].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class TimeMLP(nn.Module):
    """fc2(silu(fc1(sinusoid of 256))), all in f32."""

    width: int
    shift: int = 0  # of the sinusoid

    @nn.compact
    def __call__(self, t: Real[Array, "b"]) -> Float[Array, "b d"]:
        """Source: DiT (arXiv 2212.09748), `TimestepEmbedder` of its code."""
        init = nn.initializers.normal(0.02)
        y = Dense(self.width, init, name="fc1")(sinusoid(t, 256, self.shift))
        return Dense(self.width, init, name="fc2")(jax.nn.silu(y))


# --------------------------------------------------------------------------------------- patches


def patchify(x: Float[Array, "b H W c"], patch: int) -> Float[Array, "b n C"]:
    """Tokens row after row; channels of a token ordered (row in patch, column in patch, c)."""
    b, height, width, c = x.shape
    rows, columns = height // patch, width // patch
    x = x.reshape(b, rows, patch, columns, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * columns, patch * patch * c)


def unpatchify(
    x: Float[Array, "b n C"], rows: int, columns: int, patch: int
) -> Float[Array, "b H W c"]:
    """The inverse of `patchify`."""
    b, c = x.shape[0], x.shape[-1] // patch**2
    x = x.reshape(b, rows, columns, patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * patch, columns * patch, c)


def xavier_patch(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32
) -> Array:
    """Xavier-uniform of a patch convolution seen as the matrix [p p c, out] that it is."""
    matrix = (math.prod(shape[:-1]), shape[-1])
    return nn.initializers.xavier_uniform()(key, matrix, dtype).reshape(shape)


class PatchEmbed(nn.Module):
    """A convolution with stride = size = patch; kernel [patch, patch, in, out].

    An input with fewer channels meets the kernel's first ones.
    """

    inputs: int
    features: int
    patch: int
    xavier: bool = False  # True: xavier-uniform, bias 0; False: torch's default for convolutions
    dtype: Dtype = Dtype.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b n d"]:
        """Tokens in `dtype`."""
        shape = (self.patch, self.patch, self.inputs, self.features)
        default = torch_uniform(math.prod(shape[:-1]))
        kernel = self.param("kernel", xavier_patch if self.xavier else default, shape, jnp.float32)
        bias_init = nn.initializers.zeros if self.xavier else default
        bias = self.param("bias", bias_init, (self.features,), jnp.float32)
        dtype = self.dtype.value
        kernel = kernel[:, :, : x.shape[-1]].reshape(-1, self.features)
        y = linear(patchify(x.astype(dtype), self.patch), kernel.astype(dtype))
        return y + bias.astype(dtype)
