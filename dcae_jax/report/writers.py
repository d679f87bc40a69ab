"""Writers of metrics and images: a plain list, each with the method names of clu's metric writers.

Only process 0 writes; the caller decides that.  All paths go through etils.epath and may be on an
object store: nothing here appends to a closed file, truncates or renames one.

The metrics format.  `workdir/metrics/<step>.jsonl` are segments.  The first line of a segment is
`{"segment": {"attempt", "part", "start_step", "time"}}`, each further line one row
`{"step", "time", name: value, ...}`.  One *attempt* is one start of the program: it resumed at
`start_step` and owns the parts 0, 1, ...  A segment is rewritten whole at each flush, alternating
between `<step>.jsonl` and `<step>.b.jsonl`, so that a whole version exists at every moment, also
when the process is killed while it writes; a full or closed segment keeps `<step>.jsonl` only.
"""

import json
import math
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import UInt8

from dcae_jax.errors import UserError
from dcae_jax.report import images as images_lib

Scalars = Mapping[str, SupportsFloat]
Images = Mapping[str, UInt8[np.ndarray, "_ _ _"]]  # h w c; sizes may differ
Path = str | os.PathLike[str]

_NON_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers: stored as these strings
_EVENT_FILE_BYTES = 16 * 2**20  # a remote events file is uploaded whole at each flush


@runtime_checkable
class Writer(Protocol):
    """What the loop calls; a writer of clu has the same methods."""

    def write_scalars(self, step: int, scalars: Scalars) -> None: ...
    def write_images(self, step: int, images: Images) -> None: ...
    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...
    def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def make_writers(
    workdir: Path, start_step: int, *, tensorboard: bool = True, wandb_project: str = ""
) -> list[Writer]:
    """The writers of one attempt that starts (or resumes) at `start_step`; for process 0 only."""
    writers: list[Writer] = [MetricsWriter(workdir, start_step), ImageWriter(workdir)]
    if tensorboard:
        writers.append(TensorBoardWriter(workdir, start_step))
    if wandb_project:
        writers.append(WandbWriter(workdir, wandb_project))
    return writers


# ---------------------------------------------------------------------------- metrics/*.jsonl


