#!/usr/bin/env python3
"""Runs a sweep: python launch/sweep.py --config=FILE:ARG --sweep=NAMES --slots=N --out=DIR

See --help, and dcae_jax/sweeps/, where all of it is.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of launch/, whose files are no modules

from dcae_jax.sweeps import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:], str(ROOT)))
