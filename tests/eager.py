"""Random weights for tests without a program for all of them."""

from collections.abc import Callable
from typing import Any

import jax
from jax._src.interpreters.partial_eval import dce_jaxpr


def eagerly(init: Callable, key: jax.Array) -> Any:
    """What `init` makes of a key, one draw after the other.

    As one program XLA compiles the generator anew for each parameter, 5 to 25 s; draws of the same
    shape are compiled once in a process.  What nothing depends on (the forward pass) is left out.
    """
    closed, shapes = jax.make_jaxpr(init, return_shape=True)(key)
    wanted = [True] * len(closed.jaxpr.outvars)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, wanted, instantiate=True)
    return jax.tree.unflatten(
        jax.tree.structure(shapes), jax.core.eval_jaxpr(jaxpr, closed.consts, key)
    )
