"""LMD and the pixel MAE: sizes, work, initialisation, what the encoder sees, switches, messages."""

import copy
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_uvit import golden_text

from dcae_jax import masking
from dcae_jax.errors import UserError
from dcae_jax.masking import MaskConfig, MaskKind, Rounding
from dcae_jax.models import lmd
from dcae_jax.models.layers import Dtype
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.models.transformer import AttentionKernel, Remat, count
from dcae_jax.report import flops
from dcae_jax.tree import flatten


def tiny(**fields: Any) -> LMDConfig:
    """16 tokens of 4 x 4 latents; float32."""
    cfg = LMDConfig(
        in_channels=4, input_size=(8, 8), patch=2, width=16, depth=2, heads=2, decoder_width=8,
        decoder_depth=1, decoder_heads=2, dtype=Dtype.float32,
    )  # fmt: skip
    return dataclasses.replace(cfg, **fields)


@functools.cache
def params(cfg: LMDConfig) -> Any:
    """Initialised, then shaken: a fresh network hides what starts at 0 or 1."""
    leaves, kind = jax.tree.flatten(
        jax.jit(lambda k: lmd.init_variables(cfg, k))(jax.random.key(0))
    )
    g = np.random.default_rng(0)
    noise = [0.2 * g.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(kind, [a + b for a, b in zip(leaves, noise, strict=True)])


def some(cfg: LMDConfig, keep: int, batch: int = 3) -> tuple[jax.Array, masking.Split]:
    x = jax.random.normal(jax.random.key(1), (batch, *cfg.input_size, cfg.in_channels))
    order = masking.random_order(jax.random.key(2), batch, *cfg.grid(*cfg.input_size))
    return x, masking.split(order, keep)


# ----------------------------------------------------------------------------------------- sizes

SIZES = {  # encoder, decoder
    "lmd_b": (85_106_688, 25_647_168), "lmd_l": (302_379_008, 25_778_240),
    "lmd_h": (629_765_120, 25_909_312),
    # 49,920 -> 590,592 numbers of the patches (16 x 16 x 3 + 1 for 4 x 4 x 4 + 1), 512 more outputs
    # for each of 704 more numbers of a token.
    "mae_b": (85_647_360, 26_008_320),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    cfg = getattr(lmd, name)()
    shapes = lmd.abstract_variables(cfg)["params"]
    assert cfg.problems() == []
    assert (count(shapes["encoder"]), count(shapes["decoder"])) == SIZES[name]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


def test_other_latents_and_sizes() -> None:
    f32 = lmd.lmd_b(in_channels=32, input_size=(16, 16), patch=1)
    assert (f32.tokens, f32.token_size) == (256, 32) and f32.problems() == []
    assert [lmd.lmd_b().tokens, lmd.mae_l().tokens, lmd.mae_h().tokens] == [49, 196, 256]
    assert lmd.mae_h().width == 1280 and lmd.mae_h().token_size == 14 * 14 * 3


def test_parameter_paths_are_pinned() -> None:
    """Freezing, init_from and the probe name parameters by these paths."""
    golden_text("lmd", flatten(lmd.abstract_variables(tiny())["params"]))


def test_describe_counts_tokens_and_parameters() -> None:
    lines = lmd.lmd_b().describe()
    assert "28 x 28 x 4 -> 49 + 1 tokens of 64 numbers" in lines[0] and "110,753,856" in lines[0]
    assert "encoder: 12 blocks of width 768, 12 heads of 64" in lines[1]
    assert re.search(r"decoder: 8 blocks of width 512, 16 heads of 32, .* 25,647,168", lines[2])


# ------------------------------------------------------------------------------------------- work


def formula(cfg: LMDConfig, keep: int) -> float:
    """FLOPs of a forward pass: 24 n D^2 + 4 n^2 D a block, and the linear maps around them."""

    def block(n: int, width: int) -> int:
        return 24 * n * width**2 + 4 * n**2 * width

    every, seen, wide, thin = cfg.tokens, 1 + keep, cfg.width, cfg.decoder_width
    around = (
        every * cfg.token_size * wide + seen * wide * thin + (1 + every) * thin * cfg.token_size
    )
    return cfg.depth * block(seen, wide) + cfg.decoder_depth * block(1 + every, thin) + 2 * around


def counted(cfg: LMDConfig, keep: int) -> float:
    """The same, on the jaxpr."""
    order = jax.ShapeDtypeStruct((1, cfg.tokens), jnp.int32)
    x = jax.ShapeDtypeStruct((1, *cfg.input_size, cfg.in_channels), jnp.float32)
    shapes = lmd.abstract_variables(cfg)
    model = cfg.build()
    found = flops.count(
        lambda v, x, order: model.apply(v, x, masking.Split(order, order, keep)), shapes, x, order
    )
    assert found.incomplete == ()
    return float(found.total)


GIGA = [  # published to two or three digits
    (lmd.mae_b, 49, 19.56), (lmd.lmd_b, 12, 4.79), (lmd.lmd_b, 49, 11.19), (lmd.lmd_b, 41, 9.80),
    (lmd.lmd_b, 29, 7.72), (lmd.lmd_b, 24, 6.86), (lmd.lmd_b, 19, 5.99),
]  # fmt: skip


@pytest.mark.parametrize(("make", "keep", "giga"), GIGA)
def test_work_of_a_forward_pass(make: Any, keep: int, giga: float) -> None:
    """The counted work is that of the formula, and both are the published numbers."""
    cfg = make()
    assert counted(cfg, keep) == formula(cfg, keep)
    assert formula(cfg, keep) / 1e9 == pytest.approx(giga, abs=0.0051)


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        # of MAE-B: exact numbers, then the ones that are trained with
        (MaskConfig(rounding=Rounding.exact), 0.329), (MaskConfig(), 0.331),
        (MaskConfig(kind=MaskKind.linear, rounding=Rounding.exact), 0.372),
        (MaskConfig(kind=MaskKind.constant), 0.245),
    ],
)  # fmt: skip
def test_lmd_costs_a_third_of_the_pixel_baseline(mask: MaskConfig, share: float) -> None:
    """Means over the training of LMD-B's forward pass: 6.44 GFLOP of 19.56 with exact numbers."""
    cfg, steps = lmd.lmd_b(), 60_000
    keeps = mask.keeps(mask.ratio(np.arange(steps), steps), 49)
    numbers, times = np.unique(keeps, return_counts=True)
    mean = sum(formula(cfg, int(n)) * t for n, t in zip(numbers, times, strict=True)) / steps
    found = mean / formula(lmd.mae_b(), 49)
    assert found == pytest.approx(share, abs=0.0016)
    if mask.kind is MaskKind.cosine:
        assert found <= 1 / 3
        assert mean / 1e9 == pytest.approx(6.44, rel=0.009)  # the nearest numbers cost 0.7 % more


