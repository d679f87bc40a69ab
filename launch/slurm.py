"""Runs main.py as a job of Slurm: writes a script, submits it with sbatch, follows its output.

  python launch/slurm.py [OPTIONS] -- --config=FILE:ARG --workdir=DIR [flags of main.py]
  python launch/slurm.py --nodes 2 --gpus-per-node 8 --time 24:00:00 -- \\
      --config=configs/dcae_f32c32.py:phase1 --workdir=/shared/runs/f32c32

One process for each GPU, or with --process-per node one for each node.  Before the time limit, and
when Slurm preempts the job, it gets SIGTERM, saves, ends with 42 and is requeued: the same job, the
same workdir.  With --wait (the default) this command ends when the job has, with its exit code; if
it is killed, the job goes on, and the same command typed anew joins it.
"""

import argparse
import hashlib
import pathlib
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import common
import xla_flags
from common import LaunchError, say

POLL = 5  # seconds between questions to the controller
LOST_CONTROLLER = 600  # seconds without an answer of the controller until we give up

SBATCH_SECONDS = 10  # that an sbatch whose launcher was killed may still take
LOGIN = "run this on a login node of the Slurm cluster"

# Folders that every machine has for itself: never shared between nodes.
OWN = ("/tmp", "/var/tmp", "/dev/shm", "/run")

# What sbatch says, and what to do.  Texts of Slurm's slurm_errno.c.
MENDS = (
    ("invalid partition", "`sinfo -s` lists the partitions; choose one with --partition"),
    ("invalid account", "`sacctmgr show associations user=$USER` lists yours; give --account"),
    ("invalid qos", "`sacctmgr show qos` lists them; give --qos or leave it out"),
    ("violates accounting/qos policy", "your quota does not allow this size or time: fewer --nodes,"
     " a shorter --time, or another --qos or --account"),
    ("generic resource", "this partition has no such GPUs: `sinfo -o '%P %G %D'` shows what the "
     "nodes have; mend --gpus-per-node or --partition"),
    ("node configuration is not available", "no node has that many GPUs, CPUs or that much memory: "
     "`sinfo -o '%P %G %c %m'` shows what the nodes have; lower --gpus-per-node, "
     "--cpus-per-process or --mem"),
    ("more processors requested", "lower --cpus-per-process or --processes-per-node"),
    ("requested time limit is invalid", "`sinfo -o '%P %l'` shows the limits; shorten --time"),
    ("unable to contact", "the controller does not answer; is this a login node of the cluster?"),
    ("configuration source", "this machine belongs to no cluster; run this on a login node"),
)  # fmt: skip


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The options in front of `--`."""
    p = common.parser(__doc__ or "")
    p.add_argument("--nodes", type=common.whole(1), default=1, metavar="N", help="machines (1)")
    p.add_argument("--platform", choices=("gpu", "cpu"), default="gpu", help="gpu (default) or cpu")
    p.add_argument("--gpus-per-node", type=common.whole(1), metavar="G", help="GPUs of each node")
    p.add_argument(
        "--process-per", choices=("gpu", "node"), help="with --platform gpu: gpu (default) or node"
    )
    p.add_argument(
        "--processes-per-node", type=common.whole(1), metavar="K", help="with --platform cpu (1)"
    )
    p.add_argument(
        "--cpus-per-process", type=common.whole(1), metavar="C", help="cores of each process"
    )
    for name in ("time", "partition", "account", "qos", "mem"):
        p.add_argument(f"--{name}", metavar=name.upper(), help=f"as sbatch --{name}")
    p.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, e.g. --sbatch=--constraint=h100; repeatable",
    )
    p.add_argument(
        "--shared-workdir", action="store_true",
        help="the nodes share the workdir although it lies below /tmp or the like",
    )  # fmt: skip
    p.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help='a line of the script before the run, e.g. "module load cuda"; repeatable',
    )
    p.add_argument("--name", help="name of the job (from the workdir)")
    p.add_argument("--logs", default="runs/slurm", help="folder of scripts and output (runs/slurm)")
    p.add_argument(
        "--job-file", metavar="FILE",
        help="holds the job's number; while that job is pending or runs, the same command joins it "
        "and submits nothing (in --logs, of the workdir)",
    )  # fmt: skip
    p.add_argument(
        "--port", type=common.PORT, help="where process 0 listens (from the number of the job)"
    )
    p.add_argument(
        "--save-seconds",
        type=common.whole(1),
        default=120,
        metavar="S",
        help="SIGTERM so long before the time limit (120)",
    )
    p.add_argument("--python", default=sys.executable, help="interpreter on the nodes (this one)")
    p.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True,
                   help="wait for the end of the job (default), or only submit it")  # fmt: skip
    return p.parse_args(argv)


def check(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """What can be seen to be wrong before the job is submitted."""
    common.require_flags(flags)
    if args.platform == "gpu" and not args.gpus_per_node:
        raise LaunchError("--gpus-per-node says how many GPUs a node has (or --platform cpu)")
    if args.platform == "cpu" and (args.gpus_per_node or args.process_per):
        given = "--gpus-per-node" if args.gpus_per_node else "--process-per"
        raise LaunchError(
            f"{given} is for GPUs; with --platform cpu, --processes-per-node says how many "
            "processes a node has"
        )
    if args.name is not None and not re.fullmatch(r"[^/%\n]+", args.name):
        raise LaunchError(f"--name {args.name!r} names files: at least a letter, no / and no %")
    if args.platform == "gpu" and args.processes_per_node:
        raise LaunchError("--processes-per-node is for CPUs; GPUs have --process-per gpu or node")
    workdir = common.flag(flags, "workdir")
    if args.nodes > 1 and common.is_local(workdir) and not args.shared_workdir:
        full = str(pathlib.Path(workdir).absolute())
        if any(full == own or full.startswith(own + "/") for own in OWN):
            raise LaunchError(
                f"--workdir={workdir} is on the own disk of each of the {args.nodes} nodes; use a "
                "folder that they share (NFS, Lustre), or gs://; --shared-workdir if they share it"
            )


def processes_per_node(args: argparse.Namespace) -> int:
    """Tasks of each node."""
    if args.platform == "cpu":
        return args.processes_per_node or 1
    return args.gpus_per_node if args.process_per != "node" else 1


def job_name(args: argparse.Namespace, flags: Sequence[str]) -> str:
    """The given name, or one made of the workdir: different for different workdirs."""
    workdir = common.flag(flags, "workdir") or "run"
    return args.name or re.sub(r"[^\w.-]+", "-", workdir.split("://")[-1]).strip("-.")


def directives(args: argparse.Namespace, name: str) -> list[str]:
    """The #SBATCH lines."""
    found = [
        f"--job-name={name}", f"--nodes={args.nodes}",
        f"--ntasks-per-node={processes_per_node(args)}",
    ]  # fmt: skip
    if args.platform == "gpu":
        found.append(f"--gpus-per-node={args.gpus_per_node}")
    for option, value in (
        ("cpus-per-task", args.cpus_per_process), ("time", args.time),
        ("partition", args.partition), ("account", args.account), ("qos", args.qos),
        ("mem", args.mem),
    ):  # fmt: skip
        found += [f"--{option}={value}"] if value is not None else []
    found += [
        f"--output={args.logs}/{name}-%j.out", "--open-mode=append", "--requeue",
        f"--signal=TERM@{args.save_seconds}",
    ]  # fmt: skip
    # sbatch reads quotes as a shell does; what is handed on to it is quoted by whoever gave it.
    return [f"#SBATCH {line}" for line in [*common.quoted(found), *args.sbatch]]


