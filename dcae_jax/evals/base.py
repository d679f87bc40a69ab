"""What evaluators share: their report, and which weights they look at."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dcae_jax.config import EmaConfig, InitWeights
from dcae_jax.step import TrainState, ema_name
from dcae_jax.tasks.base import Variables
from dcae_jax.tree import Tree


class Report(NamedTuple):
    """What an evaluator returns: named scalars and pictures."""

    scalars: dict[str, float]
    images: dict[str, UInt8[np.ndarray, "h w 3"]]


def variables_of(
    state: TrainState, constants: Tree, weights: InitWeights, ema: EmaConfig
) -> Variables:
    """The first average, or the parameters themselves where there is none or they are asked for."""
    if weights is InitWeights.ema and ema.decays:
        average = state.ema[ema_name(ema.decays[0])]
        return Variables(average["params"], average["stats"], constants)
    return Variables(state.params, state.stats, constants)
