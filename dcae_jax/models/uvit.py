"""UViT: a vision transformer with long skips, label and time as tokens.  Also the net of USiT.

Source: Bao et al., "All are Worth Words" (arXiv 2209.12152), in the version of DC-AE (arXiv
2410.10733).  USiT (DC-AE 1.5, arXiv 2508.00413) is the same network trained as a flow.

Tokens are [label, time, patches], row after row.  Layers are numbered from 1: depth / 2 blocks
whose results are kept, one in the middle, depth / 2 blocks that each join one of those, last first.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from dcae_jax.errors import UserError
from dcae_jax.models.layers import BlockOptions, Conv, Dtype
from dcae_jax.models.transformer import (
    MLP,
    Attention,
    BackboneConfig,
    Dense,
    LabelEmbed,
    Layer,
    LayerNorm,
    Options,
    PatchEmbed,
    Remat,
    backbone_problems,
    block_params,
    cast_kernels,
    check_build,
    check_hidden,
    describe_backbone,
    layers_between,
    options_of,
    run_layers,
    sinusoid,
    stacked_params,
    unpatchify,
    with_remat,
)
from dcae_jax.sharding import constrain
from dcae_jax.tree import Tree

EXTRA_TOKENS = 2
STDDEV = 0.02

Output = Float[Array, "b h w c"]
Hidden = Float[Array, "b n d"]


@dataclass(slots=True, unsafe_hash=True)
class UViTConfig(BackboneConfig):
    """A UViT.  The default is UViT-S on the 16 x 16 x 32 latent of a 512-px image.

    `input_size` is part of the network: its position embedding is learned.
    """

    depth: int = 12  # even; there is one block more, in the middle
    final_conv: bool = False  # a 3x3 convolution at the end, as in U-ViT's models for small images

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return self.depth + 1

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = backbone_problems(self)
        if self.depth % 2:
            found.append(
                f"depth = {self.depth} is odd; blocks come in pairs joined by a skip, beside the "
                f"middle one: use {self.depth - 1} or {self.depth + 1}"
            )
        if self.final_conv and self.adaptive_channels:
            found.append("adaptive_channels needs final_conv=False: its channels are mixed")
        return found

    def build(self) -> "UViT":
        """The network, with its own copy of this config; UserError lists all problems."""
        return UViT(check_build(self, "UViT"))

    def describe(self) -> list[str]:
        """Lines for people: tokens, widths, parameters."""
        return describe_backbone(self, "UViT", EXTRA_TOKENS)

    def options(self) -> Options:
        """What all blocks share; weights start from N(0, 0.02), biases at 0."""
        return options_of(self, nn.initializers.normal(STDDEV), tanh_gelu=False)


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); with a skip, [x | skip] is first mixed to x."""

    options: Options

    @nn.compact
    def __call__(self, x: Hidden, skip: Hidden | None = None) -> Hidden:
        """Activations in `dtype`."""
        o = self.options
        if skip is not None:
            both = jnp.concatenate([x, skip], axis=-1)
            x = Dense(o.width, o.kernel_init, dtype=o.dtype, name="skip")(both)
        x = x + Attention(o, name="attn")(LayerNorm(name="norm1")(x))
        return x + MLP(o, name="mlp")(LayerNorm(name="norm2")(x))


class Stacks(NamedTuple):
    """The blocks of a UViT."""

    layer: Layer  # one of a stack
    alone: Layer  # the one in the middle
    into: Tree  # stacked parameters
    middle: Tree
    out: Tree


