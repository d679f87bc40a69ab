"""Runs main.py on all workers of a TPU VM or pod: makes the TPU, copies this code, runs, restarts.

  python launch/tpu_vm.py --name N --zone Z --type T [OPTIONS] -- --config=FILE:ARG --workdir=gs://BUCKET/DIR
  python launch/tpu_vm.py --name N --zone Z --stop
  python launch/tpu_vm.py --name sana --zone us-west4-a --type v5litepod-16 --spot --queue \\
      --delete -- --config=configs/dcae_f32c32.py:phase1 --workdir=gs://my-bucket/f32c32/phase1

A TPU of that name that is ready is used as it is; else one is made (--queue: waited for).  Worker
0's output is shown.  After exit code 42, 43 or a lost connection the run is started again, or
joined if it still goes on; a spot TPU that was taken away is made anew.  SIGTERM and Ctrl-C are
passed on: the run saves.  Needs gcloud, logged in.  Not yet run on a real TPU.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import common
import xla_flags
from common import LaunchError, say

LOST = 255  # ssh: no connection, or lost
POLL = 20  # seconds between looks at a TPU that is being made
CODE = "dcae_jax"  # folder of the code in the workers' homes
JOB = "train"  # one run at a time on a TPU

# Software version of each kind, as Cloud TPU's page "TPU software versions" lists them.
VERSIONS = {
    "v6e": "v2-alpha-tpuv6e", "v5p": "v2-alpha-tpuv5", "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base", "v3": "tpu-ubuntu2204-base", "v2": "tpu-ubuntu2204-base",
}  # fmt: skip
# States of a TPU, and of a queued request, from which nothing comes any more.
GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "UNKNOWN", "FAILED", "SUSPENDED")
NOT_LOGGED_IN = "run `gcloud auth login`, then the same command again"
MENDS = (
    ("active account", NOT_LOGGED_IN),
    ("reauthentication", NOT_LOGGED_IN),
    ("refresh your current auth tokens", NOT_LOGGED_IN),
    ("quota", "ask for more at console.cloud.google.com/iam-admin/quotas (TPU, your zone; spot has "
     "a quota of its own), or take a smaller --type"),
    ("no more capacity", "nothing is free there now: --queue waits for it, --spot asks for what "
     "is left over, or try another --zone"),
    ("insufficient", "nothing is free there now: --queue waits for it, or try another --zone"),
    ("already exists", "another TPU or queued request has that name; choose another --name"),
    ("(or it may not exist)", "is --zone right? `gcloud compute tpus locations list` shows those "
     "that you may use; or you lack rights in --project"),
    ("unknown zone", "`gcloud compute tpus locations list` shows the zones"),
    ("accelerator type", "`gcloud compute tpus accelerator-types list --zone=ZONE` shows what the "
     "zone has"),
    ("runtime version", "`gcloud compute tpus tpu-vm versions list --zone=ZONE` shows them; give "
     "--version"),
    ("has not been used in project", "`gcloud services enable tpu.googleapis.com` switches it on"),
    ("not found", "is --name right? `gcloud compute tpus tpu-vm list --zone=ZONE` shows them"),
    ("not_found", "is --name right? `gcloud compute tpus tpu-vm list --zone=ZONE` shows them"),
    ("permission", "the account lacks rights in this project: it needs the role TPU Admin"),
)  # fmt: skip


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The options in front of `--`."""
    p = common.parser(__doc__ or "")
    p.add_argument("--name", required=True, help="name of the TPU")
    p.add_argument("--zone", required=True, help="zone, e.g. us-west4-a")
    p.add_argument("--type", help="accelerator type, e.g. v5litepod-16, v4-32 (not for --stop)")
    p.add_argument("--project", help="project (gcloud's default)")
    p.add_argument("--version", help="software version (that of the type)")
    p.add_argument("--spot", action="store_true", help="spot: cheap, may be taken away")
    p.add_argument("--queue", action="store_true", help="as a queued resource: waits for capacity")
    p.add_argument(
        "--create",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of gcloud's create, e.g. --create=--network=mine",
    )
    p.add_argument("--internal-ip", action="store_true", help="ssh from within the same network")
    p.add_argument(
        "--shared-workdir",
        action="store_true",
        help="the workdir is a mount that all workers share (e.g. Filestore)",
    )
    p.add_argument("--delete", action="store_true", help="delete the TPU when the run has ended")
    p.add_argument("--stop", action="store_true", help="only end the run that goes on there, saved")
    return p.parse_args(argv)  # fmt: skip


