"""The folder of `python -m dcae_jax sample`: what is there, its record, the grid, the npz."""

import contextlib
import datetime
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any, NamedTuple

from dcae_jax import store
from dcae_jax.cli import _trained
from dcae_jax.cli._sample_job import (
    Job,
    describe_guidance,
    describe_sampler,
    say,
    short,
    weights_record,
)

if TYPE_CHECKING:
    import numpy as np
    from etils import epath

    from dcae_jax.autoencoder import Autoencoder

_GRID_SIDE = 8  # samples in a row and rows of grid.png, at most
_THREADS = 8  # that read PNGs
_AHEAD = 64  # PNGs that are read ahead of the npz
_PNG_SHARE = 0.4  # of the raw bytes: rather less than what pictures are compressed to
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB\x60\x82"
_RECORD = "sample.json"
_OURS = {"weights", "sampler", "decoder", "made"}  # keys of a record that this command wrote
NPZ = "samples.npz"


@contextlib.contextmanager
def claimed(out: "epath.Path") -> Iterator[None]:
    """Keeps other commands out of the folder, and clears what a killed one has left."""
    from dcae_jax import distributed, outputs

    if not distributed.is_main():
        yield
        return
    with outputs.locked(out, "--out"):
        for path in outputs.leftovers(out) + outputs.leftovers(out / "images"):
            path.unlink(missing_ok=True)
        yield


def picture_path(out: "epath.Path", index: int) -> "epath.Path":
    """Where sample `index` lies."""
    return out / "images" / f"{index:06d}.png"


def there(job: Job) -> "np.ndarray":
    """Which samples are there, bool[n], the same on all processes: the first one looks.

    UserError if the folder holds other samples.  The record is written, so it can be written to.
    """
    import numpy as np

    from dcae_jax import distributed

    mask = np.zeros(job.n, np.uint64)
    if distributed.is_main():
        present = _present(job.out)
        old = _old_record(job, present)
        write_record(job, _decoder_of(old) if old and present else Decoder())
        mask[[i for i in _whole(job.out, present) if i < job.n]] = 1
    return distributed.total(mask) > 0


def finished(out: "epath.Path", option: str) -> dict[str, Any]:
    """sample.json of a folder whose samples are all there; UserError for any other folder."""
    from dcae_jax.data.latents import read_json
    from dcae_jax.errors import UserError

    record = read_json(out / _RECORD)
    if not (isinstance(record, dict) and _OURS <= record.keys()):
        raise UserError(f"{option} {out} has no whole {_RECORD}: give a folder of `sample`")
    if lost := set(range(record["n"])) - set(_present(out)):
        raise UserError(
            f"{option} {out} lacks {len(lost)} of its {record['n']} samples, the first is number "
            f"{min(lost)}; run the command that began it again: it draws what is missing"
        )
    return record


def _present(out: "epath.Path") -> list[int]:
    """Numbers of the pictures in the folder, from one listing."""
    folder = out / "images"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"(\d{6,})\.png", name)))


def _whole(out: "epath.Path", present: list[int]) -> list[int]:
    """Those that end as a PNG does: a disk may lose what was not flushed when its power went.

    Stores show whole objects only: nothing is read there.
    """
    if store.is_store(out):
        return present

    def ends(index: int) -> bool:
        with picture_path(out, index).open("rb") as file:
            file.seek(0, io.SEEK_END)
            file.seek(max(file.tell() - len(_PNG_END), 0))
            return file.read() == _PNG_END

    with futures.ThreadPoolExecutor(_THREADS) as pool:
        return [i for i, whole in zip(present, pool.map(ends, present), strict=True) if whole]


def settings(job: Job) -> dict[str, Any]:
    """What decides the pictures; a folder is continued only with the same."""
    from dcae_jax import config
    from dcae_jax.models.layers import Dtype

    return {
        "weights": weights_record(job.model),
        "weak": {} if job.weak is None else weights_record(job.weak),
        "dtype": job.dtype or f"as configured ({Dtype(job.model.run.task.model.dtype).value})",
        "sampler": config.to_json(job.sampler), "guidance": config.to_json(job.guide),
        "process": config.to_json(job.model.run.task.process),
        "classes": job.classes, "order": job.order, "seed": job.seed,
        "encoder": job.model.manifest.encoder,
        "latent_norm": job.model.run.task.latent_norm.value,
    }  # fmt: skip


