"""UViT and DiT agree with PyTorch (stored outputs; see make_diffusion_fixtures.py)."""

import functools
import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.models import transformer
from dcae_jax.models.dit import DiTConfig, Position
from dcae_jax.models.layers import Dtype
from dcae_jax.models.transformer import MLPKind, Remat
from dcae_jax.models.uvit import UViTConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import weights  # noqa: E402

# Relative to the largest value.  float32 sums in another order give 3e-7 to 3e-6 here.
TOLERANCE = 1e-5
STACKS = ("in_blocks", "out_blocks", "blocks")
COMMON = dict(width=32, heads=4, num_classes=10, dtype=Dtype.float32)
LABELS = jnp.array([0, 10, 3], jnp.int32)
DISCRETE, FLOW, DDPM = (1.0, 517.25, 1000.0), (0.0, 0.3, 1.0), (0.0, 517.0, 999.0)
MODERN = dict(mlp=MLPKind.swiglu, position=Position.rope, qk_norm=True)

UVIT, DIT = partial(UViTConfig, **COMMON), partial(DiTConfig, **COMMON)
SIT = partial(DIT, learn_variance=False)

# the networks of make_diffusion_fixtures.py: config, channels given, times
CASES = {
    "uvit/published": (UVIT(in_channels=4, input_size=(4, 6), depth=4), 4, DISCRETE),
    "uvit/patches": (
        UVIT(in_channels=3, input_size=(4, 8), patch=2, depth=2, final_conv=True), 3, DISCRETE
    ),
    "uvit/adaptive": (
        UVIT(in_channels=6, input_size=(4, 4), patch=2, depth=2, adaptive_channels=True), 2, FLOW
    ),
    "dit/original": (DIT(in_channels=4, input_size=(8, 8), patch=2, depth=3), 4, DDPM),
    "dit/diffusers": (
        DIT(in_channels=5, input_size=(4, 4), depth=2, time_shift=1, mlp_norm_eps=1e-5), 5, DDPM
    ),
    "dit/flow": (
        SIT(in_channels=3, input_size=(4, 6), patch=2, depth=2, adaptive_channels=True), 2, FLOW
    ),
    "dit/modern": (SIT(in_channels=4, input_size=(6, 4), depth=3, **MODERN), 4, FLOW),
}  # fmt: skip


def leaf(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """One leaf from weights.py; layer i of a stack has its own path."""
    names = [k.key for k in path]
    if names[1] not in STACKS:
        return jnp.asarray(weights.weight("/".join(names), like.shape))
    parts = [
        weights.weight("/".join([*names[:2], str(i), *names[2:]]), like.shape[1:])
        for i in range(like.shape[0])
    ]
    return jnp.asarray(np.stack(parts))


@functools.cache
def filled(name: str) -> Any:
    shapes = transformer.abstract_variables(CASES[name][0])
    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def fixture() -> dict[str, np.ndarray]:
    return {**np.load(HERE / "uvit.npz"), **np.load(HERE / "dit.npz")}


@functools.cache
def compiled(name: str, scan: bool = True, remat: Remat = Remat.none) -> Any:
    """A function of the variables that gives what the fixture has."""
    cfg, channels, times = CASES[name]
    fields = {k: getattr(cfg, k) for k in cfg.__dataclass_fields__}
    model = type(cfg)(**{**fields, "scan": scan, "remat": remat}).build()
    original = fixture()[f"{name}/y"]
    x = weights.normal(f"{name}/x", (*original.shape[:3], channels))
    dy = weights.normal(f"{name}/dy", original.shape)

    def run(variables: Any) -> dict[str, Any]:
        def weighted(x: Any) -> Any:
            y = model.apply(variables, x, jnp.array(times), {"label": LABELS})
            return (y * dy).sum(), y

        dx, y = jax.grad(weighted, has_aux=True)(jnp.asarray(x))
        return {"y": y, "dx": dx}

    return jax.jit(run)


def worst(found: dict[str, Any], name: str) -> float:
    """max |difference| / max |original| of output and gradient."""
    pairs = [(np.asarray(v), fixture()[f"{name}/{k}"]) for k, v in found.items()]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_pytorch(name: str) -> None:
    assert worst(compiled(name)(filled(name)), name) <= TOLERANCE


WAYS = [(False, Remat.none), (True, Remat.full), (False, Remat.dots)]


@pytest.mark.parametrize("scan,remat", WAYS, ids=lambda v: getattr(v, "value", v))
@pytest.mark.parametrize("name", ["uvit/published", "dit/original"])
def test_agrees_scanned_or_not_with_any_remat(name: str, scan: bool, remat: Remat) -> None:
    assert worst(compiled(name, scan, remat)(filled(name)), name) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_every_single_weight_counts(name: str) -> None:
    """0.5 more at one place of each role of any leaf of any layer is seen by the parity test."""
    run, variables = compiled(name), filled(name)
    leaves, tree = jax.tree.flatten(variables)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
    unseen = []
    for i, path in enumerate(paths):
        for layer, column in places(path, leaves[i].shape, name):
            value = np.array(leaves[i])
            (value if layer is None else value[layer]).flat[column] += 0.5
            changed = jax.tree.unflatten(tree, [*leaves[:i], jnp.asarray(value), *leaves[i + 1 :]])
            if worst(run(changed), name) <= TOLERANCE:
                unseen.append((jax.tree_util.keystr(path), layer, column))
    assert not unseen


def places(path: Any, shape: tuple[int, ...], name: str) -> list[tuple[int | None, int]]:
    """(layer, column) of the changes: every 32nd column, so that q, k, v and each chunk get one.

    Without norms a key's bias adds the same to all scores of a query, which the softmax ignores.
    """
    names = [k.key for k in path]
    key = 32 if names[-2:] == ["qkv", "bias"] and not CASES[name][0].qk_norm else None
    columns = [c for c in range(0, shape[-1], 32) if c != key]
    return list(itertools.product(range(shape[0]) if names[1] in STACKS else [None], columns))


def test_fixtures_are_small_and_hard() -> None:
    """Under 100 KB, values of sane scale, a label of no class, times at both ends."""
    assert sum((HERE / f"{f}.npz").stat().st_size for f in ("uvit", "dit")) < 100_000
    assert {key.rsplit("/", 1)[0] for key in fixture()} == set(CASES)
    for key, value in fixture().items():
        assert 0.1 < np.sqrt(np.mean(value**2)) < 10, key