# -------------------------------------------------------------------------------- initialisation


def test_initialisation_is_that_of_mae() -> None:
    cfg = tiny(width=64, decoder_width=32, decoder_depth=2)
    tree = jax.jit(lambda k: lmd.init_variables(cfg, k))(jax.random.key(1))["params"]
    for path, value in flatten(tree).items():
        name, value = path.rsplit("/", 1)[-1], np.asarray(value)
        if name in ("cls", "mask_token"):
            assert 0.3 < value.std() / 0.02 < 1.7 and abs(value).max() < 0.08, path
        elif name == "kernel":
            rows = value.shape[-2] if "patch_embed" not in path else 2 * 2 * 4
            limit = np.sqrt(6 / (rows + value.shape[-1]))  # qkv: sqrt(6 / 4 width)
            assert 0.95 * limit < np.abs(value).max() <= limit, path
            assert value.std() == pytest.approx(limit / np.sqrt(3), rel=0.05), path
        else:
            assert (value == (1.0 if name == "scale" else 0.0)).all(), path
    kernel = tree["encoder"]["blocks"]["attn"]["qkv"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01, "layers start from different weights"


# -------------------------------------------------------------------------------------- blindness


def test_nothing_of_masked_tokens_reaches_the_output() -> None:
    """Not one bit; and every visible number does."""
    cfg = tiny()
    model, variables, (x, split) = cfg.build(), params(cfg), some(cfg, 6)

    def outputs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = model.apply(variables, x, split)
        return jnp.square(y).sum(), y

    run = jax.jit(jax.grad(outputs, has_aux=True))
    gradient, y = run(x)
    masked = np.asarray(split.masked()).reshape(3, 4, 4).repeat(2, 1).repeat(2, 2)
    assert (gradient[masked] == 0).all() and (gradient[~masked] != 0).all()
    other = jnp.where(masked[..., None], jnp.float32(1e3), x)
    np.testing.assert_array_equal(run(other)[1], y)


def loops(jaxpr: Any) -> Any:
    """The jaxprs of all scans."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["jaxpr"].jaxpr
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from loops(inner)


def sizes(jaxpr: Any) -> set[int]:
    """All dimensions of all values of a jaxpr, inside calls too."""
    found = {n for eqn in jaxpr.eqns for v in eqn.outvars for n in v.aval.shape}
    return found.union(*(sizes(j) for e in jaxpr.eqns for j in jax.core.jaxprs_in_params(e.params)))


@pytest.mark.parametrize("remat", [Remat.none, Remat.full])
def test_dropped_tokens_are_nowhere_in_the_trunk(remat: Remat) -> None:
    """No array in the encoder's layers, forwards or backwards, is as long as the latent."""
    cfg = tiny(input_size=(26, 26), patch=2, remat=remat)  # 169 tokens: no other size is that
    x, split = some(cfg, 60, batch=1)
    model, shapes = cfg.build(), lmd.abstract_variables(cfg)

    def seen(variables: Any) -> jax.Array:
        return model.apply(variables, x, split, method="encode").sum()

    trunk = set().union(*(sizes(j) for j in loops(jax.make_jaxpr(jax.grad(seen))(shapes).jaxpr)))
    assert 61 in trunk and not {169, 170} & trunk


def test_a_whole_latent_is_not_permuted() -> None:
    """With all tokens visible the order of a split changes no bit."""
    cfg = tiny()
    x, split = some(cfg, 16)
    model = cfg.build()
    found = model.apply(params(cfg), x, split)
    plain = model.apply(params(cfg), x, lmd.whole(cfg, 3))
    np.testing.assert_array_equal(found, plain)


def test_the_order_of_visible_tokens_does_not_count() -> None:
    cfg = tiny()
    x, split = some(cfg, 6)
    again = jnp.concatenate([split.order[:, 5::-1], split.order[:, :5:-1]], axis=1)
    a, b = (cfg.build().apply(params(cfg), x, s) for s in (split, masking.split(again, 6)))
    np.testing.assert_allclose(a, b, atol=2e-6)  # sums over tokens in another order


# --------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_features_are_the_encoders_tokens(scan: bool) -> None:
    """Layer by layer they lead to the encoder's result on the whole latent."""
    cfg = tiny(scan=scan)
    model, variables, (x, _) = cfg.build(), params(tiny()), some(cfg, 16)
    found = model.apply(variables, x, method="features")
    encoded = model.apply(variables, x, lmd.whole(cfg, 3), method="encode")
    assert found.shape == (3, 17, 16) and found.dtype == jnp.float32
    np.testing.assert_array_equal(found, encoded)
    last = np.asarray(model.apply(variables, x, 2, method="features"), np.float64)
    norm = variables["params"]["encoder"]["norm"]
    normal = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, normal * norm["scale"] + norm["bias"], atol=1e-5)
    first = model.apply(variables, x, 1, method="features")
    assert np.abs(first - last).max() > 0.1
    with pytest.raises(UserError, match="layers 1 to 2"):
        model.apply(variables, x, 3, method="features")


