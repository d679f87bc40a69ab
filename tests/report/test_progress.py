"""The console line, the pause-aware clock with an artificial time, the live line."""

import io
import subprocess
import sys
import time

import pytest

from dcae_jax.report import progress
from dcae_jax.report.progress import Clock, ConsoleLine, Status


class Time:
    """A clock that is moved by hand."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_full_line():
    status = Status(
        step=1200,
        total=5000,
        loss=0.12344,
        images_per_s=45.3,
        devices=8,
        mfu=0.41,
        mfu_basis="jaxpr / datasheet",
        data_wait=0.004,
        memory_bytes=12.3e9,
        memory_limit_bytes=80e9,
        eta_s=3720,
        checkpoint_age_s=180,
    )
    line = ConsoleLine(extra=("train/l1", "train/missing")).format(status, {"train/l1": 0.05})
    assert line == (
        "step 1200/5000 24% | loss 0.1234 | l1 0.05 | missing n/a | 45.3 img/s (5.66/dev) | "
        "MFU 41% (jaxpr / datasheet) | data-wait 0.4% | mem 12.3/80 GB | ETA 1h02m | "
        "ckpt 3m00s ago"
    )


def test_unknown_parts_are_not_available():
    line = ConsoleLine().format(Status(step=0, total=10), {})
    assert line == (
        "step 0/10 0% | loss n/a | n/a img/s | MFU n/a | data-wait n/a | mem n/a | ETA n/a | "
        "ckpt n/a"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.7, "1h00m"),
        (3720, "1h02m"),
        (86400 * 2 + 3 * 3600, "2d03h"),
        (None, "n/a"),
        (float("inf"), "n/a"),
    ],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


def test_numbers_that_are_not_finite_are_shown():
    assert progress.number(float("nan")) == "nan" and progress.number(float("inf")) == "inf"


def test_pauses_do_not_count_into_speed():
    now = Time()
    clock = Clock(images_per_step=8, devices=2, cores=4, now=now)
    with clock.pause("compile"):
        now.sleep(30)
    for _ in range(10):
        with clock.data_wait():
            now.sleep(0.1)
        now.sleep(0.9)
    with clock.pause("eval"):
        now.sleep(50)
        with clock.pause("checkpoint"):  # inside another pause: belongs to it
            now.sleep(10)
    interval = clock.interval(10)
    assert interval.images_per_s == pytest.approx(8.0)
    assert interval.data_wait == pytest.approx(0.1)
    totals = clock.totals()
    assert totals["seconds"] == pytest.approx(100) and totals["train_seconds"] == pytest.approx(10)
    assert totals["device_hours"] == pytest.approx(200 / 3600)
    assert totals["core_hours"] == pytest.approx(400 / 3600)
    assert totals["images_per_s"] == pytest.approx(8.0)
    assert totals["pauses"]["eval"] == {"count": 1, "seconds": pytest.approx(60)}
    assert "checkpoint" not in totals["pauses"]


def test_waiting_inside_a_pause_is_not_data_wait():
    now = Time()
    clock = Clock(images_per_step=1, now=now)
    with clock.pause("eval"), clock.data_wait():
        now.sleep(5)
    now.sleep(1)
    assert clock.interval(1).data_wait == 0.0


def test_intervals_are_apart_and_empty_ones_say_nothing():
    now = Time()
    clock = Clock(images_per_step=10, start_step=100, now=now)
    now.sleep(2)
    assert clock.interval(102).images_per_s == pytest.approx(10)
    now.sleep(1)
    assert clock.interval(104).images_per_s == pytest.approx(20)
    assert clock.interval(104).images_per_s is None


def test_eta_counts_evaluations_to_come():
    now = Time()
    clock = Clock(images_per_step=1, now=now)
    assert clock.eta(0, 100) is None
    now.sleep(20)
    clock.interval(10)
    for seconds in (4, 6):
        with clock.pause("eval"):
            now.sleep(seconds)
    assert clock.eta(10, 100) == pytest.approx(180)  # 90 steps of 2 s
    assert clock.eta(10, 100, {"eval": 3, "unseen": 9}) == pytest.approx(180 + 3 * 5)


def test_totals_continue_over_a_resume():
    now = Time()
    first = Clock(images_per_step=4, now=now)
    now.sleep(10)
    first.interval(5)
    with first.pause("eval"):
        now.sleep(3)
    second = Clock(images_per_step=4, start_step=5, carried=first.totals(), now=now)
    now.sleep(10)
    with second.pause("eval"):
        now.sleep(4)
    second.interval(10)
    totals = second.totals()
    assert (totals["steps"], totals["seconds"], totals["train_seconds"]) == (10, 27, 20)
    assert totals["images_per_s"] == pytest.approx(2.0)
    assert totals["pauses"]["eval"] == {"count": 2, "seconds": 7}


def test_log_file_gets_plain_lines():
    stream = io.StringIO()
    with progress.working("compiling train step", stream=stream, every=0.05):
        time.sleep(0.18)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3 and all(line.startswith("compiling train step: ") for line in lines)
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_terminal_line_is_removed_at_the_end():
    stream = Terminal()
    with progress.working("compiling", stream=stream):
        time.sleep(0.3)
        progress.say("a line between", stream)
    drawn, _, last = stream.getvalue().rpartition("\r\x1b[2K")
    assert "⠋ compiling" in drawn and "\r\x1b[2Ka line between\n" in drawn
    assert last.startswith("compiling: 0.") and last.endswith("s\n")


def test_bar_counts_and_ends():
    stream = Terminal()
    seen = []
    for item in progress.bar([1, 2, 3], "evaluating", stream=stream):
        time.sleep(0.15)
        seen.append(item)
    assert seen == [1, 2, 3]
    assert "1/3 33%" in stream.getvalue() and "━" in stream.getvalue()
    assert stream.getvalue().rsplit("\r\x1b[2K", 1)[1].startswith("evaluating: 0.")


def test_failure_and_early_stop_are_said():
    stream = io.StringIO()
    with pytest.raises(ValueError), progress.working("compiling", stream=stream):
        raise ValueError
    items = progress.bar(range(5), "evaluating", stream=stream)
    next(items)
    items.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("compiling: failed after")
    assert second.startswith("evaluating: stopped after")


def test_disabled_shows_nothing(capsys):
    with progress.working("compiling", enabled=False) as spinner:
        assert spinner is None
    assert list(progress.bar([1], "x", enabled=False)) == [1]
    assert capsys.readouterr().out == ""


def test_module_needs_no_jax():
    code = "import sys, dcae_jax.report.progress; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
