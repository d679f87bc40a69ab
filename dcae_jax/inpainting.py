"""Filling in parts of images: holes, the tokens that they cost, and four ways to fill those in.

A hole is a set of pixels.  The image is encoded with the hole filled by one colour, so that nothing
of what stood there is left, and a token is unknown if its cell touches the hole or is near it: the
encoder is global, and its latents next to the hole know of the colour.
"""

import enum
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt8
from PIL import Image

from dcae_jax import masking, rng
from dcae_jax.data import transforms
from dcae_jax.data.transforms import Pixels
from dcae_jax.diffusion import guidance, samplers
from dcae_jax.diffusion.guidance import Denoise, GuidanceConfig
from dcae_jax.diffusion.process import Latents, Prediction, Process, Times
from dcae_jax.diffusion.samplers import SamplerConfig
from dcae_jax.errors import UserError
from dcae_jax.tasks.base import Fills, Task, Variables
from dcae_jax.tasks.diffuse import DiffuseTask

Pixelwise = Bool[np.ndarray, "h w"]
Cellwise = Bool[np.ndarray, "rows columns"]
Images = UInt8[np.ndarray | Array, "*b h w 3"]
Holes = Bool[np.ndarray | Array, "*b h w"]
_WHITE = 128  # of a mask picture: pixels from here on are the hole


class Mode(enum.Enum):
    """How unknown tokens are filled in."""

    reconstruct = "reconstruct"  # one pass of the head for masked tokens: their mean
    progressive = "progressive"  # rounds of it; in each some tokens become known
    diffusion = "diffusion"  # samples, the known tokens put back before each call of the network
    hybrid = "hybrid"  # the same from a reconstruction with noise, not from noise alone

    @property
    def fills(self) -> bool:
        """Whether it needs a head for masked tokens."""
        return self is not Mode.diffusion

    @property
    def samples(self) -> bool:
        """Whether it needs a diffusion model."""
        return self in (Mode.diffusion, Mode.hybrid)


class Encoded(enum.Enum):
    """What the encoder is shown."""

    pixel = "pixel"  # the image with its hole filled: nothing of the hole is known
    latent = "latent"  # the whole image, tokens dropped afterwards: the others know of the hole


# -------------------------------------------------------------------------------------------- holes


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels of the picture that the network sees."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class RandomCells:
    """A share of the cells of the tokens, drawn for each image."""

    share: float


@dataclass(frozen=True, eq=False)
class Drawn:
    """White pixels of a picture of the size of the images, or of what the network sees."""

    name: str
    white: Pixelwise


Mask = Box | RandomCells | Drawn


class Hole(NamedTuple):
    """What is missing of a picture."""

    pixels: Pixelwise
    touched: Cellwise  # tokens whose cells touch it
    masked: Cellwise  # these, and the ring around them


def parse(text: str) -> Mask:
    """The mask that `random:0.5`, `box:x,y,w,h` or a picture's path means; UserError if none."""
    kind, colon, rest = text.partition(":")
    if kind == "random" and colon:
        return _random(text, rest)
    if kind == "box" and colon:
        return _box(text, rest)
    path = epath.Path(text).expanduser()
    if not path.exists():
        raise UserError(
            f"--mask {text}: no such file; give a picture that is white where the hole is, "
            "random:SHARE or box:X,Y,WIDTH,HEIGHT"
        )
    try:
        pixels = transforms.decode(path.read_bytes(), text)
    except transforms.BadRecord as e:
        raise UserError(f"--mask {e}") from e
    return Drawn(text, pixels.max(axis=2) >= _WHITE)


def _random(text: str, rest: str) -> RandomCells:
    try:
        share = float(rest)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UserError(
            f"--mask {text}: the share of cells is a number between 0 and 1: random:0.5"
        )
    return RandomCells(share)


def _box(text: str, rest: str) -> Box:
    match = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", rest.replace(" ", ""))
    if not match or not all(map(int, match.groups()[2:])):
        raise UserError(
            f"--mask {text}: a box is box:X,Y,WIDTH,HEIGHT in whole pixels, e.g. box:64,64,128,128"
        )
    return Box(*map(int, match.groups()))


