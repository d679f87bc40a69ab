"""`inpaint`: every mode through the command, what it writes, what it refuses."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from PIL import Image

from dcae_jax import autoencoder, checkpoint, config, inpainting, provenance, sharding, step
from dcae_jax.cli import inpaint
from dcae_jax.config import EmaConfig, MeshConfig, OptimConfig, RunConfig
from dcae_jax.data import transforms
from dcae_jax.data.latents import LatentDataConfig, Manifest, Plan, Storage
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.masking import MaskConfig, MaskKind
from dcae_jax.models.layers import Dtype
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.models.md_uvit import MDUViTConfig
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.tasks.diffuse import DiffuseConfig
from dcae_jax.tasks.latents import LatentNorm
from dcae_jax.tasks.mask_diffuse import MaskDiffuseConfig, RecTarget, StageConfig
from dcae_jax.tasks.mask_latents import MaskLatentsConfig

SIDE, GRID, CELL = 32, 8, 4  # pixels, tokens of f4 latents, pixels of a token
FLOW = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
SIZE = dict(in_channels=4, input_size=(GRID, GRID), width=16, depth=2, heads=2, dtype=Dtype.float32)
STAGE = StageConfig(clean=0.5, mask=MaskConfig(kind=MaskKind.constant, end=0.5), reconstruction=1.0)


def md_uvit(**changes) -> MaskDiffuseConfig:
    """A tiny MD-UViT that has learned both."""
    model = MDUViTConfig(num_classes=3, k_out=1, **SIZE)
    values = (
        dict(model=model, process=FLOW, stages=[STAGE], latent_norm=LatentNorm.channel) | changes
    )
    return MaskDiffuseConfig(**values)


def uvit(**changes) -> DiffuseConfig:
    """A tiny UViT."""
    return DiffuseConfig(model=UViTConfig(num_classes=3, **SIZE), process=FLOW, **changes)


def lmd(**changes) -> MaskLatentsConfig:
    """A tiny LMD with tokens of 2 x 2 latent pixels."""
    model = LMDConfig(patch=2, decoder_width=16, decoder_depth=1, decoder_heads=2, **SIZE)
    mask = MaskConfig(kind=MaskKind.constant)
    return MaskLatentsConfig(model=model, mask=mask, **({"norm_target": False} | changes))


def manifest_of(workdir: pathlib.Path) -> Manifest:
    """As the cache of this autoencoder would have it: latents 8 x 8 x 4 of three classes."""
    net = autoencoder.load(str(workdir))
    plan = Plan(
        encoder=net.encoder, resolution=SIDE, transform="center_crop", data="d", split="train",
        positions="all records", images=6, shape=(GRID, GRID, 4), moments=False, flips=False,
        dtype=Storage.f32, compute="float32", shard_records=6,
    )  # fmt: skip
    return Manifest(
        plan=plan, autoencoder=str(workdir), weights="ema", variant=None, description=net.source,
        decoder=net.decoder, model=net.cfg, dataset="folder", classes=("cat", "dog", "owl"),
        num_classes=3, images=6, bad=0, shards=((6, 100, "s"),), mean=(0.1, -0.2, 0.3, 0.0),
        std=(0.5, 1.0, 2.0, 1.5), rms=1.4, scaling_factor=0.7, scaling="1 / RMS", psnr=20.0,
        psnr_stored=20.0, psnr_images=6,
    )  # fmt: skip


def save(folder: pathlib.Path, task, manifest: Manifest | None, data=None) -> pathlib.Path:
    """A workdir of the run without any training, its weights random."""
    cfg = config.resolve(
        RunConfig(
            name="tiny",
            seed=5,
            steps=8,
            batch=8,
            task=task,
            data=data or LatentDataConfig(path="latents"),
            optim=OptimConfig(),
            ema=EmaConfig(decays=(0.9,), warmup_steps=0),
        )
    )
    config.validate(cfg)
    shapes, _ = jax.eval_shape(cfg.task.build(cfg).init, jax.random.key(0))
    gen = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.2 * gen.standard_normal(x.shape), jnp.float32), shapes
    )
    meta = provenance.meta(cfg, "tiny") | ({"latents": manifest.to_json()} if manifest else {})
    manager = checkpoint.Checkpoints(checkpoint.absolute(str(folder)), cfg.checkpoint)
    ema = {"0.9": {"params": params, "stats": {}}}
    manager.save(step.TrainState(np.int32(8), params, {}, ema, {}), meta)
    manager.close()
    return folder


@pytest.fixture(scope="module")
def runs_of(workdir, tmp_path_factory):
    """Workdirs by name, made when they are asked for; do not write into them."""
    root, made, manifest = tmp_path_factory.mktemp("inpaint"), {}, manifest_of(workdir)

    def get(name: str, task=None) -> pathlib.Path:
        if name not in made:
            task = task or {"md": md_uvit, "uvit": uvit, "lmd": lmd}[name]()
            made[name] = save(root / name, task, manifest)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    """Fake devices are not this process's first one."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(inpaint, "_mesh", lambda: mesh)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> pathlib.Path:
    """Two images that are not square."""
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(networks.picture(40, 56)).save(folder / "a.png")
    Image.fromarray(networks.picture(70, 33, 1)).save(folder / "b.png")
    return folder


