"""Draw samples of a trained diffusion model and decode them: PNGs, a grid, an npz for evaluators.

Sample i is a function of (weights, class, seed, i) alone: any batch size, any number of devices and
processes give the same pictures, and a run that was killed goes on where it was.  Examples:

  python -m dcae_jax sample --from runs/uvit_s --classes 207,360 --n 16 --cfg 1.5 --out seen
  python -m dcae_jax sample --from runs/uvit_s --n 50000 --sampler dpm_fast --steps 30 --npz \\
      --out samples

Classes are repeated in the order given: sample i has class number i modulo their count.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from dcae_jax.cli import _options

if TYPE_CHECKING:
    import numpy as np
    from etils import epath

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.data.latents import Manifest
    from dcae_jax.diffusion.guidance import GuidanceConfig
    from dcae_jax.diffusion.samplers import SamplerConfig
    from dcae_jax.generator import Generator
    from dcae_jax.tasks.base import Variables
    from dcae_jax.tasks.diffuse import DiffuseTask

GRID_SIDE = 8  # samples in a row and rows of grid.png, at most


class Trained(NamedTuple):
    """A diffusion model with its weights and the latents it was trained on."""

    task: "DiffuseTask"
    variables: "Variables"
    manifest: "Manifest"
    seed: int  # of the run
    source: str  # for people: which weights these are


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax sample`."""
    args = _parser().parse_args(argv)
    import jax

    from dcae_jax import backend, distributed, sharding
    from dcae_jax.config import MeshConfig
    from dcae_jax.evals import generate
    from dcae_jax.generator import Generator

    distributed.initialize()
    backend.compile_cache("auto")
    sampler, guide = _sampler(args), _guidance(args)
    trained = load(args.source, args.params)
    classes = _classes(args.classes, trained.task.cfg.model.num_classes)
    out = _folder(args.out, _settings(args, trained, classes, sampler, guide))
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
    net = generate.decoder(args.autoencoder, trained.manifest, mesh)
    seed = trained.seed if args.seed is None else args.seed
    generator = Generator(trained.task, sampler, guide, mesh, seed=seed, steps=args.steps)
    _draw_all(args, generator, trained.variables, net, classes, out)
    distributed.barrier("samples drawn")
    if distributed.is_main():
        _finish(args, out, classes, trained.manifest)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _options.parser("sample", __doc__)
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="RUN", help="workdir of a diffusion run")
    add("--out", required=True, metavar="DIR", help="folder; one of the same samples is continued")
    add("--classes", default="all", help="class numbers, e.g. 207,360 or 0-9; default: all")
    add("--n", type=int, default=64, help="samples (default: 64)")
    add("--sampler", default="", help="ddpm, ddim, euler, heun, dpm_fast, dpm_2m or dopri5; "
        "default: dpm_fast, or dpm_2m for a flow")  # fmt: skip
    add("--steps", type=int, default=None, help="of the sampler; default: the published number")
    add("--cfg", type=float, default=1.0, help="guidance scale; 1 (default) is off")
    add("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("START", "STOP"),
        help="guided where START <= t <= STOP; 0 is data, 1 is noise")  # fmt: skip
    add("--seed", type=int, default=None, help="default: that of the run")
    add("--batch", type=int, default=16, help="samples at once on this process's devices")
    add("--params", choices=("ema", "raw"), default="ema", help="average (default) or raw weights")
    add("--autoencoder", default="", metavar="AE", help="decodes; default: that of the latents")
    add("--npz", action="store_true", help="also samples.npz, arr_0 uint8[n, h, w, 3] (ADM's)")
    return parser


# ------------------------------------------------------------------------------------- what to run


def load(source: str, params: str) -> Trained:
    """The diffusion model of a workdir; UserError if it is something else."""
    import jax

    from dcae_jax import checkpoint, config
    from dcae_jax.data.latents import Manifest
    from dcae_jax.errors import UserError
    from dcae_jax.tasks import diffuse
    from dcae_jax.tasks.base import Variables

    meta = checkpoint.source_meta(source, "--from")
    run = config.from_json(meta["config"])
    if not isinstance(run.task, diffuse.DiffuseConfig):
        raise UserError(
            f"--from {source} is a run of {type(run.task).__name__}, not of a diffusion model"
        )
    task = run.task.build(run)
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    found = checkpoint.load_weights(
        source, {"params": targets, "stats": {}}, prefer_ema=params == "ema"
    )
    manifest = Manifest.from_json(meta["latents"])
    constants = {"norm": diffuse.normalisation(run.task.latent_norm, manifest)}
    return Trained(task, Variables(found.params, {}, constants), manifest, run.seed, found.source)


