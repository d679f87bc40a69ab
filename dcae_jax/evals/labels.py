"""The classes of samples that are drawn to be scored."""

import numpy as np
from jaxtyping import Int32

_LARGEST = 2**28  # from here on torch.randint draws 64 bits for a number


def random_labels(n: int, classes: int, seed: int) -> Int32[np.ndarray, " n"]:
    """n classes, each drawn by itself; the first ones do not depend on n.

    What DC-AE's evaluator draws: torch.randint(0, classes, (n,), generator=G) with a generator on
    the CPU of that seed.  Both take 32 bits of mt19937 modulo `classes`.
    """
    if not (1 <= classes < _LARGEST and 0 <= seed < 2**32):
        raise ValueError(f"{classes} classes (1..2^28 - 1), seed {seed} (0..2^32 - 1)")
    bits = np.random.RandomState(seed).randint(0, 2**32, size=n, dtype=np.uint32)
    return (bits % np.uint32(classes)).astype(np.int32)


def balanced_labels(n: int, classes: int) -> Int32[np.ndarray, " n"]:
    """The classes in turn, 0, 1, 2, ...: each has as many samples as any other, or one more.

    Gives a FID that is lower by about 0.1 than that of random labels.
    """
    return (np.arange(n) % classes).astype(np.int32)
