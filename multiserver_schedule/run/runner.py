"""
The runner: starts a process for each run, ends what must end, and holds the deadline of every lease.

It has no connection to any store and runs no user's code, so nothing that they do can hold it up: it never waits but
for the next thing to happen. The standard library is all that it needs: where it is a process of its own (``spawn``)
it starts without setting up Django.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, Protocol

from ..faults import point
from . import kernel
from .base import Margins, boot_time
from .output import TAIL, Opened, read_tail
from .pipe import Lines, Message, descriptors

CHANNEL: Final = "MULTISERVER_SCHEDULE_CHANNEL"
"""Names the descriptor of a spawned process's orders, in its environment."""
LIFELINE: Final = "MULTISERVER_SCHEDULE_LIFELINE"
"""Names a descriptor whose end of file says that the runner is gone, where no signal tells."""
OUTPUT_TAIL: Final = TAIL
_MOST_TROUBLE: Final = 255  # as much as a row of the history holds
_READING: Final = 2.0  # how long the file of a run that died may be read
_CHUNK: Final = 1 << 18
_LONGEST_WAIT: Final = 1.0  # poll clocks stand still in suspend, so a deadline is looked at this often
_GRACE: Final = 5.0
_STARTUP: Final = 60.0  # how long a spawned reporter may take to set up Django
_MOST_REPORTS: Final = 10_000
_UNTIL: Final = struct.Struct("=d")


class Launcher(Protocol):
    """What a process that was forked for a run, or for the reports, goes on with. Neither returns."""

    @property
    def keep(self) -> frozenset[int]:
        """Descriptors of its own that such a process needs."""

    def child(self, order: Message, channel: int, lease: int) -> NoReturn:
        """Be the process of this run."""

    def reporter(self, channel: int) -> NoReturn:
        """Deliver events, one at a time, until the end of file."""


class Spawn:
    """Goes on as a fresh process of the project's command."""

    def __init__(self, command: list[str], *, lifeline: bool = not kernel.LINUX) -> None:
        self.command = command
        self.lifeline = os.pipe() if lifeline else None

    @property
    def keep(self) -> frozenset[int]:
        """Descriptors of its own that such a process needs."""
        return frozenset(self.lifeline[:1] if self.lifeline else ())

    def child(self, order: Message, channel: int, lease: int) -> NoReturn:
        """Be the process of this run."""
        for fd in (lease, *order["shown_fds"]):
            os.set_inheritable(fd, True)
        self._go_on(channel)

    def reporter(self, channel: int) -> NoReturn:
        """Deliver events, one at a time, until the end of file."""
        self._go_on(channel)

    def _go_on(self, channel: int) -> NoReturn:
        os.set_inheritable(channel, True)
        told = {CHANNEL: str(channel)}
        if self.lifeline is not None:
            os.set_inheritable(self.lifeline[0], True)
            told[LIFELINE] = str(self.lifeline[0])
        os.execvpe(self.command[0], self.command, {**os.environ, **told})


@dataclass(eq=False, slots=True)
class _Run:
    id: str
    pid: int
    order: Message
    began: float
    until: float
    margins: Margins
    finish_by: float | None
    channel: Lines
    output: int
    lease: mmap.mmap
    grace: float
    tail: bytearray = field(default_factory=bytearray)
    cut: bool = False
    verdict: Message | None = None
    told: bool = False
    is_program: bool = False
    """Is it the user's program by now? Then its exit status is the result."""
    leave_by: float | None = None
    leave_within: float = 0.0
    doing: str = ""
    """The hook, ping or mail that its process is at."""
    trouble: list[str] = field(default_factory=list)
    """What went wrong beside the run."""
    file: Opened | None = None
    """What it prints to, as long as the end of that is not in ``tail``."""
    reader: int | None = None
    """The process that reads it, where the run's own is dead."""
    read_by: float = 0.0
    ending: str = ""
    kill_at: float | None = None
    killed: bool = False
    strays: dict[int, int] = field(default_factory=dict)
    """Who left its group, and was signalled nevertheless: pids, and since when they have been theirs."""
    status: int | None = None
    """The wait status, once the process is reaped; the run is over when its group is gone too."""

    def write_lease(self) -> None:
        """Let ``current_run().check()`` see how long the run may go on."""
        until = self.until - self.margins.term if self.ending != "lost" else 0.0
        self.lease[: _UNTIL.size] = _UNTIL.pack(until)


