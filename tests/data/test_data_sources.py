"""Folders, TFDS data sets, scanned sizes: what is read, and what is said when it cannot be."""

import io
import pathlib
import pickle

import fake_store
import numpy as np
import pytest
from PIL import Image

from dcae_jax import config
from dcae_jax.data import sources
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import FolderConfig, MixtureConfig, MixturePart, PhotosConfig, TfdsConfig
from dcae_jax.errors import UserError


def test_class_folders_are_sorted_classes(image_folder: pathlib.Path) -> None:
    source = FolderConfig(str(image_folder)).build("train")
    assert source.classes == ("apple", "pear") and len(source) == 20
    assert [source[i].label for i in (0, 9, 10, 19)] == [0, 0, 1, 1]
    assert source[0].name == "apple/0.png"
    assert source[0].image == (image_folder / "apple/0.png").read_bytes()


def test_flat_and_mixed_folders_have_no_classes(image_folder: pathlib.Path, caplog) -> None:
    flat = FolderConfig(str(image_folder / "pear")).build("train")
    assert flat.classes == () and len(flat) == 10 and flat[3].label == 0
    Image.new("RGB", (9, 9)).save(image_folder / "beside.png")
    mixed = FolderConfig(str(image_folder)).build("train")
    assert mixed.classes == () and len(mixed) == 21
    assert "20 of 21 images lie in subfolders" in caplog.text


def test_other_files_and_hidden_ones_are_not_images(image_folder: pathlib.Path) -> None:
    for name in (".hidden.png", "notes.txt", "apple/.DS_Store"):
        (image_folder / name).write_text("x")
    (image_folder / "apple" / "UPPER.JPEG").write_text("x")
    names = sources.list_images(sources.epath.Path(image_folder))
    assert len(names) == 21 and "apple/UPPER.JPEG" in names


def test_split_folders(image_folder: pathlib.Path) -> None:
    (image_folder / "apple").rename(image_folder / "train")
    (image_folder / "pear").rename(image_folder / "val")
    assert len(FolderConfig(str(image_folder)).build("train")) == 10
    assert FolderConfig(str(image_folder)).build("validation")[0].name == "0.png"
    with pytest.raises(UserError, match=r"no folder for split 'test'; it has: train, val"):
        FolderConfig(str(image_folder)).build("test")


def test_holdout_splits_by_name_without_overlap(image_folder: pathlib.Path) -> None:
    cfg = FolderConfig(str(image_folder), holdout=0.3)
    names = [
        {source[i].name for i in range(len(source))}
        for source in (cfg.build("train"), cfg.build("test"))
    ]
    assert names[0] | names[1] == set(sources.list_images(sources.epath.Path(image_folder)))
    assert not names[0] & names[1] and 1 <= len(names[1]) <= 12  # 6 expected of 20
    with pytest.raises(UserError, match=r"holdout=0.05"):
        FolderConfig(str(image_folder)).build("test")


def test_paths_with_spaces_and_a_home(image_folder: pathlib.Path, monkeypatch) -> None:
    spaced = image_folder.rename(image_folder.parent / "my own images")
    assert len(FolderConfig(str(spaced)).build("train")) == 20
    monkeypatch.setenv("HOME", str(spaced.parent))
    assert len(FolderConfig("~/my own images").build("train")) == 20


