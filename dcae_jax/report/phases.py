"""Reads what runs left in their workdirs, and makes the tables of a report.

Of a workdir it reads (each may be missing; what is missing is said, never invented):
  config.json    {"config": tree, "commit": str, "versions": {name: str}, "device": str, ...}
  metrics/       writers.read_metrics: "train/..." rows, "<evaluator>/psnr|psnr_pooled|ssim" rows
  images/        writers.read_images: <evaluator>/<step>.png
  summary.json   {"phase", "resolution", "trained", "n_trained", "n_frozen", "steps", "seconds",
                  "train_seconds", "images_per_s", "data_wait",
                  "evals": {"before": {evaluator: {metric: value}}, "after": ...},
                  "baselines": {evaluator: {"bicubic-32" | "pca-3" | ...: {metric: value}}}}
An evaluator's name holds its data, resolution and split: "photos-128-test".
"""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from dcae_jax import score_names
from dcae_jax.errors import UserError
from dcae_jax.nets import weights
from dcae_jax.report import progress, writers
from dcae_jax.report.pages import Table

PHASES = ("phase1", "phase2", "phase3")  # folders of a three-phase run
METRICS = ("psnr_pooled", "psnr", "ssim")  # shown first, in this order
METRICS_OF_LATENTS = ("accuracy", "frechet", "nearest", "loss")  # of diffusion, likewise
# Names begin so where they also say of how many images: fid2048.
METRICS_OF_SAMPLES = ("fid", "sfid", "kid", "is", "precision", "recall")
_FIRST = (
    *METRICS, "ms_ssim", "lpips", "lpips_vgg", "rfid", *METRICS_OF_LATENTS, *METRICS_OF_SAMPLES,
)  # fmt: skip
_METRIC_NAMES = {
    "psnr_pooled": "PSNR pooled", "psnr": "PSNR mean", "ssim": "SSIM", "n": "images",
    "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "lpips_vgg": "LPIPS (VGG)", "rfid": "rFID",
    "fid": "FID", "sfid": "sFID", "kid": "KID", "is": "Inception Score",
    "accuracy": "accuracy", "frechet": "Fréchet distance", "nearest": "to nearest training latent",
    "latent_rms": "RMS of latents", "evaluations": "network calls",
}  # fmt: skip
_ARROWS = {score_names.Better.higher: " ↑", score_names.Better.lower: " ↓"}
_SINGULAR = 2048  # FID's features: of fewer images their covariance is singular
_EVAL_KEY = re.compile(r"(?!(train|data)/)(?P<evaluator>.+)/(?P<metric>[^/]+)$")
_BASELINES = {
    "mean-of-training": "every sample the mean of training",
    "class-means-of-training": "every sample its class's mean",
    "training-latents": "training latents as samples",
    "held-out-latents": "held-out latents as samples",
}
_BIN = re.compile(r"_t\d")  # a loss of a part of the time: for curves, too many for a table
Number = float | int
Scores = dict[str, dict[str, Number]]  # {evaluator or baseline: {metric: value}}


