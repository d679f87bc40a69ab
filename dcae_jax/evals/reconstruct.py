"""Reconstruction quality on fixed images: PSNR, SSIM, a grid, and closed-form baselines.

LPIPS, MS-SSIM and rFID where the config asks for them: see evals/perceptual.py.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt8

from dcae_jax import sharding
from dcae_jax.config import InitWeights, RunConfig
from dcae_jax.data import pipeline
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.evals import baselines, metrics, perceptual
from dcae_jax.evals.base import Report, below, is_due, variables_of
from dcae_jax.evals.perceptual import LpipsNet, Perceptual
from dcae_jax.report import images as pictures
from dcae_jax.step import TrainState
from dcae_jax.tasks.base import Task, Variables
from dcae_jax.tree import Tree

METRICS = ("psnr", "psnr_pooled", "ssim", "n")
Image = UInt8[np.ndarray, "h w 3"]
Pixels = UInt8[Array, "b h w 3"] | UInt8[np.ndarray, "b h w 3"]


@dataclass(slots=True)
class ReconstructConfig:
    """PSNR and SSIM of an autoencoder on the first `n` images of a split, at one resolution."""

    name: str = ""  # "": source, resolution and split, e.g. photos-128-test
    data: DataConfig = field(default_factory=DataConfig)
    n: int = 64  # images, exactly, on any number of devices
    batch: int = 8  # over all devices
    every: int = 1000  # steps; 0: never in between
    at_start: bool = True  # before the first step (a later phase shows what it starts from)
    at_end: bool = True
    pictures: int = 6  # held-out images in the grid; the same ones every time
    training_pictures: int = 2  # training images below them, labelled as such
    weights: InitWeights = InitWeights.ema  # which weights are evaluated
    # Also the PSNR with only the first so many channels of the latent: psnr_c8 (structured latents)
    channel_counts: tuple[int, ...] = ()
    # These need more time, and but for ms_ssim the files that `import-net` makes.
    lpips: LpipsNet = LpipsNet.off
    ms_ssim: bool = False  # for images of 176 px and more
    rfid: bool = False  # FID to the originals of these n images: rfid64; below 2048 only for itself
    nets: str = ""  # folder of those files; "": where `import-net` puts them
    baselines: bool = False  # bicubic and PCA of equal rate on the same pixels (once, at the end)
    pca_images: int = 128  # training crops whose blocks fit the PCA

    def resolve(self, run: RunConfig) -> None:
        """Names the evaluator after its data."""
        source = type(self.data.source).__name__.removesuffix("Config").lower()
        self.name = self.name or f"{source}-{self.data.resolution}-{self.data.split}"

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = below(self, n=1, batch=1, every=0)
        return found + perceptual.problems(self, self.data.resolution)

    def metrics(self) -> tuple[str, ...]:
        """The names of its scores."""
        return METRICS + tuple(map(score_of, self.channel_counts)) + perceptual.names(self)

    def due(self, step: int, last: int) -> bool:
        """Whether it runs after `step` of `last` steps."""
        return is_due(self, step, last)

    def build(self, run: RunConfig, task: Task, mesh: Mesh) -> "Reconstruct":
        """The evaluator; it loads the networks that its scores need."""
        return Reconstruct(self, run, task, mesh)


class Reconstruct:
    """Runs the task's `predict` over fixed images; sums are masked, so n images count as n."""

    def __init__(self, cfg: ReconstructConfig, run: RunConfig, task: Task, mesh: Mesh):
        self.cfg, self.run_cfg, self.task, self.mesh = cfg, run, task, mesh
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch = -(-cfg.batch // rows) * rows  # divisible by the devices; padding is masked
        self._more = Perceptual(cfg, mesh)
        whole = sharding.replicated(mesh)
        by_row = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
        self._score = jax.jit(self._scores, out_shardings=(whole, whole, by_row))
        self._given = jax.jit(
            lambda nets, b: self._pair_sums(nets, b["x"], b["y"], b["mask"]), out_shardings=whole
        )

    def record(self) -> dict[str, Any]:
        """The files of the networks."""
        return self._more.record()

    def run(self, state: TrainState, constants: Tree, poll: Callable[[], None]) -> Report:
        """Scores and the grid; `poll` is called once per batch (it raises when preempted)."""
        variables = variables_of(state, constants, self.cfg.weights, self.run_cfg.ema)
        total, rfid = {}, self._more.rfid()
        shown: list[tuple[Image, Image, str]] = []
        for batch in self._batches(self.cfg.data, self.cfg.n):
            found, head, pairs = self._score(variables, self._more.params, batch)
            sums, head = jax.device_get((found, head))
            total = {k: total.get(k, 0.0) + float(v) for k, v in sums.items()}
            room = min(self.cfg.pictures - len(shown), int(sums["count"]))
            shown += _labelled(head, room, "held-out")
            if rfid:
                rfid.add(*pairs, head["mask"])
            poll()
        scores = self._summary(total, rfid)
        shown += self._training(variables)
        if not shown:
            return Report(scores, {})
        grid = pictures.reconstruction_grid(
            np.stack([x for x, _, _ in shown]), np.stack([y for _, y, _ in shown]),
            [label for _, _, label in shown],
            caption=f"{self.cfg.name}, step {int(jax.device_get(state.step))}",
        )  # fmt: skip
        return Report(scores, {self.cfg.name: grid})

    def _summary(self, total: dict[str, Any], rfid: perceptual.PairFid | None) -> dict[str, float]:
        """All scores, in the order of `metrics`."""
        found = summarise(total)
        found |= {name: rfid.value() for name in perceptual.names(self.cfg)[-1:] if rfid}
        return {name: found[name] for name in self.cfg.metrics() if name in found}

    def _training(self, variables: Variables) -> list[tuple[Image, Image, str]]:
        count = self.cfg.training_pictures
        if not count:
            return []
        (batch, *_) = self._batches(self._training_data(), count)
        _, head, _ = self._score(variables, self._more.params, batch)
        head = jax.device_get(head)
        return _labelled(head, min(count, len(head["output"])), "training")

    def baselines(self) -> dict[str, dict[str, float]]:
        """Closed-form baselines on the same pixels: bicubic down/up and PCA of equal rate."""
        if not self.cfg.baselines:
            return {}
        model, cfg = self.run_cfg.task.model, self.cfg
        test = _images(cfg.data, cfg.batch, cfg.n)
        blocks = baselines.to_blocks(
            _images(self._training_data(), cfg.batch, cfg.pca_images), model.factor
        )
        outputs = {f"bicubic-{model.factor}": baselines.bicubic(test, model.factor)}
        best = baselines.fit_pca(blocks, max(3, model.latent_channels))
        for k in dict.fromkeys((3, model.latent_channels)):
            pca = best.first(k)
            outputs[f"pca-{k}"] = baselines.reconstruct(pca, test, model.factor)
        return {name: self._of_given(test, out) for name, out in outputs.items()}

    def _of_given(
        self, originals: UInt8[np.ndarray, "n h w 3"], outputs: UInt8[np.ndarray, "n h w 3"]
    ) -> dict[str, float]:
        """The same scores of outputs that are there; every process has all of them."""
        total, rfid, (part, parts) = {}, self._more.rfid(), sharding.row_shard(self.mesh)
        for start in range(0, len(originals), self.batch):
            index = np.arange(start, start + self.batch)
            mask, rows = (index < len(originals)).astype(np.float32), index % len(originals)
            mine = slice(part * self.batch // parts, (part + 1) * self.batch // parts)
            local = {"x": originals[rows], "y": outputs[rows], "mask": mask}
            batch = sharding.put_batch({k: v[mine] for k, v in local.items()}, self.mesh)
            sums = jax.device_get(self._given(self._more.params, batch))
            total = {k: total.get(k, 0.0) + float(v) for k, v in sums.items()}
            if rfid:
                rfid.add(batch["x"], batch["y"], mask)
        return self._summary(total, rfid)

    def _training_data(self) -> DataConfig:
        data = copy.deepcopy(self.cfg.data)
        data.split = self.run_cfg.data.split
        return data

    def _batches(self, data: DataConfig, n: int) -> Iterator[dict[str, Array]]:
        shard = pipeline.Shard(*sharding.row_shard(self.mesh))
        with data.eval_batches(batch=self.batch, n=n, shard=shard) as batches:
            for local in batches:
                wanted = {k: local[k] for k in ("image", "mask")}
                yield sharding.put_batch(wanted, self.mesh)

    def _scores(
        self, variables: Variables, nets: Tree, batch: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array], tuple[Array, Array]]:
        """(sums over the batch, its first pictures and its mask, originals and outputs)."""
        original, mask = batch["image"], batch["mask"]
        output = metrics.to_uint8(self.task.predict(variables, batch))
        head = {
            "original": original[: self.cfg.pictures],
            "output": output[: self.cfg.pictures],
            "mask": mask,
        }
        sums = self._pair_sums(nets, original, output, mask) | self._truncated(variables, batch)
        return sums, head, (original, output)

    def _pair_sums(
        self, nets: Tree, original: Pixels, output: Pixels, mask: Any
    ) -> dict[str, Array]:
        return _sums(original, output, mask) | self._more.sums(nets, original, output, mask)

    def _truncated(self, variables: Variables, batch: dict[str, Array]) -> dict[str, Array]:
        """Masked sums of the PSNR with the first channels of the latents."""
        found = {}
        for count in self.cfg.channel_counts:
            channels = jnp.full(batch["mask"].shape, count)
            output = self.task.predict(variables, batch | {"channels": channels})
            psnr = metrics.psnr(batch["image"], metrics.to_uint8(output))
            found[score_of(count)] = metrics.masked_sum(psnr, batch["mask"])
        return found


def score_of(count: int) -> str:
    """The name of the PSNR with so many channels."""
    return f"psnr_c{count}"


def _images(data: DataConfig, batch: int, n: int) -> UInt8[np.ndarray, "n h w 3"]:
    with data.eval_batches(batch=batch, n=n) as batches:
        return np.concatenate([b["image"][b["mask"] > 0] for b in batches])


def _labelled(head: dict[str, Any], count: int, label: str) -> list[tuple[Image, Image, str]]:
    pairs = zip(head["original"], head["output"], strict=True)
    return [(x, y, label) for x, y in itertools.islice(pairs, max(count, 0))]


def _sums(original: Pixels, output: Pixels, mask: Any) -> dict[str, Array]:
    """Masked sums over the batch of the scores of each image."""
    original, output, mask = (jnp.asarray(x) for x in (original, output, mask))
    mse = metrics.mse(original, output)
    scores = {
        "mse": mse,
        "psnr": metrics.psnr(original, output),
        "ssim": metrics.ssim(original, output),
        "count": jnp.ones_like(mse),
    }
    return {k: metrics.masked_sum(v, mask) for k, v in scores.items()}


def summarise(total: dict[str, Any]) -> dict[str, float]:
    """Means from sums: PSNR per image and over the pooled MSE, SSIM, and the number of images.

    Further sums become means under their names.
    """
    n = float(total["count"])
    means = {k: float(v) / n for k, v in total.items() if k not in ("mse", "count")}
    return {**means, "psnr_pooled": metrics.pooled_psnr(float(total["mse"]), n), "n": n}
