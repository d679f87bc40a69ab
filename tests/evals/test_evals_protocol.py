"""Names of scores, what they may be held against, and comparing two of them."""

import copy

import pytest

from dcae_jax import score_names
from dcae_jax.errors import UserError
from dcae_jax.evals import protocol
from dcae_jax.evals.protocol import Kind, Labels

RESULT = {
    "scores": {
        name: {"value": value}
        for name, value in (("rfid", 0.22), ("psnr", 26.1), ("lpips", 0.08), ("is", 200.0))
    },
    "protocol": {
        "n": 50_000, "preset": "dcae", "resolution": 512, "reference": "imagenet-val-512",
        "reference_digest": "a", "resize": {"features": "half_pixel", "is": "tf1"},
        "nets": {"inception": "b", "lpips": "c"}, "weights": "ema", "commit": "d",
        "ssim": protocol.CONVENTIONS["ssim"], "data": "imagenet-val-512", "data_digest": "a",
    },
}  # fmt: skip


def changed(**fields: object) -> dict:
    """The result under another protocol; PSNR is 1 better."""
    found = copy.deepcopy(RESULT)
    found["protocol"] |= fields
    found["scores"]["psnr"]["value"] += 1
    return found


def test_names_carry_n_and_the_reference() -> None:
    counts = {50_000: "50k", 10_000: "10k", 1000: "1k", 2048: "2048", 64: "64", 1500: "1500"}
    assert {n: score_names.count(n) for n in counts} == counts
    name = protocol.label("fid", Kind.autoencoder, 50_000, "imagenet-val-512")
    assert name == "rfid50k[imagenet-val-512]"
    assert protocol.label("fid", Kind.generation, 2048, "x") == "gfid2048[x]"
    assert protocol.label("is", Kind.generation, 64, "x") == "is64"
    assert protocol.key_of("ms-ssim", Kind.autoencoder) == "ms-ssim"


def test_metrics_are_parsed_and_the_nearest_named() -> None:
    assert protocol.parse_metrics("is, rFID,psnr,fid", Kind.autoencoder) == ("psnr", "fid", "is")
    assert protocol.parse_metrics("gfid", Kind.generation) == ("fid",)
    for text, kind, message in (
        ("pnsr", Kind.autoencoder, "did you mean psnr?"),
        ("rfid", Kind.images, "did you mean fid?"),
        ("latent-rms", Kind.images, "no 'latent-rms' of two sets of images"),
        ("", Kind.images, "There are psnr, ssim"),
    ):
        with pytest.raises(UserError, match=message):
            protocol.parse_metrics(text, kind)


def test_presets_are_those_of_the_publications() -> None:
    dcae, adm = (protocol.PRESETS[name] for name in ("dcae", "adm"))
    assert (dcae.features.value, dcae.score.value, dcae.labels) == (
        "half_pixel", "tf1", Labels.random
    )  # fmt: skip
    assert (adm.features.value, adm.score.value, adm.labels) == ("tf1", "tf1", Labels.balanced)


def test_below_2048_images_fid_is_not_comparable() -> None:
    none: dict[str, str | None] = {"inception": None, "lpips": None}
    assert protocol.standing("fid", 2048, None, none) == (True, "")
    assert protocol.standing("fid", 2047, None, none) == (
        False,
        "not comparable (N = 2047 < 2048: the covariance of 2048 features is singular)",
    )
    assert "reference's N = 9 <" in protocol.standing("sfid", 5000, 9, none).note
    assert protocol.standing("kid", 9, 9, none).comparable
    random = {"inception": "random weights, seed 0", "lpips": None}
    assert not protocol.standing("is", 50_000, None, random).comparable
    assert protocol.standing("lpips", 5, None, random).comparable
    note = protocol.standing("fid", 5, None, random).note
    assert "comparable with nothing (inception: random" in note and "N = 5" in note


def test_equal_protocols_give_deltas_whatever_the_commit() -> None:
    other = changed(commit="e", data="val", reference="val")
    found = protocol.compare(RESULT, other)
    assert found.deltas["psnr"] == (26.1, pytest.approx(27.1)) and len(found.deltas) == 4
    assert not found.differing
    assert found.shown == {
        "commit": ("d", "e"), "data": ("imagenet-val-512", "val"),
        "reference": ("imagenet-val-512", "val"),
    }  # fmt: skip


def test_differing_fields_take_the_place_of_deltas_where_they_matter() -> None:
    def hindered(**fields: object) -> dict:
        return protocol.compare(RESULT, changed(**fields)).differing

    assert hindered(n=10_000).keys() == RESULT["scores"].keys()
    assert hindered(n=10_000)["psnr"] == {"n": (50_000, 10_000)}
    assert hindered(reference_digest="z") == {"rfid": {"reference_digest": ("a", "z")}}
    found = hindered(nets={"inception": "z", "lpips": "c"})
    assert found == {k: {"nets.inception": ("b", "z")} for k in ("rfid", "is")}
    assert hindered(nets={"inception": "b"}) == {"lpips": {"nets.lpips": ("c", "(absent)")}}
    resize = {"features": "half_pixel", "is": "half_pixel"}
    assert hindered(resize=resize).keys() == {"is"}
    assert hindered(ssim="another") == {}, "neither has SSIM"
    assert hindered(sampler="heun").keys() == RESULT["scores"].keys()


def test_scores_without_a_value_are_not_compared() -> None:
    other = changed()
    other["scores"]["psnr"]["value"] = None
    del other["scores"]["is"]
    assert protocol.compare(RESULT, other).deltas.keys() == {"rfid", "lpips"}


def test_pixels_count_where_both_know_them_and_else_names_and_sizes_of_files() -> None:
    a, same = changed(data_digest="1", data_pixels="p"), changed(data_digest="2", data_pixels="p")
    found = protocol.compare(a, same)
    assert not found.differing and found.shown == {"data_digest": ("1", "2")}
    other = protocol.compare(a, changed(data_digest="1", data_pixels="q"))
    assert other.differing.keys() == RESULT["scores"].keys() and not other.shown
    assert other.differing["psnr"] == {"data_pixels": ("p", "q")}
    older = protocol.compare(a, changed(data_digest="2"))
    assert older.differing["psnr"] == {"data_digest": ("1", "2")}
    one, two = (changed(reference_pixels=pixels) for pixels in "pq")
    assert protocol.compare(one, two).differing == {"rfid": {"reference_pixels": ("p", "q")}}


def test_pairs_with_other_originals_are_not_compared() -> None:
    """Of two folders: PSNR belongs to the images that they were held against, FID does not."""
    a, b = (
        changed(originals="p2", originals_digest="1"),
        changed(originals="p3", originals_digest="2"),
    )
    found = protocol.compare(a, b)
    assert found.differing == {name: {"originals_digest": ("1", "2")} for name in ("psnr", "lpips")}
    assert found.deltas.keys() == {"rfid", "is"} and found.shown == {"originals": ("p2", "p3")}
