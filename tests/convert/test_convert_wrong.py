"""What cannot be imported or exported is refused in one sentence, and nothing is written."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import fake_hub
import narrow_nets as narrow
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from dcae_jax import autoencoder
from dcae_jax.convert import from_torch, layouts, names, releases, verify
from dcae_jax.convert.names import Layout
from dcae_jax.errors import UserError

FILES, ROOT = narrow.FILES, pathlib.Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of diffusers' folder, to be damaged."""
    shutil.copytree(FILES / "dc", tmp_path / "dc")
    return tmp_path / "dc"


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


def change(folder, edit):
    """Applies `edit` to the folder's tensors."""
    state = safetensors.numpy.load_file(folder / WEIGHTS)
    edit(state)
    safetensors.numpy.save_file(state, folder / WEIGHTS)


def describe(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


# --------------------------------------------------------------------------------------- tensors


def test_missing_extra_and_misshapen_tensors_are_all_named(folder):
    def edit(state):
        del state["encoder.conv_out.bias"]
        state["decoder.more.weight"] = np.ones((2, 3), np.float32)
        state["decoder.conv_in.weight"] = np.ones((8, 4, 3, 2), np.float32)

    change(folder, edit)
    text = refused_import(folder, match=r"its config\.json \(3 difference\(s\)\)")
    assert "encoder.conv_out.bias: missing, needed for params/encoder/conv_out/bias" in text
    assert "decoder.more.weight: not part of this network" in text
    assert "decoder.conv_in.weight: shape 8 x 4 x 3 x 2, expected 8 x 4 x 3 x 3" in text


def test_many_differences_are_counted_and_twenty_shown(folder):
    describe(folder, encoder_block_out_channels=[8, 8, 16])
    text = refused_import(folder, match="difference")
    assert sum(line.startswith("  - ") for line in text.splitlines()) == 21
    assert "... and " in text


@pytest.mark.parametrize("keep", [0, 5, 400, 20_000, -1])
def test_truncated_safetensors(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refused_import(folder, match=rf"{WEIGHTS} cannot be read.*fetch it again")


def test_a_header_that_lies_is_noticed(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data.replace(b'"shape":[8,', b'"shape":[9,'))
    refused_import(folder, match=r"cannot be read .* bytes")


def test_float64_is_refused_since_float32_cannot_hold_it(folder):
    change(folder, lambda s: s.update({"encoder.conv_out.bias": np.zeros(4)}))
    refused_import(folder, match=r"(?s)float32 cannot hold.*conv_out\.bias: float64.*tensor\.float")


def test_shards_that_are_not_there(tmp_path):
    shutil.copytree(FILES / "dc_sharded", tmp_path / "dc")
    next((tmp_path / "dc").glob("*-00002-*")).unlink()
    refused_import(tmp_path / "dc", match="names .*00002.*which is not there")


def test_folders_without_config_or_weights(folder, tmp_path):
    (folder / "config.json").rename(tmp_path / "config.json")
    refused_import(folder, match=r"no config\.json; give a folder")
    (folder / "vae").mkdir()
    (tmp_path / "config.json").rename(folder / "vae" / "config.json")
    refused_import(folder, match="its autoencoder is in vae/")
    refused_import(folder / "vae", match="holds no weights")
    refused_import(folder / "vae" / "config.json", match="give the folder that it describes")
    describe(folder / "vae", _class_name="UNet2DConditionModel")
    refused_import(folder / "vae", match="describes UNet2DConditionModel")
    refused_import(tmp_path / "nothing", match="does not exist; give a folder")
    with pytest.raises(UserError, match="does not exist; give a workdir, a folder"):
        autoencoder.load(str(tmp_path / "nothing"))


def test_other_networks_are_named(folder):
    describe(folder, _class_name="UNet2DModel")
    refused_import(folder, match="describes UNet2DModel")
    describe(folder, _class_name="AutoencoderDC")
    change(folder, lambda s: [s.update({f"net.{k}": s.pop(k)}) for k in list(s)])
    refused_import(folder, match="holds no autoencoder that is known: its tensors are called net")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"decoder_act_fns": "gelu"}, "decoder_act_fns = 'gelu'"),
        ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types = 'layer_norm'"),
        ({"decoder_qkv_multiscales": [[], [], [3]]}, "decoder_qkv_multiscales = .*known are"),
        ({"decoder_in_shortcut": False}, "decoder_in_shortcut = False"),
        ({"new_thing": 3}, "unknown field.*new_thing"),
        ({"encoder_block_types": ["ResBlock"]}, "encoder_block_types .* has 3 stages"),
        ({"encoder_layers_per_block": [0, 1, 0]}, "only stage 0 may be empty"),
    ],
)
def test_fields_without_a_counterpart_are_named(folder, fields, why):
    describe(folder, **fields)
    refused_import(folder, match=why)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"shift_factor": 0.1159}, "shift_factor = 0.1159"),
        ({"latents_mean": [0.1, 0.2]}, "latents_mean"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types"),
        ({"out_channels": 4}, "out_channels = 4"),
    ],
)
def test_fields_of_a_kl_autoencoder(tmp_path, fields, why):
    shutil.copytree(FILES / "kl", tmp_path / "kl")
    describe(tmp_path / "kl", **fields)
    refused_import(tmp_path / "kl", match=why)


