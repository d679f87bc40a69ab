"""Reads an autoencoder in a PyTorch layout: a folder, a file, or a name on the hub.

Nothing is guessed: what the weights are comes from config.json, from the names and shapes of the
tensors, or from the user.  Tensors are read one at a time.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from dcae_jax import store, tree
from dcae_jax.config import JSONValue
from dcae_jax.convert import folder, layouts, names, releases
from dcae_jax.convert.folder import CONFIG
from dcae_jax.convert.layouts import Described
from dcae_jax.convert.names import AnyConfig, Layout
from dcae_jax.errors import UserError
from dcae_jax.nets.torch_file import Info, TensorFile, open_tensors
from dcae_jax.tree import Tree

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
INDEX = ".safetensors.index.json"
USUAL = {  # stems of weights in folders, the layout's own first
    Layout.diffusers: ("diffusion_pytorch_model", "model"),
    Layout.official: ("model", "diffusion_pytorch_model"),
    Layout.vit_mae: ("model", "pytorch_model"),
}
DTYPES = ("float32", "float16", "bfloat16")  # float32 holds their values exactly
ROOTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# What `part` may name in files that hold a diffusion model, too.
AUTOENCODER = "autoencoder"
# Wrappers of trainers around the autoencoder's names, and what else they hold.
PREFIXES = ("module.", "autoencoder.", "0.")


@dataclass(frozen=True)
class Imported:
    """Converted weights and what the file said beside them."""

    cfg: AnyConfig
    variables: Tree  # {"params": ..., "batch_stats": ... if any}, f32
    scaling_factor: float | None  # None: unknown
    release: str | None  # name of the released weights; None: nobody's
    dtypes: dict[str, str]  # of the tensors that were not float32
    counters: dict[str, int]  # BatchNorm's num_batches_tracked
    source: str
    notes: list[str] = field(default_factory=list)  # what was done on the way, for people
    extra: dict[str, JSONValue] = field(default_factory=dict)  # of `layouts.Described`


class Tensors(NamedTuple):
    """All tensors of a source under the names of their layout."""

    infos: dict[str, Info]
    read: Callable[[str], np.ndarray]
    notes: list[str]


def load(
    source: str, variant: str | None = None, part: str | None = None, also: str = ""
) -> Imported:
    """The weights of a folder, a file or a hub name (owner/name), converted.

    `variant`: the release, where the source leaves it open.  `part`: which weights of a checkpoint
    that holds several.  `also`: what else the caller takes, for the message ("a workdir, ").
    UserError lists all that does not fit; nothing is written anywhere.
    """
    release = None if variant is None else releases.require(variant)
    with open_source(source, None if part == AUTOENCODER else part, also) as opened:
        tensors = _unwrap(opened.tensors)
        said = None if opened.fields is None else layouts.read(opened.fields, opened.where)
        found = _describe(said, tensors, release, source)
        notes, published = tensors.notes, releases.named(source) if opened.from_hub else None
        if published is not None and release is None:
            found, more = _published(found, published, source)
            notes += more
        return _convert(found, tensors._replace(notes=notes + _hint(found)), source)


class Opened(NamedTuple):
    """A source before it is known what it holds."""

    fields: dict[str, JSONValue] | None  # of its config.json; None: it is a bare file
    where: str  # the path of config.json, for messages
    tensors: Tensors  # under the names of the files
    from_hub: bool


@contextlib.contextmanager
def open_source(source: str, part: str | None = None, also: str = "") -> Iterator[Opened]:
    """Opens a folder, a file or a hub name; UserError if it is not there or cannot be read.

    `part` and `also`: see `load`.
    """
    path, from_hub = _absolute(source), False
    require(source, also)
    if not path.exists() and (name := _hub_name(source)):
        path, from_hub = epath.Path(download(name)), True
    fields, layout, where = None, None, str(path / CONFIG)
    if path.is_dir():
        fields = _fields(path, source)
        layout = layouts.layout_of(fields, where)
    files, notes = _weights(path, layout)
    with contextlib.ExitStack() as stack:
        tensors = _merged([stack.enter_context(open_tensors(f, part)) for f in files])
        notes += tensors.notes
        yield Opened(fields, where, tensors._replace(notes=notes), from_hub)


def require(source: str, also: str = "") -> None:
    """UserError if a source is neither there nor a name that the hub may know."""
    if not (_absolute(source).exists() or _hub_name(source)):
        raise UserError(
            f"{source} does not exist; give {also}a folder with config.json and weights, a "
            f"{', '.join(SUFFIXES)} file, or a release's name or owner/name on the hub"
        )


def _hub_name(source: str) -> str | None:
    """Where on the hub: owner/name as given, or that of the release of this name."""
    release = releases.named(source) or releases.diffusion_named(source)
    if release is None or "/" in source:
        return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else None
    every = releases.RELEASES if release in releases.RELEASES else releases.DIFFUSION
    return next(iter(every[release].hub), None)


def _absolute(source: str) -> epath.Path:
    path = epath.Path(source).expanduser()
    return path if store.is_store(source) else path.resolve()


# ------------------------------------------------------------------------------------------ files


def _fields(path: epath.Path, source: str) -> JSONValue:
    """What is in the config.json of a folder."""
    config = path / CONFIG
    if config.is_file():
        try:
            return json.loads(config.read_text())
        except ValueError as e:
            raise UserError(f"{config} is not readable JSON ({e})") from e
    if folder.is_unfinished(path):
        raise UserError(
            f"{source} is unfinished: what wrote it did not end; run that command again"
        )
    parts = {"vae": "autoencoder", "transformer": "diffusion model"}
    inside = [
        f"its {what} is in {name}/" for name, what in parts.items() if _describes(path / name)
    ]
    hint = "; " + " and ".join(inside) if inside else ""
    raise UserError(
        f"{path} has no config.json{hint}; give a folder in diffusers' or the official layout, "
        "or one file of weights with --variant"
    )


def _weights(path: epath.Path, layout: Layout | None) -> tuple[list[epath.Path], list[str]]:
    """The files of weights, and what was left out beside them; `layout` of a folder."""
    if layout is None:
        if path.suffix == ".json":
            raise UserError(f"{path} holds no weights; give the folder that it describes")
        return [path], []
    inside = sorted(p.name for p in path.iterdir())
    if indices := [n for n in inside if n.endswith(INDEX)]:
        index, notes = _single(path, indices, INDEX, layout)
        return _shards(path, index), notes
    for suffixes in ((".safetensors",), SUFFIXES[1:]):
        if weights := [n for n in inside if n.endswith(suffixes)]:
            suffix = suffixes[0] if len(suffixes) == 1 else ""
            name, notes = _single(path, weights, suffix, layout)
            return [path / name], notes
    raise UserError(f"{path} holds no weights; expected a {', '.join(SUFFIXES)} file")


def _describes(path: epath.Path) -> bool:
    return (path / CONFIG).is_file()


def _single(
    path: epath.Path, found: list[str], suffix: str, layout: Layout
) -> tuple[str, list[str]]:
    """The one file, or that with the usual name of the layout; UserError if it stays open which."""
    usual = [stem + suffix for stem in USUAL[layout] if stem + suffix in found]
    if len(found) == 1 or usual:
        name = (usual or found)[0]
        others = ", ".join(n for n in found if n != name)
        return name, [f"taken from {name}; left out: {others}"] if others else []
    raise UserError(
        f"{path} holds several files of weights: {', '.join(found)}; give a folder with "
        "config.json and one of them"
    )


def _shards(path: epath.Path, index: str) -> list[epath.Path]:
    try:
        shards = sorted(set(json.loads((path / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{path / index} is no index of shards ({type(e).__name__}: {e})") from e
    if missing := [s for s in shards if not (path / s).is_file()]:
        raise UserError(f"{path}: {index} names {', '.join(missing)}, which is not there")
    return [path / s for s in shards]


def _merged(files: list[TensorFile]) -> Tensors:
    owner: dict[str, TensorFile] = {}
    for file in files:
        if twice := owner.keys() & file.infos.keys():
            raise UserError(f"{file.path} repeats {sorted(twice)[0]} of {owner[min(twice)].path}")
        owner |= dict.fromkeys(file.infos, file)
    notes = [f"taken from {f.path.name}: {f.part}" for f in files if f.part]
    notes += [f"left out of {f.path.name}: {', '.join(f.left_out)}" for f in files if f.left_out]
    infos = {key: file.infos[key] for key, file in owner.items()}
    return Tensors(infos, lambda key: owner[key].read(key), notes)


def _unwrap(tensors: Tensors) -> Tensors:
    """Strips the prefixes that trainers put before the autoencoder's names, and says so."""
    real, notes = stripped(tensors.infos, ROOTS, PREFIXES)
    notes = tensors.notes + notes
    if former := [k for k in real if any(old in k for old in names.FORMER_NAMES)]:
        notes.append(f"{len(former)} tensor(s) have former names, such as {former[0]}")
        real = {_present(k): v for k, v in real.items()}
    infos = {key: tensors.infos[name] for key, name in real.items()}
    return Tensors(infos, lambda key: tensors.read(real[key]), notes)