@dataclass(eq=False, slots=True)
class _Reporter:
    pid: int
    channel: Lines
    limit_at: float
    ready: bool = False
    given_up: bool = False
    event: tuple[int, Message] | None = None


class Serve:
    """The loop of the runner's process."""

    def __init__(self, fd: int, launcher: Launcher, *, report_limit: float, inherited: frozenset[int]) -> None:
        self.keeper = Lines(fd)
        self.launcher = launcher
        self.report_limit = report_limit
        self.inherited = inherited
        """What was open before the runner opened anything: log files and the like, which a child may go on with."""
        self.shown = (os.dup(1), os.dup(2))
        """Where this process prints: a run prints into its record, and what it logs after its end comes here."""
        self.pid = os.getpid()
        self.runs: dict[str, _Run] = {}
        self.reports: deque[tuple[int, Message]] = deque()
        self.reporter: _Reporter | None = None
        self.close_by: float | None = None
        self.timer = kernel.Timer()
        self.selector = selectors.DefaultSelector()
        self.awake, wake = os.pipe()
        for end in (self.awake, wake):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.selector.register(self.awake, selectors.EVENT_READ)
        self.selector.register(fd, selectors.EVENT_READ)

    def forever(self) -> None:
        """Go on until the keeper is gone, or has closed and everything is done."""
        while True:
            self._wait()
            for message in self.keeper.receive():
                self._obey(message)
            if self.keeper.closed:
                break
            for run in list(self.runs.values()):
                self._read_output(run)
                self._read_channel(run)
            self._reap()
            self._end_what_must()
            self._deliver()
            if self.close_by is not None and self._all_done():
                break
            if self.keeper.pending:
                self.keeper.flush()
        self._end_everything()

    # --- the keeper's orders

    def _obey(self, message: Message) -> None:
        kind = message["t"]
        if kind == "run" and boot_time() >= message["until"] - Margins.of(message["lease"]).term:
            # The order waited while this process or the keeper was stopped: another server may be running it by now.
            ended = {"t": "ended", "id": message["id"], "told": False, "seconds": 0.0, "output": ""}
            self.keeper.send(ended | _bad("lost", "its lease was over before it could start"))
        elif kind == "run" and message["id"] not in self.runs:
            try:
                self._start(message)
            except OSError as error:  # no more processes, descriptors or memory: this run's trouble alone
                ended = {"t": "ended", "id": message["id"], "told": False, "seconds": 0.0, "output": ""}
                self.keeper.send(ended | _bad("failed", f"no process could be started for the run: {error}"))
        elif kind == "renew":
            for owner, until in message["until"].items():
                if (run := self.runs.get(owner)) and until > run.until:
                    run.until = until
                    run.write_lease()
        elif kind == "end":
            if run := self.runs.get(message["id"]):
                self._end(run, message["why"])
        elif kind == "report":
            if len(self.reports) >= _MOST_REPORTS:
                dropped, event = self.reports.popleft()
                self._say(f"report dropped, too many wait: {_brief(event)}")
                # The keeper keeps none of it either, for the runner that would come after this one.
                self.keeper.send({"t": "taken", "n": dropped})
                self.keeper.send({"t": "told", "n": dropped})
            self.reports.append((message["n"], message["event"]))
        elif kind == "close":
            self.close_by = boot_time() + message["within"]
            for run in self.runs.values():
                self._end(run, "stopping")
        if "n" in message and kind != "report":
            self.keeper.send({"t": "seen", "n": message["n"]})

    def _start(self, order: Message) -> None:
        lease = _shared_memory()
        ours, theirs = descriptors()
        read, write = os.pipe()
        channel = Lines(ours)
        program = order["argv"] if order["argv"] and not order["by_child"] else None
        margins = Margins.of(order["lease"])
        now = boot_time()
        order = {**order, "lease_fd": lease, "shown_fds": self.shown, "limit": self.report_limit}
        mapped = mmap.mmap(lease, mmap.PAGESIZE)
        mapped[: _UNTIL.size] = _UNTIL.pack(order["until"] - margins.term)
        channel.send({key: value for key, value in order.items() if key != "t"})
        # Before there is a process that it could have to end: this one may be stopped at any moment from there on.
        self.timer.no_later_than(order["until"] - margins.timer)
        try:
            pid = self._fork()
        except OSError:
            mapped.close()
            for fd in (ours, theirs, read, write, lease):
                os.close(fd)
            raise
        if pid == 0:
            with _no_way_back():
                os.dup2(write, 1)
                os.dup2(write, 2)
                os.environ.update(environment(order))
                if program is not None:
                    os.set_blocking(theirs, True)
                    become(program, theirs)
                kernel.close_all_but(self.inherited | self.launcher.keep | {0, 1, 2, theirs, lease, *self.shown})
                os.set_blocking(theirs, True)
                self.launcher.child(order, theirs, lease)
        point("after_fork")
        for fd in (theirs, write, lease):
            os.close(fd)
        os.set_blocking(read, False)
        run = _Run(
            id=order["id"],
            pid=pid,
            order=order,
            began=now,
            until=order["until"],
            margins=margins,
            finish_by=order["finish_by"],
            channel=channel,
            output=read,
            lease=mapped,
            grace=min(_GRACE, order["lease"] / 10),
            is_program=program is not None,
        )
        self.runs[run.id] = run
        self.selector.register(read, selectors.EVENT_READ)
        self.selector.register(channel.fd, selectors.EVENT_READ)
        self.keeper.send({"t": "started", "id": run.id, "pid": pid})

    def _fork(self) -> int:
        """Fork a process that has a group of its own, dies with this one, and inherits nothing by accident."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                with _no_way_back(returns=True):
                    os.setpgid(0, 0)
                    kernel.die_with_parent(self.pid)
                    null = os.open(os.devnull, os.O_RDONLY)
                    os.dup2(null, 0)
                    kernel.default_signals(python=True)
                return 0
        finally:
            if os.getpid() == self.pid:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        with suppress(OSError):  # it has done so itself, and may have gone on to a program: whoever is first
            os.setpgid(pid, pid)
        return pid

    # --- what comes from the runs

    def _read_output(self, run: _Run, most: int = 16) -> None:
        """Keep the end of what has been printed; in turns, so that one run that prints cannot hold up the others."""
        for _ in range(most):
            if run.output < 0:
                return
            try:
                chunk = os.read(run.output, _CHUNK)
            except OSError:  # nothing there
                return
            if not chunk:
                self.selector.unregister(run.output)
                os.close(run.output)
                run.output = -1
                return
            run.tail += chunk
            if len(run.tail) > OUTPUT_TAIL:
                run.cut = True
                del run.tail[:-OUTPUT_TAIL]

    def _read_channel(self, run: _Run) -> None:
        if run.channel.pending:
            run.channel.flush()
        if run.channel.closed:
            return
        try:
            messages = run.channel.receive()
        except ValueError:  # the task wrote to a descriptor that is not its own
            messages = []
        if self._is_over(run.channel):
            self.selector.unregister(run.channel.fd)
        for message in messages:
            if message.get("t") == "program":
                run.is_program = True
            elif message.get("t") == "output":
                run.file = Opened(*message["file"]) if message.get("file") else None
            elif message.get("t") == "beside":
                run.doing = str(message.get("doing", run.doing))
                run.trouble += [str(text) for text in message.get("trouble", ())]
                del run.trouble[20:]
            elif message.get("t") == "result":
                self._take_result(run, message)

    def _take_result(self, run: _Run, message: Message) -> None:
        """Take a run's own word of how it went, unless another end of it has been decided, or should have been."""
        if message.get("status") == "failed" and self._must_stop(run) and run.verdict is None:
            # It stopped when check() told it to, and was quicker than this process: why it had to is what is recorded.
            run.ending = run.ending or "lost"
        if run.verdict is not None or run.ending:
            run.channel.send({"t": "late"})
            return
        run.verdict = {
            "status": str(message.get("status", "failed")),
            "reason": str(message.get("reason", "")),
            "error": str(message.get("error", "")),
            "started": bool(message.get("started", True)),
        }
        run.leave_within = 2 * self.report_limit + float(message.get("within", 0.0))
        run.leave_by = boot_time() + run.leave_within
        run.told = bool(message.get("tell"))
        # Only now may it tell anybody: had its end been decided before, another status would be recorded.
        if run.order.get("output"):
            self._read_output(run, most=64)
            run.channel.send({"t": "tell", "output": _text(run)})
        else:
            run.channel.send({"t": "tell"})

    def _is_over(self, channel: Lines) -> bool:
        return channel.closed and channel.fd in self.selector.get_map()

    # --- ends

    def _end(self, run: _Run, why: str) -> None:
        """
        Begin to end a run: TERM, and KILL a grace later; KILL at once where another server may have begun.

        One that is over but for its hooks may take its time for them, except when this process has to go: nobody else
        would record how it went.
        """
        if run.status is not None or (why != "lost" and (run.ending or run.kill_at is not None)):
            return
        if run.verdict is not None and why not in ("lost", "stopping"):
            return
        if run.verdict is None:
            run.ending = run.ending or why
        if why == "lost":
            run.write_lease()
            self._kill(run)
        else:
            run.kill_at = boot_time() + run.grace
            self._signal(run, signal.SIGTERM)

    def _must_stop(self, run: _Run) -> bool:
        """Has its lease not been renewed in time? ``current_run().check()`` says so from the same moment on."""
        return boot_time() >= run.until - run.margins.term

    def _kill(self, run: _Run) -> None:
        run.killed = True
        self._signal(run, signal.SIGKILL)

    def _signal(self, run: _Run, signum: int) -> None:
        """Signal its group, and whatever left the group but is known by its parents or by its environment."""
        table = kernel.processes()
        began = {process.pid: process.began for process in table}
        strays = kernel.descendants(run.pid, table) | kernel.marked([run.id], table)
        # Those that have lost their parents and hide their environment are known from the signal before.
        strays |= {pid for pid, since in run.strays.items() if began.get(pid) == since}
        kernel.kill_group(run.pid, signum)
        run.strays = {pid: began[pid] for pid in strays - {run.pid, self.pid} if kernel.kill(pid, signum)}

    def _end_what_must(self) -> None:
        now = boot_time()
        for run in self.runs.values():
            if run.status is not None or run.killed:
                continue
            if now >= run.until - run.margins.kill:
                run.ending = run.ending or ("" if run.verdict else "lost")
                run.write_lease()
                self._kill(run)
            elif run.kill_at is not None and now >= run.kill_at:
                self._kill(run)
            elif run.leave_by is not None and now >= run.leave_by:
                self._say(
                    f"the process of {run.order['name']} had not left {run.leave_within:.0f} s after its end "
                    "(a receiver, a handler of the log or a hook hangs): killed; its result stands"
                )
                self._kill(run)
            elif self._must_stop(run):
                if not run.ending and run.verdict is None:
                    run.ending = "lost"
                    run.write_lease()
                    self._signal(run, signal.SIGTERM)
            elif run.finish_by is not None and now >= run.finish_by:
                self._end(run, "limit")
        alive = [run.until - run.margins.timer for run in self.runs.values() if run.status is None and not run.killed]
        self.timer.set(min(alive, default=0.0))

    def _reap(self) -> None:
        """
        Collect who has died, and tell the keeper of each run whose group is gone.

        The group is killed while its leader is a zombie, for then its number cannot be anybody else's.
        """
        with suppress(OSError):
            while os.read(self.awake, 4096):
                pass
        by_pid = {run.pid: run for run in self.runs.values() if run.status is None}
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if dead is None:
                break
            run = by_pid.get(dead.si_pid)
            if run is not None:
                if run.ending or run.killed:
                    self._kill(run)
                kernel.kill_group(run.pid, signal.SIGKILL)
            _, status = os.waitpid(dead.si_pid, 0)
            if run is not None:
                run.status = status
            elif self.reporter is not None and self.reporter.pid == dead.si_pid:
                self._reporter_gone()
        for run in [run for run in self.runs.values() if run.status is not None]:
            if self._group_is_gone(run) and self._has_its_output(run):
                self._ended(run)

    def _group_is_gone(self, run: _Run) -> bool:
        if run.killed and any(not _gone(pid, since) for pid, since in run.strays.items()):
            return False
        if not kernel.kill_group(run.pid, 0):
            return True
        if not kernel.LINUX:
            return False
        # Zombies of a parent that left the group still count for the signal; they run nothing any more.
        return not any(p.group == run.pid and p.session == self.pid and not p.zombie for p in kernel.processes())

    def _has_its_output(self, run: _Run) -> bool:
        """
        Have what a run that died wrote to its file read, by a process for that alone: a file system may hang.

        It writes into a pipe in the place of the run's own.
        """
        self._read_channel(run)
        if run.file is None:
            return True
        if run.reader is not None:
            self._read_output(run)
            if run.output >= 0 and boot_time() < run.read_by:
                return False
            if run.output >= 0:  # its end of the pipe is open, so that it is there still
                kernel.kill(run.reader, signal.SIGKILL)
            return True
        read, write = os.pipe()
        try:
            run.reader = self._fork()
        except OSError:
            os.close(read)
            os.close(write)
            return True
        if run.reader == 0:
            with _no_way_back():
                kernel.close_all_but({0, 1, 2, write})
                tail = memoryview(read_tail(run.file))
                while tail:
                    tail = tail[os.write(write, tail) :]
        os.close(write)
        self._read_output(run, most=64)
        if run.output >= 0:
            self.selector.unregister(run.output)
            os.close(run.output)
        os.set_blocking(read, False)
        self.selector.register(read, selectors.EVENT_READ)
        run.output, run.read_by = read, boot_time() + _READING
        return False

    def _ended(self, run: _Run) -> None:
        del self.runs[run.id]
        self._read_channel(run)
        self._read_output(run, most=64)
        ended = {"t": "ended", "id": run.id, "told": run.told, "seconds": boot_time() - run.began}
        if run.doing:
            run.trouble.append(f"{run.doing}: {'did not end, and was killed' if run.killed else 'ended the process'}")
        outcome = self._outcome(run)
        if run.trouble:
            outcome = outcome | {
                "reason": "; ".join(filter(None, (outcome.get("reason"), *run.trouble)))[:_MOST_TROUBLE]
            }
        self.keeper.send(ended | {"output": _text(run)} | outcome)
        if run.output >= 0:
            self.selector.unregister(run.output)
            os.close(run.output)
        if not run.channel.closed:
            self.selector.unregister(run.channel.fd)
        run.channel.close()
        run.lease.close()

    def _outcome(self, run: _Run) -> Message:
        assert run.status is not None
        if run.verdict is not None:
            return run.verdict
        if run.ending == "lost":
            return _bad("lost", "ended: this server could not renew the lease of the run in time, or had lost it")
        if run.ending == "limit":
            return _bad(
                "timed_out", f"ended: not finished {round(run.order['allowed'] or 0, 2):g} s after it began, its limit"
            )
        if run.ending == "stopping":
            return _bad("failed", "ended: runschedule was stopped, and the run was not finished within the grace")
        code = os.waitstatus_to_exitcode(run.status)
        if run.is_program:
            return _bad("failed", ended_with(code)) if code else {"status": "succeeded"}
        without = "" if code < 0 else ": the process ended without a result (os._exit, or the like)"
        return _bad("failed", ended_with(code) + without)

    # --- reports

    def _deliver(self) -> None:
        """Hand the next event to the reporter, one at a time, and replace a reporter that hangs."""
        reporter = self.reporter
        if reporter is not None:
            for message in reporter.channel.receive():
                if message.get("t") == "ready":
                    reporter.ready = True
                elif message.get("t") == "done" and reporter.event is not None:
                    self.keeper.send({"t": "told", "n": reporter.event[0]})
                    reporter.event = None
            if (reporter.event or not reporter.ready) and boot_time() >= reporter.limit_at:
                if reporter.event and not reporter.given_up:
                    what = _brief(reporter.event[1])
                    self._say(f"a report took longer than {self.report_limit:g} s and was given up: {what}")
                reporter.given_up = True
                kernel.kill_group(reporter.pid, signal.SIGKILL)
                reporter.limit_at = boot_time() + 1
            elif self._is_over(reporter.channel):
                self.selector.unregister(reporter.channel.fd)
                kernel.kill_group(reporter.pid, signal.SIGKILL)
            reporter.channel.flush()
        if not self.reports:
            return
        if self.reporter is None:
            self._start_reporter()
        elif self.reporter.ready and self.reporter.event is None and not self.reporter.channel.closed:
            n, event = self.reports.popleft()
            self.reporter.event = (n, event)
            self.reporter.limit_at = boot_time() + self.report_limit
            self.keeper.send({"t": "taken", "n": n})
            self.reporter.channel.send({"event": event})

    def _start_reporter(self) -> None:
        ours, theirs = descriptors()
        channel = Lines(ours)
        channel.send({"role": "reporter"})
        pid = self._fork()
        if pid == 0:
            with _no_way_back():
                kernel.close_all_but(self.inherited | self.launcher.keep | {0, 1, 2, theirs})
                os.set_blocking(theirs, True)
                self.launcher.reporter(theirs)
        os.close(theirs)
        self.selector.register(ours, selectors.EVENT_READ)
        self.reporter = _Reporter(pid=pid, channel=channel, limit_at=boot_time() + _STARTUP)

    def _reporter_gone(self) -> None:
        reporter = self.reporter
        assert reporter is not None
        self.reporter = None
        if reporter.channel.fd in self.selector.get_map():
            self.selector.unregister(reporter.channel.fd)
        for message in reporter.channel.receive():
            if message.get("t") == "done" and reporter.event is not None:
                self.keeper.send({"t": "told", "n": reporter.event[0]})
                reporter.event = None
        reporter.channel.close()
        if reporter.event is not None:
            if not reporter.given_up:
                self._say(f"the reporter died of a report, which was given up: {_brief(reporter.event[1])}")
            self.keeper.send({"t": "told", "n": reporter.event[0]})
        elif not reporter.ready and self.reports:
            n, event = self.reports.popleft()  # or a command that cannot start would be started for ever
            self._say(f"the reporter could not start; not reported: {_brief(event)}")
            self.keeper.send({"t": "taken", "n": n})
            self.keeper.send({"t": "told", "n": n})

    # --- the loop's own

    def _wait(self) -> None:
        now = boot_time()
        wake = now + _LONGEST_WAIT
        for run in self.runs.values():
            if run.status is not None:
                wake = min(wake, now + 0.01)  # its group is about to be gone
                continue
            if not run.killed:
                wake = min(wake, run.until - (run.margins.kill if run.ending or run.verdict else run.margins.term))
                for moment in (run.kill_at, run.leave_by, None if run.ending or run.verdict else run.finish_by):
                    wake = wake if moment is None else min(wake, moment)
            if run.channel.pending:
                wake = min(wake, now + 0.05)
        if self.reporter is not None and (self.reporter.event or not self.reporter.ready):
            wake = min(wake, self.reporter.limit_at)
        if self.close_by is not None:
            wake = min(wake, self.close_by)
        self.selector.modify(
            self.keeper.fd, selectors.EVENT_READ | (selectors.EVENT_WRITE if self.keeper.pending else 0)
        )
        self.selector.select(max(0.0, wake - now))

    def _all_done(self) -> bool:
        if self.close_by is not None and boot_time() >= self.close_by:
            return True
        if self.runs or self.reports:
            return False
        if self.reporter is not None:
            if self.reporter.event is None and self.reporter.ready:
                self.reporter.ready = False  # no more for it; it leaves at the end of file
                with suppress(OSError):
                    shutdown(self.reporter.channel.fd)
                self.reporter.limit_at = boot_time() + self.report_limit
            return False
        return not self.keeper.pending

    def _end_everything(self) -> None:
        """KILL what still runs, wait (not for ever) until it is gone, and leave."""
        if self.reporter is not None:
            kernel.kill_group(self.reporter.pid, signal.SIGKILL)
        until = boot_time() + 1.0
        while self.runs and boot_time() < until:
            for run in self.runs.values():
                if run.status is None:
                    run.ending = run.ending or ("" if run.verdict else "stopping")
                    self._kill(run)
            self._reap()
            time.sleep(0.002)
        until = boot_time() + 0.2
        while self.keeper.pending and boot_time() < until:
            self.keeper.flush()
            time.sleep(0.002)

    def _say(self, text: str) -> None:
        """Write a line to standard error, if that does not have to be waited for."""
        with suppress(OSError, ValueError):
            if select.select((), (2,), (), 0)[1]:
                os.write(2, f"multiserver_schedule: {text}\n".encode(errors="replace")[: select.PIPE_BUF])


