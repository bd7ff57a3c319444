"""The process of one run: perform it, send the result, only then tell anybody, and leave by ``os._exit``."""

from __future__ import annotations

import atexit
import json
import logging
import mmap
import os
import select
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import IO, Any, Final, NoReturn

from django.db import connections

from ..entries import OutputFile
from ..signals import task_failed, task_started, task_succeeded
from . import kernel
from .base import Deliver, Tasks, boot_time, is_accompanied, starts_untold
from .beside import Beside, Ending, longest, steps_after, steps_before, with_events
from .current import CurrentRun, set_current_run
from .output import Opened, open_file, read_tail
from .perform import Verdict, act, announce, described, limited, perform
from .program import ProgramFailed, run_program
from .report import deliver_reports
from .runner import CHANNEL, LIFELINE, become

before_exit: Final[list[Callable[[], object]]] = []
"""Called in a run's process before it leaves (by ``os._exit``: atexit handlers of the parent are not called)."""

_UNTIL: Final = struct.Struct("=d")
_kept: Final[list[Any]] = []


def _identity(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


class Channel:
    """The run's end of its socket to the runner."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._same = _identity(fd)
        self._unread = b""

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send a message; False when the descriptor is closed, or is a file of the task's by now."""
        line = memoryview(json.dumps(message).encode() + b"\n")
        try:
            if _identity(self._fd) != self._same:
                return False
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError:
            return False
        return True

    def receive(self, timeout: float | None) -> dict[str, Any] | None:
        """Return the next message; None at the end of file or after ``timeout`` seconds."""
        while b"\n" not in self._unread:
            if timeout is not None and not select.select((self._fd,), (), (), timeout)[0]:
                return None
            chunk = os.read(self._fd, 1 << 16)
            if not chunk:
                return None
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self._fd


class Shown:
    """Where the keeper prints. A run prints into its record until its result is sent; what is logged then is shown."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = [(fd, _identity(fd)) for fd in fds]
        for fd in fds:
            os.set_inheritable(fd, False)

    def restore(self) -> None:
        """Have standard output and error go there again, for whatever has either open: handlers keep their streams."""
        _flush()
        for number, (fd, same) in enumerate(self._fds, 1):
            with suppress(OSError):  # closed, or a file of the task's by now: then they stay as they are
                if _identity(fd) == same:
                    os.dup2(fd, number)


class Printing:
    """A run's standard output and error, which may go to a file of the task's until the end of the run."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._record: Shown | None = None
        self._opened: Opened | None = None

    def open(self, file: OutputFile) -> None:
        """Print to the file from now on; raises OSError where it cannot be opened."""
        fd, self._opened = open_file(file.path, append=file.append)
        _flush()
        self._record = Shown([os.dup(1), os.dup(2)])
        for number in (1, 2):
            os.dup2(fd, number)
        os.close(fd)
        # Should this process not live to read what it wrote, the runner knows where it is.
        self._channel.send({"t": "output", "file": self._opened})

    def close(self) -> None:
        """Print into the record again, and first of all the end of what went to the file."""
        _flush()
        if self._record is None or self._opened is None:
            return
        self._record.restore()
        with suppress(Exception), limited(10.0):
            tail = memoryview(read_tail(self._opened))
            while tail:
                tail = tail[os.write(1, tail) :]
            self._channel.send({"t": "output", "file": None})


class Fork:
    """Goes on in the image of the keeper: the tasks are there already."""

    def __init__(self, tasks: Tasks, deliver: Deliver) -> None:
        self.tasks = tasks
        self.deliver = deliver
        self.keep: frozenset[int] = frozenset()

    def child(self, order: Mapping[str, Any], channel: int, lease: int) -> NoReturn:
        """Be the process of this run."""
        _forget_the_parent()
        _new_streams()
        run_child(self.tasks, order, Channel(channel), lease)

    def reporter(self, channel: int) -> NoReturn:
        """Deliver events, one at a time, until the end of file."""
        _forget_the_parent()
        run_reporter(Channel(channel), with_events(lambda: self.tasks, self.deliver), skip=True)


def main_spawned(tasks: Callable[[], Tasks], deliver: Deliver) -> NoReturn:
    """
    Be what the runner spawned this process for, a run or the reporter; called after ``django.setup()``, never returns.

    ``tasks`` returns the declared tasks by name; it is called for a run alone, and a fault of it is the run's failure.
    """
    channel = Channel(int(os.environ.pop(CHANNEL)))
    os.set_inheritable(channel.fd, False)
    _follow_the_runner()
    order = channel.receive(None)
    if order is None:
        os._exit(0)
    if order.get("role") == "reporter":
        run_reporter(channel, with_events(tasks, deliver), skip=False)
    os.set_inheritable(order["lease_fd"], False)
    _new_streams()
    declared: Tasks = {}
    try:
        declared = tasks()
    except BaseException as error:
        shown = Shown(order["shown_fds"])
        _finish(Verdict("failed", error=described(error), exception=error), None, order, channel, shown)
    run_child(declared, order, channel, order["lease_fd"])


def run_child(tasks: Tasks, order: Mapping[str, Any], channel: Channel, lease: int) -> NoReturn:
    """Perform the run, tell how it went, and leave."""
    began = boot_time()
    shown = Shown(order["shown_fds"])
    until = mmap.mmap(lease, mmap.PAGESIZE, access=mmap.ACCESS_READ)
    os.close(lease)
    run = CurrentRun.told(order, lambda: float(_UNTIL.unpack(until[: _UNTIL.size])[0]))
    set_current_run(run)
    task = tasks.get(order["task"])
    if task is None:
        error = f"{order['task']!r} is not declared in the process of the run: is its schedule.py the same?"
        _finish(Verdict("failed", error=error), None, order, channel, shown)
    known = task
    is_program = known.kind == "exec"
    beside = Beside(known, run, tell=channel.send)
    printing = Printing(channel)

    def begin() -> None:
        if not starts_untold(known):
            announce(task_started, known, run, limit=order["limit"])
        if (file := known.output_file) is not None:
            beside.open_output(file, lambda: printing.open(file))
        beside.take(steps_before(known))
        if is_program and not is_accompanied(known):
            _flush()
            become(list(order["argv"]), channel.fd)

    def act_and_wait() -> None:
        if is_program:
            _flush()
            run_program(order["argv"])
            return
        act(known)
        _join_threads()

    verdict = perform(known, run, begin=begin, act=act_and_wait)
    if isinstance(verdict.exception, ProgramFailed):
        verdict = Verdict("failed", error=str(verdict.exception))
    printing.close()
    _finish(verdict, _Finishing(beside, run, boot_time() - began), order, channel, shown)


@dataclass(frozen=True, slots=True)
class _Finishing:
    """What a run whose task is known is finished with."""

    beside: Beside
    run: CurrentRun
    seconds: float

    def is_final(self, retry: Mapping[str, Any] | None) -> bool:
        """Does no further attempt follow, should this one have failed? As ``Occurrence.is_retried`` sees it."""
        if retry is None:
            return True
        again_at = self.run.started_at + timedelta(seconds=self.seconds + retry["after"])
        return retry["before"] is not None and again_at >= datetime.fromisoformat(retry["before"])


def _finish(
    verdict: Verdict,
    finishing: _Finishing | None,
    order: Mapping[str, Any],
    channel: Channel,
    shown: Shown,
) -> NoReturn:
    """Send the result first, so that nothing that listens can change it; tell whom it concerns; leave."""
    limit = float(order["limit"])
    _flush()
    tell = finishing is not None and verdict.status != "skipped"
    steps = []
    if finishing is not None and tell:
        steps = steps_after(finishing.beside.task, verdict.status, final=finishing.is_final(order.get("retry")))
    sent = channel.send(
        {
            "t": "result",
            "status": verdict.status,
            "reason": verdict.reason,
            "error": verdict.error,
            "started": verdict.started,
            "tell": tell,
            "within": longest(steps),
        }
    )
    # The runner answers unless it has decided on another end before, which it will then tell of itself.
    answer = _agreement(channel, limit) if sent else None
    agreed = answer is not None
    shown.restore()
    if agreed:
        with suppress(BaseException), limited(limit):
            _tell_sentry(verdict.exception)
    if answer is not None and finishing is not None and tell:
        task, run = finishing.beside.task, finishing.run
        if verdict.status == "succeeded":
            seconds = (datetime.now(run.started_at.tzinfo) - run.started_at).total_seconds()
            announce(task_succeeded, task, run, limit=limit, seconds=seconds)
        else:
            details = {"status": "failed", "error": verdict.error, "exception": verdict.exception}
            announce(task_failed, task, run, limit=limit, **details)
        ending = Ending(verdict.status, verdict.error, answer.get("output", ""), finishing.seconds)
        finishing.beside.take(steps, ending)
    leave(0 if sent else 70, limit)


def _agreement(channel: Channel, limit: float) -> dict[str, Any] | None:
    """Return the runner's word that the result is taken, or None where it has decided on another end."""
    until = boot_time() + limit
    while (message := channel.receive(max(0.0, until - boot_time()))) is not None:
        if "t" in message:  # the order has none, which a forked process did not need to read
            return message if message["t"] == "tell" else None
    return None


def run_reporter(channel: Channel, deliver: Deliver, *, skip: bool) -> NoReturn:
    """Deliver events until the end of file, then leave."""
    if skip:
        channel.receive(None)  # the order, which a spawned process needs and a forked one does not
    deliver_reports(channel.receive, channel.send, deliver)
    leave(0, 5.0)


def leave(status: int, limit: float) -> NoReturn:
    """Flush and save what would be lost by ``os._exit``, each step for ``limit`` seconds at most; then leave."""
    steps = (*before_exit, _stop_threads, atexit._run_exitfuncs, _close_connections, _flush_telemetry, _save_coverage)
    for step in (*steps, _flush, logging.shutdown, _flush):
        try:
            with limited(limit):
                step()
        except BaseException:
            with suppress(BaseException):
                traceback.print_exc()
    os._exit(status)


# --- the start of a process


def _forget_the_parent() -> None:
    atexit._clear()  # what the keeper registered is the keeper's to do


def _new_streams() -> None:
    """Have print() write to the pipe, whatever the parent's ``sys.stdout`` was (a capture, a wrapper)."""
    _kept.extend((sys.stdin, sys.stdout, sys.stderr))  # an object that is dropped may close its descriptor

    def stream(fd: int) -> IO[str]:
        return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)

    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = stream(1), stream(2)


