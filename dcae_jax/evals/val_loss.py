"""The loss on held-out latents, whole and by time: fixed times, noise and classes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dcae_jax import rng, sharding
from dcae_jax.config import InitWeights, RunConfig
from dcae_jax.data import pipeline
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.diffusion import samplers
from dcae_jax.evals.base import Report, below, check_encoder, is_due, take_data, variables_of
from dcae_jax.online import OnlineDataConfig
from dcae_jax.step import TrainState
from dcae_jax.tasks.base import Batch, Task, Variables
from dcae_jax.tasks.diffuse import DiffuseTask
from dcae_jax.tree import Tree


@dataclass(slots=True)
class ValLossConfig:
    """The training loss, without label dropout, on the first `n` latents of a split.

    Of Gaussian latents it takes the means, where training draws samples.
    """

    name: str = ""  # "": latents and split, e.g. latents-test
    data: LatentDataConfig | OnlineDataConfig = field(
        default_factory=lambda: LatentDataConfig(split="test")
    )
    n: int = 1024  # latents, exactly, on any number of devices; in turn for the parts of the time
    batch: int = 64  # over all devices
    bins: int = 10  # equal parts of the time from 0 (data) to 1 (noise)
    every: int = 1000  # steps; 0: never in between
    at_start: bool = True
    at_end: bool = True
    weights: InitWeights = InitWeights.ema

    def resolve(self, run: RunConfig) -> None:
        """Takes the run's cache or autoencoder unless another is named; names the evaluator."""
        self.name = self.name or f"latents-{take_data(self.data, run)}"

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = below(self, n=1, batch=1, bins=1, every=0)
        if self.n < self.bins:
            found.append(
                f"evals: n = {self.n} of {self.name} leaves some of its bins = {self.bins} parts "
                "of the time without a latent; raise n or lower bins"
            )
        return found

    def metrics(self) -> tuple[str, ...]:
        """The names of its scores."""
        return ("loss", *(self.bin_name(i) for i in range(self.bins)), "n")

    def bin_name(self, i: int) -> str:
        """The name of the loss of the i-th part of the time."""
        return f"loss_t{i / self.bins:.2f}"

    def due(self, step: int, last: int) -> bool:
        """Whether it runs after `step` of `last` steps."""
        return is_due(self, step, last)

    def build(self, run: RunConfig, task: Task, mesh: Mesh) -> "ValLoss":
        """The evaluator."""
        return ValLoss(self, run, task, mesh)


class ValLoss:
    """See ValLossConfig."""

    def __init__(self, cfg: ValLossConfig, run: RunConfig, task: DiffuseTask, mesh: Mesh):
        self.cfg, self._run, self._task, self._mesh = cfg, run, task, mesh
        check_encoder(run, cfg.name, cfg.data)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-cfg.batch // rows) * rows
        self._key = rng.key(run.seed, 0, "validation")
        edges = jnp.linspace(0.0, 1.0, cfg.bins + 1)
        self._edges = np.asarray(task.process.share(edges))  # of the bins, as shares
        self._score = jax.jit(self._sums, out_shardings=sharding.replicated(mesh))

    def baselines(self) -> dict[str, dict[str, float]]:
        """There are none."""
        return {}

    def run(self, state: TrainState, constants: Tree, poll: Callable[[], None]) -> Report:
        """The mean of each part of the time; their mean by the shares of the training times."""
        variables = variables_of(state, constants, self.cfg.weights, self._run.ema)
        losses, counts = np.zeros(self.cfg.bins), np.zeros(self.cfg.bins)
        shard = pipeline.Shard(*sharding.row_shard(self._mesh))
        with self.cfg.data.eval_batches(batch=self._batch, n=self.cfg.n, shard=shard) as batches:
            for k, local in enumerate(batches):
                placed = sharding.put_batch(dict(local), self._mesh)
                first = jnp.int32(k * self._batch)
                found = jax.device_get(self._score(variables, placed, first))
                losses, counts = losses + found[0], counts + found[1]
                poll()
        means, shares = losses / counts, np.diff(self._edges.astype(np.float64))
        scores = {"loss": float(means @ shares / shares.sum())}
        scores |= {self.cfg.bin_name(i): float(mean) for i, mean in enumerate(means)}
        return Report({**scores, "n": float(counts.sum())}, {})

    def _sums(
        self, variables: Variables, batch: Batch, first: Array
    ) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
        """(sums of losses, numbers of latents) of each part; a latent's draws follow its index."""
        latent, process = self._task.latents(variables, batch), self._task.process
        index = first + jnp.arange(latent.shape[0])
        part = index % self.cfg.bins
        inside = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(self._key, i)))(index)
        edges = jnp.asarray(self._edges)
        low, high = edges[part], edges[part + 1]
        time = process.quantile(low + inside * (high - low))
        # Where next to no training time falls into a part, rounding may lead out of it.
        time = jnp.clip(time, part / self.cfg.bins, (part + 1) / self.cfg.bins)
        noise = samplers.initial_noise(self._key, index, latent.shape[1:])
        examples = {"latent": latent, "label": batch["label"], "noise": noise, "time": time}
        loss = self._task.losses(variables, examples) * batch["mask"]
        one_hot = jax.nn.one_hot(part, self.cfg.bins) * batch["mask"][:, None]
        return (loss[:, None] * one_hot).sum(0), one_hot.sum(0)
