"""The one table of tensor names, read in both directions.

A rule pairs a module of ours with its name in the two PyTorch layouts; `table` applies the rules to
every leaf that a config's network has.  Sources: the state dicts of DC-AE's official code
(efficientvit, DC-Gen) and of diffusers' AutoencoderDC and AutoencoderKL.  diffusion_names.py has
the rules of denoising networks, mae_names.py those of masked autoencoders; entries, kinds and
transforms are these.
"""

import enum
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dcae_jax import tree
from dcae_jax.errors import UserError
from dcae_jax.models.dcae import DCAEConfig, StagesConfig, abstract_variables
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.models.layers import Downsample

AnyConfig = DCAEConfig | KLVAEConfig
Shape = tuple[int, ...]


class Layout(enum.Enum):
    """Who names the tensors."""

    official = "official"  # efficientvit and DC-Gen
    diffusers = "diffusers"  # AutoencoderDC, AutoencoderKL, DiTTransformer2DModel
    u_vit = "u_vit"  # U-ViT's own code (baofff)
    dit = "dit"  # the code of DiT (facebookresearch) and SiT
    vit_mae = "vit_mae"  # transformers' ViTMAEForPreTraining
    vit_mae_encoder = "vit_mae_encoder"  # transformers' ViTMAEModel
    mae = "mae"  # MAE's own code (facebookresearch)
    mae_encoder = "mae_encoder"  # its encoder alone


AUTOENCODER_LAYOUTS = (Layout.official, Layout.diffusers)


class Kind(enum.Enum):
    """How PyTorch stores a leaf."""

    vector = "vector"  # [c], as here; also tables [n, c]
    row = "row"  # [1, n, c] of our [n, c]
    token = "token"  # [1, 1, c] of our [c]
    conv = "conv"  # [out, in, h, w] of our [h, w, in, out]; depthwise: in = 1 in both
    matrix = "matrix"  # [out, in] of our [in, out]
    pointwise = "pointwise"  # [out, in, 1, 1] of our [in, out]; grouped: in = width of a group


class Entry(NamedTuple):
    """One leaf of ours and the tensors that hold it; several hold equal shares of its rows."""

    path: str  # params/encoder/conv_in/kernel
    keys: tuple[str, ...]
    kind: Kind
    layers: int = 0  # above 0: a stack of so many; `keys` are those of layer after layer
    copies: bool = False  # each key holds the whole leaf

    def layer(self, index: int) -> "Entry":
        """One layer of a stack, as if it stood alone."""
        share = len(self.keys) // self.layers
        keys = self.keys[index * share : (index + 1) * share]
        return Entry(f"{self.path}[{index}]", keys, self.kind)

    def parts(self) -> "list[Entry]":
        """The layers of a stack; anything else is one part."""
        return [self.layer(i) for i in range(self.layers)] if self.layers else [self]


class Rule(NamedTuple):
    """Names of one module; `{...}` stand for numbers and sides, see `_values`."""

    ours: str
    official: str
    diffusers: tuple[str, ...]
    kind: Kind = Kind.vector  # of its kernel in the official layout
    diffusers_kind: Kind | None = None  # None: the same
    when: Callable[[Any], bool] = lambda cfg: True  # which configs name it so


# ------------------------------------------------------------------------------------------ DC-AE


def _in_block(
    ours: str, official: str, diffusers: str, kind: Kind = Kind.vector,
    diffusers_kind: Kind | None = None,
) -> Rule:  # fmt: skip
    """A module inside a block; several names in `diffusers` are separated by |."""
    return Rule(
        "{side}/stage_{s}/block_{k}/" + ours,
        "{side}.stages.{s}.op_list.{p}." + official,
        tuple("{side}.{way}_blocks.{s}.{p}." + name for name in diffusers.split("|")),
        kind, diffusers_kind,
    )  # fmt: skip


def _change(ours: str, official: str, when: Callable[[Any], bool] = lambda cfg: True) -> Rule:
    """The change of resolution of a stage."""
    return Rule(
        "{side}/stage_{s}/" + ours,
        "{side}.stages.{s}.op_list.{p}." + official,
        ("{side}.{way}_blocks.{s}.{p}.conv",),
        Kind.conv, when=when,
    )  # fmt: skip


