"""FID, sFID, KID, IS, precision and recall of one set of images, whoever holds its features."""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float

from dcae_jax.evals import frechet, inception_score, kid, precision_recall, protocol
from dcae_jax.evals.frechet import Gaussian
from dcae_jax.evals.protocol import Preset


class Score(NamedTuple):
    """A number, and its deviation or standard error where it has one."""

    value: float
    error: float | None = None


@runtime_checkable
class Side(Protocol):
    """A set of images by its features; names are those of extract.py."""

    def gaussian(self, array: str) -> Gaussian:
        """Of the features of all images."""
        ...

    def rows(self, array: str) -> Float[np.ndarray, "n c"]:
        """The features of every image."""
        ...


class FeatureScores:
    """Scores of `mine` against `theirs`; what several of them need is computed once."""

    def __init__(self, mine: Side, theirs: Side, preset: Preset) -> None:
        self._mine, self._theirs, self._preset = mine, theirs, preset

    def score(self, metric: str) -> Score:
        """One of them, by its name in protocol.METRICS."""
        array = protocol.METRICS[metric].reference
        match metric:
            case "fid" | "sfid":
                ours, theirs = (side.gaussian(array) for side in (self._mine, self._theirs))
                return Score(frechet.distance(ours, theirs))
            case "kid":
                return Score(*kid.kid(self._mine.rows(array), self._theirs.rows(array)))
            case "is":
                logits, splits = self._mine.rows("logits"), self._preset.splits
                return Score(*inception_score.inception_score(logits, splits))
            case "precision" | "recall":
                return Score(getattr(self._both, metric))
        raise ValueError(metric)

    @functools.cached_property
    def _both(self) -> precision_recall.PrecisionRecall:
        array = protocol.METRICS["precision"].reference
        mine, theirs = self._mine.rows(array), self._theirs.rows(array)
        with jax.set_mesh(None):  # each process on a device of its own
            return precision_recall.precision_recall(mine, theirs)
