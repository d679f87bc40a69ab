"""What a report says of diffusion runs: kinds of evaluators, facts, losses by time."""

import enum
import itertools
import re
from collections.abc import Sequence
from typing import Any

from dcae_jax.report import phases as phases_lib
from dcae_jax.report.phases import Phase

BIN = re.compile(r"loss_t(\d\.\d+)$")  # the loss of a part of the time, by where it begins
_PICTURES = 4  # of one evaluator, spread over the training


class Kind(enum.Enum):
    """What an evaluator measures, told from the names of its scores."""

    classes = "classes"  # class scores of samples
    loss = "loss"  # on held-out latents
    samples = "samples"  # pictures of samples
    features = "features"  # FID and its like of samples
    other = "other"


def kind(found: Sequence[Phase], evaluator: str) -> Kind:
    """The kind of an evaluator."""
    names = phases_lib.measured(found, evaluator)
    if {"accuracy", "frechet"} <= names:
        return Kind.classes
    if "loss" in names:
        return Kind.loss
    if phases_lib.scores_samples(found, evaluator):
        return Kind.features
    return Kind.samples if "latent_rms" in names else Kind.other


def of_kind(found: Sequence[Phase], wanted: Kind) -> list[str]:
    """The evaluators of a kind."""
    return [name for name in phases_lib.evaluators(found) if kind(found, name) is wanted]


def is_diffusion(found: Sequence[Phase]) -> bool:
    """Whether any of the runs trained on latents."""
    return any(_latents(phase) for phase in found)


def _latents(phase: Phase) -> dict[str, Any]:
    """The manifest of the cache; {} if the run had none."""
    return phase.config.get("latents", {})


def of_photos(found: Sequence[Phase]) -> bool:
    """Whether latents are of the built-in photographs."""
    return any(_latents(phase).get("dataset") == "photos" for phase in found)


WHAT = {
    Kind.classes: "samples against held-out and training latents",
    Kind.loss: "loss on held-out latents",
    Kind.samples: "samples: each row one class, fixed noise",
    Kind.features: "samples against what the name says, by Inception's features",
}


def facts(found: Sequence[Phase]) -> list[tuple[str, str]]:
    """The model, its latents, how samples are drawn."""
    lines = []
    for phase in found:
        tree, manifest = phase.config.get("config", {}), _latents(phase)
        if not manifest:
            continue
        lines += [("model", _model(tree["task"])), *_stages(tree["task"])]
        lines.append(("latents", _cache(manifest)))
        drawn = dict.fromkeys(_sampling(e) for e in tree["evals"] if "sampler" in e)
        lines += [("samples", text) for text in drawn]
    return list(dict.fromkeys(lines))


def _model(task: dict[str, Any]) -> str:
    model = task["model"]
    name = model["class"].rsplit(":", 1)[-1].removesuffix("Config")
    return (
        f"{name}, depth {model['depth']}, width {model['width']}; {_objective(task)}; "
        f"latents normalised by {task['latent_norm']}"
    )


def _objective(task: dict[str, Any]) -> str:
    """What it is trained for: labels, diffusion, or the tokens that one schedule masks."""
    if "classes" in task:
        how = {"linear": "linear probe", "finetune": "fine-tuned"}[task["mode"]]
        return f"{how} on {task['classes']} classes"
    if "process" in task:
        process = task["process"]
        return (
            f"process {process['kind']}, predicts {process['predict']}, times {process['times']}, "
            f"shift {process['shift']:g}"
        )
    what = "whitened" if task["norm_target"] else "masked"
    return f"predicts {what} tokens, {_mask(task['mask'])}"


def _mask(mask: dict[str, Any]) -> str:
    if mask["kind"] == "constant":
        text = f"mask {mask['end']:.0%}" if mask["end"] else "nothing masked"
    else:
        text = f"mask {mask['kind']} {mask['start']:.0%} to {mask['end']:.0%}"
    return text.replace("%", " %")


def _stages(task: dict[str, Any]) -> list[tuple[str, str]]:
    """Masks and weights of the parts of a training, and what else masked diffusion has."""
    if "stages" not in task:
        return []
    found, first = [], 0.0
    for i, stage in enumerate(task["stages"]):
        what = [
            f"{first:.0%} to {stage['until']:.0%} of the steps".replace("%", " %"),
            _mask(stage["mask"])
            + (f" in squares of {stage['block']} tokens a side" if stage["block"] > 1 else ""),
            *(f"{name} {stage[name]:g}" for name in ("clean", "diffusion", "reconstruction")),
        ]
        if every := stage["rehearse_every"]:
            ratio = f"{stage['rehearse_ratio']:.0%}".replace("%", " %")
            what.append(f"a rehearsal with mask {ratio} every {every} steps")
        found.append((f"stage {i}", ", ".join(what)))
        first = stage["until"]
    return found + _heads(task)


def _heads(task: dict[str, Any]) -> list[tuple[str, str]]:
    """The second head of masked diffusion and its loss on the first channels, where they are."""
    found = []
    if any(s["reconstruction"] or s["rehearse_every"] for s in task["stages"]):
        weight = {"one": "1", "alpha_bar": "alpha²"}[task["rec_weight"]]
        target = task["rec_target"].replace("_", ", ")
        found.append(("masked tokens", f"second head, target {target}, example weight {weight}"))
    if counts := task["channel_counts"]:
        said = ", ".join(map(str, counts))
        more = f"further weight {task['channel_weight']:g}" if task["always_all"] else "in place"
        found.append(("channels", f"also the first {said} alone, {more}"))
    return found


def _cache(manifest: dict[str, Any]) -> str:
    plan = manifest["plan"]
    shape = "×".join(map(str, plan["shape"]))
    return (
        f"{shape}, {manifest['images']:,} crops of {manifest['dataset']} at {plan['resolution']} "
        f"px in {manifest['num_classes']} classes, RMS {manifest['rms']:.3g}; decoded by "
        f"{manifest['description'] or manifest['autoencoder']}"
    )


def _sampling(evaluator: dict[str, Any]) -> str:
    sampler, scale = evaluator["sampler"], evaluator["guidance"]["scale"]
    name = sampler["class"].rsplit(":", 1)[-1].removesuffix("Config")
    steps = f", {sampler['steps']} steps" if "steps" in sampler else ""
    return f"{name}{steps}, guidance {scale:g}" + (" (off)" if scale == 1 else "")


# ---------------------------------------------------------------------------- over the training


def spread(steps: Sequence[int], most: int = _PICTURES) -> list[int]:
    """At most so many of the steps, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def by_time(phase: Phase, evaluator: str) -> dict[int, list[tuple[float, float]]]:
    """{step: (middle of a part of the time, loss)}; of steps with fewer than two parts nothing."""
    curves = {}
    for row in phase.rows:
        starts = sorted(
            (float(match[1]), value)
            for key, value in row.items()
            if key.startswith(f"{evaluator}/") and (match := BIN.search(key))
            and isinstance(value, int | float)
        )  # fmt: skip
        if len(starts) > 1:
            half = min(b - a for (a, _), (b, _) in itertools.pairwise(starts)) / 2
            curves[row["step"]] = [(start + half, value) for start, value in starts]
    return curves