TEMPLATE = r"""#!/bin/bash
{directives}
# Written by launch/slurm.py; it can be submitted again as it is: sbatch {path}
set -uo pipefail
say() {{ echo "launch: $*"; }}
wait_for() {{  # the exit code of a child, also if signals interrupt the waiting
  interrupted=yes
  while [ -n "$interrupted" ]; do interrupted=; wait "$1"; code=$?; done
}}
{setup}
restarts=${{SLURM_RESTART_COUNT:-0}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
host=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
{exports}
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restarts of {max_restarts}"
# One process: its number and devices, for jax; the output of all but the first behind their number.
# srun ends with the highest exit code of all, and those that a failed process leaves behind end
# with 43: failures are lifted above that (2 to 202, others to 201), and lowered again below.
process=$(declare -f wait_for; cat <<'END'
{process}
trap 'interrupted=yes; kill -TERM $child 2>/dev/null' TERM
{command} &
child=$!
wait_for $child  # 137: killed from outside; 134: aborted by jax, for a process that does not answer
case $code in 0|42|43) exit $code;; 134|137) exit 43;; 2) exit 202;; *) exit 201;; esac
END
)
trap 'interrupted=yes; say "SIGTERM from Slurm; the processes save"' TERM  # they get it, too
# Processes that are left when one has ended have a minute for their message.
srun --kill-on-bad-exit=0 --wait=60{cpus} bash -c "$process" &
wait_for $!
case $code in 134|137) code=43;; 202) code=2;; 201) code=1;; esac
say "the run ended with exit code $code"

again() {{  # the same job once more, unless Slurm has taken the matter into its own hands
  if [ "$restarts" -ge {max_restarts} ]; then
    say "exit code $code ($1): no restart left (--max-restarts {max_restarts});" \
      "the same command continues"
  elif scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    say "exit code $code ($1): requeued"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # in which Slurm ends this script
  else
    say "Slurm itself has requeued or cancelled the job"
  fi
}}
failures={failures}-$SLURM_JOB_ID.failures  # of 43 in a row, since a start that lived long
[ "$SECONDS" -gt {progress} ] && rm -f "$failures"
case $code in
  42) rm -f "$failures"; again "preempted and saved";;
  43)
    echo 43 >> "$failures"; n=$(wc -l < "$failures")
    if [ "$n" -gt {max_failures} ]; then
      say "a process is gone, $n in a row: no restart left (--max-failures {max_failures})"
    else
      pause=$((n < 6 ? 10 * (1 << (n - 1)) : 300))
      say "a process is gone, $n in a row; waiting $pause s"
      sleep $pause
      again "a process is gone, $n in a row"
    fi;;
  *) rm -f "$failures";;
esac
exit $code
"""
# With several processes.
NUMBERED = """\
export JAX_NUM_PROCESSES=$SLURM_NTASKS JAX_PROCESS_ID=$SLURM_PROCID
[ "$SLURM_PROCID" = 0 ] || exec > >(trap '' TERM; exec sed -u "s/^/[$SLURM_PROCID] /") 2>&1"""


