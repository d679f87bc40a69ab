"""Curves of a report as inline SVG, drawn by matplotlib in the colours of the page.

Text stays text (the reader's fonts), grey tones become the page's CSS variables, so that a picture
fits a light and a dark page.  Phases stand one after the other on one axis of steps.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dcae_jax import score_names
from dcae_jax.report import diffusion
from dcae_jax.report import phases as phases_lib
from dcae_jax.report.phases import Phase

COLORS = ("#3574b8", "#d9822b", "#2e9267", "#b8487a", "#7a62b3", "#8a7a4c", "#4b9fb0")
_MAX_POINTS = 400  # per curve and phase: more cannot be seen at this size
_SMOOTH_FROM = 60  # points from which on a moving average is drawn over the values
# Stand-ins in the SVG for what the page's style sheet decides.
_CSS = {"#0a0b0c": "var(--ink)", "#0d0e0f": "var(--grid)", "#1a1b1c": "var(--faint)"}
_INK, _GRID, _FAINT = _CSS
VALIDATION = "Validation loss"  # a panel's title
# Of class scores: metric -> baselines that are drawn, with a short name and a style.
_LEVELS = {
    "accuracy": {"chance": ("chance", "dashed"), "training-latents": ("training", "dotted")},
    "frechet": {"mean-of-training": ("mean", "dashed"), "training-latents": ("training", "dotted")},
}
_MAX_CURVES = 5  # of one evaluator over the time of the process
_LOSS_TERMS = {"l1", "l2", "mse", "lpips", "kl", "gan", "adversarial", "hinge", "r1", "lecam"}


@dataclass(slots=True)
class Series:
    """One curve: a value per row key, over all phases."""

    label: str
    key: str
    color: str
    dashed: bool = False
    kind: str = "noisy"  # noisy: smoothed when long; plain: a line; measured: with a dot per value


@dataclass(slots=True)
class Level:
    """A horizontal line: a baseline."""

    label: str
    value: float | int
    color: str
    style: str


@dataclass(slots=True)
class Panel:
    """One diagram."""

    title: str
    series: list[Series]
    levels: list[Level] = field(default_factory=list)
    log: bool = False  # a logarithmic axis, where the values allow and need one
    only: str | None = None  # a phase's name: draw this phase alone
    scale: float = 1.0  # values are multiplied by this
    floor: float | None = None  # where the axis begins; None: where the values do


# ---------------------------------------------------------------------------- which panels


def panels(phases: Sequence[Phase]) -> list[Panel]:
    """The panels that the recorded numbers allow, the important ones first."""
    keys = _keys(phases)
    pooled = _quality(phases, "psnr_pooled", "PSNR, pooled (dB)")
    rates = _train(keys, lambda name: re.search(r"(^|/)lr(_|$)", name))
    for series in rates:
        series.kind = "plain"
    found = [
        pooled if pooled.series else _quality(phases, "psnr", "PSNR, mean per image (dB)"),
        _quality(phases, "ssim", "SSIM"),
        *_by_images(phases, ("ms_ssim", "lpips", "lpips_vgg", "rfid")),
        _samples(phases, "accuracy", "Accuracy by nearest class mean"),
        _samples(phases, "frechet", "Fréchet distance"),
        *_by_images(phases, phases_lib.METRICS_OF_SAMPLES),
        _validation(phases),
        Panel("Loss and its terms", _train(keys, _is_loss), log=True),
        *_adversarial(phases),
        Panel("Gradient norms", _train(keys, lambda name: name.endswith("grad_norm")), log=True),
        Panel("Learning rate", rates, floor=0.0),
        Panel("Throughput (images/s)", _alone(keys, "images_per_s"), floor=0.0),
        Panel(
            "Waiting for data (%)", _train(keys, lambda n: n == "data_wait"), scale=100.0, floor=0.0
        ),
    ]
    return [panel for panel in found if panel.series]


def other_panels(phases: Sequence[Phase]) -> list[Panel]:
    """One small panel for every recorded training scalar that `panels` leaves out."""
    shown = {series.key for panel in panels(phases) for series in panel.series}
    rest = [key for key in _keys(phases) if key.startswith("train/") and key not in shown]
    return [Panel(key.removeprefix("train/"), [Series("", key, COLORS[0])]) for key in rest]


def _keys(phases: Sequence[Phase]) -> list[str]:
    found = {key for phase in phases for row in phase.rows for key, v in row.items() if _real(v)}
    return sorted(found - {"step", "time"})


def _real(value: Any) -> bool:
    return isinstance(value, int | float)


def _train(keys: Sequence[str], wanted: Callable[[str], Any]) -> list[Series]:
    names = [key.removeprefix("train/") for key in keys if key.startswith("train/")]
    chosen = sorted((name for name in names if wanted(name)), key=lambda n: (n != "loss", n))
    return [Series(name, f"train/{name}", COLORS[i % len(COLORS)]) for i, name in enumerate(chosen)]


def _alone(keys: Sequence[str], name: str) -> list[Series]:
    """The one curve of a panel that already bears its name."""
    return [Series("", f"train/{name}", COLORS[0])] if f"train/{name}" in keys else []


def _is_loss(name: str) -> bool:
    last = name.rsplit("/", 1)[-1]
    return "loss" in last or last in _LOSS_TERMS


def _quality(phases: Sequence[Phase], metric: str, title: str) -> Panel:
    """Evaluators by colour (training crops dashed), baselines of the same colour as levels."""
    panel = Panel(title, [])
    keys = set(_keys(phases))
    sizes: list[int] = []
    for name in phases_lib.evaluators(phases):
        size = phases_lib.resolution(name) or 0
        sizes += [size] if size not in sizes else []
        color = COLORS[sizes.index(size) % len(COLORS)]
        if f"{name}/{metric}" in keys:
            held_out = phases_lib.is_held_out(name)
            sampled = phases_lib.scores_samples(phases, name)
            label = name if sampled else phases_lib.describe(name)
            panel.series.append(Series(label, f"{name}/{metric}", color, not held_out, "measured"))
            panel.levels += _levels(phases, name, metric, color) if held_out else []
    return panel


def _by_images(phases: Sequence[Phase], wanted: Sequence[str]) -> list[Panel]:
    """A panel for each score that some evaluator has, whatever number of images its name says."""
    names = {m for name in phases_lib.evaluators(phases) for m in phases_lib.measured(phases, name)}
    found = [m for m in phases_lib.main_metrics(names) if score_names.parts(m)[0] in wanted]
    return [_quality(phases, metric, phases_lib.heading(metric)) for metric in found]


def _levels(phases: Sequence[Phase], evaluator: str, metric: str, color: str) -> list[Level]:
    """Bicubic dashed; of the PCA baselines the one of most components (equal rate) dotted."""
    found = phases_lib.baselines(phases).get(evaluator, {})
    pca = [name for name in found if re.fullmatch(r"pca-\d+", name)]
    best = max(pca, key=lambda name: int(name[4:]), default=None)
    levels = []
    for name in found:
        if metric in found[name] and (name.startswith("bicubic") or name == best):
            style = "dotted" if name == best else "dashed"
            kind = f"PCA {name[4:]}" if name == best else name.split("-")[0]
            label = f"{kind}, {phases_lib.resolution(evaluator)} px"
            levels.append(Level(label, found[name][metric], color, style))
    return levels


def _samples(phases: Sequence[Phase], metric: str, title: str) -> Panel:
    """A class score, the untrained model among them; chance and data as levels."""
    panel = Panel(title, [], floor=0.0)
    for i, name in enumerate(diffusion.of_kind(phases, diffusion.Kind.classes)):
        color = COLORS[i % len(COLORS)]
        panel.series.append(Series(name, f"{name}/{metric}", color, kind="measured"))
        found = phases_lib.baselines(phases).get(name, {})
        for row, (label, style) in _LEVELS[metric].items():
            if metric in found.get(row, {}):
                panel.levels.append(Level(label, found[row][metric], color, style))
    return panel


def _validation(phases: Sequence[Phase]) -> Panel:
    names = diffusion.of_kind(phases, diffusion.Kind.loss)
    series = [
        Series(name, f"{name}/loss", COLORS[i % len(COLORS)], kind="measured")
        for i, name in enumerate(names)
    ]
    return Panel(VALIDATION, series, log=True)


def _adversarial(phases: Sequence[Phase]) -> list[Panel]:
    """Adaptive weight and D's update norm, of the phases that have them."""
    found = []
    for phase in phases:
        for what, key in phases_lib.adversarial_keys(phase).items():
            title = f"{what[0].upper()}{what[1:]} ({phase.name})"
            found.append(Panel(title, [Series("", key, COLORS[3])], only=phase.name, floor=0.0))
    return found


