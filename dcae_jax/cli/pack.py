"""Pack image files or tars into ArrayRecord shards that TFDS reads, without TensorFlow.

Reads a folder (classes are its subfolders), a flat folder, a tar, or a folder of tars; a tar of
class tars is ImageNet's training file. Examples:

  python -m dcae_jax pack --from photos/ --out packed/photos
  python -m dcae_jax pack --from ILSVRC2012_img_train.tar --out packed/imagenet
  python -m dcae_jax pack --from ILSVRC2012_img_val.tar --out packed/imagenet \\
      --split validation --labels validation_labels.txt

then data.source = TfdsConfig(directory="packed/imagenet"). A shard is complete or absent: kill the
command and run it again, and it goes on where it was, to the same bytes. Every image is decoded
once (--check header skips that); bad ones are left out and listed in OUT/pack-SPLIT.json.

ImageNet's labels are the WordNet ids (n01440764), sorted, as in TFDS; the development kit's own
numbers 1..1000 have another order and are refused beside a training split.
"""

import argparse
import bz2
import collections
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from dcae_jax.data import sources, transforms
from dcae_jax.data.transforms import BadRecord, Reason
from dcae_jax.errors import UserError

_FORMAT = 1  # part of the plan's digest: raise it when the bytes of a shard change
_COMPRESSED = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TAR = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz))$")
_AHEAD = 64  # images read ahead of the writer
_MARGIN = 64 * 1024**2  # bytes that stay free on the disk
_PNG_LEVEL = 3  # zlib level of re-encoded images


class Entry(NamedTuple):
    """One image: its name, where its bytes lie, and (once known) its class name."""

    name: str
    container: str  # the file itself, or the tar that holds it
    offset: int  # in the (uncompressed) container
    size: int
    label: str = ""


@dataclass(slots=True)
class ShardReport:
    """What one finished shard holds; written beside it as the sign that it is complete."""

    records: int = 0
    bytes: int = 0
    sha256: str = ""
    payload: int = 0  # bytes of the serialized examples
    sizes: list[list[int]] = field(default_factory=list)  # (height, width) of each record
    bad: list[list[str]] = field(default_factory=list)  # (name, why)


@dataclass(slots=True)
class Plan:
    """Everything that decides the bytes of the output."""

    name: str
    split: str
    classes: tuple[str, ...]
    shards: list[list[Entry]]
    resize_min: int
    quality: int
    check: str

    def digest(self) -> str:
        """Two runs with the same digest write the same shards."""
        options = (_FORMAT, self.name, self.split, self.classes, self.resize_min, self.quality)
        rows = (f"{e.name}:{e.size}:{e.label}" for shard in self.shards for e in (*shard, _END))
        return sources.digest(repr(options), self.check, *rows)


_END = Entry("/", "", 0, 0)


