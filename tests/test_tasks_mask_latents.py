"""The task of masked autoencoders: loss, draws, filling in, pixels, work, mistakes in a config."""

import functools
import json
import math
import time

import diffusing
import jax
import jax.numpy as jnp
import masks
import numpy as np
import pytest
import tiny
from diffusing import online
from etils import epath

from dcae_jax import config, flags, masking, provenance, rng, step
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.filled import FilledConfig
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.evals.masked import MaskedConfig
from dcae_jax.evals.reconstruct import ReconstructConfig
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.masking import MaskConfig, MaskKind, Rounding
from dcae_jax.report import flops
from dcae_jax.tasks.base import Fills, Task, Variables
from dcae_jax.tasks.latents import LatentNorm, Normalisation
from dcae_jax.tasks.mask_latents import Visible

NORM = Normalisation(jnp.array([0.5, -1.0, 0.0, 2.0]), jnp.array([0.8, 1.0, 2.0, 0.5]))


def built(**changes):
    cfg = masks.make(cached=False, evals=[], **changes)
    return cfg.task.build(cfg)


def batch(n=8, seed=0):
    latent = 3 * jax.random.normal(jax.random.key(seed), (n, 4, 4, 4))
    return {"latent": latent, "label": jnp.arange(n, dtype=jnp.int32) % 2}


def loss_of(task, variables, inputs):
    return task.objectives[0].loss(variables, inputs, None)


@pytest.fixture(scope="module")
def trained():
    """A task and parameters that are not those of the start."""
    task = built()
    leaves, kind = jax.tree.flatten(jax.eval_shape(task.init, jax.random.key(0))[0])
    g = np.random.default_rng(0)
    leaves = [jnp.asarray(g.normal(0.2, 0.3, v.shape), jnp.float32) for v in leaves]
    return task, Variables(jax.tree.unflatten(kind, leaves), {}, {"norm": NORM})


# ------------------------------------------------------------------------------------ keys, draws


def test_it_is_a_task_that_fills():
    assert isinstance(built(), Task) and isinstance(built(), Fills) and built().grid() == (4, 4)


def test_the_keys_are_those_of_the_schedule():
    task = built(steps=3000, **{"task.mask": MaskConfig()})
    every = [task.static(k) for k in range(3000)]
    assert task.statics(0, 3000) == list(dict.fromkeys(every))
    assert task.statics(700, 1500) == list(dict.fromkeys(every[700:1500]))
    assert str(every[0]) == "13 of 16 tokens visible" and hash(every[0]) == hash(Visible(13, 16))
    assert "visible tokens over the run: 13, 11, 9, 8, 6, 4 of 16" in " ".join(task.shapes(1))


def test_the_keys_of_a_long_run_are_found_quickly():
    task = built(steps=10_000_000, **{"task.mask.rounding": Rounding.exact})
    begin = time.process_time()
    assert len(task.statics(0, 10_000_000)) == 10
    assert time.process_time() - begin < 10  # one by one it would be minutes


def test_masks_are_drawn_for_each_example_from_the_key():
    task, static = built(), Visible(6, 16)
    found = [task.prepare(rng.key(i), batch(), jnp.int32(0), static) for i in (0, 0, 1)]
    first, again, other = (np.asarray(f.examples["split"].order) for f in found)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(1).all() and len({tuple(row) for row in first}) == 8
    assert found[0].examples["split"].keep == 6 and found[0].shared == {}


def test_what_samples_a_gaussian_latent_is_no_function_of_the_mask():
    task, latents = built(), batch(64) | {"logvar": jnp.zeros((64, 4, 4, 4))}
    found = task.prepare(rng.key(0), latents, jnp.int32(0), Visible(6, 16)).examples
    assert found["draw"].shape == (64, 4, 4, 4) and abs(found["draw"].mean()) < 0.08
    np.testing.assert_allclose(
        task.latents(Variables({}, {}, {}), found), latents["latent"] + found["draw"], rtol=1e-6
    )


# -------------------------------------------------------------------------------------- the loss


