"""Training a diffusion model on latents of an autoencoder, cached or encoded in the step.

The model is a network, a process and a normalisation of the latents: UViT, USiT, DiT and SiT are
values of these.  Published recipes (DC-AE, arXiv 2410.10733): the network sees the latents times
one scalar, each label is dropped with probability 0.1, nothing is augmented.
"""

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
from dcae_jax.tasks.base import Batch, Inputs, Loss, Objective, Variables
from dcae_jax.tree import Tree

Latents = Float[Array, "b h w c"]
RMS_RANGE = (0.7, 1.4)  # of normalised latents; outside the scale is probably another model's


@runtime_checkable
class LatentStats(Protocol):
    """What is asked of the manifest of a cache."""

    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    scaling_factor: float
    num_classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent."""
        ...

    def to_json(self) -> Any:
        """All that is known of the cache."""
        ...


@runtime_checkable
class Encodes(Protocol):
    """Data that are images, with the frozen autoencoder that encodes them in the step."""

    def encoder(self) -> Tree:
        """Its variables."""
        ...

    def abstract_encoder(self) -> Tree:
        """Their shapes."""
        ...

    def gaussian(self) -> bool:
        """Whether a latent is a Gaussian."""
        ...

    def encode(self, variables: Tree, image: Array) -> tuple[Latents, Latents | None]:
        """(mean, log variance or None); no gradient flows back."""
        ...


@runtime_checkable
class Reads(Protocol):
    """An evaluator with data of its own."""

    name: str
    data: Any


@runtime_checkable
class Draws(Protocol):
    """An evaluator that draws samples."""

    name: str
    sampler: Any
    guidance: Any


class LatentNorm(enum.Enum):
    """How latents are brought to unit size."""

    scalar = "scalar"  # times the scaling factor, 1 / RMS (published)
    channel = "channel"  # each channel less its mean, over its standard deviation


class Normalisation(NamedTuple):
    """normal = (latent - shift) * scale, for each channel."""

    shift: Float[Array, " c"]
    scale: Float[Array, " c"]

    def apply(self, latent: Latents) -> Latents:
        """Latents as the network sees them."""
        return (latent.astype(jnp.float32) - self.shift) * self.scale

    def invert(self, normal: Latents) -> Latents:
        """Latents as the autoencoder decodes them."""
        return normal / self.scale + self.shift


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
        variance = self.model.out_factor == 2
        if variance != self.process.learn_variance:
            found.append(
                f"task.model gives {'a' if variance else 'no'} variance, but "
                f"task.process.learn_variance = {self.process.learn_variance}; set both or none"
            )
        return found

    def build(self, run: RunConfig) -> "DiffuseTask":
        """The task; the config must be resolved and valid."""
        return DiffuseTask(self, run)

    def resolve(self, run: RunConfig) -> None:
        """The shape of the latents is the network's; the cache is checked against it."""
        if hasattr(run.data, "shape"):  # else run_problems says what is wrong
            run.data.shape = (*self.model.input_size, self.model.in_channels)

    def run_problems(self, run: RunConfig) -> list[str]:
        """Problems that this task sees in the whole run."""
        found = _data_problems(run)
        for e in run.evals:
            online = isinstance(run.data, Encodes)
            if isinstance(e, Reads) and isinstance(e.data, Encodes) and not online:
                found.append(
                    f"evals: {e.name}: its images need the autoencoder of the run, which trains on "
                    "a cache; give it LatentDataConfig(split=...), or train on OnlineDataConfig"
                )
            if isinstance(e, Draws):
                found += [f"evals: {e.name}: {p}" for p in self._drawing_problems(e)]
        if run.mesh.spatial > 1:
            found.append(
                f"mesh.spatial = {run.mesh.spatial}: attention kernels refuse a sharded sequence; "
                "use mesh.data and mesh.fsdp for transformers"
            )
        return found

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


def _data_problems(run: RunConfig) -> list[str]:
    if run.data is not None and (
        isinstance(run.data, Encodes) or "latent" in run.data.abstract_batch(run.batch)
    ):
        return []
    return [
        "data is no source of latents; set data=LatentDataConfig(path=...), made by `python -m "
        "dcae_jax cache-latents`, or data=OnlineDataConfig(images=..., autoencoder=...), which "
        "encodes images in each step"
    ]


