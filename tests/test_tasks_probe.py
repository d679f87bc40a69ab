"""Probes: gradients and statistics of the head against numpy, what moves, mixing, mistakes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import masks
import numpy as np
import pytest
import scipy.stats
import tiny
from diffusing import online

from dcae_jax import config, optim, rng, sharding, step, tree
from dcae_jax.config import OptimConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.errors import UserError
from dcae_jax.evals.accuracy import AccuracyConfig
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.models.md_uvit import MDUViTConfig
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.report import flops
from dcae_jax.tasks import probe
from dcae_jax.tasks.base import Task, Trims, Variables
from dcae_jax.tasks.latents import Normalisation
from dcae_jax.tasks.probe import Mode, Pool

CLASSES = 3
FINETUNE = {"task.mode": Mode.finetune, "task.trainable": ".*"}
FLOW = ProcessConfig(Kind.flow, Space.v, Space.v)


def make(**changes):
    return masks.probe(
        cached=False, **{"evals": [], "task.classes": CLASSES, "batch": 16, **changes}
    )


def uvit(kind=UViTConfig, **fields):
    return kind(
        in_channels=4, input_size=(4, 4), num_classes=2, width=16, depth=4, heads=2,
        dtype=masks.model().dtype, **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def linear():
    """A linear probe of an encoder whose parameters are not those of the start."""
    return randomised(tiny.Trainer(make()))


def randomised(trainer):
    gen, flat = np.random.default_rng(0), jax.device_get(tree.flatten(trainer.state.params))
    trainer.replace_params(
        {k: v + gen.normal(0, 0.1, v.shape).astype(np.float32) for k, v in flat.items()}
    )
    return trainer


def batch_of(cfg):
    """The first one, on a device."""
    return jax.tree.map(jnp.asarray, tiny.batch(cfg))


def variables(trainer):
    return Variables(trainer.state.params, trainer.state.stats, trainer.constants)


def features(trainer, latent, layer=None):
    """Of the network that pre-training has: after the norm, or after that layer."""
    net, x = trainer.cfg.task.model.build(), trainer.constants["norm"].apply(latent)
    params = {"params": trainer.state.params["net"]}
    return np.asarray(net.apply(params, x, layer, method="features"), np.float64)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# ------------------------------------------------------------------------------------- linear probe


def test_it_is_a_task_that_takes_a_part_of_another_network():
    task = make().task.build(make())
    assert isinstance(task, Task) and isinstance(task, Trims)


def test_the_heads_gradient_and_its_batch_norm_are_those_of_numpy(linear):
    data = batch_of(linear.cfg)
    metrics, grads = linear.grads()
    tokens = features(linear, data["latent"])[:, 1:]
    pooled = tokens.mean(1)
    x = (pooled - pooled.mean(0)) / np.sqrt(pooled.var(0) + 1e-6)
    head = jax.tree.map(lambda v: np.asarray(v, np.float64), linear.state.params["head"])
    said, onehot = x @ head["kernel"] + head["bias"], np.eye(CLASSES)[data["label"]]
    wrong = (softmax(said) - onehot) / len(x)
    # float32 against float64, of features that differ by little and are scaled to one
    (found,) = grads["probe"].values()
    np.testing.assert_allclose(found["head"]["kernel"], x.T @ wrong, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["head"]["bias"], wrong.sum(0), rtol=1e-3, atol=1e-5)
    assert tree.flatten(found).keys() == {"head/kernel", "head/bias"}
    want = -np.log((softmax(said) * onehot).sum(1)).mean()
    assert metrics["loss"] == pytest.approx(want, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((said.argmax(1) == data["label"]).mean())

    old = {"mean": jnp.full(16, 2.0), "var": jnp.full(16, 3.0)}
    normal, moved = probe.batch_norm(jnp.asarray(pooled, jnp.float32), old)
    np.testing.assert_allclose(normal, x, rtol=1e-3, atol=1e-4)
    # As in PyTorch: a tenth of the way, towards the unbiased variance.
    np.testing.assert_allclose(moved["mean"], 0.9 * 2 + 0.1 * pooled.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moved["var"], 0.9 * 3 + 0.1 * pooled.var(0, ddof=1), rtol=1e-5)
    running = Variables(linear.state.params, {"head": moved}, linear.constants)
    predicted = linear.task.predict(running, data)
    scaled = (pooled - moved["mean"]) / np.sqrt(np.asarray(moved["var"], np.float64) + 1e-6)
    np.testing.assert_allclose(predicted, scaled @ head["kernel"] + head["bias"], atol=1e-5)


def test_the_class_token_can_be_asked(linear):
    data = batch_of(linear.cfg)
    cfg = make(**{"task.pool": Pool.cls})
    found = cfg.task.build(cfg).predict(variables(linear), data)
    x = features(linear, data["latent"])[:, 0] / np.sqrt(1 + 1e-6)  # statistics of the start
    head = linear.state.params["head"]
    np.testing.assert_allclose(found, x @ head["kernel"] + head["bias"], atol=1e-5)


def test_promise_4_there_is_no_backward_pass_through_a_frozen_encoder():
    """Counted: the forward pass, and of the head the gradient of its kernel alone."""
    cfg = make()
    task = cfg.task.build(cfg)
    state = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(0)))
    data, constants = tiny.batch(cfg), tiny.constants(cfg)
    total = flops.count(
        lambda s, b: step.loss_and_grads(task, cfg, s, constants, b)[1], state, data
    ).total
    forward = flops.count(
        lambda s, b: task.predict(Variables(s.params, s.stats, constants), b), state, data
    ).total
    assert forward > 100_000 and total - forward == 2 * cfg.batch * 16 * CLASSES
    moments = jax.tree.leaves(state.opt)
    assert sum(x.size for x in moments if x.ndim) == 2 * (16 + 1) * CLASSES


def test_a_separable_labelling_is_learned_and_two_devices_do_the_same(linear):
    """The label is the sign of a channel's mean: features of a random encoder know it."""
    cfg = make(**{"optim.lr": 0.1, "optim.weight_decay": 0.0})
    one, two = (randomised(tiny.Trainer(cfg, devices)) for devices in (1, 2))
    gen = np.random.default_rng(5)
    label = np.arange(16, dtype=np.int32) % 2

    def batch():
        latent = gen.normal(size=(16, 4, 4, 4)).astype(np.float32)
        latent[..., 0] += 2.0 * (2 * label - 1)[:, None, None]
        return {"latent": latent, "label": label}

    def steps(trainer, batches):
        with jax.set_mesh(trainer.mesh):
            for data in batches:
                placed = sharding.put_batch(data, trainer.mesh)
                trainer.state, metrics = trainer._step(trainer.state, trainer.constants, placed)
        return jax.device_get(metrics)

    batches = [batch() for _ in range(60)]
    steps(one, batches[:2]), steps(two, batches[:2])
    a, b = (jax.device_get((t.state.params, t.state.stats, t.state.ema)) for t in (one, two))
    # The same sums in another order; two steps of Adam of 0.1 each.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), a, b)
    assert steps(one, batches[2:])["accuracy"] >= 0.9
    data = jax.tree.map(jnp.asarray, batch())
    found = np.asarray(one.task.predict(variables(one), data)).argmax(1)
    assert (found == label).mean() >= 0.9, "by running statistics"