def _follow_the_runner() -> None:
    """Where the kernel does not end us with the runner, watch a pipe that only the runner holds open."""
    if (fd := os.environ.pop(LIFELINE, None)) is None:
        return

    def watch() -> None:
        while os.read(int(fd), 1):
            pass
        kernel.kill_group(os.getpgrp(), 9)

    os.set_inheritable(int(fd), False)
    threading.Thread(target=watch, name="multiserver_schedule: watches the runner", daemon=True).start()


# --- its end


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, *_kept[1:3]):
        with suppress(Exception):
            stream.flush()


def _join_threads() -> None:
    """
    Wait for the threads that the task started and did not wait for, as the interpreter does at its end.

    Idle workers of an executor are not waited for: they are ended by ``_stop_threads``, after the result.
    """
    futures = sys.modules.get("concurrent.futures.thread")
    workers = set(getattr(futures, "_threads_queues", ()))
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon and thread not in workers:
            thread.join()


def _stop_threads() -> None:
    shutdown: Callable[[], None] | None = getattr(threading, "_shutdown", None)
    if shutdown is not None:  # what multiprocessing calls in its processes, which leave by os._exit too
        shutdown()


def _close_connections() -> None:
    for connection in connections.all(initialized_only=True):
        with suppress(Exception):
            connection.close()
        if hasattr(connection, "close_pool"):
            with suppress(Exception):
                connection.close_pool()


