"""`python -m dcae_jax` itself, as a process."""

import os
import pathlib
import subprocess
import sys

import pytest

import dcae_jax

ROOT = pathlib.Path(dcae_jax.__file__).parent.parent


@pytest.mark.parametrize(("argv", "codes"), [(["--help"], {141}), (["encode", "--help"], {0, 141})])
def test_a_reader_that_has_gone_is_no_traceback(argv, codes) -> None:
    """As with `| head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "dcae_jax", *argv], cwd=ROOT, stdout=writing,
        stderr=subprocess.PIPE, timeout=60,
    )  # fmt: skip
    os.close(writing)
    # argparse itself passes over what it cannot write, when more than a buffer was to be written.
    assert done.returncode in codes and done.stderr == b""
