"""The run's configuration: typed, resolved once, validated whole, written as JSON.  Imports no jax.

A config is a tree of mutable `@dataclass(slots=True)` objects: `ml_collections.config_flags` can
override every leaf (`--config.optim.lr=2e-4`), and slots turn a misspelt field in a config file
into an error.  Each class lives in the file that uses it; this file owns what all runs share.
"""

import dataclasses
import difflib
import enum
import importlib
import json
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dcae_jax import score_names
from dcae_jax.errors import UserError

JSONValue = Any


class NonFinite(enum.Enum):
    """What happens when a loss or gradient is not finite (the update itself is never applied)."""

    stop = "stop"  # save the last good state and stop
    skip = "skip"  # leave the step out; stop after `nonfinite_limit` such steps in a row


class InitWeights(enum.Enum):
    """Which weights of another run `init_from` takes."""

    ema = "ema"
    params = "params"


class Optimizer(enum.Enum):
    """What turns gradients into steps."""

    adamw = "adamw"
    adan = "adan"  # published: beta1=0.98, beta2=0.92, beta3=0.99


class Schedule(enum.Enum):
    """Learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


@dataclass(slots=True)
class GroupConfig:
    """Multipliers for the parameters whose path matches; the first match counts."""

    pattern: str = ""  # regex, searched in the parameter path
    lr: float = 1.0  # times the schedule
    weight_decay: float = 1.0  # times OptimConfig.weight_decay


def regex_problem(pattern: str) -> str:
    """What is wrong with a regular expression; "" if nothing is."""
    try:
        re.compile(pattern)
    except re.error as e:
        return str(e)
    return ""


def _no_decay() -> list[GroupConfig]:
    return [GroupConfig(pattern=r"/(bias|scale)$", weight_decay=0.0)]


@dataclass(slots=True)
class OptimConfig:
    """AdamW or Adan with a schedule, parameter groups and clipping by global norm."""

    optimizer: Optimizer = Optimizer.adamw
    lr: float = 1e-4
    beta1: float = 0.9  # of the mean gradient
    beta2: float = 0.999  # AdamW: of the mean square; Adan: of the mean difference of gradients
    beta3: float = 0.99  # Adan: of the mean square
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0  # linear from warmup_from * lr to lr
    warmup_from: float = 0.0  # fraction of lr at the first step
    end_lr: float = 0.0  # fraction of lr at the last step (cosine, linear)
    # (share of the run's steps, factor on the scheduled rate from there to the next milestone)
    milestones: tuple[tuple[float, float], ...] = ()
    start_step: int = 0  # no update before this step (a discriminator may start late)
    clip_norm: float = 0.0  # global gradient norm; 0: no clipping
    groups: list[GroupConfig] = field(default_factory=_no_decay)

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = []
        if not (self.lr > 0 and math.isfinite(self.lr)):
            found.append(f"optim.lr = {self.lr} is not positive; choose one, e.g. 1e-4")
        for name in ("beta1", "beta2", "beta3"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optim.{name} = {getattr(self, name)} is not in [0, 1)")
        if self.optimizer is Optimizer.adan and (self.beta1, self.beta2) == (0.9, 0.999):
            found.append(
                "optim.optimizer = adan with beta1 = 0.9, beta2 = 0.999, which are AdamW's: they "
                "mean something else there; set beta1=0.98, beta2=0.92, beta3=0.99"
            )
        if self.optimizer is Optimizer.adamw and (self.beta1, self.beta2) == (0.98, 0.92):
            found.append(
                "optim.optimizer = adamw with beta1 = 0.98, beta2 = 0.92, which are Adan's: they "
                "mean something else there; set beta1=0.9, beta2=0.999 (MAE: 0.95)"
            )
        found += self._milestone_problems()
        found += [
            f"optim.groups: {g.pattern!r} is not a regular expression ({why})"
            for g in self.groups
            if (why := regex_problem(g.pattern))
        ]
        for name in ("weight_decay", "warmup_steps", "clip_norm", "start_step"):
            if not getattr(self, name) >= 0:  # NaN is refused too
                found.append(f"optim.{name} = {getattr(self, name)}; it is >= 0, and 0 is off")
        return found

    def _milestone_problems(self) -> list[str]:
        if any(not isinstance(m, (tuple, list)) or len(m) != 2 for m in self.milestones):
            return [
                f"optim.milestones = {self.milestones}; each is a pair (share of the steps, factor "
                "on the rate), e.g. ((0.85, 0.5),)"
            ]
        found, shares = [], [share for share, _ in self.milestones]
        if not all(0 < share < 1 for share in shares) or sorted(set(shares)) != shares:
            found.append(
                f"optim.milestones at {', '.join(map(str, shares))} of the steps; shares are "
                "between 0 and 1, each larger than the one before"
            )
        if not all(factor >= 0 and math.isfinite(factor) for _, factor in self.milestones):
            found.append(f"optim.milestones = {self.milestones}; factors on the rate are >= 0")
        return found


def _spec_problem(entry: str) -> str:
    """What is wrong with one override of the parameter rule; "" if nothing is."""
    pattern, arrow, axes = entry.partition("->")
    if not arrow or not {a.strip() for a in axes.split(",")} <= {"data", "fsdp", "spatial", "None"}:
        return (
            f"mesh.specs: {entry!r} is not 'regex -> axis,None,...' with the axes data, fsdp, "
            "spatial or None"
        )
    if why := regex_problem(pattern.strip()):
        return f"mesh.specs: {pattern.strip()!r} is not a regular expression ({why})"
    return ""


@dataclass(slots=True)
class MeshConfig:
    """Devices as data x fsdp x spatial; nothing else in a config depends on their number."""

    data: int = -1  # replicas; -1: all devices that the other axes leave
    fsdp: int = 1  # parameters, optimizer and batch are sharded over it
    spatial: int = 1  # image height is sharded over it (autoencoders only)
    zero1: bool = False  # optimizer state and EMA sharded over `data` as well, params replicated
    specs: tuple[str, ...] = ()  # overrides of the parameter rule: "regex -> fsdp,None,..."

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = []
        if self.data != -1 and self.data < 1:
            found.append(f"mesh.data = {self.data}; use a positive number, or -1 for what is left")
        for name in ("fsdp", "spatial"):
            if getattr(self, name) < 1:
                found.append(f"mesh.{name} = {getattr(self, name)}; the smallest is 1 (off)")
        return found + [p for entry in self.specs if (p := _spec_problem(entry))]


@dataclass(slots=True)
class EmaConfig:
    """Exponential moving averages of the parameters, in fp32."""

    decays: tuple[float, ...] = (0.9999,)  # () switches it off; the first one is evaluated
    warmup_steps: float = 2000.0  # decay * (1 - exp(-step / this)), as published; 0: none

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = [
            f"ema.decays has {d}; a decay is in (0, 1), e.g. 0.9999"
            for d in self.decays
            if not 0 < d < 1
        ]
        if len({f"{d:g}" for d in self.decays}) < len(self.decays):
            found.append(f"ema.decays = {self.decays}: two are equal to six digits; leave one out")
        if not self.warmup_steps >= 0:
            found.append(f"ema.warmup_steps = {self.warmup_steps}; 0 switches the warm-up off")
        return found


@dataclass(slots=True)
class CheckpointConfig:
    """When to save, what to keep.  A checkpoint is also written after init and at the end."""

    every: int = 1000  # steps
    keep: int = 3  # newest ones
    keep_every: int = 0  # and each multiple of this many steps; 0: none
    # and the best by this metric, saved whenever it gets better; "": none.  For example
    # "photos-128-test/psnr", or with best_is_highest=False "photos-128-test/rfid64"
    best: str = ""
    best_is_highest: bool = True

    def at_most(self, steps: int) -> int:
        """How many are on disk at once in a run of so many steps, one being written included."""
        every = steps // self.keep_every if self.keep_every else 0
        kept = self.keep + every + bool(self.best) + 1
        # One is made right after init; a new best one may come at any step.
        return kept if self.best else min(kept, 1 + math.ceil(steps / self.every))

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = []
        if self.every < 1:
            found.append(f"checkpoint.every = {self.every}; at least 1")
        if self.keep < 1:
            found.append(f"checkpoint.keep = {self.keep}; at least 1, or nothing could be resumed")
        way = score_names.better(self.best.rsplit("/", 1)[-1])
        if way is not None and (way is score_names.Better.higher) != self.best_is_highest:
            found.append(
                f"checkpoint.best_is_highest = {self.best_is_highest}, but of checkpoint.best = "
                f"{self.best!r} the {way.value} one is better; set {not self.best_is_highest}"
            )
        return found


@dataclass(slots=True)
class ReportConfig:
    """What is printed and written, and how often."""

    every: int = 50  # steps between two console lines and two rows of metrics
    tensorboard: bool = True
    wandb_project: str = ""  # "": no Weights & Biases
    profile_at: int = 0  # step at which a jax.profiler trace of `profile_steps` starts; 0: none
    profile_steps: int = 5


@dataclass(slots=True)
class RunConfig:
    """One run.  Global quantities only: nothing here depends on the number of devices."""

    name: str = ""  # shown in reports
    seed: int = 0
    steps: int = 0  # optimizer steps
    batch: int = 0  # examples per optimizer step, over all devices
    microbatches: int = 1  # each step's batch is worked off in so many parts (saves memory only)
    task: Any = None  # what is trained: a config of dcae_jax/tasks/
    data: Any = None  # images (data.pipeline.DataConfig) or latents (data.latents)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    evals: list[Any] = field(default_factory=list)  # configs of dcae_jax/evals/
    init_from: str | None = None  # workdir (or checkpoint step) of another run: its weights
    init_weights: InitWeights = InitWeights.ema
    nonfinite: NonFinite = NonFinite.stop
    nonfinite_limit: int = 10  # with skip: so many in a row stop the run
    deterministic: bool = False  # GPU only: deterministic kernels (slower), for bit-exact resume
    compile_cache: str = "auto"  # folder of compiled programs; auto: ~/.cache/dcae_jax/xla; "": off

    def problems(self) -> list[str]:
        """Problems of the shared fields (those of the parts are gathered by `validate`)."""
        found = []
        if self.steps < 1:
            found.append(f"steps = {self.steps}; set --config.steps, the optimizer steps to train")
        if self.batch < 1:
            found.append(f"batch = {self.batch}; set --config.batch to the global batch size")
        if self.microbatches < 1:
            found.append(f"microbatches = {self.microbatches}; the smallest is 1 (no accumulation)")
        if self.report.every < 1:
            found.append(f"report.every = {self.report.every}; the smallest is 1")
        if self.seed < 0:
            found.append(f"seed = {self.seed} is negative; choose one from 0 on")
        known = [f"{e.name}/{metric}" for e in self.evals for metric in e.metrics()]
        if self.checkpoint.best and self.checkpoint.best not in known:
            found.append(
                f"checkpoint.best = {self.checkpoint.best!r} is no metric of an evaluator; there "
                f"are {', '.join(known) or 'none'}"
            )
        if self.task is None:
            found.append("task is not set; a config names what is trained, e.g. AutoencodeConfig()")
        return found


# --------------------------------------------------------------------------- resolve and validate


def resolve(cfg: RunConfig) -> RunConfig:
    """Computes every derived value once, after the overrides; changes `cfg` and returns it."""
    if cfg.task is not None:
        cfg.task.resolve(cfg)
    for evaluator in cfg.evals:
        evaluator.resolve(cfg)
    return cfg


def validate(cfg: RunConfig, device_count: int | None = None) -> None:
    """Raises one UserError that lists all problems of the config, each with its mend.

    With `device_count` the mesh is checked against the machine too.
    """
    found = list(cfg.problems())
    for _, part in _parts(cfg):
        if part is not cfg and hasattr(part, "problems"):
            found += part.problems()
    if cfg.task is not None:
        found += cfg.task.run_problems(cfg)
    if device_count is not None and not found:
        found += _mesh_problems(cfg, device_count)
    # A part may be asked twice, by its owner (who knows more of its path) and by `_parts`.
    found = [p for p in dict.fromkeys(found) if not any(q.endswith(f".{p}") for q in found)]
    if found:
        lines = "\n".join(f"  - {p}" for p in found)
        raise UserError(f"the config has {len(found)} problem(s):\n{lines}")


def _mesh_problems(cfg: RunConfig, device_count: int) -> list[str]:
    mesh, found = cfg.mesh, []
    inner = mesh.fsdp * mesh.spatial
    if device_count % inner or (mesh.data != -1 and mesh.data * inner != device_count):
        data = "all" if mesh.data == -1 else mesh.data
        return [
            f"mesh {data} x {mesh.fsdp} x {mesh.spatial} does not fit {device_count} device(s); "
            "data x fsdp x spatial must be their number (data=-1 takes what is left)"
        ]
    need = device_count // mesh.spatial * cfg.microbatches
    if cfg.batch % need:
        low = cfg.batch // need * need
        near = f"{low} or {low + need}" if low else f"{need}"
        found.append(
            f"batch {cfg.batch} is not divisible by data x fsdp x microbatches = {need}; "
            f"nearest: {near}"
        )
    return found


def _parts(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All dataclass instances of the tree with their paths."""
    if dataclasses.is_dataclass(node):
        yield path, node
        for f in dataclasses.fields(node):
            yield from _parts(getattr(node, f.name), f"{path}.{f.name}" if path else f.name)
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from _parts(child, f"{path}[{i}]")


