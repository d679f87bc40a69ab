"""MD-UViT: equal to a UViT where nothing is masked, to a model by hand where something is."""

import copy
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from dcae_jax import masking
from dcae_jax.errors import UserError
from dcae_jax.masking import Split
from dcae_jax.models import md_uvit, transformer, uvit
from dcae_jax.models.layers import Dtype
from dcae_jax.models.md_uvit import Fill, MDUViTConfig
from dcae_jax.models.uvit import Block, UViTConfig
from dcae_jax.report import flops
from dcae_jax.tree import flatten, unflatten

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = dict(
    in_channels=4, input_size=(4, 4), width=16, depth=6, heads=2, num_classes=5,
    dtype=Dtype.float32,
)  # fmt: skip
KEEP = 6


def tiny(k_in: int = 0, k_out: int = 2, fill: Fill = Fill.mask, **fields: Any) -> MDUViTConfig:
    """Three pairs of blocks and the middle one on 16 tokens."""
    head = k_out > 0 and fill is Fill.mask
    return MDUViTConfig(**{
        **SIZE, "k_in": k_in, "k_out": k_out, "fill": fill, "recon_head": head, **fields
    })  # fmt: skip


def plain(cfg: MDUViTConfig) -> UViTConfig:
    names = [f.name for f in dataclasses.fields(UViTConfig)]
    return UViTConfig(**{n: getattr(cfg, n) for n in names})


def batch(n: int = 3) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(5))
    label = jnp.arange(n, dtype=jnp.int32)
    x = jax.random.normal(keys[0], (n, 4, 4, 4))
    return x, 1000 * jax.random.uniform(keys[1], (n,)), {"label": label}


def shaken(cfg: MDUViTConfig) -> Any:
    """Random parameters: a fresh network hides what starts at 0 or 1."""
    g = np.random.default_rng(0)
    shapes = flatten(transformer.abstract_variables(cfg))
    flat = {
        p: ("scale" in p) + 0.2 * g.standard_normal(s.shape).astype(np.float32)
        for p, s in shapes.items()
    }
    return jax.tree.map(jnp.asarray, unflatten(flat))


def order(n: int = 3) -> np.ndarray:
    g = np.random.default_rng(1)
    return np.stack([g.permutation(16) for _ in range(n)]).astype(np.int32)


def split(keep: int = KEEP, n: int = 3) -> Split:
    return masking.split(jnp.asarray(order(n)), keep)


# Quick to compile, slow to run.


def masked_apply(cfg: MDUViTConfig) -> Any:
    model = cfg.build()
    return jax.jit(lambda v, inputs: model.apply(v, *inputs, split=split()))


# ------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("name", ["s", "h", "2b"])
def test_extra_parameters_are_one_head_and_a_few_tokens(name: str) -> None:
    """P (D + 1) + D (1 + k_out), beside those of the UViT: 40,352 of H's 501 M."""
    cfg = getattr(md_uvit, f"md_uvit_{name}")()
    size = getattr(uvit, f"uvit_{name}")()
    mine, base = (transformer.count(transformer.abstract_variables(c)) for c in (cfg, size))
    assert mine - base == 32 * (cfg.width + 1) + cfg.width * 3
    assert name != "h" or mine - base == 40_352
    assert cfg.problems() == [] and (cfg.k_in, cfg.k_out, cfg.fill) == (0, 2, Fill.mask)


def test_parameter_paths_are_those_of_a_uvit_and_pinned() -> None:
    cfg = tiny()
    found, base = (flatten(transformer.abstract_variables(c)) for c in (cfg, plain(cfg)))
    assert {p: base[p].shape for p in base} == {p: found[p].shape for p in base}
    text = "".join(f"{path} {leaf.shape}\n" for path, leaf in found.items())
    assert text == (GOLDEN / "params_md_uvit.txt").read_text(), text
    for without in (tiny(2, 2, Fill.carry), tiny(1, 0), tiny(0, 0)):
        assert flatten(transformer.abstract_variables(without)).keys() == base.keys()


@pytest.mark.slow
def test_a_fresh_network_has_the_weights_of_a_fresh_uvit() -> None:
    key = jax.random.key(0, impl="rbg")  # quicker to compile
    a, b = (
        flatten(jax.jit(functools.partial(transformer.init_variables, c))(key))
        for c in (tiny(), plain(tiny()))
    )
    for path, value in b.items():
        np.testing.assert_array_equal(a[path], value, err_msg=path)
    assert not a["params/skip_tokens"].any() and a["params/mask_token"].any()
    assert a["params/recon_head/kernel"].std() == pytest.approx(0.02, rel=0.4)  # 64 draws


