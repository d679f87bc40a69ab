"""Whether samples look like their classes, whether they vary as data do, and what they copy.

All is measured on latents whose channels are brought to unit deviation with the statistics of the
training cache, in float64 on the host, of a fixed set of samples (classes in turn, fixed noise):

  accuracy  the share of samples whose nearest class mean is that of their class.  Latents are
            pooled over positions and divided by the deviations within classes; means and deviations
            are of *held-out* latents.  Chance is 1 / classes.
  frechet   the Fréchet distance of the samples' Gaussian to that of the held-out latents.  Every
            position of every latent counts as one vector of channels: a Gaussian of whole latents
            (512 numbers for 4 x 4 x 32) would be fitted to 64 samples and be singular, this one has
            a covariance of 32 x 32 from 1024 vectors.  It does not see how positions hang together.
  nearest   the RMS difference to the nearest training latent, in units of a channel's deviation.
            Far below that of the training latents to each other, it means copies.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float64, Int, UInt8

from dcae_jax.config import InitWeights, RunConfig
from dcae_jax.data.latents import LatentDataConfig, Manifest
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.samplers import DPMFastConfig, SamplerConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import frechet, generate
from dcae_jax.evals.base import Report, below, is_due, variables_of
from dcae_jax.evals.labels import balanced_labels
from dcae_jax.generator import Generator
from dcae_jax.report import images as pictures
from dcae_jax.step import TrainState
from dcae_jax.tasks.base import Task
from dcae_jax.tasks.diffuse import DiffuseTask
from dcae_jax.tree import Tree

METRICS = ("accuracy", "frechet", "nearest", "n")
CHANCE, MEAN, CLASS_MEANS = "chance", "mean-of-training", "class-means-of-training"
TRAINING, HELD_OUT = "training-latents", "held-out-latents"
_LEAST = 2  # held-out latents of a class: fewer have no deviation
_CHUNK = 256  # latents whose distances to all training latents are computed at once

Latents = Float64[np.ndarray, "n h w c"]


@dataclass(slots=True)
class ClassScoresConfig:
    """Scores of `n` samples against held-out and training latents, and a picture of some."""

    name: str = "class-scores"
    data: LatentDataConfig = field(default_factory=lambda: LatentDataConfig(split="test"))
    n: int = 64  # samples, the classes in turn
    held_out: int = 1024  # latents of `data`, at most
    training: int = 8192  # latents of the run's own cache, at most; mirror images are not searched
    sampler: SamplerConfig = field(default_factory=DPMFastConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    batch: int = 32  # samples at once, over all devices
    pictures: int = 4  # samples of a class in the picture, each beside its nearest training latent
    every: int = 0  # steps; 0: never in between
    at_start: bool = True  # the untrained model
    at_end: bool = True
    weights: InitWeights = InitWeights.ema
    autoencoder: str = ""  # decodes; "": the one that the cache was made with

    def resolve(self, run: RunConfig) -> None:
        """Takes the run's cache unless another one is named."""
        if isinstance(run.data, LatentDataConfig):  # else `build` says what is wrong
            self.data.path = self.data.path or run.data.path
            self.data.shape = run.data.shape

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        return below(self, n=1, held_out=_LEAST, training=_LEAST, batch=1, pictures=0, every=0)

    def metrics(self) -> tuple[str, ...]:
        """The names of its scores."""
        return METRICS

    def due(self, step: int, last: int) -> bool:
        """Whether it runs after `step` of `last` steps."""
        return is_due(self, step, last)

    def build(self, run: RunConfig, task: Task, mesh: Mesh) -> "ClassScores":
        """The evaluator; it loads the autoencoder and reads the latents."""
        return ClassScores(self, run, task, mesh)


class Labelled(NamedTuple):
    """Latents as they are measured, with their classes."""

    latents: Latents
    labels: Int[np.ndarray, " n"]


