"""Names of scores, and that retention of the best checkpoint agrees with what is better."""

import pytest

from dcae_jax import score_names
from dcae_jax.config import CheckpointConfig
from dcae_jax.score_names import Better


@pytest.mark.parametrize(
    ("way", "names"),
    [
        (Better.higher, "psnr psnr_pooled psnr_c8 ssim ms_ssim is64 is50k precision10k recall64"),
        (Better.higher, "accuracy top5 r2_r0.75 psnr_latent_masked"),
        (Better.lower, "lpips rfid64 rfid50k fid2048 sfid10k kid64 frechet loss loss_t0.10"),
        (Better.lower, "cross_entropy mse_r0.75"),
        (None, "n nearest latent_rms evaluations isolated fidelity x"),
    ],
)
def test_which_way_is_better(way, names):
    assert {name: score_names.better(name) for name in names.split()} == dict.fromkeys(
        names.split(), way
    )


def test_names_carry_the_number_of_images():
    known = {50_000: "rfid50k", 2048: "rfid2048", 10_000: "rfid10k", 64: "rfid64"}
    assert {n: score_names.named("rfid", n) for n in known} == known
    found = {name: score_names.parts(name) for name in ("rfid50k", "is64", "psnr_c8", "fid")}
    assert list(found.values()) == [("rfid", "50k"), ("is", "64"), ("psnr_c8", ""), ("fid", "")]
    assert [score_names.images(name) for name in found] == [50_000, 64, None, None]


@pytest.mark.parametrize(
    ("metric", "highest"), [("photos-128-test/psnr", True), ("a/fid10k", False)]
)
def test_the_best_by_a_known_score_is_the_better_one(metric, highest):
    assert not CheckpointConfig(best=metric, best_is_highest=highest).problems()
    (said,) = CheckpointConfig(best=metric, best_is_highest=not highest).problems()
    assert f"{metric!r} the {'higher' if highest else 'lower'} one is better; set {highest}" in said
    for way in (True, False):  # nobody knows
        assert not CheckpointConfig(best="a/nearest", best_is_highest=way).problems()
        assert not CheckpointConfig(best_is_highest=way).problems()
