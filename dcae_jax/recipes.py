"""The three phases of a full-size DC-AE, shared by the configs of f32c32, f64c128 and f128c512.

Stated by the paper or its authors:
L1 + LPIPS in all phases, PatchGAN in phase 3 only, AdamW; phase 1 lr 6.4e-5, weight decay 0.1;
phase 2 lr 1.6e-5, weight decay 0.001; phase 3 lr 5.4e-5, betas (0.5, 0.9).
Not stated anywhere, so chosen here, each a config field: resolutions 256 / 1024 / 256, batch sizes,
steps, warm-up, LPIPS weight 0.25 (a third-party reproduction), the exact layers of phases 2 and 3,
adversarial weight 0.5 with adaptive scaling, hinge loss, the discriminator, EMA.
"""

import copy

from dcae_jax.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    ReportConfig,
    RunConfig,
)
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import FolderConfig, MixtureConfig, PhotosConfig, TfdsConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.reconstruct import ReconstructConfig
from dcae_jax.models.base import AutoencoderConfig
from dcae_jax.models.dcae import DCAEConfig, Remat, from_scratch
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.online import OnlineDataConfig
from dcae_jax.tasks.autoencode import (
    AdversarialConfig,
    AutoencodeConfig,
    Bottleneck,
    LossConfig,
    Phase,
)

LOW, HIGH = 256, 1024
AnySource = PhotosConfig | FolderConfig | TfdsConfig | MixtureConfig


def choose(arg: str, phases: tuple[str, ...] = ("phase1", "phase2", "phase3")) -> int:
    """The number of the phase named by a config's argument; UserError names those there are."""
    if arg not in phases:
        raise UserError(f"unknown phase {arg!r}; this config has {', '.join(phases)}")
    return phases.index(arg) + 1


def dcae_phase(arg: str, model: DCAEConfig, name: str) -> RunConfig:
    """The run of one phase ("phase1" .. "phase3") of `model` on ImageNet."""
    number = choose(arg)
    cfg = [_low_res_full, _high_res_latent, _low_res_local][number - 1](from_scratch(model))
    cfg.name = f"{name} {arg}"
    return cfg


def released(
    model: DCAEConfig | KLVAEConfig, arg: str = "phase1", name: str = "released"
) -> RunConfig:
    """The run of one phase ("phase1" .. "phase3") that continues given weights of `model`.

    The network stays as it is, its BatchNorms with frozen statistics; set `init_from`.
    """
    number = choose(arg)
    cfg = [_low_res_full, _high_res_latent, _low_res_local][number - 1](DCAEConfig())
    use_model(cfg, copy.deepcopy(model))
    for evaluator, resolution in zip(cfg.evals, (LOW, 512), strict=True):
        evaluator.data.resolution = resolution
    cfg.name = f"{name} {arg}"
    return cfg


def use_source(
    cfg: RunConfig, source: AnySource, train: str = "train", test: str = "test"
) -> RunConfig:
    """The run on other data: training and every evaluation read `source`; returns `cfg`.

    All hold the same object, so one flag (--config.data.source.path=...) changes it everywhere.
    """
    _images(cfg.data).source, _images(cfg.data).split = source, train
    for evaluator in cfg.evals:
        if hasattr(evaluator, "data"):  # a grid of samples reads nothing
            images = _images(evaluator.data)
            images.source, images.split = source, test
    return cfg


def _images(data: DataConfig | OnlineDataConfig) -> DataConfig:
    """The images that are read; those that are encoded in the step as well."""
    return data.images if isinstance(data, OnlineDataConfig) else data


def use_model(cfg: RunConfig, model: DCAEConfig | KLVAEConfig) -> RunConfig:
    """The run with another autoencoder, rematerialised as the one before; returns `cfg`.

    What trains in its phase follows, and the bottleneck: a KL autoencoder is trained on samples,
    with LDM's weight of the KL loss.
    """
    task = cfg.task
    model.remat, task.model = task.model.remat, model
    parts = {Phase.high_res_latent: middle(model), Phase.low_res_local: head(model)}
    if task.phase in parts:
        task.trainable = parts[task.phase]
    if model.gaussian():
        task.bottleneck, task.losses.kl = Bottleneck.kl, ldm_kl(model)
    return cfg


