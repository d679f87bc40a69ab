"""`encode` and `decode`: latents in a file and back, the same bits as `reconstruct`."""

import json

import jax
import networks
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

from dcae_jax import autoencoder
from dcae_jax.config import InitWeights
from dcae_jax.errors import UserError


def pngs(folder) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*.png")
        if p.name != "grid.png"
    }


@pytest.mark.parametrize("options", [(), ("--tile", 16, "--overlap", 4)])
def test_decode_of_encode_is_reconstruct_bit_for_bit(
    command, workdir, images, tmp_path, options
) -> None:
    code, said, complaints = command(
        "encode", "--from", workdir, "--images", images, "--out", tmp_path / "z.safetensors",
        *options,
    )  # fmt: skip
    assert code == 1 and "5 latents" in said and "2 bad image(s)" in said
    assert "text.jpg: not an image" in complaints
    shared = ["--from", workdir, *options]
    code, *_ = command(
        "decode", *shared, "--latents", tmp_path / "z.safetensors", "--out", tmp_path / "decoded"
    )
    assert code == 0
    command("reconstruct", *shared, "--images", images, "--out", tmp_path / "whole")
    assert len(pngs(tmp_path / "whole")) == 5
    assert pngs(tmp_path / "decoded") == pngs(tmp_path / "whole")


def test_what_the_file_says(command, workdir, images, tmp_path) -> None:
    out = tmp_path / "new" / "z.safetensors"
    code, *_ = command(
        "encode", "--from", workdir, "--images", images / "plain.png", images / "deep",
        "--out", out, "--params", "raw",
    )  # fmt: skip
    assert code == 0
    net = autoencoder.load(str(workdir), InitWeights.params)
    with safetensors.safe_open(out, framework="np") as file:
        said = json.loads(file.metadata()["latents"])
        latent = file.get_tensor("plain")
        assert set(file.keys()) == {"plain", "deep/clear", "deep/grey"}
    assert said["encoder"] == net.encoder and said["factor"] == 4 and said["channels"] == 4
    assert said["scaling_factor"] is None and said["padding"] == "edge"
    assert said["sizes"] == {"plain": [20, 28], "deep/clear": [19, 17], "deep/grey": [13, 40]}
    x = networks.picture(20, 28).astype(np.float32) / 127.5 - 1
    # Unscaled, f32: those of the network, to f32 rounding of the division by 127.5.
    expected = np.asarray(net.encode(jax.numpy.asarray(x)[None]))[0]
    np.testing.assert_allclose(latent, expected, atol=1e-5)
    assert latent.dtype == np.float32 and latent.shape == (5, 7, 4)


def test_latents_of_another_encoder_are_refused(command, workdir, images, tmp_path) -> None:
    z = tmp_path / "z.safetensors"
    command("encode", "--from", workdir, "--images", images / "plain.png", "--out", z)
    other = networks.save(tmp_path / "other", seed=9)
    given = ["decode", "--latents", z, "--out", tmp_path / "out", "--from"]
    code, _, complaints = command(*given, other)
    assert code == 2 and "made by another encoder" in complaints and "--force" in complaints
    code, _, complaints = command(*given, workdir, "--params", "raw")
    assert code == 2 and "made by another encoder" in complaints, "the average is another one"
    assert not (tmp_path / "out").exists()
    assert command(*given, other, "--force")[0] == 0
    assert (tmp_path / "out" / "plain.png").exists()


def test_another_decoder_of_the_same_encoder_takes_them(command, workdir, images, tmp_path) -> None:
    """As after phase 3."""
    raw = autoencoder.load(str(workdir), InitWeights.params)
    frozen = {"encoder": raw.variables["params"]["encoder"]}
    later = networks.save(tmp_path / "later", seed=9, frozen=frozen)
    z = tmp_path / "z.safetensors"
    given = ["--params", "raw", "--images", images / "plain.png", "--out", z]
    command("encode", "--from", workdir, *given)
    code, *_ = command(
        "decode", "--from", later, "--params", "raw", "--latents", z, "--out", tmp_path / "o"
    )
    assert code == 0


