"""The masking-diffusion task: each special case of its loss, its stages, what it refuses."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import config, flags, mask_recipes, masking
from dcae_jax.config import RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.diffusion.samplers import DPM2MConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.filled import FilledConfig
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.evals.masked import MaskedConfig
from dcae_jax.evals.reconstruct import ReconstructConfig
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.masking import MaskConfig, MaskKind, Rounding
from dcae_jax.models import md_uvit, transformer, uvit
from dcae_jax.models.layers import Dtype
from dcae_jax.models.md_uvit import Fill, Masked, MDUViTConfig
from dcae_jax.report import flops
from dcae_jax.tasks.base import Fills, Variables
from dcae_jax.tasks.diffuse import DiffuseConfig
from dcae_jax.tasks.latents import Normalisation
from dcae_jax.tasks.mask_diffuse import (
    MaskDiffuseConfig,
    Plan,
    RecTarget,
    RecWeight,
    StageConfig,
    unmasked,
)

FLOW = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
CARRY = dict(fill=Fill.carry, k_in=1, k_out=1, recon_head=False)
VISIBLE = dict(k_out=0, recon_head=False)
B, SHIFT, SCALE = 12, 0.5, 0.8


def at(ratio, **fields):
    """A mask that hides the same share throughout."""
    return MaskConfig(kind=MaskKind.constant, end=ratio, rounding=Rounding.exact, **fields)


def made(*stages, model=None, run=None, stages_=None, **task):
    """A tiny valid config; `model`, `run`, `task`: other fields."""
    size = dict(
        in_channels=4, input_size=(4, 4), num_classes=3, width=16, depth=4, heads=2,
        dtype=Dtype.float32,
    )  # fmt: skip
    cfg = RunConfig(
        name="tiny", steps=100, batch=B, data=LatentDataConfig(path="not read"),
        task=MaskDiffuseConfig(
            model=MDUViTConfig(**{**size, **(model or {})}),
            stages=list(stages) or [StageConfig()] if stages_ is None else stages_, **task,
        ),
    )  # fmt: skip
    for name, value in (run or {}).items():
        setattr(cfg, name, value)
    config.validate(config.resolve(cfg), 1)
    return cfg


class Says:
    """A network that says what it was told to, and remembers what it was asked."""

    def __init__(self, shape):
        g = np.random.default_rng(4)
        self.output, self.recon = g.normal(size=(2, *shape)).astype(np.float32)
        self.calls = []

    def apply(self, variables, x, time, cond, *, split=None, diffuse=True, reconstruct=True):
        self.calls.append((x, time, cond, split, diffuse, reconstruct))
        output = jnp.asarray(self.output[..., : x.shape[-1]])
        if split is None:
            return output
        return Masked(output if diffuse else None, jnp.asarray(self.recon) if reconstruct else None)


def scored(cfg, step=0):
    """(metrics, prepared examples, x0, the network) of a step."""
    task = cfg.task.build(cfg)
    shape = (B, *cfg.task.latent_shape)
    task.net = Says(shape)
    latent = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    batch = {"latent": jnp.asarray(latent), "label": jnp.arange(B, dtype=jnp.int32) % 3}
    inputs = task.prepare(jax.random.key(7), batch, jnp.int32(step), task.static(step))
    channels = cfg.task.model.in_channels
    norm = Normalisation(jnp.full(channels, SHIFT), jnp.full(channels, SCALE))
    loss = task._loss(Variables({"net": {}}, {}, {"norm": norm}), inputs, None)
    assert float(loss.terms["loss"]) == float(loss.metrics["loss"])
    return loss.metrics, inputs.examples, ((latent - SHIFT) * SCALE).astype(np.float64), task.net


def tokens(x, patch):
    """[b, tokens, numbers]; one loop for each index, as slow as it is plain."""
    b, height, width, _ = x.shape
    return np.array([
        [x[i, r : r + patch, k : k + patch].reshape(-1) for r in range(0, height, patch)
         for k in range(0, width, patch)]
        for i in range(b)
    ])  # fmt: skip


def alphas(cfg, t):
    """(alpha, sigma) at times of the process, in float64."""
    if cfg.task.process.kind is Kind.flow:
        return 1 - t, t
    beta = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    bar = np.concatenate([[1.0], np.cumprod(1 - beta)])[np.round(1000 * t).astype(int)]
    return np.sqrt(bar), np.sqrt(1 - bar)


def by_hand(cfg, examples, x0, net, channels=None):
    """(diffusion loss, reconstruction loss) after 8.4 of the report, example by example."""
    task = cfg.task
    t, eps = (np.asarray(examples[k], np.float64) for k in ("time", "noise"))
    alpha, sigma = alphas(cfg, t)
    x_t = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    n = x0.shape[1] * x0.shape[2] // task.model.patch**2
    keep = examples["split"].keep if "split" in examples else n
    order = np.asarray(examples["split"].order) if keep < n else np.tile(np.arange(n), (B, 1))
    target = x0 - eps if task.process.kind is Kind.flow else eps
    cut = slice(0, channels)
    wrong = tokens(((net.output - target) ** 2)[..., cut], task.model.patch)
    aim = tokens(x_t if task.rec_target is RecTarget.noised_whitened else x0, task.model.patch)
    if task.rec_target is not RecTarget.latent:
        aim = (aim - aim.mean(-1, keepdims=True)) / np.sqrt(
            aim.var(-1, ddof=1, keepdims=True) + 1e-6
        )
    missed = (tokens(net.recon, task.model.patch) - aim) ** 2
    noisy = t > 0
    u = alpha**2 if task.rec_weight is RecWeight.alpha_bar else np.ones(B)
    diffusion = reconstruction = 0.0
    for i in range(B):
        seen, hidden = order[i, :keep], order[i, keep:]
        if task.model.fill is Fill.carry:
            seen = np.arange(n)
        w = 1.0
        if task.process.min_snr:
            w = min(1.0, task.process.min_snr * sigma[i] ** 2 / alpha[i] ** 2) if noisy[i] else 0.0
        diffusion += noisy[i] * w * wrong[i, seen].mean()
        reconstruction += u[i] * missed[i, hidden].mean() if len(hidden) else 0.0
    return diffusion / max(1, noisy.sum()), reconstruction / u.sum()


LATENT = StageConfig(clean=1.0, diffusion=0.0, reconstruction=1.0, mask=at(0.75))
JOINT = StageConfig(clean=0.4, reconstruction=0.1, mask=at(0.5))
CASES = {
    "LMD": ([LATENT], {}),
    "MAE": ([LATENT], {"rec_target": RecTarget.whitened}),
    "diffusion": ([StageConfig()], {"model": VISIBLE}),
    "joint": ([JOINT], {}),
    "joint flow": ([JOINT], {"process": FLOW}),
    "joint patches": ([JOINT], {"model": {"input_size": (8, 8), "patch": 2}}),
    "MaskDiT": (
        [StageConfig(reconstruction=0.1, mask=at(0.5))],
        {"rec_weight": RecWeight.one, "rec_target": RecTarget.noised_whitened},
    ),
    "MaskDM": ([StageConfig(mask=at(0.75), block=2)], {"model": VISIBLE}),
    "MicroDiT": ([StageConfig(mask=at(0.75))], {"model": {**VISIBLE, "k_in": 1}}),
    "TREAD": ([StageConfig(mask=at(0.5))], {"model": CARRY}),
    "min-SNR": ([JOINT], {"process": ProcessConfig(min_snr=5.0)}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_each_method_is_what_its_formula_says(name):
    stages, fields = CASES[name]
    cfg = made(*stages, **fields)
    metrics, examples, x0, net = scored(cfg)
    diffusion, reconstruction = by_hand(cfg, examples, x0, net)
    stage = stages[0]
    total = 0.0
    for key, weight, value in (
        ("diffusion", stage.diffusion, diffusion),
        ("reconstruction", stage.reconstruction, reconstruction),
    ):
        assert (key in metrics) == (weight > 0), "what has no weight is not computed"
        if weight:
            np.testing.assert_allclose(metrics[key], value, rtol=2e-5)  # f32 sums
            total += weight * value
    np.testing.assert_allclose(metrics["loss"], total, rtol=2e-5)
    # What the network was asked: x_t at its own time, of which 0 (flow: 1) is clean.
    ((x, told, _, split, diffuse, reconstruct),) = net.calls
    alpha, sigma = alphas(cfg, np.asarray(examples["time"], np.float64))
    np.testing.assert_allclose(
        x, alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * examples["noise"],
        atol=1e-5,
    )  # fmt: skip
    t = np.asarray(examples["time"])
    np.testing.assert_allclose(told, 1 - t if name == "joint flow" else np.round(1000 * t))
    assert (diffuse, reconstruct) == (stage.diffusion > 0, stage.reconstruction > 0) or not split
    assert (t == 0).sum() == {"LMD": B, "MAE": B}.get(name, (t == 0).sum())
    if stage.clean < 1:
        assert 0 < (t == 0).sum() < B if stage.clean else (t > 0).all()
    np.testing.assert_allclose(metrics["clean"], (t == 0).mean() if stage.clean else 0, rtol=1e-6)
    keep = split.keep if split else 16
    np.testing.assert_allclose(metrics["mask_ratio"], 1 - keep / 16, rtol=1e-6)


def test_plain_diffusion_is_the_task_of_diffusion_bit_for_bit():
    """The same draws, the same loss, whatever else the network could do."""
    cfg = made(model=VISIBLE)
    metrics, examples, _, net = scored(cfg)
    task = DiffuseConfig(model=cfg.task.model)
    other = RunConfig(steps=1, batch=B, task=task, data=cfg.data)
    plain = task.build(config.resolve(other))
    plain.net = net
    latent = np.random.default_rng(3).normal(size=(B, 4, 4, 4)).astype(np.float32)
    batch = {"latent": jnp.asarray(latent), "label": jnp.arange(B, dtype=jnp.int32) % 3}
    inputs = plain.prepare(jax.random.key(7), batch, jnp.int32(0), ())
    for name, value in inputs.examples.items():
        np.testing.assert_array_equal(value, examples[name], err_msg=name)
    norm = Normalisation(jnp.full(4, SHIFT), jnp.full(4, SCALE))
    loss = plain._loss(Variables({"net": {}}, {}, {"norm": norm}), inputs, None)
    assert float(loss.metrics["loss"]) == float(metrics["loss"])


@pytest.mark.parametrize("always", [True, False])
def test_augmented_training_adds_the_loss_of_the_first_channels(always):
    cfg = made(
        JOINT, model={"adaptive_channels": True}, channel_weight=0.3 if always else 1.0,
        always_all=always,
        channel_counts=(1, 2, 3) if always else (1, 2, 4),
    )  # fmt: skip
    task = cfg.task.build(cfg)
    drawn = {task.static(k).channels: k for k in range(50)}
    assert set(drawn) == {*cfg.task.channel_counts}
    for channels, step in drawn.items():
        metrics, examples, x0, net = scored(cfg, step)
        less, reconstruction = by_hand(cfg, examples, x0, net, channels)
        full, _ = by_hand(cfg, examples, x0, net)
        expected = (full + 0.3 * less) if always else less
        np.testing.assert_allclose(metrics["loss"], expected + 0.1 * reconstruction, rtol=2e-5)
        assert [c[0].shape[-1] for c in net.calls] == [4, channels]
        assert [c[4:] for c in net.calls] == [(always, True), (True, False)]
        assert ("diffusion" in metrics) == (always or channels == 4)


def test_a_batch_without_a_noisy_example_is_no_division_by_zero():
    cfg = made(StageConfig(clean=0.999999, reconstruction=0.1, mask=at(0.5)))
    metrics, *_ = scored(cfg)
    assert metrics["diffusion"] == 0 and metrics["clean"] == pytest.approx(1)
    assert np.isfinite(metrics["loss"])


# --------------------------------------------------------------------------------------- schedule


def curriculum(steps=1000, **changes):
    cfg = config.resolve(flags.load("configs/md_uvit.py:h,f32,curriculum"))
    cfg.steps = steps
    for name, value in changes.items():
        setattr(cfg.task, name, value)
    config.validate(config.resolve(cfg), 1)
    return cfg


def test_the_curriculum_reconstructs_then_joins_then_unmasks():
    cfg = curriculum()
    task = cfg.task.build(cfg)
    assert str(task.static(0)) == "218 visible tokens, clean 1, reconstruction 1"
    assert task.static(149).keep == 64  # over its own steps: the ramp ends at two thirds of 150
    assert task.static(100).keep == 64 and task.static(74).keep in (96, 64)
    joint = Plan(256, 128, 0.1, 1.0, 0.1)
    assert {task.static(k) for k in range(150, 850)} == {joint}
    last = [task.static(k) for k in range(850, 1000)]
    assert str(last[0]) == "all 256 tokens, diffusion 1"
    rehearsals = [k for k, plan in enumerate(last) if plan.keep < 256]
    assert rehearsals == list(range(9, 150, 10))
    assert {last[k] for k in rehearsals} == {Plan(256, 128, 1.0, 0.0, 1.0)}
    assert cfg.optim.milestones == ((0.85, 0.5),)


def test_keys_are_given_once_in_the_order_of_need():
    cfg = curriculum(model=md_uvit.md_uvit_s(adaptive_channels=True), channel_counts=(8, 16))
    task = cfg.task.build(cfg)
    for first, last in ((0, 1000), (100, 900), (855, 870), (5, 5)):
        expected = list(dict.fromkeys(task.static(k) for k in range(first, last)))
        assert task.statics(first, last) == expected
    assert len({str(p) for p in task.statics(0, 1000)}) == len(task.statics(0, 1000))


def test_a_million_steps_are_planned_in_a_second():
    cfg = curriculum(1_000_000, model=md_uvit.md_uvit_s(adaptive_channels=True),
                     channel_counts=(8, 16))  # fmt: skip
    task = cfg.task.build(cfg)
    start = time.process_time()
    assert 8 < len(task.statics(0, 1_000_000)) < 20
    assert time.process_time() - start < 3  # measured: 0.5


def test_channels_are_drawn_by_seed_and_step_equally_often():
    found = {}
    for seed in (0, 1):
        cfg = made(model={"adaptive_channels": True, **VISIBLE}, channel_counts=(1, 2, 3),
                   run={"seed": seed, "steps": 30_000})  # fmt: skip
        rows = cfg.task.build(cfg)._schedule._rows(np.arange(30_000)).channels
        found[seed] = rows
        counts = np.bincount(rows)[1:]
        assert np.abs(counts - 10_000).max() < 5 * np.sqrt(30_000 * 2 / 9)  # five deviations
        follow = np.mean(rows[1:] == rows[:-1])
        assert abs(follow - 1 / 3) < 5 * np.sqrt(2 / 9 / 30_000)
    assert abs(np.mean(found[0] == found[1]) - 1 / 3) < 5 * np.sqrt(2 / 9 / 30_000)


def test_squares_are_masked_together():
    cfg = made(StageConfig(mask=at(0.75), block=2), model=VISIBLE)
    _, examples, *_ = scored(cfg)
    masked = np.asarray(examples["split"].masked()).reshape(B, 2, 2, 2, 2)
    assert (masked == masked[:, :, :1, :, :1]).all() and masked.mean() == 0.75


@pytest.mark.parametrize(("ratio", "keep"), [(0.9, 4), (0.6, 8), (0.1, 12)])
def test_squares_are_whole_and_each_position_is_visible_equally_often(ratio, keep):
    """1, 6 and 14 of 16 tokens, in squares of 4: to the nearest, neither none nor all of them."""
    cfg = made(StageConfig(mask=at(ratio), block=2), model=VISIBLE)
    task, draws = cfg.task.build(cfg), 4000
    assert task.static(0).keep == keep
    batch = {"latent": jnp.zeros((draws, 4, 4, 4)), "label": jnp.zeros(draws, jnp.int32)}
    examples = task.prepare(jax.random.key(5), batch, jnp.int32(0), task.static(0)).examples
    visible = ~np.asarray(examples["split"].masked()).reshape(draws, 2, 2, 2, 2)
    assert (visible == visible[:, :, :1, :, :1]).all()
    share = visible.reshape(draws, 16).mean(0)
    # Five standard deviations of so many draws.
    assert np.abs(share - keep / 16).max() < 5 * np.sqrt(keep / 16 * (1 - keep / 16) / draws)


def test_a_rehearsal_is_in_whole_squares_and_has_its_own_ratio():
    stage = StageConfig(rehearse_every=4, rehearse_ratio=0.85)  # the table of no mask is all tokens
    assert made(stage).task.build(made(stage)).static(3).keep == 2
    stage.block = 2
    assert made(stage).task.build(made(stage)).static(3).keep == 4


def forward(model, plan=None):
    """FLOPs of the network on one image of a plan, with the heads that the plan needs."""
    shape = jax.ShapeDtypeStruct
    x = shape((1, *model.input_size, model.in_channels), jnp.float32)
    net, variables = model.build(), transformer.abstract_variables(model)

    def run(v, x, t, label, order):
        if plan is None or plan.keep == plan.tokens:
            return net.apply(v, x, t, {"label": label})
        return net.apply(
            v, x, t, {"label": label}, split=masking.split(order, plan.keep),
            diffuse=plan.diffusion > 0, reconstruct=plan.reconstruction > 0,
        )  # fmt: skip

    ints = shape((1,), jnp.int32), shape((1, 256), jnp.int32)
    return flops.count(run, variables, x, shape((1,), jnp.float32), *ints).total


def test_the_curriculum_costs_three_fifths_of_plain_diffusion():
    cfg = curriculum(10_000)
    task, total = cfg.task.build(cfg), 0.0
    cost = {plan: forward(cfg.task.model, plan) for plan in task.statics(0, 10_000)}
    total = sum(cost[task.static(k)] for k in range(10_000)) / 10_000
    assert total / forward(uvit.uvit_h()) == pytest.approx(0.59, abs=0.005)


# ---------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", mask_recipes.RECIPES)
def test_every_recipe_is_a_valid_run(name):
    for latent in ("s,f32", "h,f32", "h,f64"):
        cfg = config.resolve(flags.load(f"configs/md_uvit.py:{latent},{name}"))
        config.validate(cfg)
        task = cfg.task.build(cfg)
        assert len(task.describe()) > len(cfg.task.stages)
        plans = task.statics(0, cfg.steps)
        assert len(plans) <= 10 and all(p.diffusion or p.reconstruction for p in plans)
        assert all(p.keep % p.block**2 == 0 for p in plans), "whole squares"
        if name not in ("lmd", "mae"):  # what is sampled has no mask
            final = [task.static(k) for k in range(cfg.steps - 5, cfg.steps)]
            assert final[0].keep == final[0].tokens or name == "tread"


def test_channels_of_latents_with_few_are_refused():
    cfg = config.resolve(flags.load("configs/md_uvit.py:h,f64,channels"))
    task = cfg.task.build(cfg)
    assert {p.channels for p in task.statics(0, 100)} == {16, 32, 64}
    assert flags.load("configs/md_uvit.py:s,f32,channels").task.channel_counts == (16,)
    with pytest.raises(UserError, match="more than 16 channels, and these have 4; use f32 or f64"):
        flags.load("configs/md_uvit.py:s,f8,channels")


def test_an_unknown_recipe_is_named():
    with pytest.raises(UserError, match=r"sizes are s, h, 2b, latents f32.* recipes channels, cu"):
        flags.load("configs/md_uvit.py:h,f32")


# ----------------------------------------------------------------------- reconstructions, features


def shaken(task):
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    g = np.random.default_rng(0)
    return Variables(
        jax.tree.map(lambda s: jnp.asarray(0.3 * g.normal(size=s.shape), jnp.float32), shapes),
        {}, {},
    )  # fmt: skip


def test_fill_keeps_what_is_visible_and_never_looks_at_the_rest():
    cfg = made(JOINT, model={"input_size": (8, 8), "patch": 2})
    task = cfg.task.build(cfg)
    assert isinstance(task, Fills) and task.grid() == (4, 4)
    variables, g = shaken(task), np.random.default_rng(2)
    x, other = (jnp.asarray(g.normal(size=(2, 8, 8, 4)), jnp.float32) for _ in range(2))
    order = jnp.asarray(np.stack([g.permutation(16) for _ in range(2)]))
    hidden = np.asarray(masking.split(order, 5).masked()).reshape(2, 4, 1, 4, 1, 1)
    hidden = np.broadcast_to(hidden, (2, 4, 2, 4, 2, 4)).reshape(2, 8, 8, 4)
    label = jnp.zeros(2, jnp.int32)
    fill = jax.jit(lambda x, label: task.fill(variables, x, order, 5, label))
    found = np.asarray(fill(x, label))
    np.testing.assert_array_equal(found[~hidden], np.asarray(x)[~hidden])
    again = fill(jnp.where(hidden, other, x), label)
    np.testing.assert_array_equal(again, found)
    assert np.abs(fill(x, label + 1) - found)[hidden].min() > 0
    split = masking.split(order, 5)
    said = jax.jit(lambda x: task.net.apply(
        {"params": variables.params["net"]}, x, jnp.zeros(2), {"label": label}, split=split
    ))(x)  # fmt: skip
    np.testing.assert_allclose(found[hidden], np.asarray(said.recon)[hidden], atol=1e-5)
    np.testing.assert_array_equal(task.fill(variables, x, order, 16, label), x)


def test_networks_that_cannot_fill_in_say_so():
    x, order, label = jnp.zeros((1, 4, 4, 4)), jnp.arange(16)[None], jnp.zeros(1, jnp.int32)
    for cfg, said in (
        (made(model=VISIBLE), "has no reconstruction head"),
        (made(LATENT, rec_target=RecTarget.whitened), "whitened, which cannot be decoded"),
    ):
        task = cfg.task.build(cfg)
        with pytest.raises(UserError, match=said):
            task.fill(Variables({}, {}, {}), x, order, 4, label)


# --------------------------------------------------------------------------------------- mistakes

WHOLE = dict(mask=unmasked(), clean=1.0, diffusion=0.0, reconstruction=1.0)
DRAWS = GenerateConfig(sampler=DPM2MConfig(), guidance=GuidanceConfig())
MISTAKES = {
    "nothing": (lambda: made(StageConfig(diffusion=0.0)), "both 0: there is nothing to learn"),
    "no stage": (lambda: made(stages_=[]), "task.stages is empty; one StageConfig"),
    "all clean": (
        lambda: made(StageConfig(clean=1.0, reconstruction=1.0, mask=at(0.5))),
        "diffusion = 1, but clean = 1: no example has noise",
    ),
    "idle": (lambda: made(StageConfig(clean=0.1)), "clean examples would teach nothing"),
    "no mask": (lambda: made(StageConfig(**WHOLE)), r"without a masked token at all of its steps"),
    "no mask at first": (
        lambda: made(StageConfig(**{**WHOLE, "mask": MaskConfig(start=0.0)})),
        r"stages\[0\]: reconstruction = 1 without a masked token at some of its steps",
    ),
    "no head": (lambda: made(JOINT, model=VISIBLE), "needs task.model.recon_head=True"),
    "no head to rehearse": (
        lambda: made(StageConfig(rehearse_every=5), model=VISIBLE), "rehearse_every needs task.mo"
    ),
    "carried": (lambda: made(JOINT, model=CARRY), "fill = carry: the network knows the tokens"),
    "end": (lambda: made(StageConfig(until=0.9)), "end at 0.9 of the steps; rising shares"),
    "order": (
        lambda: made(StageConfig(until=0.5), StageConfig(until=0.5), StageConfig()),
        "end at 0.5, 0.5, 1 of the steps",
    ),
    "no step": (
        lambda: made(StageConfig(until=0.001), StageConfig(until=0.002), StageConfig()),
        r"stages\[1\]: ends at 0.002 of 100 steps and has none",
    ),
    "clean": (lambda: made(StageConfig(clean=1.5)), "clean = 1.5; a probability"),
    "weight": (lambda: made(StageConfig(diffusion=-1.0)), "diffusion = -1.0; a weight"),
    "every": (lambda: made(StageConfig(rehearse_every=1)), "rehearse_every = 1; 0 is never"),
    "ratio": (
        lambda: made(StageConfig(rehearse_every=5, rehearse_ratio=1.0)), "rehearse_ratio = 1.0"
    ),
    "all rehearsed": (
        lambda: made(StageConfig(rehearse_every=5, rehearse_ratio=0.99, mask=at(0.5))),
        r"stages\[0\]: rehearse_ratio = 0.99 leaves none of 16 tokens visible; at most 0.937",
    ),
    "block": (lambda: made(StageConfig(block=0)), "block = 0; 1 masks single"),
    "large block": (lambda: made(StageConfig(block=5)), "block = 5, but there are 4 x 4 tokens"),
    "one block": (
        lambda: made(StageConfig(block=4)), "two or more whole squares of that side; 1, 2 are poss"
    ),
    "cut block": (lambda: made(StageConfig(block=3)), "block = 3, but there are 4 x 4 tokens"),
    "all masked": (lambda: made(StageConfig(mask=at(0.99))), "leaves none of 16 tokens visible"),
    "start": (lambda: made(StageConfig(mask=MaskConfig(start=1.0))), "mask.start = 1.0; a share"),
    "one number": (
        lambda: made(LATENT, rec_target=RecTarget.whitened, model={"in_channels": 1}),
        "tokens that are one number has no deviation",
    ),
    "variance": (
        lambda: made(process=ProcessConfig(kind=Kind.ddpm, learn_variance=True)),
        "learn_variance = True, but an MD-UViT gives no variance",
    ),
    "channels": (
        lambda: made(channel_counts=(4,), model={"adaptive_channels": True}),
        r"channel_counts = \(4,\); different numbers from 1 to 3",
    ),
    "many channels": (
        lambda: made(channel_counts=(4, 5), model={"adaptive_channels": True}, always_all=False),
        "different numbers from 1 to 4",
    ),
    "never all": (
        lambda: made(channel_counts=(2,), model={"adaptive_channels": True}, always_all=False),
        "never trains all 4 channels, which are sampled",
    ),
    "fixed channels": (
        lambda: made(channel_counts=(2,)), "needs task.model.adaptive_channels=True and patch=1"
    ),
    "no weight": (
        lambda: made(channel_counts=(2,), channel_weight=0.0, model={"adaptive_channels": True}),
        "channel_weight = 0.0",
    ),
    "weight of nothing": (
        lambda: made(
            channel_counts=(2, 4), channel_weight=0.5, always_all=False,
            model={"adaptive_channels": True},
        ),
        "channel_weight = 0.5 weighs what is added .* always_all=False nothing is added; set it to",
    ),
    "channels of nothing": (
        lambda: made(LATENT, channel_counts=(2,), model={"adaptive_channels": True}),
        "is for the diffusion loss, and no stage has one",
    ),
    "samples": (
        lambda: made(LATENT, run={"evals": [DRAWS]}), "samples is for diffusion models, and no sta"
    ),
    "validation": (
        lambda: made(LATENT, run={"evals": [ValLossConfig()]}), "is for diffusion models, and no s"
    ),
    "masked": (
        lambda: made(model=VISIBLE, run={"evals": [MaskedConfig()]}),
        "asks for masked tokens: this network has no reconstruction head",
    ),
    "filled": (
        lambda: made(model=VISIBLE, run={"evals": [FilledConfig()]}),
        "asks for masked tokens, filled in and decoded: this network has no reconstruction head",
    ),
    "whitened": (
        lambda: made(LATENT, rec_target=RecTarget.whitened, run={"evals": [FilledConfig()]}),
        "filled in and decoded: this network was trained on rec_target = whitened",
    ),
    "head that nothing trains": (
        lambda: made(run={"evals": [MaskedConfig()]}),
        "asks for masked tokens: no stage trains this network's head",
    ),
    "reconstructed": (
        lambda: made(run={"evals": [ReconstructConfig()]}), "asks for an autoencoder's reconstru"
    ),
    "label": (lambda: made(label_dropout=1.0), "label_dropout = 1.0; a probability below 1"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_the_config_of_masked_diffusion(make, said):
    """Each is one sentence with its mend, before anything is read or compiled."""
    with pytest.raises(UserError, match=said):
        make()
