"""Promises on whole runs of masked autoencoders: resume, one program for each number of tokens."""

import diffusing
import jax
import masks
import numpy as np
import pytest
import runs
from etils import epath

from dcae_jax import checkpoint, config, rng, step, train, tree
from dcae_jax.distributed import EXIT_PREEMPTED
from dcae_jax.errors import UserError
from dcae_jax.tasks.probe import Mode


def test_the_schedule_changes_the_program_where_the_tests_say():
    cfg = masks.make()
    task = cfg.task.build(cfg)
    assert [task.static(k).keep for k in range(8)] == [12] * masks.SWITCH + [6] * 5


def test_promise_2_a_run_that_is_stopped_between_two_programs_ends_in_the_same_bits(tmp_path):
    # Polls: 1 at the start, 3 batches of the first evaluation, 1 between the traces of the two
    # programs, 1 after them, 1 a step.
    polls = 1 + 3 + 1 + 1 + masks.SWITCH
    assert diffusing.run(masks.make(), tmp_path, poll=polls) == EXIT_PREEMPTED
    assert runs.steps(tmp_path)[-1] == masks.SWITCH
    assert diffusing.run(masks.make(), tmp_path) == train.DONE
    whole, _ = masks.whole()
    runs.assert_same_run(masks.make(), whole, tmp_path)


@pytest.mark.slow
def test_promise_2_a_mask_run_that_is_stopped_everywhere_ends_in_the_same_bits(tmp_path):
    """After each of its steps."""
    stops = 0
    while diffusing.run(masks.make(), tmp_path, poll=7) == EXIT_PREEMPTED:
        stops += 1
        assert stops < 20
    assert stops > 3
    runs.assert_same_run(masks.make(), masks.whole()[0], tmp_path)


def test_each_function_of_a_mask_run_is_traced_once_for_each_program():
    """Two numbers of visible tokens; three evaluations, the last batch of each padded."""
    _, names = masks.whole()
    for wanted, times in (("train_step", 2), ("_sums", 1)):
        assert len([name for name in names if name.endswith(wanted)]) == times, (wanted, names)


def test_a_mask_run_learns_and_reports_what_it_did():
    workdir, _ = masks.whole()
    rows = runs.rows(workdir)
    assert [round(16 * (1 - rows[k]["train/mask_ratio"])) for k in range(1, 9)] == [12] * 3 + [
        6
    ] * 5
    assert rows[8]["masked-test/mse_r0.75"] < rows[0]["masked-test/mse_r0.75"]
    assert rows[0]["masked-test/n"] == rows[8]["masked-test/n"] == 10
    # Normalised by channel: the images that it was measured on have a root mean square of 1.
    assert np.mean([rows[k]["train/latent_rms"] for k in range(1, 9)]) == pytest.approx(1, abs=0.1)
    page = (workdir / "report.html").read_text()
    assert "masked-test" in page and "predicts masked tokens, mask cosine" in page


def test_promise_4_a_probe_leaves_the_encoder_that_it_took_as_it_is(tmp_path, capsys):
    """From the averages of a run; nothing of it moves but the head, whatever decays."""
    source, _ = masks.whole()
    cfg = masks.probe(init_from=str(source))
    assert diffusing.run(cfg, tmp_path) == train.DONE
    said = capsys.readouterr().out
    assert (
        "init_from ema 0.9 of step 8" in said and ": net\n  left out there: net/decoder\n" in said
    )
    assert "reset: step, optimizer, EMA, head (new)" in said

    first, last = (
        checkpoint.read_meta(epath.Path(tmp_path) / "checkpoints", k)["leaves"] for k in (0, 4)
    )
    known = checkpoint.read_meta(epath.Path(source) / "checkpoints", 8)["leaves"]["ema"]
    encoder = [path for path in last["params"] if path.startswith("net/")]
    assert encoder and all(path.startswith("net/encoder/") for path in encoder)
    for path in encoder:  # shape, dtype and digest
        assert last["params"][path] == first["params"][path] == known[f"0.9/params/{path}"]
        assert last["ema"][f"0.9/params/{path}"] == known[f"0.9/params/{path}"]
    for item, path in [("params", "head/kernel"), ("stats", "head/mean"), ("stats", "head/var")]:
        assert last[item][path] != first[item][path]
    assert not any("net/" in path for path in last["opt"])
    assert any("head/kernel" in path for path in last["opt"])

    scores = runs.rows(tmp_path)[4]
    assert scores["accuracy-test/n"] == 10 and 0 <= scores["accuracy-test/top1"] <= 1
    assert "accuracy-test/top5" not in scores and runs.summary(tmp_path)["phase"] == "probe"
    page = (tmp_path / "report.html").read_text()
    assert "linear probe on 2 classes" in page and "accuracy-test" in page


def test_fine_tuning_leaves_out_the_encoders_last_norm_and_refuses_what_does_not_fit():
    source, _ = masks.whole()

    def load(unused=None, **changes):
        cfg = masks.probe(**{"task.mode": Mode.finetune, "task.trainable": ".*"}, **changes)
        task = cfg.task.build(cfg)
        state = jax.eval_shape(lambda: step.init_state(task, cfg, rng.key(0)))
        mesh = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh), state.params
        )
        targets = {"params": params, "stats": state.stats}
        unused = task.unused_params if unused is None else unused
        return checkpoint.load_weights(str(source), targets, prefer_ema=True, unused=unused)

    found = load()
    every = found.meta["leaves"]["params"]
    assert tree.shortest(found.left_out, every) == ["net/decoder", "net/encoder/norm"]
    assert found.params.keys() == {"net"} and found.params["net"].keys() == {"encoder"}
    with pytest.raises(UserError, match=r"net/encoder/norm/bias: in the checkpoint but not needed"):
        load(unused="net/decoder/.*")
    with pytest.raises(UserError, match=r"patch_embed/kernel: shape"):
        load(**{"task.model": masks.model(width=32)})


def test_a_probe_of_latents_with_other_classes_is_refused_before_it_starts(tmp_path):
    cfg = masks.probe(init_from=str(masks.whole()[0]), **{"task.classes": 3})
    config.validate(cfg)
    with pytest.raises(UserError, match=r"of 2 classes, but task\.classes = 3; set it to 2"):
        diffusing.run(cfg, tmp_path)


@pytest.mark.slow
def test_masked_autoencoders_train_on_pixels_whitened_tokens_and_online(tmp_path):
    """Every way to have inputs and targets, start to end, and its scores."""
    online = masks.make(evals=[], steps=3)
    online.data = diffusing.online()
    whitened = masks.make(steps=3, **{"task.norm_target": True})
    for name, cfg in (("pixels", masks.pixels(steps=3)), ("online", online), ("white", whitened)):
        assert diffusing.run(masks.changed(cfg), tmp_path / name) == train.DONE
        rows = runs.rows(tmp_path / name)
        assert all(np.isfinite(v) for row in rows.values() for v in row.values())
        assert online is cfg or 0 < rows[3]["masked-test/mse_r0.75"] < 10
