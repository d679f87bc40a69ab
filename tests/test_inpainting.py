"""Holes, the tokens they cost, and filling those in: against drawings, closed forms and scipy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.integrate import solve_ivp

from dcae_jax import inpainting, masking, rng, sharding
from dcae_jax.config import MeshConfig
from dcae_jax.data import transforms
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import Kind, Prediction, Process, ProcessConfig, Space
from dcae_jax.diffusion.samplers import (
    AncestralConfig,
    DDIMConfig,
    Dopri5Config,
    DPM2MConfig,
    DPMFastConfig,
    EulerConfig,
    HeunConfig,
    sample,
)
from dcae_jax.errors import UserError
from dcae_jax.inpainting import Box, Drawn, Mode, RandomCells, Way
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.tasks.base import Variables
from dcae_jax.tasks.diffuse import DiffuseConfig, DiffuseTask
from dcae_jax.tasks.latents import Normalisation

KEY = rng.key(0)


def cells(*rows):
    """A picture of characters: # is True."""
    return np.array([[c == "#" for c in row.replace(" ", "")] for row in rows])


# -------------------------------------------------------------------------------------------- holes


def test_a_ring_is_drawn_around_the_cells_that_the_hole_touches():
    pixels = np.zeros((12, 12), bool)
    pixels[5, 4:6] = True  # cells of 2 px: row 2, column 2 only
    touched = inpainting.touched(pixels, (6, 6))
    np.testing.assert_array_equal(
        touched, cells("......", "......", "..#...", "......", "......", "......")
    )
    np.testing.assert_array_equal(
        inpainting.dilated(touched, 1),
        cells("......", ".###..", ".###..", ".###..", "......", "......"),
    )
    np.testing.assert_array_equal(
        inpainting.dilated(touched, 2),
        cells("#####.", "#####.", "#####.", "#####.", "#####.", "......"),
    )
    np.testing.assert_array_equal(inpainting.dilated(touched, 0), touched)
    corner = np.zeros((12, 12), bool)
    corner[3, 3] = corner[4, 4] = True  # across the corner of four cells of 4 px
    np.testing.assert_array_equal(inpainting.touched(corner, (3, 3)), cells("#..", ".#.", "..."))
    np.testing.assert_array_equal(
        inpainting.touched(pixels, (3, 6)), cells("......", "..#...", "......")
    )


def test_a_box_and_random_cells_become_holes():
    found = inpainting.hole(Box(2, 4, 3, 1), (50, 60), 8, (4, 4), 0, KEY)
    np.testing.assert_array_equal(
        found.pixels, cells(*["........"] * 4, "..###...", *["........"] * 3)
    )
    np.testing.assert_array_equal(found.masked, cells("....", "....", ".##.", "...."))
    draws = [
        inpainting.hole(RandomCells(0.3), (8, 8), 16, (4, 4), 0, rng.key(seed))
        for seed in (0, 0, 1)
    ]
    for draw in draws:
        assert draw.touched.sum() == round(0.3 * 16) and draw.pixels.sum() == 16 * 5
        np.testing.assert_array_equal(draw.pixels[::4, ::4], draw.masked)
    np.testing.assert_array_equal(draws[0].masked, draws[1].masked)
    assert (draws[0].masked != draws[2].masked).any()
    many = [inpainting.hole(RandomCells(0.3), (8, 8), 4, (4, 4), 0, rng.key(k)) for k in range(400)]
    # Each of 16 cells is among 5 drawn: 400 draws of 5/16 have a deviation of 9.3.
    counts = np.sum([draw.masked for draw in many], axis=0)
    np.testing.assert_allclose(counts, 125, atol=40)


