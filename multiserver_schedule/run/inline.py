"""Runs in the keeper's own process, one after another: for Windows, debuggers and tests. Ends nothing."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import IO, Any

from django.db import connections

from ..entries import Claim, Outcome, OutputFile
from ..signals import task_failed, task_started, task_succeeded
from .base import (
    Deliver,
    Ended,
    Event,
    Margins,
    Message,
    Runner,
    Started,
    Tasks,
    boot_time,
    is_accompanied,
    starts_untold,
)
from .beside import Beside, Ending, steps_after, steps_before, with_events
from .current import CurrentRun, set_current_run
from .output import open_file
from .perform import Verdict, act, announce, clean, perform
from .program import ProgramFailed, run_program
from .report import deliver_one
from .runner import OUTPUT_TAIL, environment

KeepAlive = Callable[[], None]


class _Tee(io.TextIOBase):
    """Prints as before, and keeps the end of it."""

    def __init__(self, shown: _Shown, kept: _Tail) -> None:
        self._shown = shown
        self._kept = kept

    def write(self, text: str) -> int:
        self._shown.write(text)
        self._kept.add(text)
        return len(text)

    def flush(self) -> None:
        self._shown.flush()

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)


class _Tail:
    def __init__(self) -> None:
        self.text = ""

    def add(self, text: str) -> None:
        self.text = (self.text + text)[-OUTPUT_TAIL:]


class _Shown:
    """Where a run prints beside its record: where it would, or into the file that it names, once it has begun."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._file: IO[str] | None = None

    def open(self, file: OutputFile) -> None:
        fd, _ = open_file(file.path, append=file.append)
        self._file = open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def share(self, other: _Shown) -> None:
        self._file = other._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, text: str) -> int:
        return (self._file or self._stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file or self._stream, name)


