"""What a sweep consists of: trials from the functions of a config file, named and checked.

A config file holds `def sweep(): yield {"optim.lr": 1e-4, "seed": 0}` beside `get_config`, and any
number of `def sweep_NAME()`.  Several of them are combined by product.
"""

import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcae_jax import config as config_lib
from dcae_jax import flags
from dcae_jax.config import JSONValue, RunConfig
from dcae_jax.errors import UserError

DEFAULT = "sweep"  # the function that is taken when --sweep names none
_LONGEST = 80  # characters of a trial's name
Overrides = dict[str, JSONValue]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep: what it changes in the config."""

    name: str  # of its folder
    overrides: Overrides

    def flags(self) -> list[str]:
        """The overrides as flags of main.py.  None has no flag: the config's own value stays."""
        given = {path: value for path, value in self.overrides.items() if value is not None}
        return [f"--config.{path}={flag_text(value)}" for path, value in given.items()]


@dataclass(frozen=True, slots=True)
class Base:
    """The config that all trials start from: the flag's value and the overrides for all."""

    config: str  # FILE or FILE:ARG
    overrides: tuple[str, ...] = ()  # --config.x.y=V

    def flags(self) -> list[str]:
        """Flags of main.py."""
        return [f"--config={self.config}", *self.overrides]

    def resolved(self) -> RunConfig:
        """The config without any trial's overrides; it need not be valid."""
        return config_lib.resolve(flags.parsed(self.flags()))

    def module(self) -> types.ModuleType:
        """The config file."""
        return flags.load_module(self.config.partition(":")[0])

    def set_keys(self) -> dict[str, str]:
        """{path: flag} of the overrides for all trials."""
        return {flag.removeprefix("--config.").partition("=")[0]: flag for flag in self.overrides}


# ----------------------------------------------------------------------------- functions of a file


def combined(base: Base, names: Sequence[str]) -> list[Overrides]:
    """The product of the named sweeps of the config file, in the order of their names."""
    module = base.module()
    parts = [(name, _yielded(base, module, name)) for name in names or (DEFAULT,)]
    _refuse_shared_keys(base, parts)
    found = [
        {k: v for part in chosen for k, v in part.items()}
        for chosen in itertools.product(*(overrides for _, overrides in parts))
    ]
    seen: set[str] = set()
    for overrides in found:
        if (identity := _identity(overrides)) in seen:
            raise UserError(f"the sweep yields {_shown(overrides)} twice; leave one out")
        seen.add(identity)
    return found


def sweep_names(module: types.ModuleType) -> list[str]:
    """What --sweep may name in this file."""
    found = [name for name, value in vars(module).items() if inspect.isfunction(value)]
    plain = [DEFAULT] if DEFAULT in found else []
    return plain + [n.removeprefix("sweep_") for n in found if n.startswith("sweep_")]


def _yielded(base: Base, module: types.ModuleType, name: str) -> list[Overrides]:
    """All overrides of one sweep, as JSON."""
    path, known = base.config.partition(":")[0], sweep_names(module)
    if name not in known:
        raise UserError(
            f"{path} has no sweep {name!r}; there are: {', '.join(known) or 'none'}. "
            f"Write `def {DEFAULT if name == DEFAULT else f'sweep_{name}'}(): "
            'yield {"seed": 0}` beside get_config'
        )
    function = getattr(module, name if name == DEFAULT else f"sweep_{name}")
    made = function()
    if isinstance(made, Mapping) or not isinstance(made, Iterable):
        raise UserError(f"{path}: {function.__name__}() must yield dicts, not return {made!r}")
    found = [_as_overrides(each, f"{path}: {function.__name__}()") for each in made]
    if not found:
        raise UserError(f"{path}: {function.__name__}() yields no trial")
    return found


def _as_overrides(made: Any, where: str) -> Overrides:
    """Checks the form of what a config's function gives: {"optim.lr": 1e-4}."""
    if not isinstance(made, Mapping) or not all(isinstance(k, str) for k in made):
        raise UserError(f'{where} gives {made!r}; expected a dict such as {{"optim.lr": 1e-4}}')
    bad = [k for k, v in made.items() if dataclasses.is_dataclass(v) or isinstance(v, Mapping)]
    if bad:
        raise UserError(
            f"{where} sets {bad[0]} to {made[bad[0]]!r}; a sweep sets single fields: numbers, "
            'texts, enums, tuples. Set the fields below it, e.g. "optim.lr" and not "optim"'
        )
    return {k: config_lib.to_json(_plain(v)) for k, v in made.items()}


def from_search(made: Any, base: Base) -> Overrides:
    """What a config's `search(trial)` returned, checked likewise."""
    found = _as_overrides(made, f"{base.config.partition(':')[0]}: search()")
    _refuse_shared_keys(base, [("search", [found])])
    return found


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return value.item() if hasattr(value, "item") and not hasattr(value, "__len__") else value


