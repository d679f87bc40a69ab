"""Starts tiny runs (tests/configs/tiny_run.py), in this process or in real ones, and reads them."""

import atexit
import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
from etils import epath
from PIL import Image

from dcae_jax import checkpoint, config, distributed, flags, rng, sharding, step, train
from dcae_jax.report import writers

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "tests/configs/tiny_run.py"
# What differs from run to run though the numbers are the same.
CLOCKS = ("time", "train/images_per_s", "train/data_wait")


def make_images() -> str:
    """A folder of generated images, made once per machine; TINY_IMAGES names it from then on."""
    folder = pathlib.Path(tempfile.gettempdir()) / "dcae_jax_tiny_images"
    for split, count in (("train", 24), ("test", 8)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            path = folder / split / f"{i:02d}.png"
            if not path.exists():
                gen = np.random.default_rng([i, len(split)])
                coarse = gen.uniform(0, 255, (6, 6, 3)).astype(np.uint8)
                part = path.with_suffix(f".{os.getpid()}")
                Image.fromarray(coarse).resize((48, 48), Image.BICUBIC).save(part, format="png")
                part.rename(path)  # another test process may be doing the same
    os.environ["TINY_IMAGES"] = str(folder)
    return str(folder)


make_images()


# ------------------------------------------------------------------------------- in this process


class StopAt(distributed.Preemption):
    """Asks to stop at the n-th poll, as SIGTERM would."""

    def __init__(self, poll=None):
        super().__init__()
        self.poll = poll

    def requested(self):
        self._polls += 1
        return self.poll is not None and self._polls >= self.poll


def change(cfg, changes):
    """Sets fields of a config by their paths."""
    for path, value in changes.items():
        node, (*parents, last) = cfg, path.split(".")
        for name in parents:
            node = getattr(node, name)
        setattr(node, last, value)


def make_config(arg, **changes):
    """A resolved config; changes like steps=5 or **{"checkpoint.every": 1}.

    `arg` is the argument of the tiny run, or a config itself.
    """
    cfg = flags.load(f"{ROOT / CONFIG}:{arg}") if isinstance(arg, str) else arg
    change(cfg, changes)
    return config.resolve(cfg)


@contextlib.contextmanager
def devices(count):
    """Meshes of the runs inside take only so many of the fake devices."""
    original = sharding.make_mesh
    sharding.make_mesh = lambda cfg: original(cfg, jax.devices()[:count])
    try:
        yield
    finally:
        sharding.make_mesh = original


def run(arg, workdir, *, poll=None, count=1, force=False, **changes):
    """Trains in this process on `count` devices, preempted at a poll; returns the exit code."""
    cfg = make_config(arg, **changes)
    config.validate(cfg, count)
    with devices(count):
        return train.train(cfg, str(workdir), StopAt(poll), force=force)


# ------------------------------------------------------------------------------- in real processes


def environment(**more):
    env = dict(os.environ, PYTHONPATH=f"{ROOT / 'tests'}", JAX_PLATFORMS="cpu")
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    return env | {k: str(v) for k, v in more.items()}


def command(arg, workdir, *options, program=("main.py",)):
    found = [sys.executable, *program, f"--config={CONFIG}:{arg}"]
    return [*found, *([f"--workdir={workdir}"] if workdir else []), *options]


def start(arg, workdir, *options, program=("main.py",), **env):
    """A real process of main.py; its output goes to one pipe."""
    process = subprocess.Popen(
        command(arg, workdir, *options, program=program),
        cwd=ROOT, env=environment(**env), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    atexit.register(process.kill)  # a failed test must not leave it running
    return process


def finish(process, timeout=500):
    """(exit code, output) of a process from `start`."""
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{text[-3000:]}") from None
    return process.returncode, text


def main(arg, workdir, *options, **env):
    """Runs main.py to its end; (exit code, output)."""
    return finish(start(arg, workdir, *options, **env))


# ----------------------------------------------------------------------------------- reading a run


def steps(workdir):
    folder = epath.Path(workdir) / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return sorted(int(n) for n in names if n.isdigit())


def target(cfg, count=1):
    """Abstract state of a config on so many devices."""
    task = cfg.task.build(cfg)
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:count])
    abstract = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(cfg.seed, 0, "init")))
    placed = sharding.state_shardings(abstract, mesh, cfg.mesh)

    def make(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    return jax.tree.map(make, abstract, placed)


def state(arg, workdir, **changes):
    """{path: array} of the newest checkpoint, all items, and its meta; digests are checked."""
    cfg = make_config(arg, **changes)
    before = set(steps(workdir))
    manager = checkpoint.Checkpoints(epath.Path(workdir), cfg.checkpoint)
    found, meta = manager.restore_newest(target(cfg))
    manager.close()
    assert set(steps(workdir)) == before, "reading moved a damaged checkpoint"
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(found))

    def name(p):
        return jax.tree_util.keystr(p, simple=True, separator="/")

    return {name(p): np.asarray(x) for p, x in flat}, meta


def rows(workdir):
    """{step: row} of metrics without what a clock measured."""
    found = writers.read_metrics(workdir)
    return {r["step"]: {k: v for k, v in r.items() if k not in CLOCKS} for r in found}


def assert_same_run(arg, one, other, **changes):
    """The two workdirs hold the same final state, bit by bit, and the same metrics."""
    a, meta_a = state(arg, one, **changes)
    b, meta_b = state(arg, other, **changes)
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].tobytes() != b[k].tobytes()]
    assert not different, f"{len(different)} of {len(a)} leaves differ: {different[:5]}"
    assert meta_a["leaves"] == meta_b["leaves"] and meta_a["scores"] == meta_b["scores"]
    rows_a, rows_b = rows(one), rows(other)
    assert rows_a.keys() == rows_b.keys()
    for k in rows_a:
        # Rows drawn are counted per start of the process.
        def skip(r):
            return {n: v for n, v in r.items() if not n.startswith("data/")}

        assert skip(rows_a[k]) == skip(rows_b[k]), k


def digest(folder):
    """{relative path: sha256} of all files below a folder."""
    folder = pathlib.Path(folder)
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*")) if p.is_file()
    }  # fmt: skip


def summary(workdir):
    return json.loads((pathlib.Path(workdir) / "summary.json").read_text())
