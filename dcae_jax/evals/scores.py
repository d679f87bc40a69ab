"""Scores of a finished evaluation from what its parts hold, float64 on the host.

Parts are read one after the other in the order of the images, so a score does not depend on who
computed which part when.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Num, UInt8

from dcae_jax.errors import UserError
from dcae_jax.evals import frechet, inception_score, kid, metrics, precision_recall, protocol
from dcae_jax.evals.frechet import Gaussian
from dcae_jax.evals.parts import Stored, Work
from dcae_jax.evals.protocol import Kind


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the distribution of the images is compared with."""

    name: str  # in brackets behind the name of a score
    digest: str  # of the file, or of which images these are
    gaussians: dict[str, Gaussian] = dataclasses.field(default_factory=dict)  # pool, spatial
    n: int | None = None  # images behind them; None: unknown, or those of `work`
    work: Work | None = None  # whose features are the reference's
    prefix: str = ""  # of the names of these features


Grid = Callable[[epath.Path, str], UInt8[np.ndarray, "h w 3"] | None]  # folder, caption


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One result of metrics.json."""

    name: str
    kind: Kind
    subject: dict[str, Any]  # what was evaluated, for people and programs
    metrics: tuple[str, ...]
    work: Work  # the images that are scored
    reference: Reference
    protocol: dict[str, Any]  # without the number of images
    doubts: dict[str, str | None]  # of the weights of each network
    grid: Grid

    def works(self) -> list[Work]:
        """All whose parts the scores need."""
        other = self.reference.work
        return [self.work] if other in (None, self.work) else [self.work, other]

    @property
    def picture(self) -> str:
        """The file of the grid."""
        return f"grid-{self.name}.png"


class Score(NamedTuple):
    """A number, and its deviation or standard error where it has one."""

    value: float
    error: float | None = None


def least_images(names: tuple[str, ...], n: int) -> None:
    """UserError if n images are too few for one of these metrics."""
    least = {name: protocol.METRICS[name].least for name in names}
    found = [f"{name} needs {count} or more" for name, count in least.items() if n < count]
    if found:
        raise UserError(f"{n} image(s) are too few: {', '.join(found)}; more, or fewer --metrics")


def scores(evaluation: Evaluation, out: epath.Path) -> dict[str, Score]:
    """The scores by metric."""
    found = _Scores(evaluation, out)
    return {metric: found.score(metric) for metric in evaluation.metrics}


class _Scores:
    """What several scores need is computed once."""

    def __init__(self, evaluation: Evaluation, out: epath.Path) -> None:
        self._reference = evaluation.reference
        self._mine = Stored(out, evaluation.work)
        other = evaluation.reference.work
        self._other = None if other is None else Stored(out, other)

    def score(self, metric: str) -> Score:
        match metric:
            case "psnr":
                return _mean(_psnr(self._numbers("mse")))
            case "ssim" | "ms-ssim" | "lpips":
                return _mean(self._numbers(metric.replace("-", "_")))
            case "latent-rms":
                return _root(self._numbers("latent_square"))
            case "fid" | "sfid":
                name = protocol.METRICS[metric].reference
                theirs = self._their_gaussian(name)
                return Score(frechet.distance(_gaussian(self._mine, name), theirs))
            case "kid":
                return Score(*kid.kid(self._pool, self._their_pool))
            case "is":
                return Score(*inception_score.inception_score(self._mine.whole("logits")))
            case "precision" | "recall":
                return Score(getattr(self._both, metric))
        raise ValueError(metric)

    def _numbers(self, name: str) -> Float[np.ndarray, " n"]:
        return self._mine.whole(name).astype(np.float64)

    def _their_gaussian(self, name: str) -> Gaussian:
        if name in self._reference.gaussians:
            return self._reference.gaussians[name]
        return _gaussian(self._other, self._reference.prefix + name)

    @functools.cached_property
    def _pool(self) -> Float[np.ndarray, "n c"]:
        return self._mine.whole("pool")

    @functools.cached_property
    def _their_pool(self) -> Float[np.ndarray, "m c"]:
        return self._other.whole(f"{self._reference.prefix}pool")

    @functools.cached_property
    def _both(self) -> precision_recall.PrecisionRecall:
        return precision_recall.precision_recall(self._pool, self._their_pool)


def _gaussian(stored: Stored, name: str) -> Gaussian:
    """Of the features of all images, one part in memory at a time."""
    return moments(stored, name).gaussian()


def moments(stored: Stored, name: str) -> frechet.Moments:
    """Sums over the features of all images."""
    found = None
    for features in stored.stream(name):
        found = found or frechet.Moments.zeros(features.shape[1])
        found.add(features)
    return found


def _psnr(mse: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Of each image in dB; infinite where it equals its original."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(metrics.PEAK**2 / mse)


def _mean(values: Num[np.ndarray, " n"]) -> Score:
    """The mean over the images and its standard error."""
    if len(values) < 2 or not np.isfinite(values).all():
        return Score(float(values.mean()))
    return Score(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


def _root(squares: Num[np.ndarray, " n"]) -> Score:
    """The root of the mean, and its error from that of the mean."""
    mean, error = _mean(squares)
    root = math.sqrt(mean)
    return Score(root, None if error is None or not root else error / (2 * root))


# ------------------------------------------------------------------------------------ metrics.json


def result(evaluation: Evaluation, out: epath.Path) -> dict[str, Any]:
    """The entry of metrics.json; UserError if there is no image to score."""
    left_out = len(Stored(out, evaluation.work).bad())
    n = evaluation.work.n - left_out
    least_images(evaluation.metrics, n)
    found = scores(evaluation, out)
    about = {"n": n} | ({"left_out": left_out} if left_out else {}) | evaluation.protocol
    return {
        "name": evaluation.name,
        "kind": evaluation.kind.value,
        "subject": evaluation.subject,
        "scores": {
            protocol.key_of(metric, evaluation.kind): _entry(evaluation, metric, score, n, out)
            for metric, score in found.items()
        },
        "protocol": about,
        "pictures": [evaluation.picture],
    }


def _entry(
    evaluation: Evaluation, metric: str, score: Score, n: int, out: epath.Path
) -> dict[str, Any]:
    reference = evaluation.reference
    other = reference.n
    if protocol.METRICS[metric].reference not in reference.gaussians and reference.work is not None:
        other = reference.work.n - len(Stored(out, reference.work).bad())
    standing = protocol.standing(metric, n, other, evaluation.doubts)
    finite = math.isfinite(score.value)
    infinite = "infinite: an image equals its original" if metric == "psnr" else "not finite"
    note = standing.note if finite else infinite
    return {
        "label": protocol.label(metric, evaluation.kind, n, reference.name),
        "value": score.value if finite else None, "error": score.error,
        "comparable": standing.comparable and finite, "note": note,
    }  # fmt: skip
