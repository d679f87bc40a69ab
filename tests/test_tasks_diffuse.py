"""The diffusion task: losses, promises 1, 2 and 4 on it, evaluators, and the sample command."""

import json

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import runs
from PIL import Image

from dcae_jax import checkpoint, config, rng, sharding, step, train
from dcae_jax.cli import cache_latents, sample
from dcae_jax.config import CheckpointConfig, EmaConfig, OptimConfig, ReportConfig, RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.diffusion.samplers import DPM2MConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.tasks.base import Variables
from dcae_jax.tasks.diffuse import DiffuseConfig, LatentNorm, normalisation


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The autoencoder."""
    return networks.save(tmp_path_factory.mktemp("ae") / "w")


@pytest.fixture(scope="module")
def cache(workdir, tmp_path_factory):
    """Latents 4 x 4 x 4 of two classes of images, by the command, train and test."""
    root = tmp_path_factory.mktemp("latents")
    for split in ("train", "test"):
        for k, label in enumerate(("cat", "dog")):
            folder = root / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(8):
                picture = networks.picture(16, 16, i + 10 * k + 100 * (split == "test"))
                Image.fromarray(picture).save(folder / f"{i}.png")
        code = cache_latents.main(
            [
                *("--from", str(workdir), "--images", str(root / "photos"), "--split", split),
                *("--resolution", "16", "--batch", "8", "--out", str(root / "cache")),
            ]
        )
        assert code == 0
    return root / "cache"


def make(cache, **changes) -> RunConfig:
    """A tiny flow UViT on the cache."""
    model = UViTConfig(
        in_channels=4, input_size=(4, 4), num_classes=2, width=16, depth=2, heads=2,
        dtype=Dtype.float32,
    )  # fmt: skip
    process = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
    cfg = RunConfig(
        name="tiny diffusion", steps=8, batch=8,
        task=DiffuseConfig(model=model, process=process, latent_norm=LatentNorm.channel),
        data=LatentDataConfig(path=str(cache), threads=1),
        optim=OptimConfig(lr=1e-2), ema=EmaConfig(decays=(0.9,), warmup_steps=0),
        checkpoint=CheckpointConfig(every=4, keep=3),
        report=ReportConfig(every=2, tensorboard=False),
        evals=[
            ValLossConfig(data=LatentDataConfig(split="test", threads=1), n=10, batch=4, every=4),
            GenerateConfig(
                sampler=DPM2MConfig(steps=3), guidance=GuidanceConfig(scale=2.0), per_label=2,
                batch=4,
            ),
        ],
    )  # fmt: skip
    for path, value in changes.items():
        node, (*parents, last) = cfg, path.split(".")
        for name in parents:
            node = getattr(node, name)
        setattr(node, last, value)
    config.validate(config.resolve(cfg), 1)
    return cfg


def run(cfg, workdir, poll=None, count=1):
    with runs.devices(count):
        return train.train(cfg, str(workdir), runs.StopAt(poll))


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("diffuse") / "whole"
    assert run(make(cache), workdir) == train.DONE
    return workdir


def final(cfg, workdir):
    """{path: array} of the newest checkpoint."""
    task = cfg.task.build(cfg)
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    abstract = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(cfg.seed, 0, "init")))
    placed = sharding.state_shardings(abstract, mesh, cfg.mesh)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
    )
    manager = checkpoint.Checkpoints(checkpoint.absolute(str(workdir)), cfg.checkpoint)
    found, meta = manager.restore_newest(target)
    manager.close()
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(found))
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in flat}, meta


def test_promise_2_an_interrupted_diffusion_run_ends_in_the_same_bits(cache, whole, tmp_path):
    # Polls: 1 at the start, 3 batches of the first evaluation, 1 after compiling, 1 a step.
    assert run(make(cache), tmp_path / "cut", poll=1 + 3 + 1 + 3) == 42
    assert run(make(cache), tmp_path / "cut") == train.DONE
    (a, meta_a), (b, meta_b) = (final(make(cache), w) for w in (whole, tmp_path / "cut"))
    assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)
    assert meta_a["scores"] == meta_b["scores"] and meta_a["latents"] == meta_b["latents"]


def test_loss_falls_and_the_validation_counts_exactly(cache, whole):
    rows = runs.rows(whole)
    assert rows[8]["latents-test/loss"] < rows[0]["latents-test/loss"]
    assert rows[0]["latents-test/n"] == 10 and rows[8]["samples/n"] == 4
    bins = {k: v for k, v in rows[0].items() if k.startswith("latents-test/loss_t")}
    assert bins and min(bins.values()) <= rows[0]["latents-test/loss"] <= max(bins.values())
    table = (whole / "report.html").read_text()
    assert "latents-test" in table


@pytest.mark.parametrize("microbatches", [1, 4])
def test_promise_1_loss_and_gradients_do_not_depend_on_the_mesh(cache, microbatches):
    """8 devices as 4 x 2 against one; float32 sums in another order."""
    found = []
    for count, fsdp, parts in ((1, 1, 1), (8, 2, microbatches)):
        cfg = make(cache, microbatches=1)
        cfg.mesh.fsdp, cfg.microbatches, cfg.batch = fsdp, parts, 32
        task = cfg.task.build(cfg)
        mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:count])
        gen = np.random.default_rng(0)
        batch = {
            "latent": gen.normal(size=(32, 4, 4, 4)).astype(np.float32),
            "label": (np.arange(32) % 2).astype(np.int32),
        }
        with jax.set_mesh(mesh):
            state = jax.jit(lambda t=task, c=cfg: step.init_state(t, c, rng.key(0)))()
            constants = task.constants(training=True)
            fn = jax.jit(
                lambda s, b, t=task, c=cfg, k=constants: step.loss_and_grads(t, c, s, k, b)
            )
            found.append(jax.device_get(fn(state, sharding.put_batch(batch, mesh))))
    for a, b in zip(*(jax.tree.leaves(f) for f in found), strict=True):
        # Relative to the largest gradient of the leaf: sums of 32 x 16 terms in another order.
        assert np.abs(a - b).max() <= 2e-6 * max(np.abs(a).max(), 1e-3)


def test_normalisation_has_unit_channels(cache):
    manifest = make(cache).data.manifest()
    norm = normalisation(LatentNorm.channel, manifest)
    with LatentDataConfig(path=str(cache)).eval_batches(batch=16, n=16) as batches:
        latents = np.concatenate([b["latent"] for b in batches])
    normal = np.asarray(norm.apply(latents)).reshape(-1, 4)
    # The statistics are of the stored latents themselves.
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(norm.invert(norm.apply(latents)), latents, rtol=1e-5, atol=1e-5)
    scalar = normalisation(LatentNorm.scalar, manifest)
    np.testing.assert_allclose(scalar.scale, manifest.scaling_factor)


def test_the_loss_of_a_perfect_network_is_zero(cache, monkeypatch):
    """The task hands the process what it says: x_t, the network's time, the velocity."""
    cfg = make(cache)
    task = cfg.task.build(cfg)
    norm = normalisation(cfg.task.latent_norm, cfg.data.manifest())
    x0, eps = (jax.random.normal(jax.random.key(i), (5, 4, 4, 4)) for i in (1, 2))
    t = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])

    def perfect(variables, x, time, cond):
        np.testing.assert_allclose(time, 1 - t, atol=1e-6)  # 0 is noise for the network
        np.testing.assert_allclose(x, (1 - t[:, None, None, None]) * x0
                                   + t[:, None, None, None] * eps, atol=1e-5)  # fmt: skip
        return x0 - eps

    monkeypatch.setattr(task, "network", perfect)
    examples = {
        "latent": norm.invert(x0), "noise": eps, "time": t, "label": jnp.zeros(5, jnp.int32)
    }  # fmt: skip
    losses = task.losses(Variables({}, {}, {"norm": norm}), examples)
    np.testing.assert_allclose(losses, 0, atol=1e-9)


