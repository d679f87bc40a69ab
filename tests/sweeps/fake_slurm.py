"""Stands for launch/slurm.py in tests of sweeps: its "job" is a main.py in a session of its own.

With --job-file it joins a job that runs, as launch/slurm.py does.  Each start leaves a line in the
file that FAKE_SLURM names.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from dcae_jax.sweeps.processes import Process, of

ROOT = pathlib.Path(__file__).parents[1]


def main(argv):
    own, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    path = pathlib.Path(next(a.partition("=")[2] for a in own if a.startswith("--job-file=")))
    job = Process(**json.loads(path.read_text())) if path.exists() else None
    if joined := job is not None and job.alive():
        child = None
    else:
        command = [sys.executable, str(ROOT / "main.py"), *flags]
        child = subprocess.Popen(command, start_new_session=True)
        job = of(child.pid)
        path.write_text(json.dumps(job.record()))
    signal.signal(signal.SIGTERM, lambda number, frame: job.send(number))
    with open(os.environ["FAKE_SLURM"], "a") as log:
        log.write(json.dumps({"own": own, "joined": joined, "pid": os.getpid()}) + "\n")
    if child:
        return child.wait()
    while job.alive():
        time.sleep(0.05)
    workdir = next(a.partition("=")[2] for a in flags if a.startswith("--workdir="))
    return 0 if pathlib.Path(workdir, "summary.json").exists() else 42


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
