"""programs.py: which programs a run needs, compiled ahead in a thread, what each costs."""

import os
import re
import signal
import threading
import time
from collections import Counter

import diffusing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.sharding import NamedSharding, PartitionSpec

from dcae_jax import distributed, inspect, programs, sharding, train
from dcae_jax.config import MeshConfig
from dcae_jax.distributed import EXIT_PREEMPTED
from dcae_jax.masking import MaskConfig, MaskKind, Rounding
from dcae_jax.models.layers import Dtype
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.programs import Stretch, plan
from dcae_jax.report.progress import Clock, Interval
from dcae_jax.tasks.mask_latents import MaskLatentsConfig

WAIT = 20.0  # seconds after which a thread that is waited for counts as stuck


class Keys:
    """A task as far as programs see it: its keys are a function of the step."""

    def __init__(self, key):
        self.static, self.asked = key, 0

    def statics(self, first, last):
        self.asked += 1
        return list(dict.fromkeys(self.static(k) for k in range(first, last)))


def brute(task, first, last):
    counts = Counter(task.static(k) for k in range(first, last))
    return [
        (key, next(k for k in range(first, last) if task.static(k) == key), counts[key])
        for key in task.statics(first, last)
    ]


@pytest.mark.parametrize(
    "key",
    [
        lambda k: (),
        lambda k: 41 if k < 300 else 36 if k < 777 else 30,
        lambda k: "unmasked" if k > 600 and k % 10 else "masked",  # alternates to the end
    ],
)
@pytest.mark.parametrize(("first", "last"), [(0, 1000), (555, 1000), (999, 1000), (7, 7)])
def test_a_plan_has_each_key_with_its_first_step_and_their_number(key, first, last):
    task = Keys(key)
    found = plan(task, first, last)
    assert [(k, s.first, s.steps) for k, s in found.items()] == brute(task, first, last)


def test_a_plan_of_a_long_run_looks_at_few_steps():
    switches = np.asarray([9_540, 400_000, 777_777])
    task = Keys(lambda k: int(np.searchsorted(switches, k, side="right")))

    def statics(first, last):
        task.asked += 1
        return list(range(task.static(first), task.static(last - 1) + 1))

    task.statics = statics
    edges = [0, *switches.tolist(), 1_000_000]
    assert plan(task, 0, 1_000_000) == {
        i: Stretch(edges[i], edges[i + 1] - edges[i]) for i in range(4)
    }
    assert task.asked < 150  # 3 switches, each found by halving a million 12 times


# ------------------------------------------------------------------- the programs themselves


class Slow:
    """A traced function whose compilation begins when it is let, and says where it ran."""

    def __init__(self, traced, gate):
        self.jaxpr, self._traced, self._gate = traced.jaxpr, traced, gate
        self.begun, self.mesh, self.thread = threading.Event(), None, None

    def lower(self):
        self.mesh, self.thread = jax.sharding.get_abstract_mesh(), threading.current_thread()
        self.begun.set()
        assert self._gate.wait(WAIT)
        return self._traced.lower()


class Workshop:
    """Programs that multiply by their key, for the steps 0..9: 2 until step 4, then 3, then 5."""

    def __init__(self, options=None, carried=()):
        self.task = Keys(lambda k: 2 if k < 4 else 3 if k < 7 else 5)
        self.mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:2])
        self.gates = {key: threading.Event() for key in (2, 3, 5)}
        self.gates[2].set()
        self.options, self.traced, self.clock = options or {}, {}, Clock(1)
        self.made = programs.Programs(self.task, self.trace, self.mesh, self.clock, carried)

    def trace(self, key):
        assert key not in self.traced, "traced twice"
        rows = NamedSharding(self.mesh, PartitionSpec("data"))
        x = jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=rows)
        options = self.options[key] if key in self.options else {}
        jitted = jax.jit(lambda x: key * x @ jnp.ones((4, key)), compiler_options=options)
        self.traced[key] = Slow(jitted.trace(x), self.gates[key])
        return self.traced[key]

    def start(self, first=0, poll=lambda: None):
        with jax.set_mesh(self.mesh):
            self.made.start(first, 10, poll)

    def run(self, k):
        x = jax.device_put(np.ones((4, 4), np.float32), NamedSharding(self.mesh, PartitionSpec()))
        x = jax.device_put(x, NamedSharding(self.mesh, PartitionSpec("data")))
        return float(self.made.at(k)(x)[0, 0])


def compiling():
    return [t for t in threading.enumerate() if t.name.startswith("compile")]


