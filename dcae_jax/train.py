"""The loop: the one file that knows the order of things.  Read `train` and `_loop` top to bottom.

Resume, logging, evaluation, checkpoints and preemption are visible here; there are no callbacks.
"""

import contextlib
import errno
import functools
import json
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from dcae_jax import (
    autoencoder,
    checkpoint,
    distributed,
    optim,
    programs,
    provenance,
    rng,
    sharding,
    step,
    store,
    tree,
)
from dcae_jax.config import InitWeights, NonFinite, RunConfig
from dcae_jax.data import pipeline
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import base as evals_base
from dcae_jax.report import flops, html, phases, progress, writers
from dcae_jax.step import TrainState
from dcae_jax.tasks.base import Extends, Task, Trims
from dcae_jax.tree import Tree

DONE, FAILED = 0, 1
Row = dict[str, Any]  # metrics of a step: scalars on the device, or floats from a checkpoint


@dataclass
class Run:
    """What the loop works with; made once by `_start`."""

    cfg: RunConfig
    workdir: epath.Path
    mesh: Mesh
    task: Task
    state: TrainState
    shardings: TrainState
    constants: Tree
    checkpoints: checkpoint.Checkpoints
    preemption: distributed.Preemption
    writers: list[writers.Writer]
    clock: progress.Clock
    evaluators: dict[str, Any]
    batches: pipeline.BatchIterator
    programs: programs.Programs
    data: str  # fingerprint of the records
    record: dict[str, Any]  # what task and evaluators keep in every checkpoint
    evaluated_at: int = -1  # steps after which the evaluators last ran to the end
    saved_at: float = field(default_factory=time.monotonic)
    scores: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    bad_steps: int = 0  # non-finite ones in a row
    profiling: str = ""  # the folder of a trace that is being recorded
    pending: list[Row] = field(default_factory=list)  # of steps that are not logged yet

    def step(self) -> int:
        """Optimizer steps done."""
        return int(jax.device_get(self.state.step))


def train(
    cfg: RunConfig, workdir: str, preemption: distributed.Preemption, force: bool = False
) -> int:
    """Trains a resolved, valid config in `workdir`, resuming what is there; returns the exit code.

    0: done.  1: stopped by a non-finite loss (the last good state is saved).  42: preempted, saved.
    """
    path = checkpoint.home(workdir)
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh), _disk_errors(path), provenance.lock(path):
        if provenance.is_finished(path, cfg, force):
            say(f"{path}: already finished; nothing to do (summary.json is there)")
            report = path / "report.html"
            if distributed.is_main() and not report.exists():  # killed while it was written
                html.build_report([path], report)
            return DONE
        return _work(_start(cfg, path, mesh, preemption, force))


def _work(run: Run) -> int:
    """Trains, saves when it is preempted, and closes what `_start` opened."""
    ended = False
    try:
        try:
            code = _loop(run)
        except distributed.Preempted:
            _save(run, wait=True)
            say(f"preempted: saved step {run.step()}; the same command resumes")
            code = distributed.EXIT_PREEMPTED
        ended = True
    finally:
        # After an error on one of several processes nothing can be waited for (see `leave`).
        if ended or jax.process_count() == 1:
            _close(run)
    return code


@contextlib.contextmanager
def _disk_errors(workdir: epath.Path) -> Iterator[None]:
    """Turns a full disk into one sentence, whatever was being written; a missing client too."""
    try:
        with store.told():
            yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{workdir}: {e.strerror}. Make room and run the same command again: it resumes from "
            "the newest checkpoint"
        ) from e


def say(text: str) -> None:
    """Prints on the main process."""
    if distributed.is_main():
        progress.say(text)


