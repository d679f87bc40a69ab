"""Starts one trial, waits for it, writes its exit code; lives on when the scheduler is killed.

    python -m dcae_jax.sweeps.keeper RECORD LOG COMMAND...

SIGTERM is passed on.  RECORD is rewritten with a counter while the trial runs.  What a killed trial
leaves in its process group is ended before its end is told: it would still hold the workdir.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from dcae_jax.sweeps import folder, processes
from dcae_jax.sweeps.folder import Kept

_TAIL = 20_000  # bytes of the log in which an error is looked for
_LONGEST = 300  # characters of an error
_SAVING_SECONDS = 120.0  # that what is left of a trial gets to save after SIGTERM


class Keeper:
    """One trial's process, its file and its log."""

    def __init__(self, record: str, log: str) -> None:
        self._record, self._log = epath.Path(record), epath.Path(log)
        self._child: subprocess.Popen[bytes] | None = None
        self._told = False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._told = True
        self._pass_on()

    def _pass_on(self) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGTERM)

    def run(self, command: list[str]) -> None:
        """Starts the trial once its process is written down, and waits for its end."""
        with self._output() as out:
            child = processes.gated(command, os.environ, out)
            kept = Kept(processes.of(child.pid), time.time())
            folder.write_kept(self._record, kept)
            self._child = child
            if self._told:  # before there was anything to pass it on to
                self._pass_on()
            processes.go(child)
            self._wait(child, kept, out)
            self._end_rest(child.pid, kept)
            kept.exit_code, kept.ended = child.returncode, time.time()
            if child.returncode:
                kept.error = last_error(_tail(out.name))
        folder.write_kept(self._record, kept)

    def _wait(self, child: subprocess.Popen[bytes], kept: Kept, out: IO[bytes]) -> None:
        while True:
            try:
                child.wait(folder.BEAT_SECONDS)
                return
            except subprocess.TimeoutExpired:
                kept.beat += 1
                folder.write_kept(self._record, kept)
                self._upload(out)

    def _end_rest(self, leader: int, kept: Kept) -> None:
        """Ends what the trial's process has left in its group: SIGTERM, later SIGKILL."""
        if not processes.group(leader):
            return
        processes.signal_group(leader, signal.SIGTERM)
        end = time.monotonic() + _SAVING_SECONDS
        beaten = time.monotonic()
        while processes.group(leader) and time.monotonic() < end:
            time.sleep(0.2)
            if time.monotonic() - beaten > folder.BEAT_SECONDS:
                beaten = time.monotonic()
                kept.beat += 1
                folder.write_kept(self._record, kept)
        processes.signal_group(leader, signal.SIGKILL)

    @contextlib.contextmanager
    def _output(self) -> Iterator[IO[bytes]]:
        """The log; of a sweep in an object store a local file, which is uploaded now and then."""
        if "://" not in os.fspath(self._log):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with open(self._log, "wb") as out:
                yield out
            return
        with tempfile.NamedTemporaryFile(suffix=".txt") as out:
            yield out
            self._upload(out)

    def _upload(self, out: IO[bytes]) -> None:
        if "://" in os.fspath(self._log):
            with open(out.name, "rb") as source, self._log.open("wb") as target:
                shutil.copyfileobj(source, target)


def _tail(path: str) -> str:
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - _TAIL, 0))
        return file.read().decode(errors="replace")


def last_error(text: str) -> str:
    """The last error in what a process printed; without one, its last line."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    for i in range(len(lines) - 1, -1, -1):
        if re.match(r"error: |(\w+\.)*\w*(Error|Exception)\b", lines[i]):
            # A list of problems follows its heading.
            more = lines[i + 1 :] if lines[i].endswith(":") else []
            return _short(" ".join(" ".join([lines[i], *more]).split()))
    return _short(lines[-1]) if lines else ""


def _short(text: str) -> str:
    """Without its middle, where long paths stand."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 4]} ... {text[-(_LONGEST * 3 // 4) :]}"


if __name__ == "__main__":
    Keeper(sys.argv[1], sys.argv[2]).run(sys.argv[3:])