def _end(ours: str, official: str, diffusers: str, when: Callable[[Any], bool]) -> Rule:
    """A convolution at an end of the encoder or decoder."""
    return Rule(ours, official, (diffusers,), Kind.conv, when=when)


def _unshuffles(cfg: DCAEConfig) -> bool:
    return Downsample(cfg.downsample) is Downsample.conv_unshuffle


_MLA, _GLU = "context_module.main.", "local_module.main."
_DCAE_RULES = (
    _in_block("conv1", "main.conv1.conv", "conv1", Kind.conv),
    _in_block("conv2", "main.conv2.conv", "conv2", Kind.conv),
    _in_block("norm", "main.conv2.norm", "norm"),
    # Thirds of one projection's rows, misnamed there: q, k, v lie in blocks of each head.
    _in_block("attn/qkv", _MLA + "qkv.conv", "attn.to_q|attn.to_k|attn.to_v",
              Kind.pointwise, Kind.matrix),
    _in_block("attn/multiscale_5/depthwise", _MLA + "aggreg.0.0",
              "attn.to_qkv_multiscale.0.proj_in", Kind.conv),
    _in_block("attn/multiscale_5/pointwise", _MLA + "aggreg.0.1",
              "attn.to_qkv_multiscale.0.proj_out", Kind.pointwise),
    _in_block("attn/proj", _MLA + "proj.conv", "attn.to_out", Kind.pointwise, Kind.matrix),
    _in_block("attn/norm", _MLA + "proj.norm", "attn.norm_out"),
    _in_block("glumb/inverted", _GLU + "inverted_conv.conv", "conv_out.conv_inverted",
              Kind.pointwise),
    _in_block("glumb/depth", _GLU + "depth_conv.conv", "conv_out.conv_depth", Kind.conv),
    _in_block("glumb/point", _GLU + "point_conv.conv", "conv_out.conv_point", Kind.pointwise),
    _in_block("glumb/norm", _GLU + "point_conv.norm", "conv_out.norm"),
    _change("down", "main.conv.conv", _unshuffles),
    _change("down", "main.conv", lambda cfg: not _unshuffles(cfg)),
    _change("up", "main.conv.conv"),
    _end("encoder/conv_in", "encoder.project_in.conv", "encoder.conv_in",
         lambda cfg: cfg.encoder.first() == 0),
    _end("encoder/conv_in", "encoder.project_in.conv.conv", "encoder.conv_in.conv",
         lambda cfg: cfg.encoder.first() == 1 and _unshuffles(cfg)),
    _end("encoder/conv_in", "encoder.project_in.conv", "encoder.conv_in.conv",
         lambda cfg: cfg.encoder.first() == 1 and not _unshuffles(cfg)),
    _end("encoder/conv_out", "encoder.project_out.main.op_list.0.conv", "encoder.conv_out",
         lambda cfg: cfg.latent_shortcuts),
    _end("encoder/conv_out", "encoder.project_out.op_list.0.conv", "encoder.conv_out",
         lambda cfg: not cfg.latent_shortcuts),
    _end("decoder/conv_in", "decoder.project_in.main.conv", "decoder.conv_in",
         lambda cfg: cfg.latent_shortcuts),
    _end("decoder/conv_in", "decoder.project_in.conv", "decoder.conv_in",
         lambda cfg: not cfg.latent_shortcuts),
    Rule("decoder/norm_out", "decoder.project_out.op_list.0", ("decoder.norm_out",)),
    _end("decoder/conv_out", "decoder.project_out.op_list.2.conv", "decoder.conv_out",
         lambda cfg: cfg.decoder.first() == 0),
    _end("decoder/conv_out", "decoder.project_out.op_list.2.conv.conv", "decoder.conv_out.conv",
         lambda cfg: cfg.decoder.first() == 1),
)  # fmt: skip


def _dcae_values(cfg: DCAEConfig, module: str, found: dict[str, str]) -> dict[str, Any]:
    """What the templates' names stand for: `p` is the position in the stage's list of layers."""
    if "s" not in found:
        return found
    stage, encodes = int(found["s"]), found["side"] == "encoder"
    side: StagesConfig = cfg.encoder if encodes else cfg.decoder
    leads = 0 if encodes or stage == len(side.widths) - 1 else 1  # `up` stands before the blocks
    position = {"down": side.depths[stage], "up": 0}
    last = module.rsplit("/", 1)[-1]
    p = int(found["k"]) + leads if "k" in found else position[last]
    return {**found, "way": "down" if encodes else "up", "p": p}


