"""`results` and `photos`: files, exit codes, what is said of wrong usage."""

import dataclasses
import json
import re

import frozen_nets
import metrics_files
import numpy as np
import pytest
import test_cli_sample as samples
from etils import epath
from metrics_files import IN64, protocol, result, write
from PIL import Image

from dcae_jax import autoencoder, checkpoint, provenance
from dcae_jax.cli import _evaluate_autoencoder, _evaluate_generation, _sample_folder, evaluate
from dcae_jax.data import photos, sources, transforms


def test_one_folder_gets_the_page_and_the_tables(command, tmp_path) -> None:
    write(tmp_path / "runs" / "a", result())
    code, said, _ = command("results", tmp_path / "runs")
    assert code == 0 and "within rounding" in said
    assert f"results: {tmp_path / 'runs' / 'results.html'}, results.md" in said
    assert "<h1>Results</h1>" in (tmp_path / "runs" / "results.html").read_text()
    assert "# Results" in (tmp_path / "runs" / "results.md").read_text()
    first = (tmp_path / "runs" / "results.md").read_bytes()
    assert command("results", tmp_path / "runs")[0] == 0, "its own page is no hindrance"
    assert (tmp_path / "runs" / "results.md").read_bytes() == first


def test_the_command_is_recorded_as_a_shell_takes_it(monkeypatch) -> None:
    program = "somewhere/dcae_jax/__main__.py"
    monkeypatch.setattr("sys.argv", [program, "evaluate", "--images", "my photos", "--n", "3"])
    assert provenance.command() == "python -m dcae_jax evaluate --images 'my photos' --n 3"
    monkeypatch.setattr("sys.argv", ["main.py", "--config=c.py:phase 1"])
    assert provenance.command() == "python main.py '--config=c.py:phase 1'"


def test_an_evaluation_says_whose_release_was_imported(workdir) -> None:
    net = autoencoder.load(str(workdir))
    origin = autoencoder.Origin(IN64, 0.2889, f"mit-han-lab/{IN64}")
    subject = _evaluate_autoencoder._subject(dataclasses.replace(net, origin=origin), None)
    assert (subject["release"], subject["imported"]) == (IN64, f"mit-han-lab/{IN64}")
    assert "release" not in _evaluate_autoencoder._subject(net, None)


def test_an_evaluation_of_samples_says_whose_release_it_is(workdir, tmp_path, monkeypatch) -> None:
    name, drawn = f"{IN64}-uvit-h-in-512px", tmp_path / "out" / "samples"
    run = samples.save(tmp_path / "run", samples.manifest_of(workdir))
    argv = ["--metrics", "is", "--nets", frozen_nets.folder(), "--out", tmp_path / "out"]

    def subject_and_protocol(kind, *more: object) -> tuple[dict, dict]:
        args, _ = evaluate._parser().parse_known_args([*map(str, [*argv, *more])])
        (found,) = kind(args).evaluations
        return found.subject, found.protocol

    of_run = (_evaluate_generation.job, "--from", run, "--n", 16)
    assert "release" not in subject_and_protocol(*of_run)[0]
    meta = checkpoint.source_meta
    monkeypatch.setattr(
        checkpoint, "source_meta", lambda *a: {**meta(*a), "diffusion": {"release": name}}
    )
    assert subject_and_protocol(*of_run)[0]["release"] == name
    # The folder of `sample` knows it too.
    job = samples.job("--from", run, "--n", 16, "--out", drawn)
    net = dataclasses.replace(
        autoencoder.load(str(workdir)), origin=autoencoder.Origin(f"mit-han-lab/{IN64}")
    )
    _sample_folder.write_record(job, _sample_folder.decoder_of(net))
    (drawn / "images").mkdir()
    for i in range(16):
        Image.new("RGB", (16, 16)).save(_sample_folder.picture_path(drawn, i))
    subject, about = subject_and_protocol(_evaluate_generation.folder_job, "--samples", drawn)
    assert subject["release"] == name
    assert (about["decoder"], about["decoder_release"]) == (net.decoder, IN64)
    # One of an earlier version does not.
    record = json.loads((drawn / "sample.json").read_text())
    del record["release"], record["decoder_release"]
    (drawn / "sample.json").write_text(json.dumps(record))
    subject, about = subject_and_protocol(_evaluate_generation.folder_job, "--samples", drawn)
    assert "release" not in subject and "decoder_release" not in about