# Of every kind that JSON has, and numbers that are no sizes and no factors.
JUNK = (
    None, True, "x", "", 5, -1, 0, 1.5, [], {}, [None], ["x"], [5], [[]], [[5]], [["x"]], [{}],
    float("nan"), float("inf"), -2.0, [0, 0, 0], [-4, 4, 8], [4, 4, 8, 8],
)  # fmt: skip


@pytest.mark.parametrize("name", ["dc", "kl"])
def test_no_value_of_any_field_ends_in_a_traceback(name):
    """Each is taken, or refused as the user mistake that it is."""
    own = json.loads((FILES / name / "config.json").read_text())
    refusals = 0
    for key in own:
        for value in JUNK:
            try:
                found = layouts.read(own | {key: value}, "config.json")
                if not found.cfg.problems():
                    names.table(found.cfg, Layout.diffusers)
            except UserError as e:
                refusals += 1
                assert "config.json" in str(e)
    assert refusals > 150


@pytest.mark.parametrize("value", [0, -0.3, "abc", float("nan"), float("inf"), True, [0.3]])
def test_a_scaling_factor_is_a_positive_number(folder, value):
    describe(folder, scaling_factor=value)
    refused_import(folder, match=r"scaling_factor = .* is not a positive number")
    (folder / "config.json").write_text(
        json.dumps({"model_name": "dc-ae-f32c32-in-1.0", "scaling_factor": value})
    )
    refused_import(folder, match=r"scaling_factor = .* is not a positive number")


@pytest.mark.parametrize("text", ["null", "5", "[1]", '"x"'])
def test_a_config_json_without_fields(folder, text):
    (folder / "config.json").write_text(text)
    refused_import(folder, match=r"config\.json holds .*, not the fields of an autoencoder")


@pytest.mark.parametrize("own", [5, None, {}, {"class": 3}, {"class": "dcae_jax.models.dcae:X"}])
def test_a_custom_model_that_is_none(folder, own):
    text = json.dumps({"model_name": "custom", "dcae_jax": own})
    (folder / "config.json").write_text(text)
    refused_import(folder, match="no config of a DC-AE|no config class")


def test_values_of_a_custom_model_are_checked(folder):
    cfg = layouts.config_lib.to_json(narrow.every()["dc-ae-f32c32-in-1.0"])
    for key in cfg.keys() - {"class"}:
        for value in (None, "x", [], {}, 1.5):
            text = json.dumps({"model_name": "custom", "dcae_jax": cfg | {key: value}})
            (folder / "config.json").write_text(text)
            with pytest.raises(UserError):
                from_torch.load(str(folder))


def test_weights_with_nan_are_taken_with_a_warning(folder, tmp_path, capsys):
    def edit(state):
        state["decoder.conv_in.bias"][2] = np.nan
        state["encoder.conv_out.weight"][0, 0, 0, 0] = np.inf

    change(folder, edit)
    assert narrow.command("import", "--from", folder, "--out", tmp_path / "work") == 0
    warning = "WARNING: NaN or infinity in 2 tensor(s); the first is "
    told = capsys.readouterr().out
    assert f"{warning}decoder.conv_in.bias" in told or f"{warning}encoder.conv_out.weight" in told
    out = ("--to", "diffusers", "--out", tmp_path / "out")
    narrow.command("export", "--workdir", FILES / "dc", *out)
    assert "WARNING" not in capsys.readouterr().out
    export = ("export", "--workdir", tmp_path / "work", "--to", "official", "--out", tmp_path / "b")
    with contextlib.suppress(UserError):  # of PyTorch where it is installed
        narrow.command(*export)
    assert warning in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- pickles