# ---------------------------------------------------------------------------- drawing


def svg(panel: Panel, phases: Sequence[Phase], width: float = 5.2, height: float = 2.9) -> str:
    """The panel as an <svg> element; sizes in inches of 72 px."""
    drawn = [p for p in phases if panel.only in (None, p.name) and p.ran]
    return _figure(panel.title, lambda axes: _draw(axes, panel, drawn), width, height)


def time_svgs(phases: Sequence[Phase]) -> list[str]:
    """The validation loss over the time of the process, a curve for some steps of the training."""
    names = diffusion.of_kind(phases, diffusion.Kind.loss)
    found = [(phase, name, diffusion.by_time(phase, name)) for phase in phases for name in names]
    return [_figure(f"{phase.name} {name}", lambda axes, c=curves, n=name: _draw_times(axes, c, n))
            for phase, name, curves in found if curves]  # fmt: skip


def _draw_times(axes: Any, curves: dict[int, list[tuple[float, float]]], name: str) -> None:
    """Later steps in stronger colour."""
    steps = diffusion.spread(sorted(curves), _MAX_CURVES)
    for i, step in enumerate(steps):
        x, y = np.array(curves[step], float).T
        strength = 0.25 + 0.75 * (i + 1) / len(steps)
        axes.plot(
            x, y, color=COLORS[0], alpha=strength, lw=1.6, marker="o", ms=2.8, label=f"step {step}"
        )
    axes.set_ylim(bottom=0)
    _dress(axes, f"Loss by time: 0 is data, 1 is noise ({name})", 1)


