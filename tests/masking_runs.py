"""Tiny masking-diffusion runs: reconstruct, join, unmask; or from the weights of a UViT."""

import functools
import pathlib

import diffusing
import runs

from dcae_jax import config, train
from dcae_jax.config import RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.evals.masked import MaskedConfig
from dcae_jax.masking import MaskConfig, MaskKind, Rounding
from dcae_jax.models.md_uvit import MDUViTConfig
from dcae_jax.tasks.mask_diffuse import MaskDiffuseConfig, StageConfig

STEPS = 9


def at(ratio: float) -> MaskConfig:
    """A mask that hides the same share throughout."""
    return MaskConfig(kind=MaskKind.constant, end=ratio, rounding=Rounding.exact)


def stages() -> list[StageConfig]:
    """Of 9 steps: 3 reconstruct, 3 do both, 3 are unmasked, the last of them a rehearsal."""
    return [
        StageConfig(until=1 / 3, clean=1.0, diffusion=0.0, reconstruction=1.0, mask=at(0.5)),
        StageConfig(until=2 / 3, clean=0.4, reconstruction=0.1, mask=at(0.75)),
        StageConfig(rehearse_every=3, rehearse_ratio=0.5),
    ]


def make(**changes) -> RunConfig:
    """The UViT of tests/diffusing.py with two masked programs and a whole one."""
    cfg = diffusing.make()
    plain = cfg.task.model
    model = MDUViTConfig(
        in_channels=plain.in_channels, input_size=plain.input_size, num_classes=plain.num_classes,
        width=plain.width, depth=plain.depth, heads=plain.heads, dtype=plain.dtype, k_out=1,
    )  # fmt: skip
    cfg.task = MaskDiffuseConfig(
        model=model, process=cfg.task.process, latent_norm=cfg.task.latent_norm, stages=stages()
    )
    cfg.name, cfg.steps, cfg.evals = "tiny masking", STEPS, []
    runs.change(cfg, changes)
    config.validate(config.resolve(cfg), 1)
    return cfg


def judged() -> RunConfig:
    """From the weights of the run of tests/diffusing.py, evaluated before its first step."""
    test = LatentDataConfig(split="test", threads=1)
    evals = diffusing.make().evals
    evals[1].at_start = True
    evals.append(MaskedConfig(data=test, ratios=(0.5,), n=10, batch=4, every=0))
    return make(init_from=str(diffusing.whole()[0]), evals=evals)


@functools.cache
def whole() -> tuple[pathlib.Path, list[str]]:
    """An uninterrupted run, and the functions that were traced for it, as often as they were."""
    cfg = make()
    with diffusing.traced() as names:
        assert diffusing.run(cfg, diffusing.root() / "masking") == train.DONE
    return diffusing.root() / "masking", names