def test_unreadable_pickles(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"this is no pickle at all")
    refused_import(tmp_path / "a.pth", match=r"a\.pth cannot be read")
    refused_import(FILES / "namespace.pth", match=r"namespace\.pth holds more than tensors")
    (tmp_path / "cut.pth").write_bytes((FILES / "training.pth").read_bytes()[:9000])
    refused_import(tmp_path / "cut.pth", match=r"cut\.pth cannot be read")


# --------------------------------------------------------------------------------------- releases


def bare(tmp_path, release, layout, edit=lambda tensors: tensors):
    """A bare file of a release of full size; its bytes are holes."""
    cfg = releases.RELEASES[release].config()
    tensors = edit(narrow.tensors_of(cfg, layout))
    return narrow.bare(tmp_path / "model.safetensors", tensors)


def test_a_bare_file_that_fits_several_releases_is_refused_with_their_factors(tmp_path):
    path = bare(tmp_path, "dc-ae-f32c32-mix-1.0", Layout.official)
    text = refused_import(path, match="fits 3 releases.*scaling factor only")
    assert "dc-ae-f32c32-in-1.0 (scaling factor 0.3189)" in text
    assert "dc-ae-f32c32-mix-1.0 (scaling factor 0.4552)" in text
    assert "dc-ae-f32c32-in-1.0-256px (scaling factor unknown)" in text and "--variant" in text
    text = refused_import(path, "--variant", "dc-ae-f64c128-in-1.0", match="is not dc-ae-f64c128")
    assert "It fits dc-ae-f32c32-in-1.0, " in text and "decoder.stages.6" in text
    refused_import(path, "--variant", "dc-ae-f32c32-inn-1.0", match="did you mean dc-ae-f32c32-in")


def test_a_bare_file_that_fits_none_names_the_nearest(tmp_path):
    def edit(tensors):
        return {k: v for k, v in tensors.items() if k != "decoder.conv_in.bias"}

    path = bare(tmp_path, "dc-ae-lite-f32c32-sana-1.1", Layout.diffusers, edit)
    text = refused_import(path, match="fits no release; the nearest is dc-ae-lite-f32c32-sana-1.1")
    assert "1 difference(s)" in text and "decoder.conv_in.bias: missing" in text


def described(tmp_path, release, layout, named=None):
    path = bare(tmp_path, release, layout)
    with from_torch.open_tensors(path) as file:
        tensors = from_torch._unwrap(from_torch._merged([file]))
        return from_torch._describe(None, tensors, named, str(path))


@pytest.mark.parametrize("layout", names.AUTOENCODER_LAYOUTS)
def test_a_bare_file_that_fits_one_release_has_its_network_but_perhaps_other_weights(
    tmp_path, layout
):
    release = "dc-ae-1.5-f64c128"
    found = described(tmp_path, release, layout)
    assert found.release is None and found.scaling_factor is None and found.layout is layout
    assert not layouts.network_differences(found.cfg, releases.RELEASES[release].config())
    assert not found.cfg.adaptive_channels, "which is a property of the release"
    assert from_torch._hint(found) == [f"the network of {release}: --variant NAME {THESE}"]
    found = described(tmp_path, release, layout, named=release)
    assert found.release == release and found.scaling_factor == 0.5935
    assert found.cfg.adaptive_channels and not from_torch._hint(found)


THESE = "if these are its weights"


