"""Latents of images, computed once: what a cache holds, how it is written, batches of it.

`python -m dcae_jax cache-latents` writes DIR/SPLIT/: shards in ArrayRecord, a small JSON after each
of them (a shard without one does not count), and at the end manifest.json.  A record is

    label int32 | latent [h, w, c] | log variance [h, w, c] of KL autoencoders | name of the image

little endian, unscaled, in bf16 or f32.  With flips, record 2 i is image i of the shard and record
2 i + 1 its mirror image.  Batches of latents come in the order that batches of the images would
have: the same machinery makes them (`pipeline.py`).
"""

import contextlib
import enum
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Float, Float64

from dcae_jax import config as config_lib
from dcae_jax.config import JSONValue
from dcae_jax.data import pipeline, sources
from dcae_jax.data.pipeline import WHOLE, AbstractBatch, BatchIterator, Loading, Sample, Shard
from dcae_jax.data.sources import Part
from dcae_jax.errors import UserError

FORMAT = 1  # of records and manifest: raise it when they change
MANIFEST = "manifest.json"
MARGIN = 64 * 1024**2  # bytes that stay free on the disk
_OVERHEAD = 160  # bytes of a record beside its numbers: name, label and ArrayRecord's own
_BLOCKS = 2 * 64 * 1024  # a shard is filled up to whole blocks of ArrayRecord
_READ_TRIES = 3
_READERS = "readahead_buffer_size:0,max_parallelism:0"  # random access
_BUFFER = 32 * 1024  # of an open shard; array_record's default is 1 MiB
_THREADS = 16  # that ask for the sizes of shards

Latent = Float[np.ndarray, "h w c"]


class Storage(enum.Enum):
    """How latents are stored; batches are f32 always."""

    bf16 = "bf16"
    f32 = "f32"

    @property
    def dtype(self) -> np.dtype:
        """The numpy type."""
        return np.dtype(ml_dtypes.bfloat16 if self is Storage.bf16 else "<f4")