def main(argv: list[str]) -> int:
    """Packs; exit code 0 when the output is complete."""
    args = _parser().parse_args(argv)
    out = epath.Path(args.out).expanduser()
    name = args.name or _default_name(out)
    entries = _labelled(list(find_images(args.source)), args.labels)
    plan = Plan(
        name=name,
        split=args.split,
        classes=_classes(out, args.split, entries),
        shards=cut_shards(entries, int(args.shard_size * 1024**2)),
        resize_min=args.resize_min,
        quality=args.quality,
        check=args.check,
    )
    pack(plan, out, threads=args.threads, max_bad_fraction=args.max_bad_fraction)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dcae_jax pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, help="folder of images, tar, or folder of tars")
    add("--out", required=True, help="folder of the packed data set; may be gs://")
    add("--split", default="train", help="name of the split (default: train)")
    add("--name", default="", help="name of the data set (default: from --out)")
    add("--shard-size", type=float, default=256, help="MB of images per shard (default: 256)")
    add("--resize-min", type=_natural, default=0, help="shrink images to this shorter side, JPEG")
    add("--quality", type=_positive, default=95, help="JPEG quality of shrunk images (default: 95)")
    add(
        "--labels",
        default="",
        help="text file: one class per image in order of names, or 'name class'",
    )
    add("--check", choices=("decode", "header"), default="decode", help="how images are checked")
    add("--threads", type=_positive, default=os.cpu_count() or 1, help="decoding threads")
    add(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        help="refuse to finish above (default: 0.01)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


# ---- What there is to pack ----------------------------------------------------------------------


def find_images(source: str) -> Iterator[Entry]:
    """All images of a folder, tar or folder of tars, in a fixed order; pixels are not read."""
    root = epath.Path(source).expanduser()
    if not root.exists():
        raise UserError(f"--from {source}: no such file or folder")
    if not root.is_dir():
        if not _TAR.search(root.name):
            raise UserError(f"--from {source} is neither a folder nor a tar")
        found = list(_tar_entries(root, ""))
    else:
        tars = sorted(path for path in root.iterdir() if _TAR.search(path.name))
        inside = [e for tar in tars for e in _tar_entries(tar, f"{_stem(tar.name)}/")]
        found = inside or list(_folder_entries(root))
    if not found:
        raise UserError(f"--from {source} holds no image ({', '.join(sources.IMAGE_SUFFIXES)})")
    yield from _without_common_folder(found)


def _folder_entries(root: epath.Path) -> Iterator[Entry]:
    for name in sources.list_images(root):
        yield Entry(name, str(root / name), 0, (root / name).stat().length)


def _tar_entries(path: epath.Path, prefix: str) -> Iterator[Entry]:
    """Images of a tar in the order of the file; tars inside are opened where they are."""
    print(f"listing {path.name} ...", file=sys.stderr)
    with _open_plain(str(path)) as stream:
        yield from _members(stream, str(path), prefix, 0)


def _members(stream: io.IOBase, container: str, prefix: str, base: int) -> Iterator[Entry]:
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                start = base + member.offset_data
                if not member.isfile() or os.path.basename(name).startswith("."):
                    continue
                if name.endswith(".tar"):
                    inner = tar.extractfile(member)
                    yield from _members(inner, container, f"{prefix}{_stem(name)}/", start)
                elif name.lower().endswith(sources.IMAGE_SUFFIXES):
                    yield Entry(prefix + name, container, start, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{container} is not an intact tar: {error}") from error


@contextlib.contextmanager
def _open_plain(path: str) -> Iterator[io.IOBase]:
    """Opens a file; a compressed one as the stream of its uncompressed bytes."""
    opener = _COMPRESSED.get(epath.Path(path).suffix)
    with epath.Path(path).open("rb") as raw:
        yield raw if opener is None else opener(raw)


def _stem(name: str) -> str:
    return _TAR.sub("", name)


def _without_common_folder(entries: list[Entry]) -> list[Entry]:
    """Drops leading folders that hold everything, so that classes are the first level."""
    while True:
        heads = {e.name.split("/", 1)[0] for e in entries}
        if len(heads) != 1 or not all(e.name.count("/") >= 2 for e in entries):
            return entries
        entries = [e._replace(name=e.name.split("/", 1)[1]) for e in entries]


def _labelled(entries: list[Entry], labels: str) -> list[Entry]:
    """Entries with class names: from the label file, else from first-level folders, else none."""
    if labels:
        return _label_by_file(entries, epath.Path(labels).expanduser())
    if all("/" in entry.name for entry in entries):
        return [entry._replace(label=entry.name.split("/", 1)[0]) for entry in entries]
    return entries


def _label_by_file(entries: list[Entry], path: epath.Path) -> list[Entry]:
    if not path.exists():
        raise UserError(f"--labels {path}: no such file")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if all(len(row) == 1 for row in rows):
        names = sorted(entry.name for entry in entries)
        if len(rows) != len(names):
            raise UserError(f"--labels has {len(rows)} lines for {len(names)} images")
        by_name = {name: row[0] for name, row in zip(names, rows, strict=True)}
    elif all(len(row) == 2 for row in rows):
        by_name = {row[0]: row[1] for row in rows}
    else:
        raise UserError("--labels needs lines 'class' (in order of file names) or 'name class'")
    missing = [entry.name for entry in entries if entry.name not in by_name]
    if missing:
        raise UserError(f"--labels names no class for {len(missing)} images, first {missing[0]}")
    return [entry._replace(label=by_name[entry.name]) for entry in entries]


def _classes(out: epath.Path, split: str, entries: list[Entry]) -> tuple[str, ...]:
    """Sorted class names; those of the splits that are there already, so that numbers agree."""
    names = {entry.label for entry in entries if entry.label}
    mine = tuple(sorted(names, key=lambda n: (int(n), n) if n.isdigit() else (-1, n)))
    for other, manifest in _manifests(out).items():
        theirs = tuple(manifest["classes"])
        if other == split or theirs == mine:
            continue
        if not mine or not names <= set(theirs):
            unknown = sorted(names - set(theirs))[:3] or "no classes at all"
            raise UserError(
                f"split {other!r} in {out} has {len(theirs)} classes, these images have "
                f"{unknown}; one "
                "data set has one list of classes: give --labels, or another --out"
            )
        return theirs
    return mine


def cut_shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Consecutive runs of entries with at most `limit` bytes each (at least one entry)."""
    shards: list[list[Entry]] = []
    used = limit
    for entry in entries:
        if not shards or used + entry.size > limit:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.size
    return shards


# ---- Writing ------------------------------------------------------------------------------------


def pack(plan: Plan, out: epath.Path, *, threads: int, max_bad_fraction: float) -> None:
    """Writes what is missing of the plan's shards, then the metadata that makes it a data set."""
    digest = plan.digest()
    if _is_finished(plan, out, digest):
        print(f"{out}: split {plan.split!r} is already packed, nothing to do")
        return
    work = out / f"pack-{plan.split}"
    _claim(work, digest)
    reports = [_finished_shard(plan, out, work, i) for i in range(len(plan.shards))]
    _check_space(plan, out, [i for i, report in enumerate(reports) if report is None])
    total = sum(len(shard) for shard in plan.shards)
    done = sum(len(s) for s, r in zip(plan.shards, reports, strict=True) if r is not None)
    with tqdm(total=total, initial=done, unit="img", desc=plan.split) as bar:
        for i, report in enumerate(reports):
            if report is None:
                reports[i] = _write_shard(plan, out, work, i, threads, bar)
    _finish(plan, out, digest, [r for r in reports if r is not None], max_bad_fraction)
    work.rmtree()


def _write_shard(
    plan: Plan, out: epath.Path, work: epath.Path, index: int, threads: int, bar: tqdm
) -> ShardReport:
    """Writes a shard beside its place, moves it there, then leaves the sign that it is complete."""
    local = _is_local(out)
    staging = epath.Path(
        tempfile.mkdtemp(prefix="staging-", dir=os.fspath(work) if local else None)
    )
    try:
        staged = staging / "shard"
        report = _fill(plan, index, staged, threads, bar)
        if local:
            staged.replace(_shard_path(plan, out, index))
        else:
            _shard_path(plan, out, index).write_bytes(staged.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot write shard {index} of {out}: {error}. Run the command again."
        ) from error
    finally:
        staging.rmtree(missing_ok=True)
    (work / f"{index:05d}.json").write_text(json.dumps(asdict(report)))
    return report


def _fill(plan: Plan, index: int, path: epath.Path, threads: int, bar: tqdm) -> ShardReport:
    from array_record.python import array_record_module

    report = ShardReport()
    serialize = _serializer(plan.classes)
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    try:
        for entry, outcome in _checked(plan, index, threads):
            bar.update()
            if isinstance(outcome, BadRecord):
                report.bad.append([entry.name, f"{outcome.reason.value}: {outcome.detail}"])
                continue
            example = {"image": outcome, "file_name": entry.name, "label": entry.label or 0}
            serialized = serialize(example)
            writer.write(serialized)
            report.records += 1
            report.payload += len(serialized)
            report.sizes.append([*transforms.image_size(outcome)])
    finally:
        writer.close()
    report.bytes = path.stat().length
    with path.open("rb") as file:
        report.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return report


def _checked(plan: Plan, index: int, threads: int) -> Iterator[tuple[Entry, bytes | BadRecord]]:
    """Entries of one shard in order, with what is to be written; decoding runs ahead in threads."""
    with futures.ThreadPoolExecutor(threads) as pool:
        pending: collections.deque[tuple[Entry, futures.Future]] = collections.deque()
        for entry, data in _read_entries(plan.shards[index]):
            pending.append((entry, pool.submit(_prepare, plan, entry, data)))
            if len(pending) >= _AHEAD:
                first, result = pending.popleft()
                yield first, result.result()
        for entry, result in pending:
            yield entry, result.result()


def _read_entries(entries: list[Entry]) -> Iterator[tuple[Entry, bytes]]:
    """The bytes of each entry; each container is opened once and read forwards."""
    for container, group in itertools.groupby(entries, key=lambda entry: entry.container):
        with _open_plain(container) as stream:
            for entry in group:
                stream.seek(entry.offset)
                yield entry, stream.read(entry.size)


def _prepare(plan: Plan, entry: Entry, data: bytes) -> bytes | BadRecord:
    """The bytes to store: the file itself, unless it is shrunk or others would see other pixels."""
    try:
        if transforms.image_size(data) == (0, 0):
            transforms.decode(data, entry.name)  # says what is wrong
            return BadRecord(entry.name, Reason.not_an_image)
        odd = transforms.needs_reencoding(data)
        height, width = transforms.image_size(data)
        shrink = 0 < plan.resize_min < min(height, width)
        if not (odd or shrink):
            if plan.check == "decode":
                transforms.decode(data, entry.name)
            return data
        image = Image.fromarray(transforms.decode(data, entry.name))
    except BadRecord as error:
        return error
    buffer = io.BytesIO()
    if shrink:
        small = transforms.resize_shorter(image, plan.resize_min)
        small.save(buffer, format="JPEG", quality=plan.quality, subsampling=0)
    else:
        image.save(buffer, format="PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


# ---- What makes it a data set -------------------------------------------------------------------


def _finish(
    plan: Plan, out: epath.Path, digest: str, reports: list[ShardReport], max_bad_fraction: float
) -> None:
    """Metadata of all splits, then the manifest that says that this split is complete."""
    bad = [item for report in reports for item in report.bad]
    records = sum(report.records for report in reports)
    total = records + len(bad)
    manifest = {
        "digest": digest,
        "name": plan.name,
        "split": plan.split,
        "classes": plan.classes,
        "records": records,
        "payload": sum(report.payload for report in reports),
        "shards": [
            {k: v for k, v in asdict(r).items() if k not in ("sizes", "bad")} for r in reports
        ],
        "bad": bad,
    }
    if records == 0 or len(bad) > max_bad_fraction * total:
        listed = "\n  ".join(f"{name}: {why}" for name, why in bad[:20])
        raise UserError(
            f"{len(bad)} of {total} images are bad, more than "
            f"--max-bad-fraction={max_bad_fraction:g}; "
            f"the shards are kept, the data set is not finished. The first:\n  {listed}"
        )
    with (out / f"pack-{plan.split}.sizes.npy").open("wb") as file:
        np.save(file, np.array([s for r in reports for s in r.sizes], np.int32).reshape(-1, 2))
    others = {split: m for split, m in _manifests(out).items() if split != plan.split}
    _write_metadata(out, plan, [*others.values(), manifest])
    (out / f"pack-{plan.split}.json").write_text(json.dumps(manifest, indent=1))
    print(
        f"{out}: split {plan.split!r}: {records} images in {len(reports)} shards, {len(bad)} "
        "left out"
    )
    for name, why in bad[:20]:
        print(f"  left out: {name}: {why}")


def _write_metadata(out: epath.Path, plan: Plan, manifests: list[dict[str, Any]]) -> None:
    """features.json and dataset_info.json as TFDS writes them, for all splits."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=out, dataset_name=plan.name, filetype_suffix="array_record"
    )
    splits = [
        tfds.core.SplitInfo(
            name=m["split"],
            shard_lengths=[shard["records"] for shard in m["shards"]],
            num_bytes=m["payload"],
            filename_template=template.replace(split=m["split"]),
        )
        for m in manifests
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=_features(plan.classes),
        split_infos=splits,
        filename_template=template,
        check_data=False,  # TFDS checks through TensorFlow
        description="Packed by python -m dcae_jax pack.",
    )


def _features(classes: tuple[str, ...]) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(classes or ("image",))),
            "file_name": tfds.features.Text(),
        }
    )


def _serializer(classes: tuple[str, ...]) -> Callable[[dict[str, Any]], bytes]:
    """Example -> bytes of its tf.train.Example, keys sorted: protobuf's own order varies."""
    from tensorflow_datasets.core import example_serializer

    features = _features(classes)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(example: dict[str, Any]) -> bytes:
        proto = serializer.get_tf_example(features.encode_example(example))
        return proto.SerializeToString(deterministic=True)

    return serialize


def _manifests(out: epath.Path) -> dict[str, dict[str, Any]]:
    """The manifests of the finished splits in `out`, by split."""
    if not out.exists():
        return {}
    found = [p for p in out.iterdir() if p.name.startswith("pack-") and p.suffix == ".json"]
    return {m["split"]: m for m in (_read_json(path) for path in sorted(found)) if m}


def _read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON file, empty if it is absent or was cut short by a kill."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _is_finished(plan: Plan, out: epath.Path, digest: str) -> bool:
    """Whether this split is packed already from the same images; refuses another's output."""
    finished = _manifests(out)
    for split, manifest in finished.items():
        if manifest["name"] != plan.name:
            raise UserError(
                f"{out} holds data set {manifest['name']!r}, not {plan.name!r}; see --name"
            )
        if split == plan.split and manifest["digest"] != digest:
            raise UserError(
                f"{out} already holds a finished split {split!r} of other images or options "
                f"({manifest['records']} images). Choose another --out or --split, or delete it."
            )
    if not finished and out.exists() and (out / "dataset_info.json").exists():
        raise UserError(f"{out} holds a data set that pack did not write; choose another --out")
    return plan.split in finished


def _claim(work: epath.Path, digest: str) -> None:
    """Marks the unfinished output as that of this plan; refuses to continue another plan's."""
    started = _read_json(work / "plan.json")
    if started and started["digest"] != digest:
        raise UserError(
            f"{work} belongs to an unfinished run with other images or options. Give the same "
            "ones to "
            f"finish it, or delete {work} to start anew."
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / "plan.json").write_text(json.dumps({"digest": digest}))
    except OSError as error:
        raise UserError(f"cannot write to {work}: {error}") from error


def _finished_shard(
    plan: Plan, out: epath.Path, work: epath.Path, index: int
) -> ShardReport | None:
    report = _read_json(work / f"{index:05d}.json")
    path = _shard_path(plan, out, index)
    if not report or not path.exists() or path.stat().length != report["bytes"]:
        return None
    return ShardReport(**report)


def _shard_path(plan: Plan, out: epath.Path, index: int) -> epath.Path:
    count = len(plan.shards)
    return out / f"{plan.name}-{plan.split}.array_record-{index:05d}-of-{count:05d}"


def _check_space(plan: Plan, out: epath.Path, missing: list[int]) -> None:
    """Refuses to start what the disk cannot hold; on an object store only one shard lies here."""
    costs = [sum(_stored_size(plan, entry) for entry in plan.shards[i]) for i in missing]
    if not costs:
        return
    local = _is_local(out)
    needed = (sum(costs) if local else max(costs)) + _MARGIN
    folder = os.fspath(out) if local else tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, packing needs about {needed / 1e9:.1f} GB; "
            "free some "
            "space, choose another --out, or shrink the images with --resize-min"
        )


def _stored_size(plan: Plan, entry: Entry) -> int:
    """Bytes of an entry in a shard; a shrunk JPEG takes less than 1.5 bytes a pixel at 4:3."""
    if plan.resize_min:
        return min(entry.size, 2 * plan.resize_min**2)
    return entry.size


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def _default_name(out: epath.Path) -> str:
    """A TFDS name from the folder's: lower case, digits and underscores, a letter first."""
    last = out.parent.name if re.fullmatch(r"\d+\.\d+\.\d+", out.name) else out.name
    name = re.sub(r"\W+", "_", last.lower()).strip("_")
    return name if name[:1].isalpha() else f"images_{name}".strip("_")