def script(args: argparse.Namespace, flags: Sequence[str], name: str, path: str) -> str:
    """The text of the sbatch script."""
    total = args.nodes * (args.gpus_per_node or processes_per_node(args))
    return TEMPLATE.format(
        directives="\n".join(directives(args, name)), path=shlex.quote(path),
        setup="\n".join(args.setup) or "# (no --setup)", exports=_exports(args),
        process=_process(args), max_restarts=args.max_restarts, max_failures=args.max_failures,
        command=common.shell(common.main_command(args.python, flags, total)),
        progress=common.PROGRESS, failures=shlex.quote(f"{args.logs}/{name}"),
        # srun does not take it over from sbatch.
        cpus=f" --cpus-per-task={args.cpus_per_process}" if args.cpus_per_process else "",
    )  # fmt: skip


def _exports(args: argparse.Namespace) -> str:
    """What is the same on all processes; what the job's environment has set wins."""
    env = xla_flags.environment(args.platform, nodes=args.nodes, given={})
    forms = {"XLA_FLAGS": 'export {k}="{v} ${{{k}:-}}"', "NCCL_DEBUG": 'export {k}="${{{k}:-{v}}}"'}
    lines = [forms.get(k, "export {k}={v}").format(k=k, v=v) for k, v in env.items()]
    if args.nodes * processes_per_node(args) > 1:
        port = str(args.port) if args.port else "$((20000 + SLURM_JOB_ID % 20000))"
        lines += [f"export JAX_COORDINATOR_ADDRESS=$host:{port}"]
    return "\n".join(lines)


def _process(args: argparse.Namespace) -> str:
    """Which process it is, which devices it has.

    Without JAX_LOCAL_DEVICE_IDS jax would take one device for each process of a Slurm step.
    """
    per_node = processes_per_node(args)
    lines = [NUMBERED] if args.nodes * per_node > 1 else []
    if args.platform == "gpu":
        every = ",".join(map(str, range(args.gpus_per_node)))
        ids = "$SLURM_LOCALID" if args.process_per != "node" else every
        lines += [f"export JAX_LOCAL_DEVICE_IDS={ids}"]
    return "\n".join(lines) or "# the only process"


def job_file(args: argparse.Namespace, flags: Sequence[str], name: str) -> pathlib.Path:
    """Where the number of the job of this workdir stands."""
    workdir = common.flag(flags, "workdir") or ""
    full = str(pathlib.Path(workdir).absolute()) if common.is_local(workdir) else workdir
    default = pathlib.Path(args.logs, f"{name}-{digest(full)[:8]}.job")
    return pathlib.Path(args.job_file) if args.job_file else default


