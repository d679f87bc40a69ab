"""The one weights file of frozen networks: safetensors that also says where it came from.

Metadata (all strings): `format`, `net`, `params_sha256`, `published` (yes or no), and the sources
with their SHA256, as `python -m dcae_jax import-net` writes them.  `params_sha256` is over names,
shapes and bytes: it tells weights apart whatever file they were read from, so runs and metrics
record it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from dcae_jax import outputs, tree
from dcae_jax.errors import UserError

FORMAT = "dcae_jax.net"

Params = dict[str, Any]  # nested; the leaves are float32 arrays, or their shapes


def command(name: str, path: epath.Path | None = None) -> str:
    """What to run for the weights of a network, where they are looked for elsewhere too."""
    elsewhere = path is not None and path != default_path(name)
    return f"python -m dcae_jax import-net {name}" + (f" --out {path}" if elsewhere else "")


def default_path(name: str) -> epath.Path:
    """Where `import-net` writes and everything looks: $DCAE_JAX_NETS or the user's cache folder."""
    root = os.environ.get("DCAE_JAX_NETS") or "~/.cache/dcae_jax/nets"
    return epath.Path(root).expanduser() / f"{name.replace('-', '_')}.safetensors"


def save(
    path: epath.PathLike, name: str, params: Params, info: Mapping[str, str]
) -> dict[str, str]:
    """Writes the file of the network `name`; returns its metadata: `info`, what it is, digest."""
    flat = {key: np.ascontiguousarray(leaf) for key, leaf in tree.flatten(params).items()}
    metadata = {**info, "format": FORMAT, "net": name, "params_sha256": _digest(flat)}
    outputs.write(epath.Path(path).expanduser(), safetensors.numpy.save(flat, metadata))
    return metadata


def load(name: str, path: epath.PathLike | None, shapes: Params) -> Params:
    """Parameters of these shapes (numpy; put them on the device once); None: the default path.

    UserError when the file is missing, is of another network, or does not match its own digest.
    """
    place = _place(name, path)
    metadata = info(name, place)
    try:
        flat = safetensors.numpy.load(place.read_bytes())
    except (safetensors.SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"{place} is damaged ({e}). Run: {command(name, place)}") from e
    if metadata.get("params_sha256") != _digest(flat):
        raise UserError(f"{place} is damaged (its digest differs). Run: {command(name, place)}")
    expected = tree.flatten(shapes)
    return tree.unflatten({key: take(flat, key, leaf.shape) for key, leaf in expected.items()})


def info(name: str, path: epath.PathLike | None = None) -> dict[str, str]:
    """What the file says of itself; only its head is read."""
    place = _place(name, path)
    if not place.exists():
        raise UserError(
            f"no weights of {name} at {place}. Make the file with: {command(name, place)}"
        )
    try:
        with place.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(min(length, 1 << 24))).get("__metadata__", {})
    except (ValueError, AttributeError) as e:
        raise UserError(f"{place} is no safetensors file ({e}). Run: {command(name, place)}") from e
    if metadata.get("format") != FORMAT:
        raise UserError(f"{place} was not written by `{command(name, place)}`: run it.")
    if metadata["net"] != name:
        raise UserError(
            f"{place} holds {metadata['net']}, expected {name}. Run: {command(name, place)}"
        )
    return metadata


def doubt(info: Mapping[str, str]) -> str | None:
    """Why scores with these weights compare with no published number; None: they do."""
    if info["published"] == "yes":
        return None
    return info.get("source", "weights from files that are not the published ones")


def take(state: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of a file as float32; UserError if it is missing, another shape or not finite."""
    if name not in state:
        some = ", ".join(sorted(state)[:4])
        raise UserError(f"tensor {name} is missing; the file holds {len(state)}: {some}, ...")
    value = np.asarray(state[name], np.float32)
    if value.shape != shape:
        raise UserError(f"tensor {name} has shape {value.shape}, expected {shape}")
    if not np.isfinite(value).all():
        raise UserError(f"tensor {name} holds NaN or infinity; fetch the file again")
    return value


def _place(name: str, path: epath.PathLike | None) -> epath.Path:
    return default_path(name) if path is None else epath.Path(path).expanduser()


def _digest(flat: Mapping[str, np.ndarray]) -> str:
    """SHA256 over names, shapes and bytes, independent of the order in the file."""
    sha = hashlib.sha256()
    for name in sorted(flat):
        sha.update(f"{name} {flat[name].shape} {flat[name].dtype}".encode())
        sha.update(np.ascontiguousarray(flat[name]).tobytes())
    return sha.hexdigest()
