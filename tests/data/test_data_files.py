"""Files that a user names: found below folders, named apart, read with a reason when bad."""

import pathlib

import networks
import pytest
from PIL import Image

from dcae_jax.data import files
from dcae_jax.data.transforms import BadRecord, Reason
from dcae_jax.errors import UserError


def put(path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(networks.picture(8, 12)).save(path)
    return path


def names(*paths, **options) -> list[str]:
    return [file.name for file in files.find([str(p) for p in paths], **options)]


def test_folders_are_walked_and_names_are_relative(tmp_path) -> None:
    for name in ("b.png", "a.jpg", "deep/er/c.PNG", ".hidden.png", ".git/d.png"):
        put(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    assert names(tmp_path) == ["a", "b", "deep/er/c"]
    assert names(tmp_path / "a.jpg") == ["a"]
    folder = tmp_path.name
    assert names(tmp_path, tmp_path / "a.jpg") == [f"{folder}/{n}" for n in ("a", "b", "deep/er/c")]


def test_a_file_that_is_named_is_taken_whatever_its_suffix(tmp_path) -> None:
    put(tmp_path / "a.png").rename(tmp_path / "photo")
    (found,) = files.find([str(tmp_path / "photo")])
    assert found.name == "photo" and found.read().shape == (8, 12, 3) and found.size() == (8, 12)


def test_no_two_names_are_equal(tmp_path) -> None:
    put(tmp_path / "a.png"), put(tmp_path / "a.jpg"), put(tmp_path / "A.webp")
    assert names(tmp_path) == ["A.webp", "a.jpg", "a.png"]
    for folder in ("one", "two/one"):
        put(tmp_path / folder / "x.png")
    found = names(tmp_path / "one/x.png", tmp_path / "two/one/x.png")
    assert len(set(found)) == 2 and found == ["x.png", "x.png-2"]
    put(tmp_path / "three" / "X.png")
    found = names(tmp_path / "one/x.png", tmp_path / "three/X.png")
    assert len({name.lower() for name in found}) == 2, "a disk may not tell X from x"
    found = names(tmp_path / "one", tmp_path / "two/one")
    assert len({name.lower() for name in found}) == 2
    put(tmp_path / "grid.png")
    assert "grid.png" in names(tmp_path, reserved=("grid",)) and "grid" in names(tmp_path)


def test_the_same_file_twice_is_one_image(tmp_path) -> None:
    put(tmp_path / "a.png")
    assert len(names(tmp_path, tmp_path / "a.png", tmp_path / "." / "a.png", tmp_path)) == 1


def test_mistakes(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        names(tmp_path / "none.png")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no image in .*\.webp"):
        names(tmp_path)
    (tmp_path / "cut.png").write_bytes(put(tmp_path / "a.png").read_bytes()[:60])
    (found,) = files.find([str(tmp_path / "cut.png")])
    with pytest.raises(BadRecord, match=r"cut.png: damaged"):
        found.read()
    (tmp_path / "cut.png").unlink()
    with pytest.raises(BadRecord) as error:  # gone since it was listed
        found.read()
    assert error.value.reason is Reason.unreadable and found.size() == (0, 0)


def test_links_are_walked_once_and_do_not_lead_in_circles(tmp_path) -> None:
    put(tmp_path / "set" / "a" / "x.png")
    put(tmp_path / "elsewhere" / "y.png")
    (tmp_path / "set" / "a" / "loop").symlink_to("..")
    (tmp_path / "set" / "b").symlink_to("a")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "z.png").symlink_to(tmp_path / "elsewhere" / "y.png")
    assert names(tmp_path / "set") == ["a/x", "linked/y"]
