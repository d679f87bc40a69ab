"""What the ablation's arms show: tables, sentences with their numbers, a figure.

An effect counts as seen only if it has the same sign on every seed and its mean is larger than the
spread between seeds; otherwise the sentences say that it does not show at this size.
"""

import io
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from dcae_jax import config as config_lib
from dcae_jax import distributed, train
from dcae_jax.report import phases
from dcae_jax.studies.ablation import (
    HIGH,
    LOW,
    PLAIN,
    RESIDUAL,
    Result,
    Study,
    arm_config,
    pooled,
)
from dcae_jax.studies.base import QUICK, provenance_record, table

COLORS = {RESIDUAL: "#3574b8", PLAIN: "#d9822b", HIGH: "#2e9267", LOW: "#8a8f98"}
LABELS = {
    RESIDUAL: "with residual autoencoding", PLAIN: "without", HIGH: "phase 2",
    LOW: "control: same layers at low resolution",
}  # fmt: skip


def write(study: Study, out: str) -> None:
    """Writes ablation.json, ablation.md and ablation.svg into `out`, and prints the tables."""
    text = markdown(study)
    train.say(text)
    if distributed.is_main():
        folder = epath.Path(out)
        (folder / "ablation.json").write_text(json.dumps(record(study), indent=2))
        (folder / "ablation.md").write_text(text)
        (folder / "ablation.svg").write_text(figure(study))
        train.say(f"written: {folder / 'ablation.md'}, .json, .svg")


