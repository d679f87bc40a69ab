"""A Slurm cluster of two nodes on this machine: munged, slurmctld, slurmd, nothing of systemd.

    with Cluster() as cluster: subprocess.run(["sinfo"], env=cluster.env)

Needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root (slurmd starts the
steps of other users).  All files lie in one folder, which ends with the block, as all processes do.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence

# No cgroups (linuxproc), no accounting, a node whose count of processors is what the config says
# (FastSchedule's successor SlurmdParameters=config_overrides), and quick scheduling.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=60
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2
"""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in found:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in found]


class Cluster:
    """Starts with the block, ends with it; `env` is for the commands of its users."""

    def __init__(self) -> None:
        # Not pytest's folder: munged refuses a socket in one that is closed to others.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="dcae_jax_slurm_"))
        self.folder.chmod(0o755)
        self.env = dict(os.environ, SLURM_CONF=str(self.folder / "slurm.conf"))
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._daemon(
                "munged", "--foreground", f"--key-file={self.folder}/munge.key",
                f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
                f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed",
            )  # fmt: skip
            self._wait("munged", lambda: (self.folder / "munge.socket").exists())
            self._daemon("slurmctld", "-D", "-i")
            for node in ("node0", "node1"):
                self._daemon("slurmd", "-D", "-N", node)
            self._wait("the nodes", lambda: "2 idle" in self.run("sinfo", "-h", "-o", "%D %t"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what was started, last first."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder)

    def run(self, *command: str) -> str:
        """Output of a command of Slurm; "" where it fails (the daemons may still be starting)."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {p.name}\n" + p.read_text(errors="replace")[-3000:] for p in files)

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        text = CONF.format(folder=self.folder, host=socket.gethostname(), ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(text)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{len(self._daemons)}.{command[0]}.out.log", "w") as out:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.env, stdout=out, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            )  # fmt: skip

    def _wait(self, what: str, ready: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            gone = [d.args[0] for d in self._daemons if d.poll() is not None]
            if gone or time.monotonic() > end:
                raise RuntimeError(f"{what} did not start ({gone} ended):\n{self.logs()}")
            time.sleep(0.3)


def installed() -> Sequence[str]:
    """The programs of Slurm that are missing."""
    return [
        n
        for n in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
        if not shutil.which(n)
    ]
