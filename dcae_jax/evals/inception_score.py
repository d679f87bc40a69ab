"""The Inception Score (Salimans et al. 2016), float64 on the host."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from dcae_jax.errors import UserError
from dcae_jax.evals.frechet import require_finite


class InceptionScore(NamedTuple):
    """Mean and standard deviation (divided by their number) over the splits."""

    mean: float
    std: float


def inception_score(
    logits: Float[np.ndarray, "n k"], *, splits: int = 10, seed: int | None = 2020
) -> InceptionScore:
    """exp of the mean divergence of p(class | image) from its mean, over each split.

    As torch-fidelity: logits without their bias, images shuffled by `seed`.  None leaves them in
    their order, which is ADM's evaluator at 50,000 images; samples that are sorted by class get
    a low score then, for a split holds few classes.
    """
    n = len(logits)
    if n < splits:
        raise UserError(f"the Inception Score needs {splits} images or more, got {n}")
    require_finite(logits)
    order = np.arange(n) if seed is None else np.random.RandomState(seed).permutation(n)
    edges = [i * n // splits for i in range(splits + 1)]
    parts = (order[a:b] for a, b in itertools.pairwise(edges))
    scores = [_score(logits[part].astype(np.float64)) for part in parts]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(logits: Float64[np.ndarray, "n k"]) -> float:
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(axis=0)
    # A class that no image can be counts nothing; its p underflows in all images alike.
    log_mean = np.log(np.where(mean > 0, mean, 1.0))
    return float(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))
