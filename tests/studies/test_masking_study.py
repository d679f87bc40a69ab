"""The masking study: which arms it trains, that they are fair, what it says of which numbers."""

import dataclasses
import json
import xml.etree.ElementTree

import jax
import numpy as np
import pytest
import runs
from etils import epath

from dcae_jax import distributed
from dcae_jax.masking import MaskKind
from dcae_jax.report import writers
from dcae_jax.studies import masking, masking_report
from dcae_jax.studies.masking import KINDS, MASKED, PIXELS, PLAIN, Arm, Point, Result, Settings

LATENTS = "latents"  # of a cache that nobody opens


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda *backend: 1)


def configs(settings, seed=0):
    return {k: masking.arm_config(settings, Arm(k, seed), LATENTS) for k in KINDS}


def test_arms_of_a_part_differ_in_what_is_compared_alone() -> None:
    found = configs(masking.quick())
    one = found["cosine"]
    for kind in MaskKind:
        other = found[kind.value]
        assert other.task.mask.kind is kind
        assert (other.batch, other.optim.lr) == (one.batch, one.optim.lr)
        assert (other.task.model, other.data) == (one.task.model, one.data)
        assert judged(other) == judged(one)
    pixels = found[PIXELS].task.model
    side, grid = pixels.input_size[0] // pixels.patch, one.task.model.input_size[0]
    assert side == grid, "as many tokens"
    assert (pixels.width, pixels.depth, pixels.decoder_depth) == (
        one.task.model.width, one.task.model.depth, one.task.model.decoder_depth
    )  # fmt: skip
    assert judged(found[PIXELS]) == judged(one), "the same masks on the same images"
    plain, masked = found[PLAIN], found[MASKED]
    assert plain.task.process == masked.task.process
    assert judged(plain) == judged(masked)


def judged(cfg):
    """By what, whenever that is: longer runs are evaluated as often."""
    return [dataclasses.replace(e, every=0) for e in cfg.evals]


def test_all_arms_of_a_part_spend_the_same() -> None:
    found = configs(masking.quick())
    spent = {kind: masking.costs(cfg)[-1] for kind, cfg in found.items()}
    for kind in KINDS:
        budget = spent[PLAIN if kind in (PLAIN, MASKED) else "constant"]
        # One step of a dozen is 8 %; the default study has hundreds.
        assert spent[kind] == pytest.approx(budget, rel=0.1), kind
    assert found[MASKED].steps > found[PLAIN].steps
    assert found["cosine"].steps < found["constant"].steps


def test_the_default_settings_are_valid_and_have_256_tokens() -> None:
    settings = Settings()
    assert settings.grid == 16 and len(settings.seeds) == 3
    for kind in ("cosine", PIXELS, PLAIN):
        masking.arm_config(settings, Arm(kind, 1), LATENTS)  # validates
    assert masking.autoencoder_config(settings).task.model.factor == 8


def test_costs_add_up_over_the_programs() -> None:
    cfg = masking.arm_config(masking.quick(), Arm("cosine", 0), LATENTS)
    total = masking.costs(cfg)
    each = np.diff(total, prepend=0.0)
    assert len(total) == cfg.steps and (np.diff(each) <= 0).all(), "the mask grows"
    task = cfg.task.build(cfg)
    assert len(set(each)) == len({task.static(k) for k in range(cfg.steps)}) > 1


def test_seconds_are_those_of_the_logged_speeds() -> None:
    rows = [
        {"step": 10, "train/images_per_s": float("nan")}, {"step": 15, "eval/loss": 1.0},
        {"step": 20, "train/images_per_s": 40.0}, {"step": 30, "train/images_per_s": 80.0},
    ]  # fmt: skip
    cfg = masking.arm_config(masking.quick(), Arm(PLAIN, 0), LATENTS)
    cfg.steps, cfg.batch = 30, 8
    found = masking._seconds(rows, {}, cfg)
    # The first interval has no speed and takes the next one's: 10 steps of 8 at 40 / s.
    assert found[[0, 10, 20, 25, 30]] == pytest.approx([0.0, 2.0, 4.0, 4.5, 5.0])


def test_seconds_of_a_program_are_those_it_took_alone() -> None:
    cfg = masking.arm_config(masking.quick(), Arm("cosine", 0), LATENTS)
    first, *others = cfg.task.build(cfg).statics(0, cfg.steps)
    programs = [{"program": str(first), "ms_per_step": None}]
    programs += [{"program": str(key), "ms_per_step": 250.0} for key in others]
    rows = [{"step": cfg.steps, "train/images_per_s": cfg.batch / 2.0}]
    each = np.diff(masking._seconds(rows, {"programs": programs}, cfg))
    # 2 s where nothing else is known, a quarter where the program was timed.
    assert each[0] == pytest.approx(2.0) and each[-1] == pytest.approx(0.25)


