"""A small f32 DC-AE through the three phases, on the built-in photographs.

Command:   make train      (or launch/three_phases.sh configs/demo.py runs/demo)
           python main.py --config=configs/demo.py:phase1 --workdir=runs/demo/phase1
Hardware:  2 CPU cores, no accelerator
Cost:      9 minutes 13 seconds for the three phases on 2 free cores, cold compile cache
Expected:  held-out pooled PSNR 1.9 dB above bicubic 32x down/up after each phase
Metric:    PSNR and SSIM on held-out strips of the photographs, at 128 and 256 px

Regions of the same photographs prove the plumbing, not generalisation.

Stated by the paper: what a phase trains (the exact layers are not), L1, the PatchGAN, AdamW.
Chosen here: all else.  LPIPS is off, since its weights need a network: see `import-net lpips-vgg`.
"""

from collections.abc import Iterator
from typing import Any

from dcae_jax import recipes
from dcae_jax.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    ReportConfig,
    RunConfig,
    Schedule,
)
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import PhotosConfig
from dcae_jax.evals.reconstruct import ReconstructConfig
from dcae_jax.models import dcae
from dcae_jax.models.discriminator import PatchGANConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.tasks.autoencode import AdversarialConfig, AutoencodeConfig, LossConfig, Phase

LOW, HIGH = 128, 256


def get_config(arg: str = "phase1") -> RunConfig:
    """The run of one phase: phase1, phase2 or phase3."""
    return [phase1, phase2, phase3][recipes.choose(arg) - 1]()


def sweep_lr() -> Iterator[dict[str, float]]:
    """Learning rates around that of phase 1."""
    yield from ({"optim.lr": lr} for lr in (5e-4, 2e-3, 8e-3))


def sweep_seed() -> Iterator[dict[str, int]]:
    """Two runs of everything: what differs between them is chance."""
    yield from ({"seed": seed} for seed in (0, 1))


def search(trial: Any) -> dict[str, float]:
    """For `launch/sweep.py --search`: learning rate and weight decay, by Optuna."""
    return {
        "optim.lr": trial.suggest_float("lr", 2e-4, 2e-2, log=True),
        "optim.weight_decay": trial.suggest_float("weight_decay", 0.0, 0.1),
    }


def phase1() -> RunConfig:
    """Low-resolution full training: everything trains, no GAN."""
    cfg = common(LOW)
    cfg.name, cfg.steps = "demo phase 1", 800
    cfg.task.phase = Phase.low_res_full
    for closed_form in cfg.evals:
        closed_form.baselines = True  # once: they do not depend on the phase
    cfg.optim = OptimConfig(
        lr=2e-3, weight_decay=0.01, warmup_steps=50, schedule=Schedule.cosine, end_lr=0.05,
        clip_norm=1.0,
    )  # fmt: skip
    return cfg


def phase2() -> RunConfig:
    """High-resolution latent adaptation: the encoder's head and the decoder's input layers."""
    cfg = common(HIGH)
    cfg.name, cfg.steps, cfg.batch = "demo phase 2", 120, 4
    cfg.task.phase = Phase.high_res_latent
    cfg.task.trainable = recipes.middle(cfg.task.model)
    cfg.optim = OptimConfig(
        lr=3e-4, weight_decay=0.001, warmup_steps=10, schedule=Schedule.cosine, end_lr=0.1,
        clip_norm=1.0,
    )  # fmt: skip
    return cfg


def phase3() -> RunConfig:
    """Low-resolution local refinement: the decoder's head layers, with a PatchGAN."""
    cfg = common(LOW)
    cfg.name, cfg.steps = "demo phase 3", 200
    cfg.task.phase = Phase.low_res_local
    cfg.task.trainable = recipes.head(cfg.task.model)
    cfg.optim = OptimConfig(lr=1e-4, beta1=0.5, beta2=0.9, warmup_steps=10, clip_norm=1.0)
    cfg.task.adversarial = AdversarialConfig(
        weight=0.1, start_step=50, warmup_steps=50,
        discriminator=PatchGANConfig(width=16, layers=3, dtype=Dtype.float32),
        optim=OptimConfig(lr=4e-4, beta1=0.5, beta2=0.9, warmup_steps=10, clip_norm=1.0),
    )  # fmt: skip
    return cfg


def common(resolution: int) -> RunConfig:
    """What the phases share; `resolution` is that of the training crops."""
    return RunConfig(
        batch=8,
        task=AutoencodeConfig(model=model(), losses=LossConfig(l1=1.0)),
        data=photos(resolution, "train"),
        ema=EmaConfig(decays=(0.99,), warmup_steps=50),
        checkpoint=CheckpointConfig(every=200, keep=2),
        report=ReportConfig(every=20),
        evals=[evaluator(LOW), evaluator(HIGH)],
    )


def model() -> dcae.DCAEConfig:
    """dc-ae-f32c32 with an eighth of its widths and about a fifth of its depth."""
    cfg = dcae.narrow(
        dcae.from_scratch(dcae.dc_ae_f32c32_in()), widths=(16, 32, 64, 64, 128, 128),
        encoder_depths=(0, 1, 2, 1, 1, 1), decoder_depths=(0, 1, 2, 1, 1, 1),
    )  # fmt: skip
    cfg.dtype = Dtype.float32
    return cfg


def photos(resolution: int, split: str) -> DataConfig:
    """Crops of the photographs; high resolution only from those of 512 px and more."""
    return DataConfig(
        source=PhotosConfig(min_photo_side=512 if resolution >= HIGH else 0), split=split,
        resolution=resolution, transform=Transform.random_crop, flip=True, threads=2,
    )  # fmt: skip


def evaluator(resolution: int) -> ReconstructConfig:
    """Held-out crops at one resolution, beside closed-form baselines."""
    return ReconstructConfig(
        data=photos(resolution, "test"), n=64 if resolution == LOW else 32, batch=8,
        every=400 if resolution == LOW else 0,
    )  # fmt: skip
