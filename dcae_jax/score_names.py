"""What scores are called, and which way is better: for configs, evaluators, reports.  No jax."""

import enum
import re
from collections.abc import Sequence


class Better(enum.Enum):
    """Which of two values of a score is the better one."""

    higher = "higher"
    lower = "lower"


_COUNT = r"(\d+k?)?$"  # names of scores of sets carry how many images those have
_DIRECTIONS = (
    (r"psnr|ssim(-border)?$|ms[_-]ssim$|accuracy$|top\d+$|r2_", Better.higher),
    (rf"(is|precision|recall){_COUNT}", Better.higher),
    (r"lpips(_vgg)?$|frechet$|loss|cross_entropy$|mse_", Better.lower),
    (rf"([rgs]?fid|kid){_COUNT}", Better.lower),
)


def better(metric: str) -> Better | None:
    """Which way is better, by the name of a score; None where neither is, or it is not known."""
    return next((way for pattern, way in _DIRECTIONS if re.match(pattern, metric)), None)


def best(metric: str, values: Sequence[float]) -> float | None:
    """The best of the values; None where none is better than another."""
    way = better(metric)
    if way is None or not values:
        return None
    return max(values) if way is Better.higher else min(values)


def count(n: int) -> str:
    """How many images, as names of scores say it: 64, 2048, 50k; "k" for whole thousands only."""
    return f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else f"{n}"


def named(score: str, n: int) -> str:
    """The name of a score of a set of n images: rfid64, fid50k."""
    return f"{score}{count(n)}"


_ERROR = "_error"


def error(metric: str) -> str:
    """The name of the error of a score: kid2048_error."""
    return f"{metric}{_ERROR}"


def is_error(metric: str) -> bool:
    """Whether it is the name of an error, not of a score."""
    return metric.endswith(_ERROR)


def images(metric: str) -> int | None:
    """How many images a name says; None where it says nothing."""
    number = parts(metric)[1]
    if not number:
        return None
    return int(number.removesuffix("k")) * (1000 if number.endswith("k") else 1)


def parts(metric: str) -> tuple[str, str]:
    """The inverse: (score, how many images or "")."""
    match = re.fullmatch(rf"(r?fid|sfid|kid|is|precision|recall){_COUNT}", metric)
    return (match[1], match[2] or "") if match else (metric, "")