def test_sample_draws_the_same_pictures_in_any_batch_and_goes_on(whole, tmp_path, capsys):
    out = tmp_path / "a"
    base = ["--from", str(whole), "--n", "6", "--classes", "1,0", "--steps", "3", "--cfg", "2"]
    assert sample.main([*base, "--out", str(out), "--batch", "8", "--npz"]) == 0
    pictures = {p.name: p.read_bytes() for p in out.glob("0*.png")}
    assert len(pictures) == 6 and (out / "grid.png").exists()
    stored = np.load(out / "samples.npz")["arr_0"]
    assert stored.shape == (6, 16, 16, 3)
    np.testing.assert_array_equal(stored[3], np.asarray(Image.open(out / "000003.png")))
    # Continued: a torn picture and a missing one are drawn again, the same ones.
    (out / "000004.png").unlink()
    (out / "000002.png").write_bytes(pictures["000002.png"][:40])
    assert sample.main([*base, "--out", str(out), "--batch", "8"]) == 0
    assert {p.name: p.read_bytes() for p in out.glob("0*.png")} == pictures
    with pytest.raises(UserError, match="samples made with another guidance"):
        sample.main([*base[:-1], "1", "--out", str(out)])
    assert json.loads((out / "sample.json").read_text())["classes"] == [1, 0]


def test_mistakes_at_the_command_line(whole, cache, workdir, tmp_path):
    base = ["--from", str(whole), "--out", str(tmp_path / "x")]
    for options, said in (
        (["--classes", "2"], "class 2 does not exist; the network knows 0..1"),
        (["--classes", "a"], "no class number"),
        (["--sampler", "ddmp"], "there are ddpm, ddim"),
        (["--sampler", "ddpm"], "does not fit the flow"),
        (["--steps", "0"], "1 or more"),
        (["--cfg", "-1"], "guidance.scale"),
    ):
        with pytest.raises(UserError, match=said):
            sample.main([*base, *options])
    with pytest.raises(UserError, match="not of a diffusion model"):
        sample.main(["--from", str(workdir), "--out", str(tmp_path / "x")])
    assert not list(tmp_path.glob("x/*.png"))
    with pytest.raises(UserError, match="latents are of 2 classes, but"):
        make(cache, **{"task.model.num_classes": 1, "evals": []}).task.build(
            make(cache, **{"task.model.num_classes": 1, "evals": []})
        ).constants(training=True)
    with pytest.raises(UserError, match="spatial"):
        make(cache, **{"mesh.spatial": 2})