@dataclass(frozen=True)
class Plan:
    """Everything that decides which latents are cached; two caches of one plan are equal."""

    encoder: str  # digest of the weights
    resolution: int
    transform: str  # how an image became pixels, with its options
    data: str  # fingerprint of the records
    split: str
    positions: str  # which records, how often
    images: int  # positions: bad images are left out of them
    shape: tuple[int, int, int]
    moments: bool  # log variances beside the means
    flips: bool
    dtype: Storage
    compute: str  # dtype of the encoder's activations
    shard_records: int
    format: int = FORMAT

    def digest(self) -> str:
        """A name for it."""
        return sources.digest(json.dumps(config_lib.to_json(self), sort_keys=True))

    def shards(self) -> int:
        """How many there are."""
        return -(-self.images // self.shard_records)

    def positions_of(self, shard: int) -> range:
        """The positions of one shard."""
        first = shard * self.shard_records
        return range(first, min(first + self.shard_records, self.images))

    def space(self, shards: Iterable[int]) -> int:
        """Bytes that some shards take at most, with names of ordinary length."""
        numbers = int(np.prod(self.shape)) * (1 + self.moments)
        image = (1 + self.flips) * (numbers * self.dtype.dtype.itemsize + _OVERHEAD)
        return sum(len(self.positions_of(i)) * image + _BLOCKS for i in shards)


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard, its statistics in float64; the JSON beside it holds this."""

    plan: str  # digest
    images: int
    bytes: int
    sha256: str
    labels: int  # one above the largest
    pixels: int  # of all its latents
    mean: tuple[float, ...]
    squares: tuple[float, ...]  # squared deviations from the mean, summed over the pixels
    variance: tuple[float, ...]  # sums of exp(log variance); () without moments
    bad: tuple[tuple[str, str], ...] = ()  # (name, why) of the images that were left out


@dataclass(frozen=True)
class Manifest:
    """What a finished cache says about itself.

    `mean`, `std` and `rms` are of the latents as stored; with moments, of samples of them.
    """

    plan: Plan
    autoencoder: str  # for `autoencoder.load`: a workdir, folder, file or hub name
    weights: str  # ema | params: which of a run's weights
    variant: str | None
    description: str  # of the weights, for people
    decoder: str  # digest of its weights: another decoder of the same encoder will do
    model: Any  # config of the autoencoder
    dataset: str
    classes: tuple[str, ...]  # (): they have no names
    num_classes: int
    images: int
    bad: int  # images that were left out; the shards' JSONs name them
    shards: tuple[tuple[int, int, str], ...]  # (images, bytes, sha256)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rms: float
    scaling_factor: float
    scaling: str  # where the factor comes from
    psnr: float  # dB, of what the decoder makes of the f32 latents of `psnr_images` images
    psnr_stored: float  # the same of the stored latents
    psnr_images: int

    @property
    def encoder(self) -> str:
        """Digest of the encoder's weights."""
        return self.plan.encoder

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent."""
        return self.plan.shape

    @property
    def resolution(self) -> int:
        """Pixels of the side of the images."""
        return self.plan.resolution

    @property
    def psnr_cost(self) -> float:
        """dB that the storage dtype costs."""
        return self.psnr - self.psnr_stored

    def to_json(self) -> JSONValue:
        """For files; `from_json` is the inverse."""
        return config_lib.to_json(self)

    @classmethod
    def from_json(cls, value: JSONValue) -> "Manifest":
        """The manifest that `to_json` wrote."""
        return config_lib.from_json(value)


# ------------------------------------------------------------------------------------ what is there


def folder(path: str, split: str) -> epath.Path:
    """Where the latents of a split lie in a cache."""
    return epath.Path(path).expanduser() / split


def shard_path(where: epath.Path, index: int) -> epath.Path:
    """The file of a shard in the folder of its split; its JSON has the suffix .json."""
    return where / f"latents-{index:05d}.array_record"


def read_json(path: epath.Path) -> JSONValue:
    """A JSON file; None if it is absent or was cut short by a kill."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: epath.Path, value: JSONValue) -> None:
    """Writes a file whole or not at all, also where stores know no rename."""
    text = json.dumps(value, indent=1)
    if "://" in os.fspath(path):
        path.write_text(text)
        return
    staged = path.parent / f"staging-{path.name}"
    staged.write_text(text)
    staged.replace(path)


def find_manifest(where: epath.Path) -> Manifest | None:
    """The manifest in a split's folder; None if the cache is not finished."""
    value = read_json(where / MANIFEST)
    if value is None:
        return None
    if value["plan"]["format"] != FORMAT:
        raise UserError(
            f"{where} holds latents of format {value['plan']['format']}, this version of dcae_jax "
            f"reads format {FORMAT}; make the cache again: python -m dcae_jax cache-latents"
        )
    return Manifest.from_json(value)


def read_manifest(path: str, split: str = "train") -> Manifest:
    """The manifest of a split; UserError says what is there instead."""
    where = folder(path, split)
    found = find_manifest(where)
    if found is not None:
        return found
    if where.exists():
        raise UserError(
            f"the latents in {where} are not finished ({MANIFEST} is missing): run the same "
            "`python -m dcae_jax cache-latents` again, it goes on where it stopped"
        )
    root = epath.Path(path).expanduser()
    splits = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    raise UserError(
        f"no latents of split {split!r} in {path}"
        + (f"; it has: {', '.join(splits)}" if splits else "")
        + ". Make them: python -m dcae_jax cache-latents --from AUTOENCODER "
        f"--out {path} --split {split}"
    )


@runtime_checkable
class Weights(Protocol):
    """What is asked of an autoencoder."""

    source: str
    encoder: str  # digests
    decoder: str


def check(manifest: Manifest, net: Weights) -> list[str]:
    """Notes about an autoencoder that shall decode these latents; UserError if it must not."""
    if not manifest.encoder:  # a model that was imported without its autoencoder
        return [
            "which encoder made the latents of these imported weights is not known; "
            f"{net.source} decodes them"
        ]
    if net.encoder != manifest.encoder:
        raise UserError(
            f"the latents are of another autoencoder than {net.source}: their encoder is "
            f"{manifest.encoder[:16]} ({manifest.description}), its encoder is "
            f"{net.encoder[:16]}. Name the autoencoder that made them ({manifest.autoencoder}; if "
            "that is this one, it was trained on or replaced since), or cache latents of this one: "
            "python -m dcae_jax cache-latents"
        )
    if net.decoder != manifest.decoder:
        return [
            f"{net.source} has the encoder of the cached latents and another decoder "
            f"({net.decoder[:16]}, then {manifest.decoder[:16]}): a decoder that was refined "
            "later will do"
        ]
    return []


# ------------------------------------------------------------------------------------------ records


class Record(NamedTuple):
    """One stored latent, f32."""

    latent: Latent
    logvar: Latent | None
    label: int
    name: str


def pack(plan: Plan, record: Record) -> bytes:
    """The bytes of a record."""
    parts = [np.array(record.label, "<i4").tobytes(), rounded(record.latent, plan).tobytes()]
    if record.logvar is not None:
        parts.append(rounded(record.logvar, plan).tobytes())
    return b"".join([*parts, record.name.encode()])


def rounded(values: np.ndarray, plan: Plan) -> np.ndarray:
    """f32 values in the type that is stored."""
    return np.ascontiguousarray(values, plan.dtype.dtype)


def unpack(plan: Plan, data: bytes) -> Record:
    """The record of some bytes."""
    size = int(np.prod(plan.shape)) * plan.dtype.dtype.itemsize
    arrays = [
        np.frombuffer(data, plan.dtype.dtype, int(np.prod(plan.shape)), 4 + i * size)
        .reshape(plan.shape).astype(np.float32)
        for i in range(1 + plan.moments)
    ]  # fmt: skip
    name = data[4 + (1 + plan.moments) * size :].decode()
    label = int(np.frombuffer(data, "<i4", 1)[0])
    return Record(arrays[0], arrays[1] if plan.moments else None, label, name)


class Moments:
    """Mean and deviations of latent pixels, float64, merged in whichever order is asked for."""

    def __init__(
        self, pixels: int = 0, mean: Float64[np.ndarray, " c"] | float = 0.0,
        squares: Float64[np.ndarray, " c"] | float = 0.0,
        variance: Float64[np.ndarray, " c"] | float = 0.0,
    ) -> None:  # fmt: skip
        self.pixels, self.mean, self.squares, self.variance = pixels, mean, squares, variance

    @classmethod
    def of(cls, record: Record) -> "Moments":
        """Those of one latent."""
        rows = record.latent.reshape(-1, record.latent.shape[-1]).astype(np.float64)
        mean = rows.mean(axis=0)
        variance = 0.0
        if record.logvar is not None:
            logvar = record.logvar.reshape(rows.shape).astype(np.float64)
            variance = np.exp(logvar).sum(axis=0)
        return cls(len(rows), mean, np.square(rows - mean).sum(axis=0), variance)

    def add(self, other: "Moments") -> None:
        """Merges another's (Chan, Golub and LeVeque 1979: sums of squares about the means)."""
        if not other.pixels:
            return
        pixels = self.pixels + other.pixels
        away = other.mean - self.mean
        self.mean = self.mean + away * (other.pixels / pixels)
        self.squares = (
            self.squares + other.squares + np.square(away) * (self.pixels * other.pixels / pixels)
        )
        self.variance = self.variance + other.variance
        self.pixels = pixels

    def std(self) -> Float64[np.ndarray, " c"]:
        """Standard deviation of each channel, of samples where there are log variances."""
        return np.sqrt((self.squares + self.variance) / self.pixels)

    def rms(self) -> float:
        """Root of the mean square over all channels."""
        return float(np.sqrt(np.mean(np.square(self.mean) + np.square(self.std()))))


class ShardWriter:
    """Fills one shard; nobody sees it before `finish`."""

    def __init__(self, where: epath.Path, plan: Plan, index: int) -> None:
        from array_record.python import array_record_module

        self._where, self._plan, self._index = where, plan, index
        self._local = "://" not in os.fspath(where)
        self._spool = None if self._local else tempfile.TemporaryDirectory()
        held = where if self._local else epath.Path(self._spool.name)
        self._staged = held / f"staging-{index:05d}"
        self._writer = array_record_module.ArrayRecordWriter(
            os.fspath(self._staged), "group_size:1,uncompressed"
        )
        self._moments = Moments()
        self.images, self._labels = 0, 0
        self.bad: list[tuple[str, str]] = []

    def add(self, *views: Record) -> None:
        """An image: its latent and, with flips, that of its mirror image."""
        for record in views:
            data = pack(self._plan, record)
            stored = unpack(self._plan, data)
            _require_finite(stored)
            with self._told():
                self._writer.write(data)
            self._moments.add(Moments.of(stored))
        self._labels = max(self._labels, views[0].label + 1)
        self.images += 1

    def finish(self) -> ShardInfo:
        """Moves the shard to its place and writes its JSON: from now on it counts."""
        with self._told():
            self._writer.close()
            info = self._info()
            path = shard_path(self._where, self._index)
            if self._local:
                self._staged.replace(path)
            else:
                path.write_bytes(self._staged.read_bytes())
                self._spool.cleanup()
            write_json(path.with_suffix(".json"), config_lib.to_json(info))
        return info

    def _info(self) -> ShardInfo:
        channels, found = self._plan.shape[2], self._moments
        return ShardInfo(
            plan=self._plan.digest(), images=self.images, bytes=self._staged.stat().length,
            sha256=sha256_of(self._staged), labels=self._labels, pixels=found.pixels,
            mean=_floats(found.mean, channels), squares=_floats(found.squares, channels),
            variance=_floats(found.variance, channels) if self._plan.moments else (),
            bad=tuple(self.bad),
        )  # fmt: skip

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk, say, is one sentence; ArrayRecord's own error is a RuntimeError."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot write shard {self._index} of {self._where}: {error}. Shards that are "
                "finished stay: make room and run the same command again"
            ) from error

    def abandon(self) -> None:
        """Leaves nothing behind."""
        with contextlib.suppress(RuntimeError):  # the disk may be full
            self._writer.close()
        self._staged.unlink(missing_ok=True)
        if self._spool is not None:
            self._spool.cleanup()