def test_points_of_a_curve_know_what_was_spent(tmp_path) -> None:
    arm = Arm("cosine", 0)
    cfg = masking.arm_config(masking.quick(), arm, LATENTS)
    name, half = cfg.evals[0].name, cfg.steps // 2
    writer = writers.MetricsWriter(str(tmp_path), 0)
    for k, value in ((half, 15.0), (cfg.steps, 16.0)):
        writer.write_scalars(k, {"train/images_per_s": 10.0})
        writer.write_scalars(k, {f"{name}/psnr_pixel_masked": value})
    writer.close()
    after = {name: {"psnr_pixel_masked": 16.0, "psnr_latent_masked": 17.0, "n": 8.0}}
    summary = {"evals": {"after": after}, "baselines": {name: {"autoencoder": {}}}, "n_trained": 9}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found, total = masking.read(epath.Path(tmp_path), arm, cfg), masking.costs(cfg)
    assert found.curve == [
        Point(half, total[half - 1], pytest.approx(half * cfg.batch / 10), 15.0),
        Point(cfg.steps, total[-1], pytest.approx(cfg.steps * cfg.batch / 10), 16.0),
    ]
    assert found.flops == total[-1] and found.after["psnr_latent_masked"] == 17.0
    assert found.flops_per_image == pytest.approx(total[-1] / cfg.steps / cfg.batch)


@pytest.mark.slow
def test_a_real_study_goes_on_after_a_preemption(tmp_path, monkeypatch) -> None:
    settings = masking.quick()
    settings.seeds = (0,)
    monkeypatch.setattr(masking, "KINDS", ("cosine", PIXELS, MASKED))
    with runs.devices(1):
        with pytest.raises(distributed.Preempted):
            masking.run(settings, str(tmp_path), runs.StopAt(12))
        found = masking.run(settings, str(tmp_path), distributed.Preemption())
        before = runs.digest(tmp_path / "cosine-seed0")
        masking.run(settings, str(tmp_path), distributed.Preemption())
    after = runs.digest(tmp_path / "cosine-seed0")
    del before["run.lock"], after["run.lock"]
    assert before == after, "a finished arm was touched"
    assert [r.arm.kind for r in found.results] == ["cosine", PIXELS, MASKED]
    for result in found.results:
        steps = [p.step for p in result.curve]
        assert steps == sorted(steps) and steps[-1] == result.steps
        assert result.curve[-1].flops == result.flops
    assert found.encoder_flops > 0


# --------------------------------------------------------------------------------- what is said


def study(score, cost=None) -> masking.Study:
    """Results whose final scores are score(kind, seed), on straight curves."""
    settings, results = masking.quick(), []
    for seed in (0, 1, 2):
        for kind in KINDS:
            spent, value = (cost or {}).get(kind, 1e12), score(kind, seed)
            after = {"psnr_pixel_masked": value, "psnr_latent_masked": value + 1}
            if kind in (PLAIN, MASKED):
                after = {"loss": value, "frechet": 2 * value, "accuracy": 0.5}
            elif kind == PIXELS:
                del after["psnr_latent_masked"]
            curve = [Point(k, spent * k / 4, 3.0 * k, value * k / 4) for k in (1, 2, 3, 4)]
            results.append(
                Result(
                    Arm(kind, seed), 4, spent, spent / 32, 12.0, 1000, after,
                    {"mean-of-visible": {"psnr_pixel_masked": 12.0},
                     "autoencoder": {"psnr_pixel_masked": 24.0}}, curve,
                )
            )  # fmt: skip
    settings.seeds = (0, 1, 2)
    return masking.Study(settings, results, {"psnr_pooled": 25.0}, 1e9)


def said(found) -> str:
    return " ".join(masking_report.findings(found))


def test_an_effect_below_the_spread_of_the_seeds_does_not_show() -> None:
    found = study(lambda kind, seed: 18.0 + (kind == "cosine") * (0.1, 0.3, -0.1)[seed])
    expected = (
        "LMD, cosine against LMD, constant 0.75 for equal FLOPs (4 against 4 steps): +0.10 dB "
        "(seeds: +0.10, +0.30, -0.10; below their spread)."
    )
    assert expected in said(found)


def test_an_effect_on_every_seed_shows() -> None:
    found = study(lambda kind, seed: 18.0 + (kind == "cosine") * (1.0, 1.2, 1.1)[seed])
    assert "+1.10 dB (seeds: +1.00, +1.20, +1.10)." in said(found)


def test_losing_is_said() -> None:
    found = study(lambda kind, seed: 0.9 if kind == MASKED else 0.8)
    assert "held-out loss +0.100 (seeds: +0.100, +0.100, +0.100); Fréchet distance +0.200" in (
        said(found)
    )


def test_outputs(tmp_path, capsys) -> None:
    masking_report.write(study(lambda kind, seed: 18.0 + 0.1 * seed), str(tmp_path))
    text = (tmp_path / "masking.md").read_text()
    assert text in capsys.readouterr().out and "these numbers mean nothing" in text
    assert "| LMD, cosine | 4 | 31.250 | 1.00 | 12 ± 0 | 18.10 ± 0.10 | 19.10 ± 0.10 |" in text
    assert "| nothing masked | – | – | – | – | 24.00 | – |" in text
    stored = json.loads((tmp_path / "masking.json").read_text())
    assert len(stored["arms"]) == 3 * len(KINDS) and stored["arms"][0]["curve"][0]["step"] == 1
    picture = (tmp_path / "masking.svg").read_bytes()
    assert len(picture) < 150_000 and xml.etree.ElementTree.fromstring(picture).tag.endswith("svg")