def test_a_bare_file_like_sd_vae_gets_no_factor_since_that_of_sdxl_is_another(
    tmp_path, monkeypatch, capsys
):
    """SDXL's VAE has the keys and shapes of SD-VAE; stabilityai/sdxl-vae states 0.13025."""
    own = releases.RELEASES["sd-vae-f8"]
    cfg = from_torch.load(str(FILES / "kl")).cfg  # as the network of that release, but narrow
    monkeypatch.setitem(releases.RELEASES, "sd-vae-f8", own._replace(config=lambda: cfg))
    source = FILES / "kl" / WEIGHTS
    assert narrow.command("import", "--from", source, "--out", tmp_path / "a") == 0
    told = capsys.readouterr().out
    assert "no known release" in told and "scaling factor unknown" in told
    assert "network of sd-vae-f8 (and of SDXL's VAE, scaling factor 0.13025)" in told
    record = json.loads((tmp_path / "a" / "config.json").read_text())["autoencoder"]
    assert record["release"] is None and record["scaling_factor"] is None
    to = ("--to", "diffusers", "--out", tmp_path / "out")
    refused("export", "--workdir", tmp_path / "a", *to, match="(?s)unknown.*measure it")
    more = ("--variant", "sd-vae-f8")
    assert narrow.command("import", "--from", source, "--out", tmp_path / "b", *more) == 0
    assert "kl" in str(source) and "scaling factor 0.18215" in capsys.readouterr().out


def test_the_variant_decides_what_the_tensors_leave_open(tmp_path):
    for release, factor, adaptive in (
        ("dc-ae-f32c128-1.1", None, False), ("dc-ae-1.5-f32c128", None, True),
    ):  # fmt: skip
        found = described(tmp_path, release, Layout.official, named=release)
        assert found.scaling_factor == factor and found.cfg.adaptive_channels is adaptive
    found = described(tmp_path, "dc-ae-f32c32-in-1.0", Layout.official, "dc-ae-f32c32-mix-1.0")
    assert found.scaling_factor == 0.4552


def test_a_variant_that_contradicts_config_json_is_refused(folder):
    refused_import(folder, "--variant", "dc-ae-f32c32-in-1.0", match="is not that of dc-ae-f32c32")
    mix = releases.RELEASES["dc-ae-f32c32-mix-1.0"]
    fields = layouts.write(mix.config(), Layout.diffusers, mix.scaling_factor, None)
    (folder / "config.json").write_text(json.dumps(fields))
    text = refused_import(folder, "--variant", "dc-ae-f32c32-in-1.0", match="is not that of")
    assert "scaling_factor: 0.4552, 0.3189" in text and "latent_channels" not in text
    (folder / "config.json").write_text('{"model_name": "dc-ae-f32c32-mix-1.0"}')
    text = refused_import(folder, "--variant", "dc-ae-f32c32-in-1.0", match="is not that of")
    assert "model_name: dc-ae-f32c32-mix-1.0, dc-ae-f32c32-in-1.0" in text
    (folder / "config.json").write_text('{"model_name": "dc-ae-f32c33"}')
    refused_import(folder, match="no release is called 'dc-ae-f32c33'; there are")


# Facts of the release pages and of diffusers' converter; None: published nowhere.
FACTORS = {
    "dc-ae-f32c32-in-1.0": 0.3189, "dc-ae-f32c32-in-1.0-256px": None,
    "dc-ae-f32c32-mix-1.0": 0.4552, "dc-ae-f64c128-in-1.0": 0.2889,
    "dc-ae-f64c128-mix-1.0": 0.4538, "dc-ae-f128c512-in-1.0": 0.4883,
    "dc-ae-f128c512-mix-1.0": 0.3620, "dc-ae-f32c32-sana-1.0": 0.41407,
    "dc-ae-f32c32-sana-1.1": 0.41407, "dc-ae-lite-f32c32-sana-1.1": 0.41407,
    "dc-ae-f32c128-1.1": None, "dc-ae-1.5-f32c128": None, "dc-ae-1.5-f64c128": 0.5935,
    "sd-vae-f8": 0.18215,
}  # fmt: skip


def test_scaling_factors_of_the_releases():
    assert {n: r.scaling_factor for n, r in releases.RELEASES.items()} == FACTORS


