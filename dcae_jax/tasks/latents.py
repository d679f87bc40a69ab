"""The latents that a task trains on, cached or encoded in the step, and their normalisation.

For the baseline on pixels, images stand in for latents.
"""

import enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dcae_jax.config import RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.errors import UserError
from dcae_jax.tasks.base import Batch, Variables
from dcae_jax.tree import Tree

Latents = Float[Array, "b h w c"]
RMS_RANGE = (0.7, 1.4)  # of normalised latents; outside the scale is probably another model's
# Of the channels of ImageNet's images in [0, 1].
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# Why ReconstructConfig has nothing to look at.
NO_AUTOENCODER = "this run trains none; use evaluators of latents and masks"


@runtime_checkable
class LatentStats(Protocol):
    """What is asked of the manifest of a cache."""

    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    scaling_factor: float
    num_classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent."""
        ...

    def to_json(self) -> Any:
        """All that is known of the cache."""
        ...


@runtime_checkable
class Encodes(Protocol):
    """Data that are images, with the frozen autoencoder that encodes them in the step."""

    def encoder(self) -> Tree:
        """Its variables."""
        ...

    def abstract_encoder(self) -> Tree:
        """Their shapes."""
        ...

    def gaussian(self) -> bool:
        """Whether a latent is a Gaussian."""
        ...

    def encode(self, variables: Tree, image: Array) -> tuple[Latents, Latents | None]:
        """(mean, log variance or None); no gradient flows back."""
        ...


@runtime_checkable
class Reads(Protocol):
    """An evaluator with data of its own."""

    name: str
    data: Any


@runtime_checkable
class AsksProcess(Protocol):
    """An evaluator that draws samples."""

    name: str
    sampler: Any


@runtime_checkable
class AsksTimes(Protocol):
    """An evaluator that scores by diffusion time."""

    name: str
    bins: int


class LatentNorm(enum.Enum):
    """How latents are brought to unit size."""

    scalar = "scalar"  # times the scaling factor, 1 / RMS (published)
    channel = "channel"  # each channel less its mean, over its standard deviation


class Normalisation(NamedTuple):
    """normal = (latent - shift) * scale, for each channel."""

    shift: Float[Array, " c"]
    scale: Float[Array, " c"]

    def apply(self, latent: Latents) -> Latents:
        """Latents as the network sees them."""
        return (latent.astype(jnp.float32) - self.shift) * self.scale

    def invert(self, normal: Latents) -> Latents:
        """Latents as the autoencoder decodes them."""
        return normal / self.scale + self.shift


class LatentInputs:
    """The latents of a run, from its cache or encoded in each step from its images.

    Constants: the normalisation, and the encoder where images are encoded in the step.
    """

    def __init__(self, run: RunConfig, kind: LatentNorm, shape: tuple[int, int, int]):
        """`shape`: (h, w, c) of a latent, as the network takes it."""
        self._run, self._kind, self._shape = run, kind, shape
        self._online = isinstance(run.data, Encodes)

    def manifest(self) -> LatentStats:
        """What is known of the latents."""
        return self._run.data.manifest()

    def constants(self) -> Tree:
        """{"norm", "encoder" if it is needed}; UserError if they do not fit."""
        norm = normalisation(self._kind, self.manifest())
        return {"norm": norm, **({"encoder": self._run.data.encoder()} if self._online else {})}

    def abstract_constants(self) -> Tree:
        """Shapes of `constants`, without a cache."""
        row = jax.ShapeDtypeStruct(self._shape[2:], jnp.float32)
        more = {"encoder": self._run.data.abstract_encoder()} if self._online else {}
        return {"norm": Normalisation(row, row), **more}

    def shapes(self) -> list[str]:
        """What enters a step, for --dry_run."""
        latent = " x ".join(str(n) for n in self._shape)
        if self._online:
            pixels = self._run.data.resolution
            return [f"each example: {pixels} px, encoded in the step to {latent}"]
        return [f"each example: a latent {latent}"]

    def record(self) -> dict[str, Any]:
        """The manifest, for checkpoints."""
        return {"latents": self.manifest().to_json()}

    def examples(self, key: PRNGKeyArray, batch: Batch) -> Batch:
        """What `read` needs of a batch, with the draws of latents that are Gaussians."""
        found = {k: batch[k] for k in ("latent", "logvar", "image") if k in batch}
        if "logvar" in batch or ("image" in batch and self._run.data.gaussian()):
            found["draw"] = jax.random.normal(key, (batch["label"].shape[0], *self._shape))
        return found

    def read(self, variables: Variables, batch: Batch) -> Latents:
        """The f32 latents of a batch, from the cache or encoded here from its images.

        Where they are Gaussians: their means, or with "draw" (standard normal) samples of them.
        """
        if "image" in batch:
            mean, logvar = self._run.data.encode(variables.constants["encoder"], batch["image"])
        else:
            mean, logvar = batch["latent"], batch["logvar"] if "logvar" in batch else None
        mean = mean.astype(jnp.float32)
        if logvar is None or "draw" not in batch:
            return mean
        return mean + jnp.exp(0.5 * logvar.astype(jnp.float32)) * batch["draw"]

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Latents of another size than networks expect."""
        rms = metrics["latent_rms"]
        if RMS_RANGE[0] <= rms <= RMS_RANGE[1]:
            return []
        mend = "make the cache again, or set task.latent_norm=channel"
        if self._online:
            mend = "measure it: python -m dcae_jax latent-stats --from AUTOENCODER"
        return [
            f"the RMS of the normalised latents is {rms:.3g}, far from 1: the scaling factor is "
            f"not that of these latents; {mend}"
        ]