def test_programs_are_compiled_ahead_in_their_order_on_the_mesh(capsys):
    shop = Workshop()
    shop.start()
    assert list(shop.traced) == [2, 3, 5], "not all are traced at the start"
    assert shop.traced[3].begun.wait(WAIT) and not shop.traced[5].begun.is_set()
    assert [shop.run(k) for k in range(4)] == [8.0] * 4  # while the second one is compiled
    shop.gates[3].set()
    assert shop.traced[5].begun.wait(WAIT)
    shop.gates[5].set()
    assert [shop.run(k) for k in range(4, 10)] == [12.0] * 3 + [20.0] * 3
    main = threading.current_thread()
    assert [t.thread is main for t in shop.traced.values()] == [True, False, False]
    assert {t.mesh for t in shop.traced.values()} == {shop.mesh.abstract_mesh}
    shop.made.close()
    assert not compiling()
    # Products of 4 x 4 and 4 x key: 2 * 16 * key FLOPs.
    assert "3 programs: 2 from step 0 (0.00 GFLOP a step), 3 from step 4" in capsys.readouterr().out
    assert [(r["program"], r["steps"], r["flops"]) for r in shop.made.summary()] == [
        ("2", 4, 64), ("3", 3, 96), ("5", 3, 160)
    ]  # fmt: skip


def test_a_program_that_is_not_ready_is_waited_for_in_a_pause(capsys):
    shop = Workshop()
    shop.start()
    threading.Timer(0.3, shop.gates[3].set).start()
    before = shop.clock.train_seconds()
    assert shop.run(4) == 12.0
    assert "compiling the train step (3): 0." in capsys.readouterr().out
    pauses = shop.clock.totals()["pauses"]["compile"]
    assert pauses["count"] == 2 and pauses["seconds"] > 0.25  # the first program, and this one
    assert shop.clock.train_seconds() - before < 0.25, "the wait counts as training time"
    shop.gates[5].set()
    shop.made.close()


def test_several_processes_compile_each_program_when_they_need_it(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shop = Workshop()
    for gate in shop.gates.values():
        gate.set()
    shop.start()
    assert list(shop.traced) == [2, 3, 5] and not shop.traced[3].begun.is_set()
    assert [shop.run(k) for k in (3, 4, 7, 5)] == [8.0, 12.0, 20.0, 12.0]
    main = threading.current_thread()
    assert all(t.thread is main for t in shop.traced.values()) and not compiling()
    assert capsys.readouterr().out.count("compiling the train step (3)") == 1
    assert shop.clock.totals()["pauses"]["compile"]["count"] == 3


def test_a_failed_compile_is_told_at_once_and_raised_where_it_is_needed(capsys):
    shop = Workshop(options={3: {"xla_there_is_no_such_option": True}})
    shop.gates[3].set()
    shop.gates[5].set()
    shop.start()
    shop.made.close()
    out = capsys.readouterr().out
    assert re.search(r"warning: compiling the train step \(3\) failed.*no_such_option", out)
    assert [shop.run(k) for k in range(4)] == [8.0] * 4
    with pytest.raises(Exception, match="no_such_option"):
        shop.run(4)


def test_a_single_program_for_all_steps_is_not_spoken_of(capsys):
    shop = Workshop()
    shop.made._task = Keys(lambda k: ())
    shop.made._trace = lambda key: jax.jit(lambda x: x + 1).trace(jnp.ones(()))
    shop.start()
    assert float(shop.made.at(3)(jnp.ones(()))) == 2.0
    shop.made.close()
    assert capsys.readouterr().out.startswith("compiling the train step: ")
    assert shop.made.totals() == shop.made.summary() == shop.made.table() == []


def test_what_cannot_be_traced_ends_the_run_before_its_first_step():
    shop = Workshop()
    trace = shop.trace
    shop.made._trace = lambda key: trace(key) if key != 5 else jnp.ones((2, 3)) @ jnp.ones((2, 3))
    with pytest.raises(TypeError, match="contracting"):
        shop.start()
    assert not compiling()


def test_a_stop_may_come_while_programs_are_traced():
    def stop():
        raise distributed.Preempted

    shop = Workshop()
    with pytest.raises(distributed.Preempted):
        shop.start(poll=stop)
    assert list(shop.traced) == [2, 3] and not compiling()


def test_time_is_kept_of_intervals_with_one_program_and_no_compile():
    shop = Workshop(carried=[
        {"program": "2", "flops": 1, "steps": 10, "timed_steps": 5, "seconds": 1.0}
    ])  # fmt: skip
    shop.start()

    def logged(done, steps):
        return shop.made.logged(done, Interval(steps, 2.0, None, None))

    assert logged(2, 2) == 64.0  # the others are being compiled: its time does not count
    shop.gates[3].set()
    shop.gates[5].set()
    for future in shop.made._ahead.values():
        future.result(WAIT)
    assert logged(3, 1) == 64.0  # they still were when this one began
    assert logged(4, 1) == 64.0
    assert logged(6, 3) == pytest.approx((64 + 2 * 96) / 3)  # two programs: no time, mean FLOPs
    assert logged(7, 1) == 96.0
    rows = {r["program"]: r for r in shop.made.summary()}
    assert rows["2"]["ms_per_step"] == pytest.approx(1e3 * (1.0 + 2.0) / (5 + 1))
    assert rows["2"]["flops"] == 64 and rows["2"]["steps"] == 10, "of this attempt; of both"
    assert rows["3"]["ms_per_step"] == pytest.approx(2e3)
    assert rows["5"]["ms_per_step"] is None
    assert shop.made.table()[0].split() == "program steps ms a step GFLOP a step".split()
    assert len(shop.made.table()) == 4 and "n/a" in shop.made.table()[3]
    shop.made.close()


# ------------------------------------------------------------------------------- whole runs


def masked(**changes):
    """An LMD on latents of 16 tokens: 12 of them are visible, then 8, then 4."""
    model = LMDConfig(
        in_channels=4, input_size=(4, 4), patch=1, width=16, depth=1, heads=2, decoder_width=16,
        decoder_depth=1, decoder_heads=2, dtype=Dtype.float32,
    )  # fmt: skip
    mask = MaskConfig(
        kind=MaskKind.linear, start=0.25, end=0.75, buckets=(4, 8, 12), rounding=Rounding.nearest
    )
    return diffusing.make(**{"task": MaskLatentsConfig(model, mask), "evals": [], **changes})


EXPECTED = {12: 3, 8: 4, 4: 1}  # steps of each: 12 - k visible at step k, of two equal the larger


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, traced functions, what it printed) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("programs")
    with diffusing.traced() as names, pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(train, "say", said.append)
        assert diffusing.run(masked(), workdir) == train.DONE
    return workdir, names, "\n".join(said)


