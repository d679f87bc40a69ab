"""results.html and results.md: what stands beside what, what is told, what is refused."""

import dataclasses
import json
import pathlib
import urllib.parse

import fake_store
import metrics_files
import pytest
from etils import epath
from metrics_files import IN64, protocol, result, write
from test_html_report import Structure

from dcae_jax import config
from dcae_jax.cli import _evaluate_generation, _sample_job
from dcae_jax.convert import published, releases
from dcae_jax.diffusion.process import Kind, ProcessConfig
from dcae_jax.diffusion.samplers import Variance
from dcae_jax.errors import UserError
from dcae_jax.evals.protocol import PRESETS
from dcae_jax.nets.inception import Resize
from dcae_jax.report import comparison, results, results_page

FEW = "not comparable (N = 64 < 2048: the covariance of 2048 features is singular)"
OWN = {"source": "EMA of step 9 in runs/own", "encoder": "cd" * 16, "step": 9}


def cells(made, row=0, section=0):
    """{score: cell} of a row."""
    found = made[section]
    return dict(zip(found.names, found.rows[row].cells, strict=True))


def guided(scale):
    drawn = {
        "sampler": "dpm_fast", "steps": 30, "sampler_options": {"end": 0.001}, "labels": "random",
        "seed": 0, "reference_n": 1_281_167, "decoder_release": IN64,
    }  # fmt: skip
    guidance = {
        "scale": scale, "reference": "null_class", "start": 0.0, "stop": 1.0, "channels": 0
    }  # fmt: skip
    return protocol(guidance=guidance, **drawn)


def gather(*folders, weights=None):
    return results_page.sections(results.find([str(f) for f in folders]), weights)


# --------------------------------------------------------------------------------------- gathering


def test_files_are_found_below_folders_each_once_and_rows_are_called_by_folder(tmp_path):
    write(tmp_path / "a" / "eval", result())
    write(tmp_path / "b", result("512"), result("other"))
    write(tmp_path / ".hidden", result())
    (tmp_path / "b" / "parts").mkdir()
    (tmp_path / "b" / "parts" / "x.npz").write_bytes(b"")
    found = results.find([str(tmp_path), str(tmp_path / "a"), str(tmp_path / "b/metrics.json")])
    assert [r.label for r in found] == ["a/eval", "b", "b · other"]
    assert results.find([str(tmp_path / "a")])[0].label == "a/eval"


def test_an_object_store_is_searched_and_written(tmp_path):
    store = fake_store.reset()
    for name in ("a", "deep/b"):
        epath.Path(f"fake://bucket/runs/{name}/metrics.json").write_text(
            json.dumps(metrics_files.record(result()))
        )
    out = epath.Path("fake://bucket/runs/results.html")
    results_page.write(results.find(["fake://bucket/runs"]), out)
    page = store.objects["/fake/bucket/runs/results.html"].decode()
    assert 'href="a/metrics.json"' in page and 'href="deep/b/metrics.json"' in page
    assert b"(deep/b/metrics.json)" in store.objects["/fake/bucket/runs/results.md"]
    elsewhere = results_page.render(gather("fake://bucket/runs"), epath.Path(tmp_path / "x.html"))
    assert "metrics.json</dd>" in elsewhere and 'href="' not in elsewhere, "no browser opens gs://"


def test_one_table_for_each_protocol(tmp_path):
    write(tmp_path / "a", result())
    write(tmp_path / "b", result(subject=OWN, protocol=protocol(commit="4567def")))
    write(tmp_path / "c", result(protocol=protocol(n=49_999)))
    write(tmp_path / "d", result(kind="images"))
    made = gather(tmp_path)
    assert [[r.name for r in s.rows if r.file] for s in made] == [["a", "b"], ["c"], ["d"]]
    assert made[0].group.varying() == {"commit": ["0123abc", "4567def"]}
    told = {name: differs for name, _, differs in made[0].protocol}
    assert told["n"] and not told["dtype"] and "commit" not in told
    assert ("commit", "0123abc", False) in made[1].protocol, "it makes no other protocol"
    page = results_page.render(made, epath.Path(tmp_path / "x.html"))
    assert "4567def" in page and page.count("<h2 id=") == 3


