"""Batches as a pure function of (seed, step).

Row r of step k is position p = k * batch + r on any number of processes. A position says which
record is read (a shuffle that is reseeded each epoch, or a mixture's plan) and which random numbers
its crop draws; nothing else is state, so seeking costs nothing and no iterator state is ever saved.
A Grain MapDataset:

    order -> read, decode, crop with the generator of (seed, position) -> contiguous rows of this
    process -> batch -> skip to the first step -> threads or worker processes

What is read at a position is a sampler's matter: images here, latents in `latents.py`.  Callers use
the methods of the data's config (`cfg.data.batches(...)`), whichever it is.
"""

import enum
import functools
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent import futures
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process, resource_tracker
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags, logging
from jaxtyping import Int64, UInt8

from dcae_jax.data import sources, transforms
from dcae_jax.data.sources import FolderConfig, MixtureConfig, Part, PhotosConfig, TfdsConfig
from dcae_jax.data.transforms import BadRecord, Pixels, Reason
from dcae_jax.errors import UserError

# A record is replaced by its successor at most this many times before the data set is called
# unusable.
MAX_TRIES = 32
# The share of bad records is judged once this many have been read (or the whole set, if it is
# smaller).
JUDGE_AFTER = 1000
# A mixture's shares are exact in every block of this many positions.
BLOCK = 4096
# Up to this many records a permutation is made per epoch instead of Grain's shuffle.
SMALL_SHUFFLE = 8192
# How many bad records the statistics name.
NAMED_BAD = 20
# Evaluation crops never depend on the training seed.
EVAL_SEED = 20_241_014
# Decoded images are kept only if the set is so small that this size each would fit.
_SMALLEST_CACHED = 128 * 1024
_READ_TRIES = 3
# Positions of a training run: Grain computes lengths in floats, which must not round past 2^63.
_ENDLESS = 2**50
# What is open in this process: (source, split, 0) -> Source, (source, split, 1 + min_size) ->
# parts.
_OPEN: dict[tuple[str, str, int], Any] = {}


class Transform(enum.Enum):
    """How an image becomes resolution x resolution pixels."""

    center_crop = "center_crop"
    random_crop = "random_crop"
    random_resized_crop = "random_resized_crop"


class Shard(NamedTuple):
    """Which rows of each global batch this process loads: the index-th of count equal runs."""

    index: int = 0
    count: int = 1


WHOLE = Shard()
# A batch without its values: shape and dtype of each array.
AbstractBatch = dict[str, tuple[tuple[int, ...], np.dtype]]


class Loading(NamedTuple):
    """How batches are read ahead, and which share of bad records is borne."""

    threads: int
    prefetch: int
    workers: int = 0
    max_bad_fraction: float = 0.0


