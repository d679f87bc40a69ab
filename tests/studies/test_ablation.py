"""The ablation: which arms it trains, that they are fair, what it says of which numbers.

Most tests replace training by a formula that gives each config its scores; two train really.
"""

import json
import math
import pathlib
import signal
import subprocess
import sys
import xml.etree.ElementTree

import jax
import numpy as np
import pytest
import runs
from etils import epath

from dcae_jax import config, distributed, rng
from dcae_jax.cli import ablation as command
from dcae_jax.data import pipeline
from dcae_jax.errors import UserError
from dcae_jax.report import writers
from dcae_jax.studies import ablation, ablation_report
from dcae_jax.studies.ablation import HIGH, LOW, PLAIN, RESIDUAL, Arm, Settings

CONSTANT = 11.0  # dB; what the tests say the constant image scores


def tiny(**changes) -> Settings:
    values = {
        "widths": (8, 8, 16), "depths": (0, 1, 1), "latent_channels": 8, "low": 32, "high": 64,
        "steps": 4, "batch": 8, "warmup_steps": 1, "adapt_steps": 3, "adapt_batch": 8,
        "eval_low": 8, "eval_high": 8, "points": 2, "pca_images": 16, "rates": (1e-3, 2e-3, 4e-3),
    }  # fmt: skip
    return Settings(**{**values, **changes})


class Formula:
    """Stands in for `train.train`: writes what a run with these scores would leave."""

    def __init__(self, score, adapted=None):
        self.score = score  # (kind, rate, seed) -> pooled PSNR, or an exit code
        self.adapted = adapted or (lambda kind, seed: (1.0, -0.1) if kind == HIGH else (0.2, 0.1))
        self.configs = []

    def __call__(self, cfg, workdir, preemption, force=False):
        kind, seed = pathlib.Path(workdir).name.split("-")[0], cfg.seed
        self.configs.append((cfg, pathlib.Path(workdir).name))
        if kind in (HIGH, LOW):
            changes = self.adapted(kind, seed)
        elif isinstance(score := self.score(kind, cfg.optim.lr, seed), int):
            return score
        else:
            changes = (score - 8,)
        self.leave(cfg, workdir, dict(zip([e.name for e in cfg.evals], changes, strict=True)))
        return 0

    def leave(self, cfg, workdir, changes):
        def scores(name, now):
            return {"psnr_pooled": 8.0 + now * changes[name], "psnr": 9.0, "ssim": 0.1, "n": 8.0}

        after = {name: scores(name, 1) for name in changes}
        writer = writers.MetricsWriter(workdir, 0)
        for step, now in ((0, 0), (cfg.steps, 1)):
            writer.write_scalars(
                step, {f"{n}/{k}": v for n in changes for k, v in scores(n, now).items()}
            )
        writer.close()
        closed = {"bicubic-4": scores(cfg.evals[0].name, 0)} if cfg.evals[0].baselines else {}
        (epath.Path(workdir) / "summary.json").write_text(
            json.dumps(
                {
                    "n_trained": 1000, "n_frozen": 0, "seconds": 10.0,
                    "evals": {"before": {n: scores(n, 0) for n in changes}, "after": after},
                    "baselines": {cfg.evals[0].name: closed} if closed else {},
                }
            )
        )  # fmt: skip


@pytest.fixture
def study_of(monkeypatch, tmp_path):
    """(scores, settings) -> (study, the Formula with the configs that were run)."""
    constant = {"psnr_pooled": CONSTANT, "psnr": CONSTANT, "ssim": 0.1}
    monkeypatch.setattr(ablation, "constant_baseline", lambda settings: constant)

    def run(score, adapted=None, **changes):
        formula = Formula(score, adapted)
        monkeypatch.setattr(ablation.train, "train", formula)
        study = ablation.run(tiny(**changes), str(tmp_path / "out"), distributed.Preemption())
        return study, formula

    return run


def peak_at(best):
    """Residual 25 dB and plain 20 dB at the best rate, less away from it; seeds differ by 0.2."""
    return lambda kind, rate, seed: (
        (25.0 if kind == RESIDUAL else 20.0) - abs(math.log2(rate / best)) + 0.2 * seed
    )


