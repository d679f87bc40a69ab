"""Runs main.py as one or several processes on this machine, on its CPU or its GPUs.

  python launch/local.py [OPTIONS] -- --config=FILE:ARG --workdir=DIR [flags of main.py]
  python launch/local.py --processes 2 -- --config=configs/demo.py:phase1 --workdir=runs/two

Process 0 prints as it is, the others behind their number.  A process that fails ends the others.
SIGTERM and Ctrl-C are passed on: the run saves and ends with 42.  A run that is preempted otherwise
(42) or that lost a process (43) is started again.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import common
import xla_flags
from common import LaunchError, say

# What makes main.py the process of another run: of a Slurm step, a pod or a launcher around us.
FOREIGN = (
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES",
)  # fmt: skip
GRACE = 20  # seconds that the others get to end by themselves after one has failed


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The options in front of `--`."""
    p = common.parser(__doc__ or "")
    p.add_argument(
        "--processes", type=common.whole(1), default=1, metavar="N", help="processes (1)"
    )
    p.add_argument(
        "--platform", choices=("auto", "cpu", "gpu"), default="auto",
        help="auto (default): what JAX_PLATFORMS says, else gpu if GPUs are visible, else cpu",
    )  # fmt: skip
    p.add_argument(
        "--devices-per-process", type=common.whole(1), metavar="K",
        help="GPUs, or devices that XLA makes of the CPU (gpu: all shared out; cpu: 1)",
    )  # fmt: skip
    p.add_argument("--port", type=common.PORT, help="where process 0 listens (a free one is taken)")
    p.add_argument("--python", default=sys.executable, help="interpreter (this one)")
    return p.parse_args(argv)


def gpus() -> list[str]:
    """The GPUs that this launcher may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [d.strip() for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        end = names.index("-1") if "-1" in names else len(names)  # CUDA stops there
        return [d for d in names[:end] if d]
    common.require_program(
        "nvidia-smi", "without NVIDIA's driver there is no GPU here; --platform cpu runs without"
    )
    done = common.capture(["nvidia-smi", "-L"])
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise LaunchError(f"`nvidia-smi -L` fails ({said}); mend the driver, or use --platform cpu")
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return [str(i) for i in range(count)]


def platform(asked: str) -> tuple[str, str]:
    """cpu or gpu, and why."""
    if asked != "auto":
        return asked, "--platform"
    if given := os.environ.get("JAX_PLATFORMS", ""):
        for name, words in (("gpu", ("cuda", "gpu")), ("cpu", ("cpu",))):
            if given.split(",")[0] in words:
                return name, f"JAX_PLATFORMS={given}"
        raise LaunchError(
            f"JAX_PLATFORMS={given} asks for neither CPU nor GPUs; unset it, or give --platform "
            "cpu or gpu, which wins"
        )
    by = "nvidia-smi -L"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        by = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
    elif shutil.which("nvidia-smi") is None:
        return "cpu", "there is no nvidia-smi here, so no GPU; --platform gpu insists"
    count = len(gpus())
    return ("gpu" if count else "cpu"), f"{count} GPU(s) visible ({by})"


def devices(args: argparse.Namespace) -> list[list[str]]:
    """The devices of each process."""
    n, k = args.processes, args.devices_per_process
    if args.platform == "cpu":
        return [[str(j) for j in range(k or 1)] for _ in range(n)]
    found = gpus()
    k = k or len(found) // n
    if not k or n * k > len(found):
        raise LaunchError(
            f"{n} processes with {k or 1} GPUs each need {n * (k or 1)}, and {len(found)} are "
            "visible (`nvidia-smi -L`, CUDA_VISIBLE_DEVICES); lower --processes or "
            "--devices-per-process"
        )
    return [found[i * k : (i + 1) * k] for i in range(n)]


def free_port(wanted: int | None) -> int:
    """A port that nobody listens on; the wanted one or a message."""
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", wanted or 0))
        except OSError as e:
            raise LaunchError(
                f"port {wanted} of this machine cannot be used ({e.strerror}); leave --port out "
                "and a free one is taken, or choose another"
            ) from e
        return s.getsockname()[1]


def environments(args: argparse.Namespace, shares: list[list[str]], port: int) -> list[dict]:
    """What each process has in its environment beside what the launcher has."""
    found = []
    for i, share in enumerate(shares):
        env = xla_flags.environment(args.platform, devices_per_process=len(share))
        if args.keep_platforms:
            del env["JAX_PLATFORMS"]
        if args.platform == "gpu":
            # Inside a Slurm job jax would otherwise take one device by SLURM_LOCALID.
            ids = ",".join(str(j) for j in range(len(share)))
            env |= {"CUDA_VISIBLE_DEVICES": ",".join(share), "JAX_LOCAL_DEVICE_IDS": ids}
        if len(shares) > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(len(shares)), "JAX_PROCESS_ID": str(i),
            }  # fmt: skip
        found.append(env)
    return found


def own_environment() -> dict[str, str]:
    """The launcher's, without what would make this a part of another run."""
    return {k: v for k, v in os.environ.items() if k not in FOREIGN}


