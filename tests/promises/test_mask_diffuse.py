"""Promises on masked diffusion: meshes, resume in a stage, one program a plan, UViT's weights."""

import diffusing
import jax
import masking_runs
import numpy as np
import pytest
import runs
import tiny
from tiny import error

from dcae_jax import config, sharding, train, tree
from dcae_jax.cli import _sample_draw, sample
from dcae_jax.config import MeshConfig
from dcae_jax.distributed import EXIT_PREEMPTED
from dcae_jax.errors import UserError
from dcae_jax.models.md_uvit import Fill, MDUViTConfig
from dcae_jax.models.transformer import Remat
from dcae_jax.tasks.mask_diffuse import MaskDiffuseConfig, StageConfig

# That of the promise on diffusion: f32 sums in another order.
TOLERANCE = 1e-6
MESHES = [(2, 4, 1, True), (1, 8, 1, False), (8, 1, 1, True)]


def trainer(fill, mesh=(1, 1, 1, False), microbatches=1, layers=(True, Remat.none), devices=1):
    """Clean and noisy examples, three quarters masked, both losses (mask) or the routed one."""
    cfg = tiny.with_mesh(tiny.diffusion(batch=32), *mesh)
    plain, carry = cfg.task.model, fill is Fill.carry
    model = MDUViTConfig(
        in_channels=4, input_size=(4, 4), num_classes=3, width=16, heads=2, depth=4,
        dtype=plain.dtype, k_in=int(carry), k_out=1, fill=fill, recon_head=not carry,
        scan=layers[0], remat=layers[1], adaptive_channels=not carry,
    )  # fmt: skip
    stage = StageConfig(mask=masking_runs.at(0.75))
    if not carry:
        stage.clean, stage.reconstruction = 0.4, 0.5
    cfg.task = MaskDiffuseConfig(model=model, process=cfg.task.process, stages=[stage])
    if not carry:
        cfg.task.channel_counts = (2,)  # a further pass, of the first two of four channels
    cfg.microbatches = microbatches
    config.validate(config.resolve(cfg))
    found = tiny.Trainer(cfg, devices)
    gen, flat = np.random.default_rng(0), jax.device_get(tree.flatten(found.state.params))
    found.replace_params(
        {k: v + gen.normal(0, 0.1, v.shape).astype(np.float32) for k, v in flat.items()}
    )
    return found


_reference = {}


def check(fill, mesh, microbatches, layers):
    if fill not in _reference:
        _reference[fill] = trainer(fill).sgd()
    metrics, grads, params = _reference[fill]
    found, found_grads, found_params = trainer(fill, mesh, microbatches, layers, 8).sgd()
    assert found.keys() == metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=TOLERANCE, atol=1e-7)
    assert error(found_grads, grads) <= TOLERANCE
    assert error(found_params, params) <= TOLERANCE
    assert min(np.abs(g).max() for g in jax.tree.leaves(grads)) > 0, "nothing is left out"


@pytest.fixture
def shard_small_leaves(monkeypatch):
    """The tiny model has only leaves that would be replicated."""
    monkeypatch.setattr(sharding, "SMALL", 64)


def test_promise_1_masked_diffusion_cover(shard_small_leaves):
    check(Fill.mask, MESHES[0], 4, (True, Remat.full))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(False, Remat.none), (True, Remat.dots)])
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("fill", list(Fill))
def test_promise_1_masked_diffusion_product(shard_small_leaves, fill, mesh, microbatches, layers):
    check(fill, mesh, microbatches, layers)


def test_promise_2_a_run_interrupted_in_a_stage_ends_in_the_same_bits(tmp_path):
    """Stopped after step 5 of 9: within the joint stage, before the switch to all tokens."""
    whole, _ = masking_runs.whole()
    # Polls: 1 at the start, 1 for each program behind the first, 1 after compiling, 1 a step.
    assert diffusing.run(masking_runs.make(), tmp_path, poll=1 + 2 + 1 + 5) == EXIT_PREEMPTED
    assert runs.steps(tmp_path)[-1] == 5
    assert diffusing.run(masking_runs.make(), tmp_path) == train.DONE
    runs.assert_same_run(masking_runs.make(), whole, tmp_path)


def test_one_program_is_traced_for_each_plan():
    """The rehearsal of the last stage is the first stage's program."""
    whole, names = masking_runs.whole()
    cfg = masking_runs.make()
    plans = cfg.task.build(cfg).statics(0, cfg.steps)
    assert [p.keep for p in plans] == [8, 4, 16]
    assert len([name for name in names if name.endswith("train_step")]) == len(plans)
    rows = runs.rows(whole)
    # The row of `k` steps is of the last of them.
    kinds = {k: {m for m in rows[k] if m in ("train/diffusion", "train/reconstruction")}
             for k in (2, 5, 7, 9)}  # fmt: skip
    assert kinds == {
        2: {"train/reconstruction"}, 5: {"train/diffusion", "train/reconstruction"},
        7: {"train/diffusion"}, 9: {"train/reconstruction"},
    }  # fmt: skip


def test_weights_of_a_uvit_start_it_and_it_starts_as_that_uvit(tmp_path, capsys):
    """Before the first step its validation loss is what the UViT ended with, and it draws."""
    plain, cfg = diffusing.whole()[0], masking_runs.judged()
    capsys.readouterr()
    # Polls: 1 at the start, 3 + 1 + 3 batches of the evaluations.
    assert diffusing.run(cfg, tmp_path, poll=1 + 7 + 1) == EXIT_PREEMPTED
    said = capsys.readouterr().out
    new = ("mask_token", "recon_head/bias", "recon_head/kernel", "skip_tokens")
    assert f"reset: step, optimizer, EMA, {', '.join(f'net/{n}' for n in new)} (new)" in said
    before, after = runs.rows(plain)[8], runs.rows(tmp_path)[0]
    shared = [k for k in before if k.startswith("latents-test/")]
    assert len(shared) > 5 and {k: before[k] for k in shared} == {k: after[k] for k in shared}
    assert after["samples/n"] == 4 and np.isfinite(after["masked-test/mse_r0.50"])
    found, source = runs.state(cfg, tmp_path)[0], runs.state(diffusing.make(), plain)[0]
    for path in (p for p in source if p.startswith("ema/0.9/params/")):
        start = "params/" + path.removeprefix("ema/0.9/params/")
        np.testing.assert_array_equal(found[start], source[path], err_msg=path)


def test_parameters_that_are_not_the_masks_may_not_be_missing(tmp_path):
    """Nothing but what an MD-UViT adds to a UViT is left fresh."""
    cfg = masking_runs.make(
        init_from=str(diffusing.whole()[0]), **{"task.model.qkv_bias": True}
    )  # fmt: skip
    with pytest.raises(UserError, match="qkv/bias: missing in the checkpoint"):
        diffusing.run(cfg, tmp_path / "run")


@pytest.mark.slow
def test_the_sample_command_draws_from_it(tmp_path, monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(_sample_draw, "_mesh", lambda: mesh)
    whole, _ = masking_runs.whole()
    argv = f"--from {whole} --n 2 --batch 2 --sampler heun --steps 2 --out {tmp_path / 'out'}"
    assert sample.main(argv.split()) == 0
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 2
