"""Tiny runs of masked autoencoders for tests: on latents of tests/diffusing.py, or its images."""

import functools
import pathlib

import diffusing
import runs

from dcae_jax import config, train
from dcae_jax.config import CheckpointConfig, EmaConfig, OptimConfig, ReportConfig, RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.evals.accuracy import AccuracyConfig
from dcae_jax.evals.masked import MaskedConfig
from dcae_jax.masking import MaskConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.tasks.latents import LatentNorm
from dcae_jax.tasks.mask_latents import MaskLatentsConfig
from dcae_jax.tasks.probe import ProbeConfig

SWITCH = 3  # the first of the 8 steps whose program is the second one


def model(**fields) -> LMDConfig:
    """16 tokens, 4 x 4 of 4 channels."""
    size = {"in_channels": 4, "input_size": (4, 4), "patch": 1, "width": 16, **fields}
    return LMDConfig(
        depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2,
        dtype=Dtype.float32, **size,
    )  # fmt: skip


def make(cached: bool = True, **changes) -> RunConfig:
    """12 of 16 tokens visible, then 6; changes like steps=5 or **{"optim.lr": 1e-3}.

    `cached`: on the cache, which is made; or on one that is not there.
    """
    path = str(diffusing.cache()) if cached else "not read"
    cfg = RunConfig(
        name="tiny LMD", steps=8, batch=8,
        task=MaskLatentsConfig(
            model=model(), mask=MaskConfig(buckets=(12, 6)), norm_target=False,
            latent_norm=LatentNorm.channel,
        ),
        data=LatentDataConfig(path=path, threads=1),
        optim=OptimConfig(lr=1e-2), ema=EmaConfig(decays=(0.9,), warmup_steps=0),
        checkpoint=CheckpointConfig(every=4, keep=3),
        report=ReportConfig(every=1, tensorboard=False),
        evals=[
            MaskedConfig(
                data=LatentDataConfig(split="test", threads=1), ratios=(0.75,), n=10, batch=4,
                every=4,
            )
        ],
    )  # fmt: skip
    return changed(cfg, **changes)


def probe(cached: bool = True, **changes) -> RunConfig:
    """A linear probe on the same latents, of two classes; `task.mode` makes it fine-tuning."""
    path = str(diffusing.cache()) if cached else "not read"
    cfg = RunConfig(
        name="tiny probe", steps=4, batch=8, init_from="somewhere",
        task=ProbeConfig(model=model(), classes=2, latent_norm=LatentNorm.channel),
        data=LatentDataConfig(path=path, threads=1),
        optim=OptimConfig(lr=1e-2, weight_decay=0.1), ema=EmaConfig(decays=(0.9,), warmup_steps=0),
        checkpoint=CheckpointConfig(every=4, keep=3),
        report=ReportConfig(every=1, tensorboard=False),
        evals=[
            AccuracyConfig(data=LatentDataConfig(split="test", threads=1), n=10, batch=4, every=4)
        ],
    )  # fmt: skip
    return changed(cfg, **changes)


def pixels(**changes) -> RunConfig:
    """The same on images of 16 px, in patches of 4."""
    cfg = make(cached=False)
    cfg.task.model = model(in_channels=3, input_size=(16, 16), patch=4)
    cfg.data = images("train")
    cfg.evals[0].data, cfg.evals[0].name = images("test"), ""
    return changed(cfg, **changes)


def images(split: str) -> DataConfig:
    """Those that the cache was made of."""
    return diffusing.online(split, workdir=pathlib.Path("not read")).images


def changed(cfg: RunConfig, **changes) -> RunConfig:
    """The config with these fields, valid."""
    runs.change(cfg, changes)
    config.validate(config.resolve(cfg), 1)
    return cfg


@functools.cache
def whole() -> tuple[pathlib.Path, list[str]]:
    """An uninterrupted run, and the functions that were traced for it, as often as they were."""
    make()
    with diffusing.traced() as names:
        assert diffusing.run(make(), diffusing.root() / "masks") == train.DONE
    return diffusing.root() / "masks", names
