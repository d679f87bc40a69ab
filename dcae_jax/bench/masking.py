"""Times forward + backward of one masked autoencoder with few and with all tokens visible.

Both sides run in one process, alternately, on the same latents; what counts is the ratio of their
times beside the ratio of their FLOPs, counted on the jaxpr.
"""

import argparse

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dcae_jax import masking
from dcae_jax.bench.autoencoder import alternate, report
from dcae_jax.errors import UserError
from dcae_jax.models import lmd
from dcae_jax.models.layers import Dtype
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.report import flops
from dcae_jax.tree import Tree


def model_config(tokens: int, width: int, depth: int) -> LMDConfig:
    """An encoder on a square grid of tokens with a decoder of an eighth of its depth, f32."""
    side = round(tokens**0.5)
    return LMDConfig(
        in_channels=16, input_size=(side, side), patch=1, width=width, depth=depth,
        heads=max(width // 64, 1), decoder_width=width, decoder_depth=max(depth // 8, 1),
        decoder_heads=max(width // 64, 1), dtype=Dtype.float32,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Prints one line for each number of tokens."""
    parser = argparse.ArgumentParser(
        prog="python -m dcae_jax bench masking", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[49, 256], help="squares")
    parser.add_argument("--ratio", type=float, default=0.75, help="share that is masked")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if wrong := [n for n in args.tokens if n < 4 or round(n**0.5) ** 2 != n]:
        raise UserError(f"--tokens {wrong[0]}: tokens stand in a square; 49, 64 or 256, say")
    if not 0 < args.ratio < 1 or round(min(args.tokens) * (1 - args.ratio)) < 1:
        raise UserError(
            f"--ratio {args.ratio:g} of {min(args.tokens)} tokens: some must be masked and some "
            "visible; 0.75 is usual"
        )
    print(
        f"width {args.width}, depth {args.depth}, batch {args.batch}, float32, "
        f"{jax.device_count()} x {jax.devices()[0]}"
    )
    for tokens in args.tokens:
        print(_case(args, tokens), flush=True)
    return 0


def _case(args: argparse.Namespace, tokens: int) -> str:
    cfg = model_config(tokens, args.width, args.depth)
    net, keep = cfg.build(), round(cfg.tokens * (1 - args.ratio))
    params = jax.jit(lambda key: lmd.init_variables(cfg, key))(jax.random.key(0))
    shape = (args.batch, *cfg.input_size, cfg.in_channels)
    x = jax.random.normal(jax.random.key(1), shape)
    order = masking.random_order(jax.random.key(2), args.batch, *cfg.grid(*cfg.input_size))
    sides, cost = {}, {}
    for name, visible in (("masked", keep), ("whole", cfg.tokens)):

        def loss(params: Tree, x: Array, order: Array, visible: int = visible) -> Array:
            return jnp.square(net.apply(params, x, masking.split(order, visible))).mean()

        gradient = jax.jit(jax.value_and_grad(loss))
        cost[name] = flops.count(gradient, params, x, order).total
        sides[name] = lambda f=gradient: f(params, x, order)
    times = alternate(sides, args.rounds)
    measured = min(times["masked"]) / min(times["whole"])
    counted = cost["masked"] / cost["whole"]
    return (
        f"{report(f'{keep}/{tokens}', times)}\n         masked / whole: time {measured:.3f}, FLOPs "
        f"{counted:.3f}; time over FLOPs {measured / counted:.2f}"
    )
