"""The launcher's own script on a real Slurm (`make test-slurm`; not part of `make test`).

Two nodes, a process on each, one run: requeued by hand in the middle, preempted by a job of higher
priority later, and at the end bit by bit the run that nobody interrupted.
"""

import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest
import runs
from cluster import Cluster, installed

FLAGS = ("--config.steps=150", "--config.checkpoint.every=50", "--config.report.every=1")
URGENT = """\
#!/bin/bash
#SBATCH --partition=urgent --nodes=2 --ntasks-per-node=4 --output=/dev/null
sleep 3
"""


@pytest.fixture(scope="module")
def cluster():
    missing = installed()
    assert not missing, f"{missing} are missing; `make test-slurm` installs them"
    with Cluster() as started:
        yield started
    assert not [p for p in running() if str(started.folder) in p], "something was left running"


def running():
    """Command lines and SLURM_CONF of all processes."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if int(folder.name) != os.getpid():
            found.append(text.decode(errors="replace"))
    return found


class Launched:
    """A launcher as a real process, its output line by line."""

    def __init__(self, cluster, launcher, workdir, *options, flags=FLAGS):
        self.lines = []
        env = runs.environment(PYTHONUNBUFFERED=1, SLURM_CONF=cluster.env["SLURM_CONF"])
        self._process = subprocess.Popen(
            [sys.executable, f"launch/{launcher}.py", *options, "--",
             *runs.command("phase1", workdir, *flags)[2:]],
            cwd=runs.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self.lines.append(line)

    def text(self):
        return "".join(self.lines)

    def wait_for(self, pattern, seconds=240):
        """The match of a line that is there or comes."""
        end = time.monotonic() + seconds
        while True:
            last = self._process.poll() is not None and not self._reader.is_alive()
            if found := re.search(pattern, self.text(), re.M):
                return found
            assert not last and time.monotonic() < end, f"no {pattern!r} in\n{self.text()}"
            time.sleep(0.2)

    def finish(self, seconds=300):
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"still running:\n{self.text()}") from None
        self._reader.join()
        return code


def start_now(cluster, job, seconds=90):
    """Slurm lets a requeued job wait two minutes; we do not."""
    end = time.monotonic() + seconds
    while cluster.run("squeue", "-h", "-j", job, "-o", "%T").strip() != "PENDING":
        assert time.monotonic() < end, cluster.logs()
        time.sleep(0.3)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_a_job_that_is_requeued_and_preempted_ends_in_the_bits_of_the_uninterrupted_run(
    cluster, tmp_path
):
    whole = Launched(cluster, "local", tmp_path / "whole", "--processes", "2")
    assert whole.finish() == 0, whole.text()

    run = Launched(
        cluster, "slurm", tmp_path / "slurm", "--platform", "cpu", "--nodes", "2",
        "--shared-workdir", "--time", "30", "--logs", str(tmp_path / "logs"),
    )  # fmt: skip
    job = run.wait_for(r"submitted as job (\d+)")[1]

    run.wait_for(r"^step [3-9]/")
    assert cluster.run("squeue", "-h", "-j", job, "-o", "%T %D %C").split() == ["RUNNING", "2", "2"]
    cluster.run("scontrol", "requeue", job)
    first = int(run.wait_for(r"preempted: saved step (\d+)")[1])
    run.wait_for("^launch: Slurm itself has requeued")
    start_now(cluster, job)

    run.wait_for(rf"own workdir, step {first}\b")
    run.wait_for(rf"^step {first + 3}/")
    urgent = tmp_path / "urgent.sh"
    urgent.write_text(URGENT)
    assert "Submitted" in cluster.run("sbatch", str(urgent))
    run.wait_for(r"exit code 42 \(preempted and saved\): requeued")
    second = int(re.findall(r"preempted: saved step (\d+)", run.text())[-1])
    start_now(cluster, job)

    assert run.finish() == 0, run.text()
    assert 3 <= first < second < 150, run.text()
    assert f"own workdir, step {second}" in run.text()
    found = re.findall(r"on node\[0-1\], restart (\d) of 100", run.text())
    assert found == ["0", "1", "2"], run.text()
    runs.assert_same_run("phase1", tmp_path / "whole", tmp_path / "slurm", steps=150)
    _, meta = runs.state("phase1", tmp_path / "slurm", steps=150)
    assert meta["processes"] == 2


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, tmp_path):
    run = Launched(
        cluster, "slurm", tmp_path / "run", "--platform", "cpu", "--processes-per-node", "2",
        "--logs", str(tmp_path / "logs"),
    )  # fmt: skip
    job = run.wait_for(r"submitted as job (\d+)")[1]
    run.wait_for(r"^step [1-9]/")
    cluster.run("scancel", job)
    assert run.finish() == 1, run.text()
    saved = int(run.wait_for(r"preempted: saved step (\d+)")[1])
    assert "ended as CANCELLED" in run.text() and runs.steps(tmp_path / "run")[-1] == saved
    time.sleep(2)
    assert not cluster.run("squeue", "-h")


def test_mistakes_end_with_a_message_and_are_not_tried_again(cluster, tmp_path):
    options = (
        "--platform",
        "cpu",
        "--nodes",
        "2",
        "--shared-workdir",
        "--logs",
        str(tmp_path / "logs"),
    )
    wrong = Launched(cluster, "slurm", tmp_path / "run", *options, "--partition", "nowhere")
    assert wrong.finish() == 2
    assert "invalid partition" in wrong.text() and "`sinfo -s` lists" in wrong.text()
    wrong = Launched(cluster, "slurm", tmp_path / "run", *options, flags=["--config.batch=7"])
    assert wrong.finish() == 2, wrong.text()
    assert "error:" in wrong.text() and "restart 1" not in wrong.text()
    assert not cluster.run("squeue", "-h")
