"""Reads a masked autoencoder in a PyTorch layout: transformers' ViTMAE, or MAE's own code.

What tensors do not tell (heads, the eps of norms, the mask) comes from config.json, from the table
of published sizes, or from the user.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from dcae_jax import tree
from dcae_jax.convert import from_torch, mae_layouts, mae_names, names
from dcae_jax.convert.diffusion_from_torch import NETWORK
from dcae_jax.convert.from_torch import AUTOENCODER, Opened, Tensors, listed
from dcae_jax.convert.mae_layouts import Described
from dcae_jax.convert.names import Layout, Shape
from dcae_jax.errors import UserError
from dcae_jax.models import lmd
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.tree import Tree

ROOTS = ("vit.", "embeddings.", "patch_embed.", "cls_token", "blocks.", "x_embedder.", "in_blocks.")
PREFIXES = ("module.", "_orig_mod.", "model.")  # wrappers of trainers around the network's names
# What classifiers have beside the trunk: transformers', MAE's fine-tuned ones, timm's.
_CLASSIFIER = ("classifier.", "fc_norm.", "head.")


@dataclass(frozen=True)
class ImportedMasked:
    """Converted weights and what the source said beside them."""

    described: Described
    layout: Layout
    variables: Tree  # {"params": ...}, f32
    dtypes: dict[str, str]  # of the tensors that were not float32
    source: str
    notes: list[str] = field(default_factory=list)  # what was done on the way, for people

    @property
    def cfg(self) -> LMDConfig:
        """The network."""
        return self.described.cfg


def recognises(source: str, part: str | None = None, also: str = "") -> bool:
    """Whether the source holds the trunk of a masked autoencoder, fine-tuned ones included.

    `also`: what else the caller takes, for the message if nothing is there ("a workdir, ").
    """
    if part in (AUTOENCODER, NETWORK):
        return False
    with from_torch.open_source(source, part, also) as opened:
        if opened.fields is not None and mae_layouts.is_ours(opened.fields):
            return True
        real, _ = from_torch.stripped(opened.tensors.infos, ROOTS, PREFIXES)
        return mae_names.layout_of(real) is not None


def load(
    source: str, part: str | None = None, heads: int | None = None,
    decoder_heads: int | None = None,
) -> ImportedMasked:  # fmt: skip
    """The weights of a folder, a file or a hub name, converted; nothing is written anywhere.

    `part`: which weights of a checkpoint that holds several.  `heads`, `decoder_heads`: of
    attention, where no size tells.
    """
    with from_torch.open_source(source, part) as opened:
        tensors, layout = _unwrap(opened.tensors, source)
        described, notes = _describe(opened, tensors, layout, heads, decoder_heads, source)
        tensors = tensors._replace(notes=tensors.notes + notes)
        return _convert(described, layout, tensors, source)


def _unwrap(tensors: Tensors, source: str) -> tuple[Tensors, Layout]:
    """The tensors under their published names."""
    real, notes = from_torch.stripped(tensors.infos, ROOTS, PREFIXES)
    layout = mae_names.layout_of(real)
    if layout is None:
        first = ", ".join(list(real)[:3]) or "none"
        raise UserError(
            f"{source} holds no masked autoencoder that is known: its tensors are called {first}, "
            "...; expected names as vit.embeddings.cls_token (transformers) or cls_token, "
            "blocks.0.attn.qkv.weight (MAE's own code)"
        )
    if head := [key for key in real if key.startswith(_CLASSIFIER)]:
        raise UserError(
            f"{source} is a classifier ({', '.join(sorted(head)[:2])}), fine-tuned and without a "
            "decoder; give the pre-trained masked autoencoder that it was made from "
            "(ViTMAEForPreTraining or ViTMAEModel)"
        )
    real = {mae_names.published(key, layout): name for key, name in real.items()}
    infos = {key: tensors.infos[name] for key, name in real.items()}
    return Tensors(infos, lambda key: tensors.read(real[key]), tensors.notes + notes), layout


# ------------------------------------------------------------------------------------- what it is


def _describe(
    opened: Opened, tensors: Tensors, layout: Layout, heads: int | None,
    decoder_heads: int | None, source: str,
) -> tuple[Described, list[str]]:  # fmt: skip
    shapes = _shapes(tensors)
    if opened.fields is None:
        cfg = mae_layouts.measured(layout, shapes, heads, decoder_heads, source)
        described, notes = Described(cfg), [_unsaid(layout)]
    else:
        described, notes = _read(opened, heads, decoder_heads), []
    cfg = described.cfg
    cfg.decoder_pos_sign = _sign(cfg, layout, tensors)
    if cfg.norm_eps != mae_layouts.ORIGINAL_EPS:
        notes.append(
            f"norms with eps {cfg.norm_eps:g}, as in transformers; MAE's own code, and networks "
            f"here, have {mae_layouts.ORIGINAL_EPS:g}: give runs that take these weights "
            f"--config.task.model.norm_eps={cfg.norm_eps:g}"
        )
    if "decoder" not in mae_names.sides(layout):
        notes.append(
            f"there is no decoder: one of {cfg.decoder_depth} blocks of width {cfg.decoder_width} "
            "was drawn anew, and has to be trained before anything is filled in"
        )
    return described, notes


def _read(opened: Opened, heads: int | None, decoder_heads: int | None) -> Described:
    if not mae_layouts.is_ours(opened.fields):
        raise UserError(
            f"{opened.where} describes another network than the tensors beside it, which are a "
            'masked autoencoder\'s; its config.json says "model_type": "vit_mae"'
        )
    mae_layouts.check_class(opened.fields, opened.where)
    if heads is not None or decoder_heads is not None:
        raise UserError(
            f"{opened.where} says how many heads there are; leave out --heads and --decoder-heads"
        )
    return mae_layouts.read(opened.fields, opened.where)


def _unsaid(layout: Layout) -> str:
    """What a file without a config.json leaves open, and what is taken."""
    eps = "" if layout not in mae_layouts.CLASSES else ", and transformers' default eps"
    return (
        "no config.json: a mask of 0.75 and whitened targets (task.norm_target) are taken, as in "
        f"the published recipe{eps}"
    )


def _sign(cfg: LMDConfig, layout: Layout, tensors: Tensors) -> int:
    """-1 if the decoder's stored positions are subtracted, as in LMD's code."""
    if cfg.problems() or "decoder" not in mae_names.sides(layout):
        return 1
    key = mae_names.positions(layout)["decoder"]
    ours = mae_names.constants(cfg, layout)[key]
    if key not in tensors.infos or tuple(tensors.infos[key].shape) != ours.shape:
        return 1
    return -1 if float(np.sum(tensors.read(key).astype(np.float32) * ours)) < 0 else 1


def _shapes(tensors: Tensors) -> dict[str, Shape]:
    return {key: info.shape for key, info in tensors.infos.items()}


# ------------------------------------------------------------------------------------- conversion


def _convert(found: Described, layout: Layout, tensors: Tensors, source: str) -> ImportedMasked:
    cfg = found.cfg
    if problems := cfg.problems():
        raise UserError(f"the network of {source} cannot be built:\n{listed(problems)}")
    if wrong := mae_names.differences(cfg, layout, _shapes(tensors)):
        raise UserError(
            f"{source} does not hold a masked autoencoder of this size ({len(wrong)} "
            f"difference(s)):\n{listed(wrong)}"
        )
    entries, fixed = mae_names.table(cfg, layout), mae_names.constants(cfg, layout)
    keys = [key for entry in entries for key in entry.keys]
    dtypes = from_torch.rounded_dtypes([*keys, *fixed], tensors, source)
    for key, expected in fixed.items():
        _check_fixed(key, tensors.read(key), expected, source)
    shapes = mae_names.shapes(cfg)
    flat = {
        e.path: jax.device_put(names.assembled(e, shapes[e.path], tensors.read)) for e in entries
    }
    bad = names.not_finite(entries, flat)
    notes = tensors.notes + ([bad] if bad else [])
    variables = tree.unflatten(_with_decoder(cfg, flat))
    return ImportedMasked(found, layout, variables, dtypes, source, notes)


def _with_decoder(cfg: LMDConfig, flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """With a fresh decoder where the layout has none."""
    if any(path.startswith("params/decoder/") for path in flat):
        return dict(flat)
    drawn = jax.jit(lambda key: lmd.init_variables(cfg, key)["params"]["decoder"])
    fresh = tree.flatten(drawn(jax.random.key(0)))
    return {**flat, **{f"params/decoder/{path}": leaf for path, leaf in fresh.items()}}


def _check_fixed(key: str, value: np.ndarray, expected: np.ndarray, source: str) -> None:
    """UserError unless the stored positions are the ones that our network computes."""
    error = float(np.abs(value.astype(np.float32) - expected).max())
    # Values are in [-1, 1]: the rounding of the type, and of the sines of large angles.
    allowed = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}[value.dtype.name]
    if not error <= allowed:  # NaN is not
        why = "they are all zero, as in a network that was built and never initialised"
        why = why if not np.any(value) else "they were trained, or fitted to images of another size"
        raise UserError(
            f"{key} of {source} differs from the fixed sines and cosines by {error:.2g}: {why}; "
            "this network computes its positions and has none to be set"
        )
