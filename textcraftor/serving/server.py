"""`textcraftor serve`: a proven model on the loopback interface.

    GET  /ping                                        200 while the model is there
    POST /invocations  {"prompt": "...", "seed": 0}   200 image/png
                                                      408 too slow, 413 body too large, 422 bad request, 429 queue full

Requests wait in a queue of limited length, and one worker draws as many of them at once as fit a batch.
"""

import contextlib
import http.server
import io
import json
import math
import queue
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

from textcraftor.errors import ConfigError, UserError
from textcraftor.loopback import LoopbackServer
from textcraftor.serving.service import BATCH, Request, Service

PORT: Final = 8780
LARGEST: Final = 16_384  # bytes of a request
WAITING: Final = 64  # requests in the queue
PATIENCE: Final = 600.0  # seconds until a picture
READING: Final = 15.0  # seconds for a request to arrive whole, from its first byte
IDLE: Final = 60.0  # seconds until that byte
CONNECTIONS: Final = 256  # open at once; each has a thread
DRAINED: Final = 64  # blocks of 64 KiB that are read and forgotten of a refused request


@dataclass
class Job:
    """A request and its answer: a status and a body."""

    request: Request
    done: threading.Event = field(default_factory=threading.Event)
    status: int = 500
    body: bytes = b""


class ModelServer(LoopbackServer):
    """Serves a model at http://127.0.0.1:PORT. port: 0 takes a free one.  Raises ConfigError when the port is taken."""

    request_queue_size = 128

    def __init__(self, service: Service, port: int = PORT, waiting: int = WAITING) -> None:
        self.service, self.jobs, self.free = service, queue.Queue[Job](waiting), threading.Semaphore(CONNECTIONS)
        super().__init__(port, _Handler)
        threading.Thread(target=self._work, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:  # no thread for it: the client sees a closed connection
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def _work(self) -> None:
        while True:
            batch = [self.jobs.get()]
            while len(batch) < BATCH and not self.jobs.empty():
                batch.append(self.jobs.get())
            try:
                for job, picture in zip(batch, self.service.draw([job.request for job in batch]), strict=True):
                    job.status, job.body = 200, picture
            except Exception:  # one of them: which?
                for job in batch:
                    self._draw_alone(job)
            for job in batch:
                job.done.set()

    def _draw_alone(self, job: Job) -> None:
        try:
            job.status, job.body = 200, self.service.draw([job.request])[0]
        except UserError as error:
            job.status, job.body = 422, str(error).encode()
        except Exception as error:  # the worker must outlive every request
            job.status, job.body = 500, f"{type(error).__name__} while drawing".encode()


class _Arriving(io.RawIOBase):
    """The bytes that a client sends. All of a request must come within READING seconds of its first byte, however spread.

    Reading raises TimeoutError afterwards.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.restart()

    def restart(self) -> None:
        """Wait for another request."""
        self.deadline = math.inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = min(IDLE, self.deadline - time.monotonic())
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        count = self.connection.recv_into(buffer)
        self.deadline = min(self.deadline, time.monotonic() + READING)
        return count


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ModelServer
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # what is no HTTP at all is refused with a status line, too

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.arriving = _Arriving(self.connection)
        self.rfile = io.BufferedReader(self.arriving)

    def handle_one_request(self) -> None:
        self.arriving.restart()
        super().handle_one_request()

    def do_GET(self) -> None:
        self._send(*((200, b"") if self.path in ("/ping", "/health") else (404, b"POST /invocations draws a picture")))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/invocations":
            return self._refuse(404, "POST /invocations draws a picture")
        if not (length.isascii() and length.isdecimal()):
            return self._refuse(411, "Content-Length is missing")
        if len(length) > 12 or int(length) > LARGEST:
            return self._refuse(413, f"The request has {length[:12]} bytes, and at most {LARGEST} are allowed")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            return self._refuse(408, f"The request did not arrive within {READING:.0f} seconds")
        try:
            job = Job(Request.read(json.loads(body)))
        except (ValueError, RecursionError):
            return self._send(422, b'The request is no JSON. An example: {"prompt": "a small red circle", "seed": 0}')
        except ConfigError as error:
            return self._send(422, str(error).encode())
        try:
            self.server.jobs.put_nowait(job)
        except queue.Full:
            return self._send(429, b"Too many requests are waiting. Try again", **{"Retry-After": "1"})
        if not job.done.wait(PATIENCE):
            return self._send(503, b"The picture took too long")
        return self._send(job.status, job.body)

    def _refuse(self, status: int, why: str) -> None:
        """Answer without reading the body, so the connection cannot go on."""
        self.close_connection = True
        self._send(status, why.encode(), Connection="close")
        # Closing while bytes are unread resets the connection, and the client may lose the answer.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.arriving.deadline = time.monotonic() + READING
            for _ in range(DRAINED):
                if not self.rfile.read1(65_536):
                    break

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        kind = "image/png" if status == 200 and body else "text/plain; charset=utf-8"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.connection.settimeout(READING)
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: prompts may be private."""
