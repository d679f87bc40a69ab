"""LMD and the pixel MAE: an encoder that sees visible tokens alone, a small decoder of all tokens.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), and LMD
(arXiv 2312.07971), which is the same network on the latents of an autoencoder.  Which tokens are
visible, and how the loss is taken, is not the network's matter: see tasks/mask_latents.py.

Initialisation as published: every kernel xavier-uniform (the fused qkv as the one map that it is,
a patch convolution as a matrix), biases 0, the class and the mask token N(0, 0.02), positions fixed
sines and cosines.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dcae_jax.errors import UserError
from dcae_jax.masking import Split
from dcae_jax.models.layers import Dtype
from dcae_jax.models.transformer import (
    MLP,
    Attention,
    AttentionKernel,
    BackboneConfig,
    Dense,
    Layer,
    LayerNorm,
    Options,
    PatchEmbed,
    Remat,
    backbone_problems,
    cast_kernels,
    check_build,
    check_hidden,
    count,
    grid_sincos,
    layers_between,
    options_of,
    run_layers,
    stacked_params,
    with_remat,
)
from dcae_jax.sharding import constrain
from dcae_jax.tree import Tree

EXTRA_TOKENS = 1  # the class token
STDDEV = 0.02
NORM_EPS = 1e-6

Image = Float[Array, "b h w c"]
Hidden = Float[Array, "b m d"]  # the class token and visible tokens

XAVIER = nn.initializers.xavier_uniform()


@dataclass(slots=True, unsafe_hash=True)
class LMDConfig:
    """A masked autoencoder.  The default is LMD-B on the 28 x 28 x 4 latent of a 224-px image."""

    in_channels: int = 4  # of the latent; 3 for pixels
    input_size: tuple[int, int] = (28, 28)  # height and width of the latent, or the image
    patch: int = 4  # latent pixels a side of one token
    width: int = 768  # of the encoder, as depth and heads
    depth: int = 12
    heads: int = 12
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_pos_sign: int = 1  # -1: the decoder's positions are subtracted, as LMD's code does
    mlp_ratio: float = 4.0
    norm_eps: float = NORM_EPS  # of every LayerNorm; 1e-12 in transformers' configs
    dtype: Dtype = Dtype.bfloat16  # of activations
    attention: AttentionKernel = AttentionKernel.auto
    scan: bool = True  # one compiled layer in a loop; False: unrolled, slower to compile
    remat: Remat = Remat.none

    def encoder(self) -> BackboneConfig:
        """The encoder's trunk in the terms that all transformers share."""
        return self._trunk(self.width, self.depth, self.heads)

    def decoder(self) -> BackboneConfig:
        """The decoder's trunk, likewise."""
        return self._trunk(self.decoder_width, self.decoder_depth, self.decoder_heads)

    def _trunk(self, width: int, depth: int, heads: int) -> BackboneConfig:
        return BackboneConfig(
            in_channels=self.in_channels, input_size=self.input_size, patch=self.patch,
            width=width, depth=depth, heads=heads, mlp_ratio=self.mlp_ratio, qkv_bias=True,
            dtype=self.dtype, attention=self.attention, scan=self.scan, remat=self.remat,
        )  # fmt: skip

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        shared = backbone_problems(self.encoder())
        found = [*shared]
        found += [f"decoder: {p}" for p in backbone_problems(self.decoder()) if p not in shared]
        for name, width in (("width", self.width), ("decoder_width", self.decoder_width)):
            if width > 0 and width % 4:
                found.append(
                    f"{name} = {width} is not divisible by 4: positions are sines and cosines of "
                    f"row and column; nearest: {width // 4 * 4 + 4}"
                )
        if not 0 <= self.norm_eps < 1:
            found.append(f"norm_eps = {self.norm_eps}; what is added to a variance, such as 1e-6")
        if self.decoder_pos_sign not in (-1, 1):
            found.append(
                f"decoder_pos_sign = {self.decoder_pos_sign}; 1 adds the decoder's positions, -1 "
                "subtracts them, as LMD's code does"
            )
        return found

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens; UserError if the latent does not fit."""
        return self.encoder().grid(height, width)

    @property
    def tokens(self) -> int:
        """How many tokens there are, beside the class token."""
        rows, columns = self.grid(*self.input_size)
        return rows * columns

    @property
    def token_size(self) -> int:
        """Numbers of one token."""
        return self.patch**2 * self.in_channels

    def build(self) -> "LMD":
        """The network, with its own copy of this config; UserError lists all problems."""
        return LMD(check_build(self, "LMD"))

    def describe(self) -> list[str]:
        """Lines for people: tokens, widths, parameters."""
        params = abstract_variables(self)["params"]
        height, width = self.input_size
        how = "scanned" if self.scan else "unrolled"
        sides = {"encoder": self.encoder(), "decoder": self.decoder()}
        return [
            f"masked autoencoder: {height} x {width} x {self.in_channels} -> {self.tokens} + "
            f"{EXTRA_TOKENS} tokens of {self.token_size} numbers, layers {how}, remat "
            f"{Remat(self.remat).value}, {count(params):,} parameters",
            *[
                f"  {name}: {side.depth} blocks of width {side.width}, {side.heads} heads of "
                f"{side.head_dim}, MLP {side.mlp_hidden}, {count(params[name]):,} parameters"
                for name, side in sides.items()
            ],
        ]


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    options: Options
    eps: float = NORM_EPS

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """Activations in `dtype`."""
        x = x + Attention(self.options, name="attn")(LayerNorm(self.eps, name="norm1")(x))
        return x + MLP(self.options, name="mlp")(LayerNorm(self.eps, name="norm2")(x))


class _Trunk(nn.Module):
    """Equal blocks and a norm at the end; the base of both halves, who name the parameters."""

    cfg: LMDConfig

    def _declare(self, side: BackboneConfig) -> tuple[Layer, Tree]:
        """(one layer, the parameters of all of them)."""
        options = options_of(side, XAVIER, tanh_gelu=False)
        block = Block(options, self.cfg.norm_eps, parent=None)
        params = stacked_params(self, "blocks", block, side.depth, jnp.zeros((1, 1, side.width)))

        def layer(params: Tree, x: Array, skip: Array | None) -> Array:
            return constrain(block.apply({"params": params}, x))

        rematted = with_remat(layer, Remat(side.remat), side.scan)
        return rematted, cast_kernels(params, Dtype(side.dtype))

    def _positions(self, width: int) -> Float[Array, "n d"]:
        return jnp.asarray(grid_sincos(*self.cfg.grid(*self.cfg.input_size), width))


class Encoder(_Trunk):
    """Patches and positions, then blocks on the class token and the visible tokens alone."""

    @nn.compact
    def __call__(self, x: Image, split: Split, layer: int | None = None) -> Hidden:
        """[class token, visible tokens in the order of `split`], in `dtype`.

        layer: after that layer, from 1, without the final norm; None: after the norm.
        """
        cfg = self.cfg
        dtype, width = Dtype(cfg.dtype), cfg.width
        embed = PatchEmbed(
            cfg.in_channels, width, cfg.patch, xavier=True, dtype=dtype, name="patch_embed"
        )
        tokens = split.take(embed(x) + self._positions(width).astype(dtype.value))
        token = self.param("cls", nn.initializers.normal(STDDEV), (width,), jnp.float32)
        first = jnp.broadcast_to(token.astype(dtype.value), (x.shape[0], 1, width))
        tokens = constrain(jnp.concatenate([first, tokens], axis=1))
        step, params = self._declare(cfg.encoder())
        norm = LayerNorm(cfg.norm_eps, name="norm")
        if layer is not None:
            upto = layers_between(params, 0, layer)
            return run_layers(step, upto, tokens, scan=cfg.scan)[0]
        return norm(run_layers(step, params, tokens, scan=cfg.scan)[0])


class Decoder(_Trunk):
    """Mask tokens in the places of what was dropped, then blocks on all tokens."""

    @nn.compact
    def __call__(self, encoded: Hidden, split: Split) -> Float[Array, "b n p"]:
        """What each token is thought to be, in f32 and the order of the latent."""
        cfg = self.cfg
        dtype, width = Dtype(cfg.dtype), cfg.decoder_width
        y = Dense(width, XAVIER, dtype=dtype, name="embed")(encoded)
        mask = self.param("mask_token", nn.initializers.normal(STDDEV), (width,), jnp.float32)
        tokens = split.put(y[:, EXTRA_TOKENS:], mask[None])
        positions = (cfg.decoder_pos_sign * self._positions(width)).astype(dtype.value)
        tokens = constrain(jnp.concatenate([y[:, :EXTRA_TOKENS], tokens + positions], axis=1))
        step, params = self._declare(cfg.decoder())
        tokens, _ = run_layers(step, params, tokens, scan=cfg.scan)
        tokens = LayerNorm(cfg.norm_eps, name="norm")(tokens)
        out = Dense(cfg.token_size, XAVIER, dtype=dtype, name="head")(tokens)
        return constrain(out[:, EXTRA_TOKENS:].astype(jnp.float32))


class LMD(nn.Module):
    """Latent (or image) of which some tokens are visible -> every token of it."""

    cfg: LMDConfig

    def setup(self) -> None:
        """Both halves."""
        self.encoder, self.decoder = Encoder(self.cfg), Decoder(self.cfg)

    def __call__(self, x: Image, split: Split) -> Float[Array, "b n p"]:
        """f32 tokens, ordered as `transformer.patchify` orders them; all, visible ones too."""
        return self.decode(self.encode(x, split), split)

    def encode(self, x: Image, split: Split) -> Hidden:
        """[class token, visible tokens] after the encoder's final norm, in `dtype`."""
        self._check(x)
        return self.encoder(x, split)

    def decode(self, encoded: Hidden, split: Split) -> Float[Array, "b n p"]:
        """What the decoder makes of the encoder's tokens."""
        return self.decoder(encoded, split)

    def features(self, x: Image, layer: int | None = None) -> Hidden:
        """f32 [class token, tokens] of the encoder where nothing is masked.

        layer: after that layer, from 1; None: after the final norm.
        """
        self._check(x)
        check_hidden(layer, self.cfg.depth)
        return self.encoder(x, whole(self.cfg, x.shape[0]), layer).astype(jnp.float32)

    def _check(self, x: Image) -> None:
        wanted = (*self.cfg.input_size, self.cfg.in_channels)
        if x.shape[1:] != wanted:
            raise UserError(
                f"the input is {' x '.join(map(str, x.shape[1:]))} and this network was built for "
                f"{' x '.join(map(str, wanted))}; set input_size and in_channels, or use latents "
                "of that shape"
            )


