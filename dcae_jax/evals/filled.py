"""How well masked tokens are filled in, in pixels, on held-out images.

Two protocols, since the encoder of an autoencoder sees the whole image:

  latent-masked  the whole image is encoded and tokens are dropped then, as in training: what is
                 visible knows a little of what is not
  pixel-masked   the pixels of the masked cells are replaced by the mean of the others before the
                 image is encoded: nothing leaks, but visible latents near a hole are disturbed

Errors are those of the masked pixels alone, pooled over all images (not the mean of their PSNRs);
nothing is pasted back.  A masked autoencoder of pixels
has one protocol only, the second.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from dcae_jax import masking, rng, sharding
from dcae_jax.config import InitWeights, RunConfig
from dcae_jax.data import pipeline
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import generate, metrics
from dcae_jax.evals.base import Report, below, is_due, variables_of
from dcae_jax.evals.masked import check_fills, visible
from dcae_jax.inpainting import covered
from dcae_jax.report import images as pictures
from dcae_jax.step import TrainState
from dcae_jax.tasks.autoencode import to_float
from dcae_jax.tasks.base import Batch, Task, Variables
from dcae_jax.tree import Tree

LATENT, PIXEL = "latent_masked", "pixel_masked"
Pixels = UInt8[Array, "b H W 3"]


@dataclass(slots=True)
class FilledConfig:
    """Pooled PSNR of what is filled into masked cells of `n` images of a split."""

    name: str = ""  # "": split and share, e.g. filled-test-0.75
    images: DataConfig = field(default_factory=lambda: DataConfig(split="test"))
    ratio: float = 0.75  # share of the tokens that is masked; visible ones are rounded down
    n: int = 64  # images, exactly, on any number of devices
    batch: int = 16  # over all devices
    seed: int = 0  # of the masks; a run's own seed does not change them
    every: int = 1000  # steps; 0: never in between
    at_start: bool = False
    at_end: bool = True
    pictures: int = 4  # in the grid
    weights: InitWeights = InitWeights.ema

    def resolve(self, run: RunConfig) -> None:
        """Names the evaluator."""
        self.name = self.name or f"filled-{self.images.split}-{self.ratio:g}"

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = below(self, n=1, batch=1, every=0, seed=0, pictures=0)
        if not 0 < self.ratio < 1:
            found.append(
                f"evals: ratio = {self.ratio} of {self.name}; the share that is masked, between 0 "
                "and 1"
            )
        return found

    def metrics(self) -> tuple[str, ...]:
        """The names of its scores."""
        return (f"psnr_{LATENT}", f"psnr_{PIXEL}", "n")

    def due(self, step: int, last: int) -> bool:
        """Whether it runs after `step` of `last` steps."""
        return is_due(self, step, last)

    def build(self, run: RunConfig, task: Task, mesh: Mesh) -> "Filled":
        """The evaluator; it loads the autoencoder."""
        return Filled(self, run, task, mesh)


class Filled:
    """See FilledConfig."""

    def __init__(self, cfg: FilledConfig, run: RunConfig, task: Any, mesh: Mesh):
        self.cfg, self._run, self._task, self._mesh = cfg, run, task, mesh
        self._grid, self._keep = self._checked()
        self._net = None
        if not isinstance(run.data, DataConfig):
            self._net = generate.decoder("", run.data.manifest(), mesh)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-cfg.batch // rows) * rows
        # The same masks for every run, so that runs compare.
        self._key = rng.key(cfg.seed, 0, "filled")
        self._fill = jax.jit(self._filled)
        self._whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))

    def _checked(self) -> tuple[tuple[int, int], int]:
        """(rows and columns of tokens, visible ones); UserError if the task or images do not fit.

        Before the autoencoder is loaded, and long before the first evaluation.
        """
        name, side, wanted = self.cfg.name, self.cfg.images.resolution, self._run.data.resolution
        check_fills(name, self._task)
        if why := self._task.cfg.filling_problem():
            raise UserError(f"evals: {name}: {why}")
        if side != wanted:
            raise UserError(
                f"evals: {name}: images of {side} px for a network of {wanted} px; set "
                f"images.resolution={wanted}"
            )
        grid = self._task.grid()
        return grid, visible(name, self.cfg.ratio, grid[0] * grid[1])

    @property
    def protocols(self) -> tuple[str, ...]:
        """Those that this network has."""
        return (PIXEL,) if self._net is None else (LATENT, PIXEL)

    def baselines(self) -> dict[str, dict[str, float]]:
        """On the same pixels: the mean of the visible ones, and the autoencoder with no mask."""
        total = {"mean-of-visible": 0.0, "autoencoder": 0.0}
        count = 0.0
        for k, batch in enumerate(self._batches()):
            hole = self._hole(self._order(k))
            total["mean-of-visible"] += _squares(batch, covered(batch["image"], hole), hole)
            if self._net is not None:
                whole = self._decoded(self._encoded(batch["image"]))
                total["autoencoder"] += _squares(batch, whole, hole)
            count += _numbers(batch, hole)
        found = {"mean-of-visible": {f"psnr_{PIXEL}": _psnr(total["mean-of-visible"], count)}}
        if self._net is not None:  # nothing masked: the same, and the best, under both protocols
            best = _psnr(total["autoencoder"], count)
            found["autoencoder"] = {f"psnr_{name}": best for name in self.protocols}
        return found

    def run(self, state: TrainState, constants: Tree, poll: Callable[[], None]) -> Report:
        """Pooled PSNR of the masked pixels for each protocol, and the grid of the first images."""
        variables = variables_of(state, constants, self.cfg.weights, self._run.ema)
        totals, count, shown = dict.fromkeys(self.protocols, 0.0), 0.0, []
        for k, batch in enumerate(self._batches()):
            order = self._order(k)
            hole, found = self._hole(order), {}
            hidden = covered(batch["image"], hole)
            for protocol in self.protocols:
                seen = batch["image"] if protocol == LATENT else hidden
                found[protocol] = self._filled_image(variables, batch, seen, order)
                totals[protocol] += _squares(batch, found[protocol], hole)
            count += _numbers(batch, hole)
            room = min(self.cfg.pictures - len(shown), self.cfg.n - k * self._batch)
            if room > 0:  # the rows of all processes
                rows = jax.device_get(self._whole((batch["image"], hidden, *found.values())))
                shown += [[column[i] for column in rows] for i in range(min(room, self._batch))]
            poll()
        scores = {f"psnr_{name}": _psnr(value, count) for name, value in totals.items()}
        return Report({**scores, "n": float(self.cfg.n)}, self._picture(shown, state))

    def _picture(
        self, shown: list[list[np.ndarray]], state: TrainState
    ) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
        if not shown:
            return {}
        names = [name.replace("_", "-") for name in self.protocols]
        caption = f"{self.cfg.name}, step {int(jax.device_get(state.step))}"
        grid = pictures.grid(shown, columns=["original", "masked", *names], caption=caption)
        return {self.cfg.name: grid}

    def _batches(self) -> Iterator[dict[str, Array]]:
        shard = pipeline.Shard(*sharding.row_shard(self._mesh))
        with self.cfg.images.eval_batches(batch=self._batch, n=self.cfg.n, shard=shard) as batches:
            for local in batches:
                yield sharding.put_batch(dict(local), self._mesh)

    def _order(self, k: int) -> Int[Array, "b n"]:
        """Of the tokens of the images of batch k; a mask follows the image's index."""
        index = k * self._batch + jnp.arange(self._batch)
        return masking.indexed_order(self._key, index, *self._grid)

    def _hole(self, order: Int[Array, "b n"]) -> Bool[Array, "b H W"]:
        """The pixels of the masked cells."""
        masked = masking.split(order, self._keep).masked()
        cell = self.cfg.images.resolution // self._grid[0]
        return masked.reshape(-1, *self._grid).repeat(cell, axis=1).repeat(cell, axis=2)

    def _encoded(self, image: Pixels) -> Float[Array, "b h w c"]:
        """What the task takes before its normalisation."""
        if self._net is None:
            return image.astype(jnp.float32) / 255.0
        return self._net.encode(to_float(image))

    def _decoded(self, x: Float[Array, "b h w c"]) -> Pixels:
        return metrics.to_uint8(2.0 * x - 1.0 if self._net is None else self._net.decode(x))

    def _filled_image(
        self, variables: Variables, batch: Batch, seen: Pixels, order: Int[Array, "b n"]
    ) -> Pixels:
        return self._decoded(self._fill(variables, self._encoded(seen), order, batch["label"]))

    def _filled(
        self, variables: Variables, x: Float[Array, "b h w c"], order: Int[Array, "b n"],
        label: Int[Array, " b"],
    ) -> Float[Array, "b h w c"]:  # fmt: skip
        norm = variables.constants["norm"]
        return norm.invert(self._task.fill(variables, norm.apply(x), order, self._keep, label))


def _squares(batch: Batch, found: Pixels, hole: Bool[Array, "b H W"]) -> float:
    """Squared grey levels of the masked pixels of the real images, summed."""
    error = batch["image"].astype(jnp.float32) - found.astype(jnp.float32)
    each = jnp.sum(error**2 * hole[..., None], axis=(1, 2, 3))
    return float(metrics.masked_sum(each, batch["mask"]))


def _numbers(batch: Batch, hole: Bool[Array, "b H W"]) -> float:
    """How many numbers that are."""
    return float(metrics.masked_sum(3.0 * jnp.sum(hole, axis=(1, 2)), batch["mask"]))


def _psnr(squares: float, count: float) -> float:
    return metrics.pooled_psnr(squares / count, 1)
