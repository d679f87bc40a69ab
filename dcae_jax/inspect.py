"""--dry_run: what a run would be, without data, weights or steps."""

import math

import jax

from dcae_jax import config as config_lib
from dcae_jax import rng, sharding, step, train, tree
from dcae_jax.config import RunConfig
from dcae_jax.report import flops


def dry_run(cfg: RunConfig) -> int:
    """Prints the resolved config, shapes, parameters by group, tokens, mesh, cost; returns 0."""
    mesh = sharding.make_mesh(cfg.mesh)
    task = cfg.task.build(cfg)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(cfg.seed)))
        lines = [
            config_lib.dumps(cfg), "",
            f"mesh: {' x '.join(f'{k} {v}' for k, v in mesh.shape.items())} over "
            f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {jax.process_count()} process(es)",
            *task.describe(), *task.shapes(mesh.shape["spatial"]), "",
            *train.describe_optimizers(task, state.params), "",
            *_memory(state, mesh, cfg), *_cost(task, cfg, state, mesh),
        ]  # fmt: skip
    print("\n".join(lines))
    return 0


def _memory(state: step.TrainState, mesh: jax.sharding.Mesh, cfg: RunConfig) -> list[str]:
    """Bytes of the state as a whole and on one device."""
    shardings = sharding.state_shardings(state, mesh, cfg.mesh)
    parts = {"parameters": "params", "EMA": "ema", "optimizer": "opt"}
    lines = []
    for title, name in parts.items():
        leaves = jax.tree.leaves(getattr(state, name))
        placed = jax.tree.leaves(getattr(shardings, name))
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
        local = sum(
            math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
            for x, s in zip(leaves, placed, strict=True)
        )
        lines.append(f"{title}: {whole / 2**20:,.1f} MiB, {local / 2**20:,.1f} MiB on each device")
    return lines


def _cost(
    task: train.Task, cfg: RunConfig, state: step.TrainState, mesh: jax.sharding.Mesh
) -> list[str]:
    """FLOPs of a step, counted on its jaxpr; compiles nothing."""
    batch = train.abstract_batch(cfg, mesh)
    constants = jax.eval_shape(task.abstract_constants)
    found = flops.count(
        lambda s, c, b: step.train_step(task, cfg, task.static(0), s, c, b),
        state, constants, batch,
    )  # fmt: skip
    return [
        f"one step: {found.total / 1e9:,.1f} GFLOP, {found.total / cfg.batch / 1e9:,.2f} per image "
        "(matrix products and convolutions of the jaxpr, 2 per multiply-add)",
        f"{tree.size(state.params):,} parameters in all",
    ]
