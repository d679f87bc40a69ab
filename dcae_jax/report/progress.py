"""What a person sees while a run goes on: the console line, the clock behind it, live progress.

Free of jax: memory and device counts come in as values.
"""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")
Number = float | int
_ETA_INTERVALS = 20  # the remaining time is told from this many last logging intervals


# ---------------------------------------------------------------------------- the console line


@dataclass(slots=True)
class Status:
    """The numbers of one console line; None prints as n/a."""

    step: int
    total: int
    loss: Number | None = None
    images_per_s: Number | None = None
    devices: int = 1
    mfu: Number | None = None  # 0..1
    mfu_basis: str = ""  # which FLOPs and which peak, e.g. "jaxpr / datasheet"
    data_wait: Number | None = None  # 0..1, share of the training time spent waiting for data
    memory_bytes: Number | None = None  # of the fullest device
    memory_limit_bytes: Number | None = None
    eta_s: Number | None = None
    checkpoint_age_s: Number | None = None


@dataclass(slots=True)
class ConsoleLine:
    """Formats one line per logging interval.

    `extra` are names of further scalars, shown after the loss in that order by the last part of
    their names; one that is missing prints n/a.
    """

    extra: tuple[str, ...] = ()

    def format(self, status: Status, scalars: Mapping[str, Number]) -> str:
        """E.g. `step 1200/5000 24% | loss 0.1234 | 45.3 img/s (5.7/dev) | MFU 41% | ...`."""
        percent = 100 * status.step / max(status.total, 1)
        parts = [f"step {status.step}/{status.total} {percent:.0f}%", f"loss {number(status.loss)}"]
        parts += [f"{name.split('/')[-1]} {number(scalars.get(name))}" for name in self.extra]
        parts += [
            _speed(status),
            f"MFU {share(status.mfu)}" + (f" ({status.mfu_basis})" if status.mfu_basis else ""),
            f"data-wait {share(status.data_wait, 1)}",
            f"mem {memory(status.memory_bytes, status.memory_limit_bytes)}",
            f"ETA {duration(status.eta_s)}",
            f"ckpt {duration(status.checkpoint_age_s)}{_ago(status.checkpoint_age_s)}",
        ]
        return " | ".join(parts)


def _ago(seconds: Number | None) -> str:
    return "" if seconds is None else " ago"


def _speed(status: Status) -> str:
    if status.images_per_s is None:
        return "n/a img/s"
    per_device = status.images_per_s / status.devices
    return f"{_short(status.images_per_s)} img/s ({_short(per_device)}/dev)"


def _short(value: Number) -> str:
    """Three digits: 5.73, 45.3, 1230."""
    return f"{value:.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2}f}"


def number(value: Number | None) -> str:
    """Four significant digits, or n/a; a number that is not finite prints as nan or inf."""
    if value is None:
        return "n/a"
    return f"{value:.4g}" if math.isfinite(value) else str(float(value))


def share(value: Number | None, digits: int = 0) -> str:
    """A fraction as a percentage."""
    return "n/a" if value is None else f"{100 * value:.{digits}f}%"


def memory(used: Number | None, limit: Number | None) -> str:
    """Gigabytes (1e9 bytes): `12.3/80 GB`, `12.3 GB` without a limit."""
    if used is None:
        return "n/a"
    return f"{used / 1e9:.1f} GB" if limit is None else f"{used / 1e9:.1f}/{limit / 1e9:.0f} GB"


