"""The built-in photographs: prepared without network or TensorFlow, split without leakage."""

import importlib.util
import socket
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from dcae_jax.data import photos, pipeline, sources, transforms
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.data.sources import PhotosConfig, TfdsSource
from dcae_jax.errors import UserError


def all_regions() -> dict[str, dict[str, tuple[photos.Box, np.ndarray]]]:
    """photograph -> split -> (rectangle, pixels) as stored."""
    directory = str(photos.prepare(sources.cache_root()))
    found: dict[str, dict] = {}
    for split in ("train", "test"):
        source = TfdsSource(directory, split, "image", "label")
        for i, box in enumerate(source.column("box")):
            record = source[i]
            pixels = transforms.decode(record.image, record.name)
            found.setdefault(source.classes[record.label], {})[split] = (photos.Box(*box), pixels)
    return found


def test_no_test_pixel_is_in_the_train_split() -> None:
    """Puts the regions back together: they cover each photograph once, with its own pixels."""
    regions = all_regions()
    assert set(regions) == {photo.name for photo in photos.PHOTOS}
    for photo in photos.PHOTOS:
        original = transforms.decode(photos.locate(photo).read_bytes(), photo.name)
        covered = np.zeros(original.shape[:2], int)
        for box, pixels in regions[photo.name].values():
            box.cut(covered)[...] += 1
            np.testing.assert_array_equal(pixels, box.cut(original))
        assert (covered == 1).all(), photo.name


def test_strips_are_as_wide_as_the_crops() -> None:
    for name, regions in all_regions().items():
        box = regions["test"][0]
        full = max(box.width + box.left, box.height + box.top)
        assert min(box.width, box.height) >= (256 if full >= 512 else 128), name


@pytest.mark.parametrize(
    ("shape", "train", "test"),
    [
        ((512, 512), (0, 0, 512, 256), (0, 256, 512, 256)),
        ((300, 451), (0, 0, 300, 323), (0, 323, 300, 128)),
        ((700, 400), (0, 0, 444, 400), (444, 0, 256, 400)),
    ],
)
def test_regions(shape: tuple[int, int], train: tuple, test: tuple) -> None:
    assert photos.regions(*shape) == {"train": train, "test": test}


def test_high_resolution_uses_large_photographs_only() -> None:
    for split in ("train", "test"):
        source = PhotosConfig(min_photo_side=512).build(split)
        names = {source[i].name.split("/")[0] for i in range(len(source))}
        assert len(names) == 7 and "chelsea" not in names  # 451 px
        assert sources.sizes(source).min() >= 256
    cfg = DataConfig(PhotosConfig(min_photo_side=512), split="test", resolution=256)
    with pipeline.eval_batches(cfg, batch=7, n=7) as batches:
        assert next(batches)["image"].shape == (7, 256, 256, 3)


def test_missing_photograph_is_named_and_left_out(tmp_path, monkeypatch, caplog) -> None:
    find = photos.locate
    monkeypatch.setattr(photos, "locate", lambda p: None if p.name == "coffee" else find(p))
    directory = photos.prepare(epath.Path(tmp_path))
    assert "coffee" in caplog.text and "skimage" in caplog.text
    source = TfdsSource(str(directory), "train", "image", "label")
    labels = [source[i].label for i in range(len(source))]
    assert len(source) == 7 and source.classes.index("coffee") not in labels
    assert labels[-1] == 7  # the others keep their numbers


def test_none_installed_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image scikit-learn"):
        photos.available()


def test_prepares_without_network(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert (photos.prepare(epath.Path(tmp_path)) / "dataset_info.json").exists()
    assert "tensorflow" not in sys.modules


def test_attribution_is_in_the_prepared_info() -> None:
    text = (photos.prepare(sources.cache_root()) / "dataset_info.json").read_text()
    for photo in photos.PHOTOS:
        assert photo.url in text and photo.license.split(" (")[0] in text
    assert len({photo.name for photo in photos.PHOTOS}) == 8


@pytest.mark.multiprocess
def test_three_processes_prepare_at_once(tmp_path) -> None:
    code = (
        "import sys; from etils import epath; from dcae_jax.data import photos\n"
        "print(photos.prepare(epath.Path(sys.argv[1])))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert [path.name[:7] for path in tmp_path.iterdir()] == ["photos-"]  # no leftovers
    assert len(TfdsSource(outputs[0], "train", "image", "label")) == 8


def test_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="DCAE_JAX_DATA"):
        photos.prepare(epath.Path(tmp_path / "file"))
