"""Fill in holes of images with a network that was trained on latents: PNGs, panels, scores.

Which modes a run has: a masked autoencoder (LMD, MAE) reconstruct and progressive, if it was
trained with --config.task.norm_target=False (whitened tokens cannot be decoded); a
masking-diffusion model (MD-UViT) all four, if its stages trained diffusion and the head for masked
tokens (rec_target=latent); any other diffusion model diffusion alone.  Examples:

  python -m dcae_jax inpaint --from runs/md_uvit --images photos/ --mask box:128,128,256,256 \\
      --mode hybrid --label 207 --cfg 1.5 --out seen
  python main.py --config=configs/lmd.py:b,f8 --config.task.norm_target=False --workdir=runs/lmd
  python -m dcae_jax inpaint --from runs/lmd --images cat.jpg --mask hole.png \\
      --mode reconstruct --out seen
  python -m dcae_jax inpaint --from runs/md_uvit --images photos/ --mask random:0.5 \\
      --mode progressive --rounds 8 --out seen
  python -m dcae_jax inpaint --from runs/uvit_s --images photos/ --mask hole.png \\
      --mode diffusion --sampler heun --steps 50 --out seen

Images are brought to the resolution that the network was trained on, by its centre crop.  A mask
picture is white where the hole is (see-through counts as white); it has the size of the image (both
are cropped alike) or that resolution, in whose pixels a box is given.  random:SHARE drops whole
cells of tokens, other ones in each image.

  reconstruct   the mean of what could be there, one pass: blurred
  progressive   the same in --rounds; what a round filled in is known to the next
  diffusion     a sample; the known tokens are put back before each call of the network
  hybrid        a sample that starts at time --start from the reconstruction with noise

With --protocol pixel (default) the encoder sees the image with its hole filled by the mean colour
of the rest, and a token is unknown if its cell touches the hole or lies within --ring tokens of it.
With --protocol latent the whole image is encoded and tokens are dropped afterwards: the encoder is
global, so the others know of the hole, and scores are better than they could be.

OUT/NAME.png is what the decoder makes of the filled latent, OUT/NAME_pasted.png the same with the
known pixels of what the encoder was shown pasted back.  OUT/panels.png shows original | masked |
result | pasted back | autoencoder alone (lines: cells of the tokens; red: those that the hole
touches, blue: the ring).  OUT/scores.json holds the PSNR of the hole before pasting, the SSIM of
its bounding box, and the same of the autoencoder alone with nothing masked; "mean" is over images,
"psnr_pooled" that of the pixels of all holes together, as evaluators of runs have it.
"""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from dcae_jax.cli import _options

if TYPE_CHECKING:
    import jax
    from etils import epath
    from jax.sharding import Mesh

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.cli._trained import Model
    from dcae_jax.data.files import ImageFile
    from dcae_jax.data.transforms import Pixels
    from dcae_jax.diffusion.guidance import GuidanceConfig
    from dcae_jax.inpainting import Encoded, Filled, Hole, Inpainter, Mask, Mode, Way
    from dcae_jax.tasks.base import Variables

_SHOWN = 8  # images in the panels
_CELL = 256  # pixels of a side of a picture there
_ROUNDS, _START, _RING = 8, 0.5, 1
_TOUCHED, _AROUND = (214, 39, 40), (31, 119, 180)  # of the masked panel
_TINT = 0.5
_COLUMNS = ["original", "masked", "result", "pasted back", "autoencoder alone"]
_LINE = 0.35  # how much of a border of a cell is white
_FOR = {
    "rounds": ("progressive",), "start": ("hybrid",),
    "cfg": ("diffusion", "hybrid"), "sampler": ("diffusion", "hybrid"),
    "steps": ("diffusion", "hybrid"), "sampler_option": ("diffusion", "hybrid"),
}  # fmt: skip


