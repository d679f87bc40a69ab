"""Latents of images in one safetensors file: written and read one at a time.

A tensor [h, w, channels], f32 and unscaled, for each image, under the image's name; how large it
was and which encoder made it stands in the file's metadata, so that `decode` gives its pixels back.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from etils import epath
from jaxtyping import Float

from dcae_jax import outputs
from dcae_jax.errors import UserError
from dcae_jax.nets import torch_file

FORMAT = "dcae_jax latents 1"
Latent = Float[np.ndarray, "lh lw f"]


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
        try:
            self._spool.write(np.ascontiguousarray(latent, "<f4").tobytes())
            self._spool.flush()
        except OSError as e:
            raise UserError(
                f"the latents, which are collected in {tempfile.gettempdir()}, could not be "
                f"written there: {e.strerror}. Make room, or set TMPDIR to a folder on a larger "
                "disk"
            ) from e
        where = {"dtype": "F32", "shape": latent.shape, "data_offsets": (start, self._spool.tell())}
        self._rows[name] = where
        self._description.sizes[name] = size

    def finish(self, path: epath.Path) -> None:
        """Writes the file in one go, as object stores want it; it is there whole or not at all."""
        header = json.dumps({"__metadata__": self._description.metadata(), **self._rows}).encode()
        header += b" " * (-len(header) % 8)
        self._spool.seek(0)
        with outputs.opened(path) as file:
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
            latent = self.tensors.read(name)
            if not np.isfinite(latent).all():
                raise UserError(
                    f"{self.tensors.path}: the latent of {name!r} holds numbers that are not "
                    "finite; encode the image again"
                )
            yield name, latent, size


@contextlib.contextmanager
def reader(path: epath.Path) -> Iterator[Reader]:
    """Opens a file that `encode` wrote; UserError if it is another kind or incomplete."""
    with contextlib.ExitStack() as stack:
        tensors = stack.enter_context(_opened(path))
        description = _described(path)
        for name, (height, width) in description.sizes.items():
            _check(path, description, tensors, name, (height, width))
        yield Reader(description, tensors)


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[torch_file.TensorFile]:
    """The tensors of the file; what cannot be opened is told as a file of latents."""
    with contextlib.ExitStack() as stack:
        try:
            tensors = stack.enter_context(torch_file.open_tensors(path))
        except UserError as e:
            if not path.is_file():
                raise
            raise UserError(
                f"{path} cannot be read as a file of latents ({e.__cause__ or e}): it is cut or "
                "something else; give a whole file that `python -m dcae_jax encode` wrote"
            ) from e
        yield tensors


def _described(path: epath.Path) -> Description:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    about = header["__metadata__"] if "__metadata__" in header else {}
    if not isinstance(about, dict) or "format" not in about or about["format"] != FORMAT:
        raise UserError(
            f"{path} does not say that it holds {FORMAT!r}; give a file that "
            "`python -m dcae_jax encode` wrote"
        )
    try:
        return _parsed(json.loads(about["latents"]))
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(
            f"{path}: its metadata are not those that `python -m dcae_jax encode` writes "
            f"({type(e).__name__}: {e}); encode the images again"
        ) from e


def _parsed(said: Any) -> Description:
    """The description; ValueError and its like name the first field that cannot be."""
    names = {field.name for field in dataclasses.fields(Description)}
    if not isinstance(said, dict) or said.keys() != names:
        raise ValueError(f"expected the fields {sorted(names)}")
    for name, (fits, meaning) in _FIELDS.items():
        if not fits(said[name]):
            raise ValueError(f"{name} is {said[name]!r}, expected {meaning}")
    for name, size in said["sizes"].items():
        if not (isinstance(size, list) and len(size) == 2 and all(map(_is_positive, size))):
            raise ValueError(f"the size of {name!r} is {size!r}, expected [height, width]")
    return Description(**{**said, "sizes": {k: (h, w) for k, (h, w) in said["sizes"].items()}})


def _is_count(x: object) -> bool:
    return type(x) is int and x >= 0


def _is_positive(x: object) -> bool:
    return type(x) is int and x > 0


def _is_text(x: object) -> bool:
    return isinstance(x, str)


def _is_factor(x: object) -> bool:
    return x is None or (type(x) in (int, float) and 0 < x < float("inf"))


# What each field of the metadata may be; the sizes are looked at one by one.
_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    **{name: (_is_text, "a text") for name in ("source", "encoder", "padding", "dtype")},
    **{name: (_is_positive, "a positive whole number") for name in ("factor", "channels")},
    **{name: (_is_count, "a whole number") for name in ("tile", "overlap")},
    "scaling_factor": (_is_factor, "a positive number or null"),
    "sizes": (lambda x: isinstance(x, dict), "sizes by name"),
}


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
    if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
        raise UserError(f"{path}: {name!r} is no name of a file inside of --out")
