"""report.html of a diffusion run: scores beside baselines, curves, losses by time, grids."""

import re

import pytest
import synthetic_diffusion
import synthetic_run
from etils import epath
from test_html_report import Structure

from dcae_jax import config, flags
from dcae_jax.report import curves, diffusion, html, phases
from dcae_jax.report.diffusion import Kind


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_diffusion.write(tmp_path_factory.mktemp("diffusion") / "run")


@pytest.fixture(scope="module")
def page(run):
    return html.build_report(run).read_text()


def text_of(page):
    """The page's words: without tags, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_the_page_is_whole_and_says_nothing_of_reconstructions(page):
    structure = Structure(page)
    assert structure.wrong == []
    assert {a.split(":")[0] for a in structure.addresses if not a.startswith("#")} == {"data"}
    words = text_of(page)
    for text in (
        "demo diffusion",
        "Diffusion: samples and held-out loss",
        "UViT, depth 4, width 128; process flow, predicts v, times logit_normal",
        "4×4×32, 4,096 crops of photos at 128 px in 8 classes, RMS 14.7",
        "DPM2M, 20 steps, guidance 1.5",
        "1.07 M, all",
        "2.150 → 0.440",
        "0.125 → 0.625",
        "21.70 → 2.35",
        "every sample the mean of training 0.125 28.95",
        "training latents as samples 0.609 2.72 0.283 64",
        "after diffuse 0.625 2.35 0.640 64",
        "62% are nearest to the mean of their own class among held-out latents: 5.0 × chance",
        "of training latents themselves 61% are",
        "Fréchet distance to held-out latents 2.35 (before training 21.70",
        "0.64 channel deviations from the nearest training latent; training latents are 0.28",
        "Validation loss",
        "Loss by time: 0 is data, 1 is noise (latents-test)",
        "Accuracy by nearest class mean",
        "Throughput (images/s)",
        "regions of the same photographs",
        "Resolved config of diffuse",
    ):
        assert text in words, text
    for text in ("PSNR", "bicubic", "Measured without pictures", "No evaluation", "loss_t"):
        assert text not in words, text


def test_masked_diffusion_tells_its_stages():
    """What distinguishes recipes stands in the table, not only in the config."""
    manifest = {
        "plan": {"shape": [16, 16, 32], "resolution": 512}, "images": 1, "dataset": "imagenet",
        "num_classes": 1000, "rms": 1.0, "description": "x",
    }  # fmt: skip

    def facts(arg):
        tree = config.to_json(config.resolve(flags.load(f"configs/md_uvit.py:{arg}")))
        phase = phases.Phase("run", epath.Path("x"), {"config": tree, "latents": manifest})
        return dict(diffusion.facts([phase]))

    found = facts("s,f32,curriculum")
    assert [name for name in found if name != "samples"] == [
        "model", "stage 0", "stage 1", "stage 2", "masked tokens", "latents"
    ]  # fmt: skip
    assert found["stage 0"] == (
        "0 % to 15 % of the steps, mask cosine 15 % to 75 %, clean 1, diffusion 0, reconstruction 1"
    )
    assert found["stage 1"].startswith("15 % to 85 % of the steps, mask 50 %, clean 0.1, diff")
    assert found["stage 2"].endswith("reconstruction 0, a rehearsal with mask 50 % every 10 steps")
    assert found["masked tokens"] == "second head, target latent, example weight alpha²"
    assert "mask 90 % in squares of 4 tokens a side" in facts("s,f32,maskdm")["stage 0"]
    assert "example weight 1" in facts("s,f32,maskdit")["masked tokens"]
    found = facts("s,f64,channels")
    assert found["channels"] == "also the first 16, 32, 64 alone, further weight 1"
    assert "masked tokens" not in found and "nothing masked" in found["stage 0"]


def test_grids_over_the_training(page):
    """First, last and two between them, in order, each with its scores."""
    captions = re.findall(r"<figcaption>(.*?)<small>(.*?)</small>", page)
    names = [name for name, _ in captions]
    assert names == [
        "before diffuse", "during diffuse, step 300", "during diffuse, step 900",
        "after diffuse, step 1200",
    ]  # fmt: skip
    assert captions[-1][1].startswith("accuracy 0.625, Fréchet distance 2.35")


def test_kinds_of_evaluators(run, tmp_path):
    found = phases.load_phases(run)
    assert diffusion.kind(found, "class-scores") is Kind.classes
    assert diffusion.kind(found, "latents-test") is Kind.loss
    other = phases.load_phases(synthetic_run.write_run(tmp_path / "run", phases=1))
    assert diffusion.kind(other, synthetic_run.LOW) is Kind.other
    assert not diffusion.is_diffusion(other) and diffusion.facts(other) == []


def test_losses_by_time_are_those_recorded(run):
    (phase,) = phases.load_phases(run)
    found = diffusion.by_time(phase, "latents-test")
    assert list(found) == list(synthetic_diffusion.STEPS)
    assert [round(t, 6) for t, _ in found[300]] == [round(0.05 + k / 10, 6) for k in range(10)]
    assert [value for _, value in found[300]] == pytest.approx(
        [0.8 * (1 + abs(k - 5) / 10) for k in range(10)], rel=1e-6  # as written to the rows
    )  # fmt: skip
    assert diffusion.by_time(phase, "class-scores") == {}


def test_levels_lie_inside_their_panels(run):
    """The mean's distance is far above all others: the axis reaches it."""
    found = phases.load_phases(run)
    panels = {panel.title: panel for panel in curves.panels(found)}
    levels = {level.label: level.value for level in panels["Fréchet distance"].levels}
    assert levels == {"mean": 28.95, "training": 2.72}
    assert {level.label for level in panels["Accuracy by nearest class mean"].levels} == {
        "chance", "training"
    }  # fmt: skip
    assert ">30<" in curves.svg(panels["Fréchet distance"], found)  # a tick above 28.95


def test_spread_keeps_the_ends():
    assert diffusion.spread([1, 2, 3]) == [1, 2, 3]
    found = diffusion.spread(list(range(100)))
    assert len(found) == 4 and (found[0], found[-1]) == (0, 99) and found == sorted(set(found))


def test_an_unfinished_run_reports_what_it_has(tmp_path):
    workdir = synthetic_diffusion.write(tmp_path / "run", steps=600, finished=False)
    words = text_of(html.build_report(workdir).read_text())
    assert "not finished, seen up to step 600" in words and "0.125 → 0.550" in words
    assert "55% are nearest to the mean of their own class among held-out latents." in words
    # What was not measured is not said: baselines come at the end.
    assert "chance" not in words and "training latents as samples" not in words
    (phase,) = phases.load_phases(workdir)
    assert phases.scores(phase, "after")["latents-test"]["loss"] == pytest.approx(0.6)
    assert not any(name.startswith(("train", "data")) for name in phases.scores(phase, "after"))


def test_a_run_without_evaluations_says_so(tmp_path):
    workdir = synthetic_diffusion.write(tmp_path / "run", steps=0, finished=False)
    for path in [*(workdir / "metrics").iterdir()]:
        path.unlink()
    words = text_of(html.build_report(workdir).read_text())
    assert words.count("No evaluation has been recorded yet") == 1


def test_the_end_table_tells_the_same(run):
    table = phases.end_table(run)
    assert "training latents as samples" in table and "5.0 × chance" in table
    assert "loss_t" not in table
