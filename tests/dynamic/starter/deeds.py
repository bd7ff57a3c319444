"""
What the tasks of this project do.

``python -m tests.dynamic.starter.deeds race FOLDER 8`` makes one machine from so many processes at the same moment, and
``… reboot FOLDER 8`` has them all bring up a machine that was told to reboot. Each prints what it was answered.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from multiserver_schedule.servers.entries import ServerInfo
from multiserver_schedule.servers.providers.process import ProcessProvider

FOLDER = "STARTER_FOLDER"
COMMAND = ["sleep", "600"]


def provider(folder: str) -> ProcessProvider:
    return ProcessProvider("processes", {"command": COMMAND, "directory": folder}, fleet="tests")


def info(key: str) -> ServerInfo:
    return ServerInfo(name=key, key=key, type="default", provider="processes")


def start_a_worker() -> None:
    made = provider(os.environ[FOLDER]).create_server(info("from-a-run"))
    print(f"made {made.id}")


def start_a_worker_and_go_on() -> None:
    start_a_worker()
    Path(os.environ[FOLDER], "went-on").touch()
    time.sleep(600)


def at_once(what: str, folder: str, count: int) -> None:
    """Fork so many processes, which all begin when the pipe that they read from is closed."""
    read, write = os.pipe()
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            mine = provider(folder)
            if what == "race":
                mine.create_server(info("raced"))
            else:
                mine.has_started(f"raced@{mine.host}")
            os.write(1, f"{mine.find_by_tag('raced')[0].booted}\n".encode())
            os._exit(0)
        children.append(child)
    os.close(read)
    os.close(write)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    at_once(sys.argv[1], sys.argv[2], int(sys.argv[3]))
