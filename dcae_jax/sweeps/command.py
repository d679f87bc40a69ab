"""The command line of launch/sweep.py: runs the trials of a sweep, or tells how they stand."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dcae_jax import config as config_lib
from dcae_jax.config import RunConfig
from dcae_jax.errors import UserError
from dcae_jax.sweeps import backends, definition, results
from dcae_jax.sweeps.backends import Backend, Kind
from dcae_jax.sweeps.definition import Base, Trial
from dcae_jax.sweeps.folder import Folder, Manifest, Record, State
from dcae_jax.sweeps.results import Metric
from dcae_jax.sweeps.scheduler import Limits, Scheduler

_HELP = """Runs many trials of one config, each a process with a workdir of its own.

The config file holds, beside get_config:  def sweep(): yield {"optim.lr": 1e-4, "seed": 0}
and any number of  def sweep_NAME():  several are combined by product, --sweep=lr,seed.
The same command goes on after any interruption, and with trials added or removed."""


@dataclass(slots=True)
class Job:
    """The options, checked."""

    base: Base
    options: argparse.Namespace
    folder: Folder
    backend: Backend
    cfg: RunConfig  # without any trial's overrides


def main(argv: Sequence[str], root: str) -> int:
    """Runs or shows a sweep; `root` holds main.py and launch/.  The exit code of the process."""
    try:
        return _run(argv, root)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "launch/sweep.py", allow_abbrev=False, description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.x.y=V: overrides of the config for all trials.  Exit codes: 0 all trials "
        "done, 1 some failed, 2 wrong usage, 42 stopped by a signal (the same command goes on).",
    )  # fmt: skip
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", help="config file with get_config and sweeps")
    add("--sweep", default="", metavar="NAMES", help="sweeps of the file, e.g. lr,seed; default: "
        "its plain sweep()")  # fmt: skip
    add("--out", metavar="DIR", help="folder of the sweep; may be gs://")
    add("--backend", default="local", choices=[k.value for k in Kind], help="where trials run")
    add("--slots", type=int, default=1, help="trials at a time; GPUs of this machine are shared "
        "out evenly")  # fmt: skip
    add("--launcher", default="", metavar="OPTIONS", help="of launch/BACKEND.py, as one text; "
        "{slot} and {trial} stand for the trial's")  # fmt: skip
    add("--processes", type=int, default=1, help="of each trial, with --backend=local")
    add("--metric", default="", metavar="NAME", help="what trials are compared by; default: "
        "checkpoint.best")  # fmt: skip
    add("--better", default="", choices=["higher", "lower"], help="where the metric's name does "
        "not tell")  # fmt: skip
    add("--max-restarts", type=int, default=100, help="of one trial that is preempted")
    add("--backoff", type=float, default=10.0, metavar="SECONDS", help="pause before a trial that "
        "lost a process starts again; doubled each time")  # fmt: skip
    add("--retry-failed", action="store_true", help="start failed trials again")
    add("--dry-run", action="store_true", help="print the commands of all trials; start none")
    add("--status", action="store_true", help="show the table and the best trial of --out; write "
        "results.csv and sweep.html")  # fmt: skip
    return parser


def _run(argv: Sequence[str], root: str) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    wrong = [a for a in rest if not re.match(r"--config\.[^=]+=", a)]
    if wrong:
        raise UserError(
            f"unknown argument {wrong[0]!r}; see --help. Overrides for all trials are written "
            "--config.x.y=VALUE"
        )
    if not options.out:
        raise UserError("no --out; give the folder of the sweep, e.g. --out=runs/sweep")
    folder = Folder(options.out)
    if options.status:
        return _status(folder, options)
    return _start(_job(options, rest, folder, root))


def _job(options: argparse.Namespace, rest: Sequence[str], folder: Folder, root: str) -> Job:
    """The options, checked as far as is possible without trials."""
    if not options.config:
        raise UserError("no --config; give a file, e.g. --config=configs/demo.py:phase1")
    for name in ("slots", "processes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}; at least 1")
    kind, slots = Kind(options.backend), options.slots
    if options.processes > 1 and kind is not Kind.local:
        raise UserError(
            f"--processes is for --backend=local; tell launch/{kind.value}.py by --launcher"
        )
    gpus = backends.share(backends.local_gpus(), slots) if kind is Kind.local else ()
    backend = Backend(kind, root, options.launcher, options.processes, gpus)
    if problem := backend.problem(slots):
        raise UserError(problem)
    base = Base(options.config, tuple(rest))
    return Job(base, options, folder, backend, base.resolved())


# ---------------------------------------------------------------------------------------- running


def _start(job: Job) -> int:
    """Checks everything, then runs what has not run."""
    sweeps = [name for name in job.options.sweep.split(",") if name]
    every = definition.combined(job.base, sweeps)
    old = job.folder.manifest()
    if old is not None:
        _refuse_other(job, old, every)
    known = {**old.removed, **old.trials} if old else {}
    trials = definition.named(every, known)
    configs = definition.check(job.base, trials)
    known_scores = results.metric_names(job.cfg)
    wanted = job.options.metric or job.cfg.checkpoint.best
    by = results.metric(known_scores, wanted, job.options.better)
    if job.options.dry_run:
        return _dry_run(job, trials)
    with job.folder.claimed():
        now = {trial.name: trial.overrides for trial in trials}
        removed = {name: o for name, o in known.items() if name not in now}
        job.folder.write_manifest(
            Manifest(
                job.base.config, list(job.base.overrides), sweeps, config_lib.to_json(job.cfg),
                now, removed, known_scores, by.name if by else "", job.options.better,
            )
        )  # fmt: skip
        _tell_edits(old, now)
        return _schedule(job, configs, now, removed, by)


def _schedule(
    job: Job, configs: dict[str, RunConfig], trials: dict[str, definition.Overrides],
    removed: dict[str, definition.Overrides], by: Metric | None,
) -> int:  # fmt: skip
    """The trials to their end; writes what came out after each."""
    records = {name: job.folder.record(name, overrides) for name, overrides in trials.items()}
    for record in records.values():
        if record.state is State.failed and job.options.retry_failed:
            record.state = State.waiting

    scores = results.shown_scores(results.metric_names(job.cfg), by)

    def changed() -> None:
        _write_csv(job.folder, scores, list(scheduler.records.values()))

    scheduler = Scheduler(
        job.folder, job.base, job.backend, job.options.slots,
        Limits(job.options.max_restarts, job.options.backoff), records=records,
        steps={name: cfg.steps for name, cfg in configs.items()},
        removed={name: job.folder.record(name, o) for name, o in removed.items()},
        changed=changed,
    )  # fmt: skip
    done = [r.name for r in records.values() if r.state is State.done]
    print(f"{len(records)} trials in {job.folder.path}, {len(done)} done", flush=True)
    code = scheduler.run()
    found = _write_csv(job.folder, scores, list(scheduler.records.values()))
    print(results.text(found, by), flush=True)
    return code


def _dry_run(job: Job, trials: Sequence[Trial]) -> int:
    """Prints what each trial would run."""
    import shlex

    for i, trial in enumerate(trials):
        workdir = f"--workdir={job.folder.workdir(trial.name)}"
        slot = i % job.options.slots
        command = job.backend.command(
            [*job.base.flags(), *trial.flags(), workdir], slot, trial.name
        )
        visible = job.backend.gpus and ",".join(job.backend.gpus[slot])
        prefix = f"CUDA_VISIBLE_DEVICES={visible} " if visible else ""
        print(f"{prefix}{shlex.join(command)}")
    return 0


def _refuse_other(job: Job, old: Manifest, every: Sequence[definition.Overrides]) -> None:
    """UserError where the folder's sweep is not an earlier version of this one."""
    if old.config != job.base.config:
        raise UserError(
            f"--out {job.folder.path} holds a sweep of {old.config}, not of {job.base.config}; "
            "give another --out"
        )
    if lines := results.base_differences(old.base, job.cfg):
        raise UserError(
            f"--out {job.folder.path} holds a sweep of the same file with another base config; "
            "its trials could not be compared with new ones:\n" + "\n".join(lines)
            + "\nGive another --out, or restore the values"
        )  # fmt: skip
    known = [*old.trials.values(), *old.removed.values()]
    if old.trials and not any(overrides in known for overrides in every):
        raise UserError(
            f"--out {job.folder.path} holds another sweep ({', '.join(old.sweeps) or 'sweep'}): "
            f"it has none of these {len(every)} trials; give another --out"
        )


