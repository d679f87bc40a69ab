"""Look at every record of a config's data: counts, sizes, bad files, labels, read speed.

  python -m dcae_jax data-check --config=configs/folder.py:phase1 [--config.data.source.path=...]

Every record is decoded once. Exit code 1 when more than data.max_bad_fraction of them are bad.
"""

import collections
import hashlib
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from dcae_jax import flags as config_flag
from dcae_jax.data import pipeline, sources, transforms
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.data.transforms import BadRecord, Reason

_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 1 << 30)
_WARM_UP = 5
_WINDOW = 4096  # records submitted at once, so that a million futures don't lie around


class Seen(NamedTuple):
    """What one look at a record gave."""

    name: str
    height: int
    width: int
    label: int
    digest: str
    bad: str


@dataclass(slots=True)
class Check:
    """The findings on one source."""

    name: str
    records: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    labels: collections.Counter = field(default_factory=collections.Counter)
    bad: list[tuple[str, str]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)

    def add(self, seen: Seen) -> None:
        """Counts one record."""
        self.records += 1
        if seen.bad:
            self.bad.append((seen.name, seen.bad))
            return
        self.sizes.append((seen.height, seen.width))
        self.labels[seen.label] += 1
        first = self.digests.setdefault(seen.digest, seen.name) if seen.digest else seen.name
        if first != seen.name:
            self.duplicates.append((seen.name, first))


def main(argv: list[str]) -> int:
    """Prints the findings; 1 when the share of bad records is above the limit."""
    config = config_flag.define_config()
    limit = flags.DEFINE_integer("limit", 0, "look at so many records only, spread evenly; 0: all")
    duplicates = flags.DEFINE_bool("duplicates", False, "also name records with equal pixels")
    seconds = flags.DEFINE_float("seconds", 5.0, "how long the read speed is measured")
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{flags.FLAGS.module_help(__name__)}")
        return 0
    config_flag.parse(["python -m dcae_jax data-check", *argv])
    cfg = config.value
    checks = check(cfg.data, limit=limit.value, duplicates=duplicates.value)
    for found in checks:
        print(table(found, cfg.data))
    records, bad = sum(c.records for c in checks), sum(len(c.bad) for c in checks)
    if bad > cfg.data.max_bad_fraction * records:
        print(
            f"\n{bad} of {records} records are bad ({bad / records:.2%}), more than "
            "data.max_bad_fraction="
            f"{cfg.data.max_bad_fraction:g}",
            file=sys.stderr,
        )
        return 1
    print(speed(cfg.data, cfg.batch, cfg.seed, seconds.value))
    return 0


def check(cfg: DataConfig, *, limit: int = 0, duplicates: bool = False) -> list[Check]:
    """Decodes every record (or `limit` of them) of every member of the source."""
    parts = sources.parts_of(pipeline.open_source(cfg))
    return [_check_part(part, cfg, limit, duplicates) for part in parts]


def table(found: Check, cfg: DataConfig) -> str:
    """The findings on one source as readable lines."""
    lines = [f"{found.name}, split {cfg.split!r}: {found.records} records, {len(found.bad)} bad"]
    if found.sizes:
        lines += _size_lines(np.array(found.sizes), cfg)
        lines += _label_lines(found.labels)
    if found.duplicates:
        lines.append(f"  duplicates    {len(found.duplicates)} records with the pixels of another:")
        lines += [f"    {name} = {first}" for name, first in found.duplicates[:10]]
    for reason, count in collections.Counter(why.split(" (")[0] for _, why in found.bad).items():
        lines.append(f"  bad           {count} x {reason}")
    lines += [f"    {name}: {why}" for name, why in found.bad[:20]]
    if len(found.bad) > 20:
        lines.append(f"    ... and {len(found.bad) - 20} more")
    return "\n".join(lines)


def speed(cfg: DataConfig, batch: int, seed: int, seconds: float) -> str:
    """Images per second of the training pipeline itself, as this config sets it up."""
    with cfg.batches(batch=batch, seed=seed) as batches:
        begin = time.perf_counter()
        next(batches)
        first = time.perf_counter() - begin
        for _ in range(_WARM_UP):
            next(batches)
        begin, images = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            images += len(next(batches)["label"])
        rate = images / (time.perf_counter() - begin)
    return (
        f"\nread speed    {rate:.0f} images/s ({cfg.transform.value} to {cfg.resolution} px, "
        f"batch {batch}, "
        f"{cfg.threads} threads, {cfg.workers} workers); first batch after {first:.2f} s"
    )


def _check_part(part: sources.Part, cfg: DataConfig, limit: int, duplicates: bool) -> Check:
    length = len(part.source)
    count = min(limit or length, length)
    indices = [i * length // count for i in range(count)]
    needed = cfg.resolution if cfg.transform is pipeline.Transform.random_crop else 0
    least = max(part.min_size, cfg.min_size)
    found = Check(part.name)
    for seen in tqdm(_look(part, indices, cfg.threads, duplicates), part.name, count, delay=1):
        too_small = not seen.bad and least <= min(seen.height, seen.width) < needed
        bad = f"{Reason.too_small.value} ({seen.width}x{seen.height})" if too_small else seen.bad
        found.add(seen._replace(bad=bad))
    return found


def _look(part: sources.Part, indices: list[int], threads: int, hashed: bool) -> Iterator[Seen]:
    with futures.ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), _WINDOW):
            window = indices[start : start + _WINDOW]
            yield from pool.map(lambda index: _look_at(part, index, hashed), window)


def _look_at(part: sources.Part, index: int, hashed: bool) -> Seen:
    name = f"{part.name}[{index}]"
    try:
        record = pipeline.read(part, index)
        name = record.name
        pixels = record.image
        if isinstance(pixels, bytes):
            pixels = transforms.decode(pixels, name)
    except BadRecord as error:
        detail = f" ({error.detail})" if error.detail else ""
        return Seen(error.name or name, 0, 0, 0, "", error.reason.value + detail)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest() if hashed else ""
    return Seen(name, pixels.shape[0], pixels.shape[1], record.label, digest, "")


def _size_lines(sizes: np.ndarray, cfg: DataConfig) -> list[str]:
    """Quantiles of both sides, a histogram of the shorter one, and who falls below min_size."""
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    lines = [
        f"  {name:<13} min {side.min()}, median {int(np.median(side))}, max {side.max()} px"
        for name, side in (("shorter side", shorter), ("longer side", longer))
    ]
    counts, _ = np.histogram(shorter, _EDGES)
    for low, high, count in zip(_EDGES, _EDGES[1:], counts, strict=False):
        label = f"{low}..{high - 1}" if high < _EDGES[-1] else f"{low}.."
        if count:
            lines.append(f"    {label:>11} {count:>9} {'#' * max(1, int(40 * count / len(sizes)))}")
    if cfg.min_size:
        lines.append(
            f"  left out      {int((shorter < cfg.min_size).sum())} below "
            f"data.min_size={cfg.min_size}"
        )
    return lines


def _label_lines(labels: collections.Counter) -> list[str]:
    counts = sorted(labels.values())
    return [
        f"  labels        {len(labels)} classes ({min(labels)}..{max(labels)}), records per "
        "class: min "
        f"{counts[0]}, median {counts[len(counts) // 2]}, max {counts[-1]}"
    ]
