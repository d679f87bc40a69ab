"""config.json of masked autoencoders, and what keys and shapes alone tell of one.

Source: the fields of transformers' ViTMAEConfig with the defaults that an absent field has there.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from dcae_jax.config import JSONValue
from dcae_jax.convert import mae_names
from dcae_jax.convert.layouts import MASKED, NUMBER, TEXT, WHOLE, Fields, FieldType
from dcae_jax.convert.names import Layout, Shape
from dcae_jax.errors import UserError
from dcae_jax.models import lmd
from dcae_jax.models.lmd import EXTRA_TOKENS, LMDConfig
from dcae_jax.models.transformer import BackboneConfig

EPS = 1e-12  # transformers' default, which its published MAE configs have
ORIGINAL_EPS = lmd.NORM_EPS  # of MAE's own code, with which the published weights were trained
CLASSES = {Layout.vit_mae: "ViTMAEForPreTraining", Layout.vit_mae_encoder: "ViTMAEModel"}
_SIZES = (lmd.mae_b, lmd.mae_l, lmd.mae_h)
_SIDE = FieldType(
    "a whole number, or two equal ones",
    lambda v: WHOLE.fits(v) or (isinstance(v, list) and len(v) == 2 and all(map(WHOLE.fits, v))),
)
_BIT = FieldType("true or false", lambda v: type(v) in (bool, int) and v in (0, 1))


class Described(NamedTuple):
    """What a source says of itself."""

    cfg: LMDConfig
    mask_ratio: float | None = None
    norm_target: bool | None = None  # None: nothing says it


def is_ours(fields: Mapping[str, JSONValue]) -> bool:
    """Whether a config.json speaks of a masked autoencoder."""
    return "model_type" in fields and fields["model_type"] == MASKED


def read(fields: dict[str, JSONValue], where: str) -> Described:
    """The network of a config.json; UserError names what has no counterpart here."""
    told = Fields(fields, where)
    told.expect("hidden_act", "gelu")
    told.expect("qkv_bias", True)
    side = _square(told, "image_size", 224)
    width = told.get("hidden_size", WHOLE, 768)
    hidden = told.get("intermediate_size", WHOLE, 3072)
    cfg = LMDConfig(
        in_channels=told.get("num_channels", WHOLE, 3), input_size=(side, side),
        patch=_square(told, "patch_size", 16), width=width,
        depth=told.get("num_hidden_layers", WHOLE, 12),
        heads=told.get("num_attention_heads", WHOLE, 12),
        decoder_width=told.get("decoder_hidden_size", WHOLE, 512),
        decoder_depth=told.get("decoder_num_hidden_layers", WHOLE, 8),
        decoder_heads=told.get("decoder_num_attention_heads", WHOLE, 16),
        mlp_ratio=hidden / max(width, 1), norm_eps=float(told.get("layer_norm_eps", NUMBER, EPS)),
    )  # fmt: skip
    decoder = told.get("decoder_intermediate_size", WHOLE, 2048)
    if decoder * width != hidden * cfg.decoder_width:
        why = f"the MLPs of both halves are widened alike, the encoder's {cfg.mlp_ratio:g} times"
        raise told.refuse("decoder_intermediate_size", decoder, why)
    ratio = float(told.get("mask_ratio", NUMBER, 0.75))
    if not 0 < ratio < 1:
        raise told.refuse("mask_ratio", ratio, "a share of the tokens is masked")
    return Described(cfg, ratio, bool(told.get("norm_pix_loss", _BIT, False)))


def _square(told: Fields, name: str, default: int) -> int:
    value = told.get(name, _SIDE, default)
    both = value if isinstance(value, list) else [value, value]
    if both[0] != both[1]:
        raise told.refuse(name, value, "that code's positions and targets are of squares")
    return both[0]


def check_class(fields: Mapping[str, JSONValue], where: str) -> None:
    """UserError if a config.json is that of another class of this model type."""
    named = fields["architectures"] if "architectures" in fields else None
    known = tuple(CLASSES.values())
    if isinstance(named, list) and named and named[0] not in known:
        name = named[0] if TEXT.fits(named[0]) else repr(named[0])
        raise UserError(f"{where} describes {name}; known are {' and '.join(known)}")


# -------------------------------------------------------------------------------- what shapes say


def measured(
    layout: Layout, found: Mapping[str, Shape], heads: int | None, decoder_heads: int | None,
    source: str,
) -> LMDConfig:  # fmt: skip
    """The network with such tensors; UserError says what they leave open."""
    entries = mae_names.table(LMDConfig(depth=1, decoder_depth=1), layout)
    keys = {e.path.removeprefix("params/"): e.keys[0] for e in entries}
    positions = mae_names.positions(layout)
    telling = {keys["encoder/patch_embed/kernel"]: 4, keys["encoder/blocks/mlp/fc1/kernel"]: 2}
    telling |= {positions["encoder"]: 3}
    if whole := "decoder" in positions:
        telling |= {keys["decoder/embed/kernel"]: 2, keys["decoder/blocks/mlp/fc1/kernel"]: 2}
    if missing := [key for key in telling if key not in found]:
        raise UserError(f"{source} is not whole: it has no {', '.join(missing)}")
    for key, rank in telling.items():
        if len(found[key]) != rank or 0 in found[key]:
            raise UserError(f"{source}: {key} has shape {tuple(found[key])}, expected {rank} sizes")
    width, channels, patch, _ = found[keys["encoder/patch_embed/kernel"]]
    hidden = keys["encoder/blocks/mlp/fc1/kernel"]
    cfg = LMDConfig(
        in_channels=channels, patch=patch, width=width, depth=_count(found, hidden),
        input_size=(_side(found, positions["encoder"], patch),) * 2,
        mlp_ratio=found[hidden][0] / width, norm_eps=EPS if layout in CLASSES else ORIGINAL_EPS,
    )  # fmt: skip
    cfg.heads = heads or _known_heads(cfg.encoder(), "--heads", source)
    if whole:
        cfg.decoder_width = found[keys["decoder/embed/kernel"]][0]
        cfg.decoder_depth = _count(found, keys["decoder/blocks/mlp/fc1/kernel"])
        cfg.decoder_heads = decoder_heads or _known_heads(cfg.decoder(), "--decoder-heads", source)
    return cfg


def _known_heads(trunk: BackboneConfig, option: str, source: str) -> int:
    """Of the published half of this depth and width; UserError if there is none."""
    for make in _SIZES:
        for known in (make().encoder(), make().decoder()):
            if (known.depth, known.width) == (trunk.depth, trunk.width):
                return known.heads
    raise UserError(
        f"{source} has {trunk.depth} blocks of width {trunk.width}, which is no published size, "
        f"and tensors do not tell how many heads their attention has; give {option} N (published "
        "are 12 for 768, 16 for 1024 and 1280, and 16 for decoders of 512), or the folder with "
        "config.json"
    )


def _count(found: Mapping[str, Shape], first: str) -> int:
    """How many blocks there are; `first`: a tensor of block 0."""
    before, after = first.split(".0.", 1)
    depth = 0
    while f"{before}.{depth}.{after}" in found:
        depth += 1
    return depth


def _side(found: Mapping[str, Shape], key: str, patch: int) -> int:
    tokens = found[key][1] - EXTRA_TOKENS
    side = math.isqrt(max(tokens, 0))
    if side * side != tokens or not side:
        raise UserError(
            f"{key} has {tokens} positions beside that of the class token, which is no square; "
            "known are networks of square images"
        )
    return side * patch


# -------------------------------------------------------------------------------------- writing


def problems(cfg: LMDConfig) -> list[str]:
    """Why a network cannot be written in transformers' layout."""
    found = []
    if cfg.input_size[0] != cfg.input_size[1]:
        found.append(f"input_size = {tuple(cfg.input_size)}: it knows squares")
    return found


def write(described: Described, layout: Layout) -> dict[str, JSONValue]:
    """The config.json of a network that the layout can express; of the encoder, its decoder too."""
    cfg = described.cfg
    return {
        "architectures": [CLASSES[layout]], "model_type": MASKED,
        "image_size": cfg.input_size[0], "patch_size": cfg.patch, "num_channels": cfg.in_channels,
        "hidden_size": cfg.width, "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads, "intermediate_size": cfg.encoder().mlp_hidden,
        "decoder_hidden_size": cfg.decoder_width, "decoder_num_hidden_layers": cfg.decoder_depth,
        "decoder_num_attention_heads": cfg.decoder_heads,
        "decoder_intermediate_size": cfg.decoder().mlp_hidden,
        "hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": cfg.norm_eps,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": lmd.STDDEV, "mask_ratio": described.mask_ratio,
        "norm_pix_loss": described.norm_target,
    }  # fmt: skip
