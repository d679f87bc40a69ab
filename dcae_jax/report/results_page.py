"""results.html and results.md: tables of scores, one for each protocol, with pictures and notes."""

import os
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from dcae_jax import config, outputs
from dcae_jax.convert import published
from dcae_jax.report import pages, phases, results
from dcae_jax.report.pages import Table
from dcae_jax.report.results import Beside, Group, Result

NAMES = {
    "psnr": "PSNR", "ssim": "SSIM", "ssim-border": "SSIM with border", "ms-ssim": "MS-SSIM",
    "lpips": "LPIPS", "fid": "FID", "rfid": "rFID", "gfid": "gFID", "sfid": "sFID", "kid": "KID",
    "is": "IS", "latent-rms": "latent RMS",
}  # fmt: skip
_BESIDE_HEAD = ["", "ours", "published", "difference", ""]
_NO_PROTOCOL = ("commit",)  # recorded with it
_LONG = 16  # characters of a digest that are shown


class Cell(NamedTuple):
    """What a table shows of a score, for any of the three forms."""

    text: str
    best: bool = False
    notes: tuple[int, ...] = ()  # numbers of the notes below the table
    faint: bool = False  # comparable with nothing, or not measured


@dataclass(slots=True)
class Row:
    """A result, or what others published of the same weights under the same protocol."""

    name: str
    about: str
    file: epath.Path | None
    cells: list[Cell]


@dataclass(slots=True)
class Section:
    """One table and what belongs to it."""

    number: int
    title: str
    group: Group
    names: list[str]  # of the scores
    labels: list[str]
    rows: list[Row]
    notes: list[str]
    beside: list[Beside]  # where the protocol is the published one, or was asked for
    elsewhere: list[str]  # what is published of these weights for another protocol
    protocol: list[tuple[str, str, bool]]  # field, value, whether other tables of the kind differ


# ------------------------------------------------------------------------------------ the contents


def sections(found: Sequence[Result], weights: str | None = None) -> list[Section]:
    """A section for each protocol; `weights`: whose published scores stand beside all of ours."""
    every = results.groups(found)
    return [_section(i, group, every, weights) for i, group in enumerate(every, 1)]


def _section(number: int, group: Group, every: Sequence[Group], weights: str | None) -> Section:
    names, notes = group.scores(), []
    rows = [_row(result, group, names, notes) for result in group.results]
    pairs = results.beside(group.results, weights)
    rows += _published_rows(pairs, names, notes)
    shown = [pair for pair in pairs if weights or pair.any_compares]
    others = (f"Published for another protocol: {_elsewhere(p)}" for p in pairs if p not in shown)
    elsewhere = list(dict.fromkeys(others))
    if weights and not pairs:
        elsewhere.append(_other_kind(group, weights))
    return Section(
        number,
        _title(group, every),
        group,
        names,
        [_label(group, name) for name in names],
        rows,
        notes,
        shown,
        elsewhere,
        _protocol(group, every),
    )


def _title(group: Group, every: Sequence[Group]) -> str:
    """That of the group, with what it differs in from others of the same title."""
    same = [g for g in every if g.title == group.title]
    fields = {name for g in same for name in g.results[0].apart(group.results[0])}
    known = group.protocol()
    own = [f"{name} {shown(known[name])}" for name in sorted(fields) if name in known]
    return " · ".join([group.title, *own])


def _elsewhere(pair: Beside) -> str:
    scores = ", ".join(f"{NAMES.get(k, k)} {v}" for k, v in pair.published.scores.items())
    return f"{scores} of {pair.published.weights} ({pair.published.source}; {pair.why_not})."


def _other_kind(group: Group, weights: str) -> str:
    """Why nothing that is published of these weights stands beside this table."""
    kinds = dict.fromkeys(there.kind for there in published.PUBLISHED if there.weights == weights)
    known, own = (
        " and ".join(results.KINDS.get(kind, kind).lower() for kind in some)
        for some in (kinds, [group.kind])
    )
    return (
        f"Nothing published of {weights} stands beside {own}: its published scores are of {known}."
    )


