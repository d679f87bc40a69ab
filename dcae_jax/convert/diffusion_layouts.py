"""config.json of denoising networks, and what keys and shapes alone tell of one.

Source: the fields of diffusers' DiTTransformer2DModel (Transformer2DModel in older files) with the
defaults that an absent field has there; the official repositories' {"model_name": ...}.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from dcae_jax import config as config_lib
from dcae_jax.config import JSONValue
from dcae_jax.convert import diffusion_names, releases
from dcae_jax.convert.diffusion_names import DiffusionModel
from dcae_jax.convert.layouts import (
    CUSTOM,
    FLAG,
    NUMBER,
    OWN_WEIGHTS,
    TEXT,
    WHOLE,
    Fields,
    or_null,
    own_config,
)
from dcae_jax.convert.layouts import DIFFUSION as CLASSES
from dcae_jax.convert.names import Layout, Shape
from dcae_jax.convert.releases import Choice, Family
from dcae_jax.errors import UserError
from dcae_jax.models.dit import EPS, DiTConfig, Position
from dcae_jax.models.transformer import MLPKind
from dcae_jax.models.uvit import EXTRA_TOKENS, UViTConfig

FAMILY = "_dcae_jax_family"  # a field that diffusers skips


class Described(NamedTuple):
    """What a source says of itself; what it leaves open is None."""

    cfg: DiffusionModel
    family: Family
    release: str | None = None
    autoencoder: str | None = None  # for `autoencoder.load`, or the name of a release
    scaling_factor: float | None = None


# ----------------------------------------------------------------------------- what a config says


def is_ours(fields: Mapping[str, JSONValue]) -> bool:
    """Whether a config.json speaks of a denoising network."""
    if "model_name" in fields:
        custom = fields["model_name"] == CUSTOM and "family" in fields
        return custom or releases.diffusion_named(str(fields["model_name"])) is not None
    name = fields["_class_name"] if "_class_name" in fields else None
    ada = "norm_type" in fields and fields["norm_type"] == "ada_norm_zero"
    return name == CLASSES[0] or (name in CLASSES and ada)


def read(fields: dict[str, JSONValue], where: str, choice: Choice | None) -> Described:
    """The network of a config.json; UserError names what has no counterpart or is open."""
    told = Fields(fields, where)
    if not told.has("model_name"):
        return _read_diffusers(told, choice)
    name, factor = told.get("model_name", TEXT, ""), told.factor(None)
    autoencoder = told.get("autoencoder", or_null(TEXT), None)
    if name == CUSTOM:
        cfg = own_config(told, (UViTConfig, DiTConfig), "a denoising network")
        families = {family.value: family for family in Family}
        family = told.choose("family", told.get("family", TEXT, ""), families)
        return Described(cfg, family, None, autoencoder, factor)
    found = released(releases.require_diffusion(name))
    if told.get(OWN_WEIGHTS, FLAG, False):
        return Described(found.cfg, found.family, None, autoencoder, factor)
    return found if factor is None else found._replace(scaling_factor=factor)


def released(name: str) -> Described:
    """What the name of a release tells."""
    what = releases.DIFFUSION[name]
    return Described(what.config(), what.family, name, what.autoencoder, what.scaling_factor)


_DIT_FIELDS = {
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers",
    "dropout", "norm_num_groups", "attention_bias", "sample_size", "patch_size", "activation_fn",
    "num_embeds_ada_norm", "upcast_attention", "norm_type", "norm_elementwise_affine", "norm_eps",
    # of Transformer2DModel, without a meaning for this kind of network
    "cross_attention_dim", "num_vector_embeds", "only_cross_attention", "use_linear_projection",
    "double_self_attention", "attention_type", "caption_channels", "interpolation_scale",
    "use_additional_conditions",
}  # fmt: skip


def _read_diffusers(fields: Fields, choice: Choice | None) -> Described:
    fields.check_names(_DIT_FIELDS)
    fields.expect("norm_type", "ada_norm_zero")
    fields.expect("norm_elementwise_affine", False)
    fields.expect("activation_fn", "gelu-approximate")
    channels = fields.get("in_channels", WHOLE, 4)
    heads = fields.get("num_attention_heads", WHOLE, 16)
    outputs = fields.get("out_channels", or_null(WHOLE), None) or channels
    if outputs not in (channels, 2 * channels):
        raise fields.refuse("out_channels", outputs, f"it is {channels}, or twice that")
    size = fields.get("sample_size", WHOLE, 32)
    head_dim, depth = (
        fields.get("attention_head_dim", WHOLE, 72),
        fields.get("num_layers", WHOLE, 28),
    )
    cfg = DiTConfig(
        in_channels=channels, input_size=(size, size), patch=fields.get("patch_size", WHOLE, 2),
        width=heads * head_dim, depth=depth, heads=heads,
        num_classes=fields.get("num_embeds_ada_norm", WHOLE, 1000),
        qkv_bias=fields.get("attention_bias", FLAG, True), learn_variance=outputs != channels,
        time_shift=1, mlp_norm_eps=fields.get("norm_eps", NUMBER, 1e-5),
    )  # fmt: skip
    said = fields.get(FAMILY, or_null(TEXT), None)
    if said is None and cfg.learn_variance:
        said = Family.dit.value
    if said is None and choice is None:
        raise UserError(
            f"{fields.where}: out_channels = {outputs} leaves open on which process this "
            "network was trained; say --variant sit if it is a flow"
        )
    if said is None:
        return Described(cfg, choice.family)
    return Described(cfg, fields.choose(FAMILY, said, {family.value: family for family in Family}))


# -------------------------------------------------------------------------------- what shapes say


def measured(layout: Layout, found: Mapping[str, Shape], heads: int) -> DiffusionModel:
    """The network with such tensors; UserError if its latents' size cannot be told."""
    return (_uvit if layout in (Layout.u_vit, Layout.official) else _dit)(layout, found, heads)


