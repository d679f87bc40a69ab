"""Single images of any size through an autoencoder: padded, tiled or shared by devices, cropped.

uint8 pixels to f32 latents and back: what `reconstruct`, `encode` and `decode` have in common.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from dcae_jax import sharding, tiling
from dcae_jax.autoencoder import Autoencoder
from dcae_jax.config import MeshConfig
from dcae_jax.data.transforms import Pixels
from dcae_jax.errors import UserError
from dcae_jax.evals import metrics
from dcae_jax.latent_file import Latent
from dcae_jax.models.base import AutoencoderConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.tasks.autoencode import to_float
from dcae_jax.tiling import Tiling

# The border repeated costs the latent least: 0 to 0.2 dB better at 15 px than the image mirrored.
PADDING = "edge"
_CHUNK = 2**20  # numbers that are rounded to pixels at once
_KEPT = 64  # compiled shapes that are held at most


@dataclass(slots=True)
class CodecConfig:
    """How images are computed.  The default gives the same numbers on every kind of device."""

    dtype: Dtype = Dtype.float32  # of activations; float32 is float32, without TF32
    tile: int = 0  # pixels of a tile's side; 0: images are done whole
    overlap: int = 0  # pixels that tiles share at least; 0: a quarter of the tile
    spatial: int = 1  # devices that share the height of each image

    def problems(self, devices: int) -> list[str]:
        """All problems that do not depend on the autoencoder, each with its mend."""
        found = []
        if self.tile and self.spatial > 1:
            found.append(
                "--tile and --spatial are two ways to save memory; use --spatial where there are "
                "devices for it (it is exact), else --tile"
            )
        if self.tile < 0 or self.overlap < 0:
            found.append("--tile and --overlap are numbers of pixels, not negative")
        if self.overlap and not self.tile:
            found.append("--overlap is for --tile: give both")
        if not 1 <= self.spatial <= devices:
            found.append(f"--spatial {self.spatial}: there are {devices} device(s) to share images")
        return found

    def tiling(self, factor: int) -> Tiling | None:
        """The tiles for an autoencoder of this factor."""
        if not self.tile:
            return None
        quarter = max(self.tile // 4 // factor, 1) * factor
        return Tiling(self.tile, self.overlap or quarter)


def check(cfg: CodecConfig, devices: int, model: AutoencoderConfig | None = None) -> None:
    """UserError with all problems; without the model, those that can be seen before it is read."""
    found = cfg.problems(devices)
    factor = 1 if model is None else model.factor
    if cfg.tile > 0 and cfg.overlap >= 0:
        found += cfg.tiling(factor).problems(factor)
    if model is not None and model.in_channels != 3:
        found.append(f"the autoencoder is for {model.in_channels} channels; pictures have 3")
    if found:
        raise UserError("\n".join(found))


class Codec:
    """An autoencoder on its devices, with programs that are compiled once for each size."""

    def __init__(
        self, net: Autoencoder, cfg: CodecConfig, say: Callable[[str], None] = print
    ) -> None:
        check(cfg, jax.device_count(), net.cfg)
        self.factor: int = net.cfg.factor
        self.tiling = cfg.tiling(self.factor)
        self._cfg, self._say = cfg, say
        mesh = MeshConfig(data=1, fsdp=1, spatial=cfg.spatial)
        self._mesh = sharding.make_mesh(mesh, jax.devices()[: cfg.spatial])
        self._net = net.placed(self._mesh, cfg.dtype)
        self._compiled: set[tuple[str, tuple[int, ...]]] = set()

    def untiled(self) -> "Codec":
        """The same without tiles."""
        return Codec(self._net, dataclasses.replace(self._cfg, tile=0, overlap=0), self._say)

    def encode(self, image: Pixels) -> Latent:
        """The unscaled latent of an image, padded to the factor below and on the right."""
        x = pad(image, self.factor)
        if self.tiling and self.tiling.splits(*x.shape[:2]):
            return tiling.encode(self._encode, x, self.tiling, self.factor)
        return self._encode(x[None])[0]

    def decode(self, latent: Latent) -> Float[np.ndarray, "H W 3"]:
        """The reconstruction with its padding, near [-1, 1] but not clamped."""
        height, width = (self.factor * side for side in latent.shape[:2])
        if self.tiling and self.tiling.splits(height, width):
            return tiling.decode(self._decode, latent, self.tiling, self.factor)
        return self._decode(latent[None])[0]

    def _encode(self, x: UInt8[np.ndarray, "1 H W 3"]) -> Float[np.ndarray, "1 h w f"]:
        return self._run("encode", x, lambda x: self._net.encode(to_float(x)))

    def _decode(self, z: Float[np.ndarray, "1 h w f"]) -> Float[np.ndarray, "1 H W 3"]:
        return self._run("decode", z, self._net.decode)

    def _run(
        self, name: str, x: Shaped[np.ndarray, "1 a b c"], fn: Callable[[Array], Array]
    ) -> Float[np.ndarray, "1 d e f"]:
        self._announce(name, x.shape)
        with jax.set_mesh(self._mesh), precision(self._cfg.dtype):
            found = np.asarray(fn(sharding.put_batch({"x": x}, self._mesh)["x"]))
        if not np.isfinite(found).all():
            raise UserError(
                f"{name} gave numbers that are not finite, with {self._net.source}: are the "
                "weights whole?" + ("" if self._cfg.dtype is Dtype.float32 else " Try float32.")
            )
        return found

    def _announce(self, method: str, shape: tuple[int, ...]) -> None:
        """Says what is about to be compiled, and forgets old programs when there are many."""
        if (method, shape) in self._compiled:
            return
        if len(self._compiled) == _KEPT:
            jax.clear_caches()
            self._compiled.clear()
        self._compiled.add((method, shape))
        scale = 1 if method == "encode" else self.factor
        height, width = shape[1] * scale, shape[2] * scale
        self._say(f"compiling {method} for {width} x {height} px")
        alone = sharding.replicated_heights(self._net.cfg.heights(height), self._cfg.spatial)
        if alone and method == "encode":
            self._say(
                f"  not shared by {self._cfg.spatial} devices, but computed on each: "
                f"{', '.join(alone)}"
            )


def precision(dtype: Dtype) -> contextlib.AbstractContextManager[None]:
    """Inside, float32 is float32: not TF32 on a GPU, nor bfloat16 passes on a TPU."""
    exact = dtype is Dtype.float32
    return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def pad(image: Pixels, factor: int) -> UInt8[np.ndarray, "H W 3"]:
    """Its last row and column repeated until both sides are multiples of the factor."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, -height % factor), (0, -width % factor), (0, 0)), mode=PADDING)


def to_pixels(x: Float[np.ndarray, "H W 3"], height: int, width: int) -> Pixels:
    """The crop as 8-bit pixels, by the one rule of `metrics.to_uint8`; little on the device."""
    flat = x[:height, :width].reshape(-1)
    parts = [np.asarray(_rounded(part))[:count] for part, count in _chunks(flat)]
    return np.concatenate(parts).reshape(height, width, 3)


@jax.jit
def _rounded(x: Float[Array, " n"]) -> UInt8[Array, " n"]:
    return metrics.to_uint8(x)


def _chunks(flat: Float[np.ndarray, " n"]) -> Iterator[tuple[Float[np.ndarray, " k"], int]]:
    """Parts of one length, so that one program does for all; the last is filled with zeros."""
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        yield np.pad(part, (0, _CHUNK - len(part))), len(part)
