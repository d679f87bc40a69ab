"""`sample`: what it draws, what it refuses, and that a kill costs nothing but time."""

import contextlib
import dataclasses
import io
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
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import runs
from PIL import Image

from dcae_jax import autoencoder, checkpoint, config, outputs, provenance, rng, sharding, step
from dcae_jax.cli import _sample_draw, _sample_folder, _sample_job, sample
from dcae_jax.config import EmaConfig, MeshConfig, OptimConfig, RunConfig
from dcae_jax.data.latents import LatentDataConfig, Manifest, Plan, Storage
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.diffusion.samplers import (
    AncestralConfig,
    Dopri5Config,
    DPM2MConfig,
    DPMFastConfig,
    HeunConfig,
    Variance,
)
from dcae_jax.errors import UserError
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.masking import MaskConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.models.md_uvit import MDUViTConfig
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.tasks.diffuse import DiffuseConfig
from dcae_jax.tasks.latents import LatentNorm
from dcae_jax.tasks.mask_diffuse import MaskDiffuseConfig, StageConfig

NAMES = ("cat", "dog", "golden-retriever")
FLOW = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)


def manifest_of(workdir: pathlib.Path, **changes: object) -> Manifest:
    """As the cache of this autoencoder would have it: latents 4 x 4 x 4 of three classes."""
    net = autoencoder.load(str(workdir))
    plan = Plan(
        encoder=net.encoder, resolution=16, transform="center_crop", data="d", split="train",
        positions="all records", images=6, shape=(4, 4, 4), moments=False, flips=False,
        dtype=Storage.f32, compute="float32", shard_records=6,
    )  # fmt: skip
    values = {
        "plan": plan, "autoencoder": str(workdir), "weights": "ema", "variant": None,
        "description": net.source, "decoder": net.decoder, "model": net.cfg, "dataset": "folder",
        "classes": NAMES, "num_classes": 3, "images": 6, "bad": 0, "shards": ((6, 100, "s"),),
        "mean": (0.1, -0.2, 0.3, 0.0), "std": (0.5, 1.0, 2.0, 1.5), "rms": 1.4,
        "scaling_factor": 0.7, "scaling": "1 / RMS of these latents", "psnr": 20.0,
        "psnr_stored": 20.0, "psnr_images": 6,
    }  # fmt: skip
    return Manifest(**values | changes)


def make(process: ProcessConfig = FLOW, norm: LatentNorm = LatentNorm.channel) -> RunConfig:
    """A tiny UViT."""
    model = UViTConfig(
        in_channels=4, input_size=(4, 4), num_classes=3, width=16, depth=2, heads=2,
        dtype=Dtype.float32,
    )  # fmt: skip
    cfg = RunConfig(
        name="tiny diffusion", seed=5, steps=8, batch=8,
        task=DiffuseConfig(model=model, process=process, latent_norm=norm),
        data=LatentDataConfig(path="latents"), optim=OptimConfig(),
        ema=EmaConfig(decays=(0.9,), warmup_steps=0),
        evals=[GenerateConfig(sampler=DPM2MConfig(steps=3), guidance=GuidanceConfig(scale=2.0))],
    )  # fmt: skip
    return config.resolve(cfg)


def weights_at(k: int, cfg: RunConfig) -> dict:
    """The raw weights of step k, random."""
    shapes, _ = jax.eval_shape(cfg.task.build(cfg).init, jax.random.key(0))
    gen = np.random.default_rng(k)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * gen.standard_normal(x.shape), jnp.float32), shapes
    )


def save(
    workdir: pathlib.Path, manifest: Manifest, *steps: int, cfg: RunConfig | None = None
) -> pathlib.Path:
    """A workdir of the run without any training; its EMA is 0.9 times its weights."""
    cfg = cfg or make()
    meta = provenance.meta(cfg, "tiny") | {"latents": manifest.to_json()}
    manager = checkpoint.Checkpoints(checkpoint.absolute(str(workdir)), cfg.checkpoint)
    for k in steps or (8,):
        params = weights_at(k, cfg)
        ema = {"0.9": {"params": jax.tree.map(lambda x: x * np.float32(0.9), params), "stats": {}}}
        manager.save(step.TrainState(np.int32(k), params, {}, ema, {}), meta)
        manager.wait()
    manager.close()
    return workdir