# ---------------------------------------------------------------------------------------- numbers


def test_with_nothing_masked_it_is_the_uvit_bit_for_bit() -> None:
    cfg = tiny()
    variables, inputs = shaken(cfg), batch()
    model, base = cfg.build(), plain(cfg).build()
    shared = {"params": {k: variables["params"][k] for k in transformer.abstract_variables(
        plain(cfg))["params"]}}  # fmt: skip
    expected = jax.jit(base.apply)(shared, *inputs)
    whole = jax.jit(lambda v: model.apply(v, *inputs, split=split(16)))
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, *inputs), expected)
    np.testing.assert_array_equal(whole(variables).output, expected)
    hidden = [
        jax.jit(lambda v, m=m: m.apply(v, *inputs, 4)[1])(v)
        for m, v in ((model, variables), (base, shared))
    ]
    np.testing.assert_array_equal(*hidden)


def by_hand(cfg: MDUViTConfig, params: Any, inputs: Any) -> Any:
    """After the last block: block by block, visible tokens sorted."""
    x, t, cond = inputs
    b, half = x.shape[0], cfg.depth // 2
    patches = x.reshape(b, 16, 4) @ params["patch_embed"]["kernel"][0, 0]
    first = params["label_embed"]["embedding"][cond["label"]], transformer.sinusoid(t, cfg.width)
    tokens = [*(f[:, None] for f in first), patches + params["patch_embed"]["bias"]]
    tokens = jnp.concatenate(tokens, axis=1) + params["pos_embed"]
    visible = visible_places() + 2
    places = np.concatenate([np.tile([0, 1], (b, 1)), visible], axis=1)
    rows = np.arange(b)[:, None]

    def block(name: str, i: int, x: Any, *skip: Any) -> Any:
        one = params[name] if i < 0 else jax.tree.map(lambda p: p[i], params[name])
        return Block(cfg.options()).apply({"params": one}, x, *skip)

    def lift(fill: Any, x: Any) -> Any:
        return jnp.broadcast_to(fill, (b, 18, cfg.width)).at[rows, places].set(x)

    kept = []
    for i in range(half):
        if i == cfg.k_in:
            route, tokens = tokens, tokens[rows, places]
        tokens = block("in_blocks", i, tokens)
        kept.append(tokens)
    if cfg.k_in == half:
        route, tokens = tokens, tokens[rows, places]
    tokens = block("mid_block", -1, tokens)
    for j in range(half):
        if cfg.k_out and j == half - cfg.k_out:
            mask = cfg.fill is Fill.mask
            fill = params["mask_token"] + params["pos_embed"] if mask else route
            tokens = lift(fill, tokens)
        skip = kept.pop()
        if skip.shape[1] < tokens.shape[1]:
            skip = lift(params["skip_tokens"][j - (half - cfg.k_out)], skip)
        elif skip.shape[1] > tokens.shape[1]:
            skip = skip[rows, places]
        tokens = block("out_blocks", j, tokens, skip)
    return tokens


def visible_places() -> np.ndarray:
    return np.sort(order()[:, :KEEP], axis=1)


SHAPES = {
    "LMD": tiny(), "all out": tiny(0, 3), "visible": tiny(0, 0), "mixer": tiny(2, 0),
    "mixer of all": tiny(3, 0), "route": tiny(2, 2, Fill.carry), "all route": tiny(3, 3, Fill.carry)
}  # fmt: skip
QUICK = ("LMD", "mixer", "route")


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [
    n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES
])  # fmt: skip
def test_masked_tokens_go_through_the_blocks_that_see_them(name: str, scan: bool) -> None:
    cfg = copy.copy(SHAPES[name])
    cfg.scan = scan
    variables, inputs = shaken(cfg), batch()
    params = variables["params"]
    found = masked_apply(cfg)(variables, inputs)
    y = jax.jit(lambda p: by_hand(cfg, p, inputs))(params)
    y = np.asarray(y, np.float64)[:, 2:]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = y * params["norm"]["scale"] + params["norm"]["bias"]
    for head, out in (("head", found.output), ("recon_head", found.recon)):
        if head not in params:
            assert out is None
            continue
        expected = y @ params[head]["kernel"] + params[head]["bias"]
        if not cfg.k_out:  # nothing is said of masked tokens
            said, expected = expected, np.zeros((3, 16, 4))
            expected[np.arange(3)[:, None], visible_places()] = said
        # f32 against f32 in another order of the tokens, seven blocks; outputs are about 1
        np.testing.assert_allclose(out.reshape(3, 16, 4), expected, atol=3e-5)


