"""Reads a denoising network in a PyTorch layout: UViT, USiT, DiT or SiT.

What tensors do not tell (heads, the process, the latents) comes from config.json, from the release
or family that the user names, or from the table of known sizes; what stays open is asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from dcae_jax import tree
from dcae_jax.convert import diffusion_layouts, diffusion_names, from_torch, names, releases
from dcae_jax.convert.diffusion_layouts import Described
from dcae_jax.convert.diffusion_names import DiffusionModel
from dcae_jax.convert.from_torch import AUTOENCODER, Opened, Tensors, listed
from dcae_jax.convert.names import Layout, Shape
from dcae_jax.convert.releases import Choice, Family
from dcae_jax.errors import UserError
from dcae_jax.models.dit import DiTConfig
from dcae_jax.nets.torch_file import Info
from dcae_jax.tree import Tree

NETWORK = "diffusion_model"  # what --part may name in official files, beside AUTOENCODER
ROOTS = ("patch_embed.", "x_embedder.", "pos_embed", "transformer_blocks.", "in_blocks.")
# Wrappers of trainers around the network's names.
PREFIXES = (
    "module.", diffusion_names.OFFICIAL_PREFIX, "uvit.", "dit.", "nnet.", "model.", "_orig_mod.",
    "0.",
)  # fmt: skip
# What a network's numbers depend on and every layout tells.
_CORE = (
    "in_channels", "input_size", "patch", "width", "depth", "heads", "mlp_ratio", "num_classes",
)  # fmt: skip


@dataclass(frozen=True)
class ImportedDiffusion:
    """Converted weights and what the source said beside them."""

    described: Described
    layout: Layout
    variables: Tree  # {"params": ...}, f32
    dtypes: dict[str, str]  # of the tensors that were not float32
    source: str
    notes: list[str] = field(default_factory=list)  # what was done on the way, for people

    @property
    def cfg(self) -> DiffusionModel:
        """The network."""
        return self.described.cfg


def recognises(source: str, part: str | None = None, also: str = "") -> bool:
    """Whether the source holds a denoising network (and --part does not ask for another part).

    `also`: what else the caller takes, for the message if nothing is there ("a workdir, ").
    """
    if part == AUTOENCODER:
        return False
    with from_torch.open_source(source, _inner(part), also) as opened:
        real, _ = from_torch.stripped(opened.tensors.infos, ROOTS, PREFIXES)
        return diffusion_names.layout_of(real) is not None


def load(
    source: str, variant: str | None = None, part: str | None = None, heads: int | None = None
) -> ImportedDiffusion:
    """The weights of a folder, a file or a hub name, converted; nothing is written anywhere.

    `variant`: a release, a family or one of its sizes, where the source leaves it open.  `part`:
    which weights of a checkpoint that holds several.  `heads`: of attention, where no size tells.
    """
    choice = None if variant is None else releases.chosen(variant)
    with from_torch.open_source(source, _inner(part)) as opened:
        tensors = _unwrap(opened.tensors)
        layout = diffusion_names.layout_of(tensors.infos)
        if layout is None:
            raise UserError(f"{source} holds no denoising network that is known")
        described = _describe(opened, tensors, layout, choice, heads, source)
        described, notes = _with_release(described, opened, choice, source)
        tensors = tensors._replace(notes=tensors.notes + notes)
        return _convert(described, layout, _without_variance(described, layout, tensors), source)


def _inner(part: str | None) -> str | None:
    """The part that the file itself may have."""
    return None if part in (AUTOENCODER, NETWORK) else part


def _unwrap(tensors: Tensors) -> Tensors:
    real, notes = from_torch.stripped(tensors.infos, ROOTS, PREFIXES)
    infos = {key: tensors.infos[name] for key, name in real.items()}
    return Tensors(infos, lambda key: tensors.read(real[key]), tensors.notes + notes)


# ------------------------------------------------------------------------------------- what it is


def _describe(
    opened: Opened, tensors: Tensors, layout: Layout, choice: Choice | None, heads: int | None,
    source: str,
) -> Described:  # fmt: skip
    """Network and family; UserError if they are open."""
    if opened.fields is not None:
        if diffusion_layouts.is_ours(opened.fields):
            found = diffusion_layouts.read(opened.fields, opened.where, choice)
            return _agreed(found, choice, opened.where)
        raise UserError(
            f"{opened.where} describes another network than the tensors beside it; known are "
            f"diffusers' {diffusion_layouts.CLASSES[0]} and the official model_names: "
            f"{', '.join(releases.DIFFUSION)}"
        )
    if layout is Layout.diffusers:
        raise UserError(
            f"{source} is diffusers' DiT, and only its config.json tells how many heads it has; "
            "give the folder that holds both"
        )
    shapes = _shapes(tensors)
    if missing := [key for key in _TELLING[layout] if key not in shapes]:
        raise UserError(f"{source} is not whole: it has no {', '.join(missing)}")
    family = _family(layout, shapes, choice, source)
    cfg = diffusion_layouts.measured(layout, shapes, _heads(layout, shapes, choice, heads, source))
    if family is Family.sit and isinstance(cfg, DiTConfig):
        cfg.learn_variance = False
    return Described(cfg, family)


# The tensors that tell the sizes.
_UVIT_TELLING = ("patch_embed.proj.weight", "pos_embed", "mid_block.mlp.fc1.weight")
_TELLING = {
    Layout.u_vit: (*_UVIT_TELLING, "label_emb.weight"),
    Layout.official: (*_UVIT_TELLING, "label_emb.embedding_table.weight"),
    Layout.dit: (
        "x_embedder.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight",
        "y_embedder.embedding_table.weight", "final_layer.linear.weight",
    ),
}  # fmt: skip


def _shapes(tensors: Tensors) -> dict[str, Shape]:
    return {key: info.shape for key, info in tensors.infos.items()}


def _agreed(found: Described, choice: Choice | None, where: str) -> Described:
    if choice is not None and choice.family is not found.family:
        raise UserError(
            f"{where} describes a {found.family.value}, not a {choice.family.value}; leave out "
            "--variant to go by it"
        )
    return found


def _family(
    layout: Layout, shapes: Mapping[str, Shape], choice: Choice | None, source: str
) -> Family:
    fits = diffusion_layouts.families(layout, shapes)
    if choice is not None and choice.family in fits:
        return choice.family
    if choice is None and len(fits) == 1:
        return fits[0]
    depth, width = diffusion_layouts.size_of(layout, shapes)
    sizes = [_candidate(family, depth, width) for family in fits]
    if choice is not None:
        raise UserError(
            f"{source} is no {choice.family.value}: its tensors are those of {' or '.join(sizes)}"
        )
    raise UserError(
        f"{source} may be {' or '.join(sizes)}, which differ in nothing but the process they were "
        "trained on; say which with --variant NAME" + _releases(fits, depth, width)
    )


def _candidate(family: Family, depth: int, width: int) -> str:
    """ "usit-h", or "usit" for a size without a name."""
    for size, make in releases.SIZES[family].items():
        if (make().depth, make().width) == (depth, width):
            return f"{family.value}-{size}"
    return family.value


def _releases(families: list[Family], depth: int, width: int) -> str:
    found = [
        name for name, what in releases.DIFFUSION.items()
        if what.family in families and (what.config().depth, what.config().width) == (depth, width)
    ]  # fmt: skip
    return f"; of this size are also the releases {', '.join(found)}" if found else ""


def _heads(
    layout: Layout, shapes: Mapping[str, Shape], choice: Choice | None, heads: int | None,
    source: str,
) -> int:  # fmt: skip
    """As given, or of the known size; UserError if it is open."""
    depth, width = diffusion_layouts.size_of(layout, shapes)
    if heads is not None:
        return heads
    if choice is not None and choice.size is not None:
        named = releases.SIZES[choice.family][choice.size]()
        if (named.depth, named.width) != (depth, width):
            raise UserError(
                f"{source} has depth {depth} and width {width}, and {choice.family.value}-"
                f"{choice.size} has depth {named.depth} and width {named.width}"
            )
        return named.heads
    known = diffusion_layouts.known_heads(layout, shapes)
    if known is None:
        raise UserError(
            f"{source} has depth {depth} and width {width}, which is no known size, and tensors do "
            "not tell how many heads its attention has; give --heads N (published networks have "
            "64 or 72 channels in each)"
        )
    return known


def _with_release(
    found: Described, opened: Opened, choice: Choice | None, source: str
) -> tuple[Described, list[str]]:
    """With what only the name of a release tells; UserError if the network is not the release's."""
    if choice is not None and choice.release is not None:
        if wrong := core_differences(found.cfg, releases.DIFFUSION[choice.release].config()):
            raise UserError(f"{source} is not {choice.release} (here, there):\n{listed(wrong)}")
        return _completed(found, choice.release), []
    named = releases.diffusion_named(source) if opened.from_hub else None
    if named is not None and found.release is None:
        wrong = core_differences(found.cfg, releases.DIFFUSION[named].config())
        if not wrong:
            return _completed(found, named), []
        return found, [f"{source} does not hold the network of {named}: {wrong[0]}"]
    if found.release is not None or found.autoencoder is not None:
        return found, []
    same = [
        name for name, what in releases.DIFFUSION.items()
        if what.family is found.family and not core_differences(found.cfg, what.config())
    ]  # fmt: skip
    hint = f"the network of {', '.join(same)}: --variant NAME if these are its weights"
    return found, [hint] if same else []


