"""The metrics segments: resume, roll-over, kills in the middle of a write, no append anywhere."""

import json

import fake_store
import pytest
from etils import epath

from dcae_jax.report import writers


@pytest.fixture(params=["local", "object store"])
def workdir(request, tmp_path):
    fake_store.reset()
    return epath.Path(tmp_path if request.param == "local" else "fake://bucket") / "run"


def steps_of(workdir):
    return [row["step"] for row in writers.read_metrics(workdir)]


def train(workdir, start, stop, *, tag, rows_per_segment=500, close=True):
    """An attempt that logs each step after `start`; without close it ends like a kill."""
    writer = writers.MetricsWriter(workdir, start, rows_per_segment)
    for step in range(start + 1, stop + 1):
        writer.write_scalars(step, {"train/loss": step + tag})
        writer.flush()
    if close:
        writer.close()
    return writer


def test_values_survive(workdir):
    writer = writers.MetricsWriter(workdir, 0, now=lambda: 12.0)
    values = {"a": 0.1, "nan": float("nan"), "inf": float("-inf"), "big": 123456789012.0}
    writer.write_scalars(1, values)
    writer.write_texts(1, {"fid/protocol": "nan"})
    writer.close()
    (row,) = writers.read_metrics(workdir)
    assert row.pop("nan") != row.pop("fid/protocol") == "nan"  # a number and a text
    assert row == {"step": 1, "time": 12.0, "a": 0.1, "inf": float("-inf"), "big": 123456789012.0}
    text = next(iter((workdir / "metrics").glob("*.jsonl"))).read_text()
    assert "NaN" not in text and "Infinity" not in text  # plain JSON, for other programs


def test_missing_folder_is_empty(workdir):
    assert writers.read_metrics(workdir) == []


def test_two_writes_of_one_step_are_one_row(workdir):
    writer = writers.MetricsWriter(workdir, 0)
    writer.write_scalars(5, {"train/loss": 1.0, "twice": 1.0})
    writer.write_scalars(5, {"photos-128-test/psnr": 20.0, "twice": 2.0})
    writer.close()
    (row,) = writers.read_metrics(workdir)
    assert (row["train/loss"], row["photos-128-test/psnr"], row["twice"]) == (1.0, 20.0, 2.0)


@pytest.mark.parametrize("rows_per_segment", [2, 3, 500])
@pytest.mark.parametrize("closed", [True, False])
def test_resume_supersedes_what_came_after_the_checkpoint(workdir, rows_per_segment, closed):
    """Crash at 17, resume at 10: one row per step, up to 10 of the first attempt."""
    train(workdir, 0, 17, tag=0.0, rows_per_segment=rows_per_segment, close=closed)
    train(workdir, 10, 14, tag=0.5, rows_per_segment=rows_per_segment, close=closed)
    rows = writers.read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, 15))
    tags = [row["train/loss"] - row["step"] for row in rows]
    assert tags == [0.0] * 10 + [0.5] * 4


def test_resume_earlier_than_the_attempt_before(workdir):
    """A third attempt may begin before the second did (its checkpoint was corrupt)."""
    train(workdir, 0, 10, tag=0.0)
    train(workdir, 8, 12, tag=0.25)
    train(workdir, 4, 6, tag=0.5)
    assert [row["train/loss"] for row in writers.read_metrics(workdir)] == [1, 2, 3, 4, 5.5, 6.5]


def test_attempts_of_equal_start_keep_files_of_their_own(workdir):
    """Segments of one name: a roll-over at 10 and a resume at 10 overwrite nothing."""
    train(workdir, 9, 12, tag=0.0, rows_per_segment=1)
    train(workdir, 10, 11, tag=0.5)
    train(workdir, 10, 11, tag=0.75)
    rows = writers.read_metrics(workdir)
    assert [row["train/loss"] for row in rows] == [10.0, 11.75]


def test_row_at_the_resumed_step_is_merged(workdir):
    """Step 10 was logged before the checkpoint at 10; the resumed run evaluates at 10 again."""
    train(workdir, 0, 10, tag=0.0)
    writer = writers.MetricsWriter(workdir, 10)
    writer.write_scalars(10, {"photos-128-test/psnr": 21.0})
    writer.close()
    last = writers.read_metrics(workdir)[-1]
    assert (last["step"], last["train/loss"], last["photos-128-test/psnr"]) == (10, 10.0, 21.0)


