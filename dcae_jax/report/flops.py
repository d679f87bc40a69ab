"""Counts the FLOPs of a function on its jaxpr, and turns them into model FLOPs utilisation (MFU).

One multiply-add is 2 FLOPs; only matrix products, convolutions and attention kernels count, as in
the papers whose numbers ours stand beside.  XLA's own cost analysis counts the body of a scan once,
and a depthwise weight gradient as a dense one, so it is not used.  No memory is allocated: shapes
are enough.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex
from jax.interpreters import partial_eval as pe

# Primitives that hide work from this count: it is missing (kernels) or counted once (while).
_OPAQUE = frozenset(
    ("while", "pallas_call", "ffi_call", "custom_partitioning", "pure_callback", "io_callback")
)


class Flops(NamedTuple):
    """FLOPs of one call.  `incomplete` names primitives whose work is not wholly in the total."""

    total: int
    by_primitive: dict[str, int]
    incomplete: tuple[str, ...] = ()


def count(fn: Callable, *args: Any, **kwargs: Any) -> Flops:
    """FLOPs of `fn(*args)`; arguments are arrays or `jax.ShapeDtypeStruct`s, never computed.

    Dead code is removed first, as XLA does: what a gradient does not need costs nothing.
    A scan counts its body times its length, `cond` its dearest branch, `while` its body once,
    rematerialised work as often as it runs (for MFU count the function without remat),
    `shard_map` the work of all shards.  Depthwise convolutions written as shifted sums are
    elementwise and count nothing: count with `depthwise=lax`.
    """
    closed = jax.make_jaxpr(lambda a, k: fn(*a, **k))(args, kwargs)
    return count_jaxpr(live(closed))


def live(closed: jex.ClosedJaxpr) -> jex.Jaxpr:
    """The jaxpr without equations whose results are unused, inside scans and calls too."""
    jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return jaxpr


def count_jaxpr(jaxpr: jex.Jaxpr) -> Flops:
    """FLOPs of a jaxpr as it stands."""
    by_primitive: dict[str, int] = {}
    incomplete: set[str] = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _OPAQUE:
            incomplete.add(name)
        if name in _LEAVES:
            by_primitive[name] = by_primitive.get(name, 0) + _LEAVES[name](eqn)
            continue
        times, inner = _inner(eqn)
        for key, value in inner.by_primitive.items():
            by_primitive[key] = by_primitive.get(key, 0) + times * value
        incomplete.update(inner.incomplete)
    return Flops(sum(by_primitive.values()), by_primitive, tuple(sorted(incomplete)))


def _inner(eqn: jex.JaxprEqn) -> tuple[int, Flops]:
    """How often, and what, the jaxprs inside an equation run."""
    parts = [count_jaxpr(j) for j in _jaxprs(list(eqn.params.values()))]
    name = eqn.primitive.name
    if not parts:
        return 1, Flops(0, {})
    if name == "cond":
        hidden = {n for part in parts for n in part.incomplete}
        dearest = max(parts, key=lambda part: part.total)
        return 1, dearest._replace(incomplete=tuple(hidden))
    keys = {key for part in parts for key in part.by_primitive}
    merged = {key: sum(part.by_primitive.get(key, 0) for part in parts) for key in keys}
    hidden = {n for part in parts for n in part.incomplete}
    return _repeats(eqn), Flops(sum(merged.values()), merged, tuple(hidden))


def _repeats(eqn: jex.JaxprEqn) -> int:
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        # `manual_axes` or `newly_manual_axes`, depending on jax's version.
        manual = next(v for name, v in eqn.params.items() if name.endswith("manual_axes"))
        return math.prod(eqn.params["mesh"].shape[axis] for axis in manual)
    return 1


def _jaxprs(values: Sequence[Any]) -> list[jex.Jaxpr]:
    found = []
    for value in values:
        if isinstance(value, jex.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, jex.Jaxpr):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _jaxprs(value)
    return found


def _dot_flops(eqn: jex.JaxprEqn) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
    return 2 * depth * math.prod(eqn.outvars[0].aval.shape)


def _conv_flops(eqn: jex.JaxprEqn) -> int:
    """2 x batch x output features x input features of a group x (position, tap) pairs."""
    p = eqn.params
    lhs, rhs, out = p["dimension_numbers"]
    lhs_shape, rhs_shape = (v.aval.shape for v in eqn.invars)
    out_shape = eqn.outvars[0].aval.shape
    macs = out_shape[out[0]] * out_shape[out[1]] * rhs_shape[rhs[1]]
    for i, padding in enumerate(p["padding"]):
        macs *= _pairs(
            lhs_shape[lhs[2 + i]],
            rhs_shape[rhs[2 + i]],
            out_shape[out[2 + i]],
            p["window_strides"][i],
            padding,
            p["lhs_dilation"][i],
            p["rhs_dilation"][i],
        )
    return 2 * macs


def _pairs(
    size: int,
    taps: int,
    out: int,
    stride: int,
    pad: tuple[int, int],
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """(output, tap) pairs along one dimension that need a multiplication.

    The zeros between dilated inputs cost nothing; padding counts, as in the closed forms (outputs
    x taps).  A transposed convolution, known by its dilation or by more padding than SAME has,
    costs no more than every input meeting every tap once: what the convolution itself cost.
    """
    tap = np.arange(taps)[:, None] * rhs_dilation
    by_outputs = int(((np.arange(out) * stride + tap - pad[0]) % lhs_dilation == 0).sum())
    if lhs_dilation == 1 and sum(pad) <= tap[-1, 0]:
        return by_outputs
    by_inputs = int(((np.arange(size) * lhs_dilation - tap + pad[0]) % stride == 0).sum())
    return min(by_outputs, by_inputs)


def _attention_flops(eqn: jex.JaxprEqn, products: int) -> int:
    """Products of queries x keys x head dimension; layout 0 is (b, n, heads, d), 1 swaps n."""
    query, key = (v.aval.shape for v in eqn.invars[:2])
    length = 2 if eqn.params["layout"] else 1
    return 2 * products * math.prod(query) * key[length]


# cuDNN's attention counts as the products that it stands for, and not what it computes again.
_LEAVES = {
    "dot_general": _dot_flops,
    "conv_general_dilated": _conv_flops,
    "dot_product_attention_fwd_wrapper": lambda eqn: _attention_flops(eqn, 2),
    "dot_product_attention_bwd_wrapper": lambda eqn: _attention_flops(eqn, 4),
}


# --- utilisation


class Peak(NamedTuple):
    """FLOP/s of one device as JAX sees it: of the data sheet, and measured on a large product."""

    datasheet: float
    measured: float | None = None


# Dense TFLOP/s of one jax device: (start of the device kind, bf16, f32 as JAX multiplies by
# default, measured bf16).  By default float32 products are TF32 on NVIDIA and one bf16 pass on TPU.
# Longer names first.  The measured figure is an 8192^3 bf16 product of random numbers.
_PEAKS: tuple[tuple[str, float, float, float | None], ...] = (
    ("NVIDIA H100 PCIe", 756.0, 378.0, None),
    ("NVIDIA H100 NVL", 835.5, 417.5, None),
    ("NVIDIA H100", 989.4, 494.7, None),
    ("NVIDIA H200", 989.4, 494.7, 790.0),
    ("NVIDIA GH200", 989.4, 494.7, None),
    ("NVIDIA A100", 312.0, 156.0, None),
    ("NVIDIA L40S", 362.0, 183.0, None),
    ("NVIDIA L4", 121.0, 60.0, None),
    ("NVIDIA A10G", 70.0, 35.0, None),
    ("TPU v2", 22.5, 22.5, None),
    ("TPU v3", 61.5, 61.5, None),
    ("TPU v4", 275.0, 275.0, None),
    ("TPU v5 lite", 197.0, 197.0, None),
    ("TPU v5e", 197.0, 197.0, None),
    ("TPU v5p", 459.0, 459.0, None),
    ("TPU v5", 459.0, 459.0, None),
    ("TPU v6 lite", 918.0, 918.0, None),
    ("TPU v6e", 918.0, 918.0, None),
)


def peak(device_kind: str, dtype: str = "bfloat16") -> Peak | None:
    """The peak of `jax.Device.device_kind` for products of bfloat16 or float32; None if unknown."""
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"peak of {dtype!r}: expected bfloat16 or float32")
    for kind, bf16, f32, measured in _PEAKS:
        if re.match(re.escape(kind) + r"(?![0-9A-Za-z])", device_kind):
            if dtype == "float32":
                return Peak(f32 * 1e12)
            return Peak(bf16 * 1e12, measured and measured * 1e12)
    return None


def mfu(flops: float, seconds: float, devices: int, peak: Peak | None) -> Peak | None:
    """Share of the peak (0..1), of both peaks where known, that `flops` in `seconds` used.

    `flops` is the work of the whole step over all devices.  None on an unknown device.
    """
    if peak is None:
        return None
    rate = flops / seconds / devices
    return Peak(rate / peak.datasheet, rate / peak.measured if peak.measured else None)


def mfu_line(flops: float, seconds: float, devices: int, peak: Peak | None) -> str:
    """For people, with the peak: `MFU 40.1 % of 989 (datasheet), 50.2 % of 790 (measured)`."""
    share = mfu(flops, seconds, devices, peak)
    if share is None or peak is None:
        return "MFU n/a"
    line = f"MFU {share.datasheet:.1%} of {peak.datasheet / 1e12:.0f} (datasheet)"
    if share.measured is not None and peak.measured is not None:
        line += f", {share.measured:.1%} of {peak.measured / 1e12:.0f} (measured)"
    return line.replace("%", " %")
