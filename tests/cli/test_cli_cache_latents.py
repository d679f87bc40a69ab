"""`cache-latents`: what it stores, what it refuses, and that a kill costs nothing but time."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import fake_store
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import runs
import tiny
from etils import epath
from PIL import Image

from dcae_jax import autoencoder, outputs
from dcae_jax.cli import cache_latents
from dcae_jax.config import InitWeights
from dcae_jax.data import latents, pipeline, transforms
from dcae_jax.data.latents import LatentDataConfig

SIDE = 16


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Two classes of 6 photographs."""
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(6):
            picture = networks.picture(20, 30, i + 10 * (label == "dog"))
            Image.fromarray(picture).save(tmp_path / "photos" / label / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def given(workdir, folder, tmp_path) -> list:
    """The options of most tests: f32, three shards of 12 images."""
    return [
        "cache-latents", "--from", workdir, "--images", folder, "--resolution", SIDE, "--batch", 8,
        "--shard-records", 5, "--dtype", "f32", "--out", tmp_path / "out",
    ]  # fmt: skip


def crop(label: str, i: int) -> np.ndarray:
    return transforms.center_crop(networks.picture(20, 30, i + 10 * (label == "dog")), SIDE)


CROPS = [crop(label, i) for label in ("cat", "dog") for i in range(6)]


def encoded(net: autoencoder.Autoencoder, images: list[np.ndarray]) -> np.ndarray:
    """What `Autoencoder.encode` gives, in one batch."""
    x = np.stack(images).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.asarray(net.encode(jnp.asarray(x)))


def stored(out, split: str = "train") -> list[latents.Record]:
    source = latents.LatentSource(str(out), split)
    return [source.read(i) for i in range(len(source))]


def test_latents_of_a_folder(command, given, workdir, folder, tmp_path) -> None:
    code, said, _ = command(*given)
    assert code == 0
    net = autoencoder.load(str(workdir))
    want = encoded(net, CROPS)
    found = stored(tmp_path / "out")
    # Another batch size and so another program; 1e-5 of values around 1.
    np.testing.assert_allclose(np.stack([r.latent for r in found]), want, atol=1e-5)
    assert [r.name for r in found] == [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(6)]
    assert [r.label for r in found] == [0] * 6 + [1] * 6
    manifest = latents.read_manifest(str(tmp_path / "out"))
    flat = want.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(manifest.mean, flat.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(manifest.std, flat.std(axis=0), rtol=1e-5)
    assert manifest.rms == pytest.approx(np.sqrt(np.mean(flat**2)), rel=1e-5)
    assert manifest.scaling_factor == 1 / manifest.rms and manifest.scaling.startswith("1 / RMS")
    assert manifest.classes == ("cat", "dog") and manifest.num_classes == 2
    assert (manifest.images, manifest.bad, len(manifest.shards)) == (12, 0, 3)
    assert manifest.shape == (4, 4, 4) and manifest.resolution == SIDE
    assert manifest.encoder == net.encoder and manifest.decoder == net.decoder != net.encoder
    assert manifest.autoencoder == str(workdir) and manifest.weights == "ema"
    assert manifest.model == net.cfg and manifest.psnr_cost == 0.0
    assert latents.check(manifest, net) == []
    assert "12 latents 4x4x4 in 3 shard(s)" in said and "12/12 images" in said
    assert f"{manifest.rms:.6g}" in said and "0:00 left" in said


def test_what_bf16_costs_is_measured(command, given, workdir, tmp_path) -> None:
    code, said, _ = command(*given, "--dtype", "bf16")
    assert code == 0
    manifest = latents.read_manifest(str(tmp_path / "out"))
    net = autoencoder.load(str(workdir))
    z = encoded(net, CROPS)
    rounded = np.asarray(jnp.asarray(z).astype(jnp.bfloat16).astype(jnp.float32))
    for latent, score in ((z, manifest.psnr), (rounded, manifest.psnr_stored)):
        image = np.asarray(net.decode(jnp.asarray(latent)), np.float64)
        pixels = np.clip(np.round(image * 127.5 + 127.5), 0, 255)
        mse = np.square(pixels - np.stack(CROPS)).mean(axis=(1, 2, 3))
        # A pixel in 10^4 may be rounded the other way by another program.
        assert score == pytest.approx(np.mean(10 * np.log10(255**2 / mse)), abs=1e-3)
    assert manifest.psnr_cost != 0, "some pixels are rounded to their neighbour"
    assert manifest.psnr_images == 12 and f"{manifest.psnr_cost:.4f} dB less" in said
    found = np.stack([r.latent for r in stored(tmp_path / "out")])
    np.testing.assert_allclose(found, z, rtol=2**-8, atol=1e-5)


def test_mirror_images_and_moments_of_a_kl_autoencoder(command, given, tmp_path) -> None:
    kl = networks.save(tmp_path / "kl", model=tiny.kl_model())
    assert command(*given, "--from", kl, "--flips")[0] == 0
    net = autoencoder.load(str(kl))
    source = latents.LatentSource(str(tmp_path / "out"), "train")
    for mirrored in (False, True):
        images = [c[:, ::-1] if mirrored else c for c in CROPS]
        x = np.stack(images).astype(np.float32) / np.float32(127.5) - np.float32(1)
        mean, logvar = net.moments(jnp.asarray(x))
        found = [source.read(i, mirrored) for i in range(12)]
        np.testing.assert_allclose(np.stack([r.latent for r in found]), mean, atol=1e-5)
        np.testing.assert_allclose(np.stack([r.logvar for r in found]), logvar, atol=1e-5)
    plan = latents.read_manifest(str(tmp_path / "out")).plan
    assert plan.moments and plan.flips
    with LatentDataConfig(path=str(tmp_path / "out")).batches(batch=4, seed=0) as batches:
        assert next(batches).keys() == {"latent", "logvar", "label"}


def test_random_crops_are_those_of_training(command, given, workdir, tmp_path) -> None:
    """--n N: the crops of the first N positions of a run with seed 0 on the run's own data."""
    options = [a for a in given if a not in ("--images", "--resolution")]
    options = [a for a in options if a not in (tmp_path / "photos", SIDE)]
    code, _, complaints = command(*options)
    assert code == 2 and "--crops K of each image or --n N" in complaints
    assert command(*options, "--n", 40)[0] == 0
    data = runs.make_config("phase1").data
    data.flip = False
    with data.batches(batch=40, seed=0) as batches:
        images = list(next(batches)["image"])
    want = encoded(autoencoder.load(str(workdir)), images)
    found = stored(tmp_path / "out")
    np.testing.assert_allclose(np.stack([r.latent for r in found]), want, atol=1e-5)
    assert "training order" in latents.read_manifest(str(tmp_path / "out")).plan.positions


def test_several_crops_of_each_image(command, given, tmp_path) -> None:
    code, *_ = command(*given, "--transform", "random_crop", "--crops", 3)
    assert code == 0
    found = stored(tmp_path / "out")
    assert [r.name for r in found] == [f"{c}/{i}.png" for c in ("cat", "dog")
                                       for i in range(6) for _ in range(3)]  # fmt: skip
    assert len({r.latent.tobytes() for r in found}) > 30, "each crop is drawn for itself"


def test_some_images_spread_over_the_data(command, given, tmp_path) -> None:
    assert command(*given, "--n", 4)[0] == 0
    assert [r.name for r in stored(tmp_path / "out")] == [
        "cat/0.png", "cat/3.png", "dog/0.png", "dog/3.png",
    ]  # fmt: skip


def test_bad_images_are_left_out_and_counted(command, given, folder, tmp_path) -> None:
    (folder / "cat" / "2.png").write_text("no image")
    (folder / "dog" / "5.png").write_bytes(b"")
    code, _, complaints = command(*given)
    assert code == 2 and "2 of 12" in complaints and "cat/2.png: not an image" in complaints
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    many = pipeline.DataConfig().max_bad_fraction
    assert many < 2 / 12


def test_bad_images_below_the_limit(command, given, folder, tmp_path, monkeypatch) -> None:
    (folder / "cat" / "2.png").write_text("no image")
    default = cache_latents._data

    def lenient(*args) -> pipeline.DataConfig:
        data = default(*args)
        data.max_bad_fraction = 0.5
        return data

    monkeypatch.setattr(cache_latents, "_data", lenient)
    code, said, _ = command(*given)
    assert code == 0 and "left out: cat/2.png: not an image" in said
    manifest = latents.read_manifest(str(tmp_path / "out"))
    assert (manifest.images, manifest.bad) == (11, 1)
    assert [images for images, *_ in manifest.shards] == [4, 5, 2]
    names = [r.name for r in stored(tmp_path / "out")]
    assert len(names) == 11 and "cat/2.png" not in names


def test_a_latent_that_is_not_finite_is_named(command, given, tmp_path) -> None:
    broken = networks.variables(tiny.model())["params"]
    broken["encoder"]["conv_out"]["kernel"] = broken["encoder"]["conv_out"]["kernel"] * np.inf
    wrong = networks.save(tmp_path / "w", frozen={"encoder": broken["encoder"]})
    code, _, complaints = command(*given, "--from", wrong)
    assert code == 2 and "latent of cat/0.png is not finite" in complaints, complaints
    assert sorted(p.name for p in (tmp_path / "out" / "train").iterdir()) == ["plan.json"]


def test_a_finished_cache_is_only_checked(command, given, tmp_path) -> None:
    assert command(*given)[0] == 0
    before = runs.digest(tmp_path / "out")
    code, said, _ = command(*given)
    assert code == 0 and "all sums are right" in said and "note" not in said
    assert runs.digest(tmp_path / "out") == before


def test_a_refined_decoder_is_noted(command, given, workdir, tmp_path) -> None:
    """Another decoder of the same encoder, as phase 3 makes it: the cache stays, with a note."""
    assert command(*given)[0] == 0
    net = autoencoder.load(str(workdir), InitWeights.params)
    frozen = {"encoder": net.variables["params"]["encoder"]}
    other = networks.save(tmp_path / "refined", arg="gan", seed=3, frozen=frozen)
    code, said, _ = command(*given, "--from", other)
    assert code == 0 and "another decoder" in said and "nothing to do" in said


def test_what_is_missing_is_made_again_and_what_is_damaged_named(command, given, tmp_path) -> None:
    assert command(*given)[0] == 0
    before = runs.digest(tmp_path / "out")
    folder = tmp_path / "out" / "train"
    (folder / "latents-00001.array_record").unlink()
    assert command(*given)[0] == 0
    assert runs.digest(tmp_path / "out") == before
    data = bytearray((folder / "latents-00002.array_record").read_bytes())
    data[70] ^= 1
    (folder / "latents-00002.array_record").write_bytes(data)
    code, _, complaints = command(*given)
    assert code == 2 and "damaged" in complaints and "latents-00002" in complaints
    (folder / "latents-00002.array_record").unlink()
    assert command(*given)[0] == 0
    assert runs.digest(tmp_path / "out") == before


def test_a_cache_of_something_else_is_refused(command, given, folder, tmp_path) -> None:
    assert command(*given)[0] == 0
    before = runs.digest(tmp_path / "out")
    old = latents.read_manifest(str(tmp_path / "out")).plan
    other = networks.save(tmp_path / "other", seed=1)
    encoder = autoencoder.load(str(other)).encoder
    for options, message in (
        (["--from", other], f"encoder: {old.encoder[:16]} -> {encoder[:16]}"),
        (["--params", "raw"], f"encoder: {old.encoder[:16]} -> "),
        (["--resolution", 20], "resolution: 16 -> 20"),
        (["--dtype", "bf16"], "dtype: f32 -> bf16"),
        (["--flips"], "flips: False -> True"),
        (["--n", 4], "images: 12 -> 4"),
        (["--shard-records", 6], "shard_records: 5 -> 6"),
        (["--compute", "bfloat16"], "compute: float32 -> bfloat16"),
        (["--transform", "random_crop", "--n", 12], "transform: center_crop -> random_crop"),
    ):
        code, _, complaints = command(*given, *options)
        assert code == 2 and message in complaints, complaints
    Image.fromarray(networks.picture(40, 60, 9)).save(folder / "cat" / "new.png")
    pipeline._OPEN.clear()  # as in a new process: folders are listed once
    code, _, complaints = command(*given)
    assert code == 2 and f"data: {old.data} -> " in complaints
    assert runs.digest(tmp_path / "out") == before


def test_a_claim_without_a_shard_binds_nobody(command, given, tmp_path, monkeypatch) -> None:
    def die(*args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_latents, "_encode", die)
        command(*given)
    assert [p.name for p in (tmp_path / "out" / "train").iterdir()] == ["plan.json"]
    assert command(*given, "--flips")[0] == 0
    assert latents.read_manifest(str(tmp_path / "out")).plan.flips


def test_splits_of_one_cache_belong_together(command, given, folder, tmp_path) -> None:
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "set" / split)
    given = [*given, "--images", tmp_path / "set"]
    assert command(*given)[0] == 0
    other = networks.save(tmp_path / "other", seed=1)
    code, _, complaints = command(*given, "--split", "test", "--from", other)
    assert code == 2 and "another encoder (split 'train')" in complaints
    assert autoencoder.load(str(other)).encoder[:16] in complaints
    assert command(*given, "--split", "test")[0] == 0
    cfg = LatentDataConfig(path=str(tmp_path / "out"), split="test")
    assert cfg.manifest().plan.split == "test"
    assert cfg.fingerprint() != LatentDataConfig(path=str(tmp_path / "out")).fingerprint()
    (tmp_path / "set" / "val" / "cat").mkdir(parents=True)
    Image.fromarray(networks.picture(40, 60, 9)).save(tmp_path / "set" / "val" / "cat" / "1.png")
    code, _, complaints = command(*given, "--split", "val")
    assert code == 2 and "has 2 classes" in complaints


def test_a_cache_on_an_object_store_is_that_on_a_disk(command, given, tmp_path) -> None:
    store = fake_store.reset()
    assert command(*given)[0] == 0
    for _ in range(2):  # made, then checked
        assert command(*given, "--out", "fake://bucket/out")[0] == 0
    local = {p.name: p.read_bytes() for p in (tmp_path / "out" / "train").iterdir()}
    assert {name.rsplit("/", 1)[1]: data for name, data in store.objects.items()} == local


def test_space_is_looked_at_before_the_start(command, given, tmp_path, monkeypatch) -> None:
    small = types.SimpleNamespace(free=latents.MARGIN + 12 * 4 * 64)
    monkeypatch.setattr(cache_latents.shutil, "disk_usage", lambda path: small)
    code, said, complaints = command(*given)
    assert code == 2 and "GB free, these latents need about" in complaints
    assert "to encode" not in said and not (tmp_path / "out").exists()
    small.free += 12 * 400 + 3 * 2**18
    assert command(*given)[0] == 0


def test_two_commands_at_once_do_not_mix(command, given, tmp_path) -> None:
    split = epath.Path(tmp_path / "out" / "train")
    with outputs.locked(split, "--out"):  # as the other command holds it
        code, _, said = command(*given)
    assert code == 2 and "is in use by another command" in said
    assert list(split.iterdir()) == []
    assert command(*given)[0] == 0


def test_the_space_that_is_asked_for_is_what_is_used(command, given, tmp_path) -> None:
    assert command(*given)[0] == 0
    manifest = latents.read_manifest(str(tmp_path / "out"))
    used = sum(size for _, size, _ in manifest.shards)
    assert used <= manifest.plan.space(range(3)) < 4 * used


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "nowhere"], "nowhere"),
        (["--resolution", 18], "18"),
        (["--n", 13], "which has 12"),
        (["--n", -1], "--n -1 is too small"),
        (["--crops", 2], "--crops is for random transforms"),
        (["--transform", "random_crop"], "--crops K of each image or --n N"),
        (["--transform", "random_crop", "--n", 2, "--crops", 2], "give one of them"),
        (["--batch", 0], "--batch 0"),
        (["--shard-records", 0], "--shard-records 0"),
        (["--split", "a/b"], "without a slash"),
        (["--config=configs/demo.py:phase1"], "give one of them"),
        (["--confg=x"], "unknown argument(s) ['--confg=x']"),
        (["extra"], "unknown argument(s) ['extra']"),
        (["--images", "nowhere"], "is not a folder"),
    ],
)
def test_mistakes_write_nothing(command, given, tmp_path, options, message) -> None:
    code, _, complaints = command(*given, *options)
    assert code == 2 and message in complaints, complaints
    assert not (tmp_path / "out").exists()