# ------------------------------------------------------------------------------- AutoencoderKL


def _kl(ours: str, diffusers: str, kind: Kind = Kind.vector) -> Rule:
    """A module of AutoencoderKL, which has no other layout here."""
    return Rule(ours, "", (diffusers,), kind)


def _kl_res(ours: str, diffusers: str) -> list[Rule]:
    """The modules of a residual block."""
    kinds = {
        "norm1": Kind.vector, "conv1": Kind.conv, "norm2": Kind.vector, "conv2": Kind.conv,
    }  # fmt: skip
    plain = [_kl(f"{ours}/{name}", f"{diffusers}.{name}", kind) for name, kind in kinds.items()]
    return [*plain, _kl(f"{ours}/shortcut", f"{diffusers}.conv_shortcut", Kind.pointwise)]


_ATTN = "{side}.mid_block.attentions.0."
_KL_RULES = (
    *_kl_res("{side}/{way}_{s}/block_{k}", "{side}.{way}_blocks.{b}.resnets.{k}"),
    *_kl_res("{side}/mid/block_{k}", "{side}.mid_block.resnets.{k}"),
    _kl("{side}/{way}_{s}/{way}", "{side}.{way}_blocks.{b}.{way}samplers.0.conv", Kind.conv),
    _kl("{side}/mid/attn/norm", _ATTN + "group_norm"),
    _kl("{side}/mid/attn/q", _ATTN + "to_q", Kind.matrix),
    _kl("{side}/mid/attn/k", _ATTN + "to_k", Kind.matrix),
    _kl("{side}/mid/attn/v", _ATTN + "to_v", Kind.matrix),
    _kl("{side}/mid/attn/proj", _ATTN + "to_out.0", Kind.matrix),
    _kl("{side}/conv_in", "{side}.conv_in", Kind.conv),
    _kl("{side}/norm_out", "{side}.conv_norm_out"),
    _kl("{side}/conv_out", "{side}.conv_out", Kind.conv),
    _kl("encoder/quant", "quant_conv", Kind.pointwise),
    _kl("decoder/post_quant", "post_quant_conv", Kind.pointwise),
)

# How files from before 2023 (sd-vae-ft-mse is one) call parts of the attention of AutoencoderKL.
FORMER_NAMES = {
    f".attentions.0.{old}.": f".attentions.0.{new}."
    for old, new in {
        "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"
    }.items()
}  # fmt: skip


def _kl_values(cfg: KLVAEConfig, module: str, found: dict[str, str]) -> dict[str, Any]:
    """diffusers counts the decoder's blocks from the latent on, here both sides count alike."""
    if "s" not in found:
        return found
    stage = int(found["s"])
    b = stage if found["way"] == "down" else len(cfg.widths) - 1 - stage
    return {**found, "b": b}


# ------------------------------------------------------------------------------------------ table

_LEAVES = {
    "kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean",
    "var": "running_var",
}  # fmt: skip


@functools.cache
def shapes(cfg: AnyConfig) -> Mapping[str, Shape]:
    """path -> shape of every leaf of the network; do not change it."""
    return {p: tuple(x.shape) for p, x in tree.flatten(abstract_variables(cfg)).items()}


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """`{side}/stage_{s}` as a regex; sides and ways are words, all others are numbers."""
    words, seen = {"side": "encoder|decoder", "way": "down|up"}, set()

    def group(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{words[name]})" if name in words else rf"(?P<{name}>\d+)"

    return re.compile(re.sub(r"\{(\w+)\}", group, template))


def _rules(cfg: AnyConfig, layout: Layout) -> tuple[list[Rule], Callable[..., dict[str, Any]]]:
    if isinstance(cfg, DCAEConfig):
        return [r for r in _DCAE_RULES if r.when(cfg)], _dcae_values
    if layout is not Layout.diffusers:
        raise UserError(
            "AutoencoderKL is known in diffusers' layout only; use --to diffusers, or for a file "
            "of another layout load it in diffusers and save it there"
        )
    return [r for r in _KL_RULES if r.when(cfg)], _kl_values