# ------------------------------------------------------------------------------ which arms run


def test_three_rates_then_the_best_again_then_phase_2(study_of, tmp_path) -> None:
    study, formula = study_of(peak_at(2e-3))
    names = [name for _, name in formula.configs]
    assert names[:6] == [
        f"{kind}-lr{rate}-seed0" for rate in ("1.0e-03", "2.0e-03", "4.0e-03")
        for kind in (RESIDUAL, PLAIN)
    ]  # fmt: skip
    assert names[6:8] == ["residual-lr2.0e-03-seed1", "plain-lr2.0e-03-seed1"]
    assert names[8:] == [f"{k}-lr3.0e-04-seed{s}" for s in (0, 1) for k in (HIGH, LOW)]
    for cfg, _ in formula.configs[8:]:
        assert cfg.init_from == str(tmp_path / f"out/residual-lr2.0e-03-seed{cfg.seed}")
    assert study.best == {RESIDUAL: 2e-3, PLAIN: 2e-3}
    assert [ablation.pooled(r) for r in study.chosen(PLAIN)] == pytest.approx([20.0, 20.2])
    assert [r.arm.seed for r in study.chosen(RESIDUAL)] == [0, 1]
    assert study.chosen(PLAIN)[0].curve == [(0, 8.0), (4, pytest.approx(20.0))]
    assert set(study.baselines) == {"constant", "bicubic-4"}


@pytest.mark.parametrize(("best", "added"), [(8e-3, "8.0e-03"), (5e-4, "5.0e-04")])
def test_a_best_rate_at_the_edge_extends_the_grid(study_of, best, added) -> None:
    study, formula = study_of(peak_at(best))
    assert {n for _, n in formula.configs if added in n and "seed0" in n} == {
        f"residual-lr{added}-seed0", f"plain-lr{added}-seed0"
    }  # fmt: skip
    assert study.best == {RESIDUAL: float(added), PLAIN: float(added)}
    assert len([s for s in ablation_report.findings(study) if "EDGE" in s]) == 2


def test_an_extension_that_is_worse_leaves_the_best_inside(study_of) -> None:
    study, formula = study_of(peak_at(4e-3))
    assert study.best[PLAIN] == 4e-3 and len(formula.configs) == 14
    assert not [s for s in ablation_report.findings(study) if "EDGE" in s]


def test_a_diverged_arm_is_shown_and_never_chosen(study_of) -> None:
    good = peak_at(2e-3)
    study, _ = study_of(lambda kind, rate, seed: 1 if rate == 2e-3 else good(kind, rate, seed))
    assert 2e-3 not in study.best.values()
    text = ablation_report.markdown(study)
    assert text.count("stopped: not finite") == 2
    assert ablation_report.figure(study).count("<svg") == 1


def test_a_study_in_which_all_diverge_says_so(study_of) -> None:
    with pytest.raises(UserError, match="no residual arm"):
        study_of(lambda kind, rate, seed: 1)


def test_preemption_leaves_at_once_and_the_next_run_goes_on(study_of, monkeypatch) -> None:
    def until_third(kind, rate, seed):
        return 42 if (kind, rate) == (RESIDUAL, 2e-3) else 20.0

    with pytest.raises(distributed.Preempted):
        study_of(until_third)
    study, _ = study_of(peak_at(2e-3))
    assert len(study.results) == 12


def test_another_study_in_the_folder_is_refused(study_of) -> None:
    study_of(peak_at(2e-3))
    with pytest.raises(UserError, match="other settings; give another --out"):
        study_of(peak_at(2e-3), steps=5)


# ------------------------------------------------------------------------------------- fairness


def test_the_arms_differ_in_the_shortcuts_alone() -> None:
    with_, without = (
        ablation.arm_config(Settings(), Arm(kind, 2e-3, 1)) for kind in (RESIDUAL, PLAIN)
    )
    assert set(config.diff(with_, without)) == {"name", "task.model.residual"}