def stripped(
    keys: Iterable[str], roots: tuple[str, ...], prefixes: tuple[str, ...]
) -> tuple[dict[str, str], list[str]]:
    """({key without the wrappers' prefixes: key}, what was done), until a key begins as a root."""
    real, notes = {key: key for key in keys}, []
    while not any(key.startswith(roots) for key in real):
        prefix = next((p for p in prefixes if any(k.startswith(p) for k in real)), None)
        if prefix is None:
            break
        rest = sorted({k.split(".")[0] for k in real if not k.startswith(prefix)})
        real = {k.removeprefix(prefix): v for k, v in real.items() if k.startswith(prefix)}
        notes.append(f"stripped the prefix {prefix!r}" + (f"; left out {rest}" if rest else ""))
    return real, notes


def _present(key: str) -> str:
    for old, new in names.FORMER_NAMES.items():
        key = key.replace(old, new)
    return key


# -------------------------------------------------------------------------------------------- hub


def download(name: str) -> str:
    """The local folder of a hub repository's config and weights, downloaded if need be."""
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError as e:
        raise UserError(
            f"{name} is no path here, and reading it from the Hugging Face hub needs "
            "huggingface_hub: pip install huggingface_hub, or download it elsewhere and give the "
            "path of the folder"
        ) from e
    try:
        return snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["*/*"]
        )
    except RepositoryNotFoundError as e:
        why, cause = "has no such repository, or it is private or gated", e
    except Exception as e:  # whatever the layers below make of a missing network
        first = (str(e).strip().splitlines() or [""])[0]
        why, cause = f"cannot be reached ({type(e).__name__}: {first[:200]})", e
    raise UserError(
        f"{name} is no path here, and {constants.ENDPOINT} {why}. Check the name; accept the terms "
        "of a gated repository and log in (hf auth login); without a network download it elsewhere "
        "and give the path of the folder"
    ) from cause


