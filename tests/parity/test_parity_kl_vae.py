"""AutoencoderKL agrees with the PyTorch original (stored outputs; see make_kl_fixtures.py)."""

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
from dcae_jax.models import kl_vae
from dcae_jax.models.dcae import abstract_variables
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.tasks.autoencode import Moments, divergence, sample

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import weights  # noqa: E402

# Relative to the largest value.  float32 sums in another order differ by 1e-6 to 3e-6 in nets of
# this depth, as in test_parity_dcae.py.
TOLERANCE = 5e-6
CASES = [("f4", (32, 32)), ("f4", (24, 40)), ("f16", (64, 96)), ("f4-plain", (16, 24))]


def config(name: str) -> KLVAEConfig:
    """The narrow models of make_kl_fixtures.py."""
    cfg = {
        "f4": KLVAEConfig(widths=(16, 16, 32), norm_groups=8),
        "f16": KLVAEConfig(
            latent_channels=8, widths=(16, 32, 32, 32, 64), layers_per_block=1, norm_groups=4,
            quant_conv=False,
        ),
        "f4-plain": KLVAEConfig(
            widths=(16, 16, 32), layers_per_block=1, norm_groups=8, mid_attention=False,
            quant_conv=False, post_quant_conv=False,
        ),
    }[name]  # fmt: skip
    cfg.dtype = Dtype.float32
    return cfg


def filled(cfg: KLVAEConfig) -> Any:
    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(weights.weight("/".join(k.key for k in path), like.shape))

    return jax.tree_util.tree_map_with_path(leaf, abstract_variables(cfg))


def whole(cfg: KLVAEConfig, name: str, size: tuple[int, int]) -> Callable[[Any], dict[str, Any]]:
    """A compiled function of the variables that gives everything the fixture has."""
    model, tag = cfg.build(), f"{name}/{size[0]}x{size[1]}"
    x, dy = (weights.normal(f"{tag}/{part}", (2, *size, 3)) for part in ("x", "dy"))
    noise = jnp.asarray(weights.normal(f"{tag}/noise", (2, *cfg.latent_shape(*size))))

    def run(variables: Any) -> dict[str, Any]:
        def weighted(x: Any) -> Any:
            latent = Moments(*model.apply(variables, x, method="moments"))
            y = model.apply(variables, sample(latent, noise), method="decode")
            return (y * dy).sum(), (latent, y)

        dx, (latent, y) = jax.grad(weighted, has_aux=True)(x)
        kl = divergence(latent).sum((1, 2, 3))
        return {"mean": latent.mean, "logvar": latent.logvar, "kl": kl, "y": y, "dx": dx}

    return jax.jit(run)


def errors(found: dict[str, Any], name: str, size: tuple[int, int]) -> dict[str, float]:
    return weights.errors(found, f"{name}/{size[0]}x{size[1]}", fixture())


@functools.cache
def fixture() -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "kl_vae.npz"))


@pytest.mark.parametrize(("name", "size"), CASES, ids=lambda v: str(v))
def test_agrees_with_the_pytorch_original(name: str, size: tuple[int, int]) -> None:
    cfg = config(name)
    worst = errors(whole(cfg, name, size)(filled(cfg)), name, size)
    assert max(worst.values()) <= TOLERANCE, worst


def test_query_rows_in_turns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond MAX_WEIGHTS the rows of the attention take turns, forwards and backwards."""
    cfg, size = config("f4"), (24, 40)  # 6 x 10 latent pixels
    monkeypatch.setattr(kl_vae, "MAX_WEIGHTS", 2 * 10 * 60)
    assert kl_vae._rows_at_once(6, 10) == 2
    run, variables = whole(cfg, "f4", size), filled(cfg)
    assert "scan" in str(jax.make_jaxpr(run)(variables))
    worst = errors(run(variables), "f4", size)
    assert max(worst.values()) <= TOLERANCE, worst


# The gradient of a softmax by the bias of its keys is zero: all weights of a query move alike.
NO_EFFECT = {f"params/{side}/mid/attn/k/bias" for side in ("encoder", "decoder")}


def test_every_single_weight_counts() -> None:
    """30 % more of one element of any leaf is seen by the parity test."""
    name, size = "f4", (24, 40)
    cfg = config(name)
    run, variables = whole(cfg, name, size), filled(cfg)
    flat = tree.flatten(variables)
    unseen = set()
    for path, old in flat.items():
        value = np.array(old)
        value[np.unravel_index(np.abs(value).argmax(), value.shape)] *= 1.3
        changed = tree.unflatten({**flat, path: jnp.asarray(value)})
        if max(errors(run(changed), name, size).values()) <= TOLERANCE:
            unseen.add(path)
    assert unseen == NO_EFFECT


def test_fixtures_are_small_and_hard() -> None:
    """Well under 300 kB, values of sane scale, no log variance at its limits."""
    assert (HERE / "kl_vae.npz").stat().st_size < 300_000
    for key, value in fixture().items():
        if value.dtype == np.float32 and not key.endswith("kl"):
            assert 0.03 < np.sqrt(np.mean(value**2)) < 10, key
        if key.endswith("logvar"):
            assert np.abs(value).max() < 10, key


def test_sd_vae_has_the_paths_and_shapes_of_the_original() -> None:
    """Every tensor of the full-size original has its leaf, and no leaf is left over."""

    def torch_style(path: str, shape: tuple[int, ...]) -> str:
        path = path.removeprefix("params/")
        if len(shape) == 4:
            shape = (shape[3], shape[2], *shape[:2])
        elif len(shape) == 2:  # a Linear in the attention, a 1x1 convolution elsewhere
            shape = (shape[1], shape[0], *(() if "/attn/" in path else (1, 1)))
        return f"{path.replace('/kernel', '/weight').replace('/scale', '/weight')} {shape}"

    shapes = tree.flatten(abstract_variables(kl_vae.sd_vae_f8()))
    ours = sorted(torch_style(path, leaf.shape) for path, leaf in shapes.items())
    assert ours == fixture()["sd-vae"].tolist()
    assert sum(leaf.size for leaf in shapes.values()) == 83_653_863