def evaluate(cfg: RunConfig, source: str, preemption: distributed.Preemption) -> int:
    """Runs every evaluator of the config on the newest checkpoint of a workdir, or on one step.

    The workdir may be of a run or an imported autoencoder; only the weights have to fit.  Scores
    and grids go into eval/ of the workdir; the record of the training stays as it is.
    """
    with store.told():
        checkpoint.find_source(source, "--workdir")
    workdir, mesh = checkpoint.workdir_of(source), sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh), _disk_errors(workdir), provenance.lock(workdir):
        task = cfg.task.build(cfg)
        state, weights = _trained(cfg, source, mesh, task)
        constants = sharding.put_whole(task.constants(training=False), mesh)
        evaluators = {e.name: e.build(cfg, task, mesh) for e in cfg.evals}  # they look for files
        reports = {}
        for name, evaluator in evaluators.items():
            try:
                reports[name] = _report(
                    name, evaluator, state, constants, preemption.check, weights.step
                )
            except distributed.Preempted:
                say("evaluation stopped; nothing was written, the same command starts it again")
                return distributed.EXIT_PREEMPTED
        if distributed.is_main():
            record = evals_base.records(evaluators)
            _write_scores(cfg, workdir / "eval", weights, reports, record)
    return DONE


def _trained(
    cfg: RunConfig, source: str, mesh: Mesh, task: Task
) -> tuple[TrainState, checkpoint.Weights]:
    """A state with the kinds of weights that the evaluators ask for, and where they came from."""
    state = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(cfg.seed, 0, "init")))
    target, _ = _abstract(state.replace(opt={}), cfg, mesh)
    targets = {"params": target.params, "stats": target.stats}

    def load(kind: InitWeights) -> checkpoint.Weights:
        found = checkpoint.load_weights(source, targets, prefer_ema=kind is InitWeights.ema)
        say(f"weights: {found.source}")
        return found

    kinds = dict.fromkeys(e.weights for e in cfg.evals)
    if not kinds:
        raise UserError("the config has no evaluator; add one to `evals`")
    found = {kind: load(kind) for kind in kinds}
    first = next(iter(found.values()))
    raw, mean = (found[k] if k in found else first for k in (InitWeights.params, InitWeights.ema))
    average = {"params": mean.params, "stats": mean.stats}
    number = jax.device_put(np.int32(first.step), sharding.replicated(mesh))
    return TrainState(
        step=number, params=raw.params, stats=raw.stats,
        ema={step.ema_name(d): average for d in cfg.ema.decays[:1]}, opt={},
    ), first  # fmt: skip


