"""Batches are a function of (seed, step); bad records, mixtures, evaluation, worker processes."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import Counter

import grain
import numpy as np
import psutil
import pytest

from dcae_jax.data import pipeline
from dcae_jax.data.pipeline import DataConfig, Shard, Transform
from dcae_jax.data.sources import FolderConfig, MixtureConfig, MixturePart, PhotosConfig, Record
from dcae_jax.errors import UserError


def take(cfg: DataConfig, count: int, **arguments) -> list[dict[str, np.ndarray]]:
    with pipeline.batches(cfg, **arguments) as batches:
        return list(itertools.islice(batches, count))


def joined(batches: list[dict[str, np.ndarray]], key: str = "image") -> np.ndarray:
    return np.concatenate([batch[key] for batch in batches])


def folder_config(path: pathlib.Path, **options) -> DataConfig:
    return DataConfig(FolderConfig(str(path)), resolution=32, **options)


PHOTOS = DataConfig(resolution=32, transform=Transform.random_resized_crop)


def shards_of(cfg: DataConfig, count: int, steps: int) -> list[dict[str, np.ndarray]]:
    """The global batches, put together from the contiguous rows of `count` shards."""
    arguments = {"batch": 16, "seed": 3}
    each = [take(cfg, steps, **arguments, shard=Shard(i, count)) for i in range(count)]
    assert all(len(b["image"]) == 16 // count for batches in each for b in batches)
    return [
        {key: np.concatenate([batches[s][key] for batches in each]) for key in ("image", "label")}
        for s in range(steps)
    ]


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_batches_are_equal_on_any_number_of_shards(count: int) -> None:
    assert_same(shards_of(PHOTOS, count, 3), shards_of(PHOTOS, 1, 3))


@pytest.mark.parametrize("threads", [1, 7])
def test_batches_are_equal_with_any_number_of_threads(threads: int) -> None:
    cfg = DataConfig(resolution=32, transform=Transform.random_resized_crop, threads=threads)
    assert_same(shards_of(cfg, 2, 6), shards_of(PHOTOS, 1, 6))


@pytest.mark.multiprocess
def test_batches_are_equal_with_worker_processes() -> None:
    cfg = DataConfig(resolution=32, transform=Transform.random_resized_crop, workers=2)
    assert_same(take(cfg, 5, batch=16, seed=3), take(PHOTOS, 5, batch=16, seed=3))


def test_a_position_does_not_depend_on_the_batch_size() -> None:
    """Row r of step k is position k * batch + r, for every batch size."""
    small, large = take(PHOTOS, 6, batch=4, seed=0), take(PHOTOS, 2, batch=12, seed=0)
    np.testing.assert_array_equal(joined(small), joined(large))


def test_batch_layout() -> None:
    batch = take(DataConfig(), 1, batch=2, seed=0)[0]
    assert set(batch) == {"image", "label"}
    assert batch["image"].shape == (2, 128, 128, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (2,) and batch["label"].dtype == np.int32


def test_start_step_is_the_same_as_skipping() -> None:
    whole = take(PHOTOS, 9, batch=5, seed=1)
    assert_same(take(PHOTOS, 4, batch=5, seed=1, start_step=5), whole[5:])


def test_seeking_to_step_ten_million_is_quick() -> None:
    take(PHOTOS, 1, batch=8, seed=0)  # opens and prepares the source
    begin = time.perf_counter()
    far = take(PHOTOS, 1, batch=8, seed=0, start_step=10_000_000)
    assert time.perf_counter() - begin < 2.0  # 0.1 s of decoding on a free machine, nothing to skip
    assert sorted(far[0]["label"]) == list(range(8))  # 8 photographs: each batch is one epoch


@pytest.mark.parametrize("n", [1, 2, 8, 1000, 8192, 8193, 1_281_167])
def test_seeking_in_any_size_of_set_is_quick(n: int) -> None:
    order = pipeline._shuffled(n, seed=5)
    begin = time.perf_counter()
    assert 0 <= order[10_000_000 * 256] < n
    assert time.perf_counter() - begin < 0.2  # measured 5e-5 s; a set is never walked through


@pytest.mark.parametrize("n", [1, 8, 100, 8193])
def test_every_epoch_is_another_permutation(n: int) -> None:
    order = pipeline._shuffled(n, seed=5)
    epochs = [tuple(order[e * n + i] for i in range(n)) for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(epochs)) == (1 if n == 1 else 3)


def test_neighbouring_seeds_do_not_share_epochs() -> None:
    """Grain reseeds epoch e with seed + e: unspread, seed 1 would replay seed 0's epoch 1."""
    first = pipeline._shuffled(9000, pipeline._derive(0, "order 0"))
    second = pipeline._shuffled(9000, pipeline._derive(1, "order 0"))
    agree = np.mean([first[9000 + i] == second[i] for i in range(500)])
    assert agree < 0.02  # two random permutations agree at 1/9000 of the places


