"""Schedules, parameter groups and the optimizer of one objective, with the table that is printed.

The learning rate is a function of the global step, not of a counter in the optimizer state, so a
replayed or skipped step meets the same rate.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dcae_jax import tree
from dcae_jax.config import OptimConfig, Optimizer, Schedule
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
    if cfg.milestones:
        firsts = jnp.asarray([first_step(share, steps) for share, _ in cfg.milestones])
        factors = jnp.asarray([1.0, *(factor for _, factor in cfg.milestones)], jnp.float32)
        factor *= factors[jnp.sum(step >= firsts)]
    return jnp.where(k >= 0, cfg.lr * factor, 0.0)


def first_step(share: float, steps: int) -> int:
    """The first step that lies at or behind `share` of a run of `steps`."""
    return math.ceil(round(share * steps, 6))  # 0.55 * 100 is a little above 55


def group_of(cfg: OptimConfig, path: str) -> tuple[str, float, float]:
    """(pattern, lr multiplier, weight-decay multiplier) of a parameter; the first match counts."""
    for group in cfg.groups:
        if re.search(group.pattern, path):
            return group.pattern, group.lr, group.weight_decay
    return "(default)", 1.0, 1.0


def _multipliers(cfg: OptimConfig, params: Tree, which: int) -> Tree:
    flat = tree.flatten(params)
    return tree.unflatten({path: group_of(cfg, path)[which] for path in flat})


class AdanState(NamedTuple):
    """Running means of Adan: of the gradient, of its differences, of its look-ahead's square."""

    count: Int[Array, ""]
    mean: Tree
    difference: Tree
    square: Tree
    previous: Tree  # the last gradient


def scale_by_adan(b1: float, b2: float, b3: float, eps: float) -> optax.GradientTransformation:
    """Adan's step without learning rate and weight decay (arXiv 2208.06677, algorithm 1).

    As in the authors' code all three means are corrected for their start at zero.  `optax.adan`
    0.2.8 is no replacement: it weighs the differences by 1 - b2 in place of b2.
    """

    def init(params: Tree) -> AdanState:
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(4)]
        return AdanState(jnp.zeros((), jnp.int32), *zeros)

    def update(grads: Tree, state: AdanState, params: Tree = None) -> tuple[Tree, AdanState]:
        t = optax.safe_increment(state.count)
        fix1, fix2, fix3 = (1 - b**t for b in (b1, b2, b3))

        def change(g: Array, before: Array) -> Array:
            return jnp.where(state.count > 0, g - before, 0.0)

        def step(m: Array, v: Array, n: Array) -> Array:
            return (m / fix1 + b2 * v / fix2) / (jnp.sqrt(n / fix3) + eps)

        def moved(old: Tree, new: Tree, b: float) -> Tree:
            return jax.tree.map(lambda a, x: b * a + (1 - b) * x, old, new)

        d = jax.tree.map(change, grads, state.previous)
        ahead = jax.tree.map(lambda g, x: jnp.square(g + b2 * x), grads, d)
        m, v = moved(state.mean, grads, b1), moved(state.difference, d, b2)
        n = moved(state.square, ahead, b3)
        return jax.tree.map(step, m, v, n), AdanState(t, m, v, n, grads)

    return optax.GradientTransformation(init, update)


def _direction(cfg: OptimConfig) -> optax.GradientTransformation:
    """What a learning rate of 1 subtracts, without weight decay."""
    if cfg.optimizer is Optimizer.adan:
        return scale_by_adan(cfg.beta1, cfg.beta2, cfg.beta3, cfg.eps)
    return optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps)


def _decayed(cfg: OptimConfig, u: Array, p: Array, rate: Array, r: float, d: float) -> Array:
    """What is added to a parameter p: r and d are its group's multipliers.

    AdamW: -rate (u + decay p).  Adan's decay is proximal: p to (p - rate u) / (1 + rate decay).
    """
    added = -rate * (r * (u + cfg.weight_decay * d * p))
    if cfg.optimizer is Optimizer.adan:
        return added / (1 + rate * r * cfg.weight_decay * d)
    return added


def make(cfg: OptimConfig, params: Tree) -> optax.GradientTransformationExtraArgs:
    """Clip -> Adam or Adan -> learning rate and weight decay, with those of the groups.

    `update(grads, state, params, learning_rate=...)` gives what is added to the parameters; the
    rate is that of `learning_rate(...)`.  `params` (arrays or shapes) are the trainable partition;
    only they get optimizer state.
    """
    lr, decay = _multipliers(cfg, params, 1), _multipliers(cfg, params, 2)

    def scale(
        updates: Tree, state: Any, params: Tree, *, learning_rate: Array, **_: Any
    ) -> tuple[Tree, Any]:
        def leaf(u: Array, p: Array, r: float, d: float) -> Array:
            return _decayed(cfg, u, p, learning_rate, r, d)

        return jax.tree.map(leaf, updates, params, lr, decay), state

    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    return optax.chain(
        clip,
        _direction(cfg),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale),
    )


def table(cfg: OptimConfig, params: Tree) -> list[tuple[str, int, float, float]]:
    """Rows (group, parameters, learning rate, weight decay) for the printed table."""
    rows: dict[str, list[float]] = {}
    for path, leaf in tree.flatten(params).items():
        name, lr, decay = group_of(cfg, path)
        row = rows.setdefault(name, [0, lr * cfg.lr, decay * cfg.weight_decay])
        row[0] += leaf.size
    return [(name, int(n), lr, decay) for name, (n, lr, decay) in rows.items()]
