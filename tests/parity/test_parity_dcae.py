"""DC-AE agrees with the PyTorch original (stored outputs; see make_dcae_fixtures.py)."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax import tree
from dcae_jax.models import dcae
from dcae_jax.models.layers import Dtype, Norm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import weights  # noqa: E402

# Relative to the largest value.  float32 sums in another order differ by 1e-6 to 3e-6 in nets of
# this depth (two PyTorch implementations of DC-AE differ by 2.5e-6).
TOLERANCE = 5e-6
WIDTHS = (32, 32, 64, 64, 128)
SIZES = ((32, 32), (64, 96))


def config(name: str) -> dcae.DCAEConfig:
    """The narrow models of make_dcae_fixtures.py, derived from the released variants."""
    source, channels, encoder, decoder = {
        "in": (dcae.dc_ae_f32c32_in, 32, (0, 1, 2, 1, 1), (0, 1, 2, 1, 1)),
        "sana": (dcae.dc_ae_f32c32_sana, 32, (1,) * 5, (1,) * 5),
        "lite": (dcae.dc_ae_lite_f32c32_sana, 32, (1,) * 5, (0, 1, 1, 1, 1)),
        "1.5": (dcae.dc_ae_f32c128_1_5, 48, (0, 1, 1, 1, 1), (0, 1, 1, 1, 1)),
    }[name]
    cfg = dcae.narrow(
        source(), widths=WIDTHS, encoder_depths=encoder, decoder_depths=decoder,
        latent_channels=channels,
    )  # fmt: skip
    cfg.dtype = Dtype.float32
    return cfg


def filled(cfg: dcae.DCAEConfig) -> Any:
    """Variables from weights.py, as make_dcae_fixtures.py gave them to the original."""
    shapes = tree.flatten(dcae.abstract_variables(cfg))
    statistics = [p for p in shapes if p.startswith("batch_stats/")]
    batch_norms = {p.removeprefix("batch_stats/").rsplit("/", 1)[0] for p in statistics}

    def leaf(path: str, shape: tuple[int, ...]) -> jax.Array:
        small = weights.SMALL if weights.before_rms(path, batch_norms) else 1.0
        return jnp.asarray(weights.weight(path, shape) * np.float32(small))

    return tree.unflatten({path: leaf(path, like.shape) for path, like in shapes.items()})


def whole(
    model: dcae.DCAE, tag: str, size: tuple[int, int], gradient: bool = True
) -> Callable[[Any], dict[str, Any]]:
    """A compiled function of the variables that gives what the fixture has."""
    x = jnp.asarray(weights.normal(f"{tag}/x{fixture()[f'{tag}/image']}", (2, *size, 3)))
    dy = weights.normal(f"{tag}/dy", (2, *size, 3))

    def run(variables: Any) -> dict[str, Any]:
        def weighted(x: Any) -> Any:
            z = model.apply(variables, x, method="encode")
            y = model.apply(variables, z, method="decode")
            return (y * dy).sum(), (z, y)

        if not gradient:
            _, (z, y) = weighted(x)
            return {"z": z, "y": y}
        dx, (z, y) = jax.grad(weighted, has_aux=True)(x)
        return {"z": z, "y": y, "dx": dx}

    return jax.jit(run)


@functools.cache
def fixture() -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "dcae.npz"))


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", ["in", "sana", "lite", "1.5"])
def test_agrees_with_the_pytorch_original(name: str, size: tuple[int, int]) -> None:
    cfg, tag = config(name), f"{name}/{size[0]}x{size[1]}"
    found = whole(cfg.build(), tag, size)(filled(cfg))
    worst = weights.errors(found, tag, fixture())
    assert max(worst.values()) <= TOLERANCE, worst


@pytest.mark.parametrize("name", ["in", "sana", "lite", "1.5"])
def test_one_percent_of_any_tensor_is_noticed(name: str) -> None:
    """Any leaf times 1.01, statistics included, leaves the tolerance."""
    tag, size = f"{name}/64x96", (64, 96)
    cfg = config(name)
    run = whole(cfg.build(), tag, size, gradient=False)
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(filled(cfg)).items()}
    unseen = {}
    for path, leaf in leaves.items():
        changed = tree.unflatten({**leaves, path: leaf * np.float32(1.01)})
        worst = max(weights.errors(run(changed), tag, fixture()).values())
        if worst <= TOLERANCE:
            unseen[path] = worst
    assert not unseen


def test_fixtures_are_small_and_hard() -> None:
    """Under 1 MB, statistics far from the defaults, values of sane scale."""
    assert (HERE / "dcae.npz").stat().st_size < 1_000_000
    stats = filled(config("in"))["batch_stats"]
    assert config("in").decoder.norms[1] is Norm.batch
    norms = [stats["decoder"]["stage_1"], *[stats["decoder"]["stage_2"]] * 2]
    for i, stage in zip((0, 0, 1), norms, strict=True):
        norm = stage[f"block_{i}"]["norm"]
        assert jnp.abs(norm["mean"]).max() > 0.2 and jnp.abs(norm["var"] - 1).max() > 0.3
    for key in (k for k in fixture() if not k.endswith("/image")):
        value = fixture()[key]
        assert 0.1 < np.sqrt(np.mean(value**2)) < 10, key
