"""Whole runs on cached latents for tests: diffusion, lmd (masked latents), masking (diffusion too).

The cache, which `diffusing.cache` makes, is named by the environment variable TINY_CACHE.
"""

import os
import pathlib

import diffusing
import masking_runs
import masks

from dcae_jax.config import RunConfig

RUNS = {"diffusion": diffusing.make, "lmd": masks.make, "masking": masking_runs.make}


def get_config(arg: str = "diffusion") -> RunConfig:
    """The run of one kind of task."""
    diffusing.cache = lambda: pathlib.Path(os.environ["TINY_CACHE"])
    return RUNS[arg]()
