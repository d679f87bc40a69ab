"""Training a diffusion model on latents of an autoencoder, cached or encoded in the step.

The model is a network, a process and a normalisation of the latents: UViT, USiT, DiT and SiT are
values of these.  Published recipes (DC-AE, arXiv 2410.10733): the network sees the latents times
one scalar, each label is dropped with probability 0.1, nothing is augmented.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dcae_jax import tree
from dcae_jax.config import RunConfig, regex_problem
from dcae_jax.diffusion.guidance import Denoiser, Reference
from dcae_jax.diffusion.process import Process, ProcessConfig
from dcae_jax.errors import UserError
from dcae_jax.models.dit import DiTConfig
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.tasks.base import Batch, Inputs, Loss, Objective, Variables, asking_problems
from dcae_jax.tasks.latents import (
    NO_AUTOENCODER,
    LatentInputs,
    LatentNorm,
    Latents,
    LatentStats,
    data_problems,
    expect_shape,
    reader_problems,
    spatial_problems,
)
from dcae_jax.tree import Tree


@runtime_checkable
class Draws(Protocol):
    """An evaluator that draws samples."""

    name: str
    sampler: Any
    guidance: Any


@dataclass(slots=True)
class DiffuseConfig:
    """One diffusion model.  The default is UViT-S on f32c32 latents of 512-px images."""

    model: UViTConfig | DiTConfig = field(default_factory=UViTConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    latent_norm: LatentNorm = LatentNorm.scalar
    label_dropout: float = 0.1  # probability of the null class, for guidance
    trainable: str = "net/.*"  # regex; whole parameter paths that train

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = [] if 0 <= self.label_dropout < 1 else [
            f"task.label_dropout = {self.label_dropout}; a probability below 1, published: 0.1"
        ]  # fmt: skip
        if why := regex_problem(self.trainable):
            found.append(f"task.trainable = {self.trainable!r} is no regular expression: {why}")
        found += self._variance_problems()
        return found

    def _variance_problems(self) -> list[str]:
        variance = self.model.out_factor == 2
        if variance == self.process.learn_variance:
            return []
        return [
            f"task.model gives {'a' if variance else 'no'} variance, but "
            f"task.process.learn_variance = {self.process.learn_variance}; set both or none"
        ]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent."""
        return (*self.model.input_size, self.model.in_channels)

    def build(self, run: RunConfig) -> "DiffuseTask":
        """The task; the config must be resolved and valid."""
        return DiffuseTask(self, run)

    def resolve(self, run: RunConfig) -> None:
        """The shape of the latents is the network's; the cache is checked against it."""
        expect_shape(run, self.latent_shape)

    def run_problems(self, run: RunConfig) -> list[str]:
        """Problems that this task sees in the whole run."""
        found = data_problems(run) + reader_problems(run) + spatial_problems(run)
        why = self.filling_problem()
        found += asking_problems(run, masked=why, filled=why, reconstructed=NO_AUTOENCODER)
        for e in run.evals:
            if isinstance(e, Draws):
                found += [f"evals: {e.name}: {p}" for p in self._drawing_problems(e)]
        return found

    def sampling_problem(self) -> str | None:
        """Why nothing can be sampled from such a model."""
        return None

    def filling_problem(self) -> str | None:
        """Why such a model cannot say what masked tokens are."""
        return (
            "this network has only learned to remove noise; train MaskDiffuseConfig or "
            "MaskLatentsConfig"
        )

    def _drawing_problems(self, e: Draws) -> list[str]:
        """What does not fit between the model and an evaluator that samples it."""
        found = list(e.sampler.process_problems(self.process))
        if e.guidance.reference is Reference.weak_model:
            found.append(
                "guidance.reference = weak_model: there is no second model while one trains; set "
                "null_class, and give the weak model to `python -m dcae_jax sample --weak`"
            )
        unguided = e.guidance.scale == 1 or e.guidance.reference is not Reference.null_class
        if not unguided and not self.label_dropout:
            found.append(
                f"guidance.scale = {e.guidance.scale:g} asks the network for samples without a "
                "class, which it never sees with task.label_dropout = 0; set label_dropout=0.1, "
                "or scale=1"
            )
        if e.guidance.channels > self.model.in_channels:
            found.append(
                f"guidance.channels = {e.guidance.channels}, but latents have "
                f"{self.model.in_channels}; 0 guides all"
            )
        return found