def test_the_arms_start_from_the_same_parameters() -> None:
    first, second = (
        jax.jit(cfg.task.build(cfg).init)(rng.key(cfg.seed, 0, "init"))[0]
        for cfg in (ablation.arm_config(tiny(), Arm(k, 2e-3, 0)) for k in (RESIDUAL, PLAIN))
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_control_differs_from_phase_2_in_the_crops_alone(monkeypatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    settings = Settings()
    high, low = (ablation.arm_config(settings, Arm(k, 3e-4, 0), "base") for k in (HIGH, LOW))
    assert set(config.diff(high, low)) == {"name", "batch", "data.resolution"}
    pixels = [c.batch * c.data.resolution**2 for c in (high, low)]
    assert pixels[0] == pixels[1]
    assert high.task.trainable.startswith("ae/(encoder/(stage_6|conv_out)")
    assert [e.data.split for e in high.evals] == ["test", "test"]
    assert high.data.source.min_photo_side == 512


def test_the_default_study_is_f64_with_seven_stages() -> None:
    assert ablation.model(Settings(), True).factor == 64
    assert len(Settings().rates) == 3 and len(Settings().seeds) == 2
    for settings in (Settings(), ablation.quick()):
        for kind in (RESIDUAL, PLAIN):
            assert ablation.model(settings, kind == RESIDUAL).problems() == []


# ---------------------------------------------------------------------------------- what is said


def said(study) -> str:
    return " ".join(ablation_report.findings(study))


def test_an_effect_is_stated_with_its_numbers(study_of) -> None:
    study, _ = study_of(peak_at(2e-3))
    text = said(study)
    assert "25.10 dB with it and 20.10 dB without" in text and "+5.00 dB" in text
    assert "does not show" not in text and "did not train" not in text
    assert "+1.00 dB at 64 px and by -0.10 dB at 32 px" in text
    assert "High resolution itself brings +0.80 dB" in text


def test_an_effect_smaller_than_the_spread_does_not_show(study_of) -> None:
    study, _ = study_of(lambda k, rate, seed: 20 - abs(rate - 2e-3) + (k == RESIDUAL) * 0.5 + seed)
    assert "does not show at this size" in ablation_report.residual_findings(study)[0]


def test_seeds_that_disagree_do_not_show_an_effect(study_of) -> None:
    """Three seeds of +3 dB and one of -0.1: the mean is above the spread, the sign is not one."""
    last = {RESIDUAL: 18.41, PLAIN: 18.49}

    def score(kind, rate, seed):
        usual = 20.0 if kind == RESIDUAL else 17.0
        return (last[kind] if seed == 3 else usual) - 1e3 * abs(rate - 2e-3)

    study, _ = study_of(score, seeds=(0, 1, 2, 3))
    sentence = ablation_report.residual_findings(study)[0]
    assert "+2.23 dB" in sentence and "up to 1.59 dB" in sentence
    assert "does not show at this size" in sentence


def test_an_opposite_effect_is_not_hidden(study_of) -> None:
    good = peak_at(2e-3)
    study, _ = study_of(lambda k, rate, seed: good(PLAIN if k == RESIDUAL else RESIDUAL, rate, 0))
    assert "opposite of the paper's" in ablation_report.residual_findings(study)[0]


def test_no_better_than_a_constant_image_is_did_not_train(study_of) -> None:
    study, _ = study_of(lambda kind, rate, seed: 20.0 if kind == RESIDUAL else CONSTANT)
    assert "The arm without did not train: 11.00 dB" in said(study)
    assert "with residual autoencoding did not train" not in said(study)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({HIGH: (-0.1, 0.0), LOW: (-0.2, 0.0)}, "The effect does not show at this size"),
        ({HIGH: (0.5, 0.0), LOW: (0.6, 0.3)}, "that high resolution is what helps does not show"),
        ({HIGH: (0.5, 0.0), LOW: (0.3, 0.3)}, "High resolution itself brings +0.20 dB"),
    ],
)
def test_phase_2_is_judged_against_its_control(study_of, changes, expected) -> None:
    study, _ = study_of(peak_at(2e-3), adapted=lambda kind, seed: changes[kind])
    assert expected in said(study)