def hole(
    mask: Mask, image: tuple[int, int], size: int, grid: tuple[int, int], ring: int,
    key: PRNGKeyArray,
) -> Hole:  # fmt: skip
    """The hole of an image of (height, width) `image`, of which the network sees `size` x `size`.

    `grid`: (rows, columns) of tokens.  `ring`: tokens around those that touch the hole which are
    unknown as well.  UserError where nothing, or everything, is unknown.
    """
    if isinstance(mask, RandomCells):
        pixels = _spread(_random_cells(mask.share, grid, key), size)
    elif isinstance(mask, Box):
        pixels = _box_pixels(mask, size)
    else:
        pixels = _drawn_pixels(mask, image, size)
    if not pixels.any():
        raise UserError("nothing is masked: the mask leaves no hole in what the network sees")
    cells = touched(pixels, grid)
    masked = dilated(cells, ring)
    if masked.all():
        around = f"with a ring of {ring} " if ring else ""
        raise UserError(
            f"everything is masked: {around}no token of {grid[0]} x {grid[1]} is left to go by; "
            "make the hole smaller" + (", or --ring smaller" if ring else "")
        )
    return Hole(pixels, cells, masked)


def _random_cells(share: float, grid: tuple[int, int], key: PRNGKeyArray) -> Cellwise:
    """So many cells, at least one, any of them."""
    tokens = grid[0] * grid[1]
    order = np.asarray(masking.random_order(key, 1, *grid))[0]
    found = np.zeros(tokens, bool)
    found[order[: max(1, round(share * tokens))]] = True
    return found.reshape(grid)


def _spread(cells: Cellwise, size: int) -> Pixelwise:
    rows, columns = cells.shape
    return cells.repeat(size // rows, axis=0).repeat(size // columns, axis=1)


def _box_pixels(box: Box, size: int) -> Pixelwise:
    if box.x + box.width > size or box.y + box.height > size:
        raise UserError(
            f"--mask box:{box.x},{box.y},{box.width},{box.height} ends outside of the {size} x "
            f"{size} pixels that the network sees"
        )
    found = np.zeros((size, size), bool)
    found[box.y : box.y + box.height, box.x : box.x + box.width] = True
    return found


def _drawn_pixels(mask: Drawn, image: tuple[int, int], size: int) -> Pixelwise:
    """The mask resized and cropped as its image is."""
    if mask.white.shape == (size, size):
        return mask.white
    if mask.white.shape != image:
        height, width = mask.white.shape
        raise UserError(
            f"--mask {mask.name} is {width} x {height} px, the image {image[1]} x {image[0]}; give "
            f"one of the image's size, or of the {size} x {size} px that the network sees"
        )
    blank = Image.new("L", image[::-1])
    width, height = transforms.resize_shorter(blank, size).size
    scaled = any_below(any_below(mask.white, height).T, width).T
    top, left = (height - size) // 2, (width - size) // 2
    return scaled[top : top + size, left : left + size]


def any_below(mask: Pixelwise, height: int) -> Bool[np.ndarray, "h2 w"]:
    """Resized to that height: a row is masked where any row of the mask that it covers is."""
    edges = np.arange(height + 1) * len(mask) / height
    first, last = np.floor(edges[:-1]).astype(int), np.ceil(edges[1:]).astype(int)
    total = np.concatenate([np.zeros((1, mask.shape[1]), int), mask.cumsum(axis=0)])
    return total[last] > total[first]


def touched(pixels: Pixelwise, grid: tuple[int, int]) -> Cellwise:
    """The cells that hold a pixel of the hole."""
    rows, columns = grid
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    return pixels.reshape(rows, height, columns, width).any(axis=(1, 3))


def dilated(cells: Cellwise, ring: int) -> Cellwise:
    """These cells and all within `ring` rows and columns of them."""
    side = 2 * ring + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(cells, ring), (side, side))
    return windows.any(axis=(2, 3))


