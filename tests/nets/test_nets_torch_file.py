"""PyTorch's files, read without PyTorch."""

import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dcae_jax.errors import UserError
from dcae_jax.nets.torch_file import read_state_dict

PARITY = Path(__file__).parents[1] / "parity"


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_both_layouts_are_read(layout: str) -> None:
    base = np.load(PARITY / "state_dict.npz")["base"]
    state = read_state_dict(PARITY / f"state_dict_{layout}.pth")
    expected = {
        "plain": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "half": base.astype(np.float16),
        "bf16": base.astype(ml_dtypes.bfloat16),
        "count": np.array(7),
        "parameter": base[0],
    }
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and state[name].shape == value.shape
        np.testing.assert_array_equal(state[name], value)


def test_safetensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.numpy.save({"w": np.arange(3.0)}))
    np.testing.assert_array_equal(read_state_dict(path)["w"], np.arange(3.0))


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 3, 40, 500, -1])
def test_a_truncated_file_is_named(tmp_path: Path, layout: str, keep: int) -> None:
    path = tmp_path / "cut.pth"
    path.write_bytes((PARITY / f"state_dict_{layout}.pth").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.pth"):
        read_state_dict(path)


class _Hostile:
    def __reduce__(self) -> tuple:
        return (eval, ("__import__('pathlib').Path('owned').touch()",))


def test_a_hostile_pickle_runs_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    legacy = tmp_path / "hostile.pth"
    legacy.write_bytes(pickle.dumps(_Hostile()))
    modern = tmp_path / "hostile_zip.pth"
    with zipfile.ZipFile(modern, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": _Hostile()}))
    for path in (legacy, modern):
        with pytest.raises(UserError, match="not allowed"):
            read_state_dict(path)
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.pth"):
        read_state_dict(tmp_path / "nothing.pth")
