"""Masking and diffusion in one: a share of the tokens is hidden, a share of the examples is clean.

Each token has a level of noise, and a masked one is at infinite noise.  LMD (nothing noisy, some
tokens masked), latent diffusion (nothing masked) and MaskDiT (both) are values of one loss,

    lambda_d * diffusion loss at visible tokens + lambda_m * latent loss at masked tokens,

whose mask ratio, share of clean examples and weights are those of the training's stages.  Proposed
here; the epsilon of a masked token cannot be predicted (nothing visible depends on it), so masked
tokens have a head of their own.  The augmented training of DC-AE 1.5 (arXiv 2508.00413), a further
diffusion loss on the first channels alone, goes with all of it.
"""

import enum
import math
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int64, PRNGKeyArray

from dcae_jax import masking, optim
from dcae_jax.config import RunConfig
from dcae_jax.errors import UserError
from dcae_jax.masking import MaskConfig, MaskKind, Rounding, Split
from dcae_jax.models.md_uvit import NEW_PARAMS, Fill, Masked, MDUViTConfig
from dcae_jax.models.transformer import patchify, unpatchify
from dcae_jax.tasks.base import Batch, Inputs, Loss, Metrics, Variables
from dcae_jax.tasks.diffuse import DiffuseConfig, DiffuseTask, Draws
from dcae_jax.tasks.latents import AsksTimes, Latents
from dcae_jax.tree import Tree

# Below it a batch of almost pure noise counts less, instead of dividing by zero.
LEAST_WEIGHT = 1e-6


class RecWeight(enum.Enum):
    """What an example counts in the loss at masked tokens."""

    alpha_bar = "alpha_bar"  # alpha^2 of its time: noise says little of what is masked
    one = "one"  # MaskDiT


class RecTarget(enum.Enum):
    """What the second head says of a masked token."""

    latent = "latent"  # the normalised latent; it can be decoded
    whitened = "whitened"  # that, each token less its mean and over its deviation (MAE, LMD)
    noised_whitened = "noised_whitened"  # the same of the noisy latent (MaskDiT)


def unmasked() -> MaskConfig:
    """Nothing masked."""
    return MaskConfig(kind=MaskKind.constant, end=0.0)


@dataclass(slots=True)
class StageConfig:
    """A part of the training.  The default is plain diffusion."""

    until: float = 1.0  # share of the run's steps at which it ends
    clean: float = 0.0  # probability that an example has no noise
    mask: MaskConfig = field(default_factory=unmasked)  # over the steps of this stage
    diffusion: float = 1.0  # weight of the diffusion loss; 0: it is not computed
    reconstruction: float = 0.0  # weight of the loss at masked tokens; 0: it is not computed
    # Every n-th step trains nothing but reconstruction of clean examples; 0: never.
    rehearse_every: int = 0
    rehearse_ratio: float = 0.5  # masked share of those steps, rounded up to whole tokens
    # Squares of so many tokens a side are masked together (MaskDM): as many as come nearest to the
    # ratio, but at least one is visible.
    block: int = 1

    def stage_problems(self) -> list[str]:
        """All problems of these values but `until`, each with its mend."""
        found = []
        if not 0 <= self.clean <= 1:
            found.append(f"clean = {self.clean}; a probability, from 0 to 1")
        found += [
            f"{name} = {value}; a weight, 0 or more"
            for name, value in (
                ("diffusion", self.diffusion), ("reconstruction", self.reconstruction)
            )
            if not (math.isfinite(value) and value >= 0)
        ]  # fmt: skip
        if self.block < 1:
            found.append(f"block = {self.block}; 1 masks single tokens")
        if self.rehearse_every < 0 or self.rehearse_every == 1:
            found.append(
                f"rehearse_every = {self.rehearse_every}; 0 is never, 10 every tenth step; for "
                "reconstruction at every step set clean=1, diffusion=0, reconstruction=1"
            )
        if self.rehearse_every and not 0 < self.rehearse_ratio < 1:
            found.append(
                f"rehearse_ratio = {self.rehearse_ratio}; the masked share, between 0 and 1"
            )
        return found or self._objective_problems()

    def rehearsal_keep(self, tokens: int) -> int:
        """The number of visible tokens of a rehearsal; in no table, as there is only one."""
        exact = MaskConfig(MaskKind.constant, end=self.rehearse_ratio, rounding=Rounding.exact)
        return min(exact.keep(0, 1, tokens), tokens - 1)

    def grid_problems(self, rows: int, columns: int) -> list[str]:
        """Problems of these values for a network of so many tokens."""
        tokens = rows * columns
        found = self.mask.token_problems(tokens)
        if self.rehearse_every and self.rehearsal_keep(tokens) < 1:
            found.append(
                f"rehearse_ratio = {self.rehearse_ratio} leaves none of {tokens} tokens visible; "
                f"at most {masking.largest_ratio(tokens):g}"
            )
        sides = [
            side for side in range(2, min(rows, columns) + 1)
            if rows % side == columns % side == 0 and side**2 < tokens
        ]  # fmt: skip
        if self.block not in (1, *sides):
            found.append(
                f"block = {self.block}, but there are {rows} x {columns} tokens, which are to be "
                f"two or more whole squares of that side; {', '.join(map(str, (1, *sides)))} "
                f"{'are' if sides else 'is'} possible"
            )
        return found

    def _objective_problems(self) -> list[str]:
        if not (self.diffusion or self.reconstruction):
            return [
                "diffusion and reconstruction are both 0: there is nothing to learn; set one of "
                "them to 1"
            ]
        found = []
        if self.diffusion and self.clean == 1:
            found.append(
                f"diffusion = {self.diffusion:g}, but clean = 1: no example has noise to predict; "
                "lower clean, or set diffusion=0"
            )
        if self.clean and not self.reconstruction:
            found.append(
                f"clean = {self.clean:g}, but reconstruction = 0: clean examples would teach "
                "nothing; set clean=0, or reconstruction to 0.1"
            )
        return found


