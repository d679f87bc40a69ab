"""DC-AE: the deep compression autoencoder, its released variants, and narrow versions of them.

Source: Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models"
(arXiv 2410.10733), and DC-AE 1.5 (arXiv 2508.00413); the official code for what the papers omit.
Stage s works at 1 / 2^s of the resolution.  Stage 0 may be empty: then the stem and the tail
change the resolution themselves, and numbering still starts at 0.
"""

import copy
import enum
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dcae_jax.errors import UserError
from dcae_jax.models.base import AutoencoderConfig
from dcae_jax.models.layers import (
    ACTIVATIONS,
    Act,
    BatchNormMode,
    BlockOptions,
    Conv,
    Depthwise,
    Down,
    Downsample,
    Dtype,
    EViTBlock,
    Norm,
    PrefixConv,
    ResBlock,
    RMSNorm,
    Up,
    Upsample,
    average_channels,
    duplicate_channels,
)
from dcae_jax.sharding import constrain


class BlockKind(enum.Enum):
    """What a stage is made of."""

    res = "res"  # ResBlock
    evit = "evit"  # EfficientViT block
    evit5 = "evit5"  # the same with the 5x5 scale of q, k, v


class Remat(enum.Enum):
    """What is recomputed in the backward pass; the numbers and the stored tree do not change."""

    none = "none"
    stage = "stage"  # keeps the input of each stage
    block = "block"  # keeps the input of each block


SCALES: dict[BlockKind, tuple[int, ...]] = {BlockKind.evit: (), BlockKind.evit5: (5,)}


class Stage(NamedTuple):
    """One stage, with its enums made sure of."""

    index: int
    width: int
    depth: int
    block: BlockKind
    norm: Norm
    act: Act
    remat: Remat


@dataclass(slots=True, unsafe_hash=True)
class StagesConfig:
    """The stages of an encoder or decoder, stage 0 (full resolution) first; one entry a stage."""

    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    depths: tuple[int, ...] = (0, 4, 8, 2, 2, 2)  # blocks; only stage 0 may have none
    blocks: tuple[BlockKind, ...] = (BlockKind.res,) * 3 + (BlockKind.evit,) * 3
    norms: tuple[Norm, ...] = (Norm.rms,) * 6  # batch: to continue released weights
    acts: tuple[Act, ...] = (Act.silu,) * 6  # of the ResBlocks
    remat: tuple[Remat, ...] = ()  # per stage; (): the model's `remat` for all

    def first(self) -> int:
        """The index of the first stage that has blocks: 0 or 1."""
        return 0 if self.depths[0] else 1


