"""Runs the trials of a sweep on some slots, whatever happens to it or to them.

Everything it must know is in the sweep's folder: it may be killed at any moment and started again.
A trial runs under a keeper, which outlives the scheduler and writes the exit code.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from dcae_jax.errors import IN_USE
from dcae_jax.report import progress, writers
from dcae_jax.sweeps import processes
from dcae_jax.sweeps.backends import Backend, Kind
from dcae_jax.sweeps.definition import Base, Trial
from dcae_jax.sweeps.folder import Folder, Kept, Record, Silence, Start, State

USAGE = 2  # exit code of main.py; also where an earlier start's process still has the workdir
PREEMPTED, PROCESS_GONE = 42, 43  # those after which a start is sensible
_TERMINATED, _KILLED = (-15, 143), (-9, 137)  # by a signal; as Python and as shells tell it
_TRIES = 4  # starts in a row that end by what may be the machine's fault, and come no further
_LONGEST_PAUSE = 300.0  # seconds
_POLL_SECONDS = 0.2
_STATUS_SECONDS = 60.0
# Between two looks of a search at the metrics of running trials; on a disk, in a store.
_LOOK_SECONDS, _LOOK_SECONDS_REMOTE = 2.0, 20.0


@runtime_checkable
class Search(Protocol):
    """What chooses trials as it goes (`search.py`)."""

    count: int  # of trials in the end

    def ask(self) -> tuple[Trial, int, int] | None: ...  # with its number and its steps
    def stop_early(self, record: Record) -> bool: ...
    def tell(self, record: Record) -> None: ...


@dataclass(slots=True)
class Limits:
    """How often, and when, a trial is started again."""

    restarts: int = 100  # of one trial
    backoff: float = 10.0  # seconds before a trial that lost a process starts again; then doubled


@dataclass(slots=True)
class Running:
    """A trial's start that has not ended, as far as is known."""

    record: Record
    child: subprocess.Popen[bytes] | None  # None: of an earlier scheduler
    silence: Silence = field(default_factory=Silence)
    told: bool = False  # SIGTERM was sent

    @property
    def start(self) -> Start:
        """The one that runs."""
        return self.record.starts[-1]


