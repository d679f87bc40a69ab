"""optim.py: the learning rate against closed forms, and AdamW against an independent one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcae_jax import optim, tree
from dcae_jax.config import GroupConfig, OptimConfig, Optimizer, Schedule
from dcae_jax.models import lmd
from dcae_jax.models.lmd import LMDConfig

STEPS = 110
# One float32 rounding of each of the few operations that make up a rate.
RATE = 1e-6


def rate(step, **fields):
    return float(optim.learning_rate(OptimConfig(lr=2e-3, **fields), STEPS, step))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # Constant from the first step on.
        ({}, {0: 2e-3, 57: 2e-3, 109: 2e-3}),
        # Warm-up: step k has (k + 1) / 10 of it, so the first step moves and the tenth is full.
        ({"warmup_steps": 10}, {0: 2e-4, 4: 1e-3, 9: 2e-3, 109: 2e-3}),
        # from 0.5 to 1: 0.5 + 0.5 (k + 1) / 10.
        ({"warmup_steps": 10, "warmup_from": 0.5}, {0: 1.1e-3, 4: 1.5e-3, 9: 2e-3}),
        # Cosine over the 100 steps behind the warm-up, down to 0.1: half way at step 60.
        (
            {"warmup_steps": 10, "schedule": Schedule.cosine, "end_lr": 0.1},
            {10: 2e-3, 60: 2e-3 * 0.55, 85: 2e-3 * (0.1 + 0.45 * (1 + math.cos(0.75 * math.pi))),
             110: 2e-4, 500: 2e-4},
        ),
        ({"schedule": Schedule.linear, "end_lr": 0.2}, {0: 2e-3, 55: 2e-3 * 0.6, 110: 4e-4}),
        # A late start: nothing before, then warm-up and decay are counted from there.
        (
            {"start_step": 50, "warmup_steps": 10, "schedule": Schedule.linear},
            {0: 0.0, 49: 0.0, 50: 2e-4, 59: 2e-3, 85: 1e-3, 110: 0.0},
        ),
        # Milestones at steps 55 and 99 (0.9 * 110) of 110; each factor replaces the one before.
        ({"milestones": ((0.5, 0.5), (0.9, 0.1))},
         {0: 2e-3, 54: 2e-3, 55: 1e-3, 98: 1e-3, 99: 2e-4, 109: 2e-4}),
        # Of all steps, a late start or not, and on top of the schedule.
        (
            {"start_step": 10, "schedule": Schedule.linear, "milestones": ((0.5, 0.5),)},
            {54: 2e-3 * 0.56, 55: 1e-3 * 0.55, 109: 1e-3 * 0.01},
        ),
    ],
)  # fmt: skip
def test_learning_rate_at_chosen_steps(fields, expected):
    for step, value in expected.items():
        assert rate(step, **fields) == pytest.approx(value, rel=RATE, abs=1e-12), step


def test_a_milestone_falls_on_the_step_that_its_share_names():
    # As products of floats 0.07 * 100 and 0.55 * 100 lie a little above 7 and 55.
    assert [optim.first_step(s, 100) for s in (0.07, 0.55, 0.85)] == [7, 55, 85]
    assert optim.first_step(0.5, 7) == 4  # 3.5: the first step behind it


def test_learning_rate_is_the_same_traced():
    cfg = OptimConfig(
        lr=1e-3, warmup_steps=7, schedule=Schedule.cosine, milestones=((0.5, 0.3),)
    )  # fmt: skip
    traced = jax.jit(lambda k: optim.learning_rate(cfg, STEPS, k))
    for step in (0, 6, 7, 50, 55, 109):
        assert float(traced(step)) == pytest.approx(
            float(optim.learning_rate(cfg, STEPS, step)), rel=RATE
        )


GROUPS = [GroupConfig("bias$", lr=2.0, weight_decay=0.0), GroupConfig("conv", lr=0.5)]


def test_groups_the_first_match_counts():
    cfg = OptimConfig(lr=1e-3, weight_decay=0.1, groups=GROUPS)
    assert optim.group_of(cfg, "ae/conv/bias") == ("bias$", 2.0, 0.0)
    assert optim.group_of(cfg, "ae/conv/kernel") == ("conv", 0.5, 1.0)
    assert optim.group_of(cfg, "ae/head/kernel") == ("(default)", 1.0, 1.0)
    rows = optim.table(cfg, params())
    assert sorted(rows) == [
        ("(default)", 12, 1e-3, 0.1), ("bias$", 3, 2e-3, 0.0), ("conv", 6, 5e-4, 0.1)
    ]  # fmt: skip


def test_the_default_decays_neither_biases_nor_scales():
    cfg = OptimConfig(weight_decay=0.1)
    decay = {path: optim.group_of(cfg, path)[2] for path in ("a/bias", "a/scale", "a/kernel")}
    assert decay == {"a/bias": 0.0, "a/scale": 0.0, "a/kernel": 1.0}


def params():
    gen = np.random.default_rng(0)
    shapes = {"ae/conv/bias": (3,), "ae/conv/kernel": (2, 3), "ae/head/kernel": (3, 4)}
    flat = {k: gen.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return tree.unflatten(flat)


def gradients(k, scale):
    gen = np.random.default_rng([1, k])
    return {p: scale * gen.normal(size=x.shape) for p, x in tree.flatten(params()).items()}


def numpy_adamw(steps, scale, *, lr, b1, b2, eps, decay, clip, multipliers):
    """Loshchilov and Hutter's AdamW (arXiv 1711.05101, algorithm 2) in float64, with clipping."""
    p = {k: x.astype(np.float64) for k, x in tree.flatten(params()).items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t in range(1, steps + 1):
        grads = gradients(t, scale)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        shrink = min(1.0, clip / norm) if clip else 1.0
        for k, g in grads.items():
            g = g * shrink
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            step = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            times_lr, times_decay = multipliers[k]
            p[k] = p[k] - lr * times_lr * (step + decay * times_decay * p[k])
    return p


@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_six_steps_of_adamw_against_numpy(clip, decay):
    lr, scale, steps = 0.05, 0.4, 6  # gradient norms of about 1.8, so that 0.7 clips each of them
    cfg = OptimConfig(
        lr=lr, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=decay, clip_norm=clip, groups=GROUPS
    )
    expected = numpy_adamw(
        steps, scale, lr=lr, b1=0.8, b2=0.95, eps=1e-3, decay=decay, clip=clip,
        multipliers=MULTIPLIERS,
    )  # fmt: skip
    for path, found in tree.flatten(trained(cfg, steps, scale)).items():
        # float32 against float64: a few roundings of 6e-8 in each of six steps.
        np.testing.assert_allclose(found, expected[path], rtol=3e-6, atol=1e-6, err_msg=path)


MULTIPLIERS = {"ae/conv/bias": (2.0, 0.0), "ae/conv/kernel": (0.5, 1.0), "ae/head/kernel": (1, 1)}


def trained(cfg, steps, scale):
    """`params` after so many steps on `gradients`."""
    current = jax.tree.map(jnp.asarray, params())
    tx = optim.make(cfg, current)
    state = tx.init(current)
    for t in range(1, steps + 1):
        grads = tree.unflatten(
            {k: jnp.asarray(g, jnp.float32) for k, g in gradients(t, scale).items()}
        )
        rate = optim.learning_rate(cfg, steps, t - 1)
        updates, state = tx.update(grads, state, current, learning_rate=rate)
        current = optax.apply_updates(current, updates)
    return current


def numpy_adan(steps, scale, *, lr, b1, b2, b3, eps, decay, clip, multipliers):
    """Xie et al.'s Adan (arXiv 2208.06677) as its authors run it, in float64: proximal decay."""
    p = {k: x.astype(np.float64) for k, x in tree.flatten(params()).items()}
    m, v, n = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(3))
    last = {}
    for t in range(1, steps + 1):
        grads = gradients(t, scale)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        shrink = min(1.0, clip / (norm + eps)) if clip else 1.0
        for k, g in grads.items():
            g = g * shrink
            d = g - last.get(k, g)
            last[k] = g
            m[k] += (1 - b1) * (g - m[k])
            v[k] += (1 - b2) * (d - v[k])
            n[k] += (1 - b3) * ((g + b2 * d) ** 2 - n[k])
            top = m[k] / (1 - b1**t) + b2 * v[k] / (1 - b2**t)
            step = top / (np.sqrt(n[k]) / np.sqrt(1 - b3**t) + eps)
            rate, weight = lr * multipliers[k][0], decay * multipliers[k][1]
            p[k] = (p[k] - rate * step) / (1 + rate * weight)
    return p


