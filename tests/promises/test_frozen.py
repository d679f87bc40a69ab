"""Promise 4: phases 2 and 3 leave what is frozen as it is, bit by bit, and move all the rest."""

import re

import jax
import numpy as np
import pytest
import tiny

from dcae_jax import tree
from dcae_jax.models.dcae import BatchNormMode
from dcae_jax.models.layers import Norm
from dcae_jax.report import flops
from dcae_jax.tasks.autoencode import Phase

CASES = [
    (Phase.high_res_latent, Norm.rms),
    (Phase.high_res_latent, Norm.batch),
    (Phase.low_res_local, Norm.rms),
    (Phase.low_res_local, Norm.batch),
]


def config(phase, norm=Norm.rms):
    cfg = tiny.run(phase, batch=4, norm=norm)
    cfg.optim.weight_decay = 0.1  # would move a frozen leaf that only has no gradient
    return cfg


def flat(state):
    host = jax.device_get(state)
    return {
        **{f"params/{k}": v for k, v in tree.flatten(host.params).items()},
        **{f"stats/{k}": v for k, v in tree.flatten(host.stats).items()},
        **{f"ema/{k}": v for k, v in tree.flatten(host.ema).items()},
    }


def is_trained(path, pattern):
    """Whether a leaf of params or of an average of them may move."""
    inner = re.sub(r"^(params|ema/[^/]+/params)/", "", path)
    return inner != path and bool(re.fullmatch(rf"(?:{pattern})|disc/.*", inner))


@pytest.mark.parametrize("phase, norm", CASES)
def test_promise_4_frozen_leaves_are_bit_identical_and_the_others_move(phase, norm):
    trainer = tiny.Trainer(config(phase, norm))
    if norm is Norm.batch:  # stored statistics that are not those of the batches
        stats = jax.tree.map(lambda x: x + 0.25, trainer.state.stats)
        ema = {k: {**v, "stats": stats} for k, v in trainer.state.ema.items()}
        trainer.state = jax.device_put(
            trainer.state.replace(stats=stats, ema=jax.tree.map(lambda x: x.copy(), ema)),
            trainer.shardings,
        )
    before = flat(trainer.state)
    metrics = trainer.train(5)
    after = flat(trainer.state)
    moved = {k for k in before if before[k].tobytes() != after[k].tobytes()}
    trained = {k for k in before if is_trained(k, tiny.TRAINABLE[phase])}
    # LeCam's anchors are statistics of the discriminator, which trains.
    moving = trained | {k for k in before if "/lecam/" in k or k.startswith("stats/lecam")}
    assert moved == moving, (sorted(moved - moving)[:5], sorted(moving - moved)[:5])
    frozen = [k for k in before if k not in moving]
    assert frozen and trained and metrics["nonfinite"] == 0
    if norm is Norm.batch:
        assert any("/mean" in k and k.startswith("stats/ae") for k in frozen)
        assert any("/mean" in k and k.startswith("ema/") for k in frozen)
    if phase is Phase.low_res_local:
        assert metrics["ae/adaptive_weight"] > 0 and metrics["disc/update_norm"] > 0


def test_a_trainable_batch_norm_in_update_mode_moves_its_statistics():
    """The counterpart: what the promise above does not find could not move at all."""
    cfg = config(Phase.low_res_full, Norm.batch)
    cfg.task.model.batch_norm = BatchNormMode.update
    trainer = tiny.Trainer(cfg)
    before = flat(trainer.state)
    trainer.train(1)
    after = flat(trainer.state)
    stats = [k for k in before if k.startswith("stats/ae")]
    assert stats and all(before[k].tobytes() != after[k].tobytes() for k in stats)


@pytest.mark.parametrize("phase", [Phase.high_res_latent, Phase.low_res_local])
def test_promise_4_no_optimizer_leaf_for_frozen_parameters(phase):
    trainer = tiny.Trainer(config(phase))
    trainable, frozen = tree.partition(
        trainer.state.params["ae"],
        tiny.TRAINABLE[phase][3:] if tiny.TRAINABLE[phase].startswith("ae/") else ".*",
    )
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, x in jax.tree_util.tree_flatten_with_path(trainer.state.opt["ae"])[0]
        if x.ndim
    ]
    moments = 2 * len(tree.flatten(trainable))
    assert len([p for p in paths if "/ae/" in f"/{p}"]) == moments
    assert not [p for p in paths for f in tree.flatten(frozen) if p.endswith(f"ae/{f}")]


# ------------------------------------------------------------------------------------- no backward


def ops(phase, pattern=None):
    """(FLOPs of a step's gradients, shapes of what the gradients are of)."""
    cfg = config(phase)
    if pattern:
        cfg.task.trainable = pattern
    trainer = tiny.Trainer(cfg)
    from dcae_jax import step as step_lib

    def fn(s, b):
        return step_lib.loss_and_grads(trainer.task, cfg, s, {}, b)[1]["ae"]

    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.batch(cfg).items()}
    return flops.count(fn, trainer.state, batch).total


def forward_flops():
    cfg = config(Phase.low_res_full)
    trainer = tiny.Trainer(cfg)
    model = trainer.task.model
    image = jax.ShapeDtypeStruct((cfg.batch, 32, 32, 3), np.float32)
    variables = {"params": trainer.state.params["ae"]}
    encode = flops.count(lambda v, x: model.apply(v, x, method="encode"), variables, image).total
    latent = jax.eval_shape(lambda v, x: model.apply(v, x, method="encode"), variables, image)
    decode = flops.count(lambda v, z: model.apply(v, z, method="decode"), variables, latent).total
    return encode, decode


def test_promise_4_no_backward_of_frozen_parts():
    """Counted against closed forms: forward F, and of the backward only what is needed.

    A frozen encoder before a trained decoder costs its forward and nothing more; a frozen decoder
    behind a trained encoder costs its forward and one product per product (towards its input).
    """
    encode, decode = forward_flops()
    everything = ops(Phase.low_res_full)
    only_decoder = ops(Phase.low_res_full, "ae/decoder/.*")
    only_encoder = ops(Phase.low_res_full, "ae/encoder/.*")
    # All of the encoder's backward is gone: two products per forward product, except that the first
    # convolution never propagates to the image.
    saved = everything - only_decoder
    first = ops_of_first_convolution()
    # The attention's recomputed normaliser and the elementwise work are not counted as products.
    assert saved == pytest.approx(2 * encode - first, rel=0.06)
    # Only the weight gradients of the decoder are gone.
    assert everything - only_encoder == pytest.approx(decode, rel=0.15)
    head = ops(Phase.low_res_full, "ae/decoder/conv_out/.*")
    last = 2 * 4 * 32 * 32 * 9 * 8 * 3  # batch 4, 32 px, 3x3, 8 -> 3 channels
    assert head == encode + decode + last  # one weight gradient, and no propagation at all


def ops_of_first_convolution():
    return 2 * 4 * 16 * 16 * 9 * 3 * (8 // 4)  # down-block stem: conv 3 -> 2 at 32 px, unshuffled


def test_weights_of_phase_2_are_not_differentiated_in_the_jaxpr():
    """No kernel gradient of a frozen module: no equation yields an array of such a unique shape."""
    cfg = config(Phase.high_res_latent)
    trainer = tiny.Trainer(cfg)
    _, grads = trainer.grads()
    found = {f"{k}" for k in tree.flatten(grads["ae"]["rec"])}
    assert found and all(re.fullmatch(tiny.TRAINABLE[Phase.high_res_latent], k) for k in found)
