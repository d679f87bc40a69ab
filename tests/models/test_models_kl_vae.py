"""AutoencoderKL as a whole: parts against closed forms, sizes, parameter paths, messages."""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import config, recipes, tree
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, kl_vae
from dcae_jax.models.base import AutoencoderConfig
from dcae_jax.models.dcae import Remat, abstract_variables
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.tasks.autoencode import AutoencodeConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def tiny() -> KLVAEConfig:
    """Three stages, of two widths; float32."""
    return KLVAEConfig(widths=(8, 8, 16), layers_per_block=1, norm_groups=4, dtype=Dtype.float32)


def image(height: int = 16, width: int = 16) -> jax.Array:
    return jax.random.uniform(jax.random.key(7), (2, height, width, 3), minval=-1.0)


def init(cfg: KLVAEConfig) -> Any:
    key = jax.random.key(0, impl="rbg")  # compiles many times as fast as the default generator
    return jax.jit(lambda key: dcae.init_variables(cfg, key))(key)


# ------------------------------------------------------------------------------------------ parts


def test_group_norm_is_that_of_float64_numpy_even_far_from_zero() -> None:
    gen = np.random.default_rng(0)
    x = (gen.normal(size=(2, 3, 5, 12)) + 1000 * gen.normal(size=(2, 1, 1, 12))).astype(np.float32)
    scale, bias = gen.normal(size=(2, 12)).astype(np.float32)
    found = kl_vae.GroupNorm(4).apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x))
    groups = x.astype(np.float64).reshape(2, 3, 5, 4, 3)
    centred = groups - groups.mean((1, 2, 4), keepdims=True)
    y = centred / np.sqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    # Values of 1000 have 6e-5 of rounding, on a deviation of some 100.
    np.testing.assert_allclose(found, y.reshape(x.shape) * scale + bias, atol=1e-5)


def test_attention_is_that_of_numpy_on_a_map_that_is_not_square() -> None:
    gen = np.random.default_rng(0)
    q, k, v = gen.normal(size=(3, 2, 3, 5, 8)).astype(np.float32)
    found = kl_vae.attention(*(jnp.asarray(x) for x in (q, k, v)))
    q, k, v = (x.astype(np.float64).reshape(2, 15, 8) for x in (q, k, v))
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(8))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(found.reshape(2, 15, 8), expected, atol=1e-6)  # f32 sums of 15


def test_down_pads_below_and_to_the_right_only() -> None:
    """As torch's F.pad(x, (0, 1, 0, 1)): output (i, j) is about pixel (2 i + 1, 2 j + 1)."""
    cfg = tiny()
    stage = kl_vae.DownStage(cfg, 0)
    x = jnp.arange(64.0).reshape(1, 8, 8, 1) * jnp.ones(8)
    kernel = jnp.zeros((3, 3, 8, 8)).at[1, 1].set(jnp.eye(8))
    params = jax.tree.map(jnp.zeros_like, stage.init(jax.random.key(0), x)["params"])
    params["down"]["kernel"] = kernel  # the block adds nothing, its last convolution being zero
    np.testing.assert_array_equal(stage.apply({"params": params}, x), x[:, 1::2, 1::2])


@pytest.mark.parametrize(
    ("height", "width", "rows"), [(128, 128, 128), (256, 256, 16), (7, 40_000, 1)]
)
def test_rows_at_once_divide_the_height_and_fit(height: int, width: int, rows: int) -> None:
    assert kl_vae._rows_at_once(height, width) == rows
    assert rows == 1 or rows * width * height * width <= kl_vae.MAX_WEIGHTS


# --------------------------------------------------------------------------------------- variants


def test_counts_factors_and_latents_of_the_variants() -> None:
    # SD-VAE's count is that of the released file; a stage of width 512 adds two blocks and a
    # convolution to the encoder, three blocks and a convolution to the decoder, and the latent's
    # width changes three 3x3 convolutions' worth of channels and the 1x1 ones.
    block, conv = 2 * (9 * 512 * 512 + 512) + 2 * 2 * 512, 9 * 512 * 512 + 512
    expected = {"sd-vae-f8": (8, 4), "kl-f32c32": (32, 32), "kl-f64c128": (64, 128),
                "kl-f128c512": (128, 512)}  # fmt: skip
    assert set(kl_vae.VARIANTS) == set(expected)
    for name, (factor, c) in expected.items():
        cfg = kl_vae.VARIANTS[name]()
        assert (cfg.factor, cfg.latent_channels) == (factor, c) and cfg.problems() == []
        stages = len(cfg.widths) - 4
        latent = [9 * 512 * 2 * k + 2 * k + (2 * k) ** 2 + 2 * k + k * k + k + 9 * k * 512
                  for k in (4, c)]  # fmt: skip
        count = 83_653_863 + stages * (5 * block + 2 * conv) + latent[1] - latent[0]
        assert tree.size(abstract_variables(cfg)) == count, name
    assert kl_vae.sd_vae_f8().latent_shape(512, 768) == (64, 96, 4)


