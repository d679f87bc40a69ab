"""Cached latents: records, statistics, order, damage, and whose decoder may read them."""

import dataclasses
import json
import re
import types

import fake_store
import numpy as np
import pytest
from etils import epath

from dcae_jax import provenance
from dcae_jax.data import latents, pipeline
from dcae_jax.data.latents import LatentDataConfig, Manifest, Plan, Record, ShardWriter, Storage
from dcae_jax.data.pipeline import DataConfig, Shard, Transform
from dcae_jax.data.sources import FolderConfig
from dcae_jax.errors import UserError

SIDE = 16


def plan(**changes) -> Plan:
    values = {
        "encoder": "e" * 64, "resolution": SIDE, "transform": "center_crop", "data": "d" * 16,
        "split": "train", "positions": "all records", "images": 20, "shape": (2, 3, 4),
        "moments": False, "flips": False, "dtype": Storage.f32, "compute": "float32",
        "shard_records": 7,
    }  # fmt: skip
    return Plan(**(values | changes))


def latent(i: int, shape=(2, 3, 4)) -> np.ndarray:
    return np.random.default_rng(i).normal(3.0, 2.0, shape).astype(np.float32)


def record(wanted: Plan, i: int, mirrored: bool = False) -> Record:
    """The label of `image_folder`'s i-th image; a mirror image is the negative."""
    value = -latent(i) if mirrored else latent(i)
    logvar = latent(1000 + i) - 6 if wanted.moments else None
    return Record(value, logvar, i // 10, f"image {i} é.png")


def fill(where, wanted: Plan) -> list[latents.ShardInfo]:
    """All shards of a plan, as the command writes them."""
    where.mkdir(parents=True, exist_ok=True)
    infos = []
    for shard in range(wanted.shards()):
        writer = ShardWriter(where, wanted, shard)
        for i in wanted.positions_of(shard):
            views = (False, True) if wanted.flips else (False,)
            writer.add(*(record(wanted, i, mirrored) for mirrored in views))
        infos.append(writer.finish())
    return infos


def cache(path, **changes) -> LatentDataConfig:
    """A finished cache of 20 made-up latents."""
    wanted = plan(**changes)
    infos = fill(latents.folder(str(path), wanted.split), wanted)
    found = latents.merged(infos)
    manifest = Manifest(
        plan=wanted, autoencoder="somewhere", weights="ema", variant=None, description="made up",
        decoder="f" * 64, model=None, dataset="images", classes=("apple", "pear"), num_classes=2,
        images=wanted.images, bad=0,
        shards=tuple((i.images, i.bytes, i.sha256) for i in infos),
        mean=tuple(found.mean.tolist()), std=tuple(found.std().tolist()), rms=found.rms(),
        scaling_factor=1 / found.rms(), scaling="measured", psnr=30.0, psnr_stored=29.5,
        psnr_images=2,
    )  # fmt: skip
    path = latents.folder(str(path), wanted.split) / latents.MANIFEST
    latents.write_json(path, manifest.to_json())
    return LatentDataConfig(path=str(path.parent.parent), threads=2)


def take(cfg, steps: int, **options) -> list[dict[str, np.ndarray]]:
    with cfg.batches(**options) as batches:
        return [next(batches) for _ in range(steps)]


def rows(found: list[dict[str, np.ndarray]], key: str = "latent") -> np.ndarray:
    return np.concatenate([b[key] for b in found])


# ------------------------------------------------------------------------- records and statistics


@pytest.mark.parametrize("dtype", list(Storage))
@pytest.mark.parametrize("moments", [False, True])
def test_a_record_comes_back(dtype, moments) -> None:
    wanted = plan(dtype=dtype, moments=moments)
    before = record(wanted, 3)
    data = latents.pack(wanted, before)
    after = latents.unpack(wanted, data)
    assert len(data) == 4 + 24 * (1 + moments) * dtype.dtype.itemsize + len("image 3 é.png") + 1
    assert (after.label, after.name) == (0, "image 3 é.png") and after.latent.dtype == np.float32
    # bf16 has 8 significant bits: rounding moves a number by at most 2^-8 of it.
    close = {"rtol": 2**-8 if dtype is Storage.bf16 else 0, "atol": 0}
    np.testing.assert_allclose(after.latent, before.latent, **close)
    assert (after.logvar is None) != moments
    if moments:
        np.testing.assert_allclose(after.logvar, before.logvar, **close)


def test_bf16_rounds_to_the_nearest_even() -> None:
    """By hand: 1 + 2^-8 lies between 1 and 1 + 2^-7; 1 + 3 2^-8 between 1 + 2^-7 and 1 + 2^-6."""
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    want = [1, 1, 1 + 2**-6, 1 + 2**-7]
    stored = latents.rounded(values, plan(dtype=Storage.bf16))
    assert stored.astype(np.float32).tolist() == want
    assert stored.view(np.uint16)[0].tobytes() == b"\x80\x3f", "little endian"


@pytest.mark.parametrize("moments", [False, True])
def test_statistics_are_those_of_all_pixels(moments, tmp_path) -> None:
    """Against numpy over all at once, whatever the shards; of samples where there are variances."""
    everything = np.stack([latent(i) for i in range(20)]).astype(np.float64)
    square = (everything**2).mean(axis=(0, 1, 2))
    variance = everything.var(axis=(0, 1, 2))
    if moments:
        logvar = np.stack([latent(1000 + i) - 6 for i in range(20)]).astype(np.float64)
        square, variance = (x + np.exp(logvar).mean(axis=(0, 1, 2)) for x in (square, variance))
    for shard_records in (20, 7, 1):
        wanted = plan(moments=moments, shard_records=shard_records)
        found = latents.merged(fill(epath.Path(tmp_path) / str(shard_records), wanted))
        # Twenty sums of float64: a few units in the last place.
        np.testing.assert_allclose(found.mean, everything.mean(axis=(0, 1, 2)), rtol=1e-14)
        np.testing.assert_allclose(found.std(), np.sqrt(variance), rtol=1e-13)
        assert found.rms() == pytest.approx(np.sqrt(square.mean()), rel=1e-13)


def test_an_infinite_latent_is_refused_by_name(tmp_path) -> None:
    for bad in (np.inf, np.nan, 3.4e38):  # the last overflows in bf16
        writer = ShardWriter(epath.Path(tmp_path), plan(dtype=Storage.bf16), 0)
        value = latent(0)
        value[1, 2, 3] = bad
        with pytest.raises(UserError, match=r"latent of cat\.png is not finite"):
            writer.add(Record(value, None, 0, "cat.png"))
        writer.abandon()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch) -> None:
    """ArrayRecord's writer says it at the latest when it is closed, with a RuntimeError."""
    from array_record.python import array_record_module

    class Full:
        def __init__(self, *args: str) -> None:
            self.write = lambda data: True

        def close(self) -> None:
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    writer = ShardWriter(epath.Path(tmp_path), plan(), 0)
    writer.add(record(plan(), 0))
    with pytest.raises(UserError, match=r"cannot write shard 0 .*No space left.*run the same"):
        writer.finish()
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_a_shard_without_its_json_does_not_count(tmp_path) -> None:
    where, wanted = epath.Path(tmp_path), plan()
    infos = fill(where, wanted)
    assert [latents.finished_shard(where, wanted, i) for i in range(3)] == infos
    assert [i.images for i in infos] == [7, 7, 6] and {i.labels for i in infos} == {1, 2}
    assert infos[1].sha256 == latents.sha256_of(latents.shard_path(where, 1))
    other = dataclasses.replace(wanted, encoder="0" * 64)
    assert latents.finished_shard(where, other, 0) is None
    text = (where / "latents-00000.json").read_text()
    (where / "latents-00000.json").write_text(text[:-9])  # torn
    (where / "latents-00001.json").unlink()
    (where / "latents-00002.array_record").write_bytes(b"short")
    assert [latents.finished_shard(where, wanted, i) for i in range(3)] == [None] * 3


