"""Tensor names of denoising networks: UViT (also USiT) and DiT (also SiT), in both directions.

Sources: the state dicts of U-ViT (baofff), of DiT (facebookresearch) and SiT (willisma), of DC-AE's
code (efficientvit, DC-Gen), which names DiT as facebook does and UViT nearly as baofff does, and of
diffusers' DiTTransformer2DModel, each of whose blocks has its own copy of both embedders.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dcae_jax import tree
from dcae_jax.convert import names
from dcae_jax.convert.names import Entry, Kind, Layout, Shape
from dcae_jax.errors import UserError
from dcae_jax.models.dit import DiTConfig
from dcae_jax.models.transformer import abstract_variables, grid_sincos
from dcae_jax.models.uvit import UViTConfig

DiffusionModel = UViTConfig | DiTConfig

# The official files hold the network beside other things; the tables speak without this prefix.
OFFICIAL_PREFIX = "diffusion_model."


class _Name(NamedTuple):
    """One module's name in a layout; {i} is the number of the block, | separates shares."""

    theirs: str
    kind: Kind = Kind.vector  # of its kernel


def _uvit_block(ours: str, theirs: str, skip: bool) -> dict[str, _Name]:
    both = {
        "norm1": _Name("norm1"),
        "attn/qkv": _Name("attn.qkv", Kind.matrix),
        "attn/proj": _Name("attn.proj", Kind.matrix),
        "norm2": _Name("norm2"),
        "mlp/fc1": _Name("mlp.fc1", Kind.matrix),
        "mlp/fc2": _Name("mlp.fc2", Kind.matrix),
    }
    both |= {"skip": _Name("skip_linear", Kind.matrix)} if skip else {}
    return {
        f"{ours}/{k}": name._replace(theirs=f"{theirs}.{name.theirs}") for k, name in both.items()
    }


_UVIT = {
    "patch_embed": _Name("patch_embed.proj", Kind.conv),
    "label_embed": _Name("label_emb"),
    **_uvit_block("in_blocks", "in_blocks.{i}", skip=False),
    **_uvit_block("mid_block", "mid_block", skip=False),
    **_uvit_block("out_blocks", "out_blocks.{i}", skip=True),
    "norm": _Name("norm"),
    "head": _Name("decoder_pred", Kind.matrix),
    "final_conv": _Name("final_layer", Kind.conv),
}
_DIT = {
    "patch_embed": _Name("x_embedder.proj", Kind.conv),
    "time_embed/fc1": _Name("t_embedder.mlp.0", Kind.matrix),
    "time_embed/fc2": _Name("t_embedder.mlp.2", Kind.matrix),
    "label_embed": _Name("y_embedder.embedding_table"),
    "blocks/adaln": _Name("blocks.{i}.adaLN_modulation.1", Kind.matrix),
    "blocks/attn/qkv": _Name("blocks.{i}.attn.qkv", Kind.matrix),
    "blocks/attn/proj": _Name("blocks.{i}.attn.proj", Kind.matrix),
    "blocks/mlp/fc1": _Name("blocks.{i}.mlp.fc1", Kind.matrix),
    "blocks/mlp/fc2": _Name("blocks.{i}.mlp.fc2", Kind.matrix),
    "norm_adaln": _Name("final_layer.adaLN_modulation.1", Kind.matrix),
    "head": _Name("final_layer.linear", Kind.matrix),
}
_BLOCK = "transformer_blocks.{i}."
_DIFFUSERS_DIT = {
    "patch_embed": _Name("pos_embed.proj", Kind.conv),
    "time_embed/fc1": _Name(_BLOCK + "norm1.emb.timestep_embedder.linear_1", Kind.matrix),
    "time_embed/fc2": _Name(_BLOCK + "norm1.emb.timestep_embedder.linear_2", Kind.matrix),
    "label_embed": _Name(_BLOCK + "norm1.emb.class_embedder.embedding_table"),
    "blocks/adaln": _Name(_BLOCK + "norm1.linear", Kind.matrix),
    "blocks/attn/qkv": _Name(
        "|".join(_BLOCK + f"attn1.to_{role}" for role in "qkv"), Kind.matrix
    ),
    "blocks/attn/proj": _Name(_BLOCK + "attn1.to_out.0", Kind.matrix),
    "blocks/mlp/fc1": _Name(_BLOCK + "ff.net.0.proj", Kind.matrix),
    "blocks/mlp/fc2": _Name(_BLOCK + "ff.net.2", Kind.matrix),
    "norm_adaln": _Name("proj_out_1", Kind.matrix),
    "head": _Name("proj_out_2", Kind.matrix),
}  # fmt: skip

