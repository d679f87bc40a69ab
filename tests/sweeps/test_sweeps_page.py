"""sweep.html and results.csv: whole, in one file, and drawn where the numbers are."""

import csv
import json
import math
import re

import numpy as np
import pytest
from html_checks import Outline

from dcae_jax.report import writers
from dcae_jax.score_names import Better
from dcae_jax.sweeps import charts, folder, page, results
from dcae_jax.sweeps.charts import Line
from dcae_jax.sweeps.folder import Folder, Manifest, Record, Start, State
from dcae_jax.sweeps.processes import Process
from dcae_jax.sweeps.results import Metric

PSNR = Metric("held-out/psnr", Better.higher)
TRIALS = {
    "lr=0.0001,name=a": ({"optim.lr": 1e-4, "name": "<b>&"}, State.done, 21.0),
    "lr=0.001,name=a": ({"optim.lr": 1e-3, "name": "<b>&"}, State.done, 24.0),
    "lr=0.01,name=a": ({"optim.lr": 1e-2, "name": "<b>&"}, State.done, math.nan),
    "lr=0.1,name=a": ({"optim.lr": 1e-1, "name": "<b>&"}, State.failed, None),
    "lr=1,name=b": ({"optim.lr": 1.0, "name": "c"}, State.waiting, None),
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A folder as a sweep leaves it, with pictures."""
    place = Folder(str(tmp_path_factory.mktemp("sweep")))
    records = []
    for i, (name, (overrides, state, psnr)) in enumerate(TRIALS.items()):
        record = Record(name, overrides, state)
        if state is not State.waiting:
            error = "error: <script>alert(1)</script>" if state is State.failed else ""
            code = 1 if state is State.failed else 0
            keeper = Process(1, "then", "host")
            record.starts = [Start(1, 0, keeper, 0.0, 100 + i, code, 90.5, error)]
            write_run(place, name, psnr, i)
        place.write_record(record)
        records.append(record)
    manifest = Manifest(
        config="configs/x.py:phase1", overrides=["--config.steps=10"], sweeps=["lr"],
        base={"name": "x"}, trials={n: o for n, (o, *_) in TRIALS.items()},
        scores=["held-out/psnr"], metric="held-out/psnr",
    )  # fmt: skip
    place.write_manifest(manifest)
    return place, manifest, results.read(place, records)


def write_run(place, name, psnr, i):
    workdir = place.workdir(name)
    metrics = writers.MetricsWriter(workdir, 0)
    for step in (0, 5, 10):
        row = {"train/loss": 1 / (step + 1), "held-out/psnr": (psnr or 9.0) - 10 + step}
        metrics.write_scalars(step, row)
    metrics.close()
    picture = np.full((8, 16, 3), 40 * i, np.uint8)
    for step in (0, 10):
        writers.ImageWriter(workdir).write_images(step, {"held-out": picture + step})
    if psnr is not None:
        found = {"steps": 10, "evals": {"after": {"held-out": {"psnr": psnr}}}}
        folder.write_json(workdir / "summary.json", found)


def test_the_page_is_one_file_without_scripts_and_shows_what_there_is(sweep):
    place, manifest, found = sweep
    text = page.write(place, manifest, found, PSNR).read_text()
    outline = Outline(text)
    assert not outline.open and "script" not in outline.tags and "link" not in outline.tags
    assert outline.tags.count("svg") == 3  # parallel coordinates, score, loss
    assert outline.tags.count("img") == 4  # the last picture of each trial that ran
    assert all(src.startswith("data:image/png;base64,") for src in outline.sources)
    assert "&lt;script&gt;alert(1)" in text and "&lt;b&gt;&amp;" in text
    for fact in ("3 done, 1 failed, 1 waiting", "lr=0.001,name=a: 24", "higher is better"):
        assert fact in text, fact
    # Best first; the failed one has a score of its time before, and no score is last.
    order = re.findall(r"<figcaption>([^<]+)<small>", text)
    assert order == ["lr=0.001,name=a", "lr=0.0001,name=a", "lr=0.1,name=a", "lr=0.01,name=a"]


def test_without_a_metric_there_is_a_page_too(sweep):
    place, manifest, found = sweep
    text = page.render(place, manifest, found, None)
    assert "Fields and score" not in text and Outline(text).tags.count("svg") == 1


def test_results_csv_has_a_row_for_each_trial(sweep):
    place, _, found = sweep
    results.write_csv(place, found, ["held-out/psnr"])
    rows = list(csv.DictReader((place.path / "results.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == list(TRIALS)
    assert [row["pid"] for row in rows] == ["100", "101", "102", "103", ""]
    assert [row["exit_code"] for row in rows] == ["0", "0", "0", "1", ""]
    assert rows[0]["seconds"] == "90.5" and rows[0]["optim.lr"] == "0.0001"
    assert rows[3]["error"] == "error: <script>alert(1)</script>"
    assert [row["held-out/psnr"] for row in rows] == ["21.0", "24.0", "nan", "9.0", ""]


def test_the_best_trial_is_done_and_finite(sweep):
    _, _, found = sweep
    assert PSNR.best(found).record.name == "lr=0.001,name=a"
    assert Metric("held-out/psnr", Better.lower).best(found).record.name == "lr=0.0001,name=a"
    assert Metric("nothing", Better.lower).best(found) is None
    assert "no finished trial has nothing yet" in results.text(
        found, Metric("nothing", Better.lower)
    )


# --------------------------------------------------------------------------------------- drawings


def drawn(svg):
    """{trial: [(x, y), ...]} of the lines in a drawing."""
    found = re.findall(r'class="trial" d="M([^"]*)"[^>]*><title>([^<:]+)', svg)
    return {
        title: [tuple(map(float, p.split())) for p in places.removesuffix("h.01").split("L")]
        for places, title in found
    }


def test_parallel_coordinates_stand_where_the_values_are():
    axes = ("lr", "seed", "on", "psnr")
    values = {"a": (1e-4, 0, True, 20.0), "b": (1e-3, 1, False, 25.0), "c": (1e-2, 4, True, None)}
    svg = charts.parallel(axes, [Line(n, "#000000", n == "b", v) for n, v in values.items()])
    lines = drawn(svg)
    assert list(lines) == ["a", "c", "b"]  # the best one is drawn last, on top
    xs = [x for x, _ in lines["a"]]
    assert len(xs) == 4 and len(lines["c"]) == 3
    assert np.allclose(np.diff(xs), xs[1] - xs[0], atol=0.2)  # places have one decimal
    y = {name: [p[1] for p in points] for name, points in lines.items()}
    low, high = y["a"][0], y["c"][0]
    assert low > high  # larger values are higher up
    assert y["b"][0] == pytest.approx((low + high) / 2, abs=0.1)  # by the logarithm
    assert y["b"][1] == pytest.approx(low + (high - low) / 4, abs=0.1)  # 1 of 0..4
    assert y["a"][2] == y["c"][2] != y["b"][2]
    assert y["b"][3] < y["a"][3]


def test_curves_are_thinned_and_keep_their_ends():
    points = tuple((float(k), float(k % 7)) for k in range(1001))
    (line,) = drawn(charts.curves([Line("t", "#000000", False, points=points)])).values()
    assert len(line) <= 202 and line[-1][0] == pytest.approx(560 - 16, abs=0.1)
    one = drawn(charts.curves([Line("t", "#000000", True, points=((0.0, 3.0),))]))
    assert len(one["t"]) == 1
    assert "<svg" in charts.curves([])


@pytest.mark.parametrize(
    "values", [[], [None], [3, 3], ["b", "a"], [True, False], [[1, 2], [3]], [0.0, 1e9], [-1, 5]]
)
def test_every_axis_has_a_scale(values):
    made = charts.scale(values)
    places = [made.place(v) for v in values if v is not None]
    assert all(0 <= p <= 1 for p in places) and len(made.ticks) <= 6
    assert len({json.dumps(v) for v in values if v is not None}) == len(set(places))


def test_the_ramp_goes_from_the_best_colour_to_the_worst():
    assert charts.ramp(0) == "#3574b8" and charts.ramp(1) == "#d9822b"
