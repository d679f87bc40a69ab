"""Whole runs on an object store: Orbax, tensorstore, ArrayRecord and epath on real `gs://` paths.

The store (tests/fake_gcs.py) refuses copies, renames and compositions.  Where gcsfs is installed it
is the client, as on a real bucket; else a client that can do nothing more than a store.
"""

import json
import signal

import diffusing
import fake_gcs
import numpy as np
import pytest
import runs
from etils import epath

from dcae_jax import __main__, checkpoint, distributed, train
from dcae_jax.cli import _doctor_disk
from dcae_jax.cli._doctor_base import Status

BUCKET = "gs://bucket"
IMAGES = f"{BUCKET}/images"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The store with the tiny runs' images; caches of this machine in a folder of their own."""
    with fake_gcs.served() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCAE_JAX_DATA", str(tmp_path_factory.mktemp("cache")))
        for path in epath.Path(runs.make_images()).glob("*/*.png"):
            server.put(f"bucket/images/{path.parent.name}/{path.name}", path.read_bytes())
        yield server
        assert not server.refused, "something was to be renamed, copied or appended to"


@pytest.fixture
def images(store, monkeypatch):
    """The tiny runs read the store's images."""
    monkeypatch.setenv("TINY_IMAGES", IMAGES)


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A run on the store, interrupted, and resumed while listings lag; and one that was neither."""
    local = tmp_path_factory.mktemp("run") / "local"
    assert runs.run("phase1", local) == train.DONE  # from the same images on the disk
    workdir = f"{BUCKET}/run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_IMAGES", IMAGES)
        assert runs.run("phase1", workdir, poll=14) == distributed.EXIT_PREEMPTED
        newest = runs.steps(workdir)[-1]
        store.hidden = (f"bucket/run/checkpoints/{newest}/",)
        assert runs.steps(workdir)[-1] == 4 < newest
        assert runs.run("phase1", workdir) == train.DONE
        store.hidden = ()
    return workdir, local


def command(*argv):
    assert __main__.main([str(a) for a in argv]) == 0


def test_a_run_resumed_while_listings_lag_equals_one_on_a_disk(finished, images):
    workdir, local = finished
    runs.assert_same_run("phase1", workdir, local)
    assert (epath.Path(workdir) / "report.html").exists()


def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(finished, store, images):
    cfg, other = runs.make_config("phase1"), "bucket/damaged"
    for name in [n for n in store.objects if n.startswith("bucket/run/")]:
        store.put(name.replace("bucket/run", other), store.objects[name])
    victim = max(
        (n for n in store.objects if n.startswith(f"{other}/checkpoints/12/params/ocdbt")),
        key=lambda n: len(store.objects[n]),
    )
    data = bytearray(store.objects[victim])
    data[len(data) // 2] ^= 16
    store.put(victim, bytes(data))
    before = {n: d for n, d in store.objects.items() if f"{other}/checkpoints/12/" in n}
    manager = checkpoint.Checkpoints(epath.Path(f"gs://{other}"), cfg.checkpoint)
    _, meta = manager.restore_newest(runs.target(cfg))
    manager.close()
    assert meta["step"] == 8 and runs.steps(f"gs://{other}")[-1] == 8
    moved = {n.replace("checkpoints", "checkpoints_damaged"): d for n, d in before.items()}
    assert moved.items() <= store.objects.items() and not before.keys() & store.objects.keys()


def test_kill_9_in_the_middle_of_a_checkpoint_loses_that_one_alone(finished, store, images):
    """The process dies at its first upload of the second checkpoint's optimizer."""
    workdir = f"{BUCKET}/killed"
    argv = ["tests/store_main.py", "main.py"]
    found = []

    def kill(name):
        if name.startswith("bucket/killed/checkpoints/4/opt/") and not found:
            found.append(name)
            process.send_signal(signal.SIGKILL)

    store.before_put = kill
    process = runs.start("phase1", workdir, program=argv, **store.environment())
    code, text = runs.finish(process)
    store.before_put = lambda name: None
    assert code == -signal.SIGKILL and found, text
    assert any(n.startswith("bucket/killed/checkpoints/4/") for n in store.objects)
    assert "bucket/killed/checkpoints/4/commit_success.txt" not in store.objects
    cfg = runs.make_config("phase1")
    manager = checkpoint.Checkpoints(epath.Path(workdir), cfg.checkpoint)
    _, meta = manager.restore_newest(runs.target(cfg))
    manager.close()
    assert meta["step"] == 0 and runs.steps(workdir) == [0]  # what was half written is gone


