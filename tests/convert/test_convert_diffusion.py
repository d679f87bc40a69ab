"""Denoisers from PyTorch and back: what their authors' code computes, every layout, both ways."""

import json
import pathlib
from collections import Counter
from dataclasses import replace

import jax
import ml_dtypes
import narrow_nets as narrow
import numpy as np
import pytest
from etils import epath

from dcae_jax import checkpoint, config, sharding, tree
from dcae_jax.cli import _diffusion, _sample_job, _trained, sample
from dcae_jax.config import MeshConfig
from dcae_jax.convert import (
    diffusion_from_torch,
    diffusion_layouts,
    diffusion_names,
    diffusion_to_torch,
    names,
    releases,
    verify,
)
from dcae_jax.convert.diffusion_layouts import Described
from dcae_jax.convert.names import Entry, Kind, Layout
from dcae_jax.convert.releases import DIFFUSION, Family
from dcae_jax.data.latents import Manifest
from dcae_jax.errors import UserError
from dcae_jax.models.dit import DiTConfig
from dcae_jax.models.transformer import abstract_variables, count
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.nets.torch_file import read_state_dict

FILES = pathlib.Path(__file__).parent / "diffusion_files"
AUTOENCODER = narrow.FILES / "dc"  # 4 latent channels
# Fixture: file, family, what the tensors leave open, layout.
CASES = {
    "dit_diffusers": ("dit_diffusers", "dit", {}, Layout.diffusers),
    "dit": ("dit.pt", "dit", {"variant": "dit", "part": "ema", "heads": 3}, Layout.dit),
    "sit": ("dit.pt", "sit", {"variant": "sit", "part": "ema", "heads": 3}, Layout.dit),
    "uvit_ema": ("uvit_ema.pth", "uvit", {"heads": 3}, Layout.u_vit),
    "usit_official": (
        "usit_official.safetensors", "usit", {"variant": "usit", "heads": 3}, Layout.official
    ),
}  # fmt: skip


def load(name):
    file, _, more, _ = CASES[name]
    return diffusion_from_torch.load(str(FILES / file), **more)


def original(name):
    """The tensors of a fixture under their authors' names."""
    if name == "dit_diffusers":
        return read_state_dict(FILES / name / "diffusion_pytorch_model.safetensors")
    if name == "usit_official":
        return read_state_dict(FILES / f"{name}.safetensors")
    with diffusion_from_torch.from_torch.open_tensors(
        FILES / CASES[name][0], "ema" if name != "uvit_ema" else None
    ) as file:
        return {key: file.read(key) for key in file.infos}


# ------------------------------------------------------------------------- what PyTorch's code does


@pytest.mark.parametrize("name", CASES)
def test_imported_weights_compute_what_their_own_code_computes(name):
    found = load(name)
    _, family, _, layout = CASES[name]
    assert found.described.family is Family(family) and found.layout is layout
    theirs = np.load(FILES / f"{'dit' if name == 'sit' else name}.npz")
    x, expected = (theirs[k].transpose(0, 2, 3, 1) for k in ("x", "output"))
    if name == "sit":  # its code drops the second half
        expected = expected[..., : x.shape[-1]]
    inputs = {"x": x, "t": theirs["t"], "label": theirs["label"].astype(np.int32)}
    ours = diffusion_to_torch.run(found.cfg, found.variables, inputs)
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert error < 1e-5  # what the README of an export promises; measured: 1.5e-6


def test_notes_name_what_was_left_out_and_stripped():
    assert load("dit").notes == ["taken from dit.pt: ema", "left out of dit.pt: model"]
    assert load("usit_official").notes == [
        "stripped the prefix 'diffusion_model.'; left out ['autoencoder']"
    ]
    assert "ignores the variance" in load("sit").notes[-1]


def test_the_two_parts_of_a_training_checkpoint_are_told_apart():
    more = {"variant": "dit", "heads": 3}
    model = diffusion_from_torch.load(str(FILES / "dit.pt"), part="model", **more)
    for path, leaf in tree.flatten(load("dit").variables).items():
        np.testing.assert_array_equal(0.5 * leaf, tree.flatten(model.variables)[path])


# -------------------------------------------------------------------------------------- round trips


