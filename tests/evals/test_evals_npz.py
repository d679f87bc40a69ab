"""Images in npz files: read from their place, stored and compressed, on disks and stores."""

import io
import zipfile

import fake_store
import numpy as np
import pytest
from etils import epath

from dcae_jax.errors import UserError
from dcae_jax.evals import npz
from dcae_jax.evals.npz import Pictures

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 5, 7, 3), dtype=np.uint8)


def pictures(labels=None, n=9):
    return Pictures(n, 5, 7, iter(IMAGES), labels)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_any_order(tmp_path, save):
    save(tmp_path / "x.npz", before=np.arange(99), arr_0=IMAGES, arr_1=np.arange(9))
    found = npz.images(tmp_path / "x.npz")
    assert (found.n, found.height, found.width, found.side) == (9, 5, 7, None)
    assert (found.place is None) == (save is np.savez_compressed)
    for start, stop in ((0, 2), (2, 3), (6, 9), (1, 8)):
        np.testing.assert_array_equal(found.read(start, stop), IMAGES[start:stop])
    assert found.labels().tolist() == list(range(9))
    with pytest.raises(ValueError, match="images 8 to 10 of 9"):
        found.read(8, 10)
    found.close()


def test_what_is_written_numpy_reads_and_is_the_same_bytes_again(tmp_path):
    for name in ("a", "b"):
        npz.write(
            epath.Path(tmp_path / name), {"mu": np.ones(3)}, pictures(np.arange(9, dtype=np.int32))
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert {member.date_time[0] for member in archive.infolist()} == {1980}, "not today's"
    with np.load(tmp_path / "a") as found:
        np.testing.assert_array_equal(found["arr_0"], IMAGES)
        assert found["arr_1"].dtype == np.int64 and found["mu"].tolist() == [1, 1, 1]
    assert npz.images(tmp_path / "a").labels().tolist() == list(range(9))


def test_a_store_without_rename_serves_and_takes_them():
    store = fake_store.reset()
    path = epath.Path("fake://bucket/samples.npz")
    npz.write(path, {}, pictures())
    assert store.writes == ["/fake/bucket/samples.npz"]
    found = npz.images("fake://bucket/samples.npz")
    np.testing.assert_array_equal(found.read(3, 5), IMAGES[3:5])
    assert found.labels() is None


def test_only_what_is_asked_for_is_read(tmp_path):
    """A sparse file of 39 GB: 50,000 images of 512 px, all of them zero."""
    shape = (50_000, 512, 512, 3)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        head = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, header)
        info = zipfile.ZipInfo("arr_0.npy")
        with archive.open(info, "w", force_zip64=True) as member:
            member.write(head.getvalue())
        # What a writer of all of it would have noted.
        place = archive.fp.tell()
        info.file_size = info.compress_size = len(head.getvalue()) + int(np.prod(shape))
        archive.fp.seek(place - 4 + int(np.prod(shape)))
        archive.fp.write(b"last")
        archive.start_dir = archive.fp.tell()
    found = npz.images(tmp_path / "x.npz")
    assert (found.n, found.side) == (50_000, 512)
    assert found.read(49_999, 50_000).tobytes()[-5:] == b"\0last"
    assert not found.read(123, 125).any()


def test_damaged_and_foreign_files_are_told(tmp_path):
    good = tmp_path / "good.npz"
    np.savez(good, arr_0=IMAGES)
    whole = good.read_bytes()

    def said(name, data=None, **arrays):
        path = tmp_path / f"{name}.npz"
        if data is not None:
            path.write_bytes(data)
        elif arrays:
            np.savez(path, **arrays)
        with pytest.raises(UserError) as e:
            npz.images(path).read(0, 9)
        return str(e.value)

    assert "cannot be read: No such file" in said("absent")
    assert "is no npz file" in said("text", b"an image, they said")
    assert "is no npz file" in said("cut", whole[:-300])
    assert "holds mu, no images (arr_0)" in said("mu", mu=np.ones(3))
    assert "float64 of shape (9, 5, 7, 3), not uint8" in said("float", arr_0=IMAGES / 255)
    assert "shape (9, 3, 5, 7)" in said("nchw", arr_0=IMAGES.transpose(0, 3, 1, 2).copy())
    assert "shape (0, 5, 7, 3)" in said("none", arr_0=IMAGES[:0])
    assert "Python objects" in said("pickled", arr_0=np.array([{}], object))
    assert "columns one after another" in said("columns", arr_0=np.asfortranarray(IMAGES))
    (tmp_path / "folder.npz").mkdir()
    assert "cannot be read" in said("folder")


def test_labels_must_be_one_class_of_each_image(tmp_path):
    for labels in (np.zeros((9, 10)), np.zeros(8, int), np.zeros(9)):
        np.savez(tmp_path / "x.npz", arr_0=IMAGES, arr_1=labels)
        with pytest.raises(UserError, match="not a class of each of 9 images"):
            npz.images(tmp_path / "x.npz").labels()


def test_flipped_bits_of_compressed_images_are_noticed(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, arr_0=IMAGES)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged one"):
        npz.images(path).read(0, 9)


def test_nothing_stands_there_after_a_mistake(tmp_path):
    path = epath.Path(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="9 images instead of 10"):
        npz.write(path, {}, pictures(n=10))
    with pytest.raises(UserError, match="image 2 is uint8 of shape"):
        odd = [*IMAGES[:2], IMAGES[0, :4]]
        npz.write(path, {}, Pictures(3, 5, 7, odd))
    assert not list(tmp_path.iterdir())
