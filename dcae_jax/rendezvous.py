"""Where the processes of a run meet before jax joins them, and how each hears that one is gone.

jax's own join knows no names: a process that never comes, a blocked port, and later the death of a
process end the others by an abort with a stack trace.  So process 0 listens at the coordinator's
address before jax does.  The others connect, say who they are and what they are about to run, and
keep the connection until the end: the kernel closes it when its process dies, however it dies.
"""

import atexit
import ctypes
import faulthandler
import json
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from dcae_jax.errors import UserError

EXIT_GONE = 43  # "a process never came, or is gone": starting again is sensible
SECONDS = 60  # for all to come; JAX_RENDEZVOUS_SECONDS changes it
LONGEST = 1 << 24  # bytes of one message
SHOWN = 10  # differences and processes that a message names

Facts = Mapping[str, Any]  # name -> JSON value


class Gone(Exception):
    """A process never came or does not answer; the exit code is EXIT_GONE."""


class Differs(UserError):
    """The processes are not about to run the same; all of them raise it."""


@dataclass(frozen=True)
class Place:
    """Where the processes meet, how many they are, and which of them this one is."""

    address: str  # host:port
    count: int
    index: int

    def endpoint(self) -> tuple[str, int]:
        """(host, port); UserError if the address is neither."""
        host, _, port = self.address.rpartition(":")
        if not (host and port.isdigit() and 0 < int(port) < 1 << 16):
            raise UserError(
                f"coordinator address {self.address!r} is not HOST:PORT with a port of 1 to 65535"
            )
        return host.strip("[]"), int(port)


@dataclass(frozen=True)
class Card:
    """Who a process is."""

    index: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.index} (pid {self.pid} on {self.host})"


def seconds() -> float:
    """How long processes wait for each other."""
    text = os.environ.get("JAX_RENDEZVOUS_SECONDS", str(SECONDS))
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise UserError(f"JAX_RENDEZVOUS_SECONDS = {text!r} is not a number of seconds above 0")
    return found


# ------------------------------------------------------------------------------------------ lines


class _Line:
    """A connection that carries JSON objects, one a line."""

    def __init__(self, connection: socket.socket):
        self.socket, self._rest = connection, b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that is lost sends nothing: half a minute without an answer is its end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """OSError if the other side is gone."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The messages that the next bytes complete; OSError or EOFError at the end."""
        found = self.socket.recv(1 << 16)
        if not found:
            raise EOFError("closed by the other side")
        *whole, self._rest = (self._rest + found).split(b"\n")
        try:
            messages = [json.loads(line) for line in whole]
        except ValueError:
            messages = [None]
        if len(self._rest) > LONGEST or not all(isinstance(m, dict) for m in messages):
            raise ValueError("something else than a process of a run answers there")
        return messages

    def closed(self) -> bool:
        """Whether the other side is gone; reads nothing."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def wait(self, limit: float) -> dict[str, Any]:
        """The first message, within `limit` seconds; the next is not sent before it is answered."""
        self.socket.settimeout(limit)
        while not (found := self.receive()):
            pass
        self.socket.settimeout(None)
        return found[0]


# ---------------------------------------------------------------------------------------- meeting


def meet(place: Place) -> "Meeting":
    """Waits until all processes are here.  Raises Gone where one is not, on all that are."""
    me = Card(place.index, socket.gethostname(), os.getpid())
    if place.index == 0:
        return _receive(place, me, seconds())
    return _visit(place, me, seconds())


def _receive(place: Place, me: Card, limit: float) -> "Meeting":
    """Process 0: waits for the others."""
    end, lines, cards = time.monotonic() + limit, {}, {0: me}
    with _listen(place.endpoint()[1]) as listener:
        while len(cards) < place.count or _forget_dead(lines, cards):
            listener.settimeout(max(end - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                why = _missing(place, cards, limit)
                _tell(lines.values(), missing=why)
                raise Gone(why) from None
            _admit(place, _Line(connection), lines, cards)
    # The port is free from here on: jax's service takes it.
    token = secrets.token_hex(8)
    _tell(lines.values(), cards=[asdict(cards[i]) for i in sorted(cards)], token=token)
    return Meeting(place, cards, lines, token)


def _listen(port: int) -> socket.socket:
    """A listener on all addresses of this machine.

    jax's service would share the port with another run's, and mix the two; this one refuses.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    for left in range(10, -1, -1):  # a process of the last start may still be on its way out
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=512)
        except OSError as e:
            if not left:
                raise UserError(
                    f"port {port} of {socket.gethostname()} cannot be listened on: {e}. Another "
                    f"run, or a process left over from one, may have it (`ss -ltnp 'sport = "
                    f":{port}'` shows it): stop that, or choose another port"
                ) from e
            time.sleep(0.5)
    raise AssertionError("unreachable")


