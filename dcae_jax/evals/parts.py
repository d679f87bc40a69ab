"""Sets of images in parts, each a file of what was computed of its images.

A part is whole or absent, so a killed command goes on where it was, and processes share the parts.
Its size is a constant: what is in a part depends on no batch size and no number of devices.  It
holds a digest of each image's pixels too: names and sizes of files do not say what is in them.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Int64, UInt8

from dcae_jax import outputs
from dcae_jax.errors import UserError
from dcae_jax.evals.image_sets import Batch, ImageSet

PART = 512  # images in a part
_FOLDER = "parts"
_BAD = "bad"  # the JSON of [name, why] of a part's images that could not be used
_PIXELS = "pixels"  # digests of the images of each row, one of each set
_DIGEST = 16  # bytes of one
_NAMED = 20  # bad images that a message names

# What the devices make of a batch of each set: arrays of one row an image.  "output" (uint8) is
# kept of some images only; where "finite" is false the evaluation stops.
Compute = Callable[[list[Batch]], dict[str, Any]]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is computed of a set of images, or of sets whose images belong together in pairs."""

    name: str  # of its files
    sets: tuple[ImageSet, ...]  # images at one position of each are one row
    batch: int  # rows at once, over the devices of a process
    compute: Callable[[], Compute]  # makes the programs, once there is something to do
    numbers: int  # float32 that are kept of each image
    pictures: tuple[int, ...] = ()  # positions whose images are kept

    @property
    def n(self) -> int:
        """Images."""
        return self.sets[0].n

    def span(self, part: int) -> range:
        """The positions of a part."""
        return range(part * PART, min((part + 1) * PART, self.n))

    def parts(self) -> int:
        """How many there are."""
        return -(-self.n // PART)


class Stored(NamedTuple):
    """The finished parts of some work, read one after the other."""

    out: epath.Path
    work: Work

    def stream(self, name: str) -> Iterator[np.ndarray]:
        """An array of each part, in the order of the images."""
        for part in range(self.work.parts()):
            with _opened(self.out, self.work, part) as found:
                if name in found:
                    yield found[name]

    def whole(self, name: str) -> np.ndarray:
        """The same of all images."""
        return np.concatenate(list(self.stream(name)))

    def bad(self) -> list[tuple[str, str]]:
        """(name, why) of the images that could not be used."""
        found = [json.loads(str(text)) for text in self.stream(_BAD)]
        return [(name, why) for rows in found for name, why in rows]

    def digest(self, which: int) -> str:
        """Of the pixels of all images of one of the work's sets that could be used, in order."""
        return _digest(self.whole(_PIXELS)[:, which])

    def pictures(self) -> tuple[list[str], list[np.ndarray]]:
        """Names of the kept images that could be used, and of each its pictures: u8[k, h, w, 3]."""
        names = [name for names in self.stream("picture_names") for name in names.tolist()]
        return names, [images for some in self.stream("pictures") for images in some]


def path(out: epath.Path, work: Work, part: int) -> epath.Path:
    """The file of a part: named by its first image."""
    return out / _FOLDER / f"{work.name}-{work.span(part).start:07d}.npz"


def _opened(out: epath.Path, work: Work, part: int) -> Any:
    file = path(out, work, part)
    return np.load(io.BytesIO(file.read_bytes()) if "://" in str(out) else str(file))


def there(out: epath.Path, work: Work) -> list[bool]:
    """Which parts are there; one that a power cut has shortened is not."""
    folder = out / _FOLDER
    present = {p.name for p in folder.iterdir()} if folder.is_dir() else set()

    def whole(part: int) -> bool:
        if path(out, work, part).name not in present:
            return False
        try:
            with _opened(out, work, part) as found:
                return _PIXELS in found  # or of a version that did not look at them
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return False

    return [whole(part) for part in range(work.parts())]


def any_there(out: epath.Path) -> bool:
    """Whether there is a part of any work."""
    folder = out / _FOLDER
    return folder.is_dir() and any(p.suffix == ".npz" for p in folder.iterdir())


def clear_leftovers(out: epath.Path) -> None:
    """Removes what a killed writer has left."""
    for file in outputs.leftovers(out / _FOLDER):
        file.unlink(missing_ok=True)


def remove(out: epath.Path) -> None:
    """All parts, once nothing needs them."""
    if (out / _FOLDER).is_dir():
        (out / _FOLDER).rmtree()


def space(work: Work, missing: int) -> int:
    """Bytes that so many missing parts take, rather more than less."""
    side = work.sets[0].side
    return missing * PART * (4 * work.numbers + 64) + 9 * side * side * len(work.pictures)


# ------------------------------------------------------------------------------------------ making


def compute(
    out: epath.Path, work: Work, mine: list[int], skip_bad: bool, progress: Callable[[int], None]
) -> None:
    """Makes some parts, one after the other; `progress` is told of images.

    UserError after a part with images that cannot be used, unless `skip_bad`; and for an output
    that is not finite.
    """
    if not mine:
        return
    run = work.compute()
    spans = [work.span(part) for part in mine]
    wanted = np.concatenate([_padded(span, work.batch) for span in spans])
    with _read(work, wanted) as rows:
        found = _one_ahead((batches, run(batches)) for batches in rows)
        for part, span in zip(mine, spans, strict=True):
            done = []
            for first in range(span.start, span.stop, work.batch):
                real = range(first, min(first + work.batch, span.stop))
                done.append(_on_host(work, real, *next(found)))
                progress(len(real))
            _write(out, work, part, done)
            if not skip_bad:
                refuse_bad([item for rows in done for item in rows.bad])


@contextlib.contextmanager
def _read(work: Work, wanted: Int64[np.ndarray, " k"]) -> Iterator[Iterator[list[Batch]]]:
    """Batches of all sets together."""
    with contextlib.ExitStack() as opened:
        open_sets = [opened.enter_context(s.batches(wanted, work.batch)) for s in work.sets]
        yield (list(together) for together in zip(*open_sets, strict=True))


def _padded(span: range, batch: int) -> Int64[np.ndarray, " k"]:
    """Whole batches: the bits of a part do not depend on what is computed before it."""
    found = np.full(-(-len(span) // batch) * batch, -1)
    found[: len(span)] = span
    return found


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The items, each after the next was begun: devices work while the host stores."""
    return (a for a, b in itertools.pairwise(itertools.chain(items, [None])))


class _Rows(NamedTuple):
    """A batch on the host, without its blank and bad rows."""

    arrays: Arrays
    bad: list[tuple[str, str]]
    names: list[str]  # of the pictures
    pictures: list[UInt8[np.ndarray, "k h w 3"]]


def _on_host(work: Work, span: range, batches: list[Batch], found: dict[str, Any]) -> _Rows:
    output = found.pop("output", None)
    pixels = _pixels(batches)  # while the devices compute
    arrays = jax.device_get(found)
    real = _real(batches)
    names = batches[0].names
    if "finite" in arrays:
        _check_finite(names, arrays.pop("finite") | ~real)
    shown = [i - span.start for i in work.pictures if i in span and real[i - span.start]]
    return _Rows(
        {name: values[real] for name, values in arrays.items()} | {_PIXELS: pixels}, _bad(batches),
        [names[i] for i in shown], _pictures(batches, output, shown),
    )  # fmt: skip


def _real(batches: list[Batch]) -> Bool[np.ndarray, " b"]:
    """Rows with an image of each set."""
    return np.logical_and.reduce([b.real for b in batches])


def _bad(batches: list[Batch]) -> list[tuple[str, str]]:
    """(name, why) of each row with an image that cannot be used."""
    rows = zip(*(zip(b.names, b.bad, strict=True) for b in batches), strict=True)
    whys = ([item for item in row if item[1]] for row in rows)
    return [found[0] for found in whys if found]


def _pictures(
    batches: list[Batch], output: jax.Array | None, shown: list[int]
) -> list[UInt8[np.ndarray, "k h w 3"]]:
    if not shown:
        return []
    kept = [b.image for b in batches] + ([] if output is None else [np.asarray(output)])
    return [np.stack([images[i] for images in kept]) for i in shown]


def _check_finite(names: list[str], finite: Bool[np.ndarray, " b"]) -> None:
    if not finite.all():
        bad = [names[i] for i in np.flatnonzero(~finite)]
        raise UserError(
            f"what the network makes of {bad[0]}"
            + (f" and {len(bad) - 1} more image(s) of its batch" if len(bad) > 1 else "")
            + " is not finite: are the weights whole? With --dtype bfloat16 try float32. What was "
            "computed before is kept"
        )


def refuse_bad(bad: list[tuple[str, str]]) -> None:
    """UserError with the images that cannot be used, if there are any."""
    if bad:
        listed = "\n  ".join(f"{name}: {why}" for name, why in bad[:_NAMED])
        more = f"\n  and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise UserError(
            f"{len(bad)} image(s) cannot be used, and scores are of exactly N images:\n  {listed}"
            f"{more}\nMend them (python -m dcae_jax data-check lists all of a data set) and run "
            "the same command, or run it with --skip-bad, and the scores say how many were left "
            "out: either goes on from here. With files removed or renamed it is another set of "
            "images, which needs a new --out"
        )


# ---------------------------------------------------------------------------------------- pixels


def _pixels(batches: list[Batch]) -> UInt8[np.ndarray, "b k 16"]:
    """A digest of each image of the rows that count."""
    rows = [[batch.image[i] for batch in batches] for i in np.flatnonzero(_real(batches))]
    found = b"".join(_hash(image) for row in rows for image in row)
    return np.frombuffer(found, np.uint8).reshape(len(rows), len(batches), _DIGEST)


def _hash(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    return hashlib.blake2b(np.ravel(image).data, digest_size=_DIGEST).digest()


def _digest(pixels: UInt8[np.ndarray, "n 16"]) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def digest_now(work: Work, which: int) -> str:
    """What `Stored.digest` would say of the images as they are now; nothing is computed of them."""
    return _digest(_pixels_now(work, range(work.n))[:, which])


def _pixels_now(work: Work, span: range) -> UInt8[np.ndarray, "n k 16"]:
    with _read(work, _padded(span, work.batch)) as rows:
        return np.concatenate([_pixels(batches) for batches in rows])


def remove_changed(out: epath.Path, work: Work) -> int:
    """Removes the parts whose images have other pixels now; how many those were."""
    changed = 0
    for part, present in enumerate(there(out, work)):
        if not present:
            continue
        with _opened(out, work, part) as found:
            same = np.array_equal(found[_PIXELS], _pixels_now(work, work.span(part)))
        if not same:
            path(out, work, part).unlink()
            changed += 1
    return changed


def _write(out: epath.Path, work: Work, part: int, done: list[_Rows]) -> None:
    arrays = {k: np.concatenate([rows.arrays[k] for rows in done]) for k in done[0].arrays}
    arrays[_BAD] = np.array(json.dumps([item for rows in done for item in rows.bad]))
    if pictures := [picture for rows in done for picture in rows.pictures]:
        arrays["pictures"] = np.stack(pictures)
        arrays["picture_names"] = np.array([name for rows in done for name in rows.names])
    with outputs.opened(path(out, work, part)) as file:
        np.savez(file, **arrays)