# ------------------------------------------------------------------------------------------ batches


def test_latents_come_in_the_order_of_their_images(image_folder, tmp_path) -> None:
    """The images' own batches say which latent must be where: image i is all 100 c + i."""
    source = FolderConfig(str(image_folder))
    images = DataConfig(source, resolution=SIDE, transform=Transform.center_crop, flip=True)
    order = [source.build("train")[i].label * 10 + i % 10 for i in range(20)]
    for start in (0, 4):
        wanted = take(images, 6, batch=6, seed=5, start_step=start)
        found = take(cache(tmp_path / "c"), 6, batch=6, seed=5, start_step=start)
        numbers = [int(v) // 100 * 10 + int(v) % 100 for v in rows(wanted, "image")[:, 0, 0, 0]]
        want = np.stack([latent(order.index(n)) for n in numbers])
        np.testing.assert_array_equal(rows(found), want)
        np.testing.assert_array_equal(rows(found, "label"), rows(wanted, "label"))
        assert found[0].keys() == {"latent", "label"}
        assert rows(found).dtype == np.float32 and rows(found, "label").dtype == np.int32


def test_batches_do_not_depend_on_processes_threads_or_the_start(tmp_path) -> None:
    cfg = cache(tmp_path, flips=True, moments=True, dtype=Storage.bf16)
    whole = take(cfg, 8, batch=4, seed=1)
    assert whole[0].keys() == {"latent", "logvar", "label"}
    cfg.threads = 5
    parts = [take(cfg, 5, batch=4, seed=1, start_step=3, shard=Shard(i, 2)) for i in range(2)]
    for k in range(5):
        for key in whole[0]:
            both = np.concatenate([parts[0][k][key], parts[1][k][key]])
            np.testing.assert_array_equal(both, whole[3 + k][key])


def test_mirror_images_are_half_and_follow_the_position(tmp_path) -> None:
    cfg = cache(tmp_path, flips=True)
    first = rows(take(cfg, 20, batch=10, seed=0))
    cfg.flip = False
    straight = rows(take(cfg, 20, batch=10, seed=0))
    mirrored = (first == -straight).all(axis=(1, 2, 3))
    assert (mirrored | (first == straight).all(axis=(1, 2, 3))).all()
    assert 70 <= mirrored.sum() <= 130, "about half of 200"
    assert mirrored[:20].tolist() != mirrored[20:40].tolist(), "drawn anew in each epoch"
    assert cfg.fingerprint() == cache(tmp_path / "again", flips=True).fingerprint()
    one_view = cache(tmp_path / "one")
    np.testing.assert_array_equal(rows(take(one_view, 20, batch=10, seed=0)), straight)


def test_evaluations_see_each_latent_once_and_never_mirrored(tmp_path) -> None:
    cfg = cache(tmp_path, flips=True)
    with cfg.eval_batches(batch=8, n=20) as batches:
        found = list(batches)
    assert [b["mask"].tolist() for b in found] == [[1] * 8, [1] * 8, [1] * 4 + [0] * 4]
    np.testing.assert_array_equal(rows(found)[:20], np.stack([latent(i) for i in range(20)]))
    assert not rows(found)[20:].any()
    with cfg.eval_batches(batch=5, n=5) as batches:
        (some,) = list(batches)
    np.testing.assert_array_equal(some["latent"], np.stack([latent(i) for i in (0, 4, 8, 12, 16)]))
    with pytest.raises(UserError, match="which has 20"):
        cfg.eval_batches(batch=8, n=21)


def test_statistics_of_reading(tmp_path) -> None:
    with cache(tmp_path).batches(batch=4, seed=0) as batches:
        next(batches)
        found = batches.stats()
    assert found["rows"] == 4 and found["bad"] == 0 and found["rows_per_source"] == {"images": 4}


def test_the_shapes_of_a_batch_are_known_before(tmp_path) -> None:
    cfg = cache(tmp_path, moments=True)
    abstract = cfg.abstract_batch(4)
    for name, value in take(cfg, 1, batch=4, seed=0)[0].items():
        assert abstract[name] == (value.shape, value.dtype)
    assert abstract.keys() == {"latent", "logvar", "label"}
    assert cfg.resolution == SIDE
    nowhere = LatentDataConfig(path=str(tmp_path / "nowhere"), shape=(4, 4, 8))
    assert nowhere.abstract_batch(2)["latent"] == ((2, 4, 4, 8), np.float32)
    cfg.shape = (2, 3, 5)
    for ask in (cfg.manifest, cfg.fingerprint, lambda: cfg.abstract_batch(4)):
        with pytest.raises(UserError, match=r"\(2, 3, 4\), but data.shape=\(2, 3, 5\)"):
            ask()
    with pytest.raises(UserError, match=r"but data\.shape"):
        cfg.batches(batch=4, seed=0)


def test_images_and_latents_have_the_same_methods(image_folder) -> None:
    cfg = DataConfig(FolderConfig(str(image_folder)), resolution=SIDE, flip=False)
    batch = take(cfg, 1, batch=4, seed=0)[0]
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == cfg.abstract_batch(4)
    assert cfg.fingerprint() == pipeline.fingerprint(cfg)
    public = {n for n in dir(DataConfig) if not n.startswith("_")}
    for name in ("batches", "eval_batches", "fingerprint", "abstract_batch", "problems"):
        assert name in public and hasattr(LatentDataConfig, name)


# ---------------------------------------------------------------------------- what may go wrong


def test_manifests_survive_json(tmp_path) -> None:
    found = cache(tmp_path).manifest()
    again = Manifest.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found and again.plan.digest() == found.plan.digest()
    assert found.encoder == "e" * 64 and found.shape == (2, 3, 4) and found.psnr_cost == 0.5


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Plan) if f.name not in ("dtype", "shape")]
)
def test_every_field_of_a_plan_makes_another_cache(field) -> None:
    value = getattr(plan(), field)
    other = not value if isinstance(value, bool) else value * 2
    assert plan(**{field: other}).digest() != plan().digest()