@pytest.mark.parametrize("release", FACTORS)
def test_config_json_of_every_release_comes_back(release):
    cfg = releases.RELEASES[release].config()
    for layout in narrow.layouts_of(cfg):
        named = release if layout is Layout.official else None
        fields = json.loads(json.dumps(layouts.write(cfg, layout, 0.25, named)))
        again = layouts.read(fields, "config.json")
        assert not layouts.network_differences(again.cfg, cfg)
        assert again.scaling_factor == 0.25 and again.layout is layout
        own = json.loads(json.dumps(layouts.write(cfg, layout, 0.25, None)))
        assert not layouts.network_differences(layouts.read(own, "config.json").cfg, cfg)
    for name in (*releases.RELEASES[release].hub, *releases.RELEASES[release].former):
        assert releases.named(name) == release
    assert releases.named("somebody/else") is None


def test_the_config_that_sana_was_published_with_is_that_of_the_release():
    """vae/config.json of SANA 600M on the hub: "Conv", and later fields left to their defaults."""
    blocks = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    fields = {
        "_class_name": "AutoencoderDC", "_diffusers_version": "0.32.0.dev0",
        "_name_or_path": "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
        "attention_head_dim": 32, "in_channels": 3, "latent_channels": 32,
        "decoder_act_fns": "silu", "decoder_norm_types": "rms_norm",
        "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6,
        "scaling_factor": 0.41407,
    }  # fmt: skip
    for side in ("encoder", "decoder"):
        fields[f"{side}_block_out_channels"] = [128, 256, 512, 512, 1024, 1024]
        fields[f"{side}_block_types"] = blocks
        fields[f"{side}_qkv_multiscales"] = [[], [], [], [5], [5], [5]]
    found, sana = layouts.read(fields, "config.json"), releases.RELEASES["dc-ae-f32c32-sana-1.0"]
    assert not layouts.network_differences(found.cfg, sana.config())
    assert found.scaling_factor == sana.scaling_factor


def test_the_factor_of_a_config_without_one_is_unknown():
    fields = {"_class_name": "AutoencoderDC"}
    assert layouts.read(fields, "config.json").scaling_factor is None
    # stabilityai/sd-vae-ft-mse states none: diffusers takes 0.18215, that of this very network.
    sd = {
        "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 256, "act_fn": "silu",
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 32,
    }  # fmt: skip
    assert layouts.read(sd, "config.json").scaling_factor == 0.18215
    assert layouts.read(sd | {"latent_channels": 8}, "config.json").scaling_factor is None


# ----------------------------------------------------------------------------------------- outputs


