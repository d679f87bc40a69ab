"""The live comparison with PyTorch: both in one process, and a table of what was measured.

Not part of `make test`, for it needs torch and diffusers: `make parity` installs and runs it.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

try:
    import torch
except ModuleNotFoundError:
    pytest.exit("tests/parity/live compares with PyTorch, which is not here; run `make parity`", 4)

sys.path.insert(0, str(Path(__file__).parents[1]))
import metric_packages
from original import relative_error

metric_packages.prepare()

jax.config.update("jax_default_matmul_precision", "highest")
torch.set_num_threads(min(4, os.cpu_count() or 1))


class Row(NamedTuple):
    """One comparison: what was compared, its error and the largest that is allowed."""

    model: str
    size: str
    value: str
    error: float
    limit: float


ROWS = pytest.StashKey[list[Row]]()


class Compare:
    """Compares pairs (ours, PyTorch's), keeps the errors for the table, and names what fails."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __call__(
        self, model: str, size: str, limit: float, **pairs: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """All pairs are compared before the first failure is reported."""
        self.report(model, size, limit, {k: relative_error(*pair) for k, pair in pairs.items()})

    def report(self, model: str, size: str, limit: float, errors: Mapping[str, float]) -> None:
        """The same for errors that are already known."""
        rows = [Row(model, size, value, error, limit) for value, error in errors.items()]
        self.rows += rows
        failed = [r for r in rows if not r.error <= r.limit]
        assert not failed, "\n".join(
            f"{r.model} at {r.size}: the {r.value} differs from PyTorch's by {r.error:.3g} "
            f"(max |a - b| / max |b|), more than {r.limit:g}"
            for r in failed
        )

    def tree(
        self, model: str, size: str, limit: float, value: str,
        ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray],
    ) -> None:  # fmt: skip
        """Every tensor of two dictionaries; the table gets the worst, a failure names them all."""
        missing = sorted(ours.keys() ^ theirs.keys())
        assert not missing, f"{model} at {size}: {value} exists on one side only: {missing}"
        errors = {key: relative_error(ours[key], theirs[key]) for key in theirs}
        worst = max(errors, key=lambda k: errors[k])
        failed = {f"{value} {k}": e for k, e in errors.items() if not e <= limit}
        if failed:
            self.report(model, size, limit, failed)
        self.rows.append(Row(model, size, f"{value} ({len(errors)} tensors)", errors[worst], limit))


def pytest_configure(config: pytest.Config) -> None:
    """Makes room for the table."""
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def compare(request: pytest.FixtureRequest) -> Compare:
    """The comparison that writes into the table."""
    return Compare(request.config.stash[ROWS])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of all comparisons."""
    rows = config.stash[ROWS]
    if not rows:
        return
    widths = [max(len(str(r[i])) for r in rows) for i in range(3)]
    terminalreporter.section("largest difference from PyTorch, max |a - b| / max |b|, float32")
    for row in rows:
        names = "  ".join(str(row[i]).ljust(widths[i]) for i in range(3))
        terminalreporter.write_line(f"{names}  {row.error:8.2g}  (limit {row.limit:g})")