def test_another_shape_is_refused_even_with_force(command, workdir, images, tmp_path) -> None:
    z = tmp_path / "z.safetensors"
    command("encode", "--from", workdir, "--images", images / "plain.png", "--out", z)
    with safetensors.safe_open(z, framework="np") as file:
        said = json.loads(file.metadata()["latents"])
    said["channels"] = 3
    cut = {k: np.ascontiguousarray(v[..., :3]) for k, v in safetensors.numpy.load_file(z).items()}
    metadata = {"format": "dcae_jax latents 1", "latents": json.dumps(said)}
    safetensors.numpy.save_file(cut, z, metadata=metadata)
    code, _, complaints = command(
        "decode", "--from", workdir, "--latents", z, "--out", tmp_path / "out", "--force"
    )
    assert code == 2 and "f4c3 latents" in complaints and "f4c4 autoencoder" in complaints


def test_mistakes_write_nothing(command, workdir, images, tmp_path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    source = ["--from", workdir, "--images", images / "plain.png"]
    for out, message in ((taken, "exists"), (tmp_path / "z.npz", "must end with .safetensors")):
        code, _, complaints = command("encode", *source, "--out", out)
        assert code == 2 and message in complaints
    assert taken.read_text() == "mine"
    source = ["--from", workdir, "--images", images / "text.jpg"]
    code, *_ = command("encode", *source, "--out", tmp_path / "none.safetensors")
    assert code == 1 and not (tmp_path / "none.safetensors").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("x")
    decode = ["decode", "--from", workdir, "--latents"]
    for latents, out, message in (
        (taken, tmp_path / "full", "is not an empty folder"),
        (taken, tmp_path / "out", "cannot be read"),
        (tmp_path / "gone.safetensors", tmp_path / "out", "no file"),
    ):
        code, _, complaints = command(*decode, latents, "--out", out)
        assert code == 2 and message in complaints, complaints
    assert not (tmp_path / "out").exists()


def test_a_grid_of_sizes_comes_back_exactly(command, workdir, tmp_path) -> None:
    """Sizes around the factor: cropping undoes the padding."""
    folder = tmp_path / "sizes"
    folder.mkdir()
    for height, width in ((1, 9), (4, 4), (5, 3)):
        Image.fromarray(networks.picture(height, width)).save(folder / f"{height}x{width}.png")
    z = tmp_path / "z.safetensors"
    command("encode", "--from", workdir, "--images", folder, "--out", z)
    command("decode", "--from", workdir, "--latents", z, "--out", tmp_path / "out")
    for path in folder.iterdir():
        with Image.open(path) as a, Image.open(tmp_path / "out" / path.name) as b:
            assert a.size == b.size


def test_the_origin_of_the_factor_is_told(command, workdir, images, tmp_path) -> None:
    given = ["--images", images / "plain.png", "--out", tmp_path / "z.safetensors"]
    _, said, _ = command("encode", "--from", workdir, *given)
    assert f"scaling factor unknown (no latent_stats.json in {workdir})" in said


def test_a_latent_that_is_not_finite_is_the_file_s_fault(
    command, workdir, images, tmp_path
) -> None:
    z = tmp_path / "z.safetensors"
    command("encode", "--from", workdir, "--images", images / "plain.png", "--out", z)
    with safetensors.safe_open(z, framework="np") as file:
        metadata, latent = file.metadata(), file.get_tensor("plain").copy()
    latent[0, 0, 0] = np.nan
    safetensors.numpy.save_file({"plain": latent}, z, metadata=metadata)
    code, _, complaints = command(
        "decode", "--from", workdir, "--latents", z, "--out", tmp_path / "out"
    )
    assert code == 2 and f"{z}: the latent of 'plain'" in complaints


def test_the_part_of_a_training_checkpoint_is_asked_for(command, images, monkeypatch) -> None:
    seen = []

    def load(source, variant, part, also):
        seen.append((source, variant, part))
        raise UserError("as far as this test goes")

    monkeypatch.setattr(autoencoder.from_torch, "load", load)
    given = ["--images", images / "plain.png", "--out", images / "z.safetensors"]
    code, *_ = command("encode", "--from", "x.pth", "--part", "ema", "--variant", "v", *given)
    assert code == 2 and seen == [("x.pth", "v", "ema")]
