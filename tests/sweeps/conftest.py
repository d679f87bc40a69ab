"""The checkout of the tests of sweeps."""

import pytest
import sweeping


@pytest.fixture
def checkout(tmp_path):
    made = sweeping.Checkout(tmp_path)
    yield made
    made.stop_all()
