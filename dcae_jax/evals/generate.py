"""Samples during training: a grid of fixed classes and noise, so that a run's grids compare."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float, Int, Int32, UInt8

from dcae_jax import autoencoder, sharding
from dcae_jax.autoencoder import Autoencoder
from dcae_jax.config import InitWeights, RunConfig
from dcae_jax.data import latents
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import ProcessConfig
from dcae_jax.diffusion.samplers import DPMFastConfig, SamplerConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import metrics
from dcae_jax.evals.base import Report, below, gathered, is_due, variables_of
from dcae_jax.generator import Drawn, Generator
from dcae_jax.report import images as pictures
from dcae_jax.step import TrainState
from dcae_jax.tasks.base import Task, Variables
from dcae_jax.tasks.diffuse import DiffuseTask
from dcae_jax.tree import Tree

_ROWS = 8  # classes in a picture, at most


@dataclass(slots=True)
class GenerateConfig:
    """A grid of samples: one row for each class, the same noise every time."""

    name: str = "samples"
    sampler: SamplerConfig = field(default_factory=DPMFastConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    labels: tuple[int, ...] = ()  # (): up to 8 classes, spread over all
    per_label: int = 4
    batch: int = 8  # samples at once, over all devices
    every: int = 0  # steps; 0: never in between
    at_start: bool = False
    at_end: bool = True
    weights: InitWeights = InitWeights.ema
    autoencoder: str = ""  # decodes; "": the one that the cache was made with

    def resolve(self, run: RunConfig) -> None:
        """Fills in the classes."""
        if not self.labels:
            classes = run.task.model.num_classes
            rows = min(8, classes)
            self.labels = tuple(i * classes // rows for i in range(rows))

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        return below(self, per_label=1, batch=1, every=0)

    def metrics(self) -> tuple[str, ...]:
        """The names of its scores."""
        return ("latent_rms", "evaluations", "n")

    def due(self, step: int, last: int) -> bool:
        """Whether it runs after `step` of `last` steps."""
        return is_due(self, step, last)

    def build(self, run: RunConfig, task: Task, mesh: Mesh) -> "Generate":
        """The evaluator; it loads the autoencoder."""
        return Generate(self, run, task, mesh)


class Generate:
    """See GenerateConfig."""

    def __init__(self, cfg: GenerateConfig, run: RunConfig, task: DiffuseTask, mesh: Mesh):
        self.cfg, self._run, self._mesh = cfg, run, mesh
        check_classes(cfg.labels, task.cfg.model.num_classes)
        check_sampler(cfg.name, cfg.sampler, task.cfg.process)
        manifest = run.data.manifest()
        self._net = decoder(cfg.autoencoder, manifest, mesh)
        self._names = class_names(manifest)
        self._generator = Generator(task, cfg.sampler, cfg.guidance, mesh, seed=run.seed)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-cfg.batch // rows) * rows

    def baselines(self) -> dict[str, dict[str, float]]:
        """There are none."""
        return {}

    def run(self, state: TrainState, constants: Tree, poll: Callable[[], None]) -> Report:
        """The grid, and the RMS of the latents that were drawn."""
        variables = variables_of(state, constants, self.cfg.weights, self._run.ema)
        labels = np.repeat(np.array(self.cfg.labels, np.int32), self.cfg.per_label)
        n, images, squares, evaluations = len(labels), [], [], []
        for drawn in draw(self._generator, variables, labels, self._batch, self._mesh, poll):
            squares += list(np.square(np.asarray(drawn.latents)).mean((1, 2, 3)))
            evaluations += list(np.asarray(drawn.evaluations))
            images += list(decode(self._net, drawn.latents))
        scores = {
            "latent_rms": float(np.sqrt(np.mean(squares[:n]))),
            "evaluations": float(np.mean(evaluations[:n])),
            "n": float(n),
        }
        return Report(scores, {self.cfg.name: self._grid(images, int(jax.device_get(state.step)))})

    def _grid(self, images: list[np.ndarray], step: int) -> np.ndarray:
        per = self.cfg.per_label
        rows = [images[i : i + per] for i in range(0, per * len(self.cfg.labels), per)]
        names = [self._names[k] for k in self.cfg.labels]
        scale = self.cfg.guidance.scale
        caption = f"{self.cfg.name}, step {step}" + (f", guidance {scale:g}" if scale != 1 else "")
        return pictures.grid(rows, labels=names, caption=caption)


def check_classes(labels: tuple[int, ...], classes: int) -> None:
    """UserError if a class does not exist."""
    if wrong := [k for k in labels if not 0 <= k < classes]:
        raise UserError(f"class {wrong[0]} does not exist; the network knows 0..{classes - 1}")


def check_sampler(name: str, sampler: SamplerConfig, process: ProcessConfig) -> None:
    """UserError if an evaluator's sampler does not fit the process."""
    if found := sampler.process_problems(process):
        raise UserError(f"evals: {name}:\n" + "\n".join(f"  - {p}" for p in found))


