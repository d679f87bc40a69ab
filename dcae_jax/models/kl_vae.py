"""AutoencoderKL: the variational autoencoder of latent diffusion (SD-VAE), of any depth.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models"
(arXiv 2112.10752), appendix G; diffusers' `AutoencoderKL` for what the paper omits.  It is what
DC-AE (arXiv 2410.10733) compares itself with, there also at f32, f64 and f128.

Stage i works at 1 / 2^i of the resolution, in the decoder too: `decoder/up_0` is the one at full
resolution with any number of stages, so that a pattern means the same everywhere.  (diffusers
counts the decoder's blocks from the latent: its up_blocks.0 is our last.)  `down_{i}/down` leads
from stage i to i + 1, `up_{i}/up` from stage i to i - 1.

The compute dtype is left only for the f32 islands: statistics of the group norms and the softmax.
"""

import copy
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dcae_jax import tree
from dcae_jax.errors import UserError
from dcae_jax.models.dcae import Remat, abstract_variables, check_size, nearest
from dcae_jax.models.layers import BlockOptions, Conv, Dtype, Linear, nearest_upsample
from dcae_jax.sharding import constrain

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
DOWN_PADDING = (0, 1)  # of the convolution that halves: one row below, one column to the right
MAX_WEIGHTS = 2**28  # attention weights of one image held at once: 1 GiB, enough for 128 x 128


@dataclass(slots=True, unsafe_hash=True)
class KLVAEConfig:
    """An AutoencoderKL.  The default is SD-VAE f8.  Initialisation is PyTorch's default."""

    in_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)  # stage 0 (full resolution) first
    layers_per_block: int = 2  # residual blocks of an encoder stage; the decoder's have one more
    norm_groups: int = 32
    mid_attention: bool = True  # at the latent's resolution, on both sides
    quant_conv: bool = True  # 1x1 after the encoder
    post_quant_conv: bool = True  # 1x1 before the decoder
    dtype: Dtype = Dtype.bfloat16  # of activations
    conv_dtype: Dtype | None = None  # of 3x3 convolutions; None: `dtype`
    remat: Remat = Remat.none

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, in each direction; sizes must be multiples of it."""
        return 2 ** (len(self.widths) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of one image; UserError if the image does not fit."""
        check_size(height, width, self.factor)
        return height // self.factor, width // self.factor, self.latent_channels

    def gaussian(self) -> bool:
        """Always: the encoder gives the mean and the log variance of the latent."""
        return True

    def couples_examples(self) -> bool:
        """Never: a group norm looks at one example."""
        return False

    def latent_layers(self) -> str:
        """The encoder's last stage and all behind it, the decoder up to its first stage."""
        last = len(self.widths) - 1
        encoder = f"encoder/(down_{last}|mid|norm_out|conv_out|quant)"
        return f"({encoder}|decoder/(post_quant|conv_in|mid|up_{last}))"

    def head_layers(self) -> str:
        """The decoder's stage at full resolution and its output."""
        return "decoder/(up_0|norm_out|conv_out)"

    def heights(self, resolution: int) -> dict[str, int]:
        """Height of the activations of each stage, by its name."""
        sizes = [resolution >> i for i in range(len(self.widths))]
        return {f"down_{i}, up_{i} ({size} px)": size for i, size in enumerate(sizes)}

    def resolve(self, trainable: str) -> None:
        """Nothing here depends on what trains."""

    def options(self) -> BlockOptions:
        """What all blocks share."""
        dtype = Dtype(self.dtype)
        conv_dtype = dtype if self.conv_dtype is None else Dtype(self.conv_dtype)
        return BlockOptions(dtype=dtype, conv_dtype=conv_dtype)

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        sizes = {
            "in_channels": self.in_channels, "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block, "norm_groups": self.norm_groups,
        }  # fmt: skip
        found = [f"{k} = {v}; the smallest is 1" for k, v in sizes.items() if v < 1]
        found += _unknown("dtype", self.dtype, Dtype) + _unknown("remat", self.remat, Remat)
        if self.conv_dtype is not None:
            found += _unknown("conv_dtype", self.conv_dtype, Dtype)
        if len(self.widths) < 2:
            found.append(f"widths has {len(self.widths)} stage(s); an autoencoder needs at least 2")
        groups = max(self.norm_groups, 1)
        found += [
            f"widths[{i}] = {w} is not a positive multiple of norm_groups = {groups}; nearest: "
            f"{nearest(w, groups)}, or other norm_groups"
            for i, w in enumerate(self.widths)
            if w < 1 or w % groups
        ]
        return found

    def build(self) -> "KLVAE":
        """The network, with its own copy of this config; UserError lists all problems."""
        if found := self.problems():
            lines = "\n".join(f"  - {p}" for p in found)
            raise UserError(f"this autoencoder cannot be built:\n{lines}")
        return KLVAE(copy.deepcopy(self))

    def describe(self, resolution: int) -> list[str]:
        """One line per part: resolution, width, blocks, parameters; at `resolution` pixels."""
        shapes = abstract_variables(self)["params"]
        height, _, channels = self.latent_shape(resolution, resolution)
        lines = [
            f"f{self.factor}c{self.latent_channels} (KL): {resolution} x {resolution} x "
            f"{self.in_channels} -> {height} x {height} x {channels} = {height**2} latent pixels, "
            f"{tree.size(shapes):,} parameters"
        ]
        for side in ("encoder", "decoder"):
            lines += [self._line(side, name, v, resolution) for name, v in shapes[side].items()]
        return lines

    def _line(self, side: str, name: str, shapes: Any, resolution: int) -> str:
        size = f"{tree.size(shapes):,} parameters"
        kind, _, index = name.partition("_")
        if kind not in ("down", "up"):
            return f"  {side}/{name}: {size}"
        depth = self.layers_per_block + (side == "decoder")
        return (
            f"  {side}/{name}: {resolution >> int(index):>4} px, width "
            f"{self.widths[int(index)]:>4}, {depth:>2} x res, {size}"
        )