@dataclass(slots=True, unsafe_hash=True)
class DCAEConfig:
    """A DC-AE.  The default is dc-ae-f32c32 as trained from scratch here: RMS norms throughout.

    Initialisation is PyTorch's default (see models/layers.py), as in the released code.
    """

    in_channels: int = 3
    latent_channels: int = 32
    encoder: StagesConfig = field(default_factory=StagesConfig)
    decoder: StagesConfig = field(
        default_factory=lambda: StagesConfig(
            depths=(0, 5, 10, 2, 2, 2), acts=(Act.relu,) * 3 + (Act.silu,) * 3
        )
    )
    downsample: Downsample = Downsample.conv_unshuffle
    upsample: Upsample = Upsample.conv_shuffle
    out_act: Act = Act.relu  # before the last convolution
    latent_shortcuts: bool = True  # at the encoder's output and the decoder's input
    adaptive_channels: bool = False  # DC-AE 1.5: works with the first channels of the latent alone
    residual: bool = True  # False: no averaging or duplicating shortcut anywhere (for ablations)
    head_dim: int = 32  # of the attention, and the pixels up to which it is quadratic
    last_norm_scale_init: float = 1.0  # of residual branches; released: 1, from scratch: 0.1
    batch_norm: BatchNormMode = BatchNormMode.frozen_stats
    # With update: the stages that do ("decoder/stage_1"), the others stay frozen; None: all.
    # A task sets those that it trains.
    batch_norm_stages: tuple[str, ...] | None = None
    dtype: Dtype = Dtype.bfloat16  # of activations
    conv_dtype: Dtype | None = None  # of k x k convolutions; None: `dtype`
    depthwise: Depthwise = Depthwise.auto
    remat: Remat = Remat.none  # of stages that do not say otherwise

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, in each direction; sizes must be multiples of it."""
        return 2 ** (len(self.encoder.widths) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of one image; UserError if the image does not fit."""
        check_size(height, width, self.factor)
        return height // self.factor, width // self.factor, self.latent_channels

    def gaussian(self) -> bool:
        """Never: the latent is deterministic."""
        return False

    def couples_examples(self) -> bool:
        """Whether BatchNorms use and move batch statistics."""
        return self.batch_norm is BatchNormMode.update

    def latent_layers(self) -> str:
        """The encoder's last stage and output, the decoder's input and first stage."""
        last = len(self.encoder.widths) - 1
        return rf"(encoder/(stage_{last}|conv_out)|decoder/(conv_in|stage_{last}))"

    def head_layers(self) -> str:
        """The decoder's stage of the highest resolution and its output."""
        return rf"decoder/(stage_{self.decoder.first()}|norm_out|conv_out)"

    def heights(self, resolution: int) -> dict[str, int]:
        """Height of the activations of each stage, by its name."""
        sizes = [resolution >> i for i in range(len(self.encoder.widths))]
        return {f"stage_{i} ({size} px)": size for i, size in enumerate(sizes)}

    def resolve(self, trainable: str) -> None:
        """With batch_norm=update: only the stages that train may move their statistics."""
        if self.couples_examples():
            self.batch_norm_stages = tuple(
                f"{side}/stage_{i}"
                for side in ("encoder", "decoder")
                for i in range(len(self.encoder.widths))
                if re.fullmatch(trainable, f"ae/{side}/stage_{i}/block_0/norm/scale")
            )

    def options(self, stage: str = "") -> BlockOptions:
        """What all blocks share, with the BatchNorm mode of `stage`."""
        dtype = Dtype(self.dtype)
        batch_norm = BatchNormMode(self.batch_norm)
        if self.batch_norm_stages is not None and stage not in self.batch_norm_stages:
            batch_norm = BatchNormMode.frozen_stats
        return BlockOptions(
            dtype=dtype,
            conv_dtype=dtype if self.conv_dtype is None else Dtype(self.conv_dtype),
            depthwise=Depthwise(self.depthwise),
            head_dim=self.head_dim,
            residual=self.residual,
            batch_norm=batch_norm,
            last_norm_scale_init=self.last_norm_scale_init,
        )

    def stages(self, side: StagesConfig) -> list[Stage]:
        """The non-empty stages of one side, highest resolution first."""
        remat = side.remat or (self.remat,) * len(side.widths)
        rows = zip(side.widths, side.depths, side.blocks, side.norms, side.acts, remat, strict=True)
        return [
            Stage(i, w, d, BlockKind(b), Norm(n), Act(a), Remat(r))
            for i, (w, d, b, n, a, r) in enumerate(rows)
            if d
        ]

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        sides = {"encoder": self.encoder, "decoder": self.decoder}
        found = [p for name, side in sides.items() for p in _stage_problems(name, side)]
        found += _scalar_problems(self)
        if found:  # the checks below need well-formed stages
            return found
        if len(self.encoder.widths) != len(self.decoder.widths):
            found.append(
                f"encoder.widths has {len(self.encoder.widths)} stages and decoder.widths "
                f"{len(self.decoder.widths)}; both need as many, or sizes would not return"
            )
        for name, side in sides.items():
            found += _width_problems(self, name, side)
            if self.residual:
                found += _shortcut_problems(self, name, side)
        return found

    def build(self) -> "DCAE":
        """The network, with its own copy of this config; UserError lists all problems."""
        if found := self.problems():
            lines = "\n".join(f"  - {p}" for p in found)
            raise UserError(f"this autoencoder cannot be built:\n{lines}")
        return DCAE(copy.deepcopy(self))

    def describe(self, resolution: int) -> list[str]:
        """One line per part: resolution, width, blocks, parameters; at `resolution` pixels."""
        shapes = abstract_variables(self)["params"]
        height, _, channels = self.latent_shape(resolution, resolution)
        lines = [
            f"f{self.factor}c{self.latent_channels}: {resolution} x {resolution} x "
            f"{self.in_channels} -> {height} x {height} x {channels} = {height**2} latent pixels, "
            f"{_count(shapes):,} parameters"
        ]
        for name, side in (("encoder", self.encoder), ("decoder", self.decoder)):
            lines += _describe_side(name, self.stages(side), shapes[name], resolution)
        return lines


