"""A TCP proxy between a site and the server: it passes everything on, cuts, or swallows (a half-open connection)."""

import contextlib
import select
import socket
import threading
from types import TracebackType
from typing import Self


class Proxy:
    """Listens on ``port`` of this machine and passes on to ``target``; TLS goes through as it is."""

    def __init__(self, port: int, target: int) -> None:
        self.port, self.target = port, target
        self.mode = "pass"  # pass | cut | swallow
        self._ended = threading.Event()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", port))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self._ended.set()
        self._listener.close()
        self.cut()
        self._thread.join(5)

    def cut(self) -> None:
        """Close every connection, and refuse new ones until ``mode`` is "pass" again."""
        self.mode = "cut"
        with self._lock:
            for pair in self._pairs:
                for each in pair:
                    with contextlib.suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()

    def swallow(self) -> None:
        """Keep every connection open, and let nothing through: what a broken firewall does."""
        self.mode = "swallow"

    def mend(self) -> None:
        """Pass on again; connections in which bytes were lost are cut, as their ends would find out."""
        self.cut()
        self.mode = "pass"

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                if not select.select([self._listener], [], [], 0.2)[0]:
                    continue
                near, _ = self._listener.accept()
            except (OSError, ValueError):
                return
            if self.mode == "cut":
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._pairs.append((near, far))
            threading.Thread(target=self._pump, args=(near, far), daemon=True).start()

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            while not self._ended.is_set():
                if self.mode == "swallow":
                    self._ended.wait(0.2)
                    continue
                try:
                    for source in select.select([near, far], [], [], 0.2)[0]:
                        content = source.recv(1 << 16)
                        if not content:
                            return
                        (far if source is near else near).sendall(content)
                except (OSError, ValueError):
                    return