def _row(result: Result, group: Group, names: Sequence[str], notes: list[str]) -> Row:
    cells = [_cell(result, group, name, notes) for name in names]
    return Row(result.label, about(result), result.file, cells)


def _cell(result: Result, group: Group, name: str, notes: list[str]) -> Cell:
    score = result.scores.get(name)
    if score is None:
        return Cell("–", faint=True)
    shown = results.text(name, score.value)
    if score.error is not None:
        shown += f" ± {results.text(name, score.error)}"
    said = score.note or ("" if score.comparable else "not comparable")
    best = score.comparable and score.value is not None and score.value == group.best(name)
    marks = tuple(_noted(reason, notes) for reason in said.split("; ")) if said else ()
    return Cell(shown, best, marks, faint=not score.comparable or score.value is None)


def _noted(note: str, notes: list[str]) -> int:
    """The number of a note, which is added if it is new."""
    if note not in notes:
        notes.append(note)
    return notes.index(note) + 1


def _published_rows(pairs: Sequence[Beside], names: Sequence[str], notes: list[str]) -> list[Row]:
    """Of each weights the published scores of the table's protocol.

    Of each score that is told by a result that has it: others of the table may lack the fields in
    which its protocol differs.
    """
    known: dict[str, dict[str, str]] = {}
    about = {pair.published.weights: pair.published for pair in pairs}
    for pair in pairs:
        found = known.setdefault(pair.published.weights, {})
        found |= {
            name: text for name, text in pair.published.scores.items()
            if name in pair.result.scores and pair.compares(name)
        }  # fmt: skip
    rows = []
    for weights, found in known.items():
        cells = [Cell(found.get(name, "–"), faint=name not in found) for name in names]
        there = about[weights]
        if found and there.note:  # it stands here, and not below as well
            cells[0] = cells[0]._replace(notes=(_noted(f"published: {there.note}", notes),))
        rows += [Row(f"{weights}, published", there.source, None, cells)] if found else []
    return rows


def _label(group: Group, name: str) -> str:
    return next(r.scores[name].label for r in group.results if name in r.scores)


def about(result: Result) -> str:
    """What was evaluated, in a line."""
    known = [str(result.subject[k]) for k in ("source", "release") if result.subject.get(k)]
    return ", ".join(dict.fromkeys(known))


def _is_digest(value: Any) -> bool:
    text = str(value)
    return len(text) >= _LONG and all(c in "0123456789abcdef" for c in text)


def _protocol(group: Group, every: Sequence[Group]) -> list[tuple[str, str, bool]]:
    fields = group.protocol()
    others = [g.protocol() for g in every if g.kind == group.kind and g is not group]
    return [
        (name, shown(value), name not in _NO_PROTOCOL and any(o.get(name) != value for o in others))
        for name, value in fields.items() if value not in (None, "")
    ]  # fmt: skip


def shown(value: Any) -> str:
    """A value of a protocol; of a digest its beginning."""
    return f"{value[:_LONG]}…" if _is_digest(value) and len(value) > _LONG else str(value)


# ------------------------------------------------------------------------------------- the page


def write(found: Sequence[Result], out: epath.Path, weights: str | None = None) -> list[Section]:
    """Writes the page and, beside it, the Markdown; returns what they show."""
    made = sections(found, weights)
    outputs.write(out, render(made, out).encode())
    outputs.write(out.with_suffix(".md"), markdown(made, out).encode())
    return made


