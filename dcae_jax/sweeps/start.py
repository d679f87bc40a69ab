"""Starts a sweep, or goes on with one: checks everything, then hands it to the scheduler."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dcae_jax import config as config_lib
from dcae_jax.config import RunConfig
from dcae_jax.errors import UserError
from dcae_jax.sweeps import claim, definition, page, results, search
from dcae_jax.sweeps.backends import Backend
from dcae_jax.sweeps.definition import Base, Overrides, Trial
from dcae_jax.sweeps.folder import Folder, Manifest, Record, State
from dcae_jax.sweeps.results import Metric
from dcae_jax.sweeps.scheduler import Limits, Scheduler


@dataclass(slots=True)
class Job:
    """The options, checked."""

    base: Base
    options: argparse.Namespace
    folder: Folder
    backend: Backend
    cfg: RunConfig  # without any trial's overrides

    def metric(self) -> Metric | None:
        """What trials are compared by, if it is named."""
        wanted = self.options.metric or self.cfg.checkpoint.best
        return results.metric(results.metric_names(self.cfg), wanted, self.options.better)


def run(job: Job) -> int:
    """The trials to their end; the exit code."""
    old, by = job.folder.manifest(), job.metric()
    if old is None:
        job.folder.refuse_other()
    else:
        _refuse_other(job, old)
    trials = _searched(job, old, by) if job.options.search else _named(job, old)
    checked = [*trials, *(search.probes(job.base) if job.options.search else ())]
    configs = definition.check(job.base, checked)
    if job.options.dry_run:
        return _dry_run(job, checked)
    with claim.claimed(job.folder):
        manifest = _manifest(job, old, trials, by)
        job.folder.write_manifest(manifest)
        _tell_edits(old, manifest)
        return _schedule(job, manifest, {name: cfg.steps for name, cfg in configs.items()}, by)


def _named(job: Job, old: Manifest | None) -> list[Trial]:
    """The trials of the named sweeps; those that were there keep their names."""
    every = definition.combined(job.base, _sweeps(job))
    known = _known(old)
    if old and old.trials and not any(overrides in known.values() for overrides in every):
        raise UserError(
            f"--out {job.folder.path} holds another sweep ({', '.join(old.sweeps) or 'sweep'}): "
            f"it has none of these {len(every)} trials; give another --out"
        )
    return definition.named(every, known)


def _searched(job: Job, old: Manifest | None, by: Metric | None) -> list[Trial]:
    """The trials that an earlier start has suggested."""
    if job.options.sweep:
        raise UserError("--search and --sweep exclude each other; leave one out")
    if job.options.trials < 1:
        raise UserError("--search needs --trials=N: how many trials, earlier ones included")
    if by is None:
        raise results.no_metric(results.metric_names(job.cfg))
    return [Trial(name, overrides) for name, overrides in (old.trials if old else {}).items()]


def _sweeps(job: Job) -> list[str]:
    return [name for name in job.options.sweep.split(",") if name]


def _known(old: Manifest | None) -> dict[str, Overrides]:
    return {**old.removed, **old.trials} if old else {}


def _manifest(
    job: Job, old: Manifest | None, trials: Sequence[Trial], by: Metric | None
) -> Manifest:
    now = {trial.name: trial.overrides for trial in trials}
    return Manifest(
        config=job.base.config, overrides=list(job.base.overrides), sweeps=_sweeps(job),
        base=config_lib.to_json(job.cfg), trials=now,
        removed={name: o for name, o in _known(old).items() if name not in now},
        scores=results.metric_names(job.cfg), metric=by.name if by else "",
        better=job.options.better, search=job.options.search,
        numbers=dict(old.numbers) if old else {},
    )  # fmt: skip


def _schedule(job: Job, manifest: Manifest, steps: dict[str, int], by: Metric | None) -> int:
    """Runs what has not run; writes what came out after each trial."""
    records = {name: job.folder.record(name, o) for name, o in manifest.trials.items()}
    for record in records.values():
        if record.state is State.failed and job.options.retry_failed:
            record.state, record.forgiven = State.waiting, len(record.starts)
    chooser = None
    if job.options.search:
        chooser = search.Search(
            job.base, job.folder, manifest, by, job.options.trials, job.options.storage,
            job.options.prune,
        )  # fmt: skip
    scores = results.shown_scores(manifest.scores, by)

    def changed() -> None:
        written(job.folder, scores, list(scheduler.records.values()))

    scheduler = Scheduler(
        job.folder, job.base, job.backend, job.options.slots,
        Limits(job.options.max_restarts, job.options.backoff), records=records, steps=steps,
        removed={name: job.folder.record(name, o) for name, o in manifest.removed.items()},
        search=chooser, changed=changed,
    )  # fmt: skip
    done = sum(record.state is State.done for record in records.values())
    count = job.options.trials if job.options.search else len(records)
    print(f"{count} trials in {job.folder.path}, {done} done", flush=True)
    code = scheduler.run()
    found = written(job.folder, scores, list(scheduler.records.values()))
    print(results.text(found, by), flush=True)
    print(f"see {page.write(job.folder, manifest, found, by)}", flush=True)
    return code


def written(
    folder: Folder, scores: Sequence[str], records: Sequence[Record]
) -> list[results.Result]:
    """What the trials have reached, in results.csv as well."""
    found = results.read(folder, records)
    results.write_csv(folder, found, scores)
    return found


def _dry_run(job: Job, trials: Sequence[Trial]) -> int:
    """Prints what each trial would run; of a search some random suggestions."""
    for i, trial in enumerate(trials):
        slot = i % job.options.slots
        workdir = f"--workdir={job.folder.workdir(trial.name)}"
        flags = [*job.base.flags(), *trial.flags(), workdir]
        job_file = job.folder.job_file(trial.name)
        command = shlex.join(job.backend.command(flags, slot, trial.name, job_file))
        gpus = job.backend.gpus[slot] if job.backend.gpus else ()
        print(f"CUDA_VISIBLE_DEVICES={','.join(gpus)} {command}" if gpus else command)
    return 0


def _refuse_other(job: Job, old: Manifest) -> None:
    """UserError where the folder's sweep is not an earlier version of this one."""
    where = f"--out {job.folder.path}"
    if old.config != job.base.config:
        raise UserError(
            f"{where} holds a sweep of {old.config}, not of {job.base.config}; give another --out"
        )
    if old.search != job.options.search:
        kind = "a search (--search)" if old.search else "a sweep without --search"
        raise UserError(f"{where} holds {kind}; give another --out")
    if lines := results.base_differences(old.base, job.cfg):
        raise UserError(
            f"{where} holds a sweep of the same file with another base config; its trials could "
            "not be compared with new ones:\n" + "\n".join(lines)
            + "\nGive another --out, or restore the values"
        )  # fmt: skip


def _tell_edits(old: Manifest | None, new: Manifest) -> None:
    if old is None:
        return
    if added := [name for name in new.trials if name not in old.trials]:
        print(f"added since the last start: {', '.join(added)}")
    if gone := [name for name in old.trials if name not in new.trials]:
        print(
            f"no longer in the sweep: {', '.join(gone)}; what they left stays, and those that "
            "still run are stopped"
        )
