"""Promises on whole runs of masked autoencoders: resume, one program for each number of tokens."""

import diffusing
import masks
import numpy as np
import pytest
import runs

from dcae_jax import train
from dcae_jax.distributed import EXIT_PREEMPTED


def test_the_schedule_changes_the_program_where_the_tests_say():
    cfg = masks.make()
    task = cfg.task.build(cfg)
    assert [task.static(k).keep for k in range(8)] == [12] * masks.SWITCH + [6] * 5


def test_promise_2_a_run_that_is_stopped_between_two_programs_ends_in_the_same_bits(tmp_path):
    # Polls: 1 at the start, 3 batches of the first evaluation, 1 after compiling, 1 a step.
    assert diffusing.run(masks.make(), tmp_path, poll=1 + 3 + 1 + masks.SWITCH) == EXIT_PREEMPTED
    assert runs.steps(tmp_path)[-1] == masks.SWITCH
    assert diffusing.run(masks.make(), tmp_path) == train.DONE
    whole, _ = masks.whole()
    runs.assert_same_run(masks.make(), whole, tmp_path)


@pytest.mark.slow
def test_promise_2_a_mask_run_that_is_stopped_everywhere_ends_in_the_same_bits(tmp_path):
    """After each of its steps."""
    stops = 0
    while diffusing.run(masks.make(), tmp_path, poll=6) == EXIT_PREEMPTED:
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
    assert "masked-test" in page and "predicts masked tokens, mask cosine up to 75 %" in page


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