# ------------------------------------------------------------------------------------- problems


def _enum_problems(name: str, side: StagesConfig) -> list[str]:
    found = []
    kinds = {"blocks": BlockKind, "norms": Norm, "acts": Act, "remat": Remat}
    values = {"blocks": side.blocks, "norms": side.norms, "acts": side.acts, "remat": side.remat}
    for part, kind in kinds.items():
        known = [member.value for member in kind]
        for value in values[part]:
            if value not in known and value not in list(kind):
                found.append(f"{name}.{part} has {value!r}; it knows {', '.join(known)}")
    return found


def _stage_problems(name: str, side: StagesConfig) -> list[str]:
    """Problems of one side alone: lengths, names, signs."""
    found = _enum_problems(name, side)
    n = len(side.widths)
    lengths = {
        "depths": len(side.depths), "blocks": len(side.blocks),
        "norms": len(side.norms), "acts": len(side.acts), "remat": len(side.remat) or n,
    }  # fmt: skip
    found += [
        f"{name}.{part} has {length} entries and {name}.widths {n}; give one per stage"
        for part, length in lengths.items()
        if length != n
    ]
    if n < 2:
        found.append(f"{name}.widths has {n} stage(s); an autoencoder needs at least 2")
    found += [f"{name}.widths has {w}; widths are positive" for w in side.widths if w < 1]
    found += [
        f"{name}.depths has {d} at stage {i}; only stage 0 may be empty, later ones need 1 or more"
        for i, d in enumerate(side.depths)
        if d < (1 if i else 0)
    ]
    return found


def _scalar_problems(cfg: DCAEConfig) -> list[str]:
    sizes = {
        "in_channels": cfg.in_channels, "latent_channels": cfg.latent_channels,
        "head_dim": cfg.head_dim,
    }  # fmt: skip
    found = [f"{k} = {v}; the smallest is 1" for k, v in sizes.items() if v < 1]
    scale = cfg.last_norm_scale_init
    if not (math.isfinite(scale) and scale >= 0):
        found.append(f"last_norm_scale_init = {scale}; use 1 (released) or 0.1 (from scratch)")
    if cfg.adaptive_channels and cfg.latent_shortcuts:
        found.append(
            "adaptive_channels needs latent_shortcuts=False: the shortcuts spread each latent "
            "channel over a fixed share of the width, so that a prefix would mean something else"
        )
    return found


def nearest(value: int, unit: int) -> str:
    """The positive multiples of `unit` beside `value`, for messages."""
    low = value // unit * unit
    return f"{low} or {low + unit}" if low else f"{unit}"


def _width_problems(cfg: DCAEConfig, name: str, side: StagesConfig) -> list[str]:
    """Widths that the attention heads or the pixel shuffles cannot divide."""
    found = [
        f"{name}.widths[{s.index}] = {s.width} is not a multiple of head_dim = {cfg.head_dim}, "
        f"which its EfficientViT blocks need; nearest: {nearest(s.width, cfg.head_dim)}"
        for s in cfg.stages(side)
        if s.block in SCALES and s.width % cfg.head_dim
    ]
    if side is cfg.encoder and Downsample(cfg.downsample) is Downsample.conv_unshuffle:
        found += [
            f"{name}.widths[{i}] = {w} is not a multiple of 4, which conv_unshuffle needs; "
            f"nearest: {nearest(w, 4)}"
            for i, w in enumerate(side.widths)
            if i > 0 and w % 4
        ]
    return found