def printed(command: Sequence[str], env: dict[str, str]) -> str:
    """The command as it can be typed where the launcher was."""
    unset = [w for name in FOREIGN if name in os.environ for w in ("-u", name)]
    return " ".join([*(["env", *unset] if unset else []), common.shell(command, env)])


# Runs the command in its place, which gets SIGTERM when the process of the given number is gone:
# a launcher that is killed by kill -9 leaves nothing behind, and the run saves.  Linux has it.
ENDS_WITH_US = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; exec keeps it
if os.getppid() != int(sys.argv[1]):  # gone before that
    sys.exit(128 + signal.SIGTERM)
os.execvp(sys.argv[2], sys.argv[2:])
"""
# Prints what a process prints behind its number.  A process, not a thread: it outlives the
# launcher, as long as the other does, which could not print, and so not save, into a closed pipe.
PREFIXED = """\
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
for line in sys.stdin.buffer:
    os.write(1, sys.argv[1].encode() + line.rstrip(b"\\n") + b"\\n")
"""


def _python(code: str, *words: str) -> list[str]:
    """A small program of ours; starts fast."""
    return [sys.executable, "-I", "-S", "-c", code, *words]


class Job:
    """The processes of one start: started together, ended together."""

    def __init__(self, command: Sequence[str], envs: Sequence[dict[str, str]]) -> None:
        self.asked_to_stop = False
        self._processes, self._printers = [], []
        if sys.platform == "linux":
            command = _python(ENDS_WITH_US, str(os.getpid()), *command)
        # Ctrl-C reaches the whole process group: the job ignores it, and gets SIGTERM from us.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for i, env in enumerate(envs):
            self._start(command, own_environment() | env, f"[{i}] " if i else "")
        signal.signal(signal.SIGINT, before)

    def _start(self, command: Sequence[str], env: dict[str, str], prefix: str) -> None:
        """One process, and another that prints its output behind a prefix."""
        if not prefix:
            self._processes.append(subprocess.Popen(command, env=env))
            return
        printer = subprocess.Popen(_python(PREFIXED, prefix), stdin=subprocess.PIPE)
        with printer.stdin as pipe:
            self._processes.append(
                subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT)
            )
        self._printers.append(printer)

    def stop(self) -> None:
        """SIGTERM to all that run; the second time they are killed."""
        for p in self._processes:
            if p.poll() is None:
                p.kill() if self.asked_to_stop else p.terminate()
        self.asked_to_stop = True

    def wait(self) -> int:
        """The exit code of the job: that of the first process that did not end with 0."""
        first, deadline = 0, float("inf")
        while running := [p for p in self._processes if p.poll() is None]:
            bad = [p.returncode for p in self._processes if p.returncode]
            if bad and not first:
                first, deadline = bad[0], time.monotonic() + GRACE
            if first != common.EXIT_PREEMPTED and time.monotonic() > deadline:
                say(f"a process ended with {first}: ending the other {len(running)}")
                for p in running:
                    p.kill()
                deadline = float("inf")
            time.sleep(0.1)
        for printer in self._printers:  # what else holds the pipe may go on
            with contextlib.suppress(subprocess.TimeoutExpired):
                printer.wait(timeout=5)
        first = first or next((p.returncode for p in self._processes if p.returncode), 0)
        return _exit_code(first)


def _exit_code(code: int) -> int:
    """A process that was killed from outside (by hand, for memory, by jax) is one that is gone."""
    code = code if code >= 0 else 128 - code
    return common.EXIT_LOST if code in common.EXIT_GONE else code


def main(argv: list[str]) -> int:
    """Starts, waits, starts again; the exit code of the job."""
    own, flags = common.split(argv)
    args = options(own)
    common.require_flags(flags)
    args.keep_platforms = args.platform == "auto" and bool(os.environ.get("JAX_PLATFORMS"))
    args.platform, why = platform(args.platform)
    say(f"platform {args.platform}: {why}")
    shares = devices(args)
    command = common.main_command(args.python, flags, sum(map(len, shares)))
    envs = environments(args, shares, free_port(args.port) if args.processes > 1 else 0)
    for i, env in enumerate(envs):
        print(f"[{i}] {printed(command, env)}", flush=True)
    if args.dry_run:
        return 0
    if shutil.which(args.python) is None:
        raise LaunchError(f"--python {args.python} is no program; give a Python, or leave it out")
    job: list[Job] = []

    def start() -> int:
        if args.processes > 1 and job and args.port is None:  # the old port may still be closing
            envs[:] = environments(args, shares, free_port(None))
        job[:] = [Job(command, envs)]
        return job[0].wait()

    def stop() -> None:
        stopping.set()
        if job:
            job[0].stop()

    stopping = threading.Event()
    with common.on_signals(stop):
        return common.until_done(start, args, stopping.is_set, stopping.wait)


if __name__ == "__main__":
    common.run(main)
