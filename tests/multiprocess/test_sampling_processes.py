"""Evaluators that draw samples or fill in masked tokens: the same on two processes as on one."""

import os
import pathlib
import socket
import subprocess
import sys

import diffusing
import pytest
import runs

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

SAMPLES = pathlib.Path(__file__).with_name("class_scores_process.py")
FILLS = pathlib.Path(__file__).with_name("filled_process.py")
FEATURES = pathlib.Path(__file__).with_name("inception_process.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    sys.path.insert(0, str(SAMPLES.parents[1] / "evals"))
    import latent_caches
    import test_evals_class_scores as scores

    root = tmp_path_factory.mktemp("cache")
    for split, values in (("train", scores.TRAINING), ("test", scores.HELD_OUT)):
        latent_caches.write(root, split, *values, classes=scores.CLASSES)
    return root


def found(script, given, count, devices):
    """The lines of the script in each of `count` processes with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count} if count > 1 else {}
    env = runs.environment(devices=devices, **many)
    env["PYTHONPATH"] = os.pathsep.join([str(runs.ROOT), env["PYTHONPATH"]])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, given)], cwd=runs.ROOT, text=True,
            env=env | ({"JAX_PROCESS_ID": str(i)} if many else {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(count)
    ]  # fmt: skip
    ended = [runs.finish(p) for p in processes]
    assert [code for code, _ in ended] == [0] * count, ended[0][1][-3000:]
    return [[line for line in text.splitlines() if line.startswith("FOUND")] for _, text in ended]


def test_scores_and_pictures_are_equal_on_two_processes(cache):
    """The same two devices, in one process or in two: bit for bit."""
    (one,) = found(SAMPLES, [cache], 1, 2)
    assert len(one) == 2 and '"accuracy"' in one[0] and '"latent_rms"' in one[1]
    assert found(SAMPLES, [cache], 2, 1) == [one, one]


def test_filled_pixels_are_equal_on_two_processes():
    """Of latents and of pixels; the grid needs rows of both processes."""
    given = [diffusing.cache(), diffusing.images()]
    (one,) = found(FILLS, given, 1, 2)
    assert len(one) == 2 and '"psnr_latent_masked"' in one[0]
    assert found(FILLS, given, 2, 1) == [one, one]


def test_scores_of_features_are_equal_on_two_processes():
    """Of samples and of reconstructions: each image counts once, in one process or in two."""
    given = [diffusing.cache(), diffusing.images()]
    (one,) = found(FEATURES, given, 1, 2)
    assert len(one) == 2 and '"fid10"' in one[0] and '"rfid5"' in one[1]
    assert found(FEATURES, given, 2, 1) == [one, one]
