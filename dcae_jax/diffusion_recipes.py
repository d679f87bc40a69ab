"""Published recipes of latent diffusion on DC-AE, shared by the configs of UViT, USiT and DiT.

Source: the recipe files of the official repository (efficientvit), see each config's header.
"""

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
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.diffusion.samplers import (
    AncestralConfig,
    Dopri5Config,
    DPMFastConfig,
    SamplerConfig,
)
from dcae_jax.errors import UserError
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.models.dit import DiTConfig
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.tasks.diffuse import DiffuseConfig

# Latents of 512-px images, as fields of the networks.
LATENTS: dict[str, dict[str, Any]] = {
    "f32": {"in_channels": 32, "input_size": (16, 16), "patch": 1},
    "f64": {"in_channels": 128, "input_size": (8, 8), "patch": 1},
    "f8": {"in_channels": 4, "input_size": (64, 64), "patch": 2},  # SD-VAE, the baseline
}
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


def uvit(model: UViTConfig, name: str) -> RunConfig:
    """UViT: epsilon of the scaled-linear process."""
    optim = OptimConfig(
        lr=2e-4, weight_decay=0.03, beta1=0.99, beta2=0.99, warmup_steps=5000, groups=[]
    )
    return _run(DiffuseConfig(model=model), optim, name, DPMFastConfig(), guidance=1.5)


def usit(model: UViTConfig, name: str) -> RunConfig:
    """USiT: the velocity of the linear path."""
    optim = OptimConfig(lr=1e-4, beta1=0.99, beta2=0.99, warmup_steps=5000, groups=[])
    process = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
    return _run(DiffuseConfig(model=model, process=process), optim, name, Dopri5Config(), 1.2)


def dit(model: DiTConfig, name: str) -> RunConfig:
    """DiT: epsilon and the variance of the linear betas."""
    process = ProcessConfig(kind=Kind.ddpm, learn_variance=True)
    optim = OptimConfig(lr=1e-4, schedule=Schedule.constant, groups=[])
    run = _run(DiffuseConfig(model=model, process=process), optim, name, AncestralConfig(), 1.3)
    run.batch, run.steps = 256, 3_000_000
    return run


def sit(model: DiTConfig, name: str) -> RunConfig:
    """SiT: DiT's recipe on the velocity of the linear path."""
    run = dit(model, name)
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
