"""Reads tensors of PyTorch files (.pth, .pt, .bin, .safetensors) into numpy, without PyTorch.

Both layouts of `torch.save` are read: the zip archive (since 1.6) and the older stream of pickles,
in which torchvision's VGG16 and the LPIPS heads are published.  The pickle is read by an unpickler
that knows only what dicts of tensors need, so that a hostile file cannot run code; what it does not
know is left to `torch.load(weights_only=True)` where PyTorch is installed.
"""

import collections
import contextlib
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from dcae_jax.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Type(NamedTuple):
    """A dtype and how the formats call it."""

    dtype: np.dtype
    safe: str  # in safetensors
    storage: str  # in pickles


_TYPES = (
    _Type(np.dtype(np.float64), "F64", "DoubleStorage"),
    _Type(np.dtype(np.float32), "F32", "FloatStorage"),
    _Type(np.dtype(np.float16), "F16", "HalfStorage"),
    _Type(np.dtype(ml_dtypes.bfloat16), "BF16", "BFloat16Storage"),
    _Type(np.dtype(np.int64), "I64", "LongStorage"),
    _Type(np.dtype(np.int32), "I32", "IntStorage"),
    _Type(np.dtype(np.int16), "I16", "ShortStorage"),
    _Type(np.dtype(np.int8), "I8", "CharStorage"),
    _Type(np.dtype(np.uint8), "U8", "ByteStorage"),
    _Type(np.dtype(np.bool_), "BOOL", "BoolStorage"),
)
SAFE_DTYPES = {row.safe: row.dtype for row in _TYPES}  # by safetensors' names
_DTYPES = {row.storage: row.dtype for row in _TYPES}


class Info(NamedTuple):
    """What a tensor is, before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one open file, by name; `read` reads one of them."""

    path: epath.Path
    infos: dict[str, Info]
    _read: Callable[[str], np.ndarray]
    part: str = ""  # which dict of the file's they are of ("ema/0.9999"); "": of its outermost
    left_out: list[str] = field(default_factory=list)  # dicts of tensors that were not chosen

    def read(self, name: str) -> np.ndarray:
        """One tensor; UserError if its bytes cannot be read."""
        with _readable(self.path):
            return self._read(name)


@contextlib.contextmanager
def _readable(path: epath.Path) -> Iterator[None]:
    """Turns whatever a damaged file raises into one sentence."""
    try:
        yield
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
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


@contextlib.contextmanager
def open_tensors(path: epath.PathLike, part: str | None = None) -> Iterator[TensorFile]:
    """Opens a file; `part` names the dict of tensors where a checkpoint holds several.

    UserError when the file is missing, truncated, or holds something else, and when it holds
    several sets of weights and `part` is not one of them.
    """
    path = epath.Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no file {path}")
    with path.open("rb") as file:
        with _readable(path):
            if path.suffix == ".safetensors":
                if part is not None:
                    raise UserError(f"{path} has no parts such as {part!r}; leave out --part")
                opened = _open_safetensors(path, file)
            else:
                opened = _open_pickled(path, file, part)
        yield opened


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """All tensors of the file by name; an outer {"state_dict": ...} is opened.

    UserError when the file is missing, truncated, or holds more than a dict of tensors.
    """
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.infos}


# ------------------------------------------------------------------------------------ safetensors