# -------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def tuned():
    """Fine-tuning with Adam of no epsilon: what has a gradient moves by its rate at first."""
    cfg = make(**FINETUNE, **{"task.mixup": 0.8, "task.cutmix": 1.0, "task.label_smoothing": 0.1})
    groups = optim.layer_decay_groups(2, 0.65)
    cfg.optim = OptimConfig(lr=1e-3, eps=1e-30, groups=groups)
    return randomised(tiny.Trainer(cfg))


def test_fine_tuning_sees_the_mean_token_of_the_last_block_through_a_norm(tuned):
    data = batch_of(tuned.cfg)
    pooled = features(tuned, data["latent"], layer=2)[:, 1:].mean(1)
    spread = np.sqrt(pooled.var(1, keepdims=True) + 1e-6)
    head = jax.tree.map(lambda v: np.asarray(v, np.float64), tuned.state.params["head"])
    x = (pooled - pooled.mean(1, keepdims=True)) / spread
    x = x * head["norm"]["scale"] + head["norm"]["bias"]
    found = tuned.task.predict(variables(tuned), data)
    np.testing.assert_allclose(found, x @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5)


def test_fine_tuning_moves_every_layer_at_its_own_rate(tuned):
    before = jax.device_get(tree.flatten(tuned.state.params))
    metrics = tuned.train(1)
    after = jax.device_get(tree.flatten(tuned.state.params))
    assert metrics["nonfinite"] == 0
    rates = {}
    for path, old in before.items():
        for i, name in enumerate(tree.canonical(path, old)):
            change = (after[path] - old)[i] if name != path else after[path] - old
            rates[name] = np.abs(change).max() / 1e-3
    for name, rate in rates.items():
        block = re.match(r"net/encoder/blocks/(\d)/", name)
        layer = 0 if re.match("net/encoder/(patch_embed|cls)", name) else 3
        layer = int(block[1]) + 1 if block else layer
        # Parameters near 1 are rounded to 6e-8, steps are about 3e-4.
        assert rate == pytest.approx(0.65 ** (3 - layer), rel=2e-3), name
    assert {"net/encoder/cls", "net/encoder/blocks/1/attn/qkv/kernel", "head/norm/scale"} <= set(
        rates
    )
    assert not any(name.startswith(("net/encoder/norm", "net/decoder")) for name in rates)