def test_seeds_differ_and_epochs_crop_anew() -> None:
    a, b = take(PHOTOS, 2, batch=8, seed=0), take(PHOTOS, 1, batch=8, seed=1)
    assert (a[0]["image"] != b[0]["image"]).any()
    by_label = [dict(zip(x["label"].tolist(), x["image"], strict=True)) for x in a]
    assert all((by_label[0][k] != by_label[1][k]).any() for k in range(8))


def test_labels_belong_to_their_images(image_folder: pathlib.Path) -> None:
    images, labels = (joined(take(folder_config(image_folder), 5, batch=8, seed=0), k)
                      for k in ("image", "label"))  # fmt: skip
    np.testing.assert_array_equal(images[:, 0, 0, 0] // 100, labels)
    assert (images == images[:, :1, :1, :1]).all()  # each file is one grey


def test_cache_changes_nothing(image_folder: pathlib.Path) -> None:
    cached, direct = (
        take(folder_config(image_folder, cache_mb=mb), 8, batch=8, seed=0) for mb in (64, 0)
    )
    assert_same(cached, direct)


def test_deterministic_generator_of_a_position(image_folder: pathlib.Path) -> None:
    """A position draws the same numbers whatever was drawn before (threads share a pool)."""
    cfg = DataConfig(FolderConfig(str(image_folder)), resolution=16)
    parts = pipeline._parts(cfg)
    order = pipeline._training_order(parts, 0)
    drawn = order.random_map(lambda element, rng: rng.integers(1 << 30, size=3), seed=5)
    forwards = [drawn[i] for i in range(50)]
    backwards = [drawn[i] for i in reversed(range(50))][::-1]
    np.testing.assert_array_equal(forwards, backwards)


# ---- Bad records --------------------------------------------------------------------------------


def spoil(folder: pathlib.Path, names: list[str], data: bytes = b"no image") -> None:
    for name in names:
        (folder / name).write_bytes(data)


def test_bad_record_is_replaced_by_its_successor(image_folder: pathlib.Path) -> None:
    clean = take(folder_config(image_folder), 5, batch=8, seed=0)
    spoil(image_folder, ["apple/3.png"])
    cfg = folder_config(image_folder, max_bad_fraction=0.5)
    with pipeline.batches(cfg, batch=8, seed=0) as batches:
        spoiled = list(itertools.islice(batches, 5))
        stats = batches.stats()
    want = joined(clean)[:, 0, 0, 0]
    np.testing.assert_array_equal(joined(spoiled)[:, 0, 0, 0], np.where(want == 3, 4, want))
    assert stats["rows"] == 40 and stats["bad"] == (want == 3).sum() == 2
    assert stats["read"] == 42 and stats["bad_reasons"] == {"not an image": 2}
    assert stats["bad_records"] == {"apple/3.png": "not an image: 8 bytes"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"text", "not an image"), (None, "cannot be read from storage")],
)
def test_each_bad_record_has_its_outcome(
    image_folder: pathlib.Path, data: bytes | None, reason: str
) -> None:
    cfg = folder_config(image_folder, max_bad_fraction=0.5)
    with pipeline.batches(cfg, batch=20, seed=0) as batches:
        if data is None:
            batches.close()  # the listing is kept, the file goes
            (image_folder / "pear/2.png").unlink()
        else:
            spoil(image_folder, ["pear/2.png"], data)
    with pipeline.batches(cfg, batch=20, seed=0) as batches:
        next(batches)
        assert batches.stats()["bad_reasons"] == {reason: 1}


def test_image_smaller_than_the_crop_is_named(image_folder: pathlib.Path) -> None:
    cfg = folder_config(image_folder, max_bad_fraction=1.0)
    cfg.resolution = 45
    with pipeline.batches(cfg, batch=20, seed=0) as batches:
        next(batches)
        stats = batches.stats()
    assert stats["bad_reasons"].keys() == {"smaller than the crop"}
    assert "data.min_size=45" in next(iter(stats["bad_records"].values()))


