"""Denoisers that cannot be imported or exported: one clear message, nothing written."""

import json
import pathlib
import shutil

import narrow_nets as narrow
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from dcae_jax import checkpoint, tree
from dcae_jax.cli import _diffusion
from dcae_jax.convert import (
    diffusion_from_torch,
    diffusion_layouts,
    diffusion_names,
    diffusion_to_torch,
    releases,
    verify,
)
from dcae_jax.convert.diffusion_layouts import Described
from dcae_jax.convert.names import Layout
from dcae_jax.convert.releases import Family
from dcae_jax.errors import UserError
from dcae_jax.models.dit import DiTConfig, Position
from dcae_jax.models.transformer import MLPKind
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.nets.torch_file import open_tensors

FILES = pathlib.Path(__file__).parent / "diffusion_files"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DIT = ("--part", "ema", "--variant", "dit", "--heads", 3)
USIT = FILES / "usit_official.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of diffusers' folder, to be damaged."""
    shutil.copytree(FILES / "dit_diffusers", tmp_path / "dit")
    return tmp_path / "dit"


def refused(*args, match):
    with pytest.raises(UserError, match=match) as e:
        narrow.command(*args)
    assert len(str(e.value).splitlines()) < 30
    return str(e.value)


def refused_import(source, *more, match):
    out = pathlib.Path(str(source) + "_out")
    text = refused("import", "--from", source, "--out", out, *more, match=match)
    assert not out.exists()
    return text


def state_of(name, part=None):
    with open_tensors(FILES / name, part) as file:
        return {key: np.array(file.read(key)) for key in file.infos}


def saved(tmp_path, state):
    """A bare file of tensors."""
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def change(folder, edit):
    state = safetensors.numpy.load_file(folder / WEIGHTS)
    edit(state)
    safetensors.numpy.save_file(state, folder / WEIGHTS)