def duration(seconds: Number | None) -> str:
    """`0.8s`, `42s`, `3m20s`, `1h02m`, `2d03h`, or n/a."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    if round(seconds, 1) < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes // 1440}d{minutes % 1440 // 60:02d}h"


# ---------------------------------------------------------------------------- the clock


@dataclass(slots=True)
class Interval:
    """What happened between two logging points, pauses left out."""

    steps: int
    seconds: Number
    images_per_s: Number | None
    data_wait: Number | None  # 0..1


@dataclass(slots=True)
class _Pauses:
    count: int = 0
    seconds: float = 0.0


@dataclass
class Clock:
    """Time of a run: training time without pauses, waiting for data, totals, the remaining time.

    `with clock.pause("eval"):` takes a stretch out of images/s (kinds are free: compile, eval,
    checkpoint, images); a pause inside a pause belongs to the outer one.  The device works
    asynchronously: wait for the last step's result before a pause begins, or its time is counted
    as the pause's.  `carried` is `totals()` of the attempt that this one resumes, read from its
    checkpoint, so that totals cover the whole run.
    """

    images_per_step: int
    start_step: int = 0
    devices: int = 1
    cores: int = 1
    carried: Mapping[str, Any] = field(default_factory=dict)
    now: Callable[[], Number] = time.monotonic

    def __post_init__(self) -> None:
        self._begin = self.now()
        self._step = self._first_step = self.start_step
        self._pauses: dict[str, _Pauses] = {}
        self._paused = 0.0
        self._pause_begin: Number | None = None
        self._wait = 0.0
        self._last = (0.0, 0.0)  # training seconds and waiting seconds at the last interval's end
        self._recent: deque[tuple[int, float]] = deque(maxlen=_ETA_INTERVALS)

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Time inside does not count as training time."""
        if self._pause_begin is not None:
            yield
            return
        self._pause_begin = self.now()
        try:
            yield
        finally:
            spent = self.now() - self._pause_begin
            self._pause_begin = None
            self._paused += spent
            record = self._pauses.setdefault(kind, _Pauses())
            record.count += 1
            record.seconds += spent

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Time inside is training time spent on waiting for the next batch."""
        begin = self.train_seconds()
        try:
            yield
        finally:
            self._wait += self.train_seconds() - begin

    def train_seconds(self) -> Number:
        """Seconds of this attempt outside pauses."""
        end = self.now() if self._pause_begin is None else self._pause_begin
        return end - self._begin - self._paused

    def interval(self, step: int) -> Interval:
        """Closes the logging interval that ends after `step` steps and begins the next one."""
        seconds, wait = self.train_seconds() - self._last[0], self._wait - self._last[1]
        steps = step - self._step
        self._last, self._step = (self.train_seconds(), self._wait), step
        if steps <= 0 or seconds <= 0:
            return Interval(steps, seconds, None, None)
        self._recent.append((steps, seconds))
        return Interval(steps, seconds, steps * self.images_per_step / seconds, wait / seconds)

    def eta(self, step: int, total: int, to_come: Mapping[str, int] | None = None) -> Number | None:
        """Seconds until `total` steps, or None before the first interval.

        `to_come` says how many pauses of each kind are still planned; each is taken to last as long
        as the mean of those seen, and a kind that has not been seen yet adds nothing.
        """
        if not self._recent:
            return None
        steps, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        rest = (total - step) * seconds / steps
        for kind, count in (to_come or {}).items():
            seen = self._pauses.get(kind)
            rest += count * seen.seconds / seen.count if seen else 0.0
        return rest

    def totals(self) -> dict[str, Any]:
        """Sums over the whole run, resumed attempts included; JSON, meant for the checkpoint.

        Keys: steps, seconds, train_seconds, wait_seconds, images_per_s, data_wait (0..1),
        device_hours, core_hours, pauses {kind: {count, seconds}}.
        """
        seconds = self.now() - self._begin + self.carried.get("seconds", 0.0)
        train = self.train_seconds() + self.carried.get("train_seconds", 0.0)
        wait = self._wait + self.carried.get("wait_seconds", 0.0)
        steps = self._step - self._first_step + self.carried.get("steps", 0)
        return {
            "steps": steps,
            "seconds": seconds,
            "train_seconds": train,
            "wait_seconds": wait,
            "images_per_s": steps * self.images_per_step / train if train > 0 else None,
            "data_wait": wait / train if train > 0 else None,
            "device_hours": seconds * self.devices / 3600,
            "core_hours": seconds * self.cores / 3600,
            "pauses": self._pause_totals(),
        }

    def _pause_totals(self) -> dict[str, dict[str, Number]]:
        totals = {kind: dict(record) for kind, record in self.carried.get("pauses", {}).items()}
        for kind, record in self._pauses.items():
            sums = totals.setdefault(kind, {"count": 0, "seconds": 0.0})
            sums["count"] += record.count
            sums["seconds"] += record.seconds
        return totals


# ---------------------------------------------------------------------------- live progress

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_BAR_CELLS = 24
_LOCK = threading.RLock()  # one thread at a time writes to the console
_SHOWN: list["Spinner"] = []  # those that draw now, the innermost last


@runtime_checkable
class Stream(Protocol):
    """What is needed of a console or log file."""

    def write(self, text: str, /) -> Any: ...
    def flush(self) -> Any: ...
    def isatty(self) -> bool: ...


class Spinner:
    """A live line on a terminal, or a plain line every `every` seconds in a log file.

    Use `working(...)` or `bar(...)`.  Drawing happens in a thread of its own, so that a compile
    that blocks the main thread still shows its age.
    """

    def __init__(self, what: str, total: int | None, stream: Stream, every: Number) -> None:
        self.what, self.total, self.done = what, total, 0
        self._stream, self._every = stream, every
        self._live = stream.isatty()
        self._begin = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress")

    def advance(self, count: int = 1) -> None:
        """Counts `count` more items as done."""
        self.done += count

    def seconds(self) -> float:
        """Age of this piece of work."""
        return time.monotonic() - self._begin

    def __enter__(self) -> "Spinner":
        with _LOCK:
            _SHOWN.append(self)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._stop.set()
        self._thread.join()
        with _LOCK:
            _SHOWN.remove(self)
            self._clear()
            self._print(f"{self.what}: {_ending(kind)}{duration(self.seconds())}")

    def _run(self) -> None:
        tick = 0
        while not self._stop.wait(0.12 if self._live else self._every):
            with _LOCK:
                if _SHOWN and _SHOWN[-1] is self and not self._stop.is_set():
                    self._draw(tick)
            tick += 1

    def _draw(self, tick: int) -> None:
        if not self._live:
            self._print(f"{self.what}: {self.state()}")
            return
        fraction = self.done / self.total if self.total else None
        middle = "" if fraction is None else f" {_cells(fraction)}"
        frame = _FRAMES[tick % len(_FRAMES)]
        self._stream.write(f"\r\x1b[2K{frame} {self.what}{middle} {self.state()}")
        self._stream.flush()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[2K")

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def state(self) -> str:
        """How far and how long: `120/500 24% 12s, about 38s left`."""
        age = self.seconds()
        if not self.total:
            return duration(age)
        text = f"{self.done}/{self.total} {100 * self.done / self.total:.0f}% {duration(age)}"
        if 0 < self.done < self.total:
            text += f", about {duration(age * (self.total - self.done) / self.done)} left"
        return text


def _ending(kind: Any) -> str:
    """How a piece of work ended; a consumer that leaves a bar early is no failure."""
    if kind is None:
        return ""
    return "stopped after " if kind is GeneratorExit else "failed after "


def _cells(fraction: float) -> str:
    full = min(int(fraction * _BAR_CELLS), _BAR_CELLS)
    return "━" * full + "╌" * (_BAR_CELLS - full)


@contextmanager
def working(
    what: str,
    *,
    total: int | None = None,
    stream: Stream | None = None,
    every: Number = 15.0,
    enabled: bool = True,
) -> Iterator[Spinner | None]:
    """Shows that `what` ("compiling train step") goes on, and how long it took when it is over.

    With `enabled` False (processes other than 0) it shows nothing and yields None.
    """
    if not enabled:
        yield None
        return
    with Spinner(what, total, stream or sys.stdout, every) as spinner:
        yield spinner


def bar(
    items: Iterable[T],
    what: str,
    *,
    total: int | None = None,
    stream: Stream | None = None,
    every: Number = 15.0,
    enabled: bool = True,
) -> Iterator[T]:
    """The items, with a progress bar for `what`; `total` is the length where that is known."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with working(what, total=total, stream=stream, every=every, enabled=enabled) as spinner:
        for item in items:
            yield item
            if spinner is not None:
                spinner.advance()


def say(text: str, stream: Stream | None = None) -> None:
    """Prints a line without garbling a live one (the live line comes back below it)."""
    with _LOCK:
        for spinner in _SHOWN:
            spinner._clear()
        print(text, file=stream or sys.stdout, flush=True)
