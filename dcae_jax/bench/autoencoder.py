"""Times encode, forward, and forward + backward of a narrow DC-AE: fast CPU forms against lax.

Both sides run in one process, alternately, on the same images; what counts is their ratio.  Set
GLIBC_TUNABLES (see the Makefile) before Python starts, or page faults are part of what is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dcae_jax.models import dcae
from dcae_jax.models.layers import Depthwise, Dtype

Times = dict[str, list[float]]


def model_config(name: str) -> dcae.DCAEConfig:
    """`narrow`: f32c32 with widths / 4; `demo`: about the model that `make train` trains; f32."""
    cfg = dcae.from_scratch(dcae.dc_ae_f32c32_in())
    if name == "narrow":
        cfg = dcae.narrow(cfg, divisor=4)
    else:
        depths = (0, 1, 2, 1, 1, 1)
        cfg = dcae.narrow(
            cfg, widths=(16, 32, 64, 64, 128, 128), encoder_depths=depths, decoder_depths=depths
        )
    cfg.dtype = Dtype.float32
    return cfg


def cases(cfg: dcae.DCAEConfig) -> dict[str, Callable[..., Any]]:
    """name -> compiled function of (params, images)."""
    model = cfg.build()

    def encode(params: Any, x: Float[Array, "b h w c"]) -> Array:
        return model.apply({"params": params}, x, method="encode")

    def forward(params: Any, x: Float[Array, "b h w c"]) -> Array:
        return model.apply({"params": params}, x)

    def loss(params: Any, x: Float[Array, "b h w c"]) -> Array:
        return jnp.abs(forward(params, x) - x).mean()

    train = jax.value_and_grad(loss)
    return {"encode": jax.jit(encode), "forward": jax.jit(forward), "train": jax.jit(train)}


def alternate(sides: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Seconds of each side, one call of each in turn, after one untimed call."""
    times: Times = {name: [] for name in sides}
    for call in sides.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return times


def report(case: str, times: Times) -> str:
    """One line: fastest and median milliseconds of each side, and the ratio of the fastest."""
    sides = ", ".join(
        f"{name} {1e3 * min(t):.1f} ms (median {1e3 * statistics.median(t):.1f})"
        for name, t in times.items()
    )
    first, second = (min(t) for t in times.values())
    return f"{case:8} {sides}: {second / first:.2f} x"


def main(argv: list[str]) -> int:
    """Prints one line a case."""
    parser = argparse.ArgumentParser(
        prog="python -m dcae_jax bench autoencoder", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", choices=["narrow", "demo"], default="narrow")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)

    cfg = model_config(args.model)
    params = jax.jit(lambda key: dcae.init_variables(cfg, key)["params"])(jax.random.key(0))
    shape = (args.batch, args.resolution, args.resolution, 3)
    x = jax.random.uniform(jax.random.key(1), shape, minval=-1.0, maxval=1.0)
    built = {}
    for how in (Depthwise.auto, Depthwise.lax):
        cfg.depthwise = how
        built[how.value] = cases(cfg)
    print(f"{args.model} DC-AE, {shape}, float32, {jax.device_count()} x {jax.devices()[0]}")
    for case in built["auto"]:
        sides = {how: lambda f=fs[case]: f(params, x) for how, fs in built.items()}
        print(report(case, alternate(sides, args.rounds)), flush=True)
    return 0
