"""Of `evaluate`: an autoencoder, its reconstructions against the images themselves."""

import argparse
import copy
import functools
from typing import TYPE_CHECKING, Any

from dcae_jax.cli import _evaluate_job, _options
from dcae_jax.cli._evaluate_job import Asked, Job

if TYPE_CHECKING:
    import jax

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.config import RunConfig
    from dcae_jax.data.pipeline import DataConfig
    from dcae_jax.evals.image_sets import Batch, Records
    from dcae_jax.evals.parts import Compute
    from dcae_jax.evals.scores import Evaluation
    from dcae_jax.models.base import AutoencoderConfig

_RESOLUTION = 256  # of --images


def job(args: argparse.Namespace, overrides: list[str], meta: dict[str, Any] | None) -> Job:
    """What is asked for; `meta`: of the checkpoint of a run, None for other weights."""
    from dcae_jax.evals.protocol import Kind
    from dcae_jax.evals.scores import least_images

    asked = _evaluate_job.asked(args, Kind.autoencoder)
    data = _data(args, overrides, meta)
    sizes = _evaluate_job.resolutions(args.resolution, data.resolution)
    for side in sizes:
        _evaluate_job.check_side(asked, side)
    images = [_records(args, data, side) for side in sizes]
    least_images(asked.metrics, images[0].n)
    net = _options.load(args)
    _check_net(net, sizes)
    own = {"subject": _subject(net, meta), "weights": _weights(args, meta), "dtype": args.dtype}
    found = [_evaluation(asked, net, records, data, own) for records in images]
    return Job(asked.out, tuple(found), args.skip_bad, args.keep_parts)


# ------------------------------------------------------------------------------------------- data


def _data(
    args: argparse.Namespace, overrides: list[str], meta: dict[str, Any] | None
) -> "DataConfig":
    """The images: of --config, below --images, or held-out ones of the run itself."""
    from dcae_jax.data import sources
    from dcae_jax.data.pipeline import DataConfig, Transform
    from dcae_jax.data.sources import FolderConfig
    from dcae_jax.errors import UserError

    if overrides and args.images:
        raise UserError("--config and --images both name data; give one of them")
    if args.images:
        _evaluate_job.require_folder("--images", args.images)
        split = args.split or sources.held_out_split(args.images)
        data = DataConfig(FolderConfig(args.images), split, _RESOLUTION)
    else:
        data = _of_run(args, overrides, meta)
    data.transform, data.flip, data.workers = Transform.center_crop, False, 0
    data.max_bad_fraction = 1.0  # bad images are told by this command, all of them
    if args.min_size is not None:
        data.min_size = args.min_size
    if problems := data.problems():
        raise UserError("\n".join(problems))
    return data


def _of_run(
    args: argparse.Namespace, overrides: list[str], meta: dict[str, Any] | None
) -> "DataConfig":
    """The data of --config, or of the run, with the split that its evaluators look at."""
    from dcae_jax import config
    from dcae_jax.data.pipeline import DataConfig
    from dcae_jax.errors import UserError

    if overrides:
        run = _options.configured("evaluate", overrides)
    elif meta is not None and meta["data"]:  # "": an import has no data of its own
        run = config.from_json(meta["config"])
    else:
        raise UserError(
            f"{args.source} was not trained here and names no data: give --images DIR, or "
            "--config=FILE"
        )
    if not isinstance(run.data, DataConfig):
        raise UserError("the data of this config are not images; name a config of images")
    data = copy.deepcopy(run.data)
    given = any(a.lstrip("-").startswith("config.data.split") for a in overrides)
    data.split = args.split or (data.split if given else _held_out(run))
    return data


def _held_out(run: "RunConfig") -> str:
    """The split of the evaluator of reconstructions; that of the data where there is none."""
    from dcae_jax.evals.reconstruct import ReconstructConfig

    splits = [e.data.split for e in run.evals if isinstance(e, ReconstructConfig)]
    return splits[0] if splits else run.data.split


def _records(args: argparse.Namespace, data: "DataConfig", side: int) -> "Records":
    """The images at one resolution: all of them, or --n spread over the data."""
    from dcae_jax.evals.image_sets import Records

    data = copy.deepcopy(data)
    data.resolution = side
    with _options.own_options():
        return Records(data, f"{_evaluate_job.data_name(data, args.data_name)}-{side}", args.n)


# ------------------------------------------------------------------------------------ the weights


