"""How many held-out labels a probe, or a fine-tuned encoder, gets right."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dcae_jax import sharding
from dcae_jax.config import InitWeights, RunConfig
from dcae_jax.data import pipeline
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.base import Report, below, check_encoder, is_due, take_data, variables_of
from dcae_jax.online import OnlineDataConfig
from dcae_jax.step import TrainState
from dcae_jax.tasks.base import Batch, Task, Variables
from dcae_jax.tasks.probe import ProbeConfig, ProbeTask


@dataclass(slots=True)
class AccuracyConfig:
    """Labels of `n` latents (or images) of a split, never mirrored.

    topK: the share whose label is among the K largest logits; equal ones count as larger.
    cross_entropy: without smoothing or mixing.  Of Gaussian latents it takes the means.
    """

    name: str = ""  # "": accuracy and the split, e.g. accuracy-test
    data: LatentDataConfig | OnlineDataConfig | DataConfig = field(
        default_factory=lambda: LatentDataConfig(split="test")
    )
    top: tuple[int, ...] = ()  # (): 1, and where there are more than 5 classes also 5
    n: int = 10_000  # exactly, on any number of devices
    batch: int = 64  # over all devices
    every: int = 1000  # steps; 0: never in between
    at_start: bool = True
    at_end: bool = True
    weights: InitWeights = InitWeights.ema

    def resolve(self, run: RunConfig) -> None:
        """Takes the run's cache or autoencoder unless another is named; names the evaluator."""
        self.name = self.name or f"accuracy-{take_data(self.data, run)}"
        many = isinstance(run.task, ProbeConfig) and run.task.classes > 5
        self.top = tuple(self.top) or ((1, 5) if many else (1,))

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = below(self, n=1, batch=1, every=0)
        if any(k < 1 for k in self.top):
            found.append(f"evals: top = {self.top} of {self.name}; numbers from 1 on, e.g. (1, 5)")
        return found

    def metrics(self) -> tuple[str, ...]:
        """The names of its scores."""
        return (*(f"top{k}" for k in self.top), "cross_entropy", "n")

    def due(self, step: int, last: int) -> bool:
        """Whether it runs after `step` of `last` steps."""
        return is_due(self, step, last)

    def build(self, run: RunConfig, task: Task, mesh: Mesh) -> "Accuracy":
        """The evaluator."""
        return Accuracy(self, run, task, mesh)


class Accuracy:
    """See AccuracyConfig."""

    def __init__(self, cfg: AccuracyConfig, run: RunConfig, task: Any, mesh: Mesh):
        self.cfg, self._run, self._task, self._mesh = cfg, run, task, mesh
        if not isinstance(task, ProbeTask):
            raise UserError(
                f"evals: {cfg.name} asks for labels, and the task of this run knows none; use it "
                "with ProbeConfig"
            )
        check_encoder(run, cfg.name, cfg.data)
        task.check_classes(cfg.data, f"the data of {cfg.name}")
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-cfg.batch // rows) * rows
        self._score = jax.jit(self._sums, out_shardings=sharding.replicated(mesh))

    def baselines(self) -> dict[str, dict[str, float]]:
        """There are none."""
        return {}

    def run(self, state: TrainState, constants: Any, poll: Callable[[], None]) -> Report:
        """The scores of the n examples."""
        variables = variables_of(state, constants, self.cfg.weights, self._run.ema)
        names, shard = self.cfg.metrics(), pipeline.Shard(*sharding.row_shard(self._mesh))
        total = np.zeros(len(names))  # float64, so that many batches add up as well as one
        with self.cfg.data.eval_batches(batch=self._batch, n=self.cfg.n, shard=shard) as batches:
            for local in batches:
                placed = sharding.put_batch(dict(local), self._mesh)
                total += jax.device_get(self._score(variables, placed))
                poll()
        count = total[-1]
        means = zip(names[:-1], total[:-1] / count, strict=True)
        return Report({name: float(mean) for name, mean in means} | {"n": float(count)}, {})

    def _sums(self, variables: Variables, batch: Batch) -> Float[Array, " scores"]:
        """What adds up over batches, in the order of the names; padding counts nowhere."""
        logits, label = self._task.predict(variables, batch), batch["label"][:, None]
        own = jnp.take_along_axis(logits, label, axis=1)
        ahead = jnp.sum(~(logits < own), axis=1) - 1  # itself; NaN is never right
        surprise = jax.nn.logsumexp(logits, axis=1) - own[:, 0]
        found = [*(ahead < k for k in self.cfg.top), surprise, jnp.ones_like(surprise)]
        real = batch["mask"] > 0
        return jnp.stack([jnp.sum(jnp.where(real, each, 0.0)) for each in found])
