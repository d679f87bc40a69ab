"""The evaluator of filled pixels: against numpy, both protocols, exact counts, mistakes."""

import diffusing
import jax
import jax.numpy as jnp
import masking_runs
import masks
import numpy as np
import pytest

from dcae_jax import autoencoder, inpainting, masking, rng, sharding, step
from dcae_jax.config import MeshConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import generate, metrics
from dcae_jax.evals.filled import FilledConfig
from dcae_jax.evals.masked import MaskedConfig
from dcae_jax.tasks.autoencode import to_float
from dcae_jax.tasks.mask_diffuse import StageConfig

GRID, CELL, KEEP = 4, 4, 8  # of 16 px, at a ratio of one half


def pictures():
    """The held-out images of 16 px."""
    return diffusing.online("test").images


def evaluator(fill, cfg=None, devices=1, **fields):
    """(evaluator, its mesh, the state it is given) of a task that fills so."""
    cfg = cfg or masks.make()
    task = cfg.task.build(cfg)
    task.fill = fill
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    made = FilledConfig(**{"images": pictures(), "ratio": 0.5, "n": 10, "batch": 4, **fields})
    made.resolve(cfg)
    assert made.problems() == []
    state = step.TrainState(jnp.int32(0), {}, {}, {"0.9": {"params": {}, "stats": {}}}, {})
    with jax.set_mesh(mesh):
        constants = jax.device_put(task.constants(training=False), sharding.replicated(mesh))
    return made.build(cfg, task, mesh), mesh, state, constants


def report(fill, **fields):
    found, mesh, state, constants = evaluator(fill, **fields)
    with jax.set_mesh(mesh):
        return found.run(state, constants, lambda: None), found.baselines()


def perfect(variables, x, order, keep, label):
    return x


def noisy(variables, x, order, keep, label):
    """0 at masked tokens."""
    hidden = masking.split(order, keep).masked().reshape(-1, GRID, GRID, 1)
    return jnp.where(hidden, 0.0, x)


def originals():
    with pictures().eval_batches(batch=10, n=10) as batches:
        return np.asarray(next(batches)["image"])


def holes():
    """The masked pixels of the ten images."""
    order = masking.indexed_order(rng.key(0, 0, "filled"), jnp.arange(10), GRID, GRID)
    cells = np.ones((10, GRID * GRID), bool)
    np.put_along_axis(cells, np.asarray(order)[:, :KEEP], False, axis=1)
    return np.kron(cells.reshape(10, GRID, GRID), np.ones((1, CELL, CELL), bool))


def psnr(found):
    error = (originals().astype(np.float64) - found)[holes()]
    return 10 * np.log10(255**2 / np.mean(error**2))


def whole(image):
    """Through the autoencoder of the cache, nothing masked."""
    net = autoencoder.load(str(diffusing.autoencoder()))
    return np.asarray(metrics.to_uint8(net.decode(net.encode(to_float(jnp.asarray(image))))))


def hidden():
    """The mean colour of the known pixels in the holes."""
    image, hole = originals().copy(), holes()
    for picture, here in zip(image, hole, strict=True):
        picture[here] = np.floor(picture[~here].mean(0) + 0.5)
    return image


def test_a_perfect_network_is_as_good_as_the_autoencoder():
    found, base = report(perfect)
    assert found.scalars["n"] == 10
    # Nothing masked: the bound of both protocols, and a perfect network reaches it.
    assert found.scalars["psnr_latent_masked"] == base["autoencoder"]["psnr_latent_masked"]
    assert len(set(base["autoencoder"].values())) == 1
    # float32 sums of 10 x 128 squares below 2^16.
    assert base["autoencoder"]["psnr_pixel_masked"] == pytest.approx(
        psnr(whole(originals())), abs=1e-4
    )
    assert base["mean-of-visible"]["psnr_pixel_masked"] == pytest.approx(psnr(hidden()), abs=1e-4)


def test_the_pixel_protocol_encodes_the_image_with_its_holes_filled():
    found, _ = report(perfect)
    assert found.scalars["psnr_pixel_masked"] == pytest.approx(psnr(whole(hidden())), abs=1e-4)


