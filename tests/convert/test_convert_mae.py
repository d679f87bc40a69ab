"""Masked autoencoders from transformers and MAE's own code, and back to transformers."""

import functools
import json
import pathlib
import shutil
from collections import Counter

import jax
import ml_dtypes
import narrow_nets as narrow
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from dcae_jax import checkpoint, config, sharding, tree
from dcae_jax.cli import _mae
from dcae_jax.convert import mae_from_torch, mae_layouts, mae_names, mae_to_torch, names
from dcae_jax.convert.mae_layouts import Described
from dcae_jax.convert.names import Entry, Kind, Layout
from dcae_jax.errors import UserError
from dcae_jax.masking import MaskKind
from dcae_jax.models import lmd
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.nets.torch_file import open_tensors, read_state_dict

FILES = pathlib.Path(__file__).parent / "mae_files"
WEIGHTS = "model.safetensors"
HEADS = ("--heads", 3, "--decoder-heads", 2)
LATENTS = LMDConfig(
    in_channels=4, input_size=(8, 8), patch=4, width=8, depth=3, heads=2, decoder_width=12,
    decoder_depth=2, decoder_heads=3, decoder_pos_sign=-1, mlp_ratio=1.5,
)  # fmt: skip
TOLERANCE = 1e-5  # what the README of an export promises; measured: below 1e-6


@functools.cache
def load(name):
    if name == "original":
        return mae_from_torch.load(str(FILES / "original.pth"), heads=3, decoder_heads=2)
    return mae_from_torch.load(str(FILES / name))


def error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def stored(name):
    return np.load(FILES / f"{name}.npz")


def computed(cfg, variables):
    """What our network makes of PyTorch's inputs, which all files share."""
    theirs = stored("pretraining")
    inputs = {"x": theirs["x"].transpose(0, 2, 3, 1), "noise": theirs["noise"]}
    return mae_to_torch.run(cfg, variables, inputs, theirs["encoded"].shape[1] - 1)


@functools.cache
def outputs(name):
    found = load(name)
    return computed(found.cfg, found.variables)


# ------------------------------------------------------------------------- what PyTorch's code does


def test_imported_weights_compute_what_transformers_computes():
    found = load("pretraining")
    cfg = found.cfg
    assert found.layout is Layout.vit_mae and not found.dtypes
    assert (cfg.depth, cfg.width, cfg.heads, cfg.mlp_ratio) == (2, 12, 3, 2)
    assert (cfg.decoder_depth, cfg.decoder_width, cfg.decoder_heads) == (1, 8, 2)
    assert (cfg.input_size, cfg.patch, cfg.in_channels, cfg.norm_eps) == ((8, 8), 2, 3, 1e-12)
    assert found.described.norm_target is True and found.described.mask_ratio == 0.6
    ours, theirs = outputs("pretraining"), stored("pretraining")
    for key in ("encoded", "output"):
        assert error(ours[key], theirs[key]) < TOLERANCE, key
    assert "eps 1e-12, as in transformers" in found.notes[0]


def test_the_same_weights_under_the_names_of_the_original_have_its_eps():
    ours, theirs = load("original"), load("pretraining")
    assert ours.layout is Layout.mae and ours.cfg.norm_eps == 1e-6
    for path, leaf in tree.flatten(theirs.variables).items():
        np.testing.assert_array_equal(tree.flatten(ours.variables)[path], leaf)
    made = outputs("original")
    for key in ("encoded", "output"):
        assert error(made[key], stored("original")[key]) < TOLERANCE, key
    # Not the other one's: the files hold weights for which the eps decides.
    assert error(made["output"], stored("pretraining")["output"]) > 1e-3
    assert "whitened targets (task.norm_target) are taken" in ours.notes[-1]


def test_an_encoder_alone_gets_a_new_decoder_and_says_so():
    found, whole = load("encoder"), load("pretraining")
    assert found.layout is Layout.vit_mae_encoder and found.cfg == whole.cfg
    ours, theirs = tree.flatten(found.variables), tree.flatten(whole.variables)
    assert ours.keys() == theirs.keys()
    assert all(
        np.array_equal(ours[path], theirs[path]) is path.startswith("params/encoder/")
        for path in ours if path.endswith(("kernel", "cls", "mask_token"))
    )  # fmt: skip
    assert "there is no decoder" in found.notes[-1]