def _unknown(name: str, value: Any, kind: type[enum.Enum]) -> list[str]:
    known = [member.value for member in kind]
    if value in known or value in list(kind):
        return []
    return [f"{name} = {value!r}; it knows {', '.join(known)}"]


# -------------------------------------------------------------------------------------- network


class GroupNorm(nn.Module):
    """Group norm with a scale and bias per channel; f32 throughout (an island), rounded once.

    The variance is that of the centred values: the mean of squares less the square of the mean
    would cancel.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns the dtype of x."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        y = x.astype(jnp.float32)
        y = y - self._mean(y)
        y = y * (jax.lax.rsqrt(self._mean(jnp.square(y)) + NORM_EPS) * scale) + bias
        return y.astype(x.dtype)

    def _mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
        """Means over pixels and the channels of a group, repeated for each channel of it.

        Pixels first: sums along the last axis in pieces are slow on CPU.
        """
        b, c = x.shape[0], x.shape[-1]
        means = x.mean((1, 2)).reshape(b, self.groups, -1).mean(-1, keepdims=True)
        return jnp.broadcast_to(means, (b, self.groups, c // self.groups)).reshape(b, 1, 1, c)


class KLResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    features: int
    groups: int
    options: BlockOptions

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        """Source: LDM (arXiv 2112.10752), appendix G; diffusers' `ResnetBlock2D` without time."""
        y = jax.nn.silu(GroupNorm(self.groups, name="norm1")(x))
        y = Conv(self.features, options=self.options, name="conv1")(y)
        y = jax.nn.silu(GroupNorm(self.groups, name="norm2")(y))
        y = Conv(self.features, options=self.options, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Linear(self.features, True, self.options, name="shortcut")(x)
        return constrain(x + y)


def _attend(
    q: Float[Array, "b h w c"], k: Float[Array, "b n c"], v: Float[Array, "b n c"]
) -> Float[Array, "b h w c"]:
    weights = jnp.einsum("bhwc,bnc->bhwn", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(weights * q.shape[-1] ** -0.5, -1).astype(v.dtype)
    return jnp.einsum("bhwn,bnc->bhwc", constrain(weights), v)


def attention(
    q: Float[Array, "b h w c"], k: Float[Array, "b h w c"], v: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Softmax attention of all pixels with all pixels, one head; softmax in f32.

    Two plain products: the one head is as wide as the model (512), beyond what fused kernels take
    (cuDNN: 256 at most), and with rows kept as rows a height that is sharded over `spatial` stays
    so, only k and v being gathered.  Above MAX_WEIGHTS the query rows take turns, which is exact
    and keeps the memory bounded, backward pass included.
    """
    b, height, width, c = q.shape
    k, v = (constrain(x.reshape(b, height * width, c)) for x in (k, v))
    rows = _rows_at_once(height, width)
    if rows == height:
        return _attend(q, k, v)
    turns = q.reshape(b, height // rows, rows, width, c).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda part: _attend(part, k, v)), turns)
    return out.swapaxes(0, 1).reshape(q.shape)


def _rows_at_once(height: int, width: int) -> int:
    """The most query rows, a divisor of the height, whose weights fit; 1 if none do."""
    fits = [r for r in range(1, height + 1) if height % r == 0]
    return max([r for r in fits if r * width * height * width <= MAX_WEIGHTS], default=1)


class AttentionBlock(nn.Module):
    """x + proj(attention(q, k, v)) of the normalised x; all projections have a bias."""

    groups: int
    options: BlockOptions

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Source: LDM (arXiv 2112.10752), appendix G; `Attention` of diffusers' mid block."""
        width = x.shape[-1]
        y = GroupNorm(self.groups, name="norm")(x)
        q, k, v = (Linear(width, True, self.options, name=name)(y) for name in "qkv")
        y = Linear(width, True, self.options, name="proj")(attention(q, k, v))
        return constrain(x + y)


def _res_block(cfg: KLVAEConfig, width: int, index: int) -> nn.Module:
    cls: Any = KLResBlock
    if Remat(cfg.remat) is Remat.block:
        cls = nn.remat(cls, prevent_cse=True)
    return cls(width, cfg.norm_groups, cfg.options(), name=f"block_{index}")


class DownStage(nn.Module):
    """The blocks of encoder stage `index`, then the way down to the next one."""

    cfg: KLVAEConfig
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """Source: diffusers' `DownEncoderBlock2D`."""
        cfg, width = self.cfg, self.cfg.widths[self.index]
        for j in range(cfg.layers_per_block):
            x = _res_block(cfg, width, j)(x)
        if self.index + 1 < len(cfg.widths):
            down = Conv(width, 2, options=cfg.options(), padding=DOWN_PADDING, name="down")
            x = constrain(down(x))
        return x


class UpStage(nn.Module):
    """The blocks of decoder stage `index`, then the way up to the next larger one."""

    cfg: KLVAEConfig
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        """Source: diffusers' `UpDecoderBlock2D`: one block more than in the encoder."""
        cfg, width = self.cfg, self.cfg.widths[self.index]
        for j in range(cfg.layers_per_block + 1):
            x = _res_block(cfg, width, j)(x)
        if self.index > 0:
            x = constrain(Conv(width, options=cfg.options(), name="up")(nearest_upsample(x)))
        return x


class Mid(nn.Module):
    """Block, attention, block, at the latent's resolution."""

    cfg: KLVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Source: diffusers' `UNetMidBlock2D`."""
        cfg, width = self.cfg, x.shape[-1]
        x = _res_block(cfg, width, 0)(x)
        if cfg.mid_attention:
            cls: Any = AttentionBlock
            if Remat(cfg.remat) is Remat.block:
                cls = nn.remat(cls, prevent_cse=True)
            x = cls(cfg.norm_groups, cfg.options(), name="attn")(x)
        return _res_block(cfg, width, 1)(x)


def _stage(cls: Callable[..., nn.Module], cfg: KLVAEConfig) -> Any:
    return nn.remat(cls, prevent_cse=True) if Remat(cfg.remat) is Remat.stage else cls


class KLEncoder(nn.Module):
    """Image to the parameters of the latent's distribution: means, then log variances."""

    cfg: KLVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """Source: diffusers' `Encoder` and `quant_conv`; activations in the compute dtype."""
        cfg, options = self.cfg, self.cfg.options()
        x = x.astype(options.dtype.value)
        x = constrain(Conv(cfg.widths[0], options=options, name="conv_in")(x))
        for i in range(len(cfg.widths)):
            x = _stage(DownStage, cfg)(cfg, i, name=f"down_{i}")(x)
        x = _stage(Mid, cfg)(cfg, name="mid")(x)
        x = jax.nn.silu(GroupNorm(cfg.norm_groups, name="norm_out")(x))
        x = constrain(Conv(2 * cfg.latent_channels, options=options, name="conv_out")(x))
        if cfg.quant_conv:
            x = constrain(Linear(2 * cfg.latent_channels, True, options, name="quant")(x))
        return x


class KLDecoder(nn.Module):
    """Latent to image."""

    cfg: KLVAEConfig

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        """Source: diffusers' `post_quant_conv` and `Decoder`; activations in the compute dtype."""
        cfg, options = self.cfg, self.cfg.options()
        x = z.astype(options.dtype.value)
        if cfg.post_quant_conv:
            x = constrain(Linear(cfg.latent_channels, True, options, name="post_quant")(x))
        x = constrain(Conv(cfg.widths[-1], options=options, name="conv_in")(x))
        x = _stage(Mid, cfg)(cfg, name="mid")(x)
        for i in reversed(range(len(cfg.widths))):
            x = _stage(UpStage, cfg)(cfg, i, name=f"up_{i}")(x)
        x = jax.nn.silu(GroupNorm(cfg.norm_groups, name="norm_out")(x))
        return constrain(Conv(cfg.in_channels, options=options, name="conv_out")(x))


class KLVAE(nn.Module):
    """The autoencoder; a sample of the latent is mean + exp(logvar / 2) noise.

    No scaling (SD-VAE's 0.18215 belongs to whoever trains on the latents), no clamp at the output.
    """

    cfg: KLVAEConfig

    def setup(self) -> None:
        """Names the two halves."""
        self.encoder = KLEncoder(self.cfg)
        self.decoder = KLDecoder(self.cfg)

    def moments(
        self, x: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w f"], Float[Array, "b h w f"]]:
        """f32 (mean, log variance clipped to [-30, 20]) of the latent of images in [-1, 1]."""
        check_size(x.shape[1], x.shape[2], self.cfg.factor)
        mean, logvar = jnp.split(self.encoder(x).astype(jnp.float32), 2, -1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def encode(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """The f32 mean, which is also the mode: what evaluation and diffusion use."""
        return self.moments(x)[0]

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        """The f32 reconstruction, near [-1, 1] but not clamped."""
        if z.shape[-1] != self.cfg.latent_channels:
            raise UserError(
                f"the latent has {z.shape[-1]} channels, but this autoencoder has "
                f"{self.cfg.latent_channels}; it may be another's latent"
            )
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """decode(encode(x)): the mean, no sample."""
        return self.decode(self.encode(x))


# ------------------------------------------------------------------------------------- variants


def sd_vae_f8() -> KLVAEConfig:
    """SD-VAE f8 (sd-vae-ft-mse, -ema and the autoencoder of Stable Diffusion 1 and 2): 83.7 M."""
    return KLVAEConfig()


def _deeper(latent_channels: int, more: int) -> KLVAEConfig:
    return KLVAEConfig(latent_channels=latent_channels, widths=(128, 256, 512, 512) + (512,) * more)


def kl_f32c32() -> KLVAEConfig:
    """SD-VAE with stages added down to f32, as the paper's baseline; its widths are unpublished."""
    return _deeper(32, 2)


def kl_f64c128() -> KLVAEConfig:
    """The same at f64."""
    return _deeper(128, 3)


def kl_f128c512() -> KLVAEConfig:
    """The same at f128."""
    return _deeper(512, 4)


VARIANTS: dict[str, Callable[[], KLVAEConfig]] = {
    "sd-vae-f8": sd_vae_f8,
    "kl-f32c32": kl_f32c32,
    "kl-f64c128": kl_f64c128,
    "kl-f128c512": kl_f128c512,
}
