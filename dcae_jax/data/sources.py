"""Where records come from: photographs, a folder, a TFDS data set, or a weighted mixture of these.

A source is random access and nothing else: `len(source)`, `source[i]`. Order, randomness and
decoding belong to `pipeline.py`. Each config class builds its source; the instance is the registry.
"""

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32

from dcae_jax.data import transforms
from dcae_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Folder names that stand for a split, first the names that a config uses.
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
_SCAN_THREADS = 16

Sizes = Int32[np.ndarray, "n 2"]


class Record(NamedTuple):
    """One example: an encoded image (or uint8[h, w, 3] pixels), a class number, a readable name."""

    image: bytes | np.ndarray
    label: int
    name: str


@runtime_checkable
class Source(Protocol):
    """Random access to records; must be picklable (worker processes open their own files)."""

    name: str
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of one record, read as cheaply as possible; (0, 0) if it has none."""
        ...

    def fingerprint(self) -> str:
        """A digest of which records these are, in which order; independent of where they lie."""
        ...


class Part(NamedTuple):
    """One source of a mixture and its share; a plain source is a mixture of one."""

    name: str
    source: Source
    weight: float = 1.0
    min_size: int = 0


@dataclass(slots=True)
class PhotosConfig:
    """The built-in photographs (`photos.py`), split by region, prepared on first use."""

    # Only photographs whose longer side has at least this many pixels. 512 for high-resolution
    # training and evaluation: below it the held-out strip is 128 px wide.
    min_photo_side: int = 0
    # Local folder for the prepared shards; empty: $DCAE_JAX_DATA, else ~/.cache/dcae_jax.
    cache_dir: str = ""

    def build(self, split: str) -> Source:
        """Opens split "train" or "test"."""
        return PhotosSource(self.cache_dir, split, self.min_photo_side)

    def problems(self) -> list[str]:
        """All mistakes in these fields, each with its mend."""
        if self.min_photo_side < 0:
            return ["source.min_photo_side must be 0 (all photographs) or a number of pixels"]
        return []


@dataclass(slots=True)
class FolderConfig:
    """Image files below a folder; needs neither TFDS nor TensorFlow.

    `path/<split>/` is used where it exists ("val" and "valid" also serve as "validation"), else
    `path` itself. If every image lies in a subfolder, the first level of subfolders, sorted, are
    the classes.
    """

    path: str = ""
    # Without split folders: the share of the files (by a hash of their names) that is not in
    # "train" but in "validation" and "test".
    holdout: float = 0.0

    def build(self, split: str) -> Source:
        """Lists the folder."""
        return FolderSource(self.path, split, self.holdout)

    def problems(self) -> list[str]:
        """All mistakes in these fields, each with its mend."""
        found = []
        if not self.path:
            found.append("source.path is empty: give the folder of images")
        if not 0 <= self.holdout < 1:
            found.append(f"source.holdout={self.holdout} must be at least 0 and below 1")
        return found


@dataclass(slots=True)
class TfdsConfig:
    """A TFDS data set prepared as ArrayRecord, read through `as_data_source` without TensorFlow.

    Two ways to get one: `python -m dcae_jax pack` (no TensorFlow; give its --out as `directory`),
    or TFDS itself. ImageNet the second way, once, on a machine with TensorFlow, with
    ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in DIR/downloads/manual:

        tfds build imagenet2012 --data_dir=DIR --file_format=array_record

    then `TfdsConfig(name="imagenet2012", data_dir=DIR)` with splits "train" and "validation".
    Splits may be sliced as TFDS does: "train[:99%]".
    """

    # Data set name as TFDS writes it: "imagenet2012", "name/config:1.0.0". Not with `directory`.
    name: str = ""
    # Where TFDS keeps prepared data sets; empty: its default (~/tensorflow_datasets).
    data_dir: str = ""
    # The folder that holds dataset_info.json itself, for example what `pack` wrote.
    directory: str = ""
    # Feature with the image, and with the class number (empty: every label is 0).
    image_key: str = "image"
    label_key: str = "label"

    def build(self, split: str) -> Source:
        """Opens the prepared data set."""
        directory = self.directory or _find_prepared(self.name, self.data_dir)
        return TfdsSource(directory, split, self.image_key, self.label_key)

    def problems(self) -> list[str]:
        """All mistakes in these fields, each with its mend."""
        if bool(self.name) == bool(self.directory):
            return ["give exactly one of source.name (a TFDS name) and source.directory"]
        return []


@dataclass(slots=True)
class MixturePart:
    """One member of a mixture."""

    source: PhotosConfig | FolderConfig | TfdsConfig = field(default_factory=PhotosConfig)
    # Share of the positions, relative to the other members.
    weight: float = 1.0
    # Records with a shorter side below this are not used; the larger of this and data.min_size
    # counts.
    min_size: int = 0
    # Split to read, empty: data.split.
    split: str = ""
    # Name in the logs; empty: the source's own.
    name: str = ""


@dataclass(slots=True)
class MixtureConfig:
    """A weighted mixture: which member serves a position is a function of (seed, position)."""

    parts: tuple[MixturePart, ...] = ()

    def build(self, split: str) -> Source:
        """Opens every member."""
        built = [_build_part(part, split) for part in self.parts]
        names = [part.name for part in built]
        return MixtureSource(
            tuple(
                part._replace(name=f"{part.name}#{i}") if names.count(part.name) > 1 else part
                for i, part in enumerate(built)
            )
        )

    def problems(self) -> list[str]:
        """All mistakes in these fields and in the members, each with its mend."""
        found = [] if self.parts else ["source.parts is empty: a mixture needs at least one member"]
        for i, part in enumerate(self.parts):
            if part.weight <= 0:
                found.append(
                    f"source.parts[{i}].weight={part.weight} must be above 0; leave the member out"
                )
            found += [f"source.parts[{i}]: {problem}" for problem in part.source.problems()]
        return found


def cache_root(folder: str = "") -> epath.Path:
    """Where prepared photographs and scanned sizes are kept on this machine."""
    return epath.Path(folder or os.environ.get("DCAE_JAX_DATA") or "~/.cache/dcae_jax").expanduser()


class TfdsSource:
    """Records of one split of a prepared TFDS data set."""

    def __init__(self, directory: str, split: str, image_key: str, label_key: str) -> None:
        self._arguments = (directory, split, image_key, label_key)
        builder = _open_builder(directory)
        self._check_split(builder, split)
        self._check_features(builder, image_key, label_key)
        self._data = _raw_records(builder, split)
        wanted = {image_key, label_key, "file_name"} & set(builder.info.features)
        self._parse = _parser(builder, wanted, image_key)
        self._info = builder.info
        self.name = builder.info.name
        self.classes = _class_names(builder, label_key)

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsSource, self._arguments  # a worker opens its own readers

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        _, split, image_key, label_key = self._arguments
        example = self._parse(self._data[index])
        name = example.get("file_name", b"").decode() or f"{self.name}/{split}[{index}]"
        return Record(example[image_key], int(example[label_key]) if label_key else 0, name)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) from the image's header; the record is read whole."""
        image = self[index].image
        return transforms.image_size(image)

    def packed_sizes(self) -> Sizes | None:
        """The sizes that `pack` stored beside the shards; None for other data and sliced splits."""
        directory, split = self._arguments[:2]
        path = epath.Path(directory) / f"pack-{split}.sizes.npy"
        if not path.exists():
            return None
        with path.open("rb") as file:
            return np.load(file)

    def fingerprint(self) -> str:
        """Digest of the data set's name, version, and the split's shard lengths and bytes."""
        split = self._info.splits[self._arguments[1]]
        instructions = [(i.skip, i.take, i.examples_in_shard) for i in split.file_instructions]
        sizes = [(s.name, s.num_bytes, list(s.shard_lengths)) for s in self._info.splits.values()]
        return digest(
            "tfds", self._info.full_name, split.name, repr(instructions), repr(sorted(sizes))
        )

    def column(self, key: str) -> list[np.ndarray]:
        """Another numeric feature of all records, for the photographs' own bookkeeping."""
        parse = _parser(_open_builder(self._arguments[0]), {key})
        return [parse(self._data[i])[key] for i in range(len(self))]

    @staticmethod
    def _check_split(builder: Any, split: str) -> None:
        base = split.split("[")[0].split("+")[0]
        if base not in builder.info.splits:
            raise UserError(
                f"split {base!r} does not exist in {builder.info.full_name}; it has: "
                f"{', '.join(sorted(builder.info.splits)) or 'none'}. Set data.split."
            )

    @staticmethod
    def _check_features(builder: Any, image_key: str, label_key: str) -> None:
        missing = [
            key for key in (image_key, label_key) if key and key not in builder.info.features
        ]
        if missing:
            raise UserError(
                f"{builder.info.full_name} has no feature {' and no feature '.join(missing)}; it "
                "has: "
                f"{', '.join(sorted(builder.info.features))}. Set data.source.image_key and "
                "data.source.label_key (empty: no labels)."
            )


