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
