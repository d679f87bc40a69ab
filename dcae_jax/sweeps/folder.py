"""The folder of a sweep, and all that is kept there.  Whole files under fixed names only.

    sweep.json              what the sweep is: base config, trials, metric
    trials/NAME.json        of a trial, written by the scheduler: state, starts
    starts/NAME.N.json      of its N-th start, written by that start's keeper: process, exit code
    runs/NAME/              workdirs
    logs/NAME.N.txt         what start N printed
    jobs/NAME.txt           number of its Slurm job, written by launch/slurm.py
    results.csv  sweep.html

Each file has one writer, but for the last two: the scheduler and --status write them, always anew
and whole, from all the others.  A start reads files by name: a store whose listings lag behind
serves as well.
"""

import dataclasses
import enum
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from dcae_jax import outputs
from dcae_jax.config import JSONValue
from dcae_jax.errors import UserError
from dcae_jax.sweeps.processes import Process

BEAT_SECONDS = 20.0  # between two signs of life in a file
SILENT_SECONDS = 3 * BEAT_SECONDS  # so long without one: gone


class State(enum.Enum):
    """Of a trial."""

    waiting = "waiting"
    running = "running"
    preempted = "preempted"  # or lost: waits to be started again
    done = "done"
    failed = "failed"
    interrupted = "interrupted"  # only shown: was running, and nothing of it lives any more
    pruned = "pruned"  # stopped by the search: not worth its time

    @property
    def ended(self) -> bool:
        """Whether it is never started again by itself."""
        return self in (State.done, State.failed, State.pruned)


@dataclass(slots=True)
class Start:
    """One start of a trial's process."""

    number: int  # from 1
    slot: int
    keeper: Process
    began: float  # seconds since 1970
    pid: int | None = None  # of the trial's process; these follow when it has ended
    exit_code: int | None = None  # None: not known, since its keeper was killed; -9: by signal 9
    ended: float | None = None
    error: str = ""  # the last error that it printed
    reached: int = 0  # the newest step of the run's metrics when it ended
    by_machine: bool = False  # ended by what may be the machine's fault, not the run's