def describe(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


# ----------------------------------------------------------------------------------- what is open


def test_what_tensors_leave_open_is_asked_for(tmp_path):
    dit = FILES / "dit.pt"
    refused_import(dit, match="holds several sets of weights: model, ema; say which with --part")
    refused_import(dit, "--part", "ema", match="may be dit or sit, which differ in nothing but")
    refused_import(USIT, match="may be uvit or usit.*--variant")
    refused_import(
        USIT, "--variant", "usit", match="depth 2 and width 12.*no known size.*--heads N"
    )
    refused_import(USIT, "--variant", "usit", "--heads", 5, match="not divisible by heads = 5")
    refused_import(
        USIT, "--variant", "usit", "--heads", 3, match="which autoencoder.*--autoencoder"
    )
    refused_import(FILES / "uvit_ema.pth", "--heads", 3, match="--autoencoder")


def test_a_part_of_what_has_none_is_refused(tmp_path):
    refused_import(USIT, "--part", "nonsense", match="has no parts such as 'nonsense'; leave out")
    with pytest.raises(UserError, match="is a workdir; --params chooses its weights"):
        workdir = tmp_path / "checkpoints" / "0"
        workdir.mkdir(parents=True)
        _diffusion.is_run(str(tmp_path), "ema")


def test_candidates_are_named_with_their_size_and_releases():
    cfg = releases.DIFFUSION["dc-ae-f32c32-in-1.0-usit-h-in-512px"].config()
    shapes = {
        "patch_embed.proj.weight": (cfg.width, 32, 1, 1),
        **{f"in_blocks.{i}.norm1.weight": (cfg.width,) for i in range(14)},
    }
    with pytest.raises(UserError, match="may be uvit-h or usit-h") as e:
        diffusion_from_torch._family(Layout.official, shapes, None, "it")
    assert "dc-ae-f64c128-in-1.0-uvit-h-in-512px-train2000k" in str(e.value)
    assert "usit-h-in-512px" in str(e.value) and "uvit-2b" not in str(e.value)


def test_variants_that_cannot_be(tmp_path):
    text = refused_import(USIT, "--variant", "usit-hh", match="no diffusion model is called 'usit")
    assert "usit-s, usit-m, usit-l, usit-h, usit-2b" in text
    refused_import(
        USIT, "--variant", "dit", match="is no dit: its tensors are those of uvit or usit"
    )
    refused_import(USIT, "--variant", "usit-h", match="width 12, and usit-h has depth 28 and width")
    text = refused_import(
        USIT, "--variant", "dc-ae-f32c32-in-1.0-usit-h-in-512px", "--heads", 3,
        match=r"is not dc-ae-f32c32-in-1\.0-usit-h",
    )  # fmt: skip
    assert "width: 12, 1152" in text and "in_channels: 4, 32" in text
    refused_import(FILES / "dit_diffusers", "--variant", "sit", match="describes a dit, not a sit")


def test_autoencoders_and_factors_that_do_not_fit(tmp_path):
    dc = narrow.FILES / "dc"
    refused_import(
        FILES / "dit.pt", *DIT, "--autoencoder", dc, match="latents of 4 channels, and.*take 3"
    )
    plain = ("--variant", "usit", "--heads", 3, "--autoencoder")
    refused_import(USIT, *plain, dc, "--scaling-factor", -1, match="-1.0 is not positive")
    shutil.copytree(dc, tmp_path / "ae")
    config = json.loads((dc / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "ae" / "config.json").write_text(json.dumps(config))
    refused_import(USIT, *plain, tmp_path / "ae", match="factor.*unknown.*--scaling-factor X")
    refused_import(dc, "--heads", 3, match="--heads is for diffusion models")


# ---------------------------------------------------------------------------------------- tensors


def test_missing_extra_and_misshapen_tensors_are_all_named(folder):
    def edit(state):
        del state["transformer_blocks.1.attn1.to_k.bias"]
        state["more.weight"] = np.ones((2, 3), np.float32)
        state["transformer_blocks.0.ff.net.2.weight"] = np.ones((12, 47), np.float32)

    change(folder, edit)
    text = refused_import(folder, match=r"network of a dit of its size \(3 difference\(s\)\)")
    path = "params/blocks/attn/qkv/bias[1]"
    assert f"transformer_blocks.1.attn1.to_k.bias: missing, needed for {path}" in text
    assert "more.weight: not part of this network" in text
    assert "net.2.weight: shape 12 x 47, expected 12 x 48 for params/blocks/mlp/fc2/ker" in text


def test_copies_that_differ_are_refused(folder):
    key = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    change(folder, lambda state: state.update({key: state[key] + 1}))
    refused_import(folder, match=rf"{key} differs from transformer_blocks\.0.*must be equal")


def test_positions_that_are_not_the_fixed_ones_are_refused(tmp_path, folder):
    state = state_of("dit.pt", "ema")
    state["pos_embed"] = state["pos_embed"] + np.float32(0.01)
    path = saved(tmp_path, state)
    refused_import(path, *DIT[2:], match=r"pos_embed of .* by 0\.01: these positions were trained")
    state["pos_embed"] = np.zeros((1, 6, 12), np.float32)
    refused_import(saved(tmp_path, state), *DIT[2:], match="6 positions, which is no square")
    fixed = diffusion_names.optional(
        DiTConfig(input_size=(4, 4), patch=2, width=12, heads=3), Layout.diffusers
    )
    change(folder, lambda state: state.update(fixed))
    assert diffusion_from_torch.load(str(folder)).cfg.depth == 2  # as older versions write it
    wrong = {k: np.zeros_like(v) for k, v in fixed.items()}
    change(folder, lambda state: state.update(wrong))
    refused_import(folder, match=r"pos_embed\.pos_embed of .* differs from the fixed sines")


@pytest.mark.parametrize(
    ("gone", "match"),
    [
        ("label_emb.weight", "is not whole: it has no label_emb"),
        ("pos_embed", "is not whole: it has no pos_embed"),
        ("mid_block.norm1.bias", "mid_block.norm1.bias: missing"),
        ("out_blocks.0.skip_linear.weight", "skip_linear.weight: missing, needed for .*skip"),
    ],
)
def test_parts_of_a_uvit_that_are_gone(tmp_path, gone, match):
    state = state_of("uvit_ema.pth")
    del state[gone]
    refused_import(saved(tmp_path, state), "--heads", 3, match=match)


def test_a_time_mlp_is_no_part_of_this_uvit(tmp_path):
    state = state_of("uvit_ema.pth") | {"time_embed.0.weight": np.ones((48, 12), np.float32)}
    path = saved(tmp_path, state)
    refused_import(path, "--heads", 3, match=r"time_embed\.0\.weight: not part of this network")


def test_float64_is_refused(folder):
    change(folder, lambda s: s.update({"proj_out_2.bias": np.zeros(24)}))
    refused_import(folder, match=r"(?s)float32 cannot hold.*proj_out_2\.bias: float64")


# ----------------------------------------------------------------------------------- config.json


def test_diffusers_weights_without_their_config(folder):
    refused_import(folder / WEIGHTS, match=r"only its config\.json tells how many heads")
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    refused_import(folder, match="describes UNet2DModel; known are .*DiTTransformer2D")
    (folder / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    refused_import(folder, match="describes another network than the tensors.*DiTTransformer2D")


def test_a_pipeline_folder_names_its_parts(folder, tmp_path):
    (tmp_path / "pipe").mkdir()
    shutil.move(folder, tmp_path / "pipe" / "transformer")
    refused_import(tmp_path / "pipe", match="its diffusion model is in transformer/")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"norm_type": "layer_norm"}, "norm_type = 'layer_norm'"),
        ({"activation_fn": "geglu"}, "activation_fn = 'geglu'"),
        ({"out_channels": 5}, "out_channels = 5.*it is 3, or twice that"),
        ({"new_thing": 3}, "unknown field.*new_thing"),
        ({"out_channels": 3}, "leaves open on which process.*--variant sit"),
        ({"num_layers": 3}, r"transformer_blocks\.2\..*missing"),
        ({"sample_size": 5}, "not a multiple of patch"),
        ({"num_layers": "2"}, "num_layers = '2' is not a whole number"),
        ({"norm_eps": None}, "norm_eps = None is not a number"),
        ({"_dcae_jax_family": "dit-xl"}, "_dcae_jax_family = 'dit-xl' has no counterpart"),
    ],
)
def test_fields_without_a_counterpart_are_named(folder, fields, why):
    describe(folder, **fields)
    refused_import(folder, match=rf"(?s){why}")