def tokens_of(x, patch):
    """[b, n, p] by loops: row after row of patches, (row, column, channel) inside."""
    found = []
    for image in np.asarray(x):
        rows = range(0, image.shape[0], patch)
        found.append([image[i : i + patch, j : j + patch].ravel() for i in rows for j in rows])
    return np.array(found)


@pytest.mark.parametrize(("whiten", "patch"), [(False, 1), (True, 2), (True, 1)])
def test_the_loss_is_that_of_masked_tokens_alone(whiten, patch, monkeypatch):
    """Against numpy, of what a network has said: sum over masked tokens / (B (L - keep))."""
    changes = {"task.model": masks.model(patch=patch), "task.norm_target": whiten}
    task = built(**changes, **{"task.mask": MaskConfig(kind=MaskKind.constant, end=0.5)})
    n, p = 16 // patch**2, 4 * patch**2
    said = np.random.default_rng(1).normal(size=(8, n, p)).astype(np.float32)
    seen = []
    monkeypatch.setattr(task, "network", lambda v, x, split: seen.append(x) or jnp.asarray(said))
    inputs = task.prepare(rng.key(0), batch(), jnp.int32(0), task.static(0))
    found = loss_of(task, Variables({}, {}, {"norm": NORM}), inputs)

    normal = (np.asarray(batch()["latent"], np.float64) - NORM.shift) * NORM.scale
    np.testing.assert_allclose(seen[0], normal, rtol=1e-5, atol=1e-6)
    target = tokens_of(normal, patch)
    if whiten:
        middle, spread = target.mean(-1, keepdims=True), target.var(-1, keepdims=True, ddof=1)
        target = (target - middle) / np.sqrt(spread + 1e-6)
    order = np.asarray(inputs.examples["split"].order)
    wrong = [((said - target)[i, j] ** 2).mean() for i in range(8) for j in order[i, n // 2 :]]
    assert len(wrong) == 8 * (n - n // 2)
    # float32 against float64, a thousand numbers
    np.testing.assert_allclose(found.terms["loss"], np.mean(wrong), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["latent_ms"], (normal**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["mask_ratio"], 0.5, rtol=1e-6)


def test_what_visible_tokens_are_does_not_count(trained, monkeypatch):
    """As targets, and as predictions: no gradient."""
    task, variables = trained
    inputs = task.prepare(rng.key(0), batch(), jnp.int32(0), Visible(6, 16))
    masked = np.asarray(inputs.examples["split"].masked())
    said = jnp.asarray(np.random.default_rng(1).normal(size=(8, 16, 4)), jnp.float32)

    def loss(said, latent):
        monkeypatch.setattr(task, "network", lambda *_: said)
        new = inputs._replace(examples=inputs.examples | {"latent": latent})
        return loss_of(task, variables, new).terms["loss"]

    by_said, by_target = jax.grad(loss, (0, 1))(said, inputs.examples["latent"])
    for gradient in (np.asarray(by_said), np.asarray(by_target).reshape(8, 16, 4)):
        assert (gradient[~masked] == 0).all() and (gradient[masked] != 0).all()


# ------------------------------------------------------------------------------------- filling in


def test_filled_latents_keep_what_is_visible(trained):
    task, variables = trained
    x = jax.random.normal(jax.random.key(1), (5, 4, 4, 4))
    order, label = masking.random_order(jax.random.key(2), 5, 4, 4), jnp.zeros(5, jnp.int32)
    split = masking.split(order, 6)
    masked = np.asarray(split.masked()).reshape(5, 4, 4)

    def filled(x):
        y = task.fill(variables, x, order, 6, label)
        return jnp.square(y * masked[..., None]).sum(), y

    @functools.partial(jax.jit, compiler_options=tiny.AS_IN_TRAINING)
    def run(x):
        visible = {"x": x, "visible": order[:, 5::-1], "label": label}
        found = task.network(variables, x, split), task.predict(variables, visible)
        return *jax.grad(filled, has_aux=True)(x), *found

    gradient, y, said, predicted = (np.asarray(a) for a in run(x))
    np.testing.assert_array_equal(y[~masked], np.asarray(x)[~masked])
    np.testing.assert_array_equal(y[masked], said.reshape(5, 4, 4, 4)[masked])
    # The visible tokens come in another order there.
    np.testing.assert_allclose(predicted, y, rtol=1e-4, atol=1e-5)
    assert task.fill(variables, x, order, 16, label) is x
    # What is masked is not looked at, and what is visible is.
    assert (gradient[masked] == 0).all() and (gradient[~masked] != 0).all()


def test_whitened_tokens_cannot_be_filled_in():
    task = built(**{"task.norm_target": True})
    with pytest.raises(UserError, match=r"mean and deviation of a masked token are not known.*nor"):
        task.fill(Variables({}, {}, {}), jnp.zeros((1, 4, 4, 4)), jnp.zeros((1, 16), int), 6,
                  jnp.zeros(1, jnp.int32))  # fmt: skip


# ----------------------------------------------------------------------------------------- pixels


def test_images_take_the_place_of_latents():
    cfg = masks.pixels()
    task = cfg.task.build(cfg)
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    found = task.prepare(
        rng.key(0), {"image": jnp.asarray(image), "label": jnp.zeros(8, int)}, jnp.int32(0),
        task.static(0),
    ).examples  # fmt: skip
    constants = task.constants(training=True)
    variables = Variables({}, {}, constants)
    normal = constants["norm"].apply(task.latents(variables, found))
    want = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normal, want, rtol=1e-5, atol=1e-6)
    assert task.record() == {} and task.warnings({"latent_rms": 0.1}) == []
    assert task.shapes(1)[0] == "each example: an image 16 x 16 x 3"
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), constants)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), task.abstract_constants())
    assert "pixels normalised" in task.describe()[-1]


