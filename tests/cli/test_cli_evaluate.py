"""`evaluate` of an autoencoder: its numbers, going on after a kill, any devices, bad input."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import fake_store
import frozen_nets
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import runs
import scipy.linalg
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from dcae_jax import autoencoder, checkpoint, outputs, sharding
from dcae_jax.cli import _evaluate_folder, _evaluate_job, evaluate
from dcae_jax.config import InitWeights, MeshConfig
from dcae_jax.data import pipeline, transforms
from dcae_jax.evals import extract, parts

ALL = "psnr,ssim,lpips,rfid,is,precision,recall,latent-rms"  # sFID takes seconds: the other file
CHEAP = ["--metrics", "psnr,ssim,latent-rms"]


@pytest.fixture(scope="session")
def nets(tmp_path_factory) -> pathlib.Path:
    return frozen_nets.write(tmp_path_factory.mktemp("nets"))


def mesh(count: int):
    return sharding.make_mesh(MeshConfig(), jax.devices()[:count])


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    """Quicker to compile than for the eight fake ones."""
    monkeypatch.setattr(_evaluate_job, "_mesh", lambda: mesh(1))


@pytest.fixture
def given(workdir, nets, tmp_path) -> list:
    """The options of most tests: the eight test images of the run."""
    return ["evaluate", "--from", workdir, "--nets", nets, "--out", tmp_path / "out", "--batch", 3]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Five pictures without splits, the first one smaller."""
    (tmp_path / "photos").mkdir()
    for i in range(5):
        picture = networks.picture(42 if i else 40, 60, i)
        Image.fromarray(picture).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def scored(workdir, nets, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """(folder with the parts kept, what was said): all metrics at two resolutions, 18 images.

    Do not write into it.
    """
    out = tmp_path_factory.mktemp("scored") / "out"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(_evaluate_job, "_mesh", lambda: mesh(1))
        argv = [
            "--from", workdir, "--nets", nets, "--out", out, "--metrics", ALL, "--split",
            "train", "--n", 18, "--batch", 6, "--resolution", "32,40", "--keep-parts",
        ]  # fmt: skip
        assert evaluate.main([str(a) for a in argv]) == 0
    return out, said.getvalue()


def record(out: pathlib.Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def made(out: pathlib.Path) -> str:
    """metrics.json without what a clock and a machine decide, as bytes."""
    return json.dumps(record(out)["results"])


def values(out: pathlib.Path) -> dict:
    return {k: score["value"] for k, score in record(out)["results"][0]["scores"].items()}


def crops(side: int, n: int = 18, total: int = 24) -> np.ndarray:
    root = pathlib.Path(runs.make_images()) / "train"
    files = [sorted(root.iterdir())[k * total // n] for k in range(n)]
    return np.stack([transforms.center_crop(np.asarray(Image.open(f)), side) for f in files])


# -------------------------------------------------------------------------------------- its numbers


def test_the_record_and_the_table(scored, workdir, nets) -> None:
    out, said = scored
    assert sorted(p.name for p in out.iterdir()) == [
        "evaluate.json", "grid-32.png", "grid-40.png", "metrics.json", "parts",
    ]  # fmt: skip
    found = record(out)
    assert found["format"] == "dcae_jax.metrics/1"
    first, second = found["results"]
    assert (first["name"], second["name"], first["kind"]) == ("32", "40", "autoencoder")
    labels = {k: score["label"] for k, score in first["scores"].items()}
    name = "dcae_jax_tiny_images-train-32"
    assert labels["rfid"] == f"rfid18[{name}]" and labels["is"] == "is18"
    assert labels.keys() == {*ALL.split(",")}
    scores = first["scores"]
    assert scores["psnr"]["comparable"] and scores["psnr"]["note"] == ""
    note = "not comparable (N = 18 < 2048: the covariance of 2048 features is singular)"
    assert note in scores["rfid"]["note"]
    assert "comparable with nothing (inception: random weights" in scores["is"]["note"]
    assert not any(scores[k]["comparable"] for k in ("rfid", "lpips", "is", "recall"))
    net, about = autoencoder.load(str(workdir)), first["protocol"]
    assert first["subject"]["encoder"] == net.encoder and first["subject"]["step"] == 5
    assert (about["n"], about["resolution"], about["weights"]) == (18, 32, "ema")
    assert about["reference"] == name and about["reference_digest"] == about["data_digest"]
    assert about["resize"] == {"features": "half_pixel", "is": "tf1"} and about["preset"] == "dcae"
    assert about["nets"].keys() == {"inception", "lpips"} and len(about["nets"]["lpips"]) == 64
    assert "torchmetrics before 1.5" in about["ssim"] and about["matmul_precision"] == "highest"
    assert found["made"]["versions"]["jax"] == jax.__version__
    for k in scores:
        assert f"{labels[k]} " in said
    assert said.count(note) == 2, "once for each resolution"
    assert first["pictures"] == ["grid-32.png"]
    assert np.asarray(Image.open(out / "grid-32.png")).shape[1] > 3 * 384


def test_the_scores_against_independent_ones(scored, workdir) -> None:
    """From the images, the raw network and the kept features, by skimage, scipy and numpy."""
    out, _ = scored
    scores = {k: s["value"] for k, s in record(out)["results"][0]["scores"].items()}
    net, x = autoencoder.load(str(workdir)), crops(32)
    z = net.encode(jnp.asarray(x, jnp.float32) / 127.5 - 1)
    y = np.asarray(net.decode(z))
    y = np.clip(np.floor(127.5 * y + 128), 0, 255).astype(np.uint8)
    psnr = np.mean([peak_signal_noise_ratio(a, b) for a, b in zip(x, y, strict=True)])
    assert scores["psnr"] == pytest.approx(psnr, abs=1e-4)  # a pixel may be rounded the other way
    assert scores["latent-rms"] == pytest.approx(np.sqrt(np.mean(np.square(z))), rel=1e-5)
    with np.load(out / "parts" / "32-0000000.npz") as kept:
        a, b = (kept[k].astype(np.float64) for k in ("pool", "original_pool"))
        logits = kept["logits"].astype(np.float64)
    assert a.shape == (18, 128) and logits.shape == (18, 1008)
    moments = [(v.mean(0), np.cov(v, rowvar=False)) for v in (a, b)]
    (m1, s1), (m2, s2) = moments
    root = scipy.linalg.sqrtm(s1 @ s2).real  # pytorch-fid's way, good to 1e-4 where s is singular
    fid = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * root)
    assert scores["rfid"] == pytest.approx(fid, rel=1e-3)
    far = np.linalg.norm(b[:, None] - b[None], axis=-1)
    radius = np.sort(far, axis=1)[:, 3]
    inside = np.linalg.norm(a[:, None] - b[None], axis=-1) <= radius
    assert scores["precision"] == pytest.approx(inside.any(1).mean())
    order = np.random.RandomState(2020).permutation(18)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True))[order]
    edges = [i * 18 // 10 for i in range(11)]
    splits = [p[i:j] for i, j in itertools.pairwise(edges)]
    kl = [np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(0))), 1))) for q in splits]
    assert scores["is"] == pytest.approx(np.mean(kl), rel=1e-5)


