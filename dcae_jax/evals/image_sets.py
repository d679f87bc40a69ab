"""Sets of square images of one size, read by position, for scores that count each image exactly.

A bad image is never replaced: its row is masked out and says why.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, Int64, UInt8

from dcae_jax.data import pipeline, sources
from dcae_jax.data.pipeline import DataConfig, Positions
from dcae_jax.evals.npz import ImagesNpz


class Batch(NamedTuple):
    """Some images; rows without one are black and not `real`."""

    image: UInt8[np.ndarray, "b h w 3"]
    real: Bool[np.ndarray, " b"]
    names: list[str]
    bad: list[str]  # why the image of a row cannot be used; "" where it can, or where there is none


@runtime_checkable
class ImageSet(Protocol):
    """n images of one size."""

    name: str  # for people
    digest: str  # of which images these are: of names and sizes of files, not of their pixels
    listing: str  # of which file is at which position; "" where the digest is of what is in them
    dates: str  # of when its files were written; "" where the digest is of what is in them
    n: int
    side: int  # height and width in pixels

    def batches(
        self, wanted: Int64[np.ndarray, " k"], batch: int
    ) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """Images at these positions, in this order; -1 is a row without one."""
        ...


class Records:
    """Centre crops of a data set: all of its records, n spread over it, or some of one source."""

    def __init__(
        self, data: DataConfig, name: str, n: int | None = None,
        picked: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self._data = data
        self._order = _order(data, n, picked)
        self.name, self.n, self.side = name, len(self._order), data.resolution
        self.digest, self.dates = data.fingerprint(), sources.dates(pipeline.open_source(data))
        self.listing = sources.digest(pipeline.listing(data), repr(picked))

    @contextlib.contextmanager
    def batches(self, wanted: Int64[np.ndarray, " k"], batch: int) -> Iterator[Iterator[Batch]]:
        """See ImageSet."""
        positions = Positions(self._order, wanted)
        with pipeline.picked_batches(self._data, positions, batch=batch) as found:
            yield (_batch(row) for row in found)


def _order(data: DataConfig, n: int | None, picked: Sequence[int] | None) -> grain.MapDataset:
    if picked is not None:
        return grain.MapDataset.source([(0, index) for index in picked])
    return pipeline.every_record(data) if n is None else pipeline.spread_records(data, n)


def _batch(row: dict[str, np.ndarray]) -> Batch:
    names, whys = zip(*json.loads(row["names"]), strict=True)
    return Batch(row["image"], row["mask"] > 0, list(names), list(whys))


class NpzImages:
    """The images of an npz, the first n of them."""

    listing = dates = ""

    def __init__(
        self, images: ImagesNpz, name: str, digest: str, side: int, n: int | None = None
    ) -> None:
        self._images, self._file = images, images.path.name
        self.name, self.digest, self.side, self.n = name, digest, side, n or images.n

    @contextlib.contextmanager
    def batches(self, wanted: Int64[np.ndarray, " k"], batch: int) -> Iterator[Iterator[Batch]]:
        """See ImageSet; what is wanted is in ascending order."""
        try:
            rows = wanted.reshape(-1, batch)
            yield (self._batch(positions) for positions in rows)
        finally:
            self._images.close()

    def _batch(self, positions: Int64[np.ndarray, " b"]) -> Batch:
        real = positions >= 0
        image = np.zeros((len(positions), self.side, self.side, 3), np.uint8)
        first, last = positions[real].min(), positions[real].max()
        image[real] = self._images.read(int(first), int(last) + 1)
        names = [f"{self._file}[{i}]" if i >= 0 else "" for i in positions]
        return Batch(image, real, names, [""] * len(positions))
