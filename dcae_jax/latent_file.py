"""Latents of images in one safetensors file: written and read one at a time.

A tensor [h, w, channels], f32 and unscaled, for each image, under the image's name; how large it
was and which encoder made it stands in the file's metadata, so that `decode` gives its pixels back.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from etils import epath
from jaxtyping import Float

from dcae_jax.errors import UserError
from dcae_jax.nets import torch_file

FORMAT = "dcae_jax latents 1"
Latent = Float[np.ndarray, "h w f"]


@dataclass(slots=True)
class Description:
    """What a file of latents says about itself."""

    source: str  # for people: which weights
    encoder: str  # digest of the encoder's weights
    factor: int  # pixels per latent pixel
    channels: int
    scaling_factor: float | None  # the latents are not multiplied by it; None: not known
    padding: str  # how images were padded below and on the right
    dtype: str  # in which the encoder computed
    tile: int  # 0: whole images
    overlap: int
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (height, width)

    def metadata(self) -> dict[str, str]:
        """safetensors allows strings only: one of JSON."""
        return {"format": FORMAT, "latents": json.dumps(dataclasses.asdict(self))}


class Writer:
    """Collects latents in a temporary file: the header, which comes first, needs all shapes."""

    def __init__(self, description: Description, spool: IO[bytes]) -> None:
        self._description, self._spool = description, spool
        self._rows: dict[str, dict[str, object]] = {}

    def add(self, name: str, latent: Latent, size: tuple[int, int]) -> None:
        """One image's latent; `size` is (height, width) of the image without padding."""
        start = self._spool.tell()
        self._spool.write(np.ascontiguousarray(latent, "<f4").tobytes())
        where = {"dtype": "F32", "shape": latent.shape, "data_offsets": (start, self._spool.tell())}
        self._rows[name] = where
        self._description.sizes[name] = size

    def finish(self, path: epath.Path) -> None:
        """Writes the file in one go, as object stores want it."""
        header = json.dumps({"__metadata__": self._description.metadata(), **self._rows}).encode()
        header += b" " * (-len(header) % 8)
        self._spool.seek(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(self._spool, file)

    def __len__(self) -> int:
        return len(self._rows)


@contextlib.contextmanager
def writer(description: Description) -> Iterator[Writer]:
    """A writer whose temporary file goes away at the end."""
    with tempfile.TemporaryFile() as spool:
        yield Writer(description, spool)


@dataclass(frozen=True)
class Reader:
    """An open file of latents."""

    description: Description
    tensors: torch_file.TensorFile

    def __iter__(self) -> Iterator[tuple[str, Latent, tuple[int, int]]]:
        """(name, latent, (height, width) of the image) in the order of the file."""
        for name, size in self.description.sizes.items():
            yield name, self.tensors.read(name), size


@contextlib.contextmanager
def reader(path: epath.Path) -> Iterator[Reader]:
    """Opens a file that `encode` wrote; UserError if it is another kind or incomplete."""
    with torch_file.open_tensors(path) as tensors:
        description = _described(path)
        for name, (height, width) in description.sizes.items():
            _check(path, description, tensors, name, (height, width))
        yield Reader(description, tensors)


def _described(path: epath.Path) -> Description:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    about = header["__metadata__"] if "__metadata__" in header else {}
    if "format" not in about or about["format"] != FORMAT:
        raise UserError(
            f"{path} does not say that it holds {FORMAT!r}; give a file that "
            "`python -m dcae_jax encode` wrote"
        )
    said = json.loads(about["latents"])
    sizes = {name: (height, width) for name, (height, width) in said.pop("sizes").items()}
    return Description(**said, sizes=sizes)


def _check(
    path: epath.Path, about: Description, tensors: torch_file.TensorFile, name: str,
    size: tuple[int, int],
) -> None:  # fmt: skip
    """UserError unless the tensor is there, of the right shape, and its name stays in a folder."""
    wanted = (*(-(-side // about.factor) for side in size), about.channels)
    if name not in tensors.infos:
        raise UserError(f"{path} holds no latent of {name!r}, which its metadata lists")
    info = tensors.infos[name]
    if info.shape != wanted or info.dtype != np.float32:
        raise UserError(
            f"{path}: the latent of {name!r} is {info.dtype}{list(info.shape)}, its metadata say "
            f"float32{list(wanted)}"
        )
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"{path}: the name {name!r} would be written outside of --out")
