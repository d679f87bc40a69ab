"""Promise 7: damage in a checkpoint is found and named, an older one used, nothing is deleted."""

import logging
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from etils import epath

from dcae_jax import checkpoint, config, rng, step, train
from dcae_jax.config import CheckpointConfig
from dcae_jax.errors import UserError
from dcae_jax.models.layers import Norm

ITEMS = ("params", "ema", "opt", "stats", "meta")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A GAN-phase workdir with the steps 4 and 8 (all items), written by `Checkpoints` alone."""
    workdir = tmp_path_factory.mktemp("damage") / "run"
    cfg = runs.make_config("gan", init_from="somewhere")
    task = cfg.task.build(cfg)
    state = jax.jit(lambda: step.init_state(task, cfg, rng.key(0)))()
    manager = open_(workdir)
    for k in (4, 8):
        nudged = jax.tree.map(lambda x, k=k: x + jnp.asarray(k, x.dtype), state)
        manager.save(nudged.replace(step=jnp.int32(k)), meta(cfg))
    manager.close()
    return workdir


def open_(workdir, **options):
    return checkpoint.Checkpoints(epath.Path(workdir), CheckpointConfig(**options))


def meta(cfg):
    return {"config": config.to_json(cfg), "scores": {}}


_target = {}


def target(count=1):
    if count not in _target:
        _target[count] = runs.target(runs.make_config("gan", init_from="somewhere"), count)
    return _target[count]


def files(folder, item):
    """Files of an item that hold something."""
    return [p for p in sorted((folder / item).rglob("*")) if p.is_file() and p.stat().st_size]


def flip(path, gen):
    """Flips one bit; returns a description of where."""
    data = bytearray(path.read_bytes())
    at, bit = gen.randrange(len(data)), gen.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name} byte {at} bit {bit}"


@pytest.fixture(scope="module")
def intact(saved):
    manager = open_(saved)
    state, found = manager.restore_newest(target())
    manager.close()
    return jax.device_get(state), found


def same(a, b):
    return all(
        x.tobytes() == y.tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("item", ITEMS)
def test_promise_7_flipped_bits(item, saved, intact, tmp_path, caplog):
    """Wherever a bit flips, what comes back is what was saved, from this step or the older one."""
    gen = random.Random(item)
    # The rest hit bytes that nobody reads: descriptions of shardings, copies, padding.  Orbax draws
    # the names of its files, so the same seed does not hit the same bytes twice.
    found = 0
    paths = files(saved / "checkpoints" / "8", item)
    weights = [p.stat().st_size for p in paths]
    for trial in range(40):
        if found == 3:
            break
        workdir = tmp_path / f"{trial}"
        shutil.copytree(saved, workdir)
        path = gen.choices(paths, weights)[0]
        where = flip(workdir / path.relative_to(saved), gen)
        caplog.clear()
        manager = open_(workdir)
        state, read = manager.restore_newest(target())
        manager.close()
        if int(state.step) == 8:  # a byte that nobody reads, e.g. of a file's padding
            assert same(jax.device_get(state), intact[0]) and read == intact[1], where
            continue
        found += 1
        assert int(state.step) == 4 and runs.steps(workdir) == [4], where
        assert (workdir / "checkpoints_damaged" / "8").is_dir(), where
        assert re.search("checkpoint 8 .* is damaged", caplog.text), where
        if item != "meta":
            assert item in caplog.text, (where, caplog.text)
        shutil.rmtree(workdir)
    assert found == 3, f"only {found} of 40 flips in {item} were noticed"


def _remove_file(folder, item, gen):
    # The root of the item: Orbax also leaves files that no reader needs.
    (folder / item / ("metadata" if item == "meta" else "manifest.ocdbt")).unlink()


def _truncate(folder, item, gen):
    path = max(files(folder, item), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _remove_item(folder, item, gen):
    shutil.rmtree(folder / item)


def _empty(folder, item, gen):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [_remove_file, _truncate, _remove_item, _empty])
def test_promise_7_missing_and_cut_files(damage, saved, tmp_path, caplog):
    for item in ITEMS:
        workdir = tmp_path / item
        shutil.copytree(saved, workdir)
        damage(workdir / "checkpoints" / "8", item, random.Random(item))
        manager = open_(workdir)
        state, found = manager.restore_newest(target())
        assert (int(state.step), found["step"]) == (4, 4), item
        assert (workdir / "checkpoints_damaged" / "8").is_dir()
        # The same step can be written again, and a second damage gets a name of its own.
        manager.save(state.replace(step=jnp.int32(8)), meta(runs.make_config("gan")))
        manager.close()
        assert runs.steps(workdir) == [4, 8], item
    assert "checkpoint 8" in caplog.text
    _empty(workdir / "checkpoints" / "8", item, None)
    manager = open_(workdir)
    assert int(manager.restore_newest(target())[0].step) == 4
    manager.close()
    assert sorted(p.name for p in (workdir / "checkpoints_damaged").iterdir()) == ["8", "8-1"]


def test_promise_7_all_damaged_changes_nothing(saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for k in ("4", "8"):
        _remove_item(workdir / "checkpoints" / k, "params", None)
    before = runs.digest(workdir)
    with pytest.raises(UserError, match=r"none of the checkpoints \[4, 8\].*is valid"):
        open_(workdir).restore_newest(target())
    assert runs.digest(workdir) == before and not (workdir / "checkpoints_damaged").exists()


def test_damaged_best_checkpoint_does_not_stop_the_start(saved, tmp_path):
    """The best is read from the steps when the folder is opened."""
    workdir = tmp_path / "run"
    options = {"best": "x/psnr", "keep": 1}
    manager = open_(workdir, **options)
    save_scored(manager, {1: 5.0, 2: 9.0, 3: 7.0, 4: 6.0})
    assert runs.steps(workdir) == [2, 4]  # the best and the newest
    _empty(workdir / "checkpoints" / "4", "", None)
    manager = open_(workdir, **options)
    assert int(manager.restore_newest(target())[0].step) == 2
    save_scored(manager, {5: 1.0})
    assert runs.steps(workdir) == [2, 5]


def save_scored(manager, scores, metric="x/psnr"):
    """Scores and saves steps {step: score}, and closes; which of them were the best so far."""
    state, found = (
        jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target()))(),
        [],
    )
    for k, score in scores.items():
        mine = {metric: score, "x/n": 6.0}
        found += [k] if manager.scored(k, mine) else []
        best = manager.best.to_json() if manager.best else None
        more = {"scores": mine, "evaluated_at": k, "best": best}
        manager.save(state.replace(step=jnp.int32(k)), meta(runs.make_config("gan")) | more)
    manager.close()
    return found


def test_the_best_step_is_kept_whatever_it_is_best_by(tmp_path):
    """Also when the metric or the direction changes, a score is NaN, or it came after the step."""
    workdir, keep = tmp_path / "run", {"keep": 2, "best": "x/rfid64", "best_is_highest": False}
    found = save_scored(
        open_(workdir, **keep), {1: 9.0, 2: np.nan, 3: 4.0, 4: 4.0, 5: 8.0}, "x/rfid64"
    )
    assert found == [1, 3] and runs.steps(workdir) == [3, 4, 5]  # the older one of equals
    manager = open_(workdir, **keep)
    manager.restore_newest(target())
    assert manager.best == ("x/rfid64", 3, 4.0)
    assert manager.scored(5, {"x/rfid64": 3.0})  # the evaluation that a preemption interrupted
    assert not manager.scored(6, {"x/other": 1.0})
    assert save_scored(manager, {6: 7.0, 7: np.nan, 8: 5.0}, "x/rfid64") == []
    assert runs.steps(workdir) == [5, 7, 8]
    manager = open_(workdir, **keep)
    manager.restore_newest(target())
    assert manager.best == ("x/rfid64", 5, 3.0)
    manager.close()
    for best, highest, expected in (("x/n", True, 5), ("x/rfid64", True, 5), ("x/new", True, None)):
        manager = open_(workdir, keep=2, best=best, best_is_highest=highest)
        manager.restore_newest(target())
        assert (manager.best and manager.best.step) == expected, (best, manager.best)
        manager.close()


def test_errors_of_the_machine_are_not_damage(saved, tmp_path, monkeypatch):
    """A process without file handles or rights must not push good checkpoints aside."""
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for error in (ValueError("RESOURCE_EXHAUSTED: Too many open files"), PermissionError("no")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(checkpoint, "_read_item", fail)
        with pytest.raises(type(error)):
            open_(workdir).restore_newest(target())
    assert runs.steps(workdir) == [4, 8]


def test_config_that_does_not_fit_names_the_paths(saved):
    def changed(**leaves):
        flat = jax.tree_util.tree_map_with_path(
            lambda p, x: (
                leaves.get(jax.tree_util.keystr(p, simple=True, separator="/").split("/")[-1], x)
                if "decoder/conv_out" in jax.tree_util.keystr(p, simple=True, separator="/")
                else x
            ),
            target().params,
        )
        return target().replace(params=flat)

    bias = target().params["ae"]["decoder"]["conv_out"]["bias"]
    cases = {
        "params/ae/decoder/conv_out/bias: shape": changed(
            bias=jax.ShapeDtypeStruct((7,), bias.dtype, sharding=bias.sharding)
        ),
        "params/ae/decoder/conv_out/bias: dtype": changed(
            bias=jax.ShapeDtypeStruct(bias.shape, jnp.bfloat16, sharding=bias.sharding)
        ),
        "params/ae/extra: missing in the checkpoint": target().replace(
            params={**target().params, "ae": {**target().params["ae"], "extra": bias}}
        ),
        "params/disc/.*: in the checkpoint but not needed": target().replace(
            params={"ae": target().params["ae"]}
        ),
        "stats/lecam/fake: in the checkpoint but not needed": target().replace(stats={}),
    }
    before = runs.digest(saved)
    for message, wanted in cases.items():
        manager = open_(saved)
        with pytest.raises(UserError, match=message):
            manager.restore_newest(wanted)
        manager.close()
    assert runs.digest(saved) == before


def test_init_from_takes_the_evaluated_average_and_only_what_is_common(saved, intact, tmp_path):
    """EMA decays sort as strings ("0.9" < "0.99"); the config's first one is meant."""
    cfg = runs.make_config("gan", init_from="x", **{"ema.decays": (0.99, 0.9)})
    task = cfg.task.build(cfg)
    state = jax.jit(lambda: step.init_state(task, cfg, rng.key(0)))()
    ema = {
        name: jax.tree.map(lambda x, v=v: x * 0 + v, t)
        for (name, t), v in zip(sorted(state.ema.items()), (9.0, 99.0), strict=True)
    }
    manager = open_(tmp_path)
    manager.save(state.replace(ema=ema, step=jnp.int32(3)), meta(cfg))
    manager.close()
    targets = {"params": {"ae": target().params["ae"]}, "stats": {}}
    found = checkpoint.load_weights(str(tmp_path), targets, prefer_ema=True)
    assert found.source.startswith("ema 0.99 of step 3") and found.params.keys() == {"ae"}
    assert all((np.asarray(x) == 99.0).all() for x in jax.tree.leaves(found.params))
    found = checkpoint.load_weights(str(tmp_path / "checkpoints" / "3"), targets, prefer_ema=False)
    assert same(jax.device_get(found.params), jax.device_get({"ae": state.params["ae"]}))


