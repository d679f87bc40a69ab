"""FID and its like of samples during training, beside a grid of some of them.

The samples are always the same ones: classes in turn, fixed noise.  They are compared with

  a file     statistics, or ADM's reference batch: scores of n samples to what papers compare with
  latents    of the run's cache (or its images, encoded), held out and decoded by the same
             autoencoder: what samples of this autoencoder could be at best.  The score of its
             reconstructions (rFID) is not in it, so it compares runs on one cache with each other

Scores of few samples are higher than those of many, and only scores of equally many compare: each
name says how many they are.  Below 2048 the covariance of FID's 2048 features is singular.
"""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from dcae_jax import score_names, sharding
from dcae_jax.config import InitWeights, RunConfig
from dcae_jax.data import pipeline
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.samplers import DPMFastConfig, SamplerConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import (
    extract,
    frechet,
    generate,
    metrics,
    protocol,
)
from dcae_jax.evals import reference as references
from dcae_jax.evals.base import (
    Report,
    below,
    check_encoder,
    is_due,
    on_host,
    take_data,
    variables_of,
)
from dcae_jax.evals.feature_scores import FeatureScores
from dcae_jax.evals.frechet import Gaussian
from dcae_jax.evals.labels import balanced_labels
from dcae_jax.generator import Generator
from dcae_jax.nets import inception, weights
from dcae_jax.online import OnlineDataConfig
from dcae_jax.report import images as pictures
from dcae_jax.report import phases
from dcae_jax.step import TrainState
from dcae_jax.tasks.base import Task, Variables
from dcae_jax.tasks.diffuse import DiffuseTask
from dcae_jax.tree import Tree

Rows = dict[str, Float[np.ndarray, "_ _"]]  # features of images, by the names of extract.py
Image = UInt8[np.ndarray, "_ _ 3"]


class Score(enum.Enum):
    """What is computed of the features of a set of samples."""

    fid = "fid"
    sfid = "sfid"
    kid = "kid"
    inception = "is"
    precision = "precision"
    recall = "recall"


class Preset(enum.Enum):
    """The published evaluation whose resize is taken; that of the reference file."""

    dcae = "dcae"
    adm = "adm"


