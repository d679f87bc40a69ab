"""`doctor`: a real run, and each kind of failure with its mend."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import processes
import pytest
import runs
from etils import epath

from dcae_jax import config, flags, inspect, store
from dcae_jax.cli import _doctor_devices, _doctor_disk, _doctor_host, doctor
from dcae_jax.cli._doctor_base import Status, attempt
from dcae_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def test_a_real_run_is_fit_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dcae_jax", "doctor", "--workdir", str(tmp_path / "new/run"),
         "--config", "configs/demo.py:phase1", "--expect-devices", "8"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    names = {line[9:27].strip() for line in lines[:-1]}
    assert names >= {
        "python", "packages", "plug-ins", "cores", "memory", "open files", "processes", "devices",
        "convolution", "linear attention", "all-reduce", "compile cache", "workdir", "rename",
        "space",
    }  # fmt: skip
    text = done.stdout
    assert "numbers right" in text and "sums right" in text and "TFLOP/s" in text
    assert f"jax {__import__('jax').__version__}" in text and lines[-1].startswith("fit")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small(monkeypatch):
    """Probes of a moment."""
    found = [
        _doctor_devices.convolution_probe(np.float32, 1, 8, 8),
        _doctor_devices.attention_probe(np.float32, 2, 8, 2),
    ]
    monkeypatch.setattr(_doctor_devices, "_SECONDS", 0.0)
    return found


def test_probes_agree_with_numpy_on_every_device(small):
    for probe in small:
        (found,) = _doctor_devices.compute(probe)
        assert found.status is Status.ok, found


@pytest.mark.parametrize("which", [0, 1])
def test_a_kernel_that_computes_wrong_numbers_is_seen(small, which):
    probe = small[which]
    wrong = probe._replace(run=lambda *x: probe.run(*x) * 1.01)
    found = _doctor_devices.compute(wrong)
    assert len(found) == 8 and all(f.status is Status.failed and f.mend for f in found)
    nan = probe._replace(run=lambda *x: probe.run(*x) * np.nan)
    assert _doctor_devices.compute(nan)[0].status is Status.failed


def test_an_all_reduce_that_forgets_a_device_is_seen(monkeypatch):
    monkeypatch.setattr(_doctor_devices, "_SECONDS", 0.0)
    good = _doctor_devices.reduce_all
    monkeypatch.setattr(_doctor_devices, "reduce_all", lambda mesh: lambda x: good(mesh)(x) - 1)
    (found,) = _doctor_devices.collective()
    assert found.status is Status.failed and "wrong sums" in found.value


def test_another_number_of_devices_names_the_processes():
    found = _doctor_devices.devices(16)
    assert found[0].status is Status.failed and "process 0: 8" in found[0].value
    assert _doctor_devices.devices(8)[0].status is Status.ok


def test_a_missing_and_an_old_package_are_named_with_their_pin(monkeypatch):
    real = _doctor_host._version
    monkeypatch.setattr(
        _doctor_host, "_version",
        lambda name: {"optax": None, "flax": "0.1"}.get(name, real(name))
        if name in ("optax", "flax") else real(name),
    )  # fmt: skip
    wrong = [f for f in _doctor_host.packages() if f.status is Status.failed]
    assert ["optax is not installed" in wrong[1].value, "0.1 is older" in wrong[0].value] == [1, 1]
    assert "pip install 'optax==" in wrong[1].mend


def test_without_jax_there_is_a_report_and_no_traceback(tmp_path):
    """A real process in which `import jax` fails."""
    (tmp_path / "jax.py").write_text("raise ImportError('no jaxlib here')")
    env = dict(os.environ, PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = subprocess.run(
        [sys.executable, "-m", "dcae_jax", "doctor"], cwd=tmp_path, env=env, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "FAILED   devices            ImportError: no jaxlib here" in done.stdout


def test_a_plug_in_of_another_jax_fails(monkeypatch):
    class Installed:
        def __init__(self, name, version):
            self.metadata, self.version = {"Name": name}, version

    every = [Installed("jax-cuda13-plugin", "0.9.0"), Installed("jaxlib", "0.10.2")]
    monkeypatch.setattr(_doctor_host.importlib.metadata, "distributions", lambda: every)
    (found,) = _doctor_host.plugins()
    assert found.status is Status.failed and "jax-cuda13-plugin 0.9.0" in found.value


def test_a_folder_that_cannot_be_written_fails():
    """/proc takes no folders from anybody, root included."""
    (found,) = _doctor_disk.workdir(epath.Path("/proc/run"))
    assert found.status is Status.failed and "may write to" in found.mend
    assert _doctor_disk.cache("/proc/cache").status is Status.warning


def test_a_full_disk_fails_and_nothing_stays(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        (found,) = _doctor_disk.workdir(epath.Path(tmp_path) / "run")
        assert found.status is Status.failed and "make room" in found.mend
        assert not list(tmp_path.iterdir())
        space = _doctor_disk.space(epath.Path(tmp_path), 2**21, 3, 0)
        assert space.status is Status.failed and "3 checkpoints" in space.value
        assert _doctor_disk.space(epath.Path(tmp_path), 2**21, 3, 2).status is Status.ok
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_changes_bytes_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(_doctor_disk, "_write", lambda path, data: path.write_bytes(data[:-1]))
    found = _doctor_disk.workdir(epath.Path(tmp_path))
    assert found[0].status is Status.failed and "other bytes" in found[0].value


def test_what_a_check_raises_is_a_finding():
    def check():
        raise RuntimeError("the driver is broken\nand more")

    (found,) = attempt("devices", check, "reboot")
    assert found.status is Status.failed and found.value == "RuntimeError: the driver is broken"


def test_wrong_usage_is_exit_code_2():
    with pytest.raises(SystemExit) as exited:
        doctor.main(["--expect-devices", "none"])
    assert exited.value.code == 2


def test_checkpoints_at_once_and_their_size():
    """The demo's phase 1: its table of parameters times f32 (params, one EMA, two moments)."""
    cfg = config.resolve(flags.load("configs/demo.py:phase1"))
    cfg.checkpoint = config.CheckpointConfig(every=100, keep=3)
    assert cfg.checkpoint.at_most(1000) == 4 and cfg.checkpoint.at_most(50) == 2
    cfg.checkpoint.keep_every = 500
    assert cfg.checkpoint.at_most(1000) == 6
    import math

    import jax

    from dcae_jax import rng, step

    state = jax.eval_shape(lambda: step.init_state(cfg.task.build(cfg), cfg, rng.key(cfg.seed)))
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    assert inspect.state_bytes(cfg) == pytest.approx(4 * params * 4, rel=0.01)  # and counters