def test_fields_of_scores_that_one_result_lacks_keep_nothing_apart(tmp_path):
    """PSNR compares with PSNR whichever networks made the other scores."""
    nets = {"inception": metrics_files.DIGEST}
    write(tmp_path / "a", result())
    write(tmp_path / "b", result(scores={"psnr": 25.0}, protocol=protocol(nets=nets)))
    write(tmp_path / "c", result(scores={"lpips": 0.1}, protocol=protocol(nets={"lpips": "ff"})))
    assert [len(s.group.results) for s in gather(tmp_path)] == [2, 1]
    write(tmp_path / "c", result(scores={"is": 3.0}, protocol=protocol(n=64)))
    assert [len(s.group.results) for s in gather(tmp_path)] == [2, 1], "but n matters to all"


def test_weights_of_one_kind_stand_beside_either_kind_of_a_run(tmp_path):
    for name, kind in (("release", None), ("run", "ema"), ("raw", "raw")):
        write(tmp_path / name, result(protocol=protocol(weights=kind)))
    made = gather(tmp_path)
    tables = [[row.name for row in section.rows if row.file] for section in made]
    assert tables == [["raw", "release"], ["run"]]
    assert pair(tmp_path / "release", tmp_path / "run").same
    assert not pair(tmp_path / "raw", tmp_path / "run").same


def test_titles_tell_tables_of_the_same_data_apart(tmp_path):
    for scale in (1.0, 1.5):
        write(tmp_path / str(scale), result(kind="generation", protocol=guided(scale)))
    assert [s.title for s in gather(tmp_path)] == [
        "Generated images · imagenet-val-512 · 50000 images · guidance.scale 1.0",
        "Generated images · imagenet-val-512 · 50000 images · guidance.scale 1.5",
    ]


# ------------------------------------------------------------------------------------ in the table


def test_the_best_is_marked_among_scores_that_compare(tmp_path):
    off = {"rfid": {"comparable": False, "note": FEW}}
    write(tmp_path / "a", result(subject=OWN, scores={"psnr": 25, "rfid": 3, "latent-rms": 2}))
    write(tmp_path / "b", result(subject=OWN, scores={"psnr": 26, "rfid": 2, "latent-rms": 1}))
    write(tmp_path / "c", result(subject=OWN, scores={"psnr": 24, "rfid": 1}, about=off))
    made = gather(tmp_path)
    best = [[n for n, c in cells(made, row).items() if c.best] for row in range(3)]
    assert best == [[], ["psnr", "rfid"], []], "nothing is best of RMS, and 1 compares with nothing"
    assert cells(made, 2)["rfid"] == results_page.Cell("1.0000", notes=(1,), faint=True)
    assert cells(made, 2)["latent-rms"].text == "–"
    assert made[0].notes == [FEW]
    text = results_page.markdown(made, epath.Path(tmp_path / "x.html"))
    assert f"1. {FEW}" in text and "| **26.000** | **2.0000** |" in text
    alone = gather(tmp_path / "a")
    assert not any(cell.best for cell in cells(alone).values())


def test_a_reason_that_several_scores_share_is_told_once(tmp_path):
    doubt = "comparable with nothing (inception: random weights, seed 0)"
    about = {"rfid": {"note": f"{doubt}; {FEW}"}, "is": {"note": doubt}, "sfid": {"note": FEW}}
    about = {name: known | {"comparable": False} for name, known in about.items()}
    write(tmp_path, result(subject=OWN, scores=dict.fromkeys(about, 3.0), about=about))
    made = gather(tmp_path)
    assert made[0].notes == [doubt, FEW]
    assert {n: c.notes for n, c in cells(made).items()} == {
        "rfid": (1, 2),
        "sfid": (2,),
        "is": (1,),
    }


def test_what_keeps_several_results_from_comparing_is_told_once(tmp_path):
    for name in "ab":
        write(tmp_path / name, result(protocol=protocol(n=64)))
    assert len(gather(tmp_path)[0].elsewhere) == 1
    made = gather(tmp_path, weights=IN64)
    assert len(made[0].beside) == 2
    assert results_page.console(made).count("not comparable: n 64 here") == 1
    text = results_page.markdown(made, epath.Path("x.html"))
    assert text.count("n 64 here, 50000 there") == 1 and text.count("### ") == 2


