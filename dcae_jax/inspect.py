"""--dry_run: what a run would be, without data, weights or steps."""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax

from dcae_jax import config as config_lib
from dcae_jax import programs, rng, sharding, step, train, tree
from dcae_jax.config import RunConfig
from dcae_jax.data import latents
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.online import OnlineDataConfig
from dcae_jax.report import flops
from dcae_jax.tasks.base import Batch, Variables
from dcae_jax.tree import Tree


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
            *task.describe(), *task.shapes(mesh.shape["spatial"]), *_cache(cfg), "",
            *train.describe_optimizers(task, state.params), "",
            *_memory(state, mesh, cfg), *_cost(task, cfg, state, mesh),
        ]  # fmt: skip
    print("\n".join(lines))
    return 0


def state_bytes(cfg: RunConfig) -> int:
    """Bytes of a checkpoint: parameters, statistics, EMA, optimizer; computes nothing."""
    task = cfg.task.build(cfg)
    state = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(cfg.seed)))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _cache(cfg: RunConfig) -> list[str]:
    """What is there of the latents, where they are cached."""
    data = cfg.data
    if not isinstance(data, LatentDataConfig):
        return []
    where = latents.folder(data.path, data.split)
    if not (where / latents.MANIFEST).exists():
        return [
            f"no cache at {where} yet: shapes are those the network asks for; training needs it "
            "(python -m dcae_jax cache-latents)"
        ]
    found = data.manifest()
    return [
        f"cache {where}: {found.images:,} latents of {found.num_classes} classes by "
        f"{found.description}, RMS {found.rms:.4g}, scaling factor {found.scaling_factor:.4g}"
    ]


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


class _Cost(NamedTuple):
    """FLOPs of a step of one program, or the mean over a run."""

    forward: float
    whole: float


def _cost(
    task: train.Task, cfg: RunConfig, state: step.TrainState, mesh: jax.sharding.Mesh
) -> list[str]:
    """FLOPs of a step, counted on its jaxpr; compiles nothing."""
    batch = train.abstract_batch(cfg, mesh)
    constants = task.abstract_constants()
    needed, costs, hidden = programs.plan(task, 0, cfg.steps), {}, {}
    for key in needed:
        whole, forward = _count(task, cfg, key, (state, constants, batch))
        costs[key] = _Cost(forward.total, whole.total)
        hidden |= dict.fromkeys(whole.incomplete)
    mean = _mean(needed, costs)
    several = f" (mean over the {cfg.steps:,} steps)" if len(needed) > 1 else ""
    return [
        f"FLOPs per image: forward {_giga(mean.forward / cfg.batch)}, training step "
        f"{_giga(mean.whole / cfg.batch)}{several}{_encoding(cfg, constants, batch)} (1 "
        "multiply-add = 2 FLOP; matrix products, convolutions and attention of the jaxpr, what is "
        f"recomputed included{', but not ' + ', '.join(hidden) if hidden else ''})",
        *_programs(needed, costs, cfg.batch),
        f"one step of {cfg.batch}: {_giga(mean.whole)}",
        f"{tree.size(state.params):,} parameters in all",
    ]


def _count(
    task: train.Task, cfg: RunConfig, static: Hashable, arguments: tuple[Any, ...]
) -> tuple[flops.Flops, flops.Flops]:
    """The training step and its losses alone."""
    whole = flops.count(lambda s, c, b: step.train_step(task, cfg, static, s, c, b), *arguments)
    return whole, flops.count(lambda s, c, b: _losses(task, cfg, static, s, c, b), *arguments)


def _mean(needed: dict[Hashable, programs.Stretch], costs: dict[Hashable, _Cost]) -> _Cost:
    """Over the steps of a run."""
    steps = sum(s.steps for s in needed.values())
    return _Cost(*(
        sum(costs[key][i] * s.steps for key, s in needed.items()) / steps for i in range(2)
    ))  # fmt: skip


def _programs(
    needed: dict[Hashable, programs.Stretch], costs: dict[Hashable, _Cost], batch: int
) -> list[str]:
    """Each program where there are several: when it is needed, what it costs per image."""
    if len(needed) < 2:
        return []
    return [
        f"{len(needed)} programs:",
        *(
            f"  {key}: from step {s.first:,}, {s.steps:,} steps, forward "
            f"{_giga(costs[key].forward / batch)}, training step {_giga(costs[key].whole / batch)}"
            for key, s in needed.items()
        ),
    ]


def _giga(number: float) -> str:
    return f"{number / 1e9:,.2f} GFLOP"


def _losses(
    task: train.Task, cfg: RunConfig, static: Hashable,
    state: step.TrainState, constants: Tree, batch: Batch,
) -> list[Any]:  # fmt: skip
    """The losses of all objectives on a batch: what a step computes but for the gradients."""
    inputs = task.prepare(rng.key(cfg.seed), batch, state.step, static)
    variables, carry, found = Variables(state.params, state.stats, constants), None, []
    for objective in task.objectives:
        loss = objective.loss(variables, inputs, carry)
        carry = loss.carry
        found.append(loss.terms)
    return found


def _encoding(cfg: RunConfig, constants: Tree, batch: dict[str, Any]) -> str:
    """What encoding the images costs of each of both, where a diffusion model does that."""
    if not isinstance(cfg.data, OnlineDataConfig):
        return ""
    encode = flops.count(cfg.data.encode, constants["encoder"], batch["image"])
    return f", of each the frozen encoder {_giga(encode.total / cfg.batch)}"
