"""FLOPs of the released autoencoders against the closed forms of the literature's tables."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dcae_jax import recipes, step
from dcae_jax.models import dcae
from dcae_jax.models.layers import Depthwise
from dcae_jax.report import flops
from dcae_jax.tasks.base import Variables

# GFLOP per image, counted on PyTorch's models and by hand (equal to 4 digits).
GOLDEN = {
    dcae.dc_ae_f32c32_in: {256: (521.4, 692.4), 512: (2085.5, 2769.5)},
    dcae.dc_ae_f64c128_in: {256: (526.3, 699.1), 512: (2105.3, 2796.5)},
    dcae.dc_ae_f128c512_in: {256: (527.7, 701.4), 512: (2110.8, 2805.7)},
    dcae.dc_ae_f32c32_sana: {256: (323.7, 523.0), 512: (1294.9, 2092.2)},
}
CASES = [(variant, size) for variant, sizes in GOLDEN.items() for size in sizes]


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch):
    """On a CPU the first convolution takes a form that multiplies zeros: 0.1 % more FLOPs."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@functools.cache
def _model(variant):
    cfg = variant()
    cfg.depthwise = Depthwise.lax
    return cfg.build(), dcae.abstract_variables(cfg), cfg


@pytest.mark.parametrize("variant,size", CASES, ids=lambda v: getattr(v, "__name__", v))
def test_encode_and_decode(variant, size: int) -> None:
    model, variables, cfg = _model(variant)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    latent = jax.ShapeDtypeStruct((1, *cfg.latent_shape(size, size)), jnp.float32)
    encode = flops.count(functools.partial(model.apply, method="encode"), variables, image)
    decode = flops.count(functools.partial(model.apply, method="decode"), variables, latent)
    assert encode.incomplete == decode.incomplete == ()
    # The golden numbers have four digits: half of the last one is 1.6e-4 of the smallest.
    assert encode.total / 1e9 == pytest.approx(GOLDEN[variant][size][0], rel=2e-4)
    assert decode.total / 1e9 == pytest.approx(GOLDEN[variant][size][1], rel=2e-4)


# (GFLOP of a step for one image, ratio to the forward pass); where nothing moves in between, no
# backward is paid: spec of the phases of f32c32, golden to three or four digits.
PHASES = {"phase1": (3641, 3.0), "phase2": (30_700, 1.58), "phase3": (1641, 1.352)}


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_pays_only_for_what_trains(phase: str) -> None:
    """Gradients of the recipe's task, as the step accumulates them, without LPIPS and GAN."""
    cfg = recipes.dcae_phase(phase, dcae.dc_ae_f32c32_in(), "")
    cfg.task.model.depthwise, cfg.task.model.remat = Depthwise.lax, dcae.Remat.none
    cfg.task.losses.lpips, cfg.task.adversarial = 0.0, None
    task = cfg.task.build(cfg)
    params, stats = jax.eval_shape(task.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, *[cfg.data.resolution] * 2, 3), jnp.uint8)

    def step_of_one(params, stats, image):
        inputs = task.prepare(jax.random.key(0), {"image": image}, jnp.int32(0), ())
        return step.accumulate(task, Variables(params, stats, {}), inputs, 1)

    def forward(params, stats, image):
        return task.predict(Variables(params, stats, {}), {"image": image})

    expected, ratio = PHASES[phase]
    found = flops.count(step_of_one, params, stats, image).total
    assert found / 1e9 == pytest.approx(expected, rel=1e-3)
    assert found / flops.count(forward, params, stats, image).total == pytest.approx(
        ratio, abs=2e-3
    )