# ------------------------------------------------------------------------------ switches, messages


@pytest.mark.slow
@pytest.mark.parametrize("remat", [Remat.full, Remat.dots])
def test_scan_and_remat_change_neither_tree_nor_numbers(remat: Remat) -> None:
    plain, cfg = tiny(), tiny(scan=False, remat=remat)
    x, split = some(plain, 6)
    assert jax.tree.structure(lmd.abstract_variables(cfg)) == jax.tree.structure(params(plain))

    def gradients(cfg: LMDConfig) -> Any:
        model = cfg.build()
        return jax.jit(jax.grad(lambda v: jnp.square(model.apply(v, x, split)).mean()))

    for a, b in zip(
        *(jax.tree.leaves(gradients(c)(params(plain))) for c in (plain, cfg)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())  # sums in another order


def test_activations_are_in_the_dtype_of_the_config() -> None:
    cfg = tiny(dtype=Dtype.bfloat16)
    x, split = some(cfg, 6)
    y = cfg.build().apply(params(tiny()), x, split)
    exact = tiny().build().apply(params(tiny()), x, split)
    assert y.dtype == jnp.float32
    error = float(jnp.abs(y - exact).max() / jnp.abs(exact).max())
    assert 1e-4 < error < 0.05  # bfloat16 has 8 bits; more layers than one round
    text = str(jax.make_jaxpr(lambda v: cfg.build().apply(v, x, split))(params(tiny())))
    assert "bf16[3,7,16]" in text and "bf16[3,17,8]" in text


def test_positions_of_the_decoder_may_be_subtracted() -> None:
    """Its own sign alone: the encoder's tokens stay."""
    cfg, other = tiny(), tiny(decoder_pos_sign=-1)
    x, split = some(cfg, 6)
    assert np.abs(cfg.build().apply(params(cfg), x, split)
                  - other.build().apply(params(cfg), x, split)).max() > 0.01  # fmt: skip
    a, b = (c.build().apply(params(cfg), x, split, method="encode") for c in (cfg, other))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 3}, r"height 8 \(input_size\) is not a multiple of patch = 3"),
        ({"depth": 0}, r"^depth = 0; the smallest is 1"),
        ({"decoder_depth": 0}, r"decoder: depth = 0; the smallest is 1"),
        ({"heads": 3}, r"width = 16 is not divisible by heads = 3"),
        ({"decoder_heads": 3}, r"decoder: width = 8 is not divisible by heads = 3"),
        ({"width": 18, "heads": 2}, r"width = 18 is not divisible by 4: .* nearest: 20"),
        ({"decoder_pos_sign": 0}, r"decoder_pos_sign = 0; 1 adds"),
        ({"attention": AttentionKernel.cudnn}, "attention = cudnn, but"),
    ],
)  # fmt: skip
def test_bad_configs_are_named(fields: dict[str, Any], message: str) -> None:
    cfg = tiny(**fields)
    assert any(re.search(message, p) for p in cfg.problems()), cfg.problems()
    with pytest.raises(UserError, match="this LMD cannot be built"):
        cfg.build()


def test_other_inputs_are_refused() -> None:
    cfg = tiny()
    for shape in ((1, 8, 8, 3), (1, 8, 4, 4)):
        with pytest.raises(UserError, match="built for 8 x 8 x 4; set input_size"):
            cfg.build().apply(params(cfg), jnp.zeros(shape), method="features")
    assert copy.deepcopy(cfg) == cfg
