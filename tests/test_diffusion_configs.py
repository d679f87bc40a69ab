"""Configs of diffusion: what was published is in them, and --dry_run says what a run costs."""

import math
import pathlib
import re

import pytest

from dcae_jax import config, diffusion_recipes, flags, inspect
from dcae_jax.diffusion.process import Kind, Space, TimeDraw
from dcae_jax.diffusion.samplers import AncestralConfig, Dopri5Config, DPMFastConfig
from dcae_jax.errors import UserError
from dcae_jax.models import dit, uvit
from dcae_jax.models.transformer import MLPKind
from dcae_jax.tasks.latents import LatentNorm

# Forward GFLOP of an image of 512 px, 2 for each multiply-add: closed forms, and counted in
# PyTorch; f8 in patches of 2, the others of 1.
LATENTS = ("f8", "f32", "f64", "f128")
TABLE = {
    "uvit_s": (118.4, 24.5, 5.95, 1.61), "uvit_l": (675.9, 152.9, 38.1, 10.3),
    "uvit_h": (1164.7, 266.4, 66.5, 18.0), "uvit_2b": (3486, 829.6, 209.3, 56.9),
    "dit_xl": (1049, 237.3, 58.1, 14.8),
}  # fmt: skip
ROWS = [(net, latent) for net in TABLE for latent in LATENTS]
QUICK = [("uvit_h", "f64"), ("dit_xl", "f32")]
LINE = re.compile(r"FLOPs per image: forward ([\d.,]+) GFLOP, training step ([\d.,]+) GFLOP(.*)")


def load(name, arg):
    return config.resolve(flags.load(f"configs/{name}.py:{arg}"))


def numbers(text):
    """(forward, training step, the rest of the line)."""
    forward, step, rest = LINE.search(text).groups()
    return float(forward.replace(",", "")), float(step.replace(",", "")), rest


@pytest.mark.parametrize(
    ("net", "latent"),
    [row if row in QUICK else pytest.param(*row, marks=pytest.mark.slow) for row in ROWS],
)
def test_dry_run_reports_the_flops_of_the_table_within_2_percent(net, latent, capsys):
    """Full-size models, without data, weights or compiling."""
    family, _ = net.split("_")
    cfg = load(f"paper_{family}", f"{'xl' if family == 'dit' else 'h'},f32")
    sizes = uvit if family == "uvit" else dit
    cfg.task.model = vars(sizes)[net](**diffusion_recipes.MODERN_LATENTS[latent])
    assert inspect.dry_run(config.resolve(cfg)) == 0
    text = capsys.readouterr().out
    forward, step, rest = numbers(text)
    expected = TABLE[net][LATENTS.index(latent)]
    assert forward == pytest.approx(expected, rel=0.02)
    assert step == pytest.approx(3 * expected, rel=0.02)  # forward, and twice that backward
    assert "1 multiply-add = 2 FLOP" in rest and "but not" not in rest
    tokens = {"f8": 1024, "f32": 256, "f64": 64, "f128": 16}[latent]
    extra = " + 2" if family == "uvit" else ""
    for said in (
        f"{tokens}{extra} tokens",
        "no cache at",
        "mesh: data",
        "label_embed",
        "optimizer",
    ):
        assert said in text, said


def test_dry_run_of_online_encoding_counts_the_frozen_encoder_once(capsys):
    """Of a release, without its weights: the encoder's forward (spec: 2105 GFLOP) and no more."""
    cfg = load("modern_usit", "s,f64,online")
    assert inspect.dry_run(cfg) == 0
    text = capsys.readouterr().out
    forward, step, rest = numbers(text)
    encoder = float(re.search(r"of each the frozen encoder ([\d.,]+)", rest)[1].replace(",", ""))
    assert encoder == pytest.approx(2105, rel=0.02)
    assert step - encoder == pytest.approx(3 * (forward - encoder), rel=0.01)
    assert "512 px, encoded in the step to 8 x 8 x 128" in text


def test_dry_run_of_online_encoding_with_an_autoencoder_of_ones_own(capsys):
    """A folder (or a workdir) is read for its config; another latent than asked for is refused."""
    cfg = load("modern_usit", "s,f32,online")
    cfg.data.autoencoder = str(pathlib.Path(__file__).parent / "convert" / "files" / "dc")
    with pytest.raises(UserError, match=r"latents \(128, 128, 4\) of 512 px, but the network"):
        inspect.dry_run(cfg)
    cfg.data.images.resolution = 32
    cfg.task.model.in_channels, cfg.task.model.input_size = 4, (8, 8)
    cfg.data.shape = (8, 8, 4)
    assert inspect.dry_run(cfg) == 0
    assert "32 px, encoded in the step to 8 x 8 x 4" in capsys.readouterr().out


