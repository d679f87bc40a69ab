"""What a command writes: whole files under their final names, nothing of the user's overwritten.

On local disks a file is written beside its place and renamed; object stores show whole files only.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from typing import IO

from absl import logging
from etils import epath

from dcae_jax import store
from dcae_jax.errors import UserError


def new_folder(path: str, option: str) -> epath.Path:
    """The folder that a command will write into; UserError if it holds anything."""
    folder = epath.Path(path).expanduser()
    if folder.exists():
        inside = [p.name for p in folder.iterdir()] if folder.is_dir() else [folder.name]
        _refuse_full(folder, inside, option)
    return folder


def _refuse_full(folder: epath.Path, inside: list[str], option: str) -> None:
    if inside:
        raise UserError(
            f"{option} {folder} is not an empty folder (there is {min(inside)!r}); give a new one, "
            "or empty it"
        )


@contextlib.contextmanager
def claimed(folder: epath.Path, option: str) -> Iterator[None]:
    """As `locked`, for a folder that must be empty; UserError if it is not."""
    with locked(folder, option):
        if not store.is_store(folder):
            _refuse_full(folder, os.listdir(folder), option)  # another one may have come and gone
        yield


@contextlib.contextmanager
def locked(folder: epath.Path, option: str) -> Iterator[None]:
    """Makes the folder and keeps other commands out of it; UserError if one is there already.

    The lock is on the folder itself and dies with the process.  An object store has no locks.
    """
    with _told_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if store.is_store(folder):
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{option} {folder} is in use by another command") from e
        except OSError as e:
            logging.warning("%s cannot be locked (%s): start no second command there", folder, e)
        yield
    finally:
        os.close(handle)


def leftovers(folder: epath.Path) -> list[epath.Path]:
    """What a killed writer of `opened` left there; nobody misses it."""
    if store.is_store(folder) or not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.name.startswith(".") and p.name.endswith(".part")]


def new_file(path: str, suffix: str, option: str) -> epath.Path:
    """The file that a command will write; UserError if it exists or is named otherwise."""
    out = epath.Path(path).expanduser()
    if out.suffix != suffix:
        raise UserError(f"{option} {path} must end with {suffix}")
    if out.exists():
        raise UserError(f"{option} {path} exists; give a new file, or remove it")
    return out


def write(path: epath.Path, data: bytes) -> None:
    """The file, or none and a UserError."""
    with opened(path) as file:
        file.write(data)


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[IO[bytes]]:
    """A file that stands under its name when the block ends well; what was there stays until then.

    UserError where it cannot be written; no part of it stays.
    """
    local = not store.is_store(path)
    place = path.parent / f".{path.name}.{os.getpid()}.part" if local else path
    with _told_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with place.open("wb") as file:
                yield file
            if local:
                os.replace(place, path)
        except BaseException:
            if local:
                with contextlib.suppress(OSError):
                    os.unlink(place)
            raise


def _told_of(path: epath.Path) -> contextlib.AbstractContextManager[None]:
    return told(
        lambda e: (
            f"{path} could not be written: {e.strerror or e}. Make room, or mend what this "
            "says; what was written before is whole"
        )
    )


@contextlib.contextmanager
def told(sentence: Callable[[OSError], str]) -> Iterator[None]:
    """A full disk, a folder of somebody else and their like as a UserError in one sentence."""
    try:
        yield
    except OSError as e:
        raise UserError(sentence(e)) from e