class ClassScores:
    """See ClassScoresConfig."""

    def __init__(self, cfg: ClassScoresConfig, run: RunConfig, task: DiffuseTask, mesh: Mesh):
        self.cfg, self._run, self._mesh = cfg, run, mesh
        if not isinstance(run.data, LatentDataConfig):
            raise UserError(
                f"evals: {cfg.name} compares samples with cached latents, but the run's data is "
                f"{type(run.data).__name__}; cache them (python -m dcae_jax cache-latents), or "
                "leave this evaluator out"
            )
        generate.check_sampler(cfg.name, cfg.sampler, task.cfg.process)
        manifest = run.data.manifest()
        self._net = generate.decoder(cfg.autoencoder, manifest, mesh)
        self._generator = Generator(task, cfg.sampler, cfg.guidance, mesh, seed=run.seed)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-cfg.batch // rows) * rows
        self._names = generate.class_names(manifest)
        self._units = Units.of(manifest)
        classes = manifest.num_classes
        self._training = read(run.data, cfg.training, self._units)
        require_classes(self._training.labels, classes, "training")
        held_out = read(cfg.data, cfg.held_out, self._units)
        require_classes(held_out.labels, classes, "held_out")
        self._reference = Reference.of(held_out, classes)
        self._labels = balanced_labels(cfg.n, classes)

    def run(self, state: TrainState, constants: Tree, poll: Callable[[], None]) -> Report:
        """The scores of the samples, and the picture."""
        variables = variables_of(state, constants, self.cfg.weights, self._run.ema)
        drawn = generate.draw(
            self._generator, variables, self._labels, self._batch, self._mesh, poll
        )
        latents = np.concatenate([np.asarray(part.latents) for part in drawn])[: self.cfg.n]
        if not np.isfinite(latents).all():
            scores = dict.fromkeys(METRICS, float("nan")) | {"n": float(self.cfg.n)}
            return Report(scores, {})
        samples = Labelled(self._units.apply(latents), self._labels)
        scores, nearest = self._scores(samples)
        picture = self._picture(latents, nearest, scores, int(jax.device_get(state.step)), poll)
        return Report(scores, picture)

    def baselines(self) -> dict[str, dict[str, float]]:
        """What needs no network: chance, averages, and data as if they were samples.

        As many latents as there are samples, of the same classes.  Those of training are compared
        with the other training latents: they show what a model of the training data can reach.
        """
        training = self._training
        chosen = _in_turn(training.labels, self._labels)
        held_out = self._reference.data
        picked = _in_turn(held_out.labels, self._labels)
        means = class_means(training.latents, training.labels, self._reference.classes)
        everything = np.broadcast_to(
            training.latents.mean(0), (len(self._labels), *means.shape[1:])
        )
        found = {
            MEAN: self._scores(Labelled(everything, self._labels))[0],
            CLASS_MEANS: self._scores(Labelled(means[self._labels], self._labels))[0],
            TRAINING: self._scores(_pick(training, chosen), exclude=chosen)[0],
            HELD_OUT: self._scores(_pick(held_out, picked))[0],
        }
        return {CHANCE: {"accuracy": 1.0 / self._reference.classes}, **found}

    def _scores(
        self, samples: Labelled, exclude: Int[np.ndarray, " n"] | None = None
    ) -> tuple[dict[str, float], Int[np.ndarray, " n"]]:
        """(scores, the nearest training latent of each); `exclude`: not this one."""
        distances, nearest = nearest_of(samples.latents, self._training.latents, exclude)
        found = {
            "accuracy": float(np.mean(self._reference.classify(samples.latents) == samples.labels)),
            "frechet": frechet.distance(
                frechet.gaussian(_vectors(samples.latents), ddof=0), self._reference.gaussian
            ),
            "nearest": float(distances.mean()),
            "n": float(len(samples.latents)),
        }
        return found, nearest

    def _picture(
        self, latents: Float[np.ndarray, "n h w c"], nearest: Int[np.ndarray, " n"],
        scores: dict[str, float], step: int, poll: Callable[[], None],
    ) -> dict[str, UInt8[np.ndarray, "height width 3"]]:  # fmt: skip
        """Rows of classes: each sample beside the training latent that is nearest to it."""
        if not self.cfg.pictures:
            return {}
        rows = generate.rows_of_classes(self._labels, self.cfg.pictures)
        shown = np.concatenate(rows)
        crops = self._units.invert(self._training.latents[nearest[shown]]).astype(np.float32)
        both = generate.decode_all(
            self._net, np.concatenate([latents[shown], crops]), self._batch, self._mesh, poll
        )
        pairs = iter(zip(both[: len(shown)], both[len(shown) :], strict=True))
        cells = [[*itertools.chain(*itertools.islice(pairs, len(row)))] for row in rows]
        grid = pictures.grid(
            cells, columns=["sample", "nearest training crop"] * self.cfg.pictures,
            labels=[self._names[self._labels[row[0]]] for row in rows],
            caption=f"{self.cfg.name}, step {step}: accuracy {scores['accuracy']:.3f}, Fréchet "
            f"distance {scores['frechet']:.2f}; each sample beside the training crop nearest to it",
        )  # fmt: skip
        return {self.cfg.name: grid}


# ------------------------------------------------------------------------------------- what is read


