"""The keeper's side of the runner: orders out, answers in, and an end to a runner that does not answer."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from django.db import connections

from ..entries import Claim, Occurrence, Outcome
from ..exceptions import ScheduleError, UnsafeTransaction
from . import kernel
from .base import Deliver, Ended, Event, Message, Runner, Started, Tasks, Vanished, boot_time, is_accompanied
from .beside import wants_output
from .child import Fork
from .perform import clean
from .pipe import Lines, descriptors
from .runner import serve

Mode = Literal["fork", "spawn", "inline"]
_LONGEST_WAIT: Final = 1.0
# The package itself would load Django, which the runner has no use for: this stands in for its __init__.
BARE: Final = (
    "import sys, types; package = types.ModuleType('multiserver_schedule'); package.__path__ = [sys.argv.pop(1)]; "
    "sys.modules[package.__name__] = package; "
)
_BOOT: Final = BARE + "from multiserver_schedule.run.runner import main; main(sys.argv[1:])"
PACKAGE: Final = str(Path(__file__).resolve().parents[1])


def usable_mode(requested: str) -> Mode:
    """Return how runs can be run here: what was asked for, and for "auto" what this process allows."""
    if requested in ("fork", "spawn", "inline"):
        return requested  # type: ignore[return-value]
    if not hasattr(os, "fork"):
        return "inline"
    return "fork" if kernel.LINUX and _threads() == 1 else "spawn"


def _threads() -> int:
    """Count the threads of this process, those of C libraries too."""
    counted = threading.active_count()
    with suppress(OSError):
        for _ in range(20):  # one that has just been joined may be on its way out still
            counted = max(len(os.listdir("/proc/self/task")), threading.active_count())
            if counted == 1 or threading.active_count() > 1:
                break
            time.sleep(0.002)
    return counted


@dataclass(slots=True)
class _Known:
    claim: Claim
    pid: int | None = None


class ProcessRunner(Runner):
    """
    Runs each claim in a process of its own, under a runner that holds the deadlines.

    ``fork``: runner and runs are images of this process. ``spawn``: fresh processes, for a keeper that has threads;
    a run's is started by ``child_command``, which sets up Django and calls ``child.main_spawned``.
    """

    def __init__(
        self,
        tasks: Tasks,
        *,
        deliver: Deliver,
        mode: Literal["fork", "spawn"] = "fork",
        server: str = "",
        heartbeat: float,
        child_command: Sequence[str] | None = None,
        report_limit: float = 10.0,
    ) -> None:
        if mode == "spawn" and not child_command:
            raise ValueError("A runner that spawns needs the child_command of a run's process.")
        self.tasks = tasks
        self.deliver = deliver
        self.mode = mode
        self.server = server
        self.heartbeat = heartbeat
        self.child_command = list(child_command or ())
        self.report_limit = report_limit
        self.pid: int | None = None
        """Of the runner."""
        self._pipe: Lines | None = None
        self._spawned: subprocess.Popen[bytes] | None = None
        self._known: dict[str, _Known] = {}
        self._messages: list[Message] = []
        self._asked: deque[tuple[int, float]] = deque()
        self._turn = 0
        self._last_turn = self._heard = boot_time()
        self._reports: dict[int, Event] = {}
        """Not yet taken by a reporter: they go to the next runner, if this one vanishes."""
        self._telling: set[int] = set()
        self._adopted_before = False
        self._pardoned = False

    # --- start

    def start(self) -> None:
        """
        Start the runner's process, or the next one after ``Vanished``.

        Raises UnsafeTransaction inside a transaction, and ScheduleError while a connection is open or (``fork``) while
        this process has more than one thread: a fork would share the one and lose the others.
        """
        if self.pid is not None:
            raise ScheduleError("The runner has been started already.")
        if not hasattr(os, "fork"):
            raise ScheduleError('This system cannot fork or end processes; set RUNNER to "inline".')
        ours, theirs = self._fork() if self.mode == "fork" else self._spawn()
        os.close(theirs)
        self._pipe = Lines(ours)
        self._adopted_before = kernel.adopt_orphans()
        self._last_turn = boot_time()
        self._asked.clear()
        for n, event in self._reports.items():
            self._pipe.send({"t": "report", "n": n, "event": event})

    def _fork(self) -> tuple[int, int]:
        _refuse_shared_connections()
        if _threads() > 1:
            names = ", ".join(thread.name for thread in threading.enumerate()[1:]) or "of a C library"
            raise ScheduleError(f'A process with other threads ({names}) cannot fork safely; set RUNNER to "spawn".')
        gc.freeze()  # a collection in a child would copy every page that it shares: 26 MB instead of 12
        _flush()
        ours, theirs = descriptors()
        inherited = kernel.open_descriptors() - {ours, theirs}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            keeper = os.getpid()
            pid = os.fork()
            if pid == 0:
                os.close(ours)
                serve(theirs, Fork(self.tasks, self.deliver), report_limit=self.report_limit, inherited=inherited)
        finally:
            if os.getpid() == keeper:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.pid = pid
        return ours, theirs

    def _spawn(self) -> tuple[int, int]:
        _flush()
        ours, theirs = descriptors()
        self._spawned = subprocess.Popen(
            [sys.executable, "-c", _BOOT, PACKAGE, str(theirs), str(self.report_limit), *self.child_command],
            pass_fds=(theirs,),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._spawned.pid
        return ours, theirs

    # --- orders

    def run(self, claim: Claim, *, until: float, finish_by: float | None) -> None:
        """Run it; its lease ends at ``until`` (boot time) unless renewed, its limit at ``finish_by``."""
        task, occurrence = claim.task, claim.occurrence
        if self._pipe is None:
            self._messages.append(Vanished((claim.owner,), "there is no runner"))
            return
        self._known[claim.owner] = _Known(claim)
        self._send(
            {
                "t": "run",
                "id": claim.owner,
                "task": task.name,
                "name": occurrence.row,
                "due_at": occurrence.due_at.isoformat(),
                "started_at": claim.acquired_at.isoformat(),
                "fence": claim.fence,
                "key": occurrence.key,
                "attempt": occurrence.attempt,
                "trigger": occurrence.trigger,
                "server": claim.server or self.server,
                "argv": [str(word) for word in task.target] if task.kind == "exec" else None,  # type: ignore[union-attr]
                "by_child": bool(task.filters or task.output_file) or is_accompanied(task),
                "output": wants_output(task),
                "retry": _retry(occurrence),
                "lease": occurrence.lease.total_seconds(),
                "until": until,
                "finish_by": finish_by,
                "allowed": None if task.limit is None else task.limit.total_seconds(),
            },
            asks=True,
        )

    def renew(self, until: Mapping[str, float]) -> None:
        """Move the deadlines of these owners on: only those whose renewal the store confirmed."""
        self._send({"t": "renew", "until": dict(until)}, asks=True)

    def end(self, owner: str, why: str) -> None:
        """End this run's processes; ``Ended`` follows. ``why``: "lost", "stopping" or "cancelled"."""
        self._send({"t": "end", "id": owner, "why": why}, asks=True)

    def report(self, event: Event) -> None:
        """Have an event delivered by the reporter process, in order; never blocks, nor raises a fault of a receiver."""
        self._turn += 1
        self._reports[self._turn] = event
        if self._pipe is not None:
            self._pipe.send({"t": "report", "n": self._turn, "event": event})

    def _send(self, message: Mapping[str, Any], *, asks: bool) -> None:
        if self._pipe is None:
            return
        if asks:
            self._turn += 1
            self._asked.append((self._turn, boot_time()))
            message = {**message, "n": self._turn}
        self._pipe.send(message)

    # --- answers

    def poll(self, timeout: float) -> list[Message]:
        """Return what happened; wait at most ``timeout`` seconds (never longer than 1) for the first."""
        until = boot_time() + max(0.0, min(timeout, _LONGEST_WAIT))
        while True:
            self._read()
            self._judge()
            if self._messages:
                messages, self._messages = self._messages, []
                return messages
            left = until - boot_time()
            if left <= 0:
                return []
            if self._pipe is None:
                time.sleep(left)
            else:
                writing = (self._pipe.fd,) if self._pipe.pending else ()
                select.select((self._pipe.fd,), writing, (), min(left, self.heartbeat / 2))
                self._pipe.flush()

    def check(self) -> None:
        """Ping the runner now and then; kill one that is silent for a heartbeat (``Vanished`` follows in poll)."""
        self._read()
        self._judge()
        if not self._asked:
            self._send({"t": "ping"}, asks=True)

    def _read(self) -> None:
        if self._pipe is not None:
            self._take(self._pipe.receive())
            if self._pipe.closed:
                self._bury("it ended, or was killed")

    def _take(self, messages: list[dict[str, Any]]) -> None:
        if messages:
            self._heard = boot_time()
        for message in messages:
            kind, owner = message["t"], message.get("id", "")
            if kind == "seen":
                while self._asked and self._asked[0][0] <= message["n"]:
                    self._asked.popleft()
                    self._pardoned = False
            elif kind == "started":
                if known := self._known.get(owner):
                    known.pid = message["pid"]
                    self._messages.append(Started(owner, message["pid"]))
            elif kind == "ended":
                if self._known.pop(owner, None):
                    self._messages.append(Ended(owner, _outcome(message), message["told"]))
            elif kind == "taken":
                if self._reports.pop(message["n"], None) is not None:
                    self._telling.add(message["n"])
            elif kind == "told":
                self._telling.discard(message["n"])

    def _judge(self) -> None:
        """Kill a runner that has been silent for a heartbeat; the keeper has read its pipe before."""
        now = boot_time()
        slept, self._last_turn = now - self._last_turn, now
        # One that is busy with many orders answers them one by one: whatever it says is a sign of life.
        if not self._asked or self._pipe is None or now - max(self._asked[0][1], self._heard) <= self.heartbeat:
            return
        if slept > self.heartbeat and not self._pardoned:
            # The keeper itself was away; when the whole machine was, so was the runner: give it a heartbeat more.
            self._asked = deque([(self._asked[-1][0], now)])
            self._pardoned = True
        else:
            self._bury(f"it had not answered for {self.heartbeat:g} s")

    # --- the end

    def _bury(self, why: str) -> None:
        """KILL the runner first, then what it ran, and tell whose runs are gone."""
        assert self.pid is not None
        assert self._pipe is not None
        table = kernel.processes() if self._known else []
        strays: set[int] = set()
        for known in self._known.values():
            if known.pid is not None:
                strays |= kernel.descendants(known.pid, table)
        kernel.kill(self.pid, signal.SIGKILL)
        _await_death(self.pid)
        self._take(self._pipe.receive())  # what it still said counts
        if self._known:
            self._sweep(strays)
        self._leave_runner()
        self._messages.append(Vanished(tuple(self._known), why))
        self._known.clear()

    def _sweep(self, strays: set[int]) -> None:
        """
        KILL what a dead runner's runs have left, until nothing of it is found.

        The runner is a zombie still, so that its number, which is that of the session of its runs, is nobody else's.
        What left the session is known by its parents or by its environment; this process's own children never are.
        """
        assert self.pid is not None
        me = os.getpid()
        for known in self._known.values():
            if known.pid is not None and not kernel.LINUX:
                kernel.kill_group(known.pid, signal.SIGKILL)
        for pid in strays - {me, self.pid}:
            kernel.kill(pid, signal.SIGKILL)
        until = boot_time() + 1.0
        while boot_time() < until:
            table = kernel.processes()
            ours = {p.pid for p in table if p.session == self.pid and p.pid != self.pid}
            alive = {p.pid for p in table if p.pid in ours | strays and not p.zombie}
            alive = (alive | kernel.marked(self._known, table)) - {me, self.pid}
            for process in table:
                if process.zombie and process.parent == me and process.pid in ours | strays:
                    with suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
            if not alive:
                return
            strays |= alive
            for pid in alive:
                kernel.kill(pid, signal.SIGKILL)
            time.sleep(0.003)

    def _leave_runner(self) -> None:
        assert self.pid is not None
        assert self._pipe is not None
        self._pipe.close()
        self._pipe = None
        with suppress(ChildProcessError):
            _, status = os.waitpid(self.pid, os.WNOHANG)
            if self._spawned is not None:
                self._spawned.returncode = status  # it has been waited for: no warning, no second wait
        self._spawned = None
        self.pid = None
        self._asked.clear()
        self._telling.clear()
        kernel.adopt_orphans(self._adopted_before)

    def close(self, timeout: float) -> None:
        """
        Deliver the reports that wait (at most ``timeout`` seconds), end what still runs, and end the runner.

        What happened meanwhile is returned by the next ``poll``.
        """
        if self._pipe is not None:
            if not self._known:
                # A daemon that a run left behind is not this process's to reap.
                kernel.adopt_orphans(self._adopted_before)
            self._pipe.send({"t": "close", "within": timeout})
            until = boot_time() + timeout + 1.5
            while not self._pipe.closed and (left := until - boot_time()) > 0:
                writing = (self._pipe.fd,) if self._pipe.pending else ()
                select.select((self._pipe.fd,), writing, (), left)
                self._pipe.flush()
                self._take(self._pipe.receive())
            if self._known:
                self._bury("it was closed")
            else:
                assert self.pid is not None
                if not self._pipe.closed:
                    kernel.kill(self.pid, signal.SIGKILL)
                _await_death(self.pid)
                self._leave_runner()
        if self._reports:
            print(f"multiserver_schedule: {len(self._reports)} reports could not be delivered", file=sys.stderr)
            self._reports.clear()