def test_what_was_not_trained_here_has_no_data_of_its_own(command, folder, tmp_path) -> None:
    code, _, complaints = command("cache-latents", "--from", folder, "--out", tmp_path / "out")
    assert code == 2 and "was not trained here" in complaints and "--images DIR" in complaints


# ------------------------------------------------------------------------------- in real processes


def spawn(given: list, *options: object, **env: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dcae_jax", *map(str, [*given, *options])], cwd=runs.ROOT,
        env=runs.environment(PYTHONUNBUFFERED=1, **env), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def complete(*processes: subprocess.Popen) -> str:
    texts = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), texts
    return texts[0]


@pytest.mark.multiprocess
def test_killed_and_repeated_gives_the_same_bytes(workdir, tmp_path) -> None:
    """kill -9 in the middle of shards; --config with an override names the data."""
    given = [
        "cache-latents", "--from", workdir, f"--config={runs.CONFIG}:phase1", "--flips",
        "--config.data.resolution=16", "--n", 400, "--batch", 4, "--shard-records", 40,
        "--config.data.workers=1",
    ]  # fmt: skip
    complete(spawn(given, "--out", tmp_path / "whole"))
    out = tmp_path / "killed" / "train"
    inside = 0
    for done in (0, 2, 5):
        process = spawn(given, "--out", tmp_path / "killed")
        while process.poll() is None:
            if len(list(out.glob("latents-*.json"))) >= done and list(out.glob("staging-*")):
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        inside += bool(list(out.glob("staging-*")))
        assert not (out / "manifest.json").exists()
    assert inside, "no kill fell into a shard"
    text = complete(spawn(given, "--out", tmp_path / "killed"))
    assert int(text.split(" images to encode")[0].split()[-1]) < 400, "it went on"
    assert runs.digest(tmp_path / "killed") == runs.digest(tmp_path / "whole")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_make_the_cache_of_one(given, tmp_path) -> None:
    complete(spawn(given, "--out", tmp_path / "one"))
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
    assert "7 images to encode" in text, "shards 0 and 2 of 3"
    assert runs.digest(tmp_path / "two") == runs.digest(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "train" / "manifest.json").read_text())["images"] == 12
