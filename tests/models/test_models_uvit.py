"""UViT and what it shares with DiT: sizes, paths, initialisation, stacks, switches, messages."""

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
from dcae_jax.config import MeshConfig
from dcae_jax.errors import UserError
from dcae_jax.models import dit, transformer, uvit
from dcae_jax.models.layers import Dtype
from dcae_jax.models.transformer import AttentionKernel, MLPKind, Remat
from dcae_jax.models.uvit import Block, UViTConfig
from dcae_jax.report import flops
from dcae_jax.sharding import make_mesh, state_shardings
from dcae_jax.tree import flatten

GOLDEN = Path(__file__).parents[1] / "golden"


def tiny(**fields: Any) -> UViTConfig:
    """Two pairs of blocks and the middle one, on 2 x 4 latents of 4 channels; float32."""
    cfg = UViTConfig(
        in_channels=4, input_size=(2, 4), width=32, depth=4, heads=2, num_classes=5,
        dtype=Dtype.float32,
    )  # fmt: skip
    return varied(cfg, **fields)


def varied(cfg: Any, **fields: Any) -> Any:
    """A copy with other values, set as the command line sets them: unchecked."""
    new = copy.deepcopy(cfg)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def batch(cfg: Any, n: int = 3) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(5))
    x = jax.random.normal(keys[0], (n, *cfg.input_size, cfg.in_channels))
    label = jnp.arange(n, dtype=jnp.int32) % (cfg.num_classes + 1)
    return x, 1000 * jax.random.uniform(keys[1], (n,)), {"label": label}


def init(cfg: Any) -> Any:
    return _init(copy.deepcopy(cfg))