@pytest.mark.slow
def test_an_import_that_was_killed_is_started_anew_by_the_same_command(monkeypatch, tmp_path):
    def interrupted(checkpoints, state, meta):
        (checkpoints.folder / "0.partial").mkdir(parents=True)
        raise KeyboardInterrupt

    work, ae = tmp_path / "work", narrow.FILES / "dc"
    command = (
        "import", "--from", USIT, "--variant", "usit", "--heads", 3, "--autoencoder", ae,
        "--out", work,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            narrow.command(*command)
    to = ("--to", "u_vit", "--out", tmp_path / "out")
    refused("export", "--workdir", work, *to, match="is unfinished: what wrote it did not end")
    assert narrow.command(*command) == 0
    assert {p.name for p in work.iterdir()} == {"checkpoints", "config.json"}
    assert narrow.command("export", "--workdir", work, *to) == 0
    refused("export", "--workdir", work, *to, match="exists and is not empty")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "a custom model needs its config under the key dcae_jax"),
        ({"dcae_jax": {"class": "dcae_jax.models.dcae:DCAEConfig"}}, "it is a DCAEConfig"),
        ({"dcae_jax": {"class": "dcae_jax.models.uvit:UViTConfig"}}, "family = '?' has no counter"),
    ],
)
def test_own_descriptions_that_are_none(fields, why, tmp_path):
    state = {"model_name": "custom", "family": "?"} | fields
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "config.json").write_text(json.dumps(state))
    shutil.copy(USIT, tmp_path / "dit" / "model.safetensors")
    refused_import(tmp_path / "dit", match=why.replace("?", r"\?"))


# ----------------------------------------------------------------------------------------- exports


def exported(cfg, layout, out, family=Family.dit):
    shapes = diffusion_names.shapes(cfg)
    variables = tree.unflatten({p: np.ones(s, np.float32) for p, s in shapes.items()})
    said = Described(cfg, family)
    made = diffusion_to_torch.ExportDiffusion(said, variables, layout, "a test")
    diffusion_to_torch.write(made, epath.Path(out))


