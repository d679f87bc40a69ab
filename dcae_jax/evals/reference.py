"""Reference statistics in npz files: those of pytorch-fid and DC-AE's evaluator, ADM's, our own.

  mu, sigma        of pool_3 features: pytorch-fid, TTUR, DC-AE's evaluator
  mu_s, sigma_s    of spatial features, for sFID: ADM's reference batches, beside mu and sigma
  arr_0, arr_1     images (see `npz`): ADM has 10,000 there, for precision and recall
  dcae_jax         ours, JSON: name, n, resolution, protocol; other tools leave it unread

sigma is divided by n - 1.
"""

import json
import re
from typing import NamedTuple

import numpy as np
from etils import epath

from dcae_jax.config import JSONValue
from dcae_jax.data import latents
from dcae_jax.errors import UserError
from dcae_jax.evals import npz as files
from dcae_jax.evals.frechet import Gaussian
from dcae_jax.evals.npz import ImagesNpz, Npz, Pictures

FORMAT = "dcae_jax.reference/1"
POOL, SPATIAL = 2048, 2023  # features of FID's Inception
_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_OURS = "dcae_jax"
_ASYMMETRY = 1e-4  # of the largest entry: more than sums in float32 leave
_NAME = r"[\w.+-]+"  # stands in brackets in the names of scores


class Reference(NamedTuple):
    """What an npz says of the images that others are compared with."""

    name: str  # its own, else that of the file
    digest: str  # SHA256 of the file
    n: int | None  # images behind the statistics, if there are none in the file; None: not told
    resolution: int | None
    pool: Gaussian | None
    spatial: Gaussian | None
    images: ImagesNpz | None
    protocol: dict[str, JSONValue]  # how the statistics were made; {}: not told


def read(path: epath.PathLike, *, pool: int = POOL, spatial: int = SPATIAL) -> Reference:
    """The reference in a file; UserError says what is wrong with it.

    `pool` and `spatial` are the numbers of features that statistics must have.
    """
    path = epath.Path(path).expanduser()
    with files.opened(path) as npz:
        found = Reference(
            name=path.name.removesuffix(".npz"), digest=latents.sha256_of(path), n=None,
            resolution=None, pool=_read(npz, "pool", pool), spatial=_read(npz, "spatial", spatial),
            images=files.images_of(npz) if files.IMAGES in npz.keys else None, protocol={},
        )  # fmt: skip
        if found.pool is found.spatial is found.images is None:
            raise npz.wrong(
                f"it holds {', '.join(npz.keys) or 'nothing'}, no statistics (mu, sigma) and no "
                f"images ({files.IMAGES})"
            )
        if found.images is not None:
            alone = found.pool is None and found.spatial is None
            found = found._replace(
                n=found.images.n if alone else None, resolution=found.images.side
            )
        return found._replace(**_read_own(npz))


def _read(npz: Npz, what: str, dim: int) -> Gaussian | None:
    """Statistics; None if neither half of them is there."""
    keys = _KEYS[what]
    if missing := [key for key in keys if key not in npz.keys]:
        if len(missing) == 1:
            raise npz.wrong(f"{missing[0]} is missing; {', '.join(npz.keys)} are there")
        return None
    for key, shape in zip(keys, ((dim,), (dim, dim)), strict=True):
        header = npz.header(key)
        if header.shape != shape or header.dtype.kind != "f":
            raise npz.wrong(
                f"{key} is {header.dtype} of shape {header.shape}, but the {what} features are "
                f"{dim}: floating-point numbers of shape {shape} belong there"
            )
    found = Gaussian(*(npz.array(key).astype(np.float64) for key in keys))
    if problem := _problem(found, *keys):
        raise npz.wrong(problem)
    return found


def _problem(of: Gaussian, mean: str, covariance: str) -> str:
    """What is wrong with the numbers of statistics, or ""."""
    for key, values in ((mean, of.mean), (covariance, of.covariance)):
        if bad := int((~np.isfinite(values)).sum()):
            return f"{bad} numbers of {key} are not finite"
    largest = np.abs(of.covariance).max()
    if np.abs(of.covariance - of.covariance.T).max() > _ASYMMETRY * largest:
        return f"{covariance} is not symmetric, so it is no covariance"
    if of.covariance.diagonal().min() < 0:
        return f"{covariance} has negative variances on its diagonal"
    return ""


def _read_own(npz: Npz) -> dict[str, JSONValue]:
    """name, n, resolution and protocol of a file that we wrote; {} of others."""
    if _OURS not in npz.keys:
        return {}
    try:
        value = json.loads(str(npz.array(_OURS)))
        if value["format"] == FORMAT:
            return {key: value[key] for key in ("name", "n", "resolution", "protocol")}
    except (ValueError, KeyError, TypeError) as e:
        raise npz.wrong(f"its key {_OURS} cannot be understood ({e!r})") from e
    raise npz.wrong(f"it is not of the format {FORMAT}, which this version of dcae_jax reads")


def write(
    path: epath.PathLike, *, name: str, n: int, resolution: int,
    protocol: dict[str, JSONValue], pool: Gaussian, spatial: Gaussian | None = None,
    pictures: Pictures | None = None,
) -> None:  # fmt: skip
    """A reference that pytorch-fid and DC-AE's evaluator read; with `spatial` ADM's does too.

    UserError, and no file, if the statistics are no mean and covariance.
    """
    if not re.fullmatch(_NAME, name):
        raise UserError(f"the name of a reference is letters, digits and ._+-, not {name!r}")
    arrays = {}
    for what, found in (("pool", pool), ("spatial", spatial)):
        if found is not None:
            if problem := _problem(found, *_KEYS[what]):
                raise UserError(f"{path} is not written: {problem}")
            arrays |= dict(zip(_KEYS[what], found, strict=True))
    own = {
        "format": FORMAT, "name": name, "n": n, "resolution": resolution, "protocol": protocol
    }  # fmt: skip
    arrays[_OURS] = np.array(json.dumps(own, sort_keys=True))
    files.write(epath.Path(path).expanduser(), arrays, pictures)