def _write_scores(
    cfg: RunConfig, folder: epath.Path, weights: checkpoint.Weights, reports: dict[str, Any],
    files: dict[str, Any],
) -> None:  # fmt: skip
    """The scores with what they depend on, under a name of their own, and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "scores": {
            f"{name}/{k}": v for name, found in reports.items() for k, v in found.scalars.items()
        },
        "weights": weights.source,
        "step": weights.step,
        "training_data": weights.meta["data"],
        **files,
        **{k: v for k, v in provenance.meta(cfg, "").items() if k != "data"},
    }
    protocol = json.dumps(record["config"], sort_keys=True)
    path = folder / f"{weights.step:09d}-{zlib.crc32(protocol.encode()):08x}.json"
    path.write_text(json.dumps(record, indent=2))
    pictures = writers.ImageWriter(folder / path.stem)
    for found in reports.values():
        pictures.write_images(weights.step, found.images)
    pictures.close()
    say(f"scores: {path}")


# ------------------------------------------------------------------------------------------ start


def _start(
    cfg: RunConfig, workdir: epath.Path, mesh: Mesh, preemption: distributed.Preemption,
    force: bool,
) -> Run:  # fmt: skip
    """Opens data and workdir, finds the weights, prints what is about to happen."""
    data = cfg.data.fingerprint()
    provenance.check(workdir, cfg, data, force, say)
    task = cfg.task.build(cfg)
    for line in task.describe():
        say(line)
    if isinstance(cfg.data, LatentDataConfig):
        autoencoder.require_current(cfg.data.manifest())
    constants = sharding.put_whole(task.constants(training=True), mesh)
    evaluators = {e.name: e.build(cfg, task, mesh) for e in cfg.evals}  # they look at their data
    record = task.record() | evals_base.records(evaluators)
    checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    state, shardings, meta = _weights(cfg, workdir, mesh, task, checkpoints)
    provenance.write(workdir, cfg, data, record)
    first = int(jax.device_get(state.step))
    for line in describe_optimizers(task, state.params):
        say(line)
    clock = progress.Clock(
        cfg.batch, first, devices=mesh.size, cores=os.cpu_count() or 1,
        carried=meta["clock"] if meta else {},
    )  # fmt: skip
    arguments = (*_shapes((state, constants)), abstract_batch(cfg, mesh))
    run = Run(
        cfg=cfg, workdir=workdir, mesh=mesh, task=task, state=state, shardings=shardings,
        constants=constants,
        checkpoints=checkpoints, preemption=preemption,
        writers=_writers(cfg, workdir, first),
        clock=clock,
        evaluators=evaluators,
        batches=cfg.data.batches(
            batch=cfg.batch, seed=cfg.seed, start_step=first,
            shard=pipeline.Shard(*sharding.row_shard(mesh)),
        ),
        programs=programs.Programs(
            task, functools.partial(_trace, task, cfg, shardings, arguments), mesh, clock,
            # Checkpoints of older versions do not have it.
            carried=meta["programs"] if "programs" in meta else (),
        ),
        data=data, record=record,
    )  # fmt: skip
    if meta:
        run.scores, run.evaluated_at = meta["scores"], meta["evaluated_at"]
        run.bad_steps, run.pending = meta["bad_steps"], meta["pending"]
    else:
        _save(run, wait=True)  # from now on there is always something to resume from
    return run


def _writers(cfg: RunConfig, workdir: epath.Path, first: int) -> list[writers.Writer]:
    if not distributed.is_main():
        return []
    return writers.make_writers(
        workdir, first, tensorboard=cfg.report.tensorboard, wandb_project=cfg.report.wandb_project
    )


def _weights(
    cfg: RunConfig, workdir: epath.Path, mesh: Mesh, task: Task, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, TrainState, checkpoint.Meta]:
    """State, shardings and the checkpoint's meta ({} if none): workdir -> init_from -> scratch."""
    key = rng.key(cfg.seed, 0, "init")

    def fresh() -> TrainState:
        return step.init_state(task, cfg, key)

    target, shardings = _abstract(jax.eval_shape(fresh), cfg, mesh)
    checkpoint.require_space(workdir, target)
    if found := checkpoints.restore_newest(target):
        state, meta = found
        say(f"weights: own workdir, step {meta['step']} of {cfg.steps} (resume)")
        return state, shardings, meta
    if cfg.init_from is not None:
        checkpoint.find_source(
            cfg.init_from, "init_from"
        )  # a wrong path is told before anything takes time
    with progress.working("initialising", enabled=distributed.is_main()):
        # It runs once: on a CPU compiling it well takes 19 s of the demo's time, and plainly 5.
        plainly = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        state = jax.jit(fresh, out_shardings=shardings, compiler_options=plainly)()
    if cfg.init_from is None:
        say("weights: from scratch (no checkpoint in the workdir, init_from not set)")
        return state, shardings, {}
    return _init_from(cfg, task, state, target, shardings), shardings, {}


