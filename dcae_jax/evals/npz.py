"""Arrays in npz files, and images in them that are larger than memory (ADM's sample batches).

  arr_0 uint8[n h w 3]   images
  arr_1 int[n]           their classes, where they are known

What is written is the same bytes for the same content, and so has the same digest.
"""

import contextlib
import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int, Int64, Shaped, UInt8

from dcae_jax import outputs
from dcae_jax.errors import UserError

IMAGES, LABELS = "arr_0", "arr_1"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of all members
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a member: lengths of its name and of what follows


class Header(NamedTuple):
    """Of an array: what numpy writes before its data."""

    shape: tuple[int, ...]
    dtype: np.dtype
    size: int  # bytes of the header itself


class Npz(NamedTuple):
    """An open npz file."""

    path: epath.Path
    archive: zipfile.ZipFile

    @property
    def keys(self) -> list[str]:
        """The names of its arrays."""
        return [name.removesuffix(".npy") for name in self.archive.namelist()]

    def wrong(self, what: str) -> UserError:
        """The error that says what is wrong with the file."""
        return UserError(f"{self.path}: {what}; make the file anew, or give another one")

    def array(self, key: str) -> Shaped[np.ndarray, "..."]:
        """The whole array."""
        with self.archive.open(f"{key}.npy") as member:
            header = self._read_header(key, member)
            data = member.read()
        return np.frombuffer(data, header.dtype).reshape(header.shape)

    def header(self, key: str) -> Header:
        """What an array is, without reading it."""
        with self.archive.open(f"{key}.npy") as member:
            return self._read_header(key, member)

    def _read_header(self, key: str, member: io.BufferedIOBase) -> Header:
        reads = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        try:
            major, _ = np.lib.format.read_magic(member)
            shape, by_columns, dtype = reads[major - 1](member)
        except (ValueError, IndexError) as e:
            raise self.wrong(f"{key} is no array ({e})") from e
        if dtype.hasobject or (by_columns and len(shape) > 1):
            raise self.wrong(f"{key} holds Python objects, or columns one after another")
        return Header(shape, dtype, member.tell())

    def place(self, key: str) -> int | None:
        """Where in the file the data of an array begin; None if they are compressed."""
        info = self.archive.getinfo(f"{key}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        return info.header_offset + _LOCAL_HEADER.size + sum(lengths) + self.header(key).size


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[Npz]:
    """An npz file to read from; UserError if there is none, or a damaged one."""
    with _told(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        yield Npz(path, archive)


@contextlib.contextmanager
def _told(path: epath.Path) -> Iterator[None]:
    """What can happen to a file while it is read, as a UserError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as e:
        raise UserError(
            f"{path} is no npz file, or a damaged one ({e}); make it anew, or give another one"
        ) from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e


# ----------------------------------------------------------------------------------- images, read


@dataclass(slots=True)
class ImagesNpz:
    """The images of an npz, read from it when they are asked for; for one thread."""

    path: epath.Path
    n: int
    height: int
    width: int
    place: int | None  # of the first pixel in the file; None: compressed
    header: int  # bytes before the first pixel in its member
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)
    _member: io.BufferedIOBase | None = field(default=None, repr=False)

    @property
    def side(self) -> int | None:
        """The resolution of square images."""
        return self.height if self.height == self.width else None

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, "b h w 3"]:
        """Images start ... stop - 1.

        Compressed ones are unpacked from where the last call ended: take them in their order.
        """
        if not 0 <= start < stop <= self.n:
            raise ValueError(f"images {start} to {stop} of {self.n}")
        one = self.height * self.width * 3
        with _told(self.path):
            data = self._bytes(start * one, (stop - start) * one)
            if len(data) < (stop - start) * one:
                raise EOFError(f"it ends within {IMAGES}")
        return np.frombuffer(data, np.uint8).reshape(stop - start, self.height, self.width, 3)

    def _bytes(self, start: int, count: int) -> bytes:
        if self.place is not None:
            with self.path.open("rb") as file:
                file.seek(self.place + start)
                return file.read(count)
        if self._member is None:
            npz = self._open.enter_context(opened(self.path))
            self._member = self._open.enter_context(npz.archive.open(f"{IMAGES}.npy"))
        self._member.seek(self.header + start)
        return self._member.read(count)

    def close(self) -> None:
        """Lets go of a compressed file."""
        self._open.close()
        self._member = None

    def labels(self) -> Int64[np.ndarray, " n"] | None:
        """Their classes, where the file has them."""
        with opened(self.path) as npz:
            if LABELS not in npz.keys:
                return None
            shape, dtype, _ = npz.header(LABELS)
            if shape != (self.n,) or dtype.kind not in "iu":
                raise npz.wrong(
                    f"{LABELS} is {dtype} of shape {shape}, not a class of each of {self.n} images"
                )
            return npz.array(LABELS).astype(np.int64)


def images(path: epath.PathLike) -> ImagesNpz:
    """The images of a file; UserError if there are none."""
    with opened(epath.Path(path).expanduser()) as npz:
        if IMAGES not in npz.keys:
            raise npz.wrong(f"it holds {', '.join(npz.keys) or 'nothing'}, no images ({IMAGES})")
        return images_of(npz)


def images_of(npz: Npz) -> ImagesNpz:
    """The images of an open file that has some."""
    shape, dtype, size = npz.header(IMAGES)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise npz.wrong(f"{IMAGES} is {dtype} of shape {shape}, not uint8 (n, height, width, 3)")
    return ImagesNpz(npz.path, *shape[:3], npz.place(IMAGES), size)


# ------------------------------------------------------------------------------------------ written


class Pictures(NamedTuple):
    """Images that are made while they are written."""

    n: int
    height: int
    width: int
    rows: Iterable[UInt8[np.ndarray, "h w 3"]]
    labels: Int[np.ndarray, " n"] | None = None


def write(
    path: epath.Path, arrays: dict[str, Shaped[np.ndarray, "..."]], pictures: Pictures | None = None
) -> None:
    """Arrays, and images before them, uncompressed; the file is whole or it is not there."""
    with outputs.opened(path) as file, zipfile.ZipFile(file, "w") as archive:
        if pictures is not None:
            _write_images(archive, pictures)
            if pictures.labels is not None:
                arrays = {LABELS: pictures.labels.astype(np.int64), **arrays}
        for key, array in arrays.items():
            with _member(archive, key) as member:
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, key: str) -> Iterator[io.BufferedIOBase]:
    """A further array of an npz, to write to."""
    info = zipfile.ZipInfo(f"{key}.npy", _EPOCH)
    info.external_attr = 0o600 << 16  # what an unzipped file may be used for
    with archive.open(info, "w", force_zip64=True) as member:
        yield member


def _write_images(archive: zipfile.ZipFile, pictures: Pictures) -> None:
    shape, written = (pictures.height, pictures.width, 3), 0
    header = {"descr": "|u1", "fortran_order": False, "shape": (pictures.n, *shape)}
    with _member(archive, IMAGES) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for row in pictures.rows:
            if row.shape != shape or row.dtype != np.uint8:
                raise UserError(
                    f"image {written} is {row.dtype} of shape {row.shape}, the others are uint8 of "
                    f"shape {shape}: an npz holds images of one size"
                )
            member.write(np.ascontiguousarray(row))
            written += 1
    if written != pictures.n:
        raise ValueError(f"{written} images instead of {pictures.n}")