def _old_record(job: Job, present: list[int]) -> dict[str, Any] | None:
    """sample.json of the folder; UserError if its samples are others, or not by this command."""
    from dcae_jax import config
    from dcae_jax.data.latents import read_json
    from dcae_jax.errors import UserError

    old = read_json(job.out / _RECORD)
    if not (isinstance(old, dict) and _OURS <= old.keys()):
        inside = [p.name for p in job.out.iterdir()] if job.out.is_dir() else []
        if present or set(inside) - {"images"}:
            raise UserError(
                f"--out {job.out} is not empty and has no whole {_RECORD}; give a new folder"
            )
        return None
    if not present:
        return old  # a start without a picture binds nobody
    new = settings(job)
    changes = config.diff({k: old[k] for k in new if k in old}, new)
    if changes:
        parts = dict.fromkeys(re.split(r"[.\[]", k)[0] for k in changes)
        lines = "\n".join(f"  - {k}: {short(a)} -> {short(b)}" for k, (a, b) in changes.items())
        raise UserError(
            f"--out {job.out} holds samples made with another {', '.join(parts)}:\n{lines}\n"
            "Give a new folder, or the same options to continue" + _step_hint(changes)
        )
    if present[-1] >= job.n:
        raise UserError(
            f"--out {job.out} holds samples up to number {present[-1]}, more than --n {job.n}; "
            f"give --n {present[-1] + 1} or more, or a new folder"
        )
    return old


def _step_hint(changes: dict[str, Any]) -> str:
    """How to get back to the step of a folder whose run went on."""
    if "weights.step" not in changes:
        return ""
    return f" (--from RUN/checkpoints/{changes['weights.step'][0]} for the step)"


class Decoder(NamedTuple):
    """What made pictures of the latents; nothing is known of it before the first one."""

    digest: str | None = None
    release: str | None = None  # that it still is; None: nobody's, or not known


def decoder_of(net: "Autoencoder") -> Decoder:
    """The decoder of an autoencoder."""
    from dcae_jax.convert import releases

    name = net.origin.release if net.origin is not None else None
    return Decoder(net.decoder, releases.named(name) if name else None)


def _decoder_of(record: dict[str, Any]) -> Decoder:
    return Decoder(record["decoder"], record.get("decoder_release"))  # earlier versions: without


