"""LPIPS, MS-SSIM and rFID of reconstructions, for an evaluator whose config asks for them.

All are of 8-bit pixels, LPIPS and FID as DC-AE's evaluation takes them (evals/protocol.py).  The
weights of the networks are arguments of every program and are read when the evaluator is made.
"""

import enum
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from dcae_jax import score_names, sharding
from dcae_jax.evals import extract, frechet, metrics, protocol
from dcae_jax.evals.base import on_host
from dcae_jax.nets import inception, lpips, weights
from dcae_jax.tree import Tree

Images = UInt8[Array, "b h w 3"]


class LpipsNet(enum.Enum):
    """The network whose features LPIPS compares."""

    off = "off"
    alex = "alex"  # of published scores
    vgg = "vgg"  # of training losses


@runtime_checkable
class Asked(Protocol):
    """The fields of a config that switch scores on."""

    name: str
    n: int
    lpips: LpipsNet
    ms_ssim: bool
    rfid: bool
    nets: str


def names(cfg: Asked) -> tuple[str, ...]:
    """The names of the scores; that of a set of images says how many they are."""
    found = [] if cfg.lpips is LpipsNet.off else [lpips_name(cfg.lpips)]
    found += ["ms_ssim"] if cfg.ms_ssim else []
    return (*found, *([score_names.named("rfid", cfg.n)] if cfg.rfid else []))


def lpips_name(net: LpipsNet) -> str:
    """LPIPS without a further word is that of AlexNet."""
    return "lpips" if net is LpipsNet.alex else f"lpips_{net.value}"


def problems(cfg: Asked, resolution: int) -> list[str]:
    """What images of that size cannot be asked for, and so many of them."""
    least = {}
    if cfg.lpips is not LpipsNet.off:
        least["lpips"] = lpips.NETS[cfg.lpips.value].smallest()
    if cfg.ms_ssim:
        least["ms_ssim"] = metrics.MS_SSIM_LEAST
    found = [
        f"evals: {name} of {cfg.name} needs images of {side} px and more, these have {resolution}; "
        "switch it off, or take a higher resolution"
        for name, side in least.items() if resolution < side
    ]  # fmt: skip
    if cfg.rfid and cfg.n < 2:
        found.append(f"evals: rfid of {cfg.name} needs 2 images and more, but n = {cfg.n}")
    return found


class Perceptual:
    """The scores that a config asks for.  UserError if the file of a network is missing."""

    def __init__(self, cfg: Asked, mesh: Mesh) -> None:
        self._cfg, self._mesh = cfg, mesh
        self._files: dict[str, dict[str, str]] = {}  # what they say of themselves
        params: dict[str, Tree] = {}
        if cfg.lpips is not LpipsNet.off:
            net = lpips.NETS[cfg.lpips.value]
            path = self._find(net.name)
            params["lpips"] = lpips.load(path, net)
        self._extractor = None
        if cfg.rfid:
            self._find(inception.NAME)
            found = {"inception": extract.find_net("inception", cfg.nets or None)}
            preset = protocol.PRESETS["dcae"]
            self._extractor = extract.Extractor({"pool"}, preset, found, mesh)
        self.params = sharding.put_whole(params, mesh)

    def _find(self, name: str) -> epath.Path:
        path = weights.default_path(name)
        path = epath.Path(self._cfg.nets).expanduser() / path.name if self._cfg.nets else path
        self._files[name] = weights.info(name, path)
        return path

    def record(self) -> dict[str, Any]:
        """What the scores depend on beyond the config."""
        return {"nets": self._files} if self._files else {}

    def sums(
        self, params: Tree, original: Images, output: Images, mask: Float[Array, " b"]
    ) -> dict[str, Float[Array, ""]]:
        """Masked sums over the batch of the scores of single images; inside jit."""
        found = {}
        if "lpips" in params:
            x, y = (v.astype(jnp.float32) / 255.0 * 2.0 - 1.0 for v in (output, original))
            net = lpips.NETS[self._cfg.lpips.value]
            found[lpips_name(self._cfg.lpips)] = lpips.lpips(params["lpips"], x, y, net=net)
        if self._cfg.ms_ssim:
            found["ms_ssim"] = metrics.ms_ssim(output, original)
        return {name: metrics.masked_sum(v, mask) for name, v in found.items()}

    def rfid(self) -> "PairFid | None":
        """Sums that are still empty, if FID is asked for."""
        return None if self._extractor is None else PairFid(self._extractor, self._mesh)


class PairFid:
    """FID of outputs to their originals, a batch at a time, in float64 on the host.

    Every process has all features of a batch and adds the same numbers, so each image counts once
    on any mesh and any number of processes.
    """

    def __init__(self, extractor: extract.Extractor, mesh: Mesh) -> None:
        self._extractor, self._mesh = extractor, mesh
        self._sums: list[frechet.Moments] = []  # of originals, of outputs

    def add(self, original: Images, output: Images, mask: Float[np.ndarray, " b"]) -> None:
        """Counts those pairs in whose mask is above zero."""
        pools = [self._extractor.features(x)["pool"] for x in (original, output)]
        found = [pool[mask > 0] for pool in on_host(pools, self._mesh)]
        self._sums = self._sums or [frechet.Moments.zeros(x.shape[1]) for x in found]
        for sums, features in zip(self._sums, found, strict=True):
            sums.add(features)

    def value(self) -> float:
        """The distance of all pairs so far."""
        original, output = self._sums
        return frechet.distance(output.gaussian(), original.gaussian())