def become(program: list[str], channel: int) -> NoReturn:
    """Go on as this program; where that cannot be, say so as the result."""
    try:
        os.write(channel, b'{"t":"program"}\n')
        kernel.close_all_but({0, 1, 2, channel})
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.set_inheritable(channel, False)
        os.execvp(program[0], program)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) and shutil.which(program[0]) is None
        text = f"program not found: {program[0]}" if missing else f"{program[0]} could not be started: {error}"
        verdict = {"t": "result", "status": "failed", "reason": "", "error": text, "started": True, "tell": False}
        with suppress(OSError):
            os.write(channel, json.dumps(verdict).encode() + b"\n")
    os._exit(127)


def environment(order: Mapping[str, Any]) -> dict[str, str]:
    """Return what a program is told of its run."""
    return {
        "MULTISERVER_SCHEDULE_NAME": order["name"],
        "MULTISERVER_SCHEDULE_DUE_AT": order["due_at"],
        "MULTISERVER_SCHEDULE_FENCE": str(order["fence"]),
        "MULTISERVER_SCHEDULE_KEY": order["key"],
        "MULTISERVER_SCHEDULE_ATTEMPT": str(order["attempt"]),
        kernel.MARK: order["id"],
    }


def shutdown(fd: int) -> None:
    """End our direction of a socket: the other side reads an end of file."""
    with socket.socket(fileno=os.dup(fd)) as pair:
        pair.shutdown(socket.SHUT_WR)


