"""Images to numbers: scores of pairs and features of frozen networks, on any mesh.

Names of the arrays, one row an image:

    mse ssim ssim_border ms_ssim lpips   of an image and its original
    pool spatial logits                  of an image: Inception's features
    latent_square                        of a latent: the mean of its squared numbers

Each network is one program; its weights are arguments.  Nothing here waits for the devices.
"""

import functools
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from dcae_jax import sharding
from dcae_jax.evals import metrics as metrics_lib
from dcae_jax.evals.protocol import Preset
from dcae_jax.nets import inception, lpips, weights
from dcae_jax.nets.inception import Resize

LPIPS_NET = lpips.NETS["alex"]
PAIRED = ("mse", "ssim", "ssim_border", "ms_ssim", "lpips")
POOLED = ("pool", "spatial")
Images = UInt8[Array, "b h w 3"]


class Net(NamedTuple):
    """The weights file of a frozen network."""

    path: epath.Path
    sha256: str  # of its parameters
    doubt: str | None  # why its scores compare with nobody's; None: they do
    pool: int  # features of Inception; 0 of other networks


FILES = {"inception": inception.NAME, "lpips": "lpips-alex"}  # names of the weights files


def find_net(name: str, folder: str | None) -> Net:
    """A network of `FILES`, in a folder or where import-net puts it; UserError if it is missing."""
    path = weights.default_path(FILES[name])
    if folder is not None:
        path = epath.Path(folder).expanduser() / path.name
    info = weights.info(FILES[name], path)
    return Net(path, info["params_sha256"], weights.doubt(info), _pool(name, info))


def _pool(name: str, info: Mapping[str, str]) -> int:
    """How many features Inception pools; narrow weights for trials say so."""
    if name != "inception":
        return 0
    shapes = inception.abstract_params(int(info.get("divisor", "1")))
    return shapes["fc"]["kernel"].shape[0]


def smallest(metrics: Collection[str]) -> dict[str, int]:
    """The side in pixels that each of these metrics needs, of those that need any."""
    known = {
        "ssim": metrics_lib.WINDOW_SIDE, "ssim-border": metrics_lib.WINDOW_SIDE,
        "ms-ssim": metrics_lib.MS_SSIM_LEAST, "lpips": LPIPS_NET.smallest(),
    }  # fmt: skip
    return {name: known[name] for name in metrics if name in known}


class Extractor:
    """Computes the arrays that are wanted, on the devices of a mesh."""

    def __init__(
        self, arrays: Collection[str], preset: Preset, nets: dict[str, Net], mesh: Mesh
    ) -> None:
        self._arrays, self._preset, self._mesh = frozenset(arrays), preset, mesh
        read = {"inception": inception.load, "lpips": functools.partial(lpips.load, net=LPIPS_NET)}
        self._params = sharding.put_whole(
            {name: read[name](net.path) for name, net in nets.items()}, mesh
        )

    def pairs(self, images: Images, originals: Images) -> dict[str, Float[Array, " b"]]:
        """The scores of each image and its original that are wanted."""
        if self._arrays.isdisjoint(PAIRED):
            return {}
        with jax.set_mesh(self._mesh):
            return _pair_scores(self._params, images, originals, self._arrays & {*PAIRED})

    def features(
        self, images: Images, wanted: Collection[str] | None = None
    ) -> dict[str, Float[Array, "b _"]]:
        """Inception's features that are wanted (of `wanted`, if it is given), f32."""
        wanted = self._arrays if wanted is None else self._arrays.intersection(wanted)
        found = {}
        for resize in Resize:
            names = [n for n in self._names(resize) if n in wanted]
            if names:
                with jax.set_mesh(self._mesh):
                    x = _resized(images, resize=resize)
                    made = _network(self._params["inception"], x)
                found |= {n: getattr(made, n) for n in names}
        return found

    def _names(self, resize: Resize) -> tuple[str, ...]:
        """The features that are taken after this resize."""
        logits = ("logits",) if self._preset.score is resize else ()
        return (*POOLED, *logits) if self._preset.features is resize else logits


_resized = jax.jit(inception.resized, static_argnames="resize")
_network = jax.jit(inception.network)


@functools.partial(jax.jit, static_argnames="arrays")
def _pair_scores(
    params: dict[str, lpips.Params], images: Images, originals: Images, arrays: frozenset[str]
) -> dict[str, Float[Array, " b"]]:
    found = {}
    if "mse" in arrays:
        found["mse"] = metrics_lib.mse(images, originals)
    if "ssim" in arrays:
        found["ssim"] = metrics_lib.ssim(images, originals)
    if "ssim_border" in arrays:
        found["ssim_border"] = metrics_lib.ssim(images, originals, border=True)
    if "ms_ssim" in arrays:
        found["ms_ssim"] = metrics_lib.ms_ssim(images, originals)
    if "lpips" in arrays:
        x, y = (v.astype("float32") / 255.0 * 2.0 - 1.0 for v in (images, originals))
        found["lpips"] = lpips.lpips(params["lpips"], x, y, net=LPIPS_NET)
    return found