def test_several_folders_and_a_place(command, tmp_path, monkeypatch) -> None:
    for name in "ab":
        write(tmp_path / name, result())
    monkeypatch.chdir(tmp_path / "a")
    assert command("results", tmp_path / "a", tmp_path / "b")[0] == 0
    assert (tmp_path / "a" / "results.html").exists()
    assert command("results", tmp_path / "b", "--out", tmp_path / "new" / "page.html")[0] == 0
    assert (tmp_path / "new" / "page.md").exists()


def test_compare_ends_with_0_only_if_all_scores_compare(command, tmp_path) -> None:
    write(tmp_path / "a", result())
    write(tmp_path / "b", result(scores={"psnr": 26.2}))
    write(tmp_path / "c", result(protocol=protocol(n=64)))
    code, said, _ = command("results", "--compare", tmp_path / "a", tmp_path / "b/metrics.json")
    assert code == 0 and "+0.050" in said and not (tmp_path / "a" / "results.html").exists()
    code, said, _ = command("results", "--compare", tmp_path / "a", tmp_path / "c")
    assert code == 1 and "n: 50000 -> 64" in said and "B - A" not in said
    write(tmp_path / "d", result(scores={"is": 3.0}))
    code, said, _ = command("results", "--compare", tmp_path / "b", tmp_path / "d")
    assert code == 1 and "no score in common" in said


def test_published_scores_of_another_release(command, tmp_path) -> None:
    write(tmp_path, result(subject={"source": "runs/own"}))
    code, said, _ = command("results", tmp_path, "--published", f"mit-han-lab/{IN64}")
    assert code == 0 and "0.2168" in said and "not comparable: weights of no release" in said
    assert IN64 not in command("results", tmp_path)[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give folders to gather, or --compare A B"),
        (["x", "--compare", "a", "b"], "give folders to gather, or --compare A B"),
        (["x", "--out", "page.htm"], "--out page.htm must end with .html"),
        (["x", "--published", "sdxl"], f"--published sdxl: no scores of it .* {IN64}"),
        (["x"], "x: no such file or folder"),
    ],
)
def test_wrong_usage_is_one_sentence(command, argv, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, complaint = command("results", *argv)
    assert code == 2 and not said and len(complaint.splitlines()) == 1
    assert re.search(message, complaint), complaint


def test_a_cut_file_is_named(command, tmp_path) -> None:
    text = json.dumps(metrics_files.record(result()))
    (tmp_path / "metrics.json").write_text(text[: len(text) // 2])
    code, _, complaint = command("results", tmp_path)
    assert code == 2 and f"{tmp_path / 'metrics.json'} is not JSON" in complaint


# ----------------------------------------------------------------------------------------- photos


def test_photographs_and_their_tiles_are_written_as_they_are(command, tmp_path) -> None:
    assert command("photos", "--out", tmp_path / "whole")[0] == 0
    names = [photo.name for photo in photos.PHOTOS]
    assert sorted(sources.list_images(epath.Path(tmp_path / "whole"))) == sorted(
        f"{n}.png" for n in names
    )
    written = np.asarray(Image.open(tmp_path / "whole" / "china.png"))
    original = transforms.decode(photos.available()["china"], "china")
    assert (written == original).all()
    assert photos.attribution() in (tmp_path / "whole" / "credits.txt").read_text()

    code, said, _ = command("photos", "--out", tmp_path / "t", "--split", "test", "--tile", 256)
    held_out = photos.regions(*original.shape[:2])["test"].cut(original)
    assert code == 0 and (tmp_path / "t" / "china-0-0.png").exists(), said
    tile = np.asarray(Image.open(tmp_path / "t" / "china-0-0.png"))
    assert (tile == held_out[:256, :256]).all()
    tiles = sources.list_images(epath.Path(tmp_path / "t"))
    assert f"wrote {len(tiles)} images" in said and not any("chelsea" in t for t in tiles)

    code, _, complaint = command("photos", "--out", tmp_path / "t")
    assert code == 2 and "is not an empty folder" in complaint
    code, _, complaint = command("photos", "--out", tmp_path / "none", "--tile", 5000)
    assert code == 2 and "--tile 5000 is more than any photograph has" in complaint
    assert command("photos", "--out", tmp_path / "none", "--tile", -1)[0] == 2