def test_microbatches_add_up_in_fine_tuning():
    cfg = make(**FINETUNE, **{"task.mixup": 0.8})
    found = []
    for parts in (1, 2):
        cfg = dataclasses.replace(cfg, microbatches=parts)
        found.append(randomised(tiny.Trainer(cfg)).grads())
    (one, grads), (two, other) = found
    assert one.keys() == two.keys()
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    assert tiny.error(other, grads) < 1e-6  # float32 sums in another order


# ----------------------------------------------------------------------------------- soft targets


def test_soft_targets_are_those_of_the_formula():
    found = np.asarray(probe.soft_targets(jnp.array([2, 0]), 4, 0.1))
    # In float32.
    np.testing.assert_allclose(found, [[0.025, 0.025, 0.925, 0.025], [0.925] + [0.025] * 3], 1e-6)


@pytest.fixture(scope="module")
def shares():
    """(blends, boxes) of 3000 steps that may take either."""
    keys = jax.random.split(jax.random.key(0), 3000)
    draw = jax.vmap(lambda k: probe.mixing(k, 64, 48, 0.8, 1.0))
    found = np.asarray(jax.jit(draw)(keys))
    boxes = np.isin(found, (0.0, 1.0)).all((1, 2))
    return found[~boxes], found[boxes] == 0