def test_what_was_not_measured_and_errors_are_told(tmp_path):
    about = {
        "psnr": {"comparable": False, "note": "infinite: an image equals its original"},
        "is": {"error": 0.5},
    }
    write(tmp_path, result(scores={"psnr": None, "is": 9.25}, about=about))
    made = gather(tmp_path)
    assert cells(made)["psnr"].text == "–" and cells(made)["is"].text == "9.250 ± 0.500"
    for text in (results_page.console(made), results_page.render(made, epath.Path("x.html"))):
        assert "infinite: an image equals its original" in text


# ----------------------------------------------------------------------------- beside the published


@pytest.mark.parametrize(
    ("ours", "there", "within", "difference"),
    [
        (0.2168, "0.2168", True, 0.0), (0.21685, "0.2168", True, 0.00005),
        (0.216851, "0.2168", False, 0.000051), (26.1485, "26.149", True, -0.0005),
        (0.685, "0.69", True, -0.005), (0.6849, "0.69", False, -0.0051), (2.3, "2.30", True, 0.0),
    ],
)  # fmt: skip
def test_within_rounding_is_decided_in_decimals(ours, there, within, difference):
    found = published.compare(ours, there)
    assert found.within is within and found.difference == difference
    assert found.digits == len(there.split(".")[1])


def test_published_scores_are_of_releases_and_of_scores_that_exist():
    names = {*releases.RELEASES, *releases.DIFFUSION}
    known = {results.protocol.key_of(m, k) for m in results.protocol.METRICS for k in
             results.protocol.Kind}  # fmt: skip
    for there in published.PUBLISHED:
        assert there.weights in names and there.scores.keys() <= known and there.source
    ours = {"rfid": "0.2168", "psnr": "26.149", "ssim": "0.7105", "lpips": "0.0802"}
    (found,) = published.of(IN64, "autoencoder")
    assert found.scores == ours | {"latent-rms": "3.4593"}


def test_the_readme_shows_the_published_scores_of_all_autoencoders():
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("### Published numbers")[1].split("\n## ")[0]
    rows = {line.split(" | ")[0].strip("| "): line for line in section.splitlines()}
    every = [there for there in published.PUBLISHED if there.kind == "autoencoder"]
    for there in every:
        shown = [there.scores.get(name, "") for name in ("rfid", "psnr", "ssim", "lpips")]
        cells = [cell.strip() for cell in rows[there.weights].split("|")]
        assert cells[3:7] == shown and f"{there.protocol['data'].split('-')[-1]} px" in cells[2]
    assert len([row for row in rows if row.startswith("dc-ae")]) == len(every)


def test_a_release_stands_beside_its_published_scores(tmp_path):
    write(tmp_path / "a", result())
    write(tmp_path / "b", result(subject=OWN))
    made = gather(tmp_path)
    row = made[0].rows[-1]
    assert (row.name, row.about) == (f"{IN64}, published", "official README") and not row.file
    assert [c.text for c in row.cells] == ["26.149", "0.7105", "0.0802", "0.2168", "3.4593"]
    assert not any(cell.best for cell in row.cells)
    (pair,) = made[0].beside
    assert pair.result.label == "a"
    assert [(x.score, x.difference, x.verdict) for x in pair.lines] == [
        ("rfid", "+0.00003", "within rounding"), ("psnr", "+0.0011", "differs"),
        ("ssim", "-0.00001", "within rounding"), ("lpips", "+0.00010", "differs"),
        ("latent-rms", "+0.00000", "within rounding"),
    ]  # fmt: skip


def test_published_scores_of_another_protocol_give_no_difference(tmp_path):
    write(tmp_path, result(protocol=protocol(n=64)))
    made = gather(tmp_path)
    assert not made[0].beside and len(made[0].rows) == 1
    assert "n 64 here, 50000 there" in made[0].elsewhere[0] and "0.2168" in made[0].elsewhere[0]


def test_a_release_that_is_asked_for_stands_beside_everything(tmp_path):
    write(tmp_path, result(subject=OWN, protocol=protocol(data="photographs-512")))
    made = gather(tmp_path, weights=IN64)
    (pair,) = made[0].beside
    assert {(x.difference, x.verdict) for x in pair.lines} == {("–", "not comparable")}
    assert [x.published for x in pair.lines][:1] == ["0.2168"] and len(made[0].rows) == 1
    assert pair.why_not == (
        f"weights of no release here, {IN64} there; data photographs-512 here, imagenet-val-512 "
        "there"
    )
    assert pair.why_not in results_page.console(made)


