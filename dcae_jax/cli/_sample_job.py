"""What `python -m dcae_jax sample` is asked for, checked before any weights are read."""

import argparse
import copy
import dataclasses
import difflib
import enum
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from dcae_jax.cli import _options, _trained
from dcae_jax.cli._trained import Model, say, weights_record

if TYPE_CHECKING:
    import numpy as np
    from etils import epath

    from dcae_jax.config import RunConfig
    from dcae_jax.diffusion.guidance import GuidanceConfig
    from dcae_jax.diffusion.process import ProcessConfig
    from dcae_jax.diffusion.samplers import SamplerConfig
    from dcae_jax.evals.class_scores import ClassScoresConfig
    from dcae_jax.evals.generate import GenerateConfig
    from dcae_jax.tasks.diffuse import DiffuseConfig

_RANDOM = "random"
DRAWN = "random (torch.randint)"  # until 0.4 "random" were others
IN_TURN = "in turn"


class Job(NamedTuple):
    """What is drawn."""

    model: Model
    weak: Model | None
    sampler: "SamplerConfig"
    guide: "GuidanceConfig"
    dtype: str  # of activations, where it was asked for; else ""
    classes: list[int]
    order: str  # of the classes
    labels: "np.ndarray"  # of each sample
    seed: int
    out: "epath.Path"

    @property
    def n(self) -> int:
        """Samples that are wanted."""
        return len(self.labels)


def add_sampling(to: argparse.ArgumentParser) -> None:
    """How samples are drawn and decoded."""
    add = to.add_argument
    add("--sampler", metavar="NAME", help="ddpm, ddim, euler, heun, dpm_fast, dpm_2m or dopri5")
    add("--steps", type=int, metavar="N", help="of the sampler; more are finer and slower")
    add("--sampler-option", action="append", default=[], metavar="NAME=VALUE",
        help="another option of the sampler, e.g. eta=1 or rtol=1e-4; may be repeated")  # fmt: skip
    add("--cfg", type=float, metavar="SCALE", help="guidance scale; 1 is off, and half of the cost")
    add("--cfg-interval", type=float, nargs=2, metavar=("START", "STOP"),
        help="guided where START <= t <= STOP; 0 is data, 1 is noise")  # fmt: skip
    add("--cfg-channels", type=int, metavar="K",
        help="guide only the first K channels (the original DiT: 3); 0: all")  # fmt: skip
    add("--weak", metavar="RUN",
        help="autoguidance: away from this weaker model of the same latents (an earlier step "
        "directory, a smaller network) instead of away from no class")  # fmt: skip
    add("--autoencoder", metavar="AE",
        help=f"decodes; default: that of the latents. {_options.FROM}")  # fmt: skip


# ----------------------------------------------------------------------- what is asked for, checked


def job_of(args: argparse.Namespace) -> Job:
    """All that can be checked before any weights are read; UserError on the first mistake."""
    from dcae_jax import checkpoint
    from dcae_jax.errors import UserError

    for name in ("n", "batch"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise UserError(f"--{name} {vars(args)[name]} is too small; at least 1")
    model = _find(args, "--from", args.source)
    weak = _find(args, "--weak", args.weak) if args.weak else None
    if weak is not None:
        _check_weak(model, weak)
    seed = model.run.seed if args.seed is None else args.seed
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed} is not in 0..{2**32 - 1}")
    if not (args.autoencoder or model.manifest.autoencoder):
        raise UserError(
            f"--from {args.source} does not know the autoencoder of its latents: name it, "
            "--autoencoder DIR_OR_HUB_NAME"
        )
    sampler, guide = sampler_of(args, model), _guidance(args, model)
    classes, order = classes_of(args.classes, model)
    labels = _labels(classes, order, args.n, seed)
    out = checkpoint.absolute(args.out)
    return Job(
        model, weak, sampler, guide, args.dtype or "", classes, order, labels, seed, out
    )  # fmt: skip


