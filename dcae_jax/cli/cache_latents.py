"""Encode a data set once: sharded latents with a manifest, for training latent diffusion.

Writes OUT/SPLIT/: ArrayRecord shards, then manifest.json; train with
data = LatentDataConfig(path=OUT). Examples:

  python -m dcae_jax cache-latents --from imported/f32c32 --out latents/f32 \\
      --config=configs/dcae_f32c32.py:phase1 --config.data.transform=center_crop
  python -m dcae_jax cache-latents --from runs/mine/phase3 --out latents/mine \\
      --images photos/ --resolution 256 --flips
  python -m dcae_jax cache-latents --from runs/demo/phase3 --out latents/demo --n 4096

Without --config and --images the data are those of the run itself. With transform center_crop each
image gives one latent; with a random transform --crops K takes K crops of each image, --n N those
of the first N positions that a training run with seed 0 visits.

A shard is complete or absent: kill the command and run it again, and it goes on where it was, to
the same bytes (on GPUs only with XLA_FLAGS=--xla_gpu_deterministic_ops=true). Run again on a
finished cache it checks all sums. Several processes (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
JAX_PROCESS_ID; Slurm; TPU pods) share the shards.
"""

import contextlib
import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcae_jax import store
from dcae_jax.cli import _options

if TYPE_CHECKING:
    import numpy as np
    from etils import epath
    from jax.sharding import Mesh

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.data.latents import Manifest, Moments, Plan, ShardInfo
    from dcae_jax.data.pipeline import BatchIterator, DataConfig, Positions

