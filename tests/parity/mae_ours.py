"""Our masked autoencoder of a case of mae_cases.py: network, loss and gradients, by the task."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import mae_cases
import numpy as np
import weights

from dcae_jax import config, masking
from dcae_jax.config import RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.models import lmd
from dcae_jax.models.layers import Dtype
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.tasks.base import Inputs, Variables
from dcae_jax.tasks.latents import Normalisation
from dcae_jax.tasks.mask_latents import MaskLatentsConfig, MaskLatentsTask


def task(name: str, **fields: Any) -> MaskLatentsTask:
    """The task of a case; `fields` of the network, e.g. scan=False."""
    case = mae_cases.CASES[name]
    model = LMDConfig(**{**case["net"], "dtype": Dtype.float32, **fields})
    run = RunConfig(
        steps=10, batch=mae_cases.BATCH, data=LatentDataConfig(path="not read"),
        task=MaskLatentsConfig(model=copy.deepcopy(model), norm_target=case["whiten"]),
    )  # fmt: skip
    config.validate(config.resolve(run))
    return run.task.build(run)


def leaf(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """One leaf from weights.py; layer i of a stack has its own path."""
    names = [k.key for k in path]
    if "blocks" not in names:
        return jnp.asarray(weights.weight("/".join(names), like.shape))
    at = names.index("blocks") + 1
    parts = [
        weights.weight("/".join([*names[:at], str(i), *names[at:]]), like.shape[1:])
        for i in range(like.shape[0])
    ]
    return jnp.asarray(np.stack(parts))


def by_layer(grads: Any) -> dict[str, np.ndarray]:
    """{path: value}, stacks taken apart."""
    found = {}
    for path, value in jax.tree_util.tree_flatten_with_path(grads)[0]:
        names = [k.key for k in path]
        if "blocks" not in names:
            found["/".join(names)] = np.asarray(value)
            continue
        at = names.index("blocks") + 1
        for i, part in enumerate(value):
            found["/".join([*names[:at], str(i), *names[at:]])] = np.asarray(part)
    return found


def filled(name: str) -> Any:
    """The parameters of a case."""
    shapes = lmd.abstract_variables(task(name).cfg.model)
    return jax.tree_util.tree_map_with_path(leaf, shapes)["params"]


def compiled(name: str, **fields: Any) -> Any:
    """A function of the parameters that gives what `theirs` gives."""
    made, case, (x, noise) = task(name, **fields), mae_cases.CASES[name], mae_cases.inputs(name)
    split = masking.split(jnp.argsort(jnp.asarray(noise), axis=1), case["keep"])
    channels = jnp.ones(x.shape[-1])
    constants = {"norm": Normalisation(0 * channels, channels)}
    weight = jnp.full((len(x),), 1 / len(x))

    @jax.jit
    def run(params: Any) -> dict[str, Any]:
        def loss(params: Any, x: Any) -> Any:
            variables = Variables({"net": params}, {}, constants)
            inputs = Inputs({"latent": x, "split": split, "weight": weight}, {})
            out = made.objectives[0].loss(variables, inputs, None)
            return out.terms["loss"], made.network(variables, x, split)

        grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (value, y), (grads, dx) = grad(params, jnp.asarray(x))
        return {"loss": value, "y": y, "dx": dx, "grads": grads}

    return run


def named(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same with gradients by path and layer."""
    grads = {f"grad/{k}": v for k, v in by_layer(found["grads"]).items()}
    return {k: np.asarray(v) for k, v in found.items() if k != "grads"} | grads
