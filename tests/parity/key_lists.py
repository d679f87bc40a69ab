"""Reads the lists of tensors that make_keys.py wrote; needs no PyTorch."""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "keys"


class Tensor(NamedTuple):
    """One tensor of a PyTorch state dict; `dtype` as safetensors writes it (F32, I64)."""

    dtype: str
    shape: tuple[int, ...]


def read(name: str, layout: str) -> dict[str, Tensor]:
    """The tensors of a release ("f32c32-in") in a layout ("diffusers", "official"), by key.

    A line is `key dtype shape`, the shape as 64,3,3,3 and left out for a scalar.
    """
    found = {}
    for line in (FOLDER / f"{name}.{layout}.txt").read_text().splitlines():
        key, dtype, *shape = line.split(" ")
        found[key] = Tensor(dtype, tuple(int(n) for n in shape[0].split(",")) if shape else ())
    return found
