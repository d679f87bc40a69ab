"""What masking brings at the size of two CPU cores: LMD's schedules, and masked diffusion.

First a small f8 autoencoder is trained on the built-in photographs and its latents are cached
(16 x 16 tokens at 128 px).  Then, with three seeds each:

(a) LMD (arXiv 2312.07971) with every schedule of the mask, with MAE's constant 0.75, and a masked
    autoencoder of pixels with as many tokens; judged by what they fill into held-out photographs,
    three quarters of which are masked, against FLOPs and against seconds.
(b) The masking-diffusion UViT through its three stages, and the plain UViT; judged by the loss on
    held-out latents and by samples.

All arms of a part train for the same FLOPs, each with a number of steps of its own and its whole
schedule.  Latents are those of a cache, each crop with its mirror image; the arm on pixels draws
its crops anew.

Every arm is a run of its own (`train.train`) below the output folder, so whatever stops the study,
the same command goes on from there.  masking_report.py makes the tables.
"""

import dataclasses
import json
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float64

from dcae_jax import config as config_lib
from dcae_jax import distributed, mask_recipes, rng, sharding, step, train
from dcae_jax.cli import cache_latents
from dcae_jax.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    ReportConfig,
    RunConfig,
    Schedule,
)
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import PhotosConfig
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space, TimeDraw
from dcae_jax.diffusion.samplers import DPM2MConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.class_scores import ClassScoresConfig
from dcae_jax.evals.filled import FilledConfig
from dcae_jax.evals.reconstruct import ReconstructConfig
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.masking import MaskConfig, MaskKind
from dcae_jax.models import dcae
from dcae_jax.models.layers import Dtype
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.models.md_uvit import MDUViTConfig
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.report import flops, progress, writers
from dcae_jax.studies import base
from dcae_jax.tasks.autoencode import AutoencodeConfig, LossConfig
from dcae_jax.tasks.base import Task
from dcae_jax.tasks.diffuse import DiffuseConfig
from dcae_jax.tasks.latents import LatentNorm
from dcae_jax.tasks.mask_diffuse import MaskDiffuseConfig
from dcae_jax.tasks.mask_latents import MaskLatentsConfig

PIXELS = "pixels"  # (a): the masked autoencoder of pixels
SCHEDULES = tuple(kind.value for kind in MaskKind)  # (a): LMD
PLAIN, MASKED = "uvit", "md-uvit"  # (b)
KINDS = (*SCHEDULES, PIXELS, PLAIN, MASKED)
FACTOR = 8  # of the autoencoder


@dataclass(slots=True)
class Settings:
    """The size of the study; the default took 36 minutes on two cores that did other work too."""

    side: int = 128  # pixels
    autoencoder_widths: tuple[int, ...] = (16, 32, 64, 64)  # f8
    autoencoder_depths: tuple[int, ...] = (0, 1, 1, 1)  # of the encoder and of the decoder
    latent_channels: int = 4
    autoencoder_steps: int = 200
    autoencoder_batch: int = 8
    crops: int = 2048  # of the cache; and as many mirror images
    held_out: int = 128  # latents
    width: int = 64  # of all transformers
    depth: int = 4
    heads: int = 2
    decoder_depth: int = 1  # of (a)
    batch: int = 16
    steps: int = 220  # of the constant mask of (a); the others take as many FLOPs
    rate: float = 2e-3
    buckets: tuple[int, ...] = (192, 128, 64)  # visible tokens
    diffusion_steps: int = 110  # of the plain UViT of (b), likewise
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_images: int = 32
    samples: int = 64
    points: int = 4  # of a curve
    quick: bool = False

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.side // FACTOR


def quick() -> Settings:
    """A study of the same shape whose numbers mean nothing: it shows that the command works."""
    return Settings(
        side=64, autoencoder_widths=(8, 8, 16, 32), autoencoder_steps=8, crops=32, held_out=32,
        width=16, depth=2, heads=2, decoder_depth=1, batch=8, steps=12, buckets=(48, 16),
        diffusion_steps=12, seeds=(0, 1), eval_images=8, samples=16, points=2, quick=True,
    )  # fmt: skip


class Arm(NamedTuple):
    """One run of the study."""

    kind: str  # of KINDS
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.kind}-seed{self.seed}"

    @property
    def fills(self) -> bool:
        """Whether it belongs to (a)."""
        return self.kind not in (PLAIN, MASKED)


class Point(NamedTuple):
    """A score during training."""

    step: int
    flops: float  # of the training up to there
    seconds: float  # likewise, without evaluations, checkpoints and compilation
    value: float


