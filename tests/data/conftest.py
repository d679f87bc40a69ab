"""A cache folder of its own for the tests, and a small folder of images."""

import pathlib

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory):
    """Prepared photographs and scanned sizes stay out of the user's own cache."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("dcae_jax_data")
    patch.setenv("DCAE_JAX_DATA", str(folder))
    yield folder
    patch.undo()


@pytest.fixture
def image_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two classes of 10 PNGs; image i of class c is all grey 100 * c + i and 40 + i px high."""
    for label, name in enumerate(("apple", "pear")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.full((40 + i, 50, 3), 100 * label + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"