def _shortcut_problems(cfg: DCAEConfig, name: str, side: StagesConfig) -> list[str]:
    """Channel ratios that averaging or duplicating cannot do."""
    found = []
    widths = list(enumerate(side.widths))[side.first() :]
    for (i, upper), (j, lower) in itertools.pairwise(widths):
        if 4 * upper % lower:  # both directions pass 4 * upper channels in groups of equal size
            found.append(
                f"{name}.widths[{i}] = {upper}, widths[{j}] = {lower}: the shortcut needs 4 x "
                f"{upper} to be a multiple of {lower}; use equal or doubled widths, or "
                "residual=False"
            )
    if cfg.latent_shortcuts and side.widths[-1] % cfg.latent_channels:
        found.append(
            f"{name}.widths[-1] = {side.widths[-1]} is not a multiple of latent_channels = "
            f"{cfg.latent_channels}, which its shortcut needs; nearest: "
            f"{nearest(side.widths[-1], cfg.latent_channels)}, or latent_shortcuts=False"
        )
    return found


def check_size(height: int, width: int, factor: int) -> None:
    """UserError unless both sides are positive multiples of the spatial factor."""
    for name, size in (("height", height), ("width", width)):
        if size < factor or size % factor:
            raise UserError(
                f"the image's {name} {size} is not a multiple of this autoencoder's factor "
                f"{factor}; crop or pad it to {nearest(size, factor)}"
            )


# -------------------------------------------------------------------------------------- network


def _make_block(stage: Stage, index: int, options: BlockOptions) -> nn.Module:
    """Block `index` of a stage, named; prevent_cse stays on, for this is not inside a scan."""
    res = stage.block is BlockKind.res
    cls: Any = ResBlock if res else EViTBlock
    if stage.remat is Remat.block:
        cls = nn.remat(cls, prevent_cse=True)
    kind = stage.act if res else SCALES[stage.block]
    return cls(stage.norm, kind, options, name=f"block_{index}")


class EncoderStage(nn.Module):
    """The blocks of a stage, then the way down to the next one's width."""

    stage: Stage
    down_to: int | None  # None in the last stage
    kind: Downsample
    options: BlockOptions

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """Activations in the compute dtype."""
        for i in range(self.stage.depth):
            x = constrain(_make_block(self.stage, i, self.options)(x))
        if self.down_to is not None:
            x = constrain(Down(self.down_to, self.kind, options=self.options, name="down")(x))
        return x


class DecoderStage(nn.Module):
    """The way up from the stage below, then the blocks of a stage."""

    stage: Stage
    has_up: bool  # False in the last stage
    kind: Upsample
    options: BlockOptions

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        """Activations in the compute dtype."""
        if self.has_up:
            up = Up(self.stage.width, self.kind, options=self.options, name="up")
            x = constrain(up(x))
        for i in range(self.stage.depth):
            x = constrain(_make_block(self.stage, i, self.options)(x))
        return x


def _stage_class(cls: type[nn.Module], remat: Remat) -> Any:
    return nn.remat(cls, prevent_cse=True) if remat is Remat.stage else cls


class Encoder(nn.Module):
    """Image to latent."""

    cfg: DCAEConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b H W c"], latent_channels: int | None = None
    ) -> Float[Array, "b h w f"]:
        """Source: `Encoder` of the official code; activations in the compute dtype."""
        cfg, options = self.cfg, self.cfg.options()
        stages, widths = cfg.stages(cfg.encoder), cfg.encoder.widths
        kind = Downsample(cfg.downsample)
        x = x.astype(options.dtype.value)
        if cfg.encoder.first() == 0:
            stem = Conv(widths[0], options=options, name="conv_in")
        else:
            stem = Down(widths[1], kind, shortcut=False, options=options, name="conv_in")
        x = constrain(stem(x))
        for s in stages:
            down_to = widths[s.index + 1] if s.index + 1 < len(widths) else None
            cls = _stage_class(EncoderStage, s.remat)
            name = f"stage_{s.index}"
            x = cls(s, down_to, kind, cfg.options(f"encoder/{name}"), name=name)(x)
        conv = PrefixConv(widths[-1], cfg.latent_channels, options, name="conv_out")
        z = conv(x, latent_channels)
        if cfg.latent_shortcuts and cfg.residual:
            z = z + average_channels(x, cfg.latent_channels)
        return constrain(z)