def render(made: Sequence[Section], out: epath.Path) -> str:
    """The page as text."""
    every = [result for section in made for result in section.group.results]
    count = max(sum(len(r.pictures) for r in every), 1)
    values = {
        "facts": _facts(made),
        "contents": Table(["", "results", "scores"], [_content(section) for section in made]),
        "sections": [_values(section, out, pages.PICTURE_BYTES // count) for section in made],
    }
    return pages.page("results.html", values)


def _facts(made: Sequence[Section]) -> list[tuple[str, str]]:
    every = [result for section in made for result in section.group.results]
    facts = [("results", f"{len(every)} in {len(made)} table(s), one for each protocol")]
    for name in ("commit", "device"):
        known = sorted({str(r.made[name]) for r in every if r.made.get(name)})
        facts.append((name, ", ".join(known) or "not recorded"))
    return facts


def _content(section: Section) -> list[str]:
    import markupsafe

    link = markupsafe.Markup('<a href="#table-{}">{}</a>').format(section.number, section.title)
    labels = ", ".join(section.labels)
    return [link, str(len(section.group.results)), labels]


def _values(section: Section, out: epath.Path, budget: int) -> dict[str, Any]:
    """What the template shows of a section."""
    group = section.group
    return {
        "number": section.number, "title": section.title, "table": _html_table(section, out),
        "notes": section.notes, "elsewhere": section.elsewhere,
        "beside": _besides(section),
        "pictures": [picture for r in group.results for picture in _pictures(r, budget)],
        "protocol": section.protocol, "varying": _varying(group),
        "details": [(r.label, _details(r)) for r in group.results],
    }  # fmt: skip


def _html_table(section: Section, out: epath.Path) -> Table:
    import markupsafe

    head = markupsafe.Markup("{} <small>{}<br>{}{}</small>")
    heads = [
        head.format(_head(name), *label.partition("["))
        for name, label in zip(section.names, section.labels, strict=True)
    ]
    rows = [[_html_name(row, out), *map(_html_cell, row.cells)] for row in section.rows]
    return Table(["", *heads], rows, [i for i, row in enumerate(section.rows) if not row.file][:1])


def _head(name: str) -> str:
    """rFID ↓"""
    return NAMES.get(name, name) + phases.arrow(name)


def _html_name(row: Row, out: epath.Path) -> str:
    import markupsafe

    target = link(row.file, out) if row.file else ""
    name = markupsafe.escape(row.name)
    if target:
        name = markupsafe.Markup('<a href="{}">{}</a>').format(target, row.name)
    return name + markupsafe.Markup("<small>{}</small>").format(row.about)


def _html_cell(cell: Cell) -> str:
    import markupsafe

    shape = "<b>{}</b>" if cell.best else '<span class="faint">{}</span>' if cell.faint else "{}"
    marks = markupsafe.Markup("<sup>{}</sup>").format(" ".join(map(str, cell.notes)))
    return markupsafe.Markup(shape).format(cell.text) + (marks if cell.notes else "")


def link(file: epath.Path, out: epath.Path) -> str:
    """The address of a file seen from the page; "" where one is on a disk and the other is not."""
    here, there = _absolute(out.parent), _absolute(file)
    if here.partition("://")[1:2] != there.partition("://")[1:2]:
        return ""
    return urllib.parse.quote(
        os.path.relpath(there.partition("://")[2] or there, here.partition("://")[2] or here)
    )


def _absolute(path: epath.Path) -> str:
    return str(path) if "://" in str(path) else os.path.abspath(path)


def heading(pair: Beside) -> str:
    """Whose numbers stand beside whose."""
    return f"{pair.result.label} beside {pair.published.weights} ({pair.published.source})"


def below(pair: Beside) -> str:
    """What a reader must know of the comparison."""
    found = [NAMES.get(n, n) for n in pair.published.scores if not pair.compares(n)]
    whose = f"{', '.join(found)} " if pair.any_compares else ""
    why_not = f"{whose}not comparable: {pair.why_not}" if found else ""
    note = "" if pair.any_compares else pair.published.note
    return "; ".join(part for part in (why_not, note) if part)


def _besides(section: Section) -> list[tuple[str, Table, str]]:
    """(heading, table, what must be known) of each comparison; the last is said once."""
    found: list[tuple[str, Table, str]] = []
    for pair in section.beside:
        text = below(pair)
        told = any(text == known for *_, known in found)
        found.append((heading(pair), _beside_table(pair), "" if told else text))
    return found


def _beside_table(pair: Beside) -> Table:
    rows = [[_head(line.score), *line[1:]] for line in pair.lines]
    return Table(_BESIDE_HEAD, rows)


def _pictures(result: Result, budget: int) -> list[pages.Picture]:
    found = []
    for path in result.pictures:
        try:
            found.append(pages.embedded(result.label, path.name, path, budget))
        except OSError as error:  # Pillow's are of this kind too
            found.append(pages.Picture(result.label, f"{path.name} cannot be shown: {error}", ""))
    return found


def _varying(group: Group) -> Table | None:
    """Fields that are recorded, and differ between rows without being a hindrance."""
    values = group.varying()
    if not values:
        return None
    return Table(
        ["field", *(result.label for result in group.results)],
        [[name, *map(shown, each)] for name, each in values.items()],
    )


def _details(result: Result) -> list[tuple[str, str]]:
    """All that was recorded of a result's subject and making."""
    flat = config.flatten({"subject": result.subject, "made": result.made})
    values = [(name.partition(".")[2], str(value)) for name, value in flat.items()]
    return [("file", str(result.file)), *values]


# ----------------------------------------------------------------------- Markdown and the console


def markdown(made: Sequence[Section], out: epath.Path) -> str:
    """The same tables for a README."""
    parts = ["# Results", "Scores stand in one table only if their protocols are the same."]
    for section in made:
        parts += [f"## {section.title}", _markdown_table(section, out)]
        parts += [_numbered(section.notes)] if section.notes else []
        for title, table, text in _besides(section):
            parts += [f"### {title}", _piped(table), text]
        parts += section.elsewhere
        fields = "; ".join(f"{name} {value}" for name, value, _ in section.protocol)
        parts.append(f"Protocol: {fields}.")
        if (varying := _varying(section.group)) is not None:
            parts += ["Recorded, and no part of the protocol:", _piped(varying)]
        parts += [_linked_pictures(section.group, out)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(section: Section, out: epath.Path) -> str:
    pairs = zip(section.names, section.labels, strict=True)
    heads = [f"{_head(name)}<br>`{label}`" for name, label in pairs]
    rows = [[_markdown_name(row, out), *map(_markdown_cell, row.cells)] for row in section.rows]
    return _piped(Table(["", *heads], rows))


def _markdown_name(row: Row, out: epath.Path) -> str:
    target = link(row.file, out) if row.file else ""
    name = f"[{row.name}]({target})" if target else row.name
    return f"{name}<br>{row.about}" if row.about else name


def _markdown_cell(cell: Cell) -> str:
    marks = "".join(f" ({number})" for number in cell.notes)
    return f"**{cell.text}**{marks}" if cell.best else f"{cell.text}{marks}"


def _numbered(notes: Sequence[str]) -> str:
    return "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1))


def _piped(table: Table) -> str:
    lines = [table.head, ["---", *["--:"] * (len(table.head) - 1)], *table.rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)


def _linked_pictures(group: Group, out: epath.Path) -> str:
    found = [(r.label, path) for r in group.results for path in r.pictures if path.exists()]
    shown = [(name, path, link(path, out)) for name, path in found]
    return "\n".join(f"![{name}, {path.name}]({there})" for name, path, there in shown if there)


def console(made: Sequence[Section]) -> str:
    """The same tables for a terminal."""
    return "\n\n".join(_console(section) for section in made)


def _console(section: Section) -> str:
    rows = [[row.name, *map(_console_cell, row.cells)] for row in section.rows]
    rules = [i for i, row in enumerate(section.rows) if not row.file][:1]
    parts = [section.title, phases.as_text(Table(["", *map(_head, section.names)], rows, rules))]
    parts += [f"({i}) {note}" for i, note in enumerate(section.notes, 1)]
    for title, table, text in _besides(section):
        parts += ["", title, phases.as_text(table), *([text] if text else [])]
    parts += section.elsewhere
    return "\n".join(parts)


def _console_cell(cell: Cell) -> str:
    marks = "".join(f" ({number})" for number in cell.notes)
    return f"{cell.text}{' *' if cell.best else ''}{marks}"