def test_min_size_leaves_small_records_out(image_folder: pathlib.Path) -> None:
    cfg = folder_config(image_folder, min_size=45)
    cfg.resolution = 45
    described = pipeline.describe(cfg)
    assert described["records"] == {"images": 10} and described["left_out_below_min_size"] == 10
    with pipeline.batches(cfg, batch=10, seed=0) as batches:
        greys = {int(image[0, 0, 0]) % 100 for image in next(batches)["image"]}
        assert batches.stats()["bad"] == 0
    assert greys == {5, 6, 7, 8, 9}
    cfg.min_size = 60
    with pytest.raises(UserError, match=r"none of the 20 records .* 60 px .*largest has 49"):
        pipeline.batches(cfg, batch=10, seed=0)


def test_too_many_bad_records_stop_the_run_but_not_the_first(image_folder: pathlib.Path) -> None:
    spoil(image_folder, [f"apple/{i}.png" for i in (1, 4, 7)])  # 15 %
    cfg = folder_config(image_folder, max_bad_fraction=0.1)
    with pipeline.batches(cfg, batch=1, seed=0) as batches:
        with pytest.raises(
            UserError, match=r"(?s)are bad .*max_bad_fraction=0.1.*apple/"
        ) as caught:
            for steps in range(40):  # noqa: B007
                next(batches)
    assert "data-check" in str(caught.value)
    assert 10 <= steps <= 20  # judged when as many are read as there are, not at the first bad one
    cfg.max_bad_fraction = 0.5
    assert len(take(cfg, 40, batch=1, seed=0)) == 40


def test_nothing_but_bad_records_stops_at_once(image_folder: pathlib.Path) -> None:
    spoil(image_folder, [f"{c}/{i}.png" for c in ("apple", "pear") for i in range(10)])
    with pytest.raises(UserError, match=r"20 records in a row of 'images' cannot be used"):
        take(folder_config(image_folder, max_bad_fraction=1.0), 1, batch=1, seed=0)


@pytest.mark.multiprocess
def test_statistics_and_errors_come_through_worker_processes(image_folder: pathlib.Path) -> None:
    spoil(image_folder, ["apple/3.png"])
    stats = []
    for workers in (0, 2):
        cfg = folder_config(image_folder, max_bad_fraction=0.5, workers=workers)
        with pipeline.batches(cfg, batch=8, seed=0) as batches:
            list(itertools.islice(batches, 5))
            stats.append(batches.stats())
    assert stats[0] == stats[1] and stats[0]["bad"] == 2


# ---- Mixtures -----------------------------------------------------------------------------------


def mixture(folder: pathlib.Path, **options) -> DataConfig:
    parts = (
        MixturePart(PhotosConfig(), weight=3.0),
        MixturePart(FolderConfig(str(folder)), weight=1.0, name="own", **options),
    )
    return DataConfig(MixtureConfig(parts), resolution=32)


def test_mixture_shares_are_exact_in_every_block(image_folder: pathlib.Path) -> None:
    cfg = mixture(image_folder)
    order = pipeline._training_order(pipeline._parts(cfg), 0)
    for block in (0, 7):
        start = block * pipeline.BLOCK
        drawn = [order[p] for p in range(start, start + pipeline.BLOCK)]
        assert Counter(part for part, _ in drawn) == {0: 3072, 1: 1024}
        per_record = Counter(index for part, index in drawn if part == 1)
        assert set(per_record) == set(range(20))
        # 1024 draws from 20 records are 51.2 epochs: each record comes 51 or 52 times, +1 at an end
        assert max(per_record.values()) - min(per_record.values()) <= 2
    # Within a block the parts are mixed: 1,024 of 4,096 at random give 256 +- 14 in a quarter.
    quarter = sum(order[p][0] for p in range(1024))
    assert abs(quarter - 256) < 5 * 14


def test_mixture_serves_each_turn_of_a_member_once() -> None:
    """Over whole blocks the turns of each member are 0, 1, 2, ...: none skipped, none twice."""
    counters = [grain.MapDataset.range(10**9) for _ in range(3)]
    quotas = pipeline._shares([0.5, 0.3, 0.2], pipeline.BLOCK)
    order = pipeline._Mixture(pipeline._shuffled(pipeline.BLOCK, 1), counters, quotas)
    turns: list[list[int]] = [[], [], []]
    for position in range(3 * pipeline.BLOCK):
        part, turn = order[position]
        turns[part].append(turn)
    for served, quota in zip(turns, quotas, strict=True):
        assert sorted(served) == list(range(3 * quota))


