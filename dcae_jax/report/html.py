"""The report: one self-contained HTML file about one run or about all phases of a run.

Curves are inline SVG, pictures are embedded, nothing is fetched.  What a report reads of a workdir
is written down in phases.py.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from dcae_jax.report import curves, diffusion, pages, phases, progress, writers
from dcae_jax.report.pages import Picture, Table
from dcae_jax.report.phases import Phase

_OTHER_PANELS = 24  # small panels of the remaining training scalars, at most


def build_report(
    workdirs: Sequence[writers.Path] | writers.Path, out: writers.Path | None = None
) -> epath.Path:
    """Writes the report of workdirs (or of a folder with phase1..phase3) and returns its path.

    `out` defaults to report.html in the folder given, or in the last workdir of several.  The file
    stays below 5 MB: pictures that are too large are embedded as JPEG and say so.
    """
    found = phases.load_phases(workdirs)
    several = isinstance(workdirs, Sequence) and not isinstance(workdirs, str)
    folder = found[-1].workdir if several else epath.Path(workdirs)
    target = epath.Path(out) if out is not None else folder / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(found))
    return target


def render(found: Sequence[Phase]) -> str:
    """The page as text."""
    return pages.page("template.html", _page(found))


def _page(found: Sequence[Phase]) -> dict[str, Any]:
    """Every value that the template shows."""
    return {
        "title": _title(found),
        "phases": found,
        "facts": [*_run_facts(found), *diffusion.facts(found)],
        "diffusion": diffusion.is_diffusion(found),
        "phase_table": phases.phase_table(found),
        "quality": _quality(found, diffusion.Kind.other),
        "samples": _quality(
            found, diffusion.Kind.classes, diffusion.Kind.features, diffusion.Kind.samples
        ),
        "losses": _quality(found, diffusion.Kind.loss),
        "findings": phases.findings(found),
        "panels": [_markup(svg) for svg in _panels(found)],
        "others": _others(found),
        "galleries": _galleries(found),
        "without_pictures": _without_pictures(found),
        "built_in_photos": diffusion.of_photos(found)
        or any(n.startswith("photos") for n in phases.evaluators(found)),
        "differences": config_differences(found),
        "configs": [(p.name, json.dumps(_tree(p), indent=2)) for p in found if p.config],
        "versions": _versions(found),
    }


def _markup(svg: str) -> Any:
    """Marks our own SVG as markup; everything else on the page is escaped."""
    import markupsafe

    return markupsafe.Markup(svg)


def _panels(found: Sequence[Phase]) -> list[str]:
    """The main curves; losses over the time of the process beside those over the steps."""
    drawn = []
    for panel in curves.panels(found):
        drawn.append(curves.svg(panel, found))
        drawn += curves.time_svgs(found) if panel.title == curves.VALIDATION else []
    return drawn


def _others(found: Sequence[Phase]) -> list[Any]:
    panels = curves.other_panels(found)[:_OTHER_PANELS]
    return [_markup(curves.svg(panel, found, width=3.9, height=2.2)) for panel in panels]


# ---------------------------------------------------------------------------- facts


def _tree(phase: Phase) -> dict[str, Any]:
    return phase.config.get("config", {})


def _title(found: Sequence[Phase]) -> str:
    """What the names of the runs begin with in common: "demo" of "demo phase 1", "demo phase 2"."""
    names = [str(_tree(p)["name"]) for p in found if _tree(p).get("name")]
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    common = "".join(column[0] for column in letters).strip().removesuffix("phase").strip()
    return common or found[0].workdir.parent.name or str(found[0].workdir)


def _run_facts(found: Sequence[Phase]) -> list[tuple[str, str]]:
    """What ran, where, from which commit, for how long."""
    states = ", ".join(f"{phase.name} {phase.state}" for phase in found)
    seconds = [float(p.summary["seconds"]) for p in found if "seconds" in p.summary]
    facts = [("phases", states)]
    for name in ("device", "commit"):
        values = sorted({str(p.config[name]) for p in found if p.config.get(name)})
        facts.append((name, ", ".join(values) or "not recorded"))
    for phase in found:
        if best := phase.summary.get("best"):
            where = f"{best['metric']} {best['value']:.4g} at step {best['step']}"
            facts.append(("best checkpoint", f"{where} of {phase.name}"))
    times = [row["time"] for phase in found for row in phase.rows]
    facts.append(("time", progress.duration(sum(seconds)) if seconds else "not recorded"))
    facts.append(("last record", _date(max(times)) if times else "none"))
    return facts


def _date(timestamp: float | int) -> str:
    import datetime

    return f"{datetime.datetime.fromtimestamp(timestamp, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _versions(found: Sequence[Phase]) -> list[tuple[str, str]]:
    """Package versions; where phases differ, all of them."""
    versions: dict[str, list[str]] = {}
    for phase in found:
        for name, version in phase.config.get("versions", {}).items():
            if str(version) not in versions.setdefault(name, []):
                versions[name].append(str(version))
    return [(name, ", ".join(found)) for name, found in sorted(versions.items())]


def _quality(found: Sequence[Phase], *kinds: diffusion.Kind) -> list[tuple[str, str, Table]]:
    """(evaluator, what it is, table) of every evaluator of these kinds with numbers."""
    names = [name for name in phases.evaluators(found) if phases.scores_exist(found, name)]
    return [
        (name, _what(found, name), phases.quality_table(found, name))
        for kind in kinds for name in names if diffusion.kind(found, name) is kind
    ]  # fmt: skip


def _what(found: Sequence[Phase], name: str) -> str:
    """What an evaluator shows, in words."""
    return diffusion.WHAT.get(diffusion.kind(found, name)) or phases.describe(name)


def config_differences(found: Sequence[Phase]) -> Table | None:
    """The config fields in which phases differ; None with fewer than two configs."""
    flat = {phase.name: _flat(_tree(phase)) for phase in found if phase.config}
    if len(flat) < 2:
        return None
    fields = sorted({name for values in flat.values() for name in values})
    rows = []
    for name in fields:
        cells = [json.dumps(values[name]) if name in values else "–" for values in flat.values()]
        if len(set(cells)) > 1:
            rows.append([name, *cells])
    return Table(["field", *flat], rows)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b.c": value} of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        name = f"{prefix}.{key}" if prefix else str(key)
        nested = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(item, dict) for item in value)
        )
        flat |= _flat(value, name) if nested else {name: value}
    return flat


# ---------------------------------------------------------------------------- pictures


@dataclass(slots=True)
class Gallery:
    """The pictures of one evaluator: before training, and after each phase."""

    name: str
    what: str
    pictures: list[Picture]
    missing: str  # a sentence about phases without a picture, or ""


def _without_pictures(found: Sequence[Phase]) -> list[str]:
    """Evaluators that measured something and drew nothing."""
    drawn = {name for phase in found for name in phase.images}
    losses = diffusion.of_kind(found, diffusion.Kind.loss)  # nobody expects a picture of these
    return [name for name in phases.evaluators(found) if name not in {*drawn, *losses}]


def _galleries(found: Sequence[Phase]) -> list[Gallery]:
    drawn = {name for phase in found for name in phase.images}
    names = [name for name in phases.evaluators(found) if name in drawn]
    chosen = {name: _chosen(found, name) for name in names}
    count = max(sum(len(pictures) for pictures in chosen.values()), 1)
    galleries = []
    for name in names:
        pictures = [
            pages.embedded(*choice, pages.PICTURE_BYTES // count) for choice in chosen[name]
        ]
        missing = [p.name for p in found if not p.images.get(name)]
        sentence = f"No picture was recorded by {', '.join(missing)}." if missing else ""
        galleries.append(Gallery(name, _what(found, name), pictures, sentence))
    return galleries


def _chosen(found: Sequence[Phase], name: str) -> list[tuple[str, str, epath.Path]]:
    """(caption, scores, path): the first phase's first picture, then each phase's last one.

    Of samples more of each phase: how they came to be is seen over the training.
    """
    many = diffusion.kind(found, name) is not diffusion.Kind.other
    chosen = []
    for phase in found:
        steps = list(phase.images.get(name, {}))
        first = [] if chosen else steps[:1]
        for step in diffusion.spread(steps) if many else dict.fromkeys([*first, *steps[-1:]]):
            path = phase.images[name][step]
            chosen.append((_picture_caption(phase, step), _picture_scores(phase, name, step), path))
    return chosen


def _picture_caption(phase: Phase, step: int) -> str:
    if step == 0:
        return f"before {phase.name}"
    finished = phase.finished and step >= phase.steps
    return f"{'after' if finished else 'during'} {phase.name}, step {step}"


def _picture_scores(phase: Phase, name: str, step: int) -> str:
    """The scores that were recorded with the picture."""
    row = next((row for row in phase.rows if row["step"] == step), {})
    mine = [key.removeprefix(f"{name}/") for key in row if key.startswith(f"{name}/")]
    return ", ".join(
        f"{phases.metric_name(metric)} {phases.score(metric, row[f'{name}/{metric}'])}"
        for metric in phases.main_metrics(mine)
    )
