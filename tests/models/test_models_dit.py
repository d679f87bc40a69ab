"""DiT: sizes, paths, initialisation, positions, switches.  Shared parts: test_models_uvit.py."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_uvit import (
    batch,
    close,
    forward_macs,
    fresh,
    golden,
    gradients,
    init,
    mesh_agrees,
    run_all,
    varied,
)

from dcae_jax import config
from dcae_jax.errors import UserError
from dcae_jax.models import dit, transformer
from dcae_jax.models.dit import DiTConfig, Position
from dcae_jax.models.layers import Dtype
from dcae_jax.models.transformer import MLPKind, Remat
from dcae_jax.tree import flatten

MODERN = dict(qk_norm=True, mlp=MLPKind.swiglu, position=Position.rope, learn_variance=False)


def tiny(**fields: Any) -> DiTConfig:
    """Three blocks on 2 x 4 latents of 4 channels; float32."""
    cfg = DiTConfig(
        in_channels=4, input_size=(2, 4), width=32, depth=3, heads=2, num_classes=5,
        dtype=Dtype.float32,
    )  # fmt: skip
    return varied(cfg, **fields)


# ----------------------------------------------------------------------------------------- sizes

SIZES = {  # trainable parameters on 16 x 16 x 32 with patch 1
    "dit_s": 32_883_520, "dit_b": 130_352_704, "dit_l": 457_889_856, "dit_xl": 674_890_048,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str) -> None:
    cfg = getattr(dit, name)()
    assert cfg.problems() == []
    assert transformer.count(transformer.abstract_variables(cfg)) == SIZES[name]
    flow = getattr(dit, name.replace("dit", "sit"))()
    half = (cfg.width + 1) * 32  # the other half of the head
    assert transformer.count(transformer.abstract_variables(flow)) == SIZES[name] - half


def test_the_published_size() -> None:
    assert round(SIZES["dit_xl"] / 1e6, 2) == 674.89


F64, F8 = (
    dict(in_channels=128, input_size=(8, 8)),
    dict(in_channels=4, input_size=(64, 64), patch=2),
)


@pytest.mark.parametrize("fields,expected", [({}, 118.68), (F64, 58.1 / 2), (F8, 1049 / 2)])
def test_work_of_a_forward_pass(fields: dict[str, Any], expected: float) -> None:
    assert forward_macs(dit.dit_xl(**fields)) == pytest.approx(expected, rel=0.003)


@pytest.mark.parametrize("name,fields", [("dit", {}), ("dit_modern", {**MODERN, "patch": 2})])
def test_parameter_paths_are_pinned(name: str, fields: dict[str, Any]) -> None:
    golden(name, tiny(**fields))


def test_describe_says_which_of_the_two_it_is() -> None:
    assert dit.dit_xl().describe()[0].startswith("DiT: 16 x 16 x 32 -> 256 tokens of width 1152")
    assert dit.sit_xl().describe()[0].startswith("SiT: ")


# -------------------------------------------------------------------------------- initialisation


def test_initialisation_is_the_published_one() -> None:
    cfg = tiny(width=64, patch=2, num_classes=200)
    params = flatten(fresh(cfg, 1))
    zero = ("adaln/kernel", "head/kernel")
    for path, value in params.items():
        if path.endswith(zero) or path.endswith("bias"):
            assert (value == 0).all(), path
        elif "time_embed" in path or "label_embed" in path:
            assert value.std() == pytest.approx(0.02, rel=0.1), path
            assert np.abs(value).max() > 0.05, path  # normal, not uniform
        else:  # xavier-uniform: the patch convolution as the matrix [16, 64]
            fan_in, fan_out = value.shape[-2:] if value.ndim == 3 else (16, 64)
            bound = np.sqrt(6 / (fan_in + fan_out))
            assert 0.97 * bound < np.abs(value).max() <= bound, path


def test_a_fresh_network_gives_zeros_and_its_blocks_do_nothing() -> None:
    cfg = tiny()
    variables = fresh(cfg)
    run = jax.jit(cfg.build().apply, static_argnums=4)
    (y, first), (_, last) = (run(variables, *batch(cfg), k) for k in (1, 3))
    assert (y == 0).all() and y.shape == (3, 2, 4, 8)
    np.testing.assert_array_equal(first, last)


# ---------------------------------------------------------------------------------------- stacks


@pytest.mark.parametrize("fields", [
    pytest.param({"scan": False, "remat": Remat.dots}, marks=pytest.mark.slow),
    {"remat": Remat.full},
], ids=str)  # fmt: skip
def test_scan_and_remat_change_neither_tree_nor_numbers(fields: dict[str, Any]) -> None:
    plain, cfg = tiny(**MODERN), tiny(**MODERN, **fields)
    variables = init(plain)
    assert jax.tree.structure(transformer.abstract_variables(cfg)) == jax.tree.structure(variables)
    (y, grads), (again, again_grads) = (gradients(c)(variables) for c in (plain, cfg))
    np.testing.assert_allclose(again, y, atol=1e-6 * np.abs(y).max())
    close(again_grads, grads, 1e-5)  # sums over tokens in another order


@pytest.mark.parametrize("scan", [True, False])
def test_hidden_tokens_are_those_of_a_shorter_network(scan: bool) -> None:
    cfg = tiny(scan=scan)
    variables, inputs = init(cfg), batch(cfg)
    params = variables["params"]
    cut = [
        {"params": {**params, "blocks": jax.tree.map(lambda p, k=k: p[:k], params["blocks"])}}
        for k in (1, 2, 3)
    ]

    @jax.jit
    def run() -> Any:
        short = [
            tiny(scan=scan, depth=k).build().apply(c, *inputs, k)[1]
            for k, c in zip((1, 2, 3), cut, strict=True)
        ]
        return short, run_all(cfg.build(), variables, inputs, (1, 2, 3))

    short, (plain, found) = run()
    for expected, (y, hidden) in zip(short, found, strict=True):
        np.testing.assert_allclose(y, plain, atol=2e-5)
        np.testing.assert_allclose(hidden, expected, atol=2e-5)
        assert hidden.shape == (3, 8, 32) and hidden.dtype == jnp.float32


@pytest.mark.slow
def test_a_mesh_changes_no_number() -> None:
    mesh_agrees(tiny(width=64, **MODERN))


# ------------------------------------------------------------------------------------- positions


def test_sincos_has_the_column_first() -> None:
    table = transformer.grid_sincos(2, 3, 8)
    assert table.shape == (6, 8)
    row, column, omega = 1, 2, np.array([1.0, 0.01])
    expected = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega),
                np.cos(row * omega)]  # fmt: skip
    np.testing.assert_allclose(table[5], np.concatenate(expected), atol=1e-7)


def test_rope_sees_offsets_only() -> None:
    """Scores between turned queries and keys depend on the difference of rows and of columns."""
    rows, columns, dim = 4, 5, 8
    angles = jnp.asarray(transformer.grid_angles(rows, columns, dim))
    q, k = (
        jnp.broadcast_to(jax.random.normal(jax.random.key(i), (dim,)), (1, rows * columns, 1, dim))
        for i in range(2)
    )
    turned = [transformer.rotate(a, angles) for a in (q, k)]
    np.testing.assert_allclose(jnp.linalg.norm(turned[0], axis=-1), jnp.linalg.norm(q, axis=-1),
                               rtol=1e-6)  # fmt: skip
    score = jnp.einsum("bnmd,bkmd->nk", *turned).reshape(rows, columns, rows, columns)
    np.testing.assert_allclose(score[1, 1, 2, 3], score[0, 2, 1, 4], atol=1e-5)
    np.testing.assert_allclose(score[3, 4, 1, 0], score[2, 4, 0, 0], atol=1e-5)
    differ = [score[0, 0, i, j] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))]
    assert np.unique(np.round(np.array(differ), 3)).size == 6


@pytest.mark.parametrize("position", Position)
def test_tokens_know_where_they_are_on_any_grid(position: Position) -> None:
    """Other sizes than input_size are taken; moving the content does not just move the output."""
    cfg = tiny(position=position)
    x = jax.random.normal(jax.random.key(0), (1, 4, 6, 4))
    t, cond = jnp.array([500.0]), {"label": jnp.array([2], jnp.int32)}
    run = jax.jit(cfg.build().apply)
    y, moved = (run(init(cfg), a, t, cond) for a in (x, jnp.roll(x, 1, axis=2)))
    assert y.shape == (1, 4, 6, 8)
    assert np.abs(jnp.roll(y, 1, axis=2) - moved).max() > 0.01


# ---------------------------------------------------------------------------- switches, messages


def test_time_and_label_reach_the_output_and_strangers_are_nan() -> None:
    cfg = tiny(**MODERN)
    x = batch(cfg)[0]
    x = jnp.broadcast_to(x[:1], x.shape)
    run = jax.jit(cfg.build().apply)

    def spread(t: Any, label: list[int]) -> np.ndarray:
        y = np.asarray(run(init(cfg), x, t, {"label": jnp.array(label, jnp.int32)}))
        return np.abs(y[1:] - y[0]).max((1, 2, 3))

    assert (spread(jnp.array([0.2, 0.2, 0.9]), [1, 1, 1]) > [-1, 1e-3]).all()
    assert spread(jnp.full(3, 0.2), [1, 1, 1]).max() == 0
    assert spread(jnp.full(3, 0.2), [1, 5, 0]).min() > 1e-3
    assert np.isnan(spread(jnp.full(3, 0.2), [1, 6, -1])).all()


def test_adaptive_channels_equal_zeroed_channels() -> None:
    cfg = tiny(adaptive_channels=True, learn_variance=False)
    variables, (x, t, cond) = init(cfg), batch(cfg)
    run = jax.jit(cfg.build().apply)
    cut = run(variables, x[..., :3], t, cond)
    whole = run(variables, x * (jnp.arange(4) < 3), t, cond)
    np.testing.assert_allclose(cut, whole[..., :3], atol=1e-5)


def test_bfloat16_is_near_and_its_output_is_float32() -> None:
    cfg = tiny(dtype=Dtype.bfloat16, **MODERN)
    variables, inputs = init(cfg), batch(cfg)
    exact = jax.jit(tiny(**MODERN).build().apply)(variables, *inputs)
    found = jax.jit(cfg.build().apply)(variables, *inputs)
    assert found.dtype == jnp.float32
    # bf16 keeps 8 bits; some tens of roundings in a row
    assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 0.1


def test_all_problems_at_once_each_with_its_mend() -> None:
    cfg = tiny(width=36, heads=6, position="rope", time_shift=2, adaptive_channels=True)
    text = "\n".join(cfg.problems())
    assert "width / heads = 6 is not a multiple of 4, which rope needs" in text
    assert "time_shift = 2; the original has 0, diffusers' port 1" in text
    assert "adaptive_channels needs learn_variance=False" in text
    assert "position = 'learned' is unknown" in "\n".join(tiny(position="learned").problems())
    assert "width = 30 is not a multiple of 4" in "\n".join(tiny(width=30).problems())
    assert tiny(heads=0, position="rope").problems() == ["heads = 0; the smallest is 1"]
    with pytest.raises(UserError, match="this DiT cannot be built"):
        cfg.build()


def test_latents_that_do_not_fit_are_refused() -> None:
    cfg = tiny(patch=2)
    variables, (x, t, cond) = transformer.abstract_variables(cfg), batch(cfg)
    for wrong, message in (
        (x[:, :, :3], "the latent's width 3 is not a multiple of the patch size 2"),
        (x[..., :3], "3 channels and this network takes 4"),
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda v, w=wrong: cfg.build().apply(v, w, t, cond), variables)
    with pytest.raises(UserError, match="layers 1 to 3"):
        jax.eval_shape(lambda v: cfg.build().apply(v, x, t, cond, 0), variables)


def test_config_survives_json() -> None:
    cfg = tiny(**MODERN)
    assert config.from_json(config.to_json(cfg)) == cfg