class DiffuseTask:
    """See DiffuseConfig.  Parameters: {"net": ...}.

    Constants: the normalisation, and the encoder where images are encoded in the step.
    """

    def __init__(self, cfg: DiffuseConfig, run: RunConfig):
        self.cfg, self.run = cfg, run
        self.net = cfg.model.build()
        self.process: Process = cfg.process.build()
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
        norm = normalisation(self.cfg.latent_norm, self._manifest())
        online = isinstance(self.run.data, Encodes)
        return {"norm": norm, **({"encoder": self.run.data.encoder()} if online else {})}

    def record(self) -> dict[str, Any]:
        """The manifest: samples are drawn and decoded without the cache."""
        return {"latents": self._manifest().to_json()}

    def _manifest(self) -> LatentStats:
        manifest = self.run.data.manifest()
        check_manifest(self.cfg, manifest)
        return manifest

    def abstract_constants(self) -> Tree:
        """Shapes of `constants`, without a cache."""
        row = jax.ShapeDtypeStruct((self.cfg.model.in_channels,), jnp.float32)
        online = isinstance(self.run.data, Encodes)
        more = {"encoder": self.run.data.abstract_encoder()} if online else {}
        return {"norm": Normalisation(row, row), **more}

    def shapes(self, spatial: int) -> list[str]:
        """What enters a step."""
        cfg, data = self.cfg.model, self.run.data
        latent = " x ".join(str(n) for n in (*cfg.input_size, cfg.in_channels))
        if isinstance(data, Encodes):
            return [f"each example: {data.resolution} px, encoded in the step to {latent}"]
        return [f"each example: a latent {latent}"]

    def static(self, step: int) -> Hashable:
        """The compiled step does not depend on anything."""
        return ()

    def prepare(
        self, key: PRNGKeyArray, batch: Batch, step: Int[Array, ""], static: Hashable
    ) -> Inputs:
        """Times, noise, dropped labels, and what samples a latent that is a Gaussian."""
        model, label = self.cfg.model, batch["label"]
        shape = (label.shape[0], *model.input_size, model.in_channels)
        k_time, k_noise, k_drop, k_latent = jax.random.split(key, 4)
        dropped = jax.random.bernoulli(k_drop, self.cfg.label_dropout, shape[:1])
        examples = {k: batch[k] for k in ("latent", "logvar", "image") if k in batch} | {
            "label": jnp.where(dropped, model.num_classes, label),
            "noise": jax.random.normal(k_noise, shape),
            "time": self.process.draw_times(k_time, shape[:1]),
            "weight": jnp.full(shape[:1], 1.0 / shape[0]),
        }
        if "logvar" in batch or ("image" in batch and self.run.data.gaussian()):
            examples["draw"] = jax.random.normal(k_latent, shape)
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
        if "image" in batch:
            mean, logvar = self.run.data.encode(variables.constants["encoder"], batch["image"])
        else:
            mean, logvar = batch["latent"], batch["logvar"] if "logvar" in batch else None
        mean = mean.astype(jnp.float32)
        if logvar is None or "draw" not in batch:
            return mean
        return mean + jnp.exp(0.5 * logvar.astype(jnp.float32)) * batch["draw"]

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
        trained, frozen = tree.partition(params, cfg.trainable)
        return [
            *cfg.model.describe(),
            f"trained {tree.size(trained):,} parameters, frozen {tree.size(frozen):,}",
            f"process {process.kind.value}: predicts {process.predict.value}, loss on "
            f"{process.loss_space.value}, times {process.times.value}, shift {process.shift:g}",
            f"latents normalised by {cfg.latent_norm.value}; label dropout {cfg.label_dropout:g}",
        ]

    def summary(self) -> dict[str, Any]:
        """What the report's table says of the run."""
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        trained, frozen = tree.partition(params, self.cfg.trainable)
        return {
            "phase": "diffuse",
            "trained": "net" if frozen else "everything",
            "n_trained": tree.size(trained),
            "n_frozen": tree.size(frozen),
        }

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Latents of another size than the process expects."""
        rms = metrics["latent_rms"]
        if RMS_RANGE[0] <= rms <= RMS_RANGE[1]:
            return []
        mend = "make the cache again, or set task.latent_norm=channel"
        if isinstance(self.run.data, Encodes):
            mend = "measure it: python -m dcae_jax latent-stats --from AUTOENCODER"
        return [
            f"the RMS of the normalised latents is {rms:.3g}, far from 1: the scaling factor is "
            f"not that of these latents; {mend}"
        ]


def normalisation(kind: LatentNorm, manifest: LatentStats) -> Normalisation:
    """From the statistics of the cache."""
    channels = manifest.shape[2]
    if kind is LatentNorm.scalar:
        return Normalisation(jnp.zeros(channels), jnp.full(channels, manifest.scaling_factor))
    if len(manifest.std) != channels:
        raise UserError(
            "task.latent_norm = channel needs the mean and deviation of each channel, which are "
            "not known of these latents. Measure them where the autoencoder has a workdir "
            "(python -m dcae_jax latent-stats --from WORKDIR), train on a cache, which measures "
            "its own, or set latent_norm=scalar"
        )
    return Normalisation(jnp.asarray(manifest.mean), 1.0 / jnp.asarray(manifest.std))


def check_manifest(cfg: DiffuseConfig, manifest: LatentStats) -> None:
    """UserError if the network does not know all classes of the latents."""
    if manifest.num_classes > cfg.model.num_classes:
        raise UserError(
            f"the latents are of {manifest.num_classes} classes, but task.model.num_classes = "
            f"{cfg.model.num_classes}; set it to {manifest.num_classes}"
        )
