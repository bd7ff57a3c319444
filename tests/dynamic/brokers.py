"""Brokers, and workers, for the tests of loads."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests import servers, stores

from .needs import REQUIRED


def marks_of(kind: str) -> list[pytest.MarkDecorator]:
    """Skip the test where this server is missing, but where nothing may be: there, starting it says what is missing."""
    missing = servers.missing(kind)
    return [pytest.mark.skipif(bool(missing) and not REQUIRED, reason=f"{kind}: {missing}")]


def eventually(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextlib.contextmanager
def worker(*command: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module of Python (``-m``) beside the block, and kill it, with all its own, at the block's end."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=stores.ROOT,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@contextlib.contextmanager
def raises_within(seconds: float, *errors: type[Exception]) -> Iterator[pytest.ExceptionInfo[Exception]]:
    began = time.monotonic()
    with pytest.raises(errors) as caught:
        yield caught
    assert time.monotonic() - began < seconds


def open_sockets(port: int) -> int:
    """Return how many connections to this port there are; established ones: state 01."""
    with open("/proc/net/tcp") as table:
        ends = [line.split()[2:4] for line in table.readlines()[1:]]
    return sum(state == "01" and int(remote.rpartition(":")[2], 16) == port for remote, state in ends)