def _abstract(state: TrainState, cfg: RunConfig, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(shapes with their shardings, shardings) of a state of shapes."""
    shardings = sharding.state_shardings(state, mesh, cfg.mesh)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    return target, shardings


def _init_from(
    cfg: RunConfig, task: Task, state: TrainState, target: TrainState, shardings: TrainState
) -> TrainState:
    """The fresh state with another run's parameters; says what was taken and what was reset."""
    targets = {"params": target.params, "stats": target.stats}
    ema = cfg.init_weights is InitWeights.ema
    found = checkpoint.load_weights(
        cfg.init_from, targets, prefer_ema=ema,
        new=task.new_params if isinstance(task, Extends) else "",
        unused=task.unused_params if isinstance(task, Trims) else "",
    )  # fmt: skip
    mine, taken = tree.flatten(state.params), tree.flatten(found.params)
    params, stats = tree.unflatten({**mine, **taken}), {**state.stats, **found.stats}
    average = jax.jit(
        lambda p, s: step.fresh_ema(p, s, cfg.ema), out_shardings=shardings.ema
    )(params, stats)  # fmt: skip
    fresh = dict.fromkeys(  # a part that is wholly new ("disc") by its name alone
        p if p.split("/")[0] in found.params else p.split("/")[0] for p in mine if p not in taken
    )
    say(f"weights: init_from {found.source}: {', '.join(sorted(found.params))}")
    if found.left_out:
        every = found.meta["leaves"]["params"]
        say(f"  left out there: {', '.join(tree.shortest(found.left_out, every))}")
    say(f"  reset: step, optimizer, EMA{', ' + ', '.join(fresh) + ' (new)' if fresh else ''}")
    return state.replace(params=params, stats=stats, ema=average)


def describe_optimizers(task: Task, params: Tree) -> list[str]:
    """The table of parameter groups: how many, learning rate, weight decay."""
    lines = ["objective  group                        parameters         lr   weight decay"]
    for objective in task.objectives:
        trainable, _ = tree.partition(params, objective.trainable)
        for name, count, lr, decay in optim.table(objective.optim, trainable, objective.trainable):
            lines.append(f"{objective.name:10s} {name:28s} {count:>10,} {lr:>10.2e} {decay:>14.3g}")
    return lines


# ------------------------------------------------------------------------------------------- loop


def _loop(run: Run) -> int:
    """Trains from the state's step to the end; returns the exit code."""
    cfg, clock, first, pending = run.cfg, run.clock, run.step(), run.pending
    run.preemption.check()
    if run.evaluated_at < first:
        _evaluate(run, first)  # before the first step, or what a preemption interrupted
    if first < cfg.steps:
        run.programs.start(first, cfg.steps, run.preemption.check)
    run.preemption.check()
    device_batches = sharding.Prefetch(run.batches, run.mesh)
    try:
        for k in range(first, cfg.steps):
            with clock.data_wait():
                batch = next(device_batches)
            program = run.programs.at(k, run.state)
            _profile(run, k)
            with jax.transfer_guard("disallow"):
                run.state, metrics = program(run.state, run.constants, batch)
            pending.append(metrics)
            done = k + 1
            # Step k runs on the device while the host looks at step k - 1.
            if len(pending) > 1 and not _healthy(run, pending[-2], k - 1):
                return _stop(run, pending[-2], k - 1)
            if k % cfg.report.every == 0:
                _log(run, k, pending[:-1])
                del pending[:-1]
            if done < cfg.steps:
                best = _evaluate(run, done)
                if best or done % cfg.checkpoint.every == 0:
                    _save(run)
            run.preemption.check()
        if pending and not _healthy(run, pending[-1], cfg.steps - 1):
            return _stop(run, pending[-1], cfg.steps - 1)
        if pending:
            _log(run, cfg.steps, pending)
            pending.clear()
    finally:
        device_batches.close()
        _end_profile(run)
    _finish(run)
    return DONE


def _trace(
    task: Task, cfg: RunConfig, shardings: TrainState, arguments: tuple[Any, ...], static: Hashable
) -> Any:
    """The train step of a static key, traced for arguments of these shapes."""
    return step.make_train_step(task, cfg, static, shardings).trace(*arguments)


def _shapes(arrays: Tree) -> Tree:
    """Shapes and placement; holds nothing of the arrays, which the steps donate."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type
        ),
        arrays,
    )


def abstract_batch(cfg: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a global batch, without reading any record."""
    shapes = {
        k: jax.ShapeDtypeStruct(shape, dtype)
        for k, (shape, dtype) in cfg.data.abstract_batch(cfg.batch).items()
    }
    placed = sharding.batch_shardings(shapes, mesh)
    return {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=placed[k]) for k, v in shapes.items()
    }


def _profile(run: Run, k: int) -> None:
    """Starts the trace before step `profile_at`, ends it `profile_steps` later."""
    at = run.cfg.report.profile_at
    if at and k == at:
        run.profiling = _profile_folder(run)
        jax.profiler.start_trace(run.profiling)
    if run.profiling and k == at + run.cfg.report.profile_steps:
        jax.block_until_ready(run.state)  # the steps in flight belong to it
        _end_profile(run)


def _end_profile(run: Run) -> None:
    if run.profiling:
        folder, run.profiling = run.profiling, ""
        jax.profiler.stop_trace()
        if store.is_store(run.workdir):
            store.upload(folder, run.workdir / "profile")
        say(f"profile: {run.workdir / 'profile'}")


