"""Starts launch/sweep.py as a user does, with a fake main.py beside it, and reads what it left."""

import contextlib
import csv
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

from dcae_jax.sweeps import command

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "tests/sweeps/fake_config.py"
FAST = "--config.task.seconds=0"


class Checkout:
    """A folder with launch/sweep.py and the fake main.py, and a sweep's --out in it."""

    def __init__(self, path):
        self.path = path
        (path / "launch").mkdir()
        shutil.copy(ROOT / "launch/sweep.py", path / "launch")
        shutil.copy(ROOT / "tests/sweeps/fake_main.py", path / "main.py")
        self.out = path / "out"
        self._started = []

    def command(self, *options, config=CONFIG):
        script = str(self.path / "launch/sweep.py")
        return [sys.executable, script, f"--config={config}", f"--out={self.out}", *options]

    def environment(self, **more):
        env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        return env | {"PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in more.items()}

    def run(self, *options, config=CONFIG, **env):
        """(exit code, what it printed) of a sweep that runs to its end."""
        done = subprocess.run(
            self.command(*options, config=config), cwd=ROOT, env=self.environment(**env),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
        )  # fmt: skip
        return done.returncode, done.stdout

    def here(self, *options, config=CONFIG, **env):
        """The same in this process, without a start of Python: for what starts no trial."""
        argv = self.command(*options, config=config)[2:]
        out = io.StringIO()
        with (
            mock.patch.dict(os.environ, {k: str(v) for k, v in env.items()}),
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(out),
        ):  # fmt: skip
            code = command.main(argv, str(self.path))
        return code, out.getvalue()

    def start(self, *options, **env):
        """A sweep that goes on in the background; its output is in output.txt."""
        with open(self.path / "output.txt", "a") as output:
            process = subprocess.Popen(
                self.command(*options), cwd=ROOT, env=self.environment(**env),
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._started.append(process)
        return process

    def output(self):
        return (self.path / "output.txt").read_text()

    # ------------------------------------------------------------------------------- reading

    def rows(self):
        """{trial: row of results.csv}."""
        with open(self.out / "results.csv") as file:
            return {row["trial"]: row for row in csv.DictReader(file)}

    def records(self):
        """{trial: its file}, of the trials that were started."""
        paths = (self.out / "trials").glob("*.json")
        return {p.stem: json.loads(p.read_text()) for p in paths}

    def count(self, state):
        return [r["state"] for r in self.records().values()].count(state)

    def starts(self, trial):
        """What the fake main wrote at each start: [pid, GPUs, whether it was finished before]."""
        path = self.out / "runs" / trial / "starts.txt"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def trials(self):
        return sorted(p.name for p in (self.out / "runs").iterdir())

    def processes(self):
        """(keepers, trials): process ids of the starts that have not ended."""
        keepers, trials = [], []
        for name, record in self.records().items():
            if record["state"] == "running":
                keepers.append(record["starts"][-1]["keeper"]["pid"])
                path = self.out / f"starts/{name}.{len(record['starts'])}.json"
                if path.exists() and (kept := json.loads(path.read_text()))["ended"] is None:
                    trials.append(kept["process"]["pid"])
        return keepers, trials

    def stop_all(self):
        """Leaves no process behind, whatever a test did."""
        for process in self._started:
            process.kill()
            process.wait()
        if (self.out / "trials").exists():
            keepers, trials = self.processes()
            kill(*keepers, *trials)


def wait_for(condition, what, seconds=60):
    """Polls until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def kill(*pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