INTERRUPTED = 130  # as shells report a process that SIGINT ended


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax inpaint`; 1 if an image could not be used."""
    args = _parser().parse_args(argv)
    from dcae_jax import backend, outputs

    files = _files(args)
    out = outputs.new_folder(args.out, "--out")
    job = _job(args)
    for file in files:
        size = file.size()
        if all(size):  # a picture at all: what is wrong with the others is told later
            _hole(job, file, size)
    backend.compile_cache("auto")
    work = _open(args, job)
    done = _Done([], [], {})
    with outputs.claimed(out, "--out"):
        stopped = _all(work, files, out, done)
        record = json.dumps(_record(work, done), indent=1)
        outputs.write(out / "scores.json", record.encode())
        if done.rows:
            _write_panels(work, out, done)
    if done.rows:
        print(_table(done.rows))
    bad = f", {len(done.bad)} bad image(s)" if done.bad else ""
    if stopped:
        print(f"\ninterrupted: {len(done.rows)} of {len(files)} images in {out}, scored{bad}")
        return INTERRUPTED
    print(f"\n{len(done.rows)} images in {out}{bad}")
    return 1 if done.bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = _options.parser("inpaint", __doc__)
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="RUN",
        help="workdir of a run, or one step directory of it")  # fmt: skip
    _options.add_images(parser)
    add("--mask", required=True, metavar="MASK",
        help="a picture, random:SHARE, or box:X,Y,WIDTH,HEIGHT")  # fmt: skip
    add("--mode", required=True, choices=("reconstruct", "progressive", "diffusion", "hybrid"))
    add("--out", required=True, metavar="DIR", help="a new or empty folder")
    add("--protocol", choices=("pixel", "latent"), default="pixel",
        help="what is encoded: the image with its hole filled, or all of it")  # fmt: skip
    add("--ring", type=int, metavar="N",
        help=f"tokens around the hole that are unknown as well (default: {_RING}; random: 0, or "
        "none would be known)")  # fmt: skip
    add("--rounds", type=int, metavar="K", help=f"of progressive (default: {_ROUNDS})")
    add("--start", type=float, metavar="T",
        help=f"of hybrid: 1 is noise alone, 0 the reconstruction (default: {_START})")  # fmt: skip
    add("--label", metavar="CLASS", help="number or name, for networks of classes; default: none")
    add("--cfg", type=float, metavar="SCALE", help="guidance towards --label; 1 (default): off")
    add("--sampler", metavar="NAME", help="as in `sample`; default: that of the run's own grids")
    add("--steps", type=int, metavar="N", help="of the sampler; hybrid takes the share of --start")
    add("--sampler-option", action="append", default=[], metavar="NAME=VALUE",
        help="another option of the sampler, as in `sample`; may be repeated")  # fmt: skip
    add("--seed", type=int, metavar="S", help="of masks, noise, rounds; default: that of the run")
    add("--params", choices=("ema", "raw"), default="ema", help="average (default) or raw weights")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of activations; default: that of the configs of network, autoencoder")  # fmt: skip
    add("--autoencoder", metavar="AE",
        help=f"encodes and decodes; default: that of the latents. {_options.FROM}")  # fmt: skip
    return parser


def _files(args: argparse.Namespace) -> "list[ImageFile]":
    """The images, so named that no result is another one's pasted result."""
    from dcae_jax.data import files

    found = files.find(args.images)
    # The folders are read once more only where an image is called like a result.
    names = ("panels", *(f"{file.name}_pasted" for file in found))
    if not {name.lower() for name in names} & {file.name.lower() for file in found}:
        return found
    return files.find(args.images, reserved=names)


# ----------------------------------------------------------------------- what is asked for, checked


class _Job(NamedTuple):
    """What is asked for, checked before any weights are read."""

    model: "Model"
    mask: "Mask"
    way: "Way"
    encoded: "Encoded"
    ring: int
    label: int  # the number of classes: none
    seed: int
    size: int  # pixels of a side of what the network sees
    grid: tuple[int, int]  # of tokens


def _job(args: argparse.Namespace) -> _Job:
    from dcae_jax import autoencoder, inpainting
    from dcae_jax.cli import _trained
    from dcae_jax.errors import UserError
    from dcae_jax.inpainting import Encoded, Mode
    from dcae_jax.tasks.diffuse import DiffuseConfig
    from dcae_jax.tasks.mask_latents import MaskLatentsConfig

    mask, mode = inpainting.parse(args.mask), Mode(args.mode)
    _refuse_unused(args)
    kinds = (DiffuseConfig, MaskLatentsConfig)
    what = "a diffusion model or a masked autoencoder"
    model = _trained.find(args, "--from", args.source, kinds, what)
    task = model.run.task.build(model.run)
    if problem := inpainting.mode_problem(task, mode):
        raise UserError(f"--from {args.source}: {problem}")
    if args.autoencoder and model.manifest is None:
        raise UserError(
            f"--autoencoder {args.autoencoder}: --from {args.source} sees pixels, nothing is "
            "encoded; leave it out"
        )
    if model.manifest is not None and not (args.autoencoder or model.manifest.autoencoder):
        raise UserError(
            f"--from {args.source} does not know the autoencoder of its latents: name it, "
            "--autoencoder DIR_OR_HUB_NAME"
        )
    random = isinstance(mask, inpainting.RandomCells)
    ring = args.ring if args.ring is not None else 0 if random else _RING
    seed = model.run.seed if args.seed is None else args.seed
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed} is not in 0..{2**32 - 1}")
    if ring < 0:
        raise UserError(f"--ring {ring}; 0 or more tokens")
    label, way, net = _label(args, model), _way(args, model, mode), model.run.task.model
    side, grid = _side(model), net.grid(*net.input_size)
    size = side
    if model.manifest is not None:
        # Of imported weights whose autoencoder is not described, the plan has the latent's side.
        size = model.manifest.plan.resolution
        if model.manifest.model is None:
            net_of = autoencoder.load(args.autoencoder or model.manifest.autoencoder)
            size = side * net_of.cfg.factor
    return _Job(model, mask, way, Encoded(args.protocol), ring, label, seed, size, grid)


def _refuse_unused(args: argparse.Namespace) -> None:
    """UserError about options that the mode would not look at, and those that cannot be."""
    from dcae_jax.errors import UserError

    for name, modes in _FOR.items():
        if vars(args)[name] not in (None, []) and args.mode not in modes:
            raise UserError(
                f"--{name.replace('_', '-')} is for --mode {' and '.join(modes)}, not {args.mode}"
            )
    if args.rounds is not None and args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}; 1 or more")
    if args.cfg is not None and args.label is None:
        raise UserError("--cfg guides towards a class: give --label, or leave --cfg out")


def _way(args: argparse.Namespace, model: "Model", mode: "Mode") -> "Way":
    from dcae_jax.cli import _sample_job
    from dcae_jax.inpainting import Way

    rounds = _ROUNDS if args.rounds is None else args.rounds
    start = _START if args.start is None else args.start
    if not mode.samples:
        return Way(mode, rounds)
    return Way(mode, rounds, start, _sample_job.sampler_of(args, model), _guide(args, model))


def _guide(args: argparse.Namespace, model: "Model") -> "GuidanceConfig":
    from dcae_jax.diffusion.guidance import GuidanceConfig
    from dcae_jax.errors import UserError

    found = GuidanceConfig(scale=1.0 if args.cfg is None else args.cfg)
    problems = found.problems()
    if found.scale != 1 and not model.run.task.label_dropout:
        problems.append(
            f"--cfg {found.scale:g} asks for samples without a class, which this network has not "
            "seen (task.label_dropout = 0): leave --cfg out"
        )
    if problems:
        raise UserError("\n".join(problems))
    return found


def _label(args: argparse.Namespace, model: "Model") -> int:
    """The number of the class; that of no class unless one is named."""
    from dcae_jax.cli import _sample_job
    from dcae_jax.errors import UserError

    if not _knows_classes(model):
        if args.label is not None:
            raise UserError(f"--label {args.label}: this network knows no classes; leave it out")
        return 0
    if args.label is not None:
        found, _ = _sample_job.classes_of(args.label, model)
        if len(found) != 1:
            raise UserError(f"--label {args.label} names {len(found)} classes; give one")
        return found[0]
    if not model.run.task.label_dropout:
        raise UserError(
            "this network has seen no image without its class (task.label_dropout = 0): give the "
            "class, --label CLASS"
        )
    return model.run.task.model.num_classes  # the index after the last one: no class


def _knows_classes(model: "Model") -> bool:
    from dcae_jax.tasks.diffuse import DiffuseConfig

    return isinstance(model.run.task, DiffuseConfig)


# ----------------------------------------------------------------------------------------- at work


class _Work(NamedTuple):
    """Everything on the device."""

    job: _Job
    weights: dict[str, Any]
    space: "_Space"
    inpainter: "Inpainter"
    variables: "Variables"


class _Space:
    """Between pictures and what the network was trained on: an autoencoder, or the pixels."""

    def __init__(self, net: "Autoencoder | None", dtype: str):
        self.pixels, self._net, self._dtype = net is None, net, dtype
        self.source = "none: the network sees pixels" if net is None else net.source

    def encode(self, image: "Pixels") -> "jax.Array":
        """The latent [1, h, w, c] of a picture."""
        import jax.numpy as jnp

        from dcae_jax.tasks.autoencode import to_float

        x = jnp.asarray(image)[None]
        if self._net is None:
            return x.astype(jnp.float32) / 255.0
        with self._exact():
            return self._net.encode(to_float(x))

    def decode(self, latent: "jax.Array") -> "Pixels":
        """The picture of a latent."""
        import numpy as np

        from dcae_jax.evals import metrics

        with self._exact():
            x = 2.0 * latent - 1.0 if self._net is None else self._net.decode(latent)
        return np.asarray(metrics.to_uint8(x))[0]

    def _exact(self) -> Any:
        from dcae_jax import codec
        from dcae_jax.models.layers import Dtype

        return codec.precision(Dtype(self._dtype or "float32"))


def _open(args: argparse.Namespace, job: _Job) -> _Work:
    """The weights on one device of this process."""
    from dcae_jax.cli import _trained
    from dcae_jax.inpainting import Encoded, Inpainter

    weights = _trained.weights_record(job.model)
    kind = "the raw weights" if weights["kind"] == "raw" else f"the average ({weights['kind']})"
    _trained.say(f"--from       {job.model.source}, {kind} of step {weights['step']}")
    mesh, net = _mesh(), None
    if job.model.manifest is not None:
        net = _trained.decoder(args, job.model, mesh, args.dtype or "")
    space = _Space(net, args.dtype or "")
    if job.encoded is Encoded.latent:
        _trained.say(
            "protocol     latent: the encoder sees the whole image, so known tokens know of the "
            "hole, and scores are better than they could be"
        )
    task, variables = _trained.load(job.model, mesh)
    inpainter = Inpainter(task, job.way, mesh, job.seed)
    return _Work(job, weights, space, inpainter, variables)


def _side(model: "Model") -> int:
    """Latent pixels of a side; UserError unless the latents are square, as centre crops are."""
    from dcae_jax.errors import UserError

    height, width = model.run.task.model.input_size
    if height != width:
        raise UserError(f"this network takes latents of {height} x {width}; only square ones here")
    return height


def _mesh() -> "Mesh":
    """One device of this process: images are filled in one by one."""
    import jax

    from dcae_jax import sharding
    from dcae_jax.config import MeshConfig

    return sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])


class _Pictures(NamedTuple):
    """The panels of one image."""

    original: "Pixels"
    masked: "Pixels"
    result: "Pixels"
    pasted: "Pixels"
    floor: "Pixels | None"  # the autoencoder alone, where there is one


class _Done(NamedTuple):
    """What is written so far."""

    rows: list[dict[str, Any]]  # scores
    bad: list[dict[str, str]]
    shown: dict[str, _Pictures]  # for the panels


def _all(work: _Work, files: "list[ImageFile]", out: "epath.Path", done: _Done) -> bool:
    """Fills in one image after another; whether it was interrupted (Ctrl-C)."""
    from dcae_jax import outputs
    from dcae_jax.report import images as report_images

    try:
        for progress, file, pixels in _options.each_image(files, done.bad):
            row, found = _one(work, file, pixels)
            for suffix, picture in (("", found.result), ("_pasted", found.pasted)):
                outputs.write(out / f"{file.name}{suffix}.png", report_images.to_png(picture))
            done.rows.append(row)
            done.shown[file.name] = found
            for name in sorted(done.shown)[_SHOWN:]:
                del done.shown[name]
            known, tokens = row["tokens"]["known"], row["tokens"]["all"]
            print(f"{progress} {file.name}  {known} of {tokens} tokens known", flush=True)
    except KeyboardInterrupt:
        return True
    finally:
        done.rows.sort(key=lambda row: row["name"])
    return False


def _hole(job: _Job, file: "ImageFile", shape: tuple[int, int]) -> "Hole":
    from dcae_jax import inpainting, rng
    from dcae_jax.errors import UserError

    key = rng.key(job.seed, 0, "mask", file.name)
    try:
        return inpainting.hole(job.mask, shape, job.size, job.grid, job.ring, key)
    except UserError as e:
        raise UserError(f"{file.path}: {e}") from e


def _one(work: _Work, file: "ImageFile", pixels: "Pixels") -> tuple[dict[str, Any], _Pictures]:
    """The image filled in, and its scores."""
    import numpy as np

    from dcae_jax import inpainting
    from dcae_jax.data import transforms
    from dcae_jax.inpainting import Encoded

    job, space = work.job, work.space
    hole = _hole(job, file, pixels.shape[:2])
    original = transforms.center_crop(pixels, job.size)
    hidden = inpainting.hidden_crop(pixels, job.mask, hole)
    whole = space.encode(original)
    latent = whole if job.encoded is Encoded.latent else space.encode(hidden)
    found = work.inpainter(work.variables, latent, hole.masked, job.label, file.name)
    _check_finite(work, file, found)
    result = space.decode(found.latents)
    pasted = np.where(hole.pixels[..., None], result, hidden)
    floor = None if space.pixels else space.decode(whole)
    row = {
        "name": file.name, "file": str(file.path), **_counts(hole),
        **_scores(original, result, hole),
        "latent_mse": None if space.pixels else _latent_mse(work, found, whole, hole),
        "autoencoder": None if floor is None else _scores(original, floor, hole),
        "evaluations": int(found.evaluations[0]),
    }  # fmt: skip
    return row, _Pictures(original, footprint(hidden, hole), result, pasted, floor)


def _check_finite(work: _Work, file: "ImageFile", found: "Filled") -> None:
    import numpy as np

    from dcae_jax.errors import UserError

    if not np.isfinite(np.asarray(found.latents)).all():
        raise UserError(
            f"{file.path}: what was filled in is not finite. Try --dtype float32, a smaller "
            "--cfg or another --sampler; else the weights are damaged"
        )


def _counts(hole: "Hole") -> dict[str, Any]:
    touched, masked = int(hole.touched.sum()), int(hole.masked.sum())
    tokens = {
        "all": hole.masked.size, "touched": touched, "ring": masked - touched,
        "known": hole.masked.size - masked,
    }  # fmt: skip
    return {"pixels": int(hole.pixels.sum()), "tokens": tokens}


def _scores(original: "Pixels", found: "Pixels", hole: "Hole") -> dict[str, float | None]:
    """Of the hole's pixels, peak 255; the SSIM is of its bounding box, None below 11 px."""
    import numpy as np

    from dcae_jax.evals import image_scores, metrics

    error = original[hole.pixels].astype(np.float64) - found[hole.pixels]
    mse = float(np.mean(error**2))
    rows, columns = (np.flatnonzero(hole.pixels.any(axis=axis)) for axis in (1, 0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    psnr = metrics.pooled_psnr(mse, 1)
    return {
        "psnr": psnr if math.isfinite(psnr) else None, "mse": mse,
        "ssim_box": image_scores.scores(original[box], found[box]).ssim,
    }  # fmt: skip


def _latent_mse(work: _Work, found: "Filled", whole: "jax.Array", hole: "Hole") -> float:
    """Mean squared error of the masked tokens, as the network sees latents (normalised)."""
    import numpy as np

    norm = work.variables.constants["norm"]
    error = np.square(np.asarray(norm.apply(found.latents) - norm.apply(whole)))[0]
    side = error.shape[0] // hole.masked.shape[0]
    return float(error[hole.masked.repeat(side, axis=0).repeat(side, axis=1)].mean())


# --------------------------------------------------------------------------------- what is written


def _record(work: _Work, done: _Done) -> dict[str, Any]:
    from dcae_jax.cli import _sample_job

    job, way = work.job, work.job.way
    more = {}
    if way.mode.samples:
        guidance = _sample_job.describe_guidance(way.guide)
        sampler = _sample_job.describe_sampler(way.sampler)
        more = {"sampler": sampler, "guidance": guidance}
    if _knows_classes(job.model):
        none = job.model.run.task.model.num_classes
        more["label"] = None if job.label == none else job.label
    if way.mode.value in _FOR["start"]:
        more["start"] = way.start
    if way.mode.value in _FOR["rounds"]:
        more["rounds"] = way.rounds
    return {
        "run": job.model.source, "weights": work.weights, "autoencoder": work.space.source,
        "resolution": job.size, "mode": way.mode.value, "protocol": job.encoded.value,
        "mask": _described(job.mask), "ring": job.ring, "seed": job.seed, **more,
        "images": done.rows, "mean": _means(done.rows), "psnr_pooled": _pooled(done.rows),
        "bad": done.bad,
    }  # fmt: skip


def _described(mask: "Mask") -> str:
    from dcae_jax.inpainting import Box, RandomCells

    if isinstance(mask, Box):
        return f"box:{mask.x},{mask.y},{mask.width},{mask.height}"
    return f"random:{mask.share:g}" if isinstance(mask, RandomCells) else mask.name


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the images that have the score."""

    def means(rows: list[dict[str, Any]], *names: str) -> dict[str, float | None]:
        values = {name: [row[name] for row in rows if row[name] is not None] for name in names}
        return {name: sum(v) / len(v) if v else None for name, v in values.items()}

    names = ("psnr", "mse", "ssim_box")
    alone = [row["autoencoder"] for row in rows if row["autoencoder"]]
    floor = means(alone, *names) if alone else None
    return {**means(rows, *names, "latent_mse"), "autoencoder": floor}


def _pooled(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Of the pixels of all holes together."""
    from dcae_jax.evals import metrics

    count, found = sum(row["pixels"] for row in rows), {}
    alone = [row["autoencoder"] for row in rows]
    for name, scores in (("result", rows), ("autoencoder", alone)):
        psnr = math.inf
        if rows and all(scores):
            squares = sum(
                score["mse"] * row["pixels"] for score, row in zip(scores, rows, strict=True)
            )
            psnr = metrics.pooled_psnr(squares, count)
        found[name] = psnr if math.isfinite(psnr) else None
    return found


def footprint(image: "Pixels", hole: "Hole") -> "Pixels":
    """The image with borders of cells, those that the hole touches tinted red, the ring blue."""
    import numpy as np

    found = image.astype(np.float32)
    size = image.shape[0] // hole.masked.shape[0], image.shape[1] // hole.masked.shape[1]
    ring = hole.masked & ~hole.touched
    for cells, colour in ((hole.touched, _TOUCHED), (ring, _AROUND)):
        spread = cells.repeat(size[0], axis=0).repeat(size[1], axis=1)
        found[spread] = (1 - _TINT) * found[spread] + _TINT * np.asarray(colour, np.float32)
    for axis, side in enumerate(size):
        lines = np.arange(side, image.shape[axis], side)
        view = np.moveaxis(found, axis, 0)
        view[lines] += _LINE * (255 - view[lines])
    return np.round(found).astype(np.uint8)


def _write_panels(work: _Work, out: "epath.Path", done: _Done) -> None:
    from dcae_jax import outputs
    from dcae_jax.cli.reconstruct import fitted
    from dcae_jax.report import images as report_images

    job, kept = work.job, [row for row in done.rows if row["name"] in done.shown]
    rows = [[p for p in done.shown[row["name"]] if p is not None] for row in kept]
    picture = report_images.grid(
        [[fitted(picture, side=_CELL) for picture in row] for row in rows],
        columns=_COLUMNS[: len(rows[0])],
        labels=[_panel_label(row) for row in kept],
        caption=f"{job.model.source}, {job.way.mode.value}, protocol {job.encoded.value}; red: "
        "cells of the hole, blue: the ring",
    )
    outputs.write(out / "panels.png", report_images.to_png(picture))


def _panel_label(row: dict[str, Any]) -> str:
    from dcae_jax.cli.reconstruct import short_name

    lines = [short_name(row["name"]), _decibels("hole", row)]
    if row["autoencoder"]:
        lines.append(_decibels("alone", row["autoencoder"]))
    return "\n".join(lines)


def _decibels(what: str, scores: dict[str, Any]) -> str:
    return f"{what} " + ("identical" if scores["psnr"] is None else f"{scores['psnr']:.1f} dB")


def _table(rows: list[dict[str, Any]]) -> str:
    """Scores of the holes, beside those of the autoencoder alone where there is one."""
    width, latent = max(len("pooled"), *(len(row["name"]) for row in rows)), rows[0]["autoencoder"]
    more = "  latent MSE   autoencoder alone: PSNR dB  SSIM box" if latent else ""
    pooled = _pooled(rows)
    last = {"psnr": pooled["result"], "ssim_box": None, "latent_mse": None, "name": "pooled"}
    last["autoencoder"] = {"psnr": pooled["autoencoder"], "ssim_box": None}
    lines = [f"\n{'hole':{width}}  PSNR dB  SSIM box{more}"]
    for row in [*rows, {"name": "mean", **_means(rows)}, last]:
        line = f"{row['name']:{width}}  {_number(row['psnr'], 2, 7)}  "
        line += _number(row["ssim_box"], 4, 8)
        if latent:
            floor = row["autoencoder"]
            line += f"  {_number(row['latent_mse'], 4, 10)}   {_number(floor['psnr'], 2, 26)}  "
            line += _number(floor["ssim_box"], 4, 8)
        lines.append(line)
    lines.append("mean: over the images that have the score; pooled: all pixels of all holes")
    if any(row["ssim_box"] is None or row["psnr"] is None for row in rows):
        lines.append("-: equal pixels (PSNR), or a box below 11 px (SSIM); not in the means")
    return "\n".join(lines)


def _number(value: float | None, digits: int, width: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"
