"""Stands for main.py in tests of sweeps: does what main.py does to a workdir, without training.

Each start leaves a line in WORKDIR/starts.txt: its process id, and how it ended once it has.
"""

import fcntl
import json
import os
import signal
import sys
import time

told = []
signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))  # as early as main.py

from etils import epath  # noqa: E402

from dcae_jax import config, flags  # noqa: E402
from dcae_jax.errors import IN_USE  # noqa: E402
from dcae_jax.report import writers  # noqa: E402


def main(argv):
    workdir = epath.Path(next(a.partition("=")[2] for a in argv if a.startswith("--workdir=")))
    cfg = config.resolve(flags.parsed([a for a in argv if a.startswith("--config")]))
    config.validate(cfg)
    workdir.mkdir(parents=True, exist_ok=True)
    if "://" in str(workdir):
        return start(cfg, workdir)
    with open(workdir / "run.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"error: {workdir} {IN_USE} another process; stop it")
            return 2
        return start(cfg, workdir)


def start(cfg, workdir):
    starts = workdir / "starts.txt"
    before = starts.read_text() if starts.exists() else ""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "-")
    starts.write_text(f"{before}{os.getpid()} {gpus} {(workdir / 'summary.json').exists()}\n")
    return run(cfg, workdir, len(before.splitlines()))


def run(cfg, workdir, number):
    if number < len(cfg.task.exits):
        code = cfg.task.exits[number]
        if code > 1000:
            step = number + 1
            metrics = writers.MetricsWriter(workdir, number)
            metrics.write_scalars(step, {"train/loss": 1 / step})
            metrics.flush()
            (workdir / "step.txt").write_text(str(step))
            return code - 1000
        if code < 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        print("step 3\nerror: the loss is not finite\ngoodbye" if code == 1 else "")
        return code
    done = workdir / "step.txt"
    first = int(done.read_text()) if done.exists() else 0
    metrics = writers.MetricsWriter(workdir, first)
    psnr = cfg.task.quality  # where it was finished before
    for step in range(first + 1, cfg.steps + 1):
        time.sleep(cfg.task.seconds / cfg.steps)
        psnr = cfg.task.quality * (1 - 0.5**step)
        metrics.write_scalars(step, {"train/loss": 1 / step, "held-out/psnr": psnr})
        metrics.flush()
        done.write_text(str(step))
        if told:
            print("preempted: saved")
            return 42
    scores = {"held-out": {"psnr": psnr, "oddness": 0.5}}
    summary = {"steps": cfg.steps, "evals": {"before": {}, "after": scores}}
    (workdir / "summary.json").write_text(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