def test_pairs_are_named_by_the_data_and_distributions_by_the_reference(
    command, given, nets, tmp_path
) -> None:
    np.savez(tmp_path / "train.npz", mu=np.zeros(128), sigma=np.eye(128))
    options = ["--reference", tmp_path / "train.npz", "--metrics", "psnr,rfid,is,latent-rms"]
    options += ["--data-name", "val", "--n", 10, "--split", "train", "--batch", 6]  # as `scored`
    code, _, complaints = command(*given, *options)
    assert code == 0, complaints
    found = record(tmp_path / "out")["results"][0]["scores"]
    assert {name: score["label"] for name, score in found.items()} == {
        "psnr": "psnr10[val-32]", "rfid": "rfid10[train]", "is": "is10",
        "latent-rms": "latent-rms10[val-32]",
    }  # fmt: skip


def test_results_reads_and_compares_what_is_written(command, scored, tmp_path) -> None:
    out = tmp_path / "runs" / "a"
    shutil.copytree(scored[0], out, ignore=shutil.ignore_patterns("parts"))
    code, said, _ = command("results", tmp_path / "runs")
    assert code == 0 and "Autoencoders · dcae_jax_tiny_images-train-32 · 18 images\n" in said
    page = (tmp_path / "runs" / "results.html").read_text()
    assert page.count("<figure>") == 2
    assert "psnr18<br>[dcae_jax_tiny_images-train-32]" in page
    code, said, _ = command("results", "--compare", out, out)
    assert code == 0 and said.count("+0.000 ") >= 2


