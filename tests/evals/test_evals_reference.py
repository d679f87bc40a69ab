"""Reference files of others are read, ours are read by others, and mistakes are told."""

import json

import fake_store
import numpy as np
import pytest

from dcae_jax.data import latents
from dcae_jax.errors import UserError
from dcae_jax.evals import frechet, reference
from dcae_jax.evals.npz import Pictures

DIM, SPATIAL = 6, 4
POOL = frechet.gaussian(np.random.default_rng(0).normal(size=(20, DIM)))
SPACE = frechet.gaussian(np.random.default_rng(1).normal(size=(20, SPATIAL)))
IMAGES = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
FID = {"mu": POOL.mean, "sigma": POOL.covariance}
ADM = {**FID, "mu_s": SPACE.mean, "sigma_s": SPACE.covariance, "arr_0": IMAGES}


def read(path, **arrays):
    if arrays:
        np.savez(path, **arrays)
    return reference.read(path, pool=DIM, spatial=SPATIAL)


def test_statistics_of_pytorch_fid_and_of_the_dcae_evaluator(tmp_path):
    path = tmp_path / "imagenet-val-512.npz"
    found = read(path, **FID)
    assert (found.name, found.n, found.resolution, found.protocol) == (
        "imagenet-val-512", None, None, {},
    )  # fmt: skip
    np.testing.assert_array_equal(found.pool.covariance, POOL.covariance)
    assert found.spatial is None and found.images is None
    assert found.digest == latents.sha256_of(reference.epath.Path(path))
    # Sums in float32, and compressed.
    np.savez_compressed(path, **{k: v.astype(np.float32) for k, v in FID.items()})
    single = read(path).pool
    assert single.mean.dtype == np.float64
    assert frechet.distance(single, POOL) < 1e-9


def test_a_reference_batch_of_adm(tmp_path):
    found = read(tmp_path / "VIRTUAL_x.npz", **ADM, arr_1=np.zeros((3, 5)))  # whatever that is
    np.testing.assert_array_equal(found.spatial.mean, SPACE.mean)
    np.testing.assert_array_equal(found.images.read(0, 3), IMAGES)
    assert found.n is None, "the statistics are of all images, the file holds some"
    assert found.resolution == 8


def test_a_batch_of_samples_as_a_reference(tmp_path):
    found = read(tmp_path / "x.npz", arr_0=IMAGES, arr_1=np.arange(3))
    assert (found.n, found.resolution, found.pool) == (3, 8, None)
    assert found.images.labels().tolist() == [0, 1, 2]


@pytest.mark.parametrize("where", ["disk", "store"])
def test_ours_comes_back_and_others_can_read_it(tmp_path, where):
    store = fake_store.reset()
    path = "fake://bucket/x.npz" if where == "store" else str(tmp_path / "x.npz")
    protocol = {"resize": "half_pixel", "nets": {"inception": "abc"}}
    reference.write(
        path, name="val-512", n=20, resolution=512, protocol=protocol, pool=POOL, spatial=SPACE,
        pictures=Pictures(3, 8, 8, IMAGES),
    )  # fmt: skip
    found = read(path)
    assert (found.name, found.n, found.resolution, found.protocol) == ("val-512", 20, 512, protocol)
    np.testing.assert_array_equal(found.pool.covariance, POOL.covariance)
    np.testing.assert_array_equal(found.images.read(1, 2), IMAGES[1:2])
    if where == "store":
        assert store.writes == ["/fake/bucket/x.npz"]
        return
    with np.load(path) as npz:  # as pytorch-fid, DC-AE's and ADM's evaluators do
        for key, value in ADM.items():
            np.testing.assert_array_equal(npz[key], value)
    digest = found.digest
    reference.write(
        path, name="val-512", n=20, resolution=512, protocol=protocol, pool=POOL, spatial=SPACE,
        pictures=Pictures(3, 8, 8, IMAGES),
    )  # fmt: skip
    assert read(path).digest == digest, "the same statistics are the same file"


def with_(key, value, of=FID):
    return {**of, key: value}


ASYMMETRIC = POOL.covariance.copy()
ASYMMETRIC[0, 1] += 1e-2
NEGATIVE = POOL.covariance - np.diag([0, 9, 0, 0, 0, 0])


@pytest.mark.parametrize(("arrays", "said"), [
    ({"x": np.ones(3)}, "it holds x, no statistics (mu, sigma) and no images (arr_0)"),
    ({"mu": POOL.mean}, "sigma is missing; mu are there"),
    ({k: v for k, v in ADM.items() if k != "mu_s"}, "mu_s is missing"),
    ({"mu": np.ones(3), "sigma": np.eye(3)}, "mu is float64 of shape (3,), but the pool features "
     "are 6: floating-point numbers of shape (6,) belong there"),
    (with_("sigma", POOL.covariance[:, :3]), "sigma is float64 of shape (6, 3)"),
    (with_("mu_s", np.ones(5), ADM), "mu_s is float64 of shape (5,), but the spatial features are"),
    (with_("mu", np.ones(DIM, int)), "mu is int64"),
    (with_("mu", np.where(np.arange(DIM) == 2, np.nan, POOL.mean)), "1 numbers of mu are not"),
    (with_("sigma", POOL.covariance * np.inf), "36 numbers of sigma are not finite"),
    (with_("sigma", ASYMMETRIC), "sigma is not symmetric"),
    (with_("sigma", NEGATIVE), "sigma has negative variances"),
    (with_("arr_0", IMAGES / 255), "arr_0 is float64"),
    (with_("dcae_jax", np.array("not JSON")), "its key dcae_jax cannot be understood"),
    (with_("dcae_jax", np.array(json.dumps({"format": "dcae_jax/9"}))), "not of the format"),
])  # fmt: skip
def test_mistakes_are_told(tmp_path, arrays, said):
    with pytest.raises(UserError) as e:
        read(tmp_path / "x.npz", **arrays)
    assert said in str(e.value) and "make the file anew, or give another one" in str(e.value)
    assert str(tmp_path / "x.npz") in str(e.value)


def test_a_path_without_a_reference(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "absent.npz")
    (tmp_path / "x.pt").write_bytes(b"PK or not")
    with pytest.raises(UserError, match="is no npz file"):
        read(tmp_path / "x.pt")


def test_what_is_no_statistics_is_not_written(tmp_path):
    path = str(tmp_path / "x.npz")
    bad = frechet.Gaussian(POOL.mean * np.nan, POOL.covariance)
    with pytest.raises(UserError, match=r"x\.npz is not written: 6 numbers of mu are not finite"):
        reference.write(path, name="x", n=20, resolution=8, protocol={}, pool=bad)
    with pytest.raises(UserError, match=r"letters, digits and ._\+-, not 'val \[512\]'"):
        reference.write(path, name="val [512]", n=20, resolution=8, protocol={}, pool=POOL)
    assert not list(tmp_path.iterdir())
