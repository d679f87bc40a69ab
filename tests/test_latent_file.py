"""Files of latents: read by safetensors itself, streamed, refused when they are something else."""

import errno
import json
import os

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from etils import epath

from dcae_jax import latent_file
from dcae_jax.errors import UserError
from dcae_jax.latent_file import Description

SIZES = {"a": (30, 41), "deep/ü b": (4, 4), "c": (64, 8)}


def about() -> Description:
    return Description(
        source="ema of step 5", encoder="abc", factor=4, channels=3, scaling_factor=0.25,
        padding="edge", dtype="float32", tile=0, overlap=0,
    )  # fmt: skip


def latents() -> dict[str, np.ndarray]:
    gen = np.random.default_rng(0)
    return {
        name: gen.normal(size=(-(-h // 4), -(-w // 4), 3)).astype(np.float32)
        for name, (h, w) in SIZES.items()
    }


@pytest.fixture
def path(tmp_path):
    path = epath.Path(tmp_path / "deep" / "latents.safetensors")
    with latent_file.writer(about()) as writer:
        for name, latent in latents().items():
            writer.add(name, latent, SIZES[name])
        assert len(writer) == 3
        writer.finish(path)
    return path


def test_safetensors_reads_what_is_written(path) -> None:
    found = safetensors.numpy.load_file(path)
    assert found.keys() == SIZES.keys()
    for name, latent in latents().items():
        np.testing.assert_array_equal(found[name], latent)
    with safetensors.safe_open(path, framework="np") as file:
        said = json.loads(file.metadata()["latents"])
    assert said["encoder"] == "abc" and said["scaling_factor"] == 0.25
    assert said["sizes"]["a"] == [30, 41]


def test_it_reads_itself_and_what_safetensors_wrote(path, tmp_path) -> None:
    other = epath.Path(tmp_path / "other.safetensors")
    with safetensors.safe_open(path, framework="np") as file:
        safetensors.numpy.save_file(latents(), other, metadata=file.metadata())
    for each in (path, other):
        with latent_file.reader(each) as reader:
            found = {name: (latent, size) for name, latent, size in reader}
            assert reader.description.scaling_factor == 0.25
        assert {name: size for name, (_, size) in found.items()} == SIZES
        for name, latent in latents().items():
            np.testing.assert_array_equal(found[name][0], latent)


def rewrite(path, change) -> None:
    """Writes the file anew with other metadata or tensors."""
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    said, tensors = json.loads(metadata["latents"]), latents()
    metadata = change(said, tensors) or {**metadata, "latents": json.dumps(said)}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


def test_other_files_are_refused(path, tmp_path) -> None:
    whole = path.read_bytes()

    def refused(match: str, change) -> None:
        path.write_bytes(whole)
        rewrite(path, change)
        with pytest.raises(UserError, match=match), latent_file.reader(path):
            pass

    refused("holds no latent of 'c'", lambda said, tensors: tensors.pop("c") is None)
    refused("the latent of 'a' is", lambda said, tensors: tensors.update(a=np.zeros((9, 11, 3))))
    refused("the latent of 'a' is", lambda said, tensors: said.update(channels=4))
    refused("the latent of 'a' is", lambda said, tensors: said["sizes"].update(a=[300, 41]))

    def outside(said, tensors):
        tensors["../../x"], said["sizes"]["../../x"] = tensors.pop("a"), said["sizes"].pop("a")

    refused("is no name of a file inside", outside)
    with (
        pytest.raises(UserError, match="no file"),
        latent_file.reader(epath.Path("none.safetensors")),
    ):
        pass


def test_a_cut_file_is_refused(path) -> None:
    data = path.read_bytes()
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with (
            pytest.raises(UserError, match="cannot be read as a file of latents"),
            latent_file.reader(path),
        ):
            pass


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "expected the fields"),
        ({"more": 1}, "expected the fields"),
        ({"factor": None}, "factor is None, expected a positive whole number"),
        ({"factor": 0}, "factor is 0"),
        ({"factor": True}, "factor is True"),
        ({"channels": "3"}, "channels is '3'"),
        ({"scaling_factor": -1.0}, "scaling_factor is -1.0"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"source": 3}, "source is 3, expected a text"),
        ({"tile": -4}, "tile is -4"),
        ({"sizes": []}, "sizes is"),
        ({"sizes": {"a": "30x41"}}, "the size of 'a' is '30x41'"),
        ({"sizes": {"a": [30]}}, r"the size of 'a' is \[30\]"),
        ({"sizes": {"a": ["30", 41]}}, "the size of 'a' is"),
        ({"sizes": {"a": [0, 41]}}, "the size of 'a' is"),
    ],
)
def test_edited_metadata_are_refused_in_one_sentence(path, change, named) -> None:
    def edit(said, tensors):
        text = change if isinstance(change, str) else json.dumps({**said, **change})
        return {"format": latent_file.FORMAT, "latents": text}

    rewrite(path, edit)
    with pytest.raises(UserError, match=named) as error, latent_file.reader(path):
        pass
    assert "its metadata are not those" in str(error.value)


def test_a_lacking_field_and_none_at_all_are_refused(path) -> None:
    def lacking(said, tensors):
        del said["channels"]

    for change, named in (
        (lacking, "expected the fields"),
        (lambda said, tensors: {"format": latent_file.FORMAT}, "KeyError: 'latents'"),
        (lambda said, tensors: {"format": "x"}, "does not say that it holds"),
    ):
        data = path.read_bytes()
        rewrite(path, change)
        with pytest.raises(UserError, match=named), latent_file.reader(path):
            pass
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["/x", "../x", "x/../../y", "x//y", "", "x\0"])
def test_names_that_are_no_files_are_refused(path, name) -> None:
    def rename(said, tensors):
        tensors[name], said["sizes"][name] = tensors.pop("a"), said["sizes"].pop("a")

    rewrite(path, rename)
    with pytest.raises(UserError, match="is no name of a file inside"), latent_file.reader(path):
        pass


def test_a_latent_that_is_not_finite_is_the_file_s_fault(path) -> None:
    rewrite(path, lambda said, tensors: tensors["c"].__setitem__((0, 0, 0), np.nan))
    with latent_file.reader(path) as reader:
        found = iter(reader)
        assert [next(found)[0], next(found)[0]] == ["a", "deep/ü b"]
        with pytest.raises(UserError, match=r"latents\.safetensors: the latent of 'c' holds"):
            next(found)


def test_a_full_disk_leaves_no_file(path) -> None:
    """/dev/full is the kernel's own full disk; here in place of the temporary file."""
    with open("/dev/full", "r+b", buffering=0) as full:
        writer = latent_file.Writer(about(), full)
        with pytest.raises(UserError, match="TMPDIR"):
            writer.add("a", latents()["a"], SIZES["a"])
    new = path.parent / "new.safetensors"
    with pytest.raises(UserError, match="could not be written: No space"):
        with latent_file.writer(about()) as writer:
            writer.add("a", latents()["a"], SIZES["a"])
            writer._spool = _Broken()
            writer.finish(new)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


class _Broken:
    """A file whose disk gives up in the middle."""

    def seek(self, place: int) -> None:
        pass

    def read(self, size: int) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