def test_nothing_is_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    full = "exists and is not empty"
    refused("import", "--from", folder, "--out", out, match=full)
    refused("export", "--workdir", folder, "--to", "diffusers", "--out", out, match=full)
    (out / "checkpoints").mkdir()
    incomplete = r"exists and has no config\.json: its writer did not finish"
    refused("import", "--from", folder, "--out", out, match=incomplete)
    (out / "checkpoints").rmdir()
    (out / "config.json").write_text("{}")
    refused("import", "--from", folder, "--out", out, match=full)
    refused("import", "--from", folder, "--out", out / "mine.txt", match="is not empty")
    (out / "config.json").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_scaling_factor_is_asked_for(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    del config["scaling_factor"]
    (folder / "config.json").write_text(json.dumps(config))
    to = ("--to", "diffusers", "--out", tmp_path / "out")
    refused("export", "--workdir", folder, *to, match=r"(?s)unknown.*dcae_jax latent-stats.*--scal")
    refused("export", "--workdir", folder, *to, "--scaling-factor", -1, match="is not positive")
    assert not (tmp_path / "out").exists()
    assert narrow.command("export", "--workdir", folder, *to, "--scaling-factor", 0.3) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scaling_factor"] == 0.3


def test_networks_that_a_layout_cannot_express(tmp_path):
    made = narrow.export(narrow.every()["no residual"], Layout.official, tmp_path / "made")
    out = ("--out", tmp_path / "out")
    refused(
        "export", "--workdir", made, "--to", "diffusers", *out,
        match=r"(?s)diffusers layout cannot express.*--to official.*residual = False",
    )  # fmt: skip
    refused(
        "export",
        "--workdir",
        FILES / "kl",
        "--to",
        "official",
        *out,
        match="diffusers' layout only",
    )
    refused(
        "export", "--workdir", made, "--to", "official", "--variant", "dc-ae-f32c32-in-1.0", *out,
        match=r"(?s)is not the network of dc-ae-f32c32-in-1\.0.*latent_channels: 4, 32",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_verify_without_pytorch_says_what_to_install(tmp_path):
    if not verify.missing():
        pytest.skip("torch and diffusers are installed here")
    args = ("export", "--workdir", FILES / "dc", "--to", "diffusers", "--out", tmp_path / "out")
    refused(*args, "--verify", match="--verify: .*torch.* not installed: pip install torch")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [(2e-5, 0), (0, 2e-5), (np.nan, 0), (0, np.nan), (np.inf, 0)])
def test_results_that_disagree_are_an_error(bad, tmp_path):
    folder = epath.Path(tmp_path)
    verify.check(folder, verify.Errors(9e-6, 9e-6))
    with pytest.raises(UserError, match="differ from JAX's"):
        verify.check(folder, verify.Errors(*map(float, bad)))


# ------------------------------------------------------------------------------- in real processes


def process(*args, **env):
    """(exit code, stdout, stderr) of `python -m dcae_jax ...`."""
    done = subprocess.run(
        [sys.executable, "-m", "dcae_jax", *map(str, args)], cwd=ROOT, text=True, timeout=300,
        capture_output=True, env=os.environ | {k: str(v) for k, v in env.items()},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.multiprocess
def test_hub_names_are_downloaded_and_unknown_ones_named(tmp_path):
    home = tmp_path / "home"
    repositories = {
        "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers": FILES / "dc",
        "me/own": FILES / "dc",
    }
    with fake_hub.serve(repositories) as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": home, "HF_HUB_DISABLE_TELEMETRY": 1}
        code, out, err = process("import", "--from", "me/own", "--out", tmp_path / "a", **env)
        assert code == 0, err
        assert "me/own: no known release, f4c4" in out
        assert (tmp_path / "a" / "config.json").exists()
        code, out, err = process("import", "--from", "me/other", "--out", tmp_path / "b", **env)
        assert code == 2 and not out and not (tmp_path / "b").exists()
        assert err.startswith(f"error: me/other is no path here, and {address} has no such repo")
        assert len(err.splitlines()) == 1
    # The same address, now with nobody there: what was fetched before still serves.
    code, out, err = process("import", "--from", "me/own", "--out", tmp_path / "c", **env)
    assert code == 0 and (tmp_path / "c" / "config.json").exists(), err
    code, out, err = process("import", "--from", "me/other", "--out", tmp_path / "b", **env)
    assert code == 2 and f"{address} cannot be reached" in err and "give the path" in err
    assert "Traceback" not in err


def test_a_hub_name_tells_the_release_but_its_config_tells_the_network(monkeypatch):
    name = "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"
    monkeypatch.setattr(from_torch, "download", lambda source: str(FILES / "dc"))
    found = from_torch.load(name)
    assert found.release is None and found.scaling_factor == 0.75 and name in found.notes[-1]
    fields = layouts.read(json.loads((FILES / "dc" / "config.json").read_text()), "config.json")
    own = releases.Release(lambda: fields.cfg, 0.25, (name,))
    monkeypatch.setitem(releases.RELEASES, "own", own)
    monkeypatch.setattr(releases, "named", lambda n: "own" if n == name else None)
    found = from_torch.load(name)
    assert found.release == "own" and found.scaling_factor == 0.75
    assert names.layout_of(["encoder.x"]) is None


def test_a_release_is_found_on_the_hub_by_its_name_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(
        from_torch, "download", lambda name: asked.append(name) or str(FILES / "dc")
    )
    notes = from_torch.load("dc-ae-f64c128-in-1.0").notes
    from_torch.load("dc-ae-turbo")  # a former name
    assert asked == ["mit-han-lab/dc-ae-f64c128-in-1.0", "dc-ai/dc-ae-lite-f32c32"]
    assert "does not hold the network of dc-ae-f64c128-in-1.0" in notes[-1]
    for unknown in ("dc-ae-f64c128-in-2.0", "imagenet256_uvit_huge"):  # of the last: no hub name
        with pytest.raises(UserError, match=f"{unknown} does not exist; give .*a release's name"):
            from_torch.load(unknown)
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["import", "export"])
def test_help_is_quick_and_complete(name, capsys):
    with pytest.raises(SystemExit) as e:
        narrow.command(name, "--help")
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m dcae_jax {name}" in text and "--variant" in text and "--out" in text