BOX = "box:9,8,11,12"  # touches 3 x 3 cells of 4 px from row 2, column 2
MODES = {
    "reconstruct": (), "progressive": ("--rounds", 3),
    "diffusion": ("--sampler", "heun", "--steps", 3),
    "hybrid": ("--sampler", "dpm_2m", "--steps", 4, "--label", "dog", "--cfg", 2),
}  # fmt: skip


def refused(command, told, *argv) -> None:
    """The command says so in one sentence, and fails."""
    code, _, err = command("inpaint", *argv)
    assert code == 2 and re.search(told, err), (code, err)


def read(path: pathlib.Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def crop(path: pathlib.Path) -> np.ndarray:
    return transforms.center_crop(transforms.decode(path.read_bytes(), "x"), SIDE)


def box_pixels() -> np.ndarray:
    found = np.zeros((SIDE, SIDE), bool)
    found[8:20, 9:20] = True
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_its_scores(command, runs_of, photos, tmp_path, mode, monkeypatch):
    out = tmp_path / "out"
    code, said, err = command(
        "inpaint", "--from", runs_of("md"), "--images", photos, "--mask", BOX, "--mode", mode,
        "--out", out, *MODES[mode],
    )  # fmt: skip
    assert code == 0, err
    names = {"a.png", "b.png", "a_pasted.png", "b_pasted.png", "panels.png", "scores.json"}
    assert {p.name for p in out.iterdir()} == names
    scores, hole = json.loads((out / "scores.json").read_text()), box_pixels()
    for row in scores["images"]:
        original, result = crop(photos / f"{row['name']}.png"), read(out / f"{row['name']}.png")
        error = (result.astype(float) - original)[hole]
        assert row["mse"] == pytest.approx(np.mean(error**2), rel=1e-12)
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean(error**2)), rel=1e-12)
        pasted = read(out / f"{row['name']}_pasted.png")
        np.testing.assert_array_equal(pasted, np.where(hole[..., None], result, original))
        assert row["pixels"] == 132
        assert row["tokens"] == {"all": 64, "touched": 9, "ring": 16, "known": 39}
        assert row["latent_mse"] > 0 and row["ssim_box"] is not None
    psnrs = [row["psnr"] for row in scores["images"]]
    assert scores["mean"]["psnr"] == pytest.approx(np.mean(psnrs), rel=1e-12)
    for name, rows in (
        ("result", scores["images"]), ("autoencoder", [r["autoencoder"] for r in scores["images"]])
    ):  # fmt: skip
        pooled = 10 * np.log10(255**2 / np.mean([row["mse"] for row in rows]))  # equal holes
        assert scores["psnr_pooled"][name] == pytest.approx(pooled, rel=1e-12)
    assert f"{psnrs[0]:.2f}" in said and "39 of 64 tokens known" in said
    calls = {"reconstruct": 1, "progressive": 3, "diffusion": 5, "hybrid": 3}[mode]
    assert [row["evaluations"] for row in scores["images"]] == [calls] * 2
    asked = {k: scores.get(k) for k in ("mode", "protocol", "mask", "ring", "seed", "label")}
    label = 1 if mode == "hybrid" else None
    assert asked == {
        "mode": mode, "protocol": "pixel", "mask": BOX, "ring": 1, "seed": 5, "label": label
    }  # fmt: skip