def test_what_stands_in_the_hole_is_not_encoded():
    image, hole = jnp.asarray(originals()), jnp.asarray(holes())
    noise = jax.random.randint(jax.random.key(1), image.shape, 0, 256).astype(jnp.uint8)
    other = jnp.where(hole[..., None], noise, image)
    assert (other != image).any()
    np.testing.assert_array_equal(inpainting.covered(image, hole), inpainting.covered(other, hole))


@pytest.mark.parametrize("fields", [{"batch": 5}, {"batch": 10}, {"batch": 4, "devices": 2}])
def test_scores_do_not_depend_on_batches_and_devices(fields):
    one, other = report(noisy)[0].scalars, report(noisy, **fields)[0].scalars
    assert other == pytest.approx(one, abs=1e-4)  # float32 sums in another order


def test_the_grid_shows_the_first_images():
    found, _ = report(perfect, pictures=3)
    (picture,) = found.images.values()
    assert picture.dtype == np.uint8 and picture.shape[0] > 3 * 16


def test_the_masks_are_those_of_its_seed():
    first, again, other = (report(noisy, seed=seed)[0].scalars for seed in (0, 0, 1))
    assert first == again and first["psnr_pixel_masked"] != other["psnr_pixel_masked"]


def test_both_evaluators_mean_the_same_number_of_tokens():
    """Of 16 tokens at a ratio of 0.15 13.6 are visible: rounded down."""
    cfg = masks.make()
    found, mesh, *_ = evaluator(perfect, cfg=cfg, ratio=0.15)
    other = MaskedConfig(ratios=(0.15,))
    other.resolve(cfg)
    assert [found._keep] == other.build(cfg, cfg.task.build(cfg), mesh)._keeps == [13]


def whitened():
    """A run whose tokens cannot be decoded."""
    return masks.make(**{"task.norm_target": True})


def headless():
    """Masking diffusion that has learned diffusion alone."""
    return masking_runs.make(**{"task.model.recon_head": False, "task.stages": [StageConfig()]})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (diffusing.make, "filled-test-0.5 asks for masked tokens, and the task of this run"),
        (whitened, r"filled-test-0.5: .* whitened tokens .*norm_target=False"),
        (headless, "filled-test-0.5: this network has no reconstruction head"),
    ],
)  # fmt: skip
def test_runs_that_cannot_fill_are_refused_when_they_are_built(make, told, monkeypatch):
    monkeypatch.setattr(generate, "decoder", None)  # before the autoencoder is loaded
    cfg = make()
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    made = FilledConfig(images=pictures(), ratio=0.5)
    made.resolve(cfg)
    with pytest.raises(UserError, match=told):
        made.build(cfg, cfg.task.build(cfg), mesh)


def test_pixels_are_filled_as_numpy_has_it():
    """A masked autoencoder of pixels that says 0 (black) at masked tokens: one protocol."""
    cfg = masks.pixels()
    found, base = report(black, cfg=cfg)
    image, hole = originals().astype(np.float64), holes()
    expected = 10 * np.log10(255**2 / np.mean(image[hole] ** 2))
    assert found.scalars.keys() == {"psnr_pixel_masked", "n"}
    assert found.scalars["psnr_pixel_masked"] == pytest.approx(expected, abs=1e-4)  # float32 sums
    assert base.keys() == {"mean-of-visible"}
    assert base["mean-of-visible"]["psnr_pixel_masked"] == pytest.approx(psnr(hidden()), abs=1e-4)


def black(variables, x, order, keep, label):
    """Pixels of 0 at masked tokens, the others as they are."""
    cells = masking.split(order, keep).masked().reshape(-1, GRID, GRID, 1)
    masked = cells.repeat(CELL, axis=1).repeat(CELL, axis=2)
    norm = variables.constants["norm"]
    return jnp.where(masked, norm.apply(jnp.zeros_like(x)), x)


def test_a_ratio_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="leaves none of 16 tokens visible"):
        evaluator(perfect, ratio=0.99)


def test_images_of_another_size_are_refused():
    images = pictures()
    images.resolution = 32
    with pytest.raises(UserError, match=r"images of 32 px for a network of 16 px"):
        evaluator(perfect, images=images)
    assert FilledConfig(ratio=1.0).problems()
