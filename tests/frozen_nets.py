"""Weights files of frozen networks for tests: random, a narrow Inception."""

import atexit
import functools
import pathlib
import shutil
import tempfile

from dcae_jax import __main__


@functools.cache
def folder() -> pathlib.Path:
    """What `--nets`, or `nets` of an evaluator, takes; made once in a test process."""
    found = pathlib.Path(tempfile.mkdtemp(prefix="dcae_jax_nets_"))
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return write(found)


def write(folder: pathlib.Path) -> pathlib.Path:
    """The same in a folder that is there."""
    inception = ["inception", "--divisor", "16", "--out", str(folder / "inception.safetensors")]
    alex = ["lpips-alex", "--out", str(folder / "lpips_alex.safetensors")]
    for options in (inception, alex):
        assert __main__.main(["import-net", *options, "--random", "0"]) == 0
    return folder