def kind(accelerator: str) -> tuple[str, int]:
    """v5litepod-16 -> ("v5litepod", 16)."""
    name, _, number = accelerator.rpartition("-")
    if name not in VERSIONS or not number.isdecimal() or int(number) < 1:
        raise LaunchError(
            f"--type {accelerator} is not KIND-NUMBER with a KIND of {', '.join(VERSIONS)}; e.g. "
            "v5litepod-16"
        )
    return name, int(number)


def device_count(accelerator: str) -> int:
    """jax devices of all workers: v4 and v5p count two cores for each."""
    name, number = kind(accelerator)
    return number // 2 if name in ("v4", "v5p") else number


def worker_count(accelerator: str) -> int:
    """Machines: 8 cores or 4 chips on each; v5e and v6e have all up to 8 chips on one."""
    name, number = kind(accelerator)
    if name in ("v5litepod", "v6e"):
        return 1 if number <= 8 else -(-number // 4)
    return -(-number // 8)


def check(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """What can be seen to be wrong without asking anybody."""
    if args.stop:
        return
    if args.type is None:
        raise LaunchError("no --type; give the accelerator type, e.g. --type v5litepod-16")
    count = worker_count(args.type)
    common.require_flags(flags)
    workdir = common.flag(flags, "workdir")
    if common.is_local(workdir) and not args.shared_workdir and (count > 1 or args.spot):
        why = "each of the workers has a disk of its own" if count > 1 else "a spot TPU's disk goes"
        raise LaunchError(
            f"--workdir={workdir} is a folder on the TPU ({count} workers), and {why}; "
            "give gs://BUCKET/DIR, or --shared-workdir if it is a mount that all share"
        )


class Tpu:
    """The commands of gcloud for one TPU."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.ours = False  # made here, or our run has started on it: --delete may delete it
        self.where = [
            f"--zone={args.zone}",
            *([f"--project={args.project}"] if args.project else []),
        ]

    def describe(self) -> list[str]:
        """Prints the state of the TPU."""
        return ["gcloud", "compute", "tpus", "tpu-vm", "describe", self.args.name, *self.where,
                "--format=value(state)"]  # fmt: skip

    def describe_queued(self) -> list[str]:
        """Prints the state of the queued request."""
        return ["gcloud", "compute", "tpus", "queued-resources", "describe", self.args.name,
                *self.where, "--format=value(state.state)"]  # fmt: skip

    def create(self) -> list[str]:
        """Makes the TPU, or queues the request for it, under the same name."""
        args, version = self.args, self.args.version or VERSIONS[kind(self.args.type)[0]]
        if args.queue:
            what = ["queued-resources", "create", args.name, f"--node-id={args.name}",
                    f"--runtime-version={version}"]  # fmt: skip
        else:
            what = ["tpu-vm", "create", args.name, f"--version={version}"]
        spot = ["--spot"] if args.spot else []
        return ["gcloud", "compute", "tpus", *what, f"--accelerator-type={args.type}", *self.where,
                *spot, *args.create]  # fmt: skip

    def delete(self) -> list[str]:
        """Deletes the TPU, of a queued request both."""
        what = ["queued-resources", "delete", self.args.name, "--force"]
        if not self.args.queue:
            what = ["tpu-vm", "delete", self.args.name]
        return ["gcloud", "compute", "tpus", *what, *self.where, "--quiet"]

    def copy(self, archive: str) -> list[str]:
        """An archive into the homes of all workers."""
        to = f"{self.args.name}:{CODE}.tgz"
        return ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, to, "--worker=all",
                *self.where, *self._ip()]  # fmt: skip

    def ssh(self, command: str) -> list[str]:
        """A command on all workers."""
        return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", self.args.name, "--worker=all",
                *self.where, *self._ip(), f"--command={command}"]  # fmt: skip

    def _ip(self) -> list[str]:
        return ["--internal-ip"] if self.args.internal_ip else []


def pack(archive: str) -> list[str]:
    """This code as it is here, without environments and runs; git's files name the commit."""
    left_out = ("./.venv*", "./runs", "./.whl", "__pycache__", ".pytest_cache", ".ruff_cache")
    return [
        "tar",
        "-czf",
        archive,
        "-C",
        str(common.ROOT),
        *(f"--exclude={x}" for x in left_out),
        ".",
    ]


UNPACK = f"mkdir -p {CODE} && tar -xzf {CODE}.tgz -C {CODE} && bash {CODE}/launch/tpu_worker.sh"


def run_command(args: argparse.Namespace, flags: Sequence[str]) -> str:
    """What each worker runs."""
    words = common.main_flags(flags, device_count(args.type))
    env = xla_flags.passed_on("tpu")
    return common.shell(["bash", f"{CODE}/launch/tpu_worker.sh", "run", JOB, *words], env)


# ----------------------------------------------------------------------------------------- running


def ask(command: Sequence[str]) -> str | None:
    """Output of a question to gcloud; None if there is no such thing."""
    done = common.capture(command)
    if done.returncode == 0:
        return done.stdout.strip()
    if "NOT_FOUND" in done.stderr or "was not found" in done.stderr:
        return None
    raise LaunchError(common.explain("gcloud", done.stderr, MENDS))


def do(command: Sequence[str]) -> None:
    """Runs a command that must succeed; its output is shown, its failure explained."""
    print(common.shell(command), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise LaunchError(common.explain(" ".join(command[:5]), done.stderr, MENDS))


def provide(tpu: Tpu, stopping: threading.Event) -> bool:
    """The TPU is ready afterwards; True if it was made, so that nothing is on it yet."""
    state, queued = look(tpu)
    if state == "READY":
        return False
    if state in GONE or queued in GONE:
        say(f"{tpu.args.name} is {state or queued}: deleted, then made anew")
        do(tpu.delete())
        state = queued = None
    if state is None and queued is None:
        do(tpu.create())
        tpu.ours = True
    told = ""
    while not stopping.is_set():
        state, queued = look(tpu)
        if state == "READY":
            break
        if state in GONE or queued in GONE:
            do(tpu.delete())
            raise LaunchError(
                f"{tpu.args.name} became {queued or state} before it was ready, and was deleted: "
                "nothing is free there; try again later, or another --zone"
            )
        now = " / ".join(s for s in (queued, state) if s) or "asked for"
        if now != told:
            say(f"{tpu.args.name}: {now}")
        told = now
        stopping.wait(POLL)
    return True


def clean_up(tpu: Tpu) -> None:
    """With --delete: deletes the TPU, if it is ours.  Else says what goes on costing money.

    A TPU that was there before may hold somebody's run, or one of our own that could not be joined.
    """
    command = common.shell(tpu.delete())
    try:
        if look(tpu) == (None, None):
            return
        if tpu.args.delete and tpu.ours:
            do(tpu.delete())
        else:
            say(f"{tpu.args.name} stays, and is billed; this deletes it: {command}")
    except LaunchError as e:
        raise LaunchError(
            f"{e}\n  -> {tpu.args.name} may still be there, and be billed; this deletes it: "
            f"{command}"
        ) from e


def look(tpu: Tpu) -> tuple[str | None, str | None]:
    """States of the TPU and of the queued request for it; None: there is none."""
    return ask(tpu.describe()), ask(tpu.describe_queued()) if tpu.args.queue else None


def install(tpu: Tpu) -> None:
    """This code and its environment on all workers."""
    with tempfile.TemporaryDirectory() as folder:
        archive = str(pathlib.Path(folder, f"{CODE}.tgz"))
        do(pack(archive))
        do(tpu.copy(archive))
    do(tpu.ssh(f"{UNPACK} install"))


def run_once(tpu: Tpu, command: str) -> int:
    """The run on all workers; the exit code of the job."""
    words = tpu.ssh(command)
    print(common.shell(words), flush=True)
    job = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    said = []
    for line in job.stderr:
        said.append(line)
        sys.stderr.write(line)
        sys.stderr.flush()
    return exit_code(job.wait(), "".join(said))


BUSY = 3  # of tpu_worker.sh: the TPU runs something else
FAILED = re.compile(r"Command execution on worker (\d+) failed with exit status (\d+)")


def exit_code(code: int, stderr: str) -> int:
    """The code that counts: gcloud ends with that of the first worker that did not end with 0.

    A worker that failed by itself comes before those that it left behind (43), and those before
    workers that were preempted (42).
    """
    codes = [int(c) for _, c in FAILED.findall(stderr)] or [code]
    gone = (LOST, *common.EXIT_GONE)  # no connection; killed, or aborted by jax
    for c in codes:
        if c not in (0, common.EXIT_PREEMPTED, common.EXIT_LOST, *gone):
            return c
    if any(c in (common.EXIT_LOST, *gone) for c in codes):
        return common.EXIT_LOST
    return max(codes)


def require_gcloud(args: argparse.Namespace) -> None:
    """gcloud is there, and knows who we are and for which project."""
    common.require_program(
        "gcloud", "install the Google Cloud CLI (cloud.google.com/sdk/docs/install), then "
        "`gcloud auth login`"
    )  # fmt: skip
    if not ask(["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]):
        raise LaunchError(f"gcloud is not logged in; {NOT_LOGGED_IN}")
    project = args.project or ask(["gcloud", "config", "get", "project"])
    if not project or project == "(unset)":
        raise LaunchError("gcloud has no default project; give --project")


def show(tpu: Tpu, args: argparse.Namespace, command: str) -> None:
    """--dry-run: all commands in their order."""
    archive = f"/tmp/{CODE}.tgz"
    steps = [
        ("# unless it is READY:", [tpu.describe(), tpu.create()]),
        ("# this code, on all workers:",
         [pack(archive), tpu.copy(archive), tpu.ssh(f"{UNPACK} install")]),
        ("# the run; again after 42, 43 or a lost connection:", [tpu.ssh(command)]),
        *([("# in the end:", [tpu.delete()])] if args.delete else []),
    ]  # fmt: skip
    for title, commands in steps:
        print(title, *map(common.shell, commands), sep="\n")


def main(argv: list[str]) -> int:
    """Makes, copies, runs, runs again, deletes."""
    own, flags = common.split(argv)
    args = options(own)
    check(args, flags)
    tpu = Tpu(args)
    stop_command = tpu.ssh(f"bash {CODE}/launch/tpu_worker.sh stop {JOB}")
    if args.stop and args.dry_run:
        print(common.shell(stop_command), flush=True)
        return 0
    if args.stop:
        require_gcloud(args)
        do(stop_command)  # a worker without a run says so
        return 0
    command = run_command(args, flags)
    if args.dry_run:
        show(tpu, args, command)
        return 0
    require_gcloud(args)
    try:
        code = until_done(tpu, args, command, stop_command)
        if code == BUSY:
            say(f"{args.name} is left to the run that is going on there")
            return 2
    except BaseException:
        try:
            clean_up(tpu)  # what went wrong comes as an error of its own, and is told last
        except LaunchError as e:
            print(f"error: {e}", file=sys.stderr)
        raise
    clean_up(tpu)
    return code


def until_done(
    tpu: Tpu, args: argparse.Namespace, command: str, stop_command: Sequence[str]
) -> int:
    """Starts until the run has ended; a mistake at the first start is raised."""
    stopping = threading.Event()
    fresh = [True]
    lived = [0.0]

    def start() -> int:
        lived[0] = 0.0  # waiting for a TPU is none of it
        try:
            if provide(tpu, stopping) or fresh[0]:
                if stopping.is_set():
                    return common.EXIT_PREEMPTED
                install(tpu)
        except LaunchError as e:
            if fresh[0]:
                raise  # a mistake; later it is the network, or a zone without a free TPU
            print(f"error: {e}", file=sys.stderr)
            return common.EXIT_LOST
        if stopping.is_set():
            return common.EXIT_PREEMPTED
        fresh[0] = False
        begun = time.monotonic()
        code = run_once(tpu, command)
        tpu.ours = tpu.ours or code != BUSY
        lived[0] = time.monotonic() - begun
        return code

    def stop() -> None:
        stopping.set()
        if not fresh[0] and (done := common.capture(stop_command)).returncode:
            say(common.explain("ending the run", done.stderr, MENDS))

    with common.on_signals(stop):
        return common.until_done(start, args, stopping.is_set, stopping.wait, lambda: lived[0])


if __name__ == "__main__":
    common.run(main)