def _tell_edits(old: Manifest | None, now: dict[str, definition.Overrides]) -> None:
    if old is None:
        return
    if added := [name for name in now if name not in old.trials]:
        print(f"added since the last start: {', '.join(added)}")
    if gone := [name for name in old.trials if name not in now]:
        print(
            f"no longer in the sweep: {', '.join(gone)}; what they left stays, and those that "
            "still run are stopped"
        )


# ---------------------------------------------------------------------------------------- showing


def _write_csv(
    folder: Folder, scores: Sequence[str], records: Sequence[Record]
) -> list[results.Result]:
    found = results.read(folder, records)
    results.write_csv(folder, found, scores)
    return found


def _status(folder: Folder, options: argparse.Namespace) -> int:
    """The table of a sweep, which may be running."""
    manifest = folder.manifest()
    if manifest is None:
        raise UserError(f"--out {folder.path} holds no sweep; start one without --status")
    wanted = options.metric or manifest.metric
    by = results.metric(manifest.scores, wanted, options.better or manifest.better)
    records = [folder.record(name, o) for name, o in manifest.trials.items()]
    found = _write_csv(folder, results.shown_scores(manifest.scores, by), records)
    print(results.text(found, by))
    if by is None:
        raise results.no_metric(manifest.scores)
    return 0
