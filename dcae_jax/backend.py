"""Starting jax for a run: processes, compile cache, determinism, in the one order that works."""

import os

import jax
from etils import epath

from dcae_jax import config as config_lib
from dcae_jax import distributed
from dcae_jax.config import RunConfig


def start(cfg: RunConfig) -> None:
    """Joins the processes, then checks the config against the devices, then sets the cache.

    XLA reads its flags when the first backend starts, jax.distributed must come before it, and the
    cache directory is read at the first compile.
    """
    if cfg.deterministic:
        flags = os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true"
    distributed.initialize()
    config_lib.validate(cfg, jax.device_count())
    compile_cache(cfg.compile_cache)


def compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` ("auto": below ~/.cache; "": nowhere).

    The environment variable JAX_COMPILATION_CACHE_DIR wins.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not folder:
        return
    path = epath.Path("~/.cache/dcae_jax/xla" if folder == "auto" else folder).expanduser()
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