def test_average_and_raw_weights_and_bfloat16(command, given, tmp_path) -> None:
    found = {}
    for name, options in (
        ("ema", []), ("raw", ["--params", "raw"]), ("half", ["--dtype", "bfloat16"])
    ):  # fmt: skip
        code, *_ = command(*given, *CHEAP, "--n", 3, *options, "--out", tmp_path / name)
        assert code == 0
        found[name] = record(tmp_path / name)["results"][0]
    assert [r["protocol"]["weights"] for r in found.values()] == ["ema", "raw", "ema"]
    assert found["half"]["protocol"]["matmul_precision"] == "default"
    psnr = {k: r["scores"]["psnr"]["value"] for k, r in found.items()}
    assert len(set(psnr.values())) == 3 and psnr["half"] == pytest.approx(psnr["ema"], abs=0.1)


@pytest.mark.parametrize(
    ("batch", "devices"),
    [(7, 1), (64, 8)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (64, 1), (1, 8), (7, 8))],
)  # fmt: skip
def test_batches_and_devices_change_nothing(
    command, given, scored, tmp_path, monkeypatch, batch, devices
) -> None:
    monkeypatch.setattr(_evaluate_job, "_mesh", lambda: mesh(devices))
    options = ["--metrics", ALL, "--split", "train", "--n", 18, "--batch", batch]
    code, _, complaints = command(*given, *options)
    assert code == 0, complaints
    want = record(scored[0])["results"][0]
    assert record(tmp_path / "out")["results"][0]["protocol"] == want["protocol"]
    # SSIM is a sum of float32 products that differ by rounding.
    for name, value in values(tmp_path / "out").items():
        assert value == pytest.approx(want["scores"][name]["value"], rel=1e-6), name


# ----------------------------------------------------------------------------------- which images


def test_the_data_and_their_names(given, folder, monkeypatch) -> None:
    def asked(*options: object) -> tuple[str, int]:
        """(what scores call the data, how many images) of what would be evaluated."""
        argv = [str(a) for a in (*given[1:], *CHEAP, *options)]
        monkeypatch.setattr(sys, "argv", ["x", *argv])  # config_flags looks there
        (found,) = evaluate._job(*evaluate._parser().parse_known_args(argv)).evaluations
        assert found.protocol["data"] == found.reference.name
        return found.reference.name, found.work.n

    tiny, photos = "dcae_jax_tiny_images", ["--images", folder, "--resolution", 24]
    assert asked() == (f"{tiny}-test-32", 8), "what the run's evaluators look at"
    assert asked("--split", "train", "--n", 5) == (f"{tiny}-train-32", 5)
    assert asked(*photos) == ("photos-24", 5)
    assert asked(*photos, "--min-size", 41) == ("photos-24", 4), "one is smaller"
    assert asked(*photos, "--data-name", "imagenet-val") == ("imagenet-val-24", 5)
    config = f"--config={runs.ROOT / runs.CONFIG}:phase1"
    assert asked(config) == (f"{tiny}-test-32", 8)
    changed = (config, "--config.data.split=train", "--resolution", 16)
    assert asked(*changed) == (f"{tiny}-train-16", 24)
    (folder / "val").mkdir()
    Image.fromarray(networks.picture(40, 60, 7)).save(folder / "val" / "x.png")
    pipeline._OPEN.clear()  # as in a new process: folders are listed once
    assert asked(*photos) == ("photos-val-24", 1)


def test_equal_images_have_an_infinite_psnr_which_is_null(command, given, tmp_path, monkeypatch):
    def equal(params, images, originals, arrays: frozenset) -> dict:
        return {"mse": jnp.zeros(len(images))}

    monkeypatch.setattr(extract, "_pair_scores", equal)  # no program is compiled of it
    code, said, _ = command(*given, "--metrics", "psnr")
    score = record(tmp_path / "out")["results"][0]["scores"]["psnr"]
    assert code == 0 and score["value"] is None and not score["comparable"]
    assert "infinite: an image equals its original" in said and " inf" in said


# ------------------------------------------------------------------------------------- going on


@pytest.fixture
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(parts, "PART", 3)


class Killed(BaseException):
    """Nothing catches it."""


