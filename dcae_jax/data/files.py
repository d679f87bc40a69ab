"""The image files that a user names for a command: found, named apart, read one by one."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from etils import epath

from dcae_jax.data import sources, transforms
from dcae_jax.data.transforms import BadRecord, Pixels, Reason
from dcae_jax.errors import UserError


class ImageFile(NamedTuple):
    """A file, and the name of what is made of it: relative, with slashes, without a suffix."""

    path: epath.Path
    name: str

    def read(self) -> Pixels:
        """Upright RGB; `BadRecord` for what is not an intact image or cannot be read."""
        try:
            data = self.path.read_bytes()
        except OSError as e:
            raise BadRecord(str(self.path), Reason.unreadable, str(e)) from e
        return transforms.decode(data, str(self.path))

    def size(self) -> tuple[int, int]:
        """(height, width) by the file's header; (0, 0) where it has none."""
        try:
            with self.path.open("rb") as file:
                return transforms.image_size(file)
        except OSError:  # `read` will say why
            return 0, 0


def find(paths: Sequence[str], reserved: Iterable[str] = ()) -> list[ImageFile]:
    """The files, and all images in the folders and their subfolders; each once, sorted by name.

    No two names are equal, even where upper and lower case are not told apart, nor is one among the
    `reserved`.  UserError for a path that does not exist, and when no image is found.
    """
    found: dict[str, tuple[epath.Path, str]] = {}
    for given in paths:
        for path, name in _below(given, keep_folder=len(paths) > 1):
            found.setdefault(_identity(path), (path, name))
    if not found:
        raise UserError(
            f"no image in {', '.join(map(str, paths))} (looked in all subfolders for "
            f"{', '.join(sources.IMAGE_SUFFIXES)})"
        )
    return sorted(_named(list(found.values()), reserved), key=lambda file: file.name)


def _identity(path: epath.Path) -> str:
    """Equal for two names of one file, links included."""
    return str(path) if "://" in str(path) else os.path.realpath(path)


def _below(given: str, keep_folder: bool) -> list[tuple[epath.Path, str]]:
    """(path, relative name with suffix); a folder's own name is kept beside other arguments."""
    path = epath.Path(given).expanduser()
    if path.is_dir():
        prefix = f"{path.name}/" if keep_folder and path.name not in ("", ".", "..") else ""
        return [(path / name, prefix + name) for name in sources.list_images(path)]
    if not path.exists():
        raise UserError(f"--images {given}: no such file or folder")
    return [(path, path.name)]


def _named(rows: list[tuple[epath.Path, str]], reserved: Iterable[str]) -> list[ImageFile]:
    """Names without suffix; with it where two would be equal, and numbered where they still are."""

    def bare(name: str) -> str:
        return name[: -len(epath.Path(name).suffix) or None]

    count = Counter(bare(name).lower() for _, name in rows)
    taken = {name.lower() for name in reserved}
    files = []
    for path, name in rows:
        first = name if count[bare(name).lower()] > 1 or bare(name).lower() in taken else bare(name)
        final, number = first, 1
        while final.lower() in taken:
            number += 1
            final = f"{first}-{number}"
        taken.add(final.lower())
        files.append(ImageFile(path, final))
    return files
