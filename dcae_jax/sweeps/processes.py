"""Processes that outlive the one that started them: identity, a start in two steps, signals.

A process is known by its number and its start time, since numbers are used again.  What is started
by `gated` waits for one line before it does anything, so that it can be written down first: a
starter that is killed in between leaves nothing that runs.
"""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

# The line never comes when the starter dies: the pipe closes and `read` fails.
_GATE = 'read -r go && exec "$@" </dev/null'


@dataclass(frozen=True, slots=True)
class Process:
    """A process of some machine."""

    pid: int
    started: str  # as the system tells it
    host: str

    def is_here(self) -> bool:
        """Whether it is one of this machine: others cannot be asked."""
        return self.host == socket.gethostname()

    def alive(self) -> bool:
        """Whether it still runs; for one of this machine."""
        return bool(self.started) and _start_time(self.pid) == self.started

    def send(self, number: signal.Signals) -> None:
        """A signal, if it still runs here."""
        if self.is_here() and self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def record(self) -> dict[str, Any]:
        """As JSON; `Process(**record)` is the inverse."""
        return {"pid": self.pid, "started": self.started, "host": self.host}


def of(pid: int) -> Process:
    """A process of this machine that runs now."""
    return Process(pid, _start_time(pid), socket.gethostname())


def group(leader: int) -> list[int]:
    """Numbers of the processes that run in a process group of this machine."""
    found = []
    if os.path.isdir("/proc/self"):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
                if int(fields[2]) == leader and fields[0] not in "ZX":
                    found.append(int(name))
        return found
    shown = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True)
    for line in shown.stdout.splitlines():
        pid, leads, state = line.split()
        if int(leads) == leader and not state.startswith("Z"):
            found.append(int(pid))
    return found


def signal_group(leader: int, number: signal.Signals) -> None:
    """A signal to all of a process group, if there is any."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


def _start_time(pid: int) -> str:
    """When a process began; "" for one that is gone, or has ended and waits to be collected."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return ""
    shown = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    state, _, started = shown.partition(" ")
    return "" if not shown or state.startswith("Z") else started.strip()


def gated(
    command: Sequence[str], env: Mapping[str, str], out: int | IO[Any] | None
) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own, where it waits for `go`."""
    return subprocess.Popen(
        ["sh", "-c", _GATE, "sh", *command], stdin=subprocess.PIPE, stdout=out,
        stderr=subprocess.STDOUT, env=dict(env), start_new_session=True,
    )  # fmt: skip


def go(process: subprocess.Popen[bytes]) -> None:
    """Lets what `gated` started begin."""
    with contextlib.suppress(BrokenPipeError):  # it was killed: its end is seen elsewhere
        process.stdin.write(b"go\n")
        process.stdin.close()