def record(study: Study) -> dict[str, Any]:
    """Everything as plain JSON."""
    arms = [
        {
            "kind": r.arm.kind, "lr": r.arm.rate, "seed": r.arm.seed, "finished": r.finished,
            "parameters": r.parameters, "seconds": r.seconds, "before": r.before,
            "after": r.after, "psnr_pooled_at_step": r.curve,
        }
        for r in study.results
    ]  # fmt: skip
    return {
        "settings": config_lib.to_json(study.settings), "best_lr": study.best, "arms": arms,
        "baselines": study.baselines, "findings": findings(study), **provenance_record(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------- sentences


def findings(study: Study) -> list[str]:
    """The sentences that the numbers support."""
    found = [QUICK] if study.settings.quick else []
    return found + residual_findings(study) + adaptation_findings(study)


def residual_findings(study: Study) -> list[str]:
    """Part (a)."""
    scores = {kind: [pooled(r) for r in study.chosen(kind)] for kind in (RESIDUAL, PLAIN)}
    gaps = [a - b for a, b in zip(scores[RESIDUAL], scores[PLAIN], strict=True)]
    mean, spread = _mean(gaps), max(_spread(s) for s in scores.values())
    shows = len({gap > 0 for gap in gaps}) == 1 and abs(mean) > spread
    sentence = (
        f"Residual autoencoding: {_mean(scores[RESIDUAL]):.2f} dB with it and "
        f"{_mean(scores[PLAIN]):.2f} dB without (held-out pooled PSNR, mean of {len(gaps)} "
        f"seeds, {study.settings.steps} steps, each at its best learning rate): {mean:+.2f} dB, "
        f"where seeds differ by up to {spread:.2f} dB."
    )
    if not shows:
        sentence += " The effect does not show at this size."
    elif mean < 0:
        sentence += " At this size it is the opposite of the paper's."
    return [sentence, *_training_notes(study), *_grid_notes(study), _parameter_note(study)]


def _training_notes(study: Study) -> list[str]:
    """Arms that are no better than one colour, and where the best one stands."""
    constant = study.baselines["constant"]["psnr_pooled"]
    found = [
        f"The arm {LABELS[kind]} did not train: {min(scores):.2f} dB is not above the constant "
        f"image's {constant:.2f} dB."
        for kind in (RESIDUAL, PLAIN)
        if min(scores := [pooled(r) for r in study.chosen(kind)]) <= constant
    ]
    best = _mean([pooled(r) for r in study.chosen(RESIDUAL)])
    gaps = ", ".join(
        f"{_gap(best - s['psnr_pooled'])} {_baseline(name)}" for name, s in study.baselines.items()
    )
    return [*found, f"On the same pixels the arm with residual autoencoding is {gaps}."]


def _gap(decibel: float) -> str:
    return f"{abs(decibel):.2f} dB {'above' if decibel >= 0 else 'below'}"


def _grid_notes(study: Study) -> list[str]:
    """The learning rates tried by each arm, and whether the best one is inside."""
    found = []
    for kind in (RESIDUAL, PLAIN):
        first = study.settings.seeds[0]
        rates = sorted(r.arm.rate for r in study.of(kind) if r.arm.seed == first)
        best, edge = study.best[kind], study.best[kind] in (rates[0], rates[-1])
        tried = ", ".join(f"{rate:.1e}" for rate in rates)
        where = "at the EDGE of the grid, so a better one may lie outside" if edge else "inside"
        found.append(f"The arm {LABELS[kind]} tried {tried}; its best, {best:.1e}, is {where}.")
    return found


def _parameter_note(study: Study) -> str:
    counts = {kind: study.chosen(kind)[0].parameters for kind in (RESIDUAL, PLAIN)}
    if counts[RESIDUAL] == counts[PLAIN]:
        same = f"Both arms have {counts[PLAIN]:,} parameters and start from the same ones"
        return f"{same}; the learning rate was chosen on held-out images with the first seed."
    return f"The arms differ in parameters: {counts[RESIDUAL]:,} and {counts[PLAIN]:,}."


def adaptation_findings(study: Study) -> list[str]:
    """Part (b)."""
    high, low = _evaluators(study)
    gained, cost = (changes(study.of(HIGH), name) for name in (high, low))
    control, control_low = (changes(study.of(LOW), name) for name in (high, low))
    if not gained or not control:
        return ["Phase 2: an arm stopped at a loss that was not finite; nothing can be said."]
    s = study.settings
    beyond = [a - b for a, b in zip(gained, control, strict=True)]
    # A mean above the spread is above zero on every seed.
    shows = min(gained) > 0 and _mean(beyond) > _spread(beyond)
    sentence = (
        f"Phase 2: {s.adapt_steps} steps at {s.high} px change the held-out pooled PSNR by "
        f"{_mean(gained):+.2f} dB at {s.high} px and by {_mean(cost):+.2f} dB at {s.low} px "
        f"(seeds: {_list(gained)} and {_list(cost)}). The same layers trained on as many pixels at "
        f"{s.low} px: {_mean(control):+.2f} dB and {_mean(control_low):+.2f} dB (seeds: "
        f"{_list(control)} and {_list(control_low)})."
    )
    if shows:
        more = f"High resolution itself brings {_mean(beyond):+.2f} dB of the gain at {s.high} px."
    elif min(gained) > 0:
        more = (
            f"Phase 2 gains, but not more than the control does ({_mean(beyond):+.2f} dB): that "
            "high resolution is what helps does not show at this size."
        )
    else:
        more = "The effect does not show at this size."
    return [f"{sentence} {more}"]


def changes(results: Sequence[Result], evaluator: str) -> list[float]:
    """Pooled PSNR after minus before, of each arm; [] if one of them did not finish."""
    if not all(r.finished for r in results):
        return []
    return [_pooled_of(r.after, evaluator) - _pooled_of(r.before, evaluator) for r in results]


def _pooled_of(scores: dict[str, dict[str, float]], evaluator: str) -> float:
    return scores[evaluator]["psnr_pooled"]


def _evaluators(study: Study) -> tuple[str, str]:
    """Names of the high- and the low-resolution evaluator of (b)."""
    high, low = arm_config(study.settings, study.of(HIGH)[0].arm, "any").evals
    return high.name, low.name


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{v:+.2f}" for v in values)


# ---------------------------------------------------------------------------------------- tables


def markdown(study: Study) -> str:
    """The tables and the sentences."""
    s = study.settings
    parts = ["# Ablation", *([QUICK] if s.quick else [])]
    parts += [
        f"## Residual autoencoding: f{2 ** (len(s.widths) - 1)}c{s.latent_channels}, {s.low} px, "
        f"{s.steps} steps of {s.batch} crops",
        table(["", "lr", "seed", "PSNR pooled", "PSNR mean", "SSIM"], _residual_rows(study)),
        "\n\n".join(residual_findings(study)),
        f"## Phase 2: {s.adapt_steps} steps, held-out PSNR pooled and SSIM before → after",
        table(
            ["", "seed", f"PSNR {s.high} px", f"SSIM {s.high} px", f"PSNR {s.low} px",
             f"SSIM {s.low} px"],
            _adaptation_rows(study),
        ),
        "\n\n".join(adaptation_findings(study)),
        "Held-out images are strips of the photographs trained on: they compare arms, and do not "
        "measure generalisation.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _residual_rows(study: Study) -> list[list[str]]:
    """Each arm, the best ones marked, then the mean over seeds, then the closed forms."""
    rows = []
    for kind in (RESIDUAL, PLAIN):
        for r in sorted(study.of(kind), key=lambda r: (r.arm.rate, r.arm.seed)):
            best = " (best)" if r.arm.rate == study.best[kind] else ""
            scores = next(iter(r.after.values()), None)
            rows.append([LABELS[kind], f"{r.arm.rate:.1e}{best}", str(r.arm.seed), *_cells(scores)])
        means = _mean_scores([next(iter(r.after.values())) for r in study.chosen(kind) if r.after])
        rows.append([f"**{LABELS[kind]}, mean**", f"{study.best[kind]:.1e}", "all", *_cells(means)])
    return rows + [[_baseline(k), "–", "–", *_cells(v)] for k, v in study.baselines.items()]


def _adaptation_rows(study: Study) -> list[list[str]]:
    rows = []
    for kind in (HIGH, LOW):
        for r in study.of(kind):
            cells = [
                f"{phases.score(m, r.before[name][m])} → {phases.score(m, r.after[name][m])}"
                if r.finished
                else "stopped"
                for name in _evaluators(study)
                for m in ("psnr_pooled", "ssim")
            ]
            rows.append([LABELS[kind], str(r.arm.seed), *cells])
    return rows


def _mean_scores(found: Sequence[dict[str, float]]) -> dict[str, float] | None:
    return {k: _mean([s[k] for s in found]) for k in phases.METRICS} if found else None


def _cells(scores: dict[str, float] | None) -> list[str]:
    if scores is None:
        return ["stopped: not finite", "–", "–"]
    return [phases.score(m, scores[m]) for m in phases.METRICS]


def _baseline(name: str) -> str:
    return "the best constant image" if name == "constant" else phases.baseline_name(name)


# ---------------------------------------------------------------------------------------- figure


def figure(study: Study) -> str:
    """Both parts as one SVG, on white so that it can be read on pages of any colour."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "ablation", "font.size": 9}
    with matplotlib.rc_context(style):
        picture = Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = picture.subplots(1, 2, width_ratios=(3, 2))
        _curves(left, study)
        _bars(right, study)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, axis="y", color="#e4e6ea", lw=0.7)
            axes.set_axisbelow(True)
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _curves(axes: Any, study: Study) -> None:
    """Part (a): bold at the best rate (a line a seed), faint at the others; baselines dashed."""
    for kind in (RESIDUAL, PLAIN):
        for r in study.of(kind):
            best = r.arm.rate == study.best[kind]
            first = best and r.arm.seed == study.settings.seeds[0]
            axes.plot(
                *zip(*r.curve, strict=True), color=COLORS[kind], lw=1.8 if best else 0.9,
                alpha=1.0 if best else 0.35, label=LABELS[kind] if first else None,
            )  # fmt: skip
    last = study.settings.steps
    levels = {k: v["psnr_pooled"] for k, v in study.baselines.items() if k != "pca-3"}
    for name, level in levels.items():  # bicubic has the rate of PCA 3 and would cover its name
        axes.axhline(level, color="#8a8f98", lw=0.9, ls="--")
        axes.annotate(
            _baseline(name), (0, level), (4, 2), textcoords="offset points", fontsize=7.5,
            color="#5a5f68",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="held-out PSNR, pooled (dB)", xlim=(0, last))
    axes.set_title("Residual autoencoding: all seeds and learning rates", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.02), fontsize=8)


def _bars(axes: Any, study: Study) -> None:
    """Part (b): change of PSNR at both resolutions, a dot a seed."""
    names, s = _evaluators(study), study.settings
    for i, kind in enumerate((HIGH, LOW)):
        for j, name in enumerate(names):
            if not (found := changes(study.of(kind), name)):
                continue
            x = j + 0.36 * (i - 0.5)
            label = LABELS[kind] if j == 0 else None
            axes.bar(x, _mean(found), 0.34, color=COLORS[kind], alpha=0.75, label=label)
            axes.plot([x] * len(found), found, "o", ms=3.5, color="#30343a")
    axes.axhline(0, color="#30343a", lw=0.8)
    axes.set_xticks(range(2), [f"at {s.high} px", f"at {s.low} px"])
    axes.set_ylabel("change of held-out PSNR (dB)")
    axes.set_title("Phase 2: gain and cost", loc="left", fontsize=10)
    axes.margins(y=0.25)
    axes.legend(frameon=False, loc="best", fontsize=8)