ADAN = dict(beta1=0.98, beta2=0.92, beta3=0.99)


@pytest.mark.parametrize(("clip", "decay"), [(0.0, 0.0), (0.7, 5.0)])
def test_six_steps_of_adan_against_numpy(clip, decay):
    lr, scale, steps = 0.05, 0.4, 6
    cfg = OptimConfig(
        Optimizer.adan, lr=lr, **ADAN, eps=1e-8, weight_decay=decay, clip_norm=clip, groups=GROUPS
    )
    expected = numpy_adan(
        steps, scale, lr=lr, b1=0.98, b2=0.92, b3=0.99, eps=1e-8, decay=decay, clip=clip,
        multipliers=MULTIPLIERS,
    )  # fmt: skip
    for path, found in tree.flatten(trained(cfg, steps, scale)).items():
        # float32 against float64: 1 - 0.99**t of the correction has lost 2 of its 7 digits; the
        # eps of the original's clipping (1e-8 of a norm of 1.8) lies below that.
        np.testing.assert_allclose(found, expected[path], rtol=3e-5, atol=3e-6, err_msg=path)


def test_adan_takes_the_steps_of_the_paper_and_not_those_of_optax():
    """Gradients 1, 0.4, -0.3: steps by hand in numbers, and those of optax 0.2.8."""

    def steps(tx):
        state, found = tx.init(jnp.zeros(())), []
        for g in (1.0, 0.4, -0.3):
            update, state = tx.update(jnp.float32(g), state, jnp.zeros(()))
            found.append(float(update))
        return found

    ours = steps(optim.scale_by_adan(0.98, 0.92, 0.99, 1e-8))
    assert ours == pytest.approx([1.0, 0.574, -0.073], abs=5e-4)  # given to three digits
    theirs = steps(optax.scale_by_adan(b1=0.98, b2=0.92, b3=0.99, eps=1e-8))
    assert theirs == pytest.approx([1.0, 0.898, 0.500], abs=5e-4)


