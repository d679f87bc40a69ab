"""Checkpoints with digests: the only importer of Orbax.

A step directory holds the items `params`, `stats`, `ema`, `opt` and `meta` (JSON).  `meta` lists
shape, dtype and a digest of every leaf, so a flipped bit or a file that is gone is found and named
when the step is read, and an older step is used.  Nothing of the user's is ever deleted: a damaged
step is moved to `checkpoints_damaged/`.
"""

import contextlib
import hashlib
import json
import logging as stdlib_logging
import math
import re
import shutil
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import Array, UInt32
from orbax.checkpoint import checkpoint_managers as policies

from dcae_jax import distributed, store, tree
from dcae_jax.config import CheckpointConfig, JSONValue
from dcae_jax.errors import UserError
from dcae_jax.step import TrainState, ema_name
from dcae_jax.tree import Tree

ITEMS = ("params", "stats", "ema", "opt")
Meta = dict[str, JSONValue]


class DamagedCheckpoint(Exception):
    """A step that cannot be trusted; the message names what is wrong with it."""


# ---------------------------------------------------------------------------------------- digests


@jax.jit
def _shard_digest(
    x: Array, start: UInt32[Array, " ndim"], stride: UInt32[Array, " ndim"]
) -> UInt32[Array, ""]:
    """Sum over a shard's elements of bits x (2 index + 1) modulo 2^32, index in the whole array.

    The factors are odd, so every single flipped bit changes the sum; integer sums do not depend on
    the order, so those of the shards add up to the same digest on every mesh.
    """
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + start[axis]
        index += position * stride[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def _digests(leaves: list[Array]) -> list[int]:
    """The digest of each leaf.  Each shard is summed where it lies: nothing is gathered."""
    with jax.set_mesh(None):  # a shard lies on one device, not on the mesh
        parts = [
            [_shard_digest(s.data, *_position(s.index, x.shape)) for s in x.addressable_shards
             if s.replica_id == 0]
            for x in leaves
        ]  # fmt: skip
        local = [sum(int(v) for v in shards) for shards in jax.device_get(parts)]
    if all(x.is_fully_addressable for x in leaves):  # each process has a copy of its own
        return [v % 2**32 for v in local]
    return [int(v) % 2**32 for v in distributed.total(np.array(local, np.uint64))]


def _position(
    index: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[UInt32[np.ndarray, " ndim"], UInt32[np.ndarray, " ndim"]]:
    """(first index of a shard, distance of two neighbours in the flat array), along each axis."""
    stride = np.cumprod([1, *shape[:0:-1]], dtype=np.uint64)[::-1][: len(shape)]
    return np.array([s.start or 0 for s in index], np.uint32), stride.astype(np.uint32)


def _paths(item: Tree) -> tuple[list[str], list[Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(item)
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat], [
        x for _, x in flat
    ]


def leaf_table(item: Tree, with_digest: bool = True) -> dict[str, JSONValue]:
    """path -> [shape, dtype, digest] of every leaf."""
    paths, leaves = _paths(item)
    digests = _digests(leaves) if with_digest else [0] * len(leaves)
    return {
        p: [list(x.shape), str(x.dtype), d] for p, x, d in zip(paths, leaves, digests, strict=True)
    }


def _seal(meta: Meta) -> str:
    body = {k: v for k, v in meta.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------ comparison


def compare(name: str, saved: dict[str, JSONValue], target: Tree) -> list[str]:
    """Differences between a saved item and what is needed, each naming the parameter's path."""
    wanted = leaf_table(target, with_digest=False)
    found = [f"{name}/{p}: missing in the checkpoint" for p in wanted if p not in saved]
    found += [f"{name}/{p}: in the checkpoint but not needed" for p in saved if p not in wanted]
    for p in wanted.keys() & saved.keys():
        for what, i in (("shape", 0), ("dtype", 1)):
            if wanted[p][i] != saved[p][i]:
                found.append(f"{name}/{p}: {what} {saved[p][i]}, expected {wanted[p][i]}")
    return sorted(found)


def _refuse(where: str, found: list[str]) -> None:
    if found:
        lines = "\n".join(f"  - {f}" for f in found[:20])
        more = f"\n  ... and {len(found) - 20} more" if len(found) > 20 else ""
        raise UserError(
            f"{where} does not fit this config ({len(found)} difference(s)):\n{lines}{more}\n"
            "Use the config it was trained with (its values are in config.json beside it; "
            "configs/released.py for imported releases), or another workdir."
        )


# ---------------------------------------------------------------------------------------- reading


def _steps(folder: epath.Path) -> list[int]:
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def newest_meta(workdir: epath.Path) -> Meta | None:
    """What the newest readable step of a workdir says about its run; None if there is none."""
    folder = epath.Path(workdir) / "checkpoints"
    return _first_readable(folder, _steps(folder)[::-1])


def source_meta(source: str, name: str = "source") -> Meta:
    """As `newest_meta`, of a workdir or step directory that must have one."""
    folder, steps = find_source(source, name)
    meta = _first_readable(folder, steps)
    if meta is None:
        raise UserError(f"no valid checkpoint in {folder} (tried steps {steps})")
    return meta


def _first_readable(folder: epath.Path, steps: list[int]) -> Meta | None:
    for step in steps:
        with contextlib.suppress(DamagedCheckpoint):
            return read_meta(folder, step)
    return None


def read_meta(folder: epath.Path, step: int) -> Meta:
    """The JSON of a step; raises DamagedCheckpoint if it is not there or not what was written."""
    path = folder / str(step) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise DamagedCheckpoint(f"{path} is missing: the step is empty or incomplete") from e
    except (ValueError, UnicodeDecodeError) as e:
        raise DamagedCheckpoint(f"{path} is not readable JSON: {e}") from e
    if "sha256" not in meta or meta["sha256"] != _seal(meta):
        raise DamagedCheckpoint(f"{path} was changed after it was written (its sha256 differs)")
    return meta


# Errors that say nothing about the files: too little memory or too few handles, no permission, a
# store that does not answer.  They must not make a good checkpoint look damaged.
_NOT_DAMAGE = (
    "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED"
)  # fmt: skip


def _read_items(folder: epath.Path, step: int, meta: Meta, targets: dict[str, Tree]) -> Any:
    """Restores items into the targets' shardings and checks every leaf's digest.

    The targets may be a part of what was saved.  All processes return, or all raise
    DamagedCheckpoint: a reader that fails alone must not leave the others in a collective.
    """
    found, problem = {}, ""
    for item, target in targets.items():
        try:
            found[item] = _read_item(folder / str(step) / item, target)
        except (MemoryError, PermissionError):
            raise
        except Exception as e:  # whatever a damaged file makes Orbax and tensorstore raise
            text = str(e).strip().splitlines()
            if any(word in str(e) for word in _NOT_DAMAGE):
                raise
            problem = f"{item}: {type(e).__name__}: {text[0][:300] if text else ''}"
            break
    if not distributed.agree(not problem):
        raise DamagedCheckpoint(problem or "another process could not read its part")
    bad = [
        f"{item}/{path}"
        for item in targets
        for path, row in leaf_table(found[item]).items()
        if row != meta["leaves"][item][path]
    ]
    if bad:
        raise DamagedCheckpoint(
            f"{len(bad)} leaf/leaves differ from what was saved, the first is {bad[0]}"
        )
    return found


def _read_item(path: epath.Path, target: Tree) -> Tree:
    """One item; the handler itself, since `Checkpointer.restore` ends in a barrier."""
    handler = ocp.PyTreeCheckpointHandler()
    args = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    try:
        found = handler.restore(path, args=args)
    finally:
        handler.close()
    paths, leaves = _paths(found)
    if absent := [p for p, x in zip(paths, leaves, strict=True) if not isinstance(x, jax.Array)]:
        raise ValueError(f"{absent[0]} is not in the item's metadata")
    return found


def _items(state: TrainState) -> dict[str, Tree]:
    """The state's items that have leaves; the step is in the directory's name and in meta."""
    every = {name: getattr(state, name) for name in ITEMS}
    return {name: item for name, item in every.items() if jax.tree.leaves(item)}


@dataclass(frozen=True)
class Weights:
    """Parameters and running statistics taken from another run, and where they came from."""

    params: Tree
    stats: Tree
    step: int
    source: str  # e.g. "ema 0.999 of step 1200"
    meta: Meta
    left_out: tuple[str, ...] = ()  # parameters of that run that were not wanted


def load_weights(
    source: str, targets: dict[str, Tree], prefer_ema: bool, new: str = "", unused: str = ""
) -> Weights:  # fmt: skip
    """The newest valid weights of a run's workdir (or of one step directory).

    `targets` are abstract `params` and `stats`.  Only what the other run has in common at the top
    level (e.g. "ae" but not "disc") is read; within it the trees must agree, but for parameters
    whose path matches the regex `new`: where the other run lacks them they are left out.  What it
    has beyond the targets is left out where its path matches `unused`.
    """
    folder, wanted = find_source(source)
    for step in wanted:
        try:
            meta = read_meta(folder, step)
            return _read_weights(folder, step, meta, targets, prefer_ema, new, unused)
        except DamagedCheckpoint as e:
            logging.warning("checkpoint %s of %s is damaged: %s", step, folder, e)
    raise UserError(f"no valid checkpoint in {folder} (tried steps {wanted})")


def absolute(path: str) -> epath.Path:
    """The path in a form that does not depend on the current folder (Orbax needs that)."""
    whole = epath.Path(path).expanduser()
    return whole if store.is_store(path) else whole.resolve()


def home(path: str) -> epath.Path:
    """`absolute`, of a folder with checkpoints; UserError where Orbax cannot keep any."""
    store.require_checkpoints(path)
    return absolute(path)


def find_source(source: str, name: str = "source") -> tuple[epath.Path, list[int]]:
    """(folder, steps newest first) of a workdir or step directory; UserError if there are none.

    `name`: what the user calls it, for the message.
    """
    path = home(source)
    if _is_step(path):
        return path.parent, [int(path.name)]
    for folder in (path / "checkpoints", path):
        if steps := _steps(folder):
            return folder, steps[::-1]
    what = "does not exist" if not path.exists() else "has no checkpoints"
    raise UserError(
        f"{name} = {source!r} {what}; give the workdir of a run or of an import, or one step "
        "directory of it (WORKDIR/checkpoints/STEP)"
    )


def _is_step(path: epath.Path) -> bool:
    """Whether it is a step directory; a workdir may have a number for a name, too."""
    return path.name.isdigit() and path.exists() and not (path / "checkpoints").exists()


def has_steps(path: epath.Path) -> bool:
    """Whether `find_source` finds checkpoints there."""
    return _is_step(path) or any(_steps(folder) for folder in (path / "checkpoints", path))


def workdir_of(source: str) -> epath.Path:
    """The workdir of what `find_source` accepts, or accepted before it was moved away."""
    path = absolute(source)
    was_step = path.name.isdigit() and path.parent.name == "checkpoints"
    path = path.parent if was_step or _is_step(path) else path
    return path.parent if path.name == "checkpoints" else path


def _read_weights(
    folder: epath.Path, step: int, meta: Meta, targets: dict[str, Tree], prefer_ema: bool,
    new: str, unused: str,
) -> Weights:  # fmt: skip
    asked = tree.flatten(targets["params"])
    left_out = tuple(
        path for path in meta["leaves"]["params"]
        if path not in asked and re.fullmatch(unused, path)
    )  # fmt: skip
    saved = _without(meta["leaves"], left_out)
    decay = None
    if prefer_ema and "ema" in saved:
        decay = ema_name(meta["config"]["ema"]["decays"][0])  # the one that is evaluated
    parts = targets["params"].keys() & {p.split("/")[0] for p in saved["params"]}
    inner = {name: {k: v for k, v in t.items() if k in parts} for name, t in targets.items()}
    inner["params"] = tree.unflatten({
        path: leaf for path, leaf in tree.flatten(inner["params"]).items()
        if path in saved["params"] or not re.fullmatch(new, path)
    })  # fmt: skip
    whole = {"ema": {decay: inner}} if decay else inner
    _refuse(f"{folder / str(step)}", _part_problems(saved, whole, parts))
    inner = {name: t for name, t in inner.items() if jax.tree.leaves(t)}
    want = {"ema": {decay: inner}} if decay else inner
    found = _read_items(folder, step, meta, want)
    found = found["ema"][decay] if decay else found
    source = f"{f'ema {decay}' if decay else 'params'} of step {step} in {folder}"
    stats = found["stats"] if "stats" in found else {}
    return Weights(found["params"], stats, step, source, meta, left_out)


def _without(
    saved: dict[str, dict[str, JSONValue]], left_out: tuple[str, ...]
) -> dict[str, dict[str, JSONValue]]:
    """The leaves of a checkpoint but for these parameters and their averages."""
    ends = {"params": 0, "ema": 2}  # ae/..., decay/params/ae/...
    return {
        item: {
            path: row for path, row in rows.items()
            if item not in ends or "/".join(path.split("/")[ends[item] :]) not in left_out
        }
        for item, rows in saved.items()
    }  # fmt: skip


def _part_problems(
    saved: dict[str, dict[str, JSONValue]], want: dict[str, Tree], parts: Set[str]
) -> list[str]:
    """How the parts ("ae") that are read differ from the target; other parts are left there.

    Statistics without a place count: an RMS norm must not take a BatchNorm's scale and bias.
    """
    found = []
    for item, target in want.items():
        depth = 2 if item == "ema" else 0  # decay/params/ae/..., ae/...
        rows = {
            path: row for path, row in (saved[item] if item in saved else {}).items()
            if path.split("/")[depth] in parts and (not depth or path.split("/")[0] in target)
        }  # fmt: skip
        found += compare(item, rows, target)
    return found


# ---------------------------------------------------------------------------------------- manager


def _once(record: stdlib_logging.LogRecord) -> bool:
    """Drops Orbax's tracebacks: it logs each error and raises it too, and it is told once."""
    return not (record.exc_info and "orbax" in record.pathname)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which asks jax's preemption service with step numbers at each save.

    `distributed.Preemption` asks it with counts of polls; mixed, the agreed point is never reached.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never: when to stop is decided in one place."""
        return False


class Best(NamedTuple):
    """The step with the best score so far, and that score."""

    metric: str
    step: int
    value: float

    def to_json(self) -> dict[str, JSONValue]:
        """For the meta of a step and for the summary."""
        return self._asdict()


class _One:
    """Preserves the step that is named at the moment (one of Orbax's preservation policies).

    Orbax's own BestN takes the scores that were saved with a step: it knows none of a step that was
    saved before it was scored, fails where steps have scores by another name, and sorts NaN.
    """

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [c.step == self.step for c in checkpoints]


class Checkpoints:
    """The checkpoints of one workdir: asynchronous saving, retention, newest valid step."""

    def __init__(self, workdir: epath.Path, cfg: CheckpointConfig):
        self.folder = epath.Path(workdir) / "checkpoints"
        self._damaged = epath.Path(workdir) / "checkpoints_damaged"
        self._cfg = cfg
        self._kept = _One()
        self.best: Best | None = None  # by the metric of the config, of the steps on disk
        logging.get_absl_logger().addFilter(_once)
        self._manager = self._open()
        self._last: int | None = None  # step that was saved or restored last, the newest there is

    def _open(self) -> _Manager:
        cfg = self._cfg
        keep: list[Any] = [policies.LatestN(cfg.keep)]
        if cfg.keep_every:
            keep.append(policies.EveryNSteps(cfg.keep_every))
        if cfg.best:
            keep.append(self._kept)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        return _Manager(self.folder, options=options)

    def steps(self) -> list[int]:
        """All steps on disk, oldest first."""
        return _steps(self.folder)

    def scored(self, step: int, scores: dict[str, float]) -> bool:
        """Whether the scores of a step are the best so far; if so it is kept from now on.

        The step need not be saved yet, but must be next.  What is not finite is never the best.
        """
        if not self._cfg.best or self._cfg.best not in scores:
            return False
        # All processes do what the first one measured: theirs may round differently.
        value = distributed.from_main(scores[self._cfg.best])
        found = self._better(self.best, Best(self._cfg.best, step, value))
        changed, self.best = found is not self.best, found
        self._kept.step = None if found is None else found.step
        return changed

    def _better(self, old: Best | None, new: Best) -> Best | None:
        """The better one; of equal ones the older."""
        if not math.isfinite(new.value):
            return old
        sign = 1 if self._cfg.best_is_highest else -1
        return new if old is None or sign * new.value > sign * old.value else old

    def _recall(self, newest: Meta) -> None:
        """The best of the steps on disk: the newest one's meta names it, and each has its own.

        Its own: the config may name another metric than before.
        """
        name, steps = self._cfg.best, self.steps()
        found = [newest["best"]] if newest.get("best") else []
        for step in steps if name else []:
            with contextlib.suppress(DamagedCheckpoint):
                meta = read_meta(self.folder, step)
                if meta.get("evaluated_at") == step and name in meta["scores"]:
                    found.append(Best(name, step, meta["scores"][name]).to_json())
        self.best = None
        for each in found:
            if each["metric"] == name and each["step"] in steps:
                self.best = self._better(self.best, Best(**each))
        self._kept.step = None if self.best is None else self.best.step

    def save(self, state: TrainState, meta: Meta) -> None:
        """Starts to write a step; returns when the state may be donated again.

        `meta` is stored beside the leaves; raises UserError when an earlier write failed.
        """
        step = int(state.step)
        if step == self._last:
            return
        items = _items(state)
        meta = {**meta, "step": step, "leaves": {k: leaf_table(v) for k, v in items.items()}}
        meta["sha256"] = _seal(meta)
        args = {k: ocp.args.StandardSave(v) for k, v in items.items()}
        try:
            # Forced: otherwise Orbax leaves out, without a word, a step below its newest one.
            self._manager.save(
                step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args), force=True
            )
        except Exception as e:
            raise self._write_error(step, e) from e
        self._last = step

    def wait(self) -> None:
        """Blocks until what was started is on disk; raises UserError if it is not."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as e:
            raise self._write_error(None, e) from e

    def _write_error(self, step: int | None, e: Exception) -> UserError:
        which = "the last checkpoint" if step is None else f"checkpoint {step}"
        text = str(e).strip()  # the reason stands at the end, behind long paths
        text = text if len(text) < 300 else f"{text[:100]} ... {text[-200:]}"
        return UserError(
            f"{which} could not be written to {self.folder}: {type(e).__name__}: {text}\n"
            f"Safe on disk: steps {self.steps() or 'none'}. Make room (or "
            "mend what the message says) and run the same command again: it resumes from there."
        )

    def restore_newest(self, target: TrainState) -> tuple[TrainState, Meta] | None:
        """The newest step whose digests are right, on the target's shardings; None without steps.

        Damaged newer steps are named and moved to `checkpoints_damaged/`.  Raises UserError when
        steps exist but every one is damaged, or when one does not fit the target.
        """
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            state, meta = self._try(step, target)
            if state is not None:
                self._set_aside(damaged)
                self._recall(meta)
                self._last = step
                return state, meta
            damaged.append(step)
        if not steps:
            return None
        raise UserError(
            f"none of the checkpoints {steps} in {self.folder} is valid (see the warnings above); "
            "nothing was changed. Restore them from a backup, or use a new workdir to start over."
        )

    def _try(self, step: int, target: TrainState) -> tuple[TrainState | None, Meta]:
        try:
            meta = read_meta(self.folder, step)
            items = _items(target)
            names = meta["leaves"]
            every = sorted(names.keys() | items.keys())
            found = [d for k in every for d in compare(k, names.get(k, {}), items.get(k, {}))]
            _refuse(f"checkpoint {step} in {self.folder}", found)
            read = _read_items(self.folder, step, meta, items)
        except DamagedCheckpoint as e:
            logging.warning("checkpoint %d in %s is damaged: %s", step, self.folder, e)
            return None, {}
        count = jax.device_put(np.int32(step), target.step.sharding)
        return target.replace(step=count, **read), meta

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self._manager.close()
        if distributed.is_main():
            self._damaged.mkdir(parents=True, exist_ok=True)
            for step in steps:
                name = next(
                    n for n in (f"{step}", *(f"{step}-{i}" for i in range(1, 1000)))
                    if not (self._damaged / n).exists()
                )  # fmt: skip
                _move(self.folder / str(step), self._damaged / name)
                logging.warning("moved damaged checkpoint %d to %s", step, self._damaged / name)
        distributed.barrier("damaged checkpoints moved")
        self._manager = self._open()

    def close(self) -> None:
        """Waits for the last write and releases the manager."""
        self.wait()
        self._manager.close()


def _move(folder: epath.Path, target: epath.Path) -> None:
    """Renames a folder; on an object store, which cannot, copies what is in it and deletes it."""
    if not store.is_store(folder):
        folder.rename(target)
        return
    _copy(folder, target)
    folder.rmtree()


def _copy(folder: epath.Path, target: epath.Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            path.copy(target / path.name, overwrite=True)


def require_space(workdir: epath.Path, state: Any) -> None:
    """Refuses to start when the workdir's disk has no room for two checkpoints."""
    need = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    if store.is_store(workdir):
        return
    free = shutil.disk_usage(workdir).free
    if free < need:
        raise UserError(
            f"{workdir} has {free / 2**20:.0f} MiB free; two checkpoints of this run need "
            f"{need / 2**20:.0f} MiB. Free some space or choose another --workdir."
        )
