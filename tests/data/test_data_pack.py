"""pack: what goes in comes out of TFDS; killed and repeated, the same bytes; refusals."""

import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import fake_store
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from dcae_jax.cli import pack
from dcae_jax.data import pipeline, sources, transforms
from dcae_jax.data.sources import FolderConfig, TfdsConfig
from dcae_jax.errors import UserError


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def run(source: pathlib.Path, out: pathlib.Path, *options: str) -> None:
    assert pack.main(["--from", str(source), "--out", str(out), "--threads", "2", *options]) == 0


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


def jpeg(value: int, size: tuple[int, int] = (24, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, format="JPEG")
    return buffer.getvalue()


def test_round_trip(image_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Same pixels, labels and names through our reader and through TFDS's own decoding."""
    run(image_folder, tmp_path / "packed", "--shard-size", "0.001")
    before = FolderConfig(str(image_folder)).build("train")
    after = TfdsConfig(directory=str(tmp_path / "packed")).build("train")
    assert len(after) == len(before) == 20 and after.classes == before.classes
    assert [after[i] for i in range(20)] == [before[i] for i in range(20)]
    plain = tfds.builder_from_directory(tmp_path / "packed").as_data_source("train")
    for i in (0, 7, 19):
        np.testing.assert_array_equal(plain[i]["image"], transforms.decode(before[i].image, ""))
        assert plain[i]["label"] == before[i].label
    assert len(list((tmp_path / "packed").glob("*.array_record-*"))) > 1
    assert "tensorflow" not in sys.modules


def test_packed_sizes_are_used(image_folder, tmp_path, monkeypatch) -> None:
    run(image_folder, tmp_path / "packed")
    monkeypatch.setattr(sources, "_scan_sizes", lambda source: pytest.fail("scanned"))
    cfg = pipeline.DataConfig(
        TfdsConfig(directory=str(tmp_path / "packed")), resolution=45, min_size=45
    )
    assert pipeline.describe(cfg)["records"] == {"packed": 10}


def test_imagenet_tars(tmp_path: pathlib.Path) -> None:
    """A tar of class tars for training, a flat tar with a label file for validation, one output."""
    classes = {"n02": (1, 2), "n01": (3, 4, 5)}
    inner = {
        f"{name}.tar": tar_of({f"{name}_{v}.JPEG": jpeg(v) for v in values})
        for name, values in classes.items()
    }
    (tmp_path / "train.tar").write_bytes(tar_of(inner))
    (tmp_path / "val.tar").write_bytes(tar_of({"b.JPEG": jpeg(9), "a.JPEG": jpeg(8)}))
    (tmp_path / "labels.txt").write_text("n02\nn01\n")  # of a.JPEG, b.JPEG
    out = tmp_path / "imagenet"
    run(tmp_path / "train.tar", out)
    labels = ("--labels", str(tmp_path / "labels.txt"))
    run(tmp_path / "val.tar", out, "--split", "validation", *labels)
    train, val = (TfdsConfig(directory=str(out)).build(s) for s in ("train", "validation"))
    assert train.classes == val.classes == ("n01", "n02")
    assert [(r.name, r.label) for r in (train[i] for i in range(5))] == [
        ("n02/n02_1.JPEG", 1), ("n02/n02_2.JPEG", 1),
        ("n01/n01_3.JPEG", 0), ("n01/n01_4.JPEG", 0), ("n01/n01_5.JPEG", 0),
    ]  # fmt: skip
    assert [(val[i].name, val[i].label) for i in range(2)] == [("b.JPEG", 0), ("a.JPEG", 1)]
    assert train[4].image == jpeg(5) and val[0].image == jpeg(9)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.xz", "tar.bz2"])
def test_tars_with_folders_and_compression(tmp_path: pathlib.Path, suffix: str) -> None:
    mode = {"tar": "w", "tgz": "w:gz"}.get(suffix, f"w:{suffix[4:]}")
    files = {f"./top/{c}/{v}.jpg": jpeg(v) for c, v in (("cat", 1), ("dog", 2), ("cat", 3))}
    (tmp_path / f"set.{suffix}").write_bytes(tar_of(files | {"top/readme.txt": b"x"}, mode))
    run(tmp_path / f"set.{suffix}", tmp_path / "out")
    source = TfdsConfig(directory=str(tmp_path / "out")).build("train")
    assert source.classes == ("cat", "dog")
    assert [source[i] for i in range(3)] == [
        (jpeg(1), 0, "cat/1.jpg"), (jpeg(2), 1, "dog/2.jpg"), (jpeg(3), 0, "cat/3.jpg"),
    ]  # fmt: skip


def test_folder_of_tars_takes_their_names_as_classes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tars").mkdir()
    for name in ("zebra", "ant"):
        (tmp_path / "tars" / f"{name}.tar").write_bytes(tar_of({"0.jpg": jpeg(len(name))}))
    run(tmp_path / "tars", tmp_path / "out")
    source = TfdsConfig(directory=str(tmp_path / "out")).build("train")
    assert [source[i].name for i in range(2)] == ["ant/0.jpg", "zebra/0.jpg"]


def test_resize_min_shrinks_and_never_enlarges(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "large.jpg").write_bytes(jpeg(50, (200, 100)))
    (tmp_path / "in" / "small.jpg").write_bytes(jpeg(60, (30, 20)))
    run(tmp_path / "in", tmp_path / "out", "--resize-min", "32")
    source = TfdsConfig(directory=str(tmp_path / "out")).build("train")
    assert [source.size(i) for i in range(2)] == [(32, 64), (20, 30)]
    assert source[1].image == jpeg(60, (30, 20))


def test_odd_images_are_stored_as_others_would_read_them(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), (9, 9, 9)).save(tmp_path / "in" / "turned.png", exif=exif)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "in" / "cmyk.jpg")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "in" / "alpha.webp")
    run(tmp_path / "in", tmp_path / "out")
    plain = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    for i, name in enumerate(("alpha.webp", "cmyk.jpg", "turned.png")):
        want = transforms.decode((tmp_path / "in" / name).read_bytes(), name)
        np.testing.assert_array_equal(plain[i]["image"], want)
    assert plain[2]["image"].shape == (20, 10, 3)