def test_the_state_of_adamw_is_that_of_older_checkpoints():
    """Names of its leaves: a checkpoint is restored by them."""
    state = optim.make(OptimConfig(), params()).init(params())
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    moments = [f"1/{m}/{path}" for m in ("mu", "nu") for path in tree.flatten(params())]
    assert sorted(names) == sorted(["1/count", *moments])


def test_optimizer_state_exists_for_the_trainable_partition_only():
    trainable, _ = tree.partition(params(), ".*/head/.*")
    state = optim.make(OptimConfig(), trainable).init(trainable)
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sorted(x.shape for x in arrays) == [(3, 4), (3, 4)]  # both moments of the one kernel


def stack(layers=3):
    gen = np.random.default_rng(5)
    shapes = {"net/blocks/fc/kernel": (layers, 2, 4), "net/blocks/fc/bias": (layers, 4)}
    return tree.unflatten({k: jnp.asarray(gen.normal(size=s), "f4") for k, s in shapes.items()})


def test_groups_of_single_layers_of_a_stack():
    """Each layer moves as a leaf of its own does under its group; AdamW and Adan."""
    groups = [GroupConfig("bias$", 2.0, 0.0), GroupConfig("blocks/1/", 0.5, 3.0)]
    for extra in ({}, {"optimizer": Optimizer.adan, **ADAN}):
        cfg = OptimConfig(lr=0.1, weight_decay=0.2, groups=groups, **extra)
        grads = jax.tree.map(lambda p: jnp.cos(3 * p), stack())

        def moves(cfg, params, grads):
            tx = optim.make(cfg, params)
            return tx.update(grads, tx.init(params), params, learning_rate=jnp.float32(0.1))[0]

        found = tree.flatten(moves(cfg, stack(), grads))
        for path, leaf in tree.flatten(stack()).items():
            for i in range(3):
                _, lr, decay = optim.group_of(cfg, path.replace("blocks", f"blocks/{i}"))
                plain = OptimConfig(
                    lr=0.1, weight_decay=0.2, groups=[GroupConfig("", lr, decay)], **extra
                )
                one = moves(plain, {"x": leaf[i]}, {"x": tree.flatten(grads)[path][i]})
                # The same formula in other shapes: float32 roundings of terms of up to 0.2.
                np.testing.assert_allclose(found[path][i], one["x"], rtol=1e-6, atol=3e-8)
        rows = {name: rest for name, *rest in optim.table(cfg, stack())}
        assert rows["bias$"][0] == 12 and rows["blocks/1/"] == [8, 0.05, pytest.approx(0.6)]
        assert rows["(default)"] == [16, 0.1, 0.2]


