"""The Autoencode task: bottlenecks, running statistics, the adaptive weight, late starts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny

from dcae_jax import config, flags, tree
from dcae_jax.evals.reconstruct import ReconstructConfig
from dcae_jax.models.layers import BatchNormMode, Norm
from dcae_jax.tasks.autoencode import Bottleneck, Moments, Phase, first_channels
from dcae_jax.tasks.base import Inputs, Variables


def stats_of(trainer):
    return tree.flatten(jax.device_get(trainer.state.stats))


@pytest.mark.parametrize("mode", BatchNormMode)
def test_only_trained_stages_move_their_running_statistics(mode):
    cfg = tiny.run(Phase.low_res_local, norm=Norm.batch)
    cfg.task.adversarial.lecam = 0.0
    cfg.task.model.decoder.norms = (Norm.batch,) * 3
    cfg.task.model.decoder.blocks = (cfg.task.model.decoder.blocks[0],) * 3
    cfg.task.model.batch_norm = mode
    config.validate(config.resolve(cfg))
    trainer = tiny.Trainer(cfg)
    before = stats_of(trainer)
    trainer.train(1)
    after = stats_of(trainer)
    moved = {p for p in before if not np.array_equal(before[p], after[p])}
    trained = {p for p in before if "decoder/stage_1" in p}
    assert trained and trained < before.keys()
    assert moved == (trained if mode is BatchNormMode.update else set())


def test_microbatches_are_refused_with_batch_statistics():
    cfg = tiny.run(norm=Norm.batch)
    cfg.task.model.batch_norm, cfg.microbatches = BatchNormMode.update, 2
    with pytest.raises(config.UserError, match="batch_norm=update"):
        config.validate(config.resolve(cfg))


def test_adaptive_weight_is_the_ratio_of_the_accumulated_norms():
    cfg = tiny.run(Phase.low_res_local)
    cfg.microbatches = 4
    trainer = tiny.Trainer(cfg)
    _, grads = trainer.grads()
    rec, adv = (float(optax.tree.norm(grads["ae"][t])) for t in ("rec", "adv"))
    total, found = trainer.task.objectives[0].combine(grads["ae"], jnp.int32(5))
    expected = 0.5 * rec / (adv + 1e-4)
    assert float(found["ae/adaptive_weight"]) == pytest.approx(expected, rel=1e-6)
    leaf = jax.tree.leaves(total)[0]
    parts = [jax.tree.leaves(grads["ae"][t])[0] for t in ("rec", "adv")]
    np.testing.assert_allclose(leaf, parts[0] + expected * parts[1], rtol=1e-5)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (2, 0.0), (3, 0.25), (5, 0.75), (9, 1.0)])
def test_the_autoencoder_sees_the_discriminator_late_and_slowly(step, share):
    cfg = tiny.run(Phase.low_res_local)
    adversarial = cfg.task.adversarial
    adversarial.start_step, adversarial.warmup_steps, adversarial.adaptive = 3, 4, False
    combine = cfg.task.build(cfg).objectives[0].combine
    one = {"w": jnp.ones(3)}
    total, found = combine({"rec": one, "adv": one}, jnp.int32(step))
    assert float(found["ae/adaptive_weight"]) == pytest.approx(0.5 * share)
    np.testing.assert_allclose(total["w"], 1 + 0.5 * share, rtol=1e-6)


@pytest.mark.parametrize("bottleneck", [Bottleneck.kl, Bottleneck.noise])
def test_bottleneck_noise_is_drawn_once_on_the_global_batch(bottleneck):
    found = []
    for microbatches in (1, 4):
        cfg = tiny.run()
        cfg.task.bottleneck, cfg.microbatches = bottleneck, microbatches
        cfg.task.losses.noise, cfg.task.losses.kl = 2.0, 0.1
        found.append(tiny.Trainer(cfg).grads()[0])
    for name in found[0]:
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-5, err_msg=name)
    plain = tiny.Trainer(tiny.run()).grads()[0]
    assert abs(plain["loss"] - found[0]["loss"]) > 1e-3  # the noise does something


def test_kl_is_that_of_a_unit_variance_posterior():
    cfg = tiny.run()
    cfg.task.bottleneck = Bottleneck.kl
    metrics = tiny.Trainer(cfg).grads()[0]
    # KL(N(mu, 1) || N(0, 1)) = mu^2 / 2 per element.
    assert metrics["loss_kl"] == pytest.approx(0.5 * metrics["latent_ms"], rel=1e-6)


def test_a_discriminator_that_starts_late_does_not_move_before():
    cfg = tiny.run(Phase.low_res_local)
    cfg.task.adversarial.optim.start_step = 2
    trainer = tiny.Trainer(cfg)
    before = jax.device_get(trainer.state.params["disc"])
    metrics = trainer.train(2)
    assert metrics["disc/update_norm"] == 0
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(trainer.state.params["disc"]), before
    )
    assert trainer.train(1, first=2)["disc/update_norm"] > 0


def test_warnings_name_a_discriminator_that_has_won_or_stands_still():
    task = (cfg := tiny.run(Phase.low_res_local)).task.build(cfg)
    healthy = {"disc/loss": 0.8, "disc/update_norm": 0.1, "disc/lr": 1e-4}
    assert task.warnings(healthy) == []
    assert "has won" in task.warnings(healthy | {"disc/loss": 0.001})[0]
    assert "do not move" in task.warnings(healthy | {"disc/update_norm": 0.0})[0]


def test_losses_of_both_players_against_numpy(monkeypatch):
    """L1, L2, hinge, adversarial, R1 and LeCam from given reconstructions and a linear critic."""
    cfg = tiny.run(Phase.low_res_local, batch=3, resolution=16)
    cfg.task.adversarial.r1, cfg.task.adversarial.lecam = 0.7, 0.3
    cfg.task.losses.l1, cfg.task.losses.l2 = 1.0, 0.5
    task = cfg.task.build(cfg)
    gen = np.random.default_rng(0)
    x, y = gen.uniform(-1, 1, (2, 3, 16, 16, 3)).astype(np.float32)
    z = gen.normal(size=(3, 4, 4, 4)).astype(np.float32)
    w = gen.normal(size=(3,)).astype(np.float32)

    def critic(params, images):  # logits are linear in the pixels, so R1 has a closed form
        return (images * params["w"]).sum(-1, keepdims=True)

    monkeypatch.setattr(task, "_logits", critic)
    latent = Moments(jnp.asarray(z), None)
    monkeypatch.setattr(task, "_apply", lambda *a, **k: (jnp.asarray(y), latent, {}))
    stats = {"lecam": {"real": jnp.float32(0.2), "fake": jnp.float32(-0.1)}}
    variables = Variables({"ae": {}, "disc": {"w": jnp.asarray(w)}}, stats, {})
    inputs = Inputs({"image": jnp.asarray(x), "weight": jnp.full((3,), 1 / 3)}, {})
    ae, disc = (o.loss for o in task.objectives)
    first = ae(variables, inputs, None)
    second = disc(variables, inputs, {"fake": jnp.asarray(y)})

    real, fake = (v.astype(np.float64) @ w for v in (x, y))
    relu = lambda v: np.maximum(v, 0)  # noqa: E731
    l1, l2 = np.abs(y - x).mean(), ((y - x) ** 2).mean()
    hinge = 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())
    # d mean(logits) / d image = w / (16 * 16) at each pixel.
    r1 = 256 * np.sum((w.astype(np.float64) / 256) ** 2)
    lecam = (relu(real + 0.1) ** 2).mean() + (relu(0.2 - fake) ** 2).mean()
    expected = {
        "loss_l1": l1, "loss_l2": l2, "loss": l1 + 0.5 * l2, "loss_adv": -fake.mean(),
        "latent_ms": (z.astype(np.float64) ** 2).mean(),
        "disc/loss": hinge, "disc/r1": r1, "disc/lecam": lecam,
        "disc/logits_real": real.mean(), "disc/logits_fake": fake.mean(),
    }  # fmt: skip
    found = {**first.metrics, **second.metrics}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name  # f32 sums of 2,304
    assert float(first.terms["rec"]) == pytest.approx(l1 + 0.5 * l2, rel=1e-5)
    assert float(first.terms["adv"]) == pytest.approx(-fake.mean(), rel=1e-5)
    total = hinge + 0.5 * 0.7 * r1 + 0.3 * lecam
    assert float(second.terms["disc"]) == pytest.approx(total, rel=1e-5)
    anchors = second.stats["lecam"]
    assert float(anchors["real"]) == pytest.approx(0.9 * 0.2 + 0.1 * real.mean(), rel=1e-5)
    assert float(anchors["fake"]) == pytest.approx(-0.9 * 0.1 + 0.1 * fake.mean(), rel=1e-5)


def test_a_phase_that_trains_a_part_refuses_to_train_everything():
    cfg = tiny.run(Phase.high_res_latent)
    cfg.task.trainable = "ae/.*"
    with pytest.raises(config.UserError, match="as if everything trained"):
        config.validate(cfg)


# ------------------------------------------------------------------------------ structured latents


def structured(counts=(1, 2, 4), bottleneck=Bottleneck.none, phase=Phase.low_res_full, batch=16):
    cfg = tiny.run(phase, batch=batch)
    cfg.task.channel_counts, cfg.task.bottleneck = counts, bottleneck
    config.validate(config.resolve(cfg))
    return cfg


def test_counts_of_channels_are_drawn_for_each_example_and_move_no_other_draw():
    """The counts of a batch are those given, equally likely; the bottleneck's noise stays."""
    image = {"image": jnp.zeros((3000, 4, 4, 3), jnp.uint8)}
    plain, cut = (
        cfg.task.build(cfg).prepare(jax.random.key(3), image, jnp.int32(0), ()).examples
        for cfg in (structured((), Bottleneck.kl), structured(bottleneck=Bottleneck.kl))
    )
    assert cut.keys() - plain.keys() == {"channels"}
    for name in plain:
        np.testing.assert_array_equal(plain[name], cut[name])
    values, times = np.unique(cut["channels"], return_counts=True)
    assert values.tolist() == [1, 2, 4]
    # 3000 draws of probability 1/3: a deviation of 26.
    np.testing.assert_allclose(times, 1000, atol=110)


