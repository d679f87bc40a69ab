"""The diffusion task: losses, evaluators, the sample command, mistakes in its config."""

import json
import shutil
from dataclasses import replace

import diffusing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from diffusing import make

from dcae_jax import autoencoder, checkpoint, config, sharding
from dcae_jax.config import InitWeights
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.diffusion.guidance import GuidanceConfig, Reference
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.diffusion.samplers import AncestralConfig, DPM2MConfig, DPMFastConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.online import OnlineDataConfig
from dcae_jax.tasks.base import Variables
from dcae_jax.tasks.latents import LatentNorm, normalisation


@pytest.fixture(scope="module")
def workdir():
    """The autoencoder."""
    return diffusing.autoencoder()


@pytest.fixture(scope="module")
def cache():
    """Latents 4 x 4 x 4 of two classes of images, train and test."""
    return diffusing.cache()


@pytest.fixture(scope="module")
def whole():
    """An uninterrupted run."""
    return diffusing.whole()[0]


def test_loss_falls_and_the_validation_counts_exactly(cache, whole):
    rows = runs.rows(whole)
    assert rows[8]["latents-test/loss"] < rows[0]["latents-test/loss"]
    assert rows[0]["latents-test/n"] == 10 and rows[8]["samples/n"] == 4
    bins = {k: v for k, v in rows[0].items() if k.startswith("latents-test/loss_t")}
    assert bins and min(bins.values()) <= rows[0]["latents-test/loss"] <= max(bins.values())
    table = (whole / "report.html").read_text()
    assert "latents-test" in table


def test_normalisation_has_unit_channels(cache):
    manifest = make().data.manifest()
    norm = normalisation(LatentNorm.channel, manifest)
    with LatentDataConfig(path=str(cache)).eval_batches(batch=16, n=16) as batches:
        latents = jnp.concatenate([jnp.asarray(b["latent"]) for b in batches])
    normal = np.asarray(norm.apply(latents)).reshape(-1, 4)
    # The statistics are of the stored latents themselves.
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(norm.invert(norm.apply(latents)), latents, rtol=1e-5, atol=1e-5)
    scalar = normalisation(LatentNorm.scalar, manifest)
    np.testing.assert_allclose(scalar.scale, manifest.scaling_factor)


def test_the_loss_of_a_perfect_network_is_zero(cache, monkeypatch):
    """The task hands the process what it says: x_t, the network's time, the velocity."""
    cfg = make()
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


def test_labels_are_dropped_as_often_as_asked():
    cfg = make(**{"task.label_dropout": 0.25, "evals": []})
    n = 20_000
    labels = jnp.arange(n) % 2
    batch = {"latent": jnp.zeros((n, 4, 4, 4)), "label": labels}
    found = cfg.task.build(cfg).prepare(jax.random.key(0), batch, jnp.int32(0), ())
    new = np.asarray(found.examples["label"])
    dropped = new == cfg.task.model.num_classes
    np.testing.assert_array_equal(new[~dropped], np.asarray(labels)[~dropped])
    for of_class in (dropped[::2], dropped[1::2]):  # five standard deviations of 10,000 draws
        assert abs(of_class.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / (n / 2))


def test_validation_times_are_drawn_within_their_bins():
    """Each bin is scored on as many latents, at times of its own; against one example at a time."""
    cfg = make()
    task, mesh = cfg.task.build(cfg), sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    evaluator = ValLossConfig(data=cfg.evals[0].data, n=12, bins=4).build(cfg, task, mesh)
    params, _ = task.init(jax.random.key(1))
    variables = Variables(params, {}, task.constants(training=False))
    latent = 5 * jax.random.normal(jax.random.key(2), (12, 4, 4, 4))
    batch = {"latent": latent, "label": jnp.arange(12) % 2, "mask": jnp.arange(12) < 11}
    seen, scored = [], task.losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "losses", lambda v, x: seen.append(x) or scored(v, x))
        sums, counts = evaluator._sums(variables, batch, jnp.int32(100))
    np.testing.assert_array_equal(counts, [3, 3, 3, 2])
    part = (100 + np.arange(12)) % 4
    time = np.asarray(seen[0]["time"])
    assert ((part / 4 <= time) & (time <= (part + 1) / 4)).all() and len(set(time)) == 12
    want = np.zeros(4)
    for i in range(11):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], seen[0])
        want[part[i]] += float(scored(variables, one)[0])
    np.testing.assert_allclose(sums, want, rtol=1e-5)  # a batch of 12 against batches of 1


def test_a_network_that_does_not_know_all_classes_is_refused(cache):
    cfg = make(**{"task.model.num_classes": 1, "evals": []})
    with pytest.raises(UserError, match=r"latents are of 2 classes, but .* set it to 2"):
        cfg.task.build(cfg).constants(training=True)


def test_latents_of_another_shape_are_refused(cache):
    with pytest.raises(UserError, match=r"are \(4, 4, 4\), but data.shape=\(8, 8, 4\)"):
        make(**{"task.model.input_size": (8, 8), "evals": []})