def class_names(manifest: latents.Manifest) -> list[str]:
    """What the classes of a cache are called in pictures."""
    return list(manifest.classes) or [f"class {k}" for k in range(manifest.num_classes)]


def rows_of_classes(labels: Int[np.ndarray, " n"], per_class: int) -> list[Int[np.ndarray, " k"]]:
    """Indices of the samples that are shown, a row for each of some classes spread over all."""
    present = np.unique(labels)
    count = min(_ROWS, len(present))
    chosen = [present[i * len(present) // count] for i in range(count)]
    return [np.flatnonzero(labels == k)[:per_class] for k in chosen]


def draw(
    generator: Generator, variables: Variables, labels: Int32[np.ndarray, " n"], batch: int,
    mesh: Mesh, poll: Callable[[], None],
) -> Iterator[Drawn]:  # fmt: skip
    """Samples 0, 1, ... of these classes in whole batches: what is beyond n fills the last one.

    Each process of the mesh gives its rows of a batch and gets the whole one.
    """
    n, (part, parts) = len(labels), sharding.row_shard(mesh)
    mine = slice(part * batch // parts, (part + 1) * batch // parts)
    for start in range(0, n, batch):
        index = np.arange(start, start + batch, dtype=np.int32)[mine]
        yield generator.draw(variables, labels[index % n], index)
        poll()


def decoder(source: str, manifest: latents.Manifest, mesh: Mesh) -> Autoencoder:
    """The autoencoder at `source` ("": that of the cache) on every device of the mesh.

    UserError if its encoder is not the one that made the latents.
    """
    weights = InitWeights(manifest.weights)
    net = (
        autoencoder.load(source)
        if source
        else autoencoder.load(manifest.autoencoder, weights, manifest.variant)
    )
    for note in latents.check(manifest, net):
        logging.warning("%s", note)
    return net.placed(mesh)


def decode(net: Autoencoder, drawn: jax.Array) -> np.ndarray:
    """uint8 images of latents; those that every process holds whole give images likewise."""
    images = metrics.to_uint8(net.decode(drawn))
    if not images.is_fully_addressable:
        images = gathered(drawn.sharding)(images)  # the decoder leaves each device its own rows
    return np.asarray(images)


def decode_all(
    net: Autoencoder, chosen: Float[np.ndarray, "n h w c"], batch: int, mesh: Mesh,
    poll: Callable[[], None],
) -> UInt8[np.ndarray, "n H W 3"]:  # fmt: skip
    """The same of any number, in batches of one size; every process gives and gets all."""
    n, parts = len(chosen), []
    for start in range(0, n, batch):
        rows = chosen[np.arange(start, start + batch) % n]
        parts.append(decode(net, jax.device_put(rows, sharding.replicated(mesh))))
        poll()
    return np.concatenate(parts)[:n]
