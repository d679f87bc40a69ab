"""Of `evaluate`: what every kind of subject is asked for in the same way, checked."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dcae_jax.cli._trained import say

if TYPE_CHECKING:
    import numpy as np
    from etils import epath
    from jax.sharding import Mesh

    from dcae_jax.data.pipeline import DataConfig
    from dcae_jax.evals import reference as reference_lib
    from dcae_jax.evals.extract import Extractor, Net
    from dcae_jax.evals.image_sets import ImageSet
    from dcae_jax.evals.parts import Compute, Stored, Work
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
    from dcae_jax import checkpoint
    from dcae_jax.errors import UserError
    from dcae_jax.evals import extract, protocol

    if problems := _problems(args):
        raise UserError("\n".join(problems))
    check_data_name(args)
    _require_given(args)
    if args.metrics is None:
        metrics = protocol.DEFAULTS[kind]
    else:
        metrics = protocol.parse_metrics(args.metrics, kind)
    nets = {n: extract.find_net(n, args.nets) for n in sorted(protocol.nets_of(metrics))}
    preset, mesh = protocol.PRESETS[args.protocol], _mesh()
    return Asked(
        kind, metrics, preset, nets, _reference(args, metrics, preset, nets), mesh,
        _batch(args, mesh), checkpoint.absolute(args.out),
    )  # fmt: skip


def _mesh() -> "Mesh":
    """The devices of this process: processes compute for themselves."""
    import jax

    from dcae_jax import sharding
    from dcae_jax.config import MeshConfig

    return sharding.make_mesh(MeshConfig(), jax.local_devices())


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


def data_name(data: "DataConfig", given: str | None) -> str:
    """What scores call the data: --data-name, or source and split (a folder names its own)."""
    from dcae_jax.data import pipeline
    from dcae_jax.data.sources import FolderConfig

    plain = isinstance(data.source, FolderConfig) and not data.source.holdout
    return given or slug(pipeline.open_source(data).name, *[data.split] * (not plain))


def evenly(n: int) -> tuple[int, ...]:
    """The positions whose pictures are shown: always the same ones."""
    count = min(PICTURES, n)
    return tuple(k * n // count for k in range(count))


# -------------------------------------------------------------------------------------- references


def _reference(
    args: argparse.Namespace, metrics: tuple[str, ...], preset: "Preset", nets: "dict[str, Net]"
) -> "reference_lib.Reference | None":
    """The statistics of --reference; UserError if they do not have what the metrics need."""
    from dcae_jax.errors import UserError
    from dcae_jax.evals import protocol, reference

    named = reference_file(args)
    if named is None:
        return None
    if not any(protocol.METRICS[m].reference for m in metrics):
        raise UserError(f"{named} is for FID and its like; --metrics {args.metrics} has none")
    found = reference.read(named, pool=nets["inception"].pool)
    for metric in metrics:
        about = protocol.METRICS[metric]
        if about.reference and getattr(found, about.reference) is None and found.images is None:
            raise UserError(f"reference {named} has no {_STATISTICS[about.reference]}")
        if about.whole and found.images is None:
            raise UserError(
                f"{metric} needs the images of a reference, and {named} has statistics only: leave "
                "it out of --metrics, or give ADM's reference batch"
            )
    _check_protocol(found, preset, nets)
    return found


def reference_file(args: argparse.Namespace) -> str | None:
    """--reference, or --against where that is an npz: the same thing."""
    from dcae_jax.errors import UserError

    against = args.against if args.against and args.against.endswith(".npz") else None
    if args.reference and args.against:
        raise UserError("--reference and --against both name what is compared with; give one")
    return args.reference or against


def _check_protocol(
    found: "reference_lib.Reference", preset: "Preset", nets: "dict[str, Net]"
) -> None:
    """UserError if the statistics were made by another network or resize, where they say it."""
    from dcae_jax.cli._sample_job import short
    from dcae_jax.errors import UserError

    if not found.protocol:
        if found.spatial is not None and preset.name != "adm":
            say(
                f"note: {found.name} has mu_s, as ADM's reference batches do, whose resize is "
                f"another than that of --protocol {preset.name}: --protocol adm fits them"
            )
        return
    mine = {
        "resize.features": preset.features.value, "nets.inception": nets["inception"].sha256
    }  # fmt: skip
    for field, value in mine.items():
        first, second = field.split(".")
        if (theirs := found.protocol[first][second]) != value:
            raise UserError(
                f"the reference {found.name} was made with {field} = {short(theirs)}, not "
                f"{short(value)}: give the --protocol or --nets that it was made with, or write it "
                "anew (--write-reference)"
            )


_STATISTICS = {"pool": "mu and sigma, which FID needs", "spatial": "mu_s and sigma_s (sFID's)"}


def _require_given(args: argparse.Namespace) -> None:
    """UserError if a folder or file that was named is not there."""
    from etils import epath

    from dcae_jax.errors import UserError

    reference_file(args)
    for name in ("images", "against", "reference"):
        path = vars(args)[name]
        if path and name != "reference" and not path.endswith(".npz"):
            require_folder(f"--{name}", path)
        elif path and not epath.Path(path).expanduser().exists():
            raise UserError(f"--{name} {path} does not exist")


def require_folder(option: str, path: str) -> None:
    """UserError if it is none."""
    from etils import epath

    from dcae_jax.errors import UserError

    if not epath.Path(path).expanduser().is_dir():
        raise UserError(f"{option} {path} is no folder of images")


def check_data_name(args: argparse.Namespace) -> None:
    """UserError if --data-name cannot stand in the name of a score."""
    import re

    from dcae_jax.errors import UserError

    if args.data_name is not None and not re.fullmatch(r"[\w.+-]+", args.data_name):
        raise UserError(
            f"--data-name {args.data_name!r} must be letters, digits and ._+-, as in imagenet-val"
        )


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
    from dcae_jax.evals import frechet, protocol, scores

    given = asked.reference
    if given is None:
        return scores.Reference(images.name, images.digest, work=work, prefix=prefix)
    gaussians = {name: getattr(given, name) for name in ("pool", "spatial")}
    known: dict[str, frechet.Gaussian] = {k: v for k, v in gaussians.items() if v is not None}
    needed = {
        about.reference for about in map(protocol.METRICS.__getitem__, asked.metrics)
        if about.reference and (about.whole or about.reference not in known)
    }  # fmt: skip
    other = _work_of_reference(asked, images.side, needed) if needed else None
    return scores.Reference(given.name, given.digest, known, given.n, other)


def _work_of_reference(asked: Asked, side: int, needed: set[str]) -> "Work":
    """Features of the images in the file of a reference."""
    from dcae_jax.errors import UserError
    from dcae_jax.evals.image_sets import NpzImages
    from dcae_jax.evals.parts import Work

    given = asked.reference
    if given.images.side != side:
        raise UserError(
            f"the reference {given.name} has images of {given.images.width} x "
            f"{given.images.height} px, these have {side} x {side}"
        )
    images = NpzImages(given.images, given.name, given.digest, side)
    return Work(
        "reference", (images,), asked.batch, lambda: features(asked, needed), numbers(needed)
    )


def about(asked: Asked, images: "ImageSet", reference: "Reference") -> dict[str, Any]:
    """The part of a protocol that all kinds share."""
    from dcae_jax import provenance
    from dcae_jax.evals import protocol

    found: dict[str, Any] = {"preset": asked.preset.name, "resolution": images.side}
    if asked.reference_arrays():
        found |= {"reference": reference.name, "reference_digest": reference.digest}
        other = reference.work.n if reference.n is None and reference.work else reference.n
        found |= {} if other is None else {"reference_n": other}
    resize = {}
    if asked.reference_arrays():
        resize["features"] = asked.preset.features.value
    if "is" in asked.metrics:
        resize["is"] = asked.preset.score.value
        found["is"] = str(asked.preset.splits)
    if resize:
        found["resize"] = resize
    found |= {k: text for k, text in protocol.CONVENTIONS.items() if k in asked.metrics}
    if asked.nets:
        found["nets"] = {name: net.sha256 for name, net in asked.nets.items()}
        found["nets_dtype"] = protocol.NETS_DTYPE
    return found | {"commit": provenance.commit()}


# -------------------------------------------------------------------------------------------- work

_NUMBERS = {"pool": 2048, "spatial": 2023, "logits": 1008}


def numbers(arrays: "set[str]") -> int:
    """Float32 numbers that are kept of an image."""
    return sum(_NUMBERS.get(name, 1) for name in arrays)


def features(asked: Asked, wanted: set[str]) -> "Compute":
    """Features of images as they are."""
    from dcae_jax import sharding

    extractor = asked.extractor

    def run(batches: "list[Batch]") -> dict[str, Any]:
        images = sharding.put_batch({"x": batches[0].image}, asked.mesh)["x"]
        return extractor.features(images, wanted)

    return run


def triples(stored: "Stored", caption: str, first_is_original: bool = True) -> "np.ndarray | None":
    """The grid of originals, what was made of them, and the errors; None if there is no picture.

    Pictures are scaled after the error was taken.
    """
    from dcae_jax.cli import reconstruct
    from dcae_jax.report import images as pictures

    names, shown = stored.pictures()
    if not names:
        return None
    rows, labels = [], []
    for name, pair in zip(names, shown, strict=True):
        original, made = pair if first_is_original else pair[::-1]
        rows.append(reconstruct.cells(original, made))
        labels.append(f"{reconstruct.short_name(name)}\n{pictures.psnr(original, made)}")
    return pictures.grid(rows, columns=reconstruct.COLUMNS, labels=labels, caption=caption)