@dataclass(slots=True)
class SampleScoresConfig:
    """Scores of `n` samples by Inception's features, and a grid of some."""

    name: str = ""  # "": what they are compared with, e.g. samples-decoded-test
    scores: tuple[Score, ...] = (Score.fid,)
    n: int = 2048  # samples, the classes in turn
    reference: str = ""  # npz of statistics or of ADM; "": `data`, decoded
    data: LatentDataConfig | OnlineDataConfig = field(
        default_factory=lambda: LatentDataConfig(split="test")
    )
    held_out: int = 2048  # latents of `data`
    protocol: Preset = Preset.dcae
    sampler: SamplerConfig = field(default_factory=DPMFastConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    batch: int = 32  # images at once, over all devices
    pictures: int = 4  # samples of a class in the grid, of 8 classes at most; 0: no grid
    every: int = 0  # steps; 0: never in between
    at_start: bool = False
    at_end: bool = True
    weights: InitWeights = InitWeights.ema
    autoencoder: str = ""  # decodes; "": the one that the cache was made with
    nets: str = ""  # folder with the file of `import-net inception`; "": where that puts it

    def resolve(self, run: RunConfig) -> None:
        """Takes the run's cache or autoencoder unless another is named; names the evaluator."""
        known = {score.value for score in Score}
        self.scores = tuple(Score(s) if s in known else s for s in self.scores)  # of a flag
        split = take_data(self.data, run)
        stem = self.reference.rsplit("/", 1)[-1].removesuffix(".npz")
        self.name = self.name or f"samples-{stem or f'decoded-{split}'}"

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = below(self, n=1, batch=1, held_out=1, pictures=0, every=0)
        if wrong := [s for s in self.scores if not isinstance(s, Score)] or not self.scores:
            there = ", ".join(score.value for score in Score)
            said = f"knows no {wrong[0]!r}" if self.scores else "is empty"
            return [*found, f"evals: scores of {self.name} {said}; there are {there}"]
        for score in self.scores:
            about, known = protocol.METRICS[score.value], {"n": self.n}
            known |= {"held_out": self.held_out} if about.reference and not self.reference else {}
            found += [
                f"evals: {score.value} of {self.name} needs {about.least} images and more, but "
                f"{name} = {count}; raise it, or leave {score.value} out of scores"
                for name, count in known.items() if count < about.least
            ]  # fmt: skip
        return found

    def metrics(self) -> tuple[str, ...]:
        """The names of its scores, one of which may choose the best checkpoint."""
        given = (s.value for s in self.scores if isinstance(s, Score))
        return (*(score_names.named(score, self.n) for score in given), "n")

    def due(self, step: int, last: int) -> bool:
        """Whether it runs after `step` of `last` steps."""
        return is_due(self, step, last)

    def build(self, run: RunConfig, task: Task, mesh: Mesh) -> "SampleScores":
        """The evaluator; it loads the autoencoder and Inception, and looks at the reference."""
        return SampleScores(self, run, task, mesh)


class Images(NamedTuple):
    """A batch on the mesh, and which of its rows are images."""

    pixels: UInt8[Array, "b h w 3"]
    real: Bool[np.ndarray, " b"]


class Held(NamedTuple):
    """A set of images by features in memory and statistics that are known: a `Side`."""

    features: Rows
    known: dict[str, Gaussian]

    def gaussian(self, array: str) -> Gaussian:
        """Of the features of all images."""
        return self.known[array] if array in self.known else frechet.gaussian(self.features[array])

    def rows(self, array: str) -> Float[np.ndarray, "n c"]:
        """The features of every image."""
        return self.features[array]


class SampleScores:
    """See SampleScoresConfig."""

    def __init__(self, cfg: SampleScoresConfig, run: RunConfig, task: DiffuseTask, mesh: Mesh):
        self.cfg, self._run, self._mesh = cfg, run, mesh
        asked = self._asked = [score.value for score in cfg.scores]
        self._compared = {protocol.METRICS[name].reference for name in asked} - {""}
        generate.check_sampler(cfg.name, cfg.sampler, task.cfg.process)
        self._file = extract.find_net("inception", cfg.nets or None)
        manifest = run.data.manifest()
        self._net = generate.decoder(cfg.autoencoder, manifest, mesh)
        self._given = self._statistics(self._net.cfg.factor * manifest.shape[0])
        self._preset = protocol.PRESETS[cfg.protocol.value]
        self._extractor = extract.Extractor(
            protocol.arrays_of(asked), self._preset, {"inception": self._file}, mesh
        )
        self._generator = Generator(
            task, cfg.sampler, cfg.guidance, mesh, seed=run.seed, whole=False
        )
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-cfg.batch // rows) * rows
        self._labels = balanced_labels(cfg.n, manifest.num_classes)
        self._names = generate.class_names(manifest)
        by_row = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
        self._latents = jax.jit(task.latents, out_shardings=by_row)
        self._pixels = jax.jit(_pixels, out_shardings=(by_row, sharding.replicated(mesh)))
        self._theirs: Held | None = None

    def record(self) -> dict[str, Any]:
        """The network's file, and what the samples are compared with."""
        found: dict[str, Any] = {
            "nets": {inception.NAME: weights.info(inception.NAME, self._file.path)}
        }
        if self._given is not None:
            about = self._given.name, self._given.digest, self._given.n
        elif self._compared:
            about = "decoded latents", self.cfg.data.fingerprint(), self.cfg.held_out
        else:
            return found
        return found | {"reference": dict(zip(("name", "digest", "n"), about, strict=True))}

    def baselines(self) -> dict[str, dict[str, float]]:
        """There are none."""
        return {}

    def run(self, state: TrainState, constants: Tree, poll: Callable[[], None]) -> Report:
        """The scores of the samples, and the grid; `poll` is called once per batch."""
        variables = variables_of(state, constants, self.cfg.weights, self._run.ema)
        if self._theirs is None:
            self._theirs = self._reference(constants, poll)
        n, indices = {"n": float(self.cfg.n)}, self._shown()
        found = self._drawn(variables, {i for row in indices for i in row.tolist()}, poll)
        if found is None:
            return Report(dict.fromkeys(self.cfg.metrics(), float("nan")) | n, {})
        mine, images = found
        made = FeatureScores(Held(mine, {}), self._theirs, self._preset)
        scores = self._named(made) | n
        return Report(scores, self._grid(indices, images, scores, int(jax.device_get(state.step))))

    def _named(self, made: FeatureScores) -> dict[str, float]:
        """The scores by name; behind them the errors of KID and of the Inception Score."""
        found = {score_names.named(name, self.cfg.n): made.score(name) for name in self._asked}
        errors = {score_names.error(k): s.error for k, s in found.items() if s.error is not None}
        return {name: score.value for name, score in found.items()} | errors

    # -------------------------------------------------------------------------------- the samples

    def _drawn(
        self, variables: Variables, shown: set[int], poll: Callable[[], None]
    ) -> tuple[Rows, dict[int, Image]] | None:
        """(features of all samples, pictures of some); None if one is not finite."""
        parts, images, n = [], {}, self.cfg.n
        batches = generate.draw(
            self._generator, variables, self._labels, self._batch, self._mesh, poll
        )
        for first, drawn in zip(range(0, n, self._batch), batches, strict=True):
            pixels, finite = self._decoded(drawn.latents)
            if not finite[: n - first].all():
                return None
            parts.append(self._features(pixels))
            if here := [i for i in shown if first <= i < first + self._batch]:
                whole = on_host(pixels, self._mesh)
                images |= {i: whole[i - first] for i in here}
        return {k: v[:n] for k, v in _joined(parts).items()}, images

    def _decoded(
        self, latents: Float[Array, "b h w c"]
    ) -> tuple[UInt8[Array, "b H W 3"], Bool[np.ndarray, " b"]]:
        """Images, and whether they and their latents are finite."""
        pixels, finite = self._pixels(latents, self._net.decode(latents))
        return pixels, jax.device_get(finite)

    def _features(self, images: UInt8[Array, "b h w 3"], wanted: set[str] | None = None) -> Rows:
        return on_host(self._extractor.features(images, wanted), self._mesh)

    # ------------------------------------------------------------------ what they are compared to

    def _statistics(self, side: int) -> references.Reference | None:
        """The file, if one is named; UserError if it, or `data`, cannot be compared with."""
        cfg = self.cfg
        if not self._compared:
            return None
        if cfg.reference:
            found = references.read(cfg.reference, pool=self._file.pool)
            if why := _unfit(found, self._asked, side):
                raise UserError(f"evals: reference {cfg.reference} of {cfg.name} {why}")
            return found
        check_encoder(self._run, cfg.name, cfg.data)
        if (there := cfg.data.manifest().images) < cfg.held_out:
            raise UserError(
                f"evals: {cfg.name} compares samples with held_out = {cfg.held_out} latents, but "
                f"there are {there}; set held_out={there}, or cache more"
            )
        return None

    def _reference(self, constants: Tree, poll: Callable[[], None]) -> Held:
        """Statistics, and features of single images where they are needed."""
        whole = any(protocol.METRICS[name].whole for name in self._asked)
        known: dict[str, Gaussian] = {}
        if self._given is not None:
            given = {name: getattr(self._given, name) for name in self._compared}
            known = {name: statistics for name, statistics in given.items() if statistics}
        if not whole and self._compared <= known.keys():
            return Held({}, known)
        images = self._held_out(constants) if self._given is None else self._of_file()
        parts = []
        for pixels, real in images:
            found = self._features(pixels, self._compared)
            parts.append({name: rows[real] for name, rows in found.items()})
            poll()
        rows = _joined(parts)
        missing = self._compared - known.keys()
        known |= {name: frechet.gaussian(rows[name]) for name in missing}
        return Held(rows if whole else {}, known)

    def _held_out(self, constants: Tree) -> Iterator[Images]:
        """Held-out latents, decoded."""
        shard = pipeline.Shard(*sharding.row_shard(self._mesh))
        opened = self.cfg.data.eval_batches(batch=self._batch, n=self.cfg.held_out, shard=shard)
        with opened as batches:
            for local in batches:
                batch = sharding.put_batch(dict(local), self._mesh)
                images, _ = self._decoded(self._latents(Variables({}, {}, constants), batch))
                yield Images(images, on_host(batch["mask"], self._mesh) > 0)

    def _of_file(self) -> Iterator[Images]:
        """The images of the file."""
        there, (part, parts) = self._given.images, sharding.row_shard(self._mesh)
        mine = slice(part * self._batch // parts, (part + 1) * self._batch // parts)
        for start in range(0, there.n, self._batch):
            found = there.read(start, min(start + self._batch, there.n))
            empty = self._batch - len(found)
            rows = np.pad(found, ((0, empty), (0, 0), (0, 0), (0, 0)))
            batch = sharding.put_batch({"image": rows[mine]}, self._mesh)
            yield Images(batch["image"], np.arange(self._batch) < len(found))

    # -------------------------------------------------------------------------------- the picture

    def _shown(self) -> list[Int[np.ndarray, " k"]]:
        """Indices of the samples in each row of the grid."""
        if not self.cfg.pictures:
            return []
        return generate.rows_of_classes(self._labels, self.cfg.pictures)

    def _grid(
        self, indices: list[Int[np.ndarray, " k"]], images: dict[int, Image],
        scores: dict[str, float], step: int,
    ) -> dict[str, Image]:  # fmt: skip
        if not indices:
            return {}
        said = ", ".join(
            f"{phases.metric_name(k)} {phases.measured_as(scores, k)}"
            for k in phases.main_metrics(scores)
        )
        grid = pictures.grid(
            [[images[i] for i in row.tolist()] for row in indices],
            labels=[self._names[self._labels[row[0]]] for row in indices],
            caption=f"{self.cfg.name}, step {step}: {said}",
        )
        return {self.cfg.name: grid}


def _unfit(reference: references.Reference, asked: list[str], side: int) -> str:
    """Why a file cannot be compared with; "" if it can."""
    images = reference.images
    for name in asked:
        about = protocol.METRICS[name]
        if about.whole and images is None:
            return f"has statistics only: {name} needs its images, as in ADM's reference batches"
        if about.reference and getattr(reference, about.reference) is None and images is None:
            return f"has no statistics for {name} (mu and sigma for fid, mu_s and sigma_s for sfid)"
        if about.whole and images.n < about.least:
            return f"has {images.n} images, but {name} needs {about.least} and more"
    if reference.resolution not in (None, side):
        return f"is of images of {reference.resolution} px, but samples have {side}"
    return ""


def _pixels(
    latents: Float[Array, "b h w c"], decoded: Float[Array, "b H W 3"]
) -> tuple[UInt8[Array, "b H W 3"], Bool[Array, " b"]]:
    finite = [jnp.isfinite(x).all(axis=(1, 2, 3)) for x in (latents, decoded)]
    return metrics.to_uint8(decoded), finite[0] & finite[1]


def _joined(parts: list[Rows]) -> Rows:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