def _require_finite(record: Record) -> None:
    if all(np.isfinite(x).all() for x in (record.latent, record.logvar) if x is not None):
        return
    raise UserError(
        f"the latent of {record.name} is not finite. If those of other images are, leave this "
        "image out of the data; else the weights are not whole, or overflow in --compute bfloat16. "
        "Shards that are finished stay"
    )


def _floats(values: np.ndarray | float, count: int) -> tuple[float, ...]:
    return tuple(np.broadcast_to(np.asarray(values, np.float64), (count,)).tolist())


def sha256_of(path: epath.Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished_shard(where: epath.Path, plan: Plan, index: int) -> ShardInfo | None:
    """A shard of this plan that is complete; None if there is none."""
    path = shard_path(where, index)
    value = read_json(path.with_suffix(".json"))
    if value is None or value["plan"] != plan.digest():
        return None
    if not path.exists() or path.stat().length != value["bytes"]:
        return None
    return config_lib.from_json(value)


def any_shard(where: epath.Path) -> bool:
    """Whether a shard of any plan is finished there."""
    names = [path.name for path in where.iterdir()] if where.exists() else []
    return any(name.startswith("latents-") and name.endswith(".json") for name in names)


def merged(infos: list[ShardInfo]) -> Moments:
    """The statistics of all shards, in their order."""
    total = Moments()
    for info in infos:
        arrays = (np.array(v, np.float64) for v in (info.mean, info.squares))
        variance = np.array(info.variance, np.float64) if info.variance else 0.0
        total.add(Moments(info.pixels, *arrays, variance))
    return total


# ------------------------------------------------------------------------------------------ reading


class LatentSource:
    """Random access to the latents of a finished cache."""

    def __init__(self, path: str, split: str) -> None:
        self.manifest = read_manifest(path, split)
        self._where = folder(path, split)
        self.name, self.classes = self.manifest.dataset, self.manifest.classes
        self._ends = np.cumsum([images for images, *_ in self.manifest.shards])
        self._paths = self._checked_paths()
        self._readers: list[Any] = [None] * len(self._paths)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.images

    def read(self, index: int, mirrored: bool = False) -> Record:
        """The latent of an image, or of its mirror image."""
        plan = self.manifest.plan
        shard = int(np.searchsorted(self._ends, index, side="right"))
        inside = index - (int(self._ends[shard - 1]) if shard else 0)
        number = 2 * inside + mirrored if plan.flips else inside
        (data,) = self._reader(shard).read([number])
        return unpack(plan, data)

    def _checked_paths(self) -> list[epath.Path]:
        """The files of the shards; UserError names those that are missing or cut."""

        def wrong(item: tuple[int, tuple[int, int, str]]) -> str:
            path = shard_path(self._where, item[0])
            if not path.exists():
                return f"{path} is missing"
            length = path.stat().length
            return "" if length == item[1][1] else f"{path}: {length} bytes, not {item[1][1]}"

        with futures.ThreadPoolExecutor(_THREADS) as pool:
            found = [text for text in pool.map(wrong, enumerate(self.manifest.shards)) if text]
        if found:
            raise UserError(
                f"{len(found)} shard(s) of latents are damaged:\n  " + "\n  ".join(found[:5])
                + "\nDelete them and run the same `python -m dcae_jax cache-latents` again: it "
                "makes what is missing"
            )  # fmt: skip
        return [shard_path(self._where, i) for i in range(len(self.manifest.shards))]

    def _reader(self, shard: int) -> Any:
        from array_record.python import array_record_module

        with self._lock:
            if self._readers[shard] is None:
                path = _local(self._paths[shard], self.manifest.shards[shard])
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    os.fspath(path), _READERS, file_reader_buffer_size=_BUFFER
                )
            return self._readers[shard]


