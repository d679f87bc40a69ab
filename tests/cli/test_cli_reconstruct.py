"""`reconstruct`: any image, nothing overwritten, mistakes named before anything is computed."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import runs
import tiny
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from dcae_jax.evals import metrics


def pixels(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.format == "PNG"
        return np.asarray(image)


def test_every_kind_of_image_and_the_bad_ones_named(command, workdir, images, tmp_path) -> None:
    out = tmp_path / "out"
    code, said, complaints = command(
        "reconstruct", "--from", workdir, "--images", images, "--out", out, "--params", "raw"
    )
    assert code == 1, "two images are bad"
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    good = {"plain", "turned", "print", "deep/clear", "deep/grey"}
    assert files == {f"{name}.png" for name in good} | {"grid.png", "scores.json"}
    assert "cut.png: damaged" in complaints and "text.jpg: not an image" in complaints
    sizes = {name: pixels(out / f"{name}.png").shape[:2] for name in good}
    assert sizes == {
        "plain": (20, 28), "turned": (28, 20), "print": (16, 16), "deep/clear": (19, 17),
        "deep/grey": (13, 40),
    }  # fmt: skip
    record = json.loads((out / "scores.json").read_text())
    rows = {row["name"]: row for row in record["images"]}
    assert rows.keys() == good and len(record["bad"]) == 2
    assert rows["deep/grey"]["latent"] == [4, 10, 4]
    mean = np.mean([row["psnr"] for row in rows.values()])
    assert record["mean"]["psnr"] == pytest.approx(mean)
    for name in good:
        assert re.search(rf"{name} +\d+ x \d+ +{rows[name]['psnr']:.2f} +", said), said
    assert said.count("compiling encode") == 5 and "5 reconstructions" in said
    # A transparent image lies on white: what it hides does not count.
    assert rows["deep/clear"]["psnr"] is not None
    grid = pixels(out / "grid.png")
    assert grid.shape[1] > 3 * 40, "three columns"


def test_the_pixels_are_those_of_the_network_and_the_scores_of_scikit_image(
    command, workdir, images, tmp_path
) -> None:
    code, *_ = command(
        "reconstruct", "--from", workdir, "--images", images / "plain.png", images / "turned.jpg",
        "--out", tmp_path / "out", "--params", "raw",
    )  # fmt: skip
    assert code == 0
    found, _ = runs.state("phase1", workdir)
    params: dict = {}
    for path, value in found.items():
        if path.startswith("params/ae/"):
            node, (*parents, last) = params, path.removeprefix("params/ae/").split("/")
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = value
    x = networks.picture(20, 28)
    whole = jax.jit(tiny.model().build().apply)(
        {"params": params}, jnp.asarray(x, jnp.float32)[None] / 127.5 - 1
    )
    expected = np.asarray(metrics.to_uint8(whole))[0].astype(int)
    out = pixels(tmp_path / "out" / "plain.png")
    # One program against two: at most one level, where a value lies next to a half.
    assert np.abs(out - expected).max() <= 1 and np.mean(out != expected) < 0.01
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["images"]
    scores = {row["name"]: row["psnr"] for row in rows}
    assert scores["plain"] == pytest.approx(peak_signal_noise_ratio(x, out), rel=1e-9)
    with Image.open(images / "turned.jpg") as stored:
        upright = np.asarray(stored.rotate(-90, expand=True))
    turned = peak_signal_noise_ratio(upright, pixels(tmp_path / "out" / "turned.png"))
    assert scores["turned"] == pytest.approx(turned, rel=1e-9)


def test_average_and_raw_weights(command, workdir, images, tmp_path) -> None:
    for name in ("ema", "raw"):
        given = ["--images", images / "plain.png", "--out", tmp_path / name, "--params", name]
        assert command("reconstruct", "--from", workdir, *given)[0] == 0
    one, other = (pixels(tmp_path / name / "plain.png") for name in ("ema", "raw"))
    assert (one != other).any()


def test_equal_names_do_not_overwrite_each_other(command, workdir, tmp_path) -> None:
    for i, name in enumerate(("a/x.png", "b/x.png", "b/x.jpg", "grid.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(networks.picture(16, 16, i)).save(tmp_path / "in" / name)
    given = [tmp_path / "in" / name for name in ("a/x.png", "b", "b/x.jpg", "grid.png")]
    out = tmp_path / "out"
    code, *_ = command("reconstruct", "--from", workdir, "--images", *given, "--out", out)
    assert code == 0
    rows = json.loads((out / "scores.json").read_text())["images"]
    assert len({row["name"].lower() for row in rows}) == len(rows) == 4
    found = [pixels(out / f"{row['name']}.png").tobytes() for row in rows]
    assert len(set(found)) == 4


def test_tiles_and_how_much_they_change(command, workdir, tmp_path) -> None:
    Image.fromarray(networks.picture(70, 100)).save(tmp_path / "large.png")
    Image.fromarray(networks.picture(30, 30)).save(tmp_path / "small.png")
    out = tmp_path / "out"
    code, said, _ = command(
        "reconstruct", "--from", workdir, "--out", out,
        "--images", tmp_path / "large.png", tmp_path / "small.png", "--tile", 48,
        "--overlap", 16, "--compare-untiled",
    )  # fmt: skip
    assert code == 0
    assert "small: not larger than a tile" in said
    line = re.search(r"large: \|tiled - untiled\|.*largest ([\d.]+); .*\(([\d.]+) x\)", said)
    rows = {row["name"]: row for row in json.loads((out / "scores.json").read_text())["images"]}
    compared = rows["large"]["tiled_against_untiled"]
    assert float(line[1]) == pytest.approx(compared["largest"], abs=0.005)
    assert float(line[2]) == pytest.approx(compared["seam"] / compared["interior"], abs=0.005)
    assert compared["untiled_psnr"] == pytest.approx(rows["large"]["psnr"], abs=1)
    assert rows["small"]["tiled_against_untiled"] is None
    whole = tmp_path / "whole"
    command("reconstruct", "--from", workdir, "--images", tmp_path / "large.png", "--out", whole)
    again = json.loads((whole / "scores.json").read_text())["images"][0]
    assert again["psnr"] == pytest.approx(compared["untiled_psnr"], rel=1e-12)


def test_devices_that_share_the_height_change_nothing(command, workdir, tmp_path) -> None:
    Image.fromarray(networks.picture(61, 40)).save(tmp_path / "x.png")
    for n in (1, 4):
        code, *_ = command(
            "reconstruct", "--from", workdir, "--images", tmp_path / "x.png", "--spatial", n,
            "--out", tmp_path / str(n),
        )  # fmt: skip
        assert code == 0
    one, four = (pixels(tmp_path / str(n) / "x.png").astype(int) for n in (1, 4))
    # f32 rounding moves a value across a half level at most.
    assert np.abs(one - four).max() <= 1 and np.mean(one != four) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "nowhere.png"), "nowhere.png: no such file or folder"),
        (
            ("--tile", 30, "--overlap", 10),
            "--tile 30 is not a multiple of the auto",
        ),
        (("--tile", 32, "--overlap", 20), "--overlap 20 is more than half"),
        (("--tile", 32, "--spatial", 2), "--tile and --spatial are two ways"),
        (("--overlap", 8), "--overlap is for --tile"),
        (("--spatial", 99), "--spatial 99: there are 8 device"),
        (("--compare-untiled",), "give --tile"),
        (("--from", "nowhere"), "nowhere does not exist"),
        (("--out", "FULL"), "is not an empty folder"),
    ],
)
def test_mistakes_write_nothing(command, workdir, images, tmp_path, options, message) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "keep").write_text("x")
    given = {"--from": workdir, "--images": images / "plain.png", "--out": tmp_path / "out"}
    argv = [part for pair in given.items() for part in pair]
    code, _, complaints = command(
        "reconstruct", *argv, *(full if option == "FULL" else option for option in options)
    )
    assert code == 2 and message in complaints, complaints
    assert not (tmp_path / "out").exists()
    assert [p.name for p in full.iterdir()] == ["keep"]


def test_no_image_at_all_is_an_error(command, workdir, images, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    given = ["--from", workdir, "--out", tmp_path / "out"]
    code, _, complaints = command("reconstruct", *given, "--images", tmp_path / "empty")
    assert code == 2 and "no image in" in complaints
    code, said, complaints = command("reconstruct", *given, "--images", images / "text.jpg")
    assert code == 1 and "text.jpg: not an image" in complaints and "0 reconstructions" in said
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["mean"]["psnr"] is None


def test_many_images_show_some_in_the_grid(command, workdir, tmp_path, monkeypatch) -> None:
    from dcae_jax.cli import reconstruct

    monkeypatch.setattr(reconstruct, "_SHOWN", 2)
    monkeypatch.setattr(reconstruct, "_CELL", 16)
    for i in range(3):
        Image.fromarray(networks.picture(32, 48, i)).save(tmp_path / f"{i}{'long' * 12}.png")
    code, *_ = command(
        "reconstruct", "--from", workdir, "--images", tmp_path, "--out", tmp_path / "o"
    )
    assert code == 0
    height, width, _ = pixels(tmp_path / "o" / "grid.png").shape
    assert height < 200 and width < 700, "scaled down, names cut"


def test_bad_images_take_no_place_in_the_grid(command, workdir, tmp_path, monkeypatch) -> None:
    from dcae_jax.cli import reconstruct

    monkeypatch.setattr(reconstruct, "_SHOWN", 2)
    shown = []
    write = reconstruct._write_grid
    monkeypatch.setattr(
        reconstruct, "_write_grid", lambda *args: (shown.append(set(args[2])), write(*args))
    )
    for i in range(3):
        (tmp_path / f"a{i}.png").write_text("x")
    for name, side in (("c", 8), ("d", 9), ("e", 10), ("b", 30)):  # read by size, b last
        Image.fromarray(networks.picture(side, side)).save(tmp_path / f"{name}.png")
    code, said, _ = command(
        "reconstruct", "--from", workdir, "--images", tmp_path, "--out", tmp_path / "o"
    )
    assert code == 1 and "4 reconstructions" in said and shown == [{"b", "c"}]
    assert (tmp_path / "o" / "grid.png").exists()


def test_small_images_are_enlarged_in_the_grid(monkeypatch) -> None:
    from dcae_jax.cli import reconstruct

    monkeypatch.setattr(reconstruct, "_CELL", 40)
    image = networks.picture(12, 9)
    cells = reconstruct.cells(image, image)
    np.testing.assert_array_equal(cells[0], image.repeat(3, axis=0).repeat(3, axis=1))
    assert [cell.shape for cell in cells] == [(36, 27, 3)] * 3
    assert reconstruct.cells(networks.picture(60, 30), networks.picture(60, 30))[0].shape[0] == 40


def test_seams_above_twice_the_rest_are_told(capsys) -> None:
    from dcae_jax.cli import reconstruct

    def row(name: str, seam: float) -> dict:
        return {"name": name, "tiled_against_untiled": {"seam": seam, "interior": 1.0}}

    whole = {"name": "whole", "tiled_against_untiled": None}
    reconstruct._warn_of_seams([row("a", 1.9), whole])
    reconstruct._warn_of_seams([{"name": "not compared"}])
    assert not capsys.readouterr().out
    reconstruct._warn_of_seams([row("a", 1.9), whole, row("b", 2.1)])
    said = capsys.readouterr().out
    assert "in 1 of 2 images" in said and "(b)" in said and "--tile" in said


def test_two_commands_do_not_share_a_folder(command, workdir, images, tmp_path) -> None:
    from dcae_jax import outputs
    from dcae_jax.data import files

    out = files.epath.Path(tmp_path / "out")
    given = ["reconstruct", "--from", workdir, "--images", images / "plain.png", "--out", out]
    with outputs.claimed(out, "--out"):
        code, _, complaints = command(*given)
    assert code == 2 and "in use by another command" in complaints
    assert list(out.iterdir()) == []


def test_a_full_disk_is_one_sentence(command, workdir, images, tmp_path, monkeypatch) -> None:
    """One file meets the kernel's own full disk."""
    from dcae_jax import outputs

    write = outputs.write

    def fill(path, data):
        if path.name == "turned.png":
            with outputs.opened(path) as file, open("/dev/full", "wb", buffering=0) as full:
                file.write(data[:100])
                full.write(data)
        write(path, data)

    monkeypatch.setattr(outputs, "write", fill)
    given = ["--images", images / "plain.png", images / "turned.jpg", "--out", tmp_path / "o"]
    code, _, complaints = command("reconstruct", "--from", workdir, *given)
    assert code == 2 and "turned.png could not be written: No space left" in complaints
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["plain.png"]