def test_a_wrong_table_is_noticed(monkeypatch):
    """A leaf times 1.01, or two norms in each other's place, move the output beyond tolerance."""
    found, theirs = load("pretraining"), stored("pretraining")["output"]
    path = "params/encoder/blocks/attn/proj/kernel"
    flat = tree.flatten(found.variables)
    wrong = tree.unflatten(flat | {path: 1.01 * flat[path]})
    assert error(computed(found.cfg, wrong)["output"], theirs) > 10 * TOLERANCE
    swapped = dict(mae_names._VIT)
    swapped["norm1"], swapped["norm2"] = swapped["norm2"], swapped["norm1"]
    monkeypatch.setitem(
        mae_names._RULES[Layout.vit_mae], "decoder",
        mae_names._decoder("decoder.", "decoder_layers", swapped),
    )  # fmt: skip
    wrong = mae_from_torch.load(str(FILES / "pretraining")).variables
    assert error(computed(found.cfg, wrong)["output"], theirs) > 10 * TOLERANCE


# -------------------------------------------------------------------------------------- round trips


def weights(cfg):
    gen = np.random.default_rng(0)
    return {
        path: gen.standard_normal(shape).astype(np.float32)
        for path, shape in mae_names.shapes(cfg).items()
    }


def export(out, cfg=LATENTS, layout=Layout.vit_mae, values=None, ratio=0.5, **more):
    made = mae_to_torch.ExportMasked(
        Described(cfg, ratio, False), tree.unflatten(weights(cfg) if values is None else values),
        layout, "a test", pixels=False, **more,
    )  # fmt: skip
    mae_to_torch.write(made, epath.Path(out))
    return out


@pytest.mark.parametrize("layout", mae_names._RULES, ids=lambda v: v.value)
def test_every_leaf_has_keys_of_its_own_and_comes_back(layout):
    ours, entries, found = weights(LATENTS), mae_names.table(LATENTS, layout), {}
    assert [e.path for e in entries] == [
        p for p in ours if p.split("/")[1] in mae_names.sides(layout)
    ]
    for e in entries:
        tensors = names.to_torch(e, ours[e.path])
        shape = names.stored_shape(e, ours[e.path].shape)
        assert [t.shape for t in tensors] == [shape] * len(e.keys)
        found |= {key: np.array(t) for key, t in zip(e.keys, tensors, strict=True)}
    assert max(Counter(k for e in entries for k in e.keys).values()) == 1
    everything = found | mae_names.constants(LATENTS, layout)
    assert mae_names.layout_of(everything) is layout
    assert not mae_names.differences(LATENTS, layout, {k: v.shape for k, v in everything.items()})
    for e in entries:
        back = names.assembled(e, ours[e.path].shape, found.__getitem__)
        assert np.array_equal(back, ours[e.path])


def test_tokens_against_indices():
    leaf = np.arange(3, dtype=np.float32)
    (token,) = names.to_torch(Entry("p", ("cls",), Kind.token), leaf)
    assert token.shape == (1, 1, 3) and token[0, 0, 2] == 2


@pytest.mark.parametrize("layout", mae_to_torch.LAYOUTS, ids=lambda v: v.value)
def test_a_folder_of_latents_that_was_written_is_read_bit_for_bit(layout, tmp_path):
    """Subtracted positions, MLPs of 1.5 times the width, 4 channels."""
    found = mae_from_torch.load(str(export(tmp_path / "out", layout=layout)))
    again, ours = tree.flatten(found.variables), weights(LATENTS)
    sides = mae_names.sides(layout)
    assert again.keys() == ours.keys() and not found.dtypes
    assert all(np.array_equal(again[p], ours[p]) for p in ours if p.split("/")[1] in sides)
    if "decoder" in sides:
        assert found.cfg == LATENTS
    assert found.described.norm_target is False and found.described.mask_ratio == 0.5
    parity = dict(np.load(tmp_path / "out" / "parity.npz"))
    assert ("output" in parity) is ("decoder" in sides) and np.isfinite(parity["encoded"]).all()
    assert "latents of 8 x 8 x 4" in (tmp_path / "out" / "README.md").read_text()


def imported(source, out, *more):
    assert narrow.command("import", "--from", source, "--out", out, *more) == 0
    return out