@dataclass(slots=True)
class Phase:
    """One workdir as a report sees it."""

    name: str
    workdir: epath.Path
    config: dict[str, Any] = field(default_factory=dict)  # config.json, whole
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, dict[int, epath.Path]] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        """Whether the workdir holds anything of a run."""
        return bool(self.rows or self.summary)

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step."""
        return bool(self.summary)

    @property
    def steps(self) -> int:
        """Steps done, as far as the files tell."""
        last = self.rows[-1]["step"] if self.rows else 0
        return int(self.summary.get("steps", last))

    @property
    def state(self) -> str:
        """How far the run got, in words."""
        if self.finished:
            return "finished"
        return f"not finished, seen up to step {self.steps}" if self.ran else "not yet run"


def load_phases(workdirs: Sequence[writers.Path] | writers.Path) -> list[Phase]:
    """The phases of several workdirs, of a folder with phase1..phase3, or of one workdir."""
    if isinstance(workdirs, Sequence) and not isinstance(workdirs, str):
        return [_load(epath.Path(workdir)) for workdir in workdirs]
    root = epath.Path(workdirs)
    if _is_workdir(root):
        return [_load(root)]
    if any(_is_workdir(root / name) for name in PHASES):
        return [_load(root / name) for name in PHASES]
    found = [path for path in sorted(root.iterdir()) if _is_workdir(path)] if root.exists() else []
    if not found:
        raise UserError(
            f"{root} is no workdir: expected config.json or metrics/ in it, or folders "
            f"{', '.join(PHASES)} with them; give the folder that --workdir named in training"
        )
    return [_load(path) for path in found]


def _is_workdir(path: epath.Path) -> bool:
    return any((path / name).exists() for name in ("config.json", "metrics", "summary.json"))


def _load(workdir: epath.Path) -> Phase:
    phase = Phase(workdir.name, workdir)
    phase.config = _read_json(workdir / "config.json")
    phase.summary = _read_json(workdir / "summary.json")
    phase.rows = writers.read_metrics(workdir)
    phase.images = writers.read_images(workdir)
    phase.name = str(phase.summary.get("phase") or workdir.name)
    return phase


def _read_json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON ({error}): it was cut short or edited; run the phase again to its "
            "end (it resumes), or remove this file to make a report without it"
        ) from None


# ---------------------------------------------------------------------------- scores


def scores(phase: Phase, when: str) -> Scores:
    """Scores `before` or `after` a phase: the summary's, else of step 0 or of the last one."""
    stored = phase.summary.get("evals", {}).get(when)
    if stored:
        return stored
    found: Scores = {}
    for row in phase.rows:
        for key, value in row.items() if when == "after" or row["step"] == 0 else ():
            if match := _EVAL_KEY.match(key):
                found.setdefault(match["evaluator"], {})[match["metric"]] = value
    return found


def evaluators(phases: Sequence[Phase]) -> list[str]:
    """Names of all evaluators: held-out ones first, by rising resolution."""
    names: set[str] = set()
    for phase in phases:
        names |= scores(phase, "before").keys() | scores(phase, "after").keys()
        names |= baselines(phases).keys() | {name for name in phase.images if resolution(name)}
    return sorted(names, key=lambda name: (not is_held_out(name), resolution(name) or 0, name))


def measured(phases: Sequence[Phase], evaluator: str) -> set[str]:
    """The names of an evaluator's scores."""
    found = [scores(p, when).get(evaluator, {}) for p in phases for when in ("before", "after")]
    return {metric for each in found for metric in each}


def scores_samples(phases: Sequence[Phase], evaluator: str) -> bool:
    """Whether an evaluator compares sets of samples by the features of a network."""
    return any(score_names.parts(m)[0] in METRICS_OF_SAMPLES for m in measured(phases, evaluator))


def resolution(evaluator: str) -> int | None:
    """Pixels, from the name: photos-128-test -> 128."""
    match = re.search(r"(?:^|-)(\d+)(?:-|$)", evaluator)
    return int(match[1]) if match else None


def is_held_out(evaluator: str) -> bool:
    """Whether an evaluator's images were not trained on, told from the end of its name."""
    return not evaluator.endswith("train")


def describe(evaluator: str) -> str:
    """`photos-128-test` -> `128 px, held-out`."""
    size = resolution(evaluator)
    split = "held-out" if is_held_out(evaluator) else "training crops"
    return f"{size} px, {split}" if size else f"{evaluator}, {split}"


def held_out_range(phases: Sequence[Phase]) -> list[str]:
    """The held-out evaluators of the lowest and the highest resolution (one or two names).

    Of reconstructions: scores of samples may have a number in their names too.
    """
    names = [
        name for name in evaluators(phases)
        if is_held_out(name) and resolution(name) and not scores_samples(phases, name)
    ]  # fmt: skip
    return list(dict.fromkeys([names[0], names[-1]])) if names else []


def baselines(phases: Sequence[Phase]) -> dict[str, Scores]:
    """{evaluator: {baseline: scores}}; where phases state one twice, the latest counts."""
    merged: dict[str, Scores] = {}
    for phase in phases:
        for evaluator, found in phase.summary.get("baselines", {}).items():
            merged.setdefault(evaluator, {}).update(found)
    return merged


def baseline_name(name: str) -> str:
    """`bicubic-32` -> `bicubic 32× down/up`, `pca-3` -> `PCA with 3 components`."""
    if name in _BASELINES:
        return _BASELINES[name]
    kind, _, count = name.partition("-")
    if kind == "bicubic" and count:
        return f"bicubic {count}× down/up"
    return f"PCA with {count} components" if kind == "pca" and count else name