def _figure(
    title: str, draw: Callable[[Any], None], width: float = 5.2, height: float = 2.9
) -> str:
    """What `draw` puts on the axes, as an <svg> element; sizes in inches of 72 px."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids must differ between the pictures of one page
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        axes = figure.subplots()
        draw(axes)
        below = 0.28 + 0.17 * _legend(axes)  # inches
        figure.subplots_adjust(left=0.115, right=0.96, top=1 - 0.42 / height, bottom=below / height)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue())


def _draw(axes: Any, panel: Panel, phases: Sequence[Phase]) -> None:
    """Curves, baselines, phase borders, legend."""
    starts = np.cumsum([0, *(phase.steps for phase in phases)])
    for series in panel.series:
        first = True
        for start, phase in zip(starts, phases, strict=False):
            label = series.label if first else ""
            first = not _curve(axes, series, phase, int(start), panel.scale, label) and first
    _scale(axes, panel)
    for level in panel.levels:
        axes.axhline(
            level.value, color=level.color, ls=level.style, lw=1, alpha=0.75, label=level.label
        )
    _dress(axes, panel.title, max(int(starts[-1]), 1))
    _borders(axes, phases, starts)


def _scale(axes: Any, panel: Panel) -> None:
    """The value axis: plain numbers; not stretched by a beginning far below everything else."""
    from matplotlib import ticker

    values = np.concatenate([np.zeros(0), *(line.get_ydata() for line in axes.lines)])
    values = values[np.isfinite(values)]
    axes.margins(y=0.08)
    if panel.log and values.size and 0 < 10 * values.min() < values.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    if panel.floor is not None:
        highest = max([*values, *(level.value for level in panel.levels)], default=None)
        axes.set_ylim(panel.floor, 1.08 * highest if panel.levels and highest else None)
    elif panel.levels and values.size:
        levels = [level.value for level in panel.levels]
        lowest, highest = min(np.quantile(values, 0.2), *levels), max(values.max(), *levels)
        margin = 0.1 * (highest - lowest)
        axes.set_ylim(lowest - margin, highest + margin)


def _curve(axes: Any, series: Series, phase: Phase, start: int, scale: float, label: str) -> bool:
    """One phase's part of a curve; False where the phase did not record it."""
    pairs = [(r["step"], r[series.key]) for r in phase.rows if _real(r.get(series.key))]
    if not pairs:
        return False
    x, y = np.array(pairs, float).T
    x, y = x + start, y * scale
    line = {"color": series.color, "ls": "--" if series.dashed else "-", "label": label}
    if series.kind == "measured":
        axes.plot(x, y, lw=1.6, marker="o", ms=2.8, **line)
    elif series.kind == "plain" or len(x) < _SMOOTH_FROM:
        axes.plot(*thinned(x, y), lw=1.4, **line)
    else:
        axes.plot(*thinned(x, y), color=series.color, lw=0.7, alpha=0.3)
        axes.plot(*thinned(x, smoothed(y, len(y) / 40)), lw=1.6, **line)
    return True


