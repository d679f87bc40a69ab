"""config.json of the PyTorch layouts, to and from our model configs.

Sources: the fields of diffusers' AutoencoderDC and AutoencoderKL with the defaults that an absent
field has there; the official repositories' {"model_name": ...}.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from dcae_jax import config as config_lib
from dcae_jax.config import JSONValue
from dcae_jax.convert import releases
from dcae_jax.convert.names import AnyConfig, Layout
from dcae_jax.errors import UserError
from dcae_jax.models.dcae import SCALES, BlockKind, DCAEConfig, StagesConfig
from dcae_jax.models.kl_vae import KLVAEConfig, sd_vae_f8
from dcae_jax.models.layers import Act, Downsample, Norm, Upsample

CUSTOM = "custom"  # model_name of an official-layout folder whose network is ours to describe
OWN_WEIGHTS = "own_weights"  # true: model_name is that of the network, and not of the weights
# diffusers' classes of denoising networks; `diffusion_layouts` reads them.
DIFFUSION = ("DiTTransformer2DModel", "Transformer2DModel")
# model_type of transformers' masked autoencoders; `mae_layouts` reads them.
MASKED = "vit_mae"
SD_VAE_FACTOR = 0.18215  # what diffusers takes for an AutoencoderKL whose config has no factor


class Described(NamedTuple):
    """What a config.json says."""

    cfg: AnyConfig
    scaling_factor: float | None
    release: str | None
    layout: Layout
    extra: dict[str, JSONValue]  # fields that say nothing of the network, to be given back


def layout_of(fields: JSONValue, where: str) -> Layout:
    """The layout of a config.json of any network that is known here; UserError if it is none."""
    if isinstance(fields, dict) and "model_type" in fields and "model_name" not in fields:
        if fields["model_type"] == MASKED:
            return Layout.vit_mae
        raise UserError(
            f"{where} describes transformers' {fields['model_type']}; of transformers' networks "
            f"{MASKED} is known here (ViTMAEForPreTraining, ViTMAEModel): the masked autoencoder "
            "before it was fine-tuned"
        )
    name = _class(fields, where, (*_READERS, *DIFFUSION))
    return Layout.official if name is None else Layout.diffusers


def _class(fields: JSONValue, where: str, known: Iterable[str]) -> str | None:
    """The diffusers class of a config.json, None for the official layout."""
    if not isinstance(fields, dict):
        raise UserError(f"{where} holds {fields!r:.50}, not the fields of an autoencoder")
    if "model_name" in fields:
        return None
    name = fields["_class_name"] if "_class_name" in fields else None
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"{where} describes {name or 'no known class'}; known are diffusers' "
            f'{", ".join(known)} ("_class_name") and the official '
            '{"model_name": ...}. For another network\'s folder give the folder of its autoencoder '
            "(often vae/)"
        )
    return name


def read(fields: JSONValue, where: str) -> Described:
    """The network of a config.json; UserError names the field that has no counterpart here."""
    name = _class(fields, where, _READERS)
    if name is None:
        return _read_official(Fields(fields, where))
    cfg, factor = _READERS[name](Fields(fields, where))
    extra = {k: fields[k] for k in _KL_EXTRA if k in fields and name == "AutoencoderKL"}
    return Described(cfg, factor, None, Layout.diffusers, extra)


class FieldType(NamedTuple):
    """What a field may hold."""

    words: str
    fits: Callable[[Any], bool]


def _list_of(item: FieldType) -> FieldType:
    return FieldType(
        f"a list, each {item.words}", lambda v: isinstance(v, list) and all(map(item.fits, v))
    )


def or_null(kind: FieldType) -> FieldType:
    """That, or null."""
    return FieldType(f"{kind.words} or null", lambda v: v is None or kind.fits(v))


WHOLE = FieldType("a whole number", lambda v: type(v) is int)
FLAG = FieldType("true or false", lambda v: type(v) is bool)
ANY = FieldType("anything", lambda v: True)
TEXT = FieldType("a text", lambda v: type(v) is str)
NUMBER = FieldType("a number", lambda v: type(v) in (int, float))
WHOLES, _SCALES, _TEXTS = _list_of(WHOLE), _list_of(_list_of(WHOLE)), _list_of(TEXT)
_STAGES = FieldType("a text, or a list of texts", lambda v: TEXT.fits(v) or _TEXTS.fits(v))
_FACTOR = FieldType(
    "a positive number (1 / RMS of the latents)",
    lambda v: type(v) in (int, float) and 0 < v < math.inf,
)


class Fields:
    """The fields of a config.json with the defaults of its class; mistakes name file and field."""

    def __init__(self, fields: dict[str, JSONValue], where: str):
        self._fields, self.where = fields, where

    def get(self, name: str, kind: FieldType, default: Any) -> Any:
        """The value of a field; UserError if it is of another kind."""
        if name not in self._fields:
            return default
        value = self._fields[name]
        if not kind.fits(value):
            raise UserError(f"{self.where}: {name} = {value!r} is not {kind.words}")
        return value

    def factor(self, default: float | None) -> float | None:
        """The scaling factor; null says that it is unknown."""
        absent = "scaling_factor" in self._fields and self._fields["scaling_factor"] is None
        return default if absent else self.get("scaling_factor", _FACTOR, default)

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return name in self._fields

    def choose(self, name: str, value: JSONValue, known: dict[Any, Any]) -> Any:
        """What stands for a value of a field; UserError if nothing does."""
        if value not in known:
            raise self.refuse(name, value, f"known are {', '.join(map(str, known))}")
        return known[value]

    def expect(self, name: str, default: JSONValue, *allowed: JSONValue) -> None:
        """UserError unless the field has one of these values."""
        value = self._fields[name] if name in self._fields else default
        if value not in (default, *allowed):
            raise self.refuse(name, value, f"supported is {default!r}")

    def refuse(self, name: str, value: JSONValue, why: str) -> UserError:
        """What to raise for a value that cannot be."""
        return UserError(f"{self.where}: {name} = {value!r} has no counterpart here; {why}")

    def check_names(self, known: set[str]) -> None:
        """UserError if there are fields whose meaning is not known."""
        unknown = [k for k in self._fields if not k.startswith("_") and k not in known]
        if unknown:
            raise UserError(
                f"{self.where}: unknown field(s) {', '.join(sorted(unknown))}; this version knows "
                f"{', '.join(sorted(known))}"
            )


# -------------------------------------------------------------------------------- AutoencoderDC

_NORMS = {"rms_norm": Norm.rms, "batch_norm": Norm.batch}
_ACTS = {"silu": Act.silu, "swish": Act.silu, "relu": Act.relu}
_W6 = [128, 256, 512, 512, 1024, 1024]
_FIVES = [[], [], [], [5], [5], [5]]
_UPS = {"pixel_shuffle": Upsample.conv_shuffle, "interpolate": Upsample.interpolate_conv}
_DC_FIELDS = {
    "in_channels", "latent_channels", "attention_head_dim", "upsample_block_type",
    "downsample_block_type", "decoder_norm_types", "decoder_act_fns", "encoder_out_shortcut",
    "decoder_in_shortcut", "decoder_conv_act_fn", "scaling_factor",
    *(f"{side}_{name}" for side in ("encoder", "decoder") for name in (
        "block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")),
}  # fmt: skip


def _per_stage(value: JSONValue, n: int) -> list[JSONValue]:
    return [value] * n if isinstance(value, str) else list(value)


def _read_dc(fields: Fields) -> tuple[DCAEConfig, float | None]:
    fields.check_names(_DC_FIELDS)
    shortcuts = fields.get("encoder_out_shortcut", FLAG, True)
    if fields.get("decoder_in_shortcut", FLAG, True) != shortcuts:
        raise fields.refuse("decoder_in_shortcut", not shortcuts, "it must equal that of the out")
    up = fields.get("upsample_block_type", TEXT, "pixel_shuffle")
    down = fields.get("downsample_block_type", TEXT, "pixel_unshuffle")
    act = fields.get("decoder_conv_act_fn", TEXT, "relu")
    cfg = DCAEConfig(
        in_channels=fields.get("in_channels", WHOLE, 3),
        latent_channels=fields.get("latent_channels", WHOLE, 32),
        encoder=_read_side(fields, "encoder", [2, 2, 2, 3, 3, 3], "rms_norm", "silu"),
        decoder=_read_side(
            fields, "decoder", [3] * 6, fields.get("decoder_norm_types", _STAGES, "rms_norm"),
            fields.get("decoder_act_fns", _STAGES, "silu"),
        ),
        # diffusers strides for every value but this one, and shuffles for every one but that.
        downsample=Downsample.conv_unshuffle if down == "pixel_unshuffle" else Downsample.conv,
        upsample=_UPS["interpolate" if up == "interpolate" else "pixel_shuffle"],
        out_act=fields.choose("decoder_conv_act_fn", act, _ACTS),
        latent_shortcuts=shortcuts,
        head_dim=fields.get("attention_head_dim", WHOLE, 32),
    )  # fmt: skip
    return cfg, fields.factor(None)


def _read_side(
    fields: Fields, side: str, depths: list[int], norms: JSONValue, acts: JSONValue
) -> StagesConfig:
    widths = fields.get(f"{side}_block_out_channels", WHOLES, _W6)
    n = len(widths)
    types = _per_stage(fields.get(f"{side}_block_types", _STAGES, "ResBlock"), n)
    scales = fields.get(f"{side}_qkv_multiscales", _SCALES, _FIVES)
    rows = {"block_types": types, "qkv_multiscales": scales}
    for name, row in rows.items():
        if len(row) != n:
            raise fields.refuse(f"{side}_{name}", row, f"{side}_block_out_channels has {n} stages")
    kinds = {tuple(v): k for k, v in SCALES.items()}
    blocks = tuple(
        BlockKind.res if kind == "ResBlock"
        else fields.choose(f"{side}_qkv_multiscales", tuple(s), kinds)
        for kind, s in zip(types, scales, strict=True)
        if fields.choose(f"{side}_block_types", kind, {"ResBlock": 1, "EfficientViTBlock": 1})
    )  # fmt: skip
    return StagesConfig(
        widths=tuple(widths),
        depths=tuple(fields.get(f"{side}_layers_per_block", WHOLES, depths)),
        blocks=blocks,
        norms=tuple(fields.choose(f"{side}_norm_types", v, _NORMS) for v in _per_stage(norms, n)),
        acts=tuple(fields.choose(f"{side}_act_fns", v, _ACTS) for v in _per_stage(acts, n)),
    )


def _dc_problems(cfg: DCAEConfig) -> list[str]:
    """What AutoencoderDC cannot express."""
    found = []
    if not cfg.residual:
        found.append("residual = False: its blocks always have shortcuts")
    for stage in cfg.stages(cfg.encoder):
        if stage.norm is not Norm.rms:
            found.append(f"encoder.norms[{stage.index}] = {stage.norm.value}: it knows rms there")
        if stage.act is not Act.silu and stage.block is BlockKind.res:
            found.append(f"encoder.acts[{stage.index}] = {stage.act.value}: it knows silu there")
    return found


def _name(known: dict[str, Any], value: Any) -> str:
    return next(name for name, member in known.items() if member is value)


def _dc_fields(cfg: DCAEConfig) -> dict[str, JSONValue]:
    found: dict[str, JSONValue] = {
        "in_channels": cfg.in_channels,
        "latent_channels": cfg.latent_channels,
        "attention_head_dim": cfg.head_dim,
        "downsample_block_type": (
            "pixel_unshuffle" if Downsample(cfg.downsample) is Downsample.conv_unshuffle else "conv"
        ),
        "upsample_block_type": _name(_UPS, Upsample(cfg.upsample)),
        "decoder_norm_types": [_name(_NORMS, Norm(n)) for n in cfg.decoder.norms],
        "decoder_act_fns": [_name(_ACTS, Act(a)) for a in cfg.decoder.acts],
        "encoder_out_shortcut": cfg.latent_shortcuts,
        "decoder_in_shortcut": cfg.latent_shortcuts,
        "decoder_conv_act_fn": _name(_ACTS, Act(cfg.out_act)),
    }
    for name, side in (("encoder", cfg.encoder), ("decoder", cfg.decoder)):
        kinds = [BlockKind(b) for b in side.blocks]
        found |= {
            f"{name}_block_types": [
                "ResBlock" if k is BlockKind.res else "EfficientViTBlock" for k in kinds
            ],
            f"{name}_block_out_channels": list(side.widths),
            f"{name}_layers_per_block": list(side.depths),
            f"{name}_qkv_multiscales": [list(SCALES[k]) if k in SCALES else [] for k in kinds],
        }
    return found


# -------------------------------------------------------------------------------- AutoencoderKL

_KL_FIELDS = {
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "act_fn", "latent_channels", "norm_num_groups", "sample_size",
    "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast",
    "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
}  # fmt: skip
# What only pipelines read: the size that tiling assumes, and whether half precision overflows.
_KL_EXTRA = ("sample_size", "force_upcast")
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


def _read_kl(fields: Fields) -> tuple[KLVAEConfig, float | None]:
    fields.check_names(_KL_FIELDS)
    widths = fields.get("block_out_channels", WHOLES, [64])
    fields.expect("down_block_types", [_DOWN] * len(widths))
    fields.expect("up_block_types", [_UP] * len(widths))
    fields.expect("act_fn", "silu", "swish")
    fields.expect("out_channels", fields.get("in_channels", WHOLE, 3))
    # Latents here are scaled by one number; a shift would be lost without a word.
    fields.expect("shift_factor", None, 0, 0.0)
    fields.expect("latents_mean", None)
    fields.expect("latents_std", None)
    cfg = KLVAEConfig(
        in_channels=fields.get("in_channels", WHOLE, 3),
        latent_channels=fields.get("latent_channels", WHOLE, 4),
        widths=tuple(widths),
        layers_per_block=fields.get("layers_per_block", WHOLE, 1),
        norm_groups=fields.get("norm_num_groups", WHOLE, 32),
        mid_attention=fields.get("mid_block_add_attention", FLAG, True),
        quant_conv=fields.get("use_quant_conv", FLAG, True),
        post_quant_conv=fields.get("use_post_quant_conv", FLAG, True),
    )
    known = SD_VAE_FACTOR if not network_differences(cfg, sd_vae_f8()) else None
    return cfg, fields.factor(known)


def _kl_fields(cfg: KLVAEConfig) -> dict[str, JSONValue]:
    n = len(cfg.widths)
    return {
        "in_channels": cfg.in_channels,
        "out_channels": cfg.in_channels,
        "down_block_types": [_DOWN] * n,
        "up_block_types": [_UP] * n,
        "block_out_channels": list(cfg.widths),
        "layers_per_block": cfg.layers_per_block,
        "act_fn": "silu",
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": cfg.norm_groups,
        "sample_size": 32 * cfg.factor,
        "use_quant_conv": cfg.quant_conv,
        "use_post_quant_conv": cfg.post_quant_conv,
        "mid_block_add_attention": cfg.mid_attention,
    }


_READERS = {"AutoencoderDC": _read_dc, "AutoencoderKL": _read_kl}


# ------------------------------------------------------------------------------------- official


def _read_official(fields: Fields) -> Described:
    name, factor = fields.get("model_name", TEXT, ""), fields.factor(None)
    if name == CUSTOM:
        cfg = own_config(fields, (DCAEConfig,), "a DC-AE")
        return Described(cfg, factor, None, Layout.official, {})
    release, diffusion = releases.named(name), releases.diffusion_named(name)
    if diffusion is not None:  # its official files hold the autoencoder, too
        release = releases.DIFFUSION[diffusion].autoencoder
    if release is None:
        raise UserError(
            f"{fields.where}: no release is called {name!r}; there are "
            f"{', '.join(releases.RELEASES)}. For other weights of one of these networks change "
            "model_name to it"
        )
    found = releases.RELEASES[release]
    if fields.get(OWN_WEIGHTS, FLAG, False):
        return Described(with_release(found.config(), None), factor, None, Layout.official, {})
    factor = found.scaling_factor if factor is None else factor
    return Described(found.config(), factor, release, Layout.official, {})


def own_config(fields: Fields, kinds: tuple[type, ...], what: str) -> Any:
    """The network of a folder that this package wrote for itself; UserError if it is not `what`."""
    if not fields.has("dcae_jax"):
        raise UserError(f"{fields.where}: a custom model needs its config under the key dcae_jax")
    try:
        cfg = config_lib.from_json(fields.get("dcae_jax", ANY, None))
        found = cfg.problems() if isinstance(cfg, kinds) else [f"it is a {type(cfg).__name__}"]
    except (TypeError, ValueError, AttributeError, LookupError) as e:
        found = [f"{type(e).__name__}: {e}"]
    if found:
        raise UserError(f"{fields.where}: dcae_jax is no config of {what} ({'; '.join(found)})")
    return cfg


# -------------------------------------------------------------------------------------- writing


def problems(cfg: AnyConfig, layout: Layout) -> list[str]:
    """Why a network cannot be written in a layout."""
    if isinstance(cfg, KLVAEConfig):
        return [] if layout is Layout.diffusers else ["AutoencoderKL has no official layout"]
    return _dc_problems(cfg) if layout is Layout.diffusers else []


def write(
    cfg: AnyConfig, layout: Layout, scaling_factor: float, network: str | None,
    own_weights: bool = False, extra: Mapping[str, JSONValue] | None = None,
) -> dict[str, JSONValue]:  # fmt: skip
    """The config.json of a network.

    In the official layout `network` is a release that has it, and `own_weights` says that the
    weights are not that release's.  `extra`: of `Described`.
    """
    if found := problems(cfg, layout):
        lines = "\n".join(f"  - {p}" for p in found)
        hint = "" if isinstance(cfg, KLVAEConfig) else "; --to official keeps our own config"
        raise UserError(f"the {layout.value} layout cannot express this network{hint}:\n{lines}")
    if layout is Layout.official:
        return _official_fields(cfg, scaling_factor, network, own_weights)
    if isinstance(cfg, KLVAEConfig):
        fields = {"_class_name": "AutoencoderKL", **_kl_fields(cfg), **(extra or {})}
    else:
        fields = {"_class_name": "AutoencoderDC", **_dc_fields(cfg)}
    return {**fields, "scaling_factor": scaling_factor}


def _official_fields(
    cfg: AnyConfig, scaling_factor: float, network: str | None, own_weights: bool
) -> dict[str, JSONValue]:
    factor = {"scaling_factor": scaling_factor}
    if network is None:
        return {"model_name": CUSTOM, "dcae_jax": config_lib.to_json(cfg), **factor}
    what = releases.RELEASES[network]
    name = {"model_name": what.official}
    if own_weights:
        return {**name, OWN_WEIGHTS: True, **factor}
    return {**name, **({} if what.scaling_factor == scaling_factor else factor)}


# ------------------------------------------------------------------------------------- comparing


def network_differences(a: AnyConfig, b: AnyConfig) -> list[str]:
    """How two networks differ in what their numbers depend on, as `field: a, b`."""
    if type(a) is not type(b):
        return [f"class: {type(a).__name__}, {type(b).__name__}"]
    pairs = config_lib.diff(_network(a), _network(b))
    return [f"{name}: {x}, {y}" for name, (x, y) in pairs.items()]


# What leaves the function of a network alone: precision, memory, and how it trains.
_NOT_FUNCTION = (
    "dtype", "conv_dtype", "remat", "depthwise", "adaptive_channels", "last_norm_scale_init",
    "batch_norm", "batch_norm_stages",
)  # fmt: skip


def _network(cfg: AnyConfig) -> JSONValue:
    found = config_lib.to_json(cfg)
    if isinstance(cfg, DCAEConfig):
        found |= {"encoder": _sides(cfg, cfg.encoder), "decoder": _sides(cfg, cfg.decoder)}
    return {k: v for k, v in found.items() if k not in _NOT_FUNCTION}


def _sides(cfg: DCAEConfig, side: StagesConfig) -> JSONValue:
    """One text a stage; an empty stage counts for its being empty only."""
    return {
        f"stage_{s.index}": f"{s.depth} x {s.block.value} of {s.width}, {s.norm.value}"
        + (f", {s.act.value}" if s.block is BlockKind.res else "")
        for s in cfg.stages(side)
    }


def same_network(cfg: AnyConfig) -> list[str]:
    """The releases that have this network."""
    every = releases.RELEASES.items()
    return [name for name, what in every if not network_differences(cfg, what.config())]


def with_release(cfg: AnyConfig, release: str | None) -> AnyConfig:
    """The config with what only the release tells: whether prefixes of the latent are trained."""
    cfg = copy.deepcopy(cfg)
    if isinstance(cfg, DCAEConfig):
        known = releases.RELEASES[release].config() if release else DCAEConfig()
        cfg.adaptive_channels = known.adaptive_channels
    return cfg