def test_outputs(study_of, tmp_path, capsys) -> None:
    study, _ = study_of(peak_at(2e-3), quick=True)
    ablation_report.write(study, str(tmp_path / "out"))
    stored = json.loads((tmp_path / "out/ablation.json").read_text())
    assert len(stored["arms"]) == 12 and stored["best_lr"][PLAIN] == 2e-3
    assert stored["baselines"]["constant"]["psnr_pooled"] == CONSTANT
    text = (tmp_path / "out/ablation.md").read_text()
    assert "| without | 2.0e-03 (best) | 1 | 20.20 | 9.00 | 0.100 |" in text
    assert "| phase 2 | 0 | 8.00 → 9.00 | 0.100 → 0.100 | 8.00 → 7.90 |" in text
    assert "these numbers mean nothing" in text and text in capsys.readouterr().out
    picture = (tmp_path / "out/ablation.svg").read_bytes()
    assert len(picture) < 100_000 and xml.etree.ElementTree.fromstring(picture).tag.endswith("svg")


def test_constant_baseline_is_the_mean_colour_of_training_pixels() -> None:
    settings = tiny()
    found = ablation.constant_baseline(settings)

    def pixels(split, n):
        data = ablation.photos(settings, 32, split, False)
        with pipeline.eval_batches(data, batch=n, n=n) as batches:
            return next(batches)["image"].astype(np.float64)

    test, colour = pixels("test", 8), np.round(pixels("train", 16).mean(axis=(0, 1, 2)))
    error = np.mean((test - colour) ** 2)
    assert found["psnr_pooled"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-4)  # f32
    assert found["n"] == 8


# --------------------------------------------------------------------------------- real training


@pytest.mark.slow
def test_a_real_study_goes_on_after_a_preemption(tmp_path, monkeypatch) -> None:
    """One rate, one seed; the arm with shortcuts and its phase 2 are trained, the rest made up."""
    settings, formula = tiny(rates=(2e-3,), seeds=(0,)), Formula(lambda *arm: 20.0)
    trained, real = [], ablation.train.train

    def train(cfg, workdir, preemption):
        kind = pathlib.Path(workdir).name.split("-")[0]
        trained.append(kind)
        return (real if kind in (RESIDUAL, HIGH) else formula)(cfg, workdir, preemption)

    monkeypatch.setattr(ablation.train, "train", train)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    first, last = tmp_path / "residual-lr2.0e-03-seed0", tmp_path / "phase2-lr3.0e-04-seed0"
    with runs.devices(1):
        with pytest.raises(distributed.Preempted):
            ablation.run(settings, str(tmp_path), runs.StopAt(5))  # in the middle of the first
        assert trained == [RESIDUAL] and runs.steps(first) and not (last / "config.json").exists()
        study = ablation.run(settings, str(tmp_path), distributed.Preemption())
        before = {k: v for k, v in runs.digest(first).items() if k != "run.lock"}
        ablation.run(settings, str(tmp_path), distributed.Preemption())
    after = {k: v for k, v in runs.digest(first).items() if k != "run.lock"}
    assert before == after, "a finished arm was touched"
    residual, _, high, _ = study.results
    assert residual.finished and high.finished and residual.parameters == high.parameters
    assert [step for step, _ in residual.curve] == [0, 2, 4]
    assert set(study.baselines) == {"constant", "bicubic-4", "pca-3", "pca-8"}
    # Phase 2 starts where its base ended: the same images, the same weights.
    (name,) = residual.after
    assert high.before[name]["psnr_pooled"] == pytest.approx(residual.after[name]["psnr_pooled"])
    assert runs.summary(last)["n_frozen"] > 0


def test_devices_that_do_not_divide_the_batches_are_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(UserError, match="do not divide among 3 devices"):
        ablation.run(tiny(), str(tmp_path), distributed.Preemption())


@pytest.mark.multiprocess
def test_sigterm_ends_the_command_saved_with_42(tmp_path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dcae_jax", "ablation", "--quick", "--out", str(tmp_path)],
        cwd=runs.ROOT, env=runs.environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("weights: from scratch"):
            break
    process.send_signal(signal.SIGTERM)
    code, text = runs.finish(process)
    assert code == 42, text
    assert "the same command goes on from here" in text
    first = f"residual-lr{ablation.Settings().rates[0]:.1e}-seed0"
    assert runs.steps(tmp_path / first)


def test_a_missing_out_is_wrong_usage(capsys) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            command.main([])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