def test_bad_images_are_listed_and_left_out(image_folder, tmp_path, capsys) -> None:
    (image_folder / "apple" / "3.png").write_text("no image")
    (image_folder / "pear" / "4.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 20 images are bad.*0.01"):
        run(image_folder, tmp_path / "packed")
    assert not (tmp_path / "packed" / "dataset_info.json").exists()
    run(image_folder, tmp_path / "packed", "--max-bad-fraction", "0.2")
    assert "apple/3.png: not an image" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "packed" / "pack-train.json").read_text())
    assert [name for name, _ in manifest["bad"]] == ["apple/3.png", "pear/4.png"]
    assert len(TfdsConfig(directory=str(tmp_path / "packed")).build("train")) == 18


def test_a_shard_of_bad_images_only_is_no_obstacle(image_folder, tmp_path) -> None:
    for i in range(4):
        (image_folder / "apple" / f"{i}.png").write_bytes(b"x" * 500)
    run(image_folder, tmp_path / "packed", "--shard-size", "0.001", "--max-bad-fraction", "0.5")
    source = TfdsConfig(directory=str(tmp_path / "packed")).build("train")
    assert [source[i].name for i in range(len(source))][:2] == ["apple/4.png", "apple/5.png"]
    assert len(source) == 16


@pytest.mark.multiprocess
def test_killed_and_repeated_gives_the_same_bytes(tmp_path: pathlib.Path) -> None:
    """kill -9 of the real command in the middle of a shard; the next run completes the rest."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(120):
        Image.fromarray(rng.integers(0, 255, (200, 300, 3), np.uint8)).save(
            tmp_path / "in" / f"{i:03d}.png", compress_level=1
        )
    options = ["--shard-size", "1", "--threads", "1"]
    run(tmp_path / "in", tmp_path / "whole" / "set", *options)
    out = tmp_path / "killed" / "set"
    command = [sys.executable, "-m", "dcae_jax", "pack", "--from", str(tmp_path / "in")]
    command += ["--out", str(out), *options]
    root = pathlib.Path(pack.__file__).parents[2]
    kills = 0
    for done in (1, 8):
        with subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) as process:
            marks = out / "pack-train"
            while process.poll() is None and len(list(marks.glob("0*.json"))) < done:
                time.sleep(0.002)
            time.sleep(0.01)
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        assert not (out / "dataset_info.json").exists()
    assert kills == 2
    finished = {p.name: p.stat().st_mtime_ns for p in out.glob("*.array_record-*")}
    subprocess.run(command, cwd=root, check=True, stderr=subprocess.DEVNULL)
    assert digests(out) == digests(tmp_path / "whole" / "set")
    kept = [n for n, at in finished.items() if (out / n).stat().st_mtime_ns == at]
    assert len(kept) >= 8  # what was complete was not written again
    assert not (out / "pack-train").exists()


def test_a_cut_shard_or_mark_is_written_again(image_folder, tmp_path, monkeypatch) -> None:
    options = ("--shard-size", "0.001")
    run(image_folder, tmp_path / "whole" / "set", *options)
    out = tmp_path / "cut" / "set"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(image_folder, out, *options)
    shards = sorted(out.glob("*.array_record-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    shards[1].unlink()
    (out / "pack-train" / "00002.json").write_text('{"records": 3, "by')
    run(image_folder, out, *options)
    assert digests(out) == digests(tmp_path / "whole" / "set")


def test_repeating_is_quiet_and_other_contents_are_refused(image_folder, tmp_path, capsys) -> None:
    out = tmp_path / "packed"
    run(image_folder, out)
    before = digests(out)
    run(image_folder, out)
    assert "already packed" in capsys.readouterr().out and digests(out) == before
    (image_folder / "apple" / "9.png").unlink()
    with pytest.raises(UserError, match=r"already holds a finished split 'train' of other images"):
        run(image_folder, out)
    with pytest.raises(UserError, match=r"holds data set 'packed', not 'other'"):
        run(image_folder, out, "--name", "other", "--split", "test")
    assert digests(out) == before


def test_unfinished_output_of_other_options_is_refused(image_folder, tmp_path) -> None:
    (image_folder / "apple" / "3.png").write_text("no image")
    with pytest.raises(UserError):
        run(image_folder, tmp_path / "packed")
    with pytest.raises(UserError, match=r"unfinished run with other images or options"):
        run(image_folder, tmp_path / "packed", "--resize-min", "16")


def test_another_program_s_data_set_is_refused(image_folder, tmp_path) -> None:
    prepared = sources.PhotosConfig().build("train")._all._arguments[0]
    shutil.copytree(prepared, tmp_path / "theirs")
    with pytest.raises(UserError, match=r"pack did not write"):
        run(image_folder, tmp_path / "theirs")


def test_full_disk_is_noticed_before_writing(image_folder, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"0.0 GB free, packing needs about 0.1 GB"):
        run(image_folder, tmp_path / "packed")
    assert list((tmp_path / "packed").glob("*.array_record-*")) == []


def test_mistakes(tmp_path: pathlib.Path, image_folder: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "broken.tar").write_text("x" * 600)
    for source, message in (
        ("nowhere", "no such file or folder"), ("empty", "holds no image"),
        ("file.txt", "neither a folder nor a tar"), ("broken.tar", "not an intact tar"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run(tmp_path / source, tmp_path / "out")
    (tmp_path / "labels").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"2 lines for 20 images"):
        run(image_folder, tmp_path / "out", "--labels", str(tmp_path / "labels"))
    (tmp_path / "labels").write_text("apple/0.png a\n")
    with pytest.raises(UserError, match=r"no class for 19 images"):
        run(image_folder, tmp_path / "out", "--labels", str(tmp_path / "labels"))


def test_splits_must_share_their_classes(image_folder, tmp_path) -> None:
    run(image_folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"one list of classes|one data set has one"):
        run(image_folder / "pear", tmp_path / "out", "--split", "test")


def test_object_store(image_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """No rename, no append: every object is written whole under its own name."""
    store = fake_store.reset()
    arguments = ["--from", str(image_folder), "--out", "fake://bucket/set", "--shard-size", "0.001"]
    assert pack.main(arguments) == 0
    local = tmp_path / "local" / "set"
    run(image_folder, local, "--shard-size", "0.001")
    remote = epath.Path("fake://bucket/set")
    assert {p.name for p in remote.iterdir()} == {p.name for p in local.iterdir()}
    for path in local.iterdir():
        assert store.objects[f"/fake/bucket/set/{path.name}"] == path.read_bytes(), path.name


def test_shards_are_cut_by_size() -> None:
    entries = [pack.Entry(str(i), "", 0, size) for i, size in enumerate((5, 5, 1, 30, 2, 9))]
    cut = [[entry.size for entry in shard] for shard in pack.cut_shards(entries, 10)]
    assert cut == [[5, 5], [1], [30], [2], [9]]


def test_environment_has_no_tensorflow() -> None:
    assert os.environ.get("JAX_PLATFORMS") == "cpu" and "tensorflow" not in sys.modules
