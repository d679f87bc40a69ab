"""Starting jax for a run: processes, compile cache, determinism, in the one order that works."""

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Sequence

import jax
from etils import epath

from dcae_jax import checkpoint, distributed, provenance
from dcae_jax import config as config_lib
from dcae_jax.config import JSONValue, RunConfig
from dcae_jax.errors import UserError

_SHARED = (
    "--workdir must be one folder that all hosts see: on a shared file system, or gs://; what a "
    "host holds alone must be copied there."
)
# What to do where the processes of a run differ, by the beginning of a fact's name.
MENDS = {
    "config": "Give every process the same command line and the same files.",
    "mode": "Give every process the same command line.",
    "arguments": "Give every process the same command line.",
    "version": "Install the same packages on all hosts (constraints-*.txt).",
    "source": "Copy the same dcae_jax to all hosts.",
    "start step": _SHARED,
    "sees": _SHARED,
    "devices": "A device is lost or held by another program on the host with fewer (nvidia-smi, "
    "or /dev/accel* and /dev/vfio), or the hosts are not of one kind.",
}


def start(
    cfg: RunConfig, workdir: str | None = None, mode: str = "", expect_devices: int | None = None
) -> None:
    """Joins the processes, then checks the config against the devices, then sets the cache.

    XLA reads its flags when the first backend starts, jax.distributed must come before it, and the
    cache directory is read at the first compile.
    """
    if cfg.deterministic:
        flags = os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true"
    distributed.initialize(lambda: _facts(cfg, mode, workdir), MENDS)
    _compare_devices(expect_devices)
    if jax.process_count() > 1:
        if workdir is not None and mode == "train":
            _compare_workdir(checkpoint.home(workdir))
        _say(cfg)
    config_lib.validate(cfg, jax.device_count())
    compile_cache(cfg.compile_cache)


def join(arguments: Sequence[str]) -> None:
    """Joins the processes of a command; all were given the same arguments."""
    distributed.initialize(
        lambda: {"arguments": list(arguments), **provenance.software()}, MENDS
    )  # fmt: skip


def _facts(cfg: RunConfig, mode: str, workdir: str | None) -> dict[str, JSONValue]:
    """What must be the same on all processes of a run, as far as it is known before they join."""
    return {
        "mode": mode,
        "start step": _start_step(workdir),
        **provenance.software(),
        **{f"config.{path}": value for path, value in config_lib.flatten(cfg).items()},
    }


def _start_step(workdir: str | None) -> int | None:
    """Step of the newest good checkpoint that this process sees; None without one."""
    if workdir is None:
        return None
    meta = checkpoint.newest_meta(checkpoint.home(workdir))
    return meta["step"] if meta else None


def _compare_devices(expected: int | None) -> None:
    """Each process has the same devices, and together they have as many as expected."""
    counts, names = Counter(d.process_index for d in jax.devices()), distributed.names()
    if expected is not None and jax.device_count() != expected:
        found = ", ".join(f"{counts[i]} on {names[i]}" for i in sorted(names))
        raise UserError(
            f"{jax.device_count()} device(s), but --expect_devices={expected}: {found}. "
            f"{MENDS['devices']}"
        )
    mine = jax.local_devices()
    distributed.compare({"devices": f"{len(mine)} x {mine[0].device_kind}"}, MENDS)


def _compare_workdir(workdir: epath.Path) -> None:
    """All processes see what the first one writes there, also where there is no checkpoint yet."""
    mark = workdir / f"meeting-{distributed.token()}"  # a name that no host has asked for before
    if distributed.is_main():
        provenance.make_folder(workdir)
        mark.write_text("the processes of a run compare their workdir; can be removed")
    distributed.compare({"marked": True}, {})
    try:
        distributed.compare({"sees the workdir of process 0": mark.exists()}, MENDS)
    finally:
        if distributed.is_main():
            mark.unlink(missing_ok=True)


def _say(cfg: RunConfig) -> None:
    """Each process in its own output: who it is and what it is about to run."""
    whole = json.dumps(config_lib.to_json(cfg), sort_keys=True)
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    print(
        f"process {jax.process_index()} of {jax.process_count()}: pid {os.getpid()} on "
        f"{socket.gethostname()}, {jax.local_device_count()} of {jax.device_count()} devices "
        f"({jax.devices()[0].device_kind}), config {digest}",
        flush=True,
    )


def compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` ("auto": below ~/.cache; "": nowhere).

    The environment variable JAX_COMPILATION_CACHE_DIR wins.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not folder:
        return
    path = epath.Path("~/.cache/dcae_jax/xla" if folder == "auto" else folder).expanduser()
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
