"""Reads a PyTorch state dict (.pth, .pt, .safetensors) into numpy, without PyTorch.

Both layouts of `torch.save` are read: the zip archive (since 1.6) and the older stream of pickles,
in which torchvision's VGG16 and the LPIPS heads are published.  The pickle is read by an unpickler
that knows only what a dict of tensors needs, so that a hostile file cannot run code.
"""

import collections
import io
import pickle
import zipfile
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from dcae_jax.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Storage(NamedTuple):
    """A flat buffer named by the pickle; its bytes lie elsewhere in the file."""

    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    """A strided view of a storage, counted in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, buffer: bytes) -> np.ndarray:
        flat = np.frombuffer(buffer, self.storage.dtype)[self.offset :]
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1
        if min(self.shape, default=1) == 0:
            return np.zeros(self.shape, flat.dtype)
        if reach > flat.size or min(self.stride, default=0) < 0:
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its storage")
        steps = tuple(s * flat.itemsize for s in self.stride)
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps).copy()


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """All tensors of the file by name; an outer {"state_dict": ...} is opened.

    UserError when the file is missing, truncated, or holds more than a dict of tensors.
    """
    path = epath.Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load(path.read_bytes())
        with path.open("rb") as file:
            return _read_zip(file) if file.read(4) == b"PK\x03\x04" else _read_legacy(file)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        safetensors.SafetensorError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ) as e:
        raise UserError(
            f"{path} cannot be read as a PyTorch state dict ({type(e).__name__}: {e}). "
            "Expected a complete .pth or .safetensors file; fetch it again."
        ) from e


def _read_zip(file: IO[bytes]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        root = next(n for n in names if n.endswith("data.pkl")).removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("big-endian files are not supported")
        tensors = _tensors(_Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load())
        # One tensor at a time: storages are usually not shared, and a file can be large.
        return {
            name: tensor.view(archive.read(f"{root}data/{tensor.storage.key}"))
            for name, tensor in tensors.items()
        }


def _read_legacy(file: IO[bytes]) -> dict[str, np.ndarray]:
    """magic, protocol, system, the pickled dict, the keys, then (int64 count, bytes) per key."""
    file.seek(0)
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("no PyTorch file")
    _Unpickler(file).load()
    if not _Unpickler(file).load().get("little_endian", True):
        raise ValueError("big-endian files are not supported")
    tensors = _tensors(_Unpickler(file).load())
    dtypes = {t.storage.key: t.storage.dtype for t in tensors.values()}
    buffers = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        size = count * dtypes[key].itemsize
        buffers[key] = file.read(size)
        if len(buffers[key]) != size:
            raise EOFError("the file ends inside a tensor")
    return {name: tensor.view(buffers[tensor.storage.key]) for name, tensor in tensors.items()}


def _tensors(value: Any) -> dict[str, _Tensor]:
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not a dict of tensors")
    return {name: t for name, t in value.items() if isinstance(t, _Tensor)}


class _Unpickler(pickle.Unpickler):
    """Knows ordered dicts, tensors and parameters; refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor"): _Tensor,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _Tensor(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is not allowed")

    def persistent_load(self, pid: tuple) -> _Storage:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        return _Storage(str(key), dtype)
