"""Masked autoencoders between transformers' ViTMAE and this package, through files, both ways."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from etils import epath
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "convert"))
import make_mae_torch_files as maker
import narrow_nets as narrow

from dcae_jax import tree
from dcae_jax.convert import mae_from_torch, mae_names, mae_to_torch, verify
from dcae_jax.convert.mae_layouts import Described
from dcae_jax.convert.names import Layout
from dcae_jax.convert.to_torch import TOLERANCE
from dcae_jax.errors import UserError
from dcae_jax.models.lmd import LMDConfig

# Our networks: pixels; latents with subtracted positions, as LMD's code has them.
NETWORKS = {
    "pixels": LMDConfig(
        in_channels=3, input_size=(8, 8), patch=2, width=24, depth=2, heads=3, decoder_width=16,
        decoder_depth=3, decoder_heads=2,
    ),
    "latents": LMDConfig(
        in_channels=4, input_size=(16, 16), patch=4, width=16, depth=3, heads=2, decoder_width=24,
        decoder_depth=1, decoder_heads=3, decoder_pos_sign=-1, norm_eps=1e-12,
    ),
}  # fmt: skip


def exported(name, layout, out, change=lambda flat: flat):
    """A folder with random weights."""
    cfg, gen = NETWORKS[name], np.random.default_rng(0)
    flat = {
        path: gen.uniform(0.5, 1.5, shape).astype(np.float32)
        if path.endswith("scale")
        else (gen.standard_normal(shape) / np.sqrt(max(np.prod(shape[:-1]) / 2, 4))).astype("f4")
        for path, shape in mae_names.shapes(cfg).items()
    }
    export = mae_to_torch.ExportMasked(
        Described(cfg, 0.6, True), tree.unflatten(change(flat)), layout, "a test", name == "pixels"
    )
    mae_to_torch.write(export, epath.Path(out))
    return epath.Path(out)


@pytest.mark.parametrize("layout", mae_to_torch.LAYOUTS, ids=lambda v: v.value)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_exported_loads_in_transformers_and_agrees(name, layout, tmp_path, compare):
    error = verify.verify_masked(exported(name, layout, tmp_path / "out"), layout)
    compare.report(f"ViTMAE, exported {layout.value}", name, TOLERANCE, {"output": error})


def test_a_leaf_that_is_one_percent_off_is_noticed(tmp_path):
    """Weights of another network than that of parity.npz."""
    path = "params/decoder/blocks/mlp/fc2/kernel"
    good = exported("pixels", Layout.vit_mae, tmp_path / "good")
    bad = exported(
        "pixels", Layout.vit_mae, tmp_path / "bad", lambda flat: flat | {path: 1.01 * flat[path]}
    )
    (good / "parity.npz").copy(bad / "parity.npz", overwrite=True)
    assert verify.verify_masked(bad, Layout.vit_mae) > 10 * TOLERANCE


def test_tensors_that_transformers_does_not_know_are_noticed(tmp_path, monkeypatch):
    """It would draw what it misses at random, and only warn."""
    wrong = dict(mae_names._VIT) | {"mlp/fc1": "intermediate.linear"}
    monkeypatch.setitem(
        mae_names._RULES[Layout.vit_mae], "decoder",
        mae_names._decoder("decoder.", "decoder_layers", wrong),
    )  # fmt: skip
    out = exported("pixels", Layout.vit_mae, tmp_path / "out")
    with pytest.raises(UserError, match="does not pair decoder"):
        verify.verify_masked(out, Layout.vit_mae)


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
@pytest.mark.parametrize("cls", [ViTMAEForPreTraining, ViTMAEModel])
def test_what_transformers_saves_is_imported_and_agrees(cls, eps, tmp_path, compare):
    """With other sizes than the stored files, and with both eps."""
    torch.manual_seed(1)
    sizes = maker.SIZES | maker.DECODER | {"num_hidden_layers": 3, "image_size": maker.SIDE}
    net = ViTMAEForPreTraining(ViTMAEConfig(**sizes, layer_norm_eps=eps)).eval()
    maker.fill(net)
    (net if cls is ViTMAEForPreTraining else net.vit).save_pretrained(tmp_path / "theirs")
    found = mae_from_torch.load(str(tmp_path / "theirs"))
    inputs = mae_to_torch.example(found.cfg)
    with torch.no_grad():
        x, noise = torch.tensor(inputs["x"]).permute(0, 3, 1, 2), torch.tensor(inputs["noise"])
        encoded = net.vit(x, noise=noise).last_hidden_state.numpy()
        output = net(x, noise=noise).logits.numpy()
    ours = mae_to_torch.run(found.cfg, found.variables, inputs, encoded.shape[1] - 1)
    pairs = {"encoded": (ours["encoded"], encoded)}
    if cls is ViTMAEForPreTraining:
        pairs["output"] = (ours["output"], output)
    compare(f"ViTMAE, imported {cls.__name__}", f"eps {eps:g}", TOLERANCE, **pairs)


def test_the_commands_verify_and_the_readme_runs_without_dcae_jax(tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "out"
    assert narrow.command("import", "--from", maker.FOLDER / "pretraining", "--out", work) == 0
    more = ("--to", "vit_mae", "--out", out, "--verify")
    assert narrow.command("export", "--workdir", work, *more) == 0
    assert "verified in PyTorch: largest relative error" in capsys.readouterr().out
    code = re.search(r"```python\n(.*)```", (out / "README.md").read_text(), re.S)[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=out, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    error = re.findall(r"relative error (\S+)", done.stdout)
    assert len(error) == 1, done.stderr[-2000:]
    assert float(error[0]) < TOLERANCE