def _find(args: argparse.Namespace, option: str, source: str) -> Model:
    """The diffusion model at a workdir or step; UserError if it is something else."""
    from dcae_jax.errors import UserError
    from dcae_jax.tasks.diffuse import DiffuseConfig

    model = _trained.find(args, option, source, (DiffuseConfig,), "a diffusion model")
    if problem := model.run.task.sampling_problem():
        raise UserError(f"{option} {source} cannot be sampled: {problem}")
    return model


def _check_weak(model: Model, weak: Model) -> None:
    """UserError unless both say the same of the same x_t."""
    import numpy as np

    from dcae_jax.diffusion.process import Kind
    from dcae_jax.errors import UserError

    def refuse(what: str, of_weak: Any, of_model: Any) -> None:
        raise UserError(
            f"--weak {weak.source} cannot guide --from {model.source}: its {what} {of_weak}, not "
            f"{of_model}; both models must be of the same latents and process"
        )

    ours, theirs = (m.manifest.encoder for m in (model, weak))
    if ours and theirs and ours != theirs:
        refuse("latents are of the encoder", theirs[:16], ours[:16])
    for what, of in (
        ("latents have the shape", lambda t: (*t.model.input_size, t.model.in_channels)),
        ("number of classes is", lambda t: t.model.num_classes),
        ("process is", lambda t: Kind(t.process.kind).value),
    ):
        if of(model.run.task) != of(weak.run.task):
            refuse(what, of(weak.run.task), of(model.run.task))
    for a, b in zip(_norm(model), _norm(weak), strict=True):
        if not np.array_equal(a, b):
            refuse("normalisation of the latents is", short(b.tolist()), short(a.tolist()))
    if weights_record(model)["digest"] == weights_record(weak)["digest"]:
        raise UserError(
            f"--weak {weak.source} has the very weights of --from {model.source}: nothing would be "
            "guided; give an earlier step directory, or a smaller model"
        )


def _norm(model: Model) -> "tuple[np.ndarray, np.ndarray]":
    """(shift, scale) of the latents."""
    import numpy as np

    from dcae_jax.tasks import latents

    found = latents.normalisation(model.run.task.latent_norm, model.manifest)
    return np.asarray(found.shift), np.asarray(found.scale)


# ----------------------------------------------------------------------------- sampler and guidance


def _grid_config(run: "RunConfig") -> "GenerateConfig | ClassScoresConfig | None":
    """What makes the run's own grids."""
    from dcae_jax.evals.class_scores import ClassScoresConfig
    from dcae_jax.evals.generate import GenerateConfig

    return next((e for e in run.evals if isinstance(e, GenerateConfig | ClassScoresConfig)), None)


def _published(process: "ProcessConfig") -> "tuple[SamplerConfig, float]":
    """(sampler, guidance scale) of the published models of this process (arXiv 2410.10733)."""
    from dcae_jax.diffusion.process import Kind
    from dcae_jax.diffusion.samplers import AncestralConfig, Dopri5Config, DPMFastConfig

    return {
        Kind.scaled_linear: (DPMFastConfig(), 1.5),  # UViT
        Kind.flow: (Dopri5Config(), 1.2),  # USiT
        Kind.ddpm: (AncestralConfig(), 1.3),  # DiT
    }[Kind(process.kind)]