@dataclass(slots=True)
class Result:
    """What an arm left in its workdir."""

    arm: Arm
    steps: int
    flops: float  # of the whole training
    flops_per_image: float  # mean over the training
    seconds: float
    parameters: int
    after: dict[str, float]
    baselines: dict[str, dict[str, float]]
    curve: list[Point] = field(default_factory=list)


@dataclass(slots=True)
class Study:
    """All results; what masking_report.py reads."""

    settings: Settings
    results: list[Result]
    autoencoder: dict[str, float]  # its scores on held-out crops
    encoder_flops: float  # of one image

    def of(self, kind: str) -> list[Result]:
        """The results of a kind, one a seed."""
        return [r for r in self.results if r.arm.kind == kind]


# --------------------------------------------------------------------------------------- configs


def photos(settings: Settings, split: str) -> DataConfig:
    """Crops of the built-in photographs."""
    return DataConfig(
        source=PhotosConfig(), split=split, resolution=settings.side,
        transform=Transform.random_crop, flip=split == "train", threads=2,
    )  # fmt: skip


def autoencoder_config(settings: Settings) -> RunConfig:
    """A small f8 DC-AE, phase 1."""
    model = dcae.narrow(
        dcae.from_scratch(dcae.dc_ae_f32c32_in()), widths=settings.autoencoder_widths,
        encoder_depths=settings.autoencoder_depths, decoder_depths=settings.autoencoder_depths,
        latent_channels=settings.latent_channels,
    )  # fmt: skip
    model.dtype = Dtype.float32
    evaluator = ReconstructConfig(
        data=photos(settings, "test"), n=settings.eval_images, batch=settings.autoencoder_batch,
        every=0, training_pictures=0,
    )  # fmt: skip
    cfg = _run(settings, settings.autoencoder_steps, settings.autoencoder_batch)
    cfg.name, cfg.evals = "masking study: autoencoder", [evaluator]
    cfg.task = AutoencodeConfig(model=model, losses=LossConfig(l1=1.0))
    cfg.data = photos(settings, "train")
    return _resolved(cfg)


def arm_config(settings: Settings, arm: Arm, latents: str) -> RunConfig:
    """The resolved config of an arm; `latents` is the cache."""
    measure, steps = (
        ("constant", settings.steps) if arm.fills else (PLAIN, settings.diffusion_steps)
    )
    cfg = _config(settings, measure, latents, steps)
    if arm.kind != measure:
        budget = costs(cfg)[-1]
        # The mean cost of a step hardly depends on their number: schedules are shares of it.
        mean = costs(_config(settings, arm.kind, latents, steps))[-1] / steps
        cfg = _config(settings, arm.kind, latents, round(budget / mean))
    cfg.name, cfg.seed = f"masking study: {arm.kind}", arm.seed
    return _resolved(cfg)


def _config(settings: Settings, kind: str, latents: str, steps: int) -> RunConfig:
    """Of a kind, for so many steps; resolved."""
    cfg = _run(settings, steps, settings.batch)
    if kind in (PLAIN, MASKED):
        _diffuse(cfg, settings, latents, masked=kind == MASKED)
    else:
        _fill(cfg, settings, kind, latents)
    cfg.evals[0].every = math.ceil(steps / settings.points)
    return _resolved(cfg)


