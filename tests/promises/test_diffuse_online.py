"""Diffusion on images that a frozen autoencoder encodes in the step: as on cached latents."""

import copy
import dataclasses

import diffusing
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import runs
import tiny

from dcae_jax import autoencoder, config, online, rng, step, train, tree
from dcae_jax.cli import cache_latents
from dcae_jax.data import latents
from dcae_jax.distributed import EXIT_PREEMPTED
from dcae_jax.errors import UserError
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.online import OnlineDataConfig
from dcae_jax.report import flops
from dcae_jax.tasks.base import Variables
from dcae_jax.tasks.latents import LatentNorm, normalisation


def make(**changes):
    """The tiny run of `diffusing`, its images encoded in the step."""
    evals = [ValLossConfig(data=diffusing.online("test"), n=10, batch=4, every=4)]
    return diffusing.make(data=diffusing.online(), **{"evals": evals, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of an uninterrupted run, and the constants of its step when it was over."""
    workdir, kept = tmp_path_factory.mktemp("online") / "whole", []
    close = train._close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_close", lambda run: (kept.append(run.constants), close(run)))
        assert diffusing.run(make(), workdir) == train.DONE
    return workdir, jax.device_get(kept[0])


def test_it_is_the_run_on_a_cache_of_the_same_images(trained):
    """Same order, draws and normalisation: losses differ by the rounding of the encoder alone."""
    whole, _ = diffusing.whole()
    cached, found = runs.rows(whole), runs.rows(trained[0])
    # f32 convolutions in another program, statistics summed in f32: 1e-6 each.
    for name in ("train/loss", "train/latent_rms", "train/net/grad_norm"):
        assert found[1][name] == pytest.approx(cached[1][name], rel=2e-5), name
    for name in ("loss", "loss_t0.30", "n"):
        name = f"latents-test/{name}"
        assert found[0][name] == pytest.approx(cached[0][name], rel=2e-5), name
    # Eight steps of Adam with lr 1e-2 later it is the same run still.
    assert found[8]["train/loss"] == pytest.approx(cached[8]["train/loss"], rel=1e-2)


def test_the_manifest_names_the_encoder(trained):
    whole, _ = diffusing.whole()
    cached = latents.Manifest.from_json(runs.state(diffusing.make(), whole)[1]["latents"])
    state, meta = runs.state(make(), trained[0])
    manifest = latents.Manifest.from_json(meta["latents"])
    assert manifest.encoder == cached.encoder and manifest.decoder == cached.decoder
    assert manifest.encoder == autoencoder.load(str(diffusing.measured())).encoder
    assert (manifest.shape, manifest.classes) == (cached.shape, cached.classes)
    np.testing.assert_allclose(manifest.std, cached.std, rtol=1e-5)
    assert manifest.scaling_factor == pytest.approx(cached.scaling_factor, rel=1e-5)
    assert not [path for path in state if "encoder" in path], "it is no part of the state"
    assert config.to_json(manifest) == meta["latents"]


@pytest.mark.slow
def test_promise_2_online_an_interrupted_run_ends_in_the_same_bits(trained, tmp_path):
    assert diffusing.run(make(), tmp_path, poll=1 + 3 + 1 + 3) == EXIT_PREEMPTED
    assert diffusing.run(make(), tmp_path) == train.DONE
    runs.assert_same_run(make(), trained[0], tmp_path)


def test_promise_4_the_frozen_encoder_is_untouched(trained):
    """After eight steps the step still works with the very bits of the file."""
    encoder = autoencoder.load(str(diffusing.measured())).variables["params"]["encoder"]
    expected, found = (tree.flatten(x) for x in (encoder, trained[1]["encoder"]["params"]))
    assert {f"encoder/{k}" for k in expected} == found.keys() and len(expected) > 10
    for path, value in expected.items():
        assert np.asarray(value).tobytes() == found[f"encoder/{path}"].tobytes(), path
    state, _ = runs.state(make(), trained[0])
    assert {path.split("/")[1] for path in state if path.startswith("params")} == {"net"}


def test_promise_4_the_frozen_encoder_costs_no_backward():
    """Its forward pass once; all else is what a step on cached latents costs."""

    def counted(cfg, extra):
        task = cfg.task.build(cfg)
        state = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(0)))
        shapes = cfg.data.abstract_batch(cfg.batch).items()
        batch = {k: jax.ShapeDtypeStruct(*v) for k, v in shapes}
        constants = task.abstract_constants()
        total = flops.count(
            lambda s, c, b: step.train_step(task, cfg, (), s, c, b), state, constants, batch
        ).total
        return total - (
            flops.count(cfg.data.encode, constants["encoder"], batch["image"]).total if extra else 0
        )

    assert counted(make(), True) == counted(diffusing.make(), False)


def drawn(cfg, batch, constants):
    """(samples, means) of the latents of a batch."""
    task = cfg.task.build(cfg)
    variables = Variables({}, {}, constants)
    labelled = {**batch, "label": jnp.zeros(8, jnp.int32)}
    inputs = task.prepare(rng.key(1), labelled, jnp.int32(0), ())
    return task.latents(variables, inputs.examples), task.latents(variables, batch)


def test_an_encoder_of_gaussians_is_sampled_as_cached_moments_are(monkeypatch):
    """The released SD latents are samples: the same draw, wherever mean and variance come from."""
    mean = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 4, 4)), jnp.float32)
    logvar = jnp.full_like(mean, np.log(9))  # a deviation of 3
    monkeypatch.setattr(OnlineDataConfig, "gaussian", lambda self: True)
    monkeypatch.setattr(OnlineDataConfig, "encode", lambda *_: (mean, logvar))
    cfg, image = make(evals=[]), jnp.zeros((8, 16, 16, 3), jnp.uint8)
    found = drawn(cfg, {"image": image}, {"encoder": {}})
    expected = drawn(diffusing.make(), {"latent": mean, "logvar": logvar}, {})
    assert jnp.array_equal(found[0], expected[0]) and jnp.array_equal(found[1], mean)
    normal = (found[0] - mean) / 3
    assert abs(normal.std() - 1) < 0.15 and abs(normal.mean()) < 0.15  # 512 normal numbers


@pytest.mark.slow
def test_a_kl_autoencoder_is_encoded_as_it_encodes(monkeypatch):
    model = tiny.kl_model()
    variables = networks.variables(model)
    half = {"params": {"encoder": variables["params"]["encoder"]}}
    monkeypatch.setattr(
        online, "load", lambda *_: online.Frozen(model, half, *"sed", 1.0, "", None)
    )
    data = diffusing.online()
    assert data.gaussian() and data.manifest().plan.moments
    image = jnp.asarray(np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3)), jnp.uint8)
    found = jax.jit(data.encode)(half, image)
    x = image.astype(jnp.float32) / 127.5 - 1
    for a, b in zip(found, model.build().apply(variables, x, method="moments"), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)  # f32 convolutions, compiled and not


def test_what_is_not_known_of_the_autoencoder_is_told(trained, monkeypatch):
    with pytest.raises(UserError, match=r"scaling factor .* is not known.*latent-stats --from"):
        diffusing.online(workdir=diffusing.autoencoder()).manifest()
    manifest = dataclasses.replace(make().data.manifest(), mean=(), std=())
    with pytest.raises(UserError, match="channel needs the mean and deviation of each channel"):
        normalisation(LatentNorm.channel, manifest)
    assert normalisation(LatentNorm.scalar, manifest).scale.shape == (4,)
    with pytest.raises(UserError, match=r"gives latents \(8, 8, 4\) of 32 px, .* \(4, 4, 4\)"):
        make(**{"data.images.resolution": 32, "evals": []}).data.manifest()
    with pytest.raises(UserError, match=r"data\.autoencoder is empty"):
        make(**{"data.autoencoder": "", "evals": []})
    # The same path with other weights is another run; another path with the same ones is not.
    cfg = make()
    cfg.data.autoencoder = str(diffusing.measured() / ".." / "measured")
    assert diffusing.run(cfg, trained[0]) == train.DONE
    true = online.load
    monkeypatch.setattr(online, "load", lambda *args: true(*args)._replace(encoder="another"))
    with pytest.raises(UserError, match=r"data.\(records\)"):
        diffusing.run(make(steps=9), trained[0])


def test_the_data_of_an_online_run_survive_json_and_are_what_can_be_cached(monkeypatch):
    cfg = make()
    monkeypatch.setattr(cache_latents, "_configured", lambda _: copy.deepcopy(cfg.data))
    args = cache_latents._parser().parse_args(["--from", "ae", "--out", "x", "--split", "test"])
    assert cache_latents._data(args, ["--config=x"]) == diffusing.online("test").images
    assert config.from_json(config.to_json(cfg)) == cfg
    assert cfg.data.abstract_batch(8) == cfg.data.images.abstract_batch(8)