def _local(path: epath.Path, shard: tuple[int, int, str]) -> epath.Path:
    """The shard on a disk of this machine: ArrayRecord has no random access to object stores."""
    if "://" not in os.fspath(path):
        return path
    _, size, sha256 = shard
    kept = sources.cache_root() / "latents" / f"{sha256}.array_record"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(kept.parent).free
    if free < size + MARGIN:
        raise UserError(
            f"{kept.parent} has {free / 1e9:.1f} GB free, not enough for a copy of {path} "
            f"({size / 1e9:.2f} GB); make room, or set DCAE_JAX_DATA to a larger disk"
        )
    temporary = kept.parent / f".{kept.name}-{os.getpid()}-{time.time_ns()}"
    with path.open("rb") as remote, temporary.open("wb") as file:
        shutil.copyfileobj(remote, file)
    temporary.replace(kept)
    return kept


class _Sampler:
    """(part, index), generator -> the latent, mirrored half of the time where that is wanted."""

    def __init__(self, source: LatentSource, flip: bool) -> None:
        self._source, self._flip = source, flip and source.manifest.plan.flips

    def __call__(self, element: tuple[int, int], rng: np.random.Generator) -> Sample:
        """The latent of an image; UserError if it cannot be read."""
        part, index = element
        mirrored = self._flip and bool(rng.random() < 0.5)
        record = _patiently(lambda: self._source.read(index, mirrored), self._source.name)
        arrays = {"latent": record.latent}
        if record.logvar is not None:
            arrays["logvar"] = record.logvar
        return Sample(arrays, record.label, part, 1, (), record.name)

    def blank(self) -> Sample:
        """Zeros."""
        plan = self._source.manifest.plan
        names = ("latent", "logvar") if plan.moments else ("latent",)
        return Sample({k: np.zeros(plan.shape, np.float32) for k in names}, 0, -1, 0)


