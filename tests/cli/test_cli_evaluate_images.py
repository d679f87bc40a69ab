"""`evaluate` of two sets of images, against statistics, and the statistics that it writes."""

import json
import pathlib
from collections.abc import Callable

import frozen_nets
import jax
import networks
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from dcae_jax import sharding
from dcae_jax.cli import _evaluate_job
from dcae_jax.config import MeshConfig
from dcae_jax.evals import frechet, npz, parts, reference

N, SIDE = 12, 24


@pytest.fixture(scope="session")
def nets(tmp_path_factory) -> pathlib.Path:
    return frozen_nets.write(tmp_path_factory.mktemp("nets"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(_evaluate_job, "_mesh", lambda: mesh)


def originals() -> np.ndarray:
    return np.stack([networks.picture(SIDE, SIDE, i) for i in range(N)])


def noisy(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-9, 10, (N, SIDE, SIDE, 3))
    return np.clip(originals() + noise, 0, 255).astype(np.uint8)


def save(folder: pathlib.Path, images: np.ndarray, suffix: str = "png") -> pathlib.Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02d}.{suffix}")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Folders `made` and `val`, and an npz of each; do not write into them."""
    root = tmp_path_factory.mktemp("sets")
    for name, images in (("made", noisy()), ("val", originals())):
        save(root / name, images)
        np.savez(root / f"{name}.npz", arr_0=images)
    return {p.name: p for p in root.iterdir()}


@pytest.fixture
def evaluated(command, nets, tmp_path) -> Callable[..., dict]:
    """The result of the command; a folder of its own each time."""
    numbers = iter(range(99))

    def run(*options: object) -> dict:
        out = tmp_path / f"out{next(numbers)}"
        code, _, complaints = command(
            "evaluate", "--nets", nets, "--batch", 4, "--out", out, *options
        )
        assert code == 0, complaints
        return json.loads((out / "metrics.json").read_text())["results"][0] | {"out": out}

    return run


def values(result: dict) -> dict[str, float]:
    return {name: score["value"] for name, score in result["scores"].items()}


def test_folders_files_and_statistics_of_the_same_images_agree(
    command, evaluated, sets, nets, tmp_path
) -> None:
    metrics = ["--metrics", "fid,is"]
    folders = evaluated("--images", sets["made"], "--against", sets["val"], *metrics)
    assert folders["kind"] == "images" and folders["scores"]["fid"]["label"] == "fid12[val-24]"
    assert folders["protocol"]["reference_n"] == N and folders["protocol"]["resolution"] == SIDE
    assert folders["protocol"]["crop"] == "none: images of one size"
    assert values(folders)["fid"] > 0.1 and (folders["out"] / "grid-24.png").exists()
    files = evaluated("--images", sets["made.npz"], "--against", sets["val.npz"], *metrics)
    assert values(files) == pytest.approx(values(folders), rel=1e-6)
    path = tmp_path / "ref.npz"
    given = ["evaluate", "--images", sets["val"], "--nets", nets, "--batch", 5]
    code, said, complaints = command(
        *given, "--write-reference", path, "--data-name", "imagenet", "--metrics", "fid"
    )
    assert code == 0 and "imagenet-24, 12 images" in said, complaints
    assert [p.name for p in tmp_path.glob("ref*")] == ["ref.npz"], "no parts are left"
    found = evaluated("--images", sets["made"], "--reference", path, *metrics)
    assert found["scores"]["fid"]["label"] == "fid12[imagenet-24]"
    assert values(found) == pytest.approx(values(folders), rel=1e-6)
    assert "N = 12 < 2048" in found["scores"]["fid"]["note"]
    with np.load(path) as written:  # as pytorch-fid reads it
        assert {"mu", "sigma"} <= {*written} and written["mu"].shape == (128,)
    same = evaluated("--images", sets["val"], "--reference", path, *metrics)
    assert values(same)["fid"] < 1e-6
    # What the statistics were made with must fit.
    for options, message in (
        (["--protocol", "adm"], "was made with resize.features = half_pixel, not tf1"),
        (["--resolution", 20], "is of images of 24 px, these have 20"),
    ):
        code, _, complaints = command(
            "evaluate", "--images", sets["made"], "--reference", path, "--nets", nets, "--out",
            tmp_path / "x", *options,
        )  # fmt: skip
        assert code == 2 and message in complaints, complaints
    code, _, complaints = command(*given, "--write-reference", path)
    assert code == 2 and "exists" in complaints


@pytest.mark.slow
def test_sfid_to_statistics_that_are_written_by_default(command, evaluated, sets, nets, tmp_path):
    """Slow for the roots of its covariances, 2023 x 2023."""
    path = tmp_path / "ref.npz"
    given = ["evaluate", "--images", sets["val"], "--nets", nets, "--write-reference", path]
    assert command(*given)[0] == 0
    with np.load(path) as written:  # as ADM's evaluator reads it
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= {*written}
        assert written["sigma_s"].shape == (2023, 2023)
    found = evaluated("--images", sets["made"], "--reference", path, "--metrics", "sfid")
    assert found["scores"]["sfid"]["label"] == "sfid12[val-24]"
    folders = evaluated("--images", sets["made"], "--against", sets["val"], "--metrics", "sfid")
    assert values(found)["sfid"] > 1
    # The same features; in the file as float64.
    assert values(found)["sfid"] == pytest.approx(values(folders)["sfid"], rel=1e-6)


def test_adm_takes_statistics_and_images_of_its_reference_batch(
    evaluated, sets, nets, tmp_path
) -> None:
    """mu, sigma of other images than arr_0, as ADM's are: FID is of those, recall of these."""
    adm = ["--protocol", "adm", "--metrics", "fid,precision,recall", "--keep-parts"]
    plain = evaluated("--images", sets["made"], "--against", sets["val"], *adm)
    with np.load(plain["out"] / "parts" / "against-0000000.npz") as kept:
        pool = kept["pool"]
    moved = frechet.gaussian(pool.astype(np.float64) + 1.0)
    batch = tmp_path / "VIRTUAL.npz"
    np.savez(batch, arr_0=originals(), mu=moved.mean, sigma=moved.covariance)
    found = evaluated("--images", sets["made"], "--reference", batch, *adm)
    a, b = values(plain), values(found)
    assert (a["precision"], a["recall"]) == (b["precision"], b["recall"])
    with np.load(found["out"] / "parts" / "images-0000000.npz") as kept:
        mine = frechet.gaussian(kept["pool"])
    assert b["fid"] == pytest.approx(frechet.distance(mine, moved), rel=1e-9) != a["fid"]
    assert found["scores"]["recall"]["label"] == "recall12[VIRTUAL]"
    assert found["protocol"]["resize"] == {"features": "tf1"}


def test_pairs_of_one_name(evaluated, sets, tmp_path) -> None:
    jpegs = save(tmp_path / "val", originals(), "bmp")
    Image.fromarray(noisy()[3]).save(sets["made"].parent / "probe.png")
    options = ["--images", sets["made"], "--against", jpegs, "--metrics", "psnr,ssim,fid"]
    found = evaluated(*options)
    psnr = [peak_signal_noise_ratio(a, b) for a, b in zip(originals(), noisy(), strict=True)]
    assert values(found)["psnr"] == pytest.approx(np.mean(psnr), rel=1e-6)
    error = np.std(psnr, ddof=1) / np.sqrt(N)
    assert found["scores"]["psnr"]["error"] == pytest.approx(error, rel=1e-3)
    few = evaluated(*options[:-1], "psnr", "--n", 3)
    assert values(few)["psnr"] == pytest.approx(np.mean(psnr[::4]), rel=1e-6)
    crops = evaluated(*options[:-1], "psnr", "--resolution", 16)
    assert crops["scores"]["psnr"]["label"] == "psnr12[val-16]"
    assert crops["protocol"]["crop"].startswith("centre")


def test_mistakes_are_told_before_anything_is_computed(
    command, nets, sets, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(parts, "compute", lambda *a: pytest.fail("computed"))
    made, val = sets["made"], sets["val"]
    fewer = save(tmp_path / "fewer", noisy()[:5])
    twice = save(tmp_path / "twice", noisy())
    Image.fromarray(noisy()[0]).save(twice / "00.bmp")
    larger = save(tmp_path / "larger", np.zeros((N, 32, 32, 3), np.uint8))
    mixed = save(tmp_path / "mixed", noisy())
    Image.fromarray(networks.picture(30, 40)).save(mixed / "00.png")
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((5, 8, 9, 3), np.uint8))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((5, 8, 8, 3)))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.png").write_text("x")
    pair = ["--images", made, "--against", val]
    for options, message in (
        ([], "nothing to evaluate: give --from, or --images"),
        (["--images", made], "against what? Give --against"),
        ([*pair, "--metrics", "is"], f"--against {val}: is compares with nothing; leave"),
        ([*pair, "--reference", "x.npz"], "both name what is compared with"),
        ([*pair, "--config=configs/demo.py"], "--config is for --from"),
        ([*pair, "--metrics", "rfid"], "did you mean fid?"),
        ([*pair, "--metrics", "latent-rms"], "no 'latent-rms' of two sets"),
        ([*pair, "--metrics", "kid"], "12 image(s) are too few: kid needs 1000"),
        ([*pair, "--metrics", "ms-ssim"], "ms-ssim needs images of 176 px"),
        ([*pair, "--n", 13], "ask for at most 12"),
        ([*pair, "--metrics", "psnr", "--n", 13], "has 12 images"),
        ([*pair, "--resolution", "16,20"], "sets of images have one"),
        (["--images", made, "--against", "nowhere"], "--against nowhere is no folder of images"),
        (["--images", made, "--against", larger], "are of 24 px, --against"),
        (["--images", mixed, "--against", val], "no squares of one size (11 of 24 x 24 px"),
        (["--images", tmp_path / "text", "--against", val], "none of its 1 files is an image"),
        (["--images", made, "--against", fewer, "--metrics", "psnr"],
         "7 of 12 + 5 have no partner, the first is '05'"),
        (["--images", twice, "--against", val, "--metrics", "psnr"], "differ in their suffix"),
        (["--images", sets["made.npz"], "--against", val, "--metrics", "psnr"], "two folders"),
        (["--images", sets["made.npz"], "--against", val, "--n", 13], "has 12 images"),
        (["--images", sets["made.npz"], "--against", val, "--resolution", 16], "not cropped here"),
        (["--images", tmp_path / "wide.npz", "--against", val], "9 x 8 px"),
        (["--images", tmp_path / "float.npz", "--against", val], "is float64"),
        (["--images", made, "--against", tmp_path / "wide.npz"], "these have 24"),
        (["--images", made, "--write-reference", tmp_path / "r.txt"], "must end with .npz"),
        ([*pair, "--write-reference", tmp_path / "r.npz"], "of --images alone"),
        (["--images", made, "--write-reference", tmp_path / "r.npz", "--metrics", "is"],
         "a reference has the statistics of fid,sfid"),
    ):  # fmt: skip
        code, _, complaints = command(
            "evaluate", "--nets", nets, "--out", tmp_path / "out", *options
        )
        assert code == 2 and message in complaints, (options, complaints)
        assert complaints.count("error:") == 1 and not (tmp_path / "out").exists()
    code, _, complaints = command("evaluate", *pair)
    assert code == 2 and "--out DIR is missing" in complaints


