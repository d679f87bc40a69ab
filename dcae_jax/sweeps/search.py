"""Adaptive search: a config's `search(trial)` suggests trials through Optuna, one after another.

    def search(trial): return {"optim.lr": trial.suggest_float("lr", 1e-5, 1e-3, log=True)}

Optuna's own record (a journal file, SQLite, or objects in a store) is its memory; which trials
there are, and what became of them, is in the sweep's folder.
"""

import fcntl
import json
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

from etils import epath

from dcae_jax.config import RunConfig
from dcae_jax.errors import UserError
from dcae_jax.score_names import Better
from dcae_jax.sweeps import definition, folder, results
from dcae_jax.sweeps.definition import Base, Overrides, Trial
from dcae_jax.sweeps.folder import Folder, Manifest, Record, State
from dcae_jax.sweeps.results import Metric

_PROBES = 8  # random suggestions that are checked before the first trial starts
_IN_A_ROW = 20  # suggestions that are of no use, before the search ends
_MIN_FOR_PRUNING = 5  # trials that end before others are compared with them (Optuna's default)


def optuna() -> Any:
    """The package, quiet; UserError if it is not installed."""
    try:
        import optuna as package
    except ImportError as e:
        raise UserError(
            f"--search needs the package optuna ({e}): install it with `pip install 'optuna>=5'`; "
            "it is in requirements-dev.txt"
        ) from e
    package.logging.set_verbosity(package.logging.WARNING)
    warnings.filterwarnings("ignore", category=package.exceptions.ExperimentalWarning)
    return package


def suggested(base: Base, trial: Any) -> Overrides:
    """What the config's `search` makes of one trial of Optuna."""
    module = base.module()
    if not hasattr(module, "search"):
        raise UserError(
            f"{base.config.partition(':')[0]} has no search(trial); write for example\n"
            "  def search(trial):\n"
            '      return {"optim.lr": trial.suggest_float("lr", 1e-5, 1e-3, log=True)}'
        )
    return definition.from_search(module.search(trial), base)


def probes(base: Base) -> list[Trial]:
    """Some random suggestions, which are kept nowhere: all of them must be valid trials."""
    package = optuna()
    study = package.create_study(sampler=package.samplers.RandomSampler(seed=0))
    found = [suggested(base, study.ask()) for _ in range(_PROBES)]
    return definition.named([o for i, o in enumerate(found) if o not in found[:i]], {})


# ---------------------------------------------------------------------------------------- storage


class _StoreJournal:
    """Optuna's journal in an object store: an object for each entry, read by name.

    There is one writer (see `claim.py`).  The interface is optuna's BaseJournalBackend.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._count = sum(1 for _ in self.read_logs(0))

    def _file(self, number: int) -> epath.Path:
        return self._path / f"{number:06d}.json"

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """All entries from a number on."""
        number = log_number_from
        while (entry := folder.read_json(self._file(number))) is not None:
            yield entry
            number += 1

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes one object for each."""
        for log in logs:
            folder.write_json(self._file(self._count), json.loads(json.dumps(log)))
            self._count += 1