@pytest.mark.parametrize("shape", [(40, 40), (97, 60), (33, 200), (10, 13)])
def test_a_picture_as_a_mask_is_cropped_as_its_image_is(shape):
    """Every pixel of the crop below which the hole lies is in it, and none that is far from it."""
    gen = np.random.default_rng(0)
    white = np.zeros(shape, bool)
    y, x = gen.integers(0, shape[0] - 4), gen.integers(0, shape[1] - 4)
    white[y : y + 4, x : x + 3] = True
    size = 20
    found = inpainting._drawn_pixels(Drawn("m.png", white), shape, size)
    # The image's own crop: coordinates as colours (its bicubic filter is exact for them inside).
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    place = np.stack([rows * 255 / shape[0], columns * 255 / shape[1], 0 * rows], -1)
    crop = transforms.center_crop(place.round().astype(np.uint8), size).astype(float)
    at = crop[..., 0] * shape[0] / 255, crop[..., 1] * shape[1] / 255
    step = max(min(shape) / size, 1)
    margin = 1.5 * step + max(shape) / 255
    inside = (at[0] > y) & (at[0] < y + 3) & (at[1] > x) & (at[1] < x + 2)
    near = (at[0] > y - margin) & (at[0] < y + 3 + margin)
    near &= (at[1] > x - margin) & (at[1] < x + 2 + margin)
    assert not (inside & ~found).any() and not (found & ~near).any()
    whole = cells("##..", "....", "....", "...#")
    np.testing.assert_array_equal(inpainting._drawn_pixels(Drawn("m", whole), (9, 9), 4), whole)


def test_masks_are_resized_by_what_they_cover():
    column = np.array([[True], [False], [False], [False], [True]])
    # Three rows over five: [0, 1.67), [1.67, 3.33), [3.33, 5).
    np.testing.assert_array_equal(inpainting.any_below(column, 3)[:, 0], [True, False, True])
    line = np.arange(5)[:, None] == 1
    np.testing.assert_array_equal(inpainting.any_below(line, 3)[:, 0], [True, True, False])
    np.testing.assert_array_equal(inpainting.any_below(column, 5), column)
    np.testing.assert_array_equal(
        inpainting.any_below(column, 10)[:, 0], [True] * 2 + [False] * 6 + [True] * 2
    )


def test_the_hole_gets_the_mean_of_the_rest_whatever_stood_there():
    gen = np.random.default_rng(0)
    image = gen.integers(0, 255, (6, 6, 3), np.uint8)
    pixels = np.zeros((6, 6), bool)
    pixels[2:4, 1:5] = True
    other = np.where(pixels[..., None], gen.integers(0, 255, image.shape), image).astype(np.uint8)
    found = inpainting.covered(image, pixels)
    np.testing.assert_array_equal(found, inpainting.covered(other, pixels))
    np.testing.assert_array_equal(found[~pixels], image[~pixels])
    # Rounded half up, of whole numbers; JAX's arrays, and batches, get the same.
    assert (found[pixels] == np.floor(image[~pixels].mean(0) + 0.5)).all()
    many = inpainting.covered(jnp.asarray([image, other]), jnp.asarray([pixels, pixels]))
    np.testing.assert_array_equal(many, [found, found])
    half = np.array([[[1, 2, 3], [2, 3, 4], [9, 9, 9]]], np.uint8)
    assert inpainting.covered(half, cells("..#"))[0, 2].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("random:", "a number between 0 and 1"), ("random:1.5", "a number between 0 and 1"),
        ("random:half", "random:0.5"), ("random:nan", "a number between 0 and 1"),
        ("box:1,2,3", "box:X,Y,WIDTH,HEIGHT"), ("box:1,2,0,4", "box:64,64,128,128"),
        ("box:-1,2,3,4", "in whole pixels"), ("nowhere.png", "no such file"),
    ],
)  # fmt: skip
def test_masks_that_cannot_be_are_refused(text, told):
    with pytest.raises(UserError, match=told):
        inpainting.parse(text)


