"""DiT: a transformer whose norms are modulated by time and label.  Also the net of SiT.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748); SiT
(arXiv 2401.08740) is the same network without learned variance, trained as a flow.  Rotary
positions, SwiGLU and RMS-normalised queries and keys are options that later work favours
(LightningDiT, arXiv 2501.01423); the defaults are the published DiT.
"""

import enum
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from dcae_jax.models.layers import Dtype
from dcae_jax.models.transformer import (
    MLP,
    Attention,
    BackboneConfig,
    Dense,
    LabelEmbed,
    Layer,
    Options,
    PatchEmbed,
    Remat,
    TimeMLP,
    backbone_problems,
    cast_kernels,
    check_build,
    check_hidden,
    describe_backbone,
    grid_angles,
    grid_sincos,
    layers_between,
    modulate,
    options_of,
    run_layers,
    stacked_params,
    unpatchify,
    with_remat,
)
from dcae_jax.sharding import constrain
from dcae_jax.tree import Tree

EPS = 1e-6

Latent = Float[Array, "b h w c"]
Output = Float[Array, "b h w f"]
Hidden = Float[Array, "b n d"]


class Position(enum.Enum):
    """How a token knows where it is; neither has parameters nor depends on the latent's size."""

    sincos = "sincos"  # the published one: added to the tokens
    rope = "rope"  # queries and keys are turned, by row and column


@dataclass(slots=True, unsafe_hash=True)
class DiTConfig(BackboneConfig):
    """A DiT.  The default is DiT-XL on the 16 x 16 x 32 latent of a 512-px image.

    Latents of another size than `input_size` are taken, too.
    """

    width: int = 1152
    depth: int = 28
    heads: int = 16
    qkv_bias: bool = True
    learn_variance: bool = True  # twice the channels out, [eps | variance]; False: SiT
    position: Position = Position.sincos
    # Where diffusers' port differs from the original; its released files were made for these.
    time_shift: int = 0  # 1: frequencies divided by half - 1, as there
    mlp_norm_eps: float = EPS  # 1e-5 there

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return self.depth

    @property
    def out_factor(self) -> int:
        """Output channels for each input channel."""
        return 2 if self.learn_variance else 1

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = backbone_problems(self) + _position_problems(self)
        if self.time_shift not in (0, 1):
            found.append(f"time_shift = {self.time_shift}; the original has 0, diffusers' port 1")
        if self.adaptive_channels and self.learn_variance:
            found.append(
                "adaptive_channels needs learn_variance=False: the first channels of [eps | "
                "variance] are eps alone"
            )
        return found

    def build(self) -> "DiT":
        """The network, with its own copy of this config; UserError lists all problems."""
        return DiT(check_build(self, "DiT"))

    def describe(self) -> list[str]:
        """Lines for people: tokens, widths, parameters."""
        return describe_backbone(self, "DiT" if self.learn_variance else "SiT", 0)

    def options(self) -> Options:
        """What all blocks share; weights start xavier-uniform, biases at 0."""
        return options_of(self, nn.initializers.xavier_uniform(), tanh_gelu=True)


def _position_problems(cfg: DiTConfig) -> list[str]:
    if cfg.position not in list(Position) and cfg.position not in [p.value for p in Position]:
        return [f"position = {cfg.position!r} is unknown; choose one of sincos, rope"]
    rope = Position(cfg.position) is Position.rope
    if rope and cfg.heads > 0 and cfg.head_dim % 4:
        return [
            f"width / heads = {cfg.head_dim} is not a multiple of 4, which rope needs: half of a "
            "head's pairs turn by row, half by column; use other heads, or sincos"
        ]
    if not rope and cfg.width % 4:
        return [
            f"width = {cfg.width} is not a multiple of 4, which sincos positions need; use "
            f"{cfg.width // 4 * 4 + 4}, or rope"
        ]
    return []