def test_mixture_counts_and_shards(image_folder: pathlib.Path) -> None:
    cfg = mixture(image_folder)
    assert_same(shards_of(cfg, 4, 3), shards_of(cfg, 1, 3))
    with pipeline.batches(cfg, batch=64, seed=0) as batches:
        list(itertools.islice(batches, 4))
        stats = batches.stats()
    assert stats["rows_per_source"].keys() == {"photos", "own"}
    assert sum(stats["rows_per_source"].values()) == stats["rows"] == 256
    assert abs(stats["rows_per_source"]["own"] - 64) < 35  # 5 standard deviations (6.9)
    far = take(cfg, 1, batch=16, seed=3, start_step=10_000_000)
    assert far[0]["image"].shape == (16, 32, 32, 3)


def test_mixture_minimum_size_counts_for_its_member_alone(image_folder: pathlib.Path) -> None:
    described = pipeline.describe(mixture(image_folder, min_size=45))
    assert described["records"] == {"photos": 8, "own": 10}
    assert described["shares"] == {"photos": 0.75, "own": 0.25}


def test_mixture_members_of_one_name_are_numbered(image_folder: pathlib.Path) -> None:
    part = MixturePart(FolderConfig(str(image_folder)))
    cfg = DataConfig(MixtureConfig((part, part)), resolution=32)
    assert set(pipeline.describe(cfg)["records"]) == {"images#0", "images#1"}


def test_mixture_mistakes() -> None:
    with pytest.raises(UserError, match="parts is empty"):
        pipeline.batches(DataConfig(MixtureConfig()), batch=1, seed=0)
    part = MixturePart(PhotosConfig(), weight=0.0)
    problems = DataConfig(MixtureConfig((part, MixturePart(FolderConfig())))).problems()
    assert "weight=0.0 must be above 0" in problems[0] and "parts[1]: source.path" in problems[1]
    tiny = (MixturePart(PhotosConfig(), weight=1e-6), MixturePart(PhotosConfig()))
    with pytest.raises(UserError, match="fewer than one of 4096 positions"):
        take(DataConfig(MixtureConfig(tiny)), 1, batch=1, seed=0)


# ---- Evaluation ---------------------------------------------------------------------------------


def evaluate(cfg: DataConfig, **arguments) -> list[dict[str, np.ndarray]]:
    with pipeline.eval_batches(cfg, **arguments) as batches:
        return list(batches)


def test_evaluation_is_exact_and_padded(image_folder: pathlib.Path) -> None:
    cfg = folder_config(image_folder, transform=Transform.center_crop)
    batches = evaluate(cfg, batch=8, n=20)
    masks, images = joined(batches, "mask"), joined(batches)
    assert masks.dtype == np.float32 and masks.tolist() == [1] * 20 + [0] * 4
    np.testing.assert_array_equal(images[:20, 0, 0, 0] % 100, list(range(10)) * 2)
    assert (images[20:] == 0).all()


@pytest.mark.parametrize("count", [2, 4])
def test_evaluation_is_equal_on_any_number_of_shards(
    image_folder: pathlib.Path, count: int
) -> None:
    cfg = folder_config(image_folder)
    whole = evaluate(cfg, batch=8, n=13)
    parts = [evaluate(cfg, batch=8, n=13, shard=Shard(i, count)) for i in range(count)]
    assert {len(p) for p in parts} == {2}
    for step, batch in enumerate(whole):
        for key, value in batch.items():
            np.testing.assert_array_equal(
                np.concatenate([part[step][key] for part in parts]), value
            )


def test_evaluation_spreads_over_the_split(image_folder: pathlib.Path) -> None:
    batch = evaluate(folder_config(image_folder), batch=4, n=4)[0]
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 5, 100, 105]


def test_evaluation_does_not_depend_on_flip_or_workers() -> None:
    plain = DataConfig(split="test", flip=False)
    assert_same(
        evaluate(DataConfig(split="test", flip=True, workers=3), batch=8, n=16),
        evaluate(plain, batch=8, n=16),
    )


def test_more_images_than_records_are_several_crops_or_an_error(
    image_folder: pathlib.Path,
) -> None:
    batch = evaluate(DataConfig(split="test"), batch=16, n=16)[0]
    np.testing.assert_array_equal(batch["label"][:8], batch["label"][8:])
    assert (batch["image"][:8] != batch["image"][8:]).any(axis=(1, 2, 3)).all()
    with pytest.raises(UserError, match=r"21 images of 'images'.* which has 20"):
        evaluate(folder_config(image_folder, transform=Transform.center_crop), batch=8, n=21)


