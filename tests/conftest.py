"""Test environment: CPU, eight fake devices, a compile cache, parsed absl flags, checked shapes."""

import os
import tempfile

# Before jax is imported anywhere: the platform and the flags of XLA are read once.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
# Programs of tests are compiled for seconds and run for milliseconds: a third of the time to
# compile, and the same tolerances hold.  `make test-all` compiles as training does.
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "dcae_jax_test_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jaxtyping
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags

# Shapes in signatures are checked while the tests run, and free in production.
_hook = jaxtyping.install_import_hook("dcae_jax", "typecheck.check")
_hook.__enter__()

FIRST = ("multiprocess", "promises")  # folders of long files: begun late they would end alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files in the order in which the workers take them."""
    items.sort(key=lambda item: next((i for i, n in enumerate(FIRST) if n in item.path.parts), 9))
