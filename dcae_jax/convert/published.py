"""The scores that others have published for released weights, each with its protocol and source.

The only place where they stand.  Left out is what could be read at third hand only: other rows of
the papers' tables.  Digits are kept as printed: the last one says how far it was rounded.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from dcae_jax import config

README = "official README"
PAPER = "paper (arXiv 2410.10733, Table 2), as quoted by others"


class Published(NamedTuple):
    """Scores of one set of weights under one protocol."""

    weights: str  # a key of releases.RELEASES or releases.DIFFUSION
    kind: str  # "autoencoder" or "generation", as in metrics.json
    protocol: Mapping[str, Any]  # the fields of a protocol block that they hold for, flat
    scores: Mapping[str, str]
    source: str
    note: str = ""


class Comparison(NamedTuple):
    """A score of ours against a published one."""

    difference: float  # ours minus published
    digits: int  # behind the point, of what was published
    within: bool  # ours rounds to what was published, or lies on the edge of that


_RESIZE = {"resize.features": "half_pixel"}  # before FID's network: pytorch-fid's


def _reconstruction(
    weights: str, data: str, n: int, resolution: int, scores: Mapping[str, str], source: str,
    note: str = "",
) -> Published:  # fmt: skip
    name = f"{data}-{resolution}"  # rFID is to the originals themselves
    protocol = {
        "data": name, "reference": name, "reference_n": n, "n": n, "dtype": "float32", **_RESIZE,
    }  # fmt: skip
    return Published(weights, "autoencoder", protocol, scores, source, note)


_TRAINING_IMAGES = 1_281_167  # of ImageNet: the reference of published gFIDs
_SAMPLERS: dict[str, dict[str, Any]] = {
    "uvit": {"sampler": "dpm_fast", "steps": 30, "sampler_options.end": 0.001},
    "usit": {
        "sampler": "dopri5", "sampler_options.rtol": 1e-3, "sampler_options.atol": 1e-6,
        "sampler_options.end": 0.0,
    },
    "dit": {"sampler": "ddpm", "steps": 250, "sampler_options.variance": "learned"},
}  # fmt: skip


def _generation(weights: str, guidance: float, fid: str) -> Published:
    family = next(name for name in _SAMPLERS if f"-{name}-" in weights)
    protocol = {
        "n": 50_000, "resolution": 512, "labels": "random", "seed": 0, "dtype": "float32",
        "guidance.scale": guidance, "guidance.reference": "null_class", "guidance.start": 0.0,
        "guidance.stop": 1.0, "guidance.channels": 0, "reference_n": _TRAINING_IMAGES,
        "decoder_release": weights.partition(f"-{family}-")[0], **_SAMPLERS[family], **_RESIZE,
    }  # fmt: skip
    return Published(weights, "generation", protocol, {"gfid": fid}, README)


_IN32, _IN64 = "dc-ae-f32c32-in-1.0", "dc-ae-f64c128-in-1.0"
# Of each diffusion model: its guidance, FID without and with it (ImageNet 512, batch 256 unless
# its name says otherwise).
_FIDS = {
    f"{_IN32}-uvit-s-in-512px": (1.5, "46.12", "18.08"),
    f"{_IN32}-dit-xl-in-512px": (1.3, "9.56", "2.84"),
    f"{_IN32}-dit-xl-in-512px-trainbs1024": (1.5, "6.88", "2.41"),
    f"{_IN32}-uvit-h-in-512px": (1.5, "9.83", "2.53"),
    f"{_IN32}-uvit-2b-in-512px": (1.5, "8.13", "2.30"),
    f"{_IN32}-usit-h-in-512px": (1.2, "3.80", "1.89"),
    f"{_IN32}-usit-2b-in-512px": (1.15, "2.90", "1.72"),
    f"{_IN64}-uvit-h-in-512px": (1.5, "13.96", "3.01"),
    f"{_IN64}-uvit-h-in-512px-train2000k": (1.5, "12.26", "2.66"),
    f"{_IN64}-uvit-2b-in-512px": (1.5, "7.78", "2.47"),
    f"{_IN64}-uvit-2b-in-512px-train2000k": (1.5, "6.50", "2.25"),
}

PUBLISHED: tuple[Published, ...] = (
    _reconstruction(
        _IN64, "imagenet-val", 50_000, 512,
        {"rfid": "0.2168", "psnr": "26.149", "ssim": "0.7105", "lpips": "0.0802",
         "latent-rms": "3.4593"}, README,
    ),
    _reconstruction(
        _IN32, "imagenet-val", 50_000, 256,
        {"rfid": "0.69", "psnr": "23.85", "ssim": "0.66", "lpips": "0.082"}, PAPER,
        "the paper says f32c32, not which file of weights",
    ),
    _reconstruction(
        "dc-ae-f32c32-sana-1.0", "mjhq-30k", 30_000, 1024, {"rfid": "0.339", "psnr": "29.31"},
        README,
    ),
    _reconstruction(
        "dc-ae-f32c32-sana-1.1", "mjhq-30k", 30_000, 1024, {"rfid": "0.314", "psnr": "29.74"},
        README,
    ),
    *(
        _generation(name, guidance, fid)
        for name, (scale, without, guided) in _FIDS.items()
        for guidance, fid in ((1.0, without), (scale, guided))
    ),
)  # fmt: skip


def of(weights: str, kind: str) -> list[Published]:
    """What is published of these weights."""
    return [p for p in PUBLISHED if p.weights == weights and p.kind == kind]


def misses(published: Published, protocol: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{field: (ours, published)} of what keeps a protocol from being the published one.

    Without a score that is compared with a reference there is none to differ.
    """
    ours = config.flatten(protocol)
    wanted = {
        k: v for k, v in published.protocol.items()
        if not k.startswith(("reference", *_RESIZE)) or "reference" in ours
    }  # fmt: skip
    found = {name: (ours.get(name), value) for name, value in wanted.items()}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def compare(ours: float, published: str) -> Comparison:
    """Ours against a number that was rounded to its last digit; exact in decimals."""
    exact = Decimal(published)
    difference, digits = Decimal(repr(ours)) - exact, -int(exact.as_tuple().exponent)
    return Comparison(float(difference), digits, abs(difference) <= Decimal(5).scaleb(-digits - 1))