def whole(cfg: LMDConfig, batch: int) -> Split:
    """Every token visible, in its place."""
    order = jnp.broadcast_to(jnp.arange(cfg.tokens), (batch, cfg.tokens))
    return Split(order, order, cfg.tokens)


def init_variables(cfg: LMDConfig, key: PRNGKeyArray) -> Tree:
    """{"params": fp32}; traceable.  Equal for scan and unrolled."""
    x = jnp.zeros((1, *cfg.input_size, cfg.in_channels))
    return cfg.build().init(key, x, whole(cfg, 1))


def abstract_variables(cfg: LMDConfig) -> Tree:
    """The shapes of `init_variables`, without memory or time."""
    return jax.eval_shape(lambda: init_variables(cfg, jax.random.key(0)))


# ----------------------------------------------------------------------------------------- sizes


def _sized(width: int, depth: int, heads: int, fields: dict[str, Any]) -> LMDConfig:
    return LMDConfig(**{"width": width, "depth": depth, "heads": heads, **fields})


def _pixels(patch: int, fields: dict[str, Any]) -> dict[str, Any]:
    return {"in_channels": 3, "input_size": (224, 224), "patch": patch, **fields}


def lmd_b(**fields: Any) -> LMDConfig:
    """LMD-B: 110.75 M parameters.  `fields` are those of LMDConfig."""
    return _sized(768, 12, 12, fields)


def lmd_l(**fields: Any) -> LMDConfig:
    """LMD-L: 328.16 M parameters."""
    return _sized(1024, 24, 16, fields)


def lmd_h(**fields: Any) -> LMDConfig:
    """LMD-H: 655.67 M parameters; heads of 80."""
    return _sized(1280, 32, 16, fields)


def mae_b(**fields: Any) -> LMDConfig:
    """MAE on 224-px images, ViT-B/16."""
    return lmd_b(**_pixels(16, fields))


def mae_l(**fields: Any) -> LMDConfig:
    """MAE on 224-px images, ViT-L/16."""
    return lmd_l(**_pixels(16, fields))


def mae_h(**fields: Any) -> LMDConfig:
    """MAE on 224-px images, ViT-H/14."""
    return lmd_h(**_pixels(14, fields))
