"""LPIPS, rFID, FID and their like in a report: order, names, which way is better, doubts."""

import pytest
from etils import epath

from dcae_jax.report import curves, diffusion, html, phases
from dcae_jax.report.diffusion import Kind
from dcae_jax.report.phases import Phase

PAIRS = {"psnr": 21.0, "ssim": 0.7, "lpips": 0.08021, "ms_ssim": 0.9, "rfid64": 12.344, "n": 64.0}
SAMPLES = {
    "is2048": 30.5,
    "is2048_error": 0.52,
    "precision2048": 0.75,
    "kid2048": 0.012344,
    "fid2048": 9.5,
    "n": 2048.0,
}
RANDOM = {"published": "no", "source": "random weights, seed 0"}


@pytest.fixture
def run() -> Phase:
    """Scored before and after ten steps; the second evaluator has a number in its name."""
    found = {"photos-128-test": PAIRS, "samples-adm-512": SAMPLES}
    rows = [
        {"step": k, "time": 1.8e9 + k}
        | {f"{e}/{m}": v + k for e, of in found.items() for m, v in of.items()}
        for k in (0, 10)
    ]
    nets = {"photos-128-test": {"nets": {"inception": RANDOM, "lpips-alex": {"published": "yes"}}}}
    best = {"metric": "photos-128-test/rfid64", "step": 0, "value": 12.344}
    summary = {"steps": 10, "best": best}
    return Phase("phase1", epath.Path("x"), {"scored_with": nets}, summary, rows)


def test_tables_say_which_way_is_better_with_the_digits_that_a_score_deserves(run):
    found = phases.quality_table([run], "photos-128-test")
    assert found.head == [
        "", "PSNR mean ↑", "SSIM ↑", "MS-SSIM ↑", "LPIPS ↓", "rFID of 64 ↓", "images"
    ]  # fmt: skip
    assert found.rows[0] == ["before phase1", "21.00", "0.700", "0.900", "0.0802", "12.34", "64"]
    found = phases.quality_table([run], "samples-adm-512")
    assert found.head[1:] == [
        "FID of 2048 ↓", "KID of 2048 ↓", "Inception Score of 2048 ↑", "precision of 2048 ↑",
        "images",
    ]  # fmt: skip
    assert found.rows[0][1:] == ["9.50", "0.01234", "30.50 ± 0.52", "0.750", "2048"]
    (row,) = (table := phases.phase_table([run])).rows
    cells = dict(zip(table.head, row, strict=True))
    assert cells["rFID of 64 ↓ photos-128-test"] == "12.34 → 22.34"
    assert cells["FID of 2048 ↓ samples-adm-512"] == "9.50 → 19.50"


def test_a_number_in_the_name_of_samples_is_no_resolution_of_reconstructions(run):
    assert phases.held_out_range([run]) == ["photos-128-test"]
    kinds = [diffusion.kind([run], name) for name in ("photos-128-test", "samples-adm-512")]
    assert kinds == [Kind.other, Kind.features]
    assert html._what([run], "samples-adm-512").startswith("samples against what the name says")


def test_curves_and_captions(run):
    found = {panel.title: panel for panel in curves.panels([run])}
    assert {
        "MS-SSIM ↑", "LPIPS ↓", "rFID of 64 ↓", "FID of 2048 ↓", "KID of 2048 ↓",
        "Inception Score of 2048 ↑", "precision of 2048 ↑",
    } <= found.keys()  # fmt: skip
    assert [s.label for s in found["FID of 2048 ↓"].series] == ["samples-adm-512"]
    assert [s.key for s in found["rFID of 64 ↓"].series] == ["photos-128-test/rfid64"]
    assert "rFID of 64 ↓" in curves.svg(found["rFID of 64 ↓"], [run])
    said = html._picture_scores(run, "photos-128-test", 10)
    assert said.endswith("LPIPS 10.0802, rFID of 64 22.34"), said


def test_doubts_and_the_best_step_are_told(run):
    found = phases.findings([run])
    assert (
        "photos-128-test: its inception is not the published one (random weights, seed 0): such "
        "scores compare with nobody's." in found
    )
    assert "rFID of 64: of fewer than 2048 images; compares with scores of as many alone." in found
    assert not any("lpips-alex" in text or "FID of 2048:" in text for text in found)
    facts = html._run_facts([run])
    assert ("best checkpoint", "photos-128-test/rfid64 12.34 at step 0 of phase1") in facts
