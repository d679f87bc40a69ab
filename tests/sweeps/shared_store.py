"""The fake object store for several processes: its objects are files of a folder.

Importing this in a process (a sitecustomize.py does it in children) makes fake:// paths those of
the folder that FAKE_STORE names.  Each process misses a new object in its first listings.
"""

import os
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator, MutableMapping

import fake_store


class Objects(MutableMapping):
    """name -> bytes; a file appears whole."""

    def __init__(self, folder: str) -> None:
        self._folder = pathlib.Path(folder)

    def _file(self, name: str) -> pathlib.Path:
        return self._folder / urllib.parse.quote(name, safe="")

    def __getitem__(self, name: str) -> bytes:
        try:
            return self._file(name).read_bytes()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, data: bytes) -> None:
        part = self._folder / f".{os.getpid()}-{threading.get_ident()}"
        part.write_bytes(data)
        part.rename(self._file(name))

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __iter__(self) -> Iterator[str]:
        names = (p.name for p in self._folder.iterdir() if not p.name.startswith("."))
        return iter(sorted(urllib.parse.unquote(name) for name in names))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class SharedStore(fake_store.Store):
    """Listings lag behind in every process."""

    def listed(self) -> list[str]:
        for name in self.objects:
            if name not in self.writes:
                self.writes.append(name)  # seen
                self.hidden.setdefault(name, self.listing_lag)
        return super().listed()

    def put(self, name: str, data: bytes) -> None:
        self.objects[name] = data


def use(folder: str, lag: int) -> SharedStore:
    """From now on fake:// is this folder, in this process."""
    fake_store.STORE = SharedStore(objects=Objects(folder), listing_lag=lag)
    return fake_store.STORE


if "FAKE_STORE" in os.environ:
    use(os.environ["FAKE_STORE"], 1)