def test_killed_and_repeated_gives_the_same_bytes(
    command, given, small_parts, tmp_path, monkeypatch
) -> None:
    given = [*given, "--metrics", "psnr,rfid,latent-rms"]
    assert command(*given, "--out", tmp_path / "whole")[0] == 0
    write, written = parts._write, []

    def die_at_third(*args: object) -> None:
        if len(written) == 2:
            raise Killed
        written.append(args[2])
        write(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(parts, "_write", die_at_third)
        command(*given)
    there = sorted((tmp_path / "out" / "parts").iterdir())
    assert [p.name for p in there] == ["32-0000000.npz", "32-0000003.npz"]
    there[1].write_bytes(there[1].read_bytes()[:-3])  # a disk that lost its power
    (there[0].parent / ".32-0000006.npz.77.part").write_bytes(b"what a killed one left")
    (tmp_path / "out" / "grid-32.png").write_bytes(b"")
    monkeypatch.setattr(parts, "_write", lambda *a: (written.append(a[2]), write(*a)))
    code, said, complaints = command(*given)
    assert code == 0 and "1 part(s) there already" in said, complaints
    assert written == [0, 1, 1, 2]
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    assert not (tmp_path / "out" / "parts").exists(), "gone when all is done"
    for name in ("grid-32.png", "evaluate.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_folder_says_so_and_others_are_refused(
    command, given, tmp_path, monkeypatch
) -> None:
    assert command(*given, *CHEAP)[0] == 0
    before = runs.digest(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "compute", lambda *a: pytest.fail("computed again"))
        code, said, _ = command(*given, *CHEAP)
    assert code == 0 and "is finished already" in said and "psnr8[" in said
    for options, message in (
        (["--n", 3], "results.32.images.32: 8 -> 3"),
        (["--metrics", "psnr"], "results.32.metrics"),
        (["--params", "raw"], "results.32.protocol.weights: ema -> raw"),
        (["--resolution", 64], "results.64.kind: (absent) -> autoencoder"),
        (["--data-name", "x"], "results.32.reference"),
    ):
        code, _, complaints = command(*given, *CHEAP, *options)
        assert code == 2 and message in complaints and "another evaluation" in complaints
    assert runs.digest(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    code, _, complaints = command(*given, "--out", tmp_path / "full")
    assert code == 2 and "is not empty and has no whole evaluate.json" in complaints
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_files_of_the_same_size_with_other_pixels_are_other_images(
    command, given, small_parts, tmp_path, monkeypatch
) -> None:
    """Names and sizes say nothing: of four bitmaps the last one changes."""
    folder, out = tmp_path / "bitmaps", tmp_path / "out"
    folder.mkdir()

    def save(i: int, seed: int, age: int) -> None:
        Image.fromarray(networks.picture(32, 32, seed)).save(folder / f"{i}.bmp")
        os.utime(folder / f"{i}.bmp", (age, age))
        pipeline._OPEN.clear()  # as in a new process

    for i in range(4):
        save(i, i, 1_000_000)
    given = [*given, "--metrics", "psnr", "--images", folder, "--resolution", 32]
    first = [*given, "--out", tmp_path / "first"]
    assert command(*first)[0] == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluate, "_finish", lambda *a: (_ for _ in ()).throw(Killed))
        command(*given)
    save(3, 3, 2_000_000)
    code, said, complaints = command(*first)
    assert code == 0 and "comparing pixels" in said and "finished already" in said, complaints
    assert "comparing pixels" not in command(*first)[1], "it is known from now on"
    save(3, 9, 3_000_000)
    code, _, complaints = command(*first)
    assert code == 2 and "scores of other images: the files of bitmaps-32 have" in complaints
    code, said, complaints = command(*given)
    assert code == 0 and "1 part(s) are of images that have changed since" in said, complaints
    assert "1 part(s) there already" in said
    one, two = (record(path)["results"][0]["protocol"] for path in (tmp_path / "first", out))
    assert one["data_digest"] == two["data_digest"] and one["data_pixels"] != two["data_pixels"]
    code, said, _ = command("results", "--compare", tmp_path / "first", out)
    assert code == 1 and "no difference is given of psnr" in said and "data_pixels: " in said


def test_two_commands_do_not_share_a_folder_and_a_full_disk_is_told(
    command, given, tmp_path, monkeypatch
) -> None:
    with outputs.locked(checkpoint.absolute(str(tmp_path / "out")), "--out"):
        code, _, complaints = command(*given)
    assert code == 2 and "in use by another command" in complaints
    small = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(_evaluate_folder.shutil, "disk_usage", lambda path: small)
    code, _, complaints = command(*given)
    assert code == 2 and "GB free, the features need about" in complaints


def test_an_object_store(command, given, small_parts, tmp_path) -> None:
    store = fake_store.reset()
    given = [*given, *CHEAP, "--keep-parts"]
    for name in ("fake://bucket/out", tmp_path / "out"):
        code, _, complaints = command(*given, "--out", name)
        assert code == 0, complaints
    assert "is finished already" in command(*given, "--out", "fake://bucket/out")[1]
    found = {k.removeprefix("/fake/bucket/out/"): v for k, v in store.objects.items()}
    local = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert found.keys() == local and len([k for k in found if k.startswith("parts/")]) == 3
    assert json.loads(found["metrics.json"])["results"] == record(tmp_path / "out")["results"]


# --------------------------------------------------------------------------------------- bad images


def test_bad_images_stop_or_are_counted(command, given, folder, small_parts, tmp_path) -> None:
    (folder / "1.png").write_text("x")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:500])
    given = [*given, *CHEAP, "--images", folder, "--resolution", 24]
    code, _, complaints = command(*given)
    assert code == 2 and "1 image(s) cannot be used" in complaints
    assert "1.png: not an image" in complaints and "--skip-bad" in complaints
    assert "data." not in complaints
    code, said, _ = command(*given, "--skip-bad")
    assert code == 0 and "1 part(s) there already" in said
    found = record(tmp_path / "out")["results"][0]
    assert found["protocol"]["n"] == 3 and found["protocol"]["left_out"] == 2
    assert found["scores"]["psnr"]["label"] == "psnr3[photos-24]"
    assert "2 image(s) could not be used" in said
    rest = tmp_path / "rest" / "photos"
    rest.mkdir(parents=True)
    for i in (0, 2, 3):
        shutil.copy(folder / f"{i}.png", rest)
    assert command(*given, "--images", rest, "--out", tmp_path / "good")[0] == 0
    assert values(tmp_path / "good")["psnr"] == pytest.approx(values(tmp_path / "out")["psnr"])
    for i in (0, 2, 3):
        (folder / f"{i}.png").write_text("x")
    pipeline._OPEN.clear()  # as in a new process: folders are listed once
    code, _, complaints = command(*given, "--skip-bad", "--out", tmp_path / "none")
    assert code == 2 and "0 image(s) are too few" in complaints


