"""What a run was: config.json, summary.json, the workdir's lock, and what may change on resume."""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

import dcae_jax
from dcae_jax import checkpoint, distributed
from dcae_jax import config as config_lib
from dcae_jax.config import JSONValue, RunConfig
from dcae_jax.errors import IN_USE, UserError
from dcae_jax.report import writers
from dcae_jax.tasks.base import Task

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# On resume these may change freely: they do not touch the numbers of the run.
CADENCE = (
    r"report\..*|checkpoint\..*|evals(\[.*|$)|name|compile_cache|nonfinite.*|mesh\..*|microbatches"
    r"|data\.((images\.)?(threads|workers|prefetch|cache_mb|max_bad_fraction)|path|autoencoder)|task\.model\.remat.*"
    r"|deterministic|init_from|init_weights"
)
# These make it another run: model shape, phase, data identity and order.
IDENTITY = (
    r"task\.(class|phase|model|bottleneck|trainable|norm_target|rec_target|latent_norm).*"
    r"|data\..*|seed|batch|ema\.decays|class"
)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    found = {"dcae_jax": dcae_jax.__version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def software() -> dict[str, JSONValue]:
    """What all processes of a run must have alike: versions, and the files of this package."""
    found = {f"version of {name}": text for name, text in versions().items()}
    return found | {"source of dcae_jax": _source_digest()}


@functools.cache
def _source_digest() -> str:
    root, found = pathlib.Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


@functools.cache
def commit() -> str:
    """The git commit of the code, with "+changes" for a dirty tree; "" outside a checkout.

    That of the start: it is the code that runs, whatever happens to the files later.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def meta(cfg: RunConfig, data: str) -> dict[str, JSONValue]:
    """What goes into config.json and every checkpoint; `data` is the fingerprint of the records."""
    return {
        "config": config_lib.to_json(cfg),
        "data": data,
        "commit": commit(),
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "host": socket.gethostname(),
    }


def read(workdir: epath.Path) -> dict[str, Any] | None:
    """config.json of a workdir, or what its newest checkpoint knows; None for a new one."""
    return _read_json(workdir / "config.json") or checkpoint.newest_meta(workdir)


def _read_json(path: epath.Path) -> dict[str, Any] | None:
    """The file's content; None if it is not there, or torn because its writer was killed."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        logging.warning("%s is torn (its writer was killed or the disk was full); ignored", path)
        return None


def command() -> str:
    """What was called, as a shell takes it: words with blanks are quoted."""
    path, *words = sys.argv
    program = ["-m", "dcae_jax"] if os.path.basename(path) == "__main__.py" else [path]
    return shlex.join(["python", *program, *words])


def check(
    workdir: epath.Path, cfg: RunConfig, data: str, force: bool, say: Callable[[str], None]
) -> None:
    """Prints how the config differs from that of the run in this workdir.

    `data` is the fingerprint of the records.  Raises UserError if something changed that makes it
    another run, unless `force`.
    """
    old = read(workdir)
    if old is None:
        return
    changes = _changes(old, cfg)
    if "data" in old and old["data"] != data:
        changes["data.(records)"] = (old["data"], data)
    _refuse_identity(workdir, changes, force)
    for path, (before, after) in changes.items():
        note = "" if re.fullmatch(CADENCE, path) else "  (changes the numbers from here on)"
        say(f"config changed since the last start: {path}: {before} -> {after}{note}")


def _changes(old: dict[str, Any], cfg: RunConfig) -> dict[str, tuple[JSONValue, JSONValue]]:
    """What differs from an older record's config; fields that it did not have had their default."""
    return config_lib.diff(config_lib.completed(old["config"]), config_lib.to_json(cfg))


def write(workdir: epath.Path, cfg: RunConfig, data: str, more: dict[str, JSONValue]) -> None:
    """Records what runs from now on, and what the task keeps beside it, in config.json."""
    distributed.barrier("config compared")
    if distributed.is_main():
        record = meta(cfg, data) | more | {"command": command(), "started": _now()}
        (workdir / "config.json").write_text(json.dumps(record, indent=2))


def _refuse_identity(
    workdir: epath.Path, changes: dict[str, tuple[JSONValue, JSONValue]], force: bool
) -> None:
    refused = {
        k: v
        for k, v in changes.items()
        if re.fullmatch(IDENTITY, k) and not re.fullmatch(CADENCE, k)
    }
    if refused and not force:
        lines = "\n".join(f"  - {k}: {a} -> {b}" for k, (a, b) in refused.items())
        raise UserError(
            f"{workdir} holds a run with another config; these fields make it another run:\n{lines}"
            "\nUse a new --workdir (and init_from to start from its weights), restore the values, "
            "or pass --force to continue all the same."
        )


def is_finished(workdir: epath.Path, cfg: RunConfig, force: bool) -> bool:
    """Whether the workdir's run has reached its last step and written its summary."""
    old, summary = read(workdir), _read_json(workdir / "summary.json")
    if old is None or summary is None:
        return False
    _refuse_identity(workdir, _changes(old, cfg), force)
    return summary["steps"] >= cfg.steps


def write_summary(
    workdir: epath.Path, cfg: RunConfig, task: Task, totals: dict[str, Any],
    baselines: dict[str, dict[str, dict[str, float]]],
) -> None:  # fmt: skip
    """summary.json: what the report's table shows of this run."""
    rows = writers.read_metrics(workdir)
    names, untrained = [e.name for e in cfg.evals], [r for r in rows if r["step"] == 0]
    record = {
        "name": cfg.name,
        "resolution": cfg.data.resolution,
        **task.summary(),
        **totals,
        "evals": {"before": _scores(untrained, names), "after": _scores(rows[::-1], names)},
        "baselines": baselines,
        "steps": cfg.steps,  # of the run, not of this attempt as in the totals
    }
    (workdir / "summary.json").write_text(json.dumps(record, indent=2))


def _scores(rows: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, float]]:
    """The scores of each evaluator in the first row that has them."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        of_this = ({k: v for k, v in r.items() if k.startswith(f"{name}/")} for r in rows)
        if row := next((r for r in of_this if r), {}):
            found[name] = {k.split("/")[-1]: v for k, v in row.items()}
    return found


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Refuses a second run in the same workdir; the kernel drops the lock of a dead run.

    `run.lock` stays when the run ends: only the lock on it counts.  An object store has no locks;
    there nothing keeps two runs apart.
    """
    if not distributed.is_main():
        yield
        return
    make_folder(workdir)
    if "://" in os.fspath(workdir):
        yield
        return
    path = os.path.join(workdir, "run.lock")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise UserError(f"{path} cannot be opened: {e}; give a --workdir you can write to") from e
    try:
        _take(handle, workdir)
        yield
    finally:
        os.close(handle)


def make_folder(workdir: epath.Path) -> None:
    """The folder of a run; UserError if it cannot be made."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir {workdir} cannot be made: {e}; give a folder you own") from e


def _take(handle: int, workdir: epath.Path) -> None:
    """Locks an open file and writes into it who we are; UserError if another run has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        other = os.read(handle, 1000).decode(errors="replace") or "another process"
        raise UserError(f"{workdir} {IN_USE} {other}; stop it or choose another --workdir") from e
    except OSError as e:
        logging.warning("%s cannot be locked (%s): start no second run in it", workdir, e)
    me = f"process {os.getpid()} on {socket.gethostname()} since {_now()}"
    with contextlib.suppress(OSError):  # a full disk; the text only serves the message above
        os.ftruncate(handle, 0)
        os.pwrite(handle, me.encode(), 0)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
