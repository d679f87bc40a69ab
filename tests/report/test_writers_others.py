"""TensorBoard events read back record by record, pictures, Weights & Biases through a double."""

import struct
import sys
import types

import fake_store
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboardX.proto import event_pb2

from dcae_jax.errors import UserError
from dcae_jax.report import writers


def events(path):
    """The events of a file in TFRecord framing: length, its crc, payload, its crc."""
    data, found, position = path.read_bytes(), [], 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        payload = data[position + 12 : position + 12 + length]
        found.append(event_pb2.Event.FromString(payload))
        position += length + 16
    return found


def files(workdir):
    return sorted((epath.Path(workdir) / "tensorboard").iterdir())


@pytest.fixture(params=["local", "object store"])
def workdir(request, tmp_path):
    fake_store.reset()
    return epath.Path(tmp_path if request.param == "local" else "fake://bucket") / "run"


def test_tensorboard_holds_everything_after_flush(workdir):
    writer = writers.TensorBoardWriter(workdir, 0)
    writer.write_scalars(3, {"train/loss": 0.5, "train/l1": 0.25})
    writer.write_images(3, {"grid": np.zeros((4, 6, 3), np.uint8)})
    writer.write_texts(3, {"note": "hello"})
    writer.write_hparams({"lr": 1e-3})
    writer.flush()
    (path,) = files(workdir)
    found = [event for event in events(path) if event.HasField("summary")]
    values = {value.tag: value for event in found for value in event.summary.value}
    writer.close()
    assert found[0].step == 3
    assert values["train/loss"].simple_value == 0.5
    assert values["train/l1"].simple_value == 0.25
    assert (values["grid"].image.height, values["grid"].image.width) == (4, 6)
    assert values["note/text_summary"].tensor.string_val == [b"hello"]


def test_each_start_has_its_own_file_and_purges(workdir):
    """Two starts within one second must not share (and so truncate) a file."""
    for start in (0, 7):
        writer = writers.TensorBoardWriter(workdir, start)
        writer.write_scalars(start + 1, {"a": float(start)})
        writer.close()
    first, second = files(workdir)
    assert [e.summary.value[0].simple_value for e in events(first) if e.summary.value] == [0.0]
    starts = [e for e in events(second) if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in starts] == [(8, event_pb2.SessionLog.START)]


def test_large_remote_events_roll_over(monkeypatch):
    fake_store.reset()
    monkeypatch.setattr(writers, "_EVENT_FILE_BYTES", 200)
    writer = writers.TensorBoardWriter("fake://bucket/run", 0)
    for step in range(10):
        writer.write_scalars(step, {"a": float(step)})
        writer.flush()
    writer.close()
    found = [e for path in files("fake://bucket/run") for e in events(path) if e.summary.value]
    assert len(files("fake://bucket/run")) > 1
    assert [e.step for e in found] == list(range(10))


def test_images_round_trip(workdir):
    writer = writers.ImageWriter(workdir)
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    for step in (1000, 20):
        writer.write_images(step, {"photos-128-test": picture, "a/b": picture})
    found = writers.read_images(workdir)
    assert sorted(found) == ["a/b", "photos-128-test"]
    assert list(found["photos-128-test"]) == [20, 1000]
    with found["a/b"][20].open("rb") as file:
        np.testing.assert_array_equal(np.asarray(Image.open(file)), picture)


def test_make_writers(tmp_path):
    made = writers.make_writers(tmp_path, 0)
    for writer in made:  # all have clu's methods
        writer.write_hparams({"a": 1})
        writer.write_scalars(1, {"a": np.float32(1)})
        writer.write_texts(1, {"t": "x"})
        writer.write_images(1, {"i": np.zeros((2, 2, 3), np.uint8)})
        writer.flush()
        writer.close()
    assert [row["a"] for row in writers.read_metrics(tmp_path)] == [1.0]
    assert len(writers.make_writers(tmp_path, 0, tensorboard=False)) == 2


def test_wandb_missing_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        writers.make_writers(tmp_path, 0, wandb_project="p")


def test_wandb_steps_are_a_metric(monkeypatch, tmp_path):
    """A resumed run logs smaller steps again: wandb's own step counter would drop them."""
    logged, defined = [], []
    run = types.SimpleNamespace(
        log=logged.append,
        define_metric=lambda *a, **k: defined.append((a, k)),
        summary={},
        config=types.SimpleNamespace(update=lambda *a, **k: None),
        finish=lambda: None,
    )
    calls = []
    module = types.SimpleNamespace(init=lambda **k: calls.append(k) or run, Image=lambda x: x)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        writer = writers.WandbWriter(tmp_path / "run", "project")
        writer.write_scalars(4, {"a": np.float32(2)})
        writer.write_texts(4, {"t": "x"})
        writer.write_hparams({"lr": 1})
        writer.close()
    assert logged == [{"step": 4, "a": 2.0}] * 2
    assert defined[0] == (("*",), {"step_metric": "step"})
    assert calls[0] == calls[1] and calls[0]["resume"] == "allow"  # one run, continued
