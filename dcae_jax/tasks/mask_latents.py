"""Training a masked autoencoder on latents (LMD), or on pixels (MAE).

Each step masks as many tokens as the schedule says, other ones in every example; the encoder sees
the visible tokens alone, and the loss is the squared error of the masked ones.

Source: LMD (arXiv 2312.07971) and MAE (arXiv 2111.06377).  Unlike LMD's code, which hands the
network unscaled latents of deviation 5.5, latents are normalised here as for diffusion.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dcae_jax import masking, tree
from dcae_jax.config import RunConfig, regex_problem
from dcae_jax.errors import UserError
from dcae_jax.masking import MaskConfig, Rounding, Split
from dcae_jax.models import lmd
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.models.transformer import patchify, unpatchify
from dcae_jax.tasks.base import Batch, Inputs, Loss, Objective, Variables, asking_problems
from dcae_jax.tasks.latents import (
    NO_AUTOENCODER,
    LatentNorm,
    Latents,
    are_pixels,
    data_problems,
    expect_shape,
    inputs_of,
    kind_problems,
    pixel_problems,
    process_problems,
    reader_problems,
    spatial_problems,
)
from dcae_jax.tree import Tree

Tokens = Float[Array, "b n p"]


class Visible(NamedTuple):
    """What the compiled step depends on."""

    keep: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.keep} of {self.tokens} tokens visible"


@dataclass(slots=True)
class MaskLatentsConfig:
    """One masked autoencoder.  The default is LMD-B with LMD's schedule."""

    model: LMDConfig = field(default_factory=LMDConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    # Predict each token whitened by its own mean and deviation, as the published recipes do; what
    # is predicted then cannot be decoded.
    norm_target: bool = True
    latent_norm: LatentNorm = LatentNorm.scalar  # of latents; pixels: ImageNet's mean, deviation
    trainable: str = "net/.*"  # regex; whole parameter paths that train

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        if why := regex_problem(self.trainable):
            return [f"task.trainable = {self.trainable!r} is no regular expression: {why}"]
        if self.norm_target and self.model.token_size < 2:
            return [
                "task.norm_target whitens the numbers of a token, and here a token is one number; "
                "set norm_target=False"
            ]
        return []

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent."""
        return (*self.model.input_size, self.model.in_channels)

    def build(self, run: RunConfig) -> "MaskLatentsTask":
        """The task; the config must be resolved and valid."""
        return MaskLatentsTask(self, run)

    def resolve(self, run: RunConfig) -> None:
        """The shape of the latents is the network's; the cache is checked against it."""
        expect_shape(run, self.latent_shape)

    def run_problems(self, run: RunConfig) -> list[str]:
        """Problems that this task sees in the whole run."""
        pixels = are_pixels(run.data)
        found = pixel_problems(run, self.latent_shape) if pixels else data_problems(run)
        found += reader_problems(run) + spatial_problems(run) + kind_problems(run)
        found += process_problems(run, "MaskedConfig of evals/masked.py")
        why = self.filling_problem()
        found += asking_problems(run, masked=None, filled=why, reconstructed=NO_AUTOENCODER)
        if not self.model.problems() and not self.mask.problems() and run.steps > 0:
            found += self._mask_problems(run.steps)
        return found

    def filling_problem(self) -> str | None:
        """Why such a model cannot fill in masked tokens."""
        if not self.norm_target:
            return None
        return (
            "this network predicts whitened tokens (task.norm_target), and the mean and deviation "
            "of a masked token are not known: nothing can be filled in; train with "
            "--config.task.norm_target=False"
        )

    def _mask_problems(self, steps: int) -> list[str]:
        tokens = self.model.tokens
        if found := self.mask.token_problems(tokens):
            return found
        visited = self.mask.visited(0, steps, steps, tokens)
        if tokens not in visited:
            return []
        return [
            f"the mask schedule leaves all {tokens} tokens visible at some steps, and the loss is "
            f"of masked tokens alone; {self._mend(steps)}"
        ]

    def _mend(self, steps: int) -> str:
        """What masks a token at the step that masks the fewest."""
        mask, tokens = self.mask, self.model.tokens
        ratio = float(np.min(mask.ratio(np.arange(steps), steps)))
        visible = tokens * (1 - ratio)
        if not mask.buckets or visible > tokens - 0.5:
            return "raise mask.start and mask.end"
        how = "the nearest" if mask.rounding is Rounding.nearest else "the next larger one"
        return (
            f"at a ratio of {ratio:g}, {visible:.3g} are to be visible, and of mask.buckets = "
            f"{mask.buckets} and all {tokens}, which always count, {tokens} is {how}: add "
            f"{math.floor(visible)} to mask.buckets, or raise mask.start"
        )


class MaskLatentsTask:
    """See MaskLatentsConfig.  Parameters: {"net": {"encoder", "decoder"}}.

    Constants: the normalisation, and the autoencoder's encoder where images are encoded in the
    step.
    """

    def __init__(self, cfg: MaskLatentsConfig, run: RunConfig):
        self.cfg, self.run = cfg, run
        self.net = cfg.model.build()
        self.inputs = inputs_of(run, cfg.latent_norm, cfg.latent_shape)
        self.objectives = (Objective("net", self._loss, cfg.trainable, run.optim),)

    # ------------------------------------------------------------------------------- the protocol

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Fresh parameters, fp32."""
        return {"net": lmd.init_variables(self.cfg.model, key)["params"]}, {}

    def constants(self, training: bool) -> Tree:
        """The normalisation; the autoencoder's encoder where it is needed."""
        return self.inputs.constants()

    def abstract_constants(self) -> Tree:
        """Shapes of `constants`, without a cache."""
        return self.inputs.abstract_constants()

    def record(self) -> dict[str, Any]:
        """The manifest of the latents: what is filled in is decoded without the cache."""
        return self.inputs.record()

    def shapes(self, spatial: int) -> list[str]:
        """What enters a step, and how many tokens are visible when."""
        steps, tokens = self.run.steps, self.cfg.model.tokens
        keeps = self.cfg.mask.visited(0, steps, steps, tokens)
        return [
            *self.inputs.shapes(),
            f"visible tokens over the run: {', '.join(map(str, keeps))} of {tokens}; a program "
            "for each",
        ]

    def static(self, step: int) -> Hashable:
        """The number of visible tokens."""
        tokens = self.cfg.model.tokens
        return Visible(self.cfg.mask.keep(step, self.run.steps, tokens), tokens)

    def statics(self, first: int, last: int) -> list[Hashable]:
        """All of them, in the order of the schedule."""
        tokens = self.cfg.model.tokens
        keeps = self.cfg.mask.visited(first, last, self.run.steps, tokens)
        return [Visible(keep, tokens) for keep in keeps]

    def prepare(
        self, key: PRNGKeyArray, batch: Batch, step: Int[Array, ""], static: Hashable
    ) -> Inputs:
        """Which tokens are visible, and what samples a latent that is a Gaussian."""
        n = batch["label"].shape[0]
        k_order, k_latent = jax.random.split(key)
        order = masking.random_order(k_order, n, *self.grid())
        examples = self.inputs.examples(k_latent, batch) | {
            "split": masking.split(order, static.keep),
            "weight": jnp.full((n,), 1.0 / n),
        }
        return Inputs(examples, {})

    def predict(self, variables: Variables, batch: Batch) -> Latents:
        """The normalised latents "x" with all but their tokens "visible" (int[b, k]) filled in."""
        visible, tokens = batch["visible"], self.cfg.model.tokens
        seen = jnp.zeros((visible.shape[0], tokens), bool)
        seen = jax.vmap(lambda row, at: row.at[at].set(True))(seen, visible)
        order = masking.order_of(seen)
        return self.fill(variables, batch["x"], order, visible.shape[1], batch["label"])

    # ------------------------------------------------------------------------- network and loss

    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        return self.cfg.model.grid(*self.cfg.model.input_size)

    def latents(self, variables: Variables, batch: Batch) -> Latents:
        """The f32 latents of a batch, or its images in [0, 1]; not normalised."""
        return self.inputs.read(variables, batch)

    def network(self, variables: Variables, x: Latents, split: Split) -> Tokens:
        """The raw output for the normalised latents `x`."""
        return self.net.apply({"params": variables.params["net"]}, x, split)

    def target(self, x: Latents) -> Tokens:
        """What the network is to say of each token of the normalised latents `x`."""
        tokens = patchify(x, self.cfg.model.patch)
        return masking.whiten(tokens) if self.cfg.norm_target else tokens

    def fill(
        self, variables: Variables, x: Latents, order: Int[Array, "b n"], keep: int,
        label: Int[Array, " b"],
    ) -> Latents:  # fmt: skip
        """See `tasks.base.Fills`; the label is not used."""
        if problem := self.cfg.filling_problem():
            raise UserError(problem)
        split = masking.split(order, keep)
        if split.whole:
            return x
        patch = self.cfg.model.patch
        tokens = self.network(variables, x, split)
        filled = jnp.where(split.masked()[:, :, None], tokens, patchify(x, patch))
        return unpatchify(filled, *self.grid(), patch)

    def _loss(self, variables: Variables, inputs: Inputs, carry: Any) -> Loss:
        x = inputs.examples
        normal, split = variables.constants["norm"].apply(self.latents(variables, x)), x["split"]
        masked = split.tokens - split.keep
        wrong = jnp.square(self.network(variables, normal, split) - self.target(normal)).mean(-1)
        each = jnp.sum(wrong * split.masked(), axis=1) / masked
        loss = jnp.sum(x["weight"] * each)
        metrics = {
            "loss": loss,
            "mask_ratio": jnp.sum(x["weight"]) * (masked / split.tokens),
            "latent_ms": jnp.sum(x["weight"] * jnp.mean(normal**2, axis=(1, 2, 3))),
        }
        return Loss({"loss": loss}, metrics, {}, None)

    # ---------------------------------------------------------------------------------- reporting

    def describe(self) -> list[str]:
        """The network, its masks, and what trains."""
        cfg, mask = self.cfg, self.cfg.mask
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        trained, frozen = tree.sizes(params, cfg.trainable)
        first, last = (mask.ratio(k, self.run.steps) for k in (0, self.run.steps - 1))
        what = "whitened tokens" if cfg.norm_target else "tokens"
        pixels = are_pixels(self.run.data)
        norm = "pixels normalised" if pixels else f"latents normalised by {cfg.latent_norm.value}"
        return [
            *cfg.model.describe(),
            f"trained {trained:,} parameters, frozen {frozen:,}",
            f"mask {mask.kind.value}: {first:.0%} to {last:.0%} of the tokens, rounded "
            f"{mask.rounding.value}; loss on masked {what}; {norm}".replace("%", " %"),
        ]

    def summary(self) -> dict[str, Any]:
        """What the report's table says of the run."""
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        trained, frozen = tree.sizes(params, self.cfg.trainable)
        return {
            "phase": "mask",
            "trained": "net" if frozen else "everything",
            "n_trained": trained,
            "n_frozen": frozen,
        }

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Latents of another size than networks expect."""
        return self.inputs.warnings(metrics)