def test_init_from_leaves_no_statistics_and_no_layer_behind(tmp_path):
    """A config with RMS norms, or with fewer blocks, would run another network without a word."""
    deeper = tiny.model(Norm.batch)
    deeper.encoder.depths = (0, 1, 2)
    cfg = runs.make_config("phase1", **{"task.model": deeper})
    task = cfg.task.build(cfg)
    state = jax.jit(lambda: step.init_state(task, cfg, rng.key(0)))()
    manager = open_(tmp_path)
    manager.save(state.replace(step=jnp.int32(1)), meta(cfg))
    manager.close()
    cases = (
        (tiny.model(), "stats/ae/decoder/stage_1/block_0/norm/mean"),
        (tiny.model(Norm.batch), "params/ae/encoder/stage_2/block_1/attn/norm/bias"),
    )
    for model, lost in cases:
        other = runs.make_config("phase1", **{"task.model": model})
        wanted = runs.target(other)
        targets = {"params": wanted.params, "stats": wanted.stats}
        for ema in (True, False):
            with pytest.raises(UserError, match=f"{lost}: in the checkpoint but not needed"):
                checkpoint.load_weights(str(tmp_path), targets, prefer_ema=ema)


def test_init_from_passes_over_a_damaged_step_and_leaves_it_there(saved, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    _truncate(workdir / "checkpoints" / "8", "ema", None)
    before = runs.digest(workdir)
    targets = {"params": target().params, "stats": target().stats}
    found = checkpoint.load_weights(str(workdir), targets, prefer_ema=True)
    assert found.step == 4 and "checkpoint 8" in caplog.text
    assert runs.digest(workdir) == before  # another run's folder is only read


def test_digest_is_the_same_on_every_mesh_and_sees_every_bit():
    gen = np.random.default_rng(0)
    whole = {
        "f32": gen.normal(size=(16, 24)).astype(np.float32),
        "i32": np.arange(8, dtype=np.int32),
        "bf16": jnp.asarray(gen.normal(size=(8, 3)), jnp.bfloat16),
        "bool": np.array([True, False] * 4),
        "u8": gen.integers(0, 255, (8, 5), np.uint8),
        "scalar": np.float32(3.5),
    }
    table = checkpoint.leaf_table(jax.device_put(whole))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for spec in (("a",), ("b",), (("a", "b"),)):

        def place(x, spec=spec):
            return jax.sharding.NamedSharding(
                mesh, jax.sharding.PartitionSpec(*(spec if x.ndim and x.shape[0] % 8 == 0 else ()))
            )

        sharded = {k: jax.device_put(v, place(v)) for k, v in whole.items()}
        assert checkpoint.leaf_table(sharded) == table
    for name in ("f32", "bf16", "u8", "i32"):
        raw = np.asarray(whole[name])
        for _ in range(20):
            data = bytearray(raw.tobytes())
            data[gen.integers(len(data))] ^= 1 << gen.integers(8)
            changed = np.frombuffer(bytes(data), raw.dtype).reshape(raw.shape)
            assert checkpoint.leaf_table({name: jnp.asarray(changed)})[name] != table[name]
    swapped = whole["f32"][::-1].copy()
    assert checkpoint.leaf_table({"f32": jnp.asarray(swapped)})["f32"] != table["f32"]


def test_a_run_goes_on_from_the_older_checkpoint(tmp_path, caplog):
    """Through train(): damage, message, older step, the same end."""
    assert runs.run("phase1", tmp_path / "a", steps=6, evals=[]) == train.DONE
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "summary.json").unlink()
    _truncate(tmp_path / "b" / "checkpoints" / "6", "opt", None)
    with caplog.at_level(logging.WARNING):
        assert runs.run("phase1", tmp_path / "b", steps=6, evals=[]) == train.DONE
    assert "checkpoint 6" in caplog.text and "opt" in caplog.text
    assert (tmp_path / "b" / "checkpoints_damaged" / "6").is_dir()
    runs.assert_same_run("phase1", tmp_path / "a", tmp_path / "b", steps=6, evals=[])
