"""Measure the latents of a data set: RMS, scaling factor (1 / RMS), mean and std of each channel.

For a workdir the result goes into WORKDIR/latent_stats.json, where `export` and latent diffusion
find the scaling factor, unless an import has recorded one for this encoder: that comes first. For
other sources it is printed only. Images are cropped in the centre, as
released models were measured, and never mirrored. Examples:

  python -m dcae_jax latent-stats --from runs/demo/phase3
  python -m dcae_jax latent-stats --from imported/f32c32 --images imagenet/train \\
      --resolution 512 --n 10000 --batch 32

The factor holds for one encoder: after phase 1 or 2 measure again; phase 3 leaves the encoder as it
is and finds the factor of the run it started from.
"""

import copy
import json
import time
from typing import TYPE_CHECKING, Any

from dcae_jax.cli import _options

if TYPE_CHECKING:
    from etils import epath
    from jax.sharding import Mesh

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.data.pipeline import DataConfig
    from dcae_jax.evals.latent_stats import Encode, LatentStats

_N = 10_000  # images, where the data have as many
_RESOLUTION = 256  # of --images, where no run says another
_FEW = 5000  # latent pixels below which it is told
_UNEQUAL = 10.0  # ratio of the largest to the smallest std of a channel from which on it is told


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax latent-stats`."""
    args = _parser().parse_args(argv)
    _check(args)
    import jax

    from dcae_jax import autoencoder, checkpoint, outputs, sharding
    from dcae_jax.config import MeshConfig
    from dcae_jax.evals import latent_stats

    path = checkpoint.absolute(args.source)
    meta = checkpoint.source_meta(args.source) if checkpoint.has_steps(path) else None
    data = _data(args, meta)
    net = _options.load(args)
    workdir = checkpoint.workdir_of(args.source) if meta else None
    with _options.own_options():
        count = _count(args, data)
    about = _about(args, net, data, count, meta)
    if workdir is not None and not args.force:
        _refuse_other(workdir, autoencoder.read_stats(workdir), about)
    mesh = sharding.make_mesh(MeshConfig())
    print(
        f"{count} images at {data.resolution} px on {jax.device_count()} device(s); compiling",
        flush=True,
    )
    with _options.own_options():
        found = latent_stats.measure(
            _encoder(net, args.dtype, mesh), data, mesh, n=count, batch=args.batch,
            progress=_Progress(count),
        )  # fmt: skip
    print(table(found))
    record = {**about, "rms": found.rms, "scaling_factor": found.scaling_factor}
    record |= {"rms_error": found.rms_error, "latent_pixels": found.pixels}
    record |= {"mean": found.mean, "std": found.std}
    used = net.scaling_factor, net.factor_origin
    if workdir is not None:
        path = workdir / autoencoder.STATS_FILE
        outputs.write(path, json.dumps(record, indent=1).encode())
        print(f"wrote {path}")
        used = autoencoder.scaling_factor(workdir, net.encoder)
    _say_what_is_used(*used, found.scaling_factor)
    return 0


def _say_what_is_used(factor: float | None, origin: str, measured: float) -> None:
    """Where what is recorded comes before what was measured: both."""
    if factor is not None and factor != measured:
        print(
            f"note: the scaling factor in use stays {factor:.6g} ({origin}), "
            f"not the {measured:.6g} measured here: models made for these latents were trained "
            "with it; export --scaling-factor gives another"
        )


def _parser() -> Any:
    parser = _options.parser("latent-stats", __doc__)
    _options.add_source(parser)
    parser.add_argument(
        "--images", metavar="DIR", help="folder of images; default: the data of the run itself"
    )
    parser.add_argument(
        "--resolution", type=int, metavar="R",
        help=f"of the crops; default: that of the run, or {_RESOLUTION}",
    )  # fmt: skip
    parser.add_argument(
        "--split", help="default: that of the run; a folder's subfolder of that name if it has one"
    )
    parser.add_argument(
        "--n", type=int, default=0, metavar="N",
        help=f"images, spread over the data; default: {_N}, or all if there are fewer",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="over all devices")
    _options.add_filters(parser)
    parser.add_argument(
        "--force", action="store_true", help="replace statistics that still hold for something"
    )
    return parser


def _check(args: Any) -> None:
    """UserError with all values that cannot be, before anything is read."""
    from dcae_jax.errors import UserError

    found = _options.filter_problems(args)
    if args.n < 0:
        found.append(f"--n {args.n}: give a number of images, or leave it out for all")
    for name, value, least in (
        ("batch", args.batch, 1), ("resolution", args.resolution, 1)
    ):  # fmt: skip
        if value is not None and value < least:
            found.append(f"--{name} {value} must be at least {least}")
    if found:
        raise UserError("\n".join(found))


def _data(args: Any, meta: dict[str, Any] | None) -> "DataConfig":
    """The data to measure on: centre crops of --images, or of what the run was trained on."""
    from dcae_jax import config
    from dcae_jax.data.pipeline import DataConfig, Transform
    from dcae_jax.data.sources import FolderConfig
    from dcae_jax.errors import UserError

    trained = meta is not None and meta["data"]  # "": an import has no data of its own
    if not trained and not args.images:
        raise UserError(f"{args.source} was not trained here and names no data: give --images DIR")
    if trained:
        data = copy.deepcopy(config.from_json(meta["config"]).data)
    else:
        data = DataConfig(resolution=_RESOLUTION)
    if args.images:
        data.source, data.min_size = FolderConfig(path=args.images), 0
    data.split = args.split or data.split
    data.resolution = args.resolution or data.resolution
    _options.filter_images(data, args)
    data.transform, data.flip, data.workers = Transform.center_crop, False, 0
    return data


def _count(args: Any, data: "DataConfig") -> int:
    """How many images; at most so many that no member of a mixture gives more than it has."""
    from dcae_jax.data import pipeline
    from dcae_jax.errors import UserError

    known = pipeline.describe(data)
    whole = int(min(known["records"][name] / known["shares"][name] for name in known["records"]))
    if args.n > whole:
        raise UserError(f"--n {args.n}: the data have {whole} images; leave --n out for all")
    return args.n or max(1, min(_N, whole))


def _about(
    args: Any, net: "Autoencoder", data: "DataConfig", count: int, meta: dict[str, Any] | None
) -> dict[str, Any]:
    """What was measured: enough to see whether another measurement is the same."""
    from dcae_jax.errors import UserError

    factor = net.cfg.factor
    if data.resolution % factor or data.resolution < factor:
        raise UserError(
            f"--resolution {data.resolution} is not a multiple of the autoencoder's factor "
            f"{factor}; nearest: {max(factor, round(data.resolution / factor) * factor)}"
        )
    return {
        "n": count, "resolution": data.resolution, "split": data.split,
        "data": data.fingerprint(), "weights": args.params, "dtype": args.dtype,
        "step": meta["step"] if meta else None, "encoder": net.encoder,
    }  # fmt: skip


def _refuse_other(workdir: "epath.Path", old: dict[str, Any] | None, new: dict[str, Any]) -> None:
    """UserError if the statistics in the workdir still hold and are not the same measurement."""
    from dcae_jax.errors import UserError

    if old is None or (old["encoder"] != new["encoder"] and old["weights"] == new["weights"]):
        return  # the run went on: its old encoder is gone
    asked = [k for k in new if k not in ("step", "encoder")]
    before = {k: old[k] if k in old else "not said" for k in asked}
    if different := [k for k in asked if before[k] != new[k]]:
        changes = ", ".join(f"{k} {before[k]} -> {new[k]}" for k in different)
        raise UserError(
            f"{workdir} has statistics of "
            f"{'this encoder' if old['encoder'] == new['encoder'] else 'its other weights'} that "
            f"were measured differently ({changes}); --force replaces them"
        )


def _encoder(net: "Autoencoder", dtype: str, mesh: "Mesh") -> "Encode":
    """Latents of uint8 images, with the weights on every device."""
    from dcae_jax import codec
    from dcae_jax.models.layers import Dtype
    from dcae_jax.tasks.autoencode import to_float

    placed = net.placed(mesh, Dtype(dtype))

    def encode(images: Any) -> Any:
        with codec.precision(Dtype(dtype)):
            return placed.encode(to_float(images))

    return encode


class _Progress:
    """A line every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._begin, self._last = total, time.monotonic(), time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last > 5 or done == self._total:
            self._last, rate = now, done / (now - self._begin)
            print(f"  {done}/{self._total} images, {rate:.1f} images/s", flush=True)


def table(found: "LatentStats") -> str:
    """The statistics for people, with a warning where one factor cannot serve all channels."""
    low, high = min(found.std), max(found.std)
    lines = [
        f"RMS                {found.rms:.6g}{_error(found)}",
        f"scaling factor     {found.scaling_factor:.6g}   (1 / RMS)",
        f"channel means      {min(found.mean):.4g} to {max(found.mean):.4g}",
        f"channel stds       {low:.4g} to {high:.4g}   ({len(found.std)} channels)",
    ]
    if found.pixels < _FEW:
        lines.append(
            f"warning: {found.pixels} latent pixels are few for a factor that is kept; measure "
            "more images, or larger crops"
        )
    if high > _UNEQUAL * low:
        weak = sum(std * _UNEQUAL < high for std in found.std)
        lines.append(
            f"warning: {weak} channel(s) have less than a tenth of the largest std: one factor "
            "leaves them almost constant for a diffusion model; train longer, or scale by channel"
        )
    return "\n".join(lines)


def _error(found: "LatentStats") -> str:
    of = f"{found.n} image(s), {found.pixels} latent pixels"
    if found.rms_error is None:
        return f"   ({of})"
    return f" +- {found.rms_error:.2g}   (standard error, {of})"
