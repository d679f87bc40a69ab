"""Of `doctor`: processes, devices and their memory, and three probes that are timed and checked."""

import glob
import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dcae_jax import distributed
from dcae_jax.cli._doctor_base import GIB, Finding, failed, warning
from dcae_jax.models import layers
from dcae_jax.report import flops

_SECONDS = 0.3  # each probe is repeated for so long
_HEAD = 32
_SLOW = 0.1  # of the data sheet; a convolution of this size reaches several times that
_BROKEN = "do not use this device: take its host out of the job, and have it tested"


def processes() -> list[Finding]:
    """Who this is, among how many."""
    return [Finding(
        "processes", f"process {jax.process_index()} of {jax.process_count()}, pid {os.getpid()} "
        f"on {socket.gethostname()}, with {jax.local_device_count()} device(s)",
    )]  # fmt: skip


def devices(expected: int | None) -> list[Finding]:
    """Kind, number and memory; another number than expected names what each process has."""
    every = jax.devices()
    kind = every[0].device_kind
    value = f"{len(every)} x {kind} ({every[0].platform}), memory {_memory(jax.local_devices()[0])}"
    found = [Finding("devices", value)]
    if expected is not None and expected != len(every):
        counts = {p: sum(d.process_index == p for d in every) for p in range(jax.process_count())}
        each = ", ".join(f"process {p}: {n}" for p, n in counts.items())
        mend = (
            f"--expect-devices {expected}: look at CUDA_VISIBLE_DEVICES, at nvidia-smi, or whether "
            "every host of the job started"
        )
        found = [failed("devices", f"{value}; {expected} were expected ({each})", mend)]
    return found + _left_out(every[0].platform)


def _memory(device: jax.Device) -> str:
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return "that of the host" if device.platform == "cpu" else "n/a"
    used = stats["bytes_in_use"] if "bytes_in_use" in stats else 0
    return f"{stats['bytes_limit'] / GIB:.1f} GiB each, {used / GIB:.1f} in use"


def _left_out(platform: str) -> list[Finding]:
    """An accelerator that jax does not use though nobody forbade it."""
    if platform != "cpu" or jax.config.jax_platforms:
        return []
    for pattern, name, package in (
        ("/dev/nvidia[0-9]*", "an NVIDIA GPU", "jax[cuda13]"), ("/dev/accel*", "a TPU", "jax[tpu]"),
    ):  # fmt: skip
        if glob.glob(pattern):
            mend = f"pip install '{package}=={jax.__version__}' (JAX_PLATFORMS=cpu: use the CPU)"
            return [failed("accelerator", f"this machine has {name}, jax uses the CPU", mend)]
    return []


# ----------------------------------------------------------------------------------------- probes


class Probe(NamedTuple):
    """Something that every device computes for itself, with the truth about it."""

    name: str
    run: Callable[..., Array]
    inputs: tuple[np.ndarray, ...]
    error: Callable[[np.ndarray], float]  # of the output, relative to its largest number
    tolerance: float


def convolve(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "..."]:
    """A 3x3 convolution, as in a ResBlock."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def attend(qkv: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """Linear attention, as in an EfficientViT block."""
    return layers.relu_attention(qkv, _HEAD)


def _rounding(dtype: Any) -> float:
    """Twice the rounding of one number."""
    return float(jnp.finfo(dtype).eps)


def convolution_probe(dtype: Any, batch: int, side: int, channels: int) -> Probe:
    """Numbers -1, 0, 1: their products and sums are exact in every precision but for the output's.

    So TF32, bfloat16 and float32 units must agree with numpy to one rounding.
    """
    gen = np.random.default_rng(0)
    x = gen.integers(-1, 2, (batch, side, side, channels)).astype(dtype)
    kernel = gen.integers(-1, 2, (3, 3, channels, channels)).astype(dtype)
    where = [gen.integers(1, side - 1, 64), gen.integers(1, side - 1, 64)]
    image = gen.integers(0, batch, 64)
    truth = np.stack([
        np.einsum("hwc,hwcd->d", x[n, i - 1 : i + 2, j - 1 : j + 2].astype(np.float32),
                  kernel.astype(np.float32))
        for n, i, j in zip(image, *where, strict=True)
    ])  # fmt: skip

    def error(y: np.ndarray) -> float:
        return _worst(y[image, where[0], where[1]], truth)

    return Probe("convolution", convolve, (x, kernel), error, _rounding(dtype))


def attention_probe(dtype: Any, batch: int, side: int, heads: int) -> Probe:
    """Compared in float64 for one head of the first image and one of the last."""
    gen = np.random.default_rng(1)
    qkv = gen.standard_normal((batch, side, side, heads * 3 * _HEAD), np.float32).astype(dtype)

    def error(y: np.ndarray) -> float:
        return max(_worst(*_one_head(qkv, y, n, head)) for n, head in ((0, 0), (-1, heads - 1)))

    # The sums over all pixels are in float32: 1e-4 is far above their rounding.
    return Probe("linear attention", attend, (qkv,), error, max(1e-4, _rounding(dtype)))


def _one_head(
    qkv: np.ndarray, y: np.ndarray, image: int, head: int
) -> tuple[np.ndarray, np.ndarray]:
    """(what a device says, the truth) of one head of one image, [pixels, head_dim]."""
    rows = qkv[image].reshape(-1, qkv.shape[-1] // (3 * _HEAD), 3, _HEAD)[:, head]
    q, k, v = np.moveaxis(rows.astype(np.float64), 1, 0)
    q, k = q.clip(0), k.clip(0)
    truth = q @ (k.T @ v) / (q @ k.sum(0) + layers.ATTENTION_EPS)[:, None]
    return y[image].reshape(len(truth), -1, _HEAD)[:, head], truth


def _worst(given: np.ndarray, truth: np.ndarray) -> float:
    """Largest difference relative to the largest number; infinite for what is not finite."""
    difference = np.abs(given.astype(np.float64) - truth).max() / np.abs(truth).max()
    return float(difference) if np.isfinite(difference) else math.inf


def probes() -> list[Probe]:
    """Sizes for milliseconds: bfloat16 on accelerators, float32 on CPUs."""
    if jax.default_backend() == "cpu":
        return [
            convolution_probe(np.float32, 1, 32, 64), attention_probe(np.float32, 1, 32, 8)
        ]  # fmt: skip
    return [
        convolution_probe(jnp.bfloat16, 32, 64, 512), attention_probe(jnp.bfloat16, 16, 64, 32)
    ]  # fmt: skip


def compute(probe: Probe) -> list[Finding]:
    """Runs a probe on every device of this process at once; each one's numbers are checked."""
    local = jax.local_devices()
    everywhere = NamedSharding(Mesh(np.array(local), ("device",)), PartitionSpec())
    inputs = jax.device_put(probe.inputs, everywhere)
    fn = jax.jit(probe.run, out_shardings=everywhere)
    out, seconds = _timed(fn, inputs)
    found = []
    for shard in out.addressable_shards:
        wrong = probe.error(np.asarray(shard.data))
        if wrong > probe.tolerance:
            value = f"{shard.device} computes wrong numbers: off by {wrong:.2g} of the largest"
            found.append(failed(probe.name, value, _BROKEN))
    return found or [_speed(probe, inputs, out, seconds, local[0].device_kind)]


