"""Weights files of frozen networks for tests: random, a narrow Inception."""

import pathlib

from dcae_jax import __main__


def write(folder: pathlib.Path) -> pathlib.Path:
    """What `--nets` takes."""
    inception = ["inception", "--divisor", "16", "--out", str(folder / "inception.safetensors")]
    alex = ["lpips-alex", "--out", str(folder / "lpips_alex.safetensors")]
    for options in (inception, alex):
        assert __main__.main(["import-net", *options, "--random", "0"]) == 0
    return folder
