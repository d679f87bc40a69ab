"""Scores of a finished evaluation from what its parts hold, float64 on the host.

Parts are read one after the other in the order of the images, so a score does not depend on who
computed which part when.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Float64, Num, UInt8

from dcae_jax.errors import UserError
from dcae_jax.evals import frechet, metrics, parts, protocol
from dcae_jax.evals.feature_scores import FeatureScores, Score
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


class Pixels(NamedTuple):
    """Where the digest of the pixels of a set of images is written."""

    work: Work
    which: int  # of its sets
    block: str  # of the result: "protocol" or "subject"
    fields: tuple[str, ...]


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
    pixels: tuple[Pixels, ...] = ()

    def works(self) -> list[Work]:
        """All whose parts the scores need."""
        other = self.reference.work
        return [self.work] if other in (None, self.work) else [self.work, other]

    @property
    def picture(self) -> str:
        """The file of the grid."""
        return f"grid-{self.name}.png"


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
    """Scores of pairs from their numbers, the others from features."""

    def __init__(self, evaluation: Evaluation, out: epath.Path) -> None:
        self._mine = _Features(Stored(out, evaluation.work))
        reference = evaluation.reference
        other = None if reference.work is None else Stored(out, reference.work)
        theirs = _Features(other, reference.gaussians, reference.prefix)
        preset = protocol.PRESETS[evaluation.protocol["preset"]]
        self._features = FeatureScores(self._mine, theirs, preset)

    def score(self, metric: str) -> Score:
        match metric:
            case "psnr":
                return _mean(_psnr(self._mine.rows("mse")))
            case "ssim" | "ssim-border" | "ms-ssim" | "lpips":
                return _mean(self._mine.rows(metric.replace("-", "_")).astype(np.float64))
            case "latent-rms":
                return _root(self._mine.rows("latent_square").astype(np.float64))
        return self._features.score(metric)


class _Features:
    """What the parts hold of a set of images, or what is known of it: a `Side`."""

    def __init__(
        self, stored: Stored | None, known: dict[str, Gaussian] | None = None, prefix: str = ""
    ) -> None:
        self._stored, self._known, self._prefix = stored, known or {}, prefix
        self._rows: dict[str, np.ndarray] = {}

    def gaussian(self, array: str) -> Gaussian:
        """Of the features of all images, one part in memory at a time."""
        if array in self._known:
            return self._known[array]
        return moments(self._stored, self._prefix + array).gaussian()

    def rows(self, array: str) -> Num[np.ndarray, "n ..."]:
        """An array of all images."""
        if array not in self._rows:
            self._rows[array] = self._stored.whole(self._prefix + array)
        return self._rows[array]


def moments(stored: Stored, name: str) -> frechet.Moments:
    """Sums over the features of all images."""
    found = None
    for features in stored.stream(name):
        found = found or frechet.Moments.zeros(features.shape[1])
        found.add(features)
    return found


def _psnr(mse: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """In dB, infinite for equal images."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(metrics.PEAK**2 / mse.astype(np.float64))


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
    made = {
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
    for pixels in evaluation.pixels:
        digest = Stored(out, pixels.work).digest(pixels.which)
        made[pixels.block] = made[pixels.block] | dict.fromkeys(pixels.fields, digest)
    return made


def changed(evaluation: Evaluation, result: dict[str, Any]) -> list[str]:
    """Names of the sets whose pixels are others than those that `result` was made of.

    Their images are read anew.
    """
    found = []
    for pixels in evaluation.pixels:
        known = result[pixels.block].get(pixels.fields[0])  # None: of an earlier version
        if known not in (None, parts.digest_now(pixels.work, pixels.which)):
            found.append(pixels.work.sets[pixels.which].name)
    return found


def _named(evaluation: Evaluation, metric: str) -> str:
    """What a score is of: a distribution is compared with the reference, pairs are of the data."""
    about = evaluation.protocol
    if protocol.METRICS[metric].reference or metric == "is":  # which is compared with nothing
        return evaluation.reference.name
    return about["originals"] if evaluation.kind is Kind.images else about["data"]


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
        "label": protocol.label(metric, evaluation.kind, n, _named(evaluation, metric)),
        "value": score.value if finite else None, "error": score.error,
        "comparable": standing.comparable and finite, "note": note,
    }  # fmt: skip