def test_a_score_that_compares_with_nothing_gets_no_difference(tmp_path):
    about = {"lpips": {"comparable": False, "note": "comparable with nothing (random weights)"}}
    write(tmp_path, result(about=about))
    lines = {x.score: x for x in gather(tmp_path)[0].beside[0].lines}
    assert lines["lpips"][3:] == ("–", "not comparable")
    assert lines["ssim"].verdict == "within rounding"


def test_each_guidance_meets_its_own_published_score(tmp_path):
    name = f"{IN64}-uvit-h-in-512px"
    for scale, fid in ((1.0, 13.962), (1.5, 3.02)):
        about = {"subject": {"source": "runs/h", "release": name}, "scores": {"gfid": fid}}
        write(tmp_path / str(scale), result(kind="generation", protocol=guided(scale),
                                            **about))  # fmt: skip
    first, second = gather(tmp_path)
    assert first.beside[0].lines[0][2:] == ("13.96", "+0.002", "within rounding")
    assert second.beside[0].lines[0][2:] == ("3.01", "+0.010", "differs")
    assert not first.elsewhere and not second.elsewhere


def test_published_scores_are_of_their_reference_and_their_sampler():
    """rFID is to the originals; gFID to all training images, by the sampler of the family."""
    (there,) = published.of(IN64, "autoencoder")
    assert not published.misses(there, protocol())
    other = published.misses(there, protocol(reference="imagenet-train-512"))
    assert other == {"reference": ("imagenet-train-512", "imagenet-val-512")}
    alone = protocol(reference=None, reference_digest=None, resize=None, preset="adm")
    assert not published.misses(there, alone)  # PSNR and its like have no reference
    first = published.of(f"{IN64}-uvit-h-in-512px", "generation")[0]
    assert not published.misses(first, guided(1.0))
    wrong = guided(1.0) | {"reference_n": 10_000, "sampler": "euler", "steps": 5}
    assert published.misses(first, wrong) == {
        "reference_n": (10_000, 1_281_167), "sampler": ("euler", "dpm_fast"), "steps": (5, 30),
    }  # fmt: skip
    wrong = guided(1.0) | {"seed": 3, "dtype": "bfloat16", "resize": {"features": "tf1"}}
    assert published.misses(first, wrong) == {
        "seed": (3, 0), "dtype": ("bfloat16", "float32"), "resize.features": ("tf1", "half_pixel"),
    }  # fmt: skip
    wrong = guided(1.0) | {"sampler_options": {"end": 0.01}, "decoder_release": None}
    wrong["guidance"]["reference"] = "weak_model"
    assert published.misses(first, wrong) == {
        "sampler_options.end": (0.01, 0.001), "decoder_release": (None, IN64),
        "guidance.reference": ("weak_model", "null_class"),
    }  # fmt: skip


def test_what_is_published_of_each_family_is_what_sample_draws_by_default():
    """Options that a sampler has not, or has by another default, would never compare."""
    kinds = {Kind.scaled_linear: "uvit", Kind.flow: "usit", Kind.ddpm: "dit"}
    found = {}
    for kind, family in kinds.items():
        sampler, _ = _sample_job._published(ProcessConfig(kind=kind))
        process = ProcessConfig(kind=kind, learn_variance=family == "dit")
        how = _evaluate_generation._sampling(sampler, process)
        found[family] = config.flatten(how)
        if family == "dit":
            named = dataclasses.replace(sampler, variance=Variance.learned)
            assert _evaluate_generation._sampling(named, process) == how
            plain = _evaluate_generation._sampling(sampler, ProcessConfig(kind=kind))
            assert plain["sampler_options"] == {"variance": "posterior"}
    for there in (p for p in published.PUBLISHED if p.kind == "generation"):
        how = next(how for family, how in found.items() if f"-{family}-" in there.weights)
        wanted = {k: v for k, v in there.protocol.items() if k.startswith(("sampler", "steps"))}
        assert wanted.items() <= how.items(), there.weights


