"""Training an autoencoder: the three phases of decoupled high-resolution adaptation.

A phase is three values: the resolution of the data, the pattern of what trains, and the losses
(DC-AE, arXiv 2410.10733, section 3.2).  Phases 1 and 2 minimise L1 + LPIPS; phase 3 adds a PatchGAN
and moves only the decoder's head, so the latent space stays as it is.
"""

import enum
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from dcae_jax import sharding, tree
from dcae_jax.config import OptimConfig, RunConfig, regex_problem
from dcae_jax.models.base import Autoencoder
from dcae_jax.models.dcae import DCAEConfig
from dcae_jax.models.discriminator import PatchGANConfig
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.nets import lpips
from dcae_jax.tasks.base import (
    Batch,
    Inputs,
    Loss,
    Metrics,
    Objective,
    Variables,
    add_terms,
    asking_problems,
)
from dcae_jax.tree import Tree

Images = Float[Array, "b h w 3"]


STEM = "ae/encoder/conv_in/kernel"  # frozen in every phase but the first
ENCODER_OUT = "ae/encoder/conv_out/kernel"  # trains wherever the latent space moves
_COUNTS = 2  # folded into the key of a step; the bottleneck's draws split it into 0 and 1


class Moments(NamedTuple):
    """The latent of images: a Gaussian, or a point where there is no log variance."""

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"] | None


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return False  # tree.partition tells what is wrong with it


@runtime_checkable
class Truncates(Protocol):
    """An evaluator that looks at the first channels of the latents alone."""

    name: str
    channel_counts: tuple[int, ...]


class Phase(enum.Enum):
    """The phases of section 3.2 of the paper."""

    low_res_full = "low_res_full"
    high_res_latent = "high_res_latent"
    low_res_local = "low_res_local"


class Bottleneck(enum.Enum):
    """What happens to the latent between encoder and decoder while training."""

    none = "none"  # deterministic, as all released DC-AE
    kl = "kl"  # a sample of the posterior, which is pulled to N(0, 1); a DC-AE's has unit variance
    noise = "noise"  # Gaussian noise of a random scale is added


@dataclass(slots=True)
class LossConfig:
    """Reconstruction losses; each weight multiplies a mean over pixels and images.

    `kl` multiplies the mean over latent elements and images of each element's KL divergence from
    N(0, 1).  LDM (arXiv 2112.10752) sums the divergence over the latent and its reconstruction
    losses over the image, so that its weight w is w c / (3 f^2) here: `recipes.ldm_kl`.
    """

    l1: float = 1.0
    l2: float = 0.0
    lpips: float = 0.0  # 0: LPIPS is not computed and its file not needed
    lpips_file: str | None = None  # safetensors; None: where `import-net lpips-vgg` puts it
    kl: float = 1e-6  # with bottleneck kl
    noise: float = 0.1  # with bottleneck noise: largest scale, in units of the latent

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = []
        for name in ("l1", "l2", "lpips", "kl", "noise"):
            if not getattr(self, name) >= 0:  # NaN is refused too
                found.append(f"task.losses.{name} = {getattr(self, name)}; weights are >= 0")
        if self.l1 == self.l2 == self.lpips == 0:
            found.append("task.losses: all of l1, l2, lpips are 0; set at least one")
        return found