def metric_name(metric: str) -> str:
    """What a metric is called in texts: `rfid64` -> `rFID of 64`."""
    base, count = score_names.parts(metric)
    name = _METRIC_NAMES.get(base, base)
    return f"{name} of {count}" if count else name


def heading(metric: str) -> str:
    """The same over a column of a table or over a curve: which way is better is said."""
    return metric_name(metric) + arrow(metric)


def arrow(metric: str) -> str:
    """Which way is better, behind the name of a score; "" where neither is."""
    way = score_names.better(metric)
    return _ARROWS[way] if way else ""


def score(metric: str, value: Number | None) -> str:
    """A number with the digits its metric deserves."""
    if value is None:
        return "–"
    return f"{value:.{_digits(score_names.parts(metric)[0])}f}"


def measured_as(found: Mapping[str, Number], metric: str) -> str:
    """A score with its error, where that was recorded: 0.01234 ± 0.00056."""
    text, error = score(metric, found.get(metric)), found.get(score_names.error(metric))
    return text if error is None else f"{text} ± {score(metric, error)}"


def _digits(metric: str) -> int:
    if metric in ("n", "evaluations"):
        return 0
    if metric.startswith("psnr") or metric in ("frechet", "rfid", "fid", "sfid", "is"):
        return 2
    return {"lpips": 4, "lpips_vgg": 4, "kid": 5}.get(metric, 3)


# ---------------------------------------------------------------------------- tables


_FACTS_HEAD = ["phase", "px", "trained", "parameters", "steps", "time", "img/s", "data-wait"]


def phase_table(phases: Sequence[Phase]) -> Table:
    """One row per phase: what was trained, how long, how fast, what it did to the main scores."""
    names = held_out_range(phases)
    metrics = [(metric, name) for metric in ("psnr_pooled", "ssim") for name in names]
    head = _FACTS_HEAD + [f"{heading(m)} {resolution(name)} px" for m, name in metrics]
    for wanted in ("rfid", "loss", "accuracy", "frechet", "fid"):
        found = [
            (metric, name) for name in evaluators(phases)
            for metric in sorted(measured(phases, name)) if score_names.parts(metric)[0] == wanted
        ]  # fmt: skip
        metrics += found
        head += [f"{heading(metric)} {name}" for metric, name in found]
    rows = []
    for phase in phases:
        changes = [_change(phase, metric, name) for metric, name in metrics]
        rows.append([phase.name, *_facts(phase), *changes])
    return Table(head, rows)


def _facts(phase: Phase) -> list[str]:
    """Resolution, what is trained, parameters, steps, time, speed, waiting."""
    if not phase.ran:
        return ["–", "not yet run", *["–"] * 5]
    get = phase.summary.get
    speed = get("images_per_s", _median(phase, "train/images_per_s"))
    wait = get("data_wait", _median(phase, "train/data_wait"))
    return [
        str(get("resolution", "–")),
        str(get("trained", phase.state)),
        parameters(get("n_trained"), get("n_frozen")),
        str(phase.steps),
        progress.duration(get("seconds")),
        "n/a" if speed is None else f"{speed:.1f}",
        progress.share(wait, 1),
    ]