class Decoder(nn.Module):
    """Latent to image."""

    cfg: DCAEConfig

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        """Source: `Decoder` of the official code; activations in the compute dtype."""
        cfg, options = self.cfg, self.cfg.options()
        stages, widths = cfg.stages(cfg.decoder), cfg.decoder.widths
        kind = Upsample(cfg.upsample)
        z = z.astype(options.dtype.value)
        x = PrefixConv(cfg.latent_channels, widths[-1], options, name="conv_in")(z)
        if cfg.latent_shortcuts and cfg.residual:
            x = x + duplicate_channels(z, widths[-1])
        x = constrain(x)
        for s in reversed(stages):
            cls = _stage_class(DecoderStage, s.remat)
            has_up = s.index + 1 < len(widths)
            name = f"stage_{s.index}"
            x = cls(s, has_up, kind, cfg.options(f"decoder/{name}"), name=name)(x)
        x = ACTIVATIONS[Act(cfg.out_act)](RMSNorm(name="norm_out")(x))
        if cfg.decoder.first() == 0:
            tail = Conv(cfg.in_channels, options=options, name="conv_out")
        else:
            tail = Up(cfg.in_channels, kind, shortcut=False, options=options, name="conv_out")
        return constrain(tail(x))


class DCAE(nn.Module):
    """The autoencoder: deterministic, no bottleneck, no scaling, no clamp at the output."""

    cfg: DCAEConfig

    def setup(self) -> None:
        """Names the two halves."""
        self.encoder = Encoder(self.cfg)
        self.decoder = Decoder(self.cfg)

    def moments(self, x: Float[Array, "b H W c"]) -> tuple[Float[Array, "b h w f"], None]:
        """(latent, None): there is no variance."""
        return self.encode(x), None

    def encode(
        self, x: Float[Array, "b H W c"], latent_channels: int | None = None
    ) -> Float[Array, "b h w f"]:
        """The f32 latent of images in [-1, 1].

        latent_channels: only the first so many (models with `adaptive_channels`).
        """
        check_size(x.shape[1], x.shape[2], self.cfg.factor)
        self._check_channels(latent_channels)
        return self.encoder(x, latent_channels).astype(jnp.float32)

    def decode(
        self, z: Float[Array, "b h w c"], latent_channels: int | None = None
    ) -> Float[Array, "b H W f"]:
        """The f32 reconstruction, near [-1, 1] but not clamped.

        A latent with fewer channels is decoded by them (models with `adaptive_channels`), as is
        one that `latent_channels` cuts to its first so many.
        """
        self._check_channels(latent_channels)
        z = z[..., :latent_channels]
        self._check_channels(z.shape[-1])
        return self.decoder(z).astype(jnp.float32)

    def __call__(
        self, x: Float[Array, "b H W c"], latent_channels: int | None = None
    ) -> Float[Array, "b H W c"]:
        """decode(encode(x))."""
        return self.decode(self.encode(x, latent_channels))

    def _check_channels(self, channels: int | None) -> None:
        whole = self.cfg.latent_channels
        if channels in (None, whole):
            return
        if not self.cfg.adaptive_channels:
            raise UserError(
                f"asked for {channels} latent channels, but this autoencoder has {whole} and was "
                "not trained for prefixes; use all, or a model with adaptive_channels=True"
            )
        if not 0 < channels < whole:
            raise UserError(f"latent_channels = {channels}; choose one of 1..{whole}")


def init_variables(cfg: AutoencoderConfig, key: PRNGKeyArray) -> dict[str, Any]:
    """{"params": fp32, "batch_stats": if there are BatchNorms} of any autoencoder; traceable."""
    image = jnp.zeros((1, cfg.factor, cfg.factor, cfg.in_channels))
    return cfg.build().init(key, image)