def table(cfg: AnyConfig, layout: Layout) -> list[Entry]:
    """Where every leaf of the config's network lies, in the order of our paths."""
    rules, values = _rules(cfg, layout)
    entries = []
    for path in shapes(cfg):
        module, leaf = path.split("/", 1)[1].rsplit("/", 1)
        fits = [(r, m) for r in rules if (m := _pattern(r.ours).fullmatch(module))]
        if len(fits) != 1:
            raise AssertionError(f"{len(fits)} rules name {module}")
        rule, match = fits[0]
        filled = values(cfg, module, match.groupdict())
        official = layout is Layout.official
        templates = (rule.official,) if official else rule.diffusers
        kind = rule.kind if official else rule.diffusers_kind or rule.kind
        keys = tuple(f"{t.format(**filled)}.{_LEAVES[leaf]}" for t in templates)
        entries.append(Entry(path, keys, kind if leaf == "kernel" else Kind.vector))
    return entries


def counters(cfg: AnyConfig, layout: Layout) -> list[str]:
    """The keys of BatchNorm's counters (int64 scalars), which no leaf of ours holds."""
    ends = (".running_mean", ".num_batches_tracked")
    return [
        key.replace(*ends)
        for entry in table(cfg, layout) for key in entry.keys if key.endswith(ends[0])
    ]  # fmt: skip


