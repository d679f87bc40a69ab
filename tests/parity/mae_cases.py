"""The narrow masked autoencoders that are compared with PyTorch, and what they are given."""

from typing import Any

import numpy as np
import weights

BATCH = 3
# Our fields of the network; which positions the decoder gets; what the loss is of.
CASES: dict[str, dict[str, Any]] = {
    "latents": dict(
        net=dict(
            in_channels=4, input_size=(8, 8), patch=2, width=32, depth=2, heads=4,
            decoder_width=16, decoder_depth=2, decoder_heads=2, decoder_pos_sign=1,
        ),
        keep=6, whiten=True,
    ),
    "subtracted": dict(
        net=dict(
            in_channels=3, input_size=(12, 12), patch=4, width=24, depth=3, heads=2,
            decoder_width=16, decoder_depth=1, decoder_heads=4, decoder_pos_sign=-1,
        ),
        keep=5, whiten=False,
    ),
}  # fmt: skip


def tokens(case: dict[str, Any]) -> int:
    """How many there are of a latent."""
    height, width = case["net"]["input_size"]
    return height * width // case["net"]["patch"] ** 2


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(latents NHWC, a number for each token: those with the smallest are visible)."""
    net = CASES[name]["net"]
    x = weights.normal(f"lmd/{name}/x", (BATCH, *net["input_size"], net["in_channels"]))
    return x, weights.normal(f"lmd/{name}/noise", (BATCH, tokens(CASES[name])))