def test_a_mended_image_costs_its_own_part_alone(
    command, given, folder, small_parts, tmp_path, monkeypatch
) -> None:
    good = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(good[:500])
    given = [*given, "--metrics", "latent-rms", "--images", folder, "--resolution", 24]
    code, _, complaints = command(*given)
    assert code == 2 and "Mend them" in complaints and "needs a new --out" in complaints
    pipeline._OPEN.clear()  # as in a new process
    (folder / "3.png").rename(folder / "33.png")
    code, _, complaints = command(*given)
    assert code == 2 and "files of the images were added, removed or renamed" in complaints
    (folder / "33.png").rename(folder / "3.png")
    (folder / "4.png").write_bytes(good)
    pipeline._OPEN.clear()
    code, said, complaints = command(*given)
    assert code == 0 and "1 part(s) are of images that have changed" in said, complaints
    assert "1 part(s) there already" in said
    assert record(tmp_path / "out")["results"][0]["protocol"]["n"] == 5
    Image.open(folder / "0.png").save(folder / "0.png", compress_level=0)
    pipeline._OPEN.clear()
    code, said, complaints = command(*given)
    assert code == 0 and "is finished already" in said, "the same pixels in a larger file"
    shutil.copy(folder / "1.png", folder / "0.png")
    pipeline._OPEN.clear()
    code, _, complaints = command(*given)
    assert code == 2 and "holds the scores of other images" in complaints


def test_a_network_that_is_not_finite_names_the_image(command, given, tmp_path) -> None:
    net = autoencoder.load(str(given[2]), InitWeights.params)
    decoder = jax.tree.map(jnp.asarray, net.variables["params"]["decoder"])
    decoder["conv_out"]["bias"] = decoder["conv_out"]["bias"] * jnp.nan
    broken = networks.save(tmp_path / "w", frozen={"decoder": decoder})
    code, _, complaints = command(*given, *CHEAP, "--from", broken)
    assert code == 2 and "00.png and 2 more image(s) of its batch is not finite" in complaints
    assert not list((tmp_path / "out").glob("parts/*"))


# ----------------------------------------------------------------------------------- bad options