def _median(phase: Phase, name: str) -> Number | None:
    values = sorted(row[name] for row in phase.rows if row.get(name) is not None)
    return values[len(values) // 2] if values else None


def parameters(trained: int | None, frozen: int | None) -> str:
    """`0.41 M of 2.70 M`, `2.70 M, all`."""
    if trained is None:
        return "–"
    if not frozen:
        return f"{_millions(trained)}, all"
    return f"{_millions(trained)} of {_millions(trained + frozen)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def _change(phase: Phase, metric: str, evaluator: str) -> str:
    """`21.02 → 24.10`; a side that was not measured is a dash."""
    before = scores(phase, "before").get(evaluator, {}).get(metric)
    after = scores(phase, "after").get(evaluator, {}).get(metric)
    if before is None and after is None:
        return "–"
    return f"{score(metric, before)} → {score(metric, after)}"


def quality_table(phases: Sequence[Phase], evaluator: str) -> Table:
    """Baselines, the state before the first phase and the state after each, on the same pixels."""
    rows_of = [
        (baseline_name(name), found) for name, found in baselines(phases).get(evaluator, {}).items()
    ]
    rules = [len(rows_of)] if rows_of else []
    if phases and (before := scores(phases[0], "before").get(evaluator)):
        rows_of.append((f"before {phases[0].name}", before))
    for phase in phases:
        label = f"after {phase.name}" if phase.finished or not phase.ran else f"during {phase.name}"
        rows_of.append((label, scores(phase, "after").get(evaluator, {}) if phase.ran else None))
    metrics = _metrics_of([found for _, found in rows_of if found])
    rows = []
    for label, found in rows_of:
        cells = [measured_as(found or {}, m) for m in metrics]
        if found is None and cells:
            cells[0] = "not yet run"
        rows.append([label, *cells])
    return Table(["", *(heading(m) for m in metrics)], rows, rules)


def _metrics_of(found: Sequence[dict[str, Number]]) -> list[str]:
    """The main ones first, then whatever else was measured, by name; no losses of single times."""
    every = {name for each in found for name in each}
    names = {name for name in every if not (_BIN.search(name) or score_names.is_error(name))}
    first = main_metrics(names)
    return first + sorted(names - set(first))


def main_metrics(names: Iterable[str]) -> list[str]:
    """Those of the names that are shown first, in that order."""
    rank = {name: i for i, name in enumerate(_FIRST)}
    known = [(rank[base], name) for name in names if (base := score_names.parts(name)[0]) in rank]
    return [name for _, name in sorted(known)]


# ---------------------------------------------------------------------------- findings


def findings(phases: Sequence[Phase]) -> list[str]:
    """Sentences that the numbers support: distance to baselines, what each phase did, samples."""
    sentences = []
    for evaluator in held_out_range(phases):
        sentences += _against_baselines(phases, evaluator)
    for phase in phases:
        sentences += _effect(phase, held_out_range(phases)) + _adversary(phase)
    for name in evaluators(phases):
        ran = [
            p for p in phases if {"accuracy", "frechet"} <= scores(p, "after").get(name, {}).keys()
        ]
        sentences += _samples(ran, name, baselines(phases).get(name, {})) if ran else []
    return sentences + _doubts(phases)


def _doubts(phases: Sequence[Phase]) -> list[str]:
    """Why scores of sets of images compare with no others."""
    found, few = {}, []
    for phase in phases:
        for name, about in phase.config.get("scored_with", {}).items():
            for net, info in about["nets"].items():
                if doubt := weights.doubt(info):
                    found[f"{name}: its {net} is not the published one ({doubt})"] = None
    for name in evaluators(phases):
        few += [
            metric for metric in main_metrics(measured(phases, name))
            if score_names.parts(metric)[0] in ("rfid", "fid", "sfid")
            and (score_names.images(metric) or _SINGULAR) < _SINGULAR
        ]  # fmt: skip
    sentences = [f"{text}: such scores compare with nobody's." for text in found]
    if few:
        names = ", ".join(map(metric_name, dict.fromkeys(few)))
        sentences.append(
            f"{names}: of fewer than {_SINGULAR} images; compares with scores of as many alone."
        )
    return sentences


def _against_baselines(phases: Sequence[Phase], evaluator: str) -> list[str]:
    ran = [phase for phase in phases if scores(phase, "after").get(evaluator)]
    if not ran:
        return []
    value = scores(ran[-1], "after")[evaluator].get("psnr_pooled")
    gaps = [
        f"{_gap(value - base['psnr_pooled'])} {baseline_name(name)}"
        for name, base in baselines(phases).get(evaluator, {}).items()
        if value is not None and base.get("psnr_pooled") is not None
    ]
    if not gaps:
        return []
    return [
        f"{describe(evaluator)}: after {ran[-1].name} {value:.2f} dB pooled; {', '.join(gaps)}."
    ]


def _gap(decibel: Number) -> str:
    return f"{abs(decibel):.2f} dB {'above' if decibel >= 0 else 'below'}"


def _effect(phase: Phase, names: Sequence[str]) -> list[str]:
    """What a phase gained and cost at each resolution."""
    parts = []
    for name in names:
        before = scores(phase, "before").get(name, {}).get("psnr_pooled")
        after = scores(phase, "after").get(name, {}).get("psnr_pooled")
        if before is not None and after is not None:
            parts.append(f"{after - before:+.2f} dB at {resolution(name)} px")
    return [f"{phase.name}: {', '.join(parts)} (held-out, pooled)."] if parts else []


def adversarial_keys(phase: Phase) -> dict[str, str]:
    """{what: row key} of the two numbers that show that D and its pull on the decoder are alive."""
    keys = sorted({key for row in phase.rows for key in row})
    patterns = {"adaptive weight": r"adaptive_weight$", "D's update norm": r"disc.update_norm$"}
    found = {}
    for what, pattern in patterns.items():
        matches = [key for key in keys if re.search(pattern, key)]
        if matches:
            found[what] = matches[0]
    return found


def _adversary(phase: Phase) -> list[str]:
    sentences = []
    for what, key in adversarial_keys(phase).items():
        values = [row[key] for row in phase.rows if key in row]
        alive = sum(value > 0 for value in values) / len(values)
        sentences.append(f"{phase.name}: {what} above zero in {alive:.0%} of the logged steps.")
    return sentences


def _samples(ran: Sequence[Phase], name: str, bases: Scores) -> list[str]:
    after = scores(ran[-1], "after")[name]
    before = scores(ran[0], "before").get(name, {})
    return [
        _sampled_accuracy(after, bases),
        _sampled_frechet(after, before, bases),
        *([_sampled_nearest(after, bases)] if _holds(bases, "training-latents", "nearest") else []),
    ]


def _holds(bases: Scores, row: str, metric: str) -> bool:
    return metric in bases.get(row, {})


def _sampled_accuracy(after: dict[str, Any], bases: Scores) -> str:
    text = f"Of {after['n']:.0f} samples {after['accuracy']:.0%} are nearest to the mean of their "
    text += "own class among held-out latents"
    if _holds(bases, "chance", "accuracy"):
        text += f": {after['accuracy'] / bases['chance']['accuracy']:.1f} × chance"
    if _holds(bases, "training-latents", "accuracy"):
        text += f"; of training latents themselves {bases['training-latents']['accuracy']:.0%} are"
    return text + "."


def _sampled_frechet(after: dict[str, Any], before: dict[str, Any], bases: Scores) -> str:
    others = [("before training", before.get("frechet"))]
    others += [
        (baseline_name(row), bases.get(row, {}).get("frechet"))
        for row in ("mean-of-training", "class-means-of-training", "training-latents")
    ]
    shown = [f"{name} {value:.2f}" for name, value in others if value is not None]
    text = f"Fréchet distance to held-out latents {after['frechet']:.2f}"
    return text + (f" ({', '.join(shown)})." if shown else ".")


def _sampled_nearest(after: dict[str, Any], bases: Scores) -> str:
    text = f"Samples are {after['nearest']:.2f} channel deviations from the nearest training "
    text += f"latent; training latents are {bases['training-latents']['nearest']:.2f} from the "
    text += "nearest other one"
    if _holds(bases, "held-out-latents", "nearest"):
        text += f", held-out latents {bases['held-out-latents']['nearest']:.2f} from the nearest"
    return text + "."


# ---------------------------------------------------------------------------- the console


def end_table(workdirs: Sequence[writers.Path] | writers.Path) -> str:
    """The end of a run as text: phases, held-out quality beside the baselines, findings."""
    phases = load_phases(workdirs)
    names = [name for name in evaluators(phases) if scores_exist(phases, name)]
    parts = [as_text(Table(_FACTS_HEAD, [[p.name, *_shortened(_facts(p))] for p in phases]))]
    for name in names:
        title = f"{name} ({describe(name)}); PSNR in dB" if resolution(name) else name
        parts.append(f"{title}\n{as_text(quality_table(phases, name))}")
    if sentences := findings(phases):
        parts.append("\n".join(sentences))
    return "\n\n".join(parts)


def _shortened(facts: list[str]) -> list[str]:
    """With the description of what was trained cut to the width that a console has."""
    return [facts[0], textwrap.shorten(facts[1], 36, placeholder=" ..."), *facts[2:]]


def scores_exist(phases: Sequence[Phase], evaluator: str) -> bool:
    """Whether any number was measured by this evaluator."""
    measured = any(scores(p, when).get(evaluator) for p in phases for when in ("before", "after"))
    return measured or evaluator in baselines(phases)


def as_text(table: Table) -> str:
    """Columns aligned with spaces: the first to the left, the others to the right."""
    lines = [table.head, *table.rows]
    widths = [max(len(row[j]) for row in lines) for j in range(len(table.head))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [_aligned(table.head, widths), rule]
    for number, row in enumerate(table.rows):
        if number in table.rules:
            text.append(rule)
        text.append(_aligned(row, widths))
    return "\n".join(text)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join(cells).rstrip()