def test_bad_images_of_either_set_stop_or_are_left_out(command, nets, tmp_path) -> None:
    made, val = save(tmp_path / "made", noisy()), save(tmp_path / "val", originals())
    (made / "02.png").write_bytes((made / "02.png").read_bytes()[:300])
    (val / "05.png").write_bytes((val / "05.png").read_bytes()[:300])
    (val / "02.png").write_bytes((val / "02.png").read_bytes()[:300])
    given = ["evaluate", "--nets", nets, "--images", made, "--against", val, "--metrics", "psnr",
             "--out", tmp_path / "out"]  # fmt: skip
    code, _, complaints = command(*given)
    assert code == 2 and "2 image(s) cannot be used" in complaints
    code, _, complaints = command(*given, "--skip-bad")
    assert code == 0, complaints
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"][0]
    assert found["protocol"]["left_out"] == 2 and found["protocol"]["n"] == 10
    kept = [i for i in range(N) if i not in (2, 5)]
    psnr = [peak_signal_noise_ratio(originals()[i], noisy()[i]) for i in kept]
    assert values(found)["psnr"] == pytest.approx(np.mean(psnr), rel=1e-6)


def test_a_reference_of_ours_is_read_with_its_number_of_images(tmp_path) -> None:
    pool = frechet.gaussian(np.random.default_rng(0).normal(size=(9, 128)))
    reference.write(
        tmp_path / "r.npz", name="x-24", n=9, resolution=24, protocol={}, pool=pool,
        pictures=npz.Pictures(2, 24, 24, [np.zeros((24, 24, 3), np.uint8)] * 2),
    )  # fmt: skip
    found = reference.read(tmp_path / "r.npz", pool=128)
    assert (found.name, found.n, found.resolution) == ("x-24", 9, 24)
