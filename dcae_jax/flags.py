"""Flags of main.py and of the commands: a typed config by `--config=FILE:ARG --config.x.y=V`.

config_flags reports an unknown field as a bare KeyError and lets a missing file or flag pass;
here each mistake is one sentence with the mend, and exit code 2.
"""

import itertools
import re
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from dcae_jax import config as config_lib
from dcae_jax.config import RunConfig
from dcae_jax.errors import UserError


def define_config() -> flags.FlagHolder[Any]:
    """Defines --config."""
    return config_flags.DEFINE_config_file(
        "config", None, "config file, with an argument after a colon: configs/demo.py:phase1",
        lock_config=False,
    )  # fmt: skip


def parse(argv: Sequence[str]) -> list[str]:
    """Parses absl flags; for `app.run(flags_parser=parse)`.  Exits with 2 on a mistake."""
    if any(re.fullmatch(r"-h|--?help(short)?", a) for a in argv[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    try:
        _check_config(argv)
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1:
            raise UserError(f"unknown argument(s) {rest[1:]}; flags begin with --, see --help")
        return rest
    except UserError as e:
        fail(str(e))
    except flags.UnrecognizedFlagError as e:
        fail(f"{e}; see --help")
    except (flags.Error, KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
        fail(_explain(argv, e))


def _check_config(argv: Sequence[str]) -> None:
    """The file exists, its get_config accepts the argument, every override names a field."""
    if any(re.fullmatch(r"--?help(short|full|xml)?", a) for a in argv):
        return
    values = _values(argv)
    if not values:
        raise UserError("no --config; give a file, e.g. --config=configs/demo.py:phase1")
    cfg = load(values[-1])
    for arg in argv[1:]:
        if match := re.match(r"--?config\.([^=]+)", arg):
            check_field(cfg, match[1])


def _values(argv: Sequence[str]) -> list[str]:
    """What follows --config= or --config."""
    found = [m[1] for a in argv[1:] if (m := re.fullmatch(r"--?config=(.*)", a))]
    pairs = itertools.pairwise(argv)
    return found + [b for a, b in pairs if re.fullmatch("--?config", a)]


def load(value: str) -> RunConfig:
    """The config of "FILE" or "FILE:ARG", before overrides."""
    path, _, arg = value.partition(":")
    module = load_module(path)
    return module.get_config(arg) if arg else module.get_config()


def load_module(path: str) -> types.ModuleType:
    """The config file as a module of its own; UserError if it is none."""
    import importlib.util
    import os

    if not os.path.isfile(path):
        raise UserError(f"config file {path!r} does not exist; see configs/ for those there are")
    spec = importlib.util.spec_from_file_location("dcae_jax_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config(arg); see configs/demo.py for an example")
    return module


def parsed(argv: Sequence[str]) -> RunConfig:
    """The config that main.py would get from these flags, --config and --config.x.y=V alone.

    Touches no flags of this process.  UserError for the first mistake.
    """
    argv = ["main.py", *argv]
    _check_config(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "", flag_values=values, lock_config=False, sys_argv=argv
    )
    try:
        values(argv)
    except (flags.Error, KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
        raise UserError(_explain(argv, e)) from e
    return values.config


def check_field(cfg: Any, path: str) -> None:
    """Raises UserError naming the nearest field if `path` ("optim.lr") does not exist."""
    if path not in _prefixes(cfg):
        raise UserError(f"--config.{path}: {config_lib.nearest_field(cfg, path)}")


def _prefixes(cfg: Any) -> set[str]:
    """All paths of the tree, inner nodes included."""
    found = set()
    for leaf in config_lib.flatten(cfg):
        parts = re.split(r"\.", leaf)
        found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    found |= {re.sub(r"\[\d+\]$", "", path) for path in found}
    return {path for path in found if not path.endswith("class")}


def _explain(argv: Sequence[str], error: Exception) -> str:
    if isinstance(error, IndexError):
        error = IndexError(
            "an index in [ ] is beyond the end of its list; --dry_run shows the lists"
        )
    text = str(error).strip("\"'").splitlines()[0] if str(error) else type(error).__name__
    given = [a for a in argv[1:] if a.startswith(("--config.", "-config."))]
    return f"{text}\nin: {' '.join(given) or ' '.join(argv[1:])}"


def fail(message: str) -> NoReturn:
    """Prints one message and exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
