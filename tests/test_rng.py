"""rng.py: keys are a function of seed, step and names, and of nothing else."""

import itertools

import jax
import numpy as np

from dcae_jax import rng


def bits(*args):
    return tuple(np.asarray(jax.random.key_data(rng.key(*args))).tolist())


def test_same_arguments_same_key_inside_and_outside_jit():
    traced = jax.jit(lambda step: jax.random.key_data(rng.key(3, step, "noise")))
    for step in (0, 1, 2**31 - 1):  # the step is an int32 on the device
        assert tuple(np.asarray(traced(step)).tolist()) == bits(3, step, "noise")


def test_any_other_seed_step_or_name_is_another_key():
    asked = list(
        itertools.product((0, 1, 2), (0, 1, 10_000_000), ((), ("a",), ("a", "b"), ("b", "a")))
    )
    found = {bits(seed, step, *names) for seed, step, names in asked}
    assert len(found) == len(asked)