def test_layers_that_agree_have_one_number():
    """So that the compiled step is that of runs without groups of single layers."""
    cfg = OptimConfig(groups=[GroupConfig("bias$", 1.0, 0.0), GroupConfig("blocks/[0-9]", 0.5)])
    found = tree.flatten(optim._multipliers(cfg, stack(), 1))
    assert found == {"net/blocks/fc/bias": 1.0, "net/blocks/fc/kernel": 0.5}


def test_frozen_layers_are_a_row_of_the_table():
    rows = optim.table(OptimConfig(), stack(), "net/blocks/2/.*")
    assert sorted(rows) == [
        ("(default)", 8, 1e-4, 0.0), ("(frozen layers)", 24, 0.0, 0.0),
        ("/(bias|scale)$", 4, 1e-4, 0.0),
    ]  # fmt: skip


def test_layer_decay_of_a_stacked_encoder():
    """decay^(depth + 1 - id), as BEiT: id 0 the embedding, i + 1 block i, depth + 1 the rest."""
    depth, decay = 3, 0.65
    model = LMDConfig(
        in_channels=4, input_size=(4, 4), patch=1, width=8, depth=depth, heads=2, decoder_width=8,
        decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    variables = jax.eval_shape(lambda: lmd.init_variables(model, jax.random.key(0)))["params"]
    params = {"net": {"encoder": variables["encoder"]}, "head": {"kernel": jnp.ones((8, 2))}}
    cfg = OptimConfig(groups=optim.layer_decay_groups(depth, decay))
    rates, decays = (tree.flatten(optim._multipliers(cfg, params, i)) for i in (1, 2))
    for path in rates:
        name = path.split("/")
        if "blocks" in name:
            rate = [decay**3, decay**2, decay]
        else:
            rate = [decay**4] if name[2:3] in (["patch_embed"], ["cls"]) else [1.0]
        np.testing.assert_allclose(np.ravel(rates[path]), rate, rtol=1e-7, err_msg=path)
        plain = name[-1] in ("bias", "scale", "cls")
        assert decays[path] == (0.0 if plain else 1.0), path
    assert len([p for p in rates if "blocks" in p]) == 12 and "net/encoder/cls" in rates
