"""Do what was declared: ask the filters, call the target, and turn whatever comes of it into a verdict."""

from __future__ import annotations

import asyncio
import inspect
import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from asgiref.sync import async_to_sync
from django.core.management import call_command
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.dispatch import Signal
from django.utils.module_loading import import_string

from ..entries import Filter, ScheduledTask, Status
from .current import CurrentRun

ERROR_TAIL: Final = 64 * 1024
log: Final = logging.getLogger("multiserver_schedule")


class TookTooLong(Exception):
    """A receiver or a hook was broken off at its limit."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run went, as its own process knows it."""

    status: Status
    reason: str = ""
    error: str = ""
    started: bool = True
    exception: BaseException | None = None


def perform(task: ScheduledTask, run: CurrentRun, *, begin: Callable[[], None], act: Callable[[], None]) -> Verdict:
    """
    Ask the filters, ``begin``, ``act``, and say how it went; whatever user code raises is part of the answer.

    ``sys.exit`` ends the run, not the process that performs it: with 0 or None it succeeded.
    """
    before = open_blocks()
    try:
        if not wanted(task.filters):
            return Verdict("skipped", reason="filtered", started=False)
        begin()
        act()
    except SystemExit as error:
        if error.code is not None and error.code != 0:
            return Verdict("failed", error=clean(f"sys.exit({error.code!r})"), exception=error)
    except BaseException as error:
        return Verdict("failed", error=described(error), exception=error)
    finally:
        left = roll_back(before)
    if left:
        return Verdict(
            "failed",
            error=f"a transaction was left open on {', '.join(map(repr, left))} when the task returned, and what it "
            "did there was rolled back. Commit it, or leave its atomic() block, before the task ends.",
        )
    return Verdict("succeeded")


def wanted(filters: tuple[Filter, ...]) -> bool:
    """Do all filters agree to the run? They are asked in order, until one does not."""
    for given in filters:
        test = import_string(given.test) if isinstance(given.test, str) else given.test
        if bool(call(test)) is not given.runs_if:
            return False
    return True


def act(task: ScheduledTask) -> None:
    """Run the command or the function."""
    if task.kind == "command":
        call_command(str(task.target), *task.args, **task.kwargs)
    else:
        target = import_string(task.target) if isinstance(task.target, str) else task.target
        call(target, *task.args, **task.kwargs)


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of either kind, and return its answer."""
    return waited_for(function(*args, **kwargs))


def waited_for(answer: Any, most: float | None = None) -> Any:
    """Return the answer of a function, awaited where it is to be: for so many seconds, then TookTooLong is raised."""
    # Asked of the answer, not of the function: partials, decorated functions and callable objects may be async too.
    return async_to_sync(_wait_for)(answer, most) if inspect.isawaitable(answer) else answer


async def _wait_for(answer: Any, most: float | None) -> Any:
    if most is None:
        return await answer
    try:
        return await asyncio.wait_for(answer, most)
    except asyncio.TimeoutError:
        raise TookTooLong(f"took longer than {most:g} s") from None


def announce(sent: Signal, task: ScheduledTask, run: CurrentRun, *, limit: float | None, **details: Any) -> None:
    """Send a signal; a receiver that raises, or hangs for longer than ``limit`` seconds, is logged and nothing else."""
    answers: list[tuple[Any, Any]] = []
    try:
        with limited(limit):
            answers = sent.send_robust(sender=ScheduledTask, task=task, run=run, server=run.server, **details)
    except BaseException as error:  # sys.exit in a receiver, or a limit that came between two of them
        answers.append((None, error))
    for receiver, answer in answers:
        if isinstance(answer, BaseException):
            # Django has logged the traceback (django.dispatch); this line says which run it was.
            with suppress(Exception), limited(limit):
                log.warning(
                    "A receiver of a signal failed: %s: %r task=%s due=%s server=%s",
                    getattr(receiver, "__qualname__", receiver),
                    answer,
                    task.name,
                    run.due_at.isoformat(),
                    run.server,
                )


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise TookTooLong inside the block after so many seconds, and again after as many more (main thread, POSIX)."""
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(*_: Any) -> None:
        raise TookTooLong(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def described(error: BaseException) -> str:
    """Return the traceback as text, its end if it is long."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # a __str__ that raises, a cause that is its own cause
        text = f"{type(error).__qualname__} (its traceback could not be written)"
    return clean(text)[-ERROR_TAIL:]


def clean(text: str) -> str:
    """Return what every database can store: no NUL, no half of a surrogate pair."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


# --- transactions


def _initialised() -> list[str]:
    return [connection.alias for connection in connections.all(initialized_only=True)]


def _blocks(connection: BaseDatabaseWrapper) -> int:
    return len(connection.atomic_blocks) or int(connection.in_atomic_block)


def open_blocks() -> dict[str, int]:
    """Return how many atomic() blocks are open on each connection that is in use, for ``roll_back``."""
    return {alias: _blocks(connections[alias]) for alias in _initialised()}


def roll_back(before: Mapping[str, int]) -> list[str]:
    """
    Undo what was left uncommitted; return the aliases of those connections.

    A connection that was in a block already (a TestCase's) is the caller's, and is left as it is.
    """
    left = []
    for alias in _initialised():
        connection = connections[alias]
        opened = before.get(alias, 0)
        with suppress(Exception):  # a connection that is broken has committed nothing
            if _blocks(connection) > opened or (not opened and _in_transaction(connection)):
                left.append(alias)
                if not opened:
                    connection.close()
                    del connections[alias]  # its state says "in a block": the next to ask gets a fresh one
    return left


def _in_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Is there uncommitted work outside any atomic() block: autocommit turned off, or a BEGIN by hand?"""
    raw = connection.connection
    if raw is None:
        return False
    if connection.vendor == "sqlite":
        return bool(raw.in_transaction)
    if connection.vendor == "postgresql":
        status = raw.get_transaction_status() if hasattr(raw, "get_transaction_status") else raw.info.transaction_status
        return status in (1, 2, 3)
    if getattr(connection, "mysql_is_mariadb", False):
        with connection.cursor() as cursor:
            cursor.execute("SELECT @@in_transaction")
            return bool(cursor.fetchone()[0])
    return not connection.get_autocommit()  # cannot be asked: then say so rather than lose it silently
