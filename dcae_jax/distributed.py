"""Processes: initialisation, who is main, barriers, and preemption (SIGTERM) that all agree on."""

import os
import signal
import sys
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

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


class Preemption:
    """Turns SIGTERM to any process into one decision at the same point of all processes.

    One process: a signal handler sets a flag.  Several: JAX's preemption service (its handler is
    installed by `jax.distributed.initialize`) agrees on a poll that all have still to reach.
    Every process must therefore poll equally often: once per step, evaluation batch, and wait.
    """

    def __init__(self) -> None:
        self._flag = False
        self._polls = 0
        self._done = False

    def install(self) -> None:
        """Handles SIGTERM from now on (single process; call first thing in main)."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._flag = True
        print("SIGTERM: saving after the current step", file=sys.stderr, flush=True)

    def requested(self) -> bool:
        """One poll: whether all processes should stop here.  Stays true once it was."""
        self._polls += 1
        if jax.process_count() == 1:
            self._done = self._done or self._flag
        elif not self._done:
            self._done = multihost_utils.reached_preemption_sync_point(self._polls)
        return self._done

    def check(self) -> None:
        """One poll; raises Preempted."""
        if self.requested():
            raise Preempted
