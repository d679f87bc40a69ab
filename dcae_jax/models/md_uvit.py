"""MD-UViT: a UViT whose middle runs on the visible tokens of a masked latent alone.

With nothing masked it is the plain UViT, bit for bit: same parameters, same computation.  A masked
token is one at infinite noise, which the blocks need not compute.  Blocks run on all tokens where
they are among the first `k_in` or the last `k_out`, on the visible ones in between; [label, time]
are never masked.  Proposed here, after MAE (arXiv 2111.06377), MaskDiT (2306.09305), MaskDM
(2306.11363), MicroDiT (2407.15811) and TREAD (2501.04765), of which it has the parts.
"""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from dcae_jax.masking import Split
from dcae_jax.models import uvit
from dcae_jax.models.transformer import (
    LayerNorm,
    check_build,
    describe_backbone,
    layers_between,
    run_layers,
    unpatchify,
)
from dcae_jax.models.uvit import EXTRA_TOKENS, STDDEV, Hidden, Output, UViT, UViTConfig
from dcae_jax.sharding import constrain
from dcae_jax.tree import Tree

# What a UViT does not have, as regex of parameter paths below the network.
NEW_PARAMS = "recon_head/.*|mask_token|skip_tokens"


class Fill(enum.Enum):
    """What stands in the places of masked tokens where all tokens come together again."""

    mask = "mask"  # one learned token plus the position: nothing of the masked token is known
    carry = "carry"  # the token as it was when the others went on (TREAD): routed, not masked


@dataclass(slots=True, unsafe_hash=True)
class MDUViTConfig(UViTConfig):
    """An MD-UViT.  The default is MD-UViT-S on the 16 x 16 x 32 latent of a 512-px image."""

    k_in: int = 0  # first blocks that see all tokens
    k_out: int = 2  # last blocks that see all tokens
    fill: Fill = Fill.mask
    recon_head: bool = True  # a second head, for the clean latent at masked tokens

    @property
    def blind(self) -> bool:
        """Whether masked slots are filled with what is learned."""
        return Fill(self.fill) is Fill.mask and self.k_out > 0

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = UViTConfig.problems(self)
        if self.final_conv:
            found.append(
                "final_conv mixes tokens, so masked ones would be seen in their neighbours; an "
                "MD-UViT needs final_conv=False"
            )
        half = self.depth // 2
        found += [
            f"{name} = {value}; {half} blocks stand on each side of the middle one: 0 to {half}"
            for name, value in (("k_in", self.k_in), ("k_out", self.k_out))
            if not 0 <= value <= half
        ]
        if self.fill not in list(Fill) and self.fill not in [f.value for f in Fill]:
            found.append(f"fill = {self.fill!r} is unknown; choose mask or carry")
            return found
        return found + _fill_problems(self)

    def build(self) -> "MDUViT":
        """The network, with its own copy of this config; UserError lists all problems."""
        return MDUViT(check_build(self, "MD-UViT"))

    def describe(self) -> list[str]:
        """Lines for people: tokens, widths, parameters, which blocks see what."""
        inner = self.layers - self.k_in - self.k_out
        return [
            *describe_backbone(self, "MD-UViT", EXTRA_TOKENS),
            f"masked tokens: {self.k_in} blocks see all, {inner} the visible ones, {self.k_out} "
            f"all again (fill {Fill(self.fill).value}); "
            f"{'a' if self.recon_head else 'no'} reconstruction head",
        ]


def _fill_problems(cfg: MDUViTConfig) -> list[str]:
    found = []
    if Fill(cfg.fill) is Fill.carry:
        if cfg.k_in != cfg.k_out or cfg.k_in < 1:
            found.append(
                f"fill = carry with k_in = {cfg.k_in} and k_out = {cfg.k_out}: each skip joins a "
                "block before with one behind the route; set both to the same number from 1 on"
            )
        if cfg.recon_head:
            found.append(
                "recon_head with fill = carry has nothing to reconstruct: carried tokens are known "
                "to the network; set recon_head=False"
            )
        return found
    if cfg.k_out and cfg.k_in:
        found.append(
            f"fill = mask with k_out = {cfg.k_out} needs k_in = 0, not {cfg.k_in}: through full "
            "blocks before the mask the visible tokens would know the masked ones"
        )
    if cfg.recon_head and not cfg.k_out:
        found.append(
            "recon_head needs k_out of 1 or more: without a block that sees all tokens there is no "
            "masked token to read; set k_out=2, or recon_head=False"
        )
    return found


class Masked(NamedTuple):
    """What the network says of a masked latent; None where it was not asked."""

    output: Output | None  # eps or velocity; with k_out = 0 it is 0 at masked tokens
    recon: Output | None  # the clean latent, or what else the second head is trained on