@functools.cache
def _init(cfg: Any) -> Any:
    """Initialised, then shaken: a fresh network hides what starts at 0 or 1."""
    leaves, kind = jax.tree.flatten(fresh(cfg))
    g = np.random.default_rng(0)
    noise = [0.2 * g.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(kind, [a + b for a, b in zip(leaves, noise, strict=True)])


def fresh(cfg: Any, seed: int = 0) -> Any:
    """As initialised; the rbg generator compiles many times as fast as the default one."""
    key = jax.random.key(seed, impl="rbg")
    return jax.jit(lambda key: transformer.init_variables(cfg, key))(key)


def golden(name: str, cfg: Any) -> None:
    """Paths and shapes are those of tests/golden/params_NAME.txt."""
    golden_text(name, flatten(transformer.abstract_variables(cfg)))


def golden_text(name: str, tree: dict[str, Any]) -> None:
    """The same of shapes by path."""
    text = "".join(f"{path} {leaf.shape}\n" for path, leaf in tree.items())
    file = GOLDEN / f"params_{name}.txt"
    if not file.exists() or file.read_text() != text:
        new = file.with_suffix(".new")
        new.write_text(text)
        pytest.fail(
            f"parameter paths or shapes changed; compare {new} with {file}. They are public: old "
            f"checkpoints and freezing patterns break. If it is meant: mv {new} {file}"
        )


def forward_macs(cfg: Any) -> float:
    """Billions of multiply-adds of one image, from shapes alone."""
    shape = jax.ShapeDtypeStruct
    x = shape((1, *cfg.input_size, cfg.in_channels), jnp.float32)
    cond = {"label": shape((1,), jnp.int32)}
    variables = transformer.abstract_variables(cfg)
    found = flops.count(cfg.build().apply, variables, x, shape((1,), jnp.float32), cond)
    assert found.incomplete == ()
    return found.total / 2e9


def gradients(cfg: Any) -> Any:
    """A compiled function: variables -> (output, gradients of its square by the parameters)."""
    model, inputs = cfg.build(), batch(cfg)

    def loss(variables: Any) -> Any:
        y = model.apply(variables, *inputs)
        return jnp.square(y).mean(), y

    return jax.jit(lambda variables: jax.grad(loss, has_aux=True)(variables)[::-1])


def run_all(model: Any, variables: Any, inputs: Any, ks: tuple[int, ...]) -> Any:
    """(plain output, [(output, hidden tokens) after each of the layers]), to compile at once."""
    found = [model.apply(variables, *inputs, k) for k in ks]
    return model.apply(variables, *inputs), found


def close(a: Any, b: Any, rtol: float) -> None:
    """Leaf by leaf, relative to the leaf's largest value."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max()), a, b)


# ----------------------------------------------------------------------------------------- sizes

SIZES = {  # parameters on 16 x 16 x 32 with patch 1; the published ones rounded to 10 thousand
    "uvit_s": (44_788_768, 44.79), "uvit_m": (130_916_384, None), "uvit_l": (286_795_808, None),
    "uvit_h": (500_868_896, 500.87), "uvit_2b": (1_580_396_576, 1580.40),
    "uvit_3b": (3_107_725_344, 3107.73),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str) -> None:
    cfg = getattr(uvit, name)()
    shapes = transformer.abstract_variables(cfg)
    exact, published = SIZES[name]
    assert cfg.problems() == [] and transformer.count(shapes) == exact
    assert published is None or round(exact / 1e6, 2) == published
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


F64, F8 = (
    dict(in_channels=128, input_size=(8, 8)),
    dict(in_channels=4, input_size=(64, 64), patch=2),
)
F128 = dict(in_channels=512, input_size=(4, 4))
# billions of multiply-adds: of the releases, then of the table of denoisers at 512 px
MACS = [
    ("uvit_s", {}, 12.27), ("uvit_h", {}, 133.25), ("uvit_h", F64, 33.25), ("uvit_2b", {}, 414.91),
    ("uvit_2b", F64, 104.65), ("uvit_s", F8, 118.4 / 2), ("uvit_l", {}, 152.9 / 2),
    ("uvit_h", F8, 1164.7 / 2), ("uvit_s", F128, 1.61 / 2),
]  # fmt: skip


@pytest.mark.parametrize("name,fields,expected", MACS)
def test_work_of_a_forward_pass(name: str, fields: dict[str, Any], expected: float) -> None:
    # The published counts include the embedding of time or leave out the head's unused tokens.
    assert forward_macs(getattr(uvit, name)(**fields)) == pytest.approx(expected, rel=0.003)


def test_describe_counts_tokens_and_parameters() -> None:
    lines = uvit.uvit_h(in_channels=128, input_size=(8, 8)).describe()
    assert "8 x 8 x 128 -> 64 + 2 tokens of width 1152, 16 heads of 72, MLP 4608" in lines[0]
    assert any(re.fullmatch(r"  out_blocks: [\d,]+ parameters", line) for line in lines)


@pytest.mark.parametrize("name,fields", [("uvit", {}), ("uvit_all", {
    "qk_norm": True, "qkv_bias": True, "mlp": MLPKind.swiglu, "final_conv": True, "patch": 2,
})])  # fmt: skip
def test_parameter_paths_are_pinned(name: str, fields: dict[str, Any]) -> None:
    """Freezing, init_from and conversion name parameters by these paths."""
    golden(name, tiny(**fields))


# -------------------------------------------------------------------------------- initialisation


def test_initialisation_is_the_published_one() -> None:
    cfg = tiny(width=64, patch=2, num_classes=400)
    params = flatten(fresh(cfg, 1))
    seen = set()
    for path, value in params.items():
        name = path.rsplit("/", 1)[-1]
        seen.add(name if "patch_embed" not in path else f"patch_{name}")
        if "patch_embed" in path:  # U(-1/4, 1/4): 2 x 2 x 4 inputs
            assert 0.2 < np.abs(value).max() <= 0.25, path
        elif name == "embedding":  # 25,600 draws
            assert value.std() == pytest.approx(1.0, abs=0.02) and abs(value.mean()) < 0.03
        elif name in ("kernel", "pos_embed"):
            assert value.std() == pytest.approx(0.02, rel=0.1), path
            assert value.size < 5000 or np.abs(value).max() > 0.06, path  # the tails are not cut
        else:
            assert (value == (1.0 if name == "scale" else 0.0)).all(), path
    assert seen >= {"patch_kernel", "patch_bias", "kernel", "bias", "scale", "embedding"}


def test_layers_of_a_stack_start_from_different_weights() -> None:
    # not by rbg, which draws other numbers for each layer even from equal keys
    params = jax.jit(lambda k: transformer.init_variables(tiny(), k))(jax.random.key(0))["params"]
    kernel = params["in_blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.shape == (2, 32, 96) and np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_scan_and_remat_do_not_change_the_initial_weights() -> None:
    a, b = fresh(tiny()), fresh(tiny(scan=False, remat=Remat.full))
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------------------------------- stacks


@pytest.mark.parametrize("fields", [
    pytest.param({"scan": False}, marks=pytest.mark.slow),
    pytest.param({"remat": Remat.dots}, marks=pytest.mark.slow),
    {"scan": False, "remat": Remat.full},
], ids=str)  # fmt: skip
def test_scan_and_remat_change_neither_tree_nor_numbers(fields: dict[str, Any]) -> None:
    plain, cfg = tiny(), tiny(**fields)
    variables = init(plain)
    assert jax.tree.structure(transformer.abstract_variables(cfg)) == jax.tree.structure(variables)
    (y, grads), (again, again_grads) = (gradients(c)(variables) for c in (plain, cfg))
    np.testing.assert_allclose(again, y, atol=1e-6 * np.abs(y).max())
    close(again_grads, grads, 1e-5)  # sums over tokens in another order


@pytest.mark.slow
def test_remat_recomputes_what_it_says() -> None:
    """Multiply-adds of a gradient: weight products are recomputed by `full` alone."""
    cfg = tiny(width=64)
    work = {}
    for remat in Remat:
        for scan in (True, False):
            model, inputs = varied(cfg, remat=remat, scan=scan).build(), batch(cfg)
            grad = jax.grad(lambda v, m=model, i=inputs: jnp.square(m.apply(v, *i)).mean())
            work[remat, scan] = flops.count(grad, init(cfg)).total
            text = str(jax.make_jaxpr(grad)(init(cfg)))
            # of the middle block, which is in no scan, and of all when unrolled
            times = 0 if remat is Remat.none else 1 if scan else 5
            assert len(re.findall(r"prevent_cse=True", text)) == times
    block = flops.count(
        lambda p, x: Block(cfg.options()).apply({"params": p}, x),
        init(cfg)["params"]["mid_block"], jnp.zeros((3, 10, 64)),
    ).total  # fmt: skip
    scores = 3 * 10 * 10 * 64 * 2  # q k of one block; the product with v is saved
    skip = 2 * 3 * 10 * 128 * 64
    last = 2 * 3 * 10 * 256 * 64  # the result of fc2 is needed by no gradient
    for scan in (True, False):
        none, dots, full = (work[r, scan] for r in (Remat.none, Remat.dots, Remat.full))
        assert dots - none == 5 * scores
        assert full - none == 5 * (block - last) + 2 * skip


@pytest.mark.parametrize("scan", [True, False])
def test_hidden_tokens_are_those_after_a_layer(scan: bool) -> None:
    cfg = tiny(scan=scan)
    variables, inputs, model = init(cfg), batch(cfg), cfg.build()
    params = variables["params"]

    @jax.jit
    def by_hand() -> Any:
        """All layers one after the other, from [label, time, patches]."""
        x, t, cond = inputs
        patches = x.reshape(3, 8, 4) @ params["patch_embed"]["kernel"][0, 0]
        first = params["label_embed"]["embedding"][cond["label"]], transformer.sinusoid(t, 32)
        tokens = [*(f[:, None] for f in first), patches + params["patch_embed"]["bias"]]
        tokens = jnp.concatenate(tokens, axis=1) + params["pos_embed"]
        block, after, skips = Block(cfg.options()), [], []
        for i in range(2):
            one = jax.tree.map(lambda p, i=i: p[i], params["in_blocks"])
            tokens = block.apply({"params": one}, tokens)
            after.append(tokens)
            skips.append(tokens)
        tokens = block.apply({"params": params["mid_block"]}, tokens)
        after.append(tokens)
        for i in range(2):
            one = jax.tree.map(lambda p, i=i: p[i], params["out_blocks"])
            tokens = block.apply({"params": one}, tokens, skips.pop())
            after.append(tokens)
        return after

    ks = (1, 2, 3, 4, 5) if scan else (1, 4)
    expected = by_hand()
    plain, found = jax.jit(lambda v: run_all(model, v, inputs, ks))(variables)
    for k, (y, hidden) in zip(ks, found, strict=True):
        assert hidden.shape == (3, 8, 32) and hidden.dtype == jnp.float32
        np.testing.assert_allclose(hidden, expected[k - 1][:, 2:], atol=2e-5)
        np.testing.assert_allclose(y, plain, atol=2e-5)
    with pytest.raises(UserError, match="layers 1 to 5"):
        jax.eval_shape(lambda v: model.apply(v, *inputs, 6), variables)


def mesh_agrees(cfg: Any) -> None:
    """Output and gradients on 2 x 4 devices with sharded parameters are those of one device."""
    variables = init(cfg)
    model, (x, t, cond) = cfg.build(), batch(cfg, 8)

    def loss(variables: Any, x: Any, t: Any, cond: Any) -> Any:
        y = model.apply(variables, x, t, cond)
        return jnp.square(y).mean(), y

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    alone = run(variables, x, t, cond)
    setting = MeshConfig(data=2, fsdp=4)
    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        placed = jax.device_put(
            variables, state_shardings(transformer.abstract_variables(cfg), mesh, setting)
        )
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        together = run(placed, *jax.device_put((x, t, cond), rows))
    assert any("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(placed))
    close(together, alone, 1e-5)


@pytest.mark.slow
def test_a_mesh_changes_no_number() -> None:
    mesh_agrees(tiny(width=64))


# -------------------------------------------------------------------------------------- switches


def test_patches_are_cut_and_joined_row_by_row() -> None:
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = transformer.patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    # token 4 of 2 x 3: rows 2-3, columns 2-3; inside it row, column, channel
    np.testing.assert_array_equal(tokens[0, 4], x[0, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(transformer.unpatchify(tokens, 2, 3, 2), x)


def test_adaptive_channels_equal_zeroed_channels() -> None:
    cfg = tiny(adaptive_channels=True)
    model, variables, (x, t, cond) = cfg.build(), init(cfg), batch(cfg)
    cut = jax.jit(model.apply)(variables, x[..., :3], t, cond)
    whole = jax.jit(model.apply)(variables, x * (jnp.arange(4) < 3), t, cond)
    assert cut.shape == (3, 2, 4, 3)
    np.testing.assert_allclose(cut, whole[..., :3], atol=1e-5)
    with pytest.raises(UserError, match="5 channels and this network takes 1 to 4"):
        cfg.check_channels(5)


def test_bfloat16_activations_float32_outputs_and_softmax() -> None:
    cfg = tiny(dtype=Dtype.bfloat16)
    variables, inputs = init(cfg), batch(cfg)
    exact = jax.jit(tiny().build().apply)(variables, *inputs)
    found = jax.jit(cfg.build().apply)(variables, *inputs)
    assert found.dtype == jnp.float32
    # bf16 keeps 8 bits; some tens of roundings in a row
    assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 0.1
    text = str(jax.make_jaxpr(cfg.build().apply)(variables, *inputs))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general", text)
    exps = re.findall(r":(\w+)\[[\d,]*\] = exp ", text)
    assert set(exps) == {"f32"} and products.count("bf16") > 3 * products.count("f32")


def test_auto_takes_cudnn_where_its_limits_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, cudnn, xla = AttentionKernel.auto, AttentionKernel.cudnn, AttentionKernel.xla
    bf16, f32 = Dtype.bfloat16, Dtype.float32
    assert transformer.choose_kernel(auto, bf16, 64) is xla  # this is a CPU
    assert transformer.choose_kernel(cudnn, f32, 64) is cudnn  # as told
    monkeypatch.setattr(transformer, "_has_cudnn", lambda: True)
    cases = {(bf16, 64): cudnn, (bf16, 72): cudnn, (bf16, 128): cudnn, (bf16, 136): xla,
             (bf16, 36): xla, (f32, 64): xla}  # fmt: skip
    for case, expected in cases.items():
        assert transformer.choose_kernel(auto, *case) is expected, case
    used = []
    true = jax.nn.dot_product_attention

    def spy(*args: Any, implementation: str, **kwargs: Any) -> Any:
        used.append((implementation, args[0].dtype.name))
        return true(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    for cfg in (tiny(dtype=bf16), tiny()):
        jax.eval_shape(cfg.build().apply, transformer.abstract_variables(cfg), *batch(cfg))
        assert set(used) == {("cudnn", "bfloat16") if cfg.dtype is bf16 else ("xla", "float32")}
        used.clear()


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_norms_have_the_published_eps(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too small a number to be seen by the stored outputs, where variances are near 1."""
    x = jnp.array([[[size, -size, size, -size]]])
    ones, zeros = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, jnp.zeros((1, 1, 4))
    for eps, y in (
        (1e-5, transformer.LayerNorm().apply(ones, x)),
        (1e-6, transformer.HeadNorm().apply({"params": {"scale": jnp.ones(4)}}, x)),
        (1e-6, transformer.modulate(x, zeros, zeros, dit.EPS)),
    ):
        np.testing.assert_allclose(jnp.abs(y), size / np.sqrt(size**2 + eps), rtol=1e-6)


def test_dit_uses_its_eps_in_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    true = transformer.normalise
    monkeypatch.setattr(transformer, "normalise", lambda x, e: (used.append(e), true(x, e))[1])
    cfg = dit.DiTConfig(width=8, depth=1, heads=2, mlp_norm_eps=1e-5)
    jax.eval_shape(cfg.build().apply, transformer.abstract_variables(cfg), *batch(cfg))
    assert used[-3:] == [1e-6, 1e-5, 1e-6]  # attention, MLP, head


def test_a_scan_saves_no_inner_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither f32 copies inside norms and activations nor the rounded kernels of each layer."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # a CPU flattens some, stored twice
    cfg = tiny(width=64, heads=1, dtype=Dtype.bfloat16)
    model, inputs = cfg.build(), batch(cfg)
    grad = jax.grad(lambda v: jnp.square(model.apply(v, *inputs)).mean())
    jaxpr = jax.make_jaxpr(grad)(transformer.abstract_variables(cfg))
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan" and not e.params["reverse"]]
    saved = [o.aval for e in scans for o in e.outvars if o.aval.shape[:1] == (2,)]
    large = [s for s in saved if s.size >= 2 * 3 * 10 * 64]
    assert {s.dtype.name for s in large} == {"bfloat16"}
    assert {s.size // s.shape[-1] for s in large if s.shape[-1] >= 64} == {2 * 3 * 10}  # no kernel
    units = sum(s.size for s in large) / (2 * 3 * 10 * 64)
    # x, norm1, q, k, v, attention, x, norm2, fc1 (4), gelu (4): 16 a layer, twice; the skip kept,
    # and its join with x (2)
    assert units <= 2 * 16 + 3


def test_swiglu_has_about_as_many_parameters() -> None:
    hidden = [UViTConfig(width=w, mlp=MLPKind.swiglu).mlp_hidden for w in (384, 768, 1024, 1152)]
    assert hidden == [1024, 2048, 2752, 3072]  # 2/3 of 4 w, in multiples of 64
    assert tiny(mlp_ratio=2.0).mlp_hidden == 64


# -------------------------------------------------------------------------------------- messages


def test_a_label_that_does_not_exist_gives_nan() -> None:
    """Clamped, it would silently be the embedding of no class."""
    cfg = tiny()
    x, t, _ = batch(cfg)
    labels = {"label": jnp.array([5, 6, -1], jnp.int32)}  # 5: no class
    y = jax.jit(cfg.build().apply)(init(cfg), x, t, labels)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all() and np.isnan(y[2]).all()


def test_all_problems_at_once_each_with_its_mend() -> None:
    cfg = tiny(depth=0, heads=0, mlp_ratio=-1.0, remat="half", attention="flash")
    found = cfg.problems()
    for part in (
        "depth = 0; the smallest is 1", "heads = 0; the smallest is 1", "mlp_ratio = -1.0",
        "remat = 'half' is unknown; choose one of none, dots, full",
        "attention = 'flash' is unknown; choose one of auto, xla, cudnn",
    ):  # fmt: skip
        assert any(part in p for p in found), (part, found)
    assert len(found) == 5
    cfg = tiny(depth=3, heads=5, patch=3, final_conv=True, adaptive_channels=True)
    text = "\n".join(cfg.problems())
    assert "depth = 3 is odd" in text and "use 2 or 4" in text
    assert "not divisible by heads = 5; nearest: 4 heads" in text
    assert "height 2 (input_size) is not a multiple of patch = 3; nearest: 3\n" in text
    assert "width 4 (input_size) is not a multiple of patch = 3; nearest: 3 or 6\n" in text
    assert "adaptive_channels needs final_conv=False" in text
    with pytest.raises(UserError, match="this UViT cannot be built"):
        cfg.build()


def test_cudnn_where_it_cannot_work_is_refused() -> None:
    def text(**fields: Any) -> str:
        return "\n".join(tiny(attention=AttentionKernel.cudnn, **fields).problems())

    assert "needs dtype bfloat16 (now float32); use attention = auto or xla" in text()
    assert "multiples of 8 up to 128 (now 4)" in text(dtype=Dtype.bfloat16, heads=8)
    assert text(dtype=Dtype.bfloat16) == ""


def test_latents_that_do_not_fit_are_refused() -> None:
    cfg = tiny()
    variables, (x, t, cond) = transformer.abstract_variables(cfg), batch(cfg)
    for wrong, message in (
        (x[:, :, :2], "the latent is 2 x 2 and this UViT was built for 2 x 4"),
        (x[..., :3], "3 channels and this network takes 4; .* or adaptive_channels"),
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda v, w=wrong: cfg.build().apply(v, w, t, cond), variables)


def test_config_survives_json_and_strings_mean_enums() -> None:
    cfg = tiny(remat=Remat.dots, mlp=MLPKind.swiglu, attention=AttentionKernel.xla)
    again = config.from_json(config.to_json(cfg))
    assert again == cfg and again.remat is Remat.dots and again.input_size == (2, 4)
    plain = tiny(remat="dots", mlp="swiglu", attention="xla", dtype="float32")
    assert plain.problems() == []
    a, b = (transformer.abstract_variables(c) for c in (cfg, plain))
    assert a == b
