"""An object store for tests: `fake://bucket/...` paths without append, truncate or rename.

Use: `import fake_store` (importing registers the prefix with etils.epath), then

    store = fake_store.reset()                    # empties it; also sets the listing lag to 0
    workdir = epath.Path("fake://bucket/run")     # any code that takes an epath works on it
    store.objects["/fake/bucket/run/a.txt"]       # the stored bytes
    store.listing_lag = 2                         # a new object is missing from 2 listings
    store.writes                                  # names in the order of their uploads

What it copies from real stores: an object appears whole when its writer is closed and not before
(a writer that dies leaves nothing); folders exist only as prefixes of objects; `open` knows r, rb,
w, wb; rename and replace raise; a listing may lag behind while reading by name never does.
Everything lives in this process's memory, so it does not serve tests with several processes.
"""

import dataclasses
import fnmatch
import io
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

PREFIX = "fake://"
_ROOT = "/fake/"


@dataclasses.dataclass(slots=True)
class Store:
    """The whole state of the fake store."""

    objects: dict[str, bytes] = dataclasses.field(default_factory=dict)
    hidden: dict[str, int] = dataclasses.field(default_factory=dict)  # listings still to miss it
    writes: list[str] = dataclasses.field(default_factory=list)
    listing_lag: int = 0

    def put(self, name: str, data: bytes) -> None:
        if name not in self.objects and self.listing_lag:
            self.hidden[name] = self.listing_lag
        self.objects[name] = data
        self.writes.append(name)

    def listed(self) -> list[str]:
        """Names that a listing returns now; each call brings lagging names one step nearer."""
        names = [name for name in self.objects if not self.hidden.get(name)]
        self.hidden = {name: left - 1 for name, left in self.hidden.items() if left > 1}
        return sorted(names)


STORE = Store()


def reset() -> Store:
    """Empties the store and returns it."""
    STORE.objects, STORE.hidden, STORE.writes, STORE.listing_lag = {}, {}, [], 0
    return STORE


class _Upload(io.BytesIO):
    """A writer whose object appears at close, whole; never when its `with` block raised."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._failed = False

    def truncate(self, size: int | None = None) -> int:
        raise io.UnsupportedOperation("an object store cannot truncate")

    def seekable(self) -> bool:
        return False

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._failed = kind is not None
        super().__exit__(kind, *rest)

    def close(self) -> None:
        if not self.closed and not self._failed:
            STORE.put(self._name, self.getvalue())
        super().close()

    def __del__(self) -> None:
        self._failed = True  # dropped without close: the upload never finished


class _TextUpload(io.TextIOWrapper):
    """Text on top of `_Upload`; passes a failed `with` block on."""

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.buffer._failed = kind is not None
        super().__exit__(kind, *rest)


@epath.register_path_cls(PREFIX)
class FakePath(epath.Path):
    """A path of the fake store; stored under names that start with /fake/."""

    if sys.version_info < (3, 12):

        def __new__(cls, *parts: Any) -> "FakePath":
            return super().__new__(cls, *_rooted(parts))

    else:

        def __init__(self, *parts: Any) -> None:
            super().__init__(*_rooted(parts))

    @property
    def name_in_store(self) -> str:
        return pathlib.PurePosixPath(*self.parts).as_posix()

    def __fspath__(self) -> str:
        return PREFIX + self.name_in_store.removeprefix(_ROOT)

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"FakePath({self.__fspath__()!r})"

    def _below(self, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith(self.name_in_store + "/")]

    def exists(self) -> bool:
        return self.name_in_store in STORE.objects or self.is_dir()

    def is_dir(self) -> bool:
        return bool(self._below(list(STORE.objects)))

    def iterdir(self) -> Iterator["FakePath"]:
        below = self._below(STORE.listed())
        heads = {name[len(self.name_in_store) + 1 :].split("/")[0] for name in below}
        return iter([self / head for head in sorted(heads)])

    def glob(self, pattern: str) -> Iterator["FakePath"]:
        if "**" in pattern:
            raise NotImplementedError("recursive patterns are not supported")
        depth = len(self.parts) + len(pathlib.PurePosixPath(pattern).parts)
        names = {"/" + "/".join(n.split("/")[1:depth]) for n in self._below(STORE.listed())}
        whole = f"{self.name_in_store}/{pattern}"
        return iter([FakePath(n) for n in sorted(names) if _matches(n, whole)])

    def resolve(self, strict: bool = False) -> "FakePath":
        return self

    def mkdir(self, mode: Any = None, parents: bool = False, exist_ok: bool = False) -> None:
        """A no-op: an object store has no folders."""

    def rmdir(self) -> None:
        """A no-op: an object store has no folders."""

    def rmtree(self, missing_ok: bool = False) -> None:
        below = self._below(list(STORE.objects))
        if not below and not missing_ok:
            raise FileNotFoundError(str(self))
        for name in below:
            del STORE.objects[name]

    def unlink(self, missing_ok: bool = False) -> None:
        if STORE.objects.pop(self.name_in_store, None) is None and not missing_ok:
            raise FileNotFoundError(str(self))

    def open(self, mode: str = "r", encoding: str | None = None, **kwargs: Any) -> IO[Any]:
        if mode not in ("r", "rb", "w", "wb"):
            raise io.UnsupportedOperation(f"an object store cannot open {self} with mode {mode!r}")
        if mode.startswith("w"):
            upload = _Upload(self.name_in_store)
            return upload if mode == "wb" else _TextUpload(upload, encoding="utf-8")
        if self.name_in_store not in STORE.objects:
            raise FileNotFoundError(str(self))
        reader = io.BytesIO(STORE.objects[self.name_in_store])
        return reader if mode == "rb" else io.TextIOWrapper(reader, encoding="utf-8")

    def rename(self, target: Any) -> "FakePath":
        raise io.UnsupportedOperation("an object store cannot rename")

    def replace(self, target: Any) -> "FakePath":
        raise io.UnsupportedOperation("an object store cannot rename")

    def copy(self, dst: Any, overwrite: bool = False) -> Any:
        target = epath.Path(dst)
        if target.exists() and not overwrite:
            raise FileExistsError(str(target))
        target.write_bytes(self.read_bytes())
        return target

    def stat(self) -> Any:
        if not self.exists():
            raise FileNotFoundError(str(self))
        length = len(STORE.objects.get(self.name_in_store, b""))
        return types.SimpleNamespace(is_directory=self.is_dir(), length=length, mtime=0)


def _rooted(parts: tuple[Any, ...]) -> tuple[str, ...]:
    """fake://bucket/x -> /fake/bucket/x, which pathlib does not mangle."""
    whole = "/".join(part.__fspath__() if hasattr(part, "__fspath__") else part for part in parts)
    if whole.startswith(PREFIX):
        return (_ROOT + whole.removeprefix(PREFIX),)
    return (whole,)


def _matches(name: str, pattern: str) -> bool:
    """Glob part by part: a star does not cross a slash."""
    names, patterns = name.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))
