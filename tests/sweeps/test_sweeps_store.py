"""A sweep in an object store without append, rename and locks, whose listings lag behind."""

import json
import os

import fake_store
import pytest
import shared_store
from etils import epath
from sweeping import CONFIG, ROOT, kill, wait_for

from dcae_jax.errors import UserError
from dcae_jax.sweeps import claim, folder, processes
from dcae_jax.sweeps.folder import Folder

OUT = "fake://bucket/sweep"


@pytest.fixture
def store(checkout, monkeypatch):
    """Shared with all processes that are started: their Python imports it first."""
    place = checkout.path / "store"
    place.mkdir()
    (checkout.path / "site").mkdir()
    (checkout.path / "site/sitecustomize.py").write_text("import shared_store\n")
    parts = [checkout.path / "site", ROOT / "tests", ROOT / "tests/sweeps", ROOT]
    monkeypatch.setattr(
        type(checkout), "environment",
        lambda self, **more: {
            **os.environ, "PYTHONPATH": ":".join(map(str, parts)), "FAKE_STORE": str(place),
            **{k: str(v) for k, v in more.items()},
        },
    )  # fmt: skip
    monkeypatch.setattr(checkout, "out", OUT)
    before = fake_store.STORE
    yield shared_store.use(str(place), 0)
    fake_store.STORE = before


def records(names):
    place = Folder(OUT)
    return {name: place.record(name, {}) for name in names}


@pytest.mark.multiprocess
def test_a_search_in_a_store_survives_kill_9(checkout, store):
    names = lambda: (Folder(OUT).manifest() or folder.Manifest("", [], [], 0, {})).trials  # noqa: E731

    def done():
        return sum(r.state is folder.State.done for r in records(names()).values())

    options = ("--search", "--trials=6", "--metric=psnr", "--slots=2")
    sweep = checkout.start(*options)
    wait_for(lambda: done() >= 2, "two are done")
    kill(sweep.pid)
    sweep.wait()
    code, text = checkout.run(*options)
    assert code == 0, text
    assert len(names()) == 6 and done() == 6
    for name, record in records(names()).items():
        starts = (epath.Path(OUT) / "runs" / name / "starts.txt").read_text().splitlines()
        assert len(starts) == len(record.starts) == 1 and record.starts[0].exit_code == 0
        assert starts[0].split()[0] == str(record.starts[0].pid)
    rows = (epath.Path(OUT) / "results.csv").read_text().splitlines()
    assert len(rows) == 7 and all(",done,0," in row for row in rows[1:])
    assert "<svg" in (epath.Path(OUT) / "sweep.html").read_text()
    # Optuna's own record is there too: six trials with the values that the runs reached.
    journal = sorted(n for n in store.objects if "/optuna/" in n)
    # Null: a suggestion that was asked for and not yet written down at the kill counts as failed.
    entries = [json.loads(store.objects[n]) for n in journal]
    values = [e["values"] for e in entries if e.get("values") is not None]
    quality = [o["task.quality"] for o in names().values()]
    assert sorted(v for (v,) in values) == pytest.approx(
        [q * (1 - 0.5**10) for q in sorted(quality)]
    )
    log = epath.Path(OUT) / "logs"
    assert len(list(log.iterdir())) == 6
    assert CONFIG in Folder(OUT).manifest().config


@pytest.fixture
def alone():
    yield fake_store.reset()


def test_a_second_scheduler_is_refused_while_the_first_gives_signs_of_life(alone, monkeypatch):
    monkeypatch.setattr(folder, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(claim, "_LOOK_SECONDS", 0.05)
    place = Folder(OUT)
    with claim.claimed(place):
        with (
            pytest.raises(UserError, match=f"in use by process {os.getpid()} on"),
            claim.claimed(place),
        ):
            pass
    assert json.loads((place.path / "scheduler.json").read_text())["ended"]
    with claim.claimed(place):  # the first has ended
        pass
    # One of another machine that stopped without a word is waited for, then taken over.
    elsewhere = processes.Process(1, "then", "another-machine").record()
    folder.write_json(
        place.path / "scheduler.json", {"process": elsewhere, "beat": 3, "ended": False}
    )
    with claim.claimed(place):
        assert (
            json.loads((place.path / "scheduler.json").read_text())["process"]["pid"] == os.getpid()
        )

    beats = iter(range(1000))
    monkeypatch.setattr(
        folder, "read_json",
        lambda path: {"process": elsewhere, "beat": next(beats), "ended": False},
    )  # fmt: skip
    with pytest.raises(UserError, match="in use by process 1 on another-machine; stop it first"):
        with claim.claimed(place):
            pass