def smoothed(y: Float[np.ndarray, "n"], window: float) -> Float[np.ndarray, "n"]:
    """Exponential moving average, corrected for its start; non-finite values are skipped."""
    decay, total, weight, out = 1 - 1 / max(window, 1.0), 0.0, 0.0, []
    for value in y:
        if np.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        out.append(total / weight if weight else np.nan)
    return np.array(out)


def thinned(
    x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """At most `_MAX_POINTS` points, evenly chosen, the last one among them."""
    if len(x) <= _MAX_POINTS:
        return x, y
    chosen = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).round().astype(int))
    return x[chosen], y[chosen]


def _dress(axes: Any, title: str, last: int) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK, pad=14)
    axes.set_xlim(0, last)
    axes.grid(True, axis="y", color=_GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, length=0, labelsize=8, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)


def _borders(axes: Any, phases: Sequence[Phase], starts: Int[np.ndarray, "n"]) -> None:
    """A line where a phase begins, above it its number and, if there is room, its name."""
    transform, (_, last) = axes.get_xaxis_transform(), axes.get_xlim()
    ends = [*starts[1:], last]
    for number, (start, end, phase) in enumerate(zip(starts, ends, phases, strict=False), 1):
        if start:
            axes.axvline(start, color=_FAINT, lw=0.8, ls=(0, (2, 3)))
        label = f" {number}" + (f" {phase.name}" if end - start > 0.3 * last else "")
        axes.text(start, 1.02, label, transform=transform, fontsize=7.5, color=_FAINT)


def _legend(axes: Any, columns: int = 3) -> int:
    """Names the curves below the axis, where they hide nothing; returns the number of lines."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return 0
    axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(-0.02, -0.09), ncols=columns,
        fontsize=8, frameon=False, labelcolor=_INK, handlelength=2.4, columnspacing=1.4,
    )  # fmt: skip
    return -(-len(labels) // columns)


def _themed(text: str) -> str:
    """The <svg> element alone, as wide as its place, in the page's fonts and colours."""
    text = text[text.index("<svg ") :]
    for color, variable in _CSS.items():
        text = text.replace(color, variable)
    text = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1 var(--sans)", text)
    return re.sub(r'(<svg [^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"\1\2", text, count=1)
