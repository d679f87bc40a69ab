"""sweep.html: parallel coordinates, the table, curves, pictures; one file, nothing is fetched."""

import json
import math
from collections import Counter
from collections.abc import Sequence

from etils import epath

from dcae_jax import outputs
from dcae_jax.config import JSONValue
from dcae_jax.report import pages, progress, writers
from dcae_jax.score_names import Better
from dcae_jax.sweeps import charts, results
from dcae_jax.sweeps.charts import Line
from dcae_jax.sweeps.definition import short_keys
from dcae_jax.sweeps.folder import Folder, Manifest, State
from dcae_jax.sweeps.results import Metric, Result

_MOST_CURVES = 40
_MOST_PICTURES = 12  # trials, the best ones
_MOST_GALLERIES = 3
_LOSS = "train/loss"


def write(
    folder: Folder, manifest: Manifest, found: Sequence[Result], by: Metric | None
) -> epath.Path:
    """Writes the page and returns its path."""
    target = folder.path / "sweep.html"
    outputs.write(target, render(folder, manifest, found, by).encode())
    return target


def render(folder: Folder, manifest: Manifest, found: Sequence[Result], by: Metric | None) -> str:
    """The page as text."""
    import markupsafe

    ranked = _ranked(found, by)
    colors = _colors(ranked, by)
    drawn = ranked[:_MOST_CURVES]
    head, rows = results.table(ranked, by)
    panels = [
        (name, markupsafe.Markup(charts.curves(lines)))
        for name in dict.fromkeys([*([by.name] if by else []), _LOSS])
        if (lines := _curves(folder, drawn, name, colors, by))
    ]
    return pages.page(
        "sweep.html",
        {
            "title": f"{manifest.config} · {_kind(manifest)}",
            "facts": _facts(folder, manifest, found, by),
            "parallel": by and markupsafe.Markup(_parallel(ranked, by, colors)),
            "table": pages.Table(head, rows),
            "failed": _failed(ranked),
            "panels": panels,
            "left_out": _left_out(len(ranked)),
            "galleries": _galleries(folder, ranked, by),
            "base": json.dumps(manifest.base, indent=2),
        },
    )


def _kind(manifest: Manifest) -> str:
    return "search" if manifest.search else ", ".join(manifest.sweeps) or "sweep"


def _ranked(found: Sequence[Result], by: Metric | None) -> list[Result]:
    """The best first, those without a score last."""
    if by is None:
        return list(found)
    sign = -1 if by.better is Better.higher else 1

    def place(result: Result) -> tuple[bool, float]:
        value = _score(result, by)
        return value is None, sign * (value or 0.0)

    return sorted(found, key=place)


def _score(result: Result, by: Metric) -> float | None:
    value = result.scores.get(by.name, math.nan)
    return float(value) if math.isfinite(value) else None


def _colors(ranked: Sequence[Result], by: Metric | None) -> dict[str, str]:
    """Of each trial, by its rank."""
    scored = [r for r in ranked if by and _score(r, by) is not None]
    last = max(len(scored) - 1, 1)
    known = {r.record.name: charts.ramp(i / last) for i, r in enumerate(scored)}
    return {r.record.name: known.get(r.record.name, charts.NONE) for r in ranked}


def _facts(
    folder: Folder, manifest: Manifest, found: Sequence[Result], by: Metric | None
) -> list[tuple[str, str]]:
    states = Counter(result.record.state.value for result in found)
    times = [results.seconds(result.record) for result in found]
    known = [time for time in times if time is not None]
    unknown = f", and {len(times) - len(known)} unknown" if len(known) < len(times) else ""
    facts = [
        ("config", manifest.config),
        ("sweep", _kind(manifest)),
        ("for all trials", " ".join(manifest.overrides) or "no override"),
        ("trials", ", ".join(f"{n} {state}" for state, n in states.items()) or "none"),
        ("time of all trials", progress.duration(sum(known)) + unknown),
        ("folder", str(folder.path)),
    ]
    if by:
        facts.append(("compared by", f"{by.name}, {by.better.value} is better"))
        if best := by.best(found):
            facts.append(("best trial", f"{best.record.name}: {best.scores[by.name]:.6g}"))
    if manifest.removed:
        facts.append(("no longer in the sweep", ", ".join(manifest.removed)))
    return facts


def _failed(found: Sequence[Result]) -> pages.Table | None:
    rows = [
        [r.record.name, r.record.starts[-1].error or f"exit code {r.record.starts[-1].exit_code}"]
        for r in found if r.record.state is State.failed
    ]  # fmt: skip
    return pages.Table(["trial", "its last error"], rows) if rows else None


# --------------------------------------------------------------------------------------- drawings


def _parallel(ranked: Sequence[Result], by: Metric, colors: dict[str, str]) -> str:
    """Axes for the fields that differ between trials, and for the score."""
    keys = list(dict.fromkeys(k for result in ranked for k in result.record.overrides))
    values = {k: [result.record.overrides.get(k) for result in ranked] for k in keys}
    varying = [k for k in keys if len({json.dumps(v) for v in values[k]}) > 1] or keys
    names, best = short_keys(keys), by.best(ranked)
    lines = []
    for i, result in enumerate(ranked):
        at: list[JSONValue] = [values[k][i] for k in varying]
        name = result.record.name
        lines.append(Line(name, colors[name], result is best, (*at, _score(result, by))))
    return charts.parallel([*(names[k] for k in varying), by.name], lines)


def _curves(
    folder: Folder, drawn: Sequence[Result], metric: str, colors: dict[str, str], by: Metric | None
) -> list[Line]:
    """Of the trials that have the metric."""
    best, lines = by.best(drawn) if by else None, []
    for result in drawn:
        name = result.record.name
        found = results.curve(folder, name, metric) if result.record.starts else []
        if points := tuple(p for p in found if math.isfinite(p[1])):
            lines.append(Line(name, colors[name], result is best, points=points))
    return lines


def _left_out(count: int) -> str:
    if count <= _MOST_CURVES:
        return ""
    return f"Curves of the first {_MOST_CURVES} of {count} trials in the order of the table."


def _galleries(
    folder: Folder, ranked: Sequence[Result], by: Metric | None
) -> list[tuple[str, list[pages.Picture]]]:
    """The last picture of each kind, of the best trials, side by side."""
    found = {
        r.record.name: writers.read_images(folder.workdir(r.record.name))
        for r in ranked[:_MOST_PICTURES] if r.record.starts
    }  # fmt: skip
    kinds = list(dict.fromkeys(kind for images in found.values() for kind in sorted(images)))
    kinds = sorted(kinds, key=lambda kind: kind.endswith("train"))[:_MOST_GALLERIES]
    count = max(sum(kind in images for images in found.values() for kind in kinds), 1)
    budget = pages.PICTURE_BYTES // count
    galleries = []
    for kind in kinds:
        shown = [
            _picture(r, by, found[r.record.name][kind], budget)
            for r in ranked if kind in found.get(r.record.name, {})
        ]  # fmt: skip
        galleries.append((kind, shown))
    return galleries


def _picture(
    result: Result, by: Metric | None, steps: dict[int, epath.Path], budget: int
) -> pages.Picture:
    step = max(steps)
    value = _score(result, by) if by else None
    note = f"step {step}" + (f", {by.name} {value:.6g}" if by and value is not None else "")
    return pages.embedded(result.record.name, note, steps[step], budget)
