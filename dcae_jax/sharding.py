"""Mesh from config, the parameter rule, batch placement, and `constrain()` for activations.

Axes: `data` (outer, slow: replicas), `fsdp` (parameters and batch), `spatial` (image height,
autoencoders only).  Everything is `jax.sharding` with automatic propagation; the model code only
calls `constrain()` at block boundaries.
"""

import queue
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dcae_jax.config import MeshConfig
from dcae_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")


def constrain(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Pins an activation to batch over (data, fsdp) and, for images, height over `spatial`.

    A no-op outside a mesh.  A height that `spatial` does not divide is left replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, batch_spec(x.shape, dict(mesh.shape)))


def batch_spec(shape: tuple[int, ...], mesh_shape: dict[str, int]) -> PartitionSpec:
    """Spec of an array with a leading batch axis; images (rank 4) split their height too."""
    rows = int(np.prod([mesh_shape[a] for a in BATCH_AXES]))
    first = BATCH_AXES if shape[0] % rows == 0 else None
    if len(shape) == 4 and mesh_shape["spatial"] > 1 and shape[1] % mesh_shape["spatial"] == 0:
        return PartitionSpec(first, "spatial")
    return PartitionSpec(first)


def replicated_heights(heights: dict[str, int], spatial: int) -> list[str]:
    """The stages whose height `spatial` does not divide: they are computed on every device."""
    return [name for name, height in heights.items() if height % spatial]


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of all processes); see `device_grid` for their order."""
    devices = list(devices or jax.devices())
    inner = cfg.fsdp * cfg.spatial
    shape = (cfg.data if cfg.data != -1 else len(devices) // inner, cfg.fsdp, cfg.spatial)
    grid = device_grid(shape, devices)
    return Mesh(grid, ("data", "fsdp", "spatial"), axis_types=(AxisType.Auto,) * 3)


def device_grid(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array (data, fsdp, spatial): `data` is the slow axis between slices and nodes.

    A slice of TPUs, or a node of GPUs, is what jax calls a slice: a fast network inside, a slower
    one between.  `fsdp` and `spatial` stay inside where they fit.  Larger ones may cross nodes of
    GPUs, whole nodes at a time, but never slices of TPUs.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        index = device.slice_index if hasattr(device, "slice_index") else 0
        slices.setdefault(index, []).append(device)
    parts = [slices[i] for i in sorted(slices)]
    sizes, inner = {len(part) for part in parts}, shape[1] * shape[2]
    if len(sizes) > 1:
        raise UserError(
            f"slices (or nodes) of {sorted(sizes)} devices: all must have equally many; leave out "
            "the smaller ones, or mend what is missing there"
        )
    (size,) = sizes
    if size % inner == 0:
        each = (size // inner, *shape[1:])
        return np.concatenate([_arrange(each, part) for part in parts])
    if devices[0].platform == "tpu" or inner % size:
        raise UserError(
            f"mesh.fsdp x mesh.spatial = {inner} does not fit into the {size} devices of a slice "
            "(or node), and only the data axis may cross them; make it a divisor of that number"
            + ("" if devices[0].platform == "tpu" else ", or a multiple: whole nodes")
        )
    return _in_order([device for part in parts for device in _in_order(part)]).reshape(shape)


def _arrange(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices of one slice: as their network suggests, unless that tears batches apart.

    On a torus that order may interleave the devices of two processes, and a process loads one run
    of rows of each batch.  In the order of processes they lie together, and neighbours on it too.
    """
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    processes = {d.process_index for d in devices}
    if all(_rows_of(grid, p) is not None for p in processes):
        return grid
    return _in_order(devices).reshape(shape)


def _in_order(devices: Sequence[Any]) -> np.ndarray:
    """By process, then by number: a one-dimensional array."""
    grid = np.empty(len(devices), object)
    grid[:] = sorted(devices, key=lambda d: (d.process_index, d.id))
    return grid


# ------------------------------------------------------------------------------------------- state

# Leaves below this many scalars are replicated: gathering them costs more than it saves.
SMALL = 2**14


def param_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """The one rule: the largest dimension divisible by `fsdp`; small leaves are replicated."""
    return _shard_largest(shape, PartitionSpec(*[None] * len(shape)), "fsdp", fsdp)