def test_import_and_export_give_back_the_very_tensors(tmp_path, capsys):
    """What transformers saved; 5.23 saves the decoder's layers under a name of its own."""
    work, out = imported(FILES / "pretraining", tmp_path / "work"), tmp_path / "out"
    assert narrow.command("export", "--workdir", work, "--to", "vit_mae", "--out", out) == 0
    before = read_state_dict(FILES / "pretraining" / WEIGHTS)
    before = {mae_names.published(k, Layout.vit_mae): v for k, v in before.items()}
    after = read_state_dict(out / WEIGHTS)
    assert set(before) == set(after)
    for key, value in before.items():
        # Positions are computed here: the last bit of a sine may differ.
        atol = 1e-7 if key.endswith(("position_embeddings", "pos_embed")) else 0
        np.testing.assert_allclose(after[key], value, rtol=0, atol=atol, err_msg=key)
    ours, theirs = (
        json.loads((p / "config.json").read_text()) for p in (out, FILES / "pretraining")
    )
    assert ours.items() <= theirs.items()
    size = sum(v.size for k, v in before.items() if "pos" not in k)
    assert f"masked autoencoder (vit_mae), {size:,} parameters" in capsys.readouterr().out
    first, again = load("pretraining"), mae_from_torch.load(str(out))
    assert again.cfg == first.cfg and again.described == first.described
    for path, leaf in tree.flatten(first.variables).items():
        np.testing.assert_array_equal(tree.flatten(again.variables)[path], leaf)


def params_of(work):
    """As --config.init_from reads them."""
    run = config.from_json(checkpoint.source_meta(str(work), "--workdir")["config"])
    shapes, _ = jax.eval_shape(run.task.build(run).init, jax.random.key(0))
    targets = {"params": sharding.on_one_device(shapes), "stats": {}}
    return checkpoint.load_weights(str(work), targets, True).params


def test_the_workdir_is_a_run_that_goes_on(tmp_path):
    """Another run takes the weights leaf by leaf; the recipe is MAE's."""
    work = imported(FILES / "original.pth", tmp_path / "work", *HEADS)
    run = config.from_json(checkpoint.source_meta(str(work), "--workdir")["config"])
    assert run.task.norm_target and run.task.mask.end == 0.75 and run.data.resolution == 8
    assert run.task.mask.kind is MaskKind.constant and run.task.model.norm_eps == 1e-6
    expected = tree.flatten(load("original").variables["params"])
    found = tree.flatten(params_of(work)["net"])
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[path], leaf) for path, leaf in expected.items())
    whole = _mae.run_of(Described(lmd.mae_b(), 0.6, False), "a test")
    assert whole.task.norm_target is False and whole.task.mask.end == 0.6


def test_dtypes_are_given_back(tmp_path):
    shutil.copytree(FILES / "encoder", tmp_path / "half")
    state = safetensors.numpy.load_file(tmp_path / "half" / WEIGHTS)
    narrow.safetensors_file(
        {k: v if "position" in k else v.astype(ml_dtypes.bfloat16) for k, v in state.items()},
        tmp_path / "half" / WEIGHTS,
    )
    work, out = imported(tmp_path / "half", tmp_path / "work"), tmp_path / "out"
    assert narrow.command("export", "--workdir", work, "--to", "vit_mae_encoder", "--out", out) == 0
    before, after = (read_state_dict(p / WEIGHTS) for p in (tmp_path / "half", out))
    assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
    assert all(np.array_equal(before[k], after[k]) for k in before if "position" not in k)


# -------------------------------------------------------------------------------------- mistakes


def state_of(name):
    with open_tensors(FILES / name) as file:
        return {key: np.array(file.read(key)) for key in file.infos}


def damaged(tmp_path, edit=None, **fields):
    """A copy of transformers' folder with other tensors or fields."""
    folder = tmp_path / "damaged"
    shutil.copytree(FILES / "pretraining", folder)
    state = state_of("pretraining/model.safetensors")
    if edit is not None:
        edit(state)
    safetensors.numpy.save_file(state, folder / WEIGHTS)
    said = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def refused(*args, match):
    with pytest.raises(UserError, match=match) as e:
        narrow.command(*args)
    return str(e.value)


def refused_import(source, *more, match):
    out = pathlib.Path(f"{source}_out")
    text = refused("import", "--from", source, "--out", out, *more, match=match)
    assert not out.exists()
    return text


def test_differences_are_listed_with_our_paths(tmp_path):
    def edit(state):
        del state["vit.layernorm.bias"]
        state["vit.pooler.dense.weight"] = np.zeros((2, 2), np.float32)
        state["decoder.decoder_embed.weight"] = np.zeros((8, 3), np.float32)

    text = refused_import(damaged(tmp_path, edit), match=r"3 difference\(s\)")
    assert "vit.layernorm.bias: missing, needed for params/encoder/norm/bias" in text
    assert "vit.pooler.dense.weight: not part of this network" in text
    assert "decoder.decoder_embed.weight: shape 8 x 3, expected 8 x 12" in text


