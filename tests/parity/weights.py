"""Random weights that numpy alone can make again: a value depends on its path, not on any order.

Read by the tests (JAX) and by make_dcae_fixtures.py (PyTorch), so that no weights are stored.
"""

import zlib

import numpy as np

# What a kernel in front of an RMS norm is multiplied by: see `before_rms`.
SMALL = 0.001


def _generator(path: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(path.encode()))


def weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value of one leaf; `path` as "params/encoder/conv_in/kernel".

    Scales keep activations near 1 through all blocks; statistics are never the defaults 0 and 1.
    """
    g, name = _generator(path), path.rsplit("/", 1)[-1]
    if name == "kernel":
        fan_in = float(np.prod(shape[:-1]))
        return (g.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
    if name == "scale":
        return g.uniform(0.4, 0.9, shape).astype(np.float32)
    if name == "var":
        return g.uniform(0.3, 1.5, shape).astype(np.float32)
    return (0.2 * g.standard_normal(shape)).astype(np.float32)  # bias, mean


def before_rms(path: str, batch_norms: set[str]) -> bool:
    """Whether the kernel at `path` feeds an RMS norm; `batch_norms` are the paths of the others.

    The norm removes the scale of what it gets, so that a kernel larger by 1 % would go unseen.
    Multiplied by SMALL, the mean square is near the norm's eps (1e-5) and the scale counts.
    """
    module = path.removeprefix("params/").removesuffix("/kernel")
    block, _, name = module.rpartition("/")
    return name in ("conv2", "proj", "point") and f"{block}/norm" not in batch_norms


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Inputs and cotangents, by name."""
    return _generator(name).standard_normal(shape).astype(np.float32)


def errors(
    found: dict[str, np.ndarray], tag: str, fixture: dict[str, np.ndarray]
) -> dict[str, float]:
    """max |difference| / max |original| of each value; of "y" and "dx" a sample is stored."""
    result = {}
    for key, value in found.items():
        original, flat = fixture[f"{tag}/{key}"], np.asarray(value)
        if key in ("y", "dx"):
            flat = flat.reshape(-1)[sample(f"{tag}/{key}", flat.size)]
        result[key] = float(np.abs(flat - original).max() / np.abs(original).max())
    return result


def sample(name: str, size: int, count: int = 2000) -> np.ndarray:
    """Sorted positions of the values of a large array that a fixture keeps."""
    return np.sort(_generator(name).choice(size, min(size, count), replace=False))
