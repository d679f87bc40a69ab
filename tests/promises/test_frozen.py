"""Promise 4: phases 2 and 3 leave what is frozen as it is, bit by bit, and move all the rest."""

import re

import jax
import numpy as np
import pytest
import tiny

from dcae_jax import step, tree
from dcae_jax.models.dcae import BatchNormMode
from dcae_jax.models.layers import Norm
from dcae_jax.report import flops
from dcae_jax.tasks.autoencode import Phase

STATS, UPDATE = BatchNormMode.frozen_stats, BatchNormMode.update
CASES = [
    (Phase.high_res_latent, Norm.rms, STATS),
    (Phase.high_res_latent, Norm.batch, STATS),
    (Phase.high_res_latent, Norm.batch, UPDATE),  # the BatchNorms lie in a stage that is frozen
    (Phase.low_res_local, Norm.rms, STATS),
    (Phase.low_res_local, Norm.batch, STATS),
]


def config(phase, norm=Norm.rms, mode=STATS):
    cfg = tiny.run(phase, batch=4, norm=norm)
    cfg.task.model.batch_norm = mode
    cfg.task.resolve(cfg)
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


@pytest.mark.parametrize("phase, norm, mode", CASES)
def test_promise_4_frozen_leaves_are_bit_identical_and_the_others_move(phase, norm, mode):
    trainer = tiny.Trainer(config(phase, norm, mode))
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
    cfg = config(Phase.low_res_full, Norm.batch, UPDATE)
    trainer = tiny.Trainer(cfg)
    before = flat(trainer.state)
    trainer.train(1)
    after = flat(trainer.state)
    stats = [k for k in before if k.startswith("stats/ae")]
    assert stats and all(before[k].tobytes() != after[k].tobytes() for k in stats)


# ------------------------------------------------------------------------------------- no backward


def abstract(phase, pattern=None):
    """(task, config, shapes of the state, shapes of a batch): nothing is compiled."""
    cfg = config(phase)
    cfg.task.trainable = pattern or cfg.task.trainable
    task = cfg.task.build(cfg)
    state = jax.eval_shape(lambda: step.init_state(task, cfg, jax.random.key(0)))
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.batch(cfg).items()}
    return task, cfg, state, batch


def gradient_flops(pattern):
    """FLOPs of the gradients of phase 1 with this part trainable; products and convolutions."""
    task, cfg, state, batch = abstract(Phase.low_res_full, pattern)
    return flops.count(
        lambda s, b: step.loss_and_grads(task, cfg, s, {}, b)[1]["ae"], state, batch
    ).total


def forward_flops():
    """(encoder, decoder) on the same batch."""
    task, cfg, state, _ = abstract(Phase.low_res_full)
    image = jax.ShapeDtypeStruct((cfg.batch, 32, 32, 3), np.float32)
    variables = {"params": state.params["ae"]}

    def encode(v, x):
        return task.model.apply(v, x, method="encode")

    def decode(v, z):
        return task.model.apply(v, z, method="decode")

    latent = jax.eval_shape(encode, variables, image)
    counts = flops.count(encode, variables, image), flops.count(decode, variables, latent)
    return counts[0].total, counts[1].total


def test_promise_4_no_backward_of_frozen_parts():
    """Counted against closed forms: what a frozen part costs is its forward and, if something
    before it trains, one product per product towards its input; never a gradient of its weights.
    """
    encode, decode = forward_flops()
    everything = gradient_flops("ae/.*")
    last = 2 * 4 * 32 * 32 * 9 * 8 * 3  # batch 4, 32 px, 3x3, 8 -> 3 channels
    # Only the last convolution trains: both forwards, its weight gradient, and nothing else.
    assert gradient_flops("ae/decoder/conv_out/.*") == encode + decode + last
    # A frozen encoder before the decoder: both products of its backward are gone, except those that
    # training it does not need either (towards the image, towards the attention's row of ones).
    assert 1.7 * encode < everything - gradient_flops("ae/decoder/.*") < 2 * encode
    # A frozen decoder behind the encoder: of each product with weights one is gone.
    assert 0.85 * decode < everything - gradient_flops("ae/encoder/.*") <= decode


@pytest.mark.parametrize("phase", [Phase.high_res_latent, Phase.low_res_local])
def test_promise_4_gradients_are_of_the_trainable_partition_only(phase):
    task, cfg, state, batch = abstract(phase)
    _, grads = jax.eval_shape(lambda s, b: step.loss_and_grads(task, cfg, s, {}, b), state, batch)
    wanted = {k for k in tree.flatten(state.params) if re.fullmatch(tiny.TRAINABLE[phase], k)}
    for term in grads["ae"].values():
        assert tree.flatten(term).keys() == wanted


@pytest.mark.parametrize("phase", [Phase.high_res_latent, Phase.low_res_local])
def test_promise_4_no_optimizer_leaf_for_frozen_parameters(phase):
    _, _, state, _ = abstract(phase)
    trained = [k for k in tree.flatten(state.params) if re.fullmatch(tiny.TRAINABLE[phase], k)]
    flat, _ = jax.tree_util.tree_flatten_with_path(state.opt["ae"])
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, x in flat if x.ndim]
    # Two moments of each trainable parameter.
    assert sorted(p[p.index("ae/") :] for p in paths) == sorted(2 * trained)


def test_promise_4_single_layers_of_a_stack_are_frozen():
    """Stored stacked: the leaf trains, its first layer does not, whatever decays or is clipped."""
    cfg = tiny.diffusion("dit", batch=4)
    cfg.task.trainable = "net/blocks/1/.*|net/head/.*"
    cfg.optim.weight_decay, cfg.optim.clip_norm = 0.1, 0.5
    trainer = tiny.Trainer(cfg)
    # Zeros with a sign, which adding 0 would take from them; and every leaf gets a gradient.
    noisy = {
        k: np.where(np.arange(v.size).reshape(v.shape) % 5 == 0, -0.0, v + 0.02).astype(np.float32)
        for k, v in tree.flatten(jax.device_get(trainer.state.params)).items()
    }
    trainer.replace_params(noisy)
    trainer.train(3)
    after = tree.flatten(jax.device_get(trainer.state.params))
    for path, old in noisy.items():
        new = after[path]
        if path.startswith("net/blocks/"):
            assert new[0].tobytes() == old[0].tobytes(), path
            assert not np.array_equal(new[1], old[1]), path
        else:
            moved = path.startswith("net/head/")
            assert (new.tobytes() != old.tobytes()) == moved, path
    trained, frozen = tree.sizes(after, cfg.task.trainable)
    assert 0 < trained < frozen