def _admit(place: Place, line: _Line, lines: dict[int, _Line], cards: dict[int, Card]) -> None:
    """Takes in one that has connected; strangers (a scan of ports) are sent away."""
    try:
        said = line.wait(5)
        of, card = said.pop("of"), Card(**said)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        line.socket.close()
        return
    why = ""
    if card.index in cards:
        _forget_dead(lines, cards)
    if of != place.count or not 0 < card.index < place.count:
        why = f"{card} of {of} came to a run of {place.count} processes: left over from another?"
    elif card.index in cards:
        why = f"two processes have the number {card.index}: {cards[card.index]} and {card}"
    if why:
        _tell([line, *lines.values()], refused=why)
        raise UserError(f"{why}. Stop what is left over; give each process a number of its own")
    lines[card.index], cards[card.index] = line, card


def _forget_dead(lines: dict[int, _Line], cards: dict[int, Card]) -> list[int]:
    """Leaves out those that came and are gone: they may be started again in time."""
    dead = [index for index, line in lines.items() if line.closed()]
    for index in dead:
        lines.pop(index).socket.close()
        del cards[index]
    return dead


def _tell(lines: Any, **message: Any) -> None:
    """Sends to all that still listen."""
    for line in lines:
        try:
            line.send(**message)
        except OSError:
            continue


def _missing(place: Place, cards: dict[int, Card], limit: float) -> str:
    absent = [i for i in range(place.count) if i not in cards]
    names = ", ".join(map(str, absent[:SHOWN])) + (", ..." if len(absent) > SHOWN else "")
    here = "; ".join(str(cards[i]) for i in sorted(cards)[:SHOWN])
    more = "; ..." if len(cards) > SHOWN else ""
    return (
        f"{len(absent)} of {place.count} processes did not come within {limit:.0f} s: {names}. "
        f"Here: {here}{more}. Look at the output of those that are missing: they have failed, or "
        f"cannot reach {place.address} (`nc -vz {' '.join(map(str, place.endpoint()))}` there "
        "tells whether the port is blocked). Then start all again; JAX_RENDEZVOUS_SECONDS=300 "
        "waits longer"
    )


def _visit(place: Place, me: Card, limit: float) -> "Meeting":
    """Any other process: goes to process 0."""
    end = time.monotonic() + limit
    while True:
        try:
            line = _Line(_connect(place, max(min(end - time.monotonic(), 10), 0.1)))
            line.send(of=place.count, **asdict(me))
            # Process 0 gives up in time: it came before this connection, or its backlog did.
            answer = line.wait(limit + 15)
            break
        except (OSError, EOFError, ValueError) as e:
            problem = e
        if time.monotonic() > end:
            raise Gone(_unreachable(place, me, limit, problem))
        time.sleep(0.2)
    if "missing" in answer:
        raise Gone(answer["missing"])
    if "refused" in answer:
        raise UserError(answer["refused"])
    cards = {c["index"]: Card(**c) for c in answer["cards"]}
    return Meeting(place, cards, {0: line}, answer["token"])


def _connect(place: Place, limit: float) -> socket.socket:
    connection = socket.create_connection(place.endpoint(), timeout=limit)
    if connection.getsockname() == connection.getpeername():
        connection.close()  # without a listener, a port of this machine may meet itself
        raise ConnectionRefusedError("nobody listens there yet")
    return connection