@dataclass(slots=True)
class AdversarialConfig:
    """The PatchGAN of phase 3: hinge losses and an adaptive weight.

    The weight is `weight * ramp(step) * clip(|g_rec| / (|g_adv| + 1e-4), 0, max_adaptive)`, with
    the norms over the accumulated gradients of all trained parameters (VQGAN, arXiv 2012.09841,
    section 3.2, takes the last layer only).
    """

    weight: float = 0.5
    adaptive: bool = True
    max_adaptive: float = 1e4
    start_step: int = 0  # the autoencoder first sees the discriminator here
    warmup_steps: int = 0  # then its weight grows linearly over so many steps
    r1: float = 0.0  # weight of the gradient penalty on real images (arXiv 1801.04406)
    lecam: float = 0.0  # weight of the LeCam regulariser (arXiv 2104.03310)
    lecam_decay: float = 0.999  # of the moving averages of the mean logits
    discriminator: PatchGANConfig = field(default_factory=PatchGANConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = []
        if not self.weight > 0:
            found.append(
                f"task.adversarial.weight = {self.weight}: an adversarial phase without an "
                "adversary; set a positive weight or use another phase"
            )
        for name in ("start_step", "warmup_steps", "r1", "lecam"):
            if not getattr(self, name) >= 0:
                found.append(f"task.adversarial.{name} = {getattr(self, name)}; >= 0, and 0 is off")
        return found


@dataclass(slots=True)
class AutoencodeConfig:
    """One phase of training an autoencoder."""

    phase: Phase = Phase.low_res_full
    model: DCAEConfig | KLVAEConfig = field(default_factory=DCAEConfig)
    trainable: str = "ae/.*"  # regex; whole parameter paths that train, all others are frozen
    losses: LossConfig = field(default_factory=LossConfig)
    bottleneck: Bottleneck = Bottleneck.none
    # Structured latents (DC-AE 1.5, arXiv 2508.00413): while training, each example keeps the first
    # so many channels of its latent, a number drawn from these; the others are 0.  (): all of them.
    channel_counts: tuple[int, ...] = ()
    adversarial: AdversarialConfig | None = None

    def build(self, run: RunConfig) -> "AutoencodeTask":
        """The task; the config must be resolved and valid."""
        return AutoencodeTask(self, run)

    def resolve(self, run: RunConfig) -> None:
        """What the model derives from what trains."""
        self.model.resolve(self.trainable)

    def run_problems(self, run: RunConfig) -> list[str]:
        """Problems that this task sees in the whole run."""
        no_masks = "this run trains an autoencoder; use ReconstructConfig of evals/reconstruct.py"
        found = asking_problems(run, masked=no_masks, filled=no_masks, reconstructed=None)
        if why := regex_problem(self.trainable):
            found.append(f"task.trainable = {self.trainable!r} is not a regular expression ({why})")
        phase, factor = self.phase, self.model.factor
        if run.data.resolution % factor:
            low = run.data.resolution // factor * factor
            found.append(
                f"data.resolution = {run.data.resolution} is not a multiple of the compression "
                f"{factor}; nearest: {max(low, factor)} or {low + factor}"
            )
        if phase is not Phase.low_res_full and run.init_from is None:
            found.append(
                f"phase {phase.value} refines a trained autoencoder; set --config.init_from to the "
                "workdir of the phase before it"
            )
        if phase is not Phase.low_res_full and _matches(self.trainable, STEM):
            found.append(
                f"phase {phase.value} trains a part only, but task.trainable = "
                f"{self.trainable!r} matches {STEM}, as if everything trained; see "
                "dcae_jax/recipes.py for the parts"
            )
        if phase is Phase.low_res_local and self.adversarial is None:
            found.append("phase low_res_local is adversarial; set task.adversarial")
        if self.model.couples_examples() and run.microbatches > 1:
            found.append(
                f"microbatches = {run.microbatches} with model.batch_norm=update: batch statistics "
                "couple the examples of a batch; use microbatches=1, batch_norm=frozen_stats, or "
                "decoder_norm=rms"
            )
        return found + self._bottleneck_problems() + self._channel_problems(run)

    def _bottleneck_problems(self) -> list[str]:
        """A Gaussian encoder without its KL loss, or with noise on top of its own."""
        if not self.model.gaussian() or self.bottleneck is Bottleneck.kl:
            return []
        name = f"task.bottleneck = {self.bottleneck.value} with a KL autoencoder"
        if self.bottleneck is Bottleneck.noise:
            return [f"{name} would add noise to a latent that learns its own; set bottleneck=kl"]
        if _matches(self.trainable, ENCODER_OUT):
            return [
                f"{name} whose encoder trains: its variances would get no gradient, and samples of "
                "its latents would mean nothing; set bottleneck=kl (none is for a decoder trained "
                "on the means of a frozen encoder)"
            ]
        return []

    def _channel_problems(self, run: RunConfig) -> list[str]:
        """Numbers of channels that the latent does not have, in training and evaluation."""
        all_of, ours = self.model.latent_channels, self.channel_counts
        asked = [("task.channel_counts", ours)]
        asked += [
            (f"evals: {e.name}: channel_counts", e.channel_counts)
            for e in run.evals if isinstance(e, Truncates)
        ]  # fmt: skip
        found = [
            f"{name} = {counts}; different numbers of channels, from 1 to the latent's {all_of}"
            for name, counts in asked
            if len(set(counts)) < len(counts) or not all(1 <= n <= all_of for n in counts)
        ]
        if not found and ours and max(ours) < all_of:
            found.append(
                f"task.channel_counts = {ours}: the decoder would never see the channels from "
                f"{max(ours)} on; add {all_of}, or set model.latent_channels={max(ours)}"
            )
        return found


class AutoencodeTask:
    """See AutoencodeConfig.  Parameters: {"ae": ..., "disc": ... if adversarial}."""

    def __init__(self, cfg: AutoencodeConfig, run: RunConfig):
        self.cfg, self.run = cfg, run
        self.model: Autoencoder = cfg.model.build()
        self.objectives = (
            Objective(
                "ae", self._autoencoder_loss, cfg.trainable, run.optim,
                self._combine if cfg.adversarial else add_terms,
            ),
        )  # fmt: skip
        self.disc = None
        if cfg.adversarial:
            self.disc = cfg.adversarial.discriminator.build()
            self.objectives += (
                Objective("disc", self._discriminator_loss, "disc/.*", cfg.adversarial.optim),
            )

    # ------------------------------------------------------------------------------- the protocol

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Fresh parameters and running statistics, fp32."""
        k_ae, k_disc = jax.random.split(key)
        side = self.cfg.model.factor
        variables = self.model.init(k_ae, jnp.zeros((1, side, side, 3)))
        params = {"ae": variables["params"]}
        stats = {"ae": variables["batch_stats"]} if "batch_stats" in variables else {}
        if self.disc is not None:
            image = jnp.zeros((1, *[self.run.data.resolution] * 2, 3))
            params["disc"] = self.disc.init(k_disc, image)["params"]
            if self.cfg.adversarial.lecam:
                stats["lecam"] = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
        return params, stats

    def constants(self, training: bool) -> Tree:
        """The LPIPS network, if its loss is used."""
        losses = self.cfg.losses
        return {"lpips": lpips.load(losses.lpips_file)} if training and losses.lpips else {}

    def abstract_constants(self) -> Tree:
        """Shapes of `constants`, without the file."""
        return {"lpips": lpips.abstract_params()} if self.cfg.losses.lpips else {}

    def shapes(self, spatial: int) -> list[str]:
        """The stages, the tokens of the latent, and the stages that stay replicated."""
        lines = self.cfg.model.describe(self.run.data.resolution)
        h, w, c = self.latent_shape()
        lines.append(f"latent tokens: {h * w} of {c} channels")
        heights = self.cfg.model.heights(self.run.data.resolution)
        if alone := sharding.replicated_heights(heights, spatial):
            lines.append(f"not split over spatial {spatial}, but replicated: {', '.join(alone)}")
        return lines

    def static(self, step: int) -> Hashable:
        """The compiled step does not depend on anything."""
        return ()

    def statics(self, first: int, last: int) -> list[Hashable]:
        """One program for all steps."""
        return [()]

    def prepare(
        self, key: PRNGKeyArray, batch: Batch, step: Int[Array, ""], static: Hashable
    ) -> Inputs:
        """Images to [-1, 1]; bottleneck noise; channels kept; each example's share of the batch."""
        images = to_float(batch["image"])
        b, h, w, _ = images.shape
        examples = {"image": images, "weight": jnp.full((b,), 1.0 / b)}
        if self.cfg.bottleneck is not Bottleneck.none:
            k_noise, k_scale = jax.random.split(key)
            shape = (b, *self.cfg.model.latent_shape(h, w))
            examples["noise"] = jax.random.normal(k_noise, shape)
            if self.cfg.bottleneck is Bottleneck.noise:
                examples["noise"] *= self.cfg.losses.noise * jax.random.uniform(
                    k_scale, (b, 1, 1, 1)
                )
        if counts := self.cfg.channel_counts:
            k_counts = jax.random.fold_in(key, _COUNTS)
            examples["channels"] = jax.random.choice(k_counts, jnp.asarray(counts), (b,))
        return Inputs(examples, {"step": step})

    def predict(self, variables: Variables, batch: Batch) -> Images:
        """The reconstruction of `batch["image"]` (uint8) in [-1, 1], from the latent's mean.

        With "channels" in the batch, from the first so many channels of each example's latent.
        """
        channels = batch["channels"] if "channels" in batch else None
        return self._apply(variables, to_float(batch["image"]), None, channels, train=False)[0]

    # ------------------------------------------------------------------------------------- losses

    def _apply(
        self, variables: Variables, images: Images, noise: Array | None,
        channels: Int[Array, " b"] | None, train: bool,
    ) -> tuple[Images, Moments, Tree]:  # fmt: skip
        """(reconstruction, moments of the latent, new running statistics or {})."""

        def forward(model: Autoencoder, images: Images) -> tuple[Images, Moments]:
            latent = Moments(*model.moments(images))
            return model.decode(first_channels(sample(latent, noise), channels)), latent

        tree_in = {"params": variables.params["ae"]}
        if "ae" in variables.stats:
            tree_in["batch_stats"] = variables.stats["ae"]
        if self._training_stats and train:
            (y, z), new = self.model.apply(tree_in, images, method=forward, mutable=["batch_stats"])
            return y, z, {"ae": new["batch_stats"]}
        y, z = self.model.apply(tree_in, images, method=forward)
        return y, z, {}

    @property
    def _training_stats(self) -> bool:
        return self.cfg.model.couples_examples()

    def _autoencoder_loss(self, variables: Variables, inputs: Inputs, carry: Any) -> Loss:
        cfg, x = self.cfg, inputs.examples
        images, weight = x["image"], x["weight"]
        noise, channels = (x[name] if name in x else None for name in ("noise", "channels"))
        y, latent, stats = self._apply(variables, images, noise, channels, train=True)

        def mean(per_example: Float[Array, "b ..."]) -> Float[Array, ""]:
            return jnp.sum(weight * per_example.reshape(weight.shape[0], -1).mean(axis=1))

        metrics = {"loss_l1": mean(jnp.abs(y - images)), "loss_l2": mean((y - images) ** 2)}
        rec = cfg.losses.l1 * metrics["loss_l1"] + cfg.losses.l2 * metrics["loss_l2"]
        if cfg.losses.lpips:
            distance = lpips.lpips(variables.constants["lpips"], y, images, dtype=self._dtype)
            metrics["loss_lpips"] = mean(distance)
            rec += cfg.losses.lpips * metrics["loss_lpips"]
        if cfg.bottleneck is Bottleneck.kl:
            metrics["loss_kl"] = mean(divergence(latent))
            rec += cfg.losses.kl * metrics["loss_kl"]
        metrics |= {"loss": rec, "latent_ms": mean(latent.mean**2)}
        if latent.logvar is not None:
            metrics["latent_std"] = mean(jnp.exp(0.5 * latent.logvar))
        terms = {"rec": rec}
        if cfg.adversarial:
            fake = self._logits(variables.params["disc"], y)
            terms["adv"] = metrics["loss_adv"] = -mean(fake)
        return Loss(terms, metrics, stats, {"fake": y})

    def _logits(self, params: Tree, images: Images) -> Array:
        return self.disc.apply({"params": params}, images).astype(jnp.float32)

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.cfg.model.dtype.value)

    def _combine(self, grads: dict[str, Tree], step: Int[Array, ""]) -> tuple[Tree, Metrics]:
        """g_rec + w g_adv with the adaptive weight in fp32, once per optimizer step."""
        cfg = self.cfg.adversarial
        rec, adv = optax.tree.norm(grads["rec"]), optax.tree.norm(grads["adv"])
        adaptive = jnp.clip(rec / (adv + 1e-4), 0.0, cfg.max_adaptive) if cfg.adaptive else 1.0
        ramp = jnp.clip((step - cfg.start_step + 1) / max(cfg.warmup_steps, 1), 0.0, 1.0)
        weight = cfg.weight * adaptive * jnp.where(step >= cfg.start_step, ramp, 0.0)
        total = jax.tree.map(lambda r, a: r + weight * a, grads["rec"], grads["adv"])
        return total, {
            "ae/adaptive_weight": weight, "ae/grad_norm_rec": rec, "ae/grad_norm_adv": adv
        }  # fmt: skip

    def _discriminator_loss(self, variables: Variables, inputs: Inputs, carry: Any) -> Loss:
        cfg, params = self.cfg.adversarial, variables.params["disc"]
        images, weight = inputs.examples["image"], inputs.examples["weight"]

        def mean(logits: Float[Array, "b ..."]) -> Float[Array, ""]:
            return jnp.sum(weight * logits.reshape(weight.shape[0], -1).mean(axis=1))

        real, fake = self._logits(params, images), self._logits(params, carry["fake"])
        loss = 0.5 * (mean(jax.nn.relu(1 - real)) + mean(jax.nn.relu(1 + fake)))
        metrics = {
            "disc/loss": loss, "disc/logits_real": mean(real), "disc/logits_fake": mean(fake)
        }  # fmt: skip
        stats: Tree = {}
        if cfg.r1:
            grad = jax.grad(lambda x: self._logits(params, x).mean((1, 2, 3)).sum())(images)
            metrics["disc/r1"] = jnp.sum(weight * jnp.sum(grad**2, axis=(1, 2, 3)))
            loss += 0.5 * cfg.r1 * metrics["disc/r1"]
        if cfg.lecam:
            anchor, d = variables.stats["lecam"], cfg.lecam_decay
            metrics["disc/lecam"] = mean(jax.nn.relu(real - anchor["fake"]) ** 2) + mean(
                jax.nn.relu(anchor["real"] - fake) ** 2
            )
            loss += cfg.lecam * metrics["disc/lecam"]
            # A microbatch holds a share s of the batch; the average over microbatches of
            # d a + (1 - d) mean / s is the update with the whole batch's mean.
            share = jnp.sum(weight)
            stats["lecam"] = {
                "real": d * anchor["real"] + (1 - d) * mean(real) / share,
                "fake": d * anchor["fake"] + (1 - d) * mean(fake) / share,
            }
        return Loss({"disc": loss}, metrics, stats, None)

    # ---------------------------------------------------------------------------------- reporting

    def record(self) -> dict[str, Any]:
        """Nothing beside the config."""
        return {}

    def describe(self) -> list[str]:
        """What trains and what is frozen by module, crop size, losses and weights."""
        cfg, run = self.cfg, self.run
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        moved = "|".join(f"({o.trainable})" for o in self.objectives)
        trained, frozen = tree.partition(params, moved)
        lines = [
            f"phase {cfg.phase.value}: {run.data.resolution} px, latent "
            f"{'x'.join(map(str, self.latent_shape()))}",
            *_modules("trained", trained), *_modules("frozen ", frozen),
        ]  # fmt: skip
        losses = {n: getattr(cfg.losses, n) for n in ("l1", "l2", "lpips")}
        if cfg.bottleneck is Bottleneck.kl:
            losses["kl"] = cfg.losses.kl
        weights = [f"{name} {weight:g}" for name, weight in losses.items() if weight]
        if cfg.adversarial:
            a = cfg.adversarial
            weights.append(
                f"adversarial {a.weight:g}{' x adaptive' if a.adaptive else ''} "
                f"from step {a.start_step}, warm-up {a.warmup_steps}"
            )
        lines.append("losses: " + ", ".join(weights))
        if not cfg.losses.lpips:
            lines.append("LPIPS is off: reconstructions are blurrier than with it")
        if counts := cfg.channel_counts:
            lines.append(
                f"structured latents: each example keeps its first {_either(counts)} of "
                f"{cfg.model.latent_channels} channels"
            )
        if self._training_stats:
            lines.append("BatchNorm updates its statistics, so microbatches are not available")
        return lines

    def summary(self) -> dict[str, Any]:
        """What the report's table says of this phase."""
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        trained, frozen = tree.partition({"ae": params["ae"]}, self.cfg.trainable)
        modules = [name.removeprefix("ae/") for name in tree.by_module(trained, depth=3)]
        losses = self.cfg.losses
        return {
            **({"lpips": lpips.info(losses.lpips_file)} if losses.lpips else {}),
            "phase": self.cfg.phase.value,
            "trained": ", ".join(modules) if frozen else "everything",
            "n_trained": tree.size(trained),
            "n_frozen": tree.size(frozen),
        }

    def latent_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) at the run's resolution."""
        side = self.run.data.resolution // self.cfg.model.factor
        return side, side, self.cfg.model.latent_channels

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Signs that the adversarial game is over before it began."""
        if not self.cfg.adversarial or "disc/loss" not in metrics:
            return []
        found = []
        if metrics["disc/loss"] < 0.01:
            found.append(
                "the discriminator has won (its hinge loss is ~0): lower its rate, add r1 "
                "or lecam, or start it later"
            )
        if metrics["disc/update_norm"] == 0 and metrics["disc/lr"] > 0:
            found.append("the discriminator's parameters do not move though its rate is above 0")
        return found


def sample(latent: Moments, noise: Float[Array, "b h w c"] | None) -> Float[Array, "b h w c"]:
    """The latent that is decoded: mean + std noise, with unit std where none is given."""
    if noise is None:
        return latent.mean
    return latent.mean + (noise if latent.logvar is None else jnp.exp(0.5 * latent.logvar) * noise)


def first_channels(
    latent: Float[Array, "b h w c"], counts: Int[Array, " b"] | None
) -> Float[Array, "b h w c"]:
    """The latents with 0 in the channels beyond each example's count; None: as they are.

    Source: DC-AE 1.5 (arXiv 2508.00413), structured latent space, with a count for each example
    instead of one for a training iteration.
    """
    if counts is None:
        return latent
    kept = jnp.arange(latent.shape[-1]) < counts[:, None, None, None]
    return jnp.where(kept, latent, 0.0)


def divergence(latent: Moments) -> Float[Array, "b h w c"]:
    """KL(posterior || N(0, 1)) of each element; a point counts as the mean of unit variance."""
    kl = 0.5 * latent.mean**2
    if latent.logvar is not None:
        kl += 0.5 * (jnp.exp(latent.logvar) - 1.0 - latent.logvar)
    return kl


def _either(counts: tuple[int, ...]) -> str:
    """16, 32 or 64."""
    *most, last = map(str, sorted(counts))
    return f"{', '.join(most)} or {last}" if most else last


def _modules(title: str, params: Tree) -> list[str]:
    sizes = tree.by_module(params, depth=3)
    if not sizes:
        return []
    total = sum(sizes.values())
    names = ", ".join(f"{re.sub('^ae/', '', k)} {v:,}" for k, v in sizes.items())
    return [f"{title} {total:,} parameters: {names}"]


def to_float(images: UInt8[Array, "b h w 3"]) -> Images:
    """uint8 to fp32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0