class Scheduler:
    """The loop and its state."""

    def __init__(
        self, folder: Folder, base: Base, backend: Backend, slots: int, limits: Limits, *,
        records: Mapping[str, Record], steps: Mapping[str, int], removed: Mapping[str, Record],
        search: Search | None = None, changed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._folder, self._base, self._backend = folder, base, backend
        self._slots, self._limits, self._search = slots, limits, search
        self.records = dict(records)
        self._steps = dict(steps)  # of each trial's run
        self._removed = dict(removed)
        self._changed = changed  # is called when a trial has ended
        self._running: dict[str, Running] = {}
        self._not_before: dict[str, float] = {}  # by the monotonic clock
        self._stops = 0  # signals that asked for an end
        self._said = self._looked = time.monotonic()

    # ------------------------------------------------------------------------------- the loop

    def run(self) -> int:
        """Until no trial is left; 0 if all are done, 1 if some failed, 42 after a signal."""
        with self._signals():
            self._adopt()
            while True:
                self._collect()
                if self._stops:
                    self._stop_trials()
                    if not self._running or self._stops > 1:
                        break
                elif not self._fill() and not self._running and not self._open():
                    break
                else:
                    self._look()
                self._report()
                time.sleep(_POLL_SECONDS)
        return self._finish()

    def _finish(self) -> int:
        states = [record.state for record in self.records.values()]
        if self._stops and not all(state.ended for state in states):
            if self._running:
                self._say(f"{len(self._running)} trials are still saving; they are left to it")
            self._say("stopped; the same command goes on")
            return PREEMPTED
        return int(State.failed in states)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(number: int, frame: Any) -> None:
            self._stops += 1
            # Not print(): the signal may have interrupted one.
            os.write(2, b"\nstopping: running trials save first (a second signal: at once)\n")

        # What is ignored stays so: that is how nohup works.
        numbers = [
            number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN
        ]  # fmt: skip
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _open(self) -> list[Record]:
        """Trials that still have to run."""
        return [r for r in self.records.values() if not r.state.ended]

    # --------------------------------------------------------------------------------- starting

    def _adopt(self) -> None:
        """Takes over what an earlier scheduler started."""
        for name, record in {**self._removed, **self.records}.items():
            if record.state is not State.running:
                continue
            self._running[name] = Running(record, None)
            self._say(f"{name}: start {len(record.starts)} was running; looking at it")

    def _fill(self) -> bool:
        """Starts trials on free slots; whether any was started."""
        free = set(range(self._slots)) - {r.start.slot for r in self._running.values()}
        started = False
        for _ in range(min(len(free), self._slots - len(self._running))):
            if (record := self._next()) is None:
                break
            slot = self._slot(record, free)
            free.remove(slot)
            self._start(record, slot)
            started = True
        return started

    def _slot(self, record: Record, free: set[int]) -> int:
        """The trial's last slot if it is free: a job or a TPU may still run it there.

        Else one that no other trial comes back to, if there is one.
        """
        if record.starts and record.starts[-1].slot in free:
            return record.starts[-1].slot
        waiting = [r for r in self._open() if r.starts and r.name not in self._running]
        return min(free - {r.starts[-1].slot for r in waiting} or free)

    def _next(self) -> Record | None:
        """A trial that may start now: in order, new ones of a search last."""
        now = time.monotonic()
        for record in self._open():
            if record.name in self._running or self._not_before.get(record.name, 0.0) > now:
                continue
            return record
        if self._search is None or (asked := self._search.ask()) is None:
            return None
        trial, number, steps = asked
        record = Record(trial.name, trial.overrides, number=number)
        self.records[trial.name], self._steps[trial.name] = record, steps
        return record

    def _start(self, record: Record, slot: int) -> None:
        """Starts the keeper of a trial; it begins when it is written down who it is."""
        number = len(record.starts) + 1
        trial = Trial(record.name, record.overrides)
        flags = [
            *self._base.flags(), *trial.flags(), f"--workdir={self._folder.workdir(record.name)}"
        ]  # fmt: skip
        job_file = self._folder.job_file(record.name)
        if self._backend.kind is Kind.slurm:
            os.makedirs(os.path.dirname(job_file), exist_ok=True)
        child = processes.gated(
            [
                sys.executable, "-m", "dcae_jax.sweeps.keeper",
                str(self._folder.kept_path(record.name, number)),
                str(self._folder.log(record.name, number)),
                *self._backend.command(flags, slot, record.name, job_file),
            ],
            self._backend.environment(slot), subprocess.DEVNULL,
        )  # fmt: skip
        record.starts.append(Start(number, slot, processes.of(child.pid), time.time()))
        record.state = State.running
        self._folder.write_record(record)
        processes.go(child)
        self._running[record.name] = Running(record, child)
        again = f", start {number}" if number > 1 else ""
        self._say(f"{record.name}: started on slot {slot}{again}")

    # ------------------------------------------------------------------------------- collecting

    def _collect(self) -> None:
        """Takes note of the trials that have ended."""
        for name, running in list(self._running.items()):
            if self._alive(running):
                if name in self._removed and not running.told:
                    self._tell(running)
                continue
            del self._running[name]
            self._ended(running, self._folder.kept(name, running.start.number))

    def _alive(self, running: Running) -> bool:
        """Whether the start still runs, as far as can be seen from here."""
        if running.child is not None and running.child.poll() is None:
            return True
        lives = self._folder.lives(running.record)
        if lives is not None:
            return lives
        kept = self._folder.kept(running.record.name, running.start.number)
        return not running.silence.gone(kept.beat if kept else -1)

    def _ended(self, running: Running, kept: Kept | None) -> None:
        record, start = running.record, running.start
        if kept is not None:
            start.pid, start.exit_code, start.error = kept.process.pid, kept.exit_code, kept.error
            start.ended = kept.ended
        start.reached = self._newest_step(record.name)
        record.state = self._outcome(running)
        self._folder.write_record(record)
        if record.name in self._removed:
            return
        self._tell_end(record)
        if record.state.ended:
            if self._search is not None:
                self._search.tell(record)
            self._changed()

    def _outcome(self, running: Running) -> State:
        """What becomes of a trial whose start has ended; adds to its error where that helps."""
        record, start = running.record, running.start
        code = start.exit_code
        if code == 0 or (code is None and self._has_finished(record)):
            if code is None:
                start.error = "exit code not known: its keeper was killed; the run is finished"
            return State.done
        if record.prune and code in (PREEMPTED, *_TERMINATED, None):
            return State.pruned
        in_use = code == USAGE and IN_USE in start.error
        again = (PREEMPTED, PROCESS_GONE, *_TERMINATED, *_KILLED)
        if code is not None and code not in again and not in_use:
            return State.failed
        if code in _KILLED:
            start.error = "killed by signal 9: out of memory, or kill -9"
        if code in _TERMINATED:
            start.error = "ended by SIGTERM before it could save"
        if code is None and running.child is not None:
            start.error = "its keeper was killed, or could not start"
        count = len(record.starts) - record.forgiven
        if count > self._limits.restarts:
            start.error = f"started {count} times (--max-restarts); {start.error}"
            return State.failed
        start.by_machine = not running.told and (
            code in (PROCESS_GONE, *_KILLED)
            or in_use
            or (code is None and running.child is not None)
        )
        return self._later(record) if start.by_machine else State.preempted

    def _later(self, record: Record) -> State:
        """After a failure that may be of the machine: again after a pause, but not for ever."""
        row = _in_a_row(record.starts[record.forgiven :])
        if row >= _TRIES:
            record.starts[
                -1
            ].error = f"{row} times in a row without a step more: {record.starts[-1].error}"
            return State.failed
        pause = min(self._limits.backoff * 2 ** (row - 1), _LONGEST_PAUSE)
        self._not_before[record.name] = time.monotonic() + pause
        return State.preempted

    def _newest_step(self, name: str) -> int:
        """Of the metrics of a trial's run; 0 without any."""
        rows = writers.read_metrics(self._folder.workdir(name))
        return rows[-1]["step"] if rows else 0

    def _has_finished(self, record: Record) -> bool:
        """Whether the run has written its summary, at its last step."""
        summary = self._folder.summary(record.name)
        wanted = self._steps.get(record.name, 0)  # 0: no longer in the sweep
        return summary is not None and summary["steps"] >= wanted

    # --------------------------------------------------------------------------------- stopping

    def _stop_trials(self) -> None:
        for running in self._running.values():
            if not running.told:
                self._tell(running)

    def _tell(self, running: Running) -> None:
        """SIGTERM to a trial, which saves; through its keeper if that lives."""
        running.told = True
        keeper = running.start.keeper
        if keeper.is_here() and keeper.alive():
            keeper.send(signal.SIGTERM)
        elif kept := self._folder.kept(running.record.name, running.start.number):
            kept.process.send(signal.SIGTERM)

    def _look(self) -> None:
        """Lets the search end trials that are not worth their time."""
        pause = _LOOK_SECONDS_REMOTE if self._folder.remote else _LOOK_SECONDS
        if self._search is None or time.monotonic() - self._looked < pause:
            return
        self._looked = time.monotonic()
        for running in self._running.values():
            record = running.record
            if record.number is None or running.told or not self._search.stop_early(record):
                continue
            record.prune = True
            self._folder.write_record(record)
            self._say(f"{record.name}: pruned, it saves and ends")
            self._tell(running)

    # ---------------------------------------------------------------------------------- telling

    def _say(self, text: str) -> None:
        states = [record.state for record in self.records.values()]
        total = max(len(states), self._search.count if self._search else 0)
        counts = [f"{sum(s.ended for s in states)}/{total}"]
        if failed := states.count(State.failed):
            counts.append(f"{failed} failed")
        print(f"[{', '.join(counts)}] {text}", flush=True)

    def _tell_end(self, record: Record) -> None:
        start = record.starts[-1]
        log = self._folder.log(record.name, start.number)
        if record.state is State.done:
            took = (
                f"in {progress.duration(start.ended - start.began)}" if start.ended is not None
                else "in an unknown time, since its keeper was killed"
            )  # fmt: skip
            self._say(f"{record.name}: done {took}")
        elif record.state is State.pruned:
            self._say(f"{record.name}: pruned")
        elif record.state is State.failed:
            why = f"exit code {start.exit_code}"
            self._say(f"{record.name}: FAILED, {why}: {start.error or 'no message'}\n    see {log}")
        else:
            pause = self._not_before.get(record.name, 0.0) - time.monotonic()
            when = f" in {progress.duration(pause)}" if pause > 0 else ""
            told = start.exit_code == PREEMPTED
            why = "preempted, saved" if told else start.error or "lost: its processes are gone"
            self._say(f"{record.name}: {why}; starts again{when if not self._stops else ' later'}")

    def _report(self) -> None:
        """Once a minute, how far the running trials are."""
        if time.monotonic() - self._said < _STATUS_SECONDS:
            return
        self._said = time.monotonic()
        for name in self._running:
            self._say(f"{name}: step {self._newest_step(name)} of {self._steps.get(name, '?')}")


def _in_a_row(starts: Sequence[Start]) -> int:
    """How many starts ended by what may be the machine's fault since the run last came further."""
    row = 0
    for i in range(len(starts) - 1, -1, -1):
        if not starts[i].by_machine:
            break
        row += 1
        if starts[i].reached > max((start.reached for start in starts[:i]), default=0):
            break
    return row
