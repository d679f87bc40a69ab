"""Promise 8: a loss or gradient that is not finite never reaches a saved checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from dcae_jax import train
from dcae_jax.config import NonFinite
from dcae_jax.tasks import autoencode
from dcae_jax.tasks.autoencode import Phase

OPTIONS = {"evals": [], "checkpoint.every": 100}


def poison(monkeypatch, steps, where="image", value=np.nan):
    """From `prepare` on, one pixel (or weight) of these steps is not finite."""
    original = autoencode.AutoencodeTask.prepare

    def prepare(self, key, batch, step, static):
        inputs = original(self, key, batch, step, static)
        bad = jnp.isin(step, jnp.asarray(list(steps)))
        x = inputs.examples[where]
        first = (0,) * x.ndim
        changed = x.at[first].set(jnp.where(bad, value, x[first]))
        return inputs._replace(examples={**inputs.examples, where: changed})

    monkeypatch.setattr(autoencode.AutoencodeTask, "prepare", prepare)


def is_finite(state):
    return all(np.isfinite(x).all() for x in state.values() if x.dtype.kind == "f")


POISONS = [(phase, "image", np.nan) for phase in Phase]
POISONS += [(Phase.low_res_local, "image", np.inf), (Phase.low_res_local, "weight", -np.inf)]


@pytest.mark.parametrize("phase, where, value", POISONS)
def test_promise_8_a_bad_step_changes_nothing_but_the_counter(phase, where, value, monkeypatch):
    poison(monkeypatch, [1], where, value)
    trainer = tiny.Trainer(tiny.run(phase, batch=4))
    assert trainer.train(1)["nonfinite"] == 0
    before = jax.device_get(trainer.state)
    assert trainer.train(1, first=1)["nonfinite"] == 1
    after = jax.device_get(trainer.state)
    assert after.step == before.step + 1
    pairs = zip(
        jax.tree.leaves(before), jax.tree.leaves(after.replace(step=before.step)), strict=True
    )
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)
    assert trainer.train(1, first=2)["nonfinite"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(trainer.state)))


def test_promise_8_a_gradient_alone_is_enough():
    """The loss is finite, the gradient is not: sqrt at zero."""
    cfg = tiny.run(batch=4)
    trainer = tiny.Trainer(cfg)
    original = trainer.task._autoencoder_loss

    def loss(variables, inputs, carry):
        out = original(variables, inputs, carry)
        kernel = variables.params["ae"]["encoder"]["conv_out"]["bias"]
        zero = jnp.sqrt(jnp.sum((kernel - jax.lax.stop_gradient(kernel)) ** 2))
        return out._replace(terms={"rec": out.terms["rec"] + zero})

    from dcae_jax import step

    trainer.task.objectives = (
        trainer.task.objectives[0].__class__(
            "ae", loss, trainer.task.objectives[0].trainable, trainer.task.objectives[0].optim
        ),
    )
    trainer._step = step.make_train_step(trainer.task, cfg, (), trainer.shardings)
    before = jax.device_get(trainer.state.params)
    metrics = trainer.train(1)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["ae/grad_norm"])
    assert metrics["nonfinite"] == 1
    after = jax.device_get(trainer.state.params)
    assert all(
        a.tobytes() == b.tobytes()
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_promise_8_stop_saves_the_last_good_state(monkeypatch, tmp_path, capsys):
    clean = tmp_path / "clean"
    assert runs.run("phase1", clean, steps=3, **OPTIONS) == train.DONE
    poison(monkeypatch, [3])
    assert runs.run("phase1", tmp_path / "bad", steps=8, **OPTIONS) == train.FAILED
    said = capsys.readouterr().out
    assert "stopped at step 3" in said and "loss" in said and "optim.lr" in said
    state, meta = runs.state("phase1", tmp_path / "bad", **OPTIONS)
    # Step 4 was under way when step 3 was looked at: the state is that of steps 0, 1, 2 and 4.
    assert meta["step"] == 5 and is_finite(state)
    good, _ = runs.state("phase1", clean, **OPTIONS)
    lr = 1e-3
    for path, value in good.items():
        if path.startswith("params"):
            np.testing.assert_allclose(state[path], value, atol=3 * lr, err_msg=path)
    # The same command goes on without the bad step.
    assert runs.run("phase1", tmp_path / "bad", steps=8, **OPTIONS) == train.DONE


def test_promise_8_skip_goes_on_and_stops_after_n_in_a_row(monkeypatch, tmp_path, capsys):
    options = OPTIONS | {"nonfinite": NonFinite.skip, "nonfinite_limit": 3, "report.every": 1}
    poison(monkeypatch, [1, 2, 4, 6, 7, 8])
    # The count goes through a checkpoint: preempted after step 7, the third bad one stops the run.
    assert runs.run("phase1", tmp_path, steps=12, poll=2 + 8, **options) == 42
    assert "stopped" not in capsys.readouterr().out
    assert runs.run("phase1", tmp_path, steps=12, **options) == train.FAILED
    assert "stopped at step 8" in capsys.readouterr().out
    state, meta = runs.state("phase1", tmp_path, **options)
    assert is_finite(state) and meta["bad_steps"] == 3
    rows = runs.rows(tmp_path)
    assert [k for k in sorted(rows) if rows[k]["train/nonfinite"]] == [2, 3, 5, 7, 8]
