"""What an exported folder says of itself: whose weights, and how the official code loads it."""

import json
import re

import narrow_nets as narrow
import pytest

from dcae_jax.convert import from_torch, layouts, names, releases, to_torch
from dcae_jax.convert.names import Layout

IN, MIX = "dc-ae-f32c32-in-1.0", "dc-ae-f32c32-mix-1.0"


@pytest.fixture(autouse=True)
def _narrow_releases(monkeypatch):
    """The releases' names for narrow networks."""
    for name, what in releases.RELEASES.items():
        if name in narrow.every():
            cfg = narrow.every()[name]
            monkeypatch.setitem(releases.RELEASES, name, what._replace(config=lambda cfg=cfg: cfg))


def told(out):
    """(the line on the weights, config.json, the whole README)."""
    text = (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    return re.search("Weights: .*", text)[0], config, text


@pytest.mark.parametrize("layout", names.AUTOENCODER_LAYOUTS)
def test_fine_tuned_weights_are_nobody_elses_also_under_a_releases_name(layout, tmp_path):
    out = narrow.export(narrow.every()[IN], layout, tmp_path / "out", variant=IN)
    weights, config, _ = told(out)
    whose = "trained with dcae_jax"
    if layout is Layout.official:
        assert config == {"model_name": IN, "own_weights": True, "scaling_factor": 0.5}
        whose += f"; not those of {IN}, which has the same network"
    assert weights == f"Weights: {whose}. Written by dcae_jax."
    found = from_torch.load(str(out))
    assert found.release is None and found.scaling_factor == 0.5
    assert any(IN in note and "--variant NAME if these are its" in note for note in found.notes)


def test_a_release_goes_out_as_itself(tmp_path):
    factor = releases.RELEASES[IN].scaling_factor
    out = narrow.export(
        narrow.every()[IN], Layout.official, tmp_path / "out", release=IN, unchanged=True,
        scaling_factor=factor,
    )  # fmt: skip
    weights, config, _ = told(out)
    assert weights == f"Weights: those of {IN}, unchanged. Written by dcae_jax."
    assert config == {"model_name": IN}
    assert from_torch.load(str(out)).release == IN
    half = narrow.export(
        narrow.every()[IN], Layout.official, tmp_path / "half", release=IN, unchanged=True,
        variant=MIX, dtype="bfloat16", scaling_factor=factor,
    )  # fmt: skip
    weights, config, _ = told(half)
    assert f"{IN}, unchanged, rounded to bfloat16; not those of {MIX}" in weights
    assert config["own_weights"] and config["scaling_factor"] == factor


def test_a_folder_that_the_official_code_cannot_load_says_how_it_could(tmp_path, capsys):
    made = narrow.export(narrow.every()[IN], Layout.official, tmp_path / "made")
    _, config, text = told(made)
    assert config["model_name"] == "custom" and "```" not in text
    assert "this folder names none; export with --variant NAME" in text and IN in text
    narrow.command("export", "--workdir", made, "--to", "official", "--out", tmp_path / "b")
    said = capsys.readouterr().out
    assert "export with --variant NAME to have it load" in said
    assert "README.md there has the lines" not in said, "it has none"
    other = narrow.export(narrow.every()["no residual"], Layout.official, tmp_path / "other")
    assert "names of releases only, and none has this network" in told(other)[2]
    narrow.command(
        "export", "--workdir", made, "--to", "official", "--out", tmp_path / "c", "--variant", MIX
    )
    assert "--variant" not in capsys.readouterr().out
    weights, config, _ = told(tmp_path / "c")
    assert config["model_name"] == MIX and "imported and unchanged; of which release" in weights


# Names in `REGISTERED_DCAE_MODEL` of DC-Gen cae2205; the first seven are in efficientvit too.
OFFICIAL = (
    "dc-ae-f32c32-in-1.0", "dc-ae-f64c128-in-1.0", "dc-ae-f128c512-in-1.0",
    "dc-ae-f32c32-mix-1.0", "dc-ae-f64c128-mix-1.0", "dc-ae-f128c512-mix-1.0",
    "dc-ae-f32c32-sana-1.0",
    "dc-ae-f32c32-sana-1.1", "dc-ae-lite-f32c32-sana-1.1", "dc-ae-f32c32-in-1.0-256px",
    "dc-ae-f32c128-1.5", "dc-ae-f64c128-1.5", "dc-ae-f32c128-1.1",
)  # fmt: skip


def test_the_lines_and_the_name_are_those_of_code_that_has_the_network():
    names = {r: releases.RELEASES[r].official for r in narrow.every() if r in releases.RELEASES}
    assert set(names.values()) == set(OFFICIAL)
    for release, name in names.items():
        lines = "\n".join(to_torch._check_official(release))
        assert ("from efficientvit." in lines) == (name in OFFICIAL[:7])
        assert (f'create_dc_ae_model_cfg("{name}")' in lines) == (name in OFFICIAL[7:])
        fields = layouts.write(narrow.every()[release], Layout.official, 0.25, release)
        assert fields["model_name"] == name
        assert layouts.read(fields, "config.json").release == release