def _sampler(args: argparse.Namespace) -> "SamplerConfig":
    """The sampler that was asked for; the process says later whether it fits."""
    from dcae_jax.diffusion.samplers import SAMPLERS
    from dcae_jax.errors import UserError

    name = args.sampler or _default_sampler(args.source)
    if name not in SAMPLERS:
        raise UserError(f"--sampler {name}: there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]()


def _default_sampler(source: str) -> str:
    from dcae_jax import checkpoint, config

    task = config.from_json(checkpoint.source_meta(source, "--from")["config"]).task
    return "dpm_2m" if task.process.is_flow else "dpm_fast"


def _guidance(args: argparse.Namespace) -> "GuidanceConfig":
    from dcae_jax.diffusion.guidance import GuidanceConfig
    from dcae_jax.errors import UserError

    start, stop = args.cfg_interval
    guide = GuidanceConfig(scale=args.cfg, start=start, stop=stop)
    if found := guide.problems():
        raise UserError("\n".join(found))
    return guide


def _classes(text: str, count: int) -> list[int]:
    """Class numbers of "all", "207,360", "0-9"."""
    from dcae_jax.errors import UserError
    from dcae_jax.evals.generate import check_classes

    if text == "all":
        return list(range(count))
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise UserError(f"--classes {text}: {part!r} is no class number or range such as 0-9")
        found += range(int(first), int(last or first) + 1)
    check_classes(tuple(found), count)
    return found


def _settings(
    args: argparse.Namespace, trained: Trained, classes: list[int], sampler: "SamplerConfig",
    guide: "GuidanceConfig",
) -> dict[str, Any]:  # fmt: skip
    """What decides the pictures; a folder is continued only with the same."""
    from dcae_jax import config

    return {
        "weights": trained.source, "sampler": config.to_json(sampler), "steps": args.steps,
        "guidance": config.to_json(guide), "classes": classes,
        "seed": trained.seed if args.seed is None else args.seed,
        "autoencoder": args.autoencoder or trained.manifest.autoencoder,
    }  # fmt: skip


def _folder(text: str, settings: dict[str, Any]) -> "epath.Path":
    """The folder of the samples; UserError if it holds others."""
    from dcae_jax import checkpoint, distributed
    from dcae_jax.errors import UserError

    out = checkpoint.absolute(text)
    record = out / "sample.json"
    if record.exists():
        old = json.loads(record.read_text())
        if changed := [k for k in settings if old[k] != settings[k]]:
            raise UserError(
                f"--out {out} holds samples made with another {', '.join(changed)}; give a new "
                "folder, or the same options to continue"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty and has no sample.json; give a new folder")
    elif distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings, indent=1))
    return out


# ----------------------------------------------------------------------------------------- drawing


def _draw_all(
    args: argparse.Namespace, generator: "Generator", variables: "Variables", net: "Autoencoder",
    classes: list[int], out: "epath.Path",
) -> None:  # fmt: skip
    """This process's batches of the samples that are not there yet."""
    import jax
    import numpy as np
    from tqdm import tqdm

    from dcae_jax.errors import UserError
    from dcae_jax.evals import generate
    from dcae_jax.report import images as pictures

    devices = jax.local_device_count()
    size = -(-args.batch // devices) * devices
    starts = range(jax.process_index() * size, args.n, jax.process_count() * size)
    for start in tqdm(starts, unit="batch", desc="sampling", disable=jax.process_index() > 0):
        index = np.arange(start, start + size, dtype=np.int32)
        stop = min(start + size, args.n)
        wanted = [i for i in range(start, stop) if not _is_there(picture_path(out, i))]
        if not wanted:
            continue
        labels = np.array([classes[i % len(classes)] for i in index], np.int32)
        drawn = generator.draw(variables, labels, index)
        if not np.isfinite(drawn.latents).all():
            raise UserError(
                "samples are not finite: with dopri5 raise max_steps or take heun; else the "
                "weights are damaged"
            )
        images = generate.decode(net, drawn.latents)
        for i in wanted:
            picture_path(out, i).write_bytes(pictures.to_png(images[i - start]))


def picture_path(out: "epath.Path", index: int) -> "epath.Path":
    """Where sample `index` lies."""
    return out / f"{index:06d}.png"


def _is_there(path: "epath.Path") -> bool:
    """Whether the picture is whole: its writer may have been killed."""
    import io

    from PIL import Image

    if not path.exists():
        return False
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True


def _finish(
    args: argparse.Namespace, out: "epath.Path", classes: list[int], manifest: "Manifest"
) -> None:
    """The grid, and the npz if it was asked for."""
    from dcae_jax.report import images as pictures

    columns = min(GRID_SIDE, len(classes), args.n)
    shown = [_read(picture_path(out, i)) for i in range(min(args.n, columns * GRID_SIDE))]
    rows = [shown[i : i + columns] for i in range(0, len(shown) - columns + 1, columns)]
    names = [manifest.classes[k] if manifest.classes else f"class {k}" for k in classes[:columns]]
    grid = pictures.grid(rows, columns=names, caption=f"{args.source}, guidance {args.cfg:g}")
    (out / "grid.png").write_bytes(pictures.to_png(grid))
    print(f"{args.n} samples and grid.png in {out}")
    if args.npz:
        _write_npz(out, args.n)
        print(f"wrote {out / 'samples.npz'}")


def _read(path: "epath.Path") -> "np.ndarray":
    import io

    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def _write_npz(out: "epath.Path", n: int) -> None:
    """Streams the pictures into one array: 50,000 of them need not fit into memory."""
    import zipfile

    import numpy as np

    shape = (n, *_read(picture_path(out, 0)).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        (out / "samples.npz").open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, header)
        for i in range(n):
            array.write(_read(picture_path(out, i)).tobytes())
