"""What commands write: whole or not at all, never over what is there, one command in a folder."""

import errno
import os
import pathlib
import subprocess
import sys

import fake_store
import pytest
from etils import epath

from dcae_jax import outputs
from dcae_jax.errors import UserError


def test_only_an_empty_folder_is_written_into(tmp_path) -> None:
    assert outputs.new_folder(str(tmp_path / "new"), "--out").name == "new"
    assert outputs.new_folder(str(tmp_path), "--out") is not None
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=r"--out .* is not an empty folder \(there is 'file'\)"):
            outputs.new_folder(str(path), "--out")


def test_only_a_new_file_of_the_right_name_is_written(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert outputs.new_file(str(tmp_path / "b.txt"), ".txt", "--out").name == "b.txt"
    with pytest.raises(UserError, match=r"--out .*a\.txt exists"):
        outputs.new_file(str(tmp_path / "a.txt"), ".txt", "--out")
    with pytest.raises(UserError, match=r"must end with \.bin"):
        outputs.new_file(str(tmp_path / "a.txt"), ".bin", "--out")


def test_a_second_process_is_kept_out_and_a_dead_one_does_not_count(tmp_path) -> None:
    folder = epath.Path(tmp_path / "out")
    code = (
        "import sys, time; from etils import epath; from dcae_jax import outputs\n"
        "with outputs.claimed(epath.Path(sys.argv[1]), '--out'):\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    root = pathlib.Path(outputs.__file__).parent.parent
    other = subprocess.Popen([sys.executable, "-c", code, folder], cwd=root, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"in\n"
        with (
            pytest.raises(UserError, match="is in use by another command"),
            outputs.claimed(folder, "--out"),
        ):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with outputs.claimed(folder, "--out"):
        outputs.write(folder / "x", b"1")
    with (  # it came and went since `new_folder` looked
        pytest.raises(UserError, match="not an empty folder"),
        outputs.claimed(folder, "--out"),
    ):
        pass
    assert [p.name for p in folder.iterdir()] == ["x"]


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path) -> None:
    """/dev/full is the kernel's own full disk."""
    path = epath.Path(tmp_path / "deep" / "x.bin")
    with pytest.raises(UserError, match=r"x\.bin could not be written: No space left on device"):
        with outputs.opened(path) as file, open("/dev/full", "wb", buffering=0) as full:
            file.write(b"half")
            full.write(b"rest")
    assert list((tmp_path / "deep").iterdir()) == []
    outputs.write(path, b"old")
    with pytest.raises(UserError), outputs.opened(path) as file:
        file.write(b"new")
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1


def test_an_interrupted_file_is_not_there(tmp_path) -> None:
    path = epath.Path(tmp_path / "x.bin")
    with pytest.raises(KeyboardInterrupt), outputs.opened(path) as file:
        file.write(b"half")
        assert not path.exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_made_is_told(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="could not be written"):
        outputs.write(epath.Path(tmp_path / "file" / "x"), b"")
    with (
        pytest.raises(UserError, match="could not be written"),
        outputs.claimed(epath.Path(tmp_path / "file" / "x"), "--out"),
    ):
        pass


def test_an_object_store_has_neither_rename_nor_locks() -> None:
    store = fake_store.reset()
    folder = outputs.new_folder("fake://bucket/out", "--out")
    with outputs.claimed(folder, "--out"):
        outputs.write(folder / "x.bin", b"data")
    assert store.objects == {"/fake/bucket/out/x.bin": b"data"}