def test_another_reference_keeps_rfid_apart_and_not_the_scores_of_pairs(tmp_path):
    write(tmp_path, result(protocol=protocol(reference="imagenet-train-512")))
    made = gather(tmp_path)
    (found,) = made[0].beside
    assert {x.score: x.verdict for x in found.lines} == {
        "rfid": "not comparable", "psnr": "differs", "ssim": "within rounding",
        "lpips": "differs", "latent-rms": "within rounding",
    }  # fmt: skip
    said = "rFID not comparable: reference imagenet-train-512 here, imagenet-val-512 there"
    assert said in results_page.console(made)
    row = dict(zip(made[0].names, made[0].rows[-1].cells, strict=True))
    assert (row["rfid"].text, row["psnr"].text) == ("–", "26.149"), "in the table likewise"


def test_a_preset_keeps_apart_what_depends_on_its_resize_alone(tmp_path):
    adm = protocol(preset="adm", resize={"features": Resize.tf1.value})
    write(tmp_path, result(protocol=adm))
    (found,) = gather(tmp_path)[0].beside
    assert [x.score for x in found.lines if x.verdict == "not comparable"] == ["rfid"]
    assert found.why_not == "resize.features tf1 here, half_pixel there"
    wanted = published.of(IN64, "autoencoder")[0].protocol["resize.features"]
    assert wanted == PRESETS["dcae"].features.value


def test_a_score_gets_the_published_one_of_results_that_have_it(tmp_path):
    """PSNR alone has no reference, and says nothing of the rFID to another one in its table."""
    other = protocol(reference="imagenet-train-512")
    alone = protocol(reference=None, reference_digest=None, reference_n=None, resize=None)
    alone |= {"nets": {}}
    psnr = {"psnr": {"label": "psnr50k[imagenet-val-512]"}}
    for first, second in ("ab", "ba"):
        write(tmp_path / first, result(protocol=other))
        found = metrics_files.result(scores={"psnr": 26.15}, about=psnr, protocol=protocol())
        write(tmp_path / second, found | {"protocol": alone})
        (made,) = gather(tmp_path)
        row = dict(zip(made.names, made.rows[-1].cells, strict=True))
        assert (row["rfid"].text, row["psnr"].text) == ("–", "26.149"), first


def test_a_release_of_another_kind_is_told(tmp_path):
    write(tmp_path, result(kind="images", scores={"psnr": 26.0}))
    made = gather(tmp_path, weights=IN64)
    assert not made[0].beside
    said = (
        f"Nothing published of {IN64} stands beside folders of images: its published scores are of "
        "autoencoders."
    )
    assert said in results_page.console(made) and not gather(tmp_path)[0].elsewhere


# ---------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_self_contained_and_its_links_lead_somewhere(tmp_path):
    folder = tmp_path / "a b" / "<i>"
    grid = {"pictures": ["grid-512.png"]}
    write(folder, result(**grid), result("256", protocol=protocol(resolution=256)), pictures=True)
    write(tmp_path / "c", result(**grid))  # a picture that is not there
    (tmp_path / "d").mkdir()
    write(tmp_path / "d", result(pictures=["cut.png"]))
    (tmp_path / "d" / "cut.png").write_bytes(b"\x89PNG" * 2_000_000)
    out = epath.Path(tmp_path / "pages" / "results.html")
    results_page.write(results.find([str(tmp_path)]), out)
    page = out.read_text()
    structure = Structure(page)
    assert structure.wrong == [] and len(page.encode()) < 5e6
    addresses = [a for a in structure.addresses if not a.startswith(("#", "data:image/png;base64"))]
    there = {(out.parent / urllib.parse.unquote(a)).resolve() for a in addresses}
    files = {pathlib.Path(p).resolve() for p in tmp_path.rglob("metrics.json")}
    assert there == files and not any(":" in a for a in addresses)
    anchors = [a[1:] for a in structure.addresses if a.startswith("#")]
    assert anchors == [name for tag, name in structure.ids if tag == "h2"] and anchors
    assert page.count("<figure>") == 1 and "<i>" not in page and "&lt;i&gt;" in page
    assert "grid-512.png cannot be shown" in page and "cut.png cannot be shown" in page
    assert metrics_files.DIGEST[:16] + "…" in page
    text = out.with_suffix(".md").read_text()
    assert "](../a%20b/%3Ci%3E/metrics.json)" in text and "grid-512.png](../a%20b" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block[0] == "|"]
    assert tables and all(len({line.count("|") for line in table}) == 1 for table in tables)


# --------------------------------------------------------------------------------------- comparing


