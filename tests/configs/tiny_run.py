"""Whole runs for tests, seconds long: phase1, gan (phase 3), phase2, each with every kind of event.

Evaluation in between, checkpoints and log lines at different steps; images come from the folder in
the environment variable TINY_IMAGES (`runs.make_images` fills one).
"""

import os

import tiny

from dcae_jax.config import CheckpointConfig, ReportConfig, RunConfig
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import FolderConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.reconstruct import ReconstructConfig
from dcae_jax.tasks.autoencode import Phase

PHASES = {
    "phase1": Phase.low_res_full, "phase2": Phase.high_res_latent, "gan": Phase.low_res_local,
}  # fmt: skip


def get_config(arg: str = "phase1") -> RunConfig:
    """The run of one phase; phases 2 and 3 need --config.init_from."""
    if arg not in PHASES:
        raise UserError(f"unknown phase {arg!r}; there are {', '.join(PHASES)}")
    cfg = tiny.run(PHASES[arg], batch=8, steps=12)
    cfg.data = images("train")
    cfg.init_from = None
    cfg.evals = [
        ReconstructConfig(
            data=images("test"), n=6, batch=2, every=5, pictures=2, training_pictures=1
        )
    ]
    cfg.checkpoint = CheckpointConfig(every=4, keep=3)
    cfg.report = ReportConfig(every=3, tensorboard=False)
    return cfg


def images(split: str) -> DataConfig:
    """Random crops of the folder's images."""
    return DataConfig(
        source=FolderConfig(path=os.environ["TINY_IMAGES"]), split=split, resolution=32,
        transform=Transform.random_crop, threads=1, cache_mb=8,
    )  # fmt: skip
