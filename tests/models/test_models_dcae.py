"""DC-AE as a whole: sizes, variants, parameter paths, switches, messages."""

import copy
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import config
from dcae_jax.errors import UserError
from dcae_jax.models import dcae
from dcae_jax.models.dcae import BlockKind, DCAEConfig, Remat, StagesConfig, narrow
from dcae_jax.models.layers import Act, BatchNormMode, Dtype, Norm

GOLDEN = Path(__file__).parents[1] / "golden"
ONES = (0, 1, 1, 1)


def tiny(source: DCAEConfig | None = None) -> DCAEConfig:
    """Four stages, the last one an EfficientViT one where the source has them; float32."""
    cfg = narrow(
        source or dcae.dc_ae_f32c32_in(), widths=(8, 8, 16, 32), encoder_depths=ONES,
        decoder_depths=ONES, latent_channels=16,
    )  # fmt: skip
    cfg.dtype = Dtype.float32
    return cfg


def image(size: int = 16, batch: int = 2) -> jax.Array:
    return jax.random.uniform(jax.random.key(7), (batch, size, size, 3), minval=-1.0)


def init(cfg: DCAEConfig) -> Any:
    return _init(copy.deepcopy(cfg))


@functools.cache
def _init(cfg: DCAEConfig) -> Any:
    key = jax.random.key(0, impl="rbg")  # compiles many times as fast as the default generator
    return jax.jit(lambda key: dcae.init_variables(cfg, key))(key)