class PhotosSource:
    """The regions of the built-in photographs that belong to one split."""

    def __init__(self, cache_dir: str, split: str, min_photo_side: int) -> None:
        from dcae_jax.data import photos  # TFDS is imported only where it is used

        self._arguments = (cache_dir, split, min_photo_side)
        directory = photos.prepare(cache_root(cache_dir))
        self._photographs = directory.parent.parent.name  # names a digest of the original files
        self._all = TfdsSource(str(directory), split, "image", "label")
        sides = [int(max(size)) for size in self._all.column("photo_size")]
        self._kept = [i for i, side in enumerate(sides) if side >= min_photo_side]
        self.name = "photos"
        self.classes = self._all.classes
        if not self._kept:
            raise UserError(
                f"no built-in photograph has a side of {min_photo_side} px; the largest has "
                f"{max(sides)}. Lower data.source.min_photo_side."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return PhotosSource, self._arguments

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Record:
        return self._all[self._kept[index]]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the region."""
        return self._all.size(self._kept[index])

    def fingerprint(self) -> str:
        """Digest of the original photographs and of which of them are used."""
        return digest("photos", self._photographs, self._arguments[1], repr(self._kept))


class FolderSource:
    """Image files below a folder, in the order of their names."""

    def __init__(self, path: str, split: str, holdout: float) -> None:
        root = epath.Path(path).expanduser()
        if not root.is_dir():
            raise UserError(
                f"data.source.path={path!r} is not a folder; give the folder of your images."
            )
        self._root = _split_folder(root, split, holdout)
        names = list_images(self._root)
        if self._root == root and holdout:
            names = [name for name in names if _held_out(name, holdout) == (split != "train")]
        if not names:
            raise UserError(
                f"{self._root} holds no image for split {split!r} (looked in all its subfolders "
                "for "
                f"{', '.join(IMAGE_SUFFIXES)})."
            )
        self._names = names
        self.name = self._root.name if self._root == root else f"{root.name}/{self._root.name}"
        self.classes = _class_folders(names)
        self._labels = {name: i for i, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        label = self._labels[name.split("/", 1)[0]] if self.classes else 0
        return Record((self._root / name).read_bytes(), label, name)

    def names(self) -> tuple[str, ...]:
        """Of all files, below the folder, in their order."""
        return tuple(self._names)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) from the file's header; the pixels are not read."""
        with (self._root / self._names[index]).open("rb") as file:
            return transforms.image_size(file)

    def listing(self) -> str:
        """Digest of the names of all files (below the folder), whatever is in them."""
        return digest("listing", *self._names)

    def fingerprint(self) -> str:
        """Digest of every file's name (below the folder) and size in bytes."""
        return self._digests[0]

    def dates(self) -> str:
        """Digest of when every file was last written, in seconds."""
        return self._digests[1]

    @functools.cached_property
    def _digests(self) -> tuple[str, str]:
        """That of names and sizes and that of dates: each file is asked once."""
        with futures.ThreadPoolExecutor(_SCAN_THREADS) as pool:
            stats = list(pool.map(lambda name: (self._root / name).stat(), self._names))
        rows = zip(self._names, stats, strict=True)
        names = digest("folder", *(f"{name}:{stat.length}" for name, stat in rows))
        return names, digest("dates", *(str(stat.mtime) for stat in stats))


class MixtureSource:
    """Several sources behind each other; their shares are used by the pipeline's order."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts = parts
        self.name = "+".join(part.name for part in parts)
        self.classes: tuple[
            str, ...
        ] = ()  # class numbers of different sources mean different things
        self._ends = np.cumsum([len(part.source) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        part, inside = self._locate(index)
        return part.source[inside]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a record of whichever source it belongs to."""
        part, inside = self._locate(index)
        return part.source.size(inside)

    def fingerprint(self) -> str:
        """Digest of every member with its weight and minimum size."""
        rows = [f"{p.source.fingerprint()}:{p.weight}:{p.min_size}" for p in self.parts]
        return digest("mixture", *rows)

    def dates(self) -> str:
        """Digest of those of its members."""
        return digest("mixture", *(dates(part.source) for part in self.parts))

    def _locate(self, index: int) -> tuple[Part, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[which - 1]) if which else 0
        return self.parts[which], index - start


def parts_of(source: Source) -> tuple[Part, ...]:
    """A mixture's members; any other source as the only member."""
    return source.parts if isinstance(source, MixtureSource) else (Part(source.name, source),)


@runtime_checkable
class Listed(Protocol):
    """A source whose records may change while their names and places stay."""

    def listing(self) -> str:
        """A digest of which record stands at which position, whatever is in it."""
        ...


def listing(source: Source) -> str:
    """The same of any source: of one that is written once, its fingerprint."""
    return source.listing() if isinstance(source, Listed) else source.fingerprint()


def dates(source: Source) -> str:
    """When its files were last written; "" where they are of a data set that is written once."""
    dated = isinstance(source, FolderSource | MixtureSource)
    return source.dates() if dated else ""


def digest(*texts: str) -> str:
    """The first 16 hex digits of the SHA-256 of some texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def list_images(root: epath.Path) -> list[str]:
    """Names of all image files below `root`, sorted, with forward slashes; no hidden files."""
    return sorted(_walk_images(root, ""))


def sizes(source: Source, cache_dir: str = "") -> Sizes:
    """(height, width) of every record; scanned once and kept in the cache folder.

    An image without a readable header counts as (0, 0). Sizes that `pack` stored are used as they
    are.
    """
    packed = source.packed_sizes() if isinstance(source, TfdsSource) else None
    if packed is not None and len(packed) == len(source):
        return packed
    kept = cache_root(cache_dir) / "sizes" / f"{source.fingerprint()}.npy"
    if kept.exists():
        with kept.open("rb") as file:
            return np.load(file)
    scanned = _scan_sizes(source)
    _keep_sizes(kept, scanned)
    return scanned


def _scan_sizes(source: Source) -> Sizes:
    from tqdm import tqdm

    def size(index: int) -> tuple[int, int]:
        try:
            return source.size(index)
        except (OSError, RuntimeError, ValueError):  # an unreadable record is the pipeline's matter
            return 0, 0

    with futures.ThreadPoolExecutor(_SCAN_THREADS) as pool:
        rows = pool.map(size, range(len(source)), chunksize=64)
        bar = tqdm(rows, f"image sizes of {source.name}", len(source), delay=2, unit="img")
        return np.array(list(bar), np.int32).reshape(-1, 2)


def _keep_sizes(path: epath.Path, values: Sizes) -> None:
    """Stores scanned sizes under a name of this thread's own first: others may be reading."""
    temporary = path.parent / f".{path.name}-{os.getpid()}-{threading.get_ident()}-{time.time_ns()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, values)
        temporary.replace(path)
    except OSError as error:
        logging.warning("image sizes are not kept for the next run: %s", error)


def _walk_images(folder: epath.Path, prefix: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Linked folders are walked too, but not one that leads back up."""
    real = str(folder) if "://" in str(folder) else os.path.realpath(folder)
    if real in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            yield prefix + path.name
        elif path.is_dir():
            yield from _walk_images(path, f"{prefix}{path.name}/", (*above, real))


def held_out_split(path: str) -> str:
    """The split of a folder that models are judged on.

    "validation" or "test" if it has such a subfolder, else "train", which is the whole folder where
    there are no splits.
    """
    root = epath.Path(path).expanduser()
    present = _folders(root) if root.is_dir() else set()
    held_out = (split for split in ("validation", "test") if present & {*_SPLIT_FOLDERS[split]})
    return next(held_out, "train")


def _folders(root: epath.Path) -> set[str]:
    """Names of subfolders; images are passed over by name, each question to a store takes time."""
    return {p.name for p in root.iterdir() if p.suffix.lower() not in IMAGE_SUFFIXES and p.is_dir()}


def _split_folder(root: epath.Path, split: str, holdout: float) -> epath.Path:
    """The subfolder of a split, or the root itself where there are no split folders."""
    present = _folders(root)
    for name in (split, *_SPLIT_FOLDERS.get(split, ())):
        if name in present:
            return root / name
    others = sorted(present & {name for names in _SPLIT_FOLDERS.values() for name in names})
    if others:
        raise UserError(
            f"{root} has no folder for split {split!r}; it has: {', '.join(others)}. Set "
            "data.split."
        )
    if split == "train" or (holdout > 0 and split in _SPLIT_FOLDERS):
        return root
    raise UserError(
        f"{root} has no split folders, so split {split!r} does not exist. Make folders train/ and "
        f"{split}/, or set data.source.holdout=0.05 to hold out that share of the files."
    )


def _held_out(name: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


def _class_folders(names: list[str]) -> tuple[str, ...]:
    inside = [name for name in names if "/" in name]
    if len(inside) == len(names):
        return tuple(sorted({name.split("/", 1)[0] for name in names}))
    if inside:
        logging.warning(
            "%d of %d images lie in subfolders, the others beside them: subfolders are not taken "
            "as "
            "classes, every label is 0", len(inside), len(names),
        )  # fmt: skip
    return ()


def _build_part(part: MixturePart, split: str) -> Part:
    source = part.source.build(part.split or split)
    return Part(part.name or source.name, source, part.weight, part.min_size)


def _how_to_prepare(name: str) -> str:
    return (
        f"Prepare it once where TensorFlow is installed: tfds build {name} --data_dir=DIR "
        "--file_format=array_record; or, without TensorFlow, python -m dcae_jax pack --from "
        "FOLDER_OR_TARS "
        "--out DIR, then data.source.directory=DIR."
    )


def _find_prepared(name: str, data_dir: str) -> str:
    """The folder of a prepared data set, found by name without importing its code."""
    import tensorflow_datasets as tfds

    folder = str(epath.Path(data_dir).expanduser()) if data_dir else None
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.registered.DatasetNotFoundError as error:
        where = folder or "TFDS's default folder"
        raise UserError(
            f"no prepared data set {name!r} in {where}. {_how_to_prepare(name)}"
        ) from error
    return str(builder.data_dir)


@functools.lru_cache(maxsize=32)
def _open_builder(directory: str) -> Any:
    import tensorflow_datasets as tfds

    path = epath.Path(directory).expanduser()
    if not (path / "dataset_info.json").exists():
        raise UserError(
            f"{directory} holds no prepared data set (dataset_info.json is missing). Give the "
            "folder "
            "that pack or TFDS wrote, the one with the shards in it."
        )
    return tfds.builder_from_directory(path)


def _raw_records(builder: Any, split: str) -> Any:
    """Random access to the serialized examples of one split."""
    import tensorflow_datasets as tfds

    try:
        return builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
    except NotImplementedError as error:
        raise UserError(
            f"{builder.info.full_name} in {builder.data_dir} is prepared as "
            f"{builder.info.file_format.value}, which has no random access; array_record is "
            "needed. "
            f"{_how_to_prepare(builder.info.name)}"
        ) from error


def _parser(builder: Any, keys: set[str], encoded: str = "") -> Callable[[bytes], dict[str, Any]]:
    """Parses the features named in `keys` and no others; the image `encoded` stays encoded."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in keys})
    decoders = {encoded: tfds.decode.SkipDecoding()} if encoded else None
    return functools.partial(features.deserialize_example_np, decoders=decoders)


def _class_names(builder: Any, label_key: str) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    feature = builder.info.features[label_key] if label_key else None
    return tuple(feature.names) if isinstance(feature, tfds.features.ClassLabel) else ()
