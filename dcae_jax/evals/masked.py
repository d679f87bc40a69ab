"""How well masked tokens of held-out latents are predicted, at fixed ratios and fixed masks."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dcae_jax import masking, rng, sharding
from dcae_jax.config import InitWeights, RunConfig
from dcae_jax.data import pipeline
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.base import Report, below, check_encoder, is_due, take_data, variables_of
from dcae_jax.masking import MaskConfig, MaskKind, Rounding
from dcae_jax.models.transformer import patchify
from dcae_jax.online import OnlineDataConfig
from dcae_jax.step import TrainState
from dcae_jax.tasks.base import Batch, Fills, Task, Variables
from dcae_jax.tasks.mask_latents import MaskLatentsTask
from dcae_jax.tree import Tree

Tokens = Float[Array, "b n p"]


@dataclass(slots=True)
class MaskedConfig:
    """Errors of masked tokens on `n` latents of a split; the masks are the same in every run.

    mse_rR: the mean squared error of the tokens that a ratio of R masks, in normalised units (of
    the whitened token where a task predicts that).  r2_rR: 1 - mse_rR over the error of the best
    guess that does not look, one token for all places: the mean of all tokens of these latents.
    """

    name: str = ""  # "": masked and the split, e.g. masked-test
    data: LatentDataConfig | OnlineDataConfig | DataConfig = field(
        default_factory=lambda: LatentDataConfig(split="test")
    )
    ratios: tuple[float, ...] = (0.15, 0.40, 0.50, 0.75)
    n: int = 1024  # latents, exactly, on any number of devices
    batch: int = 64  # over all devices
    seed: int = 0  # of the masks; a run's own seed does not change them
    every: int = 1000  # steps; 0: never in between
    at_start: bool = True
    at_end: bool = True
    weights: InitWeights = InitWeights.ema

    def resolve(self, run: RunConfig) -> None:
        """Takes the run's cache or autoencoder unless another is named; names the evaluator."""
        self.name = self.name or f"masked-{take_data(self.data, run)}"

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = below(self, n=1, batch=1, every=0, seed=0)
        if not self.ratios or any(not 0 < r < 1 for r in self.ratios):
            found.append(
                f"evals: ratios = {self.ratios} of {self.name}; shares of masked tokens between 0 "
                "and 1, e.g. (0.4, 0.75)"
            )
        return found

    def metrics(self) -> tuple[str, ...]:
        """The names of its scores."""
        return (*(f"{what}_r{r:.2f}" for r in self.ratios for what in ("mse", "r2")), "n")

    def due(self, step: int, last: int) -> bool:
        """Whether it runs after `step` of `last` steps."""
        return is_due(self, step, last)

    def build(self, run: RunConfig, task: Task, mesh: Mesh) -> "Masked":
        """The evaluator."""
        return Masked(self, run, task, mesh)


def check_fills(name: str, task: Any) -> None:
    """UserError if an evaluator's task predicts no masked tokens."""
    if not isinstance(task, Fills):
        raise UserError(
            f"evals: {name} asks for masked tokens, and the task of this run predicts none; use it "
            "with MaskLatentsConfig or MaskDiffuseConfig"
        )


def visible(name: str, ratio: float, tokens: int) -> int:
    """The number of visible tokens, rounded down: some are masked at any ratio."""
    exact = MaskConfig(kind=MaskKind.constant, end=ratio, rounding=Rounding.exact)
    keep = exact.keep(0, 1, tokens)
    if keep:
        return keep
    raise UserError(
        f"evals: {name}: a ratio of {ratio:g} leaves none of {tokens} tokens visible; the largest "
        f"that leaves one is {masking.largest_ratio(tokens):g}"
    )