def structured(cfg: RunConfig, counts: tuple[int, ...]) -> RunConfig:
    """The run with the structured latents of DC-AE 1.5, and their PSNRs; returns `cfg`."""
    cfg.task.channel_counts = counts
    for evaluator in cfg.evals:
        evaluator.channel_counts = counts
    cfg.name += " structured"
    return cfg


def ldm_kl(model: AutoencoderConfig, weight: float = 1e-6) -> float:
    """LDM's `weight` (arXiv 2112.10752) as `LossConfig.kl`.

    There both losses are sums over an image, here means over pixels and over latent elements: the
    weight is multiplied by latent elements per image element, c / (3 f^2).
    """
    return weight * model.latent_channels / (model.in_channels * model.factor**2)


def middle(model: AutoencoderConfig) -> str:
    """Phase 2: the modules on both sides of the latent."""
    return rf"ae/{model.latent_layers()}/.*"


def head(model: AutoencoderConfig) -> str:
    """Phase 3: the decoder's modules of the highest resolution."""
    return rf"ae/{model.head_layers()}/.*"


def _low_res_full(model: DCAEConfig) -> RunConfig:
    cfg = _common(model, LOW, Phase.low_res_full)
    cfg.steps, cfg.batch = 400_000, 128
    cfg.optim = OptimConfig(
        lr=6.4e-5, weight_decay=0.1, warmup_steps=5000, warmup_from=0.1, clip_norm=1.0
    )
    return cfg


def _high_res_latent(model: DCAEConfig) -> RunConfig:
    cfg = _common(model, HIGH, Phase.high_res_latent)
    cfg.steps, cfg.batch = 40_000, 32
    cfg.data.min_size = 768  # enlarging small images would teach blur
    cfg.task.trainable = middle(model)
    cfg.task.model.remat = Remat.stage
    cfg.optim = OptimConfig(lr=1.6e-5, weight_decay=0.001, warmup_steps=1000, clip_norm=1.0)
    return cfg


def _low_res_local(model: DCAEConfig) -> RunConfig:
    cfg = _common(model, LOW, Phase.low_res_local)
    cfg.steps, cfg.batch = 100_000, 128
    cfg.task.trainable = head(model)
    cfg.optim = OptimConfig(lr=5.4e-5, beta1=0.5, beta2=0.9, warmup_steps=1000, clip_norm=1.0)
    cfg.task.adversarial = AdversarialConfig(
        weight=0.5, start_step=2000, warmup_steps=2000, lecam=0.001,
        optim=OptimConfig(lr=5.4e-5, beta1=0.5, beta2=0.9, warmup_steps=1000, clip_norm=1.0),
    )  # fmt: skip
    return cfg


def _common(model: DCAEConfig, resolution: int, phase: Phase) -> RunConfig:
    run = RunConfig(
        task=AutoencodeConfig(phase=phase, model=model, losses=LossConfig(l1=1.0, lpips=0.25)),
        data=_imagenet(resolution, "train"),
        ema=EmaConfig(decays=(0.9999,), warmup_steps=2000),
        checkpoint=CheckpointConfig(every=2000, keep=3, keep_every=50_000),
        report=ReportConfig(every=100),
        evals=[
            ReconstructConfig(data=_imagenet(size, "validation"), n=n, batch=64, every=20_000)
            for size, n in ((LOW, 2048), (HIGH, 256))
        ],
    )
    return use_source(run, TfdsConfig(name="imagenet2012"), test="validation")


def _imagenet(resolution: int, split: str) -> DataConfig:
    training = split == "train"
    return DataConfig(
        split=split, resolution=resolution,
        transform=Transform.random_resized_crop if training else Transform.center_crop,
        area=(0.5, 1.0), flip=training, threads=16, workers=8 if training else 0, cache_mb=0,
    )  # fmt: skip