def test_channels_beyond_the_prefix_are_not_decoded_and_get_no_gradient():
    z = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype(np.float32)
    counts = jnp.asarray([1, 3, 4])

    def loss(z):
        return jnp.sum(jnp.sin(first_channels(z, counts)) * 2)

    found, grad = first_channels(jnp.asarray(z), counts), jax.grad(loss)(jnp.asarray(z))
    for i, n in enumerate((1, 3, 4)):
        np.testing.assert_array_equal(found[i, ..., :n], z[i, ..., :n])
        np.testing.assert_allclose(grad[i, ..., :n], 2 * np.cos(z[i, ..., :n]), rtol=1e-5)
        assert not np.any(found[i, ..., n:]) and not np.any(grad[i, ..., n:])


def test_only_examples_that_keep_a_channel_train_what_makes_it():
    """The whole loss: columns of the encoder's output beyond the largest count get no gradient."""
    trainer = tiny.Trainer(structured(batch=4))
    batch = jax.tree.map(jnp.asarray, tiny.batch(trainer.cfg))
    inputs = trainer.task.prepare(jax.random.key(0), batch, jnp.int32(0), ())
    inputs.examples["channels"] = jnp.asarray([1, 2, 2, 1])

    @jax.jit
    def gradient(params):
        def rec(params):
            variables = Variables(params, {}, {})
            return trainer.task.objectives[0].loss(variables, inputs, None).terms["rec"]

        return jax.grad(rec)(params)

    flat = tree.flatten(gradient(trainer.state.params))
    kernel = np.abs(flat["ae/encoder/conv_out/kernel"]).max((0, 1, 2))
    assert (kernel[:2] > 0).all() and not kernel[2:].any()
    rows = np.abs(flat["ae/decoder/conv_in/kernel"]).max((0, 1, 3))
    assert (rows[:2] > 0).all() and not rows[2:].any()


