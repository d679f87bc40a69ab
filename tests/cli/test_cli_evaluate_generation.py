"""`evaluate` of a diffusion model: its samples are those of `sample`, its scores plain numpy's."""

import argparse
import contextlib
import io
import json
import pathlib
import shutil

import frozen_nets
import jax
import numpy as np
import pytest
import runs
import test_cli_sample as samples

from dcae_jax import sharding
from dcae_jax.cli import evaluate, sample
from dcae_jax.config import MeshConfig
from dcae_jax.evals import frechet, reference
from dcae_jax.nets import inception

N = 21  # in batches of four
SIDE = 16


@pytest.fixture(scope="module")
def run(workdir, tmp_path_factory) -> pathlib.Path:
    """A diffusion run on the latents of `workdir`; do not write into it."""
    return samples.save(tmp_path_factory.mktemp("diffuse") / "run", samples.manifest_of(workdir))


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> tuple[pathlib.Path, frechet.Gaussian]:
    """(statistics of a training set that is made up, written as --write-reference does, them)."""
    path = tmp_path_factory.mktemp("reference") / "train.npz"
    pool = frechet.gaussian(np.random.default_rng(0).normal(size=(9, 128)))
    net = inception.info(frozen_nets.folder() / "inception.safetensors")
    about = {"resize": {"features": "half_pixel"}, "nets": {"inception": net["params_sha256"]}}
    reference.write(str(path), name="train-16", n=5000, resolution=SIDE, protocol=about, pool=pool)
    return path, pool


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Quicker to compile than for the eight fake ones."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda cfg, devices=None: mesh)
        yield


@pytest.fixture
def given(run, train, tmp_path) -> list:
    """The options of most tests."""
    argv = ["evaluate", "--from", run, "--reference", train[0], "--nets", frozen_nets.folder()]
    return [*argv, "--n", N, "--batch", 4, "--out", tmp_path / "out"]


