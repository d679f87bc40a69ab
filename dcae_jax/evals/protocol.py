"""What a score means: the metrics, the presets of protocols, names of scores, comparing two.

Sources of the presets.  `dcae`: the evaluation of DC-AE's authors (pytorch-fid's InceptionV3 and
resize; torch-fidelity's Inception Score; torchmetrics' PSNR, SSIM, LPIPS).  `adm`: the evaluator of
Dhariwal and Nichol 2021 (guided-diffusion), whose graph resizes as TensorFlow 1 did.
"""

import difflib
import enum
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from dcae_jax import config, score_names
from dcae_jax.errors import UserError
from dcae_jax.evals import inception_score
from dcae_jax.nets.inception import Resize

FORMAT = "dcae_jax.metrics/1"  # of FILE
FILE = "metrics.json"
POOL = 2048  # features whose covariance FID needs: singular for fewer images
QUANTISATION = "uint8 = trunc(clamp(255 (0.5 y + 0.5) + 0.5, 0, 255)), originals too"
CROP = "centre, halved by box filters and resized by bicubic as ADM"
NETS_DTYPE = "float32, matmul precision highest"
CONVENTIONS = {  # of metrics
    "ssim": "windows inside the image (torchmetrics before 1.5, scikit-image)",
    "ssim-border": "borders reflected and counted (torchmetrics 1.5 and later)",
    "lpips": "AlexNet of 2 (uint8 / 255) - 1",
}


class Kind(enum.Enum):
    """What is evaluated."""

    autoencoder = "autoencoder"
    generation = "generation"
    images = "images"


class Metric(NamedTuple):
    """One score: what it needs of each image, and how it is shown."""

    arrays: tuple[str, ...]  # of each image, see evals/extract.py
    paired: bool = False  # compares each image with its original
    reference: str = ""  # the array whose distribution in the reference it is compared with
    whole: bool = False  # needs the reference's images one by one, not mean and covariance alone
    net: str = ""
    covariance: bool = False
    least: int = 1  # images
    digits: int = 4
    only: Kind | None = None


METRICS = {
    "psnr": Metric(("mse",), paired=True, digits=3),
    "ssim": Metric(("ssim",), paired=True),
    "ssim-border": Metric(("ssim_border",), paired=True),
    "ms-ssim": Metric(("ms_ssim",), paired=True),
    "lpips": Metric(("lpips",), paired=True, net="lpips"),
    "fid": Metric(("pool",), reference="pool", net="inception", covariance=True, least=2),
    "sfid": Metric(("spatial",), reference="spatial", net="inception", covariance=True, least=2),
    "kid": Metric(
        ("pool",), reference="pool", whole=True, net="inception", least=1000, digits=6
    ),  # subsets
    "is": Metric(("logits",), net="inception", least=10, digits=3),  # splits
    "precision": Metric(("pool",), reference="pool", whole=True, net="inception", least=4),
    "recall": Metric(("pool",), reference="pool", whole=True, net="inception", least=4),
    "latent-rms": Metric(("latent_square",), only=Kind.autoencoder),
}
# FID is called by what it is taken of.
FID_NAMES = {Kind.autoencoder: "rfid", Kind.generation: "gfid", Kind.images: "fid"}
DEFAULTS = {
    Kind.autoencoder: ("psnr", "ssim", "lpips", "fid", "latent-rms"),
    Kind.generation: ("fid", "is"),
    Kind.images: ("fid",),
}


class Labels(enum.Enum):
    """How the classes of generated images are chosen."""

    random = "random"  # drawn one by one, as DC-AE's evaluation does
    balanced = "balanced"  # every class equally often, as ADM's samples: FID is about 0.1 lower


class Preset(NamedTuple):
    """What a published evaluation fixes."""

    name: str
    features: Resize  # before the network of FID, sFID, KID, precision and recall
    score: Resize  # before that of IS
    labels: Labels
    splits: inception_score.Splits  # of IS


PRESETS = {
    "dcae": Preset(
        "dcae", Resize.half_pixel, Resize.tf1, Labels.random, inception_score.TORCH_FIDELITY
    ),
    "adm": Preset("adm", Resize.tf1, Resize.tf1, Labels.balanced, inception_score.ADM),
}


def parse_metrics(text: str, kind: Kind) -> tuple[str, ...]:
    """Names of METRICS in their order there; UserError for a name that does not exist."""
    given = [name.strip().lower() for name in text.split(",")]
    own = FID_NAMES[kind]
    pairs = kind is not Kind.generation  # samples have no originals
    known = [n for n, m in METRICS.items() if m.only in (None, kind) and (pairs or not m.paired)]
    found = []
    for name in given:
        plain = "fid" if name == own else name
        if plain not in known:
            shown = [own if n == "fid" else n for n in known]
            near = (
                [own] if name in FID_NAMES.values() else difflib.get_close_matches(name, shown, 1)
            )
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"--metrics: no {name!r} of {_THINGS[kind]}; {hint}There are {', '.join(shown)}"
            )
        found.append(plain)
    return tuple(name for name in METRICS if name in found)


_THINGS = {
    Kind.autoencoder: "an autoencoder", Kind.generation: "a diffusion model",
    Kind.images: "two sets of images",
}  # fmt: skip


def arrays_of(metrics: Sequence[str]) -> set[str]:
    """What is computed of each image for these metrics."""
    return {name for metric in metrics for name in METRICS[metric].arrays}


def nets_of(metrics: Sequence[str]) -> set[str]:
    """The frozen networks that these metrics need."""
    return {METRICS[metric].net for metric in metrics} - {""}