def _profile_folder(run: Run) -> str:
    """Where the profiler writes: it knows no object stores."""
    if store.is_store(run.workdir):
        return tempfile.mkdtemp(prefix="dcae_jax_profile_")
    return os.fspath(run.workdir / "profile")


def _healthy(run: Run, metrics: Row, k: int) -> bool:
    """Whether training may go on after step k; waits until that step is done."""
    if not jax.device_get(metrics["nonfinite"]):
        run.bad_steps = 0
        return True
    run.bad_steps += 1
    logging.warning("step %d: not finite: %s; its update was left out", k, _bad_names(metrics))
    limit = run.cfg.nonfinite_limit if run.cfg.nonfinite is NonFinite.skip else 1
    return run.bad_steps < limit


def _bad_names(metrics: Row) -> str:
    values = jax.device_get(metrics)
    return ", ".join(k for k, v in values.items() if not np.isfinite(v))


def _stop(run: Run, metrics: Row, k: int) -> int:
    """A non-finite step: the state does not contain it; save that and say what to try."""
    _save(run, wait=True)
    say(
        f"stopped at step {k}: {_bad_names(metrics)} not finite ({run.bad_steps} in a row). The "
        f"saved state has no trace of it. Lower optim.lr, set optim.clip_norm, or "
        f"nonfinite=skip. To look at it: the batch of a step depends on (seed, step) alone."
    )
    return FAILED


# -------------------------------------------------------------------------------------- reporting


def _log(run: Run, done: int, pending: list[Row]) -> None:
    """One console line and one row of metrics: means over the interval that ends at step `done`."""
    if not pending:
        return
    rows = jax.device_get(pending)
    # In float64, so that rows that went through a checkpoint give the same mean.
    # A config changed on resume may have added or removed a metric in the middle of the interval.
    names = dict.fromkeys(k for row in rows for k in row)
    means = _rooted({k: float(np.mean([float(r[k]) for r in rows if k in r])) for k in names})
    interval = run.clock.interval(done)
    memory = jax.local_devices()[0].memory_stats() or {}
    speed = interval.images_per_s
    used, basis = _mfu(run, run.programs.logged(done, interval), interval)
    status = progress.Status(
        step=done, total=run.cfg.steps, loss=means["loss"], images_per_s=speed,
        devices=run.mesh.size, mfu=used, mfu_basis=basis, data_wait=interval.data_wait,
        memory_bytes=memory.get("peak_bytes_in_use"),
        memory_limit_bytes=memory.get("bytes_limit"),
        eta_s=run.clock.eta(done, run.cfg.steps, _pauses_to_come(run.cfg, done)),
        checkpoint_age_s=time.monotonic() - run.saved_at,
    )  # fmt: skip
    say(progress.ConsoleLine().format(status, means))
    for warning in run.task.warnings(means):
        say(f"warning: {warning}")
    row = {f"train/{k}": v for k, v in means.items()}
    row |= {"train/images_per_s": speed or math.nan, "train/data_wait": interval.data_wait or 0.0}
    stats = run.batches.stats()
    row |= {"data/bad": stats["bad"]}
    row |= {f"data/rows/{name}": count for name, count in stats["rows_per_source"].items()}
    _write(run, done, row)


def _rooted(means: dict[str, float]) -> dict[str, float]:
    """Mean squares, which add up over microbatches and steps, as roots: x_ms becomes x_rms."""
    roots = {f"{k.removesuffix('_ms')}_rms": v**0.5 for k, v in means.items() if k.endswith("_ms")}
    return {k: v for k, v in means.items() if not k.endswith("_ms")} | roots


def _mfu(
    run: Run, step_flops: float | None, interval: progress.Interval
) -> tuple[float | None, str]:
    """Utilisation and what it is a share of; None on a device whose peak is not known."""
    peak = flops.peak(run.mesh.devices.flat[0].device_kind)
    if peak is None or step_flops is None or not interval.steps or not interval.seconds:
        return None, ""
    share = flops.mfu(step_flops, interval.seconds / interval.steps, run.mesh.size, peak)
    return share.datasheet, "FLOPs of the jaxpr / bf16 datasheet peak"