# --------------------------------------------------------------------------------- JSON and diffs


def to_json(node: Any) -> JSONValue:
    """A tree of plain JSON values; dataclasses carry their class under "class"."""
    if dataclasses.is_dataclass(node):
        cls = type(node)
        values = {f.name: to_json(getattr(node, f.name)) for f in dataclasses.fields(node)}
        return {"class": f"{cls.__module__}:{cls.__qualname__}", **values}
    if isinstance(node, enum.Enum):
        return node.value
    if isinstance(node, (list, tuple)):
        return [to_json(v) for v in node]
    return node


def from_json(value: JSONValue, hint: Any = Any) -> Any:
    """The inverse of `to_json`; `hint` is the type of the field that holds the value.

    Raises UserError for a class or field that this version does not have.
    """
    if isinstance(value, dict) and "class" in value:
        return _dataclass_from_json(value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        enums = [a for a in args if isinstance(a, type) and issubclass(a, enum.Enum)]
        rest = [a for a in args if typing.get_origin(a) in (tuple, list)]
        hint = (enums if isinstance(value, str) else rest or enums or [Any])[:1] or [Any]
        return value if value is None else from_json(value, hint[0])
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if isinstance(value, list):
        item = args[0] if args else Any
        items = [from_json(v, item) for v in value]
        return tuple(items) if origin is tuple or hint is tuple else items
    return value


def _dataclass_from_json(value: dict[str, JSONValue]) -> Any:
    module, _, name = value["class"].partition(":")
    if not module.startswith("dcae_jax."):
        raise UserError(f"config class {value['class']!r} is not one of dcae_jax")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise UserError(f"this version of dcae_jax has no config class {value['class']!r}") from e
    hints = typing.get_type_hints(cls)
    names = {k for k in value if k != "class"}
    if unknown := names - {f.name for f in dataclasses.fields(cls)}:
        raise UserError(
            f"{value['class']} has no field {sorted(unknown)}; was it written by "
            "another version of dcae_jax?"
        )
    return cls(**{k: from_json(value[k], hints[k]) for k in names})


def completed(value: JSONValue) -> JSONValue:
    """A config's JSON with the defaults of fields that are newer than it; else as it is."""
    try:
        return to_json(from_json(value))
    except UserError:  # a class or field of another version: `diff` shows it
        return value


def flatten(cfg: Any) -> dict[str, JSONValue]:
    """Every leaf as `"optim.lr": 1e-4`."""
    found: dict[str, JSONValue] = {}

    def walk(value: JSONValue, path: str) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, f"{path}.{k}" if path else k)
        elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
            for i, v in enumerate(value):
                walk(v, f"{path}[{i}]")
        else:
            found[path] = value

    walk(cfg if isinstance(cfg, dict) else to_json(cfg), "")
    return found


