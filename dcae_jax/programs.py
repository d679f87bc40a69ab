"""The programs of a run: one compiled train step for each key that `Task.static` gives.

Most runs have one.  Masking has one for each number of visible tokens: all of them are known before
the first step, so that what cannot be traced ends the run there and not days later, and they are
compiled ahead in a thread (XLA releases the interpreter), in the order in which they are needed.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from dcae_jax import distributed
from dcae_jax.report import flops, progress

Executable = Callable[..., Any]
_MIXED = 256  # steps: a stretch with several keys that is no longer is looked at step by step
_LISTED = 8  # programs that a line names


@runtime_checkable
class Keyed(Protocol):
    """What is asked of a task."""

    def static(self, step: int) -> Hashable:
        """See `Task`."""
        ...

    def statics(self, first: int, last: int) -> list[Hashable]:
        """See `Task`."""
        ...


@dataclass(slots=True)
class Stretch:
    """When a program is needed."""

    first: int  # step
    steps: int = 0


def plan(task: Keyed, first: int, last: int) -> dict[Hashable, Stretch]:
    """Each key of the steps first..last-1, in the order of need: its first step, how many it has.

    Halves stretches until `statics` gives one key for each: quick for schedules that change
    seldom, whatever the number of steps.
    """
    found: dict[Hashable, Stretch] = {}

    def add(key: Hashable, at: int, steps: int) -> None:
        found.setdefault(key, Stretch(at)).steps += steps

    def walk(a: int, b: int) -> None:
        keys = task.statics(a, b)
        if len(keys) == 1:
            add(keys[0], a, b - a)
        elif b - a <= _MIXED:
            for k in range(a, b):
                add(task.static(k), k, 1)
        else:
            walk(a, (a + b) // 2)
            walk((a + b) // 2, b)

    if first < last:
        walk(first, last)
    return found


@dataclass(slots=True)
class Row:
    """What is known of one program; sums over the whole run, resumed attempts included."""

    program: str
    flops: int = 0  # of a step, on the jaxpr
    steps: int = 0
    timed_steps: int = 0  # of logged intervals that ran nothing else, and compiled nothing
    seconds: float = 0.0  # that those took, pauses left out

    def ms(self) -> float | None:
        """Milliseconds of a step; None if it was never alone."""
        return 1e3 * self.seconds / self.timed_steps if self.timed_steps else None


class Programs:
    """The executables of a run, ahead of time, so that nothing can retrace; and what they cost.

    On several processes each is compiled when it is needed: there a compile may share work with
    the other processes (autotuning on GPUs does), which must be at the same program then.
    """

    def __init__(
        self, task: Keyed, trace: Callable[[Hashable], Any], mesh: Mesh, clock: progress.Clock,
        carried: Sequence[dict[str, Any]] = (),
    ):  # fmt: skip
        """`trace` gives the traced step of a key; `carried`: `totals` of the attempt before."""
        self._task, self._trace, self._mesh, self._clock = task, trace, mesh, clock
        self._traced: dict[Hashable, Any] = {}
        self._compiled: dict[Hashable, Executable] = {}
        self._ahead: dict[Hashable, Future[Executable]] = {}
        self._pool = ThreadPoolExecutor(1, "compile")
        self._rows = {row["program"]: Row(**row) for row in carried}
        self._quiet = True  # nothing was being compiled when the present interval began

    def start(self, first: int, last: int, poll: Callable[[], None]) -> None:
        """Traces all programs of these steps, compiles the first, begins with the others.

        `poll` is called after each but the first and may raise.
        """
        needed = plan(self._task, first, last)
        now, *later = needed
        with self._clock.pause("compile"):
            with _working(f"tracing {len(needed)} programs", bool(later)):
                for key in needed:
                    self._traced[key] = self._trace(key)
                    count = flops.count_jaxpr(self._traced[key].jaxpr.jaxpr).total
                    self._row(key).flops = count
                    if key != now:
                        poll()
            if later and distributed.is_main():
                progress.say(self._listing(needed))
            with _working(_compiling(now)):
                self._compiled[now] = self._compile(now)
        if jax.process_count() == 1:
            for key in later:
                self._ahead[key] = self._pool.submit(self._compile_ahead, key)
        self._quiet = not later

    def at(self, k: int, running: Any = ()) -> Executable:
        """The executable of step k, which is counted; waits for it if need be.

        `running` (arrays) belong to the step before: they are waited for outside the pause.
        """
        key = self._task.static(k)
        self._row(key).steps += 1
        if key not in self._compiled:
            self._compiled[key] = self._wait(key, running)
        return self._compiled[key]

    def _wait(self, key: Hashable, running: Any) -> Executable:
        future = self._ahead.pop(key, None)
        if future is not None and future.done():
            return future.result()
        jax.block_until_ready(running)
        with self._clock.pause("compile"), _working(_compiling(key)):
            return self._compile(key) if future is None else future.result()

    def _compile(self, key: Hashable) -> Executable:
        with jax.set_mesh(self._mesh):  # it is a thread's own
            return self._traced.pop(key).lower().compile()

    def _compile_ahead(self, key: Hashable) -> Executable:
        try:
            return self._compile(key)
        except Exception as e:  # raised where it is needed, but told now
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            progress.say(f"warning: {_compiling(key)} failed; the run goes on until then: {reason}")
            raise

    def close(self) -> None:
        """Ends the thread; a compile that has begun cannot be interrupted and is waited for."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # ------------------------------------------------------------------------------------- costs

    def logged(self, done: int, interval: progress.Interval) -> float | None:
        """The mean FLOPs of the steps of an interval that ends after `done`; keeps its time."""
        ran = Counter(self._task.static(k) for k in range(done - interval.steps, done))
        if len(ran) == 1 and self._quiet:
            (key,) = ran
            self._row(key).timed_steps += interval.steps
            self._row(key).seconds += interval.seconds
        self._quiet = all(future.done() for future in self._ahead.values())
        if not ran:
            return None
        return sum(n * self._row(key).flops for key, n in ran.items()) / interval.steps

    def totals(self) -> list[dict[str, Any]]:
        """For the checkpoint's meta; nothing for a task with a single program for all steps."""
        return [] if self._rows.keys() <= {str(())} else [asdict(r) for r in self._rows.values()]

    def summary(self) -> list[dict[str, Any]]:
        """The same for summary.json."""
        rows = [Row(**row) for row in self.totals()]
        return [
            {"program": r.program, "steps": r.steps, "ms_per_step": r.ms(), "flops": r.flops}
            for r in rows
        ]

    def table(self) -> list[str]:
        """Lines: what each program cost."""
        rows = [Row(**row) for row in self.totals()]
        if not rows:
            return []
        width = max(len(row.program) for row in rows)
        lines = [f"{'program':{width}s}      steps  ms a step  GFLOP a step"]
        for r in rows:
            ms = "n/a" if r.ms() is None else f"{r.ms():,.2f}"
            lines.append(f"{r.program:{width}s} {r.steps:>10,} {ms:>10s} {r.flops / 1e9:>13,.2f}")
        return lines

    def _row(self, key: Hashable) -> Row:
        return self._rows.setdefault(str(key), Row(str(key)))

    def _listing(self, needed: dict[Hashable, Stretch]) -> str:
        parts = [
            f"{key} from step {stretch.first:,} ({self._row(key).flops / 1e9:,.2f} GFLOP a step)"
            for key, stretch in needed.items()
        ]
        if len(parts) > _LISTED:
            parts[_LISTED - 1 : -1] = ["..."]
        return f"{len(needed)} programs: {', '.join(parts)}"


def _compiling(key: Hashable) -> str:
    return "compiling the train step" + ("" if key == () else f" ({key})")


@contextlib.contextmanager
def _working(what: str, shown: bool = True) -> Iterator[None]:
    with progress.working(what, enabled=shown and distributed.is_main()):
        yield
