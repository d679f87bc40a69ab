"""TrainState and the one train step: microbatches, objectives, optimizers, EMA, non-finite guard.

`state[k+1] = step(state[k], batch(k), key(seed, k))`: nothing else enters.
"""

from collections.abc import Hashable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dcae_jax import optim, rng, tree
from dcae_jax.config import EmaConfig, RunConfig
from dcae_jax.errors import UserError
from dcae_jax.tasks.base import Batch, Inputs, Metrics, Objective, Task, Variables
from dcae_jax.tree import Tree


@flax.struct.dataclass
class TrainState:
    """All that a run remembers.  No generator, no apply function, no data iterator."""

    step: Any  # int32[], optimizer steps done; a tree of shapes or shardings has those here
    params: Tree  # fp32
    stats: Tree  # running statistics (BatchNorm, LeCam anchors)
    ema: dict[str, Tree]  # decay -> {"params": ..., "stats": ...}, fp32
    opt: dict[str, Any]  # objective -> optax state of its trainable partition


def ema_name(decay: float) -> str:
    """The key of an average in TrainState.ema and in checkpoints."""
    return f"{decay:g}"


def init_state(task: Task, cfg: RunConfig, key: PRNGKeyArray) -> TrainState:
    """A fresh state; traceable, so `jax.eval_shape` gives its shapes without memory."""
    params, stats = task.init(key)
    opt: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for objective in task.objectives:
        trainable, _ = tree.partition(params, objective.trainable)
        for path in tree.flatten(trainable):
            if path in owner:
                raise UserError(
                    f"{path} is trained by both {owner[path]!r} and {objective.name!r}; make their "
                    "patterns disjoint, e.g. task.trainable='ae/.*'"
                )
            owner[path] = objective.name
        opt[objective.name] = optim.make(objective.optim, trainable).init(trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, stats=stats,
        ema=fresh_ema(params, stats, cfg.ema), opt=opt,
    )  # fmt: skip


def fresh_ema(params: Tree, stats: Tree, cfg: EmaConfig) -> dict[str, Tree]:
    """Averages that start at the current values (as copies: the state is donated)."""
    return {
        ema_name(d): jax.tree.map(jnp.copy, {"params": params, "stats": stats}) for d in cfg.decays
    }


# ------------------------------------------------------------------------------------- one batch


def _objective_grads(
    objective: Objective, variables: Variables, inputs: Inputs, carry: Any
) -> tuple[dict[str, Tree], Metrics, Tree, Any]:
    """Gradients of each loss term with respect to the trainable partition only."""
    trainable, frozen = tree.partition(variables.params, objective.trainable)

    def loss(trainable: Tree) -> tuple[dict[str, Array], tuple[Metrics, Tree, Any]]:
        params = tree.merge(trainable, frozen)
        out = objective.loss(variables._replace(params=params), inputs, carry)
        return out.terms, (out.metrics, out.stats, out.carry)

    terms, pullback, (metrics, stats, carry) = jax.vjp(loss, trainable, has_aux=True)
    grads = {}
    for name in terms:
        one_hot = {k: jnp.full_like(v, float(k == name)) for k, v in terms.items()}
        (grads[name],) = pullback(one_hot)
    return grads, metrics, stats, jax.lax.stop_gradient(carry)


def _microbatch(
    task: Task, variables: Variables, inputs: Inputs
) -> tuple[dict[str, dict[str, Tree]], Metrics, Tree]:
    grads, metrics, stats, carry = {}, {}, {}, None
    for objective in task.objectives:
        grads[objective.name], found, new, carry = _objective_grads(
            objective, variables, inputs, carry
        )
        metrics |= found
        stats |= new
    return grads, metrics, stats


def accumulate(
    task: Task, variables: Variables, inputs: Inputs, microbatches: int
) -> tuple[dict[str, dict[str, Tree]], Metrics, Tree]:
    """Gradients per objective and loss term, metrics, and the statistics that changed.

    Microbatch i takes the rows i, i + n, i + 2n, ...: each device keeps its own rows.
    """
    if microbatches == 1:
        return _microbatch(task, variables, inputs)

    def split(x: Array) -> Array:
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

    def body(total: Tree, examples: Tree) -> tuple[Tree, None]:
        part = _microbatch(task, variables, inputs._replace(examples=examples))
        return jax.tree.map(jnp.add, total, part), None

    parts = jax.tree.map(split, inputs.examples)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(
        lambda v, x: _microbatch(task, v, inputs._replace(examples=x)), variables, first
    )
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, metrics, stats), _ = jax.lax.scan(body, zero, parts)
    return grads, metrics, jax.tree.map(lambda x: x / microbatches, stats)