class UViT(nn.Module):
    """Noisy latent, network time and label -> eps or velocity."""

    cfg: UViTConfig

    @nn.compact
    def __call__(
        self, x: Output, time: Real[Array, "b"], cond: dict[str, Array],
        return_hidden: int | None = None,
    ) -> Output | tuple[Output, Hidden]:  # fmt: skip
        """The f32 output, of the shape of x.

        time: as the process gives it (UViT 1..1000, USiT 0..1).  cond: {"label": int[b]}.
        return_hidden: also the f32 patch tokens after that layer, from 1.
        """
        cfg, dtype = self.cfg, Dtype(self.cfg.dtype)
        check_hidden(return_hidden, cfg.layers)
        grid = self._grid(x)
        tokens = constrain(self._embed(x, time, cond))
        y, hidden = self._blocks(tokens, return_hidden)
        y = LayerNorm(name="norm")(y[:, EXTRA_TOKENS:])
        y = unpatchify(self._head("head", y, x.shape[-1]), *grid, cfg.patch)
        if cfg.final_conv:
            options = BlockOptions(dtype=dtype, conv_dtype=dtype)
            y = Conv(cfg.in_channels, options=options, name="final_conv")(y)
        y = constrain(y.astype(jnp.float32))
        if return_hidden is None:
            return y
        return y, hidden[:, EXTRA_TOKENS:].astype(jnp.float32)

    def _grid(self, x: Output) -> tuple[int, int]:
        if x.shape[1:3] != tuple(self.cfg.input_size):
            raise UserError(
                f"the latent is {x.shape[1]} x {x.shape[2]} and this UViT was built for "
                f"{self.cfg.input_size[0]} x {self.cfg.input_size[1]}: its position embedding is "
                "learned; set input_size, or use latents of that size"
            )
        self.cfg.check_channels(x.shape[-1])
        return self.cfg.grid(*x.shape[1:3])

    def _embed(self, x: Output, time: Real[Array, "b"], cond: dict[str, Array]) -> Hidden:
        """[label, time, patches] + positions, in `dtype`."""
        cfg, dtype = self.cfg, Dtype(self.cfg.dtype)
        embed = PatchEmbed(cfg.in_channels, cfg.width, cfg.patch, dtype=dtype, name="patch_embed")
        label = LabelEmbed(cfg.num_classes, cfg.width, 1.0, name="label_embed")(cond["label"])
        first = jnp.stack([label, sinusoid(time, cfg.width)], axis=1).astype(dtype.value)
        tokens = jnp.concatenate([first, embed(x)], axis=1)
        init = nn.initializers.normal(STDDEV)
        positions = self.param("pos_embed", init, tokens.shape[1:], jnp.float32)
        return tokens + positions.astype(dtype.value)

    def _head(self, name: str, y: Hidden, channels: int) -> Float[Array, "b n p"]:
        """The last layer, for the first `channels` of a latent; in `dtype`."""
        cfg = self.cfg
        init, dtype = nn.initializers.normal(STDDEV), Dtype(cfg.dtype)
        head = Dense(cfg.patch**2 * cfg.in_channels, init, dtype=dtype, name=name)
        return head(y, cfg.patch**2 * channels)

    def _stacks(self) -> Stacks:
        """Declares the blocks."""
        cfg = self.cfg
        half = cfg.depth // 2
        block = Block(cfg.options(), parent=None)
        sample = jnp.zeros((1, 1, cfg.width))
        into, middle = self._first_half(block, sample)
        out = stacked_params(self, "out_blocks", block, half, sample, sample)
        into, out = (cast_kernels(p, Dtype(cfg.dtype)) for p in (into, out))
        return Stacks(*self._layers(block), into, middle, out)

    def _first_half(self, block: Block, sample: Hidden) -> tuple[Tree, Tree]:
        """Declares the blocks up to the middle one: (stacked, in the middle)."""
        into = stacked_params(self, "in_blocks", block, self.cfg.depth // 2, sample)
        return into, block_params(self, "mid_block", block, sample)

    def _layers(self, block: Block) -> tuple[Layer, Layer]:
        """(one of a stack, the one in the middle)."""
        cfg = self.cfg
        return (
            with_remat(_layer(block), Remat(cfg.remat), cfg.scan),
            with_remat(_layer(block), Remat(cfg.remat), scan=False),
        )

    def _blocks(self, x: Hidden, return_hidden: int | None) -> tuple[Hidden, Hidden]:
        """(after the last block, after block `return_hidden` or anything)."""
        cfg = self.cfg
        half = cfg.depth // 2
        layer, alone, into, middle, out = self._stacks()
        x, skips = run_layers(layer, into, x, scan=cfg.scan, keep=True)
        x = hidden = alone(middle, x, None)
        skips = skips[::-1]
        if return_hidden is None or return_hidden == half + 1:
            return run_layers(layer, out, x, skips, scan=cfg.scan)[0], hidden
        if return_hidden <= half:
            hidden = skips[half - return_hidden]
            return run_layers(layer, out, x, skips, scan=cfg.scan)[0], hidden
        k = return_hidden - half - 1
        upto, rest = layers_between(out, 0, k), layers_between(out, k, half)
        hidden, _ = run_layers(layer, upto, x, skips[:k], scan=cfg.scan)
        return run_layers(layer, rest, hidden, skips[k:], scan=cfg.scan)[0], hidden


class UViTEncoder(UViT):
    """A UViT up to its middle block, which has half of its parameters; for features."""

    @nn.compact
    def __call__(self, x: Output, time: Real[Array, "b"], cond: dict[str, Array]) -> Hidden:
        """The f32 patch tokens after the middle block: a UViT's hidden ones of that layer."""
        cfg = self.cfg
        self._grid(x)
        tokens = constrain(self._embed(x, time, cond))
        block = Block(cfg.options(), parent=None)
        into, middle = self._first_half(block, jnp.zeros((1, 1, cfg.width)))
        layer, alone = self._layers(block)
        y, _ = run_layers(layer, cast_kernels(into, Dtype(cfg.dtype)), tokens, scan=cfg.scan)
        return alone(middle, y, None)[:, EXTRA_TOKENS:].astype(jnp.float32)


def _layer(block: Block) -> Layer:
    def layer(params: Tree, x: jax.Array, skip: jax.Array | None) -> jax.Array:
        return constrain(block.apply({"params": params}, x, skip))

    return layer


# ----------------------------------------------------------------------------------------- sizes


def _sized(depth: int, width: int, heads: int, fields: dict[str, Any]) -> UViTConfig:
    return UViTConfig(**{"depth": depth, "width": width, "heads": heads, **fields})


def uvit_s(**fields: Any) -> UViTConfig:
    """UViT-S: 44.79 M parameters on f32c32.  `fields` are those of UViTConfig."""
    return _sized(12, 512, 8, fields)


def uvit_m(**fields: Any) -> UViTConfig:
    """UViT-M of the U-ViT paper."""
    return _sized(16, 768, 12, fields)


def uvit_l(**fields: Any) -> UViTConfig:
    """UViT-L of the U-ViT paper."""
    return _sized(20, 1024, 16, fields)


def uvit_h(**fields: Any) -> UViTConfig:
    """UViT-H and USiT-H: 500.87 M parameters on f32c32; heads of 72."""
    return _sized(28, 1152, 16, fields)


def uvit_2b(**fields: Any) -> UViTConfig:
    """UViT-2B and USiT-2B: 1580.40 M parameters on f32c32."""
    return _sized(28, 2048, 32, fields)


def uvit_3b(**fields: Any) -> UViTConfig:
    """USiT-3B of DC-AE 1.5: 3107.73 M parameters on f32c32."""
    return _sized(56, 2048, 32, fields)
