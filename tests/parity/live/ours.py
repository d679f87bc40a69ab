"""Our side of the live comparison: through the product's own import, names and models."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dcae_jax import tree
from dcae_jax.convert import from_torch, names, to_torch
from dcae_jax.models.layers import Dtype


def imported(folder: Path) -> from_torch.Imported:
    """What `import` makes of a folder that PyTorch has saved, to compute in float32."""
    found = from_torch.load(str(folder))
    found.cfg.dtype = Dtype.float32
    return found


def exported(found: from_torch.Imported, layout: names.Layout, folder: Path) -> None:
    """What `export` makes of it."""
    to_torch.write(
        to_torch.Export(
            found.cfg, found.variables, layout, found.scaling_factor or 1.0, found.source,
            found.release, dtypes=found.dtypes, counters=found.counters,
        ),
        epath.Path(folder),
    )  # fmt: skip


def _moments(cfg: Any, variables: Any, x: np.ndarray) -> jax.Array:
    mean, logvar = cfg.build().apply(variables, x, method="moments")
    return mean if logvar is None else jnp.concatenate([mean, logvar], -1)


def _decode(cfg: Any, variables: Any, z: jax.Array) -> jax.Array:
    return cfg.build().apply(variables, z[..., : cfg.latent_channels], method="decode")


@functools.partial(jax.jit, static_argnums=0)
def encode(cfg: Any, variables: Any, x: np.ndarray) -> jax.Array:
    """The latent of images; of a KL autoencoder its mean, then its log variance."""
    return _moments(cfg, variables, x)


@functools.partial(jax.jit, static_argnums=0)
def decode(cfg: Any, variables: Any, z: np.ndarray) -> jax.Array:
    """The images of latents (of the means)."""
    return _decode(cfg, variables, z)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    cfg: Any, variables: Any, x: np.ndarray, dz: np.ndarray, dy: np.ndarray
) -> tuple[jax.Array, Any]:
    def loss(x: Any, params: Any) -> jax.Array:
        now = {**variables, "params": params}
        z = _moments(cfg, now, x)
        return (z * dz).sum() + (_decode(cfg, now, z) * dy).sum()

    return jax.grad(loss, argnums=(0, 1))(x, variables["params"])


def gradients(
    cfg: Any, variables: Any, x: np.ndarray, dz: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Of sum(latent * dz) + sum(image * dy): by x, and by every weight under PyTorch's key."""
    dx, params = _gradients(cfg, variables, x, dz, dy)
    flat = {f"params/{path}": leaf for path, leaf in tree.flatten(params).items()}
    return np.asarray(dx), as_torch(cfg, flat)


def as_torch(
    cfg: Any, found: Mapping[str, Any], layout: names.Layout = names.Layout.diffusers
) -> dict[str, np.ndarray]:
    """Leaves by path as PyTorch's tensors by key; leaves that are not in `found` are left out."""
    tensors = {}
    for entry in names.table(cfg, layout):
        if entry.path in found:
            parts = names.to_torch(entry, np.asarray(found[entry.path]))
            tensors |= dict(zip(entry.keys, parts, strict=True))
    return tensors


def keys_of(cfg: Any, paths: set[str]) -> list[str]:
    """The keys of diffusers' tensors of some of our leaves."""
    entries = names.table(cfg, names.Layout.diffusers)
    return [key for entry in entries if entry.path in paths for key in entry.keys]


def from_state(
    cfg: Any, state: Mapping[str, np.ndarray], layout: names.Layout = names.Layout.diffusers
) -> Any:
    """Variables of PyTorch's tensors by key, without a file."""
    flat = {
        entry.path: names.from_torch(entry, [state[key] for key in entry.keys])
        for entry in names.table(cfg, layout)
    }
    return tree.unflatten(flat)
