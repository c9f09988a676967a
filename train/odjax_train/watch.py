"""Ends a process as soon as another one of its run is gone, instead of leaving it waiting in a collective.

Process 0 holds a TCP connection to each of the others. The system closes the connections of a process that
dies, whatever it died of, so process 0 knows at once and tells the others. Without this a collective waits
for the dead until JAX misses their heartbeats, a minute or two later, and aborts every process from C++.
"""

import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from odjax_train.cli import INTERRUPTED

_CONNECT = 30.0
# Between the death of a process and the moment when all others know it; generous.
_GRACE = 5.0
_TOKEN = 16
# A machine that is down closes nothing: it is given up when it has not answered for 20 + 8 * 5 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 8}


class Watch:
    """Listens to the other processes of the run.

    Args:
        process: number of this one.
        processes: how many there are.
        connections: process -> connection. Process 0 has one to each of the others, they have one to it.
    """

    def __init__(self, process: int, processes: int, connections: Mapping[int, socket.socket]) -> None:
        self.advice: Callable[[], str] = lambda: "the same command begins again"
        self._process, self._processes = process, processes
        self._connections = connections
        self._ending = threading.Lock()  # held by what ends this process
        self._found = threading.Event()  # another process has ended before its time
        self._alone = threading.Event()  # all other processes have
        threading.Thread(target=self._listen, daemon=True).start()
        self._aborts = _Aborts(self._aborted)

    def pause(self) -> None:
        """Returns when no other process can be the cause of an error here; else the listener ends this."""
        if self._found.wait(_GRACE):
            _wait_for_the_end()

    def take_over(self) -> None:
        """From here on it is the caller who ends this process, not the listener."""
        if not self._ending.acquire(blocking=False):
            _wait_for_the_end()

    def fail(self, status: int, text: str) -> None:
        """Tells the others why this process ends.

        Process 0 lets them end first: JAX aborts the others when it is gone.

        Args:
            status: exit status for all of them.
            text: what went wrong.
        """
        self._send(status, f"process {self._process} of {self._processes} failed: {text}")
        if self._process == 0:
            self._alone.wait(_GRACE)

    def leave(self) -> None:
        """Waits until all processes are done, and stops listening."""
        try:
            jax.distributed.shutdown()
        except RuntimeError:
            self.pause()
            raise
        self._send(0, "")
        self._aborts.ignore()

    def _send(self, status: int, text: str) -> None:
        for connection in self._connections.values():
            try:
                connection.sendall(json.dumps([status, text]).encode() + b"\n")
            except OSError:
                continue  # it has gone

    def _listen(self) -> None:
        ended, deadline = None, None
        with selectors.DefaultSelector() as listening:
            for number, connection in self._connections.items():
                listening.register(connection, selectors.EVENT_READ, (number, bytearray()))
            while listening.get_map() and (deadline is None or time.monotonic() < deadline):
                for key, _ in listening.select(None if deadline is None else 0.1):
                    number, received = key.data
                    data = _read(key.fileobj)
                    received += data
                    if data and not received.endswith(b"\n"):
                        continue
                    listening.unregister(key.fileobj)
                    status, text = json.loads(received) if data else (INTERRUPTED, self._gone(number))
                    if status and ended is None and self._ends(status, text):
                        ended, deadline = status, time.monotonic() + _GRACE
        if ended is not None:
            os._exit(ended)
        self._alone.set()

    def _gone(self, number: int) -> str:
        which = f"process {number} of {self._processes}"
        return f"{which} is gone (killed, crashed, or its machine cannot be reached)"

    def _ends(self, status: int, text: str) -> bool:
        """Tells everybody, unless this process is ending by itself."""
        self._found.set()
        if self._process == 0:
            self._send(status, text)
        if status != INTERRUPTED:
            time.sleep(1)  # what is wrong there may be wrong here: this process has its own line about it
        if not self._ending.acquire(blocking=False):
            return False
        _say(self._advised(text) if status == INTERRUPTED else text)
        return True

    def _advised(self, text: str) -> str:
        try:
            return f"{text}; {self.advice()}"
        except OSError as error:
            return f"{text}; {error}"

    def _aborted(self) -> None:
        """JAX aborts a process when process 0 is gone, or when one that is there does not answer."""
        self.pause()
        self.take_over()
        which = f"process {self._process} of {self._processes}"
        _say(self._advised(f"{which} was aborted, the lines above say why"))


