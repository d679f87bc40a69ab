"""What came out of the trials: scores, the best one, results.csv and the table.

A trial's score is the last one that its run recorded: of its summary if it is finished, else of
its metrics.
"""

import csv
import difflib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dcae_jax import config as config_lib
from dcae_jax import outputs, score_names
from dcae_jax.config import JSONValue, RunConfig
from dcae_jax.errors import UserError
from dcae_jax.report import progress, writers
from dcae_jax.score_names import Better
from dcae_jax.sweeps.definition import short_keys
from dcae_jax.sweeps.folder import Folder, Record, State

Number = float | int


@dataclass(slots=True)
class Metric:
    """What trials are compared by."""

    name: str  # "photos-128-test/psnr"
    better: Better

    def best(self, results: Sequence["Result"]) -> "Result | None":
        """The trial with the best finite value among those that are done."""
        sign = 1 if self.better is Better.higher else -1
        found = [
            r for r in results
            if r.record.state is State.done and math.isfinite(r.scores.get(self.name, math.nan))
        ]  # fmt: skip
        return max(found, key=lambda r: sign * r.scores[self.name], default=None)


@dataclass(slots=True)
class Result:
    """A trial with what it reached."""

    record: Record
    workdir: str
    step: int = 0  # of the newest row
    scores: dict[str, Number] = field(default_factory=dict)
    pid: int | None = None  # of the newest start


# ---------------------------------------------------------------------------------------- metrics


def metric_names(cfg: RunConfig) -> list[str]:
    """The scores that a run of this config records."""
    return [f"{e.name}/{metric}" for e in cfg.evals for metric in e.metrics()]


def metric(known: Sequence[str], wanted: str, better: str) -> Metric | None:
    """The metric that is asked for; None if none is.  `known` are the scores of the config.

    The last part of a name is enough if no other ends with it.  `better` ("higher", "lower" or "")
    is needed where the name does not tell.
    """
    if not wanted:
        return None
    ends = [name for name in known if name.endswith(f"/{wanted}")]
    if wanted not in known and len(ends) == 1:
        wanted = ends[0]
    elif wanted not in known and not wanted.startswith("train/"):
        raise UserError(f"--metric={wanted} {_which(known, wanted, ends)}")
    way = Better(better) if better else direction(wanted)
    if way is None:
        raise UserError(
            f"--metric={wanted}: its name does not tell which way is better; "
            "add --better=higher or --better=lower"
        )
    return Metric(wanted, way)


def no_metric(known: Sequence[str]) -> UserError:
    """To be raised where a metric is needed and none is named."""
    return UserError(f"no metric to compare trials by; give --metric=NAME, {_listed(known)}")


def _which(known: Sequence[str], wanted: str, ends: Sequence[str]) -> str:
    if ends:
        return f"could be any of {', '.join(ends)}; give the whole name"
    spelled = {name.rsplit("/", 1)[-1]: name for name in known} | {name: name for name in known}
    near = difflib.get_close_matches(wanted, spelled, 1)
    hint = f"did you mean {spelled[near[0]]}?" if near else _listed(known)
    return f"is no score of this config; {hint}"


def _listed(known: Sequence[str]) -> str:
    return f"one of: {', '.join(known) or '(no evaluator)'}, or train/... of the metrics"


def direction(name: str) -> Better | None:
    """Which way is better: by the score's name, else by what kind of number it is."""
    way = score_names.better(name.rsplit("/", 1)[-1])
    if way is not None:
        return way
    if any("loss" in part for part in name.split("/")):
        return Better.lower
    return Better.higher if name.endswith("_per_s") else None


# ----------------------------------------------------------------------------------------- reading


def read(folder: Folder, records: Sequence[Record]) -> list[Result]:
    """Each trial with the scores that it has by now."""
    return [_read(folder, record) for record in records]


def _read(folder: Folder, record: Record) -> Result:
    workdir = folder.workdir(record.name)
    if not record.starts:
        return Result(record, str(workdir))
    rows = writers.read_metrics(workdir)
    scores: dict[str, Number] = {}
    for row in rows:
        scores |= {k: v for k, v in row.items() if "/" in k and isinstance(v, int | float)}
    summary = folder.summary(record.name) or {}
    # Read by its name: a listing of the metrics may lag behind in an object store.
    for evaluator, found in summary.get("evals", {}).get("after", {}).items():
        scores |= {f"{evaluator}/{metric}": value for metric, value in found.items()}
    step = rows[-1]["step"] if rows else int(summary.get("steps", 0))
    last = record.starts[-1]
    pid = last.pid
    if pid is None and (kept := folder.kept(record.name, last.number)):  # it runs
        pid = kept.process.pid
    return Result(record, str(workdir), step, scores, pid)