def test_latents_diffusion_samples_and_scores(finished, store, images, monkeypatch):
    """cache-latents, training on the cache, sample, evaluate, results, report: all on the store."""
    workdir, latents = finished[0], f"{BUCKET}/latents"
    options = (
        "--from",
        workdir,
        "--out",
        latents,
        "--resolution",
        16,
        "--transform",
        "center_crop",
    )
    for split in ("train", "test"):
        command("cache-latents", *options, "--split", split, "--shard-records", 8)
    before = dict(store.generations)
    command("cache-latents", *options, "--split", "train", "--shard-records", 8)
    assert store.generations == before  # nothing is written twice
    monkeypatch.setattr(diffusing, "cache", lambda: latents)
    cfg = diffusing.make(steps=2, **{"task.model.num_classes": 1})
    cfg.evals = []
    diffusion = f"{BUCKET}/diffusion"
    assert diffusing.run(cfg, diffusion) == train.DONE
    samples, euler = f"{BUCKET}/samples", ("--sampler", "euler", "--steps", 2)
    command("sample", "--from", diffusion, "--out", samples, "--n", 2, "--npz", *euler)
    names = {n for n in store.objects if n.startswith("bucket/samples/")}
    assert sum(n.endswith(".png") for n in names) == 3 and any(n.endswith(".npz") for n in names)
    scores = f"{BUCKET}/scores"
    asked = ("--resolution", 32, "--metrics", "psnr", "--out", scores)
    command("evaluate", "--from", workdir, "--images", f"{IMAGES}/test", *asked)
    found = json.loads(store.objects["bucket/scores/metrics.json"])
    assert "psnr" in json.dumps(found)
    command("results", scores, "--out", f"{BUCKET}/results.html")
    command("report", "--workdir", diffusion, "--out", f"{BUCKET}/report.html")
    assert {"bucket/results.html", "bucket/report.html"} <= store.objects.keys()


@pytest.mark.slow
def test_weights_packed_images_and_a_profile(finished, store, images):
    """pack to the store, then training on it, from the weights of a step there, with a trace."""
    command("pack", "--from", f"{IMAGES}/train", "--out", f"{BUCKET}/packed")
    from dcae_jax.data.sources import TfdsConfig

    cfg = runs.make_config("phase1", steps=2, init_from=f"{finished[0]}/checkpoints/12")
    cfg.evals, cfg.data.source = [], TfdsConfig(directory=f"{BUCKET}/packed")
    cfg.report.profile_at = cfg.report.profile_steps = 1
    assert runs.run(cfg, f"{BUCKET}/second") == train.DONE
    assert any(n.startswith("bucket/second/profile/") for n in store.objects)


@pytest.mark.slow
def test_export_and_import(finished, store):
    options = ("--to", "diffusers", "--scaling-factor", 1, "--out", f"{BUCKET}/exported")
    command("export", "--workdir", finished[0], *options)
    command("import", "--from", f"{BUCKET}/exported", "--out", f"{BUCKET}/imported")
    source = checkpoint.source_meta(f"{BUCKET}/imported")
    assert source["leaves"]["params"]


def test_the_doctor_leaves_nothing_on_the_store(store):
    before = dict(store.objects)
    (found,) = _doctor_disk.workdir(epath.Path(f"{BUCKET}/new/run"))
    assert found.status is Status.ok and "MB/s" in found.value, found
    assert store.objects == before
    assert "no limit known" in _doctor_disk.space(epath.Path(BUCKET), 2**30, 3, 0).value


def test_what_is_written_is_seen_by_other_processes_at_once(store):
    """No client keeps listings: a name that was asked for too early is found when it is there."""
    path = epath.Path(f"{BUCKET}/fresh/late.txt")
    (path.parent / "early.txt").write_text("x")
    assert [p.name for p in path.parent.iterdir()] == ["early.txt"] and not path.exists()
    store.put("bucket/fresh/late.txt", b"by another process")
    assert path.exists() and len(list(path.parent.iterdir())) == 2
    np.testing.assert_equal(path.read_bytes(), b"by another process")
