"""The table of names against the lists that the PyTorch classes wrote, and against itself."""

import re
from collections import Counter

import narrow_nets as narrow
import numpy as np
import pytest
from parity import key_lists

from dcae_jax import tree
from dcae_jax.convert import names, releases
from dcae_jax.convert.names import Entry, Kind, Layout

EVERY = narrow.every()
PAIRS = [(name, layout) for name, cfg in EVERY.items() for layout in narrow.layouts_of(cfg)]
# The lists are called after the networks; `in` and `mix`, 1.1 and 1.5 are one network each.
LISTED = {
    "f32c32-in": "dc-ae-f32c32-in-1.0", "f64c128-in": "dc-ae-f64c128-mix-1.0",
    "f128c512-in": "dc-ae-f128c512-in-1.0", "f32c32-sana": "dc-ae-f32c32-sana-1.1",
    "f32c32-lite": "dc-ae-lite-f32c32-sana-1.1", "f32c128-1.5": "dc-ae-f32c128-1.1",
    "f64c128-1.5": "dc-ae-1.5-f64c128", "sd-vae-f8": "sd-vae-f8",
}  # fmt: skip
LISTS = sorted(key_lists.FOLDER.glob("*.txt"))


def test_there_are_lists_of_every_network():
    wanted = {f"{name}.diffusers.txt" for name in LISTED}
    wanted |= {f"{name}.official.txt" for name in LISTED if name != "sd-vae-f8"}
    assert {p.name for p in LISTS} == wanted


@pytest.mark.parametrize("path", LISTS, ids=lambda p: p.stem)
def test_table_has_exactly_the_tensors_of_the_pytorch_class(path):
    name, layout = re.fullmatch(r"(.+)\.(diffusers|official)\.txt", path.name).groups()
    cfg, layout = releases.RELEASES[LISTED[name]].config(), Layout(layout)
    theirs = key_lists.read(name, layout.value)
    assert not names.differences(cfg, layout, {k: t.shape for k, t in theirs.items()})
    counters = {k for k, t in theirs.items() if t.dtype == "I64"}
    assert counters == set(names.counters(cfg, layout))
    assert {t.dtype for t in theirs.values()} <= {"F32", "I64"}


@pytest.mark.parametrize(
    ("name", "layout"), PAIRS, ids=lambda v: v if isinstance(v, str) else v.value
)
def test_every_leaf_has_keys_of_its_own_and_comes_back(name, layout):
    cfg = EVERY[name]
    ours, found, back = narrow.weights(cfg), {}, {}
    entries = names.table(cfg, layout)
    assert [e.path for e in entries] == list(ours)
    for e in entries:
        tensors = names.to_torch(e, ours[e.path])
        assert [t.shape for t in tensors] == [names.stored_shape(e, ours[e.path].shape)] * len(
            e.keys
        )
        found |= {key: np.ascontiguousarray(t) for key, t in zip(e.keys, tensors, strict=True)}
    assert sum(t.size for t in found.values()) == sum(x.size for x in ours.values())
    assert max(Counter(k for e in entries for k in e.keys).values()) == 1
    back = {e.path: names.from_torch(e, [found[k] for k in e.keys]) for e in entries}
    assert all(np.array_equal(back[p], ours[p]) and back[p].flags.c_contiguous for p in ours)
    norms = sum(p.startswith("batch_stats") for p in ours)
    assert len(names.counters(cfg, layout)) == norms / 2


def test_transforms_against_indices():
    """Each kind, element by element as PyTorch documents its tensors."""
    leaf = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)  # h, w, in, out
    (t,) = names.to_torch(Entry("p", ("k",), Kind.conv), leaf)
    assert t.shape == (5, 4, 2, 3) and t[4, 1, 0, 2] == leaf[0, 2, 1, 4]
    leaf = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)  # in, out
    q, k, v = names.to_torch(Entry("p", ("q", "k", "v"), Kind.matrix), leaf)
    assert q.shape == (2, 4) and k[1, 3] == leaf[3, 3] and v[0, 2] == leaf[2, 4]
    (t,) = names.to_torch(Entry("p", ("k",), Kind.pointwise), leaf)
    assert t.shape == (6, 4, 1, 1) and t[5, 2, 0, 0] == leaf[2, 5]


def test_differences_name_every_key_and_path():
    cfg = EVERY["dc-ae-f32c32-in-1.0"]
    shapes = {k: s for k, (_, s) in narrow.tensors_of(cfg, Layout.official).items()}
    shapes["decoder.extra.weight"] = (3,)
    del shapes["encoder.project_out.main.op_list.0.conv.bias"]
    shapes["decoder.project_in.main.conv.bias"] = (7,)
    assert names.differences(cfg, Layout.official, shapes) == [
        "encoder.project_out.main.op_list.0.conv.bias: missing, needed for "
        "params/encoder/conv_out/bias",
        "decoder.project_in.main.conv.bias: shape 7, expected 8 for params/decoder/conv_in/bias",
        "decoder.extra.weight: not part of this network",
    ]


def test_what_is_said_of_tensors_follows_them_into_the_other_layout():
    cfg = EVERY["dc-ae-f32c32-in-1.0"]
    theirs = {k: "bfloat16" for k in narrow.tensors_of(cfg, Layout.diffusers)}
    assert names.translated(cfg, theirs, Layout.diffusers) == theirs
    official = names.translated(cfg, theirs, Layout.official)
    assert set(official) == set(narrow.tensors_of(cfg, Layout.official))
    # A projection that is one tensor there keeps what is said of all three thirds alike only.
    q = next(k for k in theirs if k.endswith("to_q.weight"))
    mixed = names.translated(cfg, theirs | {q: "float16"}, Layout.official)
    assert len(mixed) == len(official) - 1


def test_a_path_outside_the_rules_is_noticed(monkeypatch):
    cfg = EVERY["kl"]
    real = dict(names.shapes(cfg))
    monkeypatch.setattr(names, "shapes", lambda cfg: real | {"params/encoder/new/kernel": (1, 1)})
    with pytest.raises(AssertionError, match="encoder/new"):
        names.table(cfg, Layout.diffusers)
    assert tree.unflatten(real)