# -------------------------------------------------------------------------------------- one step


def _update(
    objective: Objective, cfg: RunConfig, state: TrainState, grads: dict[str, Tree]
) -> tuple[Tree, optax.OptState, Metrics]:
    """(new trainable parameters, optimizer state, metrics) of one objective.

    Frozen layers of a stack that trains in part have gradient 0 and stay as they are, bit by bit.
    """
    name = objective.name
    grad, metrics = objective.combine(grads, state.step)
    grad = tree.only_selected(grad, objective.trainable, 0.0)
    trainable, _ = tree.partition(state.params, objective.trainable)
    rate = optim.learning_rate(objective.optim, cfg.steps, state.step)
    updates, opt = optim.make(objective.optim, trainable).update(
        grad, state.opt[name], trainable, learning_rate=rate
    )
    updates = tree.only_selected(updates, objective.trainable, -0.0)  # x + -0 is x, for -0 too
    metrics |= {
        f"{name}/lr": rate,
        f"{name}/grad_norm": optax.tree.norm(grad),
        f"{name}/update_norm": optax.tree.norm(updates),
    }
    return optax.apply_updates(trainable, updates), opt, metrics


def _averaged(ema: dict[str, Tree], new: Tree, step: Int[Array, ""], cfg: EmaConfig) -> Tree:
    """`ema + (1 - d) (new - ema)`: exact where nothing moved; frozen leaves stay as they are."""
    out = {}
    for decay in cfg.decays:
        d = jnp.float32(decay)
        if cfg.warmup_steps:
            d = d * (1 - jnp.exp(-(step + 1) / cfg.warmup_steps))
        name = ema_name(decay)
        out[name] = jax.tree.map(lambda e, p, d=d: e + (1 - d) * (p - e), ema[name], new)
    return out


def _finite(metrics: Metrics) -> Array:
    """True if every loss, metric and gradient norm is a number."""
    return jnp.all(jnp.isfinite(jnp.stack(list(metrics.values()))))


def _gradients(
    task: Task, cfg: RunConfig, static: Hashable,
    state: TrainState, constants: Tree, batch: Batch,
) -> tuple[dict[str, dict[str, Tree]], Metrics, Tree]:  # fmt: skip
    """What `accumulate` gives for the batch of `state.step`, prepared with that step's draws."""
    key = rng.key(cfg.seed, state.step, "prepare")
    inputs = task.prepare(key, batch, state.step, static)
    variables = Variables(state.params, state.stats, constants)
    return accumulate(task, variables, inputs, cfg.microbatches)


def train_step(
    task: Task, cfg: RunConfig, static: Hashable,
    state: TrainState, constants: Tree, batch: Batch,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """One optimizer step on the global batch; a non-finite one leaves all but `step` unchanged."""
    grads, metrics, changed = _gradients(task, cfg, static, state, constants, batch)
    stats = {**state.stats, **changed}
    params, opt = dict(tree.flatten(state.params)), {}
    for objective in task.objectives:
        new, opt[objective.name], found = _update(objective, cfg, state, grads[objective.name])
        params |= tree.flatten(new)
        metrics |= found
    params = tree.unflatten(params)
    ema = _averaged(state.ema, {"params": params, "stats": stats}, state.step, cfg.ema)
    finite = _finite(metrics)
    new = state.replace(params=params, stats=stats, ema=ema, opt=opt)
    new = jax.tree.map(partial(jnp.where, finite), new, state)
    metrics["nonfinite"] = 1.0 - finite.astype(jnp.float32)
    return new.replace(step=state.step + 1), metrics


def make_train_step(task: Task, cfg: RunConfig, static: Hashable, shardings: Any) -> Any:
    """The jitted step `(state, constants, batch) -> (state, metrics)`; the state is donated.

    `shardings` is the state's tree of shardings: it goes in and comes out alike.
    """
    return jax.jit(
        partial(train_step, task, cfg, static),
        in_shardings=(shardings, None, None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def loss_and_grads(
    task: Task, cfg: RunConfig, state: TrainState, constants: Tree, batch: Batch
) -> tuple[dict[str, Float[Array, "..."]], Tree]:
    """Metrics and accumulated gradients of a step, without an update (tests, FLOP counts)."""
    grads, metrics, _ = _gradients(task, cfg, task.static(0), state, constants, batch)
    return metrics, grads
