"""Where a process finds out that it is one of several: the environment, Slurm."""

import os

import pytest

from dcae_jax import distributed
from dcae_jax.errors import UserError
from dcae_jax.rendezvous import Place

SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[003-006,009]", "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "4",
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JAX_NUM", "JAX_PROCESS", "JAX_COORD", "CUDA_VIS", "TPU_")):
            monkeypatch.delenv(name)


def given(monkeypatch, **env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def test_three_variables_name_the_place(monkeypatch):
    assert distributed._from_environment() is None and not distributed._in_cluster()
    given(monkeypatch, JAX_COORDINATOR_ADDRESS="[::1]:12", JAX_NUM_PROCESSES="3")
    with pytest.raises(UserError, match="but not JAX_PROCESS_ID; set all three or none"):
        distributed._from_environment()
    given(monkeypatch, JAX_PROCESS_ID="3")
    with pytest.raises(UserError, match=r"JAX_PROCESS_ID = 3 is not in 0..2"):
        distributed._from_environment()
    given(monkeypatch, JAX_PROCESS_ID="2")
    place = distributed._from_environment()
    assert place == Place("[::1]:12", 3, 2) and place.endpoint() == ("::1", 12)
    with pytest.raises(UserError, match="'node1' is not HOST:PORT"):
        Place("node1", 2, 0).endpoint()


def test_slurm_names_the_first_node_and_gives_a_task_its_device(monkeypatch):
    given(monkeypatch, **SLURM)
    assert distributed._in_cluster()
    place, devices = distributed._from_cluster()
    # The port is drawn from the last 4096 by the number of the job: 4097 is the second of them.
    assert (place, devices) == (Place("node003:61441", 8, 5), [1])


@pytest.mark.parametrize("env", [{"SLURM_NTASKS": "4"}, {"CUDA_VISIBLE_DEVICES": "0"}])
def test_a_task_alone_on_its_node_or_with_one_gpu_takes_all_it_sees(env, monkeypatch):
    given(monkeypatch, **{**SLURM, "SLURM_PROCID": "2", **env})
    place, devices = distributed._from_cluster()
    assert place.index == 2 and devices is None


def test_a_single_task_is_no_cluster(monkeypatch):
    given(monkeypatch, **{**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert not distributed._in_cluster()
