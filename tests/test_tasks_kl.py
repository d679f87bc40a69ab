"""The Autoencode task with a KL autoencoder: samples, the KL loss, what is refused, whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from dcae_jax import config, flags, inspect, recipes, tree
from dcae_jax.models.kl_vae import sd_vae_f8
from dcae_jax.tasks.autoencode import Bottleneck, Moments, Phase, divergence, sample
from dcae_jax.tasks.base import Variables

ROOT = runs.ROOT


def kl_run(phase=Phase.low_res_full, **changes):
    cfg = recipes.use_model(tiny.run(phase, **changes), tiny.kl_model())
    config.validate(config.resolve(cfg))
    return cfg


def test_divergence_is_the_integral_over_the_densities():
    mean = np.array([-1.5, 0.0, 0.3, 2.0], np.float32)
    logvar = np.array([-3.0, 0.0, 1.0, 0.5], np.float32)
    x = np.linspace(-30, 30, 400_001)

    def log_density(mean, logvar):
        return -0.5 * (np.log(2 * np.pi) + logvar + (x - mean) ** 2 / np.exp(logvar))

    expected = []
    for m, v in zip(mean.astype(float), logvar.astype(float), strict=True):
        p = log_density(m, v)
        expected.append(np.trapezoid(np.exp(p) * (p - log_density(0.0, 0.0)), x))
    one = lambda v: jnp.asarray(v).reshape(1, 2, 2, 1)  # noqa: E731
    found = divergence(Moments(one(mean), one(logvar)))
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5, atol=1e-6)  # f32
    found = divergence(Moments(one(mean), None))
    np.testing.assert_allclose(found.ravel(), 0.5 * mean**2, rtol=1e-6)


def test_samples_have_the_moments_of_the_posterior():
    mean, logvar = jnp.full((1, 200, 200, 1), 0.7), jnp.full((1, 200, 200, 1), -2.0)
    noise = jax.random.normal(jax.random.key(0), mean.shape)
    z = sample(Moments(mean, logvar), noise)
    # 40,000 draws: the standard error of the mean is 0.0018, of the deviation 0.0013.
    assert float(z.mean()) == pytest.approx(0.7, abs=0.008)
    assert float(z.std()) == pytest.approx(np.exp(-1), abs=0.006)
    np.testing.assert_array_equal(sample(Moments(mean, logvar), None), mean)


def test_losses_come_from_a_sample_and_predictions_from_the_mean():
    cfg = kl_run()
    cfg.task.losses.kl = 0.5
    trainer = tiny.Trainer(cfg)
    task, batch = trainer.task, jax.tree.map(jnp.asarray, tiny.batch(cfg))
    variables = Variables(trainer.state.params, {}, {})
    inputs = task.prepare(jax.random.key(1), batch, jnp.int32(0), ())
    assert inputs.examples["noise"].shape == (16, 8, 8, 4)
    assert float(inputs.examples["noise"].std()) == pytest.approx(1.0, abs=0.05)
    model, x = cfg.task.model.build(), inputs.examples["image"]
    params = {"params": variables.params["ae"]}

    @jax.jit
    def by_hand():
        mean, logvar = model.apply(params, x, method="moments")
        z = mean + jnp.exp(0.5 * logvar) * inputs.examples["noise"]
        return mean, logvar, model.apply(params, z, method="decode"), model.apply(params, x)

    mean, logvar, y, of_the_mean = by_hand()
    loss = jax.jit(lambda v: task.objectives[0].loss(v, inputs, None).metrics)(variables)
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
    expected = {
        "loss_l1": jnp.abs(y - x).mean(), "loss_l2": ((y - x) ** 2).mean(), "loss_kl": kl,
        "latent_ms": (mean**2).mean(), "latent_std": jnp.exp(0.5 * logvar).mean(),
    }  # fmt: skip
    expected["loss"] = expected["loss_l1"] + 0.5 * expected["loss_l2"] + 0.5 * kl
    assert loss.keys() == expected.keys()
    for name, value in expected.items():
        assert float(loss[name]) == pytest.approx(float(value), rel=1e-5), name  # f32 sums
    predicted = jax.jit(task.predict)(variables, batch)
    # Two programs: values of 2 differ by some roundings of 1e-7 a layer.
    np.testing.assert_allclose(predicted, of_the_mean, atol=5e-5)


@pytest.mark.slow
def test_the_noise_does_not_depend_on_microbatches():
    found = []
    for microbatches in (1, 4):
        cfg = kl_run()
        cfg.task.losses.kl, cfg.microbatches = 0.5, microbatches
        found.append(tiny.Trainer(cfg).grads()[0])
    for name in found[0]:
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "phase", [pytest.param(Phase.high_res_latent, marks=pytest.mark.slow), Phase.low_res_local]
)
def test_frozen_parts_stay_and_the_others_move(phase):
    trainer = tiny.Trainer(kl_run(phase))
    before = tree.flatten(jax.device_get(trainer.state.params["ae"]))
    trainer.train(2)
    after = tree.flatten(jax.device_get(trainer.state.params["ae"]))
    moved = {p for p in before if not np.array_equal(before[p], after[p])}
    trained, _ = tree.partition({"ae": trainer.state.params["ae"]}, trainer.cfg.task.trainable)
    assert moved == {p.removeprefix("ae/") for p in tree.flatten(trained)}


def test_bottlenecks_that_make_no_sense_are_refused():
    cfg = kl_run()
    cfg.task.bottleneck = Bottleneck.noise
    with pytest.raises(config.UserError, match="learns its own; set bottleneck=kl"):
        config.validate(cfg)
    cfg.task.bottleneck = Bottleneck.none
    with pytest.raises(config.UserError, match=r"no gradient, .*; set bottleneck=kl"):
        config.validate(cfg)
    cfg = kl_run(Phase.low_res_local)  # a decoder trained on the means of a frozen encoder
    cfg.task.bottleneck = Bottleneck.none
    config.validate(cfg)


def test_use_model_sets_what_follows_from_the_model():
    cfg = flags.load(f"{ROOT}/configs/kl_vae.py:f8,phase2")
    assert cfg.task.model.widths == sd_vae_f8().widths and cfg.task.bottleneck is Bottleneck.kl
    assert cfg.task.trainable == recipes.middle(cfg.task.model)
    assert cfg.task.model.remat.value == "stage"  # as phase 2 of DC-AE
    # 64 x 64 x 4 latent values for 512 x 512 x 3: one for 48.
    assert cfg.task.losses.kl == pytest.approx(1e-6 / 48)


@pytest.mark.parametrize("arg", ["f8", "f32", "f64:phase3", "f128,phase2", "demo", "demo:phase3"])
def test_every_argument_of_the_config_resolves_and_validates(arg):
    cfg = config.resolve(flags.load(f"{ROOT}/configs/kl_vae.py:{arg}"))
    cfg.init_from = None if cfg.task.phase is Phase.low_res_full else "runs/before"
    config.validate(cfg)
    name, phase = (*arg.replace(":", ",").split(","), "phase1")[:2]
    assert cfg.name == f"KL {name} {phase}"
    if name == "demo":
        twin = flags.load(f"{ROOT}/configs/demo.py:{phase}")
        assert (cfg.data, cfg.steps, cfg.optim) == (twin.data, twin.steps, twin.optim)
        assert cfg.task.model.latent_shape(128, 128) == twin.task.model.latent_shape(128, 128)
    else:
        assert cfg.task.model.factor == int(name[1:])


def test_a_wrong_argument_names_the_models_and_the_phases():
    for arg in ("f16", "f8,phase4", "f8,phase1,phase2", "phase1,f8"):
        with pytest.raises(config.UserError, match=r"f128, demo .* phase1, phase2, phase3"):
            flags.load(f"{ROOT}/configs/kl_vae.py:{arg}")


def test_a_whole_run_trains_evaluates_saves_and_refuses_another_model(tmp_path):
    changes = {"task.model": tiny.kl_model(), "task.bottleneck": Bottleneck.kl, "steps": 6}
    assert runs.run("phase1", tmp_path / "kl", **changes) == 0
    rows = runs.rows(tmp_path / "kl")
    assert rows[6]["train/loss_kl"] > 0 and 0 < rows[6]["train/latent_std"] < 10
    assert any(name.endswith("/psnr") for row in rows.values() for name in row)
    state, _ = runs.state("phase1", tmp_path / "kl", **changes)
    assert any(name.endswith("ae/decoder/up_2/block_1/conv2/kernel") for name in state)
    with pytest.raises(config.UserError, match="model"):
        runs.run("phase1", tmp_path / "kl", steps=6)


def test_dry_run_describes_the_model_and_the_losses(capsys):
    changes = {"task.model": tiny.kl_model(), "task.bottleneck": Bottleneck.kl}
    cfg = runs.make_config("phase1", **changes)
    with runs.devices(1):
        assert inspect.dry_run(cfg) == 0
    out = capsys.readouterr().out
    for part in ("f4c4 (KL): 32 x 32 x 3 -> 8 x 8 x 4", "decoder/up_0:", "kl 1e-06", "GFLOP"):
        assert part in out, (part, out)
