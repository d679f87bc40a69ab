"""config.py: what resolve and validate find, JSON, differences, and names that do not exist."""

import dataclasses
import json

import pytest
import tiny

from dcae_jax import config
from dcae_jax.config import (
    GroupConfig,
    InitWeights,
    MeshConfig,
    NonFinite,
    OptimConfig,
    Optimizer,
    Schedule,
)
from dcae_jax.errors import UserError
from dcae_jax.models.dcae import Remat
from dcae_jax.tasks.autoencode import Phase


def problems(cfg, devices=None):
    """The list that validate() raises."""
    with pytest.raises(UserError) as e:
        config.validate(cfg, devices)
    first, *lines = str(e.value).splitlines()
    assert first == f"the config has {len(lines)} problem(s):"
    return [line.removeprefix("  - ") for line in lines]


def test_validate_lists_all_problems_of_all_parts_at_once():
    cfg = tiny.run()
    cfg.steps, cfg.microbatches = 0, 0
    cfg.optim.lr, cfg.optim.beta2 = -1.0, 1.0
    cfg.ema.decays = (0.9, 1.5)
    cfg.checkpoint.keep = 0
    cfg.data.resolution = 30
    cfg.task.losses.l1 = cfg.task.losses.l2 = 0.0
    cfg.mesh.specs = ("kernel",)
    found = problems(cfg)
    for part in (
        "steps = 0", "microbatches = 0", "optim.lr = -1.0", "optim.beta2", "ema.decays has 1.5",
        "checkpoint.keep = 0", "multiple of the compression 4; nearest: 28 or 32",
        "all of l1, l2, lpips are 0", "mesh.specs: 'kernel'",
    ):  # fmt: skip
        assert any(part in p for p in found), (part, found)
    assert len(found) == 9, "each problem once, and no other"


def test_a_problem_that_two_parts_report_is_said_once():
    cfg = tiny.run()
    cfg.data.source.min_photo_side = -1
    (only,) = problems(cfg)
    assert only.startswith("data.source.min_photo_side")


@pytest.mark.parametrize(
    ("mesh", "batch", "microbatches", "devices", "message"),
    [
        (MeshConfig(), 100, 2, 8, "batch 100 is not divisible by data x fsdp x microbatches = 16; "
                                  "nearest: 96 or 112"),
        (MeshConfig(), 5, 1, 8, "nearest: 8"),  # nothing below: 0 is no batch
        (MeshConfig(fsdp=2), 12, 1, 8, "data x fsdp x microbatches = 8; nearest: 8 or 16"),
        (MeshConfig(spatial=4), 3, 1, 8, "data x fsdp x microbatches = 2; nearest: 2 or 4"),
        (MeshConfig(fsdp=3), 12, 1, 8, "mesh all x 3 x 1 does not fit 8 device(s)"),
        (MeshConfig(data=4), 12, 1, 8, "mesh 4 x 1 x 1 does not fit 8 device(s)"),
    ],
)  # fmt: skip
def test_mesh_and_batch_are_checked_against_the_devices(
    mesh, batch, microbatches, devices, message
):
    cfg = tiny.run()
    cfg.mesh, cfg.batch, cfg.microbatches = mesh, batch, microbatches
    config.validate(cfg)  # without devices nothing is said: a config does not depend on them
    (only,) = problems(cfg, devices)
    assert message in only


def test_a_batch_that_fits_is_accepted_on_every_mesh():
    cfg = tiny.run(batch=16)
    for data, fsdp, spatial in ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 1, 4), (-1, 2, 2)):
        config.validate(tiny.with_mesh(cfg, data, fsdp, spatial), 8)


def test_adversarial_phase_needs_a_weight_and_a_discriminator():
    cfg = tiny.run(Phase.low_res_local)
    cfg.task.adversarial.weight = 0.0
    assert any("adversarial phase without an adversary" in p for p in problems(cfg))
    cfg.task.adversarial = None
    assert any("set task.adversarial" in p for p in problems(cfg))


