"""Processes: initialisation, who is main, barriers, and preemption (SIGTERM) that all agree on."""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt64

from dcae_jax import rendezvous
from dcae_jax.errors import UserError
from dcae_jax.rendezvous import Place

EXIT_PREEMPTED = 42  # "saved, start me again": the launchers restart on it
JOIN_SECONDS = 60  # once all have met
HEARTBEAT_SECONDS = 30  # jax's default of 100 lets a run hang too long on a dead process


class Preempted(Exception):
    """SIGTERM arrived; all processes leave their work at the same point and save."""


_meeting: rendezvous.Meeting | None = None  # of the processes of this run, if it has several


def initialize(
    facts: Callable[[], rendezvous.Facts] = dict, mends: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Joins the processes of a run, before any other use of jax.

    Three ways, first match: the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID; a Slurm job step of several tasks; a TPU pod.  Otherwise one process.

    Several processes meet before jax joins them, and compare their `facts` (see
    `rendezvous.Meeting.compare`).
    """
    global _meeting
    place, devices = _from_environment(), None
    if place is None and _in_cluster():
        place, devices = _from_cluster()
    if place is None:
        return
    if place.count > 1:
        _meeting = rendezvous.meet(place)
        _meeting.compare(facts(), mends)
        if place.index:
            rendezvous.wait_for_service(place)
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        place.address, place.count, place.index, local_device_ids=devices,
        cluster_detection_method="deactivate",  # all is known
        initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )  # fmt: skip


def _from_environment() -> Place | None:
    """What JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say."""
    env = os.environ
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [n for n in names if n in env]
    if not given:
        return None
    if len(given) < 3:
        missing = ", ".join(n for n in names if n not in env)
        raise UserError(f"{given[0]} is set but not {missing}; set all three or none")
    count, index = _integer(names[1]), _integer(names[2])
    if not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID = {index} is not in 0..{count - 1}")
    return Place(env[names[0]], count, index)


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as e:
        raise UserError(f"{name} = {os.environ[name]!r} is not a whole number") from e


def _in_cluster() -> bool:
    """Whether this is a Slurm job step of several tasks, or on a machine with TPUs."""
    from jax._src import cloud_tpu_init

    env = os.environ
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return True
    pod = len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or "MEGASCALE_NUM_SLICES" in env
    return pod or (cloud_tpu_init.running_in_cloud_tpu_vm and jax.config.jax_platforms != "cpu")


def _from_cluster() -> tuple[Place | None, Sequence[int] | None]:
    """What jax finds out about Slurm and TPU pods, and which devices are this process's.

    By jax's own detection, which it has no public name for: the meeting must be at the very
    address that it would take.
    """
    from jax._src import clusters

    address, count, index, devices = (
        clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(rendezvous.seconds())
        )
    )  # fmt: skip
    if address is None or count is None or index is None or count == 1:
        return None, None
    return Place(address, count, index), None if _sees_its_own_alone() else devices


def _sees_its_own_alone() -> bool:
    """Whether all devices that this task of Slurm sees are its own.

    jax gives task i of a node the device i, which is wrong for one task a node, and where Slurm
    shows each task one device (--gpus-per-task=1).
    """
    env = os.environ
    one_a_node = env.get("SLURM_NTASKS", "") == env.get("SLURM_STEP_NUM_NODES", "-")
    return one_a_node or len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1


def compare(facts: rendezvous.Facts, mends: Mapping[str, str]) -> None:
    """Raises on all processes where the facts of one differ; see `rendezvous.Meeting.compare`."""
    if _meeting is not None:
        _meeting.compare(facts, mends)


def token() -> str:
    """The same on all processes of a run and new at each start; "" for a single process."""
    return _meeting.token if _meeting else ""


def names() -> dict[int, str]:
    """The processes of this run with their host, by number."""
    if _meeting is None:
        return {0: "this process"}
    return {i: f"process {i} ({card.host})" for i, card in _meeting.cards.items()}


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


def leave(code: int, why: str) -> int:
    """The way out after a failure: `code`, or no return at all where other processes wait for us.

    A process that fails alone must not wait at jax's shutdown barrier: the others hang in a
    collective until it is gone.  They are told `why`, and leave with the same code.
    """
    if _meeting is not None and not _meeting.over:
        _meeting.stop(code, why)
    return code


def settle() -> None:
    """Before an unexpected error is told: if another process is gone, that is its reason.

    Collectives fail a moment before the death behind it is known; then this does not return.
    """
    if _meeting is not None:
        time.sleep(2)


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