_RULES: dict[tuple[type, Layout], dict[str, _Name]] = {
    (UViTConfig, Layout.u_vit): _UVIT,
    (UViTConfig, Layout.official): _UVIT | {"label_embed": _Name("label_emb.embedding_table")},
    (DiTConfig, Layout.dit): _DIT,
    (DiTConfig, Layout.official): _DIT,
    (DiTConfig, Layout.diffusers): _DIFFUSERS_DIT,
}
_STACKS = ("in_blocks", "out_blocks", "blocks")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def layouts_of(cfg: DiffusionModel) -> list[Layout]:
    """The layouts that name this kind of network."""
    return [layout for kind, layout in _RULES if type(cfg) is kind]


@functools.cache
def shapes(cfg: DiffusionModel) -> Mapping[str, Shape]:
    """path -> shape of every leaf of the network; do not change it."""
    return {p: tuple(x.shape) for p, x in tree.flatten(abstract_variables(cfg)).items()}


def table(cfg: DiffusionModel, layout: Layout) -> list[Entry]:
    """Where every leaf of the config's network lies, in the order of our paths."""
    if (type(cfg), layout) not in _RULES:
        raise UserError(
            f"the {layout.value} layout has no {type(cfg).__name__.removesuffix('Config')}; it is "
            f"known in {', '.join(other.value for other in layouts_of(cfg)) or 'none'}"
        )
    rules = _RULES[type(cfg), layout]
    return [_entry(cfg, rules, path, shape) for path, shape in shapes(cfg).items()]


def _entry(cfg: DiffusionModel, rules: dict[str, _Name], path: str, shape: Shape) -> Entry:
    if path == "params/pos_embed":
        return Entry(path, ("pos_embed",), Kind.row)
    module, leaf = path.removeprefix("params/").rsplit("/", 1)
    if module not in rules:
        raise AssertionError(f"no rule names {module}")
    name = rules[module]
    kind = name.kind if leaf == "kernel" else Kind.vector
    templates = [f"{t}.{_LEAVES[leaf]}" for t in name.theirs.split("|")]
    stacked = module.split("/")[0] in _STACKS
    # A leaf that stands alone here and in every block there is copied.
    copied = not stacked and "{i}" in name.theirs
    count = shape[0] if stacked else cfg.depth if copied else 1
    keys = tuple(t.format(i=i) for i in range(count) for t in templates)
    return Entry(path, keys, kind, layers=count if stacked else 0, copies=copied)


def constants(cfg: DiffusionModel, layout: Layout) -> dict[str, np.ndarray]:
    """Tensors that the layout stores and our network computes: DiT's fixed positions."""
    if layout is Layout.diffusers or not isinstance(cfg, DiTConfig):
        return {}
    return {"pos_embed": grid_sincos(*cfg.grid(*cfg.input_size), cfg.width)[None]}


def optional(cfg: DiffusionModel, layout: Layout) -> dict[str, np.ndarray]:
    """As `constants`, of tensors that some versions of the layout store."""
    if layout is not Layout.diffusers:
        return {}
    return {"pos_embed.pos_embed": grid_sincos(*cfg.grid(*cfg.input_size), cfg.width)[None]}


def translated(
    cfg: DiffusionModel, values: Mapping[str, Any], source: Layout, target: Layout
) -> dict[str, Any]:
    """What is said of tensors under the keys of `source`, under those of `target`."""
    found = names.carried(table(cfg, source), table(cfg, target), values)
    return found | {key: values[key] for key in constants(cfg, target) if key in values}


def differences(cfg: DiffusionModel, layout: Layout, found: Mapping[str, Shape]) -> list[str]:
    """How tensors (key -> shape) differ from what the network needs, each naming key and path."""
    fixed = {key: value.shape for key, value in constants(cfg, layout).items()}
    wrong = [f"{key}: missing, the fixed positions" for key in fixed if key not in found]
    for key, shape in (fixed | {k: v.shape for k, v in optional(cfg, layout).items()}).items():
        if key in found and tuple(found[key]) != shape:
            wrong.append(f"{key}: shape {tuple(found[key])}, expected {shape}")
    also = [*fixed, *optional(cfg, layout)]
    return names.compared(table(cfg, layout), shapes(cfg), found, also) + wrong


def layout_of(keys: Iterable[str]) -> Layout | None:
    """The layout that uses such names (official for DiT means dit); None if it is none."""
    text = "\n".join(keys)

    def has(pattern: str) -> bool:
        return re.search(rf"^{pattern}", text, re.M) is not None

    if has(r"transformer_blocks\.\d+\.norm1\.") and has(r"pos_embed\.proj\."):
        return Layout.diffusers
    if has(r"x_embedder\.") and has(r"blocks\.\d+\.adaLN_modulation\."):
        return Layout.dit
    if has(r"in_blocks\.\d+\.") and has(r"mid_block\."):
        return Layout.official if has(r"label_emb\.embedding_table\.") else Layout.u_vit
    return None
