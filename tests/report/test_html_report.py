"""report.html of synthetic runs: complete, self-contained, honest about what is missing."""

import json
import re
from html.parser import HTMLParser

import fake_store
import numpy as np
import pytest
import synthetic_run
from etils import epath

from dcae_jax.cli import report as command
from dcae_jax.errors import UserError
from dcae_jax.report import curves, html, images, phases, writers

VOID = {"meta", "img", "br", "link", "input"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run.write_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def page(run):
    return html.build_report(run).read_text()


class Structure(HTMLParser):
    """Collects tags that do not match, ids, and every address that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.wrong, self.addresses, self.ids = [], [], [], []
        self.feed(text)
        self.wrong += self.stack

    def handle_starttag(self, tag, attrs):
        self.stack += [] if tag in VOID else [tag]
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        named = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [(tag, named["id"])] if "id" in named else []

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)


def test_page_is_well_formed_self_contained_and_small(page):
    structure = Structure(page)
    assert structure.wrong == []
    assert {a.split(":")[0] for a in structure.addresses if not a.startswith("#")} == {"data"}
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(page.encode()) < 5e6


def test_references_inside_the_svgs_meet_one_element(page):
    """Clip paths of several pictures share a page: an id may repeat only with equal content."""
    clips = re.findall(r'<clipPath id="(\w+)">(.*?)</clipPath>', page, re.DOTALL)
    contents = {}
    for name, content in clips:
        contents.setdefault(name, set()).add(content)
    assert clips and all(len(found) == 1 for found in contents.values())
    assert set(re.findall(r"url\(#(\w+)\)", page)) <= set(contents)


def test_page_shows_tables_curves_and_pictures(page):
    for text in (
        "Measured without pictures: photos-128-train.",
        "f32c32 on the built-in photographs",
        "0.41 M of 2.70 M",
        "24.03 → 23.71",
        "22.71 → 25.64",
        "bicubic 32× down/up",
        "PCA with 32 components",
        "adaptive weight above zero in 85%",  # 51 of 60 rows: D starts at step 100
        "update norm above zero in 100%",
        "Adaptive weight (phase3)",
        "update norm (phase3)",
        "Learning rate",
        "Throughput (images/s)",
        "before phase1",
        "after phase3, step 600",
        "0123abc",
        "2 CPU cores",
        "data.resolution",
        "regions of the same photographs",
    ):
        assert text in page, text
    assert page.count("<figure>") == 2 * 4  # two evaluators with pictures, four states
    assert "not yet run" not in page


def test_text_of_configs_is_escaped(page):
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_colours_follow_the_page(page):
    assert "var(--ink)" in page and "var(--grid)" in page
    assert not any(color in page for color in curves._CSS)  # no stand-in is left


def test_phases_that_did_not_run_are_said(tmp_path):
    root = synthetic_run.write_run(tmp_path / "run", phases=1)
    text = html.build_report(root).read_text()
    assert text.count("not yet run") >= 4  # twice in the facts, in each table
    assert "No picture was recorded by phase2, phase3." in text
    table = phases.phase_table(phases.load_phases(root))
    assert table.rows[1][:3] == ["phase2", "–", "not yet run"]
    assert set(table.rows[1][3:]) == {"–"}
    quality = phases.quality_table(phases.load_phases(root), synthetic_run.LOW)
    assert quality.rows[-1][:2] == ["after phase3", "not yet run"]


def test_unfinished_phase_reports_what_it_has(tmp_path):
    """Killed without a summary: state, speed and scores come from the metrics."""
    root = synthetic_run.write_run(tmp_path / "run", phases=2, pictures=False)
    (root / "phase2" / "summary.json").unlink()
    found = phases.load_phases(root)
    assert found[1].state == "not finished, seen up to step 600"
    row = phases.phase_table(found).rows[1]
    assert row[6] == "32.9" or abs(float(row[6]) - 33) < 0.5  # the median of the logged speeds
    assert row[8] == "24.03 → 23.71"
    assert "during phase2" in [r[0] for r in phases.quality_table(found, synthetic_run.LOW).rows]
    text = html.build_report(root).read_text()
    assert "No pictures have been recorded." in text
    assert Structure(text).wrong == []


def test_empty_workdir_still_makes_a_page(tmp_path):
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    text = html.build_report(tmp_path / "run").read_text()
    for sentence in ("No metrics have been recorded", "No evaluation has been", "No pictures have"):
        assert sentence in text


def test_wrong_folder_says_what_was_expected(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="is no workdir: expected"):
            phases.load_phases(path)


def test_cut_json_names_the_file(tmp_path):
    (tmp_path / "summary.json").write_text('{"phase": ')
    with pytest.raises(UserError, match=r"summary\.json is not JSON"):
        phases.load_phases(tmp_path)


def test_report_on_an_object_store():
    fake_store.reset()
    workdir = epath.Path("fake://bucket/run/phase1")
    (workdir / "config.json").write_text(json.dumps({"config": {"name": "remote"}}))
    writer = writers.MetricsWriter(workdir, 0)
    writer.write_scalars(10, {"train/loss": 1.0})
    writer.close()
    writers.ImageWriter(workdir).write_images(10, {"x-64-test": np.zeros((8, 8, 3), np.uint8)})
    path = html.build_report("fake://bucket/run")
    assert str(path) == "fake://bucket/run/report.html"
    assert "remote" in path.read_text() and "data:image/png" in path.read_text()


def test_large_pictures_are_embedded_smaller_and_say_so(tmp_path):
    """Noise does not compress: 2 x 5.5 MB of PNG must become less than 5 MB of page."""
    noise = np.random.default_rng(0).integers(0, 256, (1350, 1350, 3), dtype=np.uint8)
    writer = writers.ImageWriter(tmp_path)
    writer.write_images(0, {"x-64-test": noise})
    writer.write_images(9, {"x-64-test": noise})
    (tmp_path / "metrics").mkdir()
    text = html.build_report(tmp_path).read_text()
    assert len(text) < 5e6 and "shown as JPEG" in text and "lossless: 000000009.png" in text


def test_findings_state_distances_with_their_sign(run):
    found = " ".join(phases.findings(phases.load_phases(run)))
    assert "2.59 dB above bicubic" in found  # 23.50 - 20.91
    assert "2.37 dB below PCA with 32" in found  # 23.50 - 25.87
    assert "phase2: -0.32 dB at 128 px, +2.93 dB at 256 px" in found


def test_held_out_and_training_are_told_apart(run):
    found = phases.load_phases(run)
    names = phases.evaluators(found)
    assert names == [synthetic_run.LOW, synthetic_run.HIGH, synthetic_run.TRAINING]
    assert phases.held_out_range(found) == [synthetic_run.LOW, synthetic_run.HIGH]
    assert phases.describe(synthetic_run.TRAINING) == "128 px, training crops"


def test_every_scalar_is_drawn_somewhere(run):
    found = phases.load_phases(run)
    drawn = {s.key for p in curves.panels(found) + curves.other_panels(found) for s in p.series}
    recorded = {k for p in found for row in p.rows for k in row if k.startswith("train/")}
    assert recorded <= drawn


def test_smoothing_keeps_a_constant_and_skips_nan():
    y = np.full(50, 3.0)
    y[7] = np.nan
    np.testing.assert_allclose(curves.smoothed(y, 10.0), 3.0, rtol=1e-12)  # rounding only


def test_thinning_keeps_the_ends():
    x, _ = curves.thinned(np.arange(5000.0), np.arange(5000.0))
    assert len(x) == 400 and (x[0], x[-1]) == (0, 4999)


def test_config_differences(run):
    table = html.config_differences(phases.load_phases(run))
    fields = {row[0]: row[1:] for row in table.rows}
    assert fields["data.resolution"] == ["128", "256", "128"]
    assert "seed" not in fields and "optim.groups.0.pattern" not in fields


def test_command_writes_and_prints(run, tmp_path, capsys):
    out = tmp_path / "deep" / "r.html"
    assert command.main(["--workdir", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "photos-128-test (128 px, held-out)" in printed and "after phase3" in printed
    assert str(out) in printed and out.exists()
    assert max(map(len, printed.splitlines())) < 170


def test_end_table_aligns_columns(run):
    block = phases.end_table(run).split("\n\n")[1].splitlines()[1:]
    assert len({len(line) for line in block}) == 1


def test_several_workdirs(run, tmp_path):
    given = [run / "phase3", run / "phase1"]
    text = html.build_report(given, tmp_path / "r.html").read_text()
    assert text.index("phase3 finished") < text.index("phase1 finished")


def test_synthetic_pictures_are_what_a_loop_writes(run):
    """The generator uses the library's own grid, so that the report shows real ones."""
    path = writers.read_images(run / "phase1")[synthetic_run.LOW][0]
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert images.to_png(np.zeros((1, 1, 3), np.uint8))[:4] == b"\x89PNG"
