"""What evaluators share: their report, which weights they look at, and on which data."""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import UInt8

from dcae_jax import sharding
from dcae_jax.config import EmaConfig, InitWeights, RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.errors import UserError
from dcae_jax.online import OnlineDataConfig
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


@runtime_checkable
class Records(Protocol):
    """An evaluator whose scores depend on more than the config: on files."""

    def record(self) -> dict[str, Any]:
        """What these files are; {} for none."""
        ...


def records(evaluators: dict[str, Any]) -> dict[str, Any]:
    """For the run's record: the files behind the scores, by evaluator."""
    found = {name: e.record() for name, e in evaluators.items() if isinstance(e, Records)}
    found = {name: record for name, record in found.items() if record}
    return {"scored_with": found} if found else {}


def on_host(arrays: Tree, mesh: Mesh) -> Tree:
    """Arrays whose rows lie on different devices, whole in every process."""
    if jax.process_count() > 1:
        arrays = gathered(sharding.replicated(mesh))(arrays)
    return jax.device_get(arrays)


@functools.cache
def gathered(whole: NamedSharding) -> jax.stages.Wrapped:
    """Gives arrays that placement: every device gets what it needs from the others."""
    return jax.jit(lambda x: x, out_shardings=whole)


@runtime_checkable
class Cadence(Protocol):
    """The fields of an evaluator's config that say when it runs."""

    name: str
    every: int  # steps; 0: never in between
    at_start: bool
    at_end: bool


def is_due(cfg: Cadence, step: int, last: int) -> bool:
    """Whether an evaluator runs after `step` of `last` steps."""
    if step == last:
        return cfg.at_end
    return cfg.at_start if step == 0 else cfg.every > 0 and step % cfg.every == 0


def below(cfg: Cadence, **least: int) -> list[str]:
    """Sentences about fields that are smaller than what they must at least be."""
    values = {name: getattr(cfg, name) for name in least}
    return [
        f"evals: {name} = {value} of {cfg.name}; at least {least[name]}"
        for name, value in values.items() if value < least[name]
    ]  # fmt: skip


def take_data(data: Any, run: RunConfig) -> str:
    """Gives an evaluator's data the cache or autoencoder of the run unless it has its own.

    Returns the name of their split.
    """
    name = {LatentDataConfig: "path", OnlineDataConfig: "autoencoder"}.get(type(data))
    if name and type(run.data) is type(data):
        setattr(data, name, getattr(data, name) or getattr(run.data, name))
    if name and isinstance(run.data, LatentDataConfig | OnlineDataConfig):
        data.shape = run.data.shape  # else the task says what is wrong
    return data.images.split if isinstance(data, OnlineDataConfig) else data.split


def check_encoder(run: RunConfig, name: str, data: Any) -> None:
    """UserError if an evaluator's latents are of another encoder than those of the run."""
    if not all(isinstance(d, LatentDataConfig | OnlineDataConfig) for d in (run.data, data)):
        return
    mine, other = (d.manifest().encoder for d in (run.data, data))
    if mine and other and mine != other:  # "": not known of imported weights
        raise UserError(
            f"evals: {name}: its latents are of encoder {other[:16]}, those of the "
            f"run of {mine[:16]}; name a cache, or an autoencoder, with the same encoder"
        )