@dataclass(slots=True)
class DataConfig:
    """What is read and how it is cropped. Quantities are global; nothing depends on processes."""

    source: PhotosConfig | FolderConfig | TfdsConfig | MixtureConfig = field(
        default_factory=PhotosConfig
    )
    # Name of the split in the source.
    split: str = "train"
    # Height and width of the batches in pixels.
    resolution: int = 128
    # center_crop resizes (ADM, the released models' own), random_crop never resizes,
    # random_resized_crop draws a window by area and aspect and resizes it.
    transform: Transform = Transform.random_crop
    # Mirror half of the images (training only).
    flip: bool = True
    # Records with a shorter side below this are left out before training (sizes are scanned once
    # and cached); 0 keeps all, and then an image smaller than a random crop counts as bad.
    min_size: int = 0
    # random_resized_crop: range of the window's share of the image area.
    area: tuple[float, float] = (0.25, 1.0)
    # random_resized_crop: range of the window's width / height.
    aspect: tuple[float, float] = (0.75, 1.3333)
    # Threads that read and decode, in each process.
    threads: int = 4
    # Worker processes; 0 uses threads alone, enough until decoding is the limit.
    workers: int = 0
    # Batches kept ready.
    prefetch: int = 4
    # Above this share of bad records the run stops.
    max_bad_fraction: float = 0.01
    # Memory for decoded images of small sources, per process, in MB; 0 switches it off.
    cache_mb: int = 256

    def problems(self) -> list[str]:
        """All mistakes in these fields, each with its mend."""
        found = [f"data.{problem}" for problem in self.source.problems()]
        for name, value, least in (
            ("resolution", self.resolution, 1), ("min_size", self.min_size, 0),
            ("threads", self.threads, 1), ("workers", self.workers, 0),
            ("prefetch", self.prefetch, 1), ("cache_mb", self.cache_mb, 0),
        ):  # fmt: skip
            if value < least:
                found.append(f"data.{name}={value} must be at least {least}")
        if not 0 <= self.max_bad_fraction <= 1:
            found.append(f"data.max_bad_fraction={self.max_bad_fraction} must lie in 0..1")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            found.append(f"data.area={self.area} must be (low, high) with 0 < low <= high <= 1")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            found.append(f"data.aspect={self.aspect} must be (low, high) with 0 < low <= high")
        return found

    def loading(self, workers: int) -> Loading:
        """How batches are read ahead, by so many worker processes."""
        return Loading(self.threads, self.prefetch, workers, self.max_bad_fraction)

    def batches(
        self, *, batch: int, seed: int, start_step: int = 0, shard: Shard = WHOLE
    ) -> "BatchIterator":
        """Endless training batches: see `pipeline.batches`."""
        return batches(self, batch=batch, seed=seed, start_step=start_step, shard=shard)

    def eval_batches(self, *, batch: int, n: int, shard: Shard = WHOLE) -> "BatchIterator":
        """Exactly n images, masked: see `pipeline.eval_batches`."""
        return eval_batches(self, batch=batch, n=n, shard=shard)

    def fingerprint(self) -> str:
        """Digest of which records are used: see `pipeline.fingerprint`."""
        return fingerprint(self)

    def abstract_batch(self, batch: int) -> AbstractBatch:
        """Shapes and dtypes of a global batch, without opening the source."""
        side = self.resolution
        return {
            "image": ((batch, side, side, 3), np.dtype(np.uint8)),
            "label": ((batch,), np.dtype(np.int32)),
        }