_RESOLUTION = 256  # of --images
_SHARD_RECORDS = 8192
_PSNR_IMAGES = 32
_PLAN = "plan.json"
_EVERY = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Job:
    """What is encoded, by what, into which folder."""

    net: "Autoencoder"
    plan: "Plan"
    data: "DataConfig"
    positions: "Positions"
    where: "epath.Path"
    mesh: "Mesh"  # the devices of this process
    batch: int  # over them


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax cache-latents`."""
    args, overrides = _parser().parse_known_args(argv)
    _options.refuse_unknown(overrides)
    from dcae_jax import backend

    backend.join(argv)

    def work() -> None:
        with contextlib.nullcontext() if overrides else _options.own_options():
            _run(args, overrides)

    return _options.in_all_processes(work)


def _parser() -> Any:
    parser = _options.parser("cache-latents", __doc__)
    _options.add_source(parser, activations="--compute")
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder of the cache; may be gs://")
    add("--images", metavar="DIR", help="folder of images; with --config: see above")
    add("--split", help="default: that of the data; a folder's subfolder of that name if any")
    add(
        "--resolution", type=int, metavar="R", help=f"default: of the data; --images: {_RESOLUTION}"
    )
    add(
        "--transform", choices=("center_crop", "random_crop", "random_resized_crop"),
        help="default: that of the data; --images: center_crop",
    )  # fmt: skip
    add("--crops", type=int, default=0, metavar="K", help="random crops of each image")
    add(
        "--n", type=int, default=0, metavar="N",
        help="so many images, spread over the data; with a random transform so many crops",
    )  # fmt: skip
    _options.add_filters(parser)
    add("--flips", action="store_true", help="latents of the mirror images as well")
    add(
        "--dtype", dest="storage", choices=("bf16", "f32"), default="bf16",
        help="how latents are stored (default: bf16; what it costs is measured)",
    )  # fmt: skip
    add("--batch", type=int, default=32, metavar="B", help="over the devices of a process")
    add(
        "--shard-records", type=int, default=_SHARD_RECORDS, metavar="N",
        help=f"images in a shard (default: {_SHARD_RECORDS})",
    )  # fmt: skip
    return parser


def _run(args: Any, overrides: list[str]) -> None:
    """The whole command on one of its processes."""
    from dcae_jax import distributed

    data = _data(args, overrides)
    job = _job(args, data, _options.load(args))
    _check_others(job)
    _check_claim(job)
    infos = _finished(job)
    missing = [i for i, info in enumerate(infos) if info is None]
    _check_space(job, missing)
    distributed.barrier("looked at what is there")
    if not missing and _is_cached(job, infos):
        return
    with _only_here(job):
        distributed.barrier("claimed")
        _encode(job, _mine(missing))
        distributed.barrier("encoded")
        if distributed.is_main():
            _finish(args, job)
        distributed.barrier("finished")


# ---------------------------------------------------------------------------------- what is encoded


def _data(args: Any, overrides: list[str]) -> "DataConfig":
    """The images: of --config, below --images, or of the run itself; never mirrored here."""
    from dcae_jax.data.pipeline import DataConfig, Transform
    from dcae_jax.data.sources import FolderConfig
    from dcae_jax.errors import UserError
    from dcae_jax.online import OnlineDataConfig

    if overrides and args.images:
        raise UserError("--config and --images both name data; give one of them")
    if args.images:
        data = DataConfig(
            source=FolderConfig(path=args.images), resolution=_RESOLUTION,
            transform=Transform.center_crop,
        )  # fmt: skip
    else:
        data = _configured(overrides) if overrides else _data_of_run(args.source)
    if isinstance(data, OnlineDataConfig):
        data = data.images  # that run encodes them in each step, this command once
    if not isinstance(data, DataConfig):
        raise UserError("the data of this config are not images; name a config of images")
    data.split = args.split or data.split
    data.resolution = args.resolution or data.resolution
    data.transform = Transform(args.transform) if args.transform else data.transform
    data.flip = False
    if found := _options.filter_problems(args):
        raise UserError("\n".join(found))
    _options.filter_images(data, args)
    if "/" in data.split:
        raise UserError(f"--split {data.split} must be the name of a folder, without a slash")
    return data


def _configured(overrides: list[str]) -> Any:
    return copy.deepcopy(_options.configured("cache-latents", overrides).data)


def _data_of_run(source: str) -> Any:
    from dcae_jax import checkpoint, config
    from dcae_jax.errors import UserError

    meta = None
    if checkpoint.has_steps(checkpoint.absolute(source)):
        meta = checkpoint.source_meta(source)
    if meta is None or not meta["data"]:  # "": an import has no data of its own
        raise UserError(
            f"{source} was not trained here and names no data: give --images DIR, or --config=FILE"
        )
    return config.from_json(meta["config"]).data


def _job(args: Any, data: "DataConfig", net: "Autoencoder") -> Job:
    import jax

    from dcae_jax import sharding
    from dcae_jax.config import MeshConfig
    from dcae_jax.data import latents
    from dcae_jax.errors import UserError

    if net.cfg.in_channels != 3:
        raise UserError(f"the autoencoder is for {net.cfg.in_channels} channels; pictures have 3")
    for name, least in (("batch", 1), ("shard_records", 1), ("n", 0), ("crops", 0)):
        if vars(args)[name] < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {vars(args)[name]} is too small; at least {least}")
    shape = net.cfg.latent_shape(data.resolution, data.resolution)
    positions, how = _positions(args, data)
    plan = latents.Plan(
        encoder=net.encoder, resolution=data.resolution, transform=_transform(data),
        data=data.fingerprint(), split=data.split, positions=how, images=len(positions.wanted),
        shape=shape, moments=net.cfg.gaussian(), flips=args.flips,
        dtype=latents.Storage(args.storage), compute=args.compute,
        shard_records=args.shard_records,
    )  # fmt: skip
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
    batch = -(-args.batch // mesh.size) * mesh.size
    return Job(net, plan, data, positions, latents.folder(args.out, data.split), mesh, batch)


def _positions(args: Any, data: "DataConfig") -> tuple["Positions", str]:
    """Which records are read, how often, and that in words."""
    import numpy as np

    from dcae_jax.data import pipeline
    from dcae_jax.data.pipeline import Positions, Transform
    from dcae_jax.errors import UserError

    random = data.transform is not Transform.center_crop
    if args.crops and args.n:
        raise UserError("--crops and --n both say how many crops; give one of them")
    if random and not (args.crops or args.n):
        raise UserError(
            f"data.transform={data.transform.value} gives another crop each time: say how many, "
            "--crops K of each image or --n N in all, or take --transform center_crop"
        )
    if not random and args.crops:
        raise UserError("--crops is for random transforms; center_crop has one crop of each image")
    if random and args.n:
        return (
            Positions(pipeline.training_order(data), np.arange(args.n)),
            f"{args.n} of the training order of seed 0",
        )
    if args.n:
        return Positions(pipeline.spread_records(data, args.n), np.arange(args.n)), f"{args.n}"
    order = pipeline.every_record(data, max(args.crops, 1))
    how = f"all records, {args.crops} crops of each" if random else "all records"
    return Positions(order, np.arange(len(order))), how


def _transform(data: "DataConfig") -> str:
    from dcae_jax.data.pipeline import Transform

    if data.transform is Transform.random_resized_crop:
        return f"{data.transform.value}(area={data.area}, aspect={data.aspect})"
    return data.transform.value


# --------------------------------------------------------------------------------- what is there


def _check_others(job: Job) -> None:
    """UserError if other splits of this cache are of another encoder or of other classes."""
    from dcae_jax.data import latents, pipeline
    from dcae_jax.errors import UserError

    root = job.where.parent
    others = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    classes = pipeline.open_source(job.data).classes
    for other in sorted(others):
        manifest = latents.find_manifest(other) if other != job.where else None
        if manifest is None:
            continue
        if manifest.encoder != job.plan.encoder:
            raise UserError(
                f"{root} holds latents of another encoder (split {other.name!r}): "
                f"{manifest.encoder[:16]}, this one is {job.plan.encoder[:16]}; choose another "
                "--out, or delete that cache"
            )
        if manifest.classes != classes:
            raise UserError(
                f"split {other.name!r} of {root} has {len(manifest.classes)} classes, this one "
                f"{len(classes)} or others; one cache has one list of classes: another --out"
            )


def _check_claim(job: Job) -> None:
    """UserError, naming all that differs, if the folder has shards of another plan."""
    from dcae_jax import config
    from dcae_jax.data import latents
    from dcae_jax.errors import UserError

    old = latents.read_json(job.where / _PLAN)
    if old is None or not latents.any_shard(job.where):
        return
    changes = config.diff(old, config.to_json(job.plan))
    if changes:
        lines = "\n".join(f"  - {k}: {_short(a)} -> {_short(b)}" for k, (a, b) in changes.items())
        raise UserError(
            f"{job.where} holds other latents, finished or not:\n{lines}\nChoose another --out, "
            "give the same options to finish it, or delete it"
        )


def _short(value: Any) -> Any:
    """The beginning of a digest."""
    return value[:16] if isinstance(value, str) and len(value) == 64 else value


@contextlib.contextmanager
def _only_here(job: Job) -> Iterator[None]:
    """The folder is this command's, and says what it will hold; the first process sees to it."""
    from dcae_jax import config, distributed, outputs
    from dcae_jax.data import latents
    from dcae_jax.errors import UserError

    if not distributed.is_main():
        yield
        return
    with outputs.locked(job.where, "--out"):
        try:
            latents.write_json(job.where / _PLAN, config.to_json(job.plan))
        except OSError as error:
            raise UserError(f"cannot write to {job.where}: {error}") from error
        yield


def _finished(job: Job) -> "list[ShardInfo | None]":
    from dcae_jax.data import latents

    return [latents.finished_shard(job.where, job.plan, i) for i in range(job.plan.shards())]


def _is_cached(job: Job, infos: "list[ShardInfo | None]") -> bool:
    """Whether all is there; then its sums are checked, and UserError names what is damaged."""
    from dcae_jax import distributed
    from dcae_jax.data import latents
    from dcae_jax.errors import UserError

    manifest = latents.find_manifest(job.where)
    if manifest is None:
        return False
    if not distributed.is_main():
        return True
    print(f"{job.where} is finished; checking the sums of {len(infos)} shard(s)", flush=True)
    paths = [latents.shard_path(job.where, i) for i in range(len(infos))]
    wanted = [sha256 for *_, sha256 in manifest.shards]
    bad = [p for p, sha in zip(paths, wanted, strict=True) if latents.sha256_of(p) != sha]
    if bad:
        raise UserError(
            "damaged since they were written: " + ", ".join(map(str, bad)) + ". Delete them and "
            "run the same command again: it makes what is missing"
        )
    for note in latents.check(manifest, job.net):
        print(f"note: {note}")
    print(f"{manifest.images} latents, all sums are right: nothing to do")
    return True


def _check_space(job: Job, missing: list[int]) -> None:
    """UserError if the disk cannot hold what is missing; a store holds it, here lies one shard."""
    from dcae_jax.data import latents
    from dcae_jax.errors import UserError

    local = not store.is_store(job.where)
    needed = job.plan.space(missing if local else missing[:1]) + latents.MARGIN
    folder = os.path.abspath(job.where) if local else tempfile.gettempdir()
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, these latents need about "
            f"{needed / 1e9:.1f} GB; make room, choose another --out, or leave out --flips"
        )


def _mine(missing: list[int]) -> list[int]:
    """The shards that this process makes."""
    import jax

    return [i for i in missing if i % jax.process_count() == jax.process_index()]


# ------------------------------------------------------------------------------------ the encoding


class _Autoencoder:
    """The network on the devices of this process."""

    def __init__(self, job: Job) -> None:
        from dcae_jax import codec
        from dcae_jax.models.layers import Dtype

        self._mesh, self._dtype = job.mesh, Dtype(job.plan.compute)
        self._net = job.net.placed(job.mesh, self._dtype)
        self._codec = codec

    def encode(self, images: "np.ndarray") -> Any:
        """(mean, log variance or None) on the devices."""
        from dcae_jax.tasks.autoencode import to_float

        return self._on_devices(lambda x: self._net.moments(to_float(x)), images)

    def pixels(self, latents: "np.ndarray") -> Any:
        """uint8 images of latents."""
        from dcae_jax.evals import metrics

        return self._on_devices(lambda z: metrics.to_uint8(self._net.decode(z)), latents)

    def _on_devices(self, fn: Any, x: "np.ndarray") -> Any:
        import jax

        from dcae_jax import sharding

        with jax.set_mesh(self._mesh), self._codec.precision(self._dtype):
            return fn(sharding.put_batch({"x": x}, self._mesh)["x"])


def _encode(job: Job, mine: list[int]) -> None:
    """Makes some shards, one after the other; each counts once it is whole."""
    import numpy as np

    from dcae_jax.data import latents, pipeline

    if not mine:
        return
    sizes = [len(job.plan.positions_of(i)) for i in mine]
    progress = _Progress(sum(sizes))
    wanted = np.concatenate([_padded(job.plan.positions_of(i), job.batch) for i in mine])
    wanted = np.where(wanted < 0, -1, job.positions.wanted[wanted])
    picked = job.positions._replace(wanted=wanted)
    with pipeline.picked_batches(job.data, picked, batch=job.batch) as batches:
        encoded = _encoded(job, batches)
        for shard, size in zip(mine, sizes, strict=True):
            writer = latents.ShardWriter(job.where, job.plan, shard)
            try:
                for _ in range(-(-size // job.batch)):
                    progress.add(_store(writer, *next(encoded)))
                writer.finish()
            except BaseException:
                writer.abandon()
                raise


def _padded(positions: range, batch: int) -> "np.ndarray":
    """Whole batches: a shard's bytes do not depend on what is encoded before it."""
    import numpy as np

    found = np.full(-(-len(positions) // batch) * batch, -1)
    found[: len(positions)] = positions
    return found


def _encoded(job: Job, batches: "BatchIterator") -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """(batch, its views) on the host; the device works on the next batch meanwhile."""
    import jax
    import numpy as np

    net = _Autoencoder(job)
    before = None
    for batch in batches:
        image = batch.pop("image")
        views = [net.encode(image)]
        if job.plan.flips:
            views.append(net.encode(np.ascontiguousarray(image[:, :, ::-1])))
        if before is not None:
            yield before[0], jax.device_get(before[1])
        before = batch, views
    if before is not None:
        yield before[0], jax.device_get(before[1])


def _store(writer: Any, batch: dict[str, Any], views: list[Any]) -> int:
    """Adds the rows of a batch that are images; how many positions they were."""
    from dcae_jax.data.latents import Record

    done = 0
    for i, (name, why) in enumerate(json.loads(batch["names"])):
        if why:
            writer.bad.append((name, why))
        elif batch["mask"][i]:
            label = int(batch["label"][i])
            writer.add(*(Record(m[i], None if v is None else v[i], label, name) for m, v in views))
        done += bool(why) or bool(batch["mask"][i])
    return done


class _Progress:
    """A line every few seconds: of this process's own part."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._begin, self._last = time.monotonic(), time.monotonic()
        print(f"{total} images to encode; compiling", flush=True)

    def add(self, count: int) -> None:
        """Some more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._last > _EVERY or self._done == self._total:
            self._last, rate = now, self._done / max(now - self._begin, 1e-9)
            minutes, seconds = divmod(round((self._total - self._done) / max(rate, 1e-9)), 60)
            print(
                f"  {self._done}/{self._total} images, {rate:.1f} images/s, "
                f"{minutes}:{seconds:02d} left", flush=True,
            )  # fmt: skip


# ------------------------------------------------------------------------------------- the manifest


def _finish(args: Any, job: Job) -> None:
    """The manifest, once all shards are there."""
    from dcae_jax.data import latents
    from dcae_jax.errors import UserError

    infos = [info for info in _finished(job) if info is not None]
    if len(infos) < job.plan.shards():
        raise UserError(f"{job.where}: {job.plan.shards() - len(infos)} shard(s) have vanished")
    bad = [item for info in infos for item in info.bad]
    total = sum(info.images for info in infos) + len(bad)
    if len(bad) == total or len(bad) > job.data.max_bad_fraction * total:
        listed = "\n  ".join(f"{name}: {why}" for name, why in bad[:20])
        raise UserError(
            f"{len(bad)} of {total} images are bad, more than data.max_bad_fraction="
            f"{job.data.max_bad_fraction:g}; the shards are kept, the cache is not finished. The "
            f"first:\n  {listed}"
        )
    manifest = _manifest(args, job, infos)
    latents.write_json(job.where / latents.MANIFEST, manifest.to_json())
    print(_table(job, manifest))
    for name, why in bad[:20]:
        print(f"  left out: {name}: {why}")


def _manifest(args: Any, job: Job, infos: "list[ShardInfo]") -> "Manifest":
    from dcae_jax import checkpoint
    from dcae_jax.data import latents, pipeline

    source = pipeline.open_source(job.data)
    moments = latents.merged(infos)
    factor, scaling = _scaling(job.net, moments)
    psnr, stored, images = _round_trip(job)
    path = checkpoint.absolute(args.source)
    return latents.Manifest(
        plan=job.plan,
        autoencoder=str(path) if path.exists() else args.source,
        weights="ema" if args.params == "ema" else "params",
        variant=args.variant, description=job.net.source, decoder=job.net.decoder,
        model=job.net.cfg, dataset=source.name, classes=tuple(source.classes),
        num_classes=max(len(source.classes), *(info.labels for info in infos)),
        images=sum(info.images for info in infos), bad=sum(len(info.bad) for info in infos),
        shards=tuple((info.images, info.bytes, info.sha256) for info in infos),
        mean=tuple(moments.mean.tolist()), std=tuple(moments.std().tolist()), rms=moments.rms(),
        scaling_factor=factor, scaling=scaling, psnr=psnr, psnr_stored=stored, psnr_images=images,
    )  # fmt: skip


def _scaling(net: "Autoencoder", moments: "Moments") -> tuple[float, str]:
    """The factor that is known of the autoencoder, else 1 / RMS of these latents."""
    from dcae_jax.errors import UserError

    if net.scaling_factor is not None:
        return net.scaling_factor, "known of the autoencoder"
    if not moments.rms():
        raise UserError("all latents are zero: is the encoder trained?")
    return 1 / moments.rms(), "1 / RMS of these latents"


def _round_trip(job: Job) -> tuple[float, float, int]:
    """PSNR of reconstructions from f32 and from stored latents, and of how many images."""
    import jax.numpy as jnp
    import numpy as np

    from dcae_jax.data import latents, pipeline
    from dcae_jax.evals import metrics

    count = min(_PSNR_IMAGES, job.plan.images)
    chosen = np.arange(count) * job.plan.images // count
    padded = np.full(-(-count // job.batch) * job.batch, -1)
    padded[:count] = job.positions.wanted[chosen]
    net, scores = _Autoencoder(job), []
    with pipeline.picked_batches(
        job.data, job.positions._replace(wanted=padded), batch=job.batch
    ) as batches:
        for batch in batches:
            exact = np.asarray(net.encode(batch["image"])[0])
            stored = latents.rounded(exact, job.plan).astype(np.float32)
            image = jnp.asarray(batch["image"])
            both = [
                np.asarray(metrics.psnr(image, jnp.asarray(net.pixels(z))), np.float64)
                for z in (exact, stored)
            ]
            scores += np.stack(both, -1)[batch["mask"] > 0].tolist()
    exact, stored = np.mean(scores, axis=0).tolist()
    return exact, stored, len(scores)


def _table(job: Job, found: "Manifest") -> str:
    """The cache for people."""
    size = sum(length for _, length, _ in found.shards)
    lines = [
        f"{job.where}: {found.images} latents {'x'.join(map(str, found.shape))}"
        f"{' and their mirror images' if found.plan.flips else ''} in {len(found.shards)} "
        f"shard(s), {size / 1e6:.1f} MB, {found.bad} image(s) left out",
        f"classes            {found.num_classes}",
        f"RMS                {found.rms:.6g}   (channel stds {min(found.std):.4g} to "
        f"{max(found.std):.4g})",
        f"scaling factor     {found.scaling_factor:.6g}   ({found.scaling})",
        f"reconstruction     {found.psnr:.3f} dB; from {found.plan.dtype.value} latents "
        f"{found.psnr_cost:.4f} dB less   ({found.psnr_images} images)",
    ]
    scaled = found.rms * found.scaling_factor
    if not 0.7 <= scaled <= 1.4:
        lines.append(
            f"warning: scaled latents have RMS {scaled:.3g}, far from 1: is the factor that of "
            "this autoencoder, and are these images like those it was trained on?"
        )
    return "\n".join(lines)
