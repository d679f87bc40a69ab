"""Latents without a cache: images that a frozen autoencoder encodes inside the train step.

The data of a run are images, and every step sees new crops and mirror images of them.  What else
a cache would say, a manifest says here: which encoder, the normalisation, the classes.
"""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, UInt8

from dcae_jax import autoencoder, checkpoint
from dcae_jax.config import InitWeights, JSONValue
from dcae_jax.convert import releases
from dcae_jax.data import pipeline, sources
from dcae_jax.data.latents import Manifest, Plan, Storage
from dcae_jax.data.pipeline import WHOLE, AbstractBatch, BatchIterator, DataConfig, Shard
from dcae_jax.errors import UserError
from dcae_jax.models.base import AutoencoderConfig
from dcae_jax.models.dcae import abstract_variables
from dcae_jax.models.layers import Dtype
from dcae_jax.tasks.autoencode import to_float
from dcae_jax.tree import Tree

Moments = tuple[Float[Array, "b h w c"], Float[Array, "b h w c"] | None]


class Frozen(NamedTuple):
    """An autoencoder as it is used here: the weights of its encoder, and what is known of it."""

    model: AutoencoderConfig
    variables: Tree  # {"params": {"encoder": ...}, ...} on the host
    source: str  # for people: which weights these are
    encoder: str  # digests
    decoder: str
    scaling_factor: float | None
    factor_origin: str
    stats: dict[str, JSONValue] | None  # what `latent-stats` measured


@functools.cache
def load(source: str, weights: InitWeights, variant: str | None) -> Frozen:
    """The encoder at `source`, read once in a process; UserError says what was looked for."""
    net = autoencoder.load(source, weights, variant)
    return Frozen(
        net.cfg, jax.device_get(_encoder_half(net.variables)), net.source, net.encoder, net.decoder,
        net.scaling_factor, net.factor_origin, autoencoder.measured(source, net.encoder),
    )  # fmt: skip


def _encoder_half(variables: Tree) -> Tree:
    halves = {name: tree for name, tree in variables.items() if "encoder" in tree}
    return {name: {"encoder": tree["encoder"]} for name, tree in halves.items()}


