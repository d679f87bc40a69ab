"""The official classes of every network, an eighth as wide, where their package is at hand."""

from pathlib import Path
from typing import Any

import numpy as np
import official
import original
import ours
import pytest
import safetensors.torch
import torch

from dcae_jax.convert import from_torch, names
from dcae_jax.models import dcae
from dcae_jax.models.layers import Dtype

pytestmark = pytest.mark.skipif(
    not official.is_here(), reason="no dc_gen: `make parity OFFICIAL=FOLDER` compares with it too"
)
VALUES = 5e-6  # as in test_live_models.py
SIZES = (128, 256)
NETWORKS = [*official.RELEASES]


def narrow(name: str) -> tuple[Any, dcae.DCAEConfig]:
    """The official network and our config of it, both an eighth as wide."""
    release = official.RELEASES[name][0]
    latent_divisor = 8 if name == "f128c512-in" else 1
    ours_by_release = {
        "dc-ae-f32c128-1.5": "dc-ae-1.5-f32c128", "dc-ae-f64c128-1.5": "dc-ae-1.5-f64c128",
    }  # fmt: skip
    cfg = dcae.VARIANTS[ours_by_release.get(release, release)]()
    cfg = dcae.narrow(cfg, divisor=8, latent_channels=cfg.latent_channels // latent_divisor)
    cfg.dtype = Dtype.float32
    return original.fill(official.build(release, 8, latent_divisor)), cfg


@pytest.mark.parametrize("name", NETWORKS)
def test_official_class(compare: Any, name: str, tmp_path: Path) -> None:
    """Values at both sizes; exported in the official layout and loaded by it: the same bits."""
    model, cfg = narrow(name)
    state = model.state_dict()
    tensors = {key: tensor.numpy() for key, tensor in state.items()}
    variables = ours.from_state(cfg, tensors, names.Layout.official)
    for size in SIZES:
        x = original.normal(f"{name} official {size}", 1, size, size, 3)
        z = original.run(model.encode, x)
        y = original.run(model.decode, z)
        compare(
            f"{name} / 8, official", f"{size} px", VALUES,
            latent=(ours.encode(cfg, variables, x), z),
            reconstruction=(ours.decode(cfg, variables, z), y),
        )  # fmt: skip
    counters = {key: int(tensors[key]) for key in names.counters(cfg, names.Layout.official)}
    found = from_torch.Imported(cfg, variables, None, None, {}, counters, name)
    ours.exported(found, names.Layout.official, tmp_path / "out")
    again = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype, key
    ours_again = ours.imported(tmp_path / "out")
    for one, two in zip(_leaves(variables), _leaves(ours_again.variables), strict=True):
        assert np.array_equal(one, two)


def _leaves(variables: Any) -> list[np.ndarray]:
    from dcae_jax import tree

    return [np.asarray(leaf) for leaf in tree.flatten(variables).values()]


def test_f32c32_by_its_release_name(compare: Any, tmp_path: Path) -> None:
    """Full width, from a folder as on the hub: {"model_name": ...} and model.safetensors."""
    release = "dc-ae-f32c32-in-1.0"
    model = original.fill(official.build(release), 1.0)
    tmp_path.joinpath("config.json").write_text(f'{{"model_name": "{release}"}}')
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = ours.imported(tmp_path)
    assert (found.release, found.scaling_factor) == (release, 0.3189)
    x = original.normal("official full", 1, 128, 128, 3)
    z = original.run(model.encode, x)
    y = original.run(model.decode, z)
    compare(
        "f32c32-in, official", "128 px", VALUES,
        latent=(ours.encode(found.cfg, found.variables, x), z),
        reconstruction=(ours.decode(found.cfg, found.variables, z), y),
    )  # fmt: skip