SMALL = {"in_channels": 4, "input_size": (4, 4), "width": 12, "depth": 2, "heads": 3}
CANNOT = [
    (UViTConfig(**SMALL), Layout.diffusers, "it has no UViT; there are u_vit, official"),
    (DiTConfig(**SMALL), Layout.u_vit, "it has no DiT; there are dit, official, diffusers"),
    (UViTConfig(**SMALL, final_conv=True), Layout.official, "final_conv = True.*--to u_vit has"),
    (UViTConfig(**SMALL, qk_norm=True, mlp=MLPKind.swiglu), Layout.u_vit, "(?s)swiglu.*qk_norm"),
    (UViTConfig(**SMALL | {"input_size": (4, 6)}), Layout.u_vit, r"input_size = \(4, 6\)"),
    (DiTConfig(**SMALL, position=Position.rope), Layout.dit, "position = rope: it knows sincos"),
    (DiTConfig(**SMALL, time_shift=1, mlp_norm_eps=1e-5), Layout.dit, "(?s)time_shift = 1.*1e-05"),
    (DiTConfig(**SMALL, qkv_bias=False), Layout.official, "qkv_bias = False"),
    (DiTConfig(**SMALL | {"mlp_ratio": 2.0}), Layout.diffusers, "mlp_ratio = 2: it knows 4"),
    (DiTConfig(**SMALL), Layout.diffusers, "(?s)exponents.*--to dit, or give --diffusers-times"),
]


@pytest.mark.parametrize(("cfg", "layout", "why"), CANNOT, ids=[str(i) for i in range(len(CANNOT))])
def test_networks_that_a_layout_cannot_express(cfg, layout, why, tmp_path):
    with pytest.raises(UserError, match=why):
        exported(cfg, layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exports_that_cannot_be(tmp_path):
    work, ae = tmp_path / "work", narrow.FILES / "dc"
    narrow.command(
        "import", "--from", USIT, "--variant", "usit", "--heads", 3, "--autoencoder", ae,
        "--out", work,
    )  # fmt: skip
    out = ("--out", tmp_path / "out")
    to = ("export", "--workdir", work, *out, "--to")
    refused(*to, "diffusers", match="it has no UViT; there are u_vit, official")
    refused(*to, "u_vit", "--verify", match="--verify: no PyTorch package has U-ViT")
    refused(*to, "u_vit", "--diffusers-times", match="is for a DiT exported --to diffusers")
    release = "dc-ae-f32c32-in-1.0-usit-h-in-512px"
    refused(*to, "official", "--variant", release, match="(?s)not the network of.*width: 12, 1152")
    refused(*to, "official", "--variant", "usit-xx", match="no released diffusion model is called")
    fb = "imagenet256_uvit_huge"
    refused(*to, "official", "--variant", fb, match="official code knows no network by this name")
    refused(*to, "u_vit", "--scaling-factor", 0, match=r"--scaling-factor 0\.0 is not positive")
    raw = ("export", "--workdir", FILES / "dit_diffusers", *out, "--to", "diffusers")
    refused(*raw, match="a diffusion model in a PyTorch layout; import it first .*and export that")
    for option in (("--to", "u_vit"), ("--to", "diffusers", "--diffusers-times")):
        refused("export", "--workdir", ae, *out, *option, match="is for diffusion models;")
    assert not (tmp_path / "out").exists()
    refused("import", "--from", USIT, "--out", work, match="exists and is not empty")


def test_a_process_that_nobody_else_has_is_not_exported():
    said = Described(UViTConfig(**SMALL), Family.uvit)
    run = _diffusion.run_of(said, "a test")
    assert _diffusion.family(run.task) is Family.uvit
    run.task.process.predict = type(run.task.process.predict).x0
    with pytest.raises(UserError, match="UViT that predicts x0 of the scaled_linear process"):
        _diffusion.family(run.task)


@pytest.mark.parametrize("bad", [2e-5, np.nan, np.inf])
def test_results_that_disagree_are_an_error(bad, tmp_path):
    verify.check_diffusion(epath.Path(tmp_path), 9e-6)
    with pytest.raises(UserError, match="differ from JAX's"):
        verify.check_diffusion(epath.Path(tmp_path), float(bad))


def test_names_that_belong_to_no_denoiser():
    assert diffusion_names.layout_of(["encoder.stages.1.x", "blocks.0.y"]) is None
    assert not diffusion_layouts.is_ours({"_class_name": "Transformer2DModel"})
    assert not diffusion_from_torch.recognises(str(narrow.FILES / "dc"))
    assert not diffusion_from_torch.recognises(str(USIT), "autoencoder")
