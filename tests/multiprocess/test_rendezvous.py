"""Processes meet, compare, and hear of each other's end; real ones, which do not start jax."""

import contextlib
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import processes
import pytest
import runs

from dcae_jax import rendezvous
from dcae_jax.errors import UserError
from dcae_jax.rendezvous import Card, Place, differences

pytestmark = pytest.mark.multiprocess

SCRIPT = pathlib.Path(__file__).with_name("meeting_process.py")
HOST = socket.gethostname()


def start(address, count, index, facts=None, action="end", limit=20):
    given = [address, count, index, json.dumps(facts or {}), action]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, given)], cwd=runs.ROOT, text=True,
        env=runs.environment(PYTHONPATH=runs.ROOT, JAX_RENDEZVOUS_SECONDS=limit),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def meet(actions, facts=(), **options):
    """As many processes as actions; those of None are not started."""
    address = processes.address()
    return [
        start(address, len(actions), i, facts[i] if facts else None, action, **options)
        for i, action in enumerate(actions) if action
    ]  # fmt: skip


def finish(started):
    return [(p.wait(timeout=60), p.stdout.read()) for p in started]


def test_all_that_come_meet_under_one_token_and_leave_one_by_one():
    ended = finish(meet(["end"] * 4))
    assert [code for code, _ in ended] == [0] * 4, ended
    assert len({re.fullmatch(r"met (\w+)\n", text)[1] for _, text in ended}) == 1


def test_a_difference_is_told_on_all_with_host_and_mend():
    facts = [{"version of jax": "1.0", "config.seed": 0}] * 3
    facts[1] = {"version of jax": "0.9", "config.seed": 0}
    for code, text in finish(meet(["wait"] * 3, facts)):
        assert code == 2 and "met" not in text
        assert f'version of jax: "0.9" on process 1 ({HOST})' in text
        assert "Install the same packages." in text and "config.seed" not in text


@pytest.mark.parametrize("absent", [2, 0])
def test_who_does_not_come_is_named_in_time(absent):
    begin = time.monotonic()
    ended = finish(meet([None if i == absent else "end" for i in range(3)], limit=3))
    assert time.monotonic() - begin < 20
    for code, text in ended:
        assert code == rendezvous.EXIT_GONE, text
        said = (
            "1 of 3 processes did not come within 3 s: 2." if absent else "did not reach process 0"
        )
        assert said in text and "blocked" in text, text


def test_what_waits_for_an_answer_is_named():
    ended = finish(meet(["round", "round", "wait"], limit=3))
    assert [code for code, _ in ended] == [rendezvous.EXIT_GONE] * 3, ended
    assert all("no answer from process 2" in text for _, text in ended)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_others_hear_at_once_of_a_process_that_is_killed(victim, how):
    started = meet(["wait"] * 4)
    for p in started:
        assert p.stdout.readline().startswith("met")
    started[victim].send_signal(how)
    begin = time.monotonic()
    ended = finish(started)
    assert time.monotonic() - begin < 10
    for i, (code, text) in enumerate(ended):
        if i != victim:
            assert code == rendezvous.EXIT_GONE, (i, text)
            gone = f"process {victim} (pid {started[victim].pid} on {HOST}) of 4 is gone"
            assert text.count("error:") == 1 and gone in text, text


@pytest.mark.parametrize("who", [0, 1])
def test_one_that_fails_takes_the_others_with_it_and_they_say_why(who):
    actions = ["fail" if i == who else "wait" for i in range(3)]
    for i, (code, text) in enumerate(finish(meet(actions))):
        assert code == 7, (i, text)
        assert i == who or f"on {HOST}) of 3 failed: the disk is full" in text


def test_a_number_that_is_given_twice_is_refused():
    address = processes.address()
    ended = finish([start(address, 3, i, action="wait") for i in (0, 1, 1)])
    assert [code for code, _ in ended] == [2] * 3, ended
    assert all("two processes have the number 1" in text for _, text in ended)


def test_one_that_was_started_again_before_all_were_there_takes_its_old_place():
    address = processes.address()
    first, old = start(address, 3, 0), start(address, 3, 1)
    time.sleep(1)  # it is there, and waits
    old.kill()
    old.wait()
    ended = finish([first, start(address, 3, 1), start(address, 3, 2)])
    assert [code for code, _ in ended] == [0] * 3, ended


def test_strangers_at_the_port_are_sent_away():
    address = processes.address()
    first = start(address, 2, 0)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"of": 2}\n'):
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError):
                stranger = socket.create_connection(Place(address, 2, 1).endpoint())
                break
            time.sleep(0.1)
        stranger.sendall(said)
        stranger.close()
    ended = finish([first, start(address, 2, 1)])
    assert [code for code, _ in ended] == [0, 0], ended


def test_a_port_that_another_run_has_is_told():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ((code, text),) = finish([start(f"127.0.0.1:{port}", 2, 0)])
    assert code == 2 and f"port {port} of {HOST} cannot be listened on" in text, text


def test_many_processes_are_told_in_a_few_words():
    cards = {i: Card(i, f"host{i // 4}", 100 + i) for i in range(64)}
    said = {
        i: {"devices": 3 if i == 9 else 4, **{f"x{k}": i // 32 for k in range(30)}} for i in cards
    }
    text = differences(said, cards, {"devices": "Look there."})
    assert "- devices: 3 on process 9 (host2); 4 on the 63 others" in text
    assert "and 21 more" in text and len(text) < 3000 and text.endswith("Look there.")
    assert not differences({i: {"devices": 4} for i in cards}, cards, {})


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-3", "soon"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(monkeypatch, text):
    monkeypatch.setenv("JAX_RENDEZVOUS_SECONDS", text)
    with pytest.raises(UserError, match=f"JAX_RENDEZVOUS_SECONDS = '{text}'"):
        rendezvous.seconds()


@pytest.mark.parametrize("address", ["localhost", "localhost:99999", "localhost:0", ":12355"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(UserError, match="is not HOST:PORT"):
        Place(address, 2, 1).endpoint()


def test_a_stranger_at_the_address_of_process_0_is_called_one():
    with socket.create_server(("localhost", 0)) as stranger:
        visitor = start(f"localhost:{stranger.getsockname()[1]}", 2, 1, action="end", limit=1)
        stranger.settimeout(1)
        while visitor.poll() is None:
            with contextlib.suppress(OSError), stranger.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
    ((code, text),) = finish([visitor])
    assert code == 43 and "something else than a process of a run answers there" in text
