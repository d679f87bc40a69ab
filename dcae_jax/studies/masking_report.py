"""What the arms of the masking study show: tables, sentences with their numbers, a figure.

An effect counts as seen only if it has the same sign on every seed and its mean is larger than the
spread between seeds; otherwise the sentences say that it is below their spread.
"""

import io
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from dcae_jax import distributed, train
from dcae_jax.studies import masking, masking_costs
from dcae_jax.studies.base import QUICK, table
from dcae_jax.studies.masking import MASKED, PIXELS, PLAIN, SCHEDULES, Point, Result, Study

COLORS = {
    "cosine": "#3574b8", "piecewise": "#2e9267", "linear": "#7a62b3", "constant": "#d9822b",
    PIXELS: "#8a8f98", PLAIN: "#d9822b", MASKED: "#3574b8",
}  # fmt: skip
LABELS = {
    **{name: f"LMD, {name}" for name in SCHEDULES}, "constant": "LMD, constant 0.75",
    PIXELS: "MAE of pixels, 0.75", PLAIN: "UViT", MASKED: "masking-diffusion UViT",
}  # fmt: skip


def write(study: Study, out: str) -> None:
    """Writes masking.json, masking.md and masking.svg into `out`, and prints the tables."""
    text = markdown(study)
    train.say(text)
    if distributed.is_main():
        folder = epath.Path(out)
        record = {**masking.record(study), "findings": findings(study)}
        (folder / "masking.json").write_text(json.dumps(record, indent=2))
        (folder / "masking.md").write_text(text)
        (folder / "masking.svg").write_text(figure(study))
        train.say(f"written: {folder / 'masking.md'}, .json, .svg")


# ------------------------------------------------------------------------------------- sentences


def findings(study: Study) -> list[str]:
    """The sentences that the numbers support."""
    found = [QUICK] if study.settings.quick else []
    found += [_against(study, name, "constant") for name in SCHEDULES if name != "constant"]
    found += [_against(study, name, PIXELS) for name in ("constant", "cosine")]
    return [*found, _diffusion(study)]


def _against(study: Study, kind: str, other: str) -> str:
    """Two arms of (a)."""
    one, two = study.of(kind), study.of(other)
    key = "psnr_pixel_masked"
    gaps = [a.after[key] - b.after[key] for a, b in zip(one, two, strict=True)]
    return (
        f"{LABELS[kind]} against {LABELS[other]} for equal FLOPs ({one[0].steps} against "
        f"{two[0].steps} steps): {verdict(gaps, 'dB')}."
    )


def _diffusion(study: Study) -> str:
    """(b): lower is better for the loss and the Fréchet distance."""
    one, two = study.of(MASKED), study.of(PLAIN)
    said = []
    for metric, name in (("loss", "held-out loss"), ("frechet", "Fréchet distance")):
        gaps = [a.after[metric] - b.after[metric] for a, b in zip(one, two, strict=True)]
        said.append(f"{name} {verdict(gaps, '', 3)}")
    return (
        f"{LABELS[MASKED]} against {LABELS[PLAIN]} for equal FLOPs ({one[0].steps} against "
        f"{two[0].steps} steps; lower is better): {'; '.join(said)}."
    )


def verdict(gaps: Sequence[float], unit: str, digits: int = 2) -> str:
    """The mean and the seeds of a difference, and whether it shows."""
    mean, spread = statistics.fmean(gaps), max(gaps) - min(gaps)
    shows = len({gap > 0 for gap in gaps}) == 1 and abs(mean) > spread
    seeds = ", ".join(f"{gap:+.{digits}f}" for gap in gaps)
    note = "" if shows else "; below their spread"
    return f"{mean:+.{digits}f}{' ' + unit if unit else ''} (seeds: {seeds}{note})"


# ---------------------------------------------------------------------------------------- tables