def pair(a, b):
    (found,), alone = comparison.pairs(results.find([str(a)]), results.find([str(b)]))
    assert not alone
    return comparison.compared(*found)


def test_differences_of_equal_protocols(tmp_path):
    write(tmp_path / "a", result())
    better = {"psnr": 27, "ssim": 0.70, "lpips": 0.07, "rfid": 0.3, "latent-rms": 3}
    write(tmp_path / "b", result(scores=better, protocol=protocol(commit="4567def")))
    found = pair(tmp_path / "a", tmp_path / "b")
    assert found.same and "commit: 0123abc -> 4567def" in found.text
    judged = {line.split()[0].split("50k")[0]: line.split()[3:] for line in found.text.splitlines()
              if "50k" in line}  # fmt: skip
    assert judged == {
        "psnr": ["+0.850", "better"], "ssim": ["-0.0105", "worse"],
        "lpips": ["-0.0103", "better"], "rfid": ["+0.0832", "worse"], "latent-rms": ["-0.4593"],
    }  # fmt: skip


def test_fields_in_place_of_differences_where_protocols_differ(tmp_path):
    write(tmp_path / "a", result())
    other = {"resize": {"features": "tf1"}, "nets": {"inception": "ff", "lpips": "ee"}}
    write(tmp_path / "b", result(protocol=protocol(**other)))
    found = pair(tmp_path / "a", tmp_path / "b")
    assert not found.same
    assert "resize.features: half_pixel -> tf1" in found.text, found.text
    table = found.text.split("no difference")[0]
    assert "psnr50k" in table and "rfid" not in table and "lpips" not in table
    write(tmp_path / "b", result(protocol=protocol(n=64)))
    assert (
        "of psnr, ssim, lpips, rfid, latent-rms: the protocols differ (A -> B)\n  n: 50000 -> 64"
        in (pair(tmp_path / "a", tmp_path / "b").text)
    )


def test_results_are_paired_by_what_they_are_of(tmp_path):
    p256 = protocol(resolution=256, data="imagenet-val-256")
    write(tmp_path / "a", result(), result("256", protocol=p256))
    write(tmp_path / "b", result("256", protocol=p256))
    found, alone = comparison.pairs(*(results.find([str(tmp_path / n)]) for n in "ab"))
    assert [(x.name, y.name) for x, y in found] == [("256", "256")]
    assert [x.name for x in alone] == ["512"]
    write(tmp_path / "c", result("one", kind="images"), result("two", kind="images"))
    with pytest.raises(UserError, match=r"nothing to compare: .*512 px.* and one \(images, 512 px"):
        comparison.pairs(*(results.find([str(tmp_path / n)]) for n in "ac"))


# --------------------------------------------------------------------------------------- bad input


def test_no_file_and_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.json in .* or any folder below: .*evaluate"):
        results.find([str(tmp_path)])
    with pytest.raises(UserError, match="gone: no such file or folder"):
        results.find([str(tmp_path / "gone")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON .*cut short"),
        (json.dumps(metrics_files.record(result()))[:300], "is not JSON .*cut short"),
        ("[]", "was not written by `evaluate`: its .format. is None, expected 'dcae_jax"),
        ('{"fid": 3}', "was not written by `evaluate`"),
        ('{"format": "dcae_jax.metrics/2"}', r"has format dcae_jax\.metrics/2, .* reads dcae_jax"),
        ('{"format": "dcae_jax.metrics/1"}', "holds no results"),
        ('{"format": "dcae_jax.metrics/1", "results": []}', "holds no results"),
        ('{"format": "dcae_jax.metrics/1", "results": [3]}', r"results\[0\] lacks name, kind"),
        (json.dumps(metrics_files.record({**result(), "protocol": 3})), r"\[0\] lacks protocol"),
        (json.dumps(metrics_files.record(result(), result())), "two results called '512'"),
        (json.dumps(metrics_files.record({**result(), "scores": {"psnr": 3}})), r"\.psnr is no sc"),
        (json.dumps(metrics_files.record(result(scores={"psnr": float("nan")}))), "nan is neither"),
        (json.dumps(metrics_files.record(result(scores={"psnr": "3"}))), "'3' is neither a finite"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be_is_told_in_one_message(tmp_path, content, message):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        results.find([str(tmp_path)])
    assert str(tmp_path / "metrics.json") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
