"""metrics.json files, gathered: found, read, grouped by protocol, set beside published scores.

Scores are in one group only if their protocols are the same.  The scores of training (summary.json,
the folder eval) are left out: they carry no protocol, and the report of the run shows them.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from dcae_jax import config, score_names
from dcae_jax.convert import published, releases
from dcae_jax.convert.published import Published
from dcae_jax.errors import UserError
from dcae_jax.evals import protocol

KINDS = {
    "autoencoder": "Autoencoders", "generation": "Generated images", "images": "Folders of images",
}  # fmt: skip
# Files that lie beside a metrics.json in great numbers: a store need not be asked about each.
_NO_FOLDERS = (".png", ".jpg", ".npz", ".json", ".jsonl")
_FIELDS = {"name": str, "kind": str, "subject": dict, "scores": dict, "protocol": dict}


@dataclasses.dataclass(slots=True)
class Score:
    """One number with what it is called in full."""

    label: str
    value: float | None
    error: float | None
    comparable: bool
    note: str


@dataclasses.dataclass(slots=True)
class Result:
    """What was measured of one thing under one protocol."""

    name: str
    kind: str
    subject: dict[str, Any]
    scores: dict[str, Score]
    protocol: dict[str, Any]
    pictures: list[epath.Path]
    made: dict[str, Any]
    file: epath.Path
    label: str = ""  # what tables call it: its folder, seen from what all files share

    @property
    def release(self) -> str | None:
        """The released weights that were measured; None where they are nobody's release."""
        known = str(self.subject.get("release") or "")
        return releases.named(known) or releases.diffusion_named(known)

    def apart(self, other: "Result") -> dict[str, tuple[Any, Any]]:
        """The fields of the protocols that keep two results out of one table."""
        both = self.scores.keys() & other.scores.keys()
        return protocol.differences(self.protocol, other.protocol, both)


@dataclasses.dataclass(slots=True)
class Group:
    """Results of one kind and one protocol: their scores may stand side by side."""

    kind: str
    results: list[Result]

    @property
    def title(self) -> str:
        """The kind, the data and the count, for people."""
        known = self.protocol()
        data, side = str(known.get("data", "")), known.get("resolution")
        parts = [KINDS.get(self.kind, self.kind), data]
        parts += [f"{side} px"] if side and not data.endswith(str(side)) else []
        parts += [f"{known['n']} images"] if "n" in known else []
        return " · ".join(str(part) for part in parts if part)

    def protocol(self) -> dict[str, Any]:
        """{field: value} of all that the results have in common."""
        return {name: values[0] for name, values in self._fields().items() if _alike(values)}

    def varying(self) -> dict[str, list[Any]]:
        """{field: its value in each result} of what is recorded and no hindrance to comparing."""
        return {name: values for name, values in self._fields().items() if not _alike(values)}

    def _fields(self) -> dict[str, list[Any]]:
        flat = [config.flatten(result.protocol) for result in self.results]
        names = {name: None for each in flat for name in each}
        return {name: [each.get(name) for each in flat] for name in names}

    def scores(self) -> list[str]:
        """The names of all scores, in the order of `protocol.METRICS`."""
        known = list(protocol.METRICS)
        names = {name: None for result in self.results for name in result.scores}
        return sorted(names, key=lambda name: (*_place(known, protocol.metric_of(name)), name))

    def best(self, name: str) -> float | None:
        """The best of several comparable values; None without one, or where none is better."""
        values = [
            s.value for r in self.results
            if (s := r.scores.get(name)) and s.comparable and s.value is not None
        ]  # fmt: skip
        return score_names.best(name, values) if len(values) > 1 else None