def _timed(
    fn: Callable[..., Array], inputs: tuple[Array, ...], shared: bool = False
) -> tuple[Array, float]:
    """(output, seconds of a call), after a first one that compiles and a second that warms up.

    `shared` work of all processes: each makes as many calls, and waits for each of them, as
    collectives in flight together deadlock XLA's CPU devices.
    """
    jax.block_until_ready(fn(*inputs))
    begin = time.perf_counter()
    out = jax.block_until_ready(fn(*inputs))
    times = min(50, max(3, int(_SECONDS / (time.perf_counter() - begin))))
    if shared:
        times = int(distributed.from_main(times))
    begin = time.perf_counter()
    for _ in range(times):
        out = fn(*inputs)
        if shared:
            jax.block_until_ready(out)
    jax.block_until_ready(out)
    return out, (time.perf_counter() - begin) / times


def _speed(
    probe: Probe, inputs: tuple[Array, ...], out: Array, seconds: float, kind: str
) -> Finding:
    dtype = str(out.dtype)
    work = flops.count(probe.run, *inputs).total
    moved = sum(x.size * x.dtype.itemsize for x in (*inputs, out))
    value = (
        f"{work / seconds / 1e12:.3g} TFLOP/s, {moved / seconds / 1e9:.3g} GB/s on each device in "
        f"{dtype} ({seconds * 1e3:.3g} ms)"
    )
    peak = flops.peak(kind, dtype)
    if probe.run is not convolve or peak is None:
        return Finding(probe.name, f"{value}; numbers right")
    share = work / seconds / peak.datasheet
    value += f", {100 * share:.0f} % of the data sheet; numbers right"
    if share < _SLOW:
        mend = "see whether another program uses the device (nvidia-smi), its clocks and heat"
        return warning(probe.name, value, mend)
    return Finding(probe.name, value)


def reduce_all(mesh: Mesh) -> Callable[[Array], Array]:
    """The sum over all devices, on all of them."""
    spec = PartitionSpec("device")
    return jax.jit(jax.shard_map(
        lambda x: jax.lax.psum(x, "device"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec(),
    ))  # fmt: skip


def collective() -> list[Finding]:
    """An all-reduce over all devices of all processes; every one sees the sum of all."""
    every = jax.devices()
    if len(every) == 1:
        return [Finding("all-reduce", "one device: nothing to reduce")]
    length = 2**20 if every[0].platform == "cpu" else 2**24  # float32 numbers on each device
    mesh = Mesh(np.array(every), ("device",))
    pattern = (np.arange(length) % 5 + 1).astype(np.float32)

    def rows(index: tuple[slice, ...]) -> np.ndarray:
        return pattern[None] * (1 + index[0].start if index[0].start else 1)

    x = jax.make_array_from_callback(
        (len(every), length), NamedSharding(mesh, PartitionSpec("device")), rows
    )
    out, seconds = _timed(reduce_all(mesh), (x,), shared=True)
    truth = pattern * (len(every) * (len(every) + 1) // 2)  # whole numbers below 2^24: exact
    wrong = [s.device for s in out.addressable_shards if (np.asarray(s.data)[0] != truth).any()]
    if wrong:
        return [failed("all-reduce", f"wrong sums on {wrong}", _BROKEN)]
    moved = 2 * (len(every) - 1) / len(every) * length * 4
    return [Finding(
        "all-reduce", f"{moved / seconds / 1e9:.3g} GB/s over {len(every)} devices "
        f"({length * 4 / 2**20:.0f} MiB each in {seconds * 1e3:.3g} ms); sums right",
    )]  # fmt: skip
