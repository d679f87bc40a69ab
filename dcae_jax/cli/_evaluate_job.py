"""Of `evaluate`: what every kind of subject is asked for in the same way, checked."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from etils import epath
    from jax.sharding import Mesh

    from dcae_jax.data.pipeline import DataConfig
    from dcae_jax.evals import reference as reference_lib
    from dcae_jax.evals.extract import Extractor, Net
    from dcae_jax.evals.image_sets import ImageSet
    from dcae_jax.evals.parts import Stored, Work
    from dcae_jax.evals.protocol import Kind, Preset
    from dcae_jax.evals.scores import Evaluation, Reference

_A_DEVICE = 16  # images at once on each device, unless --batch says otherwise
PICTURES = 8  # images in a grid


@dataclasses.dataclass(frozen=True)
class Asked:
    """The options that all kinds have."""

    kind: "Kind"
    metrics: tuple[str, ...]
    preset: "Preset"
    nets: "dict[str, Net]"
    reference: "reference_lib.Reference | None"
    mesh: "Mesh"  # the devices of this process
    batch: int  # over them
    out: "epath.Path"

    @functools.cached_property
    def extractor(self) -> "Extractor":
        """The networks on the devices: one set of programs for everything."""
        from dcae_jax.evals import extract, protocol

        return extract.Extractor(
            protocol.arrays_of(self.metrics), self.preset, self.nets, self.mesh
        )

    def reference_arrays(self) -> set[str]:
        """The features whose distribution is compared."""
        from dcae_jax.evals import protocol

        return {protocol.METRICS[metric].reference for metric in self.metrics} - {""}

    def doubts(self) -> dict[str, str | None]:
        """Of each network's weights."""
        return {name: net.doubt for name, net in self.nets.items()}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is evaluated into a folder."""

    out: "epath.Path"
    evaluations: "tuple[Evaluation, ...]"
    skip_bad: bool
    keep_parts: bool
    # What all processes do before, inside the claimed folder.
    prepare: Callable[[], None] | None = None
    write_reference: "epath.Path | None" = None

    def works(self) -> "list[Work]":
        """Everything that is computed in parts, each once."""
        found = {}
        for evaluation in self.evaluations:
            for work in evaluation.works():
                found.setdefault(work.name, work)
        return list(found.values())


def asked(args: argparse.Namespace, kind: "Kind") -> Asked:
    """All that can be checked before data and weights are looked at; UserError if it cannot be."""
    import jax

    from dcae_jax import checkpoint, sharding
    from dcae_jax.config import MeshConfig
    from dcae_jax.errors import UserError
    from dcae_jax.evals import extract, protocol

    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
    if problems := _problems(args):
        raise UserError("\n".join(problems))
    if args.metrics is None:
        metrics = protocol.DEFAULTS[kind]
    else:
        metrics = protocol.parse_metrics(args.metrics, kind)
    nets = {n: extract.find_net(n, args.nets) for n in sorted(protocol.nets_of(metrics))}
    preset = protocol.PRESETS[args.protocol]
    return Asked(
        kind, metrics, preset, nets, _reference(args, metrics, preset), mesh,
        _batch(args, mesh), checkpoint.absolute(args.out),
    )  # fmt: skip


def _problems(args: argparse.Namespace) -> list[str]:
    from dcae_jax.evals.parts import PART

    found = []
    for name, least in (("n", 1), ("batch", 1), ("min_size", 0)):
        if vars(args)[name] is not None and vars(args)[name] < least:
            found.append(
                f"--{name.replace('_', '-')} {vars(args)[name]} must be at least {least}; leave it "
                "out for the default"
            )
    if args.batch is not None and args.batch > PART:
        found.append(f"--batch {args.batch} is more than a part, {PART} images")
    return found


def _batch(args: argparse.Namespace, mesh: "Mesh") -> int:
    """A multiple of the devices of a process, at most a part."""
    from dcae_jax.evals.parts import PART

    wanted = min(args.batch or _A_DEVICE * mesh.size, PART)
    return -(-wanted // mesh.size) * mesh.size


def resolutions(text: str | None, default: int) -> list[int]:
    """The sizes of "256,512"; UserError for what is none."""
    from dcae_jax.errors import UserError

    if text is None:
        return [default]
    found = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not int(part):
            raise UserError(f"--resolution {text}: {part!r} is no number of pixels, as in 256,512")
        found.append(int(part))
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------- data


def slug(*words: str) -> str:
    """A name of words that may stand in a score's name, each once."""
    import re

    parts = [part for word in words for part in re.split(r"[^\w.]+", word) if part]
    return "-".join(dict.fromkeys(parts))


