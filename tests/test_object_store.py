"""What a run writes without Orbax works on a store without append, truncate, rename or locks.

Orbax writes checkpoints through tensorstore, which knows gs:// but not a store in this process:
test_gcs.py has those.
"""

import json

import fake_store
import numpy as np
import pytest
import runs
from etils import epath

from dcae_jax import checkpoint, provenance
from dcae_jax.errors import UserError
from dcae_jax.report import html, phases, writers

SCORES = {"folder-32-test/psnr": 20.0, "folder-32-test/psnr_pooled": 19.0}


@pytest.fixture
def workdir():
    store = fake_store.reset()
    yield epath.Path("fake://bucket/runs/phase1")
    assert all(name.startswith("/fake/bucket/runs/") for name in store.objects)


def write_run(workdir, cfg):
    """As train.py does it: config, rows, pictures, summary, report."""
    task = cfg.task.build(cfg)
    with provenance.lock(workdir):
        provenance.check(workdir, cfg, "digest", False, print)
        provenance.write(workdir, cfg, "digest", {})
        picture = np.zeros((8, 8, 3), np.uint8)
        for writer in writers.make_writers(workdir, 0, tensorboard=True):
            for k in (0, 5):
                writer.write_scalars(k, SCORES | {"train/loss": 1.0 / (k + 1)})
                writer.write_images(k, {"folder-32-test": picture})
                writer.flush()
            writer.close()
        totals = {"seconds": 1.0, "train_seconds": 1.0, "images_per_s": 2.0, "data_wait": 0.0}
        provenance.write_summary(workdir, cfg, task, totals, {})
        html.build_report([workdir], workdir / "report.html")


def test_a_run_without_checkpoints_on_an_object_store(workdir, capsys):
    cfg = runs.make_config("phase1", steps=5)
    write_run(workdir, cfg)
    assert json.loads((workdir / "config.json").read_text())["data"] == "digest"
    assert [r["step"] for r in writers.read_metrics(workdir)] == [0, 5]
    assert writers.read_images(workdir)["folder-32-test"].keys() == {0, 5}
    assert provenance.is_finished(workdir, cfg, False)
    assert "20.00" in phases.end_table([workdir]) and (workdir / "report.html").exists()
    assert not (workdir / "run.lock").exists()  # a store has no locks
    cfg.report.every = 7
    provenance.check(workdir, cfg, "digest", False, print)
    assert "report.every: 3 -> 7\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data.\(records\): digest -> other"):
        provenance.check(workdir, cfg, "other", False, print)


def test_what_was_not_measured_before_training_is_not_in_the_summary(workdir):
    cfg = runs.make_config("phase1", steps=5)
    for writer in writers.make_writers(workdir, 0, tensorboard=False):
        writer.write_scalars(5, SCORES)
        writer.close()
    provenance.write_summary(workdir, cfg, cfg.task.build(cfg), {}, {})
    found = json.loads((workdir / "summary.json").read_text())["evals"]
    assert found["before"] == {} and found["after"]["folder-32-test"]["psnr"] == SCORES[
        "folder-32-test/psnr"
    ]  # fmt: skip


def test_a_writer_that_dies_leaves_the_old_object(workdir):
    """No rename, no append: an upload that does not end does not happen."""
    cfg = runs.make_config("phase1", steps=5)
    write_run(workdir, cfg)
    with pytest.raises(RuntimeError), (workdir / "config.json").open("w") as file:
        file.write("{")
        raise RuntimeError
    assert provenance.read(workdir)["data"] == "digest"


def test_checkpoints_are_refused_where_orbax_keeps_none():
    for path in ("s3://bucket/run", "fake://bucket/run"):
        with pytest.raises(UserError, match=f"{path}: checkpoints can be on a disk or on gs://"):
            checkpoint.find_source(path)
    assert str(checkpoint.home("gs://bucket/run")) == "gs://bucket/run"
