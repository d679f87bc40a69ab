"""FLOPs on the jaxpr against closed forms."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dcae_jax.nets import lpips
from dcae_jax.report import flops


def _abstract(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _conv(x, k, stride=1, pad="SAME", groups=1):
    return jax.lax.conv_general_dilated(
        x,
        k,
        (stride, stride),
        pad,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_matrix_products() -> None:
    product = flops.count(jnp.matmul, _abstract(5, 7, 11), _abstract(5, 11, 13))
    assert product.total == product.by_primitive["dot_general"] == 2 * 5 * 7 * 11 * 13
    assert product.incomplete == ()


@pytest.mark.parametrize("depth", [1, 9])
def test_a_scan_counts_its_length(depth: int) -> None:
    def run(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, length=depth)[0]

    assert flops.count(run, _abstract(4, 8), _abstract(8, 8)).total == depth * 2 * 4 * 8 * 8


def test_cond_counts_the_dearest_branch_and_while_says_so() -> None:
    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)

    one = 2 * 4 * 8 * 8
    assert flops.count(branch, _abstract(4, 8), _abstract(8, 8)).total == 2 * one

    def loop(x, w):
        return jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ w, x)

    looped = flops.count(loop, _abstract(4, 8), _abstract(8, 8))
    assert looped.total == one and looped.incomplete == ("while",)


def test_calls_are_entered() -> None:
    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    @jax.custom_jvp
    def own_jvp(x):
        return x

    own_jvp.defjvp(lambda p, t: (p[0], t[0]))
    one = 2 * 4 * 8 * 8
    x, w = _abstract(4, 8), _abstract(8, 8)
    assert flops.count(jax.jit(lambda x, w: jax.jit(own)(x, w)), x, w).total == one
    assert flops.count(lambda x, w: own_jvp(x @ w), x, w).total == one
    gradient = jax.grad(lambda x, w: own(x, w).sum(), argnums=(0, 1))
    # The forward product is not needed for the gradient of a sum: only the two of the vjp live.
    assert flops.count(gradient, x, w).total == 2 * one


def test_remat_counts_what_runs_again() -> None:
    def f(x, w):
        return jnp.sum(jnp.sin(jnp.sin(x @ w) @ w))

    plain = flops.count(jax.grad(f), _abstract(4, 8), _abstract(8, 8)).total
    again = flops.count(jax.grad(jax.checkpoint(f)), _abstract(4, 8), _abstract(8, 8)).total
    one = 2 * 4 * 8 * 8
    assert plain == 4 * one  # 2 forward, 2 backward
    assert again == plain  # under grad alone the first forward is dead; the second one runs
    value = jax.value_and_grad(jax.checkpoint(f))
    assert flops.count(value, _abstract(4, 8), _abstract(8, 8)).total == plain + 2 * one


def test_shard_map_counts_all_shards() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("a", None)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, axis_names={"a"}
    )
    def product(x, w):
        return x @ w

    assert flops.count(product, _abstract(16, 8), _abstract(8, 8)).total == 2 * 16 * 8 * 8


def test_dead_code_costs_nothing() -> None:
    def f(x, w):
        unused = x @ w @ w
        jax.lax.scan(lambda c, _: (c @ w, None), unused, length=3)
        return x @ w

    assert flops.count(f, _abstract(4, 8), _abstract(8, 8)).total == 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    "case",
    [
        # size, taps, out, stride, pad, lhs dilation, rhs dilation, expected
        (8, 3, 8, 1, (1, 1), 1, 1, 24),  # SAME: padding counts, as in closed forms
        (8, 3, 6, 1, (0, 0), 1, 1, 18),  # VALID
        (8, 3, 4, 2, (1, 1), 1, 1, 12),  # stride 2
        (5, 3, 3, 2, (1, 1), 1, 1, 9),  # stride 2, odd size
        (4, 3, 8, 1, (1, 2), 2, 1, 12),  # transpose of stride 2: no zeros counted
        (6, 3, 8, 1, (2, 2), 1, 1, 18),  # transpose of VALID: not more than VALID
        (9, 1, 5, 2, (0, 0), 1, 1, 5),  # gaps between windows
        (5, 1, 9, 1, (0, 0), 2, 1, 5),  # and their transpose
        (8, 4, 3, 1, (1, 1), 1, 2, 12),  # kernel gradient of stride 2
    ],
)
def test_pairs_along_one_dimension(case: tuple) -> None:
    assert flops._pairs(*case[:7]) == case[7]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pad", ["SAME", "VALID", ((1, 1), (1, 1))])
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("groups", [1, 6])
def test_a_convolution_and_its_two_gradients_cost_the_same(stride, pad, kernel, groups) -> None:
    x, k = _abstract(2, 12, 12, 6), _abstract(kernel, kernel, 6 // groups, 12)
    conv = functools.partial(_conv, stride=stride, pad=pad, groups=groups)
    out = jax.eval_shape(conv, x, k)
    forward = flops.count(conv, x, k).total
    assert forward == 2 * out.size * kernel * kernel * (6 // groups)
    for argument in (0, 1):
        gradient = jax.grad(lambda x, k: jnp.sum(conv(x, k) ** 2), argnums=argument)
        cost = flops.count(gradient, x, k).total - forward
        assert cost == forward


def test_transposed_convolution_counts_no_zeros() -> None:
    def up(x, k):
        return jax.lax.conv_transpose(x, k, (2, 2), "SAME")

    cost = flops.count(up, _abstract(1, 8, 8, 3), _abstract(4, 4, 3, 5)).total
    assert cost == 2 * (8 * 8) * (4 * 4) * 3 * 5  # every input meets every tap once
    for argument in (0, 1):
        gradient = jax.grad(lambda x, k: jnp.sum(up(x, k) ** 2), argnums=argument)
        both = flops.count(gradient, _abstract(1, 8, 8, 3), _abstract(4, 4, 3, 5)).total
        assert both == 2 * cost


@pytest.mark.parametrize("size,expected", [(256, 40.1e9), (512, 160e9), (1024, 641e9)])
def test_vgg16_features(size: int, expected: float) -> None:
    x = _abstract(1, size, size, 3)
    run = functools.partial(lpips.features, dtype=jnp.float32)
    cost = flops.count(lambda p, x: run(p, x), lpips.abstract_params(), x).total
    # Golden numbers of three digits; 2 sum(H W 9 Cin Cout) by hand is 40.1125e9 at 256 px.
    assert cost == pytest.approx(expected, rel=0.003)


def test_lpips_gradient_costs_three_forwards() -> None:
    x = _abstract(1, 256, 256, 3)
    loss = jax.grad(lambda x, p, y: lpips.lpips(p, x, y).sum())
    cost = flops.count(loss, x, lpips.abstract_params(), x).total
    # Features of the input and of the target, and one gradient with respect to the input.
    assert cost == pytest.approx(3 * 40.1e9, rel=0.005)


def test_patchgan_of_the_closed_forms() -> None:
    """The 64-wide, 3-layer PatchGAN by hand: 6.29 GF at 256 px, gradients twice that."""

    def net(params, x):
        for i, k in enumerate(params):
            x = jax.nn.leaky_relu(_conv(x, k, 2 if i < 3 else 1, ((1, 1), (1, 1))))
        return x

    widths = [3, 64, 128, 256, 512, 1]
    params = [_abstract(4, 4, a, b) for a, b in itertools.pairwise(widths)]
    for size, expected in ((256, 6.29e9), (512, 25.7e9), (1024, 103.9e9)):
        cost = flops.count(net, params, _abstract(1, size, size, 3)).total
        assert cost == pytest.approx(expected, rel=0.003)  # three digits
    x = _abstract(1, 256, 256, 3)
    both = jax.grad(lambda p, x: net(p, x).sum(), argnums=(0, 1))
    assert flops.count(both, params, x).total == pytest.approx(3 * 6.29e9, rel=0.003)


def test_numbers_are_of_shapes_not_memory() -> None:
    huge = _abstract(10**6, 10**6)
    assert flops.count(jnp.matmul, huge, huge).total == 2 * 10**18


@pytest.mark.parametrize(
    "kind,expected",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5", 459.0),
        ("TPU v6 lite", 918.0),
        ("cpu", None),
        ("NVIDIA L400", None),
        ("TPU v40", None),
    ],
)
def test_peaks(kind: str, expected: float | None) -> None:
    found = flops.peak(kind)
    assert (found and found.datasheet / 1e12) == expected


def test_mfu_names_its_peak() -> None:
    h200 = flops.peak("NVIDIA H200")
    share = flops.mfu(8 * 395e12, 1.0, 8, h200)
    assert share is not None and share.measured == pytest.approx(0.5)
    assert share.datasheet == pytest.approx(395 / 989.4)
    assert flops.mfu_line(8 * 395e12, 1.0, 8, h200) == (
        "MFU 39.9 % of 989 (datasheet), 50.0 % of 790 (measured)"
    )
    assert flops.mfu_line(1e12, 1.0, 1, flops.peak("cpu")) == "MFU n/a"
    assert flops.peak("NVIDIA A100-SXM4-80GB", "float32") == flops.Peak(156e12)
    with pytest.raises(ValueError, match="float16"):
        flops.peak("NVIDIA H200", "float16")


def test_the_count_agrees_with_a_numpy_convolution() -> None:
    """The number of multiplications a direct convolution does, padding included."""
    multiplications = 0
    padded = np.zeros((1, 7, 7, 2))
    kernel = np.zeros((3, 3, 2, 4))
    for i in range(0, 5, 2):
        for j in range(0, 5, 2):
            window = padded[0, i : i + 3, j : j + 3]
            multiplications += (window[..., None] * kernel).size
    conv = functools.partial(_conv, stride=2, pad=((1, 1), (1, 1)))
    cost = flops.count(conv, _abstract(1, 5, 5, 2), _abstract(3, 3, 2, 4)).total
    assert cost == 2 * multiplications


def test_cudnn_attention_counts_as_the_products_it_stands_for(monkeypatch) -> None:
    """Traced here as on a GPU; the plain form is counted by its products."""
    kernels = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda *_: True)
    q, k = (jax.ShapeDtypeStruct((3, n, 2, 64), jnp.bfloat16) for n in (64, 128))

    def gradient(fn):
        return jax.value_and_grad(fn, (0, 1, 2))

    def totals(kernel: str) -> list[int]:
        def attend(q, k, v):
            found = jax.nn.dot_product_attention(q, k, v, implementation=kernel)
            return found.astype(jnp.float32).sum()

        counted = [flops.count(f, q, k, k) for f in (attend, gradient(attend))]
        assert all(found.incomplete == () for found in counted)
        return [found.total for found in counted]

    forward = 2 * 2 * 3 * 2 * 64 * 128 * 64
    assert totals("cudnn") == totals("xla") == [forward, 3 * forward]