def _run(settings: Settings, steps: int, batch: int) -> RunConfig:
    """What all runs share."""
    return RunConfig(
        steps=steps, batch=batch,
        optim=OptimConfig(
            lr=settings.rate, weight_decay=0.01, warmup_steps=max(steps // 10, 1), clip_norm=1.0,
            schedule=Schedule.cosine, end_lr=0.05,
        ),
        ema=EmaConfig(decays=(0.99,), warmup_steps=50),
        # A run is small beside the study: its newest checkpoint is all that is kept.
        checkpoint=CheckpointConfig(every=max(steps // 2, 1), keep=1),
        report=ReportConfig(every=max(steps // 20, 1), tensorboard=False),
    )  # fmt: skip


def _resolved(cfg: RunConfig) -> RunConfig:
    config_lib.validate(config_lib.resolve(cfg), jax.device_count())
    return cfg


def _fill(cfg: RunConfig, settings: Settings, kind: str, latents: str) -> None:
    """(a): on latents, or on pixels with as many tokens."""
    s, pixels = settings, kind == PIXELS
    model = LMDConfig(
        in_channels=3 if pixels else s.latent_channels, patch=FACTOR if pixels else 1,
        input_size=(s.side, s.side) if pixels else (s.grid, s.grid),
        width=s.width, depth=s.depth, heads=s.heads,
        decoder_width=s.width, decoder_depth=s.decoder_depth, decoder_heads=s.heads,
        dtype=Dtype.float32,
    )  # fmt: skip
    schedule = MaskKind.constant if pixels else MaskKind(kind)
    cfg.task = MaskLatentsConfig(
        model=model, mask=MaskConfig(kind=schedule, buckets=s.buckets), norm_target=False,
        latent_norm=LatentNorm.channel,
    )  # fmt: skip
    cfg.data = photos(s, "train") if pixels else LatentDataConfig(path=latents, threads=2)
    cfg.evals = [FilledConfig(images=photos(s, "test"), n=s.eval_images, batch=s.eval_images)]


def _diffuse(cfg: RunConfig, settings: Settings, latents: str, masked: bool) -> None:
    """(b): the plain UViT, or the other one in the stages of the default recipe."""
    s, same = settings, {"process": _process(), "latent_norm": LatentNorm.channel}
    if masked:
        recipe = mask_recipes.curriculum()
        recipe.stages[0].mask.buckets = s.buckets
        model = MDUViTConfig(**_sizes(s), **recipe.model, k_out=1)
        cfg.task = MaskDiffuseConfig(model=model, stages=recipe.stages, **recipe.task, **same)
        cfg.optim.milestones = recipe.milestones
    else:
        cfg.task = DiffuseConfig(model=UViTConfig(**_sizes(s)), **same)
    cfg.data = LatentDataConfig(path=latents, threads=2)
    held_out = {"path": latents, "split": "test", "flip": False}
    cfg.evals = [
        ValLossConfig(
            data=LatentDataConfig(**held_out), n=s.held_out, batch=s.eval_images, bins=5
        ),
        ClassScoresConfig(
            data=LatentDataConfig(**held_out), n=s.samples, batch=s.eval_images,
            sampler=DPM2MConfig(steps=20), guidance=GuidanceConfig(scale=1.5), every=0,
            at_start=False,
        ),
    ]  # fmt: skip


def _sizes(settings: Settings) -> dict[str, object]:
    s = settings
    return {
        "in_channels": s.latent_channels, "input_size": (s.grid, s.grid), "num_classes": 8,
        "width": s.width, "depth": s.depth, "heads": s.heads, "dtype": Dtype.float32,
    }  # fmt: skip


def _process() -> ProcessConfig:
    return ProcessConfig(
        kind=Kind.flow, predict=Space.v, loss_space=Space.v, times=TimeDraw.logit_normal
    )


def costs(cfg: RunConfig) -> Float64[np.ndarray, " steps"]:
    """FLOPs of the training up to the end of each step, counted on the jaxpr."""
    mesh, task = sharding.make_mesh(cfg.mesh), cfg.task.build(cfg)
    each = {key: _step_flops(cfg, task, mesh, key) for key in task.statics(0, cfg.steps)}
    return np.cumsum([each[task.static(k)] for k in range(cfg.steps)], dtype=np.float64)


_COUNTED: dict[tuple[str, str], float] = {}  # a count takes a second, and arms share programs


def _step_flops(cfg: RunConfig, task: Task, mesh: Mesh, static: Hashable) -> float:
    """Of one step; neither the seed nor the number of steps changes it."""
    name = json.dumps(config_lib.to_json([cfg.task, cfg.batch, cfg.data])), str(static)
    if name not in _COUNTED:
        with jax.set_mesh(mesh):
            state = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(cfg.seed)))
            arguments = state, task.abstract_constants(), train.abstract_batch(cfg, mesh)
            _COUNTED[name] = flops.count(
                lambda s, c, b: step.train_step(task, cfg, static, s, c, b), *arguments
            ).total
    return _COUNTED[name]


# ------------------------------------------------------------------------------------------- runs


def run(settings: Settings, out: str, preemption: distributed.Preemption) -> Study:
    """Trains what is missing in `out`; raises Preempted when asked to stop."""
    _check_devices(settings)
    folder = epath.Path(out)
    base.claim(folder, settings)
    ae, latents = autoencoder_config(settings), folder / "latents"
    train.say("== the autoencoder")
    base.train_arm(ae, folder / "autoencoder", preemption)
    _cache(settings, folder, latents, preemption)
    results, arms = [], [Arm(kind, seed) for seed in settings.seeds for kind in KINDS]
    for i, arm in enumerate(arms):
        spent = sum(r.seconds for r in results)
        left = f"about {progress.duration(spent / i * (len(arms) - i))} of training" if i else "..."
        train.say(f"== arm {i + 1} of {len(arms)}: {arm.kind}, seed {arm.seed} | left: {left}")
        cfg = arm_config(settings, arm, str(latents))
        base.train_arm(cfg, folder / arm.name, preemption)
        results.append(read(folder / arm.name, arm, cfg))
    return Study(settings, results, _scores(folder / "autoencoder"), encoder_flops(ae))


def _check_devices(settings: Settings) -> None:
    count = jax.device_count()
    if settings.batch % count or settings.autoencoder_batch % count:
        raise UserError(
            f"the study's batches of {settings.batch} and {settings.autoencoder_batch} do not "
            f"divide among {count} devices; show it fewer, e.g. JAX_PLATFORMS=cpu"
        )


def _cache(
    settings: Settings, folder: epath.Path, latents: epath.Path, preemption: distributed.Preemption
) -> None:
    """The latents of both splits, by the command; what is there already is kept."""
    for split, n in (("train", settings.crops), ("test", settings.held_out)):
        preemption.check()  # a signal during the caching of a split is seen at its end
        options = ["--from", str(folder / "autoencoder"), "--out", str(latents), "--split", split]
        flips = ["--flips"] if split == "train" else []
        code = cache_latents.main([*options, "--n", str(n), *flips])
        if code:
            raise UserError(f"caching the latents of {split} ended with exit code {code}")


def _scores(workdir: epath.Path) -> dict[str, float]:
    """All scores at the end, whatever evaluator they are of."""
    after = json.loads((workdir / "summary.json").read_text())["evals"]["after"]
    return {name: value for found in after.values() for name, value in found.items()}


def encoder_flops(cfg: RunConfig) -> float:
    """Of one image through the encoder."""
    model = cfg.task.model
    side = cfg.data.resolution
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    variables = dcae.abstract_variables(model)
    net = model.build()
    return flops.count(lambda v, x: net.apply(v, x, method="encode"), variables, image).total


def read(workdir: epath.Path, arm: Arm, cfg: RunConfig) -> Result:
    """The result in a workdir."""
    summary = json.loads((workdir / "summary.json").read_text())
    total = costs(cfg)
    rows = writers.read_metrics(workdir)
    clock = _seconds(rows, summary, cfg)
    key = f"{cfg.evals[0].name}/{'psnr_pixel_masked' if arm.fills else 'loss'}"
    curve = [
        Point(k, float(total[k - 1]), clock[k], float(row[key]))
        for row in rows
        if key in row and (k := int(row["step"]))
    ]
    baselines = {n: s for found in summary["baselines"].values() for n, s in found.items()}
    return Result(
        arm, cfg.steps, float(total[-1]), float(total[-1]) / (cfg.steps * cfg.batch),
        clock[cfg.steps], summary["n_trained"], _scores(workdir), baselines, curve,
    )  # fmt: skip


def _seconds(
    rows: list[dict[str, float]], summary: dict[str, Any], cfg: RunConfig
) -> Float64[np.ndarray, " steps1"]:
    """Seconds of training up to each step, pauses left out.

    A program's steps take what they took while nothing was compiled beside them; where that was
    never the case, and in runs with one program alone, what the log says.
    """
    each = _logged_seconds(rows, cfg.batch, cfg.steps)
    programs = summary["programs"] if "programs" in summary else []
    timed = {p["program"]: p["ms_per_step"] for p in programs}
    if timed:
        task = cfg.task.build(cfg)
        for k in range(cfg.steps):
            if ms := timed[str(task.static(k))]:
                each[k] = ms / 1e3
    return np.concatenate([[0.0], np.cumsum(each)])


def _logged_seconds(
    rows: list[dict[str, float]], batch: int, steps: int
) -> Float64[np.ndarray, " steps"]:
    """Of each step, by the speed of its interval; one without a speed takes the next one's."""
    found = np.zeros(steps)
    for row in sorted(rows, key=lambda row: -row["step"]):
        speed = row.get("train/images_per_s", math.nan)
        if math.isfinite(speed):
            found[: int(row["step"])] = batch / speed
    return found


def record(study: Study) -> dict[str, object]:
    """Everything as plain JSON."""
    return {
        "settings": config_lib.to_json(study.settings),
        "autoencoder": study.autoencoder, "encoder_flops": study.encoder_flops,
        "arms": [
            {**dataclasses.asdict(r), "arm": r.arm._asdict(),
             "curve": [point._asdict() for point in r.curve]}
            for r in study.results
        ],
        **base.provenance_record(),
    }  # fmt: skip
