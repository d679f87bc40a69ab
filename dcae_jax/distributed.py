"""Processes: initialisation, who is main, barriers, and preemption (SIGTERM) that all agree on."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import UInt64

from dcae_jax.errors import UserError

EXIT_PREEMPTED = 42  # "saved, start me again": the launchers restart on it
HEARTBEAT_SECONDS = 30  # jax's default of 100 lets a run hang too long on a dead process


class Preempted(Exception):
    """SIGTERM arrived; all processes leave their work at the same point and save."""


def initialize() -> None:
    """Joins the processes of a run, before any other use of jax.

    Three ways, first match: the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID; a Slurm job step of several tasks; a TPU pod.  Otherwise one process.
    """
    env = os.environ
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [n for n in names if n in env]
    if given and len(given) < 3:
        missing = ", ".join(n for n in names if n not in env)
        raise UserError(f"{given[0]} is set but not {missing}; set all three or none")
    if given:
        count, index = _integer(names[1]), _integer(names[2])
        if not 0 <= index < count:
            raise UserError(f"JAX_PROCESS_ID = {index} is not in 0..{count - 1}")
        _join(coordinator_address=env[names[0]], num_processes=count, process_id=index)
    elif int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        _join()
    elif len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or "MEGASCALE_NUM_SLICES" in env:
        _join()


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as e:
        raise UserError(f"{name} = {os.environ[name]!r} is not a whole number") from e


def _join(**kwargs: Any) -> None:
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **kwargs)
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def is_main() -> bool:
    """True on the one process that prints and writes shared files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(ok: bool) -> bool:
    """True if `ok` is true on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(ok).all())


def total(local: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Sums over the processes of numbers below 2^32, exactly."""
    if jax.process_count() == 1:
        return local
    # As 32-bit halves: jax has no 64-bit integers by default.
    halves = np.stack([local >> 32, local & 0xFFFFFFFF]).astype(np.uint32)
    high, low = multihost_utils.process_allgather(halves).astype(np.uint64).sum(axis=0)
    return (high << np.uint64(32)) + low


def from_main(value: float) -> float:
    """The first process's value on all of them, bit by bit."""
    bits = np.array([value], np.float64).view(np.uint64)
    return float(total(bits if is_main() else 0 * bits).view(np.float64)[0])


def leave(code: int) -> int:
    """The way out after a failure: `code`, or no return at all where other processes wait for us.

    A process that fails alone must not wait at jax's shutdown barrier: the others hang in a
    collective until it is gone.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class Preemption:
    """Turns SIGTERM to any process into one decision at the same point of all processes.

    Without jax.distributed a signal handler sets a flag.  With it, JAX's preemption service (whose
    own handler replaces ours in `jax.distributed.initialize`) agrees on a poll that all processes
    have still to reach: every process must poll equally often.
    """

    def __init__(self) -> None:
        self._flag = False
        self._polls = 0
        self._done = False

    def install(self, early: Sequence[int] = ()) -> None:
        """Handles SIGTERM from now on; `early` are those that came before."""
        signal.signal(signal.SIGTERM, self._on_signal)
        self._flag = self._flag or bool(early)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._flag = True
        # Not print(): the signal may have interrupted one, and its buffer cannot be entered twice.
        os.write(2, b"SIGTERM: saving after the current step\n")

    def hand_over(self) -> None:
        """Once jax is initialised: its service gets the signal that came before it."""
        if self._flag and jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """One poll: whether all processes should stop here.  Stays true once it was."""
        self._polls += 1
        if not jax.distributed.is_initialized():
            self._done = self._done or self._flag
        elif not self._done:
            self._done = multihost_utils.reached_preemption_sync_point(self._polls)
        return self._done

    def check(self) -> None:
        """One poll; raises Preempted."""
        if self.requested():
            raise Preempted
