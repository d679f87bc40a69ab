"""What a run was: config.json, summary.json, the workdir's lock, and what may change on resume."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import distributed
from dcae_jax.config import JSONValue, RunConfig
from dcae_jax.errors import UserError
from dcae_jax.report import writers
from dcae_jax.tasks.base import Task

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# On resume these may change freely: they do not touch the numbers of the run.
CADENCE = (
    r"report\..*|checkpoint\..*|evals(\[.*|$)|name|compile_cache|nonfinite.*|mesh\..*|microbatches"
    r"|data\.(threads|workers|prefetch|cache_mb|max_bad_fraction)|task\.model\.remat.*"
    r"|deterministic|init_from|init_weights"
)
# These make it another run: model shape, phase, data identity and order.
IDENTITY = r"task\.(phase|model|bottleneck|trainable).*|data\..*|seed|batch|ema\.decays|class"


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    found = {"dcae_jax": dcae_jax.__version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The git commit of the code, with "+changes" for a dirty tree; "" outside a checkout."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def meta(cfg: RunConfig) -> dict[str, JSONValue]:
    """What goes into config.json and every checkpoint."""
    return {
        "config": config_lib.to_json(cfg),
        "commit": commit(),
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "host": socket.gethostname(),
    }


def read(workdir: epath.Path) -> dict[str, Any] | None:
    """config.json of a workdir; None if there is none."""
    path = workdir / "config.json"
    return json.loads(path.read_text()) if path.exists() else None


def check_and_write(
    workdir: epath.Path, cfg: RunConfig, force: bool, say: Callable[[str], None]
) -> None:
    """Prints how the config differs from the run's in this workdir, then records the new one.

    Raises UserError if a field changed that makes it another run, unless `force`.
    """
    old = read(workdir)
    if old is not None:
        changes = config_lib.diff(old["config"], config_lib.to_json(cfg))
        _refuse_identity(workdir, changes, force)
        for path, (before, after) in changes.items():
            note = "" if re.fullmatch(CADENCE, path) else "  (changes the numbers from here on)"
            say(f"config changed since the last start: {path}: {before} -> {after}{note}")
    distributed.barrier("config compared")
    if distributed.is_main():
        record = meta(cfg) | {"command": sys.argv, "started": _now()}
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
    old, path = read(workdir), workdir / "summary.json"
    if old is None or not path.exists():
        return False
    _refuse_identity(workdir, config_lib.diff(old["config"], config_lib.to_json(cfg)), force)
    return json.loads(path.read_text())["steps"] >= cfg.steps


def write_summary(
    workdir: epath.Path, cfg: RunConfig, task: Task, totals: dict[str, Any],
    baselines: dict[str, dict[str, dict[str, float]]],
) -> None:  # fmt: skip
    """summary.json: what the report's table shows of this run."""
    rows = writers.read_metrics(workdir)
    names = [e.name for e in cfg.evals]
    record = {
        "name": cfg.name,
        "steps": cfg.steps,
        "resolution": cfg.data.resolution,
        **task.summary(),
        **totals,
        "evals": {"before": _scores(rows, names), "after": _scores(rows[::-1], names)},
        "baselines": baselines,
    }
    record["steps"] = cfg.steps
    (workdir / "summary.json").write_text(json.dumps(record, indent=2))


def _scores(rows: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, float]]:
    """The scores of each evaluator in the first row that has them."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        row = next((r for r in rows if f"{name}/psnr" in r), {})
        found[name] = {k.split("/")[-1]: v for k, v in row.items() if k.startswith(f"{name}/")}
    return found


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Refuses a second run in the same workdir on this machine; a dead run's lock is taken over."""
    if not distributed.is_main():
        yield
        return
    _make(workdir)
    path = workdir / "run.lock"
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
    if path.exists():
        _refuse_if_alive(path, me)
    path.write_text(json.dumps(me))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _make(workdir: epath.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir {workdir} cannot be made: {e}; give a folder you own") from e


def _refuse_if_alive(path: epath.Path, me: dict[str, Any]) -> None:
    try:
        other = json.loads(path.read_text())
        alive = other["host"] == me["host"] and _runs(other["pid"])
    except (ValueError, KeyError):
        return  # torn by a crash: nobody holds it
    if alive and other["pid"] != me["pid"]:
        raise UserError(
            f"{path.parent} is in use by process {other['pid']} on this machine since "
            f"{other['since']}; stop it or choose another --workdir"
        )


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