def core_differences(a: DiffusionModel, b: DiffusionModel) -> list[str]:
    """How two networks differ in what every layout tells, as `field: a, b`."""
    if type(a) is not type(b):
        return [f"class: {type(a).__name__}, {type(b).__name__}"]
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in _CORE}
    return [f"{name}: {x}, {y}" for name, (x, y) in pairs.items() if x != y]


def _completed(found: Described, release: str) -> Described:
    what = diffusion_layouts.released(release)
    found.cfg.adaptive_channels = what.cfg.adaptive_channels
    return what._replace(cfg=found.cfg)


# ------------------------------------------------------------------------------------- conversion


def _without_variance(found: Described, layout: Layout, tensors: Tensors) -> Tensors:
    """Without the half of the output that SiT's own files have and never use."""
    cfg, head = found.cfg, "final_layer.linear."
    if layout is not Layout.dit or found.family is not Family.sit:
        return tensors
    rows, share = cfg.patch**2 * cfg.in_channels, cfg.in_channels
    if tensors.infos[f"{head}weight"].shape[0] != 2 * rows:
        return tensors

    def half(value: np.ndarray) -> np.ndarray:
        pairs = value.reshape(cfg.patch**2, 2 * share, *value.shape[1:])
        return pairs[:, :share].reshape(rows, *value.shape[1:])

    def read(key: str) -> np.ndarray:
        return half(tensors.read(key)) if key.startswith(head) else tensors.read(key)

    infos = {
        key: Info((rows, *info.shape[1:]), info.dtype) if key.startswith(head) else info
        for key, info in tensors.infos.items()
    }
    note = f"left out the second half of {head[:-1]}: SiT ignores the variance that it would give"
    return Tensors(infos, read, [*tensors.notes, note])


