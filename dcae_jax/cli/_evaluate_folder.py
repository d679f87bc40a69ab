"""The folder of `evaluate`: what is there, going on, metrics.json, the table."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dcae_jax import store
from dcae_jax.cli._sample_job import short
from dcae_jax.cli._trained import say

if TYPE_CHECKING:
    from etils import epath

    from dcae_jax.cli._evaluate_job import Job
    from dcae_jax.evals.parts import Work
    from dcae_jax.evals.scores import Evaluation

_RECORD = "evaluate.json"
_NAMES_NOTHING = ("commit",)  # of a protocol: may change while a folder is finished


@contextlib.contextmanager
def claimed(job: "Job") -> Iterator[None]:
    """Keeps other commands out of the folder, and clears what a killed one has left."""
    from dcae_jax import distributed, outputs
    from dcae_jax.evals import parts

    if not distributed.is_main():
        yield
        return
    with outputs.locked(job.out, "--out"):
        for path in outputs.leftovers(job.out):
            path.unlink(missing_ok=True)
        parts.clear_leftovers(job.out)
        yield


def settings(job: "Job") -> dict[str, Any]:
    """What decides the numbers; a folder is continued only with the same."""
    from dcae_jax.evals.parts import PART

    return {
        "dates": {w.name: [images.dates for images in w.sets] for w in job.works()},
        "files": {w.name: [[s.listing, s.digest] for s in w.sets] for w in job.works()},
        "part": PART,
        "results": {
            e.name: {
                "kind": e.kind.value, "subject": e.subject, "metrics": list(e.metrics),
                "reference": e.reference.name, "images": {w.name: w.n for w in e.works()},
                "protocol": {k: v for k, v in e.protocol.items() if k not in _NAMES_NOTHING},
            }
            for e in job.evaluations
        },
    }  # fmt: skip


def _names(folder: "epath.Path") -> set[str]:
    """What is in a folder; an object store has none that is empty."""
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def check(job: "Job") -> None:
    """UserError if the folder is of another evaluation, else its record; on the first process."""
    from dcae_jax import outputs
    from dcae_jax.data.latents import read_json
    from dcae_jax.errors import UserError
    from dcae_jax.evals import parts, protocol

    new = settings(job)
    old = read_json(job.out / _RECORD)
    decide = ("part", "results")
    started = parts.any_there(job.out) or (job.out / protocol.FILE).exists()
    if not (isinstance(old, dict) and old.keys() >= {*decide}):
        inside = _names(job.out) - {_RECORD, "samples"}
        if inside:
            raise UserError(
                f"--out {job.out} is not empty and has no whole {_RECORD}; give a new folder"
            )
    elif started:
        _check_same(job, old, new, decide)
    outputs.write(job.out / _RECORD, json.dumps(new, indent=1).encode())


def _check_same(
    job: "Job", old: dict[str, Any], new: dict[str, Any], decide: tuple[str, ...]
) -> None:
    """UserError if the folder's evaluation is another one.

    Where files have other sizes under the same names, pixels decide.
    """
    from dcae_jax.errors import UserError

    before = old.get("files", {})
    files = [
        pair for name, now in new["files"].items()
        for pair in zip(before.get(name, []), now, strict=False)
    ]  # fmt: skip
    rewritten = [(a[1], b[1]) for a, b in files if a[0] == b[0] != "" and a[1] != b[1]]
    found = _changes(old, new, decide)
    if changes := {k: pair for k, pair in found.items() if pair not in rewritten}:
        lines = "\n".join(f"  - {k}: {short(a)} -> {short(b)}" for k, (a, b) in changes.items())
        names = "  - files of the images were added, removed or renamed\n"
        raise UserError(
            f"--out {job.out} holds another evaluation, finished or not:\n"
            f"{names if any(a[0] != b[0] for a, b in files) else ''}{lines}\nGive a new "
            "folder, or the same options to continue"
        )
    if rewritten or old.get("dates") not in (None, new["dates"]):
        _look_again(job)


def _changes(old: dict[str, Any], new: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What of these fields differs."""
    from dcae_jax import config

    made = json.loads(json.dumps(new))
    return config.diff(*({name: record[name] for name in names} for record in (old, made)))


def _look_again(job: "Job") -> None:
    """Files were written since: UserError if scores are of other pixels; such parts are removed."""
    from dcae_jax.errors import UserError
    from dcae_jax.evals import parts, scores

    say("files of the images were written after they were last looked at here: comparing pixels")
    if (record := finished(job)) is not None:
        results = {result["name"]: result for result in record["results"]}
        others = [n for e in job.evaluations for n in scores.changed(e, results[e.name])]
        if others:
            raise UserError(
                f"--out {job.out} holds the scores of other images: the files of "
                f"{', '.join(dict.fromkeys(others))} have changed since; give a new folder"
            )
    elif removed := sum(parts.remove_changed(job.out, work) for work in job.works()):
        say(f"{removed} part(s) are of images that have changed since, and are computed anew")