@pytest.mark.parametrize(
    ("key", "factor", "why"),
    [
        ("vit.embeddings.position_embeddings", 1.01, "they were trained"),
        ("decoder.decoder_pos_embed", 0.0, "all zero, as in a network that was built"),
    ],
)
def test_positions_of_another_kind_are_refused_by_name(tmp_path, key, factor, why):
    def edit(state):
        state[key] *= factor

    text = refused_import(damaged(tmp_path, edit), match="differs from the fixed sines")
    assert text.startswith(key) and why in text


def test_classifiers_are_refused(tmp_path):
    refused_import(FILES / "classifier", match="describes transformers' vit; .*vit_mae")
    refused_import(FILES / "classifier" / WEIGHTS, match=r"is a classifier \(classifier.bias")
    state = state_of("original.pth") | {"head.weight": np.zeros((2, 12), np.float32)}
    safetensors.numpy.save_file(state, tmp_path / "tuned.safetensors")
    refused_import(tmp_path / "tuned.safetensors", match=r"is a classifier \(head.weight")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu' has no counterpart"),
        ({"qkv_bias": False}, "qkv_bias = False"),
        ({"image_size": [8, 4]}, r"image_size = \[8, 4\].*squares"),
        ({"decoder_intermediate_size": 8}, "decoder_intermediate_size = 8.*2 times"),
        ({"mask_ratio": 1.0}, "mask_ratio = 1.0"),
        ({"num_attention_heads": "3"}, "num_attention_heads = '3' is not a whole number"),
        ({"num_attention_heads": 5}, "cannot be built"),
        ({"layer_norm_eps": -1}, "norm_eps = -1.0; what is added to a variance"),
        ({"norm_pix_loss": 2}, "norm_pix_loss = 2 is not true or false"),
        ({"architectures": ["ViTMAEForX"]}, "describes ViTMAEForX; known are"),
    ],
)
def test_fields_without_a_counterpart_are_named(tmp_path, fields, match):
    refused_import(damaged(tmp_path, **fields), match=match)


def test_what_a_bare_file_leaves_open_is_asked(tmp_path):
    text = refused_import(FILES / "original.pth", match="give --heads N")
    assert "2 blocks of width 12" in text
    refused_import(FILES / "original.pth", "--heads", 3, match="give --decoder-heads N")
    refused_import(FILES / "original.pth", *HEADS, "--variant", "dit", match="--variant says not")
    refused_import(FILES / "pretraining", *HEADS, match="leave out --heads")
    state = state_of("original.pth")
    del state["pos_embed"]
    safetensors.numpy.save_file(state, tmp_path / "less.safetensors")
    refused_import(tmp_path / "less.safetensors", *HEADS, match="is not whole: it has no pos_embed")
    found = mae_from_torch.load(str(FILES / "encoder" / WEIGHTS), heads=3)
    assert found.cfg.norm_eps == 1e-12 and "default eps" in found.notes[0]


def test_published_sizes_are_known_by_their_shapes(tmp_path):
    """The keys of MAE's published files, without their gigabytes."""
    for make, sizes in ((lmd.mae_b, (768, 12)), (lmd.mae_h, (1280, 32))):
        shapes = {}
        for entry in mae_names.table(make(), Layout.mae):
            shape = names.stored_shape(entry, mae_names.shapes(make())[entry.path])
            shapes |= dict.fromkeys(entry.keys, shape)
        shapes |= {k: v.shape for k, v in mae_names.constants(make(), Layout.mae).items()}
        found = mae_layouts.measured(Layout.mae, shapes, None, None, "a test")
        assert found == make() and (found.width, found.depth) == sizes


def test_exports_that_cannot_be(tmp_path):
    wide = LMDConfig(**{**vars_of(LATENTS), "input_size": (8, 16)})
    with pytest.raises(UserError, match=r"input_size = \(8, 16\): it knows squares"):
        export(tmp_path / "no", wide)
    with pytest.raises(UserError, match="leaves 0 of 4 tokens visible"):
        export(tmp_path / "no", ratio=0.9)
    assert not (tmp_path / "no").exists()
    refused("export", "--workdir", FILES / "encoder", "--to", "vit_mae", "--out", tmp_path / "no",
            match="import it first")  # fmt: skip
    work = imported(FILES / "pretraining", tmp_path / "work")
    for more, match in (
        (("--to", "dit"), "goes --to vit_mae or vit_mae_encoder"),
        (("--to", "vit_mae", "--variant", "x"), "--variant says nothing"),
    ):
        refused("export", "--workdir", work, "--out", tmp_path / "no", *more, match=match)
    kl = narrow.FILES / "kl"
    refused("export", "--workdir", kl, "--to", "vit_mae", "--out", tmp_path / "no",
            match="is for masked autoencoders")  # fmt: skip


def vars_of(cfg):
    return {name: getattr(cfg, name) for name in cfg.__slots__}