class MetricsWriter:
    """Rows of scalars in segments that are rewritten whole (format: this module's docstring).

    Texts (the protocol of a metric, say) are rows too; hyperparameters go to the segment's header.
    Images are left to the other writers.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        rows_per_segment: int = 500,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._folder = epath.Path(workdir) / "metrics"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._now = now
        self._rows_per_segment = rows_per_segment
        known = [header["attempt"] for header, _ in _segments(self._folder)]
        attempt = 1 + max(known, default=0)
        self._header = {"attempt": attempt, "part": 0, "start_step": start_step, "time": now()}
        self._open(start_step)

    def _open(self, step: int) -> None:
        self._stem = _free_stem(self._folder, step)
        self._rows: list[str] = []
        self._dirty = False
        self._slots: list[str] = []  # suffixes written so far, the newest last

    def _add(self, step: int, values: dict[str, Any]) -> None:
        if len(self._rows) >= self._rows_per_segment:
            self._seal()
            self._header["part"] += 1
            self._open(step)
        self._rows.append(json.dumps({"step": step, "time": round(self._now(), 3), **values}))
        self._dirty = True

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """Buffers one row; several rows of one step are merged by the reader."""
        self._add(step, {name: _encode(value) for name, value in scalars.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Buffers a row of texts: what a number was measured with belongs beside the number."""
        self._add(step, {name: {"text": text} for name, text in texts.items()})

    def write_images(self, step: int, images: Images) -> None:
        """Nothing: pictures are files of their own (ImageWriter)."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Keeps hyperparameters in the header of this attempt's segments."""
        self._header["hparams"] = dict(hparams)
        self._dirty = bool(self._rows)

    def flush(self) -> None:
        """Writes the current segment whole, into the slot that does not hold the newest version."""
        if self._dirty:
            self._write(".b" if self._slots[-1:] == [""] else "")
            self._dirty = False

    def _write(self, slot: str) -> None:
        lines = [json.dumps({"segment": self._header}), *self._rows]
        (self._folder / f"{self._stem}{slot}.jsonl").write_text("\n".join(lines) + "\n")
        self._slots = [*(s for s in self._slots if s != slot), slot]

    def _seal(self) -> None:
        """Leaves exactly `<stem>.jsonl`: whole in one slot before the other is touched."""
        self.flush()
        if self._slots[-1:] == [".b"]:
            self._write("")
        if ".b" in self._slots:
            (self._folder / f"{self._stem}.b.jsonl").unlink(missing_ok=True)

    def close(self) -> None:
        """Writes what is buffered; the writer must not be used afterwards."""
        self._seal()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All rows of a run, one per step, in order of steps.

    Attempts are read in the order of their starts.  An attempt that resumed at step k removes every
    row after step k of the attempts before it; within one step (k itself, or several writes of one
    attempt) the values are merged by name and the latest wins.  Parts of one attempt never remove
    each other's rows.  A torn last line (the process was killed) is left out.
    """
    attempts: dict[tuple[int, float], list[tuple[dict[str, Any], list[dict[str, Any]]]]] = {}
    for header, rows in _segments(epath.Path(workdir) / "metrics"):
        attempts.setdefault((header["attempt"], header["time"]), []).append((header, rows))
    merged: dict[int, dict[str, Any]] = {}
    for _, parts in sorted(attempts.items(), key=lambda item: item[0]):
        start_step = parts[0][0]["start_step"]
        merged = {step: row for step, row in merged.items() if step <= start_step}
        for _, rows in sorted(parts, key=lambda part: part[0]["part"]):
            for row in rows:
                merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _segments(folder: epath.Path) -> Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(header, rows) of each segment; of its two slots the one with more rows."""
    best: dict[tuple[int, float, int], tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = _json_lines(path)
        if not lines or "segment" not in lines[0]:
            continue  # killed before its first line was whole
        header, rows = lines[0]["segment"], [_decode(line) for line in lines[1:]]
        key = (header["attempt"], header["time"], header["part"])
        if key not in best or len(rows) > len(best[key][1]):
            best[key] = (header, rows)
    return best.values()


def _json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The lines that are whole JSON; a broken one that is not the last is reported."""
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                warnings.warn(f"{path}: line {number} is not JSON; left out", stacklevel=2)
    return found


def _free_stem(folder: epath.Path, step: int) -> str:
    """`<step>`, or `<step>-2`, ... where an earlier attempt has a segment of that name."""
    number, stem = 1, f"{step:09d}"
    while any((folder / f"{stem}{slot}.jsonl").exists() for slot in ("", ".b")):
        number += 1
        stem = f"{step:09d}-{number}"
    return stem


def _encode(value: SupportsFloat) -> float | str:
    """A JSON number; nine digits hold a float32 exactly."""
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return number if number.is_integer() else float(f"{number:.9g}")


def _decode(row: dict[str, Any]) -> dict[str, Any]:
    """Undoes `_encode` and unwraps texts."""
    plain = {}
    for name, value in row.items():
        if isinstance(value, dict):
            value = value["text"]
        elif value in _NON_FINITE:
            value = float(value)
        plain[name] = value
    return plain


# ---------------------------------------------------------------------------- TensorBoard


class TensorBoardWriter:
    """Events files in workdir/tensorboard, without TensorFlow.

    Each start makes a new file, whose first event tells TensorBoard to forget what a crashed
    attempt wrote after `start_step`.  On an object store the file grows in a local temporary folder
    and is uploaded whole at each flush; beyond 16 MB a new file is begun.  Events are written in
    the caller's thread: tensorboardX's own SummaryWriter has a queue that its flush does not drain,
    and file names that two starts within one second share.
    """

    def __init__(self, workdir: Path, start_step: int) -> None:
        self._folder = epath.Path(workdir) / "tensorboard"
        self._remote = "://" in os.fspath(self._folder)
        self._temporary = tempfile.TemporaryDirectory() if self._remote else None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._local = self._temporary.name if self._temporary else os.fspath(self._folder)
        self._count = 0
        self._open()
        if start_step:
            self._session_start(start_step + 1)

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        # Names sort in the order of creation, which is the order in which TensorBoard reads them.
        self._count += 1
        suffix = f".{os.getpid()}.{time.time_ns()}.{self._count:04d}"
        self._events = EventsWriter(os.path.join(self._local, "events"), suffix)
        self._events.flush()

    def _session_start(self, step: int) -> None:
        from tensorboardX.proto import event_pb2

        status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=step, session_log=status))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def _summary(self, step: int, values: list[Any]) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        if values:
            self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """One event with all values."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=float(v)) for tag, v in scalars.items()]
        self._summary(step, values)

    def write_images(self, step: int, images: Images) -> None:
        """PNG pictures."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = []
        for tag, array in images.items():
            height, width, channels = array.shape
            picture = Summary.Image(
                height=height,
                width=width,
                colorspace=channels,
                encoded_image_string=images_lib.to_png(array),
            )
            values.append(Summary.Value(tag=tag, image=picture))
        self._summary(step, values)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts as TensorBoard's text plugin shows them (Markdown)."""
        from tensorboardX import summary

        for tag, text in texts.items():
            self._summary(step, list(summary.text(tag, text).value))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """The configuration as one text."""
        listing = json.dumps(dict(hparams), indent=2, default=str)
        self.write_texts(0, {"config": "    " + listing.replace("\n", "\n    ")})

    def flush(self) -> None:
        """Everything written so far is on the disk, or on the store, afterwards."""
        self._events.flush()
        if not self._remote:
            return
        name = os.path.basename(self._events._file_name)
        data = epath.Path(self._local, name).read_bytes()
        (self._folder / name).write_bytes(data)
        if len(data) > _EVENT_FILE_BYTES:
            self._events.close()
            self._open()

    def close(self) -> None:
        """Flushes, closes the file and removes the temporary folder."""
        self.flush()
        self._events.close()
        if self._temporary:
            self._temporary.cleanup()


# ---------------------------------------------------------------------------- pictures


class ImageWriter:
    """PNG files `workdir/images/<name>/<step>.png`; scalars and texts are left to other writers."""

    def __init__(self, workdir: Path) -> None:
        self._folder = epath.Path(workdir) / "images"

    def write_images(self, step: int, images: Images) -> None:
        """Writes each picture at once; a picture of the same name and step is replaced."""
        for name, array in images.items():
            path = self._folder / name / f"{step:09d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images_lib.to_png(array))

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """Nothing."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Nothing."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing: pictures are written at once."""

    def close(self) -> None:
        """Nothing."""


def read_images(workdir: Path) -> dict[str, dict[int, epath.Path]]:
    """{name: {step: path}} of the pictures that `ImageWriter` wrote, steps in order."""
    folder = epath.Path(workdir) / "images"
    found: dict[str, dict[int, epath.Path]] = {}
    for depth in ("*", "*/*"):  # a name may hold one slash
        for path in sorted(folder.glob(f"{depth}/*.png")):
            if path.stem.isdigit():
                name = "/".join(path.parts[len(folder.parts) : -1])
                found.setdefault(name, {})[int(path.stem)] = path
    return found


# ---------------------------------------------------------------------------- Weights & Biases


class WandbWriter:
    """Weights & Biases; one run per workdir, continued by a resumed run.

    Steps are a metric of their own ("step"), since wandb drops rows whose internal step goes back,
    which is what a resume does.
    """

    def __init__(self, workdir: Path, project: str) -> None:
        try:
            import wandb
        except ImportError:
            message = (
                "a Weights & Biases project is given, but the package wandb is not installed: "
                "run `pip install wandb`, or leave the project out"
            )
            raise UserError(message) from None
        self._wandb = wandb
        name = os.fspath(epath.Path(workdir))
        identity = "".join(c if c.isalnum() else "-" for c in f"{socket.gethostname()}-{name}")
        self._run = wandb.init(project=project, name=name, id=identity[-100:], resume="allow")
        self._run.define_metric("*", step_metric="step")

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """One row."""
        self._run.log({"step": step, **{name: float(value) for name, value in scalars.items()}})

    def write_images(self, step: int, images: Images) -> None:
        """PNG pictures."""
        pictures = {name: self._wandb.Image(array) for name, array in images.items()}
        self._run.log({"step": step, **pictures})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts go to the run's summary: they describe, they are not a curve."""
        self._run.summary.update(dict(texts))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """The configuration of the run."""
        self._run.config.update(dict(hparams), allow_val_change=True)

    def flush(self) -> None:
        """Nothing: wandb uploads in the background."""

    def close(self) -> None:
        """Waits for the uploads."""
        self._run.finish()