def data_name(args: argparse.Namespace, data: "DataConfig") -> str:
    """What scores call the data: --data-name, or source and split."""
    from dcae_jax.data import pipeline

    return args.data_name or slug(pipeline.open_source(data).name, data.split)


def evenly(n: int) -> tuple[int, ...]:
    """The positions whose pictures are shown: always the same ones."""
    count = min(PICTURES, n)
    return tuple(k * n // count for k in range(count))


# -------------------------------------------------------------------------------------- references


def _reference(
    args: argparse.Namespace, metrics: tuple[str, ...], preset: "Preset"
) -> "reference_lib.Reference | None":
    """The statistics of --reference; UserError if they do not have what the metrics need."""
    from dcae_jax.errors import UserError
    from dcae_jax.evals import protocol, reference

    if args.reference is None:
        return None
    found = reference.read(args.reference)
    for metric in metrics:
        about = protocol.METRICS[metric]
        if about.reference and getattr(found, about.reference) is None and found.images is None:
            raise UserError(f"--reference {args.reference} has no {_STATISTICS[about.reference]}")
        if about.whole and found.images is None:
            raise UserError(
                f"{metric} needs the images of a reference, --reference {args.reference} has "
                "statistics only: leave it out of --metrics, or give ADM's reference batch"
            )
    return found


_STATISTICS = {"pool": "mu and sigma, which FID needs", "spatial": "mu_s and sigma_s (sFID's)"}


def check_side(asked: Asked, side: int) -> None:
    """UserError if images of this size cannot be scored, or compared with the reference."""
    from dcae_jax.errors import UserError
    from dcae_jax.evals import extract

    for metric, least in extract.smallest(asked.metrics).items():
        if side < least:
            raise UserError(
                f"{metric} needs images of {least} px and more, these have {side}: leave it out of "
                "--metrics, or another --resolution"
            )
    known = asked.reference and asked.reference.resolution
    if known and known != side:
        raise UserError(
            f"the reference {asked.reference.name} is of images of {known} px, these have {side}: "
            f"--resolution {known}, or another reference"
        )


def reference(asked: Asked, images: "ImageSet", work: "Work", prefix: str) -> "Reference":
    """What the images of `work` are compared with: that of --reference, else features of parts.

    `prefix`: of the names of the reference's features in `work`; `images`: where these come from.
    """
    from dcae_jax.evals import frechet, scores

    given = asked.reference
    if given is None:
        return scores.Reference(images.name, images.digest, work=work, prefix=prefix)
    gaussians = {name: getattr(given, name) for name in ("pool", "spatial")}
    known: dict[str, frechet.Gaussian] = {k: v for k, v in gaussians.items() if v is not None}
    return scores.Reference(given.name, given.digest, known, given.n, None, "")


def about(asked: Asked, images: "ImageSet", reference: "Reference") -> dict[str, Any]:
    """The part of a protocol that all kinds share."""
    from dcae_jax import provenance
    from dcae_jax.evals import protocol

    found: dict[str, Any] = {"preset": asked.preset.name, "resolution": images.side}
    if asked.reference_arrays():
        found |= {"reference": reference.name, "reference_digest": reference.digest}
    resize = {}
    if asked.reference_arrays():
        resize["features"] = asked.preset.features.value
    if "is" in asked.metrics:
        resize["is"] = asked.preset.score.value
    if resize:
        found["resize"] = resize
    found |= {k: text for k, text in (("ssim", protocol.SSIM), ("lpips", protocol.LPIPS))
              if k in asked.metrics}  # fmt: skip
    if asked.nets:
        found["nets"] = {name: net.sha256 for name, net in asked.nets.items()}
    return found | {"commit": provenance.commit()}


# -------------------------------------------------------------------------------------------- work

_NUMBERS = {"pool": 2048, "spatial": 2023, "logits": 1008}


def numbers(arrays: "set[str]") -> int:
    """Float32 numbers that are kept of an image."""
    return sum(_NUMBERS.get(name, 1) for name in arrays)


def triples(stored: "Stored", caption: str) -> "np.ndarray | None":
    """The grid of originals, what was made of them, and the errors; None if there is no picture.

    Pictures are scaled after the error was taken.
    """
    from dcae_jax.cli import reconstruct
    from dcae_jax.report import images as pictures

    names, shown = stored.pictures()
    if not names:
        return None
    rows, labels = [], []
    for name, (original, made) in zip(names, shown, strict=True):
        rows.append(reconstruct.cells(original, made))
        labels.append(f"{reconstruct.short_name(name)}\n{pictures.psnr(original, made)}")
    return pictures.grid(rows, columns=reconstruct.COLUMNS, labels=labels, caption=caption)
