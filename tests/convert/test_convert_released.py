"""Imported workdirs and configs/released.py: what a run, an evaluation, a fine-tuning needs."""

import json
import re
import shutil

import fake_store
import narrow_nets as narrow
import numpy as np
import pytest
import runs
from etils import epath

from dcae_jax import autoencoder, checkpoint, config, flags, recipes, train, tree
from dcae_jax.convert import from_torch, names, releases, to_torch
from dcae_jax.convert.names import Layout
from dcae_jax.errors import UserError
from dcae_jax.models.layers import BatchNormMode, Norm
from dcae_jax.tasks.autoencode import Phase

FILES = narrow.FILES


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "work"
    narrow.command("import", "--from", FILES / "dc", "--out", out)
    return out


def test_an_imported_workdir_is_a_checkpoint_of_step_0_with_a_whole_config(work):
    folder, steps = checkpoint.find_source(str(work))
    meta = checkpoint.read_meta(folder, steps[0])
    assert steps == [0] and set(meta["leaves"]) == {"params", "stats"}
    assert {p.split("/")[0] for p in meta["leaves"]["params"]} == {"ae"}
    cfg = config.from_json(meta["config"])
    config.validate(cfg)
    assert cfg.task.phase is Phase.low_res_full and cfg.init_from is None
    found = from_torch.load(str(FILES / "dc"))
    assert cfg.task.model == found.cfg and Norm.batch in cfg.task.model.decoder.norms
    assert cfg.task.model.batch_norm is BatchNormMode.frozen_stats
    known = meta["autoencoder"]
    assert known["scaling_factor"] == 0.75 and known["release"] is None and known["dtypes"] == {}
    assert known["source"].endswith("dc") and set(known["counters"].values()) == {1234}
    beside = json.loads((work / "config.json").read_text())
    assert beside["autoencoder"] == known and beside["config"] == meta["config"]


def test_its_weights_initialise_a_run_and_make_an_autoencoder(work):
    found = from_torch.load(str(FILES / "dc"))
    weights = checkpoint.load_weights(str(work), autoencoder.abstract(found.cfg), prefer_ema=True)
    ours = tree.flatten(found.variables["params"])
    theirs = tree.flatten(weights.params["ae"])
    assert all(np.array_equal(ours[p], theirs[p]) for p in ours | theirs)
    both = [autoencoder.load(str(source)) for source in (work, FILES / "dc")]
    assert both[0].encoder == both[1].encoder and both[0].scaling_factor == 0.75
    assert both[0].origin.counters == both[1].origin.counters


@pytest.mark.slow
def test_an_import_is_evaluated_fine_tuned_and_exported_with_its_factor(work, tmp_path):
    """The whole way of a user.  Phase 3 leaves the encoder alone, so the factor stays that one."""
    shutil.copytree(work, tmp_path / "work")
    model = config.from_json(checkpoint.source_meta(str(work))["config"]).task.model
    evaluation = runs.make_config("phase1", **{"task.model": model})
    with runs.devices(1):
        assert train.evaluate(evaluation, str(tmp_path / "work"), runs.StopAt()) == train.DONE
    (path,) = (tmp_path / "work" / "eval").glob("000000000-*.json")
    scores = json.loads(path.read_text())["scores"]
    changes = {
        "task.model": model, "task.trainable": recipes.head(model), "init_from": str(work),
        "steps": 2,
    }  # fmt: skip
    assert runs.run("gan", tmp_path / "run", **changes) == train.DONE
    before = runs.rows(tmp_path / "run")[0]
    assert before["folder-32-test/psnr"] == pytest.approx(scores["folder-32-test/psnr"], rel=1e-8)
    out = tmp_path / "out"
    narrow.command("export", "--workdir", tmp_path / "run", "--to", "diffusers", "--out", out)
    assert json.loads((out / "config.json").read_text())["scaling_factor"] == 0.75
    old, new = (autoencoder.load(str(folder)) for folder in (FILES / "dc", out))
    assert old.encoder == new.encoder
    moved = {
        path for path, leaf in tree.flatten(new.variables["params"]).items()
        if not np.array_equal(leaf, tree.flatten(old.variables["params"])[path])
    }  # fmt: skip
    assert moved and all(re.fullmatch(recipes.head(model), f"ae/{path}") for path in moved)


def test_stores_without_rename_hold_imports_and_exports():
    """Everything but Orbax, which the fake store does not serve, goes through epath."""
    store = fake_store.reset()
    cfg = narrow.every()["kl"]
    out = epath.Path("fake://bucket/out")
    ours = tree.unflatten(narrow.weights(cfg))
    export = to_torch.Export(cfg, ours, Layout.diffusers, 0.5, "a test")
    to_torch.write(export, out)
    assert store.writes[-1].endswith("out/config.json"), "config.json says that all is there"
    found = from_torch.load("fake://bucket/out")
    assert all(
        np.array_equal(leaf, narrow.weights(cfg)[path])
        for path, leaf in tree.flatten(found.variables).items()
    )
    with pytest.raises(UserError, match="exists and is not empty"):
        to_torch.write(export, out)


@pytest.mark.parametrize("phase", ["phase1", "phase2", "phase3"])
@pytest.mark.parametrize("name", releases.RELEASES)
def test_every_release_has_its_three_phases(name, phase):
    cfg = config.resolve(flags.load(f"configs/released.py:{name},{phase}"))
    config.validate(cfg)
    model = releases.RELEASES[name].config()
    assert not from_torch.layouts.network_differences(cfg.task.model, model)
    assert cfg.init_from == f"runs/{name}" and name in cfg.name
    assert [e.data.resolution for e in cfg.evals] == [256, 512]
    paths = [f"ae/{p.removeprefix('params/')}" for p in names.shapes(model) if "batch" not in p]
    trained = [p for p in paths if re.fullmatch(cfg.task.trainable, p)]
    assert (len(trained) == len(paths)) == (phase == "phase1") and trained
    if phase != "phase1":
        cfg.init_from = None
        with pytest.raises(UserError, match="init_from"):
            config.validate(cfg)


def test_arguments_of_the_config():
    assert flags.load("configs/released.py").name == "dc-ae-f32c32-in-1.0 phase1"
    assert flags.load("configs/released.py:phase3").name == "dc-ae-f32c32-in-1.0 phase3"
    mix = flags.load("configs/released.py:dc-ae-f64c128-mix-1.0")
    assert mix.name == "dc-ae-f64c128-mix-1.0 phase1" and mix.task.model.factor == 64
    same = flags.load("configs/released.py:dc-ae-f64c128-mix-1.0:phase2")  # as launch/ writes it
    assert same.name == "dc-ae-f64c128-mix-1.0 phase2"
    assert flags.load("configs/released.py:").name == flags.load("configs/released.py").name
    for wrong in ("phase4", "dc-ae-f32c33", "phase1,phase2", "a,b,c"):
        with pytest.raises(UserError, match="phase1, phase2, phase3"):
            flags.load(f"configs/released.py:{wrong}")


def test_released_leaves_the_model_that_it_is_given_alone():
    model = releases.RELEASES["dc-ae-f32c32-in-1.0"].config()
    before = config.to_json(model)
    cfg = recipes.released(model, "phase2")
    assert config.to_json(model) == before and cfg.task.model is not model
    assert cfg.task.model.remat is not model.remat, "phase 2 at 1024 px recomputes"