@pytest.mark.parametrize("name", ["LMD", "visible", "route"])
def test_masked_tokens_are_blind_unless_they_are_carried(name: str) -> None:
    """The gradient of all outputs by the input is exactly 0 at masked tokens."""
    cfg = SHAPES[name]
    model, variables, (x, t, cond) = cfg.build(), shaken(cfg), batch()

    @jax.jit
    def gradient(x: jax.Array) -> jax.Array:
        def loss(x: jax.Array) -> jax.Array:
            found = model.apply(variables, x, t, cond, split=split())
            return sum(jnp.sum(jnp.sin(y)) for y in found if y is not None)

        return jnp.abs(jax.grad(loss)(x)).reshape(3, 16, 4).max(-1)

    found, masked = np.asarray(gradient(x)), np.asarray(split().masked())
    assert found[~masked].min() > 0
    if cfg.fill is Fill.carry:
        assert found[masked].min() > 0
    else:
        assert not found[masked].any()


def test_labels_and_times_are_never_masked() -> None:
    """The reconstruction from one visible token depends on the label and the time."""
    cfg = tiny()
    variables, (x, t, cond) = shaken(cfg), batch()
    apply = masked_apply(cfg)
    base = apply(variables, (x, t, cond)).recon
    for changed in ((x, t + 7, cond), (x, t, {"label": cond["label"] + 1})):
        moved = np.abs(apply(variables, changed).recon - base)
        assert moved.max(axis=(1, 2, 3)).min() > 1e-3


# ------------------------------------------------------------------------------------------- work

LENGTHS = [(0, 0), (0, 2), (2, 2), (0, 7)]
# Share of the full UViT's FLOPs, by (size, tokens a side, masked share), for each of LENGTHS.
RATIOS = {
    ("h", 16, 0.15): (0.845, 0.856, 0.866, 0.885), ("h", 16, 0.25): (0.746, 0.765, 0.781, 0.812),
    ("h", 16, 0.40): (0.593, 0.623, 0.649, 0.699), ("h", 16, 0.50): (0.496, 0.533, 0.565, 0.627),
    ("h", 16, 0.625): (0.372, 0.419, 0.459, 0.535), ("h", 16, 0.75): (0.249, 0.305, 0.353, 0.445),
    ("h", 8, 0.50): (0.513, 0.549, 0.581, 0.640), ("h", 8, 0.75): (0.271, 0.325, 0.372, 0.461),
    ("s", 16, 0.50): (0.486, 0.571, 0.645, 0.613), ("s", 16, 0.75): (0.242, 0.368, 0.477, 0.430),
}  # fmt: skip


def forward(cfg: UViTConfig, keep: int = 0) -> int:
    """FLOPs of one image, from shapes; every head that there is."""
    shape = jax.ShapeDtypeStruct
    tokens = cfg.input_size[0] * cfg.input_size[1]
    x = shape((1, *cfg.input_size, cfg.in_channels), jnp.float32)
    model, variables = cfg.build(), transformer.abstract_variables(cfg)

    def run(v: Any, x: Any, t: Any, label: Any, order: Any) -> Any:
        more = {"split": masking.split(order, keep)} if keep else {}
        return model.apply(v, x, t, {"label": label}, **more)

    found = flops.count(
        run, variables, x, shape((1,), jnp.float32), shape((1,), jnp.int32),
        shape((1, tokens), jnp.int32),
    )  # fmt: skip
    assert found.incomplete == ()
    return found.total


def sized(size: str, side: int, k_in: int, k_out: int) -> MDUViTConfig:
    channels = {16: 32, 8: 128}[side]
    carry = k_in > 0
    return getattr(md_uvit, f"md_uvit_{size}")(
        input_size=(side, side), in_channels=channels, k_in=k_in, k_out=k_out,
        fill=Fill.carry if carry else Fill.mask, recon_head=k_out > 0 and not carry,
    )  # fmt: skip


