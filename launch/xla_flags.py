"""The one place of XLA's, libtpu's and NCCL's settings, for each platform.

    python launch/xla_flags.py gpu    # prints them

An unknown flag ends the process, so only those stand here that exist in the versions that this
repository pins: a test tries XLA_FLAGS against the installed jaxlib; the names of libtpu's flags
were looked up in libtpu 0.0.42.1, which jax 0.10.2 asks for.  What the environment holds already
wins: its XLA_FLAGS and LIBTPU_INIT_ARGS are put behind ours, its NCCL_DEBUG is left as it is; from
here to a TPU VM or a pod of GKE they are passed on.  JAX_PLATFORMS is the launcher's to say.
"""

import os
import sys
from collections.abc import Mapping

PLATFORMS = ("cpu", "gpu", "tpu")

GPU_XLA = (
    # Collectives of gradients overlap with the backward pass; NVIDIA's JAX image sets it too.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # Gradients of many small layers in few large messages: between nodes latency counts.
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=67108864",
)
TPU_LIBTPU = (
    # Parameters of fsdp are gathered while the layer before computes.
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
OF_THE_USER = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NCCL_DEBUG")
TPU_SLICES = (
    # Between slices: the all-reduce of gradients beside the backward pass.
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)


def environment(
    platform: str,
    *,
    devices_per_process: int = 1,
    nodes: int = 1,
    slices: int = 1,
    given: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Variables that a process of this platform starts with; `given`: those set already."""
    given = os.environ if given is None else given
    if platform == "cpu":
        count = f"--xla_force_host_platform_device_count={devices_per_process}"
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": _behind("XLA_FLAGS", (count,), given)}
    if platform == "gpu":
        found = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": _behind("XLA_FLAGS", GPU_XLA, given)}
        return found | (_nccl(given) if nodes > 1 else {})
    flags = (*TPU_LIBTPU, *(TPU_SLICES if slices > 1 else ()))
    return {
        "JAX_PLATFORMS": "tpu,cpu",
        "LIBTPU_INIT_ARGS": _behind("LIBTPU_INIT_ARGS", flags, given),
    }


def passed_on(platform: str, *, nodes: int = 1, slices: int = 1) -> dict[str, str]:
    """Variables for a process on another machine, those that the user has set here among them."""
    given = {name: os.environ[name] for name in OF_THE_USER if os.environ.get(name)}
    return given | environment(platform, nodes=nodes, slices=slices, given=given)


def _behind(name: str, ours: tuple[str, ...], given: Mapping[str, str]) -> str:
    """Our flags, then those of the user, which win: the last of two counts."""
    return " ".join([*ours, *([given[name]] if given.get(name) else [])])


def _nccl(given: Mapping[str, str]) -> dict[str, str]:
    """NCCL between nodes: a broken network is told (WARN), not silent."""
    return {} if "NCCL_DEBUG" in given else {"NCCL_DEBUG": "WARN"}


if __name__ == "__main__":
    for name in sys.argv[1:] or PLATFORMS:
        if name not in PLATFORMS:
            sys.exit(f"error: unknown platform {name!r}; there are {', '.join(PLATFORMS)}")
        for key, value in environment(name, nodes=2, slices=2, given={}).items():
            print(f"{name}: {key}={value}")