# ------------------------------------------------------------------------------------- what it is


def _describe(
    described: Described | None, tensors: Tensors, release: str | None, source: str
) -> Described:
    """Network, factor and release; UserError if they are open, or contradict each other.

    `described`: of the folder's config.json; None for a bare file.
    """
    layout = names.layout_of(tensors.infos)
    if layout is None:
        first = ", ".join(list(tensors.infos)[:3]) or "none"
        raise UserError(
            f"{source} holds no autoencoder that is known: its tensors are called {first}, ...; "
            "expected names as encoder.stages.1... (official) or encoder.down_blocks.1... "
            "(diffusers)"
        )
    if described is None:
        return _detect(tensors, layout, release, source)
    described = described._replace(layout=layout)
    return described if release is None else _agreed(described, release, source)


def _agreed(described: Described, release: str, where: str) -> Described:
    """What config.json says, completed by the release that was named; they must agree."""
    what = releases.RELEASES[release]
    found = layouts.network_differences(described.cfg, what.config())
    factor = described.scaling_factor
    if described.release not in (None, release):
        found.append(f"model_name: {described.release}, {release}")
    if None not in (factor, what.scaling_factor) and factor != what.scaling_factor:
        found.append(f"scaling_factor: {factor}, {what.scaling_factor}")
    if found:
        raise UserError(
            f"{where}: config.json is not that of {release} (here, there):\n{listed(found)}\n"
            "Leave out --variant to go by the config.json, or name the variant that it is"
        )
    return _completed(described, release)


def _published(found: Described, release: str, source: str) -> tuple[Described, list[str]]:
    """With what the hub name tells, unless config.json describes another network."""
    if wrong := layouts.network_differences(found.cfg, releases.RELEASES[release].config()):
        return found, [f"{source} does not hold the network of {release}: {wrong[0]}"]
    return _completed(found, release), []


def _hint(found: Described) -> list[str]:
    """The releases that have this network, where the weights are not known to be those of one."""
    same = layouts.same_network(found.cfg)
    if found.release is not None or not same:
        return []
    alike = "".join(f" (and of {a})" for n in same if (a := releases.RELEASES[n].alike))
    return [f"the network of {', '.join(same)}{alike}: --variant NAME if these are its weights"]


def _completed(described: Described, release: str) -> Described:
    """What config.json says, with what only the name of the release tells."""
    factor = described.scaling_factor
    return described._replace(
        cfg=layouts.with_release(described.cfg, release),
        scaling_factor=releases.RELEASES[release].scaling_factor if factor is None else factor,
        release=release,
    )