def abstract_variables(cfg: AutoencoderConfig) -> dict[str, Any]:
    """The shapes of `init_variables`, without memory or time."""
    return jax.eval_shape(lambda: init_variables(cfg, jax.random.key(0)))


# ------------------------------------------------------------------------------------- describe


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _describe_side(name: str, stages: list[Stage], shapes: Any, resolution: int) -> list[str]:
    lines = []
    for s in stages:
        size = resolution >> s.index
        kind = s.block.value + ("" if s.remat is Remat.none else f", remat {s.remat.value}")
        params = _count(shapes[f"stage_{s.index}"])
        lines.append(
            f"  {name}/stage_{s.index}: {size:>4} px, width {s.width:>4}, {s.depth:>2} x {kind}, "
            f"{params:,} parameters"
        )
    rest = {k: _count(v) for k, v in shapes.items() if not k.startswith("stage_")}
    lines += [f"  {name}/{k}: {v:,} parameters" for k, v in rest.items()]
    return lines


# ------------------------------------------------------------------------------------- variants

W6 = (128, 256, 512, 512, 1024, 1024)


def _side(
    widths: tuple[int, ...], depths: Sequence[int], evit_from: int, kind: BlockKind,
    norms: tuple[Norm, ...] | None = None, acts: tuple[Act, ...] | None = None,
) -> StagesConfig:  # fmt: skip
    """ResBlocks up to stage `evit_from`, `kind` from there on; RMS norms and SiLU by default."""
    n = len(widths)
    return StagesConfig(
        widths=widths,
        depths=tuple(depths),
        blocks=tuple(kind if i >= evit_from else BlockKind.res for i in range(n)),
        norms=norms or (Norm.rms,) * n,
        acts=acts or (Act.silu,) * n,
    )


def _dc_ae_1_0(latent_channels: int, more: tuple[int, ...]) -> DCAEConfig:
    """The `in` / `mix` family: BatchNorm and ReLU in the decoder's ResBlock stages."""
    widths = W6 + more
    n, twos = len(widths), (2,) * (len(widths) - 3)
    return DCAEConfig(
        latent_channels=latent_channels,
        encoder=_side(widths, (0, 4, 8, *twos), 3, BlockKind.evit),
        decoder=_side(
            widths, (0, 5, 10, *twos), 3, BlockKind.evit,
            norms=(Norm.batch,) * 3 + (Norm.rms,) * (n - 3),
            acts=(Act.relu,) * 3 + (Act.silu,) * (n - 3),
        ),
    )  # fmt: skip


def dc_ae_f32c32_in() -> DCAEConfig:
    """dc-ae-f32c32-in-1.0 and -mix-1.0: 323 M parameters."""
    return _dc_ae_1_0(32, ())


def dc_ae_f64c128_in() -> DCAEConfig:
    """dc-ae-f64c128-in-1.0 and -mix-1.0: 677 M parameters."""
    return _dc_ae_1_0(128, (2048,))


def dc_ae_f128c512_in() -> DCAEConfig:
    """dc-ae-f128c512-in-1.0 and -mix-1.0: 1121 M parameters."""
    return _dc_ae_1_0(512, (2048, 2048))


def dc_ae_f32c32_sana() -> DCAEConfig:
    """dc-ae-f32c32-sana-1.0 and -1.1: strided and interpolated resolution changes, 312 M."""
    return DCAEConfig(
        encoder=_side(W6, (2, 2, 2, 3, 3, 3), 3, BlockKind.evit5),
        decoder=_side(W6, (3,) * 6, 3, BlockKind.evit5),
        downsample=Downsample.conv,
        upsample=Upsample.interpolate_conv,
    )


def dc_ae_lite_f32c32_sana() -> DCAEConfig:
    """dc-ae-lite-f32c32-sana-1.1: sana's encoder, a decoder of ResBlocks only, 421 M."""
    cfg = dc_ae_f32c32_sana()
    cfg.decoder = _side(W6, (0, 3, 5, 4, 4, 4), 6, BlockKind.res)
    cfg.upsample = Upsample.conv_shuffle
    cfg.out_act = Act.silu
    return cfg


