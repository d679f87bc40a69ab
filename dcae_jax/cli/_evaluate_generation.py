"""Of `evaluate`: samples of a diffusion model, drawn into a folder that `sample` continues."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any

from dcae_jax.cli import _evaluate_job, _sample_draw, _sample_folder, _sample_job, _trained
from dcae_jax.cli._evaluate_job import Asked, Job

if TYPE_CHECKING:
    import numpy as np
    from etils import epath

    from dcae_jax.diffusion.process import ProcessConfig
    from dcae_jax.diffusion.samplers import SamplerConfig
    from dcae_jax.evals.image_sets import Batch
    from dcae_jax.evals.parts import Work
    from dcae_jax.evals.scores import Evaluation

_N = 50_000  # of published scores
_SEED = 0  # likewise: of the classes and of the noise
_FOLDER = "samples"  # in --out
_THREADS = 8  # that read PNGs
# Options of --from RUN that say how samples are drawn, with what they are when not given.
_DRAWING: dict[str, Any] = {
    "labels": None, "seed": None, "sampler": None, "steps": None, "sampler_option": [], "cfg": None,
    "cfg_interval": None, "cfg_channels": None, "weak": None, "autoencoder": None,
}  # fmt: skip
# Those that are of other subjects.
_OTHERS = ("images", "against", "write_reference", "split", "data_name", "min_size", "variant")


def refuse_drawing(args: argparse.Namespace, why: str) -> None:
    """UserError if it is said how samples are drawn, where none are."""
    _refuse(args, tuple(_DRAWING), why)


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    from dcae_jax.errors import UserError

    given = [n for n in names if vars(args)[n] not in (_DRAWING.get(n), None)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{options}: {why}; leave it out")


# ---------------------------------------------------------------------------------------- two ways


def job(args: argparse.Namespace) -> Job:
    """Draws --n samples of --from into OUT/samples, then scores that folder."""
    from dcae_jax.evals import protocol

    _refuse(args, _OTHERS, "--from is a diffusion model, of which samples are scored")
    asked = _evaluate_job.asked(args, protocol.Kind.generation)
    labels = args.labels or asked.preset.labels.value
    wanted = argparse.Namespace(**vars(args) | {
        "n": args.n or _N, "seed": _SEED if args.seed is None else args.seed,
        "classes": "random" if labels == protocol.Labels.random.value else "all",
        "out": str(asked.out / _FOLDER),
    })  # fmt: skip
    drawn = _sample_job.job_of(wanted)
    record = _sample_folder.settings(drawn) | {
        "n": drawn.n, "release": _trained.release(drawn.model)
    }  # fmt: skip
    found = _evaluation(args, asked, drawn.out, record, drawn.model.manifest.plan.resolution)
    if args.autoencoder:  # who decodes is part of what was asked for
        found.subject["autoencoder"] = args.autoencoder

    def prepare() -> None:
        _sample_draw.fill(wanted, drawn, npz=False)
        found.protocol.update(_decoder(_sample_folder.finished(drawn.out, "--out")))

    return Job(asked.out, (found,), args.skip_bad, args.keep_parts, prepare)


def folder_job(args: argparse.Namespace) -> Job:
    """Scores the samples of a folder that `sample` made; its record says how."""
    from dcae_jax import checkpoint
    from dcae_jax.evals import protocol

    refuse_drawing(args, "how the samples of --samples were drawn is known from its sample.json")
    _refuse(args, (*_OTHERS, "n"), "--samples is a whole folder of `sample`, which is scored")
    folder = checkpoint.absolute(args.samples)
    record = _sample_folder.finished(folder, "--samples")
    asked = _evaluate_job.asked(args, protocol.Kind.generation)
    side = _sample_folder.read(_sample_folder.picture_path(folder, 0)).shape[0]
    found = _evaluation(args, asked, folder, record, side)
    found.protocol.update(_decoder(record))
    return Job(asked.out, (found,), args.skip_bad, args.keep_parts)


def _evaluation(
    args: argparse.Namespace, asked: Asked, folder: "epath.Path", record: dict[str, Any], side: int
) -> "Evaluation":
    """The scores of a folder whose record is known, while its samples need not be there yet."""
    from dcae_jax.evals import protocol
    from dcae_jax.evals.parts import Work
    from dcae_jax.evals.scores import Evaluation, Pixels, least_images

    _check_reference(args, asked, side)
    images = Samples(folder, record["n"], side)
    least_images(asked.metrics, images.n)
    wanted = protocol.arrays_of(asked.metrics)
    work = Work(
        _FOLDER, (images,), asked.batch, lambda: _evaluate_job.features(asked, wanted),
        _evaluate_job.numbers(wanted), _evaluate_job.evenly(images.n),
    )  # fmt: skip
    reference = _evaluate_job.reference(asked, images, work, "")
    about = _evaluate_job.about(asked, images, reference) | _how(record)
    subject = {"source": args.source or args.samples} | {
        name: record[name] for name in ("weights", "weak", "encoder", "latent_norm", "process")
    }
    if record.get("release"):  # folders of earlier versions do not say it
        subject["release"] = record["release"]
    return Evaluation(
        _FOLDER, asked.kind, subject, asked.metrics, work, reference, about, asked.doubts(),
        lambda out, caption: _grid(out, work, caption),
        (Pixels(work, 0, "subject", ("pixels",)),),
    )  # fmt: skip


def _check_reference(args: argparse.Namespace, asked: Asked, side: int) -> None:
    from dcae_jax.errors import UserError
    from dcae_jax.evals import protocol

    compared = [m for m in asked.metrics if protocol.METRICS[m].reference]
    if compared and asked.reference is None:
        names = ", ".join(protocol.key_of(metric, asked.kind) for metric in compared)
        raise UserError(
            f"{names}: against what? Give --reference NPZ, the statistics of the training images "
            f"at {side} px. They are made once: python -m dcae_jax evaluate --images TRAIN "
            f"--resolution {side} --protocol {asked.preset.name} --write-reference ref.npz"
        )
    if args.resolution not in (None, str(side)):
        raise UserError(
            f"--resolution {args.resolution}: samples are scored as they are, {side} px"
        )
    _evaluate_job.check_side(asked, side)


# --------------------------------------------------------------------------------- how it was drawn


def _how(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a protocol that the record of `sample` tells."""
    from dcae_jax import config
    from dcae_jax.evals import protocol

    guidance = record["guidance"]
    exact = record["dtype"] == "float32"
    return {
        **_sampling(config.from_json(record["sampler"]), config.from_json(record["process"])),
        "guidance": {k: v for k, v in guidance.items() if k != "class"},
        "labels": _labels(record), "classes": len(record["classes"]), "seed": record["seed"],
        "quantisation": protocol.QUANTISATION, "weights": record["weights"]["kind"].split()[0],
        "dtype": record["dtype"], "matmul_precision": "highest" if exact else "default",
    }  # fmt: skip