def test_evaluation_of_a_mixture_takes_its_shares(image_folder: pathlib.Path) -> None:
    with pipeline.eval_batches(mixture(image_folder), batch=8, n=12) as batches:
        assert len(list(batches)) == 2
        assert batches.stats()["rows_per_source"] == {"photos": 9, "own": 3}


# ---- Mistakes -----------------------------------------------------------------------------------


def test_batch_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"batch 100 .* 8 processes .*96 or 104"):
        pipeline.batches(DataConfig(), batch=100, seed=0, shard=Shard(0, 8))
    with pytest.raises(UserError, match="shard 2 of 2 does not exist"):
        pipeline.batches(DataConfig(), batch=4, seed=0, shard=Shard(2, 2))


def test_all_problems_are_named_at_once() -> None:
    cfg = DataConfig(FolderConfig(holdout=1.5), resolution=0, threads=0, area=(0.5, 0.1))
    with pytest.raises(UserError) as caught:
        pipeline.batches(cfg, batch=0, seed=0)
    for word in ("source.path", "holdout", "resolution", "threads", "area", "batch=0"):
        assert word in str(caught.value)
    with pytest.raises(UserError, match="must not be negative"):
        pipeline.batches(DataConfig(), batch=1, seed=-1)


def test_fingerprint_follows_the_records_not_the_place(
    image_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(image_folder), str(moved)], check=True)
    ours, theirs = (pipeline.fingerprint(folder_config(path)) for path in (image_folder, moved))
    assert ours == theirs
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", str(image_folder), str(other)], check=True)
    (other / "pear" / "9.png").unlink()
    assert pipeline.fingerprint(folder_config(other)) != ours
    assert pipeline.fingerprint(folder_config(image_folder, min_size=45)) != ours


# ---- Worker processes ---------------------------------------------------------------------------


class EnvironmentConfig(FolderConfig):
    """A source that answers which jax platform its process may use."""

    def build(self, split: str) -> "EnvironmentSource":
        return EnvironmentSource()


class EnvironmentSource:
    name, classes = "environment", ()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Record:
        import jax

        platforms = (os.environ.get("JAX_PLATFORMS"), jax.config.jax_platforms)
        ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        pixels = np.zeros((8, 8, 3), np.uint8)
        return Record(pixels, int(platforms == ("cpu", "cpu") and ignored), "environment")

    def size(self, index: int) -> tuple[int, int]:
        return 8, 8

    def fingerprint(self) -> str:
        return "environment"


@pytest.mark.multiprocess
def test_workers_use_no_accelerator_and_ignore_sigterm(monkeypatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "")  # as on a machine with an accelerator
    cfg = DataConfig(EnvironmentConfig("x"), resolution=8, workers=1, cache_mb=0)
    assert take(cfg, 1, batch=2, seed=0)[0]["label"].tolist() == [1, 1]


SCRIPT = """
import json, os, signal, sys, time
import psutil
from dcae_jax.data import pipeline

def workers():
    spawned = psutil.Process().children()
    return [p.pid for p in spawned if "spawn_main" in " ".join(p.cmdline())]

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    batches = pipeline.batches(pipeline.DataConfig(workers=2), batch=8, seed=0)
    while len(workers()) < 2:
        time.sleep(0.005)
    for pid in workers():
        os.kill(pid, signal.SIGTERM)  # before they have run a line of Python
    sums = [int(next(batches)["image"].sum()) for _ in range(3)]
    for pid in workers():
        os.kill(pid, signal.SIGTERM)
    sums += [int(next(batches)["image"].sum()) for _ in range(30)]
    print(json.dumps({"sums": sums, "workers": workers()}), flush=True)
    if sys.argv[1] == "close":
        batches.close()
        print(json.dumps(workers()), flush=True)
    else:
        time.sleep(60)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("end", ["close", "kill"])
def test_workers_survive_sigterm_and_never_the_run(tmp_path: pathlib.Path, end: str) -> None:
    """SIGTERM at any moment leaves them reading; close() joins them; after kill -9 they go too."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), end]
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(pipeline.__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            report = json.loads(process.stdout.readline())
            assert report["sums"] == [
                int(b["image"].sum()) for b in take(DataConfig(), 33, batch=8, seed=0)
            ]
            assert len(report["workers"]) == 2
            if end == "close":
                assert json.loads(process.stdout.readline()) == []
                assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    gone = [psutil.Process(pid) for pid in report["workers"] if psutil.pid_exists(pid)]
    assert psutil.wait_procs(gone, timeout=10)[1] == []
