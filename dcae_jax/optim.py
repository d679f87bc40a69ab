"""Schedules, parameter groups and the optimizer of one objective, with the table that is printed.

The learning rate is a function of the global step, not of a counter in the optimizer state, so a
replayed or skipped step meets the same rate.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dcae_jax import tree
from dcae_jax.config import GroupConfig, OptimConfig, Optimizer, Schedule
from dcae_jax.tree import Tree

Multiplier = float | np.ndarray  # for a leaf, or for each layer of a stack


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


def group_of(cfg: OptimConfig, *names: str) -> tuple[str, float, float]:
    """(pattern, lr multiplier, weight-decay multiplier) of a parameter; the first match counts.

    `names`: its path, or for a layer of a stack its own name and that of the stored leaf.
    """
    for group in cfg.groups:
        if any(re.search(group.pattern, name) for name in names):
            return group.pattern, group.lr, group.weight_decay
    return "(default)", 1.0, 1.0


def layer_decay_groups(depth: int, decay: float, trunk: str = "net/encoder") -> list[GroupConfig]:
    """Groups for fine-tuning a transformer: the deeper a layer, the more it learns.

    The rate of layer i of `depth` + 2 is times decay^(depth + 1 - i): 0 are embedding, class token
    and positions, i + 1 is block i, and the last is the rest (final norm, head).  Biases, scales
    and the class token do not decay.  Source: BEiT and MAE (arXiv 2111.06377, table 9).
    """
    patterns = [rf"^{trunk}/(patch_embed/|cls$|pos_embed$)"]
    patterns += [rf"^{trunk}/blocks/{i}/" for i in range(depth)] + [""]
    groups = []
    for i, pattern in enumerate(patterns):
        rate = decay ** (depth + 1 - i)
        flat = rf"{pattern}(.*/)?(bias|scale)$" if pattern else r"(^|/)(bias|scale)$"
        if i == 0:
            flat = rf"^{trunk}/(patch_embed/bias|cls)$"
        groups += [GroupConfig(flat, rate, 0.0), GroupConfig(pattern, rate, 1.0)]
    return groups


def _groups_of(cfg: OptimConfig, path: str, leaf: Any) -> list[tuple[str, float, float]]:
    """The group of each layer of a leaf."""
    return [group_of(cfg, name, path) for name in tree.canonical(path, leaf)]


def _multipliers(cfg: OptimConfig, params: Tree, which: int) -> Tree:
    """A number for each leaf, or a vector along its layers where they differ."""

    def of(path: str, leaf: Any) -> float | np.ndarray:
        values = [group[which] for group in _groups_of(cfg, path, leaf)]
        if len(set(values)) == 1:
            return values[0]
        return tree.along_layers(np.asarray(values, np.float32), leaf)

    return tree.unflatten({path: of(path, leaf) for path, leaf in tree.flatten(params).items()})


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


def _decayed(
    cfg: OptimConfig, u: Array, p: Array, rate: Array, r: Multiplier, d: Multiplier
) -> Array:
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
        def leaf(u: Array, p: Array, r: Multiplier, d: Multiplier) -> Array:
            return _decayed(cfg, u, p, learning_rate, r, d)

        return jax.tree.map(leaf, updates, params, lr, decay), state

    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    return optax.chain(
        clip,
        _direction(cfg),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale),
    )


def table(
    cfg: OptimConfig, params: Tree, trainable: str = ".*"
) -> list[tuple[str, int, float, float]]:
    """Rows (group, parameters, learning rate, weight decay) for the printed table.

    Layers of `params` that `trainable` does not match are a row of their own.
    """
    rows: dict[str, list[float]] = {}
    for path, leaf in tree.flatten(params).items():
        groups = _groups_of(cfg, path, leaf)
        for group, moves in zip(groups, tree.selected(path, leaf, trainable), strict=True):
            name, lr, decay = group if moves else ("(frozen layers)", 0.0, 0.0)
            row = rows.setdefault(name, [0, lr * cfg.lr, decay * cfg.weight_decay])
            row[0] += leaf.size // len(groups)
    return [(name, int(n), lr, decay) for name, (n, lr, decay) in rows.items()]