def _sampling(sampler: "SamplerConfig", process: "ProcessConfig") -> dict[str, Any]:
    """The sampler with its steps, if it has any, and all its other options as the process has it.

    A variance that is left to the process is the one that was taken.
    """
    from dcae_jax import config
    from dcae_jax.diffusion.samplers import AncestralConfig

    if isinstance(sampler, AncestralConfig):
        sampler = dataclasses.replace(sampler, variance=sampler.variance_of(process))
    options = config.to_json(sampler)
    known = {"steps": options["steps"]} if "steps" in options else {}
    rest = {k: v for k, v in options.items() if k not in ("class", "steps")}
    return {"sampler": _sample_job.sampler_name(sampler), **known, "sampler_options": rest}


def _decoder(record: dict[str, Any]) -> dict[str, Any]:
    """What made pictures of the latents; folders of earlier versions do not say whose it is."""
    known = record.get("decoder_release")
    return {"decoder": record["decoder"]} | ({"decoder_release": known} if known else {})


def _labels(record: dict[str, Any]) -> str:
    """How classes were chosen, as protocols call it, or in words."""
    from dcae_jax.evals.protocol import Labels

    if record["order"] == _sample_job.DRAWN:
        return Labels.random.value
    whole = record["classes"] == list(range(len(record["classes"])))
    return Labels.balanced.value if whole else f"in turn: {record['classes']}"


# ------------------------------------------------------------------------------------- the samples


@dataclasses.dataclass(frozen=True)
class Samples:
    """The pictures of a folder of `sample`, by number."""

    folder: "epath.Path"
    n: int
    side: int
    name: str = _FOLDER
    digest: str = ""  # the protocol says what decides them
    listing: str = ""
    dates: str = ""  # and those that were drawn here are not looked at again

    @contextlib.contextmanager
    def batches(self, wanted: "np.ndarray", batch: int) -> "Iterator[Iterator[Batch]]":
        """See evals/image_sets.ImageSet."""
        rows = wanted.reshape(-1, batch)
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            yield (self._batch(pool, positions) for positions in rows)

    def _batch(self, pool: futures.Executor, positions: "np.ndarray") -> "Batch":
        import numpy as np

        from dcae_jax.evals.image_sets import Batch

        image = np.zeros((len(positions), self.side, self.side, 3), np.uint8)
        real = positions >= 0
        paths = [_sample_folder.picture_path(self.folder, i) for i in positions[real].tolist()]
        image[real] = list(pool.map(_sample_folder.read, paths))
        names = iter([path.name for path in paths])
        shown = [next(names) if there else "" for there in real]
        return Batch(image, real, shown, [""] * len(positions))


def _grid(out: "epath.Path", work: "Work", caption: str) -> "np.ndarray | None":
    """Samples spread over all."""
    from dcae_jax.evals.parts import Stored
    from dcae_jax.report import images as pictures

    names, shown = Stored(out, work).pictures()
    if not names:
        return None
    return pictures.grid([[images[0] for images in shown]], columns=names, caption=caption)
