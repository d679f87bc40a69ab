"""Exports, loaded and run by diffusers; checkpoints that only PyTorch's own reader understands."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from etils import epath

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "convert"))
import narrow_nets as narrow
import official

from dcae_jax.convert import from_torch, releases, to_torch, verify
from dcae_jax.convert.names import Layout
from dcae_jax.convert.to_torch import TOLERANCE
from dcae_jax.errors import UserError

# One of each network; the others differ in weights only.
NAMES = (
    "dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0", "dc-ae-lite-f32c32-sana-1.1",
    "dc-ae-f32c128-1.1", "dc-ae-1.5-f64c128", "strided stem", "kl", "kl, bare",
)  # fmt: skip
NETWORKS = {name: narrow.every()[name] for name in NAMES}
PAIRS = [(name, layout) for name, cfg in NETWORKS.items() for layout in narrow.layouts_of(cfg)]


@pytest.mark.parametrize(("name", "layout"), PAIRS, ids=str)
def test_promise_6_what_is_exported_loads_in_pytorch_and_agrees(name, layout, tmp_path):
    out = narrow.export(NETWORKS[name], layout, tmp_path / "out")
    errors = verify.verify(epath.Path(out), NETWORKS[name], layout)
    verify.check(epath.Path(out), errors)


def test_a_tensor_that_is_one_percent_off_is_noticed(tmp_path):
    out = narrow.export(NETWORKS["dc-ae-f32c32-sana-1.0"], Layout.diffusers, tmp_path / "out")
    parity = dict(np.load(out / "parity.npz"))
    np.savez(out / "parity.npz", **parity | {"reconstruction": parity["reconstruction"] * 1.01})
    errors = verify.verify(epath.Path(out), NETWORKS["dc-ae-f32c32-sana-1.0"], Layout.diffusers)
    with pytest.raises(UserError, match="differ from JAX's"):
        verify.check(epath.Path(out), errors)


@pytest.mark.parametrize("name", ["dc-ae-f32c32-in-1.0", "kl"])
def test_the_lines_of_the_readme_run_without_dcae_jax(name, tmp_path):
    out = narrow.export(NETWORKS[name], Layout.diffusers, tmp_path / "out")
    code = re.search(r"```python\n(.*)```", (out / "README.md").read_text(), re.S)[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=out, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    found = re.findall(r"(latent|reconstruction): relative error (\S+)", done.stdout)
    assert [name for name, _ in found] == ["latent", "reconstruction"], done.stderr[-2000:]
    assert all(float(error) < TOLERANCE for _, error in found)


@pytest.mark.skipif(not official.is_here(), reason="needs dc_gen on PYTHONPATH")
def test_the_lines_for_the_official_code_name_models_that_it_has():
    zoo = official._zoo()
    for release, what in releases.RELEASES.items():
        if what.official is not None:
            assert what.official in zoo.REGISTERED_DCAE_MODEL, release
            lines = to_torch._dc_gen(release)
            start = next(i for i, line in enumerate(lines) if line.startswith("cfg = "))
            there = vars(zoo).copy()
            exec("\n".join(lines[start : start + 2]), there)  # the network itself has full size
            assert there["cfg"].pretrained_path is None and "DCAE" in there


def test_verify_is_part_of_the_command(tmp_path, capsys):
    args = ("--workdir", narrow.FILES / "dc", "--to", "diffusers", "--out", tmp_path / "out")
    assert narrow.command("export", *args, "--verify") == 0
    assert "verified in PyTorch: largest relative error" in capsys.readouterr().out


def test_pytorch_reads_what_needs_more_than_dicts_of_tensors(tmp_path):
    with from_torch.open_tensors(narrow.FILES / "training.pth", "model_state_dict") as file:
        state = {k: torch.from_numpy(file.read(k).copy()) for k in file.infos if k[0] == "0"}
    half = {k: t.bfloat16() if t.is_floating_point() else t for k, t in state.items()}
    (tmp_path / "config.json").write_text((narrow.FILES / "dc" / "config.json").read_text())
    torch.save({"state_dict": half, "size": torch.Size([3])}, tmp_path / "model.pth")
    found, plain = (from_torch.load(str(f)) for f in (tmp_path, narrow.FILES / "dc_bf16"))
    assert found.dtypes == plain.dtypes and found.counters == plain.counters
    a, b = (from_torch.tree.flatten(x.variables) for x in (found, plain))
    assert all(np.array_equal(a[p], b[p]) for p in a | b)
    with pytest.raises(UserError, match="safe reader refuses it too"):
        from_torch.load(str(narrow.FILES / "namespace.pth"))
