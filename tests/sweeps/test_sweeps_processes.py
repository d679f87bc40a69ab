"""Processes by number and start time, and the start in two steps."""

import os
import signal
import subprocess
import sys
import time

from sweeping import ROOT, wait_for

from dcae_jax.sweeps import processes
from dcae_jax.sweeps.processes import Process

# Starts a command in two steps and dies by signal 9 between them.
DIES = """
import os, signal, sys
from dcae_jax.sweeps import processes
child = processes.gated(["touch", sys.argv[1]], os.environ, None)
print(child.pid, flush=True)
if sys.argv[2] == "go":
    processes.go(child)
    child.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def dying(path, word):
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(path), word], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return int(done.stdout)


def test_what_was_not_told_to_go_does_nothing_when_its_starter_is_killed(tmp_path):
    dying(tmp_path / "told", "go")
    assert (tmp_path / "told").exists()
    pid = dying(tmp_path / "untold", "wait")
    wait_for(lambda: not os.path.exists(f"/proc/{pid}") or not processes.of(pid).started, "gone")
    assert not (tmp_path / "untold").exists()


def test_a_process_is_its_number_and_its_start():
    child = subprocess.Popen(["sleep", "60"])
    found = processes.of(child.pid)
    assert found.alive() and found.is_here() and Process(**found.record()) == found
    assert not Process(child.pid, found.started + "0", found.host).alive()  # its number, used again
    Process(child.pid, found.started + "0", found.host).send(signal.SIGKILL)
    Process(child.pid, found.started, "another-machine").send(signal.SIGKILL)
    time.sleep(0.05)
    assert found.alive()
    found.send(signal.SIGKILL)
    wait_for(lambda: not found.alive(), "it is killed")  # a zombie: nobody has waited for it yet
    assert child.poll() == -signal.SIGKILL and not found.alive()
    found.send(signal.SIGKILL)  # nobody there: no error
