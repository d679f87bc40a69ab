"""`load` from every kind of source, and the scaling factor that holds for one encoder only."""

import json

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import runs
import tiny
from etils import epath

from dcae_jax import autoencoder, checkpoint
from dcae_jax.config import InitWeights
from dcae_jax.errors import UserError

IMAGE = jnp.asarray(networks.picture(16, 24)[None] / 127.5 - 1, jnp.float32)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return networks.save(tmp_path_factory.mktemp("run") / "w")


def own(workdir, item="params"):
    """params/ae (or the average's) of the checkpoint, read by the code of training."""
    found, _ = runs.state("phase1", workdir)
    prefix = {"params": "params/ae/", "ema": "ema/0.9/params/ae/"}[item]
    flat = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    tree: dict = {}
    for path, value in flat.items():
        node, (*parents, last) = tree, path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


@pytest.mark.parametrize("weights", list(InitWeights))
def test_a_run_encodes_and_decodes_as_its_network(workdir, weights) -> None:
    net = autoencoder.load(str(workdir), weights)
    params = own(workdir, "ema" if weights is InitWeights.ema else "params")
    model = tiny.model().build()
    z = jax.jit(lambda v, x: model.apply(v, x, method="encode"))({"params": params}, IMAGE)
    np.testing.assert_array_equal(net.encode(IMAGE), z)  # the same program on the same weights
    y = jax.jit(lambda v, z: model.apply(v, z, method="decode"))({"params": params}, z)
    np.testing.assert_array_equal(net.decode(z), y)
    assert net.cfg == tiny.model() and net.scaling_factor is None and net.origin is None
    assert ("ema" in net.source) == (weights is InitWeights.ema) and "step 5" in net.source


def test_a_step_directory_is_a_source_too(workdir) -> None:
    one = autoencoder.load(str(workdir))
    other = autoencoder.load(str(workdir / "checkpoints" / "5"))
    assert one.encoder == other.encoder and one.source == other.source


def test_average_and_raw_weights_are_different_encoders(workdir) -> None:
    raw = autoencoder.load(str(workdir), InitWeights.params)
    assert raw.encoder != autoencoder.load(str(workdir)).encoder


def test_a_kl_autoencoder_is_loaded_the_same_way(tmp_path) -> None:
    networks.save(tmp_path / "w", model=tiny.kl_model())
    net = autoencoder.load(str(tmp_path / "w"), InitWeights.params)
    assert net.cfg == tiny.kl_model()
    z = net.encode(IMAGE)
    assert z.shape == (1, 4, 6, 4) and net.decode(z).shape == IMAGE.shape
    np.testing.assert_array_equal(net.encode(IMAGE), z), "the mean, no draw"


def test_the_digest_is_that_of_the_encoder_alone() -> None:
    net = networks.in_memory()
    params = net.variables["params"]

    def digest(**parts) -> str:
        return autoencoder.encoder_digest({"params": {**params, **parts}})

    assert (
        digest() == net.encoder == digest(decoder=jax.tree.map(jnp.zeros_like, params["decoder"]))
    )
    for path in (("conv_out", "bias"), ("stage_1", "block_0", "conv1", "kernel")):
        changed = jax.tree.map(lambda x: x, params["encoder"])
        node = changed
        for name in path[:-1]:
            node = node[name]
        flat = node[path[-1]].reshape(-1)
        node[path[-1]] = flat.at[-1].add(1e-3).reshape(node[path[-1]].shape)
        assert digest(encoder=changed) != net.encoder, path
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert autoencoder.encoder_digest(jax.device_put(net.variables, everywhere)) == net.encoder


def test_running_statistics_of_an_encoder_belong_to_its_digest() -> None:
    params = {"encoder": {"a": jnp.ones(3)}}
    stats = {"encoder": {"mean": jnp.zeros(3)}, "decoder": {"mean": jnp.ones(3)}}
    whole = autoencoder.encoder_digest({"params": params, "batch_stats": stats})
    assert whole != autoencoder.encoder_digest({"params": params})
    moved = {**stats, "encoder": {"mean": jnp.ones(3)}}
    assert whole != autoencoder.encoder_digest({"params": params, "batch_stats": moved})


# ------------------------------------------------------------------------------- the scaling factor


def stats(workdir, encoder: str, factor: float) -> None:
    path = workdir / autoencoder.STATS_FILE
    path.write_text(json.dumps({"encoder": encoder, "scaling_factor": factor, "rms": 1 / factor}))


def test_measured_statistics_count_for_their_encoder_only(tmp_path) -> None:
    networks.save(tmp_path / "w")
    net = autoencoder.load(str(tmp_path / "w"))
    stats(tmp_path / "w", net.encoder, 0.25)
    assert autoencoder.load(str(tmp_path / "w")).scaling_factor == 0.25
    assert autoencoder.load(str(tmp_path / "w"), InitWeights.params).scaling_factor is None
    stats(tmp_path / "w", "another", 0.5)
    net = autoencoder.load(str(tmp_path / "w"))
    assert net.scaling_factor is None and "is of another encoder" in net.factor_origin
    (tmp_path / "w" / autoencoder.STATS_FILE).unlink()
    assert "no latent_stats.json" in autoencoder.load(str(tmp_path / "w")).factor_origin


def imports_factor(monkeypatch, factor: float | None, encoder: str) -> None:
    """Makes every workdir look like an import that recorded this factor."""
    origin = autoencoder.Origin("name", factor, "a file", {}, {}, encoder)
    newest = checkpoint.newest_meta

    def with_origin(workdir):
        return {**newest(workdir), "autoencoder": origin.to_json()}

    monkeypatch.setattr(checkpoint, "newest_meta", with_origin)


