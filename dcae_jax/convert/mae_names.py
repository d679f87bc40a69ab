"""Tensor names of masked autoencoders (MAE, LMD), in both directions.

Sources: the state dicts of transformers' ViTMAEForPreTraining and ViTMAEModel, as published and as
later versions call them, and of MAE's own code (facebookresearch/mae).
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dcae_jax import tree
from dcae_jax.convert import names
from dcae_jax.convert.names import Entry, Kind, Layout, Shape
from dcae_jax.models.lmd import LMDConfig, abstract_variables
from dcae_jax.models.transformer import grid_sincos


class _Rules(NamedTuple):
    """Names of one half of the network; {i} is the number of the block, | separates shares."""

    modules: dict[str, str]
    token: dict[str, str]  # the class token, or the mask token
    positions: str  # the table of fixed positions, that of the class token (zeros) first


def _half(
    side: str, modules: dict[str, str], blocks: str, inner: dict[str, str], token: tuple[str, str],
    positions: str,
) -> _Rules:  # fmt: skip
    """A half from its modules and those of a block; `blocks` is what stands before the latter."""
    found = {f"{side}/{ours}": theirs for ours, theirs in modules.items()}
    for ours, theirs in inner.items():
        found[f"{side}/blocks/{ours}"] = "|".join(f"{blocks}.{t}" for t in theirs.split("|"))
    return _Rules(found, {f"{side}/{token[0]}": token[1]}, positions)


_VIT = {
    "norm1": "layernorm_before",
    "attn/qkv": "|".join(f"attention.attention.{role}" for role in ("query", "key", "value")),
    "attn/proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
_TIMM = {
    "norm1": "norm1", "attn/qkv": "attn.qkv", "attn/proj": "attn.proj", "norm2": "norm2",
    "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2",
}  # fmt: skip


def _vit_encoder(prefix: str) -> _Rules:
    modules = {"patch_embed": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    return _half(
        "encoder", {k: prefix + v for k, v in modules.items()}, prefix + "encoder.layer.{i}", _VIT,
        ("cls", prefix + "embeddings.cls_token"), prefix + "embeddings.position_embeddings",
    )  # fmt: skip


def _decoder(prefix: str, blocks: str, inner: dict[str, str]) -> _Rules:
    modules = {"embed": "decoder_embed", "norm": "decoder_norm", "head": "decoder_pred"}
    return _half(
        "decoder", {k: prefix + v for k, v in modules.items()}, prefix + blocks + ".{i}", inner,
        ("mask_token", prefix + "mask_token"), prefix + "decoder_pos_embed",
    )  # fmt: skip


_MAE_ENCODER = _half(
    "encoder", {"patch_embed": "patch_embed.proj", "norm": "norm"}, "blocks.{i}", _TIMM,
    ("cls", "cls_token"), "pos_embed",
)  # fmt: skip
_RULES: dict[Layout, dict[str, _Rules]] = {
    Layout.vit_mae: {
        "encoder": _vit_encoder("vit."), "decoder": _decoder("decoder.", "decoder_layers", _VIT),
    },
    Layout.vit_mae_encoder: {"encoder": _vit_encoder("")},
    Layout.mae: {"encoder": _MAE_ENCODER, "decoder": _decoder("", "decoder_blocks", _TIMM)},
    Layout.mae_encoder: {"encoder": _MAE_ENCODER},
}  # fmt: skip
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# transformers 5 calls parts by these names; writing them back as published, 5.23 turns the
# decoder's "decoder_layers." into "decoder_encoder.layer.".
_FORMER = (
    (r"\bdecoder_encoder\.layer\.", "decoder_layers."),
    (r"^(vit\.)?layers\.", r"\1encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def published(key: str, layout: Layout) -> str:
    """The name of a tensor as published files have it."""
    if layout in (Layout.vit_mae, Layout.vit_mae_encoder):
        for pattern, name in _FORMER:
            key = re.sub(pattern, name, key)
    return key


def layout_of(keys: Iterable[str]) -> Layout | None:
    """The layout that uses such names; None if it is none.  Classifiers name their trunk so too."""
    keys = set(keys)
    if any(key.startswith("vit.embeddings.patch_embeddings.") for key in keys):
        return Layout.vit_mae
    if any(key.startswith("embeddings.patch_embeddings.") for key in keys):
        return Layout.vit_mae_encoder
    if "cls_token" in keys and "blocks.0.attn.qkv.weight" in keys:
        return Layout.mae if any(key.startswith("decoder_") for key in keys) else Layout.mae_encoder
    return None


def sides(layout: Layout) -> tuple[str, ...]:
    """The halves that a layout holds: encoder, decoder."""
    return tuple(_RULES[layout])


@functools.cache
def shapes(cfg: LMDConfig) -> Mapping[str, Shape]:
    """path -> shape of every leaf of the network; do not change it."""
    return {p: tuple(x.shape) for p, x in tree.flatten(abstract_variables(cfg)).items()}


def table(cfg: LMDConfig, layout: Layout) -> list[Entry]:
    """Where every leaf of the halves that the layout holds lies, in the order of our paths."""
    found = []
    for path, shape in shapes(cfg).items():
        side = path.split("/")[1]
        if side in _RULES[layout]:
            found.append(_entry(_RULES[layout][side], path, shape))
    return found


def _entry(rules: _Rules, path: str, shape: Shape) -> Entry:
    name = path.removeprefix("params/")
    if name in rules.token:
        return Entry(path, (rules.token[name],), Kind.token)
    module, leaf = name.rsplit("/", 1)
    kind = Kind.vector
    if leaf == "kernel":
        kind = Kind.conv if module.endswith("patch_embed") else Kind.matrix
    templates = [f"{t}.{_LEAVES[leaf]}" for t in rules.modules[module].split("|")]
    layers = shape[0] if "/blocks/" in module else 0
    keys = tuple(t.format(i=i) for i in range(layers or 1) for t in templates)
    return Entry(path, keys, kind, layers=layers)


def positions(layout: Layout) -> dict[str, str]:
    """side -> the tensor of its fixed positions."""
    return {side: rules.positions for side, rules in _RULES[layout].items()}


def constants(cfg: LMDConfig, layout: Layout) -> dict[str, np.ndarray]:
    """Tensors that the layout stores and our network computes: the fixed positions."""
    found = {}
    for side, key in positions(layout).items():
        width = cfg.width if side == "encoder" else cfg.decoder_width
        sign = 1 if side == "encoder" else cfg.decoder_pos_sign
        value = sign * grid_sincos(*cfg.grid(*cfg.input_size), width)
        found[key] = np.concatenate([np.zeros((1, width), np.float32), value])[None]
    return found


def translated(
    cfg: LMDConfig, values: Mapping[str, Any], source: Layout, target: Layout
) -> dict[str, Any]:
    """What is said of tensors under the keys of `source`, under those of `target`."""
    both = set(sides(source)) & set(sides(target))
    tables = [
        [e for e in table(cfg, layout) if e.path.split("/")[1] in both]
        for layout in (source, target)
    ]
    found = names.carried(*tables, values)
    theirs, ours = positions(source), positions(target)
    return found | {ours[s]: values[theirs[s]] for s in both if theirs[s] in values}


def differences(cfg: LMDConfig, layout: Layout, found: Mapping[str, Shape]) -> list[str]:
    """How tensors (key -> shape) differ from what the network needs, each naming key and path."""
    fixed = {key: value.shape for key, value in constants(cfg, layout).items()}
    wrong = [f"{key}: missing, the fixed positions" for key in fixed if key not in found]
    for key, shape in fixed.items():
        if key in found and tuple(found[key]) != shape:
            wrong.append(f"{key}: shape {tuple(found[key])}, expected {shape}")
    return names.compared(table(cfg, layout), shapes(cfg), found, [*fixed]) + wrong
