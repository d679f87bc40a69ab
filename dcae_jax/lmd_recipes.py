"""Recipes of masked autoencoders: LMD on cached latents, MAE on pixels.

The header of configs/lmd.py says what is stated by their authors and what is chosen here.
"""

from dcae_jax.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    Optimizer,
    ReportConfig,
    RunConfig,
    Schedule,
)
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import TfdsConfig
from dcae_jax.evals.masked import MaskedConfig
from dcae_jax.masking import MaskConfig, MaskKind
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.tasks.mask_latents import MaskLatentsConfig

IMAGES = 1_281_167  # of ImageNet's training split


def lmd(model: LMDConfig, name: str) -> RunConfig:
    """Masks that grow, on cached latents."""
    run = _run(name, batch=1024, epochs=400, warmup=1)
    run.task = MaskLatentsConfig(model=model)
    run.optim = OptimConfig(
        optimizer=Optimizer.adan, lr=3e-4 * run.batch / 256, beta1=0.98, beta2=0.92, beta3=0.90,
        weight_decay=0.05, clip_norm=10.0, schedule=Schedule.cosine,
        warmup_steps=run.optim.warmup_steps, end_lr=1e-8 / (3e-4 * run.batch / 256),
    )  # fmt: skip
    run.data = LatentDataConfig(path="latents")
    run.evals = [_scored(LatentDataConfig(split="validation", flip=False))]
    return run


def mae(model: LMDConfig, name: str) -> RunConfig:
    """Three quarters masked throughout, on pixels."""
    run = _run(name, batch=4096, epochs=800, warmup=40)
    run.task = MaskLatentsConfig(model=model, mask=MaskConfig(kind=MaskKind.constant, end=0.75))
    run.optim = OptimConfig(
        lr=1.5e-4 * run.batch / 256, beta1=0.9, beta2=0.95, weight_decay=0.05,
        schedule=Schedule.cosine, warmup_steps=run.optim.warmup_steps,
    )  # fmt: skip
    side = model.input_size[0]
    run.data = _images(side, "train", Transform.random_resized_crop, workers=8)
    run.evals = [_scored(_images(side, "validation", Transform.center_crop, workers=0))]
    return run


def _run(name: str, *, batch: int, epochs: int, warmup: int) -> RunConfig:
    """What both have in common; lengths in epochs."""
    epoch = IMAGES // batch
    return RunConfig(
        name=name, steps=epochs * epoch, batch=batch,
        optim=OptimConfig(warmup_steps=warmup * epoch), ema=EmaConfig(decays=()),
        checkpoint=CheckpointConfig(every=5000, keep=2, keep_every=100_000),
        report=ReportConfig(every=100),
    )  # fmt: skip


def _scored(data: LatentDataConfig | DataConfig) -> MaskedConfig:
    return MaskedConfig(data=data, n=10_000, batch=256, every=20_000)


def _images(side: int, split: str, transform: Transform, workers: int) -> DataConfig:
    return DataConfig(
        source=TfdsConfig(name="imagenet2012"), split=split, resolution=side, transform=transform,
        area=(0.2, 1.0), flip=split == "train", threads=16, workers=workers, cache_mb=0,
    )  # fmt: skip