def test_object_stores_that_cannot_hold_checkpoints_are_refused():
    with pytest.raises(UserError, match=r"s3://b/run: checkpoints can be on a disk or on gs://"):
        store.require_checkpoints("s3://b/run")
    store.require_checkpoints("gs://b/run"), store.require_checkpoints("runs/x")


def test_a_missing_client_is_one_sentence():
    with pytest.raises(UserError, match="pip install gcsfs"), store.told():
        raise ImportError("Please install gcsfs to access Google Storage")
    with pytest.raises(ImportError, match="torch"), store.told():
        raise ImportError("no module named torch")


def test_clients_keep_no_listings():
    """As fsspec itself reads what it is told."""
    import fsspec

    for name in ("gcs", "s3"):
        told = fsspec.config.apply_config(type("X", (), {"protocol": name}), {})
        assert told["use_listings_cache"] is False


@pytest.mark.multiprocess
def test_two_processes_check_the_network_and_one_workdir(tmp_path):
    """Their timings differ, the number of their all-reduces must not; the folder is shared."""
    found = {"JAX_COORDINATOR_ADDRESS": processes.address(), "JAX_NUM_PROCESSES": 2}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "dcae_jax", "doctor", "--workdir", str(tmp_path / "new")],
            cwd=ROOT, env=runs.environment(**found, JAX_PROCESS_ID=i), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    codes, texts = processes.finish(started)
    assert codes == [0, 0], texts
    assert re.search(r"ok +all-reduce .* over 2 devices .* sums right", texts[0])
    assert not (tmp_path / "new").exists()