def _shard_largest(
    shape: tuple[int, ...], spec: PartitionSpec, axis: str, count: int
) -> PartitionSpec:
    free = [i for i, n in enumerate(shape) if spec[i] is None and n % count == 0]
    if count == 1 or int(np.prod(shape)) < SMALL or not free:
        return spec
    best = max(free, key=lambda i: shape[i])
    return PartitionSpec(*[axis if i == best else s for i, s in enumerate(spec)])


def _override(path: str, shape: tuple[int, ...], cfg: MeshConfig) -> PartitionSpec | None:
    for entry in cfg.specs:
        pattern, _, axes = entry.partition("->")
        if re.search(pattern.strip(), path):
            names = [None if a.strip() == "None" else a.strip() for a in axes.split(",")]
            if len(names) != len(shape):
                raise UserError(
                    f"mesh.specs: {entry!r} has {len(names)} axes, {path} has shape "
                    f"{shape}; give one axis or None per dimension"
                )
            return PartitionSpec(*names)
    return None


def state_shardings(state: Any, mesh: Mesh, cfg: MeshConfig) -> Any:
    """The sharding of every leaf of an (abstract) train state.

    Parameters follow the rule or the overrides; optimizer state and EMA follow their parameter,
    and with `zero1` are sharded over `data` as well.
    """

    def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = _override(name, x.shape, cfg) if x.ndim else None
        spec = spec or param_spec(x.shape, cfg.fsdp)
        if cfg.zero1 and name.split("/")[0] in ("ema", "opt"):
            spec = _shard_largest(x.shape, spec, "data", mesh.shape["data"])
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_whole(values: Any, mesh: Mesh) -> Any:
    """A tree, which each process has, whole on every device of the mesh.

    By way of the host if there are several processes: what lies on a device of this one cannot go
    to devices of others.
    """

    def on_host(x: Any) -> Any:
        local = isinstance(x, jax.Array) and x.is_fully_addressable
        return np.asarray(x) if local else x

    if jax.process_count() > 1:
        values = jax.tree.map(on_host, values)
    return jax.device_put(values, replicated(mesh))


# ------------------------------------------------------------------------------------------- batch


def row_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process's devices hold the index-th of count parts of each batch.

    Processes that share rows through `spatial` get the same shard and load the same rows.
    """
    found = _rows_of(mesh.devices, jax.process_index())
    if found is None:
        raise UserError(
            f"the devices of process {jax.process_index()} do not hold one aligned block of the "
            "batch; choose fsdp x spatial so that it divides, or is divided by, the devices of a "
            "process"
        )
    return found


def _rows_of(grid: np.ndarray, process: int) -> tuple[int, int] | None:
    """(index, count) of the part of a batch that a process holds; None if it is not one block."""
    rows = grid.reshape(-1, grid.shape[-1])
    mine = [i for i, row in enumerate(rows) if any(d.process_index == process for d in row)]
    size = mine[-1] - mine[0] + 1
    if len(mine) != size or len(rows) % size or mine[0] % size:
        return None
    return mine[0] // size, len(rows) // size


def batch_shardings(batch: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each array of a global batch."""
    shape = dict(mesh.shape)
    return {k: NamedSharding(mesh, batch_spec(v.shape, shape)) for k, v in batch.items()}


def put_batch(local: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows of a batch; the result is the global batch on the whole mesh."""
    index, count = row_shard(mesh)

    def put(x: np.ndarray) -> jax.Array:
        shape = (x.shape[0] * count, *x.shape[1:])
        first = x.shape[0] * index
        sharding = NamedSharding(mesh, batch_spec(shape, dict(mesh.shape)))

        def part(where: tuple[slice, ...]) -> np.ndarray:
            rows = slice((where[0].start or 0) - first, (where[0].stop or shape[0]) - first)
            return x[(rows, *where[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return {k: put(v) for k, v in local.items()}


class Prefetch:
    """Places batches on the devices in a thread, `depth` ahead of the step that uses them."""

    def __init__(self, local: Iterator[dict[str, np.ndarray]], mesh: Mesh, depth: int = 2):
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(local, mesh), daemon=True, name="prefetch"
        )
        self._thread.start()

    def _work(self, local: Iterator[dict[str, np.ndarray]], mesh: Mesh) -> None:
        try:
            for batch in local:
                if not self._put(put_batch(batch, mesh)):
                    return
            self._put(StopIteration())
        except BaseException as e:  # handed to the loop, which raises it
            self._put(e)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the thread; batches that were not used are dropped."""
        self._stop.set()
        self._thread.join()


def on_one_device(shapes: Any) -> Any:
    """Shapes of a tree, each placed whole on this process's first device."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