@dataclass(slots=True)
class Record:
    """What the scheduler knows of a trial."""

    name: str
    overrides: dict[str, JSONValue]
    state: State = State.waiting
    starts: list[Start] = field(default_factory=list)
    number: int | None = None  # of the search's trial
    prune: bool = False  # the search has asked it to stop
    forgiven: int = 0  # so many starts do not count any more (--retry-failed)

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`."""
        return dataclasses.asdict(self) | {"state": self.state.value}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Record":
        """The inverse of `to_json`."""
        starts = [Start(**s | {"keeper": Process(**s["keeper"])}) for s in value["starts"]]
        return cls(**value | {"state": State(value["state"]), "starts": starts})


@dataclass(slots=True)
class Kept:
    """What a keeper writes of the start that it keeps."""

    process: Process
    began: float
    beat: int = 0  # counts up while it lives
    exit_code: int | None = None
    ended: float | None = None
    error: str = ""


@dataclass(slots=True)
class Manifest:
    """What the sweep is."""

    config: str  # FILE or FILE:ARG
    overrides: list[str]  # flags for all trials
    sweeps: list[str]
    base: JSONValue  # the resolved config without any trial's overrides
    trials: dict[str, dict[str, JSONValue]]  # name -> overrides, in order
    removed: dict[str, dict[str, JSONValue]] = field(default_factory=dict)  # no longer in the sweep
    scores: list[str] = field(default_factory=list)  # that a run of the config records
    metric: str = ""  # what trials are compared by; "": not named
    better: str = ""  # higher or lower, where it was given
    search: bool = False
    numbers: dict[str, int] = field(default_factory=dict)  # of the search's trials


class Folder:
    """Reads and writes the files of a sweep."""

    def __init__(self, path: str) -> None:
        remote = "://" in path
        self.path = epath.Path(path) if remote else epath.Path(os.path.abspath(path))
        self.remote = remote

    def workdir(self, name: str) -> epath.Path:
        """Of a trial."""
        return self.path / "runs" / name

    def log(self, name: str, number: int) -> epath.Path:
        """What a start printed."""
        return self.path / "logs" / f"{name}.{number}.txt"

    def kept_path(self, name: str, number: int) -> epath.Path:
        """The keeper's file of a start."""
        return self.path / "starts" / f"{name}.{number}.json"

    def job_file(self, name: str) -> str:
        """Where launch/slurm.py keeps the number of a trial's job.

        Of a sweep in an object store: below ~/.cache/dcae_jax, as a plain file is needed.
        """
        if not self.remote:
            return os.fspath(self.path / "jobs" / f"{name}.txt")
        digest = hashlib.sha256(os.fspath(self.path).encode()).hexdigest()[:16]
        return os.path.expanduser(f"~/.cache/dcae_jax/sweeps/{digest}/{name}.txt")

    def manifest(self) -> Manifest | None:
        """None where there is no sweep yet; UserError where none can be."""
        path = self.path / "sweep.json"
        try:
            found = read_json(path)
        except OSError as e:
            raise UserError(
                f"--out {self.path} cannot be read as a folder: {e}; give the folder of a sweep, "
                "or a new one"
            ) from e
        if found is None:
            return None
        try:
            return Manifest(**found)
        except TypeError as e:
            raise UserError(
                f"{path} was not written by this launch/sweep.py ({e}); give another --out"
            ) from e

    def refuse_other(self) -> None:
        """UserError where there are files but no sweep: they belong to something else."""
        if not self.path.exists():
            return
        # A scheduler that was killed before it wrote sweep.json leaves no more than these.
        ours = {"scheduler.json", *(path.name for path in outputs.leftovers(self.path))}
        if names := sorted(path.name for path in self.path.iterdir() if path.name not in ours):
            raise UserError(
                f"--out {self.path} holds no sweep, but other files (there is {names[0]!r}); give "
                "a new or an empty folder"
            )

    def write_manifest(self, manifest: Manifest) -> None:
        """Replaces sweep.json."""
        write_json(self.path / "sweep.json", dataclasses.asdict(manifest))

    def record(self, name: str, overrides: dict[str, JSONValue]) -> Record:
        """Of a trial; a new one where it was never started."""
        found = read_json(self.path / "trials" / f"{name}.json")
        return Record(name, overrides) if found is None else Record.from_json(found)

    def write_record(self, record: Record) -> None:
        """Replaces a trial's file."""
        write_json(self.path / "trials" / f"{record.name}.json", record.to_json())

    def kept(self, name: str, number: int) -> Kept | None:
        """What the keeper of a start wrote; None if it had not come to that."""
        return read_kept(self.kept_path(name, number))

    def lives(self, record: Record) -> bool | None:
        """Whether the newest start still runs; None for one of another machine without an end."""
        start = record.starts[-1]
        here = start.keeper.is_here()
        if here and start.keeper.alive():
            return True
        kept = self.kept(record.name, start.number)
        if kept is not None and kept.ended is not None:
            return False
        if not here:
            return None
        return kept is not None and kept.process.alive()  # its keeper was killed, or never began

    def summary(self, name: str) -> dict[str, Any] | None:
        """summary.json of a trial's workdir, which a run writes at its end."""
        return read_json(self.workdir(name) / "summary.json")


def read_kept(path: epath.Path) -> Kept | None:
    """A keeper's file."""
    found = read_json(path)
    return None if found is None else Kept(**found | {"process": Process(**found["process"])})


def write_kept(path: epath.Path, kept: Kept) -> None:
    """Replaces a keeper's file."""
    write_json(path, dataclasses.asdict(kept))


def read_json(path: epath.Path) -> Any:
    """The content of a file; None if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(
            f"{path} is not JSON ({e}): it was edited or cut short; mend it, or move it away"
        ) from e


def write_json(path: epath.Path, value: JSONValue) -> None:
    """Writes a file whole."""
    outputs.write(path, json.dumps(value, indent=1).encode())


class Silence:
    """Tells whether a counter in a file still moves; by this machine's clock alone."""

    def __init__(self) -> None:
        self._beat: int | None = None
        self._since = time.monotonic()

    def moved(self, beat: int) -> bool:
        """Whether the counter differs from that of the last look; False at the first one."""
        return self._beat is not None and beat != self._beat

    def gone(self, beat: int) -> bool:
        """A look: whether it has not moved for so long that its writer must be gone."""
        if beat != self._beat:
            self._beat, self._since = beat, time.monotonic()
        return time.monotonic() - self._since > SILENT_SECONDS