def test_a_reconstruction_knows_its_class(command, runs_of, photos, tmp_path):
    found = {}
    for label in ("cat", "dog", None):
        out = tmp_path / str(label)
        code, _, err = command(
            "inpaint", "--from", runs_of("md"), "--images", photos / "a.png", "--mask", BOX,
            "--mode", "reconstruct", "--out", out, *(("--label", label) if label else ()),
        )  # fmt: skip
        assert code == 0, err
        found[label] = read(out / "a.png")
        said = json.loads((out / "scores.json").read_text())
        assert said["label"] == {"cat": 0, "dog": 1, None: None}[label]
    assert (found["cat"] != found["dog"]).any() and (found["cat"] != found[None]).any()


def test_panels_show_the_cells_and_what_the_decibels_are_of():
    hole = inpainting.hole(
        inpainting.Box(9, 8, 11, 12), (SIDE, SIDE), SIDE, (GRID, GRID), 1, jax.random.key(0)
    )
    grey = np.full((SIDE, SIDE, 3), 100, np.uint8)
    shown = inpaint.footprint(grey, hole)
    border = np.zeros((SIDE, SIDE), bool)
    border[CELL::CELL], border[:, CELL::CELL] = True, True
    cells = hole.masked.repeat(CELL, 0).repeat(CELL, 1)
    assert (shown[border & ~cells] > 100).all() and (shown[~border & ~cells] == 100).all()
    inside = shown[~border & hole.touched.repeat(CELL, 0).repeat(CELL, 1)]
    assert (inside == inside[0]).all() and inside[0, 0] > 100 > inside[0, 1]
    row = {"name": "a", "psnr": 9.84, "autoencoder": {"psnr": 21.0}}
    assert inpaint._panel_label(row) == "a\nhole 9.8 dB\nalone 21.0 dB"


def test_what_is_done_is_scored_when_it_is_interrupted(
    command, runs_of, photos, tmp_path, monkeypatch
):
    out, one = tmp_path / "out", inpaint._one

    def second(work, file, pixels):
        if (out / "b.png").exists() or (out / "a.png").exists():
            raise KeyboardInterrupt
        return one(work, file, pixels)

    monkeypatch.setattr(inpaint, "_one", second)
    code, said, _ = command(
        "inpaint", "--from", runs_of("md"), "--images", photos, "--mask", BOX, "--mode",
        "reconstruct", "--out", out,
    )  # fmt: skip
    assert code == inpaint.INTERRUPTED and "interrupted: 1 of 2 images" in said
    scores = json.loads((out / "scores.json").read_text())
    (row,) = scores["images"]
    assert (out / f"{row['name']}.png").exists() and (out / "panels.png").exists()


def test_the_floor_is_the_autoencoder_alone(command, runs_of, workdir, photos, tmp_path):
    out = tmp_path / "out"
    options = ("--mode", "reconstruct", "--mask", BOX, "--ring", 0, "--out", out)
    assert command("inpaint", "--from", runs_of("lmd"), "--images", photos, *options)[0] == 0
    net, hole = autoencoder.load(str(workdir)), box_pixels()
    for row in json.loads((out / "scores.json").read_text())["images"]:
        original = crop(photos / f"{row['name']}.png")
        x = jnp.asarray(original[None] / np.float32(127.5) - 1, jnp.float32)
        y = np.asarray(net.decode(net.encode(x)))[0]
        pixels = np.clip(np.floor(127.5 * (y + 1) + 0.5), 0, 255)
        expected = np.mean((pixels - original)[hole] ** 2)
        # A pixel within rounding of a half may fall to the other side.
        assert row["autoencoder"]["mse"] == pytest.approx(expected, rel=1e-3)
        assert row["tokens"]["all"] == 16, "tokens of 2 x 2 latent pixels"