def _unreachable(place: Place, me: Card, limit: float, problem: Exception) -> str:
    host, port = place.endpoint()
    return (
        f"{me} of {place.count} did not reach process 0 at {place.address} within {limit:.0f} s: "
        f"{problem}. Look at the output of process 0: it has failed or was not started, its "
        f"address is another one, or the port is blocked (`nc -vz {host} {port}` here tells). Then "
        "start all again; JAX_RENDEZVOUS_SECONDS=300 waits longer"
    )


class Meeting:
    """The processes of a run, connected to process 0 until they leave."""

    def __init__(
        self, place: Place, cards: dict[int, Card], lines: dict[int, _Line], token: str
    ) -> None:
        self.place, self.cards = place, cards
        self.token = token  # the same on all processes, new at each start
        self.over = False  # each leaves by itself
        self._leaving = False
        self._lines, self._ended = lines, set[int]()
        self._rounds: dict[int, dict[int, Any]] = {}  # what was said in each, by process
        self._round, self._news = 0, threading.Condition()
        atexit.register(self._end)
        _abort_late()
        threading.Thread(target=self._watch, daemon=True, name="meeting").start()

    # -------------------------------------------------------------------------------- comparing

    def compare(self, facts: Facts, mends: Mapping[str, str]) -> None:
        """Raises Differs on all processes where the facts of one are not those of the others.

        `mends`: what to do, by the beginning of a fact's name.
        """
        self._round += 1
        limit = seconds()
        if self.place.index:
            self._send(0, round=self._round, said=facts)
            # Process 0 waits for all the others, then answers or stops this process.
            (verdict,) = self._wait({0}, 2 * limit + 15).values()
        else:
            said = {0: facts, **self._wait(set(self._lines), limit)}
            verdict = differences(said, self.cards, mends)
            _tell(self._lines.values(), round=self._round, said=verdict)
        if verdict:
            self._end()
            raise Differs(verdict)

    def _wait(self, whose: set[int], limit: float) -> dict[int, Any]:
        """What these processes say in this round."""
        with self._news:
            said = self._rounds.setdefault(self._round, {})
            if self._news.wait_for(lambda: said.keys() >= whose, limit):
                return said
        silent = ", ".join(str(self.cards[i]) for i in sorted(whose - said.keys())[:SHOWN])
        raise Gone(
            f"no answer from {silent} within {limit:.0f} s of the start: it hangs or is very slow; "
            "look at its output. JAX_RENDEZVOUS_SECONDS=300 waits longer"
        )

    # ---------------------------------------------------------------------------------- leaving

    def stop(self, code: int, why: str) -> NoReturn:
        """Leaves at once with this exit code; the others leave with it, too, and say why."""
        self._leaving = True
        text = f"{self.cards[self.place.index]} of {self.place.count} failed: {why[:2000]}"
        _tell(self._lines.values(), stop=code, why=text)
        self._exit(code)

    def _end(self) -> None:
        """From now on nobody minds that this process leaves, nor it that others do."""
        if not hasattr(sys, "last_value"):  # an error nobody caught is no regular end
            self.over = True
            _tell(self._lines.values(), end=True)

    # --------------------------------------------------------------------------------- watching

    def _watch(self) -> None:
        """The thread: hears what the others say, and that they are gone."""
        with selectors.DefaultSelector() as waiting:
            for index, line in self._lines.items():
                waiting.register(line.socket, selectors.EVENT_READ, (index, line))
            while waiting.get_map():
                for key, _ in waiting.select():
                    index, line = key.data
                    try:
                        for message in line.receive():
                            self._hear(index, message)
                    except (OSError, EOFError, ValueError):
                        waiting.unregister(line.socket)
                        if not (self._leaving or index in self._ended):
                            self._lost(index)

    def _hear(self, index: int, message: dict[str, Any]) -> None:
        if "stop" in message:
            time.sleep(0.5)  # if it is everyone's mistake, this process says so itself
            if not self._leaving:
                self._leave(message["stop"], message["why"], but=index)
        if "end" in message:
            self._ended.add(index)
        if "round" in message:
            with self._news:
                self._rounds.setdefault(message["round"], {})[index] = message["said"]
                self._news.notify_all()

    def _lost(self, index: int) -> None:
        self._leave(
            EXIT_GONE,
            f"{self.cards[index]} of {self.place.count} is gone: killed, or its machine is lost. "
            "Start the run again: it resumes from the newest checkpoint",
            but=index,
        )

    def _leave(self, code: int, why: str, but: int) -> NoReturn:
        """Process 0 passes it on: the others hear of each other through it alone."""
        if not self.place.index:
            _tell([line for i, line in self._lines.items() if i != but], stop=code, why=why)
        # Not print(): the main thread may be in one, and wait for a reader.
        os.write(2, f"error: {why}\n".encode())
        self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        """Process 0 is the last: jax aborts the others as soon as it is gone."""
        self._leaving = True
        _flush()
        end = time.monotonic() + 3
        while self._lines and not self.place.index and time.monotonic() < end:
            index, line = next(iter(self._lines.items()))
            try:
                line.socket.settimeout(max(end - time.monotonic(), 0.001))
                gone = not line.socket.recv(1 << 16)
            except OSError:
                gone = True
            if gone:
                del self._lines[index]
        os._exit(code)

    def _send(self, index: int, **message: Any) -> None:
        try:
            self._lines[index].send(**message)
        except OSError:
            return  # the thread has seen it, too, and ends this process


