"""Of `evaluate`: images as they are, against other images or statistics; statistics of images."""

import argparse
from typing import TYPE_CHECKING, Any

from dcae_jax.cli import _evaluate_job
from dcae_jax.cli._evaluate_job import Asked, Job

if TYPE_CHECKING:
    import numpy as np
    from etils import epath

    from dcae_jax.data.pipeline import DataConfig
    from dcae_jax.evals.image_sets import Batch, ImageSet
    from dcae_jax.evals.parts import Compute, Work
    from dcae_jax.evals.scores import Evaluation, Pixels

_CELL = 192  # pixels of a picture in the grid
_AS_THEY_ARE = "none: images of one size"


def job(args: argparse.Namespace) -> Job:
    """Scores of --images against --against or --reference."""
    from dcae_jax.evals import protocol
    from dcae_jax.evals.protocol import Kind
    from dcae_jax.evals.scores import least_images

    asked = _evaluate_job.asked(args, Kind.images)
    _check_options(args, asked)
    paired = [m for m in asked.metrics if protocol.METRICS[m].paired]
    others = None
    if args.against and asked.reference is None:
        images, others = _both(args, paired)
    else:
        images = _opened(args, "--images", args.images, args.n)
    _evaluate_job.check_side(asked, images.side)
    least_images(asked.metrics, min(images.n, others.n if others else images.n))
    found = _evaluation(args, asked, images, others, bool(paired))
    return Job(asked.out, (found,), args.skip_bad, args.keep_parts)


def _check_options(args: argparse.Namespace, asked: Asked) -> None:
    from dcae_jax.errors import UserError
    from dcae_jax.evals import protocol

    paired = [m for m in asked.metrics if protocol.METRICS[m].paired]
    compared = [m for m in asked.metrics if m in paired or protocol.METRICS[m].reference]
    if compared and not (args.against or args.reference):
        raise UserError(
            f"{', '.join(compared)} of --images {args.images}: against what? Give --against "
            "DIR_OR_NPZ or --reference NPZ"
        )
    if args.against and not compared:
        raise UserError(
            f"--against {args.against}: {', '.join(asked.metrics)} compares with nothing; leave "
            "--against out, or add a metric that compares, such as fid, to --metrics"
        )
    if paired and (args.images.endswith(".npz") or _evaluate_job.reference_file(args)):
        raise UserError(
            f"{_compare(paired)} images of one name: give two folders, --images DIR --against DIR"
        )


def _compare(metrics: list[str]) -> str:
    """Of "psnr compares", "psnr, ssim compare": how a sentence begins."""
    return f"{', '.join(metrics)} compare{'s' if len(metrics) == 1 else ''}"


# ------------------------------------------------------------------------------------- the images


def _both(args: argparse.Namespace, paired: list[str]) -> "tuple[ImageSet, ImageSet]":
    """Both sets; images of one name at one position of each, if any metric needs it."""
    from dcae_jax.errors import UserError

    pairs = _pairs(args, paired) if paired else (None, None)
    images = _opened(args, "--images", args.images, args.n, pairs[0])
    others = _opened(args, "--against", args.against, args.n if paired else None, pairs[1])
    if images.side != others.side:
        raise UserError(
            f"--images {args.images} are of {images.side} px, --against {args.against} of "
            f"{others.side}: --resolution R crops both to one size"
        )
    return images, others


def _opened(
    args: argparse.Namespace, option: str, path: str, n: int | None,
    picked: list[int] | None = None,
) -> "ImageSet":  # fmt: skip
    """The images of a folder or an npz; UserError unless they are squares of one size.

    --data-name is the name of what others are compared with.
    """
    from dcae_jax.data.latents import sha256_of
    from dcae_jax.errors import UserError
    from dcae_jax.evals import npz
    from dcae_jax.evals.image_sets import NpzImages, Records

    size, named = _resolution(args), "--against" if args.against else "--images"
    if path.endswith(".npz"):
        found = npz.images(path)
        if found.side is None or size not in (None, found.side):
            raise UserError(
                f"{option} {path} holds images of {found.width} x {found.height} px, which are not "
                f"cropped here; {size or 'squares'} are needed"
            )
        _check_n(option, path, n, found.n)
        name = _evaluate_job.slug(found.path.name.removesuffix(".npz"))
        return NpzImages(found, name, sha256_of(found.path), found.side, n)
    data = _folder(args, option, path)
    data.resolution = size or _common_side(option, path, data)
    name = _evaluate_job.data_name(data, args.data_name if option == named else None)
    return Records(data, f"{name}-{data.resolution}", None if picked else n, picked)


def _check_n(option: str, path: str, n: int | None, there: int) -> None:
    from dcae_jax.errors import UserError

    if n is not None and n > there:
        raise UserError(f"--n {n}: {option} {path} has {there} images; leave --n out for all")