@pytest.fixture(scope="module")
def run(workdir, tmp_path_factory) -> pathlib.Path:
    """Steps 4 and 8 of a run on the latents of `workdir`; do not write into it."""
    return save(tmp_path_factory.mktemp("diffuse") / "run", manifest_of(workdir), 4, 8)


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    """Quicker to compile than for the eight fake ones."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(_sample_draw, "_mesh", lambda: mesh)


@pytest.fixture
def given(run, tmp_path) -> list:
    """The options of most tests: six samples in two batches."""
    return ["sample", "--from", run, "--n", 6, "--batch", 4, "--out", tmp_path / "out"]


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """(a folder of six samples and an npz, what was said); do not write into it."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        patch.setattr(_sample_draw, "_mesh", lambda: mesh)
        argv = ["--from", run, "--n", 6, "--batch", 4, "--out", out, "--npz"]
        assert sample.main([str(a) for a in argv]) == 0
    return out, said.getvalue()


@pytest.fixture
def copied(drawn, tmp_path) -> pathlib.Path:
    """A copy of it where `given` writes."""
    shutil.copytree(drawn[0], tmp_path / "out")
    return tmp_path / "out"


def no_weights(monkeypatch) -> None:
    """From now on reading weights is a failure."""

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint, "load_weights", read)


def pixels(out: pathlib.Path, n: int = 6) -> np.ndarray:
    return np.stack([np.asarray(Image.open(out / "images" / f"{i:06d}.png")) for i in range(n)])


def job(*argv: object) -> _sample_job.Job:
    """What is asked for, without anything drawn."""
    return _sample_job.job_of(sample._parser().parse_args([str(a) for a in argv]))


# ------------------------------------------------------------------------------------ what it draws