def narrow_configs():
    """family -> networks with what a table may meet."""
    uvit = {"in_channels": 4, "input_size": (4, 4), "width": 12, "heads": 3, "num_classes": 5}
    dit = uvit | {"depth": 2}
    return {
        "uvit": UViTConfig(depth=4, **uvit),
        "uvit patches": UViTConfig(
            depth=2, **uvit | {"patch": 2, "mlp_ratio": 2.0}, final_conv=True
        ),
        "usit biased": UViTConfig(depth=2, **uvit, qkv_bias=True),
        "dit": DiTConfig(**dit),
        "dit diffusers": DiTConfig(**dit, time_shift=1, mlp_norm_eps=1e-5),
        "sit patches": DiTConfig(**dit | {"patch": 2, "depth": 3}, learn_variance=False),
        "dit unbiased": DiTConfig(**dit, qkv_bias=False, time_shift=1),
    }  # fmt: skip


CONFIGS = narrow_configs()
PAIRS = [
    (name, layout) for name, cfg in CONFIGS.items()
    for layout in diffusion_names.layouts_of(cfg) if not diffusion_layouts.problems(cfg, layout)
]  # fmt: skip


def weights(cfg, seed=0):
    gen = np.random.default_rng(seed)
    return {
        path: gen.standard_normal(shape).astype(np.float32)
        for path, shape in diffusion_names.shapes(cfg).items()
    }


def described(name):
    cfg = CONFIGS[name]
    return Described(cfg, Family(name.split(" ")[0]), None, "somewhere", 0.5)


def export(name, layout, out, **more):
    values = {"variables": tree.unflatten(weights(CONFIGS[name])), "source": "a test"} | more
    cfg = CONFIGS[name]
    if layout is Layout.diffusers and not cfg.time_shift:
        pytest.skip("refused, see the test of that")
    made = diffusion_to_torch.ExportDiffusion(described(name), layout=layout, **values)
    diffusion_to_torch.write(made, epath.Path(out))
    return out


@pytest.mark.parametrize(
    ("name", "layout"), PAIRS, ids=lambda v: v if isinstance(v, str) else v.value
)
def test_every_leaf_has_keys_of_its_own_and_comes_back(name, layout):
    cfg, found = CONFIGS[name], {}
    ours, entries = weights(cfg), diffusion_names.table(cfg, layout)
    assert [e.path for e in entries] == list(ours)
    for e in entries:
        tensors = names.to_torch(e, ours[e.path])
        shape = names.stored_shape(e, ours[e.path].shape)
        assert [t.shape for t in tensors] == [shape] * len(e.keys)
        found |= {key: np.array(t) for key, t in zip(e.keys, tensors, strict=True)}
        size = sum(t.size for t in tensors)
        assert size == ours[e.path].size * (len(e.keys) if e.copies else 1)
    assert max(Counter(k for e in entries for k in e.keys).values()) == 1
    assert not diffusion_names.differences(
        cfg, layout,
        {k: t.shape for k, t in (found | diffusion_names.constants(cfg, layout)).items()},
    )  # fmt: skip
    for e in entries:
        back = names.assembled(e, ours[e.path].shape, found.__getitem__)
        assert np.array_equal(back, ours[e.path]) and back.flags.c_contiguous


def test_stacks_and_copies_against_indices():
    """Each layer, element by element as PyTorch documents its tensors."""
    leaf = np.arange(2 * 3 * 6, dtype=np.float32).reshape(2, 3, 6)  # layer, in, out
    keys = tuple(f"{i}.{role}" for i in range(2) for role in "qkv")
    tensors = dict(zip(keys, names.to_torch(Entry("p", keys, Kind.matrix, 2), leaf), strict=True))
    assert tensors["1.k"].shape == (2, 3) and tensors["1.k"][1, 2] == leaf[1, 2, 3]
    bias = np.arange(12, dtype=np.float32).reshape(2, 6)
    parts = dict(zip(keys, names.to_torch(Entry("p", keys, Kind.vector, 2), bias), strict=True))
    assert parts["0.v"].tolist() == [4, 5] and parts["1.q"].tolist() == [6, 7]
    (row,) = names.to_torch(Entry("p", ("pos",), Kind.row), bias)
    assert row.shape == (1, 2, 6) and row[0, 1, 3] == bias[1, 3]
    same = names.to_torch(Entry("p", ("a", "b"), Kind.matrix, copies=True), leaf[0])
    assert len(same) == 2 and all(np.array_equal(t, leaf[0].T) for t in same)


