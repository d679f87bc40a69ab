"""How a trial is started: the command line of its process, and the GPUs of its slot."""

import enum
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dcae_jax.errors import UserError


class Kind(enum.Enum):
    """Where trials run."""

    local = "local"
    slurm = "slurm"
    tpu_vm = "tpu_vm"


@dataclass(frozen=True, slots=True)
class Backend:
    """Makes the command of a trial from the flags of main.py."""

    kind: Kind
    root: str  # the folder of main.py and launch/
    launcher: str = ""  # options of the launcher; {slot} and {trial} stand for those of the trial
    processes: int = 1  # of each trial, local
    gpus: tuple[tuple[str, ...], ...] = ()  # of each slot; (): as the environment says

    def command(self, main_flags: Sequence[str], slot: int, trial: str, job_file: str) -> list[str]:
        """The process that runs a trial to its end.

        `job_file`: where a launcher keeps the number of its job; with the same file it joins it.
        """
        options = self._options(slot, trial)
        if self.kind is Kind.local and self.processes == 1 and not options:
            return [sys.executable, os.path.join(self.root, "main.py"), *main_flags]
        if self.kind is Kind.local:
            options = ["--processes", str(self.processes), *options]
        if self.kind is Kind.slurm:
            options = ["--wait", f"--job-file={job_file}", *options]
        script = os.path.join(self.root, "launch", f"{self.kind.value}.py")
        return [sys.executable, script, *options, "--", *main_flags]

    def _options(self, slot: int, trial: str) -> list[str]:
        """Each option of the launcher with slot and trial put in."""
        try:
            words = shlex.split(self.launcher)
        except ValueError as e:
            raise UserError(f"--launcher={self.launcher!r} cannot be read: {e}") from e
        return [w.replace("{slot}", str(slot)).replace("{trial}", trial) for w in words]

    def problem(self, slots: int) -> str:
        """What keeps trials from being started; "" if nothing does."""
        script = os.path.join(self.root, "launch", f"{self.kind.value}.py")
        uses = self.kind is not Kind.local or self.processes > 1 or self.launcher
        if uses and not os.path.isfile(script):
            return f"{script} is not there; run launch/sweep.py from a whole checkout"
        if self.kind is Kind.tpu_vm and slots > 1 and "{" not in self.launcher:
            return (
                f"--slots={slots} with --backend=tpu_vm needs a TPU for each slot; put {{slot}} "
                "into the name, e.g. --launcher='--name=sweep-{slot} ...'"
            )
        each = len(self.gpus[0]) if self.gpus else 0
        if 0 < each < self.processes and "--platform" not in self.launcher:
            return (
                f"--processes={self.processes} of a trial on {each} GPU(s) of its slot; lower "
                "--processes or --slots, or give --launcher='--platform cpu'"
            )
        return ""

    def environment(self, slot: int) -> dict[str, str]:
        """Of the processes of a slot."""
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        env = os.environ | {"PYTHONPATH": path}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[slot])
        return env


def local_gpus() -> list[str]:
    """Names of this machine's GPUs as CUDA_VISIBLE_DEVICES has them; [] without any.

    Those that the environment allows; none where JAX_PLATFORMS leaves GPUs out, or without NVIDIA's
    driver.  UserError if the driver does not answer.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",")]
        end = names.index("-1") if "-1" in names else len(names)  # CUDA stops there
        return [name for name in names[:end] if name]
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or "it prints nothing"
        raise UserError(
            f"nvidia-smi ends with {done.returncode} ({said}); mend the driver, name the GPUs by "
            "CUDA_VISIBLE_DEVICES, or run on the CPU with JAX_PLATFORMS=cpu"
        )
    return done.stdout.split()


def share(gpus: Sequence[str], slots: int) -> tuple[tuple[str, ...], ...]:
    """The same number of GPUs for each slot; () without GPUs.  UserError for more slots than GPUs.

    Left-over GPUs stay idle: trials on unequal numbers could not be compared in time.
    """
    if not gpus:
        return ()
    each = len(gpus) // slots
    if not each:
        raise UserError(
            f"--slots={slots} on {len(gpus)} GPU(s) ({', '.join(gpus)}); give at most "
            f"--slots={len(gpus)}"
        )
    return tuple(tuple(gpus[i * each : (i + 1) * each]) for i in range(slots))