def paths(tree: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ["/".join(k.key for k in path) for path, _ in leaves]


# -------------------------------------------------------------------------------------- variants

COUNTS = {  # total, encoder, decoder, float values of BatchNorm statistics: of the releases
    "dc-ae-f32c32-in-1.0": (323_356_460, 123_172_384, 200_184_076, 12_800),
    "dc-ae-f64c128-in-1.0": (676_896_140, 264_550_528, 412_345_612, 12_800),
    "dc-ae-f128c512-in-1.0": (1_120_682_252, 415_661_056, 705_021_196, 12_800),
    "dc-ae-f32c32-sana-1.0": (312_250_275, 153_027_104, 159_223_171, 0),
    "dc-ae-lite-f32c32-sana-1.1": (421_181_228, 153_027_104, 268_154_124, 0),
    "dc-ae-f32c128-1.1": (523_609_740, 228_609_408, 295_000_332, 0),
    "dc-ae-1.5-f32c128": (523_609_740, 228_609_408, 295_000_332, 0),
    "dc-ae-1.5-f64c128": (714_741_644, 306_478_720, 408_262_924, 0),
}
SAME = {
    "dc-ae-f32c32-in-1.0-256px": "dc-ae-f32c32-in-1.0", "dc-ae-f32c32-mix-1.0":
    "dc-ae-f32c32-in-1.0", "dc-ae-f64c128-mix-1.0": "dc-ae-f64c128-in-1.0",
    "dc-ae-f128c512-mix-1.0": "dc-ae-f128c512-in-1.0", "dc-ae-f32c32-sana-1.1":
    "dc-ae-f32c32-sana-1.0",
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_releases(name: str) -> None:
    shapes = dcae.abstract_variables(dcae.VARIANTS[name]())

    def count(tree: Any) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    params = shapes["params"]
    halves = count(params["encoder"]), count(params["decoder"])
    assert (count(params), *halves, count(shapes.get("batch_stats", {}))) == COUNTS[name]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


def test_every_variant_is_counted_and_has_its_factor() -> None:
    assert set(dcae.VARIANTS) == set(COUNTS) | set(SAME)
    for name, twin in SAME.items():
        assert dcae.VARIANTS[name]() == dcae.VARIANTS[twin]()
    for name, make in dcae.VARIANTS.items():
        cfg = make()
        assert cfg.problems() == []
        assert f"f{cfg.factor}" in name.replace("-", " ").replace("c", " ").split()
    assert dcae.dc_ae_f64c128_in().latent_shape(512, 1024) == (8, 16, 128)


def test_describe_names_each_stage_and_its_parameters() -> None:
    lines = dcae.dc_ae_f32c32_in().describe(512)
    assert "512 x 512 x 3 -> 16 x 16 x 32 = 256 latent pixels, 323,356,460 parameters" in lines[0]
    assert any("encoder/stage_2:  128 px, width  512,  8 x res, 38,3" in line for line in lines)
    assert not any("stage_0" in line for line in lines)


# ------------------------------------------------------------------------------- parameter paths


@pytest.mark.parametrize("name", ["in", "sana", "lite", "1.5"])
def test_parameter_paths_are_pinned(name: str) -> None:
    """Freezing, init_from and conversion name parameters by these paths."""
    source = {
        "in": dcae.dc_ae_f32c32_in, "sana": dcae.dc_ae_f32c32_sana,
        "lite": dcae.dc_ae_lite_f32c32_sana, "1.5": dcae.dc_ae_f32c128_1_5,
    }[name]  # fmt: skip
    cfg = tiny(source())
    if name in ("sana", "lite"):  # these have a stage 0 in the encoder
        cfg.encoder.depths = (1, 1, 1, 1)
    if name == "sana":
        cfg.decoder.depths = (1, 1, 1, 1)
    tree = dcae.abstract_variables(cfg)
    leaves = jax.tree.leaves(tree)
    text = "".join(f"{p} {leaf.shape}\n" for p, leaf in zip(paths(tree), leaves, strict=True))
    file = GOLDEN / f"params_dcae_{name}.txt"
    if not file.exists() or file.read_text() != text:
        new = file.with_suffix(".new")
        new.write_text(text)
        pytest.fail(
            f"parameter paths or shapes changed; compare {new} with {file}. They are public: old "
            f"checkpoints and freezing patterns break. If it is meant: mv {new} {file}"
        )


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(Remat.stage, marks=pytest.mark.slow),
        Remat.block,
        pytest.param((Remat.none,) * 3 + (Remat.stage,), marks=pytest.mark.slow),
    ],
)
def test_remat_changes_neither_the_tree_nor_the_numbers(remat: Remat | tuple[Remat, ...]) -> None:
    plain = tiny()
    plain.batch_norm = BatchNormMode.update
    cfg = copy.deepcopy(plain)
    if isinstance(remat, tuple):
        cfg.encoder.remat, cfg.decoder.remat = remat, (Remat.block,) * 4
    else:
        cfg.remat = remat
    variables, x = init(plain), image()
    assert paths(dcae.abstract_variables(cfg)) == paths(variables)

    def grads(c: DCAEConfig) -> Any:
        model, stats = c.build(), variables["batch_stats"]

        def loss(params: Any) -> Any:
            y, new = model.apply(
                {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            return jnp.abs(y - x).mean(), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    assert "prevent_cse=True" in str(jax.make_jaxpr(cfg.build().apply)(variables, x))
    (a, b) = grads(plain), grads(cfg)
    # Recomputation fuses differently: the last float32 bits may differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b)


# -------------------------------------------------------------------------------------- switches


EVERYWHERE = r"^(?!encoder/conv_in|decoder/conv_out|decoder/norm_out)"
AT_LATENT = r"^(encoder/conv_out|decoder/conv_in)"


@pytest.mark.parametrize("cut", [EVERYWHERE, AT_LATENT], ids=["everywhere", "at the latent"])
def test_without_residual_the_shortcuts_between_stages_go(cut: str) -> None:
    """Past convolutions whose weights are zero, the shortcuts are the only way."""
    cfg = tiny()
    plain = copy.deepcopy(cfg)
    plain.residual = False
    variables, x = init(cfg), image()
    assert paths(dcae.abstract_variables(plain)) == paths(variables)

    def keep(path: Any, leaf: jax.Array) -> jax.Array:
        name = "/".join(k.key for k in path[1:])
        return jnp.zeros_like(leaf) if re.match(cut, name) else leaf

    dead = jax.tree_util.tree_map_with_path(keep, variables)

    @jax.jit
    def varies() -> Any:
        z = [c.build().apply(dead, x, method="encode") for c in (cfg, plain)]
        y = [c.build().apply(dead, z[0], method="decode") for c in (cfg, plain)]
        return [v.std(0).max() for v in (*z, *y)]  # from image to image

    z_with, z_without, y_with, y_without = varies()
    assert z_with > 0.01 and y_with > 0.01
    assert z_without == 0 and y_without == 0


def test_adaptive_channels_equal_zeroed_channels() -> None:
    cfg = tiny(dcae.dc_ae_f32c128_1_5())
    model, variables, x = cfg.build(), init(cfg), image()

    @jax.jit
    def results() -> Any:
        whole = model.apply(variables, x, method="encode")
        z = model.apply(variables, x, 5, method="encode")
        masked = model.apply(variables, whole * (jnp.arange(16) < 5), method="decode")
        cut = model.apply(variables, whole, 5, method="decode")
        return whole, z, masked, cut, model.apply(variables, x, 5)

    whole, z, masked, cut, both = results()
    assert z.shape == (2, 2, 2, 5)
    np.testing.assert_allclose(z, whole[..., :5], atol=1e-6)
    np.testing.assert_allclose(cut, masked, atol=1e-5)
    np.testing.assert_allclose(both, masked, atol=1e-5)
    with pytest.raises(UserError, match=r"choose one of 1\.\.16"):
        jax.eval_shape(lambda v: model.apply(v, x, 17, method="encode"), variables)


def test_a_prefix_of_an_ordinary_latent_is_refused() -> None:
    cfg = tiny()
    variables = dcae.abstract_variables(cfg)
    model = cfg.build()
    for call in (
        lambda v: model.apply(v, image(), 8, method="encode"),
        lambda v: model.apply(v, jnp.zeros((1, 4, 4, 8)), method="decode"),
    ):
        with pytest.raises(UserError, match="8 latent channels, but this autoencoder has 16"):
            jax.eval_shape(call, variables)


def test_bfloat16_activations_fp32_outputs_and_parameters() -> None:
    cfg = tiny()
    cfg.dtype = Dtype.bfloat16
    variables, x = init(cfg), image()
    exact = jax.jit(tiny().build().apply)(variables, x)

    @jax.jit
    def run() -> Any:
        return cfg.build().apply(variables, x, capture_intermediates=True)

    found, state = run()
    assert found.dtype == jnp.float32 and found.shape == x.shape
    inner = state["intermediates"]
    assert inner["encoder"]["stage_1"]["block_0"]["__call__"][0].dtype == jnp.bfloat16
    assert inner["decoder"]["stage_3"]["block_0"]["attn"]["__call__"][0].dtype == jnp.bfloat16
    # bf16 keeps 8 bits; some tens of roundings in a row.
    assert 1e-4 < jnp.abs(found - exact).max() / jnp.abs(exact).max() < 0.05
    cfg.conv_dtype = Dtype.float32
    jaxpr = str(jax.make_jaxpr(cfg.build().apply)(variables, x))
    convs = [line for line in jaxpr.splitlines() if "= conv_general_dilated" in line]
    assert convs and all("f32[" in line.split("=")[0] for line in convs)


def test_frozen_statistics_never_move() -> None:
    cfg = tiny()
    variables = init(cfg)

    @jax.jit
    def run() -> Any:
        return cfg.build().apply(variables, image(), mutable=["batch_stats"])

    new = run()[1]
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])


