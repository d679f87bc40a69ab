"""The Inception Score (Salimans et al. 2016), float64 on the host."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from dcae_jax.errors import UserError
from dcae_jax.evals.frechet import require_finite


class Splits(NamedTuple):
    """How images are divided: torch-fidelity shuffles them into 10, ADM takes 5000 in a row."""

    parts: int = 0  # equal ones; 0: by `size`
    size: int = 0  # images of a split; the last one has what is left
    shuffle: int | None = None  # seed; None: in their order

    def __str__(self) -> str:
        how = f"{self.parts} splits" if self.parts else f"splits of {self.size}"
        return how + (", in order" if self.shuffle is None else f", shuffled by {self.shuffle}")

    def of(self, n: int) -> list[Int[np.ndarray, " k"]]:
        """The images of each split."""
        order = np.arange(n)
        if self.shuffle is not None:
            order = np.random.RandomState(self.shuffle).permutation(n)
        parts = self.parts or -(-n // self.size)
        edges = [i * n // parts if self.parts else min(i * self.size, n) for i in range(parts + 1)]
        return [order[a:b] for a, b in itertools.pairwise(edges)]


TORCH_FIDELITY = Splits(parts=10, shuffle=2020)
ADM = Splits(size=5000)


class InceptionScore(NamedTuple):
    """Mean and standard deviation (divided by their number) over the splits."""

    mean: float
    std: float | None  # None of one split, which says nothing of how sure its score is


def inception_score(
    logits: Float[np.ndarray, "n k"], splits: Splits = TORCH_FIDELITY
) -> InceptionScore:
    """exp of the mean divergence of p(class | image) from its mean, over each split.

    Logits are without their bias.  Samples that are sorted by class get a low score where they are
    not shuffled, for a split holds few classes.
    """
    if len(logits) < splits.parts:
        raise UserError(
            f"the Inception Score needs {splits.parts} images or more, got {len(logits)}"
        )
    require_finite(logits)
    scores = [_score(logits[part].astype(np.float64)) for part in splits.of(len(logits))]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)) if scores[1:] else None)


def _score(logits: Float64[np.ndarray, "n k"]) -> float:
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(axis=0)
    # A class that no image can be counts nothing; its p underflows in all images alike.
    log_mean = np.log(np.where(mean > 0, mean, 1.0))
    return float(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))
