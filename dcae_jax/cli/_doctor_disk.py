"""Of `doctor`: what a folder can do, how quickly, and whether checkpoints find room in it."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator

from etils import epath

from dcae_jax import store
from dcae_jax.cli._doctor_base import GIB, Finding, failed, warning

_SIZE = 32 * 2**20
_PIECES = 4


@contextlib.contextmanager
def made(folder: epath.Path) -> Iterator[None]:
    """The folder with its parents: the first process makes what is missing, and removes it again.

    All processes enter and leave together.  If it cannot be made, the check inside says why.
    """
    from dcae_jax import distributed  # jax: the other checks do without

    missing = _missing(folder) if distributed.is_main() else []
    if missing:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier("doctor: workdir made")
    try:
        yield
    finally:
        distributed.barrier("doctor: workdir left")
        _remove(missing)


@contextlib.contextmanager
def scratch(folder: epath.Path) -> Iterator[epath.Path]:
    """A new folder inside; it and the parents that had to be made are removed at the end."""
    missing = _missing(folder)
    inner = folder / f".doctor-{uuid.uuid4().hex[:12]}"
    try:
        inner.mkdir(parents=True)
        yield inner
    finally:
        with contextlib.suppress(OSError):
            inner.rmtree(missing_ok=True)
        _remove(missing)


def _missing(folder: epath.Path) -> list[epath.Path]:
    """The folder and its parents, as far as they are not there; object stores have none."""
    return (
        [] if store.is_store(folder) else [p for p in (folder, *folder.parents) if not p.exists()]
    )


def _remove(folders: list[epath.Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError, ValueError):  # the latter: not empty
            path.rmdir()


def workdir(folder: epath.Path) -> list[Finding]:
    """Write, read back, list, rename and delete: all that a run does in its workdir."""
    try:
        with scratch(folder) as inner:
            found = _files(inner)
            return found if store.is_store(folder) else [*found, *_local(inner)]
    except OSError as e:
        return [failed("workdir", f"{folder}: {e.strerror or e}", _mend(e))]


def _mend(e: OSError) -> str:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk or your quota is full: make room, or choose another --workdir"
    return "give a --workdir that you may write to (see its owner, and how the disk is mounted)"


def _files(inner: epath.Path) -> list[Finding]:
    """Speeds, and whether what was written is read back, listed and gone when deleted."""
    data = [os.urandom(_SIZE // _PIECES) for _ in range(_PIECES)]
    paths = [inner / f"{i}.bin" for i in range(_PIECES)]
    begin = time.perf_counter()
    for path, piece in zip(paths, data, strict=True):
        _write(path, piece)
    written = time.perf_counter() - begin
    lag = _listed(inner, {p.name for p in paths})
    begin = time.perf_counter()
    back = [path.read_bytes() for path in paths]
    read = time.perf_counter() - begin
    if [_digest(b) for b in back] != [_digest(b) for b in data]:
        mend = "do not train here: the disk, its controller or its network changes what is stored"
        return [failed("workdir", f"{inner.parent} gives back other bytes than written", mend)]
    paths[0].unlink()
    if paths[0].exists():
        mend = "old checkpoints could not be deleted: ask who keeps this storage"
        return [failed("workdir", f"{inner.parent}: a deleted file is still there", mend)]
    value = (
        f"{inner.parent}: wrote {_SIZE / written / 1e6:.0f} MB/s, read {_SIZE / read / 1e6:.0f} "
        f"MB/s, listed {lag}, deleted"
    )
    return [Finding("workdir", value)]


def _write(path: epath.Path, data: bytes) -> None:
    """A whole file; on a disk until the disk has it."""
    if store.is_store(path):
        path.write_bytes(data)
        return
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _listed(inner: epath.Path, names: set[str], seconds: float = 30.0) -> str:
    """How soon a listing shows the new files; runs do not rely on it."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        if names <= {p.name for p in inner.iterdir()}:
            took = time.monotonic() - begin
            return "at once" if took < 1 else f"after {took:.0f} s"
        time.sleep(0.2)
    return f"not within {seconds:.0f} s"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _local(inner: epath.Path) -> list[Finding]:
    """What only disks have: renames, which make a checkpoint whole at once, and locks."""
    before, after = inner / "step.tmp", inner / "step"
    before.mkdir()
    (before / "leaf").write_bytes(b"x")
    before.rename(after)
    if before.exists() or (after / "leaf").read_bytes() != b"x":
        mend = "checkpoints need it: choose a --workdir on another disk"
        return [failed("rename", "a renamed folder is not whole", mend)]
    handle = os.open(inner, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        mend = "nothing keeps a second run out of this workdir: start none (or mount with locks)"
        return [Finding("rename", "folders are renamed whole"), warning("lock", str(e), mend)]
    finally:
        os.close(handle)
    return [Finding("rename", "folders are renamed whole; locks work")]


def cache(folder: str) -> Finding:
    """The folder of compiled programs; a run works without it, but starts slowly."""
    if not folder:
        return warning("compile cache", "switched off", "set JAX_COMPILATION_CACHE_DIR to a folder")
    try:
        with scratch(epath.Path(folder)) as inner:
            (inner / "x").write_bytes(b"x")
    except OSError as e:
        mend = "every start compiles anew: set JAX_COMPILATION_CACHE_DIR to a folder of yours"
        return warning("compile cache", f"{folder}: {e.strerror or e}", mend)
    return Finding("compile cache", f"{folder}: writable")


def space(folder: epath.Path, one: int | None, count: int, there: int) -> Finding:
    """Free space against `count` checkpoints of `one` byte size, of which `there` exist already.

    `one` None: no config says how large they are.
    """
    if store.is_store(folder):
        value = f"{folder} is an object store: no limit known"
        if one is not None:
            value += f"; {_checkpoints(one, count)}"
        return Finding("space", value)
    free = shutil.disk_usage(_existing(folder)).free
    if one is None:
        value = f"{free / GIB:.1f} GiB free; what checkpoints need is unknown: give --config"
        return Finding("space", value)
    need = one * max(1, count - there)
    value = f"{free / GIB:.2f} GiB free; {_checkpoints(one, count)}"
    if there:
        value += f", {there} there already"
    if free < need:
        mend = (
            f"make room for {need / GIB:.2f} GiB, or keep fewer (checkpoint.keep, "
            "checkpoint.keep_every), or choose another --workdir"
        )
        return failed("space", value, mend)
    return Finding("space", value)


def _checkpoints(one: int, count: int) -> str:
    return f"{count} checkpoints of {one / GIB:.3g} GiB need {count * one / GIB:.3g} GiB"


def _existing(folder: epath.Path) -> epath.Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (folder, *folder.parents) if p.exists())
