"""Recipes of latent diffusion on DC-AE: the published ones of UViT, USiT and DiT, and a modern one.

Source of the published: the recipe files of the official repository (efficientvit); what later work
found is in `modern`.  Each config's header says what is stated and what is chosen here.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

from dcae_jax.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    ReportConfig,
    RunConfig,
    Schedule,
)
from dcae_jax.convert.releases import RELEASES
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import TfdsConfig
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space, TimeDraw
from dcae_jax.diffusion.samplers import (
    AncestralConfig,
    Dopri5Config,
    DPM2MConfig,
    DPMFastConfig,
    SamplerConfig,
)
from dcae_jax.errors import UserError
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.evals.sample_scores import SampleScoresConfig, Score
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.models.dit import DiTConfig
from dcae_jax.models.transformer import MLPKind
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.online import OnlineDataConfig
from dcae_jax.tasks.diffuse import DiffuseConfig
from dcae_jax.tasks.latents import LatentNorm

# Latents of 512-px images, as fields of the networks.
LATENTS: dict[str, dict[str, Any]] = {
    "f32": {"in_channels": 32, "input_size": (16, 16), "patch": 1},
    "f64": {"in_channels": 128, "input_size": (8, 8), "patch": 1},
    "f8": {"in_channels": 4, "input_size": (64, 64), "patch": 2},  # SD-VAE, the baseline
}
# Nothing was published on f128.
MODERN_LATENTS = {**LATENTS, "f128": {"in_channels": 512, "input_size": (4, 4), "patch": 1}}
AUTOENCODERS = {  # that encode online
    "f32": "dc-ae-f32c32-in-1.0", "f64": "dc-ae-f64c128-in-1.0", "f128": "dc-ae-f128c512-in-1.0",
    "f8": "sd-vae-f8",
}  # fmt: skip
RESOLUTION = 512
SHOWN = (207, 360, 387, 974, 88, 979, 417, 279)  # classes of the grids
STEPS = 500_000


def choose(arg: str, sizes: Iterable[str], latents: Iterable[str]) -> tuple[str, str]:
    """(size, latent) of "h,f64"; UserError names those there are."""
    size, _, latent = arg.partition(",")
    if size not in sizes or latent not in latents:
        raise UserError(
            f"{arg!r} is not SIZE,LATENT: sizes are {', '.join(sizes)}, latents "
            f"{', '.join(latents)}"
        )
    return size, latent


def asked_fid(arg: str) -> tuple[str, bool]:
    """(the argument of a config without ",fid" at its end, whether that was there)."""
    base = arg.removesuffix(",fid")
    return base, base != arg


def with_fid(run: RunConfig) -> RunConfig:
    """The run with FID and Inception Score of 10,000 samples, drawn as its grids; returns `run`.

    To the decoded held-out latents, until `reference` of the evaluator names a file.
    """
    if not any(isinstance(e, GenerateConfig) for e in run.evals):
        raise UserError(f"{run.name}: nothing is sampled in this run; leave ,fid out")
    loss, grids = run.evals[:2]
    scores = SampleScoresConfig(
        scores=(Score.fid, Score.inception), n=10_000, held_out=10_000, batch=256, every=100_000,
        data=copy.deepcopy(loss.data), sampler=copy.deepcopy(grids.sampler),
        guidance=copy.deepcopy(grids.guidance),
    )  # fmt: skip
    run.evals.insert(2, scores)
    return run


def uvit(model: UViTConfig, name: str) -> RunConfig:
    """UViT: epsilon of the scaled-linear process."""
    optim = OptimConfig(
        lr=2e-4, weight_decay=0.03, beta1=0.99, beta2=0.99, warmup_steps=5000, groups=[]
    )
    return _run(DiffuseConfig(model=model), optim, name, DPMFastConfig(), guidance=1.5)


def usit(model: UViTConfig, name: str, guidance: float = 1.2) -> RunConfig:
    """USiT: the velocity of the linear path."""
    optim = OptimConfig(lr=1e-4, beta1=0.99, beta2=0.99, warmup_steps=5000, groups=[])
    process = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
    task = DiffuseConfig(model=model, process=process)
    return _run(task, optim, name, Dopri5Config(), guidance)


def dit(model: DiTConfig, name: str, guidance: float = 1.5) -> RunConfig:
    """DiT: epsilon and the variance of the linear betas."""
    process = ProcessConfig(kind=Kind.ddpm, learn_variance=True)
    optim = OptimConfig(lr=1e-4, schedule=Schedule.constant, groups=[])
    task = DiffuseConfig(model=model, process=process)
    run = _run(task, optim, name, AncestralConfig(), guidance)
    run.batch, run.steps = 256, 3_000_000
    return run


def sit(model: DiTConfig, name: str, guidance: float = 1.5) -> RunConfig:
    """SiT: DiT's recipe on the velocity of the linear path."""
    run = dit(model, name, guidance)
    run.task.process = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
    for evaluator in run.evals:
        if isinstance(evaluator, GenerateConfig):
            evaluator.sampler = Dopri5Config()
    return run