class BatchIterator:
    """Batches as dictionaries, the statistics of what was read, and `close()`.

    The counts travel with the batches, so they cover exactly the batches that were handed out, in
    any number of threads and worker processes. They are this process's own: with several processes
    each counts the rows that it loaded.
    """

    def __init__(self, steps: grain.MapDataset, parts: tuple[Part, ...], loading: Loading) -> None:
        self._parts = parts
        self._judge_after = min(JUDGE_AFTER, sum(len(part.source) for part in parts))
        self._limit = loading.max_bad_fraction
        self._read, self._rows = 0, 0
        self._per_part: Counter[str] = Counter({part.name: 0 for part in parts})
        self._reasons: Counter[str] = Counter()
        self._named: dict[str, str] = {}
        self._closed = False
        dataset = _prefetched(steps, loading)
        self._start = _start_workers(dataset) if loading.workers else _start_threads(dataset)
        self._iterator: grain.DatasetIterator | None = None

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self._next()
        self._count(batch.pop("part"), json.loads(batch.pop("events")))
        self._judge()
        return batch

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """Counts so far: rows, records read, bad ones by reason and by name, rows per source."""
        return {
            "rows": self._rows,
            "read": self._read,
            "bad": self._reasons.total(),
            "bad_fraction": self._reasons.total() / max(1, self._read),
            "bad_reasons": dict(self._reasons),
            "bad_records": dict(self._named),
            "rows_per_source": dict(self._per_part),
        }

    def close(self) -> None:
        """Stops and joins threads and worker processes; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._start.exception() is None:  # waits until the workers have started
            self._start.result()[0].close()

    def _next(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator, first = self._start.result()
            if first is not None:
                return first
        return next(self._iterator)

    def _count(self, part: np.ndarray, events: dict[str, Any]) -> None:
        real = part[part >= 0]
        self._rows += len(real)
        self._read += events["read"]
        for index, count in zip(*np.unique(real, return_counts=True), strict=True):
            self._per_part[self._parts[index].name] += int(count)
        for name, reason, detail in events["bad"]:
            self._reasons[reason] += 1
            if name not in self._named and len(self._named) < NAMED_BAD:
                self._named[name] = f"{reason}: {detail}" if detail else reason
                logging.warning("bad record: %s: %s", name, self._named[name])

    def _judge(self) -> None:
        bad = self._reasons.total()
        if self._read < self._judge_after or bad <= self._limit * self._read:
            return
        self.close()
        listed = "\n  ".join(f"{name}: {why}" for name, why in self._named.items())
        raise UserError(
            f"{bad} of {self._read} records read are bad ({bad / self._read:.2%}), more than "
            f"data.max_bad_fraction={self._limit:g}. The first:\n  {listed}\n"
            "Mend or remove them (python -m dcae_jax data-check lists all), leave small images "
            "out with "
            "data.min_size, or raise data.max_bad_fraction."
        )


def batches(
    cfg: DataConfig, *, batch: int, seed: int, start_step: int = 0, shard: Shard = WHOLE
) -> BatchIterator:
    """Endless training batches from `start_step`: {"image": uint8[b,h,w,3], "label": int32[b]}.

    `batch` is the global size; b = batch / shard.count rows are this shard's. Raises `UserError`
    for settings that cannot work and, while iterating, above `cfg.max_bad_fraction`.
    """
    check_request(cfg.problems(), batch, shard)
    parts = _parts(cfg)
    return training(
        parts, _Sampler(parts, cfg, cfg.flip), cfg.loading(cfg.workers), batch=batch, seed=seed,
        start_step=start_step, shard=shard,
    )  # fmt: skip


def eval_batches(cfg: DataConfig, *, batch: int, n: int, shard: Shard = WHOLE) -> BatchIterator:
    """Exactly `n` images in ceil(n / batch) batches with {"mask": float32[b]}, 1 for real rows.

    The rows behind the n-th are zeros. The n images are spread evenly over the split (the first n
    would be the first classes of a sorted set), always the same ones with the same crops, never
    flipped. More images than the split has are several crops of each if the crop is random, else a
    `UserError`. Worker processes are not used: an evaluation is too short for their start.
    """
    check_request(cfg.problems(), batch, shard)
    parts = _parts(cfg)
    sample = _Sampler(parts, cfg, flip=False)
    again = cfg.transform is not Transform.center_crop
    order = evaluation_order(parts, n, again, cfg.split)
    return evaluation(parts, sample, cfg.loading(0), order, batch=batch, shard=shard)


@runtime_checkable
class Sampler(Protocol):
    """What is read at a position of an order of (part, index)."""

    def __call__(self, element: tuple[int, int], rng: np.random.Generator) -> "Sample":
        """The record of that element; draws only from the generator of the position."""
        ...

    def blank(self) -> "Sample":
        """A row of zeros, for what lies behind the end of an evaluation."""
        ...


def training(
    parts: tuple[Part, ...], sample: Sampler, loading: Loading, *, batch: int, seed: int,
    start_step: int, shard: Shard,
) -> BatchIterator:  # fmt: skip
    """Endless batches of what `sample` gives, in the training order of the seed."""
    if seed < 0 or start_step < 0:
        raise UserError(f"seed={seed} and start_step={start_step} must not be negative")
    order = _training_order(parts, seed)
    rows = _Rows(order.random_map(sample, seed=_derive(seed, "crop")), batch, shard)
    steps = rows.batch(batch // shard.count, batch_fn=_collate)[start_step:]
    return BatchIterator(steps, parts, loading)


def evaluation(
    parts: tuple[Part, ...], sample: Sampler, loading: Loading, order: list[tuple[int, int]], *,
    batch: int, shard: Shard,
) -> BatchIterator:  # fmt: skip
    """Batches with a mask of exactly the elements of `order`."""
    sampled = grain.MapDataset.source(order).random_map(sample, seed=EVAL_SEED)
    rows = _Rows(sampled, batch, shard, blank=sample.blank())
    steps = rows.batch(batch // shard.count, batch_fn=functools.partial(_collate, masked=True))
    return BatchIterator(steps, parts, loading)


def picked_batches(cfg: DataConfig, positions: "Positions", *, batch: int) -> BatchIterator:
    """Masked batches of exactly these positions, in this order, each image once or not at all.

    For what is made of images once and kept.  A batch has `names` as well, the JSON of (name, why)
    of each row: a bad image is not replaced but masked out, with the reason why; `why` and `name`
    are empty for good images and for rows behind the end.
    """
    check_request(cfg.problems(), batch, WHOLE)
    parts = _parts(cfg)
    sample = _Sampler(parts, cfg, flip=False, replace=False)
    crops = positions.order.random_map(sample, seed=_derive(positions.seed, "crop"))
    rows = _Picked(crops, positions.wanted, sample.blank())
    collate = functools.partial(_collate, masked=True, named=True)
    steps = rows.batch(batch, batch_fn=collate)
    return BatchIterator(steps, parts, cfg.loading(cfg.workers))


class Positions(NamedTuple):
    """Positions of an order of (part, index) and the seed of their crops."""

    order: grain.MapDataset
    wanted: Int64[np.ndarray, " n"]  # -1: a blank row
    seed: int = 0


def training_order(cfg: DataConfig, seed: int = 0) -> grain.MapDataset:
    """Position -> (part, index) of a training run with this seed, endless."""
    return _training_order(_parts(cfg), seed)


def every_record(cfg: DataConfig, crops: int = 1) -> grain.MapDataset:
    """Each record, in the source's order, `crops` times in a row."""
    return _EveryRecord([len(part.source) for part in _parts(cfg)], crops)


