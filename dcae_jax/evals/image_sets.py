"""Sets of square images of one size, read by position, for scores that count each image exactly.

A bad image is never replaced: its row is masked out and says why.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import grain
import numpy as np
from jaxtyping import Bool, Int64, UInt8

from dcae_jax.data import pipeline
from dcae_jax.data.pipeline import DataConfig, Positions


class Batch(NamedTuple):
    """Some images; rows without one are black and not `real`."""

    image: UInt8[np.ndarray, "b h w 3"]
    real: Bool[np.ndarray, " b"]
    names: list[str]
    bad: list[str]  # why the image of a row cannot be used; "" where it can, or where there is none


class ImageSet(Protocol):
    """n images of one size."""

    name: str  # for people
    digest: str  # of which images these are
    n: int
    side: int  # height and width in pixels

    def batches(
        self, wanted: Int64[np.ndarray, " k"], batch: int
    ) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """Images at these positions, in this order; -1 is a row without one."""
        ...


class Records:
    """Centre crops of a data set: all of its records, or n spread over it."""

    def __init__(self, data: DataConfig, name: str, n: int | None = None) -> None:
        self._data = data
        self._order: grain.MapDataset = (
            pipeline.every_record(data) if n is None else pipeline.spread_records(data, n)
        )
        self.name, self.n, self.side = name, len(self._order), data.resolution
        self.digest = data.fingerprint()

    @contextlib.contextmanager
    def batches(self, wanted: Int64[np.ndarray, " k"], batch: int) -> Iterator[Iterator[Batch]]:
        """See ImageSet."""
        positions = Positions(self._order, wanted)
        with pipeline.picked_batches(self._data, positions, batch=batch) as found:
            yield (_batch(row) for row in found)


def _batch(row: dict[str, np.ndarray]) -> Batch:
    names, whys = zip(*json.loads(row["names"]), strict=True)
    return Batch(row["image"], row["mask"] > 0, list(names), list(whys))