def test_masks_are_parsed(tmp_path):
    assert inpainting.parse("random:0.25") == RandomCells(0.25)
    assert inpainting.parse("box:1, 2,30,4") == Box(1, 2, 30, 4)
    white = cells("#..", ".##")
    Image.fromarray(np.where(white, 255, 40).astype(np.uint8)).save(tmp_path / "m.png")
    found = inpainting.parse(str(tmp_path / "m.png"))
    np.testing.assert_array_equal(found.white, white)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"--mask .*text\.png"):
        inpainting.parse(str(tmp_path / "text.png"))


@pytest.mark.parametrize(
    ("mask", "ring", "told"),
    [
        (Box(3, 0, 6, 2), 0, "ends outside of the 8 x 8 pixels"),
        (Box(0, 0, 8, 8), 0, "everything is masked"),
        (Box(2, 2, 4, 4), 1, "with a ring of 1 no token of 4 x 4 is left"),
        (Drawn("m.png", np.zeros((9, 9), bool)), 0, "nothing is masked"),
        (Drawn("m.png", np.ones((7, 9), bool)), 0, "m.png is 9 x 7 px, the image 9 x 9; give one"),
    ],
)
def test_holes_that_leave_nothing_are_refused(mask, ring, told):
    with pytest.raises(UserError, match=told):
        inpainting.hole(mask, (9, 9), 8, (4, 4), ring, KEY)


# ------------------------------------------------------------------------------ rounds and orders


def test_rounds_of_the_cosine_by_hand():
    # 12 hidden; before round k of 4 they are 12 cos(k pi / 8) = 12, 11.09, 8.49, 4.59, rounded up.
    assert inpainting.keep_counts(4, 16, 4) == (4, 7, 11)
    assert inpainting.keep_counts(4, 16, 1) == (4,)
    assert inpainting.keep_counts(15, 16, 8) == (15,), "no round without a new token"
    counts = inpainting.keep_counts(64, 256, 12)
    assert len(counts) == 12 and counts[0] == 64 and counts[-1] < 256
    assert (np.diff(np.diff(counts)) > -2).all(), "later rounds reveal more"


def test_known_tokens_come_first_and_others_in_any_order():
    masked = jnp.asarray([[False, True, True, False, True, False]])
    orders = {
        tuple(np.asarray(inpainting.hidden_last(masked, rng.key(k)))[0].tolist()) for k in range(99)
    }
    assert {order[:3] for order in orders} == {(0, 3, 5)}
    assert len({order[3:] for order in orders}) == 6, "all orders of three"


# ------------------------------------------------------------------------- known tokens of a sample

ROWS = COLUMNS = 4
TOKENS = ROWS * COLUMNS
PLACE = np.stack(np.divmod(np.arange(TOKENS), COLUMNS), -1)
FLOW = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v).build()
DISCRETE = ProcessConfig().build()


def covariance(rho):
    """Neighbours of a grid have the correlation rho."""
    return rho ** np.abs(PLACE[:, None] - PLACE[None]).sum(-1)


def smooth(rank=3):
    """Planes over the grid: three tokens determine all others."""
    planes = np.column_stack([np.ones(TOKENS), PLACE / 3 - 0.5])[:, :rank]
    return planes @ planes.T


def gaussian(process, c, dtype=jnp.float32):
    """E[x0 | x_t] and E[eps | x_t] of tokens with covariance c, channels apart."""
    values, vectors = np.linalg.eigh(c)
    values, vectors = jnp.asarray(np.maximum(values, 0), dtype), jnp.asarray(vectors, dtype)

    def denoise(x, t):
        a, s = (f(t)[:, None, None] for f in (process.alpha, process.sigma))
        flat = jnp.einsum("nk,bnc->bkc", vectors, x.reshape(x.shape[0], TOKENS, -1))
        part = flat / (a**2 * values[:, None] + s**2)
        back = lambda y: jnp.einsum("nk,bkc->bnc", vectors, y).reshape(x.shape)  # noqa: E731
        return Prediction(back(a * values[:, None] * part), back(s * part), None)

    return denoise