@dataclass(slots=True)
class MaskDiffuseConfig(DiffuseConfig):
    """One masking-diffusion model.  The default is plain diffusion with MD-UViT-S."""

    model: MDUViTConfig = field(default_factory=MDUViTConfig)
    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig()])
    rec_weight: RecWeight = RecWeight.alpha_bar
    rec_target: RecTarget = RecTarget.latent
    # A step adds the diffusion loss on the first c of all channels, with one c drawn from these.
    channel_counts: tuple[int, ...] = ()
    always_all: bool = True  # False: it replaces the one on all channels, with its weight
    channel_weight: float = 1.0  # of what is added

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = DiffuseConfig.problems(self)
        if not self.stages:
            return [*found, "task.stages is empty; one StageConfig() is plain diffusion"]
        found += self._until_problems() + self._channel_problems()
        for i, stage in enumerate(self.stages):
            mine = stage.stage_problems() + self._model_problems(stage)
            found += [f"task.stages[{i}]: {p}" for p in mine]
        if self.rec_target is not RecTarget.latent and self._token_size() < 2:
            found.append(
                f"task.rec_target = {self.rec_target.value} of tokens that are one number has no "
                "deviation; set rec_target=latent"
            )
        return found

    def _variance_problems(self) -> list[str]:
        if not self.process.learn_variance:
            return []
        return [
            "task.process.learn_variance = True, but an MD-UViT gives no variance; set it to False"
        ]

    def _token_size(self) -> int:
        return self.model.patch**2 * self.model.in_channels

    def _until_problems(self) -> list[str]:
        ends = [stage.until for stage in self.stages]
        if all(a < b for a, b in zip([0.0, *ends], ends, strict=False)) and ends[-1] == 1:
            return []
        said = ", ".join(f"{e:g}" for e in ends)
        return [f"task.stages end at {said} of the steps; rising shares, the last one 1"]

    def _channel_problems(self) -> list[str]:
        counts, most = self.channel_counts, self.model.in_channels
        if not counts:
            return []
        found = []
        least_missing = most - 1 if self.always_all else most
        if len(set(counts)) < len(counts) or not all(1 <= c <= least_missing for c in counts):
            found.append(
                f"task.channel_counts = {counts}; different numbers from 1 to {least_missing}"
                + (" (all channels are trained at each step)" if self.always_all else "")
            )
        if not self.always_all and most not in counts:
            found.append(
                f"task.channel_counts = {counts} with always_all = False never trains all {most} "
                f"channels, which are sampled; add {most}, or set always_all=True"
            )
        if not (math.isfinite(self.channel_weight) and self.channel_weight > 0):
            found.append(
                f"task.channel_weight = {self.channel_weight} with channel_counts = {counts}; a "
                "positive weight, or channel_counts=()"
            )
        if not self.model.adaptive_channels or self.model.patch != 1:
            found.append(
                "task.channel_counts needs task.model.adaptive_channels=True and patch=1: the "
                "network must take latents of fewer channels"
            )
        if not self.always_all and self.channel_weight != 1:
            found.append(
                f"task.channel_weight = {self.channel_weight:g} weighs what is added to the loss "
                "of all channels, and with always_all=False nothing is added; set it to 1"
            )
        if self.sampling_problem():
            found.append("task.channel_counts is for the diffusion loss, and no stage has one")
        return found

    def _model_problems(self, stage: StageConfig) -> list[str]:
        """What of a stage the network cannot do."""
        model, found = self.model, []
        if stage.reconstruction or stage.rehearse_every:
            what = "reconstruction" if stage.reconstruction else "rehearse_every"
            if Fill(model.fill) is Fill.carry:
                found.append(
                    f"{what} with task.model.fill = carry: the network knows the tokens it should "
                    "reconstruct; set it to 0, or fill=mask with k_in=0"
                )
            elif not model.recon_head:
                found.append(
                    f"{what} needs task.model.recon_head=True (and k_out of 1 or more), the head "
                    "that says what is masked"
                )
        return found

    def stage_steps(self, steps: int) -> list[tuple[int, int]]:
        """(first step, step after the last) of each stage."""
        ends = [optim.first_step(stage.until, steps) for stage in self.stages]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def run_problems(self, run: RunConfig) -> list[str]:
        """Problems that this task sees in the whole run."""
        found = DiffuseConfig.run_problems(self, run) + self._asking_problems(run)
        if self.problems() or self.model.problems() or run.steps < 1:
            return found  # the checks below need well-formed values
        rows, columns = self.model.grid(*self.model.input_size)
        spans = self.stage_steps(run.steps)
        for i, (stage, (first, last)) in enumerate(zip(self.stages, spans, strict=True)):
            where = f"task.stages[{i}]"
            if stage.mask.problems():
                continue
            found += [f"{where}: {p}" for p in stage.grid_problems(rows, columns)]
            if first == last:
                found.append(
                    f"{where}: ends at {stage.until:g} of {run.steps} steps and has none; leave it "
                    "out, or train longer"
                )
        return found or self._plan_problems(run, spans)

    def _asking_problems(self, run: RunConfig) -> list[str]:
        """Evaluators of diffusion in a run without; those of masks are the parent's."""
        if not (why := self.sampling_problem()):
            return []
        return [
            f"evals: {e.name} is for diffusion models, and {why}; leave it out, and use "
            "MaskedConfig of evals/masked.py"
            for e in run.evals
            if isinstance(e, Draws | AsksTimes)
        ]

    def sampling_problem(self) -> str | None:
        """Why nothing can be sampled from such a model."""
        if any(stage.diffusion for stage in self.stages):
            return None
        return "no stage has diffusion above 0: it never learned to remove noise"

    def filling_problem(self) -> str | None:
        """Why such a model cannot say what masked tokens are."""
        if not self.model.recon_head:
            return (
                "this network has no reconstruction head, so it cannot fill in masked tokens; train"
                " one with task.model.recon_head=True and a stage with reconstruction=1"
            )
        if self.rec_target is not RecTarget.latent:
            return (
                f"this network was trained on rec_target = {self.rec_target.value}, which cannot "
                "be decoded: mean and deviation of masked tokens are not known; train with "
                "rec_target=latent"
            )
        if not any(stage.reconstruction or stage.rehearse_every for stage in self.stages):
            return (
                "no stage trains this network's head for masked tokens; train one with "
                "reconstruction above 0, or with rehearse_every"
            )
        return None

    def _plan_problems(self, run: RunConfig, spans: list[tuple[int, int]]) -> list[str]:
        """Steps at which nothing would be learned, or reconstruction that never is."""
        found, schedule = [], Schedule(self, run)
        for i, (stage, (first, last)) in enumerate(zip(self.stages, spans, strict=True)):
            plans = schedule.between(first, last)
            bare = [p for p in plans if not (p.diffusion or p.reconstruction)]
            never = stage.reconstruction and all(not p.reconstruction for p in plans)
            if bare or never:
                found.append(
                    f"task.stages[{i}]: reconstruction = {stage.reconstruction:g} without a masked "
                    f"token at {'some' if not never else 'all'} of its steps; raise mask.start and "
                    "mask.end, or set reconstruction=0"
                )
        return found

    def build(self, run: RunConfig) -> "MaskDiffuseTask":
        """The task; the config must be resolved and valid."""
        return MaskDiffuseTask(self, run)


