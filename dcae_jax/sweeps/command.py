"""The command line of launch/sweep.py: runs the trials of a sweep, or tells how they stand."""

import argparse
import re
import sys
from collections.abc import Sequence

from dcae_jax.errors import UserError
from dcae_jax.sweeps import backends, page, results, start
from dcae_jax.sweeps.backends import Backend, Kind
from dcae_jax.sweeps.definition import Base
from dcae_jax.sweeps.folder import Folder, Record, State
from dcae_jax.sweeps.start import Job

_HELP = """Runs many trials of one config, each a process with a workdir of its own.

The config file holds, beside get_config:  def sweep(): yield {"optim.lr": 1e-4, "seed": 0}
and any number of  def sweep_NAME():  several are combined by product, --sweep=lr,seed.
The same command goes on after any interruption, and with trials added or removed.

Before the first trial starts, the configs of all are resolved and validated as main.py does it:
fields, values, what fits together.  Data, weights and devices are met by the trials themselves."""
_ENDS = """--config.x.y=V: overrides of the config for all trials.
Exit codes: 0 all trials done, 1 some failed, 2 wrong usage, 42 stopped by a signal (the same
command goes on)."""


def main(argv: Sequence[str], root: str) -> int:
    """Runs or shows a sweep; `root` holds main.py and launch/.  The exit code of the process."""
    try:
        return _run(argv, root)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "launch/sweep.py", allow_abbrev=False, description=_HELP, epilog=_ENDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", help="config file with get_config and sweeps")
    add(
        "--sweep",
        default="",
        metavar="NAMES",
        help="sweeps of the file, e.g. lr,seed; default: its plain sweep()",
    )
    add("--out", metavar="DIR", help="folder of the sweep; may be gs://")
    add(
        "--metric",
        default="",
        metavar="NAME",
        help="what trials are compared by; default: checkpoint.best",
    )
    add(
        "--better",
        default="",
        choices=["higher", "lower"],
        help="which way, where the metric's name does not tell",
    )
    add(
        "--status",
        action="store_true",
        help="show the table and the best trial of --out; write results.csv and sweep.html",
    )
    add("--dry-run", action="store_true", help="print the commands of all trials; start none")
    _add_backend(parser)
    _add_search(parser)
    return parser  # fmt: skip


def _add_backend(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where and how trials run").add_argument
    add("--backend", default="local", choices=[k.value for k in Kind], help="default: local")
    add(
        "--slots",
        type=int,
        default=1,
        metavar="N",
        help="trials at a time; the GPUs of this machine are shared out evenly",
    )
    add(
        "--launcher",
        default="",
        metavar="OPTIONS",
        help="of launch/BACKEND.py, as one text; {slot} and {trial} stand for the trial's",
    )
    add("--processes", type=int, default=1, metavar="N", help="of each trial, with --backend=local")
    add("--max-restarts", type=int, default=100, metavar="N", help="of one trial (100)")
    add(
        "--backoff",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="pause before a trial that lost a process starts again, then doubled (10)",
    )
    add("--retry-failed", action="store_true", help="start failed trials again")  # fmt: skip


def _add_search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("adaptive search (needs optuna)").add_argument
    add(
        "--search",
        action="store_true",
        help="trials are suggested by the file's search(trial), through Optuna",
    )
    add("--trials", type=int, default=0, metavar="N", help="how many, earlier ones included")
    add(
        "--storage",
        default="",
        metavar="PLACE",
        help="Optuna's record: sqlite:///FILE, or a journal file; default: a journal in --out",
    )
    add("--prune", action=argparse.BooleanOptionalAction, default=True,
        help="stop trials that are below the median of the others at the same step")  # fmt: skip


def _run(argv: Sequence[str], root: str) -> int:
    options, rest = _parser().parse_known_args(argv)
    if wrong := [a for a in rest if not re.match(r"--config\.[^=]+=", a)]:
        raise UserError(
            f"unknown argument {wrong[0]!r}; see --help. Overrides for all trials are written "
            "--config.x.y=VALUE"
        )
    if not options.out:
        raise UserError("no --out; give the folder of the sweep, e.g. --out=runs/sweep")
    if options.status:
        return _status(Folder(options.out), options)
    return start.run(_job(options, rest, root))


def _job(options: argparse.Namespace, rest: Sequence[str], root: str) -> Job:
    """The options, checked as far as is possible without trials."""
    if not options.config:
        raise UserError("no --config; give a file, e.g. --config=configs/demo.py:phase1")
    for name in ("slots", "processes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}; at least 1")
    if options.max_restarts < 0 or not options.backoff >= 0:
        raise UserError("--max-restarts and --backoff are numbers from 0 on")
    if not options.search and (options.trials or options.storage):
        raise UserError("--trials and --storage belong to --search; add it, or leave them out")
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
    return Job(base, options, Folder(options.out), backend, base.resolved())


def _as_it_is(folder: Folder, record: Record) -> Record:
    """A trial that was running when its scheduler was killed, as its processes stand now."""
    if record.state is not State.running or folder.lives(record) is not False:
        return record
    start = record.starts[-1]
    if kept := folder.kept(record.name, start.number):
        start.exit_code, start.error, start.ended = kept.exit_code, kept.error, kept.ended
    record.state = State.done if start.exit_code == 0 else State.interrupted
    return record


def _status(folder: Folder, options: argparse.Namespace) -> int:
    """The table of a sweep, which may be running; the page."""
    manifest = folder.manifest()
    if manifest is None:
        raise UserError(f"--out {folder.path} holds no sweep; start one without --status")
    wanted = options.metric or manifest.metric
    by = results.metric(manifest.scores, wanted, options.better or manifest.better)
    records = [_as_it_is(folder, folder.record(name, o)) for name, o in manifest.trials.items()]
    found = start.written(folder, results.shown_scores(manifest.scores, by), records)
    print(results.text(found, by))
    if by is None:
        print(results.no_metric(manifest.scores))
    print(f"see {page.write(folder, manifest, found, by)}")
    return 0