class _no_way_back:
    """In a forked process: whatever goes wrong, never return into the runner's loop."""

    def __init__(self, returns: bool = False) -> None:
        self.returns = returns

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None:
            with suppress(Exception):
                sys.excepthook(kind, error, traceback)
        if error is not None or not self.returns:
            os._exit(70)


def _bad(status: str, error: str) -> Message:
    return {"status": status, "error": error}


def ended_with(code: int) -> str:
    """Return how a process ended, in words."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _text(run: _Run) -> str:
    tail = bytes(run.tail)
    if run.cut:  # its beginning may be the middle of a character
        tail = tail.lstrip(bytes(range(0x80, 0xC0)))
    return tail.decode("utf-8", errors="replace")


def _shared_memory() -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("lease")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, mmap.PAGESIZE)
    return fd


def _gone(pid: int, began: int) -> bool:
    """Is a process that we killed gone (its pid may be another's by now), or only a zombie of somebody else's?"""
    found = kernel.process(pid)
    return found is None or found.zombie or found.began != began


def _brief(event: Mapping[str, Any]) -> str:
    return json.dumps(event, default=str)[:300]


def serve(fd: int, launcher: Launcher, *, report_limit: float, inherited: frozenset[int]) -> NoReturn:
    """Be the runner until the keeper is gone; does not return."""
    status = 70
    try:
        with suppress(OSError):  # it leads a session already, where it was spawned
            os.setsid()
        kernel.default_signals(python=True)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        kernel.adopt_orphans()
        Serve(fd, launcher, report_limit=report_limit, inherited=inherited).forever()
        status = 0
    except BaseException:
        with suppress(Exception):
            sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def main(arguments: list[str]) -> NoReturn:
    """Be the runner of a keeper that could not fork: descriptor, limit of a report, and the command of a child."""
    fd, report_limit, *command = arguments
    serve(int(fd), Spawn(command), report_limit=float(report_limit), inherited=frozenset({0, 1, 2}))