# --------------------------------------------------------------------------------------- schedule


@jax.tree_util.register_static
@dataclass(frozen=True)
class Plan:
    """All that a step's program depends on: one executable for each."""

    tokens: int
    keep: int  # visible tokens
    clean: float
    diffusion: float
    reconstruction: float
    block: int = 1
    channels: int = 0  # of the further diffusion loss; 0: there is none

    def __str__(self) -> str:
        whole = self.keep == self.tokens
        parts = [f"all {self.tokens} tokens" if whole else f"{self.keep} visible tokens"]
        values = {
            "clean": self.clean, "diffusion": self.diffusion, "reconstruction": self.reconstruction
        }  # fmt: skip
        parts += [f"{name} {value:g}" for name, value in values.items() if value]
        if self.block > 1:
            parts.append(f"blocks of {self.block}")
        if self.channels:
            parts.append(f"and the first {self.channels} channels")
        return ", ".join(parts)


class _Rows(NamedTuple):
    """What distinguishes the plans of some steps."""

    stage: Int64[np.ndarray, " n"]
    keep: Int64[np.ndarray, " n"]
    rehearsal: Int64[np.ndarray, " n"]  # 0 or 1
    channels: Int64[np.ndarray, " n"]


class Schedule:
    """Which plan is whose step's: a function of the config, the number of steps and the seed."""

    def __init__(self, cfg: MaskDiffuseConfig, run: RunConfig):
        self._cfg, self._seed = cfg, run.seed
        self._tokens = math.prod(cfg.model.grid(*cfg.model.input_size))
        self._spans = cfg.stage_steps(run.steps)

    def at(self, step: int) -> Plan:
        """The plan of a step."""
        return self._plan(*(int(column[0]) for column in self._rows(np.asarray([step]))))

    def between(self, first: int, last: int) -> list[Plan]:
        """Those of the steps first..last-1, each once, in the order of need."""
        if first >= last:
            return []
        rows = np.stack(self._rows(np.arange(first, last)), axis=1)
        sizes = rows.max(axis=0) + 1
        codes = np.ravel_multi_index(tuple(rows.T), tuple(sizes))
        _, where = np.unique(codes, return_index=True)
        plans = [self._plan(*map(int, rows[i])) for i in np.sort(where)]
        return list(dict.fromkeys(plans))

    def _rows(self, steps: Int64[np.ndarray, " n"]) -> _Rows:
        ends = [last for _, last in self._spans]
        stage = np.minimum(np.searchsorted(ends, steps, side="right"), len(ends) - 1)
        keep, rehearsal = np.zeros_like(steps), np.zeros_like(steps)
        for i, (cfg, (first, last)) in enumerate(zip(self._cfg.stages, self._spans, strict=True)):
            here = stage == i
            if not here.any():
                continue
            since = steps[here] - first
            found = cfg.mask.keeps(cfg.mask.ratio(since, last - first), self._tokens)
            if cfg.rehearse_every:
                now = since % cfg.rehearse_every == cfg.rehearse_every - 1
                found = np.where(now, cfg.rehearsal_keep(self._tokens), found)
                rehearsal[here] = now
            keep[here] = masking.whole_squares(found, cfg.block, self._tokens)
        return _Rows(stage, keep, rehearsal, self._channels(steps))

    def _channels(self, steps: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The number of channels drawn for each step; 0 without augmentation."""
        if not self._cfg.channel_counts:
            return np.zeros_like(steps)
        counts = np.asarray(self._cfg.channel_counts)
        return counts[(_hashed(self._seed, steps) % np.uint64(len(counts))).astype(np.int64)]

    def _plan(self, stage: int, keep: int, rehearsal: int, channels: int) -> Plan:
        cfg, tokens = self._cfg.stages[stage], self._tokens
        block = cfg.block if keep < tokens else 1
        if rehearsal:
            return Plan(tokens, keep, 1.0, 0.0, 1.0, block)
        # Where nothing is masked there is nothing to reconstruct, and no use of clean examples.
        clean, reconstruction = (
            (cfg.clean, cfg.reconstruction) if keep < tokens else (0.0, 0.0)
        )  # fmt: skip
        return Plan(
            tokens, keep, clean, cfg.diffusion, reconstruction, block,
            channels if cfg.diffusion else 0,
        )  # fmt: skip


def _hashed(seed: int, steps: Int64[np.ndarray, " n"]) -> np.ndarray:
    """Mixed 64-bit numbers of (seed, step): the same on every process, a million at once.

    Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    state = np.uint64(zlib.crc32(f"channels {seed}".encode()))
    with np.errstate(over="ignore"):
        x = (steps.astype(np.uint64) + (state << np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ------------------------------------------------------------------------------------------- task


class MaskDiffuseTask(DiffuseTask):
    """See MaskDiffuseConfig.  Sampling and validation are those of DiffuseTask: nothing masked."""

    cfg: MaskDiffuseConfig
    new_params = f"net/({NEW_PARAMS})"  # weights of a UViT fit without them

    def __init__(self, cfg: MaskDiffuseConfig, run: RunConfig):
        super().__init__(cfg, run)
        self._schedule = Schedule(cfg, run)

    def static(self, step: int) -> Plan:
        """What the program of a step depends on."""
        return self._schedule.at(step)

    def statics(self, first: int, last: int) -> list[Plan]:
        """Those of the steps first..last-1, each once, in the order of need."""
        return self._schedule.between(first, last)

    def prepare(
        self, key: PRNGKeyArray, batch: Batch, step: Int[Array, ""], static: Plan
    ) -> Inputs:
        """The draws of diffusion, unchanged, and which examples are clean, which tokens visible."""
        examples = super().prepare(key, batch, step, static).examples
        b = examples["label"].shape[0]
        k_clean, k_order = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"mask")))
        noisy = jnp.ones(b)
        if static.clean:
            noisy = 1.0 - jax.random.bernoulli(k_clean, static.clean, (b,)).astype(jnp.float32)
            examples["time"] = noisy * examples["time"]
            examples["diffusion_weight"] = noisy / jnp.maximum(noisy.sum(), 1.0)
        else:
            examples["diffusion_weight"] = examples["weight"]
        if static.reconstruction:
            u = jnp.ones(b)
            if self.cfg.rec_weight is RecWeight.alpha_bar:
                u = self.process.alpha(examples["time"]) ** 2
            examples["rec_weight"] = u / jnp.maximum(u.sum(), LEAST_WEIGHT)
        if static.keep < static.tokens:
            order = masking.random_order(k_order, b, *self.grid(), static.block)
            examples["split"] = masking.split(order, static.keep)
        return Inputs(examples, {"plan": static})

    # ------------------------------------------------------------------------------------- losses

    def _loss(self, variables: Variables, inputs: Inputs, carry: Any) -> Loss:
        plan, x = inputs.shared["plan"], inputs.examples
        normal = variables.constants["norm"].apply(self.latents(variables, x))
        metrics = {
            "latent_ms": jnp.sum(x["weight"] * jnp.mean(normal**2, axis=(1, 2, 3))),
            "mask_ratio": jnp.sum(x["weight"]) * (1 - plan.keep / plan.tokens),
            "clean": jnp.sum(x["weight"] * (x["time"] == 0)) if plan.clean else jnp.zeros(()),
        }
        found = self._objectives(variables, x, normal, plan)
        weights = {
            "diffusion": plan.diffusion, "reconstruction": plan.reconstruction,
            "diffusion_channels": (
                self.cfg.channel_weight if self.cfg.always_all else plan.diffusion
            ),
        }  # fmt: skip
        loss = sum((weights[name] * value for name, value in found.items()), jnp.zeros(()))
        return Loss({"loss": loss}, {"loss": loss, **found, **metrics}, {}, None)

    def _objectives(
        self, variables: Variables, x: Tree, normal: Latents, plan: Plan
    ) -> Metrics:  # fmt: skip
        """The terms of this plan, not weighted; what has no weight is not computed."""
        split = x["split"] if "split" in x else None
        x_t = self.process.diffuse(normal, x["noise"], x["time"])
        c, most = plan.channels, self.cfg.model.in_channels
        all_diffuse = bool(plan.diffusion) and (self.cfg.always_all or not c)
        found: Metrics = {}
        if all_diffuse or plan.reconstruction:
            said = self._masked(
                variables, x_t, x["time"], x["label"], split, all_diffuse, bool(plan.reconstruction)
            )
        if all_diffuse:
            found["diffusion"] = self._diffusion(said.output, x, normal, x_t, split)
        if plan.reconstruction:
            found["reconstruction"] = self._reconstruction(said.recon, x, normal, x_t, split)
        if c:
            less = x_t[..., :c]
            said = self._masked(variables, less, x["time"], x["label"], split, True, False)
            cut = x | {"noise": x["noise"][..., :c]}
            name = "diffusion_channels" if c < most else "diffusion"
            found[name] = self._diffusion(said.output, cut, normal[..., :c], less, split)
        return found

    def _masked(
        self, variables: Variables, x: Latents, time: Float[Array, " b"], label: Int[Array, " b"],
        split: Split | None, diffuse: bool, reconstruct: bool,
    ) -> Masked:  # fmt: skip
        """What the network says of x_t at the time of the process."""
        seen = self.process.network_time(time)
        if split is None:
            return Masked(self.network(variables, x, seen, {"label": label}), None)
        return self.net.apply(
            {"params": variables.params["net"]}, x, seen, {"label": label}, split=split,
            diffuse=diffuse, reconstruct=reconstruct,
        )  # fmt: skip

    def _diffusion(
        self, output: Latents, x: Tree, normal: Latents, x_t: Latents, split: Split | None
    ) -> Float[Array, ""]:
        """The loss at visible tokens of noisy examples; with fill = carry at all tokens."""
        if split is None or Fill(self.cfg.model.fill) is Fill.carry:
            each = self.process.loss(output, normal, x["noise"], x_t, x["time"])
        else:
            squares = self.process.squares(output, normal, x["noise"], x_t, x["time"])
            per_token = patchify(squares, self.cfg.model.patch).mean(-1)
            visible = jnp.where(split.masked(), 0.0, per_token).sum(1) / split.keep
            each = self.process.weight(x["time"]) * visible
        return jnp.sum(x["diffusion_weight"] * each)

    def _reconstruction(
        self, recon: Latents, x: Tree, normal: Latents, x_t: Latents, split: Split
    ) -> Float[Array, ""]:
        """The squared error of the second head at masked tokens."""
        patch = self.cfg.model.patch
        noised = self.cfg.rec_target is RecTarget.noised_whitened
        target = patchify(x_t if noised else normal, patch)
        if self.cfg.rec_target is not RecTarget.latent:
            target = masking.whiten(target)
        per_token = jnp.square(patchify(recon, patch) - target).mean(-1)
        masked = jnp.where(split.masked(), per_token, 0.0).sum(1) / (split.tokens - split.keep)
        return jnp.sum(x["rec_weight"] * masked)

    # ---------------------------------------------------------------------------- reconstructions

    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.cfg.model.grid(*self.cfg.model.input_size)

    def fill(
        self, variables: Variables, x: Latents, order: Int[Array, "b n"], keep: int,
        label: Int[Array, " b"],
    ) -> Latents:  # fmt: skip
        """Normalised latents: x at the first `keep` tokens of `order`, what they tell elsewhere.

        One pass of the network, no noise, no sampling: the mean of what could be there.
        """
        if problem := self.cfg.filling_problem():
            raise UserError(problem)
        split, time = masking.split(order, keep), jnp.zeros(x.shape[0])
        if split.whole:
            return x
        said = self._masked(variables, x, time, label, split, False, True)
        patch = self.cfg.model.patch
        seen, made = patchify(x, patch), patchify(said.recon, patch)
        tokens = jnp.where(split.masked()[:, :, None], made, seen)
        return unpatchify(tokens, *self.grid(), patch)

    # ---------------------------------------------------------------------------------- reporting

    def describe(self) -> list[str]:
        """Those of diffusion, and the stages."""
        lines = super().describe()
        spans = self.cfg.stage_steps(self.run.steps)
        for i, (stage, (first, last)) in enumerate(zip(self.cfg.stages, spans, strict=True)):
            plans = self.statics(first, last)
            keeps = sorted({p.keep for p in plans})
            seen = f"{keeps[0]}" if len(keeps) == 1 else f"{keeps[0]} to {keeps[-1]}"
            lines.append(
                f"stage {i}, steps {first} to {last - 1}: {seen} of {plans[0].tokens} tokens "
                f"visible, clean {stage.clean:g}, diffusion {stage.diffusion:g}, reconstruction "
                f"{stage.reconstruction:g}"
                + (f", a rehearsal every {n} steps" if (n := stage.rehearse_every) else "")
                + f"; programs: {len(plans)}"
            )
        return lines

    def summary(self) -> dict[str, Any]:
        """What the report's table says of the run."""
        return super().summary() | {"phase": "masked diffusion"}