def _alike(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _place(names: Sequence[str], name: str) -> tuple[int]:
    return (names.index(name) if name in names else len(names),)


def text(name: str, value: float | None, sign: bool = False) -> str:
    """A score with the digits that its metric deserves."""
    if value is None:
        return "–"
    metric = protocol.METRICS.get(protocol.metric_of(name))
    digits = f".{metric.digits}f" if metric else ".5g"
    return format(value, f"{'+' if sign else ''}{digits}")


def groups(results: Sequence[Result]) -> list[Group]:
    """By kind and protocol; within a kind by resolution, larger sets first."""
    found: list[Group] = []
    for result in results:
        fitting = (
            g for g in found
            if g.kind == result.kind and not any(r.apart(result) for r in g.results)
        )  # fmt: skip
        group = next(fitting, None)
        if group is None:
            found.append(Group(result.kind, [result]))
        else:
            group.results.append(result)
    return sorted(found, key=_order)


def _order(group: Group) -> tuple[Any, ...]:
    known = group.results[0].protocol
    return (
        *_place(list(KINDS), group.kind), str(known.get("data")), known.get("resolution") or 0,
        -(known.get("n") or 0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- finding


def find(paths: Sequence[str]) -> list[Result]:
    """All results of the files named, and below the folders; UserError if there are none."""
    files: dict[str, epath.Path] = {}
    for given in paths:
        path = epath.Path(given).expanduser()
        if not path.exists():
            raise UserError(f"{given}: no such file or folder")
        for file in _below(path) if path.is_dir() else [path]:
            files.setdefault(str(file.resolve()), file)
    if not files:
        raise UserError(
            f"no {protocol.FILE} in {', '.join(map(str, paths))} or any folder below: "
            "`python -m dcae_jax evaluate --out DIR` writes one"
        )
    results = [result for _, file in sorted(files.items()) for result in read(file)]
    _name_rows(results)
    return results


def _below(folder: epath.Path) -> list[epath.Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.name == protocol.FILE:
            found.append(path)
        elif path.suffix not in _NO_FOLDERS and path.name[0] != "." and path.is_dir():
            found += _below(path)
    return found


def _name_rows(results: Sequence[Result]) -> None:
    """Names by folder: below what all share, or the last two parts of the only one."""
    folders = {str(result.file.parent) for result in results}
    shared = os.path.commonpath(folders) if len(folders) > 1 else ""
    files = [result.file for result in results]
    for result in results:
        path = result.file.parent
        own = os.path.relpath(path, shared) if shared else "/".join(path.parts[-2:])
        # Where the name is the size, the title of the table says it.
        told = files.count(result.file) == 1 or result.name == str(
            result.protocol.get("resolution")
        )
        result.label = (path.name if own == "." else own) + ("" if told else f" · {result.name}")


# ------------------------------------------------------------------------------------- reading


def read(file: epath.Path) -> list[Result]:
    """The results of one file; UserError says what is wrong with it."""
    record = _json(file)
    found = record.get("format") if isinstance(record, dict) else None
    if not isinstance(found, str) or not found.startswith("dcae_jax.metrics/"):
        raise UserError(
            f'{file} was not written by `evaluate`: its "format" is {found!r}, expected '
            f"{protocol.FORMAT!r}; name other folders, or move this file"
        )
    if found != protocol.FORMAT:
        raise UserError(
            f"{file} has format {found}, and this version reads {protocol.FORMAT}: use the version "
            "that wrote it, or evaluate again"
        )
    entries = record.get("results")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file} holds no results: evaluate again")
    results = [_result(entry, i, record, file) for i, entry in enumerate(entries)]
    names = [result.name for result in results]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"{file} holds two results called {min(twice)!r}: it was edited; evaluate again"
        )
    return results


def _json(file: epath.Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(
            f"{file} is not JSON ({error}): it was cut short or edited; run the same `evaluate` "
            "again (finished parts are kept), or remove the file"
        ) from None


def _result(entry: Any, number: int, record: dict[str, Any], file: epath.Path) -> Result:
    where = f"{file}: results[{number}]"
    known = entry if isinstance(entry, dict) else {}
    if wrong := [n for n, kind in _FIELDS.items() if not isinstance(known.get(n), kind)]:
        raise UserError(f"{where} lacks {', '.join(wrong)} (or of another type); evaluate again")
    scores = {name: _score(score, f"{where}.{name}") for name, score in known["scores"].items()}
    values = {name: known[name] for name in _FIELDS} | {"scores": scores}
    pictures = [file.parent / name for name in known.get("pictures", ())]
    return Result(**values, pictures=pictures, made=record.get("made", {}), file=file)


def _score(entry: Any, where: str) -> Score:
    known = entry if isinstance(entry, dict) else {}
    if known.keys() != {field.name for field in dataclasses.fields(Score)}:
        raise UserError(
            f"{where} is no score: expected label, value, error, comparable, note; evaluate again"
        )
    for number in (known["value"], known["error"]):
        if number is not None and not (isinstance(number, int | float) and math.isfinite(number)):
            raise UserError(f"{where}: {number!r} is neither a finite number nor null")
    return Score(**known)


# ------------------------------------------------------------------------- beside published numbers


class Line(NamedTuple):
    """A score of ours beside the published one, as text."""

    score: str
    ours: str
    published: str
    difference: str
    verdict: str


class Beside(NamedTuple):
    """A result beside what was published of its weights."""

    result: Result
    published: Published
    misses: dict[str, tuple[Any, Any]]  # field -> (ours, published), of protocols that differ

    def compares(self, name: str) -> bool:
        """Whether the protocol is the published one in all that matters to this score."""
        return not any(protocol.matters(field, name) for field in self.misses)

    @property
    def any_compares(self) -> bool:
        """Whether it is that for any of the published scores."""
        return any(map(self.compares, self.published.scores))

    @property
    def lines(self) -> list[Line]:
        """A row for each published score; a difference only where its protocol is the same."""
        return [self._line(name, number) for name, number in self.published.scores.items()]

    @property
    def why_not(self) -> str:
        """What the protocols differ in; "" where they are the same."""
        fields = [f"{k} {_shown(a)} here, {_shown(b)} there" for k, (a, b) in self.misses.items()]
        return "; ".join(fields)

    def _line(self, name: str, number: str) -> Line:
        score = self.result.scores.get(name)
        if score is None or score.value is None:
            return Line(name, "–", number, "–", score.note if score else "not measured")
        ours = text(name, score.value)
        if not (self.compares(name) and score.comparable):
            return Line(name, ours, number, "–", "not comparable")
        found = published.compare(score.value, number)
        verdict = "within rounding" if found.within else "differs"
        return Line(name, ours, number, f"{found.difference:+.{found.digits + 1}f}", verdict)


def _shown(value: Any) -> str:
    return "unknown" if value is None else str(value)


def beside(results: Sequence[Result], weights: str | None = None) -> list[Beside]:
    """Each result with the published scores of its weights, or of `weights` where those are given.

    Those of its own protocol, for some score at least; where there is none, all, with what keeps
    them from comparing.
    """
    found = []
    for result in results:
        name = weights or result.release
        every = published.of(name, result.kind) if name else []
        pairs = [Beside(result, p, _misses(result, p)) for p in every]
        found += [pair for pair in pairs if pair.any_compares] or pairs
    return found


def _misses(result: Result, there: Published) -> dict[str, tuple[Any, Any]]:
    missing = published.misses(there, result.protocol)
    if result.release == there.weights:
        return missing
    return {"weights": (result.release or "of no release", there.weights), **missing}