def _detect(tensors: Tensors, layout: Layout, release: str | None, source: str) -> Described:
    """What a bare file holds: `release`, or the network of the only release that it fits.

    Whose weights they are tensors do not tell, and so neither the scaling factor.
    """
    shapes = {key: info.shape for key, info in tensors.infos.items()}
    if release is not None and not _differences(release, layout, shapes):
        return _released(release, layout)
    ranked = {name: _differences(name, layout, shapes) for name in _expressible(layout)}
    fits = [name for name, found in ranked.items() if not found]
    if release is None and len(fits) == 1:
        cfg = layouts.with_release(releases.RELEASES[fits[0]].config(), None)
        return Described(cfg, None, None, layout, {})
    if release is None and fits:
        factors = [f"{n} (scaling factor {_factor(n)})" for n in fits]
        raise UserError(
            f"{source} fits {len(fits)} releases, which differ in weights and scaling factor only:"
            f"\n{listed(factors)}\nSay which it is with --variant NAME, or give "
            + ("its folder" if _has_config(source) else "a folder with config.json")
        )
    nearest = release or min(ranked, key=lambda name: len(ranked[name]))
    found = ranked[nearest] if nearest in ranked else _differences(nearest, layout, shapes)
    asked = f"is not {release}" if release else f"fits no release; the nearest is {nearest}"
    mend = f"It fits {', '.join(fits)}" if fits else "A network of your own needs its config.json"
    raise UserError(f"{source} {asked}; {len(found)} difference(s):\n{listed(found)}\n{mend}")


def _has_config(source: str) -> bool:
    return (_absolute(source).parent / "config.json").is_file()


def _released(release: str, layout: Layout) -> Described:
    what = releases.RELEASES[release]
    return Described(what.config(), what.scaling_factor, release, layout, {})


def _expressible(layout: Layout) -> list[str]:
    """The releases that exist in a layout."""
    every = releases.RELEASES.items()
    return [name for name, what in every if not layouts.problems(what.config(), layout)]


def _differences(release: str, layout: Layout, shapes: dict[str, names.Shape]) -> list[str]:
    cfg = releases.RELEASES[release].config()
    return layouts.problems(cfg, layout) or names.differences(cfg, layout, shapes)


def _factor(release: str) -> str:
    factor = releases.RELEASES[release].scaling_factor
    return "unknown" if factor is None else f"{factor:g}"


def listed(lines: list[str], most: int = 20) -> str:
    """The lines for a message, no more than `most` of them."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  - {line}" for line in lines[:most] + more)


# ------------------------------------------------------------------------------------- conversion


def _convert(found: Described, tensors: Tensors, source: str) -> Imported:
    cfg, layout = found.cfg, found.layout
    if problems := cfg.problems():
        raise UserError(f"the network of {source} cannot be built:\n{listed(problems)}")
    shapes = {key: info.shape for key, info in tensors.infos.items()}
    if wrong := names.differences(cfg, layout, shapes):
        which = found.release or "its config.json"
        raise UserError(
            f"{source} does not hold the network of {which} ({len(wrong)} difference(s)):\n"
            f"{listed(wrong)}"
        )
    entries = names.table(cfg, layout)
    dtypes = rounded_dtypes([key for e in entries for key in e.keys], tensors, source)
    flat = {
        e.path: jax.device_put(names.from_torch(e, [tensors.read(k) for k in e.keys]))
        for e in entries
    }
    counted = [key for key in names.counters(cfg, layout) if key in tensors.infos]
    counters = {key: int(tensors.read(key)) for key in counted}
    bad = names.not_finite(entries, flat)
    return Imported(
        cfg, tree.unflatten(flat), found.scaling_factor, found.release, dtypes, counters, source,
        tensors.notes + ([bad] if bad else []), found.extra,
    )  # fmt: skip


def rounded_dtypes(keys: list[str], tensors: Tensors, source: str) -> dict[str, str]:
    """The dtypes that are not float32; UserError for those that float32 cannot hold exactly."""
    kinds: dict[str, Any] = {key: tensors.infos[key].dtype for key in keys}
    if wrong := [f"{key}: {dtype}" for key, dtype in kinds.items() if dtype.name not in DTYPES]:
        raise UserError(
            f"{source} has tensors that float32 cannot hold exactly:\n{listed(wrong)}\n"
            "Convert them first (in PyTorch: tensor.float()); float32, float16 and bfloat16 are "
            "kept as they are"
        )
    return {key: d.name for key, d in kinds.items() if d != np.float32}
