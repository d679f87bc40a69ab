"""The weights file of frozen networks: what goes in comes out, and what is wrong is named."""

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from dcae_jax.errors import UserError
from dcae_jax.nets import weights

PARAMS = {
    "block": {"conv": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}},
    "fc": {"bias": np.ones(2, np.float32)},
}
SHAPES = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), PARAMS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a folder" / "w.safetensors"
    weights.save(path, "some-net", PARAMS, {"published": "yes", "heads_sha256": "abc"})
    return path


def test_save_and_load_are_the_identity(path) -> None:
    loaded = weights.load("some-net", path, SHAPES)
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS)
    assert list(path.parent.iterdir()) == [path]
    metadata = weights.info("some-net", path)
    assert metadata["heads_sha256"] == "abc" and metadata["net"] == "some-net"
    again = weights.save(path, "some-net", loaded, {"published": "no"})
    assert again["params_sha256"] == metadata["params_sha256"] and len(again["params_sha256"]) == 64


def test_the_digest_tells_values_shapes_and_names_apart(path) -> None:
    kernel = PARAMS["block"]["conv"]["kernel"]
    digests = {weights.info("some-net", path)["params_sha256"]}
    for other in (
        {**PARAMS, "fc": {"bias": np.float32([1, 1.0000001])}},
        {**PARAMS, "fc": {"scale": np.ones(2, np.float32)}},
        {**PARAMS, "block": {"conv": {"kernel": kernel.reshape(4, 3)}}},
    ):
        digests.add(weights.save(path, "some-net", other, {})["params_sha256"])
    assert len(digests) == 4


def test_a_missing_file_names_the_one_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DCAE_JAX_NETS", str(tmp_path))
    place = r"some_net\.safetensors.*python -m dcae_jax import-net some-net"
    with pytest.raises(UserError, match=place):
        weights.load("some-net", None, SHAPES)
    with pytest.raises(UserError, match=r"nowhere\.safetensors.*import-net some-net"):
        weights.info("some-net", tmp_path / "nowhere.safetensors")


def test_default_path_is_the_users_cache(monkeypatch) -> None:
    monkeypatch.delenv("DCAE_JAX_NETS", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    expected = "/home/someone/.cache/dcae_jax/nets/lpips_vgg.safetensors"
    assert str(weights.default_path("lpips-vgg")) == expected


def test_a_flipped_bit_is_found(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged"):
        weights.load("some-net", path, SHAPES)


@pytest.mark.parametrize("cut", [4, 60, -1])
def test_a_cut_file_is_named(path, cut) -> None:
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"w\.safetensors is (damaged|no safetensors file)"):
        weights.load("some-net", path, SHAPES)


@pytest.mark.parametrize("content", [b"", b"not a file", b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_another_kind_of_file_is_named(path, content) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match="no safetensors file"):
        weights.load("some-net", path, SHAPES)


def test_another_network_and_a_foreign_file_are_named(path) -> None:
    with pytest.raises(UserError, match="holds some-net, expected lpips-alex"):
        weights.load("lpips-alex", path, SHAPES)
    path.write_bytes(safetensors.numpy.save({"fc/bias": np.ones(2, np.float32)}))
    with pytest.raises(UserError, match="was not written by"):
        weights.info("some-net", path)


def test_wrong_shapes_missing_tensors_and_nan_are_named(path) -> None:
    wrong = {**SHAPES, "fc": {"bias": jax.ShapeDtypeStruct((3,), np.float32)}}
    with pytest.raises(UserError, match=r"fc/bias has shape \(2,\), expected \(3,\)"):
        weights.load("some-net", path, wrong)
    with pytest.raises(UserError, match=r"tensor more/bias is missing"):
        weights.load("some-net", path, {**SHAPES, "more": wrong["fc"]})
    weights.save(path, "some-net", {**PARAMS, "fc": {"bias": np.float32([1, np.nan])}}, {})
    with pytest.raises(UserError, match=r"fc/bias holds NaN"):
        weights.load("some-net", path, SHAPES)


def test_only_published_weights_are_beyond_doubt() -> None:
    assert weights.doubt({"published": "yes", "source": "x"}) is None
    assert weights.doubt({"published": "no", "source": "random weights, seed 3"}) == (
        "random weights, seed 3"
    )
    assert "not the published" in weights.doubt({"published": "no", "heads_source": "x.pth"})