def _abort_late() -> None:
    """Lets an abort wait until it is told who is gone.

    When process 0 dies, jax's client aborts this process in the same moment, from a thread of its
    own.  The thread of the meeting needs Python's lock to say why and to leave with EXIT_GONE; the
    main thread may hold that for a while, in a compiler for example.
    """

    def on_abort(number: int) -> None:
        time.sleep(3)
        faulthandler.dump_traceback()
        libc.signal(number, signal.SIG_DFL)

    libc = ctypes.CDLL(None)
    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort))
    libc.signal(signal.SIGABRT, _kept[-1])


_kept: list[Any] = []  # what C code points to


def _flush() -> None:
    """Writes out what was printed, unless nobody reads it."""

    def work() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(1)


def wait_for_service(place: Place) -> None:
    """Waits until something listens at the address again.

    jax's client backs off for seconds after a refused connection.
    """
    end = time.monotonic() + seconds()
    while time.monotonic() < end:
        try:
            _connect(place, 1).close()
            return
        except OSError:
            time.sleep(0.02)


# ------------------------------------------------------------------------------------ differences


def differences(
    said: Mapping[int, Facts], cards: Mapping[int, Card], mends: Mapping[str, str]
) -> str:
    """One line for each fact that is not the same on all processes; "" if there is none."""
    names = dict.fromkeys(name for facts in said.values() for name in facts)
    lines, todo = [], []
    for name in names:
        groups: dict[str, list[int]] = {}
        for index in sorted(said):
            value = said[index][name] if name in said[index] else None
            groups.setdefault(json.dumps(value, sort_keys=True), []).append(index)
        if len(groups) > 1:
            lines.append(f"  - {name}: {_who(groups, cards)}")
            todo += [mend for start, mend in mends.items() if name.startswith(start)]
    if not lines:
        return ""
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"  - and {len(lines) - SHOWN} more"]
    advice = " ".join(dict.fromkeys(todo))
    return "\n".join(["the processes of this run are not alike:", *lines, advice]).rstrip()


def _who(groups: dict[str, list[int]], cards: Mapping[int, Card]) -> str:
    """Which process has which value; the largest group, if large, as "the others"."""
    parts = []
    ordered = sorted(groups.items(), key=lambda g: len(g[1]))
    for i, (value, members) in enumerate(ordered):
        text = ", ".join(f"{m} ({cards[m].host})" for m in members[:SHOWN])
        if i == len(ordered) - 1 and len(members) > 3:
            text = f"the {len(members)} others"
        elif len(members) > SHOWN:
            text += f" and {len(members) - SHOWN} more"
        parts.append(
            f"{value} on {text}" if text.startswith("the ") else f"{value} on process {text}"
        )
    return "; ".join(parts)