def test_a_run_traces_each_program_once(whole):
    """Golden test 9: one executable for each number of visible tokens, over the whole schedule."""
    workdir, names, said = whole
    assert len([n for n in names if n.endswith("train_step")]) == 3, names
    found = runs.summary(workdir)["programs"]
    assert {int(r["program"].split()[0]): r["steps"] for r in found} == EXPECTED
    costs = [r["flops"] for r in found]
    assert costs == sorted(costs, reverse=True) and costs[-1] > 0
    for row in found:
        assert re.search(rf"^{row['program']} +{row['steps']} ", said, re.M), said
    assert not compiling()


def test_programs_of_an_interrupted_run_add_up(whole, tmp_path):
    """Stopped in the middle of the second program's steps."""
    # Polls: 1 at the start, 2 programs behind the first traced, 1 after compiling, 1 a step.
    assert diffusing.run(masked(), tmp_path, poll=1 + 2 + 1 + 5) == EXIT_PREEMPTED
    assert runs.steps(tmp_path)[-1] == 5 and not compiling()
    meta = runs.state(masked(), tmp_path)[1]["programs"]
    assert {int(r["program"].split()[0]): r["steps"] for r in meta} == {12: 3, 8: 2, 4: 0}
    with diffusing.traced() as names:
        assert diffusing.run(masked(), tmp_path) == train.DONE
    assert len([n for n in names if n.endswith("train_step")]) == 2, "the past is not compiled"
    found, expected = (runs.summary(w)["programs"] for w in (tmp_path, whole[0]))
    same = ("program", "steps", "flops")
    assert [[r[k] for k in same] for r in found] == [[r[k] for k in same] for r in expected]
    runs.assert_same_run(masked(), whole[0], tmp_path)


def test_promise_5_sigterm_while_a_program_is_compiled_and_waited_for(tmp_path, monkeypatch):
    """A real signal to the process; the second program takes its time."""
    gate, waiting = threading.Event(), threading.Event()
    compile_one, wait = programs.Programs._compile, programs.Programs._wait

    def slowly(self, key):
        if key.keep == 8:
            assert gate.wait(WAIT)
        return compile_one(self, key)

    def waits(self, *arguments):
        waiting.set()
        return wait(self, *arguments)

    def interrupt():
        waiting.wait(5 * WAIT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        gate.set()

    monkeypatch.setattr(programs.Programs, "_wait", waits)
    monkeypatch.setattr(programs.Programs, "_compile", slowly)
    before = signal.getsignal(signal.SIGTERM)
    preemption = distributed.Preemption()
    preemption.install()
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with runs.devices(1):
            code = train.train(masked(), str(tmp_path), preemption)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert code == EXIT_PREEMPTED and not compiling()
    _, meta = runs.state(masked(), tmp_path)
    assert meta["step"] == 4, "not the step after the compile that it waited for"


def test_dry_run_counts_each_program_and_the_mean_of_the_run(capsys):
    cfg = masked(steps=8)
    with runs.devices(1):
        assert inspect.dry_run(cfg) == 0
    out = capsys.readouterr().out
    found = re.findall(
        r"^  (\d+) of 16 tokens visible: from step (\d+), (\d+) steps, forward ([\d.]+) GFLOP, "
        r"training step ([\d.]+) GFLOP", out, re.M,
    )  # fmt: skip
    assert [(int(keep), int(n)) for keep, _, n, *_ in found] == list(EXPECTED.items())
    assert [int(first) for _, first, *_ in found] == [0, 3, 7]
    assert "(mean over the 8 steps)" in out and "3 programs:" in out
