"""Promise 1 of diffusion: numbers do not depend on mesh, microbatches, scan or remat."""

import itertools

import jax
import numpy as np
import pytest
import tiny
from tiny import error

from dcae_jax import sharding, tree
from dcae_jax.models.transformer import Remat

# (data, fsdp, spatial, zero1); transformers have no spatial axis.
MESHES = [(8, 1, 1, True), (1, 8, 1, False), (2, 4, 1, True)]
MICROBATCHES = [1, 4]
LAYERS = [(True, Remat.none), (False, Remat.none), (True, Remat.full), (True, Remat.dots)]
NETWORKS = ["uvit", "dit"]

# That of the autoencoder's promise: f32 sums in another order; measured 1e-7 to 4e-7.
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def _shard_small_leaves(monkeypatch):
    """The tiny model has only leaves that would be replicated."""
    monkeypatch.setattr(sharding, "SMALL", 64)


# Two programs, since each takes long to compile: both networks, microbatches, scanned layers.
COVER = [("uvit", MESHES[2], 4, LAYERS[2]), ("dit", MESHES[1], 1, LAYERS[0])]
PRODUCT = list(itertools.product(NETWORKS, MESHES, MICROBATCHES, LAYERS))


def trainer(network, mesh=(1, 1, 1, False), microbatches=1, layers=LAYERS[0], devices=1):
    cfg = tiny.with_mesh(tiny.diffusion(network, batch=32), *mesh)
    cfg.microbatches = microbatches
    cfg.task.model.scan, cfg.task.model.remat = layers
    found = tiny.Trainer(cfg, devices)
    # DiT starts as a function of nothing: most of its gradients would be zero.
    gen, flat = np.random.default_rng(0), jax.device_get(tree.flatten(found.state.params))
    found.replace_params(
        {k: v + gen.normal(0, 0.1, v.shape).astype(np.float32) for k, v in flat.items()}
    )
    return found


_reference = {}


def reference(network):
    if network not in _reference:
        _reference[network] = trainer(network).sgd()
    return _reference[network]


def check(network, mesh, microbatches, layers):
    metrics, grads, params = reference(network)
    many = trainer(network, mesh, microbatches, layers, devices=8)
    found, found_grads, found_params = many.sgd()
    assert found.keys() == metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=TOLERANCE, atol=1e-7)
    assert error(found_grads, grads) <= TOLERANCE
    assert error(found_params, params) <= TOLERANCE
    assert min(np.abs(g).max() for g in jax.tree.leaves(grads)) > 0, "nothing is left out"


@pytest.mark.parametrize(("network", "mesh", "microbatches", "layers"), COVER)
def test_promise_1_diffusion_cover(network, mesh, microbatches, layers):
    check(network, mesh, microbatches, layers)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "mesh", "microbatches", "layers"), PRODUCT)
def test_promise_1_diffusion_product(network, mesh, microbatches, layers):
    check(network, mesh, microbatches, layers)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_adamw_and_ema_of_diffusion_agree_on_a_zero1_mesh(network):
    """The whole step, with sharded optimizer state."""
    one, many = trainer(network), trainer(network, (2, 4, 1, True), 4, devices=8)
    for each in (one, many):
        each.train(3)
    a, b = jax.device_get((many.state, one.state))
    # Adam divides by the root of the squared gradient: where that is near eps, rounding moves an
    # element by a visible part of lr = 1e-3.
    for name in ("params", "ema"):
        assert error(getattr(a, name), getattr(b, name)) <= 2e-5
    assert error(a.opt, b.opt) <= 1e-5
    kernel = many.state.params["net"]["blocks" if network == "dit" else "in_blocks"]
    leaf = kernel["mlp"]["fc1"]["kernel"]
    assert leaf.addressable_shards[0].data.size * 4 == leaf.size, "parameters are sharded"