def sampler_of(args: argparse.Namespace, model: Model) -> "SamplerConfig":
    """The sampler with its options; UserError with all that does not fit."""
    from dcae_jax.diffusion.samplers import SAMPLERS
    from dcae_jax.errors import UserError

    process, grid = model.run.task.process, _grid_config(model.run)
    if args.sampler and args.sampler not in SAMPLERS:
        raise UserError(f"--sampler {args.sampler}: there are {', '.join(SAMPLERS)}")
    base, why = _published(process)[0], "published for this process"
    if grid is not None:
        base, why = grid.sampler, f"as in the run's grids {grid.name!r}"
    if args.sampler and type(base) is not SAMPLERS[args.sampler]:
        base, why = SAMPLERS[args.sampler](), "asked for"
    name = sampler_name(base)
    changes = _sampler_options(name, base, args.sampler_option)
    if args.steps is not None:
        _set_steps(name, base, changes, args.steps)
    found = dataclasses.replace(copy.copy(base), **changes)
    if problems := dict.fromkeys(found.problems() + found.process_problems(process)):
        lines = "\n".join(f"  - {p}" for p in problems)
        raise UserError(f"sampler {name} cannot be used here:\n{lines}")
    given = f"; {', '.join(changes)} asked for" if changes else ""
    say(f"sampler      {describe_sampler(found)}   ({why}{given})")
    return found


def _set_steps(name: str, base: "SamplerConfig", changes: dict[str, Any], steps: int) -> None:
    from dcae_jax.errors import UserError

    if "steps" in changes:
        raise UserError("--steps and --sampler-option steps are the same; give one of them")
    if "steps" not in {f.name for f in dataclasses.fields(base)}:
        raise UserError(
            f"--steps {steps}: {name} chooses its own steps; leave --steps out, or give its "
            "tolerances (--sampler-option rtol=1e-4), or take --sampler heun"
        )
    changes["steps"] = steps


def _sampler_options(name: str, base: "SamplerConfig", given: list[str]) -> dict[str, Any]:
    """The values of --sampler-option, as their fields have them."""
    from dcae_jax.errors import UserError

    known = {f.name: f.type for f in dataclasses.fields(base)}
    found: dict[str, Any] = {}
    for text in given:
        option, equals, value = (part.strip() for part in text.partition("="))
        if not equals or option not in known:
            raise UserError(f"--sampler-option {text}: {name} has {', '.join(known)}; NAME=VALUE")
        if option in found:
            raise UserError(f"--sampler-option {option} is given twice")
        try:
            found[option] = _parsed(known[option], value)
        except ValueError as e:
            raise UserError(f"--sampler-option {text}: {e}") from e
    return found


def _parsed(kind: Any, text: str) -> Any:
    """A value for a field: int, float, or an enum that may be None."""
    if kind in (int, float):
        return kind(text)
    choices = next(k for k in kind.__args__ if issubclass(k, enum.Enum))
    return choices(text)


def sampler_name(cfg: "SamplerConfig") -> str:
    """The name that --sampler takes."""
    from dcae_jax.diffusion.samplers import SAMPLERS

    return next(name for name, kind in SAMPLERS.items() if kind is type(cfg))


def describe_sampler(cfg: "SamplerConfig") -> str:
    """Its name and options for people."""
    values = {k: v for k, v in dataclasses.asdict(cfg).items() if v is not None}
    return ", ".join([sampler_name(cfg), *(f"{k} {_plain(v)}" for k, v in values.items())])


def _plain(value: Any) -> str:
    return value.value if isinstance(value, enum.Enum) else f"{value:g}"


def _guidance(args: argparse.Namespace, model: Model) -> "GuidanceConfig":
    """The guidance; UserError with all that does not fit."""
    from dcae_jax.diffusion.guidance import GuidanceConfig, Reference
    from dcae_jax.errors import UserError

    task, grid = model.run.task, _grid_config(model.run)
    if args.weak and args.cfg is None:
        raise UserError("--weak needs --cfg SCALE, above 1: how far to go away from the weak model")
    if grid is None:
        base, why = GuidanceConfig(scale=_published(task.process)[1]), "published for this process"
    else:
        base, why = grid.guidance, f"as in the run's grids {grid.name!r}"
    changes: dict[str, Any] = {"reference": Reference(base.reference)}
    if args.weak:
        base, changes = GuidanceConfig(), {"reference": Reference.weak_model}
    given = {"scale": args.cfg, "channels": args.cfg_channels}
    if args.cfg_interval is not None:
        given["start"], given["stop"] = args.cfg_interval
    given = {k: v for k, v in given.items() if v is not None}
    found = dataclasses.replace(base, **changes, **given)
    if problems := found.problems() + _guidance_problems(found, task):
        raise UserError("\n".join(problems))
    asked = f"{', '.join(given)} asked for" if given else ""
    notes = "; ".join(note for note in ("" if args.weak else why, asked) if note)
    say(f"guidance     {describe_guidance(found)}   ({notes})")
    return found