def spread_records(cfg: DataConfig, n: int) -> grain.MapDataset:
    """The n records that an evaluation on n images reads."""
    parts = _parts(cfg)
    return grain.MapDataset.source(evaluation_order(parts, n, False, cfg.split))


def fingerprint(cfg: DataConfig) -> str:
    """Digest of which records are used: source, split, minimum size. The same on every machine."""
    source = open_source(cfg)
    return sources.digest(source.fingerprint(), cfg.split, str(cfg.min_size))


def listing(cfg: DataConfig) -> str:
    """Digest of which record stands at which position, whatever is in it: of files, their names."""
    rows = [f"{sources.listing(part.source)}:{part.weight}" for part in _parts(cfg)]
    return sources.digest("listing", cfg.split, *rows)


def describe(cfg: DataConfig) -> dict[str, Any]:
    """What a run prints about its data: names, numbers of records, classes, crop, fingerprint."""
    source = open_source(cfg)
    parts = _parts(cfg)
    return {
        "source": source.name,
        "split": cfg.split,
        "records": {part.name: len(part.source) for part in parts},
        "left_out_below_min_size": len(source) - sum(len(part.source) for part in parts),
        "shares": {part.name: part.weight / sum(p.weight for p in parts) for part in parts},
        "classes": len(source.classes),
        "resolution": cfg.resolution,
        "transform": cfg.transform.value,
        "flip": cfg.flip,
        "min_size": cfg.min_size,
        "fingerprint": fingerprint(cfg),
    }


