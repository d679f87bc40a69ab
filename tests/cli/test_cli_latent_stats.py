"""`latent-stats`: what it writes, on which data, and what it does not overwrite."""

import json
import shutil

import jax.numpy as jnp
import networks
import numpy as np
import pytest
from PIL import Image

from dcae_jax import autoencoder, checkpoint
from dcae_jax.config import InitWeights
from dcae_jax.data import pipeline, transforms


@pytest.fixture
def own(workdir, tmp_path):
    """A workdir that may be written into."""
    return shutil.copytree(workdir, tmp_path / "own")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        Image.fromarray(networks.picture(40, 60, i)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_a_folder_is_measured_and_the_factor_found_again(command, own, folder) -> None:
    code, said, _ = command(
        "latent-stats", "--from", own, "--images", folder, "--resolution", 32, "--batch", 3
    )
    assert code == 0
    record = json.loads((own / "latent_stats.json").read_text())
    net = autoencoder.load(str(own))
    crops = [transforms.center_crop(networks.picture(40, 60, i), 32) for i in range(5)]
    x = np.stack(crops).astype(np.float32) / np.float32(127.5) - np.float32(1)
    z = np.asarray(net.encode(jnp.asarray(x)), np.float64)
    assert record["rms"] == pytest.approx(np.sqrt(np.mean(z**2)), rel=1e-6)
    np.testing.assert_allclose(record["std"], z.std(axis=(0, 1, 2)), rtol=1e-6)
    assert record["scaling_factor"] == pytest.approx(1 / record["rms"], rel=1e-12)
    assert record["n"] == 5 and record["resolution"] == 32 and record["weights"] == "ema"
    assert record["step"] == 5 and record["encoder"] == net.encoder
    assert net.scaling_factor == record["scaling_factor"], "load finds it"
    assert f"{record['rms']:.6g}" in said and f"{record['scaling_factor']:.6g}" in said
    assert "5 images at 32 px on 8 device(s)" in said and "5/5 images" in said


def test_the_data_of_the_run_itself(command, own) -> None:
    code, said, _ = command("latent-stats", "--from", own)
    assert code == 0 and "24 images at 32 px" in said
    record = json.loads((own / "latent_stats.json").read_text())
    assert record["n"] == 24 and record["split"] == "train"
    code, said, _ = command("latent-stats", "--from", own, "--split", "test", "--n", 3, "--force")
    assert code == 0 and "3 images at 32 px" in said


def test_statistics_that_still_hold_are_not_overwritten(command, own, folder) -> None:
    given = ["latent-stats", "--from", own, "--images", folder, "--resolution", 32]
    assert command(*given)[0] == 0
    first = (own / "latent_stats.json").read_text()
    assert command(*given)[0] == 0, "the same measurement again"
    assert (own / "latent_stats.json").read_text() == first, "and the same numbers"
    for more, message in (
        (["--n", 3], "n 5 -> 3"),
        (["--resolution", 36], "resolution 32 -> 36"),
        (["--params", "raw"], "weights ema -> raw"),
        (["--dtype", "bfloat16"], "dtype float32 -> bfloat16"),
    ):
        code, _, complaints = command(*given, *more)
        assert code == 2 and message in complaints and "--force" in complaints, complaints
    Image.fromarray(networks.picture(40, 60, 9)).save(folder / "new.png")
    pipeline._OPEN.clear()  # as in a new process: folders are listed once
    code, _, complaints = command(*given, "--n", 5)
    assert code == 2 and "data " in complaints
    assert (own / "latent_stats.json").read_text() == first
    assert command(*given, "--n", 5, "--force")[0] == 0
    assert (own / "latent_stats.json").read_text() != first


def test_those_of_an_encoder_that_trained_on_are_replaced(command, own, folder) -> None:
    old = {"encoder": "gone", "weights": "ema", "step": 1, "scaling_factor": 9.0}
    (own / "latent_stats.json").write_text(json.dumps(old))
    code, *_ = command("latent-stats", "--from", own, "--images", folder, "--resolution", 32)
    assert code == 0
    assert json.loads((own / "latent_stats.json").read_text())["encoder"] != "gone"


def test_a_step_directory_belongs_to_its_workdir(command, own, folder) -> None:
    step = own / "checkpoints" / "5"
    given = ["--images", folder, "--resolution", 32, "--params", "raw"]
    assert command("latent-stats", "--from", step, *given)[0] == 0
    record = json.loads((own / "latent_stats.json").read_text())
    assert record["encoder"] == autoencoder.load(str(own), InitWeights.params).encoder


def test_channels_of_unequal_scale_are_told() -> None:
    from dcae_jax.cli import latent_stats
    from dcae_jax.evals.latent_stats import LatentStats

    def table(std: tuple[float, ...], pixels: int = 10**6) -> str:
        mean = (0.0,) * len(std)
        return latent_stats.table(LatentStats(9, pixels, mean, std, rms=1.5, rms_error=0.25))

    assert "warning" not in table((1.0, 2.0))
    assert "1.5 +- 0.25   (standard error, 9 image(s), 1000000 latent pixels)" in table((1.0, 2.0))
    assert "warning: 1 channel(s)" in table((1.0, 0.01, 0.5))
    assert "warning: 128 latent pixels are few" in table((1.0, 2.0), pixels=128)


def test_an_import_keeps_its_factor_and_both_are_told(command, own, folder, monkeypatch) -> None:
    encoder = autoencoder.load(str(own)).encoder
    given = ["latent-stats", "--from", own, "--images", folder, "--resolution", 32]
    assert "note:" not in command(*given)[1]
    origin = autoencoder.Origin("name", 0.5, "a file", {}, {}, encoder)
    newest = checkpoint.newest_meta
    monkeypatch.setattr(
        checkpoint, "newest_meta", lambda w: {**newest(w), "autoencoder": origin.to_json()}
    )
    code, said, _ = command(*given)
    measured = json.loads((own / "latent_stats.json").read_text())["scaling_factor"]
    assert code == 0 and measured != 0.5
    assert f"stays 0.5 (recorded by the import in {own}; not" in said
    assert f"not the {measured:.6g} measured here" in said and "export --scaling-factor" in said


def test_damaged_statistics_are_replaced_only_by_force(command, own, folder) -> None:
    (own / "latent_stats.json").write_text('{"rms":')
    given = ["latent-stats", "--from", own, "--images", folder, "--resolution", 32]
    code, _, complaints = command(*given)
    assert code == 2 and "is damaged" in complaints
    assert command(*given, "--force")[0] == 0
    assert json.loads((own / "latent_stats.json").read_text())["n"] == 5


def test_bad_images_are_told_in_options_of_this_command(command, own, folder) -> None:
    (folder / "bad.png").write_text("x")
    Image.fromarray(networks.picture(20, 24)).save(folder / "small.png")
    given = ["latent-stats", "--from", own, "--images", folder, "--resolution", 32]
    code, _, complaints = command(*given)
    assert code == 2 and "bad.png" in complaints and "data.m" not in complaints
    assert "--min-size" in complaints and "--max-bad-fraction" in complaints
    code, said, _ = command(*given, "--max-bad-fraction", 0.5, "--n", 7)
    assert code == 0 and "7/7 images" in said
    code, said, _ = command(*given, "--min-size", 32, "--force", "--max-bad-fraction", 0.3)
    assert code == 0 and "6/6 images" in said, "the small one is left out"
    (folder / "bad.png").unlink()
    pipeline._OPEN.clear()  # as in a new process: folders are listed once
    code, _, complaints = command(*given, "--min-size", 99)
    assert code == 2 and "(--min-size or" in complaints


def test_wrong_numbers_are_told_before_anything_is_read(command, own, folder) -> None:
    (own / "latent_stats.json").write_text('{"rms":')  # nor is this looked at
    code, said, complaints = command(
        "latent-stats", "--from", own, "--images", folder, "--n", -3, "--batch", 0,
        "--resolution", 0, "--min-size", -1, "--max-bad-fraction", 2,
    )  # fmt: skip
    assert code == 2 and not said and len(complaints.splitlines()) == 5, complaints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resolution", 30), "--resolution 30 is not a multiple"),
        (("--n", 6), "--n 6: the data have 5 images"),
        (("--n", -1), "--n -1"),
        (("--batch", 0), "--batch 0 must be at least 1"),
        (("--images", "nowhere"), "is not a folder"),
        (("--from", "nowhere"), "nowhere does not exist"),
    ],
)
def test_mistakes_write_nothing(command, own, folder, options, message) -> None:
    code, _, complaints = command(
        "latent-stats", "--from", own, "--images", folder, "--resolution", 32, *options
    )
    assert code == 2 and message in complaints, complaints
    assert not (own / "latent_stats.json").exists()