def test_the_path_is_not_what_makes_a_run(tmp_path) -> None:
    assert re.fullmatch(provenance.CADENCE, "data.path")
    assert not re.fullmatch(provenance.CADENCE, "data.source.path")
    a, b = cache(tmp_path / "a"), cache(tmp_path / "b", encoder="1" * 64)
    assert a.fingerprint() != b.fingerprint()


def test_whose_decoder_may_read_them(tmp_path) -> None:
    manifest = cache(tmp_path).manifest()

    def net(encoder: str, decoder: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(source="runs/other", encoder=encoder, decoder=decoder)

    assert latents.check(manifest, net("e" * 64, "f" * 64)) == []
    (note,) = latents.check(manifest, net("e" * 64, "0" * 64))
    assert "runs/other" in note and "0" * 16 in note and "f" * 16 in note
    with pytest.raises(UserError) as e:
        latents.check(manifest, net("a" * 64, "f" * 64))
    assert "e" * 16 in str(e.value) and "a" * 16 in str(e.value) and "runs/other" in str(e.value)


def test_what_is_not_a_cache_is_told(tmp_path) -> None:
    cfg = LatentDataConfig(path=str(tmp_path / "c"))
    with pytest.raises(UserError, match=r"no latents of split 'train' in .*--out .*c --split"):
        cfg.manifest()
    cache(tmp_path / "c", split="test")
    with pytest.raises(UserError, match="it has: test"):
        cfg.batches(batch=2, seed=0)
    fill(latents.folder(str(tmp_path / "c"), "train"), plan())
    with pytest.raises(UserError, match="not finished"):
        cfg.fingerprint()
    path = tmp_path / "c" / "test" / "manifest.json"
    value = json.loads(path.read_text())
    value["plan"]["format"] = 0
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="of format 0, this version"):
        latents.read_manifest(str(tmp_path / "c"), "test")


