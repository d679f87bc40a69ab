"""Files that PyTorch and diffusers wrote (make_torch_files.py): read, run, and given back."""

import importlib.util
import json
import shutil

import ml_dtypes
import narrow_nets as narrow
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from etils import epath

from dcae_jax import autoencoder, tree
from dcae_jax.convert import from_torch, names, to_torch
from dcae_jax.convert.names import Layout
from dcae_jax.errors import UserError
from dcae_jax.models.dcae import DCAEConfig
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.nets.torch_file import open_tensors

FILES = narrow.FILES


@pytest.mark.parametrize(("name", "factor"), [("dc", 0.75), ("kl", 0.5)])
def test_the_network_of_a_diffusers_folder_computes_what_diffusers_computed(name, factor):
    found = from_torch.load(str(FILES / name))
    assert found.scaling_factor == factor and found.release is None and not found.dtypes
    theirs = np.load(FILES / f"{name}.npz")
    image = theirs["input"].transpose(0, 2, 3, 1)
    ours = to_torch.run(found.cfg, found.variables, image)
    for part in ("latent", "reconstruction"):
        expected = theirs[part].transpose(0, 2, 3, 1)
        error = np.abs(ours[part] - expected).max() / np.abs(expected).max()
        assert error < 1e-5, part  # what the README of an export promises; measured: 1e-6


def test_every_field_of_config_json_is_understood():
    dc = from_torch.load(str(FILES / "dc")).cfg
    assert isinstance(dc, DCAEConfig) and dc.encoder.depths == (0, 2, 1)
    assert [b.value for b in dc.decoder.blocks] == ["res", "res", "evit5"]
    assert [b.value for b in dc.encoder.blocks] == ["res", "res", "evit"]
    assert [n.value for n in dc.decoder.norms] == ["batch", "batch", "rms"]
    assert dc.head_dim == 4 and dc.last_norm_scale_init == 1 and not dc.adaptive_channels
    kl = from_torch.load(str(FILES / "kl")).cfg
    assert isinstance(kl, KLVAEConfig) and kl.widths == (4, 8) and kl.norm_groups == 2