def digest(text: str) -> str:
    """Tells texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recorded(file: pathlib.Path) -> tuple[str, str]:
    """Digest of the script and number of the job; "" where they do not stand there."""
    for _ in range(SBATCH_SECONDS):
        words = file.read_text().split() if file.exists() else ["", ""]
        if len(words) > 1 or time.time() - file.stat().st_mtime > 60:
            break
        time.sleep(1)  # a launcher was killed, and its sbatch still goes on
    script, number = [*words, "", ""][:2]
    return script, number.split(";")[0]


def unfinished(file: pathlib.Path, name: str, text: str) -> str | None:
    """The job of an earlier start that is pending, runs or was requeued; None if there is none."""
    script, job = recorded(file)
    if not job:
        return None
    common.require_program("scontrol", LOGIN)
    done = common.capture(["scontrol", "show", "job", job])
    if "invalid job id" in done.stderr.lower():
        return None  # ended long ago
    found = re.search(r"JobName=(.*)\n(?:.*\n)*?.*JobState=(\w+)", done.stdout)
    if not found:
        raise LaunchError(
            common.explain(f"asking whether job {job} ({file}) still runs", done.stderr, MENDS)
        )
    if found[1].strip() != name or found[2] in ("COMPLETED", "FAILED", *ENDS):
        return None  # numbers are used again
    if script != digest(text):
        raise LaunchError(
            f"job {job} ({found[2]}) is of the same workdir, with other options or flags; "
            f"`scancel {job}` ends it, saved; then the same command again"
        )
    say(f"job {job} of an earlier start is {found[2]}: joined, nothing is submitted")
    return job


def submit(path: pathlib.Path, text: str, file: pathlib.Path) -> str:
    """The number of the job, which stands in `file` as soon as there is one."""
    common.require_program("sbatch", LOGIN)
    common.write(path, text, "--logs")
    common.write(file, f"{digest(text)}\n", "--job-file")
    with open(file, "a") as out:  # sbatch itself writes there, also when we are killed meanwhile
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)], stdout=out, stderr=subprocess.PIPE, text=True,
            check=False, start_new_session=True,
        )  # fmt: skip
    if done.returncode:
        file.unlink(missing_ok=True)
        raise LaunchError(common.explain("sbatch", done.stderr, MENDS))
    if not (job := recorded(file)[1]):
        raise LaunchError(f"sbatch ended without a number in {file}; `squeue --me` shows the jobs")
    return job


def state(job: str) -> tuple[str, int] | None:
    """State and exit code as Slurm tells them; None if it does not answer."""
    done = common.capture(["scontrol", "show", "job", job])
    found = re.search(r"JobState=(\w+)", done.stdout)
    code = re.search(r" ExitCode=(\d+):(\d+)", done.stdout)
    return (found[1], int(code[1])) if found and code else None


# Final states without an exit code of the script: what the launcher ends with.
ENDS = {
    "CANCELLED": 1, "DEADLINE": 1, "OUT_OF_MEMORY": 1, "TIMEOUT": common.EXIT_LOST,
    "NODE_FAIL": common.EXIT_LOST, "BOOT_FAIL": common.EXIT_LOST,
    "PREEMPTED": common.EXIT_PREEMPTED,
}  # fmt: skip


def follow(job: str, log: pathlib.Path, stopped: Callable[[], bool]) -> int:
    """Prints the job's output as it comes; its exit code when it has ended."""
    seen, answered, last = 0, time.monotonic(), ""
    while True:
        now = state(job)
        seen = _print_from(log, seen)
        if now:
            answered = time.monotonic()
            if now[0] != last:
                say(f"job {job}: {now[0]}")
            last = now[0]
            if last in ("COMPLETED", "FAILED", *ENDS):
                _print_from(log, seen)
                return _exit_code(job, *now, stopped())
        elif time.monotonic() - answered > LOST_CONTROLLER:
            raise LaunchError(f"Slurm's controller tells nothing of job {job}; look with `squeue`")
        for _ in range(POLL):
            time.sleep(1)
            seen = _print_from(log, seen)


def _print_from(log: pathlib.Path, seen: int) -> int:
    if not log.exists():
        return seen
    with open(log, "rb") as file:
        file.seek(seen)
        text = file.read()
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
    return seen + len(text)


def _exit_code(job: str, state: str, code: int, stopped: bool) -> int:
    """What the launcher ends with; a state without a code of its own is told."""
    if state in ENDS:
        code = common.EXIT_PREEMPTED if stopped else ENDS[state]
        say(f"job {job} ended as {state}; the same command continues from its last checkpoint")
    say(f"the job ended with exit code {code}")
    return code


def main(argv: list[str]) -> int:
    """Writes, submits, follows."""
    own, flags = common.split(argv)
    args = options(own)
    check(args, flags)
    name = job_name(args, flags)
    path = pathlib.Path(args.logs, f"{name}.sbatch")
    text = script(args, flags, name, str(path))
    file = job_file(args, flags, name)
    job = None if args.dry_run else unfinished(file, name, text)
    if job is None:
        print(f"# {path}\n{text}")
        print(
            common.shell(["sbatch", "--parsable", str(path)]), f" # its number: {file}", flush=True
        )
    if args.dry_run:
        return 0
    how, job = ("follows", job) if job else ("submitted as", submit(path, text, file))
    log = pathlib.Path(args.logs, f"{name}-{job}.out")
    say(f"{how} job {job}; output: {log}; `scancel {job}` ends it, saved")
    if not args.wait:
        return 0

    stopping = threading.Event()

    def stop() -> None:
        stopping.set()
        common.capture(["scancel", job])  # SIGTERM: the run saves

    with common.on_signals(stop):
        return follow(job, log, stopping.is_set)


if __name__ == "__main__":
    common.run(main)