@pytest.fixture(scope="module")
def scored(run, train, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """(a folder of scores with the features kept, what was said); do not write into it."""
    out, said = tmp_path_factory.mktemp("scored") / "out", io.StringIO()
    argv = ["--from", run, "--reference", train[0], "--nets", frozen_nets.folder(), "--keep-parts"]
    with contextlib.redirect_stdout(said):
        argv += ["--n", N, "--batch", 4, "--out", out]
        assert evaluate.main([str(a) for a in argv]) == 0
    return out, said.getvalue()


def result(out: pathlib.Path) -> dict:
    (found,) = json.loads((out / "metrics.json").read_text())["results"]
    return found


def test_the_samples_are_those_of_the_protocol_and_sample_goes_on_with_them(scored, run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(scored[0], out)
    record = json.loads((out / "samples" / "sample.json").read_text())
    # torch.randint(0, 3, (21,), generator=torch.Generator().manual_seed(0))
    drawn = np.random.RandomState(0).randint(0, 2**32, size=N, dtype=np.uint32) % 3
    argv = ["--from", run, "--classes", "random", "--seed", 0, "--dtype", "float32"]
    argv += ["--out", out / "samples", "--batch", 4, "--n", N]
    said = io.StringIO()
    before = runs.digest(out / "samples" / "images")
    with contextlib.redirect_stdout(said):
        assert sample.main([str(a) for a in argv]) == 0
    assert f"{N} of {N} there already" in said.getvalue()
    assert runs.digest(out / "samples" / "images") == before and len(before) == N
    assert record["order"] == "random (torch.randint)" and record["seed"] == 0
    job = samples.job(*argv)
    assert job.labels.tolist() == drawn.tolist()


def test_the_scores_by_plain_numpy_of_the_features(scored, train):
    out, said = scored
    (part,) = (out / "parts").iterdir()
    with np.load(part) as found:
        pool, logits = found["pool"].astype(np.float64), found["logits"].astype(np.float64)
    assert pool.shape == (N, 128) and logits.shape == (N, 1008)
    x, mean = (pool - pool.mean(0)) / np.sqrt(N - 1), train[1]
    # tr (A B)^(1/2) is the sum of the roots of the eigenvalues of X B X'.
    roots = np.sqrt(np.linalg.eigvalsh(x @ mean.covariance @ x.T).clip(0)).sum()
    traces = np.sum(x**2) + np.trace(mean.covariance)
    expected = np.sum((pool.mean(0) - mean.mean) ** 2) + traces - 2 * roots
    scores = result(out)["scores"]
    assert scores["gfid"]["value"] == pytest.approx(expected, rel=1e-6)
    assert scores["gfid"]["label"] == "gfid21[train-16]" and not scores["gfid"]["comparable"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True))[np.random.RandomState(2020).permutation(N)]
    parts = [p[i * N // 10 : (i + 1) * N // 10] for i in range(10)]
    each = [np.exp(np.mean(np.sum(q * np.log(q / q.mean(0)), 1))) for q in parts]
    assert scores["is"]["value"] == pytest.approx(np.mean(each), rel=1e-6)
    assert scores["is"]["label"] == "is21"
    assert "gfid21[train-16]" in said and "is21" in said


def test_the_protocol_says_how_samples_were_drawn(scored, run, train):
    found = result(scored[0])
    assert found["kind"] == "generation" and found["subject"]["source"] == str(run)
    assert found["subject"]["weights"]["step"] == 8
    record = json.loads((scored[0] / "samples" / "sample.json").read_text())
    about = found["protocol"]
    assert {name: about[name] for name in (
        "n", "reference", "reference_n", "resolution", "sampler", "steps", "labels", "classes",
        "seed", "weights", "dtype", "matmul_precision", "preset", "decoder",
    )} == {
        "n": N, "reference": "train-16", "reference_n": 5000, "resolution": SIDE,
        "sampler": "dpm_2m", "steps": 3, "labels": "random", "classes": 3, "seed": 0,
        "weights": "ema", "dtype": "float32", "matmul_precision": "highest", "preset": "dcae",
        "decoder": record["decoder"],
    }  # fmt: skip
    assert about["guidance"]["scale"] == 2.0 and about["guidance"]["stop"] == 1.0
    assert about["resize"] == {"features": "half_pixel", "is": "tf1"}
    assert len(about["nets"]["inception"]) == len(about["reference_digest"]) == 64
    assert "uint8" in about["quantisation"] and len(about["decoder"]) == 64
    (name,) = found["pictures"]
    assert (scored[0] / name).exists()


def test_a_killed_command_goes_on_with_drawing_and_with_scoring(
    command, given, scored, monkeypatch, tmp_path
):
    """Killed when a sample was still missing, then after the last one was drawn."""
    out = tmp_path / "out"
    shutil.copytree(scored[0], out, ignore=shutil.ignore_patterns("parts", "metrics.json"))
    (out / "samples" / "images" / "000017.png").unlink()

    def die(job):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "_compute", die)
        command(*given)
    code, said, complaints = command(*given)
    assert code == 0 and f"{N} of {N} there already" in said, complaints
    mine, theirs = result(out), result(scored[0])
    assert runs.digest(out / "samples" / "images") == runs.digest(scored[0] / "samples" / "images")
    assert mine["scores"] == theirs["scores"] and not (out / "parts").exists()
    code, said, _ = command(*given)
    assert code == 0 and "is finished already" in said
    code, _, complaints = command(*given, "--cfg", 1)
    assert code == 2 and "holds another evaluation" in complaints
    assert "guidance.scale: 2.0 -> 1.0" in complaints


def test_a_folder_of_sample_is_scored_as_it_is(command, scored, train, tmp_path):
    folder, out = tmp_path / "drawn", tmp_path / "scores"
    shutil.copytree(scored[0] / "samples", folder)
    given = [
        "evaluate",
        "--samples",
        folder,
        "--reference",
        train[0],
        "--nets",
        frozen_nets.folder(),
    ]
    given += ["--batch", 7, "--out", out]
    code, _, complaints = command(*given)
    assert code == 0, complaints
    mine, theirs = result(out), result(scored[0])
    assert mine["protocol"] == theirs["protocol"]
    assert mine["subject"] == theirs["subject"] | {"source": str(folder)}
    for name, score in theirs["scores"].items():
        # f32 sums of another batch size.
        assert mine["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-5)
    (folder / "images" / "000003.png").unlink()
    code, _, complaints = command(*given, "--out", tmp_path / "other")
    assert code == 2 and "lacks 1 of its 21 samples, the first is number 3" in complaints
    code, _, complaints = command(*given, "--samples", tmp_path, "--out", tmp_path / "other")
    assert code == 2 and "has no whole sample.json: give a folder of `sample`" in complaints


def test_mistakes_are_told_before_anything_is_drawn(command, given, workdir, train, tmp_path):
    plain, folder = given[:3], ["--nets", frozen_nets.folder(), "--out", tmp_path / "out"]
    ask = "evaluate --images TRAIN --resolution 16 --protocol adm --write-reference ref.npz"
    for argv, said in (
        ([*plain, *folder, "--protocol", "adm"], ask),
        ([*given, "--metrics", "sfid"], "has no mu_s and sigma_s (sFID's)"),
        ([*given, "--metrics", "precision"], "precision needs the images of a reference"),
        ([*given, "--metrics", "psnr"], "no 'psnr' of a diffusion model"),
        ([*given, "--protocol", "adm"], "was made with resize.features = half_pixel, not tf1"),
        ([*given, "--n", 5], "5 image(s) are too few: is needs 10 or more"),
        ([*given, "--images", tmp_path], "--images: --from is a diffusion model"),
        ([*given, "--resolution", 32], "--resolution 32: samples are scored as they are, 16"),
        ([*given, "--sampler", "ddpm"], "does not fit the flow"),
        ([*given, "--seed", -1], "--seed -1"),
        ([*given, "--config=configs/demo.py"], "--config is for data of autoencoders"),
        (
            ["evaluate", "--from", workdir, *folder, "--cfg", 2],
            "of an autoencoder nothing is drawn",
        ),
        (["evaluate", "--samples", tmp_path, *folder, "--cfg", 2], "is known from its sample.json"),
        (
            ["evaluate", "--samples", tmp_path, *folder, "--n", 5],
            "--n: --samples is a whole folder",
        ),
        (["evaluate", "--images", tmp_path, *folder, "--labels", "random"], "nothing is drawn"),
    ):
        code, _, complaints = command(*argv)
        assert code == 2 and said in complaints, (argv, complaints)
        assert not (tmp_path / "out" / "samples").exists()


def test_labels_follow_the_preset_unless_they_are_named(run, train, tmp_path):
    from dcae_jax.cli import _evaluate_generation

    def order(*more):
        argv = ["--from", run, "--nets", frozen_nets.folder(), "--out", tmp_path / "x", *more]
        args = evaluate._parser().parse_args([str(a) for a in (*argv, "--metrics", "is")])
        assert isinstance(args, argparse.Namespace)
        (found,) = _evaluate_generation.job(args).evaluations
        return found.protocol["labels"], found.protocol["seed"], found.work.n

    assert order() == ("random", 0, 50_000)
    assert order("--protocol", "adm", "--n", 30) == ("balanced", 0, 30)
    assert order("--protocol", "adm", "--labels", "random", "--seed", 4) == ("random", 4, 50_000)
