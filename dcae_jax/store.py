"""Object stores (`gs://`): what their clients need to be told, and what cannot be there.

Paths of users go through `etils.epath`, which hands `gs://` to gcsfs.  Nothing here imports it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dcae_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

_PROTOCOLS = ("gcs", "s3")  # as fsspec calls them
_CLIENTS = {"gcsfs": "gcsfs", "google": "gcsfs", "s3fs": "s3fs"}  # what is missing -> what to get


def is_store(path: Any) -> bool:
    """Whether a path is in an object store: no append, no rename, no locks."""
    return "://" in os.fspath(path)


def fresh_listings() -> None:
    """Tells fsspec's clients, in this process and its children, to keep no listings.

    They would keep them for ever: what another process or tensorstore wrote is then never seen,
    not even by its name.
    """
    for protocol in _PROTOCOLS:
        name = f"FSSPEC_{protocol.upper()}"
        given = json.loads(os.environ[name]) if name in os.environ else {}
        options = {"use_listings_cache": False} | given
        os.environ[name] = json.dumps(options)
        if "fsspec.config" in sys.modules:  # it has read the environment already
            conf = sys.modules["fsspec.config"].conf
            conf[protocol] = options | (conf[protocol] if protocol in conf else {})


def upload(folder: str, target: "epath.Path") -> None:
    """Moves a local folder, and all below it, into a store."""
    for path in pathlib.Path(folder).iterdir():
        if path.is_dir():
            upload(os.fspath(path), target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())
    shutil.rmtree(folder)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A missing client of an object store as one sentence."""
    try:
        yield
    except ImportError as e:
        wanted = next((v for k, v in _CLIENTS.items() if k in str(e)), None)
        if wanted is None:
            raise
        raise UserError(
            f"paths in object stores need a package that is not installed ({e}): pip install "
            f"{wanted}"
        ) from e


def require_checkpoints(path: str) -> None:
    """UserError for a store that checkpoints cannot be in."""
    scheme = str(path).partition("://")[0]
    if is_store(path) and scheme != "gs":
        raise UserError(
            f"{path}: checkpoints can be on a disk or on gs://, not on {scheme}:// (Orbax writes "
            "to no other object store); copy it to one of those, or mount the store as a folder"
        )