def _pauses_to_come(cfg: RunConfig, done: int) -> dict[str, int]:
    """Evaluations and checkpoints ahead (evaluations at the same step count as one pause)."""

    def ahead(every: int) -> int:
        return cfg.steps // every - done // every if every else 0

    return {
        "eval": max((ahead(e.every) for e in cfg.evals), default=0),
        "checkpoint": ahead(cfg.checkpoint.every),
    }


def _write(run: Run, done: int, scalars: dict[str, float], images: Any = None) -> None:
    for writer in run.writers:
        writer.write_scalars(done, scalars)
        if images:
            writer.write_images(done, images)
        writer.flush()


def _evaluate(run: Run, done: int) -> bool:
    """Runs the evaluators that are due after `done` steps; whether that step is the best so far."""
    due = [e.name for e in run.cfg.evals if e.due(done, run.cfg.steps)]
    if not due:
        return False
    scores: dict[str, float] = {}
    jax.block_until_ready(run.state)
    with run.clock.pause("eval"):
        for name in due:
            report = _report(
                name, run.evaluators[name], run.state, run.constants, run.preemption.check, done
            )
            scalars = {f"{name}/{k}": v for k, v in report.scalars.items()}
            scores |= scalars
            _write(run, done, scalars, report.images)
    run.evaluated_at, run.scores = done, scores
    return run.checkpoints.scored(done, scores)


def _report(
    name: str, evaluator: Any, state: TrainState, constants: Tree, poll: Callable[[], None],
    done: int,
) -> Any:  # fmt: skip
    """What an evaluator says after `done` steps, told on the console."""
    with progress.working(f"evaluating {name}", enabled=distributed.is_main()):
        report = evaluator.run(state, constants, poll)
    shown = ", ".join(f"{k} {v:.4g}" for k, v in report.scalars.items())
    say(f"eval after step {done}: {name}: {shown}")
    return report


def _save(run: Run, wait: bool = False) -> None:
    """Starts a checkpoint; the clock's totals go into it."""
    with run.clock.pause("checkpoint"):
        rows = [{k: float(v) for k, v in row.items()} for row in jax.device_get(run.pending)]
        best = run.checkpoints.best
        meta = provenance.meta(run.cfg, run.data) | run.record | {
            "clock": run.clock.totals(), "programs": run.programs.totals(), "scores": run.scores,
            "evaluated_at": run.evaluated_at, "pending": rows, "bad_steps": run.bad_steps,
            "best": best.to_json() if best else None,
        }  # fmt: skip
        run.checkpoints.save(run.state, meta)
        if wait:
            run.checkpoints.wait()
    run.saved_at = time.monotonic()


def _finish(run: Run) -> None:
    """Last evaluation, last checkpoint, the summary and the report."""
    if run.evaluated_at < run.cfg.steps:
        _evaluate(run, run.cfg.steps)
    _save(run, wait=True)
    baselines = {}
    for name, evaluator in run.evaluators.items():
        run.preemption.check()
        with progress.working(f"closing {name}", enabled=distributed.is_main()):
            baselines[name] = evaluator.baselines()
    if distributed.is_main():
        totals, programs_run = run.clock.totals(), run.programs.summary()
        totals |= {"programs": programs_run} if programs_run else {}
        best = run.checkpoints.best
        totals |= {"best": best.to_json()} if best else {}
        provenance.write_summary(run.workdir, run.cfg, run.task, totals, baselines)
        html.build_report([run.workdir], run.workdir / "report.html")
        say("\n".join([phases.end_table([run.workdir]), *run.programs.table()]))
        if best:
            path = run.checkpoints.folder / str(best.step)
            say(f"best {best.metric}: {best.value:.4g} at step {best.step}: {path}")
        say(f"report: {run.workdir / 'report.html'}")


def _close(run: Run) -> None:
    """Closes all, in this order, also if one of them fails."""
    with contextlib.ExitStack() as stack:
        stack.callback(run.programs.close)
        stack.callback(run.checkpoints.close)
        for writer in run.writers:
            stack.callback(writer.close)
        stack.callback(run.batches.close)
