"""One scheduler at a time in a sweep: by a lock, or in an object store by signs of life."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from etils import epath

from dcae_jax import outputs
from dcae_jax.errors import UserError
from dcae_jax.sweeps import folder, processes
from dcae_jax.sweeps.folder import Folder, Silence
from dcae_jax.sweeps.processes import Process

_NAME = "scheduler.json"
_LOOK_SECONDS = 1.0  # between two looks at a scheduler of another machine


@contextlib.contextmanager
def claimed(place: Folder) -> Iterator[None]:
    """Keeps a second scheduler out of the folder; UserError if there is one."""
    if not place.remote:
        with outputs.locked(place.path, "--out"):
            yield
        return
    # Two that start within a second may both come in: a store has no locks.
    path, ended = place.path / _NAME, threading.Event()
    _refuse_living(place.path)
    _sign(path, 0, False)
    beating = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        _sign(path, -1, True)


def _beat(path: epath.Path, ended: threading.Event) -> None:
    """Rewrites the file with a counter until the end."""
    beat = 0
    while not ended.wait(folder.BEAT_SECONDS):
        beat += 1
        _sign(path, beat, False)


def _sign(path: epath.Path, beat: int, ended: bool) -> None:
    me = processes.of(os.getpid()).record()
    folder.write_json(path, {"process": me, "beat": beat, "ended": ended})


def _refuse_living(path: epath.Path) -> None:
    """UserError if another scheduler lives; one of another machine is watched for a while."""
    silence, told = Silence(), False
    while True:
        found = folder.read_json(path / _NAME)
        if found is None or found["ended"]:
            return
        other = Process(**found["process"])
        lives = other.is_here() and other.alive()
        if lives or (told and silence.moved(found["beat"])):
            raise UserError(
                f"--out {path} is in use by process {other.pid} on {other.host}; stop it first"
            )
        if other.is_here() or silence.gone(found["beat"]):
            return
        if not told:
            print(f"looking whether the sweep's process on {other.host} still lives", flush=True)
            told = True
        time.sleep(_LOOK_SECONDS)