def test_mistakes_are_told_before_any_weights_are_read(
    command, given, folder, workdir, tmp_path, monkeypatch
) -> None:
    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint, "load_weights", read)
    (tmp_path / "file").write_text("")
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "mine.npz", mu=np.zeros(128), sigma=np.eye(128))
    for options, message in (
        (["--metrics", "psnr,lpip"], "no 'lpip' of an autoencoder; did you mean lpips?"),
        (["--metrics", "gfid"], "did you mean rfid?"),
        (["--metrics", "kid"], "8 image(s) are too few: kid needs 1000 or more"),
        (["--metrics", "ms-ssim"], "ms-ssim needs images of 176 px and more, these have 32"),
        (["--resolution", "0"], "'0' is no number of pixels"),
        (["--resolution", "32,x"], "'x' is no number of pixels"),
        (["--resolution", "8"], "ssim needs images of 11 px and more"),
        (["--n", 0], "--n 0 must be at least 1"),
        (["--n", 9], "ask for at most 8"),
        (["--batch", 0], "--batch 0 must be at least 1"),
        (["--batch", 1000], "--batch 1000 is more than a part, 512 images"),
        (["--min-size", -1], "--min-size -1"),
        (["--nets", tmp_path], "python -m dcae_jax import-net inception"),
        (["--nets", tmp_path, "--metrics", "lpips"], "python -m dcae_jax import-net lpips-alex"),
        (["--images", "nowhere"], "--images nowhere is no folder of images"),
        (["--images", "nowhere", "--nets", tmp_path], "--images nowhere is no folder of images"),
        (["--from", "nowhere", "--nets", tmp_path], "nowhere does not exist; give a workdir"),
        (["--images", folder, f"--config={runs.CONFIG}"], "both name data"),
        (["--data-name", "a/b"], "must be letters"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--reference", tmp_path / "wrong.npz"], "pool features are 128"),
        (["--reference", tmp_path / "other.npz"], "no statistics"),
        (["--reference", tmp_path / "mine.npz", "--metrics", "sfid"], "has no mu_s and sigma_s"),
        (["--reference", tmp_path / "mine.npz", "--metrics", "recall"], "has statistics only"),
        (["--reference", tmp_path / "mine.npz", "--metrics", "psnr"], "has none"),
        (["--against", folder], "without --from"),
        (["--split", "nowhere"], "nowhere"),
        (["--from", "nowhere"], "nowhere"),
        (["--nonsense", 1], "unknown argument(s)"),
    ):
        code, _, complaints = command(*given, *options)
        assert code == 2 and message in complaints, (options, complaints)
        assert complaints.count("error:") == 1 and not (tmp_path / "out").exists()


def test_what_needs_the_weights_is_told_before_anything_is_computed(
    command, given, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(parts, "compute", lambda *a: pytest.fail("computed"))
    for options, message in (
        (["--resolution", "30"], "--resolution 30 is not a multiple of the autoencoder's factor 4"),
        (["--resolution", "32,33"], "nearest: 32"),
        (["--out", tmp_path / "file" / "x"], "could not be written"),
    ):
        (tmp_path / "file").write_text("")
        code, _, complaints = command(*given, *CHEAP, *options)
        assert code == 2 and message in complaints, (options, complaints)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- real processes


def spawn(given: list, *options: object, **env: object) -> subprocess.Popen:
    code = (
        "import sys; from dcae_jax.evals import parts; parts.PART = 3; "
        "from dcae_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, [*given, *options])], cwd=runs.ROOT,
        env=runs.environment(PYTHONUNBUFFERED=1, **env), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def complete(*processes: subprocess.Popen) -> str:
    texts = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), texts
    return texts[0]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_kill_9_and_two_processes_give_the_same_bytes(given, tmp_path) -> None:
    given = [*given, "--metrics", "psnr,lpips,rfid", "--split", "train"]
    complete(spawn(given, "--out", tmp_path / "whole"))
    killed = tmp_path / "killed"
    process = spawn(given, "--out", killed)
    while process.poll() is None and len(list(killed.glob("parts/*.npz"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 2 <= len(list(killed.glob("parts/*.npz"))) < 8, "killed in the middle"
    shutil.copytree(killed, tmp_path / "two")
    assert "part(s) there already" in complete(spawn(given, "--out", killed))
    assert made(killed) == made(tmp_path / "whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    text = complete(
        *(
            spawn(
                given, "--out", tmp_path / "two", JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=i,
            )
            for i in range(2)
        )
    )  # fmt: skip
    assert "(process 1 of 2)" in text
    assert made(tmp_path / "two") == made(tmp_path / "whole")
    assert record(tmp_path / "two")["made"]["processes"] == 2