# ------------------------------------------------------------------------------------------- names


def key_of(metric: str, kind: Kind) -> str:
    """The name of a score in metrics.json: rfid, gfid or fid; else that of the metric."""
    return FID_NAMES[kind] if metric == "fid" else metric


def label(metric: str, kind: Kind, n: int, name: str) -> str:
    """A name to cite, `name` of the reference or the data: rfid50k[imagenet-val-512].

    IS is compared with nothing.
    """
    behind = "" if metric == "is" else f"[{name}]"
    return score_names.named(key_of(metric, kind), n) + behind


class Standing(NamedTuple):
    """Whether a score may be held against other papers' scores, and why not."""

    comparable: bool
    note: str


def standing(
    metric: str, n: int, reference_n: int | None, doubts: dict[str, str | None]
) -> Standing:
    """Of a score of n images; `doubts` of each network's weights, where there is one."""
    about, notes = METRICS[metric], []
    if about.net and (doubt := doubts[about.net]):
        notes.append(f"comparable with nothing ({about.net}: {doubt})")
    if about.covariance:
        for count, whose in ((n, "N"), (reference_n, "reference's N")):
            if count is not None and count < POOL:
                notes.append(
                    f"not comparable ({whose} = {count} < {POOL}: the covariance of {POOL} "
                    "features is singular)"
                )
                break
    return Standing(not notes, "; ".join(notes))


# --------------------------------------------------------------------------------------- comparing

_PAIRED = frozenset(name for name, about in METRICS.items() if about.paired)
_FEATURES = frozenset(("fid", "sfid", "kid", "precision", "recall"))
# Fields of a protocol that matter to some metrics alone; the others matter to all.
_MATTERS = {
    "reference": _FEATURES,
    "reference_digest": _FEATURES,
    "reference_n": _FEATURES,
    "reference_pixels": _FEATURES,
    "originals_digest": _PAIRED,
    "originals_pixels": _PAIRED,
    "resize.features": _FEATURES,
    "resize.is": frozenset(("is",)),
    "nets.inception": _FEATURES | {"is"},
    "nets.lpips": frozenset(("lpips",)),
    "nets_dtype": _FEATURES | {"is", "lpips"},
    "ssim": frozenset(("ssim",)),
    "ssim-border": frozenset(("ssim-border",)),
    "is": frozenset(("is",)),
    "lpips": frozenset(("lpips",)),
}
# Sets of images: NAME_digest is of names and sizes of files or of a file of statistics,
# NAME_pixels of the pixels themselves; where both results have it, that alone counts.
_IMAGES = ("data", "reference", "originals")
# Shown, and no hindrance: how the code was, and names of what has a digest.
_SHOWN = (
    "commit",
    "versions",
    "preset",
    "data",
    "split",
    "reference",
    "originals",
    "decoder_release",
)


class Comparison(NamedTuple):
    """Of two results: a score is in one of the first two."""

    deltas: dict[str, tuple[float, float]]  # score -> (a, b), where the protocols agree
    differing: dict[str, dict[str, tuple[Any, Any]]]  # score -> field -> (a, b), where they do not
    shown: dict[str, tuple[Any, Any]]  # field -> (a, b): different, and no hindrance


def compare(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    """Two results of metrics.json files, score by score, of those that both have with a value."""
    changes, shown = _changes(a["protocol"], b["protocol"])
    deltas, differing = {}, {}
    for name, score in a["scores"].items():
        values = score["value"], b["scores"][name]["value"] if name in b["scores"] else None
        if any(v is None or not math.isfinite(v) for v in values):
            continue
        hindrance = {k: v for k, v in changes.items() if matters(k, name)}
        if hindrance:
            differing[name] = hindrance
        else:
            deltas[name] = values
    return Comparison(deltas, differing, shown)


_Fields = dict[str, tuple[Any, Any]]


def _changes(a: dict[str, Any], b: dict[str, Any]) -> tuple[_Fields, _Fields]:
    """Fields that differ: those that may be a hindrance, and those that are shown only."""
    known = {name for name in _IMAGES if f"{name}_pixels" in a and f"{name}_pixels" in b}
    found: tuple[_Fields, _Fields] = ({}, {})
    for field, values in config.diff(a, b).items():
        found[_is_shown(field, values, known)][field] = values
    return found


def _is_shown(field: str, values: tuple[Any, Any], known: set[str]) -> bool:
    """Weights of one kind, which do not say which, compare with either kind of a run's.

    `known`: sets of images whose pixels both results know.
    """
    name, _, what = field.rpartition("_")
    if name in _IMAGES and what in ("digest", "pixels"):
        return (what == "digest") is (name in known)
    return field.split(".")[0] in _SHOWN or (field == "weights" and config.ABSENT in values)


def matters(field: str, score: str) -> bool:
    """Whether a field of a protocol decides what a score of metrics.json is."""
    return _matters(field, metric_of(score))


def _matters(field: str, metric: str) -> bool:
    return all(metric in some for f, some in _MATTERS.items() if f"{field}.".startswith(f"{f}."))


def metric_of(score: str) -> str:
    """The name in METRICS of a score's name in metrics.json."""
    return "fid" if score in FID_NAMES.values() else score


def differences(
    a: dict[str, Any], b: dict[str, Any], scores: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """The fields of two protocols that differ and matter to any of `scores`, or to every score."""
    metrics = ["", *map(metric_of, scores)]  # "": what matters to all matters to this one too
    changes, _ = _changes(a, b)
    return {k: v for k, v in changes.items() if any(_matters(k, metric) for metric in metrics)}