def _refuse_shared_keys(base: Base, parts: Sequence[tuple[str, list[Overrides]]]) -> None:
    owner: dict[str, str] = {}
    for name, found in parts:
        for key in dict.fromkeys(k for overrides in found for k in overrides):
            if key in base.set_keys():
                raise UserError(
                    f"{base.set_keys()[key]} is set for all trials, and sweep {name!r} sets it "
                    "too; leave one of them out"
                )
            if key in owner:
                raise UserError(
                    f"sweeps {owner[key]!r} and {name!r} both set {key}; a field may be set by "
                    "one of the sweeps that are combined"
                )
            owner[key] = name


# ------------------------------------------------------------------------------------------- names


def named(every: Sequence[Overrides], known: Mapping[str, Overrides]) -> list[Trial]:
    """Trials with names for their folders: short, file-name safe, each of them once.

    `known`: names that were given earlier; the same overrides keep them.
    """
    old = {_identity(overrides): name for name, overrides in known.items()}
    taken = {name.casefold() for name in known}  # some file systems ignore case
    trials = []
    for overrides in every:
        name = old.get(_identity(overrides))
        if name is None:
            name = _short_name(overrides)
            if name.casefold() in taken:
                name = _with_digest(name, overrides)
            taken.add(name.casefold())
        trials.append(Trial(name, overrides))
    return trials


def _short_name(overrides: Overrides) -> str:
    """`lr=0.0001,seed=0`: the last parts of the paths, as many as tell them apart."""
    if not overrides:
        return "base"
    keys = short_keys(list(overrides))
    parts = [f"{keys[path]}={_safe(_value_name(v))}" for path, v in overrides.items()]
    name = _safe(",".join(parts), keep="=,")
    return name if len(name) <= _LONGEST else _with_digest(name, overrides)


def short_keys(paths: Sequence[str]) -> dict[str, str]:
    """{path: its last parts, as many as make it differ from the others}."""
    found = {}
    for path in paths:
        parts = path.split(".")
        for n in range(1, len(parts) + 1):
            short = ".".join(parts[-n:])
            if not any(p != path and (p == short or p.endswith(f".{short}")) for p in paths):
                break
        found[path] = short
    return found


def _value_name(value: JSONValue) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "_".join(_value_name(v) for v in value)
    return str(value)


def _safe(text: str, keep: str = "") -> str:
    return re.sub(rf"[^A-Za-z0-9.+_{keep}-]+", "-", text)


def _with_digest(name: str, overrides: Overrides) -> str:
    digest = hashlib.sha256(_identity(overrides).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST - 9]}-{digest}"


def _identity(overrides: Overrides) -> str:
    return json.dumps(overrides, sort_keys=True)


def _shown(overrides: Overrides) -> str:
    return ", ".join(f"{k}={v}" for k, v in overrides.items()) or "no override"


def flag_text(value: JSONValue) -> str:
    """A value as config flags read it: tuples as Python writes them."""
    return repr(tuple(value)) if isinstance(value, list) else str(value)


# -------------------------------------------------------------------------------------- validation


def check(base: Base, trials: Sequence[Trial]) -> dict[str, RunConfig]:
    """The resolved config of each trial, by name; one UserError with all problems of all."""
    plain = flags.parsed(base.flags())
    configs: dict[str, RunConfig] = {}
    problems: dict[str, list[str]] = {}  # problem -> trials
    for trial in trials:
        try:
            for path in trial.overrides:
                flags.check_field(plain, path)
            configs[trial.name] = _checked(base, trial)
        except UserError as e:
            problems.setdefault(str(e), []).append(trial.name)
    if problems:
        wrong = sum(map(len, problems.values()))
        lines = [
            f"{_whose(names, len(trials))}\n{_indented(text)}" for text, names in problems.items()
        ]
        raise UserError(
            f"{wrong} of {len(trials)} trials are not valid; none was started:\n" + "\n".join(lines)
        )
    return configs


def _whose(names: Sequence[str], count: int) -> str:
    if len(names) == count and count > 1:
        return f"  all {count} trials:"
    return "".join(f"  {name}:" if i == 0 else f"\n  {name}:" for i, name in enumerate(names))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _checked(base: Base, trial: Trial) -> RunConfig:
    """The trial's config, as main.py will resolve and validate it."""
    cfg = flags.parsed([*base.flags(), *trial.flags()])
    leaves = config_lib.flatten(cfg)
    for path, value in trial.overrides.items():
        if path not in leaves:
            raise UserError(f"{path} is a part of the config, not a field; set the fields below it")
        if value is None and leaves[path] is not None:
            raise UserError(
                f"{path} = None cannot be set by a flag; let get_config set None, and the trials "
                "values"
            )
        if not _same(leaves[path], value):
            raise UserError(
                f"{path} = {value!r} would be read as {leaves[path]!r}; give a value of that kind"
            )
    config_lib.validate(config_lib.resolve(cfg))
    return cfg


def _same(read: JSONValue, given: JSONValue) -> bool:
    """Whether a flag was read as what the sweep gave."""
    if isinstance(read, list) and isinstance(given, list):
        return len(read) == len(given) and all(map(_same, read, given))
    if isinstance(read, bool) or isinstance(given, bool):
        return read is given
    if isinstance(read, int | float) and isinstance(given, int | float):
        return read == given or (math.isnan(read) and math.isnan(given))
    return read == given
