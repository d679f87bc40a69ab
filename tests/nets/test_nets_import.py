"""`python -m dcae_jax import-net`: from the public files to what training and evaluation load."""

import hashlib
import importlib.util
import io
import types
import urllib.error
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from dcae_jax.cli import import_net
from dcae_jax.errors import UserError
from dcae_jax.nets import inception, lpips, weights

PARITY = Path(__file__).parents[1] / "parity"
WIDTHS = (8, 16, 24, 32, 32)
DIVISOR = 16


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path) -> None:
    """Networks of less than 1 MB stand for the real ones, and an empty folder for the cache."""
    monkeypatch.setattr(lpips, "VGG16", lpips.vgg16(WIDTHS))
    monkeypatch.setattr(lpips, "ALEXNET", lpips.alexnet(WIDTHS))
    full = inception.from_torch
    monkeypatch.setattr(inception, "from_torch", lambda state, n=DIVISOR: full(state, n))
    monkeypatch.setenv("DCAE_JAX_NETS", str(tmp_path / "nets"))


@pytest.fixture
def files(tmp_path: Path, monkeypatch) -> types.SimpleNamespace:
    """The public files as safetensors under PyTorch's names, with their digests as published."""
    spec = importlib.util.spec_from_file_location("maker", PARITY / "make_lpips_fixtures.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    # torchvision's files also hold the classifier; it must be ignored.
    classifier = {"classifier.0.weight": np.full((2, 2), np.nan, np.float32)}
    states = {
        "VGG16": {**maker.vgg_state(0), **classifier},
        "VGG_HEADS": maker.head_state(1),
        "ALEXNET": {**maker.alex_state(0), **classifier},
        "ALEX_HEADS": maker.head_state(1),
        "INCEPTION": inception.random_state(0, DIVISOR),
    }
    found = types.SimpleNamespace(states=states)
    for name, state in states.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(safetensors.numpy.save(state))
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        published = getattr(import_net, name)
        url = published.url.replace(".pth", ".safetensors")
        kept = len(published.sha256)
        monkeypatch.setattr(import_net, name, published._replace(sha256=sha[:kept], url=url))
        setattr(found, name, str(path))
    return found


def _same(a: weights.Params, b: weights.Params) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_lpips_from_files_in_any_order(files, capsys) -> None:
    for name, given in (
        ("lpips-vgg", [files.VGG16, files.VGG_HEADS]),
        ("lpips-alex", [files.ALEX_HEADS, files.ALEXNET]),
    ):
        net = lpips.VGG16 if name == "lpips-vgg" else lpips.ALEXNET
        assert import_net.main([name, "--from", *given]) == 0
        backbone, heads = sorted(given, key=lambda path: "HEADS" in path)
        _same(
            lpips.load(net=net),
            lpips.from_torch(
                files.states[Path(backbone).stem], files.states[Path(heads).stem], net
            ),
        )
        recorded = lpips.info(net=net)
        digest = hashlib.sha256(Path(backbone).read_bytes()).hexdigest()
        assert recorded["backbone_sha256"] == digest
        assert recorded["backbone_source"] == Path(backbone).name  # no path of this machine
        assert recorded["heads_source"] == Path(heads).name
        assert weights.doubt(recorded) is None
        shown = capsys.readouterr().out
        assert shown.count("as published") == 2 and f"wrote {lpips.default_path(net)}" in shown


def test_inception_from_a_file(files, tmp_path) -> None:
    out = tmp_path / "x.safetensors"
    assert import_net.main(["inception", "--from", files.INCEPTION, "--out", str(out)]) == 0
    shapes = inception.abstract_params(DIVISOR)
    expected = inception.from_torch(files.states["INCEPTION"])
    _same(weights.load("inception", out, shapes), expected)
    assert weights.doubt(inception.info(out)) is None
    assert not inception.default_path().exists()


def test_an_unknown_digest_is_refused_unless_accepted(files, monkeypatch) -> None:
    other = import_net.INCEPTION._replace(sha256="6726825d")
    monkeypatch.setattr(import_net, "INCEPTION", other)
    argv = ["inception", "--from", files.INCEPTION]
    with pytest.raises(UserError, match=r"6726825d.*--accept-unknown-digest"):
        import_net.main(argv)
    assert not inception.default_path().exists()
    assert import_net.main([*argv, "--accept-unknown-digest"]) == 0
    assert "not the published" in weights.doubt(inception.info())


def test_digests_are_those_that_the_names_hold() -> None:
    """torchvision and pytorch-fid put the start of the SHA256 into the names of their files."""
    for file in (import_net.INCEPTION, import_net.ALEXNET, import_net.VGG16):
        assert file.name.removesuffix(".pth").endswith(file.sha256) and len(file.sha256) == 8
    assert len(import_net.ALEX_HEADS.sha256) == len(import_net.VGG_HEADS.sha256) == 64


class _Answer(io.BytesIO):
    headers: dict[str, str]


def _serve(files, short: int = 0):
    """Answers as the public servers; `short`: bytes that do not arrive."""
    by_url = {getattr(import_net, name).url: getattr(files, name) for name in files.states}

    def urlopen(url: str, timeout: float) -> _Answer:
        data = Path(by_url[url]).read_bytes()
        answer = _Answer(data[: len(data) - short])
        answer.headers = {"Content-Length": str(len(data))}
        return answer

    return urlopen


def test_what_is_not_given_is_downloaded(files, monkeypatch, capsys) -> None:
    monkeypatch.setattr(import_net.urllib.request, "urlopen", _serve(files))
    assert import_net.main(["lpips-vgg", "--from", files.VGG16]) == 0
    recorded = lpips.info(net=lpips.VGG16)
    assert recorded["backbone_source"] == "VGG16.safetensors"
    assert recorded["heads_source"] == import_net.VGG_HEADS.url
    assert import_net.main(["lpips-alex"]) == 0
    _same(
        lpips.load(net=lpips.ALEXNET),
        lpips.from_torch(files.states["ALEXNET"], files.states["ALEX_HEADS"], lpips.ALEXNET),
    )
    assert "100%" in capsys.readouterr().err


def test_a_download_that_breaks_off_leaves_nothing(files, monkeypatch) -> None:
    monkeypatch.setattr(import_net.urllib.request, "urlopen", _serve(files, short=10))
    with pytest.raises(UserError, match="bytes arrived"):
        import_net.main(["inception"])
    assert not inception.default_path().exists()


@pytest.mark.parametrize("name", ["inception", "lpips-alex", "lpips-vgg"])
def test_without_a_network_the_files_and_the_command_are_named(monkeypatch, name) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(import_net.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as e:
        import_net.main([name])
    files = import_net.nets()[name].files
    for part in (*(f.url for f in files), "no route", f"import-net {name} --from {files[0].name}"):
        assert part in str(e.value)
    assert not weights.default_path(name).exists()


def test_files_of_another_kind_are_named(files, tmp_path) -> None:
    with pytest.raises(UserError, match=r"no file of lpips-vgg.*vgg16.*features\.0\.weight.*lin0"):
        import_net.main(["lpips-vgg", "--from", files.INCEPTION])
    with pytest.raises(UserError, match="are both the heads"):
        import_net.main(["lpips-vgg", "--from", files.VGG_HEADS, files.ALEX_HEADS])
    with pytest.raises(UserError, match=r"no file .*gone\.pth"):
        import_net.main(["inception", "--from", str(tmp_path / "gone.pth")])
    # AlexNet's first tensor has the name of VGG16's.
    argv = ["lpips-vgg", "--from", files.ALEXNET, files.VGG_HEADS]
    with pytest.raises(UserError, match="but vgg16"):
        import_net.main(argv)
    with pytest.raises(UserError, match=r"features\.0\.weight has shape \(8, 3, 11, 11\)"):
        import_net.main([*argv, "--accept-unknown-digest"])


def test_random_weights_say_so_and_spare_others(files, capsys) -> None:
    argv = ["inception", "--random", "5", "--divisor", "16"]
    assert import_net.main(argv) == 0
    assert "compare with nothing" in capsys.readouterr().out
    state = inception.random_state(5, 16)
    _same(inception.load(), inception.from_torch(state))
    doubt = "random weights, seed 5, 1/16 of the channels"
    assert weights.doubt(inception.info()) == doubt
    assert import_net.main(["inception", "--random", "6", "--divisor", "16"]) == 0  # again
    assert import_net.main(["inception", "--from", files.INCEPTION]) == 0  # real ones come
    with pytest.raises(UserError, match=r"holds weights that are not random.*--out"):
        import_net.main(argv)
    assert weights.doubt(inception.info()) is None

    assert import_net.main(["lpips-alex", "--random", "5"]) == 0
    _same(lpips.load(net=lpips.ALEXNET), lpips.random(5, lpips.ALEXNET))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["inception", "--random", "1", "--from", "a.pth"], "leave out one"),
        (["lpips-vgg", "--random", "1", "--divisor", "2"], "for inception alone"),
        (["inception", "--divisor", "2"], "add --random"),
        (["inception", "--random", "1", "--divisor", "17"], "from 1 to 16"),
        (["inception", "--random", "1", "--divisor", "0"], "from 1 to 16"),
        (["inception", "--random", "-1"], "a seed from 0 on"),
    ],
)
def test_options_that_contradict_each_other(options, message) -> None:
    with pytest.raises(UserError, match=message):
        import_net.main(options)


def test_help_shows_the_files(capsys) -> None:
    with pytest.raises(SystemExit) as e:
        import_net.main(["--help"])
    assert e.value.code == 0
    shown = capsys.readouterr().out
    for part in ("vgg16-397923af.pth", "alexnet-owt-7be5be79.pth", "6726825d", "DCAE_JAX_NETS"):
        assert part in shown