class MDUViT(UViT):
    """Noisy latent, network time and label -> eps or velocity; with a split also the latent."""

    cfg: MDUViTConfig

    @nn.compact
    def __call__(
        self, x: Output, time: Real[Array, "b"], cond: dict[str, Array],
        return_hidden: int | None = None, *, split: Split | None = None,
        diffuse: bool = True, reconstruct: bool = True,
    ) -> Output | tuple[Output, Hidden] | Masked:  # fmt: skip
        """Without `split` a plain UViT; with it, Masked: f32, of the shape of x.

        diffuse, reconstruct: which heads are wanted of a masked latent.
        """
        if split is None:
            found = super().__call__(x, time, cond, return_hidden)
            if self.is_initializing():  # after what a UViT has, so that those draws are the same
                self._fresh(x.shape[-1])
            return found
        grid = self._grid(x)
        tokens = constrain(self._embed(x, time, cond))
        y = self._blocks(tokens, None)[0] if split.whole else self._masked(tokens, split)
        y = LayerNorm(name="norm")(y[:, EXTRA_TOKENS:])

        def read(name: str) -> Output:
            found = self._head(name, y, x.shape[-1])
            if not (split.whole or self.cfg.k_out):
                found = split.put(found, jnp.zeros((1, found.shape[-1])))
            return constrain(unpatchify(found, *grid, self.cfg.patch).astype(jnp.float32))

        reconstruct = reconstruct and self.cfg.recon_head
        return Masked(
            read("head") if diffuse else None, read("recon_head") if reconstruct else None
        )

    def _fresh(self, channels: int) -> None:
        """Declares the parameters that a UViT does not have."""
        if self.cfg.recon_head:
            self._head("recon_head", jnp.zeros((1, 1, self.cfg.width)), channels)
        if self.cfg.blind:
            self._mask_token()
            self._skip_tokens()

    def _mask_token(self) -> Float[Array, " d"]:
        init = nn.initializers.normal(STDDEV)
        return self.param("mask_token", init, (self.cfg.width,), jnp.float32)

    def _skip_tokens(self) -> Float[Array, "k d"]:
        """For the skip of each of the last blocks, in their order."""
        shape = (self.cfg.k_out, self.cfg.width)
        return self.param("skip_tokens", nn.initializers.zeros, shape, jnp.float32)

    def _masked(self, x: Hidden, split: Split) -> Float[Array, "b k d"]:
        """After the last block: all tokens, or with k_out = 0 the visible ones."""
        cfg, (layer, alone, into, middle, out) = self.cfg, self._stacks()
        half = cfg.depth // 2
        edge = half - max(cfg.k_in, cfg.k_out)

        def run(params: Tree, start: int, stop: int, x: Hidden, skips: Any) -> tuple[Hidden, Any]:
            if start == stop:
                return x, skips
            some, keep = layers_between(params, start, stop), skips is None
            return run_layers(layer, some, x, skips, scan=cfg.scan, keep=keep)

        x, outer = run(into, 0, cfg.k_in, x, None)
        y, inner = run(into, cfg.k_in, half, _drop(split, x), None)
        y = alone(middle, y, None)
        inner, outer = (None if s is None else s[::-1] for s in (inner, outer))
        y, _ = run(out, 0, edge, y, None if inner is None else inner[:edge])
        if edge == half:
            return y
        if not cfg.k_out:
            drop = functools.partial(_drop, split)
            return run(out, edge, half, y, _each(drop, outer))[0]
        if Fill(cfg.fill) is Fill.carry:
            y = _restore(split, y, x[:, EXTRA_TOKENS:])
            return run(out, edge, half, y, outer)[0]
        positions = self.get_variable("params", "pos_embed")[EXTRA_TOKENS:]
        y = _restore(split, y, self._mask_token() + positions)
        restore = functools.partial(_restore, split)
        skips = _each(restore, inner[edge:], self._skip_tokens()[:, None])
        return run(out, edge, half, y, skips)[0]


def _drop(split: Split, x: Hidden) -> Float[Array, "b k d"]:
    """[label, time] and the visible tokens."""
    return constrain(
        jnp.concatenate([x[:, :EXTRA_TOKENS], split.take(x[:, EXTRA_TOKENS:])], axis=1)
    )


def _restore(
    split: Split, x: Float[Array, "b k d"], fill: Float[Array, "*#c #m d"]
) -> Hidden:  # fmt: skip
    """All tokens again, `fill` at the masked ones."""
    tokens = split.put(x[:, EXTRA_TOKENS:], fill)
    return constrain(jnp.concatenate([x[:, :EXTRA_TOKENS], tokens], axis=1))


def _each(change: Callable[..., Array], skips: Any, *more: Array) -> Any:
    """`change` of each kept result: one array under scan and a list otherwise."""
    if isinstance(skips, list):
        return [change(skip, *(m[i] for m in more)) for i, skip in enumerate(skips)]
    return jax.vmap(change)(skips, *more)


# ----------------------------------------------------------------------------------------- sizes


def _sized(plain: UViTConfig, fields: dict[str, Any]) -> MDUViTConfig:
    size = {"depth": plain.depth, "width": plain.width, "heads": plain.heads}
    return MDUViTConfig(**{**size, **fields})


def md_uvit_s(**fields: Any) -> MDUViTConfig:
    """MD-UViT-S.  `fields` are those of MDUViTConfig."""
    return _sized(uvit.uvit_s(), fields)


def md_uvit_h(**fields: Any) -> MDUViTConfig:
    """MD-UViT-H."""
    return _sized(uvit.uvit_h(), fields)


def md_uvit_2b(**fields: Any) -> MDUViTConfig:
    """MD-UViT-2B."""
    return _sized(uvit.uvit_2b(), fields)
