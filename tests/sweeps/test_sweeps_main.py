"""A sweep of real runs: main.py on a tiny config."""

import json
import os
import pathlib

import pytest
import runs
from sweeping import ROOT, wait_for

from dcae_jax.report import writers

pytestmark = pytest.mark.multiprocess

TEXT = """
from tiny_run import get_config

def sweep():
    for seed in (0, 1):
        yield {"seed": seed, "optim.lr": 1e-3 / (seed + 1)}
"""
SHORT = ("--config.steps=2", "--config.checkpoint.every=1", "--config.report.every=1")


@pytest.fixture
def real(checkout, monkeypatch):
    """The checkout with the real main.py, and a config for it."""
    (checkout.path / "main.py").unlink()
    os.symlink(ROOT / "main.py", checkout.path / "main.py")
    (checkout.path / "config.py").write_text(TEXT)
    paths = [ROOT, ROOT / "tests", ROOT / "tests/configs"]
    env = runs.environment(PYTHONPATH=":".join(map(str, paths)))
    config, command = str(checkout.path / "config.py"), checkout.command
    monkeypatch.setattr(checkout, "environment", lambda **more: env)
    monkeypatch.setattr(checkout, "command", lambda *o, **more: command(*o, config=config))
    return checkout


def test_real_runs_in_a_sweep(real):
    metric = "folder-32-test/psnr"
    code, text = real.run("--slots=2", "--metric=psnr", *SHORT)
    assert code == 0, text
    rows = real.rows()
    assert list(rows) == ["seed=0,lr=0.001", "seed=1,lr=0.0005"]
    for name, row in rows.items():
        workdir = pathlib.Path(row["workdir"])
        record = json.loads((workdir / "config.json").read_text())
        assert f"--workdir={workdir}" in record["command"] and row["exit_code"] == "0"
        assert f"seed={record['config']['seed']},lr={record['config']['optim']['lr']}" == name
        assert runs.steps(workdir)[-1] == 2 == int(row["step"])
        last = writers.read_metrics(workdir)[-1]
        assert float(row[metric]) == pytest.approx(last[metric]) and last[metric] > 0
    best = max(rows.values(), key=lambda row: float(row[metric]))
    assert f"best by {metric} (higher is better): {best['trial']}" in text
    page = (real.out / "sweep.html").read_text()
    assert page.count("data:image/png") == 2 and len(page) < 5e6


@pytest.mark.slow
def test_a_sweep_that_is_stopped_ends_as_one_that_is_not(real):
    options = ("--slots=2", "--config.steps=30")
    sweep = real.start(*options)

    def steps():
        folders = real.out / "runs"
        found = [writers.read_metrics(p) for p in folders.iterdir()] if folders.exists() else []
        return [rows[-1]["step"] if rows else 0 for rows in found]

    wait_for(lambda: len(steps()) == 2 and min(steps()) > 2, "both train", 200)
    sweep.terminate()
    assert sweep.wait(120) == 42
    assert real.count("preempted") == 2, real.output()
    code, text = real.run(*options)
    assert code == 0, text
    for name, row in real.rows().items():
        assert row["starts"] == "2"
        plain = real.path / "plain" / name
        changes = {"seed": int(name[5]), "optim.lr": float(row["optim.lr"]), "steps": 30}
        flags = [f"--config.{k}={v}" for k, v in changes.items()]
        code, text = runs.main("phase1", plain, *flags)
        assert code == 0, text
        runs.assert_same_run("phase1", plain, real.out / "runs" / name, **changes)