def _res_only(widths: tuple[int, ...], adaptive: bool) -> DCAEConfig:
    depths = (0, 5, 10) + (4,) * (len(widths) - 3)
    return DCAEConfig(
        latent_channels=128,
        encoder=_side(widths, depths, len(widths), BlockKind.res),
        decoder=_side(widths, depths, len(widths), BlockKind.res),
        out_act=Act.silu,
        latent_shortcuts=False,
        adaptive_channels=adaptive,
    )


def dc_ae_f32c128_1_1() -> DCAEConfig:
    """dc-ae-f32c128-1.1: ResBlocks only, no shortcut at the latent, 524 M parameters."""
    return _res_only(W6, adaptive=False)


def dc_ae_f32c128_1_5() -> DCAEConfig:
    """dc-ae-1.5-f32c128: as 1.1, decodable from the first channels of its latent."""
    return _res_only(W6, adaptive=True)


def dc_ae_f64c128_1_5() -> DCAEConfig:
    """dc-ae-1.5-f64c128: 715 M parameters."""
    return _res_only((*W6, 1024), adaptive=True)


VARIANTS: dict[str, Callable[[], DCAEConfig]] = {
    "dc-ae-f32c32-in-1.0": dc_ae_f32c32_in,
    "dc-ae-f32c32-in-1.0-256px": dc_ae_f32c32_in,
    "dc-ae-f32c32-mix-1.0": dc_ae_f32c32_in,
    "dc-ae-f64c128-in-1.0": dc_ae_f64c128_in,
    "dc-ae-f64c128-mix-1.0": dc_ae_f64c128_in,
    "dc-ae-f128c512-in-1.0": dc_ae_f128c512_in,
    "dc-ae-f128c512-mix-1.0": dc_ae_f128c512_in,
    "dc-ae-f32c32-sana-1.0": dc_ae_f32c32_sana,
    "dc-ae-f32c32-sana-1.1": dc_ae_f32c32_sana,
    "dc-ae-lite-f32c32-sana-1.1": dc_ae_lite_f32c32_sana,
    "dc-ae-f32c128-1.1": dc_ae_f32c128_1_1,
    "dc-ae-1.5-f32c128": dc_ae_f32c128_1_5,
    "dc-ae-1.5-f64c128": dc_ae_f64c128_1_5,
}


def from_scratch(cfg: DCAEConfig) -> DCAEConfig:
    """The same network prepared for training from random weights: RMS norms, last scales 0.1.

    With scales of 1 a fresh DC-AE oscillates; BatchNorm couples the examples of a batch.
    """
    cfg = copy.deepcopy(cfg)
    cfg.decoder.norms = (Norm.rms,) * len(cfg.decoder.widths)
    cfg.last_norm_scale_init = 0.1
    return cfg


def _fit(values: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    return (values + values[-1:] * n)[:n]


def narrow(
    cfg: DCAEConfig, *, divisor: int = 1, widths: Sequence[int] | None = None,
    encoder_depths: Sequence[int] | None = None, decoder_depths: Sequence[int] | None = None,
    latent_channels: int | None = None,
) -> DCAEConfig:  # fmt: skip
    """A smaller version of a variant: other widths (or all divided), depths, latent channels.

    Fewer or more widths than the variant's drop its last stages or repeat its last one.
    """
    cfg = copy.deepcopy(cfg)
    for side, depths in ((cfg.encoder, encoder_depths), (cfg.decoder, decoder_depths)):
        new = tuple(w // divisor for w in (widths or side.widths))
        side.depths = _fit(tuple(depths or side.depths), len(new))
        side.blocks, side.norms, side.acts = (
            _fit(old, len(new)) for old in (side.blocks, side.norms, side.acts)
        )
        side.remat = ()
        side.widths = new
    cfg.latent_channels = latent_channels or cfg.latent_channels
    return cfg