class _Subset:
    """A source reduced to some of its records."""

    def __init__(self, source: sources.Source, kept: np.ndarray) -> None:
        self._source, self._kept = source, kept
        self.name, self.classes = source.name, source.classes

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> sources.Record:
        return self._source[int(self._kept[index])]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a kept record."""
        return self._source.size(int(self._kept[index]))

    def fingerprint(self) -> str:
        """Digest of the source and of which records are kept."""
        return sources.digest(self._source.fingerprint(), self._kept.tobytes().hex())

    def listing(self) -> str:
        """Digest of the source's listing and of which records are kept."""
        return sources.digest(sources.listing(self._source), self._kept.tobytes().hex())


class _SmallShuffle(grain.MapDataset):
    """An endless shuffle of 0..n-1, a new permutation in each epoch, for small n.

    Grain's own shuffle is a cipher on 16 bits or more that is walked until it hits the range: 6 ms
    per draw for n = 8. Raw Philox words, unlike `Generator.permutation`, are the same in every
    numpy.
    """

    def __init__(self, n: int, seed: int) -> None:
        super().__init__()
        self._n, self._seed = n, seed
        self._permuted: tuple[int, np.ndarray] = (-1, np.arange(n))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return self.slice(position)
        epoch, place = divmod(position, self._n)
        permuted = self._permuted  # one tuple: threads read and replace it whole
        if permuted[0] != epoch:
            words = np.random.Philox(key=[self._seed, epoch]).random_raw(self._n)
            permuted = self._permuted = (epoch, np.argsort(words, kind="stable"))
        return int(permuted[1][place])


class _Mixture(grain.MapDataset):
    """Position -> (part, index): every BLOCK of positions holds each part's exact share."""

    def __init__(
        self, slots: grain.MapDataset, orders: list[grain.MapDataset], quotas: np.ndarray
    ) -> None:
        super().__init__([slots, *orders])
        self._quotas = quotas
        self._starts = np.concatenate([[0], np.cumsum(quotas)[:-1]])

    def __len__(self) -> int:
        return len(self.parents[0])

    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return self.slice(position)
        slot = self.parents[0][position]
        part = int(np.searchsorted(self._starts, slot, side="right")) - 1
        turn = position // BLOCK * int(self._quotas[part]) + slot - int(self._starts[part])
        return part, self.parents[1 + part][turn]


class _EveryRecord(grain.MapDataset):
    """(part, index) of all records of all parts, behind each other, each `crops` times."""

    def __init__(self, lengths: list[int], crops: int) -> None:
        super().__init__()
        self._ends, self._crops = np.cumsum(lengths), crops

    def __len__(self) -> int:
        return int(self._ends[-1]) * self._crops

    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return self.slice(position)
        record = position // self._crops
        part = int(np.searchsorted(self._ends, record, side="right"))
        return part, int(record - (self._ends[part - 1] if part else 0))


class _Picked(grain.MapDataset):
    """The parent at some positions; -1 gives a blank row."""

    def __init__(self, parent: grain.MapDataset, wanted: np.ndarray, blank: "Sample") -> None:
        super().__init__(parent)
        self._wanted, self._blank = wanted, blank

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        position = int(self._wanted[index])
        return self._blank if position < 0 else self.parents[0][position]


class _Rows(grain.MapDataset):
    """This shard's contiguous rows of each global batch; behind a finite parent's end, blank."""

    def __init__(
        self, parent: grain.MapDataset, batch: int, shard: Shard, blank: "Sample | None" = None
    ) -> None:
        super().__init__(parent)
        self._batch, self._blank = batch, blank
        self._rows = batch // shard.count
        self._first = shard.index * self._rows
        endless = min(len(parent), _ENDLESS)
        self._steps = endless // batch if blank is None else -(-len(parent) // batch)

    def __len__(self) -> int:
        return self._steps * self._rows

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._rows)
        position = step * self._batch + self._first + row
        if position >= len(self.parents[0]):
            return self._blank
        return self.parents[0][position]


class Sample(NamedTuple):
    """One row on its way into a batch, with what happened while it was read."""

    arrays: dict[str, np.ndarray]  # the image, or the latent
    label: int
    part: int  # -1: a blank row
    read: int
    bad: tuple[tuple[str, str, str], ...] = ()
    name: str = ""


