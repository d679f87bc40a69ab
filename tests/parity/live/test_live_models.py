"""Whole autoencoders of every family at an eighth of the width and full depth against diffusers.

Each model is made by diffusers, filled with random numbers, saved by it, and read by our import.
"""

from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import diffusers_configs
import jax.numpy as jnp
import numpy as np
import original
import ours
import pytest

from dcae_jax import tree
from dcae_jax.convert import names

# Relative to the largest value.  float32 sums in another order differ by 1e-6 to 3e-6 in nets of
# this depth (two PyTorch implementations of DC-AE differ by 2.5e-6).
VALUES, GRADIENTS = 5e-6, 1e-4
KL = {
    **diffusers_configs.SD_VAE_F8, "block_out_channels": (32, 64, 128, 128), "norm_num_groups": 16,
}  # fmt: skip
# Without any effect: a bias of the keys moves all attention weights of a query alike.
NO_EFFECT = {"params/encoder/mid/attn/k/bias", "params/decoder/mid/attn/k/bias"}


class Case(NamedTuple):
    """One model on both sides."""

    name: str
    model: Any  # PyTorch's
    found: Any  # what our import gave

    @property
    def cfg(self) -> Any:
        """The config that the import made of config.json."""
        return self.found.cfg

    @property
    def small(self) -> int:
        """A small image that still has all kinds of attention the network can have."""
        return 128 if self.cfg.factor == 128 else 64

    @property
    def variables(self) -> Any:
        """Our leaves."""
        return self.found.variables


def _build(name: str) -> Any:
    if name == "sd-vae-f8":
        return diffusers.AutoencoderKL(**KL)
    return diffusers.AutoencoderDC(**diffusers_configs.narrow(name))


@pytest.fixture(scope="module", params=[*diffusers_configs.DC_AE, "sd-vae-f8"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The original, and what `import` makes of the folder that it saves."""
    model = original.fill(_build(request.param))
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return Case(request.param, model, ours.imported(folder))


def images(name: str, size: int) -> np.ndarray:
    """A noise image; noise reaches every weight."""
    return original.normal(f"{name} image {size}", 1, size, size, 3)


@pytest.mark.parametrize("size", [128, 256])
def test_encode_and_decode(compare: Any, case: Case, size: int) -> None:
    x = images(case.name, size)
    z = original.run(original.encode(case.model), x)
    y = original.run(original.decode(case.model), z)
    compare(
        f"{case.name} / 8", f"{size} px", VALUES,
        latent=(ours.encode(case.cfg, case.variables, x), z),
        reconstruction=(ours.decode(case.cfg, case.variables, z), y),
    )  # fmt: skip


def test_gradients(compare: Any, case: Case) -> None:
    """By the image and by every parameter, of a loss of the latent and the reconstruction."""
    size = case.small
    both = original.both(case.model)
    x, gap = original.off_kinks(both, (images(f"{case.name} {i}", size) for i in range(30)))
    z = original.run(original.encode(case.model), x)
    dz = original.normal(f"{case.name} dz", *z.shape)
    dy = original.normal(f"{case.name} dy", *x.shape)
    dx, grads = original.gradients(case.model, original.whole_loss(case.model, dz, dy), x)
    our_dx, our_grads = ours.gradients(case.cfg, case.variables, x, dz, dy)
    print(f"{case.name}: ReLU inputs stay {gap:.2g} off 0")  # shown where the test fails
    name = f"{case.name} / 8"
    compare(name, f"{size} px", GRADIENTS, **{"input gradient": (our_dx, dx)})
    for found in (our_grads, grads):  # zero but for rounding, so that no ratio means anything
        scale = max(np.abs(g).max() for g in found.values())
        for key in ours.keys_of(case.cfg, NO_EFFECT):
            assert np.abs(found.pop(key)).max() <= 1e-5 * scale, key
    compare.tree(name, f"{size} px", GRADIENTS, "parameter gradients", our_grads, grads)


def test_import_and_export_return_the_same_bits(case: Case, tmp_path: Path) -> None:
    """Saved by diffusers, imported, exported, loaded by diffusers: equal tensors and results."""
    ours.exported(case.found, names.Layout.diffusers, tmp_path / "out")
    again = type(case.model).from_pretrained(tmp_path / "out", low_cpu_mem_usage=False).eval()
    before, after = case.model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and after[key].equal(tensor), key
    assert again.config.scaling_factor == case.model.config.scaling_factor
    x = images(case.name, 128)
    one, two = (original.run(original.both(model), x) for model in (case.model, again))
    assert original.relative_error(one, two) <= VALUES, "config.json describes another network"


def test_one_percent_of_any_tensor_is_noticed(case: Case) -> None:
    """Any of our leaves times 1.01, statistics included, leaves the tolerance."""
    x = images(case.name, case.small)
    z = original.run(original.encode(case.model), x)
    y = original.run(original.decode(case.model), z)
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(case.variables).items()}
    unseen = {}
    for path in leaves.keys() - NO_EFFECT:
        leaf = leaves[path]
        changed = tree.unflatten({**leaves, path: leaf * np.float32(1.01)})
        encodes = path.split("/")[1] == "encoder"
        run, given, expected = (ours.encode, x, z) if encodes else (ours.decode, z, y)
        error = original.relative_error(run(case.cfg, changed, given), expected)
        if error <= VALUES:
            unseen[path] = error
    assert not unseen, f"{case.name}: 1 % more of these goes unseen (with the error): {unseen}"


@pytest.mark.parametrize("name", ["f32c128-1.5", "f64c128-1.5"])
def test_a_prefix_of_the_latent(compare: Any, name: str, tmp_path: Path) -> None:
    """DC-AE 1.5 with its first 48 channels is the whole network with the others at 0."""
    model = original.fill(_build(name))
    model.save_pretrained(tmp_path / "model")
    found = ours.imported(tmp_path / "model")
    found.cfg.adaptive_channels = True  # diffusers' config.json cannot say it
    x = images(name, 128)
    z = original.run(original.encode(model), x)
    z[..., 48:] = 0
    y = original.run(original.decode(model), z)
    network = found.cfg.build()
    latent = network.apply(found.variables, jnp.asarray(x), 48, method="encode")
    image = network.apply(found.variables, jnp.asarray(z[..., :48]), method="decode")
    compare(
        f"{name} / 8, 48 channels", "128 px", VALUES,
        latent=(np.asarray(latent), z[..., :48]), reconstruction=(np.asarray(image), y),
    )  # fmt: skip
