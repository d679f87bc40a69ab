"""Weights of the frozen networks for tests: random, Inception with a sixteenth of its channels."""

import atexit
import functools
import pathlib
import shutil
import tempfile

from dcae_jax.cli import import_net


@functools.cache
def folder() -> pathlib.Path:
    """A folder of their files, as `evals[i].nets` takes it; once in a test process."""
    found = pathlib.Path(tempfile.mkdtemp(prefix="dcae_jax_nets_"))
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    for name, more in (("inception", ("--divisor", "16")), ("lpips-alex", ())):
        out = found / f"{name.replace('-', '_')}.safetensors"
        assert import_net.main([name, "--random", "0", *more, "--out", str(out)]) == 0
    return found
