"""
Servers for what a run tells: ``python -m tests.listeners http FILE`` and ``… smtp FILE`` print their port and listen.

Each writes what it is told into the file, a line of JSON for each request or mail. What is asked for says how it
answers. Processes of their own, as a keeper that forks may have no threads.
"""

from __future__ import annotations

import json
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def write(**what: Any) -> None:
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps(what) + "\n")


class Web(BaseHTTPRequestHandler):
    """Answers as the path says: /500, /hang, /to/landed."""

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        write(path=self.path, agent=headers.get("user-agent"), login=headers.get("authorization"))
        path = self.path.partition("?")[0]
        if path == "/hang":
            time.sleep(60)
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/file" if path == "/to/ftp" else path[3:] + "?token=secret")
        else:
            self.send_response(int(path[1:]) if path[1:].isdigit() else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


class Mail(socketserver.StreamRequestHandler):
    """Never says hello."""

    def handle(self) -> None:
        write(connected=True)
        time.sleep(60)


if __name__ == "__main__":
    server: Any
    if sys.argv[1] == "http":
        server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    else:
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
