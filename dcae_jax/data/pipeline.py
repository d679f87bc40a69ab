"""Batches as a pure function of (seed, step).

Row r of step k is position p = k * batch + r on any number of processes. A position says which
record is read (a shuffle that is reseeded each epoch, or a mixture's plan) and which random numbers
its crop draws; nothing else is state, so seeking costs nothing and no iterator state is ever saved.
A Grain MapDataset:

    order -> read, decode, crop with the generator of (seed, position) -> contiguous rows of this
    process -> batch -> skip to the first step -> threads or worker processes
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
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags, logging
from jaxtyping import UInt8

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


class BatchIterator:
    """Batches as dictionaries, the statistics of what was read, and `close()`.

    The counts travel with the batches, so they cover exactly the batches that were handed out, in
    any number of threads and worker processes. They are this process's own: with several processes
    each counts the rows that it loaded.
    """

    def __init__(
        self, dataset: grain.IterDataset, parts: tuple[Part, ...], cfg: DataConfig, workers: int
    ) -> None:
        self._parts = parts
        self._judge_after = min(JUDGE_AFTER, sum(len(part.source) for part in parts))
        self._limit = cfg.max_bad_fraction
        self._read, self._rows = 0, 0
        self._per_part: Counter[str] = Counter({part.name: 0 for part in parts})
        self._reasons: Counter[str] = Counter()
        self._named: dict[str, str] = {}
        self._closed = False
        self._start = _start_workers(dataset) if workers else _start_threads(dataset)
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
                logging.warning("bad record replaced: %s: %s", name, self._named[name])

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
    _check(cfg, batch, shard)
    if seed < 0 or start_step < 0:
        raise UserError(f"seed={seed} and start_step={start_step} must not be negative")
    parts = _parts(cfg)
    order = _training_order(parts, seed)
    sample = _Sampler(parts, cfg, cfg.flip)
    rows = _Rows(order.random_map(sample, seed=_derive(seed, "crop")), batch, shard)
    steps = rows.batch(batch // shard.count, batch_fn=_collate)[start_step:]
    return BatchIterator(_prefetched(steps, cfg, cfg.workers), parts, cfg, cfg.workers)


def eval_batches(cfg: DataConfig, *, batch: int, n: int, shard: Shard = WHOLE) -> BatchIterator:
    """Exactly `n` images in ceil(n / batch) batches with {"mask": float32[b]}, 1 for real rows.

    The rows behind the n-th are zeros. The n images are spread evenly over the split (the first n
    would be the first classes of a sorted set), always the same ones with the same crops, never
    flipped. More images than the split has are several crops of each if the crop is random, else a
    `UserError`. Worker processes are not used: an evaluation is too short for their start.
    """
    _check(cfg, batch, shard)
    parts = _parts(cfg)
    order = grain.MapDataset.source(_evaluation_order(parts, cfg, n))
    sampled = order.random_map(_Sampler(parts, cfg, flip=False), seed=EVAL_SEED)
    rows = _Rows(sampled, batch, shard, blank=cfg.resolution)
    steps = rows.batch(batch // shard.count, batch_fn=functools.partial(_collate, masked=True))
    return BatchIterator(_prefetched(steps, cfg, 0), parts, cfg, 0)


def fingerprint(cfg: DataConfig) -> str:
    """Digest of which records are used: source, split, minimum size. The same on every machine."""
    source = open_source(cfg)
    return sources.digest(source.fingerprint(), cfg.split, str(cfg.min_size))


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


class _Rows(grain.MapDataset):
    """This shard's contiguous rows of each global batch; behind a finite parent's end, blank."""

    def __init__(self, parent: grain.MapDataset, batch: int, shard: Shard, blank: int = 0) -> None:
        super().__init__(parent)
        self._batch, self._blank = batch, blank
        self._rows = batch // shard.count
        self._first = shard.index * self._rows
        self._steps = -(-len(parent) // batch) if blank else min(len(parent), _ENDLESS) // batch

    def __len__(self) -> int:
        return self._steps * self._rows

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._rows)
        position = step * self._batch + self._first + row
        if position >= len(self.parents[0]):
            return _blank(self._blank)
        return self.parents[0][position]


class _Sample(NamedTuple):
    """One row on its way into a batch, with what happened while it was read."""

    image: np.ndarray
    label: int
    part: int  # -1: a blank row
    read: int
    bad: tuple[tuple[str, str, str], ...]


class _Sampler:
    """(part, index), generator -> `_Sample`: reads, decodes, replaces bad records, crops."""

    def __init__(self, parts: tuple[Part, ...], cfg: DataConfig, flip: bool) -> None:
        self._parts, self._cfg, self._flip = parts, cfg, flip
        self._cache = _Cache(cfg.cache_mb, sum(len(part.source) for part in parts))

    def __call__(self, element: tuple[int, int], rng: np.random.Generator) -> _Sample:
        part, first = element
        source = self._parts[part].source
        bad: list[tuple[str, str, str]] = []
        for attempt in range(min(MAX_TRIES, len(source))):
            index = (first + attempt) % len(source)
            try:
                pixels, label = self._decoded(part, index)
                image = self._transform(pixels, rng, f"{self._parts[part].name}[{index}]")
            except BadRecord as error:
                bad.append((error.name, error.reason.value, error.detail))
                continue
            return _Sample(image, label, part, attempt + 1, tuple(bad))
        listed = "\n  ".join(f"{name}: {reason} {detail}" for name, reason, detail in bad[:5])
        raise UserError(
            f"{len(bad)} records in a row of {self._parts[part].name!r} cannot be used. The "
            "first:\n"
            f"  {listed}\nCheck the source: python -m dcae_jax data-check."
        )

    def _decoded(self, part: int, index: int) -> tuple[Pixels, int]:
        cached = self._cache.get((part, index))
        if cached is not None:
            return cached
        record = read(self._parts[part], index)
        pixels = record.image
        if isinstance(pixels, bytes):
            pixels = transforms.decode(pixels, record.name)
        self._cache.put((part, index), (pixels, record.label))
        return pixels, record.label

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
        self._kept: dict[tuple[int, int], tuple[Pixels, int]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Cache, self._arguments

    def get(self, key: tuple[int, int]) -> tuple[Pixels, int] | None:
        """The decoded record, if it is kept."""
        return self._kept.get(key)

    def put(self, key: tuple[int, int], value: tuple[Pixels, int]) -> None:
        """Keeps a decoded record while there is room."""
        with self._lock:
            if key not in self._kept and value[0].nbytes <= self._room:
                self._room -= value[0].nbytes
                self._kept[key] = value


def _check(cfg: DataConfig, batch: int, shard: Shard) -> None:
    problems = cfg.problems()
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


def _evaluation_order(parts: tuple[Part, ...], cfg: DataConfig, n: int) -> list[tuple[int, int]]:
    if n < 1:
        raise UserError(f"an evaluation on n={n} images; give at least 1")
    order: list[tuple[int, int]] = []
    counts = _shares([part.weight for part in parts], n).tolist()
    for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
        length = len(part.source)
        if count > length and cfg.transform is Transform.center_crop:
            raise UserError(
                f"an evaluation on {count} images of {part.name!r}, split {cfg.split!r}, which has "
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


def _blank(resolution: int) -> _Sample:
    return _Sample(np.zeros((resolution, resolution, 3), np.uint8), 0, -1, 0, ())


def _collate(samples: list[_Sample], masked: bool = False) -> dict[str, Any]:
    """Stacks rows; what happened while reading travels along as JSON, through processes too."""
    bad = [event for sample in samples for event in sample.bad]
    batch: dict[str, Any] = {
        "image": np.stack([sample.image for sample in samples]),
        "label": np.array([sample.label for sample in samples], np.int32),
        "part": np.array([sample.part for sample in samples], np.int32),
        "events": json.dumps({"read": sum(sample.read for sample in samples), "bad": bad}),
    }
    if masked:
        batch["mask"] = (batch["part"] >= 0).astype(np.float32)
    return batch


def _prefetched(steps: grain.MapDataset, cfg: DataConfig, workers: int) -> grain.IterDataset:
    options = grain.ReadOptions(cfg.threads, max(cfg.prefetch, cfg.threads))
    dataset = steps.to_iter_dataset(options)
    if workers:
        ahead = max(1, cfg.prefetch // workers)
        multi = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
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