def test_the_folder(drawn, run, workdir):
    out, said = drawn
    assert sorted(p.name for p in out.iterdir()) == [
        "grid.png", "images", "sample.json", "samples.npz",
    ]  # fmt: skip
    assert sorted(p.name for p in (out / "images").iterdir()) == [f"{i:06d}.png" for i in range(6)]
    with np.load(out / "samples.npz") as found:
        assert found["arr_0"].dtype == np.uint8 and found["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(found["arr_0"], pixels(out))
        assert found["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]
    record = json.loads((out / "sample.json").read_text())
    assert (record["seed"], record["n"], record["classes"]) == (5, 6, [0, 1, 2])
    assert record["weights"]["kind"] == "ema 0.9" and record["weights"]["step"] == 8
    assert record["decoder"] == autoencoder.load(str(workdir)).decoder
    assert record["sampler"]["steps"] == 3 and record["guidance"]["scale"] == 2.0
    assert record["made"]["finished"] and record["made"]["versions"]["jax"] == jax.__version__
    assert record["made"]["from"] == {"--from": str(run)}
    assert "sampler      dpm_2m, steps 3, end 0   (as in the run's grids 'samples')" in said
    assert "guidance     2 away from no class   (as in the run's grids 'samples')" in said
    assert "average (ema 0.9) of step 8" in said and "3 evaluations of the network" in said


def test_the_pictures_are_what_the_decoder_makes_of_two_calls_and_two_rules(drawn, workdir):
    """DPM-Solver++ 2M of the flow with guidance, written out in numpy around the raw network."""
    cfg = make()
    task, net = cfg.task.build(cfg), autoencoder.load(str(workdir))
    params = jax.tree.map(lambda x: x * np.float32(0.9), weights_at(8, cfg))
    network = networks._quickly(
        lambda x, t, k: task.net.apply({"params": params["net"]}, x, t, {"label": k})
    )
    key = jax.random.fold_in(rng.key(5, 0, "samples"), 0)
    x = np.stack([jax.random.normal(jax.random.fold_in(key, i), (4, 4, 4)) for i in range(6)])
    labels = np.arange(6) % 3

    def x0(x, t):
        both = [
            np.asarray(network(x, np.full(6, 1 - t, "f4"), k)) for k in (labels, labels * 0 + 3)
        ]
        return x + t * (both[1] + 2.0 * (both[0] - both[1]))  # v = x0 - eps

    # t = 1, 2/3, 1/3, 0; lambda = log((1 - t) / t) is infinite at both ends: first order there.
    first = x0(x, 1.0)
    x = 2 / 3 * x + 1 / 3 * first
    second = x0(x, 2 / 3)
    x = x / 2 + (2 / 3 - 1 / 3 / 2) * second
    x = x0(x, 1 / 3)
    manifest = manifest_of(workdir)
    x = x * np.float32(manifest.std) + np.float32(manifest.mean)
    image = np.asarray(net.decode(jnp.asarray(x, jnp.float32)))
    want = np.clip(np.round(127.5 * image + 127.5), 0, 255)
    # Another program: a pixel may be rounded the other way.
    assert np.abs(pixels(drawn[0]) - want).max() <= 1
    assert want.std() > 20, "the pictures are not flat"


def test_grid_of_few_and_of_many_classes():
    def rows(labels):
        return _sample_folder._rows(np.array(labels))

    assert rows([1, 0] * 10) == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    many = rows(list(range(1000)))
    assert len(many) == 8 and all(len(r) == 8 for r in many) and many[0][1] == 15
    some = rows([*range(100)] * 3)
    assert len(some) == 8 and some[1] == [12, 112, 212]


# --------------------------------------------------------------------------------------- going on


def test_a_cut_and_a_missing_picture_are_drawn_again(command, given, drawn, copied):
    (copied / "images" / "000004.png").unlink()
    cut = (copied / "images" / "000002.png").read_bytes()[:-3]
    (copied / "images" / "000002.png").write_bytes(cut)
    (copied / "images" / ".000005.png.77.part").write_bytes(b"what a killed one left")
    code, said, complaints = command(*given, "--npz")
    assert code == 0, complaints
    assert "4 of 6 there already" in said
    want = runs.digest(drawn[0])
    assert {k: v for k, v in runs.digest(copied).items() if k != "sample.json"} == {
        k: v for k, v in want.items() if k != "sample.json"
    }


def test_what_is_there_is_not_drawn_and_more_can_be_added(
    command, given, run, drawn, copied, monkeypatch
):
    with monkeypatch.context() as patch:
        no_weights(patch)
        code, said, complaints = command(*given, "--npz")
        assert code == 0 and "6 of 6 there already" in said, complaints
    code, said, complaints = command(*given, "--n", 9)
    assert code == 0 and "6 of 9 there already" in said, complaints
    assert "samples.npz there is of an earlier call" in said
    np.testing.assert_array_equal(pixels(copied), pixels(drawn[0]))
    assert len({p.tobytes() for p in pixels(copied, 9)}) == 9
    assert json.loads((copied / "sample.json").read_text())["n"] == 9
    before = runs.digest(copied)
    code, _, complaints = command(*given)
    assert code == 2 and "up to number 8, more than --n 6" in complaints
    assert runs.digest(copied) == before


def test_a_folder_of_other_samples_is_left_alone(command, given, run, copied, tmp_path):
    before = runs.digest(copied)
    for options, said in (
        (["--cfg", 1], "another guidance:\n  - guidance.scale: 2.0 -> 1.0"),
        (["--steps", 4], "another sampler:\n  - sampler.steps: 3 -> 4"),
        (["--sampler", "heun"], "another sampler"),
        (["--seed", 6], "another seed:\n  - seed: 5 -> 6"),
        (["--classes", "1"], "another classes:\n  - classes: [0, 1, 2] -> [1]"),
        (["--classes", "random"], "another order"),
        (["--params", "raw"], "weights.kind: ema 0.9 -> raw"),
        (["--from", run / "checkpoints" / "4"], "(--from RUN/checkpoints/8 for the step)"),
        (["--dtype", "bfloat16"], "dtype: as configured (float32) -> bfloat16"),
        (["--weak", run / "checkpoints" / "4", "--cfg", 2], "another guidance, weak"),
    ):
        code, _, complaints = command(*given, *options)
        assert code == 2 and said in complaints, complaints
    record = (copied / "sample.json").read_text()
    older = json.loads(record) | {"order": "random"}  # until 0.4: drawn otherwise
    (copied / "sample.json").write_text(json.dumps(older))
    code, _, complaints = command(*given, "--classes", "random")
    assert code == 2 and "order: random -> random (torch.randint)" in complaints
    (copied / "sample.json").write_text(record)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    code, _, complaints = command(*given, "--out", tmp_path / "full")
    assert code == 2 and "is not empty and has no whole sample.json" in complaints
    (tmp_path / "full" / "thesis.txt").rename(tmp_path / "full" / "sample.json")
    (tmp_path / "full" / "sample.json").write_text('{"weights": "mine"}')
    code, _, complaints = command(*given, "--out", tmp_path / "full")
    assert code == 2 and "has no whole sample.json" in complaints
    assert (tmp_path / "full" / "sample.json").read_text() == '{"weights": "mine"}'
    (copied / "sample.json").write_text("{")
    code, _, complaints = command(*given)
    assert code == 2 and "has no whole sample.json" in complaints
    assert runs.digest(copied / "images") == {
        k.removeprefix("images/"): v for k, v in before.items() if k.startswith("images/")
    }


def test_a_start_without_a_picture_binds_nobody(command, given, tmp_path, monkeypatch):
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_sample_draw, "_draw", die)
        command(*given)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sample.json"]
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(_sample_draw, "_draw", die)
        command(*given, "--cfg", 1)
    assert json.loads((tmp_path / "out" / "sample.json").read_text())["guidance"]["scale"] == 1.0


def test_an_object_store(command, given, drawn):
    store = fake_store.reset()
    for _ in range(2):  # drawn, then looked at
        code, _, complaints = command(*given, "--out", "fake://bucket/out", "--npz")
        assert code == 0, complaints
    found = {k.removeprefix("/fake/bucket/out/"): v for k, v in store.objects.items()}
    local = {str(p.relative_to(drawn[0])): p for p in drawn[0].rglob("*") if p.is_file()}
    assert found.keys() == local.keys()
    assert all(found[k] == local[k].read_bytes() for k in found if k.endswith(".png"))
    with np.load(io.BytesIO(found["samples.npz"])) as npz:
        np.testing.assert_array_equal(npz["arr_0"], pixels(drawn[0]))


# -------------------------------------------------------------------------------- what is asked for


def test_defaults_are_the_runs_own_or_the_published_ones(run, tmp_path, capsys, monkeypatch):
    found = job("--from", run, "--out", tmp_path / "x", "--steps", 7, "--cfg-interval", 0.1, 0.6)
    assert found.sampler == DPM2MConfig(steps=7)
    assert found.guide == GuidanceConfig(scale=2.0, start=0.1, stop=0.6)
    found = job("--from", run, "--out", tmp_path / "x", "--sampler", "heun", "--cfg-channels", 3)
    assert found.sampler == HeunConfig() and found.guide == GuidanceConfig(2.0, channels=3)
    said = capsys.readouterr().out
    assert "dpm_2m, steps 7, end 0   (as in the run's grids 'samples'; steps asked for)" in said
    assert "2 away from no class, for 0.1 <= t <= 0.6" in said and "heun, steps 25" in said
    for process, sampler, scale in (
        (FLOW, Dopri5Config(), 1.2),
        (ProcessConfig(), DPMFastConfig(), 1.5),
        (ProcessConfig(kind=Kind.ddpm), AncestralConfig(), 1.3),
    ):
        cfg = make(process)
        cfg.evals = []
        other = found.model._replace(run=cfg)
        monkeypatch.setattr(_sample_job, "_find", lambda *_, other=other: other)
        found = job("--from", run, "--out", tmp_path / "x")
        assert found.sampler == sampler and found.guide == GuidanceConfig(scale)
        assert capsys.readouterr().out.count("(published for this process)") == 2
    options = ("--sampler-option", "variance=beta", "--sampler-option", "steps=20")
    found = job("--from", run, "--out", tmp_path / "x", *options)
    assert found.sampler == AncestralConfig(20, Variance.beta)
    monkeypatch.undo()
    found = job("--from", run, "--out", tmp_path / "x", "--sampler", "dopri5", "--sampler-option",
                "rtol=1e-4")  # fmt: skip
    assert found.sampler == Dopri5Config(rtol=1e-4)


def test_classes(run, tmp_path):
    def labels(text, n=8, seed=5):
        argv = ("--from", run, "--out", tmp_path / "x", "--n", n, "--seed", seed)
        return job(*argv, "--classes", text).labels.tolist()

    assert labels("all") == [0, 1, 2, 0, 1, 2, 0, 1]
    assert labels("2,0-1,2") == [2, 0, 1, 2] * 2
    assert labels("Dog, golden-retriever") == [1, 2] * 4
    assert labels("random") == [2, 0, 1, 0, 2, 1, 1, 2], "those of torch.randint"
    many = labels("random", 600)
    assert many[:8] == labels("random") and many != labels("random", 600, seed=6)
    assert all(150 < many.count(k) < 250 for k in range(3)), "600 draws of 1/3: 200 +- 12"


def test_mistakes_are_told_before_any_weights_are_read(
    command, given, run, workdir, tmp_path, monkeypatch
):
    no_weights(monkeypatch)
    (tmp_path / "file").write_text("")
    for options, said in (
        (["--classes", "3"], "class 3 does not exist; the network knows 0..2"),
        (["--classes", "0-7"], "class 7 does not exist"),
        (["--classes", "0-9999999999"], "class 9999999999 does not exist"),
        (["--classes", ""], "no class number"),
        (["--classes", "0,,1"], "no class number"),
        (["--classes", "2-0"], "2-0 ends before it begins"),
        (["--classes", "golden"], "no name of the latents' classes; near: golden-retriever"),
        (["--n", 0], "--n 0 is too small"),
        (["--batch", 0], "--batch 0 is too small"),
        (["--seed", -1], "--seed -1"),
        (["--steps", 0], "a sampler needs 1 or more"),
        (["--sampler", "ddmp"], "there are ddpm, ddim"),
        (["--sampler", "ddpm"], "does not fit the flow"),
        (["--sampler", "dpm_fast"], "does not fit the flow"),
        (["--sampler", "dopri5", "--steps", 5], "dopri5 chooses its own steps"),
        (["--sampler-option", "eta=1"], "dpm_2m has steps, end"),
        (["--sampler-option", "end"], "NAME=VALUE"),
        (["--sampler-option", "end=x"], "could not convert"),
        (["--sampler-option", "end=2"], "is not in [0, 1)"),
        (["--sampler-option", "steps=2", "--steps", 2], "are the same"),
        (["--cfg", -1], "guidance.scale = -1.0"),
        (["--cfg-interval", 0.7, 0.2], "no interval"),
        (["--cfg-channels", 5], "latents have 4"),
        (["--weak", run / "checkpoints" / "4"], "--weak needs --cfg"),
        (["--weak", run, "--cfg", 2], "has the very weights"),
        (["--weak", "nowhere", "--cfg", 2], "--weak = 'nowhere' does not exist"),
        (["--from", "nowhere"], "--from = 'nowhere' does not exist"),
        (["--from", workdir], "is a run of AutoencodeConfig, not of a diffusion model"),
        (["--out", tmp_path / "file" / "x"], "could not be written"),
    ):
        code, _, complaints = command(*given, *options)
        assert code == 2 and said in complaints, (options, complaints)
        assert complaints.count("error:") == 1 and not (tmp_path / "out").exists()


def test_a_model_without_dropped_labels_or_without_an_autoencoder(
    command, given, workdir, tmp_path
):
    cfg = make()
    cfg.task.label_dropout = 0.0
    other = save(tmp_path / "w", manifest_of(workdir, autoencoder=""), cfg=cfg)
    code, _, complaints = command(*given, "--from", other)
    assert code == 2 and "does not know the autoencoder of its latents" in complaints
    code, _, complaints = command(*given, "--from", other, "--autoencoder", workdir)
    assert code == 2 and "task.label_dropout = 0" in complaints
    assert job("--from", other, "--autoencoder", workdir, "--out", "x", "--cfg", 1).n == 64


def test_a_model_that_never_learned_diffusion_is_refused(command, given, workdir, tmp_path):
    """An MD-UViT all of whose stages reconstruct has no output for noise; as --weak neither."""
    cfg = make()
    plain = cfg.task.model
    model = MDUViTConfig(
        in_channels=4, input_size=(4, 4), num_classes=3, width=plain.width, depth=plain.depth,
        heads=plain.heads, dtype=plain.dtype, k_out=1,
    )  # fmt: skip
    reconstructs = StageConfig(clean=1.0, diffusion=0.0, reconstruction=1.0, mask=MaskConfig())
    cfg.evals, cfg.task = [], MaskDiffuseConfig(
        model=model, process=FLOW, latent_norm=LatentNorm.channel, stages=[reconstructs]
    )  # fmt: skip
    other = save(tmp_path / "w", manifest_of(workdir), cfg=cfg)
    for option in ("--from", "--weak"):
        code, _, complaints = command(*given, option, other)
        assert code == 2 and f"{option} {other} cannot be sampled: no stage has" in complaints
    cfg.task.stages.append(StageConfig())
    cfg.task.stages[0].until = 0.5
    other = save(tmp_path / "v", manifest_of(workdir), cfg=cfg)
    assert job("--from", other, "--out", "x").n == 64


def test_a_weak_model_must_be_of_the_same_latents(command, given, run, tmp_path):
    argv = ("--from", run, "--weak", run / "checkpoints" / "4", "--cfg", 2, "--out", tmp_path)
    model, weak = (job(*argv).model, job(*argv).weak)
    manifest, bigger = weak.manifest, make()
    other = dataclasses.replace(manifest.plan, encoder="f" * 64)
    bigger.task.model.num_classes = 4
    for changes, said in (
        ({"manifest": dataclasses.replace(manifest, plan=other)},
         f"of the encoder ffffffffffffffff, not {manifest.encoder[:16]}"),
        ({"manifest": dataclasses.replace(manifest, mean=(1.0, 0.0, 0.0, 0.0))}, "normalisation"),
        ({"run": make(norm=LatentNorm.scalar)}, "normalisation"),
        ({"run": make(ProcessConfig())}, "process is scaled_linear, not flow"),
        ({"run": bigger}, "number of classes is 4, not 3"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            _sample_job._check_weak(model, weak._replace(**changes))
    unknown = dataclasses.replace(manifest.plan, encoder="")
    unknown = dataclasses.replace(manifest, plan=unknown)
    _sample_job._check_weak(model, weak._replace(manifest=unknown))
    _sample_job._check_weak(model, weak)


@pytest.mark.slow
def test_autoguidance_by_an_earlier_step(command, given, run, drawn, tmp_path):
    code, said, complaints = command(*given, "--weak", run / "checkpoints" / "4", "--cfg", 2)
    assert code == 0, complaints
    assert "2 away from the weak model   (scale asked for)" in said
    assert "the average (ema 0.9) of step 4" in said
    record = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert record["weak"]["step"] == 4 and record["weights"]["step"] == 8
    assert record["guidance"]["reference"] == "weak_model"
    assert (pixels(tmp_path / "out") != pixels(drawn[0])).any(axis=(1, 2, 3)).all()


# ------------------------------------------------------------------------ autoencoder, damage, disk


def test_the_autoencoder_must_be_that_of_the_latents(command, given, workdir, copied, tmp_path):
    manifest = manifest_of(workdir)
    other = dataclasses.replace(manifest.plan, encoder="f" * 64)
    wrong = save(tmp_path / "a", dataclasses.replace(manifest, plan=other))
    mine = manifest.encoder[:16]
    code, _, complaints = command(*given, "--from", wrong, "--out", tmp_path / "new")
    assert code == 2 and mine in complaints and "f" * 16 in complaints
    gone = save(tmp_path / "b", dataclasses.replace(manifest, autoencoder="/nowhere/ae"))
    code, _, complaints = command(*given, "--from", gone, "--out", tmp_path / "new")
    assert code == 2 and f"(encoder {mine})" in complaints and "--autoencoder DIR" in complaints
    assert "/nowhere/ae" in complaints
    (copied / "images" / "000001.png").unlink()
    record = json.loads((copied / "sample.json").read_text())
    (copied / "sample.json").write_text(json.dumps(record | {"decoder": "0" * 64}))
    before = runs.digest(copied / "images")
    code, _, complaints = command(*given)
    assert code == 2 and "holds samples of another decoder: 0000" in complaints
    assert runs.digest(copied / "images") == before


def test_a_damaged_step_is_named_with_the_one_before(command, given, run, tmp_path):
    shutil.copytree(run, tmp_path / "w")
    files = (p for p in (tmp_path / "w" / "checkpoints" / "8" / "ema").rglob("*") if p.is_file())
    big = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(big.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    big.write_bytes(data)
    code, _, complaints = command(*given, "--from", tmp_path / "w")
    assert code == 2 and "checkpoints/4" in complaints and "step 8 of --from" in complaints
    assert not list((tmp_path / "out").glob("images/*"))


def test_nothing_that_is_not_finite_is_saved(command, given, workdir, tmp_path, monkeypatch):
    broken = save(tmp_path / "w", manifest_of(workdir, std=(1.0, 1.0, 1.0, float("inf"))))
    code, _, complaints = command(*given, "--from", broken)
    assert (
        code == 2
        and "4 sample(s) of this batch are not finite, the first is number 0" in complaints
    )
    assert "guidance 2 is too strong" in complaints and "normalisation are damaged" in complaints
    assert not list((tmp_path / "out").glob("images/*"))
    found = job("--from", broken, "--out", tmp_path / "x", "--sampler", "dopri5")
    with pytest.raises(
        UserError, match="gave up after 1000 steps: --sampler-option max_steps=1000"
    ):
        _sample_draw._check_finite(found, np.array([3, 4]), np.array([True, False]))
    with pytest.raises(UserError, match="sample 4 is finite, but not what the autoencoder"):
        _sample_draw._check_decoded(np.array([3, 4]), np.array([True, False]))


def test_space_and_a_second_command(command, given, tmp_path, monkeypatch):
    with outputs.locked(checkpoint.absolute(str(tmp_path / "out")), "--out"):
        code, _, complaints = command(*given)
    assert code == 2 and "in use by another command" in complaints
    small = types.SimpleNamespace(free=6 * 16 * 16 * 3)
    monkeypatch.setattr(_sample_folder.shutil, "disk_usage", lambda path: small)
    code, _, complaints = command(*given, "--npz")
    assert code == 2 and "GB free, these samples need about" in complaints
    assert not (tmp_path / "out" / "images").exists()


# ------------------------------------------------------------------- other devices, real processes


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "dtype"), [(3, "float32"), (6, "bfloat16")])
def test_eight_devices_draw_what_one_does(
    command, given, run, drawn, tmp_path, monkeypatch, batch, dtype
):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices())
    monkeypatch.setattr(_sample_draw, "_mesh", lambda: mesh)
    options = ["--batch", batch, "--dtype", dtype, "--out", tmp_path / "eight"]
    code, _, complaints = command(*given, *options)
    assert code == 0, complaints
    difference = np.abs(pixels(tmp_path / "eight").astype(int) - pixels(drawn[0]))
    # 1e-4 in latents is far below a grey level, but may cross one; bfloat16 has 8 bits.
    assert difference.max() <= (1 if dtype == "float32" else 40), difference.max()
    assert (difference > 0).mean() < (0.01 if dtype == "float32" else 1)
    record = json.loads((tmp_path / "eight" / "sample.json").read_text())
    assert record["dtype"] == dtype


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


def made(out: pathlib.Path) -> dict[str, object]:
    """All files of a folder; of the record what decides the pictures."""
    found: dict[str, object] = dict(runs.digest(out))
    found["sample.json"] = json.loads((out / "sample.json").read_text())
    del found["sample.json"]["made"]
    return found


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_and_repeated_gives_the_same_bytes(run, tmp_path):
    given = ["sample", "--from", run, "--n", 300, "--batch", 4, "--classes", "random", "--npz"]
    complete(spawn(given, "--out", tmp_path / "whole"))
    out = tmp_path / "killed"
    for done in (1, 20):
        process = spawn(given, "--out", out)
        while process.poll() is None and len(list(out.glob("images/0*.png"))) < done:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert 0 < len(list(out.glob("images/0*.png"))) < 300, "killed in the middle"
        assert not (out / "samples.npz").exists()
    # A disk that lost its power: the last one is cut.
    last = max(out.glob("images/0*.png"))
    last.write_bytes(last.read_bytes()[:50])
    text = complete(spawn(given, "--out", out))
    assert "of 300 there already" in text
    assert made(out) == made(tmp_path / "whole")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_draw_what_one_does(run, tmp_path):
    given = ["sample", "--from", run, "--n", 22, "--batch", 4, "--npz"]
    complete(spawn(given, "--out", tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "samples.npz").unlink()
    for i in range(3, 22):
        (tmp_path / "two" / "images" / f"{i:06d}.png").unlink()
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
    assert "3 of 22 there already" in text and "(process 1 of 2)" in text
    assert "/9 " in text, "batches 0, 2, 4 of six: 1 + 4 + 4 samples are missing there"
    assert made(tmp_path / "two") == made(tmp_path / "one")
