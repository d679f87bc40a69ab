"""What LMD-B costs beside MAE-B at full size: FLOPs counted on jaxprs, nothing is run."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dcae_jax import masking
from dcae_jax.masking import MaskConfig, MaskKind
from dcae_jax.models import kl_vae, lmd
from dcae_jax.models.dcae import abstract_variables
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.report import flops
from dcae_jax.studies.base import table
from dcae_jax.tree import Tree

EPOCHS = 400  # over which the encoding is spread, LMD's default
ENCODINGS = 8  # of an image, as configs/lmd.py makes them: 4 crops and their mirror images
_STEPS = 60_000  # of the schedule: its mean does not depend on them
_SIDE = 224  # pixels


class Cost(NamedTuple):
    """FLOPs of one image."""

    forward: float
    step: float  # forward and backward


@functools.cache
def of_visible(cfg: LMDConfig, keep: int) -> Cost:
    """With so many visible tokens."""
    net, variables = cfg.build(), lmd.abstract_variables(cfg)
    image = jax.ShapeDtypeStruct((1, *cfg.input_size, cfg.in_channels), jnp.float32)
    order = jax.ShapeDtypeStruct((1, cfg.tokens), jnp.int32)

    def loss(variables: Tree, image: Array, order: Array) -> Array:
        return jnp.square(net.apply(variables, image, masking.split(order, keep))).sum()

    arguments = variables, image, order
    return Cost(
        flops.count(loss, *arguments).total,
        flops.count(jax.value_and_grad(loss), *arguments).total,
    )


def mean(cfg: LMDConfig, mask: MaskConfig) -> Cost:
    """Over a training."""
    keeps = mask.keeps(mask.ratio(np.arange(_STEPS), _STEPS), cfg.tokens)
    found, counts = np.unique(keeps, return_counts=True)
    costs = [of_visible(cfg, int(keep)) for keep in found]
    share = counts / counts.sum()
    return Cost(float(share @ [c.forward for c in costs]), float(share @ [c.step for c in costs]))


def encoder() -> float:
    """Of one image through the encoder of the SD-VAE-f8."""
    cfg = kl_vae.sd_vae_f8()
    net, variables = cfg.build(), abstract_variables(cfg)
    image = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.float32)
    return flops.count(lambda v, x: net.apply(v, x, method="encode"), variables, image).total


def markdown() -> str:
    """The table: LMD-B/4 on 28 x 28 x 4 latents with each schedule, MAE-B/16, at 224 px."""
    baseline = mean(lmd.mae_b(), MaskConfig(kind=MaskKind.constant))
    encode = encoder()
    rows = [_row("MAE-B/16, constant 0.75", baseline, baseline, None)]
    for kind in MaskKind:
        cost = mean(lmd.lmd_b(), MaskConfig(kind=kind))
        rows.append(_row(f"LMD-B/4, {kind.value}", cost, baseline, encode))
    head = [
        "full size, 224 px, not run", "forward GFLOP", "step GFLOP", "of MAE",
        "with 1 encoding", "of MAE", f"with {ENCODINGS}", "of MAE", "one in each step", "of MAE",
    ]  # fmt: skip
    return table(head, rows) + (
        f"\n\nFLOPs of one image counted on the jaxpr, means over a training of {EPOCHS} epochs; "
        f"the encoder of the SD-VAE-f8 takes {encode / 1e9:.0f} GFLOP: once, {ENCODINGS} times (4 "
        "crops and their mirror images) for each image before the training, or in each step."
    )


def _row(name: str, cost: Cost, baseline: Cost, encode: float | None) -> list[str]:
    cells = [name, f"{cost.forward / 1e9:.2f}"]
    whole = None if encode is None else encode * EPOCHS
    for extra in (0.0, encode, encode and ENCODINGS * encode, whole):
        if extra is None:
            cells += ["–", "–"]
        else:
            step = cost.step + extra / EPOCHS
            cells += [f"{step / 1e9:.2f}", f"{step / baseline.step:.4f}"]
    return cells