class Block(nn.Module):
    """x + gate attn(modulated norm(x)), then the same with the MLP; starts as the identity."""

    options: Options
    mlp_norm_eps: float = EPS

    @nn.compact
    def __call__(
        self, x: Hidden, c: Float[Array, "b d"], rope: Float[Array, "n e"] | None = None
    ) -> Hidden:
        """Source: `DiTBlock` (adaLN-Zero); c has been through its SiLU."""
        o = self.options
        zeros = nn.initializers.zeros
        chunks = Dense(6 * o.width, zeros, dtype=o.dtype, name="adaln")(c)[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(chunks, 6, axis=-1)
        x = x + gate_a * Attention(o, name="attn")(modulate(x, shift_a, scale_a, EPS), rope)
        return x + gate_m * MLP(o, name="mlp")(modulate(x, shift_m, scale_m, self.mlp_norm_eps))


class DiT(nn.Module):
    """Noisy latent, network time and label -> eps, [eps | variance] or velocity."""

    cfg: DiTConfig

    @nn.compact
    def __call__(
        self, x: Latent, time: Real[Array, "b"], cond: dict[str, Array],
        return_hidden: int | None = None,
    ) -> Output | tuple[Output, Hidden]:  # fmt: skip
        """The f32 output, of the size of x; twice its channels with `learn_variance`.

        time: as the process gives it (DiT 0..999, SiT 0..1).  cond: {"label": int[b]}.
        return_hidden: also the f32 tokens after that layer, from 1.
        """
        cfg, dtype = self.cfg, Dtype(self.cfg.dtype)
        check_hidden(return_hidden, cfg.layers)
        cfg.check_channels(x.shape[-1])
        rows, columns = cfg.grid(*x.shape[1:3])
        embed = PatchEmbed(
            cfg.in_channels, cfg.width, cfg.patch, xavier=True, dtype=dtype, name="patch_embed"
        )
        tokens, rope = self._place(embed(x), rows, columns)
        c = TimeMLP(cfg.width, cfg.time_shift, name="time_embed")(time)
        c = c + LabelEmbed(cfg.num_classes, cfg.width, 0.02, name="label_embed")(cond["label"])
        c = jax.nn.silu(c).astype(dtype.value)
        y, hidden = self._blocks(constrain(tokens), c, rope, return_hidden)
        y = self._head(y, c, cfg.patch**2 * cfg.out_factor * x.shape[-1])
        y = constrain(unpatchify(y, rows, columns, cfg.patch).astype(jnp.float32))
        return y if return_hidden is None else (y, hidden.astype(jnp.float32))

    def _place(
        self, x: Hidden, rows: int, columns: int
    ) -> tuple[Hidden, Float[Array, "n e"] | None]:
        """Tokens with their positions, or the angles that give them."""
        cfg = self.cfg
        if Position(cfg.position) is Position.rope:
            return x, jnp.asarray(grid_angles(rows, columns, cfg.head_dim))
        return x + jnp.asarray(grid_sincos(rows, columns, cfg.width), x.dtype), None

    def _blocks(
        self, x: Hidden, c: Float[Array, "b d"], rope: Float[Array, "n e"] | None, k: int | None
    ) -> tuple[Hidden, Hidden]:
        """(after the last block, after block k or the last)."""
        cfg = self.cfg
        block = Block(cfg.options(), cfg.mlp_norm_eps, parent=None)
        samples = jnp.zeros((1, 1, cfg.width)), jnp.zeros((1, cfg.width))
        params = stacked_params(self, "blocks", block, cfg.depth, *samples)
        params = cast_kernels(params, Dtype(cfg.dtype))
        layer = with_remat(_layer(block, c, rope), Remat(cfg.remat), cfg.scan)
        if k is None or k == cfg.depth:
            x, _ = run_layers(layer, params, x, scan=cfg.scan)
            return x, x
        hidden, _ = run_layers(layer, layers_between(params, 0, k), x, scan=cfg.scan)
        rest = layers_between(params, k, cfg.depth)
        return run_layers(layer, rest, hidden, scan=cfg.scan)[0], hidden

    def _head(self, x: Hidden, c: Float[Array, "b d"], outputs: int) -> Float[Array, "b n C"]:
        """Source: `FinalLayer`; starts at zero."""
        cfg, dtype, zeros = self.cfg, Dtype(self.cfg.dtype), nn.initializers.zeros
        chunks = Dense(2 * cfg.width, zeros, dtype=dtype, name="norm_adaln")(c)[:, None]
        shift, scale = jnp.split(chunks, 2, axis=-1)
        features = cfg.patch**2 * cfg.out_factor * cfg.in_channels
        head = Dense(features, zeros, dtype=dtype, name="head")
        return head(modulate(x, shift, scale, EPS), outputs)


def _layer(block: Block, c: Float[Array, "b d"], rope: Float[Array, "n e"] | None) -> Layer:
    def layer(params: Tree, x: jax.Array, skip: jax.Array | None) -> jax.Array:
        return constrain(block.apply({"params": params}, x, c, rope))

    return layer


# ----------------------------------------------------------------------------------------- sizes


def _sized(depth: int, width: int, heads: int, fields: dict[str, Any]) -> DiTConfig:
    return DiTConfig(**{"depth": depth, "width": width, "heads": heads, **fields})


def dit_s(**fields: Any) -> DiTConfig:
    """DiT-S; SiT-S with learn_variance=False.  `fields` are those of DiTConfig."""
    return _sized(12, 384, 6, fields)


def dit_b(**fields: Any) -> DiTConfig:
    """DiT-B."""
    return _sized(12, 768, 12, fields)


def dit_l(**fields: Any) -> DiTConfig:
    """DiT-L."""
    return _sized(24, 1024, 16, fields)


def dit_xl(**fields: Any) -> DiTConfig:
    """DiT-XL: 674.89 M trainable parameters on f32c32; heads of 72."""
    return _sized(28, 1152, 16, fields)


def sit_s(**fields: Any) -> DiTConfig:
    """SiT-S."""
    return dit_s(**{"learn_variance": False, **fields})


def sit_b(**fields: Any) -> DiTConfig:
    """SiT-B."""
    return dit_b(**{"learn_variance": False, **fields})


def sit_l(**fields: Any) -> DiTConfig:
    """SiT-L."""
    return dit_l(**{"learn_variance": False, **fields})


def sit_xl(**fields: Any) -> DiTConfig:
    """SiT-XL."""
    return dit_xl(**{"learn_variance": False, **fields})