def _resolution(args: argparse.Namespace) -> int | None:
    from dcae_jax.errors import UserError

    if args.resolution is None:
        return None
    found = _evaluate_job.resolutions(args.resolution, 0)
    if len(found) > 1:
        raise UserError(f"--resolution {args.resolution}: sets of images have one")
    return found[0]


def _folder(args: argparse.Namespace, option: str, path: str) -> "DataConfig":
    from dcae_jax.data import sources
    from dcae_jax.data.pipeline import DataConfig, Transform
    from dcae_jax.data.sources import FolderConfig

    _evaluate_job.require_folder(option, path)
    split = args.split or sources.held_out_split(path)
    return DataConfig(
        FolderConfig(path), split, transform=Transform.center_crop, flip=False, cache_mb=0,
        min_size=args.min_size or 0, max_bad_fraction=1.0,
    )  # fmt: skip


def _common_side(option: str, path: str, data: "DataConfig") -> int:
    """The side of images that are squares of one size; UserError if they are not."""
    import numpy as np

    from dcae_jax.data import pipeline, sources
    from dcae_jax.errors import UserError

    sizes = sources.sizes(pipeline.open_source(data))
    found, counts = np.unique(sizes[sizes.min(axis=1) > 0], axis=0, return_counts=True)
    if not len(found):
        raise UserError(f"{option} {path}: none of its {len(sizes)} files is an image")
    if len(found) == 1 and found[0][0] == found[0][1]:
        return int(found[0][0])
    order = np.argsort(-counts, kind="stable")[:3]
    some = ", ".join(f"{counts[i]} of {found[i][1]} x {found[i][0]} px" for i in order)
    raise UserError(
        f"{option} {path}: its images are no squares of one size ({some}"
        f"{', ...' if len(found) > 3 else ''}); --resolution R crops them in the centre"
    )


