"""LPIPS, MS-SSIM and rFID during training: against plain computations, on devices, in runs."""

import functools

import frozen_nets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import scipy.linalg

from dcae_jax import sharding
from dcae_jax.config import EmaConfig
from dcae_jax.data.pipeline import Transform
from dcae_jax.errors import UserError
from dcae_jax.evals import metrics
from dcae_jax.evals.extract import Extractor
from dcae_jax.evals.perceptual import LpipsNet
from dcae_jax.nets import lpips
from dcae_jax.step import TrainState
from dcae_jax.tasks.autoencode import to_float

N, SIDE = 5, 176  # an odd number in batches of two, as small as MS-SSIM allows


def make(**changes):
    """The tiny run, all scores on; changes are of its evaluator."""
    cfg = runs.make_config("phase1")
    (evaluator,), cfg.ema = cfg.evals, EmaConfig(decays=())
    evaluator.data.resolution, evaluator.data.transform = SIDE, Transform.center_crop
    evaluator.name = "test"
    values = {"n": N, "pictures": 0, "training_pictures": 0, "lpips": LpipsNet.alex}
    values |= {"ms_ssim": True, "rfid": True, "nets": str(frozen_nets.folder())} | changes
    for name, value in values.items():
        setattr(evaluator, name, value)
    return cfg


def dimmed(variables, batch):
    """An autoencoder whose output is known to the bit on any device: every level L is L // 2."""
    return to_float(batch["image"] // 2)


def build(cfg, devices=1):
    task = cfg.task.build(cfg)
    task.predict = dimmed
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:devices])
    return cfg.evals[0].build(cfg, task, mesh)


def scores(made):
    state = TrainState(step=jnp.int32(7), params={}, stats={}, ema={}, opt={})
    with jax.set_mesh(made.mesh):
        return made.run(state, {}, lambda: None).scalars


@pytest.fixture(scope="module")
def scored():
    """(scores, what the network saw, the features it gave): batches of two on one device."""
    seen, pools, features = [], [], Extractor.features

    def watched(self, images, wanted=None):
        found = features(self, images, wanted)
        seen.append(np.asarray(images))
        pools.append(np.asarray(found["pool"]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "features", watched)
        found = scores(build(make()))
    return found, seen, pools


@pytest.fixture(scope="module")
def images():
    with make().evals[0].data.eval_batches(batch=N, n=N) as batches:
        return next(iter(batches))["image"]


def fid(a, b):
    """By numpy's covariance and scipy's root, of features that are all there."""
    ca, cb = (np.cov(x.astype(np.float64).T) for x in (a, b))
    root = scipy.linalg.sqrtm(ca @ cb).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb - 2 * root)


def test_scores_of_a_known_output_against_plain_computations(scored, images):
    found, seen, pools = scored
    assert tuple(found) == make().evals[0].metrics() and found["n"] == N
    assert list(found)[-3:] == ["lpips", "ms_ssim", "rfid5"]
    net = lpips.load(frozen_nets.folder() / "lpips_alex.safetensors", lpips.ALEXNET)
    y, x = (jnp.asarray(v.astype(np.float32) / 255 * 2 - 1) for v in (images // 2, images))
    expected = float(np.mean(jax.jit(functools.partial(lpips.lpips, net=lpips.ALEXNET))(net, y, x)))
    assert found["lpips"] == pytest.approx(expected, rel=1e-5)
    similar = float(np.mean(jax.jit(metrics.ms_ssim)(images // 2, images)))
    assert found["ms_ssim"] == pytest.approx(similar, rel=1e-5)
    originals, outputs = (np.concatenate(seen[i::2])[:N] for i in (0, 1))
    np.testing.assert_array_equal(originals, images)
    np.testing.assert_array_equal(outputs, images // 2)
    # The root of a product of singular matrices is good to 1e-8 of each, of which there are 128.
    expected = fid(*(np.concatenate(pools[i::2])[:N] for i in (1, 0)))
    assert found["rfid5"] == pytest.approx(expected, rel=1e-4)
    assert np.concatenate(pools[::2]).shape == (6, 128)  # the last row is padding


def test_eight_devices_score_what_one_does(scored):
    found = scores(build(make(), devices=8))
    assert found["n"] == N
    # f32 sums in another order.
    assert found == pytest.approx(scored[0], rel=2e-6)


def test_baselines_have_the_same_scores(scored):
    """Three components keep less of blocks of pixels than four."""
    found = build(make(baselines=True, pca_images=8)).baselines()
    assert found.keys() == {"bicubic-4", "pca-3", "pca-4"}
    for base in found.values():
        assert base.keys() == scored[0].keys() and base["n"] == N
        assert 0 < base["ms_ssim"] < 1 and base["rfid5"] > 0
    assert found["pca-4"]["psnr"] > found["pca-3"]["psnr"]
    assert found["pca-4"]["lpips"] < found["pca-3"]["lpips"]


def test_what_scores_need_is_told_with_the_mend():
    assert make(lpips=LpipsNet.vgg).evals[0].metrics()[-3:] == ("lpips_vgg", "ms_ssim", "rfid5")
    assert make(n=4000).evals[0].metrics()[-1] == "rfid4k"
    cfg = make(n=1)
    cfg.evals[0].data.resolution = 16
    found = cfg.evals[0].problems()
    assert [p.split(";")[0] for p in found] == [
        "evals: lpips of test needs images of 31 px and more, these have 16",
        "evals: ms_ssim of test needs images of 176 px and more, these have 16",
        "evals: rfid of test needs 2 images and more, but n = 1",
    ]
    cfg = make(lpips=LpipsNet.off, ms_ssim=False, rfid=False, nets="/nowhere")
    assert not build(cfg).record()  # nothing is looked for


# -------------------------------------------------------------------------------------- whole runs


def test_a_missing_file_ends_the_start_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("DCAE_JAX_NETS", str(tmp_path / "none"))
    for changes, said in (
        ({"evals": [make(lpips=LpipsNet.off, nets="").evals[0]]}, "no weights of inception at"),
        ({"evals": [make(lpips=LpipsNet.vgg, rfid=False).evals[0]]}, "no weights of lpips-vgg at"),
    ):
        with pytest.raises(UserError, match=f"{said}.*import-net"):
            runs.run("phase1", tmp_path / "run", **changes)
        assert not (tmp_path / "run" / "checkpoints").exists()