class PixelInputs:
    """The images of a run in the place of latents: what a masked autoencoder of pixels sees.

    Constants: ImageNet's mean and deviation of each channel, which bring [0, 1] to unit size.
    """

    def __init__(self, shape: tuple[int, int, int]):
        """`shape`: (h, w, 3) of an image."""
        self._shape = shape

    def constants(self) -> Tree:
        """{"norm"}."""
        mean, std = (jnp.asarray(v, jnp.float32) for v in (PIXEL_MEAN, PIXEL_STD))
        return {"norm": Normalisation(mean, 1.0 / std)}

    def abstract_constants(self) -> Tree:
        """Shapes of `constants`."""
        return jax.eval_shape(self.constants)

    def shapes(self) -> list[str]:
        """What enters a step, for --dry_run."""
        return [f"each example: an image {' x '.join(str(n) for n in self._shape)}"]

    def record(self) -> dict[str, Any]:
        """Nothing: there is no cache and no autoencoder."""
        return {}

    def examples(self, key: PRNGKeyArray, batch: Batch) -> Batch:
        """The images; nothing is drawn."""
        return {"image": batch["image"]}

    def read(self, variables: Variables, batch: Batch) -> Latents:
        """Images in [0, 1]."""
        return batch["image"].astype(jnp.float32) / 255.0

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """None: dark images are no mistake."""
        return []


def inputs_of(
    run: RunConfig, kind: LatentNorm, shape: tuple[int, int, int]
) -> LatentInputs | PixelInputs:
    """What a run trains on: its latents, or its images where no autoencoder encodes them."""
    return PixelInputs(shape) if are_pixels(run.data) else LatentInputs(run, kind, shape)


def are_pixels(data: Any) -> bool:
    """Whether data are images, and nothing makes latents of them."""
    if data is None or isinstance(data, Encodes | LatentDataConfig):
        return False
    return "image" in data.abstract_batch(1)


def reader_problems(run: RunConfig) -> list[str]:
    """Evaluators whose images would need the autoencoder that a run on a cache has not."""
    return [
        f"evals: {e.name}: its images need the autoencoder of the run, which trains on a cache; "
        "give it LatentDataConfig(split=...), or train on OnlineDataConfig"
        for e in run.evals
        if isinstance(e, Reads) and isinstance(e.data, Encodes)
        and not isinstance(run.data, Encodes)
    ]  # fmt: skip


def kind_problems(run: RunConfig) -> list[str]:
    """Evaluators on images of a run on latents, or the other way round."""
    pixels = are_pixels(run.data)
    return [
        f"evals: {e.name} reads {'latents' if pixels else 'images'}, and this run trains on "
        f"{'images' if pixels else 'latents'}; give it data of that kind"
        for e in run.evals
        if isinstance(e, Reads) and are_pixels(e.data) != pixels
    ]


def process_problems(run: RunConfig, instead: str) -> list[str]:
    """Evaluators of diffusion models in a run without a diffusion time."""
    return [
        f"evals: {e.name} is for diffusion models, and this one has no diffusion time; use "
        f"{instead}"
        for e in run.evals
        if isinstance(e, AsksProcess | AsksTimes)
    ]


def pixel_problems(run: RunConfig, shape: tuple[int, int, int]) -> list[str]:
    """Images of a run on pixels that are not of the shape (h, w, c) that the network takes."""
    side = run.data.resolution
    if shape == (side, side, 3):
        return []
    return [
        f"the images are {side} x {side} x 3, but task.model takes {' x '.join(map(str, shape))}; "
        "set data.resolution or input_size and in_channels, or train on latents: "
        "data=LatentDataConfig(path=...)"
    ]


def spatial_problems(run: RunConfig) -> list[str]:
    """A mesh that would split the tokens of a transformer."""
    if run.mesh.spatial == 1:
        return []
    return [
        f"mesh.spatial = {run.mesh.spatial}: attention kernels refuse a sharded sequence; "
        "use mesh.data and mesh.fsdp for transformers"
    ]


def expect_shape(run: RunConfig, shape: tuple[int, int, int]) -> None:
    """The shape of the latents is the network's; the cache is checked against it."""
    if hasattr(run.data, "shape"):  # else data_problems says what is wrong
        run.data.shape = shape


def data_problems(run: RunConfig) -> list[str]:
    """What is wrong if the data of a run are no latents."""
    if run.data is not None and (
        isinstance(run.data, Encodes) or "latent" in run.data.abstract_batch(run.batch)
    ):
        return []
    return [
        "data is no source of latents; set data=LatentDataConfig(path=...), made by `python -m "
        "dcae_jax cache-latents`, or data=OnlineDataConfig(images=..., autoencoder=...), which "
        "encodes images in each step"
    ]


def normalisation(kind: LatentNorm, manifest: LatentStats) -> Normalisation:
    """From the statistics of the cache."""
    channels = manifest.shape[2]
    if kind is LatentNorm.scalar:
        return Normalisation(jnp.zeros(channels), jnp.full(channels, manifest.scaling_factor))
    if len(manifest.std) != channels:
        raise UserError(
            "task.latent_norm = channel needs the mean and deviation of each channel, which are "
            "not known of these latents. Measure them where the autoencoder has a workdir "
            "(python -m dcae_jax latent-stats --from WORKDIR), train on a cache, which measures "
            "its own, or set latent_norm=scalar"
        )
    return Normalisation(jnp.asarray(manifest.mean), 1.0 / jnp.asarray(manifest.std))
