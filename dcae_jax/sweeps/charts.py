"""Drawings of a sweep as SVG text: parallel coordinates, and curves of all trials in one panel."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcae_jax.config import JSONValue

BEST, WORST = (53, 116, 184), (217, 130, 43)  # red, green, blue
NONE = "var(--faint)"  # of a trial without a score
_WIDTH, _HEIGHT = 1160, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 120, 44, 30
_LOG_FROM = 10  # a scale is logarithmic from this ratio of positive values on
_TICKS = 6
_LABEL = 0.055  # the height of a label, as a share of an axis
_MAX_POINTS = 200  # of a curve: more cannot be seen


@dataclass(frozen=True, slots=True)
class Line:
    """A trial in a drawing."""

    name: str
    color: str
    best: bool
    values: tuple[JSONValue, ...] = ()  # one for each axis; None: it has none
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Scale:
    """Places of values on an axis: 0 at its beginning, 1 at its end."""

    place: Callable[[JSONValue], float]
    ticks: tuple[JSONValue, ...]


def ramp(rank: float) -> str:
    """A colour between that of the best (0) and of the worst (1)."""
    mixed = (round(b + rank * (w - b)) for b, w in zip(BEST, WORST, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def scale(values: Sequence[JSONValue]) -> Scale:
    """Of the values of an axis: numbers by size, or by its logarithm; others in their order."""
    distinct = list({repr(v): v for v in values if v is not None}.values())
    if not distinct or not all(_is_number(v) for v in distinct):
        last = max(len(distinct) - 1, 1)
        places = {repr(v): i / last if len(distinct) > 1 else 0.5 for i, v in enumerate(distinct)}
        return Scale(lambda v: places[repr(v)], tuple(distinct))
    low, high = min(distinct), max(distinct)
    if low == high:
        return Scale(lambda v: 0.5, (low,))
    if low > 0 and high / low >= _LOG_FROM:
        span = math.log(high / low)
        place = lambda v: math.log(v / low) / span  # noqa: E731
        between = [low * (high / low) ** (i / (_TICKS - 1)) for i in range(_TICKS)]
    else:
        place = lambda v: (v - low) / (high - low)  # noqa: E731
        between = [low + (high - low) * i / (_TICKS - 1) for i in range(_TICKS)]
    return Scale(place, tuple(sorted(distinct) if len(distinct) <= _TICKS else between))


def _is_number(value: JSONValue) -> bool:
    finite = isinstance(value, int | float) and not isinstance(value, bool)
    return finite and math.isfinite(value)


def parallel(axes: Sequence[str], lines: Sequence[Line]) -> str:
    """Each trial as a line over its fields and its score; the best one on top."""
    scales = [scale([line.values[i] for line in lines]) for i in range(len(axes))]
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(axes) - 1, 1)
    parts, labels = [], []
    for i, (name, axis) in enumerate(zip(axes, scales, strict=True)):
        x = _LEFT + i * step
        parts.append(_rule(x, _TOP, x, _HEIGHT - _BOTTOM))
        parts.append(_text(x, 16, name, "middle", "600"))
        labels += [_text(x + 6, _y(axis.place(t)) + 4, _shown(t)) for t in _apart(axis)]
    for line in sorted(lines, key=lambda line: line.best):
        known = [
            (_LEFT + i * step, _y(scales[i].place(value)))
            for i, value in enumerate(line.values) if value is not None
        ]  # fmt: skip
        parts.append(_path(known, line, f"{line.name}: {_shown(line.values[-1])}"))
    return _svg([*parts, *labels], _WIDTH, _HEIGHT)


def _apart(axis: Scale) -> list[JSONValue]:
    """The ticks whose labels do not stand on each other."""
    shown: list[JSONValue] = []
    for tick in axis.ticks:
        if all(abs(axis.place(tick) - axis.place(other)) > _LABEL for other in shown):
            shown.append(tick)
    return shown


def curves(lines: Sequence[Line], width: int = 560, height: int = 300) -> str:
    """A score of every trial over the steps, in one panel."""
    points = [point for line in lines for point in line.points]
    steps, values = scale([x for x, _ in points]), scale([y for _, y in points])
    last = max((x for x, _ in points), default=1.0) or 1.0
    inner = width - _LEFT - 16

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return _LEFT + inner * point[0] / last, _y(values.place(point[1]), height)

    parts = [_rule(_LEFT, height - _BOTTOM, width - 16, height - _BOTTOM)]
    for tick in values.ticks if points else ():
        y = _y(values.place(tick), height)
        parts += [_rule(_LEFT, y, width - 16, y), _text(_LEFT - 8, y + 4, _shown(tick), "end")]
    for tick in {0.0, last} if len(steps.ticks) < 2 else (0.0, last / 2, last):
        x = _LEFT + inner * tick / last
        parts.append(_text(x, height - 10, _shown(float(round(tick))), "middle"))
    for line in sorted(lines, key=lambda line: line.best):
        parts.append(_path([at(p) for p in _thinned(line.points)], line, line.name))
    return _svg(parts, width, height)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    every = max(math.ceil(len(points) / _MAX_POINTS), 1)
    return [*points[:-1:every], *points[-1:]]


def _y(share: float, height: int = _HEIGHT) -> float:
    return height - _BOTTOM - share * (height - _TOP - _BOTTOM)


def _shown(value: JSONValue) -> str:
    if value is None:
        return "no score"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="var(--grid)"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="var(--faint)" stroke="var(--card)" stroke-width="3" paint-order="stroke">'
        f"{html.escape(text)}</text>"
    )


def _path(points: Sequence[tuple[float, float]], line: Line, title: str) -> str:
    """A line that tells what it is when it is pointed at; a single point as a dot."""
    places = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    width = 2.6 if line.best else 1.4
    dot = f"M{places}" if len(points) != 1 else f"M{places}h.01"
    return (
        f'<path class="trial" d="{dot if points else "M0 0"}" stroke="{line.color}" '
        f'stroke-width="{width}" stroke-linecap="round"><title>{html.escape(title)}</title></path>'
    )


def _svg(parts: Sequence[str], width: int, height: int) -> str:
    style = 'font-family="var(--sans)" font-size="12" fill="none"'
    return f'<svg viewBox="0 0 {width} {height}" {style}>{"".join(parts)}</svg>'