class _Lock:
    """Of a journal file: unlike Optuna's own ones it dies with its process."""

    def __init__(self, path: str) -> None:
        self._path, self._handle = f"{path}.lock", -1

    def acquire(self) -> bool:
        """Waits for the lock."""
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Gives it back."""
        os.close(self._handle)


def _storage(place: Folder, given: str) -> Any:
    """What `--storage` names: a database, a journal file; by default a journal in the folder."""
    package = optuna()
    if "://" in given and not given.startswith(("gs://", "s3://")):
        return package.storages.RDBStorage(given)
    if given or not place.remote:
        path = given or os.fspath(place.path / "optuna.journal")
        if "://" in path:
            raise UserError(f"--storage={path}: a journal file is local; leave --storage out")
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        file = package.storages.journal.JournalFileBackend(path, lock_obj=_Lock(path))
        return package.storages.JournalStorage(file)
    return package.storages.JournalStorage(_StoreJournal(place.path / "optuna"))


# ----------------------------------------------------------------------------------------- search


class Search:
    """Asks Optuna for trials, tells it what they reached, and ends those that fall behind."""

    def __init__(
        self, base: Base, place: Folder, manifest: Manifest, by: Metric, count: int,
        storage: str, prune: bool,
    ) -> None:  # fmt: skip
        self._base, self._folder, self._manifest, self._by = base, place, manifest, by
        self.count = count  # of trials, those of earlier starts included
        package = self._optuna = optuna()
        way = "maximize" if by.better is Better.higher else "minimize"
        pruner = package.pruners.MedianPruner(n_startup_trials=_MIN_FOR_PRUNING)
        self._study = package.create_study(
            storage=_storage(place, storage), study_name=str(place.path), direction=way,
            pruner=pruner if prune else package.pruners.NopPruner(), load_if_exists=True,
        )  # fmt: skip
        # Another seed at each start, or the same suggestions would come again.
        seed = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = package.samplers.TPESampler(seed=seed, constant_liar=True)
        self.ended = ""  # why no more trials come, where it is not their number
        self._settle()

    def _settle(self) -> None:
        """What a killed scheduler could not tell Optuna any more."""
        known = {number: name for name, number in self._manifest.numbers.items()}
        waiting = self._optuna.trial.TrialState.RUNNING
        for trial in self._study.get_trials(deepcopy=False, states=(waiting,)):
            name = known.get(trial.number)
            if name is None:  # asked for, and never written down
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
                continue
            record = self._folder.record(name, self._manifest.trials[name])
            if record.state.ended:
                self.tell(record)

    def ask(self) -> tuple[Trial, int, int] | None:
        """The next trial with its number and its steps; None if there is none."""
        for _ in range(_IN_A_ROW):
            if self.ended or len(self._manifest.trials) >= self.count:
                return None
            asked = self._study.ask()
            overrides = suggested(self._base, asked)
            (trial,) = definition.named([overrides], self._manifest.trials)
            if trial.name in self._manifest.trials:
                self._again(asked.number, trial)
                continue
            try:
                cfg = definition.check(self._base, [trial])[trial.name]
            except UserError as e:
                print(f"suggestion {asked.number} is not valid and left out: {e}", flush=True)
                self._study.tell(asked.number, state=self._optuna.trial.TrialState.FAIL)
                continue
            return self._kept(trial, asked.number, cfg)
        self.ended = f"the search ends: {_IN_A_ROW} suggestions in a row were no new valid trial"
        print(self.ended, flush=True)
        return None

    def _kept(self, trial: Trial, number: int, cfg: RunConfig) -> tuple[Trial, int, int]:
        self._manifest.trials[trial.name] = trial.overrides
        self._manifest.numbers[trial.name] = number
        self._folder.write_manifest(self._manifest)
        return trial, number, cfg.steps

    def _again(self, number: int, trial: Trial) -> None:
        """The same trial a second time: its score is known, or soon will be."""
        record = self._folder.record(trial.name, trial.overrides)
        value = self._value(record) if record.state is State.done else None
        self._finish(number, value)

    def _value(self, record: Record) -> float | None:
        (found,) = results.read(self._folder, [record])
        value = found.scores.get(self._by.name, math.nan)
        return float(value) if math.isfinite(value) else None

    def _finish(self, number: int, value: float | None) -> None:
        failed = self._optuna.trial.TrialState.FAIL
        if value is None:
            self._study.tell(number, state=failed)
        else:
            self._study.tell(number, value)

    def tell(self, record: Record) -> None:
        """What became of a trial."""
        number = self._manifest.numbers[record.name]
        pruned = self._optuna.trial.TrialState.PRUNED
        if self._state(number).is_finished():
            return
        self._report(record)
        if record.state is State.pruned:
            self._study.tell(number, state=pruned)
            return
        value = self._value(record) if record.state is State.done else None
        if value is None and record.state is State.done:
            print(f"{record.name}: no finite {self._by.name}; it counts as failed in the search")
        self._finish(number, value)

    def _state(self, number: int) -> Any:
        return self._study.get_trials(deepcopy=False)[number].state

    def stop_early(self, record: Record) -> bool:
        """Whether a running trial is behind the others at the same step."""
        trial = self._report(record)
        return trial is not None and trial.should_prune()

    def _report(self, record: Record) -> Any:
        """Gives Optuna the values that are new; its trial, None if there is no value at all."""
        number = self._manifest.numbers[record.name]
        frozen = self._study.get_trials(deepcopy=False)[number]
        trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
        curve = results.curve(self._folder, record.name, self._by.name)
        finite = [(step, value) for step, value in curve if math.isfinite(value)]
        for step, value in finite:
            if step not in frozen.intermediate_values:
                trial.report(value, step)
        return trial if finite else None