def _patiently(read: Callable[[], Record], name: str) -> Record:
    """Asks three times: storage may fail for a moment."""
    for attempt in range(_READ_TRIES):
        try:
            return read()
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            failure = error
            time.sleep(0.2 * 4**attempt if attempt + 1 < _READ_TRIES else 0)
    raise UserError(
        f"a latent of {name} cannot be read: {failure}. The same `python -m dcae_jax "
        "cache-latents` again checks all sums and names the damaged shard"
    ) from failure


# ------------------------------------------------------------------------------------------- config


@dataclass(slots=True)
class LatentDataConfig:
    """Latents that `python -m dcae_jax cache-latents` wrote, as the data of a run."""

    path: str = ""  # what was its --out; may be gs://
    split: str = "train"
    flip: bool = True  # half of the latents are mirror images, where the cache has them
    # (h, w, c) that is expected, so that --dry_run needs no cache; (): whatever the cache has.
    shape: tuple[int, ...] = ()
    threads: int = 4  # that read, in each process
    prefetch: int = 4  # batches kept ready

    def problems(self) -> list[str]:
        """All mistakes in these fields, each with its mend."""
        found = []
        if not self.path:
            found.append("data.path is empty: give the folder that cache-latents wrote (--out)")
        if self.shape and (len(self.shape) != 3 or min(self.shape) < 1):
            found.append(f"data.shape={self.shape} must be (height, width, channels), or ()")
        for name in ("threads", "prefetch"):
            if getattr(self, name) < 1:
                found.append(f"data.{name}={getattr(self, name)} must be at least 1")
        return found

    def manifest(self) -> Manifest:
        """What the cache says about itself; UserError if it is not finished or of another shape."""
        found = read_manifest(self.path, self.split)
        if self.shape and tuple(self.shape) != found.shape:
            raise UserError(
                f"the latents in {self.path} are {found.shape}, but data.shape={self.shape}: give "
                "another data.path, or set data.shape (and task.model) to what the cache has"
            )
        return found

    @property
    def resolution(self) -> int:
        """Pixels of the side of the images behind the latents."""
        return self.manifest().resolution

    def batches(
        self, *, batch: int, seed: int, start_step: int = 0, shard: Shard = WHOLE
    ) -> BatchIterator:
        """Endless batches: {"latent": float32[b,h,w,c], "logvar" of KL ones, "label": int32[b]}.

        Unscaled; with log variances, `latent` is the mean.  The order is that of images.
        """
        pipeline.check_request(self.problems(), batch, shard)
        source = self._open()
        return pipeline.training(
            (Part(source.name, source),), _Sampler(source, self.flip), self._loading(),
            batch=batch, seed=seed, start_step=start_step, shard=shard,
        )  # fmt: skip

    def eval_batches(self, *, batch: int, n: int, shard: Shard = WHOLE) -> BatchIterator:
        """Exactly `n` latents, spread evenly, never mirrored, with a `mask` as for images."""
        pipeline.check_request(self.problems(), batch, shard)
        source = self._open()
        parts = (Part(source.name, source),)
        order = pipeline.evaluation_order(parts, n, False, self.split)
        sample = _Sampler(source, flip=False)
        return pipeline.evaluation(
            parts, sample, self._loading(), order, batch=batch, shard=shard
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Digest of the encoder, the images, and how they became latents."""
        return self.manifest().plan.digest()

    def abstract_batch(self, batch: int) -> AbstractBatch:
        """Shapes and dtypes of a global batch; without a cache, those of `shape`."""
        plan = None
        if not self.shape or (folder(self.path, self.split) / MANIFEST).exists():
            plan = self.manifest().plan
        names = ("latent", "logvar") if plan and plan.moments else ("latent",)
        shape = (batch, *(plan.shape if plan else self.shape))
        latents = {name: (shape, np.dtype(np.float32)) for name in names}
        return {**latents, "label": ((batch,), np.dtype(np.int32))}

    def _open(self) -> LatentSource:
        self.manifest()  # of the expected shape
        return LatentSource(self.path, self.split)

    def _loading(self) -> Loading:
        return Loading(self.threads, self.prefetch)