def _convert(found: Described, layout: Layout, tensors: Tensors, source: str) -> ImportedDiffusion:
    cfg = found.cfg
    if problems := cfg.problems():
        raise UserError(f"the network of {source} cannot be built:\n{listed(problems)}")
    if wrong := diffusion_names.differences(cfg, layout, _shapes(tensors)):
        which = found.release or f"a {found.family.value} of its size"
        raise UserError(
            f"{source} does not hold the network of {which} ({len(wrong)} difference(s)):\n"
            f"{listed(wrong)}"
        )
    entries = diffusion_names.table(cfg, layout)
    fixed = diffusion_names.constants(cfg, layout) | diffusion_names.optional(cfg, layout)
    fixed = {key: value for key, value in fixed.items() if key in tensors.infos}
    keys = [key for entry in entries for key in entry.keys]
    dtypes = from_torch.rounded_dtypes([*keys, *fixed], tensors, source)
    for key, expected in fixed.items():
        _check_fixed(key, tensors.read(key), expected, source)
    shapes = diffusion_names.shapes(cfg)
    flat = {
        e.path: jax.device_put(names.assembled(e, shapes[e.path], tensors.read)) for e in entries
    }
    bad = names.not_finite(entries, flat)
    notes = tensors.notes + ([bad] if bad else [])
    return ImportedDiffusion(found, layout, tree.unflatten(flat), dtypes, source, notes)


def _check_fixed(key: str, value: np.ndarray, expected: np.ndarray, source: str) -> None:
    """UserError unless the stored positions are the ones that our network computes."""
    error = float(np.abs(value.astype(np.float32) - expected).max())
    # Values are in [-1, 1]: the rounding of the type, and of PyTorch's sines.
    allowed = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}[value.dtype.name]
    if not error <= allowed:  # NaN is not
        raise UserError(
            f"{key} of {source} differs from the fixed sines and cosines by {error:.2g}: these "
            "positions were trained, or are for latents of another shape, and this network has "
            "none to be set"
        )