def test_folder_mistakes(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.* is not a folder"):
        FolderConfig(str(tmp_path / "nowhere")).build("train")
    with pytest.raises(UserError, match=r"holds no image for split 'train'.*\.png"):
        FolderConfig(str(tmp_path)).build("train")


def test_sizes_are_scanned_once(image_folder: pathlib.Path, monkeypatch) -> None:
    (image_folder / "apple" / "bad.png").write_text("no image")
    source = FolderConfig(str(image_folder)).build("train")
    first = sources.sizes(source)
    assert first[:3].tolist() == [[40, 50], [41, 50], [42, 50]]
    assert first[10].tolist() == [0, 0]  # apple/bad.png
    monkeypatch.setattr(sources, "_scan_sizes", lambda source: pytest.fail("scanned again"))
    np.testing.assert_array_equal(sources.sizes(source), first)


def test_unwritable_cache_is_a_warning(image_folder: pathlib.Path, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    source = FolderConfig(str(image_folder)).build("train")
    assert len(sources.sizes(source, str(tmp_path / "file"))) == 20
    assert "not kept" in caplog.text


def test_sources_are_picklable(image_folder: pathlib.Path) -> None:
    source = pickle.loads(pickle.dumps(FolderConfig(str(image_folder)).build("train")))
    assert source[3].name == "apple/3.png"
    photographs = pickle.loads(pickle.dumps(sources.PhotosConfig().build("test")))
    assert photographs[0].name == "astronaut/test"


def test_tfds_mistakes(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"no prepared data set 'imagenet2012'(?s:.*)tfds build"):
        TfdsConfig(name="imagenet2012", data_dir=str(tmp_path)).build("train")
    with pytest.raises(UserError, match=r"dataset_info.json is missing"):
        TfdsConfig(directory=str(tmp_path)).build("train")
    assert TfdsConfig().problems() and TfdsConfig(name="a", directory="b").problems()
    prepared = sources.PhotosConfig().build("train")._all._arguments[0]
    with pytest.raises(UserError, match=r"split 'validation' does not exist.*has: test, train"):
        TfdsConfig(directory=prepared).build("validation")
    with pytest.raises(UserError, match=r"no feature 'picture'|no feature picture.*image, label"):
        TfdsConfig(directory=prepared, image_key="picture").build("train")


def test_tfrecord_data_set_says_how_to_prepare(tmp_path: pathlib.Path) -> None:
    prepared = pathlib.Path(sources.PhotosConfig().build("train")._all._arguments[0])
    for path in prepared.iterdir():
        text = path.read_bytes()
        if path.name == "dataset_info.json":
            text = text.replace(b'"array_record"', b'"tfrecord"')
        (tmp_path / path.name.replace("array_record", "tfrecord")).write_bytes(text)
    with pytest.raises(UserError, match=r"prepared as tfrecord.*file_format=array_record"):
        TfdsConfig(directory=str(tmp_path)).build("train")


def test_tfds_slices_and_names(tmp_path: pathlib.Path) -> None:
    prepared = pathlib.Path(sources.PhotosConfig().build("train")._all._arguments[0])
    whole = TfdsConfig(directory=str(prepared)).build("train")
    half = TfdsConfig(directory=str(prepared)).build("train[50%:]")
    assert len(half) == 4 and half[0].name == whole[4].name
    assert half.fingerprint() != whole.fingerprint()
    by_name = TfdsConfig(name="dcae_photos", data_dir=str(prepared.parents[1])).build("train")
    assert by_name.fingerprint() == whole.fingerprint()
    unlabelled = TfdsConfig(directory=str(prepared), label_key="").build("train")
    assert unlabelled[5].label == 0 and unlabelled.classes == ()


def test_folder_on_an_object_store() -> None:
    store = fake_store.reset()
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (1, 2, 3)).save(buffer, format="PNG")
    for name in ("b/0.png", "a/1.png", "a/0.png"):
        store.put(f"/fake/bucket/set/train/{name}", buffer.getvalue())
    source = FolderConfig("fake://bucket/set").build("train")
    assert source.classes == ("a", "b") and [source[i].name for i in range(3)] == [
        "a/0.png", "a/1.png", "b/0.png",
    ]  # fmt: skip
    assert source[2].label == 1 and source.size(0) == (10, 20)
    assert len(source.fingerprint()) == 16


def test_configs_survive_json_and_flags(tmp_path: pathlib.Path) -> None:
    """A mixture inside a run's config: written, read back, and overridden from the command line."""
    parts = (MixturePart(TfdsConfig(directory="x"), 0.9, 256), MixturePart(PhotosConfig(512)))
    cfg = config.RunConfig(data=DataConfig(MixtureConfig(parts), transform=Transform.center_crop))
    assert config.from_json(config.to_json(cfg)).data == cfg.data