def translated(cfg: AnyConfig, values: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """What is said of tensors under any layout's keys, under those of `layout`.

    Of tensors that are one in `layout`, only what is said of all alike is kept.
    """
    known = AUTOENCODER_LAYOUTS if isinstance(cfg, DCAEConfig) else (Layout.diffusers,)
    ours, found = table(cfg, layout), {}
    for source in known:
        found |= carried(table(cfg, source), ours, values)
        pairs = zip(counters(cfg, source), counters(cfg, layout), strict=True)
        found |= {ours: values[theirs] for theirs, ours in pairs if theirs in values}
    return found


def carried(
    source: Sequence[Entry], target: Sequence[Entry], values: Mapping[str, Any]
) -> dict[str, Any]:
    """What is said of the tensors of one table, under the keys of another of the same network."""
    found = {}
    for theirs, ours in zip(_parts(source), _parts(target), strict=True):
        said = {key: values[key] for key in theirs.keys if key in values}
        if theirs.keys == ours.keys:
            found |= said
        elif len(said) == len(theirs.keys) and len(set(said.values())) == 1:
            found |= dict.fromkeys(ours.keys, said[theirs.keys[0]])
    return found


def _parts(entries: Sequence[Entry]) -> list[Entry]:
    return [part for entry in entries for part in entry.parts()]


# ------------------------------------------------------------------------------------- transforms


def stored_shape(entry: Entry, shape: Shape) -> Shape:
    """The shape of each tensor of an entry whose leaf has `shape`."""
    if entry.layers:
        return stored_shape(entry.layer(0), shape[1:])
    shares = 1 if entry.copies else len(entry.keys)
    if entry.kind is Kind.vector:
        return (shape[0] // shares, *shape[1:])
    if entry.kind in (Kind.row, Kind.token):
        return (1,) * (3 - len(shape)) + shape
    if entry.kind is Kind.conv:
        height, width, inputs, outputs = shape
        return outputs, inputs, height, width
    inputs, outputs = shape
    share = outputs // shares
    return (share, inputs) if entry.kind is Kind.matrix else (share, inputs, 1, 1)


def to_torch(entry: Entry, leaf: np.ndarray) -> list[np.ndarray]:
    """The tensors of an entry, as views of our leaf."""
    if entry.layers:
        return [t for i in range(entry.layers) for t in to_torch(entry.layer(i), leaf[i])]
    if entry.copies:
        return to_torch(entry._replace(keys=entry.keys[:1], copies=False), leaf) * len(entry.keys)
    if entry.kind is Kind.conv:
        return [leaf.transpose(3, 2, 0, 1)]
    shape = stored_shape(entry, leaf.shape)
    whole = leaf if entry.kind in (Kind.vector, Kind.row, Kind.token) else leaf.T
    return [part.reshape(shape) for part in np.split(whole, len(entry.keys))]


def from_torch(entry: Entry, tensors: list[np.ndarray]) -> np.ndarray:
    """Our leaf, float32 and contiguous, of the tensors of an entry (see `assembled` for stacks)."""
    parts = [np.asarray(t, np.float32) for t in tensors]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if entry.kind is Kind.conv:
        whole = whole.transpose(2, 3, 1, 0)
    elif entry.kind is Kind.row:
        whole = whole[0]
    elif entry.kind is Kind.token:
        whole = whole[0, 0]
    elif entry.kind is not Kind.vector:
        whole = whole.reshape(whole.shape[:2]).T
    return np.ascontiguousarray(whole)


def assembled(entry: Entry, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Our leaf of `shape`, its tensors read one after the other; UserError if copies differ."""
    if entry.layers:
        leaf = np.empty(shape, np.float32)
        for i in range(entry.layers):
            leaf[i] = assembled(entry.layer(i), shape[1:], read)
        return leaf
    if not entry.copies:
        return from_torch(entry, [read(key) for key in entry.keys])
    first = read(entry.keys[0])
    for key in entry.keys[1:]:
        if not np.array_equal(first, read(key)):
            raise UserError(
                f"{key} differs from {entry.keys[0]}: this network has one {entry.path} for all "
                "its blocks, so that their copies must be equal"
            )
    return from_torch(entry._replace(keys=entry.keys[:1], copies=False), [first])


# ------------------------------------------------------------------------------------- comparison


def differences(cfg: AnyConfig, layout: Layout, found: Mapping[str, Shape]) -> list[str]:
    """How tensors (key -> shape) differ from what the network needs, each naming key and path."""
    return compared(table(cfg, layout), shapes(cfg), found, counters(cfg, layout))


def compared(
    entries: Sequence[Entry], ours: Mapping[str, Shape], found: Mapping[str, Shape],
    also: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """As `differences`, of a table whose leaves have the shapes `ours`; `also` may be there."""
    wanted = {key: (e, i) for e in entries for i, key in _indexed(e)}
    missing, misshapen = [], []
    for key, (entry, index) in wanted.items():
        shape, path = stored_shape(entry, ours[entry.path]), entry.path + index
        if key not in found:
            missing.append(f"{key}: missing, needed for {path}")
        elif tuple(found[key]) != shape:
            misshapen.append(
                f"{key}: shape {_times(found[key])}, expected {_times(shape)} for {path}"
            )
    known = wanted.keys() | set(also)
    extra = [f"{key}: not part of this network" for key in sorted(found.keys() - known)]
    return missing + misshapen + extra


def _indexed(entry: Entry) -> list[tuple[str, str]]:
    """(the layer a key belongs to as "[3]", or "", the key) of every key."""
    return [
        (f"[{i}]" if entry.layers else "", key)
        for i, part in enumerate(entry.parts()) for key in part.keys
    ]  # fmt: skip


def _times(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def layout_of(keys: Iterable[str]) -> Layout | None:
    """The layout that uses such names; None if it is neither."""
    text = "\n".join(keys)
    if re.search(r"^(encoder|decoder)\.(stages|project_in|project_out)\.", text, re.M):
        return Layout.official
    if re.search(r"^(encoder|decoder)\.(down_blocks|up_blocks|conv_in|conv_out)\.", text, re.M):
        return Layout.diffusers
    return None


def check_held(entry: Entry, exact: np.ndarray, kept: np.ndarray) -> None:
    """UserError if finite values became infinite by rounding; NaN and infinity stay themselves."""
    lost = np.isfinite(exact) & ~np.isfinite(kept.astype(np.float32))
    if lost.any():
        raise UserError(
            f"{entry.path} has values up to {float(abs(exact[lost]).max()):.3g}, which "
            f"{kept.dtype} cannot hold; use --dtype bfloat16 or float32"
        )


def not_finite(entries: Sequence[Entry], leaves: Mapping[str, Any]) -> str:
    """Says which tensors of a table hold NaN or infinity; "" if none does."""
    bad = [part for e in entries for part in _not_finite(e, leaves[e.path])]
    if not bad:
        return ""
    first = bad[0].keys[0] if bad[0].copies else ", ".join(bad[0].keys)
    return f"WARNING: NaN or infinity in {len(bad)} tensor(s); the first is {first}"


def _not_finite(entry: Entry, leaf: Any) -> list[Entry]:
    """The layers of a stack, or the entry itself, that hold such values."""
    if bool(jnp.isfinite(leaf).all()):
        return []
    parts = entry.parts()
    rows = leaf if entry.layers else [leaf]
    return [p for p, row in zip(parts, rows, strict=True) if not bool(jnp.isfinite(row).all())]