# ------------------------------------------------------------------------------------------- work


def test_the_work_of_a_step_is_three_forward_passes():
    """LMD-B of the config, each of its six programs, counted on the jaxpr of the whole step."""
    path = config.__file__.rsplit("/", 2)[0]
    cfg = config.resolve(flags.load(f"{path}/configs/lmd.py:b,f8"))
    cfg.batch = 1
    task = cfg.task.build(cfg)
    state = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(0)))
    shapes = {
        "latent": jax.ShapeDtypeStruct((1, 28, 28, 4), jnp.float32),
        "label": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    constants = task.abstract_constants()
    keys = task.statics(0, cfg.steps)
    assert [key.keep for key in keys] == [41, 36, 30, 24, 18, 12]
    for key in keys:
        found = flops.count(
            lambda s, c, b, key=key: step.train_step(task, cfg, key, s, c, b), state, constants,
            shapes,
        )  # fmt: skip
        n, m, d, e = 1 + key.keep, 50, 768, 512
        forward = 12 * (24 * n * d**2 + 4 * n**2 * d) + 8 * (24 * m * e**2 + 4 * m**2 * e)
        forward += 2 * (49 * 64 * d + n * d * e + m * e * 64)
        assert found.incomplete == () and found.total / (3 * forward) == pytest.approx(1, abs=0.03)


# --------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task.trainable": "("}, r"task\.trainable = '\(' is no regular expression"),
        ({"task.mask.end": 1.5}, r"mask\.end = 1\.5; a share"),
        ({"task.mask": MaskConfig(start=0.0)}, "leaves all 16 tokens visible at some steps"),
        ({"task.mask": MaskConfig(start=0.0, end=0.0)}, "leaves all 16 tokens visible"),
        (
            {"task.mask": MaskConfig(end=0.97, rounding=Rounding.exact)},
            "mask ratio of 0.97 leaves none of 16 tokens visible",
        ),
        (
            {"task.mask": MaskConfig(buckets=(7, 8))},
            r"at a ratio of 0.15, 13.6 are to be visible, and of mask.buckets = \(7, 8\) and all "
            "16, which always count, 16 is the nearest: add 13 to mask.buckets, or raise mask.st",
        ),
        (
            {"evals": [FilledConfig()], "task.norm_target": True},
            "filled-test-0.75 asks for masked tokens, filled in and decoded: this network predicts "
            "whitened tokens .* train with --config.task.norm_target=False",
        ),
        ({"task.mask.buckets": (20,)}, "there are only 16 tokens to be visible"),
        ({"task.model.patch": 3}, "not a multiple of patch = 3"),
        ({"mesh.spatial": 2}, "attention kernels refuse a sharded sequence"),
        ({"data": None}, "data is no source of latents"),
        (
            {"task.model": masks.model(in_channels=1), "task.norm_target": True},
            "a token is one number; set norm_target=False",
        ),
        ({"evals": [GenerateConfig()]}, "is for diffusion models, .* use MaskedConfig"),
        (
            {"evals": [ValLossConfig(data=LatentDataConfig(split="test"))]},
            "latents-test is for diffusion models",
        ),
        ({"evals": [MaskedConfig(data=online("test", "ae"))]}, "need the autoencoder of the run"),
        ({"evals": [MaskedConfig(data=masks.images("test"))]}, "reads images, and this run trains"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes, message):
    changes = {"evals": [], **changes}
    if (
        isinstance(changes["evals"], list)
        and changes["evals"]
        and isinstance(changes["evals"][0], GenerateConfig)
    ):  # its classes are the model's, where there are any
        changes["evals"][0].labels = (0,)
    with pytest.raises(UserError, match=message):
        masks.make(cached=False, **changes)


def test_mistakes_with_images_are_named():
    with pytest.raises(UserError, match=r"images are 32 x 32 x 3, but task\.model takes 16 x"):
        masks.pixels(**{"data.resolution": 32, "evals": []})
    with pytest.raises(UserError, match="reads latents, and this run trains on images"):
        masks.pixels(evals=[MaskedConfig(data=LatentDataConfig(path="x"))])
    with pytest.raises(UserError, match="asks for an autoencoder's reconstructions: this run trai"):
        masks.pixels(evals=[ReconstructConfig(data=masks.images("test"))])


def test_what_is_asked_for_can_be_had():
    """Whitened tokens have errors, and other ones can be filled in too."""
    data = LatentDataConfig(split="test")
    masks.make(cached=False, evals=[MaskedConfig(data=data)], **{"task.norm_target": True})
    masks.make(cached=False, evals=[MaskedConfig(data=data), FilledConfig()])


@pytest.mark.parametrize("asked", [MaskedConfig, FilledConfig])
def test_runs_that_mask_nothing_are_not_asked_for_masked_tokens(asked):
    said = r"asks for masked tokens.*: this (network has only learned to remove noise|run )"
    for cfg in (masks.probe(cached=False), diffusing.make(), tiny.run()):
        cfg.evals = [asked()]
        with pytest.raises(UserError, match=said):
            config.validate(config.resolve(cfg), 1)


@pytest.mark.parametrize("field", ["norm_target", "latent_norm"])
def test_what_the_numbers_of_the_network_mean_may_not_change_on_resume(field, tmp_path):
    """The shapes are the same; an older record without the field had its default, and resumes."""
    cfg = masks.make(cached=False, **{"task.latent_norm": LatentNorm.scalar})
    cfg.task.norm_target = True  # both are the defaults
    record = {"config": config.to_json(cfg)}
    (tmp_path / "config.json").write_text(json.dumps(record))

    def compare():
        provenance.check(epath.Path(tmp_path), cfg, "", False, lambda text: None)

    setattr(cfg.task, field, {"norm_target": False, "latent_norm": LatentNorm.channel}[field])
    with pytest.raises(UserError, match=rf"another run(.|\n)*task\.{field}: "):
        compare()
    setattr(cfg.task, field, {"norm_target": True, "latent_norm": LatentNorm.scalar}[field])
    del record["config"]["task"][field]
    (tmp_path / "config.json").write_text(json.dumps(record))
    compare()


def test_the_whole_config_survives_json():
    cfg = masks.make(cached=False)
    assert config.from_json(config.to_json(cfg)) == cfg and math.isfinite(cfg.task.mask.end)
