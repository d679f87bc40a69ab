"""Of `doctor`: what a check finds, how it is printed, and checks that cannot hang or raise."""

import contextlib
import enum
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

GIB = 2**30


class Status(enum.Enum):
    """How bad a finding is; only `failed` changes the exit code."""

    ok = "ok"
    warning = "warning"
    failed = "FAILED"


class Finding(NamedTuple):
    """One line of the report; `mend` says what to do about what is not ok."""

    name: str
    value: str
    status: Status = Status.ok
    mend: str = ""


def warning(name: str, value: str, mend: str) -> Finding:
    """Training works, but slower, or with a risk."""
    return Finding(name, value, Status.warning, mend)


def failed(name: str, value: str, mend: str) -> Finding:
    """Training will not work."""
    return Finding(name, value, Status.failed, mend)


def show(found: Finding, who: str = "") -> None:
    """Prints a finding, with its mend below it; `who` names a process other than the first."""
    print(f"{who}{found.status.value:8s} {found.name:18s} {found.value}", flush=True)
    if found.mend:
        print(f"{who}{'':8s} {'':18s} -> {found.mend}", flush=True)


def attempt(name: str, check: Callable[[], list[Finding]], mend: str) -> list[Finding]:
    """The findings of a check; what it raises is a finding too, with this mend."""
    try:
        return check()
    except Exception as e:  # whatever is broken on this machine
        text = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        return [failed(name, f"{type(e).__name__}: {text}", mend)]


@contextlib.contextmanager
def patience(name: str, seconds: float, mend: str) -> Iterator[None]:
    """Ends the process with a FAILED line where the block takes longer.

    Drivers and collectives that wait for ever cannot be interrupted from Python.
    """

    def give_up() -> None:
        show(failed(name, f"no answer within {seconds:.0f} s; the other checks are left out", mend))
        sys.stdout.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