@pytest.mark.parametrize("name", ["dc", "dc_bf16", "kl"])
def test_import_and_export_give_back_the_very_file_that_diffusers_wrote(name, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    assert narrow.command("import", "--from", FILES / name, "--out", work) == 0
    assert narrow.command("export", "--workdir", work, "--to", "diffusers", "--out", out) == 0
    weights = "diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (FILES / name / weights).read_bytes()
    before = json.loads((FILES / name / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert after["scaling_factor"] == before["scaling_factor"]
    assert from_torch.load(str(out)).cfg == from_torch.load(str(FILES / name)).cfg
    assert {k: before[k] for k in after} == after


def test_shards_and_halves_hold_the_same_weights():
    plain = tree.flatten(from_torch.load(str(FILES / "dc")).variables)
    sharded = tree.flatten(from_torch.load(str(FILES / "dc_sharded")).variables)
    assert all(np.array_equal(plain[p], sharded[p]) for p in plain | sharded)
    half = from_torch.load(str(FILES / "dc_bf16"))
    assert set(half.dtypes.values()) == {"bfloat16"} and set(half.counters.values()) == {1234}
    for path, leaf in tree.flatten(half.variables).items():
        rounded = np.asarray(plain[path]).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(leaf, rounded, path)


def test_an_export_is_read_by_the_safetensors_library(tmp_path):
    cfg = narrow.every()["dc-ae-f32c32-in-1.0"]
    out = narrow.export(cfg, Layout.official, tmp_path / "out")
    theirs = safetensors.numpy.load_file(out / "model.safetensors")
    ours = narrow.weights(cfg)
    for e in names.table(cfg, Layout.official):
        parts = names.to_torch(e, ours[e.path])
        assert all(np.array_equal(theirs[k], t) for k, t in zip(e.keys, parts, strict=True))
    with safetensors.safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    # The library writes the same tensors in the same order: the file is its own.
    safetensors.numpy.save_file(theirs, tmp_path / "its.safetensors", {"format": "pt"})
    its = (tmp_path / "its.safetensors").read_bytes()
    assert its == (out / "model.safetensors").read_bytes()


# ----------------------------------------------------------------------------- training checkpoints


def checkpoint_folder(tmp_path, name="training.pth"):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(FILES / "dc" / "config.json", folder)
    shutil.copy(FILES / name, folder / "weights.pth")
    return folder


def test_a_training_checkpoint_asks_which_weights_and_names_what_it_leaves_out(tmp_path):
    folder = str(checkpoint_folder(tmp_path))
    with pytest.raises(UserError, match=r"model_state_dict, ema/0\.9999; say which with --part"):
        from_torch.load(folder)
    with pytest.raises(UserError, match="no part 'ema'; it holds model_state_dict"):
        from_torch.load(folder, part="ema")
    plain = from_torch.load(folder, part="model_state_dict")
    assert plain.notes[:3] == [
        "taken from weights.pth: model_state_dict",
        "left out of weights.pth: ema/0.9999",
        "stripped the prefix '0.'; left out ['1']",
    ]
    average = tree.flatten(from_torch.load(folder, part="ema/0.9999").variables)
    released = tree.flatten(from_torch.load(str(FILES / "dc")).variables)
    for path, leaf in tree.flatten(plain.variables).items():
        np.testing.assert_array_equal(leaf, released[path])
        np.testing.assert_array_equal(average[path], 0.5 * np.asarray(leaf))


@pytest.mark.parametrize("prefix", ["module.", "autoencoder.", "module.autoencoder.", "0."])
def test_prefixes_are_stripped_and_named(prefix, tmp_path):
    state = safetensors.numpy.load_file(FILES / "dc" / "diffusion_pytorch_model.safetensors")
    safetensors.numpy.save_file(
        {prefix + k: v for k, v in state.items()} | {"diffusion_model.w": np.ones(1, np.float32)},
        tmp_path / "model.safetensors",
    )
    shutil.copy(FILES / "dc" / "config.json", tmp_path)
    found = from_torch.load(str(tmp_path))
    stripped = [p + "." for p in prefix.removesuffix(".").split(".")]
    assert [n.split("'")[1] for n in found.notes] == stripped
    assert "left out ['diffusion_model']" in found.notes[0]


def test_former_names_of_kl_attention_are_read(tmp_path):
    """As in sd-vae-ft-mse: query, key, value, proj_attn."""
    state = safetensors.numpy.load_file(FILES / "kl" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    former = {}
    for key, value in state.items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        former[key] = value
    assert former.keys() != state.keys()
    safetensors.numpy.save_file(former, tmp_path / "model.safetensors")
    shutil.copy(FILES / "kl" / "config.json", tmp_path)
    found, plain = from_torch.load(str(tmp_path)), from_torch.load(str(FILES / "kl"))
    assert "former names" in found.notes[0]
    for path, leaf in tree.flatten(plain.variables).items():
        np.testing.assert_array_equal(tree.flatten(found.variables)[path], leaf)


def test_what_needs_other_classes_says_so():
    torch_is_there = importlib.util.find_spec("torch") is not None
    why = "safe reader refuses" if torch_is_there else "install PyTorch"
    with (
        pytest.raises(UserError, match=rf"types\.SimpleNamespace.*{why}.*save_file"),
        open_tensors(FILES / "namespace.pth"),
    ):
        pass


# ---------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dc-ae-f32c32-in-1.0", Layout.official),
        ("dc-ae-f32c32-in-1.0", Layout.diffusers),
        ("dc-ae-f32c32-sana-1.0", Layout.official),
        ("no residual", Layout.official),  # which diffusers cannot express
    ],
)
def test_export_import_export_is_the_identity(name, layout, tmp_path):
    cfg = narrow.every()[name]
    counters = {key: 3 for key in names.counters(cfg, layout)}
    one = narrow.export(cfg, layout, tmp_path / "one", counters=counters)
    back, two = tmp_path / "back", tmp_path / "two"
    narrow.command("import", "--from", one, "--out", back)
    narrow.command("export", "--workdir", back, "--to", layout.value, "--out", two)
    for file in (to_torch.WEIGHTS[layout], "config.json", "parity.npz"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    told = [(folder / "README.md").read_text() for folder in (one, two)]
    assert "Weights: trained with dcae_jax. " in told[0]
    assert "Weights: imported and unchanged; of which release, if of any, is not" in told[1]
    got = autoencoder.load(str(back))
    leaves = tree.flatten(got.variables)
    assert all(np.array_equal(leaves[p], leaf) for p, leaf in narrow.weights(cfg).items())
    assert got.cfg.residual == cfg.residual and got.scaling_factor == 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_kept_across_layouts_and_parity_is_of_the_rounded_weights(dtype, tmp_path):
    cfg = narrow.every()["dc-ae-f32c32-sana-1.0"]
    half = narrow.export(cfg, Layout.diffusers, tmp_path / "half", dtype=dtype)
    narrow.command("import", "--from", half, "--out", tmp_path / "back")
    out = tmp_path / "official"
    narrow.command("export", "--workdir", tmp_path / "back", "--to", "official", "--out", out)
    with open_tensors(out / "model.safetensors") as file:
        assert {str(info.dtype) for info in file.infos.values()} == {dtype}
    found, stored = from_torch.load(str(half)), np.load(half / "parity.npz")
    again = to_torch.run(found.cfg, found.variables, to_torch.example(found.cfg))
    for part, value in np.load(out / "parity.npz").items():
        np.testing.assert_array_equal(value, stored[part])
        np.testing.assert_array_equal(value, again[part])


def test_values_beyond_float16_are_refused_before_anything_is_written(tmp_path):
    cfg = narrow.every()["kl"]
    ours = narrow.weights(cfg)
    ours["params/encoder/conv_in/bias"][0] = 1e5
    export = to_torch.Export(
        cfg, tree.unflatten(ours), Layout.diffusers, 0.5, "a test", dtype="float16"
    )
    with pytest.raises(UserError, match=r"encoder/conv_in/bias has values up to 1e\+05"):
        to_torch.write(export, epath.Path(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