ABSENT = "(absent)"  # in the place of a value, for people


def diff(old: Any, new: Any) -> dict[str, tuple[JSONValue, JSONValue]]:
    """The leaves that differ between two configs (or their JSON): path -> (old, new)."""
    a, b = flatten(old), flatten(new)
    return {
        k: (a[k] if k in a else ABSENT, b[k] if k in b else ABSENT)
        for k in sorted(a.keys() | b.keys())
        if k not in a or k not in b or a[k] != b[k]
    }


def to_config_dict(cfg: RunConfig) -> Any:
    """An `ml_collections.FrozenConfigDict` of the config, for loggers and other tools.

    A list of parts, which a ConfigDict cannot hold, becomes a dict: `evals["0"].n`.
    """
    from ml_collections import FrozenConfigDict

    def plain(value: JSONValue) -> JSONValue:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "class"}
        if isinstance(value, list) and any(isinstance(v, dict) for v in value):
            return {str(i): plain(v) for i, v in enumerate(value)}
        return value

    return FrozenConfigDict(plain(to_json(cfg)))


def dumps(cfg: RunConfig) -> str:
    """The resolved config as indented JSON."""
    return json.dumps(to_json(cfg), indent=2)


def nearest_field(cfg: Any, path: str) -> str:
    """A sentence for an unknown field: which part has no such field, and the nearest that exists.

    Follows `path` ("task.losses.l1_wieght") as far as it goes.
    """
    node, done = cfg, []
    for name in path.replace("[", ".[").split("."):
        if name.startswith("["):
            node = node[int(name.strip("[]"))]
            done[-1] += name
            continue
        fields = (
            [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        )
        if name not in fields:
            break
        node = getattr(node, name)
        done.append(name)
    where = ".".join(["config", *done])
    every = [k for k in flatten(cfg) if not k.endswith("class")]
    close = difflib.get_close_matches(name, fields, 1) or difflib.get_close_matches(path, every, 1)
    same_leaf = [k for k in every if k.split(".")[-1] == name]
    if not difflib.get_close_matches(name, fields, 1) and same_leaf:
        hint = f"did you mean --config.{same_leaf[0]}?"
    elif close:
        prefix = ".".join([*done, close[0]]) if close[0] in fields else close[0]
        hint = f"did you mean --config.{prefix}?"
    else:
        hint = f"it has: {', '.join(fields)}"
    return f"{where} has no field {name!r}; {hint}"