# (config, argument): batch, lr, weight decay, betas, warm-up, steps, guidance, sampler, process.
BETAS = (0.99, 0.99)
UVIT = (1024, 2e-4, 0.03, BETAS, 5000, 500_000, 1.5, DPMFastConfig(steps=30), Kind.scaled_linear)
USIT = (1024, 1e-4, 0, BETAS, 5000, 500_000, 1.2, Dopri5Config(rtol=1e-3, atol=1e-6), Kind.flow)
DIT = (256, 1e-4, 0, (0.9, 0.999), 0, 3_000_000, 1.3, AncestralConfig(steps=250), Kind.ddpm)
PUBLISHED = {
    **{("paper_uvit", f"{s},{z}"): UVIT for s in ("s", "h", "2b") for z in ("f8", "f32", "f64")},
    ("paper_usit", "h,f32"): USIT, ("paper_usit", "2b,f32"): (*USIT[:6], 1.15, *USIT[7:]),
    ("paper_dit", "xl,f32"): DIT, ("paper_dit", "xl,f8"): (*DIT[:6], 1.5, *DIT[7:]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "arg"), PUBLISHED)
def test_published_recipes_have_the_published_numbers(name, arg):
    cfg = load(name, arg)
    o, task, shown = cfg.optim, cfg.task, cfg.evals[1]
    assert (
        cfg.batch, o.lr, o.weight_decay, (o.beta1, o.beta2), o.warmup_steps, cfg.steps,
        shown.guidance.scale, shown.sampler, task.process.kind,
    ) == PUBLISHED[name, arg]  # fmt: skip
    # What all have in common; the decay is of all parameters, so there are no groups.
    assert (o.schedule.value, o.clip_norm, o.eps, o.groups) == ("constant", 0, 1e-8, [])
    assert (cfg.ema.decays, cfg.ema.warmup_steps) == ((0.9999,), 2000)
    assert (task.label_dropout, task.latent_norm, cfg.data.flip) == (0.1, LatentNorm.scalar, False)
    assert (shown.guidance.start, shown.guidance.stop, shown.guidance.channels) == (0, 1, 0)
    p = task.process
    assert (p.times, p.shift, p.min_snr) == (TimeDraw.uniform, 1, 0)
    assert p.predict is p.loss_space is (Space.v if p.is_flow else Space.eps)
    assert p.learn_variance == (name == "paper_dit")


@pytest.mark.parametrize(
    ("name", "arg", "dimension"),
    [("modern_dit", "xl,f32", 8192), ("modern_dit", "s,f8", 16384), ("modern_usit", "h,f64", 8192),
     ("modern_usit", "2b,f128", 8192), ("modern_dit", "b,f64,online", 8192)],
)  # fmt: skip
def test_modern_recipes_are_what_their_headers_say(name, arg, dimension):
    cfg = load(name, arg)
    config.validate(cfg)
    model, p, shown = cfg.task.model, cfg.task.process, cfg.evals[1]
    assert math.prod(cfg.data.shape) == dimension and p.shift == math.sqrt(dimension / 4096)
    assert (p.kind, p.predict, p.loss_space, p.times) == (
        Kind.flow, Space.v, Space.v, TimeDraw.logit_normal,
    )  # fmt: skip
    assert model.qk_norm and model.mlp is MLPKind.swiglu
    assert (shown.guidance.start, shown.guidance.stop) == (0.2, 0.75)
    assert cfg.ema.decays == (0.9999,) and cfg.optim.clip_norm == 1
    online = arg.endswith("online")
    assert cfg.task.latent_norm is (LatentNorm.scalar if online else LatentNorm.channel)
    if name == "modern_dit":
        assert model.position is dit.Position.rope and not model.learn_variance
    if online:
        assert cfg.evals[0].data.images.source is cfg.data.images.source
        assert cfg.data.images.flip and not cfg.evals[0].data.images.flip


@pytest.mark.parametrize("arg", ["xl", "xxl,f32", "xl,f16", "xl,f32,offline", "xl,online"])
def test_unknown_sizes_and_latents_are_refused(arg):
    with pytest.raises(Exception, match="sizes are s, b, l, xl, latents f32, f64, f8"):
        load("modern_dit", arg)