class _Sampler:
    """(part, index), generator -> `Sample`: reads, decodes, replaces bad records, crops."""

    def __init__(
        self, parts: tuple[Part, ...], cfg: DataConfig, flip: bool, replace: bool = True
    ) -> None:
        self._parts, self._cfg, self._flip, self._replace = parts, cfg, flip, replace
        self._cache = _Cache(cfg.cache_mb, sum(len(part.source) for part in parts))

    def blank(self) -> Sample:
        """A black image."""
        side = self._cfg.resolution
        return Sample({"image": np.zeros((side, side, 3), np.uint8)}, 0, -1, 0)

    def __call__(self, element: tuple[int, int], rng: np.random.Generator) -> Sample:
        """The crop of a record, or of the next one that is intact."""
        part, first = element
        source = self._parts[part].source
        bad: list[tuple[str, str, str]] = []
        for attempt in range(min(MAX_TRIES, len(source))):
            index = (first + attempt) % len(source)
            try:
                pixels, label, name = self._decoded(part, index)
                image = self._transform(pixels, rng, f"{self._parts[part].name}[{index}]")
            except BadRecord as error:
                bad.append((error.name, error.reason.value, error.detail))
                if self._replace:
                    continue
                return self.blank()._replace(read=1, bad=tuple(bad), name=error.name)
            return Sample({"image": image}, label, part, attempt + 1, tuple(bad), name)
        listed = "\n  ".join(f"{name}: {reason} {detail}" for name, reason, detail in bad[:5])
        raise UserError(
            f"{len(bad)} records in a row of {self._parts[part].name!r} cannot be used. The "
            "first:\n"
            f"  {listed}\nCheck the source: python -m dcae_jax data-check."
        )

    def _decoded(self, part: int, index: int) -> tuple[Pixels, int, str]:
        cached = self._cache.get((part, index))
        if cached is not None:
            return cached
        record = read(self._parts[part], index)
        pixels = record.image
        if isinstance(pixels, bytes):
            pixels = transforms.decode(pixels, record.name)
        self._cache.put((part, index), (pixels, record.label, record.name))
        return pixels, record.label, record.name

    def _transform(
        self, pixels: Pixels, rng: np.random.Generator, name: str
    ) -> UInt8[np.ndarray, "size size 3"]:
        cfg = self._cfg
        match cfg.transform:
            case Transform.center_crop:
                image = transforms.center_crop(pixels, cfg.resolution)
            case Transform.random_crop:
                image = transforms.random_crop(pixels, cfg.resolution, rng, name)
            case Transform.random_resized_crop:
                image = transforms.random_resized_crop(
                    pixels, cfg.resolution, rng, area=cfg.area, aspect=cfg.aspect
                )
        return transforms.hflip(image, rng) if self._flip else image


