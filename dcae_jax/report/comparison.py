"""Two evaluations against each other: differences of scores, or of what they were measured by."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dcae_jax import score_names
from dcae_jax.errors import UserError
from dcae_jax.evals import protocol
from dcae_jax.report import phases, results
from dcae_jax.report.pages import Table
from dcae_jax.report.results import Result

# What tells the results of one file apart; the first that pairs anything is used.
_KEYS: tuple[Callable[[Result], Any], ...] = (
    lambda r: (r.kind, r.name),
    lambda r: (r.kind, r.protocol.get("data"), r.protocol.get("resolution")),
    lambda r: (r.kind, r.protocol.get("resolution")),
)


class Compared(NamedTuple):
    """What is said of two results."""

    text: str
    same: bool  # whether all scores that both have could be compared


def pairs(
    one: Sequence[Result], two: Sequence[Result]
) -> tuple[list[tuple[Result, Result]], list[Result]]:
    """Results of A with those of B that they are compared with, and those without a partner."""
    if len(one) == len(two) == 1 and one[0].kind == two[0].kind:
        return [(one[0], two[0])], []
    for key in _KEYS:
        a, b = ({key(r): r for r in side} for side in (one, two))
        both = [k for k in a if k in b]
        if both and len(a) == len(one) and len(b) == len(two):
            alone = [
                r for side, other in ((a, b), (b, a)) for k, r in side.items() if k not in other
            ]
            return [(a[k], b[k]) for k in both], alone
    listed = " and ".join(
        ", ".join(f"{r.name} ({r.kind}, {r.protocol.get('resolution')} px)" for r in side)
        for side in (one, two)
    )
    raise UserError(
        f"nothing to compare: no result of one is the like of one of the other: {listed}"
    )


def compared(a: Result, b: Result) -> Compared:
    """Score by score: the difference, or why there is none."""
    found = protocol.compare(_entry(a), _entry(b))
    parts = [f"A: {a.file}, {a.name}\nB: {b.file}, {b.name}"]
    if found.deltas:
        rows = [_row(name, a, b) for name in found.deltas]
        parts.append(phases.as_text(Table(["", "A", "B", "B - A", ""], rows)))
    parts += _hindrances(found.differing)
    if not found.deltas and not found.differing:
        parts.append("they have no score in common")
    if found.shown:
        lines = [f"  {name}: {x} -> {y}" for name, (x, y) in found.shown.items()]
        parts.append("\n".join(["also different, and no hindrance:", *lines]))
    return Compared("\n\n".join(parts), bool(found.deltas) and not found.differing)


def _entry(result: Result) -> dict[str, Any]:
    scores = {name: dataclasses.asdict(score) for name, score in result.scores.items()}
    return {"protocol": result.protocol, "scores": scores}


def _row(name: str, a: Result, b: Result) -> list[str]:
    one, two = a.scores[name], b.scores[name]
    cells = [results.text(name, one.value), results.text(name, two.value)]
    delta = results.text(name, two.value - one.value, sign=True)
    return [one.label, *cells, delta, _judged(name, a, b)]


def _judged(name: str, a: Result, b: Result) -> str:
    one, two = a.scores[name], b.scores[name]
    if note := next((s.note for s in (one, two) if not s.comparable), ""):
        return note
    best = score_names.best(name, (one.value, two.value))
    if best is None or one.value == two.value:
        return ""
    return "better" if best == two.value else "worse"


def _hindrances(differing: dict[str, dict[str, tuple[Any, Any]]]) -> list[str]:
    """Scores whose protocols differ, those with the same differences together."""
    together: dict[str, list[str]] = {}
    for name, fields in differing.items():
        lines = "\n".join(f"  {field}: {x} -> {y}" for field, (x, y) in fields.items())
        together.setdefault(lines, []).append(name)
    return [
        f"no difference is given of {', '.join(names)}: the protocols differ (A -> B)\n{lines}"
        for lines, names in together.items()
    ]