def curve(folder: Folder, name: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric over a trial's training."""
    rows = writers.read_metrics(folder.workdir(name))
    pairs = [(row["step"], row.get(metric)) for row in rows]
    return [(step, float(v)) for step, v in pairs if isinstance(v, int | float)]


# ------------------------------------------------------------------------------------- results.csv


def write_csv(folder: Folder, results: Sequence[Result], shown: Sequence[str]) -> None:
    """results.csv: a row for each trial; `shown` are the scores that get a column."""
    keys = _keys(results)
    facts = [
        "trial", "state", "exit_code", "pid", "host", "starts", "seconds", "step",
    ]  # fmt: skip
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*facts, *keys, *shown, "error", "workdir"])
    for result in results:
        writer.writerow(
            [
                *_facts(result), *(_cell(result.record.overrides.get(k)) for k in keys),
                *(result.scores.get(name, "") for name in shown), _error(result), result.workdir,
            ]
        )  # fmt: skip
    outputs.write(folder.path / "results.csv", buffer.getvalue().encode())


def _facts(result: Result) -> list[Any]:
    record = result.record
    last = record.starts[-1] if record.starts else None
    return [
        record.name, record.state.value, _cell(last and last.exit_code), _cell(result.pid),
        _cell(last and last.keeper.host), len(record.starts), _seconds_cell(record), result.step,
    ]  # fmt: skip


def seconds(record: Record) -> float | None:
    """What a trial took, all its starts together, without one that runs.

    None if the end of one is not known, because its keeper was killed too.
    """
    ends = [start.ended for start in record.starts]
    if record.state is State.running:
        ends.pop()
    if None in ends:
        return None
    return sum(start.ended - start.began for start in record.starts if start.ended is not None)


def _seconds_cell(record: Record) -> str:
    known = seconds(record)
    return "" if known is None else f"{known:.1f}"


def _cell(value: JSONValue) -> JSONValue:
    return "" if value is None else value


def _error(result: Result) -> str:
    return result.record.starts[-1].error if result.record.starts else ""


def _keys(results: Sequence[Result]) -> list[str]:
    """All fields that some trial sets."""
    return list(dict.fromkeys(k for result in results for k in result.record.overrides))


# --------------------------------------------------------------------------------------- the table


def table(results: Sequence[Result], by: Metric | None) -> tuple[list[str], list[list[str]]]:
    """(heading, rows) for people; the best trial bears a star."""
    keys, best = _keys(results), by.best(results) if by else None
    names = short_keys(keys)
    head = ["", "trial", "state", "exit", "pid", "starts", "time", "step"]
    head += [names[k] for k in keys] + ([by.name] if by else [])
    rows = []
    for result in results:
        record = result.record
        last = record.starts[-1] if record.starts else None
        row = [
            "*" if result is best else "", record.name, record.state.value,
            str(_cell(last and last.exit_code)), str(_cell(result.pid)),
            str(len(record.starts)), progress.duration(seconds(record) or None), str(result.step),
            *(_short(record.overrides.get(k)) for k in keys),
        ]  # fmt: skip
        if by:
            value = result.scores.get(by.name)
            row.append("" if value is None else f"{value:.6g}")
        rows.append(row)
    return head, rows


def _short(value: JSONValue) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(_cell(value))


def text(results: Sequence[Result], by: Metric | None) -> str:
    """The table in columns, the errors, and the best trial in a sentence."""
    head, rows = table(results, by)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    for result in results:
        if result.record.state is State.failed:
            lines.append(f"{result.record.name} failed: {_error(result)}")
    if by:
        lines.append(_best_sentence(by, results))
    return "\n".join(lines)


def _best_sentence(by: Metric, results: Sequence[Result]) -> str:
    best = by.best(results)
    if best is None:
        return f"no finished trial has {by.name} yet"
    return (
        f"best by {by.name} ({by.better.value} is better): {best.record.name}, "
        f"{best.scores[by.name]:.6g}, in {best.workdir}"
    )


def shown_scores(known: Sequence[str], by: Metric | None) -> list[str]:
    """The scores that get a column: those of the evaluators, and what is compared by."""
    return [*known] if by is None or by.name in known else [by.name, *known]


def base_differences(old: JSONValue, new: RunConfig) -> list[str]:
    """How the base config of an earlier start differs, a line each."""
    changed = config_lib.diff(config_lib.completed(old), config_lib.to_json(new))
    return [f"  - {path}: {before} -> {after}" for path, (before, after) in changed.items()]
