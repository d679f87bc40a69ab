"""Labels on a pre-trained encoder: linear probing of its frozen features, and fine-tuning of it.

The encoder is that of a masked autoencoder (LMD, MAE) on all tokens, or a UViT (that of an MD-UViT
too) up to its middle block, on the clean input and without a class.

Source: MAE (arXiv 2111.06377, appendix A) for both heads; LMD (arXiv 2312.07971) fine-tunes in the
same way.  LMD mixes the pixels of images before the autoencoder encodes them: so it is here where
images are encoded in the step, or are the input; on a cache the latents are mixed.
"""

import enum
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dcae_jax import tree
from dcae_jax.config import RunConfig, regex_problem
from dcae_jax.data import pipeline
from dcae_jax.diffusion.process import ProcessConfig
from dcae_jax.errors import UserError
from dcae_jax.models.lmd import NORM_EPS, LMDConfig
from dcae_jax.models.md_uvit import NEW_PARAMS, MDUViTConfig
from dcae_jax.models.transformer import LayerNorm, check_build
from dcae_jax.models.uvit import UViTConfig, UViTEncoder
from dcae_jax.tasks.base import Batch, Inputs, Loss, Objective, Variables, asking_problems
from dcae_jax.tasks.latents import (
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

HEAD = "head/.*"  # the parameters that a linear probe trains
BATCH_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1  # of the running statistics, as PyTorch counts it
HEAD_STDDEV = {"linear": 0.01, "finetune": 2e-5}

Features = Float[Array, "b d"]


class Mode(enum.Enum):
    """What trains, and what stands before the linear layer."""

    linear = "linear"  # the head alone; a batch norm without scale and bias before it
    finetune = "finetune"  # everything; a layer norm before it


class Pool(enum.Enum):
    """What the head sees of the tokens."""

    mean = "mean"  # of the patches
    cls = "cls"  # the class token of a masked autoencoder


@dataclass(slots=True)
class ProbeConfig:
    """Labels on an encoder.  The default is a linear probe of LMD-B for ImageNet's classes.

    Model, process and latent_norm are those of the run that `init_from` names.
    """

    model: LMDConfig | UViTConfig = field(default_factory=LMDConfig)
    process: ProcessConfig | None = None  # of a UViT: what it calls the time of clean latents
    mode: Mode = Mode.linear
    pool: Pool = Pool.mean
    classes: int = 1000
    latent_norm: LatentNorm = LatentNorm.scalar  # of latents; pixels: ImageNet's mean, deviation
    label_smoothing: float = 0.0  # published for fine-tuning: 0.1
    # Parameters of the Beta distribution that shares of two examples are drawn from; 0: off.  With
    # both, each step takes one or the other.
    mixup: float = 0.0  # published for fine-tuning: 0.8
    cutmix: float = 0.0  # published for fine-tuning: 1.0
    trainable: str = ""  # regex; whole parameter paths that train; "": what the mode says

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = []
        if why := regex_problem(self.trainable):
            found.append(f"task.trainable = {self.trainable!r} is no regular expression: {why}")
        if self.classes < 2:
            found.append(f"task.classes = {self.classes}; there are at least 2 to tell apart")
        if not 0 <= self.label_smoothing < 1:
            found.append(
                f"task.label_smoothing = {self.label_smoothing}; a share below 1, published: 0.1"
            )
        found += [
            f"task.{name} = {value}; it is >= 0, and 0 is off"
            for name, value in (("mixup", self.mixup), ("cutmix", self.cutmix))
            if not value >= 0  # NaN is refused too
        ]
        return found + self._encoder_problems() + self._mode_problems()

    def _encoder_problems(self) -> list[str]:
        uvit = isinstance(self.model, UViTConfig)
        if isinstance(self.model, MDUViTConfig):
            return [
                "task.model is an MD-UViT; its features are those of the UViT in it: set the "
                "UViTConfig of that size, init_from takes what it needs"
            ]
        if uvit and self.process is None:
            return [
                "task.process is not set, and a UViT has to be told the time of clean latents; set "
                "the ProcessConfig it was trained with"
            ]
        if not uvit and self.process is not None:
            return ["task.process is for a UViT; a masked autoencoder knows no time: leave it out"]
        if uvit and self.pool is Pool.cls:
            return ["task.pool = cls: a UViT has no class token; set pool=mean"]
        return []

    def _mode_problems(self) -> list[str]:
        if self.mode is Mode.finetune:
            return []
        if self.trainable in ("", HEAD):
            return []
        return [
            f"task.trainable = {self.trainable!r} with mode = linear, which trains the head alone; "
            "set mode=finetune, or leave trainable out"
        ]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent."""
        return (*self.model.input_size, self.model.in_channels)

    def build(self, run: RunConfig) -> "ProbeTask":
        """The task; the config must be resolved and valid."""
        return ProbeTask(self, run)

    def resolve(self, run: RunConfig) -> None:
        """What trains; the shape of the latents is the network's."""
        self.trainable = self.trainable or {Mode.linear: HEAD, Mode.finetune: ".*"}[self.mode]
        expect_shape(run, self.latent_shape)

    def run_problems(self, run: RunConfig) -> list[str]:
        """Problems that this task sees in the whole run."""
        pixels = are_pixels(run.data)
        found = pixel_problems(run, self.latent_shape) if pixels else data_problems(run)
        found += reader_problems(run) + spatial_problems(run) + kind_problems(run)
        found += process_problems(run, "AccuracyConfig of evals/accuracy.py")
        why = "this run learns labels and has no decoder; use AccuracyConfig of evals/accuracy.py"
        found += asking_problems(run, masked=why, filled=why, reconstructed=why)
        if self.mode is not Mode.linear:
            return found
        if run.init_from is None:
            found.append(
                "init_from is not set, and a linear probe asks what a trained encoder knows; set "
                "--config.init_from=WORKDIR of its run"
            )
        if run.microbatches > 1:
            found.append(
                f"microbatches = {run.microbatches} with task.mode = linear: batch statistics "
                "couple the examples of a batch; use microbatches=1 (there is no backward pass "
                "through the encoder, so memory is small)"
            )
        if run.batch == 1:
            found.append(
                "batch = 1 with task.mode = linear: there are no statistics of one example"
            )
        return found


class ProbeTask:
    """See ProbeConfig.  Parameters: {"net": the encoder's, "head"}.

    Constants: the normalisation, and the autoencoder's encoder where images are encoded in the
    step.  A linear probe's running statistics are {"head": {"mean", "var"}}.
    """

    def __init__(self, cfg: ProbeConfig, run: RunConfig):
        self.cfg, self.run = cfg, run
        self._uvit = isinstance(cfg.model, UViTConfig)
        self.net = UViTEncoder(check_build(cfg.model, "UViT")) if self._uvit else cfg.model.build()
        self.inputs = inputs_of(run, cfg.latent_norm, cfg.latent_shape)
        self.objectives = (Objective("probe", self._loss, cfg.trainable, run.optim),)
        self.unused_params = self._unused()

    # ------------------------------------------------------------------------------- the protocol

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Fresh parameters, fp32; and statistics of the batch norm."""
        k_net, k_head = jax.random.split(key)
        x = jnp.zeros((1, *self.cfg.latent_shape))
        net = self._encode(functools.partial(self.net.init, k_net), x)
        d = self.cfg.model.width
        draws = jax.random.truncated_normal(k_head, -2.0, 2.0, (d, self.cfg.classes))
        head = {
            "kernel": HEAD_STDDEV[self.cfg.mode.value] * draws,
            "bias": jnp.zeros(self.cfg.classes),
        }
        stats = {}
        if self.cfg.mode is Mode.linear:
            stats = {"head": {"mean": jnp.zeros(d), "var": jnp.ones(d)}}
        else:
            head["norm"] = {"scale": jnp.ones(d), "bias": jnp.zeros(d)}
        return {"net": net["params"], "head": head}, stats

    def constants(self, training: bool) -> Tree:
        """The normalisation; the autoencoder's encoder where it is needed."""
        self.check_classes(self.run.data, "the data")
        return self.inputs.constants()

    def abstract_constants(self) -> Tree:
        """Shapes of `constants`, without a cache."""
        return self.inputs.abstract_constants()

    def record(self) -> dict[str, Any]:
        """The manifest of the latents."""
        return self.inputs.record()

    def shapes(self, spatial: int) -> list[str]:
        """What enters a step, and what the head sees."""
        cfg = self.cfg
        return [
            *self.inputs.shapes(),
            f"head: {cfg.model.width} features ({cfg.pool.value}) -> {cfg.classes} classes",
        ]

    def static(self, step: int) -> Hashable:
        """The compiled step does not depend on anything."""
        return ()

    def statics(self, first: int, last: int) -> list[Hashable]:
        """One program for all steps."""
        return [()]

    def prepare(
        self, key: PRNGKeyArray, batch: Batch, step: Int[Array, ""], static: Hashable
    ) -> Inputs:
        """Soft targets, which examples are mixed how, what samples a latent that is a Gaussian."""
        k_latent, k_mix = jax.random.split(key)
        label, n = batch["label"], batch["label"].shape[0]
        examples = self.inputs.examples(k_latent, batch)
        target = soft_targets(label, self.cfg.classes, self.cfg.label_smoothing)
        if self.cfg.mixup or self.cfg.cutmix:
            examples, target = self._mixed(k_mix, examples, target)
        return Inputs(examples | {"target": target, "weight": jnp.full((n,), 1.0 / n)}, {})

    def predict(self, variables: Variables, batch: Batch) -> Float[Array, "b k"]:
        """A logit for each class; of batches of the data ("latent" or "image")."""
        features = self._features(variables, self._normal(variables, batch))
        if self.cfg.mode is Mode.linear:
            stats = variables.stats["head"]
            features = _scaled(features, stats["mean"], stats["var"])
        return self._logits(variables, features)

    # ------------------------------------------------------------------------- network and loss

    def _unused(self) -> str:
        """What the run of `init_from` has behind the encoder."""
        if self._uvit:
            return rf"net/(out_blocks/.*|norm/.*|head/.*|final_conv/.*|{NEW_PARAMS})"
        if self.cfg.mode is Mode.linear:
            return r"net/decoder/.*"
        return r"net/(decoder/.*|encoder/norm/.*)"  # the head brings a norm of its own

    def _encode(self, call: Callable[..., Any], x: Latents) -> Any:
        """`call`, the network's init or apply, for the normalised latents `x`."""
        if not self._uvit:
            layer = None if self.cfg.mode is Mode.linear else self.cfg.model.depth
            return call(x, layer, method="features")
        n = x.shape[0]
        time = self.cfg.process.build().network_time(jnp.zeros(n))
        return call(x, time, {"label": jnp.full((n,), self.cfg.model.num_classes)})

    def latents(self, variables: Variables, batch: Batch) -> Latents:
        """The f32 latents of a batch, or its images in [0, 1]; not normalised."""
        return self.inputs.read(variables, batch)

    def _normal(self, variables: Variables, batch: Batch) -> Latents:
        return variables.constants["norm"].apply(self.latents(variables, batch))

    def _features(self, variables: Variables, x: Latents) -> Features:
        """Pooled, of the normalised latents `x`."""
        net = {"params": variables.params["net"]}
        tokens = self._encode(functools.partial(self.net.apply, net), x)
        if self._uvit:
            return tokens.mean(axis=1)
        return tokens[:, 0] if self.cfg.pool is Pool.cls else tokens[:, 1:].mean(axis=1)

    def _logits(self, variables: Variables, features: Features) -> Float[Array, "b k"]:
        """Of features that are normalised already where the head is a linear probe's."""
        head = variables.params["head"]
        if self.cfg.mode is Mode.finetune:
            features = LayerNorm(NORM_EPS).apply({"params": head["norm"]}, features)
        return features @ head["kernel"] + head["bias"]

    def _mixed(
        self, key: PRNGKeyArray, examples: Batch, target: Float[Array, "b k"]
    ) -> tuple[Batch, Float[Array, "b k"]]:
        """Each example with the one that stands as far from the batch's other end."""
        images = "image" in examples
        if images:
            x = examples["image"].astype(jnp.float32)
        else:  # to mix samples of Gaussians, or means, and to normalise are interchangeable
            x = self.inputs.read(Variables({}, {}, {}), examples)
        keep = mixing(key, x.shape[1], x.shape[2], self.cfg.mixup, self.cfg.cutmix)
        share, area = keep.mean(), keep[:, :, None]
        x = area * x + (1 - area) * x[::-1]
        target = share * target + (1 - share) * target[::-1]
        if images:
            return examples | {"image": jnp.round(x).astype(jnp.uint8)}, target
        return {"latent": x}, target

    def _loss(self, variables: Variables, inputs: Inputs, carry: Any) -> Loss:
        x, stats = inputs.examples, {}
        normal = self._normal(variables, x)
        features = self._features(variables, normal)
        if self.cfg.mode is Mode.linear:
            features, stats = batch_norm(features, variables.stats["head"])
            stats = {"head": stats}
        logits = self._logits(variables, features)
        each = -jnp.sum(x["target"] * jax.nn.log_softmax(logits), axis=-1)
        right = jnp.argmax(logits, axis=-1) == jnp.argmax(x["target"], axis=-1)
        loss = jnp.sum(x["weight"] * each)
        metrics = {
            "loss": loss,
            "accuracy": jnp.sum(x["weight"] * right),
            "latent_ms": jnp.sum(x["weight"] * jnp.mean(normal**2, axis=(1, 2, 3))),
        }
        return Loss({"loss": loss}, metrics, stats, None)

    # ---------------------------------------------------------------------------------- reporting

    def check_classes(self, data: Any, what: str) -> None:
        """UserError if data have not as many classes as the head."""
        pixels = are_pixels(data)
        count = len(pipeline.open_source(data).classes) if pixels else data.manifest().num_classes
        if count < 2:
            raise UserError(
                f"{what} of this run have no labels; a probe needs images in folders of classes, "
                "or a data set with labels, or latents of such"
            )
        if count != self.cfg.classes:
            raise UserError(
                f"{what} of this run are of {count} classes, but task.classes = "
                f"{self.cfg.classes}; set it to {count}"
            )

    def describe(self) -> list[str]:
        """The encoder, the head, and what trains."""
        cfg = self.cfg
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        trained, frozen = tree.sizes(params, cfg.trainable)
        what = "linear probe" if cfg.mode is Mode.linear else "fine-tuning"
        part = "up to its middle block" if self._uvit else "without the decoder"
        mixed = [f"{n} {v:g}" for n, v in (("mixup", cfg.mixup), ("cutmix", cfg.cutmix)) if v]
        return [
            *cfg.model.describe(),
            f"{what} of it, {part}: {cfg.pool.value} of the tokens -> {cfg.classes} classes",
            f"trained {trained:,} parameters, frozen {frozen:,}",
            f"label smoothing {cfg.label_smoothing:g}; {', '.join(mixed) or 'nothing is mixed'}",
        ]

    def summary(self) -> dict[str, Any]:
        """What the report's table says of the run."""
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        trained, frozen = tree.sizes(params, self.cfg.trainable)
        some = "head" if self.cfg.mode is Mode.linear else "net, head"
        return {
            "phase": "probe",
            "trained": some if frozen else "everything",
            "n_trained": trained,
            "n_frozen": frozen,
        }

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Latents of another size than networks expect."""
        return self.inputs.warnings(metrics)


def soft_targets(
    label: Int[Array, " b"], classes: int, smoothing: float
) -> Float[Array, "b k"]:  # fmt: skip
    """smoothing / classes everywhere, and the rest at the label."""
    return (1 - smoothing) * jax.nn.one_hot(label, classes) + smoothing / classes


def mixing(
    key: PRNGKeyArray, height: int, width: int, mixup: float, cutmix: float
) -> Float[Array, "h w"]:
    """The share of each example that stays at each place; the other's is the rest of 1.

    Mixup (arXiv 1710.09412): one share s ~ Beta(mixup, mixup) everywhere.  CutMix (arXiv
    1905.04899): all but a box of 1 - s of the area, cut off at the border.  One draw for a batch.
    """
    k_which, k_mixup, k_cutmix, k_row, k_column = jax.random.split(key, 5)
    blend = jax.random.beta(k_mixup, mixup, mixup) if mixup else 1.0
    whole = jnp.full((height, width), blend)
    if not cutmix:
        return whole
    side = jnp.sqrt(1 - jax.random.beta(k_cutmix, cutmix, cutmix))

    def inside(key: PRNGKeyArray, size: int) -> Array:
        half = jnp.floor(side * size).astype(jnp.int32) // 2
        at = jnp.arange(size) - jax.random.randint(key, (), 0, size)
        return (at >= -half) & (at < half)

    outside = ~(inside(k_row, height)[:, None] & inside(k_column, width))
    chosen = jax.random.bernoulli(k_which, 0.5) if mixup else True
    return jnp.where(chosen, outside.astype(jnp.float32), whole)


def batch_norm(features: Features, stats: Tree) -> tuple[Features, Tree]:
    """(normalised by the statistics of the whole batch, the running statistics moved)."""
    n, m = features.shape[0], BATCH_NORM_MOMENTUM
    mean = features.mean(axis=0)
    var = jnp.square(features - mean).mean(axis=0)
    moved = {
        "mean": (1 - m) * stats["mean"] + m * mean,
        "var": (1 - m) * stats["var"] + m * var * n / (n - 1),
    }
    return _scaled(features, mean, var), moved


def _scaled(features: Features, mean: Float[Array, " d"], var: Float[Array, " d"]) -> Features:
    return (features - mean) * jax.lax.rsqrt(var + BATCH_NORM_EPS)