def test_json_keeps_every_type():
    cfg = tiny.run(Phase.low_res_local)
    cfg.nonfinite, cfg.init_weights = NonFinite.skip, InitWeights.params
    cfg.optim.schedule, cfg.task.model.remat = Schedule.linear, Remat.stage
    cfg.optim.optimizer, cfg.optim.milestones = Optimizer.adan, ((0.5, 0.5), (0.75, 0.25))
    cfg.task.model.encoder.remat = (Remat.none, Remat.block, Remat.stage)
    text = config.dumps(cfg)
    again = config.from_json(json.loads(text))
    assert again == cfg and config.dumps(again) == text
    assert again.task.model.encoder.remat == (Remat.none, Remat.block, Remat.stage)
    assert type(again.ema.decays) is tuple and type(again.optim.groups) is list
    assert all(type(pair) is tuple for pair in again.optim.milestones)


def test_json_of_another_version_is_refused_by_name():
    tree = config.to_json(tiny.run())
    tree["optim"]["momentum"] = 0.9
    with pytest.raises(UserError, match=r"OptimConfig has no field.*momentum"):
        config.from_json(tree)
    with pytest.raises(UserError, match=r"has no config class 'dcae_jax\.config:Gone'"):
        config.from_json({"class": "dcae_jax.config:Gone"})
    with pytest.raises(UserError, match="not one of dcae_jax"):
        config.from_json({"class": "os:system"})


def test_json_of_an_older_version_gets_the_defaults_of_newer_fields():
    cfg = tiny.run()
    tree = config.to_json(cfg)
    del tree["optim"]["optimizer"], tree["optim"]["milestones"], tree["seed"]
    assert config.from_json(tree) == cfg
    assert config.diff(config.completed(tree), cfg) == {}
    tree["optim"]["momentum"] = 0.9
    assert config.completed(tree) is tree, "what this version cannot read is shown as it is"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": Optimizer.adan}, "set beta1=0.98, beta2=0.92, beta3=0.99"),
        ({"beta1": 0.98, "beta2": 0.92}, "adamw with beta1 = 0.98, beta2 = 0.92, which are Adan's"),
        ({"beta3": 1.0}, "optim.beta3 = 1.0 is not in [0, 1)"),
        ({"milestones": (0.5, 0.5)}, "each is a pair (share of the steps, factor on the rate)"),
        ({"milestones": ((0.5, 0.5), (0.5, 0.1))}, "at 0.5, 0.5 of the steps"),
        ({"milestones": ((1.0, 0.5),)}, "shares are between 0 and 1"),
        ({"milestones": ((0.5, -1.0),)}, "factors on the rate are >= 0"),
    ],
)
def test_problems_of_the_optimizer(changes, message):
    cfg = tiny.run()
    for name, value in changes.items():
        setattr(cfg.optim, name, value)
    (only,) = problems(cfg)
    assert message in only
    assert OptimConfig(Optimizer.adan, beta1=0.98, beta2=0.92).problems() == []


def test_flatten_and_diff():
    old, new = tiny.run(), tiny.run()
    assert config.diff(old, new) == {}
    assert config.flatten(old)["optim.groups[0].lr"] == 2.0
    new.optim.lr = 5e-4
    new.optim.groups.append(GroupConfig("scale$"))
    new.init_from = "there"
    found = config.diff(config.to_json(old), new)  # JSON and objects compare alike
    assert found["optim.lr"] == (1e-3, 5e-4) and found["init_from"] == (None, "there")
    assert found["optim.groups[1].pattern"] == ("(absent)", "scale$")
    assert set(found) == {
        "optim.lr", "init_from", *(f"optim.groups[1].{f}" for f in
                                   ("class", "pattern", "lr", "weight_decay")),
    }  # fmt: skip


def test_slots_make_a_typo_in_a_config_file_an_error():
    cfg = tiny.run()

    def classes(node):
        if dataclasses.is_dataclass(node):
            yield node
            for f in dataclasses.fields(node):
                yield from classes(getattr(node, f.name))
        elif isinstance(node, (list, tuple)):
            for child in node:
                yield from classes(child)

    for part in classes(cfg):
        with pytest.raises(AttributeError):
            part.no_such_field = 1