def markdown(study: Study) -> str:
    """The tables and the sentences."""
    s = study.settings
    n = s.grid**2
    parts = ["# Masking", *([QUICK] if s.quick else [])]
    parts += [
        f"Autoencoder: f{masking.FACTOR}c{s.latent_channels}, {s.autoencoder_steps} steps, "
        f"{study.autoencoder['psnr_pooled']:.2f} dB (pooled PSNR, held-out crops of {s.side} px). "
        f"Transformers: {n} tokens of width {s.width}, {s.depth} blocks. Mean ± standard deviation "
        f"of {len(s.seeds)} seeds.",
        f"## Filling in three quarters of the tokens at equal FLOPs: steps of {s.batch}",
        table(
            ["", "steps", "GFLOP an image", "TFLOP", "seconds", "PSNR, pixel-masked",
             "PSNR, latent-masked"],
            [_fill_row(study.of(kind)) for kind in (*SCHEDULES, PIXELS)] + _baselines(study),
        ),
        "PSNR of the masked pixels of held-out crops, pooled, nothing pasted back.",
        "## Masked diffusion at equal FLOPs",
        table(
            ["", "steps", "GFLOP an image", "TFLOP", "seconds", "held-out loss", "Fréchet",
             "accuracy"],
            [_diffusion_row(study.of(kind)) for kind in (PLAIN, MASKED)],
        ),
        *findings(study),
        "## What encoding adds",
        _encoding(study),
        masking_costs.markdown(),
        "Held-out images are strips of the photographs trained on: they compare arms, and do not "
        "measure generalisation.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _fill_row(found: Sequence[Result]) -> list[str]:
    first = found[0]
    return [
        LABELS[first.arm.kind], str(first.steps), f"{first.flops_per_image / 1e9:.3f}",
        f"{first.flops / 1e12:.2f}", over(found, lambda r: r.seconds, 0),
        over(found, lambda r: r.after["psnr_pixel_masked"], 2),
        over(found, lambda r: r.after["psnr_latent_masked"], 2)
        if "psnr_latent_masked" in first.after else "–",
    ]  # fmt: skip


def _baselines(study: Study) -> list[list[str]]:
    """On the same pixels: without any network, and the most that latents allow."""
    names = {"mean-of-visible": "mean of the visible pixels", "autoencoder": "nothing masked"}
    scores = study.of("cosine")[0].baselines
    rows = []
    for name, title in names.items():
        found = (scores[name].get(f"psnr_{p}_masked") for p in ("pixel", "latent"))
        rows.append([title, *["–"] * 4, *("–" if v is None else f"{v:.2f}" for v in found)])
    return rows


def _diffusion_row(found: Sequence[Result]) -> list[str]:
    first = found[0]
    return [
        LABELS[first.arm.kind], str(first.steps), f"{first.flops_per_image / 1e9:.3f}",
        f"{first.flops / 1e12:.2f}", over(found, lambda r: r.seconds, 0),
        over(found, lambda r: r.after["loss"], 3), over(found, lambda r: r.after["frechet"], 2),
        over(found, lambda r: r.after["accuracy"], 2),
    ]  # fmt: skip


def over(found: Sequence[Result], value: Callable[[Result], float], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    values = [value(r) for r in found]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"


def _encoding(study: Study) -> str:
    """The cost of the encoder beside that of a training step, for each image."""
    s, encode, first = study.settings, study.encoder_flops / 1e9, study.of("cosine")[0]
    step, seen = first.flops_per_image / 1e9, first.steps * s.batch
    once = 2 * s.crops * encode / seen
    return (
        f"Encoding an image takes {encode:.3f} GFLOP, once for each of the {2 * s.crops:,} crops "
        f"and mirror images of the cache; a training step takes {step:.3f} GFLOP an image "
        f"(cosine). For the {seen:,} latents that an arm sees, {seen / (2 * s.crops):.1f} epochs, "
        f"the cache adds {once / step:.0%} to the first arm and nothing to the others; encoded in "
        f"every step it would add {encode / step:.0%} to each."
    )


# ---------------------------------------------------------------------------------------- figure


def figure(study: Study) -> str:
    """All curves as one SVG, on white so that it can be read on pages of any colour."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "masking", "font.size": 9}
    with matplotlib.rc_context(style):
        picture = Figure(figsize=(10.4, 3.6), layout="constrained")
        left, middle, right = picture.subplots(1, 3)
        fills = (*SCHEDULES, PIXELS)
        _curves(left, study, fills, lambda p: p.flops / 1e12)
        _curves(middle, study, fills, lambda p: p.seconds)
        _curves(right, study, (PLAIN, MASKED), lambda p: p.flops / 1e12)
        left.set(xlabel="training TFLOP", ylabel="PSNR of masked pixels (dB)")
        middle.set(xlabel="training seconds", ylabel="PSNR of masked pixels (dB)")
        right.set(xlabel="training TFLOP", ylabel="diffusion loss, held-out")
        for axes, title in (
            (left, "Filling in 75 %"), (middle, "The same by time"), (right, "Diffusion"),
        ):  # fmt: skip
            axes.set_title(title, loc="left", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, axis="y", color="#e4e6ea", lw=0.7)
        left.legend(frameon=False, fontsize=7.5)
        right.legend(frameon=False, fontsize=7.5)
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _curves(
    axes: Any, study: Study, kinds: Sequence[str], across: Callable[[Point], float]
) -> None:
    """The mean over the seeds, and the standard deviation as error bars."""
    for kind in kinds:
        found = study.of(kind)
        rows = list(zip(*(r.curve for r in found), strict=True))
        x = [statistics.fmean(across(p) for p in row) for row in rows]
        y = [statistics.fmean(p.value for p in row) for row in rows]
        error = [statistics.stdev(p.value for p in row) if len(row) > 1 else 0.0 for row in rows]
        axes.errorbar(
            x, y, error, color=COLORS[kind], lw=1.5, marker="o", ms=3, capsize=2,
            label=LABELS[kind],
        )  # fmt: skip
