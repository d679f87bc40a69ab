"""LMD agrees with PyTorch's masked autoencoder (stored values; see make_lmd_fixtures.py)."""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import mae_cases  # noqa: E402
import mae_ours  # noqa: E402
import weights  # noqa: E402

from dcae_jax.models.transformer import Remat  # noqa: E402

# Relative to the largest value of each.  float32 sums in another order: up to 5e-7 here.
TOLERANCE = 5e-6


@functools.cache
def fixture() -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "lmd.npz"))


@functools.cache
def compiled(name: str, **fields: Any) -> Any:
    return mae_ours.compiled(name, **fields)


def stored(name: str, found: dict[str, Any]) -> dict[str, np.ndarray]:
    """What of it the fixture has."""
    values = mae_ours.named(found)
    for key, value in values.items():
        if key.startswith("grad/"):
            at = weights.sample(f"{name}/{key}", value.size, 48)
            values[key] = value.reshape(-1)[at]
    return values


def errors(found: dict[str, np.ndarray], name: str) -> dict[str, float]:
    result = {}
    for key, value in found.items():
        want = fixture()[f"{name}/{key}"]
        assert value.shape == want.shape, key
        result[key] = float(np.abs(value - want).max() / np.abs(want).max())
    return result


@pytest.mark.parametrize("name", mae_cases.CASES)
def test_agrees_with_pytorch(name: str) -> None:
    found = errors(stored(name, compiled(name)(mae_ours.filled(name))), name)
    assert set(found) == {k.split("/", 1)[1] for k in fixture() if k.startswith(f"{name}/")}
    assert {k: error for k, error in found.items() if not error <= TOLERANCE} == {}


@pytest.mark.slow
@pytest.mark.parametrize("remat", Remat)
def test_agrees_unrolled_with_any_remat(remat: Remat) -> None:
    found = compiled("latents", scan=False, remat=remat)(mae_ours.filled("latents"))
    assert max(errors(stored("latents", found), "latents").values()) <= TOLERANCE


@pytest.mark.parametrize("name", mae_cases.CASES)
def test_every_single_weight_counts(name: str) -> None:
    """0.5 more at one place of any leaf of any layer is seen in the output.

    Not in the bias of a key, which adds the same to all scores of a query.
    """
    run, params = compiled(name), mae_ours.filled(name)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    unseen = []
    for i, (path, value) in enumerate(leaves):
        names = [k.key for k in path]
        for layer in range(len(value)) if "blocks" in names else [None]:
            changed = np.array(value)
            (changed if layer is None else changed[layer]).flat[-1] += 0.5
            rest = [v for _, v in leaves]
            y = run(jax.tree.unflatten(tree, [*rest[:i], changed, *rest[i + 1 :]]))["y"]
            want = fixture()[f"{name}/y"]
            if np.abs(np.asarray(y) - want).max() / np.abs(want).max() <= TOLERANCE:
                unseen.append(("/".join(names), layer))
    assert not unseen


def test_the_fixture_is_small_and_hard() -> None:
    assert (HERE / "lmd.npz").stat().st_size < 100_000
    for name, case in mae_cases.CASES.items():
        y = fixture()[f"{name}/y"]
        assert 0.1 < y.std() < 10 and case["keep"] < mae_cases.tokens(case)
        assert 0.1 < fixture()[f"{name}/loss"] < 10
