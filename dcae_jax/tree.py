"""Parameter trees and their paths.  A path ("ae/encoder/conv_in/kernel") is public API: freezing,
`init_from`, optimizer groups and conversion speak in paths.
"""

import re
from typing import Any

import jax
from flax import traverse_util

from dcae_jax.errors import UserError

Tree = Any  # nested dict of arrays


def flatten(tree: Tree) -> dict[str, Any]:
    """path -> leaf, in the order of the paths."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def partition(tree: Tree, pattern: str) -> tuple[Tree, Tree]:
    """Splits into (leaves whose path fully matches the regex, the others)."""
    try:
        regex = re.compile(pattern)
    except re.error as e:
        raise UserError(f"the pattern {pattern!r} is not a regular expression: {e}") from e
    flat = flatten(tree)
    hit = {k: v for k, v in flat.items() if regex.fullmatch(k)}
    if not hit:
        raise UserError(
            f"the pattern {pattern!r} matches no parameter; paths look like "
            + ", ".join(list(flat)[:3])
        )
    return unflatten(hit), unflatten({k: v for k, v in flat.items() if k not in hit})


def merge(*trees: Tree) -> Tree:
    """The union of disjoint trees."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat.update(flatten(tree))
    return unflatten(flat)


def size(tree: Tree) -> int:
    """Number of scalars in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def by_module(tree: Tree, depth: int = 3) -> dict[str, int]:
    """Number of parameters of each module, modules cut at `depth` path elements."""
    found: dict[str, int] = {}
    for path, leaf in flatten(tree).items():
        name = "/".join(path.split("/")[:-1][:depth])
        found[name] = found.get(name, 0) + leaf.size
    return found
