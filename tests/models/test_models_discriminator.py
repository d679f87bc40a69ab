"""PatchGAN: shapes, patch size, count, initialisation, independence of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.errors import UserError
from dcae_jax.models.discriminator import PatchGANConfig, PatchNorm
from dcae_jax.models.layers import Dtype


def test_logit_map_parameters_and_initialisation() -> None:
    model = PatchGANConfig().build()
    shapes = jax.eval_shape(model.init, jax.random.key(0, impl="rbg"), jnp.zeros((1, 256, 256, 3)))
    params = shapes["params"]
    assert list(params) == ["conv_0", "conv_1", "conv_2", "conv_3", "conv_out"]
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    # 4x4 kernels 3 -> 64 -> 128 -> 256 -> 512 -> 1, each with biases
    assert count == 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 896 + 1
    out = jax.eval_shape(model.apply, shapes, jnp.zeros((2, 256, 256, 3)))
    assert out.shape == (2, 30, 30, 1) and out.dtype == jnp.float32
    small = PatchGANConfig(width=16).build()
    p = jax.jit(small.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 24, 24, 3)))["params"]
    assert abs(float(p["conv_2"]["kernel"].std()) - 0.02) < 0.001
    assert (p["conv_2"]["bias"] == 0).all()


def test_a_logit_sees_a_patch_of_34_pixels_at_two_layers() -> None:
    model = PatchGANConfig(width=2, layers=2, dtype=Dtype.float32).build()
    x = jax.random.normal(jax.random.key(1), (1, 56, 56, 3))
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x)
    g = jax.jit(jax.grad(lambda x: model.apply(params, x)[0, 6, 6, 0]))(x)
    rows = np.flatnonzero(np.abs(g).sum((0, 2, 3)))
    assert rows[-1] - rows[0] + 1 == 34


@pytest.mark.parametrize("norm", list(PatchNorm))
def test_examples_do_not_meet(norm: PatchNorm) -> None:
    model = PatchGANConfig(width=16, layers=2, norm=norm, dtype=Dtype.float32).build()
    x = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x)
    apply = jax.jit(model.apply)
    whole = apply(params, x)
    alone = jnp.concatenate([apply(params, x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(whole, alone, atol=1e-6)
    names = set(params["params"])
    assert ("norm_1" in names) == (norm is not PatchNorm.none) and "norm_0" not in names


def test_small_images_and_bad_values_are_refused() -> None:
    cfg = PatchGANConfig(width=8)
    with pytest.raises(UserError, match="at least 24 px; got 16 x 16"):
        jax.eval_shape(cfg.build().init, jax.random.key(0, impl="rbg"), jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(UserError, match="multiple of 16"):
        PatchGANConfig(width=24, norm=PatchNorm.group).build()
    assert len(PatchGANConfig(width=0, layers=0).problems()) == 2
    assert cfg.smallest() == 24