def test_mixup_draws_its_share_from_the_beta_distribution(shares):
    blends, _ = shares
    assert (blends == blends[:, :1, :1]).all()
    assert scipy.stats.kstest(blends[:, 0, 0], scipy.stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_one_of_both_is_taken_in_half_of_the_steps(shares):
    assert abs(len(shares[0]) - 1500) < 4 * np.sqrt(3000) / 2  # deviations


def test_cutmix_takes_a_box_of_the_published_size(shares):
    """Beta(1, 1) is uniform: so is the area of a box before it is cut off at the border."""
    sides = []
    for box in shares[1]:
        rows, columns = box.any(1), box.any(0)
        np.testing.assert_array_equal(box, np.outer(rows, columns))
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2, "one piece"
        if rows.any() and not (rows[[0, -1]].any() or columns[[0, -1]].any()):
            sides.append((rows.sum(), columns.sum()))
    sides = np.array(sides)
    assert len(sides) > 100 and (sides % 2 == 0).all()
    # One share of both sides, each rounded down to even numbers.
    assert np.abs(sides[:, 0] / 64 - sides[:, 1] / 48).max() < 2 / 48
    # Of a side s = 64 sqrt(u), rounded so, 63 - s of 64 places miss the border; likewise of 48.
    root = np.sqrt(np.random.default_rng(0).uniform(size=400_000))
    tall, wide = (2 * (np.floor(size * root) // 2) for size in (64, 48))
    chance = np.clip(63 - tall, 0, None) * np.clip(47 - wide, 0, None) * (wide > 0)
    want, deviation = (tall * chance).sum() / chance.sum(), sides[:, 0].std()
    assert abs(sides[:, 0].mean() - want) < 4 * deviation / np.sqrt(len(sides))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_examples_and_labels_are_mixed_by_the_same_share(mixup, cutmix):
    cfg = make(**FINETUNE, **{"task.mixup": mixup, "task.cutmix": cutmix, "task.classes": 16})
    task = cfg.task.build(cfg)
    data = batch_of(cfg) | {"label": jnp.arange(16)}
    latent, shares = np.asarray(data["latent"]), []

    @jax.jit
    def prepared(k):
        return task.prepare(rng.key(0, k), data, k, ()).examples

    for k in range(8):
        found = prepared(jnp.int32(k))
        target, x = np.asarray(found["target"], np.float64), np.asarray(found["latent"])
        share = target[0, 0]
        np.testing.assert_allclose(
            target, share * np.eye(16) + (1 - share) * np.eye(16)[::-1], atol=1e-6
        )
        partner = latent[::-1]
        if mixup:
            np.testing.assert_allclose(x, share * latent + (1 - share) * partner, atol=1e-6)
        else:
            own = (x == latent).all((0, 3))
            np.testing.assert_array_equal(x, np.where(own[..., None], latent, partner))
            assert own.mean() == pytest.approx(share)
        shares.append(share)
    assert np.ptp(shares) > 0.1 and found.keys() == {"latent", "target", "weight"}


def test_images_are_mixed_before_anything_encodes_them():
    cfg = masks.changed(
        make(**FINETUNE), **{
            "task.model": masks.model(in_channels=3, input_size=(16, 16), patch=4),
            "data": masks.images("train"), "task.mixup": 0.8, "task.classes": 2,
        }
    )  # fmt: skip
    task = cfg.task.build(cfg)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    data = {"image": jnp.asarray(image), "label": jnp.arange(16) // 8}
    found = jax.jit(lambda: task.prepare(rng.key(0), data, jnp.int32(0), ()).examples)()
    share = float(found["target"][0, 0])
    assert found["image"].dtype == jnp.uint8 and 0.01 < share < 0.99
    want = share * image + (1 - share) * image[::-1]
    assert np.abs(np.asarray(found["image"]) - want).max() < 0.51  # rounded
    with pytest.raises(UserError, match=r"are of 2 classes, but task\.classes = 5"):
        dataclasses.replace(cfg.task, classes=5).build(cfg).constants(training=True)


# --------------------------------------------------------------------------------------------- UViT


@pytest.mark.parametrize("kind", [UViTConfig, MDUViTConfig])
def test_weights_of_a_uvit_fit_but_for_what_is_left_out(kind):
    shapes = quick_shapes(kind)
    cfg = make(**{"task.model": uvit(), "task.process": FLOW})
    task = cfg.task.build(cfg)
    wanted = tree.flatten(jax.eval_shape(task.init, jax.random.key(0))[0]["net"])
    kept = {k: v for k, v in shapes.items() if not re.fullmatch(task.unused_params, f"net/{k}")}
    assert {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in wanted.items()}
    assert "in_blocks/attn/qkv/kernel" in kept and "mid_block/attn/qkv/kernel" in kept


def quick_shapes(kind):
    """Of the parameters of the whole network."""
    x, cond = jnp.zeros((1, 4, 4, 4)), {"label": jnp.zeros(1, int)}
    net = uvit(kind).build()
    found = jax.eval_shape(lambda: net.init(jax.random.key(0), x, jnp.ones(1), cond))
    return tree.flatten(found["params"])


def test_a_uvit_is_probed_after_its_middle_block_on_clean_latents_without_a_class():
    """Against the whole network; a flow's clean end is the network's time 1."""
    gen = np.random.default_rng(0)
    params = {
        k: jnp.asarray(gen.normal(0.1, 0.2, v.shape), jnp.float32)
        for k, v in quick_shapes(UViTConfig).items()
    }
    x = jnp.asarray(gen.normal(size=(3, 4, 4, 4)), jnp.float32)
    whole = {"params": tree.unflatten(params)}
    null = {"label": jnp.full(3, 2)}
    _, hidden = jax.jit(
        lambda: uvit().build().apply(whole, x, jnp.ones(3), null, return_hidden=3)
    )()

    cfg = make(**{"task.model": uvit(), "task.process": FLOW})
    task = cfg.task.build(cfg)
    kept = {k: v for k, v in params.items() if not re.fullmatch(task.unused_params, f"net/{k}")}
    head = {"kernel": jnp.eye(16, CLASSES), "bias": jnp.zeros(CLASSES)}
    stats = {"head": {"mean": jnp.zeros(16), "var": jnp.ones(16)}}
    norm = Normalisation(jnp.zeros(4), jnp.ones(4))
    given = Variables({"net": tree.unflatten(kept), "head": head}, stats, {"norm": norm})
    found = jax.jit(lambda: task.predict(given, {"latent": x}))()
    want = np.asarray(hidden).mean(1)[:, :CLASSES] / np.sqrt(1 + 1e-6)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, "init_from is not set, and a linear probe asks what a trained"),
        ({"microbatches": 2}, "batch statistics couple the examples of a batch"),
        ({"batch": 1}, "there are no statistics of one example"),
        ({"task.classes": 1}, "there are at least 2 to tell apart"),
        ({"task.label_smoothing": 1.0}, "a share below 1, published: 0.1"),
        ({"task.mixup": -1.0}, r"task\.mixup = -1\.0; it is >= 0"),
        ({"task.cutmix": float("nan")}, r"task\.cutmix = nan; it is >= 0"),
        ({"task.trainable": "net/.*"}, "which trains the head alone; set mode=finetune"),
        ({**FINETUNE, "task.trainable": "("}, r"task\.trainable = '\(' is no regular expression"),
        ({"task.model": uvit()}, "has to be told the time of clean latents"),
        ({"task.process": FLOW}, "a masked autoencoder knows no time"),
        ({"task.model": uvit(MDUViTConfig)}, "its features are those of the UViT in it"),
        (
            {"task.model": uvit(), "task.process": FLOW, "task.pool": Pool.cls},
            "a UViT has no class token",
        ),
        ({"data": None}, "data is no source of latents"),
        ({"mesh.spatial": 2}, "attention kernels refuse a sharded sequence"),
        ({"evals": [ValLossConfig()]}, "is for diffusion models, .* use AccuracyConfig"),
        ({"evals": [AccuracyConfig(data=online("test", "ae"))]}, "need the autoencoder of the run"),
        ({"evals": [AccuracyConfig(data=masks.images("test"))]}, "reads images, and this run"),
        ({"task.model": masks.model(patch=3)}, "not a multiple of patch = 3"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_the_whole_config_survives_json():
    for cfg in (make(), make(**{"task.model": uvit(), "task.process": FLOW}), make(**FINETUNE)):
        assert config.from_json(config.to_json(cfg)) == cfg
    assert make(**{"init_from": None, **FINETUNE}).init_from is None, "fine-tuned from scratch"
    assert make(evals=[AccuracyConfig(data=LatentDataConfig(split="test"))]).evals[0].top == (1,)
