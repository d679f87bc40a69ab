"""What trains: a Task.  DC-AE phases, diffusion and masked models differ in nothing else."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PRNGKeyArray

from dcae_jax.config import OptimConfig, RunConfig
from dcae_jax.tree import Tree

Metrics = dict[str, Float[Array, ""]]
Batch = dict[str, Array]


class Variables(NamedTuple):
    """Everything a network is applied with."""

    params: Tree
    stats: Tree  # running statistics (BatchNorm, LeCam anchors); {} for most models
    constants: Tree  # frozen networks that are not part of the run's state, e.g. LPIPS


class Inputs(NamedTuple):
    """A prepared batch: every random draw is already in it."""

    examples: Tree  # leaves with a leading batch axis; a microbatch is a part of it
    shared: Tree  # what couples examples: denominators, schedules, the step


class Loss(NamedTuple):
    """What one objective computes on one microbatch.

    Terms and metrics are *contributions*: summed over the microbatches they are the value of the
    whole batch, so accumulation changes memory and never numbers.
    """

    terms: dict[str, Float[Array, ""]]  # differentiated apart, joined by Objective.combine
    metrics: Metrics
    stats: Tree  # new running statistics (averaged over microbatches)
    carry: Any  # handed to the next objective, gradients stopped


def add_terms(grads: dict[str, Tree], step: Int[Array, ""]) -> tuple[Tree, Metrics]:
    """The gradient of an objective with a single loss term."""
    (only,) = grads.values()
    return only, {}


@dataclass(frozen=True)
class Objective:
    """One player: a loss, the parameters it moves, and their optimizer."""

    name: str
    loss: Callable[[Variables, Inputs, Any], Loss]
    trainable: str  # regex that must match whole parameter paths
    optim: OptimConfig
    # accumulated gradients per term, step -> one gradient and metrics; once per optimizer step
    combine: Callable[[dict[str, Tree], Int[Array, ""]], tuple[Tree, Metrics]] = add_terms


@runtime_checkable
class Task(Protocol):
    """The only thing that differs between phases, diffusion and masking."""

    objectives: tuple[Objective, ...]  # in the order in which they are evaluated

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """(params, stats), e.g. params {"ae": ..., "disc": ...}; fp32."""
        ...

    def constants(self, training: bool) -> Tree:
        """Frozen networks, loaded from their files; not `training`: those of `predict` alone."""
        ...

    def abstract_constants(self) -> Tree:
        """Shapes (`jax.ShapeDtypeStruct`) of `constants`, without the files."""
        ...

    def shapes(self, spatial: int) -> list[str]:
        """Lines for --dry_run: resolutions, widths, tokens; stages `spatial` cannot split."""
        ...

    def static(self, step: int) -> Hashable:
        """What the compiled step depends on; () for most, the length bucket for masking."""
        ...

    def statics(self, first: int, last: int) -> list[Hashable]:
        """What `static` gives for the steps first..last-1, each once, in the order of need."""
        ...

    def prepare(
        self, key: PRNGKeyArray, batch: Batch, step: Int[Array, ""], static: Hashable
    ) -> Inputs:
        """Every random draw of the step, on the global batch."""
        ...

    def predict(self, variables: Variables, batch: Batch) -> Array:
        """What evaluators and commands use, e.g. the reconstruction in [-1, 1]."""
        ...

    def record(self) -> dict[str, Any]:
        """What is kept beside the config in config.json and in every checkpoint."""
        ...

    def describe(self) -> list[str]:
        """Lines printed at start: what is trained, at which size, with which losses."""
        ...

    def summary(self) -> dict[str, Any]:
        """What the report's table says of the run."""
        ...

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Sentences about training dynamics that a user should know, from one metrics row."""
        ...


@runtime_checkable
class Fills(Protocol):
    """A task whose network says what masked tokens of a latent are."""

    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        ...

    def fill(
        self, variables: Variables, x: Float[Array, "b h w c"], order: Int[Array, "b n"],
        keep: int, label: Int[Array, " b"],
    ) -> Float[Array, "b h w c"]:  # fmt: skip
        """Normalised latents with all but the first `keep` tokens of `order` filled in.

        The network sees those tokens of `x`, clean, and nothing else of it; they are returned as
        they came.  UserError where what it predicts cannot be decoded.
        """
        ...


@runtime_checkable
class AsksMasked(Protocol):
    """An evaluator of masked tokens, in whatever units a task predicts them."""

    name: str
    ratios: tuple[float, ...]


@runtime_checkable
class AsksFilled(Protocol):
    """An evaluator of pictures: what fills masked tokens, decoded."""

    name: str
    images: Any
    ratio: float


@runtime_checkable
class AsksReconstructed(Protocol):
    """An evaluator of an autoencoder's reconstructions of whole images."""

    name: str
    training_pictures: int


def asking_problems(
    run: RunConfig, *, masked: str | None, filled: str | None, reconstructed: str | None
) -> list[str]:
    """Evaluators of a run that ask its task for what it has not; why not, or None where it has."""
    found = []
    for e in run.evals:
        for kind, what, why in (
            (AsksMasked, "masked tokens", masked),
            (AsksFilled, "masked tokens, filled in and decoded", filled),
            (AsksReconstructed, "an autoencoder's reconstructions", reconstructed),
        ):
            if why and isinstance(e, kind):
                found.append(f"evals: {e.name} asks for {what}: {why}; or leave it out")
    return found


@runtime_checkable
class Extends(Protocol):
    """A task whose network is another one with more parameters."""

    new_params: str  # regex of whole paths; weights of `init_from` may lack them: they start fresh


@runtime_checkable
class Trims(Protocol):
    """A task whose network is a part of another one."""

    unused_params: str  # regex of whole paths: weights of `init_from` that are not taken
