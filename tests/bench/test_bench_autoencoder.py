"""The autoencoder benchmark: alternates its sides, reports their ratio, and has a command."""

import pytest

from dcae_jax.bench import autoencoder
from dcae_jax.cli import bench
from dcae_jax.errors import UserError


def test_sides_alternate_and_the_ratio_is_second_over_first() -> None:
    calls: list[str] = []
    sides = {"auto": lambda: calls.append("auto"), "lax": lambda: calls.append("lax")}
    times = autoencoder.alternate(sides, rounds=2)
    assert calls == ["auto", "lax"] * 3 and [len(t) for t in times.values()] == [2, 2]
    line = autoencoder.report("train", {"auto": [0.2, 0.1], "lax": [0.3, 0.25]})
    assert line.endswith("auto 100.0 ms (median 150.0), lax 250.0 ms (median 275.0): 2.50 x")


@pytest.mark.parametrize("name", ["narrow", "demo"])
def test_models_are_valid(name: str) -> None:
    assert autoencoder.model_config(name).problems() == []


def test_command_lists_and_checks_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert "autoencoder" in capsys.readouterr().out
    with pytest.raises(UserError, match="choose one of autoencoder"):
        bench.main(["autoencodr"])