def _open_safetensors(path: epath.Path, file: io.IOBase) -> TensorFile:
    """8 bytes with the length of a JSON header, the header, then the tensors' bytes."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 + length:
        raise EOFError(f"its header needs {8 + length} bytes and the file has {size}")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    infos, places = {}, {}
    for name, row in header.items():
        info, (start, end) = _safe_info(name, row), row["data_offsets"]
        if end - start != math.prod(info.shape) * info.dtype.itemsize or start < 0:
            raise ValueError(f"the header gives {name} {end - start} bytes")
        if 8 + length + end > size:
            raise EOFError(f"the file ends at byte {size}, inside or before {name}")
        infos[name], places[name] = info, (8 + length + start, end - start)

    def read(name: str) -> np.ndarray:
        start, count = places[name]
        file.seek(start)
        data = file.read(count)
        if len(data) != count:
            raise EOFError(f"the file ends inside {name}")
        return np.frombuffer(data, infos[name].dtype).reshape(infos[name].shape)

    return TensorFile(path, infos, read)


def _safe_info(name: str, row: dict[str, Any]) -> Info:
    if row["dtype"] not in SAFE_DTYPES:
        raise ValueError(f"{name} has dtype {row['dtype']}; known are {', '.join(SAFE_DTYPES)}")
    return Info(tuple(row["shape"]), SAFE_DTYPES[row["dtype"]])


# ---------------------------------------------------------------------------------------- pickles


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

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def view(self, buffer: bytes) -> np.ndarray:
        flat = np.frombuffer(buffer, self.storage.dtype)[self.offset :]
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1
        if min(self.shape, default=1) == 0:
            return np.zeros(self.shape, flat.dtype)
        if reach > flat.size or min(self.stride, default=0) < 0:
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its storage")
        steps = tuple(s * flat.itemsize for s in self.stride)
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps).copy()


class _Pickled(NamedTuple):
    """What the pickle of a file holds, and how to get at the bytes of a tensor of it."""

    value: Any
    is_tensor: Callable[[Any], bool]
    info: Callable[[Any], Info]
    array: Callable[[Any], np.ndarray]


def _open_pickled(path: epath.Path, file: io.IOBase, part: str | None) -> TensorFile:
    try:
        zipped = file.read(4) == b"PK\x03\x04"
        pickled = _open_zip(file) if zipped else _open_legacy(file)
    except _Unknown as e:
        pickled = _with_torch(path, e)
    found = _tensor_dicts(pickled)
    name = _choose(path, list(found), part)
    tensors = found[name]
    return TensorFile(
        path,
        {key: pickled.info(t) for key, t in tensors.items()},
        lambda key: pickled.array(tensors[key]),
        name,
        [other for other in found if other != name],
    )


def _choose(path: epath.Path, names: list[str], part: str | None) -> str:
    if part is None and len(names) == 1:
        return names[0]
    if part in names:
        return part
    listed = ", ".join(names) or "no dict of tensors"
    if part is not None:
        raise UserError(f"{path} has no part {part!r}; it holds {listed}")
    raise UserError(f"{path} holds several sets of weights: {listed}; say which with --part NAME")


def _tensor_dicts(pickled: _Pickled) -> dict[str, dict[str, Any]]:
    """The dicts of tensors in a file: its own, or those under the names that trainers use."""
    value = pickled.value
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not a dict of tensors")
    places = {k: value[k] for k in ("state_dict", "model_state_dict", "model", "ema") if k in value}
    if "ema" in value and isinstance(value["ema"], dict):
        places |= {f"ema/{k}": v for k, v in value["ema"].items()}
    found = {
        name: tensors
        for name, place in places.items()
        if isinstance(place, dict) and (tensors := _only_tensors(place, pickled.is_tensor))
    }
    return found or {"": _only_tensors(value, pickled.is_tensor)}


def _only_tensors(value: dict[Any, Any], is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    return {str(name): t for name, t in value.items() if is_tensor(t)}


def _is_ours(value: Any) -> bool:
    return isinstance(value, _Tensor)


def _info(tensor: Any) -> Info:
    return Info(tuple(tensor.shape), tensor.dtype)


def _open_zip(file: io.IOBase) -> _Pickled:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    root = next(n for n in names if n.endswith("data.pkl")).removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in names and archive.read(order) != b"little":
        raise ValueError("big-endian files are not supported")
    value = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
    return _Pickled(
        value, _is_ours, _info, lambda t: t.view(archive.read(f"{root}data/{t.storage.key}"))
    )


def _open_legacy(file: io.IOBase) -> _Pickled:
    """magic, protocol, system, the pickled dict, the keys, then (int64 count, bytes) per key."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("no PyTorch file")
    _Unpickler(file).load()
    if not _Unpickler(file).load().get("little_endian", True):
        raise ValueError("big-endian files are not supported")
    unpickler = _Unpickler(file)
    value, places = unpickler.load(), {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little") * unpickler.storages[key].itemsize
        places[key] = (file.tell(), count)
        if file.seek(count, io.SEEK_CUR) > size:
            raise EOFError("the file ends inside a tensor")

    def array(tensor: _Tensor) -> np.ndarray:
        start, count = places[tensor.storage.key]
        file.seek(start)
        return tensor.view(file.read(count))

    return _Pickled(value, _is_ours, _info, array)


class _Unknown(pickle.UnpicklingError):
    """The pickle asks for a class that is not needed for tensors."""


class _Settings:
    """Stands for an argparse.Namespace, in which trainers keep their options; nobody reads it."""


class _Unpickler(pickle.Unpickler):
    """Knows ordered dicts, tensors, parameters and options; refuses every other global."""

    def __init__(self, file: io.IOBase):
        super().__init__(file)
        self.storages: dict[str, np.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("argparse", "Namespace"): _Settings,
            ("torch._utils", "_rebuild_tensor"): _Tensor,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _Tensor(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        raise _Unknown(f"the file asks for {module}.{name}, which is not allowed")

    def persistent_load(self, pid: tuple) -> _Storage:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        self.storages[str(key)] = dtype
        return _Storage(str(key), dtype)


def _with_torch(path: epath.Path, reason: _Unknown) -> _Pickled:
    """A file that needs more than dicts of tensors, by PyTorch's own restricted unpickler."""
    mend = (
        "in PyTorch, if you trust the file, load it and save the dict of tensors alone: "
        "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
    )
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"{path} holds more than tensors ({reason}); install PyTorch (pip install torch), "
            f"which may read it, or {mend}"
        ) from e
    try:
        value = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a file makes torch raise
        raise UserError(
            f"{path} holds more than tensors ({reason}), and PyTorch's safe reader refuses it "
            f"too: {str(e).strip().splitlines()[0][:300]}; {mend}"
        ) from e
    names = {getattr(torch, n): np.dtype(n) for n in ("float64", "float32", "float16", "int64")}
    names[torch.bfloat16] = np.dtype(ml_dtypes.bfloat16)

    def array(tensor: Any) -> np.ndarray:
        if tensor.dtype is torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.detach().numpy()

    def info(tensor: Any) -> Info:
        if tensor.dtype not in names:
            raise ValueError(f"a tensor has dtype {tensor.dtype}")
        return Info(tuple(tensor.shape), names[tensor.dtype])

    return _Pickled(value, torch.is_tensor, info, array)
