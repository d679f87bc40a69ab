"""Promises on whole runs of diffusion: resume, one trace of each function, no host in the step."""

import diffusing
import jax
import numpy as np
import pytest
import runs

from dcae_jax import rng, sharding, step, train
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import Shard
from dcae_jax.distributed import EXIT_PREEMPTED


def test_promise_2_an_interrupted_diffusion_run_ends_in_the_same_bits(tmp_path):
    # Polls: 1 at the start, 3 batches of the first evaluation, 1 after compiling, 1 a step.
    assert diffusing.run(diffusing.make(), tmp_path, poll=1 + 3 + 1 + 3) == EXIT_PREEMPTED
    assert runs.steps(tmp_path)[-1] == 3
    assert diffusing.run(diffusing.make(), tmp_path) == train.DONE
    whole, _ = diffusing.whole()
    runs.assert_same_run(diffusing.make(), whole, tmp_path)
    metas = [runs.state(diffusing.make(), w)[1] for w in (whole, tmp_path)]
    assert metas[0]["latents"] == metas[1]["latents"]


@pytest.mark.slow
def test_promise_2_a_diffusion_run_goes_on_on_another_mesh(tmp_path, monkeypatch):
    """Saved on 1 x 8, restored on 2 x 4: the same bits, then equal to rounding."""
    monkeypatch.setattr(sharding, "SMALL", 64)  # or the tiny leaves would be replicated

    def go(data, fsdp, poll=None):
        made = diffusing.make(evals=[], steps=6)
        made.mesh.data, made.mesh.fsdp = data, fsdp
        return diffusing.run(made, tmp_path / "moved", poll, count=data * fsdp)

    assert go(1, 8, poll=2 + 4) == EXIT_PREEMPTED
    state = diffusing.make(evals=[], steps=6)
    _, meta = runs.state(state, tmp_path / "moved")
    assert go(2, 4, poll=1) == EXIT_PREEMPTED
    assert runs.state(state, tmp_path / "moved")[1]["leaves"] == meta["leaves"]
    assert go(2, 4) == train.DONE
    assert diffusing.run(diffusing.make(evals=[], steps=6), tmp_path / "one") == train.DONE
    found, expected = (runs.state(state, tmp_path / name)[0] for name in ("moved", "one"))
    for path in expected:
        # Adam turns a rounding error of a vanishing gradient into steps of lr = 1e-2.
        if path.startswith(("params", "ema")):
            np.testing.assert_allclose(found[path], expected[path], atol=1e-4, err_msg=path)


def test_promise_3_latents_are_equal_on_any_number_of_readers():
    def take(count, threads=1):
        data = LatentDataConfig(path=str(diffusing.cache()), threads=threads)
        made = [
            data.batches(batch=8, seed=3, start_step=5, shard=Shard(i, count)) for i in range(count)
        ]
        found = []
        for _ in range(3):
            parts = [next(batches) for batches in made]
            found.append({k: np.concatenate([p[k] for p in parts]) for k in ("latent", "label")})
        for batches in made:
            batches.close()
        return found

    expected = take(1)
    for count, threads in ((1, 4), (2, 1), (4, 2), (8, 1)):
        for a, b in zip(take(count, threads), expected, strict=True):
            assert a["latent"].tobytes() == b["latent"].tobytes(), count
            assert (a["label"] == b["label"]).all() and a["latent"].shape == (8, 4, 4, 4)


def test_each_function_of_a_diffusion_run_is_traced_once():
    """Three evaluations, the last batch of each padded; 8 steps; the grid at the end."""
    workdir, names = diffusing.whole()
    assert "programs" not in runs.summary(workdir), "there is only one"
    for wanted in ("train_step", "_sums", "_drawn"):
        assert len([name for name in names if name.endswith(wanted)]) == 1, (wanted, names)


def primitives(jaxpr):
    """The names of all primitives, those inside loops and calls too."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def test_the_step_of_diffusion_never_asks_the_host():
    """No callback in its jaxpr, and nothing is read from the device to start the next one."""
    cfg = diffusing.make()
    task, mesh = cfg.task.build(cfg), sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    state = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(0)))
    traced = jax.make_jaxpr(lambda s, c, b: step.train_step(task, cfg, (), s, c, b))(
        state, task.abstract_constants(), train.abstract_batch(cfg, mesh)
    )
    found = set(primitives(traced.jaxpr))
    assert not traced.effects and "dot_general" in found and "scan" in found
    assert not [name for name in found if "callback" in name or "infeed" in name], found