class Masked:
    """See MaskedConfig."""

    def __init__(self, cfg: MaskedConfig, run: RunConfig, task: Any, mesh: Mesh):
        self.cfg, self._run, self._task, self._mesh = cfg, run, task, mesh
        check_fills(cfg.name, task)
        check_encoder(run, cfg.name, cfg.data)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-cfg.batch // rows) * rows
        self._grid = task.grid()
        self._tokens = self._grid[0] * self._grid[1]
        self._keeps = [visible(cfg.name, ratio, self._tokens) for ratio in cfg.ratios]
        self._key = rng.key(cfg.seed, 0, "masked")
        self._score = jax.jit(self._sums, out_shardings=sharding.replicated(mesh))

    def baselines(self) -> dict[str, dict[str, float]]:
        """There are none."""
        return {}

    def run(self, state: TrainState, constants: Tree, poll: Callable[[], None]) -> Report:
        """The scores of all ratios."""
        variables = variables_of(state, constants, self.cfg.weights, self._run.ema)
        shard, sums = pipeline.Shard(*sharding.row_shard(self._mesh)), []
        with self.cfg.data.eval_batches(batch=self._batch, n=self.cfg.n, shard=shard) as batches:
            for k, local in enumerate(batches):
                placed = sharding.put_batch(dict(local), self._mesh)
                first = jnp.int32(k * self._batch)
                sums.append(jax.device_get(self._score(variables, placed, first)))
                poll()
        total = functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), _doubled(sums))
        return Report(self._scores(total), {})

    def _scores(self, total: Tree) -> dict[str, float]:
        n, mean = total["n"], total["all"] / (total["n"] * self._tokens)
        scores = {}
        for ratio, keep, found in zip(self.cfg.ratios, self._keeps, total["ratios"], strict=True):
            numbers = n * (self._tokens - keep)
            mse = found["wrong"] / numbers
            spread = found["squares"] - 2 * mean @ found["sum"] + numbers * mean @ mean
            scores[f"mse_r{ratio:.2f}"] = float(mse)
            scores[f"r2_r{ratio:.2f}"] = float(1 - mse / (spread / numbers / len(mean)))
        return {**scores, "n": float(n)}

    def _sums(self, variables: Variables, batch: Batch, first: Array) -> Tree:
        """What adds up over batches; a latent's mask follows its index."""
        latent, real = self._task.latents(variables, batch), batch["mask"][:, None]
        x = variables.constants["norm"].apply(latent)
        index = first + jnp.arange(x.shape[0])
        order = masking.indexed_order(self._key, index, *self._grid)
        target = self._target(x)

        def scored(keep: int) -> Tree:
            guess = self._guess(variables, x, order, keep, batch["label"])
            weight = masking.split(order, keep).masked() * real
            return {
                "wrong": jnp.sum(weight * jnp.square(guess - target).mean(-1)),
                "sum": jnp.einsum("bn,bnp->p", weight, target),
                "squares": jnp.sum(weight * jnp.square(target).sum(-1)),
            }

        return {
            "n": real.sum(),
            "all": jnp.einsum("bn,bnp->p", jnp.broadcast_to(real, order.shape), target),
            "ratios": [scored(keep) for keep in self._keeps],
        }

    def _whitened(self) -> bool:
        """Whether the task predicts what cannot be decoded, and has no `fill`."""
        return isinstance(self._task, MaskLatentsTask) and self._task.cfg.norm_target

    def _target(self, x: Float[Array, "b h w c"]) -> Tokens:
        if self._whitened():
            return self._task.target(x)
        return patchify(x, x.shape[1] // self._grid[0])

    def _guess(
        self, variables: Variables, x: Float[Array, "b h w c"], order: Int[Array, "b n"],
        keep: int, label: Int[Array, " b"],
    ) -> Tokens:  # fmt: skip
        if self._whitened():
            return self._task.network(variables, x, masking.split(order, keep))
        return self._target(self._task.fill(variables, x, order, keep, label))


def _doubled(sums: list[Tree]) -> list[Tree]:
    """In float64, so that many batches add up as well as one."""
    return [jax.tree.map(lambda x: np.asarray(x, np.float64), part) for part in sums]