@pytest.mark.parametrize("weights", list(InitWeights))
def test_a_stale_cache_is_refused_without_an_evaluator_that_decodes(workdir, weights):
    """The digests that a checkpoint records are those of the weights that are read from it."""
    manifest = make().data.manifest()
    encoder = autoencoder.load(str(workdir), weights).encoder
    plan = replace(manifest.plan, encoder=encoder)
    fresh = replace(manifest, plan=plan, weights=weights.value)
    autoencoder.require_current(fresh)
    stale = replace(fresh, plan=replace(plan, encoder="0" * 64))
    with pytest.raises(UserError, match=f"stale: their encoder is 0{{16}} .* {encoder[:16]} now"):
        autoencoder.require_current(stale)


def test_a_stale_cache_is_noticed_before_a_run_begins(cache, workdir, tmp_path):
    copied = shutil.copytree(cache, tmp_path / "cache")
    path = copied / "train" / "manifest.json"
    path.write_text(path.read_text().replace(make().data.manifest().encoder, "0" * 64))
    cfg = make(**{"data.path": str(copied), "evals": []})
    with pytest.raises(UserError, match="the cached latents are stale"):
        diffusing.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_autoencoder_does_not_stop_a_run_on_a_whole_cache(workdir, tmp_path):
    copied = shutil.copytree(workdir, tmp_path / "ae")
    for path in copied.rglob("meta/metadata"):
        path.write_text("{")
    with pytest.raises(UserError, match="no valid checkpoint"):
        checkpoint.source_meta(str(copied))
    manifest = replace(make().data.manifest(), autoencoder=str(copied))
    autoencoder.require_current(manifest)


def test_held_out_latents_of_another_encoder_are_refused(cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "other")
    path = other / "test" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["plan"]["encoder"] = "f" * 64
    path.write_text(json.dumps(manifest))
    held_out = ValLossConfig(data=LatentDataConfig(path=str(other), split="test"))
    cfg = make(evals=[held_out])
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    with pytest.raises(UserError, match="are of encoder ffffffffffffffff, those of the run of"):
        cfg.evals[0].build(cfg, cfg.task.build(cfg), mesh)


def generate(sampler, **fields):
    return [GenerateConfig(sampler=sampler, guidance=GuidanceConfig(**fields))]


FLOW = ProcessConfig(Kind.flow, Space.v, Space.v)
MISTAKES = {
    "label_dropout": ({"task.label_dropout": 1.0}, "label_dropout = 1.0; a probability below 1"),
    "guidance": (
        {"task.label_dropout": 0.0, "evals": generate(DPM2MConfig(), scale=1.5)},
        "evals: samples: guidance.scale = 1.5 .* never sees with task.label_dropout = 0",
    ),
    "weak model": (
        {"evals": generate(DPM2MConfig(), scale=2.0, reference=Reference.weak_model)},
        "evals: samples: guidance.reference = weak_model: there is no second model",
    ),
    "channels": (
        {"evals": generate(DPM2MConfig(), scale=1.5, channels=5)},
        "guidance.channels = 5, but latents have 4",
    ),
    "ancestral": (
        {"evals": generate(AncestralConfig())},
        "evals: samples: .*does not fit the flow",
    ),
    "fast": ({"evals": generate(DPMFastConfig())}, "evals: samples: .*flow"),
    "steps": ({"evals": generate(DPM2MConfig(steps=0))}, "steps = 0.* 1 or more"),
    "spatial": ({"mesh.spatial": 2}, "mesh.spatial = 2: attention kernels refuse"),
    "variance": ({"task.process.learn_variance": True}, "learn_variance"),
    "images": ({"data": DataConfig()}, "data is no source of latents; set data=LatentDataConfig"),
    "nothing": ({"data": None}, "data is no source of latents"),
    "no cache": ({"data.path": ""}, "data.path is empty"),
    "images in an evaluator": (
        {"evals": [ValLossConfig(data=OnlineDataConfig(autoencoder="ae"))]},
        "evals: latents-train: its images need the autoencoder of the run",
    ),
    "pattern": ({"task.trainable": "net/("}, r"task.trainable = 'net/\(' is no regular expression"),
    "patch": ({"task.model.patch": 3}, "is not a multiple of patch = 3"),
    "heads": ({"task.model.heads": 3}, "width = 16 is not divisible by heads = 3"),
    "min_snr": ({"task.process.min_snr": -1.0}, "min_snr = -1.0 is negative"),
    "times": ({"task.process.time_mean": 0.5}, "process.times is uniform"),
    "few latents": (
        {"evals": [ValLossConfig(n=9)]},
        "n = 9 of .* leaves some of its bins = 10 parts",
    ),
    "bins": ({"evals": [ValLossConfig(bins=0)]}, "evals: bins = 0 .*at least 1"),
}


@pytest.mark.parametrize(("changes", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_the_config_of_diffusion(changes, said):
    """Each is one sentence with its mend, before anything is read or compiled."""
    cfg = tiny.diffusion()
    for path, value in changes.items():
        node, (*parents, last) = cfg, path.split(".")
        for name in parents:
            node = getattr(node, name)
        setattr(node, last, value)
    with pytest.raises(UserError, match=said):
        config.validate(config.resolve(cfg), 1)