def _retry(occurrence: Occurrence) -> dict[str, Any] | None:
    """Return by what the run's process may know whether its failure leads to another attempt."""
    after, before = occurrence.retry_after, occurrence.next_due_at
    if after is None:
        return None
    return {"after": after.total_seconds(), "before": None if before is None else before.isoformat()}


def _outcome(message: Mapping[str, Any]) -> Outcome:
    return Outcome(
        status=message["status"],
        reason=message.get("reason", ""),
        error=clean(message.get("error", "")),
        output=clean(message["output"]),
        started=message.get("started", True),
        seconds=message["seconds"],
    )


def _await_death(pid: int, most: float = 2.0) -> None:
    """Wait until a child is a zombie, and leave it one."""
    until = boot_time() + most
    with suppress(ChildProcessError):
        while boot_time() < until:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                return
            time.sleep(0.001)


def _refuse_shared_connections() -> None:
    for connection in connections.all(initialized_only=True):
        if connection.in_atomic_block:
            raise UnsafeTransaction(
                f"The runner cannot be forked inside a transaction (of {connection.alias!r}): its runs would not see "
                "what is uncommitted. In a TestCase use multiserver_schedule.testing.run_due(), which runs inline."
            )
        if connection.connection is not None:
            raise ScheduleError(
                f"The runner cannot be forked while the connection {connection.alias!r} is open: two processes would "
                "use one session. Call connections.close_all() before."
            )


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