def test_from_scratch_uses_rms_norms_and_small_last_scales() -> None:
    cfg = dcae.from_scratch(tiny())
    variables = init(cfg)
    assert "batch_stats" not in variables and tiny().decoder.norms[1] is Norm.batch
    last = variables["params"]["decoder"]["stage_3"]["block_0"]["glumb"]["norm"]["scale"]
    assert (last == np.float32(0.1)).all()
    assert (variables["params"]["decoder"]["norm_out"]["scale"] == 1).all()


# -------------------------------------------------------------------------------------- messages


def test_all_problems_at_once_each_with_its_mend() -> None:
    cfg = tiny()
    cfg.encoder.depths, cfg.decoder.acts = (0, 0, 1, 1), (Act.relu,) * 3
    cfg.latent_channels, cfg.last_norm_scale_init = 0, -1.0
    cfg.decoder.blocks = (BlockKind.res, "resblock", "res", "evit")  # as an override gives them
    found = cfg.problems()
    for part in (
        "encoder.depths has 0 at stage 1; only stage 0 may be empty",
        "decoder.acts has 3 entries and decoder.widths 4",
        "decoder.blocks has 'resblock'; it knows res, evit, evit5",
        "latent_channels = 0; the smallest is 1",
        "last_norm_scale_init = -1.0; use 1 (released) or 0.1 (from scratch)",
    ):
        assert any(part in p for p in found), (part, found)
    assert len(found) == 5
    with pytest.raises(UserError, match="cannot be built"):
        cfg.build()