def formula(cfg: MDUViTConfig, keep: int) -> float:
    """Of the report on masked models: blocks 24 n D^2 + 4 n^2 D, skips 4 n D^2, the linear ends."""
    tokens = cfg.input_size[0] * cfg.input_size[1]
    full, some, d, half = tokens + 2, keep + 2, cfg.width, cfg.depth // 2

    def block(n: int) -> int:
        return 24 * n * d**2 + 4 * n**2 * d

    read = (1 + cfg.recon_head) * (tokens if cfg.k_out else keep)
    ends = 2 * d * cfg.in_channels * (tokens + read)
    outer = cfg.k_in + cfg.k_out
    return (
        (cfg.depth + 1 - outer) * block(some) + outer * block(full)
        + 4 * d**2 * ((half - cfg.k_out) * some + cfg.k_out * full) + ends
    )  # fmt: skip


CHEAP = [("h", 16, 0.50), ("h", 8, 0.75), ("s", 16, 0.75)]


@pytest.mark.parametrize(
    ("size", "side", "ratio"),
    [row if row in CHEAP else pytest.param(*row, marks=pytest.mark.slow) for row in RATIOS],
)
def test_work_of_the_published_sizes(size: str, side: int, ratio: float) -> None:
    """Counted on the jaxpr of the full size, without memory."""
    keep = math.floor(side**2 * (1 - ratio))
    base = forward(getattr(uvit, f"uvit_{size}")(
        input_size=(side, side), in_channels={16: 32, 8: 128}[side]
    ))  # fmt: skip
    for (k_in, k_out), expected in zip(LENGTHS, RATIOS[size, side, ratio], strict=True):
        if size == "s" and k_out == 7:
            k_out = 3
        cfg = sized(size, side, k_in, k_out)
        found = forward(cfg, keep)
        assert found == pytest.approx(formula(cfg, keep), rel=0.001)  # 0.03 would be enough
        # The table's ratios have three digits and leave out the ends (and a second head).
        assert found / base == pytest.approx(expected, abs=0.003), (k_in, k_out)


def scans(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from scans(inner)


def sizes(jaxpr: Any) -> set[int]:
    """Every dimension of every value of a jaxpr, inside calls too."""
    found = {d for eqn in jaxpr.eqns for v in eqn.outvars for d in v.aval.shape}
    for eqn in jaxpr.eqns:
        for inner in jex.jaxprs_in_params(eqn.params):
            found |= sizes(inner)
    return found


@pytest.mark.parametrize(("name", "expected"), [
    ("visible", [(3, False), (3, False)]), ("LMD", [(3, False), (1, False), (2, True)]),
    ("route", [(2, True), (1, False), (1, False), (2, True)]),
])  # fmt: skip
def test_the_trunk_never_sees_the_full_length(name: str, expected: list[tuple[int, bool]]) -> None:
    """(layers, whether any value has the full length) of each scan, in order."""
    cfg = SHAPES[name]
    inputs = batch(5)  # no dimension of which is 16 or 18 by chance: width 24, MLP 96
    cfg = tiny(cfg.k_in, cfg.k_out, cfg.fill, width=24)
    model, variables = cfg.build(), transformer.abstract_variables(cfg)
    jaxpr = jax.make_jaxpr(
        lambda v: model.apply(v, *inputs, split=split(n=5))
    )(variables)  # fmt: skip
    found = [
        (eqn.params["length"], bool(sizes(eqn.params["jaxpr"].jaxpr) & {16, 18}))
        for eqn in scans(jaxpr.jaxpr)
    ]
    assert found == expected


# --------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "not blind": (dict(k_in=1), "fill = mask with k_out = 2 needs k_in = 0, not 1"),
    "carry": (dict(fill=Fill.carry, recon_head=False), "k_in = 0 and k_out = 2: each skip joins"),
    "carry none": (dict(fill=Fill.carry, k_out=0, recon_head=False), "the same number from 1 on"),
    "carry head": (dict(fill=Fill.carry, k_in=2), "recon_head with fill = carry has nothing to"),
    "head": (dict(k_out=0), "recon_head needs k_out of 1 or more"),
    "k_out": (dict(k_out=4), "k_out = 4; 3 blocks stand on each side of the middle one: 0 to 3"),
    "k_in": (dict(k_in=-1), "k_in = -1; 3 blocks"),
    "convolution": (dict(final_conv=True), "final_conv mixes tokens"),
    "fill": (dict(fill="zero"), "fill = 'zero' is unknown; choose mask or carry"),
    "patch": (dict(patch=3), "not a multiple of patch = 3"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_with_their_mend(fields: dict[str, Any], said: str) -> None:
    cfg = MDUViTConfig(**SIZE)
    for name, value in fields.items():  # as the command line sets them: unchecked
        setattr(cfg, name, value)
    with pytest.raises(UserError, match=f"this MD-UViT cannot be built:(.|\n)*{said}"):
        cfg.build()