class DiffuseTask:
    """See DiffuseConfig.  Parameters: {"net": ...}.

    Constants: the normalisation, and the encoder where images are encoded in the step.
    """

    def __init__(self, cfg: DiffuseConfig, run: RunConfig):
        self.cfg, self.run = cfg, run
        self.net = cfg.model.build()
        self.process: Process = cfg.process.build()
        self.inputs = LatentInputs(run, cfg.latent_norm, cfg.latent_shape)
        self.objectives = (Objective("net", self._loss, cfg.trainable, run.optim),)

    # ------------------------------------------------------------------------------- the protocol

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Fresh parameters, fp32."""
        model = self.cfg.model
        x = jnp.zeros((1, *model.input_size, model.in_channels))
        cond = {"label": jnp.zeros((1,), jnp.int32)}
        return {"net": self.net.init(key, x, jnp.zeros((1,)), cond)["params"]}, {}

    def constants(self, training: bool) -> Tree:
        """The normalisation, from the manifest (UserError if that does not fit); the encoder."""
        check_manifest(self.cfg, self.inputs.manifest())
        return self.inputs.constants()

    def abstract_constants(self) -> Tree:
        """Shapes of `constants`, without a cache."""
        return self.inputs.abstract_constants()

    def record(self) -> dict[str, Any]:
        """The manifest: samples are drawn and decoded without the cache."""
        manifest = self.inputs.manifest()
        check_manifest(self.cfg, manifest)
        return {"latents": manifest.to_json()}

    def shapes(self, spatial: int) -> list[str]:
        """What enters a step."""
        return self.inputs.shapes()

    def static(self, step: int) -> Hashable:
        """The compiled step does not depend on anything."""
        return ()

    def statics(self, first: int, last: int) -> list[Hashable]:
        """One program for all steps."""
        return [()]

    def prepare(
        self, key: PRNGKeyArray, batch: Batch, step: Int[Array, ""], static: Hashable
    ) -> Inputs:
        """Times, noise, dropped labels, and what samples a latent that is a Gaussian."""
        label = batch["label"]
        shape = (label.shape[0], *self.cfg.latent_shape)
        k_time, k_noise, k_drop, k_latent = jax.random.split(key, 4)
        dropped = jax.random.bernoulli(k_drop, self.cfg.label_dropout, shape[:1])
        examples = self.inputs.examples(k_latent, batch) | {
            "label": jnp.where(dropped, self.cfg.model.num_classes, label),
            "noise": jax.random.normal(k_noise, shape),
            "time": self.process.draw_times(k_time, shape[:1]),
            "weight": jnp.full(shape[:1], 1.0 / shape[0]),
        }
        return Inputs(examples, {})

    def predict(self, variables: Variables, batch: Batch) -> Latents:
        """The normalised latents that the network sees in "x" at "time" of class "label"."""
        cond = {"label": batch["label"]}
        return self.denoiser(variables)(batch["x"], batch["time"], cond).x0

    # --------------------------------------------------------------------------- loss and sampling

    def network(
        self, variables: Variables, x: Latents, time: Float[Array, " b"], cond: dict[str, Array]
    ) -> Float[Array, "b h w f"]:
        """The raw output; `time` is the network's own."""
        return self.net.apply({"params": variables.params["net"]}, x, time, cond)

    def denoiser(self, variables: Variables) -> Denoiser:
        """(x_t, t, cond) -> Prediction, what guidance and samplers take."""
        return self.process.denoiser(lambda x, time, cond: self.network(variables, x, time, cond))

    def latents(self, variables: Variables, batch: Batch) -> Latents:
        """The f32 latents of a batch, from the cache or encoded here from its images.

        Where they are Gaussians: their means, or with "draw" (standard normal) samples of them.
        """
        return self.inputs.read(variables, batch)

    def losses(self, variables: Variables, examples: Batch) -> Float[Array, " b"]:
        """The loss of each example ("latent", "label") at its "time" and "noise"."""
        x0 = variables.constants["norm"].apply(examples["latent"])
        t, eps = examples["time"], examples["noise"]
        x_t = self.process.diffuse(x0, eps, t)
        output = self.network(
            variables, x_t, self.process.network_time(t), {"label": examples["label"]}
        )
        return self.process.loss(output, x0, eps, x_t, t)

    def _loss(self, variables: Variables, inputs: Inputs, carry: Any) -> Loss:
        x = inputs.examples
        x = x | {"latent": self.latents(variables, x)}
        loss = jnp.sum(x["weight"] * self.losses(variables, x))
        normal = variables.constants["norm"].apply(x["latent"])
        metrics = {
            "loss": loss,
            "latent_ms": jnp.sum(x["weight"] * jnp.mean(normal**2, axis=(1, 2, 3))),
        }
        return Loss({"loss": loss}, metrics, {}, None)

    # ---------------------------------------------------------------------------------- reporting

    def describe(self) -> list[str]:
        """The network, the process, and what trains."""
        cfg, process = self.cfg, self.cfg.process
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        trained, frozen = tree.sizes(params, cfg.trainable)
        return [
            *cfg.model.describe(),
            f"trained {trained:,} parameters, frozen {frozen:,}",
            f"process {process.kind.value}: predicts {process.predict.value}, loss on "
            f"{process.loss_space.value}, times {process.times.value}, shift {process.shift:g}",
            f"latents normalised by {cfg.latent_norm.value}; label dropout {cfg.label_dropout:g}",
        ]

    def summary(self) -> dict[str, Any]:
        """What the report's table says of the run."""
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        trained, frozen = tree.sizes(params, self.cfg.trainable)
        return {
            "phase": "diffuse",
            "trained": "net" if frozen else "everything",
            "n_trained": trained,
            "n_frozen": frozen,
        }

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Latents of another size than the process expects."""
        return self.inputs.warnings(metrics)


def check_manifest(cfg: DiffuseConfig, manifest: LatentStats) -> None:
    """UserError if the network does not know all classes of the latents."""
    if manifest.num_classes > cfg.model.num_classes:
        raise UserError(
            f"the latents are of {manifest.num_classes} classes, but task.model.num_classes = "
            f"{cfg.model.num_classes}; set it to {manifest.num_classes}"
        )