def families(layout: Layout, found: Mapping[str, Shape]) -> list[Family]:
    """Those whose weights these may be."""
    if layout is Layout.u_vit:
        return [Family.uvit]
    if layout is Layout.official:
        return [Family.uvit, Family.usit]
    patch, outputs = found["x_embedder.proj.weight"], found["final_layer.linear.weight"][0]
    twice = outputs == 2 * math.prod(patch[1:])
    return [Family.dit, Family.sit] if twice else [Family.sit]


def known_heads(layout: Layout, found: Mapping[str, Shape]) -> int | None:
    """The head count of the known size of this depth and width."""
    every = releases.SIZES[Family.dit if layout is Layout.dit else Family.uvit]
    depth, width = size_of(layout, found)
    fits = [
        cfg.heads
        for make in every.values()
        if (cfg := make()).width == width and cfg.depth == depth
    ]
    return fits[0] if fits else None


def size_of(layout: Layout, found: Mapping[str, Shape]) -> tuple[int, int]:
    """(depth, width)."""
    if layout is Layout.dit:
        return _count(found, "blocks"), found["x_embedder.proj.weight"][0]
    return 2 * _count(found, "in_blocks"), found["patch_embed.proj.weight"][0]


def _count(found: Mapping[str, Shape], stack: str) -> int:
    numbers = [key.split(".")[1] for key in found if key.startswith(f"{stack}.")]
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)


def _uvit(layout: Layout, found: Mapping[str, Shape], heads: int) -> UViTConfig:
    depth, width = size_of(layout, found)
    _, channels, patch, _ = found["patch_embed.proj.weight"]
    label = "label_emb.weight" if layout is Layout.u_vit else "label_emb.embedding_table.weight"
    side = _side(found["pos_embed"][1] - EXTRA_TOKENS, patch)
    return UViTConfig(
        in_channels=channels, input_size=(side, side), patch=patch, width=width, depth=depth,
        heads=heads, mlp_ratio=found["mid_block.mlp.fc1.weight"][0] / width,
        num_classes=found[label][0] - 1, qkv_bias="mid_block.attn.qkv.bias" in found,
        final_conv="final_layer.weight" in found,
    )  # fmt: skip


def _dit(layout: Layout, found: Mapping[str, Shape], heads: int) -> DiTConfig:
    depth, width = size_of(layout, found)
    _, channels, patch, _ = found["x_embedder.proj.weight"]
    side = _side(found["pos_embed"][1], patch)
    return DiTConfig(
        in_channels=channels, input_size=(side, side), patch=patch, width=width, depth=depth,
        heads=heads, mlp_ratio=found["blocks.0.mlp.fc1.weight"][0] / width,
        num_classes=found["y_embedder.embedding_table.weight"][0] - 1,
        learn_variance=Family.dit in families(layout, found),
    )  # fmt: skip