def _check_net(net: "Autoencoder", sizes: list[int]) -> None:
    from dcae_jax.errors import UserError

    if net.cfg.in_channels != 3:
        raise UserError(f"the autoencoder is for {net.cfg.in_channels} channels; pictures have 3")
    factor = net.cfg.factor
    for side in sizes:
        if side % factor:
            near = max(factor, round(side / factor) * factor)
            raise UserError(
                f"--resolution {side} is not a multiple of the autoencoder's factor {factor}; "
                f"nearest: {near}"
            )


def _subject(net: "Autoencoder", meta: dict[str, Any] | None) -> dict[str, Any]:
    found = {
        "source": net.source, "encoder": net.encoder, "decoder": net.decoder,
        "factor": net.cfg.factor, "latent_channels": net.cfg.latent_channels,
    }  # fmt: skip
    if net.origin is not None:  # still the weights of an import
        found |= {"release": net.origin.release, "imported": net.origin.source}
    return found | ({} if meta is None else {"step": meta["step"]})


def _weights(args: argparse.Namespace, meta: dict[str, Any] | None) -> dict[str, str]:
    """Which of a run's two kinds of weights; nothing of weights that have one kind."""
    two = meta is not None and "ema" in meta["leaves"]
    return {"weights": args.params} if two else {}


# ----------------------------------------------------------------------------------------- the work


def _evaluation(
    asked: Asked, net: "Autoencoder", records: "Records", data: "DataConfig", own: dict[str, Any]
) -> "Evaluation":
    """Everything about one resolution."""
    from dcae_jax.evals import protocol
    from dcae_jax.evals.parts import Stored, Work
    from dcae_jax.evals.scores import Evaluation, Pixels

    name = str(records.side)
    originals = asked.reference_arrays() if asked.reference is None else set()
    wanted = protocol.arrays_of(asked.metrics)
    work = Work(
        name, (records,), asked.batch, lambda: _compute(asked, net, own["dtype"], originals),
        _evaluate_job.numbers(wanted) + _evaluate_job.numbers(originals),
        _evaluate_job.evenly(records.n),
    )  # fmt: skip
    reference = _evaluate_job.reference(asked, records, work, "original_")
    about = _evaluate_job.about(asked, records, reference) | {
        "data": records.name, "data_digest": records.digest, "split": data.split,
        "crop": protocol.CROP, "quantisation": protocol.QUANTISATION, "dtype": own["dtype"],
        "matmul_precision": "highest" if own["dtype"] == "float32" else "default",
        **own["weights"],
    }  # fmt: skip
    return Evaluation(
        name, asked.kind, own["subject"], asked.metrics, work, reference, about,
        asked.doubts(), lambda out, caption: _evaluate_job.triples(Stored(out, work), caption),
        (Pixels(work, 0, "protocol", ("data_pixels", *["reference_pixels"] * bool(originals))),),
    )  # fmt: skip


def _compute(asked: Asked, net: "Autoencoder", dtype: str, originals: set[str]) -> "Compute":
    """Reconstructs a batch and compares it with itself; one program for the whole network."""
    import jax

    from dcae_jax import codec, sharding
    from dcae_jax.models.layers import Dtype

    placed = net.placed(asked.mesh, Dtype(dtype))
    network, extractor = _reconstruct(placed.cfg), asked.extractor

    def run(batches: "list[Batch]") -> dict[str, Any]:
        x = sharding.put_batch({"x": batches[0].image}, asked.mesh)["x"]
        with jax.set_mesh(asked.mesh), codec.precision(Dtype(dtype)):
            found = network(placed.variables, x)
        y = found["output"]
        found |= extractor.pairs(y, x) | extractor.features(y)
        return found | {f"original_{k}": v for k, v in extractor.features(x, originals).items()}

    return run


@functools.cache
def _reconstruct(cfg: "AutoencoderConfig") -> "jax.stages.Wrapped":
    """(weights, uint8 images) -> their reconstructions, and what is known of them on the way."""
    import jax
    import jax.numpy as jnp

    from dcae_jax.evals import metrics
    from dcae_jax.tasks.autoencode import to_float

    model = cfg.build()

    def run(variables: Any, images: "jax.Array") -> "dict[str, jax.Array]":
        latents = model.apply(variables, to_float(images), method="encode")
        found = model.apply(variables, latents, method="decode")
        return {
            "output": metrics.to_uint8(found),
            "finite": jnp.isfinite(found).all(axis=(1, 2, 3)),
            "latent_square": jnp.mean(jnp.square(latents), axis=(1, 2, 3)),
        }

    return jax.jit(run)