class Units(NamedTuple):
    """Each channel less its mean, over its deviation, of the training cache."""

    mean: Float64[np.ndarray, " c"]
    std: Float64[np.ndarray, " c"]

    @classmethod
    def of(cls, manifest: Manifest) -> "Units":
        """Those of a cache."""
        return cls(np.array(manifest.mean, np.float64), np.array(manifest.std, np.float64))

    def apply(self, latents: Float[np.ndarray, "n h w c"]) -> Latents:
        """Latents as they are measured."""
        return (latents.astype(np.float64) - self.mean) / self.std

    def invert(self, latents: Latents) -> Latents:
        """Latents as the autoencoder decodes them."""
        return latents * self.std + self.mean


def read(data: LatentDataConfig, most: int, units: Units) -> Labelled:
    """At most so many latents of a cache, spread over it (of Gaussians the means)."""
    n = min(most, data.manifest().images)
    with data.eval_batches(batch=min(n, _CHUNK), n=n) as batches:
        parts = [(b["latent"][b["mask"] > 0], b["label"][b["mask"] > 0]) for b in batches]
    latents, labels = (np.concatenate(found) for found in zip(*parts, strict=True))
    return Labelled(units.apply(latents), labels)


def require_classes(labels: Int[np.ndarray, " n"], classes: int, field_name: str) -> None:
    """UserError if a class has too few latents."""
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < _LEAST:
        raise UserError(
            f"class scores need {_LEAST} latents of every class, but class {counts.argmin()} has "
            f"{counts.min()} among the {len(labels)} of `{field_name}`; cache more latents of "
            f"that split, or raise {field_name}"
        )


def _in_turn(labels: Int[np.ndarray, " n"], wanted: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """For each wanted class the next index of that class; from the first one again at the end."""
    turns = {k: itertools.cycle(np.flatnonzero(labels == k).tolist()) for k in set(wanted.tolist())}
    return np.array([next(turns[k]) for k in wanted.tolist()])


def _pick(found: Labelled, indices: Int[np.ndarray, " n"]) -> Labelled:
    return Labelled(found.latents[indices], found.labels[indices])


# ------------------------------------------------------------------------------------- the measures


class Reference(NamedTuple):
    """Held-out latents: themselves, the means of their classes, their Gaussian."""

    data: Labelled
    classes: int
    deviation: Float64[np.ndarray, " c"]  # within classes, of latents pooled over positions
    means: Float64[np.ndarray, "k c"]  # pooled, over the deviation
    gaussian: frechet.Gaussian

    @classmethod
    def of(cls, data: Labelled, classes: int) -> "Reference":
        """From latents of all classes."""
        pooled = data.latents.mean(axis=(1, 2))
        means = class_means(pooled, data.labels, classes)
        deviation = np.sqrt(np.square(pooled - means[data.labels]).mean(axis=0))
        deviation = np.maximum(deviation, np.finfo(np.float32).eps)  # a channel that never varies
        return cls(
            data, classes, deviation, means / deviation,
            frechet.gaussian(_vectors(data.latents), ddof=0),
        )  # fmt: skip

    def classify(self, latents: Latents) -> Int[np.ndarray, " n"]:
        """The class whose mean is nearest; of equal ones the first."""
        pooled = latents.mean(axis=(1, 2)) / self.deviation
        squares = np.square(pooled[:, None] - self.means).sum(axis=-1)
        return squares.argmin(axis=1)


def class_means(
    values: Float64[np.ndarray, "n ..."], labels: Int[np.ndarray, " n"], classes: int
) -> Float64[np.ndarray, "k ..."]:
    """The mean of each class."""
    return np.stack([values[labels == k].mean(axis=0) for k in range(classes)])


def nearest_of(
    latents: Latents, training: Float64[np.ndarray, "m h w c"],
    exclude: Int[np.ndarray, " n"] | None = None,
) -> tuple[Float64[np.ndarray, " n"], Int[np.ndarray, " n"]]:  # fmt: skip
    """(RMS difference to the nearest training latent, its index), `exclude` not counted."""
    flat, known = (x.reshape(len(x), -1) for x in (latents, training))
    norms, found = np.square(known).sum(axis=1), []
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        scores = norms - 2 * part @ known.T  # squared distances less the sample's own norm
        if exclude is not None:
            scores[np.arange(len(part)), exclude[start : start + _CHUNK]] = np.inf
        found.append(scores.argmin(axis=1))
    index = np.concatenate(found)
    return np.sqrt(np.square(flat - known[index]).mean(axis=1)), index


def _vectors(latents: Latents) -> Float64[np.ndarray, "m c"]:
    return latents.reshape(-1, latents.shape[-1])
