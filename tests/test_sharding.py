"""Order of devices: `data` between slices and nodes, `fsdp` and `spatial` inside them."""

import dataclasses

import numpy as np
import pytest

from dcae_jax import sharding
from dcae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fake:
    """What jax says of a device."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "Fake"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def nodes(count, size, processes=1, platform="gpu"):
    """Nodes of so many devices, each with so many processes; in no order at all."""
    each = size // processes
    found = [Fake(i, i // each, i // size, platform) for i in range(count * size)]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def torus(side, slices=1):
    """Slices of side x side chips of v5e, 2 x 2 chips on each host."""
    found = []
    for s in range(slices):
        for host in range(side * side // 4):
            row, column = 2 * (host // (side // 2)), 2 * (host % (side // 2))
            for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
                coords = (column + x, row + y, 0)
                process = s * side * side // 4 + host
                found.append(Fake(len(found), process, s, "tpu", "TPU v5 lite", coords))
    return found


def slices_of(grid):
    """Slices along `data`, and how many each group of fsdp x spatial devices touches at most."""
    rows = grid.reshape(grid.shape[0], -1)
    return [row[0].slice_index for row in rows], max(len({d.slice_index for d in r}) for r in rows)


def blocks(grid):
    """Each process holds one aligned part of a batch, and the parts cover it."""
    found = {p: sharding._rows_of(grid, p) for p in {d.process_index for d in grid.flat}}
    assert None not in found.values(), found
    return found


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("shape", [(16, 1, 1), (4, 4, 1), (8, 1, 2), (2, 4, 2), (2, 8, 1)])
def test_data_is_outside_fsdp_and_spatial_inside_a_node(shape, processes):
    grid = sharding.device_grid(shape, nodes(2, 8, processes))
    assert grid.shape == shape and len(set(grid.flat)) == 16
    order, touched = slices_of(grid)
    assert order == sorted(order) and touched == 1
    blocks(grid)


@pytest.mark.parametrize(("shape", "slices"), [
    ((16, 1, 1), 1), ((8, 2, 1), 1), ((4, 4, 1), 1), ((2, 8, 1), 1), ((1, 16, 1), 1),
    ((4, 1, 4), 1), ((32, 1, 1), 2), ((8, 4, 1), 2), ((2, 16, 1), 2), ((4, 2, 4), 2),
])  # fmt: skip
def test_on_a_torus_the_devices_of_a_process_stay_together(shape, slices):
    """In the order that the torus alone suggests they do not: no pod could load its batches."""
    grid = sharding.device_grid(shape, torus(4, slices))
    assert grid.shape == shape and len(set(grid.flat)) == 16 * slices
    order, touched = slices_of(grid)
    assert order == sorted(order) and touched == 1
    blocks(grid)


def test_fsdp_may_cross_nodes_of_gpus_whole_nodes_at_a_time_but_no_slices_of_tpus():
    grid = sharding.device_grid((2, 16, 1), nodes(4, 8, 8))
    assert [sorted({d.slice_index for d in row.flat}) for row in grid] == [[0, 1], [2, 3]]
    blocks(grid)
    with pytest.raises(UserError, match=r"= 12 does not fit into the 8 devices .*whole nodes"):
        sharding.device_grid((2, 12, 1), nodes(3, 8))
    with pytest.raises(UserError, match=r"= 32 does not fit .*only the data axis") as told:
        sharding.device_grid((1, 32, 1), torus(4, 2))
    assert "whole nodes" not in str(told.value)


def test_nodes_of_different_sizes_are_refused():
    with pytest.raises(UserError, match=r"of \[7, 8\] devices"):
        sharding.device_grid((15, 1, 1), [d for d in nodes(2, 8) if d.id != 3])