def _side(tokens: int, patch: int) -> int:
    side = math.isqrt(max(tokens, 0))
    if side * side != tokens or not side:
        raise UserError(
            f"pos_embed has {tokens} positions, which is no square: which of them are rows is not "
            f'told by the tensors; put a config.json beside them, {{"model_name": "{CUSTOM}", '
            '"family": ..., "dcae_jax": ...} as `export` writes it'
        )
    return side * patch


# -------------------------------------------------------------------------------------- writing


def problems(cfg: DiffusionModel, layout: Layout) -> list[str]:
    """Why a network cannot be written in a layout."""
    if layout not in diffusion_names.layouts_of(cfg):
        names = ", ".join(other.value for other in diffusion_names.layouts_of(cfg)) or "none"
        return [f"it has no {type(cfg).__name__.removesuffix('Config')}; there are {names}"]
    found = []
    if MLPKind(cfg.mlp) is not MLPKind.gelu:
        found.append(f"mlp = {MLPKind(cfg.mlp).value}: it knows gelu")
    if cfg.qk_norm:
        found.append("qk_norm = True: it does not normalise queries and keys")
    if cfg.input_size[0] != cfg.input_size[1]:
        found.append(f"input_size = {tuple(cfg.input_size)}: it knows squares")
    if isinstance(cfg, UViTConfig):
        return found + _uvit_problems(cfg, layout)
    return found + _dit_problems(cfg, layout)


def _uvit_problems(cfg: UViTConfig, layout: Layout) -> list[str]:
    if layout is Layout.official and cfg.final_conv:
        return ["final_conv = True: it has none; --to u_vit has"]
    return []


def _dit_problems(cfg: DiTConfig, layout: Layout) -> list[str]:
    found = []
    if Position(cfg.position) is not Position.sincos:
        found.append(f"position = {Position(cfg.position).value}: it knows sincos")
    if layout is Layout.diffusers:
        if cfg.mlp_ratio != 4:
            found.append(f"mlp_ratio = {cfg.mlp_ratio:g}: it knows 4")
        return found
    if not cfg.qkv_bias:
        found.append("qkv_bias = False: it always has one")
    if cfg.time_shift:
        found.append(f"time_shift = {cfg.time_shift}: it knows 0, 1 is diffusers'")
    if cfg.mlp_norm_eps != EPS:
        found.append(f"mlp_norm_eps = {cfg.mlp_norm_eps:g}: it knows {EPS:g}")
    return found


def write(described: Described, layout: Layout, network: str | None = None) -> dict[str, JSONValue]:
    """The config.json of a network that the layout can express.

    `network`: a release that has it, whose name the official layout gets.
    """
    cfg = described.cfg
    if layout is not Layout.diffusers:
        if layout is Layout.official and network is not None:
            return _named(described, network)
        return {
            "model_name": CUSTOM, "family": described.family.value,
            "dcae_jax": config_lib.to_json(cfg), "autoencoder": described.autoencoder,
            "scaling_factor": described.scaling_factor,
        }  # fmt: skip
    assert isinstance(cfg, DiTConfig)
    return _diffusers_fields(described, cfg)


def _named(described: Described, network: str) -> dict[str, JSONValue]:
    """Of the official layout; what differs from the release of that name is said beside it."""
    name, factor = {"model_name": network}, {"scaling_factor": described.scaling_factor}
    if described.release != network:
        return {**name, OWN_WEIGHTS: True, "autoencoder": described.autoencoder, **factor}
    own = releases.DIFFUSION[network].scaling_factor
    return {**name, **({} if described.scaling_factor in (None, own) else factor)}


def _diffusers_fields(described: Described, cfg: DiTConfig) -> dict[str, JSONValue]:
    return {
        "_class_name": CLASSES[0], FAMILY: described.family.value,
        "num_attention_heads": cfg.heads, "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.in_channels, "out_channels": cfg.out_factor * cfg.in_channels,
        "num_layers": cfg.depth, "attention_bias": cfg.qkv_bias, "sample_size": cfg.input_size[0],
        "patch_size": cfg.patch, "num_embeds_ada_norm": cfg.num_classes,
        "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False, "norm_eps": cfg.mlp_norm_eps,
    }  # fmt: skip
