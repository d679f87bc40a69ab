"""One workdir and one folder of awkward images for the tests of the commands."""

import io
import pathlib
from collections.abc import Callable

import networks
import numpy as np
import pytest
from PIL import Image

from dcae_jax import __main__


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A tiny f4c4 run, its weights as they were drawn; do not write into it."""
    return networks.save(tmp_path_factory.mktemp("run") / "w")


@pytest.fixture
def command(capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs `python -m dcae_jax ...` in this process: (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = __main__.main([str(a) for a in argv])
        done = capsys.readouterr()
        return code, done.out, done.err

    return run


ROTATED = 6  # Exif: the camera was held upright, the pixels lie on their side


@pytest.fixture
def images(tmp_path) -> pathlib.Path:
    """Upright, rotated by Exif, transparent, grey, CMYK; one cut in half, one that is text."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(networks.picture(20, 28)).save(folder / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    Image.fromarray(networks.picture(20, 28)).save(folder / "turned.jpg", exif=exif, quality=95)
    alpha = np.dstack([networks.picture(19, 17), np.full((19, 17), 0, np.uint8)])
    Image.fromarray(alpha, "RGBA").save(folder / "deep" / "clear.png")
    Image.fromarray(networks.picture(13, 40)[..., 0]).save(folder / "deep" / "grey.png")
    Image.fromarray(networks.picture(16, 16)).convert("CMYK").save(folder / "print.jpg")
    data = io.BytesIO()
    Image.fromarray(networks.picture(60, 60)).save(data, "png")
    (folder / "cut.png").write_bytes(data.getvalue()[:2000])
    (folder / "text.jpg").write_text("not an image")
    return folder
