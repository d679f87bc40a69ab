"""The folder that a command fills: made before the work, known as unfinished until all is there.

config.json is what a command writes last.  Until then a note in the folder says that it is
unfinished, so that the same command may start it anew and no other takes it for whole.
"""

import contextlib
import shutil
from collections.abc import Iterator

from etils import epath

from dcae_jax import outputs, store
from dcae_jax.errors import UserError

CONFIG, UNFINISHED = "config.json", "unfinished.txt"
_NOTE = "What writes this folder has not finished; run the same command again to start it anew.\n"
_SPARE = 2**20  # bytes beside the tensors: headers, metadata


@contextlib.contextmanager
def filling(out: epath.Path, ours: tuple[str, ...]) -> Iterator[None]:
    """Makes `out`, which must be new or empty, and takes it away again if nothing was written.

    No other command can fill it meanwhile; an object store has no such locks.
    `ours`: names of what is written beside config.json; left by a run that did not finish, they
    are replaced.
    """
    refuse_existing(out, ours)
    absent = [] if store.is_store(out) else [p for p in (out, *out.parents) if not p.exists()]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with outputs.locked(out, "--out"):
        refuse_existing(out, ours)  # another command may have come and gone
        try:
            with writing(out):
                (out / UNFINISHED).write_text(_NOTE)
                _remove(out, ours)
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                _withdraw(out, absent)
            raise
        (out / UNFINISHED).unlink(missing_ok=True)


def refuse_existing(out: epath.Path, ours: tuple[str, ...] = ()) -> None:
    """UserError if something is there already that is not ours to replace."""
    inside = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if (out.is_dir() and not inside) or (UNFINISHED in inside and inside <= {UNFINISHED, *ours}):
        return
    if out.exists():
        incomplete = CONFIG not in inside and bool({UNFINISHED, "checkpoints"} & inside)
        why = "has no config.json: its writer did not finish" if incomplete else "is not empty"
        raise UserError(f"--out {out} exists and {why}; give a new folder, or remove it first")


def is_unfinished(path: epath.Path) -> bool:
    """Whether a command began to write this folder and did not end."""
    begun = (path / UNFINISHED).exists() or (path / "checkpoints").is_dir()
    return begun and not (path / CONFIG).exists()


def writing(out: epath.Path) -> contextlib.AbstractContextManager[None]:
    """Turns what a disk refuses into one sentence."""
    return outputs.told(
        lambda e: (
            f"--out {out} cannot be written ({e}); make room or mend what this says and run "
            "the same command again, or give another folder"
        )
    )


def require_room(out: epath.Path, size: int) -> None:
    """UserError if the disk has no room for `size` bytes of tensors."""
    if store.is_store(out):
        return
    free, need = shutil.disk_usage(out).free, size + _SPARE
    if free < need:
        raise UserError(
            f"the disk of --out {out} has {free / 2**20:.0f} MiB free, and {need / 2**20:.0f} MiB "
            "will be written; make room, or give a folder on another disk"
        )


def _remove(out: epath.Path, names: tuple[str, ...]) -> None:
    for path in (out / name for name in names):
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def _withdraw(out: epath.Path, made: list[epath.Path]) -> None:
    """Removes a folder without content, and the folders above that were made with it."""
    if {p.name for p in out.iterdir()} <= {UNFINISHED}:
        (out / UNFINISHED).unlink(missing_ok=True)
        for path in made:
            path.rmdir()