def filled(sampler, process, c, z, noise, masked):
    """A sample with the known tokens of z on their path."""
    known = inpainting.with_known(gaussian(process, c), process, z, noise, masked)
    t = sampler.times(sampler.check_steps(None))[:1]
    begin = jnp.where(masked, noise, process.diffuse(z, noise, t))
    return jax.jit(lambda x: sample(sampler, known, x, KEY, jnp.arange(1)))(begin).x0


HIDDEN = np.zeros(TOKENS, bool)
HIDDEN[[5, 6, 9]] = True
MASKED = jnp.asarray(HIDDEN.reshape(1, ROWS, COLUMNS, 1))


def drawn(c, seed=0):
    """(a field of covariance c, noise), one example of two channels."""
    gen = np.random.default_rng(seed)
    values, vectors = np.linalg.eigh(c)
    z = vectors * np.sqrt(np.maximum(values, 0)) @ gen.normal(size=(TOKENS, 2))
    shape = (1, ROWS, COLUMNS, 2)
    return (jnp.asarray(x.reshape(shape), jnp.float32) for x in (z, gen.normal(size=shape)))


@pytest.mark.parametrize(
    "cfg",
    [
        HeunConfig(steps=400),
        pytest.param(DPM2MConfig(steps=400), marks=pytest.mark.slow),
        pytest.param(EulerConfig(steps=400), marks=pytest.mark.slow),
        pytest.param(DDIMConfig(steps=400), marks=pytest.mark.slow),
        pytest.param(Dopri5Config(1e-5, 1e-6, end=1e-3), marks=pytest.mark.slow),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_known_tokens_determine_is_found(cfg):
    """The conditional Gaussian in closed form, where it is a point: planes over the grid."""
    c = smooth()
    z, noise = drawn(c)
    flat = np.asarray(z, np.float64).reshape(TOKENS, 2)
    among = c[np.ix_(~HIDDEN, ~HIDDEN)]
    mean = c[np.ix_(HIDDEN, ~HIDDEN)] @ np.linalg.pinv(among, rcond=1e-9) @ flat[~HIDDEN]
    np.testing.assert_allclose(mean, flat[HIDDEN], atol=1e-6)  # the plane is the field's own
    found = np.asarray(filled(cfg.build(FLOW), FLOW, c, z, noise, MASKED)).reshape(TOKENS, 2)
    # What is not on the plane falls as a power of the last time, about its root: 0.005 to 0.01
    # are left at 1/400.  Without the known tokens it is off by 1.
    np.testing.assert_allclose(found[HIDDEN], mean, atol=2e-2)


def path(process, cfg):
    """Angles u of the run's ends; with them x_t = cos(u) x0 + sin(u) eps, or (1 - u) x0 + u eps."""
    t = np.asarray(cfg.build(process).times(1), np.float64)
    if process is FLOW:
        return t
    return np.arctan2(
        *(np.asarray(f(jnp.asarray(t)), float) for f in (process.sigma, process.alpha))
    )


@pytest.mark.parametrize(
    ("process", "cfg", "rho"),
    [
        (FLOW, HeunConfig(steps=200), 0.0), (FLOW, HeunConfig(steps=200), 0.8),
        (DISCRETE, DPMFastConfig(steps=150, end=0.05), 0.8),
        pytest.param(DISCRETE, HeunConfig(steps=900, end=0.01), 0.8, marks=pytest.mark.slow),
        pytest.param(FLOW, DPM2MConfig(steps=900), 0.5, marks=pytest.mark.slow),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Process) else str(value),
)  # fmt: skip
def test_partly_determined_tokens_against_scipy(process, cfg, rho):
    """The ODE of the hidden tokens alone, the others on their path, by another solver."""
    c = covariance(rho) if rho else np.eye(TOKENS)
    z, noise = drawn(c, seed=1)
    found = np.asarray(filled(cfg.build(process), process, c, z, noise, MASKED))
    known, eps = (np.asarray(x, np.float64).reshape(TOKENS, 2) for x in (z, noise))

    def velocity(u, hidden):
        a, s = (1 - u, u) if process is FLOW else (np.cos(u), np.sin(u))
        x = a * known + s * eps
        x[HIDDEN] = hidden.reshape(-1, 2)
        part = np.linalg.solve(a**2 * c + s**2 * np.eye(TOKENS), x)
        x0, eps_found = a * c @ part, s * part
        found = eps_found - x0 if process is FLOW else a * eps_found - s * x0
        return found[HIDDEN].ravel()

    first, last = path(process, cfg)
    begin = eps[HIDDEN].ravel()
    exact = solve_ivp(velocity, (first, max(last, 1e-7)), begin, rtol=1e-9, atol=1e-11).y[:, -1]
    found = found.reshape(TOKENS, 2)[HIDDEN]
    # Errors of the methods at these numbers of steps; left alone the tokens are off by 0.3.
    np.testing.assert_allclose(found, exact.reshape(-1, 2), atol=5e-3)
    if not rho:  # independent tokens learn nothing: noise and data are of one law
        np.testing.assert_allclose(found, eps[HIDDEN], atol=5e-3)


@pytest.mark.parametrize(
    ("process", "cfg"),
    [
        (FLOW, EulerConfig(steps=7)), (FLOW, DPM2MConfig(steps=7)),
        (DISCRETE, DPMFastConfig(steps=7)),
        (ProcessConfig(kind=Kind.ddpm).build(), DDIMConfig(steps=7)),
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_samplers_stay_on_the_path_of_known_tokens(process, cfg):
    """Their own state, not only what the network is shown: it ends at x0, or just before it."""
    c = covariance(0.5)
    z, noise = drawn(c)
    sampler = cfg.build(process)
    found = filled(sampler, process, c, z, noise, MASKED)
    end = process.diffuse(z, noise, sampler.times(7)[-1:])
    outside = ~np.asarray(MASKED)[0, ..., 0]
    np.testing.assert_allclose(found[0, outside], end[0, outside], atol=2e-5)  # sums of 7 steps


def test_stochastic_samplers_are_shown_the_same_path():
    """Their own state wanders; what the network sees of the known tokens does not."""
    seen = []
    process = ProcessConfig(kind=Kind.ddpm).build()
    z, noise = drawn(covariance(0.5))

    def look(x, t):
        jax.debug.callback(lambda x, t: seen.append((np.asarray(x), np.asarray(t))), x, t)
        return Prediction(jnp.zeros_like(x), x, None)

    known = inpainting.with_known(look, process, z, noise, MASKED)
    sampler = AncestralConfig(steps=4).build(process)
    sample(sampler, known, noise, KEY, jnp.arange(1))
    jax.effects_barrier()
    outside = ~np.asarray(MASKED)[0, ..., 0]
    assert len(seen) == 4
    for x, t in seen:
        path = process.diffuse(z, noise, jnp.asarray(t))
        # To the last bit but one: the callback and this line are compiled apart.
        np.testing.assert_allclose(x[0, outside], np.asarray(path)[0, outside], atol=1e-7)


@dataclasses.dataclass(slots=True)
class ExactConfig(DiffuseConfig):
    """Of a network that knows what is hidden."""

    def filling_problem(self) -> str | None:
        return None


class Exact(DiffuseTask):
    """Exact networks of Gaussian tokens: the denoiser, and the mean of hidden tokens."""

    def __init__(self, c, process=FLOW):
        model = UViTConfig(in_channels=2, input_size=(ROWS, COLUMNS), width=16, depth=2, heads=2)
        self.cfg, self.process, self.c = ExactConfig(model=model), process, c
        self.objectives = ()

    def denoiser(self, variables):
        exact = gaussian(self.process, self.c)
        return lambda x, t, cond: exact(x, t)

    def grid(self):
        return ROWS, COLUMNS

    def fill(self, variables, x, order, keep, label):
        c, flat = jnp.asarray(self.c, jnp.float32), x.reshape(TOKENS, -1)
        known, rest = order[0, :keep], order[0, keep:]
        among = jnp.linalg.solve(c[known][:, known], flat[known])
        return flat.at[rest].set(c[rest][:, known] @ among).reshape(x.shape)


NORM = Normalisation(jnp.asarray([0.3, -1.1]), jnp.asarray([1.7, 0.3]))
MESH = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def inpainted(way, seed=0, rho=0.9):
    """(known latents, latents filled in, the mean of the hidden ones given the others)."""
    c = covariance(rho)
    z, _ = drawn(c, seed=2)
    latent = NORM.invert(z)
    task = Exact(c)
    found = inpainting.Inpainter(task, way, MESH, seed)(
        Variables({}, {}, {"norm": NORM}), latent, HIDDEN.reshape(ROWS, COLUMNS), 0, "name"
    )
    flat = np.asarray(z, np.float64).reshape(TOKENS, 2)
    among = np.linalg.solve(c[np.ix_(~HIDDEN, ~HIDDEN)], flat[~HIDDEN])
    return latent, found, c[np.ix_(HIDDEN, ~HIDDEN)] @ among


def hidden(latent):
    return np.asarray(NORM.apply(latent)).reshape(TOKENS, 2)[HIDDEN]


@pytest.mark.parametrize(
    ("way", "calls"), [(Way(Mode.reconstruct), 1), (Way(Mode.progressive, rounds=6), 3)]
)
def test_reconstructions_are_the_conditional_mean(way, calls):
    """In rounds as well: a token that is set to its mean does not move the mean of the others."""
    latent, found, mean = inpainted(way)
    np.testing.assert_allclose(hidden(found.latents), mean, atol=1e-4)  # f32, condition 400
    assert found.evaluations.tolist() == [calls]
    outside = ~HIDDEN.reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(found.latents[0, outside], latent[0, outside])


def test_a_hybrid_is_the_nearer_to_the_reconstruction_the_later_it_starts():
    distances = []
    for start in (0.02, 0.5, 1.0):
        way = Way(Mode.hybrid, start=start, sampler=HeunConfig(steps=100), guide=GuidanceConfig())
        latent, found, mean = inpainted(way)
        distances.append(np.abs(hidden(found.latents) - mean).max())
        assert found.evaluations.tolist() == [1 + 2 * round(100 * start) - 1]
        outside = ~HIDDEN.reshape(ROWS, COLUMNS)
        np.testing.assert_array_equal(found.latents[0, outside], latent[0, outside])
    assert distances[0] < 0.05 < distances[1] < distances[2], distances
    # Where nothing but noise is left of the reconstruction, it is a sample.
    whole = Way(Mode.diffusion, sampler=HeunConfig(steps=100), guide=GuidanceConfig())
    sampled = inpainted(whole)[1]
    np.testing.assert_allclose(sampled.latents, found.latents, atol=1e-5)


def test_samples_are_functions_of_seed_and_name():
    way = Way(Mode.diffusion, sampler=EulerConfig(steps=2), guide=GuidanceConfig())
    one, again, other = (np.asarray(inpainted(way, seed)[1].latents) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_an_order_of_masked_tokens_is_what_fill_takes():
    """`hidden_last` and `masking.split` speak of the same tokens."""
    masked = jnp.asarray(HIDDEN[None])
    order = inpainting.hidden_last(masked, KEY)
    split = masking.split(order, TOKENS - int(HIDDEN.sum()))
    np.testing.assert_array_equal(split.masked(), masked)