def test_parameter_paths_are_pinned() -> None:
    """Freezing, init_from and conversion name parameters by these paths."""
    flat = tree.flatten(abstract_variables(tiny()))
    text = "".join(f"{path} {leaf.shape}\n" for path, leaf in flat.items())
    file = GOLDEN / "params_kl_vae.txt"
    if not file.exists() or file.read_text() != text:
        new = file.with_suffix(".new")
        new.write_text(text)
        pytest.fail(
            f"parameter paths or shapes changed; compare {new} with {file}. They are public: old "
            f"checkpoints and freezing patterns break. If it is meant: mv {new} {file}"
        )


def test_without_attention_and_1x1_convolutions_only_those_leaves_go() -> None:
    cfg = tiny()
    cfg.mid_attention = cfg.quant_conv = cfg.post_quant_conv = False
    all_paths, paths = (set(tree.flatten(abstract_variables(c))) for c in (tiny(), cfg))
    assert paths < all_paths
    gone = {"/".join(path.split("/")[1:4]) for path in all_paths - paths}
    assert {g.rsplit("/", 1)[0] if "quant" in g else g for g in gone} == {
        "encoder/mid/attn", "decoder/mid/attn", "encoder/quant", "decoder/post_quant"
    }  # fmt: skip


def test_patterns_of_the_phases_are_the_parts_that_they_name() -> None:
    cfg = tiny()
    params = {"ae": abstract_variables(cfg)["params"]}
    modules = {
        name: set(tree.by_module(tree.partition(params, pattern)[0], depth=3))
        for name, pattern in (("middle", recipes.middle(cfg)), ("head", recipes.head(cfg)))
    }
    assert modules["middle"] == {
        *(f"ae/encoder/{m}" for m in ("down_2", "mid", "norm_out", "conv_out", "quant")),
        *(f"ae/decoder/{m}" for m in ("post_quant", "conv_in", "mid", "up_2")),
    }
    assert modules["head"] == {f"ae/decoder/{m}" for m in ("up_0", "norm_out", "conv_out")}
    # Those of DC-AE, as they always were.
    assert recipes.middle(dcae.dc_ae_f32c32_in()) == (
        "ae/(encoder/(stage_5|conv_out)|decoder/(conv_in|stage_5))/.*"
    )
    assert recipes.head(dcae.dc_ae_f32c32_in()) == "ae/decoder/(stage_1|norm_out|conv_out)/.*"


def test_describe_names_each_stage_and_its_parameters() -> None:
    lines = kl_vae.sd_vae_f8().describe(512)
    assert "512 x 512 x 3 -> 64 x 64 x 4 = 4096 latent pixels, 83,653,863 parameters" in lines[0]
    assert any("encoder/down_1:  256 px, width  256,  2 x res, " in line for line in lines)
    assert any("decoder/up_3:   64 px, width  512,  3 x res, " in line for line in lines)
    counts = [int(line.split()[-2].replace(",", "")) for line in lines]
    assert sum(counts[1:]) == counts[0]


def test_both_families_are_autoencoder_configs_and_survive_json() -> None:
    cfg = tiny()
    cfg.conv_dtype, cfg.remat = Dtype.float32, Remat.block
    assert isinstance(cfg, AutoencoderConfig) and isinstance(dcae.DCAEConfig(), AutoencoderConfig)
    again = config.from_json(config.to_json(AutoencodeConfig(model=cfg))).model
    assert again == cfg and again.remat is Remat.block and hash(again) == hash(cfg)


# --------------------------------------------------------------------------------------- behaviour