def _tell_sentry(exception: BaseException | None) -> None:
    """
    Capture an exception that nobody else will show to Sentry, for we caught it.

    Its logging integration captures our ERROR record too; the SDK drops the second event of one exception, unless
    that part of it was turned off.
    """
    sentry = sys.modules.get("sentry_sdk")
    if sentry is None or not isinstance(exception, Exception):
        return
    client = sentry.get_client()
    if not client.is_active():
        return
    if client.get_integration("dedupe") is None and client.get_integration("logging") is not None:
        return
    sentry.capture_exception(exception)


def _flush_telemetry() -> None:
    if (sentry := sys.modules.get("sentry_sdk")) is not None:
        sentry.flush(timeout=5)
    for name, getter in (
        ("opentelemetry.trace", "get_tracer_provider"),
        ("opentelemetry.metrics", "get_meter_provider"),
        ("opentelemetry._logs", "get_logger_provider"),
    ):
        if (module := sys.modules.get(name)) is not None:
            with suppress(Exception):
                flush = getattr(getattr(module, getter)(), "force_flush", None)
                if flush is not None:
                    flush()


def _save_coverage() -> None:
    if (module := sys.modules.get("coverage")) is not None and hasattr(module, "Coverage"):
        measured = module.Coverage.current()
        if measured is not None:
            measured.stop()
            measured.save()
