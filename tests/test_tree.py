"""tree.py: paths, partition by pattern, merge."""

import jax
import numpy as np
import pytest

from dcae_jax import tree
from dcae_jax.errors import UserError

PARAMS = {
    "ae": {
        "encoder": {"conv_in": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}},
        "decoder": {"conv_out": {"kernel": np.ones((2, 3))}},
    },
    "disc": {"conv": {"kernel": np.ones(5)}},
}


def test_paths_are_sorted_and_invertible():
    flat = tree.flatten(PARAMS)
    assert list(flat) == [
        "ae/decoder/conv_out/kernel", "ae/encoder/conv_in/bias", "ae/encoder/conv_in/kernel",
        "disc/conv/kernel",
    ]  # fmt: skip
    assert jax.tree.structure(tree.unflatten(flat)) == jax.tree.structure(PARAMS)


def test_partition_matches_whole_paths_and_merge_undoes_it():
    one, rest = tree.partition(PARAMS, "ae/decoder/.*")
    assert list(tree.flatten(one)) == ["ae/decoder/conv_out/kernel"]
    assert set(tree.flatten(rest)) == set(tree.flatten(PARAMS)) - set(tree.flatten(one))
    joined = tree.merge(one, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(PARAMS)
    whole, none = tree.partition(PARAMS, ".*")
    assert tree.size(whole) == tree.size(PARAMS) and none == {}


def test_a_pattern_that_matches_nothing_shows_what_paths_look_like():
    with pytest.raises(UserError, match=r"matches no parameter.*ae/decoder/conv_out/kernel"):
        tree.partition(PARAMS, "decoder/.*")  # found in the path, but not the whole path


def test_sizes():
    assert tree.size(PARAMS) == 6 + 2 + 6 + 5
    assert tree.by_module(PARAMS) == {
        "ae/decoder/conv_out": 6, "ae/encoder/conv_in": 8, "disc/conv": 5,
    }  # fmt: skip
    assert tree.by_module(PARAMS, depth=1) == {"ae": 14, "disc": 5}


STACKS = {
    "net": {
        "in_blocks": {"mlp": {"kernel": np.ones((3, 2, 2)), "bias": np.ones((3, 2))}},
        "patch_embed": {"bias": np.ones(2)},
    }
}


def test_layers_of_a_stack_have_names_of_their_own():
    flat = tree.flatten(STACKS)
    names = [name for path, leaf in flat.items() for name in tree.canonical(path, leaf)]
    assert names == [
        *(f"net/in_blocks/{i}/mlp/bias" for i in range(3)),
        *(f"net/in_blocks/{i}/mlp/kernel" for i in range(3)),
        "net/patch_embed/bias",
    ]
    # Nothing else is a stack: no leading axis, no component that ends in "blocks".
    assert tree.canonical("ae/blocks/scale", np.ones(())) == ["ae/blocks/scale"]
    assert tree.canonical("ae/blocks_1/scale", np.ones(3)) == ["ae/blocks_1/scale"]


@pytest.mark.parametrize(
    ("pattern", "trained", "leaves"),
    [
        ("net/.*", 20, 3),
        ("net/in_blocks/mlp/.*", 18, 2),  # as stored: all layers
        (r"net/in_blocks/[12]/.*", 12, 2),
        (r"net/in_blocks/0/mlp/bias|net/patch_embed/.*", 4, 2),
    ],
)
def test_a_leaf_trains_if_one_of_its_layers_does(pattern, trained, leaves):
    one, rest = tree.partition(STACKS, pattern)
    assert len(tree.flatten(one)) == leaves and len(tree.flatten(rest)) == 3 - leaves
    assert tree.sizes(STACKS, pattern) == (trained, 20 - trained)


def test_only_selected_layers_are_kept():
    found = tree.flatten(tree.only_selected(STACKS, "net/in_blocks/1/mlp/kernel|.*embed.*", 7.0))
    assert found["net/in_blocks/mlp/kernel"][:, 0, 0].tolist() == [7.0, 1.0, 7.0]
    flat = tree.flatten(STACKS)
    for path in ("net/in_blocks/mlp/bias", "net/patch_embed/bias"):  # none of it, and all
        assert found[path] is flat[path]


def test_shortest_names_stand_for_what_is_there_as_a_whole():
    every = tree.flatten(PARAMS)
    whole = [p for p in every if p.startswith("ae/encoder")]
    assert tree.shortest(whole, every) == ["ae/encoder"]
    assert tree.shortest(whole[:1], every) == ["ae/encoder/conv_in/bias"]
    assert tree.shortest([p for p in every if p.startswith("ae/")], every) == ["ae"]
    assert tree.shortest(["a/b"], ["a/b", "a/bc"]) == ["a/b"] and tree.shortest([], every) == []