def test_moments_are_clipped_and_the_mean_is_the_latent() -> None:
    cfg = tiny()
    variables, model = init(cfg), cfg.build()
    quant = variables["params"]["encoder"]["quant"]
    # Log variances of channels 0 and 1 far outside the range, on both sides.
    quant["bias"] = quant["bias"].at[4].set(1e3).at[5].set(-1e3)

    @jax.jit
    def run(v: Any) -> Any:
        moments = model.apply(v, image(8, 16), method="moments")
        return *moments, *(model.apply(v, image(8, 16), method=m) for m in ("encode", "__call__"))

    mean, logvar, latent, y = run(variables)
    assert mean.shape == logvar.shape == (2, 2, 4, 4) and y.shape == (2, 8, 16, 3)
    assert (logvar[..., 0] == 20).all() and (logvar[..., 1] == -30).all()
    assert jnp.abs(logvar[..., 2:]).max() < 10
    np.testing.assert_array_equal(latent, mean)


@pytest.mark.parametrize("remat", [pytest.param(Remat.stage, marks=pytest.mark.slow), Remat.block])
def test_remat_changes_neither_the_tree_nor_the_numbers(remat: Remat) -> None:
    plain = tiny()
    cfg = copy.deepcopy(plain)
    cfg.remat = remat
    variables, x = init(plain), image()
    assert tree.flatten(abstract_variables(cfg)).keys() == tree.flatten(variables).keys()

    def grads(c: KLVAEConfig) -> Any:
        loss = lambda v: jnp.abs(c.build().apply(v, x) - x).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(variables)

    assert "prevent_cse=True" in str(jax.make_jaxpr(cfg.build().apply)(variables, x))
    # Recomputation fuses differently: the last float32 bits may differ.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grads(plain), grads(cfg),
    )  # fmt: skip


def test_bfloat16_activations_fp32_statistics_outputs_and_parameters() -> None:
    cfg = tiny()
    variables, x = init(cfg), image()
    exact = jax.jit(cfg.build().apply)(variables, x)
    cfg.dtype = Dtype.bfloat16
    jaxpr = str(jax.make_jaxpr(cfg.build().apply)(variables, x))
    found = jax.jit(cfg.build().apply)(variables, x)
    assert found.dtype == jnp.float32
    # bf16 keeps 8 bits; some tens of roundings in a row.
    assert 1e-4 < jnp.abs(found - exact).max() / jnp.abs(exact).max() < 0.05
    islands = [line for line in jaxpr.splitlines() if "= rsqrt" in line or "= exp" in line]
    assert islands and all("f32[" in line.split("=")[0] for line in islands)
    cfg.conv_dtype = Dtype.float32
    jaxpr = str(jax.make_jaxpr(cfg.build().apply)(variables, x))
    convs = [line for line in jaxpr.splitlines() if "= conv_general_dilated" in line]
    assert convs and all("f32[" in line.split("=")[0] for line in convs)


# ---------------------------------------------------------------------------------------- messages


def test_all_problems_at_once_each_with_its_mend() -> None:
    cfg = tiny()
    cfg.widths, cfg.latent_channels, cfg.layers_per_block = (8, 10, 0), 0, 0
    cfg.remat = "blocks"  # as an override could give it
    found = cfg.problems()
    for part in (
        "latent_channels = 0; the smallest is 1",
        "layers_per_block = 0; the smallest is 1",
        "remat = 'blocks'; it knows none, stage, block",
        "widths[1] = 10 is not a positive multiple of norm_groups = 4; nearest: 8 or 12",
        "widths[2] = 0 is not a positive multiple of norm_groups = 4; nearest: 4",
    ):
        assert any(part in p for p in found), (part, found)
    assert len(found) == 5
    with pytest.raises(UserError, match="cannot be built"):
        cfg.build()
    cfg = tiny()
    cfg.widths = (8,)
    assert any("needs at least 2" in p for p in cfg.problems())


def test_images_and_latents_that_do_not_fit_are_refused() -> None:
    cfg = tiny()
    variables, model = abstract_variables(cfg), cfg.build()
    with pytest.raises(UserError, match=r"width 18 is not a multiple of .* factor 4; .* 16 or 20"):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 16, 18, 3)))
    with pytest.raises(UserError, match="8 channels, but this autoencoder has 4"):
        jax.eval_shape(
            lambda v: model.apply(v, jnp.zeros((1, 4, 4, 8)), method="decode"), variables
        )