class _Cache:
    """Decoded images of small sources, kept while there is room; never evicts, never pickled."""

    def __init__(self, megabytes: int, records: int) -> None:
        self._arguments = (megabytes, records)
        self._room = megabytes * 1024**2 if records * _SMALLEST_CACHED <= megabytes * 1024**2 else 0
        self._kept: dict[tuple[int, int], tuple[Pixels, int, str]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Cache, self._arguments

    def get(self, key: tuple[int, int]) -> tuple[Pixels, int, str] | None:
        """The decoded record, if it is kept."""
        return self._kept.get(key)

    def put(self, key: tuple[int, int], value: tuple[Pixels, int, str]) -> None:
        """Keeps a decoded record while there is room."""
        with self._lock:
            if key not in self._kept and value[0].nbytes <= self._room:
                self._room -= value[0].nbytes
                self._kept[key] = value


def check_request(problems: list[str], batch: int, shard: Shard) -> None:
    """UserError with these problems of a config and those of the batch and its shards."""
    problems = list(problems)
    if batch < 1:
        problems.append(f"batch={batch} must be at least 1")
    if not 0 <= shard.index < shard.count:
        problems.append(f"shard {shard.index} of {shard.count} does not exist")
    elif batch % shard.count:
        low = batch // shard.count * shard.count
        nearest = [str(size) for size in (low, low + shard.count) if size]
        problems.append(
            f"batch {batch} is not divisible by the {shard.count} processes that load it; nearest: "
            f"{' or '.join(nearest)}"
        )
    if problems:
        raise UserError("\n".join(problems))


def open_source(cfg: DataConfig) -> sources.Source:
    """Opens the source, once per process: long folders are not listed at each evaluation."""
    key = (repr(cfg.source), cfg.split, 0)
    if key not in _OPEN:
        _OPEN[key] = cfg.source.build(cfg.split)
    return _OPEN[key]


def _parts(cfg: DataConfig) -> tuple[Part, ...]:
    """The members of the source without the records below their minimum size."""
    key = (repr(cfg.source), cfg.split, 1 + cfg.min_size)
    if key not in _OPEN:
        _OPEN[key] = tuple(_large_enough(part, cfg) for part in sources.parts_of(open_source(cfg)))
    return _OPEN[key]


def _large_enough(part: Part, cfg: DataConfig) -> Part:
    least = max(part.min_size, cfg.min_size)
    if least == 0:
        return part
    shorter = sources.sizes(part.source).min(axis=1)
    kept = np.flatnonzero(
        (shorter >= least) | (shorter == 0)
    )  # 0: unreadable, counted as bad when met
    if not len(kept):
        raise UserError(
            f"none of the {len(shorter)} records of {part.name!r} has a shorter side of {least} px "
            f"(data.min_size or the mixture's min_size); the largest has {shorter.max()}."
        )
    if len(kept) == len(shorter):
        return part
    logging.info("%s: %d of %d records reach %d px", part.name, len(kept), len(shorter), least)
    return part._replace(source=_Subset(part.source, kept))


def _training_order(parts: tuple[Part, ...], seed: int) -> grain.MapDataset:
    """Position -> (part, index), endless and different in every epoch."""
    orders = [
        _shuffled(len(part.source), _derive(seed, f"order {i}")) for i, part in enumerate(parts)
    ]
    if len(parts) == 1:
        return orders[0].map(functools.partial(_in_part, 0))
    slots = _shuffled(BLOCK, _derive(seed, "mixture"))
    quotas = _shares([part.weight for part in parts], BLOCK)
    if quotas.min() < 1:
        rare = parts[int(quotas.argmin())]
        raise UserError(
            f"the mixture gives {rare.name!r} (weight {rare.weight:g}) fewer than one of {BLOCK} "
            "positions; raise its weight or leave it out"
        )
    return _Mixture(slots, orders, quotas)


def _shuffled(n: int, seed: int) -> grain.MapDataset:
    """0..n-1 in an order of its own for each epoch, endless, with random access."""
    if n <= SMALL_SHUFFLE:
        return _SmallShuffle(n, seed)
    return grain.MapDataset.range(n).shuffle(seed=seed).repeat()


def _in_part(part: int, index: int) -> tuple[int, int]:
    return part, index


def evaluation_order(
    parts: tuple[Part, ...], n: int, again: bool, split: str
) -> list[tuple[int, int]]:
    """n elements spread evenly over the parts; records more than once only if `again`."""
    if n < 1:
        raise UserError(f"an evaluation on n={n} images; give at least 1")
    order: list[tuple[int, int]] = []
    counts = _shares([part.weight for part in parts], n).tolist()
    for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
        length = len(part.source)
        if count > length and not again:
            raise UserError(
                f"an evaluation on {count} images of {part.name!r}, split {split!r}, which has "
                f"{length}; ask for at most {length}, or use a random crop (several crops of "
                "each image)"
            )
        spread = [k * length // count if count <= length else k % length for k in range(count)]
        order += [(i, index) for index in spread]
    return order


def _shares(weights: list[float], total: int) -> np.ndarray:
    """Whole numbers in proportion to `weights` with sum `total`, by largest remainders."""
    exact = np.array(weights, np.float64) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    for index in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    return counts


def _derive(seed: int, purpose: str) -> int:
    """A 32-bit seed for each purpose, never near another: Grain's shuffle adds the epoch to it."""
    words = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)
    return int(words[0])


def read(part: Part, index: int) -> sources.Record:
    """Reads one record; storage may fail for a moment, so it is asked three times."""
    for attempt in range(_READ_TRIES):
        try:
            return part.source[index]
        except FileNotFoundError as error:
            raise BadRecord(f"{part.name}[{index}]", Reason.unreadable, str(error)) from error
        except (OSError, RuntimeError, ValueError) as error:
            failure = error
            time.sleep(0.2 * 4**attempt if attempt + 1 < _READ_TRIES else 0)
    raise BadRecord(f"{part.name}[{index}]", Reason.unreadable, str(failure)) from failure


def _collate(samples: list[Sample], masked: bool = False, named: bool = False) -> dict[str, Any]:
    """Stacks rows; what happened while reading travels along as JSON, through processes too."""
    bad = [event for sample in samples for event in sample.bad]
    batch: dict[str, Any] = {
        **{k: np.stack([sample.arrays[k] for sample in samples]) for k in samples[0].arrays},
        "label": np.array([sample.label for sample in samples], np.int32),
        "part": np.array([sample.part for sample in samples], np.int32),
        "events": json.dumps({"read": sum(sample.read for sample in samples), "bad": bad}),
    }
    if masked:
        batch["mask"] = (batch["part"] >= 0).astype(np.float32)
    if named:
        whys = (": ".join(filter(None, s.bad[0][1:])) if s.bad else "" for s in samples)
        batch["names"] = json.dumps([(s.name, why) for s, why in zip(samples, whys, strict=True)])
    return batch


def _prefetched(steps: grain.MapDataset, loading: Loading) -> grain.IterDataset:
    options = grain.ReadOptions(loading.threads, max(loading.prefetch, loading.threads))
    dataset = steps.to_iter_dataset(options)
    if loading.workers:
        ahead = max(1, loading.prefetch // loading.workers)
        multi = grain.MultiprocessingOptions(
            num_workers=loading.workers, per_worker_buffer_size=ahead
        )
        dataset = dataset.mp_prefetch(multi, worker_init_fn=_initialize_worker)
    return dataset


def _start_threads(dataset: grain.IterDataset) -> futures.Future:
    iterator = iter(dataset)
    iterator.start_prefetch()
    started: futures.Future = futures.Future()
    started.set_result((iterator, None))
    return started


def _start_workers(dataset: grain.IterDataset) -> futures.Future:
    """Starts the worker processes with SIGTERM blocked from their first instruction on.

    A signal to the process group must not kill a loader while the run still saves its checkpoint.
    Children inherit the signal mask of the thread that starts them, so a thread of its own blocks
    it and the main thread keeps reacting. Python's resource tracker would unblock it on its own
    start: it is started before.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain hands its flags to the workers, parsed
    resource_tracker.ensure_running()
    started: futures.Future = futures.Future()

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        iterator = iter(dataset)
        try:
            started.set_result((iterator, next(iterator)))
        except BaseException as error:
            iterator.close()
            started.set_exception(error)

    threading.Thread(target=start, name="start-data-workers", daemon=True).start()
    return started


def _initialize_worker(index: int, count: int) -> None:
    """In a worker process: no accelerator, no reaction to signals meant for the run, no orphans."""
    del index, count
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax  # Grain has imported it already; no backend is started yet

    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_exit_with_parent, name="watch-parent", daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this worker when the run was killed without a chance to join it."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