def test_what_an_import_recorded_comes_before_what_was_measured(tmp_path, monkeypatch) -> None:
    networks.save(tmp_path / "w")
    encoder = autoencoder.load(str(tmp_path / "w")).encoder
    stats(tmp_path / "w", encoder, 0.25)
    for recorded, of, expected, said in (
        (0.5, encoder, 0.5, "recorded by the import"),
        (0.5, encoder, 0.5, "; not 0.25, measured, "),
        (0.5, "another", 0.25, "measured"),
        (None, encoder, 0.25, "measured"),
    ):
        with monkeypatch.context() as patch:
            imports_factor(patch, recorded, of)
            found = autoencoder.load(str(tmp_path / "w"))
        assert found.scaling_factor == expected and said in found.factor_origin


@pytest.mark.parametrize(
    "text",
    ['{"rms":', '{"rms": 1}', "[]", "null", '{"encoder": "x", "scaling_factor": 0}',
     '{"encoder": "x", "scaling_factor": NaN}', '{"encoder": "x", "scaling_factor": "1"}',
     '{"encoder": 1, "scaling_factor": 1.0}'],
)  # fmt: skip
def test_damaged_statistics_are_told_and_stop_nothing(workdir, text) -> None:
    path = epath.Path(workdir) / autoencoder.STATS_FILE
    path.write_text(text)
    try:
        with pytest.raises(UserError, match=r"latent_stats\.json is damaged .*--force"):
            autoencoder.read_stats(epath.Path(workdir))
        net = autoencoder.load(str(workdir))
        assert net.scaling_factor is None and "is damaged" in net.factor_origin
    finally:
        path.unlink()


def test_phase_3_finds_the_factor_of_the_run_it_started_from(tmp_path) -> None:
    """The encoder is frozen, so its digest and its factor stay; a trained one has neither."""
    networks.save(tmp_path / "one")
    raw = InitWeights.params
    first = autoencoder.load(str(tmp_path / "one"), raw)
    stats(tmp_path / "one", first.encoder, 0.25)
    frozen = {"encoder": first.variables["params"]["encoder"]}
    source = str(tmp_path / "one" / "checkpoints" / "5")
    networks.save(tmp_path / "two", seed=1, init_from=source, frozen=frozen)
    networks.save(tmp_path / "three", seed=2, init_from=str(tmp_path / "two"), frozen=frozen)
    networks.save(tmp_path / "trained", seed=3, init_from=str(tmp_path / "three"))
    for name in ("two", "three"):
        net = autoencoder.load(str(tmp_path / name), raw)
        assert net.encoder == first.encoder and net.scaling_factor == 0.25, name
    assert autoencoder.load(str(tmp_path / "trained"), raw).scaling_factor is None


def test_the_chain_is_found_from_everywhere_and_after_a_move(tmp_path, monkeypatch) -> None:
    """`init_from` is what was typed in the folder where the run was started."""
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    raw, runs_folder = InitWeights.params, tmp_path / "start" / "runs" / "demo"
    networks.save(runs_folder / "two")
    first = autoencoder.load("runs/demo/two", raw)
    stats(runs_folder / "two", first.encoder, 0.25)
    frozen = {"encoder": first.variables["params"]["encoder"]}
    networks.save(runs_folder / "three", seed=1, init_from="runs/demo/two", frozen=frozen)
    step = "runs/demo/two/checkpoints/5"
    networks.save(runs_folder / "again", seed=1, init_from=step, frozen=frozen)
    assert autoencoder.load("runs/demo/three", raw).scaling_factor == 0.25
    elsewhere = tmp_path / "start" / "later" / "three"
    networks.save(elsewhere, seed=1, init_from="runs/demo/two", frozen=frozen)
    monkeypatch.chdir(tmp_path)
    for name in ("three", "again", elsewhere):
        found = autoencoder.load(str(runs_folder / name), raw)
        assert found.scaling_factor == 0.25 and "latent_stats.json" in found.factor_origin
    runs_folder.rename(tmp_path / "moved")  # all of them: no folder above fits any more
    for name in ("three", "again"):
        assert autoencoder.load(str(tmp_path / "moved" / name), raw).scaling_factor == 0.25
    (tmp_path / "moved" / "two").rename(tmp_path / "away")
    found = autoencoder.load(str(tmp_path / "moved" / "three"), raw)
    assert found.scaling_factor is None
    assert "initialised from runs/demo/two, which is neither" in found.factor_origin
    assert str(tmp_path / "moved" / "two") in found.factor_origin


def test_a_chain_that_is_gone_or_a_circle_ends(tmp_path) -> None:
    networks.save(tmp_path / "gone", init_from=str(tmp_path / "nowhere"))
    net = autoencoder.load(str(tmp_path / "gone"))
    assert net.scaling_factor is None and str(tmp_path / "nowhere") in net.factor_origin
    networks.save(tmp_path / "circle", init_from=str(tmp_path / "circle"))
    assert autoencoder.load(str(tmp_path / "circle")).scaling_factor is None


# ----------------------------------------------------------------------------------------- mistakes


def test_wrong_sources_are_told_what_is_expected(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist; give a workdir"):
        autoencoder.load(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        autoencoder.load(str(tmp_path / "empty"))


def test_a_flipped_bit_is_refused(tmp_path) -> None:
    networks.save(tmp_path / "w")
    folder = tmp_path / "w" / "checkpoints" / "5" / "params"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(UserError, match="no valid checkpoint"):
        autoencoder.load(str(tmp_path / "w"), InitWeights.params)
    meta = checkpoint.newest_meta(epath.Path(tmp_path / "w"))
    assert meta["step"] == 5, "nothing was moved"