@dataclass(slots=True)
class OnlineDataConfig:
    """Images and the autoencoder that encodes them while a diffusion model trains.

    It costs the encoder's forward pass in each step; a cache costs it once.  Nothing of the encoder
    trains, and no gradient reaches it.
    """

    images: DataConfig = field(default_factory=DataConfig)
    autoencoder: str = ""  # a workdir, a folder or file in a PyTorch layout, or a hub name
    weights: InitWeights = InitWeights.ema  # which of a run's weights
    variant: str | None = None  # the release, where a bare file leaves it open
    dtype: Dtype = Dtype.float32  # of the encoder's activations
    shape: tuple[int, ...] = ()  # (h, w, c) that is expected; (): whatever the encoder gives

    def problems(self) -> list[str]:
        """All mistakes in these fields, each with its mend."""
        if self.autoencoder:
            return []
        return [
            "data.autoencoder is empty: name the autoencoder that encodes the images (a workdir, "
            "a folder or file, or a hub name), or train on a cache: data=LatentDataConfig(path=...)"
        ]

    @property
    def resolution(self) -> int:
        """Pixels of the side of the images."""
        return self.images.resolution

    def manifest(self) -> Manifest:
        """What a cache of these latents would say; UserError if they do not fit or are not known.

        Means and deviations are () where `latent-stats` did not measure them.
        """
        net = self._net()
        self._check_shape(net.model)
        if net.scaling_factor is None:
            raise UserError(
                f"the scaling factor of {self.autoencoder} is not known ({net.factor_origin}). "
                f"Measure it: python -m dcae_jax latent-stats --from {self.autoencoder}; or train "
                "on a cache, which measures its own: python -m dcae_jax cache-latents"
            )
        path = checkpoint.absolute(self.autoencoder)
        source = pipeline.open_source(self.images)
        measured = net.stats or {"mean": (), "std": ()}
        return Manifest(
            plan=self._plan(net, len(source)),
            autoencoder=str(path) if path.exists() else self.autoencoder,
            weights=self.weights.value, variant=self.variant, description=net.source,
            decoder=net.decoder, model=net.model, dataset=source.name,
            classes=tuple(source.classes), num_classes=max(1, len(source.classes)),
            images=len(source), bad=0, shards=(),
            mean=tuple(measured["mean"]), std=tuple(measured["std"]),
            rms=1 / net.scaling_factor, scaling_factor=net.scaling_factor,
            scaling=net.factor_origin, psnr=0.0, psnr_stored=0.0, psnr_images=0,  # not measured
        )  # fmt: skip

    def encoder(self) -> Tree:
        """The encoder's variables, for `encode`."""
        return self._net().variables

    def abstract_encoder(self) -> Tree:
        """Their shapes; of a release without its weights."""
        self._check_shape(self._model())
        return _encoder_half(abstract_variables(self._model()))

    def gaussian(self) -> bool:
        """Whether the latent of an image is a Gaussian."""
        return self._model().gaussian()

    def encode(self, variables: Tree, image: UInt8[Array, "b H W 3"]) -> Moments:
        """The f32 mean and log variance (None: there is none); no gradient flows back."""
        model = dataclasses.replace(self._model(), dtype=self.dtype, conv_dtype=None)
        exact = self.dtype is Dtype.float32  # not TF32, as cached latents are not
        precision = jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()
        with precision:
            found = model.build().apply(variables, to_float(image), method="moments")
        return jax.lax.stop_gradient(found)

    def batches(
        self, *, batch: int, seed: int, start_step: int = 0, shard: Shard = WHOLE
    ) -> BatchIterator:
        """Endless batches of images: see `pipeline.batches`."""
        return self.images.batches(batch=batch, seed=seed, start_step=start_step, shard=shard)

    def eval_batches(self, *, batch: int, n: int, shard: Shard = WHOLE) -> BatchIterator:
        """Exactly n images, masked: see `pipeline.eval_batches`."""
        return self.images.eval_batches(batch=batch, n=n, shard=shard)

    def fingerprint(self) -> str:
        """Digest of the encoder, the images, how they become latents, and their normalisation."""
        found = self.manifest()
        numbers = found.scaling_factor, found.mean, found.std
        return sources.digest(found.plan.digest(), repr(numbers))

    def abstract_batch(self, batch: int) -> AbstractBatch:
        """Shapes and dtypes of a global batch of images."""
        return self.images.abstract_batch(batch)

    def _net(self) -> Frozen:
        return load(self.autoencoder, self.weights, self.variant)

    def _model(self) -> AutoencoderConfig:
        release = releases.named(self.autoencoder)
        return releases.RELEASES[release].config() if release else self._net().model

    def _check_shape(self, model: AutoencoderConfig) -> None:
        found = model.latent_shape(self.resolution, self.resolution)
        if self.shape and tuple(self.shape) != found:
            raise UserError(
                f"{self.autoencoder} gives latents {found} of {self.resolution} px, but the "
                f"network takes {tuple(self.shape)}: set data.images.resolution, task.model, or "
                "data.autoencoder to what fits"
            )

    def _plan(self, net: Frozen, records: int) -> Plan:
        """Everything that decides which latents are seen; its digest names the data of the run."""
        crop = self.images.transform.value
        if self.images.transform is pipeline.Transform.random_resized_crop:
            crop += f"(area={self.images.area}, aspect={self.images.aspect})"
        return Plan(
            encoder=net.encoder, resolution=self.resolution, transform=crop,
            data=self.images.fingerprint(), split=self.images.split,
            positions="encoded while training", images=records,
            shape=net.model.latent_shape(self.resolution, self.resolution),
            moments=net.model.gaussian(), flips=self.images.flip, dtype=Storage.f32,
            compute=self.dtype.value,
            shard_records=records,
        )  # fmt: skip