def write_record(job: Job, decoder: Decoder, done: dict[str, Any] | None = None) -> None:
    """sample.json: what decides the pictures, whose release that is, how they came to be."""
    import jax

    from dcae_jax import outputs, provenance

    sources = {m.option: m.source for m in (job.model, job.weak) if m is not None}
    record = {
        **settings(job), "decoder": decoder.digest, "decoder_release": decoder.release,
        "release": _trained.release(job.model), "n": job.n,
        "made": {
            "from": sources, "command": provenance.command(), "time": _now(),
            "versions": provenance.versions(), "commit": provenance.commit(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(), **(done or {}),
        },
    }  # fmt: skip
    outputs.write(job.out / _RECORD, json.dumps(record, indent=1).encode())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ----------------------------------------------------------------------------------------- the end


def finish(job: Job, npz: bool) -> None:
    """The grid, the npz if it was asked for, and the record."""
    from dcae_jax import outputs
    from dcae_jax.data.latents import read_json
    from dcae_jax.errors import UserError
    from dcae_jax.report import images as pictures

    if lost := sorted(set(range(job.n)) - set(_present(job.out))):
        raise UserError(
            f"{len(lost)} samples are not in {job.out}, the first is number {lost[0]} (do all "
            "processes write to one folder?); run the same command again: it draws what is missing"
        )
    outputs.write(job.out / "grid.png", pictures.to_png(_grid(job)))
    if npz:
        _write_npz(job)
        say(f"wrote {job.out / NPZ}")
    elif (job.out / NPZ).exists():
        say(f"note: {NPZ} there is of an earlier call; --npz makes it anew")
    write_record(job, _decoder_of(read_json(job.out / _RECORD)), {"finished": True})
    say(f"{job.n} samples in {job.out / 'images'}, some of them in {job.out / 'grid.png'}")


def _grid(job: Job) -> "np.ndarray":
    """A row of samples for each class, or rows of classes where most have one sample only."""
    from dcae_jax.report import images as pictures

    rows = _rows(job.labels)
    names = [_names(job, row) for row in rows]
    shown = [[read(picture_path(job.out, i)) for i in row] for row in rows]
    weights = weights_record(job.model)
    caption = (
        f"step {weights['step']} ({weights['kind']}), {describe_sampler(job.sampler)}; guidance "
        f"{describe_guidance(job.guide)}; seed {job.seed}"
    )
    return pictures.grid(shown, labels=names, caption=caption)


def _rows(labels: "np.ndarray") -> list[list[int]]:
    """Numbers of the samples in each row of the grid."""
    n = len(labels)
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        by_class.setdefault(label, []).append(i)
    rows = [row[:_GRID_SIDE] for row in by_class.values()]
    if len(rows) > _GRID_SIDE and n < 2 * len(rows):
        count = min(n, _GRID_SIDE**2)
        shown = [n * k // count for k in range(count)]
        return [shown[k : k + _GRID_SIDE] for k in range(0, count, _GRID_SIDE)]
    count = min(len(rows), _GRID_SIDE)
    return [rows[len(rows) * k // count] for k in range(count)]


def _names(job: Job, row: list[int]) -> str:
    """What a row of the grid shows."""
    labels = list(dict.fromkeys(job.labels[row].tolist()))
    names = job.model.manifest.classes
    if len(labels) > 1:
        return (
            "classes\n" + ", ".join(map(str, labels[:4])) + "\n" + ", ".join(map(str, labels[4:]))
        )
    return f"{names[labels[0]]}" if names else f"class {labels[0]}"


def read(path: "epath.Path") -> "np.ndarray":
    """The pixels of a sample; UserError if the file is damaged."""
    import numpy as np
    from PIL import Image

    from dcae_jax.errors import UserError

    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as e:
        raise UserError(
            f"{path} is damaged ({e}): delete it and run the same command again, it draws what is "
            "missing"
        ) from e


def _read_all(out: "epath.Path", n: int) -> "Iterator[np.ndarray]":
    """All samples in their order; a few are read ahead, 50,000 need not fit into memory."""
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, n, _AHEAD):
            paths = [picture_path(out, i) for i in range(start, min(start + _AHEAD, n))]
            yield from pool.map(read, paths)


def _write_npz(job: Job) -> None:
    """samples.npz, streamed; it stands under its name once it is whole."""
    from tqdm import tqdm

    from dcae_jax.evals import npz

    height, width, _ = read(picture_path(job.out, 0)).shape
    rows = tqdm(
        _read_all(job.out, job.n), total=job.n, unit="img", desc=NPZ,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )  # fmt: skip
    npz.write(job.out / NPZ, {}, npz.Pictures(job.n, height, width, rows, job.labels))


def check_decoder(job: Job, net: "Autoencoder") -> None:
    """UserError if the folder's pictures are of another decoder."""
    from dcae_jax import distributed
    from dcae_jax.data.latents import read_json
    from dcae_jax.errors import UserError

    old = read_json(job.out / _RECORD)["decoder"] if distributed.is_main() else None
    if old not in (None, net.decoder):
        raise UserError(
            f"--out {job.out} holds samples of another decoder: {old[:16]}, {net.source} is "
            f"{net.decoder[:16]}. Give a new folder, or the autoencoder of before"
        )


def check_space(job: Job, net: "Autoencoder", there: "np.ndarray", npz: bool) -> None:
    """UserError if the disk will not hold the pictures."""
    from dcae_jax.errors import UserError

    if store.is_store(job.out) or not job.out.exists():
        return
    raw = 3 * math.prod(net.cfg.factor * side for side in job.model.run.task.model.input_size)
    needed = _PNG_SHARE * raw * int((~there).sum()) + (raw * job.n if npz else 0)
    free = shutil.disk_usage(job.out).free
    if free < needed:
        raise UserError(
            f"{job.out} has {free / 1e9:.3g} GB free, these samples need about "
            f"{needed / 1e9:.3g} GB; make room or choose another --out"
        )
