"""Folders that cannot be made or filled, that were left unfinished, and that hold two of a kind."""

import errno
import json
import shutil
import types

import narrow_nets as narrow
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from dcae_jax import checkpoint, outputs, tree
from dcae_jax.convert import folder, from_torch, to_torch
from dcae_jax.convert.names import Layout
from dcae_jax.errors import UserError

FILES = narrow.FILES
WEIGHTS = "diffusion_pytorch_model.safetensors"


def commands(out):
    return (
        ("import", "--from", FILES / "dc", "--out", out),
        ("export", "--workdir", FILES / "dc", "--to", "diffusers", "--out", out),
    )


def refused(*args, match):
    with pytest.raises(UserError, match=match):
        narrow.command(*args)


# ---------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("which", [0, 1])
def test_a_folder_that_cannot_be_made_is_noticed_before_anything_is_read(which, monkeypatch):
    monkeypatch.setattr(from_torch, "load", None)
    refused(*commands("/proc/nothing/x")[which], match=r"--out /proc/nothing/x cannot be written")


@pytest.mark.parametrize("which", [0, 1])
def test_two_commands_at_once_do_not_mix(which, tmp_path):
    out = tmp_path / "out"
    with outputs.locked(epath.Path(out), "--out"):  # as the other command holds it
        (out / folder.UNFINISHED).write_text("of the other command")
        refused(*commands(out)[which], match="is in use by another command")
        assert (out / folder.UNFINISHED).read_text() == "of the other command"
    narrow.command(*commands(out)[which])


@pytest.mark.parametrize("which", [0, 1])
def test_a_disk_without_room_is_noticed_before_anything_is_written(which, monkeypatch, tmp_path):
    usage = types.SimpleNamespace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    match = "has 1 MiB free, and 1 MiB will be written; make room"
    refused(*commands(tmp_path / "a" / "b")[which], match=match)
    assert not list(tmp_path.iterdir()), "the folders above were made for it"


def test_a_disk_that_fills_up_meanwhile_is_one_sentence_and_the_same_command_mends_it(
    monkeypatch, tmp_path
):
    def full(file, rows):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    command = commands(tmp_path / "out")[1]
    with monkeypatch.context() as patch:
        patch.setattr(to_torch, "write_safetensors", full)
        refused(*command, match=r"cannot be written .*No space left.*run the same command again")
    inside = {p.name for p in (tmp_path / "out").iterdir()}
    assert inside == {folder.UNFINISHED, WEIGHTS}
    refused("export", "--workdir", tmp_path / "out", *command[3:-1], tmp_path / "b",
            match="is unfinished: what wrote it did not end")  # fmt: skip
    assert not (tmp_path / "b").exists()
    assert narrow.command(*command) == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (FILES / "dc" / WEIGHTS).read_bytes()
    assert not (tmp_path / "out" / folder.UNFINISHED).exists()


def test_an_import_that_was_killed_is_started_anew_by_the_same_command(monkeypatch, tmp_path):
    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            narrow.command(*commands(work)[0])
    assert (work / "checkpoints").is_dir() and not (work / "config.json").exists()
    export = ("export", "--workdir", work, "--to", "official", "--out", tmp_path / "out")
    refused(*export, match="is unfinished: what wrote it did not end; run that command again")
    refused(*export[:-1], work, match="its writer did not finish; give a new folder")
    (work / "mine.txt").write_text("mine")
    refused(*commands(work)[0], match="its writer did not finish; give a new folder")
    assert (work / "mine.txt").read_text() == "mine"
    (work / "mine.txt").unlink()
    assert narrow.command(*commands(work)[0]) == 0
    assert {p.name for p in work.iterdir()} == {"checkpoints", "config.json"}
    assert narrow.command(*export) == 0


def interrupted(checkpoints, state, meta):
    (checkpoints.folder / "0.partial").mkdir(parents=True)
    raise KeyboardInterrupt


def test_only_what_was_written_is_ever_removed(tmp_path):
    """A run's workdir without its config.json has checkpoints too, and they are the user's."""
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    refused(*commands(tmp_path / "run")[0], match=r"no config\.json: its writer did not finish")
    assert (tmp_path / "run" / "checkpoints" / "7").is_dir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyError), folder.filling(epath.Path(tmp_path / "empty"), ()):
        raise KeyError
    assert not list((tmp_path / "empty").iterdir()), "it was there before"


# --------------------------------------------------------------------------------------- sources


def test_a_workdir_needs_no_import(tmp_path):
    assert narrow.command(*commands(tmp_path / "work")[0]) == 0
    for source in ("work", "work/checkpoints", "work/checkpoints/0"):
        command = ("import", "--from", tmp_path / source, "--out", tmp_path / "again")
        refused(*command, match="is a workdir already: use it as it is")
    shutil.copytree(FILES / "dc", tmp_path / "512")  # a folder with the name of a step
    assert narrow.command("import", "--from", tmp_path / "512", "--out", tmp_path / "again") == 0


def test_of_two_usual_files_the_layouts_own_is_taken_and_the_other_named(tmp_path):
    state = safetensors.numpy.load_file(FILES / "dc" / WEIGHTS)
    shutil.copytree(FILES / "dc", tmp_path / "dc")
    other = {k: 2 * v if v.dtype == np.float32 else v for k, v in state.items()}
    safetensors.numpy.save_file(other, tmp_path / "dc" / "model.safetensors")
    found = from_torch.load(str(tmp_path / "dc"))
    assert found.notes == [f"taken from {WEIGHTS}; left out: model.safetensors"]
    plain = from_torch.load(str(FILES / "dc"))
    assert not plain.notes
    path = "params/encoder/conv_out/bias"
    bias = tree.flatten(plain.variables)[path]
    assert np.array_equal(tree.flatten(found.variables)[path], bias)
    # The same two beside an official config.json: the other one is meant.
    cfg = narrow.every()["dc-ae-f32c32-in-1.0"]
    out = narrow.export(cfg, Layout.official, tmp_path / "official")
    shutil.copy(tmp_path / "dc" / WEIGHTS, out)
    found = from_torch.load(str(out))
    assert found.notes[0] == f"taken from model.safetensors; left out: {WEIGHTS}"
    assert np.array_equal(tree.flatten(found.variables)[path], narrow.weights(cfg)[path])


def test_a_file_of_the_hubs_cache_is_a_link_to_a_name_without_suffix(tmp_path):
    shutil.copytree(FILES / "kl", tmp_path / "kl")
    (tmp_path / "kl" / WEIGHTS).rename(tmp_path / "0a1b")
    (tmp_path / "kl" / WEIGHTS).symlink_to(tmp_path / "0a1b")
    with pytest.raises(UserError, match="fits no release"):  # read, and known to be narrow
        from_torch.load(str(tmp_path / "kl" / WEIGHTS))


def test_what_only_pipelines_read_comes_back(tmp_path):
    shutil.copytree(FILES / "kl", tmp_path / "kl")
    config = tmp_path / "kl" / "config.json"
    fields = json.loads(config.read_text()) | {"sample_size": 1024, "force_upcast": False}
    config.write_text(json.dumps(fields))
    narrow.command("import", "--from", tmp_path / "kl", "--out", tmp_path / "work")
    narrow.command("export", "--workdir", tmp_path / "work", "--to", "diffusers", "--out",
                   tmp_path / "out")  # fmt: skip
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["sample_size"] == 1024 and after["force_upcast"] is False
