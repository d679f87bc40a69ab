"""`python -m dcae_jax import-net lpips`: from the public files to what training loads."""

import hashlib
import importlib.util
import io
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from dcae_jax.cli import import_net
from dcae_jax.errors import UserError
from dcae_jax.nets import lpips

PARITY = Path(__file__).parents[1] / "parity"
WIDTHS = (8, 16, 24, 32, 32)


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> None:
    """A VGG16 of 100 kB stands for the real one (59 MB)."""
    for name in ("from_torch", "load"):
        original = getattr(lpips, name)
        monkeypatch.setattr(
            lpips, name, lambda *a, f=original, **k: f(*a, net=lpips.vgg16(WIDTHS), **k)
        )


@pytest.fixture
def files(tmp_path: Path, monkeypatch) -> types.SimpleNamespace:
    """Both files as safetensors under PyTorch's names, and an empty cache folder."""
    spec = importlib.util.spec_from_file_location("maker", PARITY / "make_lpips_fixtures.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    vgg, heads = maker.vgg_state(0), maker.head_state(1)
    # torchvision's file also holds the classifier; it must be ignored.
    data = safetensors.numpy.save({**vgg, "classifier.0.weight": np.zeros((2, 2), np.float32)})
    found = types.SimpleNamespace(vgg=tmp_path / "v.safetensors", heads=tmp_path / "h.safetensors")
    found.vgg.write_bytes(data)
    found.heads.write_bytes(safetensors.numpy.save(heads))
    found.params = lpips.from_torch(vgg, heads)
    monkeypatch.setenv("DCAE_JAX_NETS", str(tmp_path / "nets"))
    sha = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(import_net, "VGG", import_net.VGG._replace(sha256=sha[:8]))
    found.sha = sha
    return found


def _same(a: lpips.Params, b: lpips.Params) -> None:
    assert a.keys() == b.keys()
    for module in a:
        for name in a[module]:
            np.testing.assert_array_equal(a[module][name], b[module][name])


def test_files_given_by_path(files, capsys) -> None:
    argv = ["lpips", "--vgg", str(files.vgg), "--heads", str(files.heads)]
    assert import_net.main(argv) == 0
    _same(lpips.load(), files.params)
    recorded = lpips.info()
    assert recorded["vgg_sha256"] == files.sha
    assert recorded["vgg_source"] == "v.safetensors"  # the name, not a path of this machine
    assert recorded["heads_sha256"] == hashlib.sha256(files.heads.read_bytes()).hexdigest()
    shown = capsys.readouterr().out
    assert "as published" in shown and "none is published" in shown and "wrote" in shown


def test_an_unknown_digest_is_refused_unless_accepted(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(import_net, "VGG", import_net.VGG._replace(sha256="397923af"))
    out = tmp_path / "x.safetensors"
    argv = ["lpips", "--vgg", str(files.vgg), "--heads", str(files.heads), "--out", str(out)]
    with pytest.raises(UserError, match=r"397923af.*--accept-unknown-digest"):
        import_net.main(argv)
    assert not out.exists()
    assert import_net.main([*argv, "--accept-unknown-digest"]) == 0
    _same(lpips.load(out), files.params)


class _Answer(io.BytesIO):
    headers: dict[str, str]


def _serve(files, short: int = 0):
    def urlopen(url: str, timeout: float) -> _Answer:
        data = (files.vgg if "vgg16" in url else files.heads).read_bytes()
        answer = _Answer(data[: len(data) - short])
        answer.headers = {"Content-Length": str(len(data))}
        return answer

    return urlopen


def test_files_downloaded(files, monkeypatch, capsys) -> None:
    # The stand-in is safetensors, so the public names get that suffix for this test.
    for name in ("VGG", "HEADS"):
        file = getattr(import_net, name)
        monkeypatch.setattr(
            import_net, name, file._replace(url=file.url.replace(".pth", ".safetensors"))
        )
    monkeypatch.setattr(import_net.urllib.request, "urlopen", _serve(files))
    assert import_net.main(["lpips"]) == 0
    _same(lpips.load(), files.params)
    assert lpips.info()["vgg_source"] == import_net.VGG.url
    assert "100%" in capsys.readouterr().err

    monkeypatch.setattr(import_net.urllib.request, "urlopen", _serve(files, short=10))
    with pytest.raises(UserError, match="bytes arrived"):
        import_net.main(["lpips"])


def test_without_a_network_both_files_and_the_command_are_named(files, monkeypatch) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(import_net.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as e:
        import_net.main(["lpips"])
    for part in (import_net.VGG.url, import_net.HEADS.url, "--vgg", "--heads", "no route"):
        assert part in str(e.value)
    assert not lpips.default_path().exists()


def test_swapped_and_missing_files_are_named(files, tmp_path) -> None:
    swapped = ["lpips", "--vgg", str(files.heads), "--heads", str(files.vgg)]
    with pytest.raises(UserError, match=r"features\.0\.weight is missing"):
        import_net.main([*swapped, "--accept-unknown-digest"])
    with pytest.raises(UserError, match=r"--vgg: no file .*gone\.pth"):
        import_net.main(["lpips", "--vgg", str(tmp_path / "gone.pth")])


def test_help_shows_both_files(capsys) -> None:
    with pytest.raises(SystemExit) as e:
        import_net.main(["--help"])
    assert e.value.code == 0
    shown = capsys.readouterr().out
    assert "vgg16-397923af.pth" in shown and "DCAE_JAX_NETS" in shown