def begin(coordinator: str | None) -> Watch | None:
    """Connects the processes, after JAX has.

    Args:
        coordinator: `host:port` of process 0, where it was given.

    Returns:
        None when there is only one process, or when one of them cannot reach process 0.
    """
    process, processes = jax.process_index(), jax.process_count()
    if processes == 1:
        return None
    with _listener() as listener:
        address = {"hosts": _hosts(coordinator), "port": listener.getsockname()[1]}
        sent = json.dumps(address | {"token": secrets.token_hex(_TOKEN)}).encode().ljust(1024)
        received = multihost_utils.broadcast_one_to_all(np.frombuffer(sent, np.uint8))
        address = json.loads(bytes(received))
        token = bytes.fromhex(address["token"])
        try:
            if process == 0:
                connections = _accept(listener, processes, token)
            else:
                connections = {0: _reach(address["hosts"], address["port"], token, process)}
        except OSError:
            connections = None
    if not multihost_utils.process_allgather(np.array(connections is not None)).all():
        if process == 0:
            _say("the processes cannot watch each other: the death of one is noticed a minute or two later")
        return None
    return Watch(process, processes, connections)


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _hosts(coordinator: str | None) -> list[str]:
    """Under which names the others may find this machine."""
    if coordinator is not None:
        return [coordinator.rpartition(":")[0].strip("[]")]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it chooses the interface that leads out
            return [probe.getsockname()[0], socket.gethostname()]
        except OSError:
            return [socket.gethostname()]


def _accept(listener: socket.socket, processes: int, token: bytes) -> dict[int, socket.socket]:
    """A connection from each of the others; whoever does not know the token is none of them."""
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _CONNECT
    while len(connections) < processes - 1:
        listener.settimeout(max(deadline - time.monotonic(), 0.001))
        connection, _ = listener.accept()
        connection.settimeout(_GRACE)
        hello = _read(connection, len(token) + 4, socket.MSG_WAITALL)
        if not secrets.compare_digest(hello[:-4], token):
            connection.close()
            continue
        connections[int.from_bytes(hello[-4:])] = _kept(connection)
    return connections


def _reach(hosts: list[str], port: int, token: bytes, process: int) -> socket.socket:
    """A connection to process 0."""
    errors = []
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECT / 3)
            connection.sendall(token + process.to_bytes(4))
            return _kept(connection)
        except OSError as error:
            errors.append(error)
    raise errors[0]


def _kept(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _read(connection: socket.socket, size: int = 4096, flags: int = 0) -> bytes:
    """What has come; nothing when the connection is closed or broken."""
    try:
        return connection.recv(size, flags)
    except OSError:
        return b""


def _say(text: str) -> None:
    """One line, past any buffer that another thread may hold."""
    os.write(sys.stderr.fileno(), f"odjax: {text}\n".encode())


def _wait_for_the_end() -> NoReturn:
    while True:
        time.sleep(60)


class _Aborts:
    """Does something when C++ code aborts this process, before it ends.

    A handler of Python's `signal` would never run: the thread that aborts does not come back to Python.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        def handle(number: int) -> None:
            action()
            self.ignore()
            signal.raise_signal(signal.SIGABRT)  # comes when this handler returns, to the one before it

        self._set = ctypes.CDLL(None).signal
        self._set.argtypes, self._set.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
        self._before = self._set(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def ignore(self) -> None:
        """Leaves them to the handler that was there before."""
        self._set(signal.SIGABRT, self._before)