def test_rollover_removes_nothing(workdir):
    train(workdir, 0, 100, tag=0.0, rows_per_segment=7)
    assert steps_of(workdir) == list(range(1, 101))
    names = sorted(path.name for path in (workdir / "metrics").glob("*.jsonl"))
    assert names[:3] == ["000000000.jsonl", "000000008.jsonl", "000000015.jsonl"]
    assert not [name for name in names if ".b." in name]  # closed segments have one file


def test_attempts_are_ordered_by_number_not_by_clock(workdir):
    """The second machine's clock is an hour behind."""
    for start, stop, clock in ((0, 6, 7200.0), (3, 5, 3600.0)):
        writer = writers.MetricsWriter(workdir, start, now=lambda clock=clock: clock)
        for step in range(start + 1, stop + 1):
            writer.write_scalars(step, {"clock": clock})
        writer.close()
    clocks = [row["clock"] for row in writers.read_metrics(workdir)]
    assert clocks == [7200.0] * 3 + [3600.0] * 2


def test_kill_at_every_byte_of_a_flush_loses_only_the_unflushed_row(tmp_path):
    """The newest file is cut at each length: all rows of the flush before are still there."""
    writer = train(tmp_path, 0, 4, tag=0.0, close=False)
    newest = tmp_path / "metrics" / f"000000000{writer._slots[-1]}.jsonl"
    whole = newest.read_bytes()
    for length in range(len(whole)):
        newest.write_bytes(whole[:length])
        assert steps_of(tmp_path)[:3] == [1, 2, 3]


def test_broken_line_in_the_middle_is_reported(tmp_path):
    train(tmp_path, 0, 3, tag=0.0)
    path = tmp_path / "metrics" / "000000000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-3], *lines[3:]]))
    with pytest.warns(UserWarning, match="line 3 is not JSON"):
        assert steps_of(tmp_path) == [1, 3]


def test_flush_without_news_writes_nothing():
    store = fake_store.reset()
    writer = writers.MetricsWriter("fake://bucket/run", 0)
    writer.flush()
    writer.write_scalars(1, {"a": 1.0})
    writer.flush()
    writer.flush()
    assert len(store.writes) == 1


def test_flush_never_touches_the_newest_version():
    store = fake_store.reset()
    train(epath.Path("fake://bucket/run"), 0, 6, tag=0.0, close=False)
    assert all(a != b for a, b in zip(store.writes, store.writes[1:], strict=False))


def test_lagging_listing_keeps_both_attempts_apart():
    """The second start does not see the first one's segments yet; time then tells their order."""
    store = fake_store.reset()
    store.listing_lag = 3
    for start, clock in ((0, 1.0), (2, 2.0)):
        writer = writers.MetricsWriter("fake://bucket/run", start, now=lambda clock=clock: clock)
        for step in range(start + 1, start + 5):
            writer.write_scalars(step, {"clock": clock})
        writer.close()
    for _ in range(4):
        store.listed()
    rows = writers.read_metrics("fake://bucket/run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["clock"] for row in rows] == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]


def test_hparams_are_in_the_header(tmp_path):
    writer = writers.MetricsWriter(tmp_path, 0)
    writer.write_hparams({"lr": 0.1})
    writer.write_scalars(1, {"a": 1.0})
    writer.close()
    header = json.loads((tmp_path / "metrics" / "000000000.jsonl").read_text().splitlines()[0])
    assert header["segment"]["hparams"] == {"lr": 0.1}


def test_fake_store_refuses_what_object_stores_lack(tmp_path):
    fake_store.reset()
    path = epath.Path("fake://bucket/a/b.txt")
    path.write_text("x")
    assert str(path) == "fake://bucket/a/b.txt" and path.parent.is_dir()
    assert [p.name for p in epath.Path("fake://bucket").iterdir()] == ["a"]
    for mode in ("a", "r+", "x", "ab"):
        with pytest.raises(OSError):
            path.open(mode)
    with pytest.raises(OSError):
        path.rename("fake://bucket/c.txt")
    with pytest.raises(RuntimeError), (path.parent / "half.txt").open("w") as file:
        file.write("half")
        raise RuntimeError("killed")
    assert not (path.parent / "half.txt").exists()
    path.copy(tmp_path / "copy.txt")
    assert (tmp_path / "copy.txt").read_text() == "x"