@pytest.mark.parametrize(
    ("name", "layout"), PAIRS, ids=lambda v: v if isinstance(v, str) else v.value
)
def test_a_folder_that_was_written_is_read_bit_for_bit(name, layout, tmp_path):
    out = export(name, layout, tmp_path / "out")
    found = diffusion_from_torch.load(str(out))
    again = tree.flatten(found.variables)
    ours = weights(CONFIGS[name])
    assert set(again) == set(ours) and not found.dtypes
    assert all(np.array_equal(again[path], ours[path]) for path in ours)
    assert not diffusion_from_torch.core_differences(found.cfg, CONFIGS[name])
    assert found.described.family is Family(name.split(" ")[0])
    if layout is not Layout.diffusers:
        assert found.cfg == CONFIGS[name] and found.described.scaling_factor == 0.5
        assert found.described.autoencoder == "somewhere"
    parity = dict(np.load(out / "parity.npz"))
    assert set(parity) == {"x", "t", "label", "output"} and parity["label"][1] == 5
    assert (
        np.isfinite(parity["output"]).all() and "relative error" in (out / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "name",
    [
        "dit_diffusers",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("dit", "uvit_ema", "usit_official")),
    ],
)
def test_import_and_export_give_back_the_very_tensors(name, tmp_path):
    file, _, more, layout = CASES[name]
    work, out, ae = tmp_path / "work", tmp_path / "out", tmp_path / "ae"
    channels = load(name).cfg.in_channels
    kl = narrow.every()["kl"]
    kl.latent_channels = channels
    narrow.export(kl, Layout.diffusers, ae)
    options = [x for k, v in more.items() for x in (f"--{k}", v)]
    assert narrow.command(
        "import", "--from", FILES / file, "--out", work, "--autoencoder", ae, *options
    ) == 0  # fmt: skip
    assert narrow.command("export", "--workdir", work, "--to", layout.value, "--out", out) == 0
    before = {k: v for k, v in original(name).items() if not k.startswith("autoencoder.")}
    after = read_state_dict(out / diffusion_to_torch.weights_file(layout))
    assert set(before) == set(after)
    for key, value in before.items():
        assert value.dtype == after[key].dtype and np.array_equal(value, after[key]), key
    if name == "dit_diffusers":
        file = "diffusion_pytorch_model.safetensors"
        assert (out / file).read_bytes() == (FILES / name / file).read_bytes()
        ours, theirs = (json.loads((p / "config.json").read_text()) for p in (out, FILES / name))
        private = {k for k in ours if k.startswith("_") and k != "_class_name"}
        assert {k: theirs[k] for k in ours.keys() - private} == {
            k: ours[k] for k in ours.keys() - private
        }


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_nan_is_taken_with_a_warning_that_names_the_layer(tmp_path, dtype):
    values = weights(CONFIGS["sit patches"])
    values["params/blocks/mlp/fc1/kernel"][1, 0, 0] = np.nan
    made = {"variables": tree.unflatten(values), "dtype": dtype}
    out = export("sit patches", Layout.dit, tmp_path / "out", **made)
    (note,) = [n for n in diffusion_from_torch.load(str(out)).notes if "NaN" in n]
    assert note == ("WARNING: NaN or infinity in 1 tensor(s); the first is blocks.1.mlp.fc1.weight")


def test_the_readme_says_whose_weights_they_are(tmp_path):
    """Of an import, of a run, and of a run under the name of a release with its network."""
    made = diffusion_to_torch.ExportDiffusion(described("uvit"), {}, Layout.official, "a test")
    whose = diffusion_to_torch._whose
    assert whose(made) == "trained with dcae_jax"
    assert "of which release, if of any, is not known" in whose(replace(made, unchanged=True))
    name = "dc-ae-f64c128-in-1.0-uvit-h-in-512px"
    named = replace(made, variant=name, dtype="bfloat16")
    assert whose(named) == (
        f"trained with dcae_jax, rounded to bfloat16; not those of {name}, which has the same "
        "network"
    )
    fields = diffusion_layouts.write(named.described, Layout.official, named.network)
    assert fields["own_weights"] is True
    own = replace(named, described=diffusion_layouts.released(name), dtype=None)
    assert whose(own) == f"those of {name}, unchanged"


