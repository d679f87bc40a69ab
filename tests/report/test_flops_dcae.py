"""FLOPs of the released autoencoders against the closed forms of the literature's tables."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import pytest

from dcae_jax.models import dcae
from dcae_jax.models.layers import Depthwise
from dcae_jax.report import flops

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


# (size, what trains, GFLOP of value and gradient, ratio to the forward pass)
PHASES = {
    "phase1": (256, r".*", 3641, 3.0),
    "phase2": (1024, r"encoder/(stage_5|conv_out)/|decoder/(conv_in|stage_5)/", 30_700, 1.58),
    "phase3": (256, r"decoder/(stage_1|norm_out|conv_out)/", 1641, 1.352),
    "phase3_head": (256, r"decoder/(norm_out|conv_out)/", 1216, 1.001),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_pays_only_for_what_trains(phase: str) -> None:
    """Value and gradient of f32c32, without LPIPS and GAN."""
    size, pattern, expected, ratio = PHASES[phase]
    model, variables, _ = _model(dcae.dc_ae_f32c32_in)
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    trained = {k: v for k, v in flat.items() if re.match(f"params/({pattern})", k)}
    frozen = {k: v for k, v in flat.items() if k not in trained}

    def loss(trained, frozen, x):
        joined = flax.traverse_util.unflatten_dict({**trained, **frozen}, sep="/")
        return jnp.mean(jnp.abs(model.apply(joined, x) - x))

    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    forward = flops.count(loss, trained, frozen, image).total
    step = flops.count(jax.value_and_grad(loss), trained, frozen, image).total
    assert step / 1e9 == pytest.approx(expected, rel=1e-3)  # three or four digits are golden
    assert step / forward == pytest.approx(ratio, abs=2e-3)