class InlineRunner(Runner):
    """
    Runs one claim in each ``poll``, in this process and thread.

    While something runs, a thread calls ``keep_alive`` every ``heartbeat`` seconds, which renews the leases; None is no
    thread (in a TestCase, where another thread would have another connection). A run cannot be ended: when its lease is
    lost it is told by ``current_run().check()``, and its outcome stands as it came.
    """

    can_end = False
    at_once: int | None = 1

    def __init__(
        self,
        tasks: Tasks,
        *,
        deliver: Deliver,
        server: str = "",
        keep_alive: KeepAlive | None = None,
        heartbeat: float = 10.0,
    ) -> None:
        self.tasks = tasks
        self.deliver = deliver
        self.server = server
        self.keep_alive = keep_alive
        self.heartbeat = heartbeat
        self._waiting: deque[Claim] = deque()
        self._until: dict[str, float] = {}
        self._messages: list[Message] = []

    def start(self) -> None:
        """Do nothing: this process is the runner."""

    def run(self, claim: Claim, *, until: float, finish_by: float | None) -> None:
        """Have it run by a ``poll``; there is no way to keep ``finish_by``."""
        self._waiting.append(claim)
        self._until[claim.owner] = until

    def renew(self, until: Mapping[str, float]) -> None:
        """Move the deadlines of these owners on, for ``current_run().check()``."""
        for owner, moment in until.items():
            if owner in self._until:
                self._until[owner] = max(moment, self._until[owner])

    def end(self, owner: str, why: str) -> None:
        """Not run it, if it waits; one that runs is only told, by ``current_run().check()``."""
        if owner in self._until:
            self._until[owner] = 0.0
        for claim in [claim for claim in self._waiting if claim.owner == owner]:
            self._waiting.remove(claim)
            del self._until[owner]
            outcome = Outcome(status="lost" if why == "lost" else "failed", error="ended before it began")
            self._messages.append(Ended(owner, outcome, told=False))

    def report(self, event: Event) -> None:
        """Deliver the event now; a fault of a receiver is logged."""
        deliver_one(event, with_events(lambda: self.tasks, self.deliver))

    def poll(self, timeout: float) -> list[Message]:
        """Run what waits longest, if anything does, and return what happened. Does not wait for anything else."""
        if self._waiting and not self._messages:
            self._run(self._waiting.popleft())
        messages, self._messages = self._messages, []
        return messages

    def check(self) -> None:
        """Do nothing: there is nobody to watch."""

    def close(self, timeout: float) -> None:
        """Give up what still waits."""
        for claim in list(self._waiting):
            self.end(claim.owner, "stopping")

    def _run(self, claim: Claim) -> None:
        margin = Margins.of(claim.occurrence.lease.total_seconds()).term
        run = CurrentRun.of(claim, lambda: self._until[claim.owner] - margin)
        tail = _Tail()
        began = boot_time()
        self._messages.append(Started(claim.owner, os.getpid()))
        task = claim.task
        is_program = task.kind == "exec"
        beside = Beside(task, run)
        out, err = _Shown(sys.stdout), _Shown(sys.stderr)

        def begin() -> None:
            if not starts_untold(task):
                announce(task_started, task, run, limit=None)
            if (file := task.output_file) is not None:
                beside.open_output(file, lambda: out.open(file))
                err.share(out)
            beside.take(steps_before(task))

        before = set_current_run(run)
        try:
            with self._kept_alive():
                with redirect_stdout(_Tee(out, tail)), redirect_stderr(_Tee(err, tail)):
                    verdict = perform(
                        task, run, begin=begin, act=(lambda: _run_program(claim)) if is_program else (lambda: act(task))
                    )
                if isinstance(verdict.exception, ProgramFailed):
                    verdict = Verdict("failed", error=str(verdict.exception))
                out.close()
                seconds, output = boot_time() - began, clean(tail.text)
                tell = verdict.status != "skipped" and (not is_program or is_accompanied(task))
                if tell:
                    if verdict.status == "succeeded":
                        announce(task_succeeded, task, run, limit=None, seconds=seconds)
                    else:
                        details = {"status": "failed", "error": verdict.error, "exception": verdict.exception}
                        announce(task_failed, task, run, limit=None, **details)
                    final = not claim.occurrence.is_retried(run.started_at + timedelta(seconds=seconds))
                    ending = Ending(verdict.status, verdict.error, output, seconds)
                    beside.take(steps_after(task, verdict.status, final=final), ending)
        finally:
            set_current_run(before)
            self._until.pop(claim.owner, None)
        outcome = Outcome(
            status=verdict.status,
            reason="; ".join(filter(None, (verdict.reason, *beside.trouble)))[:255],
            error=verdict.error,
            output=output,
            started=verdict.started,
            seconds=boot_time() - began,
        )
        self._messages.append(Ended(claim.owner, outcome, told=tell))
        for interrupt in (verdict.exception, beside.interrupted):
            if isinstance(interrupt, KeyboardInterrupt):
                raise interrupt  # Ctrl-C stops the pass as well; what it ended is returned by the next poll

    @contextmanager
    def _kept_alive(self) -> Iterator[None]:
        if self.keep_alive is None:
            yield
            return
        stop = threading.Event()
        keep_alive = self.keep_alive

        def renew() -> None:
            try:
                while not stop.wait(self.heartbeat):
                    with suppress(Exception):  # the next one may succeed; the deadline holds whatever comes
                        keep_alive()
            finally:
                connections.close_all()  # this thread's own

        thread = threading.Thread(target=renew, name="multiserver_schedule: renews", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _run_program(claim: Claim) -> None:
    occurrence = claim.occurrence
    told = environment(
        {
            "name": occurrence.row,
            "due_at": occurrence.due_at.isoformat(),
            "fence": claim.fence,
            "key": occurrence.key,
            "attempt": occurrence.attempt,
            "id": claim.owner,
        }
    )
    program = [str(word) for word in claim.task.target]  # type: ignore[union-attr]
    run_program(program, environ={**os.environ, **told}, shown=sys.stdout)