def _guidance_problems(cfg: "GuidanceConfig", task: "DiffuseConfig") -> list[str]:
    """What the model has to say to it."""
    from dcae_jax.diffusion.guidance import Reference

    found = []
    if cfg.channels > task.model.in_channels:
        found.append(
            f"--cfg-channels {cfg.channels}: latents have {task.model.in_channels}; 0 guides all"
        )
    if cfg.scale != 1 and cfg.reference is Reference.null_class and not task.label_dropout:
        found.append(
            f"guidance {cfg.scale:g} asks for samples without a class, which this network has not "
            "seen (task.label_dropout = 0): --cfg 1 switches it off, --weak needs no such samples"
        )
    return found


def describe_guidance(cfg: "GuidanceConfig") -> str:
    """The guidance for people."""
    from dcae_jax.diffusion.guidance import Reference

    if cfg.scale == 1.0:
        return "off"
    text = f"{cfg.scale:g} away from "
    text += "no class" if cfg.reference is Reference.null_class else "the weak model"
    if (cfg.start, cfg.stop) != (0.0, 1.0):
        text += f", for {cfg.start:g} <= t <= {cfg.stop:g}"
    return text + (f", the first {cfg.channels} channels" if cfg.channels else "")


# ------------------------------------------------------------------------------------------ classes


def classes_of(text: str, model: Model) -> tuple[list[int], str]:
    """(class numbers, their order) of "all", "random", "207,360", "0-9", "cat,dog"."""
    from dcae_jax.errors import UserError

    count = min(model.run.task.model.num_classes, model.manifest.num_classes)
    if text in ("all", _RANDOM):
        return list(range(count)), DRAWN if text == _RANDOM else IN_TURN
    names = {name.lower(): i for i, name in enumerate(model.manifest.classes)}
    found: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        found += _numbers(part, names, count)
    if not found:
        raise UserError(f"--classes {text!r} names no class")
    return found, IN_TURN


def _numbers(part: str, names: dict[str, int], count: int) -> list[int]:
    """Class numbers, below `count`, of "207", "0-9" or a name."""
    from dcae_jax.errors import UserError
    from dcae_jax.evals.generate import check_classes

    if part.lower() in names:
        return [names[part.lower()]]
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
        first, last = int(match[1]), int(match[2] or match[1])
        if first <= last:
            check_classes((first, last), count)
            return list(range(first, last + 1))
        raise UserError(f"--classes: {part} ends before it begins")
    inside = [name for name in names if part and part.lower() in name]
    near = inside[:3] or difflib.get_close_matches(part.lower(), names, 3)
    hint = f"; near: {', '.join(near)}" if near else ""
    named = " and no name of the latents' classes" if names else " (the latents' have no names)"
    raise UserError(f"--classes: {part!r} is no class number, no range such as 0-9{named}{hint}")


def _labels(classes: list[int], order: str, n: int, seed: int) -> "np.ndarray":
    """The class of each sample; a random one is a function of (seed, index)."""
    import numpy as np

    from dcae_jax.evals.labels import balanced_labels, random_labels

    count = len(classes)
    index = random_labels(n, count, seed) if order == DRAWN else balanced_labels(n, count)
    return np.array(classes, np.int32)[index]


def short(value: Any) -> str:
    """A value for one line of a message; of a digest the beginning."""
    text = value[:16] if isinstance(value, str) and len(value) == 64 else str(value)
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"