def test_dtypes_follow_the_tensors_into_another_layout(tmp_path):
    cfg = CONFIGS["dit diffusers"]
    keys = [k for e in diffusion_names.table(cfg, Layout.diffusers) for k in e.keys]
    half = dict.fromkeys(keys, "bfloat16")
    dit = diffusion_names.translated(cfg, half, Layout.diffusers, Layout.dit)
    assert set(dit) == {k for e in diffusion_names.table(cfg, Layout.dit) for k in e.keys}
    odd = "transformer_blocks.1.attn1.to_k.weight"
    less = diffusion_names.translated(cfg, half | {odd: "float16"}, Layout.diffusers, Layout.dit)
    assert set(dit) - set(less) == {"blocks.1.attn.qkv.weight"}  # one tensor there, of two minds
    out = export(
        "dit", Layout.dit, tmp_path / "out", dtypes={"blocks.1.attn.qkv.weight": "bfloat16"}
    )
    found = diffusion_from_torch.load(str(out))
    assert found.dtypes == {"blocks.1.attn.qkv.weight": "bfloat16"}
    leaf = tree.flatten(found.variables)["params/blocks/attn/qkv/kernel"]
    before = weights(CONFIGS["dit"])["params/blocks/attn/qkv/kernel"]
    np.testing.assert_array_equal(leaf[0], before[0])
    np.testing.assert_array_equal(leaf[1], before[1].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_dtype_of_all_tensors(tmp_path):
    out = export("uvit", Layout.u_vit, tmp_path / "out", dtype="float16")
    tensors = read_state_dict(out / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    huge = weights(CONFIGS["uvit"]) | {"params/norm/bias": np.full(12, 1e6, np.float32)}
    with pytest.raises(UserError, match=r"params/norm/bias has values up to 1e\+06.*float16"):
        export(
            "uvit", Layout.u_vit, tmp_path / "no", dtype="float16",
            variables=tree.unflatten(huge),
        )  # fmt: skip
    assert not (tmp_path / "no").exists()


# ----------------------------------------------------------------------------------- published ones


def test_the_releases_are_the_published_networks():
    sizes = {name: count(abstract_variables(what.config())) for name, what in DIFFUSION.items()}
    prefix = "dc-ae-f32c32-in-1.0-"  # sizes: the table of the official repository, in units
    assert sizes[prefix + "uvit-s-in-512px"] == 44_788_768
    assert sizes[prefix + "usit-h-in-512px"] == 500_868_896
    assert sizes[prefix + "uvit-2b-in-512px"] == 1_580_396_576
    assert sizes[prefix + "dit-xl-in-512px"] == 674_890_048
    factors = {what.autoencoder: what.scaling_factor for what in DIFFUSION.values()}
    assert factors == {
        "dc-ae-f32c32-in-1.0": 0.3189, "dc-ae-f64c128-in-1.0": 0.2889,
        "dc-ae-1.5-f64c128": 0.5935, "sd-vae-f8": 0.18215,
    }  # fmt: skip
    for name, what in DIFFUSION.items():
        ae = releases.RELEASES[what.autoencoder].config()
        assert ae.latent_channels == what.config().in_channels, name
        assert ae.factor * what.config().input_size[0] in (256, 512), name
        assert all(releases.diffusion_named(hub) == name for hub in what.hub)
        assert releases.chosen(name).family is what.family


def shapes_of(cfg, layout):
    shapes = diffusion_names.shapes(cfg)
    found = {
        key: names.stored_shape(e, shapes[e.path])
        for e in diffusion_names.table(cfg, layout) for key in e.keys
    }  # fmt: skip
    return found | {k: v.shape for k, v in diffusion_names.constants(cfg, layout).items()}


def test_table_has_exactly_the_tensors_of_diffusers_dit_xl():
    found = {}
    for line in (FILES / "dit_xl.diffusers.txt").read_text().splitlines():
        key, shape = line.split(" ")
        found[key] = tuple(map(int, shape.split(",")))
    cfg = DIFFUSION["DiT-XL-2-256x256"].config()
    assert not diffusion_names.differences(cfg, Layout.diffusers, found) and len(found) == 538


@pytest.mark.parametrize("name", DIFFUSION)
def test_keys_and_shapes_tell_all_but_the_heads_and_the_process(name):
    what = DIFFUSION[name]
    cfg, uvit = what.config(), what.family in (Family.uvit, Family.usit)
    layout = Layout.dit if not uvit else Layout.official if what.official else Layout.u_vit
    if cfg.num_classes == 1000 and uvit and what.official:
        assert diffusion_layouts.families(layout, {}) == [Family.uvit, Family.usit]
    shapes = shapes_of(cfg, layout)
    found = diffusion_layouts.measured(layout, shapes, cfg.heads)
    assert diffusion_layouts.known_heads(layout, shapes) == cfg.heads
    found.adaptive_channels = cfg.adaptive_channels
    assert found == cfg


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_official_config_of_a_release_is_its_name(name):
    said = diffusion_layouts.released(name)
    layout = (
        Layout.official if DIFFUSION[name].official else diffusion_names.layouts_of(said.cfg)[0]
    )
    network = name if DIFFUSION[name].official else None
    fields = json.loads(json.dumps(diffusion_layouts.write(said, layout, network)))
    assert diffusion_layouts.is_ours(fields)
    again = diffusion_layouts.read(fields, "config.json", None)
    assert again.cfg == said.cfg and again.family is said.family
    assert again.autoencoder == said.autoencoder and again.scaling_factor == said.scaling_factor
    if network is None:
        return
    assert fields == {"model_name": name}
    changed = diffusion_layouts.write(said._replace(scaling_factor=0.5), layout, name)
    assert diffusion_layouts.read(changed, "config.json", None).scaling_factor == 0.5
    # Own weights for a network of that name: it says nothing of whose they are.
    own = said._replace(release=None, autoencoder="mine", scaling_factor=0.25)
    fields = diffusion_layouts.write(own, layout, name)
    assert fields["model_name"] == name and fields["own_weights"] is True
    assert diffusion_layouts.read(fields, "config.json", None) == own


def test_the_config_that_dit_was_published_with_on_the_hub():
    """transformer/config.json of facebook/DiT-XL-2-256, an older class of diffusers'."""
    fields = {
        "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0",
        "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 72,
        "cross_attention_dim": None, "dropout": 0.0, "in_channels": 4,
        "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero",
        "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28,
        "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8,
        "patch_size": 2, "sample_size": 32, "upcast_attention": False,
        "use_linear_projection": False,
    }  # fmt: skip
    assert diffusion_layouts.is_ours(fields)
    found = diffusion_layouts.read(fields, "config.json", None)
    release = DIFFUSION["DiT-XL-2-256x256"]
    assert not diffusion_from_torch.core_differences(found.cfg, release.config())
    assert found.family is Family.dit and found.cfg.time_shift == 1
    assert found.cfg.learn_variance and found.cfg.mlp_norm_eps == 1e-5
    exact = diffusion_layouts.read(fields | {"norm_eps": 1e-6}, "config.json", None)
    assert exact.cfg.mlp_norm_eps == 1e-6


# ----------------------------------------------------------------------------------- the workdir


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The workdir of an imported USiT with its autoencoder."""
    out = tmp_path_factory.mktemp("imported") / "work"
    assert narrow.command(
        "import", "--from", FILES / CASES["usit_official"][0], "--variant", "usit", "--heads", 3,
        "--autoencoder", AUTOENCODER, "--out", out,
    ) == 0  # fmt: skip
    return out


def test_an_import_is_a_run(work):
    meta = checkpoint.source_meta(str(work))
    run, manifest = config.from_json(meta["config"]), Manifest.from_json(meta["latents"])
    assert run.task.process.kind.value == "flow" and run.task.process.predict.value == "v"
    assert manifest.scaling_factor == 0.75 and manifest.shape == (4, 4, 4)
    assert manifest.resolution == 16 and manifest.num_classes == 5
    args = sample._parser().parse_args(["--from", str(work), "--out", "unused"])
    model = _sample_job._find(args, "--from", str(work))
    _, variables = _trained.load(model, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    scale = variables.constants["norm"].scale
    assert scale.tolist() == [0.75] * 4
    ours = tree.flatten(load("usit_official").variables["params"])
    read = tree.flatten(variables.params["net"])
    assert all(np.array_equal(read[path], ours[path]) for path in ours)
    assert {p.name for p in work.iterdir()} == {"checkpoints", "config.json"}


@pytest.mark.slow
def test_an_import_samples(work, tmp_path):
    args = ("--n", 8, "--sampler", "euler", "--steps", 2, "--out", tmp_path / "out")
    assert narrow.command("sample", "--from", work, *args) == 0
    shown = [(tmp_path / "out" / "images" / f"{i:06d}.png").read_bytes() for i in range(8)]
    assert len(set(shown)) == 8 and (tmp_path / "out" / "grid.png").exists()


@pytest.mark.slow
def test_a_dit_goes_to_diffusers_when_told_to_with_the_cost_said(tmp_path, capsys):
    ae = narrow.every()["kl"]
    ae.latent_channels = 3
    narrow.export(ae, Layout.diffusers, tmp_path / "ae")
    work, out = tmp_path / "work", tmp_path / "out"
    options = ("--part", "ema", "--variant", "dit", "--heads", 3, "--autoencoder", tmp_path / "ae")
    narrow.command("import", "--from", FILES / "dit.pt", "--out", work, *options)
    to = ("--to", "diffusers", "--diffusers-times", "--out", out)
    assert narrow.command("export", "--workdir", work, *to) == 0
    assert "frequencies its output changes by" in capsys.readouterr().out
    found = diffusion_from_torch.load(str(out))
    ours, again = (tree.flatten(x.variables) for x in (load("dit"), found))
    assert all(np.array_equal(ours[path], again[path]) for path in ours)
    assert (found.cfg.time_shift, found.cfg.mlp_norm_eps) == (1, 1e-6)
    # What is stored is what those frequencies give, and not what it was trained with.
    stored = dict(np.load(out / "parity.npz"))
    inputs = {key: stored[key] for key in ("x", "t", "label")}
    kept = diffusion_to_torch.run(found.cfg, found.variables, inputs)
    changed = diffusion_to_torch.run(load("dit").cfg, found.variables, inputs)
    np.testing.assert_allclose(kept, stored["output"], atol=1e-5)  # rounding; values near 1
    assert np.abs(changed - kept).max() > 1e-3


@pytest.mark.parametrize(
    ("family", "kind", "predict", "variance"),
    [
        ("uvit", "scaled_linear", "eps", False), ("usit", "flow", "v", False),
        ("dit", "ddpm", "eps", True), ("sit", "flow", "v", False),
    ],
)  # fmt: skip
def test_the_config_of_an_import_is_that_of_the_process(family, kind, predict, variance):
    name = {"uvit": "uvit", "usit": "usit biased", "dit": "dit", "sit": "sit patches"}[family]
    run = _diffusion.run_of(described(name), "a test")
    config.validate(config.resolve(run))
    process = run.task.process
    assert (process.kind.value, process.predict.value, process.learn_variance) == (
        kind, predict, variance
    )  # fmt: skip
    assert _diffusion.family(run.task) is Family(family)
    assert all(not e.sampler.process_problems(process) for e in run.evals if hasattr(e, "sampler"))
    assert config.from_json(json.loads(config.dumps(run))) == run


def test_what_a_release_tells_needs_no_options():
    said = diffusion_layouts.released("dc-ae-f64c128-in-1.0-uvit-h-in-512px")
    manifest, lines = _diffusion.latents_of(said, None, None)
    assert manifest.autoencoder == "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers"
    assert manifest.variant == "dc-ae-f64c128-in-1.0" and manifest.scaling_factor == 0.2889
    assert manifest.resolution == 512 and manifest.encoder == "" and "0.2889" in lines[0]
    manifest, _ = _diffusion.latents_of(said, None, 0.5)
    assert manifest.scaling_factor == 0.5
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@pytest.mark.slow
def test_an_official_file_gives_its_autoencoder_when_asked(tmp_path):
    ae = narrow.export(narrow.every()["dc-ae-f32c32-in-1.0"], Layout.official, tmp_path / "ae")
    both = {f"autoencoder.{k}": v for k, v in read_state_dict(ae / "model.safetensors").items()}
    both |= {k: v for k, v in original("usit_official").items() if k.startswith("diffusion_")}
    narrow.safetensors_file(both, tmp_path / "both" / "model.safetensors")
    (tmp_path / "both" / "config.json").write_text((ae / "config.json").read_text())
    both = tmp_path / "both"
    assert diffusion_from_torch.recognises(str(both))
    args = ("import", "--from", both, "--part", "autoencoder", "--out", tmp_path / "work")
    assert narrow.command(*args) == 0
    meta = checkpoint.source_meta(str(tmp_path / "work"))
    assert "autoencoder" in meta and "latents" not in meta


@pytest.mark.skipif(bool(verify.missing()), reason="needs torch and diffusers")
@pytest.mark.parametrize(
    ("name", "layout"), [("dit diffusers", Layout.diffusers), ("dit", Layout.dit),
                         ("dit", Layout.official), ("sit patches", Layout.dit)],
)  # fmt: skip
def test_diffusers_agrees_with_what_was_written(name, layout, tmp_path):
    out = export(name, layout, tmp_path / "out")
    made = diffusion_to_torch.ExportDiffusion(described(name), {}, layout, "a test")
    verify.check_diffusion(epath.Path(out), verify.verify_diffusion(epath.Path(out), made))
