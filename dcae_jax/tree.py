"""Parameter trees and their paths.  A path ("ae/encoder/conv_in/kernel") is public API: freezing,
`init_from`, optimizer groups and conversion speak in paths.

Equal layers are stored stacked, below a component that ends in "blocks": each leaf there has a
leading layer axis.  Their canonical names are per layer: layer 3 of `net/blocks/attn/qkv/kernel` is
`net/blocks/3/attn/qkv/kernel`.  Patterns may speak of a layer, or of the leaf as it is stored.
"""

import re
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Bool

from dcae_jax.errors import UserError

Tree = Any  # nested dict of arrays


def flatten(tree: Tree) -> dict[str, Any]:
    """path -> leaf, in the order of the paths."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


_STACKED = re.compile(r"(.*?[^/]*blocks)/(.+)")


def canonical(path: str, leaf: Any) -> list[str]:
    """The names of a leaf (an array or a shape): one for each layer of a stack."""
    found = _STACKED.fullmatch(path)
    if not found or not leaf.ndim:
        return [path]
    return [f"{found[1]}/{i}/{found[2]}" for i in range(leaf.shape[0])]


def selected(path: str, leaf: Any, pattern: str) -> Bool[np.ndarray, " n"]:
    """Which layers of a leaf fully match the regex, by their names or that of the stored leaf."""
    names = canonical(path, leaf)
    if re.fullmatch(pattern, path):
        return np.ones(len(names), bool)
    return np.asarray([re.fullmatch(pattern, name) is not None for name in names])


def along_layers(values: Any, leaf: Any) -> np.ndarray:
    """One value for each layer of a leaf, shaped to be broadcast against it."""
    return np.asarray(values).reshape(-1, *[1] * (leaf.ndim - 1))


def only_selected(tree: Tree, pattern: str, other: float) -> Tree:
    """The leaves with `other` in the layers that the regex does not match.

    A leaf that it matches, or does not match, as a whole comes back as it is.
    """

    def layers(path: str, leaf: Any) -> Any:
        chosen = selected(path, leaf, pattern)
        if chosen.all() or not chosen.any():
            return leaf
        return jax.numpy.where(along_layers(chosen, leaf), leaf, other)

    return unflatten({path: layers(path, leaf) for path, leaf in flatten(tree).items()})


def sizes(tree: Tree, pattern: str) -> tuple[int, int]:
    """Numbers of scalars (in layers that match the regex, in the others)."""
    partition(tree, pattern)  # says what is wrong with the regex
    inside = sum(
        round(leaf.size * selected(path, leaf, pattern).mean())
        for path, leaf in flatten(tree).items()
    )
    return inside, size(tree) - inside


def partition(tree: Tree, pattern: str) -> tuple[Tree, Tree]:
    """Splits into (leaves with a layer that fully matches the regex, the others)."""
    try:
        re.compile(pattern)
    except re.error as e:
        raise UserError(f"the pattern {pattern!r} is not a regular expression: {e}") from e
    flat = flatten(tree)
    hit = {k: v for k, v in flat.items() if selected(k, v, pattern).any()}
    if not hit:
        raise UserError(
            f"the pattern {pattern!r} matches no parameter; paths look like "
            + ", ".join(canonical(k, v)[-1] for k, v in list(flat.items())[:3])
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


def shortest(some: Collection[str], every: Collection[str]) -> list[str]:
    """The fewest names for `some` of `every` path: of a part that is among them as a whole, its."""
    others, found = set(every) - set(some), {}
    for path in some:
        parts = path.split("/")
        names = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        alone = (n for n in names if not any(p == n or p.startswith(f"{n}/") for p in others))
        found[next(alone)] = None
    return list(found)


def by_module(tree: Tree, depth: int = 3) -> dict[str, int]:
    """Number of parameters of each module, modules cut at `depth` path elements."""
    found: dict[str, int] = {}
    for path, leaf in flatten(tree).items():
        name = "/".join(path.split("/")[:-1][:depth])
        found[name] = found.get(name, 0) + leaf.size
    return found