def covered(image: Images, hole: Holes) -> Images:
    """The images with the mean of their known pixels, rounded half up, in the hole.

    Whole numbers throughout: numpy and JAX, any batch and any number of devices agree to the bit.
    """
    # JAX has 32 bits: enough for 4,000 px of side, far beyond what evaluators take.
    xp, whole = (jnp, jnp.uint32) if isinstance(image, jax.Array) else (np, np.uint64)
    known = ~hole[..., None]
    total = xp.sum(xp.where(known, image, 0), axis=(-3, -2), keepdims=True, dtype=whole)
    count = xp.sum(known, axis=(-3, -2), keepdims=True, dtype=whole)
    return xp.where(known, image, ((total + count // 2) // count).astype(xp.uint8))


def hidden_crop(image: Pixels, mask: Mask, hole: Hole) -> UInt8[np.ndarray, "side side 3"]:
    """What the network sees of the image: its crop, with nothing left of what stood in the hole.

    A hole in the pixels of the image itself is covered before the image is resized as well: the
    filter would carry it to pixels beside the hole.
    """
    if isinstance(mask, Drawn) and mask.white.shape == image.shape[:2]:
        image = covered(image, mask.white)
    return covered(transforms.center_crop(image, len(hole.pixels)), hole.pixels)


# --------------------------------------------------------------------------------- the four ways


def keep_counts(visible: int, tokens: int, rounds: int) -> tuple[int, ...]:
    """How many tokens are known in each round, rising as MaskGIT's cosine (arXiv 2202.04200).

    Rounds in which no further token would become known are left out.
    """
    hidden = tokens - visible
    left = [math.ceil(hidden * math.cos(math.pi * k / (2 * rounds))) for k in range(rounds)]
    return tuple(sorted({tokens - n for n in left}))


def hidden_last(masked: Bool[Array, "b n"], key: PRNGKeyArray) -> Int[Array, "b n"]:
    """An order of the tokens: known ones as they stand, then the others, all orders alike."""
    draw = jax.random.uniform(key, masked.shape)
    return jnp.argsort(jnp.where(masked, 1.0 + draw, 0.0), axis=1, stable=True)


def with_known(
    denoise: Denoise, process: Process, x0: Latents, eps: Latents, masked: Bool[Array, "b h w 1"]
) -> Denoise:
    """The denoiser with the known numbers of x_t on the path from `eps` to `x0`, whatever x_t has.

    There it says x0 and eps themselves, so that any sampler stays on that path: x_t =
    alpha x0 + sigma eps, with one eps for the whole run (as RePaint, arXiv 2201.09865, without its
    draws at each step).  Samples are exact where the known tokens determine the others; elsewhere,
    since the network sees the known ones only under noise, they keep too near to what it would draw
    without them.
    """

    def replaced(x: Latents, t: Times) -> Prediction:
        found = denoise(jnp.where(masked, x, process.diffuse(x0, eps, t).astype(x.dtype)), t)
        return Prediction(
            jnp.where(masked, found.x0, x0), jnp.where(masked, found.eps, eps), found.variance_mix
        )

    return replaced


@dataclass(frozen=True)
class Way:
    """A mode with its options."""

    mode: Mode
    rounds: int = 8  # of progressive
    start: float = 0.5  # of hybrid: the time whose noise is laid on the reconstruction
    sampler: SamplerConfig | None = None  # of diffusion and hybrid
    guide: GuidanceConfig | None = None


def mode_problem(task: Task, mode: Mode) -> str | None:
    """Why a task cannot fill in that way."""
    if mode.samples and not isinstance(task, DiffuseTask):
        return (
            f"mode {mode.value} needs a diffusion model, and this network knows no noise; use "
            "reconstruct or progressive"
        )
    if mode.fills and not isinstance(task, Fills):
        return (
            f"mode {mode.value} needs a network with a head for masked tokens (x0), and this one "
            "has only learned to remove noise; use diffusion"
        )
    if mode.samples and (why := task.cfg.sampling_problem()):
        return f"mode {mode.value} needs a diffusion model: {why}; use reconstruct or progressive"
    if mode.fills and (why := task.cfg.filling_problem()):
        return f"mode {mode.value} needs decodable predictions of masked tokens: {why}"
    return None


class Filled(NamedTuple):
    """Latents as the autoencoder decodes them, known ones as they came."""

    latents: Latents
    evaluations: Int[Array, " b"]  # calls of the network; guidance doubles what one costs


class Inpainter:
    """Fills in tokens of latents; a function of (weights, known tokens, class, seed, name) alone.

    One program for each number of known tokens, where the head for masked tokens is used.
    """

    def __init__(self, task: Task, way: Way, mesh: Mesh, seed: int):
        if problem := mode_problem(task, way.mode):
            raise UserError(problem)
        self._task, self._way, self._mesh, self._seed = task, way, mesh, seed
        self._sampler = None
        if way.mode.samples:
            sampler = way.sampler.build(task.process)
            self._sampler = sampler if way.mode is Mode.diffusion else sampler.starting(way.start)
        self._run = jax.jit(self._filled, static_argnames="keeps")

    def __call__(
        self, variables: Variables, latent: Latents, masked: Cellwise, label: int, name: str
    ) -> Filled:
        """The latent [1, h, w, c] of one image, with the masked tokens filled in."""
        flat = masked.reshape(1, -1)
        with jax.set_mesh(self._mesh):
            return self._run(
                variables, latent, jnp.asarray(flat), jnp.asarray([label], jnp.int32),
                rng.key(self._seed, 0, "inpaint", name), keeps=self.keeps(masked),
            )  # fmt: skip

    def keeps(self, masked: Cellwise) -> tuple[int, ...]:
        """How many tokens are known in each call of the head for masked ones."""
        if not self._way.mode.fills:
            return ()
        rounds = self._way.rounds if self._way.mode is Mode.progressive else 1
        return keep_counts(int((~masked).sum()), masked.size, rounds)

    def _filled(
        self, variables: Variables, latent: Latents, masked: Bool[Array, "b n"],
        label: Int[Array, " b"], key: PRNGKeyArray, keeps: Sequence[int],
    ) -> Filled:  # fmt: skip
        norm, cells = variables.constants["norm"], self._spread(masked)
        x = jnp.where(cells, 0.0, norm.apply(latent))
        k_order, k_noise = jax.random.split(key)
        order, filled = hidden_last(masked, k_order), x
        for keep in keeps:
            filled = self._task.fill(variables, filled, order, keep, label)
        evaluations = jnp.full(masked.shape[:1], len(keeps), jnp.int32)
        if self._sampler is not None:
            found = self._sampled(variables, x, filled, cells, label, k_noise)
            filled, evaluations = found.x0, evaluations + found.evaluations
        found = norm.invert(filled.astype(jnp.float32))
        return Filled(jnp.where(cells, found, latent), evaluations)

    def _spread(self, masked: Bool[Array, "b n"]) -> Bool[Array, "b h w 1"]:
        """From tokens to pixels of the latent."""
        model = self._task.cfg.model
        grid = masked.reshape(-1, *model.grid(*model.input_size), 1)
        return grid.repeat(model.patch, axis=1).repeat(model.patch, axis=2)

    def _sampled(
        self, variables: Variables, x: Latents, guess: Latents, cells: Bool[Array, "b h w 1"],
        label: Int[Array, " b"], key: PRNGKeyArray,
    ) -> samplers.Sampled:  # fmt: skip
        """From noise alone in the unknown tokens, or from `guess` with noise."""
        process, sampler = self._task.process, self._sampler
        indices = jnp.arange(x.shape[0])
        noise = samplers.initial_noise(key, indices, x.shape[1:])
        first = sampler.times(sampler.check_steps(None))[:1].astype(x.dtype)
        t = jnp.broadcast_to(first, x.shape[:1])
        whole = self._way.mode is Mode.diffusion
        begin = jnp.where(cells & whole, noise, process.diffuse(guess, noise, t))
        cond = {"label": label}
        null = guidance.null_class(cond, self._task.cfg.model.num_classes)
        guide = self._way.guide or GuidanceConfig()
        denoise = guidance.guided(guide, self._task.denoiser(variables), cond, null)
        known = with_known(denoise, process, x, noise, cells)
        return samplers.sample(sampler, known, begin, key, indices)
