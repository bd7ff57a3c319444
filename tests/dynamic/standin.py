"""HTTP servers of the tests: one that answers as a cloud would, and one in front of another that spoils its answers."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    target: str

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    drip: float = 0.0
    """Seconds between two bytes of the body."""
    cut: int | None = None
    """So many bytes of the body, and then the connection ends; -1: before the first byte of the answer."""

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        return cls(status, json.dumps(value).encode(), {"content-type": "application/json", **headers})


class Server:
    """Answers on a port of its own, in threads, until it is closed."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one(self) -> None:
                parts = urlsplit(self.path)
                length = int(self.headers.get("content-length") or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                query = dict(parse_qsl(parts.query, keep_blank_values=True))
                request = Request(self.command, parts.path, query, headers, self.rfile.read(length), self.path)
                owner.requests.append(request)
                self.give(owner.answer(request))

            do_GET = do_POST = do_PUT = do_DELETE = handle_one

            def give(self, answer: Answer) -> None:
                if answer.cut is not None:
                    self.close_connection = True
                    if answer.cut < 0:
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                try:
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(answer.body)))
                    self.end_headers()
                    for at in range(len(answer.body)) if answer.drip else ():
                        self.wfile.write(answer.body[at : at + 1])
                        time.sleep(answer.drip)
                    if not answer.drip:
                        self.wfile.write(answer.body[: answer.cut])
                except OSError:
                    self.close_connection = True  # who asked did not wait

            def log_message(self, *args: Any) -> None: ...

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

        self._server = Quiet((HOST, 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, request: Request) -> Answer:
        raise NotImplementedError

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


Fault = Callable[[Request, Callable[[], Answer]], Answer | None]


class Proxy(Server):
    """
    Passes requests on to a server, unless a fault answers.

    A fault is given the request, and what passes it on; it returns another answer, or None where it is not meant.
    """

    def __init__(self, port: int) -> None:
        self.behind = port
        self.faults: list[Fault] = []
        super().__init__()

    def answer(self, request: Request) -> Answer:
        for fault in self.faults:
            answer = fault(request, lambda: self.passed_on(request))
            if answer is not None:
                return answer
        return self.passed_on(request)

    def passed_on(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(HOST, self.behind, timeout=30)
        try:
            headers = {name: value for name, value in request.headers.items() if name != "accept-encoding"}
            connection.request(request.method, request.target, request.body, headers)
            response = connection.getresponse()
            kept = {"content-type": response.getheader("content-type", "")}
            return Answer(response.status, response.read(), kept)
        finally:
            connection.close()