def test_widths_that_cannot_work_are_named_with_the_nearest_that_can() -> None:
    cfg = tiny()
    cfg.encoder.widths, cfg.decoder.widths = (8, 10, 16, 40), (8, 8, 16, 128)
    text = "\n".join(cfg.problems())
    assert "encoder.widths[3] = 40 is not a multiple of head_dim = 32" in text
    assert "nearest: 32 or 64" in text
    assert "encoder.widths[1] = 10 is not a multiple of 4" in text and "nearest: 8 or 12" in text
    assert "encoder.widths[1] = 10, widths[2] = 16: the shortcut needs 4 x 10" in text
    assert "decoder.widths[2] = 16, widths[3] = 128" in text
    assert "encoder.widths[-1] = 40 is not a multiple of latent_channels = 16" in text
    cfg.residual = False
    assert not any("shortcut" in p for p in cfg.problems())


def test_sides_of_different_length_and_adaptive_shortcuts_are_refused() -> None:
    cfg = tiny()
    cfg.decoder = StagesConfig()
    assert any("encoder.widths has 4 stages and decoder.widths 6" in p for p in cfg.problems())
    cfg = tiny()
    cfg.adaptive_channels = True
    assert any("adaptive_channels needs latent_shortcuts=False" in p for p in cfg.problems())


@pytest.mark.parametrize("size", [(33, 32), (32, 4)])
def test_images_that_do_not_fit_are_refused_with_the_nearest_size(size: tuple[int, int]) -> None:
    cfg = tiny()
    with pytest.raises(UserError, match=r"not a multiple of .* factor 8; .* to (32 or 40|8)"):
        jax.eval_shape(cfg.build().apply, dcae.abstract_variables(cfg), jnp.zeros((1, *size, 3)))


def test_strings_as_from_the_command_line_mean_their_enums() -> None:
    cfg = tiny()
    cfg.encoder.blocks, cfg.encoder.norms = ("res", "res", "res", "evit"), ("rms",) * 4
    cfg.encoder.acts, cfg.dtype = ("silu",) * 4, "float32"
    assert cfg.problems() == []
    assert paths(dcae.abstract_variables(cfg)) == paths(dcae.abstract_variables(tiny()))


def test_config_survives_json() -> None:
    cfg = tiny(dcae.dc_ae_f32c32_sana())
    cfg.conv_dtype, cfg.encoder.remat = Dtype.float32, (Remat.stage,) * 4
    again = config.from_json(config.to_json(cfg))
    assert again == cfg and again.encoder.norms[0] is Norm.rms


def test_narrow_divides_widths_and_keeps_the_rest() -> None:
    cfg = narrow(dcae.dc_ae_f64c128_in(), divisor=4)
    assert cfg.encoder.widths == (32, 64, 128, 128, 256, 256, 512)
    assert cfg.decoder.depths == (0, 5, 10, 2, 2, 2, 2) and cfg.factor == 64
    assert cfg.problems() == []
    short = narrow(dcae.dc_ae_f32c32_in(), widths=(32, 32, 64, 128))
    assert short.encoder.depths == (0, 4, 8, 2) and short.encoder.blocks[-1] is BlockKind.evit