def drawn_mask(path: pathlib.Path) -> np.ndarray:
    """The hole of an image of 40 x 56 px, which is resized and cropped; its picture is written."""
    hole = np.zeros((40, 56), bool)
    hole[15:25, 20:30] = True
    Image.fromarray(np.where(hole, 255, 0).astype(np.uint8)).save(path)
    return hole


@pytest.mark.parametrize(
    ("mode", "drawn"),
    [
        ("hybrid", False), ("reconstruct", True),
        pytest.param("progressive", False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_stands_in_the_hole_changes_no_bit(command, runs_of, tmp_path, mode, drawn):
    """The same image with noise in its hole: only the original differs, and what compares to it."""
    hole = drawn_mask(tmp_path / "hole.png") if drawn else box_pixels()
    gen, image = np.random.default_rng(0), networks.picture(*hole.shape)
    noisy = np.where(hole[..., None], gen.integers(0, 255, image.shape), image).astype(np.uint8)
    found = {}
    for name, pixels in (("clean", image), ("noisy", noisy)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
        code, _, err = command(
            "inpaint", "--from", runs_of("md"), "--images", tmp_path / name / "a.png", "--mask",
            tmp_path / "hole.png" if drawn else BOX, "--mode", mode,
            "--out", tmp_path / name / "out", *MODES[mode],
        )  # fmt: skip
        assert code == 0, err
        found[name] = tmp_path / name / "out"
    for file in ("a.png", "a_pasted.png"):
        assert (found["clean"] / file).read_bytes() == (found["noisy"] / file).read_bytes()
    panels = [read(found[name] / "panels.png").astype(int) for name in ("clean", "noisy")]
    columns = np.flatnonzero((panels[0] != panels[1]).any(axis=(0, 2)))
    side = SIDE * (inpaint._CELL // SIDE)
    gap = np.diff(columns).max()
    assert 3 * side < gap, "masked, result and pasted back are equal: not the first and the last"
    rows = [json.loads((found[n] / "scores.json").read_text())["images"][0] for n in found]
    assert rows[0]["mse"] != rows[1]["mse"]
    assert rows[0]["tokens"] == rows[1]["tokens"]


@pytest.mark.slow
def test_with_the_latent_protocol_the_hole_is_known_of(command, runs_of, photos, tmp_path):
    results = {}
    for protocol in ("pixel", "latent"):
        out = tmp_path / protocol
        code, said, _ = command(
            "inpaint", "--from", runs_of("lmd"), "--images", photos / "a.png", "--mask", BOX,
            "--ring", 0, "--mode", "reconstruct", "--out", out, "--protocol", protocol,
        )  # fmt: skip
        assert code == 0
        assert ("known tokens know of the hole" in " ".join(said.split())) == (protocol == "latent")
        results[protocol] = read(out / "a.png")
    assert (results["pixel"] != results["latent"]).any()


def test_random_cells_are_those_of_the_seed_and_the_image(command, runs_of, photos, tmp_path):
    masked = {}
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        code, _, err = command(
            "inpaint", "--from", runs_of("uvit"), "--images", photos, "--mask", "random:0.25",
            "--mode", "diffusion", "--sampler", "euler", "--steps", 2, "--seed", seed,
            "--out", tmp_path / name,
        )  # fmt: skip
        assert code == 0, err
        rows = json.loads((tmp_path / name / "scores.json").read_text())["images"]
        assert [row["tokens"] for row in rows] == [
            {"all": 64, "touched": 16, "ring": 0, "known": 48}
        ] * 2
        masked[name] = {
            row["name"]: (
                read(tmp_path / name / f"{row['name']}_pasted.png")
                == crop(photos / f"{row['name']}.png")
            ).all(-1)
            for row in rows
        }
        first = masked[name]["a"].reshape(GRID, CELL, GRID, CELL).all(axis=(1, 3))
        assert 48 <= first.sum() < 64, "whole cells"
    assert (masked["one"]["a"] == masked["again"]["a"]).all()
    assert (masked["one"]["a"] != masked["other"]["a"]).any()
    assert (masked["one"]["a"] != masked["one"]["b"]).any()


def test_a_mask_picture_of_the_size_of_the_image(command, runs_of, photos, tmp_path, monkeypatch):
    white = drawn_mask(tmp_path / "hole.png")
    options = ("--mask", tmp_path / "hole.png", "--mode", "reconstruct", "--ring", 0)
    code, _, err = command(
        "inpaint", "--from", runs_of("md"), "--images", photos / "a.png", *options,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    (row,) = json.loads((tmp_path / "out" / "scores.json").read_text())["images"]
    # 40 px become 32: rows 12 to 20; 56 become 45, of which 6 are cut: columns 10.07 to 18.1.
    hole = np.zeros((SIDE, SIDE), bool)
    hole[12:20, 10:19] = True
    # Around it stands what the encoder was shown: the image with its hole covered, then resized.
    image = read(photos / "a.png")
    shown = np.where(white[..., None], np.floor(image[~white].mean(0) + 0.5), image)
    shown = transforms.center_crop(shown.astype(np.uint8), SIDE)
    expected = np.where(hole[..., None], read(tmp_path / "out" / "a.png"), shown)
    np.testing.assert_array_equal(read(tmp_path / "out" / "a_pasted.png"), expected)
    assert row["pixels"] == 72
    monkeypatch.setattr(checkpoint, "load_weights", None)  # a typo is told before the weights
    refused(
        command, r"b\.png: --mask .* is 56 x 40 px, the image 33 x 70", "--from", runs_of("md"),
        "--images", photos, *options, "--out", tmp_path / "new",
    )  # fmt: skip
    assert not (tmp_path / "new").exists(), "nothing is written before all masks are known to fit"


def test_a_masked_autoencoder_of_pixels_needs_no_autoencoder(command, photos, tmp_path):
    model = LMDConfig(
        in_channels=3, input_size=(16, 16), patch=4, width=16, depth=1, heads=2, decoder_width=16,
        decoder_depth=1, decoder_heads=2, dtype=Dtype.float32,
    )  # fmt: skip
    mask = MaskConfig(kind=MaskKind.constant)
    task = MaskLatentsConfig(model=model, mask=mask, norm_target=False)
    work = save(tmp_path / "mae", task, None, data=DataConfig(resolution=16))
    options = ("--from", work, "--images", photos, "--mask", "box:5,5,3,3", "--ring", 0)
    options = (*options, "--mode", "progressive", "--out", tmp_path / "out")
    refused(command, "sees pixels, nothing is encoded", *options, "--autoencoder", "somewhere")
    refused(command, "--label 1: this network knows no classes", *options, "--label", 1)
    code, said, err = command("inpaint", *options)
    assert code == 0, err
    assert "autoencoder alone" not in said and "latent MSE" not in said
    cell, columns = inpaint._CELL // 16 * 16, read(tmp_path / "out" / "panels.png").shape[1]
    assert 4 * cell < columns < 5 * cell, "no panel of an autoencoder"
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["autoencoder"].startswith("none") and scores["resolution"] == 16
    for row in scores["images"]:
        assert row["autoencoder"] is None and row["latent_mse"] is None
        original = transforms.center_crop(read(photos / f"{row['name']}.png"), 16)
        same = (read(tmp_path / "out" / f"{row['name']}.png") == original).all(-1)
        assert same[:4].all() and same[8:].all() and same[:, :4].all() and same[:, 8:].all()


@pytest.mark.slow
def test_names_do_not_collide_and_bad_images_are_left_out(command, runs_of, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "a_pasted", "panels"):
        Image.fromarray(networks.picture(SIDE, SIDE)).save(folder / f"{name}.png")
    (folder / "text.png").write_text("not an image")
    code, said, err = command(
        "inpaint", "--from", runs_of("lmd"), "--images", folder, "--mask", BOX, "--mode",
        "reconstruct", "--ring", 0, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 1 and "text.png" in err and "1 bad image(s)" in said
    written = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert len(written) == 7 and "a_pasted.png.png" in written


# ---------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("run", "options", "told"),
    [
        ("lmd", ("--mode", "diffusion"), "this network knows no noise; use reconstruct"),
        ("lmd", ("--mode", "hybrid"), "needs a diffusion model"),
        ("uvit", ("--mode", "reconstruct"), r"a head for masked tokens \(x0\)"),
        ("uvit", ("--mode", "hybrid"), "only learned to remove noise"),
        ("md", ("--mode", "reconstruct", "--steps", 3), "--steps is for --mode diffusion and hy"),
        ("md", ("--mode", "diffusion", "--rounds", 3), "--rounds is for --mode progressive, not"),
        ("md", ("--mode", "diffusion", "--start", 0.3), "--start is for --mode hybrid"),
        ("md", ("--mode", "hybrid", "--start", 1.5), "a start at t = 1.5"),
        ("md", ("--mode", "hybrid", "--cfg", 2), "give --label"),
        ("md", ("--mode", "hybrid", "--label", "cow"), "'cow' is no class number"),
        ("md", ("--mode", "hybrid", "--label", "0-1"), "names 2 classes; give one"),
        ("md", ("--mode", "progressive", "--rounds", 0), "--rounds 0; 1 or more"),
        ("md", ("--mode", "reconstruct", "--ring", -1), "--ring -1"),
        ("md", ("--mode", "reconstruct", "--seed", -1), "--seed -1"),
        ("md", ("--mode", "reconstruct", "--mask", "random:2"), "between 0 and 1"),
        ("md", ("--mode", "reconstruct", "--mask", "box:1,2,3"), "box:X,Y,WIDTH,HEIGHT"),
        ("md", ("--mode", "reconstruct", "--mask", "box:30,0,4,4"), "outside of the 32 x 32"),
        ("md", ("--mode", "reconstruct", "--ring", 9), "everything is masked: with a ring of 9"),
        (
            "md",
            ("--mode", "reconstruct", "--ring", 0, "--mask", "box:0,0,32,32"),
            "everything is masked: no token of 8 x 8 is left to go by; make the hole smaller\n",
        ),
        ("lmd", ("--mode", "reconstruct", "--label", 1), "this network knows no classes"),
    ],
)
def test_what_cannot_be_is_refused(command, runs_of, photos, tmp_path, run, options, told):
    refused(
        command, told, "--from", runs_of(run), "--images", photos, "--mask", BOX, *options,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


UNFIT = {
    "whitened LMD": (lambda: lmd(norm_target=True), "reconstruct", "predicts whitened tokens"),
    "whitened MD-UViT": (
        lambda: md_uvit(rec_target=RecTarget.whitened), "progressive", "cannot be decoded"
    ),
    "pure LMD in an MD-UViT": (
        lambda: md_uvit(stages=[dataclasses.replace(STAGE, clean=1.0, diffusion=0.0)]),
        "hybrid", "no stage has diffusion above 0",
    ),
    "an MD-UViT of diffusion alone": (
        lambda: md_uvit(stages=[StageConfig()]), "reconstruct", "no stage trains this network"
    ),
    "no sample without class": (
        lambda: uvit(label_dropout=0.0), "diffusion", "give the class, --label CLASS"
    ),
    "no reconstruction without class": (
        lambda: md_uvit(label_dropout=0.0), "reconstruct", "give the class, --label CLASS"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_runs_that_cannot_do_it_are_refused(command, runs_of, photos, tmp_path, name, monkeypatch):
    task, mode, told = UNFIT[name]
    work = runs_of(name, task())
    monkeypatch.setattr(checkpoint, "load_weights", None)  # before any weights are read
    refused(
        command, told, "--from", work, "--images", photos, "--mask", BOX, "--mode", mode,
        "--out", tmp_path / "out",
    )  # fmt: skip


def test_an_autoencoder_is_no_such_run(command, workdir, photos, tmp_path):
    refused(
        command, "AutoencodeConfig, not of a diffusion model or a masked",
        "--from", workdir, "--images", photos, "--mask", BOX, "--mode",
        "diffusion", "--out", tmp_path / "out",
    )  # fmt: skip
