"""Adaptive search: what Optuna is asked and told, pruning, and what a kill leaves behind."""

import sqlite3

import fake_store
import optuna
import pytest
from etils import epath
from sweeping import kill, wait_for

from dcae_jax.errors import UserError
from dcae_jax.score_names import Better
from dcae_jax.sweeps import definition, folder, search
from dcae_jax.sweeps.definition import Base
from dcae_jax.sweeps.folder import Folder, Manifest, Record, Start, State
from dcae_jax.sweeps.processes import Process
from dcae_jax.sweeps.results import Metric

BASE = Base("tests/sweeps/fake_config.py", ("--config.task.exits=()",))
PSNR = Metric("held-out/psnr", Better.higher)
COMPLETE, FAIL, PRUNED = (
    optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL, optuna.trial.TrialState.PRUNED,
)  # fmt: skip


def manifest():
    return Manifest(config=BASE.config, overrides=[], sweeps=[], base={}, trials={}, search=True)


def opened(place, found=None, count=20, storage="", prune=True):
    return search.Search(BASE, Folder(str(place)), found or manifest(), PSNR, count, storage, prune)


def ended(place, name, state, value=None):
    """What scheduler and run leave of a trial."""
    here, end = Folder(str(place)), Process(1, "then", "host")
    record = Record(name, {}, state, [Start(1, 0, end, 0.0)])
    here.write_record(record)
    if value is not None:
        scores = {"steps": 10, "evals": {"after": {"held-out": {"psnr": value}}}}
        folder.write_json(here.workdir(name) / "summary.json", scores)
    return record


def test_optuna_gets_the_value_that_a_run_reached(tmp_path):
    made = opened(tmp_path)
    names = [made.ask()[0].name for _ in range(4)]
    made.tell(ended(tmp_path, names[0], State.done, 2.5))
    made.tell(ended(tmp_path, names[1], State.failed))
    made.tell(ended(tmp_path, names[2], State.done, float("nan")))
    made.tell(ended(tmp_path, names[3], State.pruned))
    study = optuna.load_study(
        study_name=str(tmp_path),
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.journal"))
        ),
    )
    assert [t.state for t in study.trials] == [COMPLETE, FAIL, FAIL, PRUNED]
    assert study.best_value == 2.5
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE


def test_what_a_killed_scheduler_left_is_settled(tmp_path):
    found = manifest()
    made = opened(tmp_path, found)
    first, second = made.ask()[0].name, made.ask()[0].name
    ended(tmp_path, first, State.done, 3.0)  # it had no time to tell this one
    lost = made._study.ask()  # nor to write this one down
    found = Folder(str(tmp_path)).manifest()
    again = opened(tmp_path, found)
    trials = again._study.trials
    assert trials[0].value == 3.0 and trials[lost.number].state is FAIL
    assert not trials[1].state.is_finished() and found.numbers[second] == 1
    # Not the same suggestions as after the first start.
    assert again.ask()[0].name not in (first, second)


def test_a_suggestion_that_was_there_or_is_not_valid_is_not_run(tmp_path, capsys):
    (tmp_path / "config.py").write_text(
        "from tests.sweeps.fake_config import get_config\n"
        "def search(trial):\n"
        "    return {'task.quality': trial.suggest_categorical('q', [1.0, 2.0, 1000.0])}\n"
    )
    base = Base(str(tmp_path / "config.py"))
    made = search.Search(base, Folder(str(tmp_path)), manifest(), PSNR, 10, "", True)
    names = []
    while (asked := made.ask()) is not None:
        names.append(asked[0].name)
        made.tell(ended(tmp_path, asked[0].name, State.done, float(len(names))))
    assert sorted(names) == ["quality=1", "quality=2"]
    out = capsys.readouterr().out
    assert "is not valid and left out" in out and "task.quality = 1000.0 is above 100" in out
    assert "the search ends: 20 suggestions in a row were no new valid trial" in out
    values = {t.params["q"]: t.value for t in made._study.trials if t.value is not None}
    assert len(values) == 2  # the same suggestion again has the same value
    with pytest.raises(UserError, match=r"task.quality = 1000.0 is above 100"):
        definition.check(base, search.probes(base))


def test_the_journal_in_a_store_is_the_one_that_optuna_would_keep():
    fake_store.reset().listing_lag = 3
    path = epath.Path("fake://bucket/journal")
    study = optuna.create_study(storage=optuna.storages.JournalStorage(search._StoreJournal(path)))
    plain = optuna.create_study()
    for made in (study, plain):
        made.sampler = optuna.samplers.RandomSampler(seed=1)
        made.optimize(lambda t: t.suggest_float("x", -1, 1) ** 2, n_trials=5)
    again = optuna.load_study(
        study_name=study.study_name,
        storage=optuna.storages.JournalStorage(search._StoreJournal(path)),
    )
    assert [t.params for t in again.trials] == [t.params for t in plain.trials]
    assert again.best_value == plain.best_value
    again.optimize(lambda t: t.suggest_float("x", -1, 1) ** 2, n_trials=1)
    assert len(again.trials) == 6


def test_mistakes_of_a_search(checkout, monkeypatch):
    demo = "configs/folder.py"
    with pytest.raises(
        UserError, match=r"configs/folder.py has no search\(trial\); write for exam"
    ):
        search.suggested(Base(demo), optuna.create_study().ask())
    for options, message in (
        (("--search", "--metric=psnr"), "--search needs --trials=N"),
        (("--search", "--trials=2"), "no metric to compare trials by"),
        (("--search", "--trials=2", "--sweep=lr"), "--search and --sweep exclude each other"),
        (("--trials=2",), "--trials and --storage belong to --search"),
    ):
        code, text = checkout.here(*options)
        assert code == 2 and message in text
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"--search needs the package optuna .*pip install"):
        search.optuna()


@pytest.mark.multiprocess
def test_bad_trials_are_pruned_and_a_killed_search_goes_on_in_sqlite(checkout):
    database = checkout.path / "optuna.db"
    options = (
        "--search", "--trials=8", "--metric=psnr", "--slots=2", f"--storage=sqlite:///{database}",
    )  # fmt: skip
    sweep = checkout.start(*options, FAKE_BAD_FROM=6)
    wait_for(lambda: checkout.count("done") >= 3, "three are done")
    kill(sweep.pid)
    sweep.wait()
    code, text = checkout.run(*options, FAKE_BAD_FROM=6)
    assert code == 0, text
    rows = checkout.rows()
    states = [row["state"] for row in rows.values()]
    assert len(rows) == 8 and states.count("done") >= 6 and states.count("pruned") >= 1
    for trial, row in rows.items():
        assert len(checkout.starts(trial)) == 1
        if row["state"] == "pruned":
            assert row["exit_code"] == "42" and int(row["step"]) < 10
    found = sqlite3.connect(database).execute("select state from trials").fetchall()
    assert [s for (s,) in found].count("PRUNED") == states.count("pruned")
    best = max(rows.values(), key=lambda row: float(row["held-out/psnr"]))
    assert f"best by held-out/psnr (higher is better): {best['trial']}" in text