def finished(job: "Job") -> dict[str, Any] | None:
    """metrics.json of the folder, if it is there."""
    from dcae_jax.data.latents import read_json
    from dcae_jax.evals import protocol

    return read_json(job.out / protocol.FILE)


def check_space(job: "Job", missing: "list[tuple[Work, int]]") -> None:
    """UserError if the disk will not hold the parts; so many are missing of each work."""
    from dcae_jax.errors import UserError
    from dcae_jax.evals import parts

    if store.is_store(job.out):
        return
    needed = sum(parts.space(work, count) for work, count in missing)
    free = shutil.disk_usage(job.out).free
    if free < needed:
        raise UserError(
            f"{job.out} has {free / 1e9:.3g} GB free, the features need about "
            f"{needed / 1e9:.3g} GB until the end; make room or choose another --out"
        )


def finish(job: "Job", seconds: float) -> None:
    """Scores, pictures, metrics.json, the table; then the parts go."""
    from dcae_jax import outputs
    from dcae_jax.evals import parts, protocol, scores
    from dcae_jax.report import images as pictures

    results = []
    for evaluation in job.evaluations:
        require_good(job, evaluation)
        results.append(scores.result(evaluation, job.out))
        grid = evaluation.grid(job.out, caption(results[-1]))
        if grid is None:
            results[-1]["pictures"] = []
        else:
            outputs.write(job.out / evaluation.picture, pictures.to_png(grid))
    record = {"format": protocol.FORMAT, "results": results, "made": _made(seconds)}
    outputs.write(job.out / protocol.FILE, json.dumps(record, indent=1).encode())
    say(table(record))
    say(f"\nwrote {job.out / protocol.FILE}")
    if not job.keep_parts:
        parts.remove(job.out)


def require_good(job: "Job", evaluation: "Evaluation") -> None:
    """UserError if there are images that could not be used, unless they may be left out."""
    from dcae_jax.evals import parts

    if not job.skip_bad:
        stored = (parts.Stored(job.out, work) for work in evaluation.works())
        parts.refuse_bad([item for some in stored for item in some.bad()])


def remove(job: "Job") -> None:
    """The parts, and the record that they were of, where nothing else came of them."""
    from dcae_jax.evals import parts

    parts.remove(job.out)
    (job.out / _RECORD).unlink()
    if job.out.is_dir() and not _names(job.out):
        job.out.rmdir()


def _made(seconds: float) -> dict[str, Any]:
    import datetime

    import jax

    from dcae_jax import provenance

    return {
        "command": provenance.command(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": provenance.versions(), "commit": provenance.commit(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(), "seconds": round(seconds, 1),
    }  # fmt: skip


def caption(result: dict[str, Any]) -> str:
    """One line under which a grid stands."""
    values = (f"{s['label']} {_number(n, s)}" for n, s in result["scores"].items())
    return f"{result['subject']['source']}: {', '.join(values)}"


def _number(name: str, score: dict[str, Any]) -> str:
    from dcae_jax.evals import protocol

    metric = "fid" if name in protocol.FID_NAMES.values() else name
    value = math.inf if score["value"] is None else score["value"]
    return f"{value:.{protocol.METRICS[metric].digits}f}"


def _reasons(score: dict[str, Any]) -> list[str]:
    """Why a score compares with nothing, one by one."""
    return score["note"].split("; ") if score["note"] else []


def table(record: dict[str, Any]) -> str:
    """All scores for people; why one is not comparable stands below, once."""
    lines = []
    for result in record["results"]:
        scores = result["scores"]
        every = [_reasons(score) for score in scores.values()]
        notes = list(dict.fromkeys(reason for reasons in every for reason in reasons))
        width = max(len(score["label"]) for score in scores.values())
        lines.append(f"\n{result['name']}: {result['subject']['source']}")
        for name, score in scores.items():
            error = "" if score["error"] is None else f" +- {score['error']:.2g}"
            mark = " ".join(f"({notes.index(reason) + 1})" for reason in _reasons(score))
            value = f"{_number(name, score):>12}{error:12}"
            lines.append(f"  {score['label']:{width}} {value} {mark}".rstrip())
        lines += [f"  ({i}) {note}" for i, note in enumerate(notes, 1)]
        if "left_out" in result["protocol"]:
            lines.append(f"  {result['protocol']['left_out']} image(s) could not be used")
    return "\n".join(lines)