def _pairs(args: argparse.Namespace, paired: list[str]) -> tuple[list[int], list[int]]:
    """Positions of the images of one name in both folders; UserError if one has no partner."""
    from dcae_jax.data import pipeline
    from dcae_jax.errors import UserError

    if args.min_size:
        raise UserError(
            f"--min-size {args.min_size} leaves images out, and {_compare(paired)} images of one "
            "name: leave it out, or remove the small images from both folders"
        )
    names = {}
    for option, path in (("--images", args.images), ("--against", args.against)):
        source = pipeline.open_source(_folder(args, option, path))
        names[path] = {name.rsplit(".", 1)[0]: i for i, name in enumerate(source.names())}
        if len(names[path]) < len(source):
            raise UserError(
                f"{option} {path} has images that differ in their suffix alone; pairs need one of "
                "each name"
            )
    first, second = names[args.images], names[args.against]
    if alone := sorted(first.keys() ^ second.keys()):
        raise UserError(
            f"{_compare(paired)} images of one name, but {len(alone)} of "
            f"{len(first)} + {len(second)} have no partner, the first is {alone[0]!r} of "
            f"{args.images if alone[0] in first else args.against}"
        )
    _check_n("--images", args.images, args.n, len(first))
    order = sorted(first)
    chosen = [order[k * len(order) // n] for k in range(n)] if (n := args.n) else order
    return [first[name] for name in chosen], [second[name] for name in chosen]


# ----------------------------------------------------------------------------------------- the work


def _evaluation(
    args: argparse.Namespace, asked: Asked, images: "ImageSet", others: "ImageSet | None",
    paired: bool,
) -> "Evaluation":  # fmt: skip
    from dcae_jax.evals import protocol
    from dcae_jax.evals.scores import Evaluation

    work, other = _works(asked, images, others, paired)
    prefix = "original_" if paired else ""
    reference = _evaluate_job.reference(asked, others or images, other, prefix)
    crop = _AS_THEY_ARE if args.resolution is None else protocol.CROP
    about = {"crop": crop} | _evaluate_job.about(asked, images, reference)
    if paired:
        about |= {"originals": others.name, "originals_digest": others.digest}
    subject = {"source": args.images, "digest": images.digest}
    return Evaluation(
        str(images.side), asked.kind, subject, asked.metrics, work, reference, about,
        asked.doubts(), lambda out, caption: _grid(out, work, reference.work, paired, caption),
        _pixels(asked, work, other, paired),
    )  # fmt: skip


def _pixels(asked: Asked, work: "Work", other: "Work | None", paired: bool) -> "tuple[Pixels, ...]":
    """Where it is written what the images, and those that they are compared with, look like."""
    from dcae_jax.evals.scores import Pixels

    mine = Pixels(work, 0, "subject", ("pixels",))
    if other is None:
        return (mine,)
    if not paired:
        return mine, Pixels(other, 0, "protocol", ("reference_pixels",))
    compared = ["reference_pixels"] if asked.reference_arrays() else []
    return mine, Pixels(work, 1, "protocol", ("originals_pixels", *compared))


def _works(
    asked: Asked, images: "ImageSet", others: "ImageSet | None", paired: bool
) -> "tuple[Work, Work | None]":
    """Of the images, and of what they are compared with: one work where they are pairs."""
    from dcae_jax.evals import protocol
    from dcae_jax.evals.parts import Work

    wanted, theirs = protocol.arrays_of(asked.metrics), asked.reference_arrays()
    numbers, shown = _evaluate_job.numbers, _evaluate_job.evenly(images.n)
    if paired:
        both = Work(
            "images", (images, others), asked.batch, lambda: _compute_pairs(asked, theirs),
            numbers(wanted) + numbers(theirs), shown,
        )  # fmt: skip
        return both, both

    def single(name: str, of: "ImageSet", arrays: set[str], shown: tuple[int, ...]) -> "Work":
        run = _evaluate_job.features
        return Work(name, (of,), asked.batch, lambda: run(asked, arrays), numbers(arrays), shown)

    other = None
    if others is not None:
        other = single("against", others, theirs, _evaluate_job.evenly(others.n))
    return single("images", images, wanted, shown), other


def _compute_pairs(asked: Asked, theirs: set[str]) -> "Compute":
    """Scores of each pair, and features of both."""
    from dcae_jax import sharding

    extractor = asked.extractor

    def run(batches: "list[Batch]") -> dict[str, Any]:
        put = sharding.put_batch({"x": batches[0].image, "y": batches[1].image}, asked.mesh)
        found = extractor.pairs(put["x"], put["y"]) | extractor.features(put["x"])
        of_originals = extractor.features(put["y"], theirs)
        return found | {f"original_{k}": v for k, v in of_originals.items()}

    return run


def _grid(
    out: "epath.Path", work: "Work", other: "Work | None", paired: bool, caption: str
) -> "np.ndarray | None":
    """Pairs with their errors; else a row of the images and one of what they are compared with."""
    from dcae_jax.cli.reconstruct import fitted
    from dcae_jax.evals.parts import Stored
    from dcae_jax.report import images as pictures

    if paired:
        return _evaluate_job.triples(Stored(out, work), caption, first_is_original=False)
    rows = {of.name: Stored(out, of).pictures()[1] for of in (work, other) if of is not None}
    shown = {name: [fitted(p[0], _CELL) for p in some] for name, some in rows.items() if some}
    if not shown:
        return None
    return pictures.grid(list(shown.values()), labels=list(shown), caption=caption)


# ----------------------------------------------------------------------------- reference statistics


def reference_job(args: argparse.Namespace) -> Job:
    """The statistics of --images as a file that others are compared with."""
    from dcae_jax import outputs
    from dcae_jax.errors import UserError
    from dcae_jax.evals.protocol import Kind
    from dcae_jax.evals.scores import least_images

    if args.against or args.reference:
        raise UserError("--write-reference is of --images alone: no --against, no --reference")
    path = outputs.new_file(args.write_reference, ".npz", "--write-reference")
    args.out = args.out or f"{args.write_reference}.parts"
    args.metrics = args.metrics or "fid,sfid"
    asked = _evaluate_job.asked(args, Kind.images)
    if asked.metrics not in (("fid",), ("fid", "sfid")):
        raise UserError(f"--metrics {args.metrics}: a reference has the statistics of fid,sfid")
    images = _opened(args, "--images", args.images, args.n)
    _evaluate_job.check_side(asked, images.side)
    least_images(asked.metrics, images.n)
    found = _evaluation(args, asked, images, None, False)
    return Job(asked.out, (found,), args.skip_bad, args.keep_parts, write_reference=path)


def write_reference(job: Job) -> None:
    """The statistics, once all features are there."""
    from dcae_jax.cli import _evaluate_folder
    from dcae_jax.cli._trained import say
    from dcae_jax.evals import protocol, reference, scores
    from dcae_jax.evals.parts import Stored

    (found,) = job.evaluations
    _evaluate_folder.require_good(job, found)
    stored = Stored(job.out, found.work)
    sums = {name: scores.moments(stored, name) for name in protocol.arrays_of(found.metrics)}
    n = sums["pool"].n
    reference.write(
        job.write_reference, name=found.reference.name, n=n, resolution=found.work.sets[0].side,
        protocol={"n": n} | found.protocol, **{k: v.gaussian() for k, v in sums.items()},
    )  # fmt: skip
    say(f"wrote {job.write_reference}: {found.reference.name}, {n} images")
    if not job.keep_parts:
        _evaluate_folder.remove(job)