def test_all_channels_kept_are_the_same_gradients_bit_by_bit():
    found = [tiny.Trainer(structured(c), compiled=tiny.AS_IN_TRAINING).grads() for c in ((), (4,))]
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("phase", "bottleneck"),
    [
        (Phase.low_res_full, Bottleneck.kl),
        pytest.param(Phase.low_res_local, Bottleneck.noise, marks=pytest.mark.slow),
        pytest.param(Phase.high_res_latent, Bottleneck.none, marks=pytest.mark.slow),
    ],
)
def test_structured_latents_agree_over_microbatches(phase, bottleneck):
    found = []
    for microbatches in (1, 4):
        cfg = structured((1, 4), bottleneck, phase)
        cfg.microbatches = microbatches
        found.append(tiny.Trainer(cfg).grads())
    for name in found[0][0]:
        np.testing.assert_allclose(found[1][0][name], found[0][0][name], rtol=1e-5, err_msg=name)
    for term, expected in found[0][1]["ae"].items():
        assert tiny.error(found[1][1]["ae"][term], expected) <= 1e-5  # sums in another order


def test_structured_latents_are_described_and_wrong_counts_refused():
    cut, plain = ("\n".join(cfg.task.build(cfg).describe()) for cfg in (structured(), tiny.run()))
    assert "structured latents: each example keeps its first 1, 2 or 4 of 4 channels" in cut
    assert "structured" not in plain
    for counts, told in (
        ((0, 4), "from 1 to the latent's 4"), ((4, 5), "from 1 to the latent's 4"),
        ((2, 2, 4), "different numbers"), ((1, 2), "never see the channels from 2 on; add 4"),
    ):  # fmt: skip
        with pytest.raises(config.UserError, match=told):
            structured(counts)
    cfg = structured()
    cfg.evals = [ReconstructConfig(name="e", channel_counts=(2, 9))]
    with pytest.raises(config.UserError, match=r"evals: e: channel_counts = \(2, 9\)"):
        config.validate(cfg)


@pytest.mark.parametrize("phase", ["phase1", "phase2", "phase3"])
def test_the_structured_argument_changes_nothing_but_the_counts(phase):
    path = runs.ROOT / "configs/dcae_f64c128.py"
    plain, cut = (flags.load(f"{path}:{arg}") for arg in (phase, f"structured:{phase}"))
    for cfg in (plain, cut):
        cfg.init_from = "somewhere"
        config.validate(config.resolve(cfg))
    a, b = config.flatten(plain), config.flatten(cut)
    changed = {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
    assert {re.sub(r"\[\d+\]$", "", k).rsplit(".")[-1] for k in changed} == {
        "name", "channel_counts"
    }  # fmt: skip
    assert cut.task.channel_counts == cut.evals[1].channel_counts == (16, 32, 64, 128)
