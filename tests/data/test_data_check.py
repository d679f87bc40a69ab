"""data-check: what it counts, what it prints, and its exit code, through the real command."""

import pathlib
import subprocess
import sys

import pytest

from dcae_jax.cli import data_check
from dcae_jax.data import pipeline
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import FolderConfig, MixtureConfig, MixturePart

CONFIG = """
from dcae_jax.config import RunConfig
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.data.sources import FolderConfig

def get_config(path: str) -> RunConfig:
    return RunConfig(batch=4, data=DataConfig(FolderConfig(path), resolution=32))
"""


@pytest.fixture
def spoilt(image_folder: pathlib.Path) -> pathlib.Path:
    (image_folder / "apple" / "3.png").write_text("no image")
    (image_folder / "pear" / "4.png").write_bytes(b"")
    (image_folder / "pear" / "9.png").write_bytes((image_folder / "apple" / "9.png").read_bytes())
    return image_folder


def test_findings(spoilt: pathlib.Path) -> None:
    (found,) = data_check.check(
        DataConfig(FolderConfig(str(spoilt)), resolution=32), duplicates=True
    )
    assert found.records == 20 and len(found.sizes) == 18
    assert dict(found.bad) == {"apple/3.png": "not an image (8 bytes)", "pear/4.png": "empty"}
    assert found.labels == {0: 9, 1: 9}
    assert found.duplicates == [("pear/9.png", "apple/9.png")]
    text = data_check.table(found, DataConfig(resolution=32))
    for line in (
        "20 records, 2 bad", "shorter side  min 40, median 45, max 49 px", "0..63        18 ###",
        "2 classes (0..1), records per class: min 9, median 9, max 9", "pear/9.png = apple/9.png",
        "apple/3.png: not an image (8 bytes)",
    ):  # fmt: skip
        assert line in text, text


def test_images_smaller_than_the_crop_are_found(image_folder: pathlib.Path) -> None:
    cfg = DataConfig(FolderConfig(str(image_folder)), resolution=45)
    (found,) = data_check.check(cfg)
    assert len(found.bad) == 10 and found.bad[0] == ("apple/0.png", "smaller than the crop (50x40)")
    cfg.min_size = 45  # left out before training: not bad
    (found,) = data_check.check(cfg)
    assert found.bad == [] and "10 below data.min_size=45" in data_check.table(found, cfg)
    cfg.min_size, cfg.transform = 0, Transform.center_crop  # resizes
    assert data_check.check(cfg)[0].bad == []


def test_limit_is_spread_and_mixtures_are_checked_apart(image_folder: pathlib.Path) -> None:
    part = MixturePart(FolderConfig(str(image_folder)))
    cfg = DataConfig(MixtureConfig((part, part)), resolution=32)
    checks = data_check.check(cfg, limit=4)
    assert [c.name for c in checks] == ["images#0", "images#1"]
    assert checks[0].labels == {0: 2, 1: 2}


def test_speed_is_measured_on_the_pipeline(image_folder: pathlib.Path) -> None:
    cfg = DataConfig(FolderConfig(str(image_folder)), resolution=32)
    assert "images/s (random_crop to 32 px, batch 4, 4 threads" in data_check.speed(cfg, 4, 0, 0.05)


@pytest.mark.multiprocess
def test_command_and_exit_codes(spoilt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "own.py").write_text(CONFIG)

    def run(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "dcae_jax", "data-check"]
        return subprocess.run(
            [*command, f"--config={tmp_path}/own.py:{spoilt}", *options],
            cwd=pathlib.Path(pipeline.__file__).parents[2], capture_output=True, text=True,
        )  # fmt: skip

    bad = run()
    assert bad.returncode == 1 and "20 records, 2 bad" in bad.stdout
    assert "2 of 20 records are bad (10.00%)" in bad.stderr
    good = run("--config.data.max_bad_fraction=0.2", "--seconds=0.2")
    assert good.returncode == 0 and "images/s" in good.stdout, good.stderr
    wrong = run("--config.data.source.pth=x")
    assert wrong.returncode == 2 and "path" in wrong.stderr and "Traceback" not in wrong.stderr
    missing = run("--config.data.source.path=/nowhere")
    assert missing.returncode == 2 and "is not a folder" in missing.stderr