def _run(
    task: DiffuseConfig, optim: OptimConfig, name: str, sampler: SamplerConfig, guidance: float
) -> RunConfig:
    """What all have in common: data, EMA, evaluation."""
    return RunConfig(
        name=name, steps=STEPS, batch=1024, task=task, optim=optim,
        data=LatentDataConfig(path="latents", flip=False),
        ema=EmaConfig(decays=(0.9999,), warmup_steps=2000),
        checkpoint=CheckpointConfig(every=5000, keep=2, keep_every=100_000),
        report=ReportConfig(every=100),
        evals=[
            ValLossConfig(
                data=LatentDataConfig(split="validation", flip=False),
                n=10_000, batch=256, every=20_000,
            ),
            GenerateConfig(
                sampler=sampler, guidance=GuidanceConfig(scale=guidance), labels=SHOWN,
                batch=32, every=20_000,
            ),
        ],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ modern


def choose_modern(arg: str, sizes: Iterable[str]) -> tuple[str, str, bool]:
    """(size, latent, whether images are encoded online) of "xl,f32" or "xl,f32,online"."""
    base = arg.removesuffix(",online")
    return *choose(base, sizes, MODERN_LATENTS), base != arg


def modern_fields(latent: str) -> dict[str, Any]:
    """Fields that both networks take: the latent, RMS-normalised queries and keys, SwiGLU."""
    return {**MODERN_LATENTS[latent], "qk_norm": True, "mlp": MLPKind.swiglu}


def shift(model: DiTConfig | UViTConfig) -> float:
    """sqrt(latent dimension / 4096): the more numbers, the more noise hides as much of them.

    The dimension is h w c of the latent.  Source: RAE (arXiv 2510.11690), after SD3 (arXiv
    2403.03206).
    """
    return math.sqrt(math.prod(model.input_size) * model.in_channels / 4096)


def modern(model: DiTConfig | UViTConfig, name: str, latent: str, online: bool) -> RunConfig:
    """What later work favours: see the header of configs/modern_dit.py."""
    process = ProcessConfig(
        kind=Kind.flow, predict=Space.v, loss_space=Space.v, times=TimeDraw.logit_normal,
        shift=shift(model),
    )  # fmt: skip
    task = DiffuseConfig(model=model, process=process, latent_norm=LatentNorm.channel)
    optim = OptimConfig(lr=2e-4, beta1=0.9, beta2=0.95, warmup_steps=5000, clip_norm=1.0, groups=[])
    run = _run(task, optim, name, DPM2MConfig(steps=30), guidance=2.0)
    run.steps, run.data.flip = 400_000, True
    run.evals[1].guidance.start, run.evals[1].guidance.stop = 0.2, 0.75
    if online:
        _encode_online(run, latent)
    return run


def _encode_online(run: RunConfig, latent: str) -> None:
    """Images of ImageNet in place of a cache; a release says one factor, not one per channel."""
    source, (name, *_) = TfdsConfig(name="imagenet2012"), RELEASES[AUTOENCODERS[latent]].hub

    def data(split: str, flip: bool, workers: int) -> OnlineDataConfig:
        images = DataConfig(
            source=source, split=split, resolution=RESOLUTION, transform=Transform.center_crop,
            flip=flip, threads=16, workers=workers, cache_mb=0,
        )  # fmt: skip
        return OnlineDataConfig(images=images, autoencoder=name)

    run.task.latent_norm = LatentNorm.scalar
    run.data, run.evals[0].data = data("train", True, 8), data("validation", False, 0)
    run.evals[0].data.autoencoder = ""  # that of the run
