"""Trials that are jobs of a batch system: a restarted trial joins its job."""

import json
import shutil

import pytest
from sweeping import ROOT, kill, wait_for

from dcae_jax.sweeps.folder import Folder

pytestmark = pytest.mark.multiprocess


def test_a_trial_joins_its_job_after_kill_9_of_everything_but_the_job(checkout):
    shutil.copy(ROOT / "tests/sweeps/fake_slurm.py", checkout.path / "launch/slurm.py")
    log = checkout.path / "slurm.txt"
    options = (
        "--sweep=seed",
        "--slots=2",
        "--backend=slurm",
        "--launcher=--name=n{slot}",
        "--config.task.seconds=15",
    )
    env = {"FAKE_SEEDS": 1, "FAKE_SLURM": log}

    def told():
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    sweep = checkout.start(*options, **env)
    wait_for(lambda: told() and checkout.starts("seed=0"), "the job runs")
    keepers, launchers = checkout.processes()
    kill(sweep.pid, *keepers, *launchers)
    sweep.wait()
    # As if it had been on the other slot, whose number its job's options have.
    path = checkout.out / "trials/seed=0.json"
    path.write_text(path.read_text().replace('"slot": 0', '"slot": 1'))
    assert launchers == [told()[0]["pid"]] and len(checkout.starts("seed=0")) == 1

    sweep = checkout.start(*options, **env)
    wait_for(lambda: len(told()) == 2, "a second launcher")
    assert [t["joined"] for t in told()] == [False, True]
    assert "--name=n1" in told()[1]["own"]
    path = f"--job-file={checkout.out}/jobs/seed=0.txt"
    assert all(path in t["own"] and "--wait" in t["own"] for t in told())
    sweep.terminate()  # reaches the job, which saves
    assert sweep.wait(60) == 42
    assert checkout.records()["seed=0"]["starts"][-1]["exit_code"] == 42
    assert len(checkout.starts("seed=0")) == 1, "the job was started a second time"
    assert 0 < int((checkout.out / "runs/seed=0/step.txt").read_text()) < 10


def test_the_job_file_of_a_sweep_in_a_store_is_a_local_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    one, other = (Folder(f"gs://bucket/{name}").job_file("seed=0") for name in ("a", "b"))
    assert one != other and one.startswith(f"{tmp_path}/.cache/dcae_jax/sweeps/")
    assert one == Folder("gs://bucket/a").job_file("seed=0")
