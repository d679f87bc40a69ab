"""Runs main.py or `-m dcae_jax` with `gs://` meaning the store of tests/fake_gcs.py.

python tests/store_main.py main.py --config=... --workdir=gs://bucket/run
python tests/store_main.py dcae_jax cache-latents --out gs://bucket/latents
"""

import os
import runpy
import sys

import fake_gcs

if __name__ == "__main__":
    fake_gcs.register()
    sys.path.insert(0, os.getcwd())
    program, sys.argv = sys.argv[1], sys.argv[1:]
    if program == "main.py":
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")
