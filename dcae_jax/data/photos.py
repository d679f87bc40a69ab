"""The built-in photographs: a TFDS builder over eight free pictures that two Python packages carry.

scikit-image and scikit-learn ship a few freely licensed photographs inside their wheels; nothing is
downloaded. Each photograph is cut once across its longer axis: the far end is the test split, the
rest the train split, so that no test pixel is ever trained on. Eight photographs prove the
plumbing, not generalisation.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from jaxtyping import Shaped
from PIL import Image

from dcae_jax.data import transforms
from dcae_jax.errors import UserError

# A photograph whose longer side reaches LARGE_SIDE gives a held-out strip wide enough for 256-px
# crops.
LARGE_SIDE = 512
LARGE_STRIP = 256
SMALL_STRIP = 128

_CC0 = "CC0 1.0"
_CC_BY = "CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/)"
_PUBLIC = "public domain"


class Photo(NamedTuple):
    """Where a photograph lies inside its package, and whom to thank for it."""

    name: str
    package: str
    path: str
    title: str
    author: str
    license: str
    url: str


PHOTOS: tuple[Photo, ...] = (
    Photo("astronaut", "skimage", "data/astronaut.png", "Eileen Collins", "NASA", _PUBLIC,
          "https://flic.kr/p/r9qvLn"),
    Photo("chelsea", "skimage", "data/chelsea.png", "Chelsea the cat", "Stefan van der Walt", _CC0,
          "https://scikit-image.org"),
    Photo("coffee", "skimage", "data/coffee.png", "Cup of coffee, courtesy of Pikolo Espresso Bar",
          "Rachel Michetti", _CC0, "https://scikit-image.org"),
    Photo("rocket", "skimage", "data/rocket.jpg", "Falcon 9 carrying DSCOVR", "SpaceX", _PUBLIC,
          "https://www.flickr.com/photos/spacexphotos/16511594820/"),
    Photo("retina", "skimage", "data/retina.jpg", "Fundus photograph of a normal left eye",
          "Mikael Häggström", _CC0,
          "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg"),
    Photo("hubble", "skimage", "data/hubble_deep_field.jpg", "Hubble eXtreme Deep Field", "NASA",
          _PUBLIC, "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/"),
    # scikit-learn's README repeats china's author for the flower; its address names this one.
    Photo("china", "sklearn", "datasets/images/china.jpg", "Temple", "danielbuechele", _CC_BY,
          "https://www.flickr.com/photos/danielbuechele/6061409035/"),
    Photo("flower", "sklearn", "datasets/images/flower.jpg", "Flower", "vultilion", _CC_BY,
          "https://www.flickr.com/photos/vultilion/6056698931/"),
)  # fmt: skip


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: Shaped[np.ndarray, "h w ..."]) -> Shaped[np.ndarray, "a b ..."]:
        """The pixels of `image` inside this rectangle."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def regions(height: int, width: int) -> dict[str, Box]:
    """The train and the test rectangle: one cut across the longer axis (the width if square)."""
    strip = LARGE_STRIP if max(height, width) >= LARGE_SIDE else SMALL_STRIP
    if width >= height:
        rest = width - strip
        return {"train": Box(0, 0, height, rest), "test": Box(0, rest, height, strip)}
    rest = height - strip
    return {"train": Box(0, 0, rest, width), "test": Box(rest, 0, strip, width)}


def attribution() -> str:
    """One line per photograph: title, author, licence, address."""
    return "\n".join(f"{p.name}: {p.title}, {p.author}, {p.license}, {p.url}" for p in PHOTOS)


def locate(photo: Photo) -> epath.Path | None:
    """The photograph's file in its package, which is found but not imported; None if absent."""
    spec = importlib.util.find_spec(photo.package)
    if spec is None or spec.origin is None:
        return None
    path = epath.Path(spec.origin).parent / photo.path
    return path if path.exists() else None


def available() -> dict[str, bytes]:
    """The installed photographs, encoded, by name; each missing one is named in a warning."""
    found = {photo.name: locate(photo) for photo in PHOTOS}
    for photo in PHOTOS:
        if found[photo.name] is None:
            logging.warning(
                "photograph %r is left out: %s of package %s is not installed",
                photo.name, photo.path, photo.package,
            )  # fmt: skip
    present = {name: path.read_bytes() for name, path in found.items() if path is not None}
    if not present:
        raise UserError(
            "none of the built-in photographs is installed. They come with two packages: "
            "pip install scikit-image scikit-learn"
        )
    return present


class DcaePhotos(tfds.core.GeneratorBasedBuilder):
    """The photographs' regions as a TFDS data set, prepared as ArrayRecord without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look for this file through importlib_resources, which it doesn't require.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        """Features: PNG image, label (the photograph), rectangle, size of the photograph."""
        return tfds.core.DatasetInfo(
            builder=self,
            description="Regions of photographs in the scikit-image and scikit-learn wheels.\n"
            + attribution(),
            license="see the description: one licence for each photograph",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[photo.name for photo in PHOTOS]),
                    "file_name": tfds.features.Text(),
                    "box": tfds.features.Tensor(shape=(4,), dtype=np.int64),
                    "photo_size": tfds.features.Tensor(shape=(2,), dtype=np.int64),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict]]]:
        """One generator for each split; nothing is downloaded."""
        del dl_manager
        present = available()
        return {split: self._generate_examples(split, present) for split in ("train", "test")}

    def _generate_examples(
        self, split: str, present: dict[str, bytes]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (key, example) for each region of `split`, in the order of `PHOTOS`."""
        for key, (name, data) in enumerate(present.items()):
            pixels = transforms.decode(data, name)
            box = regions(*pixels.shape[:2])[split]
            yield (
                key,
                {
                    "image": _png(box.cut(pixels)),
                    "label": name,
                    "file_name": f"{name}/{split}",
                    "box": np.array(box, np.int64),
                    "photo_size": np.array(pixels.shape[:2], np.int64),
                },
            )


def prepare(root: epath.Path) -> epath.Path:
    """Prepares the data set below `root` (a local folder) once and returns its folder.

    The folder's name holds a digest of the photographs, so that another set of files is another
    data set. Several processes may call this at once: each prepares in a folder of its own and
    moves it into place; who comes second uses the folder of who was first.
    """
    digest = hashlib.sha256(b"".join(sorted(available().values()))).hexdigest()[:12]
    final = root / f"photos-{digest}"
    builder_dir = final / "dcae_photos" / str(DcaePhotos.VERSION)
    if not builder_dir.exists():
        _prepare_into(root, final)
    return builder_dir


def _prepare_into(root: epath.Path, final: epath.Path) -> None:
    temporary = root / f".photos-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with _quiet():
            builder = DcaePhotos(data_dir=str(temporary), file_format="array_record")
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(
                    compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
                )
            )
        try:
            temporary.rename(final)
        except OSError:  # somebody else was first: his folder holds the same photographs
            if not final.exists():
                raise
    except OSError as error:
        raise UserError(
            f"cannot prepare the photographs in {root}: {error}. Set DCAE_JAX_DATA or "
            "data.source.cache_dir to a local folder with 20 MB of free space."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.rmtree(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides TFDS's progress bars and notices while it prepares two tiny splits."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        finally:
            tfds.enable_progress_bar()


def _png(pixels: transforms.Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()
