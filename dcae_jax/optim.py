"""Schedules, parameter groups and the optimizer of one objective, with the table that is printed.

The learning rate is a function of the global step, not of a counter in the optimizer state, so a
replayed or skipped step meets the same rate.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dcae_jax import tree
from dcae_jax.config import OptimConfig, Schedule
from dcae_jax.tree import Tree


def learning_rate(cfg: OptimConfig, steps: int, step: int | Int[Array, ""]) -> Float[Array, ""]:
    """The rate at `step` (0-based) of a run of `steps`; 0 before `cfg.start_step`."""
    k = jnp.asarray(step - cfg.start_step, jnp.float32)
    warm = jnp.clip((k + 1) / max(cfg.warmup_steps, 1), 0.0, 1.0)
    if cfg.warmup_steps == 0:
        warm = jnp.ones(())
    factor = cfg.warmup_from + (1 - cfg.warmup_from) * warm
    rest = max(steps - cfg.start_step - cfg.warmup_steps, 1)
    done = jnp.clip((k - cfg.warmup_steps) / rest, 0.0, 1.0)
    if cfg.schedule is Schedule.cosine:
        factor *= cfg.end_lr + (1 - cfg.end_lr) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    elif cfg.schedule is Schedule.linear:
        factor *= 1 - (1 - cfg.end_lr) * done
    return jnp.where(k >= 0, cfg.lr * factor, 0.0)


def group_of(cfg: OptimConfig, path: str) -> tuple[str, float, float]:
    """(pattern, lr multiplier, weight-decay multiplier) of a parameter; the first match counts."""
    for group in cfg.groups:
        if re.search(group.pattern, path):
            return group.pattern, group.lr, group.weight_decay
    return "(default)", 1.0, 1.0


def _multipliers(cfg: OptimConfig, params: Tree, which: int) -> Tree:
    flat = tree.flatten(params)
    return tree.unflatten({path: group_of(cfg, path)[which] for path in flat})


def make(cfg: OptimConfig, params: Tree) -> optax.GradientTransformation:
    """Clip -> Adam -> decoupled weight decay -> group learning rates, without the schedule.

    The caller multiplies the updates by minus `learning_rate(...)`.  `params` (arrays or shapes)
    are the trainable partition; only they get optimizer state.
    """
    lr, decay = _multipliers(cfg, params, 1), _multipliers(cfg, params, 2)

    def decay_and_scale(updates: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        def leaf(u: Array, p: Array, r: float, d: float) -> Array:
            return r * (u + cfg.weight_decay * d * p)

        return jax.tree.map(leaf, updates, params, lr, decay), state

    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps),
        optax.GradientTransformation(lambda _: optax.EmptyState(), decay_and_scale),
    )


def table(cfg: OptimConfig, params: Tree) -> list[tuple[str, int, float, float]]:
    """Rows (group, parameters, learning rate, weight decay) for the printed table."""
    rows: dict[str, list[float]] = {}
    for path, leaf in tree.flatten(params).items():
        name, lr, decay = group_of(cfg, path)
        row = rows.setdefault(name, [0, lr * cfg.lr, decay * cfg.weight_decay])
        row[0] += leaf.size
    return [(name, int(n), lr, decay) for name, (n, lr, decay) in rows.items()]
