"""Test environment: CPU, eight fake devices, a compile cache, parsed absl flags, checked shapes."""

import os
import tempfile

# Before jax is imported anywhere: the platform and the number of fake devices are read once.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile more than they compute: half of the compiler's work is left out, unless asked for.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "dcae_jax_test_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jaxtyping
from absl import flags

flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags

# Shapes in signatures are checked while the tests run, and free in production.
_hook = jaxtyping.install_import_hook("dcae_jax", "typecheck.check")
_hook.__enter__()
