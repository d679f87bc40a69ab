"""--dry_run: what a run would be, without data, weights or steps."""

import math
from typing import Any

import jax

from dcae_jax import config as config_lib
from dcae_jax import rng, sharding, step, train, tree
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


def _cost(
    task: train.Task, cfg: RunConfig, state: step.TrainState, mesh: jax.sharding.Mesh
) -> list[str]:
    """FLOPs of a step, counted on its jaxpr; compiles nothing."""
    batch = train.abstract_batch(cfg, mesh)
    constants = task.abstract_constants()
    arguments = state, constants, batch
    whole = flops.count(
        lambda s, c, b: step.train_step(task, cfg, task.static(0), s, c, b), *arguments
    )
    forward = flops.count(lambda s, c, b: _losses(task, cfg, s, c, b), *arguments)
    return [
        f"FLOPs per image: forward {_giga(forward.total / cfg.batch)}, training step "
        f"{_giga(whole.total / cfg.batch)}{_encoding(cfg, constants, batch)} (1 multiply-add = 2 "
        "FLOP; matrix products, convolutions and attention of the jaxpr, what is recomputed "
        f"included{', but not ' + ', '.join(whole.incomplete) if whole.incomplete else ''})",
        f"one step of {cfg.batch}: {_giga(whole.total)}",
        f"{tree.size(state.params):,} parameters in all",
    ]


def _giga(number: float) -> str:
    return f"{number / 1e9:,.2f} GFLOP"


def _losses(
    task: train.Task, cfg: RunConfig, state: step.TrainState, constants: Tree, batch: Batch
) -> list[Any]:
    """The losses of all objectives on a batch: what a step computes but for the gradients."""
    inputs = task.prepare(rng.key(cfg.seed), batch, state.step, task.static(0))
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