def test_mistakes_in_the_config_are_listed_together(tmp_path) -> None:
    cfg = LatentDataConfig(shape=(1, 2), threads=0, prefetch=0)
    for name in ("path", "shape", "threads", "prefetch"):
        assert any(f"data.{name}" in p for p in cfg.problems()), name
    cfg = cache(tmp_path)
    assert cfg.problems() == []
    with pytest.raises(UserError, match="batch 5 is not divisible by the 2"):
        cfg.batches(batch=5, seed=0, shard=Shard(0, 2))
    with pytest.raises(UserError, match="seed=-1"):
        cfg.batches(batch=4, seed=-1)


def test_missing_and_cut_shards_are_named(tmp_path) -> None:
    cfg = cache(tmp_path)
    shards = sorted((tmp_path / "train").glob("*.array_record"))
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    with pytest.raises(UserError) as e:
        cfg.batches(batch=4, seed=0)
    said = str(e.value)
    assert "2 shard(s)" in said and "00000.array_record is missing" in said and "00002" in said
    assert "cache-latents" in said


def test_a_flipped_bit_is_an_error_and_not_a_latent(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(latents.time, "sleep", lambda seconds: None)
    cfg = cache(tmp_path, shard_records=20)
    (shard,) = (tmp_path / "train").glob("*.array_record")
    data = bytearray(shard.read_bytes())
    where = data.find(latent(11).tobytes())
    data[where + 5] ^= 4
    shard.write_bytes(data)
    with cfg.eval_batches(batch=20, n=20) as batches, pytest.raises(UserError, match="be read"):
        next(batches)


def test_a_cache_on_an_object_store(tmp_path, monkeypatch) -> None:
    """Written without rename or append; read through copies on a disk, checked by their names."""
    store = fake_store.reset()
    monkeypatch.setenv("DCAE_JAX_DATA", str(tmp_path / "disk"))
    wanted = rows(take(cache(tmp_path / "local"), 4, batch=5, seed=2))
    cfg = cache("fake://bucket/latents")
    assert {n.rsplit("/", 1)[1] for n in store.objects} == {
        p.name for p in (tmp_path / "local" / "train").iterdir()
    }
    np.testing.assert_array_equal(rows(take(cfg, 4, batch=5, seed=2)), wanted)
    copies = sorted(p.stem for p in (tmp_path / "disk" / "latents").iterdir())
    assert copies == sorted(sha for *_, sha in cfg.manifest().shards)
    small = types.SimpleNamespace(free=latents.MARGIN)
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: small)
    np.testing.assert_array_equal(rows(take(cfg, 4, batch=5, seed=2)), wanted)  # no new copies
    monkeypatch.setenv("DCAE_JAX_DATA", str(tmp_path / "full"))
    with cfg.batches(batch=5, seed=2) as batches, pytest.raises(UserError, match="GB free"):
        next(batches)


def test_a_source_of_latents_knows_names_and_labels(tmp_path) -> None:
    cfg = cache(tmp_path)
    source = latents.LatentSource(cfg.path, "train")
    assert len(source) == 20 and source.name == "images" and source.classes == ("apple", "pear")
    assert source.read(13).name == "image 13 é.png" and source.read(13).label == 1
